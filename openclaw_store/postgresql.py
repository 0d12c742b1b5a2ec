"""How PostgreSQL is reached, locked, copied and understood when it fails.

Whoever writes either locks the row of counters first, and so writes alone, as on SQLite: what it
reads then cannot move until it has committed. Or it moves the counters only if they are as they
were when it read, in the very statement that writes all the rest: who was quicker has moved them,
and nothing is written. That takes two round trips to the server instead of four, or one where rows
are only added: the writer knows how it left the counters. So it does, until it meets another one.
"""

from __future__ import annotations

import asyncio
import importlib
import logging
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from contextlib import suppress
from functools import cache
from importlib.util import find_spec
from operator import itemgetter
from pathlib import Path
from typing import Any, NoReturn, TypeVar

from sqlalchemy import Connection, Pool, make_url, text
from sqlalchemy.exc import ArgumentError, SQLAlchemyError
from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession, create_async_engine
from sqlalchemy.pool import NullPool
from sqlalchemy.util import await_only

from openclaw_store.backups import dump, written_aside
from openclaw_store.errors import (
    InvalidDataError,
    StoreError,
    UnavailableError,
)
from openclaw_store.faults import PostgreSQLFaults
from openclaw_store.finishing import finish
from openclaw_store.statements import CHANNEL, combined
from openclaw_store.writer import RedoError

logger = logging.getLogger(__name__)

Result = TypeVar("Result")

MINIMUM_VERSION = 13
"""The oldest server that is supported; older ones get no more fixes from their makers."""

_LOCK = "SELECT 1 FROM counters WHERE id = 1 FOR UPDATE"
_BEGIN = f"BEGIN ISOLATION LEVEL READ COMMITTED; {_LOCK}"
_IDLE_LIMIT = "idle_in_transaction_session_timeout"
_MIGRATION_LOCK = 0x6F70656E636C6177  # "openclaw"
_CONNECT_SECONDS = 5.0  # at least: who gives a lock less time does not mean this
_ANSWER_SECONDS = 1.0  # that the server's own limits, which leave a connection usable, come first
_CLOSE_SECONDS = 0.5  # for the farewell; a connection that is cut off does without

_CAREFUL_AFTER_CONFLICT = 64
"""Transactions. So where several processes keep writing, little work is done in vain."""

_MAX_COMBINATIONS = 100
"""Statements that several were combined into; the server takes a millisecond to plan one."""

# The writer's statements are few, and each is planned once. A plan that was made while a table was
# empty serves for ever, so none may go through a whole table. Without this, the planner besides
# takes longer over each of them than the server to do it.
_WRITER_SETTINGS = {
    "plan_cache_mode": "force_generic_plan",
    "jit": "off",
    "enable_seqscan": "off",
    "enable_hashjoin": "off",
    "enable_mergejoin": "off",
    "enable_material": "off",
    # Without the lock: to wait for another writer, and then see that it was quicker.
    "default_transaction_isolation": "read committed",
}


class Cursor:
    """Speaks to the driver on behalf of a unit that has the write lock.

    Args:
        connection: The driver's own.
        wait: Waits for what is begun on the connection's event loop.
    """

    dialect = "postgresql"

    def __init__(self, connection: Any, wait: Callable[[Coroutine[Any, Any, Any]], Any]) -> None:
        self._connection = connection
        self._wait = wait

    def read(self, sql: str, parameters: Sequence[Any] = ()) -> Sequence[Any]:
        """The rows of a statement."""
        return self._fetch(sql, parameters)

    def execute(self, sql: str, parameters: Sequence[Any] = ()) -> Sequence[Any]:
        """The rows of a statement."""
        return self._fetch(sql, parameters)

    def write(self, sql: str, rows: Sequence[Sequence[Any]]) -> None:
        """Do a statement for many rows."""
        self._write(sql, rows)

    def count(self, sql: str, rows: Sequence[Sequence[Any]]) -> int:
        """Do a statement for many rows; returns how many rows of a table it wrote."""
        return self._write(sql, rows)

    def assume(self) -> Sequence[Any] | None:
        """Nothing: what is assumed here and proves wrong could not be done again."""
        return None

    def guard(self, sql: str, parameters: Sequence[Any]) -> None:
        """Write a row that nobody else can have changed."""
        self._fetch(sql, parameters)

    def _fetch(self, sql: str, parameters: Sequence[Any]) -> Sequence[Any]:
        rows: Sequence[Any] = self._wait(self._connection.fetch(sql, *parameters))
        return rows

    def _write(self, sql: str, rows: Sequence[Sequence[Any]]) -> int:
        """Do a statement once, with an array for each column."""
        arrays = map(list, zip(*rows, strict=True))
        status: str = self._wait(self._connection.execute(sql, *arrays))
        return int(status.split()[-1])


