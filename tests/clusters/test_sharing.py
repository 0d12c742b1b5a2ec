"""`Server`: many clusters in one process, which share connections."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import AsyncIterator
from contextlib import AsyncExitStack
from pathlib import Path

import pytest
from conftest import InThread, Location, MakeTask, execute, feed, until

from openclaw_store import (
    Clusters,
    InvalidDataError,
    Server,
    StateManager,
    TaskRepository,
    UnavailableError,
    transaction,
    verify,
)
from openclaw_store.backends.postgresql import listening

NAMES = ["berlin", "paris", "tokyo"]

OTHERS = """
    SELECT pid, application_name FROM pg_stat_activity
    WHERE datname = current_database() AND pid <> pg_backend_pid()"""


@pytest.fixture
def places(location: Location, tmp_path: Path) -> Location:
    return tmp_path / "{cluster}.db" if isinstance(location, Path) else location


@pytest.fixture
async def server(places: Location) -> AsyncIterator[Server]:
    async with Server(places, idle_seconds=0.05) as server:
        yield server


async def test_clusters_of_one_process_hear_of_another_and_write_on_their_own(
    server: Server, places: Location, make_task: MakeTask
) -> None:
    async with AsyncExitStack() as stack, Server(places) as another:
        for name in NAMES:
            await Clusters(places).create(name)
        here, there = [
            {
                name: await stack.enter_async_context(StateManager(one.cluster(name), 3600))
                for name in NAMES
            }
            for one in (server, another)
        ]
        for name in NAMES:
            for _ in range(3):
                await here[name].add_task(make_task(name=name))
                await there[name].add_task(make_task(name=name))
            async with there[name].db.transaction() as tx:
                await TaskRepository(tx).create(make_task(name=name))

        for name in NAMES:
            await until(lambda name=name: here[name].version == there[name].version == 7)  # type: ignore[misc]
            assert {task.name for task in (await here[name].get_state()).tasks.values()} == {name}
            assert [one.revision for one in await feed(here[name])] == [*range(1, 8)]
            async with here[name].db.session() as session:
                assert await TaskRepository(session).count_tasks() == 7
            assert (await verify(here[name].db)).problems == []


@pytest.mark.postgresql
async def test_two_databases_of_one_cluster_hear_of_each_other(
    server: Server, make_task: MakeTask, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Planted: the listener ignores all writers of the process, and finds commits 30 s later."""
    for name in ("POLL_SECONDS", "SHARED_ALIVE_SECONDS"):
        monkeypatch.setattr(listening, name, 3600.0)
    async with (
        StateManager(server.cluster("berlin"), 3600) as one,
        StateManager(server.cluster("berlin"), 3600) as two,
    ):
        await asyncio.sleep(0.2)  # both listen, and have read the counters
        for number in range(1, 6):
            await (one if number % 2 else two).add_task(make_task())
            await until(lambda number=number: one.version == two.version == number)  # type: ignore[misc]


@pytest.mark.postgresql
async def test_closed_server_leaves_no_connection_on_any_loop(server: Server, places: str) -> None:
    """Planted: the listener of another loop goes on, and an open database connects again."""
    ready, done = threading.Event(), threading.Event()
    database = server.cluster("berlin")
    await database.initialize()
    await database.get_stats()

    async def another_loop() -> None:
        async with StateManager(server.cluster("paris"), 3600) as manager:
            await manager.refresh_from_database()
        ready.set()
        await asyncio.to_thread(done.wait)

    other = InThread(another_loop)
    await asyncio.to_thread(ready.wait)
    await server.close()

    assert execute(places, OTHERS) == []
    with pytest.raises(UnavailableError, match="were closed"):
        await database.get_stats()
    done.set()
    await other.join()
    await database.close()
    assert execute(places, OTHERS) == []


