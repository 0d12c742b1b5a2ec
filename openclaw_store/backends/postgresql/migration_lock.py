"""The beginning of a migration: the schema of a cluster, and the lock against other ones."""

from __future__ import annotations

from collections.abc import Callable

from sqlalchemy import text
from sqlalchemy.exc import DBAPIError
from sqlalchemy.ext.asyncio import AsyncConnection

from openclaw_store.backends.postgresql import citus

Code = Callable[[BaseException], str | None]
"""Returns the SQLSTATE of an error."""

_DUPLICATE, _SCHEMA_EXISTS, _TABLE_EXISTS = "23505", "42P06", "42P07"


async def make_schema(
    connection: AsyncConnection, schema: str, code: Code, *, is_citus: bool
) -> None:
    """Make the schema of a cluster if necessary, which takes a privilege."""
    exists = text("SELECT to_regnamespace(:name)")
    if await connection.scalar(exists, {"name": schema}) is not None:
        return
    if is_citus:
        await connection.exec_driver_sql(citus.DISTRIBUTE)
    try:
        async with connection.begin_nested():
            await connection.exec_driver_sql(f"CREATE SCHEMA {schema}")
    except DBAPIError as error:  # another migration has made it, and committed
        if code(error) not in (_DUPLICATE, _SCHEMA_EXISTS):
            raise


async def lock_revision(connection: AsyncConnection, schema: str, code: Code) -> None:
    """Lock the table of the revision, which takes a privilege; make it if necessary.

    Any role can take an advisory lock, and never release it.
    """
    table = f"{schema}.alembic_version"
    if await connection.scalar(text("SELECT to_regclass(:name)"), {"name": table}) is None:
        try:
            async with connection.begin_nested():
                await connection.exec_driver_sql(
                    f"CREATE TABLE {table} (version_num varchar(32) NOT NULL "
                    "CONSTRAINT alembic_version_pkc PRIMARY KEY)"
                )
        except DBAPIError as error:  # another migration has made it, and committed
            if code(error) not in (_DUPLICATE, _TABLE_EXISTS):
                raise
    await connection.exec_driver_sql(f"LOCK TABLE {table} IN SHARE UPDATE EXCLUSIVE MODE")
