"""The commands with which an operator acts on a cluster, and asks what is wrong with it."""

from __future__ import annotations

import asyncio
import csv
import io
import json
from collections.abc import Callable, Coroutine
from datetime import timedelta
from typing import Any

import pytest
from conftest import PATIENCE, FakeClock, Location, MakeNode, MakeTask
from support.for_each import for_each
from typer.testing import CliRunner, Result

from openclaw_store import (
    NodeStatus,
    StateManager,
    TaskPriority,
    TaskStatus,
    UnavailableError,
    utc_now,
    verify,
)
from openclaw_store.cli.main import app


@pytest.fixture
def clock() -> FakeClock:
    """The commands have the system's time, so the store has, too."""
    return FakeClock(utc_now() - timedelta(minutes=1))


class Shell:
    """Runs commands on the database of the test."""

    def __init__(self, location: Location) -> None:
        self._location = location

    async def __call__(self, *arguments: str, status: int = 0, given: str = "") -> Result:
        environment = {"OPENCLAW_STORE_URL": str(self._location)}
        runner = CliRunner()
        done = await asyncio.to_thread(runner.invoke, app, arguments, given, env=environment)
        assert done.exception is None or isinstance(done.exception, SystemExit), done.exception
        assert done.exit_code == status, done.output
        return done

    async def json(self, *arguments: str, status: int = 0) -> Any:
        return json.loads((await self(*arguments, "--json", status=status)).stdout)


@pytest.fixture
def shell(location: Location) -> Shell:
    return Shell(location)


@pytest.fixture
async def cluster(
    manager: StateManager, make_task: MakeTask, make_node: MakeNode, clock: FakeClock
) -> StateManager:
    """Of the tasks, `a` and `b` failed, `c` runs on `atlas`, `d` is scheduled, `e` is pending."""
    await manager.register_node(make_node(node_id="atlas", tags=["rack-7"]))
    await manager.register_node(make_node(node_id="boreas", available_skills=["gpu"]))
    for id in "abcde":
        clock.advance(seconds=1)
        await manager.add_task(make_task(task_id=id, user_id="anna", max_retries=0))
    a, b, c, _ = await manager.claim_tasks("atlas", limit=4)
    for number, task in enumerate((a, b, c)):
        clock.advance(seconds=2)
        started = await manager.start_task(task)
        if number < 2:
            await manager.fail_task(started, f"printer {number + 4} has no paper")
    clock.advance(seconds=1)
    return manager


async def statuses(manager: StateManager, ids: str = "abcde") -> dict[str, str]:
    tasks = {id: await manager.task_repo.get(id) for id in ids}
    return {id: task.status.value for id, task in tasks.items() if task is not None}


