"""No row, whatever its content, ends a command or a page: it is named, and the rest is shown."""

from __future__ import annotations

import asyncio
import sqlite3
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from conftest import FakeClock, Location, MakeNode, MakeTask, engine_of
from httpx import ASGITransport, AsyncClient
from support.sealing import RING, SECRET, rewrite
from typer.testing import CliRunner

from openclaw_store import Database, StateManager, StoreError, TaskStatus
from openclaw_store.cli.main import app
from openclaw_store.maintenance import read_around
from openclaw_store.maintenance.read_around import ReadAround
from openclaw_store.repositories import TaskRepository
from openclaw_store.web import app as page_of

TASK = "UPDATE tasks SET {} WHERE task_id = '{}'"
NODE = "UPDATE nodes SET {} WHERE node_id = '{}'"
UNCHECKED = "ALTER TABLE {0} DROP CONSTRAINT ck_{0}_status"

DAMAGE = {
    "sqlite": {
        "status": TASK.format("status = 'odd'", "status"),
        "text-time": TASK.format("submitted_at = 'soon'", "text-time"),
        "huge-time": TASK.format("completed_at = 9e18", "huge-time"),
        "json": TASK.format("metadata = '{'", "json"),
        "skills": TASK.format("required_skills = x'00'", "skills"),
        "priority": TASK.format("priority = 9", "priority"),
        "node-status": NODE.format("status = 'odd'", "node-status"),
        "node-time": NODE.format("last_heartbeat = 'x'", "node-time"),
        "node-skills": NODE.format("available_skills = '[1'", "node-skills"),
        "node-usage": NODE.format("cpu_usage = 'hot'", "node-usage"),
    },
    "postgresql": {
        "status": TASK.format("status = 'odd'", "status"),
        "time": TASK.format("submitted_at = '0044-03-15 BC'", "time"),
        "json": TASK.format("metadata = '[1]'", "json"),
        "skills": TASK.format("required_skills = '\"a\"'", "skills"),
        "surrogate": TASK.format("result = '\"\\ud800\"'", "surrogate"),
        "node-status": NODE.format("status = 'odd'", "node-status"),
        "node-time": NODE.format("last_heartbeat = '0044-03-15 BC'", "node-time"),
        "node-skills": NODE.format("available_skills = '{}'", "node-skills"),
        "node-usage": NODE.format("cpu_usage = 'NaN'", "node-usage"),
    },
}

CHANGES = {
    "sqlite": "UPDATE changes SET kind = x'ff' WHERE item_id = 'change'",
    "postgresql": "UPDATE changes SET kind = 'odd' WHERE item_id = 'change'",
}

COMMANDS = (
    "status", "tasks", "tasks --status failed", "nodes", "show good", "watch --since 0 -n 2",
    "explain --all", "stuck", "failures", "stats", "top --once", "metrics",
    "requeue --status failed --dry-run", "release --stuck --dry-run",
)  # fmt: skip

PAGES = (
    "/", "/tasks", "/task?id=good", "/nodes", "/node?id=good-node", "/changes", "/health",
    "/metrics", "/healthz",
)  # fmt: skip


@pytest.fixture
def damage(location: Location) -> dict[str, str]:
    return DAMAGE["sqlite" if isinstance(location, Path) else "postgresql"]


@pytest.fixture
async def damaged(
    database: Database,
    location: Location,
    damage: dict[str, str],
    make_task: MakeTask,
    make_node: MakeNode,
    clock: FakeClock,
) -> Location:
    """A store of which nearly every row has a value that was written by hand."""
    async with StateManager(database, None) as manager:
        for id in damage:
            if id.startswith("node-"):
                await manager.register_node(make_node(node_id=id))
            else:
                failed = {"status": TaskStatus.FAILED, "completed_at": clock()}
                await manager.add_task(make_task(task_id=id, error=f"of {id}", **failed))
        await manager.register_node(make_node(node_id="good-node"))
        await manager.add_task(make_task(task_id="change"))
        await manager.add_task(make_task(task_id="good"))
    if isinstance(location, Path):
        with closing(sqlite3.connect(location, isolation_level=None)) as connection:
            connection.execute("PRAGMA ignore_check_constraints = ON")
            for statement in (*damage.values(), CHANGES["sqlite"]):
                connection.execute(statement)
            name = "UPDATE tasks SET name = CAST(x'ff41' AS TEXT) WHERE task_id = 'change'"
            connection.execute(name)
    else:
        async with engine_of(location).begin() as connection:
            for table in ("tasks", "nodes"):
                await connection.exec_driver_sql(UNCHECKED.format(table))
            for statement in (*damage.values(), CHANGES["postgresql"]):
                await connection.exec_driver_sql(statement)
    return location


