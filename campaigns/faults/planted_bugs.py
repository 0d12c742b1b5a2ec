"""Planted bugs: each breaks a promise of the store, and a campaign must find it.

They are patched in from outside; the library contains no hook for them.
"""

from __future__ import annotations

import asyncio
import os
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import AbstractContextManager, AsyncExitStack, asynccontextmanager, contextmanager
from itertools import count, groupby
from operator import itemgetter
from typing import Any
from unittest.mock import patch

from openclaw_store.backends import notifications, qualified
from openclaw_store.backends.error_mapping import PostgreSQLErrorMapping
from openclaw_store.backends.sqlite.connections import WriteConnection
from openclaw_store.backends.sqlite.file_watch import FileWatch
from openclaw_store.database import dialects
from openclaw_store.database.database import Database
from openclaw_store.database.dialects import statements_for
from openclaw_store.database.group_commit import Apply, Writer
from openclaw_store.database.statements import Statements
from openclaw_store.database.transactions import Unit
from openclaw_store.database.write_transaction import WriteTransaction
from openclaw_store.domain import lifecycle
from openclaw_store.domain.changes import Change
from openclaw_store.domain.models import NodeInfo, Task
from openclaw_store.domain.records import Record
from openclaw_store.encryption import SealedColumn
from openclaw_store.encryption.cipher import Cipher
from openclaw_store.errors import StoreError
from openclaw_store.repositories.commands import Update
from openclaw_store.repositories.heartbeats import Heartbeat
from openclaw_store.repositories.ready_tasks import ready_tasks
from openclaw_store.repositories.unit_of_work import Row, UnitOfWork
from openclaw_store.state_manager.replica import Replica
from openclaw_store.worker.run import Attempt, Interruption

SLOW_DISK_SECONDS = 0.002
"""Seconds that a commit takes on a slow disk."""

STALL_SECONDS = 10
"""Seconds for which the disk stalls at a vulnerable point, so that the fault falls into it."""


Bug = Callable[[], AbstractContextManager[None]]
"""A context manager that keeps the bug in the library while it is active."""

BUGS: dict[str, Bug] = {}
"""All planted bugs by name."""


@contextmanager
def planted(name: str | None) -> Iterator[None]:
    """Plant a bug in the library of this process; `None` for no bug.

    Raises:
        KeyError: If there is no bug of that name.
    """
    if name is None:
        yield
    else:
        with BUGS[name]():
            yield


def bug(plant: Callable[[], Iterator[None]]) -> Bug:
    """Turn a function into a bug with the same name, and register it."""
    found = contextmanager(plant)
    BUGS[plant.__name__.replace("_", "-")] = found
    return found


@bug
def error_in_clear() -> Iterator[None]:
    """Errors of tasks are stored in clear."""
    is_sealed = Cipher._is_sealed

    def forget(self: Cipher, place: SealedColumn) -> bool:
        return place.column != "error" and is_sealed(self, place)

    with patch.object(Cipher, "_is_sealed", forget):
        yield


@bug
def no_version_in_where() -> Iterator[None]:
    """P3: a write from an outdated copy succeeds, and the concurrent write is lost."""
    decide = Update.decide

    def overwrite(self: Update[Any], row: Row) -> Any:
        self.version = row.version or self.version
        return decide(self, row)

    with patch.object(Update, "decide", overwrite):
        yield


@bug
def claimed_twice() -> Iterator[None]:
    """P4: a claim trusts what the claim before has read, and does not read the tasks again."""
    known: dict[object, list[Record[Task]]] = {}

    def remembered(*arguments: Any) -> Iterator[Record[Task]]:
        *_, skills, _ = arguments
        tasks: dict[str, Record[Task]] = {}
        for task in (*known.get(skills, ()), *ready_tasks(*arguments)):
            tasks.setdefault(task.task_id, task)
        known[skills] = [*tasks.values()]
        return iter(tasks.values())

    with patch("openclaw_store.repositories.claim_choice.ready_tasks", remembered):
        yield


@bug
def watch_ahead() -> Iterator[None]:
    """P5: a watcher continues at the revision of the cache, though the feed was read before."""
    changes = Replica.changes

    async def skip(self: Replica, since: int) -> tuple[Sequence[Change], int]:
        found, until = await changes(self, since)
        return found, max(until, self.cache.applied.contiguous)

    with patch.object(Replica, "changes", skip):
        yield


