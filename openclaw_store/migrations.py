"""The schema's history: one way to run it, for Alembic's command line and for the library.

Whoever migrates holds SQLite's write lock from the first look at the version to the commit, so
any number of processes may try at once, and a killed one leaves the schema it found.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from sqlalchemy import Connection

from openclaw_store import sqlite
from openclaw_store.errors import SchemaMismatchError
from openclaw_store.schema import Base

if TYPE_CHECKING:
    from alembic.runtime.environment import EnvironmentContext

HEAD = "0001"
"""The revision this version of the library works with."""

URL_VARIABLE = "OPENCLAW_STORE_URL"
"""Environment variable that tells the command line which database is meant."""

DEFAULT_LOCATION = "./data/cluster.db"

_PACKAGE = Path(__file__).parent
# The wheel carries the scripts inside the package; in a checkout they stand beside it.
SCRIPTS = next(
    path for path in (_PACKAGE / "_alembic", _PACKAGE.parent / "alembic") if path.exists()
)

_LOCK = threading.Lock()  # Alembic's state is global
_TIMEOUT_SECONDS = 30.0


def check(path: Path) -> bool:
    """Whether the database at `path` has the schema of this version; `False` for an older one.

    Raises:
        SchemaMismatchError: If it is newer, or was not made by this library.
    """
    with sqlite.translated(path), sqlite.opened(path) as connection:
        tables = {name for (name,) in connection.execute("SELECT name FROM sqlite_master")}
        revision: str | None = None
        if "alembic_version" in tables:
            row = connection.execute("SELECT version_num FROM alembic_version").fetchone()
            revision = row and row[0]
        elif tables & {"tasks", "nodes"}:
            raise SchemaMismatchError(
                f"{path} has tables that this library did not make: give another path "
                "(adopting the original hand-made database is not supported yet)"
            )
    if revision is not None and revision > HEAD:
        raise SchemaMismatchError(
            f"{path} has schema {revision}, and this version of the library knows {HEAD}: "
            'run "pip install --upgrade openclaw-store"'
        )
    return revision == HEAD


def require(path: Path) -> None:
    """Refuse a database whose schema is not the one of this version.

    Raises:
        SchemaMismatchError: With the command to run.
    """
    if not check(path):
        raise SchemaMismatchError(
            f"the schema of {path} is older than {HEAD}: call initialize(migrate=True), "
            f'or run "alembic -x url={path} upgrade head" in a checkout'
        )


def upgrade(path: Path, timeout: float = _TIMEOUT_SECONDS) -> None:
    """Bring the database at `path` to the schema of this version; blocks the thread.

    Raises:
        SchemaMismatchError: If it is newer, or was not made by this library.
        UnavailableError: If another process keeps it locked for `timeout` seconds.
    """
    if check(path):
        return
    # Imported here: opening a database that needs no migration shall not pay for Alembic.
    from alembic import command
    from alembic.config import Config
    from alembic.util import CommandError

    with _LOCK, connected(path, timeout) as connection:
        config = Config()
        config.set_main_option("script_location", str(SCRIPTS).replace("%", "%%"))
        config.attributes["connection"] = connection
        try:
            command.upgrade(config, "head")
        except CommandError as error:
            raise SchemaMismatchError(
                f"{path} cannot be upgraded ({error}): restore a backup, or give another path"
            ) from error
    sqlite.empty_wal(path)


@contextmanager
def connected(
    location: str | Path | None, timeout: float = _TIMEOUT_SECONDS
) -> Iterator[Connection]:
    """A connection that holds the write lock, committed at the end, for `run`.

    Args:
        location: Path or URL; `None` for `OPENCLAW_STORE_URL` or `./data/cluster.db`.
        timeout: Seconds to wait for the lock.
    """
    if location is None:
        location = os.environ.get(URL_VARIABLE, DEFAULT_LOCATION)
    path = sqlite.file_of(location)
    sqlite.prepare(path, timeout)
    engine = sqlite.writing_engine(path)
    with (
        sqlite.translated(path),
        sqlite.retrying(engine.connect, timeout) as connection,
    ):
        # SQLite changes a table by copying it, and dropping the old one would delete the rows
        # that refer to it. The switch works outside of transactions only, hence on the driver.
        connection.connection.execute("PRAGMA foreign_keys=OFF")
        with sqlite.retrying(connection.begin, timeout):
            check(path)
            yield connection
            orphans = connection.exec_driver_sql("PRAGMA foreign_key_check").fetchall()
            if orphans:
                raise SchemaMismatchError(f"{path}: the migration would orphan rows: {orphans[:3]}")


def run(context: EnvironmentContext, connection: Connection) -> None:
    """Run the migrations that the command asked for, within the connection's transaction."""
    context.configure(connection=connection, target_metadata=Base.metadata, render_as_batch=True)
    context.run_migrations()


def run_offline(context: EnvironmentContext) -> None:
    """Print the SQL instead of running it."""
    context.configure(
        dialect_name="sqlite", target_metadata=Base.metadata, literal_binds=True,
        render_as_batch=True, transactional_ddl=True,
    )  # fmt: skip
    with context.begin_transaction():
        context.run_migrations()
