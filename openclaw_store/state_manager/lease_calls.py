"""Calls of a `StateManager` for the lease of a node, and the progress of its tasks."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Mapping
from functools import partial

from openclaw_store.domain import FINISHED, Progress, Task, check_key, encode_progress
from openclaw_store.errors import TaskNotFoundError
from openclaw_store.repositories import Lease, apply_progress, read_lease, read_progress
from openclaw_store.state_manager.manager_base import ManagerBase
from openclaw_store.state_manager.watchers import WATCH_SECONDS


class LeaseCalls(ManagerBase):
    """Renew the lease of a node; read the progress of tasks."""

    async def renew_lease(
        self, node_id: str, progress: Mapping[str, Progress] | None = None
    ) -> Lease | None:
        """Write a heartbeat, and return the lease for the process of the node.

        Other than with `update_heartbeat`, the heartbeat is committed when this returns.

        Args:
            progress: The progress of all tasks that the node runs, by identifier; `None` keeps the
                one before. It is no change of a task, and raises no version.

        Returns:
            The session and the tasks of the node; `None` if there is no such node.
        """
        self._check_usable()
        node_id = check_key("node_id", node_id)
        writes = [self._replica.write_heartbeat(node_id)]
        if progress is not None:  # submitted together, they share a commit
            writes.append(self.db.write(apply_progress, (node_id, encode_progress(progress))))
        await asyncio.gather(*writes)
        return await self.get_lease(node_id)

    async def get_lease(self, node_id: str) -> Lease | None:
        """Return the session and the tasks of a node, from the database; `None` without a node."""
        self._check_usable()
        read = partial(read_lease, node_id=check_key("node_id", node_id))
        return await self.db.read(read, is_one_statement=True)

    async def get_progress(self, task_id: str) -> Progress | None:
        """Return the newest progress of a running task, as its handler reported it.

        Returns:
            `None` if there is no such task, it does not run, or its handler has reported nothing.
        """
        self._check_usable()
        read = partial(read_progress, ids=[check_key("task_id", task_id)])
        return (await self.db.read(read, is_one_statement=True)).get(task_id)

    async def watch_progress(self, task_id: str) -> AsyncIterator[Progress]:
        """Iterate over the progress of a task, until it is finished.

        Progress arrives with the heartbeats of its worker, every few seconds; only the newest one
        is kept. A task that runs again begins again.

        Raises:
            TaskNotFoundError: If there is no such task, or it is removed meanwhile.
            UnavailableError: If the manager is shut down meanwhile.
        """
        task_id = check_key("task_id", task_id)
        last: Progress | None = None
        while True:
            self._check_usable()
            # Wait before the read: a change in between must wake this.
            with self._replica.watchers.next_change(task_id) as woken:
                task = await self._replica.find((Task, task_id))
                if task is None:
                    raise TaskNotFoundError(task_id)
                if task.status in FINISHED:
                    return
                progress = await self.get_progress(task_id)
                if progress is not None and progress != last:
                    last = progress
                    yield progress
                await asyncio.wait([woken], timeout=WATCH_SECONDS)
