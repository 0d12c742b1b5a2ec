"""Reads, from memory and from the database, of few rows and many; and the memory of tasks.

Answers from memory are timed by the clock of this thread, which stops while other processes have
the core.
"""

from __future__ import annotations

import gc
import tracemalloc
from collections.abc import Awaitable, Callable, Iterable, Sequence
from contextlib import AsyncExitStack, ExitStack, closing
from functools import partial
from pathlib import Path
from time import perf_counter, thread_time
from typing import Any

from benchmarks.measure import Bench, Figure, Sample, percentile
from benchmarks.work import connect, fill, ids, rows
from openclaw_store import Database, StateManager, Task, TaskRepository
from openclaw_store.domain.records import decode, encode
from openclaw_store.state_manager.snapshot import Records


async def get_task(bench: Bench) -> Sequence[Figure]:
    """Measure a cached task, as an independent copy, against a dict in a coroutine."""
    wanted = ids(100)  # asked for again and again
    seconds = bench.scaled(200) / 1000

    async def read(get: Callable[[str], Awaitable[Task | None]]) -> Sample:
        began, calls = thread_time(), 0
        while thread_time() < began + seconds:
            for id in wanted:
                await get(id)
            calls += len(wanted)
        return {"us": (thread_time() - began) / calls * 1e6}

    async with AsyncExitStack() as stack:
        flat = await _open(bench, stack, rows(len(wanted)))
        nested = await _open(bench, stack, rows(len(wanted), nested=True))
        tasks = {task.task_id: task for task in await flat.get_pending_tasks(None)}

        async def look_up(id: str) -> Task | None:
            return tasks.get(id)

        medians = await bench.interleave(
            {
                "dict": partial(read, look_up),
                "flat": partial(read, flat.get_task),
                "nested": partial(read, nested.get_task),
            }
        )
    return [_slower(medians["flat"], medians["dict"]), _slower(medians["nested"], medians["dict"])]


async def get_state(bench: Bench) -> Sequence[Figure]:
    """Measure the whole state, of many live tasks and of few; and its cost for a write."""
    calls = bench.scaled(5000)

    async def read(store: StateManager) -> Sample:
        began = thread_time()
        for _ in range(calls):
            await store.get_state()
        return {"us": (thread_time() - began) / calls * 1e6}

    async def write(put: Callable[[str, Any], object]) -> Sample:
        began = thread_time()
        for id, record in entries:
            put(id, record)
        return {"us": (thread_time() - began) / len(entries) * 1e6}

    async with AsyncExitStack() as stack:
        many = await _open(bench, stack, rows(bench.scaled(100_000)))
        few = await _open(bench, stack, rows(1000))
        entries = [(task.task_id, encode(task)) for task in await many.get_pending_tasks(None)]
        records: Records[Task] = Records(partial(decode, Task, ()))
        await write(records.put)
        records.snapshot()
        await write(records.put)  # what the snapshot shared is copied now
        medians = await bench.interleave(
            {
                "many": partial(read, many),
                "few": partial(read, few),
                "records": partial(write, records.put),
                "dict": partial(write, dict(entries).__setitem__),
            }
        )
    milliseconds = medians["many"]["us"] / 1000
    added = medians["records"]["us"] - medians["dict"]["us"]
    return [
        Figure(milliseconds, f"{milliseconds:.4f} ms", ""),
        _slower(medians["many"], medians["few"]),
        Figure(added, f"{medians['records']['us']:.2f} µs", f"{medians['dict']['us']:.2f} µs"),
    ]


async def list_pending(bench: Bench) -> Sequence[Figure]:
    """Measure the first 50 pending tasks, in databases of very different size."""
    sizes = {"many": bench.scaled(1_000_000), "few": 10_000}
    calls = bench.scaled(21, 5)

    async def read(repository: TaskRepository) -> Sample:
        seconds = []
        for _ in range(calls):
            began = perf_counter()
            found = await repository.list_pending_tasks(50)
            seconds.append(perf_counter() - began)
            if len(found) != 50:
                raise RuntimeError(f"{len(found)} pending tasks instead of 50")
        return {"us": percentile(seconds, 0.5) * 1e6}

    figures = []
    for percent in (1, 50):
        async with AsyncExitStack() as stack:
            contenders = {}
            for name, size in sizes.items():
                path = stack.enter_context(bench.database())
                fill(path, rows(size, pending=percent, of=100))
                database = await stack.enter_async_context(Database(path))
                contenders[f"{name}, {percent} %"] = partial(read, TaskRepository(database))
            many, few = (await bench.interleave(contenders)).values()
        figures.append(_slower(many, few))
    return figures


async def start_up(bench: Bench) -> Sequence[Figure]:
    """Measure `StateManager.initialize`, against fetching the rows as tuples."""
    count = bench.scaled(100_000)

    async def initialize(path: Path) -> Sample:
        store = StateManager(Database(path))
        began = perf_counter()
        await store.initialize()
        seconds = perf_counter() - began
        await store.shutdown()
        return {"us": seconds * 1e6}

    async def fetch(path: Path) -> Sample:
        began = perf_counter()
        with closing(connect(path)) as connection:
            live = "SELECT * FROM tasks WHERE status IN ('pending', 'running', 'scheduled')"
            found = connection.execute(live).fetchall()
        seconds = perf_counter() - began
        if len(found) != count:
            raise RuntimeError(f"{len(found)} live tasks instead of {count}")
        return {"us": seconds * 1e6}

    with bench.database() as path:
        fill(path, rows(count))
        medians = await bench.interleave(
            {"openclaw_store": partial(initialize, path), "tuples": partial(fetch, path)}
        )
    return [_slower(medians["openclaw_store"], medians["tuples"])]


async def memory(bench: Bench) -> Sequence[Figure]:
    """Measure the memory of a live task by `tracemalloc`: after loading, and after one read."""
    count = bench.scaled(100_000)

    async def measure() -> Sample:
        with ExitStack() as stack:
            path = stack.enter_context(bench.database())
            fill(path, rows(count))
            tracemalloc.start()
            stack.callback(tracemalloc.stop)
            before = _traced()
            async with StateManager(Database(path)) as store:
                loaded = _traced() - before
                await store.get_pending_tasks(None)
                read = _traced() - before
        return {"loaded_kb": loaded / count / 1000, "read_kb": read / count / 1000}

    medians = (await bench.interleave({"openclaw_store": measure}, rounds=1))["openclaw_store"]
    return [
        Figure(medians[name], f"{medians[name]:.2f} KB", "") for name in ("loaded_kb", "read_kb")
    ]


async def _open(bench: Bench, stack: AsyncExitStack, tasks: Iterable[Any]) -> StateManager:
    path = stack.enter_context(bench.database())
    fill(path, tasks)
    return await stack.enter_async_context(StateManager(Database(path)))


def _slower(ours: Sample, reference: Sample) -> Figure:
    """Return the ratio of the durations."""
    return Figure(ours["us"] / reference["us"], _time(ours["us"]), _time(reference["us"]))


def _time(microseconds: float) -> str:
    for size, unit in ((1e6, "s"), (1e3, "ms")):
        if microseconds >= size:
            return f"{microseconds / size:.2f} {unit}"
    return f"{microseconds:.2f} µs"


def _traced() -> int:
    gc.collect()
    return tracemalloc.get_traced_memory()[0]
