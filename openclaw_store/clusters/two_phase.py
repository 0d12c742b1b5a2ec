"""Two-phase commit: one transaction over databases of several servers.

All databases but one prepare their parts. The last one, the decider, commits in one phase, and its
commit contains a row of `decisions`: that is the commit of the whole. Then the others commit their
prepared parts. The write lock of the decider is held from the beginning until the decision, so
`resolver.is_decided` can tell that there will be none.

PostgreSQL does not prepare a transaction that notifies, so the notifications of prepared parts
follow their commits.
"""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import Sequence
from typing import NamedTuple, Self

import orjson
from sqlalchemy import func, insert, literal, select
from sqlalchemy.ext.asyncio import AsyncSession

from openclaw_store.clusters.prepared import Prepared, prepared_in
from openclaw_store.clusters.resolver import PATIENCE_SECONDS, forget_decisions, resolve
from openclaw_store.database import CounterRow, Database, DecisionRow, Unit, end_prepared
from openclaw_store.errors import (
    InvalidDataError,
    OutcomeUnknownError,
    StoreError,
    UnavailableError,
    logger_of,
)

logger = logger_of("clusters")


class Participant(NamedTuple):
    """A database that takes part."""

    database: Database
    number: int
    """The number of its cluster."""
    slots: int
    """The transactions that its server can keep prepared."""


class TwoPhaseCommit:
    """The commit of one transaction.

    Args:
        participants: In the order of their locks.
        decider: The one that commits in one phase.
    """

    def __init__(self, participants: Sequence[Participant], decider: Participant) -> None:
        self.decision = secrets.token_hex(16)
        self._decider = decider
        self.units = [Unit([one.database], notifies=one is decider) for one in participants]
        """The parts, in the order of their locks."""
        self._parts = {
            unit: Prepared(decider.number, self.decision, one.number)
            for unit, one in zip(self.units, participants, strict=True)
        }
        [self._deciding] = [unit for unit in self.units if unit.databases[0] is decider.database]
        del self._parts[self._deciding]

    @classmethod
    async def of(cls, databases: Sequence[Database]) -> Self:
        """Return the commit of a new transaction; first end transactions of dead processes.

        Raises:
            InvalidDataError: If the databases cannot take part together.
            UnavailableError: If a server does not allow prepared transactions.
        """
        participants = [await _participant(one) for one in databases]
        if len({one.number for one in participants}) < len(participants):
            raise InvalidDataError(
                "databases", "has one cluster twice, or one and its copy: give each of them once"
            )
        # SQLite and servers without slots cannot prepare.
        unable = [one for one in participants if not one.slots]
        if len([one for one in unable if one.database.dialect == "sqlite"]) > 1:
            raise InvalidDataError(
                "databases", "has two SQLite files, which cannot prepare: use transfer()"
            )
        if len(unable) > 1:
            names = " and ".join(
                one.database.db_path for one in unable if one.database.dialect == "postgresql"
            )
            raise UnavailableError(
                f"{names}: max_prepared_transactions is 0: set it to the number of processes that "
                "write in two phases, or more, and start the server again"
            )
        for one in participants:
            found = await prepared_in(one.database, one.number)
            if any(left.age_seconds >= PATIENCE_SECONDS for left in found):
                await resolve(*databases)
                break
        # One order for all processes, so that two transactions never wait for each other.
        participants.sort(key=lambda one: (one.database.schema or "", one.number))
        return cls(participants, [*participants[-1:], *unable][-1])

    async def run(self) -> None:
        """Write, commit and publish; called with all locks.

        Raises:
            OutcomeUnknownError: If a server was lost after it was asked to commit.
        """
        for unit in self.units:
            await unit.write()
        try:
            # All parts before the decision: once it is committed, no part may be refused.
            for unit, part in self._parts.items():
                await unit.send(f"PREPARE TRANSACTION '{part.gid}'")
            await self._decide()
        except OutcomeUnknownError:
            raise  # `settle` asks the decider
        except BaseException:
            await self._roll_back()
            raise
        self._deciding.publish()
        lost = await asyncio.gather(*[self._commit(unit) for unit in self._parts])
        await asyncio.sleep(0)  # the caches of this loop apply the events before the caller runs
        if any(lost):
            names = ", ".join(filter(None, lost))
            raise OutcomeUnknownError(
                f"the transaction has committed, but {names} was lost before its part: it commits "
                'there too when "openclaw-store resolve" runs'
            )

    async def _decide(self) -> None:
        numbers = [one.participant for one in self._parts.values()]
        values = {
            "decision": self.decision,
            "participants": orjson.dumps(numbers).decode(),
            "decided_at": self._decider.database.clock(),
        }
        await self._deciding.sessions[0].execute(insert(DecisionRow).values(values))
        await self._deciding.commit()

    async def _roll_back(self) -> None:
        """Roll the prepared parts back; one that cannot be reached is left to `resolve`."""
        for unit, part in self._parts.items():
            try:
                await end_prepared(unit.databases[0], part.gid, commit=False)
            except StoreError as error:
                logger.warning("the prepared transaction %s was left: %s", part.gid, error)

    async def _commit(self, unit: Unit) -> str | None:
        """Commit a prepared part; return the name of its database if that was lost."""
        database, gid = unit.databases[0], self._parts[unit].gid
        try:
            await end_prepared(database, gid, commit=True)
        except StoreError as error:
            logger.warning("the prepared transaction %s was left: %s", gid, error)
            return database.db_path
        unit.publish()
        return None

    async def settle(self, databases: Sequence[Database], *, is_known: bool) -> None:
        """Do the rest when the locks are free: it is not needed for the result of the caller.

        Args:
            is_known: All parts have committed.
        """
        try:
            if is_known:
                await forget_decisions(self._decider.database, [self.decision])
            else:
                await resolve(*databases, older_than=0)
        except StoreError as error:
            logger.warning("the transaction %s was left to resolve(): %s", self.decision, error)


async def _participant(database: Database) -> Participant:
    is_file = database.dialect == "sqlite"
    slots = literal(0) if is_file else func.current_setting("max_prepared_transactions")
    query = select(CounterRow.cluster_id, slots)

    async def read(session: AsyncSession) -> Participant:
        number, count = (await session.execute(query)).one()
        return Participant(database, number, int(count))

    return await database.read(read)
