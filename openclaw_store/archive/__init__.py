"""Archive: move finished tasks to files in an open format, query them there, and restore them.

This room moves rows by a retention policy, and writes and reads the files. `pyarrow`, which only
the extra `archive` installs, is imported when one of these functions is called.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from openclaw_store.domain import Clock, utc_now
from openclaw_store.errors import UnavailableError

if TYPE_CHECKING:
    from openclaw_store.archive.reader import Archive
    from openclaw_store.database import Database


@asynccontextmanager
async def open_archive(
    location: str | Path,
    cluster: str | None = None,
    *,
    clock: Clock = utc_now,
    database: Database | None = None,
) -> AsyncIterator[Archive]:
    """Open an archive for reading; it has the reading methods of `TaskRepository`.

    Args:
        location: A folder, or the location of one, such as `s3://bucket/folder`.
        cluster: Only the tasks of this cluster; `None` for all clusters.
        clock: Returns the time from which a `timedelta` in a filter counts.
        database: An open database, with the keys of which sealed values are opened.

    Raises:
        InvalidDataError: If the location contains a password, or its scheme is unknown.
        UnavailableError: If pyarrow is not installed.
    """
    yield module("reader").Archive(location, cluster, clock=clock, database=database)


def module(name: str) -> Any:
    """Import a module of this room.

    Raises:
        UnavailableError: If the packages that it needs are not installed.
    """
    missing = [one for one in ("pyarrow", "xxhash") if find_spec(one) is None]
    if missing:
        raise UnavailableError(
            f'an archive needs {" and ".join(missing)}: pip install "openclaw-store[archive]"'
        )
    from importlib import import_module

    return import_module(f"{__name__}.{name}")
