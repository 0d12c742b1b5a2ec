"""The mapping of driver errors to the library's errors, decided by the driver's code."""

from __future__ import annotations

import importlib
import sqlite3
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from sqlalchemy.exc import DBAPIError, SQLAlchemyError, StatementError
from sqlalchemy.exc import TimeoutError as PoolTimeoutError

from openclaw_store.errors import (
    InvalidDataError,
    OutcomeUnknownError,
    SchemaMismatchError,
    StoreError,
    UnavailableError,
)

SQLITE_ADVICE = {
    "SQLITE_NOTADB": "it is not a SQLite database: give another path, or restore a backup",
    # SQLite reports a page that the disk fails to read in the same way.
    "SQLITE_CORRUPT": "the file is damaged, or the disk is: check the disk and try again, or "
    "restore a backup",
    "SQLITE_CANTOPEN": "it cannot be opened: check that the path is a file in a writable folder",
    "SQLITE_READONLY": "it cannot be written: check the permissions of the file and its folder",
    "SQLITE_PERM": "it cannot be opened: check the permissions of the file and its folder",
    "SQLITE_AUTH": "it cannot be opened: check the permissions of the file and its folder",
    "SQLITE_FULL": "the disk is full: free some space and try again",
    "SQLITE_IOERR": "the disk reports an error: check the disk, then try again",
    "SQLITE_BUSY": "another process keeps it locked: end that process, or try again",
    "SQLITE_LOCKED": "another connection keeps it locked: try again",
    "SQLITE_PROTOCOL": "another process keeps it locked: try again",
    "SQLITE_INTERRUPT": "it was stopped; if you did not stop it, reading takes far longer than its "
    "size explains: restore a backup",
    "SQLITE_NOMEM": "there is not enough memory",
    "SQLITE_NOLFS": "the file is too large for this system",
}
"""Advice by primary result code."""

_SQLITE_REFUSED = {"SQLITE_CONSTRAINT", "SQLITE_MISMATCH", "SQLITE_TOOBIG", "SQLITE_RANGE"}

_SQLITE_PYTHON_ERRORS: Mapping[Any, str] = dict(
    # A message that quotes the damaged schema, an integer of more than 64 bits, no memory.
    zip(
        (UnicodeDecodeError, OverflowError, MemoryError),
        ("SQLITE_CORRUPT", "SQLITE_RANGE", "SQLITE_NOMEM"),
        strict=True,
    )
)
"""Result codes of the driver's errors that are not `sqlite3.Error`."""

_GONE = "the connection to the server was lost: try again"
_POSTGRESQL_ADVICE = {
    "08": _GONE,
    "57P": "the server is shutting down or starting: try again",
    "57014": "the statement took too long: try again",
    "53": "the server has not enough connections, memory or space: see its log",
    "55P03": "another process keeps it locked: try again",
    "25000": "its transactions have another isolation level: leave default_transaction_isolation "
    "at read committed, and let a pooler pass it on",
    "25006": "this server only reads, as a standby does: name the one that writes",
    "40": "the server gave this transaction up in favour of another: try again",
    "25P03": "the transaction did nothing for too long: try again",
    "25P04": "the transaction took too long: try again",
    "28": "the server does not let this user in: check the user name and the password",
    "3D": 'there is no such database: create it first, as with "createdb"',
    "42501": "this role may not do that: grant it what it needs, or use another role",
    "58": "the server's disk reports an error: see its log",
    "XX": "the server's data may be damaged: see its log",
}
"""Advice by the beginning of the SQLSTATE."""

_WITHOUT_VALUES = (
    "08", "23", "25", "28", "40", "42501", "53", "55P", "57", "P0",
)  # fmt: skip
"""The beginnings of SQLSTATEs whose messages name objects and roles, but quote no values."""


