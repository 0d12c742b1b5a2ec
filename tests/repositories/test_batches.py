"""Batches made at random have one outcome on both databases, with the lock and without it."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AsyncExitStack, ExitStack
from dataclasses import dataclass, replace
from datetime import timedelta
from functools import partial
from pathlib import Path
from random import Random
from typing import Any

import pytest
from conftest import ENTITY_KINDS, FakeClock, Location, new_location
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from sqlalchemy import delete
from support.examples import in_profile

from openclaw_store import (
    Backoff,
    Change,
    Database,
    NodeInfo,
    NodeRepository,
    NodeStatus,
    Task,
    TaskPriority,
    TaskRepository,
    TaskStatus,
    TaskType,
)
from openclaw_store.backends.postgresql.write_session import CallCursor
from openclaw_store.database import NodeRow, TaskRow, WriteTransaction
from openclaw_store.domain import conditions, lifecycle
from openclaw_store.domain.records import Record, encode
from openclaw_store.errors import NodeNotFoundError
from openclaw_store.repositories.batches import apply
from openclaw_store.repositories.change_log import read_changes
from openclaw_store.repositories.commands import (
    CONTENT,
    Advance,
    Claim,
    Create,
    Recover,
    Register,
    Remove,
    SetNodeStatus,
    Update,
)
from openclaw_store.repositories.heartbeats import AfterHeartbeat, Heartbeat
from openclaw_store.repositories.unit_of_work import Command

TASKS = ["task-0", "task-1", "task-2", "task-3", "both"]
NODES = ["node-0", "node-1", "both"]

WAIT = Backoff(first_seconds=0).draw()

Stored = tuple[dict[str, Task], dict[str, NodeInfo], list[Change]]


async def stored(database: Database, since: int) -> Stored:
    """All tasks and nodes, and the changes after a revision."""
    tasks = await TaskRepository(database).list_tasks()
    nodes = await NodeRepository(database).get_all_nodes()
    changes, _ = await database.read(partial(read_changes, since=since))
    return (
        {one.task_id: one for one in tasks},
        {one.node_id: one for one in nodes},
        [*changes],
    )


class Maker:
    """Makes operations at random, the same ones each time.

    Args:
        seed: Stands for what comes out.
        clock: The time of the store.
        tasks: As they are known, though they may be otherwise by now.
        nodes: As they are known.
    """

    def __init__(
        self,
        seed: float,
        clock: FakeClock,
        tasks: Mapping[str, Task],
        nodes: Mapping[str, NodeInfo],
    ) -> None:
        self.chance = Random(seed)
        self.now = clock()
        self.tasks = {id: encode(task) for id, task in tasks.items()}
        self.nodes = {id: encode(node) for id, node in nodes.items()}

    def batch(self) -> list[Command]:
        """Commands of all kinds, or without the ones that need the lock; or claims alone.

        A claim in one batch with other commands may come before or after them.
        """
        count = self.chance.choice((1, 2, 3, 8))
        match self.chance.randrange(4):
            case 0:
                return [self.operation() for _ in range(count)]
            case 1:
                nodes = self.chance.sample(NODES, min(count, len(NODES)))
                return [Claim(node_id, self.chance.randrange(1, 4)) for node_id in nodes]
            case _:
                commands = (self.of_task(self.chance.choice(TASKS), "") for _ in range(5 * count))
                return [one for one in commands if one.is_one_call][:count]

    def operation(self) -> Command:
        task_id, node_id = self.chance.choice(TASKS), self.chance.choice(NODES)
        makers = [self.of_task] * 3 + [self.of_node] * 2
        made = self.chance.choice(makers)(task_id, node_id)
        if isinstance(made, Create | Heartbeat) or self.chance.random() < 0.8:
            return made
        return AfterHeartbeat(self.beat(node_id), made)

    def of_task(self, task_id: str, _: str) -> Command:
        known = self.tasks.get(task_id)
        key = self.chance.choice((None, "key"))
        task = Task(
            task_id, TaskType.BATCH, "new", submitted_at=self.now, idempotency_key=key,
            max_retries=self.chance.randrange(2),
        )  # fmt: skip
        match self.chance.randrange(10):
            case 0 | 1 | 2:
                record = encode(task)
                key = record.idempotency_key if self.chance.random() < 0.5 else None  # a hint
                return Create(Task, task_id, record, key)
            case 3:
                return Remove(Task, task_id, with_history=self.chance.random() < 0.5)
            case 4 if known is not None:
                changed = known.evolve(name=str(self.chance.random()), idempotency_key=key)
                names = known.differences(changed)
                return Update(Task, task_id, changed, names, known.version, known)
            case _:
                return self.step(task_id, known)

    def step(self, task_id: str, known: Record[Task] | None) -> Command:
        owner = ("node-0", 1) if known is None else lifecycle.owner_of(known)
        hint = known if self.chance.random() < 0.9 else None
        related = () if owner[0] is None else ((NodeInfo, owner[0]),)
        if self.chance.random() < 0.2:
            recover: Any = partial(
                lifecycle.recover,
                patience=timedelta(seconds=2),
                longest_wait=timedelta(seconds=2),
                wait=WAIT,
            )
            return Recover(task_id, recover, hint, related)
        decisions: list[Any] = [
            partial(lifecycle.start, owner=owner),
            partial(lifecycle.complete, owner=owner, result=b"1"),
            partial(lifecycle.fail, owner=owner, error="no", wait=WAIT),
            partial(lifecycle.cancel, reason=None),
            lifecycle.requeue,
        ]
        return Advance(task_id, self.chance.choice(decisions), hint, related)

    def of_node(self, _: str, node_id: str) -> Command:
        node = encode(
            NodeInfo(
                node_id, str(self.chance.random()), registered_at=self.now,
                max_concurrent_tasks=self.chance.randrange(1, 4),
            )
        )  # fmt: skip
        known = self.nodes.get(node_id)
        match self.chance.randrange(12):
            case 0:
                return Create(NodeInfo, node_id, node)
            case 1:
                return Remove(NodeInfo, node_id)
            case 2:
                status = self.chance.choice((NodeStatus.ONLINE, NodeStatus.OFFLINE))
                return SetNodeStatus(node_id, status)
            case 3 | 4:
                return Register(node_id, node, WAIT)
            case 5:
                return self.beat(node_id)
            case 6 if known is not None:
                return Update(NodeInfo, node_id, node, CONTENT[NodeInfo], known.version)
            case _:
                return SetNodeStatus(node_id, NodeStatus.ONLINE)

    def beat(self, node_id: str) -> Heartbeat:
        at = self.now - timedelta(seconds=self.chance.randrange(4))
        return Heartbeat(node_id, at, {"cpu_usage": float(self.chance.randrange(100))})


@pytest.fixture
def locations(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[list[Location]]:
    """An empty database of SQLite, and two of PostgreSQL."""
    kinds = (*ENTITY_KINDS, "postgresql")
    with ExitStack() as stack:
        places = [new_location(request, kind, tmp_path, migrated=True) for kind in kinds]
        yield [stack.enter_context(place) for place in places]


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The calls that were prepared."""
    made: list[str] = []
    prepare = CallCursor.prepare

    def prepared(self: CallCursor, sql: str, *arguments: Any) -> None:
        made.append(sql)
        prepare(self, sql, *arguments)

    monkeypatch.setattr(CallCursor, "prepare", prepared)
    return made


