"""SQLite connections of each kind, for threads and for coroutines.

Each is configured as soon as it exists. A cancelled caller can give one up at any time, and a
forked child cannot close a connection of its parent.
"""

from __future__ import annotations

import asyncio
import os
import sqlite3
import sys
import time
from collections.abc import AsyncIterator, Callable, Generator, Sequence
from contextlib import asynccontextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any

import aiosqlite
from sqlalchemy import text
from sqlalchemy.ext.asyncio import AsyncSession

from openclaw_store.backends.cancellation import Stop, cancel_once_more
from openclaw_store.backends.internals import make_daemon, rollback_without_waiting
from openclaw_store.backends.sqlite import fork_safety

HOSTILE_FILE_PRAGMAS = ("PRAGMA trusted_schema=OFF", "PRAGMA cell_size_check=ON")
"""No schema calls a function with effects, and a page is checked before its cells are used."""

_PRAGMAS = (
    *HOSTILE_FILE_PRAGMAS,
    "PRAGMA synchronous=FULL",
    "PRAGMA foreign_keys=ON",
    *(("PRAGMA fullfsync=ON",) if sys.platform == "darwin" else ()),
)
_READ_TIMEOUT_SECONDS = 30.0
_STEPS = 100_000
"""Instructions of SQLite's virtual machine between two looks at the time and for a stop:
milliseconds."""
CHECK_SECONDS = 5.0
CHECK_BYTES_PER_SECOND = 1_000_000
_ROWS_PER_FETCH = 64  # the default of aiosqlite

_ABANDONED_SECONDS = 1.0
"""Longest wait of a cancelled caller for a file that is being opened for it."""


class WriteConnection(sqlite3.Connection):
    """A configured connection, usable on any thread.

    In a forked child it neither rolls back nor closes: that would write into the index of the WAL,
    which parent and child share, and may wait for a lock that another thread held at the fork.
    """

    pragmas: Sequence[str] = _PRAGMAS

    def __init__(self, path: str | Path, **options: Any) -> None:
        self._process = os.getpid()
        fork_safety.note_opened(self, path)
        super().__init__(path, **options)
        try:
            for pragma in self.pragmas:
                self.execute(pragma)
        except BaseException:
            self.close()
            raise

    def rollback(self) -> None:
        if self._process == os.getpid():
            super().rollback()

    def close(self) -> None:
        if self._process != os.getpid():
            return
        # SQLite keeps a closed connection and its locks while one of its cursors is referred to,
        # as by the traceback of a cancelled caller. The rollback releases the locks at once.
        with suppress(sqlite3.Error):
            self.rollback()
        try:
            super().close()
        finally:
            fork_safety.note_closed(self)

    def __del__(self) -> None:
        with suppress(sqlite3.Error):
            self.close()  # aiosqlite drops it unclosed if the caller is cancelled while it opens


class LoneConnection(WriteConnection):
    """A connection that excludes all other connections to the file, idle ones included."""

    # The locking mode comes first: SQLite takes the lock with the first look into the file.
    pragmas = ("PRAGMA locking_mode=EXCLUSIVE", *_PRAGMAS)


class ReadConnection(WriteConnection):
    """A connection that refuses to write."""

    # No check of the file evaluates constraints, which may take any time if they are not ours.
    pragmas = (*_PRAGMAS, "PRAGMA query_only=ON", "PRAGMA ignore_check_constraints=ON")


def time_limit(
    size: int, is_stopped: Callable[[], bool] = lambda: False
) -> tuple[Callable[[], bool], int]:
    """Return arguments of `set_progress_handler` that end statements which take too long.

    Pages may refer to each other so that reading a small file would never end. A sound file needs a
    small part of this time.

    Args:
        size: Bytes of the file.
        is_stopped: Ends a statement earlier.
    """
    end = time.monotonic() + CHECK_SECONDS + size / CHECK_BYTES_PER_SECOND
    return lambda: is_stopped() or time.monotonic() > end, _STEPS


