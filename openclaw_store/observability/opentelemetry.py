"""OpenTelemetry: metrics of a process, and spans of its calls and of its workers.

A task keeps the `traceparent` of its submitter. Its first attempt continues that trace, in another
process perhaps; later attempts begin traces of their own, which link to it.
"""

from __future__ import annotations

import asyncio
import functools
import inspect
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from typing import Any

from opentelemetry.context import Context, attach, detach
from opentelemetry.metrics import CallbackOptions, MeterProvider, Observation, get_meter
from opentelemetry.trace import (
    Link,
    SpanKind,
    Status,
    StatusCode,
    TracerProvider,
    get_current_span,
    get_tracer,
    set_span_in_context,
)
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

from openclaw_store.database import Database
from openclaw_store.database.telemetry import Handler
from openclaw_store.domain import Task
from openclaw_store.errors import logger_of
from openclaw_store.observability.catalogue import BUCKETS, METRICS, Kind, Metric
from openclaw_store.observability.measurement import Meter, Record, Sample, read_samples

logger = logger_of("observability")

NAME = "openclaw_store"

UNTRACED = frozenset({"initialize", "shutdown"})
"""Coroutines of a `StateManager` that have no span."""

SUBMITTING = frozenset({"add_task", "add_tasks", "submit_task"})
"""Calls that give new tasks the trace of their caller."""


