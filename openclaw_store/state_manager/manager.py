"""`StateManager`: the cluster's state, answered from memory and kept in a database."""

from __future__ import annotations

import asyncio
import inspect
import logging
import math
import os
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Sequence
from contextvars import Context
from functools import partial
from itertools import islice
from threading import get_ident
from types import TracebackType
from typing import Any, Self, TypeVar
from weakref import WeakSet

from openclaw_store.backends import was_interrupted
from openclaw_store.database import Database
from openclaw_store.domain import (
    DEFAULT_BACKOFF,
    FINISHED,
    JOINED,
    KEY,
    Backoff,
    Change,
    ClusterState,
    Entity,
    NodeInfo,
    NodeStatus,
    Record,
    Task,
    TaskFilter,
    TaskPage,
    admit,
    check_count,
    check_filter,
    check_key,
    check_limit,
    check_number,
    check_percentage,
    check_some,
    check_text,
    write_back,
)
from openclaw_store.errors import (
    DeadlineError,
    DuplicateError,
    InvalidDataError,
    StoreError,
    TaskNotFoundError,
    UnavailableError,
    UnsavedConflictError,
    safe_repr,
)
from openclaw_store.repositories import (
    Advance,
    Create,
    NodeRepository,
    Repository,
    SetNodeStatus,
    TaskRepository,
    cancellation_of,
    compact_feed,
    completion_of,
    failure_of,
    is_known,
    node_status,
    read_history,
    requeue_of,
    start_of,
)
from openclaw_store.state_manager.explain import Explanation
from openclaw_store.state_manager.replica import Replica
from openclaw_store.state_manager.scheduler import Recovery, Scheduler
from openclaw_store.state_manager.watchers import WATCH_SECONDS

logger = logging.getLogger("openclaw_store.state_manager")

T = TypeVar("T")

ADD_BATCH_SIZE = 1000
"""Tasks that one transaction adds at most; others write in between."""

_COPIES = 100  # copied at a stretch, before other coroutines run


_managers: WeakSet[StateManager] = WeakSet()


def _disown_managers() -> None:
    """In a forked child, the managers are the parent's."""
    for manager in _managers:
        manager._thread, manager._is_inherited = None, True


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_disown_managers)


