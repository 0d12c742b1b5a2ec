"""Measurement: the values of the metrics, from the commits of a process and from its database."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import datetime
from typing import Any, NamedTuple, Protocol
from weakref import WeakSet

from sqlalchemy import Connection, func, select, text

from openclaw_store.database import CounterRow, Database, NodeRow, TaskRow
from openclaw_store.domain import FINISHED as FINISHED_STATES
from openclaw_store.domain import WAITING, Task, TaskStatus
from openclaw_store.maintenance.stuck import Reason, find_stuck
from openclaw_store.observability import catalogue as metrics
from openclaw_store.observability.catalogue import Metric
from openclaw_store.repositories import Event, TasksAdded
from openclaw_store.state_manager import StateManager

MOST_STUCK = 500
"""Tasks that are read or counted for each reason."""

Record = Callable[[float, str], None]
"""Adds a value to a metric; the text is the value of its attribute, empty for none."""


class Sink(Protocol):
    """Where values go."""

    def recorder(self, metric: Metric) -> Record:
        """Return the function that records values of a counter or histogram."""


class Sample(NamedTuple):
    """A present value."""

    metric: Metric
    value: float
    attribute: str = ""


class Meter:
    """Records what the commits of a process do; part of a `Telemetry`."""

    def __init__(self, database: Database, sink: Sink) -> None:
        self._database = database
        self._managers: WeakSet[StateManager] = WeakSet()
        self._duration = sink.recorder(metrics.COMMIT_DURATION)
        self._size = sink.recorder(metrics.COMMIT_SIZE)
        self._refused = sink.recorder(metrics.REFUSALS)
        self._submitted = sink.recorder(metrics.SUBMITTED)
        self._claimed = sink.recorder(metrics.CLAIMED)
        self._finished = sink.recorder(metrics.FINISHED)
        self._waiting = sink.recorder(metrics.WAITING_TIME)
        self._running = sink.recorder(metrics.RUNNING_TIME)

    def attach(self, manager: Any) -> None:
        """Observe the memory of a manager."""
        self._managers.add(manager)

    def note_commit(
        self,
        operations: int,
        seconds: float | None,
        events: Sequence[Any],
        outcomes: Sequence[Any],
    ) -> None:
        """Record a commit."""
        if seconds is not None:
            self._duration(seconds, "")
            self._size(operations, "")
        for outcome in outcomes:
            if isinstance(outcome, Exception):
                self._refused(1, type(outcome).__name__)
        submitted = claimed = 0
        for event in events:
            if type(event) is Event and event.kind is Task:
                before, after = event.change.from_status, event.change.to_status
                if before == after:
                    continue
                if before is None:
                    submitted += 1
                elif after == TaskStatus.SCHEDULED:
                    claimed += 1
                elif after == TaskStatus.RUNNING:
                    self._note_time(self._waiting, event.record, "submitted_at", "started_at")
                elif after in FINISHED_STATES:
                    self._finished(1, after)
                    self._note_time(self._running, event.record, "started_at", "completed_at")
            elif type(event) is TasksAdded:
                submitted += len(event.rows)
        if submitted:
            self._submitted(submitted, "")
        if claimed:
            self._claimed(claimed, "")

    def _note_time(self, record: Record, task: Any, start: str, end: str) -> None:
        began, ended = getattr(task, start), getattr(task, end)
        if began is not None and ended is not None:
            record(max(0.0, (ended - began).total_seconds()), "")

    def of_process(self) -> Iterator[Sample]:
        """Yield the present values of this process."""
        figures = self._database.writer.figures()
        yield Sample(metrics.QUEUE, figures["queued_operations"])
        yield Sample(metrics.COMMIT_FAILURES, figures["failed_batches"])
        yield Sample(metrics.CONNECTIONS, figures["connections"])
        managers = [one for one in self._managers if one.is_initialized]
        yield Sample(metrics.CACHED, sum(one.cached_tasks for one in managers))

    def lag(self, revision: int) -> Sample:
        """Return the lag of the manager that is furthest behind the newest revision."""
        managers = [one for one in self._managers if one.is_initialized]
        return Sample(metrics.LAG, max([0, *(revision - one.version for one in managers)]))


def read_samples(connection: Connection, now: datetime) -> list[Sample]:
    """Read the present values of a database; a million tasks take a fraction of a second."""
    samples: list[Sample] = []
    for metric, row in ((metrics.TASKS, TaskRow), (metrics.NODES, NodeRow)):
        kind: Any = row.__table__.c["status"].type
        query = select(row.status, func.count()).group_by(row.status)
        counts: Mapping[Any, int] = {row[0]: row[1] for row in connection.execute(query)}
        samples += [Sample(metric, counts.get(one, 0), one.value) for one in kind.kind]
    oldest = [
        connection.scalar(select(func.min(TaskRow.submitted_at)).where(TaskRow.status == status))
        for status in sorted(WAITING)
    ]
    age = max([0.0, *((now - one).total_seconds() for one in oldest if one is not None)])
    samples.append(Sample(metrics.OLDEST, age))
    stuck = dict.fromkeys(Reason, 0)
    for group in find_stuck(connection, now, most=MOST_STUCK):
        stuck[group.reason] += group.count
    samples += [Sample(metrics.STUCK, count, reason.value) for reason, count in stuck.items()]
    revision = connection.execute(select(CounterRow.revision)).scalar() or 0
    samples.append(Sample(metrics.REVISION, revision))
    samples.append(
        Sample(metrics.SIZE, connection.execute(_SIZE[connection.dialect.name]).scalar() or 0)
    )
    return samples


_SIZE = {
    "sqlite": text("SELECT page_count * page_size FROM pragma_page_count, pragma_page_size"),
    "postgresql": text("SELECT pg_database_size(current_database())"),
}
