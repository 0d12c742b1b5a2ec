"""A cache that is kept in step with its database: commit first, then cache."""

from __future__ import annotations

import asyncio
import logging
import secrets
import time
from collections.abc import Callable, Coroutine, Mapping, Sequence
from contextlib import suppress
from contextvars import Context
from datetime import datetime, timedelta
from functools import partial
from typing import Any

from sqlalchemy.ext.asyncio import AsyncSession

from openclaw_store.backends import Notifier, shield_until_done
from openclaw_store.database import Database, statements_for
from openclaw_store.domain import (
    ENTITY_NAMES,
    KEY,
    Change,
    Entity,
    EntityKey,
    NodeInfo,
    NodeStatus,
    Record,
    Task,
    arrived,
    key_of,
    refused,
)
from openclaw_store.errors import (
    ConflictError,
    DuplicateError,
    InvalidDataError,
    NotFoundError,
    StaleVersionError,
    StoreError,
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
    missing,
    newer_heartbeat,
    read_changes,
)
from openclaw_store.state_manager.cache import Cache, Unsaved
from openclaw_store.state_manager.change_feed import (
    ChangeBatch,
    InitialState,
    read_change_batch,
    read_initial_state,
    read_live,
)
from openclaw_store.state_manager.pages import ITEM_ID
from openclaw_store.state_manager.watchers import Watchers

logger = logging.getLogger("openclaw_store.mirror")

HEARTBEAT_SECONDS = 0.5
"""How long a heartbeat waits in memory for others to share its flush."""

WRITTEN_WITHIN = timedelta(seconds=1)
"""How long a heartbeat may take to be written: what is newer by more comes from the future."""

HEARTBEAT_BATCH_SIZE = 128
"""How many are written at a stretch, before others write."""

