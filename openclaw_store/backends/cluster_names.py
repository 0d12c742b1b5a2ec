"""Names of clusters: each is a schema on PostgreSQL, and a part of a path on SQLite.

A name needs no quotes in SQL and no escapes in a path, so it is the same wherever it is written.
"""

from __future__ import annotations

import re
from pathlib import Path

from sqlalchemy.dialects.postgresql import asyncpg

from openclaw_store.backends.base import PUBLIC
from openclaw_store.errors import InvalidDataError, safe_repr

PLACE = "{cluster}"
"""The part of a SQLite path that is replaced with the name of the cluster."""

_NAME = re.compile(r"[a-z][a-z0-9_]{0,62}")
_RESERVED = {PUBLIC, "information_schema"}
# Words of PostgreSQL that SQLAlchemy does not quote.
_WORDS = {"collation", "concurrently", "lateral", "system_user", "tablesample"}
_needs_quotes = asyncpg.dialect().identifier_preparer.quote  # type: ignore[no-untyped-call]


def check_cluster(name: object) -> str:
    """Return a name of a cluster.

    Raises:
        InvalidDataError: If it is not one.
    """
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        raise InvalidDataError(
            "cluster",
            f"must be a small letter, then up to 62 of a-z, 0-9 and _, not {safe_repr(name)}",
        )
    if name in _RESERVED | _WORDS or name.startswith("pg_") or _needs_quotes(name) != name:
        raise InvalidDataError("cluster", f"{name!r} has a meaning in SQL: choose another name")
    return name


def path_of_cluster(location: str | Path, cluster: str | None) -> str | Path:
    """Return the path of a cluster's file.

    Raises:
        InvalidDataError: If only one of the path and the caller names a cluster.
    """
    has_place = str(location).count(PLACE) == 1
    if has_place and cluster is None:
        wanted = 'name one, as cluster="berlin" (--cluster berlin)'
        raise InvalidDataError("cluster", f"is missing, though the path contains {PLACE}: {wanted}")
    if cluster is None:
        return location
    if not has_place:
        example = f"./data/{PLACE}.db"
        raise InvalidDataError(
            "db_path", f"must contain {PLACE} once, as {example} does: a file is one cluster"
        )
    return type(location)(str(location).replace(PLACE, cluster))
