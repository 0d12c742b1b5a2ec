"""A cache that is kept in step with its database: commit first, then cache."""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Coroutine, Mapping, Sequence
from contextvars import Context
from datetime import datetime, timedelta
from functools import partial
from typing import Any

from sqlalchemy.ext.asyncio import AsyncSession

from openclaw_store.backends import Notifier
from openclaw_store.database import Database, statements_for
from openclaw_store.domain import (
    KEY,
    Change,
    Entity,
    EntityKey,
    NodeInfo,
    NodeStatus,
    Record,
    Task,
    key_of,
)
from openclaw_store.errors import (
    ConflictError,
    InvalidDataError,
    NotFoundError,
    StaleVersionError,
    UnavailableError,
    UnsavedConflictError,
)
from openclaw_store.repositories import (
    CONTENT,
    AfterHeartbeat,
    Command,
    Create,
    Event,
    Heartbeat,
    HeartbeatWritten,
    NodeRepository,
    Remove,
    TaskRepository,
    Update,
    apply,
    apply_heartbeats,
    apply_together,
    read_changes,
)
from openclaw_store.state_manager.cache import Cache
from openclaw_store.state_manager.change_feed import (
    ITEM_ID,
    ChangeBatch,
    InitialState,
    read_change_batch,
    read_initial_state,
    read_live,
)
from openclaw_store.state_manager.watchers import Watchers
from openclaw_store.state_manager.write_behind import WriteBehind

logger = logging.getLogger("openclaw_store.mirror")

HEARTBEAT_SECONDS = 0.5
"""How long a heartbeat waits in memory for others to share its flush."""

WRITTEN_WITHIN = timedelta(seconds=1)
"""How long a heartbeat may take to be written: what is newer by more comes from the future."""

HEARTBEAT_BATCH_SIZE = 128
"""How many are written at a stretch, before others write."""

FOLLOWING_PAUSE, LONGEST_PAUSE_SECONDS = 4.0, 0.05
"""How many times as long as a refreshment that others' commits led to the next one waits, and how
long at most."""

RELOAD_AFTER = 20_000
"""A cache is loaded again if it is more changes behind than this, and than it has live tasks.

To take over a change takes a little longer than to load a task.
"""


