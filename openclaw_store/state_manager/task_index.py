"""Index of the live tasks in memory: in the order of claims, and by node."""

from __future__ import annotations

from openclaw_store.domain import ASSIGNED, WAITING, Record, Task
from openclaw_store.state_manager.change_feed import InitialRows, PendingKey
from openclaw_store.state_manager.sorted_keys import SortedKeys


class TaskIndex:
    """Find live tasks without a search through all of them."""

    def __init__(self) -> None:
        self.pending: SortedKeys[PendingKey] = SortedKeys()
        """Pending and scheduled tasks, in the order of their list."""
        self.assigned: dict[str | None, set[str]] = {}
        """Identifiers of scheduled and running tasks, by node."""

    def load(self, page: InitialRows) -> None:
        """Index a page of the initial state."""
        self.pending.extend(page.keys)
        for node_id, task_id in page.assigned:
            self.assigned.setdefault(node_id, set()).add(task_id)

    def add(self, arrived: list[PendingKey]) -> None:
        """Index new pending tasks; empties the list."""
        arrived.sort()
        self.pending.extend(arrived)
        arrived.clear()

    def add_tasks(self, tasks: list[Record[Task]]) -> None:
        """Index new pending tasks; empties the list."""
        self.add([key for task in tasks if (key := pending_key(task)) is not None])
        tasks.clear()

    def replace(self, id: str, old: Record[Task] | None, new: Record[Task] | None) -> None:
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


def pending_key(task: Record[Task]) -> PendingKey | None:
    """Return the position of a pending or scheduled task; `None` for any other."""
    if task.status in WAITING:
        # A plain integer: the garbage collector tracks a tuple that holds an enum member.
        return int(task.priority), task.submitted_at, task.task_id
    return None
