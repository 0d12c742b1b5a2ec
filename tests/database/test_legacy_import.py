"""Files of the original hand-made schema: opened whole, with a copy kept, whatever happens."""

# ruff: noqa: ASYNC240 - a test may block its loop

from __future__ import annotations

import asyncio
import errno
import json
import logging
import os
import random
import re
import shutil
import signal
import sqlite3
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any
from zoneinfo import ZoneInfo

import pytest
from conftest import FakeClock
from sqlalchemy import Connection
from support.pages import DOCS, blocks
from support.scripts import run_scripts
from test_migrations import alembic, alembic_script
from typer.testing import CliRunner

from campaigns.faults import vfs
from campaigns.workloads.legacy_files import COLUMNS, make_original
from openclaw_store import (
    Database,
    InvalidDataError,
    NodeInfo,
    NodeRepository,
    NodeStatus,
    OutcomeUnknownError,
    SchemaMismatchError,
    StateManager,
    StoreError,
    Task,
    TaskPriority,
    TaskRepository,
    TaskStatus,
    TaskType,
    UnavailableError,
)
from openclaw_store.backends.base import Backend
from openclaw_store.backends.factory import backend_of
from openclaw_store.backends.sqlite.backend import SQLite
from openclaw_store.backends.sqlite.connections import LoneConnection
from openclaw_store.cli.main import app
from openclaw_store.database import legacy_import as adoption
from openclaw_store.database import migrations

pytestmark = pytest.mark.sqlite

NOW = datetime(2026, 3, 1, 12, tzinfo=UTC)


def insert(connection: sqlite3.Connection, table: str, rows: Iterable[Mapping[str, Any]]) -> None:
    for row in rows:
        values = ", ".join("?" * len(row))
        statement = f"INSERT INTO {table} ({', '.join(row)}) VALUES ({values})"
        connection.execute(statement, list(row.values()))
    connection.commit()


def loosely(columns: Mapping[str, str] = COLUMNS) -> dict[str, str]:
    """The same columns as somebody may have made them by hand: anything goes into any."""
    return {
        table: ", ".join(column.split()[0] for column in definition.split(","))
        for table, definition in columns.items()
    }


def plain_task(task_id: Any, **values: Any) -> dict[str, Any]:
    """A row of `tasks`, with what the original always wrote."""
    return {
        "task_id": task_id,
        "task_type": "batch",
        "name": "a name",
        "required_skills": "[]",
        "status": "pending",
        "priority": 2,
        **values,
    }


def plain_node(node_id: Any, **values: Any) -> dict[str, Any]:
    """The same of `nodes`."""
    return {
        "node_id": node_id,
        "hostname": "a host",
        "platform": "linux",
        "arch": "x64",
        "status": "online",
        "available_skills": "[]",
        **values,
    }


NEW_FIELDS = {
    *("version", "attempt", "not_before", "idempotency_key", "updated_at", "losses", "max_losses"),
    *("expires_at", "cancel_requested_at", "cancel_deadline_at", "lease_seconds", "status_reason"),
    "session",
    "traceparent",
}
"""Fields that the original did not have."""


def as_original(item: Task | NodeInfo, zone: ZoneInfo) -> dict[str, Any]:
    """The row that the original wrote for a task or node, on a machine in that zone."""
    row: dict[str, Any] = {}
    for name, value in vars(item).items():
        if name in NEW_FIELDS:
            continue
        if isinstance(value, datetime):
            row[name] = value.astimezone(zone).replace(tzinfo=None).isoformat()
        elif isinstance(value, list | dict) or name == "result":
            always = name in ("required_skills", "available_skills")
            row[name] = json.dumps(value) if value or always else None
        else:
            row[name] = getattr(value, "value", value)
    row["created_at"] = NOW.astimezone(zone).replace(tzinfo=None).isoformat()
    return row


TEXTS = [
    "",
    "plain",
    "处理大数据集 😀",
    'it\'s "quoted"\n\tand %s ? :x',
    "x" * 3000,
    "null",
    "'; --",
]
VALUES: list[Any] = [
    *(None, True, 1, -7, 0.1, 1e300, "text", "中文", [1, [2, {"deep": [None, False]}]]),
    *({"a": {"b": ["ü", 1.5, -0.0]}}, 2**63 - 1, -(2**63), {"": ""}),
]
SKILLS = [[], ["python"], ["python", "数据处理", "a,b", '"q"'], [""]]


def some_nodes(count: int) -> list[NodeInfo]:
    chosen = random.Random(1)
    return [
        NodeInfo(
            node_id=f"节点-{number}",
            hostname=chosen.choice(TEXTS),
            platform=chosen.choice(["linux", "darwin", ""]),
            arch="x64",
            status=list(NodeStatus)[number % len(NodeStatus)],
            cpu_usage=chosen.choice([0.0, 99.9, 100.0]),
            memory_usage=chosen.random() * 100,
            available_skills=chosen.choice(SKILLS),
            max_concurrent_tasks=chosen.randrange(9),
            running_tasks=chosen.randrange(9),
            ip_address=chosen.choice(["10.0.0.1", "fe80::1%eth0", ""]),
            port=chosen.randrange(1 << 16),
            total_tasks_processed=2**62,
            average_execution_time=chosen.random() * 1e6,
            registered_at=NOW - timedelta(days=chosen.randrange(90)),
            last_heartbeat=chosen.choice([None, NOW - timedelta(seconds=1, microseconds=1)]),
            tags=chosen.choice(SKILLS),
        )
        for number in range(count)
    ]


