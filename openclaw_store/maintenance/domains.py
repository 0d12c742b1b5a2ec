"""The domains of the columns as SQL: the conditions under which a value may be unacceptable.

The database reads all rows, and returns only suspicious ones, which the domain's own checks then
judge. A condition may be true for a good value; it must never be false for a bad one.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from datetime import UTC, datetime, timedelta
from typing import Any

from sqlalchemy import (
    Column,
    ColumnElement,
    Float,
    Integer,
    Text,
    and_,
    case,
    cast,
    false,
    func,
    literal,
    not_,
    or_,
    select,
    true,
    type_coerce,
)

from openclaw_store.database import EnumValue, Json, UtcTime, table_of
from openclaw_store.domain import (
    FINISHED,
    MAX_INTEGER,
    MAX_JSON_BYTES,
    MAX_JSON_DEPTH,
    MAX_TEXT_LENGTH,
    Task,
    TaskStatus,
)
from openclaw_store.encryption import PREFIX

Condition = ColumnElement[bool]

FUTURE = timedelta(days=1)
"""A past event may be this far in the future: the clocks of machines differ."""

DISORDER = timedelta(seconds=2)
"""A task may end this long before its start: the clocks of machines differ."""

PLANNED = frozenset({"not_before", "expires_at", "cancel_deadline_at"})
"""Times that may be in the future."""

_GREATEST = {"cpu_usage": 100.0, "memory_usage": 100.0, "disk_usage": 100.0, "lease_seconds": 1e9}
_NEVER_EMPTY = frozenset({"task_id", "node_id", "idempotency_key", "item_id"})
EARLIEST, LATEST = datetime(1, 12, 31, tzinfo=UTC), datetime(9999, 1, 1, tzinfo=UTC)
"""Times outside are damage, or endless."""
_LISTS = frozenset(
    {"required_skills", "optional_skills", "affinity_tags", "available_skills", "tags"}
)
_OBJECTS = frozenset({"parameters", "metadata", "progress"})


def suspicious_rows(kind: type[Any], dialect: str, now: datetime) -> Condition:
    """Return the condition of tasks or nodes with a value that may be unacceptable."""
    columns = table_of(kind).columns
    return or_(*(suspicious_value(one, dialect, now) for one in columns), *_relations(kind))


def is_endless(moment: datetime) -> bool:
    """Return `True` for the ends of the calendar, as which drivers read an infinite time."""
    return moment.year in (EARLIEST.year, LATEST.year)


def _relations(kind: type[Any]) -> Iterator[Condition]:
    """Yield the conditions between the values of one row."""
    row = table_of(kind).columns
    if kind is Task:
        for status, moment in (
            ([TaskStatus.SCHEDULED], row.scheduled_at),
            ([TaskStatus.RUNNING], row.started_at),
            (sorted(FINISHED), row.completed_at),
        ):
            yield and_(row.status.in_(status), moment.is_(None))
        yield and_(row.status.not_in(sorted(FINISHED)), row.completed_at.is_not(None))
        yield row.completed_at < row.started_at
        yield row.retry_count > row.max_retries
        yield row.losses > row.max_losses
    else:
        yield row.successful_tasks + row.failed_tasks > row.total_tasks_processed


def suspicious_value(column: Column[Any], dialect: str, now: datetime) -> Condition:
    """Return the condition of values that the type of the column, or its domain, forbids."""
    is_file, kind = dialect == "sqlite", column.type
    rules: list[Condition]
    types = ["text"]
    if isinstance(kind, UtcTime):
        latest = LATEST if column.name in PLANNED else now + FUTURE
        types, rules = ["integer"], [not_(column.between(EARLIEST, latest))]
    elif isinstance(kind, Json):
        rules = [_suspicious_json(column, is_file)]
    elif isinstance(kind, EnumValue):
        values = [one.value for one in kind.kind]
        is_number = isinstance(values[0], int)
        types = ["integer"] if is_number else types
        rules = [type_coerce(column, Integer() if is_number else Text()).not_in(values)]
    elif isinstance(kind, Float):
        greatest = _GREATEST.get(column.name, 1.7976931348623157e308)
        types, rules = ["real", "integer"], [not_(column.between(0, greatest))]
        if column.name == "lease_seconds":
            rules.append(column == 0)
    elif isinstance(kind, Integer):
        # The revisions of changes in another cluster are negative; see `clusters.transit`.
        least = -MAX_INTEGER if column.table.name == "past_changes" else 0
        types, rules = ["integer"], [not_(column.between(least, MAX_INTEGER))]
    else:
        rules = [func.length(column) > (getattr(kind, "length", None) or MAX_TEXT_LENGTH)]
        if column.name in _NEVER_EMPTY:
            rules.append(column == "")
        if is_file:
            rules.append(func.instr(column, "\0") > 0)
    if is_file:
        rules.insert(0, _is_of_other_type(column, types))
    absent = false() if column.nullable else true()
    return case((column.is_(None), absent), *((rule, true()) for rule in rules), else_=false())


def ill_typed(column: Column[Any], dialect: str) -> Condition:
    """Return the condition of values that are not even text, which only SQLite stores."""
    is_other = _is_of_other_type(column, ["text"]) if dialect == "sqlite" else false()
    return and_(column.is_not(None), is_other) if column.nullable else is_other


def sealed(column: Column[Any], dialect: str) -> Condition:
    """Return the condition of sealed values, into which the database cannot see."""
    content = type_coerce(column, Text) if dialect == "sqlite" else cast(column, Text)
    return or_(content.startswith(PREFIX), content.startswith(f'"{PREFIX}'))


def _is_of_other_type(column: Column[Any], types: Sequence[str]) -> Condition:
    return and_(*(func.typeof(column) != one for one in types))


def _suspicious_json(column: Column[Any], is_file: bool) -> Condition:
    """Return the condition of JSON that may have a wrong type, depth, size or character."""
    content = type_coerce(column, Text) if is_file else cast(column, Text)
    nested = func.length(func.replace(func.replace(content, "[", ""), "{", ""))
    length = func.length(content)
    rules: list[Condition] = [
        length > MAX_JSON_BYTES // 4,
        func.instr(content, "\\u") > 0 if is_file else func.strpos(content, "\\u") > 0,
        and_(length > 2 * MAX_JSON_DEPTH, length - nested > MAX_JSON_DEPTH),
    ]
    kind = func.json_type(content) if is_file else func.json_typeof(column)
    if column.name in _OBJECTS:
        rules.append(kind != "object")
    if column.name in _LISTS:
        rules.append(kind != "array")
        rules.append(and_(content != "[]", _has_element_without_text(column, is_file)))
    if is_file:
        rules.insert(0, func.json_valid(content) == 0)
    return case(*((rule, true()) for rule in rules), else_=false())


def _has_element_without_text(column: Column[Any], is_file: bool) -> Condition:
    if is_file:
        element = func.json_each(type_coerce(column, Text)).table_valued("type")
        return select(literal(1)).select_from(element).where(element.c.type != "text").exists()
    element = func.json_array_elements(column).table_valued("value")
    kind = func.json_typeof(element.c.value)
    return select(literal(1)).select_from(element).where(kind != "string").exists()
