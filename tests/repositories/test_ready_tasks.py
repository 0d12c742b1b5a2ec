"""The choice of a claim: the first tasks that a node can run, without a long search."""

from __future__ import annotations

import random
from datetime import timedelta
from pathlib import Path
from typing import Any

import orjson
import pytest
from conftest import WAITING, Cluster, Location, execute, start, until

from openclaw_store import Task, TaskPriority, TaskRepository, TaskStatus
from openclaw_store.repositories import ready_tasks

SKILLS = ["a", "ab", "b", 'quo"te', "back\\slash", "ä", "c", "[", "]", "\u2028"]


@pytest.fixture
def few_are_many(monkeypatch: pytest.MonkeyPatch) -> None:
    """Long searches begin with few groups."""
    monkeypatch.setattr(ready_tasks, "_FEW", 3)
    monkeypatch.setattr(ready_tasks, "_FRONT", 5)


def spell(skills: list[str], luck: random.Random) -> str:
    """A list in JSON, as the store or somebody else writes it."""
    if luck.random() < 0.7:
        return orjson.dumps(skills).decode()
    text = luck.choice([", ", " ,", "\n,"]).join(
        '"' + "".join(rf"\u{ord(char):04x}" if luck.random() < 0.5 else char for char in one) + '"'
        for one in skills
        if not {'"', "\\"}.intersection(one)
    )
    return f"[{text}]" if luck.random() < 0.5 else f" [ {text}]"


@pytest.mark.usefixtures("few_are_many")
@pytest.mark.parametrize("seed", range(3))
async def test_claims_are_in_order_whatever_the_tasks_require(
    cluster: Cluster, location: Location, seed: int
) -> None:
    luck = random.Random(seed)
    tasks = [
        cluster.make_task(
            priority=luck.choice(list(TaskPriority)),
            not_before=luck.choice([None, None, None, cluster.clock() - timedelta(hours=1)]),
            submitted_at=cluster.clock() - timedelta(minutes=luck.randrange(60)),
        )
        for _ in range(40)
    ]
    await cluster.one.add_tasks(tasks)
    spelled = [spell(luck.sample(SKILLS, luck.choice([0, 1, 1, 2, 3])), luck) for _ in tasks]
    cases = ""
    for task, text in zip(tasks, spelled, strict=True):
        task.required_skills = orjson.loads(text)
        cases += f" WHEN '{task.task_id}' THEN '{text}'"
    kind = "TEXT" if isinstance(location, Path) else "json"
    sql = f"UPDATE tasks SET required_skills = CAST(CASE task_id{cases} END AS {kind})"
    execute(location, sql)
    waiting = {task.task_id: task for task in tasks}

    for count in (1, 2, 3, 6, len(SKILLS)):
        skills = luck.sample(SKILLS, count)
        node = await cluster.join(available_skills=skills, max_concurrent_tasks=99)
        able = [one for one in waiting.values() if set(one.required_skills) <= set(skills)]
        able.sort(key=lambda one: (one.priority, one.submitted_at, one.task_id))
        wanted = [task.task_id for task in able][: luck.choice([1, 4, 99])]
        async with cluster.one.db.transaction() as tx:
            claimed = await TaskRepository(tx).claim(node, limit=1)
        if len(wanted) > 1:
            claimed += await cluster.one.claim_tasks(node, limit=len(wanted) - 1)

        assert [task.task_id for task in claimed] == wanted
        for id in wanted:
            del waiting[id]


async def steps_of_claim(cluster: Cluster, node: str) -> tuple[int, int]:
    """The statements, and the hundreds of steps, that a claim takes SQLite."""
    session: Any = cluster.one.db._writer._session
    driver = session._connection.connection.driver_connection
    statements: list[str] = []
    steps: list[None] = []
    driver.set_trace_callback(statements.append)
    driver.set_progress_handler(lambda: steps.append(None), 100)
    [task] = await cluster.one.claim_tasks(node)
    driver.set_trace_callback(None)
    driver.set_progress_handler(None, 0)
    assert task.status is TaskStatus.SCHEDULED
    return len(statements), len(steps)


