"""Restore archived tasks: their rows return, and their histories become past changes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

from openclaw_store.archive import runs
from openclaw_store.archive.layout import HISTORIES, TASKS, Image
from openclaw_store.archive.manifest import cluster_of
from openclaw_store.archive.mover import Mover
from openclaw_store.archive.reader import Archive
from openclaw_store.archive.runs import ArchiveRun, logger
from openclaw_store.backends import BatchCursor
from openclaw_store.database import (
    Database,
    PastChangeRow,
    Statements,
    WriteTransaction,
    statements_for,
    statements_of,
)
from openclaw_store.domain import Decode, Task, TaskFilter, check_selection, encode
from openclaw_store.errors import InvalidDataError
from openclaw_store.repositories import insert_tasks

_BATCH = 200
"""Tasks restored in one transaction."""

_PAST = [HISTORIES.names.index(column.name) for column in PastChangeRow.__table__.c]
_ITEM_ID, _VERSION = HISTORIES.names.index("item_id"), TASKS.names.index("version")


@dataclass
class Restored:
    """The tasks that a call has restored, and the ones that it has left in the archive."""

    restored: list[str] = field(default_factory=list)
    skipped: dict[str, str] = field(default_factory=dict)
    """The reason for each task that stays in the archive."""


@dataclass(frozen=True, slots=True)
class _Return:
    """Archived tasks that return, and the changes of each."""

    run: ArchiveRun
    images: Sequence[Image]
    changes: dict[str, list[Image]]


async def restore_tasks(
    database: Database, location: str | Path, filter: TaskFilter, *, patience: float = 30.0
) -> Restored:
    """Bring the archived tasks back that match a filter, as they were.

    Their earlier changes are part of their `history` again, but no watcher reads them: the return
    of a task is one new change. A repetition restores the rest.

    Args:
        filter: At least one condition; `TaskFilter.everything()` selects all tasks.
        patience: Seconds to wait for another process that moves rows to or from an archive.

    Raises:
        InvalidDataError: If a condition of the filter is invalid.
        UnavailableError: If another process holds the archive for longer, or it cannot be read.
    """
    checked = check_selection(filter, database.clock())
    done, mover = Restored(), Mover(database, None, None)
    archive = Archive(location, cluster_of(database), clock=database.clock, database=database)
    decode = statements_of("sqlite").protected_by(database.statements.protection).decode[Task]
    async with runs.leased(database, patience=patience):
        await mover.heal()
        run = await runs.begin(database, "restore", archive.folder.location, "verified")
        async for images, changes in archive.selected(checked):
            by_id: dict[str, list[Image]] = {}
            for change in changes:
                by_id.setdefault(change[_ITEM_ID], []).append(change)
            readable = [image for image in images if _is_readable(image, decode, done)]
            for start in range(0, len(readable), _BATCH):
                part = readable[start : start + _BATCH]
                returning = _Return(run, part, by_id)
                refusals = await database.write(_restore, returning)
                for image, refusal in zip(part, refusals, strict=True):
                    if refusal is None:
                        done.restored.append(image[0])
                    else:
                        done.skipped[image[0]] = str(refusal)
        await mover.finish(run)
    return done


def _is_readable(image: Image, decode: Decode, done: Restored) -> bool:
    """Return true if the store accepts the values; they are of an older version, or by hand."""
    try:
        encode(decode(tuple(image)).copy())
    except InvalidDataError as error:
        logger.warning("task %r stays in the archive: %s", image[0], error)
        done.skipped[image[0]] = str(error)
        return False
    return True


def _restore(transaction: WriteTransaction, returns: Sequence[_Return]) -> Sequence[Any]:
    """Insert the tasks that do not exist, and note that their archived copies are void."""
    if isinstance(transaction.cursor, BatchCursor):
        transaction.cursor.require_lock()
    return [_insert(transaction, one) for one in returns]


def _insert(transaction: WriteTransaction, returning: _Return) -> Sequence[Any]:
    protection = transaction.sql.protection
    decode = statements_of("sqlite").protected_by(protection).decode[Task]
    records = [decode(tuple(image)) for image in returning.images]
    [refusals] = insert_tasks(transaction, [records])
    cursor = transaction.cursor
    insert_past, insert_void = _statements(statements_for(cursor))
    voids, past = [], []
    for image, refusal in zip(returning.images, refusals, strict=True):
        if refusal is None:
            voids.append((image[0], image[_VERSION], returning.run.run))
            past += returning.changes.get(image[0], [])
    if voids:
        cursor.write(insert_void, voids)
    if past:
        rows = HISTORIES.rows(past, cursor.dialect)
        cursor.write(insert_past, [[row[place] for place in _PAST] for row in rows])
    return refusals


@cache
def _statements(sql: Statements) -> tuple[str, str]:
    """Return the SQL that inserts past changes, and void copies."""
    tables = PastChangeRow.metadata.tables
    return sql.insert_into(tables["past_changes"]), sql.insert_into(tables["archive_voids"])
