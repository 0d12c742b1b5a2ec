"""The whole life of a task, as `Worker` runs it: claimed, started, run, and reported.

The reference commits each of the three steps on its own, as a worker without this library does;
huey, Procrastinate and PgQueuer are described in `peers` and `job_queue`. The tasks are added
before the clock starts. All work is done in one process.

Besides: the time from the commit of a new task to the call of its handler, of a worker that was
idle, in the same process and in another one; and the share of a core that an idle worker takes.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from contextlib import AsyncExitStack, closing
from dataclasses import replace
from datetime import UTC, datetime
from functools import partial
from itertools import count as counter
from pathlib import Path
from time import perf_counter, process_time
from typing import Any

import orjson

from benchmarks import job_queue, peers
from benchmarks.claims import CLAIM, CLAIM_ON_SERVER, make_node
from benchmarks.measure import Bench, Contender, Figure, Sample, Skipped, percentile
from benchmarks.peers import RESULT, Clock
from benchmarks.processes import Kind, database_of, processes, start_together
from benchmarks.work import (
    connect,
    connected,
    fill,
    fill_server,
    make_task,
    require_durable_server,
    rows,
)
from benchmarks.writes import faster
from openclaw_store import Database, NodeInfo, Run, StateManager, Task, Worker
from openclaw_store.database.types import to_microseconds

WORKERS = 1, 16, 64
"""Tasks that run at a time."""

WARM_UP = 64
"""Lives before the measurement."""

IDLE_SECONDS = 20

PAUSE_SECONDS = 0.05
"""Pause before each new task, in which the worker becomes idle."""

_START = "UPDATE tasks SET started_at = {} WHERE task_id = {}"
_COMPLETE = (
    "UPDATE tasks SET status = 'completed', completed_at = {}, result = {} WHERE task_id = {}"
)
_RESULT = orjson.dumps(RESULT).decode()

Life = Callable[[], Awaitable[object]]
"""Claims, starts and completes a task."""


async def life(bench: Bench, *, kind: Kind) -> Sequence[Figure | Skipped]:
    """Measure lives of a task by 1, 16 and 64 workers of one process."""
    # One worker makes a commit for each task, and 64 of them one for many tasks.
    counts = {1: bench.scaled(1000, 20), 16: bench.scaled(4000, 20), 64: bench.scaled(8000, 20)}
    most = counts[64] + WARM_UP + 64
    async with AsyncExitStack() as databases:
        enter = databases.enter_async_context
        tasks = await enter(database_of(bench, kind))
        contenders: dict[str, Contender] = {}

        def add(name: str, live: Callable[..., Awaitable[Sample]], source: str, of: int) -> None:
            async def contend() -> Sample:
                async with database_of(bench, kind, source) as location:
                    return await live(location, of, counts[of])

            contenders[f"{name}, {of}"] = contend

        if kind == "sqlite":
            fill(Path(tasks), rows(most))
            for number in WORKERS:
                add("openclaw_store", _live_ours, tasks, number)
                add("sqlite3", _live_by_sqlite3, tasks, number)
            if peers.has_huey():
                contenders["huey, 64"] = partial(_live_by_huey, bench, counts[64])
        else:
            await fill_server(tasks, rows(most))
            for number in WORKERS:
                add("openclaw_store", _live_ours, tasks, number)
                add("asyncpg", _live_by_asyncpg, tasks, number)
            if job_queue.is_installed():
                jobs = await enter(database_of(bench, kind))
                await job_queue.fill(jobs, counts[1] + WARM_UP + 64)
                add("PgQueuer", _live_by_pgqueuer, jobs, 1)
            if peers.has_procrastinate():
                jobs = await enter(database_of(bench, kind))
                await peers.fill_procrastinate(jobs, counts[1] + WARM_UP)
                add("Procrastinate", _live_by_procrastinate, jobs, 1)
        medians = await bench.interleave(contenders)

    def against(other: str, of: int, missing: Skipped) -> Figure | Skipped:
        name = f"{other}, {of}"
        return (
            faster(medians[f"openclaw_store, {of}"], medians[name]) if name in medians else missing
        )

    bare = "sqlite3" if kind == "sqlite" else "asyncpg"
    figures = [against(bare, number, peers.NO_HUEY) for number in WORKERS]
    if kind == "sqlite":
        return [*figures, against("huey", 64, peers.NO_HUEY)]
    return [
        *figures,
        against("PgQueuer", 1, job_queue.MISSING),
        against("Procrastinate", 1, peers.NO_PROCRASTINATE),
    ]


async def idle(bench: Bench, *, kind: Kind) -> Sequence[Figure]:
    """Measure the start of a task by an idle worker, and the time that an idle worker takes."""
    tasks, seconds = bench.scaled(100, 5), bench.scaled(IDLE_SECONDS, 2)

    async def start_here() -> Sample:
        starts: dict[str, float] = {}
        async with database_of(bench, kind) as at, StateManager(Database(at)) as state:
            worker = Worker(state, _node(), partial(_note, starts))
            running = asyncio.create_task(worker.run())
            commits = await _submit(state, tasks)
            worker.stop()
            await running
        return _delays(commits, starts)

    async def start_elsewhere() -> Sample:
        async with database_of(bench, kind) as at, processes(2) as run:
            working = asyncio.ensure_future(run(_serve, at, tasks))
            commits = await run(_submit_alone, at, tasks)
            return _delays(commits, await working)

    async def wait() -> Sample:
        async with database_of(bench, kind) as at, processes(1) as run:
            return {"share": await run(_be_idle, at, seconds)}

    medians = await bench.interleave(
        {"one process": start_here, "another process": start_elsewhere, "idle": wait}
    )
    here, there, share = (medians[one] for one in ("one process", "another process", "idle"))
    return [
        *(
            Figure(one["p50_ms"], f"{one['p50_ms']:.1f} ms", f"p99 {one['p99_ms']:.1f} ms")
            for one in (here, there)
        ),
        Figure(share["share"] * 100, f"{share['share'] * 100:.2f} %", "one core"),
    ]


def _node(slots: int = 4) -> NodeInfo:
    return replace(make_node("node-0"), max_concurrent_tasks=slots)


async def _live_ours(location: str, workers: int, count: int) -> Sample:
    async def handle(task: Task, run: Run) -> Any:
        clock.tick()
        return RESULT

    worker = Worker(Database(location), _node(workers), handle)
    clock = Clock(WARM_UP, count, worker.stop)
    await worker.run()
    return clock.sample()


async def _live_by_sqlite3(location: str, workers: int, count: int) -> Sample:
    """Work by plain `sqlite3`: more workers would only wait for each other's lock."""
    with closing(connect(Path(location))) as connection:
        start, complete = _START.format("?", "?"), _COMPLETE.format("?", "?", "?")

        def commit(statement: str, *values: object) -> list[tuple[Any, ...]]:
            connection.execute("BEGIN IMMEDIATE")
            found = connection.execute(statement, values).fetchall()
            connection.execute("COMMIT")
            return found

        def live() -> None:
            [(task, *_)] = commit(CLAIM, "node-0")
            commit(start, to_microseconds(datetime.now(UTC)), task)
            commit(complete, to_microseconds(datetime.now(UTC)), _RESULT, task)

        for _ in range(WARM_UP):
            live()
        began = perf_counter()
        for _ in range(count):
            live()
        return {"per_s": count / (perf_counter() - began)}


