"""Pages of the change log: their bounds, and the content of their tasks."""

from __future__ import annotations

import sqlite3
from collections.abc import Collection
from functools import partial
from typing import Any

import pytest
from conftest import Location, MakeNode, MakeTask, OpenManager, execute

from openclaw_store import Database, InvalidDataError, NodeRepository, StateManager, TaskRepository
from openclaw_store.backends.sqlite import connections as sqlite_connections
from openclaw_store.repositories import change_log, read_changes
from openclaw_store.state_manager import change_feed as pages
from openclaw_store.state_manager.change_feed import (
    ENTITY_ID,
    STEP_WIDTH,
    ChangeBatch,
    read_change_batch,
)
from openclaw_store.testing import FakeClock

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


async def test_large_node_is_alone_on_its_page(
    bound: int, manager: StateManager, make_node: MakeNode, open_manager: OpenManager
) -> None:
    """All nodes of 400 changes once were read together."""
    other = await open_manager()
    for id in ("first", "second", "third"):
        await manager.add_node(make_node(node_id=id, tags=["x" * 500_000]))

    found = [await page_after(manager.db, since) for since in range(3)]
    await other.refresh_from_database()

    assert [(list(page.nodes), page.revision) for page in found] == [
        (["first"], 1), (["second"], 2), (["third"], 3)
    ]  # fmt: skip
    assert await other.get_all_nodes() == await manager.get_all_nodes()


async def test_heartbeat_is_read_without_the_content_of_its_node(
    bound: int, database: Database, make_node: MakeNode
) -> None:
    nodes = NodeRepository(database)
    for number in range(5):
        node = make_node(node_id=str(number), cpu_usage=number, tags=["x" * 500_000])
        await nodes.create(node)
        await nodes.update_heartbeat(str(number))

    page = await page_after(database, 5)

    assert sorted((beat.id, beat.usage["cpu_usage"]) for _, beat in page.heartbeats) == [
        (str(number), number) for number in range(5)
    ]
    assert len(repr(page)) < 10_000


async def test_long_reasons_of_changes_are_read_page_by_page(
    monkeypatch: pytest.MonkeyPatch, manager: StateManager, make_task: MakeTask
) -> None:
    """400 errors of a megabyte each once were in memory at the same time."""
    monkeypatch.setattr(change_log, "PAGE_BYTES", 400_000)
    for id in ("0", "1", "2"):
        await manager.add_task(make_task(task_id=id))
        await manager.cancel_task(id, reason=id * 500_000)

    pages = [await manager.db.read(partial(read_changes, since=since)) for since in (0, 2, 4, 6)]

    assert [(len(changes), until) for changes, until in pages] == [(2, 2), (2, 4), (2, 6), (0, 6)]
    assert [changes[1].reason for changes, _ in pages[:3]] == [
        id * 500_000 for id in ("0", "1", "2")
    ]
    watched = []
    async for change in manager.watch(since=0):
        watched.append(change)
        if change.revision == 6:
            break
    assert watched == [change for changes, _ in pages for change in changes]


UNREADABLE = {
    "sqlite": [
        (table, column, value)
        for table, columns in (
            ("tasks", ("parameters", "name", "result")), ("nodes", ("tags", "hostname"))
        )
        for column in columns
        for value in ("x'ff'", "CAST(x'ff' AS TEXT)")
    ],
    "postgresql": [
        ("tasks", "submitted_at", "'20000-01-01'"),
        ("tasks", "completed_at", "'4000-01-01 BC'"),
        ("nodes", "registered_at", "'20000-01-01'"),
    ],
}  # fmt: skip
"""Values that the driver or the decoder refuses: of text, of JSON and of times."""


async def damage(
    manager: StateManager, location: Location, make_task: MakeTask, make_node: MakeNode
) -> set[str]:
    """Add tasks and nodes that cannot be read, and sound ones; return the identifiers of those."""
    damaged = set()
    for number, (table, column, value) in enumerate(UNREADABLE[manager.db.dialect]):
        id = f"damaged-{number}"
        if table == "tasks":
            await manager.add_task(make_task(task_id=id))
        else:
            await manager.add_node(make_node(node_id=id))
        key = f"{table.removesuffix('s')}_id"
        execute(location, f"UPDATE {table} SET {column} = {value} WHERE {key} = '{id}'")
        damaged.add(id)
    await manager.add_task(make_task(task_id="task"))
    await manager.add_node(make_node(node_id="node"))
    return damaged


async def test_rows_that_cannot_be_read_do_not_stop_following(
    manager: StateManager, location: Location, make_task: MakeTask, make_node: MakeNode,
    open_manager: OpenManager,
) -> None:  # fmt: skip
    other = await open_manager()
    damaged = await damage(manager, location, make_task, make_node)

    with pytest.raises(InvalidDataError, match="damaged-"):
        await other.refresh_from_database()
    await other.refresh_from_database()

    assert other.version == manager.version == len(damaged) + 2
    assert await other.get_task("task") == await manager.get_task("task")
    assert await other.get_node("node") == await manager.get_node("node")


async def test_rows_that_cannot_be_read_are_left_out_of_the_memory(
    manager: StateManager, location: Location, make_task: MakeTask, make_node: MakeNode,
    open_manager: OpenManager, caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    """One of them once kept every manager from starting."""
    damaged = await damage(manager, location, make_task, make_node)

    other = await open_manager()

    assert other.version == manager.version
    assert await other.get_task("task") == await manager.get_task("task")
    assert await other.get_node("node") == await manager.get_node("node")
    state = await other.get_state()
    left_out = damaged - {*state.tasks, *state.nodes}  # a BLOB may be noticed later
    assert left_out
    assert all(f"'{id}'" in caplog.text for id in left_out)


async def test_heartbeat_that_cannot_be_read_does_not_stop_following(
    manager: StateManager, location: Location, make_node: MakeNode, clock: FakeClock,
    open_manager: OpenManager,
) -> None:  # fmt: skip
    for id in ("damaged", "node"):
        await manager.add_node(make_node(node_id=id))
    other = await open_manager()
    await manager.node_repo.update_heartbeat("damaged")
    value = "x'ff'" if manager.db.dialect == "sqlite" else "'20000-01-01'"
    execute(location, f"UPDATE nodes SET last_heartbeat = {value} WHERE node_id = 'damaged'")
    clock.advance(seconds=1)
    await manager.node_repo.update_heartbeat("node")

    with pytest.raises(InvalidDataError, match="damaged"):
        await other.refresh_from_database()
    await other.refresh_from_database()

    node = await other.get_node("node")
    assert node is not None
    assert node.last_heartbeat == clock()
