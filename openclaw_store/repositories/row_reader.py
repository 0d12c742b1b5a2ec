"""How rows are read: page by page, as the driver gives them, or a few as records."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from typing import Any

from sqlalchemy import CursorResult, Select, select
from sqlalchemy.ext.asyncio import AsyncSession
from sqlalchemy.orm import Session

from openclaw_store.database import COLUMNS, IS_PENDING, TaskRow, decoder_of
from openclaw_store.domain import Decode, Raw, Record, Task, TaskPriority

FETCH_SIZE = 250
"""Rows read at a stretch, before other coroutines run."""


def select_pending() -> Select[Any]:
    """Pending and scheduled tasks by priority, then time of submission, then identifier."""
    # The term on the priority is true of every row, but it makes SQLite read this index, in order.
    # Without it, it may read all waiting tasks through the index on the status, and sort them.
    any_priority = TaskRow.priority.in_(TaskPriority)
    order = (TaskRow.priority, TaskRow.submitted_at, TaskRow.task_id)
    return select(*COLUMNS[Task]).where(IS_PENDING, any_priority).order_by(*order)


async def read_rows(
    session: AsyncSession, query: Select[Any], size: int | None = FETCH_SIZE
) -> AsyncIterator[Sequence[Raw]]:
    """Rows as the driver gives them: SQLAlchemy's own take longer to make than these to read.

    Args:
        size: Rows a page; `None` gives all at once, which is faster for few.
    """

    def execute(session: Session) -> CursorResult[Any]:
        options = {"stream_results": size is not None}
        return session.connection().execute(query, execution_options=options)

    def fetch(_: Session) -> Sequence[Raw]:
        cursor, strategy = result.cursor, result.cursor_strategy
        rows: Sequence[Raw] = (
            strategy.fetchall(result, cursor)
            if size is None
            else strategy.fetchmany(result, cursor, size)
        )
        # PostgreSQL's driver has a kind of row of its own.
        return rows if not rows or type(rows[0]) is tuple else [tuple(row) for row in rows]

    result = await session.run_sync(execute)
    while rows := await session.run_sync(fetch):
        yield rows


async def read_records(
    session: AsyncSession, kind: type[Any], query: Select[Any]
) -> list[Record[Any]]:
    """The records that a query of `COLUMNS` finds, which are few; a row of NULLs is none."""
    decode = decoder_here(session, kind)
    return [
        decode(row)
        async for rows in read_rows(session, query, None)
        for row in rows
        if row[0] is not None
    ]


def decoder_here(session: AsyncSession, kind: type[Any]) -> Decode:
    """What makes records of the rows of `read_rows`."""
    return decoder_of(kind, session.get_bind().dialect)  # type: ignore[arg-type]  # it is hashable
