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

from sqlalchemy import URL, make_url

from openclaw_store.backends import (
    BESIDES,
    Backend,
    PostgreSQL,
    SQLite,
    SQLiteErrorMapping,
    unused_name,
    written_aside,
)
from openclaw_store.database import migrations
from openclaw_store.errors import SchemaMismatchError, UnavailableError
from openclaw_store.maintenance.progress import Report

_STEPS = 100_000
"""Instructions of SQLite's virtual machine between two checks of `is_stopped`: milliseconds."""

_PAGES = 4096
"""Pages copied between two progress reports."""


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
            restore was stopped; for a database on a server, with the command to run instead.
        SchemaMismatchError: If the backup has tables of another program, or a newer schema.
    """
    if isinstance(backend, PostgreSQL):
        raise UnavailableError(
            f"{backend.location} is restored by PostgreSQL's own program: stop all coordinators, "
            f"then run: {_pg_restore(backend.location, source)}"
        )
    assert isinstance(backend, SQLite)
    backend.refuse_inherited()
    target = backend.path
    if not source.is_file():
        raise UnavailableError(f"{source}: there is no such file: give the path of a backup")
    if target.exists() and target.samefile(source):
        raise UnavailableError(f"{source} is the database itself: give the path of a backup")
    backend.make_folder()

    def report_progress(what: str, done: int, total: int) -> None:
        report(what, done, total)
        if is_stopped():
            raise UnavailableError(f"{target} is unchanged: the restore was stopped")

    with (
        # Keeps the lock on the database until `written_aside` has renamed the copy onto it.
        ExitStack() as lock,
        written_aside(target, overwrite=True, besides=BESIDES) as partial,
    ):
        with (
            SQLiteErrorMapping(str(source)).mapped(),
            closing(sqlite3.connect(f"{source.absolute().as_uri()}?mode=ro", uri=True)) as original,
            closing(sqlite3.connect(partial, isolation_level=None)) as copy,
        ):
            original.backup(
                copy,
                pages=_PAGES,
                progress=lambda _, left, total: report_progress("copying", total - left, total),
            )
            copy.execute("PRAGMA journal_mode=DELETE")  # leaves one complete file
            report_progress("checking the copy", 0, 0)
            copy.set_progress_handler(is_stopped, _STEPS)
            _verify(copy, source)
        # Locked only now: until here, the database may be in use.
        report_progress("replacing the database", 0, 0)
        lock.enter_context(backend.alone())
        return _set_aside(target)


def _verify(copy: sqlite3.Connection, source: Path) -> None:
    [[found]] = copy.execute("PRAGMA integrity_check(1)")
    if found != "ok":
        raise UnavailableError(f"{source} is damaged ({found}): give the path of another backup")
    tables = {name for (name,) in copy.execute("SELECT name FROM sqlite_master")}
    if not tables >= {"alembic_version", "tasks", "nodes"}:
        raise SchemaMismatchError(f"{source} is no copy of a store: give the path of a backup")
    revision = next(copy.execute("SELECT version_num FROM alembic_version"), [None])[0]
    migrations.refuse_newer(revision, str(source))


def _set_aside(target: Path) -> Path | None:
    """Keep the database under a second name, and move its journals to that name."""
    if not target.exists():
        return None
    aside = unused_name(target, ".before-restore")
    for ending in BESIDES:  # SQLite has removed them, unless the database is damaged
        with suppress(FileNotFoundError):
            os.replace(target.with_name(target.name + ending), f"{aside}{ending}")
    try:
        os.link(target, aside)  # a rename would leave no database for a moment
    except OSError:  # the file system has no hard links
        with written_aside(aside, overwrite=False) as copy:
            shutil.copyfile(target, copy)
    return aside


def _pg_restore(location: str, source: Path) -> str:
    """Return the shell command that restores an archive, without the password."""
    url = make_url(location)
    plain = URL.create("postgresql", url.username, None, url.host, url.port, url.database)
    options = "--clean --if-exists --no-owner --single-transaction"
    database = shlex.quote(f"--dbname={plain.render_as_string()}")
    return f"pg_restore {options} {database} {shlex.quote(str(source))}"
