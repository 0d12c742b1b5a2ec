"""Explain as data, and in a sentence, why a task waits."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from datetime import datetime

from openclaw_store.domain import (
    NodeInfo,
    NodeStatus,
    Record,
    Task,
    TaskStatus,
    free_slots,
    has_skills,
    is_due,
    is_expired,
)

FREE, FULL = "free", "full"


@dataclass(frozen=True)
class Explanation:
    """The reasons why a task is not running; `str` returns a sentence."""

    task_id: str
    status: TaskStatus
    assigned_node: str | None
    not_before: datetime | None
    """The earliest claim; `None` if the task is due, or not pending."""
    missing_skills: tuple[str, ...]
    """Required skills that no node has."""
    nodes: Mapping[str, str]
    """The state of each node with all its skills, which is `free`, `full`, or its status."""
    ahead: int
    """The number of tasks that these nodes claim first."""
    expired_at: datetime | None = None
    """The time at which the task expired; `None` if it may be claimed."""

    def __str__(self) -> str:
        if self.status is not TaskStatus.PENDING:
            on_node = "" if self.assigned_node is None else f" on node {self.assigned_node!r}"
            return f"Task {self.task_id!r} does not wait: it is {self.status.value}{on_node}."
        if self.expired_at is not None:
            at = self.expired_at.isoformat()
            return f"Task {self.task_id!r} expired at {at}: `recover` will end it."
        reasons: list[str] = []
        if self.not_before is not None:
            reasons.append(f"it is not due until {self.not_before.isoformat()}")
        if self.missing_skills:
            reasons.append(f"no node has the skill {' or '.join(map(repr, self.missing_skills))}")
        elif not self.nodes:
            reasons.append("no node has all of its skills")
        elif FREE not in self.nodes.values():
            states = (f"{node} is {state}" for node, state in sorted(self.nodes.items()))
            reasons.append(f"of the nodes that have its skills, {', '.join(states)}")
        if self.ahead:
            tasks = "task goes" if self.ahead == 1 else "tasks go"
            reasons.append(f"{self.ahead} {tasks} first")
        if reasons:
            return f"Task {self.task_id!r} waits: {'; '.join(reasons)}."
        free = sorted(node for node, state in self.nodes.items() if state == FREE)
        return f"Task {self.task_id!r} can be claimed now, for {', '.join(free)}."


def explain(
    task: Record[Task], nodes: Iterable[Record[NodeInfo]], ahead: int, now: datetime
) -> Explanation:
    """Explain a task; the caller passes all nodes, and counts the tasks ahead."""
    pending = task.status is TaskStatus.PENDING
    missing = set(task.decoded("required_skills")) if pending else set()
    states: dict[str, str] = {}
    for node in nodes if pending else ():
        missing.difference_update(node.decoded("available_skills"))
        if has_skills(node, task):
            state = FREE if free_slots(node) else FULL
            is_online = node.status is NodeStatus.ONLINE
            states[node.node_id] = state if is_online else str(node.status.value)
    return Explanation(
        task.task_id,
        task.status,
        task.assigned_node,
        task.not_before if pending and not is_due(task, now) else None,
        tuple(sorted(missing)),
        states,
        ahead,
        task.expires_at if pending and is_expired(task, now) else None,
    )
