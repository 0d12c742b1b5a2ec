"""`verify`: each fault is named, those that are safe are repaired, and a sound store is clean."""

from __future__ import annotations

import asyncio
import random
import sqlite3
import threading
from collections.abc import Awaitable, Callable
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from conftest import (
    EACH_KIND,
    FakeClock,
    Location,
    MakeNode,
    MakeTask,
    OpenManager,
    execute,
)
from sqlalchemy import insert
from sqlalchemy.ext.asyncio import AsyncSession
from support.machines import Machine, run_machine

from openclaw_store import (
    Database,
    InvalidDataError,
    NodeInfo,
    NodeStatus,
    SchemaMismatchError,
    StateManager,
    StoreError,
    Task,
    TaskFilter,
    TaskStatus,
    TaskType,
    UnavailableError,
    UnsavedConflictError,
    Verification,
    verify,
)
from openclaw_store.backends import backend_of
from openclaw_store.backends.sqlite.connections import reading_text
from openclaw_store.database import migrations
from openclaw_store.database.tables import TaskRow
from openclaw_store.domain import encode
from openclaw_store.maintenance import findings, row_checks
from openclaw_store.maintenance import repair as repairs
from openclaw_store.maintenance import verify as verification
from openclaw_store.maintenance.revisions import Revisions


def named(found: Verification) -> set[tuple[str, str | None, bool]]:
    """What is wrong, with which, and whether it can be repaired."""
    return {(one.invariant, one.item_id, one.is_safe) for one in found.problems}


def spoil(location: Location, *statements: str) -> None:
    """Change a database past the library, and past what it checks by itself."""
    if isinstance(location, Path):
        with sqlite3.connect(location) as connection:
            connection.execute("PRAGMA ignore_check_constraints = ON")
            for statement in statements:
                connection.execute(statement)
        connection.close()
    else:
        # In one message: a connection for each takes longer than all of them.
        execute(location, f"DO $all$ BEGIN {'; '.join(statements)}; END $all$")


def unchecked(location: Location) -> list[str]:
    """Statements that have a server take any text for an enumeration."""
    if isinstance(location, Path):
        return []
    return [
        f"ALTER TABLE {table} "
        + ", ".join(f"DROP CONSTRAINT IF EXISTS ck_{table}_{name}" for name in names)
        for table, names in (("tasks", ("status", "task_type")), ("nodes", ("status",)))
    ]


@pytest.fixture
async def cluster(
    manager: StateManager, clock: FakeClock, make_task: MakeTask, make_node: MakeNode
) -> StateManager:
    """A store that was used for a while, and where each kind of thing has happened.

    Of the tasks, `a` is completed, `b` running, `c` scheduled, `d` and `e` pending; node `n` holds
    `b` and `c`.
    """
    await manager.register_node(make_node(node_id="n"))
    await manager.add_node(make_node(node_id="idle", status=NodeStatus.OFFLINE))
    await manager.add_task(make_task(task_id="old", status=TaskStatus.FAILED))
    await manager.compact_changes(days=0)
    await manager.add_task(make_task(task_id="gone", status=TaskStatus.CANCELLED))
    clock.advance(days=40)
    await manager.task_repo.cleanup_old_tasks(days=30)  # the feed has a gap now
    await manager.add_tasks([make_task(task_id=id) for id in ("a", "b", "c", "d", "e", "f")])
    [a, b, _] = await manager.claim_tasks("n", limit=3)
    a = await manager.start_task(a)
    clock.advance(seconds=1)
    await manager.start_task(b)
    clock.advance(seconds=1)
    await manager.complete_task(a, {"rows": 1})
    clock.advance(seconds=1)
    await manager.change_task("a", lambda task: setattr(task, "name", "renamed"))
    await manager.remove_task("f")
    await manager.update_heartbeat("n", cpu_usage=1.0)
    await manager.sync_to_database()
    async with manager.db.transaction() as tx:
        values = {"task_type": "batch", "name": "by hand", "required_skills": []}
        await tx.execute(insert(TaskRow).values(task_id="hand", **values))
    return manager


