"""Notifications: a process learns at once that another process has committed.

A notification is only a hint and may be lost: its receiver reads the database, and the next
synchronisation finds the change in any case. The callback gets the counters, on any thread, and may
also get the process's own commits.

On PostgreSQL, a process that is the only listener is not woken by its own commits, which would make
each of them a fifth slower. All listeners share one advisory lock, except the first. The first one
holds another lock, and a third one whose number only its own process knows: its writer sends a
notification only if the shared lock is held or the third one is free. The statement that writes
tests both, and keeps what it could take until the commit; a new listener waits for that, and then
reads the counters. Any role of the server can hold these locks, or notify: a listener waits for the
shared lock for a limited time, and asks for the counters now and then.
"""

from __future__ import annotations

import asyncio
import re
import secrets
from collections.abc import Callable
from contextlib import suppress
from threading import Event, Thread
from time import sleep
from typing import Any, Protocol

from sqlalchemy import Connection
from sqlalchemy.ext.asyncio import AsyncEngine

from openclaw_store.backends.base import Backend, CounterStatements
from openclaw_store.backends.postgresql.backend import PostgreSQL
from openclaw_store.backends.postgresql.protocol import listener_names
from openclaw_store.backends.postgresql.write_session import milliseconds
from openclaw_store.backends.sqlite.backend import SQLite
from openclaw_store.backends.sqlite.file_watch import FileWatch
from openclaw_store.errors import logger_of

logger = logger_of("wakeups")

OnCommit = Callable[[int, int], object]
"""Receives the newest committed revision and heartbeat sequence number.

`False` means that an earlier notification is still being processed, and will include this one.
"""

SHORTEST_SECONDS, LONGEST_SECONDS = 0.001, 0.005
"""Limits of the time between two polls of a file; commits and writes to its WAL shorten it."""

IDLE_SECONDS = 0.05
"""Time between two polls while the system would report a write to the WAL."""

BUSY_SECONDS = 0.01
"""Time to the next poll while the receiver still processes an earlier notification."""

UNREADABLE_SECONDS = 0.1
"""Longest time between two attempts to poll a file that is missing or unreadable."""

ALIVE_SECONDS = 10.0
"""Time without a notification after which the server is asked for the counters."""

JOIN_SECONDS = 1.0
"""Longest wait for the lock of all listeners, which another role may keep."""

STOP_SECONDS = 1.0
"""Time for the server to answer when the listener stops; then the statement is cancelled."""

RETRY_SECONDS = 0.1, 5.0
"""First and longest time before a lost connection is made again."""

_COUNTERS = re.compile(r"([0-9]{1,19}) ([0-9]{1,19})")
"""The payload of a notification; others may have been sent by any role."""

_JOIN_OTHERS = "SELECT pg_advisory_lock_shared($1)"
_BE_FIRST = "SELECT pg_try_advisory_lock($1)"
_LEAVE_OTHERS = "SELECT pg_advisory_lock($1), pg_advisory_unlock_shared($2)"


class Notifier(Protocol):
    """Calls back after commits until it is stopped."""

    async def stop(self) -> None: ...


class Polling:
    """Polls a SQLite file on a thread of its own.

    A poll takes some microseconds: `PRAGMA data_version` reads a number in shared memory that
    changes with each commit of another connection. A commit writes to the WAL first. Where the
    system reports that, the thread sleeps until then.
    """

    def __init__(self, database: SQLite, counters: CounterStatements, on_commit: OnCommit) -> None:
        self._database = database
        self._counters = counters
        self._on_commit = on_commit
        self._ended = Event()
        self._watch = FileWatch()
        self._pause = LONGEST_SECONDS  # before the next attempt, after a failed one
        self._thread = Thread(target=self._run, name="openclaw-store-wakeups", daemon=True)
        self._thread.start()

    async def stop(self) -> None:
        if not self._ended.is_set():
            self._ended.set()
            self._watch.stop()
            await asyncio.to_thread(self._thread.join)
            self._watch.close()

    def _run(self) -> None:
        while not self._ended.is_set():
            try:
                self._database.inspect(self._poll)
            except RuntimeError:  # the receiver's event loop is closed
                break
            except Exception as error:  # the synchronisation continues, and reports it
                logger.debug("cannot see what others commit, for now: %r", error)
                self._ended.wait(self._pause)
                self._pause = min(2 * self._pause, UNREADABLE_SECONDS)

    def _poll(self, connection: Connection) -> None:
        cursor = connection.connection.cursor()
        cursor.execute("PRAGMA data_version")  # which makes the WAL, if there is none
        cursor.fetchall()
        is_reported = self._watch.start(self._database.wal)
        seen: object = None
        pause, is_idle = LONGEST_SECONDS, False
        while not self._ended.is_set():
            if not is_idle:
                sleep(pause)  # waiting for an event would take as long as the rest of a poll
            elif self._watch.wait(IDLE_SECONDS):
                pause, is_idle = SHORTEST_SECONDS, False  # the commit follows its writes
            cursor.execute("PRAGMA data_version")
            [[version]] = cursor.fetchall()
            if version == seen:
                pause = min(pause * 1.2, LONGEST_SECONDS)
                is_idle = is_reported and pause == LONGEST_SECONDS
                continue
            if is_idle and not self._watch.wait(0):
                is_reported = False  # some file systems report nothing
            seen, pause, is_idle = version, SHORTEST_SECONDS, False
            cursor.execute(self._counters.read)
            [counters] = cursor.fetchall()
            self._pause = LONGEST_SECONDS
            if self._on_commit(*counters) is False:
                pause = BUSY_SECONDS


