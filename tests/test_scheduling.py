"""The verbs of a task's life, on a database: claims, owners, retries, recovery, keys and lists."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import AsyncIterator, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import timedelta
from functools import partial
from typing import Any

import pytest
from conftest import FakeClock, Location, MakeNode, MakeTask, locked

from openclaw_store import (
    Backoff,
    Change,
    Database,
    InvalidDataError,
    NodeInfo,
    NodeNotFoundError,
    NodeStatus,
    StateManager,
    Task,
    TaskPriority,
    TaskRepository,
    TaskStatus,
    UnavailableError,
)
from openclaw_store.feed import read_changes
from openclaw_store.models import HELD, LIVE

BACKOFF = Backoff(first_seconds=10, factor=2, jitter=0)


class RolledBackError(Exception):
    """What ends a transaction."""


Stored = tuple[list[Task], list[NodeInfo], list[Change]]


async def stored(manager: StateManager) -> Stored:
    """All that the database holds: tasks, nodes, and the feed."""
    tasks = await manager.task_repo.list_tasks(limit=10_000)
    return tasks.tasks, await manager.node_repo.get_all_nodes(), await feed(manager)


async def feed(manager: StateManager, since: int = 0) -> list[Change]:
    """The changes after a revision."""
    found: list[Change] = []
    while True:
        changes, until = await manager.db.read(partial(read_changes, since=since))
        found += changes
        if until == since:
            return found
        since = until


async def assert_in_step(*managers: StateManager) -> None:
    """What each has in memory is what the database holds, and revisions have no gap."""
    for manager in managers:
        await manager.sync_to_database()
    for manager in managers:
        await manager.refresh_from_database()
        tasks, nodes, changes = await stored(manager)
        state = await manager.get_state()
        assert state.tasks == {one.task_id: one for one in tasks if one.status in LIVE}
        assert state.nodes == {one.node_id: one for one in nodes}
        assert [change.revision for change in changes] == list(range(1, manager.version + 1))
        counts = Counter(str(one.status) for one in tasks)
        stats = await manager.get_task_stats()
        assert Counter(stats) == Counter({"total": len(tasks), **counts})
        pending = await manager.task_repo.list_pending_tasks(None)
        assert await manager.get_pending_tasks(None) == pending
        available = await manager.node_repo.get_available_nodes()
        assert await manager.get_available_nodes() == available


async def assert_counted(manager: StateManager) -> None:
    """Each node's `running_tasks` are the tasks that it holds."""
    tasks, nodes, _ = await stored(manager)
    held = Counter(task.assigned_node for task in tasks if task.status in HELD)
    assert [node.running_tasks for node in nodes] == [held[node.node_id] for node in nodes]


def assert_legal(changes: Sequence[Change], places: Mapping[str, int]) -> None:
    """Each task had one owner at a time, and no node had more of them than it has places."""
    status: dict[str, str | None] = {}
    owner: dict[str, str | None] = {}
    for change in changes:
        if change.item != "task":
            continue
        id, before, after = change.item_id, status.get(change.item_id), change.to_status
        assert change.from_status == before
        if after == "scheduled" != before:
            assert before == "pending"
            owner[id] = change.node
        elif after in HELD:
            assert before in HELD
            assert change.node == owner[id]
        else:
            owner[id] = None
        status[id] = after
        assert all(count <= places[node] for node, count in Counter(owner.values()).items() if node)


@dataclass
class Cluster:
    """Two coordinators of one database; either knows what the other does when it is told to."""

    manager: StateManager
    other: StateManager
    clock: FakeClock
    make_task: MakeTask
    make_node: MakeNode

    async def add(self, **fields: Any) -> Task:
        """A new task."""
        task = self.make_task(**fields)
        await self.manager.add_task(task)
        return task

    async def join(self, **fields: Any) -> NodeInfo:
        """A new node, which both know."""
        node = self.make_node(**fields)
        await self.manager.register_node(node)
        await self.other.refresh_from_database()
        return node

    async def claimed(self, node: NodeInfo | None = None, **fields: Any) -> Task:
        """A new task that a node, which is new too unless it is given, has claimed."""
        node = await self.join() if node is None else node
        added = await self.add(priority=TaskPriority.CRITICAL, **fields)
        [task] = await self.manager.claim_tasks(node.node_id)
        assert task.task_id == added.task_id
        return task

    async def running(self, node: NodeInfo | None = None, **fields: Any) -> Task:
        """A new task that a node has begun to run."""
        return await self.manager.start_task(await self.claimed(node, **fields))

    async def node(self, node_id: str) -> NodeInfo:
        """A node as it is stored."""
        node = await self.manager.node_repo.get(node_id)
        assert node is not None
        return node

    async def task(self, task_id: str) -> Task:
        """A task as it is stored."""
        task = await self.manager.task_repo.get(task_id)
        assert task is not None
        return task


