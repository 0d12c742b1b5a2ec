"""The preferences of tasks: which of the tasks that a node may claim it takes first.

While any pending task has `optional_skills` or `affinity_tags`, a claim looks at the first tasks of
the queue that the node may run. Within one priority it takes the tasks first that were passed over
for too long, then those with the most optional skills and tags in common with the node.
PostgreSQL's function `store_write` repeats this rule.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from datetime import datetime, timedelta
from typing import Final

from openclaw_store.domain.conditions import skill_set
from openclaw_store.domain.models import NodeInfo, Task
from openclaw_store.domain.records import Record

WINDOW: Final = 64
"""Tasks among which a claim chooses; as many as it may take, if these are more."""

PATIENCE: Final = timedelta(seconds=60)
"""A task that was first passed over so long ago goes first."""


def matches(task: Record[Task], node: Record[NodeInfo]) -> int:
    """Return the number of optional skills and affinity tags of a task that a node has."""
    return sum(
        len(
            (skill_set(task.encoded(wanted)) or set()) & (skill_set(node.encoded(present)) or set())
        )
        for wanted, present in (("optional_skills", "available_skills"), ("affinity_tags", "tags"))
    )


def by_preference(
    tasks: Sequence[Record[Task]],
    node: Record[NodeInfo],
    passed_over_at: Mapping[str, datetime],
    now: datetime,
) -> list[Record[Task]]:
    """Return tasks, given in the order of claims, in the order in which a node takes them.

    Args:
        passed_over_at: The time at which a task was first passed over, by identifier.
    """

    def place(task: Record[Task]) -> tuple[int, bool, int]:
        since = passed_over_at.get(task.task_id, now)
        # A time far in the future is from before the clock was turned back.
        return task.priority, abs(now - since) < PATIENCE, -matches(task, node)

    return sorted(tasks, key=place)  # stable


def passed_over(tasks: Sequence[Record[Task]], taken: Collection[str]) -> list[str]:
    """Return the tasks of a window that were not taken, though later ones of equal priority were.

    Args:
        tasks: The window, in the order of claims.
        taken: Identifiers of the tasks that were taken.
    """
    last = {task.priority: place for place, task in enumerate(tasks) if task.task_id in taken}
    return [
        task.task_id
        for place, task in enumerate(tasks)
        if task.task_id not in taken and place < last.get(task.priority, 0)
    ]
