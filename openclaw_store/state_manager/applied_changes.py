"""Account of the changes that a cache has applied: revisions, and tasks by status.

A cache learns of commits in two ways that may cross: from the writer of its process, and from the
change log. Every change is counted once, whichever way it came first.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from openclaw_store.domain import ENTITY_NAMES, Change, Task, TaskStatus
from openclaw_store.repositories import TasksAdded
from openclaw_store.state_manager.change_feed import REVISION, TO_STATUS, ChangeBatch, InitialState

_TASK = ENTITY_NAMES[Task]


class AppliedChanges:
    """Revisions applied, and the number of tasks of each status."""

    def __init__(self, start: InitialState) -> None:
        self.version = start.revision
        """The newest revision applied."""
        self.contiguous = start.revision
        """Every change up to this revision was applied."""
        self.updated_at = start.updated_at
        self.task_counts = _of_each_status(start.task_counts)
        self.is_counted = True
        """True if `task_counts` are right; clean-up can remove changes before they are read."""
        self.out_of_order: dict[int, tuple[Change, str | None]] = {}
        """Changes with a gap before them, each with the status from which it was counted."""

    def count(self, change: Change, counted_status: Callable[[Change], str | None]) -> bool:
        """Count a change; `False` if it was counted before.

        After a gap, `counted_status` gives the status under which its entity was counted.
        """
        revision = change.revision
        if revision == self.contiguous + 1:  # the most frequent case
            self._count(change.from_status, change)
            self.contiguous = revision
        elif revision <= self.contiguous or revision in self.out_of_order:
            return False
        else:
            status = counted_status(change)
            self._count(status, change)
            self.out_of_order[revision] = (change, status)
        if revision > self.version:
            self.version = revision
            self.updated_at = change.changed_at
        if self.out_of_order:
            self._close_gap()
        return True

    def count_added(self, added: TasksAdded) -> bool:
        """Count new pending tasks; `False` if their revisions are not the next ones."""
        first, last = added.revisions
        if self.out_of_order or first != self.contiguous + 1:
            return False
        self.task_counts[TaskStatus.PENDING.value] += len(added.rows)
        self.version = self.contiguous = last
        self.updated_at = added.at
        return True

    def count_batch(self, batch: ChangeBatch) -> tuple[dict[str, Sequence[Any]], dict[str, None]]:
        """Count a batch of the change log.

        Returns:
            The last change of each task by identifier, and the identifiers of the nodes, without
            the ones of which a change after the snapshot of the batch was applied.
        """
        tasks: dict[str, Sequence[Any]] = {}
        nodes: dict[str, None] = {}
        counts, contiguous, out_of_order = self.task_counts, self.contiguous, self.out_of_order
        # A row inserted by hand was never counted under its first status.
        is_counted = self.is_counted and batch.is_complete
        for change in batch.changes:
            revision, _, item, id, before, after = change[: TO_STATUS + 1]
            if revision <= contiguous or revision in out_of_order:
                if item == _TASK and id in tasks:  # only the last change of a task has its content
                    tasks[id] = change
            elif item == _TASK:
                tasks[id] = change
                if before is not None:
                    counts[before] -= 1
                    is_counted = is_counted and counts[before] >= 0
                if after is not None:
                    counts[after] += 1
            else:
                nodes[id] = None
        self.is_counted = is_counted
        for change in self._later_than(batch):
            (tasks if change.item == _TASK else nodes).pop(change.item_id, None)
        return tasks, nodes

    def finish_batch(self, batch: ChangeBatch) -> None:
        """Note that a counted batch was applied."""
        later = self._later_than(batch)
        # Otherwise the batch's counts lack contiguous changes, which are no longer listed.
        has_new_counts = self.contiguous <= batch.read_at
        if batch.changes and batch.changes[-1][REVISION] > self.version:
            self.updated_at = batch.changed_at
        if batch.revision > self.contiguous:
            self.contiguous = batch.revision
            self.version = max(self.version, self.contiguous)
            for revision in [one for one in self.out_of_order if one <= self.contiguous]:
                self._recount(revision)
            self._close_gap()
        if batch.task_counts is not None and has_new_counts:
            self.task_counts = _of_each_status(batch.task_counts)
            for change in later:
                self._count(change.from_status, change)
                if change.revision in self.out_of_order:
                    self.out_of_order[change.revision] = (change, change.from_status)
            self.is_counted = True

    def _later_than(self, batch: ChangeBatch) -> list[Change]:
        """Return the changes applied out of order that the snapshot of a batch lacks."""
        changes = [change for change, _ in self.out_of_order.values()]
        return [change for change in changes if change.revision > batch.read_at]

    def _close_gap(self) -> None:
        while self.contiguous + 1 in self.out_of_order:
            self.contiguous += 1
            self._recount(self.contiguous)

    def _recount(self, revision: int) -> None:
        """Count a change from its real status, now that all changes before it are counted."""
        change, before = self.out_of_order.pop(revision)
        if change.item == _TASK and before != change.from_status:
            if before is not None:
                self.task_counts[before] += 1
            if change.from_status is not None:
                self.task_counts[change.from_status] -= 1

    def _count(self, before: str | None, change: Change) -> None:
        if change.item == _TASK:
            counts, after = self.task_counts, change.to_status
            if before is not None:
                counts[before] -= 1
                if counts[before] < 0:  # a row inserted by hand
                    self.is_counted = False
            if after is not None:
                counts[after] += 1


def _of_each_status(counts: Mapping[str, int]) -> dict[str, int]:
    # No Counter: incrementing one takes three times as long.
    return {status.value: counts.get(status.value, 0) for status in TaskStatus}
