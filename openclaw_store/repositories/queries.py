"""SQL conditions of filters, and of the cursor of a list."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from datetime import datetime
from typing import Any

import orjson
from sqlalchemy import (
    ColumnElement,
    Text,
    and_,
    case,
    cast,
    false,
    func,
    literal,
    null,
    or_,
    select,
    type_coerce,
)

from openclaw_store.database import (
    IS_FINISHED,
    NodeRow,
    TaskRow,
    from_microseconds,
    statements_for,
    to_microseconds,
)
from openclaw_store.domain import (
    MAX_INTEGER,
    NodeFilter,
    NodeStatus,
    Record,
    Task,
    TaskFilter,
    check_key,
    check_text,
)
from openclaw_store.errors import InvalidDataError


def cursor_of(task: Record[Task]) -> str:
    """Return the cursor that continues a list after a task."""
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


def task_conditions(filter: TaskFilter, dialect: str) -> Iterator[Any]:
    """Yield the conditions of a checked filter, except the one on the status."""
    row: Any = TaskRow
    for column, alternatives in (
        (row.task_type, filter.task_type),
        (row.priority, filter.priority),
    ):
        if isinstance(alternatives, tuple):
            yield column.in_(alternatives) if alternatives else false()
    for column, value in (
        (row.assigned_node, filter.node),
        (row.user_id, filter.user),
        (row.idempotency_key, filter.idempotency_key),
    ):
        if value is not None:
            yield column == value
    if filter.skill is not None:
        yield _has_element(row.required_skills, filter.skill, dialect)
    position = func.instr if dialect == "sqlite" else func.strpos
    for column, part in ((row.name, filter.name_contains), (row.error, filter.error_contains)):
        if part is not None:
            yield position(column, part) > 0
    for column, start, end in (
        (row.submitted_at, filter.submitted_from, filter.submitted_until),
        (row.completed_at, filter.completed_from, filter.completed_until),
        (row.completed_at, filter.finished_after, filter.finished_before),
    ):
        if start is not None:
            yield column >= start
        if end is not None:
            yield column < end
    if filter.finished_after is not None or filter.finished_before is not None:
        yield IS_FINISHED
    for path, wanted in (filter.metadata or {}).items():
        is_value = _is_value_on_sqlite if dialect == "sqlite" else _is_value_on_postgresql
        yield is_value(row.metadata_, path.split("."), wanted)


def node_conditions(
    filter: NodeFilter, now: datetime, dialect: str
) -> Iterator[ColumnElement[bool]]:
    """Yield the conditions of a checked filter."""
    row = NodeRow
    if isinstance(filter.status, tuple):
        yield row.status.in_(filter.status) if filter.status else false()
    if filter.skill is not None:
        yield _has_element(row.available_skills, filter.skill, dialect)
    if filter.tag is not None:
        yield _has_element(row.tags, filter.tag, dialect)
    if filter.has_free_slots is not None:
        has_free = and_(
            row.status == NodeStatus.ONLINE, row.running_tasks < row.max_concurrent_tasks
        )
        yield has_free if filter.has_free_slots else ~has_free
    if filter.silent_for is not None:
        last_sign = func.coalesce(row.last_heartbeat, row.registered_at)
        yield ~last_sign.between(now - filter.silent_for, now + filter.silent_for)


def _has_element(texts: Any, wanted: str, dialect: str) -> ColumnElement[bool]:
    elements = statements_for(dialect).elements(_readable(texts) if dialect == "sqlite" else texts)
    return select(elements).where(elements == wanted).exists()


def _readable(document: Any) -> ColumnElement[str]:
    """Return a JSON text, or NULL for one that was written by hand and that SQLite cannot parse."""
    text = type_coerce(document, Text)
    return case((func.json_valid(text) == 1, text), else_=null())


def _is_value_on_sqlite(document: Any, keys: Sequence[str], wanted: Any) -> ColumnElement[bool]:
    path = "$" + "".join(f'."{key}"' for key in keys)
    document = _readable(document)
    kind = func.json_type(document, path)
    if wanted is None:
        return kind == "null"
    if isinstance(wanted, str):
        return and_(kind == "text", func.json_extract(document, path) == wanted)
    # For two paths, SQLite returns a list, in which numbers are written as in the document.
    both = func.json_extract(document, path, path, type_=Text)
    return both.in_([f"[{text},{text}]" for text in _spellings(wanted)])


def _is_value_on_postgresql(document: Any, keys: Sequence[str], wanted: Any) -> ColumnElement[bool]:
    for key in keys[:-1]:
        document = document.op("->")(literal(key, Text))
    member = document.op("->")(literal(keys[-1], Text))
    kind = func.json_typeof(member)
    if wanted is None:
        return kind == "null"
    if isinstance(wanted, str):
        return and_(
            kind == "string", document.op("->>")(literal(keys[-1], Text)) == literal(wanted, Text)
        )
    return cast(member, Text).in_(_spellings(wanted))


def _spellings(value: float) -> list[str]:
    """Return the JSON texts of a number or boolean: the number 1 is `1` or `1.0`."""
    same = {orjson.dumps(value).decode()}
    if not isinstance(value, bool):
        whole = int(value)
        if whole == value and -MAX_INTEGER <= whole + 1 <= MAX_INTEGER + 1:
            same.add(str(whole))
        if float(value) == value:
            same.add(orjson.dumps(float(value)).decode())
        if not value:
            same.add("-0.0")
    return sorted(same)
