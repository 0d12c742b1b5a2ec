"""Backups are made while 64 callers write.

They add tasks, change them and remove them, without a pause. Each round measures how long their
writes take for a while without a backup, and then during one; in the long form the 99th percentile
during backups must not be twice that of the time without, in the median of the rounds.

The copy is opened past the library (PostgreSQL's is restored by `pg_restore` first). It must be
complete to one revision, which is not before that of the moment at which the backup began, and not
behind that of its end: the feed has each one up to it, and followed from its beginning it leads to
the very rows there are, in the versions they have, with what was written with these versions. The
database's own check and `verify` have nothing to say, and the store works with it.
"""

from __future__ import annotations

import asyncio
import json
import os
import sqlite3
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager, closing, suppress
from pathlib import Path
from random import Random
from statistics import median
from typing import Any
from unittest.mock import patch

from sqlalchemy.exc import DBAPIError

from benchmarks.postgres import installed_package
from campaigns.campaign import SQLITE, Campaign, Location, Run
from campaigns.contents import connect
from openclaw_store import Database, StateManager, Task, TaskType, verify

WRITERS = 64

ROUNDS_A_DATABASE = 10
"""Backups of one database, before it is too large to look through each of them."""

ROWS, QUICK_ROWS = 20_000, 1000
"""Tasks that are there before, which nobody changes."""

UNDISTURBED = 0.2
"""Seconds without a backup, at least."""

WORST = 2.0
"""How many times as long writes may take, in the 99th percentile."""

TABLES = {
    "tasks": "SELECT task_id, status, version, {metadata} FROM tasks",
    "changes": "SELECT revision, item_id, to_status FROM changes ORDER BY revision",
    "counters": "SELECT revision FROM counters",
}
"""What is read of a copy."""


def perform(run: Run) -> None:
    """Make `run.rounds` backups."""
    ratios: list[float] = []
    for rounds in run.parts(ROUNDS_A_DATABASE):
        with run.location() as location:
            asyncio.run(back_up(run, location, rounds, ratios))
    run.notes["p99 during backups"] = f"{median(ratios):.2f} ×"
    run.check(
        run.is_quick or median(ratios) <= WORST,
        f"writes take {median(ratios):.1f} times as long during a backup",
    )


async def back_up(run: Run, location: Location, rounds: int, ratios: list[float]) -> None:
    """Make backups of one database."""
    async with StateManager(Database(location), None) as manager:
        number = QUICK_ROWS if run.is_quick else ROWS
        refused = await manager.add_tasks(make_task(f"old-{place}", 0) for place in range(number))
        run.check(not any(refused), "tasks were refused")
        writing = Writing(run, manager)
        async with writing.going_on():
            for round_ in range(rounds):
                ratios.append(await one_backup(run, manager, writing, round_))
                run.done()


async def one_backup(run: Run, manager: StateManager, writing: Writing, number: int) -> float:
    """Make one, look at it, and return how much longer others' writes took meanwhile."""
    copy = run.folder / f"copy-{number}"
    copy.unlink(missing_ok=True)
    before = manager.version
    began = time.monotonic()
    async with writing.measured() as during:
        await manager.db.backup(copy)
    took = time.monotonic() - began
    after = manager.version
    run.counts.acknowledged += 1
    async with writing.measured() as undisturbed:
        await asyncio.sleep(max(UNDISTURBED, took))
        while not undisturbed:  # noqa: ASYNC110  # one ends soon
            await asyncio.sleep(0.01)
    async with writing.resting(), opened(run, copy) as (location, read, is_sound):
        run.check(await is_sound(), "the database says that the copy is damaged")
        tables = {name: await read(query) for name, query in TABLES.items()}
        look(run, tables, before, after, writing)
        await use(run, location)
    # A small backup may be done before any write ends.
    return percentile(during or undisturbed, 99) / percentile(undisturbed, 99)


def look(
    run: Run, tables: dict[str, Sequence[Sequence[Any]]], before: int, after: int, writing: Writing
) -> None:
    """Look whether the copy is the database as it was at one moment during the backup."""
    [[revision]] = tables["counters"]
    run.check(before <= revision <= after, f"it is of {revision}, made from {before} to {after}")
    revisions = [change[0] for change in tables["changes"]]
    run.check(
        revisions == list(range(1, revision + 1)), f"the feed of {revision} has a gap, or more"
    )
    followed: dict[str, tuple[int, str]] = {}
    for number, id, status in tables["changes"]:
        if status is None:
            followed.pop(id, None)
        else:
            followed[id] = number, status
    rows = {id: (version, status) for id, status, version, _ in tables["tasks"]}
    differing = [id for id in rows.keys() | followed.keys() if rows.get(id) != followed.get(id)]
    for id in differing[:3]:
        run.wrong(f"{id} is {rows.get(id)} in the copy, and {followed.get(id)} by its feed")
    for id, _, version, metadata in tables["tasks"]:
        said = writing.said.get((id, version))
        value = json.loads(metadata)["value"]
        run.check(said in (None, value), f"{id} of version {version} has {value}, not {said}")


