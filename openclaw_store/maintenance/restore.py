"""Restore: replace a SQLite database with a verified backup, atomically.

The backup is copied and checked beside the database. If it is damaged, or the database is in use,
the database stays unchanged.
"""

from __future__ import annotations

import os
import shlex
import shutil
import sqlite3
from collections.abc import Callable
from contextlib import ExitStack, closing, suppress
from pathlib import Path
from typing import Any

from sqlalchemy import Connection

from openclaw_store.backends import (
    BESIDES,
    Backend,
    PostgreSQL,
    SQLite,
    SQLiteErrorMapping,
    qualified,
    refuse_location,
    rename_to_unused,
    unused_name,
    written_aside,
)
from openclaw_store.backends.sqlite.connections import (
    ReadConnection,
    WriteConnection,
    options_of,
    time_limit,
)
from openclaw_store.database import FUNCTION, migrations, schema_check
from openclaw_store.errors import UnavailableError
from openclaw_store.maintenance.progress import Report

_PAGES = 4096
"""Pages copied between two progress reports."""

_MOVE = "move it away if no program uses it, then try again"


def restore(
    backend: Backend,
    source: Path,
    report: Report = lambda *_: None,
    is_stopped: Callable[[], bool] = lambda: False,
) -> Path | None:
    """Replace a database with a backup made by `Database.backup`.

    Args:
        backend: The database; it need not exist.
        source: The backup.
        report: Receives the progress.
        is_stopped: Polled; once it returns true, the restore stops without a change.

    Returns:
        The path under which the replaced database is kept; `None` if there was no database.

    Raises:
        UnavailableError: If the backup is damaged or unreadable, the database is in use, or the
            restore was stopped; for a database on a server, with the commands to run instead.
        SchemaMismatchError: If the backup has tables of another program, or a newer schema.
    """
    if isinstance(backend, PostgreSQL):
        raise UnavailableError(
            f"{backend.location} is restored by PostgreSQL's own programs: stop all coordinators, "
            f"then run: {_pg_restore(backend, source)}"
        )
    assert isinstance(backend, SQLite)
    backend.refuse_inherited()
    refuse_location("path", source)
    target, is_new = backend.path, not backend.exists()
    if not source.is_file():
        raise UnavailableError(f"{source}: there is no such file: give the path of a backup")
    if not is_new and target.samefile(source):
        raise UnavailableError(f"{source} is the database itself: give the path of a backup")
    backend.make_folder()

    def report_progress(what: str, done: int, total: int) -> None:
        report(what, done, total)
        if is_stopped():
            raise UnavailableError(f"{target} is unchanged: the restore was stopped")

    with (
        # Keeps the lock on the database until `written_aside` has renamed the copy onto it.
        ExitStack() as lock,
        written_aside(target, overwrite=not is_new, besides=BESIDES, remedy=_MOVE) as partial,
    ):
        with (
            SQLiteErrorMapping(str(source)).mapped(),
            closing(_open_to_read(source)) as original,
            closing(sqlite3.connect(partial, **options_of(WriteConnection))) as copy,
        ):
            original.backup(
                copy,
                pages=_PAGES,
                progress=lambda _, left, total: report_progress("copying", total - left, total),
            )
            copy.execute("PRAGMA journal_mode=DELETE")  # leaves one complete file
        report_progress("checking the copy", 0, 0)
        _check(partial, source, is_stopped)
        # Locked only now: until here, the database may be in use.
        report_progress("replacing the database", 0, 0)
        lock.enter_context(backend.alone())
        return _set_aside(target)


def _open_to_read(source: Path) -> sqlite3.Connection:
    location = f"{source.absolute().as_uri()}?mode=ro"
    connection: sqlite3.Connection = sqlite3.connect(
        location, uri=True, **options_of(ReadConnection)
    )
    return connection


def _check(copy: Path, source: Path, is_stopped: Callable[[], bool]) -> None:
    """Refuse a copy that is damaged, or is no store; the errors name its source."""

    def check(connection: Connection) -> None:
        driver: Any = connection.connection.driver_connection
        driver.set_progress_handler(*time_limit(copy.stat().st_size, is_stopped))
        connection.info[schema_check.SHOWN] = str(source)
        migrations.require_store(connection, str(source))
        [[found]] = connection.exec_driver_sql("PRAGMA integrity_check(1)")
        if found != "ok":
            raise UnavailableError(
                f"{source} is damaged ({found}): give the path of another backup"
            )

    backend = SQLite(copy, 0)
    backend.error_mapping = SQLiteErrorMapping(str(source))
    backend.inspect(check)


def _set_aside(target: Path) -> Path | None:
    """Keep the database under a second name, and move its journals to that name."""
    aside, is_there = unused_name(target, ".before-restore", BESIDES), target.exists()
    if is_there:
        try:
            os.link(target, aside)  # a rename would leave no database for a moment
        except OSError:  # the file system has no hard links
            with written_aside(aside, overwrite=False) as copy:
                shutil.copyfile(target, copy)
    for ending in BESIDES:  # SQLite has removed them, unless the database is damaged
        with suppress(FileNotFoundError):
            rename_to_unused(target.with_name(target.name + ending), Path(f"{aside}{ending}"))
    return aside if is_there else None


def _pg_restore(backend: PostgreSQL, source: Path) -> str:
    """Return the shell commands that restore an archive, without the password.

    The function depends on the tables, and is no part of the archive: it is dropped before, and
    made again when the database is opened.
    """
    options = "--clean --if-exists --no-owner --single-transaction"
    database = shlex.quote(f"--dbname={backend.address.replace(':***@', '@', 1)}")
    prepare = f"DROP FUNCTION IF EXISTS {qualified(backend.schema, FUNCTION)}"
    if backend.cluster is not None:
        prepare = f"CREATE SCHEMA IF NOT EXISTS {backend.schema}; {prepare}"
    return (
        f"psql --no-psqlrc {database} --command={shlex.quote(prepare)} && "
        f"pg_restore {options} {database} {shlex.quote(str(source))}"
    )
