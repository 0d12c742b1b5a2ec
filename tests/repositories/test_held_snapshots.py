"""Writes while another session holds a snapshot, for which the server keeps all old versions."""

from __future__ import annotations

import asyncio
import random
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from datetime import timedelta
from typing import Any

import orjson
import pytest
from alembic.script import ScriptDirectory
from conftest import (
    WAITING,
    Cluster,
    FakeClock,
    Location,
    MakeNode,
    MakeTask,
    engine_of,
    execute,
    start,
    until,
)
from sqlalchemy import text
from sqlalchemy.ext.asyncio import AsyncConnection

from openclaw_store import StateManager, Task, TaskPriority
from openclaw_store.database.migrations import SCRIPTS
from openclaw_store.database.store_write import FUNCTION, _arrays

pytestmark = pytest.mark.postgresql

LIVES = 1500
READ = {"index of tasks": "tuples_returned('ix_tasks_ready'", "nodes": "blocks_fetched('nodes'"}


@asynccontextmanager
async def held_snapshot(location: Location) -> AsyncIterator[AsyncConnection]:
    """Hold a snapshot, as `pg_dump` does."""
    engine = engine_of(location).execution_options(isolation_level="REPEATABLE READ")
    async with engine.begin() as connection:
        await connection.execute(text("SELECT count(*) FROM tasks"))
        yield connection


async def claim(session: AsyncConnection, schema: str, node: str) -> dict[str, int]:
    """Claim a task, and return what the server has read for it."""

    async def read() -> dict[str, int]:
        columns = ", ".join(f"pg_stat_get_xact_{one}::regclass)" for one in READ.values())
        [row] = (await session.execute(text(f"SELECT {columns}"))).all()
        return dict(zip(READ, row, strict=True))

    before = await read()
    *arrays, _, _, _ = _arrays()
    given = ", ".join(f"NULL::{kind}" for kind in arrays)
    call = f"{schema}.{FUNCTION}(now(), {given}, '{{{node}}}', '{{1}}', '{{true}}', '9s', NULL)"
    found = (await session.exec_driver_sql(f"SELECT (task).task_id FROM {call}")).scalars().all()
    assert len([one for one in found if one is not None]) == 1
    return {name: after - before[name] for name, after in (await read()).items()}


async def test_claims_do_not_read_what_was_claimed_before(
    cluster: Cluster, location: Location
) -> None:
    """Planted: the session forgets, or reads the versions of its node from the oldest one on."""
    store = cluster.one
    node = await cluster.join(max_concurrent_tasks=LIVES * 2)
    schema = str(store.db.schema)
    async with held_snapshot(location):
        await store.add_tasks(cluster.make_task() for _ in range(LIVES))
        assert len(await store.claim_tasks(node, limit=LIVES)) == LIVES
        await store.add_tasks(cluster.make_task() for _ in range(20))
        update = "UPDATE nodes SET running_tasks = running_tasks;"
        execute(location, f"DO $$BEGIN FOR n IN 1..{LIVES} LOOP {update} END LOOP; END$$")
        async with engine_of(location).connect() as session:
            await session.execute(text(f"SET search_path = {schema}"))
            await session.commit()
            first = await claim(session, schema, node)
            await session.commit()
            later = []
            for _ in range(10):
                await store.add_task(cluster.make_task())
                later.append(await claim(session, schema, node))
                await session.commit()

    assert first["index of tasks"] > LIVES
    assert max(one["index of tasks"] for one in later) < 50
    assert max(one["nodes"] for one in (first, *later)) < 50


def remember(location: Location, schema: str, *, from_entries: int) -> None:
    """Let sessions remember searches that read more than a few entries."""
    scripts = ScriptDirectory(SCRIPTS)
    migration: Any = scripts.get_revision("0014").module
    migration.LONG_SEARCH = from_entries
    definition = migration.function(schema, scripts)
    execute(location, definition.replace("CREATE FUNCTION", "CREATE OR REPLACE FUNCTION"))


@pytest.fixture(params=[-1, 4], ids=["every search", "some"])
def remembering(request: pytest.FixtureRequest, cluster: Cluster, location: Location) -> Cluster:
    remember(location, str(cluster.one.db.schema), from_entries=request.param)
    return cluster


SKILLS: list[list[str]] = [[], ["a"], ["b"], ["a", "b"]]


