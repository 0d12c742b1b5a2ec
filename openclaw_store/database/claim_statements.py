"""SQL of a claim: pending tasks in the order of claims, by the skills that they require.

Tasks that require the same skills are a group. The index `ix_tasks_ready` begins with the groups,
ordered by their first skill (on PostgreSQL, by its hash).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import orjson
from sqlalchemy import BigInteger, ColumnElement, Text, literal_column

from openclaw_store.backends import qualified
from openclaw_store.database.row_codec import FIELDS
from openclaw_store.database.tables import IS_DELAYED, IS_PENDING, IS_PREFERRING, IS_READY
from openclaw_store.domain import JSON_FIELDS, Task, TaskStatus

_ORDER = "priority, submitted_at, task_id"
_COLUMNS = ", ".join(FIELDS[Task])
_AS_TEXT = ", ".join(
    f"{name}::text" if name in JSON_FIELDS[Task] else name for name in FIELDS[Task]
)
_IS_DUE = f"status = '{TaskStatus.PENDING.value}' AND (not_before IS NULL OR not_before <= {{}})"


class ClaimStatements(NamedTuple):
    """The queries of a claim. A place is the columns by which claims are ordered."""

    all_heads: str
    """Required skills and place of the first task of each group; takes `ranges`, a limit."""
    heads: str
    """The same for the groups of some skills, and perhaps a few more."""
    ranges: Callable[[frozenset[str] | None], Sequence[Any]]
    """Makes the parameters that limit `heads` to groups that begin with one of these skills; `None`
    for those of `all_heads`."""
    group: str
    """All columns of the first tasks of a group; takes its skills, the time and a limit."""
    front: str
    """All columns of the due tasks among the first pending and scheduled ones; takes a limit, and
    the time."""
    due_retries: str
    """All columns of the delayed tasks that were due first; takes the time twice, and a limit."""
    due_skills: str
    """The required skills of all delayed tasks that are due; takes the time twice."""
    due_with_skills: str
    """As `due_retries`, of tasks that require one of some lists; takes these before the limit."""
    prefers: str
    """A row if any pending task has preferences."""
    passed_over: str
    """Identifier and time of each given task that was passed over since its last change."""
    pass_over: str
    """Write the time at which tasks were passed over; takes it, and their identifiers."""


def claim_statements(dialect: str, schema: str | None) -> ClaimStatements:
    """Return the queries for `sqlite` or `postgresql`, and for tables in a schema."""
    if dialect == "sqlite":
        tasks = "tasks INDEXED BY {}"
        in_group = "required_skills IS ?"
        among = "task_id IN (SELECT value FROM json_each(?))"
        return _statements(
            (_SQLITE_HEADS, _SQLITE_HEADS, _sqlite_ranges), in_group, tasks, among, among
        )
    given = "$1::text"
    in_group = f"""{_BUCKET} = {_bucket_of(given)} AND {_GROUP} = {_group_of(given)}
        AND required_skills::text IS NOT DISTINCT FROM {given}"""
    tasks = qualified(schema, "tasks")
    unlocked = f"SELECT task_id FROM {tasks} WHERE task_id = ANY ($2) FOR UPDATE SKIP LOCKED"
    return _statements(
        (*_postgresql_heads(tasks), _postgresql_ranges),
        in_group,
        tasks,
        "task_id = ANY ($1)",
        f"task_id IN ({unlocked})",
        ("$1", "$2", "$3", "$4"),
    )


def _statements(
    heads: tuple[str, str, Callable[[frozenset[str] | None], Sequence[Any]]],
    in_group: str,
    tasks: str,
    among: str,
    among_unlocked: str,
    parameters: Sequence[str] = ("?", "?", "?", "?"),
) -> ClaimStatements:
    first, second, third, fourth = parameters
    is_sqlite = first == "?"
    columns = _COLUMNS if is_sqlite else _AS_TEXT
    skills = "coalesce(required_skills, '[]')"
    among_skills = f"{skills} IN (SELECT value FROM json_each({third}))"
    if not is_sqlite:
        skills = "coalesce(required_skills::text, '[]')"
        among_skills = f"{skills} = ANY ({third})"
    table = tasks.split()[0]
    ready, delayed, pending, preferring = [
        f"{tasks.format(index)} WHERE {condition}"
        for index, condition in (
            ("ix_tasks_ready", IS_READY),
            ("ix_tasks_delayed", IS_DELAYED),
            ("ix_tasks_pending", IS_PENDING),
            ("ix_tasks_preferring", IS_PREFERRING),
        )
    ]
    due = f"""{delayed} AND not_before <= {first}
        AND (expires_at IS NULL OR expires_at > {second})"""
    return ClaimStatements(
        *heads,
        f"""
        SELECT {columns} FROM {ready} AND {in_group}
        AND (expires_at IS NULL OR expires_at > {second}) ORDER BY {_ORDER} LIMIT {third}""",
        f"""
        SELECT {columns} FROM (SELECT * FROM {pending} ORDER BY {_ORDER} LIMIT {first}) AS front
        WHERE {_IS_DUE.format(second)} ORDER BY {_ORDER}""",
        f"SELECT {columns} FROM {due} ORDER BY not_before LIMIT {third}",
        f"SELECT DISTINCT {skills} FROM {due}",
        f"SELECT {columns} FROM {due} AND {among_skills} ORDER BY not_before LIMIT {fourth}",
        f"SELECT 1 FROM {preferring} ORDER BY max_retries LIMIT 1",
        f"""
        SELECT task_id, passed_over_at FROM {table} WHERE {among} AND passed_over_at > updated_at
        """,
        f"UPDATE {table} SET passed_over_at = {first} WHERE {among_unlocked}",
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
SELECT required_skills, {_ORDER}
FROM heads CROSS JOIN tasks ON tasks.rowid = head
UNION ALL
SELECT required_skills, {_ORDER} FROM tasks
WHERE rowid = ({_FIRST_ROW} AND required_skills IS NULL {_IN_GROUPS})"""

