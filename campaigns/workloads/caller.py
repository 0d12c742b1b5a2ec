"""A process that works on a few tasks, and records its calls, their answers and their times."""

from __future__ import annotations

import asyncio
import logging
import signal
import time
from collections import defaultdict, deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from itertools import count
from random import Random
from typing import Any, Final

from campaigns.faults.children import Send
from campaigns.harness.loop_delay import watch_loop_delay
from campaigns.workloads.specification import NOT_FOUND, ObservedTask
from openclaw_store import (
    ConflictError,
    Database,
    DeadlineError,
    NodeInfo,
    NotFoundError,
    StateManager,
    Task,
    TaskFilter,
    TaskType,
)
from openclaw_store.domain.backoff import Backoff
from openclaw_store.repositories.tasks import TaskRepository

CALLERS = 4
"""Coroutines of a process."""

READER = "reader"
"""The node of a process that only reads: its cache gets every change from other processes."""

READS_EVERY_SECONDS = 0.02

TASKS = 4
"""Number of tasks that all processes share at a time."""

REVISIONS_A_SET = 400
"""Number of changes after which the processes take a new set of tasks, to keep histories short."""

TASKS_A_CLAIM = 2
"""Maximum number of tasks in a claim."""

CHANGES_A_LINE = 20
"""Number of changes in a message of a watcher."""

DELAY_SECONDS = 0.001
"""Minimum delay of an event loop, in seconds, that is recorded."""

END_SECONDS = 60
"""Seconds within which a watcher must have received the whole feed."""

PATIENCE_SECONDS = 60
"""Wait for the write lock, in seconds: no deadline may pass only because the machine is busy."""

NEVER = 2**31 - 1

WEIGHTS: Final = {
    "read": 15,
    "find": 5,
    "read_memory": 20,
    "update": 15,
    "change": 8,
    "change_in_transaction": 2,
    "add": 10,
    "remove": 3,
    "claim": 10,
    "start": 7,
    "complete": 5,
    "fail": 5,
    "cancel": 2,
    "requeue": 4,
}
"""Weights of the calls."""


