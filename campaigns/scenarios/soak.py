"""All verbs of the store for a long time: nothing grows, and memory equals the database at the end.

A process has many callers use all of one store (`users`), while another store follows its changes,
and a watcher reads the feed there. Every now and then no call is under way for a moment, and it is
counted what the process uses. The callers keep the number of tasks and the length of the feed
within bounds, so what grows has been forgotten somewhere.

In the long form, a leak of one file, thread or task in 300,000 calls shows. The slope of the memory
is that of the line with the least squares, from the moment on when caches have filled.
"""

from __future__ import annotations

import asyncio
import gc
import logging
import os
import sys
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from statistics import fmean, linear_regression
from typing import Final, NamedTuple

from sqlalchemy import text

from campaigns.faults.children import Child, Tell
from campaigns.harness.beside import ask
from campaigns.harness.campaign import POSTGRESQL, Campaign, Location, Run
from campaigns.workloads.users import Users
from openclaw_store import CompactedError, Database, StateManager, verify

CALLERS = 128

CALLS_A_ROUND = 1000

SAMPLES = 100
"""Of a run, where it is long enough."""

WARM_UP = 1 / 5
"""The share of a run that does not count."""

SILENT_SECONDS = 3600.0
"""The process tells nothing between two samples, of which those of a long run are far apart."""

FINISHED_IN_MEMORY = 1000

PATIENCE_SECONDS = 60
"""For a turn to write: no deadline is to pass because the machine is busy with other things."""

MEMORY_SLOPE = 1e6
"""Bytes in 100,000 calls, at most."""

SLOPE_ROUNDS = 250
"""With fewer, caches are still filling, and it is not judged."""

GROWTH = 2.0
"""Of anything else, from the first quarter of what counts to the last one."""

GROWTH_OF_A_SHORT_RUN = 10.0
"""The same, where pools are still being filled."""


class Usage(NamedTuple):
    """What the process uses at a moment when it does nothing."""

    calls: int
    memory: int
    """Bytes of it that are in RAM."""
    files: int
    """Open file descriptors."""
    threads: int
    tasks: int
    """Of asyncio."""
    connections: int
    """That the server has for this database."""


