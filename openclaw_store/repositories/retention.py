"""Retention: what is old is removed, be it finished tasks or changes in the feed.

That is done in batches, so that others write in between.
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
from openclaw_store.repositories.commands import Remove
from openclaw_store.repositories.unit_of_work import Row, SingleRowCommand, apply, counters_of

CLEANUP_BATCH = 200
"""Tasks that one transaction of `cleanup_old_tasks` removes; others write in between."""

_REDATED_AT_ONCE = 20
"""Tasks that are read one by one while nobody else can write."""

COMPACTION_BATCH_SIZE = 1000
"""Changes removed at a stretch, before others write."""

task_status = check_enum(TaskStatus)


def cutoff_and_kept(
    now: datetime, days: float, keep_status: TaskStatus | Iterable[TaskStatus] | None
) -> tuple[datetime, tuple[TaskStatus, ...]]:
    """The moment before which tasks must have finished to be old, and the statuses to keep.

    Raises:
        InvalidDataError: If `days` is no age, or there is no such status.
    """
    kept: Iterable[Any] = () if keep_status is None else [keep_status]
    if isinstance(keep_status, Iterable) and not isinstance(keep_status, str):
        kept = keep_status
    keep = tuple(task_status("keep_status", status) for status in kept)
    try:
        return now - timedelta(days=check_number("days", days)), keep
    except OverflowError as error:
        raise InvalidDataError("days", f"is too large: {days}") from error


async def count_old_tasks(
    session: AsyncSession, *, cutoff: datetime, keep: Sequence[TaskStatus], now: datetime
) -> int:
    """How many tasks `remove_old_tasks` would remove."""
    searches = [  # each in order of an index
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
    """Remove tasks that finished before `cutoff`, in batches; returns how many there were.

    Args:
        write: Does an operation in a transaction of its own, or in the caller's.
        keep: Status of tasks not to be removed.
    """
    operation = RemoveFinished(cutoff, keep, CLEANUP_BATCH)
    total, removed, is_more = 0, 0, True
    while is_more:
        try:
            removed, is_more = await write(operation, remove_finished)
        except StoreError as error:
            error.add_note(f"{total} tasks were removed before; call again for the rest")
            raise
        total += removed
    return total


@dataclass(frozen=True, slots=True)
class RemoveFinished:
    """Remove up to `limit` tasks that finished before `cutoff`, with their history.

    Results in how many there were, and whether there may be more to do. Those that finished as long
    after this moment, by a clock that was ahead, count from now on: nothing else tells how old they
    are.
    """

    cutoff: datetime
    keep: tuple[TaskStatus, ...]
    limit: int


def remove_finished(
    transaction: WriteTransaction, operations: Sequence[RemoveFinished]
) -> Sequence[tuple[int, bool]]:
    """Apply `RemoveFinished` operations."""
    return [_remove_finished(transaction, operation) for operation in operations]


def _remove_finished(transaction: WriteTransaction, operation: RemoveFinished) -> tuple[int, bool]:
    sql = statements_for(transaction.cursor.dialect)
    moments = (
        transaction.now,
        operation.cutoff,
        transaction.now + (transaction.now - operation.cutoff),
    )
    now, cutoff, as_far_ahead = map(sql.to_moment, moments)
    told, untold, early, astray = sql.finished(operation.keep)
    old: list[str] = []
    for search, *given in ((told, cutoff), (untold, cutoff), (early, now, cutoff)):
        found = transaction.cursor.execute(search, (*given, operation.limit - len(old)))
        old.extend(id for (id,) in found)
    found = transaction.cursor.execute(astray, (now, as_far_ahead, _REDATED_AT_ONCE))
    removals = [Remove(Task, id, with_history=True) for id in sorted(old)]
    apply(transaction, removals)
    redated = apply(transaction, [Redate(id) for (id,) in sorted(found)])
    return len(old), len(old) == operation.limit or any(redated)


@dataclass(frozen=True, slots=True)
class Redate(SingleRowCommand):
    """Have a task count as changed now, as it was by a clock that was ahead.

    Results in whether it does; one that cannot be read does not.
    """

    id: str
    kind: ClassVar[type[Any]] = Task

    def decide(self, row: Row) -> bool:
        try:
            task = row.content()
        except InvalidDataError:  # `verify` tells of it
            return False
        if task is None:
            return False
        row.write(task.evolve(), (), TURNED_BACK)
        return True


async def compact_feed(database: Database, days: float) -> int:
    """Remove the changes that are older from the feed, in batches; returns how many there were.

    Raises:
        InvalidDataError: If `days` is no age.
    """
    seconds = check_number("days", days) * 86_400
    now = database.clock()
    cutoff = now - check_seconds("days", seconds)
    total = seen = 0
    ends: list[int] = []
    while True:
        changes = await database.read(partial(_dated, since=seen))
        # A change by a clock that was ahead is as old as those around it.
        passed = list(takewhile(lambda one: not cutoff <= one[1] <= now, changes))
        old = [revision for revision, at in passed if at < cutoff]
        if old:
            for end in (*ends, old[-1]):
                removed: int = await database.write(compact, Compact(end))
                total += removed
            ends = []
        if len(passed) < COMPACTION_BATCH_SIZE:
            return total
        seen, _ = passed[-1]
        ends.append(seen)


async def _dated(session: AsyncSession, since: int) -> Sequence[tuple[int, datetime]]:
    columns = ChangeRow.revision, ChangeRow.changed_at
    query = select(*columns).where(ChangeRow.revision > since).order_by(ChangeRow.revision)
    found = await session.execute(query.limit(COMPACTION_BATCH_SIZE))
    return [(row.revision, row.changed_at) for row in found]


@dataclass(frozen=True, slots=True)
class Compact:
    """Remove the changes up to a revision from the feed, but never the newest one of all.

    Results in how many there were.
    """

    until: int


def compact(transaction: WriteTransaction, operations: Sequence[Compact]) -> Sequence[int]:
    """Apply `Compact` operations."""
    sql, cursor = statements_for(transaction.cursor.dialect), transaction.cursor
    newest, _ = counters_of(cursor.execute(sql.read_counters))
    counts = []
    for operation in operations:
        until = min(operation.until, newest - 1)
        counts.append(len(cursor.execute(sql.forget_until, (until,))))
        if counts[-1]:
            cursor.execute(sql.write_compacted, (until,))
    return counts