class TestActions:
    async def test_tasks_are_requeued_by_identifier_or_filter(
        self, cluster: StateManager, shell: Shell
    ) -> None:
        assert "1 task requeued" in (await shell("requeue", "a")).stdout
        dry = await shell.json("requeue", "--finished-since", "1h", "--dry-run")
        assert (dry["tasks"], dry["dry_run"]) == (["b"], True)
        assert (await statuses(cluster))["b"] == "failed"

        done = await shell.json("requeue", "--error", "no paper")

        assert (done["tasks"], done["refused"]) == (["b"], {})
        assert (await statuses(cluster))["b"] == "pending"
        assert await verify(cluster.db)

    async def test_several_are_changed_only_after_a_question(
        self, cluster: StateManager, shell: Shell
    ) -> None:
        asked = await shell("requeue", "a", "b", given="n\n", status=1)
        assert "2 tasks would be requeued. Continue?" in asked.stderr
        assert (await statuses(cluster))["a"] == "failed"

        await shell("requeue", "a", "b", given="y\n")
        await shell("cancel", "--user", "anna", "--status", "pending", "--yes")

        assert await statuses(cluster) == {
            "a": "cancelled", "b": "cancelled", "c": "running", "d": "scheduled", "e": "cancelled",
        }  # fmt: skip

    async def test_tasks_that_move_during_the_question_stay(
        self, cluster: StateManager, shell: Shell, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        loop, moves = asyncio.get_running_loop(), list[Callable[[], Coroutine[Any, Any, Any]]]()

        def confirm(*_: Any, **__: Any) -> None:
            asyncio.run_coroutine_threadsafe(moves.pop()(), loop).result(PATIENCE)

        async def take_again() -> None:
            task = await cluster.task_repo.get("c")
            assert task is not None
            await cluster.release_task(task)
            taken = await cluster.claim_tasks("atlas")
            assert [task.task_id for task in taken] == ["c"]

        async def take_another() -> None:
            assert [task.task_id for task in await cluster.claim_tasks("atlas")] == ["d"]

        monkeypatch.setattr("typer.confirm", confirm)
        moves.append(take_again)
        released = await shell.json("release", "--node", "atlas", status=1)
        moves.append(take_another)
        cancelled = await shell.json("cancel", "--status", "pending")

        assert (released["tasks"], released["refused"].keys()) == (["d"], {"c"})
        assert cancelled["tasks"] == ["e"]
        assert await statuses(cluster, "cde") == {
            "c": "scheduled", "d": "scheduled", "e": "cancelled",
        }  # fmt: skip

    async def test_lost_database_ends_the_command_with_what_was_done(
        self, cluster: StateManager, shell: Shell, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        async def lose(manager: StateManager, id: str) -> bool:
            raise UnavailableError("the server is away")

        monkeypatch.setattr("openclaw_store.cli.actions._AT_ONCE", 1)
        await shell("requeue", "a")
        monkeypatch.setattr(StateManager, "requeue_task", lose)

        failed = await shell("requeue", "b", "nothing", "--yes", status=1)

        assert "0 tasks requeued\nb: the server is away\n" in failed.stdout
        assert failed.stderr == "openclaw-store: the server is away\n"

    async def test_refused_ones_are_named_and_the_others_changed(
        self, cluster: StateManager, shell: Shell
    ) -> None:
        done = await shell.json("cancel", "a", "nothing", "e", "--yes", status=1)

        assert done["tasks"] == ["e"]
        assert done["refused"].keys() == {"a", "nothing"}
        assert "no task with id 'nothing'" in done["refused"]["nothing"]

    async def test_released_tasks_are_pending_and_free_their_slots(
        self, cluster: StateManager, shell: Shell
    ) -> None:
        await shell("release", "--node", "atlas", "--yes", "--reason", "it burns")

        assert (await statuses(cluster, "cd")) == {"c": "pending", "d": "pending"}
        node = await cluster.node_repo.get("atlas")
        assert node is not None
        assert node.running_tasks == 0
        assert "it burns" in (await shell("show", "c")).stdout

    async def test_nodes_are_drained_and_resumed(self, cluster: StateManager, shell: Shell) -> None:
        await shell("drain", "--tag", "rack-7", "--reason", "new disk")
        node = await cluster.node_repo.get("atlas")
        assert node is not None
        assert (node.status, node.status_reason) == (NodeStatus.MAINTENANCE, "new disk")
        assert "no node" in (await shell("drain", "nothing", status=1)).stdout

        await shell("resume", "atlas")

        node = await cluster.node_repo.get("atlas")
        assert node is not None
        assert node.status is NodeStatus.ONLINE

    async def test_task_is_submitted(self, cluster: StateManager, shell: Shell) -> None:
        options = ["--skill", "gpu", "--priority", "high", "--parameters", "-"]
        dry = await shell("submit", "import", *options, "--dry-run", given='{"n": 1}')
        assert await cluster.task_repo.get(dry.stdout.strip()) is None

        done = await shell("submit", "import", *options, given='{"n": 1}')

        task = await cluster.task_repo.get(done.stdout.strip())
        assert task is not None
        assert (task.name, task.required_skills, task.priority) == (
            "import", ["gpu"], TaskPriority.HIGH,
        )  # fmt: skip
        assert task.parameters == {"n": 1}

    @for_each(
        ("command", "said"),
        [
            ("requeue", "give identifiers, or options"),
            ("requeue a --user anna", "not both"),
            ("release a --stuck", "stands alone"),
            ("drain", "give the identifiers of nodes"),
            ("submit x --priority soon", "must be critical, high"),
            ("submit x --parameters {", "must be a JSON object"),
            ("submit x --parameters 3", "parameters"),
            ("tasks --columns colour", "columns: 'colour' is no field of a task"),
            ("tasks --sort colour", "sort: 'colour' is no field of a task"),
            ("tasks --sort name,user_id", "sort: must be one field, as name"),
            ("explain", "or --all"),
        ],
    )
    async def test_what_cannot_be_done_is_said_in_one_line(
        self, cluster: StateManager, shell: Shell, command: str, said: str
    ) -> None:
        failed = await shell(*command.split(), status=1)

        assert said in failed.stderr
        assert failed.stderr.count("\n") == 1


class TestAnswers:
    async def test_failures_are_grouped_with_numbers_folded(
        self, cluster: StateManager, shell: Shell
    ) -> None:
        [group] = (await shell.json("failures", "--since", "1h"))["groups"]

        assert (group["text"], group["count"]) == ("printer # has no paper", 2)
        text = (await shell("failures")).stdout
        assert "printer # has no paper" in text
        assert "2 failures since" in text
        assert (await shell.json("failures", "--since", "2020-01-01"))["count"] == 2

    async def test_stats_are_those_of_the_period(self, cluster: StateManager, shell: Shell) -> None:
        found = await shell.json("stats", "--since", "1h")
        text = (await shell("stats")).stdout

        assert sum(one["failed"] for one in found["intervals"]) == 2
        assert found["by"] == {"node": {"atlas": 2}, "user": {"anna": 2}, "type": {"batch": 2}}
        assert "a minute" in text
        assert [line.split() for line in text.splitlines() if line.startswith("atlas")] == [
            ["atlas", "2"]
        ]

    async def test_tasks_have_their_errors_and_any_columns(
        self, cluster: StateManager, shell: Shell
    ) -> None:
        text = (await shell("tasks", "--status", "failed")).stdout
        assert "printer 5 has no paper" in text
        done = await shell("tasks", "--columns", "task_id,error", "--sort", "task_id", "--csv")
        rows = list(csv.reader(io.StringIO(done.stdout)))
        assert rows[:3] == [
            ["task_id", "error"],
            ["a", "printer 4 has no paper"],
            ["b", "printer 5 has no paper"],
        ]
        ordered = await shell.json("tasks", "--sort", "-task_id")
        assert [task["task_id"] for task in ordered["tasks"]] == list("edcba")
        assert (await shell.json("tasks", "--since", "2020-01-01"))["tasks"] != []

    async def test_every_waiting_task_is_explained(
        self, cluster: StateManager, shell: Shell
    ) -> None:
        found = (await shell.json("explain", "--all"))["tasks"]

        assert [one["task_id"] for one in found] == ["e"]
        assert found[0]["text"] in (await shell("explain", "e")).stdout

    async def test_top_lists_the_busiest_node_first(
        self, cluster: StateManager, shell: Shell
    ) -> None:
        nodes = (await shell.json("top"))["nodes"]

        assert [node["node_id"] for node in nodes] == ["atlas", "boreas"]
        assert "atlas" in (await shell("top", "--once")).stdout

    @pytest.mark.sqlite
    @pytest.mark.parametrize(
        "command",
        ["requeue", "cancel", "release", "drain", "resume", "submit", "failures", "stats", "tasks",
         "explain"],
    )  # fmt: skip
    async def test_help_has_examples(self, shell: Shell, command: str) -> None:
        assert f"\n  openclaw-store {command}" in (await shell(command, "--help")).stdout


async def test_night_after_a_failover(
    manager: StateManager,
    shell: Shell,
    clock: FakeClock,
    make_task: MakeTask,
    make_node: MakeNode,
) -> None:
    """Five nodes died with their tasks, one never learnt of its claims: all slots come free."""
    clock.now -= timedelta(minutes=30)
    for number in range(6):
        await manager.register_node(make_node(node_id=f"n{number}", max_concurrent_tasks=8))
    await manager.add_tasks([make_task() for _ in range(50)])
    for number in range(6):
        for task in await manager.claim_tasks(f"n{number}", limit=8):
            if number < 5:
                await manager.start_task(task)
    clock.now += timedelta(minutes=30)
    await manager.update_heartbeat("n5")
    await manager.sync_to_database()

    groups = (await shell.json("stuck"))["groups"]
    held = {group["subject"]: group["reason"] for group in groups if group["count"] == 8}
    assert held == {**{f"n{number}": "node lost" for number in range(5)}, "n5": "not started"}
    assert "node lost" in (await shell("stuck")).stdout
    dry = await shell.json("release", "--stuck", "--dry-run")
    assert len(dry["tasks"]) == 48
    assert await shell("release", "--stuck", "--yes")

    assert (await shell.json("stuck"))["groups"] == []
    assert [node.running_tasks for node in await manager.node_repo.get_all_nodes()] == [0] * 6
    assert await manager.task_repo.count_by_status(TaskStatus.PENDING) == 50
    assert await verify(manager.db)
