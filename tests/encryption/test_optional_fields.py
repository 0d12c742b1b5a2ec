"""Names and user ids that are sealed as well: what is found, what is refused, turning it off."""

from __future__ import annotations

from datetime import timedelta
from pathlib import Path

import pytest
from conftest import Location, MakeTask
from sqlalchemy import func, select
from support.sealing import KEYS, RING, SECRET, table

from openclaw_store import (
    Database,
    InvalidDataError,
    KeyRing,
    SealedValueError,
    StateManager,
    TaskFilter,
    TaskRepository,
    TaskStatus,
    copy,
    verify,
)
from openclaw_store.archive import open_archive
from openclaw_store.archive.retain import retain
from openclaw_store.database import SealingKeyRow, TaskRow
from openclaw_store.domain import Retention
from openclaw_store.maintenance.statistics import read_statistics
from openclaw_store.maintenance.summary import summarize
from openclaw_store.testing import FakeClock

SEALING = KeyRing(KEYS[:1], 1, seal={"name", "user_id"})
USER = f"{SECRET}-" + "用" * 240  # longer than a `varchar(255)` when it is sealed


async def fields_of(database: Database) -> set[str]:
    async with database.session() as session:
        return set(await session.scalars(select(SealingKeyRow.sealed_fields)))


@pytest.mark.usefixtures("migrated")
async def test_names_and_users_are_sealed_and_found(
    location: Location, clock: FakeClock, make_task: MakeTask
) -> None:
    async with StateManager(Database(location, clock=clock, keys=SEALING), None) as state:
        for id, user in (("t1", USER), ("t2", USER), ("t3", f"{USER}x"), ("t4", None)):
            clock.advance(seconds=1)
            await state.add_task(make_task(task_id=id, name=f"{SECRET} {id}", user_id=user))
        found = await state.list_tasks(TaskFilter(user=USER))
        count = await state.count_tasks(TaskFilter(user=USER, status=TaskStatus.PENDING))
        with pytest.raises(InvalidDataError, match="sealed values") as error:
            await state.list_tasks(TaskFilter(name_contains=SECRET))
        summary = await summarize(state.db)
        async with state.db.session() as session:
            row = (await session.scalars(select(TaskRow).where(TaskRow.task_id == "t1"))).one()
        assert await verify(state.db)
    # A later process seals the same fields, whatever its key ring says.
    async with Database(location, clock=clock, keys=KeyRing(KEYS[:2], 2)) as later:
        tasks = TaskRepository(later)
        await tasks.create(make_task(task_id="t5", name=SECRET, user_id=USER))
        by_user = [task.task_id for task in await tasks.list_by_user(USER)]
        assert await later.rekey()
        rotated = [task.task_id for task in await tasks.list_by_user(USER)]
        assert await tasks.list_by_user(SECRET) == []

    assert [task.task_id for task in found] == ["t2", "t1"]
    assert (count, error.value.field) == (2, "name_contains")
    assert summary.oldest_waiting is not None
    assert summary.oldest_waiting.name == f"{SECRET} t1"
    assert (row.name, row.user_id) == (f"{SECRET} t1", USER)
    assert sorted(by_user) == sorted(rotated) == ["t1", "t2", "t5"]
    assert SECRET not in repr(table(location, "tasks"))


@pytest.mark.usefixtures("migrated")
async def test_fields_are_turned_on_and_off_by_a_rotation(
    location: Location, clock: FakeClock, make_task: MakeTask
) -> None:
    async with StateManager(Database(location, clock=clock, keys=RING), None) as state:
        await state.add_task(make_task(task_id="t1", name=SECRET, user_id=USER))
    off = KeyRing(KEYS[:1], 1, seal=())
    before = table(location, "tasks")
    for ring, fields, left in ((SEALING, "name user_id", ""), (off, "", "-name -user_id")):
        async with Database(location, clock=clock, keys=ring) as database:
            tasks = TaskRepository(database)
            assert await fields_of(database) == {fields or left}
            assert [task.name for task in await tasks.list_by_user(USER)] == [SECRET]
            with pytest.raises(InvalidDataError, match="sealed values"):
                await tasks.count_tasks(TaskFilter(name_contains=SECRET))
            assert (await database.rekey()).changed == 1
            assert await fields_of(database) == {fields}
            assert [task.name for task in await tasks.list_by_user(USER)] == [SECRET]
            assert (SECRET in repr(table(location, "tasks"))) == (ring is off)
            if ring is off:
                assert await tasks.count_tasks(TaskFilter(name_contains=SECRET)) == 1
    async with Database(location, clock=clock, keys=RING) as database:
        names = await TaskRepository(database).list_tasks(TaskFilter(name_contains=SECRET))
    assert [task.name for task in names] == [SECRET]
    # The sealed texts of the other fields differ.
    assert {row[0] for row in table(location, "tasks")} == {row[0] for row in before}


@pytest.mark.usefixtures("migrated")
async def test_moved_user_id_does_not_open(location: Location, make_task: MakeTask) -> None:
    async with Database(location, keys=SEALING) as database:
        tasks = TaskRepository(database)
        for id in ("t1", "t2"):
            await tasks.create(make_task(task_id=id, user_id=id))
        other = select(func.max(TaskRow.user_id)).where(TaskRow.task_id == "t1")
        async with database.transaction() as tx:
            stored = await tx.scalar(other)
            row = await tx.get_one(TaskRow, "t2")
            row.user_id = stored
        assert await tasks.get("t1") is not None
        with pytest.raises(SealedValueError, match="user_id: of 't2'"):
            await tasks.get("t2")


@pytest.mark.usefixtures("migrated")
async def test_copies_and_archives_seal_the_same_fields(
    location: Location,
    another_location: Location,
    clock: FakeClock,
    tmp_path: Path,
    make_task: MakeTask,
) -> None:
    async with Database(location, clock=clock, keys=SEALING) as database:
        task = make_task(task_id="t1", name=SECRET, user_id=USER, status=TaskStatus.COMPLETED)
        task.completed_at = clock()
        await TaskRepository(database).create(task)
        target = Database(another_location, clock=clock, keys=KeyRing(KEYS[1:2], 2))
        try:
            await copy(database, target)
        finally:
            await target.close()
        clock.advance(seconds=10)
        sql, since = database.statements, clock() - timedelta(days=1)
        found = await database.inspect(lambda one: read_statistics(one, sql, since, clock()))
        policy = Retention(completed=timedelta(0), archive=tmp_path / "archive", load=1.0)
        await retain(database, policy)
        async with open_archive(tmp_path / "archive", database=database) as archive:
            archived = await archive.list_by_user(USER)
            with pytest.raises(InvalidDataError, match="sealed values"):
                await archive.count_tasks(TaskFilter(name_contains=SECRET))

    assert found.by["user"] == {USER: 1}
    assert [one.name for one in archived] == [SECRET]
    assert SECRET not in repr(table(another_location, "tasks"))
    async with Database(another_location, keys=KeyRing(KEYS[1:2], 2)) as copied:
        assert [one.name for one in await TaskRepository(copied).list_by_user(USER)] == [SECRET]


@pytest.mark.parametrize("fields", [{"priority"}, "name", {"description"}])
def test_other_fields_are_refused(fields: set[str]) -> None:
    with pytest.raises(InvalidDataError, match="name, user_id"):
        KeyRing(KEYS, 1, seal=fields)
