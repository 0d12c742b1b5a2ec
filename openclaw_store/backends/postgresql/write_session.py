"""The write session of PostgreSQL: a batch of writes is one call of the server.

The call takes the write lock, checks what the batch was decided on, writes, and commits. If
operations need the lock before they decide, or the call finds other rows, the batch is applied in a
transaction that locks the row of counters first, as any transaction does on SQLite.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Coroutine, Sequence
from contextlib import suppress
from typing import Any, NoReturn, TypeVar

from sqlalchemy.exc import SQLAlchemyError
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine
from sqlalchemy.util import await_only

from openclaw_store.backends.base import BatchCursor, LockRequiredError
from openclaw_store.backends.error_mapping import PostgreSQLErrorMapping
from openclaw_store.backends.postgresql.connections import is_lost, may_be_lost
from openclaw_store.backends.postgresql.protocol import array

Result = TypeVar("Result")

_LARGE = 1 << 18
"""Characters of rows from which a session converts them on a thread, as it takes a millisecond."""

# The writer's statements are few, and each is planned once: planning takes longer than execution.
# A plan made while a table was empty stays in use, so none may scan a whole table.
WRITER_SETTINGS = {
    "plan_cache_mode": "force_generic_plan",
    "jit": "off",
    "enable_seqscan": "off",
    "enable_hashjoin": "off",
    "enable_mergejoin": "off",
    "enable_material": "off",
    # A call that waits for the lock must then see the rows of its last holder.
    "default_transaction_isolation": "read committed",
}


def milliseconds(seconds: float) -> str:
    """Return a value for the server's limits, for which 0 would be no limit."""
    return str(min(max(1, int(seconds * 1000)), 2**31 - 1))


_LOCK_REQUIRED = "40001"
"""The SQLSTATE of a call that has undone its writes, as it needs the lock before it searches."""


class ConnectionRegistry:
    """State that the writer and the listener of one `PostgreSQL` share."""

    def __init__(self) -> None:
        self.writers: set[int] = set()
        """The server processes of its writers."""
        self.listener: int | None = None
        """The advisory lock of its listener, if that is the first one; see `listening`."""


class Cursor:
    """The driver, in a transaction that has the write lock.

    Args:
        connection: The driver's connection.
        wait: Run a coroutine on the event loop of the connection.
        schema: The schema of the tables.
        limit: Return the seconds for the server to answer; `None` for those of the connection.
    """

    dialect = "postgresql"

    def __init__(
        self,
        connection: Any,
        wait: Callable[[Coroutine[Any, Any, Any]], Any],
        schema: str,
        limit: Callable[[], float | None] = lambda: None,
    ) -> None:
        self._schema = schema
        self._connection = connection
        self._wait = wait
        self._limit = limit

    @property
    def schema(self) -> str:
        return self._schema

    def execute(self, sql: str, parameters: Sequence[Any] = ()) -> Sequence[Any]:
        answer = self._connection.fetch(sql, *parameters, timeout=self._limit())
        rows: Sequence[Any] = self._wait(answer)
        return rows

    def write(self, sql: str, rows: Sequence[Sequence[Any]]) -> None:
        self.count(sql, rows)

    def count(self, sql: str, rows: Sequence[Sequence[Any]]) -> int:
        """Run a statement once, with an array for each column."""
        arrays = self._arrays(rows)
        status: str = self._wait(self._connection.execute(sql, *arrays, timeout=self._limit()))
        return int(status.split()[-1])

    def _arrays(self, rows: Sequence[Sequence[Any]]) -> Sequence[str | None]:
        return [*map(array, zip(*rows, strict=True))]


class SessionCursor(Cursor):
    """A cursor on the event loop of a session, which serves other callers meanwhile."""

    def __init__(self, connection: Any, schema: str) -> None:
        super().__init__(connection, await_only, schema)

    def _arrays(self, rows: Sequence[Sequence[Any]]) -> Sequence[str | None]:
        size = sum(len(value) for row in rows for value in row if isinstance(value, str))
        if size < _LARGE:
            return super()._arrays(rows)
        return await_only(asyncio.to_thread(super()._arrays, rows))


class CallCursor(BatchCursor):
    """A cursor of the writer that sends one call; it reads with another cursor."""

    dialect = "postgresql"

    def __init__(self, cursor: Cursor, *, can_claim: bool) -> None:
        self._cursor = cursor
        self.can_claim = can_claim
        self.newest_revision = 0
        self.is_lock_required = False
        """True if the next transaction must have the lock."""
        self.call: tuple[str, Sequence[Any], Callable[[Sequence[Any]], None]] | None = None
        """The call of this transaction: SQL, parameters, and the receiver of its rows."""

    @property
    def schema(self) -> str:
        return self._cursor.schema

    def execute(self, sql: str, parameters: Sequence[Any] = ()) -> Sequence[Any]:
        self.require_lock()

    def write(self, sql: str, rows: Sequence[Sequence[Any]]) -> None:
        self.require_lock()

    def count(self, sql: str, rows: Sequence[Sequence[Any]]) -> int:
        self.require_lock()

    def peek(self, sql: str, parameters: Sequence[Any]) -> Sequence[Any]:
        return self._cursor.execute(sql, parameters)

    def prepare(
        self, sql: str, parameters: Sequence[Any], finish: Callable[[Sequence[Any]], None]
    ) -> None:
        self.call = sql, parameters, finish

    def require_lock(self) -> NoReturn:
        self.is_lock_required = True
        raise LockRequiredError


