"""Calls of a `StateManager` for the tasks or nodes that a filter selects."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING

from openclaw_store.domain import (
    FINISHED,
    LIVE,
    NodeFilter,
    NodeInfo,
    Record,
    Task,
    TaskFilter,
    TaskPage,
    TaskStatus,
    check_filter,
    check_selection,
    check_text,
)
from openclaw_store.errors import NotFoundError, StaleVersionError
from openclaw_store.repositories import (
    Command,
    Remove,
    cancellation_of,
    change_of,
    each_of_pages,
    requeue_of,
)
from openclaw_store.repositories.tasks import ITER_PAGE_SIZE
from openclaw_store.state_manager.archive_calls import ArchiveCalls

if TYPE_CHECKING:
    from openclaw_store.archive.reader import Archive


class FilterCalls(ArchiveCalls):
    """List, count and change the tasks that a filter selects, and list nodes."""

    async def list_tasks(
        self, filter: TaskFilter | None = None, *, after: str | None = None, limit: int = 100
    ) -> TaskPage:
        """Return a page of the tasks that match a filter, newest submitted first.

        Tasks submitted at the same time are in descending order of their identifiers. The page
        comes from the database: it contains finished tasks, but no unsaved entries. From the first
        page to the last, no task comes twice, and a task that matches throughout is not left out.

        Args:
            filter: `None` for all tasks.
            after: `after` of the page before; `None` for the first page.
            limit: Maximum number of tasks on the page.

        Raises:
            InvalidDataError: If a condition of the filter, or the cursor, is invalid.
        """
        self._check_usable()
        page = await self.task_repo.list_tasks(filter, after=after, limit=limit)
        await self._replica.catch_up_to(max((task.version for task in page), default=0))
        return page

    async def iter_tasks(
        self, filter: TaskFilter | None = None, *, archive: Archive | None = None
    ) -> AsyncIterator[Task]:
        """Yield the tasks that match a filter, in the order and with the promises of `list_tasks`.

        Only one page is in memory at a time, however many tasks match.

        Args:
            filter: `None` for all tasks. A `timedelta` in it counts from the beginning.
            archive: An archive of which the tasks are listed together with the live ones. A task
                that moves there meanwhile comes once; one that is restored meanwhile may not come.

        Raises:
            InvalidDataError: If a condition of the filter is invalid.
            UnavailableError: If the archive cannot be read.
        """
        checked = check_filter(TaskFilter, filter, self.db.clock())
        if archive is not None:
            self._check_usable()
            async for task in self._with_archived(checked, archive):
                yield task
            return
        async for task in each_of_pages(partial(self.list_tasks, checked, limit=ITER_PAGE_SIZE)):
            yield task

    async def count_tasks(self, filter: TaskFilter | None = None) -> int:
        """Count the tasks in the database that match a filter.

        Args:
            filter: `None` for all tasks.

        Raises:
            InvalidDataError: If a condition of the filter is invalid.
        """
        self._check_usable()
        return await self.task_repo.count_tasks(filter)

    async def cancel_tasks(self, filter: TaskFilter, reason: str | None = None) -> list[str]:
        """Cancel the live tasks that match a filter, in batches.

        Args:
            filter: At least one condition; `TaskFilter.everything()` selects all tasks.
            reason: The `error` of the cancelled tasks; the change log contains it, too.

        Returns:
            The identifiers of the cancelled tasks.

        Raises:
            InvalidDataError: If a condition of the filter, or the reason, is invalid.
            BackendError: If the database could not be written. Tasks cancelled before stay
                cancelled; the call can be repeated.
        """
        live = self._selection(filter, LIVE)
        if reason is not None:
            check_text("reason", reason)

        async def cancel(task: Record[Task]) -> Command:
            return cancellation_of(task.task_id, reason, task.version)

        return await self._scheduler.write_selected(live, cancel)

    async def requeue_tasks(self, filter: TaskFilter) -> list[str]:
        """Requeue the finished tasks that match a filter as `requeue_task`, in batches.

        A task stays finished if another live task has its idempotency key.

        Args:
            filter: At least one condition; `TaskFilter.everything()` selects all tasks.

        Returns:
            The identifiers of the requeued tasks.

        Raises:
            InvalidDataError: If a condition of the filter is invalid.
            BackendError: If the database could not be written. Tasks requeued before stay
                requeued; the call can be repeated.
        """

        async def requeue(task: Record[Task]) -> Command:
            return requeue_of(task.task_id, task.version)

        return await self._scheduler.write_selected(self._selection(filter, FINISHED), requeue)

    async def remove_tasks(self, filter: TaskFilter) -> list[str]:
        """Remove the tasks that match a filter as `remove_task`, live ones too, in batches.

        Args:
            filter: At least one condition; `TaskFilter.everything()` selects all tasks.

        Returns:
            The identifiers of the removed tasks.

        Raises:
            InvalidDataError: If a condition of the filter is invalid.
            BackendError: If the database could not be written. Tasks removed before stay removed;
                the call can be repeated.
        """

        async def remove(task: Record[Task]) -> Command:
            return Remove(Task, task.task_id, version=task.version)

        return await self._scheduler.write_selected(self._selection(filter), remove)

    async def change_tasks(self, filter: TaskFilter, fn: Callable[[Task], object]) -> list[str]:
        """Change the tasks that match a filter as `change_task`, in batches.

        Each task is changed once, even if it matches the filter again afterwards.

        Args:
            filter: At least one condition; `TaskFilter.everything()` selects all tasks.
            fn: Changes the copy that it receives. It is called again, with a new copy, if the
                task was changed meanwhile and still matches.

        Returns:
            The identifiers of the changed tasks; a task that `fn` leaves as it was is not one.

        Raises:
            InvalidDataError: If a condition of the filter is invalid, or `fn` sets a field to a
                value that cannot be stored. Tasks changed before stay changed.
            ConflictError: If `fn` sets a status that is not allowed, or the idempotency key of
                another live task. Tasks changed before stay changed.
            BackendError: If the database could not be written. Tasks changed before stay changed.
        """
        selection = self._selection(filter)
        changed = self._change_by(self.task_repo, fn)

        async def change(task: Record[Task]) -> Command | None:
            await asyncio.sleep(0)  # other coroutines run between two copies
            return change_of(task, await changed(task))

        return await self._scheduler.write_selected(
            selection, change, skipped=(StaleVersionError, NotFoundError)
        )

    def _selection(
        self, filter: TaskFilter, states: frozenset[TaskStatus] = frozenset(TaskStatus)
    ) -> TaskFilter:
        """Return the checked filter of a change that concerns tasks with these statuses."""
        self._check_usable()
        checked = check_selection(filter, self.db.clock())
        if isinstance(checked.status, tuple):
            states = states.intersection(checked.status)
        return replace(checked, status=tuple(states))

    async def list_nodes(self, filter: NodeFilter | None = None) -> list[NodeInfo]:
        """Return the nodes that match a filter, newest registered first.

        Args:
            filter: `None` for all nodes.

        Raises:
            InvalidDataError: If a condition of the filter is invalid.
        """
        self._check_usable()
        now = self.db.clock()
        checked = check_filter(NodeFilter, filter, now)
        nodes = (await self._replica.view(with_tasks=False)).node_index.all_nodes()
        found = [node for node in nodes if checked.selects(node, now)]
        return await self._replica.slices.copies(found)
