"""The command line, as an operator meets it: what it writes, what it leaves alone, how it fails."""

from __future__ import annotations

import asyncio
import io
import json
import os
import pty
import re
import select
import shlex
import shutil
import signal
import sqlite3
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, Protocol

import pytest
from conftest import FakeClock, Location, MakeNode, MakeTask, execute, shown
from typer.testing import CliRunner, Result

from openclaw_store import (
    Database,
    Progress,
    StateManager,
    Task,
    TaskFilter,
    TaskPriority,
    TaskStatus,
    TaskType,
)
from openclaw_store.backends.factory import backend_of
from openclaw_store.cli import render as console
from openclaw_store.cli.main import app
from openclaw_store.database.migrations import HEAD
from openclaw_store.errors import UnavailableError
from openclaw_store.maintenance.restore import restore

PENDING, RUNNING = TaskStatus.PENDING, TaskStatus.RUNNING

COMMAND = [sys.executable, "-W", "error", "-m", "openclaw_store"]


WARNING = "openclaw-store: all users of this machine .+\n"

FILTERS = {
    "--status pending --status running": TaskFilter(status=(PENDING, RUNNING)),
    "--type daemon --user anna": TaskFilter(task_type=TaskType.DAEMON, user="anna"),
    "--type daemon --type batch --name '任务 1'": TaskFilter(name_contains="任务 1"),
    "--node atlas --skill gpu": TaskFilter(node="atlas", skill="gpu"),
    "--submitted-from 2026-03-01T12:05Z --submitted-until 2026-03-01T13:11+01:00": TaskFilter(
        submitted_from=datetime(2026, 3, 1, 12, 5, tzinfo=UTC),
        submitted_until=datetime(2026, 3, 1, 12, 11, tzinfo=UTC),
    ),
    "--completed-from 2026-03-01T12:00Z --completed-until 2026-03-01T12:12:02Z": TaskFilter(
        completed_from=datetime(2026, 3, 1, 12, tzinfo=UTC),
        completed_until=datetime(2026, 3, 1, 12, 12, 2, tzinfo=UTC),
    ),
}
"""What options mean."""


class Run(Protocol):
    """Runs the command line on the database of the test."""

    async def __call__(self, *arguments: object, status: int = 0) -> Result: ...


@pytest.fixture
def run(location: Location) -> Run:
    async def run(*arguments: object, status: int = 0) -> Result:
        done = await asyncio.to_thread(
            CliRunner().invoke,
            app,
            [str(argument) for argument in arguments],
            env={"OPENCLAW_STORE_URL": str(location)},
        )
        if done.exception is not None and not isinstance(done.exception, SystemExit):
            raise done.exception
        assert done.exit_code == status, done.stderr
        if status == 1 and not done.stdout:
            assert re.fullmatch(f"({WARNING})?openclaw-store: .+\n", done.stderr), "one line"
        else:
            assert done.stderr == ""
        return done

    return run


async def document(run: Run, *arguments: object) -> Any:
    """What a command writes as JSON."""
    return json.loads((await run(*arguments, "--json")).stdout)


@pytest.fixture
async def cluster(
    manager: StateManager, make_task: MakeTask, make_node: MakeNode, clock: FakeClock
) -> StateManager:
    """Nodes and tasks of all kinds, in a database that its coordinator has open."""
    await manager.register_node(make_node(node_id="atlas", available_skills=["python", "gpu"]))
    await manager.register_node(make_node(node_id="boreas", available_skills=["python"]))
    for number in range(12):
        clock.advance(minutes=1)
        await manager.add_task(
            make_task(
                task_type=TaskType.BATCH if number % 2 else TaskType.DAEMON,
                required_skills=[["python"], ["gpu"], ["python", "gpu"], []][number % 4],
                user_id="anna" if number % 3 else None,
                name=f"任务 {number}",
                max_retries=0,
            )
        )
    for task in await manager.claim_tasks("atlas", limit=4):
        clock.advance(seconds=1)
        await manager.start_task(task)
        if task.task_id == "task-0001":
            await manager.complete_task(task, {"rows": [42]})
        if task.task_id == "task-0002":
            await manager.fail_task(task, "no paper")
    await manager.cancel_task("task-0012", "not needed")
    await manager.update_heartbeat("atlas", cpu_usage=12.5)
    await manager.sync_to_database()
    return manager


def lines(done: Result) -> list[list[str]]:
    """The cells of what a command has written."""
    return [re.split(r" {2,}", line) for line in done.stdout.splitlines()]


def content(path: Path) -> bytes:
    return path.read_bytes()


def put(path: Path, content: bytes) -> None:
    path.write_bytes(content)


def remove(path: Path) -> None:
    path.unlink()


