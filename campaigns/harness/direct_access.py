"""Direct access to a database, without the library: queries, checks for damage, a second client."""

from __future__ import annotations

import asyncio
import sqlite3
from collections.abc import Sequence
from contextlib import closing
from importlib import import_module
from pathlib import Path
from typing import Any

from sqlalchemy import make_url

from campaigns.harness.campaign import HangError, Location

Rows = Sequence[tuple[Any, ...]]

LAST_REVISION = """
    SELECT coalesce((SELECT max(revision) FROM changes), compacted) AS revision FROM counters"""
"""The query of the revision of the newest change."""

_CHECK_INDEXES = """
    SELECT bt_index_check(oid, heapallindexed => true) FROM pg_class
    WHERE relkind = 'i' AND relnamespace = 'public'::regnamespace"""
_CHECK_TABLES = """
    SELECT relname, msg FROM pg_class, verify_heapam(oid)
    WHERE relkind = 'r' AND relnamespace = 'public'::regnamespace"""
_OTHERS = """
    SELECT count(*) FROM pg_stat_activity
    WHERE datname = current_database() AND pid <> pg_backend_pid()"""

_PATIENCE_SECONDS = 60.0


class UnreadableError(Exception):
    """A database cannot be read."""


def fetch(location: Location, *queries: str) -> list[Rows]:
    """Return the rows of each query, all read in one transaction; not on a running event loop.

    Raises:
        UnreadableError: If they cannot be read.
    """
    if isinstance(location, Path):
        return _fetch_from_file(location, queries)
    return asyncio.run(_fetch_from_server(location, queries))


def find_damage(location: Location) -> list[str]:
    """List the damage that the database engine finds in its pages and indexes.

    SQLite checks a file; amcheck, which is installed for it, checks a database on a server. Do not
    call it on a running event loop.

    Raises:
        UnreadableError: If the database cannot be read at all.
    """
    if isinstance(location, Path):
        pragmas = ("PRAGMA integrity_check", "PRAGMA foreign_key_check")
        found = [row for rows in _fetch_from_file(location, pragmas) for row in rows]
        return [", ".join(map(str, row)) for row in found if row != ("ok",)]
    return asyncio.run(_find_damage_on_server(location))


class _File:
    """A second client of a file; its calls block the event loop."""

    def __init__(self, path: Path) -> None:
        self._connection = sqlite3.connect(path, isolation_level=None, timeout=1)

    async def fetch(self, query: str) -> list[dict[str, Any]]:
        """Return the rows of a query, keyed by column name."""
        cursor = self._connection.execute(query)
        columns = [name for name, *_ in cursor.description]
        return [dict(zip(columns, row, strict=True)) for row in cursor]

    async def mark(self) -> object:
        """Return a value that changes with each commit."""
        return await self.fetch("PRAGMA data_version")

    async def lock(self) -> None:
        """Take the write lock within a second, and release it."""
        self._connection.execute("BEGIN IMMEDIATE")
        self._connection.execute("ROLLBACK")

    async def close(self) -> None:
        self._connection.close()


class _Server:
    """A second client of a database on a server."""

    def __init__(self, connection: Any) -> None:
        self._connection = connection

    async def fetch(self, query: str) -> list[dict[str, Any]]:
        """Return the rows of a query, keyed by column name."""
        return [*map(dict, await self._connection.fetch(query))]

    async def mark(self) -> object:
        """Return a value that changes with each commit."""
        return await self.fetch("SELECT pg_snapshot_xmax(pg_current_snapshot())")

    async def lock(self) -> None:
        """Take the write lock within a second, and release it."""
        async with self._connection.transaction():
            await self._connection.execute("SET LOCAL lock_timeout = '1s'")
            await self._connection.execute("SELECT FROM counters FOR UPDATE")

    async def close(self) -> None:
        await self._connection.close()


SecondClient = _File | _Server
"""A second client of a database, which stays connected."""


async def connect_client(location: Location) -> SecondClient:
    """Connect a second client to a database."""
    return _File(location) if isinstance(location, Path) else _Server(await connect(location))


def wait_until_disconnected(location: Location) -> None:
    """Wait until the server has closed all other connections and rolled back their work.

    A file needs no waiting.

    Raises:
        HangError: If a connection stays.
    """
    if isinstance(location, str):
        asyncio.run(_wait_until_disconnected(location))


async def connect(url: str) -> Any:
    """Connect to a database on a server with the driver alone."""
    return await driver().connect(driver_url(url))


def driver() -> Any:
    """Return the driver of PostgreSQL, which may be missing."""
    return import_module("asyncpg")


def driver_url(url: str) -> str:
    """Return the URL in the form that the driver takes."""
    return make_url(url).set(drivername="postgresql").render_as_string(hide_password=False)


def _fetch_from_file(path: Path, queries: Sequence[str]) -> list[Rows]:
    try:
        with closing(sqlite3.connect(path, isolation_level=None)) as connection:
            connection.execute("BEGIN")
            return [connection.execute(query).fetchall() for query in queries]
    except sqlite3.Error as error:
        raise UnreadableError(repr(error)) from error


async def _fetch_from_server(url: str, queries: Sequence[str]) -> list[Rows]:
    try:
        connection = await connect(url)
        try:
            async with connection.transaction(isolation="repeatable_read"):
                return [[*map(tuple, await connection.fetch(query))] for query in queries]
        finally:
            await connection.close()
    except (driver().PostgresError, OSError) as error:
        raise UnreadableError(repr(error)) from error


async def _find_damage_on_server(url: str) -> list[str]:
    try:
        connection = await connect(url)
        try:
            await connection.execute("CREATE EXTENSION IF NOT EXISTS amcheck")
            await connection.execute(_CHECK_INDEXES)
            return [": ".join(row) for row in await connection.fetch(_CHECK_TABLES)]
        finally:
            await connection.close()
    except driver().PostgresError as error:
        return [str(error)]
    except OSError as error:
        raise UnreadableError(repr(error)) from error


async def _wait_until_disconnected(url: str) -> None:
    connection = await connect(url)
    try:
        async with asyncio.timeout(_PATIENCE_SECONDS):
            while await connection.fetchval(_OTHERS):  # noqa: ASYNC110 - the server sends no event
                await asyncio.sleep(0.01)
    except TimeoutError:
        raise HangError("the server still has connections of closed clients") from None
    finally:
        await connection.close()
