"""Migrations of the schema, run in one way by Alembic's command line and by the library.

A migration holds a lock from its first look at the version to its commit (SQLite's write lock; on
PostgreSQL, a lock of `alembic_version`). So any number of processes may migrate at once, and a
killed one leaves the schema as it was. A legacy database is imported in the same transaction.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from datetime import tzinfo
from functools import cache, partial
from io import StringIO
from pathlib import Path
from typing import TYPE_CHECKING

from sqlalchemy import Connection, NullPool, create_engine, inspect, text

from openclaw_store.backends import (
    DEFAULT_LOCATION,
    Backend,
    backend_of,
    qualified,
    schema_of,
    unused_name,
)
from openclaw_store.database import (
    legacy_import,
    schema_check,
    sealing,
    server_check,
    write_function,
)
from openclaw_store.database.dialects import statements_for
from openclaw_store.database.store_write import FUNCTION
from openclaw_store.database.tables import Base
from openclaw_store.domain import Clock, utc_now
from openclaw_store.encryption import KeyRing
from openclaw_store.errors import (
    InvalidDataError,
    SchemaMismatchError,
    UnavailableError,
    safe_repr,
    shown,
)

if TYPE_CHECKING:
    from alembic.config import Config

HEAD = "0014"
"""The schema revision of this version of the library."""

COPYING = "copying-"
"""Prefix of the revision while `copy`, of any version, fills the database."""

COPYING_HEAD = f"{COPYING}{HEAD}-"
"""The same prefix for `copy` of this version."""

URL_VARIABLE = "OPENCLAW_STORE_URL"
"""Environment variable with the location of the database, for the command line."""

FILE_VARIABLE = "OPENCLAW_STORE_URL_FILE"
"""Environment variable with the path of a file that contains the location."""

OWN_TABLES = frozenset({*Base.metadata.tables, schema_check.VERSION_TABLE})
"""The tables of the store."""

_PACKAGE = Path(__file__).parent.parent
# The wheel has the scripts inside the package, a checkout beside it.
SCRIPTS = next(
    path for path in (_PACKAGE / "_alembic", _PACKAGE.parent / "alembic") if path.exists()
)

_LONGEST_REVISION = 32

_LOCK = threading.RLock()  # Alembic's state is global

Check = Callable[[Connection], object]
"""Raises an error if a database must not be opened."""


def _accept_all(connection: Connection) -> None:
    """Accept any content."""


def named_by(location: str | Path | None, cluster: str | None = None) -> Backend:
    """Return the backend of the command line's database, at `location_of(location)`."""
    return backend_of(location_of(location), cluster=cluster)


def location_of(location: str | Path | None) -> str | Path:
    """Return the path or URL: the given one, that of the environment, or `./data/cluster.db`."""
    location = location or os.environ.get(URL_VARIABLE)
    file = os.environ.get(FILE_VARIABLE)
    if location or not file:
        return location or DEFAULT_LOCATION
    try:
        return Path(file).read_text(encoding="utf-8").strip()
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or "it is no text"
        raise UnavailableError(f"{FILE_VARIABLE}: {file} cannot be read: {reason}") from None


def is_current(backend: Backend, check: Check = _accept_all) -> bool:
    """Return true if the schema is current, false if it is older; refuse any other.

    Args:
        check: Refuses the content of a database with the current schema.
    """

    def work(connection: Connection) -> bool:
        is_current = _is_current(backend, connection)
        if is_current:
            check(connection)
        return is_current

    return backend.inspect(work)


