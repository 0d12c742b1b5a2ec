"""The pytest plugin: fixtures of `openclaw_store.testing` for programs that use the store.

Pytest imports every installed plugin in every run, before it measures coverage. Therefore the
plugin is no part of the library, and imports it only in fixtures.
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
    """The clock of the store: `advance(seconds=…)` moves it, `now` can be set."""
    from openclaw_store.testing import FakeClock

    return FakeClock()


@pytest.fixture
def openclaw_make_task(openclaw_clock: FakeClock) -> TaskFactory:
    """A factory of tasks: `openclaw_make_task(name="train")`."""
    from openclaw_store.testing import TaskFactory

    return TaskFactory(openclaw_clock)


@pytest.fixture
def openclaw_make_node(openclaw_clock: FakeClock) -> NodeFactory:
    """A factory of nodes: `openclaw_make_node(available_skills=["gpu"])`."""
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
    """The location of the database, a file in a folder of its own; override it for another."""
    path = tmp_path_factory.mktemp("openclaw") / "cluster.db"
    return shutil.copy(_openclaw_empty, path)  # with its permissions


@pytest.fixture
def _openclaw_asyncio(request: pytest.FixtureRequest) -> None:
    """Fail with an advice if no plugin runs asynchronous fixtures."""
    # The option shows that pytest-asyncio is active, under any name.
    has_asyncio = hasattr(request.config.option, "asyncio_mode")
    if not has_asyncio and "anyio_backend" not in request.fixturenames:
        pytest.fail("the store needs an event loop: pip install pytest-asyncio", pytrace=False)


@async_fixture
async def openclaw_database(
    _openclaw_asyncio: None, openclaw_location: str | Path, openclaw_clock: FakeClock
) -> AsyncIterator[Database]:
    """An open, empty database with the clock `openclaw_clock`."""
    from openclaw_store import Database

    async with Database(openclaw_location, clock=openclaw_clock) as database:
        yield database


@async_fixture
async def openclaw_manager(openclaw_database: Database) -> AsyncIterator[StateManager]:
    """A StateManager on `openclaw_database` that synchronises only on request."""
    from openclaw_store import StateManager

    async with StateManager(openclaw_database, auto_sync_interval=None) as manager:
        yield manager
