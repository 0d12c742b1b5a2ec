"""What the database tells a cache: where it stands, and what has happened since.

Each reading is one consistent snapshot, made in one session.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from functools import lru_cache
from typing import Any

from sqlalchemy import Select, func, select
from sqlalchemy.ext.asyncio import AsyncSession

from openclaw_store.database import COLUMNS, FIELDS, ChangeRow, NodeRow, TaskRow, statements_for
from openclaw_store.domain import ENTITY_NAMES, Decode, NodeInfo, Raw, Record, Task, TaskStatus
from openclaw_store.repositories import (
    CHANGE_BATCH_SIZE,
    read_counters,
    read_records,
    read_rows,
    select_pending,
)
from openclaw_store.state_manager.indexes import PendingKey
from openclaw_store.state_manager.pages import CHANGED_AT, ITEM_ID, OF_ITEM, read_page
from openclaw_store.state_manager.ready_queue import Ready

_PRIORITY, _SUBMITTED_AT, _SKILLS, _NOT_BEFORE, _STATUS, _NODE = map(
    FIELDS[Task].index,
    ("priority", "submitted_at", "required_skills", "not_before", "status", "assigned_node"),
)


_PENDING = TaskStatus.PENDING.value


@dataclass(frozen=True, slots=True)
class InitialState:
    """Where the database stands, and how its rows are read."""

    revision: int
    beat: int
    """The newest flush of heartbeats."""
    updated_at: datetime | None
    """When the newest change was made."""
    task_counts: Mapping[str, int]
    """Tasks by status, finished ones included."""
    decode: Mapping[type[Any], Decode]
    """Makes a record of a row."""


@dataclass(frozen=True, slots=True)
class InitialRows:
    """Some of the rows that a cache starts with."""

    kind: type[Any]
    rows: Sequence[Raw]
    """Each begins with its identifier; to be decoded when somebody looks at it."""
    keys: Sequence[PendingKey] = ()
    """Of the tasks that wait, in this order."""
    ready: Sequence[Ready] = ()
    """Of those that may be claimed."""
    assigned: Sequence[tuple[str | None, str]] = ()
    """Node and identifier of those that are scheduled or running."""


@dataclass(frozen=True, slots=True)
class ChangeBatch:
    """What has happened since a revision."""

    revision: int
    """`changes` go up to here."""
    read_at: int
    """The revision of the picture that content is from; more pages follow if it is larger."""
    beat: int
    changes: Sequence[Sequence[Any]]
    """Those that were not known before, and perhaps some that were: each is a `STEP`.

    Behind it, the last one of a task has its content, if it was not removed; else there is `None`.
    """
    changed_at: datetime | None
    """When the last of them was made, if there are any."""
    is_complete: bool
    """Whether no change is missing; clean-up removes those of removed tasks."""
    nodes: Mapping[str, Record[NodeInfo]]
    """Content of the nodes that changed; what is not there was removed."""
    heartbeats: Sequence[Record[NodeInfo]]
    """Nodes that had heartbeats since."""
    task_counts: Mapping[str, int] | None
    """Tasks by status, where they cannot be derived from the changes."""
    ready: Callable[[Raw], Ready | None]
    """How `ReadyTasks` knows a task; `None` if it may not be claimed."""
    is_compacted: bool = False
    """Whether the feed does not reach back that far any more, so that nothing else counts."""


async def read_initial_state(session: AsyncSession) -> InitialState:
    """Where the database stands in the picture of `session`."""
    revision, beat, _ = await read_counters(session)
    newest = select(ChangeRow.changed_at).order_by(ChangeRow.revision.desc()).limit(1)
    updated_at, counts = await session.scalar(newest), await _task_counts(session)
    decode = statements_for(session.get_bind().dialect.name).decode
    return InitialState(revision, beat, updated_at, counts, decode)


async def read_live(session: AsyncSession) -> AsyncIterator[InitialRows]:
    """All nodes and all live tasks, page by page; those that wait in the order of their list."""
    running = select(*COLUMNS[Task]).where(TaskRow.status == TaskStatus.RUNNING)
    live: Sequence[tuple[type[Any], Select[Any]]] = (
        (NodeInfo, select(*COLUMNS[NodeInfo])),
        (Task, running.order_by(TaskRow.submitted_at)),  # else SQLite may search all tasks
    )
    for kind, query in live:
        async for rows in read_rows(session, query):
            yield InitialRows(kind, rows, assigned=_assigned(rows) if kind is Task else ())
    moment = statements_for(session.get_bind().dialect.name).from_moment
    async for rows in read_rows(session, select_pending()):
        keys = [(row[_PRIORITY], moment(row[_SUBMITTED_AT]), row[0]) for row in rows]
        ready = [
            (key, row[_SKILLS] and row[_SKILLS].encode(), moment(row[_NOT_BEFORE]))
            for key, row in zip(keys, rows, strict=True)
            if row[_STATUS] == TaskStatus.PENDING
        ]
        yield InitialRows(Task, rows, keys, ready, _assigned(rows))


def _assigned(rows: Sequence[Raw]) -> list[tuple[str | None, str]]:
    return [(row[_NODE], row[0]) for row in rows if row[_STATUS] != TaskStatus.PENDING]


async def read_change_batch(
    session: AsyncSession,
    *,
    since: int,
    beat: int,
    is_complete: bool,
    known: Collection[int] = (),
) -> ChangeBatch:
    """A page of what has happened since the revision `since` and the flush `beat`.

    Args:
        is_complete: Whether the pages before this one were.
        known: Revisions of changes that need not be told.
    """
    page = await read_page(session, since, since + CHANGE_BATCH_SIZE, known)
    sql = statements_for(session.get_bind().dialect.name)
    nodes: Mapping[str, Record[NodeInfo]] = {}
    if ids := {row[ITEM_ID] for row in page.rows if row[OF_ITEM] == ENTITY_NAMES[NodeInfo]}:
        query = sql.by_ids(NodeInfo, COLUMNS[NodeInfo], sql.given([*ids]))
        found = await read_records(session, NodeInfo, query)
        nodes = {record.node_id: record for record in found}
    heartbeats: Sequence[Record[NodeInfo]] = []
    if page.beat > beat:
        query = select(*COLUMNS[NodeInfo]).where(NodeRow.beat > beat)
        heartbeats = await read_records(session, NodeInfo, query)
    is_complete = is_complete and page.is_complete
    return ChangeBatch(
        revision=page.until,
        read_at=page.revision,
        beat=page.beat,
        changes=page.rows,
        changed_at=sql.from_moment(page.rows[-1][CHANGED_AT]) if page.rows else None,
        is_complete=is_complete,
        nodes=nodes,
        heartbeats=heartbeats,
        task_counts=None
        if is_complete or page.until < page.revision
        else await _task_counts(session),
        ready=_ready_of(sql.from_moment),
        is_compacted=since < page.compacted,
    )


@lru_cache
def _ready_of(moment: Callable[[Any], datetime]) -> Callable[[Raw], Ready | None]:
    def ready(row: Raw) -> Ready | None:
        if row[_STATUS] != _PENDING:
            return None
        skills, not_before = row[_SKILLS], row[_NOT_BEFORE]
        try:
            return (
                (row[_PRIORITY], moment(row[_SUBMITTED_AT]), row[0]),
                skills and skills.encode(),
                None if not_before is None else moment(not_before),
            )
        except (TypeError, OverflowError):  # who decodes it will say what cannot be read
            return None

    return ready


async def _task_counts(session: AsyncSession) -> dict[str, int]:
    counts = select(TaskRow.status, func.count()).group_by(TaskRow.status)
    return {status.value: count for status, count in await session.execute(counts)}
