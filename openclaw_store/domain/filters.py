"""Filters: conditions that select tasks, and pages of the selected tasks."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from datetime import datetime
from enum import StrEnum
from typing import Any

from openclaw_store.domain.models import Task, TaskStatus, TaskType
from openclaw_store.domain.validation import Check, check_enum, check_key, check_text, check_time
from openclaw_store.errors import InvalidDataError


@dataclass(frozen=True, kw_only=True)
class TaskFilter:
    """Conditions that a task must all meet; a filter without conditions selects all tasks.

    Text is compared exactly, with case and without wildcards. Of two times, `from` is included and
    `until` excluded.
    """

    status: TaskStatus | Iterable[TaskStatus] | None = None
    """One status, or several alternatives."""
    task_type: TaskType | Iterable[TaskType] | None = None
    """One type, or several alternatives."""
    node: str | None = None
    """The `assigned_node`."""
    user: str | None = None
    """The `user_id`."""
    skill: str | None = None
    """One of the `required_skills`."""
    name_contains: str | None = None
    submitted_from: datetime | None = None
    submitted_until: datetime | None = None
    completed_from: datetime | None = None
    completed_until: datetime | None = None

    def checked(self) -> TaskFilter:
        """Return a valid filter, with alternatives as tuples and times in UTC.

        Raises:
            InvalidDataError: If a condition is invalid; it names the condition.
        """
        given = {name: value for name, value in vars(self).items() if value is not None}
        return TaskFilter(**{name: _CHECKS[name](name, value) for name, value in given.items()})


def check_filter(filter: TaskFilter | None) -> TaskFilter:
    """Return a valid filter; `None` selects all tasks.

    Raises:
        InvalidDataError: If a condition is invalid; it names the condition.
    """
    if filter is None:
        return TaskFilter()
    if not isinstance(filter, TaskFilter):
        raise InvalidDataError("filter", f"must be a TaskFilter, not {type(filter).__name__}")
    return filter.checked()


def _alternatives(kind: type[StrEnum]) -> Check:
    check_member = check_enum(kind)

    def check(name: str, given: Any) -> tuple[Any, ...]:
        is_one = isinstance(given, str) or not isinstance(given, Iterable)
        members = [check_member(name, member) for member in ([given] if is_one else given)]
        return tuple(dict.fromkeys(members))

    return check


_CHECKS: Mapping[str, Check] = {
    "status": _alternatives(TaskStatus),
    "task_type": _alternatives(TaskType),
    **dict.fromkeys(("node", "user"), check_key),
    **dict.fromkeys(("skill", "name_contains"), check_text),
    **dict.fromkeys(("submitted_from", "submitted_until"), check_time),
    **dict.fromkeys(("completed_from", "completed_until"), check_time),
}


@dataclass(frozen=True)
class TaskPage:
    """One page of a list of tasks, newest submitted first."""

    tasks: list[Task]
    after: str | None
    """The cursor to pass to the next call; `None` on the last page."""

    def __iter__(self) -> Iterator[Task]:
        return iter(self.tasks)

    def __len__(self) -> int:
        return len(self.tasks)
