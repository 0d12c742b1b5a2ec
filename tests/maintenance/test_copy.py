"""`copy`: the same state in another database, or one that nobody can open."""

from __future__ import annotations

import asyncio
import signal
import subprocess
import sys
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import orjson
import pytest
from conftest import EACH_KIND, FakeClock, Location, MakeNode, MakeTask, execute, new_location
from sqlalchemy import select

from openclaw_store import (
    Copied,
    Database,
    InvalidDataError,
    NodeRepository,
    NodeStatus,
    SchemaMismatchError,
    StateManager,
    StoreError,
    TaskPriority,
    TaskRepository,
    TaskStatus,
    copy,
)
from openclaw_store.database.tables import ChangeRow, CounterRow, NodeRow
from openclaw_store.domain import encode
from openclaw_store.maintenance import copy as copying

KILLED = """
import asyncio, os, signal, sys
from openclaw_store import Database
from openclaw_store.maintenance import copy as copying

copying.COPY_BATCH_SIZE = 10

def report(what, done, total):
    if what == "copying tasks" and done >= 30:
        os.kill(os.getpid(), signal.SIGKILL)

asyncio.run(copying.copy(Database(sys.argv[1]), Database(sys.argv[2]), report=report))
"""

Fill = Callable[[int], Any]
JSON: list[Any] = [None, 0, -0.0, 1e300, False, "", [], {"a": [None, {}]}]
ODD: list[dict[str, Any]] = [
    *({"status": status} for status in TaskStatus),
    *({"result": json} for json in JSON),
    *({"priority": priority} for priority in TaskPriority),
    {
        "task_id": "é",
        "name": "任务 '\"\\ \n",
        "description": "\U0001f40d",
        "assigned_node": "nowhere",
    },
    {"task_id": "Z", "optional_skills": [], "affinity_tags": ["a", ""], "required_skills": ["é"]},
    {"task_id": "a b", "submitted_at": datetime.min.replace(tzinfo=UTC)},
    {"task_id": "_", "submitted_at": datetime.max.replace(tzinfo=UTC)},
    {"timeout": 2**63 - 1, "retry_count": 0, "max_retries": 0, "metadata": {"b": 1, "a": 2}},
    {"idempotency_key": "key", "user_id": "", "error": "", "not_before": datetime(2030, 1, 1)},
]


@pytest.fixture(params=EACH_KIND)
def target_location(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Location]:
    """A place for a database of each kind, beside `location`."""
    (tmp_path / "target").mkdir()
    with new_location(request, request.param, tmp_path / "target") as location:
        yield location


@pytest.fixture
def small_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    """Ten rows are copied at a time."""
    monkeypatch.setattr(copying, "COPY_BATCH_SIZE", 10)


@pytest.fixture
def fill(manager: StateManager, clock: FakeClock, make_task: MakeTask, make_node: MakeNode) -> Fill:
    """Gives `database` a state with a past, and so many tasks more."""

    async def fill(number: int) -> None:
        for status in NodeStatus:
            await manager.add_node(make_node(status=status, tags=["é"], average_execution_time=0.1))
        await manager.register_node(make_node(node_id="worker"))
        await manager.add_tasks([make_task(**fields) for fields in ODD])
        await manager.compact_changes(days=0)
        await manager.add_tasks([make_task() for _ in range(number)])
        for task in await manager.claim_tasks("worker", limit=5):
            await manager.complete_task(await manager.start_task(task), {"rows": 42})
        gone = make_task(status=TaskStatus.FAILED)
        await manager.add_task(gone)
        clock.advance(days=40)
        await manager.add_task(make_task())
        await manager.task_repo.cleanup_old_tasks(days=30)  # the feed has gaps now
        await manager.remove_task((await manager.get_pending_tasks())[-1].task_id)
        await manager.update_heartbeat("worker", cpu_usage=12.5)
        await manager.sync_to_database()
        async with manager.db.transaction() as tx:
            await tx.execute(
                NodeRow.__table__.insert().values(node_id="by hand", hostname="")  # type: ignore[attr-defined]  # a Table
            )

    return fill


async def state_of(location: Location) -> list[Any]:
    """All there is in a database, as callers see it."""
    async with Database(location) as database, database.session() as session:
        tasks = (await TaskRepository(session).list_tasks(limit=2**62)).tasks
        nodes = {node.node_id: node for node in await NodeRepository(session).get_all_nodes()}
        rows = [
            [tuple(row) for row in await session.execute(query)]
            for query in (
                select(*ChangeRow.__table__.c).order_by(ChangeRow.revision),
                select(CounterRow.id, CounterRow.heartbeats, CounterRow.compacted),
                select(NodeRow.node_id, NodeRow.beat).order_by(NodeRow.node_id),
            )
        ]
    return [repr(sorted(tasks, key=lambda task: task.task_id)), repr(sorted(nodes.items())), *rows]


