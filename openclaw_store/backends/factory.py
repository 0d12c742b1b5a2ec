"""Which database a location means, and what a database is to the rest of the library."""

from __future__ import annotations

from pathlib import Path

from openclaw_store.backends.base import DEFAULT_TIMEOUT_SECONDS, Backend
from openclaw_store.backends.postgresql.backend import PostgreSQL
from openclaw_store.backends.sqlite import backend as sqlite


def backend_of(location: str | Path, timeout: float = DEFAULT_TIMEOUT_SECONDS) -> Backend:
    """The database that a path or an SQLAlchemy URL means; nothing is opened or made.

    Args:
        timeout: Seconds to wait for locks, and for answers of a server.

    Raises:
        InvalidDataError: If it means no database that is supported.
        UnavailableError: If the driver is not installed.
    """
    if isinstance(location, str) and location.startswith("postgresql"):
        return PostgreSQL(location, timeout)
    return sqlite.SQLite(sqlite.file_of(location), timeout)
