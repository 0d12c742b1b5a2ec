"""The PostgreSQL backend: connections, locking, migration, backup and maintenance of a database."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any, TypeVar

from sqlalchemy import Connection, ExceptionContext, Pool, event, text
from sqlalchemy.exc import DisconnectionError, SQLAlchemyError
from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession, create_async_engine
from sqlalchemy.pool import ConnectionPoolEntry, NullPool
from sqlalchemy.util import await_only

from openclaw_store.backends.atomic_files import written_aside
from openclaw_store.backends.base import PUBLIC, Backend, CounterStatements
from openclaw_store.backends.cancellation import Stop, cancel_at
from openclaw_store.backends.error_mapping import CitusErrorMapping, PostgreSQLErrorMapping
from openclaw_store.backends.postgresql import citus
from openclaw_store.backends.postgresql.connections import (
    connection_class,
    is_lost,
    logger,
    may_be_lost,
)
from openclaw_store.backends.postgresql.location import ServerLocation
from openclaw_store.backends.postgresql.migration_lock import lock_revision, make_schema
from openclaw_store.backends.postgresql.pg_dump import dump, environment_of
from openclaw_store.backends.postgresql.protocol import notify
from openclaw_store.backends.postgresql.server_state import MINIMUM_VERSION as MINIMUM_VERSION
from openclaw_store.backends.postgresql.server_state import ServerState
from openclaw_store.backends.postgresql.write_session import (
    WRITER_SETTINGS,
    ConnectionRegistry,
    SessionCursor,
    WriteSession,
    milliseconds,
)
from openclaw_store.errors import InvalidDataError, UnavailableError

Result = TypeVar("Result")

_TABLES = (
    "tasks",
    "nodes",
    "changes",
    "past_changes",
    "archive_runs",
    "archive_voids",
    "leases",
    "sealing_keys",
    "outgoing",
    "incoming",
    "decisions",
    "counters",
)

SEARCH_PATH = "pg_catalog, pg_temp"
"""The schemas in which a server looks up functions and operators for the library."""

_PREPARE = (
    "SELECT current_setting('server_version_num'), current_setting('synchronous_commit'), "
    + citus.INSTALLED
)

# VACUUM skips the tables of other owners with a mere warning, which has no code of its own.
_FOREIGN = """
    SELECT relname, pg_get_userbyid(relowner) FROM pg_class, pg_database
    WHERE pg_class.oid = ANY (CAST(CAST(:tables AS text[]) AS regclass[]))
    AND datname = current_database()
    AND NOT pg_has_role(relowner, 'USAGE') AND NOT pg_has_role(datdba, 'USAGE')
    AND CASE WHEN current_setting('server_version_num')::int >= 170000
        THEN NOT has_table_privilege(pg_class.oid, 'MAINTAIN') ELSE true END
    ORDER BY relname"""

_SIZE_OF_DATABASE = "SELECT pg_database_size(current_database())"
_SIZE_OF_SCHEMA = """
    SELECT coalesce(sum(pg_total_relation_size(oid)), 0) FROM pg_class
    WHERE relkind = 'r' AND relnamespace = to_regnamespace('{}')"""

_IDENTITY = "SELECT current_database(), pg_postmaster_start_time()"
_JOINED = (
    _IDENTITY
    + """, to_regclass('{}.counters') IS NOT NULL AS has_tables,
    current_setting('transaction_isolation') AS isolation,
    current_setting('transaction_read_only') AS read_only,
    current_setting('lock_timeout') AS lock_timeout"""
)

_IDLE_LIMIT = "idle_in_transaction_session_timeout"
_NO_SUCH_OBJECT = "42704"
_LOCK_SHARE = 0.9  # the server's own limit, which leaves a connection usable, expires first
_CONNECT_SECONDS = 5.0  # a short timeout for locks does not limit connecting


class PostgreSQL:
    """A database on a PostgreSQL server.

    Args:
        location: Its URL, or the keyword string of libpq.
        timeout: Seconds to wait for a lock.
        answer_timeout: Seconds to wait for the answer to a statement.
        cluster: The name of a cluster, which is that of its schema; `None` for the schema `public`.

    Raises:
        InvalidDataError: If the location is not understood.
        UnavailableError: If the driver is not installed.
    """

    dialect = "postgresql"
    one_statement: Mapping[str, Any] = {"isolation_level": "AUTOCOMMIT"}

    def __init__(
        self, location: str, timeout: float, answer_timeout: float, cluster: str | None = None
    ) -> None:
        self._location = ServerLocation(location)
        if find_spec("asyncpg") is None:
            raise UnavailableError(
                "PostgreSQL needs asyncpg: pip install 'openclaw-store[postgres]'"
            )
        self._timeout = timeout
        self._answer_timeout = answer_timeout
        # A server that waits for a lock says nothing, as one that hangs. So each attempt to lock
        # waits for half of the time at most; it is repeated until the deadline of the caller.
        self._lock_seconds = min(timeout, answer_timeout / 2)
        self.cluster = cluster
        self.schema = cluster or PUBLIC
        self.address = str(self._location)
        self.location = f"{self.address} (cluster {cluster})" if cluster else self.address
        self._server = ServerState(is_citus=self._location.is_citus)
        self.registry = ConnectionRegistry()
        self.error_mapping = self._mapping()
        self.notifies = True
        self._own_identity: tuple[Any, ...] | None = None

    def share(self, other: PostgreSQL) -> None:
        """Share the known state of the server with `other`, and the detection of its loss."""
        self._server = other._server
        self.error_mapping = self._mapping()

    def _mapping(self) -> PostgreSQLErrorMapping:
        kind = CitusErrorMapping if self._server.is_citus else PostgreSQLErrorMapping
        return kind(self.location, self._server.connector.note_silence)

    @property
    def options(self) -> dict[str, Any]:
        """The execution options with which an engine finds the tables."""
        return {
            "schema_translate_map": {None: self.schema},
            "location": self.location,
            "is_citus": bool(self._server.is_citus),
        }

    def exists(self) -> bool:
        return True

    def make_folder(self) -> None:
        pass

    def prepare(self, check: Callable[[Connection], object]) -> None:
        self.error_mapping = self._mapping()  # another database of the server may be open

    def _note_settings(self, connection: Connection) -> None:
        """Refuse a server that is too old, and note the settings that later connections need."""
        number, commit, has_citus = connection.execute(text(_PREPARE)).one()
        version = int(number) // 10_000
        if version < MINIMUM_VERSION:
            raise UnavailableError(
                f"{self.location} is PostgreSQL {version}, {MINIMUM_VERSION} or newer is needed: "
                "upgrade the server"
            )
        server = self._server
        server.version = version
        if server.is_citus is None:
            server.is_citus = has_citus
            self.error_mapping = self._mapping()
        # With `off`, a commit would return before it is on the disk.
        server.synchronous_commit = "on" if commit == "off" else commit

    def inspect(self, work: Callable[[Connection], Result], stop: Stop | None = None) -> Result:
        was_citus = self._server.is_citus

        async def run() -> Result:
            if stop is not None:
                cancel_at(stop)
            async with self.engine(write=False).connect() as connection:
                if self._server.synchronous_commit is None:
                    await connection.run_sync(self._note_settings)
                if was_citus or not self._server.is_citus:
                    return await connection.run_sync(work)
            with self.error_mapping.mapped():  # Citus has settings and errors of its own
                async with self.engine(write=False).connect() as connection:
                    return await connection.run_sync(work)

        with self.error_mapping.mapped():
            return asyncio.run(run())

    def migrate(
        self,
        work: Callable[[Connection], Result],
        copy_to: Callable[[Connection], Path | None] = lambda _: None,
    ) -> Result:
        if self._server.synchronous_commit is None:
            self.inspect(lambda _: None)

        async def run() -> Result:
            engine = self.engine(write=True, is_long=True, json_deserializer=None)
            async with engine.begin() as connection:
                code = self.error_mapping.code
                if self.cluster is not None:
                    is_citus = bool(self._server.is_citus)
                    await make_schema(connection, self.schema, code, is_citus=is_citus)
                await lock_revision(connection, self.schema, code)
                return await connection.run_sync(work)

        with self.error_mapping.mapped():
            return asyncio.run(run())

    def engine(
        self,
        *,
        write: bool,
        pool: type[Pool] = NullPool,
        settings: dict[str, str] | None = None,
        is_long: bool = False,
        answer_timeout: float | None = None,
        **options: Any,
    ) -> AsyncEngine:
        """Return an engine for coroutines.

        Args:
            settings: Server settings of its connections.
            is_long: Let a statement take any time, once it has its locks.
            answer_timeout: A longer limit for a statement.
        """
        limit = max(answer_timeout or 0.0, self._answer_timeout)
        lock_timeout = self._timeout if is_long else min(self._timeout, _LOCK_SHARE * limit)
        arguments: dict[str, Any] = {
            **self._location.arguments(),
            "async_creator_fn": self._server.connector.connect,
            "connection_class": connection_class(),
            "timeout": _CONNECT_SECONDS,
            "command_timeout": None if is_long else limit,
            "server_settings": {
                "application_name": self._location.options.get(
                    "application_name", "openclaw_store"
                ),
                "lock_timeout": milliseconds(lock_timeout),
                "search_path": SEARCH_PATH,
                **(settings or {}),
                **(citus.SETTINGS if self._server.is_citus else {}),
            },
        }
        commit = self._server.synchronous_commit
        if commit is not None:  # explicit, as the role's default may change
            arguments["server_settings"]["synchronous_commit"] = commit
        execution = self.options
        if write:  # a writer that waited for a lock sees the rows of its last holder
            options.setdefault("isolation_level", "READ COMMITTED")
            if not is_long:  # else the lock of a machine that vanishes is held for hours
                arguments["server_settings"][_IDLE_LIMIT] = milliseconds(self._answer_timeout)
        else:
            options["isolation_level"] = "REPEATABLE READ"  # one snapshot, as on SQLite
            execution["postgresql_readonly"] = True
        engine = create_async_engine(
            "postgresql+asyncpg://",
            poolclass=pool,
            connect_args=arguments,
            hide_parameters=True,
            execution_options=execution,
            # JSON stays text until it is used; but SQLAlchemy itself decodes JSON of the schema.
            **{"json_deserializer": str, **options},
        )

        @event.listens_for(engine.sync_engine, "handle_error")
        def handle(context: ExceptionContext) -> None:
            self.error_mapping.hide_values(
                context.sqlalchemy_exception or context.original_exception
            )
            if isinstance(context.original_exception, TimeoutError):
                context.is_disconnect = True  # the pool replaces all of its connections

        @event.listens_for(engine.sync_engine, "checkin")
        def note_idle(_: object, record: ConnectionPoolEntry) -> None:
            record.info["was_idle"] = True

        @event.listens_for(engine.sync_engine, "checkout")
        def check(pooled: Any, record: ConnectionPoolEntry, _: object) -> None:
            # Not a new connection: the pool gives up after the second one, by an error of its own.
            driver = pooled.driver_connection
            if "was_idle" in record.info and may_be_lost(driver) and await_only(is_lost(driver)):
                raise DisconnectionError  # the pool makes another connection

        return engine

    async def begin(
        self,
        session: AsyncSession,
        counters: Sequence[CounterStatements],
        until: float,
        *,
        notifies: bool = True,
    ) -> Connection:
        statements = [one.lock for one in counters]
        if notifies:
            statements += [self._notify(one.schema) for one in counters]
        # A moment for the lock, though connecting may take longer than the timeout.
        late = max(until, time.monotonic() + _CONNECT_SECONDS)
        while True:
            try:
                return await self._begin(session, statements, len(counters), late)
            except self.error_mapping.raised() as error:
                if not self.error_mapping.is_busy(error) or time.monotonic() >= until:
                    raise
                await session.rollback()

    async def _begin(
        self, session: AsyncSession, statements: Sequence[str], locks: int, until: float
    ) -> Connection:
        connection = await session.connection()
        seconds = max(session.info["seconds"], _CONNECT_SECONDS) + 1
        limits = self._limits(seconds, seconds + self._timeout)  # the timeout is for the commit
        await connection.exec_driver_sql("SELECT 1")  # SQLAlchemy sends BEGIN with the first one
        raw: Any = await connection.get_raw_connection()
        wait = milliseconds(min(until - time.monotonic(), self._lock_seconds) / locks)
        try:
            await raw.driver_connection.execute(
                f"SET LOCAL lock_timeout = {wait}; {'; '.join(statements)}; "
                f"SET LOCAL lock_timeout = DEFAULT; {limits}"
            )
        except asyncio.CancelledError:  # SQLAlchemy would reuse the busy connection
            await session.invalidate()
            raise
        return connection.sync_connection  # type: ignore[return-value]  # begun, so not None

    async def join(
        self, session: AsyncSession, counters: CounterStatements, until: float, seconds: float
    ) -> Connection:
        connection = await session.connection()
        if (connection.dialect.name, connection.dialect.driver) != ("postgresql", "asyncpg"):
            name = f"{connection.dialect.name}+{connection.dialect.driver}"
            raise InvalidDataError("session", f"has {name}: make it of postgresql+asyncpg")
        found = (await connection.exec_driver_sql(_JOINED.format(self.schema))).one()
        if tuple(found[:2]) != self._own_identity:  # the server may have been started again
            self._own_identity = None
        raw: Any = await connection.get_raw_connection()
        driver = raw.driver_connection
        for is_wrong, reason in (
            (tuple(found[:2]) != await self._identity(), f"is not on {self.location}"),
            (not found.has_tables, f"does not see the tables of {self.location}"),
            (not driver.is_in_transaction(), "commits each statement: leave AUTOCOMMIT out"),
            (found.isolation != "read committed", f"is {found.isolation}: use READ COMMITTED"),
            (found.read_only == "on", "only reads: connect to the primary, and allow writes"),
        ):
            if is_wrong:
                raise InvalidDataError("session", reason)
        wait = milliseconds(min(until - time.monotonic(), self._lock_seconds))
        try:
            await driver.execute(
                f"SET LOCAL lock_timeout = {wait}; {counters.lock}; {self._notify()}; "
                f"SET LOCAL lock_timeout = '{found.lock_timeout}'; "
                f"{self._limits(seconds, 2 * seconds)}"
            )
        except asyncio.CancelledError:  # SQLAlchemy would reuse the busy connection
            await session.invalidate()
            raise
        return connection.sync_connection  # type: ignore[return-value]  # begun, so not None

    async def is_beside(self, other: Backend) -> bool:
        if not isinstance(other, PostgreSQL):
            return False
        if await self._identity() != await other._identity():
            self._own_identity = other._own_identity = None  # one may be older than a restart
        return await self._identity() == await other._identity()

    async def end_prepared(self, gid: str, *, commit: bool) -> bool:
        verb = "COMMIT" if commit else "ROLLBACK"
        engine = self.engine(write=True, isolation_level="AUTOCOMMIT")
        with self.error_mapping.mapped():
            async with engine.connect() as connection:
                raw: Any = await connection.get_raw_connection()
                try:
                    await raw.driver_connection.execute(f"{verb} PREPARED '{gid}'")
                except self.error_mapping.raised() as error:
                    if self.error_mapping.code(error) != _NO_SUCH_OBJECT:
                        raise
                    return False
                if commit:
                    await raw.driver_connection.execute(self._notify())
        return True

    async def _identity(self) -> tuple[Any, ...]:
        """Return values that no other database has: its name, and the start of its server."""
        if self._own_identity is None:
            async with self.engine(write=False).connect() as connection:
                found = (await connection.exec_driver_sql(_IDENTITY)).one()
            self._own_identity = tuple(found)
        return self._own_identity

    def _limits(self, idle: float, whole: float) -> str:
        """Return SQL that makes the server abort the transaction of a client that vanished.

        Send it in one message with the statement that takes the lock: a client that vanishes
        between two messages of a statement is not idle for the server. Only version 17 and later
        have a limit for that; on others the connection stays until TCP detects the loss.

        Args:
            idle: Seconds without a statement.
            whole: Seconds of the whole transaction.
        """
        limits = f"SET LOCAL {_IDLE_LIMIT} = {milliseconds(idle)}"
        if self._server.is_citus:  # in the transaction of a caller's connection
            for name, value in citus.SETTINGS.items():
                limits += f"; SET LOCAL {name} = {value}"
        if self._server.version < 17:
            return limits
        return f"{limits}; SET LOCAL transaction_timeout = {milliseconds(whole)}"

    async def end(self, session: AsyncSession) -> None:
        caught: tuple[type[Exception], ...] = (SQLAlchemyError, *self.error_mapping.raised())
        try:
            await session.close()
        except caught as error:
            logger.debug("a connection was lost before it was closed: %s", error)
            await session.invalidate()

    def cursor(self, connection: Connection) -> SessionCursor:
        return SessionCursor(connection.connection.driver_connection, self.schema)

    def write_session(self, until: float, counters: CounterStatements) -> WriteSession:
        engine = self.engine(write=True, isolation_level="AUTOCOMMIT", settings=WRITER_SETTINGS)
        answer = self._answer_timeout
        return WriteSession(
            engine,
            until,
            self.registry,
            lock_timeout=self._lock_seconds,
            extra=max(0.0, _CONNECT_SECONDS - self._timeout),
            answer_seconds=answer / 2,
            lock=f"{counters.lock}; {self._limits(answer, 2 * answer)}",
            notify=self._notify(),
            is_one_call=self.notifies,
            can_claim=not self._server.is_citus,
            schema=self.schema,
        )

    def _notify(self, schema: str | None = None) -> str:
        """Return SQL that notifies the listeners of a cluster, by default this one."""
        if not self.notifies:
            return "SELECT 1"
        return notify(schema or self.schema, is_citus=bool(self._server.is_citus))

    def dispose(self) -> None:
        pass

    def backup(self, target: Path, stop: Stop, *, overwrite: bool) -> None:
        async def run() -> dict[str, str]:
            cancel_at(stop)
            async with self.engine(write=False).connect() as connection:
                raw = await connection.get_raw_connection()
                return await environment_of(raw.driver_connection)

        with self.error_mapping.mapped():
            environment = {**asyncio.run(run()), **self._location.files()}
        with written_aside(target, overwrite=overwrite) as partial:
            dump(environment, self.location, self.schema, partial, stop)

    def vacuum(self, stop: Stop) -> None:
        async def run() -> None:
            cancel_at(stop)
            engine = self.engine(write=True, is_long=True, isolation_level="AUTOCOMMIT")
            async with engine.connect() as connection:
                tables = [f"{self.schema}.{name}" for name in _TABLES]
                foreign = (await connection.execute(text(_FOREIGN), {"tables": tables})).all()
                if foreign:
                    names = ", ".join(table for table, _ in foreign)
                    raise UnavailableError(
                        f"{self.location}: this role does not own {names}: vacuum as "
                        f"{foreign[0][1]}, who does, or leave it to the server's autovacuum"
                    )
                for table in tables:
                    await connection.exec_driver_sql(f"VACUUM (ANALYZE) {table}")

        with self.error_mapping.mapped():
            asyncio.run(run())

    async def size(self, session: AsyncSession) -> int:
        connection = await session.connection()
        found = await connection.exec_driver_sql(
            _SIZE_OF_DATABASE if self.cluster is None else _SIZE_OF_SCHEMA.format(self.schema)
        )
        return int(found.scalar_one())
