"""The specification, example by example: what its users write keeps working."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from conftest import FakeClock, Location, execute

from openclaw_store import (
    Database,
    DuplicateError,
    NodeInfo,
    NodeNotFoundError,
    NodeRepository,
    NodeStatus,
    StateManager,
    Task,
    TaskNotFoundError,
    TaskPriority,
    TaskRepository,
    TaskStatus,
    TaskType,
    UnavailableError,
)


@pytest.fixture
def task() -> Task:
    """The task of the specification."""
    return Task.create(
        task_type=TaskType.BATCH,
        name="data_processing",
        description="处理大数据集",
        required_skills=["python", "data_processing"],
        priority=TaskPriority.HIGH,
        user_id="user_001",
    )


@pytest.fixture
def node() -> NodeInfo:
    """The node of the specification."""
    return NodeInfo(
        node_id="worker_001",
        hostname="worker-host-1",
        platform="linux",
        arch="x64",
        status=NodeStatus.ONLINE,
        available_skills=["python", "data_processing"],
        max_concurrent_tasks=5,
        registered_at=datetime.now(),
        last_heartbeat=datetime.now(),
    )


INSERT = """
INSERT INTO tasks (task_id, task_type, name, description, required_skills, status, priority)
VALUES ('by-hand', 'batch', 'a name', 'some text', '[]', 'pending', 1)
"""
"""What somebody may write by hand, as the specification's columns allow."""


def bytes_of(path: Path) -> int:
    return path.stat().st_size


class TestDatabase:
    async def test_initialize_makes_folder_and_tables(self, tmp_path: Path) -> None:
        db = Database(str(tmp_path / "data" / "cluster.db"))

        await db.initialize()

        tables = execute(tmp_path / "data" / "cluster.db", "SELECT name FROM sqlite_master")
        assert {("tasks",), ("nodes",)} <= set(tables)
        await db.close()

    async def test_initialize_and_close_may_be_called_twice(self, location: Location) -> None:
        db = Database(db_path=location)

        for _ in range(2):
            await db.initialize()
        for _ in range(2):
            await db.close()

    async def test_use_after_close_raises(self, location: Location) -> None:
        db = Database(location)
        await db.initialize()
        await db.close()

        for call in (db.get_stats, db.vacuum, db.initialize, TaskRepository(db).count_by_status):
            with pytest.raises(UnavailableError, match="closed"):
                await call()

    async def test_use_before_initialize_raises(self, location: Location) -> None:
        db = Database(location)

        for call in (db.get_stats, db.vacuum, TaskRepository(db).count_by_status):
            with pytest.raises(UnavailableError, match="initialize"):
                await call()

    async def test_data_survives_a_restart(
        self, location: Location, task: Task, node: NodeInfo
    ) -> None:
        async with Database(location) as db:
            await TaskRepository(db).create(task)
            await NodeRepository(db).create(node)

        async with Database(location) as db:
            assert await TaskRepository(db).get(task.task_id) == task
            assert await NodeRepository(db).get("worker_001") == node

    async def test_memory_is_a_private_database(self, task: Task) -> None:
        async with Database(":memory:") as first, Database(":memory:") as second:
            await TaskRepository(first).create(task)

            assert await TaskRepository(first).count_by_status() == 1
            assert await TaskRepository(second).count_by_status() == 0
            assert first.db_path == ":memory:"

    async def test_transaction_is_all_or_nothing(self, database: Database, task: Task) -> None:
        async def change_my_mind() -> None:
            async with database.transaction() as tx:
                await TaskRepository(tx).create(task)
                raise RuntimeError("changed my mind")

        with pytest.raises(RuntimeError, match="changed my mind"):
            await change_my_mind()

        assert await TaskRepository(database).get(task.task_id) is None

    @pytest.mark.sqlite
    async def test_backup_is_a_complete_database(
        self, database: Database, task: Task, tmp_path: Path
    ) -> None:
        await TaskRepository(database).create(task)

        await database.backup(str(tmp_path / "backup.db"))

        async with Database(tmp_path / "backup.db") as copy:
            assert await TaskRepository(copy).get(task.task_id) == task

    @pytest.mark.sqlite  # PostgreSQL keeps it for rows to come
    async def test_vacuum_gives_space_back(self, database: Database) -> None:
        tasks = TaskRepository(database)
        async with database.transaction() as tx:
            for _ in range(50):
                blob = {"blob": "x" * 20_000}
                await TaskRepository(tx).create(Task.create(TaskType.BATCH, "x", parameters=blob))
        before = await database.get_stats()
        for task in await tasks.list_by_status(TaskStatus.PENDING):
            await tasks.delete(task.task_id)

        await database.vacuum()

        assert (await database.get_stats())["db_size"] < before["db_size"] / 2

    async def test_get_stats(
        self, database: Database, location: Location, task: Task, node: NodeInfo
    ) -> None:
        await TaskRepository(database).create(task)
        await NodeRepository(database).create(node)

        stats = await database.get_stats()

        if isinstance(location, Path):
            wal = location.with_name(location.name + "-wal")
            assert bytes_of(wal) > 0
            assert stats["db_size"] == bytes_of(location) + bytes_of(wal)
        assert stats["db_size"] > 0
        del stats["db_size"], stats["writer"]  # the latter came later
        assert stats == {
            "db_path": str(location).replace("+asyncpg", ""),
            "task_count": 1,
            "node_count": 1,
            "task_stats": {"pending": 1},
            "node_stats": {"online": 1},
        }


