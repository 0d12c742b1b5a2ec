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
from multiprocessing.synchronize import Barrier
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

CLIENTS = 64
"""Clients of each coordinator."""

PAUSE_SECONDS = 0.01, 0.11
"""Minimum and maximum pause between two added tasks."""

_POLL_SECONDS = 0.001  # the shortest sleep of an event loop
_START_SECONDS = 60.0

_start: Barrier
"""A barrier at which coordinators wait until all of them are ready."""


async def freshness(bench: Bench, *, kind: Kind) -> Sequence[Figure]:
    """Measure the time from `add_task` in one process until another one has the task in memory.

    It includes the commit, and up to a millisecond of polling.
    """
    count = bench.scaled(100, 5)

    async def see() -> Sample:
        async with (
            _location(bench, kind) as location,
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

    The processes follow each other's changes, or do not. Or they exclude all earlier objects from
    the garbage collector, including the tasks to be added. Before the start, each runs a full
    collection, which its start-up owes.
    """
    count = bench.scaled(25_600, 8 * CLIENTS)

    async def insert(coordinators: int, *, wake_ups: bool = True, freezes: bool = False) -> Sample:
        async with _location(bench, kind) as location, processes(coordinators) as run:
            work = location, count // coordinators, wake_ups, freezes
            shares = [run(_insert_at_once, *work) for _ in range(coordinators)]
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
        {
            "four": partial(insert, 4),
            "four, without wake-ups": partial(insert, 4, wake_ups=False),
            "four, frozen": partial(insert, 4, freezes=True),
            "one": partial(insert, 1),
        }
    )
    four, unaware, frozen, one = medians.values()
    return [
        faster(four, one),
        *(
            Figure(some["p99_ms"], f"{some['p99_ms']:.1f} ms", f"one {one['p99_ms']:.1f} ms")
            for some in (four, frozen)
        ),
        faster(unaware, one),
    ]


@asynccontextmanager
async def _location(bench: Bench, kind: Kind) -> AsyncIterator[str]:
    if kind == "sqlite":
        with bench.database() as path:
            yield str(path)
    else:
        async with bench.server_database() as url:
            yield url


@asynccontextmanager
async def processes(count: int) -> AsyncIterator[Callable[..., Coroutine[Any, Any, list[Span]]]]:
    """Provide a runner for coroutine functions in that many processes, each with an event loop."""
    context = get_context("forkserver")
    context.set_forkserver_preload(["__main__", __name__])  # the import takes longer than the rest
    barrier = context.Barrier(count, timeout=_START_SECONDS)
    with ProcessPoolExecutor(count, context, _set_start, (barrier,)) as pool:

        async def run(work: Callable[..., Coroutine[Any, Any, list[Span]]], *given: Any) -> Any:
            return await asyncio.get_running_loop().run_in_executor(pool, _run, work, *given)

        yield run


def start_together() -> None:
    """Wait until all processes are ready."""
    _start.wait()


def _set_start(barrier: Barrier) -> None:
    global _start
    _start = barrier


def _run(work: Callable[..., Coroutine[Any, Any, list[Span]]], *given: Any) -> list[Span]:
    return asyncio.run(work(*given))


async def _see(store: StateManager, count: int) -> list[float]:
    """Return the time at which each of the first revisions was in memory."""
    seen: list[float] = []
    while len(seen) < count:
        seen += [perf_counter()] * (store.version - len(seen))
        await asyncio.sleep(_POLL_SECONDS)
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


async def _insert_at_once(location: str, count: int, wake_ups: bool, freezes: bool) -> list[Span]:
    spans: list[Span] = []

    async def add(task: Task) -> None:
        began = perf_counter()
        await store.add_task(task)
        spans.append((began, perf_counter()))

    tasks = make_tasks(count)
    async with StateManager(Database(location), wake_ups=wake_ups) as store:
        gc.collect()
        if freezes:
            gc.freeze()
        await asyncio.to_thread(start_together)
        await drive(CLIENTS, tasks, add)
    return spans[CLIENTS:]  # as in `drive`, the first call of each does not count
