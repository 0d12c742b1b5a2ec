"""The interfaces of a database engine: what the rest of the library asks of it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol, TypeVar

from sqlalchemy import Connection
from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession

from openclaw_store.backends.error_mapping import ErrorMapping

Result = TypeVar("Result")


DEFAULT_LOCATION = "./data/cluster.db"


DEFAULT_TIMEOUT_SECONDS = 30.0


class WriteSession(Protocol):
    """The writer's connection; all of it is called on the writer's thread."""

    @property
    def cursor(self) -> Cursor: ...

    @property
    def is_pipelined(self) -> bool:
        """Whether a batch should leave half of many callers to the next one.

        So it should where another process does the work, which nobody else keeps busy.
        """

    def begin(self, until: float, meanwhile: Callable[[], None]) -> None:
        """Begin a transaction with the write lock.

        Args:
            until: When to give up what others have locked, by `time.monotonic`.
            meanwhile: To be called at the latest when the thread waits for the database.
        """

    def commit(self) -> None:
        """Commit what `begin` began."""

    def close(self) -> None:
        """Close the connection, whatever state it is in."""


class Backend(Protocol):
    """A database of one kind at one place."""

    @property
    def dialect(self) -> str:
        """`sqlite` or `postgresql`."""

    @property
    def location(self) -> str:
        """Where it is, as people may see it: without the password."""

    @property
    def error_mapping(self) -> ErrorMapping:
        """Tells what the driver's errors mean."""

    def exists(self) -> bool:
        """Whether there is a file; a server is taken to be there."""

    def make_folder(self) -> None:
        """Make the folder that a file will be in."""

    def prepare(self) -> None:
        """Make what else can be made, and refuse what cannot be used; blocks the thread."""

    def inspect(self, work: Callable[[Connection], Result]) -> Result:
        """Do `work`, which reads, with a connection; blocks the thread."""

    def migrate(
        self,
        work: Callable[[Connection], Result],
        copy_to: Callable[[Connection], Path | None] = ...,
    ) -> Result:
        """Do `work` in a transaction in which nobody else migrates; blocks the thread.

        Args:
            copy_to: Says, of what it finds, where the file is to be copied first; `None` for no
                copy. A database on a server has no file.
        """

    def engine(self, *, write: bool, **options: Any) -> AsyncEngine:
        """An engine for coroutines, read-only or for transactions."""

    async def begin(self, session: AsyncSession) -> Connection:
        """Begin the transaction of `session`, with the write lock."""

    async def end(self, session: AsyncSession) -> None:
        """Close `session`, whatever state its connection is in."""

    def cursor(self, connection: Connection) -> Cursor:
        """What a transaction writes with in the transaction of a session."""

    def write_session(self, until: float) -> WriteSession:
        """A connection for the writer, on whose thread this is called.

        Args:
            until: When to give up connecting, by `time.monotonic`.
        """

    def dispose(self) -> None:
        """Forget what all connections shared."""

    def backup(self, target: Path, *, overwrite: bool) -> None:
        """Copy the database as it is at one moment; blocks the thread."""

    def vacuum(self) -> None:
        """Give the space of removed rows back; blocks the thread."""

    async def size(self, session: AsyncSession) -> int:
        """Bytes on the disk."""


class RedoError(Exception):
    """Nothing was written: the same again, in a transaction that takes less for granted."""


class Cursor(Protocol):
    """The driver, as operations speak to it in one transaction.

    It may not have the write lock: then what was read may have changed before it is written, so
    all that is written depends on the `guard`, unless only its numbers can be wrong. Operations
    that `read`, decide and `write` cannot tell the difference; `execute` and `count` raise
    `RedoError` there.
    """

    @property
    def dialect(self) -> str:
        """`sqlite` or `postgresql`."""

    @property
    def is_speculative(self) -> bool:
        """Whether units may do without reading the rows that they know."""

    def read(self, sql: str, parameters: Sequence[Any]) -> Sequence[Any]:
        """The rows of a statement that gives what the guard asks for, or comes behind it."""

    def write(self, sql: str, rows: Sequence[Sequence[Any]]) -> None:
        """Do a statement for many rows, before anything else is read or the transaction commits.

        Statements that stand together may be done in any order, none seeing what others wrote.
        """

    def known(self) -> tuple[Sequence[Any], Mapping[Any, Any]] | None:
        """Return the expected counters and nodes; `None` if the transaction must read them."""

    def assume(self) -> None:
        """Take note that the transaction does so.

        Whether all that is still so, and whether rows that it adds are new, is seen when they are
        written. The guard should make sure of what else it has taken for granted.
        """

    def doubt(self) -> None:
        """Begin anew without: nobody would find out."""

    def remember(self, rows: Mapping[Any, Any]) -> None:
        """Once the guard has written, assume these rows; those that are `None` no more."""

    def compare_and_set(self, sql: str, parameters: Sequence[Any]) -> None:
        """Write the row that was read first, if it is still as it was; else nothing is written.

        The first parameters are what is written to it, the next as many what was read.
        """

    def number(self, count: int, last: int, renumber: Callable[[int], None]) -> None:
        """In place of `guard`: write in any case, and number it behind what others have written.

        Args:
            count: How many numbers are taken.
            last: The last of them, if nobody has taken any since.
            renumber: Is called with how much larger all of them are, if somebody has.
        """

    def execute(self, sql: str, parameters: Sequence[Any] = ()) -> Sequence[Any]:
        """The rows of a statement, of whatever kind."""

    def count(self, sql: str, rows: Sequence[Sequence[Any]]) -> int:
        """Do a statement for many rows at once; returns how many rows of a table it wrote."""


class NothingKnown:
    """What a cursor is like whose units read whatever they go by."""

    is_speculative = False

    def known(self) -> tuple[Sequence[Any], Mapping[Any, Any]] | None:
        """Nothing."""
        return None

    def assume(self) -> None:
        """Never called, as nothing is known."""

    def doubt(self) -> None:
        """Never called, either."""

    def remember(self, rows: Mapping[Any, Any]) -> None:
        """Forget them again."""

    def number(self, count: int, last: int, renumber: Callable[[int], None]) -> None:
        """Never called, either."""
