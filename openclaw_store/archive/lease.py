"""The lease by which one process at a time moves rows to or from archives."""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import timedelta

from sqlalchemy import delete, insert, select, update

from openclaw_store.archive.runs import logger
from openclaw_store.backends import shield_until_done
from openclaw_store.database import Database, LeaseRow
from openclaw_store.errors import StoreError, UnavailableError

LEASE = "retention"

LEASE_SECONDS = 60.0
"""Seconds after which another process takes over from a stopped one."""

_RENEWALS = 4
"""Renewals of a lease in its time."""

_abandoned: set[str] = set()
"""Leases of this process that the database did not let it release."""


@asynccontextmanager
async def leased(database: Database, *, patience: float) -> AsyncIterator[None]:
    """Hold the lease for moving rows to and from archives.

    Args:
        patience: Seconds to wait for another process.

    Raises:
        UnavailableError: If another process holds it for longer.
    """
    holder, waited = secrets.token_hex(16), 0.0
    while not await _take(database, holder):
        if waited >= patience:
            raise UnavailableError(
                "another process moves tasks to or from an archive just now: try again later"
            )
        waited += 0.1
        await asyncio.sleep(0.1)

    async def renew() -> None:
        while True:
            await asyncio.sleep(LEASE_SECONDS / _RENEWALS)
            try:
                await _take(database, holder)
            except Exception:  # the run fails by itself if the lease is lost meanwhile
                logger.exception("the lease of the archive was not renewed; it is tried again")

    renewal = asyncio.ensure_future(renew())
    try:
        yield
    finally:
        renewal.cancel()
        await shield_until_done(_release(database, holder))


async def _release(database: Database, holder: str) -> None:
    try:
        async with database.transaction() as tx:
            await tx.execute(delete(LeaseRow).where(LeaseRow.holder == holder))
    except StoreError as error:
        _abandoned.add(holder)
        logger.warning("the lease of the archive ends by itself, in %g s: %s", LEASE_SECONDS, error)


async def _take(database: Database, holder: str) -> bool:
    """Take or renew the lease; return false if another process has it."""
    now, horizon = database.clock(), timedelta(seconds=LEASE_SECONDS)
    values = {"holder": holder, "expires_at": now + horizon}
    async with database.transaction() as tx:
        query = select(LeaseRow.holder, LeaseRow.expires_at).where(LeaseRow.name == LEASE)
        found = (await tx.execute(query)).first()
        if found is None:
            await tx.execute(insert(LeaseRow).values(name=LEASE, **values))
            return True
        # One further in the future than any lease lasts is from a clock that was ahead.
        is_held = now < found.expires_at <= now + horizon
        if is_held and found.holder not in {holder, *_abandoned}:
            return False
        await tx.execute(update(LeaseRow).where(LeaseRow.name == LEASE).values(**values))
    return True
