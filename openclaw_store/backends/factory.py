"""Which database a location means, and what a database is to the rest of the library."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol, TypeVar

from sqlalchemy import Connection
from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession

from openclaw_store.backends.error_mapping import Faults
from openclaw_store.backends.postgresql.backend import PostgreSQL
from openclaw_store.backends.sqlite import backend as sqlite
from openclaw_store.database.group_commit import Cursor

Result = TypeVar("Result")

DEFAULT_LOCATION = "./data/cluster.db"
DEFAULT_TIMEOUT_SECONDS = 30.0


class Writing(Protocol):
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
    def faults(self) -> Faults:
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
        """What a unit writes with in the transaction of a session."""

    def writing(self, until: float) -> Writing:
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


def backend_of(location: str | Path, timeout: float = DEFAULT_TIMEOUT_SECONDS) -> Backend:
    """The database that a path or an SQLAlchemy URL means; nothing is opened or made.

    Args:
        timeout: Seconds to wait for locks, and for answers of a server.

    Raises:
        InvalidDataError: If it means no database that is supported.
        UnavailableError: If the driver is not installed.
    """
    if isinstance(location, str) and location.startswith("postgresql"):
        return PostgreSQL(location, timeout)
    return sqlite.SQLite(sqlite.file_of(location), timeout)
