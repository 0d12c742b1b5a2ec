"""SQL of a claim: pending tasks in the order of claims, by the skills that they require.

Tasks that require the same skills are a group: the first column of the index `ix_tasks_ready`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import orjson

from openclaw_store.backends import qualified
from openclaw_store.database.row_codec import FIELDS
from openclaw_store.database.tables import IS_DELAYED, IS_PENDING, IS_READY
from openclaw_store.domain import Task, TaskStatus

_ORDER = "priority, submitted_at, task_id"
_COLUMNS = ", ".join(FIELDS[Task])
_IS_DUE = f"status = '{TaskStatus.PENDING.value}' AND (not_before IS NULL OR not_before <= {{}})"


class ClaimStatements(NamedTuple):
    """The queries of a claim. A place is the columns by which claims are ordered."""

    heads: str
    """Group, required skills, and place of the first task of each group; takes `ranges`, a limit.

    Without the group of no skills on SQLite, which is NULL."""
    ranges: Callable[[Iterable[str] | None], Sequence[Any]]
    """Makes the parameters that limit `heads` to groups that begin with one of these skills, and
    perhaps a few more; `None` for all."""
    group: str
    """All columns of the first tasks of a group; takes the group, the time and a limit."""
    front: str
    """All columns of the due tasks among the first pending and scheduled ones; takes a limit, and
    the time."""
    due_retries: str
    """All columns of delayed tasks that are due; takes the time and a limit."""


def claim_statements(dialect: str, schema: str | None) -> ClaimStatements:
    """Return the queries for `sqlite` or `postgresql`, and for tables in a schema."""
    if dialect == "sqlite":
        tasks = "tasks INDEXED BY {}"
        return _statements(_SQLITE_HEADS, _sqlite_ranges, "required_skills IS ?", tasks)
    tasks = qualified(schema, "tasks")
    heads = _postgresql_heads(tasks)
    return _statements(heads, lambda _: (), f"{_HASH} = $1", tasks, "$1", "$2", "$3")


def _statements(
    heads: str,
    ranges: Callable[[Iterable[str] | None], Sequence[Any]],
    in_group: str,
    tasks: str,
    first: str = "?",
    second: str = "?",
    third: str = "?",
) -> ClaimStatements:
    ready, delayed, pending = [
        f"{tasks.format(index)} WHERE {condition}"
        for index, condition in (
            ("ix_tasks_ready", IS_READY),
            ("ix_tasks_delayed", IS_DELAYED),
            ("ix_tasks_pending", IS_PENDING),
        )
    ]
    return ClaimStatements(
        heads,
        ranges,
        f"""
        SELECT {_COLUMNS} FROM {ready} AND {in_group}
        AND (expires_at IS NULL OR expires_at > {second}) ORDER BY {_ORDER} LIMIT {third}""",
        f"""
        SELECT {_COLUMNS} FROM (SELECT * FROM {pending} ORDER BY {_ORDER} LIMIT {first}) AS front
        WHERE {_IS_DUE.format(second)} ORDER BY {_ORDER}""",
        f"""
        SELECT {_COLUMNS} FROM {delayed} AND not_before <= {first}
        ORDER BY not_before LIMIT {second}""",
    )


_FIRST_ROW = f"SELECT rowid FROM tasks INDEXED BY ix_tasks_ready WHERE {IS_READY}"
_IN_GROUPS = f"ORDER BY required_skills, {_ORDER} LIMIT 1"

_SQLITE_HEADS = f"""
WITH RECURSIVE heads (head, top) AS (
    SELECT ({_FIRST_ROW} AND required_skills >= json_extract(value, '$[0]')
        AND required_skills < json_extract(value, '$[1]') {_IN_GROUPS}),
        json_extract(value, '$[1]') FROM json_each(?)
    UNION ALL
    SELECT ({_FIRST_ROW} AND required_skills < top AND required_skills > (
        SELECT required_skills FROM tasks WHERE rowid = head) {_IN_GROUPS}), top
    FROM heads WHERE head IS NOT NULL LIMIT ?
)
SELECT required_skills, required_skills, {_ORDER}
FROM heads CROSS JOIN tasks ON tasks.rowid = head"""

_ALL_JSON = "\x7f"  # JSON begins with a smaller character


def _sqlite_ranges(skills: Iterable[str] | None) -> Sequence[Any]:
    if skills is None:
        return (orjson.dumps([("", _ALL_JSON)]).decode(),)
    # Lists begin with a skill of the node. Lists that were written by hand may have spaces, which
    # are before and after them, or a backslash in the place of any character.
    ranges = [("", '["'), ("[#", _ALL_JSON)]
    for skill in skills:
        text = "[" + orjson.dumps(skill).decode()
        ranges.append((text, text[:-1] + "#"))
        ranges += [(text[:end] + "\\", text[:end] + "]") for end in range(2, len(text))]
    return (orjson.dumps(ranges).decode(),)


# A hash, since a long list does not fit into an index of PostgreSQL.
_HASH = "coalesce(hashtextextended(required_skills::text, 0), 0)"
SKILL_GROUPS: Mapping[str, str] = {"sqlite": "required_skills", "postgresql": _HASH}
"""The first column of the index, by dialect: tasks that require the same skills are a group."""


def _postgresql_heads(tasks: str) -> str:
    next_row = f"SELECT {_HASH} AS key, required_skills, {_ORDER} FROM {tasks} WHERE {IS_READY}"
    return f"""
WITH RECURSIVE heads AS (
    ({next_row} ORDER BY {_HASH}, {_ORDER} LIMIT 1)
    UNION ALL
    SELECT next.* FROM heads, LATERAL (
        {next_row} AND {_HASH} > heads.key ORDER BY {_HASH}, {_ORDER} LIMIT 1
    ) AS next
)
SELECT key, required_skills, {_ORDER} FROM heads LIMIT $1"""
