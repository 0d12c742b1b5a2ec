"""`StateManager`: what callers see, what is kept, and who wins."""

from __future__ import annotations

import asyncio
import gc
import logging
import math
import pickle
import random
from collections.abc import AsyncIterator, Awaitable, Callable
from contextvars import Context
from dataclasses import FrozenInstanceError, asdict, replace
from datetime import UTC, datetime
from itertools import count
from pathlib import Path
from typing import Any, ClassVar

import pytest
from conftest import (
    PATIENCE,
    FakeClock,
    Location,
    MakeNode,
    MakeTask,
    OpenManager,
    execute,
    locked,
    start,
)
from sqlalchemy.util import await_only
from support.for_each import for_each

from openclaw_store import (
    Database,
    DeadlineError,
    DuplicateError,
    InvalidDataError,
    InvalidTransitionError,
    NodeInfo,
    NodeNotFoundError,
    NodeRepository,
    NodeStatus,
    SchemaMismatchError,
    StaleVersionError,
    StateManager,
    Task,
    TaskNotFoundError,
    TaskPriority,
    TaskRepository,
    TaskStatus,
    UnavailableError,
    UnsavedConflictError,
)
from openclaw_store.domain.models import LIVE
from openclaw_store.repositories import retention
from openclaw_store.state_manager import change_feed as feed
from openclaw_store.state_manager import heartbeat_writer, load, replica, write_behind

FINISHED = [TaskStatus.COMPLETED, TaskStatus.FAILED, TaskStatus.CANCELLED, TaskStatus.TIMEOUT]


async def eventually(is_so: Callable[[], Awaitable[bool]]) -> None:
    """Wait for something that happens by itself, soon."""
    for _ in range(1_000):
        if await is_so():
            return
        await asyncio.sleep(0.005)
    pytest.fail("it did not happen")


def meanwhile(
    monkeypatch: pytest.MonkeyPatch, database: Database, act: Callable[[], Awaitable[object]]
) -> None:
    """Let something happen while the next write is on its way."""
    write = database.write

    async def write_slowly(apply: Any, operation: Any) -> Any:
        monkeypatch.setattr(database, "write", write)
        writing = asyncio.ensure_future(write(apply, operation))
        await asyncio.sleep(0)
        await act()
        return await writing

    monkeypatch.setattr(database, "write", write_slowly)


async def cancel_all() -> None:
    """Cancel all other tasks of the loop and see them end, as `asyncio.run` does after Ctrl-C."""
    others = asyncio.all_tasks() - {asyncio.current_task()}
    for task in others:
        task.cancel()
    await asyncio.wait(others, timeout=PATIENCE)


async def leave_a_gap(manager: StateManager, task: Task, clock: FakeClock) -> None:
    """Add a task that fails and is cleaned up, so that its changes are no longer in the feed."""
    await manager.add_task(task)
    task.status = TaskStatus.FAILED
    await manager.update_task(task)
    clock.advance(days=31)
    await manager.task_repo.cleanup_old_tasks()


async def assert_mirrors_database(manager: StateManager) -> None:
    """What is answered from memory is what the database holds."""
    db, tasks, nodes = manager.db, manager.task_repo, manager.node_repo
    state, stats = await manager.get_state(), await db.get_stats()
    assert await manager.get_pending_tasks(None) == await tasks.list_pending_tasks(None)
    assert await manager.get_pending_tasks(3) == await tasks.list_pending_tasks(3)
    assert await manager.get_all_nodes() == await nodes.get_all_nodes()
    assert await manager.get_online_nodes() == await nodes.list_online_nodes()
    assert await manager.get_available_nodes() == await nodes.get_available_nodes()
    for skill in ("python", "java"):
        assert await manager.find_nodes_by_skill(skill) == await nodes.find_by_skill(skill)
    live = [s for s in TaskStatus if s not in FINISHED]
    assert state.tasks == {t.task_id: t for s in live for t in await tasks.list_by_status(s)}
    assert state.nodes == {n.node_id: n for n in await nodes.get_all_nodes()}
    assert state.total_tasks == stats["task_count"]
    assert state.running_tasks == stats["task_stats"].get("running", 0)
    assert state.total_nodes == stats["node_count"]
    assert state.online_nodes == stats["node_stats"].get("online", 0)
    zeros = dict.fromkeys([str(s) for s in TaskStatus], 0)
    counts = {"total": stats["task_count"], **zeros, **stats["task_stats"]}
    assert await manager.get_task_stats() == counts
    for status in TaskStatus:
        for task in await tasks.list_by_status(status):
            assert await manager.get_task(task.task_id) == task


@pytest.fixture
async def impatient(
    database: Database, location: Location, clock: FakeClock
) -> AsyncIterator[StateManager]:
    """A manager whose database does not wait for a lock."""
    async with StateManager(Database(location, clock=clock, timeout=0.01), None) as manager:
        yield manager


class TestReading:
    async def test_memory_answers_as_the_database_does(
        self, manager: StateManager, make_task: MakeTask, make_node: MakeNode, clock: FakeClock
    ) -> None:
        luck = random.Random(1)
        for _ in range(40):
            await manager.add_node(
                make_node(
                    status=luck.choice([NodeStatus.ONLINE, *NodeStatus]),
                    running_tasks=luck.randrange(4),
                    max_concurrent_tasks=luck.randrange(4),
                    available_skills=luck.choice([[], ["python"], ["java", "python"]]),
                    registered_at=clock.advance(luck.choice([-1, 0, 1])),
                )
            )
        for _ in range(80):
            await manager.add_task(
                make_task(
                    status=luck.choice(list(TaskStatus)),
                    priority=luck.choice(list(TaskPriority)),
                    submitted_at=clock.advance(luck.choice([-1, 0, 1])),
                )
            )

        await assert_mirrors_database(manager)

    async def test_finished_tasks_can_be_read(
        self, manager: StateManager, make_task: MakeTask
    ) -> None:
        tasks = [make_task(status=status, result={"a": [1]}) for status in FINISHED]
        for task in tasks:
            await manager.add_task(task)

        assert [await manager.get_task(task.task_id) for task in tasks] == tasks

    async def test_finished_tasks_can_be_read_after_a_restart(
        self, manager: StateManager, make_task: MakeTask, open_manager: OpenManager
    ) -> None:
        task = make_task(status=TaskStatus.COMPLETED, result=0)
        await manager.add_task(task)

        restarted = await open_manager()

        assert await restarted.get_task(task.task_id) == task
        task.error = "looked at it again"
        assert await restarted.update_task(task) is True
        assert await restarted.get_task(task.task_id) == task

    @pytest.mark.usefixtures("migrated")
    @pytest.mark.parametrize("size", [0, 1, 2])
    async def test_finished_tasks_beyond_the_limit_are_read_from_the_database(
        self, open_manager: OpenManager, make_task: MakeTask, size: int
    ) -> None:
        manager = await open_manager(finished_cache_size=size)
        tasks = [make_task() for _ in range(5)]
        for task in tasks:
            await manager.add_task(task)
            task.status = TaskStatus.COMPLETED
            await manager.update_task(task)

        for _ in range(2):
            assert [await manager.get_task(task.task_id) for task in tasks] == tasks
        for task in tasks:
            task.result = "changed"
            await manager.update_task(task, persist=False)
            await manager.sync_to_database()
            await manager.update_task(task)
        await assert_mirrors_database(manager)

    async def test_unknown_ids_give_none(self, manager: StateManager) -> None:
        assert await manager.get_task("unknown") is None
        assert await manager.get_node("unknown") is None
        assert await manager.get_task("") is None
        assert await manager.find_nodes_by_skill("unknown") == []

    async def test_limits_of_pending_tasks(
        self, manager: StateManager, make_task: MakeTask
    ) -> None:
        for _ in range(60):
            await manager.add_task(make_task())

        assert len(await manager.get_pending_tasks()) == 50
        assert len(await manager.get_pending_tasks(limit=1)) == 1
        assert len(await manager.get_pending_tasks(limit=None)) == 60

    async def test_long_list_lets_others_run_in_between(
        self, manager: StateManager, make_task: MakeTask
    ) -> None:
        await asyncio.gather(*[manager.add_task(make_task()) for _ in range(500)])
        turns: list[str] = []

        async def other() -> None:
            turns.append("other")

        async def read() -> list[Task]:
            found = await manager.get_pending_tasks(None)
            turns.append("read")
            return found

        found, _ = await asyncio.gather(read(), other())

        assert len(found) == 500
        assert turns == ["other", "read"]

    async def test_long_list_is_of_one_moment(
        self, manager: StateManager, make_task: MakeTask
    ) -> None:
        tasks = [make_task() for _ in range(500)]
        await asyncio.gather(*map(manager.add_task, tasks))
        expected = [replace(task) for task in tasks]

        async def change() -> None:
            tasks[-1].status = TaskStatus.RUNNING
            await manager.update_task(tasks[-1], persist=False)
            tasks[-2].name = "changed"
            await manager.update_task(tasks[-2], persist=False)
            await manager.add_task(make_task(), persist=False)

        found, _ = await asyncio.gather(manager.get_pending_tasks(None), change())

        assert found == expected
        assert (await manager.get_pending_tasks(None))[-2].name == "changed"

    async def test_what_is_handed_out_is_the_callers_own(
        self, manager: StateManager, make_task: MakeTask, make_node: MakeNode
    ) -> None:
        task = make_task(required_skills=["python"], parameters={"a": {"b": [1]}}, result=[1])
        node = make_node(available_skills=["python"])
        await manager.add_task(task)
        await manager.add_node(node)
        before = pickle.dumps(await manager.get_state())

        state = await manager.get_state()
        for own in (
            task,
            await manager.get_task(task.task_id),
            *await manager.get_pending_tasks(),
            *state.tasks.values(),
        ):
            assert own is not None
            own.name = "mine"
            own.required_skills.append("mine")
            own.parameters["a"]["b"].append("mine")
            own.result.append("mine")
        for machine in (
            node,
            await manager.get_node(node.node_id),
            *await manager.get_all_nodes(),
            *await manager.get_online_nodes(),
            *await manager.get_available_nodes(),
            *await manager.find_nodes_by_skill("python"),
            *state.nodes.values(),
        ):
            assert machine is not None
            machine.status = NodeStatus.ERROR
            machine.available_skills.clear()

        assert pickle.dumps(await manager.get_state()) == before

    async def test_java_is_not_found_in_javascript(
        self, manager: StateManager, make_node: MakeNode
    ) -> None:
        await manager.add_node(make_node(available_skills=["javascript"]))
        await manager.add_node(make_node(available_skills=["java"], status=NodeStatus.OFFLINE))

        assert await manager.find_nodes_by_skill("java") == []

    async def test_skills_follow_the_node(self, manager: StateManager, make_node: MakeNode) -> None:
        node = make_node(available_skills=["java", "java"])
        await manager.add_node(node)

        node.available_skills = ["python"]
        await manager.update_node(node)

        assert await manager.find_nodes_by_skill("java") == []
        assert await manager.find_nodes_by_skill("python") == [node]
        await manager.remove_node(node.node_id)
        assert await manager.find_nodes_by_skill("python") == []

    async def test_busy_nodes_in_the_statistics(
        self, manager: StateManager, make_node: MakeNode
    ) -> None:
        for fields in (
            {},
            {"running_tasks": 5},
            {"max_concurrent_tasks": 0},
            {"status": NodeStatus.BUSY},
            {"status": NodeStatus.OFFLINE},
            {"status": NodeStatus.MAINTENANCE},
            {"status": NodeStatus.ERROR, "running_tasks": 5},
        ):
            await manager.add_node(make_node(**fields))

        stats = await manager.get_node_stats()

        assert stats == {"total": 7, "online": 3, "offline": 1, "busy": 3}

    async def test_task_statistics_have_a_key_for_every_status(
        self, manager: StateManager, make_task: MakeTask
    ) -> None:
        await manager.add_task(make_task(status=TaskStatus.RUNNING))

        assert await manager.get_task_stats() == {
            "total": 1,
            "pending": 0,
            "scheduled": 0,
            "running": 1,
            "completed": 0,
            "failed": 0,
            "cancelled": 0,
            "timeout": 0,
        }