class ErrorMapping(ABC):
    """Maps the errors of one database.

    Args:
        location: The location without a password, for messages.
    """

    read_only: str
    """The code of a write in a read-only transaction."""
    busy: tuple[str, ...]
    """The codes of a lock that another connection holds."""

    def __init__(self, location: str) -> None:
        self.location = location

    @contextmanager
    def mapped(
        self, *, own: bool = True, reading: bool = False, committing: bool = False
    ) -> Iterator[None]:
        """Map the driver's errors in the block, and chain the library's errors to them.

        Args:
            own: The statements are the library's. Otherwise errors in SQL stay as they are, and so
                do errors that SQLAlchemy has not wrapped.
            reading: The statements must not write.
            committing: The block commits.
        """
        caught: tuple[type[Exception], ...] = (SQLAlchemyError,)
        if own:
            caught += self.raised()
        try:
            yield
        except caught as error:
            if reading and self.code(error) == self.read_only:
                raise StoreError("this session only reads: write in `transaction()`") from error
            translation = self.map_error(error, own=own, committing=committing)
            if translation is error:
                raise
            raise translation from error

    def map_error(
        self, error: Exception, *, own: bool = True, committing: bool = False
    ) -> Exception:
        """Return the library's error for a driver's error, or `error` if there is none.

        Args:
            own: The statement is the library's.
            committing: COMMIT raised the error, so it may have taken effect.
        """
        if isinstance(error, StoreError):
            return error
        self.hide_values(error)
        if isinstance(error, PoolTimeoutError):
            return UnavailableError(
                f"{self.location}: all connections are in use by sessions: close some, or raise "
                "pool_size"
            )
        if isinstance(error, StatementError) and isinstance(error.orig, StoreError):
            return error.orig  # a column type refused a value
        return self._meaning(error, own=own, committing=committing) or error

    @staticmethod
    @abstractmethod
    def raised() -> tuple[type[Exception], ...]:
        """Return the errors of the driver itself, which SQLAlchemy has not wrapped."""

    @staticmethod
    @abstractmethod
    def code(error: BaseException) -> str | None:
        """Return the database's code of an error; `None` if the database did not raise it."""

    @classmethod
    def is_busy(cls, error: BaseException) -> bool:
        """Return true if another connection holds a lock, so that waiting may help."""
        return cls.code(error) in cls.busy

    @classmethod
    @abstractmethod
    def hide_values(cls, error: BaseException) -> None:
        """Remove the values of rows from a driver's error, which programs print as a cause."""

    @abstractmethod
    def _meaning(self, error: Exception, *, own: bool, committing: bool) -> StoreError | None:
        """Return the library's error; `None` for an error of the caller's statement."""


class SQLiteErrorMapping(ErrorMapping):
    """Maps the errors of SQLite."""

    read_only = "SQLITE_READONLY"
    busy = ("SQLITE_BUSY", "SQLITE_LOCKED", "SQLITE_PROTOCOL")

    @staticmethod
    def raised() -> tuple[type[Exception], ...]:
        return sqlite3.Error, *_SQLITE_PYTHON_ERRORS

    @staticmethod
    def code(error: BaseException) -> str | None:
        """Return the primary result code: `SQLITE_BUSY` for `SQLITE_BUSY_SNAPSHOT` too."""
        if type(error) in _SQLITE_PYTHON_ERRORS:
            return _SQLITE_PYTHON_ERRORS[type(error)]
        name = getattr(_cause(error), "sqlite_errorname", None)
        return "_".join(name.split("_")[:2]) if name else None

    @staticmethod
    def is_old_snapshot(error: BaseException) -> bool:
        """Return true if a transaction cannot write, as another one has since it began to read."""
        return getattr(_cause(error), "sqlite_errorname", None) == "SQLITE_BUSY_SNAPSHOT"

    @classmethod
    def is_damage(cls, error: BaseException) -> bool:
        """Return true if the contents of the file are damaged."""
        return cls.code(error) == "SQLITE_CORRUPT" or cls.is_no_text(error)

    @classmethod
    def is_no_text(cls, error: BaseException) -> bool:
        """Return true if text is not UTF-8, the driver's only error without a code."""
        return type(_cause(error)) is sqlite3.OperationalError and cls.code(error) is None

    @classmethod
    def hide_values(cls, error: BaseException) -> None:
        if cls.is_no_text(error):
            text, *_ = str(_cause(error)).partition(" with text ")
            _set_text(error, text)

    def _meaning(self, error: Exception, *, own: bool, committing: bool) -> StoreError | None:
        code = self.code(error)
        if self.is_no_text(error):
            return InvalidDataError(
                "row", f"of {self.location} cannot be read: {_cause(error)}: correct it by hand"
            )
        if code == "SQLITE_IOERR" and committing:
            return OutcomeUnknownError(
                f"{self.location}: the disk failed while committing: check the disk, then repeat "
                "the call"
            )
        if code in SQLITE_ADVICE:
            return UnavailableError(f"{self.location}: {SQLITE_ADVICE[code]}")
        if own and code in ("SQLITE_ERROR", "SQLITE_SCHEMA"):
            return SchemaMismatchError(
                f"{self.location}: {_cause(error)}: restore a backup, or give another path"
            )
        if code in _SQLITE_REFUSED:
            return InvalidDataError("row", f"refused by the database: {_cause(error)}")
        return None


