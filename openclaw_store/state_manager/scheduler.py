"""The scheduler: assign tasks to nodes, advance them, and release them.

Each command decides in its transaction, on the current rows. So any number of processes may
schedule at the same time.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Iterable
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from functools import partial
from itertools import islice
from typing import Any, TypeVar

from openclaw_store.domain import (
    Backoff,
    NodeInfo,
    NodeStatus,
    Record,
    Task,
    TaskFilter,
    TaskStatus,
    check_seconds,
    conditions,
    lifecycle,
)
from openclaw_store.errors import (
    ConflictError,
    NotFoundError,
    NotOwnerError,
    StoreError,
    TaskNotFoundError,
    UnsavedConflictError,
    logger_of,
)
from openclaw_store.repositories import (
    PART_SIZE,
    Advance,
    Advanced,
    Claim,
    Command,
    Recover,
    Register,
    SetNodeStatus,
    claim_in_parts,
    register_in_parts,
)
from openclaw_store.state_manager.cache import Cache
from openclaw_store.state_manager.explain import Explanation, explain
from openclaw_store.state_manager.replica import Replica
from openclaw_store.state_manager.task_index import PendingKey, pending_key
from openclaw_store.state_manager.watchers import WATCH_SECONDS

logger = logger_of("dispatcher")

TASK_SLICE_SIZE = 100
"""Tasks examined before other coroutines run."""

TASK_PAGE_SIZE = 1000
"""Tasks selected at once for a change of many."""

REFUSALS = (ConflictError, NotFoundError)
"""Errors of a command if its task was changed or removed meanwhile."""

Written = TypeVar("Written", bound=Command)


@dataclass(frozen=True)
class Recovery:
    """The changes of a call of `recover`; the lists have no particular order."""

    offline_nodes: list[str]
    """Nodes set OFFLINE."""
    requeued_tasks: list[str]
    """Tasks set to PENDING again, and retries made due after a clock was turned back."""
    failed_tasks: list[str]
    """Tasks of lost nodes that were lost more often than their `max_losses`."""
    timed_out_tasks: list[str]
    """Tasks that exceeded their timeout, without another retry, and tasks that expired."""
    cancelled_tasks: list[str] = field(default_factory=list)
    """Tasks that their owners did not cancel in the time given to them."""

    def __bool__(self) -> bool:
        """Return true if there are any changes."""
        return any(vars(self).values())


class Scheduler:
    """The scheduling of one `StateManager`, which documents the calls of the same names."""

    def __init__(self, replica: Replica, backoff: Backoff) -> None:
        self._replica = replica
        self._backoff = backoff
        self._latest: datetime | None = None  # the latest time at which `recover` was called

    async def claim(self, node_id: str, limit: int, *, start: bool) -> list[Task]:
        if self._replica.cache.unsaved:  # the database chooses among the tasks that it has
            await self._replica.write_behind.flush_all()
        copies = self._replica.slices.copies
        if limit <= PART_SIZE:
            return await copies(await self._replica.submit(Claim(node_id, limit, start)))
        parts = claim_in_parts(self._replica.submit, node_id, limit, start=start)
        return [task async for part in parts for task in await copies(part)]

    async def wait_and_claim(
        self, node_id: str, limit: int, seconds: float, *, start: bool
    ) -> list[Task]:
        """Claim as `claim` does, as soon as there are tasks, or after that time without any."""
        loop, waiters = asyncio.get_running_loop(), self._replica.watchers.claims
        deadline = loop.time() + seconds
        while True:
            # Registered before the claim: a task that is added after it wakes this caller.
            with waiters.waiting(node_id) as woken:
                try:
                    # Before the claim: a task may become due during it.
                    since = self._replica.database.clock()
                    claimed = await self.claim(node_id, limit, start=start)
                    left = deadline - loop.time()
                    if claimed or left <= 0:
                        waiters.pass_on(node_id, woken)
                        return claimed
                    await self._wait_for_work(woken, left, since)
                except BaseException:
                    waiters.pass_on(node_id, woken)
                    raise

    async def _wait_for_work(
        self, woken: asyncio.Future[None], seconds: float, since: datetime
    ) -> None:
        """Wait until a waiter is woken, some seconds have passed, or a delayed task is due.

        Args:
            since: Tasks that were due at this time are not waited for.
        """
        due = await self._replica.tasks.next_due_at(since)
        if due is not None:
            seconds = min(seconds, max(0, (due - self._replica.database.clock()).total_seconds()))
        if self._replica.is_following:
            await asyncio.wait([woken], timeout=seconds)
            return
        while not woken.done() and seconds > 0:  # no notification: look for new revisions
            await asyncio.wait([woken], timeout=min(seconds, WATCH_SECONDS))
            seconds -= WATCH_SECONDS
            known = self._replica.version
            await self._replica.refresh()
            if self._replica.version > known:
                return

    async def advance(self, command: Advance) -> Advanced:
        """Change the status of a task.

        Raises:
            TaskNotFoundError: If there is no such task.
            ConflictError: If the change is refused.
        """
        if self._replica.cache.unsaved:  # an unsaved task that is dropped may name another node
            await self._replica.write_behind.flush_or_drop([(Task, command.id)])
        known = self._replica.known_task(command.id)
        if known is not None and known.assigned_node is not None:
            command.related_keys = ((NodeInfo, known.assigned_node),)
        command.known = known
        try:
            done: Advanced = await self._replica.submit(command)
        except NotOwnerError as error:
            logger.warning("refused: %s", error)
            raise
        if not done.is_changed:  # another process may have made this change
            await self._replica.catch_up_to(done.record.version)
        return done

    async def register(self, record: Record[NodeInfo], replaced: str | None) -> Record[NodeInfo]:
        command = Register(record.node_id, record, self._backoff.draw(), replaced)
        registered = await register_in_parts(self._replica.send, command)
        # An unsaved entry is from the former process.
        self._replica.cache.discard((NodeInfo, record.node_id))
        return registered

    async def set_silent_offline(self, timeout_seconds: float) -> list[str]:
        patience = check_seconds("timeout_seconds", timeout_seconds)
        await self._replica.heartbeat_writer.flush()
        commands = []
        for node in await self._replica.nodes.find_stale_nodes(timeout_seconds):
            reason = f"silent for more than {node.lease_seconds or timeout_seconds:g} s"
            commands.append(SetNodeStatus(node.node_id, NodeStatus.OFFLINE, patience, reason))

        async def submit(command: SetNodeStatus) -> bool:
            # Called in a task of its own: the command goes behind a heartbeat that arrives before.
            done: bool = await self._replica.submit(command)
            return done

        outcomes = await asyncio.gather(*map(submit, commands))
        return [command.id for command, done in zip(commands, outcomes, strict=True) if done]

    async def recover(self, timeout_seconds: float, unstarted_seconds: float | None) -> Recovery:
        patience = check_seconds("timeout_seconds", timeout_seconds)
        unstarted = None
        if unstarted_seconds is not None:
            unstarted = check_seconds("unstarted_seconds", unstarted_seconds)
        longest_wait = timedelta(seconds=self._backoff.longest_seconds)
        # Silent nodes first: the tasks of an OFFLINE node count as lost below.
        recovery = Recovery(await self.set_silent_offline(timeout_seconds), [], [], [])
        await self._replica.refresh()
        lists = {
            TaskStatus.PENDING: recovery.requeued_tasks,
            TaskStatus.FAILED: recovery.failed_tasks,
            TaskStatus.TIMEOUT: recovery.timed_out_tasks,
            TaskStatus.CANCELLED: recovery.cancelled_tasks,
        }
        recover = partial(
            lifecycle.recover, patience=patience, longest_wait=longest_wait, unstarted=unstarted
        )
        commands = (
            Recover(task_id, partial(recover, wait=self._backoff.draw()))
            for task_id in await self._recoverable(patience, longest_wait, unstarted)
        )
        async for _, done in self.write_all(commands):
            lists[done.record.status].append(done.record.task_id)
        return recovery

    async def write_selected(
        self,
        filter: TaskFilter,
        command_of: Callable[[Record[Task]], Awaitable[Command | None]],
        skipped: tuple[type[StoreError], ...] = REFUSALS,
    ) -> list[str]:
        """Submit a command for each task that matches a checked filter.

        A task that was changed after it was selected is selected again, if it still matches.

        Args:
            command_of: Makes the command of one version of a task; `None` for a task to leave.
            skipped: Refusals that leave their task as it is; another error ends the call.

        Returns:
            The identifiers of the changed tasks.
        """
        with suppress(UnsavedConflictError):  # the query finds only stored tasks
            await self._replica.sync()
        written: dict[str, None] = {}
        refused: list[tuple[str, int]] = []
        after: str | None = None
        tasks = self._replica.tasks
        while True:
            page, following = await tasks.list_records(filter, after=after, limit=TASK_PAGE_SIZE)
            unchanged = 0
            for start in range(0, len(page), PART_SIZE):
                part = page[start : start + PART_SIZE]
                made = [await command_of(task) for task in part if task.task_id not in written]
                commands = [command for command in made if command is not None]
                unchanged += len(commands)
                async for command, _ in self.write_all(commands, skipped):
                    written[command.id] = None
                    unchanged -= 1
            selected = [(task.task_id, task.version) for task in page]
            if unchanged and selected != refused:
                refused = selected  # final, if the next page is the same
                continue  # changed meanwhile: read again, they may no longer match
            after = following
            if after is None:
                return list(written)

    async def write_all(
        self,
        commands: Iterable[Written],
        skipped: tuple[type[StoreError], ...] = REFUSALS,
    ) -> AsyncIterator[tuple[Written, Any]]:
        """Submit many commands; yield each one that changed its task, with its result.

        Raises:
            BackendError: If the database could not be written; earlier batches stay committed.
        """
        left = iter(commands)
        while part := [*islice(left, PART_SIZE)]:
            outcomes = await asyncio.gather(*map(self._write, part), return_exceptions=True)
            for command, outcome in zip(part, outcomes, strict=True):
                if isinstance(outcome, BaseException):
                    if not isinstance(outcome, skipped):
                        raise outcome
                elif outcome.is_changed if isinstance(outcome, Advanced) else outcome:
                    yield command, outcome

    def _write(self, command: Command) -> Coroutine[Any, Any, Any]:
        return (
            self.advance(command) if isinstance(command, Advance) else self._replica.submit(command)
        )

    async def explain(self, task_id: str) -> Explanation:
        task = await self._replica.find((Task, task_id))
        if task is None:
            raise TaskNotFoundError(task_id)
        cache, now = await self._replica.view(), self._replica.database.clock()
        nodes = list(cache.nodes.values())
        skills = {
            node.encoded("available_skills") for node in nodes if conditions.has_skills(node, task)
        }
        key, ahead = pending_key(task), 0
        async for place, one in _pending_tasks(cache):
            if key is None or place >= key:
                break
            if conditions.is_ready(one, now):
                required = one.encoded("required_skills")
                ahead += any(conditions.are_among(required, present) for present in skills)
        return explain(task, nodes, ahead, now)

    async def _recoverable(
        self, patience: timedelta, longest_wait: timedelta, unstarted: timedelta | None
    ) -> list[str]:
        """Return the tasks that `lifecycle.recover` may change; other coroutines run meanwhile."""
        found = await self._replica.tasks.list_expired()
        cache, now = await self._replica.view(), self._replica.database.clock()
        latest = self._latest
        if latest is None or now < latest:  # the clock was turned back, or may have been
            found += [
                one.task_id
                async for _, one in _pending_tasks(cache)
                if conditions.is_beyond_backoff(one, now, longest_wait)
            ]
        self._latest = now if latest is None else max(latest, now)
        for node_id, ids in list(cache.task_index.assigned.items()):
            if node_id is not None and conditions.is_lost(cache.nodes.get(node_id), now, patience):
                found += ids
                continue
            for number, task in enumerate(filter(None, map(cache.tasks.get, list(ids)))):
                if number % TASK_SLICE_SIZE == 0:
                    await asyncio.sleep(0)
                if (
                    conditions.is_overdue(task, now)
                    or conditions.is_cancel_overdue(task, now)
                    or conditions.is_unstarted(task, now, unstarted)
                ):
                    found.append(task.task_id)
        return list(dict.fromkeys(found))  # an expired task of a lost node has one outcome


async def _pending_tasks(cache: Cache) -> AsyncIterator[tuple[PendingKey, Record[Task]]]:
    """Yield pending and scheduled tasks in order; other coroutines run meanwhile."""
    for number, key in enumerate(cache.task_index.pending.first(None), 1):
        if (task := cache.tasks.peek(key[2])) is not None:
            yield key, task
        if number % TASK_SLICE_SIZE == 0:
            await asyncio.sleep(0)