class TestWriting:
    async def test_the_same_object_can_be_changed_again_and_again(
        self, manager: StateManager, make_task: MakeTask, make_node: MakeNode
    ) -> None:
        task, node = make_task(), make_node()
        await manager.add_task(task)
        await manager.add_node(node)

        for status in (TaskStatus.SCHEDULED, TaskStatus.RUNNING, TaskStatus.COMPLETED):
            task.status = status
            node.running_tasks += 1
            assert await manager.update_task(task) is True
            assert await manager.update_node(node) is True

        assert await manager.get_task(task.task_id) == task
        assert await manager.get_node(node.node_id) == node
        await assert_mirrors_database(manager)

    async def test_write_is_committed_when_it_returns(
        self, manager: StateManager, make_task: MakeTask, location: Location
    ) -> None:
        await manager.add_task(make_task())

        assert execute(location, "SELECT count(*) FROM tasks") == [(1,)]

    async def test_used_id_is_refused(
        self, manager: StateManager, make_task: MakeTask, make_node: MakeNode
    ) -> None:
        task, node = make_task(), make_node()
        await manager.add_task(task)
        await manager.add_node(node)

        for persist in (True, False):
            with pytest.raises(DuplicateError):
                await manager.add_task(make_task(task_id=task.task_id, name="x"), persist)
            with pytest.raises(DuplicateError):
                await manager.add_node(make_node(node_id=node.node_id, hostname="x"), persist)

        assert await manager.get_task(task.task_id) == task
        assert await manager.get_node(node.node_id) == node

    async def test_update_of_something_unknown_is_refused(
        self, manager: StateManager, make_task: MakeTask, make_node: MakeNode
    ) -> None:
        for persist in (True, False):
            with pytest.raises(TaskNotFoundError):
                await manager.update_task(make_task(), persist)
            with pytest.raises(NodeNotFoundError):
                await manager.update_node(make_node(), persist)

        assert await manager.get_pending_tasks() == []
        assert await manager.get_all_nodes() == []

    @pytest.mark.parametrize("persist", [True, False])
    async def test_outdated_copy_is_refused_and_the_newer_data_stays(
        self, manager: StateManager, make_task: MakeTask, persist: bool
    ) -> None:
        task = make_task()
        await manager.add_task(task)
        older, newer = replace(task), replace(task)
        newer.name = "newer"
        await manager.update_task(newer)

        older.name = "older"
        with pytest.raises(StaleVersionError):
            await manager.update_task(older, persist=persist)

        assert await manager.get_task(task.task_id) == newer
        await manager.sync_to_database()
        assert await manager.task_repo.get(task.task_id) == newer

    async def test_failed_write_leaves_memory_as_it_was(
        self, impatient: StateManager, make_task: MakeTask, make_node: MakeNode, location: Location
    ) -> None:
        task, node = make_task(), make_node()
        await impatient.add_task(task)
        await impatient.add_node(node)
        before = await impatient.get_state()

        async with locked(location):
            for write in (
                impatient.add_task(make_task()),
                impatient.add_node(make_node()),
                impatient.update_task(replace(task, name="x")),
                impatient.update_node(replace(node, hostname="x")),
                impatient.update_node_status(node.node_id, NodeStatus.ERROR),
                impatient.remove_task(task.task_id),
                impatient.remove_node(node.node_id),
                impatient.change_task(task.task_id, lambda task: setattr(task, "name", "x")),
            ):
                with pytest.raises(UnavailableError):
                    await write

        assert await impatient.get_state() == before
        await assert_mirrors_database(impatient)

    async def test_removals_tell_whether_there_was_something(
        self, manager: StateManager, make_task: MakeTask, make_node: MakeNode
    ) -> None:
        for status in ("pending", "completed"):
            task, node = make_task(status=status), make_node()
            await manager.add_task(task)
            await manager.add_node(node)

            assert await manager.remove_task(task.task_id) is True
            assert await manager.delete_node(node.node_id) is True

            assert await manager.delete_task(task.task_id) is False
            assert await manager.remove_node(node.node_id) is False
            assert await manager.get_task(task.task_id) is None
            assert await manager.get_node(node.node_id) is None
        await assert_mirrors_database(manager)

    async def test_status_of_an_unknown_node(self, manager: StateManager) -> None:
        assert await manager.update_node_status("unknown", NodeStatus.BUSY) is False

    async def test_racing_writers_leave_memory_and_database_equal(
        self, manager: StateManager, make_task: MakeTask
    ) -> None:
        tasks = [make_task() for _ in range(5)]
        for task in tasks:
            await manager.add_task(task)
        luck = random.Random(3)

        async def disturb() -> None:
            task = await manager.get_task(luck.choice(tasks).task_id)
            if task is None:
                return
            if luck.random() < 0.1:
                await manager.remove_task(task.task_id)
            task.status = luck.choice(list(TaskStatus))
            await manager.update_task(task, persist=luck.random() < 0.7)

        outcomes = await asyncio.gather(*[disturb() for _ in range(100)], return_exceptions=True)
        await asyncio.gather(manager.sync_to_database(), return_exceptions=True)

        refused = {type(outcome) for outcome in outcomes} - {type(None)}
        assert refused <= {InvalidTransitionError, StaleVersionError, TaskNotFoundError}
        await assert_mirrors_database(manager)

    async def test_writes_around_the_manager_are_seen_at_once(
        self, manager: StateManager, make_task: MakeTask, make_node: MakeNode
    ) -> None:
        task, node = make_task(), make_node()

        await manager.task_repo.create(task)
        await NodeRepository(manager.db).create(node)

        assert await manager.get_pending_tasks() == [task]
        assert await manager.get_all_nodes() == [node]

    @pytest.mark.parametrize("turns", range(5))
    async def test_cancelled_write_is_in_both_memory_and_database_or_in_neither(
        self, manager: StateManager, make_task: MakeTask, turns: int
    ) -> None:
        await manager.add_task(make_task())

        adding = asyncio.ensure_future(manager.add_task(make_task()))
        for _ in range(turns):
            await asyncio.sleep(0)
        adding.cancel()
        with pytest.raises(asyncio.CancelledError):
            await adding

        await manager.add_task(make_task())
        await assert_mirrors_database(manager)

    async def test_memory_has_a_task_as_it_was_written_when_its_batch_was_tried_again(
        self, manager: StateManager, make_task: MakeTask, clock: FakeClock
    ) -> None:
        """Planted: memory keeps the row that the first attempt would have inserted."""

        def fail(*_: Any) -> list[None]:
            clock.advance(1)
            raise ValueError

        task, others = make_task(), [make_task() for _ in range(5)]

        await asyncio.gather(
            *map(manager.add_task, (task, *others[:3])),
            manager.remove_task(task.task_id),
            *map(manager.add_task, (task, *others[3:])),
            manager.db.write(fail, None),
            return_exceptions=True,
        )

        assert await manager.get_task(task.task_id) == task
        assert await manager.task_repo.get(task.task_id) == task

    async def test_nothing_is_left_to_the_garbage_collector(
        self, manager: StateManager, make_task: MakeTask, make_node: MakeNode
    ) -> None:
        """Planted: rows and unit refer to each other, so only the collector frees them."""
        tasks = [make_task() for _ in range(10)]

        async def write() -> None:
            await manager.add_node(make_node(max_concurrent_tasks=10))
            await asyncio.gather(*map(manager.add_task, tasks))
            await manager.change_task(tasks[0].task_id, lambda task: setattr(task, "name", "x"))
            await manager.claim_tasks("node-0001", 5)
            await manager.remove_task(tasks[0].task_id)

        gc.collect()
        gc.disable()
        gc.set_debug(gc.DEBUG_SAVEALL)
        try:
            await write()
            gc.collect()
            left = [type(one) for one in gc.garbage]
        finally:
            gc.set_debug(0)
            gc.garbage.clear()
            gc.enable()

        assert [kind for kind in left if kind.__module__.startswith("openclaw_store")] == []


async def test_unsaved_entry_refuses_another_one_and_stays_unsaved(
    manager: StateManager, make_task: MakeTask
) -> None:
    await manager.add_task(make_task(task_id="a", name="unsaved"), persist=False)

    with pytest.raises(DuplicateError):
        await manager.add_task(make_task(task_id="a"))

    assert manager.version == 0
    task = await manager.get_task("a")
    assert task is not None
    assert (task.name, task.version < 0) == ("unsaved", True)
    await manager.sync_to_database()
    assert (await manager.get_task("a")).version == 1  # type: ignore[union-attr]  # it is there


class TestChanging:
    @pytest.mark.parametrize("kind", ["task", "node"])
    async def test_hundred_concurrent_increments_end_at_a_hundred(
        self, manager: StateManager, make_task: MakeTask, make_node: MakeNode, kind: str
    ) -> None:
        await manager.add_task(make_task())
        await manager.add_node(make_node(max_concurrent_tasks=1_000))

        def increment_task(task: Task) -> None:
            task.retry_count += 1

        def increment_node(node: NodeInfo) -> None:
            node.running_tasks += 1

        if kind == "task":
            await asyncio.gather(
                *[manager.change_task("task-0001", increment_task) for _ in range(100)]
            )
            stored = await manager.task_repo.get("task-0001")
            assert stored is not None
            assert stored.retry_count == 100
        else:
            await asyncio.gather(
                *[manager.change_node("node-0001", increment_node) for _ in range(100)]
            )
            machine = await manager.node_repo.get("node-0001")
            assert machine is not None
            assert machine.running_tasks == 100
        await assert_mirrors_database(manager)

    async def test_increments_of_two_managers_add_up(
        self, manager: StateManager, make_task: MakeTask, open_manager: OpenManager
    ) -> None:
        await manager.add_task(make_task())
        other = await open_manager()

        def increment(task: Task) -> None:
            task.retry_count += 1

        await asyncio.gather(
            *[one.change_task("task-0001", increment) for one in (manager, other) * 25]
        )

        stored = await manager.task_repo.get("task-0001")
        assert stored is not None
        assert stored.retry_count == 50

    async def test_gives_what_is_stored_now(
        self, manager: StateManager, make_task: MakeTask
    ) -> None:
        await manager.add_task(make_task())

        changed = await manager.change_task("task-0001", lambda task: setattr(task, "name", "x"))

        assert changed is not None
        assert changed.name == "x"
        assert changed == await manager.get_task("task-0001")
        changed.name = "y"
        assert await manager.update_task(changed) is True

    async def test_unknown_gives_none(self, manager: StateManager) -> None:
        assert await manager.change_task("unknown", print) is None
        assert await manager.change_node("unknown", print) is None

    async def test_removed_by_another_manager_gives_none(
        self, manager: StateManager, make_task: MakeTask, open_manager: OpenManager
    ) -> None:
        await manager.add_task(make_task())
        other = await open_manager()
        await other.remove_task("task-0001")

        def rename(task: Task) -> None:
            task.name = "x"

        assert await manager.change_task("task-0001", rename) is None

    async def test_without_a_change_nothing_is_written(
        self, manager: StateManager, make_task: MakeTask
    ) -> None:
        task = make_task(parameters={"a": [1]})
        await manager.add_task(task)

        def put_back(task: Task) -> None:
            task.parameters = {"a": [1]}
            task.version = 99

        assert await manager.change_task(task.task_id, put_back) == task
        assert manager.version == task.version

    async def test_error_of_the_function_reaches_the_caller(
        self, manager: StateManager, make_task: MakeTask
    ) -> None:
        task = make_task()
        await manager.add_task(task)

        def fail(task: Task) -> None:
            task.name = "half done"
            raise KeyError("oops")

        with pytest.raises(KeyError, match="oops"):
            await manager.change_task(task.task_id, fail)
        assert await manager.get_task(task.task_id) == task

    async def test_what_is_no_change_is_refused(
        self, manager: StateManager, make_task: MakeTask
    ) -> None:
        task = make_task()
        await manager.add_task(task)

        async def wait(task: Task) -> None:
            task.name = "later"

        def become_another(task: Task) -> None:
            task.task_id = "another"

        with pytest.raises(InvalidDataError, match="fn: must be a plain function"):
            await manager.change_task(task.task_id, wait)
        with pytest.raises(InvalidDataError, match="task_id: must not be changed"):
            await manager.change_task(task.task_id, become_another)
        with pytest.raises(InvalidDataError, match="fn: must be a function"):
            await manager.change_task(task.task_id, None)  # type: ignore[arg-type]  # the point
        assert await manager.get_task(task.task_id) == task

    async def test_tasks_that_are_none_are_refused(
        self, manager: StateManager, make_task: MakeTask
    ) -> None:
        with pytest.raises(InvalidDataError, match="tasks: must be tasks, not Task"):
            await manager.add_tasks(make_task())  # type: ignore[arg-type]  # the point

    @pytest.mark.usefixtures("migrated")
    async def test_finished_task_of_long_ago_can_be_changed(
        self, open_manager: OpenManager, make_task: MakeTask
    ) -> None:
        manager = await open_manager(finished_cache_size=0)
        await manager.add_task(make_task(status=TaskStatus.FAILED))

        def add_error(task: Task) -> None:
            task.error = f"{task.error} again"

        for expected in ("None again", "None again again"):
            changed = await manager.change_task("task-0001", add_error)
            assert changed is not None
            assert changed.error == expected


