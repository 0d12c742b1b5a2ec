"""Archive: what leaves the database is in the files, can be read there, and can return."""

# ruff: noqa: ASYNC240 - a test may block its loop

from __future__ import annotations

import asyncio
import inspect
import json
import random
import threading
from collections.abc import Awaitable, Callable, Iterator
from contextlib import aclosing, contextmanager, suppress
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from functools import partial
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest
from conftest import Location, MakeTask, execute
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from openclaw_store import (
    Database,
    InvalidDataError,
    StateManager,
    Task,
    TaskFilter,
    TaskPriority,
    TaskRepository,
    TaskStatus,
    TaskType,
    UnavailableError,
    verify,
)
from openclaw_store.archive import collect, lease, manifest, mover, open_archive, runs
from openclaw_store.archive.check import list_archive, verify_archive
from openclaw_store.archive.compaction import compact_archive
from openclaw_store.archive.folder import Folder
from openclaw_store.archive.layout import TASKS
from openclaw_store.archive.reader import Archive
from openclaw_store.archive.restore import _ahead, restore_tasks
from openclaw_store.archive.retain import plan, retain
from openclaw_store.domain import Retention
from openclaw_store.errors import ConflictError
from openclaw_store.repositories import read_history, retention
from openclaw_store.testing import FakeClock

DAY = timedelta(days=1)

Fill = Callable[..., Awaitable[list[Task]]]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(mover, "GRACE_SECONDS", 0)
    return tmp_path / "archive"


@pytest.fixture
def policy(folder: Path) -> Retention:
    return Retention(
        completed=30 * DAY, failed=90 * DAY, cancelled=7 * DAY, archive=folder, load=1.0
    )


@pytest.fixture
def fill(database: Database, clock: FakeClock, make_task: MakeTask) -> Fill:
    """Add finished tasks with histories, of which some are of each status and day."""

    async def fill(count: int = 12, days: float = 40, prefix: str = "task-") -> list[Task]:
        tasks = TaskRepository(database)
        end = clock()
        for number in range(count):
            clock.now = end - days * DAY + number * timedelta(hours=7)
            status = (TaskStatus.COMPLETED, TaskStatus.FAILED, TaskStatus.CANCELLED)[number % 3]
            task = make_task(
                task_id=f"{prefix}{number:04d}",
                user_id=f"user {number % 4}",
                priority=TaskPriority(number % 4),
                required_skills=["python", "数据"][: number % 3],
                metadata={"team": {"name": "甲" if number % 2 else "b"}, "size": number},
            )
            await tasks.create(task)
            clock.advance(seconds=5)
            task.status = status
            task.error = "no paper" if status is TaskStatus.FAILED else None
            task.result = {"pages": number, "text": "ü\u2028\\"} if number % 2 else None
            await tasks.update(task)
        clock.now = end
        return [task async for task in tasks.iter_tasks()]

    return fill


async def all_of(database: Database, folder: Path) -> tuple[dict[str, Task], dict[str, Task]]:
    """Return the live and the archived tasks by identifier."""
    live = {task.task_id: task async for task in TaskRepository(database).iter_tasks()}
    async with open_archive(folder) as archive:
        archived = [task async for task in archive.iter_tasks()]
        assert await archive.count_tasks() == len(archived)
    by_id = {task.task_id: task for task in archived}
    assert len(by_id) == len(archived), "a task is in the archive twice"
    return live, by_id


async def test_old_tasks_move_with_their_history(
    database: Database, fill: Fill, policy: Retention, folder: Path
) -> None:
    before = {task.task_id: task for task in await fill()}
    old = {id for id, task in before.items() if task.status is not TaskStatus.FAILED}
    histories = {id: await database.read(partial(read_history, id=id)) for id in before}
    expected = await plan(database, policy)

    done = await retain(database, policy)

    assert (expected.tasks, expected.changes) == (done.tasks, done.changes) == (8, 16)
    assert expected.bytes > 0
    live, archived = await all_of(database, folder)
    assert live == {id: task for id, task in before.items() if id not in old}
    assert archived == {id: task for id, task in before.items() if id in old}
    async with open_archive(folder) as archive:
        assert {id: await archive.history(id) for id in old} == {id: histories[id] for id in old}
        assert await archive.get("nothing") is None
    assert await verify(database)
    assert await verify_archive(folder)
    assert (await retain(database, policy)).tasks == 0


