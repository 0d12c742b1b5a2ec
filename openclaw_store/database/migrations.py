"""The schema's history: one way to run it, for Alembic's command line and for the library.

Whoever migrates holds a lock from the first look at the version to the commit (SQLite's write
lock; an advisory one on PostgreSQL), so any number of processes may try at once, and a killed one
leaves the schema it found. A database of the original hand-made schema is adopted on the way.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from datetime import tzinfo
from io import StringIO
from pathlib import Path
from typing import TYPE_CHECKING

from sqlalchemy import Connection, inspect, text

from openclaw_store.backends import DEFAULT_LOCATION, Backend, backend_of, unused_name
from openclaw_store.database import legacy_import
from openclaw_store.database.tables import Base
from openclaw_store.domain import Clock, utc_now
from openclaw_store.errors import InvalidDataError, SchemaMismatchError, UnavailableError

if TYPE_CHECKING:
    from alembic.config import Config
    from alembic.runtime.environment import EnvironmentContext

HEAD = "0002"
"""The revision this version of the library works with."""

COPYING = "copying-"
"""How the name of a revision begins while a `copy`, of whatever version, fills the database."""

COPYING_HEAD = f"{COPYING}{HEAD}-"
"""The same, of this version."""

URL_VARIABLE = "OPENCLAW_STORE_URL"
"""Environment variable that tells the command line which database is meant."""

_PACKAGE = Path(__file__).parent.parent
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
    return backend_of(location_of(location))


def location_of(location: str | Path | None) -> str | Path:
    """Where that database is."""
    return location or os.environ.get(URL_VARIABLE) or DEFAULT_LOCATION


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
    elif tables & {"tasks", "nodes"} and not legacy_import.is_legacy(connection):
        raise SchemaMismatchError(
            f"{backend.location} has tables that this library did not make: give another path"
        )
    refuse_newer(revision, backend.location)
    return revision == HEAD


def refuse_newer(revision: str | None, location: str) -> None:
    """Refuse a schema that this version does not know yet.

    Raises:
        SchemaMismatchError: With the command to run.
    """
    if revision is not None and revision.startswith(COPYING):
        raise SchemaMismatchError(
            f"{location} is half of a copy: copy to it again from the same database, or give "
            "another path"
        )
    if revision is not None and revision > HEAD:
        raise SchemaMismatchError(
            f"{location} has schema {revision}, and this version of the library knows "
            f'{HEAD}: run "pip install --upgrade openclaw-store"'
        )


def is_half_copied(backend: Backend) -> bool:
    """Whether `copy`, of this version of the library, has begun to fill the database."""
    return backend.inspect(lambda connection: (stored(connection) or "").startswith(COPYING_HEAD))


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
        is_legacy = backend.inspect(legacy_import.is_legacy)
        raise SchemaMismatchError(
            f"the schema of {backend.location} is "
            f"{'the original one' if is_legacy else f'older than {HEAD}'}: call "
            'initialize(migrate=True), or run "openclaw-store db upgrade" or, in a checkout, '
            f'"alembic -x url={backend.location} upgrade head"'
        )


def revision_of(backend: Backend) -> str | None:
    """The schema that a database has; `None` if it has none of ours."""
    return backend.inspect(stored)


def upgrade(
    backend: Backend, legacy_timezone: tzinfo | None = None, clock: Clock = utc_now
) -> legacy_import.LegacyImport | None:
    """Bring the database to the schema of this version; blocks the thread.

    Returns what became of the rows of an original database, if it was one.

    Args:
        backend: The database.
        legacy_timezone: Of the times of an original database; `None` for the local one.
        clock: Tells when its rows are adopted.

    Raises:
        SchemaMismatchError: If it is newer, or was not made by this library.
        UnavailableError: If another process keeps it locked for longer than its timeout, or has
            the original database open.
    """
    if is_current(backend):
        return None
    # Imported here, as below: opening a database that needs no migration shall not pay for Alembic.
    from alembic import command
    from alembic.util import CommandError

    try:
        with _LOCK:
            return migrate(
                backend,
                lambda connection: command.upgrade(_config(connection), "head"),
                legacy_timezone,
                clock,
                to_head=True,
            )
    except CommandError as error:
        raise SchemaMismatchError(
            f"{backend.location} cannot be upgraded ({error}): restore a backup, or give another "
            "path"
        ) from error


def downgrade(backend: Backend, revision: str) -> None:
    """Take the database back to an older schema; blocks the thread.

    Args:
        revision: The schema; `base` for none, which removes the tables and all that is in them.

    Raises:
        InvalidDataError: If there is no such revision before its own.
        SchemaMismatchError: If the database is newer, or was not made by this library.
        UnavailableError: If another process keeps it locked for longer than its timeout.
    """
    from alembic import command
    from alembic.util import CommandError

    try:
        with _LOCK:
            migrate(backend, lambda connection: command.downgrade(_config(connection), revision))
    except CommandError as error:
        raise InvalidDataError("revision", f"{error}: {backend.location} is as it was") from error


def check(backend: Backend) -> None:
    """Refuse a database whose tables are not those of this version, as Alembic compares them.

    Raises:
        SchemaMismatchError: Saying what is different.
    """
    require(backend)
    from alembic import command
    from alembic.util import CommandError

    try:
        with _LOCK:
            migrate(backend, lambda connection: command.check(_config(connection)))
    except CommandError as error:
        raise SchemaMismatchError(
            f"the tables of {backend.location} were changed by hand ({error}): restore a backup"
        ) from error


def _config(connection: Connection) -> Config:
    """What has Alembic work with a connection, and say nothing."""
    from alembic.config import Config

    config = Config(stdout=StringIO())
    config.set_main_option("script_location", str(SCRIPTS).replace("%", "%%"))
    config.attributes["connection"] = connection
    return config


def migrate(
    backend: Backend,
    work: Callable[[Connection], None],
    legacy_timezone: tzinfo | None = None,
    clock: Clock = utc_now,
    *,
    to_head: bool = False,
) -> legacy_import.LegacyImport | None:
    """Do `work` with a connection that holds the lock, and commit it; blocks the thread.

    Returns what became of the rows of an original database, if it was one.

    Args:
        backend: The database.
        work: Calls `run`.
        legacy_timezone: Of the times of an original database; `None` for the local one.
        clock: Tells when its rows are adopted.
        to_head: Whether it upgrades to the schema of this version; an original database is
            adopted then, and refused otherwise.

    Raises:
        SchemaMismatchError: If the schema is newer, or was not made by this library.
        UnavailableError: If another process keeps it locked for longer than its timeout, or has
            the original database open.
    """
    copy: Path | None = None
    adopted: legacy_import.LegacyImport | None = None

    def copy_to(connection: Connection) -> Path | None:
        nonlocal copy
        is_legacy = legacy_import.is_legacy(connection)
        if is_legacy and not to_head:
            raise SchemaMismatchError(
                f"{backend.location} is an original hand-made database: run "
                '"openclaw-store db upgrade" or, in a checkout, '
                f'"alembic -x url={backend.location} upgrade head" first, which adopts it'
            )
        ending = f".original-{clock():%Y%m%dT%H%M%SZ}"
        copy = unused_name(Path(backend.location), ending) if is_legacy else None
        return copy

    def checked(connection: Connection) -> None:
        nonlocal adopted
        _is_current(backend, connection)
        if not legacy_import.is_legacy(connection):
            work(connection)
            return
        if copy is None:
            raise UnavailableError(
                f"{backend.location}: another program makes its tables just now: end it, then try "
                "again"
            )
        legacy_import.set_aside(connection)
        work(connection)
        cursor = backend.cursor(connection)
        adopted = legacy_import.adopt(connection, cursor, legacy_timezone, clock(), copy)

    backend.migrate(checked, copy_to)
    if adopted is not None:
        legacy_import.report(adopted, backend.location)
    return adopted


def is_to_head(context: EnvironmentContext) -> bool:
    """Whether the command that Alembic runs upgrades to the schema of this version."""
    try:
        return context.get_revision_argument() == HEAD
    except KeyError:  # as of `current` and `check`, which change nothing
        return False


def run(context: EnvironmentContext, connection: Connection) -> None:
    """Run the migrations that the command asked for, within the connection's transaction."""
    context.configure(
        connection=connection,
        target_metadata=Base.metadata,
        render_as_batch=True,
        include_name=lambda name, kind, _: kind != "table" or not legacy_import.is_aside(name),
    )
    context.run_migrations()


def run_offline(context: EnvironmentContext, backend: Backend) -> None:
    """Print the SQL instead of running it."""
    context.configure(
        dialect_name=backend.dialect, target_metadata=Base.metadata, literal_binds=True,
        render_as_batch=True, transactional_ddl=True,
    )  # fmt: skip
    with context.begin_transaction():
        context.run_migrations()
