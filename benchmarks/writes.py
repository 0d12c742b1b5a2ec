"""Writes: inserts and versioned updates, by one client and by many."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from functools import partial
from importlib.util import find_spec
from pathlib import Path

from benchmarks.measure import Bench, Contender, Figure, Sample, Skipped, drive, no_collections
from benchmarks.references import (
    insert_aiosqlite,
    insert_huey,
    insert_many,
    insert_orm,
    insert_plain,
    update_plain,
)
from benchmarks.work import fill, ids, make_tasks, require_tasks, rows
from openclaw_store import Database, StateManager, Task, TaskStatus

_UNCOLLECTED = "openclaw_store, no gc"


async def insert_ours(bench: Bench, count: int, clients: int, *, collect: bool = True) -> Sample:
    """Insert by `StateManager.add_task`: checked, numbered, with history, and cached."""
    tasks = make_tasks(count)
    with bench.database() as path, nullcontext() if collect else no_collections():
        async with StateManager(Database(path)) as store:
            sample = await drive(clients, tasks, store.add_task)
        require_tasks(path, count)
    return sample


async def insert_64(bench: Bench) -> Sequence[Figure | Skipped]:
    """Measure inserts by 64 clients, against all references; slower contenders get fewer rows."""
    many, some, few = bench.scaled(12_800, 128), bench.scaled(1920, 64), bench.scaled(960, 128)
    contenders: dict[str, Contender] = {
        "openclaw_store": partial(insert_ours, bench, many, 64),
        _UNCOLLECTED: partial(insert_ours, bench, many, 64, collect=False),
        "executemany": partial(insert_many, bench, many),
        "sqlite3": partial(insert_plain, bench, some),
        "aiosqlite": partial(insert_aiosqlite, bench, few, 64),
        "SQLAlchemy ORM": partial(insert_orm, bench, few, 64),
    }
    if find_spec("huey"):
        contenders["huey"] = partial(insert_huey, bench, some)
    medians = await bench.interleave(contenders)
    ours, limit = medians["openclaw_store"], medians["executemany"]

    def against(name: str) -> Figure | Skipped:
        if name not in medians:
            return Skipped("not installed: pip install 'openclaw-store[bench]'")
        return faster(ours, medians[name])

    return [
        against("sqlite3"),
        Figure(ours["per_s"] / limit["per_s"] * 100, _rate(ours), _rate(limit)),
        _spread(ours),
        _spread(medians[_UNCOLLECTED]),
        against("aiosqlite"),
        against("SQLAlchemy ORM"),
        against("huey"),
    ]


async def insert_few_or_many(bench: Bench, *, clients: int, count: int) -> Sequence[Figure]:
    """Measure inserts by another number of clients."""
    count = bench.scaled(count, clients * 2)
    medians = await bench.interleave(
        {
            "openclaw_store": partial(insert_ours, bench, count, clients),
            "sqlite3": partial(insert_plain, bench, bench.scaled(1920, 64)),
        }
    )
    return [faster(medians["openclaw_store"], medians["sqlite3"])]


async def insert_alone(bench: Bench) -> Sequence[Figure]:
    """Measure inserts by one client, which waits for each of them."""
    count = bench.scaled(800, 20)
    medians = await bench.interleave(
        {
            "openclaw_store": partial(insert_ours, bench, count, 1),
            "aiosqlite": partial(insert_aiosqlite, bench, count, 1),
        }
    )
    return [slower(medians["openclaw_store"], medians["aiosqlite"])]


async def update_64(bench: Bench) -> Sequence[Figure]:
    """Measure updates of whole tasks with two changed fields, by 64 clients."""
    many, some = bench.scaled(12_800, 128), bench.scaled(1920, 64)
    with bench.database() as source:
        fill(source, rows(many))
        changes = [("scheduled", "node-0042", id) for id in ids(some)]
        medians = await bench.interleave(
            {
                "openclaw_store": partial(update_ours, bench, source, many),
                "sqlite3": partial(update_plain, bench, source, changes),
            }
        )
    return [faster(medians["openclaw_store"], medians["sqlite3"])]


async def update_ours(bench: Bench, source: Path, count: int) -> Sample:
    """Update by `StateManager.update_task`, for tasks that were read before."""

    async def assign(task: Task) -> None:
        task.status, task.assigned_node = TaskStatus.SCHEDULED, "node-0042"
        await store.update_task(task)

    with bench.database(source) as path:
        async with StateManager(Database(path)) as store:
            sample = await drive(64, await store.get_pending_tasks(None), assign)
            state = await store.get_state()
        if state.version != 2 * count:
            raise RuntimeError(f"not all of {count} tasks were updated")
    return sample


def faster(ours: Sample, reference: Sample) -> Figure:
    """Return the ratio of the rates."""
    return Figure(ours["per_s"] / reference["per_s"], _rate(ours), _rate(reference))


def slower(ours: Sample, reference: Sample) -> Figure:
    """Return the ratio of the median durations."""
    p50, reference_p50 = ours["p50_ms"], reference["p50_ms"]
    return Figure(p50 / reference_p50, f"{p50:.2f} ms", f"{reference_p50:.2f} ms")


def _rate(sample: Sample) -> str:
    return f"{sample['per_s']:,.0f}/s"


def _spread(sample: Sample) -> Figure:
    """Return the ratio of the 99th percentile to the median."""
    p50, p99 = sample["p50_ms"], sample["p99_ms"]
    return Figure(p99 / p50, f"p99 {p99:.1f} ms", f"p50 {p50:.1f} ms")
