"""Writing to a file: its identity, the wait for its lock, the cursor, the writer's session."""

from __future__ import annotations

import os
import random
import sqlite3
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache
from itertools import chain
from operator import methodcaller
from pathlib import Path
from typing import Any, TypeVar

from sqlalchemy import Connection, Engine
from sqlalchemy.engine.interfaces import DBAPICursor
from sqlalchemy.exc import DBAPIError

from openclaw_store.backends.error_mapping import SQLiteErrorMapping
from openclaw_store.errors import UnavailableError

Result = TypeVar("Result")

_ROWS_A_STATEMENT = (500, 64, 16, 4, 1)  # SQLite takes 32,766 parameters: 65 columns
_MANY = 16
"""Rows of a statement that has a text of its own for the columns without any value."""
_MOST_TEXTS = 8
"""Such texts of a statement for a number of rows."""
_texts: defaultdict[tuple[str, int], set[frozenset[int]]] = defaultdict(set)


class OpenFile:
    """A database file, which must stay the same while it is open."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.identity: tuple[int, int] | None = None
        """Its device and number; `None` until it is known."""

    def require(self) -> None:
        """Refuse a file that was removed or replaced since its identity was set.

        Writes to it would be lost, and SQLite would make an empty file in its place.
        """
        if self.identity is None:
            return
        try:
            found = os.stat(self.path)
            is_there = (found.st_dev, found.st_ino) == self.identity
        except (FileNotFoundError, NotADirectoryError):
            is_there = False
        except OSError:  # SQLite reports the cause when it opens the file
            return
        if not is_there:
            raise UnavailableError(
                f"{self.path} was removed or replaced while it was open: put it back, or end all "
                "programs that use it and restore a backup"
            )


def begin_writing(connection: Connection) -> None:
    """Begin a transaction with the write lock, on the driver, which takes less time."""
    connection.connection.cursor().execute("BEGIN IMMEDIATE")


def delays(timeout: float) -> Iterator[float]:
    """Yield the seconds to wait between attempts to lock, jittered, until the timeout."""
    end = time.monotonic() + timeout
    is_first = True
    while is_first or time.monotonic() < end:
        yield random.uniform(0.0003, 0.003)
        is_first = False


def retrying(work: Callable[[], Result], timeout: float) -> Result:
    """Run `work` on this thread, and again while the database is locked."""
    for delay in delays(timeout):
        try:
            return work()
        except (DBAPIError, sqlite3.Error) as error:
            if not SQLiteErrorMapping.is_busy(error):
                raise
        time.sleep(delay)
    return work()


class Cursor:
    """The driver's cursor of a write transaction, which holds the write lock."""

    dialect = "sqlite"
    schema = None

    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        self._driver_cursor: DBAPICursor | None = None

    @property
    def _cursor(self) -> DBAPICursor:
        # The driver's own: through SQLAlchemy, a lone insert takes 40 % more time, a batch 10 %.
        if self._driver_cursor is None:
            self._driver_cursor = self._connection.connection.cursor()
        return self._driver_cursor

    def execute(self, sql: str, parameters: Sequence[Any] = ()) -> Sequence[Any]:
        cursor = self._cursor
        cursor.execute(sql, parameters)
        return cursor.fetchall()

    def count(self, sql: str, rows: Sequence[Sequence[Any]]) -> int:
        self._cursor.executemany(sql, rows)
        return self._cursor.rowcount

    def write(self, sql: str, rows: Sequence[Sequence[Any]]) -> None:
        """Execute a statement for many rows.

        A statement with `VALUES (?, …)` is sent with the values of several rows. That takes two
        thirds of the time of `executemany`, which also releases the interpreter's lock for each
        row, and waits for it under load. Statements of few sizes serve all batches, so the driver
        keeps them prepared.

        A column of NULLs is no parameter: the driver takes 0.4 µs for each NULL, because it looks
        for an adapter, and half the values of a new task are NULL.
        """
        if "VALUES (" not in sql:
            self.count(sql, rows)
            return
        start = 0
        for size in _ROWS_A_STATEMENT:
            while len(rows) - start >= size:
                part, empty = rows[start : start + size], frozenset[int]()
                if size >= _MANY:
                    smaller, found = _without_empty(part)
                    if _has_text(sql, size, found):
                        part, empty = smaller, found
                self.execute(_for_rows(sql, size, empty), list(chain.from_iterable(part)))
                start += size


class LoopCursor(Cursor):
    """The same on a connection of coroutines.

    A statement is one message to the thread of the connection; SQLAlchemy's cursor takes four.
    """

    def execute(self, sql: str, parameters: Sequence[Any] = ()) -> Sequence[Any]:
        rows: Sequence[Any] = self._run(methodcaller("execute_fetchall", sql, parameters))
        return rows

    def count(self, sql: str, rows: Sequence[Sequence[Any]]) -> int:
        return int(self._run(methodcaller("executemany", sql, rows)).rowcount)

    def _run(self, call: Callable[[Any], Any]) -> Any:
        adapter: Any = self._connection.connection
        return adapter.run_async(call)


def _without_empty(rows: Sequence[Sequence[Any]]) -> tuple[Sequence[Any], frozenset[int]]:
    """Return the rows without the columns that are NULL in all of them, and their positions."""
    columns = list(enumerate(zip(*rows, strict=True)))
    empty = frozenset(
        [at for at, one in columns if one[0] is None and one.count(None) == len(rows)]
    )
    return list(zip(*[one for at, one in columns if at not in empty], strict=True)), empty


def _has_text(sql: str, count: int, empty: frozenset[int]) -> bool:
    """Return true for the first sets of empty columns of a statement.

    A connection keeps its last 128 statements, and one for 500 rows takes more than a megabyte.
    """
    texts = _texts[sql, count]
    if len(texts) < _MOST_TEXTS:
        texts.add(empty)
    return empty in texts


@lru_cache(maxsize=256)
def _for_rows(sql: str, count: int, empty: frozenset[int] = frozenset()) -> str:
    """Return the statement for several rows, made of the statement for one row.

    Args:
        empty: Positions of the values that are NULL, without a parameter.
    """
    head, rest = sql.split("VALUES (", 1)
    row, tail = rest.split(")", 1)
    row = ", ".join(["NULL" if at in empty else one for at, one in enumerate(row.split(", "))])
    return f"{head}VALUES {', '.join([f'({row})'] * count)}{tail}"


class WriteSession:
    """The connection of the writer, on the writer's thread."""

    def __init__(self, engine: Engine, until: float, file: OpenFile) -> None:
        self._file = file
        self._connection = retrying(engine.connect, until - time.monotonic())
        self.cursor: Cursor

    def begin(self, until: float) -> bool:
        self._file.require()
        retrying(lambda: begin_writing(self._connection), until - time.monotonic())
        self.cursor = Cursor(self._connection)
        return True

    def commit(self) -> None:
        self._connection.connection.commit()

    def close(self) -> None:
        self._connection.close()
