"""Clients that use all methods of a store with realistic weights, and keep it at one size."""

from __future__ import annotations

import asyncio
from collections import Counter, deque
from contextlib import suppress
from dataclasses import replace
from itertools import accumulate, count
from pathlib import Path
from random import Random
from typing import Final

from sqlalchemy import func, select

from openclaw_store import (
    CompactedError,
    ConflictError,
    DeadlineError,
    NodeInfo,
    NodeRepository,
    NodeStatus,
    NotFoundError,
    StateManager,
    Task,
    TaskFilter,
    TaskPriority,
    TaskRepository,
    TaskStatus,
    TaskType,
)
from openclaw_store.database import NodeRow

LIVE_TASKS = 1000
"""Approximate maximum: above it, clients remove tasks instead of adding some."""

KEPT_SECONDS = 1.0
"""Seconds for which finished tasks, and the feed, are kept."""

NODES = tuple(f"node-{number:02}" for number in range(16))
PLACES = 50
SKILLS = ("python", "video")

DAY_SECONDS = 86_400

WEIGHTS: Final = {
    "add": 120.0,
    "add_unsaved": 10,
    "add_many": 2,
    "submit": 10,
    "update": 80,
    "update_unsaved": 5,
    "change": 50,
    "remove": 30,
    "get": 250,
    "claim": 130,
    "start": 120,
    "complete": 100,
    "fail": 30,
    "cancel": 15,
    "cancel_many": 1,
    "requeue": 15,
    "recover": 0.2,
    "send_heartbeat": 100,
    "read_all": 40,
    "read_nodes": 5,
    "read_pending": 3,
    "explain": 2,
    "list_some": 1,
    "history": 1,
    "read": 1,
    "watch": 0.5,
    "wait": 2,
    "wait_in_vain": 0.5,
    "transact": 1.5,
    "transact_in_vain": 0.5,
    "register": 1,
    "change_node": 3,
    "update_node": 2,
    "set_node_status": 2,
    "join_and_leave": 2,
    "interrupt": 10,
    "synchronize": 1,
    "refresh": 0.5,
    "count": 0.3,
    "clean_up": 0.5,
    "compact": 0.5,
    "back_up": 0.01,
}
"""Weights of the calls."""

INTERRUPTED = ("add", "change", "claim", "start", "get", "list_some", "history", "transact")


