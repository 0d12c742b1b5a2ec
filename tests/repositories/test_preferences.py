"""The preferences of tasks: which of the tasks that a node may claim it takes first."""

from __future__ import annotations

from datetime import timedelta

import pytest
from conftest import Cluster, Location, execute

from openclaw_store import StateManager, TaskPriority, TaskRepository
from openclaw_store.database import statements_for


async def claim(
    cluster: Cluster, node: str, limit: int = 1, *, is_direct: bool = False
) -> list[str]:
    """Claim in a call, or in a transaction, and complete the tasks; return their identifiers."""
    manager: StateManager = cluster.one
    if is_direct:
        async with manager.db.transaction() as tx:
            claimed = await TaskRepository(tx).claim(node, limit=limit)
    else:
        claimed = await manager.claim_tasks(node, limit=limit)
    for task in claimed:
        await manager.complete_task(task)
    return [task.task_id for task in claimed]


@pytest.mark.parametrize("is_direct", [False, True])
async def test_node_takes_the_tasks_first_that_prefer_it(
    cluster: Cluster, *, is_direct: bool
) -> None:
    gpu = await cluster.join(
        available_skills=["python", "gpu"], tags=["rack-1"], max_concurrent_tasks=9
    )
    other = await cluster.join(available_skills=["python"], max_concurrent_tasks=9)
    wishes: dict[str, dict[str, list[str] | None]] = {
        "plain": {},
        "other": {"optional_skills": ["fpga", "python"], "affinity_tags": ["rack-2"]},
        "skill": {"optional_skills": ["gpu", "gpu"], "affinity_tags": None},
        "both": {"optional_skills": ["gpu"], "affinity_tags": ["rack-1"]},
        "tag": {"optional_skills": [], "affinity_tags": ["rack-1"]},
    }
    for id, wish in wishes.items():
        await cluster.one.add_task(cluster.make_task(task_id=id, **wish))
        cluster.clock.advance(seconds=0.001)
    urgent = cluster.make_task(task_id="urgent", priority=TaskPriority.HIGH)
    await cluster.one.add_task(urgent)

    assert await claim(cluster, gpu, 2, is_direct=is_direct) == ["urgent", "both"]
    assert await claim(cluster, other, 1, is_direct=is_direct) == ["other"]
    assert await claim(cluster, gpu, 9, is_direct=is_direct) == ["skill", "tag", "plain"]


@pytest.mark.parametrize("is_direct", [False, True])
async def test_task_is_passed_over_for_a_minute_at_most(
    cluster: Cluster, *, is_direct: bool
) -> None:
    node = await cluster.join(tags=["rack-1"], max_concurrent_tasks=9)
    plain = cluster.make_task()
    await cluster.one.add_task(plain)
    cluster.clock.advance(seconds=1)
    await cluster.one.add_tasks(cluster.make_task(affinity_tags=["rack-1"]) for _ in range(9))

    assert plain.task_id not in await claim(cluster, node, 2, is_direct=is_direct)
    cluster.clock.advance(seconds=59)
    assert plain.task_id not in await claim(cluster, node, 2, is_direct=is_direct)
    cluster.clock.advance(seconds=1)
    assert await claim(cluster, node, is_direct=is_direct) == [plain.task_id]


async def test_change_of_a_task_begins_its_minute_again(cluster: Cluster) -> None:
    node = await cluster.join(tags=["rack-1"], max_concurrent_tasks=9)
    plain = cluster.make_task()
    await cluster.one.add_task(plain)
    cluster.clock.advance(seconds=1)
    await cluster.one.add_tasks(cluster.make_task(affinity_tags=["rack-1"]) for _ in range(9))
    await claim(cluster, node)
    cluster.clock.advance(seconds=70)
    plain.description = "changed"
    await cluster.one.update_task(plain)

    assert await claim(cluster, node) != [plain.task_id]


@pytest.mark.parametrize("is_direct", [False, True])
async def test_choice_is_among_the_first_64_tasks_of_the_node(
    cluster: Cluster, *, is_direct: bool
) -> None:
    node = await cluster.join(
        available_skills=["a", "b"], tags=["rack-1"], max_concurrent_tasks=200
    )
    await cluster.one.add_tasks(
        cluster.make_task(
            task_id=f"{number:03}",
            required_skills=[["a"], ["b"], []][number % 3],
            not_before=cluster.clock() if number % 5 == 0 else None,
            submitted_at=cluster.clock() + timedelta(milliseconds=number),
            affinity_tags=["rack-1"] if number in (63, 64) else None,
        )
        for number in range(80)
    )
    await cluster.one.add_tasks(
        cluster.make_task(required_skills=["c"], priority=0) for _ in range(100)
    )

    assert await claim(cluster, node, is_direct=is_direct) == ["063"]
    assert await claim(cluster, node, 3, is_direct=is_direct) == ["064", "000", "001"]
    assert len(await claim(cluster, node, 100, is_direct=is_direct)) == 76


async def test_tasks_that_were_passed_over_keep_their_version(
    cluster: Cluster, location: Location
) -> None:
    node = await cluster.join(tags=["rack-1"])
    plain = cluster.make_task()
    await cluster.one.add_task(plain)
    cluster.clock.advance(seconds=1)
    await cluster.one.add_task(cluster.make_task(affinity_tags=["rack-1"]))
    await claim(cluster, node)

    assert await cluster.one.get_task(plain.task_id) == plain
    [[passed]] = execute(
        location, f"SELECT passed_over_at FROM tasks WHERE task_id = '{plain.task_id}'"
    )
    assert passed is not None
    assert await claim(cluster, node) == [plain.task_id]


@pytest.mark.postgresql
async def test_index_tells_whether_there_are_preferences(
    cluster: Cluster, location: Location
) -> None:
    await cluster.one.add_tasks(cluster.make_task() for _ in range(2000))
    execute(location, "ANALYZE tasks")
    query = statements_for(cluster.one.db).claims.prefers

    plan = "\n".join(line for (line,) in execute(location, f"EXPLAIN {query}"))

    assert "ix_tasks_preferring" in plan
