"""A `StateManager` without a cache: the same calls and promises, answered by the database."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from dataclasses import replace
from datetime import timedelta
from typing import Any

import pytest
from conftest import BACKOFF, PATIENCE, Cluster, Location, assert_counted, ids, start, until

from openclaw_store import (
    Database,
    DeadlineError,
    InvalidDataError,
    NodeNotFoundError,
    NodeStatus,
    NotOwnerError,
    StaleVersionError,
    StateManager,
    TaskFilter,
    TaskNotFoundError,
    TaskStatus,
)
from openclaw_store.state_manager import direct_access
from openclaw_store.state_manager.direct_access import DirectAccess


@pytest.fixture
async def direct(cluster: Cluster, location: Location) -> AsyncIterator[Cluster]:
    """Two managers of one database: `one` has a cache, `two` has none."""
    database = Database(location, clock=cluster.clock)
    async with StateManager(database, backoff=BACKOFF, cache=False) as two:
        yield replace(cluster, two=two)


async def test_every_read_gives_the_same_as_with_a_cache(direct: Cluster) -> None:
    one, two = direct.one, direct.two
    node = await direct.join(available_skills=["gpu"])
    await direct.join(max_concurrent_tasks=1)
    await one.update_node_status(await direct.join(), NodeStatus.OFFLINE)
    for number in range(5):
        await direct.add(task_id=f"t{number}", required_skills=["gpu"] if number % 2 else [])
    running = await direct.running(node)
    await one.complete_task(running, {"rows": 1})
    await direct.add(task_id="later", not_before=direct.clock() + timedelta(hours=1))
    await one.refresh_from_database()

    assert await two.get_task(running.task_id) == await one.get_task(running.task_id)
    assert await two.get_task("unknown") is None
    assert await two.get_pending_tasks() == await one.get_pending_tasks()
    assert await two.get_pending_tasks(2) == await one.get_pending_tasks(2)
    assert await two.get_node(node) == await one.get_node(node)
    assert await two.get_all_nodes() == await one.get_all_nodes()
    assert await two.get_online_nodes() == await one.get_online_nodes()
    assert await two.get_available_nodes() == await one.get_available_nodes()
    assert await two.find_nodes_by_skill("gpu") == await one.find_nodes_by_skill("gpu")
    assert await two.get_task_stats() == await one.get_task_stats()
    assert await two.get_node_stats() == await one.get_node_stats()
    assert await two.get_state() == await one.get_state()
    assert (await two.list_tasks(TaskFilter())).tasks == (await one.list_tasks(TaskFilter())).tasks
    assert await two.history(running.task_id) == await one.history(running.task_id)
    for id in ("t1", "t2", "later"):
        assert await two.explain_task(id) == await one.explain_task(id)
    assert (await two.get_stats())["cached_tasks"] == 0
    assert await two.refresh_from_database() is await two.sync_to_database() is True
    assert two.version == one.version


async def test_life_of_a_task(direct: Cluster) -> None:
    node = await direct.join()
    added = await direct.add(task_id="a")
    two = direct.two

    [claimed] = await two.claim_tasks(node, 5)
    started = await two.start_task(claimed)
    done = await two.complete_task(started, [1])

    assert (claimed.task_id, started.status, done.result) == ("a", TaskStatus.RUNNING, [1])
    assert done == await direct.task("a") == await two.get_task("a")
    assert await two.claim_tasks(node) == []
    with pytest.raises(StaleVersionError):
        await two.update_task(added)
    assert await two.requeue_task("a") is True
    [again] = await two.claim_tasks(node)
    assert (await two.fail_task(again, "no")).retry_count == 1
    assert await two.cancel_task("a", "enough") is True
    assert await two.remove_task("a") is True
    assert await two.remove_task("a") is await two.cancel_task("a") is False
    with pytest.raises(NodeNotFoundError):
        await two.claim_tasks("unknown")
    with pytest.raises(TaskNotFoundError):
        await two.complete_task(again)
    await assert_counted(direct.one)


async def test_writes_are_those_of_a_manager_with_a_cache(direct: Cluster) -> None:
    two, make_task, make_node = direct.two, direct.make_task, direct.make_node
    node = make_node(node_id="n")
    await two.register_node(node)
    await two.add_node(make_node(node_id="m"))
    await two.update_node(node)
    await two.change_node("n", lambda node: setattr(node, "port", 1))
    tasks = [make_task(task_id=id) for id in "abc"]
    assert await two.add_tasks(tasks) == [None] * 3
    await two.change_task("a", lambda task: task.metadata.update(x=1))
    await two.update_task(tasks[1])
    same = make_task(task_id="d", idempotency_key="key")
    assert await two.submit_task(same) == await two.submit_task(
        make_task(task_id="e", idempotency_key="key")
    )
    assert sorted(await two.cancel_tasks(TaskFilter(user="unknown"))) == []
    await two.remove_node("m")

    assert (await direct.task("a")).metadata == {"x": 1}
    assert [await two.get_node(id) is None for id in "nm"] == [False, True]
    assert (await two.get_node("n")).port == 1  # type: ignore[union-attr]  # it is there


async def test_recovers_lost_nodes_and_records_heartbeats(direct: Cluster) -> None:
    node, two = await direct.join(), direct.two
    task = await direct.running(node)
    direct.clock.advance(100)
    assert await two.update_heartbeat(node, cpu_usage=50) is True
    assert await two.update_heartbeat("unknown") is False
    assert not await two.recover(timeout_seconds=120)
    direct.clock.advance(121)

    recovery = await two.recover(timeout_seconds=120)

    assert (recovery.offline_nodes, recovery.requeued_tasks) == ([node], [task.task_id])
    assert await two.update_heartbeat(node) is True
    assert (await direct.node(node)).status is NodeStatus.ONLINE


async def test_refuses_unsaved_entries_by_name(direct: Cluster) -> None:
    task, node = direct.make_task(), direct.make_node()
    for call in (direct.two.add_task, direct.two.update_task):
        with pytest.raises(InvalidDataError, match="persist: must be True"):
            await call(task, persist=False)
    for write in (direct.two.add_node, direct.two.update_node):
        with pytest.raises(InvalidDataError, match="persist: must be True"):
            await write(node, persist=False)


async def test_commits_of_other_processes_wake_waiters(direct: Cluster) -> None:
    await direct.add(task_id="a")
    await direct.two.refresh_from_database()
    watcher = direct.two.watch()
    seen: Any = start(anext(watcher))  # type: ignore[arg-type]  # a coroutine in all but name
    waiting = start(direct.two.wait_for_task("a", 10))
    await until(lambda: direct.two._replica.watchers.count == 2)

    await direct.one.cancel_task("a")

    assert (await waiting).status is TaskStatus.CANCELLED
    assert (await seen).to_status == "cancelled"
    await watcher.aclose()  # type: ignore[attr-defined]  # an asynchronous generator
    with pytest.raises(DeadlineError):
        await direct.two.wait_for_task((await direct.add()).task_id, 0.01)


async def test_own_commit_hides_no_earlier_one_of_another_process(
    cluster: Cluster, location: Location, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Planted: a notification of a revision before the own one wakes nobody."""
    late: list[tuple[Any, ...]] = []
    notice = DirectAccess._notice_commit
    monkeypatch.setattr(DirectAccess, "_notice_commit", lambda *given: late.append(given))
    node = await cluster.join()
    await cluster.add(task_id="a")
    database = Database(location, clock=cluster.clock)
    async with StateManager(database, cache=False) as direct:
        await direct.claim_tasks(node)
        waiting = start(direct.wait_for_task("a", PATIENCE))
        claim = start(direct.claim_tasks(node, wait_seconds=PATIENCE))
        watchers = direct._replica.watchers
        await until(lambda: watchers.count and watchers.claims.nodes)
        await asyncio.sleep(0.05)  # both have found nothing

        await cluster.one.refresh_from_database()
        await cluster.one.cancel_task("a")
        await cluster.add(task_id="b")
        revision = cluster.one.version
        await direct.add_node(cluster.make_node())
        notice(direct._replica, revision, 0)  # type: ignore[arg-type]  # it is one

        assert (await waiting).status is TaskStatus.CANCELLED
        assert ids(await claim) == ["b"]


async def test_outdated_memory_of_an_assigned_task_does_no_harm(
    direct: Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(direct_access, "MAX_REMEMBERED_TASKS", 2)
    node = await direct.join(max_concurrent_tasks=9)
    for number in range(4):
        await direct.add(task_id=f"t{number}")
    claimed = await direct.two.claim_tasks(node, 4)
    await direct.one.refresh_from_database()
    await direct.one.requeue_task("t3")
    await direct.one.change_task("t2", lambda task: task.metadata.update(note=1))

    with pytest.raises(NotOwnerError):
        await direct.two.start_task(claimed[3])
    done = await asyncio.gather(*map(direct.two.complete_task, claimed[:3]))

    assert ids(done) == ["t0", "t1", "t2"]
    assert done[2].metadata == {"note": 1}
    await assert_counted(direct.one)
