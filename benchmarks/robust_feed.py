"""The memory and the callers of a process that follows huge rows of another one.

A benchmark of this module belongs to the group `robust`: add it to `BENCHMARKS`.
"""

from __future__ import annotations

import asyncio
import gc
import resource
from collections.abc import Sequence
from functools import partial

from benchmarks.loop import Watch
from benchmarks.measure import Bench, Benchmark, Figure, Line, Sample, at_most
from benchmarks.processes import Kind, database_of, processes, start_together
from benchmarks.robust import beside
from benchmarks.work import START
from openclaw_store import Database, StateManager, Task, TaskRepository, TaskStatus, TaskType

_LAST = "last"


async def feed(bench: Bench, *, kind: Kind) -> Sequence[Figure]:
    """Measure a process while it follows 400 finished tasks of 2 MiB, which it does not keep."""
    tasks, size = bench.scaled(400, 4), bench.scaled(2 << 20)

    async def follow() -> Sample:
        async with database_of(bench, kind) as location, processes(2) as run:
            _, sample = await asyncio.gather(
                run(_add, location, tasks, size), run(_follow, location, bench.scaled(2000) / 1000)
            )
        return dict(sample)

    found = (await bench.interleave({"openclaw_store": follow}))["openclaw_store"]
    busy, quiet = found["busy_ms"], found["quiet_ms"]
    return [
        Figure(found["mb"], f"{found['mb']:.0f} MB", ""),
        Figure(found["pause_ms"], f"{found['pause_ms']:.1f} ms", ""),
        Figure(busy / quiet, f"{busy:.1f} ms", f"{quiet:.1f} ms"),
    ]


async def _add(location: str, tasks: int, size: int) -> None:
    async with Database(location) as database:
        repository = TaskRepository(database)
        await asyncio.to_thread(start_together)
        for number in range(tasks):
            task = Task.create(
                TaskType.BATCH,
                "huge",
                task_id=_LAST if number == tasks - 1 else None,
                parameters={"text": "x" * size},
                status=TaskStatus.COMPLETED,
                completed_at=START,
            )
            await repository.create(task)


async def _follow(location: str, seconds: float) -> Sample:
    async with StateManager(Database(location), finished_cache_size=0) as store:

        async def see_all() -> None:
            async for change in store.watch(since=0):
                if change.item_id == _LAST:
                    return

        quiet = await beside(store, asyncio.sleep(seconds))
        gc.collect()
        before = _peak_mb()
        await asyncio.to_thread(start_together)
        async with Watch() as watch:
            busy = await beside(store, see_all())
    return {
        "mb": _peak_mb() - before,
        "pause_ms": watch.longest * 1e3,
        "busy_ms": busy["p99_ms"],
        "quiet_ms": quiet["p99_ms"],
    }


def _peak_mb() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def _of_kind(kind: Kind) -> Benchmark:
    is_server = kind == "postgresql"
    prefix, title = ("pg-", "PostgreSQL") if is_server else ("", "SQLite")
    return Benchmark(
        f"{prefix}huge-rows",
        partial(feed, kind=kind),
        (
            Line(
                f"{title}: memory of a process that follows 400 tasks of 2 MiB, more than before",
                "MB",
                at_most(32),
            ),
            Line("… longest pause of its event loop", "ms", at_most(50, 20)),
            Line("… p99 of add_task, 16 callers / idle"),
        ),
        needs_server=is_server,
    )


BENCHMARKS = (_of_kind("sqlite"), _of_kind("postgresql"))
"""The benchmarks of this module, which are in the group `robust`."""
