"""Tests of the lease of a node: its sessions, the answer to a heartbeat, and the progress."""

from __future__ import annotations

import asyncio
from contextlib import aclosing
from typing import Any

import pytest
from conftest import PATIENCE, FakeClock, MakeNode, MakeTask, feed

from openclaw_store import (
    Database,
    InvalidDataError,
    NodeInUseError,
    NodeStatus,
    Progress,
    StateManager,
    Task,
    TaskNotFoundError,
)
from openclaw_store.domain import progress_of

pytestmark = pytest.mark.asyncio

NODE = "atlas"


@pytest.fixture(params=["cache", "no cache"])
async def manager(request: pytest.FixtureRequest, database: Database) -> Any:
    async with StateManager(database, cache=request.param == "cache") as manager:
        yield manager


async def running(manager: StateManager, make_task: MakeTask) -> Task:
    await manager.add_task(make_task())
    [task] = await manager.claim_tasks(NODE, start=True)
    return task


def progress(task: Task, clock: FakeClock, fraction: float) -> dict[str, Progress]:
    return {task.task_id: progress_of(task.attempt, fraction, "epoch 3", clock())}


async def test_answer_to_a_heartbeat_names_the_tasks_of_the_node(
    manager: StateManager, clock: FakeClock, make_node: MakeNode, make_task: MakeTask
) -> None:
    await manager.register_node(make_node(node_id=NODE, session="first", lease_seconds=60.0))
    kept, cancelled = await running(manager, make_task), await running(manager, make_task)
    finished = await running(manager, make_task)
    await manager.complete_task(finished)
    await manager.cancel_task(cancelled.task_id, grace_seconds=60)
    clock.advance(seconds=20)

    lease = await manager.renew_lease(NODE)

    assert lease is not None
    assert (lease.node_id, lease.session) == (NODE, "first")
    assert lease.held == {(kept.task_id, 1): False, (cancelled.task_id, 1): True}
    node = await manager.node_repo.get(NODE)
    assert node is not None
    assert node.last_heartbeat == clock()  # in the database, not only in memory
    assert await manager.get_lease(NODE) == lease
    assert await manager.renew_lease("unknown") is None


async def test_progress_is_kept_without_a_change(
    manager: StateManager, clock: FakeClock, make_node: MakeNode, make_task: MakeTask
) -> None:
    await manager.register_node(make_node(node_id=NODE))
    task = await running(manager, make_task)
    before = await feed(manager)
    assert await manager.get_progress(task.task_id) is None

    await manager.renew_lease(NODE, progress(task, clock, 0.4))
    await manager.renew_lease(NODE)  # keeps it

    found = await manager.get_progress(task.task_id)
    assert found == Progress(1, 0.4, "epoch 3", clock())
    assert str(found) == "40%, epoch 3"
    assert await feed(manager) == before
    await manager.renew_lease(NODE, {})
    assert await manager.get_progress(task.task_id) is None


async def test_progress_of_an_earlier_attempt_does_not_count(
    manager: StateManager, clock: FakeClock, make_node: MakeNode, make_task: MakeTask
) -> None:
    await manager.register_node(make_node(node_id=NODE))
    task = await running(manager, make_task)
    await manager.renew_lease(NODE, progress(task, clock, 0.4))
    await manager.release_task(task)
    assert await manager.get_progress(task.task_id) is None

    await manager.claim_tasks(NODE, start=True)

    assert await manager.get_progress(task.task_id) is None


async def test_progress_is_watched_until_the_end_of_the_task(
    manager: StateManager, clock: FakeClock, make_node: MakeNode, make_task: MakeTask
) -> None:
    await manager.register_node(make_node(node_id=NODE))
    task = await running(manager, make_task)
    await manager.renew_lease(NODE, progress(task, clock, 0.4))

    async with asyncio.timeout(PATIENCE), aclosing(manager.watch_progress(task.task_id)) as found:  # type: ignore[type-var]  # it is a generator
        first = await anext(found)
        await manager.renew_lease(NODE, progress(task, clock, 0.8))
        second = await anext(found)
        await manager.complete_task(task)
        rest = [one async for one in found]

    assert (first.fraction, second.fraction, rest) == (0.4, 0.8, [])
    with pytest.raises(TaskNotFoundError):
        await anext(manager.watch_progress("unknown"))


@pytest.mark.parametrize(
    ("fraction", "note", "field"), [(1.5, None, "fraction"), (-1, None, "fraction"), (0, 3, "note")]
)
async def test_senseless_progress_is_refused(
    clock: FakeClock, fraction: Any, note: Any, field: str
) -> None:
    with pytest.raises(InvalidDataError, match=field):
        progress_of(1, fraction, note, clock())


async def test_session_with_a_lease_is_not_replaced(
    manager: StateManager, clock: FakeClock, make_node: MakeNode, make_task: MakeTask
) -> None:
    """Planted: the tasks of a living worker are released."""
    first = make_node(node_id=NODE, session="first", lease_seconds=60.0)
    second = make_node(node_id=NODE, session="second", lease_seconds=60.0)
    await manager.register_node(first)
    task = await running(manager, make_task)
    before = await feed(manager)

    with pytest.raises(NodeInUseError, match="node_id of its own") as caught:
        await manager.register_node(second)

    assert (caught.value.node_id, caught.value.session) == (NODE, "first")
    with pytest.raises(NodeInUseError):
        await manager.register_node(second, replaced="another")
    assert await feed(manager) == before
    assert await manager.register_node(first)  # again, by the same process
    assert await manager.register_node(second, replaced="first")
    lease = await manager.get_lease(NODE)
    assert lease is not None
    assert (lease.session, lease.held) == ("second", {})
    released = await manager.task_repo.get(task.task_id)
    assert released is not None
    assert released.losses == 1


@pytest.mark.parametrize("reason", ["silent", "OFFLINE", "no session"])
async def test_session_without_a_lease_is_replaced(
    manager: StateManager, clock: FakeClock, make_node: MakeNode, reason: str
) -> None:
    first = make_node(node_id=NODE, session="first", lease_seconds=60.0)
    second = make_node(node_id=NODE, session="second", lease_seconds=60.0)
    await manager.register_node(first)
    match reason:
        case "silent":
            clock.advance(seconds=61)
        case "OFFLINE":
            await manager.update_node_status(NODE, NodeStatus.OFFLINE)
        case _:
            second.session = None

    assert await manager.register_node(second)

    lease = await manager.get_lease(NODE)
    assert lease is not None
    assert lease.session == second.session
