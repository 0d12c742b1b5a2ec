"""The write transaction that all commands of a batch share."""

from __future__ import annotations

from collections.abc import Callable
from datetime import datetime
from typing import Any

from openclaw_store.backends import Cursor


class WriteTransaction:
    """One write transaction: its cursor, its moment, and the events to publish after its commit."""

    def __init__(self, cursor: Cursor, now: datetime) -> None:
        self.cursor = cursor
        self.now = now
        self.committed: list[Any] = []
        """Events for the listeners, published after the commit."""
        self.before_commit: list[Callable[[], None]] = []
        """Called when all commands are applied."""
        self.undo: list[Callable[[], None]] = []
        """Called, last first, if it does not commit: restore the objects of callers."""
        self.unit_of_work: Any = None
        """State that the commands share; made and used by the repositories."""
        self.finished = False
        """Whether it accepts no more commands."""
        self.failure: BaseException | None = None
        """The error that interrupted a command half-way, so that it must not commit."""

    def finish(self) -> None:
        """Write what the commands have left to be written; call it before the commit."""
        self.finished = True
        for work in self.before_commit:
            work()
        # Both refer back to the transaction; only the garbage collector frees such cycles.
        self.before_commit.clear()
        self.unit_of_work = None