def take_the_lock(unit: WriteTransaction, operations: Sequence[None]) -> Sequence[Any]:
    return [unit.cursor.execute("SELECT 1") for _ in operations]


def rounded(outcome: Any) -> Any:
    """Compare means to a few digits: they are added up in another order."""
    return {
        id: replace(node, average_execution_time=round(node.average_execution_time, 6))
        for id, node in outcome.items()
    }


@pytest.mark.postgresql
@pytest.mark.parametrize("seed", range(in_profile(5)))
async def test_outcome_is_the_same_on_both_databases(
    locations: list[Location],
    clock: FakeClock,
    calls: list[str],
    seed: int,
) -> None:
    """P8. Batches are written to SQLite, and to PostgreSQL by calls and with the lock.

    Planted, on PostgreSQL: a task that is refused by what was known is not checked; a new row is
    written though there is one; revisions of a batch are moved by one too many; changes of a node
    have the order of commands; the function forgets the mean.
    """
    chance = Random(seed)
    tasks: Mapping[str, Task] = {}
    nodes: Mapping[str, NodeInfo] = {}
    revision = 0
    async with AsyncExitStack() as stack:
        databases = [
            await stack.enter_async_context(Database(location, clock=clock))
            for location in locations
        ]
        for _ in range(120):
            clock.advance(seconds=chance.randrange(2))
            batch = chance.random()
            found = []
            for number, database in enumerate(databases):
                operations = Maker(batch, clock, tasks, nodes).batch()
                locking = [database.write(take_the_lock, None)] if number == 2 else []
                outcomes = await asyncio.gather(
                    *locking,
                    *[database.write(apply, operation) for operation in operations],
                    return_exceptions=True,
                )
                tasks_now, nodes_now, changes = await stored(database, revision)
                shown = [*map(repr, outcomes[len(locking) :])]
                found.append((shown, tasks_now, rounded(nodes_now), changes))

            for seen in found[1:]:
                for one, other in zip(found[0], seen, strict=True):
                    assert one == other

            revision = changes[-1].revision if changes else revision
            assert all(node.running_tasks >= 0 for node in nodes_now.values())
            if chance.random() < 0.9:  # else what is known is outdated the next time
                tasks, nodes = tasks_now, nodes_now
    assert len(calls) > 50


