"""Lone writes while another session holds a snapshot.

A benchmark of this module belongs to the group `robust`: add it to `BENCHMARKS`.
"""

from __future__ import annotations

from collections.abc import Awaitable, Sequence
from itertools import count
from statistics import median
from time import perf_counter
from typing import TypeVar

from benchmarks.claims import SKILLS
from benchmarks.measure import Bench, Benchmark, Figure, Line, Sample, at_most
from benchmarks.work import connected, make_task
from openclaw_store import Database, NodeInfo, StateManager

T = TypeVar("T")

_STEPS = ("add_task", "claim_tasks", "complete_task")


class _Lives:
    """The lives of tasks, one after another, each with three commits."""

    def __init__(self, store: StateManager) -> None:
        self._store = store
        self._numbers = count()

    async def run(self, lives: int) -> dict[str, float]:
        """Return the median of each step in milliseconds."""
        times: dict[str, list[float]] = {name: [] for name in _STEPS}

        async def timed(name: str, call: Awaitable[T]) -> T:
            began = perf_counter()
            result = await call
            times[name].append((perf_counter() - began) * 1e3)
            return result

        for _ in range(lives):
            await timed("add_task", self._store.add_task(make_task(next(self._numbers))))
            [task] = await timed("claim_tasks", self._store.claim_tasks("node", start=True))
            await timed("complete_task", self._store.complete_task(task))
        return {name: median(values) for name, values in times.items()}


async def held(bench: Bench) -> Sequence[Figure]:
    """Measure lone writes before a snapshot is held, and after many commits since then."""
    # Scaled twice, as each commit waits for the one before.
    commits, measured = bench.scaled(bench.scaled(200_000)), bench.scaled(500, 5)

    async def write() -> Sample:
        async with (
            bench.server_database() as url,
            connected(url) as holder,
            StateManager(Database(url), None) as store,
        ):
            await store.register_node(NodeInfo("node", "host", available_skills=SKILLS))
            lives = _Lives(store)
            await lives.run(measured)  # opens connections, and fills the first pages
            before = await lives.run(measured)
            async with holder.transaction(isolation="repeatable_read"):
                await holder.execute("SELECT FROM tasks LIMIT 1")  # takes the snapshot
                await lives.run(commits // len(_STEPS))
                after = await lives.run(measured)
        return {**before, **{f"{name}, held": time for name, time in after.items()}}

    found = (await bench.interleave({"lives": write}, 1))["lives"]
    return [
        Figure(
            found[f"{name}, held"] / found[name],
            f"{found[f'{name}, held']:.2f} ms",
            f"{found[name]:.2f} ms",
        )
        for name in _STEPS
    ]


BENCHMARKS = (
    Benchmark(
        "pg-held-snapshot",
        held,
        (
            Line(
                "PostgreSQL: lone add_task, p50, after 200,000 commits under a held snapshot / "
                "before",
                "×",
                at_most(1.5, 1),
            ),
            Line("… claim_tasks", "×", at_most(1.5, 1)),
            Line("… complete_task", "×", at_most(1.5, 1)),
        ),
        needs_server=True,
    ),
)
"""The benchmarks of this module, which are in the group `robust`."""