class TestLooking:
    async def test_status_tells_what_there_is(self, run: Run, cluster: StateManager) -> None:
        found = await document(run, "status")
        shown = dict(cells for cells in lines(await run("status")))

        stats = await cluster.get_stats()
        assert found["tasks"] == await cluster.get_task_stats()
        assert found["nodes"] | {"total": 2, "online": 2, "busy": 0} == found["nodes"]
        assert (found["revision"], found["schema"]) == (cluster.version, HEAD)
        assert (found["size"], found["database"]) == (stats["db_size"], cluster.db.db_path)
        assert found["oldest_waiting"]["task_id"] == "task-0005"
        assert found["heartbeat_at"] == "2026-03-01T12:12:04.000000Z"
        assert shown["nodes"] == "2: 2 online"
        assert shown["tasks"] == "12: 7 pending, 2 running, 1 completed, 1 failed, 1 cancelled"
        assert re.match(r"task-0005 \(任务 4\), pending for \d+ d", shown["oldest waiting"])
        assert re.match(rf"revision {cluster.version}, .* ago", shown["newest change"])

    async def test_nodes_are_listed(self, run: Run, cluster: StateManager) -> None:
        await cluster.change_node("boreas", lambda node: setattr(node, "status", "offline"))

        found = await document(run, "nodes")
        header, *rows = lines(await run("nodes"))

        assert found["nodes"] == [
            node.to_dict() for node in await cluster.node_repo.get_all_nodes()
        ]
        assert header[:3] == ["node", "status", "tasks"]
        assert rows[0][:4] == ["atlas", "online", "2/5", "12 %"]
        assert rows[0][-1] == "python, gpu"
        assert [row[0] for row in lines(await run("nodes", "--status", "offline"))[1:]] == [
            "boreas"
        ]

    async def test_tasks_are_those_of_the_filter(self, run: Run, cluster: StateManager) -> None:
        for options, filter in FILTERS.items():
            expected = [task.to_dict() for task in await cluster.list_tasks(filter)]

            found = await document(run, "tasks", *shlex.split(options))

            assert found == {"tasks": expected, "after": None}, options
            assert 0 < len(expected) < 12, options

    async def test_pages_go_on_where_the_last_one_ended(
        self, run: Run, cluster: StateManager
    ) -> None:
        seen: list[str] = []
        options: list[str] = []
        while True:
            *rows, last = lines(await run("tasks", "--limit", 5, *options))
            more = re.fullmatch(r"the next page: (--after \S+)", last[0])
            seen += [row[0] for row in (rows[1:] if more else [*rows[1:], last])]
            if more is None:
                break
            options = more[1].split()
            page = await document(run, "tasks", "--limit", 5)
            assert page["after"] is not None

        assert seen == [f"task-{number:04}" for number in range(12, 0, -1)]

    async def test_show_tells_the_whole_story_of_a_task(
        self, run: Run, cluster: StateManager
    ) -> None:
        found = await document(run, "show", "task-0002")
        text = (await run("show", "task-0002")).stdout

        task = await cluster.get_task("task-0002")
        assert task is not None
        assert found["task"] == task.to_dict()
        assert (found["node"], found["explanation"]) == (None, None)
        assert [change["to_status"] for change in found["history"]] == [
            "pending", "scheduled", "running", "failed",
        ]  # fmt: skip
        assert re.search(r"^error +no paper$", text, re.MULTILINE)
        assert re.search(r"^\d+ .* running → failed on atlas \(no paper\)$", text, re.MULTILINE)
        assert "None" not in text

    async def test_show_tells_the_progress_of_a_running_task(
        self, run: Run, cluster: StateManager, clock: FakeClock
    ) -> None:
        progress = Progress(1, 0.4, "epoch 3", clock())
        await cluster.renew_lease("atlas", {"task-0003": progress})

        found = await document(run, "show", "task-0003")
        text = (await run("show", "task-0003")).stdout

        assert found["progress"]["fraction"] == 0.4
        assert found["progress"]["note"] == "epoch 3"
        assert f"\nprogress: 40%, epoch 3, reported {console.when(clock())}\n" in text

    async def test_why_a_task_waits_is_what_the_manager_says(
        self, run: Run, cluster: StateManager, make_task: MakeTask, clock: FakeClock
    ) -> None:
        later = clock() + timedelta(days=9999)
        await cluster.add_tasks(
            [
                make_task(task_id="later", not_before=later, priority=TaskPriority.CRITICAL),
                make_task(task_id="odd", required_skills=["cobol"]),
                make_task(task_id="first", priority=TaskPriority.CRITICAL),
                make_task(task_id="a-twin", required_skills=["gpu"]),
                make_task(task_id="b-twin", required_skills=["gpu"]),
            ]
        )
        waiting = (TaskStatus.PENDING, TaskStatus.SCHEDULED)

        for task in await cluster.list_tasks(TaskFilter(status=waiting)):
            found = (await document(run, "show", task.task_id))["explanation"]
            why = await cluster.explain_task(task.task_id)

            assert found["text"] == str(why)
            assert (found["ahead"], found["nodes"]) == (why.ahead, why.nodes)
        assert f"\n\n{await cluster.explain_task('odd')}\n\n" in (await run("show", "odd")).stdout

    async def test_show_finds_nodes_and_what_was_removed(
        self, run: Run, cluster: StateManager
    ) -> None:
        await cluster.remove_task("task-0003")
        await cluster.remove_node("boreas")

        atlas = await document(run, "show", "atlas")
        task, node = [await document(run, "show", id) for id in ("task-0003", "boreas")]

        assert atlas["node"]["node_id"] == "atlas"
        assert {change["item_id"] for change in atlas["history"]} == {"atlas"}
        assert len(atlas["history"]) > 3
        assert (task["task"], node["node"]) == (None, None)
        assert [item["history"][-1]["kind"] for item in (task, node)] == ["removed", "removed"]
        assert (await run("show", "boreas")).stdout.startswith("boreas was removed\n\n")
        failed = await run("show", "nobody", status=1)
        assert failed.stderr == "openclaw-store: no task or node has the id 'nobody'\n"

    async def test_what_would_move_the_cursor_is_written_out(
        self, run: Run, manager: StateManager, make_task: MakeTask
    ) -> None:
        await manager.add_task(make_task(task_id="a\x1b[2Jb", name="[red]\u202ex[/red]\n\x9b"))

        for done in [await run("tasks"), await run("show", "a\x1b[2Jb"), await run("status")]:
            assert not re.search(r"[\x1b\x9b\u202e]", done.stdout)
        assert r"a\x1b[2Jb" in (await run("tasks")).stdout
        assert r"[red]\u202ex[/red]\n\x9b" in (await run("tasks")).stdout

    async def test_commands_that_look_change_nothing(
        self, run: Run, cluster: StateManager, location: Location
    ) -> None:
        stats = await cluster.get_task_stats()
        counters = "SELECT (SELECT max(revision) FROM changes), (SELECT max(beat) FROM nodes)"
        rows = execute(location, counters)

        for command in ("status", "nodes", "tasks", "show atlas", "db current", "db check"):
            await run(*command.split())
        await run("cleanup", "--days", 0, "--dry-run")

        assert execute(location, counters) == rows
        assert (await document(run, "status"))["tasks"] == stats


