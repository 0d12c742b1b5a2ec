"""How a copy of a database becomes a file: complete, and on the disk, or not at all."""

from __future__ import annotations

import os
import secrets
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from sqlalchemy import URL

from openclaw_store.errors import InvalidDataError, UnavailableError

_LIBPQ = {
    "host": "PGHOST",
    "port": "PGPORT",
    "user": "PGUSER",
    "password": "PGPASSWORD",
    "database": "PGDATABASE",
    "ssl": "PGSSLMODE",
    "passfile": "PGPASSFILE",
    "service": "PGSERVICE",
    "servicefile": "PGSERVICEFILE",
    "krbsrvname": "PGKRBSRVNAME",
    "target_session_attrs": "PGTARGETSESSIONATTRS",
}
"""How the programs of PostgreSQL are told what the driver is told."""


@contextmanager
def written_aside(target: Path, *, overwrite: bool, besides: Sequence[str] = ()) -> Iterator[Path]:
    """Where to write what shall be `target`: it is renamed at the end of the block.

    Args:
        target: Its folder is made.
        overwrite: Whether it may exist already.
        besides: How files end that may lie beside it, and belong to it.

    Raises:
        InvalidDataError: If `target` exists and is not to be overwritten.
        UnavailableError: If it cannot be written there.
    """
    if not overwrite:
        _refuse_existing(target)
    partial = target.with_name(f".{target.name}.{secrets.token_hex(4)}.partial")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        partial.touch(exist_ok=False)
        yield partial
        with partial.open("rb+") as file:
            os.fsync(file.fileno())
        for ending in besides:  # of the old one; they would be read into the new one
            target.with_name(target.name + ending).unlink(missing_ok=True)
        if not overwrite:  # somebody may have made it meanwhile
            _refuse_existing(target)
        partial.replace(target)
        try:
            _sync_folder(target.parent)
        except OSError as error:
            if overwrite:
                raise UnavailableError(
                    f"{target} was replaced, which may not outlast a power cut, as its folder "
                    f"cannot be synced: {error.strerror or error}"
                ) from error
            target.unlink()
            raise
    except OSError as error:
        reason = error.strerror or error
        raise UnavailableError(f"{target}: {reason}: check the path and the disk") from error
    finally:
        for ending in ("", *besides):
            with suppress(OSError):  # it was never made
                partial.with_name(partial.name + ending).unlink()


def _refuse_existing(target: Path) -> None:
    if os.path.exists(target):
        raise InvalidDataError(
            "path", f"{target} exists: choose another, or pass overwrite=True (--overwrite)"
        )


def unused_name(path: Path, ending: str) -> Path:
    """A name beside `path` that nothing has: with that ending, and a number if need be."""
    target, number = path.with_name(path.name + ending), 1
    while os.path.lexists(target):
        number += 1
        target = path.with_name(f"{path.name}{ending}-{number}")
    return target


def _sync_folder(folder: Path) -> None:
    if sys.platform == "win32":
        return  # a folder cannot be opened there
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def dump(url: URL, path: Path) -> None:
    """Have pg_dump write an archive, for pg_restore, of the database as it is at one moment.

    Raises:
        UnavailableError: If there is no pg_dump, or it fails.
    """
    program = shutil.which("pg_dump")
    if program is None:
        raise UnavailableError(
            "a backup of PostgreSQL needs pg_dump: install the package of PostgreSQL's "
            "client programs (on Debian, postgresql-client), and see that it is in PATH"
        )
    command = [program, "--format=custom", f"--file={path}"]
    # Nothing of it on the command line, which everybody can read.
    environment = {**os.environ, **_environment(url)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        location = url.render_as_string(hide_password=True)
        raise UnavailableError(f"{location}: pg_dump: {done.stderr.strip()}")


def _environment(url: URL) -> dict[str, str]:
    """What leads the programs of PostgreSQL to where the driver is led."""
    _, arguments = url.get_dialect()().create_connect_args(url)
    environment = {"PGSSLNEGOTIATION": "direct"} if arguments.get("direct_tls") else {}
    for name, value in arguments.items():
        if name in _LIBPQ:
            values = value if isinstance(value, list) else [value]
            environment[_LIBPQ[name]] = ",".join(map(str, values))
    return environment
