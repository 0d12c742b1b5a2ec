"""The write transaction that all operations of a batch share."""

from __future__ import annotations

from collections.abc import Callable
from datetime import datetime
from typing import Any, TypeVar

from openclaw_store.backends import Cursor

Shared = TypeVar("Shared")


class WriteTransaction:
    """One write transaction: its cursor, its moment, and what it will have changed."""

    def __init__(self, cursor: Cursor, now: datetime) -> None:
        self.cursor = cursor
        self.now = now
        self.committed: list[Any] = []
        """What the listeners are told once it has committed."""
        self.before_commit: list[Callable[[], None]] = []
        """To be done when all operations are applied."""
        self.undo: list[Callable[[], None]] = []
        """What restores the objects of callers if it does not commit."""
        self.finished = False
        """Whether it takes no more operations."""
        self.failure: BaseException | None = None
        """What went wrong half-way through an operation, so that it must not commit."""
        self._parts: dict[Any, Any] = {}

    def part(self, factory: Callable[[WriteTransaction], Shared]) -> Shared:
        """What all operations of the transaction share, made by `factory` when first asked for."""
        if factory not in self._parts:
            self._parts[factory] = factory(self)
        part: Shared = self._parts[factory]
        return part

    def finish(self) -> None:
        """Do what must be done before the commit."""
        self.finished = True
        for work in self.before_commit:
            work()
        # These refer to the transaction. Such cycles only the garbage collector frees.
        self.before_commit.clear()
        self._parts.clear()