class TestWatch:
    async def test_changes_are_written_as_they_happen(
        self, run: Run, cluster: StateManager, make_task: MakeTask
    ) -> None:
        since = cluster.version
        await cluster.add_task(make_task(task_id="one"))
        await cluster.add_task(make_task(task_id="two"))
        known = await run("watch", "--since", since, "-n", 1, "--json")
        watching = asyncio.create_task(run("watch", "--since", since, "-n", 3))
        await cluster.cancel_task("one", "not needed")

        moment = "2026-03-01 12:12:04"
        assert json.loads(known.stdout)["item_id"] == "one"
        lines = [
            f"{moment} {since + 1} task one: pending",
            f"{moment} {since + 2} task two: pending",
            f"{moment} {since + 3} task one: pending → cancelled (not needed)",
        ]
        assert (await watching).stdout.splitlines() == lines
        changes = await cluster.history("one") + await cluster.history("two")
        assert sorted(map(str, changes)) == lines

    async def test_revision_that_is_gone_or_to_come_is_refused(
        self, run: Run, cluster: StateManager, clock: FakeClock
    ) -> None:
        clock.advance(days=1)
        await cluster.compact_changes(days=0)

        assert "read the state again" in (await run("watch", "--since", 0, status=1)).stderr
        assert "must be at most" in (await run("watch", "--since", 10**9, status=1)).stderr


