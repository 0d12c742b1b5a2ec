"""What a review under faults found, one test for each finding."""

from __future__ import annotations

import asyncio
import sqlite3
import sys
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from conftest import (
    FakeClock,
    Location,
    MakeNode,
    MakeTask,
    OpenManager,
    execute,
    locked,
    refuse_tasks,
)
from sqlalchemy import text

from openclaw_store import (
    Database,
    DeadlineError,
    InvalidDataError,
    NodeInfo,
    NodeNotFoundError,
    NodeRepository,
    NodeStatus,
    StateManager,
    StoreError,
    TaskRepository,
    TaskStatus,
    UnavailableError,
)
from openclaw_store.state_manager import heartbeat_writer


class RefusedError(Exception):
    """What makes a block fail."""


class TestTransactions:
    async def test_savepoint_is_refused_and_nothing_is_written(
        self, manager: StateManager, make_task: MakeTask
    ) -> None:
        """Its rollback would not reach the feed, nor what the driver did on its own."""

        async def nest() -> None:
            async with manager.db.transaction() as tx:
                await TaskRepository(tx).create(make_task())
                async with tx.begin_nested():
                    pass

        with pytest.raises(StoreError, match="savepoints"):
            await nest()

        assert await manager.task_repo.count_by_status() == 0
        assert (await manager.get_task_stats())["total"] == 0

    async def test_write_that_the_driver_refused_cannot_be_committed(
        self, manager: StateManager, location: Location, make_task: MakeTask
    ) -> None:
        """The feed knew of the row already, though the block caught the error."""
        refuse_tasks(location, "bad")

        async def catch() -> None:
            async with manager.db.transaction() as tx:
                await TaskRepository(tx).create(make_task())
                with pytest.raises(InvalidDataError):
                    await TaskRepository(tx).create(make_task(name="bad"))

        with pytest.raises(StoreError, match="all of it was rolled back"):
            await catch()
        assert await manager.task_repo.count_by_status() == 0
        assert manager.version == 0

    async def test_calls_at_once_in_one_transaction_take_turns(
        self, manager: StateManager, make_task: MakeTask
    ) -> None:
        async with manager.db.transaction() as tx:
            tasks = TaskRepository(tx)
            await asyncio.gather(*[tasks.create(make_task()) for _ in range(5)])

        assert await manager.task_repo.count_by_status() == 5
        assert manager.version == 5

    async def test_block_that_raised_does_not_forbid_writing_afterwards(
        self, database: Database, make_task: MakeTask
    ) -> None:
        """A task made in the block has its context for ever."""
        go = asyncio.Event()

        async def write_later() -> bool:
            await go.wait()
            return await TaskRepository(database).create(make_task())

        async def fail() -> asyncio.Task[bool]:
            task: asyncio.Task[bool] | None = None
            try:
                async with database.transaction():
                    task = asyncio.create_task(write_later())
                    raise RefusedError
            except RefusedError:
                assert task is not None
            return task

        later = await fail()
        go.set()

        assert await later is True

    async def test_another_database_can_be_written_meanwhile(
        self, database: Database, tmp_path: Path, make_task: MakeTask
    ) -> None:
        async with Database(tmp_path / "other.db") as other, database.transaction():
            assert await TaskRepository(other).create(make_task()) is True

    async def test_own_database_cannot(self, database: Database, make_task: MakeTask) -> None:
        async with database.transaction():
            with pytest.raises(DeadlineError, match="wait for the transaction it is in"):
                await TaskRepository(database).create(make_task())

    @pytest.mark.usefixtures("migrated")
    async def test_that_waits_when_the_database_closes_is_refused(
        self, location: Location, make_task: MakeTask
    ) -> None:
        database = Database(location)
        await database.initialize()
        entered, leave = asyncio.Event(), asyncio.Event()

        async def transact() -> None:
            async with database.transaction() as tx:
                entered.set()
                await leave.wait()
                await TaskRepository(tx).create(make_task())

        first = asyncio.create_task(transact())
        await entered.wait()
        second = asyncio.create_task(transact())
        await asyncio.sleep(0)
        closing_it = asyncio.create_task(database.close())
        await asyncio.sleep(0)
        leave.set()

        await asyncio.gather(first, closing_it)
        with pytest.raises(UnavailableError, match="closed"):
            await second

    async def test_faults_of_another_database_keep_their_names(
        self, database: Database, tmp_path: Path
    ) -> None:
        async with database.session():
            with (
                pytest.raises(sqlite3.OperationalError, match="no such table"),
                closing(sqlite3.connect(tmp_path / "own.db")) as own,
            ):
                own.execute("SELECT * FROM missing")


