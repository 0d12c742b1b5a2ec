"""Index of the live tasks in memory: in the order of their list, to claim, and by node."""

from __future__ import annotations

from collections.abc import Iterable
from datetime import datetime
from operator import itemgetter

from openclaw_store.domain import ASSIGNED, WAITING, NodeInfo, Record, Task, TaskStatus
from openclaw_store.state_manager.change_feed import InitialRows
from openclaw_store.state_manager.ready_queue import PendingKey, Ready, ReadyTasks, SortedKeys


class TaskIndex:
    """Find live tasks without a search through all of them."""

    def __init__(self) -> None:
        self.pending: SortedKeys[PendingKey] = SortedKeys()
        """Pending and scheduled tasks, in the order of their list."""
        self.ready = ReadyTasks()
        """Tasks that may be claimed."""
        self.assigned: dict[str | None, set[str]] = {}
        """Identifiers of scheduled and running tasks, by node."""

    def load(self, page: InitialRows) -> None:
        """Index a page of the initial state."""
        self.pending.extend(page.keys)
        self.ready.extend(page.ready)
        for node_id, task_id in page.assigned:
            self.assigned.setdefault(node_id, set()).add(task_id)

    def add(self, arrived: list[Ready]) -> None:
        """Index new tasks that may be claimed; empties the list."""
        arrived.sort(key=itemgetter(0))
        self.pending.extend([key for key, _, _ in arrived])
        self.ready.extend(arrived)
        arrived.clear()

    def add_tasks(self, tasks: list[Record[Task]]) -> None:
        """Index new pending tasks; empties the list."""
        self.add([ready for task in tasks if (ready := _ready_of(task)) is not None])
        tasks.clear()

    def replace(self, id: str, old: Record[Task] | None, new: Record[Task] | None) -> None:
        """Replace a task in the index."""
        key_before = None if old is None else _pending_key(old)
        key_after = None if new is None else _pending_key(new)
        if key_before != key_after:
            if key_before is not None:
                self.pending.remove(key_before)
            if key_after is not None:
                self.pending.add(key_after)
        ready_before = None if old is None else _ready_of(old)
        ready_after = None if new is None else _ready_of(new)
        if ready_before != ready_after:
            if ready_before is not None:
                self.ready.remove(*ready_before[:2])
            if ready_after is not None:
                self.ready.add(*ready_after)
        if old is not None and old.status in ASSIGNED:
            assigned = self.assigned[old.assigned_node]
            assigned.remove(id)
            if not assigned:
                del self.assigned[old.assigned_node]
        if new is not None and new.status in ASSIGNED:
            self.assigned.setdefault(new.assigned_node, set()).add(id)

    def ahead_of(self, task: Record[Task], nodes: Iterable[Record[NodeInfo]], now: datetime) -> int:
        """Return the number of tasks that these nodes may claim before a pending one."""
        key = _pending_key(task)
        if key is None:
            return 0
        skills = {node.encoded("available_skills") for node in nodes}
        return self.ready.ahead_of(key, skills, now)


def _pending_key(task: Record[Task]) -> PendingKey | None:
    if task.status in WAITING:
        # A plain integer: the garbage collector tracks a tuple that holds an enum member.
        return int(task.priority), task.submitted_at, task.task_id
    return None


def _ready_of(task: Record[Task]) -> Ready | None:
    """Return a task as `ReadyTasks` takes it; `None` if it may not be claimed."""
    if task.status is not TaskStatus.PENDING:
        return None
    key = _pending_key(task)
    assert key is not None  # a pending task waits
    skills = task.required_skills
    if type(skills) is not bytes:  # decoded, or empty
        skills = task.encoded("required_skills")
    return key, skills, task.not_before
