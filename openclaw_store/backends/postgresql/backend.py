"""How PostgreSQL is reached, locked and looked after."""

from __future__ import annotations

import asyncio
import importlib
import logging
import time
from collections.abc import Callable
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any, TypeVar

from sqlalchemy import Connection, Pool, make_url, text
from sqlalchemy.exc import ArgumentError, SQLAlchemyError
from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession, create_async_engine
from sqlalchemy.pool import NullPool
from sqlalchemy.util import await_only

from openclaw_store.backends.atomic_files import dump, written_aside
from openclaw_store.backends.cancellation import cancel_once_more, shield_until_done
from openclaw_store.backends.error_mapping import PostgreSQLErrorMapping
from openclaw_store.backends.postgresql.batch_sql import CHANNEL
from openclaw_store.backends.postgresql.write_session import (
    MAX_COMBINATIONS,
    WRITER_SETTINGS,
    ConnectionRegistry,
    Cursor,
    WriteSession,
    milliseconds,
)
from openclaw_store.errors import InvalidDataError, UnavailableError

logger = logging.getLogger("openclaw_store.postgresql")

Result = TypeVar("Result")

MINIMUM_VERSION = 13
"""The oldest server that is supported; older ones get no more fixes from their makers."""

_TABLES = ["tasks", "nodes", "changes", "counters"]

_PREPARE = "SELECT current_setting('server_version_num'), current_setting('synchronous_commit')"

# The server passes them by with no more than a warning, which has no code of its own.
_FOREIGN = """
    SELECT relname, pg_get_userbyid(relowner) FROM pg_class, pg_database
    WHERE pg_class.oid = ANY (CAST(CAST(:tables AS text[]) AS regclass[]))
    AND datname = current_database()
    AND NOT pg_has_role(relowner, 'USAGE') AND NOT pg_has_role(datdba, 'USAGE')
    AND CASE WHEN current_setting('server_version_num')::int >= 170000
        THEN NOT has_table_privilege(pg_class.oid, 'MAINTAIN') ELSE true END
    ORDER BY relname"""

_IDLE_LIMIT = "idle_in_transaction_session_timeout"
_TAKE_LOCK = f"UPDATE counters SET beat = beat + 1 WHERE id = 1; NOTIFY {CHANNEL}"  # noqa: S608
_MIGRATION_LOCK = 0x6F70656E636C6177  # "openclaw"
_CONNECT_SECONDS = 5.0  # at least: who gives a lock less time does not mean this
_ANSWER_SECONDS = 1.0  # that the server's own limits, which leave a connection usable, come first
_UNWANTED_SECONDS = 1.0  # to connect a caller who does not want it any more
_CLOSE_SECONDS = 0.5  # for the farewell; a connection that is cut off does without


