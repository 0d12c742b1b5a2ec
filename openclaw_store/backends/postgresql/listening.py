"""Notifications of a PostgreSQL server: one connection listens to one cluster, or to many.

The writer of a process that is the only listener sends no notifications, which would make each
commit a fifth slower. Three advisory locks tell the writer if there are other listeners:

- the *shared* lock, held by all listeners of a cluster except the first one;
- the *first* lock, held by the first listener;
- its *own* lock, also held by the first listener; only its process knows the number.

The writer notifies if the shared lock is held, or its own one is free. Its statement tries to take
both, and keeps what it gets until the commit: a new listener waits for that, and then reads the
counters, so it misses no commit. A writer without the number of a first listener always notifies.
Any role of the server can hold these locks, or notify. So a listener waits for the shared lock for
a limited time, and asks for the counters now and then.

Some commits send no notification that arrives: behind a pooler that gives each transaction another
connection, on a server without `LISTEN`, or by a process that writes without `NOTIFY`. A listener
finds such a commit when it asks for the counters, and from then on it asks often.
"""

from __future__ import annotations

import asyncio
import re
import secrets
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from sqlalchemy.ext.asyncio import AsyncEngine

from openclaw_store.backends.base import CounterStatements, OnCommit
from openclaw_store.backends.postgresql.protocol import ListenerNames, listener_names
from openclaw_store.backends.postgresql.write_session import ConnectionRegistry, milliseconds
from openclaw_store.errors import logger_of

if TYPE_CHECKING:
    from openclaw_store.backends.postgresql.backend import PostgreSQL

logger = logger_of("wakeups")

BUSY_SECONDS = 0.01
"""Shortest time between two reads of the counters of a cluster."""

ALIVE_SECONDS = 10.0
"""Longest time without a notification after which the server is asked for the counters."""

SHARED_ALIVE_SECONDS = 30.0
"""The same for each of many clusters on one connection."""

POLL_SECONDS, LONGEST_POLL_SECONDS = 0.05, 0.5
"""Limits of the time between two polls where notifications do not arrive; commits shorten it."""

CONFIRM_SECONDS = 0.25
"""Time in which a commit must be known, or a notification of it arrive."""

JOIN_SECONDS = 1.0
"""Longest wait for the lock of all listeners, which another role may keep."""

STOP_SECONDS = 1.0
"""Time for the server to answer when the listener stops; then the statement is cancelled."""

RETRY_SECONDS = 0.1, 5.0
"""First and longest time before a lost connection is made again."""

_COUNTERS = re.compile(r"([0-9]{1,19}) ([0-9]{1,19})")
"""The payload of a notification; one of another form may have been sent by any role."""

_JOIN_OTHERS = "SELECT pg_advisory_lock_shared"
_LEAVE_ALL = "SELECT pg_advisory_unlock_shared($1)"
_BE_FIRST = "SELECT pg_try_advisory_lock($1)"
_LEAVE_OTHERS = "SELECT pg_advisory_lock($1), pg_advisory_unlock_shared($2)"

_MISSING = ("0A", "42")
"""Classes of errors of a server that lacks LISTEN, or a function."""


@dataclass(eq=False, frozen=True)
class Follower:
    """A cluster that is followed, and the receiver of its counters.

    Args:
        schema: The schema of its tables.
        counters: Read the counters.
        on_commit: Receives them.
        known_revision: Return the newest revision that the receiver knows; `None` if it never
            misses a notification.
        registry: Has the writer of the receiver, which needs no notification of its commits.
    """

    schema: str
    counters: CounterStatements
    on_commit: OnCommit
    known_revision: Callable[[], int] | None
    registry: ConnectionRegistry


