"""The archive: the speed of moves and restores, the size of the files, and queries of a million.

Tasks have lived an ordinary life: four changes, a result, and times and identifiers at random.
"""

from __future__ import annotations

import random
import resource
import sqlite3
from collections.abc import AsyncIterator, Iterator, Sequence
from contextlib import asynccontextmanager, closing
from datetime import timedelta
from functools import partial
from itertools import islice
from pathlib import Path
from tempfile import TemporaryDirectory
from time import perf_counter
from typing import Any
from uuid import UUID

from sqlalchemy import insert
from sqlalchemy.dialects import sqlite

from benchmarks.measure import Bench, Benchmark, Figure, Line, Sample, at_least, at_most, percentile
from benchmarks.processes import Kind, database_of, processes
from benchmarks.robust import beside, idle, slower
from benchmarks.work import FIELDS, START, Row, connected, fill, fill_server, make_task, row_of
from openclaw_store import Database, Retention, StateManager, TaskFilter, TaskStatus, open_archive
from openclaw_store.archive.folder import Folder
from openclaw_store.archive.layout import CHANGE_NAMES, TASKS
from openclaw_store.archive.manifest import Manifest, write_file
from openclaw_store.database import ChangeRow, from_microseconds, to_microseconds

Life = tuple[Row, Sequence[Row]]
"""A task, and its changes: revision, time, kind, both statuses, node, reason and previous one."""

_INSERT_CHANGE = str(
    insert(ChangeRow).compile(dialect=sqlite.dialect(), column_keys=[*CHANGE_NAMES])
)

_DAYS = 30
_DAY_MICROSECONDS = 86_400_000_000
_STEPS = ("pending", "assigned", "running", "completed")


def lives(count: int, days: int = _DAYS) -> Iterator[Life]:
    """Yield finished tasks by the time of their submission, evenly on some days."""
    draw = random.Random(7)
    place = {name: FIELDS.index(name) for name in FIELDS}
    pattern = [list(row_of(make_task(number))) for number in range(100)]
    begin = to_microseconds(START)
    for number in range(count):
        row = pattern[number % 100]
        at = begin + number * days * _DAY_MICROSECONDS // count
        times = [at := at + draw.randrange(1, 60_000_000) for _ in _STEPS]
        node, last = f"node-{draw.randrange(100):04}", 4 * number + 4
        text = '{"source":"s3://datasets/clickstream/part-%05d.parquet","threshold":0.85}'
        values = {
            "task_id": str(UUID(int=draw.getrandbits(128), version=4)),
            "name": f"clean clickstream part {number}",
            "user_id": f"user-{draw.randrange(50)}",
            "status": TaskStatus.COMPLETED.value,
            "assigned_node": node,
            "parameters": text % number,
            "result": f'{{"rows":{draw.randrange(100_000)}}}',
            "submitted_at": times[0],
            "started_at": times[2],
            "completed_at": times[3],
            "updated_at": times[3],
            "version": last,
        }
        for name, value in values.items():
            row[place[name]] = value
        changes = []
        before: str | None = None
        for step, (status, moment) in enumerate(zip(_STEPS, times, strict=True)):
            revision, kind = last - 3 + step, "status" if step else "created"
            previous = revision - 1 if step else None
            on = node if step else None
            changes.append((revision, moment, kind, before, status, on, None, previous))
            before = status
        yield tuple(row), changes


@asynccontextmanager
async def filled(bench: Bench, kind: Kind, tasks: int) -> AsyncIterator[str]:
    """Provide a database of finished tasks with their changes."""
    found = [*lives(tasks)]
    changes = [
        (revision, at, "task", task[0], *rest)
        for task, history in found
        for revision, at, *rest in history
    ]
    async with database_of(bench, kind) as location:
        if kind == "sqlite":
            fill(Path(location), (task for task, _ in found))
            with closing(sqlite3.connect(location)) as connection:
                connection.executemany(_INSERT_CHANGE, changes)
                connection.commit()
        else:
            await fill_server(location, (task for task, _ in found))
            async with connected(location) as server:
                records = ((one[0], from_microseconds(one[1]), *one[2:]) for one in changes)
                await server.copy_records_to_table("changes", records=records, columns=CHANGE_NAMES)
                await server.execute("VACUUM ANALYZE changes")
        yield location


