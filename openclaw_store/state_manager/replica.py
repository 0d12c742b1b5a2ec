"""The replica of the database in memory: commit first, then update the cache."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Coroutine, Mapping, Sequence
from datetime import datetime, timedelta
from functools import partial
from operator import itemgetter, methodcaller
from typing import Any

from openclaw_store.backends import Notifier
from openclaw_store.database import Database, Slices
from openclaw_store.domain import (
    ENTITY_NAMES,
    Change,
    Entity,
    EntityKey,
    NodeInfo,
    NodeStatus,
    Raw,
    Record,
    Task,
    key_of,
)
from openclaw_store.errors import (
    DuplicateError,
    NotFoundError,
    StaleVersionError,
    UnavailableError,
    UnsavedConflictError,
    logger_of,
)
from openclaw_store.repositories import (
    CONTENT,
    Command,
    Create,
    Heartbeat,
    HeartbeatWritten,
    Inserted,
    NodeRepository,
    Remove,
    Repository,
    TaskRepository,
    Update,
    apply,
    change_of,
    changes_of,
    insert_tasks,
    read_changes,
)
from openclaw_store.state_manager.cache import Cache, Committed
from openclaw_store.state_manager.change_feed import (
    ENTITY_ID,
    ENTITY_NAME,
    KIND,
    TO_STATUS,
    ChangeBatch,
    InitialState,
    entry_reader,
    read_change_batch,
)
from openclaw_store.state_manager.heartbeat_writer import HeartbeatWriter
from openclaw_store.state_manager.load import load_cache
from openclaw_store.state_manager.recent_changes import RecentChanges
from openclaw_store.state_manager.watchers import Watchers
from openclaw_store.state_manager.write_behind import WriteBehind

logger = logger_of("mirror")

WRITTEN_WITHIN = timedelta(seconds=1)
"""Longest time until a heartbeat is written: a stored one that is newer by more is wrong."""

FOLLOWING_PAUSE, LONGEST_PAUSE_SECONDS = 4.0, 0.05
"""Pause after a refresh by notification: a multiple of its duration, and the maximum."""

RELOAD_AFTER = 20_000
"""A cache is loaded again if it lacks more changes than this, and more than its live tasks.

