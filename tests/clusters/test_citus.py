"""Citus: distributed schemas on two workers. The decisions alone are tested on any server.

    OPENCLAW_STORE_TEST_CITUS=postgresql://postgres@127.0.0.1:9700/store pytest tests/clusters

The database is one on a coordinator with at least two workers; the tests make and drop clusters.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from uuid import uuid4

import pytest
from conftest import MakeNode, MakeTask, assert_in_step, execute, feed, start, until

from openclaw_store import (
    Clusters,
    ConflictError,
    Database,
    InvalidDataError,
    Level,
    Server,
    StateManager,
    TaskRepository,
    TaskStatus,
    diagnose,
    verify,
)
from openclaw_store.backends.factory import backend_of
from openclaw_store.backends.postgresql.location import ServerLocation
from openclaw_store.database import migrations
from openclaw_store.database.store_write import CITUS_SETTINGS, SETTINGS

URL = os.environ.get("OPENCLAW_STORE_TEST_CITUS", "")

needs_citus = pytest.mark.skipif(
    not URL,
    reason="NOT TESTED ON CITUS: set OPENCLAW_STORE_TEST_CITUS to the URL of a database on a "
    "coordinator with two workers",
)

FUNCTION = """
    SELECT proconfig FROM pg_proc
    WHERE proname LIKE 'store_write_%' AND pronamespace = to_regnamespace('{}')"""


@pytest.mark.postgresql
async def test_named_engine_decides_on_settings_and_the_function(
    location: str, make_task: MakeTask
) -> None:
    """`engine=citus`, on a server without it: nothing but the settings differs."""
    as_citus = f"{location}?engine=citus"
    async with Database(as_citus, cluster="berlin") as database:
        await TaskRepository(database).create(make_task())
        async with database.session() as session:
            connection = await session.connection()
            shown = await connection.exec_driver_sql("SHOW plan_cache_mode")
            assert shown.scalar_one() == "force_custom_plan"
        assert (await verify(database)).problems == []
        assert "engine" not in database.db_path
    assert execute(location, FUNCTION.format("berlin")) == [(CITUS_SETTINGS,)]
    await Clusters(as_citus).rename("berlin", "bonn")
    assert execute(location, FUNCTION.format("bonn")) == [(CITUS_SETTINGS,)]
    await Clusters(location).create("tokyo")
    assert execute(location, FUNCTION.format("tokyo")) == [(SETTINGS,)]
    await asyncio.to_thread(migrations.check, backend_of(location, cluster="bonn"))
    with pytest.raises(InvalidDataError, match=r"node: .* has no Citus: nothing to move"):
        await Clusters(location).move("tokyo", "worker:5432")


@pytest.mark.parametrize(
    ("engine", "is_citus"), [("", None), ("?engine=citus", True), ("?engine=postgresql", False)]
)
def test_engine_may_be_named(engine: str, is_citus: bool | None) -> None:
    assert ServerLocation(f"postgresql://host/db{engine}").is_citus is is_citus


def test_other_engine_is_refused() -> None:
    with pytest.raises(InvalidDataError, match="has a wrong engine: use citus, postgresql"):
        ServerLocation("postgresql://host/db?engine=oracle")


async def test_file_has_no_node_to_move_to() -> None:
    clusters = Clusters("./nowhere/{cluster}.db")
    with pytest.raises(InvalidDataError, match="cluster"):
        await clusters.move("Not a name", "worker:5432")


@pytest.fixture
async def names() -> AsyncIterator[list[str]]:
    """Two clusters on Citus, on different workers."""
    names = [f"{name}_{uuid4().hex[:8]}" for name in ("berlin", "tokyo")]
    clusters = Clusters(URL)
    for name in names:
        await clusters.create(name)
    yield names
    for name in names:
        if name in await clusters.names():
            await clusters.drop(name, force=True)


async def nodes_of(*names: str) -> list[str | None]:
    found = {one.name: one.node for one in await Clusters(URL).list()}
    return [found[name] for name in names]


@needs_citus
async def test_clusters_are_placed_listed_renamed_and_dropped(
    names: list[str], make_task: MakeTask
) -> None:
    berlin, _ = names
    clusters = Clusters(URL)
    nodes = await nodes_of(*names)
    assert None not in nodes
    assert len({*nodes}) == 2
    async with Database(URL, cluster=berlin) as database:
        await TaskRepository(database).create(make_task())
        assert (await verify(database)).problems == []
        found = {one.name: one for one in await diagnose(database)}
        assert found["citus_node"].text == f"Citus keeps the tables on {nodes[0]}."
        assert found["citus_moves"].level is Level.OK
    await asyncio.to_thread(migrations.check, backend_of(URL, cluster=berlin))

    await clusters.rename(berlin, f"{berlin}_new")
    listed = {one.name: one for one in await clusters.list()}
    renamed = listed[f"{berlin}_new"]
    assert (renamed.node, renamed.tasks) == (nodes[0], {"pending": 1})
    assert renamed.size > 10_000
    with pytest.raises(ConflictError, match="unfinished tasks"):
        await clusters.drop(f"{berlin}_new")
    await clusters.drop(f"{berlin}_new", force=True)
    assert f"{berlin}_new" not in await clusters.names()


@needs_citus
async def test_cluster_can_be_upgraded(names: list[str]) -> None:
    backend = backend_of(URL, cluster=names[0])
    for revision in ("0009", "base"):
        await asyncio.to_thread(migrations.downgrade, backend, revision)
    async with Database(URL, cluster=names[0]):
        await asyncio.to_thread(migrations.check, backend)


@needs_citus
async def test_two_managers_work_on_each_cluster(
    names: list[str], make_task: MakeTask, make_node: MakeNode
) -> None:
    async with AsyncExitStack() as stack:
        for name in names:
            one, two = [
                await stack.enter_async_context(
                    StateManager(Database(URL, cluster=name), 3600, cache=cached)
                )
                for cached in (True, True)
            ]
            await one.register_node(make_node(node_id="n", max_concurrent_tasks=99))
            tasks = [make_task(required_skills=[]) for _ in range(40)]
            await asyncio.gather(
                *[(one, two)[n % 2].add_task(task) for n, task in enumerate(tasks)]
            )
            await one.add_tasks([make_task() for _ in range(20)])
            for manager in (one, two, one):
                for task in await manager.claim_tasks("n", limit=10, start=True):
                    await manager.complete_task(task, {"by": name})
            [failed] = await two.claim_tasks("n", start=True)
            await two.fail_task(failed, "broken")
            async with one.db.transaction() as tx:
                [claimed] = await TaskRepository(tx).claim("n", limit=1)
                await TaskRepository(tx).start(claimed)
            await one.update_heartbeat("n", cpu_usage=50)
            await one.sync_to_database()
            await until(lambda one=one, two=two: one.version == two.version)  # type: ignore[misc]
            assert (await two.get_task_stats())[TaskStatus.COMPLETED] == 30
            history = await one.history(failed.task_id)
            assert [change.to_status for change in history[:3]] == [
                "pending", "scheduled", "running"
            ]  # fmt: skip
            assert [one.revision for one in await feed(one)] == [*range(1, one.version + 1)]
            await assert_in_step(one, two)
            assert (await verify(one.db)).problems == []


@needs_citus
async def test_cluster_moves_under_load_and_nothing_is_lost(
    names: list[str], make_task: MakeTask
) -> None:
    name = names[0]
    before, other = await nodes_of(*names)
    assert other is not None
    async with Server(URL) as server, AsyncExitStack() as stack:
        writer = await stack.enter_async_context(StateManager(server.cluster(name), 3600))
        reader = await stack.enter_async_context(StateManager(Database(URL, cluster=name), 3600))
        moving = start(Clusters(URL).move(name, other))
        added: set[str] = set()
        after = 0
        while not moving.done() or after < 20:
            task = make_task()
            await writer.add_task(task)  # it may wait, and must not fail
            added.add(task.task_id)
            after += moving.done()
        await moving

        assert (await nodes_of(name)) == [other] != [before]
        await until(lambda: reader.version == len(added))
        assert {*(await reader.get_state()).tasks} == added
        assert [one.revision for one in await feed(reader)] == [*range(1, len(added) + 1)]
        assert (await verify(reader.db)).problems == []
    with pytest.raises(InvalidDataError, match="is none of"):
        await Clusters(URL).move(name, "nowhere:1")
