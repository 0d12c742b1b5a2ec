"""`Database.joined`: tasks that commit with the caller's own rows."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from conftest import FakeClock, Location, MakeNode, MakeTask, assert_in_step, execute, until
from sqlalchemy import event, select, text
from sqlalchemy.ext.asyncio import (
    AsyncEngine,
    AsyncSession,
    async_sessionmaker,
    create_async_engine,
)
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

from openclaw_store import (
    Database,
    DeadlineError,
    DuplicateError,
    InvalidDataError,
    NodeRepository,
    StateManager,
    StoreError,
    TaskRepository,
    TaskStatus,
    verify,
)

Sessions = async_sessionmaker[AsyncSession]


class Base(DeclarativeBase):
    pass


class Order(Base):
    """A row of the caller, in a table that the caller's search path finds."""

    __tablename__ = "orders"
    number: Mapped[int] = mapped_column(primary_key=True)
    task_id: Mapped[str]


def engine_at(location: Location, **options: Any) -> AsyncEngine:
    url = f"sqlite+aiosqlite:///{location}" if isinstance(location, Path) else location
    return create_async_engine(url, **options)


@pytest.fixture
async def engine(location: Location, database: Database) -> AsyncIterator[AsyncEngine]:
    """The caller's own engine, with a table of its own."""
    engine = engine_at(location)
    async with engine.begin() as connection:
        await connection.run_sync(Base.metadata.create_all)
    yield engine
    await engine.dispose()


@pytest.fixture
def sessions(engine: AsyncEngine) -> Sessions:
    return async_sessionmaker(engine)


async def orders(sessions: Sessions) -> list[int]:
    async with sessions() as session:
        return [*await session.scalars(select(Order.number).order_by(Order.number))]


async def test_task_and_row_commit_together(
    database: Database, sessions: Sessions, make_task: MakeTask, make_node: MakeNode
) -> None:
    tasks, task = TaskRepository(database), make_task(parameters={"size": [1, "zwei"]})
    async with sessions() as session:
        session.add(Order(number=1, task_id=task.task_id))
        async with database.joined(session) as tx:
            await TaskRepository(tx).create(task)
            await NodeRepository(tx).register(make_node(node_id="atlas"))
            assert await TaskRepository(tx).get(task.task_id) == task
            [claimed] = await TaskRepository(tx).claim("atlas", start=True)
        session.add(Order(number=2, task_id=task.task_id))
        await session.flush()
        async with database.joined(session) as tx:
            await TaskRepository(tx).complete(claimed, {"done": True})
        assert await tasks.get(task.task_id) is None  # nothing is committed yet
        await session.commit()

    stored = await tasks.get(task.task_id)
    assert stored is not None
    assert (stored.status, stored.result) == (TaskStatus.COMPLETED, {"done": True})
    assert await orders(sessions) == [1, 2]
    assert await verify(database)


async def test_rollback_undoes_both(
    database: Database, sessions: Sessions, make_task: MakeTask
) -> None:
    task = make_task()
    async with sessions() as session:
        session.add(Order(number=1, task_id=task.task_id))
        async with database.joined(session) as tx:
            await TaskRepository(tx).create(task)
            assert task.version == 1
        await session.rollback()
    assert task.version == 0
    assert await orders(sessions) == []
    assert await TaskRepository(database).count_tasks() == 0
    await TaskRepository(database).create(task)  # it can be written, and no revision is missing
    assert task.version == 1


async def test_rollback_of_a_savepoint_restores_the_objects_of_its_blocks(
    database: Database, sessions: Sessions, make_task: MakeTask
) -> None:
    """Planted: the commit keeps versions of the savepoint, which another change gets again."""
    first, second, third = make_task(), make_task(), make_task()
    async with sessions() as session:
        async with database.joined(session) as tx:
            await TaskRepository(tx).create(first)
        outer = await session.begin_nested()
        async with database.joined(session) as tx:
            await TaskRepository(tx).create(second)
        async with session.begin_nested(), database.joined(session) as tx:
            await TaskRepository(tx).create(third)
        assert (second.version, third.version) == (2, 3)
        await outer.rollback()
        assert (second.version, third.version) == (0, 0)
        async with session.begin_nested(), database.joined(session) as tx:
            await TaskRepository(tx).create(third)
        await session.commit()

    assert (first.version, second.version, third.version) == (1, 0, 2)
    assert await TaskRepository(database).count_tasks() == 2


async def test_block_that_fails_is_undone_alone(
    database: Database, sessions: Sessions, make_task: MakeTask
) -> None:
    first, second = make_task(), make_task()
    async with sessions() as session:
        session.add(Order(number=1, task_id=first.task_id))
        async with database.joined(session) as tx:
            await TaskRepository(tx).create(first)

        async def fail() -> None:
            async with database.joined(session) as tx:
                await TaskRepository(tx).create(second)
                raise KeyError("the caller's own")

        with pytest.raises(KeyError):
            await fail()
        session.add(Order(number=2, task_id=first.task_id))
        await session.commit()
    assert (first.version, second.version) == (1, 0)
    assert await orders(sessions) == [1, 2]
    assert await TaskRepository(database).get(first.task_id) == first
    assert await TaskRepository(database).count_tasks() == 1
    assert await verify(database)


