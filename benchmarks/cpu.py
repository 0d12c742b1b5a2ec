"""CPU time of a PostgreSQL server, from the operating system."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

from benchmarks.work import connected

_PROC = Path("/proc")
_PARENT, _USER = 1, 11  # positions after the name of the program: fields 4 and 14


def of_server(postmaster: int | None) -> float:
    """Return the CPU seconds of a server, including its ended sessions.

    The kernel adds the times of an ended session to its parent: `cutime` and `cstime` of
    proc_pid_stat(5).

    Args:
        postmaster: The server's first process; `None` for no server, which takes no time.
    """
    if postmaster is None:
        return 0
    ticks = 0
    for process, fields in _stat():
        if process == postmaster:
            ticks += sum(map(int, fields[_USER : _USER + 4]))
        elif int(fields[_PARENT]) == postmaster:
            ticks += sum(map(int, fields[_USER : _USER + 2]))
    return ticks / os.sysconf("SC_CLK_TCK")


async def find_postmaster(url: str) -> int | None:
    """Return the first process of a server; `None` if `/proc` of this machine lacks it."""
    async with connected(url) as connection:
        session = await connection.fetchval("SELECT pg_backend_pid()")
        with suppress(FileNotFoundError):
            name, _, fields = (_PROC / str(session) / "stat").read_text().rpartition(")")
            if name.endswith("(postgres"):
                return int(fields.split()[_PARENT])
    return None


def _stat() -> Iterator[tuple[int, list[str]]]:
    """Yield all processes with their fields after the name of the program."""
    for file in _PROC.glob("[0-9]*/stat"):
        with suppress(FileNotFoundError, ProcessLookupError):  # it ended meanwhile
            yield int(file.parent.name), file.read_text().rpartition(")")[2].split()
