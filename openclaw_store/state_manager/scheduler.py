"""Handing tasks to nodes and taking them back, by the picture in memory and the word of the writer.

What is best to do is chosen here, mostly without asking the database. Whether it still may be done
is decided by the writer, with the rows before it; so any number of coordinators may try at once.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from datetime import datetime, timedelta
from functools import partial

from openclaw_store.database import Database
from openclaw_store.domain import (
    LIVE,
    Backoff,
    NodeInfo,
    NodeStatus,
    Record,
    Task,
    TaskFilter,
    TaskStatus,
    check_seconds,
    lifecycle,
)
from openclaw_store.errors import (
    ConflictError,
    NotFoundError,
    NotOwnerError,
    StoreError,
    TaskNotFoundError,
    UnsavedConflictError,
)
from openclaw_store.repositories import (
    Advance,
    Advanced,
    Claim,
    NodeRepository,
    Register,
    SetNodeStatus,
    TaskRepository,
    cancellation_of,
    missing,
)
from openclaw_store.state_manager.explain import Explanation, explain
from openclaw_store.state_manager.replica import Replica

logger = logging.getLogger("openclaw_store.dispatcher")

ADVANCE_BATCH_SIZE = 200
"""How many tasks are handed to the writer at a stretch, before others write."""

TASK_PAGE_SIZE = 1000
"""How many of the tasks that a filter means are read at a stretch."""

_MOST_SPARES = 64
"""Candidates of a claim beyond those that are wanted, in case that others are quicker."""


@dataclass(frozen=True)
class Recovery:
    """What a call of `recover` has done; each list in no particular order."""

    offline_nodes: list[str]
    """The nodes it set OFFLINE."""
    requeued_tasks: list[str]
    """The tasks it put back to pending, or made due that a clock turned back had put off."""
    failed_tasks: list[str]
    """Those that were on a node that is not alive, and had no retries left."""
    timed_out_tasks: list[str]
    """Those that ran for too long, and had no retries left."""

    def __bool__(self) -> bool:
        """Whether it has done anything."""
        return any(vars(self).values())


class Scheduler:
    """The verbs of a task's life, for one `StateManager`.

    Args:
        database: Whose clock counts.
        replica: What is in memory, and the way to the writer.
        tasks: The tasks in the database.
        nodes: The nodes in the database.
        backoff: How long a task waits for its next try.
    """

    def __init__(
        self,
        database: Database,
        replica: Replica,
        tasks: TaskRepository,
        nodes: NodeRepository,
        backoff: Backoff,
    ) -> None:
        self._database = database
        self._replica = replica
        self._tasks = tasks
        self._nodes = nodes
        self._backoff = backoff
        self._spares = 0
        self._latest: datetime | None = None  # that the clock has safe_repr to a recovery

    async def claim(self, node_id: str, limit: int) -> list[Record[Task]]:
        """Hand tasks to a node; see `StateManager.claim_tasks`."""
        claimed: list[Record[Task]] = []
        try:
            await self._claim(node_id, limit, claimed)
        except StoreError as error:
            if not claimed:  # else they are the node's, and it must be told
                raise
            logger.warning("a claim of node %r got only a part: %s", node_id, error)
        return claimed

    async def _claim(self, node_id: str, limit: int, claimed: list[Record[Task]]) -> None:
        """Hand tasks to a node, and tell of them in `claimed` as soon as it is committed."""
        place = (NodeInfo, node_id)
        taken: list[str] = []
        try:
            while True:
                node = await self._replica.find_stored(place)
                if node is None:
                    raise missing(*place)
                wanted = min(limit - len(claimed), lifecycle.free_slots(node))
                candidates = self._take(node, wanted, taken) if wanted else []
                if not candidates:
                    return
                got = await self._replica.submit(Claim(node_id, candidates, wanted))
                claimed += got
                if len(claimed) == limit:
                    self._spares //= 2
                    return
                if len(got) < min(wanted, len(candidates)):  # others were quicker, or it is full
                    self._spares = min(max(4, 2 * self._spares), _MOST_SPARES)
                    await self._replica.refresh()
        finally:
            self._replica.cache.task_index.ready.put_back(taken)

    async def advance(self, operation: Advance) -> Advanced:
        """Take a task a step on in its life.

        Raises:
            TaskNotFoundError: If there is none.
            ConflictError: If it may not be done.
        """
        known = self._replica.cache.task(operation.id)
        if known is not None and known.assigned_node is not None:
            operation.related_keys = ((NodeInfo, known.assigned_node),)
        operation.known = known
        try:
            done: Advanced = await self._replica.submit(operation)
        except NotOwnerError as error:
            logger.warning("refused: %s", error)
            raise
        if not done.is_changed:  # it is as others have left it
            await self._replica.reach(done.record.version)
        return done

    async def register(self, record: Record[NodeInfo]) -> Record[NodeInfo]:
        """Add a node, or take note that it has come back as a new process."""
        register = Register(record.node_id, record, self._backoff.draw())
        registered: Record[NodeInfo] = await self._replica.send(register)
        # What is only in memory is of the former process.
        self._replica.cache.discard((NodeInfo, record.node_id))
        return registered

    async def set_silent_offline(self, timeout_seconds: float) -> list[str]:
        """Set the live nodes OFFLINE that were silent for longer; returns which."""
        patience = check_seconds("timeout_seconds", timeout_seconds)
        await self._replica.flush_heartbeats()
        reason = f"silent for more than {timeout_seconds:g} s"
        stale = [node.node_id for node in await self._nodes.find_stale_nodes(timeout_seconds)]
        operations = [
            SetNodeStatus(node_id, NodeStatus.OFFLINE, patience, reason) for node_id in stale
        ]
        # Each behind the heartbeat that may have come meanwhile.
        outcomes = await asyncio.gather(*map(self._replica.submit, operations))
        return [operation.id for operation, done in zip(operations, outcomes, strict=True) if done]

    async def recover(self, timeout_seconds: float) -> Recovery:
        """Take tasks from nodes that are not alive; see `StateManager.recover`."""
        patience = check_seconds("timeout_seconds", timeout_seconds)
        longest_wait = timedelta(seconds=self._backoff.longest_seconds)
        recovery = Recovery(await self.set_silent_offline(timeout_seconds), [], [], [])
        await self._replica.refresh()
        lists = {
            TaskStatus.PENDING: recovery.requeued_tasks,
            TaskStatus.FAILED: recovery.failed_tasks,
            TaskStatus.TIMEOUT: recovery.timed_out_tasks,
        }
        recover = partial(lifecycle.recover, patience=patience, longest_wait=longest_wait)
        operations = [
            Advance(task_id, partial(recover, wait=self._backoff.draw()))
            for task_id in await self._suspects(patience, longest_wait)
        ]
        async for done in self.advance_all(operations):
            lists[done.record.status].append(done.record.task_id)
        return recovery

    async def cancel_all(self, filter: TaskFilter, reason: str | None) -> list[str]:
        """End the live tasks that a checked filter means; see `StateManager.cancel_tasks`."""
        states = LIVE if filter.status is None else LIVE.intersection(filter.status)
        live = replace(filter, status=tuple(states))
        with suppress(UnsavedConflictError):  # what is only in memory cannot be found
            await self._replica.sync()
        cancelled: list[str] = []
        refused: list[Task] = []
        after: str | None = None
        while True:
            page = await self._tasks.list_tasks(live, after=after, limit=TASK_PAGE_SIZE)
            operations = [cancellation_of(one.task_id, reason, one.version) for one in page]
            done = [one async for one in self.advance_all(operations)]
            cancelled += [one.record.task_id for one in done]
            if len(done) < len(page) and page.tasks != refused:
                refused = page.tasks  # for good, if they are all the same the next time
                continue  # some were changed meanwhile: are they still meant?
            after = page.after
            if after is None:
                return cancelled

    async def advance_all(self, operations: Sequence[Advance]) -> AsyncIterator[Advanced]:
        """Take many tasks a step on, as far as they may be, and tell of each that has changed.

        Raises:
            BackendError: If the database could not be written; what is done by then is done.
        """
        for start in range(0, len(operations), ADVANCE_BATCH_SIZE):
            part = operations[start : start + ADVANCE_BATCH_SIZE]
            outcomes = await asyncio.gather(*map(self.advance, part), return_exceptions=True)
            for outcome in outcomes:
                if isinstance(outcome, Advanced):
                    if outcome.is_changed:
                        yield outcome
                elif not isinstance(outcome, ConflictError | NotFoundError):
                    raise outcome

    async def explain(self, task_id: str) -> Explanation:
        """Why a task is where it is."""
        task = await self._replica.find((Task, task_id))
        if task is None:
            raise TaskNotFoundError(task_id)
        cache, now = self._replica.cache, self._database.clock()
        nodes = list(cache.nodes.values())
        ahead = cache.task_index.ahead_of(
            task, [one for one in nodes if lifecycle.has_skills(one, task)], now
        )
        return explain(task, nodes, ahead, now)

    def _take(self, node: Record[NodeInfo], wanted: int, taken: list[str]) -> list[Record[Task]]:
        """Set aside the best tasks for a node, and some to spare; puts them down in `taken`."""
        cache, now = self._replica.cache, self._database.clock()
        ids = cache.task_index.ready.take(
            wanted + self._spares, node.encoded("available_skills"), now
        )
        taken += ids
        return [record for id in ids if (record := self._replica.cache.tasks.get(id)) is not None]

    async def _suspects(self, patience: timedelta, longest_wait: timedelta) -> list[str]:
        """The tasks that seem to be on nodes that are not alive, or to run or wait for too long."""
        cache, now = self._replica.cache, self._database.clock()
        suspects: list[str] = []
        latest = self._latest
        if latest is None or now < latest:  # else no clock was turned back since
            for id in cache.task_index.ready.due_after(now + longest_wait):
                one = cache.tasks.get(id)
                if one is not None and lifecycle.is_delayed(one, now, longest_wait):
                    suspects.append(id)
                await asyncio.sleep(0)
        self._latest = now if latest is None else max(latest, now)
        for node_id, ids in list(cache.task_index.assigned.items()):
            if node_id is not None and lifecycle.is_lost(cache.nodes.get(node_id), now, patience):
                suspects += ids
                continue
            running = (cache.tasks.get(id) for id in list(ids))
            suspects += [
                one.task_id for one in running if one is not None and lifecycle.is_overdue(one, now)
            ]
            await asyncio.sleep(0)  # others run in between
        return suspects
