"""Clusters of one location: each has its own state, its own order of changes, and no other's."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from contextlib import AsyncExitStack
from pathlib import Path

import pytest
from conftest import Location, MakeNode, MakeTask, assert_in_step, execute, feed, until
from sqlalchemy import text

from openclaw_store import (
    Database,
    InvalidDataError,
    NodeRepository,
    SchemaMismatchError,
    StateManager,
    TaskRepository,
    verify,
)
from openclaw_store.backends.factory import backend_of
from openclaw_store.backends.postgresql.protocol import listener_names
from openclaw_store.database import cluster_id_of, migrations
from openclaw_store.maintenance.copy import copy

Open = Callable[..., Database]


@pytest.fixture
def places(location: Location, tmp_path: Path) -> Location:
    """A location of many clusters."""
    return tmp_path / "{cluster}.db" if isinstance(location, Path) else location


@pytest.fixture
async def open_cluster(places: Location) -> AsyncIterator[Callable[..., object]]:
    """Opens clusters, and closes them at the end."""
    async with AsyncExitStack() as stack:

        async def open(name: str, interval: float | None = None) -> StateManager:
            manager = StateManager(Database(places, cluster=name), interval)
            return await stack.enter_async_context(manager)

        yield open


async def test_clusters_share_neither_rows_nor_revisions(
    open_cluster: Callable[..., object], make_task: MakeTask, make_node: MakeNode
) -> None:
    managers = [await open_cluster(name) for name in ("berlin", "tokyo")]  # type: ignore[misc]
    task, node = make_task(), make_node()

    for manager in managers:  # the same identifiers
        await manager.add_task(task)
        await manager.register_node(node)
    berlin, tokyo = managers
    [claimed] = await berlin.claim_tasks(node.node_id, start=True)
    await berlin.complete_task(claimed, {"place": "berlin"})

    assert [task.task_id for task in await tokyo.claim_tasks(node.node_id)] == [task.task_id]
    stored = await tokyo.get_task(task.task_id)
    assert stored is not None
    assert stored.result is None
    assert len(await feed(berlin)) > len(await feed(tokyo))
    await assert_in_step(*managers)
    for manager in managers:
        assert await verify(manager.db)


async def test_cluster_beside_the_tables_of_public(
    location: Location, places: Location, make_task: MakeTask
) -> None:
    async with Database(location) as public, Database(places, cluster="berlin") as berlin:
        await TaskRepository(public).create(make_task())

        assert await TaskRepository(berlin).count_tasks() == 0
        assert await TaskRepository(public).count_tasks() == 1
        async with berlin.transaction() as tx:
            await TaskRepository(tx).create(make_task())
            await TaskRepository(tx).create(make_task())
        assert await TaskRepository(berlin).count_tasks() == 2
        assert await TaskRepository(public).count_tasks() == 1


async def test_wake_ups_and_locks_stay_in_their_cluster(
    open_cluster: Callable[..., object], places: Location, make_task: MakeTask
) -> None:
    berlin, tokyo = [await open_cluster(name, 60.0) for name in ("berlin", "tokyo")]  # type: ignore[misc]
    heard: dict[str, list[int]] = {"berlin": [], "tokyo": []}
    async with (
        Database(places, cluster="berlin") as other_berlin,
        Database(places, cluster="tokyo") as other_tokyo,
    ):
        notifiers = [
            database.follow(lambda revision, _, name=name: heard[name].append(revision))  # type: ignore[misc]
            for name, database in (("berlin", other_berlin), ("tokyo", other_tokyo))
        ]
        try:
            await until(lambda: all(heard.values()))
            quiet = len(heard["tokyo"])
            for _ in range(20):
                await berlin.add_task(make_task())
            await until(lambda: heard["berlin"][-1] == berlin.version)
            async with berlin.db.transaction() as tx:
                await TaskRepository(tx).create(make_task())
            await until(lambda: heard["berlin"][-1] == 21)

            assert not any(heard["tokyo"][quiet:])
            await tokyo.add_task(make_task())
            await until(lambda: heard["tokyo"][-1] == 1)
        finally:
            for notifier in notifiers:
                await notifier.stop()


@pytest.mark.postgresql
async def test_write_lock_of_one_cluster_stops_no_other(
    open_cluster: Callable[..., object], make_task: MakeTask
) -> None:
    berlin, tokyo = [await open_cluster(name) for name in ("berlin", "tokyo")]  # type: ignore[misc]
    async with berlin.db.transaction() as tx:
        await TaskRepository(tx).create(make_task())
        async with asyncio.timeout(10):
            await tokyo.add_task(make_task())


@pytest.mark.postgresql
async def test_processes_hear_what_others_of_their_cluster_commit(
    open_cluster: Callable[..., object], make_task: MakeTask
) -> None:
    """The first listener is alone, then it is not: both ways to notify are taken."""
    one = await open_cluster("berlin", 60.0)  # type: ignore[misc]
    await one.add_task(make_task())
    two = await open_cluster("berlin", 60.0)  # type: ignore[misc]
    for writer, reader in ((one, two), (two, one)):
        task = make_task()
        await writer.add_task(task)
        async with asyncio.timeout(10):
            await until(lambda task=task, reader=reader: reader.version >= task.version)  # type: ignore[misc]


@pytest.mark.postgresql
def test_number_of_a_cluster_gives_it_names_of_its_own() -> None:
    public = listener_names("public", 7)
    assert public == listener_names("public", 8)
    assert len({public, listener_names("berlin", 7), listener_names("tokyo", 8)}) == 3


async def test_each_cluster_has_a_number_that_stays(places: Location, location: Location) -> None:
    numbers = []
    for place, name in ((location, None), (places, "berlin"), (places, "tokyo")):
        for _ in range(2):
            async with Database(place, cluster=name) as database:
                numbers.append(await cluster_id_of(database))
    assert numbers[::2] == numbers[1::2]
    assert len({*numbers}) == 3
    assert all(0 < number < 2**62 for number in numbers)


async def test_copy_from_one_cluster_to_another(places: Location, make_task: MakeTask) -> None:
    async with Database(places, cluster="berlin") as berlin:
        await TaskRepository(berlin).create(make_task())
        tokyo = Database(places, cluster="tokyo")
        try:
            assert (await copy(berlin, tokyo)).tasks == 1
        finally:
            await tokyo.close()
        async with Database(places, cluster="tokyo") as tokyo:
            assert await TaskRepository(tokyo).count_tasks() == 1
            assert await cluster_id_of(tokyo) not in (0, await cluster_id_of(berlin))
        with pytest.raises(InvalidDataError, match="the source itself"):
            await copy(berlin, Database(places, cluster="berlin"))


async def test_schema_of_one_cluster_is_upgraded_alone(places: Location) -> None:
    for name in ("berlin", "tokyo"):
        async with Database(places, cluster=name):
            pass
    berlin, tokyo = [backend_of(places, cluster=name) for name in ("berlin", "tokyo")]
    for revision in ("0005", "0004", "base"):
        await asyncio.to_thread(migrations.downgrade, berlin, revision)
    await asyncio.to_thread(migrations.check, tokyo)
    with pytest.raises(SchemaMismatchError):
        await Database(places, cluster="berlin").initialize(migrate=False)
    async with Database(places, cluster="berlin"):
        await asyncio.to_thread(migrations.check, berlin)


@pytest.mark.postgresql
async def test_function_with_the_names_of_another_cluster_is_found(places: str) -> None:
    async with Database(places, cluster="berlin") as berlin:
        await asyncio.to_thread(migrations.check, backend_of(places, cluster="berlin"))
        assert await verify(berlin)
        [[source]] = execute(
            places,
            "SELECT pg_get_functiondef(oid) FROM pg_proc "
            "WHERE proname LIKE 'store_write_%' AND pronamespace = to_regnamespace('berlin')",
        )
        assert "to_hex(own)" in source
        execute(places, source.replace("'openclaw_store_' || to_hex(own)", "'openclaw_store'"))

        [problem] = (await verify(berlin)).problems
        assert "berlin.store_write" in problem.text
        with pytest.raises(SchemaMismatchError, match=r"berlin\.store_write"):
            await asyncio.to_thread(migrations.check, backend_of(places, cluster="berlin"))


@pytest.mark.parametrize(
    "name",
    [
        "",
        "Berlin",
        "9",
        "a-b",
        "a.b",
        "a" * 64,
        "pg_catalog",
        "public",
        "select",
        "order",
        'a"b',
        7,
    ],
)
def test_name_that_would_need_quotes_is_refused(name: str) -> None:
    for location in ("postgresql://host/db", "./{cluster}.db", ":memory:"):
        with pytest.raises(InvalidDataError, match="cluster"):
            Database(location, cluster=name)


@pytest.mark.postgresql
async def test_every_name_that_the_server_would_need_quoted_is_refused(location: str) -> None:
    words = execute(location, "SELECT word FROM pg_get_keywords() WHERE catcode IN ('R', 'T')")
    for (word,) in words:
        with pytest.raises(InvalidDataError, match="has a meaning in SQL"):
            backend_of(location, cluster=word)


def test_path_and_name_belong_together(tmp_path: Path) -> None:
    with pytest.raises(InvalidDataError, match="cluster: is missing"):
        Database(tmp_path / "{cluster}.db")
    with pytest.raises(InvalidDataError, match="must contain"):
        Database(tmp_path / "store.db", cluster="berlin")
    database = Database(f"sqlite:///{tmp_path}/{{cluster}}/store.db", cluster="berlin")
    assert database.db_path == str(tmp_path / "berlin" / "store.db")


async def test_private_database_may_have_a_name(make_task: MakeTask) -> None:
    async with Database(":memory:", cluster="berlin") as database:
        await TaskRepository(database).create(make_task())
        assert database.cluster == "berlin"
        assert await NodeRepository(database).get_all_nodes() == []


@pytest.mark.postgresql
async def test_sessions_read_the_tables_of_their_cluster(places: str, make_task: MakeTask) -> None:
    async with Database(places, cluster="berlin") as database:
        await TaskRepository(database).create(make_task())
        async with database.session() as session:
            query = text(f"SELECT count(*) FROM {database.schema}.tasks")
            assert await session.scalar(query) == 1
