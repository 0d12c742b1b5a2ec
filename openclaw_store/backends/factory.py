"""The backend of a location."""

from __future__ import annotations

from pathlib import Path

from openclaw_store.backends.base import DEFAULT_ANSWER_SECONDS, DEFAULT_TIMEOUT_SECONDS, Backend
from openclaw_store.backends.postgresql.backend import PostgreSQL
from openclaw_store.backends.sqlite.backend import SQLite
from openclaw_store.backends.sqlite.files import file_of


def backend_of(
    location: str | Path,
    timeout: float = DEFAULT_TIMEOUT_SECONDS,
    answer_timeout: float = DEFAULT_ANSWER_SECONDS,
) -> Backend:
    """Return the backend of a path or an SQLAlchemy URL; opens and makes nothing.

    Args:
        timeout: Seconds to wait for locks.
        answer_timeout: Seconds to wait for the answer of a server.

    Raises:
        InvalidDataError: If the location is no supported database.
        UnavailableError: If the driver is not installed.
    """
    if isinstance(location, str) and location.startswith("postgresql"):
        return PostgreSQL(location, timeout, answer_timeout)
    return SQLite(file_of(location), timeout)
