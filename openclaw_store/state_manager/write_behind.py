"""Write-behind: entries added or updated with `persist=False`, written by the next flush.

An unsaved entry has a negative version, which is unique to its manager. A flush writes it over the
version that it was made from. If the database has a newer version, the entry is dropped and logged.
Other modules need not know unsaved entries: `Replica.submit` flushes the entries of the rows that a
command names.
"""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import Iterable
from contextlib import suppress
from typing import TYPE_CHECKING, Any

from openclaw_store.backends import shield_until_done
from openclaw_store.domain import (
    ENTITY_NAMES,
    Entity,
    EntityKey,
    NodeInfo,
    Record,
    Task,
    key_of,
    lifecycle,
)
from openclaw_store.errors import (
    ConflictError,
    DuplicateError,
    InvalidDataError,
    NotFoundError,
    StaleVersionError,
    StoreError,
    logger_of,
)
from openclaw_store.repositories import Command, Create, Remove, Update, missing

if TYPE_CHECKING:
    from openclaw_store.state_manager.cache import Unsaved
    from openclaw_store.state_manager.replica import Replica

logger = logger_of("mirror")

FLUSH_BATCH_SIZE = 200
"""Unsaved entries submitted at once."""


class WriteBehind:
    """The unsaved entries of one `StateManager`, which the cache of its replica shows."""

    def __init__(self, replica: Replica) -> None:
        self._replica = replica
        self._database = replica.database
        self._flush_lock = asyncio.Lock()  # one caller flushes at a time
        # Random: the version of a copy from another manager must not match.
        self._version = -secrets.randbits(56)

    async def add(self, record: Record[Entity]) -> Record[Entity]:
        """Stage a new entity; return its unsaved record."""
        key = key_of(record)
        if self._takes_idempotency_key(record):
            stored: Record[Entity] = await self._replica.submit(
                Create(*key, record, record.idempotency_key)
            )
            return stored
        if await self._replica.find(key) is not None:
            raise DuplicateError(ENTITY_NAMES[key[0]], key[1])
        return self._stage(record, None)

    async def update(self, record: Record[Entity]) -> Record[Entity]:
        """Stage a changed entity; return its unsaved record."""
        if self._takes_idempotency_key(record):
            return await self._replica.update(record)
        key, cache = key_of(record), self._replica.cache
        known = await self._replica.find(key)
        _require_version(key, known, cache.flushed_version(key, record.version))
        assert known is not None  # required just now
        now = self._database.clock()
        if key[0] is Task:
            values = lifecycle.set_with_status(known.status, record, now)
            if isinstance(values, StoreError):
                raise values
            record = record.evolve(**values)
        else:
            record = lifecycle.updated_node(known, record, now)
        entry = self._replica.cache.unsaved.get(key)
        return self._stage(record, known if entry is None else entry.base)

    async def remove(self, key: EntityKey) -> bool:
        """Remove an entity and its unsaved entry; `False` if there is neither."""
        cache = self._replica.cache
        if key[0] is Task:
            task: Record[Task] | None = None
            with suppress(InvalidDataError):  # a row written by hand may be unreadable
                task = cache.task(key[1])
            if task is not None and task.assigned_node is not None:  # its slot is released
                await self.flush_or_drop([(NodeInfo, task.assigned_node)])
        self._database.refuse_inside()
        async with self._flush_lock:  # otherwise a flush may write the entry after the removal
            removed = await self._replica.send(Remove(*key))
            removed = self._replica.cache.discard(key) or bool(removed)
            self._replica.watchers.wake([key[1]])
            return removed

    async def flush(self, key: EntityKey, version: int | None = None) -> None:
        """Write the unsaved entry of an entity.

        Args:
            version: The version that the entry must have; `None` for any.

        Raises:
            ConflictError: If the database has newer data; the entry was dropped.
            NotFoundError: If the entity was removed; the entry was dropped.
        """
        if version is not None:
            _require_version(key, self._replica.cache.find(key), version)
        self._database.refuse_inside()  # the holder of the lock may wait for that transaction
        async with self._flush_lock:
            # Shielded: after a cancellation the cache would not know the outcome of the write.
            await shield_until_done(self._flush(key))

    async def flush_or_drop(self, keys: Iterable[EntityKey]) -> None:
        """Write the unsaved entries of these keys; drop and log an entry that conflicts."""
        for key in keys:
            if key in self._replica.cache.unsaved:
                with suppress(ConflictError, NotFoundError):
                    await self.flush(key)

    async def flush_all(self) -> list[StoreError]:
        """Write all unsaved entries; return the errors of the dropped ones."""
        conflicts: list[StoreError] = []
        self._database.refuse_inside()
        async with self._flush_lock:
            keys = list(self._replica.cache.unsaved)
            for start in range(0, len(keys), FLUSH_BATCH_SIZE):
                flushes = map(self._flush, keys[start : start + FLUSH_BATCH_SIZE])
                batch = asyncio.gather(*flushes, return_exceptions=True)
                for outcome in await shield_until_done(batch):
                    if isinstance(outcome, ConflictError | NotFoundError):
                        conflicts.append(outcome)
                    elif outcome is not None:
                        raise outcome
        return conflicts

    def _takes_idempotency_key(self, record: Record[Any]) -> bool:
        """Return true if a task gets an idempotency key, which only the database can check."""
        if record.kind is not Task or record.idempotency_key is None:
            return False
        known = self._replica.cache.find(key_of(record))
        return known is None or bool(known.idempotency_key != record.idempotency_key)

    def _stage(self, record: Record[Entity], base: Record[Entity] | None) -> Record[Entity]:
        """Show an unsaved entry, under a new version."""
        self._version -= 1
        staged = record.evolve(version=self._version)
        self._replica.cache.stage(staged, base)
        self._replica.watchers.wake([staged.id])
        return staged

    async def _flush(self, key: EntityKey) -> None:
        entry = self._replica.cache.unsaved.get(key)
        if entry is None:  # flushed by another caller
            return
        try:
            await self._write(key, entry)
        finally:
            self._replica.watchers.wake([key[1]])

    async def _write(self, key: EntityKey, entry: Unsaved) -> None:
        record = entry.record.evolve()  # the write stamps its record; the cached one stays
        command: Command = Create(*key, record)
        if entry.base is not None:
            names = entry.base.differences(record)
            command = Update(*key, record, names, entry.base.version)
        try:
            stored = await self._replica.send(command)
        except (ConflictError, NotFoundError) as error:
            found = await self._replica.read(key)
            if found is not None and not found.differences(entry.record):
                # An earlier flush has written the entry, but its outcome was lost.
                self._replica.cache.unstage(key, entry, found)
                return
            self._replica.cache.unstage(key, entry, None)
            logger.warning("an unsaved %s was dropped: %s", ENTITY_NAMES[key[0]], error)
            raise
        self._replica.cache.unstage(key, entry, stored)


def _require_version(key: EntityKey, known: Record[Any] | None, version: int) -> None:
    if known is None:
        raise missing(*key)
    if known.version != version:
        raise StaleVersionError(ENTITY_NAMES[key[0]], key[1], version, known.version)
