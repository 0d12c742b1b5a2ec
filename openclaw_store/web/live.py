"""What the page knows without asking: numbers by status, rates, and the newest changes.

One follower reads the change log for all browsers, at most twice a second, and each browser gets
the same bytes.
"""

from __future__ import annotations

import asyncio
import time
from collections import Counter, deque
from collections.abc import AsyncGenerator, Callable, Coroutine, Sequence
from contextlib import suppress
from datetime import datetime, timedelta
from typing import Any, Generic, TypeVar

import orjson
from sqlalchemy import func, select
from sqlalchemy.ext.asyncio import AsyncSession

from openclaw_store.database import CounterRow, NodeRow, TaskRow
from openclaw_store.domain import FINISHED, Change, ChangeKind, TaskStatus
from openclaw_store.errors import CompactedError, StoreError, UnavailableError, logger_of
from openclaw_store.maintenance.read_around import ReadAround, on_connection
from openclaw_store.maintenance.statistics import Interval, read_intervals
from openclaw_store.maintenance.summary import watch
from openclaw_store.repositories import CHANGE_BATCH_SIZE
from openclaw_store.state_manager import StateManager

logger = logger_of("web")

Value = TypeVar("Value")

PAUSE_SECONDS = 0.5
"""Time between two reads of the change log."""

KEPT_EVENTS = 120
"""Events for browsers that connect again."""

MAX_SHOWN = 50
"""Changes of one event; further ones are only counted."""

RETRY_SECONDS = 5.0
"""Pause after the change log could not be read."""

COUNT_SECONDS = 300.0
"""Time after which everything is counted anew: rows may be inserted by hand."""

MINUTES = 60
_MINUTE = timedelta(minutes=1)
_FAILED = (TaskStatus.FAILED, TaskStatus.TIMEOUT)

RELOAD = b"event: reload\ndata: {}\n\n"
"""Tells a browser that it has missed changes."""

STILL_HERE = b": still here\n\n"


class Shared(Generic[Value]):
    """A value that callers share: it is read at most once in some seconds."""

    def __init__(self, read: Callable[[], Coroutine[Any, Any, Value]], seconds: float) -> None:
        self._read = read
        self._seconds = seconds
        self._reading: asyncio.Task[Value] | None = None
        self._began = 0.0

    async def get(self) -> Value:
        """Return the value; a recent read of another caller is shared."""
        now = time.monotonic()
        if self._reading is None or now - self._began > self._seconds:
            self._began = now
            self._reading = asyncio.ensure_future(self._read())
        try:
            return await asyncio.shield(self._reading)
        except StoreError:
            self._reading = None
            raise


