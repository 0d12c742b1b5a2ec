"""Tests of `openclaw-store work`, as a service manager runs it."""

from __future__ import annotations

import asyncio
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import PATIENCE, MakeTask
from typer.testing import CliRunner

from openclaw_store import Database, NodeStatus, StateManager, TaskStatus
from openclaw_store.cli.main import app
from openclaw_store.testing import create_database

HANDLERS = """
import asyncio

async def handle(task, run):
    await asyncio.sleep(task.parameters.get("seconds", 0))
    return "done"

not_a_function = 1
"""


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """A database, beside a module of handlers."""
    (tmp_path / "some_jobs.py").write_text(HANDLERS, encoding="utf-8")
    create_database(tmp_path / "cluster.db")
    return tmp_path / "cluster.db"


@pytest.mark.sqlite
async def test_task_is_released_after_sigterm_and_its_grace(
    path: Path, make_task: MakeTask
) -> None:
    short, long = make_task(), make_task(parameters={"seconds": 600})
    command = [sys.executable, "-W", "error", "-m", "openclaw_store", "-d", str(path), "work"]
    options = ["some_jobs:handle", "--node", "atlas", "--slots", "2", "--grace", "0"]

    async with StateManager(Database(path)) as store:
        await store.add_tasks([short, long])
        process = await asyncio.create_subprocess_exec(
            *(*command, *options), cwd=path.parent, stderr=subprocess.PIPE
        )
        try:
            done = await store.wait_for_task(short.task_id, PATIENCE)
            async with asyncio.timeout(PATIENCE):
                async for change in store.watch(since=0):
                    if (change.item_id, change.to_status) == (long.task_id, TaskStatus.RUNNING):
                        break
                process.send_signal(signal.SIGTERM)
                _, messages = await process.communicate()
        finally:
            if process.returncode is None:
                process.kill()
                await process.wait()
        released = await store.task_repo.get(long.task_id)
        node = await store.node_repo.get("atlas")

    assert (process.returncode, done.result) == (0, "done")
    assert messages.decode().splitlines() == [
        f"node atlas works on {path}: Ctrl-C stops it",
        "node 'atlas' stops: its running tasks (1) have 0 s to end",
        "node atlas has stopped",
    ]
    assert released is not None
    assert (released.status, released.retry_count, released.losses) == (TaskStatus.PENDING, 0, 0)
    assert node is not None
    assert (node.status, node.running_tasks) == (NodeStatus.OFFLINE, 0)


@pytest.mark.sqlite
@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("some_jobs", "must be module:name"),
        ("no_such_module:handle", "No module named 'no_such_module'"),
        ("some_jobs:missing", "has no attribute 'missing'"),
        ("some_jobs:not_a_function", "must be a function"),
        ("json:loads", "must take two arguments, the task and its run"),
    ],
)
def test_handler_that_cannot_be_used_ends_with_one_line(
    path: Path, monkeypatch: pytest.MonkeyPatch, name: str, reason: str
) -> None:
    monkeypatch.chdir(path.parent)
    monkeypatch.setattr(sys, "path", [*sys.path])  # the command adds the current folder
    monkeypatch.delitem(sys.modules, "some_jobs", raising=False)

    done = CliRunner().invoke(app, ["-d", str(path), "work", name])

    assert (done.exit_code, done.stdout) == (1, "")
    assert done.stderr.startswith("openclaw-store: handle: ")
    assert reason in done.stderr
    assert len(done.stderr.splitlines()) == 1


@pytest.mark.sqlite
def test_missing_database_is_not_made(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(path.parent)
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.delitem(sys.modules, "some_jobs", raising=False)

    done = CliRunner().invoke(app, ["-d", "missing.db", "work", "some_jobs:handle"])

    assert (done.exit_code, done.stdout) == (1, "")
    assert "there is no such file" in done.stderr
    assert not Path("missing.db").exists()