@pytest.fixture
async def cluster(
    database: Database,
    location: Location,
    clock: FakeClock,
    make_task: MakeTask,
    make_node: MakeNode,
) -> AsyncIterator[Cluster]:
    """Two coordinators; whatever a test does with them, their memories equal the database."""
    async with (
        StateManager(database, None, backoff=BACKOFF) as manager,
        StateManager(Database(location, clock=clock), None, backoff=BACKOFF) as other,
    ):
        yield Cluster(manager, other, clock, make_task, make_node)
        await assert_in_step(manager, other)


def ids(tasks: Sequence[Task]) -> list[str]:
    return [task.task_id for task in tasks]


class TestClaim:
    async def test_best_tasks_go_first_and_are_the_nodes(self, cluster: Cluster) -> None:
        node, now = await cluster.join(max_concurrent_tasks=5), cluster.clock()
        for id, priority, seconds in (
            ("e", TaskPriority.LOW, -60),
            ("c", TaskPriority.HIGH, 0),
            ("d", TaskPriority.NORMAL, 0),
            ("a", TaskPriority.CRITICAL, 5),
            ("b", TaskPriority.HIGH, 0),
        ):
            submitted_at = cluster.clock.advance(seconds)
            await cluster.add(task_id=id, priority=priority, submitted_at=submitted_at)
            cluster.clock.now = now
        before = cluster.manager.version

        claimed = await cluster.manager.claim_tasks(node.node_id, limit=4)

        assert ids(claimed) == ["a", "b", "c", "d"]
        assert claimed == [await cluster.task(id) for id in "abcd"]
        for task in claimed:
            owner = (task.assigned_node, task.attempt)
            assert (task.status, *owner) == (TaskStatus.SCHEDULED, node.node_id, 1)
            assert (task.scheduled_at, task.started_at, task.updated_at) == (now, None, now)
        assert (await cluster.node(node.node_id)).running_tasks == 4
        changes = await feed(cluster.manager, before)
        assert [one[2:9] for one in changes] == [
            *[("task", id, "status", "pending", "scheduled", node.node_id, None) for id in "abcd"],
            ("node", node.node_id, "updated", "online", "online", None, None),
        ]
        claimed[0].parameters["mine"] = claimed[0].attempt = 7  # nobody else's copy
        assert ids(await cluster.manager.claim_tasks(node.node_id, limit=4)) == ["e"]

    async def test_node_gets_what_is_due_and_what_it_has_the_skills_for(
        self, cluster: Cluster
    ) -> None:
        now = cluster.clock()
        node = await cluster.join(available_skills=["java", "Go", "ä%"], max_concurrent_tasks=9)
        for id, skills in (("all", ["ä%", "Go", "java", "java"]), ("none", [])):
            await cluster.add(task_id=id, required_skills=skills)
        for skills in (["javascript"], ["jav"], ["go"], ["Go", "python"], ["a%"], ["%"], [""]):
            await cluster.add(required_skills=skills, priority=TaskPriority.CRITICAL)
        await cluster.add(task_id="now due", not_before=now, priority=TaskPriority.LOW)
        for id, seconds, priority in (("later", 9, 2), ("latest", 10, 0), ("not yet", 11, 0)):
            await cluster.add(
                task_id=id, not_before=cluster.clock.advance(seconds), priority=priority
            )
            cluster.clock.now = now
        claim = cluster.manager.claim_tasks

        assert ids(await claim(node.node_id, 9)) == ["all", "none", "now due"]
        cluster.clock.advance(8.999999)
        assert await claim(node.node_id, 9) == []
        cluster.clock.advance(1.000001)
        assert ids(await claim(node.node_id, 9)) == ["latest", "later"]

    async def test_node_gets_no_more_than_it_has_places_for(self, cluster: Cluster) -> None:
        node = await cluster.join(max_concurrent_tasks=3)
        await cluster.manager.add_tasks(cluster.make_task() for _ in range(9))
        claim = partial(cluster.manager.claim_tasks, node.node_id)

        assert len(await claim()) == 1
        task, _ = await claim(limit=100)
        assert await claim(limit=100) == []
        await cluster.manager.complete_task(task)
        assert len(await claim(limit=100)) == 1
        await cluster.manager.change_node(
            node.node_id, lambda node: setattr(node, "max_concurrent_tasks", 1)
        )
        assert await claim(limit=100) == []  # it has three, which it may finish
        await assert_counted(cluster.manager)

    async def test_node_that_is_not_online_gets_nothing(self, cluster: Cluster) -> None:
        await cluster.add()
        for status in set(NodeStatus) - {NodeStatus.ONLINE}:
            node = await cluster.join(status=status)
            # The other one does not know of the task, nor of what becomes of the node.
            await cluster.manager.update_node_status(node.node_id, NodeStatus.ONLINE)
            await cluster.other.refresh_from_database()
            await cluster.manager.update_node_status(node.node_id, status)

            for manager in (cluster.manager, cluster.other):
                assert await manager.claim_tasks(node.node_id) == []
                assert await manager.task_repo.claim(node.node_id) == []

    async def test_nonsense_is_refused_by_name(self, cluster: Cluster) -> None:
        node = await cluster.join()
        await cluster.add()
        before = await stored(cluster.manager)

        for claim in (cluster.manager.claim_tasks, cluster.manager.task_repo.claim):
            with pytest.raises(NodeNotFoundError, match="'nobody'"):
                await claim("nobody")
            for limit in (0, -1, True, 1.0, "1", None, 1 << 63):
                with pytest.raises(InvalidDataError) as caught:
                    await claim(node.node_id, limit)  # type: ignore[arg-type]  # on purpose
                assert caught.value.field == "limit"
            with pytest.raises(InvalidDataError, match="node_id"):
                await claim(7)  # type: ignore[arg-type]  # on purpose

        assert await stored(cluster.manager) == before
        assert len(await cluster.manager.claim_tasks(node.node_id, (1 << 63) - 1)) == 1

    async def test_repository_claims_alike_in_a_transaction_or_without(
        self, cluster: Cluster
    ) -> None:
        """Behind more than a page of tasks that the node cannot run."""
        node = await cluster.join(available_skills=["python"], max_concurrent_tasks=400)
        await cluster.manager.add_tasks(
            cluster.make_task(required_skills=["gpu"], priority=0) for _ in range(300)
        )
        await cluster.manager.add_tasks(
            cluster.make_task(task_id=f"good-{number:03}") for number in range(303)
        )
        before = await stored(cluster.manager)

        async def claim_and_roll_back() -> None:
            async with cluster.manager.db.transaction() as tx:
                undone = await TaskRepository(tx).claim(node.node_id, 2)
                assert ids(undone) == ["good-000", "good-001"]
                raise RolledBackError

        with pytest.raises(RolledBackError):
            await claim_and_roll_back()
        assert await stored(cluster.manager) == before
        async with cluster.manager.db.transaction() as tx:
            first = await TaskRepository(tx).claim(node.node_id, 2)
            more = await TaskRepository(tx).claim(node.node_id, 2)
        rest = await cluster.other.task_repo.claim(node.node_id, 500)

        assert ids([*first, *more, *rest]) == [f"good-{number:03}" for number in range(303)]
        assert first == [await cluster.task(id) for id in ids(first)]
        await assert_counted(cluster.manager)
        assert await cluster.manager.claim_tasks(node.node_id, 500) == []

    async def test_picture_that_is_outdated_costs_nothing_but_time(self, cluster: Cluster) -> None:
        """Of nine tasks the other one has claimed, cancelled, removed or changed seven."""
        busy, node = await cluster.join(), await cluster.join(max_concurrent_tasks=9)
        tasks = [await cluster.add(task_id=f"{number}") for number in range(9)]
        await cluster.other.refresh_from_database()
        await cluster.manager.claim_tasks(busy.node_id, 3)
        await cluster.manager.cancel_task("3")
        await cluster.manager.remove_task("4")
        for task, change in (
            (tasks[5], {"required_skills": ["gpu"]}),
            (tasks[6], {"not_before": cluster.clock() + timedelta(seconds=1)}),
            (tasks[8], {"priority": TaskPriority.HIGH}),
        ):
            await cluster.manager.update_task(replace(task, **change))

        claimed = await cluster.other.claim_tasks(node.node_id, 2)
        late = await cluster.other.claim_tasks(node.node_id, 2)

        assert sorted(ids(claimed)) == ["7", "8"]
        assert late == []
        await assert_counted(cluster.manager)

    async def test_picture_of_the_node_that_is_outdated_does_no_harm(
        self, cluster: Cluster
    ) -> None:
        node, gone = await cluster.join(max_concurrent_tasks=2), await cluster.join()
        for _ in range(5):
            await cluster.add()
        await cluster.other.refresh_from_database()
        assert len(await cluster.manager.claim_tasks(node.node_id, 2)) == 2
        await cluster.manager.remove_node(gone.node_id)

        assert await cluster.other.claim_tasks(node.node_id, 2) == []
        with pytest.raises(NodeNotFoundError):
            await cluster.other.claim_tasks(gone.node_id)
        await assert_counted(cluster.manager)

    async def test_sixteen_claimers_of_two_managers_get_each_task_once(
        self, cluster: Cluster
    ) -> None:
        """P4: whatever the number of coordinators, a task is handed to one node at a time."""
        nodes = [await cluster.join(max_concurrent_tasks=3) for _ in range(4)]
        await cluster.manager.add_tasks(cluster.make_task() for _ in range(100))
        done: list[str] = []

        async def work(number: int) -> None:
            manager = (cluster.manager, cluster.other)[number % 2]
            while len(done) < 100:
                node = nodes[number // 2 % 4].node_id
                for task in await manager.claim_tasks(node, limit=1 + number % 3):
                    await manager.complete_task(await manager.start_task(task), number)
                    done.append(task.task_id)
                await manager.refresh_from_database()

        async with asyncio.TaskGroup() as group:
            for number in range(16):
                group.create_task(work(number))

        assert sorted(done) == [f"task-{number:04}" for number in range(1, 101)]
        changes = await feed(cluster.manager)
        assert_legal(changes, {node.node_id: 3 for node in nodes})
        ended = [change.item_id for change in changes if change.to_status == "completed"]
        assert sorted(ended) == sorted(done)
        found = [await cluster.node(node.node_id) for node in nodes]
        assert [node.running_tasks for node in found] == [0] * 4
        assert sum(node.successful_tasks for node in found) == 100
        assert sum(node.total_tasks_processed for node in found) == 100

    async def test_claims_while_others_cancel_change_and_remove(self, cluster: Cluster) -> None:
        node = await cluster.join(max_concurrent_tasks=100)
        tasks = [await cluster.add(task_id=f"task-{number}") for number in range(40)]
        await cluster.other.refresh_from_database()

        def note(task: Task) -> None:
            task.metadata["note"] = "seen"

        async def disturb(number: int, id: str) -> object:
            manager = (cluster.manager, cluster.other)[number // 4 % 2]
            if number % 4 == 0:
                return await manager.cancel_task(id)
            if number % 4 == 1:
                return await manager.change_task(id, note)
            if number % 4 == 2:
                return await manager.requeue_task(id)
            return None

        claims = [
            manager.claim_tasks(node.node_id, 7)
            for _ in range(4)
            for manager in (cluster.manager, cluster.other)
        ]
        disturbed = [disturb(number, id) for number, id in enumerate(ids(tasks))]
        await asyncio.gather(*claims, *disturbed)
        while await cluster.other.claim_tasks(node.node_id, 7):
            pass

        rows, _, changes = await stored(cluster.manager)
        assert_legal(changes, {node.node_id: 100})
        by_id = {task.task_id: task for task in rows}
        for number, id in enumerate(ids(tasks)):
            is_cancelled = number % 4 == 0
            expected = TaskStatus.CANCELLED if is_cancelled else TaskStatus.SCHEDULED
            assert by_id[id].status is expected
            assert (by_id[id].metadata == {"note": "seen"}) is (number % 4 == 1)
        await assert_counted(cluster.manager)

    async def test_what_is_only_in_memory_can_be_claimed(
        self, cluster: Cluster, caplog: pytest.LogCaptureFixture
    ) -> None:
        """It is written first; what loses to newer data is dropped, and the others are claimed."""
        node = cluster.make_node()
        await cluster.manager.add_node(node, persist=False)
        for id in ("a", "b", "c"):
            task = cluster.make_task(task_id=id)
            await cluster.manager.add_task(task, persist=False)
        await cluster.other.add_task(cluster.make_task(task_id="b", status=TaskStatus.COMPLETED))

        claimed = await cluster.manager.claim_tasks(node.node_id, 3)

        assert ids(claimed) == ["a", "c"]
        assert claimed == [await cluster.task("a"), await cluster.task("c")]
        assert "an unsaved task was dropped" in caplog.text
        assert (await cluster.task("b")).status is TaskStatus.COMPLETED
        await assert_counted(cluster.manager)

    async def test_tasks_come_back_when_a_claim_has_failed(
        self, cluster: Cluster, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        node = await cluster.join()
        tasks = [await cluster.add() for _ in range(3)]

        async def fail(*_: object) -> None:
            raise UnavailableError("the disk is full")

        with monkeypatch.context() as patch:
            patch.setattr(cluster.manager.db, "write", fail)
            with pytest.raises(UnavailableError):
                await cluster.manager.claim_tasks(node.node_id, 2)

        assert ids(await cluster.manager.claim_tasks(node.node_id, 5)) == ids(tasks)

    async def test_cancelled_claim_is_withdrawn_or_committed(self, cluster: Cluster) -> None:
        """However far it has come: no task is lost, or set aside for ever."""
        node = await cluster.join(max_concurrent_tasks=50)
        tasks = [await cluster.add() for _ in range(50)]
        for turns in range(12):
            claiming = asyncio.create_task(cluster.manager.claim_tasks(node.node_id, 2))
            for _ in range(turns):
                await asyncio.sleep(0)
            claiming.cancel()
            await asyncio.wait([claiming])

        held = await cluster.manager.task_repo.list_by_node(node.node_id)
        rest = await cluster.manager.claim_tasks(node.node_id, 50)

        assert sorted(ids([*held, *rest])) == ids(tasks)
        await assert_counted(cluster.manager)

    async def test_claim_that_is_cancelled_while_it_is_committed_is_the_nodes(
        self, cluster: Cluster, location: Location
    ) -> None:
        """A node that is told nothing of it gives it back when it registers again."""
        node = await cluster.join()
        task = await cluster.add()
        async with locked(location):
            claiming = asyncio.create_task(cluster.manager.claim_tasks(node.node_id))
            await asyncio.sleep(0)  # now it has queued
            while (await cluster.manager.db.get_stats())["writer"]["queued_operations"]:
                pass
            claiming.cancel()
            await asyncio.wait([claiming], timeout=0.01)
            assert not claiming.done()
        await asyncio.wait([claiming])

        assert claiming.cancelled()
        assert (await cluster.task(task.task_id)).status is TaskStatus.SCHEDULED
        await assert_in_step(cluster.manager, cluster.other)
        await cluster.manager.register_node(node)
        cluster.clock.advance(10)
        assert ids(await cluster.manager.claim_tasks(node.node_id)) == ids([task])

    async def test_claim_that_fails_half_way_tells_of_what_it_has_got(
        self, cluster: Cluster, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """They are the node's, and nobody else would tell it."""
        node, busy = await cluster.join(), await cluster.join()
        await cluster.add(task_id="a")
        await cluster.add(task_id="b")
        await cluster.add(task_id="c")
        await cluster.other.refresh_from_database()
        await cluster.manager.claim_tasks(busy.node_id)
        write = cluster.other.db.write
        writes = 0

        async def write_once(*arguments: Any) -> Any:
            nonlocal writes
            writes += 1
            if writes == 2:
                raise UnavailableError("the disk is full")
            return await write(*arguments)

        with monkeypatch.context() as patch:
            patch.setattr(cluster.other.db, "write", write_once)
            claimed = await cluster.other.claim_tasks(node.node_id, 2)

        assert (ids(claimed), writes) == (["b"], 2)
        assert ids(await cluster.other.claim_tasks(node.node_id, 2)) == ["c"]
        await assert_counted(cluster.manager)
