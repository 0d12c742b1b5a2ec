"""`TaskRepository`: queries and writes of the table `tasks`."""

from __future__ import annotations

from collections.abc import Awaitable, Iterable, Sequence
from functools import partial
from typing import Any

from sqlalchemy import func, select
from sqlalchemy.ext.asyncio import AsyncSession

from openclaw_store.database import COLUMNS, Database, NodeRow, TaskRow
from openclaw_store.domain import (
    DEFAULT_BACKOFF,
    MAX_INTEGER,
    Backoff,
    NodeInfo,
    Record,
    Task,
    TaskFilter,
    TaskPage,
    TaskStatus,
    check_backoff,
    check_filter,
    check_key,
    check_limit,
    check_some,
    claim,
    free_places,
)
from openclaw_store.errors import TaskNotFoundError
from openclaw_store.repositories.base import Repository
from openclaw_store.repositories.commands import (
    Advance,
    Advanced,
    Claim,
    cancellation_of,
    completion_of,
    failure_of,
    requeue_of,
    start_of,
)
from openclaw_store.repositories.queries import after_cursor, conditions, cursor_of
from openclaw_store.repositories.retention import (
    count_old_tasks,
    cutoff_and_kept,
    remove_old_tasks,
    task_status,
)
from openclaw_store.repositories.row_reader import (
    decoder_here,
    read_records,
    read_rows,
    select_pending,
)

_SPARE_CANDIDATES = 16
"""Of a claim, in case that others are quicker."""


