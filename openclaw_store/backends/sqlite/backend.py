"""SQLite as a backend: how a file is prepared, locked, written to and looked after.

Every connection that writes is in WAL mode with `synchronous=FULL`: a commit is on the disk when
it returns.
"""

from __future__ import annotations

import asyncio
import os
import random
import sqlite3
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import closing, contextmanager, suppress
from functools import lru_cache
from itertools import chain
from pathlib import Path
from typing import Any, TypeVar

from sqlalchemy import URL, Connection, Engine, Pool, create_engine, event, make_url
from sqlalchemy.engine.interfaces import DBAPICursor
from sqlalchemy.exc import ArgumentError, DBAPIError, SQLAlchemyError
from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession, create_async_engine
from sqlalchemy.pool import NullPool

from openclaw_store.backends.atomic_files import written_aside
from openclaw_store.backends.base import NothingKnown
from openclaw_store.backends.error_mapping import SQLITE_ADVICE, SQLiteErrorMapping
from openclaw_store.backends.sqlite import fork_safety
from openclaw_store.backends.sqlite.connections import (
    LoneConnection,
    ReadConnection,
    WriteConnection,
    connect_async,
    options_of,
)
from openclaw_store.errors import (
    InvalidDataError,
    OutcomeUnknownError,
    SchemaMismatchError,
    UnavailableError,
    safe_repr,
)

Result = TypeVar("Result")

MINIMUM_VERSION = (3, 35, 0)

_ALONE_SECONDS = 1.0
"""How long somebody may take who only looks at what is to be replaced."""

_ROWS_A_STATEMENT = (64, 16, 4, 1)

BESIDES = ("-journal", "-wal", "-shm")
"""How files end that SQLite makes beside a database."""


def file_of(location: str | Path) -> Path:
    """The file that a path or an SQLAlchemy URL means.

    Raises:
        InvalidDataError: If it means no file of SQLite's.
    """
    if isinstance(location, str) and "://" in location:
        try:
            url = make_url(location)
        except (ArgumentError, ValueError):
            raise InvalidDataError("db_path", "is neither a path nor a database URL") from None
        if url.get_backend_name() != "sqlite":
            name = url.get_backend_name()
            raise InvalidDataError("db_path", f"{name} is not supported: use SQLite or PostgreSQL")
        if not url.database or url.database == ":memory:":
            raise InvalidDataError(
                "db_path", 'names no file: use ":memory:" for a private database'
            )
        location = url.database
    if not isinstance(location, str | Path) or not str(location) or "\0" in str(location):
        raise InvalidDataError("db_path", f"must be a path or a URL, not {safe_repr(location)}")
    try:
        os.fsencode(location)
    except UnicodeEncodeError:
        raise InvalidDataError(
            "db_path", f"{safe_repr(location)} is no name that a file can have"
        ) from None
    return Path(location).absolute()


def check_version() -> None:
    """Refuse a SQLite that lacks what the store needs.

    Raises:
        UnavailableError: Naming the version found and the one needed.
    """
    if sqlite3.sqlite_version_info < MINIMUM_VERSION:
        needed = ".".join(map(str, MINIMUM_VERSION))
        raise UnavailableError(
            f"this Python has SQLite {sqlite3.sqlite_version}, {needed} or newer is needed: "
            "use a newer Python, or a newer SQLite library"
        )


def _writing_engine(path: Path, kind: type[sqlite3.Connection] = WriteConnection) -> Engine:
    """An engine for threads, whose every transaction begins with the write lock."""
    url = URL.create("sqlite", database=str(path))  # as text, % and ? would mean something
    engine = create_engine(url, poolclass=NullPool, connect_args=options_of(kind))

    @event.listens_for(engine, "begin")
    def begin(connection: Connection) -> None:
        if not connection.connection.in_transaction:  # else `_begin_writing` was there before
            _begin_writing(connection)

    return engine