FLUSH_BATCH_SIZE = 200
"""How many of those that are only in memory are handed to the writer at a stretch."""

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
        self._flush_lock = asyncio.Lock()  # what is unsaved is written by one caller at a time
        self._flush_timer: asyncio.TimerHandle | None = None
        self._flush: asyncio.Task[None] | None = None
        self._flushing = asyncio.Lock()  # heartbeats are written by one caller at a time
        self._loop: asyncio.AbstractEventLoop | None = None  # set while it follows
        self._notifier: Notifier | None = None
        self._outdated = asyncio.Event()  # others have committed what is not in memory yet
        self._follower: asyncio.Task[None] | None = None
        self._own_beat = 0  # this process's newest flush of heartbeats, which it need not read
        # Counted down from a place of its own: a copy from another manager must not match.
        self._unsaved_version = -secrets.randbits(56)

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
        lost = len(self.cache.unsaved) + len(self.cache.waiting_heartbeats())
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
        cache, version = self.cache, self.cache.version
        found: Record[Any] | None = await self._repositories[place[0]].get_record(place[1])
        if found is not None and found.version > self.cache.contiguous:
            await self.refresh()
            known = self.cache.find(place)
            return known or await self._repositories[place[0]].get_record(place[1])
        unmoved = self.cache is cache and cache.version == version
        if found is not None and place[0] is Task and unmoved:
            cache.remember(found)
        return self.cache.find(place) or found

    async def reach(self, revision: int) -> None:
        """Have memory know all up to a revision of which somebody will be told.

        Else it might show what was before, and what is being read for it just now might, too.
        """
        if revision > self.cache.contiguous:
            await self.refresh()

    def submit(self, operation: Command) -> Coroutine[Any, Any, Any]:
        """Commit an operation, behind the heartbeat that its node may have waiting."""
        if operation.kind is NodeInfo and not isinstance(operation, Create):
            return self._submit_after_heartbeat(operation, operation.id)
        for kind, id in operation.others:
            if kind is NodeInfo:
                return self._submit_after_heartbeat(operation, id)
        return self._database.write(apply, operation)

    async def _submit_after_heartbeat(self, operation: Command, node_id: str) -> Any:
        # Not taken before it runs: a task that is cancelled before would never give it back.
        heartbeats = self.cache.take_heartbeats([node_id])
        if not heartbeats:
            return await self._database.write(apply, operation)
        [beat] = heartbeats
        known: Sequence[bool] | None = None
        try:
            outcome = await self._database.write(apply, AfterHeartbeat(beat, operation))
            known = [True]
            return outcome
        except (ConflictError, NotFoundError):
            known = [True]  # the operation was refused, not the heartbeat
            raise
        finally:
            self._acknowledge_heartbeats([beat], known)

    async def add(self, record: Record[Entity], persist: bool) -> Record[Entity]:
        """Add an entry; returns it as it is kept.

        Raises:
            DuplicateError: If there is one with this identifier.
        """
        place = key_of(record)
        persist = persist or self._takes_key(place, record)
        if persist and place not in self.cache.unsaved:
            stored: Record[Entity] = await self.submit(Create(place[0], place[1], record))
            return stored
        if await self.find(place) is not None:
            raise DuplicateError(ENTITY_NAMES[place[0]], place[1])
        return self._hold(record, None)

    async def update(self, record: Record[Entity], persist: bool) -> Record[Entity]:
        """Replace the entry that has the version of `record`; returns it as it is kept.

        Raises:
            NotFoundError: If there is none.
            StaleVersionError: If it has another version.
        """
        place = key_of(record)
        if persist or self._takes_key(place, record):
            if place in self.cache.unsaved:
                _require_version(place, self.cache.find(place), record.version)
                await self.flush_entry(place)
            stored: Record[Entity] = await self.submit(self._update(place, record))
            return stored
        known = await self.find(place)
        _require_version(place, known, self.cache.flushed_version(place, record.version))
        if place[0] is Task and known is not None:
            refusal = refused(place[1], known.status, record.status)
            if refusal is not None:
                raise refusal
            if known.status is not record.status:
                record = record.evolve(**arrived(record, self._database.clock()))
        entry = self.cache.unsaved.get(place)
        if known is not None and record.kind is NodeInfo:
            heartbeat = newer_heartbeat(known, record, self._database.clock())
            record = record.evolve(last_heartbeat=heartbeat)
        return self._hold(record, known if entry is None else entry.base)

    def _takes_key(self, place: EntityKey, record: Record[Any]) -> bool:
        """Whether a task gets an idempotency key; who else has it, only the database knows."""
        if place[0] is not Task or record.idempotency_key is None:
            return False
        known = self.cache.find(place)
        return known is None or bool(known.idempotency_key != record.idempotency_key)

    async def change(
        self, place: EntityKey, fn: Callable[[Record[Entity]], Record[Entity]]
    ) -> Record[Entity] | None:
        """Replace an entry by what `fn` makes of it, again if others change it meanwhile.

        Returns:
            The entry as it is stored; `None` if there is none.
        """
        while True:
            await self.flush_entry(place)
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

    async def remove(self, place: EntityKey) -> bool:
        """Remove an entry; `False` if there is none."""
        if place[0] is Task and self.cache.unsaved:
            task: Record[Task] | None = None
            with suppress(InvalidDataError):  # somebody wrote by hand what cannot be read
                task = self.cache.task(place[1])
            if task is not None and task.assigned_node is not None:  # it may get a place back
                await self.flush_or_drop((NodeInfo, task.assigned_node))
        if place not in self.cache.unsaved:
            return bool(await self.submit(Remove(*place)))
        self._database.refuse_inside()
        async with self._flush_lock:  # else it might be written behind the removal
            removed = await self.submit(Remove(*place))
            removed = self.cache.discard(place) or bool(removed)
            self.watchers.wake([place[1]])
            return removed

    async def flush_entry(self, place: EntityKey) -> None:
        """Write an entry that is only in memory.

        Raises:
            ConflictError: If it lost to newer data; it was dropped.
            NotFoundError: If it was to change what was removed meanwhile; it was dropped.
        """
        if place in self.cache.unsaved:
            self._database.refuse_inside()  # who holds the lock may wait for that transaction
            async with self._flush_lock:
                await shield_until_done(self._flush_entry(place))

    async def flush_or_drop(self, place: EntityKey) -> None:
        """Write what is only in memory of an entry, before the writer changes it."""
        with suppress(ConflictError, NotFoundError):  # it has lost, and the log says so
            await self.flush_entry(place)

    async def sync(self) -> None:
        """Write everything that is only in memory.

        Raises:
            UnsavedConflictError: If entries lost to newer data; all others are written.
            BackendError: If the database could not be written.
        """
        conflicts: list[StoreError] = []
        self._database.refuse_inside()
        async with self._flush_lock:
            places = list(self.cache.unsaved)
            for start in range(0, len(places), FLUSH_BATCH_SIZE):
                part = places[start : start + FLUSH_BATCH_SIZE]
                flushing = asyncio.gather(*map(self._flush_entry, part), return_exceptions=True)
                for outcome in await shield_until_done(flushing):
                    if isinstance(outcome, ConflictError | NotFoundError):
                        conflicts.append(outcome)
                    elif outcome is not None:
                        raise outcome
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
                since, beat, is_whole = cache.contiguous, cache.beat, cache.is_counted
                batch = await self._database.read(
                    partial(
                        read_change_batch,
                        since=since,
                        beat=beat,
                        is_whole=is_whole,
                        known=cache.out_of_order,
                    )
                )
                behind = batch.read_at - cache.contiguous
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
        if until > self.cache.contiguous:
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
            await self.flush_entry(place)  # else what is unsaved would set it OFFLINE again
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
            ids = self.cache.waiting_heartbeats()
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

    def _hold(self, record: Record[Entity], base: Record[Entity] | None) -> Record[Entity]:
        """Keep an entry in memory alone, under a version that only memory knows."""
        self._unsaved_version -= 1
        held = record.evolve(version=self._unsaved_version)
        self.cache.hold(held, base)
        self.watchers.wake([key_of(held)[1]])
        return held

    async def _flush_entry(self, place: EntityKey) -> None:
        entry = self.cache.unsaved.get(place)
        if entry is None:  # another caller has written it
            return
        try:
            await self._write_unsaved(place, entry)
        finally:
            self.watchers.wake([place[1]])

    async def _write_unsaved(self, place: EntityKey, entry: Unsaved) -> None:
        record = entry.record.evolve()  # the one in the cache stays as it is
        operation: Command = Create(place[0], place[1], record)
        if entry.base is not None:
            names = entry.base.differences(record)
            operation = Update(*place, record, names, entry.base.version)
        try:
            stored = await self.submit(operation)
        except (ConflictError, NotFoundError) as error:
            found = await self._repositories[place[0]].get_record(place[1])
            if found is not None and not found.differences(entry.record):
                self.cache.release(place, entry, found)  # it was written, and nobody could tell
                return
            self.cache.release(place, entry, None)
            logger.warning("an unsaved %s was dropped: %s", ENTITY_NAMES[place[0]], error)
            raise
        self.cache.release(place, entry, stored)

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
            flushes = [event.flush for event in events if isinstance(event, HeartbeatWritten)]
            self._own_beat = max(flushes, default=self._own_beat)

    def _on_commit(self, revision: int, beat: int) -> bool:
        """Is told, on any thread, where the counters stand; `False` if it has yet to read that."""
        is_busy = self._outdated.is_set()
        if self._loop is not None and (
            revision > self.cache.contiguous or beat > max(self.cache.beat, self._own_beat)
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


def _require_version(place: EntityKey, known: Record[Any] | None, version: int) -> None:
    if known is None:
        raise missing(*place)
    if known.version != version:
        raise StaleVersionError(ENTITY_NAMES[place[0]], place[1], version, known.version)