def _is_current(backend: Backend, connection: Connection) -> bool:
    if backend.dialect == "sqlite" and not connection.connection.in_transaction:
        connection.connection.cursor().execute("BEGIN")  # else others migrate between two reads
    schema = schema_of(connection)
    read = server_check.Tables(connection, schema) if schema is not None else None
    revision = stored(connection, read)
    tables = names_of_tables(connection) if read is None else read.names
    is_foreign = revision is None and bool(tables & {"tasks", "nodes"})
    is_legacy = legacy_import.is_legacy(connection)
    if is_foreign and Base.metadata.tables.keys() <= tables:
        raise SchemaMismatchError(
            f"the table {schema_check.VERSION_TABLE} of {backend.location} is missing, or empty: "
            'run "openclaw-store verify --repair"'
        )
    if is_foreign and not is_legacy:
        raise SchemaMismatchError(
            f"{backend.location} has tables that this library did not make: give another path"
        )
    refuse_newer(revision, backend.location)
    is_complete = require_unchanged(connection, revision, is_legacy=is_legacy, tables=read)
    return is_complete and revision == HEAD


def accept(backend: Backend, connection: Connection, *, is_copy_target: bool = False) -> None:
    """Refuse a database that this version must not open or upgrade."""
    if is_copy_target and (stored(connection) or "").startswith(COPYING_HEAD):
        require_unchanged(connection, HEAD)
        return
    _is_current(backend, connection)
    flaw = legacy_import.is_legacy(connection) and legacy_import.find_damage(connection)
    if flaw:
        raise UnavailableError(f"{backend.location} is damaged ({flaw}): restore a backup")


def require_store(connection: Connection, location: str) -> None:
    """Refuse a file without the tables of this or an earlier version."""
    revision = stored(connection)
    if revision is None:
        raise SchemaMismatchError(f"{location} is no copy of a store: give the path of a backup")
    refuse_newer(revision, location)
    require_unchanged(connection, revision)


def require_unchanged(
    connection: Connection,
    revision: str | None,
    *,
    is_legacy: bool = False,
    tables: server_check.Tables | None = None,
) -> bool:
    """Refuse a file that differs from its revision, or tables that run the code of other roles.

    Args:
        tables: The tables on a server, if they were read before in this transaction.

    Returns:
        False if the database lacks the function that writes, as after a restore.

    Raises:
        SchemaMismatchError: With the first object that differs.
    """
    schema = schema_of(connection)
    if schema is not None:
        return server_check.require(connection, schema, tables)
    schema_check.require(
        connection,
        _definitions(revision),
        legacy_import.OPTIONAL,
        legacy_import.REPLACED if is_legacy else frozenset(),
    )
    return True


@cache
def _definitions(revision: str | None) -> schema_check.Schema:
    """Return the tables and indexes of a revision in SQLite, by running older migrations."""
    if revision is None:
        return {}
    if revision == HEAD:
        return schema_check.head()
    from alembic.operations import Operations
    from alembic.runtime.migration import MigrationContext
    from alembic.script import ScriptDirectory

    # Not by Alembic's commands: its own command line may be running one.
    with _LOCK, create_engine("sqlite://", poolclass=NullPool).connect() as connection:
        steps = [*ScriptDirectory.from_config(_config(connection)).walk_revisions()][::-1]
        known = [step.revision for step in steps]
        if revision not in known:
            raise SchemaMismatchError(
                f"no migration makes the schema {revision!r}: restore a backup, or give another "
                "path"
            )
        with Operations.context(MigrationContext.configure(connection)):
            for step in steps[: known.index(revision) + 1]:
                step.module.upgrade()
        return schema_check.definitions(connection)


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
            f"{HEAD}: install the newer version of the library that has upgraded it"
        )


def is_half_copied(backend: Backend) -> bool:
    """Return true if `copy` of this version has begun to fill the database."""
    return backend.inspect(lambda connection: (stored(connection) or "").startswith(COPYING_HEAD))


def stored(connection: Connection, tables: server_check.Tables | None = None) -> str | None:
    """Return the revision of the database; `None` if it has none.

    Args:
        tables: The tables on a server, if they were read before in this transaction.
    """
    schema = schema_of(connection)
    if tables is not None:
        has_version = tables.has_version()
    elif schema is None:
        has_version = schema_check.has_version(connection)
    else:
        has_version = server_check.has_version(connection, schema)
    if not has_version:
        return None
    table = qualified(schema_of(connection), schema_check.VERSION_TABLE)
    revision = connection.scalar(text(f"SELECT version_num FROM {table}"))
    if revision is None or (isinstance(revision, str) and len(revision) <= _LONGEST_REVISION):
        return revision
    raise schema_check.refusal(connection, f"its revision is {safe_repr(revision)}")


