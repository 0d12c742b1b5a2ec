"""How a batch of writes becomes round trips to PostgreSQL: mostly one or two.

Whoever writes either locks the row of counters first, and so writes alone, as on SQLite: what it
reads then cannot move until it has committed. Or it moves the counters only if they are as they
were when it read, in the very statement that writes all the rest: who was quicker has moved them,
and nothing is written. That takes two round trips to the server instead of four. It takes one where
nothing needs to be read: the writer knows how it left the counters and the nodes, and its callers
mostly know the tasks, whose versions the statement makes sure of. So it does, until it meets
another one; then it reads again for a while, or has the lock first. A batch that only adds can go
on: all that others can change of it is its numbers, and those the server gives it, behind what they
have written.

A batch has one deadline, however often it is done again. Without the lock, the server has it wait
for `lock_timeout`, whatever is left. So a batch that has waited already takes the lock first, and
waits for that only as long as is left.
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

from openclaw_store.backends.base import NothingKnown, RedoError
from openclaw_store.backends.error_mapping import PostgreSQLErrorMapping
from openclaw_store.backends.postgresql.batch_sql import NUMBER, array, combined
from openclaw_store.errors import StoreError

Result = TypeVar("Result")

_LOCK = "SELECT 1 FROM counters WHERE id = 1 FOR UPDATE"

_CAREFUL_AFTER_CONFLICT = 64
"""Transactions. So where several processes keep writing, little work is done in vain."""

MAX_COMBINATIONS = 100
"""Statements that several were combined into; the server takes a millisecond to plan one."""

# The writer's statements are few, and each is planned once. A plan that was made while a table was
# empty serves for ever, so none may go through a whole table. Without this, the planner besides
# takes longer over each of them than the server to do it.
WRITER_SETTINGS = {
    "plan_cache_mode": "force_generic_plan",
    "jit": "off",
    "enable_seqscan": "off",
    "enable_hashjoin": "off",
    "enable_mergejoin": "off",
    "enable_material": "off",
    # Without the lock: to wait for another writer, and then see that it was quicker.
    "default_transaction_isolation": "read committed",
}


def milliseconds(seconds: float) -> str:
    """What the server's limits are given in; to it, 0 is no limit."""
    return str(min(max(1, int(seconds * 1000)), 2**31 - 1))


class ConnectionRegistry:
    """What the connections of one `PostgreSQL` know of each other."""

    def __init__(self) -> None:
        self.writers: set[int] = set()
        """The server's processes that its writers are connected to."""
        self.listener: int | None = None
        """The lock of the one that listens, if that is the first of all who do; see `wakeups`."""


