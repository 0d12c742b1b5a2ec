"""Restore archived tasks: their rows return, and their histories become past changes."""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncGenerator, Callable, Iterable, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from openclaw_store.archive import runs
from openclaw_store.archive.files import ArchiveFile
from openclaw_store.archive.folder import Folder
from openclaw_store.archive.layout import TASKS, histories_of
from openclaw_store.archive.lease import leased
from openclaw_store.archive.manifest import cluster_of
from openclaw_store.archive.mover import Mover
from openclaw_store.archive.reader import opening
from openclaw_store.archive.runs import ArchiveRun, logger
from openclaw_store.archive.selection import Selection
from openclaw_store.archive.snapshot import Catalogue
from openclaw_store.database import Database, WriteTransaction
from openclaw_store.domain import (
    ENTITY_NAMES,
    Record,
    Task,
    TaskFilter,
    check_record,
    check_selection,
)
from openclaw_store.errors import InvalidDataError
from openclaw_store.repositories import Refusals, insert_past, insert_tasks, row_of
from openclaw_store.repositories.queries import refuse_sealed

Result = TypeVar("Result")

_TASK = ENTITY_NAMES[Task]


@dataclass
class Restored:
    """The tasks that a call has restored, and the ones that it has left in the archive."""

    restored: list[str] = field(default_factory=list)
    skipped: dict[str, str] = field(default_factory=dict)
    """The reason for each task that stays in the archive."""


class _Archived(NamedTuple):
    """A task that returns."""

    record: Record[Task]
    version: int
    """The version of its archived copy."""
    past: Sequence[Sequence[Any]]
    """Its changes, as rows of `past_changes` with reasons in clear."""


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

    def read(file: ArchiveFile, group: int) -> list[_Archived]:
        sql, found = opening(protection, file.cluster_id), []
        table = snapshot.read(file, selection, groups=[group])
        for image, history in zip(TASKS.images_of(table), histories_of(table), strict=True):
            id = image[0]
            try:  # values of an older version, or written by hand
                record = sql.decode[Task](image)
                check_record(record)
                past = [
                    (id, revision, at, _TASK, *step, why and sql.read_reason(_TASK, id, why), last)
                    for revision, at, *step, why, last in history
                ]
            except InvalidDataError as error:
                logger.warning("task %r stays in the archive: %s", id, error)
                done.skipped[id] = str(error)
            else:
                found.append(_Archived(record, record.version, past))
        return found

    async with leased(database, patience=patience):
        await mover.heal()
        # `verified`: it has no files to undo, so after an interruption the next run completes it.
        run = await runs.begin(database, "restore", folder.location, "verified")
        snapshot = await asyncio.to_thread(catalogue.snapshot)
        parts = ((file, group) for file in snapshot.tasks for group in file.groups)
        async with aclosing(_ahead(partial(read, *part) for part in parts)) as groups:
            async for found in groups:
                while found:
                    batch, found = found[: mover.batch], found[mover.batch :]
                    refusals = await mover.write(_restore, (run, batch))
                    run.passed(run.position + len(batch))
                    for one, refusal in zip(batch, refusals, strict=True):
                        if refusal is None:
                            done.restored.append(one.record.task_id)
                        else:
                            done.skipped[one.record.task_id] = str(refusal)
        await mover.finish(run)
    return done


async def _ahead(calls: Iterable[Callable[[], Result]]) -> AsyncGenerator[Result, None]:
    """Yield the results of calls on a thread; while one is used, the next call is made.

    Closing it waits for a call that is under way.
    """
    begun: deque[asyncio.Future[Result]] = deque()
    try:
        for call in calls:
            begun.append(asyncio.ensure_future(asyncio.to_thread(call)))
            if len(begun) == 2:
                yield await begun.popleft()
        while begun:
            yield await begun.popleft()
    finally:
        await asyncio.gather(*begun, return_exceptions=True)


def _restore(
    transaction: WriteTransaction, returns: Sequence[tuple[ArchiveRun, Sequence[_Archived]]]
) -> Sequence[Refusals]:
    """Insert the tasks that do not exist, and note that their archived copies are void."""
    return [_insert(transaction, run, tasks) for run, tasks in returns]


def _insert(transaction: WriteTransaction, run: ArchiveRun, tasks: Sequence[_Archived]) -> Refusals:
    rows = [row_of(transaction.sql, one.record) for one in tasks]
    [(refusals, _, _)] = insert_tasks(transaction, [rows])
    added = [one for one, refusal in zip(tasks, refusals, strict=True) if refusal is None]
    ids = [one.record.task_id for one in added]
    voids = [(id, one.version) for id, one in zip(ids, added, strict=True)]
    runs.progress(transaction.cursor, run, run.position + len(tasks), voids)
    insert_past(transaction, ids, chain.from_iterable(one.past for one in added))
    return refusals
