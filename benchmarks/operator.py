"""The page, the questions of operators, and the cost of metrics and traces.

A benchmark of this module belongs to the group `operator`: add it to `BENCHMARKS`.
"""

from __future__ import annotations

import asyncio
import os
import sys
from collections.abc import Awaitable, Callable, Sequence
from datetime import timedelta
from functools import partial
from itertools import count
from pathlib import Path
from time import perf_counter, process_time
from typing import Any

from httpx import ASGITransport, AsyncClient
from sqlalchemy import Connection, insert, literal, select, update

from benchmarks.measure import Bench, Benchmark, Figure, Line, Sample, at_most, percentile
from benchmarks.processes import Kind, database_of
from benchmarks.robust import full_store
from benchmarks.work import make_task
from devtools.postgres import free_port
from openclaw_store import Database, StateManager, Task, TaskStatus, verify
from openclaw_store.database import ChangeRow, CounterRow, TaskRow
from openclaw_store.maintenance.failures import find_failures
from openclaw_store.maintenance.statistics import read_statistics
from openclaw_store.maintenance.stuck import find_stuck
from openclaw_store.observability import instrument
from openclaw_store.web import app

_PATHS = {
    "overview": "/",
    "tasks": "/tasks",
    "failed": "/tasks?status=failed",
    "node": "/tasks?node=node-0007",
    "task": "/task?id=task-000000007",
    "changes": "/changes",
}
_BROWSERS, _CHANGES_PER_SECOND = 100, 100
_HOUR = timedelta(hours=1)


async def _fail_some(store: StateManager) -> None:
    """Let one task in a hundred fail, with different texts."""
    wanted = TaskRow.task_id.like("%03"), TaskRow.status == TaskStatus.COMPLETED
    text = literal("page ") + TaskRow.task_id + " is torn"
    async with store.db.transaction(timeout=300) as tx:
        await tx.execute(
            update(TaskRow).where(*wanted).values(status=TaskStatus.FAILED, error=text),
            execution_options={"synchronize_session": False},
        )


async def page(bench: Bench, *, kind: Kind) -> Sequence[Figure]:
    """Measure the time to the answer of each page, and of each question."""
    async with full_store(bench, kind) as store:
        await _fail_some(store)
        program = app(store)
        until = store.db.clock()
        questions: dict[str, Callable[[Connection], object]] = {
            "stuck": partial(find_stuck, now=until),
            "failures": partial(
                find_failures, sql=store.db.statements, since=until - _HOUR * 24 * 3650
            ),
            "statistics": partial(
                read_statistics,
                sql=store.db.statements,
                since=until - _HOUR * 24 * 3650,
                until=until,
            ),
        }
        transport = ASGITransport(program)
        async with AsyncClient(transport=transport, base_url="http://localhost") as client:

            async def get(path: str) -> None:
                (await client.get(path)).raise_for_status()

            async def ask(question: Callable[[Connection], object]) -> None:
                await store.db.read(
                    lambda session: session.run_sync(lambda sync: question(sync.connection()))
                )

            calls: dict[str, Callable[[], Awaitable[None]]] = {
                **{name: partial(get, path) for name, path in _PATHS.items()},
                **{name: partial(ask, question) for name, question in questions.items()},
            }
            for call in calls.values():
                await call()
            measured = await bench.interleave(
                {name: partial(_median, bench, call) for name, call in calls.items()}
            )
        await program.state.stop()
    times = [measured[name]["ms"] for name in calls]
    return [Figure(time, f"{time:.1f} ms", "") for time in times]


async def _median(bench: Bench, call: Callable[[], Awaitable[None]]) -> Sample:
    times: list[float] = []
    for _ in range(max(3, bench.scaled(9))):
        began = perf_counter()
        await call()
        times.append(perf_counter() - began)
    return {"ms": percentile(times, 0.5) * 1e3}


def _opened(location: Any) -> StateManager:
    return StateManager(Database(location), None, cache=False)


