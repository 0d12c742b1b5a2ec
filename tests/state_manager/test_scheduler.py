"""The verbs of a task's life, on a database: claims, owners, retries, recovery."""

from __future__ import annotations

import asyncio
import math
from collections import Counter
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import replace
from datetime import timedelta
from functools import partial
from itertools import product
from typing import Any

import pytest
from conftest import (
    BACKOFF,
    PATIENCE,
    Cluster,
    Location,
    OpenManager,
    assert_counted,
    assert_in_step,
    execute,
    feed,
    ids,
    locked,
    stored,
)

from openclaw_store import (
    Backoff,
    Change,
    ConflictError,
    DuplicateError,
    InvalidDataError,
    InvalidTransitionError,
    NodeInfo,
    NodeNotFoundError,
    NodeRepository,
    NodeStatus,
    NotOwnerError,
    Recovery,
    StateManager,
    Task,
    TaskFilter,
    TaskNotFoundError,
    TaskPriority,
    TaskRepository,
    TaskStatus,
    UnavailableError,
)
from openclaw_store.domain.lifecycle import LOST_TOO_OFTEN, NODE_LOST, OVERDUE
from openclaw_store.domain.models import ASSIGNED, FINISHED
from openclaw_store.state_manager import heartbeat_writer
from openclaw_store.state_manager import scheduler as scheduler


