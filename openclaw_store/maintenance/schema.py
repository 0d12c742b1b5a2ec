"""The schema as `verify` and `doctor` see it: all differences, each with its remedy."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from functools import partial

from sqlalchemy import Connection

from openclaw_store.database import Database, Difference, differences
from openclaw_store.errors import SchemaMismatchError, StoreError


def find_differences(connection: Connection) -> list[Difference]:
    """Return all differences; a catalogue that cannot be read is the only one."""
    try:
        return differences(connection)
    except SchemaMismatchError as error:
        return [Difference(str(error), otherwise="do not open it, unless you know the cause")]


async def repair_schema(
    database: Database, found: Sequence[Difference]
) -> tuple[list[Difference], list[Difference]]:
    """Remove the differences that are safe to remove, each in a transaction of its own.

    The database may be closed. Rows that break a constraint prevent that it is added.

    Returns:
        The differences that are gone, and the ones that are left.
    """
    tried = [one for one in found if one.is_safe]
    for one in tried:
        with suppress(StoreError):  # it is found again below, and so it is not lost
            await database.alter(partial(_run, one.remedy))
    left = await database.inspect(find_differences)
    texts = {one.text for one in left}
    return [one for one in tried if one.text not in texts], left


def _run(statements: Sequence[str], connection: Connection) -> None:
    for statement in statements:
        connection.exec_driver_sql(statement)
