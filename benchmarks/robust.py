"""The cost of a call for other callers, and of calls that find nothing, in a full database.

A benchmark of this module belongs to the group `robust`: add it to `BENCHMARKS`.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Sequence
from contextlib import asynccontextmanager
from datetime import UTC, datetime, timedelta
from functools import partial
from itertools import count
from pathlib import Path
from time import perf_counter

from benchmarks.measure import Bench, Benchmark, Figure, Line, Sample, at_least, at_most, percentile
from benchmarks.processes import CLIENTS, Kind, database_of
from benchmarks.work import START, fill, fill_server, make_task, rows
from openclaw_store import Database, StateManager, TaskFilter, verify

_IDLE_SECONDS = 2.0
_LATER = datetime(2100, 1, 1, tzinfo=UTC)


async def beside(store: StateManager, work: Awaitable[object]) -> Sample:
    """Measure `add_task` of several callers while `work` runs, and the time of `work`."""
    latencies: list[float] = []
    running = asyncio.ensure_future(work)

    async def add() -> None:
        for number in count():
            began = perf_counter()
            await store.add_task(make_task(number))
            latencies.append(perf_counter() - began)
            if running.done():
                return

    began = perf_counter()
    callers = [asyncio.create_task(add()) for _ in range(CLIENTS)]
    await running
    seconds = perf_counter() - began
    await asyncio.gather(*callers)
    return {
        "p50_ms": percentile(latencies, 0.5) * 1e3,
        "p99_ms": percentile(latencies, 0.99) * 1e3,
        "seconds": seconds,
    }


async def idle(bench: Bench, store: StateManager) -> Sample:
    """Measure `add_task` of the same callers beside nothing."""
    return await beside(store, asyncio.sleep(bench.scaled(1000) / 1000 * _IDLE_SECONDS))


def slower(busy: Sample, quiet: Sample) -> Figure:
    """Return the ratio of two 99th percentiles."""
    figures = (f"{one['p99_ms']:.1f} ms" for one in (busy, quiet))
    return Figure(busy["p99_ms"] / quiet["p99_ms"], *figures)


@asynccontextmanager
async def full_store(bench: Bench, kind: Kind) -> AsyncIterator[StateManager]:
    """Provide a store of a million tasks, of which one in a hundred is pending."""
    tasks = bench.scaled(bench.scaled(1_000_000), 2000)  # filling takes most of a quick run
    async with database_of(bench, kind) as location:
        if kind == "sqlite":
            await asyncio.to_thread(fill, Path(location), rows(tasks, of=100))
        else:
            await fill_server(location, rows(tasks, of=100))
        async with StateManager(Database(location), None) as store:
            yield store


async def cleanup(bench: Bench, *, kind: Kind) -> Sequence[Figure]:
    """Measure other callers beside `cleanup_old_tasks`, and the speed of it."""
    part = bench.scaled(20_000, 200)
    ends = count(part, part)

    async with full_store(bench, kind) as store:

        async def clean() -> Sample:
            cutoff = START + timedelta(milliseconds=next(ends))
            days = (datetime.now(UTC) - cutoff) / timedelta(days=1)
            busy = await beside(store, store.task_repo.cleanup_old_tasks(days))
            return {**busy, "per_s": 0.99 * part / busy["seconds"]}

        measured = await bench.interleave({"idle": partial(idle, bench, store), "cleanup": clean})
    busy = measured["cleanup"]
    return [
        slower(busy, measured["idle"]),
        Figure(busy["per_s"], f"{busy['per_s']:,.0f}/s", ""),
    ]


async def lists(bench: Bench, *, kind: Kind) -> Sequence[Figure]:
    """Measure lists that match no task, and other callers beside one of them."""
    filters = {
        "completed": TaskFilter(completed_from=_LATER),
        "skill": TaskFilter(skill="cobol"),
        "name": TaskFilter(name_contains="no task has this name"),
    }
    async with full_store(bench, kind) as store:

        async def find(filter: TaskFilter) -> Sample:
            began = perf_counter()
            if (await store.list_tasks(filter)).tasks:
                raise RuntimeError("a task matches")
            return {"ms": (perf_counter() - began) * 1e3}

        async def find_all() -> None:
            for _ in range(bench.scaled(10)):
                await find(filters["skill"])

        for filter in filters.values():  # compiles the statements, and fills the system's cache
            await find(filter)
        measured = await bench.interleave(
            {
                **{name: partial(find, filter) for name, filter in filters.items()},
                "idle": partial(idle, bench, store),
                "beside": lambda: beside(store, find_all()),
            }
        )
    times = [measured[name]["ms"] for name in filters]
    return [
        *(Figure(time, f"{time:.1f} ms", "") for time in times),
        slower(measured["beside"], measured["idle"]),
    ]


async def interrupted(bench: Bench, *, kind: Kind) -> Sequence[Figure]:
    """Measure the time from the cancellation of a long call until it has ended."""
    async with full_store(bench, kind) as store:
        calls = {"verify": lambda: verify(store.db), "vacuum": store.db.vacuum}

        async def cancel(name: str) -> Sample:
            running = asyncio.ensure_future(calls[name]())
            await asyncio.sleep(bench.scaled(1000) / 1000)
            began = perf_counter()
            running.cancel()
            await asyncio.wait([running])
            return {"seconds": perf_counter() - began}

        measured = await bench.interleave({name: partial(cancel, name) for name in calls})
    times = [measured[name]["seconds"] for name in calls]
    return [Figure(time, f"{time:.2f} s", "") for time in times]


def _of_kind(kind: Kind) -> tuple[Benchmark, ...]:
    is_server = kind == "postgresql"
    prefix, title = ("pg-", "PostgreSQL") if is_server else ("", "SQLite")
    nothing = f"{title}, 1,000,000 tasks: list_tasks that matches none, by time of completion"
    return (
        Benchmark(
            f"{prefix}cleanup",
            partial(cleanup, kind=kind),
            (
                Line(
                    f"{title}, 1,000,000 tasks: p99 of add_task, 16 callers, beside cleanup / idle",
                    "×",
                    at_most(4, 2),
                ),
                Line("… tasks removed meanwhile", "/s", at_least(5000)),
            ),
            needs_server=is_server,
        ),
        Benchmark(
            f"{prefix}lists",
            partial(lists, kind=kind),
            (
                Line(nothing, "ms", at_most(20, 5)),
                Line("… by skill", "ms", at_most(250, 100)),
                Line("… by name", "ms", at_most(250, 100)),
                Line("… p99 of add_task, 16 callers, beside lists / idle", "×", at_most(4, 2)),
            ),
            needs_server=is_server,
        ),
        Benchmark(
            f"{prefix}interrupted",
            partial(interrupted, kind=kind),
            (
                Line(
                    f"{title}, 1,000,000 tasks: from Ctrl-C in verify to its end", "s", at_most(2)
                ),
                Line("… vacuum", "s", at_most(2)),
            ),
            needs_server=is_server,
        ),
    )


BENCHMARKS = (*_of_kind("sqlite"), *_of_kind("postgresql"))
"""The benchmarks of the group `robust`."""
