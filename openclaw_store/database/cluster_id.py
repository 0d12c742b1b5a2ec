"""The number that identifies a cluster, independent of its name."""

from __future__ import annotations

from typing import TYPE_CHECKING

from sqlalchemy import select
from sqlalchemy.ext.asyncio import AsyncSession

from openclaw_store.database.tables import CounterRow
from openclaw_store.errors import SchemaMismatchError

if TYPE_CHECKING:
    from openclaw_store.database.database import Database


async def cluster_id_of(database: Database) -> int:
    """Return the random number of a cluster, which stays if the cluster is renamed.

    Raises:
        SchemaMismatchError: If the database has lost it.
    """

    async def read(session: AsyncSession) -> int | None:
        return await session.scalar(select(CounterRow.cluster_id))

    number = await database.read(read)
    if not number:
        raise SchemaMismatchError(f"{database.db_path} has lost its counters: restore a backup")
    return number