async def watching(bench: Bench) -> Sequence[Figure]:
    """Measure the processor time of a server while browsers watch."""
    seconds = bench.scaled(100) / 10
    async with database_of(bench, "sqlite") as location, _opened(location) as store:
        await store.add_task(make_task(0))
        port = free_port()
        command = ["-m", "openclaw_store", "-d", str(location), "web", "--port", str(port)]
        server = await asyncio.create_subprocess_exec(
            sys.executable, *command, stderr=asyncio.subprocess.DEVNULL
        )
        try:
            measured = await bench.interleave(
                {
                    "none": partial(_watch, store, server.pid, port, 0, seconds),
                    "all": partial(_watch, store, server.pid, port, _BROWSERS, seconds),
                }
            )
        finally:
            server.terminate()
            await server.wait()
    share = measured["all"]["share"]
    return [Figure(share, f"{share:.1f} %", f"{measured['none']['share']:.1f} % with none")]


_numbers = count(1)


async def _watch(store: StateManager, pid: int, port: int, browsers: int, seconds: float) -> Sample:
    """Return the percentage of a core that the server uses."""

    async def browse() -> None:
        while True:
            try:
                reader, writer = await asyncio.open_connection("127.0.0.1", port)
                break
            except OSError:
                await asyncio.sleep(0.05)
        writer.write(b"GET /events HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n")
        connected.append(writer)
        while await reader.read(1 << 16):
            pass

    connected: list[asyncio.StreamWriter] = []
    readers = [asyncio.ensure_future(browse()) for _ in range(max(1, browsers))]
    while len(connected) < len(readers):  # noqa: ASYNC110 - nothing else tells it
        await asyncio.sleep(0.02)
    await asyncio.sleep(0.3)
    if not browsers:
        connected[0].close()
    began, used = perf_counter(), _processor_seconds(pid)
    while perf_counter() - began < seconds:
        await store.add_task(make_task(next(_numbers)))
        await asyncio.sleep(1 / _CHANGES_PER_SECOND)
    share = 100 * (_processor_seconds(pid) - used) / (perf_counter() - began)
    for reader in readers:
        reader.cancel()
    await asyncio.wait(readers)
    for writer in connected:
        writer.close()
    return {"share": share}


def _processor_seconds(pid: int) -> float:
    fields = Path(f"/proc/{pid}/stat").read_text(encoding="ascii").rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


async def telemetry(bench: Bench) -> Sequence[Figure]:
    """Measure what metrics and traces add to the processor time of an operation."""
    from opentelemetry.sdk.metrics import MeterProvider
    from opentelemetry.sdk.metrics.export import InMemoryMetricReader
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.trace import NoOpTracerProvider, SpanKind

    meters, tracers = MeterProvider([InMemoryMetricReader()]), TracerProvider()
    tracer = tracers.get_tracer("by hand")
    attributes = {"db.system.name": "sqlite", "db.operation.name": "add_task"}

    async def add_by_hand(store: StateManager, task: Task) -> None:
        """Add a task in a span that no store has made: the SDK alone."""
        span = tracer.start_span("add_task", kind=SpanKind.PRODUCER, attributes=attributes)
        await StateManager.add_task(store, task)
        span.end()

    given: dict[str, dict[str, Any]] = {
        "nothing": {},
        "by hand": {},
        "metrics": {"meter_provider": meters, "tracer_provider": NoOpTracerProvider()},
        "both": {"meter_provider": meters, "tracer_provider": tracers},
    }

    async def work(name: str, options: dict[str, Any]) -> Sample:
        tasks = bench.scaled(20_000, 200)
        async with database_of(bench, "sqlite") as location:
            database = Database(location)
            if options:
                instrument(database, **options)
            async with StateManager(database, None) as store:
                calls: dict[str, Callable[[StateManager, Task], Awaitable[object]]] = {
                    "by hand": add_by_hand,
                    "both": _add_with_span,
                }
                add = calls.get(name, StateManager.add_task)
                began = process_time()
                for start in range(0, tasks, 200):
                    batch = [make_task(number) for number in range(start, start + 200)]
                    await asyncio.gather(*(add(store, one) for one in batch))
                return {"us": (process_time() - began) / tasks * 1e6}

    measured = await bench.interleave(
        {name: partial(work, name, one) for name, one in given.items()}
    )
    meters.shutdown()
    tracers.shutdown()
    base, by_hand, metrics, both = (measured[name]["us"] for name in given)
    shown = f"{base:.1f} µs without"
    return [
        Figure(metrics - base, f"{metrics:.1f} µs", shown),
        Figure(both - by_hand, f"{both:.1f} µs", f"{by_hand:.1f} µs by hand"),
    ]