class Cursor(NothingKnown):
    """Speaks to the driver on behalf of a transaction that has the write lock.

    It knows nothing: what is assumed here and proves wrong could not be done again.

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

    def compare_and_set(self, sql: str, parameters: Sequence[Any]) -> None:
        """Write a row that nobody else can have changed."""
        self._fetch(sql, parameters)

    def limit(self) -> float | None:
        """Seconds that the server has to answer; `None` for those of the connection."""
        return None

    def _fetch(self, sql: str, parameters: Sequence[Any]) -> Sequence[Any]:
        answer = self._connection.fetch(sql, *parameters, timeout=self.limit())
        rows: Sequence[Any] = self._wait(answer)
        return rows

    def _write(self, sql: str, rows: Sequence[Sequence[Any]]) -> int:
        """Do a statement once, with an array for each column."""
        arrays = map(array, zip(*rows, strict=True))
        answer = self._connection.execute(sql, *arrays, timeout=self.limit())
        status: str = self._wait(answer)
        return int(status.split()[-1])


class WriterCursor(Cursor):
    """Keeps the writes of a transaction back, to send all of them in one statement.

    Without the lock, that statement is the transaction: it commits by itself, or finds that others
    have written meanwhile and does nothing.
    """

    is_speculative = True
    has_lock = False
    lock_next = 0
    """How many transactions shall begin with the lock."""

    def __init__(
        self,
        connection: Any,
        wait: Callable[[Coroutine[Any, Any, Any]], Any],
        registry: ConnectionRegistry,
        patience: float,
        answer_seconds: float,
    ) -> None:
        super().__init__(connection, wait)
        self._registry = registry
        self._patience, self._answer_seconds = patience, answer_seconds
        self._until = 0.0
        self._kept: list[tuple[str, Sequence[Sequence[Any]]]] = []
        self._guard: tuple[str, Sequence[Any]] | None = None
        self._renumber: Callable[[int], None] | None = None
        self._combinations: dict[tuple[str, ...], str] = {}
        self._left: Sequence[Any] | None = None  # the guard's row, by the last transaction
        self._known: dict[Any, Any] = {}  # other rows, as they were then
        self._learned: dict[Any, Any] = {}  # by this transaction
        self._has_assumed = False
        self._doubtful = 0  # transactions that are to assume nothing
        self._contended = 0  # transactions for which others are taken to be writing, too

    def begin(self, until: float) -> None:
        """Forget the last transaction; this one waits for others until then."""
        self._until = until
        self.has_lock = self.lock_next > 0 or self._is_late()
        if self.lock_next:
            self.lock_next -= 1
        self._kept, self._guard, self._renumber, self._learned = [], None, None, {}
        self._has_assumed = False
        self._doubtful = max(0, self._doubtful - 1)
        self._contended = max(0, self._contended - 1)

    @property
    def is_contended(self) -> bool:
        """Whether others have written lately."""
        return self._contended > 0

    def left(self) -> float:
        """Seconds that it may still wait for others."""
        return max(0.0, min(self._until - time.monotonic(), self._patience))

    def limit(self) -> float:
        """Seconds that the server has to answer: those left, and a moment to say so."""
        return self.left() + self._answer_seconds

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

    def known(self) -> tuple[Sequence[Any], Mapping[Any, Any]] | None:
        """Rows as the last transactions left them, while that proves right."""
        if self.has_lock or self._doubtful or self._left is None:
            return None
        return self._left, self._known

    def assume(self) -> None:
        """Find out later whether they were."""
        self._has_assumed = True

    def doubt(self) -> NoReturn:
        """Begin anew, and read."""
        self._doubtful = 2
        raise RedoError

    def remember(self, rows: Mapping[Any, Any]) -> None:
        """Assume these rows once they are written."""
        self._learned.update(rows)

    def compare_and_set(self, sql: str, parameters: Sequence[Any]) -> None:
        """Make all that is kept back depend on a statement that writes one row."""
        self._guard = sql, parameters

    def number(self, count: int, last: int, renumber: Callable[[int], None]) -> None:
        """Have the server number what is kept back."""
        self._guard, self._renumber = (NUMBER, (count, last)), renumber

    def send(self) -> None:
        """Send what is kept back, in one statement, unless somebody else has written meanwhile."""
        if self._guard is None:
            if self._kept:
                self._send_kept()
            elif self._has_assumed:  # nothing is written, so nobody would find out
                self.doubt()
            return
        if not self.has_lock and self._is_late():
            self._need_lock(1)
        self._kept.sort(key=itemgetter(0))  # for fewer combinations
        guard, parameters = self._guard
        is_single = all(len(rows) == 1 for _, rows in self._kept)
        statement = self._combine(guard, [sql for sql, _ in self._kept], is_single=is_single)
        if statement is None:
            self._send_kept()
            statement = combined(guard, [], is_single=True)
        for _, rows in self._kept:
            values = rows[0] if is_single else map(array, zip(*rows, strict=True))
            parameters = [*parameters, *values]
        if written := self._do(statement, [*parameters, self._registry.listener]):
            self._note(*written)
        elif self.has_lock:
            raise StoreError("the row of counters was changed by hand: try again")
        elif self._renumber is not None:  # a row was not new
            self.doubt()
        elif self._has_assumed:
            self._doubtful = _CAREFUL_AFTER_CONFLICT
            raise RedoError
        else:
            self._need_lock(_CAREFUL_AFTER_CONFLICT)

    def _note(self, _: str, revision: int, beat: int) -> None:
        """Know the rows that were written, and forget all others if somebody else has written."""
        assert self._guard is not None
        _, parameters = self._guard
        if self._renumber is None:
            before = tuple(parameters[2:4])
        else:
            count, last = parameters
            before = revision - count, beat
            if revision != last:
                self._renumber(revision - last)
        if self._left != before:
            self._known = {}
            if self._left is not None:
                self._contended = _CAREFUL_AFTER_CONFLICT
        self._left = revision, beat
        for place, row in self._learned.items():
            if row is None:
                self._known.pop(place, None)
            else:
                self._known[place] = row

    def _do(self, statement: str, parameters: Sequence[Any]) -> Sequence[Any] | None:
        """What the statement gives; `None` if it has written nothing."""
        try:
            rows = self._fetch(statement, parameters)
        except PostgreSQLErrorMapping.raised() as error:
            if self._has_assumed and PostgreSQLErrorMapping.code(error) == "23505":
                return None  # a row was not new
            raise
        return rows[0] if rows else None

    def _combine(self, guard: str, writes: Sequence[str], *, is_single: bool) -> str | None:
        """One statement for several; `None` if it is not worth the server's time to plan it."""
        combination = (guard, *writes, "a row" if is_single else "rows")
        if combination not in self._combinations:
            if len(self._combinations) == MAX_COMBINATIONS:
                return None
            self._combinations[combination] = combined(guard, writes, is_single=is_single)
        return self._combinations[combination]

    def _send_kept(self) -> None:
        if not self.has_lock:
            self._need_lock(1)
        for sql, rows in self._kept:
            self._write(sql, rows)
        self._kept = []

    def _is_late(self) -> bool:
        """Whether, without the lock, the server could have it wait longer than anybody listens."""
        return self.left() < self._patience - self._answer_seconds / 2

    def _need_lock(self, transactions: int) -> NoReturn:
        self.lock_next = transactions
        raise RedoError


