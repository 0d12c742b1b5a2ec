"""Failures by cause: the tasks that failed or timed out since a moment, in groups of one text.

The newest ones are read from an index that has no other tasks, up to a limit.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from sqlalchemy import Connection, Text, func, select, type_coerce

from openclaw_store.database import HAS_FAILED, Statements, TaskRow
from openclaw_store.domain import TaskStatus
from openclaw_store.encryption import SealedColumn
from openclaw_store.errors import SealedValueError

_ERROR = SealedColumn("tasks", "error", is_json=False)

EXAMPLES = 3
"""Identifiers that a group lists."""

_END = 400
"""Characters at the end of an error that are read."""

_LONGEST = 160
"""Characters of a folded text."""

_VARIABLE = re.compile(
    r"\b0x[0-9a-fA-F]+\b|\b[0-9a-fA-F]{8}(?:-?[0-9a-fA-F]{4}){3}-?[0-9a-fA-F]{12}\b|\d+"
)


@dataclass(frozen=True)
class FailureGroup:
    """Tasks that failed with one text, apart from numbers in it."""

    status: TaskStatus
    text: str
    """The last line of the error, with `#` for each number; empty without an error."""
    count: int
    newest_at: datetime
    examples: Sequence[str]
    """Identifiers of the newest tasks."""
    nodes: Sequence[str]
    """The nodes of the tasks; the node with most of them is first."""


@dataclass(frozen=True)
class Failures:
    """The failures since a moment, most frequent first."""

    since: datetime
    groups: Sequence[FailureGroup]
    count: int
    """Tasks in all groups."""
    is_complete: bool
    """False if older failures were left out, because of the limit."""


def find_failures(
    connection: Connection, sql: Statements, since: datetime, *, most: int = 2000
) -> Failures:
    """Group the newest failed and timed out tasks by status and text.

    A sealed error is read as a whole, to open it; one that cannot be opened is empty.

    Args:
        sql: The statements of the database.
        since: Earliest time of the end of a task.
        most: Maximum number of tasks that are read.
    """
    query = (
        select(
            TaskRow.task_id,
            TaskRow.status,
            TaskRow.completed_at,
            TaskRow.assigned_node,
            _stored_error(sql),
        )
        .where(HAS_FAILED, TaskRow.completed_at >= since)
        .with_hint(TaskRow.__table__, "INDEXED BY ix_tasks_failed", "sqlite")
        .order_by(TaskRow.completed_at.desc(), TaskRow.task_id.desc())
        .limit(most + 1)
    )
    rows = connection.execute(query).all()
    found: defaultdict[tuple[TaskStatus, str], list[Any]] = defaultdict(list)
    for row in rows[:most]:
        found[row.status, fold(_opened(sql, row.task_id, row[-1]))].append(row)
    groups = [
        FailureGroup(
            status,
            text,
            len(members),
            members[0].completed_at,
            [one.task_id for one in members[:EXAMPLES]],
            _most_frequent([one.assigned_node for one in members if one.assigned_node]),
        )
        for (status, text), members in found.items()
    ]
    groups.sort(key=lambda group: group.count, reverse=True)
    return Failures(since, groups, min(most, len(rows)), len(rows) <= most)


def fold(error: str) -> str:
    """Return the last line of an error, with `#` for numbers and identifiers in hexadecimal."""
    lines = error.strip().splitlines()
    return _VARIABLE.sub("#", lines[-1].strip())[:_LONGEST] if lines else ""


def _stored_error(sql: Statements) -> Any:
    text = type_coerce(TaskRow.error, Text)
    if sql.protection.has_keys:
        return text
    return func.substr(text, -_END) if sql.dialect.name == "sqlite" else func.right(text, _END)


def _opened(sql: Statements, id: str, stored: str | None) -> str:
    if not stored or not sql.protection.has_keys:
        return stored or ""
    try:
        return sql.protection.loading(_ERROR)(id, stored)[-_END:]
    except SealedValueError:  # `verify` reports it
        return ""


def _most_frequent(values: Sequence[str]) -> list[str]:
    return sorted(set(values), key=lambda value: (-values.count(value), value))[:EXAMPLES]