_ALL_JSON = "\x7f"  # JSON begins with a smaller character


@lru_cache(maxsize=16)  # long skills make long ranges
def _sqlite_ranges(skills: frozenset[str] | None) -> Sequence[Any]:
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


def _bucket_of(skills: str) -> str:
    """Return the hash of the first skill of a JSON list; of an empty text for any odd list."""
    return f"""hashtextextended(CASE WHEN strpos({skills}, chr(92)) > 0 THEN ''
        ELSE coalesce(split_part({skills}, '"', 2), '') END, 0)"""


def _group_of(skills: str) -> str:
    """Return the hash of a list in JSON: a long list does not fit into an index of PostgreSQL."""
    return f"coalesce(hashtextextended({skills}, 0), 0)"


_BUCKET, _GROUP = _bucket_of("required_skills::text"), _group_of("required_skills::text")
SKILL_GROUPS: Mapping[str, Sequence[ColumnElement[Any]]] = {
    "sqlite": [literal_column("required_skills", Text())],
    "postgresql": [literal_column(one, BigInteger()) for one in (_BUCKET, _GROUP)],
}
"""The first columns of the index, by dialect: tasks that require the same skills are a group."""


def _postgresql_heads(tasks: str) -> tuple[str, str]:
    """Return two queries: of all heads, and of the heads with given skills."""
    next_row = f"""SELECT {_BUCKET} AS bucket, {_GROUP} AS key, required_skills, {_ORDER}
        FROM {tasks} WHERE {IS_READY}"""
    best = f"ORDER BY {_BUCKET}, {_GROUP}, {_ORDER} LIMIT 1"
    every = f"""
        WITH RECURSIVE heads AS (
            ({next_row} {best})
            UNION ALL
            SELECT next.* FROM heads, LATERAL (
                {next_row} AND ({_BUCKET}, {_GROUP}) > (heads.bucket, heads.key) {best}
            ) AS next
        )
        SELECT required_skills::text, {_ORDER} FROM heads LIMIT $1"""
    some = f"""
        WITH RECURSIVE heads AS (
            SELECT next.* FROM (
                SELECT DISTINCT hashtextextended(skill, 0) AS bucket
                FROM unnest($1::text[]) AS skill
            ) AS buckets, LATERAL ({next_row} AND {_BUCKET} = buckets.bucket {best}) AS next
            UNION ALL
            SELECT next.* FROM heads, LATERAL (
                {next_row} AND {_BUCKET} = heads.bucket AND {_GROUP} > heads.key {best}
            ) AS next
        )
        SELECT required_skills::text, {_ORDER} FROM heads LIMIT $2"""
    return every, some


def _postgresql_ranges(skills: frozenset[str] | None) -> Sequence[Any]:
    return () if skills is None else (["", *skills],)