class PostgreSQL:
    """A database on a PostgreSQL server.

    Args:
        location: Its URL; `postgresql://` and `postgresql+asyncpg://` mean the same.
        timeout: Seconds to wait for a lock, for a connection, or for the answer to a statement.

    Raises:
        InvalidDataError: If the URL asks for another driver.
        UnavailableError: If the driver is not installed.
    """

    dialect = "postgresql"

    def __init__(self, location: str, timeout: float) -> None:
        try:
            url = make_url(location)
        except (ArgumentError, ValueError):
            raise InvalidDataError("db_path", "is neither a path nor a database URL") from None
        if url.drivername not in ("postgresql", "postgresql+asyncpg"):
            raise InvalidDataError(
                "db_path", f"{url.drivername} is not supported: use postgresql+asyncpg"
            )
        if find_spec("asyncpg") is None:
            raise UnavailableError(
                "PostgreSQL needs asyncpg: pip install 'openclaw-store[postgres]'"
            )
        if "password" in url.query:  # it would be safe_repr with the rest of the query
            raise InvalidDataError("db_path", "has its password behind the ?: put it before the @")
        self._url = url.set(drivername="postgresql+asyncpg")
        self._timeout = timeout
        self.location = url.render_as_string(hide_password=True)
        """Where it is, as people may see it."""
        self.error_mapping = PostgreSQLErrorMapping(self.location)
        self._connector = _Connector()
        self._version = MINIMUM_VERSION  # at least
        self._synchronous_commit: str | None = None  # what the server has, for all we know
        self.registry = ConnectionRegistry()
        """What its connections know of each other."""

    def exists(self) -> bool:
        """`True`: it is found out when something connects to it."""
        return True

    def make_folder(self) -> None:
        """There is none to be made."""

    def prepare(self) -> None:
        """Refuse a server that is too old; see to it that a commit waits until it is on the disk.

        Raises:
            UnavailableError: Naming the version found and the one needed, or what is in the way.
        """
        number, commit = self.inspect(lambda connection: connection.execute(text(_PREPARE)).one())
        version = int(number) // 10_000
        if version < MINIMUM_VERSION:
            raise UnavailableError(
                f"{self.location} is PostgreSQL {version}, {MINIMUM_VERSION} or newer is needed: "
                "upgrade the server"
            )
        self._version = version
        self._synchronous_commit = "on" if commit == "off" else commit

    def inspect(self, work: Callable[[Connection], Result]) -> Result:
        """Do `work`, which reads, with a connection; blocks the thread, which has no loop."""

        async def run() -> Result:
            async with self.engine(write=False).connect() as connection:
                return await connection.run_sync(work)

        with self.error_mapping.mapped():
            return asyncio.run(run())

    def migrate(
        self,
        work: Callable[[Connection], Result],
        copy_to: Callable[[Connection], Path | None] = lambda _: None,
    ) -> Result:
        """Do `work` in a transaction while nobody else migrates; blocks the thread.

        Raises:
            UnavailableError: If another process migrates for longer than the timeout.
        """

        async def run() -> Result:
            engine = self.engine(write=True, is_long=True, json_deserializer=None)
            async with engine.begin() as connection:
                await connection.exec_driver_sql(f"SELECT pg_advisory_xact_lock({_MIGRATION_LOCK})")
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
        **options: Any,
    ) -> AsyncEngine:
        """An engine for coroutines: read-only, or one whose statements wait for locks in time.

        Args:
            settings: Settings of the server for its connections.
            is_long: Whether a statement may take as long as it needs, once it has its locks.
        """
        patience = max(self._timeout, _CONNECT_SECONDS)
        arguments: dict[str, Any] = {
            "async_creator_fn": self._connector.connect,
            "connection_class": _connection_class(),
            "timeout": patience,
            "statement_cache_size": 2 * MAX_COMBINATIONS,
            "command_timeout": None if is_long else self._timeout + _ANSWER_SECONDS,
            "server_settings": {
                "application_name": "openclaw_store",
                "lock_timeout": milliseconds(self._timeout),
                **(settings or {}),
            },
        }
        if self._synchronous_commit is not None:  # else others could turn it off meanwhile
            arguments["server_settings"]["synchronous_commit"] = self._synchronous_commit
        if write:  # a writer waits for others, and then sees what they wrote
            options.setdefault("isolation_level", "READ COMMITTED")
            if not is_long:  # where a machine goes with the lock, its connection stays, for hours
                arguments["server_settings"][_IDLE_LIMIT] = milliseconds(patience)
        else:
            options["isolation_level"] = "REPEATABLE READ"  # one picture, as on SQLite
            options["execution_options"] = {"postgresql_readonly": True}
        return create_async_engine(
            self._url,
            poolclass=pool,
            connect_args=arguments,
            # JSON stays text until somebody looks at it; but SQLAlchemy looks at the schema's.
            **{"json_deserializer": str, **options},
        )

    async def begin(self, session: AsyncSession) -> Connection:
        """Begin the transaction of `session`, with the write lock.

        All of that together has one limit: as long as connecting or the lock may take, whichever is
        more, and a moment for the server to say so.
        """
        seconds = max(self._timeout, _CONNECT_SECONDS)
        async with asyncio.timeout(seconds + _ANSWER_SECONDS):
            return await self._begin(session, until=time.monotonic() + seconds)

    async def _begin(self, session: AsyncSession, until: float) -> Connection:
        connection = await session.connection()
        seconds = max(session.info["seconds"], _CONNECT_SECONDS) + 1
        limits = self._limits(seconds, seconds + self._timeout)  # of which the latter is to commit
        await connection.exec_driver_sql("SELECT 1")  # after BEGIN, which comes with the first one
        raw: Any = await connection.get_raw_connection()
        # Not only the lock: a writer that has read before must see that something was written,
        # even if the caller goes past the repositories.
        wait = milliseconds(min(until - time.monotonic(), self._timeout))
        try:
            await raw.driver_connection.execute(
                f"SET LOCAL lock_timeout = {wait}; {_TAKE_LOCK}; "
                f"SET LOCAL lock_timeout = DEFAULT; {limits}"
            )
        except asyncio.CancelledError:  # SQLAlchemy does not know that it was interrupted
            await session.invalidate()
            raise
        return connection.sync_connection  # type: ignore[return-value]  # begun, so not None

    def _limits(self, idle: float, whole: float) -> str:
        """SQL by which the server gives up a transaction whose client is not heard of any more.

        It may be idle for so many seconds, and take so many as a whole.

        It is sent in one message with what takes the lock: a client that vanishes between two
        messages of a statement does not count as idle, and only servers from version 17 on have a
        limit for that. On others the connection stays until TCP finds that there is nobody.
        """
        limits = f"SET LOCAL {_IDLE_LIMIT} = {milliseconds(idle)}"
        if self._version < 17:
            return limits
        return f"{limits}; SET LOCAL transaction_timeout = {milliseconds(whole)}"

    async def end(self, session: AsyncSession) -> None:
        """Close `session`, whatever state its connection is in."""
        caught: tuple[type[Exception], ...] = (SQLAlchemyError, *self.error_mapping.raised())
        try:
            await session.close()
        except caught as error:
            logger.debug("a connection was lost before it was closed: %s", error)
            await session.invalidate()

    def cursor(self, connection: Connection) -> Cursor:
        """What a transaction writes with in the transaction of a session."""
        return Cursor(connection.connection.driver_connection, await_only)

    def write_session(self, until: float) -> WriteSession:
        """A connection for the writer, on whose thread this is called."""
        engine = self.engine(write=True, isolation_level="AUTOCOMMIT", settings=WRITER_SETTINGS)
        seconds = 3 * max(self._timeout, _CONNECT_SECONDS)  # others wait: not for ever
        return WriteSession(
            engine,
            until,
            self.error_mapping,
            self.registry,
            patience=self._timeout,
            extra=max(0.0, _CONNECT_SECONDS - self._timeout),
            answer_seconds=_ANSWER_SECONDS,
            limits=self._limits(seconds, seconds),
        )

    def dispose(self) -> None:
        """Forget what all connections shared."""

    def backup(self, target: Path, *, overwrite: bool) -> None:
        """Have pg_dump write an archive, for pg_restore, of the database as it is at one moment.

        The copy is written aside and renamed when it is complete.

        Raises:
            InvalidDataError: If `target` exists and is not to be overwritten.
            UnavailableError: If there is no pg_dump, or it fails.
        """
        with written_aside(target, overwrite=overwrite) as partial:
            dump(self._url, partial)

    def vacuum(self) -> None:
        """Have the space of removed rows used again, and the statistics brought up to date.

        Raises:
            UnavailableError: If the role may not do that.
        """

        async def run() -> None:
            engine = self.engine(write=True, is_long=True, isolation_level="AUTOCOMMIT")
            async with engine.connect() as connection:
                foreign = (await connection.execute(text(_FOREIGN), {"tables": _TABLES})).all()
                if foreign:
                    tables = ", ".join(table for table, _ in foreign)
                    raise UnavailableError(
                        f"{self.location}: this role does not own {tables}: vacuum as "
                        f"{foreign[0][1]}, who does, or leave it to the server's autovacuum"
                    )
                for table in _TABLES:
                    await connection.exec_driver_sql(f"VACUUM (ANALYZE) {table}")

        with self.error_mapping.mapped():
            asyncio.run(run())

    async def size(self, session: AsyncSession) -> int:
        """Bytes on the disk."""
        connection = await session.connection()
        found = await connection.exec_driver_sql("SELECT pg_database_size(current_database())")
        return int(found.scalar_one())


