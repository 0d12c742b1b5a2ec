"""The repositories: order of every list, exact look-ups, refusals, clean-up, and the feed."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Sequence
from datetime import timedelta
from itertools import count
from typing import Any

import pytest
from conftest import FakeClock, MakeNode, MakeTask
from sqlalchemy import select, text, update
from support.for_each import for_each

from openclaw_store import (
    Change,
    ChangeKind,
    Database,
    DeadlineError,
    DuplicateError,
    InvalidDataError,
    NodeInfo,
    NodeNotFoundError,
    NodeRepository,
    NodeStatus,
    StaleVersionError,
    StoreError,
    Task,
    TaskNotFoundError,
    TaskPriority,
    TaskRepository,
    TaskStatus,
    UnavailableError,
)
from openclaw_store.database.tables import ChangeRow, TaskRow
from openclaw_store.repositories import retention


@pytest.fixture
def tasks(database: Database) -> TaskRepository:
    return TaskRepository(database)


@pytest.fixture
def nodes(database: Database) -> NodeRepository:
    return NodeRepository(database)


async def create_all(repository: Any, items: Sequence[Any]) -> None:
    """Create rows in an order that is not that of any list."""
    shuffled = random.Random(7).sample(items, len(items))
    await asyncio.gather(*[repository.create(item) for item in shuffled])


async def feed(database: Database) -> list[Change]:
    """The changes in order of their revisions."""
    async with database.session() as session:
        rows = await session.execute(select(*ChangeRow.__table__.c).order_by("revision"))
        return [Change(*row) for row in rows]


def ids(items: Sequence[Task | NodeInfo]) -> list[str]:
    return [item.task_id if isinstance(item, Task) else item.node_id for item in items]


class TestWriting:
    async def test_create_writes_version_and_time_into_the_object(
        self, tasks: TaskRepository, make_task: MakeTask, clock: FakeClock
    ) -> None:
        task = make_task()

        await tasks.create(task)

        assert (task.version, task.updated_at) == (1, clock())
        assert await tasks.get(task.task_id) == task

    async def test_version_grows_with_every_change(
        self, tasks: TaskRepository, make_task: MakeTask
    ) -> None:
        task, versions = make_task(), []
        await tasks.create(task)

        for retry_count in range(3):
            versions.append(task.version)
            task.retry_count = retry_count
            await tasks.update(task)

        assert versions == sorted(set(versions))
        assert task.version > versions[-1]

    async def test_update_writes_every_field(
        self, tasks: TaskRepository, make_task: MakeTask, clock: FakeClock
    ) -> None:
        task = make_task()
        await tasks.create(task)
        changed = make_task(
            task_id=task.task_id,
            name="another",
            description="text",
            required_skills=["python"],
            optional_skills=[],
            status=TaskStatus.FAILED,
            priority=TaskPriority.CRITICAL,
            assigned_node="node",
            submitted_at=clock.advance(seconds=1),
            scheduled_at=clock.advance(seconds=1),
            started_at=clock.advance(seconds=1),
            completed_at=clock.advance(seconds=1),
            parameters={"a": {"b": [1]}},
            timeout=5,
            retry_count=2,
            max_retries=9,
            result=0,
            error="oops",
            user_id="user",
            affinity_tags=["rack"],
            metadata={"c": 1},
            version=task.version,
        )

        await tasks.update(changed)

        assert await tasks.get(task.task_id) == changed

    async def test_update_of_stale_copy_raises_and_the_newer_data_stays(
        self, tasks: TaskRepository, make_task: MakeTask
    ) -> None:
        task = make_task()
        await tasks.create(task)
        older, newer = await tasks.get(task.task_id), await tasks.get(task.task_id)
        assert older is not None
        assert newer is not None
        newer.name = "newer"
        await tasks.update(newer)

        older.name = "older"
        with pytest.raises(StaleVersionError) as caught:
            await tasks.update(older)

        assert (caught.value.version, caught.value.current) == (older.version, newer.version)
        assert await tasks.get(task.task_id) == newer

    async def test_update_of_what_was_removed_and_created_again_raises(
        self, nodes: NodeRepository, make_node: MakeNode
    ) -> None:
        node = make_node()
        await nodes.create(node)
        await nodes.delete(node.node_id)
        await nodes.create(make_node(node_id=node.node_id))

        with pytest.raises(StaleVersionError):
            await nodes.update(node)

    async def test_refusals_name_the_row(
        self, tasks: TaskRepository, nodes: NodeRepository, make_task: MakeTask, make_node: MakeNode
    ) -> None:
        task, node = make_task(task_id="a task"), make_node(node_id="a node")

        with pytest.raises(TaskNotFoundError, match="'a task'"):
            await tasks.update(task)
        with pytest.raises(NodeNotFoundError, match="'a node'"):
            await nodes.update(node)
        await tasks.create(task)
        await nodes.create(node)
        with pytest.raises(DuplicateError, match="task with id 'a task'"):
            await tasks.create(task)
        with pytest.raises(DuplicateError, match="node with id 'a node'"):
            await nodes.create(node)

    async def test_of_racing_creations_one_wins(
        self, tasks: TaskRepository, make_task: MakeTask
    ) -> None:
        rivals = [make_task(task_id="same", name=f"rival {number}") for number in range(5)]

        outcomes = await asyncio.gather(
            *[tasks.create(rival) for rival in rivals], return_exceptions=True
        )

        assert outcomes.count(True) == 1
        assert [type(outcome) for outcome in outcomes].count(DuplicateError) == 4
        assert await tasks.get("same") == rivals[outcomes.index(True)]

    async def test_of_racing_updates_one_wins(
        self, tasks: TaskRepository, make_task: MakeTask
    ) -> None:
        task = make_task()
        await tasks.create(task)
        rivals = [await tasks.get(task.task_id) for _ in range(5)]

        async def update(number: int, rival: Task | None) -> bool:
            assert rival is not None
            rival.name = f"rival {number}"
            return await tasks.update(rival)

        outcomes = await asyncio.gather(
            *[update(*rival) for rival in enumerate(rivals)], return_exceptions=True
        )

        assert outcomes.count(True) == 1
        assert [type(outcome) for outcome in outcomes].count(StaleVersionError) == 4
        assert await tasks.get(task.task_id) == rivals[outcomes.index(True)]

    async def test_delete_tells_whether_there_was_a_row(
        self, nodes: NodeRepository, make_node: MakeNode
    ) -> None:
        node = make_node()
        await nodes.create(node)

        outcomes = await asyncio.gather(*[nodes.delete(node.node_id) for _ in range(3)])

        assert sorted(outcomes) == [False, False, True]

    def test_repository_of_something_else_is_refused(self) -> None:
        with pytest.raises(InvalidDataError, match="must be a Database"):
            TaskRepository("./data/cluster.db")  # type: ignore[arg-type]  # that is the point

    async def test_backoff_that_is_none_is_refused(
        self, database: Database, make_node: MakeNode
    ) -> None:
        with pytest.raises(InvalidDataError, match="backoff: must be a Backoff, not int"):
            await NodeRepository(database).register(make_node(), 5)  # type: ignore[arg-type]  # the point

    def test_repr_names_the_database(self, database: Database) -> None:
        assert repr(TaskRepository(database)) == f"<TaskRepository of {database!r}>"


class TestTaskLists:
    async def test_newest_submitted_first(
        self, tasks: TaskRepository, make_task: MakeTask, clock: FakeClock
    ) -> None:
        shared = {"assigned_node": "node", "user_id": "user"}
        expected = [make_task(submitted_at=clock.advance(-1), **shared) for _ in range(9)]
        await create_all(tasks, [*expected, make_task(status=TaskStatus.RUNNING)])

        assert await tasks.list_by_status(TaskStatus.PENDING) == expected
        assert await tasks.list_by_node("node") == expected
        assert await tasks.list_by_user("user") == expected

    @pytest.mark.parametrize("limit", [None, 3])
    async def test_identifier_decides_between_tasks_submitted_at_the_same_time(
        self, tasks: TaskRepository, make_task: MakeTask, clock: FakeClock, limit: int | None
    ) -> None:
        """The two databases listed different tasks."""
        names = ["c", "ä", "a", "B", "b"]
        shared = {"assigned_node": "node", "user_id": "user", "submitted_at": clock()}
        for name in names:
            await tasks.create(make_task(task_id=name, **shared))
        expected = ["ä", "c", "b", "a", "B"]

        assert ids(await tasks.list_by_status(TaskStatus.PENDING, limit)) == expected[:limit]
        assert ids(await tasks.list_by_user("user", limit)) == expected[:limit]
        assert ids(await tasks.list_by_node("node")) == expected

    async def test_pending_by_priority_then_submission_then_id(
        self, tasks: TaskRepository, make_task: MakeTask, clock: FakeClock
    ) -> None:
        expected = [
            make_task(priority=priority, submitted_at=clock() + timedelta(seconds=second))
            for priority in TaskPriority
            for second in (0, 0, 1, 2)
        ]
        for task in expected[::2]:
            task.status = TaskStatus.SCHEDULED
        others = set(TaskStatus) - {TaskStatus.PENDING, TaskStatus.SCHEDULED}
        await create_all(tasks, [*expected, *(make_task(status=status) for status in others)])

        assert await tasks.list_pending_tasks() == expected

    async def test_limits(self, tasks: TaskRepository, make_task: MakeTask) -> None:
        await create_all(tasks, [make_task(user_id="user") for _ in range(103)])

        assert len(await tasks.list_pending_tasks()) == 50
        assert len(await tasks.list_by_user("user")) == 100
        assert len(await tasks.list_by_status(TaskStatus.PENDING)) == 103
        for limit, length in [(1, 1), (102, 102), (2**63 - 1, 103), (None, 103)]:
            assert len(await tasks.list_pending_tasks(limit)) == length
            assert len(await tasks.list_by_user("user", limit)) == length
            assert len(await tasks.list_by_status(TaskStatus.PENDING, limit)) == length

    async def test_long_list_is_whole_and_in_order(
        self, tasks: TaskRepository, make_task: MakeTask, clock: FakeClock
    ) -> None:
        expected = [make_task(submitted_at=clock.advance(1)) for _ in range(1_001)]
        await create_all(tasks, expected)

        assert ids(await tasks.list_pending_tasks(None)) == ids(expected)

    async def test_of_nobody_are_empty(self, tasks: TaskRepository, make_task: MakeTask) -> None:
        await tasks.create(make_task())

        assert await tasks.list_by_node("nobody") == []
        assert await tasks.list_by_user("nobody") == []
        assert await tasks.list_by_user("") == []

    async def test_counts(self, tasks: TaskRepository, make_task: MakeTask) -> None:
        await create_all(tasks, [make_task(status=status) for status in TaskStatus])
        await tasks.create(make_task())

        assert await tasks.count_by_status() == len(TaskStatus) + 1
        assert await tasks.count_by_status(TaskStatus.PENDING) == 2
        assert await tasks.count_by_status(TaskStatus.TIMEOUT) == 1


class TestCleanup:
    @pytest.mark.parametrize(("seconds", "removed"), [(-1, 0), (0, 0), (1, 1)])
    async def test_removes_what_finished_before_the_cutoff(
        self, tasks: TaskRepository, make_task: MakeTask, clock: FakeClock,
        seconds: int, removed: int,
    ) -> None:  # fmt: skip
        task = make_task(status=TaskStatus.COMPLETED, completed_at=clock())
        await tasks.create(task)
        clock.advance(days=30, seconds=seconds)

        assert await tasks.cleanup_old_tasks(days=30) == removed
        assert (await tasks.get(task.task_id) is None) == bool(removed)

    async def test_leaves_live_tasks_alone_whatever_their_age(
        self, tasks: TaskRepository, make_task: MakeTask, clock: FakeClock
    ) -> None:
        live = [TaskStatus.PENDING, TaskStatus.SCHEDULED, TaskStatus.RUNNING]
        await create_all(tasks, [make_task(status=s, completed_at=clock()) for s in live])
        clock.advance(days=400)

        assert await tasks.cleanup_old_tasks() == 0
        assert await tasks.count_by_status() == 3

    async def test_task_without_time_of_completion_counts_from_its_last_change(
        self, tasks: TaskRepository, make_task: MakeTask, clock: FakeClock
    ) -> None:
        old, touched = (
            make_task(status=TaskStatus.FAILED, submitted_at=clock() - timedelta(days=99))
            for _ in range(2)
        )
        await create_all(tasks, [old, touched])
        clock.advance(days=29)
        touched.error = "looked at it again"
        await tasks.update(touched)
        clock.advance(days=2)

        assert await tasks.cleanup_old_tasks(days=30) == 1
        assert await tasks.get(old.task_id) is None
        assert await tasks.get(touched.task_id) == touched

    async def test_task_that_was_submitted_by_a_clock_ahead_counts_from_its_last_change(
        self, tasks: TaskRepository, make_task: MakeTask, clock: FakeClock
    ) -> None:
        """It was kept until the moment at which it was said to be submitted."""
        task = make_task(submitted_at=clock() + timedelta(days=3650))
        await tasks.create(task)
        await tasks.cancel(task.task_id)
        cancelled = await tasks.get(task.task_id)
        clock.advance(days=30)

        assert cancelled is not None
        assert cancelled.completed_at == cancelled.submitted_at
        assert (await tasks.count_old_tasks(), await tasks.cleanup_old_tasks()) == (0, 0)
        clock.advance(seconds=1)
        assert (await tasks.count_old_tasks(), await tasks.cleanup_old_tasks()) == (1, 1)
        assert await tasks.get(task.task_id) is None

    async def test_task_that_was_finished_by_a_clock_ahead_counts_from_the_first_clean_up(
        self, tasks: TaskRepository, make_task: MakeTask, clock: FakeClock
    ) -> None:
        """It was kept until that moment."""
        clock.advance(days=3650)
        task = make_task(submitted_at=clock())
        kept = make_task(submitted_at=clock(), status=TaskStatus.FAILED, completed_at=clock())
        await create_all(tasks, [task, kept])
        await tasks.cancel(task.task_id)
        clock.advance(days=-3650)

        for _ in range(2):
            assert await tasks.cleanup_old_tasks(keep_status=TaskStatus.FAILED) == 0
        redated = await tasks.get(task.task_id)
        assert redated is not None
        assert (redated.updated_at, redated.version) == (clock(), 4)
        assert await tasks.get(kept.task_id) == kept
        clock.advance(days=31)
        assert await tasks.cleanup_old_tasks(keep_status=TaskStatus.FAILED) == 1
        assert await tasks.get(task.task_id) is None

    async def test_all_tasks_that_were_finished_by_a_clock_ahead_count_from_the_first_clean_up(
        self, tasks: TaskRepository, make_task: MakeTask, clock: FakeClock
    ) -> None:
        """Only the first of them did."""
        clock.advance(days=3650)
        ahead = [make_task(status=TaskStatus.FAILED, completed_at=clock()) for _ in range(50)]
        await create_all(tasks, ahead)
        clock.advance(days=-3650)

        assert await tasks.cleanup_old_tasks() == 0
        clock.advance(days=31)
        assert await tasks.cleanup_old_tasks() == 50

    @pytest.mark.sqlite  # a server keeps times as such
    async def test_clean_up_leaves_a_task_ahead_that_cannot_be_read(
        self, database: Database, tasks: TaskRepository, make_task: MakeTask, clock: FakeClock
    ) -> None:
        """It could not clean up anything."""
        old = make_task(status=TaskStatus.FAILED, completed_at=clock())
        await tasks.create(old)
        clock.advance(days=3650)
        await tasks.create(make_task(status=TaskStatus.FAILED, completed_at=clock()))
        async with database.transaction() as tx:
            ahead = TaskRow.task_id != old.task_id
            await tx.execute(update(TaskRow).where(ahead).values(submitted_at=text("'yesterday'")))
        clock.advance(days=-3600)

        assert await tasks.cleanup_old_tasks() == 1
        assert await tasks.count_by_status() == 1

    async def test_clean_up_by_a_clock_that_is_behind_removes_nothing(
        self, tasks: TaskRepository, make_task: MakeTask, clock: FakeClock
    ) -> None:
        await tasks.create(make_task(status=TaskStatus.COMPLETED, completed_at=clock()))
        clock.advance(days=-3650)

        assert await tasks.cleanup_old_tasks() == 0
        clock.advance(days=3650)
        assert await tasks.cleanup_old_tasks() == 0

    @pytest.mark.parametrize(
        ("keep_status", "left"),
        [
            (None, []),
            ([], []),
            (TaskStatus.FAILED, ["failed"]),
            ("failed", ["failed"]),
            ([TaskStatus.FAILED, TaskStatus.TIMEOUT], ["failed", "timeout"]),
        ],
    )
    async def test_keeps_the_status_it_is_told_to(
        self, database: Database, tasks: TaskRepository, make_task: MakeTask, clock: FakeClock,
        keep_status: Any, left: list[str],
    ) -> None:  # fmt: skip
        finished = ["completed", "failed", "cancelled", "timeout"]
        await create_all(tasks, [make_task(status=s, completed_at=clock()) for s in finished])
        clock.advance(days=31)

        removed = await tasks.cleanup_old_tasks(keep_status=keep_status)

        assert removed == 4 - len(left)
        assert sorted((await database.get_stats())["task_stats"]) == left

    @pytest.mark.parametrize("number", [0, 1, 2, 3, 4, 5, 14])
    async def test_works_in_batches(
        self, tasks: TaskRepository, make_task: MakeTask, clock: FakeClock, number: int,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:  # fmt: skip
        monkeypatch.setattr(retention, "CLEANUP_BATCH", 2)
        monkeypatch.setattr(retention, "_PAGE_SIZE", 3)
        old = [make_task(status=TaskStatus.COMPLETED) for _ in range(number)]
        for task in old[number % 2 :: 2]:
            task.completed_at = clock()
        await create_all(tasks, [*old, make_task()])
        clock.advance(days=31)

        assert await tasks.cleanup_old_tasks() == number
        assert await tasks.count_by_status() == 1

    async def test_failure_tells_how_many_are_gone_and_can_be_repeated(
        self, database: Database, tasks: TaskRepository, make_task: MakeTask, clock: FakeClock,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:  # fmt: skip
        monkeypatch.setattr(retention, "CLEANUP_BATCH", 2)
        await create_all(tasks, [make_task(status="completed") for _ in range(5)])
        clock.advance(days=31)
        write, calls = database.write, count()

        async def fail_once(apply: Any, operation: Any) -> Any:
            if next(calls) == 1:
                raise UnavailableError("the disk is full")
            return await write(apply, operation)

        monkeypatch.setattr(database, "write", fail_once)
        with pytest.raises(UnavailableError) as caught:
            await tasks.cleanup_old_tasks()

        assert caught.value.__notes__ == ["2 tasks were removed before; call again for the rest"]
        assert await tasks.cleanup_old_tasks() == 3

    async def test_removes_the_history_too_and_leaves_one_entry(
        self, database: Database, tasks: TaskRepository, make_task: MakeTask, clock: FakeClock
    ) -> None:
        old, live = make_task(), make_task()
        await tasks.create(old)
        await tasks.create(live)
        old.status = TaskStatus.CANCELLED
        await tasks.update(old)
        clock.advance(days=31)

        await tasks.cleanup_old_tasks()

        assert [(c.revision, c.item_id, c.kind) for c in await feed(database)] == [
            (2, live.task_id, ChangeKind.CREATED),
            (4, old.task_id, ChangeKind.REMOVED),
        ]

    async def test_removes_tasks_of_one_moment_in_the_order_of_their_ids(
        self, database: Database, tasks: TaskRepository, make_task: MakeTask, clock: FakeClock
    ) -> None:
        """Planted: in the order of the search, which is another one on another database."""
        ids = ["c", "ä", "a", "B", "b"]
        for done in (clock(), None):
            await create_all(
                tasks,
                [make_task(task_id=id, status=TaskStatus.FAILED, completed_at=done) for id in ids],
            )
            clock.advance(days=31)

            assert await tasks.cleanup_old_tasks() == len(ids)

            removed = [change.item_id for change in (await feed(database))[-len(ids) :]]
            assert removed == ["B", "a", "b", "c", "ä"]

    async def test_leaves_the_history_of_others_though_a_version_was_written_by_hand(
        self, database: Database, tasks: TaskRepository, make_task: MakeTask, clock: FakeClock
    ) -> None:
        old, live = make_task(status=TaskStatus.FAILED), make_task()
        await tasks.create(live)
        await tasks.create(old)
        async with database.transaction() as tx:
            await tx.execute(
                update(TaskRow).where(TaskRow.task_id == old.task_id).values(version=live.version)
            )
        clock.advance(days=31)

        await tasks.cleanup_old_tasks()

        assert live.version in [change.revision for change in await feed(database)]

    async def test_batches_are_short_and_search_without_the_write_lock(
        self, database: Database, tasks: TaskRepository, make_task: MakeTask, clock: FakeClock,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:  # fmt: skip
        """Each batch of 200 searched the whole table under the lock."""
        old = [make_task(status="completed", completed_at=clock()) for _ in range(120)]
        await create_all(tasks, old)
        clock.advance(days=31)
        write = database.write
        batches: list[int] = []

        async def noted(apply: Any, operation: Any) -> Any:
            assert {command.id for command in operation} <= set(ids(old))  # found before
            batches.append(len(operation))
            return await write(apply, operation)

        monkeypatch.setattr(database, "write", noted)

        assert await tasks.cleanup_old_tasks() == 120
        assert batches == [100, 20]

    async def test_task_that_is_requeued_after_it_was_found_stays(
        self, database: Database, tasks: TaskRepository, make_task: MakeTask, clock: FakeClock,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:  # fmt: skip
        """Planted: the removal does not compare versions."""
        old = [make_task(status=TaskStatus.FAILED, completed_at=clock()) for _ in range(3)]
        await create_all(tasks, old)
        clock.advance(days=31)
        write = database.write

        async def requeue_first(apply: Any, operation: Any) -> Any:
            monkeypatch.undo()
            await tasks.requeue(old[1].task_id)
            return await write(apply, operation)

        monkeypatch.setattr(database, "write", requeue_first)

        assert await tasks.cleanup_old_tasks() == 2
        assert ids(await tasks.list_pending_tasks()) == [old[1].task_id]

    async def test_joins_a_transaction(
        self, database: Database, tasks: TaskRepository, make_task: MakeTask, clock: FakeClock
    ) -> None:
        await tasks.create(make_task(status=TaskStatus.COMPLETED))
        clock.advance(days=31)

        async with database.transaction() as tx:
            assert await TaskRepository(tx).cleanup_old_tasks() == 1
            assert await tasks.count_by_status() == 1  # seen from outside

        assert await tasks.count_by_status() == 0


class TestNodeLists:
    async def test_newest_registered_first_then_id(
        self, nodes: NodeRepository, make_node: MakeNode, clock: FakeClock
    ) -> None:
        skills = ["python"]
        expected = [
            make_node(registered_at=clock() - timedelta(seconds=second), available_skills=skills)
            for second in (0, 0, 1, 2, 2)
        ]
        offline = make_node(status=NodeStatus.OFFLINE, registered_at=clock.advance(-9))
        await create_all(nodes, [*expected, offline])

        assert await nodes.get_all_nodes() == [*expected, offline]
        assert await nodes.list_online_nodes() == expected
        assert await nodes.list_by_status(NodeStatus.ONLINE) == expected
        assert await nodes.list_by_status(NodeStatus.OFFLINE) == [offline]
        assert await nodes.find_by_skill("python") == expected

    async def test_available_are_online_with_a_free_place_least_loaded_first(
        self, nodes: NodeRepository, make_node: MakeNode
    ) -> None:
        expected = [
            make_node(running_tasks=running, max_concurrent_tasks=places)
            for running, places in [(0, 1), (0, 5), (1, 10), (1, 5), (2, 10), (1, 2), (4, 5)]
        ]
        others = [
            make_node(running_tasks=5),
            make_node(running_tasks=6),
            make_node(max_concurrent_tasks=0),
            *(make_node(status=status) for status in NodeStatus if status != "online"),
        ]
        await create_all(nodes, [*expected, *others])

        assert await nodes.get_available_nodes() == expected

    @for_each(
        "skill",
        ["java", "c++", "%", "_", "a%", "'", '"', "\\", "", " ", "[", "数据处理", "é", "x" * 300],
    )
    async def test_skill_is_found_exactly(
        self, nodes: NodeRepository, make_node: MakeNode, skill: str
    ) -> None:
        has_it = make_node(available_skills=["other", skill])
        similar = [f"{skill}script", f"x{skill}", f"{skill} ", skill.swapcase() + "\u0301", "ab"]
        without = make_node(available_skills=similar)
        offline = make_node(available_skills=[skill], status=NodeStatus.OFFLINE)
        await create_all(nodes, [has_it, without, offline, make_node()])

        assert await nodes.find_by_skill(skill) == [has_it]
        for node in await nodes.get_all_nodes():
            await nodes.delete(node.node_id)

    async def test_skill_case_matters(self, nodes: NodeRepository, make_node: MakeNode) -> None:
        await nodes.create(make_node(available_skills=["Java"]))

        assert await nodes.find_by_skill("java") == []


class TestSignsOfLife:
    @pytest.mark.parametrize(("silent", "stale"), [(119, False), (120, False), (121, True)])
    async def test_node_is_stale_when_it_was_silent_for_longer(
        self, nodes: NodeRepository, make_node: MakeNode, clock: FakeClock, silent: int, stale: bool
    ) -> None:
        await nodes.create(make_node(last_heartbeat=clock()))

        clock.advance(seconds=silent)

        assert bool(await nodes.find_stale_nodes(timeout_seconds=120)) == stale

    async def test_node_that_never_sent_a_heartbeat_counts_from_its_registration(
        self, nodes: NodeRepository, make_node: MakeNode, clock: FakeClock
    ) -> None:
        old, new = make_node(), make_node(registered_at=clock() + timedelta(seconds=60))
        await create_all(nodes, [old, new])

        clock.advance(seconds=150)

        assert await nodes.find_stale_nodes() == [old]

    @for_each("status", NodeStatus)
    async def test_only_live_nodes_can_be_stale(
        self, nodes: NodeRepository, make_node: MakeNode, clock: FakeClock, status: NodeStatus
    ) -> None:
        node = make_node(status=status)
        await nodes.create(node)

        clock.advance(seconds=121)

        alive = status in (NodeStatus.ONLINE, NodeStatus.BUSY)
        assert await nodes.find_stale_nodes() == ([node] if alive else [])
        await nodes.delete(node.node_id)

    @for_each("status", NodeStatus)
    async def test_online_and_busy_count_as_sign_of_life_others_do_not(
        self, nodes: NodeRepository, make_node: MakeNode, clock: FakeClock, status: NodeStatus
    ) -> None:
        node, before = make_node(last_heartbeat=clock()), clock()
        await nodes.create(node)
        clock.advance(seconds=10)

        assert await nodes.update_status(node.node_id, status) is True

        stored = await nodes.get(node.node_id)
        assert stored is not None
        alive = status in (NodeStatus.ONLINE, NodeStatus.BUSY)
        assert stored.last_heartbeat == (clock() if alive else before)
        assert stored.status is status

    @for_each("status", NodeStatus)
    async def test_heartbeat_brings_an_offline_node_back_and_no_other(
        self, nodes: NodeRepository, make_node: MakeNode, clock: FakeClock, status: NodeStatus
    ) -> None:
        node = make_node(status=status)
        await nodes.create(node)
        clock.advance(seconds=10)

        assert await nodes.update_heartbeat(node.node_id) is True

        stored = await nodes.get(node.node_id)
        assert stored is not None
        assert stored.last_heartbeat == clock()
        back = status is NodeStatus.OFFLINE
        assert stored.status is (NodeStatus.ONLINE if back else status)
        assert (stored.version > node.version) == back

    async def test_update_keeps_a_newer_heartbeat(
        self, nodes: NodeRepository, make_node: MakeNode, clock: FakeClock
    ) -> None:
        node = make_node(last_heartbeat=clock())
        await nodes.create(node)
        latest = clock.advance(seconds=60)
        await nodes.update_heartbeat(node.node_id)

        node.hostname = "renamed"
        await nodes.update(node)

        stored = await nodes.get(node.node_id)
        assert stored is not None
        assert (stored.hostname, stored.last_heartbeat) == ("renamed", latest)

    async def test_update_by_a_clock_that_is_behind_leaves_a_node_alive(
        self, nodes: NodeRepository, make_node: MakeNode, clock: FakeClock
    ) -> None:
        """An older copy of it, and the last heartbeat by a clock that is a little ahead."""
        node = make_node(last_heartbeat=clock())
        await nodes.create(node)
        clock.advance(minutes=3)
        await nodes.update_heartbeat(node.node_id)
        now = clock.advance(seconds=-2)

        node.hostname = "renamed"
        await nodes.update(node)

        stored = await nodes.get(node.node_id)
        assert stored is not None
        assert stored.last_heartbeat == now

    async def test_usage_is_written_as_it_is_given(
        self, nodes: NodeRepository, make_node: MakeNode
    ) -> None:
        node = make_node(cpu_usage=90, running_tasks=4)
        await nodes.create(node)

        node.cpu_usage, node.running_tasks = 0.0, 0
        await nodes.update(node)

        assert await nodes.get(node.node_id) == node


class TestTransactions:
    async def test_changes_both_rows_or_neither(
        self, database: Database, make_task: MakeTask, make_node: MakeNode
    ) -> None:
        task, node = make_task(), make_node()
        await TaskRepository(database).create(task)
        await NodeRepository(database).create(node)

        async def assign(running_tasks: int) -> None:
            async with database.transaction() as tx:
                task = await TaskRepository(tx).get("task-0001")
                node = await NodeRepository(tx).get("node-0001")
                assert task is not None
                assert node is not None
                task.assigned_node = node.node_id
                node.running_tasks = running_tasks
                await TaskRepository(tx).update(task)
                await NodeRepository(tx).update(node)

        with pytest.raises(InvalidDataError):
            await assign(-1)
        assert await TaskRepository(database).get("task-0001") == task
        await assign(1)

        stored_task = await TaskRepository(database).get("task-0001")
        stored_node = await NodeRepository(database).get("node-0001")
        assert stored_task is not None
        assert stored_node is not None
        assert (stored_task.assigned_node, stored_node.running_tasks) == ("node-0001", 1)

    async def test_sees_its_own_writes_and_nobody_else_does(
        self, database: Database, tasks: TaskRepository, make_task: MakeTask
    ) -> None:
        task = make_task()
        async with database.transaction() as tx:
            await TaskRepository(tx).create(task)

            assert await TaskRepository(tx).get(task.task_id) == task
            assert await TaskRepository(tx).list_pending_tasks() == [task]
            assert await tasks.get(task.task_id) is None

        assert await tasks.get(task.task_id) == task

    async def test_refused_write_does_not_end_it(
        self, database: Database, tasks: TaskRepository, make_task: MakeTask
    ) -> None:
        task = make_task()
        await tasks.create(task)

        async with database.transaction() as tx:
            with pytest.raises(DuplicateError):
                await TaskRepository(tx).create(make_task(task_id=task.task_id))
            task.name = "renamed"
            await TaskRepository(tx).update(task)

        assert await tasks.get(task.task_id) == task

    async def test_call_that_would_wait_for_it_raises(
        self, database: Database, tasks: TaskRepository, make_task: MakeTask
    ) -> None:
        async with database.transaction() as tx:
            await TaskRepository(tx).create(make_task())
            with pytest.raises(DeadlineError, match="would wait for the transaction it is in"):
                await tasks.create(make_task())
            with pytest.raises(DeadlineError, match="would wait for the transaction it is in"):
                await database.vacuum()

        assert await tasks.count_by_status() == 1

    async def test_session_that_reads_refuses_to_write(
        self, database: Database, tasks: TaskRepository, make_task: MakeTask
    ) -> None:
        task = make_task()
        await tasks.create(task)

        async with database.session() as session:
            assert await TaskRepository(session).get(task.task_id) == task
            with pytest.raises(StoreError, match="only reads"):
                await TaskRepository(session).delete(task.task_id)

    async def test_session_of_a_transaction_that_is_over_refuses_to_write(
        self, database: Database, make_task: MakeTask
    ) -> None:
        async with database.transaction() as tx:
            pass

        with pytest.raises(StoreError, match="only reads"):
            await TaskRepository(tx).create(make_task())

    @pytest.mark.parametrize("call", ["create", "update"])
    async def test_rollback_leaves_the_object_as_it_was(
        self, database: Database, tasks: TaskRepository, make_task: MakeTask, call: str
    ) -> None:
        """Its version would be that of the next change, which another caller makes."""
        task = make_task()
        if call == "update":
            await tasks.create(task)
        before = task.version

        async def fail() -> None:
            async with database.transaction() as tx:
                await getattr(TaskRepository(tx), call)(task)
                raise RuntimeError("changed my mind")

        with pytest.raises(RuntimeError):
            await fail()

        assert task.version == before

    async def test_update_after_a_rollback_does_not_overwrite_newer_data(
        self, database: Database, tasks: TaskRepository, make_task: MakeTask
    ) -> None:
        task = make_task()
        await tasks.create(task)
        other = await tasks.get(task.task_id)
        assert other is not None

        async def fail() -> None:
            async with database.transaction() as tx:
                await TaskRepository(tx).update(task)
                raise RuntimeError("changed my mind")

        with pytest.raises(RuntimeError):
            await fail()
        other.error = "important"
        await tasks.update(other)
        with pytest.raises(StaleVersionError):
            await tasks.update(task)

        assert await tasks.get(task.task_id) == other


class TestFeed:
    async def test_tells_what_happened_to_a_task(
        self, database: Database, tasks: TaskRepository, make_task: MakeTask, clock: FakeClock
    ) -> None:
        task, start = make_task(), clock()
        await tasks.create(task)
        clock.advance(seconds=1)
        task.assigned_node = "node"
        await tasks.update(task)
        task.status = TaskStatus.RUNNING
        await tasks.update(task)
        await tasks.delete(task.task_id)

        later, id = clock(), task.task_id
        assert await feed(database) == [
            Change(1, start, "task", id, ChangeKind.CREATED, None, "pending", None, None),
            Change(2, later, "task", id, ChangeKind.UPDATED, "pending", "pending", "node", None, 1),
            Change(3, later, "task", id, ChangeKind.STATUS, "pending", "running", "node", None, 2),
            Change(4, later, "task", id, ChangeKind.REMOVED, "running", None, "node", None, 3),
        ]

    async def test_tells_what_happened_to_a_node(
        self, database: Database, nodes: NodeRepository, make_node: MakeNode
    ) -> None:
        node = make_node()
        await nodes.create(node)
        await nodes.update_status(node.node_id, NodeStatus.OFFLINE)
        await nodes.update_heartbeat(node.node_id)
        await nodes.delete(node.node_id)

        assert [
            (c.item, c.kind, c.from_status, c.to_status, c.reason) for c in await feed(database)
        ] == [
            ("node", "created", None, "online", None),
            ("node", "status", "online", "offline", None),
            ("node", "status", "offline", "online", "heartbeat"),
            ("node", "removed", "online", None, None),
        ]

    async def test_says_nothing_of_heartbeats(
        self, database: Database, nodes: NodeRepository, make_node: MakeNode, clock: FakeClock
    ) -> None:
        node = make_node()
        await nodes.create(node)

        for _ in range(3):
            clock.advance(seconds=1)
            await nodes.update_heartbeat(node.node_id)

        assert len(await feed(database)) == 1
        stored = await nodes.get(node.node_id)
        assert stored is not None
        assert stored.version == node.version

    async def test_revisions_have_no_gap_whatever_was_refused(
        self, database: Database, tasks: TaskRepository, make_task: MakeTask
    ) -> None:
        stale = make_task()
        await tasks.create(stale)
        await tasks.delete(stale.task_id)

        await asyncio.gather(
            *[tasks.create(make_task()) for _ in range(20)],
            *[tasks.update(stale) for _ in range(20)],
            *[tasks.delete("unknown") for _ in range(20)],
            return_exceptions=True,
        )
        async with database.transaction() as tx:
            await TaskRepository(tx).create(make_task())
            await TaskRepository(tx).create(make_task())

        assert [change.revision for change in await feed(database)] == list(range(1, 25))

    async def test_version_of_a_row_is_the_revision_of_its_last_change(
        self, database: Database, tasks: TaskRepository, make_task: MakeTask
    ) -> None:
        items = [make_task() for _ in range(5)]
        await create_all(tasks, items)

        by_id = {change.item_id: change.revision for change in await feed(database)}

        assert {item.task_id: item.version for item in items} == by_id