@bug
def cache_before_commit() -> Iterator[None]:
    """P2: the cache takes changes before their commit, and keeps them when it fails."""
    apply, finish = Writer._apply, WriteTransaction.finish
    here = threading.local()

    def note(self: Writer, entries: Sequence[Any], until: float, began: float) -> bool:
        here.writer = self
        try:
            return apply(self, entries, until, began)
        finally:
            del here.writer

    def too_soon(self: WriteTransaction) -> None:
        finish(self)
        if hasattr(here, "writer"):
            here.writer.publish(self.committed)

    with patch.object(Writer, "_apply", note), patch.object(WriteTransaction, "finish", too_soon):
        yield


@bug
def entry_leak() -> Iterator[None]:
    """P7: each write leaves an entry in a list."""
    write, entries = Database.write, list[object]()

    def remember(self: Database, apply: Apply, operation: Any) -> Any:
        entries.append(object())
        return write(self, apply, operation)

    with patch.object(Database, "write", remember):
        yield


@bug
def descriptor_leak() -> Iterator[None]:
    """P7: each read leaves a file open."""
    read = Database.read

    def leave_open(self: Database, work: Any, **options: Any) -> Any:
        os.open(os.devnull, os.O_RDONLY)
        return read(self, work, **options)

    with patch.object(Database, "read", leave_open):
        yield


@bug
def late_wake_ups() -> Iterator[None]:
    """P6: the file is polled so rarely that foreign changes arrive late."""
    with (
        patch.multiple(notifications, SHORTEST_SECONDS=1.0, LONGEST_SECONDS=1.0),
        patch.object(FileWatch, "start", lambda self, path: False),
    ):
        yield


@bug
def forgotten_cluster() -> Iterator[None]:
    """P2: the statements of the first cluster that is opened are used for all others."""
    statements = dialects._statements
    first: dict[str, str | None] = {}

    def of_the_first(dialect: str, schema: str | None) -> Statements:
        return statements(dialect, first.setdefault(dialect, schema))

    with patch.object(dialects, "_statements", of_the_first):
        yield


@bug
def lost_reply_is_no_doubt() -> Iterator[None]:
    """P2: a commit without a reply is treated as a commit that has not happened."""
    meaning = PostgreSQLErrorMapping._meaning

    def in_no_doubt(
        self: PostgreSQLErrorMapping, error: Exception, *, own: bool, committing: bool
    ) -> StoreError | None:
        return meaning(self, error, own=own, committing=False)

    with patch.object(PostgreSQLErrorMapping, "_meaning", in_no_doubt):
        yield


@bug
def heartbeats_from_the_future() -> Iterator[None]:
    """A heartbeat never replaces an earlier one with a later time, though the clock went back."""

    def is_news_to(self: Heartbeat, record: Record[NodeInfo], now: object = None) -> bool:
        last = record.last_heartbeat
        return last is None or self.at >= last

    with patch.object(Heartbeat, "is_news_to", is_news_to):
        yield


@bug
def times_as_the_clock_says() -> Iterator[None]:
    """A change of a task is stamped with the present time, though the clock went back."""
    with patch.object(lifecycle, "_in_order", lambda _, now: now):
        yield


@bug
def acknowledge_before_commit() -> Iterator[None]:
    """P1: the writer answers its callers first, and commits afterwards."""
    commits = count()

    def too_soon(self: Writer, entries: Sequence[Any], until: float, began: float) -> bool:
        counters = statements_for(self._backend).counters
        self._session = self._session or self._backend.write_session(until, counters)
        self._session.begin(until)
        transaction = WriteTransaction(self._session.cursor, self._clock())
        outcomes: list[Any] = []
        for apply, run in groupby(entries, key=itemgetter(1)):
            outcomes.extend(apply(transaction, [operation for _, _, operation, _ in run]))
        transaction.finish()
        self.publish(transaction.committed, entries, outcomes)
        if next(commits):
            time.sleep(STALL_SECONDS)
        self._session.commit()
        return True

    with patch.object(Writer, "_apply", too_soon):
        yield


