"""`Database`: open, read, write, copy and close one database."""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine
from contextlib import aclosing, asynccontextmanager
from contextvars import ContextVar
from functools import partial
from pathlib import Path
from typing import Any, Self, TypeVar

from sqlalchemy import Connection, func, select
from sqlalchemy.exc import SQLAlchemyError
from sqlalchemy.ext.asyncio import AsyncSession, async_sessionmaker

from openclaw_store.backends import (
    DEFAULT_ANSWER_SECONDS,
    DEFAULT_LOCATION,
    DEFAULT_TIMEOUT_SECONDS,
    PLACE,
    STOPPING_SECONDS,
    CounterStatements,
    Notifier,
    OnCommit,
    backend_of,
    cancel_once,
    ended_badly,
    notify_of_commits,
    on_thread,
    refuse_location,
    shield_until_done,
    was_interrupted,
)
from openclaw_store.backends.sqlite import files as sqlite
from openclaw_store.database import legacy_import, migrations, sealing
from openclaw_store.database.group_commit import CLOSED, Apply, Listener, Writer
from openclaw_store.database.joined import Hold, hold_of, in_savepoint
from openclaw_store.database.private_folder import private_folder
from openclaw_store.database.rekeying import Rekeyed, Report, rekey
from openclaw_store.database.sealed_entities import open_when_loaded
from openclaw_store.database.sessions import LoopSessions
from openclaw_store.database.slices import Slices
from openclaw_store.database.statements import Statements, statements_for
from openclaw_store.database.tables import NodeRow, TaskRow
from openclaw_store.database.telemetry import note_commit
from openclaw_store.database.write_queue import FairLock
from openclaw_store.database.write_transaction import WriteTransaction
from openclaw_store.domain import (
    MAX_JSON_BYTES,
    Clock,
    check_limit_seconds,
    check_positive,
    utc_now,
)
from openclaw_store.encryption import KeyRing, Sealed, keys_of
from openclaw_store.errors import (
    BackendError,
    DeadlineError,
    StoreError,
    UnavailableError,
    logger_of,
)

logger = logger_of("database")

Result = TypeVar("Result")

_inside: ContextVar[tuple[Database, WriteTransaction | Hold] | None] = ContextVar(
    "inside", default=None
)
"""The `transaction()` or `joined()` of the running asyncio task, or of the task that made it."""

_forks = 0
"""Number of forks between the import of this module and this process."""


def _note_fork() -> None:
    global _forks
    _forks += 1


if hasattr(os, "register_at_fork"):  # cheaper than `os.getpid` in each call
    os.register_at_fork(after_in_child=_note_fork)


