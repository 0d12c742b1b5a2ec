"""The sessions of one event loop: those that read, and those that only `Database` may end."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Coroutine
from typing import Any

from sqlalchemy import event
from sqlalchemy.ext.asyncio import AsyncEngine, async_sessionmaker
from sqlalchemy.orm import Session, SessionTransaction
from sqlalchemy.pool import NullPool

from openclaw_store.backends import Backend
from openclaw_store.errors import StoreError

logger = logging.getLogger("openclaw_store.sessions")

_CLOSE_SECONDS = 5.0
"""How long closing the connections for reading may take."""


class Engines:
    """The engines of one event loop, and what makes sessions of them.

    Args:
        home: The event loop.
        backend: The database they lead to.
        info: What each session is to know.
        options: Of the pool that keeps connections for reading.
    """

    def __init__(
        self,
        home: asyncio.AbstractEventLoop,
        backend: Backend,
        info: dict[str, Any],
        **options: Any,
    ) -> None:
        self._home = home
        self._backend = backend
        self.reading = backend.engine(write=False, **options)
        self.writing = backend.engine(write=True, pool=NullPool)
        self.sessions = async_sessionmaker(self.reading, expire_on_commit=False, info=info)
        self.write_sessions = async_sessionmaker(
            self.writing, expire_on_commit=False, info=info, sync_session_class=_WriteSession
        )
        self.checked_out: set[int] = set()
        """What stands for each connection in use."""
        for engine in (self.reading, self.writing):
            self._note_use(engine)

    async def close(self) -> None:
        """Close what the pools keep, in time."""
        if self._home.is_closed() and self._backend.dialect == "postgresql":
            return  # nothing can be sent any more; the sockets go with their objects
        try:
            async with asyncio.timeout(_CLOSE_SECONDS):
                await _on(self._home, self._dispose())
                await asyncio.sleep(0)  # what closed a connection may have put the timeout off
        except (TimeoutError, RuntimeError) as error:
            logger.warning("connections were dropped, not closed: %s", error or "no answer")

    async def _dispose(self) -> None:
        await self.reading.dispose()
        await self.writing.dispose()

    def _note_use(self, engine: AsyncEngine) -> None:
        @event.listens_for(engine.sync_engine, "checkout")
        def checkout(connection: object, record: object, proxy: object) -> None:
            self.checked_out.add(id(record))

        @event.listens_for(engine.sync_engine, "checkin")
        def checkin(connection: object, record: object) -> None:
            self.checked_out.discard(id(record))


class _WriteSession(Session):
    """A session whose transaction is ended by `Database.transaction` alone."""

    def commit(self) -> None:
        transaction = self.info.get("transaction")
        if transaction is not None and not transaction.finished:
            raise StoreError("the transaction commits at the end of its block: do not commit it")
        super().commit()

    def begin_nested(self) -> SessionTransaction:
        raise StoreError("a transaction has no savepoints: what fails in it undoes all of it")

    def rollback(self) -> None:
        transaction = self.info.get("transaction")
        if transaction is not None:
            transaction.finished = True
        super().rollback()


async def _on(loop: asyncio.AbstractEventLoop, work: Coroutine[Any, Any, None]) -> None:
    """Do `work` on its own event loop, if that runs, else here."""
    if loop is asyncio.get_running_loop() or not loop.is_running():
        await work
    else:
        await asyncio.wrap_future(asyncio.run_coroutine_threadsafe(work, loop))