class Caller:
    """A working process; its callers share the tasks that they have seen."""

    def __init__(
        self,
        store: StateManager,
        node: str,
        process: int,
        seed: int,
        send: Send,
        ends: asyncio.Event,
    ) -> None:
        self._store, self._node, self._process, self._send, self._ends = (
            store,
            node,
            process,
            send,
            ends,
        )
        self._random = Random(f"{seed} {process}")
        self._numbers = count()
        self._copies: dict[str, deque[Task]] = defaultdict(lambda: deque(maxlen=4))
        self._held: deque[Task] = deque(maxlen=20)

    async def register(self) -> None:
        with self._asking("register", None, self._node) as answer:
            node = NodeInfo(self._node, self._node, max_concurrent_tasks=NEVER)
            await self._store.register_node(node)
            answer(True)

    async def work(self) -> None:
        while not self._ends.is_set():
            [verb] = self._random.choices(list(WEIGHTS), list(WEIGHTS.values()))
            await getattr(self, verb)(self._some_task())
            if verb == "read_memory":
                await asyncio.sleep(0)  # the call itself never yields to the loop

    async def read_memory_only(self) -> None:
        """Only read from memory, until the process ends."""
        while not self._ends.is_set():
            await self.read_memory(self._some_task())
            await asyncio.sleep(READS_EVERY_SECONDS)

    async def read(self, task_id: str) -> None:
        with self._asking("read", task_id) as answer:
            answer(self._see(await self._store.task_repo.get(task_id)))

    async def find(self, task_id: str) -> None:
        with self._asking("find", task_id) as answer:
            page = await self._store.list_tasks(TaskFilter(name_contains=_name(task_id)))
            answer(self._see(page.tasks[0]) if page.tasks else None)

    async def read_memory(self, task_id: str) -> None:
        with self._asking("read_memory", task_id) as answer:
            answer(self._see(await self._store.get_task(task_id)))

    async def update(self, task_id: str) -> None:
        if self._copies[task_id]:
            task = self._draw(self._copies[task_id])
            token = self._write_token(task)
            with self._asking("update", task_id, task.version, token) as answer:
                await self._store.update_task(task)
                answer(self._see(task))
        else:
            await self.read(task_id)

    async def change(self, task_id: str) -> None:
        before: list[ObservedTask] = []

        def change(task: Task) -> None:
            before[:] = [_seen(task)]
            task.metadata = {"token": token}

        token = self._token()
        with self._asking("change", task_id, token) as answer:
            changed = await self._store.change_task(task_id, change)
            answer([*before, self._see(changed)] if changed else NOT_FOUND)

    async def change_in_transaction(self, task_id: str) -> None:
        token = self._token()
        with self._asking("change", task_id, token) as answer:
            async with self._store.db.transaction() as transaction:
                tasks = TaskRepository(transaction)
                task = await tasks.get(task_id)
                if task is not None:
                    before = _seen(task)
                    task.metadata = {"token": token}
                    await tasks.update(task)
            answer([before, self._see(task)] if task else NOT_FOUND)

    async def add(self, task_id: str) -> None:
        task = Task.create(TaskType.BATCH, _name(task_id), task_id=task_id, max_retries=NEVER)
        token = self._write_token(task)
        with self._asking("add", task_id, token) as answer:
            await self._store.add_task(task)
            answer(self._see(task))

    async def remove(self, task_id: str) -> None:
        with self._asking("remove", task_id) as answer:
            answer(await self._store.remove_task(task_id) or NOT_FOUND)

    async def claim(self, task_id: str) -> None:
        with self._asking("claim", None, self._node) as answer:
            claimed = await self._store.claim_tasks(
                self._node, self._random.randint(1, TASKS_A_CLAIM)
            )
            self._held.extend(claimed)
            answer([[task.task_id, self._see(task)] for task in claimed])

    async def start(self, task_id: str) -> None:
        await self._advance("start", self._store.start_task)

    async def complete(self, task_id: str) -> None:
        await self._advance("complete", self._store.complete_task)

    async def fail(self, task_id: str) -> None:
        await self._advance("fail", lambda task: self._store.fail_task(task, "failed"))

    async def cancel(self, task_id: str) -> None:
        with self._asking("cancel", task_id) as answer:
            answer(await self._store.cancel_task(task_id) or NOT_FOUND)

    async def requeue(self, task_id: str) -> None:
        with self._asking("requeue", task_id) as answer:
            answer(await self._store.requeue_task(task_id) or NOT_FOUND)

    async def _advance(self, name: str, verb: Callable[[Task], Any]) -> None:
        """Advance a task that this process holds or has held; no such task is forgotten."""
        if self._held:
            task = self._draw(self._held)
            with self._asking(name, task.task_id, task.assigned_node, task.attempt) as answer:
                answer(self._see(await verb(task)))

    async def watch(self, since: int) -> None:
        """Send every change, up to the last one known at the end of the process."""
        changes: list[list[Any]] = []
        async for change in self._store.watch(since):
            kind = (change.kind, change.from_status, change.to_status)
            changes.append([change.revision, change.item, change.item_id, *kind, change.node])
            is_last = self._ends.is_set() and change.revision >= self._store.version
            if len(changes) == CHANGES_A_LINE or is_last:
                self._send("watched", changes)
                changes = []
            if is_last:
                break

    def record_delay(self, due: float, now: float) -> None:
        """Record the begin and end of a long delay of the event loop."""
        if now - due > DELAY_SECONDS:
            self._send("delayed", int(due * 1e9), int(now * 1e9))

    @contextmanager
    def _asking(
        self, name: str, task_id: str | None, *arguments: Any
    ) -> Iterator[Callable[[Any], None]]:
        """Record a call, and its answer or its error."""
        number, answers = next(self._numbers), list[Any]()
        self._send("calls", number, time.monotonic_ns(), name, task_id, arguments)
        try:
            yield answers.append
        except (ConflictError, NotFoundError, DeadlineError) as error:
            answers.append(type(error).__name__)
        self._send("answered", number, time.monotonic_ns(), *answers)

    def _see(self, task: Task | None) -> ObservedTask | None:
        if task is None:
            return None
        self._copies[task.task_id].append(task)
        return _seen(task)

    def _some_task(self) -> str:
        task_set = self._store.version // REVISIONS_A_SET
        return f"{task_set}-{self._random.randrange(TASKS)}"

    def _draw(self, tasks: deque[Task]) -> Task:
        """Return a copy of the newest version, mostly, or of an outdated one."""
        task = tasks[-1] if self._random.random() < 0.7 else self._random.choice(tasks)
        return replace(task)

    def _write_token(self, task: Task) -> str:
        token = self._token()
        task.metadata = {"token": token}
        return token

    def _token(self) -> str:
        return f"{self._process}-{next(self._numbers)}"


def _name(task_id: str) -> str:
    """Return a name that no other task has."""
    return f"<{task_id}>"


def _seen(task: Task) -> ObservedTask:
    token = task.metadata["token"]
    return ObservedTask(task.version, token, task.status.value, task.assigned_node, task.attempt)


async def work(send: Send, location: str, node: str, process: int, seed: int, since: int) -> None:
    """Run one of the processes, until SIGTERM.

    Args:
        node: The node of the process.
        process: The number of the process, among all that have run.
        since: The revision up to which a watcher of this node has sent the feed.
    """
    ends = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, ends.set)
    logging.getLogger("openclaw_store").setLevel(logging.ERROR)  # refused calls are expected
    database = Database(location, timeout=PATIENCE_SECONDS, transaction_timeout=PATIENCE_SECONDS)
    async with StateManager(database, backoff=Backoff(first_seconds=0)) as store:
        caller = Caller(store, node, process, seed, send, ends)
        async with asyncio.TaskGroup() as group:
            delay = group.create_task(watch_loop_delay(caller.record_delay))
            await caller.register()
            watching = group.create_task(caller.watch(since))
            if node == READER:
                await caller.read_memory_only()
            else:
                await asyncio.gather(*(caller.work() for _ in range(CALLERS)))
            async with asyncio.timeout(END_SECONDS):
                while not watching.done():
                    await caller.register()  # one more change, which ends the watcher
                    await asyncio.wait([watching], timeout=1)
            delay.cancel()
