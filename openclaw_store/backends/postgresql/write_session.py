"""The write session of PostgreSQL: a batch of writes takes one or two round trips to the server.

A *pessimistic* transaction locks the row of counters first, so it is the only writer, as on SQLite:
the rows that it reads stay the same until it commits. An *optimistic* transaction is one statement
that writes everything if the counters are as they were read, and nothing otherwise: a faster writer
has moved them. That takes two round trips instead of four. It takes one if nothing needs to be
read: the writer remembers its last counters and nodes, its callers mostly have the tasks, and the
statement checks their versions. After a conflict the writer reads again for a while, or takes the
lock first. A batch that only adds rows needs no retry: concurrent writers can change only its
revisions, and the server assigns those.

A batch has one deadline for all its attempts. The server limits an optimistic statement to
`lock_timeout`, which may be more than the rest. So a batch that has waited already takes the lock
first, with the rest as the limit.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Coroutine, Mapping, Sequence
from contextlib import suppress
from operator import itemgetter
from typing import Any, NoReturn, TypeVar

from sqlalchemy.exc import SQLAlchemyError
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine

from openclaw_store.backends.base import NoSpeculation, RedoError
from openclaw_store.backends.error_mapping import PostgreSQLErrorMapping
from openclaw_store.backends.postgresql.batch_sql import NUMBER, array, combined
from openclaw_store.errors import StoreError

Result = TypeVar("Result")

_PESSIMISTIC_AFTER_CONFLICT = 64
"""Number of transactions, so that few attempts fail where several processes keep writing."""

MAX_COMBINATIONS = 100
"""Limit of combined statements; the server takes a millisecond to plan one."""

# The writer's statements are few, and each is planned once: planning takes longer than execution.
# A plan made while a table was empty stays in use, so none may scan a whole table.
WRITER_SETTINGS = {
    "plan_cache_mode": "force_generic_plan",
    "jit": "off",
    "enable_seqscan": "off",
    "enable_hashjoin": "off",
    "enable_mergejoin": "off",
    "enable_material": "off",
    # An optimistic statement waits for a concurrent writer, and must then see its counters.
    "default_transaction_isolation": "read committed",
}


def milliseconds(seconds: float) -> str:
    """Return a value for the server's limits, for which 0 would be no limit."""
    return str(min(max(1, int(seconds * 1000)), 2**31 - 1))


class ConnectionRegistry:
    """State that the connections of one `PostgreSQL` share."""

    def __init__(self) -> None:
        self.writers: set[int] = set()
        """The server processes of its writers."""
        self.listener: int | None = None
        """The advisory lock of its listener, if that is the first one; see `notifications`."""


class Cursor(NoSpeculation):
    """The driver, in a transaction of a session; that cannot be repeated, so it expects nothing.

    Args:
        connection: The driver's connection.
        wait: Run a coroutine on the event loop of the connection.
    """

    dialect = "postgresql"

    def __init__(self, connection: Any, wait: Callable[[Coroutine[Any, Any, Any]], Any]) -> None:
        self._connection = connection
        self._wait = wait

    def read(self, sql: str, parameters: Sequence[Any] = ()) -> Sequence[Any]:
        return self._fetch(sql, parameters)

    def execute(self, sql: str, parameters: Sequence[Any] = ()) -> Sequence[Any]:
        return self._fetch(sql, parameters)

    def write(self, sql: str, rows: Sequence[Sequence[Any]]) -> None:
        self._write(sql, rows)

    def count(self, sql: str, rows: Sequence[Sequence[Any]]) -> int:
        return self._write(sql, rows)

    def compare_and_set(self, sql: str, parameters: Sequence[Any]) -> None:
        self._fetch(sql, parameters)

    def limit(self) -> float | None:
        """Return the seconds for the server to answer; `None` for the limit of the connection."""
        return None

    def _fetch(self, sql: str, parameters: Sequence[Any]) -> Sequence[Any]:
        answer = self._connection.fetch(sql, *parameters, timeout=self.limit())
        rows: Sequence[Any] = self._wait(answer)
        return rows

    def _write(self, sql: str, rows: Sequence[Sequence[Any]]) -> int:
        """Run a statement once, with an array for each column."""
        arrays = map(array, zip(*rows, strict=True))
        answer = self._connection.execute(sql, *arrays, timeout=self.limit())
        status: str = self._wait(answer)
        return int(status.split()[-1])