Applying a change takes a little longer than loading a task.
"""

_step = itemgetter(ENTITY_NAME, ENTITY_ID, TO_STATUS, KIND)
"""Item, identifier, new status and kind of a change in a batch."""


class Replica:
    """The cache of one `StateManager`, and its exchange with the database."""

    slices: Slices  # the long computations of its event loop, once it is started

    def __init__(
        self, database: Database, tasks: TaskRepository, nodes: NodeRepository, finished_limit: int
    ) -> None:
        self.database = database
        self.tasks = tasks
        self.nodes = nodes
        self._finished_limit = finished_limit
        sql = database.statements
        read_entry = entry_reader(sql.dialect.name)
        nothing = InitialState(0, 0, None, {}, sql.decode, read_entry, sql.encode)
        self.cache = Cache(nothing, finished_limit)
        """The state in memory; another object after each load."""
        self.last_sync_at: datetime | None = None
        """End of the last complete flush."""
        self.last_refresh_at: datetime | None = None
        """End of the last complete refresh."""
        self.watchers = Watchers()
        """Waiters for changes and for work; all wake when the replica stops."""
        self.recent_changes = RecentChanges()
        self._unlisten: Callable[[], None] = lambda: None
        # The events committed during a load; `None` at other times.
        self._loading: list[Sequence[Committed]] | None = None
        self._refreshing = asyncio.Lock()
        self._loop: asyncio.AbstractEventLoop | None = None  # set by `follow`
        self._notifier: Notifier | None = None
        self._outdated = asyncio.Event()  # another process has committed a change
        self._follower: asyncio.Task[None] | None = None
        self._own_heartbeat_sequence = 0  # of this process's last flush, which needs no refresh
        self.heartbeat_writer = HeartbeatWriter(self)
        self.write_behind = WriteBehind(self)
        """The unsaved entries."""

    @property
    def version(self) -> int:
        """The newest known revision."""
        return self.cache.applied.version

    async def start(self) -> None:
        """Listen to the commits of this process, and load the state."""
        # Listen first: otherwise a commit during the load would be lost.
        self._unlisten = self.database.listen(self._apply_committed)
        try:
            async with self._refreshing:
                await self._load()
        except BaseException:
            self._unlisten()
            raise

    def follow(self) -> None:
        """Refresh at each notification of a commit by another process."""
        self._loop = asyncio.get_running_loop()
        self._follower = self._loop.create_task(self._follow())
        self._notifier = self.database.follow(self._notice_commit, self._known_revision)

    def _known_revision(self) -> int:
        """Return the revision up to which all changes are known."""
        return self.cache.applied.contiguous

    async def stop(self) -> None:
        """Flush for the last time, and stop; call again if this was interrupted."""
        if self._notifier is not None:
            await self._notifier.stop()
        if self._follower is not None:
            self._follower.cancel()
            await asyncio.wait([self._follower])
        try:
            await self.heartbeat_writer.finish()
            await self.sync()
        finally:
            self.heartbeat_writer.stop()
            # Only now: the last flush, too, updates the cache by its commit.
            self._unlisten()
            self.watchers.wake_all()

    async def abandon(self) -> None:
        """Stop after the event loop of the replica was closed.

        Raises:
            UnavailableError: If unsaved entries or heartbeats are lost.
        """
        if self._notifier is not None:
            await self._notifier.stop()
        self._unlisten()
        lost = len(self.cache.unsaved) + len(self.cache.heartbeats.waiting)
        if lost:
            raise UnavailableError(
                f"the event loop was closed first, and {lost} unsaved entries and heartbeats are "
                "lost: shut the StateManager down before"
            )

    async def find(self, key: EntityKey) -> Record[Any] | None:
        """Return an entity from the cache, otherwise from the database."""
        record = self.cache.find(key)
        if record is not None:
            return record
        cache, version = self.cache, self.cache.applied.version
        found = await self.read(key)
        # Newer than the cache: without the refresh, a later read of it could show older data.
        if found is not None and found.version > self.cache.applied.contiguous:
            await self.refresh()
            return self.cache.find(key) or await self.read(key)
        # A change applied during the read may be newer than the record.
        is_current = self.cache is cache and cache.applied.version == version
        if found is not None and key[0] is Task and is_current:
            cache.remember(found)
        return self.cache.find(key) or found

    async def read(self, key: EntityKey) -> Record[Any] | None:
        """Return an entity from the database."""
        repository: Repository[Any] = self.tasks if key[0] is Task else self.nodes
        return await repository.get_record(key[1])

    async def view(self, *, with_tasks: bool = True) -> Cache:
        """Return the cache for a call that reads several entities.

        Args:
            with_tasks: The call reads tasks.
        """
        return self.cache

    def known_task(self, id: str) -> Record[Task] | None:
        """Return a task in its last known version."""
        return self.cache.task(id)

    async def catch_up_to(self, revision: int) -> None:
        """Refresh if the cache has not applied all changes up to a revision.

        The caller is about to return an entity of this revision. Without the refresh, a later read
        from the cache could show older data.
        """
        if revision > self.cache.applied.contiguous:
            await self.refresh()

    def submit(self, command: Command) -> Coroutine[Any, Any, Any]:
        """Commit a command, after a flush of the unsaved entries of its rows."""
        if self.cache.unsaved:
            return self._submit_after_flush(command)
        return self.send(command)

    async def _submit_after_flush(self, command: Command) -> Any:
        if isinstance(command, Create) and (command.kind, command.id) in self.cache.unsaved:
            raise DuplicateError(ENTITY_NAMES[command.kind], command.id)
        await self.write_behind.flush_or_drop([(command.kind, command.id), *command.related_keys])
        return await self.send(command)

    async def insert_tasks(self, rows: Sequence[Raw]) -> Inserted:
        """Commit new tasks, each as `row_of` returns it, in one transaction."""
        if self.cache.unsaved:
            await self.write_behind.flush_or_drop([(Task, row[0]) for row in rows])
        inserted: Inserted = await self.database.write(insert_tasks, rows)
        return inserted

    def send(self, command: Command) -> Coroutine[Any, Any, Any]:
        """Commit a command, even while entries are unsaved."""
        if self.cache.heartbeats.waiting:
            return self.heartbeat_writer.send(command)
        return self.database.write(apply, command)

    async def update(self, record: Record[Entity]) -> Record[Entity]:
        """Replace the entity of the same version; return the stored record."""
        key = key_of(record)
        if key in self.cache.unsaved:
            await self.write_behind.flush(key, record.version)
        version = self.cache.flushed_version(key, record.version)
        known = self.cache.find(key)
        if known is None or known.version != version:
            # No record to compare with: write all fields, and let the database decide.
            update = Update(*key, record, CONTENT[key[0]], version)
        else:
            update = Update(*key, record, known.differences(record), version, known)
        stored: Record[Entity] = await self.submit(update)
        return stored

    async def change(
        self, key: EntityKey, fn: Callable[[Record[Entity]], Awaitable[Record[Entity]]]
    ) -> Record[Entity] | None:
        """Replace an entity by the result of `fn`, again after a concurrent change.

        Returns:
            The stored record; `None` if there is none.
        """
        while True:
            if key in self.cache.unsaved:
                await self.write_behind.flush(key)
            known = await self.find(key)
            if known is None:
                return None
            update = change_of(known, await fn(known))
            if update is None:
                return known
            try:
                stored: Record[Entity] = await self.submit(update)
                return stored
            except NotFoundError:
                return None
            except StaleVersionError:
                if self.cache.find(key) is known:  # another process has changed it
                    await self.refresh()
                if self.cache.find(key) is known:  # the row was changed by hand: retries are vain
                    raise

    async def remove(self, key: EntityKey) -> bool:
        """Remove an entity; `False` if there is none."""
        if self.cache.unsaved:
            return await self.write_behind.remove(key)
        return bool(await self.send(Remove(*key)))

    async def sync(self) -> None:
        """Flush all unsaved entries and heartbeats; see `StateManager.sync_to_database`."""
        conflicts = await self.write_behind.flush_all()
        await self.heartbeat_writer.flush()
        self.last_sync_at = self.database.clock()
        if conflicts:
            raise UnsavedConflictError(conflicts)

    async def refresh(self) -> None:
        """Apply the changes of other processes; see `StateManager.refresh_from_database`."""
        async with self._refreshing:
            # One caller at a time: a batch continues the revisions that this cache has applied.
            is_behind = True
            while is_behind:
                cache = self.cache
                applied = cache.applied
                # One call for all statements: each await of the driver resumes all coroutines.
                read = methodcaller(
                    "run_sync",
                    read_change_batch,
                    since=applied.contiguous,
                    heartbeat_sequence=cache.heartbeat_sequence,
                    is_complete=applied.is_counted,
                    known=applied.out_of_order,
                )
                batch: ChangeBatch = await self.database.read(read)
                behind = batch.read_at - applied.contiguous
                is_far_behind = behind > RELOAD_AFTER and behind > len(cache.tasks)
                if batch.is_compacted or is_far_behind:
                    await self._load()
                    return
                try:
                    cache.catch_up(batch)
                finally:  # also after an unreadable row, as the other changes were applied
                    if self._is_awaited:
                        self._keep_for_watchers(batch)
                        self.watchers.notice(list(map(_step, batch.changes)))
                is_behind = batch.revision < batch.read_at
            self.last_refresh_at = self.database.clock()

    async def changes(self, since: int) -> tuple[Sequence[Change], int]:
        """Return the next changes after a revision, and the revision that they end at.

        The cache has applied these changes. The errors are those of `StateManager.watch`.
        """
        changes, until = await self.database.read(partial(read_changes, since=since))
        await self.catch_up_to(until)
        return changes, until

    @property
    def is_following(self) -> bool:
        """True if commits of other processes wake the waiters."""
        return self._follower is not None

    async def show_heartbeat(self, node_id: str, usage: Mapping[str, float | int]) -> bool:
        """Show a heartbeat now, and write it within a second; `False` if there is no such node.

        A heartbeat of an OFFLINE node is written before this returns.
        """
        key = (NodeInfo, node_id)
        node = self.cache.find(key)
        if node is None:
            await self.refresh()
        if node is None or node.status is NodeStatus.OFFLINE:
            if key in self.cache.unsaved:  # its flush would set the node OFFLINE again
                await self.write_behind.flush_or_drop([key])
            node = self.cache.find(key)
            if node is None:
                return False
        heartbeat = Heartbeat(node_id, self.database.clock(), usage)
        if heartbeat.is_news_to(node, heartbeat.at + WRITTEN_WITHIN):
            self.cache.show_heartbeat(heartbeat)
            self.heartbeat_writer.flush_later()
            if node.status is NodeStatus.OFFLINE:
                await self.heartbeat_writer.write([node_id])
        return True

    async def write_heartbeat(self, node_id: str) -> bool:
        """Write a heartbeat before this returns; `False` if there is no such node."""
        is_known = await self.show_heartbeat(node_id, {})
        await self.heartbeat_writer.flush([node_id])
        return is_known

    async def _load(self) -> None:
        """Load a new cache, and replace the old one."""
        # The snapshot may lack commits of this process during the read: they are applied after it.
        # No `await` may follow the read: a commit would reach the old cache only.
        self._loading = []
        try:
            load = partial(load_cache, finished_limit=self._finished_limit)
            cache = await self.database.read(load)
            for events in self._loading:
                cache.apply(events)
        finally:
            self._loading = None
        cache.keep_unsaved(self.cache)
        self.cache = cache
        self.recent_changes.clear()
        self.watchers.wake_all()
        self.last_refresh_at = self.database.clock()

    def _apply_committed(self, events: Sequence[Committed]) -> None:
        """Apply a commit of this process; called on the event loop, in the order of commits."""
        if self._loading is not None:
            self._loading.append(events)
        try:
            self.cache.apply(events)
        finally:
            self._wake_after(events)
            sequences = [event.sequence for event in events if isinstance(event, HeartbeatWritten)]
            self._own_heartbeat_sequence = max(sequences, default=self._own_heartbeat_sequence)

    @property
    def _is_awaited(self) -> bool:
        """True if there are waiters for changes or for work."""
        return bool(self.watchers.count or self.watchers.claims.nodes)

    def _wake_after(self, events: Sequence[Committed]) -> None:
        """Wake the waiters after a commit of this process."""
        if self._is_awaited:
            changes = list(changes_of(events))
            if self.watchers.count:
                self.recent_changes.add(changes)
            self.watchers.notice(
                [(one.item, one.item_id, one.to_status, one.kind) for one in changes]
            )

    def _keep_for_watchers(self, batch: ChangeBatch) -> None:
        if self.watchers.count:
            sql = self.database.statements
            self.recent_changes.add_rows(batch.changes, sql.from_moment, sql.read_reason)

    def changes_in_memory(self, since: int) -> Sequence[Change]:
        """Return the changes after a revision that are in memory, and were applied."""
        return self.recent_changes.after(since, self.cache.applied.contiguous)

    def _notice_commit(self, revision: int, heartbeat_sequence: int) -> bool:
        """Request a refresh if the counters are ahead of the cache; called on any thread.

        Returns:
            `False` if an earlier request is still open.
        """
        # Without a lock: an outdated number leads to a needless refresh, never to a missing one.
        is_busy = self._outdated.is_set()
        known = max(self.cache.heartbeat_sequence, self._own_heartbeat_sequence)
        is_behind = revision > self.cache.applied.contiguous or heartbeat_sequence > known
        if self._loop is not None and is_behind:
            self._loop.call_soon_threadsafe(self._outdated.set)  # raises if the loop was closed
        return not is_busy

    async def _follow(self) -> None:
        while True:
            await self._outdated.wait()
            # Cleared before the read: a later commit must set it again.
            self._outdated.clear()
            began = time.monotonic()
            try:
                await self.refresh()
            except Exception:  # the next notification or synchronisation tries again
                logger.exception("changes of other processes could not be read")
            # At most a fifth of the time goes into refreshes, and a longer one applies more.
            took = time.monotonic() - began
            await asyncio.sleep(min(FOLLOWING_PAUSE * took, LONGEST_PAUSE_SECONDS))
