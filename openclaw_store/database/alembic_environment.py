"""What `alembic/env.py` runs: the migrations, in a transaction or printed as SQL."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from sqlalchemy import Connection, MetaData

from openclaw_store.backends import Backend, schema_of
from openclaw_store.database.migrations import HEAD
from openclaw_store.database.tables import UNCOMPARED_INDEXES, Base

if TYPE_CHECKING:
    from alembic.runtime.environment import EnvironmentContext


def is_to_head(context: EnvironmentContext) -> bool:
    """Return true if Alembic's command upgrades to the schema of this version."""
    try:
        return context.get_revision_argument() == HEAD
    except KeyError:  # `current` and `check` have no such argument, and change nothing
        return False


def run(context: EnvironmentContext, connection: Connection) -> None:
    """Run the migrations of Alembic's command in the transaction of the connection."""
    schema = schema_of(connection)

    def is_ours(name: str | None, kind: str, _: object) -> bool:
        if kind == "schema":
            return name == schema
        return name in Base.metadata.tables if kind == "table" else name not in UNCOMPARED_INDEXES

    context.configure(
        connection=connection, include_schemas=True, include_name=is_ours,
        **_options(schema),
    )  # fmt: skip
    context.run_migrations()


def _options(schema: str | None) -> dict[str, Any]:
    """Return the options of Alembic; the migrations use the schema of its version table."""
    tables = Base.metadata
    if schema is not None:
        tables = MetaData(naming_convention=Base.metadata.naming_convention)
        for table in Base.metadata.sorted_tables:
            table.to_metadata(tables, schema=schema)
    return {
        "target_metadata": tables, "version_table_schema": schema, "render_as_batch": True
    }  # fmt: skip


def run_offline(context: EnvironmentContext, backend: Backend) -> None:
    """Print the SQL of the migrations."""
    context.configure(
        dialect_name=backend.dialect, literal_binds=True, transactional_ddl=True,
        **_options(backend.schema),
    )  # fmt: skip
    with context.begin_transaction():
        if backend.cluster and backend.schema:
            context.execute(f"CREATE SCHEMA IF NOT EXISTS {backend.schema}")
        context.run_migrations()
