"""A worker: claims tasks for a node, runs them, and reports their results.

Delivery is at least once: a task whose worker is lost runs again. So a handler should be
idempotent.
"""

from __future__ import annotations

import asyncio
import signal
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager, contextmanager, suppress
from functools import partial
from typing import Any

from openclaw_store.database import Database
from openclaw_store.domain import (
    NodeInfo,
    NodeStatus,
    Task,
    TaskFilter,
    TaskStatus,
    check_limit_seconds,
    check_number,
    check_some,
)
from openclaw_store.domain.lifecycle import OVERDUE
from openclaw_store.errors import (
    BackendError,
    ConflictError,
    InvalidDataError,
    NodeNotFoundError,
    NotFoundError,
    StoreError,
    logger_of,
)
from openclaw_store.state_manager import StateManager
from openclaw_store.worker.run import Attempt, Handler, Interruption, describe

logger = logger_of("worker")

HEARTBEATS_PER_LEASE = 4
"""Heartbeats in the time of a lease, so that a lost one does not end it."""

CHECK_SECONDS = 1.0
"""Seconds between two looks for tasks that were cancelled, or taken from the node."""

RETRY_SECONDS = 0.5
"""Pause before a call is repeated while the database is away."""

WAIT_SECONDS = 60.0
"""Longest wait of one claim; the next one follows at once."""