class WriteSession:
    """The connection of the writer, with an event loop of its own on the writer's thread.

    Args:
        engine: Connects in autocommit mode, with `WRITER_SETTINGS`.
        until: Deadline of the first batch, by `time.monotonic`.
        registry: Holds the server process of this connection while it is open.
        lock_timeout: Limit of the server for waiting for locks, in seconds.
        extra: Seconds that connecting may take beyond the deadline.
        answer_seconds: Seconds for the server to answer after its own limits.
        lock: SQL that takes the write lock of a transaction, and limits that transaction.
        notify: SQL that notifies the listeners.
        is_one_call: Write a batch with one call where possible; the call notifies, too.
        can_claim: The call can claim tasks.
        schema: The schema of the tables.
    """

    def __init__(
        self,
        engine: AsyncEngine,
        until: float,
        registry: ConnectionRegistry,
        *,
        lock_timeout: float,
        extra: float,
        answer_seconds: float,
        lock: str,
        notify: str,
        is_one_call: bool,
        can_claim: bool,
        schema: str,
    ) -> None:
        self._lock, self._notify = lock, notify
        self._registry = registry
        self._lock_timeout, self._answer_seconds = lock_timeout, answer_seconds
        self._loop = asyncio.new_event_loop()
        try:
            self._connection = self._wait(self._connect(engine, until + extra + answer_seconds))
            raw: Any = self._wait(self._connection.get_raw_connection())
        except BaseException:
            self._close_loop()
            raise
        now = time.monotonic()  # connecting may have used up the time for the lock
        self._until = until if now < until else min(now + lock_timeout, until + extra)
        self._driver = raw.driver_connection
        self._locked = Cursor(self._driver, self._wait, schema, self._limit)
        self._call = CallCursor(self._locked, can_claim=can_claim)
        self._is_one_call = is_one_call
        self.cursor: Cursor | CallCursor = self._call
        self._process: int = self._driver.get_server_pid()
        registry.writers.add(self._process)

    def begin(self, until: float) -> bool:
        if may_be_lost(self._driver) and self._wait(is_lost(self._driver)):
            return False
        self._until = max(until, self._until)
        is_one_call = self._is_one_call and not self._call.is_lock_required
        self.cursor = self._call if is_one_call else self._locked
        # The lock is required for one transaction only; the next batch is one call again.
        self._call.is_lock_required, self._call.call = False, None
        if self.cursor is self._locked:
            self._execute(
                f"BEGIN ISOLATION LEVEL READ COMMITTED; SET LOCAL lock_timeout = "
                f"{milliseconds(self._left())}; {self._lock}"
            )
        return True

    def commit(self) -> None:
        if self.cursor is self._locked:
            self._execute(f"{self._notify}; COMMIT")
        elif self._call.call is not None:
            (sql, parameters, finish), self._call.call = self._call.call, None
            wait, listener = milliseconds(self._left()), self._registry.listener
            try:
                found = self._locked.execute(sql, (*parameters, wait, listener))
            except PostgreSQLErrorMapping.raised() as error:
                if PostgreSQLErrorMapping.code(error) == _LOCK_REQUIRED:
                    self._call.require_lock()
                raise
            finish(found)

    def close(self) -> None:
        # First: once closed, the server may give the process number to another client.
        self._registry.writers.discard(self._process)
        try:
            with suppress(*PostgreSQLErrorMapping.raised()):
                self._wait(self._driver.close())
            with suppress(SQLAlchemyError):
                self._wait(self._connection.invalidate())
                self._wait(self._connection.close())
        finally:
            self._close_loop()

    @staticmethod
    async def _connect(engine: AsyncEngine, until: float) -> AsyncConnection:
        async with asyncio.timeout(max(0.0, until - time.monotonic())):
            return await engine.connect()

    def _execute(self, sql: str) -> None:
        self._wait(self._driver.execute(sql, timeout=self._limit()))

    def _left(self) -> float:
        """Return the seconds that the transaction may still wait for locks."""
        return max(0.0, min(self._until - time.monotonic(), self._lock_timeout))

    def _limit(self) -> float:
        """Return the seconds left, and a moment for the server to report that they are over."""
        return self._left() + self._answer_seconds

    def _close_loop(self) -> None:
        for _ in range(3):  # the loop closes sockets in its next iterations
            self._wait(asyncio.sleep(0))
        self._loop.close()

    def _wait(self, work: Coroutine[Any, Any, Result] | Awaitable[Result]) -> Result:
        return self._loop.run_until_complete(work)
