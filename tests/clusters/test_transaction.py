"""`transaction(a, b)`: one transaction over clusters of one server."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import pytest
from conftest import PATIENCE, MakeNode, Maker, MakeTask, assert_in_step, execute, until
from sqlalchemy import select
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

from openclaw_store import (
    Clusters,
    Database,
    DeadlineError,
    DuplicateError,
    InvalidDataError,
    NodeRepository,
    StateManager,
    StoreError,
    Task,
    TaskRepository,
    TaskType,
    transaction,
    verify,
)
from openclaw_store.backends.postgresql import listening
from openclaw_store.database.tables import TaskRow

pytestmark = pytest.mark.postgresql

NAMES = ("berlin", "tokyo")


class Base(DeclarativeBase):
    pass


class Note(Base):
    """A row of the caller, in a table beside those of the store."""

    __tablename__ = "notes"
    text: Mapped[str] = mapped_column(primary_key=True)


@pytest.fixture(scope="session")
def two_clusters(maker: Maker) -> str:
    """A database with two clusters to copy, which is faster than to migrate both for each test."""
    url = maker.make()

    async def create() -> None:
        for name in NAMES:
            await Clusters(url).create(name)

    asyncio.run(create())
    return url


@pytest.fixture
def place(maker: Maker, two_clusters: str) -> Iterator[str]:
    """A server with two clusters."""
    url = maker.make(two_clusters)
    yield url
    maker.drop(url)


@pytest.fixture
async def managers(place: str) -> AsyncIterator[list[StateManager]]:
    """Two clusters of one server, with their caches."""
    async with AsyncExitStack() as stack:
        made = [StateManager(Database(place, cluster=name), None) for name in NAMES]
        yield [await stack.enter_async_context(one) for one in made]


async def tasks_in(*managers: StateManager) -> list[list[str]]:
    """The tasks of each cluster, in the database."""
    found = [await one.task_repo.list_tasks() for one in managers]
    return [[task.task_id for task in page] for page in found]


async def test_both_clusters_commit_together(
    managers: list[StateManager], make_task: MakeTask, make_node: MakeNode
) -> None:
    berlin, tokyo = managers
    await berlin.add_task(task := make_task())

    async with transaction(tokyo.db, berlin.db) as (t, b):  # in the order of the caller
        moved = await TaskRepository(b).get(task.task_id)
        assert moved is not None
        await TaskRepository(b).delete(task.task_id)
        moved.version = 0
        await TaskRepository(t).create(moved)
        await NodeRepository(t).register(make_node(node_id="atlas"))
        assert await tasks_in(berlin, tokyo) == [[task.task_id], []]  # nothing is committed yet

    assert await berlin.get_task(task.task_id) is None  # the caches of this process know at once
    assert await tokyo.get_task(task.task_id) == moved
    assert [berlin.version, tokyo.version] == [2, 2]
    await assert_in_step(berlin, tokyo)
    assert await verify(berlin.db)
    assert await verify(tokyo.db)


async def test_each_session_has_its_own_tables(
    place: str, managers: list[StateManager], make_task: MakeTask
) -> None:
    """Planted: the second session's schema is given to the connection, which the first one uses."""
    berlin, tokyo = managers
    for manager in managers:
        await manager.add_task(make_task(task_id=str(manager.db.schema)))
        execute(place, f"CREATE TABLE {manager.db.schema}.notes (text text PRIMARY KEY)")

    async with transaction(berlin.db, tokyo.db) as sessions:
        for _ in range(2):  # each is read after the other
            for name, session in zip(NAMES, sessions, strict=True):
                tasks = TaskRepository(session)
                assert [await tasks.get(one) is not None for one in NAMES] == [
                    one == name for one in NAMES
                ]
                assert [task.task_id for task in await tasks.list_tasks()] == [name]
                assert [*await session.scalars(select(TaskRow.task_id))] == [name]
        for name, session in zip(NAMES, reversed(sessions), strict=True):
            session.add(Note(text=f"not of {name}"))
            await session.flush()

    for name, other in zip(NAMES, reversed(NAMES), strict=True):
        assert execute(place, f"SELECT text FROM {other}.notes") == [(f"not of {name}",)]


async def test_error_rolls_both_back(managers: list[StateManager], make_task: MakeTask) -> None:
    berlin, tokyo = managers
    first, second = make_task(), make_task()

    async def fail() -> None:
        async with transaction(berlin.db, tokyo.db) as (b, t):
            await TaskRepository(b).create(first)
            await TaskRepository(t).create(second)
            raise KeyError("the caller's own")

    with pytest.raises(KeyError):
        await fail()

    assert (first.version, second.version) == (0, 0)
    assert await tasks_in(*managers) == [[], []]
    await berlin.add_task(first)  # the locks are free, and no revision is missing
    assert first.version == 1
    await assert_in_step(*managers)