SECONDS = st.sampled_from([-3, -1, 0, 0, 1, 4])
"""The distance of a time from the present; the clock may have been turned back since."""

SKILLS = st.lists(st.sampled_from(["x", "y", "Ü"]), max_size=3)


@dataclass(frozen=True)
class Scene:
    """Tasks and nodes, and what the nodes do."""

    tasks: dict[str, dict[str, Any]]
    nodes: dict[str, dict[str, Any]]
    rounds: list[tuple[dict[str, int], list[int]]]
    """Claims, as the number of tasks for each node, and then how assigned tasks end."""


@st.composite
def scenes(draw: st.DrawFn) -> Scene:
    def optional(times: st.SearchStrategy[int]) -> st.SearchStrategy[int | None]:
        return st.none() | times

    task = st.fixed_dictionaries(
        {
            "status": st.sampled_from([TaskStatus.PENDING] * 6 + [*TaskStatus]),
            "priority": st.sampled_from(TaskPriority),
            "required_skills": SKILLS,
            "submitted_at": SECONDS,
            "not_before": optional(SECONDS),
            "scheduled_at": optional(SECONDS),
            "started_at": optional(SECONDS),
            "attempt": st.integers(0, 3),
            "max_retries": st.integers(0, 1),
            "assigned_node": st.sampled_from(["n", "m"]),
        }
    )
    node = st.fixed_dictionaries(
        {
            "status": st.sampled_from([NodeStatus.ONLINE] * 4 + [*NodeStatus]),
            "available_skills": SKILLS,
            "max_concurrent_tasks": st.integers(1, 5),
            "running_tasks": st.integers(0, 3),
            "total_tasks_processed": st.integers(0, 9),
            "average_execution_time": st.floats(0, 9),
        }
    )
    ids = st.text("aBbé_-1", min_size=1, max_size=3)
    claims = st.dictionaries(st.sampled_from(["n", "m", "missing"]), st.integers(1, 4))
    return Scene(
        draw(st.dictionaries(ids, task, min_size=1, max_size=12)),
        {name: draw(node) for name in ("n", "m")},
        draw(
            st.lists(
                st.tuples(claims, st.lists(st.integers(0, 3), max_size=6)), min_size=1, max_size=3
            )
        ),
    )