class TestSchema:
    async def test_database_is_made_upgraded_and_downgraded(
        self, run: Run, location: Location
    ) -> None:
        where = shown(location)

        made = await document(run, "db", "upgrade")
        down = await document(run, "db", "downgrade", "0001", "--yes")
        old = await document(run, "db", "current")
        refused = await run("status", status=1)
        unchecked = await run("db", "check", status=1)
        up = await run("db", "upgrade")

        assert made == {"database": where, "before": None, "after": HEAD}
        assert (down["before"], down["after"]) == (HEAD, "0001")
        assert old == {"database": where, "revision": "0001", "needed": HEAD}
        assert 'run "openclaw-store db upgrade"' in refused.stderr
        assert unchecked.stderr == refused.stderr
        assert up.stdout == f"{where}: schema 0001 → {HEAD}\n"
        assert (await run("db", "upgrade")).stdout == f"{where}: schema {HEAD}, unchanged\n"
        assert await document(run, "db", "check") == {"database": where, "revision": HEAD}
        assert (await document(run, "status"))["tasks"]["total"] == 0

    async def test_downgrade_asks_first(
        self, run: Run, cluster: StateManager, location: Location
    ) -> None:
        command = ["-d", str(location), "db", "downgrade", "base"]
        done = await asyncio.to_thread(CliRunner().invoke, app, command, input="n\n")
        await run("db", "downgrade", "nonsense", "-y", status=1)

        assert "ALL TASKS AND NODES" in done.stderr
        assert done.exit_code == 1
        assert (await document(run, "status"))["tasks"]["total"] == 12

    async def test_table_that_was_changed_by_hand_is_noticed(
        self, run: Run, location: Location
    ) -> None:
        await run("db", "upgrade")
        execute(location, "ALTER TABLE tasks ADD COLUMN colour TEXT")

        assert "colour" in (await run("db", "check", status=1)).stderr
        # A file may come from elsewhere, so it is refused.
        await run("status", status=isinstance(location, Path))

    @pytest.mark.sqlite
    async def test_no_command_that_looks_makes_a_file(self, run: Run, location: Path) -> None:
        path = location.parent / "folder" / "none.db"

        for command in (
            "status", "nodes", "tasks", "show x", "watch", "vacuum", "cleanup --days 1",
            "compact --days 1", "verify", "doctor",
            "backup copy.db", "db current", "db check", "db downgrade base -y",
        ):  # fmt: skip
            failed = await run("-d", path, *command.split(), status=1)
            assert 'make one with "openclaw-store db upgrade"' in failed.stderr
        assert not path.parent.exists()

    @pytest.mark.sqlite
    async def test_database_of_somebody_else_is_left_as_it_is(
        self, run: Run, location: Path
    ) -> None:
        execute(location, "CREATE TABLE bookmarks (url TEXT)")
        before = content(location)

        for command in ("status", "db check", "vacuum"):
            await run(*command.split(), status=1)

        assert content(location) == before
        assert [path.name for path in location.parent.iterdir()] == [location.name]


