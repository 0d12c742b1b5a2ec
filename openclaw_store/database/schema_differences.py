"""The differences between the schema of a database and the models, for `verify` and `doctor`."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

from sqlalchemy import Connection, text

from openclaw_store.backends import qualified, schema_of
from openclaw_store.database import legacy_import, migrations, schema_check, server_schema
from openclaw_store.database.difference import Difference
from openclaw_store.database.store_write import FUNCTION
from openclaw_store.database.tables import Base
from openclaw_store.errors import SchemaMismatchError, shown


def differences(connection: Connection) -> list[Difference]:
    """Return all differences between a schema and the models.

    The list is empty for an older schema, and for tables that this library did not make:
    `require` refuses them.

    Raises:
        SchemaMismatchError: If the catalogue of a file is no list of ordinary objects.
    """
    revision, tables = migrations.stored(connection), migrations.names_of_tables(connection)
    if revision != migrations.HEAD and (
        revision is not None or not Base.metadata.tables.keys() <= tables
    ):
        return []
    schema = schema_of(connection)
    if schema is None:
        compared = schema_check.compare(connection, schema_check.head(), legacy_import.OPTIONAL)
    else:
        compared = server_schema.compare(connection, schema)
    found = list(compared)
    if revision is None:
        table = qualified(schema, schema_check.VERSION_TABLE)
        has_table = schema_check.VERSION_TABLE in tables
        remedy = [] if has_table else [schema_check.CREATE_VERSION.format(table)]
        remedy.append(f"INSERT INTO {table} VALUES ('{migrations.HEAD}')")
        problem = f"the table {table} is {'empty' if has_table else 'missing'}"
        found.append(Difference(problem, remedy, is_safe=not found))
    if not any(one.is_blocking for one in found):
        found += _missing_counters(connection, schema)
        found += _differences_of_functions(connection) if schema else ()
    return found


def _missing_counters(connection: Connection, schema: str | None) -> Iterator[Difference]:
    """Yield the missing row of counters; its values follow from the other tables."""
    name = partial(qualified, schema)
    if connection.scalar(text(f"SELECT count(*) FROM {name('counters')}")):
        return
    versions = " UNION ALL ".join(f"SELECT version FROM {name(one)}" for one in ("tasks", "nodes"))
    insert = (
        f"INSERT INTO {name('counters')} (id, beat, compacted) SELECT 1, "
        f"coalesce((SELECT max(beat) FROM {name('nodes')}), 0), "
        f"coalesce((SELECT min(revision) - 1 FROM {name('changes')}), "
        f"(SELECT max(version) FROM ({versions}) AS one), 0)"
    )
    problem = "the row of counters is missing, which follows from the newest change"
    yield Difference(problem, [insert], is_safe=True, invariant="counters")


def _differences_of_functions(connection: Connection) -> Iterator[Difference]:
    """Yield the differences on a server that are not of tables: owners and functions."""
    again = "run `openclaw-store db upgrade`"
    try:
        if not migrations.require_unchanged(connection, migrations.HEAD):
            yield Difference(f"it lacks the function {FUNCTION}", otherwise=again, invariant="file")
    except SchemaMismatchError as error:
        yield Difference(str(error), otherwise="do not open it, unless you know the cause")
        return
    drop = "drop it, if you know where it comes from: it is never called, but GRANT fails"
    for other in migrations.overloads(connection):
        problem = f"there is another function {shown(other)}"
        yield Difference(problem, otherwise=drop, is_blocking=False, invariant="file")