def _reading_engine(path: Path) -> Engine:
    url = URL.create("sqlite", database=str(path))
    return create_engine(url, poolclass=NullPool, connect_args=options_of(ReadConnection))


def _begin_writing(connection: Connection) -> None:
    """Begin a transaction with the write lock, past SQLAlchemy, whose own way takes longer."""
    connection.connection.cursor().execute("BEGIN IMMEDIATE")


def _copy(source: sqlite3.Connection, target: Path) -> None:
    """Write what `source` sees now to a file, which is complete in itself."""
    with closing(sqlite3.connect(target, isolation_level=None)) as copy:
        # All pages in one step: a copy in several starts again with every write meanwhile.
        source.backup(copy)
        copy.execute("PRAGMA journal_mode=DELETE")


class Cursor(NothingKnown):
    """Speaks to the driver on behalf of a transaction, which has the write lock.

    It knows nothing: to read takes less time here than to do something again.
    """

    dialect = "sqlite"

    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        self._driver_cursor: DBAPICursor | None = None

    @property
    def _cursor(self) -> DBAPICursor:
        # The driver's own: SQLAlchemy's way to it takes longer than most statements do.
        if self._driver_cursor is None:
            self._driver_cursor = self._connection.connection.cursor()
        return self._driver_cursor

    def execute(self, sql: str, parameters: Sequence[Any] = ()) -> Sequence[Any]:
        """The rows of a statement."""
        cursor = self._cursor
        cursor.execute(sql, parameters)
        return cursor.fetchall()

    read = execute

    def compare_and_set(self, sql: str, parameters: Sequence[Any]) -> None:
        """Write a row that nobody else can have changed."""
        self._cursor.execute(sql, parameters)

    def count(self, sql: str, rows: Sequence[Sequence[Any]]) -> int:
        """Do a statement for many rows; returns how many rows of a table it wrote."""
        self._cursor.executemany(sql, rows)
        return self._cursor.rowcount

    def write(self, sql: str, rows: Sequence[Sequence[Any]]) -> None:
        """Do a statement for many rows.

        One with the `VALUES (?, …)` of one row is sent with those of many. That takes two thirds
        of the time of `executemany`, which besides gives the interpreter's lock away for each row,
        and under load waits long to have it back. A few sizes of statement serve all batches, so
        the driver keeps them prepared.
        """
        if "VALUES (" not in sql:
            self._cursor.executemany(sql, rows)
            return
        start = 0
        for size in _ROWS_A_STATEMENT:
            while len(rows) - start >= size:
                part = rows[start : start + size]
                self._cursor.execute(_for_rows(sql, size), list(chain.from_iterable(part)))
                start += size


@lru_cache(maxsize=256)
def _for_rows(sql: str, count: int) -> str:
    """The statement for so many rows, of that for one."""
    head, rest = sql.split("VALUES (", 1)
    row, tail = rest.split(")", 1)
    return f"{head}VALUES {', '.join([f'({row})'] * count)}{tail}"


def _delays(timeout: float) -> Iterator[float]:
    """Seconds to wait between tries for a lock, jittered, until `timeout` seconds are over."""
    end = time.monotonic() + timeout
    while time.monotonic() < end:
        yield random.uniform(0.0003, 0.003)


def retrying(work: Callable[[], Result], timeout: float) -> Result:
    """Do `work` on this thread, again while the database is locked."""
    for delay in _delays(timeout):
        try:
            return work()
        except (DBAPIError, sqlite3.Error) as error:
            if not SQLiteErrorMapping.is_busy(error):
                raise
        time.sleep(delay)
    return work()


class WriteSession:
    """The writer's connection, which belongs to its thread."""

    is_pipelined = False  # the thread itself does the work

    def __init__(self, engine: Engine, until: float, require_file: Callable[[], None]) -> None:
        self._require_file = require_file
        self._connection = retrying(engine.connect, until - time.monotonic())
        self.cursor: Cursor

    def begin(self, until: float, meanwhile: Callable[[], None]) -> None:
        """Begin a transaction with the write lock, for which it waits until then."""
        self._require_file()
        retrying(lambda: _begin_writing(self._connection), until - time.monotonic())
        self.cursor = Cursor(self._connection)

    def commit(self) -> None:
        """Commit what `begin` began."""
        self._connection.connection.commit()

    def close(self) -> None:
        """Close the connection, whatever state it is in; what was not committed is undone."""
        self._connection.close()


