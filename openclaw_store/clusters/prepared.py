"""Prepared transactions: their names, and the transactions that no process has ended."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

from sqlalchemy import column, extract, func, select, table
from sqlalchemy.ext.asyncio import AsyncSession

from openclaw_store.database import Database

_PREFIX = "openclaw_store_"
# Strict: other roles may choose names that look like these.
_NAME = re.compile(_PREFIX + "([0-9a-f]{1,16})_([0-9a-f]{32})_([0-9a-f]{1,16})")

_COLUMNS: Any = map(column, ("gid", "owner", "prepared", "database"))
_XACTS = table("pg_prepared_xacts", *_COLUMNS, schema="pg_catalog")


@dataclass(frozen=True, slots=True)
class Prepared:
    """The part of a transaction that one database has prepared."""

    decider: int
    """The number of the cluster that decides on the transaction."""
    decision: str
    participant: int
    """The number of the cluster that has prepared it."""
    owner: str | None = None
    """The role that has prepared it, and that alone may end it."""
    is_own: bool = True
    """True if that is the role of this process."""
    age_seconds: float = 0.0

    @property
    def gid(self) -> str:
        """Its name on the server."""
        return f"{_PREFIX}{self.decider:x}_{self.decision}_{self.participant:x}"


async def prepared_in(database: Database, number: int) -> list[Prepared]:
    """Return the transactions that a cluster with this number has prepared, oldest first."""
    if database.dialect == "sqlite":
        return []
    row: Any = _XACTS.c
    age = extract("epoch", func.clock_timestamp() - row.prepared)
    query = (
        select(row.gid, row.owner, row.owner == func.current_user(), age)
        .where(row.database == func.current_database())
        .order_by(row.prepared)
    )

    async def read(session: AsyncSession) -> list[Prepared]:
        found = []
        for gid, owner, is_own, seconds in await session.execute(query):
            name = _NAME.fullmatch(gid)
            if name and int(name[3], 16) == number:
                decider = int(name[1], 16)
                found.append(Prepared(decider, name[2], number, owner, is_own, float(seconds)))
        return found

    return await database.read(read)