class TaskRepository(Repository[Task]):
    """The tasks in the database; every call reads or writes it.

    Args:
        database: The database, or a session of it.
        backoff: How long a task waits for its next try.
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
            DuplicateError: If there is a task with this identifier.
            InvalidDataError: If a field cannot be stored.
        """
        return await self._create(task)

    async def update(self, task: Task) -> bool:
        """Write a changed task back; `task` receives the new version and can be changed again.

        Raises:
            TaskNotFoundError: If it was deleted meanwhile.
            StaleVersionError: If it was changed meanwhile; read it again first.
            InvalidDataError: If a field cannot be stored.
        """
        return await self._update(task)

    async def delete(self, task_id: str) -> bool:
        """Remove a task; `False` if there is none. Its history stays, its place is free."""
        return await self._delete(task_id)

    async def claim(self, node_id: str, limit: int = 1) -> list[Task]:
        """Hand pending tasks to an ONLINE node that has the skills and the places for them.

        Returns:
            The tasks, SCHEDULED on it: due ones, by priority, time of submission and identifier.

        Raises:
            NodeNotFoundError: If there is no such node.
        """
        place = check_key("node_id", node_id)
        check_some("limit", limit)

        async def best(session: AsyncSession) -> list[Record[Task]]:
            """The best of what waits, and some to spare in case that others are quicker."""
            query = select(*COLUMNS[NodeInfo]).where(NodeRow.node_id == place)
            nodes = await read_records(session, NodeInfo, query)
            wanted = min(limit - len(claimed), free_places(nodes[0])) if nodes else 0
            found: list[Record[Task]] = []
            if not wanted:
                return found
            decode = decoder_here(session, Task)
            now = self._database.clock() if self._transaction is None else self._transaction.now
            async for rows in read_rows(session, select_pending()):
                tasks = map(decode, rows)
                found += [task for task in tasks if claim(task, nodes[0], now) is not None]
                if len(found) >= wanted:
                    break
            return found[: wanted + _SPARE_CANDIDATES]

        claimed: list[Record[Task]] = []
        while True:
            candidates = await self._read(best)
            if claimed and not candidates:
                break
            claimed += await self._write(Claim(place, candidates, limit - len(claimed)))
            if len(claimed) == limit or len(candidates) <= _SPARE_CANDIDATES:
                break  # else others were quicker, and there may be more
        return self._copies(claimed)

    async def start(self, task: Task) -> Task:
        """Its node begins to run a claimed task; returns the task as it is stored.

        Raises:
            TaskNotFoundError: If it was removed meanwhile.
            NotOwnerError: If its node does not hold this attempt any more.
        """
        return await self._advance(start_of(task))

    async def complete(self, task: Task, result: Any = None) -> Task:
        """Its node has completed a task; returns the task as it is stored.

        Args:
            result: Any JSON value.

        Raises:
            TaskNotFoundError: If it was removed meanwhile.
            NotOwnerError: If its node does not hold this attempt any more.
            InvalidDataError: If the result cannot be stored.
        """
        return await self._advance(completion_of(task, result))

    async def fail(self, task: Task, error: str) -> Task:
        """Its node has failed; the task is PENDING again, or FAILED after its last retry.

        Raises:
            TaskNotFoundError: If it was removed meanwhile.
            NotOwnerError: If its node does not hold this attempt any more.
        """
        return await self._advance(failure_of(task, error, self._backoff.draw()))

    async def cancel(self, task_id: str, reason: str | None = None) -> bool:
        """End a task that nobody needs any more; `False` if there is none.

        Raises:
            InvalidTransitionError: If it is finished otherwise.
        """
        return await is_known(self._write(cancellation_of(task_id, reason)))

    async def requeue(self, task_id: str) -> bool:
        """Have a task run again, as if it never had been; `False` if there is none.

        Raises:
            DuplicateError: If another live task has its idempotency key by now.
        """
        return await is_known(self._write(requeue_of(task_id)))

    async def _advance(self, operation: Advance) -> Task:
        done: Advanced = await self._write(operation)
        return self._copies([done.record])[0]

    async def list_tasks(
        self,
        filter: TaskFilter | None = None,
        *,
        after: str | None = None,
        limit: int = 100,
    ) -> TaskPage:
        """A page of the tasks that a filter means, newest submitted first, then by identifier.

        Pages stay stable while tasks change: nothing comes twice, and nothing is left out that was
        there before the first page and still fits.

        Args:
            filter: `None` for all tasks.
            after: `after` of the page before; `None` for the first.
            limit: How many at most.

        Raises:
            InvalidDataError: If a condition of the filter, or the cursor, makes no sense.
        """
        check_some("limit", limit)
        checked = check_filter(filter)
        wanted = list(conditions(checked, self._database.dialect))
        if after is not None:
            wanted.append(after_cursor(after))
        queries = [
            self._select(*wanted, *states)
            .order_by(TaskRow.submitted_at.desc(), TaskRow.task_id.desc())
            .limit(min(limit + 1, MAX_INTEGER))
            for states in self._states_of(checked)
        ]

        async def run(session: AsyncSession) -> list[Record[Task]]:
            decode = decoder_here(session, Task)
            found = [
                decode(row)
                for query in queries
                async for rows in read_rows(session, query)
                for row in rows
            ]
            found.sort(key=lambda task: (task.submitted_at, task.task_id), reverse=True)
            return found[: limit + 1]

        found = await self._read(run)
        tasks = self._copies(found[:limit])
        return TaskPage(tasks, cursor_of(tasks[-1]) if len(found) > limit else None)

    def _states_of(self, filter: TaskFilter) -> Sequence[Sequence[Any]]:
        """Conditions on the status, of as many queries as can be answered in order by an index."""
        states = filter.status if isinstance(filter.status, tuple) else tuple(TaskStatus)
        if filter.node is None and filter.user is None:
            return [(TaskRow.status == status,) for status in states]
        return [()] if filter.status is None else [(TaskRow.status.in_(states),)]

    async def list_by_status(self, status: TaskStatus, limit: int | None = None) -> list[Task]:
        """Tasks with this status, newest submitted first."""
        return await self._newest(TaskRow.status == task_status("status", status), limit)

    async def list_by_node(self, node_id: str) -> list[Task]:
        """Tasks assigned to this node, finished ones included, newest submitted first."""
        return await self._newest(TaskRow.assigned_node == check_key("node_id", node_id), None)

    async def list_by_user(self, user_id: str, limit: int | None = 100) -> list[Task]:
        """Tasks of this user, newest submitted first."""
        return await self._newest(TaskRow.user_id == check_key("user_id", user_id), limit)

    async def list_pending_tasks(self, limit: int | None = 50) -> list[Task]:
        """Pending and scheduled tasks by priority, then time of submission, then identifier."""
        return await self._list(select_pending(), check_limit(limit))

    async def count_by_status(self, status: TaskStatus | None = None) -> int:
        """How many tasks have this status; `None` counts all."""
        query = select(func.count()).select_from(TaskRow)
        if status is not None:
            query = query.where(TaskRow.status == task_status("status", status))

        async def run(session: AsyncSession) -> int:
            return int(await session.scalar(query) or 0)

        return await self._read(run)

    async def cleanup_old_tasks(
        self, days: float = 30, keep_status: TaskStatus | Iterable[TaskStatus] | None = None
    ) -> int:
        """Remove tasks that finished more than `days` days ago, and their history.

        A finished task whose `completed_at` is missing, or in the future (as it is not before
        `submitted_at`, which another machine's clock may have told), counts from its last change.
        If that is in the future as well, by more than `days`, it counts from this call.

        Works in batches: others write in between (but not in a caller's transaction), and after an
        error it can simply be called again (a note on the error says how many were removed).

        Args:
            days: Age in days, from 0.
            keep_status: Status, or several, not to be removed.

        Returns:
            How many were removed.
        """
        cutoff, keep = cutoff_and_kept(self._database.clock(), days, keep_status)
        return await remove_old_tasks(self._write, cutoff, keep)

    async def count_old_tasks(
        self, days: float = 30, keep_status: TaskStatus | Iterable[TaskStatus] | None = None
    ) -> int:
        """How many tasks `cleanup_old_tasks` would remove.

        Args:
            days: Age in days, from 0.
            keep_status: Status, or several, not to be removed.
        """
        now = self._database.clock()
        cutoff, keep = cutoff_and_kept(now, days, keep_status)
        return await self._read(partial(count_old_tasks, cutoff=cutoff, keep=keep, now=now))

    async def _newest(self, condition: Any, limit: int | None) -> list[Task]:
        # Nothing orders tasks of one moment: to sort 100,000 of them by identifier for a short list
        # took 175 ms instead of 0.3, and an index with the identifiers is half as large again. So
        # they come as the index has them: last added first.
        query = self._select(condition).order_by(TaskRow.submitted_at.desc())
        return await self._list(query, check_limit(limit))


async def is_known(work: Awaitable[object]) -> bool:
    """Whether `work` has found the task that it is about."""
    try:
        await work
    except TaskNotFoundError:
        return False
    return True
