"""Index of the live tasks in memory: in the order of claims, and by node."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime
from typing import NamedTuple

from openclaw_store.domain import ASSIGNED, WAITING, Record, Task, TaskStatus
from openclaw_store.state_manager.sorted_keys import SortedKeys

PendingKey = tuple[int, datetime, str]
"""Priority, time of submission and identifier of a task: the order of claims."""


class IndexEntry(NamedTuple):
    """The values of a task that is not decoded by which it is found."""

    task_id: str
    version: int
    status: TaskStatus
    assigned_node: str | None
    key: PendingKey | None
    """`None` unless the task is pending or scheduled."""


Indexed = Record[Task] | IndexEntry
"""A task, perhaps not decoded."""


class TaskIndex:
    """Find live tasks without a search through all of them."""

    def __init__(self) -> None:
        self.pending: SortedKeys[PendingKey] = SortedKeys()
        """Pending and scheduled tasks, in the order of their list."""
        self.assigned: dict[str | None, set[str]] = {}
        """Identifiers of scheduled and running tasks, by node."""

    def extend(self, tasks: Sequence[Indexed]) -> None:
        """Index new tasks."""
        keys = map(pending_key, tasks)
        self.pending.extend(sorted(key for key in keys if key is not None))
        for task in tasks:
            if task.status in ASSIGNED:
                self.assigned.setdefault(task.assigned_node, set()).add(task.task_id)

    def replace(self, id: str, old: Indexed | None, new: Indexed | None) -> None:
        """Replace a task in the index."""
        key_before = None if old is None else pending_key(old)
        key_after = None if new is None else pending_key(new)
        if key_before != key_after:
            if key_before is not None:
                self.pending.remove(key_before)
            if key_after is not None:
                self.pending.add(key_after)
        if old is not None and old.status in ASSIGNED:
            assigned = self.assigned[old.assigned_node]
            assigned.remove(id)
            if not assigned:
                del self.assigned[old.assigned_node]
        if new is not None and new.status in ASSIGNED:
            self.assigned.setdefault(new.assigned_node, set()).add(id)


def pending_key(task: Indexed) -> PendingKey | None:
    """Return the position of a pending or scheduled task; `None` for any other."""
    if isinstance(task, IndexEntry):
        return task.key
    if task.status in WAITING:
        # A plain integer: the garbage collector tracks a tuple that holds an enum member.
        return int(task.priority), task.submitted_at, task.task_id
    return None
