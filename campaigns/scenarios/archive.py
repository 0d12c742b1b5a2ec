"""Processes that archive, restore and compact are killed: each task stays in exactly one place.

A child adds finished tasks, moves them to an archive, restores some and merges the files, again and
again, until it is killed at a random moment. Then each acknowledged task must be live or archived;
after the next run, which continues or undoes the interrupted one, in exactly one of both.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from datetime import timedelta
from pathlib import Path
from typing import Any

from sqlalchemy import delete

from campaigns.checks.audit import verify_database
from campaigns.faults.children import Child
from campaigns.harness.campaign import POSTGRESQL, Campaign, Location, Run
from campaigns.harness.direct_access import wait_until_disconnected
from openclaw_store import (
    Database,
    Retention,
    Task,
    TaskFilter,
    TaskRepository,
    TaskStatus,
    TaskType,
    open_archive,
)
from openclaw_store.archive import mover
from openclaw_store.archive.check import verify_archive
from openclaw_store.archive.compaction import compact_archive
from openclaw_store.archive.restore import restore_tasks
from openclaw_store.archive.retain import retain
from openclaw_store.archive.runs import unfinished
from openclaw_store.database import LeaseRow

KILLS_A_DATABASE = 25
"""Kills before a new database is begun, since the check of a larger one takes longer."""

TASKS_A_ROUND = 40

_GRACE_SECONDS = 0.05
"""Seconds for which replaced files stay, so that kills also hit their removal."""

_LONGEST_SECONDS = 0.8
"""Seconds after the first round at which a process is killed at the latest."""


def policy(folder: str | Path) -> Retention:
    """Return the policy that moves every finished task."""
    return Retention(completed=timedelta(0), history=timedelta(0), archive=folder, load=1.0)


async def work(send: Any, location: str, folder: str, seed: int) -> None:
    """Move tasks to and fro until killed; send the identifiers of committed tasks."""
    mover.GRACE_SECONDS = _GRACE_SECONDS
    async with Database(location) as database:
        tasks = TaskRepository(database)
        number = 0
        while True:
            number += 1
            for place in range(TASKS_A_ROUND):
                task = Task.create(
                    task_type=TaskType.BATCH,
                    name="kill",
                    task_id=f"{seed}-{number}-{place}",
                    user_id=f"user {place % 3}",
                    status=TaskStatus.COMPLETED,
                )
                await tasks.create(task)
                send(task.task_id)
            await retain(database, policy(folder), patience=60)
            send(None)  # the packages are loaded, and a first run has ended
            await restore_tasks(database, folder, TaskFilter(user=f"user {number % 3}"))
            await compact_archive(database, folder)


def perform(run: Run) -> None:
    """Make `run.rounds` kills."""
    mover.GRACE_SECONDS = _GRACE_SECONDS
    for kills in run.parts(KILLS_A_DATABASE):
        with run.location() as location:
            folder = run.folder / f"archive-{run.completed}"
            known: set[str] = set()
            for number in range(kills):
                known |= _kill(run, location, folder, run.completed * 1000 + number)
                asyncio.run(_check(run, location, folder, known))
                run.done()
            verify_database(run, location)


def _kill(run: Run, location: Location, folder: Path, seed: int) -> set[str]:
    """Let a process work, and kill it; return the identifiers that it has acknowledged."""
    known: set[str] = set()
    delay = run.random.random() * _LONGEST_SECONDS
    with Child(work, location, folder, seed, errors=run.folder / "errors", bug=run.bug) as child:
        messages = child.messages()
        for (id,) in messages:
            if id is None:
                break
            known.add(id)
        asyncio.run(asyncio.sleep(delay))
        child.kill()
        known |= {id for (id,) in messages if id is not None}
    if run.kind == POSTGRESQL:
        wait_until_disconnected(location)
    run.counts.acknowledged += len(known)
    return known


async def _check(run: Run, location: Location, folder: Path, known: set[str]) -> None:
    async with Database(location) as database:
        live, archived = await _places(database, folder)
        for id in sorted(known - live - archived.keys()):
            run.lost(f"task {id} is in neither place after a kill")
        if run.counts.lost:
            return  # the next run may miss a file
        async with database.transaction() as tx:
            # The lease of the killed process would end by itself, after a minute.
            await tx.execute(delete(LeaseRow))
        await retain(database, policy(folder))
        live, archived = await _places(database, folder)
        left = {run.state for run in await unfinished(database)} - {"undone"}
        run.check(not left, "a run is left after the next one")
        for id in sorted(known - live - archived.keys()):
            run.lost(f"task {id} is in neither place after the next run")
        for id in sorted(live & archived.keys()):
            run.wrong(f"task {id} is in both places after the next run")
        for id, copies in sorted(archived.items()):
            run.check(copies == 1, f"task {id} is in the archive {copies} times")
    found = await verify_archive(folder)
    for problem in (*found.problems, *found.remarks):
        run.wrong(f"the archive: {problem}")


async def _places(database: Database, folder: Path) -> tuple[set[str], Counter[str]]:
    """Return the live tasks, and the number of copies of each archived one."""
    live = {task.task_id async for task in TaskRepository(database).iter_tasks()}
    async with open_archive(folder) as archive:
        return live, Counter([task.task_id async for task in archive.iter_tasks()])


CAMPAIGN = Campaign(
    name="archive",
    title="processes that archive, restore and compact are killed",
    promises=("P1", "P2"),
    perform=perform,
    rounds=100,
    quick_rounds=1,
    unit="kills",
    bugs={"delete-before-archive": "is in neither place"},
)
