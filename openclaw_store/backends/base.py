"""The interfaces of a database engine, with the contract of every method."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, Protocol, TypeVar

from sqlalchemy import Connection
from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession

from openclaw_store.backends.error_mapping import ErrorMapping

Result = TypeVar("Result")

DEFAULT_LOCATION = "./data/cluster.db"
DEFAULT_TIMEOUT_SECONDS = 30.0


class CounterStatements(NamedTuple):
    """SQL for the row of counters, compiled from its declarative model; without parameters."""

    read: str
    """Select the revision and the heartbeat sequence number."""
    lock: str
    """Lock the row."""
    increment: str
    """Increase the heartbeat sequence number, which also locks the row."""


class WriteSession(Protocol):
    """The connection of the writer; all calls are made on the writer's thread."""

    @property
    def cursor(self) -> Cursor: ...

    @property
    def is_pipelined(self) -> bool:
        """Return `True` if a batch should leave half of many callers to the next batch.

        That pays where another process does the work, which would be idle between batches.
        """

    def begin(self, until: float, meanwhile: Callable[[], None]) -> None:
        """Begin a transaction with the write lock.

        Args:
            until: Deadline for locks of other processes, by `time.monotonic`.
            meanwhile: Called at the latest when the thread waits for the database.
        """

    def commit(self) -> None:
        """Commit the transaction."""

    def close(self) -> None:
        """Close the connection in any state; an open transaction is rolled back."""


class Backend(Protocol):
    """One database: a SQLite file, or a database on a PostgreSQL server."""

    @property
    def dialect(self) -> str:
        """`sqlite` or `postgresql`."""

    @property
    def location(self) -> str:
        """The path or URL without its password, for messages."""

    @property
    def error_mapping(self) -> ErrorMapping: ...

    def exists(self) -> bool:
        """Return `True` if the file exists; a server is assumed to."""

    def make_folder(self) -> None:
        """Make the folder of the file.

        Raises:
            UnavailableError: If it cannot be made.
        """

    def prepare(self) -> None:
        """Make the file if necessary, and refuse an unusable database; blocks the thread.

        Raises:
            StoreError: With the location, the problem and the remedy.
        """

    def inspect(self, work: Callable[[Connection], Result]) -> Result:
        """Run `work`, which only reads, with a connection; blocks the thread."""

    def migrate(
        self,
        work: Callable[[Connection], Result],
        copy_to: Callable[[Connection], Path | None] = ...,
    ) -> Result:
        """Run `work` in a transaction that excludes all other migrations; blocks the thread.

        Args:
            copy_to: Return the path to copy the file to before, or `None` for no copy. It is not
                called for a server.

        Raises:
            OutcomeUnknownError: If the disk failed while committing; the copy is kept.
            UnavailableError: If the lock is not free within the timeout, or the file that is to be
                copied is open elsewhere.
            SchemaMismatchError: If the result has a row that refers to a missing row.
        """

    def engine(self, *, write: bool, **options: Any) -> AsyncEngine:
        """Return an engine for coroutines, read-only or for write transactions."""

    async def begin(self, session: AsyncSession, counters: CounterStatements) -> Connection:
        """Begin the transaction of `session` with the write lock."""

    async def end(self, session: AsyncSession) -> None:
        """Close `session`, in any state of its connection."""

    def cursor(self, connection: Connection) -> Cursor:
        """Return the cursor for writes in the transaction of a session."""

    def write_session(self, until: float, counters: CounterStatements) -> WriteSession:
        """Return a connection for the writer; called on the writer's thread.

        Args:
            until: Deadline for connecting, by `time.monotonic`.
            counters: Locks the row of counters, where that is the write lock.
        """

    def dispose(self) -> None:
        """Release the resources that all connections shared."""

    def backup(self, target: Path, *, overwrite: bool) -> None:
        """Write a consistent copy, while reads and writes go on; blocks the thread.

        The copy gets its name when it is complete.

        Raises:
            InvalidDataError: If `target` exists and `overwrite` is off, or is the database itself.
            UnavailableError: If the copy cannot be written.
        """

    def vacuum(self) -> None:
        """Release the space of removed rows; blocks the thread.

        Raises:
            UnavailableError: If the database is locked, or the role lacks the privilege.
        """

    async def size(self, session: AsyncSession) -> int:
        """Return the bytes on the disk."""


class RedoError(Exception):
    """Nothing was written: apply the batch again, in a transaction that speculates less."""


class Cursor(Protocol):
    """The driver, as the operations of one transaction use it.

    The transaction may be optimistic, without the write lock: then rows that were read may change
    before they are written, so every write depends on `compare_and_set`, or on `assign_revisions`
    if only its revisions can be wrong. Operations that `read`, decide and `write` need not
    distinguish the two cases; `execute` and `count` raise `RedoError` in an optimistic one.
    """

    @property
    def dialect(self) -> str:
        """`sqlite` or `postgresql`."""

    @property
    def is_speculative(self) -> bool:
        """`True` if `expected` may return rows."""

    def read(self, sql: str, parameters: Sequence[Any]) -> Sequence[Any]:
        """Return the rows of a query that includes the counters, or that follows one."""

    def write(self, sql: str, rows: Sequence[Sequence[Any]]) -> None:
        """Run a statement for many rows, before the next read and before the commit.

        Consecutive statements may run in any order, and none sees the rows of another.
        """

    def expected(self) -> tuple[Sequence[Any], Mapping[Any, Any]] | None:
        """Return the expected counters and nodes; `None` if the transaction must read them."""

    def speculate(self) -> None:
        """Record that the transaction relies on `expected` and has not read these rows.

        The write detects wrong counters and added rows that exist. `compare_and_set` must check all
        other expectations.
        """

    def abort(self) -> None:
        """Raise `RedoError`: the write would not detect a wrong expectation."""

    def expect(self, rows: Mapping[Any, Any]) -> None:
        """Expect these rows in later transactions, once this one commits; `None` for a removal."""

    def compare_and_set(self, sql: str, parameters: Sequence[Any]) -> None:
        """Write the counters if they are as they were read; otherwise write nothing at all.

        The parameters are the new values, then as many expected ones.
        """

    def assign_revisions(self, count: int, last: int, rebase: Callable[[int], None]) -> None:
        """Write in any case, with revisions after the ones of concurrent writers.

        Args:
            count: Number of revisions.
            last: The last revision, if there is no concurrent writer.
            rebase: Called with the increase of all revisions, if there is one.
        """

    def execute(self, sql: str, parameters: Sequence[Any] = ()) -> Sequence[Any]:
        """Run any statement, and return its rows."""

    def count(self, sql: str, rows: Sequence[Sequence[Any]]) -> int:
        """Run a statement for many rows, and return the number of rows written."""


class NoSpeculation:
    """The part of a cursor that expects no rows, so that its transactions read everything."""

    is_speculative = False

    def expected(self) -> tuple[Sequence[Any], Mapping[Any, Any]] | None:
        return None

    def speculate(self) -> None:
        raise AssertionError("nothing is expected")

    def abort(self) -> None:
        raise AssertionError("nothing is expected")

    def expect(self, rows: Mapping[Any, Any]) -> None:
        pass

    def assign_revisions(self, count: int, last: int, rebase: Callable[[int], None]) -> None:
        raise AssertionError("nothing is expected")
