"""`StateManager`: the cluster's state, answered from memory and kept in a database."""

from __future__ import annotations

import asyncio
import inspect
import logging
import math
from collections.abc import Callable, Sequence
from functools import partial
from types import TracebackType
from typing import Any, Self

from sqlalchemy.ext.asyncio import AsyncSession

from openclaw_store.cache import Cache, Unsaved
from openclaw_store.changes import (
    ITEM,
    KEY,
    AfterBeat,
    Beat,
    Create,
    Event,
    Operation,
    Remove,
    SetNodeStatus,
    Update,
    apply,
    apply_groups,
)
from openclaw_store.database import Database
from openclaw_store.errors import (
    ConflictError,
    DuplicateError,
    InvalidDataError,
    NodeNotFoundError,
    NotFoundError,
    StaleVersionError,
    StoreError,
    TaskNotFoundError,
    UnavailableError,
    UnsavedConflictError,
)
from openclaw_store.feed import PAGE, News, Place, Start, read_live, read_news, read_start
from openclaw_store.models import ClusterState, NodeInfo, NodeStatus, Task, TaskStatus
from openclaw_store.records import (
    Item,
    Record,
    check_count,
    check_key,
    check_percentage,
    write_back,
)
from openclaw_store.repositories import (
    NodeRepository,
    TaskRepository,
    check_limit,
    check_seconds,
    node_status,
)
from openclaw_store.schema import FIELDS

logger = logging.getLogger(__name__)

HEARTBEAT_SECONDS = 0.5
"""How long a heartbeat may wait in memory for others to share its flush."""

RELOAD_AFTER = 20_000
"""So many changes behind, the cache is loaded again rather than brought up to date."""

_COPIES = 200  # copied at a stretch, before other coroutines run


