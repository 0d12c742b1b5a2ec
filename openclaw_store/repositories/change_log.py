"""Read the change log: all changes after a revision, or the history of one task or node."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from sqlalchemy import Text, case, func, select, type_coerce
from sqlalchemy.ext.asyncio import AsyncSession

from openclaw_store.database import (
    REASON,
    ROWS,
    ChangeRow,
    CounterRow,
    PastChangeRow,
    history_of,
    statements_in,
)
from openclaw_store.domain import ENTITY_NAMES, KEY, Change, ChangeKind, Task
from openclaw_store.errors import CompactedError, InvalidDataError, SealedValueError, logger_of
from openclaw_store.repositories.unit_of_work import counters_of

logger = logger_of("repositories")

# Without the type, which would return sealed reasons as objects for callers.
_COLUMNS, _PAST = (
    [
        type_coerce(row.__table__.c[one.name], Text).label(one.name)
        if one.name == REASON.column
        else row.__table__.c[one.name]
        for one in ChangeRow.__table__.c
    ]
    for row in (ChangeRow, PastChangeRow)
)
_REASON = [one.name for one in _COLUMNS].index(REASON.column)
_ALL = select(*_COLUMNS)

CHANGE_BATCH_SIZE = 400
"""Changes in a batch, read before other coroutines run.

The fixed cost of a batch equals the cost of applying 100 changes.
"""

PAGE_BYTES = 8 << 20
"""Bytes of JSON and text in a batch; the change that exceeds them is the last one."""


async def read_changes(session: AsyncSession, since: int) -> tuple[Sequence[Change], int]:
    """Return a batch of the changes after a revision, and the revision at its end.

    Clean-up removes the changes of a task together with the task. A sealed reason that cannot be
    opened is `None`, and an error in the log.

    Raises:
        CompactedError: If changes after `since` were removed by compaction.
        InvalidDataError: If `since` is newer than the newest revision.
    """
    read_at, _, compacted = await read_counters(session)
    if since > read_at:
        raise InvalidDataError("since", f"must be at most {read_at}, the newest revision")
    if since < compacted:
        raise CompactedError(since, compacted + 1)
    length = func.coalesce(func.length(ChangeRow.reason), 0)
    is_short = length <= PAGE_BYTES // CHANGE_BATCH_SIZE
    columns: list[Any] = _COLUMNS.copy()
    columns[_REASON] = case((is_short, columns[_REASON]))
    query = select(*columns, length, is_short).where(ChangeRow.revision > since)
    rows = await session.execute(query.order_by(ChangeRow.revision).limit(CHANGE_BATCH_SIZE))
    changes: list[Change] = []
    size = 0
    for *row, length_here, is_short_here in rows:
        [change] = _as_changes(session, [row], is_tolerant=True)
        if not is_short_here:
            reason = select(_COLUMNS[_REASON]).where(ChangeRow.revision == change.revision)
            row[_REASON] = await session.scalar(reason)
            [change] = _as_changes(session, [row], is_tolerant=True)
            size += length_here
        changes.append(change)
        if size > PAGE_BYTES:
            break
    is_last = len(changes) < CHANGE_BATCH_SIZE and size <= PAGE_BYTES
    return changes, read_at if is_last else changes[-1].revision


async def read_newest_changes(session: AsyncSession, before: int, count: int) -> list[Change]:
    """Return the changes before a revision, newest first; reasons as `read_changes` does."""
    query = _ALL.where(ChangeRow.revision < before).order_by(ChangeRow.revision.desc())
    return _as_changes(session, await session.execute(query.limit(count)), is_tolerant=True)


async def read_history(session: AsyncSession, id: str, kind: type[Any] = Task) -> list[Change]:
    """Return the changes of a task or node, oldest first, also from before a restore."""
    past: list[Change] = []
    if kind is Task:
        rows = select(*_PAST).where(PastChangeRow.item_id == id).order_by(PastChangeRow.revision)
        past = _as_changes(session, await session.execute(rows))
    # The version of a row is its last change, and each change names the one before. Only for a
    # removed row all changes are searched.
    fields = ROWS[kind].__table__.c
    version = await session.scalar(select(fields.version).where(fields[KEY[kind]] == id))
    if version is None:
        query = _ALL.where(ChangeRow.item == ENTITY_NAMES[kind], ChangeRow.item_id == id)
        return past + _as_changes(
            session, await session.execute(query.order_by(ChangeRow.revision))
        )
    query = history_of(version, ENTITY_NAMES[kind], id)
    return past + _as_changes(session, await session.execute(query))[::-1]


def _as_changes(
    session: AsyncSession, rows: Iterable[Any], *, is_tolerant: bool = False
) -> list[Change]:
    sql = statements_in(session)

    def read(item: str, id: str, stored: str | None) -> str | None:
        try:
            return sql.read_reason(item, id, stored)
        except SealedValueError as error:
            if not is_tolerant:
                raise
            logger.error("a change has no reason here: %s", error)
            return None

    return [
        Change(revision, at, name, id, ChangeKind(kind), was, now, node, read(name, id, why), prior)
        for revision, at, name, id, kind, was, now, node, why, prior in rows
    ]


async def read_counters(session: AsyncSession) -> tuple[int, int, int]:
    """Return the newest revision, the newest heartbeat sequence and the compacted revision."""
    counters = select(CounterRow.revision, CounterRow.heartbeats, CounterRow.compacted)
    found = (await session.execute(counters)).all()
    return *counters_of(found), found[0].compacted