class Listening:
    """Listens on a connection to a server, which it makes again when it is lost.

    Args:
        database: Makes the connection.
        is_shared: Listens to several clusters, and is the first listener of none.
    """

    def __init__(self, database: PostgreSQL, *, is_shared: bool = False) -> None:
        self._database = database
        self._is_shared = is_shared
        self._followers: list[Follower] = []
        self._woken, self._stopping = asyncio.Event(), asyncio.Event()
        self._task = asyncio.get_running_loop().create_task(self._run())

    def follow(self, follower: Follower) -> None:
        """Begin to listen to a cluster."""
        self._followers.append(follower)
        self._woken.set()

    def unfollow(self, follower: Follower) -> None:
        """End listening to a cluster."""
        self._followers.remove(follower)
        self._woken.set()

    async def stop(self) -> None:
        """End listening, and close the connection."""
        if self._task.get_loop() is asyncio.get_running_loop():  # else that loop is closed
            # The current statement may end first: to cancel one, the driver connects again in the
            # background, and a program that ends meanwhile logs an error of that connection.
            self._stopping.set()
            self._woken.set()
            await asyncio.wait([self._task], timeout=STOP_SECONDS)
            self._task.cancel()
            await asyncio.wait([self._task])

    async def _run(self) -> None:
        engine = self._database.engine(write=False)
        pause, longest = RETRY_SECONDS
        try:
            while not self._stopping.is_set():
                try:
                    with self._database.error_mapping.mapped():
                        await self._listen(engine)
                    pause, _ = RETRY_SECONDS
                except Exception as error:  # the synchronisation continues, and reports it
                    logger.warning("cannot hear what others commit, for now: %s", error)
                await _is_set_within(pause, self._stopping)
                pause = min(2 * pause, longest)
        finally:
            await engine.dispose()

    async def _listen(self, engine: AsyncEngine) -> None:
        """Call back on a connection until it is lost."""
        woken = self._woken
        channels: dict[Follower, _Channel] = {}
        async with engine.connect() as connection:
            driver = (await connection.get_raw_connection()).driver_connection
            assert driver is not None
            driver.add_termination_listener(lambda _: woken.set())
            try:
                while True:
                    woken.clear()
                    if driver.is_closed() or self._stopping.is_set():
                        break
                    for gone in channels.keys() - {*self._followers}:
                        await channels.pop(gone).close()
                    for follower in [*self._followers]:
                        if follower not in channels:
                            channels[follower] = _Channel(
                                driver, follower, self._database, woken, self._is_shared
                            )
                        if channels[follower].due_at <= time.monotonic():
                            await self._look(channels[follower])
                    # Notifications without counters must not keep the server busy.
                    await _is_set_within(BUSY_SECONDS, self._stopping)
                    due_at = min((one.due_at for one in channels.values()), default=None)
                    pause = ALIVE_SECONDS if due_at is None else due_at - time.monotonic()
                    await _is_set_within(pause, woken)
            finally:
                for channel in channels.values():
                    channel.lose()

    async def _look(self, channel: _Channel) -> None:
        """Ask for the counters of a cluster; the error of one must not end the others."""
        try:
            await channel.look()
        except Exception as error:
            if not self._is_shared or channel.is_closed:
                raise
            _, longest = RETRY_SECONDS
            channel.due_at = time.monotonic() + longest
            logger.warning("cannot hear what others commit, for now: %s", type(error).__name__)


