"""Notifications: a process learns at once that another process has committed.

A notification is only a hint and may be lost: its receiver reads the database, and the next
synchronisation finds the change in any case. The callback gets the counters, on any thread, and may
also get the process's own commits.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from threading import Event, Thread
from time import sleep
from typing import Protocol

from sqlalchemy import Connection

from openclaw_store.backends.base import Backend, CounterStatements, OnCommit
from openclaw_store.backends.cancellation import shield_until_done
from openclaw_store.backends.postgresql.backend import PostgreSQL
from openclaw_store.backends.postgresql.listening import Follower, Listening
from openclaw_store.backends.sqlite.backend import SQLite
from openclaw_store.backends.sqlite.file_watch import FileWatch
from openclaw_store.errors import logger_of

logger = logger_of("wakeups")

SHORTEST_SECONDS, LONGEST_SECONDS = 0.001, 0.005
"""Limits of the time between two polls of a file; commits and writes to its WAL shorten it."""

IDLE_SECONDS = 0.05
"""Time between two polls while the system would report a write to the WAL."""

BUSY_SECONDS = 0.01
"""Time to the next poll while the receiver still processes an earlier notification."""

UNREADABLE_SECONDS = 0.1
"""Longest time between two attempts to poll a file that is missing or unreadable."""


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
            try:
                await shield_until_done(asyncio.to_thread(self._thread.join))
            finally:
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
        pause, is_idle, is_written = LONGEST_SECONDS, False, False
        while not self._ended.is_set():
            if not is_idle:
                sleep(pause)  # waiting for an event would take as long as the rest of a poll
            elif self._watch.wait(IDLE_SECONDS):
                # The commit follows its writes, on a slow disk much later.
                pause, is_idle, is_written = SHORTEST_SECONDS, False, True
            cursor.execute("PRAGMA data_version")
            [[version]] = cursor.fetchall()
            if version == seen:
                pause = min(pause * 1.2, LONGEST_SECONDS)
                is_idle = is_reported and pause == LONGEST_SECONDS
                continue
            if is_idle and not is_written and not self._watch.wait(0):
                is_reported = False  # some file systems report nothing
            seen, pause, is_idle, is_written = version, SHORTEST_SECONDS, False, False
            cursor.execute(self._counters.read)
            [counters] = cursor.fetchall()
            self._pause = LONGEST_SECONDS
            if self._on_commit(*counters) is False:
                pause = BUSY_SECONDS


def notify_of_commits(
    database: Backend,
    counters: CounterStatements,
    on_commit: OnCommit,
    known_revision: Callable[[], int] | None = None,
) -> Notifier:
    """Call `on_commit`, on any thread, after each commit of another process.

    Args:
        known_revision: Return the newest revision that the receiver knows, from which a listener
            finds out that notifications do not arrive; `None` if it need not.
    """
    if isinstance(database, PostgreSQL):
        listening = Listening(database)
        listening.follow(
            Follower(database.schema, counters, on_commit, known_revision, database.registry)
        )
        return listening
    assert isinstance(database, SQLite)
    return Polling(database, counters, on_commit)
