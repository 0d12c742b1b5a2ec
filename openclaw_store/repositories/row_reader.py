"""Read rows: in batches as the driver gives them, a few as records, or around unreadable ones."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from sqlalchemy import CursorResult, Select, select
from sqlalchemy.ext.asyncio import AsyncSession
from sqlalchemy.orm import Session

from openclaw_store.backends import fetch_raw_rows, unreadable_value
from openclaw_store.database import (
    COLUMNS,
    IS_PENDING,
    ChangeRow,
    PastChangeRow,
    TaskRow,
    statements_in,
)
from openclaw_store.domain import (
    ENTITY_NAMES,
    Decode,
    EntityKey,
    Raw,
    Record,
    Task,
    TaskPriority,
)
from openclaw_store.errors import InvalidDataError

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
        options = {**session.execution_options, "stream_results": size is not None}
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
    return statements_in(session).decode[kind]


PAST_COLUMNS = tuple(PastChangeRow.__table__.c)
"""The columns of `read_histories`."""

_NAMES = [one.name for one in PAST_COLUMNS]
_ID, _CHANGE, _ITEM, _PREVIOUS = map(_NAMES.index, ("item_id", "revision", "item", "previous"))
_TASK = ENTITY_NAMES[Task]
_LOGGED = [ChangeRow.__table__.c[name] for name in _NAMES]
_HAS_PAST = select(select(PastChangeRow).exists())


def read_histories(
    session: Session, versions: Mapping[str, int]
) -> tuple[list[Raw], Sequence[Raw]]:
    """Return the changes of tasks in the feed, and their past ones, as rows of `past_changes`.

    Each change names the previous one, so the last ones are read first. A `previous` that was
    written by hand may name any revision.

    Args:
        versions: The version of each task.
    """
    sql, connection = statements_in(session), session.connection()
    logged: list[Raw] = []
    # SQLite stores text in any column.
    wanted = {(id, one) for id, one in versions.items() if isinstance(one, int) and one}
    while wanted:
        query = sql.changes_at(_LOGGED, sorted(revision for _, revision in wanted))
        rows = fetch_raw_rows(connection.execute(query))
        found = [row for row in rows if (row[_ID], row[_CHANGE]) in wanted and row[_ITEM] == _TASK]
        logged += found
        wanted = {
            (row[_ID], row[_PREVIOUS])
            for row in found
            if isinstance(row[_PREVIOUS], int) and row[_PREVIOUS] < row[_CHANGE]
        }
    past: Sequence[Raw] = ()
    if session.scalar(_HAS_PAST):
        of_tasks = PastChangeRow.item_id.in_(versions)
        past = fetch_raw_rows(connection.execute(select(*PAST_COLUMNS).where(of_tasks)))
    return logged, past


class TolerantReader:
    """Reads rows in a session, and notes unreadable rows instead of failing.

    Such values were written by hand: text that is not UTF-8 on SQLite, or on PostgreSQL a time
    outside Python's range. The driver then refuses all rows of a result.
    """

    def __init__(self, session: Session) -> None:
        self._session = session
        self.sql = statements_in(session)
        self.unreadable: dict[EntityKey, InvalidDataError] = {}
        """The error of each unreadable row, which names it."""

    def all(self, query: Select[Any]) -> list[Raw] | None:
        """Return the rows of a query, without rows of NULLs; `None` if one is unreadable."""
        try:
            return self._fetch(query)
        except Exception as error:
            if unreadable_value(error) is None:
                raise
            return None

    def by_ids(self, kind: type[Any], columns: Sequence[Any], ids: Sequence[str]) -> list[Raw]:
        """Return the rows with these identifiers; if one is unreadable, each is read alone."""
        try:
            return self._fetch(self.sql.by_ids(kind, columns, self.sql.given(ids)))
        except Exception as error:
            cause = unreadable_value(error)
            if cause is None:
                raise
            if len(ids) == 1:
                self._note(kind, ids[0], cause)
                return []
        return [row for id in ids for row in self.by_ids(kind, columns, [id])]

    @contextmanager
    def noting(self, kind: type[Any], id: str) -> Iterator[None]:
        """Note the error of a row that cannot be decoded."""
        try:
            yield
        except InvalidDataError as error:
            self._note(kind, id, error)

    def _note(self, kind: type[Any], id: str, cause: BaseException) -> None:
        reason = f"{id!r} cannot be read: {cause}: correct it by hand"
        self.unreadable[kind, id] = InvalidDataError(ENTITY_NAMES[kind], reason)

    def _fetch(self, query: Select[Any]) -> list[Raw]:
        rows = fetch_raw_rows(self._session.connection().execute(query))
        return [tuple(row) for row in rows if row[0] is not None]