class PostgreSQLErrorMapping(ErrorMapping):
    """Maps the errors of PostgreSQL and asyncpg.

    Args:
        on_silence: Called when a server has not answered in time.
    """

    read_only = "25006"
    busy: tuple[str, ...] = ("55P03",)

    def __init__(self, location: str, on_silence: Callable[[], None] = lambda: None) -> None:
        super().__init__(location)
        self._on_silence = on_silence

    @staticmethod
    def raised() -> tuple[type[Exception], ...]:
        driver = importlib.import_module("asyncpg")  # it has no types
        lost = driver.PostgresError, driver.InterfaceError, driver.InternalClientError
        return OSError, OverflowError, *lost  # `OverflowError`: a time outside Python's range

    @staticmethod
    def code(error: BaseException) -> str | None:
        """Return the SQLSTATE: five characters; the first two are the class."""
        code: str | None = getattr(_cause(error), "sqlstate", None)
        return code

    @classmethod
    def hide_values(cls, error: BaseException) -> None:
        code, cause = cls.code(error), _cause(error)
        if code is not None:
            cause.detail = None  # type: ignore[attr-defined]  # the whole row
            # With a position and no context, the message quotes the text of the statement.
            # Otherwise, it may quote a value, as that of data, or a name cast to `regclass`.
            place, context = (getattr(cause, name, None) for name in ("position", "context"))
            is_text = place is not None and context is None and code[:2] != "22"
            is_safe = is_text or code.startswith(_WITHOUT_VALUES)
            _set_text(error, str(*cause.args[:1]) if is_safe else type(cause).__name__)

    def _meaning(self, error: Exception, *, own: bool, committing: bool) -> StoreError | None:
        code, cause = self.code(error), _cause(error)
        if isinstance(cause, OverflowError):
            return InvalidDataError(
                "row", f"of {self.location} cannot be read: {cause}: correct it by hand"
            )
        if code is None and not _is_lost(cause):
            return None
        if isinstance(cause, TimeoutError):
            self._on_silence()
        if committing and (code is None or code.startswith(("08", "57P"))):
            return OutcomeUnknownError(
                f"{self.location}: the connection was lost while committing: repeat the call"
            )
        if code is None:
            reason = f"{type(cause).__name__}: {cause}" if str(cause) else "it does not answer"
            return UnavailableError(f"{self.location}: {reason}: check the server, then try again")
        if code == "08P01":  # a pooler uses this code for every problem
            return UnavailableError(f"{self.location}: {cause}: check the pooler before the server")
        for beginning, advice in _POSTGRESQL_ADVICE.items():
            if code.startswith(beginning):
                return UnavailableError(f"{self.location}: {advice}")
        if own and code.startswith(("42", "3F")):  # 3F: the schema is gone
            return SchemaMismatchError(
                f"{self.location}: {cause}: its schema is another one, or was changed"
            )
        if code.startswith(("22", "23")):
            return InvalidDataError("row", f"refused by the database: {cause}")
        return None


class CitusErrorMapping(PostgreSQLErrorMapping):
    """Maps the errors of a server where Citus distributes the tables.

    While a schema moves, the write lock on its old node does not count on the new one. Of two
    writers, the key of `changes` refuses the second, which has written nothing and tries again.
    """

    busy = (*PostgreSQLErrorMapping.busy, "23505", "XX000")


def unreadable_value(error: BaseException) -> BaseException | None:
    """Return the driver's error without the value, if a value written by hand may be the cause.

    On SQLite, `json_array` refuses a BLOB, and text that is not UTF-8 is an error without a code;
    on PostgreSQL, the driver refuses times outside Python's range.
    """
    cause = _cause(error)
    is_general = SQLiteErrorMapping.code(error) in (None, "SQLITE_ERROR")
    if isinstance(cause, OverflowError) or (isinstance(cause, sqlite3.Error) and is_general):
        SQLiteErrorMapping.hide_values(error)
        return cause
    return None


def _cause(error: BaseException) -> BaseException:
    """Return the driver's error, below SQLAlchemy's and, for asyncpg, its adapter's."""
    if isinstance(error, DBAPIError) and error.orig is not None:
        return error.orig.__cause__ or error.orig
    return error


def _set_text(error: BaseException, text: str) -> None:
    """Replace the text of an error, and of the errors that it wraps."""
    cause = _cause(error)
    for one in {error, getattr(error, "orig", None) or error, cause}:
        one.args = (text,)
    cause.__cause__ = None


def _is_lost(cause: BaseException) -> bool:
    """Return true if the connection failed or was lost, or the server did not answer."""
    driver = importlib.import_module("asyncpg")
    lost = (
        OSError,
        driver.InterfaceError,
        driver.InternalClientError,  # the connection is still busy with an interrupted call
        driver.TargetServerAttributeNotMatched,
    )
    return isinstance(cause, lost)
