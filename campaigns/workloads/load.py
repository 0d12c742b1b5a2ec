"""Clients that keep a store busy during a fault, and record their calls.

Each of many coroutines has its own node and tasks, so it knows the effect of each call. It sends
the expected effect before the call, and a second message after the return; `audit` compares the
messages with the database.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Mapping
from itertools import count
from random import Random
from typing import Any

from campaigns.faults.children import Send
from campaigns.harness.campaign import Location
from openclaw_store import (
    BackendError,
    Database,
    NodeInfo,
    OutcomeUnknownError,
    StateManager,
    Task,
    TaskPriority,
    TaskStatus,
    TaskType,
)
from openclaw_store.domain.backoff import Backoff
from openclaw_store.domain.models import FINISHED
from openclaw_store.repositories.tasks import TaskRepository

CLIENTS = 64
"""Coroutines that write at the same time."""

VERBS = {
    "add": 4, "add_three": 1, "update": 4, "update_two": 1, "claim": 3, "start": 3, "complete": 2,
    "fail": 1, "remove": 1,
}  # fmt: skip
"""The calls of a client, and their weights."""

State = list[Any]
"""The status of a task, its attempt, and the number of its content."""


def open_store(location: str) -> StateManager:
    """Return the store of the clients, where a failed task can be claimed again at once."""
    return StateManager(Database(location), backoff=Backoff(first_seconds=0))


async def make_nodes(location: Location) -> None:
    """Create the nodes of the clients in an empty database."""
    async with open_store(str(location)) as store:
        for client in range(CLIENTS):
            name = _node_of(client)
            node = NodeInfo(name, "host", available_skills=[name], max_concurrent_tasks=10**9)
            await store.add_node(node)


def content(number: int) -> dict[str, Any]:
    """Return fields of a task that are always written together, so that a partial write shows."""
    text = chr(ord("a") + number % 26) * (number * 37 % 2000)
    return {
        "name": f"content {number}",
        "description": text,
        "priority": TaskPriority(number % 4),
        "parameters": {"number": number, "text": text},
    }


async def write(store: StateManager, send: Send, generation: int, seed: int) -> None:
    """Let all clients write until none can; a client stops at its first failed call.

    Args:
        generation: A number that differs for each store that is opened on a database.
    """
    random = Random(seed)
    # With callers' transactions beside it, the writer on PostgreSQL locks first, else not.
    verbs = {**VERBS, "update_two": random.randint(0, 1)}
    tasks: dict[int, dict[str, State]] = {client: {} for client in range(CLIENTS)}
    for id, task in (await store.get_state()).tasks.items():  # also tasks of former generations
        if task.status not in FINISHED:
            tasks[int(id.split("-")[0])][id] = _state_of(task)
    clients = (
        _Client(client, store, send, generation, Random(random.random()), verbs, tasks[client])
        for client in range(CLIENTS)
    )
    await asyncio.gather(*[client.write() for client in clients])


class _Client:
    """Calls, one after another, that change the tasks of one node.

    It sends:

    - `calls`, its number, the expected states of tasks, and how many of them change;
    - `returned`, its number, and the tasks that were changed;
    - `refused` and its number, if the error says that nothing has changed;
    - `failed`, its number and an error that must not occur.
    """

    def __init__(
        self,
        number: int,
        store: StateManager,
        send: Send,
        generation: int,
        random: Random,
        verbs: Mapping[str, int],
        tasks: dict[str, State],
    ) -> None:
        self._number, self._store, self._send, self._random = number, store, send, random
        self._node = _node_of(number)
        self._prefix = f"{number}-{generation}"
        self._numbers = count(generation * 100_000 + number)
        self._verbs = verbs
        self._tasks = tasks

    async def write(self) -> None:
        """Call methods at random until a call fails."""
        names, weights = list(self._verbs), list(self._verbs.values())
        try:
            while True:
                [name] = self._random.choices(names, weights)
                await getattr(self, name)()
        except OutcomeUnknownError:
            pass  # the call stays without an answer
        except BackendError:
            self._send("refused", self._number)
        except Exception as error:
            self._send("failed", self._number, repr(error))

    async def add(self) -> None:
        task = self._new()
        await self._call(self._store.add_task(task), {task.task_id: _state_of(task)})

    async def add_three(self) -> None:
        tasks = [self._new() for _ in range(3)]
        await self._call(
            self._store.add_tasks(tasks), {task.task_id: _state_of(task) for task in tasks}
        )

    async def update(self) -> None:
        for task in await self._some_rewritten(1):
            await self._call(self._store.update_task(task), {task.task_id: _state_of(task)})

    async def update_two(self) -> None:
        tasks = await self._some_rewritten(2)

        async def update() -> None:
            async with self._store.db.transaction() as transaction:
                for task in tasks:
                    await TaskRepository(transaction).update(task)

        if tasks:
            await self._call(update(), {task.task_id: _state_of(task) for task in tasks})

    async def claim(self) -> None:
        pending = [id for id, (status, *_) in self._tasks.items() if status == "pending"]
        limit = self._random.randint(1, 3)

        async def claim() -> list[str]:
            claimed = await self._store.claim_tasks(self._node, limit)
            return [task.task_id for task in claimed]

        after = {id: self._moved(id, TaskStatus.SCHEDULED, attempts=1) for id in pending}
        if after:
            await self._call(claim(), after, min(limit, len(pending)))

    async def start(self) -> None:
        for task in await self._some("scheduled"):
            after = {task.task_id: self._moved(task.task_id, TaskStatus.RUNNING)}
            await self._call(self._store.start_task(task), after)

    async def complete(self) -> None:
        for task in await self._some("running"):
            after = {task.task_id: self._moved(task.task_id, TaskStatus.COMPLETED)}
            await self._call(self._store.complete_task(task, task.parameters), after)

    async def fail(self) -> None:
        for task in await self._some("running"):
            is_last = task.retry_count == task.max_retries
            status = TaskStatus.FAILED if is_last else TaskStatus.PENDING
            after = {task.task_id: self._moved(task.task_id, status)}
            await self._call(self._store.fail_task(task, "in vain"), after)

    async def remove(self) -> None:
        for task in await self._some(*TaskStatus):
            await self._call(self._store.remove_task(task.task_id), {task.task_id: None})

    async def _call(
        self, call: Awaitable[Any], after: Mapping[str, State | None], changed: int | None = None
    ) -> None:
        """Make a call, with the messages before and after it.

        Args:
            after: The states of tasks after the call.
            changed: How many of these are changed, if not all; then the call returns their ids.
        """
        self._send("calls", self._number, after, len(after) if changed is None else changed)
        result = await call
        ids = list(after) if changed is None else result
        self._send("returned", self._number, ids)
        for id in ids:
            state = after[id]
            if state is None:
                del self._tasks[id]
            else:
                self._tasks[id] = state

    def _new(self) -> Task:
        number = next(self._numbers)
        id = f"{self._prefix}-{number}"
        fields = {**content(number), "required_skills": [self._node]}
        return Task.create(TaskType.BATCH, task_id=id, **fields)

    async def _some(self, *statuses: str, most: int = 1) -> list[Task]:
        """Draw tasks with these statuses, and read them."""
        ids = [id for id, (status, *_) in self._tasks.items() if status in statuses]
        drawn = self._random.sample(ids, min(most, len(ids)))
        return [task for id in drawn if (task := await self._store.get_task(id))]

    async def _some_rewritten(self, most: int) -> list[Task]:
        """Draw live tasks, and give them new content to be stored."""
        tasks = await self._some("pending", "scheduled", "running", most=most)
        for task in tasks:
            vars(task).update(content(next(self._numbers)))
        return tasks

    def _moved(self, id: str, status: TaskStatus, attempts: int = 0) -> State:
        _, attempt, number = self._tasks[id]
        return [status.value, attempt + attempts, number]


def _node_of(client: int) -> str:
    return f"node-{client}"


def _state_of(task: Task) -> State:
    return [task.status.value, task.attempt, task.parameters["number"]]
