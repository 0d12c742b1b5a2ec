"""Verify: check that a database keeps the invariants of the store, like an fsck.

The schema comes first: rows of other tables are not read. Then all rows are checked by the
database, in one consistent snapshot; only suspicious ones are read. The memory in use is one bit
per revision, the nodes, and the problems.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from sqlalchemy import func, select, text
from sqlalchemy.ext.asyncio import AsyncSession

from openclaw_store.backends import SQLiteErrorMapping
from openclaw_store.backends.sqlite.connections import limited
from openclaw_store.database import (
    IS_ASSIGNED,
    IS_LIVE,
    ChangeRow,
    CounterRow,
    Database,
    Difference,
    NodeRow,
    TaskRow,
)
from openclaw_store.database.rekeying import find_unreadable
from openclaw_store.domain import ENTITY_NAMES, MAX_INTEGER, NodeInfo, Task, utc_now
from openclaw_store.errors import InvalidDataError, UnavailableError, shown
from openclaw_store.maintenance.feed_checks import FeedCheck
from openclaw_store.maintenance.findings import INVARIANTS, Findings, Problem, Verification
from openclaw_store.maintenance.past_checks import check_past_changes
from openclaw_store.maintenance.progress import Progress, Report
from openclaw_store.maintenance.repair import repair_problems
from openclaw_store.maintenance.row_checks import References, RowCheck
from openclaw_store.maintenance.schema import find_differences, repair_schema

__all__ = ["INVARIANTS", "Problem", "Verification", "verify", "verify_schema"]

_PAGES_DAMAGED = ("*** in database", "Tree ", "Page ")
"""How SQLite begins a line about pages, not about rows or indexes."""


async def verify(
    database: Database, *, repair: bool = False, report: Report | None = None
) -> Verification:
    """Check all invariants of the store, while it is in use.

    A repair of a row is an ordinary change, which the caches of running processes follow.

    Args:
        repair: Repair the problems that can be repaired without losing anything. Not for nodes
            that report their own `running_tasks`: the number of assigned tasks overwrites it.
        report: Receives the progress.

    Raises:
        UnavailableError: If the database cannot be read.
    """
    schema = await verify_schema(database, repair=repair)
    if not schema.is_complete:
        return schema
    repaired: list[Problem] = []
    while True:
        scan = _Scan(report)
        await scan.run(database)
        found = scan.findings.result
        if not repair or not scan.findings.repairs:
            break
        progress = Progress(report, "repairing", len(scan.findings.repairs))
        solved = await repair_problems(database, scan.findings.repairs, progress)
        for position, is_solved in solved.items():
            found.problems[position] = replace(found.problems[position], is_repaired=is_solved)
        if not found.omitted or not any(solved.values()):
            break
        repaired += [problem for problem in found.problems if problem.is_repaired]
    # A later scan no longer finds the problems that an earlier one has repaired.
    found.problems[:0] = [*schema.problems, *repaired]
    found.checked["schema"] = schema.checked["schema"]
    return found


async def verify_schema(database: Database, *, repair: bool = False) -> Verification:
    """Check the schema and the row of counters, without which a database cannot be used.

    The database may be closed. The result is not complete if the rows must not be read.
    """
    findings = Findings()
    found = await database.inspect(find_differences)
    findings.count(1, "schema")
    repaired: Sequence[Difference] = ()
    if repair and any(one.is_safe for one in found):
        repaired, found = await repair_schema(database, found)
    for one in [*repaired, *found]:
        text, is_repaired = f"The schema differs: {one.text}.", one in repaired
        findings.result.problems.append(
            Problem(one.invariant, None, None, shown(text), one.is_safe, is_repaired, one.advice)
        )
    findings.result.is_complete = not any(one.is_blocking for one in found)
    return findings.result


class _Scan:
    """One check of all invariants but the schema."""

    def __init__(self, report: Report | None) -> None:
        self._report = report
        self.findings = Findings()
        self._counts: Sequence[int] = ()

    async def run(self, database: Database) -> None:
        try:
            async with database.session() as session, limited(session):
                await database.read_in(session, lambda session: self._check_all(database, session))
            if self.findings.result.is_complete:  # behind the session: the pool may have one alone
                for problem in await find_unreadable(database):
                    self.findings.add("values", f"{problem}.")
        except (UnavailableError, InvalidDataError) as error:
            if error.__cause__ is None or not SQLiteErrorMapping.is_damage(error.__cause__):
                raise
            self.findings.add("file", f"Not all of it can be read: {error}.")
            self.findings.result.is_complete = False

    async def _check_all(self, database: Database, session: AsyncSession) -> None:
        references = await self._check_file(session) and await self._check_counters(session)
        if not references:
            self.findings.result.is_complete = False
            return
        node = TaskRow.assigned_node
        query = select(node, func.count()).where(IS_ASSIGNED).group_by(node)
        rows = await session.execute(query)
        assigned = {id: count for id, count in rows if id and isinstance(id, str)}
        # The database stamps rows that are inserted by hand with the time of its system.
        now = max(database.clock(), utc_now())
        for kind, count in zip((NodeInfo, Task), self._counts, strict=False):
            check = RowCheck(session, kind, self.findings, references, assigned, now)
            await check.run(self._report, count)
        self._remark_unknown_nodes(assigned)
        await self._check_idempotency_keys(session)
        # The feed comes after the rows, whose references it looks up.
        feed = FeedCheck(session, self.findings, references, now)
        await feed.run(self._report, self._counts[2])
        await check_past_changes(session, self.findings, now)
        self.findings.result.omitted += references.omitted

    async def _check_file(self, session: AsyncSession) -> bool:
        """Return `False` if rows cannot be read: in damaged pages, a search may never end."""
        add, progress = self.findings.add, Progress(self._report, "file", 1)
        if session.get_bind().dialect.name == "sqlite":
            first = await session.scalar(text("PRAGMA integrity_check(1)"))
            if first and first.startswith(_PAGES_DAMAGED):
                add("file", f"SQLite reports: {first}; the rows were not checked.")
                return False
            if first != "ok":
                for (line,) in await session.execute(text("PRAGMA integrity_check")):
                    advice = "REINDEX" if "index" in line else None
                    add("file", f"SQLite reports: {line}.", advice=advice)
            for table, row, parent, _ in await session.execute(text("PRAGMA foreign_key_check")):
                add("file", f"Row {row} of {table} refers to no row of {parent}.")
        self.findings.count(1, "file")
        progress.add(1)
        return True

    async def _check_counters(self, session: AsyncSession) -> References | None:
        add = self.findings.add
        query = select(CounterRow.revision, CounterRow.heartbeats, CounterRow.compacted)
        counters = (await session.execute(query)).all()
        self.findings.count(len(counters), "counters")
        if len(counters) != 1:
            add("counters", f"There are {len(counters)} rows of counters instead of one.")
            return None
        if {*map(type, counters[0])} != {int}:  # SQLite sorts text behind all numbers
            add("counters", f"Of the newest numbers {tuple(counters[0])}, not all are integers.")
            return None
        newest, heartbeats, compacted = counters[0]
        if min(counters[0]) < 0:
            add("counters", f"Of the newest numbers {tuple(counters[0])}, some are negative.")
        # Writers could not count on from the largest numbers, which only damage explains.
        if max(heartbeats, newest) >= MAX_INTEGER // 2:
            add("counters", f"The last numbers are {newest} and {heartbeats}, near the largest.")
        if compacted >= max(newest, 1):
            problem = f"The feed was compacted up to {compacted}, but ends before that."
            add("counters", problem)
        self._counts = [
            await session.scalar(select(func.count()).select_from(row)) or 0
            for row in (NodeRow, TaskRow, ChangeRow)
        ]
        return References(newest, compacted)

    def _remark_unknown_nodes(self, assigned: Mapping[str, int]) -> None:
        """Remark on the nodes left in `assigned`: they have no row."""
        self.findings.count(self._counts[0] + len(assigned), "nodes")
        for id, count in sorted(assigned.items()):
            text = (
                f"There is no node {id!r}, but {count} tasks are scheduled or running on it: "
                "recover releases them."
            )
            self.findings.remark("nodes", text, (ENTITY_NAMES[NodeInfo], id))

    async def _check_idempotency_keys(self, session: AsyncSession) -> None:
        column = TaskRow.idempotency_key
        query: Any = (
            select(column, func.count(), func.min(TaskRow.task_id))
            .where(column.is_not(None), IS_LIVE)
            .group_by(column)
            .having(func.count() > 1)
        )
        for idempotency_key, count, first in await session.execute(query):
            text = f"{count} live tasks, as {first!r}, have the key {idempotency_key!r}."
            key = (ENTITY_NAMES[Task], first) if isinstance(first, str) else None
            self.findings.add("idempotency_keys", text, key)
        self.findings.count(self._counts[1], "idempotency_keys")
