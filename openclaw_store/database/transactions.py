"""The write transactions of callers: each is one block, over one database or several.

All databases of a `Unit` are on one server, and share its engine transaction. The locks of a block
are taken in one order everywhere, so that two blocks never wait for each other.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any

from sqlalchemy.exc import SQLAlchemyError
from sqlalchemy.ext.asyncio import AsyncSession

from openclaw_store.backends import cancel_once, shield_until_done
from openclaw_store.database.joined import Hold
from openclaw_store.database.sessions import session_beside
from openclaw_store.database.telemetry import note_commit
from openclaw_store.database.write_transaction import WriteTransaction
from openclaw_store.errors import BackendError, DeadlineError, StoreError

if TYPE_CHECKING:
    from openclaw_store.database.database_base import DatabaseBase

current_blocks: ContextVar[tuple[tuple[DatabaseBase, WriteTransaction | Hold], ...]] = ContextVar(
    "current_blocks", default=()
)
"""The databases that the running asyncio task, or the task that made it, has locked by
`transaction` and `joined`."""


class Unit:
    """One engine transaction.

    Args:
        databases: On one server, in the order of their locks.
        notifies: Notify the listeners of other processes when it commits.
    """

    def __init__(self, databases: Sequence[DatabaseBase], *, notifies: bool = True) -> None:
        self.databases = databases
        self.sessions: list[AsyncSession] = []
        """The session of each database, once it is open."""
        self._notifies = notifies
        self._lock = asyncio.Lock()  # all sessions share one connection

    @property
    def transactions(self) -> list[WriteTransaction]:
        """The transaction of each database, once it is open."""
        return [session.info["transaction"] for session in self.sessions]

    @asynccontextmanager
    async def opened(self, until: float, seconds: float) -> AsyncIterator[None]:
        """Begin with the write locks; roll back at the end unless it was committed.

        Args:
            until: Deadline for the locks, by `time.monotonic`.
            seconds: Limit for the whole block.
        """
        first = self.databases[0]
        backend, session = first._backend, first._sessions_here().write_sessions()
        session.info["seconds"] = seconds
        self.sessions = [session]
        try:
            # The statements of the block are the caller's: its SQL errors stay as they are.
            with backend.error_mapping.mapped(own=False):
                with backend.error_mapping.mapped():
                    counters = [one.statements.counters for one in self.databases]
                    begin = backend.begin(session, counters, until, notifies=self._notifies)
                    connection = await cancel_once(begin)
                    self.sessions += [
                        await session_beside(session, one.schema, {"database": one})
                        for one in self.databases[1:]
                    ]
                transactions = [
                    WriteTransaction(one._backend.cursor(connection), one.clock(), one.statements)
                    for one in self.databases
                ]
                for one, transaction in zip(self.sessions, transactions, strict=True):
                    one.info.update(
                        transaction=transaction, transactions=transactions, cursor_lock=self._lock
                    )
                yield
        except BackendError:
            # A rollback could wait for an answer on a broken connection.
            await shield_until_done(session.invalidate())
            raise
        finally:
            for one in self.sessions[1:]:
                await shield_until_done(one.close())
            await shield_until_done(backend.end(session))

    async def write(self) -> None:
        """Write the collected changes."""
        for session in self.sessions:
            await session.flush()
        async with self._lock:  # a call that the block did not await may write
            for database, session in zip(self.databases, self.sessions, strict=True):
                with database._backend.error_mapping.mapped():
                    await session.run_sync(lambda one: one.info["transaction"].finish())

    async def commit(self) -> None:
        """Commit in one phase."""
        try:
            await self.sessions[0].commit()
        except (SQLAlchemyError, OSError) as error:
            mapping = self.databases[0]._backend.error_mapping
            raise mapping.map_error(error, committing=True) from error

    async def send(self, sql: str) -> None:
        """Run statements of PostgreSQL that end a transaction, or follow its end."""
        with self.databases[0]._backend.error_mapping.mapped():
            raw: Any = await (await self.sessions[0].connection()).get_raw_connection()
            await raw.driver_connection.execute(sql)

    def publish(self) -> None:
        """Tell the caches of this process; call it under the locks, as events are in order."""
        for database, transaction in zip(self.databases, self.transactions, strict=True):
            transaction.undo.clear()
            writer = database.writer
            writer.publish(transaction.committed)
            note_commit(writer.telemetry, 1, None, transaction.committed, ())


@asynccontextmanager
async def open_block(
    units: Sequence[Unit], seconds: float, commit: Callable[[], Awaitable[None]]
) -> AsyncIterator[list[AsyncSession]]:
    """Open units as one block, and yield the session of each database, in the same order.

    Args:
        seconds: Limit for the block.
        commit: Writes, commits and publishes all units; not called if the block rolls back.

    Raises:
        DeadlineError: If the block took longer, or a write lock was not free in time.
    """
    databases = [database for unit in units for database in unit.databases]
    for database in databases:
        database._check_ready()
        database.refuse_inside()
    async with AsyncExitStack() as stack:
        # First the locks in this process, then those of the databases: the writer does the same.
        until = 0.0
        for database in databases:
            until = await stack.enter_async_context(database._exclusive("a transaction"))
        for unit in units:
            await stack.enter_async_context(unit.opened(until, seconds))
        transactions = [one for unit in units for one in unit.transactions]
        current_blocks.set((*current_blocks.get(), *zip(databases, transactions, strict=True)))
        try:
            async with deadline(seconds):
                yield [session for unit in units for session in unit.sessions]
            for one in transactions:
                if one.failure is not None:
                    text = "a write in the transaction failed, so all of it was rolled back"
                    raise StoreError(text) from one.failure
            if not any(one.finished for one in transactions):  # else the block rolled back itself
                await shield_until_done(commit())
        finally:
            for one in transactions:
                one.finished = True
                for restore in reversed(one.undo):
                    restore()
            current_blocks.set(tuple(holds_here()))  # also those of `joined`, begun in the block


async def commit_unit(unit: Unit) -> None:
    """Write, commit and publish a unit that commits in one phase."""
    await unit.write()
    await unit.commit()
    unit.publish()
    await asyncio.sleep(0)  # the caches of this loop apply the events before the caller runs


@asynccontextmanager
async def deadline(seconds: float) -> AsyncIterator[None]:
    """Limit the time of a block.

    Raises:
        DeadlineError: If it takes longer.
    """
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


def holds_here() -> Iterator[tuple[DatabaseBase, WriteTransaction | Hold]]:
    """Yield the databases that the running asyncio task has locked, and still holds."""
    return (one for one in current_blocks.get() if not one[1].finished)


async def is_beside(database: DatabaseBase, other: DatabaseBase) -> bool:
    """Return true if one engine transaction can write to both."""
    return await database._backend.is_beside(other._backend)


async def end_prepared(database: DatabaseBase, gid: str, *, commit: bool) -> bool:
    """Commit or roll back a prepared transaction, and notify; `False` if it was ended before."""
    return await database._backend.end_prepared(gid, commit=commit)