class TestLookingAfter:
    async def test_cleanup_removes_what_the_dry_run_counts(
        self, run: Run, cluster: StateManager, location: Location
    ) -> None:
        execute(location, "UPDATE tasks SET completed_at = NULL WHERE task_id = 'task-0012'")
        command = ("cleanup", "--days", 1, "--keep", "failed")

        counted = await document(run, *command, "--dry-run")
        removed = await document(run, *command)
        text = (await run("cleanup", "--days", 1)).stdout

        assert counted == {"tasks": 2, "dry_run": True}
        assert removed == {"tasks": 2, "dry_run": False}
        assert text == "1 task removed\n"
        assert (
            await run("cleanup", "--days", 0, "--dry-run")
        ).stdout == "0 tasks would be removed\n"
        assert (await document(run, "status"))["tasks"]["total"] == 9

    async def test_compact_forgets_changes(
        self, run: Run, cluster: StateManager, clock: FakeClock
    ) -> None:
        tasks = await cluster.get_task_stats()
        clock.advance(days=3)
        await cluster.requeue_task("task-0001")

        removed = await document(run, "compact", "--days", 2)
        text = (await run("compact", "--days", 2)).stdout

        assert removed == {"changes": cluster.version - 1}
        assert text == "0 changes removed\n"
        assert (await document(run, "show", "task-0001"))["history"] != []
        assert (await cluster.get_task_stats())["total"] == tasks["total"]

    async def test_vacuum_gives_space_back(self, run: Run, manager: StateManager) -> None:
        big = [Task.create(TaskType.BATCH, "x" * 10_000) for _ in range(100)]
        await manager.add_tasks(big)
        for task in big:
            await manager.remove_task(task.task_id)

        found = await document(run, "vacuum")

        assert found["size_before"] > 1_000_000
        if manager.db.dialect == "sqlite":
            assert found["size_after"] < 500_000
        assert re.fullmatch(r".*: [\d.]+ [kM]B → [\d.]+ [kM]B\n", (await run("vacuum")).stdout)

    async def test_doctor_finds_what_is_wrong_with_the_schema(
        self, run: Run, location: Location
    ) -> None:
        await run("db", "upgrade")
        well = await document(run, "doctor")
        await run("db", "downgrade", "0001", "-y")

        ill = json.loads((await run("doctor", "--json", status=1)).stdout)
        text = (await run("doctor", status=1)).stdout

        assert well["is_well"] is True
        assert ill["is_well"] is False
        assert [one["name"] for one in ill["findings"] if one["level"] == "error"] == ["schema"]
        advice = r"^error +schema .*\n +→ run `openclaw-store db upgrade`$"
        assert re.search(advice, text, re.MULTILINE)

    async def test_verify_names_what_is_wrong_and_repairs_it(
        self, run: Run, cluster: StateManager, location: Location
    ) -> None:
        execute(location, "UPDATE nodes SET running_tasks = 7 WHERE node_id = 'boreas'")
        execute(location, "UPDATE tasks SET completed_at = NULL WHERE task_id = 'task-0012'")

        wrong = json.loads((await run("verify", "--json", status=1)).stdout)
        text = (await run("verify", status=1)).stdout
        repaired = (await run("verify", "--repair")).stdout
        right = await document(run, "verify")

        assert wrong["is_sound"] is False
        assert {one["invariant"] for one in wrong["problems"]} == {"running_tasks", "times"}
        assert "Node 'boreas' has running_tasks=7" in text
        assert text.endswith("2 problems are left; verify --repair can repair 2 of them\n")
        assert repaired.endswith("no problem is left; 2 problems were repaired\n")
        assert right["is_sound"] is True
        assert right["problems"] == []

    async def test_copy_is_the_whole_state(
        self, run: Run, cluster: StateManager, location: Location, tmp_path: Path
    ) -> None:
        target = tmp_path / "folder" / "copy.db"

        copied = await document(run, "copy", location, target)
        again = await run("copy", location, target, status=1)
        back = await run("copy", target, tmp_path / "back.db")

        assert (copied["tasks"], copied["nodes"], copied["changes"]) == (12, 2, cluster.version)
        assert (copied["source"], copied["target"]) == (shown(location), str(target))
        assert await document(run, "tasks", "-d", target) == await document(run, "tasks")
        assert "give a new database" in again.stderr
        assert copied["checksum"] in back.stdout
        await run("copy", tmp_path / "none.db", tmp_path / "other.db", status=1)
        assert not (tmp_path / "none.db").exists()

    @pytest.fixture
    async def copy(self, run: Run, tmp_path: Path) -> Path:
        """A copy of an empty database, which is there, too."""
        await run("db", "upgrade")
        copy = tmp_path / "folder" / "copy.db"
        await run("backup", copy)
        return copy

    @pytest.mark.sqlite
    async def test_backup_can_be_restored(
        self, run: Run, manager: StateManager, make_task: MakeTask, location: Path, tmp_path: Path
    ) -> None:
        copy = tmp_path / "copies" / "one.db"
        await manager.add_task(make_task(task_id="old"))
        assert (await document(run, "backup", copy))["size"] == copy.stat().st_size
        await manager.add_task(make_task(task_id="new"))
        assert "--overwrite" in (await run("backup", copy, status=1)).stderr
        kept = content(copy)

        in_use = await run("restore", copy, status=1)
        assert (await document(run, "status"))["tasks"]["total"] == 2
        await manager.shutdown()
        put(Path(f"{location}-shm"), b"stale")
        found = await document(run, "restore", copy)
        again = await run("restore", copy)

        assert f"{location} is in use: stop all coordinators" in in_use.stderr
        assert [task["task_id"] for task in (await document(run, "tasks"))["tasks"]] == ["old"]
        before = Path(found["kept"])
        assert (await document(run, "status", "-d", before))["tasks"]["total"] == 2
        assert again.stdout.endswith(f"{location.name}.before-restore-2\n")
        assert content(copy) == kept
        assert sorted(path.name for path in location.parent.iterdir()) == [
            "cluster.db", "cluster.db.before-restore", "cluster.db.before-restore-2", "copies",
        ]  # fmt: skip

    @pytest.mark.sqlite
    async def test_what_was_there_is_kept_where_files_cannot_have_two_names(
        self, run: Run, location: Path, copy: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Planted: it is renamed, and gone if the copy cannot take its place."""
        replace = Path.replace

        def refuse(*_: object) -> None:
            raise OSError(1, "Operation not permitted")

        def refuse_it(path: Path, target: Path) -> None:
            (refuse if target == location else replace)(path, target)

        await _add(location, "one")
        monkeypatch.setattr(os, "link", refuse)
        with monkeypatch.context() as stubborn:
            stubborn.setattr(Path, "replace", refuse_it)
            refused = await run("restore", copy, status=1)
        assert "Operation not permitted" in refused.stderr
        assert (await document(run, "status"))["tasks"]["total"] == 1

        found = await document(run, "restore", copy)

        assert (await document(run, "status"))["tasks"]["total"] == 0
        assert (await document(run, "status", "-d", found["kept"]))["tasks"]["total"] == 1

    @pytest.mark.sqlite
    @pytest.mark.parametrize("fault", ["damaged", "foreign", "newer", "text", "none"])
    async def test_copy_that_is_of_no_use_changes_nothing(
        self, run: Run, location: Path, copy: Path, fault: str
    ) -> None:
        if fault == "damaged":
            page = 4096
            put(copy, content(copy)[: 3 * page] + b"\x55" * page + content(copy)[4 * page :])
        elif fault == "text":
            put(copy, b"no database" * 1000)
        elif fault == "none":
            remove(copy)
        else:
            change = "DROP TABLE tasks"
            if fault == "newer":
                change = "UPDATE alembic_version SET version_num = '9999'"
            with closing(sqlite3.connect(copy, isolation_level=None)) as connection:
                connection.execute(change)
        before = content(location)

        refused = await run("restore", copy, status=1)

        assert str(copy) in refused.stderr
        assert content(location) == before
        assert sorted(path.name for path in location.parent.iterdir()) == ["cluster.db", "folder"]
        await run("status")

    @pytest.mark.sqlite
    async def test_restoring_can_be_stopped_until_the_copy_takes_its_place(
        self, location: Path, copy: Path
    ) -> None:
        before = content(location)

        for step in ("copying", "checking the copy", "replacing the database"):
            heard: list[str] = []
            with pytest.raises(UnavailableError, match="stopped"):
                restore(
                    backend_of(location),
                    copy,
                    lambda what, *_, heard=heard: heard.append(what),
                    lambda step=step, heard=heard: heard[-1:] == [step],  # type: ignore[misc]
                )
            assert heard[-1] == step

        assert content(location) == before
        assert sorted(os.listdir(location.parent)) == ["cluster.db", "folder"]

    @pytest.mark.sqlite
    async def test_what_cannot_be_opened_is_not_replaced(
        self, run: Run, location: Path, tmp_path: Path
    ) -> None:
        """Issue #7: the driver's own error was raised."""
        await run("db", "upgrade")
        copy, folder = tmp_path / "copy.db", tmp_path / "folder"
        await run("backup", copy)
        os.mkdir(folder)

        with pytest.raises(UnavailableError, match="cannot be opened"):
            restore(backend_of(folder), copy)

        assert sorted(os.listdir(tmp_path)) == ["cluster.db", "copy.db", "folder"]

    @pytest.mark.sqlite
    async def test_damaged_database_is_replaced_and_kept(
        self, run: Run, location: Path, copy: Path
    ) -> None:
        put(location, b"damaged" * 1000)
        for ending in ("-wal", "-shm"):
            put(Path(f"{location}{ending}"), ending.encode())

        kept = Path((await document(run, "restore", copy))["kept"])

        assert content(kept) == b"damaged" * 1000
        assert content(Path(f"{kept}-wal")) == b"-wal"
        assert (await document(run, "status"))["tasks"]["total"] == 0
        remove(location)
        assert (await document(run, "restore", copy))["kept"] is None
        await run("status")

    @pytest.mark.postgresql
    @pytest.mark.usefixtures("pg_dump")
    async def test_archive_of_postgresql_is_restored_by_the_commands_that_are_told(
        self,
        run: Run,
        cluster: StateManager,
        tmp_path: Path,
    ) -> None:
        await run("backup", tmp_path / "a copy.dump")
        await cluster.remove_task("task-0001")
        await cluster.db.close()

        told = await run("restore", tmp_path / "a copy.dump", status=1)
        done = await asyncio.create_subprocess_shell(told.stderr.partition("then run: ")[2])

        assert await done.wait() == 0
        await run("db", "upgrade")
        assert (await document(run, "status"))["tasks"]["total"] == 12


class TestUse:
    async def test_options_of_all_commands_may_come_first_or_last(
        self, run: Run, cluster: StateManager, location: Location, tmp_path: Path
    ) -> None:
        there, elsewhere = ("-d", str(location)), ("--database", tmp_path / "none.db")

        first = json.loads((await run(*there, "--json", "tasks")).stdout)
        last = json.loads((await run(*elsewhere, "tasks", *there, "--json")).stdout)

        assert first == last
        await run("tasks", *elsewhere, status=1)

    async def test_wrong_usage_ends_with_2(self, run: Run) -> None:
        for wrong in (
            "nonsense", "tasks --limit 0", "tasks --status lost", "tasks --submitted-from then",
            "show", "cleanup", "cleanup --days -1", "compact", "watch -n x", "db", "",
        ):  # fmt: skip
            done = CliRunner().invoke(app, wrong.split())
            assert done.exit_code == 2
            assert "Traceback" not in done.output

    def test_wrong_usage_shows_neither_locations_nor_codes_of_terminals(self) -> None:
        """A URL in the wrong place was printed with its password, as all arguments were."""
        url = "postgresql://anna:hunter 2's@db/cluster"
        for wrong in (
            [url], [url, "status"], ["status", url], ["copy", url, url, url], ["backup", "a", url],
            ["tasks", "--limit", url], ["tasks", f"--limit={url}"], ["nodes", "--status", url],
            ["db", url], ["db", "upgrade", url], ["watch", "-n", f"host=db password={url}"],
            ["show", "a", "password=hunter 2's host=db"], ["db", "downgrade", "base", url],
            ["tasks", "--submitted-from", url], [f"--database={url}", "tasks", "--limit", url],
        ):  # fmt: skip
            done = CliRunner().invoke(app, wrong)
            assert done.exit_code == 2
            assert "hunter" not in done.output
            assert "Error: " in done.output
        done = CliRunner().invoke(app, ["\x1b[2Jnonsense\x07"])
        assert (done.exit_code, "nonsense" in done.output) == (2, True)
        assert done.output.replace("\n", "").isprintable()

    @pytest.mark.sqlite
    async def test_location_in_place_of_another_argument_is_not_shown(
        self, run: Run, location: Path
    ) -> None:
        """A backup got the password as its name, and could be restored by it."""
        await run("db", "upgrade")
        before = sorted(os.listdir(location.parent))

        for url in (
            "postgresql://anna:hunter2@db/cluster", "mysql://anna:hunter2@db/cluster",
            "host=db password=hunter2", "anna:hunter2@db/cluster",
        ):  # fmt: skip
            for command in ("backup", "restore", "show"):
                assert "hunter" not in (await run(command, url, status=1)).stderr
        await run("backup", location.parent / "a@b:c@d.db")

        assert sorted(os.listdir(location.parent)) == sorted([*before, "a@b:c@d.db"])

    async def test_location_that_cannot_be_is_told_without_its_password(self, run: Run) -> None:
        nowhere = "postgresql://anna:secret@127.0.0.1:1/cluster"

        for command in ("status", "restore x"):
            failed = await run("-d", nowhere, *command.split(), status=1)
            assert re.match(WARNING, failed.stderr)
            assert "anna:***@" in failed.stderr
            assert "secret" not in failed.stderr
        assert "not supported" in (await run("-d", "mysql://x/y", "status", status=1)).stderr

    @pytest.mark.sqlite
    async def test_location_may_be_in_a_file(
        self, cluster: StateManager, location: Path, tmp_path: Path
    ) -> None:
        def run(file: Path) -> Result:
            variables = {"OPENCLAW_STORE_URL": "", "OPENCLAW_STORE_URL_FILE": str(file)}
            return CliRunner().invoke(app, ["tasks"], env=variables)

        file = tmp_path / "url"
        file.write_text(f"{location}\n", encoding="utf-8")

        found, missing = await asyncio.to_thread(run, file), await asyncio.to_thread(run, tmp_path)

        assert "task-0001" in found.stdout
        assert missing.exit_code == 1
        assert "OPENCLAW_STORE_URL_FILE" in missing.stderr

    def test_lengths_of_time_and_sizes(self) -> None:
        lengths = [0, 59.4, 60, 3599, 3600 * 26, 86_400 * 400 + 7, -5]
        assert [console.duration(timedelta(seconds=one)) for one in lengths] == [
            "0 s", "59 s", "1 min 0 s", "59 min 59 s", "1 d 2 h", "400 d 0 h", "0 s",
        ]  # fmt: skip
        assert [console.size(count) for count in (0, 999, 1000, 188_862_464, 10**13)] == [
            "0 bytes", "999 bytes", "1.0 kB", "188.9 MB", "10.0 TB",
        ]  # fmt: skip

    @pytest.mark.parametrize("is_terminal", [True, False])
    def test_bar_is_for_terminals(self, monkeypatch: pytest.MonkeyPatch, is_terminal: bool) -> None:
        error = io.StringIO()
        error.isatty = lambda: is_terminal  # type: ignore[method-assign]
        monkeypatch.setattr(sys, "stderr", error)
        monkeypatch.setenv("TERM", "xterm")

        with console.progress("copying") as report:
            report("checking", 5, 10)

        assert ("checking" in error.getvalue()) == is_terminal
        assert bool(error.getvalue()) == is_terminal


def process(*arguments: object, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*COMMAND, *map(str, arguments)],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        check=False,
    )


