"""Read what a cache needs: the initial state, and batches of later changes.

Each read is one snapshot, in one session.
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
    """The counters, and the decoders of rows."""

    revision: int
    beat: int
    """The newest heartbeat sequence."""
    updated_at: datetime | None
    """The time of the newest change."""
    task_counts: Mapping[str, int]
    """Tasks by status, finished ones included."""
    decode: Mapping[type[Any], Decode]
    """Decoders of rows, by kind."""


@dataclass(frozen=True, slots=True)
class InitialRows:
    """A batch of the rows that a new cache loads."""

    kind: type[Any]
    rows: Sequence[Raw]
    """Rows that begin with their identifier; not decoded yet."""
    keys: Sequence[PendingKey] = ()
    """Keys of pending and scheduled tasks, in order."""
    ready: Sequence[Ready] = ()
    """Entries of `ReadyTasks`, in order."""
    assigned: Sequence[tuple[str | None, str]] = ()
    """Node and identifier of scheduled and running tasks."""


@dataclass(frozen=True, slots=True)
class ChangeBatch:
    """Changes after a revision, with the entities that they changed."""

    revision: int
    """The batch has the changes up to this revision."""
    read_at: int
    """The revision of the snapshot that the content is from; if it is larger, batches follow."""
    beat: int
    """The heartbeat sequence of the snapshot."""
    changes: Sequence[Sequence[Any]]
    """The rows of a `LogPage`."""
    changed_at: datetime | None
    """The time of the last change, if there are any."""
    is_complete: bool
    """True if clean-up has removed no change of this batch and the ones before it."""
    nodes: Mapping[str, Record[NodeInfo]]
    """The nodes that changed, without removed ones."""
    heartbeats: Sequence[Record[NodeInfo]]
    """Nodes with later heartbeats."""
    task_counts: Mapping[str, int] | None
    """Tasks by status, if the changes are not complete."""
    ready: Callable[[Raw], Ready | None]
    """Makes the entry of `ReadyTasks` from a row; `None` if the task is not pending."""
    is_compacted: bool = False
    """True if compaction has removed changes of this batch, which is useless then."""


async def read_initial_state(session: AsyncSession) -> InitialState:
    """Return the initial state in the snapshot of `session`."""
    revision, beat, _ = await read_counters(session)
    newest = select(ChangeRow.changed_at).order_by(ChangeRow.revision.desc()).limit(1)
    updated_at, counts = await session.scalar(newest), await _task_counts(session)
    decode = statements_for(session.get_bind().dialect.name).decode
    return InitialState(revision, beat, updated_at, counts, decode)


async def read_live(session: AsyncSession) -> AsyncIterator[InitialRows]:
    """Yield all nodes and all live tasks; pending and scheduled ones in the order of their keys."""
    running = select(*COLUMNS[Task]).where(TaskRow.status == TaskStatus.RUNNING)
    live: Sequence[tuple[type[Any], Select[Any]]] = (
        (NodeInfo, select(*COLUMNS[NodeInfo])),
        (Task, running.order_by(TaskRow.submitted_at)),  # otherwise SQLite may scan all tasks
    )
    for kind, query in live:
        async for rows in read_rows(session, query):
            yield InitialRows(kind, rows, assigned=_assigned(rows) if kind is Task else ())
    moment = statements_for(session.get_bind().dialect.name).from_moment
    async for rows in read_rows(session, select_pending()):
        keys = [(row[_PRIORITY], moment(row[_SUBMITTED_AT]), row[0]) for row in rows]
        # The key is one tuple for both indexes: there may be a million of them.
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
    """Return a batch of the changes after `since`, and the nodes with heartbeats after `beat`.

    Args:
        is_complete: True if the batches before this one were complete.
        known: Revisions of changes to leave out.
    """
    page = await read_page(session, since, since + CHANGE_BATCH_SIZE, known)
    sql = statements_for(session.get_bind().dialect.name)
    nodes: Mapping[str, Record[NodeInfo]] = {}
    if ids := {row[ITEM_ID] for row in page.rows if row[OF_ITEM] == ENTITY_NAMES[NodeInfo]}:
        query = sql.by_ids(NodeInfo, COLUMNS[NodeInfo], sql.given([*ids]))
        found = await read_records(session, NodeInfo, query)
        nodes = {record.node_id: record for record in found}
    # Heartbeats are not in the change log: they only raise the sequence of their node.
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
        except (TypeError, OverflowError):  # the decoder will report the value
            return None

    return ready


async def _task_counts(session: AsyncSession) -> dict[str, int]:
    counts = select(TaskRow.status, func.count()).group_by(TaskRow.status)
    return {status.value: count for status, count in await session.execute(counts)}
