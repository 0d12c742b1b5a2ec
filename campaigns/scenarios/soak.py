"""All methods of the store for a long time: nothing grows, and memory equals the database.

A process has many callers that use all of one store (`users`), while another store follows its
changes, with a watcher on the feed. From time to time all calls pause, and the resources of the
process are counted. The callers keep the number of tasks and the length of the feed within bounds,
so growth means a leak.

In the long form, a leak of one file, thread or task in 300,000 calls shows. The slope of the memory
comes from a least-squares line, after the warm-up of the caches.
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

from campaigns.faults.children import Child, Send
from campaigns.harness.campaign import POSTGRESQL, Campaign, Location, Run
from campaigns.harness.direct_access import LAST_REVISION, fetch
from campaigns.workloads.users import Users
from openclaw_store import CompactedError, Database, StateManager, verify

CALLERS = 128

CALLS_A_ROUND = 1000

SAMPLES = 100
"""Number of samples, if the run is long enough."""

WARM_UP = 1 / 5
"""Share of the run that is not judged."""

SILENT_SECONDS = 3600.0
"""Maximum seconds between two messages; samples of a long run are far apart."""

FINISHED_IN_MEMORY = 1000

PATIENCE_SECONDS = 60
"""Wait for the write lock, in seconds: no deadline may pass only because the machine is busy."""

MEMORY_SLOPE = 1e6
"""Maximum growth in bytes per 100,000 calls."""

SLOPE_ROUNDS = 250
"""Rounds below which the slope is not judged, because caches are still filling."""

GROWTH = 2.0
"""Maximum growth of other resources, from the first quarter of the judged samples to the last."""

GROWTH_OF_A_SHORT_RUN = 10.0
"""The same for a short run, in which pools are still filling."""


class Usage(NamedTuple):
    """Resources of the process at a moment without calls."""

    calls: int
    memory: int
    """Bytes in RAM."""
    files: int
    """Open file descriptors."""
    threads: int
    tasks: int
    """Tasks of asyncio."""
    connections: int
    """Connections of the server to this database."""


def perform(run: Run) -> None:
    """Let a process use the store, and check its resources and its final state."""
    with run.location() as location:
        usage: list[Usage] = []
        seen: dict[str, dict[str, list[list[object]]]] = {}
        arguments = (location, run.seed, run.rounds, run.folder)
        errors = run.folder / "errors"
        with Child(
            use, *arguments, errors=errors, bug=run.bug, patience_seconds=SILENT_SECONDS
        ) as child:
            for message in child.messages():
                match message:
                    case ["used", *values]:
                        new = Usage(*values)
                        run.done((new.calls - (usage[-1].calls if usage else 0)) // CALLS_A_ROUND)
                        usage.append(new)
                    case ["answered", number, refusals]:
                        run.counts.acknowledged = number
                        run.counts.refused = sum(refusals.values())
                        if "DeadlineError" in refusals:  # the machine was busy
                            run.notes["after a deadline"] = f"{refusals['DeadlineError']:,}"
                    case ["remembers", store, table, row]:
                        seen.setdefault(store, {}).setdefault(table, []).append(row)
                    case ["finding", finding]:
                        run.wrong(finding)
            status = child.wait()
        run.check(status == 0, f"the process has ended with {status}")
        run.check(
            not child.complaint, f"the process has written to its error output: {child.complaint}"
        )
        if status == 0:
            _check_usage(run, usage)
            _check_memory(run, location, seen)


def _check_usage(run: Run, usage: Sequence[Usage]) -> None:
    """Check that no resource grows."""
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
    "version": LAST_REVISION,
}


def _check_memory(
    run: Run, location: Location, seen: dict[str, dict[str, list[list[object]]]]
) -> None:
    """Check that the final memory of both stores equals the database."""
    for table, answer in zip(_TABLES, fetch(location, *_TABLES.values()), strict=True):
        rows = [list(row) for row in answer]
        for store, tables in seen.items():
            remembered = tables.get(table, [])
            different = [row for row in remembered if row not in rows]
            different += [row for row in rows if row not in remembered]
            run.check(not different, f"{store} and the database differ in {different[:5]}")
    run.check(len(seen) == 2, f"of the two stores, {len(seen)} reported its memory")


async def use(send: Send, location: str, seed: int, rounds: int, folder: str) -> None:
    """Run the process."""
    logging.getLogger("openclaw_store").setLevel(logging.ERROR)  # refused calls are expected
    async with _open(location) as store, _open(location) as follower:
        users = Users(store, seed, Path(folder))
        await users.begin()
        async with asyncio.TaskGroup() as group:
            watching = group.create_task(_watch(follower))
            for number in range(1, (samples := min(SAMPLES, rounds)) + 1):
                until = rounds * number // samples * CALLS_A_ROUND
                await asyncio.gather(*(users.work(until) for _ in range(CALLERS)))
                send("used", *await _usage(users.calls, store))
            watching.cancel()
        send("answered", users.calls - users.refusals.total(), users.refusals)
        for one in (store, follower):  # changes that are only in memory are written first
            await one.sync_to_database()
        for name, one in (("the store", store), ("its follower", follower)):
            await _remember(send, name, one)
        for problem in (await verify(store.db)).problems:
            send("finding", f"verify: {problem.text}")


def _open(location: str) -> StateManager:
    database = Database(location, timeout=PATIENCE_SECONDS, transaction_timeout=PATIENCE_SECONDS)
    return StateManager(database, 1, finished_cache_size=FINISHED_IN_MEMORY)


async def _watch(store: StateManager) -> None:
    while True:
        with suppress(CompactedError):  # slower than the callers that compact the feed
            async for _ in store.watch():
                pass


async def _usage(calls: int, store: StateManager) -> Usage:
    connections = 0
    if store.db.dialect == POSTGRESQL:
        async with store.db.session() as session:
            count = text("SELECT count(*) FROM pg_stat_activity WHERE datname = current_database()")
            connections = await session.scalar(count) or 0
    gc.collect()
    for _ in range(10):  # dropped objects are closed in the next iterations
        await asyncio.sleep(0)
    return Usage(calls, *_used_of_the_system(), len(asyncio.all_tasks()), connections)


def _used_of_the_system() -> tuple[int, int, int]:
    """Return memory, files and threads."""
    pages = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[1])
    places = (Path("/proc/self/fd"), Path("/proc/self/task"))
    files, threads = (len(list(place.iterdir())) for place in places)
    return pages * os.sysconf("SC_PAGE_SIZE"), files, threads


async def _remember(send: Send, name: str, store: StateManager) -> None:
    """Send all content of a store's memory, in the form of `_TABLES`."""
    await store.refresh_from_database()
    state, stats = await store.get_state(), await store.get_task_stats()
    for task in state.tasks.values():
        send("remembers", name, "tasks", [task.task_id, task.version, task.status])
    for node in state.nodes.values():
        row = [node.node_id, node.version, node.status, node.running_tasks]
        send("remembers", name, "nodes", row)
    for status, count in stats.items():
        if count and status != "total":
            send("remembers", name, "counts", [status, count])
    send("remembers", name, "version", [state.version])


def _unavailable_reason() -> str | None:
    if sys.platform != "linux":
        return "the resources of a process are read from /proc, on Linux only"
    return None


CAMPAIGN = Campaign(
    name="soak",
    title="all methods for a long time: nothing grows, and memory equals the database",
    promises=("P2", "P6", "P7"),
    perform=perform,
    rounds=1000,
    quick_rounds=3,
    unit="× 1,000 calls",
    bugs={"descriptor-leak": "files grow"},
    slow_bugs={"entry-leak": "memory grows"},
    unavailable_reason=_unavailable_reason,
)
