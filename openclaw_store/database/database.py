"""`Database`: open, read, write, copy and close one database."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import aclosing, asynccontextmanager
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from sqlalchemy import Connection, func, select
from sqlalchemy.ext.asyncio import AsyncSession

from openclaw_store.backends import (
    STOPPING_SECONDS,
    Follower,
    Notifier,
    OnCommit,
    PostgreSQL,
    cancel_once,
    ended_badly,
    notify_of_commits,
    on_thread,
    refuse_location,
    shield_until_done,
)
from openclaw_store.backends.sqlite import files as sqlite
from openclaw_store.database.database_base import DatabaseBase
from openclaw_store.database.group_commit import Apply, Listener
from openclaw_store.database.joined import hold_of, in_savepoint
from openclaw_store.database.rekeying import Rekeyed, Report, rekey
from openclaw_store.database.tables import NodeRow, TaskRow
from openclaw_store.database.transactions import (
    Unit,
    commit_unit,
    current_blocks,
    deadline,
    holds_here,
    open_block,
)
from openclaw_store.database.write_transaction import WriteTransaction
from openclaw_store.domain import check_limit_seconds
from openclaw_store.encryption import Sealed
from openclaw_store.errors import StoreError

Result = TypeVar("Result")


class Database(DatabaseBase):
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
        unit = Unit([self])
        async with open_block([unit], self._seconds(timeout), partial(commit_unit, unit)) as [tx]:
            yield tx

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
        held = [*holds_here()]
        if (self, hold) not in held:
            self.refuse_inside()
            held.append((self, hold))
        seconds = self._seconds(timeout)
        with self._backend.error_mapping.mapped(own=False):
            with self._backend.error_mapping.mapped():
                until = time.monotonic() + self.timeout
                connection = await self._backend.join(
                    session, self.statements.counters, until, seconds
                )
            current_blocks.set(tuple(held))  # until the caller's commit
            cursor = self._backend.cursor(connection)
            transaction = WriteTransaction(cursor, self.clock(), self.statements)
            block = in_savepoint(
                session, transaction, hold, {"database": self}, self.schema,
                self._backend.error_mapping.mapped,
            )  # fmt: skip
            async with deadline(seconds), block as tx:
                yield tx

    def _seconds(self, timeout: float | None) -> float:
        limit = self.transaction_timeout if timeout is None else timeout
        return check_limit_seconds("timeout", limit)

    async def read(
        self, work: Callable[[AsyncSession], Awaitable[Result]], *, is_one_statement: bool = False
    ) -> Result:
        """Run `work` with a session, in its own task, so that cancelling the caller is safe.

        Args:
            is_one_statement: It reads by one statement: so two round trips to a server are saved.
        """
        options = self._backend.one_statement if is_one_statement else None

        async def in_own_task() -> Result:
            with self._backend.error_mapping.mapped(reading=True):
                async with aclosing(self._sessions_here().own_sessions()) as session:
                    if options:
                        await session.connection(execution_options=options)
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
        return await on_thread(partial(self._backend.inspect, work))

    async def alter(self, work: Callable[[Connection], Result]) -> Result:
        """Run `work`, which changes the schema, on a thread, in a transaction of its own.

        It excludes all migrations. The schema is not checked: only repairs may need this.

        Raises:
            UnavailableError: If the database is locked, or cannot be reached.
        """
        self._check_process()
        return await shield_until_done(asyncio.to_thread(self._backend.migrate, work))

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
        """Return the clear value of a `Sealed` object from a query of your own.

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

    def follow(
        self, on_commit: OnCommit, known_revision: Callable[[], int] | None = None
    ) -> Notifier:
        """Call `on_commit`, on any thread, after possible commits of any process.

        Args:
            known_revision: Return the newest revision that the caller knows. With it, a database
                whose notifications do not arrive is polled; without, it is asked every 10 s.
        """
        self._check_ready()
        backend = self._backend
        if self._sharing is not None and isinstance(backend, PostgreSQL):
            counters, registry = self.statements.counters, backend.registry
            return self._sharing.follow(
                Follower(backend.schema, counters, on_commit, known_revision, registry)
            )
        return notify_of_commits(backend, self.statements.counters, on_commit, known_revision)

    def write_without_notifications(self) -> None:
        """Send no notification and take no advisory lock from now on; the server may lack both.

        Processes that follow the database poll it. Each batch of writes takes a transaction of
        several statements, in place of one call. No effect on SQLite.
        """
        self._backend.notifies = False

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
        """Release the space of removed rows; on SQLite, writers wait for this.

        Raises:
            UnavailableError: If the database is locked, the disk is full, or the role is no owner.
        """
        self._check_ready()
        self.refuse_inside()
        if self.dialect == "postgresql":
            task = asyncio.ensure_future(on_thread(self._backend.vacuum))
            self._background.add(task)  # `close` waits for it
            task.add_done_callback(self._background.discard)
            await task
            return
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
