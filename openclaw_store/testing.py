"""A test kit for programs that use the store; nothing in it needs a test framework.

The pytest plugin that is installed with the library, `pytest_openclaw_store`, makes fixtures of
it.
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
    """A clock that moves only when it is told to, for `Database(clock=…)`.

    What the store waits for itself (`wait_for_task(timeout=…)`, `auto_sync_interval`) goes by the
    time of the event loop.
    """

    def __init__(self, now: datetime = datetime(2026, 3, 1, 12, tzinfo=UTC)) -> None:
        self.now = now

    def __call__(self) -> datetime:
        return self._now

    @property
    def now(self) -> datetime:
        """The time of the clock, which can be set; a naive one is read as local time."""
        return self._now

    @now.setter
    def now(self, moment: datetime) -> None:
        self._now = check_time("now", moment)

    def advance(self, seconds: float = 0, **units: float) -> datetime:
        """Let time pass: `seconds`, and whatever else `timedelta` takes; returns the new time."""
        self.now += timedelta(seconds=seconds, **units)
        return self.now


class _Factory:
    def __init__(self, clock: Clock = utc_now) -> None:
        """Make a factory.

        Args:
            clock: Says when what it makes is submitted, or registered.
        """
        self._clock = clock
        self._numbers = count(1)


class TaskFactory(_Factory):
    """Makes tasks with different identifiers; a test spells out only the fields it is about."""

    def __call__(self, **fields: Any) -> Task:
        """A pending task; `fields` are those of `Task`."""
        number = next(self._numbers)
        defaults: dict[str, Any] = {
            "task_id": f"task-{number:04}",
            "task_type": TaskType.BATCH,
            "name": f"task number {number}",
            "submitted_at": self._clock(),
        }
        return Task(**{**defaults, **fields})


class NodeFactory(_Factory):
    """Makes nodes with different identifiers; a test spells out only the fields it is about."""

    def __call__(self, **fields: Any) -> NodeInfo:
        """A node that is ONLINE; `fields` are those of `NodeInfo`."""
        number = next(self._numbers)
        defaults: dict[str, Any] = {
            "node_id": f"node-{number:04}",
            "hostname": f"host-{number}",
            "registered_at": self._clock(),
        }
        return NodeInfo(**{**defaults, **fields})


def create_database(location: str | Path) -> None:
    """Make a migrated, empty database; may be called whether an event loop runs or not.

    Tests are faster if each has a copy of one file than if each makes its own.
    """

    async def create() -> None:
        async with Database(location):
            pass

    with ThreadPoolExecutor(1) as another_thread:
        another_thread.submit(asyncio.run, create()).result()
