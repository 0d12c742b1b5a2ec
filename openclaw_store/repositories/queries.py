"""Which tasks are meant: one filter for everything that lists or changes many of them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, fields
from datetime import datetime

from sqlalchemy import ColumnElement, and_, false, func, or_, select

from openclaw_store.database.schema import TaskRow, from_microseconds, to_microseconds
from openclaw_store.database.statements import statements_for
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

    def conditions(self, dialect: str) -> Iterator[ColumnElement[bool]]:
        """What rows of a checked filter meet, but for the status."""
        row = TaskRow
        if self.task_type is not None:
            yield row.task_type.in_(self.task_type) if self.task_type else false()
        if self.node is not None:
            yield row.assigned_node == self.node
        if self.user is not None:
            yield row.user_id == self.user
        if self.skill is not None:
            skills = statements_for(dialect).elements(row.required_skills)
            yield select(skills).where(skills == self.skill).exists()
        if self.name_contains is not None:
            position = func.instr if dialect == "sqlite" else func.strpos
            yield position(row.name, self.name_contains) > 0
        for column, start, end in (
            (row.submitted_at, self.submitted_from, self.submitted_until),
            (row.completed_at, self.completed_from, self.completed_until),
        ):
            if start is not None:
                yield column >= start
            if end is not None:
                yield column < end


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


def cursor_of(task: Task) -> str:
    """Where a list goes on behind a task."""
    assert task.submitted_at is not None  # as of every stored task
    return f"{to_microseconds(task.submitted_at)}.{task.task_id}"


def behind(cursor: str) -> ColumnElement[bool]:
    """The tasks that come behind a cursor in the order of a list.

    Raises:
        InvalidDataError: If no page has given such a cursor.
    """
    moment, dot, id = check_text("after", cursor).partition(".")
    try:
        at = from_microseconds(int(moment))
    except (ValueError, OverflowError):
        at = None
    if at is None or not dot:
        raise InvalidDataError("after", "must be the `after` of the page before, or None")
    row = TaskRow
    # The first condition is implied by the second; it is the one that an index can be entered with.
    return and_(
        row.submitted_at <= at, or_(row.submitted_at < at, row.task_id < check_key("after", id))
    )