class TestTaskRepository:
    @pytest.fixture
    def task_repo(self, database: Database) -> TaskRepository:
        return TaskRepository(database)

    async def test_create_task(self, task_repo: TaskRepository, task: Task) -> None:
        assert await task_repo.create(task) is True

        stored = await task_repo.get(task.task_id)
        assert stored == task
        assert stored is not task

    async def test_create_used_id(self, task_repo: TaskRepository, task: Task) -> None:
        await task_repo.create(task)

        with pytest.raises(DuplicateError):
            await task_repo.create(task)

    async def test_get_unknown_task(self, task_repo: TaskRepository) -> None:
        assert await task_repo.get("unknown") is None

    async def test_update_the_same_object_again_and_again(
        self, task_repo: TaskRepository, task: Task
    ) -> None:
        await task_repo.create(task)

        for status in (TaskStatus.SCHEDULED, TaskStatus.RUNNING, TaskStatus.COMPLETED):
            task.status = status
            assert await task_repo.update(task) is True

        assert await task_repo.get(task.task_id) == task

    async def test_update_unknown_task(self, task_repo: TaskRepository, task: Task) -> None:
        with pytest.raises(TaskNotFoundError):
            await task_repo.update(task)

    async def test_delete_task(self, task_repo: TaskRepository, task: Task) -> None:
        await task_repo.create(task)

        assert await task_repo.delete(task.task_id) is True
        assert await task_repo.get(task.task_id) is None
        assert await task_repo.delete(task.task_id) is False

    async def test_list_pending_tasks(self, task_repo: TaskRepository, task: Task) -> None:
        await task_repo.create(task)

        assert await task_repo.list_pending_tasks() == [task]

    async def test_list_by_status_node_and_user(
        self, task_repo: TaskRepository, task: Task
    ) -> None:
        task.assigned_node = "worker_001"
        await task_repo.create(task)

        assert await task_repo.list_by_status(TaskStatus.PENDING) == [task]
        assert await task_repo.list_by_node("worker_001") == [task]
        assert await task_repo.list_by_user("user_001") == [task]

    async def test_count_by_status(self, task_repo: TaskRepository, task: Task) -> None:
        await task_repo.create(task)

        assert await task_repo.count_by_status(TaskStatus.PENDING) == 1
        assert await task_repo.count_by_status(TaskStatus.FAILED) == 0
        assert await task_repo.count_by_status() == 1

    async def test_cleanup_old_tasks(self, database: Database, clock: FakeClock) -> None:
        task_repo = TaskRepository(database)
        old = Task.create(TaskType.BATCH, "old")
        old.status, old.completed_at = TaskStatus.COMPLETED, clock() - timedelta(days=31)
        await task_repo.create(old)

        deleted_count = await task_repo.cleanup_old_tasks(days=30)

        assert deleted_count == 1
        assert await task_repo.get(old.task_id) is None