@contextmanager
def started(*arguments: object, **options: Any) -> Iterator[subprocess.Popen[bytes]]:
    with subprocess.Popen([*COMMAND, *map(str, arguments)], **options) as running:
        try:
            yield running
        finally:
            running.kill()


class TestProcess:
    @pytest.fixture
    def path(self, migrated_sqlite: Path, tmp_path: Path) -> Path:
        return Path(shutil.copyfile(migrated_sqlite, tmp_path / "cluster.db"))

    def test_help_waits_for_nothing_but_what_it_needs(self) -> None:
        """It starts in 0.1 s of a processor; the library alone takes 0.35."""
        script = """
import sys
from openclaw_store.__main__ import main
sys.argv = ["openclaw-store", "--help"]
try:
    main()
finally:
    print({"sqlalchemy", "alembic", "rich", "aiosqlite"} & sys.modules.keys())
"""
        done = subprocess.run(
            [sys.executable, "-W", "error", "-c", script],
            capture_output=True,
            text=True,
            check=True,
        )

        assert done.stdout.startswith("Usage: openclaw-store ")
        assert done.stdout.endswith("\nset()\n")

    def test_without_its_extra_it_says_what_to_install(self) -> None:
        script = """
import runpy, sys
sys.modules["typer"] = None
runpy.run_module("openclaw_store", run_name="__main__")
"""
        done = subprocess.run(
            [sys.executable, "-c", script], capture_output=True, text=True, check=False
        )

        assert done.returncode == 1
        assert done.stderr.endswith('pip install "openclaw-store[cli]"\n')
        assert done.stderr.count("\n") == 1

    def test_entry_point_and_completion_work(self) -> None:
        program = Path(sys.executable).with_name("openclaw-store")
        done = subprocess.run(
            [program],
            env={
                **os.environ,
                "_OPENCLAW_STORE_COMPLETE": "complete_bash",
                "COMP_WORDS": "openclaw-store tasks --sta",
                "COMP_CWORD": "2",
            },
            capture_output=True,
            text=True,
            check=False,
        )
        version = subprocess.run([program, "--version"], capture_output=True, text=True, check=True)

        assert (done.stdout.strip(), done.stderr) == ("--status", "")
        assert re.fullmatch(r"openclaw-store \d+\.\d+\.\d+\S*\n", version.stdout)

    def test_reader_that_goes_away_is_no_error(self, path: Path) -> None:
        execute(
            path,
            "WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n WHERE i < 3000) "
            "INSERT INTO tasks (task_id, task_type, name) SELECT i, 'batch', i FROM n",
        )
        pipe = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
        with started("-d", path, "tasks", "--limit", 3000, **pipe) as running:
            assert running.stdout is not None
            assert running.stderr is not None
            assert running.stdout.readline().startswith(b"task ")
            running.stdout.close()
            assert running.stderr.read() == b""
            assert running.wait() == 1

    def test_watch_ends_with_ctrl_c(self, path: Path) -> None:
        pipe = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
        with started("-d", path, "watch", "--since", 0, "--json", **pipe) as running:
            assert running.stdout is not None
            assert running.stderr is not None
            asyncio.run(_add(path, "one"))
            assert json.loads(running.stdout.readline())["item_id"] == "one"

            running.send_signal(signal.SIGINT)

            assert running.stderr.read() == b""
            assert running.wait() == 130

    def test_live_view_is_drawn_again_as_things_change(self, path: Path) -> None:
        terminal, end = pty.openpty()
        environment = {**os.environ, "TERM": "xterm", "COLUMNS": "100", "LINES": "30"}
        with started(
            *("-d", path, "watch"), stdin=end, stdout=end, stderr=end, env=environment
        ) as running:
            os.close(end)
            assert re.search(r"tasks +0", read_until(terminal, "newest heartbeat +none"))

            asyncio.run(_add(path, "one"))
            seen = read_until(terminal, r"task +one +pending")
            running.send_signal(signal.SIGINT)
            rest = read_until(terminal, None)

            assert running.wait() == 130
        os.close(terminal)
        assert re.search(r"tasks +1: 1 pending", seen)
        assert "Traceback" not in rest
        assert rest.endswith("\x1b[?25h")  # the cursor is there again


async def _add(path: Path, id: str) -> None:
    async with StateManager(Database(path), None) as manager:
        await manager.add_task(Task.create(TaskType.BATCH, "t", task_id=id))


def read_until(terminal: int, pattern: str | None) -> str:
    """What a program writes on a terminal, but for styles, until `pattern` comes, or it ends."""
    written = b""
    limit = time.monotonic() + 60
    while pattern is None or not re.search(pattern, plain(written)):
        assert select.select([terminal], [], [], max(0, limit - time.monotonic()))[0], written
        try:
            written += os.read(terminal, 65_536)
        except OSError:  # nobody has it open any more
            break
    return plain(written)


def plain(written: bytes) -> str:
    return re.sub(r"\x1b\[[\d;]*m", "", written.decode(errors="ignore"))