class Instrumentation:
    """The telemetry of one database; `instrument` makes it."""

    def __init__(
        self,
        database: Database,
        meter_provider: MeterProvider | None,
        tracer_provider: TracerProvider | None,
    ) -> None:
        self._database = database
        self._otel = get_meter(NAME, meter_provider=meter_provider)
        self._tracer = get_tracer(NAME, tracer_provider=tracer_provider)
        self._propagator = TraceContextTextMapPropagator()
        self._meter = Meter(database, self)
        self.note_commit = self._meter.note_commit
        self._read: dict[Metric, list[Sample]] = {}
        for metric in METRICS:
            self._observe(metric)
        database.writer.telemetry += (self,)

    def remove(self) -> None:
        """Measure no further commits; managers and workers that exist keep their spans."""
        writer = self._database.writer
        writer.telemetry = tuple(one for one in writer.telemetry if one is not self)

    def recorder(self, metric: Metric) -> Record:
        """Return the function that records values of a counter or histogram."""
        if metric.kind is Kind.HISTOGRAM:
            record = self._otel.create_histogram(
                metric.name,
                metric.unit,
                metric.text,
                explicit_bucket_boundaries_advisory=BUCKETS[metric],
            ).record
        else:
            record = self._otel.create_counter(metric.name, metric.unit, metric.text).add
        key = metric.attribute
        if not key:
            return lambda value, _: record(value)
        return lambda value, attribute: record(value, {key: attribute})

    def attach(self, manager: Any) -> None:
        """Give each coroutine of a manager a span."""
        self._meter.attach(manager)
        for name, _ in inspect.getmembers(type(manager), inspect.iscoroutinefunction):
            if not name.startswith("_") and name not in UNTRACED:
                setattr(manager, name, self._span_of(name, getattr(manager, name)))

    def _span_of(self, name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        start = partial(
            self._tracer.start_span,
            f"openclaw_store {name}",
            kind=SpanKind.PRODUCER if name in SUBMITTING else SpanKind.CLIENT,
            attributes={"db.system.name": self._database.dialect, "db.operation.name": name},
        )
        if name not in SUBMITTING:

            @functools.wraps(call)
            async def traced(*given: Any, **options: Any) -> Any:
                with _Current(start()):
                    return await call(*given, **options)

            return traced

        @functools.wraps(call)
        async def submitting(tasks: Any, *given: Any, **options: Any) -> Any:
            span = start()
            with _Current(span):
                _mark([tasks] if isinstance(tasks, Task) else tasks, span.get_span_context())
                return await call(tasks, *given, **options)

        return submitting

    def traced(self, handler: Handler) -> Handler:
        """Return a handler that runs each task in a span of its own."""
        is_coroutine = inspect.iscoroutinefunction(handler) or inspect.iscoroutinefunction(
            type(handler).__call__
        )

        async def in_coroutine(task: Task, run: Any) -> Any:
            with self._attempt(task):
                return await handler(task, run)

        def in_thread(task: Task, run: Any) -> Any:
            with self._attempt(task):
                return handler(task, run)

        return in_coroutine if is_coroutine else in_thread  # type: ignore[return-value]  # the same

    @contextmanager
    def _attempt(self, task: Task) -> Iterator[None]:
        parent = Context()
        links: list[Link] = []
        if task.traceparent is not None:
            parent = self._propagator.extract({"traceparent": task.traceparent}, Context())
            if task.attempt > 1:
                links.append(Link(get_current_span(parent).get_span_context()))
                parent = Context()
        attributes = {
            "messaging.system": NAME,
            "messaging.operation.type": "process",
            "messaging.message.id": task.task_id,
            "openclaw.task.type": task.task_type.value,
            "openclaw.task.attempt": task.attempt,
        }
        with self._tracer.start_as_current_span(
            f"process {task.task_type.value}",
            context=parent,
            kind=SpanKind.CONSUMER,
            attributes=attributes,
            links=links,
        ):
            yield

    def _observe(self, metric: Metric) -> None:
        """Make the instrument of a metric that is read when the exporter asks."""
        if metric.kind is Kind.HISTOGRAM or metric in _RECORDED:
            return
        kind = "counter" if metric.kind is Kind.COUNTER else "gauge"
        make = getattr(self._otel, f"create_observable_{kind}")
        make(metric.name, [partial(self._present, metric)], metric.unit, metric.text)

    def _present(self, metric: Metric, _: CallbackOptions) -> list[Observation]:
        # One reading serves all metrics of a collection: each metric takes its part once.
        if metric not in self._read:
            self._read = self._samples()
        key = metric.attribute
        return [
            Observation(value, {key: attribute} if key else None)
            for _, value, attribute in self._read.pop(metric, [])
        ]

    def _samples(self) -> dict[Metric, list[Sample]]:
        """Read all present values on a thread; only those of the process if the database fails."""
        found = [*self._meter.of_process()]
        try:
            with ThreadPoolExecutor(1) as executor:
                read = executor.submit(asyncio.run, self._database.inspect(self._read_database))
                found += read.result()
        except Exception as error:  # the exporter must get the rest
            logger.warning("the metrics of the database could not be read: %s", error)
        samples: dict[Metric, list[Sample]] = {}
        for sample in found:
            samples.setdefault(sample.metric, []).append(sample)
        return samples

    def _read_database(self, connection: Any) -> list[Sample]:
        samples = read_samples(connection, self._database.clock())
        revision = next(int(one.value) for one in samples if one.metric.name.endswith("revision"))
        return [*samples, self._meter.lag(revision)]


class _Current:
    """Makes a span the present one; as `start_as_current_span`, which takes twice as long."""

    __slots__ = ("_span", "_token")

    def __init__(self, span: Any) -> None:
        self._span = span

    def __enter__(self) -> None:
        self._token = attach(set_span_in_context(self._span))

    def __exit__(self, _: object, error: BaseException | None, __: object) -> None:
        if error is not None:
            self._span.record_exception(error)
            self._span.set_status(Status(StatusCode.ERROR, f"{type(error).__name__}: {error}"))
        detach(self._token)
        self._span.end()


def _mark(tasks: Any, context: Any) -> None:
    """Give the trace of a span, in the form of W3C Trace Context, to tasks without a trace."""
    if context.is_valid and isinstance(tasks, Sequence):
        flags = int(context.trace_flags)
        parent = f"00-{context.trace_id:032x}-{context.span_id:016x}-{flags:02x}"
        for task in tasks:
            if isinstance(task, Task) and task.traceparent is None:
                task.traceparent = parent


_RECORDED = frozenset(
    one
    for one in METRICS
    if one.kind is Kind.COUNTER
    and not one.name.startswith(("openclaw.store.commit", "openclaw.store.writer"))
)
"""Counters that are recorded as it happens."""
