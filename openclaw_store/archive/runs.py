"""Runs: each move of rows to or from an archive is an intent in the database, and can be resumed.

A run is `writing` until its files are read back and compared, then `verified`, then `deleting`
rows, and `done` after its manifest is written. A run that ended while `writing` is `undone`: its
files are removed. Each step is a compare-and-set on the state, so a process that lost its lease
cannot continue a run that another process has taken over.
"""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any

import orjson
from sqlalchemy import delete, insert, select, update
from sqlalchemy.ext.asyncio import AsyncSession

from openclaw_store.backends import shield_until_done
from openclaw_store.database import ArchiveRunRow, ArchiveVoidRow, Database, LeaseRow
from openclaw_store.errors import ConflictError, StoreError, UnavailableError, logger_of

logger = logger_of("archive")

LEASE = "retention"

LEASE_SECONDS = 60.0
"""Seconds after which another process takes over from one that stopped."""

_RENEWALS = 4
"""Renewals of a lease in its time."""


@dataclass(frozen=True, slots=True)
class WrittenFile:
    """A file of a run, as its manifest lists it."""

    path: str
    rows: int
    bytes: int
    sha256: str


@dataclass(slots=True)
class ArchiveRun:
    """One run, as the database has it."""

    run: str
    kind: str
    """`tasks`, `changes`, `restore` or `compact`."""
    location: str
    state: str
    files: Sequence[WrittenFile] = ()
    position: int = 0
    """Number of rows handled so far: of tasks in their files, or the last compacted revision."""


async def begin(database: Database, kind: str, location: str, state: str = "writing") -> ArchiveRun:
    """Begin a run."""
    now = database.clock()
    run = ArchiveRun(f"{now:%Y%m%dT%H%M%SZ}-{secrets.token_hex(4)}", kind, location, state)
    values = {"run": run.run, "kind": kind, "location": location, "state": state}
    async with database.transaction() as tx:
        await tx.execute(insert(ArchiveRunRow).values(changed_at=now, **values))
    return run


async def advance(
    database: Database, run: ArchiveRun, state: str, files: Sequence[WrittenFile] | None = None
) -> None:
    """Set the next state of a run, and its files; the end also forgets its void copies.

    Raises:
        ConflictError: If another process has taken the run over.
    """
    values: dict[str, Any] = {"state": state, "changed_at": database.clock()}
    if files is not None:
        values["files"] = orjson.dumps(files).decode()
    async with database.transaction() as tx:
        query = update(ArchiveRunRow).where(
            ArchiveRunRow.run == run.run, ArchiveRunRow.state == run.state
        )
        done: Any = await tx.execute(query.values(**values))
        if done.rowcount != 1:
            raise lost(run)
        if state == "done":
            await tx.execute(delete(ArchiveVoidRow).where(ArchiveVoidRow.run == run.run))
    run.state = state
    run.files = run.files if files is None else files


def lost(run: ArchiveRun) -> ConflictError:
    """Return the error for a run that another process continues."""
    return ConflictError(
        f"another process has taken over the run {run.run} of the archive, as this one was too "
        "slow: it continues there"
    )


async def unfinished(database: Database) -> list[ArchiveRun]:
    """Return the runs to resume or to undo, oldest first."""
    return await _runs(database, ArchiveRunRow.state.not_in(("done", "undone")))


async def undone(database: Database) -> list[ArchiveRun]:
    """Return the runs of which no file may be left."""
    return await _runs(database, ArchiveRunRow.state == "undone")


async def _runs(database: Database, condition: Any) -> list[ArchiveRun]:
    row = ArchiveRunRow
    columns = row.run, row.kind, row.location, row.state, row.files, row.position
    query = select(*columns).where(condition).order_by(row.run)

    async def read(session: AsyncSession) -> list[ArchiveRun]:
        found = []
        for run, kind, location, state, files, position in await session.execute(query):
            written = [WrittenFile(**one) for one in orjson.loads(files or "[]")]
            found.append(ArchiveRun(run, kind, location, state, written, position))
        return found

    return await database.read(read)


async def voids_of(database: Database, run: ArchiveRun) -> list[tuple[str, int]]:
    """Return the void copies that a run has noted, by identifier and version."""
    columns = ArchiveVoidRow.task_id, ArchiveVoidRow.version
    query = select(*columns).where(ArchiveVoidRow.run == run.run).order_by(*columns)

    async def read(session: AsyncSession) -> list[tuple[str, int]]:
        return [(id, version) for id, version in await session.execute(query)]

    return await database.read(read)


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


_abandoned: set[str] = set()
"""Leases of this process that the database did not let it release."""


async def _release(database: Database, holder: str) -> None:
    try:
        async with database.transaction() as tx:
            await tx.execute(delete(LeaseRow).where(LeaseRow.holder == holder))
    except StoreError as error:
        _abandoned.add(holder)
        logger.warning("the lease of the archive ends by itself, in %g s: %s", LEASE_SECONDS, error)


async def _take(database: Database, holder: str) -> bool:
    """Take or renew the lease; return false if another process has it."""
    now: datetime = database.clock()
    horizon = timedelta(seconds=LEASE_SECONDS)
    async with database.transaction() as tx:
        query = select(LeaseRow.holder, LeaseRow.expires_at).where(LeaseRow.name == LEASE)
        found = (await tx.execute(query)).first()
        # One further in the future than any lease lasts is from a clock that was ahead.
        is_held = found is not None and found.holder not in {holder, *_abandoned}
        if found and is_held and now < found.expires_at <= now + horizon:
            return False
        values = {"holder": holder, "expires_at": now + horizon}
        if found:
            await tx.execute(update(LeaseRow).where(LeaseRow.name == LEASE).values(**values))
        else:
            await tx.execute(insert(LeaseRow).values(name=LEASE, **values))
    return True
