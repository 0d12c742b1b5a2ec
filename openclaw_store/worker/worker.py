"""A worker: claims tasks for a node, runs them, and reports their results.

Delivery is at least once: a task whose worker is lost runs again. So a handler should be
idempotent.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Coroutine, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager, contextmanager, suppress
from functools import partial
from typing import Any

from openclaw_store.database import Database
from openclaw_store.domain import (
    NodeInfo,
    Task,
    TaskType,
    check_limit_seconds,
    check_number,
    check_positive,
)
from openclaw_store.domain.lifecycle import OVERDUE
from openclaw_store.errors import (
    BackendError,
    ConflictError,
    InvalidDataError,
    NodeInUseError,
    NodeNotFoundError,
    NotFoundError,
    StoreError,
    logger_of,
)
from openclaw_store.repositories import Lease, Owned
from openclaw_store.state_manager import StateManager
from openclaw_store.worker.lease import NodeLease
from openclaw_store.worker.run import Attempt, Handler, Interruption, check_handler, describe
from openclaw_store.worker.waiting import either, first_of, stopped_by_signals

logger = logger_of("worker")

CHECK_SECONDS = 1.0
"""Seconds between two looks for tasks that were cancelled, or taken from the node."""

RETRY_SECONDS = 0.5
"""Pause before a call is repeated while the database is away."""

WAIT_SECONDS = 60.0
"""Longest wait of one claim; the next one follows at once."""


class Worker:
    """Runs the tasks of one node until it is stopped.

    **Lease.** A heartbeat renews the lease of the node. When it cannot be renewed in time, the
    worker cancels its handlers and drops their results, since other nodes may have their tasks by
    then. It registers again when the database is back.
    **Failures.** An exception, a result that cannot be stored, and a timeout fail one task, and
    never the worker. While the database is away, handlers go on, and their reports are repeated
    until the lease is lost.
    **Stop.** After SIGTERM, SIGINT or `stop`, the worker claims no more tasks, gives the running
    ones `grace_seconds`, and releases the rest: they are PENDING again at no cost. A second SIGTERM
    ends it at once; after a second SIGINT, plain functions still run to their end.
    **Identity.** Each worker needs a node of its own. A second worker of a node is refused, unless
    the first one has crashed: it has ended without a stop, and sends no heartbeats.

    Args:
        state: A `StateManager` that is open, or a `Database`, which the worker opens and closes.
        node: The node that is registered, as a copy. It runs `max_concurrent_tasks` tasks at a
            time.
        handle: Runs a task; see `Handler`.
        lease_seconds: Seconds without a heartbeat after which `recover` releases the tasks.
        grace_seconds: Seconds that running tasks have when the worker is stopped.
        recover_every: Seconds between two calls of `recover`; `None` leaves it to other processes.

    Raises:
        InvalidDataError: If an argument is invalid.
    """

    def __init__(
        self,
        state: StateManager | Database,
        node: NodeInfo,
        handle: Handler,
        *,
        lease_seconds: float = 60.0,
        grace_seconds: float = 30.0,
        recover_every: float | None = None,
    ) -> None:
        if not isinstance(state, StateManager | Database):
            wanted = "must be a StateManager or a Database"
            raise InvalidDataError("state", f"{wanted}, not {type(state).__name__}")
        if not isinstance(node, NodeInfo):
            raise InvalidDataError("node", f"must be a NodeInfo, not {type(node).__name__}")
        check_handler(handle)
        self._slots = check_positive("max_concurrent_tasks", node.max_concurrent_tasks)
        self._state = state
        database = state if isinstance(state, Database) else state.db
        for one in database.writer.telemetry:
            handle = one.traced(handle)
        self._handle = handle
        self._lease_seconds = check_limit_seconds("lease_seconds", lease_seconds)
        self._grace_seconds = check_number("grace_seconds", grace_seconds)
        self._recover_every = recover_every
        if recover_every is not None:
            check_limit_seconds("recover_every", recover_every)
        self._stopping = asyncio.Event()
        self._lease = NodeLease(node, self._lease_seconds)
        self._node_id = node.node_id
        self._runs: dict[Owned, Attempt] = {}

    def __repr__(self) -> str:
        used = f"{len(self._runs)} of {self._slots} slots in use"
        return f"<Worker of {self._node_id!r}, {used}>"

    def stop(self) -> None:
        """Make `run` return after the running tasks have ended, or after their grace.

        Call it on the event loop.
        """
        self._stopping.set()

    async def run(self) -> None:
        """Work until SIGTERM, SIGINT or `stop`.

        Raises:
            NodeInUseError: If another worker of this node sends heartbeats, or has taken it over.
            StoreError: If the node cannot be registered.
        """
        async with self._open() as manager:
            with stopped_by_signals(self.stop), _threads(self._slots) as executor:
                await either(self._lease.take(manager), self._stopping.wait())
                if not self._stopping.is_set():
                    await self._work(manager, executor)
                await self._leave(manager)

    @asynccontextmanager
    async def _open(self) -> AsyncIterator[StateManager]:
        if isinstance(self._state, Database):
            async with StateManager(self._state, cache=False) as manager:
                yield manager
        else:
            yield self._state

    async def _work(self, manager: StateManager, executor: ThreadPoolExecutor) -> None:
        duties = [self._keep_lease(manager), self._watch_lease()]
        if self._recover_every is not None:
            duties.append(self._recover(manager, self._recover_every))
        services: list[asyncio.Future[Any]] = [
            asyncio.ensure_future(self._stopping.wait()),
            *map(asyncio.ensure_future, duties),
        ]
        slots = [
            asyncio.ensure_future(self._fill_slot(manager, executor)) for _ in range(self._slots)
        ]
        try:
            # Until the stop, or the error of a service or a slot: none of them ends otherwise.
            await first_of([*services, *slots])
            if running := len(self._runs):
                what = "node %r stops: its running tasks (%d) have %g s to end"
                logger.info(what, self._node_id, running, self._grace_seconds)
            await asyncio.wait(slots, timeout=self._grace_seconds)
            self._interrupt(Interruption.STOPPED)
            await asyncio.gather(*slots)
        finally:
            self._interrupt(Interruption.STOPPED)
            for one in (*slots, *services):
                one.cancel()
            await asyncio.gather(*slots, *services, return_exceptions=True)

    async def _leave(self, manager: StateManager) -> None:
        """Release the tasks of the node, and set it OFFLINE; if that fails, `recover` does it."""
        try:
            # From the database: a claim may have been committed while its slot was ending.
            lease = await manager.get_lease(self._node_id)
            if lease is None or lease.session != self._lease.node.session:
                return  # its tasks are those of another worker
            for owned in lease.held:
                await self._give_back(manager, owned, "worker stopped")
            await manager.change_node(self._node_id, self._lease.end)
        except BackendError as error:
            logger.warning("node %r could not be set OFFLINE: %s", self._node_id, error)

    # One slot: claim, run, report, and claim the next task in the same commit.

    async def _fill_slot(self, manager: StateManager, executor: ThreadPoolExecutor) -> None:
        task: Task | None = None
        while not (task is None and self._stopping.is_set()):
            if task is None:
                task = await self._claim(manager)
            else:
                task = await self._run(manager, executor, task)
            lease = self._lease
            if task is not None and (task.version < lease.registered or not lease.holds.is_set()):
                task = None  # the registration has released it, or will

    async def _claim(self, manager: StateManager) -> Task | None:
        """Return the next task; `None` if the worker stops, or the database is away."""
        await either(self._lease.holds.wait(), self._stopping.wait())
        if self._stopping.is_set():
            return None
        claim = manager.claim_tasks(self._node_id, wait_seconds=WAIT_SECONDS, start=True)
        try:
            # A claim that is committed while the worker stops is released by `_leave`.
            claimed = await either(claim, self._stopping.wait())
        except NodeNotFoundError:
            self._lose_lease("it was removed")
            return None
        except StoreError as error:
            await self._pause(manager, "no task could be claimed", error)
            return None
        return claimed[0] if isinstance(claimed, list) and claimed else None

    async def _claim_now(self, manager: StateManager) -> Task | None:
        """Return the next task, if there is one; an error will come up again in `_claim`."""
        with suppress(StoreError):
            return next(iter(await manager.claim_tasks(self._node_id, start=True)), None)
        return None

    async def _run(
        self, manager: StateManager, executor: ThreadPoolExecutor, task: Task
    ) -> Task | None:
        """Run a task and report its end; return the next task, if there is one."""
        run = Attempt(task)
        self._runs[run.owned] = run
        try:
            report = await self._call(manager, executor, run)
            return None if report is None else await self._report(manager, run, report)
        finally:
            del self._runs[run.owned]

    async def _call(
        self, manager: StateManager, executor: ThreadPoolExecutor, run: Attempt
    ) -> partial[Coroutine[Any, Any, Task]] | None:
        """Call the handler; return the report of its end, or `None` if there is none to make."""
        task = run.task
        try:
            result = await run.call(self._handle, executor)
        except (Exception, asyncio.CancelledError) as error:
            if (own := asyncio.current_task()) is not None and own.cancelling():
                raise  # the worker ends at once
            match run.interruption:
                case Interruption.LOST:
                    return None
                case Interruption.STOPPED:
                    return partial(manager.release_task, task, "worker stopped")
                case Interruption.CANCELLED:
                    return partial(manager.acknowledge_cancel, task)
                case Interruption.TIMED_OUT:
                    return partial(manager.fail_task, task, OVERDUE, timed_out=True)
            logger.info("task %r failed: %r", task.task_id, error)
            return partial(manager.fail_task, task, describe(error))
        return partial(manager.complete_task, task, result)

    async def _report(
        self, manager: StateManager, run: Attempt, report: partial[Coroutine[Any, Any, Task]]
    ) -> Task | None:
        """Report the end of a task, and claim the next one; repeat until the lease is lost."""
        claimed: Task | None = None
        while run.interruption is not Interruption.LOST:
            is_free = claimed is None and self._lease.holds.is_set()
            claim = self._claim_now(manager) if is_free and not self._stopping.is_set() else None
            reported, found = await _together(report(), claim)
            claimed = found or claimed
            match reported:
                case InvalidDataError():  # the result cannot be stored
                    report = partial(manager.fail_task, run.task, str(reported))
                case BackendError():
                    claimed = None  # no slot knows of it: `_obey` releases it
                    what = f"the end of {run.task.task_id!r} is not reported"
                    await self._pause(manager, what, reported)
                case ConflictError() | NotFoundError():
                    logger.info("task %r is not the node's any more", run.task.task_id)
                    return claimed
                case StoreError():
                    raise reported
                case _:
                    return claimed
        return None  # `_keep_lease` registers the node again, which releases its tasks

    # The node: its lease, and the tasks that it holds in the database.

    async def _watch_lease(self) -> None:
        """Notice the end of the lease in time, even while `_keep_lease` waits for the database."""
        while True:
            await self._lease.holds.wait()
            if self._lease.left <= 0:
                self._lose_lease("no heartbeat could be written in time")
            await asyncio.sleep(max(0, min(self._lease.left, CHECK_SECONDS)))

    async def _keep_lease(self, manager: StateManager) -> None:
        """Send heartbeats, obey their answers, and register again after the lease was lost.

        Between two heartbeats, it also reads the lease: after each new revision, and while it has
        tasks that no slot knows of.
        """
        unknown: dict[Owned, float] = {}
        version = -1
        while True:
            await asyncio.sleep(max(0, min(self._lease.pause, CHECK_SECONDS)))
            # Before the lease is read, which may lack the tasks of later runs.
            known = list(self._runs.values())
            try:
                if self._lease.holds.is_set() and self._lease.left <= 0:
                    self._lose_lease("the process was stopped for too long")
                if not self._lease.holds.is_set():
                    await self._lease.register(manager)
                    continue
                if self._lease.pause <= 0:
                    version = manager.version
                    progress = {one.task.task_id: one.latest for one in known if one.latest}
                    lease = await self._lease.renew(manager, progress)
                elif unknown or manager.version != version:
                    version = manager.version
                    lease = await manager.get_lease(self._node_id)
                else:
                    continue
                unknown = await self._obey(manager, lease, known, unknown)
            except NodeInUseError:
                self._lose_lease("another worker has taken the node over")
                raise
            except StoreError as error:
                await self._pause(manager, "the lease of the node is not renewed", error)

    async def _obey(
        self,
        manager: StateManager,
        lease: Lease | None,
        known: list[Attempt],
        unknown: Mapping[Owned, float],
    ) -> dict[Owned, float]:
        """Interrupt tasks that were cancelled or taken away; release tasks that no slot knows of.

        Args:
            unknown: The tasks that no slot knew of before, and since when.

        Returns:
            The tasks that no slot knows of now.

        Raises:
            NodeInUseError: If another worker has registered the node.
        """
        if lease is None:
            self._lose_lease("it was removed")
            return {}
        if lease.session != self._lease.node.session:
            raise NodeInUseError(self._node_id, lease.session)
        for run in known:
            is_asked = lease.held.get(run.owned)
            if is_asked is None:
                run.interrupt(Interruption.LOST)
            elif is_asked:
                run.interrupt(Interruption.CANCELLED)
        # The answer to a claim may have been lost, but it may also be on its way.
        now = time.monotonic()
        found = {one: unknown.get(one, now) for one in lease.held.keys() - self._runs.keys()}
        for owned in [one for one, since in found.items() if now - since >= CHECK_SECONDS]:
            await self._give_back(manager, owned)
        return found

    async def _give_back(
        self, manager: StateManager, owned: Owned, reason: str | None = None
    ) -> None:
        id, attempt = owned
        task = Task(id, TaskType.BATCH, "", assigned_node=self._node_id, attempt=attempt)
        with suppress(ConflictError, NotFoundError):  # it is not the node's any more
            await manager.release_task(task, reason)

    def _lose_lease(self, reason: str) -> None:
        logger.warning("node %r has lost its lease: %s", self._node_id, reason)
        self._lease.lose()
        self._interrupt(Interruption.LOST)

    def _interrupt(self, reason: Interruption) -> None:
        for run in self._runs.values():
            run.interrupt(reason)

    async def _recover(self, manager: StateManager, seconds: float) -> None:
        while True:
            await asyncio.sleep(seconds)
            try:
                await manager.recover(self._lease_seconds)
            except StoreError as error:
                await self._pause(manager, "lost tasks could not be recovered", error)

    async def _pause(self, manager: StateManager, what: str, error: Exception) -> None:
        if not manager.is_initialized:  # it was shut down: nothing can succeed any more
            raise error
        logger.warning("%s, and tried again: %s", what, error)
        await asyncio.sleep(RETRY_SECONDS)


@contextmanager
def _threads(count: int) -> Iterator[ThreadPoolExecutor]:
    """Open threads, and do not wait for them at the end, as that would block the event loop.

    They are idle then, unless the worker ends at once.
    """
    executor = ThreadPoolExecutor(count)
    try:
        yield executor
    finally:
        executor.shutdown(wait=False)


async def _together(
    report: Coroutine[Any, Any, Task], claim: Coroutine[Any, Any, Task | None] | None
) -> tuple[Task | StoreError, Task | None]:
    """Submit a report and behind it a claim, so that they share a commit; return both answers."""
    # The claim is queued as soon as this coroutine waits for the report, before the commit.
    claiming = None if claim is None else asyncio.ensure_future(claim)
    try:
        reported: Task | StoreError
        try:
            reported = await report
        except StoreError as error:
            reported = error
        return reported, None if claiming is None else await claiming
    finally:
        if claiming is not None and not claiming.done():  # the worker ends at once
            claiming.cancel()
            await asyncio.wait([claiming])