@pytest.mark.sqlite
async def test_files_are_readable_without_the_library(
    database: Database, fill: Fill, policy: Retention, folder: Path
) -> None:
    import duckdb  # here, as each takes a second of every process that collects tests
    import pandas as pd

    before = {task.task_id: task for task in await fill(60)}
    await retain(database, policy)
    files = f"{folder}/tasks/**/*.parquet"

    by_pandas = pd.read_parquet(folder / "tasks").set_index("task_id")
    by_arrow = pq.read_table(folder / "tasks").to_pylist()
    with duckdb.connect() as connection:
        connection.execute("SET TimeZone = 'UTC'")
        rows = connection.sql(
            "SELECT task_id, epoch_us(completed_at), metadata::JSON->>'$.team.name', cluster, "
            f"finished FROM read_parquet('{files}')"
        ).fetchall()

    assert len(by_pandas) == len(by_arrow) == len(rows) == 32
    for row in by_arrow:
        task = before[row["task_id"]]
        assert row["status"] == task.status.value
        assert row["completed_at"] == task.completed_at
        assert row["result"] is None or json.loads(row["result"]) == task.result
        assert by_pandas.loc[task.task_id, "completed_at"] == pd.Timestamp(task.completed_at)
    for id, completed_at, team, cluster, day in rows:
        task = before[id]
        assert task.completed_at is not None
        assert datetime.fromtimestamp(completed_at / 1e6, UTC) == task.completed_at
        assert (team, cluster) == (task.metadata["team"]["name"], "default")
        assert day == task.completed_at.date()


async def test_restored_tasks_are_as_before(
    database: Database, manager: StateManager, fill: Fill, policy: Retention, folder: Path
) -> None:
    before = {task.task_id: task for task in await fill()}
    histories = {id: await manager.history(id) for id in before}
    await retain(database, policy)
    await manager.refresh_from_database()
    since = manager.version

    done = await restore_tasks(database, folder, TaskFilter(user="user 0"))

    wanted = {id for id, task in before.items() if task.user_id == "user 0"}
    moved = {id for id in wanted if before[id].status is not TaskStatus.FAILED}
    assert set(done.restored) == moved
    assert done.skipped == {}
    changes = [change async for change in take(manager.watch(since), len(moved))]
    assert {change.item_id for change in changes} == moved
    for id in moved:
        task = await manager.get_task(id)
        assert task is not None
        stamps = {"version": before[id].version, "updated_at": before[id].updated_at}
        assert vars(task) | stamps == vars(before[id])
        history = await manager.history(id)
        assert history[:-1] == histories[id]
        assert history[-1].revision == task.version
    live, archived = await all_of(database, folder)
    assert live.keys() | archived.keys() == before.keys()
    assert not live.keys() & archived.keys()
    assert (await restore_tasks(database, folder, TaskFilter(user="user 0"))).restored == []
    assert (await retain(database, policy)).tasks == 0, "a restored task counts from its return"


async def test_damaged_past_change_is_found(
    database: Database, fill: Fill, policy: Retention, folder: Path
) -> None:
    await fill(1)
    await retain(database, policy)
    await restore_tasks(database, folder, TaskFilter.everything())
    assert await verify(database)

    for column, value in (("kind", "'x'"), ("to_status", "'x'"), ("item", "'node'")):
        [(revision, before)] = execute(
            LOCATIONS[database], f"SELECT revision, {column} FROM past_changes WHERE previous > 0"
        )
        execute_on(database, f"UPDATE past_changes SET {column} = {value} WHERE previous > 0")
        [problem] = (await verify(database)).problems
        assert f"Past change {revision} " in problem.text
        execute_on(database, f"UPDATE past_changes SET {column} = '{before}' WHERE previous > 0")
    assert await verify(database)


async def take(changes: Any, count: int) -> Any:
    async for change in changes:
        yield change
        count -= 1
        if not count:
            return


async def test_restored_task_returns_to_the_archive_with_its_whole_history(
    database: Database, fill: Fill, policy: Retention, folder: Path, clock: FakeClock
) -> None:
    await fill(1)
    await retain(database, policy)
    await restore_tasks(database, folder, TaskFilter.everything())
    history = await database.read(lambda session: read_history(session, "task-0000"))

    clock.advance(seconds=31 * 86_400)
    await retain(database, policy)

    live, archived = await all_of(database, folder)
    assert not live
    assert archived["task-0000"].version == history[-1].revision
    async with open_archive(folder) as archive:
        assert await archive.history("task-0000") == history
    assert len(history) == 3
    assert not await rows_of(database, "past_changes")


