"""Calls of a `StateManager` for its retention policy, and for archived tasks."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from typing import TYPE_CHECKING

from openclaw_store.archive import module
from openclaw_store.archive.retain import Retained, retain
from openclaw_store.domain import Record, Retention, Task, TaskFilter, check_key
from openclaw_store.errors import InvalidDataError, UnavailableError, logger_of, safe_repr
from openclaw_store.repositories.pages import cursor_of, position_of
from openclaw_store.repositories.tasks import ITER_PAGE_SIZE
from openclaw_store.state_manager.manager_base import ManagerBase

if TYPE_CHECKING:
    from openclaw_store.archive.reader import Archive
    from openclaw_store.archive.restore import Restored

logger = logger_of("state_manager")


class ArchiveCalls(ManagerBase):
    """Find and restore archived tasks; apply the retention policy."""

    async def find_task(self, task_id: str, archive: Archive | None = None) -> Task | None:
        """Return a live or archived task, or `None`.

        Args:
            archive: An open archive; `None` for the one of the retention policy.

        Raises:
            InvalidDataError: If there is neither.
            UnavailableError: If the archive cannot be read.
        """
        self._check_usable()
        id, found = check_key("task_id", task_id), self._archive(archive)
        # Live first, and live again: a task may move in either direction meanwhile.
        return await self._live(id) or await found.get(id) or await self._live(id)

    async def _live(self, id: str) -> Task | None:
        record = await self.task_repo.get_record(id)
        return None if record is None else (await self._replica.slices.copies([record]))[0]

    async def apply_retention(self, retention: Retention | None = None) -> Retained:
        """Apply a retention policy now, after the runs that another process left unfinished.

        Batches let other callers write in between. After an error or an interruption, the next
        call continues.

        Args:
            retention: `None` for the policy of this manager.

        Raises:
            InvalidDataError: If there is neither.
            UnavailableError: If another process applies one for longer than the timeout of the
                database, or the archive cannot be used.
        """
        self._check_usable()
        policy = self._retention if retention is None else retention
        if not isinstance(policy, Retention):
            raise InvalidDataError("retention", f"must be a Retention, not {safe_repr(policy)}")
        return await retain(self.db, policy, patience=self.db.timeout)

    async def restore_tasks(
        self, filter: TaskFilter, archive: str | Path | None = None
    ) -> Restored:
        """Bring the archived tasks back that match a filter, as they were.

        Their earlier changes are part of `history` again, but `watch` does not yield them: the
        return of a task is one new change. A task whose identifier exists stays in the archive. A
        restored task counts as finished now for the retention policy. A repetition restores the
        rest.

        Args:
            filter: At least one condition; `TaskFilter.everything()` selects all tasks.
            archive: The location; `None` for the archive of the retention policy.

        Returns:
            The identifiers of the restored tasks, and the reason for each task that stays.

        Raises:
            InvalidDataError: If a condition of the filter is invalid, or there is no archive.
            UnavailableError: If another process moves tasks to or from an archive for longer than
                the timeout of the database, or the archive cannot be read.
        """
        self._check_usable()
        location = archive or self._location()
        restored: Restored = await module("restore").restore_tasks(
            self.db, location, filter, patience=self.db.timeout
        )
        return restored

    def _archive(self, archive: Archive | None) -> Archive:
        if archive is not None:
            return archive
        if self._opened_archive is None:
            archive_of = module("reader").Archive
            self._opened_archive = archive_of(
                self._location(), clock=self.db.clock, database=self.db
            )
        opened: Archive = self._opened_archive
        return opened

    def _location(self) -> str | Path:
        if self._retention is None or self._retention.archive is None:
            raise InvalidDataError(
                "archive", "is missing: give one, or StateManager(retention=Retention(archive=…))"
            )
        return self._retention.archive

    async def _with_archived(self, filter: TaskFilter, archive: Archive) -> AsyncIterator[Task]:
        """Yield live and archived tasks that match a checked filter, newest submitted first.

        Each page of live tasks is read first: a task that moves to the archive meanwhile is found
        there, and one that is found in both comes once.
        """
        after: str | None = None
        while True:
            live, end = await self.task_repo.list_records(filter, after=after, limit=ITER_PAGE_SIZE)
            old, until = await archive.list_records(
                filter, after=after, until=end, limit=ITER_PAGE_SIZE
            )
            # If the archive has more tasks in this range, only the range that it has shown counts.
            last = None if until is None else position_of(until)
            page = {_place(record): record for record in old}
            page |= {_place(one): one for one in live if last is None or _place(one) >= last}
            records = [page[place] for place in sorted(page, reverse=True)]
            for task in await self._replica.slices.copies(records):
                yield task
            after = until or end
            if after is None:
                return

    async def _retain_every(self, retention: Retention) -> None:
        while True:
            try:
                done = await retain(self.db, retention)
            except UnavailableError as error:
                logger.info("the retention policy was not applied: %s", error)
            except Exception:  # the loop must survive the errors of a run
                logger.exception("the retention policy failed; it is applied again")
            else:
                logger.info("%d tasks and %d changes left the database", done.tasks, done.changes)
            await asyncio.sleep(retention.interval_seconds)


def _place(record: Record[Task]) -> tuple[int, str]:
    """Return the place of a task in a list; the identifier decides at the same time."""
    return position_of(cursor_of(record))
