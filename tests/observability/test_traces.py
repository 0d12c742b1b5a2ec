"""Traces: from the submitter to the worker, over a retry, through the database."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator, Sequence
from typing import Any

import pytest
from conftest import PATIENCE, Location, MakeTask
from opentelemetry import trace
from opentelemetry.sdk.trace import ReadableSpan, TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import SpanKind, StatusCode

from openclaw_store import (
    Backoff,
    Database,
    DuplicateError,
    NodeInfo,
    Run,
    StateManager,
    Task,
    Worker,
)
from openclaw_store.observability import instrument


@pytest.fixture
def exporter() -> InMemorySpanExporter:
    return InMemorySpanExporter()


@pytest.fixture
def provider(exporter: InMemorySpanExporter) -> Iterator[TracerProvider]:
    provider = TracerProvider(shutdown_on_exit=False)
    provider.add_span_processor(SimpleSpanProcessor(exporter))
    yield provider
    provider.shutdown()


def named(exporter: InMemorySpanExporter, name: str) -> Sequence[ReadableSpan]:
    return [span for span in exporter.get_finished_spans() if span.name == name]


def context_of(span: ReadableSpan) -> Any:
    assert span.context is not None
    return span.context


@pytest.mark.parametrize("is_coroutine", [True, False])
async def test_trace_goes_from_the_submitter_to_the_worker_and_retries_link_to_it(
    location: Location,
    database: Database,
    provider: TracerProvider,
    exporter: InMemorySpanExporter,
    make_task: MakeTask,
    is_coroutine: bool,
) -> None:
    instrument(database, tracer_provider=provider)
    at_work = Database(location)
    instrument(at_work, tracer_provider=provider)
    calls: list[Any] = []

    def work(task: Task, run: Run) -> str:
        calls.append(trace.get_current_span().get_span_context())
        if len(calls) == 1:
            raise OSError("no paper")
        return "done"

    async def work_in_coroutine(task: Task, run: Run) -> str:
        return work(task, run)

    fast = Backoff(first_seconds=0.001)
    async with (
        StateManager(database) as submitter,
        StateManager(at_work, cache=False, backoff=fast) as manager,
    ):
        node = NodeInfo("atlas", "atlas")
        worker = Worker(manager, node, work_in_coroutine if is_coroutine else work)
        running = asyncio.ensure_future(worker.run())
        tracer = provider.get_tracer("test")
        with tracer.start_as_current_span("request") as request:
            task = make_task(task_id="t")
            await submitter.add_task(task)
        await submitter.wait_for_task("t", PATIENCE)
        worker.stop()
        await running
        stored = await submitter.get_task("t")

    [added] = named(exporter, "openclaw_store add_task")
    first, second = named(exporter, "process batch")
    assert added.kind is SpanKind.PRODUCER
    assert added.parent is not None
    assert added.parent.span_id == request.get_span_context().span_id
    assert stored is not None
    assert stored.traceparent == task.traceparent
    of_added = f"00-{context_of(added).trace_id:032x}-{context_of(added).span_id:016x}-"
    assert str(stored.traceparent).startswith(of_added)
    assert (first.kind, second.kind) == (SpanKind.CONSUMER, SpanKind.CONSUMER)
    assert context_of(first).trace_id == request.get_span_context().trace_id
    assert first.parent is not None
    assert first.parent.span_id == context_of(added).span_id
    assert first.status.status_code is StatusCode.ERROR
    assert second.parent is None
    assert context_of(second).trace_id != context_of(first).trace_id
    assert [link.context.span_id for link in second.links] == [context_of(added).span_id]
    assert [one.span_id for one in calls] == [context_of(first).span_id, context_of(second).span_id]
    assert second.attributes is not None
    assert second.attributes["openclaw.task.attempt"] == 2


async def test_each_call_has_a_span_and_keeps_its_result_and_error(
    database: Database,
    provider: TracerProvider,
    exporter: InMemorySpanExporter,
    make_task: MakeTask,
) -> None:
    instrument(database, tracer_provider=provider)
    async with StateManager(database, None) as manager:
        await manager.add_tasks([make_task(task_id="a"), make_task(task_id="b", traceparent=None)])
        known = await manager.get_task("a")
        with pytest.raises(DuplicateError):
            await manager.add_task(make_task(task_id="a"))
        stats = await manager.get_task_stats()

    [add] = named(exporter, "openclaw_store add_tasks")
    [refused] = named(exporter, "openclaw_store add_task")
    assert known is not None
    assert known.traceparent is not None
    assert f"{context_of(add).span_id:016x}" in known.traceparent
    assert stats["pending"] == 2
    assert refused.status.status_code is StatusCode.ERROR
    assert dict(add.attributes or {}) == {
        "db.system.name": database.dialect,
        "db.operation.name": "add_tasks",
    }
    assert named(exporter, "openclaw_store get_task_stats")


@pytest.mark.sqlite
async def test_trace_of_a_caller_is_kept(
    database: Database, provider: TracerProvider, make_task: MakeTask
) -> None:
    instrument(database, tracer_provider=provider)
    own = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
    async with StateManager(database, None) as manager:
        await manager.add_task(make_task(task_id="t", traceparent=own))
        stored = await manager.get_task("t")

    assert stored is not None
    assert stored.traceparent == own