class TestNodeRepository:
    @pytest.fixture
    def node_repo(self, database: Database) -> NodeRepository:
        return NodeRepository(database)

    async def test_create_node(self, node_repo: NodeRepository, node: NodeInfo) -> None:
        assert await node_repo.create(node) is True

        assert await node_repo.get("worker_001") == node

    async def test_update_node(self, node_repo: NodeRepository, node: NodeInfo) -> None:
        await node_repo.create(node)

        for running_tasks in (1, 2, 3):
            node.running_tasks = running_tasks
            assert await node_repo.update(node) is True

        assert await node_repo.get("worker_001") == node

    async def test_update_unknown_node(self, node_repo: NodeRepository, node: NodeInfo) -> None:
        with pytest.raises(NodeNotFoundError):
            await node_repo.update(node)

    async def test_delete_node(self, node_repo: NodeRepository, node: NodeInfo) -> None:
        await node_repo.create(node)

        assert await node_repo.delete("worker_001") is True
        assert await node_repo.get("worker_001") is None
        assert await node_repo.delete("worker_001") is False

    async def test_lists(self, node_repo: NodeRepository, node: NodeInfo) -> None:
        await node_repo.create(node)

        for found in (
            await node_repo.list_by_status(NodeStatus.ONLINE),
            await node_repo.list_online_nodes(),
            await node_repo.get_all_nodes(),
            await node_repo.find_by_skill("python"),
            await node_repo.get_available_nodes(),
        ):
            assert found == [node]

    async def test_update_heartbeat_and_status(
        self, node_repo: NodeRepository, node: NodeInfo
    ) -> None:
        await node_repo.create(node)

        assert await node_repo.update_heartbeat("worker_001") is True
        assert await node_repo.update_status("worker_001", NodeStatus.BUSY) is True
        assert await node_repo.update_heartbeat("unknown") is False
        assert await node_repo.update_status("unknown", NodeStatus.BUSY) is False

    async def test_find_stale_nodes(self, database: Database, clock: FakeClock) -> None:
        node_repo = NodeRepository(database)
        await node_repo.create(NodeInfo("worker_001", "host", last_heartbeat=clock()))

        clock.advance(seconds=121)

        assert [node.node_id for node in await node_repo.find_stale_nodes()] == ["worker_001"]


class TestStateManager:
    @pytest.fixture
    def state_manager(self, manager: StateManager) -> StateManager:
        return manager

    async def test_is_made_as_in_the_specification(self, location: Location) -> None:
        db = Database(db_path=str(location))
        state_manager = StateManager(database=db, auto_sync_interval=30)

        assert await state_manager.initialize() is True

        assert state_manager.is_initialized
        assert state_manager.db is db
        assert isinstance(state_manager.task_repo, TaskRepository)
        assert isinstance(state_manager.node_repo, NodeRepository)
        await state_manager.shutdown()
        assert not state_manager.is_initialized

    async def test_manage_nodes(self, state_manager: StateManager, node: NodeInfo) -> None:
        assert await state_manager.add_node(node) is True
        assert await state_manager.get_node("worker_001") == node

        assert await state_manager.update_node_status("worker_001", NodeStatus.BUSY) is True
        assert await state_manager.get_online_nodes() == []
        assert await state_manager.get_available_nodes() == []

        assert await state_manager.update_node_status("worker_001", NodeStatus.ONLINE) is True
        [online] = await state_manager.get_online_nodes()
        [available] = await state_manager.get_available_nodes()
        assert online.node_id == available.node_id == "worker_001"

    async def test_manage_tasks(self, state_manager: StateManager, task: Task) -> None:
        assert await state_manager.add_task(task) is True

        task.assigned_node = "worker_001"
        task.status = TaskStatus.SCHEDULED
        assert await state_manager.update_task(task) is True
        assert await state_manager.get_pending_tasks() == [task]

        task.status = TaskStatus.RUNNING
        assert await state_manager.update_task(task) is True
        assert await state_manager.get_pending_tasks() == []
        assert await state_manager.get_task(task.task_id) == task

    async def test_query_state(
        self, state_manager: StateManager, task: Task, node: NodeInfo
    ) -> None:
        await state_manager.add_node(node)
        await state_manager.add_task(task)

        state = await state_manager.get_state()

        assert state.total_nodes == 1
        assert state.online_nodes == 1
        assert state.total_tasks == 1
        assert state.running_tasks == 0
        assert state.nodes == {"worker_001": node}
        assert state.tasks == {task.task_id: task}

    async def test_check_stale_nodes(self, state_manager: StateManager, clock: FakeClock) -> None:
        await state_manager.add_node(NodeInfo("worker_001", "host", last_heartbeat=clock()))

        clock.advance(seconds=121)
        stale_nodes = await state_manager.check_stale_nodes(timeout_seconds=120)

        assert stale_nodes == ["worker_001"]

    async def test_errors_are_raised_and_can_be_caught(
        self, state_manager: StateManager, task: Task
    ) -> None:
        await state_manager.add_task(task)
        caught: list[str] = []

        try:
            await state_manager.add_task(task)
        except Exception as error:
            caught.append(f"添加任务失败: {error}")

        assert len(caught) == 1

    async def test_shutdown_keeps_everything(
        self, state_manager: StateManager, location: Location, task: Task, node: NodeInfo
    ) -> None:
        await state_manager.add_node(node, persist=False)
        await state_manager.add_task(task, persist=False)

        await state_manager.shutdown()

        async with Database(location) as database:
            assert await NodeRepository(database).get("worker_001") is not None
            assert await TaskRepository(database).get(task.task_id) is not None