class TestSound:
    async def test_rows_are_judged_beside_the_event_loop(
        self, cluster: StateManager, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """A row with JSON of 16 MiB took 0.08 s."""
        threads: list[int] = []

        def noted(value: Any) -> Any:
            threads.append(threading.get_ident())
            return encode(value)

        monkeypatch.setattr("openclaw_store.maintenance.row_checks.encode", noted)

        await verify(cluster.db)

        assert threads
        assert threading.get_ident() not in threads

    async def test_store_that_was_used_is_clean_and_all_of_it_was_looked_at(
        self, cluster: StateManager
    ) -> None:
        told: list[tuple[str, int, int]] = []

        found = await verify(cluster.db, report=lambda *line: told.append(line))

        assert (found.problems, found.remarks, bool(found)) == ([], [], True)
        assert found.checked.keys() == verification.INVARIANTS.keys()
        assert (found.checked["times"], found.checked["running_tasks"]) == (6, 2)
        assert list(dict.fromkeys(line[0] for line in told)) == [
            "file",
            "nodes",
            "tasks",
            "changes",
        ]
        assert all((what, total, total) in told for what, _, total in told)

    async def test_empty_store_is_clean(self, database: Database) -> None:
        assert await verify(database, repair=True)

    async def test_store_is_clean_whatever_the_verbs_do(
        self,
        manager: StateManager,
        open_manager: OpenManager,
        clock: FakeClock,
        make_task: MakeTask,
        make_node: MakeNode,
    ) -> None:
        """Two coordinators at random, with clean-up, compaction and lost nodes."""
        chance = random.Random(6)
        sides = [manager, await open_manager()]
        nodes = ["x", "y", "z"]
        tasks: list[Task] = []

        async def end(side: StateManager, task: Task) -> None:
            await side.cancel_task(task.task_id)  # else its node would still count it
            await side.remove_task(task.task_id)

        async def step() -> None:
            side, node = chance.choice(sides), chance.choice(nodes)
            task = chance.choice(tasks) if tasks else make_task()
            verbs: list[Callable[[], Awaitable[Any]]] = [
                lambda: side.register_node(make_node(node_id=node)),
                lambda: side.add_task(make_task(task_id=f"t{len(tasks)}", max_retries=1)),
                lambda: side.add_tasks([make_task() for _ in range(3)]),
                lambda: side.start_task(task),
                lambda: side.complete_task(task, 1),
                lambda: side.fail_task(task, "no"),
                lambda: side.cancel_task(task.task_id),
                lambda: side.requeue_task(task.task_id),
                lambda: end(side, task),
                lambda: side.change_task(task.task_id, lambda it: setattr(it, "name", "other")),
                lambda: side.update_node_status(node, chance.choice(list(NodeStatus))),
                lambda: side.update_heartbeat(node, cpu_usage=1.0),
                lambda: side.recover(timeout_seconds=60),
                lambda: side.cancel_tasks(TaskFilter(status=TaskStatus.FAILED)),
                lambda: side.task_repo.cleanup_old_tasks(days=chance.choice([0.001, 1])),
                lambda: side.compact_changes(days=0.002),
                side.refresh_from_database,
            ]
            if chance.random() < 0.3:
                tasks.extend(await side.claim_tasks(node, limit=2))
            clock.advance(seconds=chance.choice([0, 1, 50]))
            await chance.choice(verbs)()

        for _ in range(250):
            with suppress(StoreError):  # each refuses what it may refuse
                await step()
        found = await verify(manager.db)

        assert (found.problems, found.remarks) == ([], [])
        assert found.checked["feed"] > 10

    @pytest.mark.parametrize("kind", EACH_KIND)
    def test_whatever_else_callers_write_is_at_most_repaired(
        self, kind: str, request: pytest.FixtureRequest, tmp_path: Path
    ) -> None:
        """States without their times, counters of the callers' own: legal, and put in order."""

        class Verified(Machine):
            def teardown(self) -> None:
                for side in self.side:
                    with suppress(UnsavedConflictError):
                        self.run(side.manager.shutdown())
                self.side = []
                self.run(self.look())
                super().teardown()

            async def look(self) -> None:
                async with Database(self.location, clock=self.clock) as database:
                    found = await verify(database)
                    assert {one.invariant for one in found.problems} <= {"times", "running_tasks"}
                    repaired = await verify(database, repair=True)
                    assert len(repaired.problems) == len(found.problems)
                    assert repaired
                    assert (await verify(database)).problems == []

        run_machine(Verified, kind, request, tmp_path, 6 if kind == "sqlite" else 2, steps=20)


SAFE: dict[str, tuple[str, str, str | None]] = {
    "counter": ("UPDATE nodes SET running_tasks = 5 WHERE node_id = 'n'", "running_tasks", "n"),
    "idle counter": (
        "UPDATE nodes SET running_tasks = 1 WHERE node_id = 'idle'",
        "running_tasks",
        "idle",
    ),
    "completed": ("UPDATE tasks SET completed_at = NULL WHERE task_id = 'a'", "times", "a"),
    "started": ("UPDATE tasks SET started_at = NULL WHERE task_id = 'b'", "times", "b"),
    "scheduled": ("UPDATE tasks SET scheduled_at = NULL WHERE task_id = 'c'", "times", "c"),
    "status": (
        "UPDATE tasks SET priority = 0, status = 'timeout' WHERE task_id = 'd'",
        "version",
        "d",
    ),
    "node's status": ("UPDATE nodes SET status = 'error' WHERE node_id = 'n'", "version", "n"),
    "assigned": ("UPDATE tasks SET assigned_node = 'idle' WHERE task_id = 'a'", "version", "a"),
    "version": (
        "UPDATE tasks SET version = (SELECT version FROM nodes WHERE node_id = 'n') "
        "WHERE task_id = 'a'",
        "version",
        "a",
    ),
    "no version": ("UPDATE tasks SET version = 0 WHERE task_id = 'a'", "version", "a"),
    "older version": (
        "UPDATE tasks SET version = (SELECT max(previous) FROM changes WHERE item_id = 'a') "
        "WHERE task_id = 'a'",
        "version",
        "a",
    ),
    "removed": ("DELETE FROM tasks WHERE task_id = 'd'", "changes", "d"),
    "removed node": ("DELETE FROM nodes WHERE node_id = 'idle'", "changes", "idle"),
    "newest": (
        "DELETE FROM changes WHERE revision = (SELECT max(revision) FROM changes)",
        "changes",
        "idle",  # by the repair of the fault before
    ),
}

UNSAFE: dict[str, tuple[str, str, str | None]] = {
    "json": ("UPDATE tasks SET parameters = '[1]' WHERE task_id = 'a'", "json", "a"),
    "json of a node": ("UPDATE nodes SET tags = '\"x\"' WHERE node_id = 'n'", "json", "n"),
    "type": ("UPDATE tasks SET task_type = 'odd' WHERE task_id = 'a'", "values", "a"),
    "state of a node": ("UPDATE nodes SET status = 'odd' WHERE node_id = 'n'", "values", "n"),
    "percentage": ("UPDATE nodes SET cpu_usage = 101 WHERE node_id = 'n'", "values", "n"),
    "negative": ("UPDATE tasks SET retry_count = -1 WHERE task_id = 'a'", "values", "a"),
    "future": ("UPDATE tasks SET version = 1000 WHERE task_id = 'a'", "version", "a"),
    "link": (
        "DELETE FROM changes WHERE revision = (SELECT max(previous) FROM changes WHERE "
        "item_id = 'a')",
        "feed",
        "a",
    ),
    "chain": (
        "UPDATE changes SET previous = (SELECT version FROM nodes WHERE node_id = 'n') WHERE "
        "revision = (SELECT version FROM tasks WHERE task_id = 'a')",
        "feed",
        "a",
    ),
    "step": (
        "UPDATE changes SET from_status = 'failed' WHERE revision = (SELECT version FROM tasks "
        "WHERE task_id = 'a')",
        "feed",
        "a",
    ),
    "name of a change": (
        "UPDATE changes SET kind = 'created' WHERE revision = (SELECT version FROM tasks WHERE "
        "task_id = 'a')",
        "feed",
        "a",
    ),
    "compacted": (
        "UPDATE counters SET compacted = (SELECT max(revision) FROM changes) - 1",
        "feed",
        None,
    ),
    "compacted too far": ("UPDATE counters SET compacted = 999", "counters", None),
    "same key": (
        "UPDATE tasks SET idempotency_key = 'key' WHERE task_id IN ('d', 'e', 'a')",
        "idempotency_keys",
        "d",
    ),
}


class TestFaults:
    async def test_safe_faults_are_named_and_repaired(
        self, location: Location, cluster: StateManager, open_manager: OpenManager
    ) -> None:
        """And the caches of all processes follow."""
        other = await open_manager()
        for name, (statement, invariant, id) in SAFE.items():
            await cluster.get_task("a")
            spoil(location, statement)

            found = await verify(cluster.db)
            assert (invariant, id, True) in named(found), name
            assert not found
            repaired = await verify(cluster.db, repair=True)

            assert repaired, name
            assert repaired.problems == [replace(one, is_repaired=True) for one in found.problems]
            assert (await verify(cluster.db)).problems == [], name
            await other.refresh_from_database()
            tasks = [await cluster.task_repo.get(task_id) for task_id in "abcde"]
            nodes = {node.node_id: node for node in await cluster.node_repo.get_all_nodes()}
            for manager in (cluster, other):
                assert [await manager.get_task(task_id) for task_id in "abcde"] == tasks, name
                assert dict((await manager.get_state()).nodes) == nodes, name

    async def test_repair_restores_what_the_feed_knows(
        self, location: Location, cluster: StateManager
    ) -> None:
        before = {id: await cluster.task_repo.get(id) for id in "abc"}
        spoil(location, *[SAFE[fault][0] for fault in ("completed", "started", "scheduled")])
        spoil(location, *[SAFE[fault][0] for fault in ("counter", "status", "removed node")])

        assert await verify(cluster.db, repair=True)

        for id, task in before.items():
            found = await cluster.task_repo.get(id)
            assert found is not None
            assert task is not None
            assert found == replace(task, version=found.version, updated_at=found.updated_at)
        assert [
            (change.kind, change.from_status, change.to_status, change.reason)
            for change in (await cluster.history("d"))[1:]
        ] == [
            ("status", "pending", "timeout", "repaired"),
            ("updated", "timeout", "timeout", "repaired"),
        ]

    async def test_time_that_the_feed_has_forgotten_is_that_of_the_last_change(
        self, location: Location, cluster: StateManager, clock: FakeClock, make_task: MakeTask
    ) -> None:
        clock.advance(seconds=10)
        await cluster.add_task(make_task())  # the newest change is never forgotten
        await cluster.compact_changes(days=0)
        spoil(location, SAFE["completed"][0])
        before = await cluster.task_repo.get("a")

        assert await verify(cluster.db, repair=True)

        found = await cluster.task_repo.get("a")
        assert before is not None
        assert found is not None
        assert found.completed_at == before.updated_at

    async def test_other_faults_are_named_and_left_alone(
        self, location: Location, cluster: StateManager
    ) -> None:
        tables = ("tasks", "nodes", "changes", "counters")
        spoil(location, *[f"CREATE TABLE sound_{one} AS SELECT * FROM {one}" for one in tables])
        restore = [
            statement
            for table in tables
            for statement in (
                f"DELETE FROM {table}",
                f"INSERT INTO {table} SELECT * FROM sound_{table}",
            )
        ]
        for name, (statement, invariant, id) in UNSAFE.items():
            spoil(location, *restore, *unchecked(location), statement)

            found = await verify(cluster.db, repair=True)

            assert not found
            assert (invariant, id, False) in named(found), name
            left = [
                one for one in found.problems
                if not one.is_repaired and one.invariant != "schema"
            ]  # fmt: skip
            assert (invariant, id) in {(one.invariant, one.item_id) for one in left}, name
            assert all(one.text.endswith(".") for one in left)
            again = (await verify(cluster.db)).problems
            assert [one for one in again if one.invariant != "schema"] == left, name
        spoil(location, *restore)
        assert await verify(cluster.db, repair=True)

    async def test_task_on_an_unknown_node_is_a_remark(
        self, location: Location, cluster: StateManager, make_task: MakeTask
    ) -> None:
        """It is legal, and `recover` deals with it; so is a live task that was completed."""
        at = cluster.db.clock()
        fields = {"status": TaskStatus.RUNNING, "started_at": at, "completed_at": at}
        await cluster.add_task(make_task(assigned_node="nowhere", **fields))

        found = await verify(cluster.db, repair=True)

        assert found
        assert [(one.invariant, one.item) for one in found.remarks] == [
            ("times", "task"),
            ("nodes", "node"),
        ]
        assert found.remarks[1].item_id == "nowhere"

    async def test_many_faults_are_all_repaired(
        self,
        location: Location,
        cluster: StateManager,
        make_task: MakeTask,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        monkeypatch.setattr(findings, "MOST", 20)
        monkeypatch.setattr(row_checks, "MOST", 20)
        monkeypatch.setattr(repairs, "REPAIR_BATCH_SIZE", 7)
        await cluster.add_tasks([make_task(status=TaskStatus.FAILED) for _ in range(30)])
        spoil(location, "DELETE FROM tasks WHERE status = 'pending' AND task_id <> 'hand'")

        found = await verify(cluster.db)
        repaired = await verify(cluster.db, repair=True)

        assert (len(found.problems), found.omitted, bool(found)) == (20, 12, False)
        assert not replace(repaired, omitted=1)
        assert (len(repaired.problems), repaired.omitted, bool(repaired)) == (32, 0, True)
        assert (await verify(cluster.db)).problems == []

    async def test_repair_looks_again_before_it_writes(
        self, location: Location, cluster: StateManager, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Others write between the look and the repair; what they wrote stays."""
        spoil(location, *[SAFE[fault][0] for fault in ("counter", "completed", "status")])
        spoil(location, SAFE["removed node"][0], SAFE["node's status"][0])
        repair_problems = repairs.repair_problems

        async def later(*arguments: Any) -> dict[int, bool]:
            spoil(location, "UPDATE nodes SET running_tasks = 2 WHERE node_id = 'n'")
            spoil(location, "UPDATE tasks SET version = version + 0 WHERE task_id = 'a'")
            await cluster.requeue_task("a")
            await cluster.change_node("n", lambda node: node.tags.append("other"))
            await cluster.remove_task("d")
            await cluster.register_node(NodeInfo("idle", "back"))
            return await repair_problems(*arguments)

        monkeypatch.setattr(verification, "repair_problems", later)

        found = await verify(cluster.db, repair=True)

        assert {(one.invariant, one.is_repaired) for one in found.problems} == {
            ("running_tasks", True),
            ("times", True),
            ("version", False),
            ("changes", False),
        }
        task, node = await cluster.task_repo.get("a"), await cluster.node_repo.get("n")
        assert task is not None
        assert task.completed_at is None
        assert node is not None
        assert node.running_tasks == 2
        assert await cluster.task_repo.get("d") is None


CHANGE = "UPDATE changes SET {} WHERE revision = (SELECT version FROM tasks WHERE task_id = 'a')"

WRONG_TYPES: dict[str, tuple[str, str, str | None]] = {
    "no item": (CHANGE.format("item = NULL"), "feed", None),
    "bytes as an item": (CHANGE.format("item_id = x'ff'"), "feed", None),
    "no kind": (CHANGE.format("kind = NULL"), "feed", None),
    "bytes as a status": (CHANGE.format("to_status = x'00'"), "feed", None),
    "text as a revision": (CHANGE.format("previous = 'b'"), "feed", None),
    "text as a time": (CHANGE.format("changed_at = 'monday'"), "feed", None),
    "no version": ("UPDATE tasks SET version = NULL WHERE task_id = 'a'", "values", "a"),
    "bytes as a version": ("UPDATE tasks SET version = x'00' WHERE task_id = 'a'", "values", "a"),
    "bytes as a task": (
        "UPDATE tasks SET task_id = CAST(task_id AS BLOB), idempotency_key = 'k' "
        "WHERE status = 'pending'",
        "values",
        None,
    ),
    "no node": ("UPDATE nodes SET node_id = NULL WHERE node_id = 'n'", "values", None),
    "bytes as nodes": (
        "UPDATE tasks SET assigned_node = CASE task_id WHEN 'b' THEN x'ff' ELSE 'm' END "
        "WHERE assigned_node IS NOT NULL",
        "values",
        "b",
    ),
    "text as a counter": ("UPDATE counters SET beat = 'x'", "counters", None),
    "no counter": ("UPDATE counters SET compacted = NULL", "counters", None),
    "text as a heartbeat": ("UPDATE nodes SET beat = 'x' WHERE node_id = 'n'", "counters", None),
}
"""Values that a damaged page may hold, whatever the columns of its table."""


def spoil_types(location: Path, statement: str) -> None:
    """Write NULL and any type, as damage does."""
    tables = "UPDATE sqlite_master SET sql = {} WHERE type = 'table'"
    spoil(location, "CREATE TABLE sound AS SELECT * FROM sqlite_master")
    writable = "PRAGMA writable_schema = ON"
    spoil(location, writable, tables.format("replace(sql, 'NOT NULL', '')"))
    spoil(location, statement)
    sound = "(SELECT sql FROM sound WHERE sound.name = sqlite_master.name)"
    spoil(location, writable, tables.format(sound) + " AND name <> 'sound'", "DROP TABLE sound")


def read_file(location: Path) -> bytes:
    return location.read_bytes()


def write_file(location: Path, content: bytes) -> None:
    location.write_bytes(content)


def damaged(content: bytes, chance: random.Random) -> bytes:
    """Random bytes at up to five places: the start, the end or any part of a page."""
    size = int.from_bytes(content[16:18])
    new = bytearray(content)
    for _ in range(chance.choice([1, 2, 5])):
        length = chance.choice([1, 2, 8, 64, 200])
        offset = chance.choice([8, chance.randrange(8, size), size - chance.randrange(1, 400)])
        start = chance.randrange(len(content) // size) * size + offset
        fill = chance.choice([b"\xff", b"\0", b"\1", chance.randbytes(1)])
        new[start : start + length] = (
            fill * length if chance.random() < 0.6 else chance.randbytes(length)
        )
    return bytes(new[: len(content)])


@pytest.mark.sqlite
class TestFile:
    async def test_value_of_a_wrong_type_is_named(
        self, location: Path, cluster: StateManager
    ) -> None:
        """And no repair stumbles over it, even where a status has no time."""
        await cluster.shutdown()
        sound = read_file(location)
        for name, (statement, invariant, id) in WRONG_TYPES.items():
            write_file(location, sound)
            spoil_types(location, statement)
            spoil(location, SAFE["completed"][0])

            found = await verify_anew(location)

            assert (invariant, id, False) in named(found), name
            assert {type(one.item_id) for one in found.problems} <= {str, type(None)}, name
            async with Database(location) as database:
                assert not await verify(database, repair=True), name
            # A repair continues from no status that it cannot read.
            blobs = "SELECT * FROM changes WHERE typeof(from_status) = 'blob'"
            assert execute(location, blobs) == [], name

    async def test_damage_of_any_page_is_a_problem_or_an_error_of_the_library(
        self, location: Path, cluster: StateManager
    ) -> None:
        await cluster.shutdown()
        sound = read_file(location)
        outcomes = set[object]()
        for seed in range(29, 69):  # three kinds of errors were not the library's
            chance = random.Random(seed)
            write_file(location, damaged(sound, chance))
            try:
                async with Database(location) as database:
                    outcomes.add(bool(await verify(database, repair=chance.random() < 0.3)))
            except StoreError as error:
                outcomes.add(type(error))

        assert outcomes >= {True, False, UnavailableError}

    async def test_json_that_is_none_is_named(
        self, location: Location, cluster: StateManager
    ) -> None:
        """PostgreSQL lets nobody write it."""
        spoil(location, "UPDATE tasks SET result = '{\"cut' WHERE task_id = 'a'")
        spoil(location, "UPDATE tasks SET metadata = x'00ff' WHERE task_id = 'b'")
        spoil(location, "UPDATE tasks SET submitted_at = 'monday' WHERE task_id = 'c'")

        assert named(await verify(cluster.db)) == {
            ("json", "a", False),
            ("json", "b", False),
            ("values", "c", False),
        }
        with pytest.raises(InvalidDataError, match="metadata"):
            await cluster.task_repo.get("b")

    @pytest.mark.parametrize("name", ["ix_tasks_status", "tasks", "changes"])
    async def test_damaged_file_is_named(
        self, name: str, location: Path, cluster: StateManager
    ) -> None:
        await cluster.shutdown()
        [[root]] = execute(location, f"SELECT rootpage FROM sqlite_master WHERE name = '{name}'")
        [[size]] = execute(location, "PRAGMA page_size")
        with location.open("r+b") as file:
            file.seek((root - 1) * size + 8)
            file.write(b"\xff" * 200)

        found = await verify_anew(location)

        assert not found
        assert "file" in {one.invariant for one in found.problems}

    async def test_text_that_is_none_is_named(
        self, location: Path, cluster: StateManager, make_task: MakeTask
    ) -> None:
        """The driver raises an error of its own then, which callers got as it was."""
        execute(location, "UPDATE tasks SET name = CAST(x'ff' AS TEXT) WHERE task_id = 'b'")

        found = await verify_anew(location)

        assert "Could not decode to UTF-8 column 'name'" in found.problems[0].text
        with pytest.raises(InvalidDataError, match="Could not decode"):
            await cluster.task_repo.get("b")
        await cluster.add_task(make_task(task_id="another"))

    async def test_schema_that_is_no_text_is_damage(
        self, location: Path, cluster: StateManager
    ) -> None:
        """The driver cannot decode SQLite's message, which quotes it."""
        await cluster.shutdown()
        spoil(
            location,
            "PRAGMA writable_schema = ON",
            "UPDATE sqlite_master SET sql = 'CREATE' "
            "|| CAST(x'ff' AS TEXT), name = CAST(x'ff' AS TEXT) WHERE name = 'tasks'",
        )

        with pytest.raises(UnavailableError, match="damaged"):
            await verify_anew(location)

    async def test_missing_column_is_a_mismatch(
        self, location: Path, cluster: StateManager
    ) -> None:
        spoil(location, "ALTER TABLE nodes RENAME COLUMN platform TO other")

        with pytest.raises(SchemaMismatchError, match="platform"):
            await verify_anew(location)

    async def test_counters_at_the_end_stop_a_repair(
        self, location: Path, cluster: StateManager
    ) -> None:
        """The driver refuses integers of more than 64 bits with an error of Python."""
        spoil(location, SAFE["completed"][0], CHANGE.format(f"revision = {2**63 - 1}"))

        async with Database(location) as database:
            with pytest.raises(StoreError, match="rolled back"):
                await verify(database, repair=True)


@pytest.mark.postgresql
async def test_invalid_index_is_named(location: Location, cluster: StateManager) -> None:
    execute(
        location,
        "UPDATE pg_index SET indisvalid = false WHERE indexrelid = 'ix_nodes_beat'::regclass",
    )

    found = await verify(cluster.db)

    assert [(one.invariant, "ix_nodes_beat" in one.text) for one in found.problems] == [
        ("schema", True)
    ]


async def test_indexes_are_repaired_beside_a_column_of_others(
    database: Database, location: Location
) -> None:
    await database.close()
    for statement in (
        "ALTER TABLE tasks ADD COLUMN extra TEXT",
        "DROP INDEX ix_tasks_status",
        "CREATE INDEX ix_tasks_status ON tasks (extra)",
        "DROP INDEX ix_tasks_user_id",
    ):
        execute(location, statement)

    found = await verification.verify_schema(Database(location), repair=True)
    left = await verification.verify_schema(Database(location))

    repaired = [one.text for one in found.problems if one.is_repaired]
    assert len(repaired) == 2
    assert all("ix_tasks_" in text for text in repaired)
    assert all("extra" in one.text and not one.is_safe for one in left.problems)
    assert len(left.problems) == 1


async def verify_anew(location: Location) -> Verification:
    """With connections that know nothing of before."""
    async with Database(location) as database:
        return await verify(database)


def test_set_of_revisions_is_a_set() -> None:
    revisions, chance = Revisions(), random.Random(1)
    wanted = {chance.randrange(10 ** chance.randrange(1, 15)) for _ in range(500)}

    revisions.update(wanted)

    near = {revision + step for revision in wanted for step in (-1, 0, 1)}
    assert {*revisions.missing(near)} == near - wanted


@pytest.mark.postgresql
async def test_changed_function_is_named(location: Location, cluster: StateManager) -> None:
    await asyncio.to_thread(migrations.check, backend_of(str(location), 5))
    execute(location, "ALTER FUNCTION store_write_5 RENAME TO mine")

    found = await verify(cluster.db)

    assert [(one.invariant, "store_write_5" in one.text) for one in found.problems] == [
        ("file", True)
    ]
    with pytest.raises(SchemaMismatchError, match="store_write_5"):
        await asyncio.to_thread(migrations.check, backend_of(str(location), 5))
    with pytest.raises(SchemaMismatchError, match="store_write_5"):
        await cluster.add_task(Task.create(task_type=TaskType.BATCH, name="new"))
    execute(location, "ALTER FUNCTION mine RENAME TO store_write_5")
    assert await verify(cluster.db)


@pytest.mark.sqlite
async def test_cancellation_that_has_closed_the_connection_is_not_hidden(
    database: Database,
) -> None:
    async def read(session: AsyncSession) -> None:
        async with reading_text(session, bytes):
            await session.invalidate()  # as SQLAlchemy does when a statement is cancelled
            raise asyncio.CancelledError

    async with database.session() as session:
        with pytest.raises(asyncio.CancelledError):
            await read(session)
