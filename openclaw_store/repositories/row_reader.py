"""Read rows: in batches as the driver gives them, or a few as records."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from typing import Any

from sqlalchemy import CursorResult, Select, select
from sqlalchemy.ext.asyncio import AsyncSession
from sqlalchemy.orm import Session

from openclaw_store.backends import fetch_raw_rows
from openclaw_store.database import COLUMNS, IS_PENDING, TaskRow, decoder_of
from openclaw_store.domain import Decode, Raw, Record, Task, TaskPriority

FETCH_SIZE = 250
"""Rows read before other coroutines run."""


def select_pending() -> Select[Any]:
    """Select pending and scheduled tasks by priority, time of submission and identifier."""
    # The condition on the priority is true for every row, but SQLite needs it to read this index
    # in order. Without it, SQLite may read all waiting tasks by their status, and sort them.
    any_priority = TaskRow.priority.in_(TaskPriority)
    order = (TaskRow.priority, TaskRow.submitted_at, TaskRow.task_id)
    return select(*COLUMNS[Task]).where(IS_PENDING, any_priority).order_by(*order)


async def read_rows(
    session: AsyncSession, query: Select[Any], size: int | None = FETCH_SIZE
) -> AsyncIterator[Sequence[Raw]]:
    """Yield batches of rows as the driver gives them, as tuples.

    SQLAlchemy's rows take longer to make than these take to read.

    Args:
        size: Rows in a batch; `None` yields all at once, which is faster for a few.
    """

    def execute(session: Session) -> CursorResult[Any]:
        options = {"stream_results": size is not None}
        return session.connection().execute(query, execution_options=options)

    def fetch(_: Session) -> Sequence[Raw]:
        rows: Sequence[Raw] = fetch_raw_rows(result, size)
        # PostgreSQL's driver has its own type of row.
        return rows if not rows or type(rows[0]) is tuple else [tuple(row) for row in rows]

    result = await session.run_sync(execute)
    while rows := await session.run_sync(fetch):
        yield rows


async def read_records(
    session: AsyncSession, kind: type[Any], query: Select[Any]
) -> list[Record[Any]]:
    """Return the records of a short query of `COLUMNS`, without rows of NULLs."""
    decode = decoder_here(session, kind)
    return [
        decode(row)
        async for rows in read_rows(session, query, None)
        for row in rows
        if row[0] is not None
    ]


def decoder_here(session: AsyncSession, kind: type[Any]) -> Decode:
    """Return the decoder of the rows of `read_rows`."""
    return decoder_of(kind, session.get_bind().dialect)  # type: ignore[arg-type]  # it is hashable
