"""Runs: each move of rows to or from an archive is an intent in the database, and can be resumed.

A run is `writing` until its files are read back and compared, then `verified`, then `deleting`
rows, and `done` after its manifest is written. A run that ended while `writing` is `undone`: its
files are removed. Each step is a compare-and-set on the state, so a process that lost its lease
cannot continue a run that another process has taken over.
"""

from __future__ import annotations

import secrets
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta
from functools import cache
from typing import Any

import orjson
from sqlalchemy import bindparam, delete, insert, literal_column, or_, select, update
from sqlalchemy.ext.asyncio import AsyncSession

from openclaw_store.backends import Cursor
from openclaw_store.database import (
    ArchiveRunRow,
    ArchiveVoidRow,
    Database,
    Statements,
    statements_for,
)
from openclaw_store.errors import ConflictError, logger_of

logger = logger_of("archive")

_UNDONE = timedelta(days=1)
"""Time after which no process still writes the files of a run that was undone."""


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
    """Number of tasks handled so far, or the last compacted revision."""

    def passed(self, position: int) -> None:
        """Note the position that a committed transaction has set."""
        self.position, self.state = position, "deleting"


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
        # Compare-and-set: no row matches if another process has taken the run over.
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
    """Return the runs that are not done, oldest first.

    Of one that was undone lately no file may stay: its process may have written since.
    """
    row = ArchiveRunRow
    columns = row.run, row.kind, row.location, row.state, row.files, row.position
    is_old = row.changed_at < database.clock() - _UNDONE
    query = select(*columns).where(row.state != "done", or_(row.state != "undone", ~is_old))
    query = query.order_by(row.run)

    async def read(session: AsyncSession) -> list[ArchiveRun]:
        found = []
        for run, kind, location, state, files, position in await session.execute(query):
            written = [WrittenFile(**one) for one in orjson.loads(files or "[]")]
            found.append(ArchiveRun(run, kind, location, state, written, position))
        return found

    return await database.read(read)


async def voids_of(database: Database, run: ArchiveRun) -> list[tuple[str, int]]:
    """Return the void copies that a run has noted, by identifier and version.

    Raises:
        ConflictError: If another process has ended the run, and forgotten its void copies.
    """
    columns = ArchiveVoidRow.task_id, ArchiveVoidRow.version
    query = select(*columns).where(ArchiveVoidRow.run == run.run).order_by(*columns)
    is_here = select(ArchiveRunRow.run).where(
        ArchiveRunRow.run == run.run, ArchiveRunRow.state == run.state
    )

    async def read(session: AsyncSession) -> list[tuple[str, int]]:
        if await session.scalar(is_here) is None:
            raise lost(run)
        return [(id, version) for id, version in await session.execute(query)]

    return await database.read(read)


@cache
def _statements(sql: Statements) -> tuple[str, str]:
    """Return the SQL that moves the position of a run, and that notes void copies."""
    row = ArchiveRunRow
    verified = row.state.in_([literal_column("'verified'"), literal_column("'deleting'")])
    move = (
        update(row)
        .where(row.run == bindparam("run_"), row.position == bindparam("was"), verified)
        .values(position=bindparam("new"), state=literal_column("'deleting'"))
        .returning(row.run)
    )
    return str(sql.compile(move)), sql.insert_into(ArchiveVoidRow.metadata.tables["archive_voids"])


def progress(
    cursor: Cursor, run: ArchiveRun, position: int, voids: Sequence[tuple[str, int]] = ()
) -> None:
    """Set the position of a run in a transaction, and note void copies.

    Raises:
        ConflictError: If the run is not where this process has left it.
    """
    move, insert_void = _statements(statements_for(cursor))
    if len(cursor.execute(move, (position, run.run, run.position))) != 1:
        raise lost(run)
    if voids:
        cursor.write(insert_void, [(*void, run.run) for void in voids])