class WriterCursor(Cursor):
    """Collects the writes of a transaction, and sends all of them in one statement.

    In an optimistic transaction that statement is the whole transaction: it commits, or it detects
    a concurrent writer and writes nothing.
    """

    is_speculative = True
    has_lock = False
    lock_next = 0
    """Number of transactions, from the next one on, that must take the lock."""

    def __init__(
        self,
        connection: Any,
        wait: Callable[[Coroutine[Any, Any, Any]], Any],
        registry: ConnectionRegistry,
        lock_timeout: float,
        answer_seconds: float,
    ) -> None:
        super().__init__(connection, wait)
        self._registry = registry
        self._lock_timeout, self._answer_seconds = lock_timeout, answer_seconds
        self._until = 0.0
        self._pending: list[tuple[str, Sequence[Sequence[Any]]]] = []
        self._guard: tuple[str, Sequence[Any]] | None = None
        self._rebase: Callable[[int], None] | None = None
        self._combinations: dict[tuple[str, ...], str] = {}
        self._counters: Sequence[Any] | None = None  # as the last transaction wrote them
        self._expected: dict[Any, Any] = {}  # other rows, as they were then
        self._changed: dict[Any, Any] = {}  # by this transaction
        self._has_speculated = False
        self._reading = 0  # number of transactions that must not speculate
        self._contended = 0  # number of transactions for which writers are taken to compete

    def begin(self, until: float) -> None:
        """Start a new transaction, which may wait for locks until then."""
        self._until = until
        self.has_lock = self.lock_next > 0 or self._is_late()
        if self.lock_next:
            self.lock_next -= 1
        self._pending, self._guard, self._rebase, self._changed = [], None, None, {}
        self._has_speculated = False
        self._reading = max(0, self._reading - 1)
        self._contended = max(0, self._contended - 1)

    @property
    def is_contended(self) -> bool:
        """Return `True` if another process has written lately."""
        return self._contended > 0

    def left(self) -> float:
        """Return the seconds that the transaction may still wait for locks."""
        return max(0.0, min(self._until - time.monotonic(), self._lock_timeout))

    def limit(self) -> float:
        """Return the seconds left, and a moment for the server to report that they are over."""
        return self.left() + self._answer_seconds

    def read(self, sql: str, parameters: Sequence[Any] = ()) -> Sequence[Any]:
        if self._pending:
            self._send_pending()
        return self._fetch(sql, parameters)

    def execute(self, sql: str, parameters: Sequence[Any] = ()) -> Sequence[Any]:
        self._send_pending()
        return self._fetch(sql, parameters)

    def write(self, sql: str, rows: Sequence[Sequence[Any]]) -> None:
        self._pending.append((sql, rows))

    def count(self, sql: str, rows: Sequence[Sequence[Any]]) -> int:
        self._send_pending()
        return self._write(sql, rows)

    def expected(self) -> tuple[Sequence[Any], Mapping[Any, Any]] | None:
        if self.has_lock or self._reading or self._counters is None:
            return None
        return self._counters, self._expected

    def speculate(self) -> None:
        self._has_speculated = True

    def abort(self) -> NoReturn:
        self._reading = 2
        raise RedoError

    def expect(self, rows: Mapping[Any, Any]) -> None:
        self._changed.update(rows)

    def compare_and_set(self, sql: str, parameters: Sequence[Any]) -> None:
        self._guard = sql, parameters

    def assign_revisions(self, count: int, last: int, rebase: Callable[[int], None]) -> None:
        self._guard, self._rebase = (NUMBER, (count, last)), rebase

    def send(self) -> None:
        """Send the pending writes in one statement, which writes nothing after a conflict."""
        if self._guard is None:
            if self._pending:
                self._send_pending()
            elif self._has_speculated:  # without a write, a wrong expectation stays undetected
                self.abort()
            return
        if not self.has_lock and self._is_late():
            self._need_lock(1)
        # Any order is right: no statement sees the rows of another.
        self._pending.sort(key=itemgetter(0))  # fewer combinations of statements to plan
        guard, parameters = self._guard
        is_single = all(len(rows) == 1 for _, rows in self._pending)
        statement = self._combine(guard, [sql for sql, _ in self._pending], is_single=is_single)
        if statement is None:
            self._send_pending()
            statement = combined(guard, [], is_single=True)
        for _, rows in self._pending:
            values = rows[0] if is_single else map(array, zip(*rows, strict=True))
            parameters = [*parameters, *values]
        if written := self._do(statement, [*parameters, self._registry.listener]):
            self._note(*written)
        elif self.has_lock:
            raise StoreError("the row of counters was changed by hand: try again")
        elif self._rebase is not None:  # a row that was added exists
            self.abort()
        elif self._has_speculated:
            self._reading = _PESSIMISTIC_AFTER_CONFLICT
            raise RedoError
        else:
            self._need_lock(_PESSIMISTIC_AFTER_CONFLICT)

    def _note(self, _: str, revision: int, beat: int) -> None:
        """Expect the rows that were written; after a concurrent write, only these."""
        assert self._guard is not None
        _, parameters = self._guard
        if self._rebase is None:
            before = tuple(parameters[2:4])
        else:
            count, last = parameters
            before = revision - count, beat
            if revision != last:
                self._rebase(revision - last)
        if self._counters != before:
            self._expected = {}
            if self._counters is not None:
                self._contended = _PESSIMISTIC_AFTER_CONFLICT
        self._counters = revision, beat
        for key, row in self._changed.items():
            if row is None:
                self._expected.pop(key, None)
            else:
                self._expected[key] = row

    def _do(self, statement: str, parameters: Sequence[Any]) -> Sequence[Any] | None:
        """Return the row of the statement; `None` if it has written nothing."""
        try:
            rows = self._fetch(statement, parameters)
        except PostgreSQLErrorMapping.raised() as error:
            if self._has_speculated and PostgreSQLErrorMapping.code(error) == "23505":
                return None  # a row that was added exists
            raise
        return rows[0] if rows else None

    def _combine(self, guard: str, writes: Sequence[str], *, is_single: bool) -> str | None:
        """Return one statement for several; `None` if there are too many to plan another one."""
        combination = (guard, *writes, "a row" if is_single else "rows")
        if combination not in self._combinations:
            if len(self._combinations) == MAX_COMBINATIONS:
                return None
            self._combinations[combination] = combined(guard, writes, is_single=is_single)
        return self._combinations[combination]

    def _send_pending(self) -> None:
        if not self.has_lock:
            self._need_lock(1)
        for sql, rows in self._pending:
            self._write(sql, rows)
        self._pending = []

    def _is_late(self) -> bool:
        """Return `True` if the server's lock timeout is longer than the rest of the time."""
        return self.left() < self._lock_timeout - self._answer_seconds / 2

    def _need_lock(self, transactions: int) -> NoReturn:
        self.lock_next = transactions
        raise RedoError


