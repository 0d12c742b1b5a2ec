"""The way of heartbeats into the database: many at once, decided by the newest."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import replace
from datetime import timedelta
from typing import Any

import pytest
from conftest import FakeClock, MakeNode
from sqlalchemy import func, select

from openclaw_store import Database, NodeInfo, NodeRepository, NodeStatus
from openclaw_store.database import CounterRow, NodeRow
from openclaw_store.database.statements import USAGE
from openclaw_store.database.write_transaction import WriteTransaction
from openclaw_store.repositories.heartbeats import Heartbeat, HeartbeatWritten, apply_heartbeats
from openclaw_store.repositories.unit_of_work import Event


@pytest.fixture
async def nodes(database: Database, make_node: MakeNode, clock: FakeClock) -> list[NodeInfo]:
    """Three nodes with a heartbeat at the clock's present time."""
    nodes = [make_node(last_heartbeat=clock(), cpu_usage=1, disk_usage=2) for _ in range(3)]
    for node in nodes:
        await NodeRepository(database).create(node)
    return nodes


async def stored(database: Database, node: NodeInfo) -> NodeInfo:
    found = await NodeRepository(database).get(node.node_id)
    assert found is not None
    return found


async def counters(database: Database) -> tuple[int, int]:
    """The revision, and the number of the newest flush."""
    async with database.session() as session:
        return (
            await session.scalar(select(CounterRow.revision)) or 0,
            await session.scalar(select(func.max(NodeRow.beat))) or 0,
        )


async def test_numbers_go_on_though_no_heartbeat_updates_the_counters(
    database: Database, nodes: list[NodeInfo], clock: FakeClock
) -> None:
    """PostgreSQL would read all former versions of the row, as long as a snapshot may need them.

    Planted: a number is given again when the node that had it is removed.
    """

    async def kept() -> Any:
        async with database.session() as session:
            return await session.scalar(select(CounterRow.beat))

    for node in nodes:
        await database.write(
            apply_heartbeats, [Heartbeat(node.node_id, clock.advance(seconds=1), {})]
        )
    assert (await kept(), await counters(database)) == (0, (3, 3))

    await NodeRepository(database).delete(nodes[2].node_id)
    assert (await kept(), await counters(database)) == (4, (4, 2))
    await database.write(
        apply_heartbeats, [Heartbeat(nodes[0].node_id, clock.advance(seconds=1), {})]
    )

    assert (await kept(), await counters(database)) == (4, (4, 5))


async def test_each_field_that_was_reported_is_written_and_no_other(
    database: Database, nodes: list[NodeInfo], clock: FakeClock
) -> None:
    at = clock.advance(seconds=1)
    reports: list[dict[str, Any]] = [{}, {"disk_usage": 0.0}, dict.fromkeys(USAGE, 3)]
    heartbeats = [
        Heartbeat(node.node_id, at, usage) for node, usage in zip(nodes, reports, strict=True)
    ]

    assert await database.write(apply_heartbeats, heartbeats) == [True, True, True]

    for node, usage in zip(nodes, reports, strict=True):
        assert await stored(database, node) == replace(node, last_heartbeat=at, **usage)


async def test_those_that_need_a_decision_do_not_hinder_the_others(
    database: Database, nodes: list[NodeInfo], clock: FakeClock
) -> None:
    lively, older, offline = nodes
    await NodeRepository(database).update_status(offline.node_id, NodeStatus.OFFLINE)
    revision, flush = await counters(database)
    before, at = clock() - timedelta(seconds=1), clock.advance(seconds=1)
    told: list[Event | HeartbeatWritten] = []
    unlisten = database.listen(told.extend)
    heartbeats = [
        Heartbeat(lively.node_id, at, {"cpu_usage": 50.0}),
        Heartbeat(older.node_id, before, {"cpu_usage": 50.0}),
        Heartbeat("unknown", at, {"cpu_usage": 50.0}),
        Heartbeat(offline.node_id, at, {"cpu_usage": 50.0}),
    ]

    assert await database.write(apply_heartbeats, heartbeats) == [True, True, False, True]

    unlisten()
    changes = [event.change for event in told if isinstance(event, Event)]
    assert [event for event in told if isinstance(event, HeartbeatWritten)] == [
        HeartbeatWritten(heartbeats[0], flush + 1),
        HeartbeatWritten(heartbeats[3], flush + 1),
    ]
    assert [(change.item_id, change.reason) for change in changes] == [
        (offline.node_id, "heartbeat")
    ]
    assert await stored(database, lively) == replace(lively, cpu_usage=50.0, last_heartbeat=at)
    assert await stored(database, older) == older
    back = await stored(database, offline)
    assert (back.status, back.cpu_usage, back.last_heartbeat) == (NodeStatus.ONLINE, 50, at)
    assert await counters(database) == (revision + 1, flush + 1)


