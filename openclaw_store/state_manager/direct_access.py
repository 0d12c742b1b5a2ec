"""Direct access: a `StateManager` without a cache answers from the database.

It starts in constant time and holds no copy of the cluster: the right choice for a process that
only claims and reports tasks. It remembers the tasks that it has assigned, and the newest revision.
"""

from __future__ import annotations

import asyncio
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

from sqlalchemy import select
from sqlalchemy.ext.asyncio import AsyncSession

from openclaw_store.database import ChangeRow
from openclaw_store.domain import ASSIGNED, Entity, EntityKey, Record, Task
from openclaw_store.errors import BackendError, InvalidDataError, logger_of
from openclaw_store.repositories import (
    Event,
    Heartbeat,
    TasksAdded,
    apply_heartbeats,
    read_counters,
)
from openclaw_store.state_manager.cache import Cache, Committed
from openclaw_store.state_manager.claim_waiters import Step
from openclaw_store.state_manager.load import load_cache
from openclaw_store.state_manager.replica import Replica
from openclaw_store.state_manager.write_behind import WriteBehind

logger = logger_of("mirror")

MAX_REMEMBERED_TASKS = 10_000
"""Assigned tasks in memory; the report on any other reads the task first."""

WAKE_SECONDS = 0.01
"""Shortest time between two commits of other processes that wake all waiters, which then read."""

MAX_STEPS = 1000
"""Changes that are read to wake waiters: more of them wake all that there are."""


class DirectAccess(Replica):
    """The database of one `StateManager` without a cache; `cache` stays empty."""

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        self.write_behind = NoWriteBehind(self)
        self._revision = 0
        # Waiters know all changes up to this one. A commit of this process may be newer, as it is
        # known before the notification of an earlier one by another process.
        self._followed = 0
        self._noticed = 0  # the newest revision of a notification; set on any thread
        self._assigned: OrderedDict[str, Record[Task]] = OrderedDict()

    @property
    def version(self) -> int:
        return max(self._revision, self._noticed)

    async def start(self) -> None:
        self._unlisten = self.database.listen(self._apply_committed)
        try:
            await self.refresh()
        except BaseException:
            self._unlisten()
            raise

    def _known_revision(self) -> int:
        return self._revision

    async def view(self, *, with_tasks: bool = True) -> Cache:
        """Read the state of the cluster: a snapshot for one call."""
        return await self.database.read(
            partial(load_cache, finished_limit=0, with_tasks=with_tasks)
        )

    async def find(self, key: EntityKey) -> Record[Any] | None:
        return await self.read(key)

    def known_task(self, id: str) -> Record[Task] | None:
        return self._assigned.get(id)

    async def catch_up_to(self, revision: int) -> None:
        self._advance_to(revision)

    async def refresh(self) -> None:
        """Read the newest revision."""
        revision, _, _ = await self.database.read(read_counters, is_one_statement=True)
        self._advance_to(revision)
        self.last_refresh_at = self.database.clock()

    async def write_heartbeat(self, node_id: str) -> bool:
        return await self.show_heartbeat(node_id, {})

    async def show_heartbeat(self, node_id: str, usage: Mapping[str, float | int]) -> bool:
        """Write a heartbeat; `False` if there is no such node."""
        heartbeat = Heartbeat(node_id, self.database.clock(), usage)
        [is_known] = await self.database.write(apply_heartbeats, [heartbeat])
        return bool(is_known)

    def _apply_committed(self, events: Sequence[Committed]) -> None:
        for event in events:
            if isinstance(event, TasksAdded):
                self._note(*event.revisions)
            elif isinstance(event, Event):
                self._note(event.change.revision, event.change.revision)
                _, id, record, _ = event
                self._assigned.pop(id, None)
                if record is not None and record.kind is Task and record.status in ASSIGNED:
                    self._assigned[id] = record
        while len(self._assigned) > MAX_REMEMBERED_TASKS:
            self._assigned.popitem(last=False)
        self._wake_after(events)

    def _note(self, first: int, last: int) -> None:
        """Note the revisions of a commit of this process."""
        self._revision = max(self._revision, last)
        if first == self._followed + 1:
            self._followed = last

    def _notice_commit(self, revision: int, heartbeat_sequence: int) -> bool:
        is_busy = self._outdated.is_set()
        if revision > self._followed:
            self._noticed = max(self._noticed, revision)
            if self._loop is not None and self._is_awaited:
                self._loop.call_soon_threadsafe(self._outdated.set)  # raises if it was closed
        return not is_busy

    async def _follow(self) -> None:
        while True:
            await self._outdated.wait()
            # Both before the read: a later notification must be followed in the next round.
            self._outdated.clear()
            since, until = self._followed, self._noticed
            self.watchers.wake_for_changes()
            try:
                if self.watchers.claims.nodes:
                    read = partial(_steps, since=since)
                    self._notice(await self.database.read(read, is_one_statement=True))
                self._revision = max(self._revision, until)
                self._followed = max(self._followed, until)
            except BackendError:  # the next notification, or the end of the wait, tries again
                logger.exception("the changes of other processes could not be read")
            await asyncio.sleep(WAKE_SECONDS)

    def _notice(self, steps: Sequence[Step]) -> None:
        if len(steps) < MAX_STEPS:
            self.watchers.claims.notice(steps)
        else:
            self.watchers.claims.wake_all()

    def _advance_to(self, revision: int) -> None:
        """Wake all waiters if they may not know all changes up to a revision."""
        self._revision = max(self._revision, revision)
        if revision > self._followed:
            self._followed = revision
            self.watchers.wake_all()


async def _steps(session: AsyncSession, since: int) -> Sequence[Any]:
    """Return the changes after a revision."""
    columns = (ChangeRow.item, ChangeRow.item_id, ChangeRow.to_status, ChangeRow.kind)
    query = select(*columns).where(ChangeRow.revision > since).limit(MAX_STEPS)
    return (await session.execute(query)).all()


class NoWriteBehind(WriteBehind):
    """Refuses unsaved entries: there is no memory to keep them in."""

    async def add(self, record: Record[Entity]) -> Record[Entity]:
        raise InvalidDataError("persist", "must be True: this StateManager has no cache")

    update = add