def some_tasks(count: int) -> list[Task]:
    """Tasks of every status, type and priority, with the oddest values the original could hold."""
    chosen = random.Random(2)

    def moment() -> datetime:
        microseconds = chosen.choice([0, 1, 500_000, 999_999])
        return NOW - timedelta(seconds=chosen.randrange(90 * 86_400), microseconds=microseconds)

    return [
        Task(
            task_id=f"task-{number} é",
            task_type=list(TaskType)[number % len(TaskType)],
            name=chosen.choice(TEXTS),
            description=chosen.choice(TEXTS),
            required_skills=chosen.choice(SKILLS),
            optional_skills=chosen.choice([None, *SKILLS[1:]]),
            status=list(TaskStatus)[number % len(TaskStatus)],
            priority=list(TaskPriority)[number % len(TaskPriority)],
            assigned_node=chosen.choice([None, "节点-1", "gone"]),
            submitted_at=moment(),
            scheduled_at=chosen.choice([None, moment()]),
            started_at=chosen.choice([None, moment()]),
            completed_at=chosen.choice([None, moment()]),
            parameters={"n": chosen.choice(VALUES)} if number % 3 else {},
            timeout=chosen.choice([None, 0, 3600]),
            retry_count=chosen.randrange(5),
            max_retries=chosen.randrange(5),
            result=chosen.choice(VALUES),
            error=chosen.choice([None, *TEXTS]),
            user_id=chosen.choice([None, "user_001", ""]),
            affinity_tags=chosen.choice([None, *SKILLS[1:]]),
            metadata={"k": chosen.choice(VALUES)} if number % 2 else {},
            updated_at=moment(),
        )
        for number in range(count)
    ]


def fill(
    connection: sqlite3.Connection, nodes: Sequence[NodeInfo], tasks: Sequence[Task], zone: ZoneInfo
) -> None:
    """Write them as the original did, half of the tasks as if its trigger had come last."""
    insert(connection, "nodes", (as_original(node, zone) for node in nodes))
    rows = []
    for number, task in enumerate(tasks):
        assert task.updated_at is not None
        if number % 2:
            task.updated_at = task.updated_at.replace(microsecond=0)
            written = f"{task.updated_at:%Y-%m-%d %H:%M:%S}"
        else:
            written = task.updated_at.astimezone(zone).replace(tzinfo=None).isoformat()
        rows.append({**as_original(task, zone), "updated_at": written})
    insert(connection, "tasks", rows)


def everything(path: Path) -> dict[str, list[tuple[Any, ...]]]:
    """All rows of all tables, and what the schema is made of."""
    with closing(sqlite3.connect(path)) as connection:
        schema = connection.execute(
            "SELECT name, type, sql FROM sqlite_master ORDER BY 1"
        ).fetchall()
        names = [name for name, kind, _ in schema if kind == "table"]
        if "counters" in names:
            connection.execute("UPDATE counters SET cluster_id = 0")  # random; rolled back
        return {"": schema} | {
            name: connection.execute(f"SELECT * FROM {name} ORDER BY 1").fetchall()
            for name in names
        }


def copies_of(path: Path) -> list[Path]:
    return sorted(path.parent.glob(f"{path.name}.original-*"))


def rejected(path: Path) -> list[tuple[Any, ...]]:
    with closing(sqlite3.connect(path)) as connection:
        found = connection.execute("SELECT item, item_id, reason, row FROM legacy_rejected")
        return [(*rest, json.loads(row)) for *rest, row in found]


@contextmanager
def local_zone(name: str) -> Iterator[None]:
    """A local time zone for a while."""
    before = os.environ.get("TZ")
    os.environ["TZ"] = name
    time.tzset()
    try:
        yield
    finally:
        os.environ.pop("TZ")
        if before is not None:
            os.environ["TZ"] = before
        time.tzset()