async def test_newest_wins_in_whatever_order_they_come(
    database: Database, nodes: list[NodeInfo], clock: FakeClock
) -> None:
    node = nodes[0]
    first, second = clock.advance(seconds=1), clock.advance(seconds=1)

    def both_at_once(
        unit: WriteTransaction, groups: Sequence[Sequence[Heartbeat]]
    ) -> Sequence[Any]:
        [heartbeats] = groups
        return [apply_heartbeats(unit, [[beat] for beat in heartbeats])]

    heartbeats = [
        Heartbeat(node.node_id, second, {"cpu_usage": 20.0}),
        Heartbeat(node.node_id, first, {"cpu_usage": 10.0, "disk_usage": 10.0}),
    ]
    assert await database.write(both_at_once, heartbeats) == [[True], [True]]

    assert await stored(database, node) == replace(node, last_heartbeat=second, cpu_usage=20.0)


async def test_those_of_unknown_nodes_are_no_flush(database: Database, clock: FakeClock) -> None:
    assert await database.write(apply_heartbeats, [Heartbeat("unknown", clock(), {})]) == [False]

    assert await counters(database) == (0, 0)


@pytest.mark.parametrize(("seconds", "comes_back"), [(-1, False), (0, True), (1, True)])
async def test_only_one_from_after_that_brings_a_node_back(
    database: Database, nodes: list[NodeInfo], clock: FakeClock, seconds: int, comes_back: bool
) -> None:
    """Another process may have set it OFFLINE while the heartbeat waited."""
    node, repository = nodes[0], NodeRepository(database)
    clock.advance(seconds=10)
    await repository.update_status(node.node_id, NodeStatus.OFFLINE)
    at = clock() + timedelta(seconds=seconds)
    clock.advance(seconds=10)
    renamed = await stored(database, node)
    renamed.hostname = "renamed"  # which is no change of its status
    await repository.update(renamed)

    assert await database.write(apply_heartbeats, [Heartbeat(node.node_id, at, {})]) == [True]

    found = await stored(database, node)
    assert found.last_heartbeat == at
    assert found.status is (NodeStatus.ONLINE if comes_back else NodeStatus.OFFLINE)


@pytest.mark.parametrize("seconds", [1, 86_400])
async def test_one_of_the_future_gives_way(
    database: Database, nodes: list[NodeInfo], clock: FakeClock, seconds: int
) -> None:
    """The clock was turned back."""
    await NodeRepository(database).update_status(nodes[1].node_id, NodeStatus.OFFLINE)
    at = clock.advance(seconds=-seconds)
    heartbeats = [Heartbeat(node.node_id, at, {"cpu_usage": 7.0}) for node in nodes]

    assert await database.write(apply_heartbeats, heartbeats) == [True, True, True]

    for node in nodes:
        found = await stored(database, node)
        beaten = (found.status, found.last_heartbeat, found.cpu_usage)
        assert beaten == (NodeStatus.ONLINE, at, 7)


def test_later_one_keeps_what_only_the_earlier_reported(clock: FakeClock) -> None:
    earlier = Heartbeat("n", clock(), {"cpu_usage": 1.0, "disk_usage": 2.0})
    later = Heartbeat("n", clock.advance(seconds=1), {"cpu_usage": 3.0})

    assert later.after(earlier) == Heartbeat("n", clock(), {"cpu_usage": 3.0, "disk_usage": 2.0})


async def test_one_from_before_does_not_bring_back_a_node_that_the_batch_has_changed(
    database: Database, nodes: list[NodeInfo], clock: FakeClock
) -> None:
    at = clock.advance(seconds=1)
    clock.advance(seconds=1)
    await NodeRepository(database).update_status(nodes[0].node_id, NodeStatus.OFFLINE)
    node = await stored(database, nodes[0])
    node.hostname = "renamed"

    await asyncio.gather(
        NodeRepository(database).update(node),
        database.write(apply_heartbeats, [Heartbeat(node.node_id, at, {"cpu_usage": 50.0})]),
    )

    assert await stored(database, node) == replace(node, cpu_usage=50.0, last_heartbeat=at)