class SQLite:
    """A database in a file.

    Args:
        path: The file.
        timeout: Seconds to wait for a lock.
    """

    dialect = "sqlite"

    def __init__(self, path: Path, timeout: float) -> None:
        self.path = path
        self.location = str(path)
        """Where it is, as people may see it."""
        self.error_mapping = SQLiteErrorMapping(self.location)
        self.writing_engine = self._guarded(_writing_engine(path))
        self._timeout = timeout
        self._file: tuple[int, int] | None = None  # which one it is, as soon as it is known

    def exists(self) -> bool:
        """Whether there is such a file, or something else of that name."""
        return os.path.exists(self.path)

    def make_folder(self) -> None:
        """Make the folder that the file will be in.

        Raises:
            UnavailableError: If it cannot be made.
        """
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UnavailableError(
                f"cannot make the folder {self.path.parent} ({error.strerror}): choose another path"
            ) from error

    def prepare(self) -> None:
        """Make the folder and the file, and turn WAL on; the setting stays in the file.

        Raises:
            StoreError: Saying which file cannot be used, and what to do.
        """
        check_version()
        self._file = None  # a former try may have found another one
        self.refuse_inherited()
        self.make_folder()
        if os.path.isdir(self.path):  # `Path.is_dir` raises where the folder may not be entered
            raise UnavailableError(f"{self.path} is a folder: give the path of a file in it")
        if self.exists() and not os.access(self.path, os.W_OK):
            # Else it could be read, and a WAL that nobody can write to would be left beside it.
            raise UnavailableError(f"{self.path}: {SQLITE_ADVICE['SQLITE_READONLY']}")

        def turn_on_wal() -> None:
            with self._opened(WriteConnection) as connection:
                connection.execute("PRAGMA journal_mode=WAL")

        with self.error_mapping.mapped():
            # Of several processes on a new file, one gets the lock.
            retrying(turn_on_wal, self._timeout)
        self._file = fork_safety.identity(self.path)

    def refuse_inherited(self) -> None:
        """Refuse a file that was open when this process was forked.

        SQLite keeps a process's locks in its memory, so here it would go by locks that only the
        parent has: when that closed the file, what is written here would be lost.
        """
        if fork_safety.is_inherited(self.path):
            raise UnavailableError(
                f"{self.path} was open when this process was forked, and SQLite does not stand "
                "that: start the process by spawn, or fork before the file is opened"
            )

    def inspect(self, work: Callable[[Connection], Result]) -> Result:
        """Do `work`, which reads, with a connection; blocks the thread."""
        self.refuse_inherited()
        engine = self._guarded(_reading_engine(self.path))
        with self.error_mapping.mapped(), engine.connect() as connection:
            return work(connection)

    def migrate(
        self,
        work: Callable[[Connection], Result],
        copy_to: Callable[[Connection], Path | None] = lambda _: None,
    ) -> Result:
        """Do `work` with the write lock and without foreign keys; blocks the thread.

        Args:
            copy_to: Says, of what it finds, where the file is to be copied first, with nobody else
                at it; `None` for no copy. What fails leaves no copy.

        Raises:
            OutcomeUnknownError: If the disk failed while committing; the copy is kept.
            UnavailableError: If another process keeps the lock for longer than the timeout, or has
                the file open that is to be copied.
            SchemaMismatchError: If a row refers to one that is not there afterwards.
        """
        self.prepare()
        with self.error_mapping.mapped():
            connection, copy = self._migrating(copy_to)
            with connection:
                if copy is not None:
                    self._copy_to(connection, copy)
                try:
                    result = self._migrated(connection, work)
                except OutcomeUnknownError:
                    raise  # the copy may be all that is left of what the file was
                except BaseException:
                    if copy is not None:
                        with suppress(OSError):  # what went wrong first is to be told
                            copy.unlink()  # the file is still what it was
                    raise
        self._empty_wal()
        return result

    def _migrated(self, connection: Connection, work: Callable[[Connection], Result]) -> Result:
        # SQLite changes a table by copying it, and dropping the old one would delete rows that
        # refer to it. The switch works outside of transactions, hence on the driver.
        connection.connection.execute("PRAGMA foreign_keys=OFF")
        with retrying(connection.begin, self._timeout) as transaction:
            result = work(connection)
            self._refuse_orphans(connection)
            with self.error_mapping.mapped(committing=True):
                transaction.commit()
        return result

    def _migrating(
        self, copy_to: Callable[[Connection], Path | None]
    ) -> tuple[Connection, Path | None]:
        """A connection to migrate with, alone where a copy is to be made first."""

        def connect() -> tuple[Connection, Path | None]:
            if self.inspect(copy_to) is None:
                return _writing_engine(self.path).connect(), None
            connection = _writing_engine(self.path, LoneConnection).connect()
            try:
                copy = copy_to(connection)  # others may have been faster
                connection.rollback()
            except BaseException:
                connection.close()  # else the file stays locked while the error is referred to
                raise
            return connection, copy

        try:
            return retrying(connect, self._timeout)
        except (DBAPIError, sqlite3.Error) as error:
            if not SQLiteErrorMapping.is_busy(error):
                raise
            raise UnavailableError(
                f"{self.path}: another program has it open: end that program, then try again"
            ) from error

    def _copy_to(self, connection: Connection, target: Path) -> None:
        source: Any = connection.connection.driver_connection
        with written_aside(target, overwrite=False, besides=BESIDES) as partial:
            partial.chmod(self.path.stat().st_mode & 0o777)  # for nobody's eyes who had not it
            _copy(source, partial)

    def _refuse_orphans(self, connection: Connection) -> None:
        orphans = connection.exec_driver_sql("PRAGMA foreign_key_check").fetchall()
        if orphans:
            raise SchemaMismatchError(f"{self.path}: it would orphan rows: {orphans[:3]}")

    def engine(self, *, write: bool, pool: type[Pool] | None = None, **options: Any) -> AsyncEngine:
        """An engine for coroutines: read-only, or one that begins with the write lock."""
        engine = create_async_engine(
            URL.create("sqlite+aiosqlite", database=str(self.path)),
            poolclass=pool,
            connect_args={
                "async_creator_fn": connect_async,
                **options_of(WriteConnection if write else ReadConnection),
            },
            **options,
        )
        self._guarded(engine.sync_engine)
        statement = "BEGIN IMMEDIATE" if write else "BEGIN"

        @event.listens_for(engine.sync_engine, "begin")
        def begin(connection: Connection) -> None:
            connection.connection.cursor().execute(statement)

        return engine

    async def begin(self, session: AsyncSession) -> Connection:
        """Begin the transaction of `session`, with the write lock."""
        for delay in _delays(self._timeout):
            try:
                return (await session.connection()).sync_connection  # type: ignore[return-value]  # begun, so not None
            except (SQLAlchemyError, sqlite3.Error) as error:
                await session.rollback()
                if not SQLiteErrorMapping.is_busy(error):
                    raise
            await asyncio.sleep(delay)
        raise UnavailableError(f"{self.path}: another process keeps it locked: try again")

    async def end(self, session: AsyncSession) -> None:
        """Close `session`, whatever state its connection is in."""
        await session.close()

    def cursor(self, connection: Connection) -> Cursor:
        """What a transaction writes with in the transaction of a session."""
        return Cursor(connection)

    def write_session(self, until: float) -> WriteSession:
        """A connection for the writer, on whose thread this is called."""
        return WriteSession(self.writing_engine, until, self._require_file)

    def dispose(self) -> None:
        """Forget what all connections shared."""
        self.writing_engine.dispose()

    def backup(self, target: Path, *, overwrite: bool) -> None:
        """Copy the database as it is at one moment, while it is read and written.

        The copy is written aside and renamed when it is complete and on the disk.

        Raises:
            InvalidDataError: If `target` exists and is not to be overwritten.
            UnavailableError: If it cannot be written.
        """
        own = [self.path.with_name(self.path.name + suffix) for suffix in ("", "-wal", "-shm")]
        if any(file.exists() and os.path.exists(target) and target.samefile(file) for file in own):
            raise InvalidDataError("path", f"{target} is the database itself: choose another")
        with (
            SQLiteErrorMapping(str(target)).mapped(),
            written_aside(target, overwrite=overwrite, besides=BESIDES) as partial,
            self._opened(ReadConnection) as source,
        ):
            retrying(lambda: _copy(source, partial), self._timeout)

    @contextmanager
    def alone(self) -> Iterator[None]:
        """Keep everybody else out during the block, in which the file may be replaced.

        What its WAL held is in it then. There need not be a file, and it may be damaged.

        Raises:
            UnavailableError: If somebody uses it.
        """
        if not self.exists():
            yield
            return
        with self.error_mapping.mapped():
            connection = sqlite3.connect(self.path, isolation_level=None, timeout=_ALONE_SECONDS)
        with closing(connection):
            try:
                connection.execute("PRAGMA journal_mode=DELETE")  # works for the only one there is
                connection.execute("PRAGMA locking_mode=EXCLUSIVE")
                connection.execute("BEGIN EXCLUSIVE")
            except sqlite3.Error as error:
                if SQLiteErrorMapping.is_busy(error):
                    raise UnavailableError(
                        f"{self.path} is in use: stop all coordinators, then try again"
                    ) from error
                if SQLiteErrorMapping.code(error) not in ("SQLITE_NOTADB", "SQLITE_CORRUPT"):
                    raise self.error_mapping.map_error(error) from error
            yield

    def vacuum(self) -> None:
        """Rewrite the file without its free pages, and empty the WAL."""
        with self.error_mapping.mapped(), self._opened(WriteConnection) as database:
            retrying(lambda: database.execute("VACUUM"), self._timeout)
        self._empty_wal()

    async def size(self, session: AsyncSession) -> int:
        """Bytes on the disk, those of the WAL included."""
        files = (self.path, self.path.with_name(self.path.name + "-wal"))
        return sum(file.stat().st_size for file in files if file.exists())

    def _opened(self, kind: type[sqlite3.Connection]) -> closing[sqlite3.Connection]:
        """A connection of its own, past SQLAlchemy."""
        self._require_file()
        return closing(sqlite3.connect(self.path, **options_of(kind)))

    def _guarded(self, engine: Engine) -> Engine:
        """Have an engine open no other file than the one there was."""

        @event.listens_for(engine, "do_connect")
        def look(*_: object) -> None:
            self._require_file()

        return engine

    def _require_file(self) -> None:
        """Refuse to write where nobody will find it, or to make an empty file of that name.

        Raises:
            UnavailableError: If the file was removed or replaced since it was opened.
        """
        if self._file is None:
            return
        try:
            is_there = fork_safety.identity(self.path) == self._file
        except (FileNotFoundError, NotADirectoryError):
            is_there = False
        except OSError:  # SQLite says what is wrong
            return
        if not is_there:
            raise UnavailableError(
                f"{self.path} was removed or replaced while it was open: put it back, or end all "
                "programs that use it and restore a backup"
            )

    def _empty_wal(self) -> None:
        """Move what the WAL holds to the database file, as far as nobody is in the way."""
        try:
            with self._opened(WriteConnection) as database:
                database.execute("PRAGMA wal_checkpoint(TRUNCATE)")
        except sqlite3.Error as error:
            if not SQLiteErrorMapping.is_busy(error):
                raise self.error_mapping.map_error(error) from error