class WriteSession:
    """The writer's connection, which belongs to its thread, with an event loop of its own.

    Args:
        engine: What connects, in autocommit, with `WRITER_SETTINGS`.
        until: When the batch that it is made for gives up waiting, by `time.monotonic`.
        extra: Seconds by which connecting may take longer than that.
        error_mapping: Tells what the driver's errors mean.
        registry: Is told the server's process for this connection, while it is open.
        patience: Seconds that the server has a statement wait for others.
        answer_seconds: What the server has beyond its own limits to answer.
        limits: SQL that has the server bound a transaction with the lock.
    """

    def __init__(
        self,
        engine: AsyncEngine,
        until: float,
        error_mapping: PostgreSQLErrorMapping,
        registry: ConnectionRegistry,
        *,
        patience: float,
        extra: float,
        answer_seconds: float,
        limits: str,
    ) -> None:
        self._error_mapping = error_mapping
        self._limits = limits
        self._writers = registry.writers
        self._loop = asyncio.new_event_loop()
        self._meanwhile: Callable[[], None] | None = None
        try:
            self._connection = self._wait(self._connect(engine, until + extra + answer_seconds))
            raw: Any = self._wait(self._connection.get_raw_connection())
        except BaseException:
            self._close_loop()
            raise
        now = time.monotonic()  # of what connecting has used up, the lock has something, too
        self._until = until if now < until else min(now + patience, until + extra)
        self._driver = raw.driver_connection
        self.cursor = WriterCursor(self._driver, self._wait, registry, patience, answer_seconds)
        self._process: int = self._driver.get_server_pid()
        self._writers.add(self._process)

    @property
    def is_pipelined(self) -> bool:
        """Whether the server would be idle while this process answers callers."""
        return not self.cursor.is_contended

    def begin(self, until: float, meanwhile: Callable[[], None]) -> None:
        """Begin a transaction, with the write lock if the cursor needs it."""
        self._meanwhile = meanwhile
        self.cursor.begin(max(until, self._until))
        if self.cursor.has_lock:
            self._execute(
                f"BEGIN ISOLATION LEVEL READ COMMITTED; SET LOCAL lock_timeout = "
                f"{milliseconds(self.cursor.left())}; {_LOCK}; {self._limits}"
            )

    def commit(self) -> None:
        """Commit what `begin` began."""
        if self.cursor.has_lock:
            with self._error_mapping.mapped():  # until COMMIT, the outcome is known
                self.cursor.send()
            self._execute("COMMIT")
        else:
            self.cursor.send()

    def close(self) -> None:
        """Close the connection, whatever state it is in; what was not committed is undone."""
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
        for _ in range(3):  # sockets are closed in the loop's next turns
            self._wait(asyncio.sleep(0))
        self._loop.close()

    def _wait(self, work: Coroutine[Any, Any, Result] | Awaitable[Result]) -> Result:
        meanwhile, self._meanwhile = self._meanwhile, None
        if meanwhile is not None:  # in the loop's second turn: in the first one, `work` is sent
            self._loop.call_soon(self._loop.call_soon, meanwhile)
        return self._loop.run_until_complete(work)