class TestHeartbeats:
    async def test_that_came_in_a_block_that_raised_is_written(
        self, manager: StateManager, make_node: MakeNode, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """The timer had the context of the transaction, and so had all after it."""
        monkeypatch.setattr(heartbeat_writer, "HEARTBEAT_SECONDS", 0.01)
        node = make_node()
        await manager.add_node(node)

        try:
            async with manager.db.transaction():
                await manager.update_heartbeat(node.node_id, cpu_usage=5)
                raise RefusedError
        except RefusedError:
            pass

        await eventually_cpu(manager, node.node_id, 5)

    @pytest.mark.usefixtures("migrated")
    async def test_that_a_failed_write_took_along_is_written(
        self, location: Location, make_node: MakeNode, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        node = make_node()
        async with StateManager(Database(location, timeout=0.2), None) as manager:
            await manager.add_node(node)
            await manager.update_heartbeat(node.node_id, cpu_usage=9)
            writer = manager._replica.heartbeat_writer
            writer.flush_later()
            assert writer._timer is not None
            writer._timer.cancel()  # so that only the failed write has it
            writer._timer = None
            monkeypatch.setattr(heartbeat_writer, "HEARTBEAT_SECONDS", 0.01)

            async with locked(location):
                with pytest.raises(UnavailableError):
                    await manager.update_node_status(node.node_id, NodeStatus.BUSY)

            await eventually_cpu(manager, node.node_id, 9)

    async def test_of_a_node_that_was_removed_is_not_given_to_its_successor(
        self, manager: StateManager, open_manager: OpenManager, make_node: MakeNode
    ) -> None:
        node, other = make_node(), await open_manager()
        await manager.add_node(node)
        await manager.update_heartbeat(node.node_id, cpu_usage=77)
        await other.refresh_from_database()
        await other.remove_node(node.node_id)

        with pytest.raises(NodeNotFoundError):
            await manager.update_node(node)
        await manager.add_node(make_node(node_id=node.node_id))
        await manager.sync_to_database()

        shown, stored = await both(manager, node.node_id)
        assert shown.cpu_usage == stored.cpu_usage == 0

    async def test_reading_from_before_does_not_take_it_back(
        self, manager: StateManager, make_node: MakeNode, clock: FakeClock,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:  # fmt: skip
        node = make_node()
        await manager.add_node(node)
        await manager.update_heartbeat(node.node_id, cpu_usage=1)
        await manager.sync_to_database()
        manager._replica.cache.heartbeat_sequence = 0  # as if another process had written it
        read = manager.db.read

        async def read_and_be_overtaken(work: Any) -> Any:
            batch = await read(work)
            monkeypatch.undo()
            clock.advance(seconds=1)
            await manager.update_heartbeat(node.node_id, cpu_usage=2)
            await manager.sync_to_database()
            return batch

        monkeypatch.setattr(manager.db, "read", read_and_be_overtaken)
        await manager.refresh_from_database()

        shown, stored = await both(manager, node.node_id)
        assert shown == stored
        assert shown.cpu_usage == 2

    async def test_flush_that_takes_long_is_not_overtaken_by_the_next(
        self, manager: StateManager, make_node: MakeNode, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Else the last one is no longer the one to wait for before the database is closed."""
        monkeypatch.setattr(heartbeat_writer, "HEARTBEAT_SECONDS", 3600)
        node = make_node()
        await manager.add_node(node)
        write, go, written = manager.db.write, asyncio.Event(), []

        async def write_when_told(apply: Any, operation: Any) -> Any:
            written.append(operation)
            await go.wait()
            return await write(apply, operation)

        monkeypatch.setattr(manager.db, "write", write_when_told)
        flushes = []
        for cpu_usage in (1, 2):
            await manager.update_heartbeat(node.node_id, cpu_usage=cpu_usage)
            manager._replica.heartbeat_writer._flush_now()  # as the timer does
            flushes.append(manager._replica.heartbeat_writer._flush)
            await asyncio.sleep(0)
        at_first = len(written)
        go.set()
        await manager.shutdown()

        assert (at_first, len(written)) == (1, 2)
        assert [flush is not None and flush.done() for flush in flushes] == [True, True]

    async def test_that_a_cancelled_check_took_along_is_written(
        self,
        manager: StateManager,
        make_node: MakeNode,
        clock: FakeClock,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        """Cancelled before its operations had begun, it never gave the heartbeat back."""
        node = make_node()
        await manager.add_node(node)
        clock.advance(seconds=300)
        find = manager.node_repo.find_stale_nodes

        async def find_then_be_cancelled(timeout_seconds: float) -> list[NodeInfo]:
            found = await find(timeout_seconds)
            await manager.update_heartbeat(node.node_id, cpu_usage=42)
            asyncio.get_running_loop().call_soon(check.cancel)
            return found

        monkeypatch.setattr(manager.node_repo, "find_stale_nodes", find_then_be_cancelled)
        check = asyncio.create_task(manager.check_stale_nodes())
        await asyncio.wait([check])
        monkeypatch.undo()
        await manager.sync_to_database()

        shown, stored = await both(manager, node.node_id)
        assert check.cancelled()
        assert (shown.cpu_usage, stored.cpu_usage) == (42, 42)
        assert await manager.check_stale_nodes(120) == []

    async def test_of_two_flushes_the_second_does_not_bring_the_usage_of_the_first_back(
        self, manager: StateManager, make_node: MakeNode, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        node = make_node()
        await manager.add_node(node)
        await manager.update_heartbeat(node.node_id, cpu_usage=10)
        await manager._replica.heartbeat_writer.flush()
        await manager.change_node(node.node_id, lambda node: setattr(node, "cpu_usage", 50))
        read = manager.db.read

        async def read_then_beat(work: Any) -> Any:
            batch = await read(work)
            monkeypatch.undo()
            await manager.update_heartbeat(node.node_id, memory_usage=20)
            await manager._replica.heartbeat_writer.flush()  # while the batch are on their way
            return batch

        monkeypatch.setattr(manager.db, "read", read_then_beat)
        await manager.refresh_from_database()

        shown, stored = await both(manager, node.node_id)
        assert (shown.cpu_usage, stored.cpu_usage) == (50, 50)

    async def test_from_before_brings_no_node_back_that_is_set_offline_in_the_same_batch(
        self, manager: StateManager, make_node: MakeNode, clock: FakeClock
    ) -> None:
        node = make_node()
        await manager.add_node(node)
        await manager.update_heartbeat(node.node_id)
        clock.advance(seconds=1)

        await asyncio.gather(
            manager.node_repo.update_status(node.node_id, NodeStatus.OFFLINE),
            manager._replica.heartbeat_writer.flush(),
        )

        stored = await manager.node_repo.get(node.node_id)
        assert stored is not None
        assert stored.status is NodeStatus.OFFLINE

    async def test_in_a_transaction_does_not_hinder_reading_there(
        self, database: Database, make_node: MakeNode
    ) -> None:
        node = make_node()
        await NodeRepository(database).create(node)

        async with database.transaction() as tx:
            await NodeRepository(tx).update_heartbeat(node.node_id)
            found = await NodeRepository(tx).get(node.node_id)

        assert found is not None
        assert found.last_heartbeat is not None


class TestRowsWrittenByHand:
    async def test_version_that_leads_ahead_is_read_once_more_and_not_for_ever(
        self, manager: StateManager, location: Location
    ) -> None:
        execute(
            location,
            "INSERT INTO tasks (task_id, task_type, name, status, version) "
            "VALUES ('t', 'batch', '', 'completed', 1000000)",
        )

        task = await manager.get_task("t")

        assert task is not None
        assert task.version == 1_000_000

    async def test_history_that_leads_in_a_circle_is_cleaned_up(
        self, database: Database, clock: FakeClock, location: Location
    ) -> None:
        """Its version was that of the change which the store made next."""
        execute(
            location,
            "INSERT INTO tasks (task_id, task_type, name, version) VALUES ('t', 'batch', '', 1)",
        )
        tasks = TaskRepository(database)
        task = await tasks.get("t")
        assert task is not None
        task.status, task.completed_at = TaskStatus.COMPLETED, clock()
        await tasks.update(task)
        clock.advance(days=31)

        assert await tasks.cleanup_old_tasks() == 1

    @pytest.mark.sqlite  # PostgreSQL lets nothing else into the column
    async def test_one_that_cannot_be_read_is_named_and_hides_no_other(
        self, database: Database, location: Location, make_task: MakeTask, make_node: MakeNode
    ) -> None:
        node = make_node(running_tasks=1)
        bad = make_task(status=TaskStatus.RUNNING, assigned_node=node.node_id)
        good = make_task()
        await NodeRepository(database).create(node)
        await TaskRepository(database).create(bad)
        execute(location, "UPDATE tasks SET started_at = 'at ten'")
        said: list[Any] = []  # a task that is removed need not be read
        loop = asyncio.get_running_loop()
        loop.set_exception_handler(lambda _, context: said.append(context["exception"]))
        async with StateManager(database, None) as manager:
            with pytest.raises(InvalidDataError, match=f"started_at: of '{bad.task_id}'"):
                await manager.get_task(bad.task_id)

            await asyncio.gather(manager.remove_task(bad.task_id), manager.add_task(good))

            assert await manager.get_pending_tasks() == [good]
            assert await manager.get_available_nodes() == [
                replace(node, running_tasks=0, version=5)
            ]
        assert said == []


class TestSynchronisation:
    async def test_that_is_cancelled_in_a_batch_ends_its_entries(
        self, manager: StateManager, location: Location, make_task: MakeTask
    ) -> None:
        """The entry was committed, yet stayed unsaved, and then lost to itself."""
        task = make_task()
        await manager.add_task(task, persist=False)
        async with locked(location) as lock:
            writing = asyncio.create_task(manager.sync_to_database())
            await asyncio.wait([writing], timeout=0.05)
            writing.cancel()
            await asyncio.wait([writing], timeout=0.05)
            await lock.rollback()
            with pytest.raises(asyncio.CancelledError):
                await writing

        task.name = "changed"
        await manager.update_task(task, persist=False)
        await manager.sync_to_database()

        stored = await manager.task_repo.get(task.task_id)
        assert stored is not None
        assert stored.name == "changed"
        assert await manager.get_task(task.task_id) == stored

    async def test_entry_of_which_nobody_could_tell_whether_it_was_written_is_no_conflict(
        self, manager: StateManager, make_task: MakeTask, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        task = make_task()
        await manager.add_task(task, persist=False)
        write = manager.db.write

        def write_and_fail(apply: Any, operation: Any) -> Any:
            async def run() -> None:
                await write(apply, operation)
                raise UnavailableError("the disk failed while committing")

            return run()

        monkeypatch.setattr(manager.db, "write", write_and_fail)
        with pytest.raises(UnavailableError):
            await manager.sync_to_database()
        monkeypatch.undo()

        assert await manager.sync_to_database() is True
        task.name = "changed"
        assert await manager.update_task(task) is True


class TestProcesses:
    async def test_end_of_a_forked_child_leaves_the_private_folder(self, tmp_path: Path) -> None:
        script = tmp_path / "fork.py"
        script.write_text(
            "import os, sys\n"
            "from openclaw_store import Database\n"
            "database = Database(':memory:')\n"
            "child = os.fork()\n"
            "if child == 0:\n"
            "    sys.exit()\n"
            "os.waitpid(child, 0)\n"
            "print(database._backend.path.parent.exists())\n"
        )

        process = await asyncio.create_subprocess_exec(
            sys.executable, str(script), stdout=asyncio.subprocess.PIPE
        )
        output, _ = await process.communicate()

        assert output.split() == [b"True"]

    async def test_missing_table_is_a_typed_error(
        self, database: Database, location: Location, make_task: MakeTask
    ) -> None:
        cascade = "" if isinstance(location, Path) else " CASCADE"  # to the function
        execute(location, f"DROP TABLE tasks{cascade}")
        missing = "no such table: tasks|(tasks|store_write).* does not exist"

        with pytest.raises(StoreError, match=missing):
            await TaskRepository(database).create(make_task())
        with pytest.raises(StoreError, match=missing):
            await TaskRepository(database).get("a")
        async with database.session() as session:
            with pytest.raises(Exception, match=missing):
                await session.execute(text("SELECT * FROM tasks"))


async def both(manager: StateManager, node_id: str) -> tuple[Any, Any]:
    """What the cache shows of a node, and what the database holds."""
    return await manager.get_node(node_id), await manager.node_repo.get(node_id)


async def eventually_cpu(manager: StateManager, node_id: str, cpu_usage: float) -> None:
    for _ in range(500):
        node = await manager.node_repo.get(node_id)
        if node is not None and node.cpu_usage == cpu_usage:
            return
        await asyncio.sleep(0.01)
    pytest.fail("the heartbeat was not written")