class WriteSession:
    """The connection of the writer, with an event loop of its own on the writer's thread.

    Args:
        engine: Connects in autocommit mode, with `WRITER_SETTINGS`.
        until: Deadline of the first batch, by `time.monotonic`.
        error_mapping: Maps the driver's errors.
        registry: Holds the server process of this connection while it is open.
        lock_timeout: Limit of the server for waiting for locks, in seconds.
        extra: Seconds that connecting may take beyond the deadline.
        answer_seconds: Seconds for the server to answer after its own limits.
        lock: SQL that takes the lock of a pessimistic transaction, and limits that transaction.
    """

    def __init__(
        self,
        engine: AsyncEngine,
        until: float,
        error_mapping: PostgreSQLErrorMapping,
        registry: ConnectionRegistry,
        *,
        lock_timeout: float,
        extra: float,
        answer_seconds: float,
        lock: str,
    ) -> None:
        self._error_mapping = error_mapping
        self._lock = lock
        self._writers = registry.writers
        self._loop = asyncio.new_event_loop()
        self._meanwhile: Callable[[], None] | None = None
        try:
            self._connection = self._wait(self._connect(engine, until + extra + answer_seconds))
            raw: Any = self._wait(self._connection.get_raw_connection())
        except BaseException:
            self._close_loop()
            raise
        now = time.monotonic()  # connecting may have used up the time for the lock
        self._until = until if now < until else min(now + lock_timeout, until + extra)
        self._driver = raw.driver_connection
        self.cursor = WriterCursor(self._driver, self._wait, registry, lock_timeout, answer_seconds)
        self._process: int = self._driver.get_server_pid()
        self._writers.add(self._process)

    @property
    def is_pipelined(self) -> bool:
        return not self.cursor.is_contended

    def begin(self, until: float, meanwhile: Callable[[], None]) -> None:
        self._meanwhile = meanwhile
        self.cursor.begin(max(until, self._until))
        if self.cursor.has_lock:
            self._execute(
                f"BEGIN ISOLATION LEVEL READ COMMITTED; SET LOCAL lock_timeout = "
                f"{milliseconds(self.cursor.left())}; {self._lock}"
            )

    def commit(self) -> None:
        if self.cursor.has_lock:
            with self._error_mapping.mapped():  # an error before COMMIT is no unknown outcome
                self.cursor.send()
            self._execute("COMMIT")
        else:
            self.cursor.send()

    def close(self) -> None:
        # First: the server may give the process number to another client.
        self._writers.discard(self._process)
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
        self._wait(self._driver.execute(sql, timeout=self.cursor.limit()))

    def _close_loop(self) -> None:
        for _ in range(3):  # the loop closes sockets in its next iterations
            self._wait(asyncio.sleep(0))
        self._loop.close()

    def _wait(self, work: Coroutine[Any, Any, Result] | Awaitable[Result]) -> Result:
        meanwhile, self._meanwhile = self._meanwhile, None
        if meanwhile is not None:  # in the second iteration: the first one sends `work`
            self._loop.call_soon(self._loop.call_soon, meanwhile)
        return self._loop.run_until_complete(work)
