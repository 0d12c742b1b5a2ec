"""Retention: remove old finished tasks, and old changes from the change log.

Both search without the write lock, and remove in batches, so that other callers write in between.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from functools import partial
from itertools import takewhile
from typing import Any, ClassVar

from sqlalchemy import ColumnElement, Select, and_, exists, false, func, or_, select, tuple_
from sqlalchemy.ext.asyncio import AsyncSession

from openclaw_store.database import (
    IS_FINISHED,
    ChangeRow,
    Database,
    PastChangeRow,
    TaskRow,
    WriteTransaction,
    statements_in,
)
from openclaw_store.domain import (
    FINISHED,
    TURNED_BACK,
    Raw,
    Task,
    TaskStatus,
    check_enum,
    check_number,
    check_seconds,
)
from openclaw_store.errors import InvalidDataError, StoreError
from openclaw_store.repositories.commands import Remove
from openclaw_store.repositories.row_reader import read_rows
from openclaw_store.repositories.unit_of_work import Command, Row, counters_of

CLEANUP_BATCH = 100
"""Tasks removed in one transaction of `cleanup_old_tasks`."""

_PAGE_SIZE = 1000
"""Old tasks searched at a time."""

COMPACTION_BATCH_SIZE = 1000
"""Changes removed in one transaction."""

_IS_RESTORED = exists().where(PastChangeRow.item_id == TaskRow.task_id)
"""The condition of tasks that came back from an archive: they count from their return."""

Read = Callable[[Callable[[AsyncSession], Awaitable[Any]]], Awaitable[Any]]
"""Runs a query in a session."""

Write = Callable[[Sequence[Command]], Awaitable[Sequence[Any]]]
"""Applies commands in one transaction, and returns their results."""

task_status = check_enum(TaskStatus)


@dataclass(frozen=True, slots=True)
class Policy:
    """The tasks that are old `now`: they finished before the cutoff of their status."""

    now: datetime
    cutoffs: Mapping[TaskStatus, datetime]
    """By status; tasks with any other status stay."""

    def old(self) -> Sequence[ColumnElement[bool]]:
        """Return conditions of the tasks to remove; one index answers each in its order."""
        completed_at = TaskRow.completed_at
        is_old = self._each(lambda cutoff: TaskRow.updated_at < cutoff)
        return (
            and_(
                completed_at < max(self.cutoffs.values(), default=self.now),
                self._each(lambda cutoff: completed_at < cutoff),
                or_(~_IS_RESTORED, is_old),
            ),
            and_(completed_at.is_(None), is_old),
            and_(completed_at > self.now, is_old),
        )

    def ahead(self) -> ColumnElement[bool]:
        """Return the condition of tasks that are dated farther ahead than their cutoff lies back.

        A clock was ahead, so their age is unknown.
        """
        horizon = self._each(lambda cutoff: TaskRow.updated_at > self.now + (self.now - cutoff))
        return and_(TaskRow.completed_at > self.now, horizon)

    def select(self, condition: ColumnElement[bool], *columns: Any) -> Select[Any]:
        """Select finished tasks that meet a condition, except the ones to keep."""
        keep = FINISHED - self.cutoffs.keys()
        query = select(*columns).where(IS_FINISHED, condition, TaskRow.status.not_in(sorted(keep)))
        # Without statistics, and with old ones, SQLite would read all finished tasks.
        return query.with_hint(TaskRow, "INDEXED BY ix_tasks_completed_at", "sqlite")

    def _each(self, condition: Callable[[datetime], ColumnElement[bool]]) -> ColumnElement[bool]:
        """Return a condition that depends on the cutoff, for tasks of each status."""
        states: dict[datetime, list[TaskStatus]] = {}
        for status, cutoff in self.cutoffs.items():
            states.setdefault(cutoff, []).append(status)
        if len(states) == 1:
            return condition(*states)
        return or_(
            false(),
            *(and_(TaskRow.status.in_(of), condition(cutoff)) for cutoff, of in states.items()),
        )


def parse_policy(
    now: datetime, days: float, keep_status: TaskStatus | Iterable[TaskStatus] | None
) -> Policy:
    """Return the policy of a call.

    Raises:
        InvalidDataError: If `days` is no age, or there is no such status.
    """
    statuses: Iterable[Any] = () if keep_status is None else [keep_status]
    if isinstance(keep_status, Iterable) and not isinstance(keep_status, str):
        statuses = keep_status
    keep = {task_status("keep_status", status) for status in statuses}
    try:
        cutoff = now - timedelta(days=check_number("days", days))
    except OverflowError as error:
        raise InvalidDataError("days", f"is too large: {days}") from error
    return Policy(now, dict.fromkeys(FINISHED - keep, cutoff))


async def count_old_tasks(session: AsyncSession, policy: Policy) -> int:
    """Count the tasks that `remove_old_tasks` would remove."""
    counts = [policy.select(one, func.count()).scalar_subquery() for one in policy.old()]
    return sum((await session.execute(select(*counts))).one())


async def remove_old_tasks(read: Read, write: Write, policy: Policy) -> int:
    """Remove old tasks with their history, in batches; return their number.

    A task that changes after it was found stays.
    """
    total = 0
    try:
        for condition in policy.old():
            async for found in _batches(read, policy, condition):
                commands = [
                    Remove(Task, id, with_history=True, version=version) for id, version in found
                ]
                total += sum(await write(commands))
        await redate_tasks(read, write, policy)
    except StoreError as error:
        error.add_note(f"{total} tasks were removed before; call again for the rest")
        raise
    return total


async def redate_tasks(read: Read, write: Write, policy: Policy) -> None:
    """Set the last change of tasks to this moment that a clock has dated far ahead."""
    async for found in _batches(read, policy, policy.ahead()):
        await write([Redate(id) for id, _ in found])


async def _batches(
    read: Read, policy: Policy, condition: ColumnElement[bool]
) -> AsyncIterator[Sequence[tuple[str, int]]]:
    """Yield identifiers and versions of tasks by time of completion and identifier."""
    columns = TaskRow.task_id, TaskRow.version
    async for page in old_rows(read, policy, condition, columns, _PAGE_SIZE):
        for start in range(0, len(page), CLEANUP_BATCH):
            yield [(id, version) for id, version in page[start : start + CLEANUP_BATCH]]


async def old_rows(
    read: Read,
    policy: Policy,
    condition: ColumnElement[bool],
    columns: Sequence[Any],
    page_size: int,
) -> AsyncIterator[Sequence[Raw]]:
    """Yield pages of tasks by time of completion and identifier, as the driver gives them."""
    order = TaskRow.completed_at, TaskRow.task_id
    query = policy.select(condition, *order, *columns).order_by(*order).limit(page_size)
    rest = query

    async def run(session: AsyncSession) -> tuple[Sequence[Raw], datetime | None]:
        page = [row async for rows in read_rows(session, rest, None) for row in rows]
        last = page[-1][0] if page else None
        sql = statements_in(session)
        return page, None if last is None else sql.from_moment(last)

    while True:
        page, at = await read(run)
        if not page:
            return
        yield [row[len(order) :] for row in page]
        last = page[-1][1]
        is_later = TaskRow.task_id > last
        if at is not None:
            is_later = tuple_(*order) > tuple_(at, last, types=[one.type for one in order])
        rest = query.where(is_later)


@dataclass(frozen=True, slots=True)
class Redate(Command):
    """Set the last change of a task to this moment, as a clock was ahead.

    The result is false if the task is gone or cannot be read.
    """

    id: str
    kind: ClassVar[type[Any]] = Task

    def decide(self, row: Row) -> bool:
        try:
            task = row.content()
        except InvalidDataError:  # `verify` reports it
            return False
        if task is None:
            return False
        row.write(task.evolve(), (), TURNED_BACK)
        return True


async def compact_feed(database: Database, days: float) -> int:
    """Remove changes older than `days` from the change log, in batches; return their number.

    Raises:
        InvalidDataError: If `days` is no age.
    """
    now = database.clock()
    cutoff = now - check_seconds("days", check_number("days", days) * 86_400)
    total = 0
    async for until in old_revisions(database, now, cutoff):
        removed: int = await database.write(compact, Compact(until))
        total += removed
    return total


async def old_revisions(database: Database, now: datetime, cutoff: datetime) -> AsyncIterator[int]:
    """Yield the last revision of each batch of changes from before a cutoff, oldest first."""
    seen = 0
    ends: list[int] = []
    while True:
        changes = await database.read(partial(_read_times, since=seen))
        # A change dated by a clock that was ahead is as old as its neighbours.
        passed = list(takewhile(lambda one: not cutoff <= one[1] <= now, changes))
        old = [revision for revision, at in passed if at < cutoff]
        if old:
            # Earlier batches with dates in the future only are older than this one.
            for end in (*ends, old[-1]):
                yield end
            ends = []
        if len(passed) < COMPACTION_BATCH_SIZE:
            return
        seen, _ = passed[-1]
        ends.append(seen)


async def _read_times(session: AsyncSession, since: int) -> Sequence[tuple[int, datetime]]:
    columns = ChangeRow.revision, ChangeRow.changed_at
    query = select(*columns).where(ChangeRow.revision > since).order_by(ChangeRow.revision)
    found = await session.execute(query.limit(COMPACTION_BATCH_SIZE))
    return [(row.revision, row.changed_at) for row in found]


@dataclass(frozen=True, slots=True)
class Compact:
    """Remove the changes up to a revision, but never the newest one; the result is their number."""

    until: int


def compact(transaction: WriteTransaction, commands: Sequence[Compact]) -> Sequence[int]:
    """Apply `Compact` commands."""
    sql, cursor = transaction.sql, transaction.cursor
    newest, _ = counters_of(cursor.execute(sql.read_counters))
    counts = []
    for command in commands:
        # The newest change stays: a new cache reads the time of the last update from it.
        until = min(command.until, newest - 1)
        counts.append(len(cursor.execute(sql.forget_until, (until,))))
        if counts[-1]:
            cursor.execute(sql.write_compacted, (until,))
    return counts
