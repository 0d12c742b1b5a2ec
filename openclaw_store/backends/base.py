"""The interfaces of a database engine, with the contract of every method."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, NoReturn, Protocol, TypeVar

from sqlalchemy import Connection, Engine
from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession

from openclaw_store.backends.cancellation import Stop
from openclaw_store.backends.error_mapping import ErrorMapping

Result = TypeVar("Result")

PUBLIC = "public"
"""The schema of the tables on a server, unless they are of a cluster. All SQL names the schema, and
operators are only those of the system: other roles may write to schemas in the search path."""

DEFAULT_LOCATION = "./data/cluster.db"
DEFAULT_TIMEOUT_SECONDS = 30.0
DEFAULT_ANSWER_SECONDS = 10.0


def qualified(schema: str | None, name: str) -> str:
    """Return the name of a table or function with its schema; SQLite has none."""
    return f"{schema}.{name}" if schema else name


def schema_of(bind: Connection | Engine) -> str | None:
    """Return the schema of the tables, with which a backend makes its engines; `None` on SQLite."""
    translated: Mapping[str | None, str] = bind.get_execution_options().get(
        "schema_translate_map", {}
    )
    return translated.get(None)


OnCommit = Callable[[int, int], object]
"""Receives the newest committed revision and heartbeat sequence number.

`False` means that an earlier notification is still being processed, and will include this one.
"""


class CounterStatements(NamedTuple):
    """SQL for the row of counters, compiled from its declarative model; without parameters."""

    read: str
    """Select the revision and the heartbeat sequence number."""
    lock: str
    """Lock the row."""
    schema: str | None
    """The schema of the table; `None` on SQLite."""


class WriteSession(Protocol):
    """The connection of the writer; all calls are made on the writer's thread."""

    @property
    def cursor(self) -> Cursor: ...

    def begin(self, until: float) -> bool:
        """Begin a transaction; it has the write lock, unless its cursor is a `BatchCursor`.

        Returns:
            `False` if the server has closed the connection since its last transaction.

        Args:
            until: Deadline for locks of other processes, by `time.monotonic`.
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
    def schema(self) -> str | None:
        """The schema of the tables; `None` on SQLite."""

    @property
    def cluster(self) -> str | None:
        """The name of the cluster; `None` for the tables of `public`, or a file without a name."""

    @property
    def location(self) -> str:
        """The path, or the URL without its password and the cluster, for messages."""

    @property
    def address(self) -> str:
        """The path, or the URL without its password, for commands."""

    notifies: bool
    """False if commits must send no notification, and take no advisory lock."""

    @property
    def error_mapping(self) -> ErrorMapping: ...

    @property
    def one_statement(self) -> Mapping[str, Any]:
        """Options of a connection that reads by one statement, and needs no transaction for it."""

    def exists(self) -> bool:
        """Return true if the file exists; a server is assumed to."""

    def make_folder(self) -> None:
        """Make the folder of the file.

        Raises:
            UnavailableError: If it cannot be made.
        """

    def prepare(self, check: Callable[[Connection], object]) -> None:
        """Make the file if necessary, and refuse an unusable database; blocks the thread.

        Args:
            check: Raises if a file must not be changed; it is not called for a server, which the
                first connection checks.

        Raises:
            StoreError: With the location, the problem and the remedy.
        """

    def inspect(self, work: Callable[[Connection], Result], stop: Stop | None = None) -> Result:
        """Run `work`, which only reads, with a connection; blocks the thread until `stop`.

        A file must exist, and may be hostile: the time of each statement is limited.
        """

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

    def engine(
        self, *, write: bool, answer_timeout: float | None = None, **options: Any
    ) -> AsyncEngine:
        """Return an engine for coroutines, read-only or for write transactions.

        Args:
            answer_timeout: A longer limit for the answer of a server to a statement.
        """

    async def begin(
        self,
        session: AsyncSession,
        counters: Sequence[CounterStatements],
        until: float,
        *,
        notifies: bool = True,
    ) -> Connection:
        """Begin the transaction of `session` with the write lock.

        Args:
            counters: Of this database, and of others on the server, in the order of their locks.
            until: Deadline for the locks, by `time.monotonic`.
            notifies: Notify the listeners of a server at the commit.
        """

    async def is_beside(self, other: Backend) -> bool:
        """Return true if one engine transaction can write to this database and another one."""

    async def end_prepared(self, gid: str, *, commit: bool) -> bool:
        """Commit or roll back a prepared transaction; `False` if there is none.

        After a commit, it notifies the listeners.
        """

    async def join(
        self, session: AsyncSession, counters: CounterStatements, until: float, seconds: float
    ) -> Connection:
        """Take the write lock in the transaction of a caller's session.

        Args:
            until: Deadline for the lock, by `time.monotonic`.
            seconds: Limit for the transaction to be idle, on a server.

        Raises:
            InvalidDataError: If the session has another database, driver or isolation.
        """

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

    def backup(self, target: Path, stop: Stop, *, overwrite: bool) -> None:
        """Write a consistent copy, while reads and writes go on; blocks the thread until `stop`.

        The copy gets its name when it is complete.

        Raises:
            InvalidDataError: If `target` exists and `overwrite` is off, or is the database itself.
            UnavailableError: If the copy cannot be written.
        """

    def vacuum(self, stop: Stop) -> None:
        """Release the space of removed rows; blocks the thread until `stop`.

        Raises:
            UnavailableError: If the database is locked, or the role lacks the privilege.
        """

    async def size(self, session: AsyncSession) -> int:
        """Return the bytes on the disk."""


class LockRequiredError(Exception):
    """Nothing was written: apply the batch again, in a transaction with the write lock."""


class Cursor(Protocol):
    """The driver, as the operations of one transaction use it."""

    @property
    def dialect(self) -> str:
        """`sqlite` or `postgresql`."""

    @property
    def schema(self) -> str | None:
        """The schema of the tables; `None` on SQLite."""

    def execute(self, sql: str, parameters: Sequence[Any] = ()) -> Sequence[Any]:
        """Run any statement, and return its rows."""

    def write(self, sql: str, rows: Sequence[Sequence[Any]]) -> None:
        """Run a statement for many rows."""

    def count(self, sql: str, rows: Sequence[Sequence[Any]]) -> int:
        """Run a statement for many rows, and return the number of rows written."""


class BatchCursor(Cursor):
    """A cursor without the write lock: the commit writes everything with one call of the server.

    The methods of `Cursor` raise `LockRequiredError`.
    """

    can_claim: bool
    """True if the call can claim tasks, too."""
    newest_revision: int
    """The newest revision that this session knows; other processes may have assigned later ones."""

    @abstractmethod
    def peek(self, sql: str, parameters: Sequence[Any]) -> Sequence[Any]:
        """Return the rows of a query, which may change before the commit."""

    @abstractmethod
    def prepare(
        self, sql: str, parameters: Sequence[Any], finish: Callable[[Sequence[Any]], None]
    ) -> None:
        """Set the call that the commit sends.

        Args:
            parameters: All but the last two: the milliseconds to wait for the lock, and the lock
                of the only listener.
            finish: Called with the rows of the answer.
        """

    @abstractmethod
    def require_lock(self) -> NoReturn:
        """Raise `LockRequiredError`."""
