"""Calls with many rows: several transactions, between which other callers write."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import Cluster, Location, assert_counted, execute, ids, stored

from openclaw_store import NodeRepository, StoreError, Task, TaskRepository, TaskStatus
from openclaw_store.repositories import commands, parts
from openclaw_store.repositories.batches import apply
from openclaw_store.repositories.commands import Register
from openclaw_store.state_manager import scheduler

Call = Callable[[], Awaitable[Any]]


@pytest.fixture(autouse=True)
def small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(commands, "PART_SIZE", 3)
    monkeypatch.setattr(parts, "PART_SIZE", 3)
    monkeypatch.setattr(scheduler, "PART_SIZE", 3)


async def busy_node(cluster: Cluster, count: int) -> tuple[str, list[Task]]:
    """A node, and the tasks it has claimed, all submitted at one time."""
    node = await cluster.join(max_concurrent_tasks=100)
    await cluster.one.add_tasks([cluster.make_task() for _ in range(count)])
    return node, await cluster.one.claim_tasks(node, limit=count)


async def beside(cluster: Cluster, call: Call) -> tuple[Any, Task]:
    """The result of a call, and a task that was added beside it."""
    other = cluster.make_task(not_before=cluster.clock().replace(year=2100))
    result, _ = await asyncio.gather(call(), cluster.one.add_task(other))
    return result, other


@pytest.mark.parametrize("is_repository", [False, True])
async def test_others_write_between_the_parts_of_a_claim(
    cluster: Cluster, *, is_repository: bool
) -> None:
    node = await cluster.join(max_concurrent_tasks=9)
    added = [cluster.make_task() for _ in range(12)]
    await cluster.one.add_tasks(added)
    claim = TaskRepository(cluster.one.db).claim if is_repository else cluster.one.claim_tasks

    claimed, other = await beside(cluster, lambda: claim(node, limit=20))

    assert ids(claimed) == ids(added[:9])
    assert all(task.assigned_node == node for task in claimed)
    assert claimed[3].version > claimed[2].version + 1  # the node has changed in between
    assert other.version < claimed[3].version  # PostgreSQL puts claims last in a transaction
    assert (await cluster.node(node)).running_tasks == 9
    assert await claim(node, limit=20) == []


async def test_claim_in_a_transaction_is_one_with_it(cluster: Cluster) -> None:
    node = await cluster.join(max_concurrent_tasks=9)
    await cluster.one.add_tasks([cluster.make_task() for _ in range(8)])

    claimed: list[Task] = []

    async def claim_and_fail() -> None:
        async with cluster.one.db.transaction() as tx:
            claimed.extend(await TaskRepository(tx).claim(node, limit=7))
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        await claim_and_fail()

    assert len(claimed) == 7
    assert (await cluster.node(node)).running_tasks == 0
    assert ids(await cluster.one.claim_tasks(node, limit=7)) == ids(claimed)


async def test_error_in_a_claim_leaves_the_parts_before(
    cluster: Cluster, location: Location
) -> None:
    """The error tells the number; to register again releases these tasks."""
    node = await cluster.join(max_concurrent_tasks=9)
    added = [cluster.make_task() for _ in range(5)]
    added[4].name = "bad"
    await cluster.one.add_tasks(added)
    if isinstance(location, Path):
        when = "BEFORE UPDATE ON tasks WHEN new.name = 'bad'"
        execute(location, f"CREATE TRIGGER bad {when} BEGIN SELECT RAISE(ABORT, 'no'); END")
    else:
        check = "CHECK (name <> 'bad' OR status <> 'scheduled')"
        execute(location, f"ALTER TABLE tasks ADD CONSTRAINT bad {check}")

    with pytest.raises(StoreError) as caught:
        await cluster.one.claim_tasks(node, limit=5)

    assert caught.value.__notes__ == ["3 tasks were claimed before this error"]
    rows, [found], _ = await stored(cluster.one)
    assert found.running_tasks == 3
    assert {task.task_id for task in rows if task.assigned_node == node} == set(ids(added[:3]))
    await assert_counted(cluster.one)
    await cluster.one.register_node(found)
    rows, [found], _ = await stored(cluster.one)
    assert {task.status for task in rows} == {TaskStatus.PENDING}
    assert found.running_tasks == 0


@pytest.mark.parametrize("is_repository", [False, True])
async def test_others_write_between_the_parts_of_a_registration(
    cluster: Cluster, *, is_repository: bool
) -> None:
    node_id, claimed = await busy_node(cluster, 8)
    node = cluster.make_node(node_id=node_id, hostname="new")
    register = NodeRepository(cluster.one.db).register
    if not is_repository:
        register = cluster.one.register_node  # type: ignore[assignment]  # the same arguments

    done, other = await beside(cluster, lambda: register(node))

    assert done is True
    rows, [found], changes = await stored(cluster.one)
    assert found == node
    assert (found.hostname, found.running_tasks) == ("new", 0)
    assert {task.status for task in rows} == {TaskStatus.PENDING}
    released = [one.revision for one in changes if one.reason == "node lost"]
    assert len(released) == len(claimed)
    assert released[2] < other.version < released[3]
    await assert_counted(cluster.one)


async def test_registration_releases_the_tasks_beside_the_ones_that_end_with_it(
    cluster: Cluster,
) -> None:
    """The ended ones were all that it read, and the node kept the rest for its new process."""
    node_id, claimed = await busy_node(cluster, 9)
    repository = TaskRepository(cluster.one.db)
    register = NodeRepository(cluster.one.db).register(cluster.make_node(node_id=node_id))

    await asyncio.gather(*map(repository.complete, claimed[:6]), register)

    rows, _, _ = await stored(cluster.one)
    released = {task.task_id for task in rows if task.status is TaskStatus.PENDING}
    assert released == set(ids(claimed[6:]))
    await assert_counted(cluster.one)


async def test_end_of_the_process_in_a_registration_leaves_a_consistent_state(
    cluster: Cluster,
) -> None:
    node_id, _ = await busy_node(cluster, 8)
    before = await cluster.node(node_id)
    known = await cluster.one.node_repo.get_record(node_id)
    assert known is not None
    command = Register(node_id, known.evolve(hostname="new"), wait=lambda _: 0)

    assert await cluster.one.db.write(apply, command) is None  # and then the process ends

    found = await cluster.node(node_id)
    assert (found.hostname, found.running_tasks) == (before.hostname, 5)
    await assert_counted(cluster.one)
    assert await cluster.one.register_node(cluster.make_node(node_id=node_id))
    assert (await cluster.node(node_id)).running_tasks == 0
    await assert_counted(cluster.one)
