"""Several processes on one database: the delay of foreign changes, and their common throughput.

Times are compared between processes: on Linux, `perf_counter` is one clock for all of them.
"""

from __future__ import annotations

import asyncio
import gc
import random
from collections.abc import AsyncIterator, Callable, Coroutine, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import asynccontextmanager
from functools import partial
from multiprocessing import get_context
from multiprocessing.synchronize import Barrier, Semaphore
from pathlib import Path
from time import perf_counter
from typing import Any, Literal

from benchmarks.measure import Bench, Figure, Sample, drive, percentile
from benchmarks.work import make_tasks, require_server_tasks, require_tasks
from benchmarks.writes import faster
from openclaw_store import Database, StateManager, Task

Kind = Literal["sqlite", "postgresql"]

Span = tuple[float, float]
"""The times of the call and of the commit of a write."""

Work = Callable[..., Coroutine[Any, Any, Any]]
"""The work of a process."""

COORDINATORS = 4
"""Number of processes that share a database."""

CLIENTS = 16
"""Concurrent calls of each process."""

PAUSE_SECONDS = 0.01, 0.11
"""Minimum and maximum pause between two added tasks."""

_START_SECONDS = 60.0
# Imports take longer than the rest of a start; a driver may be missing.
_PRELOADED = ["__main__", "benchmarks.catalogue", "alembic.command", "asyncpg"]

_start: Barrier
"""A barrier at which processes wait until all of them are ready."""

_rest: Semaphore
"""The number of items of work that no process has taken yet."""


async def freshness(bench: Bench, *, kind: Kind) -> Sequence[Figure]:
    """Measure the time from `add_task` in one process until `watch` yields it in another one.

    It includes the commit.
    """
    count = bench.scaled(100, 5)

    async def see() -> Sample:
        async with (
            database_of(bench, kind) as location,
            processes(1) as run,
            StateManager(Database(location)) as store,
            asyncio.TaskGroup() as group,
        ):
            adding = group.create_task(run(_add_now_and_then, location, count))
            seeing = group.create_task(_see(store, count))
        spans = list(zip(adding.result(), seeing.result(), strict=True))[1:]
        seconds = [seen - began for (began, _), seen in spans]
        commits = [committed - began for (began, committed), _ in spans]
        return {
            f"{name}_ms": percentile(values, share) * 1e3
            for name, values, share in (
                ("p50", seconds, 0.5),
                ("p99", seconds, 0.99),
                ("commit_p50", commits, 0.5),
                ("commit_p99", commits, 0.99),
            )
        }

    sample = (await bench.interleave({"openclaw_store": see}))["openclaw_store"]
    return [
        Figure(
            sample[f"{name}_ms"],
            f"{sample[f'{name}_ms']:.1f} ms",
            f"its commit {sample[f'commit_{name}_ms']:.1f} ms",
        )
        for name in ("p50", "p99")
    ]


async def coordinators(bench: Bench, *, kind: Kind) -> Sequence[Figure]:
    """Measure the same number of inserts by four processes, each with its own clients, and by one.

    Each process keeps a cache and follows the changes of the others. Before the start, it runs a
    full garbage collection, which its start-up owes.
    """
    count = bench.scaled(12_800, 4 * COORDINATORS * CLIENTS)

    async def insert(coordinators: int) -> Sample:
        async with database_of(bench, kind) as location, processes(coordinators) as run:
            shares = [
                run(_insert_at_once, location, count // coordinators) for _ in range(coordinators)
            ]
            spans = [span for share in await asyncio.gather(*shares) for span in share]
            if kind == "sqlite":
                require_tasks(Path(location), count)
            else:
                await require_server_tasks(location, count, changes=count)
        began, committed = zip(*spans, strict=True)
        latencies = [end - begin for begin, end in spans]
        return {
            "per_s": len(spans) / (max(committed) - min(began)),
            "p99_ms": percentile(latencies, 0.99) * 1e3,
        }

    medians = await bench.interleave(
        {"four": partial(insert, COORDINATORS), "one": partial(insert, 1)}
    )
    four, one = medians.values()
    p99, p99_of_one = four["p99_ms"], one["p99_ms"]
    return [faster(four, one), Figure(p99, f"{p99:.1f} ms", f"one {p99_of_one:.1f} ms")]


@asynccontextmanager
async def database_of(bench: Bench, kind: Kind, source: str | None = None) -> AsyncIterator[str]:
    """Provide a copy of a database of that kind, or an empty one."""
    if kind == "sqlite":
        with bench.database(None if source is None else Path(source)) as path:
            yield str(path)
    else:
        async with bench.server_database(source) as url:
            yield url


@asynccontextmanager
async def processes(count: int, items: int = 0) -> AsyncIterator[Work]:
    """Provide a runner for coroutine functions in that many processes, each with an event loop.

    Args:
        items: The number of items of work that the processes share, for `take_item`.
    """
    context = get_context("forkserver")
    context.set_forkserver_preload(_PRELOADED)
    barrier = context.Barrier(count, timeout=_START_SECONDS)
    rest = context.Semaphore(items)
    with ProcessPoolExecutor(count, context, _set_shared, (barrier, rest)) as pool:

        async def run(work: Work, *given: Any) -> Any:
            return await asyncio.get_running_loop().run_in_executor(pool, _run, work, *given)

        yield run


def start_together() -> None:
    """Wait until all processes are ready."""
    _start.wait()


def take_item() -> bool:
    """Take an item of the work; return false if no item is left."""
    return _rest.acquire(block=False)


def _set_shared(barrier: Barrier, rest: Semaphore) -> None:
    global _start, _rest
    _start, _rest = barrier, rest


def _run(work: Work, *given: Any) -> Any:
    try:
        return asyncio.run(work(*given))
    except BaseException:
        _start.abort()  # the other processes would wait for this one
        raise


async def _see(store: StateManager, count: int) -> list[float]:
    """Return the time at which each of the first changes arrived."""
    seen: list[float] = []
    changes = store.watch(0)
    for _ in range(count):
        await anext(changes)
        seen.append(perf_counter())
    return seen


async def _add_now_and_then(location: str, count: int) -> list[Span]:
    spans: list[Span] = []
    async with StateManager(Database(location)) as store:
        for task in make_tasks(count):
            await asyncio.sleep(random.uniform(*PAUSE_SECONDS))
            began = perf_counter()
            await store.add_task(task)
            spans.append((began, perf_counter()))
    return spans


async def _insert_at_once(location: str, count: int) -> list[Span]:
    spans: list[Span] = []

    async def add(task: Task) -> None:
        began = perf_counter()
        await store.add_task(task)
        spans.append((began, perf_counter()))

    tasks = make_tasks(count)
    async with StateManager(Database(location)) as store:
        gc.collect()
        await asyncio.to_thread(start_together)
        await drive(CLIENTS, tasks, add)
    return spans[CLIENTS:]  # as in `drive`, the first call of each does not count
