"""The newest changes in memory: a watcher that keeps up reads nothing from the database."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

from openclaw_store.domain import Change, ChangeKind
from openclaw_store.errors import StoreError
from openclaw_store.state_manager.change_feed import REASON_CHARACTERS, STEP_WIDTH

LIMIT = 1000
"""Most changes in memory."""

ReadReason = Callable[[str, str, str | None], str | None]
"""Returns the reason of a change from the item, its identifier, and the stored reason."""


class RecentChanges:
    """Changes by revision. They are kept while there are watchers, so some may be missing."""

    def __init__(self) -> None:
        self._changes: dict[int, Change] = {}

    def add(self, changes: Iterable[Change]) -> None:
        """Keep committed changes without long reasons, and forget the oldest ones."""
        for change in changes:
            if change.reason is None or len(change.reason) <= REASON_CHARACTERS:
                self._changes[change.revision] = change
        excess = len(self._changes) - LIMIT
        for revision in list(self._changes)[: max(0, excess)]:
            del self._changes[revision]

    def add_rows(
        self, rows: Iterable[Sequence[Any]], moment: Callable[[Any], Any], reason: ReadReason
    ) -> None:
        """Keep the changes of a batch, except unreadable ones and ones with a long reason."""
        self.add(
            change
            for row in rows
            if (change := _change_of(row[:STEP_WIDTH], moment, reason)) is not None
        )

    def after(self, since: int, until: int) -> Sequence[Change]:
        """Return the changes after a revision without a gap, at most up to another one."""
        found: list[Change] = []
        for revision in range(since + 1, until + 1):
            if revision not in self._changes:
                break
            found.append(self._changes[revision])
        return found

    def clear(self) -> None:
        """Forget all changes."""
        self._changes.clear()


def _change_of(
    step: Sequence[Any], moment: Callable[[Any], Any], read_reason: ReadReason
) -> Change | None:
    revision, at, item, id, before, after, kind, node, why, previous = step
    try:
        if why is not None and len(why) > REASON_CHARACTERS:
            return None
        reason = read_reason(item, id, why)
        return Change(
            revision, moment(at), item, id, ChangeKind(kind), before, after, node, reason, previous
        )
    except (
        StoreError,
        OverflowError,
        TypeError,
        ValueError,
    ):  # a watcher reads the change from the log, and gets the error
        return None