@asynccontextmanager
async def limited(session: AsyncSession) -> AsyncIterator[None]:
    """Limit the time of each statement in the block by the size of the file; not for a server."""
    if session.get_bind().dialect.name != "sqlite":
        yield
        return
    driver = await _driver_of(session)
    pages = "SELECT page_size * page_count FROM pragma_page_size, pragma_page_count"
    driver.limits.is_late, _ = time_limit(await session.scalar(text(pages)) or 0)
    try:
        yield
    finally:
        driver.limits.is_late = _never


@asynccontextmanager
async def reading_text(
    session: AsyncSession, convert: Callable[[bytes], str | bytes]
) -> AsyncIterator[None]:
    """Convert the text that is read in the block: the driver refuses text that is not UTF-8."""
    driver = await _driver_of(session)
    driver.text_factory = convert
    try:
        yield
    finally:
        with suppress(ValueError):  # a cancelled statement has closed the connection
            driver.text_factory = str


async def _driver_of(session: AsyncSession) -> Any:
    return (await (await session.connection()).get_raw_connection()).driver_connection


def _never() -> bool:
    return False


class _Limits:
    """The end of the statement that runs on a connection: a stop, or a time.

    Not by `interrupt`: that refuses the rollback, too, while a cursor is referred to.
    """

    def __init__(self) -> None:
        self.is_stopped = False
        self.is_late: Callable[[], bool] = _never

    def are_over(self) -> bool:
        return self.is_stopped or self.is_late()


def end_at(stop: Stop, connection: sqlite3.Connection) -> None:
    """End each statement of the connection as soon as `stop` is done."""
    connection.set_progress_handler(stop.done, _STEPS)


def options_of(connection: type[sqlite3.Connection]) -> dict[str, Any]:
    """Return the driver's options for a connection of this class."""
    # The driver's own transactions skip BEGIN before SELECT and DDL: without `None` reads would
    # not be repeatable and a failed migration would stay half-applied. Each engine sends our own.
    # Python 3.12's `autocommit` must stay untouched: with it, WAL and foreign keys silently fail.
    return {
        "isolation_level": None,
        # Writers wait in `sqlite.retrying`: SQLite's own busy handler starves them. A reader waits
        # only for a moment, while another process opens or closes the file.
        "timeout": _READ_TIMEOUT_SECONDS if connection is ReadConnection else 0,
        "check_same_thread": False,
        "factory": connection,
    }


class _AsyncConnection(aiosqlite.Connection):
    """A connection for coroutines that may be cancelled at any time.

    A forked child does not have the thread of the connection and would wait for it forever, so
    there it neither rolls back nor stops.
    """

    def __init__(self, path: str, **options: Any) -> None:
        super().__init__(self._open_file, _ROWS_PER_FETCH)
        self._opener = partial(sqlite3.connect, path, **options)
        self._process = os.getpid()
        self.limits = _Limits()
        self._stopping: asyncio.Future[Any] | None = None

    def _open_file(self) -> sqlite3.Connection:
        connection: sqlite3.Connection = self._opener()
        connection.set_progress_handler(self.limits.are_over, _STEPS)
        return connection

    def __await__(self) -> Generator[Any, None, aiosqlite.Connection]:
        try:
            return (yield from super().__await__())
        except asyncio.CancelledError:
            if self._stopping is not None:
                # The thread has yet to answer to this event loop, which may end with the caller.
                yield from asyncio.wait([self._stopping], timeout=_ABANDONED_SECONDS).__await__()
            raise

    async def rollback(self) -> None:
        rollback_without_waiting(self)

    async def close(self) -> None:
        cancelled = False
        closing = self.stop()
        while closing is not None and not closing.done():
            try:
                await asyncio.wait([closing])
            except asyncio.CancelledError:
                cancelled = True
        if cancelled:
            cancel_once_more()
        if closing is not None:
            closing.result()

    def stop(self) -> asyncio.Future[Any] | None:
        # SQLAlchemy stops a connection that is being closed if the caller is cancelled again. The
        # thread ends with the first stop, so waiting for the answer to a second one never ends.
        if self.limits.is_stopped or self._process != os.getpid():
            return None
        self.limits.is_stopped = True
        self._stopping = super().stop()
        return self._stopping


def connect_async(path: str, **options: Any) -> _AsyncConnection:
    """Return a connection for coroutines; awaiting it opens it."""
    connection = _AsyncConnection(path, **options)
    make_daemon(connection)
    return connection