class _Connector:
    """Connects to a server; of several, to the one first that answered last."""

    def __init__(self) -> None:
        self._answered: object = None

    async def connect(self, *arguments: Any, **options: Any) -> Any:
        """Connect to the end, even when the caller is cancelled meanwhile.

        Where the driver is stopped half-way, it may leave a connection that nobody closes. It is
        stopped all the same if a server lets it wait, as others wait for the caller.
        """
        try:
            return await shield_until_done(
                self._connect_to_any(*arguments, **options),
                unwanted=lambda made: made.terminate(),
                seconds=_UNWANTED_SECONDS,
            )
        except asyncio.CancelledError:
            await asyncio.sleep(0)  # the socket is closed in the loop's next turn
            raise

    async def _connect_to_any(self, *arguments: Any, **options: Any) -> Any:
        """Connect to the first host that is the right one, each having its share of the time.

        The driver would wait for one that does not answer until there is no time for the others.
        """
        driver = importlib.import_module("asyncpg")
        hosts = options.get("host")
        if not isinstance(hosts, list) or options.get("target_session_attrs") == "prefer-standby":
            return await driver.connect(*arguments, **options)
        options["timeout"] /= len(hosts)
        reason: Exception | None = None
        servers = zip(hosts, options["port"], strict=True)
        for server in sorted(servers, key=lambda server: server != self._answered):
            options["host"], options["port"] = server
            try:
                connection = await driver.connect(*arguments, **options)
            except (
                OSError, driver.CannotConnectNowError, driver.TargetServerAttributeNotMatched
            ) as error:  # fmt: skip
                reason = error
            else:
                self._answered = server
                return connection
        assert reason is not None
        raise reason


@cache
def _connection_class() -> type[Any]:
    """The driver's connection, but for one that is closed in time: others wait for it meanwhile."""
    base: type[Any] = importlib.import_module("asyncpg").Connection

    async def close(self: Any, *, timeout: float | None = None) -> None:
        try:
            try:
                await base.close(self, timeout=_CLOSE_SECONDS)
            finally:
                await asyncio.sleep(0)  # the socket is closed in the loop's next turn
        except asyncio.CancelledError:  # which has closed it, too
            cancel_once_more()
        except TimeoutError:  # likewise
            logger.debug("a connection was closed without the server's farewell")

    return type("Connection", (base,), {"__slots__": (), "close": close})
