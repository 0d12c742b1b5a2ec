"""Pages of the change log: their bounds, and the content of their tasks."""

from __future__ import annotations

import sqlite3
from collections.abc import Collection
from contextlib import closing, suppress
from pathlib import Path
from typing import Any

import pytest
from conftest import MakeTask, OpenManager

from openclaw_store import Database, InvalidDataError, StateManager, TaskRepository
from openclaw_store.backends.sqlite import connections as sqlite_connections
from openclaw_store.state_manager import change_feed as pages
from openclaw_store.state_manager.change_feed import (
    ENTITY_ID,
    STEP_WIDTH,
    ChangeBatch,
    read_change_batch,
)

LARGE = {"text": "x" * 500_000}


@pytest.fixture
def bound(monkeypatch: pytest.MonkeyPatch) -> int:
    """Bytes of a page, less than of a `LARGE` value; a task of up to a kilobyte is small."""
    monkeypatch.setattr(pages, "PAGE_BYTES", 400_000)
    return 400_000


@pytest.fixture
def length_limit(monkeypatch: pytest.MonkeyPatch) -> int:
    """The longest text that SQLite makes for a reader; a billion bytes by default."""
    limit, initialize = 600_000, sqlite_connections.ReadConnection.__init__

    def connect(
        connection: sqlite_connections.ReadConnection, *arguments: Any, **options: Any
    ) -> None:
        initialize(connection, *arguments, **options)
        connection.setlimit(sqlite3.SQLITE_LIMIT_LENGTH, limit)

    monkeypatch.setattr(sqlite_connections.ReadConnection, "__init__", connect)
    return limit


async def page_after(database: Database, since: int, known: Collection[int] = ()) -> ChangeBatch:
    async with database.session() as session:
        return await session.run_sync(
            read_change_batch, since=since, heartbeat_sequence=0, is_complete=True, known=known
        )


def contents(page: ChangeBatch) -> list[tuple[str, bool]]:
    """The identifier of each change, and whether it comes with its task."""
    return [(row[ENTITY_ID], row[STEP_WIDTH] == row[ENTITY_ID]) for row in page.changes]


async def test_many_large_tasks_are_followed(
    length_limit: int, bound: int, manager: StateManager, make_task: MakeTask,
    open_manager: OpenManager,
) -> None:  # fmt: skip
    """26 tasks with two JSON fields of 16 MiB once were too much for one text of SQLite's."""
    other = await open_manager()
    half = {"text": "x" * 100_000}
    tasks = [make_task(parameters=half, metadata=half) for _ in range(26)]
    assert 26 * 200_000 > length_limit > bound
    await manager.add_tasks(tasks)

    await other.refresh_from_database()

    assert other.version == manager.version == 26
    assert await other.get_state() == await manager.get_state()


async def test_large_task_is_alone_on_its_page(
    bound: int, database: Database, make_task: MakeTask
) -> None:
    tasks = TaskRepository(database)
    for id in ("first", "second", "third"):
        await tasks.create(make_task(task_id=id, parameters=LARGE))

    found = [await page_after(database, since) for since in range(3)]

    assert [contents(page) for page in found] == [
        [(id, True)] for id in ("first", "second", "third")
    ]
    assert [page.revision for page in found] == [1, 2, 3]
    assert [page.read_at for page in found] == [3, 3, 3]
    assert all(page.is_complete for page in found)


async def test_medium_tasks_share_a_page_until_it_is_full(
    bound: int, database: Database, make_task: MakeTask
) -> None:
    tasks = TaskRepository(database)
    for number in range(6):
        size = 150_000 if number % 2 else 10  # every other one is read with the page
        await tasks.create(make_task(task_id=str(number), parameters={"text": "x" * size}))

    page = await page_after(database, 0)

    assert contents(page) == [(str(number), True) for number in range(6)]
    assert page.revision == 6
    assert sum(len(str(row)) for row in page.changes) > bound  # the last one made it full


async def test_page_that_ends_early_has_the_content_of_all_its_tasks(
    bound: int, database: Database, make_task: MakeTask
) -> None:
    """The last change of the small task is on the next page, and its content belongs to it."""
    tasks = TaskRepository(database)
    small = make_task(task_id="small")
    await tasks.create(small)
    await tasks.create(make_task(task_id="large", parameters=LARGE))
    await tasks.update(small)

    page = await page_after(database, 0)

    assert contents(page) == [("small", True), ("large", True)]
    assert page.revision == 2


async def test_unknown_change_before_a_known_one_comes_with_its_task(
    database: Database, make_task: MakeTask
) -> None:
    tasks = TaskRepository(database)
    task = make_task(task_id="task")
    await tasks.create(task)
    await tasks.update(task)

    page = await page_after(database, 0, known={2})

    assert contents(page) == [("task", True)]
    assert page.revision == 2
    assert page.is_complete


async def test_changes_of_removed_tasks_come_without_content(
    database: Database, make_task: MakeTask
) -> None:
    tasks = TaskRepository(database)
    await tasks.create(make_task(task_id="removed"))
    await tasks.delete("removed")

    page = await page_after(database, 0)
    ignored = await page_after(database, 0, known={2})

    assert contents(page) == [("removed", False), ("removed", False)]
    assert contents(ignored) == [("removed", False)]


@pytest.mark.sqlite
@pytest.mark.parametrize("column", ["parameters", "name", "result"])
@pytest.mark.parametrize("value", ["x'ff'", "CAST(x'ff' AS TEXT)"])
async def test_task_that_cannot_be_read_does_not_stop_following(
    manager: StateManager, make_task: MakeTask, open_manager: OpenManager, location: Path,
    column: str, value: str,
) -> None:  # fmt: skip
    other = await open_manager()
    for id in ("damaged", "sound"):
        await manager.add_task(make_task(task_id=id))
    with closing(sqlite3.connect(location, isolation_level=None)) as connection:
        connection.execute(f"UPDATE tasks SET {column} = {value} WHERE task_id = 'damaged'")

    with suppress(InvalidDataError):  # it may name the damaged task, but only once
        await other.refresh_from_database()
    await other.refresh_from_database()

    assert other.version == manager.version == 2
    assert await other.get_task("sound") == await manager.get_task("sound")
