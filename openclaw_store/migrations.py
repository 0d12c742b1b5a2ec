"""The schema's history: one way to run it, for Alembic's command line and for the library.

Whoever migrates holds a lock from the first look at the version to the commit (SQLite's write
lock; an advisory one on PostgreSQL), so any number of processes may try at once, and a killed one
leaves the schema it found.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from sqlalchemy import Connection, inspect, text

from openclaw_store.backends import DEFAULT_LOCATION, Backend, backend_of
from openclaw_store.errors import SchemaMismatchError
from openclaw_store.schema import Base

if TYPE_CHECKING:
    from alembic.runtime.environment import EnvironmentContext

HEAD = "0002"
"""The revision this version of the library works with."""

COPYING = f"copying-{HEAD}-"
"""How the name of a revision begins while `copy` fills the database."""

URL_VARIABLE = "OPENCLAW_STORE_URL"
"""Environment variable that tells the command line which database is meant."""

_PACKAGE = Path(__file__).parent
# The wheel carries the scripts inside the package; in a checkout they stand beside it.
SCRIPTS = next(
    path for path in (_PACKAGE / "_alembic", _PACKAGE.parent / "alembic") if path.exists()
)

_LOCK = threading.Lock()  # Alembic's state is global


def named_by(location: str | Path | None) -> Backend:
    """The database that the command line means.

    Args:
        location: Path or URL; `None` for `OPENCLAW_STORE_URL` or `./data/cluster.db`.
    """
    return backend_of(location or os.environ.get(URL_VARIABLE, DEFAULT_LOCATION))


def is_current(backend: Backend) -> bool:
    """Whether the database has the schema of this version; `False` for an older one.

    Raises:
        SchemaMismatchError: If it is newer, or was not made by this library.
    """
    return backend.inspect(lambda connection: _is_current(backend, connection))


def _is_current(backend: Backend, connection: Connection) -> bool:
    tables = set(inspect(connection).get_table_names())
    revision: str | None = None
    if "alembic_version" in tables:
        revision = connection.scalar(text("SELECT version_num FROM alembic_version"))
    elif tables & {"tasks", "nodes"}:
        raise SchemaMismatchError(
            f"{backend.location} has tables that this library did not make: give another path "
            "(adopting the original hand-made database is not supported yet)"
        )
    if revision is not None and revision.startswith("copying-"):
        raise SchemaMismatchError(
            f"{backend.location} is half of a copy: copy to it again from the same database, or "
            "give another path"
        )
    if revision is not None and revision > HEAD:
        raise SchemaMismatchError(
            f"{backend.location} has schema {revision}, and this version of the library knows "
            f'{HEAD}: run "pip install --upgrade openclaw-store"'
        )
    return revision == HEAD


def is_half_copied(backend: Backend) -> bool:
    """Whether `copy`, of this version of the library, has begun to fill the database."""
    return backend.inspect(lambda connection: (stored(connection) or "").startswith(COPYING))


def stored(connection: Connection) -> str | None:
    """The revision that the database says it has; `None` where there is none."""
    if "alembic_version" not in inspect(connection).get_table_names():
        return None
    revision: str | None = connection.scalar(text("SELECT version_num FROM alembic_version"))
    return revision


def require(backend: Backend) -> None:
    """Refuse a database whose schema is not the one of this version.

    Raises:
        SchemaMismatchError: With the command to run.
    """
    if not is_current(backend):
        raise SchemaMismatchError(
            f"the schema of {backend.location} is older than {HEAD}: call "
            f'initialize(migrate=True), or run "alembic -x url={backend.location} upgrade head" '
            "in a checkout"
        )


def upgrade(backend: Backend) -> None:
    """Bring the database to the schema of this version; blocks the thread.

    Raises:
        SchemaMismatchError: If it is newer, or was not made by this library.
        UnavailableError: If another process keeps it locked for longer than its timeout.
    """
    if is_current(backend):
        return
    # Imported here: opening a database that needs no migration shall not pay for Alembic.
    from alembic import command
    from alembic.config import Config
    from alembic.util import CommandError

    def run_upgrade(connection: Connection) -> None:
        config = Config()
        config.set_main_option("script_location", str(SCRIPTS).replace("%", "%%"))
        config.attributes["connection"] = connection
        command.upgrade(config, "head")

    try:
        with _LOCK:
            migrate(backend, run_upgrade)
    except CommandError as error:
        raise SchemaMismatchError(
            f"{backend.location} cannot be upgraded ({error}): restore a backup, or give another "
            "path"
        ) from error


def migrate(backend: Backend, work: Callable[[Connection], None]) -> None:
    """Do `work` with a connection that holds the lock, and commit it; blocks the thread.

    Args:
        backend: The database.
        work: Calls `run`.

    Raises:
        SchemaMismatchError: If the schema is newer, or was not made by this library.
        UnavailableError: If another process keeps it locked for longer than its timeout.
    """

    def checked(connection: Connection) -> None:
        _is_current(backend, connection)
        work(connection)

    backend.migrate(checked)


def run(context: EnvironmentContext, connection: Connection) -> None:
    """Run the migrations that the command asked for, within the connection's transaction."""
    context.configure(connection=connection, target_metadata=Base.metadata, render_as_batch=True)
    context.run_migrations()


def run_offline(context: EnvironmentContext, backend: Backend) -> None:
    """Print the SQL instead of running it."""
    context.configure(
        dialect_name=backend.dialect, target_metadata=Base.metadata, literal_binds=True,
        render_as_batch=True, transactional_ddl=True,
    )  # fmt: skip
    with context.begin_transaction():
        context.run_migrations()
