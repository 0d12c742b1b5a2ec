"""Many clusters at one location, written by several processes at the same time.

A round is a cluster; there are two at least. Each process opens all clusters, and in a random
order adds, claims and completes tasks, one by one and in transactions; inside a transaction of one
cluster, it writes to another one. These conditions must hold:

- Each cluster has a feed of its own, without a gap, that names its own tasks alone; all
  acknowledged tasks are in their cluster, and in no other.
- A process hears of the commits of the others, in each cluster.
- No call waits for the lock of another cluster. Afterwards the library finds no problem.
"""

from __future__ import annotations

import asyncio
import os
import sys
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from pathlib import Path
from random import Random
from typing import Any

from campaigns.faults.children import Child, Send
from campaigns.harness.campaign import POSTGRESQL, SQLITE, Campaign, Location, Run
from campaigns.harness.direct_access import fetch
from openclaw_store import (
    Clusters,
    Database,
    NodeInfo,
    Server,
    StateManager,
    Task,
    TaskRepository,
    TaskType,
    verify,
)

PROCESSES = 8
FEW_PROCESSES = 2
"""Number of processes in the long and in the short form."""

STEPS, FEW_STEPS = 40, 5
"""Writes of a process in each cluster, about, in the long and in the short form."""

IDLE_SECONDS = 0.02
"""Time after which a writer gives its connection back: a server allows 100 by default."""

LOCK_SECONDS, SHORT_LOCK_SECONDS = 30.0, 2.0
"""Time limit for a lock, and the one with a planted bug, which may have a call wait for itself."""

BLOCK_SECONDS = 60.0
"""Time limit of a transaction, in which another one waits for its lock."""

HEARD_SECONDS = 60.0
"""Time limit for a process to hear of the last commits of the others."""


def perform(run: Run) -> None:
    """Write to as many clusters as there are rounds."""
    processes, steps = (FEW_PROCESSES, FEW_STEPS) if run.is_quick else (PROCESSES, STEPS)
    names = [f"cluster_{number}" for number in range(max(run.rounds, 2))]
    lock_seconds = SHORT_LOCK_SECONDS if run.bug else LOCK_SECONDS
    with run.location(migrated=False) as location:
        places = _places(location)
        asyncio.run(_create(places, names))
        acknowledged: dict[str, set[str]] = {name: set() for name in names}
        with Child(
            write_in_forks, places, names, processes, steps, lock_seconds,
            run.random.getrandbits(32), errors=run.folder / "errors", bug=run.bug,
        ) as child:  # fmt: skip
            for what, name, text in child.messages():
                if what == "acknowledged":
                    acknowledged[name].add(text)
                else:
                    run.wrong(f"{name}: {text}")
            run.check(child.wait() == 0, f"a process failed: {child.complaint}")
        for name in names:
            _judge(run, places, name, acknowledged[name])
        for _ in range(run.rounds):
            run.done()


def _places(location: Location) -> Location:
    return location.parent / "{cluster}.db" if isinstance(location, Path) else location


async def _create(places: Location, names: Sequence[str]) -> None:
    for name in names:
        await Clusters(places).create(name)


def write_in_forks(
    send: Send, places: str, names: Sequence[str], processes: int, steps: int,
    lock_seconds: float, seed: int,
) -> None:  # fmt: skip
    """Write in several processes; exit with an error if one of them fails."""
    random, children = Random(seed), []
    for number in range(processes):
        own = random.getrandbits(32)
        child = os.fork()
        if child == 0:
            asyncio.run(_write(send, places, names, number, processes, steps, lock_seconds, own))
            return
        children.append(child)
    failures = [os.waitpid(child, 0)[1] for child in children]
    sys.exit(any(failures))


async def _write(
    send: Send, places: str, names: Sequence[str], number: int, processes: int, steps: int,
    lock_seconds: float, seed: int,
) -> None:  # fmt: skip
    """Write to all clusters, and report the acknowledged tasks and all that is wrong."""
    async with _opened(places, names, lock_seconds) as states:
        process = _Process(send, states, number, Random(seed))
        await process.begin()
        for _ in range(steps * len(names)):
            await process.step()
        await process.hear(processes)


@asynccontextmanager
async def _opened(
    places: str, names: Sequence[str], lock_seconds: float
) -> AsyncIterator[dict[str, StateManager]]:
    async with AsyncExitStack() as stack:
        server = await stack.enter_async_context(
            Server(places, idle_seconds=IDLE_SECONDS, pool_size=1, timeout=lock_seconds)
        )
        states = {name: StateManager(server.cluster(name), 3600) for name in names}
        for state in states.values():
            await stack.enter_async_context(state)
        yield states


