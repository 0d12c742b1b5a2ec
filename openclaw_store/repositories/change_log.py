"""Read the change log: all changes after a revision, or the history of one task or node."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from sqlalchemy import select
from sqlalchemy.ext.asyncio import AsyncSession

from openclaw_store.database import ROWS, ChangeRow, CounterRow, history_of
from openclaw_store.domain import ENTITY_NAMES, KEY, Change, ChangeKind, Task
from openclaw_store.errors import CompactedError, InvalidDataError
from openclaw_store.repositories.unit_of_work import counters_of

_ALL = select(*ChangeRow.__table__.c)


CHANGE_BATCH_SIZE = 400
"""Changes read at a stretch, before other coroutines run.

To read a page takes as long as to take over 100 of them, however few there are.
"""


async def read_changes(session: AsyncSession, since: int) -> tuple[Sequence[Change], int]:
    """Up to a page of the changes after a revision, and the revision they reach up to.

    Changes of tasks that clean-up has removed are gone with them.

    Raises:
        CompactedError: If the feed does not reach back that far any more.
        InvalidDataError: If there was no such revision yet.
    """
    read_at, _, compacted = await read_counters(session)
    if since > read_at:
        raise InvalidDataError("since", f"must be at most {read_at}, the newest revision")
    if since < compacted:
        raise CompactedError(since, compacted + 1)
    changes = await _changes(session, since)
    return changes, changes[-1].revision if len(changes) == CHANGE_BATCH_SIZE else read_at


async def read_history(session: AsyncSession, id: str, kind: type[Any] = Task) -> list[Change]:
    """The changes of a task or node that the feed still has, oldest first.

    Its version leads to its last change, and each change to the one before; only for one that was
    removed all changes are searched.
    """
    columns = ROWS[kind].__table__.c
    version = await session.scalar(select(columns.version).where(columns[KEY[kind]] == id))
    if version is None:
        query = _ALL.where(ChangeRow.item == ENTITY_NAMES[kind], ChangeRow.item_id == id)
        return _as_changes(await session.execute(query.order_by(ChangeRow.revision)))
    query = history_of(version, ENTITY_NAMES[kind], id)
    return _as_changes(await session.execute(query))[::-1]


async def _changes(session: AsyncSession, since: int) -> list[Change]:
    query = _ALL.where(ChangeRow.revision > since).order_by(ChangeRow.revision)
    return _as_changes(await session.execute(query.limit(CHANGE_BATCH_SIZE)))


def _as_changes(rows: Iterable[Any]) -> list[Change]:
    return [
        Change(number, at, item, id, ChangeKind(kind), *rest)
        for number, at, item, id, kind, *rest in rows
    ]


async def read_counters(session: AsyncSession) -> tuple[int, int, int]:
    """Return the newest revision, the newest heartbeat sequence and the compacted revision."""
    counters = select(CounterRow.revision, CounterRow.beat, CounterRow.compacted)
    found = (await session.execute(counters)).all()
    return *counters_of(found), found[0].compacted
