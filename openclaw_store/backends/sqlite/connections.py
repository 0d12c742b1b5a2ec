"""How SQLite's files are opened: connections of each kind, for threads and for coroutines.

Each is set up as soon as it exists. A caller who is cancelled can give it up at any time, and a
forked child cannot end what its parent has open.
"""

from __future__ import annotations

import asyncio
import os
import sqlite3
import sys
from collections.abc import Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import aiosqlite

from openclaw_store.backends.cancellation import cancel_once_more
from openclaw_store.backends.sqlite import fork_safety

_PRAGMAS = (
    "PRAGMA synchronous=FULL",
    "PRAGMA foreign_keys=ON",
    *(("PRAGMA fullfsync=ON",) if sys.platform == "darwin" else ()),
)

_READ_TIMEOUT_SECONDS = 30.0

_UNWANTED_SECONDS = 1.0
"""How long a caller who is cancelled waits for a file that is being opened for it."""

_ROWS_A_FETCH = 64  # as the driver has it


class WriteConnection(sqlite3.Connection):
    """A connection that is set up when it exists, on whatever thread opens it.

    A forked child cannot end it: to roll back would be to write into the index of the WAL, which it
    shares with its parent, and another thread may have had a lock of SQLite's when it was forked.
    """

    pragmas: Sequence[str] = _PRAGMAS

    def __init__(self, path: str | Path, **options: Any) -> None:
        self._process = os.getpid()
        fork_safety.opened(self, path)
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
        # SQLite keeps a closed connection, with its locks, while a cursor of it is referred to,
        # and the traceback of a cancelled caller does that.
        with suppress(sqlite3.Error):
            self.rollback()
        try:
            super().close()
        finally:
            fork_safety.closed(self)

    def __del__(self) -> None:
        with suppress(sqlite3.Error):
            self.close()  # aiosqlite drops it unclosed when the caller is cancelled meanwhile


class LoneConnection(WriteConnection):
    """A connection beside which nobody can have another one, not even an idle one."""

    # First of all: SQLite asks for the file as soon as it looks into it.
    pragmas = ("PRAGMA locking_mode=EXCLUSIVE", *_PRAGMAS)


class ReadConnection(WriteConnection):
    """A connection that refuses to write."""

    def __init__(self, path: str | Path, **options: Any) -> None:
        super().__init__(path, **options)
        self.execute("PRAGMA query_only=ON")


def options_of(connection: type[sqlite3.Connection]) -> dict[str, Any]:
    """What the driver is to be told to open a connection of this kind."""
    # The driver's own transactions skip BEGIN before SELECT and DDL: without `None` reads would
    # not be repeatable and a failed migration would stay half-applied. Each engine sends our own.
    # Python 3.12's `autocommit` must stay untouched: with it, WAL and foreign keys silently fail.
    return {
        "isolation_level": None,
        # Waiting to write is ours (see `sqlite.retrying`): SQLite's own busy handler starves
        # writers. A reader waits but for a moment, while another process opens or closes the file.
        "timeout": _READ_TIMEOUT_SECONDS if connection is ReadConnection else 0,
        "check_same_thread": False,
        "factory": connection,
    }


class _DriverConnection(aiosqlite.Connection):
    """A connection for coroutines, who may be cancelled at any time.

    A forked child has not its thread, and would wait for it for ever.
    """

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self._process = os.getpid()
        self._stopping: asyncio.Future[Any] | None = None

    async def _connect(self) -> aiosqlite.Connection:
        try:
            return await super()._connect()
        except asyncio.CancelledError:
            if self._stopping is not None:
                # Its thread has yet to answer to this event loop, which may end with the caller.
                await asyncio.wait([self._stopping], timeout=_UNWANTED_SECONDS)
            raise

    async def rollback(self) -> None:
        # Nobody waits for it, as what comes next comes behind it. So nobody is cancelled in it, as
        # at the end of `asyncio.run`, which SQLAlchemy would report as an error of the connection.
        self._tx.put_nowait((None, self._conn.rollback))

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
        # Where a caller is cancelled again while it gives up a connection, SQLAlchemy stops what is
        # closing. The thread ends then, and whoever asks it once more would wait for ever.
        if not self._running or self._process != os.getpid():
            return None
        self._stopping = super().stop()
        return self._stopping


def connect_async(path: str, **options: Any) -> _DriverConnection:
    """A connection for coroutines, which is opened when it is awaited."""
    connection = _DriverConnection(partial(sqlite3.connect, path, **options), _ROWS_A_FETCH)
    connection._thread.daemon = True  # as SQLAlchemy has it
    return connection
