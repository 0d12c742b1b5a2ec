"""End the two-phase transactions that dead processes have left prepared."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import orjson
from sqlalchemy import select
from sqlalchemy.ext.asyncio import AsyncSession

from openclaw_store.clusters.prepared import Prepared, prepared_in
from openclaw_store.database import (
    Database,
    DecisionRow,
    WriteTransaction,
    cluster_id_of,
    end_prepared,
)
from openclaw_store.errors import InvalidDataError, StoreError

PATIENCE_SECONDS = 5.0
"""Age at which a prepared transaction counts as left behind."""

_DECISIONS = DecisionRow.metadata.tables["decisions"]


@dataclass
class Resolved:
    """The result of `resolve`; true if no prepared transaction is left."""

    committed: int = 0
    """Number of parts of transactions that were committed."""
    rolled_back: int = 0
    """Number of parts of transactions that were rolled back."""
    left: dict[str, str] = field(default_factory=dict)
    """The reason for each prepared transaction that is left, by its name on the server."""

    def __bool__(self) -> bool:
        return not self.left


async def resolve(*databases: Database, older_than: float = PATIENCE_SECONDS) -> Resolved:
    """End the prepared transactions of these clusters, as their decisions say.

    Until then, each of them holds the write lock of its cluster. Give all databases that took part.

    Args:
        older_than: Seconds for which a transaction is left to its own process. A younger one is
            safe too: this waits for the process.

    Raises:
        InvalidDataError: If two of them are one cluster, or one and its copy.
    """
    by_number: dict[int, Database] = {}
    for given in databases:
        other = by_number.setdefault(await cluster_id_of(given), given)
        if other is not given:
            raise InvalidDataError(
                "databases",
                f"has {other.db_path} and {given.db_path}, of which one is a copy that may lack a "
                "decision: give the one that took part",
            )
    done = Resolved()
    for number, database in by_number.items():
        for one in await prepared_in(database, number):
            if one.age_seconds >= older_than:
                await _end(one, database, by_number, done)
    await _forget_decisions(by_number)
    return done


async def _end(
    one: Prepared, database: Database, by_number: Mapping[int, Database], done: Resolved
) -> None:
    """End a prepared transaction, or note the reason that prevents it."""
    decider = by_number.get(one.decider)
    if not one.is_own:
        done.left[one.gid] = f"the role {one.owner} has prepared it: resolve it as {one.owner}"
        return
    if decider is None:
        done.left[one.gid] = f"cluster number {one.decider:x} has its decision: give it too"
        return
    try:
        is_committed = await is_decided(decider, one.decision)
        is_ended = await end_prepared(database, one.gid, commit=is_committed)
    except StoreError as error:
        done.left[one.gid] = str(error)
        return
    if is_ended:  # else its own process has
        done.committed += is_committed
        done.rolled_back += not is_committed


async def is_decided(decider: Database, decision: str) -> bool:
    """Return true if a transaction has committed, false if it never will.

    Its process holds the write lock of the decider from before it prepares until it has decided. So
    with the lock, a missing decision means that the process has given up.
    """
    query = select(DecisionRow.decision).where(DecisionRow.decision == decision)

    async def read(session: AsyncSession) -> bool:
        return await session.scalar(query) is not None

    if await decider.read(read):
        return True
    async with decider.transaction() as tx:
        return await read(tx)


async def _forget_decisions(by_number: Mapping[int, Database]) -> None:
    """Remove the decisions that no prepared transaction needs any more."""
    query = select(DecisionRow.decision, DecisionRow.participants)

    async def read(session: AsyncSession) -> list[tuple[str, list[int]]]:
        return [(one, orjson.loads(numbers)) for one, numbers in await session.execute(query)]

    for decider in by_number.values():
        # The decisions first: none of them is followed by another prepared part.
        decided = [
            (decision, numbers)
            for decision, numbers in await decider.read(read)
            if by_number.keys() >= {*numbers}
        ]
        needed: set[str] = set()
        for number in {number for _, numbers in decided for number in numbers}:
            needed |= {one.decision for one in await prepared_in(by_number[number], number)}
        await forget_decisions(decider, [one for one, _ in decided if one not in needed])


async def forget_decisions(decider: Database, decisions: Iterable[str]) -> None:
    """Remove the decisions of transactions that have committed everywhere."""
    rows = [(decision,) for decision in decisions]
    if rows:
        await decider.write(_delete, rows)


def _delete(
    transaction: WriteTransaction, deletions: Sequence[Sequence[tuple[str]]]
) -> Sequence[None]:
    transaction.require_lock()
    sql = transaction.sql.delete_from(_DECISIONS.c.decision)
    transaction.cursor.write(sql, [row for rows in deletions for row in rows])
    return [None] * len(deletions)
