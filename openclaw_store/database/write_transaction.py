"""The write transaction that all operations of a batch share."""

from __future__ import annotations

from collections.abc import Callable
from datetime import datetime
from typing import Any

from openclaw_store.backends import BatchCursor, Cursor
from openclaw_store.database.dialects import statements_for
from openclaw_store.database.statements import Statements


class WriteTransaction:
    """One write transaction: its cursor, its time, and the events to publish after its commit.

    Args:
        sql: The statements of the database; `None` for ones without keys.
    """

    def __init__(self, cursor: Cursor, now: datetime, sql: Statements | None = None) -> None:
        self.cursor = cursor
        self.now = now
        self.sql = statements_for(cursor) if sql is None else sql
        self.committed: list[Any] = []
        """Events for the listeners, published after the commit."""
        self.undo: list[Callable[[], None]] = []
        """Called in reverse order if it does not commit: restore the objects of callers."""
        self.unit_of_work: Any = None
        """State that the operations share, set and read by the repositories alone.

        `finish` writes its changes, and `release` drops what refers back to it: only the garbage
        collector frees such cycles.
        """
        self.finished = False
        """`True` if it accepts no more operations."""
        self.failure: BaseException | None = None
        """The error that interrupted an operation half-way, so that it must not commit."""

    def require_lock(self) -> None:
        """Require the write lock, for operations that one call of `store_write` cannot express.

        Without the lock, `LockRequiredError` makes the writer apply the batch again, with the lock.
        """
        if isinstance(self.cursor, BatchCursor):
            self.cursor.require_lock()

    def finish(self) -> None:
        """Write the collected changes; must be called before the commit."""
        self.finished = True
        if self.unit_of_work is not None:
            self.unit_of_work.finish()
            self.unit_of_work = None

    def release(self) -> None:
        """Drop the changes of a transaction that will not commit."""
        if self.unit_of_work is not None:
            self.unit_of_work.release()
            self.unit_of_work = None
