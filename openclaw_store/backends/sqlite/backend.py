"""The SQLite backend: preparation, locking, migration, backup and maintenance of a file.

Every connection that writes uses WAL mode with `synchronous=FULL`: when a commit returns, it is on
the disk.
"""

from __future__ import annotations

import asyncio
import os
import sqlite3
import time
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager, suppress
from operator import methodcaller
from pathlib import Path
from typing import Any, TypeVar

from sqlalchemy import URL, Connection, Engine, Pool, create_engine, event
from sqlalchemy.dialects.sqlite.base import SQLiteCompiler
from sqlalchemy.exc import DBAPIError, SQLAlchemyError
from sqlalchemy.ext.asyncio import AsyncEngine, AsyncSession, create_async_engine
from sqlalchemy.pool import NullPool

from openclaw_store.backends.atomic_files import make_folder, written_aside
from openclaw_store.backends.base import Backend, CounterStatements
from openclaw_store.backends.cancellation import Stop
from openclaw_store.backends.error_mapping import SQLITE_ADVICE, SQLiteErrorMapping
from openclaw_store.backends.sqlite import fork_safety
from openclaw_store.backends.sqlite.connections import (
    HOSTILE_FILE_PRAGMAS,
    LoneConnection,
    ReadConnection,
    WriteConnection,
    connect_async,
    end_at,
    options_of,
    time_limit,
)
from openclaw_store.backends.sqlite.files import (
    BESIDES,
    check_version,
    copy_database,
    require_other_file,
)
from openclaw_store.backends.sqlite.writing import (
    Cursor,
    LoopCursor,
    OpenFile,
    WriteSession,
    begin_writing,
    delays,
    retrying,
)
from openclaw_store.errors import (
    InvalidDataError,
    OutcomeUnknownError,
    SchemaMismatchError,
    UnavailableError,
    safe_repr,
)

Result = TypeVar("Result")

_ALONE_SECONDS = 1.0  # for another process that only inspects a file that is to be replaced

_ENDING_READER_SECONDS = 0.1  # for a reader that no longer needs the WAL


class _Compiler(SQLiteCompiler):
    """The compiler of SQLAlchemy, with hints such as `INDEXED BY`."""

    def get_from_hint_text(self, table: object, text: str | None) -> str | None:
        return text


def _engine(path: Path, kind: type[sqlite3.Connection], **options: Any) -> Engine:
    url = URL.create("sqlite", database=str(path))  # in the text of a URL, % and ? are special
    return create_engine(
        url,
        poolclass=NullPool,
        connect_args={**options_of(kind), **options},
        hide_parameters=True,
    )


def _write_engine(path: Path, kind: type[sqlite3.Connection] = WriteConnection) -> Engine:
    """Return an engine for threads; each of its transactions begins with the write lock."""
    engine = _engine(path, kind)

    @event.listens_for(engine, "begin")
    def begin(connection: Connection) -> None:
        if not connection.connection.in_transaction:  # else `begin_writing` has begun it
            begin_writing(connection)

    return engine