async def test_refused_write_changes_nothing_and_the_block_goes_on(
    database: Database, sessions: Sessions, make_task: MakeTask
) -> None:
    task = make_task()
    async with sessions() as session:
        async with database.joined(session) as tx:
            await TaskRepository(tx).create(task)
            with pytest.raises(DuplicateError):
                await TaskRepository(tx).create(task)
        await session.commit()
    assert await TaskRepository(database).count_tasks() == 1


async def test_caches_are_told_after_the_commit(
    location: Location, sessions: Sessions, clock: FakeClock, make_task: MakeTask
) -> None:
    """Those of this process, which has made the change, and those of others."""
    task = make_task()
    async with (
        StateManager(Database(location, clock=clock), 60) as own,
        StateManager(Database(location, clock=clock), 60) as other,
    ):
        async with sessions() as session:
            async with own.db.joined(session) as tx:
                await TaskRepository(tx).create(task)
            await asyncio.sleep(0.05)
            assert (own.version, other.version) == (0, 0)
            await session.commit()
        await until(lambda: own.version == other.version == 1)
        assert await own.get_task(task.task_id) == await other.get_task(task.task_id) == task
        await own.add_task(make_task())
        await assert_in_step(own, other)


async def test_call_that_would_wait_for_its_own_transaction_is_refused(
    database: Database, sessions: Sessions, make_task: MakeTask
) -> None:
    async with sessions() as session:
        async with database.joined(session) as tx:
            await TaskRepository(tx).create(make_task())
        with pytest.raises(DeadlineError, match="wait for the transaction it is in"):
            await TaskRepository(database).create(make_task())  # after the block, before the commit
        async with sessions() as another:
            with pytest.raises(DeadlineError, match="wait for the transaction it is in"):
                async with database.joined(another):
                    pass
        await session.commit()
    await TaskRepository(database).create(make_task())
    assert await TaskRepository(database).count_tasks() == 2


async def test_call_is_refused_also_behind_a_transaction_around_the_block(
    database: Database, tmp_path: Path, sessions: Sessions, make_task: MakeTask
) -> None:
    """The end of the transaction forgot the lock, and the call waited for itself."""
    async with Database(tmp_path / "other.db") as other, sessions() as session:
        async with other.transaction(), database.joined(session) as tx:
            await TaskRepository(tx).create(make_task())
        with pytest.raises(DeadlineError, match="wait for the transaction it is in"):
            await TaskRepository(database).create(make_task())
        await session.commit()
    await TaskRepository(database).create(make_task())
    assert await TaskRepository(database).count_tasks() == 2


async def test_writers_wait_for_the_commit(
    database: Database, location: Location, sessions: Sessions, make_task: MakeTask
) -> None:
    async with Database(location) as other, sessions() as session:
        async with database.joined(session) as tx:
            await TaskRepository(tx).create(make_task())
        waiting = asyncio.create_task(TaskRepository(other).create(make_task()))
        await asyncio.sleep(0.1)
        assert not waiting.done()
        await session.commit()
        await waiting
    changes = execute(location, "SELECT revision FROM changes ORDER BY revision")
    assert changes == [(1,), (2,)]


async def test_block_that_takes_too_long_undoes_the_transaction(
    database: Database, sessions: Sessions, make_task: MakeTask
) -> None:
    async with sessions() as session:
        session.add(Order(number=1, task_id=""))

        async def dawdle() -> None:
            async with database.joined(session, timeout=0.05) as tx:
                await TaskRepository(tx).create(make_task())
                await asyncio.sleep(5)

        with pytest.raises(DeadlineError, match="took longer"):
            await dawdle()
        await session.rollback()
    assert await orders(sessions) == []
    assert await TaskRepository(database).count_tasks() == 0


async def test_cancelled_block_leaves_nothing(
    database: Database, sessions: Sessions, make_task: MakeTask
) -> None:
    is_inside = asyncio.Event()

    async def run() -> None:
        async with sessions() as session:
            session.add(Order(number=1, task_id=""))
            async with database.joined(session) as tx:
                await TaskRepository(tx).create(make_task())
                is_inside.set()
                await asyncio.sleep(60)

    work = asyncio.create_task(run())
    await is_inside.wait()
    work.cancel()
    with pytest.raises(asyncio.CancelledError):
        await work
    assert await orders(sessions) == []
    await TaskRepository(database).create(make_task())
    assert await TaskRepository(database).count_tasks() == 1


