"""How a process learns at once that another one has committed.

What is told here is only a hint, and may be missed: everything it leads to is read from the
database, and found by the next synchronisation in any case. Who listens is told where the
counters stand, on whatever thread; its own commits may be told, too.

On PostgreSQL, a process that listens alone is not woken by its own commits, which would make each
of them take a fifth longer. All who listen share an advisory lock, but for the first. That one
has another, and a third one, whose number its own process alone knows: its writer notifies only if
somebody has the shared lock, or nobody has the third one any more. The server looks at them in the
statement that writes. What it could take it keeps until the commit, and who begins to listen waits
for that, and then reads the counters.
"""

from __future__ import annotations

import asyncio
import logging
import secrets
from collections.abc import Callable
from contextlib import suppress
from threading import Event, Thread
from typing import Protocol

from sqlalchemy import Connection
from sqlalchemy.ext.asyncio import AsyncEngine

from openclaw_store.backends.base import Backend
from openclaw_store.backends.postgresql.backend import PostgreSQL
from openclaw_store.backends.postgresql.batch_sql import CHANNEL, FIRST_LISTENER, OTHER_LISTENERS
from openclaw_store.backends.sqlite.backend import SQLite

logger = logging.getLogger("openclaw_store.wakeups")

OnCommit = Callable[[int, int], object]
"""Is told the revision and the flush of heartbeats that were committed last.

`False` says that it has yet to read what it was told before, and will read this with it.
"""

SHORTEST_SECONDS, LONGEST_SECONDS = 0.002, 0.005
"""Between two looks at a file: the shorter, the more happens to it."""

BUSY_SECONDS = 0.01
"""Until the next look, if who was told has yet to read what it was told before."""

UNREADABLE_SECONDS = 0.1
"""Between two tries to look at a file that is not there, or cannot be read, at most."""

ALIVE_SECONDS = 10.0
"""How long a server may say nothing before it is asked whether it is still there."""

STOP_SECONDS = 1.0
"""For a server to answer while it is not needed any more; then it is interrupted."""

RETRY_SECONDS = 0.1, 5.0
"""Before a connection that was lost is made anew, at first and at most."""

_COUNTERS = "SELECT revision, beat FROM counters"
_JOIN_OTHERS = f"SELECT pg_advisory_lock_shared({OTHER_LISTENERS})"
_BE_FIRST = f"SELECT pg_try_advisory_lock({FIRST_LISTENER})"
_LEAVE_OTHERS = f"SELECT pg_advisory_lock($1), pg_advisory_unlock_shared({OTHER_LISTENERS})"


class Notifier(Protocol):
    """Tells who listens, until it is stopped."""

    async def stop(self) -> None:
        """Tell nothing any more."""


class Polling:
    """Looks at a SQLite file again and again, on a thread of its own.

    A look takes a few microseconds: SQLite keeps a number in shared memory that changes with each
    commit of others (`PRAGMA data_version`).
    """

    def __init__(self, database: SQLite, tell: OnCommit) -> None:
        self._database = database
        self._tell = tell
        self._ended = Event()
        self._pause = LONGEST_SECONDS  # before the next try, if this one fails
        self._thread = Thread(target=self._run, name="openclaw-store-wakeups", daemon=True)
        self._thread.start()

    async def stop(self) -> None:
        """Tell nothing any more."""
        self._ended.set()
        await asyncio.to_thread(self._thread.join)

    def _run(self) -> None:
        while not self._ended.is_set():
            try:
                self._database.inspect(self._look)
            except RuntimeError:  # the event loop was closed: nobody is left there to be told
                break
            except Exception as error:  # synchronisation goes on, and reports what is wrong
                logger.debug("cannot see what others commit, for now: %r", error)
                self._ended.wait(self._pause)
                self._pause = min(2 * self._pause, UNREADABLE_SECONDS)

    def _look(self, connection: Connection) -> None:
        cursor = connection.connection.cursor()
        seen: object = None
        pause = LONGEST_SECONDS
        while not self._ended.wait(pause):
            cursor.execute("PRAGMA data_version")
            [[version]] = cursor.fetchall()
            if version == seen:
                pause = min(pause * 1.2, LONGEST_SECONDS)
                continue
            seen, pause = version, SHORTEST_SECONDS
            cursor.execute(_COUNTERS)
            [counters] = cursor.fetchall()
            self._pause = LONGEST_SECONDS
            if self._tell(*counters) is False:
                pause = BUSY_SECONDS


class Listening:
    """Listens to a PostgreSQL server; a connection that is lost is made anew."""

    def __init__(self, database: PostgreSQL, tell: OnCommit) -> None:
        self._database = database
        self._tell = tell
        self._heard, self._stopping = asyncio.Event(), asyncio.Event()
        self._task = asyncio.get_running_loop().create_task(self._run())

    async def stop(self) -> None:
        """Tell nothing any more; what is under way is answered first, for a second at most."""
        if self._task.get_loop() is asyncio.get_running_loop():  # else that was closed
            # To interrupt a statement, the driver connects anew, in the background; a program that
            # ends then stops it half-way, with an error in the log.
            self._stopping.set()
            self._heard.set()
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
                except Exception as error:  # synchronisation goes on, and reports what is wrong
                    logger.warning("cannot hear what others commit, for now: %s", error)
                await _is_set_within(pause, self._stopping)
                pause = min(2 * pause, longest)
        finally:
            await engine.dispose()

    async def _listen(self, engine: AsyncEngine) -> None:
        """Tell what is heard on a connection until it is lost."""
        heard = self._heard
        registry = self._database.registry
        async with engine.connect() as connection:
            driver = (await connection.get_raw_connection()).driver_connection
            assert driver is not None
            driver.add_termination_listener(lambda _: heard.set())

            def hear(_: object, process: int, __: object, counters: str) -> None:
                if process in registry.writers:  # it is known already
                    return
                told = counters.split()
                if len(told) == 2 and all(map(str.isdecimal, told)):
                    self._tell(*map(int, told))
                else:  # whoever writes in a transaction of a session has them notified at once
                    heard.set()

            await driver.fetchval(_JOIN_OTHERS)
            await driver.add_listener(CHANNEL, hear)
            lock: int | None = None
            may_be_first = True
            try:
                while True:
                    heard.clear()
                    if driver.is_closed() or self._stopping.is_set():
                        break
                    if may_be_first and lock is None and await driver.fetchval(_BE_FIRST):
                        number = secrets.randbits(62)
                        await driver.fetchval(_LEAVE_OTHERS, number)
                        lock = registry.listener = number
                    self._tell(*await driver.fetchrow(_COUNTERS))
                    may_be_first = not await _is_set_within(ALIVE_SECONDS, heard)
            finally:
                if registry.listener == lock:
                    registry.listener = None


async def _is_set_within(seconds: float, event: asyncio.Event) -> bool:
    with suppress(TimeoutError):
        async with asyncio.timeout(seconds):
            await event.wait()
    return event.is_set()


def notify_of_commits(database: Backend, tell: OnCommit) -> Notifier:
    """Have `tell` called, on any thread, when somebody has committed."""
    if isinstance(database, PostgreSQL):
        return Listening(database, tell)
    assert isinstance(database, SQLite)
    return Polling(database, tell)
