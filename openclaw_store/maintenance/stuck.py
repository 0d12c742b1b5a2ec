"""Stuck tasks: tasks that do not advance, in groups of one reason, found within bounds.

Tasks of nodes are few, since nodes have slots: all are read, up to a limit. Waiting tasks may be
many: they are looked up in indexes, by the skills that they require.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from enum import StrEnum
from typing import Any

from sqlalchemy import (
    ColumnElement,
    Connection,
    Select,
    Text,
    and_,
    func,
    literal,
    select,
    tuple_,
    type_coerce,
)

from openclaw_store.database import (
    IS_DELAYED,
    IS_EXPIRING,
    IS_READY,
    SKILL_GROUPS,
    NodeRow,
    TaskRow,
)
from openclaw_store.domain import ALIVE, ASSIGNED, conditions

EXAMPLES = 3
"""Identifiers that a group lists."""

PATIENCE = timedelta(seconds=120)
"""Silence after which a node without a lease of its own counts as dead."""

UNSTARTED = timedelta(seconds=60)
"""Time after which a claimed task should have started."""

MOST_GROUPS = 500
"""Combinations of required skills that are looked at."""


_NODES: Select[Any] = select(NodeRow.node_id, NodeRow.status, NodeRow.lease_seconds).add_columns(
    NodeRow.last_heartbeat, NodeRow.registered_at
)
_HELD: Select[Any] = (
    select(TaskRow.task_id, TaskRow.status, TaskRow.assigned_node, TaskRow.scheduled_at)
    .add_columns(TaskRow.started_at, TaskRow.timeout, TaskRow.updated_at)
    .order_by(TaskRow.submitted_at)
)


class Reason(StrEnum):
    """The reason for which a task does not advance."""

    NODE_LOST = "node lost"
    """Its node is silent, offline, or removed; `recover` releases it."""
    NOT_STARTED = "not started"
    """Its node has claimed it, and does not start it."""
    OVERDUE = "overdue"
    """It runs for longer than its timeout; `recover` ends it."""
    NO_SKILL = "no node has the skills"
    """It requires skills that no node has together."""
    NO_LIVE_NODE = "no live node has the skills"
    """The nodes with its skills are offline, in maintenance or silent."""
    EXPIRED = "expired"
    """It was not started in time; `recover` ends it."""


@dataclass(frozen=True)
class StuckGroup:
    """Tasks that do not advance for one reason."""

    reason: Reason
    subject: str
    """A node, or the required skills; empty for expired tasks."""
    count: int
    is_complete: bool
    """False if there are more than `count` tasks."""
    since: datetime
    """The time from which the first of them waits."""
    examples: Sequence[str]
    """Identifiers of tasks, first ones first."""


def find_stuck(
    connection: Connection, now: datetime, *, most: int = 5000, unstarted: timedelta = UNSTARTED
) -> list[StuckGroup]:
    """Return the groups of tasks that do not advance, largest first.

    Args:
        most: Maximum number of tasks that are read or counted for a reason.
        unstarted: Time after which a claimed task should have started.
    """
    skills = type_coerce(NodeRow.available_skills, Text).label("available_skills")
    nodes = {node.node_id: node for node in connection.execute(_NODES.add_columns(skills))}
    groups = [
        *_held(connection, nodes, now, most, unstarted),
        *_waiting(connection, nodes, now, most),
        *_expired(connection, now, most),
    ]
    return sorted(groups, key=lambda group: (-group.count, group.reason, group.subject))


def _held(
    connection: Connection, nodes: Mapping[str, Any], now: datetime, most: int, limit: timedelta
) -> Iterator[StuckGroup]:
    """Yield the groups of tasks that a node holds."""
    found: defaultdict[tuple[Reason, str], list[Any]] = defaultdict(list)
    is_complete = True
    lost: dict[str, bool] = {}
    for status in sorted(ASSIGNED):
        query = _HELD.where(TaskRow.status == status).limit(most + 1)
        tasks: Sequence[Any] = connection.execute(query).all()
        is_complete = is_complete and len(tasks) <= most
        for task in tasks[:most]:
            node = task.assigned_node or ""
            if node not in lost:
                lost[node] = conditions.is_lost(nodes.get(node), now, PATIENCE)
            if lost[node]:
                found[Reason.NODE_LOST, node].append(task)
            elif conditions.is_unstarted(task, now, limit):
                found[Reason.NOT_STARTED, node].append(task)
            elif conditions.is_overdue(task, now):
                found[Reason.OVERDUE, node].append(task)
    for (reason, subject), members in found.items():
        examples = [task.task_id for task in members[:EXAMPLES]]
        since = min(task.started_at or task.scheduled_at or task.updated_at for task in members)
        yield StuckGroup(reason, subject, len(members), is_complete, since, examples)


def find_held(
    connection: Connection, now: datetime, *, unstarted: timedelta = UNSTARTED
) -> list[str]:
    """Return the identifiers of all tasks that lost nodes hold, or that are not started."""
    nodes: Mapping[str, Any] = {node.node_id: node for node in connection.execute(_NODES)}
    held = _HELD.where(TaskRow.status.in_(sorted(ASSIGNED)))
    tasks: Sequence[Any] = connection.execute(held).all()
    return [
        one.task_id
        for one in tasks
        if conditions.is_lost(nodes.get(one.assigned_node or ""), now, PATIENCE)
        or conditions.is_unstarted(one, now, unstarted)
    ]


def _waiting(
    connection: Connection, nodes: Mapping[str, Any], now: datetime, most: int
) -> Iterator[StuckGroup]:
    """Yield groups of pending tasks that require skills of no node, or of no live node."""
    present = {node: one.available_skills for node, one in nodes.items()}
    everywhere = set(present.values())
    alive = {
        present[node]
        for node, one in nodes.items()
        if one.status in ALIVE and not conditions.is_silent(one, now, PATIENCE)
    }

    def reason_of(required: str | None) -> Reason | None:
        if not any(conditions.are_among(required, skills) for skills in everywhere):
            return Reason.NO_SKILL
        if not any(conditions.are_among(required, skills) for skills in alive):
            return Reason.NO_LIVE_NODE
        return None

    delayed = _delayed(connection, most)
    for condition, required in _skill_groups(connection):
        retries = delayed.pop(required, [])
        reason = reason_of(required)
        if reason is not None:
            yield _group(connection, reason, _named(required), condition, most, retries)
    for required, retries in delayed.items():
        reason = reason_of(required)
        if reason is not None:
            yield _group(connection, reason, _named(required), None, most, retries)


def _skill_groups(connection: Connection) -> Iterator[tuple[ColumnElement[bool], str | None]]:
    """Yield the condition and the required skills of each group of ready tasks.

    An index has the groups in order: the first task of the next one is found at once.
    """
    keys = SKILL_GROUPS[connection.dialect.name]
    text = type_coerce(TaskRow.required_skills, Text)
    query = select(*keys, text).where(IS_READY).order_by(*keys, *_PLACE).limit(1)
    query = query.with_hint(TaskRow.__table__, "INDEXED BY ix_tasks_ready", "sqlite")
    row = connection.execute(query).first()
    for _ in range(MOST_GROUPS):
        if row is None:
            return
        *last, required = row
        yield and_(*(key == value for key, value in zip(keys, last, strict=True))), required
        later = tuple_(*keys) > tuple_(*map(literal, last, [key.type for key in keys]))
        if last == [None]:
            later = keys[0].is_not(None)
        row = connection.execute(query.where(later)).first()


_PLACE = TaskRow.priority, TaskRow.submitted_at, TaskRow.task_id
"""The order of tasks in a group."""


def _delayed(connection: Connection, most: int) -> dict[str | None, list[Any]]:
    """Return the first delayed tasks, by the text of their required skills."""
    found: defaultdict[str | None, list[Any]] = defaultdict(list)
    text = type_coerce(TaskRow.required_skills, Text)
    query = select(TaskRow.task_id, TaskRow.submitted_at, text).where(IS_DELAYED)
    query = query.with_hint(TaskRow.__table__, "INDEXED BY ix_tasks_delayed", "sqlite")
    for task in connection.execute(query.order_by(TaskRow.not_before).limit(most)):
        found[task[-1]].append(task)
    return dict(found)


def _group(
    connection: Connection,
    reason: Reason,
    subject: str,
    condition: ColumnElement[bool] | None,
    most: int,
    retries: Sequence[Any],
) -> StuckGroup:
    """Make the group of pending tasks that require the same skills."""
    first: Sequence[Any] = []
    count = 0
    if condition is not None:
        query = select(TaskRow.task_id, TaskRow.submitted_at).where(IS_READY, condition)
        query = query.with_hint(TaskRow.__table__, "INDEXED BY ix_tasks_ready", "sqlite")
        first = connection.execute(query.order_by(*_PLACE).limit(EXAMPLES)).all()
        some = query.limit(most + 1).subquery()
        count = connection.execute(select(func.count()).select_from(some)).scalar_one()
    known = [*first, *retries[:EXAMPLES]]
    return StuckGroup(
        reason,
        subject,
        min(most, count) + len(retries),
        count <= most and len(retries) < most,
        min(task.submitted_at for task in known),
        [task.task_id for task in known[:EXAMPLES]],
    )


def _expired(connection: Connection, now: datetime, most: int) -> Iterator[StuckGroup]:
    """Yield the group of tasks that expired before they were started."""
    row = TaskRow
    query = select(row.task_id, row.expires_at).where(IS_EXPIRING, row.expires_at <= now)
    query = query.with_hint(TaskRow.__table__, "INDEXED BY ix_tasks_expiring", "sqlite")
    tasks: Sequence[Any] = connection.execute(query.order_by(row.expires_at).limit(most + 1)).all()
    if tasks:
        examples = [task.task_id for task in tasks[:EXAMPLES]]
        count, since = min(most, len(tasks)), tasks[0].expires_at
        yield StuckGroup(Reason.EXPIRED, "", count, len(tasks) <= most, since, examples)


def _named(required: str | None) -> str:
    """Return skills as one text; JSON that is no list of skills as it is."""
    skills = conditions.skill_set(required)
    return ", ".join(sorted(skills)) if skills is not None else required or ""