class SQLite:
    """A database in a file.

    Args:
        path: The file.
        timeout: Seconds to wait for a lock.
        cluster: The name of the cluster, which is part of the path.
    """

    dialect = "sqlite"
    schema = None
    one_statement: Mapping[str, Any] = {}  # BEGIN costs nothing
    notifies = True  # a commit is seen by polling the file

    def __init__(self, path: Path, timeout: float, cluster: str | None = None) -> None:
        # SQLite follows symbolic links too, and its journals are beside the file itself.
        self.path = Path(os.path.realpath(path))
        self.wal = self.path.with_name(self.path.name + "-wal")
        """The write-ahead log, to which each commit writes."""
        self.location = self.address = str(path)
        self.cluster = cluster
        self.error_mapping = SQLiteErrorMapping(self.location)
        self.write_engine = self._checked(_write_engine(path))
        self._timeout = timeout
        self._file = OpenFile(self.path)
        # The last engine of a caller that is known to be of this file.
        self._joined_engine: Callable[[], object] = lambda: None

    def exists(self) -> bool:
        return os.path.exists(self.path)

    def make_folder(self) -> None:
        try:
            make_folder(self.path.parent)
        except OSError as error:
            raise UnavailableError(
                f"cannot make the folder {self.path.parent} ({error.strerror}): choose another path"
            ) from error

    def prepare(self, check: Callable[[Connection], object]) -> None:
        check_version()
        self._file.identity = None  # an earlier attempt may have found another file
        self.refuse_inherited()
        self.make_folder()
        if os.path.isdir(self.path):  # `Path.is_dir` raises where the folder may not be entered
            raise UnavailableError(f"{self.path} is a folder: give the path of a file in it")
        if self.exists() and not os.access(self.path, os.W_OK):
            # SQLite would read it, and leave a WAL beside it that no process can write.
            raise UnavailableError(f"{self.path}: {SQLITE_ADVICE['SQLITE_READONLY']}")
        if self.exists():
            self.inspect(check)  # before the WAL is turned on: a refused file is not changed
        else:
            with suppress(InvalidDataError), written_aside(self.path, overwrite=False):
                pass  # SQLite would make it readable for all users

        def turn_on_wal() -> None:  # the file keeps this setting
            with self._open(WriteConnection) as connection:
                connection.execute("PRAGMA journal_mode=WAL")

        with self.error_mapping.mapped():
            # Of several processes that make the file, one gets the lock.
            retrying(turn_on_wal, self._timeout)
        self._file.identity = fork_safety.identity(self.path)

    def refuse_inherited(self) -> None:
        """Refuse a file that was open when this process was forked.

        SQLite keeps the locks of a process in its memory. The child would rely on locks that only
        the parent holds: when the parent closes the file, the child's writes would be lost.
        """
        if fork_safety.is_inherited(self.path):
            raise UnavailableError(
                f"{self.path} was open when this process was forked, and SQLite does not stand "
                "that: start the process by spawn, or fork before the file is opened"
            )

    def inspect(self, work: Callable[[Connection], Result], stop: Stop | None = None) -> Result:
        self.refuse_inherited()
        if not self.exists():  # SQLite would make it
            raise UnavailableError(f"{self.path}: there is no such file: give another path")
        engine = self._checked(_engine(self.path, ReadConnection, timeout=self._timeout))
        with (
            self.error_mapping.mapped(),
            engine.connect() as connection,
            self.limited(connection, stop),
        ):
            return work(connection)

    @contextmanager
    def limited(self, connection: Connection, stop: Stop | None = None) -> Iterator[None]:
        """Limit the time of the statements in the block, which check the file."""
        driver: Any = connection.connection.driver_connection
        is_stopped = (stop or Stop()).done
        driver.set_progress_handler(*time_limit(self.path.stat().st_size, is_stopped))
        try:
            yield
        finally:
            driver.set_progress_handler(None, 0)

    def migrate(
        self,
        work: Callable[[Connection], Result],
        copy_to: Callable[[Connection], Path | None] = lambda _: None,
    ) -> Result:
        with self.error_mapping.mapped():
            connection, copy = self._connect_to_migrate(copy_to)
            with connection:
                if copy is not None:
                    self._copy_to(connection, copy)
                try:
                    result = self._migrate(connection, work)
                except OutcomeUnknownError:
                    raise  # the copy may be the only readable version of the file
                except BaseException:
                    if copy is not None:
                        with suppress(OSError):  # the first error is the one to report
                            copy.unlink()  # the file is unchanged
                    raise
        self._empty_wal()
        return result

    def _migrate(self, connection: Connection, work: Callable[[Connection], Result]) -> Result:
        # SQLite changes a table by copying it, and dropping the old one would delete the rows that
        # refer to it. The pragma has no effect in a transaction, so it goes to the driver.
        connection.connection.execute("PRAGMA foreign_keys=OFF")
        with retrying(connection.begin, self._timeout) as transaction:
            result = work(connection)
            self._refuse_orphans(connection)
            with self.error_mapping.mapped(committing=True):
                transaction.commit()
        return result

    def _refuse_orphans(self, connection: Connection) -> None:
        with self.limited(connection):
            orphans = connection.exec_driver_sql("PRAGMA foreign_key_check").fetchmany(3)
        if orphans:
            raise SchemaMismatchError(f"{self.path}: it would orphan rows: {safe_repr(orphans)}")

    def _connect_to_migrate(
        self, copy_to: Callable[[Connection], Path | None]
    ) -> tuple[Connection, Path | None]:
        """Return a connection, exclusive if a copy is needed, and the path of the copy."""

        def connect() -> tuple[Connection, Path | None]:
            if self.inspect(copy_to) is None:
                return _write_engine(self.path).connect(), None
            connection = _write_engine(self.path, LoneConnection).connect()
            try:
                copy = copy_to(connection)  # again: another process may have migrated the file
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
            copy_database(source, partial)

    def engine(
        self,
        *,
        write: bool,
        pool: type[Pool] | None = None,
        answer_timeout: float | None = None,
        **options: Any,
    ) -> AsyncEngine:
        engine = create_async_engine(
            URL.create("sqlite+aiosqlite", database=str(self.path)),
            poolclass=pool,
            pool_reset_on_return=None,  # a session ends its transaction itself
            connect_args={
                "async_creator_fn": connect_async,
                **options_of(WriteConnection if write else ReadConnection),
            },
            hide_parameters=True,
            **options,
        )
        self._checked(engine.sync_engine)
        engine.dialect.statement_compiler = _Compiler
        # `options_of` turns the driver's own BEGIN off; without this one, each statement commits.
        statement = "BEGIN IMMEDIATE" if write else "BEGIN"

        @event.listens_for(engine.sync_engine, "begin")
        def begin(connection: Connection) -> None:
            try:
                # One hop to the thread of the driver; a cursor of SQLAlchemy's takes three.
                connection.connection.run_async(methodcaller("execute_fetchall", statement))
            except BaseException:
                connection.invalidate()  # after a cancellation, the transaction may begin yet
                raise

        return engine

    async def begin(
        self,
        session: AsyncSession,
        counters: Sequence[CounterStatements],
        until: float,
        *,
        notifies: bool = True,
    ) -> Connection:
        for delay in delays(until - time.monotonic()):
            try:
                return (await session.connection()).sync_connection  # type: ignore[return-value]  # begun, so not None
            except (SQLAlchemyError, sqlite3.Error) as error:
                await session.rollback()
                if not SQLiteErrorMapping.is_busy(error):
                    raise
            await asyncio.sleep(delay)
        raise UnavailableError(f"{self.path}: another process keeps it locked: try again")

    async def is_beside(self, other: Backend) -> bool:
        return False  # in WAL mode, a commit of attached files is not atomic

    async def end_prepared(self, gid: str, *, commit: bool) -> bool:
        return False  # a file prepares none

    def _is_own_file(self, path: str | None) -> bool:
        return path is not None and os.path.realpath(path) == str(self.path)

    async def join(
        self, session: AsyncSession, counters: CounterStatements, until: float, seconds: float
    ) -> Connection:
        connection = await session.connection()
        if (connection.dialect.name, connection.dialect.driver) != ("sqlite", "aiosqlite"):
            name = f"{connection.dialect.name}+{connection.dialect.driver}"
            raise InvalidDataError("session", f"has {name}: make it of sqlite+aiosqlite")
        raw: Any = await connection.get_raw_connection()
        engine = connection.engine
        if self._joined_engine() is not engine.sync_engine:
            if not await asyncio.to_thread(self._is_own_file, engine.url.database):
                raise InvalidDataError("session", f"is not on {self.location}")
            self._joined_engine = weakref.ref(engine.sync_engine)
        # A transaction that has read gets the lock by an update of no row, if its snapshot is the
        # newest one; otherwise SQLite reports that it is busy.
        is_begun = raw.driver_connection.in_transaction
        lock = "UPDATE counters SET id = id WHERE id = 0" if is_begun else "BEGIN IMMEDIATE"
        for delay in delays(until - time.monotonic()):
            try:
                await raw.driver_connection.execute_fetchall(lock)
                return connection.sync_connection  # type: ignore[return-value]  # begun
            except sqlite3.Error as error:
                if SQLiteErrorMapping.is_old_snapshot(error):
                    raise InvalidDataError(
                        "session",
                        "read before another process wrote: begin with joined(), then read",
                    ) from error
                if not SQLiteErrorMapping.is_busy(error):
                    raise
            await asyncio.sleep(delay)
        raise UnavailableError(f"{self.path}: another process keeps it locked: roll back")

    async def end(self, session: AsyncSession) -> None:
        await session.close()

    def cursor(self, connection: Connection) -> Cursor:
        return (LoopCursor if connection.dialect.is_async else Cursor)(connection)

    def write_session(self, until: float, counters: CounterStatements) -> WriteSession:
        return WriteSession(self.write_engine, until, self._file)

    def dispose(self) -> None:
        self.write_engine.dispose()

    def backup(self, target: Path, stop: Stop, *, overwrite: bool) -> None:
        own = [self.path.with_name(self.path.name + suffix) for suffix in ("", *BESIDES)]
        require_other_file(target, own)
        with (
            SQLiteErrorMapping(str(target)).mapped(),
            written_aside(target, overwrite=overwrite, besides=BESIDES) as partial,
            self._open(ReadConnection) as source,
        ):
            retrying(lambda: copy_database(source, partial, stop.done), self._timeout)

    @contextmanager
    def alone(self) -> Iterator[None]:
        """Exclude all other connections during the block, which may replace the file.

        The WAL is empty in the block. The file may be missing or damaged.

        Raises:
            UnavailableError: If the file is in use.
        """
        if not self.exists():
            yield
            return
        with self.error_mapping.mapped():
            connection = sqlite3.connect(self.path, isolation_level=None, timeout=_ALONE_SECONDS)
        with closing(connection):
            try:
                for pragma in HOSTILE_FILE_PRAGMAS:
                    connection.execute(pragma)
                connection.execute("PRAGMA journal_mode=DELETE")  # fails beside another connection
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

    def vacuum(self, stop: Stop) -> None:
        with self.error_mapping.mapped(), self._open(WriteConnection) as file:
            end_at(stop, file)
            retrying(lambda: file.execute("SELECT 1" if stop.done() else "VACUUM"), self._timeout)
        if not stop.done():
            self._empty_wal()  # VACUUM writes the new pages to the WAL: the file shrinks only now

    async def size(self, session: AsyncSession) -> int:
        files = (self.path, self.wal)
        return sum(file.stat().st_size for file in files if file.exists())

    def _open(self, kind: type[WriteConnection]) -> closing[WriteConnection]:
        self._file.require()
        return closing(sqlite3.connect(self.path, **options_of(kind)))

    def _checked(self, engine: Engine) -> Engine:
        """Make an engine check the identity of the file before it connects."""

        @event.listens_for(engine, "do_connect")
        def check(*_: object) -> None:
            self._file.require()

        return engine

    def _empty_wal(self) -> None:
        """Move the contents of the WAL to the database file, unless a reader needs them."""
        try:
            with self._open(WriteConnection) as database:
                # A reader of this process may just be ending: its rollback is not waited for.
                for delay in delays(_ENDING_READER_SECONDS):
                    [[is_busy, *_]] = database.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchall()
                    if not is_busy:
                        break
                    time.sleep(delay)
        except sqlite3.Error as error:
            if not SQLiteErrorMapping.is_busy(error):
                raise self.error_mapping.map_error(error) from error