class Listening:
    """Listens on a connection to a PostgreSQL server, which it makes again when it is lost."""

    def __init__(
        self, database: PostgreSQL, counters: CounterStatements, on_commit: OnCommit
    ) -> None:
        self._database = database
        self._counters = counters
        self._on_commit = on_commit
        self._woken, self._stopping = asyncio.Event(), asyncio.Event()
        self._task = asyncio.get_running_loop().create_task(self._run())

    async def stop(self) -> None:
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
        registry = self._database.registry
        async with engine.connect() as connection:
            driver = (await connection.get_raw_connection()).driver_connection
            assert driver is not None
            driver.add_termination_listener(lambda _: woken.set())

            def on_notification(_: object, process: int, __: object, payload: str) -> None:
                if process in registry.writers:  # this process's own commit
                    return
                if counters := _COUNTERS.fullmatch(payload):
                    self._on_commit(*map(int, counters.groups()))
                else:  # a transaction of a session notifies before it writes the counters
                    woken.set()

            schema = self._database.schema
            cluster_id = await driver.fetchval(f"SELECT cluster_id FROM {schema}.counters")
            names = listener_names(schema, cluster_id or 0)
            # The lock before LISTEN, and LISTEN before the counters: no commit is missed.
            has_joined = await self._join(driver, names.others)
            await driver.add_listener(names.channel, on_notification)
            lock: int | None = None
            may_be_first = True
            try:
                while True:
                    woken.clear()
                    if driver.is_closed() or self._stopping.is_set():
                        break
                    has_joined = has_joined or await self._join(driver, names.others)
                    may_be_first = may_be_first and has_joined and lock is None
                    if may_be_first and await driver.fetchval(_BE_FIRST, names.first):
                        number = secrets.randbits(62)
                        await driver.fetchval(_LEAVE_OTHERS, number, names.others)
                        lock = registry.listener = number
                    self._on_commit(*await driver.fetchrow(self._counters.read))
                    # Notifications without counters must not keep the server busy.
                    await _is_set_within(BUSY_SECONDS, self._stopping)
                    may_be_first = not await _is_set_within(ALIVE_SECONDS, woken)
            finally:
                # The server releases the locks of a lost connection; the writer must notify again.
                if registry.listener == lock:
                    registry.listener = None

    async def _join(self, driver: Any, lock: int) -> bool:
        """Share the lock of all listeners; return `False` if it is not free in time."""
        await driver.execute(f"SET lock_timeout = {milliseconds(JOIN_SECONDS)}")
        try:
            await driver.fetchval(_JOIN_OTHERS, lock)
        except Exception as error:
            if self._database.error_mapping.code(error) != "55P03":
                raise
            return False
        return True


async def _is_set_within(seconds: float, event: asyncio.Event) -> bool:
    with suppress(TimeoutError):
        async with asyncio.timeout(seconds):
            await event.wait()
    return event.is_set()


def notify_of_commits(
    database: Backend, counters: CounterStatements, on_commit: OnCommit
) -> Notifier:
    """Call `on_commit`, on any thread, after each commit of another process."""
    if isinstance(database, PostgreSQL):
        return Listening(database, counters, on_commit)
    assert isinstance(database, SQLite)
    return Polling(database, counters, on_commit)
