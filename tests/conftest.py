"""What all tests share: a database of each kind, a settable clock, rows, and a search for leaks."""

from __future__ import annotations

import asyncio
import shutil
import threading
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack
from datetime import UTC, datetime, timedelta
from itertools import count
from pathlib import Path
from typing import Any, Protocol

import pytest
from hypothesis import settings

from openclaw_store import Database, NodeInfo, StateManager, Task, TaskType

settings.register_profile("openclaw_store", deadline=None)  # the machine may be busy
settings.load_profile("openclaw_store")

MakeTask = Callable[..., Task]
MakeNode = Callable[..., NodeInfo]


class FakeClock:
    """A clock that moves only when it is told to."""

    def __init__(self, now: datetime = datetime(2026, 3, 1, 12, tzinfo=UTC)) -> None:
        self.now = now

    def __call__(self) -> datetime:
        return self.now

    def advance(self, seconds: float = 0, **units: float) -> datetime:
        """Let time pass: `seconds`, and whatever else `timedelta` takes; returns the new time."""
        self.now += timedelta(seconds=seconds, **units)
        return self.now


class OpenManager(Protocol):
    """Opens one more StateManager on the same location."""

    def __call__(
        self, *, auto_sync_interval: float | None = None, finished_cache_size: int = 10_000
    ) -> Awaitable[StateManager]: ...


@pytest.fixture(autouse=True)
async def nothing_leaks() -> AsyncIterator[None]:
    """Fails a test that leaves threads or asyncio tasks behind."""
    threads, tasks = set(threading.enumerate()), asyncio.all_tasks()

    def leaks() -> list[object]:
        own = {asyncio.current_task()}
        return [
            *(
                thread
                for thread in set(threading.enumerate()) - threads
                if not thread.name.startswith("asyncio_")  # of the loop's own executor
            ),
            *(asyncio.all_tasks() - tasks - own),
        ]

    yield
    for _ in range(1000):  # threads that were told to end need a moment
        if not leaks():
            break
        await asyncio.sleep(0.005)
    assert not leaks()


@pytest.fixture
def clock() -> FakeClock:
    """The time of the store."""
    return FakeClock()


@pytest.fixture(params=["sqlite"])
def location(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """Where a database may be made; there is none yet."""
    return tmp_path / "cluster.db"


@pytest.fixture(scope="session")
def migrated(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A migrated, empty database to copy, which is faster than to migrate one for each test."""
    path = tmp_path_factory.mktemp("migrated") / "cluster.db"
    asyncio.run(_migrate(path))
    return path


async def _migrate(path: Path) -> None:
    async with Database(path):
        pass


@pytest.fixture
async def database(location: Path, migrated: Path, clock: FakeClock) -> AsyncIterator[Database]:
    """A migrated, empty database of each kind; a leaked connection fails the test."""
    shutil.copyfile(migrated, location)
    async with Database(location, clock=clock) as database:
        yield database
        assert database.checked_out_connections == 0


@pytest.fixture
async def manager(database: Database) -> AsyncIterator[StateManager]:
    """A StateManager on `database` that synchronises only when it is told to."""
    async with StateManager(database, auto_sync_interval=None) as manager:
        yield manager
        assert database.checked_out_connections == 0


@pytest.fixture
async def open_manager(location: Path, clock: FakeClock) -> AsyncIterator[OpenManager]:
    """Opens further StateManagers on the same location, each with a Database of its own."""
    async with AsyncExitStack() as stack:

        async def open_one(
            *, auto_sync_interval: float | None = None, finished_cache_size: int = 10_000
        ) -> StateManager:
            manager = StateManager(
                Database(location, clock=clock),
                auto_sync_interval,
                finished_cache_size=finished_cache_size,
            )
            await stack.enter_async_context(manager)
            if auto_sync_interval is None:  # else it may be reading just then
                stack.callback(assert_nothing_checked_out, manager.db)
            return manager

        yield open_one


def assert_nothing_checked_out(database: Database) -> None:
    assert database.checked_out_connections == 0


@pytest.fixture
def make_task(clock: FakeClock) -> MakeTask:
    """Makes tasks; a test spells out only the fields it is about."""
    numbers = count(1)

    def make(**fields: Any) -> Task:
        number = next(numbers)
        defaults: dict[str, Any] = {
            "task_id": f"task-{number:04}",
            "task_type": TaskType.BATCH,
            "name": f"task number {number}",
            "submitted_at": clock(),
        }
        return Task(**{**defaults, **fields})

    return make


@pytest.fixture
def make_node(clock: FakeClock) -> MakeNode:
    """Makes nodes; a test spells out only the fields it is about."""
    numbers = count(1)

    def make(**fields: Any) -> NodeInfo:
        number = next(numbers)
        defaults: dict[str, Any] = {
            "node_id": f"node-{number:04}",
            "hostname": f"host-{number}",
            "registered_at": clock(),
        }
        return NodeInfo(**{**defaults, **fields})

    return make
