"""The backend of a location."""

from __future__ import annotations

import re
from pathlib import Path

from openclaw_store.backends.base import DEFAULT_ANSWER_SECONDS, DEFAULT_TIMEOUT_SECONDS, Backend
from openclaw_store.backends.cluster_names import check_cluster, path_of_cluster
from openclaw_store.backends.postgresql.backend import PostgreSQL
from openclaw_store.backends.postgresql.location import is_postgresql
from openclaw_store.backends.sqlite.backend import SQLite
from openclaw_store.backends.sqlite.files import file_of
from openclaw_store.errors import InvalidDataError

# A path made of a URL has one slash in place of two.
_SECRET = re.compile(
    r"(?i)\w*//[^/]*@|[\w+.-]{2,}://?[^/]*@|(?![a-z]:\\)[^/]*:[^/]*@|"
    r"(?!\.{0,2}/).*(password|passwd|pwd)\s*=",
    re.DOTALL,
)


def has_secret(text: str | Path) -> bool:
    """Return true if a text looks like the location of a server, which may have a password."""
    return is_postgresql(str(text)) or _SECRET.match(str(text)) is not None


def refuse_location(name: str, path: str | Path) -> None:
    """Refuse the location of a server in place of a path.

    Raises:
        InvalidDataError: With `name`, and without the location.
    """
    if has_secret(path):
        raise InvalidDataError(
            name, "looks like the location of a server: give a path, an absolute one if it is none"
        )


def backend_of(
    location: str | Path,
    timeout: float = DEFAULT_TIMEOUT_SECONDS,
    answer_timeout: float = DEFAULT_ANSWER_SECONDS,
    cluster: str | None = None,
) -> Backend:
    """Return the backend of a path or an SQLAlchemy URL; opens and makes nothing.

    Args:
        timeout: Seconds to wait for locks.
        answer_timeout: Seconds to wait for the answer of a server.
        cluster: The name of a cluster, one of many at this location.

    Raises:
        InvalidDataError: If the location is no supported database, or the name is refused.
        UnavailableError: If the driver is not installed.
    """
    if not isinstance(location, str | Path):
        raise InvalidDataError("db_path", f"must be a path or URL, not {type(location).__name__}")
    if cluster is not None:
        cluster = check_cluster(cluster)
    if is_postgresql(str(location)):
        if isinstance(location, Path):
            raise InvalidDataError("db_path", "is a URL in a Path: give it as text")
        return PostgreSQL(location, timeout, answer_timeout, cluster)
    if "://" not in str(location) and has_secret(location):  # the file would have it as its name
        raise InvalidDataError(
            "db_path",
            "looks like a URL without its scheme: begin it with postgresql://, or a path with ./",
        )
    return SQLite(file_of(path_of_cluster(location, cluster)), timeout, cluster)
