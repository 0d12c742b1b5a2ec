"""The test kit: by itself, and as the fixtures that pytest finds wherever the library is."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from support.pages import DOCS, blocks

import pytest_openclaw_store
from openclaw_store import Database, NodeStatus, TaskStatus, TaskType, utc_now
from openclaw_store.domain.validation import read_time
from openclaw_store.testing import FakeClock, NodeFactory, TaskFactory, create_database

pytest_plugins = ["pytester"]

PAGE = DOCS / "how-to" / "testing.md"

USER_TESTS = """
import asyncio
import threading

import pytest

from openclaw_store import Database, NodeStatus, StateManager, TaskRepository


@pytest.fixture
def clock(): ...  # names of the user's own: no fixture of ours has them


@pytest.fixture
def manager(): ...


opened = []


MARK
async def test_manager_and_factories(openclaw_manager, openclaw_make_task, openclaw_make_node):
    opened.append(openclaw_manager)
    task, node = openclaw_make_task(name="train"), openclaw_make_node(max_concurrent_tasks=1)
    assert await openclaw_manager.add_task(task) and await openclaw_manager.add_node(node)
    assert [t.name for t in await openclaw_manager.claim_tasks(node.node_id)] == ["train"]


MARK
async def test_each_test_has_a_database_of_its_own(openclaw_manager, openclaw_location, tmp_path):
    assert await openclaw_manager.get_pending_tasks() == []
    assert openclaw_location.is_file() and list(tmp_path.iterdir()) == []


MARK
async def test_time_is_the_clock_s(openclaw_manager, openclaw_clock, openclaw_make_node):
    node = openclaw_make_node(last_heartbeat=openclaw_clock.now)
    await openclaw_manager.add_node(node)
    openclaw_clock.advance(minutes=3)
    assert await openclaw_manager.check_stale_nodes() == [node.node_id]


MARK
async def test_store_is_there_after_a_restart(
    openclaw_manager, openclaw_location, openclaw_clock, openclaw_make_task
):
    await openclaw_manager.add_task(openclaw_make_task(task_id="t"))
    await openclaw_manager.shutdown()
    async with StateManager(Database(openclaw_location, clock=openclaw_clock)) as manager:
        assert (await manager.get_task("t")).submitted_at == openclaw_clock()


MARK
async def test_database_without_a_manager(openclaw_database, openclaw_make_task):
    opened.append(openclaw_database)
    assert await TaskRepository(openclaw_database).create(openclaw_make_task())


def test_everything_was_closed():
    from openclaw_store import UnavailableError

    manager, database = opened
    assert not manager.is_initialized
    with pytest.raises(UnavailableError, match="closed"):
        asyncio.run(TaskRepository(database).get("t"))
    for thread in threading.enumerate():
        if thread.name.startswith("openclaw"):
            thread.join(10)  # it was told to end
            assert not thread.is_alive()


class TestElsewhere:
    @pytest.fixture
    def openclaw_location(self, tmp_path):
        return f"sqlite:///{tmp_path}/mine.db"

    MARK
    async def test_location_can_be_overridden(self, openclaw_manager, tmp_path):
        assert (tmp_path / "mine.db").exists()
