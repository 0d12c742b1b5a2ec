"""Collect the rows that a policy moves, as tables of Arrow by the day of their end."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import partial
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
from sqlalchemy import select
from sqlalchemy.ext.asyncio import AsyncSession
from sqlalchemy.orm import Session

from openclaw_store.archive.layout import HISTORIES, MISFITS, TASKS, Layout
from openclaw_store.archive.runs import logger
from openclaw_store.backends import fetch_raw_rows
from openclaw_store.database import (
    COLUMNS,
    Database,
    PastChangeRow,
    TaskRow,
    statements_in,
    to_microseconds,
)
from openclaw_store.domain import Raw, Task
from openclaw_store.repositories import Policy, TolerantReader, old_rows

RUN_ROWS = 100_000
"""Rows that one run moves at most, so that it needs little memory."""

RUN_BYTES = 64 << 20
"""Bytes of rows in memory after which a run is not extended."""

PAGE_ROWS = 500
"""Rows read together, between which other coroutines run."""

DAY_MICROSECONDS = 86_400_000_000

_PAST_COLUMNS = [PastChangeRow.__table__.c[name] for name in HISTORIES.names]
_HAS_PAST = select(select(PastChangeRow).exists())
_VERSION, _ITEM_ID = TASKS.names.index("version"), HISTORIES.names.index("item_id")


DayTable = tuple[Layout, str, Any]
"""The layout of a file, its day, and its rows as a table of Arrow."""


@dataclass
class Collected:
    """Rows of one run, in memory."""

    tables: dict[tuple[str, str], list[Any]] = field(default_factory=lambda: defaultdict(list))
    """Parts of tables by folder and day."""
    rows: int = 0
    bytes: int = 0

    @property
    def is_full(self) -> bool:
        return self.rows >= RUN_ROWS or self.bytes >= RUN_BYTES

    def add(self, layout: Layout, day: str, table: Any) -> None:
        """Add rows of one day."""
        self.tables[layout.folder, day].append(table)
        self.bytes += table.nbytes

    def tables_of(self, layout: Layout) -> list[DayTable]:
        """Return the sorted table of each day, in the order of the days."""
        order = [(name, "ascending") for name in layout.order]
        return [
            (layout, day, pa.concat_tables(parts).sort_by(order))
            for (folder, day), parts in sorted(self.tables.items())
            if folder == layout.folder
        ]


class TaskCollector:
    """Collects old tasks, and their histories.

    Args:
        skipped: Receives the identifiers of tasks that no file can hold, and that stay.
    """

    def __init__(self, database: Database, policy: Policy, skipped: set[str]) -> None:
        self._database = database
        self._policy = policy
        self._skipped = skipped

    async def pages(self) -> AsyncIterator[Collected]:
        """Yield the same collection after each page that was added to it."""
        found = Collected()
        for condition in self._policy.old():
            columns = [TaskRow.task_id]
            pages = old_rows(self._database.read, self._policy, condition, columns, PAGE_ROWS)
            async for page in pages:
                ids = [id for (id,) in page if id not in self._skipped]
                tasks, histories = await self._database.read(
                    partial(AsyncSession.run_sync, fn=partial(self._read, ids=ids))
                )
                self._add(found, tasks, histories)
                yield found

    def _read(self, session: Session, ids: Sequence[str]) -> tuple[list[Raw], list[Raw]]:
        """Return the tasks in the order of `ids`, and the changes of all of them."""
        sql, reader = statements_in(session), TolerantReader(session)
        rows = {row[0]: row for row in reader.by_ids(Task, COLUMNS[Task], ids)}
        for error in reader.unreadable.values():
            logger.warning("a task stays in the database: %s", error)
        self._skipped.update(id for _, id in reader.unreadable)
        versions = [row[_VERSION] for row in rows.values() if row[_VERSION]]
        queries = [sql.histories(versions)]
        if session.scalar(_HAS_PAST):
            queries.append(select(*_PAST_COLUMNS).where(PastChangeRow.item_id.in_(rows)))
        connection = session.connection()
        changes = [row for one in queries for row in fetch_raw_rows(connection.execute(one))]
        changes = [row for row in changes if row[_ITEM_ID] in rows]
        return [rows[id] for id in ids if id in rows], changes

    def _add(self, found: Collected, tasks: Sequence[Raw], changes: Sequence[Raw]) -> None:
        try:
            table = TASKS.table(tasks)
        except MISFITS:
            tasks, changes = self._without_misfits(tasks, changes)
            table = TASKS.table(tasks)
        days = self._days(table)
        histories = HISTORIES.table(changes)
        for day in set(days):
            of_tasks, of_changes = table, histories
            if len(set(days)) > 1:
                chosen = pa.array([one == day for one in days], pa.bool_())
                of_tasks = table.filter(chosen)
                of_changes = histories.filter(
                    pc.is_in(histories["item_id"], of_tasks["task_id"].combine_chunks())
                )
            found.add(TASKS, day, of_tasks)
            found.add(HISTORIES, day, of_changes)
        found.rows += len(tasks)

    def _without_misfits(
        self, tasks: Sequence[Raw], changes: Sequence[Raw]
    ) -> tuple[list[Raw], list[Raw]]:
        """Leave out tasks with a value of another type than that of its column."""
        by_id: dict[str, list[Raw]] = defaultdict(list)
        for change in changes:
            by_id[change[_ITEM_ID]].append(change)
        for task in tasks:
            try:
                TASKS.table([task])
                HISTORIES.table(by_id[task[0]])
            except MISFITS as error:
                logger.warning("task %r stays in the database: %s", task[0], error)
                self._skipped.add(task[0])
        return (
            [task for task in tasks if task[0] not in self._skipped],
            [change for change in changes if change[_ITEM_ID] not in self._skipped],
        )

    def _days(self, tasks: Any) -> list[str]:
        """Return the day of each end, or of the last change if the end is unknown."""
        ends, changes = (tasks[name].cast(pa.int64()) for name in ("completed_at", "updated_at"))
        is_known = pc.fill_null(pc.less_equal(ends, to_microseconds(self._policy.now)), False)
        days = pc.divide(pc.if_else(is_known, ends, changes), DAY_MICROSECONDS)
        names = {day: day_of(day) for day in pc.unique(days).to_pylist()}
        return [names[day] for day in days.to_pylist()]


def day_of(day: int) -> str:
    """Return a day, counted from 1970, as 2026-11-30."""
    try:
        return datetime.fromtimestamp(day * 86_400, UTC).date().isoformat()
    except (ValueError, OverflowError, OSError):  # of a row written by hand
        return day_of(0)


async def sample(database: Database, policy: Policy, size: int) -> tuple[int, int, int]:
    """Return the number of some tasks, that of their changes, and the bytes of their files."""
    async for found in TaskCollector(database, policy, set()).pages():
        if found.rows >= size:
            break
    tables = [*found.tables_of(TASKS), *found.tables_of(HISTORIES)]
    changes = sum(len(table) for layout, _, table in tables if layout is HISTORIES)
    return found.rows, changes, sum(len(layout.encode(table)) for layout, _, table in tables)