class TestRows:
    @pytest.mark.parametrize(
        ("there", "here", "option", "count"),
        [
            ("Asia/Shanghai", "UTC", "Asia/Shanghai", 10_000),
            ("America/Los_Angeles", "Asia/Shanghai", "America/Los_Angeles", 1000),
            ("Asia/Shanghai", "Asia/Shanghai", None, 1000),
            ("America/Los_Angeles", "America/Los_Angeles", None, 1000),
        ],
    )
    async def test_every_row_of_a_file_with_an_open_wal_is_adopted_equal_field_by_field(
        self,
        location: Path,
        tmp_path: Path,
        there: str,
        here: str,
        option: str | None,
        count: int,
    ) -> None:
        nodes, tasks = some_nodes(50), some_tasks(count)
        with closing(make_original(tmp_path / "running.db")) as original:
            original.execute("PRAGMA wal_autocheckpoint=0")
            fill(original, nodes, tasks, ZoneInfo(there))
            for ending in ("", "-wal"):  # as if the machine had stopped now
                shutil.copyfile(tmp_path / f"running.db{ending}", f"{location}{ending}")
        assert Path(f"{location}-wal").stat().st_size > location.stat().st_size

        with local_zone(here):
            async with Database(location, clock=FakeClock(NOW), legacy_timezone=option) as database:
                found_nodes = await NodeRepository(database).get_all_nodes()
                repository = TaskRepository(database)
                found_tasks = [
                    task
                    for status in TaskStatus
                    for task in await repository.list_by_status(status)
                ]

        items: list[Task | NodeInfo] = [*nodes, *tasks]
        for revision, item in enumerate(items, 1):
            item.version = revision
        assert sorted(found_nodes, key=lambda node: node.version) == nodes
        assert sorted(found_tasks, key=lambda task: task.version) == tasks
        assert {type(task.priority) for task in found_tasks} == {TaskPriority}
        assert rejected(location) == []

    async def test_feed_begins_with_every_row(self, location: Path, clock: FakeClock) -> None:
        with closing(make_original(location)) as original:
            fill(original, some_nodes(3), some_tasks(14), ZoneInfo("UTC"))

        async with StateManager(Database(location, clock=clock)) as manager:
            state = await manager.get_state()
            (change,) = await manager.history("task-2 é")
            created = await manager.add_task(task := Task.create(TaskType.BATCH, "new"))

        stored = everything(location)
        items = [*stored["nodes"], *stored["tasks"]]
        assert [row[0] for row in stored["changes"]] == list(range(1, 19))
        assert [row[3] for row in stored["changes"]][:17] != []
        assert {row[3] for row in stored["changes"]} == {row[0] for row in items}
        assert (state.version, state.updated_at) == (17, clock())
        assert (state.total_nodes, state.total_tasks) == (3, 14)
        assert (created, task.version) == (True, 18)
        assert change[1:] == (
            *(clock(), "task", "task-2 é", "created", None, "running"),
            *(some_tasks(3)[2].assigned_node, "adopted", None),
        )

    async def test_empty_database_is_adopted_and_works(self, location: Path) -> None:
        make_original(location).close()

        async with StateManager(Database(location)) as manager:
            await manager.add_task(task := Task.create(TaskType.BATCH, "the first"))

        assert task.version == 1
        assert migrations.is_current(backend_of(location))
        assert {name for name, *_ in everything(location)[""] if name.startswith("idx_")} == set()
        assert len(copies_of(location)) == 1

    async def test_adopted_work_goes_on(self, location: Path, clock: FakeClock) -> None:
        """A task that ran is finished by its node, and one that waited is claimed."""
        with closing(make_original(location)) as original:
            insert(original, "nodes", [plain_node("w", running_tasks=1)])
            running = plain_task(
                "runs", status="running", assigned_node="w", result='{"so": "far"}'
            )
            insert(
                original,
                "tasks",
                [running, plain_task("waits"), plain_task("done", status="completed")],
            )

        async with StateManager(Database(location, clock=clock)) as manager:
            task = await manager.get_task("runs")
            assert task is not None
            await manager.complete_task(task, [1])
            (claimed,) = await manager.claim_tasks("w", 5)
            node = await manager.get_node("w")

        assert node is not None
        assert (claimed.task_id, claimed.attempt, node.running_tasks) == ("waits", 1, 1)
        assert node.successful_tasks == 1

    async def test_odd_values_are_read_as_the_original_read_them(self, location: Path) -> None:
        day = datetime(2026, 2, 16, tzinfo=UTC)
        then = day.replace(hour=4, minute=30, second=1)
        tasks: list[tuple[str, Any, Any]] = [
            ("timeout", "60", 60),
            ("timeout", 60.0, 60),
            ("retry_count", None, 0),
            ("max_retries", None, 3),
            ("priority", "1", TaskPriority.HIGH),
            ("name", 12, "12"),
            ("description", None, ""),
            ("required_skills", None, []),
            ("required_skills", "", []),
            ("required_skills", '["\\u4e2d\\u6587", "\\ud83d\\ude00"]', ["中文", "😀"]),
            ("optional_skills", "[]", []),
            ("optional_skills", "null", None),
            ("parameters", b'{"a": 1}', {"a": 1}),
            ("parameters", ' {"a": 1, "a": 2} ', {"a": 2}),
            ("result", "0", 0),
            ("result", "false", False),
            ("result", '""', ""),
            ("result", 7, 7),
            ("submitted_at", "2026-02-16T12:30:01", then),
            ("submitted_at", "2026-02-16T12:30", day.replace(hour=4, minute=30)),
            ("submitted_at", "2026-02-16 12:30:01.5", then.replace(microsecond=500_000)),
            ("submitted_at", "2026-02-16T12:30:01Z", then.replace(hour=12)),
            ("submitted_at", "2026-02-16T12:30:01+01:00", then.replace(hour=11)),
            ("submitted_at", "2026-02-16", datetime(2026, 2, 15, 16, tzinfo=UTC)),
            ("submitted_at", None, NOW),
            ("started_at", "", None),
            ("updated_at", "2026-02-16 00:00:00", day),
            ("updated_at", "2026-02-16T08:00:00", day),
            ("updated_at", "never", NOW),
            ("updated_at", None, NOW),
            ("created_at", "never", None),
        ]  # fmt: skip
        nodes: list[tuple[str, Any, Any]] = [
            ("platform", None, ""),
            ("ip_address", None, ""),
            ("port", None, 18789),
            ("max_concurrent_tasks", None, 5),
            ("cpu_usage", "12.5", 12.5),
            ("cpu_usage", 100, 100.0),
            ("disk_usage", None, 0.0),
            ("tags", None, []),
            ("last_heartbeat", None, None),
            ("registered_at", None, NOW),
        ]
        with closing(make_original(location, loosely())) as original:
            rows = [
                plain_task(number, **{name: raw}) for number, (name, raw, _) in enumerate(tasks)
            ]
            insert(original, "tasks", rows)
            rows = [
                plain_node(number, **{name: raw}) for number, (name, raw, _) in enumerate(nodes)
            ]
            insert(original, "nodes", rows)
            insert(
                original,
                "tasks",
                [plain_task("late", submitted_at="", created_at="2026-02-16T08:00:00")],
            )
            insert(original, "nodes", [plain_node("late", created_at="2026-02-16 00:00:00")])

        async with Database(
            location, clock=FakeClock(NOW), legacy_timezone="Asia/Shanghai"
        ) as database:
            assert rejected(location) == []
            for number, (name, raw, expected) in enumerate(tasks):
                task = await TaskRepository(database).get(str(number))
                found = getattr(task, name, None)
                assert (found, type(found)) == (expected, type(expected)), (name, raw)
            for number, (name, raw, expected) in enumerate(nodes):
                node = await NodeRepository(database).get(str(number))
                found = getattr(node, name)
                assert (found, type(found)) == (expected, type(expected)), (name, raw)
            late = await TaskRepository(database).get("late")
            late_node = await NodeRepository(database).get("late")
        assert late is not None
        assert late_node is not None
        assert late.submitted_at == late_node.registered_at == day

    async def test_row_that_cannot_be_read_is_kept_aside_and_named_and_stops_nothing(
        self, location: Path, caplog: pytest.LogCaptureFixture
    ) -> None:
        broken: list[tuple[str, Any, str]] = [
            ("status", "paused", "status: must be one of pending"),
            ("status", None, "status: must be one of"),
            ("task_type", "BATCH", "task_type: must be one of"),
            ("priority", 4, "priority: must be one of"),
            ("priority", "high", "priority: must be one of"),
            ("name", None, "name: must be text"),
            ("name", b"\xff", "name: must be text"),
            ("description", "a\0b", "description: must not contain the character NUL"),
            ("required_skills", '["python"', "required_skills: is not readable JSON"),
            ("required_skills", '"python"', "required_skills: must be a list of text"),
            ("required_skills", "[1]", "required_skills: must be a list of text"),
            ("parameters", "[1]", "parameters: must be a dict"),
            ("parameters", "[" * 100_000, "parameters: is not readable JSON"),
            ("result", '{"a": NaN}', "result: has nan"),
            ("result", f"{1 << 64}", "result: has an integer outside 64 bits"),
            ("result", '"\\ud800"', "result: "),
            ("metadata", "{'a': 1}", "metadata: is not readable JSON"),
            ("submitted_at", "yesterday", "submitted_at: must be a time such as"),
            ("submitted_at", "20260216", "submitted_at: must be a time such as"),
            ("submitted_at", 1771200000.5, "submitted_at: must be a time such as"),
            ("started_at", "2026-02-30T00:00:00", "started_at: must be a time such as"),
            ("completed_at", "0001-01-01T00:00:00", "completed_at: .* outside the range"),
            ("timeout", -1, "timeout: must be between"),
            ("timeout", 1.5, "timeout: must be a whole number"),
            ("retry_count", "many", "retry_count: must be a whole number"),
            ("user_id", "u" * 256, "user_id: is longer than 255"),
            ("task_id", None, "task_id: must be text"),
            ("task_id", "", "task_id: must not be empty"),
            ("task_id", b"blob", "task_id: must be text"),
            ("task_id", "twice", "task_id: is that of a row before it"),
        ]
        rows = [plain_task(f"broken-{n}") | {name: raw} for n, (name, raw, _) in enumerate(broken)]
        with closing(make_original(location, loosely())) as original:
            insert(original, "tasks", [plain_task("twice", name="the first"), *rows])
            insert(original, "tasks", [plain_task("twice "), plain_task("Twice")])
            original.execute(
                "INSERT INTO tasks (task_id, name) VALUES ('bad', CAST(x'ff41' AS TEXT))"
            )
            original.execute("UPDATE tasks SET timeout = 9e999 WHERE task_id = 'bad'")
            original.commit()
            insert(original, "nodes", [plain_node("bad", cpu_usage=101), plain_node("good")])

        async with StateManager(Database(location, legacy_timezone="Asia/Shanghai")) as manager:
            pending = await manager.get_pending_tasks()
            nodes = await manager.get_all_nodes()

        assert {(task.task_id, task.name) for task in pending} == {
            *(("twice", "the first"), ("twice ", "a name"), ("Twice", "a name")),
        }
        assert [node.node_id for node in nodes] == ["good"]
        node, *found = rejected(location)
        assert node[:3] == ("node", "bad", "cpu_usage: must be between 0 and 100, not 101")
        *found, undecodable = found
        assert undecodable[3]["name"] == {"hex": "ff41"}
        assert undecodable[3]["timeout"] == "inf"
        assert len(found) == len(broken)
        for (item, item_id, reason, row), raw, (_, _, expected) in zip(
            found, rows, broken, strict=True
        ):
            assert item == "task"
            assert item_id == (raw["task_id"] if isinstance(raw["task_id"], str) else None)
            assert re.match(expected, reason), reason
            known = {name: value for name, value in row.items() if value is not None}
            assert known == {
                name: {"hex": value.hex()} if isinstance(value, bytes) else value
                for name, value in raw.items()
                if value is not None
            }
            assert f"the task {item_id!r} was not adopted" in caplog.text
        assert "the node 'bad' was not adopted" in caplog.text

    async def test_time_that_the_clocks_skipped_or_had_twice_is_the_earlier_reading(
        self, location: Path
    ) -> None:
        """In Los Angeles, the hour from 2 on 8 March, and that from 1 on 1 November 2026."""
        with closing(make_original(location)) as original:
            insert(
                original,
                "tasks",
                [
                    plain_task("skipped", submitted_at="2026-03-08T02:30:00"),
                    plain_task("twice", submitted_at="2026-11-01T01:30:00"),
                    plain_task("summer", submitted_at="2026-07-01T12:00:00"),
                ],
            )

        async with Database(location, legacy_timezone="America/Los_Angeles") as database:
            tasks = {
                task.task_id: task.submitted_at
                for task in await TaskRepository(database).list_pending_tasks()
            }

        assert tasks == {
            "skipped": datetime(2026, 3, 8, 10, 30, tzinfo=UTC),
            "twice": datetime(2026, 11, 1, 8, 30, tzinfo=UTC),
            "summer": datetime(2026, 7, 1, 19, tzinfo=UTC),
        }

    async def test_what_others_have_added_is_kept_as_far_as_it_can_be(
        self, location: Path, caplog: pytest.LogCaptureFixture
    ) -> None:
        with closing(make_original(location)) as original:
            for statement in (
                "ALTER TABLE tasks ADD COLUMN Team TEXT",
                "ALTER TABLE tasks ADD COLUMN version INTEGER",
                "ALTER TABLE nodes ADD COLUMN rack TEXT",
                "CREATE INDEX ix_tasks_status ON tasks(Team)",
                "CREATE TRIGGER theirs AFTER DELETE ON tasks BEGIN SELECT 1; END",
                "CREATE TABLE notes (task_id TEXT REFERENCES tasks (task_id) ON DELETE CASCADE)",
                "CREATE VIEW noted AS SELECT task_id FROM notes",
                "INSERT INTO notes VALUES ('a')",
            ):
                original.execute(statement)
            rows = [plain_task("a", Team="red", version=7), plain_task("b")]
            insert(original, "tasks", rows)
            insert(original, "nodes", [plain_node("n", rack="r1")])

        async with Database(location) as database:
            task = await TaskRepository(database).get("a")
        stored = everything(location)

        assert task is not None
        assert (task.version, task.metadata) == (2, {})
        assert [(*row[1:3], json.loads(row[3])) for row in stored["legacy_extra"]] == [
            ("node", "n", {"rack": "r1"}),
            ("task", "a", {"team": "red", "version": 7}),
        ]
        assert stored["notes"] == [("a",)]
        assert "REFERENCES tasks " in {name: sql for name, _, sql in stored[""]}["notes"]
        with closing(sqlite3.connect(location)) as connection:
            assert connection.execute("SELECT * FROM noted").fetchall() == [("a",)]
        assert "the index 'ix_tasks_status' is not part of the schema" in caplog.text
        assert "the trigger 'theirs' is not part of the schema" in caplog.text
        assert "idx_" not in caplog.text


