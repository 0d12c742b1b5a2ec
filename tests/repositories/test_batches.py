"""Batches made at random have one outcome on both databases, whatever is taken for granted."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator, Mapping
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
from openclaw_store.backends.postgresql import write_session as round_trips
from openclaw_store.backends.postgresql.write_session import WriterCursor
from openclaw_store.domain import lifecycle
from openclaw_store.domain.records import Record, encode
from openclaw_store.repositories.change_log import read_changes
from openclaw_store.repositories.commands import (
    CONTENT,
    Advance,
    Claim,
    Create,
    Register,
    Remove,
    SetNodeStatus,
    Update,
)
from openclaw_store.repositories.heartbeats import AfterHeartbeat, Heartbeat
from openclaw_store.repositories.unit_of_work import Command, apply

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
        return [self.operation() for _ in range(self.chance.choice((1, 2, 3, 8)))]

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
        decisions: list[Any] = [
            partial(lifecycle.start, owner=owner),
            partial(lifecycle.complete, owner=owner, result=b"1"),
            partial(lifecycle.fail, owner=owner, error="no", wait=WAIT),
            partial(lifecycle.cancel, reason=None),
            partial(
                lifecycle.recover,
                patience=timedelta(seconds=2),
                longest_wait=timedelta(seconds=2),
                wait=WAIT,
            ),
            lifecycle.requeue,
        ]
        hint = known if self.chance.random() < 0.9 else None
        related = () if owner[0] is None else ((NodeInfo, owner[0]),)
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
                candidates = self.chance.sample([*self.tasks.values()], len(self.tasks))
                return Claim(node_id, candidates[:3], self.chance.randrange(1, 4))

    def beat(self, node_id: str) -> Heartbeat:
        at = self.now - timedelta(seconds=self.chance.randrange(4))
        return Heartbeat(node_id, at, {"cpu_usage": float(self.chance.randrange(100))})


@pytest.fixture
def locations(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[list[Location]]:
    """An empty database of each kind."""
    places = [new_location(request, kind, tmp_path, migrated=True) for kind in ENTITY_KINDS]
    with places[0] as one, places[1] as other:
        yield [one, other]


@pytest.fixture
def granted(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """For each batch that was written without the lock, whether it was written unread."""
    written: list[bool] = []
    note = WriterCursor._note

    def noted(self: WriterCursor, *row: Any) -> None:
        written.append(self._has_speculated)
        note(self, *row)

    monkeypatch.setattr(WriterCursor, "_note", noted)
    return written


@pytest.mark.postgresql
@pytest.mark.parametrize("seed", range(in_profile(5)))
async def test_outcome_is_the_same_on_both_databases(
    locations: list[Location],
    clock: FakeClock,
    granted: list[bool],
    monkeypatch: pytest.MonkeyPatch,
    seed: int,
) -> None:
    """P8.

    Planted, on PostgreSQL: what was taken for new and is not added, or what is refused, is not made
    sure of; the guard asks for the counters alone; a node that was removed stays known; each run of
    a batch does without reading; a row that was not new after all is an error.
    """
    monkeypatch.setattr(round_trips, "_PESSIMISTIC_AFTER_CONFLICT", 2)
    chance = Random(seed)
    tasks: Mapping[str, Task] = {}
    nodes: Mapping[str, NodeInfo] = {}
    revision = 0
    async with (
        Database(locations[0], clock=clock) as one,
        Database(locations[1], clock=clock) as two,
    ):
        for _ in range(200):
            clock.advance(seconds=chance.randrange(2))
            batch = chance.random()
            found = []
            for database in (one, two):
                operations = Maker(batch, clock, tasks, nodes).batch()
                outcomes = await asyncio.gather(
                    *[database.write(apply, operation) for operation in operations],
                    return_exceptions=True,
                )
                found.append(([*map(repr, outcomes)], await stored(database, revision)))

            assert found[0] == found[1]

            _, (tasks_now, nodes_now, changes) = found[0]
            revision = changes[-1].revision if changes else revision
            assert all(node.running_tasks >= 0 for node in nodes_now.values())
            if chance.random() < 0.9:  # else what is known is outdated the next time
                tasks, nodes = tasks_now, nodes_now
    assert sum(granted) > 10