"""


class TestFakeClock:
    def test_moves_only_when_it_is_told_to(self) -> None:
        clock = FakeClock()
        noon = datetime(2026, 3, 1, 12, tzinfo=UTC)

        assert [clock(), clock(), clock.now] == [noon] * 3
        assert clock.advance(90, days=1) == clock() == noon + timedelta(days=1, seconds=90)
        assert clock.advance(-30) == clock.now == noon + timedelta(days=1, seconds=60)

    def test_can_be_set_and_reads_a_naive_time_as_local(self) -> None:
        naive = datetime(2030, 1, 1)
        clock = FakeClock(naive)

        assert (clock(), clock().tzinfo) == (naive.astimezone(UTC), UTC)
        clock.now = datetime(2031, 1, 1, tzinfo=UTC)
        assert clock() == datetime(2031, 1, 1, tzinfo=UTC)


class TestFactories:
    def test_each_makes_different_ones_that_the_store_takes(self) -> None:
        clock = FakeClock()
        make_task, make_node = TaskFactory(clock), NodeFactory(clock)

        task, other = make_task(), make_task(status=TaskStatus.FAILED, result=[1])
        node, another = make_node(), make_node(hostname="h")

        assert task.to_dict() != other.to_dict()
        assert task.task_id != other.task_id
        assert node.node_id != another.node_id
        assert (task.task_type, task.status) == (TaskType.BATCH, TaskStatus.PENDING)
        assert (other.status, other.result) == (TaskStatus.FAILED, [1])
        assert (node.status, another.hostname) == (NodeStatus.ONLINE, "h")
        assert task.submitted_at == node.registered_at == clock()

    @pytest.mark.parametrize("factory", [TaskFactory, NodeFactory])
    def test_unknown_field_is_an_error_and_the_time_is_now_without_a_clock(
        self, factory: Callable[[], Callable[..., Any]]
    ) -> None:
        before = utc_now()
        made = factory()().to_dict()

        assert before <= read_time("", made.get("submitted_at") or made["registered_at"])
        with pytest.raises(TypeError, match="colour"):
            factory()(colour="red")


async def test_database_is_created_while_a_loop_runs(tmp_path: Path) -> None:
    create_database(tmp_path / "cluster.db")

    async with Database(tmp_path / "cluster.db") as database:
        await database.initialize(migrate=False)  # it has the newest schema


def test_library_brings_no_framework_for_tests_or_the_command_line() -> None:
    frameworks = {"pytest", "_pytest", "pytest_asyncio", "hypothesis", "rich", "typer", "fastapi"}
    script = f"import openclaw_store.testing, sys; print({frameworks} & sys.modules.keys())"

    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", script], capture_output=True, text=True, check=False
    )

    assert (done.stdout, done.stderr) == ("set()\n", "")


class TestPlugin:
    """Each runs pytest as a user does, in an interpreter of its own."""

    @staticmethod
    def run(pytester: pytest.Pytester, tests: str, *options: str, **outcomes: int) -> str:
        pytester.makepyfile(tests)
        unneeded = ("cacheprovider", "hypothesispytest", "pytest_cov", "xdist")  # slow to import
        without = [f"-pno:{plugin}" for plugin in unneeded]
        result = pytester.runpytest_subprocess("-W", "error", *without, *options)
        result.assert_outcomes(**outcomes)
        return result.stdout.str()

    def test_fixtures_work_in_strict_mode(self, pytester: pytest.Pytester) -> None:
        tests = USER_TESTS.replace("MARK", "@pytest.mark.asyncio")

        self.run(pytester, tests, *loops("function", "strict"), passed=7)

    def test_fixtures_and_the_example_work_in_auto_mode_with_one_loop_for_all(
        self, pytester: pytest.Pytester
    ) -> None:
        [example] = [block for block in blocks(PAGE, "python") if "openclaw_clock" in block.text]
        pytester.makepyfile(test_example=example.text)

        self.run(pytester, USER_TESTS.replace("MARK", ""), *loops("session", "auto"), passed=8)

    def test_fixtures_work_with_anyio(self, pytester: pytest.Pytester) -> None:
        backend = "\n@pytest.fixture\ndef anyio_backend():\n    return 'asyncio'\n"
        tests = USER_TESTS.replace("MARK", "@pytest.mark.anyio") + backend

        self.run(pytester, tests, "-p", "no:asyncio", passed=7)

    def test_without_an_event_loop_it_says_what_to_install(self, pytester: pytest.Pytester) -> None:
        tests = "def test_it(openclaw_manager): ...\n"

        printed = self.run(pytester, tests, "-p", "no:asyncio", "-p", "no:anyio", errors=1)

        assert "the store needs an event loop: pip install pytest-asyncio" in printed

    def test_whoever_does_not_use_it_does_not_import_the_library(
        self, pytester: pytest.Pytester
    ) -> None:
        tests = """
            import sys

            def test_it(pytestconfig):
                assert pytestconfig.pluginmanager.has_plugin("openclaw_store")
                assert {"openclaw_store", "sqlalchemy", "orjson"}.isdisjoint(sys.modules)
        """

        self.run(pytester, tests, *loops("function", "strict"), passed=1)

    def test_page_names_all_fixtures(self) -> None:
        fixtures = [name for name in vars(pytest_openclaw_store) if name.startswith("openclaw")]
        page = PAGE.read_text(encoding="utf-8")

        assert len(fixtures) == 6
        assert [name for name in fixtures if f"| `{name}` |" not in page] == []


def loops(scope: str, mode: str) -> list[str]:
    """Options of pytest-asyncio: how long a loop lives, and which tests it runs."""
    scopes = [f"-oasyncio_default_{what}_loop_scope={scope}" for what in ("fixture", "test")]
    return [f"--asyncio-mode={mode}", *scopes]