class Live:
    """The follower of one database; it starts with the first caller, and ends with the store."""

    def __init__(self, state: StateManager) -> None:
        self._state = state
        self._database = state.db
        self.revision = 0
        self.tasks: Counter[str] = Counter()
        """Numbers by status."""
        self.nodes: Counter[str] = Counter()
        """Numbers by status."""
        self._minutes: dict[datetime, list[int]] = {}
        """Tasks submitted, finished and failed in each minute."""
        self._events: deque[tuple[int, bytes]] = deque(maxlen=KEPT_EVENTS)
        """The revision before each event, and its bytes."""
        self._sent = 0
        self._changed = asyncio.Event()
        self._following: asyncio.Task[None] | None = None
        self._starting = asyncio.Lock()
        self._is_stopped = False

    async def start(self) -> None:
        """Count everything, and follow the changes from there."""
        async with self._starting:
            if not self._is_stopped and (self._following is None or self._following.done()):
                await self._count()
                self._following = asyncio.ensure_future(self._follow())
                self._following.add_done_callback(lambda _: self._changed.set())

    async def stop(self) -> None:
        """Stop following for good, and end the events of all browsers."""
        self._is_stopped = True  # browsers connect again at once
        async with self._starting:
            if self._following is not None:
                self._following.cancel()
                await asyncio.wait([self._following])

    def intervals(self, now: datetime) -> list[Interval]:
        """Return the numbers of the last hour by the minute."""
        first = _minute_of(now) - (MINUTES - 1) * _MINUTE
        moments = (first + part * _MINUTE for part in range(MINUTES))
        return [Interval(at, *self._minutes.get(at, (0, 0, 0))) for at in moments]

    async def events(self, since: int) -> AsyncGenerator[bytes, None]:
        """Yield the events after a revision, as `text/event-stream`, until `stop`."""
        await self.start()
        position = self._sent
        if since < self.revision:
            newer = [before for before, _ in self._events if before >= since]
            if not newer or newer[0] != since:
                yield RELOAD
            else:
                position = self._sent - len(newer)
        yield STILL_HERE
        while self._following is not None and not self._following.done():
            if position < self._sent - len(self._events):
                position = self._sent
                yield RELOAD
            # Taken before the events are read: a later event sets it.
            waiting = self._changed
            while position < self._sent:
                _, data = self._events[position - self._sent]
                position += 1
                yield data
            try:
                async with asyncio.timeout(15):
                    await waiting.wait()
            except TimeoutError:
                yield STILL_HERE

    async def _count(self) -> None:
        now = self._database.clock()
        since = _minute_of(now) - (MINUTES - 1) * _MINUTE

        async def read(
            session: AsyncSession,
        ) -> tuple[int, dict[str, int], dict[str, int], list[Interval]]:
            revision = await session.scalar(select(CounterRow.revision))
            counts: list[dict[str, int]] = []
            for row in (TaskRow, NodeRow):
                query = select(row.status, func.count()).group_by(row.status)
                counts.append({one.value: number for one, number in await session.execute(query)})
            until = since + MINUTES * _MINUTE
            intervals = await on_connection(lambda one: read_intervals(one, since, until, MINUTES))(
                session
            )
            tasks, nodes = counts
            return revision or 0, tasks, nodes, intervals

        self.revision, tasks, nodes, intervals = await ReadAround(self._database.read)(read)
        self.tasks, self.nodes = Counter(tasks), Counter(nodes)
        self._minutes = {one.at: [one.submitted, one.finished, one.failed] for one in intervals}
        self._counted = time.monotonic()

    async def _count_anew(self) -> None:
        before = self.revision
        await self._count()
        if self.revision != before:  # changes in between were not sent
            self._publish(before, RELOAD)

    async def _follow(self) -> None:
        while True:
            try:
                with suppress(CompactedError):
                    async for batch in watch(self._database, self.revision):
                        if batch:
                            self._apply(batch)
                            # A full batch is followed by more: only then there is no pause.
                            is_full = len(batch) >= CHANGE_BATCH_SIZE
                            await asyncio.sleep(0 if is_full else PAUSE_SECONDS)
                        if time.monotonic() - self._counted > COUNT_SECONDS:
                            break
                await self._count_anew()
            except UnavailableError as error:
                if not self._state.is_initialized:
                    return
                logger.warning("the page does not see changes, and tries again: %s", error)
                await asyncio.sleep(RETRY_SECONDS)
            except StoreError:
                logger.exception("the page does not see changes, and tries again")
                await asyncio.sleep(RETRY_SECONDS)

    def _apply(self, batch: Sequence[Change]) -> None:
        before = self.revision
        for change in batch:
            counts = self.tasks if change.item == "task" else self.nodes
            if change.from_status is not None:
                counts[change.from_status] -= 1
            if change.to_status is not None:
                counts[change.to_status] += 1
            if change.item == "task" and change.from_status != change.to_status:
                self._count_minute(change)
        self.revision = batch[-1].revision
        oldest = _minute_of(self._database.clock()) - 2 * MINUTES * _MINUTE
        for at in [at for at in self._minutes if at < oldest]:
            del self._minutes[at]
        event = {
            "revision": self.revision,
            "tasks": self.tasks,
            "nodes": self.nodes,
            "omitted": max(0, len(batch) - MAX_SHOWN),
            "changes": [
                {**change._asdict(), "effect": change.effect} for change in batch[-MAX_SHOWN:]
            ],
        }
        data = orjson.dumps(event, option=orjson.OPT_UTC_Z)
        self._publish(before, b"id: %d\ndata: %b\n\n" % (self.revision, data))

    def _count_minute(self, change: Change) -> None:
        minute = self._minutes.setdefault(_minute_of(change.changed_at), [0, 0, 0])
        if change.kind is ChangeKind.CREATED:
            minute[0] += 1
        if change.to_status in FINISHED:
            minute[1] += 1
            minute[2] += change.to_status in _FAILED

    def _publish(self, before: int, data: bytes) -> None:
        self._events.append((before, data))
        self._sent += 1
        # A new object for the next event, as each browser may wake later than the next event comes.
        self._changed.set()
        self._changed = asyncio.Event()


def _minute_of(moment: datetime) -> datetime:
    return moment.replace(second=0, microsecond=0)