class TestCopy:
    async def test_copy_is_the_original_and_overwrites_no_other(
        self, location: Path, clock: FakeClock, caplog: pytest.LogCaptureFixture
    ) -> None:
        caplog.set_level(logging.INFO)
        with closing(make_original(location)) as original:
            fill(original, some_nodes(2), some_tasks(20), ZoneInfo("UTC"))
        location.chmod(0o600)
        before = everything(location)
        taken = Path(f"{location}.original-20260301T120000Z")
        taken.write_text("mine")

        async with Database(location, clock=clock):
            pass

        found = Path(f"{taken}-2")
        assert copies_of(location) == [taken, found]
        assert taken.read_text() == "mine"
        assert everything(found) == before
        assert found.stat().st_mode & 0o777 == 0o600
        told = "adopted 2 nodes and 20 tasks of the original database, which is kept in"
        assert f"{told} {found}" in caplog.text
        assert {path.name for path in location.parent.iterdir()} == {
            *(path.name for path in (location, taken, found)),
        }

    async def test_adoption_that_fails_leaves_the_file_as_it_was_and_no_copy(
        self, location: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        with closing(make_original(location)) as original:
            fill(original, some_nodes(2), some_tasks(20), ZoneInfo("UTC"))
        before = everything(location)
        database = Database(location)

        with monkeypatch.context() as broken:
            broken.setitem(adoption._READERS[Task], "metadata", lambda *_: 1 / 0)
            with pytest.raises(ZeroDivisionError):
                await database.initialize()

        assert everything(location) == before
        assert copies_of(location) == []
        await database.initialize()
        await database.close()
        assert rejected(location) == []

    async def test_adoption_that_fails_says_why_even_if_its_copy_cannot_be_removed(
        self, location: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """The error was the one of removing it."""
        make_original(location).close()

        def stay(path: Path, missing_ok: bool = False) -> None:
            raise OSError(errno.EIO, os.strerror(errno.EIO), path)

        with monkeypatch.context() as broken:

            def fail(*_: object) -> None:
                broken.setattr(Path, "unlink", stay)
                raise UnavailableError("by the way")

            broken.setattr(SQLite, "_refuse_orphans", fail)
            with pytest.raises(UnavailableError, match="by the way"):
                await Database(location).initialize()

        async with Database(location):
            assert len(copies_of(location)) == 2

    @pytest.mark.parametrize(
        ("number", "error", "is_kept"),
        [(errno.ENOSPC, UnavailableError, False), (errno.EIO, OutcomeUnknownError, True)],
    )
    async def test_copy_stays_only_if_the_commit_may_have_taken_effect(
        self,
        location: Path,
        monkeypatch: pytest.MonkeyPatch,
        number: int,
        error: type[StoreError],
        is_kept: bool,
    ) -> None:
        """Issue #7: a copy was left by each try on a full disk, which it filled further."""
        make_original(location).close()
        before, is_ready = everything(location), False
        refuse_orphans = SQLite._refuse_orphans

        def then_fail(*arguments: Any) -> None:
            nonlocal is_ready
            refuse_orphans(*arguments)
            is_ready = True

        def fail(call: vfs.SystemCall) -> int:
            return number if is_ready and call.name.startswith(("write", "pwrite")) else 0

        monkeypatch.setattr(SQLite, "_refuse_orphans", then_fail)
        with vfs.hooked(fail, location.parent), pytest.raises(error):
            await Database(location).initialize()

        assert everything(location) == before
        assert len(copies_of(location)) == is_kept

    async def test_adoption_that_fails_at_once_leaves_the_file_unlocked(
        self, location: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Issue #7: it was locked for as long as somebody had the error."""
        make_original(location).close()
        is_legacy = adoption.is_legacy

        def fails_alone(connection: Connection) -> bool:
            found = is_legacy(connection)
            if isinstance(connection.connection.dbapi_connection, LoneConnection):
                raise UnavailableError("the disk reports an error")
            return found

        monkeypatch.setattr(adoption, "is_legacy", fails_alone)
        with pytest.raises(UnavailableError) as caught:
            await Database(location).initialize()

        with closing(sqlite3.connect(location, timeout=0)) as another:
            another.execute("BEGIN EXCLUSIVE")
        assert caught.value

    async def test_copy_that_cannot_be_made_stops_the_adoption(
        self, location: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        make_original(location).close()
        before = everything(location)

        def full(*_: object, **__: object) -> None:
            raise OSError(28, "No space left on device")

        monkeypatch.setattr("openclaw_store.backends.sqlite.backend.copy_database", full)
        with pytest.raises(UnavailableError, match="No space left on device"):
            await Database(location).initialize()

        assert everything(location) == before
        assert [path.name for path in location.parent.iterdir()] == [location.name]


ADOPT = """
import asyncio, datetime, logging, signal, sys, time
from openclaw_store import Database
logging.disable()

async def main():
    now = datetime.datetime(2026, 3, 1, 12, tzinfo=datetime.UTC)
    database = Database(sys.argv[1], clock=lambda: now, legacy_timezone="Asia/Shanghai")
    start = time.process_time()
    if float(sys.argv[2]):
        signal.setitimer(signal.ITIMER_PROF, float(sys.argv[2]))  # which nobody catches
    await database.initialize()
    await database.close()
    print(time.process_time() - start)

asyncio.run(main())
"""


def after_looking(
    backend: Backend, monkeypatch: pytest.MonkeyPatch, act: Callable[[], object]
) -> None:
    """Have another act once, when a migration has looked at the database and not begun."""
    look, todo = backend.inspect, [act]

    def inspect(work: Callable[[Connection], Any]) -> Any:
        found = look(work)
        if todo and getattr(work, "__name__", "") == "copy_to":
            todo.pop()()
        return found

    monkeypatch.setattr(backend, "inspect", inspect)


class TestOthers:
    def test_adoption_that_is_killed_at_a_random_moment_starts_again_and_loses_nothing(
        self, location: Path, tmp_path: Path
    ) -> None:
        with closing(make_original(location)) as original:
            fill(original, some_nodes(20), some_tasks(300), ZoneInfo("Asia/Shanghai"))
            insert(original, "tasks", [plain_task("broken", priority=9)])
        before = everything(location)
        paths = [tmp_path / str(number) / "cluster.db" for number in range(13)]
        for path in paths:
            path.parent.mkdir()
            shutil.copyfile(location, path)
        (whole,) = run_scripts((ADOPT, [paths[0], 0]))
        (seconds,) = map(float, whole.out)  # of the processor: others may be busy
        expected = everything(paths.pop(0))
        chosen = random.Random(3)

        killed = run_scripts(
            *[(ADOPT, [path, chosen.uniform(0, seconds)]) for path in paths], at_once=2
        )
        between = [everything(path) for path in paths]
        ended = run_scripts(*[(ADOPT, [path, 0]) for path in paths], at_once=2)

        assert {one.code for one in killed} <= {0, -signal.SIGPROF}
        assert [one.code for one in killed].count(-signal.SIGPROF) >= 6
        assert all(found in (before, expected) for found in between)
        assert before in between
        assert {(one.code, one.err) for one in (whole, *ended)} == {(0, "")}
        for path in paths:
            assert everything(path) == expected
            for copy in copies_of(path):
                assert everything(copy) == before
        assert len(expected["tasks"]) == 300
        assert len(expected["legacy_rejected"]) == 1

    def test_six_processes_adopt_one_database_once(self, location: Path) -> None:
        with closing(make_original(location)) as original:
            fill(original, some_nodes(5), some_tasks(500), ZoneInfo("UTC"))

        several = run_scripts(*[(ADOPT, [location, 0])] * 6, at_once=6)

        assert [(one.code, one.err) for one in several] == [(0, "")] * 6
        assert len(copies_of(location)) == 1
        assert len(everything(location)["changes"]) == 505

    def test_who_looked_before_another_process_adopted_it_keeps_no_second_copy(
        self, location: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        make_original(location).close()
        backend = backend_of(location)
        after_looking(backend, monkeypatch, lambda: run_scripts((ADOPT, [location, 0])))

        migrations.upgrade(backend)

        assert copies_of(location) == [Path(f"{location}.original-20260301T120000Z")]
        assert migrations.is_current(backend_of(location))

    def test_original_that_is_made_just_now_is_not_adopted_without_a_copy(
        self, location: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        backend = backend_of(location)
        after_looking(backend, monkeypatch, lambda: make_original(location).close())

        with pytest.raises(UnavailableError, match="another program makes its tables just now"):
            migrations.upgrade(backend)

        assert copies_of(location) == []
        migrations.upgrade(backend)
        assert len(copies_of(location)) == 1

    @pytest.mark.parametrize("lock", [None, "BEGIN", "BEGIN IMMEDIATE"])
    async def test_program_that_still_has_the_original_open_is_not_robbed_of_it(
        self, location: Path, lock: str | None
    ) -> None:
        """It would write text where numbers are now, and nobody would tell it."""
        database = Database(location, timeout=0.2)
        with closing(make_original(location)) as program:
            fill(program, some_nodes(1), some_tasks(5), ZoneInfo("UTC"))
            if lock is not None:
                program.execute(lock)
                program.execute("SELECT * FROM tasks").fetchall()

            with pytest.raises(UnavailableError, match="another program has it open: end that"):
                await database.initialize()

            program.execute("UPDATE tasks SET status = 'failed'")
            program.commit()
        assert copies_of(location) == []
        await database.initialize()
        assert await TaskRepository(database).count_by_status(TaskStatus.FAILED) == 5
        await database.close()

    @pytest.mark.parametrize(
        "columns",
        [
            {"tasks": COLUMNS["tasks"]},
            {**COLUMNS, "nodes": COLUMNS["nodes"].replace("hostname", "host")},
            {**COLUMNS, "tasks": COLUMNS["tasks"].replace("priority", "urgency")},
        ],
    )
    async def test_tables_that_are_not_the_original_ones_are_refused(
        self, location: Path, columns: Mapping[str, str]
    ) -> None:
        with closing(sqlite3.connect(location)) as connection:
            for table, definition in columns.items():
                connection.execute(f"CREATE TABLE {table} ({definition})")
        before = everything(location)

        with pytest.raises(SchemaMismatchError, match="tables that this library did not make"):
            await Database(location).initialize()

        assert everything(location) == before
        assert copies_of(location) == []

    async def test_row_of_others_that_would_lose_its_task_stops_the_adoption(
        self, location: Path
    ) -> None:
        with closing(make_original(location)) as original:
            original.execute("CREATE TABLE notes (task_id TEXT REFERENCES tasks (task_id))")
            original.execute("INSERT INTO notes VALUES ('broken')")
            insert(original, "tasks", [plain_task("broken", status="?")])
        before = everything(location)

        with pytest.raises(SchemaMismatchError, match="would orphan rows"):
            await Database(location).initialize()

        assert everything(location) == before
        assert copies_of(location) == []


class TestCommandLine:
    async def test_original_is_refused_with_the_command_that_adopts_it(
        self, location: Path
    ) -> None:
        with closing(make_original(location)) as original:
            insert(original, "tasks", [plain_task("a", submitted_at="2026-02-16T12:00:00")])
        before = everything(location)
        url = ("-x", f"url={location}", "-x", "legacy_timezone=Asia/Shanghai")
        commands = ("current", "check", "stamp head", "upgrade 0001", "downgrade base")

        with pytest.raises(SchemaMismatchError, match=r"is the original one: .*upgrade head"):
            await Database(location).initialize(migrate=False)
        refused = await asyncio.to_thread(
            run_scripts, *[alembic_script(*url, *command.split()) for command in commands]
        )
        unknown = await asyncio.to_thread(
            alembic,
            "-x",
            f"url={location}",
            "-x",
            "legacy_timezone=Mars/Olympus",
            "upgrade",
            "head",
        )

        for ended in refused:
            assert ended.code != 0
            assert "is an original hand-made database" in ended.err
            assert "Traceback" not in ended.err
        assert unknown.code != 0
        assert "legacy_timezone: 'Mars/Olympus' is not the name of a time zone" in unknown.err
        assert everything(location) == before
        assert copies_of(location) == []

        upgraded, checked = await asyncio.to_thread(
            run_scripts,
            alembic_script(*url, "upgrade", "head"),
            alembic_script(*url, "check"),
        )
        async with Database(location) as database:
            task = await TaskRepository(database).get("a")

        assert (upgraded.code, checked.code) == (0, 0)
        assert "adopted 0 nodes and 1 tasks" in upgraded.err
        assert str(copies_of(location)[0]) in upgraded.err
        assert checked.out == ["No new upgrade operations detected."]
        assert task is not None
        assert task.submitted_at == datetime(2026, 2, 16, 4, tzinfo=UTC)

    def test_command_of_the_library_adopts_it_and_says_so(self, location: Path) -> None:
        with closing(make_original(location)) as original:
            insert(original, "tasks", [plain_task("a", submitted_at="2026-02-16T12:00:00")])
            insert(original, "tasks", [plain_task("broken", status="?")])
        before = everything(location)
        upgrade = ["db", "upgrade", "-d", str(location), "--legacy-timezone"]

        unknown = CliRunner().invoke(app, [*upgrade, "Mars/Olympus"])
        refused = CliRunner().invoke(app, ["status", "-d", str(location)])
        downgraded = CliRunner().invoke(app, ["db", "downgrade", "base", "-y", "-d", str(location)])
        untouched = everything(location) == before
        adopted = CliRunner().invoke(app, [*upgrade, "Asia/Shanghai", "--json"])
        again = CliRunner().invoke(app, [*upgrade, "Asia/Shanghai"])

        assert (unknown.exit_code, refused.exit_code, downgraded.exit_code) == (1, 1, 1)
        assert "legacy_timezone: 'Mars/Olympus' is not the name of a time zone" in unknown.stderr
        assert 'run "openclaw-store db upgrade"' in refused.stderr
        assert "is an original hand-made database" in downgraded.stderr
        assert untouched
        assert json.loads(adopted.stdout)["adopted"] == {
            "nodes": 0,
            "tasks": 1,
            "rejected": 1,
            "copy": str(copies_of(location)[0]),
        }
        assert "unchanged" in again.stdout
        assert everything(location)["tasks"][0][9] == 1_771_214_400_000_000

    @pytest.mark.parametrize("name", ["Mars/Olympus", "", "America", "../etc/passwd", "a\0b", 8])
    def test_zone_that_does_not_exist_is_refused_by_the_name_of_the_option(
        self, tmp_path: Path, name: Any
    ) -> None:
        with pytest.raises(InvalidDataError, match="is not the name of a time zone") as caught:
            Database(tmp_path / "cluster.db", legacy_timezone=name)

        assert caught.value.field == "legacy_timezone"

    def test_documented_program_opens_an_original_database(
        self,
        tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
        capsys: pytest.CaptureFixture[str],
    ) -> None:
        [example] = blocks(DOCS / "how-to" / "legacy.md", "python")
        (tmp_path / "data").mkdir()
        with closing(make_original(tmp_path / "data" / "cluster.db")) as original:
            insert(original, "tasks", [plain_task("a", submitted_at="2026-02-16T12:00:00")])
        monkeypatch.chdir(tmp_path)

        exec(compile(example.text, "legacy.md", "exec", dont_inherit=True), {})

        async def read() -> Task | None:
            async with Database("data/cluster.db") as db:
                return await TaskRepository(db).get("a")

        task = asyncio.run(read())
        assert capsys.readouterr().out.startswith("{'total': 1, ")
        assert task is not None
        assert task.submitted_at == datetime(2026, 2, 16, 4, tzinfo=UTC)