@bug
def revision_outside_transaction() -> Iterator[None]:
    """P2, P5: rows are committed first, and the feed of changes in a second transaction."""
    finish, commits = UnitOfWork.finish, count()

    def finish_afterwards(self: UnitOfWork) -> None:
        self.cursor.execute("COMMIT")
        if next(commits):
            time.sleep(STALL_SECONDS)
        self.cursor.execute("BEGIN IMMEDIATE" if self.cursor.dialect == "sqlite" else "BEGIN")
        finish(self)

    with patch.object(UnitOfWork, "finish", finish_afterwards):
        yield


@bug
def synchronous_off() -> Iterator[None]:
    """P1: a commit on SQLite returns before it is on the disk."""
    pragmas = (*WriteConnection.pragmas, "PRAGMA synchronous=OFF")
    with patch.object(WriteConnection, "pragmas", pragmas):
        yield


@bug
def abandoned_batch() -> Iterator[None]:
    """P2: a caller that is cancelled while its batch is in progress does not wait for it."""
    finish = WriteTransaction.finish

    async def withdraw(self: Writer, future: asyncio.Future[Any]) -> None:
        future.cancel()

    def finish_late(self: WriteTransaction) -> None:
        time.sleep(SLOW_DISK_SECONDS)  # else a fast disk closes the window before it is looked at
        finish(self)

    with (
        patch.object(Writer, "_withdraw", withdraw),
        patch.object(WriteTransaction, "finish", finish_late),
    ):
        yield


@bug
def deaf_handlers() -> Iterator[None]:
    """P4: a worker that has lost a task lets its handler go on."""
    interrupt = Attempt.interrupt

    def ignore(self: Attempt, reason: Interruption) -> None:
        if reason is not Interruption.LOST:
            interrupt(self, reason)

    with patch.object(Attempt, "interrupt", ignore):
        yield


@bug
def delete_before_archive() -> Iterator[None]:
    """The archive deletes rows of which it has written no file."""
    # Imported here, as pyarrow takes longer to load than all other bugs.
    from openclaw_store.archive import mover
    from openclaw_store.archive.manifest import write_file

    def write_nothing(folder: Any, layout: Any, path: str, table: Any, *more: Any) -> Any:
        written = write_file(folder, layout, path, table, *more)
        folder.remove(path)
        return written

    def read(folder: Any, file: Any, columns: Any) -> Any:
        return tables[file.path]

    tables: dict[str, Any] = {}

    def remember(folder: Any, layout: Any, path: str, table: Any, *more: Any) -> Any:
        tables[path] = table
        return write_nothing(folder, layout, path, table, *more)

    with patch.object(mover, "write_file", remember), patch.object(mover, "read_file", read):
        yield


@bug
def one_after_the_other() -> Iterator[None]:
    """P2: the clusters of a transaction have transactions of their own, which commit in turn."""
    open_unit = Unit.opened

    @asynccontextmanager
    async def opened(self: Unit, until: float, seconds: float) -> AsyncIterator[None]:
        async with AsyncExitStack() as stack:
            units = [Unit([database]) for database in self.databases]
            for unit in units:
                await stack.enter_async_context(open_unit(unit, until, seconds))
            self.sessions = [unit.sessions[0] for unit in units]
            yield

    async def commit_in_turn(self: Unit) -> None:
        for session in self.sessions:
            await session.commit()
            await asyncio.sleep(STALL_SECONDS)

    with patch.multiple(Unit, opened=opened, commit=commit_in_turn):
        yield


@bug
def resolve_without_asking() -> Iterator[None]:
    """P2: a prepared transaction is rolled back, whatever was decided."""

    async def never(*_: object) -> bool:
        return False

    with patch("openclaw_store.clusters.resolver.is_decided", never):
        yield


@bug
def arrival_is_not_noted() -> Iterator[None]:
    """A batch that has arrived arrives again after a crash."""
    from openclaw_store.clusters import transfers
    from openclaw_store.clusters.transit import arrive, settle

    def forget(transaction: WriteTransaction, arrivals: Sequence[Any]) -> Sequence[Any]:
        refused = arrive(transaction, arrivals)
        cursor = transaction.cursor
        cursor.execute(f"DELETE FROM {qualified(cursor.schema, 'incoming')}")
        return refused

    def settle_late(transaction: WriteTransaction, settlements: Sequence[Any]) -> Sequence[Any]:
        time.sleep(STALL_SECONDS)
        return settle(transaction, settlements)

    with patch.multiple(transfers, arrive=forget, settle=settle_late):
        yield
