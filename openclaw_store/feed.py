"""What the database tells a cache: where it stands, and what has happened since.

Each reading is one consistent picture, made in one session.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from sqlalchemy import Select, func, select
from sqlalchemy.ext.asyncio import AsyncSession

from openclaw_store.changes import KINDS, Change, ChangeKind, Place, place_of
from openclaw_store.models import NodeInfo, Task, TaskStatus
from openclaw_store.records import Decode, Raw, Record
from openclaw_store.repositories import decoder_here, read_records, read_rows, select_pending
from openclaw_store.schema import (
    COLUMNS,
    FIELDS,
    ChangeRow,
    CounterRow,
    NodeRow,
    TaskRow,
)
from openclaw_store.statements import statements_for

CHANGES_A_PAGE = 200
"""Changes read at a stretch, before other coroutines run."""


@dataclass(frozen=True, slots=True)
class Start:
    """Where the database stands."""

    revision: int
    beat: int
    """The newest flush of heartbeats."""
    updated_at: datetime | None
    """When the newest change was made."""
    task_counts: Mapping[str, int]
    """Tasks by status, finished ones included."""


@dataclass(frozen=True, slots=True)
class Page:
    """Some of the rows that a cache starts with."""

    kind: type[Any]
    rows: Sequence[Raw]
    """Each begins with its identifier; to be decoded when somebody looks at it."""
    decode: Decode
    keys: Sequence[tuple[int, datetime, str]]
    """Priority, time of submission and identifier of those that wait, in this order."""


@dataclass(frozen=True, slots=True)
class News:
    """What has happened since a revision."""

    revision: int
    """`changes` go up to here."""
    read_at: int
    """The revision of the picture that `records` are from; more pages follow if it is larger."""
    beat: int
    changes: Sequence[Change]
    is_whole: bool
    """Whether no change is missing; clean-up removes those of removed tasks."""
    records: Mapping[Place, Record[Any]]
    """Content of what changed; what is not there was removed."""
    beaten: Sequence[Record[NodeInfo]]
    """Nodes that had heartbeats since."""
    task_counts: Mapping[str, int] | None
    """Tasks by status, where they cannot be derived from the changes."""


async def read_start(session: AsyncSession) -> Start:
    """Where the database stands in the picture of `session`."""
    revision, beat = await _counters(session)
    newest = select(ChangeRow.changed_at).order_by(ChangeRow.revision.desc()).limit(1)
    return Start(revision, beat, await session.scalar(newest), await _task_counts(session))


async def read_live(session: AsyncSession) -> AsyncIterator[Page]:
    """All nodes and all live tasks, page by page; those that wait in the order of their list."""
    running = select(*COLUMNS[Task]).where(TaskRow.status == TaskStatus.RUNNING)
    live: Sequence[tuple[type[Any], Select[Any]]] = (
        (NodeInfo, select(*COLUMNS[NodeInfo])),
        (Task, running.order_by(TaskRow.submitted_at)),  # else SQLite may search all tasks
    )
    for kind, query in live:
        decode = decoder_here(session, kind)
        async for rows in read_rows(session, query):
            yield Page(kind, rows, decode, [])
    priority, submitted_at = map(FIELDS[Task].index, ("priority", "submitted_at"))
    moment = statements_for(session.get_bind().dialect.name).from_moment
    async for rows in read_rows(session, select_pending()):
        keys = [(row[priority], moment(row[submitted_at]), row[0]) for row in rows]
        yield Page(Task, rows, decode, keys)


async def read_news(session: AsyncSession, *, since: int, beat: int, is_whole: bool) -> News:
    """Up to a page of what has happened since the revision `since` and the flush `beat`.

    Args:
        is_whole: Whether the pages before this one were.
    """
    read_at, newest_beat = await _counters(session)
    rows = (
        await session.execute(
            select(*ChangeRow.__table__.c)
            .where(ChangeRow.revision > since)
            .order_by(ChangeRow.revision)
            .limit(CHANGES_A_PAGE)
        )
    ).all()
    changes = [
        Change(number, at, item, id, ChangeKind(kind), *rest)
        for number, at, item, id, kind, *rest in rows
    ]
    until = changes[-1].revision if len(changes) == CHANGES_A_PAGE else read_at
    records: dict[Place, Record[Any]] = {}
    sql = statements_for(session.get_bind().dialect.name)
    for item, kind in KINDS.items():
        ids = {change.item_id for change in changes if change.item == item}
        if ids:
            query = sql.by_ids(kind, COLUMNS[kind], sql.given([*ids]))
            found = await read_records(session, kind, query)
            records.update((place_of(record), record) for record in found)
    beaten: Sequence[Record[NodeInfo]] = []
    if newest_beat > beat:
        query = select(*COLUMNS[NodeInfo]).where(NodeRow.beat > beat)
        beaten = await read_records(session, NodeInfo, query)
    is_whole = is_whole and len(changes) == until - since
    counts = None if is_whole or until < read_at else await _task_counts(session)
    return News(until, read_at, newest_beat, changes, is_whole, records, beaten, counts)


async def _task_counts(session: AsyncSession) -> dict[str, int]:
    counts = select(TaskRow.status, func.count()).group_by(TaskRow.status)
    return {status.value: count for status, count in await session.execute(counts)}


async def _counters(session: AsyncSession) -> tuple[int, int]:
    row = (await session.execute(select(CounterRow.revision, CounterRow.beat))).one()
    return row.revision, row.beat
