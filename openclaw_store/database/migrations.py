"""Migrations of the schema, run in one way by Alembic's command line and by the library.

A migration holds a lock from its first look at the version to its commit (SQLite's write lock; an
advisory lock on PostgreSQL). So any number of processes may migrate at once, and a killed one
leaves the schema as it was. A legacy database is imported in the same transaction.
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
from openclaw_store.database.store_write import FUNCTION
from openclaw_store.database.tables import UNCOMPARED_INDEXES, Base
from openclaw_store.domain import Clock, utc_now
from openclaw_store.errors import InvalidDataError, SchemaMismatchError, UnavailableError

if TYPE_CHECKING:
    from alembic.config import Config
    from alembic.runtime.environment import EnvironmentContext

HEAD = "0005"
"""The schema revision of this version of the library."""

COPYING = "copying-"
"""Prefix of the revision while `copy`, of any version, fills the database."""

COPYING_HEAD = f"{COPYING}{HEAD}-"
"""The same prefix for `copy` of this version."""

URL_VARIABLE = "OPENCLAW_STORE_URL"
"""Environment variable with the location of the database, for the command line."""

_PACKAGE = Path(__file__).parent.parent
# The wheel has the scripts inside the package, a checkout beside it.
SCRIPTS = next(
    path for path in (_PACKAGE / "_alembic", _PACKAGE.parent / "alembic") if path.exists()
)

_LOCK = threading.Lock()  # Alembic's state is global


def named_by(location: str | Path | None) -> Backend:
    """Return the backend of the command line's database, at `location_of(location)`."""
    return backend_of(location_of(location))


def location_of(location: str | Path | None) -> str | Path:
    """Return the path or URL, by default `OPENCLAW_STORE_URL` or `./data/cluster.db`."""
    return location or os.environ.get(URL_VARIABLE) or DEFAULT_LOCATION


def is_current(backend: Backend) -> bool:
    """Return `True` if the schema is current, `False` if it is older; refuse any other."""
    return backend.inspect(lambda connection: _is_current(backend, connection))


def _is_current(backend: Backend, connection: Connection) -> bool:
    revision, tables = stored(connection), set(inspect(connection).get_table_names())
    is_foreign = "alembic_version" not in tables and bool(tables & {"tasks", "nodes"})
    if is_foreign and not legacy_import.is_legacy(connection):
        raise SchemaMismatchError(
            f"{backend.location} has tables that this library did not make: give another path"
        )
    refuse_newer(revision, backend.location)
    return revision == HEAD


def refuse_newer(revision: str | None, location: str) -> None:
    """Refuse the schema of a later version, and an incomplete copy."""
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
    """Return `True` if `copy` of this version has begun to fill the database."""
    return backend.inspect(lambda connection: (stored(connection) or "").startswith(COPYING_HEAD))


def stored(connection: Connection) -> str | None:
    """Return the revision of the database; `None` if it has none."""
    if "alembic_version" not in inspect(connection).get_table_names():
        return None
    revision: str | None = connection.scalar(text("SELECT version_num FROM alembic_version"))
    return revision


def require(backend: Backend) -> None:
    """Refuse a database with another schema; the error names the command to run."""
    if not is_current(backend):
        is_legacy = backend.inspect(legacy_import.is_legacy)
        raise SchemaMismatchError(
            f"the schema of {backend.location} is "
            f"{'the original one' if is_legacy else f'older than {HEAD}'}: call "
            'initialize(migrate=True), or run "openclaw-store db upgrade" or, in a checkout, '
            f'"alembic -x url={backend.location} upgrade head"'
        )


def revision_of(backend: Backend) -> str | None:
    """Return the revision of a backend's database; `None` if it has none; blocks the thread."""
    return backend.inspect(stored)