class Database:
    """One database of tasks and nodes: a SQLite file, or a database on a PostgreSQL server.

    **Durability.** A write that returns is committed and on the disk.
    **Sharing.** One instance serves any number of coroutines, and several event loops in threads
    of their own. Writers queue, first come first served; readers never wait for writers.
    **Processes.** Any number may open the same database. A child of `fork` cannot use an object of
    its parent, nor on SQLite the file; it gets an error at once.

    Args:
        db_path: A path, an SQLAlchemy URL of SQLite, or `":memory:"`, a private database that is
            deleted at `close`; or a URL of PostgreSQL, as in
            `postgresql://user:password@host/database`. Folders are made; nothing is opened yet.
        clock: Returns the time for all stamps and comparisons, except in `Task.create`.
        timeout: Seconds that a call waits for its turn and for locks.
        answer_timeout: Seconds that a server may take to answer a statement of the library. A
            server that takes longer counts as gone: the next call connects anew.
        transaction_timeout: Seconds that a `transaction()` may take.
        pool_size: Most connections of `session()` blocks; the library's own reads use others.
        max_json_bytes: Longest JSON of a field to store, up to 16 MiB; stored values may be longer.
        legacy_timezone: Time zone of a legacy database to import; `None` for the local zone.
        cluster: Name of one of many clusters: a schema on PostgreSQL (`None` for `public`), or a
            file, the name of which stands for `{cluster}` in `db_path`.
        keys: The keys that seal and open values; `None` for those of `OPENCLAW_STORE_KEYS`, if
            that is set, and for values in clear otherwise.

    Raises:
        InvalidDataError: If `db_path` is not one of these, or a name or the time zone is refused.
        KeyRingError: If the file of `OPENCLAW_STORE_KEYS` cannot be used.
        UnavailableError: If the folder cannot be made.
    """

    def __init__(
        self,
        db_path: str | Path = DEFAULT_LOCATION,
        *,
        clock: Clock = utc_now,
        timeout: float = DEFAULT_TIMEOUT_SECONDS,
        answer_timeout: float = DEFAULT_ANSWER_SECONDS,
        transaction_timeout: float = 5.0,
        pool_size: int = 5,
        max_json_bytes: int = MAX_JSON_BYTES,
        legacy_timezone: str | None = None,
        cluster: str | None = None,
        keys: KeyRing | None = None,
    ) -> None:
        self.keys = keys_of(keys)
        self.max_json_bytes = check_positive("max_json_bytes", max_json_bytes, MAX_JSON_BYTES)
        self._legacy_timezone = legacy_import.zone_of(legacy_timezone)
        self.clock = clock
        self.timeout = timeout = check_limit_seconds("timeout", timeout)
        self.transaction_timeout = check_limit_seconds("transaction_timeout", transaction_timeout)
        self._pool_size = check_positive("pool_size", pool_size)
        self._remove_folder: Callable[[], object] = lambda: None
        location = db_path
        if db_path == ":memory:":
            folder, self._remove_folder = private_folder(self)
            location = folder / ("memory.db" if cluster is None else PLACE)
        answer_timeout = check_limit_seconds("answer_timeout", answer_timeout)
        self._backend = backend_of(location, timeout, answer_timeout, cluster)
        self._backend.make_folder()
        self.dialect, self.cluster = self._backend.dialect, cluster
        """`sqlite` or `postgresql`, and the name of the cluster."""
        self.schema = self._backend.schema
        """The schema of the tables, to be named in SQL text; `None` on SQLite."""
        is_given = self.dialect == "sqlite" and cluster is None
        self.db_path = str(db_path) if is_given else self._backend.location
        """The given location, without a password."""
        self._forks = _forks
        self._state = "new"
        self._write_lock = FairLock(timeout)
        self._sealing_statements: Statements | None = None
        self._writer = Writer(
            self._backend, self._write_lock, clock, timeout, lambda: self.statements
        )
        self._home: asyncio.AbstractEventLoop | None = None
        self._loop_sessions: dict[asyncio.AbstractEventLoop, LoopSessions] = {}
        self._background: set[asyncio.Task[Any]] = set()  # `close` waits for these reads
        self._closing: asyncio.Future[None] | None = None

    def __repr__(self) -> str:
        return f"<Database {self.db_path!r}, {self._state}>"

    async def initialize(self, migrate: bool = True, *, is_copy_target: bool = False) -> None:
        """Open the database; may be called twice.

        Args:
            migrate: Make or upgrade the schema; `False` refuses one that is not up to date.
            is_copy_target: Accept the target of an interrupted `copy`; for `copy` alone.

        Raises:
            SchemaMismatchError: If the schema is newer, or older and `migrate` is off.
            KeyRingError: If values are sealed by a key that is missing.
            UnavailableError: If the file cannot be used; with the remedy.
        """
        self._check_process()
        async with self._exclusive("a migration"):
            if self._state != "new":
                self._check_ready()  # raises if it is closed
                return
            if self.keys is not None:
                await self.keys.unlock()
            await shield_until_done(asyncio.to_thread(self._open, migrate, is_copy_target))
            if self._state == "new":  # otherwise it was closed meanwhile
                self._home = asyncio.get_running_loop()
                self._state = "ready"

    def _open(self, migrate: bool, is_copy_target: bool) -> None:
        accept = partial(migrations.accept, self._backend, is_copy_target=is_copy_target)
        self._backend.prepare(accept)
        check = sealing.require_no_keys if self.keys is None else sealing.accept
        if not (is_copy_target and migrations.is_half_copied(self._backend)):
            if migrate:
                zone, keys = self._legacy_timezone, self.keys
                migrations.upgrade(self._backend, zone, self.clock, keys, check)
            else:
                migrations.require(self._backend, check)
        if self.keys is not None:
            open_statements = sealing.open_statements
            self._sealing_statements = open_statements(self._backend, self.keys, self.clock)
            open_when_loaded()

    async def close(self) -> None:
        """Commit the queue and close all connections; call it again after an interruption."""
        if self._forks != _forks:
            return  # the connections belong to the parent process
        if self._closing is None or was_interrupted(self._closing):
            self.refuse_inside()
            self._closing = asyncio.ensure_future(self._close())
        self._state = "closed"
        if self._closing.get_loop() is asyncio.get_running_loop():
            await shield_until_done(self._closing)

    async def _close(self) -> None:
        loop = asyncio.get_running_loop()
        await asyncio.gather(
            *[task for task in self._background if task.get_loop() is loop], return_exceptions=True
        )
        await self._writer.close()
        try:
            async with self._exclusive("closing"):
                pass  # the last transaction has ended, as later ones are refused
        except DeadlineError as error:
            logger.warning("closing in spite of a transaction: %s", error)
        for sessions in list(self._loop_sessions.values()):
            await sessions.close()
        self._loop_sessions.clear()
        self._backend.dispose()
        self._remove_folder()

    async def __aenter__(self) -> Self:
        await self.initialize()
        return self

    async def __aexit__(self, *error: object) -> None:
        await self.close()

    @property
    def session_factory(self) -> async_sessionmaker[AsyncSession]:
        """The factory of the sessions of `session()` on the running event loop; read-only."""
        return self._sessions_here().sessions

    @property
    def statements(self) -> Statements:
        """The SQL of the library, and the codecs of rows, which seal and open values with keys."""
        return self._sealing_statements or statements_for(self)

    @property
    def slices(self) -> Slices:
        """The long computations of the running event loop."""
        return self._sessions_here().slices

    @property
    def writer(self) -> Writer:
        """The writer of this object, with its figures and its telemetry."""
        return self._writer

    @property
    def checked_out_connections(self) -> int:
        """Connections in use by sessions, on all event loops."""
        return sum(len(one.checked_out) for one in list(self._loop_sessions.values()))

    @asynccontextmanager
    async def session(self) -> AsyncIterator[AsyncSession]:
        """Open a read-only session on one consistent snapshot.

        Raises:
            UnavailableError: If the database is not open, or cannot be read.
        """
        session = self._sessions_here().sessions()
        with self._backend.error_mapping.mapped(own=False, reading=True):
            try:
                await cancel_once(session.connection())
                yield session
            finally:
                await shield_until_done(session.close())

    @asynccontextmanager
    async def transaction(self, *, timeout: float | None = None) -> AsyncIterator[AsyncSession]:
        """Open a session that writes; commit at the end of the block, roll back if it raises.

        The block holds the write lock: keep it short. Write tasks and nodes with
        `TaskRepository(tx)` and `NodeRepository(tx)`, which update the change log and the caches.

        Args:
            timeout: Seconds that the block may take; `None` for `transaction_timeout`.

        Raises:
            DeadlineError: If the block took longer, or the write lock was not free in time.
            InvalidDataError: If `timeout` is not a positive number.
            UnavailableError: If the database is not open, or cannot be written.
            OutcomeUnknownError: If the disk failed while committing.
        """
        self._check_ready()
        self.refuse_inside()
        limit = self.transaction_timeout if timeout is None else timeout
        seconds = check_limit_seconds("timeout", limit)
        async with self._exclusive("a transaction") as until:
            session = self._sessions_here().write_sessions()
            session.info["seconds"] = seconds
            try:
                # The statements of the block are the caller's: its SQL errors stay as they are.
                with self._backend.error_mapping.mapped(own=False):
                    with self._backend.error_mapping.mapped():
                        begin = self._backend.begin(session, self._counters, until)
                        connection = await cancel_once(begin)
                    transaction = WriteTransaction(
                        self._backend.cursor(connection), self.clock(), self.statements
                    )
                    session.info.update(transaction=transaction, cursor_lock=asyncio.Lock())
                    outside = _inside.get()
                    _inside.set((self, transaction))
                    try:
                        async with self._deadline(seconds):
                            yield session
                        if transaction.failure is not None:
                            text = "a write in the transaction failed, so all of it was rolled back"
                            raise StoreError(text) from transaction.failure
                        if not transaction.finished:  # otherwise the block rolled back by itself
                            await shield_until_done(self._commit(session, transaction))
                    finally:
                        transaction.finished = True
                        _inside.set(outside)
                        for restore in reversed(transaction.undo):
                            restore()
            except BackendError:
                # A rollback could wait for an answer on a broken connection.
                await shield_until_done(session.invalidate())
                raise
            finally:
                await shield_until_done(self._backend.end(session))

    @asynccontextmanager
    async def joined(
        self, session: AsyncSession, *, timeout: float | None = None
    ) -> AsyncIterator[AsyncSession]:
        """Write tasks and nodes in the transaction of your own session, with your own rows.

        Commit `session` yourself: its rows, tasks and nodes commit together, or not at all. The
        block is a savepoint; if it raises, what it wrote is undone. From its beginning until your
        commit, the write lock is held: keep that short. Caches show the writes after the commit.

        Args:
            session: A session of an engine of yours on the same database, in READ COMMITTED.
            timeout: Seconds that the block may take, and that the server lets your transaction be
                idle then; `None` for `transaction_timeout`.

        Raises:
            DeadlineError: If the block took longer; your whole transaction is rolled back.
            InvalidDataError: If the session has another database, driver or isolation.
            UnavailableError: If the write lock was not free in time; roll back.
        """
        self._check_ready()
        hold = hold_of(session, self)
        inside = _inside.get()
        if inside is None or inside[1] is not hold:
            self.refuse_inside()
        limit = self.transaction_timeout if timeout is None else timeout
        seconds = check_limit_seconds("timeout", limit)
        with self._backend.error_mapping.mapped(own=False):
            with self._backend.error_mapping.mapped():
                until = time.monotonic() + self.timeout
                connection = await self._backend.join(session, self._counters, until, seconds)
            _inside.set((self, hold))  # until the caller's commit
            cursor = self._backend.cursor(connection)
            transaction = WriteTransaction(cursor, self.clock(), self.statements)
            block = in_savepoint(
                session, transaction, hold, {"database": self}, self.schema,
                self._backend.error_mapping.mapped,
            )  # fmt: skip
            async with self._deadline(seconds), block as tx:
                yield tx

    @asynccontextmanager
    async def _deadline(self, seconds: float) -> AsyncIterator[None]:
        limit = asyncio.timeout(seconds)
        try:
            async with limit:
                yield
        except TimeoutError as error:
            if not limit.expired():
                raise
            raise DeadlineError(
                f"the transaction took longer than {seconds:g} s and was rolled back: "
                "do the slow part outside, or pass transaction(timeout=…)"
            ) from error

    async def _commit(self, session: AsyncSession, transaction: WriteTransaction) -> None:
        async with session.info["cursor_lock"]:  # a call that the block did not await may write
            with self._backend.error_mapping.mapped():
                await session.run_sync(lambda _: transaction.finish())
        try:
            await session.commit()
        except (SQLAlchemyError, OSError) as error:
            raise self._backend.error_mapping.map_error(error, committing=True) from error
        transaction.undo.clear()
        # Still under the write lock: events must be in the order of commits.
        self._writer.publish(transaction.committed)
        note_commit(self._writer.telemetry, 1, None, transaction.committed, ())
        await asyncio.sleep(0)  # the caches of this loop apply the events before the caller runs

    async def read(self, work: Callable[[AsyncSession], Awaitable[Result]]) -> Result:
        """Run `work` with a session, in its own task, so that cancelling the caller is safe."""

        async def in_own_task() -> Result:
            with self._backend.error_mapping.mapped(reading=True):
                async with aclosing(self._sessions_here().own_sessions()) as session:
                    return await work(session)

        task = asyncio.ensure_future(in_own_task())
        self._background.add(task)
        task.add_done_callback(self._background.discard)
        try:
            return await asyncio.shield(task)
        except asyncio.CancelledError:
            task.add_done_callback(ended_badly)
            task.get_loop().call_later(STOPPING_SECONDS, task.cancel)
            raise

    async def inspect(self, work: Callable[[Connection], Result]) -> Result:
        """Run `work`, which reads, on a thread, with any schema, before or after `initialize`.

        Raises:
            UnavailableError: If the database cannot be reached.
        """
        self._check_process()
        return await shield_until_done(asyncio.to_thread(self._backend.inspect, work))

    async def alter(self, work: Callable[[Connection], Result]) -> Result:
        """Run `work`, which changes the schema, on a thread, in a transaction of its own.

        It excludes all migrations. The schema is not checked: only repairs may need this.

        Raises:
            UnavailableError: If the database is locked, or cannot be reached.
        """
        self._check_process()
        return await shield_until_done(asyncio.to_thread(self._backend.migrate, work))

    def write(self, apply: Apply, operation: Any) -> Coroutine[Any, Any, Any]:
        """Submit an operation to the writer; the coroutine returns its result after the commit.

        Raises:
            DeadlineError: Inside a `transaction()`, for which it would wait forever.
        """
        self._check_ready()
        self.refuse_inside()
        return self._writer.submit(apply, operation)

    async def read_in(
        self, session: AsyncSession, work: Callable[[AsyncSession], Awaitable[Result]]
    ) -> Result:
        """Run `work`, which reads, with a session of the caller.

        Only errors raised in `work` are mapped: a `TimeoutError` of the block may be the caller's.
        """
        with self._backend.error_mapping.mapped():
            return await work(session)

    async def write_in(self, session: AsyncSession, apply: Apply, operation: Any) -> Any:
        """Apply an operation in the transaction of `session`, and return its result."""
        transaction = session.info.get("transaction")
        if transaction is None or transaction.finished:
            raise StoreError("this session only reads: take one from `async with transaction()`")
        async with session.info["cursor_lock"]:  # the transaction has one cursor
            try:
                with self._backend.error_mapping.mapped():
                    outcome = (await session.run_sync(lambda _: apply(transaction, [operation])))[0]
            except BaseException as error:
                transaction.failure = error  # a part may be written, so it must not commit
                raise
        if isinstance(outcome, BaseException):
            raise outcome
        return outcome

    def unseal(self, sealed: Sealed, row_id: str) -> Any:
        """Return the value of a sealed one that a query of your own has returned.

        Args:
            row_id: The identifier of its row; of a change, the item as well: `task:train-7`.

        Raises:
            SealedValueError: If it belongs to another row, or was damaged.
        """
        return sealed.open_with(self.statements.protection, row_id)

    async def rekey(
        self, *, accept_clear: bool = False, dry_run: bool = False, report: Report | None = None
    ) -> Rekeyed:
        """Seal all values again by the primary key; without one, store all of them in clear.

        Reads and writes continue. After an interruption, call it again: it continues.

        Args:
            accept_clear: Seal values in clear even if all values were sealed before: such a value
                was written by hand, or damaged. Without this, they are problems.
            dry_run: Only count the rows.
            report: Receives the table, and the numbers of rows that are done and in all.

        Raises:
            KeyRingError: If the database was opened without keys.
        """
        return await rekey(self, accept_clear=accept_clear, dry_run=dry_run, report=report)

    def listen(self, listener: Listener) -> Callable[[], None]:
        """Call `listener` on this loop with committed events; return the function that ends it."""
        return self._writer.listen(asyncio.get_running_loop(), listener)

    def follow(self, on_commit: OnCommit) -> Notifier:
        """Call `on_commit`, on any thread, after possible commits of any process."""
        self._check_ready()
        return notify_of_commits(self._backend, self._counters, on_commit)

    async def backup(self, path: str | Path, *, overwrite: bool = False) -> None:
        """Copy one consistent snapshot to a file; for PostgreSQL, an archive for `pg_restore`.

        Reads and writes continue. The file gets its name when it is complete.

        Raises:
            InvalidDataError: If `path` exists and `overwrite` is off, or is the database itself.
            UnavailableError: If it cannot be written there.
        """
        self._check_ready()
        refuse_location("path", path)
        await on_thread(partial(self._backend.backup, sqlite.file_of(path), overwrite=overwrite))

    async def vacuum(self) -> None:
        """Release the space of removed rows; writers wait for this, readers do not.

        Raises:
            UnavailableError: If the database is locked, the disk is full, or the role is no owner.
        """
        self._check_ready()
        self.refuse_inside()
        async with self._exclusive("a vacuum"):
            self._check_ready()
            await on_thread(self._backend.vacuum)

    async def get_stats(self) -> dict[str, Any]:
        """Return the metrics of the database and of the writer of this object.

        Returns:
            Location and size (`db_…`), rows (`…_count`), rows by status (`…_stats`), and under
            `writer` the queue, batches, commit times and failures. The reference lists all keys
            (docs/reference/metrics.md). A key without a figure yet is `None`.
        """

        async def count(session: AsyncSession) -> tuple[int, list[dict[str, int]]]:
            counts = []
            for row in (TaskRow, NodeRow):
                query = select(row.status, func.count()).group_by(row.status)
                counts.append({one.value: number for one, number in await session.execute(query)})
            return await self._backend.size(session), counts

        # One read: size and counts belong to one snapshot.
        size, (tasks, nodes) = await self.read(count)
        return {
            "db_path": self.db_path,
            "db_size": size,
            "task_count": sum(tasks.values()),
            "node_count": sum(nodes.values()),
            "task_stats": tasks,
            "node_stats": nodes,
            "writer": self._writer.figures(),
        }

    @asynccontextmanager
    async def _exclusive(self, holder: str) -> AsyncIterator[float]:
        """Hold the write lock; yield the deadline for all further locks."""
        until = time.monotonic() + self.timeout
        await self._write_lock.acquire_async(holder, until)
        try:
            yield until
        finally:
            self._write_lock.release()

    @property
    def _counters(self) -> CounterStatements:
        return self.statements.counters  # compiled at the first use

    def _sessions_here(self) -> LoopSessions:
        self._check_ready()
        loop = asyncio.get_running_loop()
        if loop not in self._loop_sessions:
            for other in list(self._loop_sessions):
                if other.is_closed() and other is not self._home:  # `close` closes its pool
                    self._loop_sessions.pop(other, None)
            # A pool cannot serve two loops, so only the first one keeps its connections.
            pool_size = self._pool_size if loop is self._home else None
            self._loop_sessions[loop] = LoopSessions(
                loop, self._backend, {"database": self}, self.timeout, pool_size
            )
        return self._loop_sessions[loop]

    def _check_process(self) -> None:
        if self._forks != _forks:
            advice = {"sqlite": "start the child by spawn"}
            remedy = advice.get(self.dialect, "open a new Database in the child")
            raise UnavailableError(f"{self.db_path} was opened before fork: {remedy}")

    def _check_ready(self) -> None:
        if self._state == "ready" and self._forks == _forks:
            return
        self._check_process()
        if self._state == "new":
            raise UnavailableError(f"{self.db_path} is not open yet: call initialize() first")
        raise UnavailableError(f"{self.db_path}: {CLOSED}")

    def refuse_inside(self) -> None:
        """Raise `DeadlineError` inside a `transaction()`, for which a write would wait forever."""
        inside = _inside.get()
        if inside is not None and inside[0] is self and not inside[1].finished:
            raise DeadlineError(
                "this call would wait for the transaction it is in: use the session of the "
                "transaction, as in TaskRepository(tx)"
            )
