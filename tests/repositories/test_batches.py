"""Batches made at random have one outcome on both databases, with the lock and without it."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AsyncExitStack, ExitStack
from dataclasses import replace
from datetime import timedelta
from functools import partial
from pathlib import Path
from random import Random
from typing import Any

import pytest
from conftest import ENTITY_KINDS, FakeClock, Location, new_location
from support.examples import in_profile

from openclaw_store import (
    Backoff,
    Change,
    Database,
    NodeInfo,
    NodeRepository,
    NodeStatus,
    Task,
    TaskRepository,
    TaskType,
)
from openclaw_store.backends.postgresql.write_session import CallCursor
from openclaw_store.database import WriteTransaction
from openclaw_store.domain import lifecycle
from openclaw_store.domain.records import Record, encode
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
