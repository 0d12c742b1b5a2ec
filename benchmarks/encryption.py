"""The cost of encryption at rest: of an insert, of a first read, and of reads from memory."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from time import perf_counter, process_time

from benchmarks.measure import (
    Bench,
    Benchmark,
    Figure,
    Line,
    Sample,
    at_least,
    at_most,
    drive,
    no_collections,
)
from benchmarks.processes import Kind, database_of
from openclaw_store import Database, KeyRing, StateManager, Task, TaskType
from openclaw_store.database import statements_of
from openclaw_store.domain.records import encode
from openclaw_store.encryption import Key
from openclaw_store.encryption.cipher import Cipher

_RING = KeyRing([Key(1, bytes(range(32)))], 1)
_NAMES = ("plain", "sealed")


def _task(number: int) -> Task:
    """Return a task with 400 bytes in three sealed fields."""
    return Task.create(
        TaskType.BATCH, "train", task_id=f"task-{number:07}", description="d" * 80,
        parameters={"path": "p" * 180}, metadata={"note": "n" * 110},
    )  # fmt: skip


async def codec(bench: Bench) -> Sequence[Figure]:
    """Measure the conversion of tasks to rows and back, sealed and in clear."""
    count = bench.scaled(5000, 200)
    records = [encode(_task(number)) for number in range(count)]
    for record in records:
        record.version = 1
        record.updated_at = record.submitted_at
    clear = statements_of("sqlite")
    cipher = Cipher(_RING, 1, accepts_clear=False)
    statements = {"plain": clear, "sealed": clear.protected_by(cipher)}

    def timed(work: Callable[[], object]) -> Sample:
        with no_collections():
            began = process_time()
            work()
            return {"us": (process_time() - began) / count * 1e6}

    async def convert(name: str, *, back: bool) -> Sample:
        sql = statements[name]
        _, plan = sql.insert[Task]
        if not back:
            return timed(lambda: [record.values(plan) for record in records])
        rows = [tuple(record.values(plan)) for record in records]
        return timed(lambda: [sql.decode[Task](row).copy() for row in rows])

    found = await bench.interleave(
        {
            f"{name} {back}": partial(convert, name, back=back)
            for name in _NAMES
            for back in (False, True)
        }
    )
    figures = []
    for back in (False, True):
        plain, sealed = (found[f"{name} {back}"]["us"] for name in _NAMES)
        figures.append(Figure(sealed - plain, f"{sealed:.1f} µs", f"{plain:.1f} µs"))
    return figures


async def inserts(bench: Bench, *, kind: Kind) -> Sequence[Figure]:
    """Measure inserts of 64 clients, and reads from memory, sealed and in clear."""
    count = bench.scaled(12_800, 256)

    async def work(name: str) -> Sample:
        keys = _RING if name == "sealed" else None
        async with (
            database_of(bench, kind) as location,
            StateManager(Database(location, keys=keys), None) as store,
        ):
            tasks = [_task(number) for number in range(count)]
            with no_collections():
                inserted = await drive(64, tasks, store.add_task)
                for task in tasks:
                    await store.get_task(task.task_id)
                began = perf_counter()
                for task in tasks:
                    await store.get_task(task.task_id)
                seconds = perf_counter() - began
            return {**inserted, "read_us": seconds / count * 1e6}

    found = await bench.interleave({name: partial(work, name) for name in _NAMES})
    plain, sealed = (found[name] for name in _NAMES)
    return [
        Figure(
            sealed["per_s"] / plain["per_s"],
            f"{sealed['per_s']:,.0f}/s",
            f"{plain['per_s']:,.0f}/s",
        ),
        Figure(
            sealed["read_us"] / plain["read_us"],
            f"{sealed['read_us']:.2f} µs",
            f"{plain['read_us']:.2f} µs",
        ),
    ]


_OF_KINDS: Sequence[tuple[str, str, Kind]] = (
    ("sealed-inserts", "SQLite", "sqlite"),
    ("pg-sealed-inserts", "PostgreSQL", "postgresql"),
)

BENCHMARKS = (
    Benchmark(
        "sealing",
        codec,
        (
            Line("400 bytes sealed: CPU of an insert, more than in clear", "µs", at_most(12)),
            Line("… CPU of a first read, more than in clear", "µs", at_most(10)),
        ),
    ),
    *(
        Benchmark(
            name,
            partial(inserts, kind=kind),
            (
                Line(f"{title}: insert with 64 clients, sealed / in clear", "×", at_least(0.75)),
                Line("… a cached read, sealed / in clear", "×", at_most(1.05)),
            ),
            needs_server=kind == "postgresql",
        )
        for name, title, kind in _OF_KINDS
    ),
)