class TestUnsaved:
    async def test_is_seen_and_not_written_until_the_next_synchronisation(
        self, manager: StateManager, make_task: MakeTask, make_node: MakeNode
    ) -> None:
        task, node = make_task(), make_node(available_skills=["python"])

        assert await manager.add_task(task, persist=False) is True
        assert await manager.add_node(node, persist=False) is True

        assert await manager.get_task(task.task_id) == task
        assert await manager.get_pending_tasks() == [task]
        for nodes in (
            await manager.get_all_nodes(),
            await manager.get_online_nodes(),
            await manager.get_available_nodes(),
            await manager.find_nodes_by_skill("python"),
        ):
            assert nodes == [node]
        assert (await manager.db.get_stats())["task_count"] == 0
        assert (await manager.db.get_stats())["node_count"] == 0

        assert await manager.sync_to_database() is True

        await assert_mirrors_database(manager)
        assert (await manager.db.get_stats())["task_count"] == 1
        assert (await manager.db.get_stats())["node_count"] == 1

    async def test_counts_only_when_it_is_committed(
        self, manager: StateManager, make_task: MakeTask, make_node: MakeNode
    ) -> None:
        await manager.add_task(make_task(status=TaskStatus.RUNNING), persist=False)
        await manager.add_node(make_node(), persist=False)
        await manager.add_node(make_node(running_tasks=5), persist=False)

        before, before_nodes = await manager.get_state(), await manager.get_node_stats()
        await manager.sync_to_database()
        after, after_nodes = await manager.get_state(), await manager.get_node_stats()

        assert (before.version, before.total_tasks, before.running_tasks) == (0, 0, 0)
        assert (before.total_nodes, before.online_nodes) == (0, 0)
        assert before_nodes == {"total": 0, "online": 0, "offline": 0, "busy": 0}
        assert len(before.tasks) == 1
        assert len(before.nodes) == 2
        assert (after.version, after.total_tasks, after.running_tasks) == (3, 1, 1)
        assert (after.total_nodes, after.online_nodes) == (2, 2)
        assert after_nodes == {"total": 2, "online": 2, "offline": 0, "busy": 1}

    @pytest.mark.parametrize("status", ["pending", "running", "completed"])
    async def test_the_same_object_goes_on_before_and_after_a_synchronisation(
        self, manager: StateManager, make_task: MakeTask, make_node: MakeNode, status: str
    ) -> None:
        task, node = make_task(status=status), make_node()
        await manager.add_task(task, persist=False)
        await manager.add_node(node, persist=False)

        for round in range(3):
            for step in range(2):
                task.name = node.hostname = f"{round}.{step}"
                assert await manager.update_task(task, persist=False) is True
                assert await manager.update_node(node, persist=False) is True
            await manager.sync_to_database()
            await assert_mirrors_database(manager)
            stored = await manager.task_repo.get(task.task_id)
            assert stored is not None
            assert stored.name == f"{round}.1"

        task.name = node.hostname = "written through"
        assert await manager.update_task(task) is True
        assert await manager.update_node(node) is True
        await assert_mirrors_database(manager)
        assert await manager.get_task(task.task_id) == task

    async def test_update_of_something_saved_waits_too(
        self, manager: StateManager, make_task: MakeTask
    ) -> None:
        task = make_task()
        await manager.add_task(task)
        saved = replace(task)

        task.status = TaskStatus.COMPLETED
        await manager.update_task(task, persist=False)

        assert await manager.get_task(task.task_id) == task
        assert await manager.get_pending_tasks() == []
        assert await manager.task_repo.get(task.task_id) == saved
        assert (await manager.get_task_stats())["pending"] == 1
        await manager.sync_to_database()
        await assert_mirrors_database(manager)
        assert (await manager.get_task_stats())["completed"] == 1

    async def test_copy_from_before_the_synchronisation_can_be_written_after_it(
        self, manager: StateManager, make_task: MakeTask
    ) -> None:
        await manager.add_task(make_task(), persist=False)
        copy = await manager.get_task("task-0001")
        assert copy is not None
        await manager.sync_to_database()

        copy.name = "renamed"

        assert await manager.update_task(copy) is True
        await assert_mirrors_database(manager)

    async def test_outdated_copy_is_refused(
        self, manager: StateManager, make_task: MakeTask
    ) -> None:
        task = make_task()
        await manager.add_task(task, persist=False)
        older = replace(task)
        task.name = "newer"
        await manager.update_task(task, persist=False)

        for persist in (False, True):
            with pytest.raises(StaleVersionError):
                await manager.update_task(older, persist=persist)
        await manager.sync_to_database()
        with pytest.raises(StaleVersionError):
            await manager.update_task(older)

        stored = await manager.task_repo.get(task.task_id)
        assert stored is not None
        assert stored.name == "newer"

    async def test_writing_through_saves_what_was_waiting(
        self, manager: StateManager, make_task: MakeTask, make_node: MakeNode
    ) -> None:
        task, node = make_task(), make_node()
        await manager.add_task(task, persist=False)
        await manager.add_node(node, persist=False)

        task.name = "written through"
        await manager.update_task(task)
        await manager.update_node_status(node.node_id, NodeStatus.BUSY)

        await assert_mirrors_database(manager)
        assert (await manager.get_task_stats())["total"] == 1
        assert (await manager.get_node_stats())["busy"] == 1

    async def test_changing_saves_what_was_waiting(
        self, manager: StateManager, make_task: MakeTask
    ) -> None:
        await manager.add_task(make_task(timeout=5), persist=False)

        changed = await manager.change_task("task-0001", lambda task: setattr(task, "name", "x"))

        assert changed is not None
        assert (changed.name, changed.timeout) == ("x", 5)
        await assert_mirrors_database(manager)

    @pytest.mark.parametrize("was_saved", [True, False])
    async def test_removed_before_it_was_written_it_never_is(
        self, manager: StateManager, make_task: MakeTask, make_node: MakeNode, was_saved: bool
    ) -> None:
        task, node = make_task(), make_node()
        await manager.add_task(task, persist=was_saved)
        await manager.add_node(node, persist=was_saved)
        await manager.update_task(task, persist=False)
        await manager.update_node(node, persist=False)

        assert await manager.remove_task(task.task_id) is True
        assert await manager.remove_node(node.node_id) is True

        assert await manager.remove_task(task.task_id) is False
        assert await manager.get_task(task.task_id) is None
        assert await manager.get_all_nodes() == []
        await manager.sync_to_database()
        await assert_mirrors_database(manager)

    @pytest.mark.parametrize("turns", range(6))
    async def test_removed_while_it_is_being_written_it_is_gone(
        self, manager: StateManager, make_task: MakeTask, make_node: MakeNode, turns: int
    ) -> None:
        task, node = make_task(), make_node()
        await manager.add_task(task, persist=False)
        await manager.add_node(node, persist=False)

        writing = asyncio.ensure_future(manager.sync_to_database())
        for _ in range(turns):
            await asyncio.sleep(0)
        assert await manager.remove_task(task.task_id) is True
        assert await manager.remove_node(node.node_id) is True
        await writing

        assert await manager.get_task(task.task_id) is None
        assert await manager.get_node(node.node_id) is None
        await assert_mirrors_database(manager)

    async def test_is_written_by_shutdown(
        self, manager: StateManager, make_task: MakeTask, open_manager: OpenManager
    ) -> None:
        task = make_task()
        await manager.add_task(task, persist=False)

        await manager.shutdown()

        restarted = await open_manager()
        [stored] = await restarted.get_pending_tasks()
        assert stored.task_id == task.task_id

    async def test_is_not_seen_by_another_manager_until_it_is_written(
        self, manager: StateManager, make_task: MakeTask, open_manager: OpenManager
    ) -> None:
        other = await open_manager()
        task = make_task()
        await manager.add_task(task, persist=False)

        await other.refresh_from_database()
        assert await other.get_task(task.task_id) is None

        await manager.sync_to_database()
        await other.refresh_from_database()
        assert await other.get_task(task.task_id) == await manager.get_task(task.task_id)

    async def test_that_lost_is_dropped_logged_and_named_and_the_rest_is_written(
        self,
        manager: StateManager,
        make_task: MakeTask,
        make_node: MakeNode,
        open_manager: OpenManager,
        caplog: pytest.LogCaptureFixture,
    ) -> None:
        updated, removed, node = make_task(), make_task(), make_node()
        for task in (updated, removed):
            await manager.add_task(task)
        await manager.add_node(node)
        other = await open_manager()
        for item in (updated, removed):
            item.name = "mine"
            await manager.update_task(item, persist=False)
        await manager.update_node(replace(node, hostname="mine"), persist=False)
        await manager.add_task(make_task(task_id="twice", name="mine"), persist=False)
        await manager.add_task(make_task(task_id="fine", name="mine"), persist=False)
        await other.change_task(updated.task_id, lambda task: setattr(task, "name", "theirs"))
        await other.remove_task(removed.task_id)
        await other.change_node(node.node_id, lambda node: setattr(node, "hostname", "theirs"))
        await other.add_task(make_task(task_id="twice", name="theirs"))

        with pytest.raises(UnsavedConflictError) as caught:
            await manager.sync_to_database()

        assert {type(conflict) for conflict in caught.value.conflicts} == {
            StaleVersionError,
            TaskNotFoundError,
            DuplicateError,
        }
        for id in (updated.task_id, removed.task_id, node.node_id, "twice"):
            assert f"'{id}'" in str(caught.value)
            assert f"'{id}'" in caplog.text
        assert "'fine'" not in str(caught.value)
        await manager.refresh_from_database()
        await assert_mirrors_database(manager)
        names = {task.task_id: task.name for task in await manager.get_pending_tasks()}
        assert names == {updated.task_id: "theirs", "twice": "theirs", "fine": "mine"}
        assert await manager.sync_to_database() is True

    async def test_that_lost_is_named_by_shutdown_and_everything_is_closed(
        self, database: Database, location: Location, make_task: MakeTask
    ) -> None:
        manager = StateManager(Database(location, clock=database.clock), None)
        await manager.initialize()
        await manager.add_task(make_task(task_id="twice"), persist=False)
        await TaskRepository(database).create(make_task(task_id="twice"))

        with pytest.raises(UnsavedConflictError):
            await manager.shutdown()

        assert not manager.is_initialized
        with pytest.raises(UnavailableError):
            await manager.db.get_stats()

    async def test_is_kept_when_the_database_cannot_be_written(
        self, impatient: StateManager, make_task: MakeTask, location: Location
    ) -> None:
        tasks = [make_task() for _ in range(3)]
        for task in tasks:
            await impatient.add_task(task, persist=False)

        async with locked(location):
            with pytest.raises(UnavailableError):
                await impatient.sync_to_database()

        assert await impatient.get_pending_tasks() == tasks
        assert await impatient.sync_to_database() is True
        await assert_mirrors_database(impatient)
        assert (await impatient.get_state()).total_tasks == 3

    async def test_synchronisations_at_the_same_time_do_not_conflict(
        self, manager: StateManager, make_task: MakeTask
    ) -> None:
        task = make_task()
        await manager.add_task(task, persist=False)

        def increment(task: Task) -> None:
            task.retry_count += 1

        outcomes = await asyncio.gather(
            manager.sync_to_database(),
            manager.sync_to_database(),
            manager.change_task(task.task_id, increment),
            manager.change_task(task.task_id, increment),
            manager.sync_to_database(),
        )

        assert outcomes[0] is outcomes[1] is outcomes[4] is True
        stored = await manager.get_task(task.task_id)
        assert stored is not None
        assert stored.retry_count == 2
        await assert_mirrors_database(manager)

    @pytest.mark.parametrize("was_saved", [True, False])
    async def test_changed_again_while_it_is_being_written(
        self, manager: StateManager, make_task: MakeTask, make_node: MakeNode, was_saved: bool,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:  # fmt: skip
        task, node = make_task(), make_node()
        await manager.add_task(task, persist=was_saved)
        await manager.add_node(node, persist=was_saved)
        task.name = node.hostname = "a"
        await manager.update_task(task, persist=False)
        await manager.update_node(node, persist=False)

        async def change_again() -> None:
            for name in ("b", "c"):
                task.name = node.hostname = name
                await manager.update_task(task, persist=False)
                await manager.update_node(node, persist=False)

        meanwhile(monkeypatch, manager.db, change_again)
        await manager.sync_to_database()

        assert await manager.get_task(task.task_id) == task
        assert await manager.sync_to_database() is True
        await assert_mirrors_database(manager)
        stored = await manager.get_node(node.node_id)
        assert stored is not None
        assert stored.hostname == "c"

    async def test_of_racing_additions_one_wins(
        self, manager: StateManager, make_task: MakeTask
    ) -> None:
        rivals = [make_task(task_id="same", name=f"rival {number}") for number in range(4)]

        outcomes = await asyncio.gather(
            *[manager.add_task(rival, persist=False) for rival in rivals], return_exceptions=True
        )

        assert outcomes.count(True) == 1
        assert [type(outcome) for outcome in outcomes].count(DuplicateError) == 3

    async def test_if_there_is_nothing_nothing_is_written(
        self, manager: StateManager, make_task: MakeTask, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        for _ in range(20):
            await manager.add_task(make_task())
        monkeypatch.setattr(manager.db, "write", None)

        assert await manager.sync_to_database() is True

    async def test_of_many_pages_is_written(
        self, manager: StateManager, make_task: MakeTask, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(write_behind, "FLUSH_BATCH_SIZE", 2)
        for _ in range(5):
            await manager.add_task(make_task(), persist=False)

        await manager.sync_to_database()

        assert await manager.task_repo.count_by_status() == 5

    @pytest.mark.parametrize("turns", range(1, 4))
    async def test_cancelled_sync_loses_nothing(
        self, manager: StateManager, make_task: MakeTask, turns: int
    ) -> None:
        await manager.add_task(make_task(), persist=False)

        syncing = asyncio.ensure_future(manager.sync_to_database())
        for _ in range(turns):
            await asyncio.sleep(0)
        syncing.cancel()
        with pytest.raises(asyncio.CancelledError):
            await syncing

        await manager.sync_to_database()
        assert await manager.task_repo.count_by_status() == 1
        await assert_mirrors_database(manager)


class TestHeartbeats:
    @pytest.fixture
    async def node(self, manager: StateManager, make_node: MakeNode, clock: FakeClock) -> NodeInfo:
        """A node with some usage, ten seconds before the clock's present time."""
        node = make_node(
            cpu_usage=10, memory_usage=20, disk_usage=30, running_tasks=1, last_heartbeat=clock()
        )
        await manager.add_node(node)
        clock.advance(seconds=10)
        return node

    @pytest.mark.parametrize(
        "usage",
        [
            {},
            {"cpu_usage": 0},
            {"memory_usage": 55.5},
            {"disk_usage": 100},
            {"running_tasks": 0},
            {"cpu_usage": 1, "memory_usage": 2, "running_tasks": 3, "disk_usage": 4},
        ],
        ids=str,
    )
    async def test_is_seen_at_once_and_what_is_left_out_is_left_alone(
        self, manager: StateManager, node: NodeInfo, clock: FakeClock, usage: dict[str, Any]
    ) -> None:
        assert await manager.update_heartbeat(node.node_id, **usage) is True

        assert await manager.get_node(node.node_id) == replace(
            node, last_heartbeat=clock(), **usage
        )

    async def test_takes_usage_in_the_order_of_the_specification(
        self, manager: StateManager, node: NodeInfo
    ) -> None:
        await manager.update_heartbeat(node.node_id, 1.0, 2.0, 3, 4.0)

        stored = await manager.get_node(node.node_id)
        assert stored is not None
        assert (stored.cpu_usage, stored.memory_usage) == (1.0, 2.0)
        assert (stored.running_tasks, stored.disk_usage) == (3, 4.0)

    async def test_is_written_within_a_second_whatever_the_interval(
        self, manager: StateManager, node: NodeInfo, clock: FakeClock,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:  # fmt: skip
        assert heartbeat_writer.HEARTBEAT_SECONDS < 1
        monkeypatch.setattr(heartbeat_writer, "HEARTBEAT_SECONDS", 0.01)

        await manager.update_heartbeat(node.node_id, cpu_usage=77)

        async def is_written() -> bool:
            stored = await manager.node_repo.get(node.node_id)
            assert stored is not None
            return (stored.cpu_usage, stored.last_heartbeat) == (77, clock())

        await eventually(is_written)
        await assert_mirrors_database(manager)

    async def test_that_could_not_be_written_is_tried_again(
        self, impatient: StateManager, make_node: MakeNode, clock: FakeClock, location: Location,
        monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture,
    ) -> None:  # fmt: skip
        monkeypatch.setattr(heartbeat_writer, "HEARTBEAT_SECONDS", 0.01)
        node = make_node()
        await impatient.add_node(node)

        async with locked(location):
            await impatient.update_heartbeat(node.node_id)

            async def has_failed() -> bool:
                return "heartbeats could not be written" in caplog.text

            await eventually(has_failed)

        async def is_written() -> bool:
            stored = await impatient.node_repo.get(node.node_id)
            return stored is not None and stored.last_heartbeat == clock()

        await eventually(is_written)

    async def test_many_are_written_as_one(
        self, manager: StateManager, node: NodeInfo, make_node: MakeNode, clock: FakeClock,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:  # fmt: skip
        other = make_node()
        await manager.add_node(other)
        write, written = manager.db.write, []

        async def note(apply: Any, operation: Any) -> Any:
            written.append(operation)
            return await write(apply, operation)

        monkeypatch.setattr(manager.db, "write", note)
        for cpu_usage in range(5):
            clock.advance(seconds=1)
            await manager.update_heartbeat(node.node_id, cpu_usage=cpu_usage)
            await manager.update_heartbeat(other.node_id, disk_usage=cpu_usage)
        await manager.sync_to_database()

        assert len(written) == 1
        await assert_mirrors_database(manager)

    async def test_synchronisation_waits_for_those_that_are_on_their_way(
        self, manager: StateManager, make_node: MakeNode
    ) -> None:
        """It said that they were written, and they were not yet."""
        node = make_node()
        await manager.add_node(node)
        await manager.update_heartbeat(node.node_id, cpu_usage=50)
        held, go_on = asyncio.Event(), asyncio.Event()

        async def hold() -> None:
            async with manager.db.transaction():
                held.set()
                await go_on.wait()

        holding = start(hold())
        await held.wait()
        manager._replica.heartbeat_writer._flush_now()
        await asyncio.sleep(0)
        syncing = start(manager.sync_to_database())
        for _ in range(20):
            await asyncio.sleep(0)
        assert not syncing.done()
        go_on.set()
        await syncing
        await holding

        await assert_mirrors_database(manager)

    async def test_many_are_written_in_slices_between_which_others_write(
        self, manager: StateManager, make_node: MakeNode, make_task: MakeTask,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:  # fmt: skip
        monkeypatch.setattr(heartbeat_writer, "HEARTBEAT_BATCH_SIZE", 2)
        for node in [make_node() for _ in range(5)]:
            await manager.add_node(node)
            await manager.update_heartbeat(node.node_id, cpu_usage=50)
        write, written = manager.db.write, []

        async def note(apply: Any, operation: Any) -> Any:
            written.append(len(operation) if isinstance(operation, list) else "task")
            return await write(apply, operation)

        monkeypatch.setattr(manager.db, "write", note)
        await asyncio.gather(
            manager._replica.heartbeat_writer.flush(), manager.add_task(make_task())
        )

        assert sorted(map(str, written)) == ["1", "2", "2", "task"]
        assert written[-1] != "task"
        await assert_mirrors_database(manager)

    async def test_that_follow_a_slice_that_could_not_be_written_are_tried_again(
        self, manager: StateManager, make_node: MakeNode, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(heartbeat_writer, "HEARTBEAT_BATCH_SIZE", 2)
        for node in [make_node() for _ in range(5)]:
            await manager.add_node(node)
            await manager.update_heartbeat(node.node_id, cpu_usage=50)

        async def fail(apply: Any, operation: Any) -> Any:
            raise UnavailableError("the disk is full")

        with monkeypatch.context() as patch:
            patch.setattr(manager.db, "write", fail)
            with pytest.raises(UnavailableError):
                await manager.sync_to_database()
        await manager.sync_to_database()

        await assert_mirrors_database(manager)

    async def test_that_brings_a_node_back_does_not_wait_for_those_of_others(
        self, manager: StateManager, node: NodeInfo, make_node: MakeNode
    ) -> None:
        offline = make_node(status=NodeStatus.OFFLINE)
        await manager.add_node(offline)
        await manager.update_heartbeat(node.node_id, cpu_usage=50)

        await manager.update_heartbeat(offline.node_id)

        assert len(await manager.node_repo.list_online_nodes()) == 2
        assert await manager.node_repo.get(node.node_id) == node

    async def test_is_shown_once_by_the_manager_that_was_told(
        self, manager: StateManager, node: NodeInfo
    ) -> None:
        await manager.update_heartbeat(node.node_id, cpu_usage=50)
        shown = manager._replica.cache.nodes.get(node.node_id)

        await manager.sync_to_database()

        assert manager._replica.cache.nodes.get(node.node_id) is shown

    async def test_is_seen_by_other_managers_of_the_database_when_it_is_written(
        self, manager: StateManager, node: NodeInfo, clock: FakeClock
    ) -> None:
        """With what waits there on top of it."""
        other = StateManager(manager.db, auto_sync_interval=None)
        await other.initialize()
        await manager.update_heartbeat(node.node_id, cpu_usage=50, disk_usage=50, running_tasks=99)
        clock.advance(seconds=1)
        await other.update_heartbeat(node.node_id, cpu_usage=60)

        await manager.sync_to_database()

        expected = replace(
            node, cpu_usage=60.0, disk_usage=50.0, running_tasks=99, last_heartbeat=clock()
        )
        assert await other.get_node(node.node_id) == expected
        assert await other.get_available_nodes() == []
        await other.sync_to_database()
        assert await manager.get_node(node.node_id) == expected
        await other.shutdown()

    async def test_that_was_written_though_its_caller_was_cancelled_is_not_written_again(
        self, manager: StateManager, node: NodeInfo, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """It would undo what was written behind it."""
        write = manager.db.write

        async def write_and_be_cancelled(apply: Any, operation: Any) -> Any:
            await write(apply, operation)
            raise asyncio.CancelledError

        await manager.update_heartbeat(node.node_id, cpu_usage=50)
        with monkeypatch.context() as patch:
            patch.setattr(manager.db, "write", write_and_be_cancelled)
            with pytest.raises(asyncio.CancelledError):
                await manager.sync_to_database()

        async with manager.db.transaction() as tx:  # which no heartbeat goes before
            stored = await NodeRepository(tx).get(node.node_id)
            assert stored is not None
            stored.cpu_usage = 8.0
            await NodeRepository(tx).update(stored)
        await manager.sync_to_database()

        stored = await manager.node_repo.get(node.node_id)
        assert stored is not None
        assert stored.cpu_usage == 8
        await assert_mirrors_database(manager)

    async def test_is_part_of_what_an_unsaved_update_that_lost_leaves_behind(
        self, manager: StateManager, node: NodeInfo
    ) -> None:
        node.hostname = "renamed"
        await manager.update_node(node, persist=False)
        await manager.update_heartbeat(node.node_id, cpu_usage=50)
        await manager._replica.heartbeat_writer.flush()

        manager._replica.cache.discard((NodeInfo, node.node_id))

        seen = await manager.get_node(node.node_id)
        assert seen is not None
        assert (seen.hostname, seen.cpu_usage) == ("host-1", 50)
        await assert_mirrors_database(manager)

    async def test_that_waited_does_not_undo_what_another_manager_set_offline(
        self, manager: StateManager, node: NodeInfo, open_manager: OpenManager, clock: FakeClock
    ) -> None:
        other = await open_manager()
        await manager.update_heartbeat(node.node_id)
        clock.advance(seconds=0.1)
        await other.update_node_status(node.node_id, NodeStatus.OFFLINE)

        await manager.sync_to_database()
        await manager.refresh_from_database()

        assert await manager.get_online_nodes() == []
        clock.advance(seconds=1)
        await manager.update_heartbeat(node.node_id)
        assert len(await manager.get_online_nodes()) == 1
        await assert_mirrors_database(manager)

    async def test_usage_of_several_is_put_together(
        self, manager: StateManager, node: NodeInfo, clock: FakeClock
    ) -> None:
        await manager.update_heartbeat(node.node_id, cpu_usage=50, memory_usage=50)
        clock.advance(seconds=1)
        await manager.update_heartbeat(node.node_id, memory_usage=60)
        await manager.sync_to_database()

        stored = await manager.node_repo.get(node.node_id)
        assert stored is not None
        assert (stored.cpu_usage, stored.memory_usage, stored.last_heartbeat) == (50, 60, clock())

    async def test_is_no_change(self, manager: StateManager, node: NodeInfo) -> None:
        before = manager.version

        await manager.update_heartbeat(node.node_id, cpu_usage=50)
        await manager.sync_to_database()

        assert manager.version == before
        node.hostname = "renamed"  # by the copy from before
        assert await manager.update_node(node) is True

    @for_each("status", NodeStatus)
    async def test_brings_an_offline_node_back_and_no_other(
        self, manager: StateManager, node: NodeInfo, status: NodeStatus
    ) -> None:
        await manager.update_node_status(node.node_id, status)

        assert await manager.update_heartbeat(node.node_id, cpu_usage=5) is True

        back = status is NodeStatus.OFFLINE
        stored = await manager.get_node(node.node_id)
        assert stored is not None
        assert stored.status is (NodeStatus.ONLINE if back else status)
        assert stored.cpu_usage == 5
        if back:  # an ordinary change, which is committed when it returns
            assert await manager.node_repo.get(node.node_id) == stored

    @pytest.mark.parametrize("was_saved", [True, False])
    async def test_brings_a_node_back_that_is_offline_in_memory_alone(
        self, manager: StateManager, make_node: MakeNode, was_saved: bool
    ) -> None:
        node = make_node(status=NodeStatus.OFFLINE)
        await manager.add_node(node, persist=was_saved)
        await manager.update_node(node, persist=False)

        assert await manager.update_heartbeat(node.node_id) is True

        [online] = await manager.get_online_nodes()
        assert online.node_id == node.node_id
        await manager.sync_to_database()
        await assert_mirrors_database(manager)

    async def test_of_an_unknown_node(self, manager: StateManager) -> None:
        assert await manager.update_heartbeat("unknown") is False

    async def test_of_a_removed_node(self, manager: StateManager, node: NodeInfo) -> None:
        await manager.update_heartbeat(node.node_id)
        await manager.remove_node(node.node_id)

        assert await manager.update_heartbeat(node.node_id) is False
        await manager.sync_to_database()
        await assert_mirrors_database(manager)

    async def test_of_a_node_that_only_another_manager_has_added(
        self, manager: StateManager, make_node: MakeNode, open_manager: OpenManager
    ) -> None:
        other = await open_manager()
        node = make_node()
        await manager.add_node(node)

        assert await other.update_heartbeat(node.node_id, cpu_usage=5) is True

        stored = await other.get_node(node.node_id)
        assert stored is not None
        assert stored.cpu_usage == 5

    async def test_that_is_a_little_older_is_passed_over(
        self, manager: StateManager, node: NodeInfo, clock: FakeClock
    ) -> None:
        """Another machine's clock may be ahead by as much."""
        clock.advance(seconds=-11)  # the last one was ten seconds ago

        assert await manager.update_heartbeat(node.node_id, cpu_usage=99) is True

        assert await manager.get_node(node.node_id) == node

    async def test_that_is_much_older_is_taken_as_the_clock_was_turned_back(
        self, manager: StateManager, node: NodeInfo, clock: FakeClock
    ) -> None:
        at = clock.advance(seconds=-60)

        assert await manager.update_heartbeat(node.node_id, cpu_usage=99) is True

        beaten = replace(node, cpu_usage=99, last_heartbeat=at)
        assert await manager.get_node(node.node_id) == beaten

    async def test_reaches_other_managers(
        self, manager: StateManager, node: NodeInfo, open_manager: OpenManager
    ) -> None:
        other = await open_manager()
        await manager.update_heartbeat(node.node_id, cpu_usage=50)
        await manager.sync_to_database()

        await other.refresh_from_database()

        assert await other.get_node(node.node_id) == await manager.get_node(node.node_id)
        assert other.version == manager.version

    async def test_is_written_by_shutdown(
        self, manager: StateManager, node: NodeInfo, open_manager: OpenManager, clock: FakeClock
    ) -> None:
        await manager.update_heartbeat(node.node_id, cpu_usage=50)

        await manager.shutdown()

        stored = await (await open_manager()).get_node(node.node_id)
        assert stored == replace(node, cpu_usage=50.0, last_heartbeat=clock())

    async def test_and_update_at_the_same_time_keep_both(
        self, manager: StateManager, node: NodeInfo, clock: FakeClock
    ) -> None:
        await manager.update_heartbeat(node.node_id, cpu_usage=50)
        await manager.change_node(node.node_id, lambda node: setattr(node, "hostname", "renamed"))
        await manager.sync_to_database()

        stored = await manager.node_repo.get(node.node_id)
        assert stored is not None
        assert (stored.hostname, stored.cpu_usage, stored.last_heartbeat) == (
            "renamed",
            50,
            clock(),
        )
        await assert_mirrors_database(manager)

    async def test_outlives_an_update_that_was_refused(
        self, manager: StateManager, node: NodeInfo, clock: FakeClock
    ) -> None:
        await manager.update_heartbeat(node.node_id, cpu_usage=50)

        with pytest.raises(StaleVersionError):
            await manager.update_node(replace(node, version=99))

        await manager.sync_to_database()
        stored = await manager.node_repo.get(node.node_id)
        assert stored == replace(node, cpu_usage=50.0, last_heartbeat=clock())
        await assert_mirrors_database(manager)

    async def test_that_comes_while_another_is_being_written_is_written_next(
        self, manager: StateManager, node: NodeInfo, clock: FakeClock,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:  # fmt: skip
        async def beat_again() -> None:
            clock.advance(seconds=1)
            await manager.update_heartbeat(node.node_id, disk_usage=99)

        await manager.update_heartbeat(node.node_id, cpu_usage=50)
        meanwhile(monkeypatch, manager.db, beat_again)
        await manager.sync_to_database()
        seen = await manager.get_node(node.node_id)
        await manager.sync_to_database()

        expected = replace(node, cpu_usage=50.0, disk_usage=99.0, last_heartbeat=clock())
        assert seen == expected
        assert await manager.node_repo.get(node.node_id) == expected

    async def test_that_waits_does_not_hide_what_another_manager_wrote(
        self, manager: StateManager, node: NodeInfo, open_manager: OpenManager
    ) -> None:
        """An increment on top of it would otherwise begin with the old figure."""
        other = await open_manager()
        await manager.update_heartbeat(node.node_id, cpu_usage=50)
        await other.change_node(node.node_id, lambda node: setattr(node, "running_tasks", 3))
        await manager.refresh_from_database()

        def increment(node: NodeInfo) -> None:
            node.running_tasks += 1

        changed = await manager.change_node(node.node_id, increment)

        assert changed is not None
        assert (changed.running_tasks, changed.cpu_usage) == (4, 50)
        await assert_mirrors_database(manager)

    async def test_that_waits_does_not_hide_what_a_transaction_wrote(
        self, manager: StateManager, node: NodeInfo
    ) -> None:
        await manager.update_heartbeat(node.node_id, cpu_usage=50)

        async with manager.db.transaction() as tx:
            stored = await NodeRepository(tx).get(node.node_id)
            assert stored is not None
            stored.running_tasks += 1
            await NodeRepository(tx).update(stored)

        seen = await manager.get_node(node.node_id)
        assert seen is not None
        assert (seen.running_tasks, seen.cpu_usage) == (2, 50)

    async def test_of_an_unsaved_node_is_kept_with_it(
        self, manager: StateManager, make_node: MakeNode, clock: FakeClock
    ) -> None:
        node = make_node()
        await manager.add_node(node, persist=False)
        clock.advance(seconds=5)

        assert await manager.update_heartbeat(node.node_id, cpu_usage=50) is True
        await manager.sync_to_database()

        stored = await manager.node_repo.get(node.node_id)
        assert stored is not None
        assert (stored.cpu_usage, stored.last_heartbeat) == (50, clock())
        await assert_mirrors_database(manager)

    async def test_of_a_node_with_an_unsaved_update_is_written_within_a_second_too(
        self, manager: StateManager, node: NodeInfo, clock: FakeClock,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:  # fmt: skip
        """Else other managers would take it for lost, when the sync interval is long."""
        monkeypatch.setattr(heartbeat_writer, "HEARTBEAT_SECONDS", 0.01)
        node.hostname = "renamed"
        await manager.update_node(node, persist=False)

        await manager.update_heartbeat(node.node_id, cpu_usage=50)

        async def is_written() -> bool:
            stored = await manager.node_repo.get(node.node_id)
            assert stored is not None
            return (stored.cpu_usage, stored.last_heartbeat) == (50, clock())

        await eventually(is_written)
        await manager.sync_to_database()
        await assert_mirrors_database(manager)

    @pytest.mark.parametrize("persist", [True, False])
    async def test_is_not_taken_back_by_an_update(
        self, manager: StateManager, node: NodeInfo, clock: FakeClock, persist: bool
    ) -> None:
        await manager.update_heartbeat(node.node_id)

        node.hostname = "renamed"  # the copy from before
        await manager.update_node(node, persist=persist)

        seen = await manager.get_node(node.node_id)
        assert seen is not None
        assert (seen.hostname, seen.last_heartbeat) == ("renamed", clock())
        await manager.sync_to_database()
        await assert_mirrors_database(manager)

    async def test_while_an_unsaved_node_is_being_written_is_not_lost(
        self, manager: StateManager, make_node: MakeNode, clock: FakeClock,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:  # fmt: skip
        node = make_node()
        await manager.add_node(node, persist=False)

        async def beat() -> None:
            clock.advance(seconds=5)
            await manager.update_heartbeat(node.node_id, cpu_usage=50)

        meanwhile(monkeypatch, manager.db, beat)
        await manager.sync_to_database()
        await manager.sync_to_database()

        seen = await manager.get_node(node.node_id)
        assert seen is not None
        assert seen.cpu_usage == 50
        await assert_mirrors_database(manager)


class TestStaleNodes:
    async def test_silent_nodes_are_set_offline_and_named(
        self, manager: StateManager, make_node: MakeNode, clock: FakeClock
    ) -> None:
        silent = [make_node(last_heartbeat=clock()), make_node(status=NodeStatus.BUSY)]
        others = [make_node(status=NodeStatus.MAINTENANCE), make_node(status=NodeStatus.ERROR)]
        lively = make_node()
        for node in (*silent, *others, lively):
            await manager.add_node(node)

        clock.advance(seconds=121)
        await manager.update_heartbeat(lively.node_id)

        stale = await manager.check_stale_nodes(timeout_seconds=120)

        assert sorted(stale) == [node.node_id for node in silent]
        assert await manager.get_online_nodes() == [replace(lively, last_heartbeat=clock())]
        assert (await manager.get_node_stats())["offline"] == 2
        assert await manager.check_stale_nodes() == []
        await assert_mirrors_database(manager)

    async def test_exactly_the_timeout_is_not_too_long(
        self, manager: StateManager, make_node: MakeNode, clock: FakeClock
    ) -> None:
        await manager.add_node(make_node(last_heartbeat=clock()))

        clock.advance(seconds=120)

        assert await manager.check_stale_nodes(timeout_seconds=120) == []
        assert await manager.check_stale_nodes(timeout_seconds=119.999) == ["node-0001"]

    @pytest.mark.parametrize("through", ["this manager", "another manager"])
    async def test_heartbeat_that_lands_meanwhile_wins(
        self, manager: StateManager, make_node: MakeNode, clock: FakeClock,
        open_manager: OpenManager, monkeypatch: pytest.MonkeyPatch, through: str,
    ) -> None:  # fmt: skip
        await manager.add_node(make_node())
        other = await open_manager()
        clock.advance(seconds=121)
        find = manager.node_repo.find_stale_nodes

        async def find_and_hear_of_one(timeout_seconds: float) -> list[NodeInfo]:
            found = await find(timeout_seconds)
            if through == "this manager":
                await manager.update_heartbeat("node-0001")
            else:
                await other.update_heartbeat("node-0001")
                await other.sync_to_database()
            return found

        monkeypatch.setattr(manager.node_repo, "find_stale_nodes", find_and_hear_of_one)

        assert await manager.check_stale_nodes(timeout_seconds=120) == []

        await manager.refresh_from_database()
        node = await manager.get_node("node-0001")
        assert node is not None
        assert (node.status, node.last_heartbeat) == (NodeStatus.ONLINE, clock())

    async def test_node_that_is_back_is_checked_again(
        self, manager: StateManager, make_node: MakeNode, clock: FakeClock
    ) -> None:
        await manager.add_node(make_node())

        for _ in range(2):
            clock.advance(seconds=121)
            assert await manager.check_stale_nodes() == ["node-0001"]
            await manager.update_heartbeat("node-0001")
            [node] = await manager.get_online_nodes()
            assert node.last_heartbeat == clock()


class TestState:
    async def test_is_a_picture_that_does_not_change(
        self, manager: StateManager, make_task: MakeTask, make_node: MakeNode
    ) -> None:
        task, node = make_task(), make_node()
        await manager.add_task(task)
        await manager.add_node(node)
        picture = await manager.get_state()
        expected = ({node.node_id: replace(node)}, {task.task_id: replace(task)})

        task.status = TaskStatus.RUNNING
        await manager.update_task(task)
        await manager.add_task(make_task())
        await manager.remove_node(node.node_id)

        assert (picture.nodes, picture.tasks) == expected
        assert (picture.version, picture.total_tasks, picture.total_nodes) == (2, 1, 1)
        assert (picture.online_nodes, picture.running_tasks) == (1, 0)
        later = await manager.get_state()
        assert later != picture
        assert (later.version, later.total_tasks, later.total_nodes) == (5, 2, 0)
        assert (later.online_nodes, later.running_tasks) == (0, 1)

    async def test_cannot_be_changed(self, manager: StateManager, make_task: MakeTask) -> None:
        await manager.add_task(make_task())
        state: Any = await manager.get_state()

        with pytest.raises(FrozenInstanceError):
            state.version = 7
        with pytest.raises(TypeError):
            state.tasks["task-0001"] = make_task()
        with pytest.raises(TypeError):
            del state.tasks["task-0001"]
        with pytest.raises(AttributeError):
            state.tasks.clear()

    async def test_reads_as_a_mapping(self, manager: StateManager, make_task: MakeTask) -> None:
        tasks = [make_task() for _ in range(3)]
        for task in tasks:
            await manager.add_task(task)

        mapping = (await manager.get_state()).tasks

        assert sorted(mapping) == [task.task_id for task in tasks]
        assert len(mapping) == 3
        assert "task-0001" in mapping
        assert "unknown" not in mapping
        assert mapping.get("unknown") is None
        assert mapping["task-0002"] == tasks[1]
        assert sorted(mapping.values(), key=lambda task: task.task_id) == tasks
        assert repr(mapping) == "<3 entries by identifier>"
        with pytest.raises(KeyError, match="unknown"):
            mapping["unknown"]

    async def test_can_be_pickled_and_turned_into_dicts(
        self, manager: StateManager, make_task: MakeTask, make_node: MakeNode
    ) -> None:
        await manager.add_task(make_task(result={"a": [1]}))
        await manager.add_node(make_node())
        state = await manager.get_state()

        restored, plain = pickle.loads(pickle.dumps(state)), asdict(state)

        assert restored == state
        for mapping in (restored.nodes, restored.tasks, plain["nodes"], plain["tasks"]):
            assert type(mapping) is dict
        assert plain["tasks"] == state.tasks
        assert plain["version"] == state.version

    async def test_is_equal_while_nothing_changes(
        self, manager: StateManager, make_task: MakeTask, open_manager: OpenManager
    ) -> None:
        await manager.add_task(make_task())

        assert await manager.get_state() == await manager.get_state()
        assert await (await open_manager()).get_state() == await manager.get_state()

    async def test_has_live_tasks_and_counts_all(
        self, manager: StateManager, make_task: MakeTask
    ) -> None:
        for status in TaskStatus:
            await manager.add_task(make_task(status=status))

        state = await manager.get_state()

        assert {task.status for task in state.tasks.values()} == {
            TaskStatus.PENDING,
            TaskStatus.SCHEDULED,
            TaskStatus.RUNNING,
        }
        assert state.total_tasks == len(TaskStatus)
        assert state.running_tasks == 1

    async def test_version_grows_with_every_change_and_survives_a_restart(
        self, manager: StateManager, make_task: MakeTask, open_manager: OpenManager
    ) -> None:
        task, versions = make_task(), [manager.version]
        await manager.add_task(task)
        versions.append(manager.version)
        await manager.update_task(task)
        versions.append(manager.version)
        await manager.remove_task(task.task_id)
        versions.append(manager.version)

        assert versions == [0, 1, 2, 3]
        restarted = await open_manager()
        assert restarted.version == (await restarted.get_state()).version == 3

    async def test_time_is_that_of_the_newest_change(
        self, manager: StateManager, make_task: MakeTask, open_manager: OpenManager,
        clock: FakeClock,
    ) -> None:  # fmt: skip
        assert (await manager.get_state()).updated_at is None

        changed_at = clock.advance(seconds=5)
        await manager.add_task(make_task())
        clock.advance(seconds=5)

        assert (await manager.get_state()).updated_at == changed_at
        assert (await (await open_manager()).get_state()).updated_at == changed_at


class TestStats:
    async def test_stats_of_the_database_are_among_them(
        self, manager: StateManager, make_task: MakeTask
    ) -> None:
        await manager.add_task(make_task())

        of_database, stats = await manager.db.get_stats(), await manager.get_stats()

        assert stats["task_count"] == stats["writer"]["operations"] == 1
        assert {name: stats[name] for name in of_database} == of_database

    async def test_stats_tell_when_it_was_synchronised_last(
        self, database: Database, clock: FakeClock, make_task: MakeTask
    ) -> None:
        """Planted: a synchronisation that failed counts; or the two times are one."""
        async with StateManager(database, auto_sync_interval=None) as manager:
            opened_at = clock()
            at_first = await manager.get_stats()
            synced_at = clock.advance(seconds=10)
            await manager.sync_to_database()
            refreshed_at = clock.advance(seconds=10)
            await manager.refresh_from_database()
            after = await manager.get_stats()
            clock.advance(seconds=10)
            await manager.add_task(make_task(), persist=False)
            async with database.transaction():
                with pytest.raises(DeadlineError):
                    await manager.sync_to_database()
            after_failure = await manager.get_stats()

        assert (at_first["last_sync_at"], at_first["last_refresh_at"]) == (None, opened_at)
        assert (after["last_sync_at"], after["last_refresh_at"]) == (synced_at, refreshed_at)
        assert after_failure["last_sync_at"] == synced_at

    async def test_stats_tell_when_it_was_loaded_anew(
        self, manager: StateManager, open_manager: OpenManager, clock: FakeClock,
        make_task: MakeTask, monkeypatch: pytest.MonkeyPatch,
    ) -> None:  # fmt: skip
        monkeypatch.setattr(replica, "RELOAD_AFTER", 0)
        await (await open_manager()).add_task(make_task())
        loaded_at = clock.advance(seconds=10)

        await manager.refresh_from_database()

        assert (await manager.get_stats())["last_refresh_at"] == loaded_at

    @pytest.mark.usefixtures("migrated")
    async def test_stats_count_what_is_in_memory(
        self, open_manager: OpenManager, make_task: MakeTask, make_node: MakeNode
    ) -> None:
        """Planted: finished tasks are left out; or heartbeats count though they are written."""
        manager = await open_manager(finished_cache_size=2)
        for status in (TaskStatus.RUNNING, *[TaskStatus.COMPLETED] * 3):
            await manager.add_task(make_task(status=status))
        await manager.add_node(make_node(node_id="n"))
        await manager.add_task(make_task(), persist=False)
        await manager.update_heartbeat("n")

        before = await manager.get_stats()
        await manager.sync_to_database()
        after = await manager.get_stats()

        names = ("cached_tasks", "unsaved_entries", "unsaved_heartbeats")
        assert [before[name] for name in names] == [4, 1, 1]
        assert [after[name] for name in names] == [4, 0, 0]


class TestTwoManagers:
    async def test_refresh_takes_over_everything(
        self, manager: StateManager, make_task: MakeTask, make_node: MakeNode,
        open_manager: OpenManager, clock: FakeClock,
    ) -> None:  # fmt: skip
        kept, ended, removed = make_task(), make_task(), make_task()
        node, gone = make_node(available_skills=["python"]), make_node()
        for task in (kept, ended, removed):
            await manager.add_task(task)
        for machine in (node, gone):
            await manager.add_node(machine)
        other = await open_manager()

        clock.advance(seconds=1)
        kept.priority = TaskPriority.CRITICAL
        await other.update_task(kept)
        ended.status, ended.result = TaskStatus.COMPLETED, 0
        await other.update_task(ended)
        await other.remove_task(removed.task_id)
        await other.remove_node(gone.node_id)
        await other.add_task(make_task())
        await other.add_node(make_node())
        await other.update_node_status(node.node_id, NodeStatus.BUSY)
        assert await manager.refresh_from_database() is True

        await assert_mirrors_database(manager)
        assert await manager.get_state() == await other.get_state()

    async def test_refresh_reads_what_has_changed_and_no_more(
        self, manager: StateManager, make_task: MakeTask, open_manager: OpenManager,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:  # fmt: skip
        tasks = [make_task() for _ in range(20)]
        for task in tasks:
            await manager.add_task(task)
        other = await open_manager()
        await manager.update_task(tasks[0])
        await asyncio.gather(*[other.add_task(make_task()) for _ in range(60)])
        read_change_batch, told = feed.read_change_batch, []

        def note(*arguments: Any, **options: Any) -> Any:
            told.append(batch := read_change_batch(*arguments, **options))
            return batch

        monkeypatch.setattr(replica, "read_change_batch", note)
        for _ in range(2):
            await other.refresh_from_database()

        # Changes that the cache has from its own writer are not read again.
        assert [len(batch.changes) for batch in told] == [1, 0]
        assert [batch.task_counts for batch in told] == [None, None]  # nobody has counted all tasks

    async def test_task_that_was_not_to_be_run_before_1970_can_be_claimed(
        self, manager: StateManager, make_task: MakeTask, make_node: MakeNode,
        open_manager: OpenManager,
    ) -> None:  # fmt: skip
        """On SQLite, that is 0."""
        await manager.add_node(make_node(node_id="n"))
        other = await open_manager()
        task = make_task(required_skills=[], not_before=datetime(1970, 1, 1, tzinfo=UTC))
        await manager.add_task(task)
        await other.refresh_from_database()

        [claimed] = await other.claim_tasks("n", 1)

        assert claimed.task_id == task.task_id

    async def test_own_change_of_a_node_does_not_hide_a_task_of_the_same_name(
        self, manager: StateManager, make_task: MakeTask, make_node: MakeNode,
        open_manager: OpenManager,
    ) -> None:  # fmt: skip
        await manager.add_node(make_node(node_id="same"))
        other = await open_manager()
        await manager.add_task(make_task(task_id="same"))
        await other.update_node_status("same", NodeStatus.BUSY)
        await manager.add_task(make_task())

        await other.refresh_from_database()

        await assert_mirrors_database(other)

    async def test_refresh_takes_over_what_came_between_own_changes(
        self, manager: StateManager, make_task: MakeTask, make_node: MakeNode,
        open_manager: OpenManager,
    ) -> None:  # fmt: skip
        """Own changes need not be read again; but what they have changed was changed before."""
        node, task = make_node(), make_task(required_skills=[])
        await manager.add_node(node)
        await manager.add_task(task)
        other = await open_manager()
        others = [make_task(priority=TaskPriority.LOW) for _ in range(40)]
        task.name = "another one"
        await manager.update_task(task)
        for number, one in enumerate(others):
            await (manager if number == 20 else other).add_task(one)

        [claimed] = await other.claim_tasks(node.node_id, 1)
        assert (claimed.task_id, claimed.name) == (task.task_id, "another one")
        await other.refresh_from_database()

        await assert_mirrors_database(other)

    @pytest.mark.sqlite
    @pytest.mark.parametrize("is_known", [True, False])
    async def test_refresh_takes_over_all_but_what_cannot_be_read(
        self, manager: StateManager, make_task: MakeTask, open_manager: OpenManager,
        location: Location, is_known: bool,
    ) -> None:  # fmt: skip
        """SQLite takes text anywhere."""
        other = await open_manager()
        before, broken, after = (make_task() for _ in range(3))
        for task in (before, broken, after):
            await manager.add_task(task)
        if is_known:
            await other.refresh_from_database()
            assert await other.get_task(broken.task_id) == broken
        for task in (before, broken, after):
            task.name = "newer"
            await manager.update_task(task)
        this = f"WHERE task_id = '{broken.task_id}'"
        [[moment]] = execute(location, f"SELECT submitted_at FROM tasks {this}")
        execute(location, f"UPDATE tasks SET submitted_at = 'yesterday' {this}")

        with pytest.raises(InvalidDataError, match=f"submitted_at: of '{broken.task_id}'"):
            await other.refresh_from_database()
        assert [await other.get_task(task.task_id) for task in (before, after)] == [before, after]
        assert other.version == manager.version

        await other.refresh_from_database()
        execute(location, f"UPDATE tasks SET submitted_at = {moment} {this}")
        await manager.update_task(broken)
        await other.refresh_from_database()
        await assert_mirrors_database(other)

    async def test_outdated_copy_of_another_manager_is_refused(
        self, manager: StateManager, make_task: MakeTask, open_manager: OpenManager
    ) -> None:
        task = make_task()
        await manager.add_task(task)
        other = await open_manager()
        theirs = await other.get_task(task.task_id)
        assert theirs is not None
        task.name = "newer"
        await manager.update_task(task)

        theirs.name = "older"
        with pytest.raises(StaleVersionError):
            await other.update_task(theirs)

        await other.sync_to_database()
        assert await manager.task_repo.get(task.task_id) == task

    async def test_cache_forgets_what_another_manager_cleaned_up(
        self, manager: StateManager, make_task: MakeTask, open_manager: OpenManager,
        clock: FakeClock,
    ) -> None:  # fmt: skip
        old = [make_task(status=status) for status in FINISHED]
        for task in old:
            await manager.add_task(task)
        other = await open_manager()
        assert [await other.get_task(task.task_id) for task in old] == old
        clock.advance(days=31)

        assert await manager.task_repo.cleanup_old_tasks(days=30) == 4

        assert [await manager.get_task(task.task_id) for task in old] == [None] * 4
        await assert_mirrors_database(manager)
        await other.refresh_from_database()
        assert [await other.get_task(task.task_id) for task in old] == [None] * 4
        await assert_mirrors_database(other)

    async def test_counts_are_right_though_history_was_cleaned_up(
        self, manager: StateManager, make_task: MakeTask, open_manager: OpenManager,
        clock: FakeClock,
    ) -> None:  # fmt: skip
        other = await open_manager()
        await leave_a_gap(manager, make_task(), clock)
        await manager.add_task(make_task(status=TaskStatus.FAILED))

        await other.refresh_from_database()

        await assert_mirrors_database(other)

    async def test_long_news_are_read_page_by_page(
        self, manager: StateManager, make_task: MakeTask, open_manager: OpenManager,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:  # fmt: skip
        monkeypatch.setattr(feed, "CHANGE_BATCH_SIZE", 2)
        other = await open_manager()
        tasks = [make_task() for _ in range(5)]
        for task in tasks:
            await manager.add_task(task)
        for task in tasks[::2]:
            task.status = TaskStatus.RUNNING
            await manager.update_task(task)
        await manager.remove_task(tasks[0].task_id)

        await other.refresh_from_database()

        await assert_mirrors_database(other)
        assert other.version == 9

    async def test_failure_between_pages_leaves_no_wrong_counts(
        self, manager: StateManager, make_task: MakeTask, open_manager: OpenManager,
        clock: FakeClock, monkeypatch: pytest.MonkeyPatch,
    ) -> None:  # fmt: skip
        monkeypatch.setattr(feed, "CHANGE_BATCH_SIZE", 2)
        other = await open_manager()
        await leave_a_gap(manager, make_task(), clock)  # so that the first page has a gap
        for _ in range(4):
            await manager.add_task(make_task())
        read, calls = other.db.read, count()

        async def fail_on_the_second_page(work: Any, **options: Any) -> Any:
            if next(calls) == 1:
                raise UnavailableError("the disk is gone")
            return await read(work, **options)

        monkeypatch.setattr(other.db, "read", fail_on_the_second_page)
        with pytest.raises(UnavailableError):
            await other.refresh_from_database()
        await other.refresh_from_database()

        await assert_mirrors_database(other)

    async def test_far_behind_it_loads_everything_again_and_keeps_what_is_unsaved(
        self, manager: StateManager, make_task: MakeTask, make_node: MakeNode,
        open_manager: OpenManager, monkeypatch: pytest.MonkeyPatch, clock: FakeClock,
    ) -> None:  # fmt: skip
        monkeypatch.setattr(replica, "RELOAD_AFTER", 3)
        saved, node = make_task(), make_node()
        await manager.add_task(saved)
        await manager.add_node(node)
        other = await open_manager()
        unsaved = make_task()
        await other.add_task(unsaved, persist=False)
        saved.name = "mine"
        await other.update_task(saved, persist=False)
        clock.advance(seconds=1)
        await other.update_heartbeat(node.node_id, cpu_usage=50)
        for _ in range(5):
            await manager.add_task(make_task())

        await other.refresh_from_database()

        assert other.version == 7
        assert len(await other.get_pending_tasks()) == 7
        assert await other.get_task(unsaved.task_id) == unsaved
        assert await other.get_task(saved.task_id) == saved
        seen = await other.get_node(node.node_id)
        assert seen is not None
        assert seen.cpu_usage == 50
        await other.sync_to_database()
        await assert_mirrors_database(other)

    async def test_not_everything_is_loaded_again_if_it_is_more_than_what_has_changed(
        self, manager: StateManager, make_task: MakeTask, open_manager: OpenManager,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:  # fmt: skip
        """Planted: a process that is 20,000 changes behind loads a million tasks."""
        monkeypatch.setattr(replica, "RELOAD_AFTER", 3)
        for _ in range(6):
            await manager.add_task(make_task())
        other = await open_manager()
        monkeypatch.delattr(load, "read_initial_state")  # with which loading begins
        for _ in range(6):
            await manager.add_task(make_task())

        await other.refresh_from_database()
        await assert_mirrors_database(other)

        for _ in range(13):
            await manager.add_task(make_task())
        with pytest.raises(NameError, match="read_initial_state"):
            await other.refresh_from_database()

    async def test_object_that_was_unsaved_once_outlives_a_reload(
        self, manager: StateManager, make_task: MakeTask, open_manager: OpenManager,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:  # fmt: skip
        other = await open_manager()
        task = make_task()
        await other.add_task(task, persist=False)
        await other.sync_to_database()
        for _ in range(5):
            await manager.add_task(make_task())
        monkeypatch.setattr(replica, "RELOAD_AFTER", 3)
        await other.refresh_from_database()

        task.name = "renamed"

        assert await other.update_task(task) is True

    async def test_own_writes_during_a_reload_are_not_lost(
        self, manager: StateManager, make_task: MakeTask, open_manager: OpenManager,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:  # fmt: skip
        monkeypatch.setattr(replica, "RELOAD_AFTER", 3)
        other = await open_manager()
        read_live = feed.read_live
        for _ in range(5):
            await manager.add_task(make_task())

        async def read_slowly(*arguments: Any) -> AsyncIterator[Any]:
            await other.add_task(make_task())
            async for page in read_live(*arguments):
                yield page
                await other.add_task(make_task())

        monkeypatch.setattr(load, "read_live", read_slowly)
        await other.refresh_from_database()

        await assert_mirrors_database(other)
        assert len(await other.get_pending_tasks()) == 7

    async def test_refreshes_at_the_same_time_agree(
        self, manager: StateManager, make_task: MakeTask, open_manager: OpenManager
    ) -> None:
        other = await open_manager()
        for _ in range(5):
            await manager.add_task(make_task())

        await asyncio.gather(*[other.refresh_from_database() for _ in range(3)])

        await assert_mirrors_database(other)

    async def test_what_was_read_from_the_database_does_not_go_back(
        self, manager: StateManager, make_task: MakeTask, open_manager: OpenManager,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:  # fmt: skip
        """A refresh under way has read an older picture. Found by the campaign `history`."""
        other = await open_manager()
        task = make_task()
        await manager.add_task(task)
        read_change_batch, get_record = feed.read_change_batch, TaskRepository.get_record
        has_read, go_on = asyncio.Event(), asyncio.Event()

        def read_and_wait(*arguments: Any, **options: Any) -> Any:
            batch = read_change_batch(*arguments, **options)
            has_read.set()
            await_only(go_on.wait())
            return batch

        async def get_first(*arguments: Any) -> Any:
            record = await get_record(*arguments)
            go_on.set()
            return record

        monkeypatch.setattr(replica, "read_change_batch", read_and_wait)
        monkeypatch.setattr(TaskRepository, "get_record", get_first)
        refreshing = asyncio.ensure_future(other.refresh_from_database())
        await has_read.wait()
        task.name = "newer"
        await manager.update_task(task)

        seen = await other.get_task(task.task_id)
        await refreshing

        assert seen == task
        assert await other.get_task(task.task_id) == task

    async def test_memory_knows_what_a_list_has_shown(
        self, manager: StateManager, make_task: MakeTask, open_manager: OpenManager
    ) -> None:
        task = make_task()
        await manager.add_task(task)
        other = await open_manager()
        task.name = "newer"
        await manager.update_task(task)

        assert (await other.list_tasks()).tasks == [task]
        assert await other.get_task(task.task_id) == task

    async def test_own_writes_and_news_cross_without_harm(
        self, manager: StateManager, make_task: MakeTask, open_manager: OpenManager
    ) -> None:
        other = await open_manager()
        luck = random.Random(5)

        async def write(one: StateManager) -> None:
            task = make_task(status=luck.choice(list(TaskStatus)))
            await one.add_task(task)
            if task.status in LIVE:
                task.status = luck.choice(list(TaskStatus))
            await one.update_task(task)
            if luck.random() < 0.3:
                await one.remove_task(task.task_id)
            await one.refresh_from_database()

        await asyncio.gather(*[write(one) for one in (manager, other) * 20])
        await manager.refresh_from_database()
        await other.refresh_from_database()

        await assert_mirrors_database(manager)
        await assert_mirrors_database(other)
        assert await manager.get_state() == await other.get_state()


class TestTransactions:
    @pytest.mark.parametrize("is_cancelled", [True, False])
    @pytest.mark.parametrize("in_a_batch", [True, False])
    async def test_task_that_is_added_and_ended_at_once_leaves_the_others_alone(
        self, manager: StateManager, make_task: MakeTask, make_node: MakeNode,
        is_cancelled: bool, in_a_batch: bool,
    ) -> None:  # fmt: skip
        """Planted: the first change is looked for in an index that the task is not in yet."""
        others = [make_task(priority=priority, required_skills=[]) for priority in TaskPriority]
        for task in others:
            await manager.add_task(task)
        await manager.add_node(make_node(node_id="n"))
        new = make_task(priority=TaskPriority.NORMAL, required_skills=[])
        id = new.task_id

        if in_a_batch:
            end = manager.cancel_task if is_cancelled else manager.remove_task
            refused, ended = await asyncio.gather(manager.add_tasks([new]), end(id))
            assert (refused, ended) == ([None], True)
        else:
            async with manager.db.transaction() as tx:
                tasks = TaskRepository(tx)
                await tasks.create(new)
                assert await (tasks.cancel(id) if is_cancelled else tasks.delete(id)) is True

        await assert_mirrors_database(manager)
        claimed = await manager.claim_tasks("n", 10)
        assert {task.task_id for task in claimed} == {task.task_id for task in others}

    async def test_what_they_change_reaches_the_caches(
        self, manager: StateManager, make_task: MakeTask, make_node: MakeNode,
        open_manager: OpenManager,
    ) -> None:  # fmt: skip
        task, node = make_task(), make_node()
        await manager.add_task(task)
        await manager.add_node(node)
        other = await open_manager()

        async with manager.db.transaction() as tx:
            assigned = await TaskRepository(tx).get(task.task_id)
            chosen = await NodeRepository(tx).get(node.node_id)
            assert assigned is not None
            assert chosen is not None
            assigned.assigned_node = chosen.node_id
            chosen.running_tasks += 1
            await TaskRepository(tx).update(assigned)
            await NodeRepository(tx).update(chosen)

        for one in (manager, other):
            await other.refresh_from_database()
            assert await one.get_task(task.task_id) == assigned
            assert await one.get_node(node.node_id) == chosen
            await assert_mirrors_database(one)

    async def test_what_was_rolled_back_leaves_no_trace(
        self, manager: StateManager, make_task: MakeTask
    ) -> None:
        before = await manager.get_state()

        async def fail() -> None:
            async with manager.db.transaction() as tx:
                await TaskRepository(tx).create(make_task())
                raise RuntimeError("changed my mind")

        with pytest.raises(RuntimeError):
            await fail()

        assert await manager.get_state() == before
        await manager.refresh_from_database()
        assert await manager.get_state() == before

    async def test_call_that_would_wait_for_one_raises(
        self, manager: StateManager, make_task: MakeTask, make_node: MakeNode
    ) -> None:
        node = make_node()
        await manager.add_node(node)

        async with manager.db.transaction():
            for call in (
                manager.add_task(make_task()),
                manager.remove_node(node.node_id),
                manager.update_node_status(node.node_id, NodeStatus.BUSY),
                manager.change_node(node.node_id, lambda node: setattr(node, "port", 1)),
            ):
                with pytest.raises(DeadlineError, match="would wait for the transaction it is in"):
                    await call
            assert await manager.get_all_nodes() == [node]  # memory can be read

        assert await manager.add_task(make_task()) is True

    async def test_call_that_would_wait_for_one_that_waits_raises(
        self, manager: StateManager, make_task: MakeTask
    ) -> None:
        """A synchronisation in the background waits for the transaction to end."""
        task = make_task()
        await manager.add_task(task, persist=False)

        async with manager.db.transaction():
            writing = asyncio.create_task(manager.sync_to_database(), context=Context())
            await asyncio.sleep(0)
            for call in (
                manager.update_task(task),
                manager.remove_task(task.task_id),
                manager.change_task(task.task_id, lambda task: setattr(task, "name", "x")),
                manager.sync_to_database(),
            ):
                with pytest.raises(DeadlineError, match="would wait for the transaction it is in"):
                    await call

        assert await writing is True
        await assert_mirrors_database(manager)

    async def test_copy_read_in_one_that_was_rolled_back_stays_outdated(
        self, manager: StateManager, make_task: MakeTask
    ) -> None:
        """Its version would be that of the next change."""
        task = make_task()
        await manager.add_task(task)
        copies: list[Task] = []

        async def fail() -> None:
            async with manager.db.transaction() as tx:
                own = replace(task, name="undone")
                await TaskRepository(tx).update(own)
                copies.extend(await TaskRepository(tx).list_pending_tasks())
                raise RuntimeError("changed my mind")

        with pytest.raises(RuntimeError):
            await fail()
        task.name = "kept"
        await manager.update_task(task)
        for copy in copies:
            with pytest.raises(StaleVersionError):
                await manager.update_task(copy)

        assert len(copies) == 1
        assert await manager.get_task(task.task_id) == task


class TestLife:
    CALLS: tuple[Callable[[StateManager], Awaitable[Any]], ...] = (
        lambda manager: manager.get_state(),
        lambda manager: manager.get_task("t"),
        lambda manager: manager.get_node("n"),
        lambda manager: manager.get_all_nodes(),
        lambda manager: manager.get_online_nodes(),
        lambda manager: manager.get_available_nodes(),
        lambda manager: manager.find_nodes_by_skill("python"),
        lambda manager: manager.get_pending_tasks(),
        lambda manager: manager.get_task_stats(),
        lambda manager: manager.get_node_stats(),
        lambda manager: manager.add_task(Task.create("batch", "x")),  # type: ignore[arg-type]  # a value will do
        lambda manager: manager.add_task(Task.create("batch", "x"), persist=False),  # type: ignore[arg-type]  # as above
        lambda manager: manager.update_task(Task.create("batch", "x")),  # type: ignore[arg-type]  # as above
        lambda manager: manager.add_node(NodeInfo("n", "host")),
        lambda manager: manager.update_node(NodeInfo("n", "host"), persist=False),
        lambda manager: manager.change_task("t", print),
        lambda manager: manager.change_node("n", print),
        lambda manager: manager.remove_task("t"),
        lambda manager: manager.remove_node("n"),
        lambda manager: manager.update_node_status("n", NodeStatus.BUSY),
        lambda manager: manager.update_heartbeat("n"),
        lambda manager: manager.check_stale_nodes(),
        lambda manager: manager.sync_to_database(),
        lambda manager: manager.refresh_from_database(),
    )

    @for_each("call", CALLS)
    async def test_use_before_and_after_raises(
        self, location: Location, call: Callable[[StateManager], Awaitable[Any]]
    ) -> None:
        manager = StateManager(Database(location), auto_sync_interval=None)

        with pytest.raises(UnavailableError, match="call initialize"):
            await call(manager)
        await manager.shutdown()
        with pytest.raises(UnavailableError, match="was shut down"):
            await call(manager)

    async def test_initialize_and_shutdown_may_be_called_twice(self, location: Location) -> None:
        manager = StateManager(Database(location))

        assert await manager.initialize() is True
        assert await manager.initialize() is True
        await manager.shutdown()
        await manager.shutdown()

        assert not manager.is_initialized
        with pytest.raises(UnavailableError, match="was shut down"):
            await manager.initialize()

    async def test_initialize_and_shutdown_by_several_at_once(
        self, database: Database, make_task: MakeTask
    ) -> None:
        manager = StateManager(database, auto_sync_interval=30)

        assert await asyncio.gather(*[manager.initialize() for _ in range(3)]) == [True] * 3
        await manager.add_task(make_task())
        await asyncio.gather(*[manager.shutdown() for _ in range(3)])

        assert not manager.is_initialized

    @pytest.mark.usefixtures("migrated")
    async def test_shutdown_right_after_a_write_keeps_it(
        self, location: Location, make_task: MakeTask, make_node: MakeNode
    ) -> None:
        manager = StateManager(Database(location))
        await manager.initialize()
        await manager.add_node(make_node())

        writing = asyncio.ensure_future(manager.add_task(make_task()))
        await asyncio.sleep(0)
        await manager.shutdown()

        assert await writing is True
        async with Database(location) as database:
            assert await TaskRepository(database).count_by_status() == 1

    async def test_shutdown_that_is_cancelled_goes_on(self, database: Database) -> None:
        manager = StateManager(database)
        await manager.initialize()

        closing = asyncio.ensure_future(manager.shutdown())
        await asyncio.sleep(0)
        closing.cancel()
        with pytest.raises(asyncio.CancelledError):
            await closing
        await manager.shutdown()

        assert not manager.is_initialized

    INTERRUPTED: ClassVar[dict[str, Callable[[StateManager], tuple[Any, str]]]] = {
        "before anything": lambda manager: (manager, "_stop"),
        "with unsaved entries": lambda manager: (manager._replica, "sync"),
        "before it closes": lambda manager: (manager.db, "close"),
        "as the writer ends": lambda manager: (manager.db._writer, "close"),
        "as connections close": lambda manager: (
            next(iter(manager.db._loop_sessions.values())),
            "close",
        ),
    }

    @pytest.mark.parametrize("moment", INTERRUPTED)
    async def test_shutdown_that_was_interrupted_is_finished_by_the_next_one(
        self, location: Location, database: Database, make_task: MakeTask, moment: str,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:  # fmt: skip
        """It was cancelled, or hung, for ever after."""
        manager = StateManager(Database(location))
        await manager.initialize()
        await manager.add_node(NodeInfo("n", "host"))
        await manager.update_heartbeat("n", cpu_usage=50)
        await manager.add_task(make_task(), persist=False)
        reached = asyncio.Event()

        async def hang() -> None:
            reached.set()
            await asyncio.Event().wait()

        with monkeypatch.context() as patched:
            patched.setattr(*self.INTERRUPTED[moment](manager), hang)
            closing = asyncio.ensure_future(manager.shutdown())
            await asyncio.wait_for(reached.wait(), PATIENCE)
            await cancel_all()
        assert closing.cancelled()
        with pytest.raises(UnavailableError, match="was shut down"):
            await manager.initialize()
        with pytest.raises(UnavailableError, match="belongs to one event loop"):
            await asyncio.to_thread(asyncio.run, manager.shutdown())
        await asyncio.wait_for(manager.shutdown(), PATIENCE)
        await asyncio.wait_for(manager.shutdown(), PATIENCE)
        await asyncio.to_thread(asyncio.run, manager.shutdown())

        assert not manager.is_initialized
        assert await TaskRepository(database).count_by_status() == 1
        node = await NodeRepository(database).get("n")
        assert node is not None
        assert node.cpu_usage == 50

    @pytest.mark.usefixtures("migrated")
    @pytest.mark.sqlite  # nobody could close the connections to a server
    @pytest.mark.parametrize("ending", ["cancelled", "left"])
    def test_shutdown_that_its_loop_interrupted_is_finished_on_another(
        self, location: Location, ending: str, make_task: MakeTask, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """It was cancelled for ever after, or waited for what had stopped half-way."""
        manager = StateManager(Database(location), auto_sync_interval=None)
        loop = asyncio.new_event_loop()
        loop.run_until_complete(manager.initialize())
        loop.run_until_complete(manager.add_task(make_task()))
        with monkeypatch.context() as patched:
            patched.setattr(manager.db, "close", lambda: asyncio.Event().wait())
            closing = loop.create_task(manager.shutdown())
            for _ in range(3):
                loop.run_until_complete(asyncio.sleep(0))
            if ending == "cancelled":
                loop.run_until_complete(cancel_all())
        loop.close()

        for _ in range(2):
            asyncio.run(asyncio.wait_for(manager.shutdown(), PATIENCE))

        assert not manager.is_initialized
        assert closing.cancelled() is (ending == "cancelled")
        assert isinstance(location, Path)
        assert [path.name for path in location.parent.iterdir()] == [location.name]

    def test_shutdown_when_initialize_was_left_by_its_loop(
        self, location: Location, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """It waited for ever for its turn."""
        manager = StateManager(Database(location))
        monkeypatch.setattr(manager.db, "initialize", lambda: asyncio.Event().wait())
        loop = asyncio.new_event_loop()
        opening = loop.create_task(manager.initialize())
        loop.run_until_complete(asyncio.sleep(0))
        loop.close()

        asyncio.run(asyncio.wait_for(manager.shutdown(), PATIENCE))

        assert not opening.done()
        assert not manager.is_initialized

    async def test_shutdown_on_another_loop_is_refused(self, manager: StateManager) -> None:
        """It waited for ever for tasks that only their own loop can end."""
        with pytest.raises(UnavailableError, match="belongs to one event loop"):
            await asyncio.to_thread(asyncio.run, manager.shutdown())

        assert manager.is_initialized

    @pytest.mark.usefixtures("migrated")
    @pytest.mark.sqlite  # nobody could close the connections to a server
    def test_shutdown_when_its_loop_was_closed(
        self, location: Location, make_task: MakeTask
    ) -> None:
        """It waited for what had stopped half-way, or raised a `RuntimeError`."""
        manager = StateManager(Database(location), auto_sync_interval=None)
        loop = asyncio.new_event_loop()
        loop.run_until_complete(manager.initialize())
        loop.run_until_complete(manager.add_task(make_task(), persist=False))
        loop.close()

        with pytest.raises(UnavailableError, match="1 unsaved entries and heartbeats are lost"):
            asyncio.run(manager.shutdown())

        assert not manager.is_initialized

    async def test_shutdown_without_initialize(self, location: Location) -> None:
        manager = StateManager(Database(location))

        await manager.shutdown()

        assert not manager.is_initialized

    async def test_works_as_a_context(self, location: Location, make_task: MakeTask) -> None:
        async with StateManager(Database(location)) as manager:
            assert manager.is_initialized
            await manager.add_task(make_task(), persist=False)

        assert not manager.is_initialized
        async with StateManager(Database(location)) as manager:
            assert len(await manager.get_pending_tasks()) == 1

    async def test_database_that_cannot_be_opened_raises(self, tmp_path: Path) -> None:
        manager = StateManager(Database(tmp_path))

        with pytest.raises(UnavailableError, match="is a folder"):
            await manager.initialize()

        assert not manager.is_initialized
        await manager.shutdown()

    async def test_context_of_a_database_that_cannot_be_opened_raises(self, tmp_path: Path) -> None:
        manager = StateManager(Database(tmp_path))

        with pytest.raises(UnavailableError, match="is a folder"):
            await manager.__aenter__()

        with pytest.raises(UnavailableError, match="was shut down"):
            await manager.initialize()

    async def test_failure_to_load_raises(
        self, database: Database, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        async def fail(work: Any) -> Any:
            raise UnavailableError("the disk is gone")

        manager = StateManager(database, auto_sync_interval=30)
        with monkeypatch.context() as broken:
            broken.setattr(database, "read", fail)
            with pytest.raises(UnavailableError, match="the disk is gone"):
                await manager.initialize()

        assert not manager.is_initialized
        assert await manager.initialize() is True
        await manager.shutdown()

    async def test_database_that_is_newer_raises(
        self, database: Database, location: Location
    ) -> None:
        execute(location, "UPDATE alembic_version SET version_num = '9999'")
        manager = StateManager(Database(location))

        with pytest.raises(SchemaMismatchError, match="install the newer version"):
            await manager.initialize()

        assert not manager.is_initialized
        await manager.shutdown()

    async def test_belongs_to_one_loop(self, manager: StateManager) -> None:
        def elsewhere() -> Any:
            return asyncio.run(manager.get_state())

        with pytest.raises(UnavailableError, match="make another StateManager for this"):
            await asyncio.to_thread(elsewhere)

    @for_each("given", ["postgresql://scott:tiger@db1/cluster", Path("cluster.db"), None])
    async def test_manager_of_no_database(self, given: Any) -> None:
        with pytest.raises(InvalidDataError, match="database: must be a Database, as") as caught:
            StateManager(given)

        assert "tiger" not in str(caught.value)

    @for_each("interval", [0, -1, math.nan, math.inf, "30", True])
    async def test_interval_that_is_none(self, location: Location, interval: Any) -> None:
        with pytest.raises(InvalidDataError, match="auto_sync_interval"):
            StateManager(Database(location), auto_sync_interval=interval)

    @for_each("size", [-1, 1.5, None, True])
    async def test_size_of_the_cache_that_is_none(self, location: Location, size: Any) -> None:
        with pytest.raises(InvalidDataError, match="finished_cache_size"):
            StateManager(Database(location), finished_cache_size=size)

    def test_backoff_that_is_none(self, location: Location) -> None:
        with pytest.raises(InvalidDataError, match="backoff: must be a Backoff, not int"):
            StateManager(Database(location), backoff=5)  # type: ignore[arg-type]  # the point

    async def test_repr_tells_where_it_stands(
        self, manager: StateManager, make_task: MakeTask
    ) -> None:
        await manager.add_task(make_task())

        assert repr(manager) == f"<StateManager of {manager.db!r}, version 1>"
        await manager.shutdown()
        assert repr(manager) == f"<StateManager of {manager.db!r}, shut down>"
        unused = StateManager(Database(":memory:"))
        assert repr(unused) == f"<StateManager of {unused.db!r}, not initialized>"


class TestAutomaticSynchronisation:
    async def test_writes_what_is_unsaved_and_reads_what_is_new(
        self, manager: StateManager, open_manager: OpenManager, make_task: MakeTask
    ) -> None:
        automatic = await open_manager(auto_sync_interval=0.01)
        unsaved, new = make_task(), make_task()

        await automatic.add_task(unsaved, persist=False)
        await manager.add_task(new)

        async def has_synchronised() -> bool:
            is_written = await manager.task_repo.get(unsaved.task_id) is not None
            return is_written and new.task_id in (await automatic.get_state()).tasks

        await eventually(has_synchronised)

    @pytest.mark.parametrize("work", ["write", "read"])
    async def test_goes_on_after_an_error_which_is_logged(
        self, manager: StateManager, open_manager: OpenManager, make_task: MakeTask,
        monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, work: str,
    ) -> None:  # fmt: skip
        automatic = await open_manager(auto_sync_interval=0.01)
        real, calls = getattr(automatic.db, work), count()

        async def fail_once(*arguments: Any) -> Any:
            if next(calls) == 0:
                raise UnavailableError("the disk is gone")
            return await real(*arguments)

        unsaved = make_task()
        await automatic.add_task(unsaved, persist=False)
        monkeypatch.setattr(automatic.db, work, fail_once)

        async def is_written() -> bool:
            return (
                await manager.task_repo.get(unsaved.task_id) is not None
                and "the disk is gone" in caplog.text
            )

        await eventually(is_written)
        errors = [record for record in caplog.records if record.levelno == logging.ERROR]
        assert len(errors) == 1
        assert errors[0].exc_info is not None

    async def test_goes_on_after_a_conflict(
        self, manager: StateManager, open_manager: OpenManager, make_task: MakeTask
    ) -> None:
        automatic = await open_manager(auto_sync_interval=0.3)
        await automatic.add_task(make_task(task_id="twice", name="mine"), persist=False)
        await manager.add_task(make_task(task_id="twice", name="theirs"))

        async def has_taken_over() -> bool:
            task = await automatic.get_task("twice")
            return task is not None and task.name == "theirs"

        await eventually(has_taken_over)
        assert await manager.task_repo.count_by_status() == 1


def test_constants_are_those_of_the_promises() -> None:
    assert heartbeat_writer.HEARTBEAT_SECONDS < 1
    assert retention.CLEANUP_BATCH <= 1_000
