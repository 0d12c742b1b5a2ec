"""A test kit for programs that use the store, without a dependency on a test framework.

The installed pytest plugin, `pytest_openclaw_store`, provides it as fixtures.
"""

from __future__ import annotations

import asyncio
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from itertools import count
from pathlib import Path
from typing import Any

from openclaw_store.database import Database
from openclaw_store.domain import Clock, NodeInfo, Task, TaskType, check_time, utc_now


class FakeClock:
    """A clock for `Database(clock=…)` that moves only on request.

    Waits of the store itself (`wait_for_task(timeout=…)`, `auto_sync_interval`) use the clock of
    the event loop.
    """

    def __init__(self, now: datetime = datetime(2026, 3, 1, 12, tzinfo=UTC)) -> None:
        self.now = now

    def __call__(self) -> datetime:
        return self._now

    @property
    def now(self) -> datetime:
        """The time of the clock. It can be set; a naive time is read as local time."""
        return self._now

    @now.setter
    def now(self, moment: datetime) -> None:
        self._now = check_time("now", moment)

    def advance(self, seconds: float = 0, **units: float) -> datetime:
        """Move the clock by `seconds` and other units of `timedelta`; return the new time."""
        self.now += timedelta(seconds=seconds, **units)
        return self.now


class _Factory:
    def __init__(self, clock: Clock = utc_now) -> None:
        """Make a factory; `clock` gives the times of submission and registration."""
        self._clock = clock
        self._numbers = count(1)


class TaskFactory(_Factory):
    """Makes tasks with different identifiers; a test sets only the fields that it tests."""

    def __call__(self, **fields: Any) -> Task:
        """Return a pending task with the given fields of `Task`."""
        number = next(self._numbers)
        defaults: dict[str, Any] = {
            "task_id": f"task-{number:04}",
            "task_type": TaskType.BATCH,
            "name": f"task number {number}",
            "submitted_at": self._clock(),
        }
        return Task(**{**defaults, **fields})


class NodeFactory(_Factory):
    """Makes nodes with different identifiers; a test sets only the fields that it tests."""

    def __call__(self, **fields: Any) -> NodeInfo:
        """Return an ONLINE node with the given fields of `NodeInfo`."""
        number = next(self._numbers)
        defaults: dict[str, Any] = {
            "node_id": f"node-{number:04}",
            "hostname": f"host-{number}",
            "registered_at": self._clock(),
        }
        return NodeInfo(**{**defaults, **fields})


def create_database(location: str | Path) -> None:
    """Create a migrated, empty database, with or without a running event loop.

    Tests are faster if each copies one such file instead of creating its own.
    """

    async def create() -> None:
        async with Database(location):
            pass

    with ThreadPoolExecutor(1) as another_thread:
        another_thread.submit(asyncio.run, create()).result()
