"""The effect of the store on its event loop: heartbeats, and long calls."""

from __future__ import annotations

import asyncio
import gc
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager
from functools import partial
from itertools import count
from pathlib import Path
from time import perf_counter, process_time
from types import TracebackType
from typing import Any, Self

from benchmarks.measure import Bench, Contender, Figure, Sample, drive, no_collections
from benchmarks.work import fill, make_tasks, rows
from openclaw_store import Database, StateManager, Task, TaskRepository, TaskStatus

Heartbeat = Callable[..., Awaitable[bool]]

_TICKS = 100  # a second
_NOTHING, _COLLECTION = "idle", "garbage collection"


async def heartbeats(bench: Bench) -> Sequence[Figure]:
    """Measure heartbeats of a thousand nodes: their CPU time, and the delay of other clients."""
    nodes = [f"node-{number:04}" for number in range(1000)]
    seconds = bench.scaled(5000, 200) / 1000
    writes = bench.scaled(25_600, 640)

    async def use_cpu(store: StateManager, beat: Heartbeat) -> Sample:
        async with _background(_send(nodes, beat)):
            began, cpu_began = perf_counter(), process_time()
            await asyncio.sleep(seconds)
            share = (process_time() - cpu_began) / (perf_counter() - began)
        return {"core_percent": share * 100}

    async def write(store: StateManager, beat: Heartbeat) -> Sample:
        tasks = make_tasks(writes)
        async with _background(_send(nodes, beat)):
            with no_collections():
                return await drive(64, tasks, store.add_task)

    async def with_store(
        measure: Callable[[StateManager, Heartbeat], Awaitable[Sample]], *, beating: bool
    ) -> Sample:
        with bench.database() as path:
            fill(path, rows(1000), nodes=len(nodes))
            async with StateManager(Database(path)) as store:
                return await measure(store, store.update_heartbeat if beating else _ignore)

    contenders: dict[str, Contender] = {
        f"{name}, {beating}": partial(with_store, measure, beating=beating == "heartbeats")
        for name, measure in (("cpu", use_cpu), ("writes", write))
        for beating in ("heartbeats", "idle")
    }
    busy, idle, beside, alone = (await bench.interleave(contenders)).values()
    return [
        Figure(
            busy["core_percent"] - idle["core_percent"],
            f"{busy['core_percent']:.1f} %",
            f"idle {idle['core_percent']:.1f} %",
        ),
        Figure(
            beside["p99_ms"] / alone["p99_ms"],
            f"{beside['p99_ms']:.1f} ms",
            f"{alone['p99_ms']:.1f} ms",
        ),
    ]


async def _send(nodes: Sequence[str], beat: Heartbeat) -> None:
    """Send each node's heartbeat once a second, spread over the second."""
    began = perf_counter()
    for tick in count(1):
        usage = {"cpu_usage": tick % 97, "memory_usage": tick % 89, "running_tasks": tick % 4}
        for node in nodes[tick % _TICKS :: _TICKS]:
            await beat(node, **usage)
        await asyncio.sleep(began + tick / _TICKS - perf_counter())


async def _ignore(node_id: str, **usage: float) -> bool:
    return True


@asynccontextmanager
async def _background(work: Any) -> AsyncIterator[None]:
    task = asyncio.create_task(work)
    try:
        yield
    finally:
        task.cancel()
        await asyncio.wait([task])


class Watch:
    """Measures the delay of a coroutine that only sleeps for a millisecond.

    Passes of the garbage collector are counted separately, because they hit calls at random.
    """

    _SLEEP = 0.001

    async def __aenter__(self) -> Self:
        self.longest = self.longest_collection = 0.0
        self._collected = 0.0
        self._collecting_since: float | None = None
        gc.callbacks.append(self._collector)
        self._ticking = asyncio.create_task(self._tick())
        await asyncio.sleep(2 * self._SLEEP)
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        await asyncio.sleep(2 * self._SLEEP)  # to include a pause that has just ended
        self._ticking.cancel()
        gc.callbacks.remove(self._collector)

    async def _tick(self) -> None:
        while True:
            began, collected = perf_counter(), self._collected + self._open_pass()
            await asyncio.sleep(self._SLEEP)
            collected = self._collected + self._open_pass() - collected
            pause = perf_counter() - began - self._SLEEP - collected
            self.longest = max(self.longest, pause)

    def _open_pass(self) -> float:
        """Return the seconds of a pass of which another thread has yet to report the end."""
        since = self._collecting_since
        return 0.0 if since is None else perf_counter() - since

    def _collector(self, phase: str, info: dict[str, int]) -> None:
        if phase == "start":
            self._collecting_since = perf_counter()
        else:
            seconds = self._open_pass()
            self._collecting_since = None
            self._collected += seconds
            self.longest_collection = max(self.longest_collection, seconds)


async def pauses(bench: Bench) -> Sequence[Figure]:
    """Measure the longest pause of the event loop in each long call, with very many live tasks."""
    live, finished = bench.scaled(100_000), bench.scaled(10_000)
    foreign, unsaved = bench.scaled(10_000), bench.scaled(1000)

    async def clean_up(store: StateManager) -> None:
        removed = await store.task_repo.cleanup_old_tasks(days=1)
        if removed != finished:
            raise RuntimeError(f"{removed} tasks were removed instead of {finished}")

    async def measure(source: Path) -> Sample:
        longest: dict[str, float] = {}
        collections = []

        async def watch(name: str, call: Awaitable[object]) -> None:
            async with Watch() as watch:
                result = await call  # the caller pays for freeing it
            del result
            longest[name] = watch.longest * 1e3
            collections.append(watch.longest_collection * 1e3)

        with bench.database(source) as path:
            store = StateManager(Database(path), None)
            await watch(_NOTHING, asyncio.sleep(bench.scaled(500) / 1000))
            await watch("initialize", store.initialize())
            async with store:
                await watch("get_state", store.get_state())
                await watch("get_pending_tasks", store.get_pending_tasks(None))
                await watch("get_all_nodes", store.get_all_nodes())
                await _change_elsewhere(path, foreign)
                await watch("refresh", store.refresh_from_database())
                for task in make_tasks(unsaved):
                    await store.add_task(task, persist=False)
                await watch("sync", store.sync_to_database())
                pending = store.task_repo.list_by_status(TaskStatus.PENDING)
                await watch("list_by_status", pending)
                await watch("cleanup", clean_up(store))
        return {**longest, _COLLECTION: max(collections)}

    with bench.database() as source:
        every = live // finished
        fill(source, rows(live + finished, pending=every, of=every + 1), nodes=1000)
        measured = await bench.interleave({"openclaw_store": partial(measure, source)})
    pauses = dict(measured["openclaw_store"])
    nothing, collection = pauses.pop(_NOTHING), pauses.pop(_COLLECTION)
    worst = max(pauses, key=pauses.__getitem__)
    others = ", ".join(f"{name} {pause:.1f}" for name, pause in pauses.items() if name != worst)
    return [
        Figure(pauses[worst], f"{worst} {pauses[worst]:.1f} ms", f"{others}, idle {nothing:.1f}"),
        Figure(collection, f"{collection:.0f} ms", ""),
    ]


async def _change_elsewhere(path: Path, count: int) -> None:
    """Change tasks as another process would."""
    async with Database(path) as database:
        repository = TaskRepository(database)

        async def describe(task: Task) -> None:
            task.description = "changed elsewhere"
            await repository.update(task)

        await asyncio.gather(*map(describe, await repository.list_pending_tasks(count)))