def of_skill(cluster: Cluster, number: int) -> Task:
    return cluster.make_task(required_skills=[f"skill-{number:04}"])


@pytest.mark.sqlite
@pytest.mark.parametrize("are_in_front", [True, False])
async def test_node_with_many_skills_reads_few_of_many_groups(
    cluster: Cluster, *, are_in_front: bool
) -> None:
    skills = [f"skill-{number:04}" for number in range(400)]
    node = await cluster.join(available_skills=skills, max_concurrent_tasks=9)
    if not are_in_front:
        await cluster.one.add_tasks(
            cluster.make_task(required_skills=["other"], priority=0) for _ in range(150)
        )
    await cluster.one.add_tasks(of_skill(cluster, number) for number in range(400))

    statements, steps = await steps_of_claim(cluster, node)

    assert statements < 20  # 400 groups were read
    assert steps < (170 if are_in_front else 500)  # 241 and 343 without a look at the first tasks


@pytest.mark.sqlite
async def test_search_does_not_grow_with_the_groups_of_other_skills(cluster: Cluster) -> None:
    node = await cluster.join(available_skills=["skill-0003"], max_concurrent_tasks=9)
    await cluster.one.add_tasks(of_skill(cluster, number) for number in range(100))
    _, before = await steps_of_claim(cluster, node)
    await cluster.one.add_tasks(of_skill(cluster, number) for number in (*range(100, 1500), 3))

    _, after = await steps_of_claim(cluster, node)

    assert after <= 1.2 * before


@pytest.mark.parametrize("in_transaction", [False, True])
async def test_due_tasks_that_a_node_cannot_run_hide_none(
    cluster: Cluster, *, in_transaction: bool
) -> None:
    """A claim looked at the thousand tasks that were due first, whatever they require."""
    node = await cluster.join(available_skills=["b"])
    due = cluster.clock() - timedelta(hours=1)
    others = [cluster.make_task(required_skills=["a"], not_before=due) for _ in range(1000)]
    for task in others[:3]:
        task.required_skills, task.expires_at = [], due
    skills = [["b"], [], ["b", "a"]]
    tasks = [
        cluster.make_task(required_skills=one, not_before=due + timedelta(minutes=1))
        for one in skills
    ]
    await cluster.one.add_tasks([*others, *tasks])

    if in_transaction:
        async with cluster.one.db.transaction() as tx:
            claimed = await TaskRepository(tx).claim(node, limit=5)
    else:
        claimed = await cluster.one.claim_tasks(node, limit=5)

    assert [task.task_id for task in claimed] == [task.task_id for task in tasks[:2]]


@pytest.mark.postgresql
@pytest.mark.parametrize("are_due", [True, False], ids=["due retries", "many groups"])
async def test_claim_searches_again_if_others_have_taken_what_it_found(
    cluster: Cluster, location: Location, *, are_due: bool
) -> None:
    """It searches before it has the lock, and not for all tasks: it found none then."""
    skills = ["a", "b", "c", "d", "e", "f"]
    nodes = [await cluster.join(available_skills=skills, max_concurrent_tasks=99) for _ in range(2)]
    await cluster.one.add_tasks(
        cluster.make_task(not_before=cluster.clock() - timedelta(hours=1))
        if are_due
        else cluster.make_task(
            required_skills=[one for at, one in enumerate(skills) if kind >> at & 1]
        )
        for kind in range(40)
    )

    async with cluster.two.db.transaction() as tx:
        claim = start(cluster.one.claim_tasks(nodes[0]))
        await until(lambda: execute(location, f"SELECT 1 {WAITING}"))
        assert len(await TaskRepository(tx).claim(nodes[1], limit=39)) == 39

    assert len(await claim) == 1


@pytest.mark.postgresql
async def test_function_sorts_no_tasks(cluster: Cluster, location: Location) -> None:
    """With statistics of an empty table, a claim read 10,000 tasks by their status, and sorted."""
    [[settings]] = execute(location, "SELECT proconfig FROM pg_proc WHERE proname ~ '^store_write'")

    assert {"enable_sort=off", "enable_incremental_sort=off"} <= set(settings)