class RolledBackError(Exception):
    """What ends a transaction."""


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
        elif after in ASSIGNED:
            assert before in ASSIGNED
            assert change.node == owner[id]
        else:
            owner[id] = None
        status[id] = after
        assert all(count <= places[node] for node, count in Counter(owner.values()).items() if node)


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
        before = cluster.one.version

        claimed = await cluster.one.claim_tasks(node, limit=4)

        assert ids(claimed) == ["a", "b", "c", "d"]
        assert claimed == [await cluster.task(id) for id in "abcd"]
        for task in claimed:
            owner = (task.assigned_node, task.attempt)
            assert (task.status, *owner) == (TaskStatus.SCHEDULED, node, 1)
            times = (max(now, task.submitted_at or now), None, now)
            assert (task.scheduled_at, task.started_at, task.updated_at) == times
        assert (await cluster.node(node)).running_tasks == 4
        changes = await feed(cluster.one, before)
        assert [one[2:9] for one in changes] == [
            *[("task", id, "status", "pending", "scheduled", node, None) for id in "abcd"],
            ("node", node, "updated", "online", "online", None, None),
        ]
        claimed[0].parameters["mine"] = claimed[0].attempt = 7  # nobody else's copy
        assert ids(await cluster.one.claim_tasks(node, limit=4)) == ["e"]

    async def test_only_what_is_due_and_within_its_skills(self, cluster: Cluster) -> None:
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
        claim = cluster.one.claim_tasks

        assert ids(await claim(node, 9)) == ["all", "none", "now due"]
        cluster.clock.advance(8.999999)
        assert await claim(node, 9) == []
        cluster.clock.advance(1.000001)
        assert ids(await claim(node, 9)) == ["latest", "later"]

    @pytest.mark.parametrize("skills", ['["a", "ä"]', r'["a","\u00e4"]', "[]"])
    async def test_skills_may_be_spelled_otherwise_than_by_the_store(
        self, skills: str, cluster: Cluster, location: Location, open_manager: OpenManager
    ) -> None:
        node = await cluster.join(available_skills=["a", "ä"], max_concurrent_tasks=9)
        looked_at, unseen, kept = [(await cluster.add()).task_id for _ in range(3)]
        execute(location, f"UPDATE tasks SET required_skills = '{skills}'")
        ready = await cluster.add(required_skills=["a", "ä"])
        manager = await open_manager()

        await manager.get_task(looked_at)
        await manager.cancel_task(looked_at)
        await manager.remove_task(unseen)

        task = await manager.get_task(looked_at)
        assert task is not None
        assert task.status is TaskStatus.CANCELLED
        assert ids(await manager.claim_tasks(node, 9)) == [kept, ready.task_id]
        await cluster.one.remove_task(looked_at)
        await cluster.one.remove_task(kept)  # this one keeps to what it has written

    async def test_node_gets_no_more_than_it_has_places_for(self, cluster: Cluster) -> None:
        node = await cluster.join(max_concurrent_tasks=3)
        await cluster.one.add_tasks(cluster.make_task() for _ in range(9))
        claim = partial(cluster.one.claim_tasks, node)

        assert len(await claim()) == 1
        task, _ = await claim(limit=100)
        assert await claim(limit=100) == []
        await cluster.one.complete_task(task)
        assert len(await claim(limit=100)) == 1
        await cluster.one.change_node(node, lambda node: setattr(node, "max_concurrent_tasks", 1))
        assert await claim(limit=100) == []  # it has three, which it may finish
        await assert_counted(cluster.one)

    async def test_node_that_is_not_online_gets_nothing(self, cluster: Cluster) -> None:
        await cluster.add()
        for status in set(NodeStatus) - {NodeStatus.ONLINE}:
            node = await cluster.join(status=status)
            # The other one does not know of the task, nor of what becomes of the node.
            await cluster.one.update_node_status(node, NodeStatus.ONLINE)
            await cluster.two.refresh_from_database()
            await cluster.one.update_node_status(node, status)

            for manager in (cluster.one, cluster.two):
                assert await manager.claim_tasks(node) == []
                assert await manager.task_repo.claim(node) == []

    async def test_nonsense_is_refused_by_name(self, cluster: Cluster) -> None:
        node = await cluster.join()
        await cluster.add()
        before = await stored(cluster.one)

        for claim in (cluster.one.claim_tasks, cluster.one.task_repo.claim):
            with pytest.raises(NodeNotFoundError, match="'nobody'"):
                await claim("nobody")
            for limit in (0, -1, True, 1.0, "1", None, 1 << 63):
                with pytest.raises(InvalidDataError) as caught:
                    await claim(node, limit)  # type: ignore[arg-type]  # on purpose
                assert caught.value.field == "limit"
            with pytest.raises(InvalidDataError, match="node_id"):
                await claim(7)  # type: ignore[arg-type]  # on purpose

        assert await stored(cluster.one) == before
        assert len(await cluster.one.claim_tasks(node, (1 << 63) - 1)) == 1

    async def test_repository_claims_alike(self, cluster: Cluster) -> None:
        """Behind more than a page of tasks that the node cannot run."""
        node = await cluster.join(available_skills=["python"], max_concurrent_tasks=400)
        await cluster.one.add_tasks(
            cluster.make_task(required_skills=["gpu"], priority=0) for _ in range(300)
        )
        await cluster.one.add_tasks(
            cluster.make_task(task_id=f"good-{number:03}") for number in range(303)
        )
        later = cluster.clock() + timedelta(seconds=1)
        await cluster.add(not_before=later, priority=TaskPriority.HIGH)
        before = await stored(cluster.one)

        async def claim_and_roll_back() -> None:
            async with cluster.one.db.transaction() as tx:
                undone = await TaskRepository(tx).claim(node, 2)
                assert ids(undone) == ["good-000", "good-001"]
                raise RolledBackError

        with pytest.raises(RolledBackError):
            await claim_and_roll_back()
        assert await stored(cluster.one) == before
        async with cluster.one.db.transaction() as tx:
            first = await TaskRepository(tx).claim(node, 2)
            more = await TaskRepository(tx).claim(node, 2)
        rest = await cluster.two.task_repo.claim(node, 500)

        assert ids([*first, *more, *rest]) == [f"good-{number:03}" for number in range(303)]
        assert first == [await cluster.task(id) for id in ids(first)]
        await assert_counted(cluster.one)
        assert await cluster.one.claim_tasks(node, 500) == []

    async def test_moment_of_a_transaction_is_that_of_its_beginning(self, cluster: Cluster) -> None:
        node = await cluster.join(max_concurrent_tasks=50)
        later = cluster.clock() + timedelta(seconds=1)
        await cluster.one.add_tasks(cluster.make_task(not_before=later) for _ in range(50))

        async with cluster.one.db.transaction() as tx:
            cluster.clock.advance(seconds=1)
            assert await TaskRepository(tx).claim(node, 50) == []

    async def test_repository_tries_again_when_others_were_quicker(
        self, cluster: Cluster, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        node, busy = await cluster.join(), await cluster.join(max_concurrent_tasks=40)
        tasks = [await cluster.add() for _ in range(42)]
        write = cluster.two.db.write

        async def write_late(*arguments: Any) -> Any:
            monkeypatch.undo()
            assert len(await cluster.one.claim_tasks(busy, 40)) == 40
            return await write(*arguments)

        monkeypatch.setattr(cluster.two.db, "write", write_late)

        assert ids(await cluster.two.task_repo.claim(node)) == ids(tasks[40:41])

    async def test_outdated_picture_costs_nothing_but_time(self, cluster: Cluster) -> None:
        """Of nine tasks, the other coordinator has claimed, ended or changed all but two."""
        busy, node = await cluster.join(), await cluster.join(max_concurrent_tasks=9)
        tasks = [await cluster.add(task_id=f"{number}") for number in range(9)]
        await cluster.two.refresh_from_database()
        await cluster.one.claim_tasks(busy, 3)
        await cluster.one.cancel_task("3")
        await cluster.one.remove_task("4")
        for task, change in (
            (tasks[5], {"required_skills": ["gpu"]}),
            (tasks[6], {"not_before": cluster.clock() + timedelta(seconds=1)}),
            (tasks[8], {"priority": TaskPriority.HIGH}),
        ):
            await cluster.one.update_task(replace(task, **change))

        claimed = await cluster.two.claim_tasks(node, 9)

        assert ids(claimed) == ["8", "7"]
        assert await cluster.two.claim_tasks(node, 9) == []
        await assert_counted(cluster.one)

    async def test_outdated_picture_of_the_node_does_no_harm(self, cluster: Cluster) -> None:
        node, gone = await cluster.join(max_concurrent_tasks=2), await cluster.join()
        for _ in range(5):
            await cluster.add()
        await cluster.two.refresh_from_database()
        assert len(await cluster.one.claim_tasks(node, 2)) == 2
        await cluster.one.remove_node(gone)

        assert await cluster.two.claim_tasks(node, 2) == []
        with pytest.raises(NodeNotFoundError):
            await cluster.two.claim_tasks(gone)
        await assert_counted(cluster.one)

    async def test_sixteen_claimers_get_each_task_once(self, cluster: Cluster) -> None:
        """P4: whatever the number of coordinators, a task is handed to one node at a time."""
        nodes = [await cluster.join(max_concurrent_tasks=3) for _ in range(4)]
        await cluster.one.add_tasks(cluster.make_task() for _ in range(100))
        done: list[str] = []

        async def work(number: int) -> None:
            manager = (cluster.one, cluster.two)[number % 2]
            while len(done) < 100:
                node = nodes[number // 2 % 4]
                for task in await manager.claim_tasks(node, limit=1 + number % 3):
                    await manager.complete_task(await manager.start_task(task), number)
                    done.append(task.task_id)
                await manager.update_heartbeat(node, cpu_usage=number)
                await manager.refresh_from_database()

        async with asyncio.timeout(PATIENCE), asyncio.TaskGroup() as group:
            for number in range(16):
                group.create_task(work(number))

        assert sorted(done) == [f"task-{number:04}" for number in range(1, 101)]
        changes = await feed(cluster.one)
        assert_legal(changes, dict.fromkeys(nodes, 3))
        ended = [change.item_id for change in changes if change.to_status == "completed"]
        assert sorted(ended) == sorted(done)
        found = [await cluster.node(node) for node in nodes]
        assert [node.running_tasks for node in found] == [0] * 4
        assert sum(node.successful_tasks for node in found) == 100
        assert sum(node.total_tasks_processed for node in found) == 100

    async def test_claims_while_others_change_and_remove_tasks(self, cluster: Cluster) -> None:
        node = await cluster.join(max_concurrent_tasks=100)
        tasks = [await cluster.add(task_id=f"task-{number}") for number in range(40)]
        await cluster.two.refresh_from_database()

        def note(task: Task) -> None:
            task.metadata["note"] = "seen"

        async def disturb(number: int, id: str) -> object:
            manager = (cluster.one, cluster.two)[number % 2]
            match number % 5:
                case 0:
                    return await manager.cancel_task(id)
                case 1:
                    return await manager.change_task(id, note)
                case 2:
                    return await manager.requeue_task(id)
                case 3:
                    return await manager.remove_task(id)
            return None

        claims = [
            manager.claim_tasks(node, 7) for _ in range(4) for manager in (cluster.one, cluster.two)
        ]
        disturbed = [disturb(number, id) for number, id in enumerate(ids(tasks))]
        await asyncio.gather(*claims, *disturbed)
        while await cluster.two.claim_tasks(node, 7):
            pass

        rows, _, changes = await stored(cluster.one)
        assert_legal(changes, {node: 100})
        by_id = {task.task_id: task for task in rows}
        for number, id in enumerate(ids(tasks)):
            assert (id in by_id) is (number % 5 != 3)
            if id in by_id:
                is_cancelled = number % 5 == 0
                expected = TaskStatus.CANCELLED if is_cancelled else TaskStatus.SCHEDULED
                assert by_id[id].status is expected
                assert (by_id[id].metadata == {"note": "seen"}) is (number % 5 == 1)
        await assert_counted(cluster.one)

    async def test_what_is_only_in_memory_can_be_claimed(
        self, cluster: Cluster, caplog: pytest.LogCaptureFixture
    ) -> None:
        """It is written first; what loses to newer data is dropped, and the others are claimed."""
        await cluster.one.add_node(cluster.make_node(node_id="n"), persist=False)
        for id in "abc":
            await cluster.one.add_task(cluster.make_task(task_id=id), persist=False)
        await cluster.two.add_task(cluster.make_task(task_id="b", status=TaskStatus.COMPLETED))

        claimed = await cluster.one.claim_tasks("n", 3)

        assert ids(claimed) == ["a", "c"]
        assert claimed == [await cluster.task("a"), await cluster.task("c")]
        assert "an unsaved task was dropped" in caplog.text
        assert (await cluster.task("b")).status is TaskStatus.COMPLETED
        await assert_counted(cluster.one)

    async def test_what_is_only_in_memory_of_a_node_survives_what_becomes_of_its_tasks(
        self, cluster: Cluster
    ) -> None:
        manager, task = cluster.one, await cluster.claimed()
        node_id = task.assigned_node or ""

        async def note(tag: str) -> None:
            node = await manager.get_node(node_id)
            assert node is not None
            node.tags.append(tag)
            await manager.update_node(node, persist=False)

        await note("claimed")
        await manager.complete_task(task)
        await note("completed")
        removed = await cluster.claimed(node_id)
        await note("removed")
        await manager.remove_task(removed.task_id)
        cluster.clock.advance(seconds=1)
        assert await manager.check_stale_nodes(0) == [node_id]
        await note("silent")
        await manager.sync_to_database()

        node = await cluster.node(node_id)
        assert node.tags == ["claimed", "completed", "removed", "silent"]
        assert (node.running_tasks, node.status) == (0, NodeStatus.OFFLINE)

    async def test_node_that_has_lost_what_was_only_in_memory_goes_on(
        self, cluster: Cluster, caplog: pytest.LogCaptureFixture
    ) -> None:
        manager, task = cluster.one, await cluster.claimed()
        node = await cluster.node(task.assigned_node or "")
        for call in (
            partial(manager.claim_tasks, node.node_id),
            partial(manager.start_task, task),
            partial(manager.complete_task, task),
        ):
            await cluster.two.refresh_from_database()
            await cluster.two.change_node(node.node_id, lambda node: node.tags.append("newer"))
            known = await manager.get_node(node.node_id)
            assert known is not None
            await manager.update_node(replace(known, hostname="lost"), persist=False)
            caplog.clear()

            await call()

            assert "an unsaved node was dropped" in caplog.text
        assert (await cluster.node(node.node_id)).hostname == node.hostname
        assert (await cluster.task(task.task_id)).status is TaskStatus.COMPLETED

    async def test_tasks_come_back_when_a_claim_has_failed(
        self, cluster: Cluster, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        node = await cluster.join()
        tasks = [await cluster.add() for _ in range(3)]

        async def fail(*_: object) -> None:
            raise UnavailableError("the disk is full")

        with monkeypatch.context() as patch:
            patch.setattr(cluster.one.db, "write", fail)
            with pytest.raises(UnavailableError):
                await cluster.one.claim_tasks(node, 2)

        assert ids(await cluster.one.claim_tasks(node, 5)) == ids(tasks)

    async def test_cancelled_claim_is_withdrawn_or_committed(self, cluster: Cluster) -> None:
        """However far it has come: no task is lost, or set aside for ever."""
        node = await cluster.join(max_concurrent_tasks=50)
        tasks = [await cluster.add() for _ in range(50)]
        for turns in range(12):
            claiming = asyncio.create_task(cluster.one.claim_tasks(node, 2))
            for _ in range(turns):
                await asyncio.sleep(0)
            claiming.cancel()
            await asyncio.wait([claiming])

        held = await cluster.one.task_repo.list_by_node(node)
        rest = await cluster.one.claim_tasks(node, 50)

        assert sorted(ids([*held, *rest])) == ids(tasks)
        await assert_counted(cluster.one)

    async def test_claim_that_is_cancelled_while_it_is_committed_is_the_nodes(
        self, cluster: Cluster, location: Location
    ) -> None:
        """A node that is told nothing of it gives it back when it registers again."""
        node = await cluster.join()
        task = await cluster.add()
        async with locked(location):
            claiming = asyncio.create_task(cluster.one.claim_tasks(node))
            await asyncio.sleep(0)  # now it has queued
            while (await cluster.one.db.get_stats())["writer"]["queued_operations"]:
                pass
            claiming.cancel()
            await asyncio.wait([claiming], timeout=0.01)
            assert not claiming.done()
        await asyncio.wait([claiming])

        assert claiming.cancelled()
        assert (await cluster.task(task.task_id)).status is TaskStatus.SCHEDULED
        await assert_in_step(cluster.one, cluster.two)
        await cluster.one.register_node(await cluster.node(node))
        cluster.clock.advance(10)
        assert ids(await cluster.one.claim_tasks(node)) == ids([task])


def reports(manager: StateManager, task: Task) -> list[Callable[[], Awaitable[Task]]]:
    """All that the owner of a task may say of it, by the manager and by the repository."""
    repo = manager.task_repo
    return [
        partial(manager.start_task, task),
        partial(manager.complete_task, task, 1),
        partial(manager.fail_task, task, "no"),
        partial(repo.start, task),
        partial(repo.complete, task, 1),
        partial(repo.fail, task, "no"),
    ]


async def lose(cluster: Cluster, how: str) -> Task:
    """A task, as who thinks to be its owner knows it."""
    if how == "never had it":
        return await cluster.add()
    node = await cluster.join()
    task = await cluster.running(node, timeout=5, max_retries=0 if how == "timed out" else 3)
    match how:
        case "another node has it":
            return replace(task, assigned_node=await cluster.join())
        case "is no node":
            return replace(task, assigned_node=None)
        case "has another attempt":
            return replace(task, attempt=2)
        case "was silent":
            cluster.clock.advance(121)
            assert (await cluster.two.recover()).requeued_tasks == ids([task])
        case "timed out":
            cluster.clock.advance(6)
            assert (await cluster.two.recover()).timed_out_tasks == ids([task])
        case "has it again":
            await cluster.two.requeue_task(task.task_id)
            assert len(await cluster.two.claim_tasks(node)) == 1
        case "came back":
            await cluster.two.register_node(await cluster.node(node))
        case "has failed":
            await cluster.two.fail_task(task, "no")
        case "lost it by a cancellation":
            await cluster.two.cancel_task(task.task_id)
        case "lost it by a requeue":
            await cluster.two.requeue_task(task.task_id)
    return task


LOSSES = [
    *("never had it", "another node has it", "is no node", "has another attempt", "was silent"),
    *("timed out", "has it again", "came back", "has failed", "lost it by a cancellation"),
    "lost it by a requeue",
]
"""Ways not to be the owner of a task."""


class TestOwner:
    async def test_life_of_a_task(self, cluster: Cluster) -> None:
        """With the copy that the claim gave, though others write notes meanwhile."""
        node = await cluster.join()
        task = await cluster.claimed(node)
        before, as_claimed, claimed_at = await cluster.node(node), replace(task), cluster.clock()

        async def take_a_note() -> None:
            await cluster.two.refresh_from_database()
            await cluster.two.change_task(
                task.task_id, lambda task: task.metadata.update({str(len(task.metadata)): "note"})
            )

        await take_a_note()
        started_at = cluster.clock.advance(5)
        started = await cluster.one.start_task(task)
        assert started == await cluster.task(task.task_id)
        assert started.status is TaskStatus.RUNNING
        assert (started.scheduled_at, started.started_at) == (claimed_at, started_at)
        await take_a_note()
        completed_at = cluster.clock.advance(10)
        completed = await cluster.one.complete_task(task, {"rows": 42})

        assert completed == await cluster.task(task.task_id)
        assert completed == await cluster.one.get_task(task.task_id)
        assert (completed.status, completed.result) == (TaskStatus.COMPLETED, {"rows": 42})
        assert (completed.started_at, completed.completed_at) == (started_at, completed_at)
        assert completed.metadata == {"0": "note", "1": "note"}
        assert (completed.assigned_node, completed.attempt) == (node, 1)
        assert task == as_claimed
        assert await cluster.node(node) == replace(
            before,
            version=cluster.one.version,
            running_tasks=0,
            total_tasks_processed=1,
            successful_tasks=1,
            average_execution_time=10.0,
        )
        changes = await feed(cluster.one)
        assert [one[2:7] for one in changes[-2:]] == [
            ("task", task.task_id, "status", "running", "completed"),
            ("node", node, "updated", "online", "online"),
        ]

    async def test_result_is_any_json_value(self, cluster: Cluster) -> None:
        node = await cluster.join(max_concurrent_tasks=20)
        values: list[Any] = [None, 0, -0.0, False, True, "", "naïve", [], {}, 1e300, (1 << 63) - 1]
        values.append({"a": [None, {"b": [[]]}, 0.1]})
        tasks = [await cluster.claimed(node) for _ in values]
        for task, value in zip(tasks, values, strict=True):
            await cluster.one.complete_task(task, value)
        await cluster.two.refresh_from_database()

        for task, value in zip(tasks, values, strict=True):
            for found in (
                await cluster.one.get_task(task.task_id),
                await cluster.two.get_task(task.task_id),
                await cluster.task(task.task_id),
            ):
                assert found is not None
                assert repr(found.result) == repr(value)
                assert found.status is TaskStatus.COMPLETED

    async def test_what_cannot_be_stored_is_refused(self, cluster: Cluster) -> None:
        task = await cluster.running()
        before = await stored(cluster.one)
        owner: Any = cluster.one

        for value in (math.nan, {1}, object(), 1 << 64, "a\0b", {1: 2}, b"bytes", [math.inf]):
            with pytest.raises(InvalidDataError) as caught:
                await owner.complete_task(task, value)
            assert caught.value.field == "result"
        for error in (None, 7, "\ud800"):
            with pytest.raises(InvalidDataError) as caught:
                await owner.fail_task(task, error)
            assert caught.value.field == "error"
        for wrong, field in (
            ("task-0001", "task"),
            (replace(task, attempt=-1), "attempt"),
            (replace(task, attempt=None), "attempt"),  # type: ignore[arg-type]  # on purpose
            (replace(task, assigned_node=7), "assigned_node"),  # type: ignore[arg-type]  # on purpose
        ):
            for report in reports(owner, wrong):  # type: ignore[arg-type]  # on purpose
                with pytest.raises(InvalidDataError) as caught:
                    await report()
                assert caught.value.field == field

        assert await stored(cluster.one) == before
        await cluster.one.complete_task(task)

    @pytest.mark.parametrize("how", LOSSES)
    async def test_nobody_else_may_say_anything_of_a_task(
        self, cluster: Cluster, caplog: pytest.LogCaptureFixture, how: str
    ) -> None:
        """P4: a former owner's late write is refused; it changes nothing, and is logged."""
        late = await lose(cluster, how)
        before, task = await stored(cluster.one), await cluster.task(late.task_id)
        caplog.clear()

        for manager in (cluster.one, cluster.two):
            for report in reports(manager, late):
                with pytest.raises(NotOwnerError) as caught:
                    await report()
                error = caught.value
                assert error.task_id == task.task_id
                assert (error.node_id, error.attempt) == (late.assigned_node, late.attempt)
                now = (error.status, error.current_node, error.current_attempt)
                assert now == (task.status, task.assigned_node, task.attempt)
                assert caplog.messages == [f"refused: {error}"]
                caplog.clear()

        assert await stored(cluster.one) == before

    async def test_removed_task_is_not_found(self, cluster: Cluster) -> None:
        task = await cluster.running()
        await cluster.two.remove_task(task.task_id)
        before = await stored(cluster.one)

        for report in reports(cluster.one, task):
            with pytest.raises(TaskNotFoundError):
                await report()

        assert await stored(cluster.one) == before

    async def test_to_say_it_twice_changes_nothing(self, cluster: Cluster) -> None:
        completed, failed = await cluster.claimed(), await cluster.claimed(max_retries=0)
        for manager in (cluster.one, cluster.two):
            for task in (completed, failed):
                await manager.start_task(task)
        await cluster.one.complete_task(completed, 1)
        await cluster.one.fail_task(failed, "no")
        before = await stored(cluster.one)
        cluster.clock.advance(1)

        for manager in (cluster.one, cluster.two):
            for task, legal in ((completed, 1), (failed, 2)):
                for number, report in enumerate(reports(manager, task)):
                    if number % 3 == legal:
                        assert await report() == await cluster.task(task.task_id)
                    else:
                        with pytest.raises(NotOwnerError):
                            await report()

        assert await stored(cluster.one) == before

    async def test_memory_knows_what_a_report_is_answered_with(self, cluster: Cluster) -> None:
        """Also where it changes nothing, and others have. Found by the campaign `history`."""
        task = await cluster.claimed()
        await cluster.one.complete_task(task)
        await cluster.two.change_task(task.task_id, lambda task: setattr(task, "name", "newer"))

        answer = await cluster.one.complete_task(task)

        assert answer.name == "newer"
        assert await cluster.one.get_task(task.task_id) == answer

    async def test_failed_task_is_tried_again_later(self, cluster: Cluster) -> None:
        node = await cluster.join()
        task = await cluster.claimed(node, max_retries=2)
        for retry, seconds in ((1, 10), (2, 20)):
            await cluster.one.start_task(task)
            failed_at = cluster.clock.advance(4)
            failed = await cluster.one.fail_task(task, f"error {retry}")

            assert failed == await cluster.task(task.task_id)
            assert (failed.status, failed.assigned_node) == (TaskStatus.PENDING, None)
            assert (failed.retry_count, failed.attempt) == (retry, retry)
            assert failed.not_before == failed_at + timedelta(seconds=seconds)
            assert (failed.error, failed.completed_at) == (f"error {retry}", None)
            assert (failed.scheduled_at, failed.started_at) == (None, None)
            cluster.clock.advance(seconds - 0.000001)
            assert await cluster.one.claim_tasks(node) == []
            cluster.clock.advance(0.000001)
            [task] = await cluster.one.claim_tasks(node)
            assert task.attempt == retry + 1
        cluster.clock.advance(10)
        failed = await cluster.one.fail_task(task, "error 3")

        assert (failed.status, failed.completed_at) == (TaskStatus.FAILED, cluster.clock())
        assert (failed.retry_count, failed.attempt, failed.error) == (2, 3, "error 3")
        found = await cluster.node(node)
        assert (found.running_tasks, found.successful_tasks) == (0, 0)
        assert (found.total_tasks_processed, found.failed_tasks) == (3, 3)
        assert found.average_execution_time == pytest.approx((4 + 4 + 10) / 3)
        reasons = [one.reason for one in await feed(cluster.one) if one.reason]
        assert reasons == ["registered", "error 1", "error 2", "error 3"]

    async def test_failure_may_be_an_exception(self, cluster: Cluster) -> None:
        class OddError(Exception):
            def __str__(self) -> str:
                raise RuntimeError

        long = "x" * (1 << 20)
        failures: list[tuple[BaseException, str]] = [
            (ValueError("no paper"), "ValueError: no paper"),
            (KeyError("a"), "KeyError: 'a'"),
            (TimeoutError(), "TimeoutError"),
            (
                TaskNotFoundError("t"),
                "openclaw_store.errors.TaskNotFoundError: no task with id 't'",
            ),
            (OSError("a\0b \ud800"), "OSError: a\\0b ?"),
            (OSError(long), f"OSError: {long}"[: 1 << 20]),
        ]
        for error, text in failures:
            failed = await cluster.one.fail_task(await cluster.claimed(), error)
            assert failed.error == text
            assert (await cluster.task(failed.task_id)).error == text
        failed = await cluster.one.fail_task(await cluster.claimed(), OddError())
        assert failed.error is not None
        assert "OddError" in failed.error
        with pytest.raises(InvalidDataError, match="error: must be text"):
            await cluster.one.fail_task(await cluster.claimed(), 7)  # type: ignore[arg-type]  # on purpose

    async def test_failure_without_a_retry_ends_the_task(self, cluster: Cluster) -> None:
        ways = cluster.one.fail_task, cluster.two.task_repo.fail
        for fail in ways:
            task = await cluster.running()
            assert task.assigned_node is not None

            failed = await fail(task, "bad input", retry=False)

            assert (failed.status, failed.retry_count) == (TaskStatus.FAILED, 0)
            assert (failed.error, failed.completed_at) == ("bad input", cluster.clock())
            assert failed == await cluster.task(task.task_id)
            found = await cluster.node(task.assigned_node)
            assert (found.running_tasks, found.failed_tasks) == (0, 1)
            assert await fail(task, "bad input", retry=False) == failed

    async def test_report_on_a_task_without_a_claim_says_what_to_do(self, cluster: Cluster) -> None:
        task = await cluster.add()
        node = await cluster.join()
        for number in range(2):
            for report in reports(cluster.one, task):
                with pytest.raises(NotOwnerError, match="claim it first"):
                    await report()
            if not number:
                [claimed] = await cluster.one.claim_tasks(node)
        assert (await cluster.one.start_task(claimed)).status is TaskStatus.RUNNING

    async def test_wait_before_a_retry_is_an_option(self, cluster: Cluster) -> None:
        task = await cluster.claimed()
        patient = TaskRepository(cluster.one.db, Backoff(first_seconds=600, jitter=0))
        hasty = TaskRepository(cluster.one.db, Backoff(first_seconds=0))

        failed = await patient.fail(task, "no")
        assert failed.not_before == cluster.clock.advance(300)  # the longest
        [task] = await cluster.one.claim_tasks(task.assigned_node or "")
        assert (await hasty.fail(task, "no")).not_before is None

    async def test_of_contrary_reports_at_once_one_counts(self, cluster: Cluster) -> None:
        node = await cluster.join(max_concurrent_tasks=30)
        tasks = [await cluster.running(node, max_retries=0) for _ in range(30)]
        await cluster.two.refresh_from_database()

        def all_at_once(number: int, task: Task) -> list[Awaitable[object]]:
            both = (cluster.one, cluster.two)
            one, two = both[number % 2], both[number // 2 % 2]
            calls: list[Awaitable[object]] = [
                one.complete_task(task, "one"),
                two.fail_task(task, "two"),
                two.cancel_task(task.task_id),
            ]
            return calls[number % 3 :] + calls[: number % 3]

        calls = [call for number, task in enumerate(tasks) for call in all_at_once(number, task)]
        outcomes = await asyncio.gather(*calls, return_exceptions=True)

        refusals = [one for one in outcomes if isinstance(one, ConflictError)]
        assert len(refusals) == 60
        assert len([one for one in outcomes if isinstance(one, Task) or one is True]) == 30
        rows, _, changes = await stored(cluster.one)
        status = Counter(task.status for task in rows)
        assert set(status) == {TaskStatus.COMPLETED, TaskStatus.FAILED, TaskStatus.CANCELLED}
        assert len([one for one in changes if one.to_status in FINISHED]) == 30
        found = await cluster.node(node)
        assert (found.running_tasks, found.successful_tasks, found.failed_tasks) == (
            0,
            status[TaskStatus.COMPLETED],
            status[TaskStatus.FAILED],
        )

    async def test_what_is_only_in_memory_is_written_first(self, cluster: Cluster) -> None:
        node = await cluster.join()
        added = cluster.make_task(task_id="added")
        await cluster.one.add_task(added, persist=False)
        noted = replace(await cluster.claimed(node), metadata={"a": "note"})
        await cluster.one.update_task(noted, persist=False)

        assert await cluster.one.cancel_task("added") is True
        completed = await cluster.one.complete_task(noted)

        assert (await cluster.task("added")).status is TaskStatus.CANCELLED
        assert completed.metadata == (await cluster.task(noted.task_id)).metadata == {"a": "note"}

    async def test_note_that_was_only_in_memory_and_lost_is_in_nobodys_way(
        self, cluster: Cluster, caplog: pytest.LogCaptureFixture
    ) -> None:
        task = await cluster.claimed()
        await cluster.one.update_task(replace(task, metadata={"a": "note"}), persist=False)
        await cluster.two.refresh_from_database()
        await cluster.two.change_task(task.task_id, lambda task: setattr(task, "name", "newer"))

        completed = await cluster.one.complete_task(task)

        assert (completed.status, completed.name) == (TaskStatus.COMPLETED, "newer")
        assert completed.metadata == {}
        assert "an unsaved task was dropped" in caplog.text

    async def test_node_that_was_removed_does_not_matter(self, cluster: Cluster) -> None:
        node = await cluster.join()
        tasks = [await cluster.claimed(node, max_retries=0) for _ in range(3)]
        await cluster.two.remove_node(node)

        await cluster.one.start_task(tasks[0])
        await cluster.one.complete_task(tasks[1])
        await cluster.one.fail_task(tasks[2], "no")

        states = [(await cluster.task(task.task_id)).status for task in tasks]
        assert states == [TaskStatus.RUNNING, TaskStatus.COMPLETED, TaskStatus.FAILED]
        assert await cluster.one.node_repo.get(node) is None

    async def test_in_a_transaction_all_of_it_happens_or_nothing(self, cluster: Cluster) -> None:
        node = await cluster.join(max_concurrent_tasks=9)
        tasks = [await cluster.claimed(node) for _ in range(5)]
        before = await stored(cluster.one)

        async def advance(error: type[Exception] | None) -> None:
            async with cluster.one.db.transaction() as tx:
                repo = TaskRepository(tx, BACKOFF)
                started = await repo.start(tasks[0])
                assert started == await repo.get(started.task_id)
                await repo.complete(tasks[1], {"a": 1})
                await repo.fail(tasks[2], "no")
                assert await repo.cancel(tasks[3].task_id, "not needed") is True
                assert await repo.requeue(tasks[4].task_id) is True
                assert await repo.cancel("unknown") is await repo.requeue("unknown") is False
                with pytest.raises(NotOwnerError):
                    await repo.start(tasks[2])
                if error is not None:
                    raise error

        with pytest.raises(RolledBackError):
            await advance(RolledBackError)
        assert await stored(cluster.one) == before
        await assert_in_step(cluster.one, cluster.two)
        await advance(None)

        states = [(await cluster.task(task.task_id)).status for task in tasks]
        assert states == ["running", "completed", "pending", "cancelled", "pending"]
        found = await cluster.node(node)
        assert (found.running_tasks, found.successful_tasks, found.failed_tasks) == (1, 1, 1)
        changes = await feed(cluster.one, len(before[2]))
        assert len([one for one in changes if one.item == "task"]) == 5


class TestCancel:
    async def test_task_is_ended_whoever_has_it(self, cluster: Cluster) -> None:
        node = await cluster.join()
        pending = await cluster.add(error="the error of an earlier try")
        scheduled, running = await cluster.claimed(node), await cluster.running(node)
        now = cluster.clock.advance(3)

        for task in (pending, scheduled):
            assert await cluster.one.cancel_task(task.task_id) is True
        assert await cluster.two.cancel_task(running.task_id, "no money") is True

        for task, error in (
            (pending, "the error of an earlier try"),
            (scheduled, None),
            (running, "no money"),
        ):
            found = await cluster.task(task.task_id)
            assert (found.status, found.error) == (TaskStatus.CANCELLED, error)
            assert found.completed_at == now
            assert (found.assigned_node, found.attempt) == (task.assigned_node, task.attempt)
        found_node = await cluster.node(node)
        assert (found_node.running_tasks, found_node.total_tasks_processed) == (0, 0)
        reasons = {one.item_id: one.reason for one in await feed(cluster.one)}
        assert [reasons[task.task_id] for task in (pending, running)] == [None, "no money"]
        before = await stored(cluster.one)
        for manager in (cluster.one, cluster.two):
            assert await manager.cancel_task(running.task_id, "another reason") is True
        assert await stored(cluster.one) == before

    async def test_what_is_finished_stays_as_it_is(self, cluster: Cluster) -> None:
        others = [await cluster.add(status=status) for status in FINISHED - {TaskStatus.CANCELLED}]
        before = await stored(cluster.one)

        for cancel in (cluster.one.cancel_task, cluster.two.task_repo.cancel):
            for task in others:
                with pytest.raises(InvalidTransitionError) as caught:
                    await cancel(task.task_id)
                assert (caught.value.before, caught.value.after) == (task.status, "cancelled")
            assert await cancel("unknown") is False
            for reason in (7, "\0"):
                with pytest.raises(InvalidDataError, match="reason"):
                    await cancel(others[0].task_id, reason)  # type: ignore[arg-type]  # on purpose

        assert await stored(cluster.one) == before

    async def test_task_that_is_removed_gives_its_place_back(self, cluster: Cluster) -> None:
        node = await cluster.join()
        pending = await cluster.add(priority=TaskPriority.LOW)
        scheduled, running = await cluster.claimed(node), await cluster.running(node)
        completed = await cluster.one.complete_task(await cluster.claimed(node))
        assert (await cluster.node(node)).running_tasks == 2

        for task, left in ((running, 1), (completed, 1), (pending, 1), (scheduled, 0)):
            assert await cluster.two.remove_task(task.task_id) is True
            await assert_counted(cluster.one)
            assert (await cluster.node(node)).running_tasks == left

        lost = await cluster.claimed(node)
        await cluster.one.remove_node(node)
        assert await cluster.one.task_repo.delete(lost.task_id) is True


class TestRequeue:
    async def test_task_is_as_if_it_never_had_been_run(self, cluster: Cluster) -> None:
        """But its attempts go on, so nobody who held it before passes for its owner."""
        for status in TaskStatus:
            node, now = await cluster.join(), cluster.clock()
            task = await cluster.claimed(node)
            await cluster.one.fail_task(task, "no")
            cluster.clock.advance(10)
            if status is not TaskStatus.PENDING:
                [task] = await cluster.one.claim_tasks(node)
                task = await cluster.one.start_task(task)
                await cluster.one.update_task(replace(task, status=status, result=[1]))
                if status in FINISHED:  # the raw write has left the node alone
                    await cluster.one.change_node(
                        node, lambda node: setattr(node, "running_tasks", 0)
                    )
            before, last = await cluster.task(task.task_id), cluster.one.version

            assert await cluster.two.requeue_task(task.task_id) is True
            found = await cluster.task(task.task_id)
            assert await cluster.two.requeue_task(task.task_id) is True

            changes = await feed(cluster.one, last)
            if status is TaskStatus.PENDING:
                assert (found, changes) == (before, [])
            else:
                assert found == replace(
                    cluster.make_task(task_id=task.task_id, name=task.name, submitted_at=now),
                    priority=task.priority,
                    attempt=2,
                    updated_at=cluster.clock(),
                    version=found.version,
                )
                assert changes[0].reason == "requeued"
            await assert_counted(cluster.one)
            await cluster.two.cancel_task(task.task_id)
        assert await cluster.one.requeue_task("unknown") is False

    async def test_key_that_is_taken_by_now_is_a_duplicate(self, cluster: Cluster) -> None:
        """Also if it was taken, or became free, in the same batch of writes."""
        fields: dict[str, Any] = {"idempotency_key": "key", "status": TaskStatus.FAILED}
        for id in "abc":
            await cluster.add(task_id=id, **fields)
        new = cluster.make_task(idempotency_key="key")
        one, two = cluster.one, cluster.two

        async def outcomes(*calls: Awaitable[object]) -> list[object]:
            found = await asyncio.gather(*calls, return_exceptions=True)
            return [it.id if isinstance(it, DuplicateError) else it for it in found]

        requeues = [one.requeue_task(id) for id in "abc"]
        assert await outcomes(*requeues, one.add_task(new)) == [True, "a", "a", "a"]
        before = await stored(one)
        assert await outcomes(two.requeue_task("b"), one.task_repo.requeue("c")) == ["a", "a"]
        assert await stored(one) == before
        calls = one.cancel_task("a"), one.requeue_task("c"), one.add_task(new)
        assert await outcomes(*calls, one.requeue_task("a")) == [True, True, "c", "c"]
        assert await outcomes(one.cancel_task("c"), one.requeue_task("b")) == [True, True]
        calls = one.remove_task("b"), one.add_task(new), one.requeue_task("c")
        assert await outcomes(*calls) == [True, True, new.task_id]


class TestRawWrites:
    async def test_they_leave_the_other_table_alone(self, cluster: Cluster) -> None:
        node = await cluster.join()
        task = await cluster.add()
        task.assigned_node, task.status, task.attempt = node, TaskStatus.RUNNING, 7
        before = await cluster.node(node)
        await cluster.one.update_task(task)
        assert await cluster.node(node) == before

        given = replace(before, running_tasks=9, failed_tasks=8, average_execution_time=7.5)
        await cluster.one.update_node(given)
        assert await cluster.node(node) == given
        await cluster.one.remove_node(node)
        await cluster.one.add_node(given)
        # Only the number of tasks that it holds is not as given.
        assert await cluster.node(node) == replace(given, running_tasks=1)
        assert await cluster.task(task.task_id) == task

    async def test_only_live_tasks_change_their_state(self, cluster: Cluster) -> None:
        moments = {
            TaskStatus.SCHEDULED: "scheduled_at",
            TaskStatus.RUNNING: "started_at",
            **dict.fromkeys(FINISHED, "completed_at"),
        }

        async def change(task: Task) -> object:
            fields = {"status": task.status, "description": task.description}
            return await cluster.one.change_task(task.task_id, lambda it: vars(it).update(fields))

        for write in (
            cluster.one.update_task,
            cluster.one.task_repo.update,
            partial(cluster.one.update_task, persist=False),
            change,
        ):
            for before, after in product(TaskStatus, TaskStatus):
                task = await cluster.add(status=before)
                known = await cluster.task(task.task_id)
                task.status, task.description = after, "changed"
                cluster.clock.advance(1)
                if before in FINISHED and before is not after:
                    with pytest.raises(InvalidTransitionError) as caught:
                        await write(task)
                    assert (caught.value.before, caught.value.after) == (before, after)
                    assert await cluster.one.get_task(task.task_id) == known
                    continue
                await write(task)
                found = await cluster.one.get_task(task.task_id)
                assert found is not None
                assert (found.status, found.description) == (after, "changed")
                filled = {moments[after]} if after is not before and after in moments else set()
                assert {
                    name for name in set(moments.values()) if getattr(found, name) is not None
                } == filled
                assert all(getattr(found, name) == cluster.clock() for name in filled)

    async def test_moment_that_is_given_is_kept(self, cluster: Cluster) -> None:
        task = await cluster.add()
        long_ago = cluster.clock() - timedelta(days=1)
        task.status, task.started_at = TaskStatus.RUNNING, long_ago
        await cluster.one.update_task(task)

        assert task.started_at == long_ago
        assert await cluster.task(task.task_id) == task


class TestRegister:
    async def test_node_joins_without_tasks_and_alive(self, cluster: Cluster) -> None:
        node = cluster.make_node(
            running_tasks=3, registered_at=None, total_tasks_processed=7, version=99
        )
        given, now = replace(node), cluster.clock()

        assert await cluster.one.register_node(node) is True

        joined = {"running_tasks": 0, "registered_at": now, "last_heartbeat": now, "version": 1}
        assert node == replace(given, **joined)  # type: ignore[arg-type]  # they are fields
        assert node == await cluster.node(node.node_id)
        [change] = await feed(cluster.one)
        assert (change.kind, change.reason) == ("created", "registered")
        nonsense: list[Any] = [replace(node, cpu_usage=101), replace(node, port=-1), "node"]
        for bad in nonsense:
            with pytest.raises(InvalidDataError):
                await cluster.one.register_node(bad)

    @pytest.mark.parametrize("way", ["manager", "other manager", "transaction"])
    async def test_what_the_former_process_held_is_given_back_at_once(
        self, cluster: Cluster, way: str
    ) -> None:
        """However fresh its heartbeats are; its totals go on, and other nodes keep their tasks."""
        node, neighbour = await cluster.join(), await cluster.join()
        await cluster.one.complete_task(await cluster.claimed(node))
        scheduled, running = await cluster.claimed(node), await cluster.running(node)
        last_try = await cluster.running(node, max_losses=0)
        kept = await cluster.running(neighbour)
        registered_at, now = cluster.clock(), cluster.clock.advance(4)
        await cluster.one.update_heartbeat(node)
        returning = NodeInfo(node, "another host", max_concurrent_tasks=2)

        async def register(error: type[Exception] | None = None) -> None:
            async with cluster.one.db.transaction() as tx:
                await NodeRepository(tx).register(returning, BACKOFF)
                if error is not None:
                    raise error

        if way == "transaction":
            await cluster.one.sync_to_database()
            before, given = await stored(cluster.one), replace(returning)
            with pytest.raises(RolledBackError):
                await register(RolledBackError)
            assert await stored(cluster.one) == before
            assert returning == given
            await register()
        else:
            manager = cluster.one if way == "manager" else cluster.two
            await manager.register_node(returning)

        assert returning == await cluster.node(node)
        assert (returning.hostname, returning.running_tasks) == ("another host", 0)
        assert (returning.registered_at, returning.last_heartbeat) == (registered_at, now)
        assert (returning.total_tasks_processed, returning.successful_tasks) == (3, 1)
        assert (returning.failed_tasks, round(returning.average_execution_time, 6)) == (2, 2.666667)
        for task, losses, error in ((scheduled, 0, None), (running, 1, NODE_LOST)):
            found = await cluster.task(task.task_id)
            assert (found.status, found.assigned_node) == (TaskStatus.PENDING, None)
            assert (found.retry_count, found.losses, found.error) == (0, losses, error)
            assert found.not_before is None
        found = await cluster.task(last_try.task_id)
        assert (found.status, found.error) == (TaskStatus.FAILED, LOST_TOO_OFTEN)
        assert found.completed_at == now
        reasons = (NODE_LOST, LOST_TOO_OFTEN)
        lost = [one.item_id for one in await feed(cluster.one) if one.reason in reasons]
        assert lost == ids([scheduled, running, last_try])  # on both databases
        assert await cluster.task(kept.task_id) == kept
        await assert_counted(cluster.one)

    async def test_what_was_only_in_memory_is_of_the_former_process(
        self, cluster: Cluster, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """It is forgotten when the node is registered, and not if that fails."""
        node = cluster.make_node(node_id="n", tags=["old"])
        await cluster.one.add_node(node, persist=False)

        async def fail(*_: object) -> None:
            raise UnavailableError("the disk is full")

        with monkeypatch.context() as patch:
            patch.setattr(cluster.one.db, "write", fail)
            with pytest.raises(UnavailableError):
                await cluster.one.register_node(replace(node, tags=["new"]))
        assert await cluster.one.get_node("n") == node

        await cluster.one.register_node(replace(node, tags=["new"]))
        await cluster.one.sync_to_database()
        assert (await cluster.node("n")).tags == ["new"]


class TestRecover:
    async def test_tasks_of_lost_nodes_are_given_back(self, cluster: Cluster) -> None:
        """Whatever became of the node; all that was done is named, and is done once."""
        names = ["silent", "busy", "resting", "offline", "error", "removed", "alive", "at work"]
        names += ["in maintenance"]
        nodes = {name: await cluster.join(node_id=name) for name in names}
        for name, node in nodes.items():
            await cluster.claimed(node, task_id=f"{name} scheduled")
            await cluster.running(node, task_id=f"{name} running")
            await cluster.running(node, task_id=f"{name} last try", max_losses=0)
        cluster.clock.advance(120)
        assert not await cluster.two.recover(timeout_seconds=120)  # not too long yet
        await cluster.add(task_id="unknown", status=TaskStatus.RUNNING, assigned_node="nobody")
        await cluster.add(task_id="nobody's", status=TaskStatus.RUNNING)
        statuses = {
            "busy": NodeStatus.BUSY,
            "resting": NodeStatus.MAINTENANCE,
            "at work": NodeStatus.BUSY,
            "in maintenance": NodeStatus.MAINTENANCE,
            "error": NodeStatus.ERROR,
        }
        for name, status in statuses.items():
            await cluster.one.update_node_status(name, status)
        now = cluster.clock.advance(121)
        for name in ("offline", "error", "alive", "at work", "in maintenance"):
            assert await cluster.one.update_heartbeat(name)
        await cluster.one.sync_to_database()
        await cluster.one.update_node_status("offline", NodeStatus.OFFLINE)
        await cluster.one.remove_node("removed")
        before = await stored(cluster.one)

        recovery = await cluster.two.recover(timeout_seconds=120)

        lost = {"silent", "busy", "resting", "offline", "error", "removed"}
        assert sorted(recovery.offline_nodes) == ["busy", "silent"]
        assert set(recovery.requeued_tasks) == {
            "unknown",
            *(f"{name} scheduled" for name in lost),
            *(f"{name} running" for name in lost),
        }
        assert sorted(recovery.failed_tasks) == sorted(f"{name} last try" for name in lost)
        assert recovery.timed_out_tasks == []
        for task in before[0]:
            found = await cluster.task(task.task_id)
            if task.task_id in recovery.requeued_tasks:
                assert (found.status, found.assigned_node) == (TaskStatus.PENDING, None)
                is_scheduled = task.status is TaskStatus.SCHEDULED
                losses, error = (0, None) if is_scheduled else (1, NODE_LOST)
                assert (found.retry_count, found.losses, found.error) == (0, losses, error)
                assert found.not_before is None
            elif task.task_id in recovery.failed_tasks:
                assert (found.status, found.error) == (TaskStatus.FAILED, LOST_TOO_OFTEN)
                assert (found.retry_count, found.completed_at) == (0, now)
            else:
                assert found == task
        for name in lost - {"removed"}:
            found_node = await cluster.node(name)
            assert (found_node.running_tasks, found_node.failed_tasks) == (0, 2)
            assert found_node.average_execution_time == 241
        changes = await feed(cluster.one, len(before[2]))
        reasons = Counter(change.reason for change in changes)
        assert (reasons[NODE_LOST], reasons[LOST_TOO_OFTEN]) == (13, 6)
        assert reasons["silent for more than 120 s"] == 2

        before = await stored(cluster.one)
        for manager in (cluster.two, cluster.one):
            again = await manager.recover(timeout_seconds=120)
            assert not again
            assert again == Recovery([], [], [], [])
        assert await stored(cluster.one) == before
        assert recovery

    async def test_what_runs_for_too_long_is_taken_back(self, cluster: Cluster) -> None:
        node = await cluster.join()
        again = await cluster.running(node, timeout=10)
        over = await cluster.running(node, timeout=10, max_retries=0)
        others = [
            await cluster.running(node, timeout=11),
            await cluster.running(node),
            await cluster.claimed(node, timeout=1),
            await cluster.add(timeout=1),
        ]
        fields = {"status": TaskStatus.RUNNING, "started_at": cluster.clock()}
        stray = await cluster.add(timeout=10, **fields)  # on no node
        cluster.clock.advance(10)
        assert not await cluster.two.recover()
        now = cluster.clock.advance(0.000001)

        recovery = await cluster.two.recover()

        assert recovery.timed_out_tasks == ids([over])
        assert sorted(recovery.requeued_tasks) == sorted(ids([again, stray]))
        assert recovery == replace(recovery, offline_nodes=[], failed_tasks=[])
        found = await cluster.task(over.task_id)
        assert (found.status, found.error) == (TaskStatus.TIMEOUT, OVERDUE)
        assert (found.completed_at, found.assigned_node) == (now, node)
        for task in (again, stray):
            found = await cluster.task(task.task_id)
            assert (found.status, found.retry_count) == (TaskStatus.PENDING, 1)
            assert (found.error, found.started_at) == (OVERDUE, None)
        assert [await cluster.task(task.task_id) for task in others] == others
        found_node = await cluster.node(node)
        assert (found_node.total_tasks_processed, found_node.failed_tasks) == (2, 2)
        await assert_counted(cluster.one)

    async def test_ten_at_once_give_each_task_one_outcome(
        self, cluster: Cluster, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(scheduler, "PART_SIZE", 3)
        nodes = [await cluster.join() for _ in range(4)]
        for node in nodes:
            for losses in (0, 0, 1, 1):
                await cluster.running(node, max_losses=losses)
        cluster.clock.advance(121)

        recoveries = await asyncio.gather(
            *[(cluster.one, cluster.two)[number % 2].recover() for number in range(10)]
        )

        def named(what: str) -> Counter[str]:
            return Counter(id for recovery in recoveries for id in getattr(recovery, what))

        rows, found, changes = await stored(cluster.one)
        pending = [task.task_id for task in rows if task.status is TaskStatus.PENDING]
        failed = [task.task_id for task in rows if task.status is TaskStatus.FAILED]
        assert (len(pending), len(failed)) == (8, 8)
        assert named("requeued_tasks") == Counter(pending)
        assert named("failed_tasks") == Counter(failed)
        assert named("offline_nodes") == Counter(node for node in nodes)
        assert [node.failed_tasks for node in found] == [4] * 4
        assert [node.total_tasks_processed for node in found] == [4] * 4
        assert [node.running_tasks for node in found] == [0] * 4
        reasons = Counter(change.reason for change in changes)
        assert (reasons[NODE_LOST], reasons[LOST_TOO_OFTEN]) == (8, 8)

    async def test_heartbeat_that_lands_meanwhile_keeps_the_tasks(
        self, cluster: Cluster, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        node = await cluster.join()
        task = await cluster.running(node)
        cluster.clock.advance(121)
        find = cluster.two.node_repo.find_stale_nodes

        async def find_and_hear_of_one(timeout_seconds: float) -> list[NodeInfo]:
            found = await find(timeout_seconds)
            await cluster.one.update_heartbeat(node)
            await cluster.one.sync_to_database()
            return found

        monkeypatch.setattr(cluster.two.node_repo, "find_stale_nodes", find_and_hear_of_one)

        assert not await cluster.two.recover()
        assert await cluster.task(task.task_id) == task

    async def test_stale_node_loses_no_task_by_itself(self, cluster: Cluster) -> None:
        task = await cluster.running()
        cluster.clock.advance(121)

        assert await cluster.two.check_stale_nodes(120) == [task.assigned_node]
        assert await cluster.task(task.task_id) == task
        await cluster.one.refresh_from_database()
        assert await cluster.one.claim_tasks(task.assigned_node or "") == []
        await cluster.one.update_heartbeat(task.assigned_node or "")
        assert not await cluster.one.recover()  # it came back in time
        await cluster.one.complete_task(task)
        for seconds in (-1, math.nan, "120", None, True):
            for call in (cluster.one.recover, cluster.one.check_stale_nodes):
                with pytest.raises(InvalidDataError, match="timeout_seconds"):
                    await call(seconds)  # type: ignore[arg-type]  # on purpose

    async def test_expired_task_of_a_lost_node_has_one_outcome(self, cluster: Cluster) -> None:
        """Found by the state machine: it was given back and timed out by the same call."""
        node = await cluster.join()
        task = await cluster.claimed(node, expires_at=cluster.clock() + timedelta(seconds=60))
        cluster.clock.advance(121)

        first, second = await cluster.two.recover(), await cluster.two.recover()

        assert (first.requeued_tasks, first.timed_out_tasks) == (ids([task]), [])
        assert (second.requeued_tasks, second.timed_out_tasks) == ([], ids([task]))


class TestEveryVerb:
    async def test_leaves_memory_database_and_feed_in_step(
        self, cluster: Cluster, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """P2 and P5: each is one transaction, whose changes have consecutive revisions."""
        one, two = cluster.one, cluster.two
        node = cluster.make_node(node_id="n", max_concurrent_tasks=3)
        tasks = [cluster.make_task(task_id=f"t{number}") for number in range(6)]
        t0, t1, t2, t3, t4, t5 = tasks

        steps: list[tuple[Callable[[], Awaitable[object]], str]] = [
            (lambda: one.register_node(node), "n"),
            (lambda: one.add_task(t0), "t0"),
            (lambda: two.submit_task(replace(t1, idempotency_key="key")), "t1"),
            (lambda: one.submit_task(replace(t2, idempotency_key="key")), ""),
            (lambda: two.add_tasks([t2, t3, t2]), "t2 t3"),
            (lambda: one.claim_tasks("n", 2), "t0 t1 n"),
            (lambda: two.claim_tasks("n", 2), "t2 n"),
            (lambda: one.claim_tasks("n", 2), ""),
            (lambda: one.start_task(replace(t0, assigned_node="n", attempt=1)), "t0"),
            (lambda: two.start_task(replace(t0, assigned_node="n", attempt=1)), ""),
            (lambda: two.complete_task(replace(t0, assigned_node="n", attempt=1)), "t0 n"),
            (lambda: one.fail_task(replace(t1, assigned_node="n", attempt=1), "no"), "t1 n"),
            (lambda: two.cancel_task("t2", "no"), "t2 n"),
            (lambda: one.requeue_task("t2"), "t2"),
            (lambda: two.claim_tasks("n", 2), "t2 t3 n"),
            (lambda: one.requeue_task("t3"), "t3 n"),
            (lambda: two.register_node(replace(node)), "t2 n"),
            (lambda: one.add_tasks([t4, t5]), "t4 t5"),
            (lambda: two.claim_tasks("n", 9), "t2 t3 t4 n"),
            (lambda: asyncio.sleep(0, cluster.clock.advance(121)), ""),
            (lambda: one.recover(), "n t4 t3 t2 n"),
            (lambda: two.recover(), ""),
            (lambda: two.cancel_tasks(TaskFilter(name_contains="number 5")), "t4"),
        ]
        for number, (step, expected) in enumerate(steps):
            for manager in (one, two) if number % 2 else ():  # else their pictures are outdated
                await manager.refresh_from_database()
            before = await feed(one)
            await step()
            changes = (await feed(one))[len(before) :]
            items = [change.item_id for change in changes]
            assert sorted(items) == sorted(expected.split())
            assert items[-1:] == expected.split()[-1:]  # the node comes last
            if number % 2:
                await assert_in_step(one, two)
            await assert_counted(one)


class TestClockTurnedBack:
    """What the campaign of the clock is about, each for itself."""

    async def test_node_that_beats_is_alive_and_its_beats_are_stored(
        self, cluster: Cluster, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(
            heartbeat_writer, "HEARTBEAT_SECONDS", 3600
        )  # only synchronisation writes them
        node = await cluster.join()
        await cluster.one.update_heartbeat(node, cpu_usage=1)
        await cluster.one.sync_to_database()
        cluster.clock.advance(days=-3)

        await cluster.one.update_heartbeat(node, cpu_usage=2)

        assert await cluster.two.check_stale_nodes() == ["node-0001"]  # it cannot know yet
        await cluster.one.update_heartbeat(node, cpu_usage=3)
        await cluster.one.sync_to_database()
        assert not await cluster.two.check_stale_nodes()
        found = await cluster.node(node)
        beaten = (found.status, found.last_heartbeat, found.cpu_usage)
        assert beaten == (NodeStatus.ONLINE, cluster.clock(), 3)

    @pytest.mark.parametrize("way", ["heartbeat", "update", "unsaved update", "status"])
    async def test_node_that_was_marked_lost_before_comes_back(
        self, cluster: Cluster, way: str
    ) -> None:
        node = await cluster.join()
        cluster.clock.advance(hours=1)
        assert await cluster.one.check_stale_nodes() == [node]
        cluster.clock.advance(hours=-2)

        if way == "heartbeat":
            await cluster.one.update_heartbeat(node)
        elif way == "status":
            await cluster.one.update_node_status(node, NodeStatus.ONLINE)
        else:
            copy = await cluster.node(node)
            copy.status, copy.last_heartbeat = NodeStatus.ONLINE, cluster.clock()
            await cluster.one.update_node(copy, persist=way == "update")
        await cluster.one.sync_to_database()

        found = await cluster.node(node)
        assert (found.status, found.last_heartbeat) == (NodeStatus.ONLINE, cluster.clock())
        assert not await cluster.two.check_stale_nodes()

    async def test_heartbeat_that_one_process_has_set_right_stays_so(
        self, cluster: Cluster
    ) -> None:
        node = await cluster.join()
        cluster.clock.advance(hours=-1)
        await cluster.one.update_heartbeat(node)
        await cluster.one.sync_to_database()

        changed = await cluster.two.change_node(node, lambda copy: setattr(copy, "port", 1))

        assert changed is not None
        assert changed.last_heartbeat == cluster.clock()

    @pytest.mark.parametrize("hours", [-1, 1])
    async def test_node_that_has_died_is_noticed(self, cluster: Cluster, hours: int) -> None:
        task = await cluster.claimed()
        cluster.clock.advance(hours=hours)

        recovery = await cluster.two.recover(timeout_seconds=120)

        lost = Recovery([task.assigned_node or ""], [task.task_id], [], [])
        assert recovery == lost

    async def test_times_of_a_task_stay_in_order(self, cluster: Cluster) -> None:
        node = await cluster.join()
        task = await cluster.add()
        for verb in ("claim", "start", "complete"):
            cluster.clock.advance(hours=-1)
            await cluster.one.update_heartbeat(node)
            if verb == "claim":
                [task] = await cluster.one.claim_tasks(node)
            elif verb == "start":
                task = await cluster.one.start_task(task)
            else:
                task = await cluster.one.complete_task(task)

        times = (task.submitted_at, task.scheduled_at, task.started_at, task.completed_at)
        assert times == (task.submitted_at,) * 4

    async def test_task_may_run_for_its_timeout_from_when_it_was_started(
        self, cluster: Cluster
    ) -> None:
        node = await cluster.join()
        await cluster.add(timeout=60)
        cluster.clock.advance(hours=-1)
        await cluster.one.update_heartbeat(node)
        [task] = await cluster.one.claim_tasks(node)
        task = await cluster.one.start_task(task)

        cluster.clock.advance(seconds=60)
        before = await cluster.one.recover(timeout_seconds=120)
        cluster.clock.advance(seconds=1)
        after = await cluster.one.recover(timeout_seconds=120)

        assert not before
        assert after.requeued_tasks == [task.task_id]

    @pytest.mark.parametrize("was_due", [False, True])
    async def test_retry_is_not_put_off_by_more_than_the_longest_wait(
        self, cluster: Cluster, was_due: bool
    ) -> None:
        node = await cluster.join()
        task = await cluster.running(node)
        asked_for = await cluster.add(not_before=cluster.clock() + timedelta(days=1))
        await cluster.one.fail_task(task, "no")
        if was_due:
            cluster.clock.advance(seconds=11)
            assert str(await cluster.one.explain_task(task.task_id))  # which makes it ready
        cluster.clock.advance(seconds=-BACKOFF.longest_seconds)
        soon = await cluster.one.recover(timeout_seconds=1000)

        cluster.clock.advance(seconds=-12)
        recovery = await cluster.one.recover(timeout_seconds=1000)

        assert not soon
        assert recovery == Recovery([], [task.task_id], [], [])
        assert ids(await cluster.one.claim_tasks(node, limit=2)) == [task.task_id]
        assert (await cluster.task(asked_for.task_id)).not_before == asked_for.not_before
