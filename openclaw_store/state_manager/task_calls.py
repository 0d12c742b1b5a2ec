"""Calls of a `StateManager` for tasks."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from threading import get_ident
from typing import Any

from openclaw_store.domain import (
    FINISHED,
    Record,
    Task,
    TaskStatus,
    check_key,
    check_limit,
    check_number,
    check_positive,
    write_back,
)
from openclaw_store.errors import (
    DeadlineError,
    DuplicateError,
    InvalidDataError,
    StoreError,
    TaskNotFoundError,
)
from openclaw_store.repositories import admit_entity, check_ids, commands, encode_result, is_known
from openclaw_store.repositories.tasks import ID_BATCH_SIZE
from openclaw_store.state_manager.direct_access import DirectAccess
from openclaw_store.state_manager.explain import Explanation
from openclaw_store.state_manager.manager_base import ManagerBase
from openclaw_store.state_manager.scheduler import Recovery
from openclaw_store.state_manager.task_batches import admit_batch, after_others, insert_batch
from openclaw_store.state_manager.task_index import PendingKey

LONGEST_KEPT_LIST = 1000
"""Tasks of a list that are kept as records. The rows of a longer list are decoded each time: as
records, they would make each full pass of the garbage collector longer."""


class TaskCalls(ManagerBase):
    """Read, write, assign and finish tasks."""

    async def get_task(self, task_id: str) -> Task | None:
        """Return a task, finished or not; `None` if there is none."""
        # The usual case takes no further call: this is the most frequent read.
        if self._thread != get_ident() or not self._is_running():
            self._check_usable()
        try:
            record = self._replica.cache.tasks.entries.get(task_id)
        except TypeError:  # not hashable; `check_key` refuses it below
            record = None
        if type(record) is Record and record.is_small:
            return record.copy()
        found = await self._replica.find((Task, check_key("task_id", task_id)))
        return None if found is None else (await self._replica.slices.copies([found]))[0]

    async def get_pending_tasks(self, limit: int | None = 50) -> list[Task]:
        """Return pending and scheduled tasks by priority, time of submission and identifier.

        Args:
            limit: Maximum number of tasks; `None` returns all.
        """
        self._check_usable()
        limit = check_limit(limit)
        if isinstance(self._replica, DirectAccess):
            return await self.task_repo.list_pending_tasks(limit)
        return await self._copies(self._replica.cache.task_index.pending.first(limit))

    async def list_waiting(self, limit: int | None = 50) -> list[Task]:
        """Return pending tasks, due or not, by priority, time of submission and identifier.

        Scheduled tasks, which `get_pending_tasks` contains, are left out.

        Args:
            limit: Maximum number of tasks; `None` returns all.
        """
        self._check_usable()
        limit = check_limit(limit)
        if isinstance(self._replica, DirectAccess):
            return await self.task_repo.list_waiting(limit)
        index = self._replica.cache.task_index
        assigned = set[str]().union(*index.assigned.values())
        keys = index.pending.first(None if limit is None else limit + len(assigned))
        return await self._copies([key for key in keys if key[2] not in assigned][:limit])

    async def _copies(self, keys: Sequence[PendingKey]) -> list[Task]:
        """Return the tasks of keys of the index, all as they are at this moment."""
        tasks = self._replica.cache.tasks
        if len(keys) > LONGEST_KEPT_LIST:
            now = tasks.snapshot()
            return await self._replica.slices.copies(now.record(id) for _, _, id in keys)
        found = [(id, tasks.entries[id]) for _, _, id in keys]
        return await self._replica.slices.copies(tasks.read(id, entry) for id, entry in found)

    async def get_tasks(self, ids: Iterable[str]) -> list[Task | None]:
        """Return the tasks with these identifiers, in their order; `None` for an unknown one.

        The tasks that are not in memory are read together.
        """
        self._check_usable()
        wanted = check_ids(ids)
        found: dict[str, Record[Task] | None] = {}
        for start in range(0, len(wanted), ID_BATCH_SIZE):
            if start:  # a task may have to be decoded
                await asyncio.sleep(0)
            part = wanted[start : start + ID_BATCH_SIZE]
            found.update((id, self._replica.cache.task(id)) for id in part)
        unknown = [id for id, record in found.items() if record is None]
        for start in range(0, len(unknown), ID_BATCH_SIZE):
            read = await self.task_repo.get_records(unknown[start : start + ID_BATCH_SIZE])
            await self._replica.catch_up_to(max((one.version for one in read.values()), default=0))
            found.update(read)
        cache = self._replica.cache  # may be newer by now
        records = [cache.task(id) or found[id] for id in wanted]
        copies = iter(await self._replica.slices.copies(filter(None, records)))
        return [None if one is None else next(copies) for one in records]

    async def add_task(self, task: Task, persist: bool = True) -> bool:
        """Add a task; `task` receives its version and its times in UTC.

        Args:
            persist: `False` keeps the task in memory until the next synchronisation.

        Raises:
            DuplicateError: If a task with this identifier exists.
            InvalidDataError: If a field cannot be stored.
        """
        self._check_usable()
        record = await admit_entity(self.task_repo, task, is_new=True)
        create = commands.Create(Task, record.task_id, record, record.idempotency_key)
        added = self._replica.submit(create) if persist else self._replica.write_behind.add(record)
        write_back(await added, task)
        return True

    async def update_task(self, task: Task, persist: bool = True) -> bool:
        """Write a changed task back; `task` receives the new version and can be changed again.

        Args:
            persist: `False` keeps the change in memory until the next synchronisation.

        Raises:
            TaskNotFoundError: If the task was removed.
            StaleVersionError: If the task was changed since it was read. Read it again, or use
                `change_task`.
            InvalidDataError: If a field cannot be stored.
        """
        return await self._update(self.task_repo, task, persist)

    async def change_task(self, task_id: str, fn: Callable[[Task], object]) -> Task | None:
        """Read a task, change it and write it back, without losing a concurrent change.

        Args:
            fn: Changes the copy that it receives. It is called again, with a new copy, if the
                task was changed meanwhile.

        Returns:
            The stored task; `None` if there is none.

        Raises:
            InvalidDataError: If a field cannot be stored.
            ConflictError: If the task was an unsaved entry and the database had newer data.
        """
        return await self._change(self.task_repo, check_key("task_id", task_id), fn)

    async def remove_task(self, task_id: str) -> bool:
        """Remove a task and free its slot on its node; `False` if there is none."""
        self._check_usable()
        return await self._replica.remove((Task, check_key("task_id", task_id)))

    delete_task = remove_task

    async def submit_task(self, task: Task) -> Task:
        """Add a task, unless a live task has the same idempotency key.

        The call can be repeated safely: it then returns the task added by the first call.

        Returns:
            The stored task, which is the added one or the live one with this key.

        Raises:
            DuplicateError: If another task has this identifier.
            InvalidDataError: If a field cannot be stored.
        """
        while True:
            try:
                await self.add_task(task)
            except DuplicateError as error:
                # Not from the cache: another process may have set the key just now.
                found = await self.task_repo.get(error.id)
                key = task.idempotency_key
                if found is not None and key is not None and found.idempotency_key == key:
                    await self._replica.catch_up_to(found.version)
                    return found
                if error.idempotency_key is None:
                    raise
                # Another task had the key, and was removed or changed meanwhile: try again.
            else:
                record = await admit_entity(self.task_repo, task)
                return (await self._replica.slices.copies([record]))[0]

    async def add_tasks(self, tasks: Iterable[Task]) -> list[StoreError | None]:
        """Add many tasks; each task receives its version and its times in UTC.

        Each batch of 1,000, or of 200 while others write, is one transaction. After an error, a
        note on it gives the number of tasks processed so far. The call can be repeated: tasks that
        exist are refused.

        Returns:
            One entry for each task, in order. It is `None` if the task was added, otherwise its
            `DuplicateError` or `InvalidDataError`.

        Raises:
            BackendError: If the database could not be written.
            InvalidDataError: If the database refuses a row of a batch.
        """
        self._check_usable()
        if not isinstance(tasks, Iterable):
            raise InvalidDataError("tasks", f"must be tasks, not {type(tasks).__name__}")
        outcomes: list[StoreError | None] = []
        admit = partial(admit_batch, self.task_repo, self.db, iter(tasks))
        batch = await admit()
        while batch.outcomes:
            # The next tasks are checked while these are written.
            ahead = asyncio.ensure_future(after_others(admit))
            try:
                await insert_batch(self._replica, batch)
                outcomes += batch.outcomes
                batch = await ahead
            except BaseException as error:
                ahead.cancel()
                error.add_note(f"{len(outcomes)} tasks were processed before this error")
                raise
        return outcomes

    async def claim_tasks(
        self,
        node_id: str,
        limit: int = 1,
        *,
        wait_seconds: float | None = None,
        start: bool = False,
    ) -> list[Task]:
        """Assign pending tasks to a node, which then owns them until they end or it is lost.

        The node must be ONLINE. It gets due tasks that require only skills it has, in the order of
        priority, time of submission and identifier, at most one for each free slot. If more than
        1,000 of them have a `not_before`, it chooses among the ones that were due first. The tasks
        become SCHEDULED and count in the node's `running_tasks`, so do not report that figure with
        heartbeats. Concurrent claims, in any number of processes, never get the same task.

        Each 200 tasks are claimed in one transaction, and other callers write in between. If the
        process ends before this returns, or an error is raised (a note on it gives the number of
        claimed tasks), the node keeps the tasks claimed so far until it registers again.

        Args:
            limit: Maximum number of tasks.
            wait_seconds: Seconds to wait for a task if there is none; `None` returns at once.
            start: Start the tasks in the same commit: they are RUNNING, and `start_task` is not
                needed.

        Returns:
            The claimed tasks, best first; an empty list if there are none for this node.

        Raises:
            NodeNotFoundError: If there is no such node.
        """
        self._check_usable()
        node_id = check_key("node_id", node_id)
        limit = check_positive("limit", limit)
        if wait_seconds is None:
            return await self._scheduler.claim(node_id, limit, start=start)
        seconds = check_number("wait_seconds", wait_seconds)
        return await self._scheduler.wait_and_claim(node_id, limit, seconds, start=start)

    async def start_task(self, task: Task) -> Task:
        """Set a claimed task to RUNNING, on behalf of its node.

        Only `task_id`, `assigned_node` and `attempt` of `task` are read; `task` is not changed.
        Repeating the call has no effect.

        Returns:
            The stored task.

        Raises:
            TaskNotFoundError: If the task was removed.
            NotOwnerError: If the task is no longer assigned to this node for this attempt.
        """
        return await self._advance(commands.start_of(task))

    async def complete_task(self, task: Task, result: Any = None) -> Task:
        """Set a task to COMPLETED with its result, on behalf of its node, as in `start_task`.

        Args:
            task: The task as it was claimed or started.
            result: Any JSON value.

        Raises:
            TaskNotFoundError: If the task was removed.
            NotOwnerError: As in `start_task`.
            InvalidDataError: If the result cannot be stored.
        """
        self._check_usable()
        text = await encode_result(self.db, result)
        return await self._advance(commands.completion_of(task, text))

    async def fail_task(
        self,
        task: Task,
        error: str | BaseException,
        retry: bool = True,
        *,
        timed_out: bool = False,
    ) -> Task:
        """Report a failed attempt on behalf of the node of a task, as in `start_task`.

        The task is PENDING again, and due after the delay of the manager's `backoff`. After its
        last retry (`max_retries`) it is FAILED, or TIMEOUT.

        Args:
            error: A text, or an exception: its type and text.
            retry: `False` ends the task at once, for an error that a retry cannot cure.
            timed_out: The attempt exceeded the `timeout` of the task, which is TIMEOUT in place of
                FAILED at the end, as by `recover`.

        Raises:
            TaskNotFoundError: If the task was removed.
            NotOwnerError: As in `start_task`.
        """
        wait = self._backoff.draw() if retry else None
        status = TaskStatus.TIMEOUT if timed_out else TaskStatus.FAILED
        return await self._advance(commands.failure_of(task, error, wait, status))

    async def release_task(self, task: Task, reason: str | None = None) -> Task:
        """Give a task back on behalf of its node, as in `start_task`: it is PENDING at once.

        The task loses neither a retry nor its place in the order of claims.

        Args:
            reason: The reason in the change log, after `released`.

        Raises:
            TaskNotFoundError: If the task was removed.
            NotOwnerError: As in `start_task`.
        """
        return await self._advance(commands.release_of(task, reason))

    async def cancel_task(
        self, task_id: str, reason: str | None = None, grace_seconds: float | None = None
    ) -> bool:
        """Cancel a live task; return `False` if there is no such task.

        Without `grace_seconds` the task is CANCELLED at once, and frees its slot. Its owner learns
        of that from `watch`, or when its report is refused: until then, its work goes on. With
        `grace_seconds`, a running task keeps its slot and gets `cancel_requested_at`; it is
        CANCELLED when its owner calls `acknowledge_cancel`, or by `recover` after that time.

        Repeating the call has no effect.

        Args:
            reason: The `error` of the task; the change log contains it, too.
            grace_seconds: Seconds that the owner of a running task has to end its work.

        Raises:
            InvalidTransitionError: If the task has finished with another status.
        """
        self._check_usable()
        cancellation = commands.cancellation_of(task_id, reason, grace_seconds=grace_seconds)
        return await is_known(self._scheduler.advance(cancellation))

    async def acknowledge_cancel(self, task: Task) -> Task:
        """Cancel a task on behalf of its node, as in `start_task`, after its work has ended.

        Raises:
            TaskNotFoundError: If the task was removed.
            NotOwnerError: As in `start_task`.
            InvalidTransitionError: If its owner was not asked to cancel it.
        """
        return await self._advance(commands.acknowledgement_of(task))

    async def requeue_task(self, task_id: str) -> bool:
        """Set a task to PENDING with all its retries; return `False` if there is no such task.

        This is the only way out of a finished status. A scheduled or running task is taken away
        from its node.

        Raises:
            DuplicateError: If another live task has its idempotency key.
        """
        self._check_usable()
        return await is_known(self._scheduler.advance(commands.requeue_of(task_id)))

    async def recover(
        self, timeout_seconds: float = 120, unstarted_seconds: float | None = None
    ) -> Recovery:
        """Release tasks of lost nodes, and end the tasks that are late.

        First, silent nodes are set OFFLINE. A scheduled or running task is released if its node is
        OFFLINE or in ERROR, silent, or removed. If it had not started, it is PENDING again at no
        cost. A running one counts a loss: it is PENDING again, at once after its first loss and
        with the delays of the manager's `backoff` after later ones, or FAILED with the error
        `lost too often` beyond its `max_losses`.

        A task that runs for longer than its `timeout` is PENDING again with one retry less, or gets
        the status TIMEOUT. A task that has not started at its `expires_at` gets the status TIMEOUT.
        A task whose owner was asked to cancel it, and did not in time, is CANCELLED. A retry that
        is later than any backoff allows, because a clock was turned back, becomes due. Call this
        regularly, in any number of processes: each task has one outcome.

        Args:
            timeout_seconds: Seconds without a heartbeat after which a node is silent that has no
                `lease_seconds`.
            unstarted_seconds: Seconds after which a task that its node has claimed and not started
                is PENDING again; `None` for no limit.

        Returns:
            All changes of this call.
        """
        self._check_usable()
        return await self._scheduler.recover(timeout_seconds, unstarted_seconds)

    async def explain_task(self, task_id: str) -> Explanation:
        """Explain why a task waits; `str` of the result is a sentence.

        Raises:
            TaskNotFoundError: If there is no such task.
        """
        self._check_usable()
        return await self._scheduler.explain(check_key("task_id", task_id))

    async def _advance(self, operation: commands.Advance) -> Task:
        self._check_usable()
        done = await self._scheduler.advance(operation)
        return (await self._replica.slices.copies([done.record]))[0]

    async def wait_for_task(self, task_id: str, timeout: float | None = None) -> Task:
        """Wait until a task is finished, and return it.

        Args:
            timeout: Maximum time in seconds; `None` for no limit.

        Raises:
            TaskNotFoundError: If there is no such task, or it is removed meanwhile.
            DeadlineError: If the task is not finished in time.
            UnavailableError: If the manager is shut down meanwhile.
        """
        limit = None if timeout is None else check_number("timeout", timeout)
        task_id = check_key("task_id", task_id)
        try:
            async with asyncio.timeout(limit):
                while True:
                    self._check_usable()
                    # Wait before the read: a change in between must wake this.
                    with self._replica.watchers.next_change(task_id) as woken:
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
