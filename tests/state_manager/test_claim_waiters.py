"""Tests of claims that wait for work, and of calls that wait for a node."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from datetime import timedelta

import pytest
from conftest import PATIENCE, FakeClock, Location, MakeNode, MakeTask

from openclaw_store import Database, NodeStatus, StateManager, Task, TaskStatus

NODE = "n"
SLOTS = 20


@pytest.fixture(params=[True, False], ids=["cache", "direct"])
async def waiter(
    request: pytest.FixtureRequest, database: Database, make_node: MakeNode
) -> AsyncIterator[StateManager]:
    """A manager that follows other processes, with a node."""
    async with StateManager(database, cache=request.param) as manager:
        await manager.register_node(make_node(node_id=NODE, max_concurrent_tasks=SLOTS))
        yield manager


@pytest.fixture
async def other(waiter: StateManager, location: Location, clock: FakeClock) -> StateManager:
    """The manager of another process, as it has a `Database` of its own."""
    manager = StateManager(Database(location, clock=clock), auto_sync_interval=None)
    await manager.initialize()
    return manager


async def waiting(manager: StateManager, count: int) -> None:
    """Let claims run until that many of them wait."""
    waiters = manager._replica.watchers.claims.nodes
    async with asyncio.timeout(PATIENCE):
        while len(waiters.get(NODE, ())) < count:  # noqa: ASYNC110 - it has no event
            await asyncio.sleep(0.005)


async def waiting_claims(manager: StateManager, count: int) -> list[asyncio.Task[list[Task]]]:
    """Start claims that find nothing, and wait."""
    before = (await manager.db.get_stats())["writer"]["operations"]
    claims = [
        asyncio.create_task(manager.claim_tasks(NODE, wait_seconds=PATIENCE)) for _ in range(count)
    ]
    async with asyncio.timeout(PATIENCE):
        while (await manager.db.get_stats())["writer"]["operations"] < before + count:  # noqa: ASYNC110
            await asyncio.sleep(0.005)
    await waiting(manager, count)
    return claims


@pytest.mark.parametrize("is_other", [False, True], ids=["same", "other"])
async def test_claim_waits_for_a_task_of_this_or_another_process(
    waiter: StateManager, other: StateManager, make_task: MakeTask, is_other: bool
) -> None:
    """Planted: commits of the process, or of others, wake no claim."""
    try:
        claim = asyncio.create_task(waiter.claim_tasks(NODE, wait_seconds=PATIENCE, start=True))
        await waiting(waiter, 1)

        await (other if is_other else waiter).add_task(make_task(task_id="t"))

        async with asyncio.timeout(PATIENCE / 2):
            [task] = await claim
        assert (task.task_id, task.status) == ("t", TaskStatus.RUNNING)
    finally:
        await other.shutdown()


@pytest.mark.parametrize("is_other", [False, True], ids=["same", "other"])
async def test_commit_wakes_no_more_claims_than_it_has_tasks(
    waiter: StateManager, other: StateManager, make_task: MakeTask, is_other: bool
) -> None:
    """Planted: a commit wakes all claims that wait."""
    claims = await waiting_claims(waiter, 10)
    before = (await waiter.db.get_stats())["writer"]["operations"]

    adding = other if is_other else waiter
    assert not any(await adding.add_tasks([make_task() for _ in range(3)]))

    done, left = await asyncio.wait(claims, timeout=0.3)
    operations = (await waiter.db.get_stats())["writer"]["operations"] - before
    assert (len(done), operations) == (3, 3 + (not is_other))
    for claim in left:
        claim.cancel()
    await asyncio.wait(left)
    await other.shutdown()


@pytest.mark.parametrize("is_other", [False, True], ids=["same", "other"])
async def test_commit_wakes_a_claim_for_each_slot_that_it_frees(
    waiter: StateManager, other: StateManager, make_task: MakeTask, is_other: bool
) -> None:
    """Planted: tasks that end in one commit wake one claim; so does a node that is resumed."""
    ending = other if is_other else waiter
    assert not any(await waiter.add_tasks([make_task() for _ in range(SLOTS + 5)]))
    held = await waiter.claim_tasks(NODE, SLOTS)
    await other.refresh_from_database()

    claims = await waiting_claims(waiter, 5)
    await asyncio.gather(*map(ending.complete_task, held[:5]))

    done, _ = await asyncio.wait(claims, timeout=PATIENCE / 2)
    assert len(done) == 5

    await ending.drain_node(NODE)
    await asyncio.gather(*map(ending.complete_task, held[5:10]))
    assert not any(await waiter.add_tasks([make_task() for _ in range(5)]))
    claims = await waiting_claims(waiter, 5)
    await ending.resume_node(NODE)

    done, _ = await asyncio.wait(claims, timeout=PATIENCE / 2)
    assert len(done) == 5
    await other.shutdown()


async def test_wake_up_of_a_cancelled_claim_is_passed_on(
    waiter: StateManager, make_task: MakeTask
) -> None:
    """Planted: the task waits for the next commit, as the woken claim is gone."""
    first, second = [
        asyncio.create_task(waiter.claim_tasks(NODE, wait_seconds=PATIENCE)) for _ in range(2)
    ]
    await waiting(waiter, 2)
    await asyncio.sleep(0.05)
    before = (await waiter.db.get_stats())["writer"]["operations"]
    waiter._replica.watchers.claims.notice(
        [("task", "t", "pending", "created")]
    )  # wakes the first one
    first.cancel()
    async with asyncio.timeout(PATIENCE):
        while (await waiter.db.get_stats())["writer"]["operations"] == before:  # noqa: ASYNC110
            await asyncio.sleep(0.005)  # the second one claims

    second.cancel()
    await asyncio.wait([first, second])
    assert first.cancelled()


async def test_claim_ends_empty_after_its_time(waiter: StateManager) -> None:
    assert await waiter.claim_tasks(NODE, wait_seconds=0) == []
    assert await waiter.claim_tasks(NODE, wait_seconds=0.01) == []


async def test_claim_wakes_when_a_delayed_task_is_due(
    waiter: StateManager, make_task: MakeTask, clock: FakeClock
) -> None:
    """Planted: only a commit wakes a claim."""
    await waiter.add_task(make_task(task_id="t", not_before=clock() + timedelta(seconds=0.05)))
    claim = asyncio.create_task(waiter.claim_tasks(NODE, wait_seconds=PATIENCE))
    await waiting(waiter, 1)

    clock.advance(seconds=1)

    async with asyncio.timeout(PATIENCE / 2):
        assert [task.task_id for task in await claim] == ["t"]


async def test_drain_waits_until_the_node_has_no_more_tasks(
    waiter: StateManager, make_task: MakeTask
) -> None:
    """Planted: it returns at once."""
    await waiter.add_task(make_task())
    [task] = await waiter.claim_tasks(NODE, start=True)
    draining = asyncio.create_task(waiter.drain_node(NODE, "new disk", wait=True))
    done, _ = await asyncio.wait([draining], timeout=0.1)
    assert not done
    await waiter.add_task(make_task())
    assert await waiter.claim_tasks(NODE) == []

    await waiter.complete_task(task)

    async with asyncio.timeout(PATIENCE):
        assert await draining
    node = await waiter.get_node(NODE)
    assert node is not None
    assert (node.status, node.status_reason) == (NodeStatus.MAINTENANCE, "new disk")
    assert await waiter.resume_node(NODE)
    assert len(await waiter.claim_tasks(NODE)) == 1


async def test_expired_task_is_explained_as_such(
    waiter: StateManager, make_task: MakeTask, clock: FakeClock
) -> None:
    await waiter.add_task(make_task(task_id="t", expires_at=clock()))

    assert "expired at" in str(await waiter.explain_task("t"))
    assert await waiter.claim_tasks(NODE) == []
    assert (await waiter.recover(10**6)).timed_out_tasks == ["t"]