class Stage:
    """A database on which scenes are played; any number of them after each other.

    Args:
        has_lock: Write all batches in transactions with the lock.
    """

    def __init__(self, database: Database, clock: FakeClock, *, has_lock: bool) -> None:
        self.database = database
        self.now = clock()
        self.has_lock = has_lock

    async def write(self, *commands: Command) -> list[Any]:
        locking = [self.database.write(take_the_lock, None)] if self.has_lock else []
        writes = [self.database.write(apply, command) for command in commands]
        outcomes = await asyncio.gather(*locking, *writes, return_exceptions=True)
        return outcomes[len(locking) :]

    async def tasks(self) -> dict[str, Record[Task]]:
        page = await TaskRepository(self.database).list_tasks()
        return {task.task_id: encode(task) for task in page}

    async def nodes(self) -> dict[str, NodeInfo]:
        return {one.node_id: one for one in await NodeRepository(self.database).get_all_nodes()}

    async def play(self, scene: Scene) -> list[Any]:
        """Return all that is seen."""
        async with self.database.transaction() as tx:
            for row in (TaskRow, NodeRow):
                await tx.execute(delete(row))
        *_, changes = await stored(self.database, 0)
        since = max((change.revision for change in changes), default=0)
        await self.write(*self.creations(scene))
        seen: list[Any] = []
        for claims, ends in scene.rounds:
            expected = self.expected(claims, await self.tasks(), await self.nodes())
            outcomes = await self.write(*(Claim(id, limit) for id, limit in claims.items()))
            found = [
                [task.task_id for task in one] if isinstance(one, list) else type(one)
                for one in outcomes
            ]
            assert found == expected
            assigned = [one for one in (await self.tasks()).values() if conditions.is_assigned(one)]
            assigned.sort(key=lambda one: one.task_id)
            outcomes += await self.write(*map(self.end, assigned, ends))
            seen += map(repr, outcomes)
        tasks, nodes, changes = await stored(self.database, since)
        return [seen, tasks, rounded(nodes), changes]

    def creations(self, scene: Scene) -> Iterator[Command]:
        for id, fields in scene.nodes.items():
            node = NodeInfo(id, "host", registered_at=self.now, **fields)
            yield Create(NodeInfo, id, encode(node))
        for id, fields in scene.tasks.items():
            values = dict(fields)
            for name in ("submitted_at", "not_before", "scheduled_at", "started_at"):
                if values[name] is not None:
                    values[name] = self.now + timedelta(seconds=values[name])
            if values["status"] is TaskStatus.PENDING:
                values["assigned_node"] = None
            yield Create(Task, id, encode(Task(id, TaskType.BATCH, "task", **values)))

    def expected(
        self,
        claims: Mapping[str, int],
        tasks: dict[str, Record[Task]],
        nodes: Mapping[str, NodeInfo],
    ) -> list[Any]:
        """What the claims return by the rules of `lifecycle`."""
        found: list[Any] = []
        in_order = sorted(
            tasks.values(), key=lambda one: (one.priority, one.submitted_at, one.task_id)
        )
        for id, limit in claims.items():
            if id not in nodes:
                found.append(NodeNotFoundError)
                continue
            node, claimed = encode(nodes[id]), list[str]()
            for task in in_order:
                step = lifecycle.claim(tasks[task.task_id], node, self.now)
                if step is not None and len(claimed) < limit:
                    assert step.node is not None
                    node = node.evolve(**lifecycle.counted(node, step.node))
                    tasks[task.task_id] = task.replace(**step.task)
                    claimed.append(task.task_id)
            found.append(claimed)
        # A claim of a missing node is refused alone.
        return found

    def end(self, task: Record[Task], how: int) -> Command:
        owner = lifecycle.owner_of(task)
        decisions: list[Any] = [
            partial(lifecycle.start, owner=owner),
            partial(lifecycle.complete, owner=owner, result=b"1"),
            partial(lifecycle.fail, owner=owner, error="no", wait=WAIT),
            partial(lifecycle.cancel, reason=None),
        ]
        return Advance(task.task_id, decisions[how], task)


@pytest.mark.postgresql
def test_rules_of_the_function_are_those_of_the_life_cycle(
    locations: list[Location], clock: FakeClock
) -> None:
    """Claims, and counters of nodes: on SQLite, by a call, and with the lock.

    Planted, in the function: a claim ignores the skills, the status of the node, its slots or
    `not_before`; the order of claims; the latest time of the task; a sum, the mean.
    """
    with asyncio.Runner() as runner:
        databases = [Database(location, clock=clock) for location in locations]
        stages = [
            Stage(database, clock, has_lock=number == 2)
            for number, database in enumerate(databases)
        ]

        @settings(max_examples=in_profile(60), suppress_health_check=[HealthCheck.too_slow])
        @given(scene=scenes())
        def agree(scene: Scene) -> None:
            first, *others = [runner.run(stage.play(scene)) for stage in stages]
            for other in others:
                for mine, its in zip(first, other, strict=True):
                    assert its == mine

        try:
            for database in databases:
                runner.run(database.initialize())
            agree()
        finally:
            for database in databases:
                runner.run(database.close())
