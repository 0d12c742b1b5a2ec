"""Each call at its worst legal size: the pauses of the event loop, and other callers beside it.

The calls are those of the campaign `stalls`. A benchmark of this module belongs to the group
`robust`: add it to `BENCHMARKS`.
"""

from __future__ import annotations

from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from benchmarks.loop import Watch
from benchmarks.measure import Bench, Benchmark, Figure, Line, Sample, at_most, loaded_and_frozen
from benchmarks.processes import Kind, database_of
from benchmarks.robust import beside, idle, slower
from campaigns.workloads.worst_calls import WORST_CALLS, Crowd, WorstCall
from devtools.postgres import programs_in_path
from openclaw_store import Database, StateManager, Task, TaskPriority, TaskType

_MAINTENANCE: Mapping[str, str] = {
    "claim_tasks": "claim_tasks of 20,000",
    "add_tasks": "add_tasks of 100,000",
    "backup": "backup",
    "copy": "copy",
    "verify": "verify",
    "vacuum": "vacuum",
    "compact_changes": "compact_changes",
    "cleanup_old_tasks": "cleanup_old_tasks",
}
"""Calls of `WORST_CALLS`, with their names in the table, in the order of a run."""


@asynccontextmanager
async def crowded(bench: Bench, kind: Kind) -> AsyncIterator[tuple[Crowd, str]]:
    """Provide a store with 100,000 live tasks and one of 15 MiB, and its location."""
    many, text = bench.scaled(bench.scaled(20_000), 20), "x" * bench.scaled(15 << 20)
    large = Task.create(TaskType.BATCH, "large", "", ["large"], parameters={"text": text})
    with TemporaryDirectory() as folder, programs_in_path():
        async with (
            database_of(bench, kind) as location,
            database_of(bench, kind) as target,
            StateManager(Database(location), None) as store,
        ):
            crowd = Crowd(store, many, text, lambda: Database(target), Path(folder), large)
            await store.add_task(large)
            await store.add_tasks(crowd.task(task_id=f"t-{n}") for n in range(5 * many))
            yield crowd, location


async def pauses(bench: Bench, *, kind: Kind) -> Sequence[Figure]:
    """Measure the longest pause of the event loop in each call, which is alone."""

    async def measure() -> Sample:
        longest: dict[str, float] = {}
        async with crowded(bench, kind) as (crowd, location):

            async def start(crowd: Crowd, given: Any) -> None:
                async with StateManager(Database(location), None):
                    pass

            for name, worst in {"initialize": WorstCall(start), **WORST_CALLS, **_JSON}.items():
                given = None if worst.before is None else await worst.before(crowd)
                async with Watch() as watch:
                    result = await worst.call(crowd, given)  # the caller pays for freeing it
                del result
                longest[name] = watch.longest * 1e3
        return longest

    found = (await bench.interleave({"calls": measure}))["calls"]
    first, *others = sorted(found, key=found.__getitem__, reverse=True)
    next_ones = ", ".join(f"{name} {found[name]:.1f}" for name in others[:3])
    return [Figure(found[first], f"{first} {found[first]:.1f} ms", next_ones)]


async def _make_lists(crowd: Crowd) -> Task:
    lists: list[list[Any]] = [[]] * (len(crowd.text) // 3)
    return Task.create(TaskType.BATCH, "lists", "", ["large"], parameters={"lists": lists})


async def _add_lists(crowd: Crowd) -> str:
    task = await _make_lists(crowd)
    await crowd.store.add_task(task)
    return task.task_id


async def _add_twenty(crowd: Crowd) -> None:
    for _ in range(20):
        one = crowd.task(priority=TaskPriority.CRITICAL, parameters={"text": crowd.text})
        await crowd.store.add_task(one)


_JSON: Mapping[str, WorstCall] = {
    "add_task, 5,000,000 lists": WorstCall(lambda it, task: it.store.add_task(task), _make_lists),
    "get_task, 5,000,000 lists": WorstCall(
        lambda it, task_id: it.store.get_task(task_id), _add_lists
    ),
    "get_pending_tasks, 20 of 15 MiB": WorstCall(
        lambda it, _: it.store.get_pending_tasks(50), _add_twenty
    ),
}


async def others(bench: Bench, *, kind: Kind) -> Sequence[Figure]:
    """Measure `add_task` of other callers beside calls for maintenance, and just before each."""

    async def measure() -> Sample:
        p99: dict[str, float] = {}
        async with crowded(bench, kind) as (crowd, _):
            for name in _MAINTENANCE:
                worst = WORST_CALLS[name]
                given = None if worst.before is None else await worst.before(crowd)
                with loaded_and_frozen():
                    quiet = await idle(bench, crowd.store)
                    busy = await beside(crowd.store, worst.call(crowd, given))
                p99 |= {name: busy["p99_ms"], f"{name}, before": quiet["p99_ms"]}
        return p99

    found = (await bench.interleave({"p99": measure}))["p99"]
    return [
        slower({"p99_ms": found[name]}, {"p99_ms": found[f"{name}, before"]})
        for name in _MAINTENANCE
    ]


def _of_kind(kind: Kind) -> tuple[Benchmark, ...]:
    is_server = kind == "postgresql"
    prefix, title = ("pg-", "PostgreSQL") if is_server else ("", "SQLite")
    beside_first = f"{title}, 100,000 tasks: p99 of add_task, 16 callers, beside"
    # SQLite writes the whole file again, under its write lock.
    without_goal = () if is_server else ("vacuum",)
    return (
        Benchmark(
            f"{prefix}worst-calls",
            partial(pauses, kind=kind),
            (
                Line(
                    f"{title}: longest pause of the event loop in any call, 100,000 live tasks, "
                    "15 MiB of JSON in some",
                    "ms",
                    at_most(50, 20),
                ),
            ),
            needs_server=is_server,
        ),
        Benchmark(
            f"{prefix}beside",
            partial(others, kind=kind),
            tuple(
                Line(
                    f"{'…' if number else beside_first} {title} / idle",
                    "×",
                    None if name in without_goal else at_most(4, 2),
                )
                for number, (name, title) in enumerate(_MAINTENANCE.items())
            ),
            needs_server=is_server,
        ),
    )


BENCHMARKS = (*_of_kind("sqlite"), *_of_kind("postgresql"))
"""The benchmarks of this module, which are in the group `robust`."""
