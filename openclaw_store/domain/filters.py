"""Filters: conditions that select tasks, and the pages of the tasks they select."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, fields
from datetime import datetime

from openclaw_store.domain.models import Task, TaskStatus, TaskType
from openclaw_store.domain.validation import check_enum, check_key, check_text, check_time
from openclaw_store.errors import InvalidDataError


@dataclass(frozen=True, kw_only=True)
class TaskFilter:
    """Tasks that meet every condition given; without any, all tasks.

    Text is compared as it is: case counts, and no character stands for others. Moments: from the
    first, included, until the second, excluded.
    """

    status: TaskStatus | Iterable[TaskStatus] | None = None
    """A state, or several, of which one must be the task's."""
    task_type: TaskType | Iterable[TaskType] | None = None
    """A type, or several."""
    node: str | None = None
    """The node that it is assigned to."""
    user: str | None = None
    """Its `user_id`."""
    skill: str | None = None
    """A skill that it requires."""
    name_contains: str | None = None
    submitted_from: datetime | None = None
    submitted_until: datetime | None = None
    completed_from: datetime | None = None
    completed_until: datetime | None = None

    def checked(self) -> TaskFilter:
        """The same with enumerations as tuples and moments in UTC.

        Raises:
            InvalidDataError: Naming the condition that makes no sense, and why.
        """
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        for name, kind in (("status", TaskStatus), ("task_type", TaskType)):
            if values[name] is not None:
                given = values[name]
                several = not isinstance(given, str) and isinstance(given, Iterable)
                check = check_enum(kind)
                members = [check(name, one) for one in (given if several else (given,))]
                values[name] = tuple(dict.fromkeys(members))
        for name, check in _CHECKS.items():
            if values[name] is not None:
                values[name] = check(name, values[name])
        return TaskFilter(**values)


def check_filter(filter: TaskFilter | None) -> TaskFilter:
    """A checked filter; `None` stands for all tasks.

    Raises:
        InvalidDataError: Naming what makes no sense, and why.
    """
    if filter is None:
        return TaskFilter()
    if not isinstance(filter, TaskFilter):
        raise InvalidDataError("filter", f"must be a TaskFilter, not {type(filter).__name__}")
    return filter.checked()


_CHECKS = {
    "node": check_key,
    "user": check_key,
    "skill": check_text,
    "name_contains": check_text,
    "submitted_from": check_time,
    "submitted_until": check_time,
    "completed_from": check_time,
    "completed_until": check_time,
}


@dataclass(frozen=True)
class TaskPage:
    """Some tasks of a long list, newest submitted first."""

    tasks: list[Task]
    after: str | None
    """Give it to the next call to go on from here; `None` when this was the last page."""

    def __iter__(self) -> Iterator[Task]:
        return iter(self.tasks)

    def __len__(self) -> int:
        return len(self.tasks)
