"""Statistics of a period: tasks submitted, finished and failed, and the times that they took.

Numbers come from indexes, and are exact. Times come from a sample, taken in equal parts of the
period; each task of it counts for the tasks that it represents.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from itertools import pairwise
from typing import Any

from sqlalchemy import Connection, func, select

from openclaw_store.database import HAS_FAILED, Statements, TaskRow
from openclaw_store.domain import TaskStatus

_BY_COMPLETION = "INDEXED BY ix_tasks_completed_at"


@dataclass(frozen=True)
class Interval:
    """Numbers of tasks in a part of the period."""

    at: datetime
    """Its beginning."""
    submitted: int
    finished: int
    """Tasks that ended in any way; failed ones are among them."""
    failed: int
    """Tasks that failed or timed out."""


@dataclass(frozen=True)
class Quantiles:
    """Seconds that half, 95 % and 99 % of the tasks took at most."""

    p50: float
    p95: float
    p99: float


@dataclass(frozen=True)
class Timing:
    """The times of tasks that ended in a part of the period."""

    at: datetime
    """Its beginning."""
    waiting: Quantiles | None
    """From the submission to the start; `None` if no task was started."""
    running: Quantiles | None
    """From the start to the end."""


@dataclass(frozen=True)
class Statistics:
    """The figures of a period."""

    since: datetime
    until: datetime
    intervals: Sequence[Interval]
    waiting: Quantiles | None
    running: Quantiles | None
    timings: Sequence[Timing]
    """The times in equal parts of the period."""
    by: Mapping[str, Mapping[str, int]]
    """Finished tasks by `node`, `user` and `type`, most first; estimates if `is_sampled`."""
    is_sampled: bool
    """True if only a sample of the tasks was timed."""


@dataclass(frozen=True)
class _Sampled:
    """A finished task of the sample."""

    row: Any
    weight: float
    """The tasks that it represents."""


def read_intervals(
    connection: Connection, since: datetime, until: datetime, count: int
) -> list[Interval]:
    """Count the tasks that were submitted, finished and failed in equal parts of a period."""
    row, ends = TaskRow, [since + (until - since) / count * part for part in range(count + 1)]
    submitted = _count(connection, row.submitted_at, ends, row.status.in_(list(TaskStatus)))
    finished = _count(connection, row.completed_at, ends, hint=_BY_COMPLETION)
    hint = "INDEXED BY ix_tasks_failed"
    failed = _count(connection, row.completed_at, ends, HAS_FAILED, hint=hint)
    numbers = zip(ends, submitted, finished, failed, strict=False)
    return [Interval(*one) for one in numbers]


def merged(intervals: Sequence[Interval], count: int) -> list[Interval]:
    """Return the numbers in fewer parts, each with the same number of intervals."""
    size = len(intervals) // count
    parts = (intervals[start : start + size] for start in range(0, count * size, size))
    return [
        Interval(
            part[0].at,
            sum(one.submitted for one in part),
            sum(one.finished for one in part),
            sum(one.failed for one in part),
        )
        for part in parts
    ]


def read_timings(
    connection: Connection,
    sql: Statements,
    intervals: Sequence[Interval],
    until: datetime,
    *,
    most: int = 100,
) -> Statistics:
    """Sample the finished tasks of a period.

    Args:
        sql: The statements of the database.
        intervals: The parts of the period, with the numbers of tasks.
        until: The end of the period.
        most: Maximum number of tasks that are read for each part.
    """
    ends = [*(one.at for one in intervals[1:]), until]
    sample: list[_Sampled] = []
    timings: list[Timing] = []
    for interval, end in zip(intervals, ends, strict=True):
        tasks = _finished(connection, interval.at, end, most)
        weight = max(1.0, interval.finished / len(tasks)) if tasks else 0.0
        part = [_Sampled(task, weight) for task in tasks]
        timings.append(Timing(interval.at, _waiting(part), _running(part)))
        sample += part
    by: dict[str, Counter[str]] = {"node": Counter(), "user": Counter(), "type": Counter()}
    for one in sample:
        for name, value in (
            ("node", one.row.assigned_node),
            ("user", sql.open_text(one.row.user_id, one.row.task_id)),
            ("type", one.row.task_type.value),
        ):
            if value is not None:
                by[name][value] += one.weight  # type: ignore[assignment]  # rounded below
    return Statistics(
        intervals[0].at,
        until,
        intervals,
        _waiting(sample),
        _running(sample),
        timings,
        {name: {key: round(n) for key, n in found.most_common()} for name, found in by.items()},
        any(one.weight > 1 for one in sample),
    )


def read_statistics(
    connection: Connection,
    sql: Statements,
    since: datetime,
    until: datetime,
    *,
    parts: int = 60,
    most: int = 100,
) -> Statistics:
    """Return the figures of a period in equal parts."""
    intervals = read_intervals(connection, since, until, parts)
    return read_timings(connection, sql, intervals, until, most=most)


def _count(
    connection: Connection,
    column: Any,
    ends: Sequence[datetime],
    *conditions: Any,
    hint: str = "",
) -> Sequence[int]:
    """Count tasks by the part of the period in which a time lies: each is a range of an index."""
    counts = [
        select(func.count())
        .select_from(TaskRow)
        .where(column >= begin, column < end, *conditions)
        .with_hint(TaskRow.__table__, hint, "sqlite")
        .scalar_subquery()
        for begin, end in pairwise(ends)
    ]
    return connection.execute(select(*counts)).one()


def _finished(connection: Connection, since: datetime, until: datetime, most: int) -> Sequence[Any]:
    row = TaskRow
    query = (
        select(row.submitted_at, row.started_at, row.completed_at)
        .add_columns(row.task_id, row.assigned_node, row.user_id, row.task_type)
        .where(row.completed_at >= since, row.completed_at < until)
        .with_hint(TaskRow.__table__, _BY_COMPLETION, "sqlite")
        .order_by(row.completed_at)
        .limit(most)
    )
    return connection.execute(query).all()


def _waiting(sample: Sequence[_Sampled]) -> Quantiles | None:
    return _between(sample, "submitted_at", "started_at")


def _running(sample: Sequence[_Sampled]) -> Quantiles | None:
    return _between(sample, "started_at", "completed_at")


def _between(sample: Sequence[_Sampled], start: str, end: str) -> Quantiles | None:
    """Return the quantiles of the seconds between two times, of the tasks that have started."""
    return _quantiles(
        [
            ((getattr(one.row, end) - getattr(one.row, start)).total_seconds(), one.weight)
            for one in sample
            if one.row.started_at is not None
        ]
    )


def _quantiles(weighted: list[tuple[float, float]]) -> Quantiles | None:
    """Return the quantiles of values, each with its weight."""
    if not weighted:
        return None
    weighted.sort()
    total = sum(weight for _, weight in weighted)

    def at(share: float) -> float:
        passed = 0.0
        for value, weight in weighted:  # noqa: B007 - the last one counts
            passed += weight
            if passed >= share * total:
                break
        return max(0.0, value)

    return Quantiles(at(0.5), at(0.95), at(0.99))
