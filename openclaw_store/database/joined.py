"""Writes in the transaction of the caller: `Database.joined`.

The caller's own rows and the store's commit together, or not at all. Each block is a savepoint, so
a block that fails undoes what it wrote, and leaves the caller's rows. The write lock is the one of
the database, held until the caller's transaction ends; an ordinary notification tells the caches,
those of this process too, when it commits.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

from sqlalchemy import event
from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession, AsyncSessionTransaction
from sqlalchemy.orm import Session, SessionTransaction

from openclaw_store.backends import shield_until_done
from openclaw_store.database.sessions import session_beside
from openclaw_store.database.write_transaction import WriteTransaction
from openclaw_store.errors import InvalidDataError, StoreError

_HOLDS = "openclaw_store_holds"
"""The key in the `info` of a caller's session: its holds of write locks, by database."""


class Hold:
    """The write lock of one database, in the transaction of a caller's session."""

    def __init__(self) -> None:
        self.finished = False
        """True if the caller's transaction has ended."""
        self.undo: list[tuple[SessionTransaction | None, Callable[[], None]]] = []
        """Called in reverse order if it did not commit, each with the savepoint of the caller in
        which it was written: that may be rolled back alone."""

    def restore(self, is_undone: Callable[[SessionTransaction | None], bool]) -> None:
        """Restore what was written in the savepoints that are undone."""
        given, self.undo = self.undo, []
        for savepoint, undo in reversed(given):
            if is_undone(savepoint):
                undo()
            else:
                self.undo.insert(0, (savepoint, undo))


def hold_of(session: AsyncSession, database: object) -> Hold:
    """Return the hold of a database in the current transaction of `session`; make it if necessary.

    Raises:
        InvalidDataError: If another transaction may decide on the commit of this one.
    """
    if not isinstance(session, AsyncSession):
        raise InvalidDataError("session", f"must be an AsyncSession, not {type(session).__name__}")
    if "database" in session.info:
        raise InvalidDataError("session", "is one of the store's: give it to a repository itself")
    if session.sync_session.binds or not isinstance(session.bind, AsyncEngine):
        raise InvalidDataError("session", "must be bound to an engine, as async_sessionmaker does")
    sync = session.sync_session
    if _HOLDS not in sync.info:
        event.listen(sync, "after_commit", _note_commit)
        event.listen(sync, "after_soft_rollback", _note_rollback)
        event.listen(sync, "after_transaction_end", _note_end)
    holds: dict[object, Hold] = sync.info.setdefault(_HOLDS, {})
    return holds.setdefault(database, Hold())


def _note_commit(session: Session) -> None:
    if not session.in_nested_transaction():  # a released savepoint is no commit
        for hold in session.info[_HOLDS].values():
            hold.undo.clear()


def _note_rollback(session: Session, ended: SessionTransaction) -> None:
    def is_within(savepoint: SessionTransaction | None) -> bool:
        while savepoint is not None and savepoint is not ended:
            savepoint = savepoint.parent
        return savepoint is ended

    if ended.nested:
        for hold in session.info[_HOLDS].values():
            hold.restore(is_within)


def _note_end(session: Session, transaction: SessionTransaction) -> None:
    if transaction.parent is None:
        holds = dict(session.info[_HOLDS])
        session.info[_HOLDS].clear()
        for hold in holds.values():
            hold.finished = True
            hold.restore(lambda _: True)


@asynccontextmanager
async def in_savepoint(
    session: AsyncSession,
    transaction: WriteTransaction,
    hold: Hold,
    info: dict[str, Any],
    schema: str | None,
    mapped: Callable[[], Any],
) -> AsyncIterator[AsyncSession]:
    """Open a session for repositories on the connection of the caller, within a savepoint."""
    try:  # whole, as SQLAlchemy would try to undo a half of it on the busy connection
        nested = await shield_until_done(_savepoint(session))
    except asyncio.CancelledError:
        await shield_until_done(session.invalidate())
        raise
    info = {
        **info,
        "transaction": transaction,
        "transactions": [transaction],
        "cursor_lock": asyncio.Lock(),
    }
    tx = await session_beside(session, schema, info)
    try:
        yield tx
        if transaction.failure is not None:
            text = "a write in the block failed, so all of the block was rolled back"
            raise StoreError(text) from transaction.failure
        if transaction.finished:
            raise StoreError("the block rolled its session back: roll your own session back")
        await tx.flush()
        async with tx.info["cursor_lock"]:  # a call that the block did not await may write
            with mapped():
                await tx.run_sync(lambda _: transaction.finish())
        await shield_until_done(nested.commit())
        around = session.sync_session.get_nested_transaction()
        hold.undo += [(around, restore) for restore in transaction.undo]
    except asyncio.CancelledError:  # by the caller, or at the end of the time
        _undo(transaction)
        await shield_until_done(session.invalidate())  # the connection may be busy
        raise
    except BaseException:
        _undo(transaction)
        if nested.is_active:
            await shield_until_done(nested.rollback())
        raise
    finally:
        transaction.finished = True
        await tx.close()  # without I/O, as the connection is the caller's


async def _savepoint(session: AsyncSession) -> AsyncSessionTransaction:
    """Send a savepoint, which the session by itself delays until it needs the connection."""
    nested = await session.begin_nested()
    await session.connection()
    return nested


def _undo(transaction: WriteTransaction) -> None:
    for restore in reversed(transaction.undo):
        restore()
    transaction.undo.clear()
