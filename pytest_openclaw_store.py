"""The pytest plugin: fixtures of `openclaw_store.testing` for the tests of programs that use it.

It stands beside the library, because pytest imports every plugin that is installed, whoever's tests
it runs, and before coverage is measured. So it imports the library only in a fixture.
"""

from __future__ import annotations

import shutil
from collections.abc import AsyncIterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

try:
    from pytest_asyncio import fixture as async_fixture
except ImportError:
    async_fixture = pytest.fixture  # type: ignore[assignment]  # has fewer arguments

if TYPE_CHECKING:
    from openclaw_store import Database, StateManager
    from openclaw_store.testing import FakeClock, NodeFactory, TaskFactory


@pytest.fixture
def openclaw_clock() -> FakeClock:
    """The time of the store: `advance(seconds=…)` lets it pass, `now` can be set."""
    from openclaw_store.testing import FakeClock

    return FakeClock()


@pytest.fixture
def openclaw_make_task(openclaw_clock: FakeClock) -> TaskFactory:
    """Makes tasks: `openclaw_make_task(name="train")`."""
    from openclaw_store.testing import TaskFactory

    return TaskFactory(openclaw_clock)


@pytest.fixture
def openclaw_make_node(openclaw_clock: FakeClock) -> NodeFactory:
    """Makes nodes: `openclaw_make_node(available_skills=["gpu"])`."""
    from openclaw_store.testing import NodeFactory

    return NodeFactory(openclaw_clock)


@pytest.fixture(scope="session")
def _openclaw_empty(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An empty database that all tests copy."""
    from openclaw_store.testing import create_database

    path = tmp_path_factory.mktemp("openclaw_empty") / "cluster.db"
    create_database(path)
    return path


@pytest.fixture
def openclaw_location(
    _openclaw_empty: Path, tmp_path_factory: pytest.TempPathFactory
) -> str | Path:
    """Where the database is: a file in a folder of its own; override it for another place."""
    path = tmp_path_factory.mktemp("openclaw") / "cluster.db"
    return shutil.copyfile(_openclaw_empty, path)


@pytest.fixture
def _openclaw_asyncio(request: pytest.FixtureRequest) -> None:
    """Says what is missing, if nothing runs asynchronous fixtures."""
    has_asyncio = hasattr(request.config.option, "asyncio_mode")  # by whatever name it was loaded
    if not has_asyncio and "anyio_backend" not in request.fixturenames:
        pytest.fail("the store needs an event loop: pip install pytest-asyncio", pytrace=False)


@async_fixture
async def openclaw_database(
    _openclaw_asyncio: None, openclaw_location: str | Path, openclaw_clock: FakeClock
) -> AsyncIterator[Database]:
    """An open, empty database that goes by `openclaw_clock`."""
    from openclaw_store import Database

    async with Database(openclaw_location, clock=openclaw_clock) as database:
        yield database


@async_fixture
async def openclaw_manager(openclaw_database: Database) -> AsyncIterator[StateManager]:
    """A StateManager on `openclaw_database` that synchronises only when it is told to."""
    from openclaw_store import StateManager

    async with StateManager(openclaw_database, auto_sync_interval=None) as manager:
        yield manager