async def test_every_command_shows_the_rest(
    damaged: Location, damage: dict[str, str], caplog: pytest.LogCaptureFixture
) -> None:
    def run(command: str) -> str:
        done = CliRunner().invoke(app, ["-d", str(damaged), *command.split()])
        assert done.exception is None, (command, done.exception, done.stderr)
        return done.stdout

    shown = {one: await asyncio.to_thread(run, one) for one in COMMANDS}
    named = {id: await asyncio.to_thread(run, f"show {id}") for id in ("status", "node-time")}

    assert "good " in shown["tasks"]
    assert "good-node" in shown["nodes"]
    assert "good-node" in shown["top --once"]
    assert "task status: failed" in shown["watch --since 0 -n 2"]
    assert "pending" in shown["show good"]
    for id, text in named.items():
        assert f"'{id}' cannot be read" in text
    for id in damage:
        assert f"'{id}' cannot be read" in caplog.text


async def test_every_page_shows_the_rest(damaged: Location, damage: dict[str, str]) -> None:
    async with StateManager(Database(damaged), None, cache=False) as state:
        page = page_of(state)
        transport = ASGITransport(page)
        async with AsyncClient(transport=transport, base_url="http://localhost") as client:
            shown = {path: await client.get(path) for path in PAGES}
            named = [
                await client.get("/tasks", params={"id": id}, follow_redirects=True)
                for id in damage
            ]
        await page.state.stop()

    assert {path: answer.status_code for path, answer in shown.items()} == dict.fromkeys(PAGES, 200)
    assert 'href="/task?id=good"' in shown["/tasks"].text
    assert 'href="/node?id=good-node"' in shown["/nodes"].text
    assert "Rows that cannot be read are left out" in shown["/tasks"].text
    for id, answer in zip(damage, named, strict=True):
        assert f"&#39;{id}&#39; cannot be read" in answer.text


async def test_wrong_argument_is_no_unreadable_row(
    damaged: Location, caplog: pytest.LogCaptureFixture
) -> None:
    def run(command: str) -> str:
        done = CliRunner().invoke(app, ["-d", str(damaged), *command.split()])
        assert done.exit_code == 1
        return done.stderr

    assert "must be at most" in await asyncio.to_thread(run, "watch --since 999999")
    assert "cannot be read" not in caplog.text


def counting(judged: list[int]) -> Any:
    """The search of some rows, which also notes their number."""

    async def search(session: Any, kind: Any, place: Any, places: Sequence[Any]) -> Any:
        judged.append(len(places))
        return await unreadable(session, kind, place, places)

    unreadable = read_around._unreadable
    return search


@pytest.mark.parametrize(("most", "shown"), [(5_000, ["odd", "t0"]), (100, ["t0"])])
async def test_suspicious_row_is_shown_unless_too_many_others_cannot_be_read(
    database: Database,
    location: Location,
    make_task: MakeTask,
    monkeypatch: pytest.MonkeyPatch,
    most: int,
    shown: list[str],
) -> None:
    monkeypatch.setattr(read_around, "MOST_NAMED", most)
    async with StateManager(database, None) as manager:
        await manager.add_tasks(make_task(task_id=f"t{number}") for number in range(300))
        await manager.add_task(make_task(task_id="odd", metadata={"a": "\x01"}))
        is_file = isinstance(location, Path)
        damage = "metadata = '{'" if is_file else "submitted_at = '0044-03-15 BC'"
        rewrite(location, "tasks", f"{damage} WHERE task_id > 't0'")
        read = ReadAround(database.read)

        page = await read(lambda session: TaskRepository(session).list_tasks())
        with pytest.raises(StoreError):
            await database.read(lambda session: TaskRepository(session).list_tasks())

    assert sorted(task.task_id for task in page) == shown
    assert len(read.left_out) >= most or len(read.left_out) == 299


async def test_sealed_rows_are_opened_only_if_one_of_them_cannot_be_read(
    location: Location, make_task: MakeTask, caplog: pytest.LogCaptureFixture
) -> None:
    async def ids_of(read: ReadAround) -> list[str]:
        page = await read(lambda session: TaskRepository(session).list_tasks())
        return sorted(task.task_id for task in page)

    async with StateManager(Database(location, keys=RING), None) as manager:
        await manager.add_tasks(
            make_task(task_id=id, description=SECRET, parameters={"a": id}, metadata={"b": id})
            for id in ("good", "time", "moved")
        )
        time = "'soon'" if isinstance(location, Path) else "'0044-03-15 BC'"
        rewrite(location, "tasks", f"submitted_at = {time} WHERE task_id = 'time'")
        read = ReadAround(manager.db.read)
        judged: list[int] = []
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("openclaw_store.maintenance.read_around._unreadable", counting(judged))

            before = await ids_of(read)
            other = "SELECT description FROM tasks WHERE task_id = 'good'"
            rewrite(location, "tasks", f"description = ({other}) WHERE task_id = 'moved'")
            after = await ids_of(read)

    assert (before, after) == (["good", "moved"], ["good"])
    assert judged[0] == 1
    assert sum(judged) > 3
    assert {one.id for one in read.left_out} == {"time", "moved"}