@pytest.mark.parametrize("which", [0, 1])
async def test_rollback_of_either_session_ends_both(
    managers: list[StateManager], make_task: MakeTask, which: int
) -> None:
    async with transaction(*[one.db for one in managers]) as sessions:
        await TaskRepository(sessions[0]).create(make_task())
        await sessions[which].rollback()
        for one in sessions:
            with pytest.raises(StoreError):
                await TaskRepository(one).create(make_task())

    assert await tasks_in(*managers) == [[], []]


async def test_write_that_fails_in_one_cluster_rolls_both_back(
    managers: list[StateManager], make_task: MakeTask, place: str
) -> None:
    execute(place, "ALTER TABLE tokyo.tasks ADD CONSTRAINT refused CHECK (name <> 'bad')")

    async def write() -> None:
        async with transaction(*[one.db for one in managers]) as (b, t):
            await TaskRepository(b).create(make_task())
            await TaskRepository(t).create(make_task(name="bad"))

    with pytest.raises(InvalidDataError):
        await write()

    assert await tasks_in(*managers) == [[], []]


async def test_refused_write_changes_nothing_and_the_block_goes_on(
    managers: list[StateManager], make_task: MakeTask
) -> None:
    berlin, tokyo = managers
    await tokyo.add_task(task := make_task())

    async with transaction(berlin.db, tokyo.db) as (b, t):
        with pytest.raises(DuplicateError):
            await TaskRepository(t).create(task)
        await asyncio.gather(
            TaskRepository(b).create(make_task()), TaskRepository(t).create(make_task())
        )

    assert [len(ids) for ids in await tasks_in(berlin, tokyo)] == [1, 2]
    await assert_in_step(*managers)


async def test_order_of_the_caller_makes_no_deadlock(
    managers: list[StateManager], place: str, make_task: MakeTask
) -> None:
    """Both orders at once, in this process and from another one as far as the server knows."""
    async with AsyncExitStack() as stack:
        own = [one.db for one in managers]
        others = [await stack.enter_async_context(Database(place, cluster=name)) for name in NAMES]

        async def write(*databases: Database) -> None:
            for _ in range(3):
                async with transaction(*databases) as sessions:
                    for one in sessions:
                        await TaskRepository(one).create(make_task())

        async with asyncio.timeout(PATIENCE):
            await asyncio.gather(*(write(*pair) for pair in (own, own[::-1], others, others[::-1])))

    assert [len(ids) for ids in await tasks_in(*managers)] == [12, 12]


async def test_calls_inside_the_block_do_not_wait_for_it(
    managers: list[StateManager], make_task: MakeTask
) -> None:
    berlin, tokyo = managers
    async with transaction(berlin.db, tokyo.db):
        for one in (berlin, tokyo):
            with pytest.raises(DeadlineError):
                await one.add_task(make_task())
            with pytest.raises(DeadlineError):
                async with one.db.transaction():
                    pass


async def test_other_processes_hear_of_both(
    managers: list[StateManager],
    place: str,
    make_task: MakeTask,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(listening, "ALIVE_SECONDS", 3600)  # a notification alone tells them
    async with AsyncExitStack() as stack:
        foreign = [
            await stack.enter_async_context(StateManager(Database(place, cluster=name), 3600))
            for name in NAMES
        ]
        async with transaction(*[one.db for one in managers]) as sessions:
            for one in sessions:
                await TaskRepository(one).create(make_task())

        await until(lambda: [one.version for one in foreign] == [1, 1])


async def test_block_that_takes_too_long_writes_nothing(
    managers: list[StateManager], make_task: MakeTask
) -> None:
    async def write() -> None:
        async with transaction(*[one.db for one in managers], timeout=0.05) as (b, _):
            await TaskRepository(b).create(make_task())
            await asyncio.sleep(PATIENCE)

    with pytest.raises(DeadlineError):
        await write()

    assert await tasks_in(*managers) == [[], []]


async def test_databases_without_a_common_transaction_are_refused(
    managers: list[StateManager], tmp_path: Path
) -> None:
    berlin, tokyo = [one.db for one in managers]
    given: list[tuple[Any, ...]] = [(berlin, managers[1]), (berlin, berlin), ()]
    async with Database(tmp_path / "a.db") as file, Database(tmp_path / "b.db") as another:
        given += [(berlin, file), (file, tokyo), (file, another)]
        for databases in given:
            with pytest.raises(InvalidDataError, match="databases"):
                async with transaction(*databases):
                    raise AssertionError
        async with transaction(file) as (tx,):  # a single one is an ordinary transaction
            await TaskRepository(tx).create(Task.create(TaskType.BATCH, "one"))