async def _add_with_span(store: StateManager, task: Task) -> bool:
    return await store.add_task(task)  # not that of the class, which has no span


async def verifying(bench: Bench, *, kind: Kind) -> Sequence[Figure]:
    """Measure `verify` of many tasks, each with a change."""
    columns: dict[str, Any] = {
        "revision": TaskRow.version,
        "changed_at": TaskRow.submitted_at,
        "item": literal("task"),
        "item_id": TaskRow.task_id,
        "kind": literal("created"),
        "to_status": TaskRow.status,
        "node": TaskRow.assigned_node,
    }
    async with full_store(bench, kind) as store:
        async with store.db.transaction(timeout=300) as tx:
            await tx.execute(insert(ChangeRow).from_select([*columns], select(*columns.values())))
            await tx.execute(update(CounterRow).values(compacted=0))

        async def check() -> Sample:
            began = perf_counter()
            if not await verify(store.db):
                raise RuntimeError("the database has a problem")
            return {"s": perf_counter() - began}

        seconds = (await bench.interleave({"verify": check}))["verify"]["s"]
    return [Figure(seconds, f"{seconds:.1f} s", "")]


def _verifying_of(kind: Kind) -> Benchmark:
    is_server = kind == "postgresql"
    prefix, title = ("pg-", "PostgreSQL") if is_server else ("", "SQLite")
    return Benchmark(
        f"{prefix}verify",
        partial(verifying, kind=kind),
        (Line(f"{title}: verify of 1,000,000 tasks and their changes", "s", at_most(20, 10)),),
        needs_server=is_server,
    )


def _page_of(kind: Kind) -> Benchmark:
    is_server = kind == "postgresql"
    prefix, title = ("pg-", "PostgreSQL") if is_server else ("", "SQLite")
    return Benchmark(
        f"{prefix}page",
        partial(page, kind=kind),
        (
            Line(f"{title}, 1,000,000 tasks: the page's overview", "ms", at_most(20, 10)),
            Line("… all tasks", "ms", at_most(50, 25)),
            Line("… failed tasks", "ms", at_most(50, 25)),
            Line("… tasks of a node", "ms", at_most(50, 25)),
            Line("… a task", "ms", at_most(50, 25)),
            Line("… changes", "ms", at_most(50, 25)),
            Line("… stuck tasks, for a command", "ms", at_most(1000, 300)),
            Line("… failures, for a command", "ms", at_most(1000, 300)),
            Line(
                "… statistics of a period with all tasks, for a command", "ms", at_most(1000, 300)
            ),
        ),
        needs_server=is_server,
    )


BENCHMARKS = (
    _page_of("sqlite"),
    _page_of("postgresql"),
    _verifying_of("sqlite"),
    _verifying_of("postgresql"),
    Benchmark(
        "watching",
        watching,
        (
            Line(
                "The page's share of a core while 100 browsers watch 100 changes/s",
                "%",
                at_most(10, 5),
            ),
        ),
    ),
    Benchmark(
        "telemetry",
        telemetry,
        (
            Line("Processor time that metrics add to add_task", "µs", at_most(2, 1)),
            Line(
                "… metrics and traces, beside the SDK's own time for a span", "µs", at_most(17, 9)
            ),
        ),
    ),
)
"""The benchmarks of the group `operator`."""