class _Process:
    """The writes of one process."""

    def __init__(
        self, send: Send, states: dict[str, StateManager], number: int, random: Random
    ) -> None:
        self._send, self._states, self._random = send, states, random
        self._number, self._made = number, 0

    async def begin(self) -> None:
        """Register a node in each cluster, and add a task."""
        for name, state in self._states.items():
            node = NodeInfo(f"{name}-node-{self._number}", "localhost")
            await state.register_node(node)
            await self._add(name)

    async def step(self) -> None:
        """Write to a random cluster."""
        name = self._random.choice([*self._states])
        state = self._states[name]
        match self._random.randrange(4):
            case 0:
                await self._claim(name, state)
            case 1:
                await self._add_inside(name, state)
            case _:
                await self._add(name)

    async def _add(self, name: str) -> None:
        task = self._task(name)
        await self._states[name].add_task(task)
        self._send("acknowledged", name, task.task_id)

    async def _claim(self, name: str, state: StateManager) -> None:
        for task in await state.claim_tasks(f"{name}-node-{self._number}", start=True):
            if task.name != name:
                self._send("wrong", name, f"a claim returned a task of {task.name}")
            await state.complete_task(task, {"by": self._number})

    async def _add_inside(self, name: str, state: StateManager) -> None:
        """Add two tasks in a transaction, and meanwhile one to another cluster."""
        tasks = [self._task(name), self._task(name)]
        other = self._random.choice([*self._states])
        inside = self._task(other)
        async with state.db.transaction(timeout=BLOCK_SECONDS) as tx:
            await TaskRepository(tx).create(tasks[0])
            if other > name:  # in one order, else two processes wait for each other
                await self._states[other].add_task(inside)
                self._send("acknowledged", other, inside.task_id)
            await TaskRepository(tx).create(tasks[1])
        for task in tasks:
            self._send("acknowledged", name, task.task_id)

    async def hear(self, processes: int) -> None:
        """Add a last task to each cluster, and wait for those of the other processes."""
        for name, state in self._states.items():
            task = self._task(name, f"{name}-last-{self._number}")
            task.required_skills = ["none"]  # it stays pending
            await state.add_task(task)
            self._send("acknowledged", name, task.task_id)
        for name, state in self._states.items():
            try:
                async with asyncio.timeout(HEARD_SECONDS):
                    for other in range(processes):
                        await _until_known(state, f"{name}-last-{other}")
            except TimeoutError:
                self._send("wrong", name, f"process {self._number} does not hear of the others")

    def _task(self, name: str, id: str | None = None) -> Task:
        self._made += 1
        id = id or f"{name}-{self._number}-{self._made}"
        return Task.create(TaskType.BATCH, name, task_id=id)


async def _until_known(state: StateManager, id: str) -> None:
    while id not in (await state.get_state()).tasks:  # noqa: ASYNC110 - it must come by itself
        await asyncio.sleep(0.01)


def _judge(run: Run, places: Location, name: str, acknowledged: set[str]) -> None:
    """Judge a cluster by its rows."""
    schema = "" if isinstance(places, Path) else f"{name}."
    location = Path(str(places).replace("{cluster}", name)) if isinstance(places, Path) else places
    changes, tasks = fetch(
        location,
        f"SELECT revision, item_id FROM {schema}changes ORDER BY revision",
        f"SELECT task_id FROM {schema}tasks",
    )
    stored: set[Any] = {id for (id,) in tasks}
    run.counts.acknowledged += len(acknowledged)
    for id in acknowledged - stored:
        run.lost(f"{name}: task {id}")
    revisions = [revision for revision, _ in changes]
    run.check(revisions == [*range(1, len(revisions) + 1)], f"{name}: its feed has a gap")
    foreign = [id for _, id in changes if not id.startswith(f"{name}-")]
    run.check(not foreign, f"{name}: its feed has {foreign[:3]} of another cluster")
    run.check(all(id.startswith(f"{name}-") for id in stored), f"{name}: has foreign tasks")
    problems = asyncio.run(_problems(places, name))
    run.check(not problems, f"{name}: {problems[:3]}")


async def _problems(places: Location, name: str) -> list[str]:
    async with Database(places, cluster=name) as database:
        return [str(problem) for problem in (await verify(database)).problems]


CAMPAIGN = Campaign(
    name="clusters",
    title="eight processes write to many clusters of one location",
    promises=("P2", "P4", "P5", "P6"),
    perform=perform,
    rounds=50,
    quick_rounds=2,
    unit="clusters",
    kinds=(POSTGRESQL, SQLITE),
    bugs={"forgotten-cluster": "lost: cluster"},
)
