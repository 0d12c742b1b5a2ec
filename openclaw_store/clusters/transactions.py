"""Transactions over several clusters: all of them commit, or none."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from functools import partial

from sqlalchemy.ext.asyncio import AsyncSession

from openclaw_store.backends import shield_until_done
from openclaw_store.clusters.two_phase import TwoPhaseCommit
from openclaw_store.database import Database, Unit, commit_unit, is_beside, open_block
from openclaw_store.domain import check_limit_seconds
from openclaw_store.errors import InvalidDataError, OutcomeUnknownError


@asynccontextmanager
async def transaction(
    *databases: Database, timeout: float | None = None, two_phase: bool = False
) -> AsyncIterator[tuple[AsyncSession, ...]]:
    """Open one transaction over several clusters: commit all at the end of the block, or none.

    It yields a session for each database, in their order; use them as that of
    `Database.transaction`. The block holds the write locks of all: keep it short.

    Args:
        databases: Clusters of one PostgreSQL server; with `two_phase` databases of any servers,
            and at most one SQLite file.
        timeout: Seconds that the block may take; `None` for `transaction_timeout` of the first.
        two_phase: Commit on several servers by a two-phase commit; `resolve` ends one that its
            process did not live to end.

    Raises:
        DeadlineError: If the block took longer, or a write lock was not free in time.
        InvalidDataError: If the databases cannot commit together; with the way that remains.
        OutcomeUnknownError: If a server was lost while committing.
        UnavailableError: If a database cannot be written.
    """
    for one in databases:
        if not isinstance(one, Database):
            name = type(one).__name__
            raise InvalidDataError("databases", f"must be Database objects, not {name}: pass .db")
    if not databases:
        raise InvalidDataError("databases", "must be at least one")
    limit = databases[0].transaction_timeout if timeout is None else timeout
    seconds = check_limit_seconds("timeout", limit)
    if two_phase:
        commit = await TwoPhaseCommit.of(databases)
        units, finish = commit.units, commit.run
    else:
        await _require_one_server(databases)
        # One order for all processes, so that two transactions never wait for each other.
        unit = Unit(sorted(databases, key=lambda one: one.schema or ""))
        units, finish = [unit], partial(commit_unit, unit)
    try:
        async with open_block(units, seconds, finish) as sessions:
            of = {one.info["database"]: one for one in sessions}
            yield tuple(of[one] for one in databases)
    except OutcomeUnknownError:
        if two_phase:
            await shield_until_done(commit.settle(databases, is_known=False))
        raise
    if two_phase:
        await commit.settle(databases, is_known=True)


async def _require_one_server(databases: tuple[Database, ...]) -> None:
    """Refuse databases that have no engine transaction in common, and one that is given twice."""
    first, *others = databases
    for other in others:
        if not await is_beside(first, other):
            raise InvalidDataError(
                "databases",
                f"{first.db_path} and {other.db_path} are not on one PostgreSQL server: use "
                "two_phase=True, which takes one SQLite file at most, or transfer()",
            )
    if len({one.schema for one in databases}) < len(databases):
        raise InvalidDataError("databases", "has one cluster twice: give each of them once")