class WriterCursor(Cursor):
    """Keeps the writes of a transaction back, to send all of them in one statement.

    Without the lock, that statement is the transaction: it commits by itself, or finds that others
    have written meanwhile and does nothing.
    """

    has_lock = False
    lock_next = 0
    """How many transactions shall begin with the lock."""

    def __init__(self, connection: Any, wait: Callable[[Coroutine[Any, Any, Any]], Any]) -> None:
        super().__init__(connection, wait)
        self._kept: list[tuple[str, Sequence[Sequence[Any]]]] = []
        self._guard: tuple[str, Sequence[Any]] | None = None
        self._combinations: dict[tuple[str, ...], str] = {}
        self._left: Sequence[Any] | None = None  # the guard's row, by the last transaction
        self._has_assumed = False
        self._doubtful = 0  # transactions that are to assume nothing

    def begin(self) -> None:
        """Forget the last transaction."""
        self._kept, self._guard = [], None
        self._has_assumed = False
        self._doubtful = max(0, self._doubtful - 1)

    def read(self, sql: str, parameters: Sequence[Any] = ()) -> Sequence[Any]:
        """The rows of a statement, which may change before they are written."""
        if self._kept:
            self._send_kept()
        return self._fetch(sql, parameters)

    def execute(self, sql: str, parameters: Sequence[Any] = ()) -> Sequence[Any]:
        """The rows of a statement, which needs the lock."""
        self._send_kept()
        return self._fetch(sql, parameters)

    def write(self, sql: str, rows: Sequence[Sequence[Any]]) -> None:
        """Do a statement for many rows, later."""
        self._kept.append((sql, rows))

    def count(self, sql: str, rows: Sequence[Sequence[Any]]) -> int:
        """Do a statement for many rows, which needs the lock."""
        self._send_kept()
        return self._write(sql, rows)

    def assume(self) -> Sequence[Any] | None:
        """The guard's row as the last transaction left it, while that proves right."""
        if self.has_lock or self._doubtful:
            return None
        self._has_assumed = self._left is not None
        return self._left

    def guard(self, sql: str, parameters: Sequence[Any]) -> None:
        """Make all that is kept back depend on a statement that writes one row."""
        self._guard = sql, parameters

    def send(self) -> None:
        """Send what is kept back, in one statement, unless somebody else has written meanwhile."""
        if self._guard is None:
            if self._kept:
                self._send_kept()
            return
        self._kept.sort(key=itemgetter(0))  # for fewer combinations
        guard, parameters = self._guard
        is_single = all(len(rows) == 1 for _, rows in self._kept)
        statement = self._combine(guard, [sql for sql, _ in self._kept], is_single=is_single)
        if statement is None:
            self._send_kept()
            statement = combined(guard, [], is_single=True)
        for _, rows in self._kept:
            values = rows[0] if is_single else map(list, zip(*rows, strict=True))
            parameters = [*parameters, *values]
        if self._is_written(statement, parameters):
            self._left = self._guard[1][:2]
        elif self.has_lock:
            raise StoreError("the row of counters was changed by hand: try again")
        elif self._has_assumed:
            self._doubtful = _CAREFUL_AFTER_CONFLICT
            raise RedoError
        else:
            self._need_lock(_CAREFUL_AFTER_CONFLICT)

    def _is_written(self, statement: str, parameters: Sequence[Any]) -> bool:
        try:
            return bool(self._fetch(statement, parameters))
        except PostgreSQLFaults.raised() as error:
            if self._has_assumed and PostgreSQLFaults.code(error) == "23505":
                return False  # a row was not new
            raise

    def _combine(self, guard: str, writes: Sequence[str], *, is_single: bool) -> str | None:
        """One statement for several; `None` if it is not worth the server's time to plan it."""
        combination = (guard, *writes, "a row" if is_single else "rows")
        if combination not in self._combinations:
            if len(self._combinations) == _MAX_COMBINATIONS:
                return None
            self._combinations[combination] = combined(guard, writes, is_single=is_single)
        return self._combinations[combination]

    def _send_kept(self) -> None:
        if not self.has_lock:
            self._need_lock(1)
        for sql, rows in self._kept:
            self._write(sql, rows)
        self._kept = []

    def _need_lock(self, transactions: int) -> NoReturn:
        self.lock_next = transactions
        raise RedoError