async def test_caller_cancelled_twice_at_the_savepoint_leaves_nothing(
    database: Database, engine: AsyncEngine, sessions: Sessions
) -> None:
    """SQLAlchemy, on the caller's task, would give up at the second one while it cleans up."""
    is_sent, tasks = asyncio.Event(), asyncio.all_tasks()
    event.listen(engine.sync_engine, "savepoint", lambda *_: is_sent.set())

    async def run() -> None:
        async with sessions() as session, database.joined(session):
            pass

    work = asyncio.create_task(run())
    await is_sent.wait()
    for _ in range(2):
        work.cancel()
        await asyncio.sleep(0)
    with pytest.raises(asyncio.CancelledError):
        await work
    async with asyncio.timeout(10):
        while asyncio.all_tasks() - tasks:  # noqa: ASYNC110 - there is no event to wait for
            await asyncio.sleep(0.01)


async def test_session_that_cannot_be_joined_is_refused(
    database: Database, another_location: Location, engine: AsyncEngine
) -> None:
    async def refuse(session: Any, reason: str) -> None:
        with pytest.raises(InvalidDataError, match=f"session: .*{reason}"):
            async with database.joined(session):
                pass

    await refuse(engine, "must be an AsyncSession")
    async with database.session() as own:
        await refuse(own, "one of the store's")
    async with engine.connect() as connection, AsyncSession(connection) as bound:
        await refuse(bound, "bound to an engine")
    elsewhere = engine_at(another_location)
    async with AsyncSession(elsewhere) as session:
        await refuse(session, "is not on ")
    await elsewhere.dispose()


@pytest.mark.postgresql
@pytest.mark.parametrize(
    ("level", "reason"),
    [
        ("SERIALIZABLE", "is serializable: use READ COMMITTED"),
        ("REPEATABLE READ", "is repeatable read: use READ COMMITTED"),
        ("AUTOCOMMIT", "commits each statement"),
    ],
)
async def test_other_isolation_is_refused(
    database: Database, location: str, level: Any, reason: str
) -> None:
    engine = engine_at(location, isolation_level=level)
    async with AsyncSession(engine) as session:
        with pytest.raises(InvalidDataError, match=reason):
            async with database.joined(session):
                pass
    await engine.dispose()


@pytest.mark.postgresql
async def test_read_only_transaction_is_refused(database: Database, sessions: Sessions) -> None:
    async with sessions() as session:
        await session.execute(text("SET TRANSACTION READ ONLY"))
        with pytest.raises(InvalidDataError, match="only reads"):
            async with database.joined(session):
                pass


@pytest.mark.postgresql
async def test_settings_of_the_caller_stay(
    database: Database, sessions: Sessions, make_task: MakeTask
) -> None:
    async with sessions() as session:
        await session.execute(text("SET LOCAL lock_timeout = '7s'"))
        before = await session.scalar(text("SHOW search_path"))
        async with database.joined(session) as tx:
            await TaskRepository(tx).create(make_task())
        assert await session.scalar(text("SHOW lock_timeout")) == "7s"
        assert await session.scalar(text("SHOW search_path")) == before
        await session.commit()


@pytest.mark.postgresql
async def test_tables_of_a_cluster_with_a_hostile_search_path(
    location: str, engine: AsyncEngine, make_task: MakeTask
) -> None:
    """The caller's tables and another `tasks` come first in its search path."""
    execute(location, "CREATE SCHEMA decoy")
    execute(location, "CREATE TABLE decoy.tasks (task_id text)")
    task = make_task()
    async with Database(location, cluster="berlin") as berlin, AsyncSession(engine) as session:
        await session.execute(text("SET LOCAL search_path = decoy, public"))
        session.add(Order(number=1, task_id=task.task_id))
        async with berlin.joined(session) as tx:
            await TaskRepository(tx).create(task)
            assert await TaskRepository(tx).get(task.task_id) == task
            assert await TaskRepository(tx).count_tasks() == 1
            session.add(Order(number=2, task_id=task.task_id))  # SQLAlchemy writes it at the end
        session.add(Order(number=3, task_id=task.task_id))
        await session.commit()
        assert await TaskRepository(berlin).get(task.task_id) == task
    assert execute(location, "SELECT count(*) FROM decoy.tasks") == [(0,)]
    assert execute(location, "SELECT number FROM public.orders") == [(1,), (2,), (3,)]


@pytest.mark.sqlite
async def test_transaction_that_read_an_old_snapshot_is_refused(
    database: Database, location: Location, sessions: Sessions, make_task: MakeTask
) -> None:
    async with sessions() as session:
        await session.execute(text("BEGIN"))
        assert await session.scalar(select(Order.number)) is None
        async with Database(location) as other:
            await TaskRepository(other).create(make_task())
        with pytest.raises(InvalidDataError, match="read before another process wrote"):
            async with database.joined(session):
                pass


async def test_writes_after_the_block_are_refused(
    database: Database, sessions: Sessions, make_task: MakeTask
) -> None:
    async with sessions() as session:
        async with database.joined(session) as tx:
            await TaskRepository(tx).create(make_task())
            with pytest.raises(StoreError, match="do not commit it"):
                await tx.commit()
        with pytest.raises(StoreError, match="only reads"):
            await TaskRepository(tx).create(make_task())
        await session.commit()
    assert await TaskRepository(database).count_tasks() == 1
