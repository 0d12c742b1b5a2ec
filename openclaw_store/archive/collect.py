"""Collect the rows that a policy moves, as tables of Arrow by day."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import partial
from operator import itemgetter
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
from sqlalchemy import select
from sqlalchemy.ext.asyncio import AsyncSession
from sqlalchemy.orm import Session

from openclaw_store.archive.layout import CHANGES, HISTORY, MISFITS, TASKS, Layout
from openclaw_store.archive.runs import logger
from openclaw_store.backends import fetch_raw_rows
from openclaw_store.database import (
    COLUMNS,
    ChangeRow,
    Database,
    PastChangeRow,
    TaskRow,
    statements_in,
    to_microseconds,
)
from openclaw_store.domain import Raw, Task
from openclaw_store.repositories import (
    Policy,
    TolerantReader,
    old_revisions,
    old_rows,
    read_counters,
    read_rows,
)

RUN_ROWS = 100_000
"""Rows that one run moves at most, so that it needs little memory."""

RUN_BYTES = 64 << 20
"""Bytes of rows in memory after which a run is not extended."""

PAGE_ROWS = 1000
"""Rows read together, between which other coroutines run."""

_PAST = [PastChangeRow.__table__.c[name] for name in ("item_id", *HISTORY)]
_HAS_PAST = select(select(PastChangeRow).exists())
_VERSION = TASKS.names.index("version")


@dataclass
class Collected:
    """Rows of one run, in memory."""

    layout: Layout
    days: dict[str, list[Any]] = field(default_factory=lambda: defaultdict(list))
    """Parts of tables by day."""
    rows: int = 0
    bytes: int = 0

    @property
    def is_full(self) -> bool:
        return self.rows >= RUN_ROWS or self.bytes >= RUN_BYTES

    def add(self, table: Any, times: Any) -> None:
        """Add rows, each with its time in microseconds."""
        days = times.cast(pa.timestamp("us")).cast(pa.date32()).cast(pa.int32())
        for day in pc.unique(days).to_pylist():
            self.days[_name(day)].append(table.filter(pc.equal(days, day)))
        self.rows += len(table)
        self.bytes += table.nbytes

    def tables(self) -> list[tuple[str, Any]]:
        """Return the sorted table of each day, in the order of the days."""
        return [
            (day, pa.concat_tables(parts).sort_by(self.layout.order))
            for day, parts in sorted(self.days.items())
        ]


def _name(day: int) -> str:
    """Return a day, counted from 1970, as 2026-11-30."""
    try:
        return datetime.fromtimestamp(day * 86_400, UTC).date().isoformat()
    except (ValueError, OverflowError, OSError):  # of a row written by hand
        return "1970-01-01"


class TaskCollector:
    """Collects old tasks with their histories.

    Args:
        skipped: Receives the identifiers of tasks that no file can hold, and that stay.
    """

    def __init__(self, database: Database, policy: Policy, skipped: set[str]) -> None:
        self._database = database
        self._policy = policy
        self._skipped = skipped

    async def pages(self) -> AsyncIterator[Collected]:
        """Yield the same collection after each page that was added to it."""
        found = Collected(TASKS)
        for condition in self._policy.old():
            columns = [TaskRow.task_id]
            pages = old_rows(self._database.read, self._policy, condition, columns, PAGE_ROWS)
            async for page in pages:
                ids = [id for (id,) in page if id not in self._skipped]
                tasks, histories = await self._database.read(
                    partial(AsyncSession.run_sync, fn=partial(self._read, ids=ids))
                )
                table = self._table(tasks, histories)
                found.add(table, self._ends(table))
                yield found

    def _read(self, session: Session, ids: Sequence[str]) -> tuple[list[Raw], dict[str, list[Raw]]]:
        """Return the tasks in the order of `ids`, and the changes of each."""
        sql, reader = statements_in(session), TolerantReader(session)
        rows = {row[0]: row for row in reader.by_ids(Task, COLUMNS[Task], ids)}
        for error in reader.unreadable.values():
            logger.warning("a task stays in the database: %s", error)
        self._skipped.update(id for _, id in reader.unreadable)
        versions = [row[_VERSION] for row in rows.values() if row[_VERSION]]
        chain = sql.histories(versions)
        changes = chain.selected_columns
        queries = [chain.with_only_columns(*(changes[one.name] for one in _PAST))]
        if session.scalar(_HAS_PAST):
            queries.append(select(*_PAST).where(PastChangeRow.item_id.in_(rows)))
        histories: dict[str, list[Raw]] = {id: [] for id in rows}
        for query in queries:
            for id, *change in fetch_raw_rows(session.connection().execute(query)):
                if id in histories:  # else a row written by hand has the version of another
                    histories[id].append(change)
        return [rows[id] for id in ids if id in rows], histories

    def _table(self, tasks: Sequence[Raw], histories: dict[str, list[Raw]]) -> Any:
        """Return the table, without tasks that have a value of another type than its column."""
        for history in histories.values():
            history.sort(key=itemgetter(0))
        try:
            return TASKS.table(tasks, [histories[task[0]] for task in tasks])
        except MISFITS:
            fitting = [task for task in tasks if self._fits(task, histories[task[0]])]
            return TASKS.table(fitting, [histories[task[0]] for task in fitting])

    def _fits(self, task: Raw, history: Sequence[Raw]) -> bool:
        try:
            TASKS.table([task], [history])
        except MISFITS as error:
            logger.warning("task %r stays in the database: %s", task[0], error)
            self._skipped.add(task[0])
            return False
        return True

    def _ends(self, tasks: Any) -> Any:
        """Return the time of each end, or of the last change if the end is unknown."""
        ends, changes = (tasks[name].cast(pa.int64()) for name in ("completed_at", "updated_at"))
        is_known = pc.fill_null(pc.less_equal(ends, to_microseconds(self._policy.now)), False)
        return pc.if_else(is_known, ends, changes)


async def collect_changes(
    database: Database, now: datetime, cutoff: datetime
) -> AsyncIterator[Collected]:
    """Yield the same collection of the changes before a cutoff, after each page of them."""
    found, since = Collected(CHANGES), 0
    newest, _, _ = await database.read(read_counters)
    async for end in old_revisions(database, now, cutoff):
        until = min(end, newest - 1)  # the newest change stays in the feed
        query = select(*ChangeRow.__table__.c).order_by(ChangeRow.revision)
        query = query.where(ChangeRow.revision > since, ChangeRow.revision <= until)
        table = CHANGES.table(await database.read(partial(_all_rows, query=query)))
        found.add(table, table["changed_at"].cast(pa.int64()))
        since = until
        yield found


async def _all_rows(session: AsyncSession, query: Any) -> list[Raw]:
    return [row async for rows in read_rows(session, query, None) for row in rows]


async def sample(database: Database, policy: Policy, size: int) -> tuple[int, int, int]:
    """Return the number of some tasks, that of their changes, and the bytes of their files."""
    found = Collected(TASKS)
    async for found in TaskCollector(database, policy, set()).pages():
        if found.rows >= size:
            break
    tables = [table for _, table in found.tables()]
    changes = sum(pc.sum(pc.list_value_length(one["history"])).as_py() or 0 for one in tables)
    return found.rows, changes, sum(len(TASKS.encode(table)) for table in tables)
