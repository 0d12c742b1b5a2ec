"""Calls of a StateManager about tasks."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable, Sequence
from itertools import islice
from threading import get_ident
from typing import Any

from openclaw_store.domain import (
    FINISHED,
    Record,
    Task,
    TaskFilter,
    TaskPage,
    admit,
    check_filter,
    check_key,
    check_limit,
    check_number,
    check_some,
    check_text,
    write_back,
)
from openclaw_store.errors import (
    DeadlineError,
    DuplicateError,
    InvalidDataError,
    StoreError,
    TaskNotFoundError,
)
from openclaw_store.repositories import (
    Advance,
    Create,
    cancellation_of,
    completion_of,
    failure_of,
    is_known,
    requeue_of,
    start_of,
)
from openclaw_store.state_manager.explain import Explanation
from openclaw_store.state_manager.manager_base import COPIES, ManagerBase, copies
from openclaw_store.state_manager.scheduler import Recovery

ADD_BATCH_SIZE = 1000
"""Tasks that one transaction adds at most; others write in between."""


class TaskCalls(ManagerBase):
    """Read, write, hand out and finish tasks."""

    async def get_task(self, task_id: str) -> Task | None:
        """A task, finished ones too; `None` if there is none."""
        # Without another call, as this is asked most often.
        if self._thread != get_ident() or not self._is_running():
            self._check_usable()
        try:
            record = self._replica.cache.tasks.entries.get(task_id)
        except TypeError:  # it has no hash, so it is no text
            record = None
        if type(record) is Record:  # as mostly
            return record.copy()
        found = await self._replica.find((Task, check_key("task_id", task_id)))
        return None if found is None else found.copy()

    async def get_pending_tasks(self, limit: int | None = 50) -> list[Task]:
        """Pending and scheduled tasks by priority, then time of submission, then identifier."""
        self._check_usable()
        limit, cache = check_limit(limit), self._replica.cache
        if limit is not None and limit <= COPIES:
            return await copies(cache.pending(limit), Record.copy)
        # All of this moment, though they are looked up and copied bit by bit.
        tasks = cache.tasks.snapshot()
        return await copies(cache.task_index.pending.first(limit), lambda key: tasks[key[2]])

    async def add_task(self, task: Task, persist: bool = True) -> bool:
        """Add a task; `task` receives its version and its times in UTC.

        Args:
            persist: `False` keeps it in memory until the next synchronisation.

        Raises:
            DuplicateError: If there is a task with this identifier.
            InvalidDataError: If a field cannot be stored.
        """
        self._check_usable()
        record = admit(Task, task, self.db.clock)
        if persist:
            record = await self._replica.submit(
                Create(Task, task.task_id, record, record.idempotency_key)
            )
        else:
            record = await self._replica.write_behind.add(record)
        write_back(record, task)
        return True

    async def update_task(self, task: Task, persist: bool = True) -> bool:
        """Write a changed task back; `task` receives the new version and can be changed again.

        Args:
            persist: `False` keeps it in memory until the next synchronisation.

        Raises:
            TaskNotFoundError: If it was removed meanwhile.
            StaleVersionError: If it was changed meanwhile; read it again, or use `change_task`.
            InvalidDataError: If a field cannot be stored.
        """
        self._check_usable()
        record = self._encode_known(Task, task)
        write_back(await self._update(record, persist), task)
        return True

    async def change_task(self, task_id: str, fn: Callable[[Task], object]) -> Task | None:
        """Read a task, change it and write it, without losing what others write meanwhile.

        Args:
            fn: Is given a copy and changes it; called again if the task was changed meanwhile.

        Returns:
            The task as it is stored; `None` if there is none.

        Raises:
            InvalidDataError: If a field cannot be stored.
            ConflictError: If it was only in memory, and lost to newer data.
        """
        return await self._change(self.task_repo, check_key("task_id", task_id), fn)

    async def remove_task(self, task_id: str) -> bool:
        """Remove a task; `False` if there is none. Its place on a node is free then."""
        self._check_usable()
        return await self._replica.remove((Task, check_key("task_id", task_id)))

    delete_task = remove_task

    async def submit_task(self, task: Task) -> Task:
        """Add a task, unless there is a live one with its idempotency key.

        It can be repeated: then it returns what the first call has added.

        Returns:
            The task as it is stored, or the one that is there already.

        Raises:
            DuplicateError: If another task has its identifier.
            InvalidDataError: If a field cannot be stored.
        """
        while True:
            try:
                await self.add_task(task)
            except DuplicateError as error:
                # Not from memory, which need not know yet that it has the key.
                found = await self.task_repo.get(error.id)
                key = task.idempotency_key
                if found is not None and key is not None and found.idempotency_key == key:
                    await self._replica.reach(found.version)
                    return found
                if error.idempotency_key is None:
                    raise
                # Else the one that had the key was removed, or changed, meanwhile.
            else:
                return admit(Task, task, self.db.clock).copy()

    async def add_tasks(self, tasks: Iterable[Task]) -> list[StoreError | None]:
        """Add many tasks; each receives its version and its times in UTC.

        Works in chunks of 1,000, each of which is one transaction; others write in between. After
        an error a note on it says how many tasks were gone through, and the call can be repeated:
        those that are there are refused then.

        Returns:
            For each task, `None` if it was added, or why it was not: `DuplicateError`, or
            `InvalidDataError`.

        Raises:
            BackendError: If the database could not be written.
            InvalidDataError: If the database itself refuses a row of a chunk.
        """
        self._check_usable()
        if not isinstance(tasks, Iterable):
            raise InvalidDataError("tasks", f"must be tasks, not {type(tasks).__name__}")
        outcomes: list[StoreError | None] = []
        remaining = iter(tasks)
        while chunk := list(islice(remaining, ADD_BATCH_SIZE)):
            try:
                outcomes += await self._add_chunk(chunk)
            except StoreError as error:
                error.add_note(f"{len(outcomes)} tasks were gone through before")
                raise
        return outcomes

    async def _add_chunk(self, chunk: Sequence[Task]) -> list[StoreError | None]:
        outcomes: list[StoreError | None] = [None] * len(chunk)
        creations: dict[int, Create[Task]] = {}
        for place, task in enumerate(chunk):
            try:
                record = admit(Task, task, self.db.clock)
            except InvalidDataError as error:
                outcomes[place] = error
                continue
            creations[place] = Create(Task, task.task_id, record, record.idempotency_key)
        results = await self._replica.submit_all(list(creations.values()))
        for place, result in zip(creations, results, strict=True):
            if isinstance(result, StoreError):
                outcomes[place] = result
            else:
                write_back(result, chunk[place])
        return outcomes

    async def list_tasks(
        self, filter: TaskFilter | None = None, *, after: str | None = None, limit: int = 100
    ) -> TaskPage:
        """A page of the tasks that a filter means, newest submitted first, then by identifier.

        Read from the database, so that it goes through finished tasks, too; what is only in memory
        (`persist=False`) is not among them. Pages stay stable while tasks change: nothing comes
        twice, and nothing is left out that was there before the first page and still fits.

        Args:
            filter: `None` for all tasks.
            after: `after` of the page before; `None` for the first.
            limit: How many at most.

        Raises:
            InvalidDataError: If a condition of the filter, or the cursor, makes no sense.
        """
        self._check_usable()
        page = await self.task_repo.list_tasks(filter, after=after, limit=limit)
        await self._replica.reach(max((task.version for task in page), default=0))
        return page

    async def cancel_tasks(
        self, filter: TaskFilter | None = None, reason: str | None = None
    ) -> list[str]:
        """Cancel the live tasks that a filter means; others write in between.

        Args:
            filter: `None` for all tasks.
            reason: Becomes the `error` of the tasks, and is in the feed.

        Returns:
            Identifiers of the tasks it cancelled.

        Raises:
            InvalidDataError: If a condition of the filter, or the reason, makes no sense.
            BackendError: If the database could not be written; what is cancelled by then is. The
                call can be repeated.
        """
        self._check_usable()
        checked = check_filter(filter)
        if reason is not None:
            check_text("reason", reason)
        return await self._scheduler.cancel_all(checked, reason)

    async def claim_tasks(self, node_id: str, limit: int = 1) -> list[Task]:
        """Hand pending tasks to a node: it owns them until it finishes them, or is lost.

        The node gets due tasks whose required skills it has, by priority, time of submission and
        identifier, as many as it has places for; none unless it is ONLINE. They are SCHEDULED on
        it, and its `running_tasks` counts them until they are done: do not report that figure with
        its heartbeats as well. Which tasks are best is told from memory; each is handed out once,
        whoever else may claim at the same time.

        Args:
            limit: How many at most.

        Returns:
            The tasks, best first; an empty list if there is nothing to do.

        Raises:
            NodeNotFoundError: If there is no such node.
        """
        self._check_usable()
        node_id = check_key("node_id", node_id)
        claimed = await self._scheduler.claim(node_id, check_some("limit", limit))
        return list(map(Record.copy, claimed))

    async def start_task(self, task: Task) -> Task:
        """Its node begins to run a task that it has claimed.

        The owner of a task is told by `assigned_node` and `attempt`; nothing else of `task` counts,
        and it is left as it is. To say so twice changes nothing.

        Returns:
            The task as it is stored.

        Raises:
            TaskNotFoundError: If it was removed meanwhile.
            NotOwnerError: If its node does not hold this attempt any more.
        """
        return await self._advance(start_of(task))

    async def complete_task(self, task: Task, result: Any = None) -> Task:
        """Its node has completed a task; as `start_task`.

        Args:
            result: Any JSON value.

        Raises:
            TaskNotFoundError: If it was removed meanwhile.
            NotOwnerError: If its node does not hold this attempt any more.
            InvalidDataError: If the result cannot be stored.
        """
        return await self._advance(completion_of(task, result))

    async def fail_task(self, task: Task, error: str) -> Task:
        """Its node has failed to do a task; as `start_task`.

        The task is PENDING again, and due after the manager's `backoff`; after its last retry
        (`max_retries`) it is FAILED.

        Raises:
            TaskNotFoundError: If it was removed meanwhile.
            NotOwnerError: If its node does not hold this attempt any more.
        """
        return await self._advance(failure_of(task, error, self._backoff.draw()))

    async def cancel_task(self, task_id: str, reason: str | None = None) -> bool:
        """End a task that nobody needs any more; `False` if there is none.

        Args:
            reason: Becomes the `error` of the task, and is in the feed.

        Raises:
            InvalidTransitionError: If it is finished otherwise.
        """
        self._check_usable()
        return await is_known(self._scheduler.advance(cancellation_of(task_id, reason)))

    async def requeue_task(self, task_id: str) -> bool:
        """Have a task run again, as if it never had been; `False` if there is none.

        It is the only way out of a finished state. A task that is scheduled or running is taken
        from its node.

        Raises:
            DuplicateError: If another live task has its idempotency key by now.
        """
        self._check_usable()
        return await is_known(self._scheduler.advance(requeue_of(task_id)))

    async def recover(self, timeout_seconds: float = 120) -> Recovery:
        """Take tasks from nodes that are not alive, and those that run for longer than they may.

        Sets silent nodes OFFLINE. What is scheduled or running on a node that was silent for too
        long, that is OFFLINE or in ERROR, or that there is not (any more), is PENDING again, with
        one retry less, or FAILED with the error `node lost`. What runs for longer than its
        `timeout` is PENDING again, or has TIMEOUT. What would wait for its next try for longer than
        the backoff ever says, since a clock was turned back, is due at once. To be called every now
        and then, by any number of coordinators: each task has one outcome.

        Args:
            timeout_seconds: How long a node may be silent.

        Returns:
            All that this call has done.
        """
        self._check_usable()
        return await self._scheduler.recover(timeout_seconds)

    async def explain_task(self, task_id: str) -> Explanation:
        """Why a task waits, as data; `str` of it is a sentence.

        Raises:
            TaskNotFoundError: If there is none.
        """
        self._check_usable()
        return await self._scheduler.explain(check_key("task_id", task_id))

    async def _advance(self, operation: Advance) -> Task:
        self._check_usable()
        return (await self._scheduler.advance(operation)).record.copy()

    async def wait_for_task(self, task_id: str, timeout: float | None = None) -> Task:
        """The task, as soon as it is finished.

        Args:
            timeout: Seconds to wait at most; `None` for no limit.

        Raises:
            TaskNotFoundError: If there is none, or it was removed meanwhile.
            DeadlineError: If it is not finished in time.
            UnavailableError: If the manager is shut down meanwhile.
        """
        limit = None if timeout is None else check_number("timeout", timeout)
        task_id = check_key("task_id", task_id)
        try:
            async with asyncio.timeout(limit):
                while True:
                    self._check_usable()
                    with self._replica.watchers.next_change_of(task_id) as woken:
                        task = await self.get_task(task_id)
                        if task is None:
                            raise TaskNotFoundError(task_id)
                        if task.status in FINISHED:
                            return task
                        await woken
        except TimeoutError as error:
            raise DeadlineError(
                f"task {task_id!r} is not finished after {timeout:g} s: wait again, or cancel it"
            ) from error
