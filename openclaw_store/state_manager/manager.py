"""`StateManager`: the state of the cluster, answered from memory and kept in a database."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from functools import partial
from typing import Any

from openclaw_store.domain import Change, ClusterState, check_count, check_key
from openclaw_store.errors import UnavailableError
from openclaw_store.repositories import compact_feed, read_history
from openclaw_store.state_manager.filter_calls import FilterCalls
from openclaw_store.state_manager.lease_calls import LeaseCalls
from openclaw_store.state_manager.node_calls import NodeCalls
from openclaw_store.state_manager.task_calls import TaskCalls
from openclaw_store.state_manager.watchers import WATCH_SECONDS


class StateManager(TaskCalls, NodeCalls, LeaseCalls, FilterCalls):
    """Cluster state: answered from memory, kept in a database.

    **Durability.** When a write returns, it is committed. There are two exceptions: heartbeats are
    flushed within a second, and entries written with `persist=False` by the next
    `sync_to_database`.
    **Freshness.** A read sees the writes of this process at once. It sees the writes of another
    process when the notification of the commit arrives, normally within 100 ms; at the latest
    after the next refresh, within `auto_sync_interval` seconds. A later read never shows an older
    state. (A write by another event loop of this process is seen after a turn of this one.)
    **Isolation.** Each returned object is the caller's own copy. A write from an outdated copy
    raises `StaleVersionError`; `change_task` and `change_node` read, change and write safely.
    **Sharing.** One instance serves any number of coroutines of one event loop. Any number of
    instances, in any number of processes, may share a database.

    Args:
        database: The database; `shutdown` closes it.
        auto_sync_interval: Seconds between two synchronisations; `None` turns them off.
        cache: Keep a copy of the cluster in memory. `False` suits a process that only claims and
            reports tasks: it starts at once, and answers every call from the database. It takes
            no `persist=False`.
        finished_cache_size: Maximum number of finished tasks in memory; a read of any other
            finished task goes to the database.
        wake_ups: Receive a notification at each commit of another process. This takes a thread on
            SQLite and a connection on PostgreSQL. It is off without `auto_sync_interval`.
        backoff: The delay of a failed task before its next attempt.
        retention: The ages at which finished tasks and old changes leave the database. One process
            at a time applies it, from `initialize` to `shutdown`.

    Attributes:
        db: The database.
        task_repo: The tasks in the database, without the cache.
        node_repo: The nodes in the database, without the cache.
    """

    async def get_state(self) -> ClusterState:
        """Return a snapshot of the cluster, in constant time with a cache."""
        self._check_usable()
        return (await self._replica.view()).state()

    async def get_task_stats(self) -> dict[str, int]:
        """Return the number of tasks in the database: `total`, and one key for each status."""
        self._check_usable()
        counts = (await self._replica.view(with_tasks=False)).task_stats()
        return {"total": sum(counts.values()), **counts}

    async def get_node_stats(self) -> dict[str, int]:
        """Return the number of nodes in the database: `total`, `online`, `offline` and `busy`.

        A node is busy if its status is BUSY, or if it is ONLINE without a free slot.
        """
        self._check_usable()
        return (await self._replica.view(with_tasks=False)).node_stats()

    async def get_stats(self) -> dict[str, Any]:
        """Return metrics of the database and of the cache, for monitoring.

        Returns:
            The metrics of `Database.get_stats`, and besides

            - `last_sync_at` and `last_refresh_at`, the end of the last complete synchronisation
              and refresh; `None` before the first one (the initial load is a refresh),
            - `cached_tasks`, the number of tasks in memory,
            - `unsaved_entries` and `unsaved_heartbeats`, the numbers not yet written.
        """
        self._check_usable()
        return {
            **await self.db.get_stats(),
            "last_sync_at": self._replica.last_sync_at,
            "last_refresh_at": self._replica.last_refresh_at,
            **self._replica.cache.sizes(),
        }

    def watch(self, since: int | None = None) -> AsyncIterator[Change]:
        """Iterate over all changes after a revision, made by this and by other processes.

        Changes come in the order of their revisions, each exactly once, and the cache has applied
        a change before it is yielded. To resume, also after a restart, pass the `revision` of the
        last change seen. A slow watcher delays nothing: it reads the change log at its own pace.
        The iteration ends when the manager is shut down. `cleanup_old_tasks` removes the changes
        of a task with the task, except for the last one.

        Args:
            since: The revision to start after; `None` starts after the newest one in memory, which
                continues a snapshot of `get_state` taken at the same moment.

        Raises:
            CompactedError: If changes after `since` were removed; read the state again, and
                continue from its version.
            InvalidDataError: If `since` is larger than the newest revision.
        """
        self._check_usable()
        return self._watch(self.version if since is None else check_count("since", since))

    async def _watch(self, since: int) -> AsyncIterator[Change]:
        is_read = False  # the log was read up to `since`, and nothing has happened after it
        while self.is_initialized:
            self._check_usable()
            # Wait before the read: a change between the read and the wait must wake this.
            with self._replica.watchers.next_change() as woken:
                until = since
                changes = self._replica.changes_in_memory(since)
                if changes:
                    until, is_read = changes[-1].revision, True
                elif not is_read or since < self.version:
                    try:
                        changes, until = await self._replica.changes(since)
                    except UnavailableError:
                        if self.is_initialized:
                            raise
                        return  # shut down during the read
                for change in changes:
                    yield change
                if until == since:  # the end of the log
                    await asyncio.wait([woken], timeout=WATCH_SECONDS)
                    is_read = woken.done()
                since = until

    async def history(self, task_id: str) -> list[Change]:
        """Return the changes of a task, oldest first, unless `compact_changes` removed them.

        For a removed task this searches the whole change log.
        """
        self._check_usable()
        return await self.db.read(partial(read_history, id=check_key("task_id", task_id)))

    async def compact_changes(self, days: float = 30) -> int:
        """Remove old changes from the change log; tasks and nodes stay.

        `watch` and `history` no longer return these changes. The newest change always stays. A
        change with a time in the future is as old as its neighbours in the log. The changes are
        removed in batches; after an error, call again.

        Args:
            days: Minimum age in days, from 0.

        Returns:
            The number of removed changes.
        """
        self._check_usable()
        return await compact_feed(self.db, days)

    async def sync_to_database(self) -> bool:
        """Flush all unsaved entries and heartbeats to the database; return `True`.

        Raises:
            UnsavedConflictError: If the database had newer data for some entries. These entries
                were dropped; all other ones are written.
            BackendError: If the database could not be written; nothing was dropped.
        """
        self._check_usable()
        await self._replica.sync()
        return True

    async def refresh_from_database(self) -> bool:
        """Apply the changes committed by other processes to the cache; return `True`.

        The cost depends on the number of changes, not on the size of the cache.

        Raises:
            InvalidDataError: If a row written by hand cannot be read; the rest was applied.
        """
        self._check_usable()
        await self._replica.refresh()
        return True