async def _live_by_asyncpg(location: str, workers: int, count: int) -> Sample:
    """Work by raw asyncpg: a connection for each worker, and an autocommitted step."""

    async def prepared(connection: Any) -> Life:
        await require_durable_server(connection)
        claim, start, complete = [
            await connection.prepare(sql)
            for sql in (
                CLAIM_ON_SERVER,
                _START.format("$1", "$2"),
                _COMPLETE.format("$1", "$2", "$3"),
            )
        ]

        async def live() -> None:
            [(task, *_)] = await claim.fetch("node-0")
            await start.fetch(datetime.now(UTC), task)
            await complete.fetch(datetime.now(UTC), _RESULT, task)

        return live

    return await _live_by_connections(prepared, location, workers, count)


async def _live_by_pgqueuer(location: str, workers: int, count: int) -> Sample:
    async def prepared(connection: Any) -> Life:
        return job_queue.Worker(connection).live

    return await _live_by_connections(prepared, location, workers, count)


async def _live_by_connections(
    prepare: Callable[[Any], Awaitable[Life]], location: str, workers: int, count: int
) -> Sample:
    async with AsyncExitStack() as stack:
        lives = [
            await prepare(await stack.enter_async_context(connected(location)))
            for _ in range(workers)
        ]
        for number in range(WARM_UP):
            await lives[number % workers]()
        rest = iter(range(count))

        async def repeat(live: Life) -> None:
            for _ in rest:  # shared by all workers
                await live()

        began = perf_counter()
        await asyncio.gather(*map(repeat, lives))
        return {"per_s": count / (perf_counter() - began)}


async def _live_by_huey(bench: Bench, count: int) -> Sample:
    with bench.database() as path:
        return await asyncio.to_thread(
            peers.live_by_huey, path.with_suffix(".huey"), 64, WARM_UP, count
        )


async def _live_by_procrastinate(location: str, workers: int, count: int) -> Sample:
    return await peers.live_by_procrastinate(location, workers, WARM_UP, count)


async def _note(starts: dict[str, float], task: Task, run: Run) -> None:
    starts[task.task_id] = perf_counter()


async def _submit(state: StateManager, count: int) -> dict[str, float]:
    """Add tasks one by one, each when the worker is idle; return the time of each commit."""
    commits: dict[str, float] = {}
    for number in range(count):
        await asyncio.sleep(PAUSE_SECONDS)
        task = make_task(number)
        await state.add_task(task)
        commits[task.task_id] = perf_counter()
        await state.wait_for_task(task.task_id, 60)
    return commits


async def _submit_alone(location: str, count: int) -> dict[str, float]:
    async with StateManager(Database(location)) as state:
        await asyncio.to_thread(start_together)
        return await _submit(state, count)


async def _serve(location: str, count: int) -> dict[str, float]:
    """Run a worker for that many tasks; return the time of each call of the handler."""
    starts: dict[str, float] = {}
    worker: Worker
    left = counter(count - 1, -1)

    async def handle(task: Task, run: Run) -> None:
        starts[task.task_id] = perf_counter()
        if not next(left):
            worker.stop()

    worker = Worker(Database(location), _node(), handle)
    await asyncio.to_thread(start_together)
    await worker.run()
    return starts


async def _be_idle(location: str, seconds: float) -> float:
    """Return the share of a core that a worker without tasks takes."""
    worker = Worker(Database(location), _node(), partial(_note, {}))
    await asyncio.to_thread(start_together)
    running = asyncio.create_task(worker.run())
    await asyncio.sleep(1)
    began, used = perf_counter(), process_time()
    await asyncio.sleep(seconds)
    share = (process_time() - used) / (perf_counter() - began)
    worker.stop()
    await running
    return share


def _delays(commits: dict[str, float], starts: dict[str, float]) -> Sample:
    # A handler may be called before the call that has added its task returns.
    delays = [max(0.0, starts[id] - at) for id, at in commits.items()][1:]
    return {"p50_ms": percentile(delays, 0.5) * 1e3, "p99_ms": percentile(delays, 0.99) * 1e3}
