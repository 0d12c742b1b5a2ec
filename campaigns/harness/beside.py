"""A database is asked past the library: what is in it, and whether it finds itself sound."""

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


def ask(location: Location, *queries: str) -> list[Rows]:
    """The rows of each query, all of one moment; of a server, not on a running event loop.

    Raises:
        UnreadableError: If they cannot be read.
    """
    if isinstance(location, Path):
        return _ask_file(location, queries)
    return asyncio.run(_ask_server(location, queries))


def damage(location: Location) -> list[str]:
    """What a database itself finds wrong with its pages and indexes, in words.

    A file is checked by SQLite, a database on a server by amcheck, which is installed for that; not
    on a running event loop.

    Raises:
        UnreadableError: If it cannot be read at all.
    """
    if isinstance(location, Path):
        pragmas = ("PRAGMA integrity_check", "PRAGMA foreign_key_check")
        found = [row for rows in _ask_file(location, pragmas) for row in rows]
        return [", ".join(map(str, row)) for row in found if row != ("ok",)]
    return asyncio.run(_damage_on_server(location))


class _File:
    """Somebody else at a file; nothing else of the event loop goes on while it is asked."""

    def __init__(self, path: Path) -> None:
        self._connection = sqlite3.connect(path, isolation_level=None, timeout=1)

    async def ask(self, query: str) -> list[dict[str, Any]]:
        """The rows of a query, by the names of columns."""
        cursor = self._connection.execute(query)
        columns = [name for name, *_ in cursor.description]
        return [dict(zip(columns, row, strict=True)) for row in cursor]

    async def mark(self) -> object:
        """Something that is another one after each commit."""
        return await self.ask("PRAGMA data_version")

    async def lock(self) -> None:
        """Take the lock of writers, within a second, and give it back."""
        self._connection.execute("BEGIN IMMEDIATE")
        self._connection.execute("ROLLBACK")

    async def close(self) -> None:
        self._connection.close()


class _Server:
    """The same at a database on a server."""

    def __init__(self, connection: Any) -> None:
        self._connection = connection

    async def ask(self, query: str) -> list[dict[str, Any]]:
        """The rows of a query, by the names of columns."""
        return [*map(dict, await self._connection.fetch(query))]

    async def mark(self) -> object:
        """Something that is another one after each commit."""
        return await self.ask("SELECT pg_snapshot_xmax(pg_current_snapshot())")

    async def lock(self) -> None:
        """Take the lock of writers, within a second, and give it back."""
        async with self._connection.transaction():
            await self._connection.execute("SET LOCAL lock_timeout = '1s'")
            await self._connection.execute("SELECT FROM counters FOR UPDATE")

    async def close(self) -> None:
        await self._connection.close()


Neighbour = _File | _Server
"""Somebody else at a database, who stays connected."""


async def neighbour_at(location: Location) -> Neighbour:
    """Connect somebody to a database, until they close it."""
    return _File(location) if isinstance(location, Path) else _Server(await connect(location))


def wait_until_alone(location: Location) -> None:
    """Wait until the server has noticed the end of those who were connected, and undone their work.

    A file is left at once.

    Raises:
        HangError: If it does not notice.
    """
    if isinstance(location, str):
        asyncio.run(_wait_until_alone(location))


async def connect(url: str) -> Any:
    """A connection of the driver's to a database on a server."""
    return await driver().connect(plain(url))


def driver() -> Any:
    """The driver of PostgreSQL, which may be missing."""
    return import_module("asyncpg")


def plain(url: str) -> str:
    """The URL as the driver takes it."""
    return make_url(url).set(drivername="postgresql").render_as_string(hide_password=False)


def _ask_file(path: Path, queries: Sequence[str]) -> list[Rows]:
    try:
        with closing(sqlite3.connect(path, isolation_level=None)) as connection:
            connection.execute("BEGIN")
            return [connection.execute(query).fetchall() for query in queries]
    except sqlite3.Error as error:
        raise UnreadableError(repr(error)) from error


async def _ask_server(url: str, queries: Sequence[str]) -> list[Rows]:
    try:
        connection = await connect(url)
        try:
            async with connection.transaction(isolation="repeatable_read"):
                return [[*map(tuple, await connection.fetch(query))] for query in queries]
        finally:
            await connection.close()
    except (driver().PostgresError, OSError) as error:
        raise UnreadableError(repr(error)) from error


async def _damage_on_server(url: str) -> list[str]:
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


async def _wait_until_alone(url: str) -> None:
    connection = await connect(url)
    try:
        async with asyncio.timeout(_PATIENCE_SECONDS):
            while await connection.fetchval(_OTHERS):  # noqa: ASYNC110 - the server tells nobody
                await asyncio.sleep(0.01)
    except TimeoutError:
        raise HangError("the server goes on with what those had begun who are gone") from None
    finally:
        await connection.close()
