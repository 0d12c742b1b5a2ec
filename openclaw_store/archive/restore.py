"""Restore archived tasks: their rows return, and their histories become past changes."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

from openclaw_store.archive import runs
from openclaw_store.archive.files import ArchiveFile
from openclaw_store.archive.folder import Folder
from openclaw_store.archive.layout import HISTORY, TASKS, Image, histories_of
from openclaw_store.archive.lease import leased
from openclaw_store.archive.manifest import cluster_of
from openclaw_store.archive.mover import Mover
from openclaw_store.archive.reader import opening
from openclaw_store.archive.runs import ArchiveRun, logger
from openclaw_store.archive.selection import Selection
from openclaw_store.archive.snapshot import Catalogue
from openclaw_store.backends import BatchCursor
from openclaw_store.database import (
    Database,
    PastChangeRow,
    Statements,
    WriteTransaction,
    from_microseconds,
    statements_for,
)
from openclaw_store.domain import Record, Task, TaskFilter, check_selection, encode
from openclaw_store.errors import InvalidDataError
from openclaw_store.repositories import insert_tasks
from openclaw_store.repositories.queries import refuse_sealed

_PAST = PastChangeRow.metadata.tables["past_changes"]

_REASON = HISTORY.index("reason")

_insert_into = cache(Statements.insert_into)


@dataclass
class Restored:
    """The tasks that a call has restored, and the ones that it has left in the archive."""

    restored: list[str] = field(default_factory=list)
    skipped: dict[str, str] = field(default_factory=dict)
    """The reason for each task that stays in the archive."""


@dataclass(frozen=True, slots=True)
class _Return:
    """Archived tasks that return, with their versions and the changes of each."""

    run: ArchiveRun
    records: Sequence[Record[Task]]
    versions: Sequence[int]
    histories: Sequence[Sequence[Image]]


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
    protection = database.statements.protection
    refuse_sealed(checked, protection)
    selection, folder = Selection(checked, protection=protection), Folder(location)
    catalogue = Catalogue(folder, cluster_of(database))
    done, mover = Restored(), Mover(database)

    def read(file: ArchiveFile, group: int) -> list[tuple[Record[Task], int, list[Image]]]:
        sql, found = opening(file, protection), []
        table = snapshot.read(file, selection, groups=[group])
        for image, history in zip(TASKS.images_of(table), histories_of(table), strict=True):
            try:  # values of an older version, or written by hand
                record = encode(sql.decode[Task](image).copy())
                history = [_with_reason(sql.read_reason, record.id, one) for one in history]
            except InvalidDataError as error:
                logger.warning("task %r stays in the archive: %s", image[0], error)
                done.skipped[image[0]] = str(error)
            else:
                found.append((record, record.version, history))
        return found

    async with leased(database, patience=patience):
        await mover.heal()
        run = await runs.begin(database, "restore", folder.location, "verified")
        snapshot = await asyncio.to_thread(catalogue.snapshot)
        for file in snapshot.tasks:
            for group in file.groups:
                found = await asyncio.to_thread(read, file, group)
                while found:
                    batch, found = found[: mover.batch], found[mover.batch :]
                    returning = _Return(run, *zip(*batch, strict=True))
                    ids = [record.task_id for record in returning.records]
                    refusals = await mover.write(_restore, returning)
                    run.passed(run.position + len(ids))
                    for id, refusal in zip(ids, refusals, strict=True):
                        if refusal is None:
                            done.restored.append(id)
                        else:
                            done.skipped[id] = str(refusal)
        await mover.finish(run)
    return done


def _with_reason(convert: Callable[..., str | None], id: str, change: Image) -> Image:
    return *change[:_REASON], convert("task", id, change[_REASON]), *change[_REASON + 1 :]


def _restore(transaction: WriteTransaction, returns: Sequence[_Return]) -> Sequence[Any]:
    """Insert the tasks that do not exist, and note that their archived copies are void."""
    if isinstance(transaction.cursor, BatchCursor):
        transaction.cursor.require_lock()
    return [_insert(transaction, one) for one in returns]


def _insert(transaction: WriteTransaction, returning: _Return) -> Sequence[Any]:
    [refusals] = insert_tasks(transaction, [returning.records])
    cursor = transaction.cursor
    store = transaction.sql.stored_reason
    moment = from_microseconds if cursor.dialect == "postgresql" else int
    voids, past = [], []
    for record, version, history, refusal in zip(
        returning.records, returning.versions, returning.histories, refusals, strict=True
    ):
        if refusal is None:
            id = record.task_id
            voids.append((id, version))
            sealed = (_with_reason(store, id, change) for change in history)
            past += [(id, revision, moment(at), "task", *rest) for revision, at, *rest in sealed]
    runs.progress(cursor, returning.run, returning.run.position + len(returning.records), voids)
    if past:
        cursor.write(_insert_into(statements_for(cursor), _PAST), past)
    return refusals
