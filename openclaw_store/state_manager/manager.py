"""`StateManager`: the cluster's state, answered from memory and kept in a database."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from functools import partial
from typing import Any

from openclaw_store.domain import (
    Change,
    ClusterState,
    check_count,
    check_key,
)
from openclaw_store.errors import (
    UnavailableError,
)
from openclaw_store.repositories import (
    compact_feed,
    read_history,
)
from openclaw_store.state_manager.node_calls import NodeCalls
from openclaw_store.state_manager.task_calls import TaskCalls
from openclaw_store.state_manager.watchers import WATCH_SECONDS


class StateManager(TaskCalls, NodeCalls):
    """Cluster state: answered from memory, kept in a database.

    **Durability.** When a write returns, it is committed. Two exceptions: heartbeats are flushed
    within a second, and what was added or updated with `persist=False` by the next
    `sync_to_database`.
    **Freshness.** A read sees this process's writes at once, those of others as soon as it is told
    of them, within 100 ms; at the latest after the next `refresh_from_database`, within
    `auto_sync_interval` seconds. What was seen once never goes back. (A write by another event
    loop of this process is seen after a turn of this one.)
    **Isolation.** What is handed out is the caller's own copy. A write from an outdated copy
    raises `StaleVersionError`; `change_task` and `change_node` read, change and write safely.
    **Sharing.** One instance serves any number of coroutines of one event loop. Any number of
    instances, in any number of processes, may share a database.

    Args:
        database: The database; `shutdown` closes it.
        auto_sync_interval: Seconds between synchronisations; `None` for none but manual ones.
        finished_cache_size: How many finished tasks are kept in memory; the others are read from
            the database when they are asked for.
        wake_ups: Whether it is told at once when other processes have committed, which takes a
            thread on SQLite and a connection on PostgreSQL. Without `auto_sync_interval` it is not.
        backoff: How long a task that has failed waits for its next try.

    Attributes:
        db: The database.
        task_repo: Its tasks, without the cache.
        node_repo: Its nodes, without the cache.
    """

    async def get_state(self) -> ClusterState:
        """The cluster at this moment, in constant time."""
        self._check_usable()
        return self._replica.cache.state()

    async def get_task_stats(self) -> dict[str, int]:
        """How many tasks there are in the database: `total`, and one key for each status."""
        self._check_usable()
        counts = self._replica.cache.task_stats()
        return {"total": sum(counts.values()), **counts}

    async def get_node_stats(self) -> dict[str, int]:
        """How many nodes there are in the database: `total`, `online`, `offline`, and `busy`.

        Busy are those with the status BUSY, and those that are ONLINE and full.
        """
        self._check_usable()
        return self._replica.cache.node_stats()

    async def get_stats(self) -> dict[str, Any]:
        """Figures for who operates it: those of `Database.get_stats`, and of what is in memory.

        Returns:
            Besides: `last_sync_at` and `last_refresh_at`, when the last one of each was complete
            (loading the state is a refresh; `None` before the first); `cached_tasks`;
            `unsaved_entries` and `unsaved_heartbeats`, which are still to be written.
        """
        self._check_usable()
        return {
            **await self.db.get_stats(),
            "last_sync_at": self._replica.last_sync_at,
            "last_refresh_at": self._replica.last_refresh_at,
            **self._replica.cache.sizes(),
        }

    def watch(self, since: int | None = None) -> AsyncIterator[Change]:
        """Every change that is committed after a revision, by this and by other processes.

        They come in order, each once, and have been taken over into memory by then. It reads the
        feed as it goes, so a slow watcher costs nobody anything; and it goes on where it was left
        if it is given the `revision` of the last change that was seen, also after a restart. It
        ends when the manager is shut down. Changes of tasks that `cleanup_old_tasks` has removed
        are gone with them, but for the last one.

        Args:
            since: A revision; `None` for the newest one in memory, so that `get_state` and what is
                watched after it make the whole.

        Raises:
            CompactedError: If the feed does not reach back that far any more; it says how far.
            InvalidDataError: If there was no such revision yet.
        """
        self._check_usable()
        return self._watch(self.version if since is None else check_count("since", since))

    async def _watch(self, since: int) -> AsyncIterator[Change]:
        while self.is_initialized:
            self._check_usable()
            with self._replica.watchers.next_change() as woken:
                try:
                    changes, until = await self._replica.changes(since)
                except UnavailableError:
                    if self.is_initialized:
                        raise
                    return  # it was shut down meanwhile
                for change in changes:
                    yield change
                if until == since:  # there is no more for now
                    await asyncio.wait([woken], timeout=WATCH_SECONDS)
                since = until

    async def history(self, task_id: str) -> list[Change]:
        """The changes of a task since it was added, oldest first, as far as the feed reaches.

        Of a task that was removed it gives what is left, and searches the whole feed for it.
        """
        self._check_usable()
        return await self.db.read(partial(read_history, id=check_key("task_id", task_id)))

    async def compact_changes(self, days: float = 30) -> int:
        """Remove what is older from the feed of changes; tasks and nodes stay as they are.

        `watch` and `history` do not reach further back then. The newest change always stays. A
        change by a clock that was ahead is as old as those around it. Works in batches, and can be
        called again after an error.

        Args:
            days: Age in days, from 0.

        Returns:
            How many changes were removed.
        """
        self._check_usable()
        return await compact_feed(self.db, days)

    async def sync_to_database(self) -> bool:
        """Write what is only in memory; `True`.

        Raises:
            UnsavedConflictError: If entries lost to newer data in the database. They were
                dropped; everything else is written.
            BackendError: If the database could not be written; nothing was dropped.
        """
        self._check_usable()
        await self._replica.sync()
        return True

    async def refresh_from_database(self) -> bool:
        """Take over what other processes have committed; `True`.

        Costs what has changed, not what is cached.

        Raises:
            InvalidDataError: If somebody wrote by hand what cannot be read; it took over the rest.
        """
        self._check_usable()
        await self._replica.refresh()
        return True