def names_of_tables(connection: Connection) -> set[str]:
    """Return the names of the tables in the schema of the store."""
    return set(inspect(connection).get_table_names(schema_of(connection)))


def require(backend: Backend, check: Check = _accept_all) -> None:
    """Refuse a database with another schema; the error names the command to run.

    `check` refuses its content.
    """
    if not is_current(backend, check):
        is_legacy = backend.inspect(legacy_import.is_legacy)
        is_complete = revision_of(backend) != HEAD
        is_so = "is the original one" if is_legacy else f"is older than {HEAD}"
        raise SchemaMismatchError(
            f"the schema of {backend.location} "
            f"{is_so if is_complete else f'lacks the function {FUNCTION}'}: call "
            'initialize(migrate=True), or run "openclaw-store db upgrade" or, in a checkout, '
            f'"alembic -x url={backend.address}{_named(backend)} upgrade head"'
        )


def _named(backend: Backend) -> str:
    """Return the option of Alembic's command that names the cluster."""
    return f" -x cluster={backend.cluster}" if backend.cluster else ""


def revision_of(backend: Backend) -> str | None:
    """Return the revision of a backend's database; `None` if it has none; blocks the thread."""
    return backend.inspect(stored)


def upgrade(
    backend: Backend,
    legacy_timezone: tzinfo | None = None,
    clock: Clock = utc_now,
    keys: KeyRing | None = None,
    check: Check = _accept_all,
) -> legacy_import.LegacyImport | None:
    """Upgrade the database to the schema of this version; blocks the thread.

    Returns the result of the import of a legacy database. Arguments and errors are those of
    `migrate`.
    """
    if backend.exists() and is_current(backend, check):
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
                keys,
                check,
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
    """Refuse a database if its tables differ from the declarative models."""
    require(backend)
    if others := backend.inspect(overloads):
        raise SchemaMismatchError(
            f"{backend.location} has another function {shown(others[0])}: drop it, if you know "
            "where it comes from"
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


def overloads(connection: Connection) -> list[str]:
    """Return the functions that have the name of the store's, and other arguments."""
    schema = schema_of(connection)
    return server_check.overloads(connection, schema) if schema is not None else []


def replace_function(connection: Connection) -> None:
    """Define the function anew, for tables that were moved to the schema of the connection."""
    connection.exec_driver_sql(f"DROP FUNCTION {qualified(schema_of(connection), FUNCTION)}")
    write_function.require(connection, _config(connection))


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
    keys: KeyRing | None = None,
    check: Check = _accept_all,
    *,
    to_head: bool = False,
) -> legacy_import.LegacyImport | None:
    """Run `work` with a connection that holds the lock, and commit; blocks the thread.

    Returns the result of the import of a legacy database.

    Args:
        work: Calls `run`.
        legacy_timezone: Zone of the times of a legacy database; `None` for the local one.
        keys: An unlocked key ring, which seals the values of a legacy database.
        check: Refuses the content of the migrated database.
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
            if to_head:
                write_function.require(connection, _config(connection))
            check(connection)
            return
        if copy is None:
            raise UnavailableError(
                f"{backend.location}: another program makes its tables just now: end it, then try "
                "again"
            )
        legacy_import.rename_tables(connection)
        work(connection)
        sql = statements_for(backend)
        if keys is not None:
            sql = sql.protected_by(sealing.add_keys(connection, keys, clock))
        cursor = backend.cursor(connection)
        imported = legacy_import.import_rows(
            connection, cursor, sql, legacy_timezone, clock(), copy
        )

    backend.prepare(partial(accept, backend))
    backend.migrate(checked, copy_to)
    if imported is not None:
        legacy_import.report(imported, backend.location, is_sealed=keys is not None)
    return imported