class Replica:
    """The cache of one `StateManager`, and the ways by which it and its database stay equal.

    Args:
        database: Where everything is kept.
        finished_limit: How many finished tasks are kept in memory.
    """

    def __init__(self, database: Database, finished_limit: int) -> None:
        self._database = database
        self._finished_limit = finished_limit
        self._repositories: Mapping[type[Any], TaskRepository | NodeRepository] = {
            Task: TaskRepository(database),
            NodeInfo: NodeRepository(database),
        }
        nothing = InitialState(0, 0, None, {}, statements_for(database.dialect).decode)
        self.cache = Cache(nothing, finished_limit)
        """What is in memory; another object after each `load`."""
        self.last_sync_at: datetime | None = None
        """When everything that was only in memory had been written."""
        self.last_refresh_at: datetime | None = None
        """When everything that others had committed had been read."""
        self.watchers = Watchers()
        """Those who wait for a change; all are woken when the replica is stopped."""
        self._unlisten: Callable[[], None] = lambda: None
        self._loading: list[Sequence[Event | HeartbeatWritten]] | None = (
            None  # what was committed meanwhile
        )
        self._refreshing = asyncio.Lock()
        self._flush_timer: asyncio.TimerHandle | None = None
        self._flush: asyncio.Task[None] | None = None
        self._flushing = asyncio.Lock()  # heartbeats are written by one caller at a time
        self._loop: asyncio.AbstractEventLoop | None = None  # set while it follows
        self._notifier: Notifier | None = None
        self._outdated = asyncio.Event()  # others have committed what is not in memory yet
        self._follower: asyncio.Task[None] | None = None
        self._own_beat = 0  # this process's newest flush of heartbeats, which it need not read
        self.write_behind = WriteBehind(database, self)
        """The entries that are only in memory."""

    async def start(self) -> None:
        """Listen to what this process commits, and load what there is."""
        self._unlisten = self._database.listen(self._committed)
        try:
            async with self._refreshing:
                await self._load()
        except BaseException:
            self._unlisten()
            raise

    def follow(self) -> None:
        """Take over what other processes commit as soon as it is known that they have."""
        self._loop = asyncio.get_running_loop()
        self._follower = self._loop.create_task(self._follow())
        self._notifier = self._database.follow(self._on_commit)

    async def stop(self) -> None:
        """Write what is only in memory, for the last time; again, if that was interrupted."""
        if self._notifier is not None:
            await self._notifier.stop()
        if self._follower is not None:
            self._follower.cancel()
            await asyncio.wait([self._follower])
        try:
            if self._flush is not None:
                await asyncio.wait([self._flush])
            await self.sync()
        finally:
            if self._flush_timer is not None:
                self._flush_timer.cancel()
            self._unlisten()
            self.watchers.wake_all()

    async def abandon(self) -> None:
        """Stop without the event loop that all of this goes on, which was closed before.

        Raises:
            UnavailableError: If something was only in memory. It is lost: what was writing it may
                have stopped half-way.
        """
        if self._notifier is not None:
            await self._notifier.stop()
        self._unlisten()
        lost = len(self.cache.unsaved) + len(self.cache.waiting)
        if lost:
            raise UnavailableError(
                f"the event loop was closed first, and {lost} entries and heartbeats are lost that "
                "were only in memory: shut the StateManager down before"
            )

    async def find(self, place: EntityKey) -> Record[Any] | None:
        """An entry from memory, else from the database."""
        record = self.cache.find(place)
        if record is not None:
            return record
        cache, version = self.cache, self.cache.applied.version
        found: Record[Any] | None = await self._repositories[place[0]].get_record(place[1])
        if found is not None and found.version > self.cache.applied.contiguous:
            await self.refresh()
            known = self.cache.find(place)
            return known or await self._repositories[place[0]].get_record(place[1])
        unmoved = self.cache is cache and cache.applied.version == version
        if found is not None and place[0] is Task and unmoved:
            cache.remember(found)
        return self.cache.find(place) or found

    async def find_stored(self, key: EntityKey) -> Record[Any] | None:
        """Return an entity as the database holds it: its unsaved entry is flushed first."""
        if key in self.cache.unsaved:
            await self.write_behind.flush_or_drop([key])
        return await self.find(key)

    async def reach(self, revision: int) -> None:
        """Have memory know all up to a revision of which somebody will be told.

        Else it might show what was before, and what is being read for it just now might, too.
        """
        if revision > self.cache.applied.contiguous:
            await self.refresh()

    def submit(self, command: Command) -> Coroutine[Any, Any, Any]:
        """Commit a command, after the unsaved entries of the rows that it names."""
        if self.cache.unsaved:
            return self._submit_after_flush(command)
        return self.send(command)

    async def _submit_after_flush(self, command: Command) -> Any:
        await self.write_behind.flush_or_drop([(command.kind, command.id), *command.related_keys])
        return await self.send(command)

    async def submit_all(self, commands: Sequence[Command]) -> Sequence[Any]:
        """Commit commands in one transaction; return the result or the error of each."""
        if self.cache.unsaved:
            await self.write_behind.flush_or_drop([(one.kind, one.id) for one in commands])
        outcomes: Sequence[Any] = await self._database.write(apply_together, commands)
        return outcomes

    def send(self, command: Command) -> Coroutine[Any, Any, Any]:
        """Commit a command, after the heartbeat that waits for its node."""
        if self.cache.waiting and not isinstance(command, Create):
            ids = [id for kind, id in command.related_keys if kind is NodeInfo]
            node_id = command.id if command.kind is NodeInfo else next(iter(ids), None)
            if node_id in self.cache.waiting:
                return self._send_after_heartbeat(command, node_id)
        return self._database.write(apply, command)

    async def _send_after_heartbeat(self, command: Command, node_id: str) -> Any:
        # Not taken before it runs: a task that is cancelled before would never give it back.
        heartbeats = self.cache.take_heartbeats([node_id])
        if not heartbeats:
            return await self._database.write(apply, command)
        [beat] = heartbeats
        known: Sequence[bool] | None = None
        try:
            outcome = await self._database.write(apply, AfterHeartbeat(beat, command))
            known = [True]
            return outcome
        except (ConflictError, NotFoundError):
            known = [True]  # the operation was refused, not the heartbeat
            raise
        finally:
            self._acknowledge_heartbeats([beat], known)

    async def update(self, record: Record[Entity]) -> Record[Entity]:
        """Replace the entity that has the version of `record`; return it as it is stored.

        Raises:
            NotFoundError: If there is none.
            StaleVersionError: If it has another version.
        """
        key = key_of(record)
        if key in self.cache.unsaved:
            await self.write_behind.flush(key, record.version)
        stored: Record[Entity] = await self.submit(self._update(key, record))
        return stored

    async def change(
        self, place: EntityKey, fn: Callable[[Record[Entity]], Record[Entity]]
    ) -> Record[Entity] | None:
        """Replace an entry by what `fn` makes of it, again if others change it meanwhile.

        Returns:
            The entry as it is stored; `None` if there is none.
        """
        while True:
            if place in self.cache.unsaved:
                await self.write_behind.flush(place)
            known = await self.find(place)
            if known is None:
                return None
            changed = fn(known)
            if key_of(changed) != place:
                raise InvalidDataError(KEY[place[0]], f"must not be changed, from {place[1]!r}")
            names = known.differences(changed)
            if not names:
                return known
            try:
                update = Update(*place, changed, names, known.version, known)
                stored: Record[Entity] = await self.submit(update)
                return stored
            except NotFoundError:
                return None
            except StaleVersionError:
                if self.cache.find(place) is known:  # another process was faster
                    await self.refresh()
                if self.cache.find(place) is known:  # no: the row was changed by hand
                    raise

    async def remove(self, key: EntityKey) -> bool:
        """Remove an entity; `False` if there is none."""
        if self.cache.unsaved:
            return await self.write_behind.remove(key)
        return bool(await self.send(Remove(*key)))

    async def sync(self) -> None:
        """Write everything that is only in memory.

        Raises:
            UnsavedConflictError: If entries lost to newer data; all others are written.
            BackendError: If the database could not be written.
        """
        conflicts = await self.write_behind.flush_all()
        await self.flush_heartbeats()
        self.last_sync_at = self._database.clock()
        if conflicts:
            raise UnsavedConflictError(conflicts)

    async def refresh(self) -> None:
        """Take over what other processes have committed; costs what has changed."""
        async with self._refreshing:
            batch: ChangeBatch | None = None
            while batch is None or batch.revision < batch.read_at:
                cache = self.cache
                applied = cache.applied
                read = partial(
                    read_change_batch,
                    since=applied.contiguous,
                    beat=cache.beat,
                    is_complete=applied.is_counted,
                    known=applied.out_of_order,
                )
                batch = await self._database.read(read)
                behind = batch.read_at - applied.contiguous
                if batch.is_compacted or behind > max(RELOAD_AFTER, len(cache.tasks)):
                    await self._load()
                    return
                try:
                    cache.catch_up(batch)
                finally:
                    self.watchers.wake(change[ITEM_ID] for change in batch.changes)
            self.last_refresh_at = self._database.clock()

    async def changes(self, since: int) -> tuple[Sequence[Change], int]:
        """Some of the changes after a revision, and the revision they reach up to.

        The cache has taken them over by then.

        Raises:
            CompactedError: If the feed does not reach back that far any more.
            InvalidDataError: If there was no such revision yet.
        """
        changes, until = await self._database.read(partial(read_changes, since=since))
        if until > self.cache.applied.contiguous:
            await self.refresh()
        return changes, until

    async def beat(self, node_id: str, usage: Mapping[str, float | int]) -> bool:
        """Show a heartbeat now, and write it within a second; `False` if there is no such node.

        One that brings its node back ONLINE is written when this returns.
        """
        place = (NodeInfo, node_id)
        node = self.cache.find(place)
        if node is None:
            await self.refresh()
        if node is None or node.status is NodeStatus.OFFLINE:
            if place in self.cache.unsaved:  # its flush would set the node OFFLINE again
                await self.write_behind.flush_or_drop([place])
            node = self.cache.find(place)
            if node is None:
                return False
        beat = Heartbeat(node_id, self._database.clock(), usage)
        if beat.is_news_to(node, beat.at + WRITTEN_WITHIN):
            self.cache.show_heartbeat(beat)
            self._flush_later()
            if node.status is NodeStatus.OFFLINE:
                await self._write_heartbeats([node_id])
        return True

    async def flush_heartbeats(self) -> None:
        """Write the heartbeats that wait, behind those of another flush, which may fail."""
        async with self._flushing:
            ids = list(self.cache.waiting)
            for start in range(0, len(ids), HEARTBEAT_BATCH_SIZE):
                await self._write_heartbeats(ids[start : start + HEARTBEAT_BATCH_SIZE])

    async def _write_heartbeats(self, node_ids: Sequence[str]) -> None:
        heartbeats = self.cache.take_heartbeats(node_ids)
        if not heartbeats:
            return
        known: Sequence[bool] | None = None
        try:
            known = await self._database.write(apply_heartbeats, heartbeats)
        finally:
            self._acknowledge_heartbeats(heartbeats, known)

    def _acknowledge_heartbeats(
        self, heartbeats: Sequence[Heartbeat], known: Sequence[bool] | None
    ) -> None:
        if self.cache.acknowledge_heartbeats(heartbeats, known):
            self._flush_later()

    def _flush_later(self) -> None:
        if self._flush_timer is None:
            loop = asyncio.get_running_loop()
            # Not in the caller's context: it may be in a transaction, which forbids writing.
            self._flush_timer = loop.call_later(
                HEARTBEAT_SECONDS, self._flush_now, context=Context()
            )

    def _flush_now(self) -> None:
        async def flush() -> None:
            try:
                await self.flush_heartbeats()
            except Exception:  # nobody waits for it, and the heartbeats for the next flush
                logger.exception("heartbeats could not be written; they are tried again")

        self._flush_timer = None
        self._flush = asyncio.get_running_loop().create_task(flush())

    def _update(self, place: EntityKey, record: Record[Entity]) -> Update[Entity]:
        """Writes what differs from the copy in memory; all fields if that has another version."""
        version = self.cache.flushed_version(place, record.version)
        known = self.cache.find(place)
        if known is None or known.version != version:
            return Update(*place, record, CONTENT[place[0]], version)
        return Update(*place, record, known.differences(record), version, known)

    async def _load(self) -> None:
        """Fill a new cache and put it in place of the old one."""

        async def read(session: AsyncSession) -> Cache:
            cache = Cache(await read_initial_state(session), self._finished_limit)
            async for page in read_live(session):
                cache.load(page)
            return cache

        self._loading = []
        try:
            cache = await self._database.read(read)
            for events in self._loading:
                cache.apply(events)
        finally:
            self._loading = None
        cache.keep_unsaved(self.cache)
        self.cache = cache
        self.watchers.wake_all()
        self.last_refresh_at = self._database.clock()

    def _committed(self, events: Sequence[Event | HeartbeatWritten]) -> None:
        """Is told what this process has committed."""
        if self._loading is not None:
            self._loading.append(events)
        try:
            self.cache.apply(events)
        finally:
            self.watchers.wake(event.id for event in events if isinstance(event, Event))
            flushes = [event.sequence for event in events if isinstance(event, HeartbeatWritten)]
            self._own_beat = max(flushes, default=self._own_beat)

    def _on_commit(self, revision: int, beat: int) -> bool:
        """Is told, on any thread, where the counters stand; `False` if it has yet to read that."""
        is_busy = self._outdated.is_set()
        if self._loop is not None and (
            revision > self.cache.applied.contiguous or beat > max(self.cache.beat, self._own_beat)
        ):
            self._loop.call_soon_threadsafe(self._outdated.set)  # raises if the loop was closed
        return not is_busy

    async def _follow(self) -> None:
        while True:
            await self._outdated.wait()
            self._outdated.clear()
            began = time.monotonic()
            try:
                await self.refresh()
            except Exception:  # the next wake-up or synchronisation tries again
                logger.exception("what others have committed could not be read")
            # The more there is to follow, the more of it at once: most of the time others run.
            took = time.monotonic() - began
            await asyncio.sleep(min(FOLLOWING_PAUSE * took, LONGEST_PAUSE_SECONDS))