@pytest.mark.parametrize("seed", range(4))
async def test_claims_are_in_order_whatever_the_session_remembers(
    remembering: Cluster, location: Location, seed: int
) -> None:
    """Planted: a session does not look at the changes since its search, or only at new groups."""
    luck = random.Random(seed)
    cluster = remembering
    managers = [cluster.one, cluster.two]
    nodes = {
        await cluster.join(available_skills=skills, max_concurrent_tasks=999): set(skills)
        for skills in SKILLS[1:]
    }
    claimed: list[Task] = []

    def new() -> Task:
        return cluster.make_task(
            priority=luck.choice(list(TaskPriority)),
            required_skills=luck.choice(SKILLS),
            submitted_at=cluster.clock() - timedelta(minutes=luck.randrange(60)),
        )

    def ready() -> list[tuple[str, list[str]]]:
        rows = execute(
            location,
            "SELECT task_id, coalesce(required_skills::text, '[]') FROM tasks "
            "WHERE status = 'pending' ORDER BY priority, submitted_at, task_id",
        )
        return [(task_id, orjson.loads(skills)) for task_id, skills in rows]

    for _ in range(60):
        store = luck.choice(managers)
        waiting = ready()
        match luck.choice(["add", "add", "claim", "claim", "claim", "change"]):
            case "add":
                await store.add_tasks([new() for _ in range(luck.randrange(1, 5))])
            case "claim":
                asking = luck.choices(list(nodes), k=luck.choice([1, 1, 2, 3]))
                limit = luck.choice([1, 2, 6])
                results = await asyncio.gather(
                    *[store.claim_tasks(node, limit=limit) for node in asking]
                )
                given = ordered(asking, results)
                for node, found in zip(dict.fromkeys(asking), given, strict=True):
                    able = [id for id, skills in waiting if nodes[node].issuperset(skills)]
                    wanted = able[: limit * asking.count(node)]
                    assert [task.task_id for task in found] == wanted
                    waiting = [one for one in waiting if one[0] not in wanted]
                    claimed += found
            case "change" if waiting and luck.random() < 0.7:
                task_id, _ = luck.choice(waiting)
                field, value = luck.choice(
                    [("priority", 0), ("priority", 3), ("required_skills", [])]
                )
                await store.change_task(task_id, lambda task: setattr(task, field, value))  # noqa: B023
            case "change" if claimed:
                await store.release_task(claimed.pop(luck.randrange(len(claimed))))


def ordered(nodes: list[str], results: list[list[Task]]) -> list[list[Task]]:
    """What each node was given by its claims in one batch."""
    of_nodes: dict[str, list[Task]] = {}
    for node, found in zip(nodes, results, strict=True):
        of_nodes.setdefault(node, []).extend(found)
    return list(of_nodes.values())


async def test_task_that_is_added_beside_a_claim_may_be_its_first(remembering: Cluster) -> None:
    """Planted: tasks that are not remembered are claimed from the first one that was found."""
    cluster = remembering
    node = await cluster.join(max_concurrent_tasks=99)
    for _ in range(5):
        await cluster.add(priority=TaskPriority.NORMAL)
        urgent = cluster.make_task(priority=TaskPriority.CRITICAL)

        _, [claimed] = await asyncio.gather(
            cluster.one.add_task(urgent), cluster.one.claim_tasks(node)
        )

        assert claimed.task_id == urgent.task_id


async def test_session_forgets_when_the_feed_is_compacted(
    manager: StateManager,
    location: Location,
    clock: FakeClock,
    make_task: MakeTask,
    make_node: MakeNode,
) -> None:
    """Planted: it looks for the changes since its search in a feed that has lost them."""
    remember(location, str(manager.db.schema), from_entries=-1)
    node = make_node(max_concurrent_tasks=99)
    await manager.register_node(node)
    await manager.add_tasks([make_task() for _ in range(9)])
    assert len(await manager.claim_tasks(node.node_id)) == 1
    urgent = make_task(priority=TaskPriority.CRITICAL)
    for task in (urgent, make_task()):
        await manager.add_task(task)
    clock.advance(seconds=1)
    await manager.compact_changes(days=0)

    [claimed] = await manager.claim_tasks(node.node_id)

    assert claimed.task_id == urgent.task_id


async def test_node_that_is_changed_by_hand_meanwhile_keeps_its_counters(
    cluster: Cluster, location: Location
) -> None:
    """Planted: it is locked and counted by one statement, which updates the outdated version."""
    node = await cluster.join(max_concurrent_tasks=99)
    await cluster.claimed(node)
    await cluster.add()
    async with engine_of(location).begin() as session:
        await session.execute(text("UPDATE nodes SET cpu_usage = 7"))
        claim = start(cluster.one.claim_tasks(node))
        await until(lambda: execute(location, f"SELECT 1 {WAITING}"))

    assert len(await claim) == 1

    assert (await cluster.node(node)).running_tasks == 2


async def test_group_of_tasks_that_are_all_claimed_is_found_again(remembering: Cluster) -> None:
    cluster = remembering
    node = await cluster.join(available_skills=["a", "b"], max_concurrent_tasks=99)
    assert await cluster.one.claim_tasks(node) == []
    for skills in SKILLS * 3:
        task = await cluster.add(required_skills=skills)
        assert [one.task_id for one in await cluster.one.claim_tasks(node)] == [task.task_id]
        assert await cluster.one.claim_tasks(node) == []