def perform(run: Run) -> None:
    """Have a process use the store, and look at what it has used, and left."""
    with run.location() as location:
        usage: list[Usage] = []
        seen: dict[str, dict[str, list[list[object]]]] = {}
        arguments = (location, run.seed, run.rounds, run.folder)
        errors = run.folder / "errors"
        with Child(
            use, *arguments, errors=errors, bug=run.bug, patience_seconds=SILENT_SECONDS
        ) as child:
            for message in child.told():
                match message:
                    case ["used", *values]:
                        new = Usage(*values)
                        run.done((new.calls - (usage[-1].calls if usage else 0)) // CALLS_A_ROUND)
                        usage.append(new)
                    case ["answered", number, refusals]:
                        run.counts.acknowledged = number
                        run.counts.refused = sum(refusals.values())
                        if "DeadlineError" in refusals:  # the machine was busy with other things
                            run.notes["after a deadline"] = f"{refusals['DeadlineError']:,}"
                    case ["remembers", store, table, row]:
                        seen.setdefault(store, {}).setdefault(table, []).append(row)
                    case ["finding", finding]:
                        run.wrong(finding)
            status = child.wait()
        run.check(status == 0, f"the process has ended with {status}")
        run.check(not child.complaint, f"the process has complained: {child.complaint}")
        if status == 0:
            _check_usage(run, usage)
            _check_memory(run, location, seen)


def _check_usage(run: Run, usage: Sequence[Usage]) -> None:
    """Nothing grows."""
    settled = usage[int(len(usage) * WARM_UP) :]
    quarter = -(-len(settled) // 4)
    for name in ("files", "threads", "tasks", "connections"):
        values = [float(getattr(one, name)) for one in settled]
        grown = fmean(values[-quarter:]) - fmean(values[:quarter])
        limit = GROWTH_OF_A_SHORT_RUN if run.is_quick else GROWTH
        run.check(grown < limit, f"{name} grow: {[int(value) for value in values]}")
        run.notes[name] = f"{min(values):.0f} to {max(values):.0f}"
    run.notes["memory"] = f"{settled[0].memory / 1e6:.1f} to {settled[-1].memory / 1e6:.1f} MB"
    if not run.is_quick:
        calls, memory = zip(*((one.calls, one.memory) for one in settled), strict=True)
        slope = linear_regression(calls, memory).slope * 100_000
        run.notes["memory in 100,000 calls"] = f"{slope / 1e6:+.2f} MB"
        megabytes = [round(number / 1e6, 1) for number in memory]
        run.check(
            run.rounds < SLOPE_ROUNDS or slope < MEMORY_SLOPE,
            f"memory grows by {slope / 1e6:.2f} MB in 100,000 calls: {megabytes}",
        )


_TABLES: Final = {
    "tasks": "SELECT task_id, version, status FROM tasks"
    " WHERE status IN ('pending', 'scheduled', 'running') ORDER BY task_id",
    "nodes": "SELECT node_id, version, status, running_tasks FROM nodes ORDER BY node_id",
    "counts": "SELECT status, count(*) FROM tasks GROUP BY status ORDER BY status",
    "version": "SELECT revision FROM counters",
}


def _check_memory(
    run: Run, location: Location, seen: dict[str, dict[str, list[list[object]]]]
) -> None:
    """What both stores had in memory at the end is what the database has."""
    for table, answer in zip(_TABLES, ask(location, *_TABLES.values()), strict=True):
        rows = [list(row) for row in answer]
        for store, tables in seen.items():
            remembered = tables.get(table, [])
            different = [row for row in remembered if row not in rows]
            different += [row for row in rows if row not in remembered]
            run.check(not different, f"{store} and the database differ in {different[:5]}")
    run.check(len(seen) == 2, f"of the two stores, {len(seen)} told what it remembered")


async def use(tell: Tell, location: str, seed: int, rounds: int, folder: str) -> None:
    """Be the process."""
    logging.getLogger("openclaw_store").setLevel(logging.ERROR)  # refusals are what we want
    async with _open(location) as store, _open(location) as follower:
        users = Users(store, seed, Path(folder))
        await users.begin()
        async with asyncio.TaskGroup() as group:
            watching = group.create_task(_watch(follower))
            for number in range(1, (samples := min(SAMPLES, rounds)) + 1):
                until = rounds * number // samples * CALLS_A_ROUND
                await asyncio.gather(*(users.work(until) for _ in range(CALLERS)))
                tell("used", *await _usage(users.calls, store))
            watching.cancel()
        tell("answered", users.calls - users.refusals.total(), users.refusals)
        for one in (store, follower):  # what callers have left in memory is written first
            await one.sync_to_database()
        for name, one in (("the store", store), ("its follower", follower)):
            await _remember(tell, name, one)
        for problem in (await verify(store.db)).problems:
            tell("finding", f"verify: {problem.text}")


def _open(location: str) -> StateManager:
    database = Database(location, timeout=PATIENCE_SECONDS, transaction_timeout=PATIENCE_SECONDS)
    return StateManager(database, 1, finished_cache_size=FINISHED_IN_MEMORY)


async def _watch(store: StateManager) -> None:
    while True:
        with suppress(CompactedError):  # it was slower than the callers who compact the feed
            async for _ in store.watch():
                pass


async def _usage(calls: int, store: StateManager) -> Usage:
    connections = 0
    if store.db.dialect == POSTGRESQL:
        async with store.db.session() as session:
            count = text("SELECT count(*) FROM pg_stat_activity WHERE datname = current_database()")
            connections = await session.scalar(count) or 0
    gc.collect()
    for _ in range(10):  # what was dropped is closed in the next turns of the loop
        await asyncio.sleep(0)
    return Usage(calls, *_used_of_the_system(), len(asyncio.all_tasks()), connections)


def _used_of_the_system() -> tuple[int, int, int]:
    """Memory, files and threads."""
    pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
    places = (Path("/proc/self/fd"), Path("/proc/self/task"))
    files, threads = (len(list(place.iterdir())) for place in places)
    return pages * os.sysconf("SC_PAGE_SIZE"), files, threads


async def _remember(tell: Tell, name: str, store: StateManager) -> None:
    """Tell all that a store has in memory, as `_TABLES` has it."""
    await store.refresh_from_database()
    state, stats = await store.get_state(), await store.get_task_stats()
    for task in state.tasks.values():
        tell("remembers", name, "tasks", [task.task_id, task.version, task.status])
    for node in state.nodes.values():
        row = [node.node_id, node.version, node.status, node.running_tasks]
        tell("remembers", name, "nodes", row)
    for status, count in stats.items():
        if count and status != "total":
            tell("remembers", name, "counts", [status, count])
    tell("remembers", name, "version", [state.version])


def _why_not() -> str | None:
    if sys.platform != "linux":
        return "what a process uses is read from /proc, which Linux has"
    return None


CAMPAIGN = Campaign(
    name="soak",
    title="all verbs for a long time: nothing grows, and memory equals the database",
    promises=("P2", "P6", "P7"),
    perform=perform,
    rounds=1000,
    quick_rounds=3,
    unit="× 1,000 calls",
    bugs={"descriptor-leak": "files grow"},
    slow_bugs={"entry-leak": "memory grows"},
    why_not=_why_not,
)