async def use(run: Run, location: Location) -> None:
    """Verify the copy, and write to it."""
    async with StateManager(Database(location), None) as manager:
        found = await verify(manager.db)
        run.check(bool(found), f"verify says {[one.text for one in found.problems][:3]}")
        await manager.add_task(make_task("new", 0))


class Writing:
    """Callers that write without a pause."""

    def __init__(self, run: Run, manager: StateManager) -> None:
        self._run, self._manager = run, manager
        self.said: dict[tuple[str, int], int] = {}
        """What was written, by task and version; only of writes that were acknowledged."""
        self._seconds: list[float] | None = None
        self._may_write = asyncio.Event()
        self._may_write.set()
        self._resting = 0
        self._ended = False

    @asynccontextmanager
    async def going_on(self) -> AsyncIterator[None]:
        """Have them write during the block."""
        async with asyncio.TaskGroup() as group:
            for name in range(WRITERS):
                group.create_task(self._write(name))
            try:
                yield
            finally:
                self._ended = True
                self._may_write.set()

    @asynccontextmanager
    async def measured(self) -> AsyncIterator[list[float]]:
        """Gives how many seconds each write takes that ends in the block."""
        seconds: list[float] = []
        self._seconds = seconds
        yield seconds
        self._seconds = None

    @asynccontextmanager
    async def resting(self) -> AsyncIterator[None]:
        """Have all of them wait during the block."""
        self._may_write.clear()
        while self._resting < WRITERS:  # noqa: ASYNC110  # each ends its write
            await asyncio.sleep(0.001)
        yield
        self._may_write.set()

    async def _write(self, name: int) -> None:
        random = Random(f"{self._run.seed} {name}")
        manager, task = self._manager, None
        for number in range(10**9):
            if not self._may_write.is_set():
                self._resting += 1
                await self._may_write.wait()
                self._resting -= 1
            if self._ended:
                break
            if task is None:
                task = make_task(f"{name}-{number}", number)
                await self._timed(manager.add_task(task))
            elif random.random() < 0.1:
                await self._timed(manager.remove_task(task.task_id))
                task = None
                continue
            else:
                task.metadata = {"value": number}
                await self._timed(manager.update_task(task))
            self.said[task.task_id, task.version] = number

    async def _timed(self, write: Awaitable[bool]) -> None:
        began = time.perf_counter()
        await write
        if self._seconds is not None:
            self._seconds.append(time.perf_counter() - began)
        self._run.counts.acknowledged += 1


Read = Callable[[str], Awaitable[Sequence[Sequence[Any]]]]


@asynccontextmanager
async def opened(
    run: Run, copy: Path
) -> AsyncIterator[tuple[Location, Read, Callable[[], Awaitable[bool]]]]:
    """A copy's location, what reads it, and what asks the database whether it is sound."""
    if run.kind == SQLITE:
        with closing(sqlite3.connect(copy)) as connection:

            async def read(query: str) -> Sequence[Sequence[Any]]:
                return connection.execute(query.format(metadata="metadata")).fetchall()

            async def is_sound() -> bool:
                return (
                    await read("PRAGMA integrity_check") == [("ok",)]
                    and await read("PRAGMA foreign_key_check") == []
                )

            yield copy, read, is_sound
        return
    url = await run.server.create_database()
    target = url.replace("+asyncpg", "")
    program = programs() / "pg_restore"
    restoring = await asyncio.create_subprocess_exec(
        program, "--exit-on-error", "--no-owner", f"--dbname={target}", copy
    )
    restored = await restoring.wait() == 0
    past = await connect(url)

    async def read_all(query: str) -> Sequence[Sequence[Any]]:
        rows: Sequence[Sequence[Any]] = await past.fetch(query.format(metadata="metadata::text"))
        return rows

    async def was_restored() -> bool:
        return restored

    try:
        yield url, read_all, was_restored
    finally:
        await past.close()
        with suppress(DBAPIError):  # somebody may still count as connected
            await run.server.drop_database(url)


def programs() -> Path:
    """Where PostgreSQL's programs are."""
    return installed_package() / "pginstall" / "bin"


def make_task(id: str, value: int) -> Task:
    """A task with a number to be found again."""
    return Task.create(TaskType.BATCH, "t", task_id=id, metadata={"value": value})


def percentile(values: Sequence[float], percent: int) -> float:
    """The value that so many percent do not exceed."""
    return sorted(values)[(len(values) * percent - 1) // 100]


def perform_with_programs(run: Run) -> None:
    """Have the package's programs be found first: `pg_dump` must not be older than the server."""
    path = os.environ["PATH"]
    if run.kind != SQLITE:
        path = f"{programs()}{os.pathsep}{path}"
    with patch.dict(os.environ, PATH=path):
        perform(run)


CAMPAIGN = Campaign(
    "backup",
    "Backups are made while 64 callers write.",
    ("P1", "P5", "P7"),
    perform_with_programs,
    rounds=100,
    quick_rounds=2,
    unit="backups",
)
