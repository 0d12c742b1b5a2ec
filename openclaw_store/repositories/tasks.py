"""Read and write the table `tasks`."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Sequence
from datetime import datetime
from functools import partial
from typing import Any

from sqlalchemy import func, select
from sqlalchemy.ext.asyncio import AsyncSession

from openclaw_store.database import (
    COLUMNS,
    IS_DELAYED,
    IS_EXPIRING,
    Database,
    TaskRow,
)
from openclaw_store.domain import (
    DEFAULT_BACKOFF,
    MAX_INTEGER,
    Backoff,
    LongValueError,
    Record,
    Task,
    TaskFilter,
    TaskPage,
    TaskStatus,
    check_backoff,
    check_filter,
    check_key,
    check_limit,
    check_positive,
    check_time,
    encode_in_steps,
    encode_json,
    short_only,
)
from openclaw_store.errors import InvalidDataError, TaskNotFoundError, safe_repr
from openclaw_store.repositories.base import Repository, too_long
from openclaw_store.repositories.batches import apply_together
from openclaw_store.repositories.commands import (
    Advance,
    Advanced,
    acknowledgement_of,
    cancellation_of,
    completion_of,
    failure_of,
    release_of,
    requeue_of,
    start_of,
)
from openclaw_store.repositories.pages import NEWEST_FIRST, Page, after_cursor, cursor_of
from openclaw_store.repositories.parts import claim_in_parts
from openclaw_store.repositories.queries import is_of_user, task_conditions
from openclaw_store.repositories.retention import (
    count_old_tasks,
    parse_policy,
    remove_old_tasks,
    task_status,
)
from openclaw_store.repositories.row_reader import (
    FETCH_SIZE,
    decoder_here,
    read_records,
    read_rows,
    select_pending,
)

ITER_PAGE_SIZE = 250
"""Tasks on a page of `iter_tasks`."""

ID_BATCH_SIZE = 250
"""Tasks that `get_tasks` reads with one query."""


class TaskRepository(Repository[Task]):
    """The tasks in the database, without a cache.

    Args:
        database: The database, or a session of it.
        backoff: The delay of a task before its next attempt.
    """

    kind = Task

    def __init__(
        self, database: Database | AsyncSession, backoff: Backoff = DEFAULT_BACKOFF
    ) -> None:
        super().__init__(database)
        self._backoff = check_backoff(backoff)

    async def create(self, task: Task) -> bool:
        """Add a task; `task` receives its version and its times in UTC.

        Raises:
            DuplicateError: If its identifier, or its idempotency key, is taken.
            InvalidDataError: If a field cannot be stored.
        """
        return await self._create(task)

    async def update(self, task: Task) -> bool:
        """Write a changed task back; `task` receives the new version and can be changed again.

        Raises:
            TaskNotFoundError: If it was removed.
            StaleVersionError: If it was changed since it was read.
            InvalidDataError: If a field cannot be stored.
        """
        return await self._update(task)

    async def delete(self, task_id: str) -> bool:
        """Remove a task and free its slot; its history stays. `False` if there is none."""
        return await self._delete(task_id)

    async def claim(self, node_id: str, limit: int = 1, *, start: bool = False) -> list[Task]:
        """Assign pending tasks to an ONLINE node that has their skills and free slots.

        Without a transaction of the caller, each 200 tasks are claimed in one; after an error, the
        node keeps the tasks claimed so far.

        Args:
            start: Start them in the same commit.

        Returns:
            The due tasks, now SCHEDULED or RUNNING, by priority, time of submission and identifier.

        Raises:
            NodeNotFoundError: If there is no such node.
        """
        node_id = check_key("node_id", node_id)
        limit = check_positive("limit", limit)
        parts = claim_in_parts(self._write, node_id, limit, start=start)
        return [task async for part in parts for task in await self._copies(part)]

    async def start(self, task: Task) -> Task:
        """Start a claimed task; return the stored task.

        Raises:
            TaskNotFoundError: If it was removed.
            NotOwnerError: If this attempt is no longer assigned to its node.
        """
        return await self._advance(start_of(task))

    async def complete(self, task: Task, result: Any = None) -> Task:
        """Complete a task with a JSON value; return the stored task.

        Raises:
            TaskNotFoundError: If it was removed.
            NotOwnerError: If this attempt is no longer assigned to its node.
            InvalidDataError: If the result cannot be stored.
        """
        return await self._advance(completion_of(task, await encode_result(self._database, result)))

    async def fail(self, task: Task, error: str | BaseException, retry: bool = True) -> Task:
        """Report an error; the task is PENDING again, or FAILED after its last retry.

        Args:
            error: A text, or an exception: its type and text.
            retry: `False` ends the task at once.

        Raises:
            TaskNotFoundError: If it was removed.
            NotOwnerError: If this attempt is no longer assigned to its node.
        """
        return await self._advance(failure_of(task, error, self._backoff.draw() if retry else None))

    async def release(self, task: Task, reason: str | None = None) -> Task:
        """Make an assigned task PENDING again at no cost; return the stored task.

        Raises:
            TaskNotFoundError: If it was removed.
            NotOwnerError: If this attempt is no longer assigned to its node.
        """
        return await self._advance(release_of(task, reason))

    async def acknowledge_cancel(self, task: Task) -> Task:
        """Cancel a task after its owner was asked to, and has ended the work; return the task.

        Raises:
            TaskNotFoundError: If it was removed.
            NotOwnerError: If this attempt is no longer assigned to its node.
            InvalidTransitionError: If its owner was not asked to cancel it.
        """
        return await self._advance(acknowledgement_of(task))

    async def cancel(self, task_id: str, reason: str | None = None) -> bool:
        """Cancel a task; `False` if there is none.

        Raises:
            InvalidTransitionError: If it has finished with another status.
        """
        return await is_known(self._write(cancellation_of(task_id, reason)))

    async def requeue(self, task_id: str) -> bool:
        """Make a task PENDING with all its retries; `False` if there is none.

        Raises:
            DuplicateError: If another live task has its idempotency key.
        """
        return await is_known(self._write(requeue_of(task_id)))

    async def _advance(self, command: Advance) -> Task:
        done: Advanced = await self._write(command)
        return (await self._copies([done.record]))[0]

    async def list_tasks(
        self,
        filter: TaskFilter | None = None,
        *,
        after: str | None = None,
        limit: int = 100,
    ) -> TaskPage:
        """Return a page of the tasks that match a filter, newest submitted first.

        Tasks submitted at the same time are in descending order of their identifiers. No task
        comes twice, and no task is left out that matches from the first page to the last.

        Args:
            filter: `None` for all tasks.
            after: `after` of the page before; `None` for the first.

        Raises:
            InvalidDataError: If a condition of the filter, or the cursor, is invalid.
        """
        page = self._page(filter, after, limit)

        async def run(session: AsyncSession) -> TaskPage:
            records, following = await _records_of(session, page)
            return TaskPage(await self._copies(records), following)

        return await self._read(run)

    async def list_records(
        self, filter: TaskFilter | None, *, after: str | None, limit: int
    ) -> tuple[list[Record[Task]], str | None]:
        """Return a page as `list_tasks`, as records, and the cursor of the next one."""
        return await self._read(partial(_records_of, page=self._page(filter, after, limit)))

    def _page(self, filter: TaskFilter | None, after: str | None, limit: int) -> Page:
        check_positive("limit", limit)
        checked = check_filter(TaskFilter, filter, self._database.clock())
        behind = None if after is None else after_cursor(after)
        return Page(checked, behind, min(limit + 1, MAX_INTEGER))

    async def iter_tasks(self, filter: TaskFilter | None = None) -> AsyncIterator[Task]:
        """Yield the tasks that match a filter as `list_tasks`, one page in memory at a time.

        Raises:
            InvalidDataError: If a condition of the filter is invalid.
        """
        checked = check_filter(TaskFilter, filter, self._database.clock())
        async for task in each_of_pages(partial(self.list_tasks, checked, limit=ITER_PAGE_SIZE)):
            yield task

    async def count_tasks(self, filter: TaskFilter | None = None) -> int:
        """Count the tasks that match a filter.

        Raises:
            InvalidDataError: If a condition of the filter is invalid.
        """
        checked = check_filter(TaskFilter, filter, self._database.clock())
        wanted = list(task_conditions(checked, self._database.statements))
        if isinstance(checked.status, tuple):
            wanted.append(TaskRow.status.in_(checked.status))
        return await self._count(*wanted)

    async def get_tasks(self, ids: Iterable[str]) -> list[Task | None]:
        """Return the tasks with these identifiers, in their order; `None` for an unknown one."""
        tasks: list[Task | None] = []
        wanted = check_ids(ids)
        for start in range(0, len(wanted), ID_BATCH_SIZE):
            part = wanted[start : start + ID_BATCH_SIZE]
            found = await self.get_records(part)
            copies = iter(await self._copies([found[id] for id in part if id in found]))
            tasks += [next(copies) if id in found else None for id in part]
        return tasks

    async def get_records(self, ids: Sequence[str]) -> dict[str, Record[Task]]:
        """Return the records of up to `ID_BATCH_SIZE` tasks, without unknown ones."""
        sql = self._database.statements
        query = sql.by_ids(Task, COLUMNS[Task], sql.given(list(dict.fromkeys(ids))))
        records = await self._read(partial(read_records, kind=Task, query=query))
        return {record.task_id: record for record in records}

    async def list_by_status(self, status: TaskStatus, limit: int | None = None) -> list[Task]:
        """Return the tasks with this status, newest submitted first."""
        return await self._newest(TaskRow.status == task_status("status", status), limit)

    async def list_by_node(self, node_id: str) -> list[Task]:
        """Return the tasks of this node, finished ones included, newest submitted first."""
        return await self._newest(TaskRow.assigned_node == check_key("node_id", node_id), None)

    async def list_by_user(self, user_id: str, limit: int | None = 100) -> list[Task]:
        """Return the tasks of this user, newest submitted first."""
        condition = is_of_user(check_key("user_id", user_id), self._database.statements)
        return await self._newest(condition, limit)

    async def list_pending_tasks(self, limit: int | None = 50) -> list[Task]:
        """Return pending and scheduled tasks by priority, time of submission and identifier."""
        return await self._list(select_pending(), check_limit(limit))

    async def list_waiting(self, limit: int | None = 50) -> list[Task]:
        """Return pending tasks, due or not, by priority, time of submission and identifier."""
        # Not `= 'pending'`: SQLite could choose the index on the status, and sort.
        query = select_pending().where(TaskRow.status != TaskStatus.SCHEDULED)
        return await self._list(query, check_limit(limit))

    async def next_due_at(self, since: datetime) -> datetime | None:
        """Return the earliest time after `since` at which a delayed task is due, or `None`."""
        moment = check_time("since", since)
        query = select(func.min(TaskRow.not_before)).where(IS_DELAYED, TaskRow.not_before > moment)

        async def run(session: AsyncSession) -> datetime | None:
            return await session.scalar(query)

        return await self._read(run)

    async def list_expired(self) -> list[str]:
        """Return the identifiers of the tasks that expired before they were started."""
        query = select(TaskRow.task_id).where(
            IS_EXPIRING, TaskRow.expires_at <= self._database.clock()
        )

        async def run(session: AsyncSession) -> list[str]:
            return list(await session.scalars(query))

        return await self._read(run)

    async def count_by_status(self, status: TaskStatus | None = None) -> int:
        """Count the tasks with this status; `None` counts all."""
        if status is None:
            return await self._count()
        return await self._count(TaskRow.status == task_status("status", status))

    async def _count(self, *conditions: Any) -> int:
        query = select(func.count()).select_from(TaskRow).where(*conditions)

        async def run(session: AsyncSession) -> int:
            return int(await session.scalar(query) or 0)

        return await self._read(run)

    async def cleanup_old_tasks(
        self, days: float = 30, keep_status: TaskStatus | Iterable[TaskStatus] | None = None
    ) -> int:
        """Remove tasks that finished more than `days` days ago, and their history.

        A finished task without `completed_at`, or with one in the future (the clock of another
        machine was ahead), counts from its last change. If that is more than `days` in the future
        as well, it counts from this call.

        Batches let other callers write in between, except in a caller's transaction. After an
        error, call again: a note on it gives the number of tasks removed so far.

        Args:
            days: Age in days, from 0.
            keep_status: One status, or several, to keep.

        Returns:
            The number of removed tasks.
        """
        policy = parse_policy(self._database.clock(), days, keep_status)
        write = partial(self._write, apply=apply_together)
        return await remove_old_tasks(self._read, write, policy)

    async def count_old_tasks(
        self, days: float = 30, keep_status: TaskStatus | Iterable[TaskStatus] | None = None
    ) -> int:
        """Count the tasks that `cleanup_old_tasks` would remove."""
        policy = parse_policy(self._database.clock(), days, keep_status)
        return await self._read(partial(count_old_tasks, policy=policy))

    async def _newest(self, condition: Any, limit: int | None) -> list[Task]:
        query = self._select(condition).order_by(*NEWEST_FIRST)
        return await self._list(query, check_limit(limit))


async def _records_of(session: AsyncSession, page: Page) -> tuple[list[Record[Task]], str | None]:
    decode, limit = decoder_here(session, Task), page.size - 1
    # A cursor costs two more round trips for each query.
    size = None if page.size <= FETCH_SIZE else FETCH_SIZE
    found = [
        decode(row)
        for query in await page.queries(session)
        async for rows in read_rows(session, query, size)
        for row in rows
    ]
    found.sort(key=lambda task: (task.submitted_at, task.task_id), reverse=True)
    return found[:limit], cursor_of(found[limit - 1]) if len(found) > limit else None


async def each_of_pages(list_page: Callable[..., Awaitable[TaskPage]]) -> AsyncIterator[Task]:
    """Yield the tasks of all pages; `list_page` takes the cursor as `after`."""
    page = await list_page(after=None)
    while True:
        for task in page:
            yield task
        if page.after is None:
            return
        page = await list_page(after=page.after)


def check_ids(ids: Iterable[str]) -> list[str]:
    """Return identifiers of tasks as a list."""
    if isinstance(ids, str) or not isinstance(ids, Iterable):
        raise InvalidDataError("ids", f"must be a list of identifiers, not {safe_repr(ids)}")
    return [check_key("ids", id) for id in ids]


async def is_known(work: Awaitable[object]) -> bool:
    """Return false if `work` does not find its task."""
    try:
        await work
    except TaskNotFoundError:
        return False
    return True


_encode_short = short_only(encode_json)


async def encode_result(database: Database, result: Any) -> bytes | None:
    """Return the JSON of a result; `None` for no result."""
    if result is None:
        return None
    try:
        text: bytes = _encode_short("result", result)
    except LongValueError:
        text = await database.slices.run(encode_in_steps(encode_json, "result", result))
    if len(text) > database.max_json_bytes:
        raise too_long("result", database.max_json_bytes)
    return text