class StateManager:
    """Cluster state: answered from memory, kept in a database.

    **Durability.** When a write returns, it is committed. Two exceptions: heartbeats are flushed
    within a second, and what was added or updated with `persist=False` by the next
    `sync_to_database`.
    **Freshness.** A read sees this process's writes at once, those of others as soon as it is told
    of them, within 100 ms; at the latest after the next `refresh_from_database`, within
    `auto_sync_interval` seconds. What was seen once never goes back. (A write by another event
    loop of this process is seen after a turn of this one.)
    **Isolation.** What is handed out is the caller's own copy. A write from an outdated copy
    raises `StaleVersionError`; `change_task` and `change_node` read, change and write safely.
    **Sharing.** One instance serves any number of coroutines of one event loop. Any number of
    instances, in any number of processes, may share a database.

    Args:
        database: The database; `shutdown` closes it.
        auto_sync_interval: Seconds between synchronisations; `None` for none but manual ones.
        finished_cache_size: How many finished tasks are kept in memory; the others are read from
            the database when they are asked for.
        wake_ups: Whether it is told at once when other processes have committed, which takes a
            thread on SQLite and a connection on PostgreSQL. Without `auto_sync_interval` it is not.
        backoff: How long a task that has failed waits for its next try.

    Attributes:
        db: The database.
        task_repo: Its tasks, without the cache.
        node_repo: Its nodes, without the cache.
    """

    def __init__(
        self,
        database: Database,
        auto_sync_interval: float | None = 30,
        *,
        finished_cache_size: int = 10_000,
        wake_ups: bool = True,
        backoff: Backoff = DEFAULT_BACKOFF,
    ) -> None:
        if auto_sync_interval is not None and (
            isinstance(auto_sync_interval, bool)
            or not isinstance(auto_sync_interval, int | float)
            or not 0 < auto_sync_interval < math.inf
        ):
            raise InvalidDataError(
                "auto_sync_interval",
                f"must be seconds above 0, or None, not {safe_repr(auto_sync_interval)}",
            )
        self.db = database
        self.task_repo = TaskRepository(database, backoff)
        self.node_repo = NodeRepository(database)
        self._backoff = backoff
        self._interval = auto_sync_interval
        self._wake_ups = wake_ups
        self._replica = Replica(database, check_count("finished_cache_size", finished_cache_size))
        self._scheduler = Scheduler(
            database, self._replica, self.task_repo, self.node_repo, backoff
        )
        self._loop: asyncio.AbstractEventLoop | None = None  # the one it belongs to
        self._is_running: Callable[[], bool] = bool  # whether that one is: there is none yet
        self._thread: int | None = None  # in which its event loop runs, while it may be used
        self._life = asyncio.Lock()  # one begins or ends it at a time
        self._sync_loop: asyncio.Task[None] | None = None
        self._ending: asyncio.Future[None] | None = None
        self._is_inherited = False
        _managers.add(self)

    def __repr__(self) -> str:
        state = f"version {self.version}" if self.is_initialized else "not initialized"
        return f"<StateManager of {self.db!r}, {state}>"

    async def initialize(self) -> bool:
        """Open the database, load the state and start the synchronisation; `True`.

        Raises:
            SchemaMismatchError: If the database is newer than the library.
            UnavailableError: If it cannot be opened.
        """
        async with self._life:
            if self._ending is not None:
                raise UnavailableError("the StateManager was shut down: make a new one")
            if self._thread is None:
                self._loop = asyncio.get_running_loop()
                self._is_running = self._loop.is_running
                await self.db.initialize()
                await self._replica.start()
                self._thread = get_ident()
                if self._interval is not None:
                    self._sync_loop = self._loop.create_task(
                        self._sync_every(self._interval), context=Context()
                    )
                    if self._wake_ups:
                        Context().run(self._replica.follow)
        return True

    async def shutdown(self) -> None:
        """Synchronise for the last time and close the database; may be called twice.

        If it was interrupted, by Ctrl-C say, the next call goes on with what is left.

        Raises:
            UnavailableError: If it is called on another event loop, as long as its own is there.
            StoreError: If something could not be written; everything is closed all the same.
        """
        if self._is_inherited:
            return  # it is the parent's
        if self._ending is None or was_interrupted(self._ending):
            _refuse_elsewhere(self._loop)
            if self._loop is not None and self._loop.is_closed():
                self._life = asyncio.Lock()  # who has it there never lets go
            self._ending = asyncio.ensure_future(self._shutdown())
        elif not self._ending.done():
            _refuse_elsewhere(self._ending.get_loop())
        await asyncio.shield(self._ending)

    async def _shutdown(self) -> None:
        async with self._life:
            try:
                await self._stop()
            except Exception:
                await self.db.close()
                raise
            await self.db.close()

    async def _stop(self) -> None:
        try:
            if self._loop is None:
                return  # it never was initialized
            if self._loop.is_closed():
                await self._replica.abandon()
                return
            if self._sync_loop is not None:
                self._sync_loop.cancel()
                await asyncio.wait([self._sync_loop])
            await self._replica.stop()
        finally:
            self._thread = None

    async def __aenter__(self) -> Self:
        try:
            await self.initialize()
        except BaseException:
            await self.shutdown()
            raise
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        await self.shutdown()

    @property
    def is_initialized(self) -> bool:
        """Whether it can be used: initialised, and not shut down."""
        return self._thread is not None

    @property
    def version(self) -> int:
        """Revision of the newest change in memory; survives a restart."""
        return self._replica.cache.version

    async def get_state(self) -> ClusterState:
        """The cluster at this moment, in constant time."""
        self._check_usable()
        return self._replica.cache.state()

    async def get_task_stats(self) -> dict[str, int]:
        """How many tasks there are in the database: `total`, and one key for each status."""
        self._check_usable()
        counts = self._replica.cache.task_stats()
        return {"total": sum(counts.values()), **counts}

    async def get_node_stats(self) -> dict[str, int]:
        """How many nodes there are in the database: `total`, `online`, `offline`, and `busy`.

        Busy are those with the status BUSY, and those that are ONLINE and full.
        """
        self._check_usable()
        return self._replica.cache.node_stats()

    async def get_stats(self) -> dict[str, Any]:
        """Figures for who operates it: those of `Database.get_stats`, and of what is in memory.

        Returns:
            Besides: `last_sync_at` and `last_refresh_at`, when the last one of each was complete
            (loading the state is a refresh; `None` before the first); `cached_tasks`;
            `unsaved_entries` and `unsaved_heartbeats`, which are still to be written.
        """
        self._check_usable()
        return {
            **await self.db.get_stats(),
            "last_sync_at": self._replica.last_sync_at,
            "last_refresh_at": self._replica.last_refresh_at,
            **self._replica.cache.sizes(),
        }

    async def get_task(self, task_id: str) -> Task | None:
        """A task, finished ones too; `None` if there is none."""
        # Without another call, as this is asked most often.
        if self._thread != get_ident() or not self._is_running():
            self._check_usable()
        try:
            record = self._replica.cache.tasks.entries.get(task_id)
        except TypeError:  # it has no hash, so it is no text
            record = None
        if type(record) is Record:  # as mostly
            return record.copy()
        found = await self._replica.find((Task, check_key("task_id", task_id)))
        return None if found is None else found.copy()

    async def get_pending_tasks(self, limit: int | None = 50) -> list[Task]:
        """Pending and scheduled tasks by priority, then time of submission, then identifier."""
        self._check_usable()
        limit, cache = check_limit(limit), self._replica.cache
        if limit is not None and limit <= _COPIES:
            return await _copies(cache.pending(limit), Record.copy)
        # All of this moment, though they are looked up and copied bit by bit.
        tasks = cache.tasks.snapshot()
        return await _copies(cache.pending_keys(limit), lambda key: tasks[key[2]])

    async def add_task(self, task: Task, persist: bool = True) -> bool:
        """Add a task; `task` receives its version and its times in UTC.

        Args:
            persist: `False` keeps it in memory until the next synchronisation.

        Raises:
            DuplicateError: If there is a task with this identifier.
            InvalidDataError: If a field cannot be stored.
        """
        self._check_usable()
        record = admit(Task, task, self.db.clock)
        write_back(await self._add(record, persist), task)
        return True

    async def update_task(self, task: Task, persist: bool = True) -> bool:
        """Write a changed task back; `task` receives the new version and can be changed again.

        Args:
            persist: `False` keeps it in memory until the next synchronisation.

        Raises:
            TaskNotFoundError: If it was removed meanwhile.
            StaleVersionError: If it was changed meanwhile; read it again, or use `change_task`.
            InvalidDataError: If a field cannot be stored.
        """
        self._check_usable()
        record = self._encode_known(Task, task)
        write_back(await self._update(record, persist), task)
        return True

    async def change_task(self, task_id: str, fn: Callable[[Task], object]) -> Task | None:
        """Read a task, change it and write it, without losing what others write meanwhile.

        Args:
            fn: Is given a copy and changes it; called again if the task was changed meanwhile.

        Returns:
            The task as it is stored; `None` if there is none.

        Raises:
            InvalidDataError: If a field cannot be stored.
            ConflictError: If it was only in memory, and lost to newer data.
        """
        return await self._change(self.task_repo, check_key("task_id", task_id), fn)

    async def remove_task(self, task_id: str) -> bool:
        """Remove a task; `False` if there is none. Its place on a node is free then."""
        self._check_usable()
        return await self._replica.remove((Task, check_key("task_id", task_id)))

    delete_task = remove_task

    async def submit_task(self, task: Task) -> Task:
        """Add a task, unless there is a live one with its idempotency key.

        It can be repeated: then it returns what the first call has added.

        Returns:
            The task as it is stored, or the one that is there already.

        Raises:
            DuplicateError: If another task has its identifier.
            InvalidDataError: If a field cannot be stored.
        """
        while True:
            try:
                await self.add_task(task)
            except DuplicateError as error:
                # Not from memory, which need not know yet that it has the key.
                found = await self.task_repo.get(error.id)
                key = task.idempotency_key
                if found is not None and key is not None and found.idempotency_key == key:
                    await self._replica.reach(found.version)
                    return found
                if error.idempotency_key is None:
                    raise
                # Else the one that had the key was removed, or changed, meanwhile.
            else:
                return admit(Task, task, self.db.clock).copy()

    async def add_tasks(self, tasks: Iterable[Task]) -> list[StoreError | None]:
        """Add many tasks; each receives its version and its times in UTC.

        Works in chunks of 1,000, each of which is one transaction; others write in between. After
        an error a note on it says how many tasks were gone through, and the call can be repeated:
        those that are there are refused then.

        Returns:
            For each task, `None` if it was added, or why it was not: `DuplicateError`, or
            `InvalidDataError`.

        Raises:
            BackendError: If the database could not be written.
            InvalidDataError: If the database itself refuses a row of a chunk.
        """
        self._check_usable()
        if not isinstance(tasks, Iterable):
            raise InvalidDataError("tasks", f"must be tasks, not {type(tasks).__name__}")
        outcomes: list[StoreError | None] = []
        remaining = iter(tasks)
        while chunk := list(islice(remaining, ADD_BATCH_SIZE)):
            try:
                outcomes += await self._add_chunk(chunk)
            except StoreError as error:
                error.add_note(f"{len(outcomes)} tasks were gone through before")
                raise
        return outcomes

    async def _add_chunk(self, chunk: Sequence[Task]) -> list[StoreError | None]:
        outcomes: list[StoreError | None] = [None] * len(chunk)
        creations: dict[int, Create[Task]] = {}
        for place, task in enumerate(chunk):
            try:
                record = admit(Task, task, self.db.clock)
            except InvalidDataError as error:
                outcomes[place] = error
                continue
            creations[place] = Create(Task, task.task_id, record)
        results = await self._replica.submit_all(list(creations.values()))
        for place, result in zip(creations, results, strict=True):
            if isinstance(result, StoreError):
                outcomes[place] = result
            else:
                write_back(result, chunk[place])
        return outcomes

    async def list_tasks(
        self, filter: TaskFilter | None = None, *, after: str | None = None, limit: int = 100
    ) -> TaskPage:
        """A page of the tasks that a filter means, newest submitted first, then by identifier.

        Read from the database, so that it goes through finished tasks, too; what is only in memory
        (`persist=False`) is not among them. Pages stay stable while tasks change: nothing comes
        twice, and nothing is left out that was there before the first page and still fits.

        Args:
            filter: `None` for all tasks.
            after: `after` of the page before; `None` for the first.
            limit: How many at most.

        Raises:
            InvalidDataError: If a condition of the filter, or the cursor, makes no sense.
        """
        self._check_usable()
        page = await self.task_repo.list_tasks(filter, after=after, limit=limit)
        await self._replica.reach(max((task.version for task in page), default=0))
        return page

    async def cancel_tasks(
        self, filter: TaskFilter | None = None, reason: str | None = None
    ) -> list[str]:
        """Cancel the live tasks that a filter means; others write in between.

        Args:
            filter: `None` for all tasks.
            reason: Becomes the `error` of the tasks, and is in the feed.

        Returns:
            Identifiers of the tasks it cancelled.

        Raises:
            InvalidDataError: If a condition of the filter, or the reason, makes no sense.
            BackendError: If the database could not be written; what is cancelled by then is. The
                call can be repeated.
        """
        self._check_usable()
        checked = check_filter(filter)
        if reason is not None:
            check_text("reason", reason)
        return await self._scheduler.cancel_all(checked, reason)

    async def claim_tasks(self, node_id: str, limit: int = 1) -> list[Task]:
        """Hand pending tasks to a node: it owns them until it finishes them, or is lost.

        The node gets due tasks whose required skills it has, by priority, time of submission and
        identifier, as many as it has places for; none unless it is ONLINE. They are SCHEDULED on
        it, and its `running_tasks` counts them until they are done: do not report that figure with
        its heartbeats as well. Which tasks are best is told from memory; each is handed out once,
        whoever else may claim at the same time.

        Args:
            limit: How many at most.

        Returns:
            The tasks, best first; an empty list if there is nothing to do.

        Raises:
            NodeNotFoundError: If there is no such node.
        """
        self._check_usable()
        node_id = check_key("node_id", node_id)
        claimed = await self._scheduler.claim(node_id, check_some("limit", limit))
        return list(map(Record.copy, claimed))

    async def start_task(self, task: Task) -> Task:
        """Its node begins to run a task that it has claimed.

        The owner of a task is told by `assigned_node` and `attempt`; nothing else of `task` counts,
        and it is left as it is. To say so twice changes nothing.

        Returns:
            The task as it is stored.

        Raises:
            TaskNotFoundError: If it was removed meanwhile.
            NotOwnerError: If its node does not hold this attempt any more.
        """
        return await self._advance(start_of(task))

    async def complete_task(self, task: Task, result: Any = None) -> Task:
        """Its node has completed a task; as `start_task`.

        Args:
            result: Any JSON value.

        Raises:
            TaskNotFoundError: If it was removed meanwhile.
            NotOwnerError: If its node does not hold this attempt any more.
            InvalidDataError: If the result cannot be stored.
        """
        return await self._advance(completion_of(task, result))

    async def fail_task(self, task: Task, error: str) -> Task:
        """Its node has failed to do a task; as `start_task`.

        The task is PENDING again, and due after the manager's `backoff`; after its last retry
        (`max_retries`) it is FAILED.

        Raises:
            TaskNotFoundError: If it was removed meanwhile.
            NotOwnerError: If its node does not hold this attempt any more.
        """
        return await self._advance(failure_of(task, error, self._backoff.draw()))

    async def cancel_task(self, task_id: str, reason: str | None = None) -> bool:
        """End a task that nobody needs any more; `False` if there is none.

        Args:
            reason: Becomes the `error` of the task, and is in the feed.

        Raises:
            InvalidTransitionError: If it is finished otherwise.
        """
        self._check_usable()
        return await is_known(self._scheduler.advance(cancellation_of(task_id, reason)))

    async def requeue_task(self, task_id: str) -> bool:
        """Have a task run again, as if it never had been; `False` if there is none.

        It is the only way out of a finished state. A task that is scheduled or running is taken
        from its node.

        Raises:
            DuplicateError: If another live task has its idempotency key by now.
        """
        self._check_usable()
        return await is_known(self._scheduler.advance(requeue_of(task_id)))

    async def recover(self, timeout_seconds: float = 120) -> Recovery:
        """Take tasks from nodes that are not alive, and those that run for longer than they may.

        Sets silent nodes OFFLINE. What is scheduled or running on a node that was silent for too
        long, that is OFFLINE or in ERROR, or that there is not (any more), is PENDING again, with
        one retry less, or FAILED with the error `node lost`. What runs for longer than its
        `timeout` is PENDING again, or has TIMEOUT. What would wait for its next try for longer than
        the backoff ever says, since a clock was turned back, is due at once. To be called every now
        and then, by any number of coordinators: each task has one outcome.

        Args:
            timeout_seconds: How long a node may be silent.

        Returns:
            All that this call has done.
        """
        self._check_usable()
        return await self._scheduler.recover(timeout_seconds)

    async def explain_task(self, task_id: str) -> Explanation:
        """Why a task waits, as data; `str` of it is a sentence.

        Raises:
            TaskNotFoundError: If there is none.
        """
        self._check_usable()
        return await self._scheduler.explain(check_key("task_id", task_id))

    async def _advance(self, operation: Advance) -> Task:
        self._check_usable()
        return (await self._scheduler.advance(operation)).record.copy()

    async def get_node(self, node_id: str) -> NodeInfo | None:
        """A node; `None` if there is none."""
        self._check_usable()
        record = await self._replica.find((NodeInfo, check_key("node_id", node_id)))
        return None if record is None else record.copy()

    async def get_all_nodes(self) -> list[NodeInfo]:
        """All nodes, newest registered first."""
        self._check_usable()
        return await _copies(self._replica.cache.all_nodes(), Record.copy)

    async def get_online_nodes(self) -> list[NodeInfo]:
        """Nodes that are ONLINE, newest registered first."""
        self._check_usable()
        return await _copies(self._replica.cache.online_nodes(), Record.copy)

    async def get_available_nodes(self) -> list[NodeInfo]:
        """ONLINE nodes with a free place, least loaded first."""
        self._check_usable()
        return await _copies(self._replica.cache.available_nodes(), Record.copy)

    async def find_nodes_by_skill(self, skill: str) -> list[NodeInfo]:
        """ONLINE nodes that have exactly this skill, newest registered first."""
        self._check_usable()
        return await _copies(
            self._replica.cache.nodes_by_skill(check_text("skill", skill)), Record.copy
        )

    async def add_node(self, node: NodeInfo, persist: bool = True) -> bool:
        """Add a node; `node` receives its version and its times in UTC.

        Args:
            persist: `False` keeps it in memory until the next synchronisation.

        Raises:
            DuplicateError: If there is a node with this identifier.
            InvalidDataError: If a field cannot be stored.
        """
        self._check_usable()
        record = admit(NodeInfo, node, self.db.clock)
        write_back(await self._add(record, persist), node)
        return True

    async def register_node(self, node: NodeInfo) -> bool:
        """Add a node, or have it come back as a new process; `node` receives what is stored.

        What its former process held is given back at once, however fresh its heartbeats are: it is
        tried again later, or FAILED after its last retry. The node's totals go on.

        Args:
            node: As it is now; its `version` does not matter.

        Raises:
            InvalidDataError: If a field cannot be stored.
        """
        self._check_usable()
        record = admit(NodeInfo, node, self.db.clock)
        write_back(await self._scheduler.register(record), node, JOINED)
        return True

    async def update_node(self, node: NodeInfo, persist: bool = True) -> bool:
        """Write a changed node back; `node` receives the new version and can be changed again.

        Usage figures are written as they are given; `last_heartbeat` never goes back, unless it was
        in the future.

        Args:
            persist: `False` keeps it in memory until the next synchronisation.

        Raises:
            NodeNotFoundError: If it was removed meanwhile.
            StaleVersionError: If it was changed meanwhile; read it again, or use `change_node`.
            InvalidDataError: If a field cannot be stored.
        """
        self._check_usable()
        record = self._encode_known(NodeInfo, node)
        write_back(await self._update(record, persist), node)
        return True

    async def change_node(self, node_id: str, fn: Callable[[NodeInfo], object]) -> NodeInfo | None:
        """Read a node, change it and write it, without losing what others write meanwhile.

        Args:
            fn: Is given a copy and changes it; called again if the node was changed meanwhile.

        Returns:
            The node as it is stored; `None` if there is none.

        Raises:
            InvalidDataError: If a field cannot be stored.
            ConflictError: If it was only in memory, and lost to newer data.
        """
        return await self._change(self.node_repo, check_key("node_id", node_id), fn)

    async def remove_node(self, node_id: str) -> bool:
        """Remove a node; `False` if there is none. Its tasks stay as they are."""
        self._check_usable()
        return await self._replica.remove((NodeInfo, check_key("node_id", node_id)))

    delete_node = remove_node

    async def update_node_status(self, node_id: str, status: NodeStatus) -> bool:
        """Change a node's status; ONLINE and BUSY count as a sign of life. `False` if unknown."""
        self._check_usable()
        command = SetNodeStatus(check_key("node_id", node_id), node_status("status", status))
        known: bool = await self._replica.submit(command)
        return known

    async def update_heartbeat(
        self,
        node_id: str,
        cpu_usage: float | None = None,
        memory_usage: float | None = None,
        running_tasks: int | None = None,
        disk_usage: float | None = None,
    ) -> bool:
        """Note a sign of life now, and what the node reports; `False` if there is no such node.

        Seen in memory at once, on the disk within a second. Brings an OFFLINE node back ONLINE,
        which is committed when this returns.

        Args:
            cpu_usage, memory_usage, disk_usage: Percent, 0 to 100; `None` leaves it alone.
            running_tasks: `None` leaves it alone.

        Raises:
            InvalidDataError: If a figure is out of range.
        """
        self._check_usable()
        usage: dict[str, float | int] = {}
        if cpu_usage is not None:
            usage["cpu_usage"] = check_percentage("cpu_usage", cpu_usage)
        if memory_usage is not None:
            usage["memory_usage"] = check_percentage("memory_usage", memory_usage)
        if disk_usage is not None:
            usage["disk_usage"] = check_percentage("disk_usage", disk_usage)
        if running_tasks is not None:
            usage["running_tasks"] = check_count("running_tasks", running_tasks)
        return await self._replica.beat(check_key("node_id", node_id), usage)

    async def check_stale_nodes(self, timeout_seconds: float = 120) -> list[str]:
        """Set the live nodes OFFLINE that were silent for longer; a heartbeat meanwhile wins.

        Args:
            timeout_seconds: How long a node may be silent; one that never sent a heartbeat
                counts from its registration. A sign of life that is as far in the future counts
                for nothing: a clock was turned back.

        Returns:
            Identifiers of the nodes it set OFFLINE.
        """
        self._check_usable()
        return await self._scheduler.set_silent_offline(timeout_seconds)

    def watch(self, since: int | None = None) -> AsyncIterator[Change]:
        """Every change that is committed after a revision, by this and by other processes.

        They come in order, each once, and have been taken over into memory by then. It reads the
        feed as it goes, so a slow watcher costs nobody anything; and it goes on where it was left
        if it is given the `revision` of the last change that was seen, also after a restart. It
        ends when the manager is shut down. Changes of tasks that `cleanup_old_tasks` has removed
        are gone with them, but for the last one.

        Args:
            since: A revision; `None` for the newest one in memory, so that `get_state` and what is
                watched after it make the whole.

        Raises:
            CompactedError: If the feed does not reach back that far any more; it says how far.
            InvalidDataError: If there was no such revision yet.
        """
        self._check_usable()
        return self._watch(self.version if since is None else check_count("since", since))

    async def _watch(self, since: int) -> AsyncIterator[Change]:
        while self.is_initialized:
            self._check_usable()
            with self._replica.watchers.next_change() as woken:
                try:
                    changes, until = await self._replica.changes(since)
                except UnavailableError:
                    if self.is_initialized:
                        raise
                    return  # it was shut down meanwhile
                for change in changes:
                    yield change
                if until == since:  # there is no more for now
                    await asyncio.wait([woken], timeout=WATCH_SECONDS)
                since = until

    async def history(self, task_id: str) -> list[Change]:
        """The changes of a task since it was added, oldest first, as far as the feed reaches.

        Of a task that was removed it gives what is left, and searches the whole feed for it.
        """
        self._check_usable()
        return await self.db.read(partial(read_history, id=check_key("task_id", task_id)))

    async def wait_for_task(self, task_id: str, timeout: float | None = None) -> Task:
        """The task, as soon as it is finished.

        Args:
            timeout: Seconds to wait at most; `None` for no limit.

        Raises:
            TaskNotFoundError: If there is none, or it was removed meanwhile.
            DeadlineError: If it is not finished in time.
            UnavailableError: If the manager is shut down meanwhile.
        """
        limit = None if timeout is None else check_number("timeout", timeout)
        task_id = check_key("task_id", task_id)
        try:
            async with asyncio.timeout(limit):
                while True:
                    self._check_usable()
                    with self._replica.watchers.next_change_of(task_id) as woken:
                        task = await self.get_task(task_id)
                        if task is None:
                            raise TaskNotFoundError(task_id)
                        if task.status in FINISHED:
                            return task
                        await woken
        except TimeoutError as error:
            raise DeadlineError(
                f"task {task_id!r} is not finished after {timeout:g} s: wait again, or cancel it"
            ) from error

    async def compact_changes(self, days: float = 30) -> int:
        """Remove what is older from the feed of changes; tasks and nodes stay as they are.

        `watch` and `history` do not reach further back then. The newest change always stays. A
        change by a clock that was ahead is as old as those around it. Works in batches, and can be
        called again after an error.

        Args:
            days: Age in days, from 0.

        Returns:
            How many changes were removed.
        """
        self._check_usable()
        return await compact_feed(self.db, days)

    async def sync_to_database(self) -> bool:
        """Write what is only in memory; `True`.

        Raises:
            UnsavedConflictError: If entries lost to newer data in the database. They were
                dropped; everything else is written.
            BackendError: If the database could not be written; nothing was dropped.
        """
        self._check_usable()
        await self._replica.sync()
        return True

    async def refresh_from_database(self) -> bool:
        """Take over what other processes have committed; `True`.

        Costs what has changed, not what is cached.

        Raises:
            InvalidDataError: If somebody wrote by hand what cannot be read; it took over the rest.
        """
        self._check_usable()
        await self._replica.refresh()
        return True

    async def _sync_every(self, seconds: float) -> None:
        while True:
            await asyncio.sleep(seconds)
            for work in (self._replica.sync, self._replica.refresh):
                try:
                    await work()
                except UnsavedConflictError:
                    continue  # each of them is in the log
                except Exception:  # the loop must outlive whatever a round meets
                    logger.exception("a synchronisation failed; the next is in %g s", seconds)

    async def _change(
        self, repository: Repository[Entity], id: str, fn: Callable[[Entity], object]
    ) -> Entity | None:
        self._check_usable()
        if not callable(fn):
            raise InvalidDataError("fn", f"must be a function, not {type(fn).__name__}")

        def change(known: Record[Entity]) -> Record[Entity]:
            copy = known.copy()
            result = fn(copy)
            if inspect.isawaitable(result):
                if inspect.iscoroutine(result):
                    result.close()
                raise InvalidDataError("fn", "must be a plain function, not a coroutine function")
            return admit(repository.kind, copy, self.db.clock, known)

        changed = await self._replica.change((repository.kind, id), change)
        return None if changed is None else changed.copy()

    def _add(self, record: Record[Entity], persist: bool) -> Awaitable[Record[Entity]]:
        if persist:
            return self._replica.submit(Create(record.kind, record.id, record))
        return self._replica.write_behind.add(record)

    def _update(self, record: Record[Entity], persist: bool) -> Awaitable[Record[Entity]]:
        if persist:
            return self._replica.update(record)
        return self._replica.write_behind.update(record)

    def _encode_known(self, kind: type[Entity], item: Entity) -> Record[Entity]:
        """Check what is given back beside what is in memory of it."""
        id = getattr(item, KEY[kind], None)
        known = self._replica.cache.find((kind, id)) if type(id) is str else None
        return admit(kind, item, self.db.clock, known)

    def _check_usable(self) -> None:
        # Asking for the running loop asks the system for the process, which costs as much as all
        # the rest of a look-up; this asks the same: of one thread, one loop runs at a time.
        if self._thread != get_ident() or not self._is_running():
            if self._is_inherited:
                raise UnavailableError(
                    "the StateManager was made before fork: make a new one in the child"
                )
            if self._thread is not None:
                raise UnavailableError("a StateManager belongs to one event loop: make another")
            if self._ending is not None:
                raise UnavailableError("the StateManager was shut down: make a new one")
            raise UnavailableError("the StateManager is not initialized: call initialize() first")


def _refuse_elsewhere(loop: asyncio.AbstractEventLoop | None) -> None:
    """Refuse what can only be done on an event loop that is there, but is not the running one."""
    if loop is not None and loop is not asyncio.get_running_loop() and not loop.is_closed():
        raise UnavailableError("a StateManager belongs to one event loop: shut it down there")


async def _copies(items: Sequence[T], copy: Callable[[T], Entity]) -> list[Entity]:
    """Copies for the caller; of a long list in slices, between which others run."""
    copies: list[Entity] = []
    for start in range(0, len(items), _COPIES):
        if start:
            await asyncio.sleep(0)
        copies.extend(map(copy, items[start : start + _COPIES]))
    return copies
