"""How SQLite finds rows: what the store sends with a filter is searched by an index.

Every statement is explained as it was sent, and whatever the planner believes of the tables.
"""

from __future__ import annotations

import asyncio
import re
import shutil
import sqlite3
from collections.abc import AsyncIterator, Awaitable, Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, suppress
from datetime import UTC, datetime, timedelta
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Self

import pytest
from conftest import FakeClock, MakeTask

from openclaw_store import (
    Database,
    DuplicateError,
    NodeInfo,
    NodeRepository,
    Task,
    TaskFilter,
    TaskRepository,
    TaskStatus,
    TaskType,
)
from openclaw_store.archive.restore import restore_tasks
from openclaw_store.archive.retain import retain
from openclaw_store.backends.sqlite import connections as sqlite_connections
from openclaw_store.domain import Retention
from openclaw_store.repositories import pages
from openclaw_store.state_manager.change_feed import read_change_batch, read_live
from openclaw_store.testing import NodeFactory, TaskFactory

pytestmark = pytest.mark.sqlite

Call = Callable[[Database], Awaitable[object]]

# A row of that index is the answer; the search ends there.
_SCAN = r"SCAN (TABLE )?(tasks|nodes|changes)\b(?! USING INDEX ix_tasks_preferring)"

Statement = tuple[str, Any]
"""The text that was sent, and one set of its parameters."""


@pytest.fixture
def sent(monkeypatch: pytest.MonkeyPatch) -> list[Statement]:
    """What any connection of the store sends, whichever way."""
    statements: list[Statement] = []

    class Cursor(sqlite3.Cursor):
        def execute(self, sql: str, parameters: Any = (), /) -> Self:
            statements.append((sql, parameters))
            return super().execute(sql, parameters)

        def executemany(self, sql: str, parameters: Any, /) -> Self:
            statements.extend((sql, row) for row in parameters)
            return super().executemany(sql, parameters)

    def cursor(connection: sqlite3.Connection, factory: object = None) -> sqlite3.Cursor:
        return Cursor(connection)

    monkeypatch.setattr(sqlite_connections.WriteConnection, "cursor", cursor)
    return statements


STATES = {"uncounted": 9, "finished": 10, "mostly finished": 9, "live": 0, "few": 9}
"""States in which SQLite counted a database, or did not; each with finished tasks out of ten."""


@pytest.fixture(scope="module", params=STATES)
def state(
    request: pytest.FixtureRequest, migrated_sqlite: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, datetime]:
    """A database of which SQLite has no statistics, or which it counted in a certain state.

    The rows may be quite different by now, so no statistics must lead to a slow plan.
    """
    path = tmp_path_factory.mktemp("state") / "cluster.db"
    shutil.copy(migrated_sqlite, path)
    clock = FakeClock()
    with ThreadPoolExecutor(1) as thread:
        thread.submit(asyncio.run, fill(path, request.param, clock)).result()
    return path, clock()


async def fill(path: Path, state: str, clock: FakeClock) -> None:
    make_task, make_node = TaskFactory(clock), NodeFactory(clock)
    async with Database(path, clock=clock) as database:
        tasks, nodes = TaskRepository(database), NodeRepository(database)
        writes = [nodes.create(make_node()) for _ in range(100)]
        for number in range(500):
            moment = clock.advance(seconds=1)
            is_done = number % 10 < STATES[state]
            task = make_task(
                status=TaskStatus.COMPLETED if is_done else TaskStatus.PENDING,
                assigned_node=f"node-{number % 100 + 1:04}",
                submitted_at=moment,
                completed_at=moment if is_done else None,
                user_id=f"user-{number % 20}",
            )
            writes.append(tasks.create(task))
        if state == "few":
            few, writes = writes[95:105], [*writes[:95], *writes[105:]]
            await asyncio.gather(*few)
            analyze(path)
        await asyncio.gather(*writes)
        await nodes.update_heartbeat("node-0001")
        if state not in ("uncounted", "few"):
            analyze(path)


@pytest.fixture
async def filled(
    state: tuple[Path, datetime], location: Path, clock: FakeClock
) -> AsyncIterator[Database]:
    """The database of a state, at `location`."""
    path, clock.now = state
    shutil.copy(path, location)
    async with Database(location, clock=clock) as database:
        yield database


def analyze(location: Path) -> None:
    """Have SQLite count the rows there are."""
    with closing(sqlite3.connect(location)) as connection:
        connection.execute("ANALYZE")
        connection.commit()


def tasks(database: Database) -> TaskRepository:
    return TaskRepository(database)


def nodes(database: Database) -> NodeRepository:
    return NodeRepository(database)


async def create(database: Database) -> None:
    made = [Task(f"new-{number}", TaskType.BATCH, "new") for number in range(3)]
    await asyncio.gather(*map(tasks(database).create, made))


async def update(database: Database) -> None:
    found = await tasks(database).list_by_user("user-1")
    for task in found:
        task.error = "updated"
    await asyncio.gather(*map(tasks(database).update, found))


async def live(database: Database) -> None:
    async with database.session() as session:
        async for _ in read_live(session):
            pass


async def batch(database: Database) -> None:
    async with database.session() as session:
        await session.run_sync(read_change_batch, since=500, heartbeat_sequence=0, is_complete=True)


async def claim(database: Database) -> None:
    await nodes(database).register(NodeInfo("claimer", "host"))
    pending = [Task(f"to-claim-{number}", TaskType.BATCH, "new") for number in range(2)]
    await asyncio.gather(*map(tasks(database).create, pending))
    for task in await tasks(database).claim("claimer", 2):
        await tasks(database).complete(await tasks(database).start(task))
    await nodes(database).register(NodeInfo("claimer", "host"))  # which looks for what it holds


