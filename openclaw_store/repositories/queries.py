"""SQL conditions of a `TaskFilter` and of the cursor of a list."""

from __future__ import annotations

from collections.abc import Iterator

from sqlalchemy import ColumnElement, and_, false, func, or_, select

from openclaw_store.database import TaskRow, from_microseconds, statements_for, to_microseconds
from openclaw_store.domain import Task, TaskFilter, check_key, check_text
from openclaw_store.errors import InvalidDataError


def cursor_of(task: Task) -> str:
    """Return the cursor that continues a list after a task."""
    assert task.submitted_at is not None  # every stored task has it
    return f"{to_microseconds(task.submitted_at)}.{task.task_id}"


def after_cursor(cursor: str) -> ColumnElement[bool]:
    """Return the condition for the tasks after a cursor, in the order of a list.

    Raises:
        InvalidDataError: If the text is no cursor.
    """
    moment, dot, id = check_text("after", cursor).partition(".")
    try:
        at = from_microseconds(int(moment))
    except (ValueError, OverflowError):
        at = None
    if at is None or not dot:
        raise InvalidDataError("after", "must be the `after` of the page before, or None")
    row = TaskRow
    # The second condition implies the first, but only the first can use the index.
    return and_(
        row.submitted_at <= at, or_(row.submitted_at < at, row.task_id < check_key("after", id))
    )


def conditions(filter: TaskFilter, dialect: str) -> Iterator[ColumnElement[bool]]:
    """Yield the conditions of a checked filter, except the one on the status."""
    row = TaskRow
    if filter.task_type is not None:
        yield row.task_type.in_(filter.task_type) if filter.task_type else false()
    if filter.node is not None:
        yield row.assigned_node == filter.node
    if filter.user is not None:
        yield row.user_id == filter.user
    if filter.skill is not None:
        skills = statements_for(dialect).elements(row.required_skills)
        yield select(skills).where(skills == filter.skill).exists()
    if filter.name_contains is not None:
        position = func.instr if dialect == "sqlite" else func.strpos
        yield position(row.name, filter.name_contains) > 0
    for column, start, end in (
        (row.submitted_at, filter.submitted_from, filter.submitted_until),
        (row.completed_at, filter.completed_from, filter.completed_until),
    ):
        if start is not None:
            yield column >= start
        if end is not None:
            yield column < end