@pytest.mark.postgresql
async def test_listeners_of_closed_loops_are_forgotten(server: Server) -> None:
    """Planted: each event loop leaves one behind."""

    async def another_loop() -> None:
        async with StateManager(server.cluster("paris"), 3600):
            pass

    async with server.cluster("berlin"):  # on the loop that keeps connections
        for _ in range(3):
            await InThread(another_loop).join()
    assert len(server._sharing._listeners) == 1  # type: ignore[union-attr]


@pytest.mark.postgresql
async def test_idle_clusters_share_few_connections(
    server: Server, places: str, make_task: MakeTask
) -> None:
    async with AsyncExitStack() as stack:
        states = [
            await stack.enter_async_context(StateManager(server.cluster(name), 3600))
            for name in NAMES
        ]
        await asyncio.gather(*[state.add_task(make_task()) for state in states])
        listening = 1
        # The pools have as many as were needed at a time, and no writer has one any more.
        await until(lambda: len(execute(places, OTHERS)) <= listening + 2)
        assert len(execute(places, OTHERS)) >= listening

        await states[0].add_task(make_task())  # with a connection that is made again
        assert states[0].version == 2
        figures = (await states[0].db.get_stats())["writer"]
        assert figures["connections"] == 2
        assert figures["failed_batches"] == 0
    assert server.cluster("berlin").checked_out_connections == 0


@pytest.mark.postgresql
async def test_cluster_that_is_dropped_does_not_silence_the_others(
    server: Server, places: str, make_task: MakeTask
) -> None:
    async with AsyncExitStack() as stack, Server(places) as another:
        berlin, tokyo = [
            await stack.enter_async_context(StateManager(server.cluster(name), 3600))
            for name in ("berlin", "tokyo")
        ]
        await Clusters(places).drop("berlin")
        other = await stack.enter_async_context(StateManager(another.cluster("tokyo"), 3600))
        await other.add_task(make_task())

        await until(lambda: tokyo.version == 1)
        assert berlin.version == 0


async def test_closing_a_cluster_leaves_the_others(server: Server, make_task: MakeTask) -> None:
    async with StateManager(server.cluster("berlin"), 3600) as berlin:
        async with StateManager(server.cluster("tokyo"), 3600) as tokyo:
            await tokyo.add_task(make_task())
        await berlin.add_task(make_task())
        assert await berlin.task_repo.count_tasks() == 1


@pytest.mark.postgresql
async def test_each_event_loop_has_connections_of_its_own(
    server: Server, make_task: MakeTask
) -> None:
    async with server.cluster("berlin") as berlin:
        await TaskRepository(berlin).create(make_task())

        async def count() -> int:
            return await TaskRepository(berlin).count_tasks()

        assert await InThread(count).join() == 1
        assert await count() == 1


@pytest.mark.postgresql
async def test_closed_server_refuses_its_clusters(server: Server) -> None:
    async with server.cluster("berlin") as berlin:
        await server.close()
        with pytest.raises(UnavailableError, match="the Server is closed: make another"):
            await TaskRepository(berlin).count_tasks()


def test_location_and_names_are_checked(tmp_path: Path) -> None:
    with pytest.raises(InvalidDataError, match="must contain"):
        Server(tmp_path / "store.db")
    for options in ({"pool_size": 0}, {"idle_seconds": -1.0}, {"timeout": "soon"}):
        with pytest.raises(InvalidDataError, match=next(iter(options))):
            Server("postgresql://host/db", **options)
    with pytest.raises(InvalidDataError, match="cluster"):
        Server("postgresql://host/db").cluster("Not a name")


@pytest.mark.postgresql
async def test_transaction_over_two_clusters_of_a_server(
    server: Server, make_task: MakeTask
) -> None:
    async with server.cluster("berlin") as berlin, server.cluster("tokyo") as tokyo:
        async with transaction(berlin, tokyo) as (b, t):
            await TaskRepository(b).create(make_task(name="berlin"))
            await TaskRepository(t).create(make_task(name="tokyo"))
        assert await TaskRepository(berlin).count_tasks() == 1
        [task] = (await TaskRepository(tokyo).list_tasks()).tasks
        assert task.name == "tokyo"