class StateManager:
    """Cluster state: answered from memory, kept in a database.

    **Durability.** When a write returns, it is committed. Two exceptions: heartbeats are flushed
    within a second, and entries added with `persist=False` by the next `sync_to_database`.
    **Freshness.** A read sees this process's writes at once, those of others after the next
    `refresh_from_database`: within `auto_sync_interval` seconds. What was seen once never goes
    back.
    **Isolation.** What is handed out is the caller's own copy. A write from an outdated copy
    raises `StaleVersionError`; `change_task` and `change_node` read, change and write safely.
    **Sharing.** One instance serves any number of coroutines of one event loop. Any number of
    instances, in any number of processes, may share a database.

    Args:
        database: The database; `shutdown` closes it.
        auto_sync_interval: Seconds between synchronisations; `None` for none but manual ones.
        finished_cache_size: How many finished tasks are kept in memory; the others are read from
            the database when they are asked for.

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
    ) -> None:
        if auto_sync_interval is not None and (
            isinstance(auto_sync_interval, bool)
            or not isinstance(auto_sync_interval, int | float)
            or not 0 < auto_sync_interval < math.inf
        ):
            raise InvalidDataError(
                "auto_sync_interval",
                f"must be a positive number of seconds, or None, not {auto_sync_interval!r}",
            )
        self.db = database
        self.task_repo = TaskRepository(database)
        self.node_repo = NodeRepository(database)
        self._interval = auto_sync_interval
        self._finished_limit = check_count("finished_cache_size", finished_cache_size)
        self._cache = self._new_cache(Start(0, 0, None, {}))
        self._loop: asyncio.AbstractEventLoop | None = None  # set while it may be used
        self._unlisten: Callable[[], None] = lambda: None
        self._loading: list[Sequence[Event]] | None = None  # what was committed meanwhile
        self._refreshing = asyncio.Lock()
        self._tasks: set[asyncio.Task[Any]] = set()
        self._beats: dict[str, Beat] = {}
        self._flush_timer: asyncio.TimerHandle | None = None
        self._unsaved_version = 0
        self._ending: asyncio.Future[None] | None = None

    def __repr__(self) -> str:
        state = f"version {self.version}" if self.is_initialized else "not initialized"
        return f"<StateManager of {self.db!r}, {state}>"

    # Life.

    async def initialize(self) -> bool:
        """Open the database, load the state and start the synchronisation; `True`.

        Raises:
            SchemaMismatchError: If the database is newer than the library.
            UnavailableError: If it cannot be opened.
        """
        if self._loop is not None:
            return True
        if self._ending is not None:
            raise UnavailableError("the StateManager was shut down: make a new one")
        await self.db.initialize()
        self._unlisten = self.db.listen(self._committed)
        try:
            await self._load()
        except BaseException:
            self._unlisten()
            raise
        self._loop = asyncio.get_running_loop()
        if self._interval is not None:
            self._spawn(self._sync_every(self._interval))
        return True

    async def shutdown(self) -> None:
        """Synchronise for the last time and close the database; may be called twice.

        Raises:
            StoreError: If something could not be written; everything is closed all the same.
        """
        if self._ending is None:
            self._ending = asyncio.ensure_future(self._shutdown())
        await asyncio.shield(self._ending)

    async def _shutdown(self) -> None:
        try:
            for task in self._tasks:
                task.cancel()
            await asyncio.gather(*self._tasks, return_exceptions=True)
            if self._flush_timer is not None:
                self._flush_timer.cancel()
            if self._loop is not None:
                await self._sync()
        finally:
            self._loop = None
            self._unlisten()
            await self.db.close()

    async def __aenter__(self) -> Self:
        await self.initialize()
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
        return self._loop is not None

    @property
    def version(self) -> int:
        """Revision of the newest change in memory; survives a restart."""
        return self._cache.version

    # The whole state.

    async def get_state(self) -> ClusterState:
        """The cluster at this moment, in constant time."""
        self._check_usable()
        return self._cache.state()

    async def get_task_stats(self) -> dict[str, int]:
        """How many tasks there are in the database: `total`, and one key for each status."""
        self._check_usable()
        counts = self._cache.task_counts
        return {
            "total": counts.total(),
            **{status.value: counts[status.value] for status in TaskStatus},
        }

    async def get_node_stats(self) -> dict[str, int]:
        """How many nodes there are: `total`, `online`, `offline`, and `busy`.

        Busy are those with the status BUSY, and those that are ONLINE and full.
        """
        self._check_usable()
        return self._cache.node_stats()

    # Tasks.

    async def get_task(self, task_id: str) -> Task | None:
        """A task, finished ones too; `None` if there is none."""
        self._check_usable()
        record = self._cache.task(task_id) if type(task_id) is str else None
        if record is None:
            record = await self._find((Task, check_key("task_id", task_id)))
        return None if record is None else record.copy()

    async def get_pending_tasks(self, limit: int | None = 50) -> list[Task]:
        """Pending and scheduled tasks by priority, then time of submission, then identifier."""
        self._check_usable()
        return await _copies(self._cache.pending(check_limit(limit)))

    async def add_task(self, task: Task, persist: bool = True) -> bool:
        """Add a task; `task` receives its version and its times in UTC.

        Args:
            persist: `False` keeps it in memory until the next synchronisation.

        Raises:
            DuplicateError: If there is a task with this identifier.
            InvalidDataError: If a field cannot be stored.
        """
        return await self._add(self.task_repo.encode(task), task, persist)

    async def update_task(self, task: Task, persist: bool = True) -> bool:
        """Write a changed task back; `task` receives the new version and can be changed again.

        Args:
            persist: `False` keeps it in memory until the next synchronisation.

        Raises:
            TaskNotFoundError: If it was removed meanwhile.
            StaleVersionError: If it was changed meanwhile; read it again, or use `change_task`.
            InvalidDataError: If a field cannot be stored.
        """
        return await self._update(self.task_repo.encode(task), task, persist)

    async def change_task(self, task_id: str, fn: Callable[[Task], object]) -> Task | None:
        """Read a task, change it and write it, without losing what others write meanwhile.

        Args:
            fn: Is given a copy and changes it; called again if the task was changed meanwhile.

        Returns:
            The task as it is stored; `None` if there is none.

        Raises:
            InvalidDataError: If a field cannot be stored.
        """
        return await self._change(self.task_repo, check_key("task_id", task_id), fn)

    async def remove_task(self, task_id: str) -> bool:
        """Remove a task; `False` if there is none."""
        return await self._remove((Task, check_key("task_id", task_id)))

    delete_task = remove_task

    # Nodes.

    async def get_node(self, node_id: str) -> NodeInfo | None:
        """A node; `None` if there is none."""
        self._check_usable()
        record = await self._find((NodeInfo, check_key("node_id", node_id)))
        return None if record is None else record.copy()

    async def get_all_nodes(self) -> list[NodeInfo]:
        """All nodes, newest registered first."""
        self._check_usable()
        return await _copies(self._cache.all_nodes())

    async def get_online_nodes(self) -> list[NodeInfo]:
        """Nodes that are ONLINE, newest registered first."""
        self._check_usable()
        return await _copies(self._cache.online_nodes())

    async def get_available_nodes(self) -> list[NodeInfo]:
        """ONLINE nodes with a free place, least loaded first."""
        self._check_usable()
        return await _copies(self._cache.available_nodes())

    async def find_nodes_by_skill(self, skill: str) -> list[NodeInfo]:
        """ONLINE nodes that have exactly this skill, newest registered first."""
        self._check_usable()
        return await _copies(self._cache.nodes_by_skill(check_key("skill", skill)))

    async def add_node(self, node: NodeInfo, persist: bool = True) -> bool:
        """Add a node; `node` receives its version and its times in UTC.

        Args:
            persist: `False` keeps it in memory until the next synchronisation.

        Raises:
            DuplicateError: If there is a node with this identifier.
            InvalidDataError: If a field cannot be stored.
        """
        return await self._add(self.node_repo.encode(node), node, persist)

    async def update_node(self, node: NodeInfo, persist: bool = True) -> bool:
        """Write a changed node back; `node` receives the new version and can be changed again.

        Usage figures are written as they are given; `last_heartbeat` never goes back.

        Args:
            persist: `False` keeps it in memory until the next synchronisation.

        Raises:
            NodeNotFoundError: If it was removed meanwhile.
            StaleVersionError: If it was changed meanwhile; read it again, or use `change_node`.
            InvalidDataError: If a field cannot be stored.
        """
        return await self._update(self.node_repo.encode(node), node, persist)

    async def change_node(self, node_id: str, fn: Callable[[NodeInfo], object]) -> NodeInfo | None:
        """Read a node, change it and write it, without losing what others write meanwhile.

        Args:
            fn: Is given a copy and changes it; called again if the node was changed meanwhile.

        Returns:
            The node as it is stored; `None` if there is none.

        Raises:
            InvalidDataError: If a field cannot be stored.
        """
        return await self._change(self.node_repo, check_key("node_id", node_id), fn)

    async def remove_node(self, node_id: str) -> bool:
        """Remove a node; `False` if there is none. Its tasks stay as they are."""
        removed = await self._remove((NodeInfo, check_key("node_id", node_id)))
        self._beats.pop(node_id, None)
        return removed

    delete_node = remove_node

    async def update_node_status(self, node_id: str, status: NodeStatus) -> bool:
        """Change a node's status; ONLINE and BUSY count as a sign of life. `False` if unknown."""
        self._check_usable()
        place = (NodeInfo, check_key("node_id", node_id))
        operation = SetNodeStatus(node_id, node_status("status", status))
        await self._settle(place)
        known: bool = await self._submit(operation)
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
        for name, value, check in (
            ("cpu_usage", cpu_usage, check_percentage),
            ("memory_usage", memory_usage, check_percentage),
            ("disk_usage", disk_usage, check_percentage),
            ("running_tasks", running_tasks, check_count),
        ):
            if value is not None:
                usage[name] = check(name, value)
        place = (NodeInfo, check_key("node_id", node_id))
        if self._cache.find(place) is None:
            await self.refresh_from_database()
        record = self._cache.find(place)
        if record is None:
            return False
        moment = self.db.clock()
        if place in self._cache.unsaved:
            self._cache.touch(node_id, {"last_heartbeat": moment, **usage})
            return True
        if record["status"] is NodeStatus.OFFLINE:
            known: bool = await self._submit(Beat(node_id, moment, usage))
            return known
        last = record["last_heartbeat"]
        if last is None or moment >= last:
            waiting = self._beats.get(node_id)
            if waiting is not None:
                usage = {**waiting.usage, **usage}
            self._beats[node_id] = Beat(node_id, moment, usage)
            self._cache.touch(node_id, {"last_heartbeat": moment, **usage})
            if self._flush_timer is None:
                loop = asyncio.get_running_loop()
                self._flush_timer = loop.call_later(HEARTBEAT_SECONDS, self._flush_soon)
        return True

    async def check_stale_nodes(self, timeout_seconds: float = 120) -> list[str]:
        """Set the live nodes OFFLINE that were silent for longer; a heartbeat meanwhile wins.

        Args:
            timeout_seconds: How long a node may be silent; one that never sent a heartbeat
                counts from its registration.

        Returns:
            Identifiers of the nodes it set OFFLINE.
        """
        self._check_usable()
        cutoff = self.db.clock() - check_seconds("timeout_seconds", timeout_seconds)
        await self._flush_beats()
        reason = f"silent for more than {timeout_seconds:g} s"
        operations = [
            SetNodeStatus(node.node_id, NodeStatus.OFFLINE, cutoff, reason)
            for node in await self.node_repo.find_stale_nodes(timeout_seconds)
        ]
        if not operations:
            return []
        outcomes = await self.db.write(apply_groups, operations)
        return [operation.id for operation, done in zip(operations, outcomes, strict=True) if done]

    # Synchronisation.

    async def sync_to_database(self) -> bool:
        """Write what is only in memory; `True`.

        Raises:
            UnsavedConflictError: If entries lost to newer data in the database. They were
                dropped; everything else is written.
            BackendError: If the database could not be written; nothing was dropped.
        """
        self._check_usable()
        return await self._sync()

    async def refresh_from_database(self) -> bool:
        """Take over what other processes have committed; `True`.

        Costs what has changed, not what is cached.
        """
        self._check_usable()
        async with self._refreshing:
            news: News | None = None
            while news is None or news.revision < news.read_at:
                cache = self._cache
                is_whole = news is None or news.is_whole
                news = await self.db.read(
                    partial(read_news, since=cache.complete, beat=cache.beat, is_whole=is_whole)
                )
                if news.read_at - cache.complete > RELOAD_AFTER:
                    await self._load()
                    return True
                cache.catch_up(news)
        return True

    async def _sync_every(self, seconds: float) -> None:
        while True:
            await asyncio.sleep(seconds)
            for work in (self._sync, self.refresh_from_database):
                try:
                    await work()
                except UnsavedConflictError:
                    continue  # each of them is in the log
                except Exception:  # the loop must outlive whatever a round meets
                    logger.exception("a synchronisation failed; the next is in %g s", seconds)

    async def _sync(self) -> bool:
        await self._flush_beats()
        conflicts: list[StoreError] = []
        for start in range(0, len(places := list(self._cache.unsaved)), PAGE):
            outcomes = await asyncio.gather(
                *[self._settle(place) for place in places[start : start + PAGE]],
                return_exceptions=True,
            )
            for outcome in outcomes:
                if isinstance(outcome, ConflictError | NotFoundError):
                    conflicts.append(outcome)
                elif isinstance(outcome, BaseException):
                    raise outcome
        if conflicts:
            raise UnsavedConflictError(conflicts)
        return True

    async def _load(self) -> None:
        """Fill a new cache and put it in place of the old one."""
        self._loading = []
        try:

            async def read(session: AsyncSession) -> Cache:
                cache = self._new_cache(await read_start(session))
                async for records in read_live(session):
                    for record in records:
                        cache.add(record)
                return cache

            cache = await self.db.read(read)
            for events in self._loading:
                cache.apply(events)
        finally:
            self._loading = None
        cache.keep_unsaved(self._cache)
        for beat in self._beats.values():
            cache.touch(beat.id, {"last_heartbeat": beat.at, **beat.usage})
        self._cache = cache

    def _committed(self, events: Sequence[Event]) -> None:
        """Is told what this process has committed."""
        if self._loading is not None:
            self._loading.append(events)
        self._cache.apply(events)

    def _new_cache(self, start: Start) -> Cache:
        return Cache(start, self._finished_limit)

    # Heartbeats.

    def _flush_soon(self) -> None:
        self._flush_timer = None
        self._spawn(self._flush_logged())

    async def _flush_logged(self) -> None:
        try:
            await self._flush_beats()
        except Exception:  # nobody waits for it; the heartbeats wait for the next flush
            logger.exception("heartbeats could not be written; they are tried again")

    async def _flush_beats(self) -> None:
        beats, self._beats = self._beats, {}
        if not beats:
            return
        try:
            await self.db.write(apply_groups, list(beats.values()))
        except BaseException:
            self._beats = {**beats, **self._beats}
            raise

    # Writing.

    async def _submit(self, operation: Operation) -> Any:
        """Commit an operation, behind the heartbeat that its node may have waiting."""
        beat = self._beats.pop(operation.id, None) if operation.kind is NodeInfo else None
        if beat is None:
            return await self.db.write(apply, operation)
        try:
            return await self.db.write(apply, AfterBeat(beat, operation))
        except BaseException:
            self._beats.setdefault(beat.id, beat)  # writing it twice does no harm
            raise

    async def _find(self, place: Place) -> Record[Any] | None:
        """An entry from memory, else from the database."""
        record = self._cache.find(place)
        if record is not None:
            return record
        cache, version = self._cache, self._cache.version
        repository: Any = self.task_repo if place[0] is Task else self.node_repo
        found: Record[Any] | None = await repository.get_record(place[1])
        if found is not None and place[0] is Task and self._cache is cache:
            if cache.version == version:
                cache.remember(found)
        return self._cache.find(place) or found

    async def _add(self, record: Record[Any], item: Task | NodeInfo, persist: bool) -> bool:
        self._check_usable()
        place = (record.kind, record[KEY[record.kind]])
        if persist and place not in self._cache.unsaved:
            stored = await self._submit(Create(*place, record))
        elif await self._find(place) is not None:
            raise DuplicateError(ITEM[place[0]], place[1])
        else:
            stored = record.evolve(version=self._next_unsaved_version())
            self._cache.hold(stored, None)
        write_back(stored, item)
        return True

    async def _update(self, record: Record[Any], item: Task | NodeInfo, persist: bool) -> bool:
        self._check_usable()
        place = (record.kind, record[KEY[record.kind]])
        if persist:
            known = self._cache.find(place)
            if place in self._cache.unsaved:
                self._require_version(place, known, record.version)
                await self._settle(place)
            record = record.evolve(version=self._cache.settled_version(place, record.version))
            stored = await self._submit(self._update_operation(place, record))
        else:
            known = await self._find(place)
            version = self._cache.settled_version(place, record.version)
            self._require_version(place, known, version)
            entry = self._cache.unsaved.get(place)
            stored = record.evolve(version=self._next_unsaved_version())
            self._cache.hold(stored, known if entry is None else entry.base)
        write_back(stored, item)
        return True

    def _update_operation(self, place: Place, record: Record[Any]) -> Update[Any]:
        """Writes what differs from the copy in memory; all fields if that has another version."""
        known = self._cache.find(place)
        if known is not None and known.version == record.version:
            names = known.differences(record)
        else:
            names = tuple(name for name in FIELDS[place[0]] if name != KEY[place[0]])
        return Update(*place, record, names)

    def _require_version(self, place: Place, known: Record[Any] | None, version: int) -> None:
        kind, id = place
        if known is None:
            raise (TaskNotFoundError if kind is Task else NodeNotFoundError)(id)
        if known.version != version:
            raise StaleVersionError(ITEM[kind], id, version, known.version)

    async def _change(
        self,
        repository: TaskRepository | NodeRepository,
        id: str,
        fn: Callable[[Any], object],
    ) -> Any:
        self._check_usable()
        kind: Any = Task if repository is self.task_repo else NodeInfo
        place = (kind, id)
        while True:
            await self._settle(place)
            known = await self._find(place)
            if known is None:
                return None
            copy = known.copy()
            if inspect.isawaitable(result := fn(copy)):
                if inspect.iscoroutine(result):
                    result.close()
                raise InvalidDataError("fn", "must be a plain function, not a coroutine function")
            record: Record[Any] = repository.encode(copy)
            if record[KEY[kind]] != id:
                raise InvalidDataError(KEY[kind], f"must not be changed, from {id!r}")
            names = known.differences(record)
            if not names:
                return known.copy()
            try:
                changed = record.evolve(version=known.version)
                return (await self._submit(Update(kind, id, changed, names))).copy()
            except NotFoundError:
                return None
            except StaleVersionError:
                if self._cache.find(place) is known:  # another process was faster
                    await self.refresh_from_database()

    async def _remove(self, place: Place) -> bool:
        self._check_usable()
        removed = await self._submit(Remove(*place))
        return self._cache.discard(place) or removed

    async def _settle(self, place: Place) -> None:
        """Write an entry that is only in memory.

        Raises:
            ConflictError, NotFoundError: If it lost to newer data; it was dropped.
        """
        entry = self._cache.unsaved.get(place)
        if entry is None:
            return
        try:
            stored = await self._submit(_unsaved_operation(place, entry))
        except (ConflictError, NotFoundError) as error:
            self._cache.release(place, entry, None)
            logger.warning("an unsaved %s was dropped: %s", ITEM[place[0]], error)
            raise
        self._cache.release(place, entry, stored)

    def _next_unsaved_version(self) -> int:
        self._unsaved_version -= 1
        return self._unsaved_version

    def _spawn(self, work: Any) -> None:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    def _check_usable(self) -> None:
        if self._loop is not asyncio.get_running_loop():
            if self._loop is not None:
                raise UnavailableError("a StateManager belongs to one event loop: make another")
            if self._ending is not None:
                raise UnavailableError("the StateManager was shut down: make a new one")
            raise UnavailableError("the StateManager is not initialized: call initialize() first")


def _unsaved_operation(place: Place, entry: Unsaved) -> Operation:
    if entry.base is None:
        return Create(*place, entry.record)
    record = entry.record.evolve(version=entry.base.version)
    return Update(*place, record, entry.base.differences(record))


async def _copies(records: Sequence[Record[Item]]) -> list[Item]:
    """Copies for the caller; of a long list in slices, between which others run."""
    items: list[Item] = []
    for start in range(0, len(records), _COPIES):
        if start:
            await asyncio.sleep(0)
        items.extend([record.copy() for record in records[start : start + _COPIES]])
    return items
