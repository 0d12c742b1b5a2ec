"""The README's recipes, run as they stand there."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from collections.abc import Callable
from configparser import ConfigParser
from pathlib import Path
from typing import Any

import httpx
import pytest
from conftest import FakeClock, MakeTask
from test_layout import README, blocks

from devtools.postgres import Databases
from openclaw_store import (
    Database,
    StateManager,
    Task,
    TaskRepository,
    TaskStatus,
)


def recipe(word: str) -> dict[str, Any]:
    """What the recipe with this word in it defines."""
    [example] = [example for example in blocks("python") if word in example]
    names: dict[str, Any] = {"__name__": "recipe"}
    exec(compile(example, "README.md", "exec", dont_inherit=True), names)
    return names


def command_of(name: str) -> str:
    """The command line of a recipe."""
    recipes = README.read_text(encoding="utf-8").partition("\n## Recipes\n")[2]
    [line] = re.findall(
        rf"^\$ (openclaw-store.* {name} .*)$", recipes.partition("\n## ")[0], re.MULTILINE
    )
    return str(line)


def run(line: str, folder: Path, **environment: str) -> str:
    """Run a command line of `openclaw-store`; returns what it prints."""
    program, *arguments = shlex.split(line)
    assert Path(program).name == "openclaw-store"
    done = subprocess.run(
        [sys.executable, "-m", "openclaw_store", *arguments],
        cwd=folder,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        encoding="utf-8",
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, "")
    return done.stdout


@pytest.mark.sqlite
async def test_what_was_lost_is_there_again_after_a_restore(
    tmp_path: Path, make_task: MakeTask
) -> None:
    """The recipe also keeps no more copies than it is told to."""
    names = recipe("def back_up")
    back_up: Callable[..., Any] = names["back_up"]
    clock = names["utc_now"] = FakeClock()
    command = command_of("restore")
    database = tmp_path / "data" / "cluster.db"
    copies = tmp_path / "backups"

    async with Database(database) as db:
        await TaskRepository(db).create(make_task(task_id="precious"))
        for _ in range(4):
            copy = await back_up(db, copies, keep=2)
            clock.advance(days=1)
        await TaskRepository(db).delete("precious")
    kept = sorted(path.name for path in copies.iterdir())
    run(
        command.replace("cluster-20260301T120000.db", copy.name),
        tmp_path,
    )

    assert kept == ["cluster-20260303T120000.db", "cluster-20260304T120000.db"]
    async with Database(database) as db:
        assert await TaskRepository(db).get("precious")


@pytest.mark.postgresql
async def test_state_moves_to_postgresql_and_back(
    tmp_path: Path, server: Databases, make_task: MakeTask
) -> None:
    move: Callable[..., Any] = recipe("def move")["move"]
    task = make_task(parameters={"a": [1, {"b": None}]})
    async with Database(tmp_path / "cluster.db") as db:
        await TaskRepository(db).create(task)
    url = await server.create_database()

    command = command_of("copy").replace("./data/cluster.db", "./cluster.db")

    try:
        printed = run(re.sub(r"postgresql://\S+", url, command), tmp_path)
        back = await move(url, str(tmp_path / "back.db"))
        there = await move(str(tmp_path / "back.db"), str(tmp_path / "there.db"))
    finally:
        await server.drop_database(url)

    assert back.checksum in printed
    assert there == back
    assert (there.nodes, there.tasks, there.changes) == (0, 1, 1)
    async with Database(tmp_path / "back.db") as db:
        assert await TaskRepository(db).get(task.task_id) == task


@pytest.mark.sqlite
async def test_web_service_keeps_tasks_and_says_what_is_wrong_with_a_request(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    app = recipe("FastAPI(")["app"]

    async with app.router.lifespan_context(app), client_of(app) as client:
        added = await client.post("/tasks", json={"task_type": "batch", "name": "train", "x": 1})
        task = added.json()
        path = f"/tasks/{task['task_id']}"
        found = await client.get(path)
        changed = await client.put(path, json={**task, "parameters": {"gpus": [0, 1.5]}})
        outdated = await client.put(path, json=task)
        again = await client.post("/tasks", json=task)
        unknown = await client.get("/tasks/nobody")
        wrong = [
            await client.post("/tasks", json={**task, **fields})
            for fields in ({"status": "done"}, {"timeout": 2**70}, {"not_before": "soon"})
        ]
        missing = await client.post("/tasks", json={"name": "train"})

    assert (added.status_code, found.status_code, changed.status_code) == (201, 200, 200)
    assert found.json() == task
    assert task["submitted_at"].endswith("Z")
    assert (outdated.status_code, again.status_code, unknown.status_code) == (409, 409, 404)
    assert "read it again" in outdated.json()["detail"]
    assert [answer.status_code for answer in [*wrong, missing]] == [422] * 4
    assert [answer.json()["detail"].split(":")[0] for answer in [*wrong, missing]] == [
        *("status", "timeout", "not_before"),
        "task_type",
    ]
    async with StateManager(Database("./data/cluster.db")) as state:
        assert await state.get_task(task["task_id"]) == Task.from_dict(changed.json())
        assert changed.json()["parameters"] == {"gpus": [0, 1.5]}


def client_of(app: Any) -> httpx.AsyncClient:
    """A client that reaches an application without a network."""
    return httpx.AsyncClient(transport=httpx.ASGITransport(app=app), base_url="http://store")


@pytest.mark.sqlite
async def test_units_of_systemd_clean_up(tmp_path: Path, make_task: MakeTask) -> None:
    service, timer = [unit(block) for block in blocks("ini") if block.startswith("[Unit]")]
    path = tmp_path / "cluster.db"
    clock = FakeClock()  # long ago
    async with Database(path, clock=clock) as db:
        await TaskRepository(db).create(
            make_task(task_id="done", status=TaskStatus.COMPLETED, completed_at=clock())
        )
        await TaskRepository(db).create(make_task(task_id="live"))
    name, _ = service["Service"]["Environment"].split("=")

    printed = run(service["Service"]["ExecStart"], tmp_path, **{name: str(path)})

    assert printed == "1 task removed\n"
    async with Database(path) as db:
        assert [
            task.task_id for task in await TaskRepository(db).list_by_status(TaskStatus.PENDING)
        ] == ["live"]
        assert await TaskRepository(db).get("done") is None
    assert service["Service"]["Type"] == "oneshot"
    assert timer["Timer"]["OnCalendar"]
    assert timer["Install"]["WantedBy"] == "timers.target"


def unit(text: str) -> ConfigParser:
    """A file of systemd's."""
    parser = ConfigParser(interpolation=None)
    parser.optionxform = str  # type: ignore[assignment,method-assign]  # case matters
    parser.read_string(text)
    return parser