def upgrade(
    backend: Backend, legacy_timezone: tzinfo | None = None, clock: Clock = utc_now
) -> legacy_import.LegacyImport | None:
    """Upgrade the database to the schema of this version; blocks the thread.

    Returns the result of the import of a legacy database. Arguments and errors are those of
    `migrate`.
    """
    if is_current(backend):
        return None
    # Imported here, as below: opening a current database must not take the time to load Alembic.
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
    """Return the database to an older schema; blocks the thread.

    The revision `base` removes all tables with their contents. An unknown one raises
    `InvalidDataError`; further errors are those of `migrate`.
    """
    from alembic import command
    from alembic.util import CommandError

    try:
        with _LOCK:
            migrate(backend, lambda connection: command.downgrade(_config(connection), revision))
    except CommandError as error:
        raise InvalidDataError("revision", f"{error}: {backend.location} is as it was") from error


def check(backend: Backend) -> None:
    """Refuse a database of which the tables differ from the declarative models."""
    require(backend)
    if not backend.inspect(has_functions):
        raise SchemaMismatchError(
            f"the function {FUNCTION} of {backend.location} was changed or dropped: downgrade "
            "to 0003, and upgrade again"
        )
    from alembic import command
    from alembic.util import CommandError

    try:
        with _LOCK:
            migrate(backend, lambda connection: command.check(_config(connection)))
    except CommandError as error:
        raise SchemaMismatchError(
            f"the tables of {backend.location} were changed by hand ({error}): restore a backup"
        ) from error


def has_functions(connection: Connection) -> bool:
    """Return `True` if the database has the function `store_write` as migration 0004 made it."""
    if connection.dialect.name == "sqlite":
        return True
    from alembic.script import ScriptDirectory

    module = ScriptDirectory.from_config(_config(connection)).get_revision("0004").module
    query = text("SELECT prosrc FROM pg_proc WHERE proname = :name AND pg_function_is_visible(oid)")
    return connection.execute(query, {"name": FUNCTION}).scalars().all() == [
        module.function().split("$$")[1]
    ]


def _config(connection: Connection) -> Config:
    """Return a configuration with which Alembic uses a connection and prints nothing."""
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
    """Run `work` with a connection that holds the lock, and commit; blocks the thread.

    Returns the result of the import of a legacy database.

    Args:
        work: Calls `run`.
        legacy_timezone: Zone of the times of a legacy database; `None` for the local one.
        to_head: `work` upgrades to the schema of this version. A legacy database is imported then,
            and refused otherwise.

    Raises:
        SchemaMismatchError: If the schema is newer, or was not made by this library.
        UnavailableError: If another process keeps the lock for longer than the timeout, or has
            the legacy database open.
    """
    copy: Path | None = None
    imported: legacy_import.LegacyImport | None = None

    # Called without the lock, and again with all other connections excluded if it returns a path.
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
        nonlocal imported
        # Again, with the lock: another process may have migrated the database since `is_current`.
        _is_current(backend, connection)
        if not legacy_import.is_legacy(connection):
            work(connection)
            return
        if copy is None:
            raise UnavailableError(
                f"{backend.location}: another program makes its tables just now: end it, then try "
                "again"
            )
        legacy_import.rename_tables(connection)
        work(connection)
        cursor = backend.cursor(connection)
        imported = legacy_import.import_rows(connection, cursor, legacy_timezone, clock(), copy)

    backend.migrate(checked, copy_to)
    if imported is not None:
        legacy_import.report(imported, backend.location)
    return imported


def is_to_head(context: EnvironmentContext) -> bool:
    """Return `True` if Alembic's command upgrades to the schema of this version."""
    try:
        return context.get_revision_argument() == HEAD
    except KeyError:  # `current` and `check` have no such argument, and change nothing
        return False


def run(context: EnvironmentContext, connection: Connection) -> None:
    """Run the migrations of Alembic's command in the transaction of the connection."""
    left_out = {"table": legacy_import.LEFTOVERS, "index": UNCOMPARED_INDEXES}
    context.configure(
        connection=connection,
        target_metadata=Base.metadata,
        render_as_batch=True,
        include_name=lambda name, kind, _: name not in left_out.get(kind, ()),
    )
    context.run_migrations()


def run_offline(context: EnvironmentContext, backend: Backend) -> None:
    """Print the SQL of the migrations."""
    context.configure(
        dialect_name=backend.dialect, target_metadata=Base.metadata, literal_binds=True,
        render_as_batch=True, transactional_ddl=True,
    )  # fmt: skip
    with context.begin_transaction():
        context.run_migrations()