@asynccontextmanager
async def opened(*locations: Location) -> AsyncIterator[list[Database]]:
    """Databases that are not open yet, and are closed at the end."""
    databases = [Database(location) for location in locations]
    try:
        yield databases
    finally:
        for database in databases:
            await database.close()


async def copied(source: Location, target: Location, report: Any = None) -> Copied:
    async with opened(source, target) as (here, there):
        return await copy(here, there, report=report)


async def test_rows_are_checked_and_hashed_beside_the_event_loop(
    location: Location,
    target_location: Location,
    fill: Fill,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A batch took up to 0.1 s with JSON of 16 MiB."""
    await fill(10)
    threads: list[int] = []
    dumps = orjson.dumps

    def noting(function: Callable[..., Any]) -> Callable[..., Any]:
        def noted(value: Any) -> Any:
            threads.append(threading.get_ident())
            return function(value)

        return noted

    monkeypatch.setattr("openclaw_store.maintenance.copy.encode", noting(encode))
    monkeypatch.setattr(orjson, "dumps", noting(dumps))
    before = threading.get_ident()
    rows = copying._TABLES[1]
    async with opened(location, target_location) as (source, _):
        await source.initialize()
        async with source.session() as session:
            checksum = source.statements.protection.new_hash()
            found = [
                image
                async for batch in rows.read(session, checksum, checked=True)
                for image in batch
            ]

    assert len(threads) >= 2 * len(found) > 20
    assert before not in threads


async def test_copy_is_equal_and_goes_on_where_its_source_was(
    location: Location, target_location: Location, fill: Fill, make_task: MakeTask, clock: FakeClock
) -> None:
    """From each kind to each kind, field by field, with the feed and its gaps."""
    await fill(10)
    before = await state_of(location)
    told: list[tuple[str, int, int]] = []

    done = await copied(location, target_location, lambda *line: told.append(line))

    assert await state_of(target_location) == before == await state_of(location)
    assert (done.nodes, done.changes) == (len(NodeStatus) + 2, len(before[2]))
    assert list(dict.fromkeys(what for what, _, _ in told)) == [
        f"{verb} {table}"
        for verb in ("copying", "checking")
        for table in ("nodes", "tasks", "changes")
    ]
    assert ("checking tasks", done.tasks, done.tasks) in told
    async with StateManager(Database(target_location, clock=clock), None) as manager:
        revision = manager.version
        assert revision == before[2][-1][0]
        task = make_task()
        await manager.add_task(task)
        assert task.version == revision + 1


@pytest.mark.sqlite
@pytest.mark.parametrize("target_location", EACH_KIND[1:], indirect=True)
async def test_many_tasks_are_equal_there_and_back(
    location: Location, target_location: Location, fill: Fill, tmp_path: Path
) -> None:
    await fill(3000)

    there = await copied(location, target_location)
    back = await copied(target_location, tmp_path / "back.db")

    assert there == back
    assert there.tasks > 3000
    assert await state_of(tmp_path / "back.db") == await state_of(location)


@pytest.mark.usefixtures("small_batches")
@pytest.mark.sqlite
async def test_half_a_copy_is_refused_until_it_is_whole(
    location: Location, target_location: Location, fill: Fill, monkeypatch: pytest.MonkeyPatch
) -> None:
    """P9: killed half-way, it cannot be opened, and goes on where it stopped."""
    await fill(70)
    killed = await asyncio.to_thread(
        subprocess.run, [sys.executable, "-c", KILLED, str(location), str(target_location)]
    )
    assert killed.returncode == -signal.SIGKILL
    [[there]] = execute(target_location, "SELECT count(*) FROM tasks")
    assert 30 <= there < 70

    for migrate in (True, False):
        async with opened(target_location) as [database]:
            with pytest.raises(SchemaMismatchError, match="half of a copy"):
                await database.initialize(migrate)
    written: dict[str, int] = {}
    async with opened(location, target_location) as (source, target):
        write = target.write_in

        async def count(tx: Any, apply: Any, images: Any) -> Any:
            table = str(apply.__self__.table)
            written[table] = written.get(table, 0) + len(images)
            return await write(tx, apply, images)

        monkeypatch.setattr(target, "write_in", count)
        done = await copy(source, target)

    assert written["tasks"] == done.tasks - there
    assert written["nodes"] == done.nodes  # heartbeats may have come since
    assert await state_of(target_location) == await state_of(location)


@pytest.mark.usefixtures("small_batches")
@pytest.mark.sqlite
async def test_copy_starts_anew_if_its_source_was_changed_since(
    location: Location,
    target_location: Location,
    fill: Fill,
    manager: StateManager,
    make_task: MakeTask,
) -> None:
    await fill(30)

    def stop(what: str, done: int, total: int) -> None:
        if what == "copying changes" and done:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        await copied(location, target_location, stop)
    await manager.change_task("Z", lambda task: setattr(task, "name", "changed"))
    await manager.remove_task("é")
    await manager.add_task(make_task(task_id="0"))

    await copied(location, target_location)

    assert await state_of(target_location) == await state_of(location)


@pytest.mark.usefixtures("small_batches")
@pytest.mark.sqlite
async def test_copy_is_one_snapshot_of_a_source_that_is_written(
    location: Location, target_location: Location, fill: Fill
) -> None:
    await fill(30)
    before = await state_of(location)

    def write(what: str, done: int, total: int) -> None:
        if what == "copying nodes":
            execute(location, f"UPDATE tasks SET name = 'later {done}'")
            execute(location, f"DELETE FROM changes WHERE revision > {done + 20}")

    await copied(location, target_location, write)

    assert await state_of(target_location) == before != await state_of(location)


@pytest.mark.usefixtures("small_batches")
@pytest.mark.sqlite
async def test_of_two_copies_to_one_database_one_is_made(
    location: Location, target_location: Location, fill: Fill
) -> None:
    await fill(50)
    await copied_empty(target_location)

    outcomes = await asyncio.gather(
        *[copied(location, target_location) for _ in range(2)], return_exceptions=True
    )

    assert sorted(type(one) is Copied for one in outcomes) == [False, True]
    [refusal] = [one for one in outcomes if type(one) is not Copied]
    assert type(refusal) in (StoreError, SchemaMismatchError)  # at the second step, or when opened
    assert await state_of(target_location) == await state_of(location)


async def copied_empty(location: Location) -> None:
    """Make the database, so that two do not have to take turns to migrate it."""
    async with Database(location):
        pass


@pytest.mark.sqlite
async def test_nobody_who_had_the_target_open_writes_into_the_copy(
    location: Location,
    target_location: Location,
    fill: Fill,
    make_task: MakeTask,
    make_node: MakeNode,
) -> None:
    await fill(0)
    async with StateManager(Database(target_location), None) as late:

        def write(what: str, done: int, total: int) -> None:
            if what == "copying tasks" and not writes:
                writes.append(asyncio.ensure_future(late.add_task(make_task(task_id="late"))))
                writes.append(asyncio.ensure_future(late.add_node(make_node())))

        writes: list[asyncio.Future[bool]] = []
        assert not await late.remove_task("late")  # opens its connection, before the copy has ended
        await copied(location, target_location, write)
        refused = await asyncio.gather(*writes, return_exceptions=True)

        assert [type(error) for error in refused] == [SchemaMismatchError] * 2
    assert await state_of(target_location) == await state_of(location)


@pytest.mark.sqlite
@pytest.mark.parametrize("row", ["a task", "a node", "a past", "itself"])
async def test_target_that_has_anything_of_its_own_is_refused(
    row: str,
    location: Location,
    manager: StateManager,
    target_location: Location,
    make_task: MakeTask,
    make_node: MakeNode,
) -> None:
    task, node = make_task(), make_node()
    await manager.add_task(task)
    if row == "itself":
        async with opened(location) as [target]:
            with pytest.raises(InvalidDataError, match="is the source itself"):
                await copy(manager.db, target)
        return
    async with StateManager(Database(target_location), None) as other:
        await (other.add_node(node) if row == "a node" else other.add_task(task))
        if row == "a past":
            await other.remove_task(task.task_id)
    before = await state_of(target_location)

    with pytest.raises(InvalidDataError, match="give a new database"):
        await copied(location, target_location)

    assert await state_of(target_location) == before


@pytest.mark.sqlite
async def test_copy_that_was_changed_by_hand_is_noticed_and_made_anew(
    location: Location, target_location: Location, fill: Fill
) -> None:
    await fill(0)

    def tamper(what: str, done: int, total: int) -> None:
        if what == "copying changes" and not done:
            execute(target_location, "UPDATE tasks SET name = 'tampered' WHERE task_id = 'Z'")

    with pytest.raises(StoreError, match="differs from the source"):
        await copied(location, target_location, tamper)
    async with opened(target_location) as [database]:
        with pytest.raises(SchemaMismatchError, match="half of a copy"):
            await database.initialize()

    await copied(location, target_location)

    assert await state_of(target_location) == await state_of(location)


@pytest.mark.sqlite
async def test_row_that_cannot_be_read_is_named_and_can_be_mended(
    location: Location, target_location: Location, fill: Fill
) -> None:
    await fill(0)
    execute(location, "UPDATE tasks SET required_skills = '[1]' WHERE task_id = 'Z'")

    with pytest.raises(InvalidDataError, match=r"required_skills: .*'Z' of tasks.*: repair it"):
        await copied(location, target_location)
    execute(location, "UPDATE tasks SET required_skills = '[\"a\"]' WHERE task_id = 'Z'")
    await copied(location, target_location)

    assert await state_of(target_location) == await state_of(location)
