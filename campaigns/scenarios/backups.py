"""Backups during the writes of 64 callers.

The callers add, change and remove tasks without a pause. Each round measures the duration of their
writes for a while without a backup, and then during one; in the long form the 99th percentile
during backups must be less than twice the one without, in the median of the rounds.

The copy is opened without the library (PostgreSQL's is restored by `pg_restore` first). It must be
complete up to one revision, between those at the begin and at the end of the backup: the feed
contains each revision up to it, and a replay of the feed gives exactly the rows of the copy, with
their versions and the content that was written with these versions. The database's own check and
`verify` must find nothing, and the store must work with the copy.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator, Awaitable, Sequence
from contextlib import asynccontextmanager, suppress
from itertools import count
from pathlib import Path
from random import Random
from statistics import median

from sqlalchemy.exc import DBAPIError

from campaigns.harness.campaign import SQLITE, Campaign, Location, Run, within
from campaigns.harness.direct_access import LAST_REVISION, Rows, driver_url, fetch, find_damage
from campaigns.harness.latencies import p99
from openclaw_store import Database, StateManager, Task, TaskType, verify

WRITERS = 64

ROUNDS_A_DATABASE = 10
"""Backups of one database, before it is too large to check each of them."""

ROWS, QUICK_ROWS = 20_000, 1000
"""Tasks that exist before, and do not change."""

UNDISTURBED_SECONDS = 0.2
"""Minimum seconds of the measurement without a backup."""

BACKUP_SECONDS = 600
"""Seconds after which a backup counts as hanging."""

WORST = 2.0
"""Maximum ratio of write durations, in the 99th percentile."""

QUERIES = (
    "SELECT task_id, status, version, CAST(metadata AS text) FROM tasks",
    "SELECT revision, item_id, to_status FROM changes ORDER BY revision",
    LAST_REVISION,
)
"""Queries on a copy."""


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
    async with run.opened(StateManager(Database(location), None)) as manager:
        number = QUICK_ROWS if run.is_quick else ROWS
        refused = await manager.add_tasks(make_task(f"old-{place}", 0) for place in range(number))
        run.check(not any(refused), "tasks were refused")
        writing = Writing(run, manager)
        async with writing.running():
            for round_ in range(rounds):
                backup = one_backup(run, manager, writing, round_)
                ratios.append(await within(backup, "a backup", BACKUP_SECONDS))
                run.done()


async def one_backup(run: Run, manager: StateManager, writing: Writing, number: int) -> float:
    """Make a backup, check it, and return the slowdown of concurrent writes."""
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
        # As long as the backup, so that both percentiles have samples of one size.
        await asyncio.sleep(max(UNDISTURBED_SECONDS, took))
        while not undisturbed:  # noqa: ASYNC110  # a write ends soon
            await asyncio.sleep(0.01)
    async with writing.paused(), restored(run, copy) as location:
        found = await asyncio.to_thread(find_damage, location)
        run.check(not found, f"the database says that the copy is damaged: {found}")
        check_copy(run, await asyncio.to_thread(fetch, location, *QUERIES), before, after, writing)
        await use(run, location)
    # A small backup may be done before any write ends.
    return p99(during or undisturbed) / p99(undisturbed)


def check_copy(
    run: Run, answers: Sequence[Rows], before: int, after: int, writing: Writing
) -> None:
    """Check that the copy is the database at one moment during the backup."""
    tasks, changes, [[revision]] = answers
    run.check(
        before <= revision <= after,
        f"the copy has revision {revision}, outside {before} to {after}",
    )
    revisions = [change[0] for change in changes]
    run.check(
        revisions == list(range(1, revision + 1)), f"the feed of {revision} has a gap, or too many"
    )
    # A replay of the feed: the version of a row is the revision of its last change.
    followed: dict[str, tuple[int, str]] = {}
    for number, id, status in changes:
        if status is None:
            followed.pop(id, None)
        else:
            followed[id] = number, status
    rows = {id: (version, status) for id, status, version, _ in tasks}
    differing = [id for id in rows.keys() | followed.keys() if rows.get(id) != followed.get(id)]
    for id in differing[:3]:
        run.wrong(f"{id} is {rows.get(id)} in the copy, but {followed.get(id)} in its feed")
    for id, _, version, metadata in tasks:
        expected = writing.acknowledged.get((id, version))
        value = json.loads(metadata)["value"]
        run.check(
            expected in (None, value), f"{id} of version {version} has {value}, not {expected}"
        )


async def use(run: Run, location: Location) -> None:
    """Verify the copy, and write to it."""
    async with run.opened(StateManager(Database(location), None)) as manager:
        found = await verify(manager.db)
        run.check(bool(found), f"verify says {[one.text for one in found.problems][:3]}")
        await manager.add_task(make_task("new", 0))


class Writing:
    """Callers that write without a pause."""

    def __init__(self, run: Run, manager: StateManager) -> None:
        self._run, self._manager = run, manager
        self.acknowledged: dict[tuple[str, int], int] = {}
        """The values of acknowledged writes, by task and version."""
        self._seconds: list[float] | None = None
        self._may_write = asyncio.Event()
        self._may_write.set()
        self._paused = 0
        self._ended = False

    @asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """Let them write during the block."""
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
        """Provide a list of the durations, in seconds, of all writes that end in the block."""
        seconds: list[float] = []
        self._seconds = seconds
        yield seconds
        self._seconds = None

    @asynccontextmanager
    async def paused(self) -> AsyncIterator[None]:
        """Let all of them pause during the block."""
        self._may_write.clear()
        while self._paused < WRITERS:  # noqa: ASYNC110  # each finishes its write first
            await asyncio.sleep(0.001)
        yield
        self._may_write.set()

    async def _write(self, name: int) -> None:
        random = Random(f"{self._run.seed} {name}")
        manager, task = self._manager, None
        for number in count():
            if not self._may_write.is_set():
                self._paused += 1
                await self._may_write.wait()
                self._paused -= 1
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
            self.acknowledged[task.task_id, task.version] = number

    async def _timed(self, write: Awaitable[bool]) -> None:
        began = time.perf_counter()
        await write
        if self._seconds is not None:
            self._seconds.append(time.perf_counter() - began)
        self._run.counts.acknowledged += 1


@asynccontextmanager
async def restored(run: Run, copy: Path) -> AsyncIterator[Location]:
    """Provide the location of a copy: the file itself, or a restored database on the server."""
    if run.kind == SQLITE:
        yield copy
        return
    url = await run.server.create_database()
    restoring = await asyncio.create_subprocess_exec(
        "pg_restore", "--exit-on-error", "--no-owner", f"--dbname={driver_url(url)}", copy
    )
    run.check(await restoring.wait() == 0, "the copy cannot be restored")
    try:
        yield url
    finally:
        with suppress(DBAPIError):  # the server may still list a closed connection
            await run.server.drop_database(url)


def make_task(id: str, value: int) -> Task:
    """Return a task that contains a number."""
    return Task.create(TaskType.BATCH, "t", task_id=id, metadata={"value": value})


CAMPAIGN = Campaign(
    name="backup",
    title="backups during the writes of 64 callers",
    promises=("P1", "P5", "P7"),
    perform=perform,
    rounds=100,
    quick_rounds=2,
    unit="backups",
)