class Users:
    """Clients of one store, which share their knowledge of it."""

    def __init__(self, store: StateManager, seed: int, folder: Path) -> None:
        """Prepare the clients.

        Args:
            folder: The folder for backups.
        """
        self._store, self._folder = store, folder
        self._random = Random(seed)
        self._verbs = [getattr(self, name) for name in WEIGHTS]
        self._weights = list(accumulate(WEIGHTS.values()))
        self._numbers = count()
        self._ids: list[str] = []  # of tasks that exist, as far as known
        self._held: deque[Task] = deque(maxlen=len(NODES) * PLACES)
        self._completed: deque[str] = deque(maxlen=100)
        self.calls = 0
        """Number of calls so far."""
        self.refusals: Counter[str] = Counter()
        """Number of refused calls, by error."""

    async def begin(self) -> None:
        """Create the nodes."""
        for node_id in NODES:
            await self._store.add_node(self._node(node_id))

    async def work(self, until: int) -> None:
        """Run one client, until the given number of calls in all."""
        while self.calls < until:
            self.calls += 1
            [verb] = self._random.choices(self._verbs, cum_weights=self._weights)
            try:
                await verb()
            except (ConflictError, NotFoundError, CompactedError, DeadlineError) as error:
                self.refusals[type(error).__name__] += 1

    async def add(self) -> None:
        if len((await self._store.get_state()).tasks) < LIVE_TASKS:
            await self._store.add_task(self._task())
        else:
            await self.remove()

    async def add_unsaved(self) -> None:
        await self._store.add_task(self._task(), persist=False)

    async def add_many(self) -> None:
        if len((await self._store.get_state()).tasks) < LIVE_TASKS:
            await self._store.add_tasks([self._task() for _ in range(10)])

    async def submit(self) -> None:
        key = f"key {self._random.randrange(20)}"
        self._ids.append((await self._store.submit_task(self._task(key))).task_id)

    async def update(self, *, persist: bool = True) -> None:
        task = await self._store.get_task(await self._id())
        if task is not None:
            task.description = f"description {next(self._numbers)}"
            task.metadata["number"] = next(self._numbers)
            await self._store.update_task(task, persist)

    async def update_unsaved(self) -> None:
        await self.update(persist=False)

    async def change(self) -> None:
        def change(task: Task) -> None:
            task.parameters["number"] = next(self._numbers)

        await self._store.change_task(await self._id(), change)

    async def remove(self) -> None:
        await self._store.remove_task(await self._id())

    async def get(self) -> None:
        await self._store.get_task(await self._id())

    async def claim(self) -> None:
        claimed = await self._store.claim_tasks(self._some_node(), self._random.randint(1, 3))
        self._held.extend(claimed)

    async def start(self) -> None:
        if self._held:
            await self._store.start_task(self._random.choice(self._held))

    async def complete(self) -> None:
        if self._held:
            task = self._held.popleft()
            await self._store.complete_task(task, {"rows": [1, 2, 3]})
            self._completed.append(task.task_id)

    async def fail(self) -> None:
        if self._held:
            await self._store.fail_task(self._held.popleft(), "no luck")

    async def cancel(self) -> None:
        await self._store.cancel_task(await self._id(), "no money")

    async def cancel_many(self) -> None:
        number = self._random.randrange(100)
        await self._store.cancel_tasks(TaskFilter(user=f"user {number}"), "gone")

    async def requeue(self) -> None:
        if self._completed:
            self._ids.append(self._completed.pop())
            await self._store.requeue_task(self._ids[-1])

    async def recover(self) -> None:
        await self._store.recover(60)
        await self._store.check_stale_nodes(60)

    async def send_heartbeat(self) -> None:
        node_id = self._some_node()
        await self._store.update_heartbeat(node_id, cpu_usage=self._random.randrange(100))

    async def read_all(self) -> None:
        state = await self._store.get_state()
        state.tasks.get(await self._id())
        await self._store.get_task_stats()

    async def read_nodes(self) -> None:
        await self._store.get_node(self._some_node())
        await self._store.get_all_nodes()
        await self._store.get_online_nodes()
        await self._store.get_available_nodes()
        await self._store.find_nodes_by_skill(SKILLS[0])
        await self._store.get_node_stats()

    async def read_pending(self) -> None:
        await self._store.get_pending_tasks(limit=20)

    async def explain(self) -> None:
        str(await self._store.explain_task(await self._id()))

    async def list_some(self) -> None:
        status = self._random.choice(list(TaskStatus))
        page = await self._store.list_tasks(TaskFilter(status=status), limit=20)
        if page.after is not None:
            await self._store.list_tasks(TaskFilter(status=status), after=page.after, limit=20)

    async def history(self) -> None:
        await self._store.history(await self._id())

    async def read(self) -> None:
        await self._store.task_repo.get(await self._id())
        await self._store.node_repo.get_available_nodes()
        async with self._store.db.session() as session:
            await session.scalar(select(func.count()).select_from(NodeRow))

    async def watch(self) -> None:
        since = max(0, self._store.version - 10)
        async for change in self._store.watch(since):
            if change.revision >= since + 10:
                break

    async def wait(self) -> None:
        task = self._task()
        await self._store.add_task(task)
        waiting = asyncio.ensure_future(self._store.wait_for_task(task.task_id))
        try:
            await self._store.cancel_task(task.task_id)
        except (ConflictError, NotFoundError):
            waiting.cancel()
        with suppress(NotFoundError, asyncio.CancelledError):
            await waiting

    async def wait_in_vain(self) -> None:
        with suppress(DeadlineError):
            await self._store.wait_for_task(await self._id(), timeout=0.001)

    async def transact(self, *, fails: bool = False) -> None:
        async with self._store.db.transaction() as transaction:
            tasks, nodes = TaskRepository(transaction), NodeRepository(transaction)
            task = await tasks.get(await self._id())
            node = await nodes.get(self._some_node())
            if task is not None and node is not None:
                task.name, node.tags = "changed", [task.task_id]
                await tasks.update(task)
                await nodes.update(node)
            await tasks.claim(NODES[0])
            if fails:
                raise ConflictError("no")

    async def transact_in_vain(self) -> None:
        await self.transact(fails=True)

    async def register(self) -> None:
        await self._store.register_node(self._node(self._some_node()))

    async def change_node(self) -> None:
        def change(node: NodeInfo) -> None:
            node.disk_usage = self._random.randrange(100)

        await self._store.change_node(self._some_node(), change)

    async def update_node(self) -> None:
        node = await self._store.get_node(self._some_node())
        if node is not None:
            await self._store.update_node(replace(node, platform=f"{next(self._numbers)}"))

    async def set_node_status(self) -> None:
        node_id = self._some_node()
        await self._store.update_node_status(node_id, NodeStatus.OFFLINE)
        await self._store.update_heartbeat(node_id)

    async def join_and_leave(self) -> None:
        node_id = f"guest-{next(self._numbers)}"
        await self._store.add_node(self._node(node_id))
        self._held.extend(await self._store.claim_tasks(node_id))
        await self._store.remove_node(node_id)

    async def interrupt(self) -> None:
        """Cancel a call at a random moment."""
        call = asyncio.ensure_future(getattr(self, self._random.choice(INTERRUPTED))())
        for _ in range(self._random.randrange(20)):
            await asyncio.sleep(0)
        call.cancel()
        with suppress(asyncio.CancelledError):
            await call

    async def synchronize(self) -> None:
        await self._store.sync_to_database()

    async def refresh(self) -> None:
        await self._store.refresh_from_database()

    async def count(self) -> None:
        await self._store.get_stats()
        await self._store.task_repo.count_by_status(TaskStatus.FAILED)

    async def clean_up(self) -> None:
        await self._store.task_repo.cleanup_old_tasks(KEPT_SECONDS / DAY_SECONDS)

    async def compact(self) -> None:
        await self._store.compact_changes(KEPT_SECONDS / DAY_SECONDS)

    async def back_up(self) -> None:
        target = self._folder / f"{next(self._numbers)}.backup"
        await self._store.db.backup(target)
        target.unlink()

    def _task(self, key: str | None = None) -> Task:
        number = next(self._numbers)
        task = Task.create(
            self._random.choice(list(TaskType)),
            f"task {number}",
            required_skills=self._random.choice([(), SKILLS[:1], SKILLS]),
            priority=self._random.choice(list(TaskPriority)),
            parameters={"rows": [number, {"nested": "text " * self._random.randrange(20)}]},
            timeout=self._random.choice([None, None, None, 5]),
            max_retries=1,
            user_id=f"user {number % 100}",
            idempotency_key=key,
        )
        self._ids.append(task.task_id)
        return task

    def _node(self, node_id: str) -> NodeInfo:
        return NodeInfo(node_id, "host", available_skills=list(SKILLS), max_concurrent_tasks=PLACES)

    async def _id(self) -> str:
        """Return the id of some live task, nearly always; finished tasks are forgotten."""
        live = (await self._store.get_state()).tasks
        while self._ids:
            place = self._random.randrange(len(self._ids))
            task_id = self._ids[place]
            if task_id in live or self._random.random() < 0.02:
                return task_id
            self._ids[place] = self._ids[-1]
            self._ids.pop()
        return "none"

    def _some_node(self) -> str:
        return self._random.choice(NODES)
