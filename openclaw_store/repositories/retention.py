"""Retention: remove old finished tasks, and old changes from the change log.

Both work in batches, so that other callers write in between.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterable, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from functools import partial
from itertools import takewhile
from typing import Any, ClassVar

from sqlalchemy import func, select
from sqlalchemy.ext.asyncio import AsyncSession

from openclaw_store.database import (
    IS_FINISHED,
    Apply,
    ChangeRow,
    Database,
    TaskRow,
    WriteTransaction,
    statements_for,
)
from openclaw_store.domain import (
    TURNED_BACK,
    Task,
    TaskStatus,
    check_enum,
    check_number,
    check_seconds,
)
from openclaw_store.errors import InvalidDataError, StoreError
from openclaw_store.repositories.batches import apply
from openclaw_store.repositories.commands import Remove
from openclaw_store.repositories.unit_of_work import Command, Row, counters_of

CLEANUP_BATCH = 200
"""Tasks removed in one transaction of `cleanup_old_tasks`."""

_REDATE_BATCH_SIZE = 20
"""Tasks read one by one under the write lock."""

COMPACTION_BATCH_SIZE = 1000
"""Changes removed in one transaction."""

task_status = check_enum(TaskStatus)


def parse_policy(
    now: datetime, days: float, keep_status: TaskStatus | Iterable[TaskStatus] | None
) -> tuple[datetime, tuple[TaskStatus, ...]]:
    """Return the moment before which a finished task is old, and the statuses to keep.

    Raises:
        InvalidDataError: If `days` is no age, or there is no such status.
    """
    statuses: Iterable[Any] = () if keep_status is None else [keep_status]
    if isinstance(keep_status, Iterable) and not isinstance(keep_status, str):
        statuses = keep_status
    keep = tuple(task_status("keep_status", status) for status in statuses)
    try:
        return now - timedelta(days=check_number("days", days)), keep
    except OverflowError as error:
        raise InvalidDataError("days", f"is too large: {days}") from error


async def count_old_tasks(
    session: AsyncSession, *, cutoff: datetime, keep: Sequence[TaskStatus], now: datetime
) -> int:
    """Count the tasks that `remove_old_tasks` would remove."""
    searches = [  # each uses an index
        TaskRow.completed_at < cutoff,
        TaskRow.completed_at.is_(None) & (TaskRow.updated_at < cutoff),
        (TaskRow.completed_at > now) & (TaskRow.updated_at < cutoff),
    ]
    counts = [
        select(func.count())
        .select_from(TaskRow)
        .where(IS_FINISHED, search, TaskRow.status.not_in(keep))
        .scalar_subquery()
        for search in searches
    ]
    return sum((await session.execute(select(*counts))).one())


async def remove_old_tasks(
    write: Callable[[RemoveFinished, Apply], Awaitable[tuple[int, bool]]],
    cutoff: datetime,
    keep: tuple[TaskStatus, ...],
) -> int:
    """Remove tasks that finished before `cutoff`, in batches; return their number.

    Args:
        write: Runs a command in its own transaction, or in the caller's.
        keep: Statuses to keep.
    """
    command = RemoveFinished(cutoff, keep, CLEANUP_BATCH)
    total, removed, is_more = 0, 0, True
    while is_more:
        try:
            removed, is_more = await write(command, remove_finished)
        except StoreError as error:
            error.add_note(f"{total} tasks were removed before; call again for the rest")
            raise
        total += removed
    return total


@dataclass(frozen=True, slots=True)
class RemoveFinished:
    """Remove up to `limit` tasks that finished before `cutoff`, with their history.

    The result is their number, and true if there may be more. Tasks dated as far into the future
    are dated again, to this moment: their age is unknown, as a clock was ahead.
    """

    cutoff: datetime
    keep: tuple[TaskStatus, ...]
    limit: int


def remove_finished(
    transaction: WriteTransaction, commands: Sequence[RemoveFinished]
) -> Sequence[tuple[int, bool]]:
    """Apply `RemoveFinished` commands."""
    return [_remove_finished(transaction, command) for command in commands]


def _remove_finished(transaction: WriteTransaction, command: RemoveFinished) -> tuple[int, bool]:
    sql, present = statements_for(transaction.cursor.dialect), transaction.now
    now, cutoff, horizon = map(
        sql.to_moment, (present, command.cutoff, present + (present - command.cutoff))
    )
    finished, undated, future, far_future = sql.finished(command.keep)
    old: list[str] = []
    for search, *moments in ((finished, cutoff), (undated, cutoff), (future, now, cutoff)):
        found = transaction.cursor.execute(search, (*moments, command.limit - len(old)))
        old.extend(id for (id,) in found)
    found = transaction.cursor.execute(far_future, (now, horizon, _REDATE_BATCH_SIZE))
    # Sorted, so that both databases assign the same revisions.
    apply(transaction, [Remove(Task, id, with_history=True) for id in sorted(old)])
    redated = apply(transaction, [Redate(id) for (id,) in sorted(found)])
    return len(old), len(old) == command.limit or any(redated)


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
    seconds = check_number("days", days) * 86_400
    now = database.clock()
    cutoff = now - check_seconds("days", seconds)
    total = seen = 0
    ends: list[int] = []
    while True:
        changes = await database.read(partial(_read_times, since=seen))
        # A change dated by a clock that was ahead is as old as its neighbours.
        passed = list(takewhile(lambda one: not cutoff <= one[1] <= now, changes))
        old = [revision for revision, at in passed if at < cutoff]
        if old:
            # Earlier batches with dates in the future only are older than this one.
            for end in (*ends, old[-1]):
                removed: int = await database.write(compact, Compact(end))
                total += removed
            ends = []
        if len(passed) < COMPACTION_BATCH_SIZE:
            return total
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
    sql, cursor = statements_for(transaction.cursor.dialect), transaction.cursor
    newest, _ = counters_of(cursor.execute(sql.read_counters))
    counts = []
    for command in commands:
        # The newest change stays: a new cache reads the time of the last update from it.
        until = min(command.until, newest - 1)
        counts.append(len(cursor.execute(sql.forget_until, (until,))))
        if counts[-1]:
            cursor.execute(sql.write_compacted, (until,))
    return counts