async def rows_of(database: Database, table: str) -> list[Any]:
    location = Path(database.db_path) if database.dialect == "sqlite" else str(LOCATIONS[database])
    return execute(location, f"SELECT * FROM {table}")


LOCATIONS: dict[Database, Location] = {}


@pytest.fixture(autouse=True)
def known_location(database: Database, location: Location) -> Iterator[None]:
    LOCATIONS[database] = location
    yield
    del LOCATIONS[database]


async def test_task_that_changes_meanwhile_stays(
    database: Database,
    fill: Fill,
    policy: Retention,
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    before = await fill()
    original = manifest.read_file

    def requeue_first(*arguments: Any) -> Any:  # the files are verified, and no row is deleted
        execute_on(
            database,
            "UPDATE tasks SET version = version + 1000, status = 'pending' "
            "WHERE task_id = 'task-0000'",
        )
        monkeypatch.setattr(mover, "read_file", original)
        return original(*arguments)

    monkeypatch.setattr(mover, "read_file", requeue_first)
    done = await retain(database, policy)

    assert (done.tasks, done.voids) == (7, 1)
    async with open_archive(folder) as archive:
        assert await archive.get("task-0000") is None
        assert await archive.count_tasks() == 7
        found = [task.task_id async for task in archive.iter_tasks()]
    assert "task-0000" not in found
    assert len(before) == 12


def execute_on(database: Database, statement: str) -> None:
    execute(LOCATIONS[database], statement)


class Crashed(BaseException):
    """The process ends here."""


STEPS = {"retain": 12, "restore": 5, "compact": 14}
"""Writes to the folder and the database after which a process crashes."""


@pytest.mark.parametrize("work", STEPS)
async def test_interrupted_work_is_continued(
    database: Database,
    fill: Fill,
    policy: Retention,
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    work: str,
) -> None:
    """A crash between any two writes to the database or to the folder loses nothing."""
    monkeypatch.setattr(mover, "_FIRST_BATCH", 2)
    if work == "retain":  # several runs: one reads and writes while another one deletes
        monkeypatch.setattr(mover, "PAGE_ROWS", 1)
        monkeypatch.setattr(collect, "RUN_ROWS", 1)
    known: set[str] = set()

    async def act() -> None:
        if work == "retain":
            await retain(database, policy)
        elif work == "restore":
            await restore_tasks(database, folder, TaskFilter.everything())
        else:
            await compact_archive(database, folder)

    for step in range(0, STEPS[work], 1 if database.dialect == "sqlite" else 4):
        known |= {task.task_id for task in await fill(3, prefix=f"step {step} ")}
        if work != "retain":
            await retain(database, policy)
        if work == "compact":
            await restore_tasks(database, folder, TaskFilter(user="user 0"))
        with crash_at(step), suppress(Crashed):
            await act()
        execute_on(database, "DELETE FROM leases")
        left = {task.task_id async for task in TaskRepository(database).iter_tasks()}
        _, archived = await all_of_archive(folder)
        assert left | archived.keys() == known, step

        await act()

        live, archived = await all_of(database, folder)
        assert live.keys() | archived.keys() == known, step
        assert not live.keys() & archived.keys(), step
        assert {run.state for run in await runs.unfinished(database)} <= {"undone"}
    assert await verify(database)
    check = await verify_archive(folder)
    assert check
    assert not check.remarks


@contextmanager
def crash_at(step: int) -> Iterator[None]:
    """Crash after a write to the folder or to the database."""
    count = 0

    def crashing(original: Any) -> Any:
        async def call_async(*arguments: Any) -> Any:
            result = await original(*arguments)
            crash_if_due()
            return result

        def call(*arguments: Any) -> Any:
            result = original(*arguments)
            crash_if_due()
            return result

        return call_async if original in (runs.advance, Database.write) else call

    def crash_if_due() -> None:
        nonlocal count
        count += 1
        if count == step + 1:
            raise Crashed

    with pytest.MonkeyPatch.context() as patch:
        for owner, name in (
            (Folder, "write"), (Folder, "remove"), (runs, "advance"), (Database, "write")
        ):  # fmt: skip
            patch.setattr(owner, name, crashing(getattr(owner, name)))
        yield


@pytest.mark.parametrize("load", [1.0, 0.9])
async def test_runs_follow_one_another(
    database: Database,
    fill: Fill,
    policy: Retention,
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    load: float,
) -> None:
    """Each run writes its own files; at full load, its rows leave while the next one is read."""
    monkeypatch.setattr(mover, "PAGE_ROWS", 8)
    monkeypatch.setattr(collect, "RUN_ROWS", 3)
    before = {task.task_id: task for task in await fill(30)}

    done = await retain(database, replace(policy, load=load))

    live, archived = await all_of(database, folder)
    assert live | archived == before
    assert (done.tasks, done.voids) == (len(archived), 0)
    assert len([*(folder / "manifests").rglob("*.json")]) > 1
    assert await verify(database)
    assert await verify_archive(folder)


async def test_error_of_a_deletion_ends_the_runs(
    database: Database, fill: Fill, policy: Retention, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mover, "PAGE_ROWS", 1)
    monkeypatch.setattr(collect, "RUN_ROWS", 1)
    before = {task.task_id for task in await fill(12)}

    def fail(*_: Any) -> None:
        raise UnavailableError("the disk is full")

    monkeypatch.setattr(runs, "progress", fail)
    with pytest.raises(UnavailableError, match="the disk is full"):
        await retain(database, policy)
    assert {task.task_id async for task in TaskRepository(database).iter_tasks()} == before

    monkeypatch.undo()
    await retain(database, policy)
    live, archived = await all_of(database, folder)
    assert live.keys() | archived.keys() == before
    assert not live.keys() & archived.keys()


async def test_process_that_lost_its_run_writes_nothing_more(
    database: Database, fill: Fill, policy: Retention, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = {task.task_id: task for task in await fill()}
    advance = runs.advance

    async def taken_over(database: Database, run: Any, state: str, files: Any = None) -> None:
        if state == "verified":
            monkeypatch.setattr(runs, "advance", advance)
            await mover.Mover(database).heal()
        await advance(database, run, state, files)

    monkeypatch.setattr(runs, "advance", taken_over)
    with pytest.raises(ConflictError, match="another process has taken over"):
        await retain(database, policy)

    live, archived = await all_of(database, folder)
    assert (live, archived) == (before, {})


async def test_process_that_lost_its_run_restores_nothing_more(
    database: Database, fill: Fill, policy: Retention, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Such a task would stay in both places, as the run that notes void copies has ended."""
    await fill()
    await retain(database, policy)
    known = {id for place in await all_of(database, folder) for id in place}
    monkeypatch.setattr(mover, "_FIRST_BATCH", 1)
    write, batches = Database.write, 0

    async def taken_over(self: Database, *arguments: Any) -> Any:
        nonlocal batches
        batches += 1
        if batches == 2:
            await mover.Mover(self).heal()
        return await write(self, *arguments)

    monkeypatch.setattr(Database, "write", taken_over)
    with pytest.raises(ConflictError, match="another process has taken over"):
        await restore_tasks(database, folder, TaskFilter.everything())

    live, archived = await all_of(database, folder)
    assert live.keys() | archived.keys() == known
    assert not live.keys() & archived.keys()
    assert archived


@pytest.mark.sqlite
async def test_process_that_lost_its_run_keeps_the_manifest_of_the_other_one(
    database: Database, fill: Fill, policy: Retention, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The other one has forgotten the void copies, which would be missing from the manifest."""
    await fill()
    await retain(database, policy)
    voids_of = runs.voids_of

    async def taken_over(database: Database, run: Any) -> Any:
        monkeypatch.setattr(runs, "voids_of", voids_of)
        await mover.Mover(database).heal()
        return await voids_of(database, run)

    monkeypatch.setattr(runs, "voids_of", taken_over)
    with pytest.raises(ConflictError, match="another process has taken over"):
        await restore_tasks(database, folder, TaskFilter(user="user 0"))

    check = await verify_archive(folder)
    assert (check.problems, check.remarks) == ([], [])
    live, archived = await all_of(database, folder)
    assert not live.keys() & archived.keys()


async def test_only_one_process_applies_a_policy(
    database: Database, policy: Retention, clock: FakeClock
) -> None:
    async with lease.leased(database, patience=0):
        with pytest.raises(UnavailableError, match="another process moves tasks"):
            await retain(database, policy)
    await retain(database, policy)
    async with lease.leased(database, patience=0):
        clock.advance(seconds=lease.LEASE_SECONDS + 1)  # that process has stopped
        await retain(database, policy)


async def test_compaction_merges_files_and_drops_void_copies(
    database: Database, fill: Fill, policy: Retention, folder: Path
) -> None:
    await fill(30)
    await retain(database, Retention(cancelled=DAY, archive=folder, load=1.0))
    await retain(database, Retention(completed=DAY, archive=folder, load=1.0))
    await restore_tasks(database, folder, TaskFilter(user="user 2"))
    before = await all_of(database, folder)
    days = await list_archive(folder)

    done = await compact_archive(database, folder)

    assert done.files_after < done.files_before
    assert done.voids > 0
    assert await all_of(database, folder) == before
    assert not [*(folder / "voids").rglob("*.parquet")]
    after = await list_archive(folder)
    assert [(one.day, one.tasks) for one in after if one.tasks] == [
        (one.day, one.tasks) for one in days if one.tasks
    ]
    assert all(one.files == 1 for one in after)
    assert pq.read_table(folder / "tasks").num_rows == len(before[1])
    assert await verify_archive(folder)
    assert (await compact_archive(database, folder)).files_before == 0


@pytest.mark.sqlite
async def test_compaction_refuses_a_damaged_file(
    database: Database, fill: Fill, policy: Retention, folder: Path
) -> None:
    """The damage is where no checksum of a page finds it."""
    await fill(1)
    await retain(database, policy)
    await fill(1, prefix="other ")
    await retain(database, policy)
    before = sorted(folder.rglob("*.parquet"))
    damaged = before[0].read_bytes().replace(b"parquet-cpp-arrow", b"parquet-cpp-arrox")
    before[0].write_bytes(damaged)

    with pytest.raises(UnavailableError, match="was changed after it was written"):
        await compact_archive(database, folder)

    await retain(database, policy)
    assert sorted(folder.rglob("*.parquet")) == before


@pytest.mark.sqlite
async def test_each_flipped_bit_is_found(
    database: Database, fill: Fill, policy: Retention, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each byte of the manifests, and every ninth of the other files, has a flipped bit once.

    A query notices a damaged page: it finds the same as before, or names the file in its error.
    """
    await fill(3)
    await retain(database, policy)
    await restore_tasks(database, folder, TaskFilter(user="user 0"))
    paths = [path.relative_to(folder).as_posix() for path in folder.rglob("*.*")]
    contents = {path: (folder / path).read_bytes() for path in paths if path[0] != "."}
    monkeypatch.setattr(Folder, "read", lambda _, path: contents[path])
    assert await verify_archive(folder)
    before, read = await all_of_archive(folder), 0
    for path, whole in contents.items():
        for place in range(0, len(whole), 1 if path.endswith(".json") else 9):
            flipped = bytes([whole[place] ^ 1 << place % 8])
            contents[path] = whole[:place] + flipped + whole[place + 1 :]
            assert not await verify_archive(folder), (path, place)
            if path.startswith("tasks") and place % 90 == 0:
                footer = int.from_bytes(whole[-8:-4], "little") + 8
                (folder / path).write_bytes(contents[path])
                with suppress(UnavailableError):
                    found = await all_of_archive(folder)
                    assert found == before or place >= len(whole) - footer, (path, place)
                    read += 1
        contents[path] = whole
        (folder / path).write_bytes(whole)
    assert read
    (folder / paths[0]).unlink()
    monkeypatch.undo()
    check = await verify_archive(folder)
    assert check.problems or check.remarks


def damage_verified_files(monkeypatch: pytest.MonkeyPatch, folder: Path) -> None:
    """Change the first file of each run when it has been verified."""
    advance = runs.advance

    async def damage(database: Database, run: Any, state: str, files: Any = None) -> None:
        await advance(database, run, state, files)
        if state == "verified":
            file = folder / files[0].path
            file.write_bytes(file.read_bytes()[:-1] + b"x")

    monkeypatch.setattr(runs, "advance", damage)


@pytest.mark.sqlite
async def test_damaged_file_keeps_its_rows_in_the_database(
    database: Database, fill: Fill, policy: Retention, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = {task.task_id for task in await fill()}
    damage_verified_files(monkeypatch, folder)
    with pytest.raises(UnavailableError, match="was changed after it was written"):
        await retain(database, policy)

    live = {task.task_id async for task in TaskRepository(database).iter_tasks()}
    assert live == before


@pytest.mark.sqlite
async def test_damaged_file_keeps_its_changes_in_the_database(
    database: Database, fill: Fill, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No later run may delete them: it deletes all changes up to a revision."""
    monkeypatch.setattr(retention, "COMPACTION_BATCH_SIZE", 3)
    monkeypatch.setattr(collect, "RUN_ROWS", 1)
    await fill(9)
    before = await rows_of(database, "changes")
    damage_verified_files(monkeypatch, folder)
    with pytest.raises(UnavailableError, match="was changed after it was written"):
        await retain(database, Retention(history=DAY, archive=folder, load=1.0))

    assert await rows_of(database, "changes") == before
    assert len(await runs.unfinished(database)) == 1


async def test_old_changes_move_to_files(
    database: Database, fill: Fill, folder: Path, manager: StateManager
) -> None:
    before = await fill(5)
    changes = [change for task in before for change in await manager.history(task.task_id)]
    policy = Retention(history=39 * DAY, archive=folder, load=1.0)
    expected = await plan(database, policy)

    done = await retain(database, policy)

    old = sorted(change for change in changes if change.changed_at < manager.db.clock() - 39 * DAY)
    assert expected.changes == done.changes == len(old) > 3
    rows = pq.read_table(folder / "changes").sort_by("revision").to_pylist()
    assert [(row["revision"], row["changed_at"], row["item_id"]) for row in rows] == [
        (change.revision, change.changed_at, change.item_id) for change in old
    ]
    async with open_archive(folder) as archive:
        assert await archive.history("task-0000") == [
            change for change in old if change.item_id == "task-0000"
        ]
    assert await verify(database)


@pytest.mark.sqlite
async def test_row_that_no_file_can_hold_stays(
    database: Database, fill: Fill, policy: Retention, folder: Path
) -> None:
    """SQLite stores any type in any column."""
    before = {task.task_id for task in await fill()}
    execute_on(database, "UPDATE tasks SET retry_count = 'many' WHERE task_id = 'task-0000'")
    execute_on(database, "UPDATE tasks SET name = CAST(x'ff' AS TEXT) WHERE task_id = 'task-0002'")

    done = await retain(database, policy)

    assert done.skipped == ["task-0000", "task-0002"]
    count = len(await rows_of(database, "archive_runs"))
    assert (await retain(database, policy)).skipped == done.skipped
    assert len(await rows_of(database, "archive_runs")) == count
    _, archived = await all_of_archive(folder)
    left = {row[0] for row in execute(LOCATIONS[database], "SELECT task_id FROM tasks")}
    assert left | archived.keys() == before
    assert {"task-0000", "task-0002"} <= left


@pytest.mark.sqlite
async def test_archived_value_that_cannot_be_stored_stays_in_the_archive(
    database: Database, fill: Fill, policy: Retention, folder: Path
) -> None:
    """SQLite stores any text in any column, and PostgreSQL would refuse the rows beside it."""
    await fill(5)
    execute_on(database, "UPDATE tasks SET result = '{' WHERE task_id = 'task-0000'")
    execute_on(database, "UPDATE tasks SET name = 'a' || char(0) WHERE task_id = 'task-0002'")
    await retain(database, policy)

    done = await restore_tasks(database, folder, TaskFilter.everything())

    assert done.restored == ["task-0003"]
    assert "result" in done.skipped["task-0000"]
    assert "name" in done.skipped["task-0002"]


async def test_previous_change_written_by_hand_leads_to_no_other_history(
    database: Database, fill: Fill, policy: Retention, folder: Path
) -> None:
    """Such a change may name a later one, itself, or one of another task."""
    await fill(9)
    newest = "SELECT max(revision) FROM changes WHERE item_id = '%s'"
    ids = ["task-0000", "task-0002", "task-0003"]
    last = {id: execute(LOCATIONS[database], newest % id)[0][0] for id in ids}
    for id, previous in zip(
        ids, (last["task-0002"], last["task-0002"], last["task-0000"]), strict=True
    ):
        execute_on(
            database, f"UPDATE changes SET previous = {previous} WHERE revision = {last[id]}"
        )

    await retain(database, policy)

    rows = pq.read_table(folder / "tasks", columns=["task_id", "history"]).to_pylist()
    found = {row["task_id"]: [one["revision"] for one in row["history"]] for row in rows}
    assert {id: found[id] for id in ids} == {id: [last[id]] for id in ids}
    assert len(found["task-0005"]) == 2


async def all_of_archive(folder: Path) -> tuple[int, dict[str, Task]]:
    async with open_archive(folder) as archive:
        found = {task.task_id: task async for task in archive.iter_tasks()}
        return await archive.count_tasks(), found


def alternatives(kind: Any) -> Any:
    return st.none() | st.sampled_from(list(kind)) | st.lists(st.sampled_from(list(kind)))


MOMENT = datetime(2026, 11, 1, tzinfo=UTC)
times = st.none() | st.integers(-60, 60).map(lambda hours: timedelta(hours=hours))
FILTERS = st.fixed_dictionaries(
    {
        "status": alternatives(TaskStatus),
        "task_type": alternatives(TaskType),
        "priority": alternatives(TaskPriority),
        "node": st.none() | st.just("n1"),
        "user": st.none() | st.sampled_from(["user 0", "user 1", "nobody"]),
        "skill": st.none() | st.sampled_from(["python", "数据", "pyth", '"', "a\\b"]),
        "name_contains": st.none() | st.sampled_from(["", "a", "TASK", "数", "%", "_"]),
        "error_contains": st.none() | st.sampled_from(["", "no paper", "No"]),
        "metadata": st.none()
        | st.fixed_dictionaries(
            {},
            optional={
                "team.name": st.sampled_from(["甲", "b", None, 1]),
                "size": st.sampled_from([1, 1.0, True, "1", None, 3, 1e17, -0.0]),
                "flag": st.sampled_from([True, False, None, 1]),
            },
        ),
        **dict.fromkeys(
            (
                "submitted_from",
                "submitted_until",
                "completed_from",
                "completed_until",
                "finished_after",
                "finished_before",
            ),
            times,
        ),
    }
)


async def test_filters_select_the_same_as_in_the_table(
    database: Database, make_task: MakeTask, folder: Path, clock: FakeClock
) -> None:
    """Hypothesis finds no filter whose result over the archive differs from the earlier one."""
    tasks, random_ = TaskRepository(database), random.Random(7)
    end = clock()
    for number in range(60):
        clock.now = end - timedelta(days=3) + number // 3 * timedelta(hours=2)
        await tasks.create(
            make_task(
                task_id=f"t{number}",
                name=random_.choice(["a%b", "数据 TASK", "plain_", "task"]),
                task_type=random_.choice(list(TaskType)),
                priority=random_.choice(list(TaskPriority)),
                status=random_.choice([one for one in TaskStatus if one.name in FINISHED_NAMES]),
                error=random_.choice([None, "no paper", "", "a\\b"]),
                user_id=random_.choice([None, "user 0", "user 1"]),
                assigned_node=random_.choice([None, "n1"]),
                required_skills=random_.choice([[], ["python"], ["数据", "python"], ['"', "a\\b"]]),
                metadata=random_.choice(
                    [
                        {},
                        {"size": 1, "flag": True},
                        {"size": 1.0, "team": {"name": "甲"}},
                        {"size": True, "flag": None},
                        {"size": 10**17, "team": {"name": None}},
                        {"size": "1", "team": "甲", "flag": 1},
                        {"size": 0.0, "team": {"name": "b"}},
                    ]
                ),
            )
        )
    clock.now = end
    rows = [task async for task in tasks.iter_tasks()]
    everything = Retention(
        completed=timedelta(0), failed=timedelta(0), cancelled=timedelta(0), archive=folder, load=1
    )
    strategies: list[tuple[TaskFilter, list[Task], int]] = []
    examples: list[dict[str, Any]] = []

    @settings(max_examples=60, database=None, suppress_health_check=list(HealthCheck))
    @given(FILTERS)
    def collect(conditions: dict[str, Any]) -> None:
        examples.append(conditions)

    collect()
    for conditions in examples:
        given_: dict[str, Any] = {
            name: end - 2 * DAY + one if isinstance(one, timedelta) else one
            for name, one in conditions.items()
        }
        filter = TaskFilter(**given_)
        page = await tasks.list_tasks(filter, limit=7)
        strategies.append((filter, page.tasks, await tasks.count_tasks(filter)))
    assert len(rows) == 60
    clock.advance(seconds=1)
    assert (await retain(database, everything)).tasks == 60

    async with open_archive(folder, clock=clock) as archive:
        assert [task async for task in archive.iter_tasks()] == rows
        for filter, expected, count in strategies:
            page = await archive.list_tasks(filter, limit=7)
            assert page.tasks == expected, filter
            assert await archive.count_tasks(filter) == count, filter
        pages, after = [], None
        while True:
            page = await archive.list_tasks(limit=11, after=after)
            pages += page.tasks
            after = page.after
            if after is None:
                break
        assert pages == rows


FINISHED_NAMES = {"COMPLETED", "FAILED", "CANCELLED", "TIMEOUT"}


def test_archive_has_the_reading_half_of_the_repository() -> None:
    names = [
        name for name in vars(TaskRepository) if name.startswith(("get", "list", "count", "iter"))
    ]
    writing = {"count_old_tasks", "list_pending_tasks", "list_waiting", "list_expired"}
    inner = {"get_records", "list_records"}
    for name in {*names, "get"} - writing - inner:
        wanted, found = (
            inspect.signature(getattr(kind, name)) for kind in (TaskRepository, Archive)
        )
        assert [*wanted.parameters.values()][1:] == [*found.parameters.values()][1:] or (
            [*wanted.parameters][1:] in ([*found.parameters][1:], ["id"])
        ), name


@pytest.mark.sqlite
async def test_lists_of_the_archive_equal_those_of_the_repository(
    database: Database, fill: Fill, folder: Path
) -> None:
    await fill(12)
    tasks = TaskRepository(database)
    calls: list[tuple[str, tuple[Any, ...]]] = [
        ("list_by_status", (TaskStatus.FAILED,)),
        ("list_by_status", (TaskStatus.COMPLETED, 2)),
        ("list_by_user", ("user 1", 2)),
        ("list_by_node", ("n1",)),
        ("count_by_status", ()),
        ("count_by_status", (TaskStatus.CANCELLED,)),
        ("get_tasks", (["task-0003", "no such task", "task-0001"],)),
    ]
    before = [await getattr(tasks, name)(*arguments) for name, arguments in calls]
    policy = Retention(completed=DAY, failed=DAY, cancelled=DAY, archive=folder, load=1)

    await retain(database, policy)

    async with open_archive(folder) as archive:
        after = [await getattr(archive, name)(*arguments) for name, arguments in calls]
    assert after == before


@pytest.mark.sqlite
async def test_older_file_without_a_column_is_read_with_its_default(
    database: Database, fill: Fill, policy: Retention, folder: Path
) -> None:
    await fill(1)
    await retain(database, policy)
    [file] = (folder / "tasks").rglob("*.parquet")
    table = pq.ParquetFile(file).read().drop_columns(["max_losses", "user_id"])
    file.write_bytes(TASKS.encode(table))

    async with open_archive(folder) as archive:
        found = [task async for task in archive.iter_tasks()]

    assert {(task.max_losses, task.user_id) for task in found} == {(10, None)}


def test_invalid_policies_are_refused() -> None:
    cases: list[tuple[str, dict[str, Any]]] = [
        ("retention", {}),
        ("completed", {"completed": 30}),
        ("history", {"history": -DAY}),
        ("load", {"completed": DAY, "load": 1.5}),
        ("archive", {"completed": DAY, "archive": 7}),
    ]
    for field, values in cases:
        with pytest.raises(InvalidDataError) as caught:
            Retention(**values)
        assert caught.value.field == field


def test_location_with_a_password_is_refused() -> None:
    with pytest.raises(InvalidDataError, match="must not contain a password"):
        Archive("s3://key:secret@bucket/folder")


async def test_restore_that_fails_waits_for_what_it_reads_ahead() -> None:
    tasks, may_end = asyncio.all_tasks(), threading.Event()

    def read_next() -> int:
        may_end.wait(30)
        raise ValueError

    async def use() -> None:
        async with aclosing(_ahead([lambda: 1, read_next])) as groups:
            async for _ in groups:
                asyncio.get_running_loop().call_later(0.01, may_end.set)
                raise KeyError

    with pytest.raises(KeyError):
        await use()
    assert may_end.is_set()
    assert asyncio.all_tasks() == tasks