async def moves(bench: Bench, *, kind: Kind) -> Sequence[Figure]:
    """Measure a move of tasks and their restore, and other callers beside a move."""
    tasks = bench.scaled(100_000, 100)

    async def move() -> Sample:
        with TemporaryDirectory() as folder:
            async with (
                filled(bench, kind, tasks) as location,
                StateManager(Database(location), None) as store,
            ):
                began = perf_counter()
                done = await store.apply_retention(
                    Retention(completed=timedelta(0), load=1.0, archive=folder)
                )
                moved = perf_counter()
                if done.tasks != tasks:
                    raise RuntimeError(f"{done.tasks} of {tasks} tasks were moved")
                restored = await store.restore_tasks(TaskFilter.everything(), folder)
                seconds = perf_counter() - moved
                if len(restored.restored) != tasks:
                    raise RuntimeError(f"{len(restored.restored)} of {tasks} tasks were restored")
        return {
            "moved": tasks / (moved - began),
            "restored": tasks / seconds,
            "bytes": done.bytes / tasks,
        }

    async def quiet() -> Sample:
        async with (
            filled(bench, kind, tasks) as location,
            StateManager(Database(location), None) as store,
        ):
            return await idle(bench, store)

    async def busy() -> Sample:
        with TemporaryDirectory() as folder:
            async with (
                filled(bench, kind, tasks) as location,
                StateManager(Database(location), None) as store,
            ):
                policy = Retention(completed=timedelta(0), archive=folder)
                sample = await beside(store, store.apply_retention(policy))
        return {**sample, "moved": tasks / sample["seconds"]}

    found = await bench.interleave({"move": move, "idle": quiet, "busy": busy})
    rates = [found["move"]["moved"], found["move"]["restored"], found["busy"]["moved"]]
    moved, restored, beside_others = (Figure(rate, f"{rate:,.0f}/s", "") for rate in rates)
    size = found["move"]["bytes"]
    return [
        moved,
        Figure(size, f"{size:.0f} bytes", ""),
        restored,
        slower(found["busy"], found["idle"]),
        beside_others,
    ]


def fill_archive(folder: Folder, tasks: int) -> None:
    """Write the files of an archive, one for each day."""
    files = []
    found = lives(tasks)
    for day in range(_DAYS):
        part = [*islice(found, tasks // _DAYS)]
        date = f"{START + timedelta(days=day):%Y-%m-%d}"
        changes = [
            (task[0], revision, at, "task", *rest)
            for task, history in part
            for revision, at, *rest in history
        ]
        table = TASKS.table([task for task, _ in part], changes)
        path = TASKS.path("default", date, "run")
        files.append(write_file(folder, TASKS, path, table.sort_by(TASKS.order)))
    Manifest("run", "tasks", "default", files).write(folder)


async def _query(location: str) -> Sample:
    """Query an archive in this process."""
    calls: dict[str, list[float]] = {"get": [], "page": [], "rare": []}

    async with open_archive(location) as archive:
        known = [task.task_id for task in (await archive.list_tasks(limit=1000)).tasks]

        async def timed(name: str, call: Any) -> None:
            began = perf_counter()
            if not await call:
                raise RuntimeError("nothing was found")
            calls[name].append((perf_counter() - began) * 1e3)

        for number in range(20):
            await timed("get", archive.get(known[number * 37]))
            user = TaskFilter(user=f"user-{number}", completed_until=START + timedelta(days=9))
            await timed("page", archive.list_tasks(user, limit=100))
            rare = TaskFilter(name_contains=f"part 9{number:03}")
            await timed("rare", archive.list_tasks(rare, limit=100))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    return {**{name: percentile(times, 0.95) for name, times in calls.items()}, "peak": peak}


async def queries(bench: Bench) -> Sequence[Figure]:
    """Measure queries of a million archived tasks, and the memory of the process."""
    with TemporaryDirectory() as folder:
        fill_archive(Folder(folder), bench.scaled(1_000_000, 1000))

        async def query() -> Sample:
            async with processes(1) as run:
                sample: Sample = await run(_query, folder)
                return sample

        found = (await bench.interleave({"query": query}))["query"]
    times = [found[name] for name in ("get", "page", "rare")]
    return [
        *(Figure(time, f"{time:.1f} ms", "") for time in times),
        Figure(found["peak"], f"{found['peak']:.0f} MB", ""),
    ]


def _moves(kind: Kind, prefix: str, title: str) -> Benchmark:
    return Benchmark(
        f"{prefix}archive-moves",
        partial(moves, kind=kind),
        (
            Line(f"{title}: tasks archived, each with four changes", "/s", at_least(30_000)),
            Line("… size of a task with its history", "bytes", at_most(100)),
            Line("… tasks restored", "/s", at_least(10_000)),
            Line("… p99 of add_task, 16 callers, beside a policy / idle", "×", at_most(2)),
            Line("… tasks archived meanwhile, in half of the time", "/s"),
        ),
        needs_server=kind == "postgresql",
    )


BENCHMARKS = (
    _moves("sqlite", "", "SQLite"),
    _moves("postgresql", "pg-", "PostgreSQL"),
    Benchmark(
        "archive-queries",
        queries,
        (
            Line("1,000,000 archived tasks: get, p95", "ms", at_most(50)),
            Line("… page of a user in a third of the days", "ms", at_most(200)),
            Line("… page by a text that one name in 10,000 has", "ms", at_most(200)),
            Line("… memory of the process", "MB", at_most(300)),
        ),
    ),
)
"""The benchmarks of the group `archive`."""
