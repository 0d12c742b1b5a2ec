"""Every call at its worst legal size, beside callers that write and read: nothing stalls.

A round is one call of `WORST_CALLS`. Sixteen callers add, read and claim tasks for a second first,
and then beside the call. The figures of a call are its duration, the longest pause of the event
loop, and the 99th percentile of the other callers against the second before.
"""

from __future__ import annotations

import asyncio
import gc
import time
from collections.abc import AsyncIterator, Awaitable
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from itertools import count, islice
from pathlib import Path
from typing import Any

from campaigns.harness.campaign import Campaign, Location, Run, within
from campaigns.harness.latencies import p99
from campaigns.workloads.worst_calls import WORST_CALLS, Crowd, WorstCall
from openclaw_store import Database, NodeInfo, StateManager, Task, TaskType

CALLERS = 16

TICK_SECONDS = 0.001

LONGEST_WAIT_SECONDS = 10.0
"""A caller that waits for longer has stalled, on a busy machine too."""

LONGEST_PAUSE_SECONDS = 1.0
"""The same for the event loop."""

SECONDS = 600.0
"""Patience with one call."""


@dataclass
class Load:
    """Callers beside a call, and what they measure."""

    store: StateManager
    latencies: list[float] = field(default_factory=list)
    pauses: list[float] = field(default_factory=list)

    @asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """Run the callers until the block ends."""
        stop = asyncio.Event()
        tasks = [asyncio.create_task(self._call(n, stop)) for n in range(CALLERS)]
        ticks = asyncio.create_task(self._tick(stop))
        try:
            yield
        finally:
            stop.set()
            await asyncio.gather(*tasks, ticks)

    async def _tick(self, stop: asyncio.Event) -> None:
        last = time.perf_counter()
        while not stop.is_set():
            await asyncio.sleep(TICK_SECONDS)
            now = time.perf_counter()
            self.pauses.append(now - last - TICK_SECONDS)
            last = now

    async def _call(self, caller: int, stop: asyncio.Event) -> None:
        for number in count():
            task = Task.create(TaskType.BATCH, "beside", required_skills=["beside"])
            await self.store.update_heartbeat(f"beside-{caller}")  # `recover` leaves it online
            for work in (
                self.store.add_task(task),
                self.store.get_task(task.task_id),
                self.store.claim_tasks(f"beside-{caller}", 1, start=True),
            ):
                began = time.perf_counter()
                found: Any = await work
                self.latencies.append(time.perf_counter() - began)
            for one in found:
                await self.store.complete_task(one)
            if stop.is_set() and number:
                return


async def _measure(run: Run, crowd: Crowd, name: str, worst: WorstCall) -> tuple[float, float]:
    """Measure one call; return the longest pause, and the ratio of the other callers' p99."""
    given = await worst.before(crowd) if worst.before is not None else None
    idle, busy = Load(crowd.store), Load(crowd.store)
    async with idle.running():
        await asyncio.sleep(0.05 if run.is_quick else 1.0)
    began = time.perf_counter()
    async with busy.running():
        await within(_done(worst.call(crowd, given)), name, SECONDS)
        seconds = time.perf_counter() - began
        await asyncio.sleep(0.05)
    pause, longest = max(busy.pauses), max(busy.latencies)
    ratio = p99(busy.latencies) / p99(idle.latencies)
    run.counts.acknowledged += 1 + len(idle.latencies) + len(busy.latencies)
    if not run.is_quick:
        run.check(longest < LONGEST_WAIT_SECONDS, f"{name}: a caller waited for {longest:.1f} s")
        run.check(pause < LONGEST_PAUSE_SECONDS, f"{name}: the loop stood still for {pause:.2f} s")
    run.notes[name] = f"{seconds:.2f} s, pause {pause * 1e3:.0f} ms, p99 {ratio:.1f} ×"
    return pause, ratio


async def _done(work: Awaitable[object]) -> object:
    return await work


async def _perform(run: Run, location: Location, target: Location) -> None:
    many = 200 if run.is_quick else 20_000
    size = 100_000 if run.is_quick else 15 << 20
    store = StateManager(Database(location, timeout=60), auto_sync_interval=1.0)
    async with run.opened(store):
        large = Task.create(TaskType.BATCH, "large", "", ["large"], parameters={"t": "x" * size})
        crowd = Crowd(
            store, many, "x" * size, lambda: Database(target), run.folder / "backups", large
        )
        await asyncio.to_thread(crowd.folder.mkdir, exist_ok=True)
        await store.add_task(large)
        for number in range(CALLERS):
            await store.register_node(
                NodeInfo(f"beside-{number}", "host", available_skills=["beside"])
            )
        await store.add_tasks(crowd.task(task_id=f"t-{number}") for number in range(5 * many))
        if not run.is_quick:
            gc.freeze()  # as the documentation recommends to a program that has loaded its data
        pauses: dict[str, float] = {}
        ratios: dict[str, float] = {}
        for name, worst in islice(WORST_CALLS.items(), run.rounds):
            pauses[name], ratios[name] = await _measure(run, crowd, name, worst)
            run.done()
    slowest, worst_ratio = max(pauses, key=pauses.__getitem__), max(ratios, key=ratios.__getitem__)
    run.notes["longest pause"] = f"{pauses[slowest] * 1e3:.0f} ms ({slowest})"
    run.notes["highest p99"] = f"{ratios[worst_ratio]:.1f} × ({worst_ratio})"


def perform(run: Run) -> None:
    """Measure the first calls of the catalogue."""
    with run.location() as location, run.location(migrated=False) as target:
        if isinstance(target, Path):
            target.unlink(missing_ok=True)
        asyncio.run(_perform(run, location, target))


CAMPAIGN = Campaign(
    name="stalls",
    title="each call at its worst legal size, beside 16 callers",
    promises=("P7",),
    perform=perform,
    rounds=len(WORST_CALLS),
    quick_rounds=1,
    unit="calls",
)
