"""Collect the rows that a policy moves, as tables of Arrow by day."""

from __future__ import annotations

import asyncio
from collections import defaultdict
from collections.abc import AsyncIterator, Sequence
from datetime import UTC, datetime
from functools import partial
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
from sqlalchemy import select
from sqlalchemy.ext.asyncio import AsyncSession
from sqlalchemy.orm import Session

from openclaw_store.archive.layout import CHANGES, MISFITS, TASKS, Layout
from openclaw_store.archive.runs import logger
from openclaw_store.database import (
    COLUMNS,
    ChangeRow,
    Database,
    TaskRow,
    to_microseconds,
)
from openclaw_store.domain import Raw, Task
from openclaw_store.repositories import (
    Policy,
    TolerantReader,
    old_revisions,
    old_rows,
    read_counters,
    read_histories,
    read_rows,
)

RUN_ROWS = 25_000
"""Rows that one run moves at most, so that it needs little memory."""

RUN_BYTES = 64 << 20
"""Bytes of rows in memory after which a run is not extended."""

PAGE_ROWS = 1000
"""Rows read together, which delays other coroutines."""

_VERSION = TASKS.names.index("version")

Page = tuple[Any, Any]
"""Rows as a table of Arrow, and the time of each in microseconds."""


async def collected(pages: AsyncIterator[Page]) -> AsyncIterator[list[Page]]:
    """Yield the pages of each run."""
    found: list[Page] = []
    rows = size = 0
    async for page in pages:
        found.append(page)
        rows, size = rows + len(page[0]), size + page[0].nbytes
        if rows >= RUN_ROWS or size >= RUN_BYTES:
            yield found
            found, rows, size = [], 0, 0
    if rows:
        yield found


def by_day(layout: Layout, pages: Sequence[Page]) -> list[tuple[str, Any]]:
    """Return the sorted rows of each day."""
    rows = pa.concat_tables([table for table, _ in pages])
    times = pa.chunked_array([part for _, times in pages for part in times.chunks], pa.int64())
    days = times.cast(pa.timestamp("us")).cast(pa.date32()).cast(pa.int32())
    numbers: dict[str, list[int]] = defaultdict(list)
    for day in pc.unique(days).to_pylist():
        numbers[_name(day)].append(day)
    return [
        (name, rows.filter(pc.is_in(days, pa.array(of, pa.int32()))).sort_by(layout.order))
        for name, of in sorted(numbers.items())
    ]


def _name(day: int) -> str:
    """Return a day, counted from 1970, as 2026-11-30."""
    try:
        return datetime.fromtimestamp(day * 86_400, UTC).date().isoformat()
    except (ValueError, OverflowError, OSError):  # of a row written by hand
        return "1970-01-01"


async def old_tasks(
    database: Database, policy: Policy, skipped: set[str], size: int
) -> AsyncIterator[Page]:
    """Yield pages of old tasks with their histories, by the time of their ends.

    Args:
        size: Rows of a page.
        skipped: Receives the identifiers of tasks that no file can hold, and that stay.
    """
    for condition in policy.old():
        pages = old_rows(database.read, policy, condition, [TaskRow.task_id], size)
        async for page in pages:
            read = partial(_read, ids=[id for (id,) in page], skipped=skipped)
            rows = await database.read(partial(AsyncSession.run_sync, fn=read))
            table = await asyncio.to_thread(_table, *rows, skipped)
            yield table, _ends(table, policy.now)


def _read(
    session: Session, ids: Sequence[str], skipped: set[str]
) -> tuple[Sequence[Raw], Sequence[Raw]]:
    """Return tasks, and their changes as rows of `past_changes`."""
    reader = TolerantReader(session)
    tasks = reader.by_ids(Task, COLUMNS[Task], ids)
    for error in reader.unreadable.values():
        logger.warning("a task stays in the database: %s", error)
    skipped.update(id for _, id in reader.unreadable)
    logged, past = read_histories(session, {row[0]: row[_VERSION] for row in tasks})
    return tasks, [*logged, *past]


def _table(tasks: Sequence[Raw], changes: Sequence[Raw], skipped: set[str]) -> Any:
    """Return the table, without tasks that have a value of another type than its column."""
    try:
        return TASKS.table(tasks, changes)
    except MISFITS as error:
        if len(tasks) > 1:
            parts = (([one], [two for two in changes if two[0] == one[0]]) for one in tasks)
            return pa.concat_tables([_table(*part, skipped) for part in parts])
        logger.warning("task %r stays in the database: %s", tasks[0][0], error)
        skipped.add(tasks[0][0])
        return TASKS.table([])


def _ends(tasks: Any, now: datetime) -> Any:
    """Return the time of each end, or of the last change if the end is unknown."""
    ends, changes = (tasks[name].cast(pa.int64()) for name in ("completed_at", "updated_at"))
    is_known = pc.fill_null(pc.less_equal(ends, to_microseconds(now)), False)
    return pc.if_else(is_known, ends, changes)


async def old_changes(database: Database, now: datetime, cutoff: datetime) -> AsyncIterator[Page]:
    """Yield pages of the changes before a cutoff."""
    since = 0
    newest, _, _ = await database.read(read_counters)
    async for end in old_revisions(database, now, cutoff):
        until = min(end, newest - 1)  # the newest change stays in the feed
        query = select(*ChangeRow.__table__.c).order_by(ChangeRow.revision)
        query = query.where(ChangeRow.revision > since, ChangeRow.revision <= until)
        table = CHANGES.table(await database.read(partial(_all_rows, query=query)))
        yield table, table["changed_at"].cast(pa.int64())
        since = until


async def _all_rows(session: AsyncSession, query: Any) -> list[Raw]:
    return [row async for rows in read_rows(session, query, None) for row in rows]


async def sample(database: Database, policy: Policy, size: int) -> tuple[int, int, int]:
    """Return the numbers of some tasks and of their changes, and the bytes of their files."""
    pages: list[Page] = []
    async for page in old_tasks(database, policy, set(), PAGE_ROWS):
        pages.append(page)
        if len(pages) * PAGE_ROWS >= size:
            break
    tables = [table for _, table in by_day(TASKS, pages)] if pages else []
    changes = sum(pc.sum(pc.list_value_length(one["history"])).as_py() or 0 for one in tables)
    return sum(map(len, tables)), changes, sum(len(TASKS.encode(table)) for table in tables)