class Writing:
    """The writer's connection, which belongs to its thread, with an event loop of its own."""

    def __init__(self, server: PostgreSQL) -> None:
        self._server = server
        self._loop = asyncio.new_event_loop()
        self._engine = server.engine(
            write=True, isolation_level="AUTOCOMMIT", settings=_WRITER_SETTINGS
        )
        try:
            self._connection = self._wait(self._engine.connect())
        except BaseException:
            self._close_loop()
            raise
        raw: Any = self._wait(self._connection.get_raw_connection())
        self._driver = raw.driver_connection
        self.cursor = WriterCursor(self._driver, self._wait)
        self._process: int = self._driver.get_server_pid()
        server.writers.add(self._process)

    def begin(self) -> None:
        """Begin a transaction, with the write lock if the cursor has asked for it."""
        self.cursor.begin()
        self.cursor.has_lock = self.cursor.lock_next > 0
        if self.cursor.has_lock:
            self.cursor.lock_next -= 1
            self._wait(self._driver.execute(_BEGIN))

    def commit(self) -> None:
        """Commit what `begin` began."""
        if self.cursor.has_lock:
            with self._server.faults.translated():  # until COMMIT, the outcome is known
                self.cursor.send()
            self._wait(self._driver.execute("COMMIT"))
        else:
            self.cursor.send()

    def close(self) -> None:
        """Close the connection, whatever state it is in; what was not committed is undone."""
        self._server.writers.discard(self._process)
        try:
            with suppress(*PostgreSQLFaults.raised()):
                self._wait(self._driver.close())
            with suppress(SQLAlchemyError):
                self._wait(self._connection.invalidate())
                self._wait(self._connection.close())
        finally:
            self._close_loop()

    def _close_loop(self) -> None:
        for _ in range(3):  # sockets are closed in the loop's next turns
            self._wait(asyncio.sleep(0))
        self._loop.close()

    def _wait(self, work: Coroutine[Any, Any, Result] | Awaitable[Result]) -> Result:
        return self._loop.run_until_complete(work)


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
        if "password" in url.query:  # it would be shown with the rest of the query
            raise InvalidDataError("db_path", "has its password behind the ?: put it before the @")
        self._url = url.set(drivername="postgresql+asyncpg")
        self._timeout = timeout
        self.location = url.render_as_string(hide_password=True)
        """Where it is, as people may see it."""
        self.faults = PostgreSQLFaults(self.location)
        self.writers: set[int] = set()
        """The server's processes that writers of this object are connected to."""

    def make_folder(self) -> None:
        """There is none to be made."""

    def prepare(self) -> None:
        """Refuse a server that is too old.

        Raises:
            UnavailableError: Naming the version found and the one needed, or what is in the way.
        """
        number = self.inspect(lambda connection: connection.scalar(text("SHOW server_version_num")))
        version = int(number) // 10_000
        if version < MINIMUM_VERSION:
            raise UnavailableError(
                f"{self.location} is PostgreSQL {version}, {MINIMUM_VERSION} or newer is needed: "
                "upgrade the server"
            )

    def inspect(self, work: Callable[[Connection], Result]) -> Result:
        """Do `work`, which reads, with a connection; blocks the thread, which has no loop."""

        async def run() -> Result:
            async with self.engine(write=False).connect() as connection:
                return await connection.run_sync(work)

        with self.faults.translated():
            return asyncio.run(run())

    def migrate(self, work: Callable[[Connection], Result]) -> Result:
        """Do `work` in a transaction while nobody else migrates; blocks the thread.

        Raises:
            UnavailableError: If another process migrates for longer than the timeout.
        """

        async def run() -> Result:
            engine = self.engine(write=True, is_long=True, json_deserializer=None)
            async with engine.begin() as connection:
                await connection.exec_driver_sql(f"SELECT pg_advisory_xact_lock({_MIGRATION_LOCK})")
                return await connection.run_sync(work)

        with self.faults.translated():
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
            "async_creator_fn": _connect,
            "connection_class": _connection_class(),
            "timeout": patience,
            "statement_cache_size": 2 * _MAX_COMBINATIONS,
            "command_timeout": None if is_long else self._timeout + _ANSWER_SECONDS,
            "server_settings": {
                "application_name": "openclaw_store",
                "lock_timeout": _milliseconds(self._timeout),
                **(settings or {}),
            },
        }
        if write:  # a writer waits for others, and then sees what they wrote
            options.setdefault("isolation_level", "READ COMMITTED")
            if not is_long:  # where a machine goes with the lock, its connection stays, for hours
                arguments["server_settings"][_IDLE_LIMIT] = _milliseconds(patience)
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
        """Begin the transaction of `session`, with the write lock."""
        connection = await session.connection()
        # Not only the lock: a writer that has read before must see that something was written,
        # even if the caller goes past the repositories.
        await connection.exec_driver_sql("UPDATE counters SET beat = beat + 1 WHERE id = 1")
        await connection.exec_driver_sql(f"NOTIFY {CHANNEL}")  # when it is committed
        limit = max(session.info["seconds"], _CONNECT_SECONDS) + 1
        await connection.exec_driver_sql(f"SET LOCAL {_IDLE_LIMIT} = {_milliseconds(limit)}")
        return connection.sync_connection  # type: ignore[return-value]  # begun, so not None

    async def end(self, session: AsyncSession) -> None:
        """Close `session`, whatever state its connection is in."""
        caught: tuple[type[Exception], ...] = (SQLAlchemyError, *self.faults.raised())
        try:
            await session.close()
        except caught as error:
            logger.debug("a connection was lost before it was closed: %s", error)
            await session.invalidate()

    def cursor(self, connection: Connection) -> Cursor:
        """What a unit writes with in the transaction of a session."""
        return Cursor(connection.connection.driver_connection, await_only)

    def writing(self) -> Writing:
        """A connection for the writer, on whose thread this is called."""
        return Writing(self)

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
        """Have the space of removed rows used again, and the statistics brought up to date."""

        async def run() -> None:
            engine = self.engine(write=True, is_long=True, isolation_level="AUTOCOMMIT")
            async with engine.connect() as connection:
                for table in ("tasks", "nodes", "changes", "counters"):
                    await connection.exec_driver_sql(f"VACUUM (ANALYZE) {table}")

        with self.faults.translated():
            asyncio.run(run())

    async def size(self, session: AsyncSession) -> int:
        """Bytes on the disk."""
        connection = await session.connection()
        found = await connection.exec_driver_sql("SELECT pg_database_size(current_database())")
        return int(found.scalar_one())


