"""How a copy of a SQLite database takes the place of the database: verified, and whole at any time.

The copy is copied and checked beside the database, which stays as it is until then. Where it is
damaged, or somebody uses the database, nothing has changed.
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
"""Of SQLite's virtual machine between two questions whether to go on; some milliseconds."""

_PAGES = 4096
"""Pages copied between two reports."""


def restore(
    backend: Backend,
    source: Path,
    report: Report = lambda *_: None,
    is_stopped: Callable[[], bool] = lambda: False,
) -> Path | None:
    """Have a copy that `Database.backup` has made take the place of a database.

    Args:
        backend: The database; there need not be one yet.
        source: The copy; it stays as it is.
        report: Is told what is being done, how much of it is done, and how much there is.
        is_stopped: Asked now and then; when it is true, the database stays as it is.

    Returns:
        Where the database is kept that was there before; `None` if there was none.

    Raises:
        UnavailableError: If the copy is damaged, or cannot be read; if the database is in use; if
            it was stopped; or if the database is on a server, with the command to run.
        SchemaMismatchError: If it is a copy of something else, or of a newer schema.
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

    def tell(what: str, done: int, total: int) -> None:
        report(what, done, total)
        if is_stopped():
            raise UnavailableError(f"{target} is as it was: restoring it was stopped")

    with (
        ExitStack() as until_it_stands,
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
                progress=lambda _, left, total: tell("copying", total - left, total),
            )
            copy.execute("PRAGMA journal_mode=DELETE")  # it is one file, complete in itself
            tell("checking the copy", 0, 0)
            copy.set_progress_handler(is_stopped, _STEPS)
            _verify(copy, source)
        tell("putting it in its place", 0, 0)
        until_it_stands.enter_context(backend.alone())
        return _set_aside(target)


def _verify(copy: sqlite3.Connection, source: Path) -> None:
    [[found]] = copy.execute("PRAGMA integrity_check(1)")
    if found != "ok":
        raise UnavailableError(f"{source} is damaged ({found}): give the path of another backup")
    if not _is_store(copy):
        raise SchemaMismatchError(f"{source} is no copy of a store: give the path of a backup")
    revision = next(copy.execute("SELECT version_num FROM alembic_version"), [None])[0]
    migrations.refuse_newer(revision, str(source))


def _is_store(copy: sqlite3.Connection) -> bool:
    tables = {name for (name,) in copy.execute("SELECT name FROM sqlite_master")}
    return {"alembic_version", "tasks", "nodes"} <= tables


def _set_aside(target: Path) -> Path | None:
    """Give the database another name, too, and what belongs to it a name beside that."""
    if not target.exists():
        return None
    aside = unused_name(target, ".before-restore")
    for ending in BESIDES:  # there are none, unless it is damaged
        with suppress(FileNotFoundError):
            os.replace(target.with_name(target.name + ending), f"{aside}{ending}")
    try:
        os.link(target, aside)  # so that there is a database at any time
    except OSError:  # the file system has no such links
        with written_aside(aside, overwrite=False) as copy:
            shutil.copyfile(target, copy)
    return aside


def _pg_restore(location: str, source: Path) -> str:
    """The command that restores an archive; the password is not in it."""
    url = make_url(location)
    plain = URL.create("postgresql", url.username, None, url.host, url.port, url.database)
    options = "--clean --if-exists --no-owner --single-transaction"
    database = shlex.quote(f"--dbname={plain.render_as_string()}")
    return f"pg_restore {options} {database} {shlex.quote(str(source))}"
