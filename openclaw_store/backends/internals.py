"""Every private attribute of another library that this one uses, each with its reason.

Nothing else may use one. `tests/backends/test_internals.py` fails when a new release
changes one of them; each docstring then says what to do.
"""

from __future__ import annotations

import asyncio
import ctypes
from collections.abc import Sequence
from typing import Any

import aiosqlite
from sqlalchemy import CursorResult


def untrack_task(task: asyncio.Task[Any]) -> None:
    """Hide a task from `asyncio.all_tasks`, so that `asyncio.run` does not cancel it at its end.

    Reason: only our own code may cancel a commit or the closing of a connection. The function is
    documented for authors of event loops ("Extending asyncio"), despite its underscore.
    Replacement: none; without it, Ctrl-C during a commit leaves a connection half-closed.
    """
    asyncio.tasks._unregister_task(task)


def never_free(object: object) -> None:
    """Add a reference to an object that nothing ever drops.

    Reason: a forked child must not free an inherited SQLite connection, not even when its
    interpreter ends: SQLite would then roll back the transaction of the parent. A global list is
    cleared at the end of the interpreter, this reference is not. `Py_IncRef` is public in C only.
    Replacement: any reference that outlives the interpreter.
    """
    ctypes.pythonapi.Py_IncRef(ctypes.py_object(object))


def descriptor_of(connection: Any) -> int:
    """Return the file descriptor of the socket of an asyncpg connection; -1 if it is closed.

    Reason: only the socket itself shows that the server has closed an idle connection, as long as
    the event loop of the connection does not run, or has not come to it.
    Replacement: a statement without effect before each use, which takes a round trip.
    """
    descriptor: int = connection._transport.get_extra_info("socket").fileno()
    return descriptor


def make_daemon(connection: aiosqlite.Connection) -> None:
    """Let the process end although the thread of a connection still runs.

    Reason: a program may end without closing its sessions; SQLAlchemy does the same for the
    connections that it makes itself. Call it before the connection is awaited.
    Replacement: a public option of aiosqlite, as soon as there is one.
    """
    connection._thread.daemon = True


def rollback_without_waiting(connection: aiosqlite.Connection) -> None:
    """Queue a rollback on the thread of a connection; the next call on it comes behind.

    Reason: nothing waits for the rollback, so a cancellation cannot interrupt it. `asyncio.run`
    cancels at its end, and SQLAlchemy would report that as an error of the connection.
    Replacement: `await connection.rollback()` under `shield_until_done`, which is slower.
    """
    connection._tx.put_nowait((None, connection._conn.rollback))


def fetch_raw_rows(result: CursorResult[Any], size: int | None = None) -> Sequence[Any]:
    """Return the next rows of a result as the driver gives them; an empty sequence at the end.

    Reason: `CursorResult.fetchmany` makes an object of each row, and the caches keep tuples; both
    together cost 13 % of reading 250 tasks. A streamed result holds its first row in
    `cursor_strategy`, so its cursor alone would miss that row.
    Replacement: `result.fetchmany(size)`, and a tuple of each row.

    Args:
        size: Largest number of rows, for a streamed result; `None` returns all.
    """
    rows: Sequence[Any]
    if size is None:
        rows = result.cursor.fetchall() if result.cursor is not None else ()
        result.close()
    else:
        rows = result.cursor_strategy.fetchmany(result, result.cursor, size)
    return rows
