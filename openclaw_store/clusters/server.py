"""`Server`: many clusters of one location, opened by one process."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Self

from openclaw_store.backends import (
    DEFAULT_ANSWER_SECONDS,
    DEFAULT_TIMEOUT_SECONDS,
    PostgreSQL,
    backend_of,
)
from openclaw_store.database import Database, Sharing
from openclaw_store.domain import check_limit_seconds, check_positive


class Server:
    """Clusters of one location that share the connections of a process.

    **Connections.** On PostgreSQL, all clusters share up to 5 connections for the library's reads,
    `pool_size` ones for `session()` blocks, and one that listens. A cluster has a connection of its
    own while it writes, and `idle_seconds` longer. On SQLite, there is nothing to share.
    **Sharing.** One instance serves any number of coroutines, and several event loops in threads of
    their own. A child of `fork` needs another one.

    Args:
        location: A URL of PostgreSQL, or a path with `{cluster}` in the place of the name.
        pool_size: Most connections for `session()` blocks of all clusters.
        idle_seconds: Time without a write after which a cluster gives its connection back.
        options: Further options of each `Database`.

    Raises:
        InvalidDataError: If the location or an option is not one of these.
    """

    def __init__(
        self,
        location: str | Path,
        *,
        pool_size: int = 4,
        idle_seconds: float = 5.0,
        timeout: float = DEFAULT_TIMEOUT_SECONDS,
        answer_timeout: float = DEFAULT_ANSWER_SECONDS,
        **options: Any,
    ) -> None:
        self._location = location
        self._options: dict[str, Any] = {
            "timeout": check_limit_seconds("timeout", timeout),
            "answer_timeout": check_limit_seconds("answer_timeout", answer_timeout),
            **options,
        }
        pool_size = check_positive("pool_size", pool_size)
        idle_seconds = check_limit_seconds("idle_seconds", idle_seconds)
        self._sharing: Sharing | None = None
        if isinstance(backend_of(location, cluster="a"), PostgreSQL):
            backend = backend_of(location, timeout, answer_timeout)
            assert isinstance(backend, PostgreSQL)
            self._sharing = Sharing(backend, timeout, pool_size, idle_seconds)

    def cluster(self, name: str) -> Database:
        """Return the database of a cluster; close it, or its `StateManager`, before the server.

        Raises:
            InvalidDataError: If the name is refused.
        """
        database = Database(self._location, cluster=name, **self._options)
        if self._sharing is not None:
            database.share(self._sharing)
        return database

    async def close(self) -> None:
        """Close the shared connections."""
        if self._sharing is not None:
            await self._sharing.close()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *error: object) -> None:
        await self.close()