async def submit_twice(database: Database) -> None:
    for number in range(2):
        task = Task(f"keyed-{number}", TaskType.BATCH, "new", idempotency_key="once")
        with suppress(DuplicateError):
            await tasks(database).create(task)


async def archive(database: Database) -> None:
    with TemporaryDirectory() as folder:
        policy = Retention(completed=timedelta(0), archive=folder)
        await retain(database, policy)
        await restore_tasks(database, folder, TaskFilter(user="user-1"))
        await retain(database, policy)  # which removes past changes, too


def listing(**conditions: Any) -> Call:
    """A second page of a list."""

    async def call(database: Database) -> None:
        filter = TaskFilter(**conditions)
        page = await tasks(database).list_tasks(filter, limit=2)
        await tasks(database).list_tasks(filter, after=page.after, limit=2)

    return call


CALLS: dict[str, Call] = {
    "get": lambda database: tasks(database).get("task-0001"),
    "get node": lambda database: nodes(database).get("node-0001"),
    "by status": lambda database: tasks(database).list_by_status(TaskStatus.PENDING, 50),
    "finished": lambda database: tasks(database).list_by_status(TaskStatus.COMPLETED, 50),
    "all by status": lambda database: tasks(database).list_by_status(TaskStatus.RUNNING),
    "by node": lambda database: tasks(database).list_by_node("node-0001"),
    "by user": lambda database: tasks(database).list_by_user("user-1"),
    "pending": lambda database: tasks(database).list_pending_tasks(),
    "all pending": lambda database: tasks(database).list_pending_tasks(None),
    "count": lambda database: tasks(database).count_by_status(TaskStatus.RUNNING),
    "count finished": lambda database: tasks(database).count_tasks(
        TaskFilter(finished_after=timedelta(hours=1))
    ),
    "count by user": lambda database: tasks(database).count_tasks(TaskFilter(user="user-1")),
    "waiting": lambda database: tasks(database).list_waiting(),
    "get many": lambda database: tasks(database).get_tasks(["task-0001", "task-0002", "none"]),
    "clean-up": lambda database: tasks(database).cleanup_old_tasks(days=0),
    "old": lambda database: tasks(database).count_old_tasks(days=0),
    "create": create,
    "update": update,
    "delete": lambda database: tasks(database).delete("task-0001"),
    "heartbeat": lambda database: nodes(database).update_heartbeat("node-0001"),
    "claim": claim,
    "submit twice": submit_twice,
    "list": listing(),
    "list by status": listing(status=[TaskStatus.PENDING, TaskStatus.COMPLETED]),
    "list by node": listing(node="node-0001"),
    "list by user": listing(user="user-1", status=TaskStatus.COMPLETED),
    "list by completion": listing(completed_from=datetime(2020, 1, 1, tzinfo=UTC)),
    "list finished": listing(finished_after=timedelta(days=36_500)),
    "live": live,
    "batch": batch,
    "archive": archive,
}
"""Everything with a limit or a selective filter.

Not the lists of nodes: there are a thousand at most, and most of them are in each list.
"""


@pytest.mark.parametrize("call", CALLS.values(), ids=CALLS.keys())
async def test_filters_are_searched_by_an_index_and_limits_need_no_sorting(
    filled: Database, location: Path, sent: list[Statement], call: Call
) -> None:
    await call(filled)

    searched = [(sql, values) for sql, values in sent if re.search(r"\b(WHERE|JOIN)\b", sql)]
    assert searched
    with closing(sqlite3.connect(location)) as connection:
        for sql, values in searched:
            plan = connection.execute(f"EXPLAIN QUERY PLAN {sql}", values).fetchall()
            steps = [detail for *_, detail in plan]
            assert not [step for step in steps if re.match(_SCAN, step)], sql
            # By its status, SQLite would read all finished tasks to find some of a time.
            if re.search(r"completed_at (<|>=) \?", sql):
                assert "INDEX ix_tasks_completed_at (" in str(steps), sql
            # Tasks of the same moment may be sorted by identifier; those of one user, where SQLite
            # believes there is but one; and a limited number that were completed in a time.
            if "ix_tasks_user_id" not in str(steps) and "completed_at >" not in sql:
                assert not ("LIMIT" in sql and "TEMP B-TREE FOR ORDER BY" in str(steps)), sql


@pytest.mark.parametrize("condition", [{"skill": "cobol"}, {"name_contains": "no such name"}])
async def test_list_that_finds_nothing_reads_the_first_tasks_and_then_the_table_in_its_order(
    database: Database,
    location: Path,
    sent: list[Statement],
    make_task: MakeTask,
    monkeypatch: pytest.MonkeyPatch,
    condition: dict[str, Any],
) -> None:
    """All tasks were read one by one in the order of the list, at twice the time."""
    monkeypatch.setattr(pages, "_FIRST_TASKS", 5)
    finished = [make_task(status=TaskStatus.COMPLETED) for _ in range(20)]
    await asyncio.gather(*map(tasks(database).create, finished))
    sent.clear()

    wanted = TaskFilter(status=TaskStatus.COMPLETED, **condition)
    page = await tasks(database).list_tasks(wanted)

    assert page.tasks == []
    plans = []
    with closing(sqlite3.connect(location)) as connection:
        for sql, values in sent:
            if "instr(" in sql:
                plan = connection.execute(f"EXPLAIN QUERY PLAN {sql}", values)
                plans.append(plan.fetchone()[-1])
    assert len(plans) == 2
    assert "INDEX ix_tasks_status (status=? AND submitted_at>?)" in plans[0]
    assert re.fullmatch(_SCAN, plans[1])
