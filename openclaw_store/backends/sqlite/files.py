"""SQLite files: their names, the version of SQLite that they need, and copies of them."""

from __future__ import annotations

import os
import sqlite3
from collections.abc import Callable, Sequence
from contextlib import closing
from pathlib import Path

from sqlalchemy import make_url
from sqlalchemy.exc import ArgumentError

from openclaw_store.backends.sqlite.connections import WriteConnection, options_of
from openclaw_store.errors import InvalidDataError, UnavailableError, safe_repr

MINIMUM_VERSION = (3, 35, 0)

_PAGES = 1000
"""Pages copied between two checks for a stop."""

BESIDES = ("-journal", "-wal", "-shm")
"""Suffixes of the files that SQLite makes beside a database."""


def file_of(location: str | Path) -> Path:
    """Return the absolute path that a path or an SQLAlchemy URL names.

    Raises:
        InvalidDataError: If it names no SQLite file.
    """
    if isinstance(location, str) and "://" in location:
        try:
            url = make_url(location)
        except (ArgumentError, ValueError):
            raise InvalidDataError("db_path", "is neither a path nor a database URL") from None
        if url.get_backend_name() != "sqlite":
            name = url.get_backend_name()
            wanted = "give a path for SQLite, or a URL that begins with postgresql://"
            raise InvalidDataError("db_path", f"{name} is not supported: {wanted}")
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
    path = Path(location)
    if path.parts[:1] == ("~",):  # a folder of this name would be made
        raise InvalidDataError(
            "db_path",
            "~ is the home folder for a shell only: use Path.expanduser, or the full path",
        )
    return path.absolute()


def check_version() -> None:
    """Refuse a SQLite that is too old.

    Raises:
        UnavailableError: With the version found and the one needed.
    """
    if sqlite3.sqlite_version_info < MINIMUM_VERSION:
        needed = ".".join(map(str, MINIMUM_VERSION))
        raise UnavailableError(
            f"this Python has SQLite {sqlite3.sqlite_version}, {needed} or newer is needed: "
            "use a newer Python, or a newer SQLite library"
        )


def copy_database(
    source: sqlite3.Connection, target: Path, is_stopped: Callable[[], bool] = lambda: False
) -> None:
    """Write the database as `source` sees it to a file that needs no WAL."""

    def progress(*_: int) -> None:
        if is_stopped():
            raise UnavailableError(f"{target}: the copy was stopped")

    with closing(sqlite3.connect(target, **options_of(WriteConnection))) as copy:
        # In one snapshot: otherwise the copy starts again with every concurrent write.
        source.execute("SAVEPOINT copy")
        source.execute("SELECT count(*) FROM sqlite_master").fetchall()
        try:
            source.backup(copy, pages=_PAGES, progress=progress)
        finally:
            source.execute("RELEASE copy")
        copy.execute("PRAGMA journal_mode=DELETE")


def require_other_file(target: Path, own: Sequence[Path]) -> None:
    """Refuse the name of a backup if it names the database itself, or a journal.

    Args:
        own: The database, and the files that SQLite makes beside it.
    """
    real = Path(os.path.realpath(target))
    is_there = os.path.exists(target)
    if real in own or any(is_there and file.exists() and target.samefile(file) for file in own):
        raise InvalidDataError("path", f"{target} is the database itself: choose another")
    for suffix in BESIDES:  # SQLite would take it for its own, and delete it
        if real.name.endswith(suffix) and Path(str(real).removesuffix(suffix)).exists():
            raise InvalidDataError(
                "path", f"{target} is the name of a journal of another file: choose another"
            )