_HELD = (TaskStatus.SCHEDULED, TaskStatus.RUNNING)
_SIGNALS = (signal.SIGTERM, signal.SIGINT)


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
    **Identity.** Each worker needs a node of its own: a worker that registers a node takes it from
    the one before.

    Args:
        state: A `StateManager` that is open, or a `Database`, which the worker opens and closes.
        node: The node that is registered. It runs `max_concurrent_tasks` tasks at a time.
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
        if not callable(handle):
            raise InvalidDataError("handle", f"must be a function, not {type(handle).__name__}")
        self.node = node
        self._slots = check_some("max_concurrent_tasks", node.max_concurrent_tasks)
        self._state = state
        self._handle = handle
        self._lease_seconds = check_limit_seconds("lease_seconds", lease_seconds)
        self._grace_seconds = check_number("grace_seconds", grace_seconds)
        self._recover_every = recover_every
        if recover_every is not None:
            check_limit_seconds("recover_every", recover_every)
        self._stopping = asyncio.Event()
        self._leased = asyncio.Event()  # the node is registered, and its lease holds
        self._lease_until = 0.0  # by `time.monotonic`
        self._registered = 0  # revision of the last registration
        self._runs: dict[tuple[str, int], Attempt] = {}  # by task and attempt

    def __repr__(self) -> str:
        used = f"{len(self._runs)} of {self._slots} slots in use"
        return f"<Worker of {self.node.node_id!r}, {used}>"

    def stop(self) -> None:
        """Make `run` return after the running tasks have ended, or after their grace.

        Call it on the event loop.
        """
        self._stopping.set()

    async def run(self) -> None:
        """Work until SIGTERM, SIGINT or `stop`.

        Raises:
            StoreError: If the node cannot be registered.
        """
        async with self._open() as manager:
            with (
                _signals(self.stop),
                ThreadPoolExecutor(self.node.max_concurrent_tasks) as executor,
            ):
                await self._register(manager)
                await self._work(manager, executor)

    @asynccontextmanager
    async def _open(self) -> AsyncIterator[StateManager]:
        if isinstance(self._state, Database):
            async with StateManager(self._state, cache=False) as manager:
                yield manager
        else:
            yield self._state

    async def _work(self, manager: StateManager, executor: ThreadPoolExecutor) -> None:
        duties = [self._keep_lease(manager), self._check_tasks(manager)]
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
            await _first([*services, *slots])
            await asyncio.wait(slots, timeout=self._grace_seconds)
            for run in list(self._runs.values()):
                run.interrupt(Interruption.STOPPED)
            await asyncio.gather(*slots)
            await self._leave(manager)
        finally:
            for one in (*slots, *services):
                one.cancel()
            await asyncio.gather(*slots, *services, return_exceptions=True)

    async def _leave(self, manager: StateManager) -> None:
        """Release what the node holds, and set it OFFLINE; `recover` does it otherwise."""
        try:
            for task in await self._held(manager):
                with suppress(ConflictError, NotFoundError):
                    await manager.release_task(task, "worker stopped")
            node = await manager.get_node(self.node.node_id)
            if node is not None and node.status is not NodeStatus.MAINTENANCE:
                await manager.update_node_status(node.node_id, NodeStatus.OFFLINE)
        except BackendError as error:
            logger.warning("node %r could not be set OFFLINE: %s", self.node.node_id, error)

    # One slot: claim, run, report, and claim the next task in the same commit.

    async def _fill_slot(self, manager: StateManager, executor: ThreadPoolExecutor) -> None:
        task: Task | None = None
        while not (task is None and self._stopping.is_set()):
            if task is None:
                task = await self._claim(manager)
            else:
                task = await self._run(manager, executor, task)
            if task is not None and (task.version < self._registered or not self._leased.is_set()):
                task = None  # the registration has released it, or will

    async def _claim(self, manager: StateManager) -> Task | None:
        """Return the next task; `None` if the worker stops, or the database is away."""
        await _either(self._leased.wait(), self._stopping.wait())
        if self._stopping.is_set():
            return None
        claim = manager.claim_tasks(self.node.node_id, wait_seconds=WAIT_SECONDS, start=True)
        try:
            # A claim that is committed while the worker stops is released by `_leave`.
            claimed = await _either(claim, self._stopping.wait())
        except NodeNotFoundError:
            self._lose_lease("it was removed")
            return None
        except StoreError as error:
            await self._pause(manager, "no task could be claimed", error)
            return None
        return claimed[0] if isinstance(claimed, list) and claimed else None

    async def _run(
        self, manager: StateManager, executor: ThreadPoolExecutor, task: Task
    ) -> Task | None:
        """Run a task and report its end; return the next task, if there is one."""
        key = task.task_id, task.attempt
        run = self._runs[key] = Attempt(task)
        try:
            report = await self._call(manager, executor, run)
            return None if report is None else await self._report(manager, run, report)
        finally:
            del self._runs[key]

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
            calls: list[Coroutine[Any, Any, Any]] = [report()]
            if claimed is None and self._leased.is_set() and not self._stopping.is_set():
                calls.append(manager.claim_tasks(self.node.node_id, start=True))
            # Submitted together, they share a commit.
            reported, *claims = await asyncio.gather(*calls, return_exceptions=True)
            for one in claims:
                if isinstance(one, list) and one:  # an error of the claim will come up again
                    [claimed] = one
            match reported:
                case InvalidDataError():  # the result cannot be stored
                    report = partial(manager.fail_task, run.task, str(reported))
                case BackendError():
                    what = f"the end of {run.task.task_id!r} is not reported"
                    await self._pause(manager, what, reported)
                case ConflictError() | NotFoundError():
                    logger.info("task %r is not the node's any more", run.task.task_id)
                    return claimed
                case BaseException():
                    raise reported
                case _:
                    return claimed
        return None  # `_keep_lease` registers the node again, which releases its tasks

    # The node: its lease, and the tasks that it holds in the database.

    async def _give_back(self, manager: StateManager, task: Task) -> None:
        with suppress(StoreError):  # `_check_tasks` tries again
            await manager.release_task(task)

    async def _register(self, manager: StateManager) -> None:
        began = time.monotonic()
        self.node.lease_seconds = self._lease_seconds
        self.node.status = NodeStatus.ONLINE
        await manager.register_node(self.node)
        self._lease_until = began + self._lease_seconds
        self._registered = self.node.version
        self._leased.set()

    async def _keep_lease(self, manager: StateManager) -> None:
        """Send heartbeats; register again after the lease was lost."""
        pause = self._lease_seconds / HEARTBEATS_PER_LEASE
        while True:
            left = self._lease_until - time.monotonic()
            if self._leased.is_set():
                await asyncio.sleep(min(pause, max(0, left)))
            try:
                async with asyncio.timeout(self._lease_seconds):
                    await self._renew(manager)
            except (StoreError, TimeoutError) as error:
                await self._pause(manager, "the lease of the node is not renewed", error)
            if self._leased.is_set() and time.monotonic() >= self._lease_until:
                self._lose_lease("no heartbeat could be written in time")

    async def _renew(self, manager: StateManager) -> None:
        began = time.monotonic()
        if self._leased.is_set() and began >= self._lease_until:
            self._lose_lease("the process was stopped for too long")
        if not self._leased.is_set():
            await self._register(manager)
        elif await manager.update_heartbeat(self.node.node_id):
            await manager.sync_to_database()  # a manager with a cache writes it later
            self._lease_until = began + self._lease_seconds
        else:
            self._lose_lease("it was removed")

    def _lose_lease(self, reason: str) -> None:
        logger.warning("node %r has lost its lease: %s", self.node.node_id, reason)
        self._leased.clear()
        for run in self._runs.values():
            run.interrupt(Interruption.LOST)

    async def _check_tasks(self, manager: StateManager) -> None:
        """Interrupt what was cancelled or taken away; release what no slot knows of."""
        unknown: set[tuple[str, int]] = set()
        version = -1
        while True:
            await asyncio.sleep(CHECK_SECONDS)
            if not unknown and manager.version == version:
                continue
            version = manager.version
            known = list(self._runs.values())  # the tasks of later runs may be missing below
            try:
                held = {task.task_id: task for task in await self._held(manager)}
            except StoreError as error:
                await self._pause(manager, "the tasks of the node could not be read", error)
                continue
            for run in known:
                task = held.get(run.task.task_id)
                if task is None or task.attempt != run.task.attempt:
                    run.interrupt(Interruption.LOST)
                elif task.cancel_requested_at is not None:
                    run.interrupt(Interruption.CANCELLED)
            # The answer to a claim may have been lost. Seen twice: it may also be on its way.
            found = {(id, one.attempt) for id, one in held.items()} - self._runs.keys()
            for id, _ in found & unknown:
                await self._give_back(manager, held[id])
            unknown = found

    async def _held(self, manager: StateManager) -> list[Task]:
        """Return the tasks that the node holds, by the database."""
        held: list[Task] = []
        after: str | None = None
        filter = TaskFilter(node=self.node.node_id, status=_HELD)
        while True:
            page = await manager.list_tasks(filter, after=after)
            held += page
            after = page.after
            if after is None:
                return held

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
def _signals(stop: Callable[[], None]) -> Iterator[None]:
    """Call `stop` at the first signal; a second one has the effect it had before."""
    loop = asyncio.get_running_loop()

    def restore() -> None:
        for one in _SIGNALS:
            loop.remove_signal_handler(one)

    def handle() -> None:
        restore()
        stop()

    try:
        for one in _SIGNALS:
            loop.add_signal_handler(one, handle)
    except (NotImplementedError, RuntimeError, ValueError) as error:
        # Windows, or not the main thread: the program calls `Worker.stop` itself.
        logger.info("signals do not stop this worker: %s", error)
        yield
        return
    try:
        yield
    finally:
        restore()


async def _first(futures: list[asyncio.Future[Any]]) -> None:
    """Wait for the first of several futures; raise its exception."""
    done, _ = await asyncio.wait(futures, return_when=asyncio.FIRST_COMPLETED)
    for one in done:
        one.result()


async def _either(work: Coroutine[Any, Any, Any], other: Coroutine[Any, Any, Any]) -> Any:
    """Return the result of the work, or `None` if the other ends first, which cancels it."""
    first, second = asyncio.ensure_future(work), asyncio.ensure_future(other)
    try:
        await asyncio.wait([first, second], return_when=asyncio.FIRST_COMPLETED)
        return first.result() if first.done() else None
    finally:
        for one in (first, second):
            one.cancel()
        await asyncio.wait([first, second])
