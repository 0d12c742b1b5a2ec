"""The function that writes on PostgreSQL: it is made again after a restore of the tables alone."""

from __future__ import annotations

from typing import TYPE_CHECKING

from sqlalchemy import Connection

from openclaw_store.backends import citus, schema_of
from openclaw_store.database import server_check
from openclaw_store.database.store_write import signature

if TYPE_CHECKING:
    from alembic.config import Config


def require(connection: Connection, config: Config) -> None:
    """Make the function if a server lacks it, as `pg_dump` archives the tables alone.

    Where Citus distributes the tables, it gets the settings that Citus needs.
    """
    schema = schema_of(connection)
    if schema is None:
        return
    if not server_check.require(connection, schema):
        from alembic.script import ScriptDirectory

        scripts = ScriptDirectory.from_config(config)
        connection.exec_driver_sql(scripts.get_revision("0014").module.function(schema, scripts))
    if connection.get_execution_options().get("is_citus"):
        for name, value in citus.SETTINGS.items():
            connection.exec_driver_sql(f"ALTER FUNCTION {signature(schema)} SET {name} = {value}")