class _Channel:
    """One cluster on a connection that listens."""

    def __init__(
        self, driver: Any, follower: Follower, database: PostgreSQL, woken: asyncio.Event,
        is_shared: bool,
    ) -> None:  # fmt: skip
        self._driver = driver
        self._follower = follower
        self._woken = woken
        self._registry = follower.registry
        self._code = database.error_mapping.code
        self._is_shared = is_shared
        self._may_be_first = not is_shared
        self._names: ListenerNames | None = None  # once it listens
        self._has_joined = False
        self._lock: int | None = None
        self.due_at = 0.0
        """The time of the next look, by `time.monotonic`."""
        self._pause = POLL_SECONDS
        self._is_polling = False
        self._is_quiet = True  # no notification since the last look
        self._is_told = True  # the next look reads what a notification has announced
        self._announced = -1  # the newest revision of a notification
        self._seen = -1  # the revision of the last look
        self._unknown: int | None = None  # a revision that was not announced, or not yet

    @property
    def is_closed(self) -> bool:
        """True if the connection is lost."""
        closed: bool = self._driver.is_closed()
        return closed

    async def look(self) -> None:
        """Read the counters, and call back; begin to listen at the first time."""
        if self._names is None:
            await self._begin()
        assert self._names is not None
        await self._take_locks(self._names)
        self._is_quiet, is_told, self._is_told = True, self._is_told, False
        revision, heartbeats = await self._driver.fetchrow(self._follower.counters.read)
        if is_told:
            self._announced = max(self._announced, revision)
        pause = self._pause_after(revision)
        self._seen = revision
        if self._unknown is None:
            self._follower.on_commit(revision, heartbeats)
        if not self._is_told:  # else it was woken meanwhile
            self.due_at = time.monotonic() + pause

    def _pause_after(self, revision: int) -> float:
        """Decide if notifications arrive, and return the seconds to the next look."""
        known = self._follower.known_revision
        newest = max(self._announced, revision if known is None else known())
        if not self._is_polling and self._unknown is not None and self._unknown > newest:
            logger.info("a commit was not notified: the database is polled from now on")
            self._is_polling, self._unknown = True, None
        if self._is_polling:
            is_news = revision > self._seen
            pause = POLL_SECONDS if is_news else min(1.2 * self._pause, LONGEST_POLL_SECONDS)
        elif revision > newest:
            # A commit of this process may be on its way to the receiver, or a notification.
            self._unknown = revision
            return CONFIRM_SECONDS
        else:
            longest = SHARED_ALIVE_SECONDS if self._is_shared else ALIVE_SECONDS
            self._unknown, pause = None, min(2 * self._pause, longest)
        self._pause = pause
        return pause

    async def close(self) -> None:
        """Listen no more."""
        self.lose()
        if self._names is not None and not self.is_closed:
            with suppress(Exception):  # the connection is lost, and its locks with it
                await self._driver.remove_listener(self._names.channel, self._note)
                if self._has_joined:
                    await self._driver.fetchval(_LEAVE_ALL, self._names.others)

    def lose(self) -> None:
        """Note that the server has released the locks: the writer must notify again."""
        if self._lock is not None and self._registry.listener == self._lock:
            self._registry.listener = None

    async def _begin(self) -> None:
        schema = self._follower.schema
        cluster_id = await self._driver.fetchval(f"SELECT cluster_id FROM {schema}.counters")
        names = listener_names(schema, cluster_id or 0)
        try:
            # The lock before LISTEN, and LISTEN before the counters: no commit is missed.
            self._has_joined = await self._join(names.others)
            await self._driver.add_listener(names.channel, self._note)
        except Exception as error:
            if not (self._code(error) or "").startswith(_MISSING):
                raise
            logger.info("the server notifies nobody: the database is polled")
            self._is_polling, self._may_be_first = True, False
        self._names = names

    async def _take_locks(self, names: ListenerNames) -> None:
        """Share the lock of all listeners; be the first one if no notification came lately."""
        if not self._has_joined and not self._is_polling:
            self._has_joined = await self._join(names.others)
        is_candidate = self._may_be_first and self._has_joined and self._is_quiet
        if (
            is_candidate
            and self._lock is None
            and await self._driver.fetchval(_BE_FIRST, names.first)
        ):
            number = secrets.randbits(62)
            await self._driver.fetchval(_LEAVE_OTHERS, number, names.others)
            self._lock = self._registry.listener = number

    async def _join(self, lock: int) -> bool:
        """Share the lock of all listeners; return `False` if it is not free in time."""
        wait = milliseconds(JOIN_SECONDS)
        try:  # in one message, which is one transaction: the limit ends with it
            await self._driver.execute(f"SET LOCAL lock_timeout = {wait}; {_JOIN_OTHERS}({lock})")
        except Exception as error:
            if self._code(error) != "55P03":
                raise
            return False
        return True

    def _note(self, _: object, process: int, __: object, payload: str) -> None:
        if process in self._registry.writers:  # the receiver's own commit
            return
        self._is_quiet = False
        if counters := _COUNTERS.fullmatch(payload):
            revision, heartbeats = map(int, counters.groups())
            self._announced = max(self._announced, revision)
            self._follower.on_commit(revision, heartbeats)
        else:  # a transaction of a session notifies before it writes the counters
            self._is_told, self.due_at = True, 0.0
            self._woken.set()


async def _is_set_within(seconds: float, event: asyncio.Event) -> bool:
    with suppress(TimeoutError):
        async with asyncio.timeout(seconds):
            await event.wait()
    return event.is_set()