async def _connect(*arguments: Any, **options: Any) -> Any:
    """Connect to the end, even when the caller is cancelled meanwhile.

    Where the driver is stopped half-way, it leaves a connection that nobody closes.
    """
    try:
        return await finish(
            _connect_to_any(*arguments, **options), unwanted=lambda made: made.terminate()
        )
    except asyncio.CancelledError:
        await asyncio.sleep(0)  # the socket is closed in the loop's next turn
        raise


async def _connect_to_any(*arguments: Any, **options: Any) -> Any:
    """Connect to the first of the hosts that is the right one, each having its share of the time.

    The driver would wait for one that does not answer until there is no time for the others.
    """
    driver = importlib.import_module("asyncpg")
    hosts = options.get("host")
    if not isinstance(hosts, list) or options.get("target_session_attrs") == "prefer-standby":
        return await driver.connect(*arguments, **options)
    options["timeout"] /= len(hosts)
    reason: Exception | None = None
    for host, port in zip(hosts, options["port"], strict=True):
        try:
            return await driver.connect(*arguments, **{**options, "host": host, "port": port})
        except (
            OSError, driver.CannotConnectNowError, driver.TargetServerAttributeNotMatched
        ) as error:  # fmt: skip
            reason = error
    assert reason is not None
    raise reason


def _milliseconds(seconds: float) -> str:
    return str(min(max(1, int(seconds * 1000)), 2**31 - 1))


@cache
def _connection_class() -> type[Any]:
    """The driver's connection, but for one that is closed in time: others wait for it meanwhile."""
    base: type[Any] = importlib.import_module("asyncpg").Connection

    async def close(self: Any, *, timeout: float | None = None) -> None:
        try:
            await base.close(self, timeout=_CLOSE_SECONDS)
        finally:
            await asyncio.sleep(0)  # the socket is closed in the loop's next turn

    return type("Connection", (base,), {"__slots__": (), "close": close})
