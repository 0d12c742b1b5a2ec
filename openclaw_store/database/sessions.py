"""The sessions of one event loop: for reading, and for transactions that `Database` ends."""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine, Mapping
from typing import Any

from sqlalchemy import event
from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession, async_sessionmaker
from sqlalchemy.orm import Session, SessionTransaction
from sqlalchemy.pool import AsyncAdaptedQueuePool, NullPool
from sqlalchemy.util import LRUCache, immutabledict

from openclaw_store.backends import Backend
from openclaw_store.database.slices import Slices
from openclaw_store.errors import StoreError, UnavailableError, logger_of

logger = logger_of("sessions")

_OWN_CONNECTIONS = 5
"""Connections kept for the library's own reads, which must not wait for the sessions of callers."""

_CLOSE_SECONDS = 5.0
"""Limit for closing the connections of a pool."""


class _CompiledStatements(LRUCache[Any, Any]):
    """The compiled statements of all engines of a dialect and a version of the database.

    SQLAlchemy compiles each statement anew for each engine, which takes longer than most reads.
    """

    def get(self, key: Any, default: Any = None) -> Any:
        return super().get(self._shared_key(key), default)

    def __setitem__(self, key: Any, compiled: Any) -> None:
        super().__setitem__(self._shared_key(key), compiled)

    @staticmethod
    def _shared_key(key: Any) -> tuple[Any, ...]:
        dialect, *rest = key  # each engine has a dialect of its own
        return type(dialect), dialect.server_version_info, *rest


_compiled_statements = _CompiledStatements(500)


class Pools:
    """The engines of one event loop: of one database, or of all clusters of a server.

    Args:
        timeout: Seconds to wait for a connection, and for the answer to a statement of a caller.
        pool_size: Connections kept for the sessions of callers; `None` keeps no connection.
    """

    def __init__(
        self,
        loop: asyncio.AbstractEventLoop,
        backend: Backend,
        timeout: float,
        pool_size: int | None,
    ) -> None:
        self._loop = loop
        self._backend = backend

        def read_engine(size: int, **options: Any) -> AsyncEngine:
            if pool_size is None:
                return backend.engine(write=False, pool=NullPool, **options)
            pool = {"pool_size": size, "max_overflow": 0, "pool_timeout": timeout}
            return backend.engine(write=False, pool=AsyncAdaptedQueuePool, **pool, **options)

        self.engines = (
            read_engine(pool_size or 0, answer_timeout=timeout),
            read_engine(_OWN_CONNECTIONS),
            backend.engine(write=True, pool=NullPool),
        )
        """For the sessions of callers, for the library's own reads, and for transactions."""
        self._is_closed = False
        self.checked_out: set[int] = set()
        """The `id` of the pool record of each connection in use."""
        for engine in self.engines:
            engine.update_execution_options(compiled_cache=_compiled_statements)
            self._note_use(engine)

    async def close(self) -> None:
        """Close the connections of the pools, within a limit, and refuse to make new ones."""
        self._is_closed = True
        if self._loop.is_closed() and self._backend.dialect == "postgresql":
            return  # a closed loop cannot send; the sockets close with their objects
        await close_on(self._loop, self._dispose())

    async def _dispose(self) -> None:
        for engine in self.engines:
            await engine.dispose()

    # The events run on the thread of the loop; `checked_out_connections` reads from any thread.
    def _note_use(self, engine: AsyncEngine) -> None:
        @event.listens_for(engine.sync_engine, "do_connect")
        def connect(*_: object) -> None:
            if self._is_closed:
                raise UnavailableError("the connections were closed: open the database anew")

        @event.listens_for(engine.sync_engine, "checkout")
        def checkout(connection: object, record: object, proxy: object) -> None:
            self.checked_out.add(id(record))

        @event.listens_for(engine.sync_engine, "checkin")
        def checkin(connection: object, record: object) -> None:
            self.checked_out.discard(id(record))


class LoopSessions:
    """The session factories of a database on one event loop.

    Args:
        options: Execution options of its engines, if the pools are shared.
    """

    def __init__(
        self, pools: Pools, info: dict[str, Any], options: Mapping[str, Any] | None = None
    ) -> None:
        self.pools = pools
        self._owns_pools = options is None
        self.sessions, self.own_sessions, self.write_sessions = (
            async_sessionmaker(
                engine.execution_options(**options) if options else engine,
                expire_on_commit=False,
                info=info,
            )
            for engine in pools.engines
        )
        self.write_sessions.configure(sync_session_class=WriteSession)
        self.slices = Slices()

    async def close(self) -> None:
        """Close the connections, unless other databases share them."""
        if self._owns_pools:
            await self.pools.close()


class WriteSession(Session):
    """A session that leaves the end of its transaction to `Database.transaction`."""

    def commit(self) -> None:
        transaction = self.info.get("transaction")
        if transaction is not None and not transaction.finished:
            raise StoreError("the transaction commits at the end of its block: do not commit it")
        super().commit()

    def begin_nested(self) -> SessionTransaction:
        raise StoreError("a transaction has no savepoints: what fails in it undoes all of it")

    def rollback(self) -> None:
        for transaction in self.info.get("transactions", ()):
            transaction.finished = True
        super().rollback()


class _SessionBeside(WriteSession):
    """A session on the connection of another one, which must keep its options.

    SQLAlchemy gives the options that a session is made with to its connection. These go with each
    statement instead; only a flush has to borrow the connection.
    """

    def flush(self, objects: Any = None) -> None:
        if not (self.new or self.dirty or self.deleted):
            return
        connection = self.connection()
        before = connection.get_execution_options().get("schema_translate_map")
        connection.execution_options(**self.execution_options)
        try:
            super().flush(objects)
        finally:
            connection.execution_options(schema_translate_map=before)


async def session_beside(
    session: AsyncSession, schema: str | None, info: dict[str, Any]
) -> AsyncSession:
    """Return a session for the tables of a schema on the connection of `session`."""
    beside = AsyncSession(
        bind=await session.connection(),
        sync_session_class=_SessionBeside,
        expire_on_commit=False,
        info=info,
        join_transaction_mode="rollback_only",
    )
    await beside.connection()  # before there are options that it would be given
    if schema:
        beside.sync_session.execution_options = immutabledict(schema_translate_map={None: schema})
    return beside


async def close_on(loop: asyncio.AbstractEventLoop, work: Coroutine[Any, Any, None]) -> None:
    """Run `work`, which closes connections, on their event loop, within a limit."""
    try:
        async with asyncio.timeout(_CLOSE_SECONDS):
            await _on(loop, work)
            await asyncio.sleep(0)  # closing a connection may have deferred the cancellation
    except (TimeoutError, RuntimeError) as error:
        logger.warning("connections were dropped, not closed: %s", error or "no answer")


async def _on(loop: asyncio.AbstractEventLoop, work: Coroutine[Any, Any, None]) -> None:
    """Run `work` on its event loop if that is running, otherwise on this one."""
    if loop is asyncio.get_running_loop() or not loop.is_running():
        await work
    else:
        await asyncio.wrap_future(asyncio.run_coroutine_threadsafe(work, loop))
