"""Calls with many rows, and nodes and tasks with many different skills.

A benchmark of this module belongs to the group `robust`: add it to `BENCHMARKS`.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterator, Sequence
from functools import partial
from itertools import pairwise
from statistics import median
from time import perf_counter

from benchmarks.claims import make_node
from benchmarks.loop import Watch
from benchmarks.measure import (
    Bench,
    Benchmark,
    Figure,
    Line,
    Sample,
    at_least,
    at_most,
    loaded_and_frozen,
)
from benchmarks.processes import Kind, database_of
from benchmarks.robust import beside
from benchmarks.work import make_task, make_tasks
from openclaw_store import Database, NodeInfo, StateManager, Task, TaskFilter, TaskType

_PARTS = 10


async def bulk(bench: Bench, *, kind: Kind) -> Sequence[Figure]:
    """Measure `add_tasks` of a million, and the last tenth of it against the first."""
    tasks = bench.scaled(bench.scaled(1_000_000), 1000)  # a quick run needs few
    moments: list[float] = []

    def timed() -> Iterator[Task]:
        for number in range(tasks):
            if number % (tasks // _PARTS) == 0:
                moments.append(perf_counter())
            yield make_task(number)

    async def add() -> Sample:
        moments.clear()
        async with (
            database_of(bench, kind) as location,
            StateManager(Database(location), None) as store,
        ):
            if any(await store.add_tasks(timed())):
                raise RuntimeError("a task was refused")
            moments.append(perf_counter())
            behind = await _rate(store, make_tasks(tasks // _PARTS))
        rates = [tasks / _PARTS / (after - before) for before, after in pairwise(moments)]
        return {"behind": behind, "first": rates[0], "last": rates[-1]}

    async def add_few() -> Sample:
        async with (
            database_of(bench, kind) as location,
            StateManager(Database(location), None) as store,
        ):
            return {"per_s": await _rate(store, make_tasks(tasks // 20))}

    few = (await bench.interleave({"50,000": add_few}))["50,000"]["per_s"]
    sample = (await bench.interleave({"add_tasks": add}, 1))["add_tasks"]
    return [
        Figure(few, f"{few:,.0f}/s", ""),
        Figure(sample["behind"], f"{sample['behind']:,.0f}/s", ""),
        Figure(
            sample["last"] / sample["first"],
            f"{sample['last']:,.0f}/s",
            f"{sample['first']:,.0f}/s",
        ),
    ]


async def _rate(store: StateManager, tasks: Sequence[Task]) -> float:
    """Return the number of tasks that one call adds in a second."""
    began = perf_counter()
    await store.add_tasks(tasks)
    return len(tasks) / (perf_counter() - began)


async def parts(bench: Bench, *, kind: Kind) -> Sequence[Figure]:
    """Measure `add_task` of other callers beside calls that change many tasks."""
    many = bench.scaled(20_000, 100)

    async def measure() -> Sample:
        async with (
            database_of(bench, kind) as location,
            StateManager(Database(location), None) as store,
        ):
            node = make_node("node")
            await store.register_node(node)
            await store.add_tasks(make_tasks(2 * many))
            added = make_tasks(many)  # the caller pays for making and freeing objects
            results: list[object] = []
            calls: dict[str, Callable[[], Awaitable[object]]] = {
                "claim": lambda: store.claim_tasks("node", many),
                "register": lambda: store.register_node(node),
                "add": lambda: store.add_tasks(added),
                "cancel": lambda: store.cancel_tasks(TaskFilter.everything()),
            }

            async def keep(call: Awaitable[object]) -> None:
                results.append(await call)

            with loaded_and_frozen():
                async with Watch() as watch:
                    p99 = {
                        name: (await beside(store, keep(call())))["p99_ms"]
                        for name, call in calls.items()
                    }
            return {**p99, "longest pause": watch.longest * 1e3}

    sample = (await bench.interleave({"p99": measure}, 1))["p99"]
    return [Figure(value, f"{value:.0f} ms", "") for value in sample.values()]


async def skills(bench: Bench, *, kind: Kind) -> Sequence[Figure]:
    """Measure claims where the tasks require many different skills."""
    groups, nodes = bench.scaled(8000, 40), bench.scaled(1500, 20)

    def tasks_of(names: Sequence[str], number: int) -> Iterator[Task]:
        for place, name in zip(range(number), _again(names), strict=False):
            task = make_task(place)
            task.required_skills = [name]
            yield task

    async def claim(
        node_skills: Sequence[Sequence[str]], claims: int, *, tags: Sequence[str] = ()
    ) -> Sample:
        names = [name for skills in node_skills for name in skills]
        async with (
            database_of(bench, kind) as location,
            StateManager(Database(location), None) as store,
        ):
            for number, skills in enumerate(node_skills[:claims]):
                await store.register_node(
                    NodeInfo(f"n{number}", "host", available_skills=[*skills])
                )
            await store.add_tasks(tasks_of(names, max(2 * nodes, len(names))))
            if tags:
                await store.add_task(Task.create(TaskType.BATCH, "prefers", affinity_tags=tags))
            times: list[float] = []
            for number in range(min(claims, len(node_skills))):
                began = perf_counter()
                [_] = await store.claim_tasks(f"n{number}")
                times.append(perf_counter() - began)
        return {"p50_ms": median(times) * 1e3}

    many = [[f"skill-{number:05}" for number in range(groups)]]
    own = [[f"skill-{number:05}"] for number in range(nodes)]
    measured = await bench.interleave(
        {
            "many": partial(claim, many, 1),
            "preferred": partial(claim, many, 1, tags=["gpu"]),
            "own": partial(claim, own, nodes // 5),
            "shared": partial(claim, [["shared"]] * nodes, nodes // 5),
        }
    )
    times = {name: sample["p50_ms"] for name, sample in measured.items()}
    return [
        *(Figure(times[name], f"{times[name]:.1f} ms", "") for name in ("many", "preferred")),
        Figure(
            times["own"] / times["shared"], f"{times['own']:.2f} ms", f"{times['shared']:.2f} ms"
        ),
    ]


def _again(names: Sequence[str]) -> Iterator[str]:
    while True:
        yield from names


def _of_kind(kind: Kind) -> tuple[Benchmark, ...]:
    is_server = kind == "postgresql"
    prefix, title = ("pg-", "PostgreSQL") if is_server else ("", "SQLite")
    return (
        Benchmark(
            f"{prefix}bulk",
            partial(bulk, kind=kind),
            (
                Line(f"{title}: add_tasks of 50,000", "/s", at_least(50_000, 80_000)),
                Line("… of 100,000 behind 1,000,000", "/s", at_least(50_000, 80_000)),
                Line("… last 100,000 of 1,000,000 / first", "×", at_least(0.8, 0.95)),
            ),
            needs_server=is_server,
        ),
        Benchmark(
            f"{prefix}parts",
            partial(parts, kind=kind),
            (
                Line(
                    f"{title}: p99 of add_task, 16 callers, beside claim_tasks of 20,000",
                    "ms",
                    at_most(100, 50),
                ),
                Line("… register_node that releases 20,000", "ms", at_most(100, 50)),
                Line("… add_tasks of 20,000", "ms", at_most(100, 50)),
                Line("… cancel_tasks of all", "ms", at_most(100, 50)),
                Line("… longest pause of the event loop meanwhile", "ms", at_most(20, 10)),
            ),
            needs_server=is_server,
        ),
        Benchmark(
            f"{prefix}skills",
            partial(skills, kind=kind),
            (
                Line(f"{title}: first claim of a node with 8,000 skills", "ms", at_most(20, 10)),
                Line("… while a task has preferences", "ms", at_most(20, 10)),
                Line("… claim, 1,500 skills of one node each / one skill", "×", at_most(1.5, 1.2)),
            ),
            needs_server=is_server,
        ),
    )


BENCHMARKS = (*_of_kind("sqlite"), *_of_kind("postgresql"))
"""The benchmarks of this module, which are in the group `robust`."""