class TestIntegration:
    async def test_life_of_a_task(
        self, location: Location, task: Task, node: NodeInfo, clock: FakeClock
    ) -> None:
        node.last_heartbeat = None
        async with StateManager(Database(location, clock=clock)) as store:
            await store.add_node(node)
            await store.add_task(task)

            [waiting] = await store.get_pending_tasks()
            [free] = await store.get_available_nodes()
            waiting.assigned_node = free.node_id
            waiting.status, waiting.scheduled_at = TaskStatus.SCHEDULED, clock()
            await store.update_task(waiting)
            waiting.status, waiting.started_at = TaskStatus.RUNNING, clock.advance(seconds=1)
            await store.update_task(waiting)
            await store.update_heartbeat(free.node_id, cpu_usage=90, running_tasks=1)
            waiting.status, waiting.completed_at = TaskStatus.COMPLETED, clock.advance(seconds=9)
            waiting.result = {"rows": 1_000}
            await store.update_task(waiting)
            await store.update_heartbeat(free.node_id, cpu_usage=1, running_tasks=0)

        async with StateManager(Database(location, clock=clock)) as store:
            finished = await store.get_task(task.task_id)
            assert finished == waiting
            assert finished.result == {"rows": 1_000}
            state = await store.get_state()
            assert (state.total_tasks, state.running_tasks, len(state.tasks)) == (1, 0, 0)
            stored = await store.get_node("worker_001")
            assert stored is not None
            assert (stored.cpu_usage, stored.running_tasks) == (1.0, 0)

    async def test_lost_node_gives_its_tasks_to_another(
        self, location: Location, clock: FakeClock
    ) -> None:
        async with StateManager(Database(location, clock=clock)) as store:
            for name in ("worker_001", "worker_002"):
                await store.add_node(NodeInfo(name, "host", last_heartbeat=clock()))
            lost = Task.create(TaskType.BATCH, "x")
            lost.status, lost.assigned_node = TaskStatus.RUNNING, "worker_001"
            await store.add_task(lost)

            clock.advance(seconds=121)
            await store.update_heartbeat("worker_002")
            for node_id in await store.check_stale_nodes(timeout_seconds=120):
                for task in await store.task_repo.list_by_node(node_id):
                    task.assigned_node = "worker_002"
                    await store.update_task(task)

            assert [task.task_id for task in await store.task_repo.list_by_node("worker_002")] == [
                lost.task_id
            ]
            assert await store.get_node_stats() == {
                "total": 2,
                "online": 1,
                "offline": 1,
                "busy": 0,
            }

    async def test_row_inserted_by_hand_is_legal_and_readable(
        self, database: Database, location: Location
    ) -> None:
        execute(location, INSERT)

        async with StateManager(database, auto_sync_interval=None) as store:
            task = await store.get_task("by-hand")
            assert task is not None
            assert task.submitted_at is not None
            assert datetime.now(UTC) - task.submitted_at < timedelta(minutes=1)
            assert task == Task(
                "by-hand",
                TaskType.BATCH,
                "a name",
                "some text",
                priority=TaskPriority.HIGH,
                submitted_at=task.submitted_at,
                updated_at=task.updated_at,
            )
            assert await store.get_pending_tasks() == [task]
            assert (await store.get_state()).total_tasks == 1

            task.status = TaskStatus.RUNNING
            assert await store.update_task(task) is True
            assert await store.task_repo.get("by-hand") == task

    async def test_row_inserted_by_hand_meanwhile_is_counted_after_the_next_refresh(
        self, manager: StateManager, location: Location
    ) -> None:
        execute(location, INSERT)

        await manager.change_task("by-hand", lambda task: setattr(task, "status", "running"))
        await manager.refresh_from_database()

        stats = await manager.get_task_stats()
        assert (stats["total"], stats["pending"], stats["running"]) == (1, 0, 1)
        assert list((await manager.get_state()).tasks) == ["by-hand"]

    @pytest.mark.parametrize("value", [0, False, "", [], {}, 0.0])
    async def test_falsy_results_come_back_as_themselves_after_a_restart(
        self, location: Location, value: Any, task: Task
    ) -> None:
        async with StateManager(Database(location)) as store:
            task.status, task.result = TaskStatus.COMPLETED, value
            await store.add_task(task)

        async with StateManager(Database(location)) as store:
            stored = await store.get_task(task.task_id)
            assert stored is not None
            assert repr(stored.result) == repr(value)
