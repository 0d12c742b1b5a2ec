"""SQL conditions of filters."""

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
    type_coerce,
)

from openclaw_store.database import NodeRow, Statements, TaskRow, statements_of
from openclaw_store.domain import LIVE, MAX_INTEGER, NodeFilter, NodeStatus, TaskFilter
from openclaw_store.encryption import USER_ID, Protection
from openclaw_store.errors import InvalidDataError

Condition = ColumnElement[bool]


def task_conditions(filter: TaskFilter, sql: Statements) -> Iterator[Condition]:
    """Yield the conditions of a checked filter, except the one on the status.

    Raises:
        InvalidDataError: If a condition searches in sealed values.
    """
    yield from indexed_conditions(filter, sql)
    yield from other_conditions(filter, sql)


def indexed_conditions(filter: TaskFilter, sql: Statements) -> Iterator[Condition]:
    """Yield the conditions of a checked filter that an index answers in the order of a list."""
    row = TaskRow
    if filter.node is not None:
        yield row.assigned_node == filter.node
    if filter.user is not None:
        yield is_of_user(filter.user, sql)
    yield from _between(row.submitted_at, filter.submitted_from, filter.submitted_until)


def is_of_user(user_id: str, sql: Statements) -> Condition:
    """Return the condition of the tasks of a user; a sealed user id begins with a keyed hash."""
    column, (equal, beginnings) = TaskRow.user_id, sql.protection.forms_of(USER_ID, user_id)
    return or_(
        *(column == one for one in equal),
        *(and_(column >= one, column < f"{one}~") for one in beginnings),
    )


def completion_conditions(filter: TaskFilter) -> Iterator[Condition]:
    """Yield the conditions of a checked filter on the time of completion."""
    completed_at = TaskRow.completed_at
    yield from _between(completed_at, filter.completed_from, filter.completed_until)
    yield from _between(completed_at, filter.finished_after, filter.finished_before)
    if selects_finished(filter):
        # Not `IN (finished ones)`: SQLite could read all of them by their status.
        yield TaskRow.status.not_in(sorted(LIVE))


def selects_finished(filter: TaskFilter) -> bool:
    """Return true if a checked filter selects finished tasks only, by their time."""
    return filter.finished_after is not None or filter.finished_before is not None


def other_conditions(filter: TaskFilter, sql: Statements) -> Iterator[Condition]:
    """Yield the conditions of a checked filter that are checked for each task of a list.

    Raises:
        InvalidDataError: If a condition searches in sealed values.
    """
    row: Any = TaskRow
    dialect = sql.dialect.name
    refuse_sealed(filter, sql.protection)
    for column, alternatives in (
        (row.task_type, filter.task_type),
        (row.priority, filter.priority),
    ):
        if isinstance(alternatives, tuple):
            yield column.in_(alternatives)  # not `false()`, which would replace all conditions
    if filter.idempotency_key is not None:
        yield row.idempotency_key == filter.idempotency_key
    if filter.skill is not None:
        yield _has_element(row.required_skills, filter.skill, dialect)
    for column, part in ((row.name, filter.name_contains), (row.error, filter.error_contains)):
        if part is not None:
            yield _contains(column, part, dialect)
    yield from completion_conditions(filter)
    for path, wanted in (filter.metadata or {}).items():
        is_value = _is_value_on_sqlite if dialect == "sqlite" else _is_value_on_postgresql
        yield is_value(row.metadata_, path.split("."), wanted)


def refuse_sealed(filter: TaskFilter, protection: Protection) -> None:
    """Refuse a search in sealed values.

    Raises:
        InvalidDataError: It names the condition.
    """
    for name in protection.unsearchable:
        if getattr(filter, name) is not None:
            raise InvalidDataError(
                name,
                "is a search in sealed values, which the database cannot read: select by other "
                "conditions, and search in the tasks that are found",
            )


def node_conditions(filter: NodeFilter, now: datetime, dialect: str) -> Iterator[Condition]:
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


def _between(column: Any, start: Any, end: Any) -> Iterator[Condition]:
    if start is not None:
        yield column >= start
    if end is not None:
        yield column < end


def _contains(text: Any, part: str, dialect: str) -> Condition:
    position = func.instr if dialect == "sqlite" else func.strpos
    return position(text, part) > 0


def _has_element(texts: Any, wanted: str, dialect: str) -> Condition:
    is_sqlite = dialect == "sqlite"
    # Most lists lack the text, which is found in a third of the time of reading a list. In a list
    # with a backslash, it may be written in another way. Databases reorder the operands of AND.
    text = type_coerce(texts, Text) if is_sqlite else cast(texts, Text)
    parts = orjson.dumps(wanted).decode(), "\\"
    may_have = or_(*(_contains(text, part, dialect) for part in parts))
    document = _readable(texts) if is_sqlite else texts
    return case((may_have, statements_of(dialect).has_element(document, wanted)), else_=false())


def _readable(document: Any) -> ColumnElement[str]:
    """Return a JSON text, or NULL for one that was written by hand and that SQLite cannot parse."""
    text = type_coerce(document, Text)
    return case((func.json_valid(text) == 1, text), else_=null())


def _is_value_on_sqlite(document: Any, keys: Sequence[str], wanted: Any) -> Condition:
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


def _is_value_on_postgresql(document: Any, keys: Sequence[str], wanted: Any) -> Condition:
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
