"""The documentation: every block of code runs as it stands, and every link has a target."""

from __future__ import annotations

import ast
import asyncio
import builtins
import contextlib
import io
import json
import os
import re
import shlex
import signal
import sqlite3
import subprocess
import sys
from collections.abc import AsyncIterator, Callable, Iterator, Mapping
from configparser import ConfigParser
from functools import partial
from pathlib import Path
from subprocess import Popen
from types import ModuleType
from typing import Any

import httpx
import pytest
import typer
from conftest import FakeClock, Maker, MakeTask
from support.pages import DOCS, PLACEHOLDER, README, ROOT, Block, blocks, pages
from typer.testing import CliRunner

from campaigns.scenarios.catalogue import CAMPAIGNS
from devtools.postgres import Databases, wait_until
from openclaw_store import (
    Database,
    StateManager,
    Task,
    TaskRepository,
    TaskStatus,
    TaskType,
    errors,
)
from openclaw_store.cli.main import app
from openclaw_store.testing import create_database

HOW_TO = DOCS / "how-to"

NOT_ALONE = {
    "worker.py": "works until it is stopped: `TestTutorial`",
    "run_worker.py": "works until it is stopped: `TestWorker`",
    "submit.py": "waits for a worker: `TestWorker`",
    "coordinator.py": "waits for a worker: `TestTutorial`",
    "test_scheduler.py": "is a test: `TestCommands` runs pytest on it",
}
"""Programs that are not run by themselves, and the reason."""

OTHER_TEXTS = {
    "scrape_configs": "a configuration of Prometheus",
    "claim_tasks": "the picture of the life of a task",
    "completed {": "the output of `submit.py`: `TestWorker`",
    "node lost": "the output of programs that run together: `TestTutorial`",
    "Opened again": "the end of an output: `TestReplay`",
}
"""Words in a block of text that is no output of a program above it, and the reason."""

NOT_RUN = {
    r"python3 -m venv .*": "makes a virtual environment; `.ci/run` runs README's test command",
    r".*pip install .*": "installs packages; `test_package.py` tests what the wheel brings",
    r"source .*|mkdir .* && cd .*": "is for the shell of a reader",
    r"curl .*": "`TestWebService` sends the same request",
    r"python (worker|coordinator)\.py.*|pkill .*": "takes four terminals: `TestTutorial`",
    r"openclaw-store clusters move .*": "needs Citus: `clusters/test_citus.py`",
    r"sudo -u postgres .*": "is PostgreSQL's own; the tests make databases with SQL",
    r"(sudo )?systemctl .*": "changes the machine; `TestCleanUp` runs the units' command",
    r"openclaw-store work .*": "works until it is stopped: `TestWorker`, `test_work.py`",
    r"openclaw-store web.*": "serves until it is stopped: `test_web.py`",
    r"install -m 600 .*": "needs openssl",
    r"uvicorn .*": "serves until it is stopped; `TestWebService` calls the application",
    r"python examples/scheduler_demo\.py.*": "`test_examples.py::TestSchedulerDemo`",
    r"python examples/two_coordinators\.py.*": "`test_examples.py::TestTwoCoordinators`",
    r"python -m (campaigns|benchmarks).*": "takes hours; `test_campaigns.py`, `test_benchmarks.py`",
}
"""Commands that the pages show and this module does not run, and the reason."""

ID = r"\b0[0-9a-z]{19}\b"
VARYING = {
    r"postgresql(\+asyncpg)?://\S+": "DATABASE",
    rf"\d{{16}}\.{ID}": "CURSOR",
    ID: "ID",
    r"\b[0-9a-f]{64}\b": "CHECKSUM",
    r"\d{4}-\d\d-\d\d[T ]\d\d:\d\d:\d\d(\.\d+)?(Z|\+00:00)?": "TIME",
    r"\d{8}T\d{6}Z?": "TIME",
    r"\d+ (d|h|min|s)( \d+ (h|min|s))?\b": "AGE",
    r"[\d.]+ [kM]B": "SIZE",
    r" {2,}": "  ",
    r"/\S+/": "",
    r"in \d+\.\d+s": "in SECONDS",
}
"""Parts of an output that differ each time."""


def varying(text: str) -> list[str]:
    """The lines of an output without the parts that differ each time."""
    for pattern, name in VARYING.items():
        text = re.sub(pattern, name, text)
    return [line.rstrip() for line in text.rstrip().splitlines()]


def commands_of(page: Path) -> list[tuple[str, str | None]]:
    """The commands of a page in order, with their outputs; `None` where none is shown."""
    found: list[tuple[str, str | None]] = []
    for block in blocks(page):
        if block.language == "console":
            found += block.commands()
        elif block.language == "bash" and "<<" not in block.text:
            found += [(line, None) for line in block.text.splitlines()]
    return found


def is_not_run(command: str) -> bool:
    return any(re.fullmatch(pattern, command) for pattern in NOT_RUN)


def with_commands() -> list[Any]:
    """The pages that have commands to run, as parameters of a test."""
    return [
        pytest.param(
            page,
            id=page.relative_to(ROOT).as_posix(),
            marks=[pytest.mark.postgresql]
            * any(PLACEHOLDER in it and "--sql" not in it for it, _ in commands_of(page)),
        )
        for page in pages()
        if not all(is_not_run(command) for command, _ in commands_of(page))
    ]


def every(language: str) -> list[Any]:
    """The blocks of all pages in a language, as parameters of a test."""
    return [
        pytest.param(block, id=str(block), marks=[pytest.mark.postgresql] * block.needs_server)
        for page in pages()
        for block in blocks(page, language)
    ]


@pytest.fixture
def url(request: pytest.FixtureRequest) -> Iterator[str]:
    """The URL of a new database, in place of the documented one."""
    maker: Maker = request.getfixturevalue("maker")
    url = maker.make()
    yield url
    maker.drop(url)


def shown_output(block: Block) -> str:
    """The output of a program on its page: below it, or below the command that runs it."""
    if block.output is not None:
        return block.output
    for console in blocks(block.page, "console"):
        for command, output in console.commands():
            if command == f"python {block.name}":
                return output
    return ""


def run_program(code: str, page: Path) -> str:
    """Run a program in this process, in the current folder; returns its output."""
    output = io.StringIO()
    with contextlib.redirect_stdout(output):
        exec(compile(code, str(page), "exec", dont_inherit=True), {"__name__": "__main__"})
    return output.getvalue()


def run_pytest(*arguments: str) -> str:
    """Run pytest in the current folder without our settings; returns its output."""
    scope = "asyncio_default_fixture_loop_scope=function"  # else pytest-asyncio warns
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-o", scope, *arguments],
        capture_output=True,
        text=True,
        encoding="utf-8",
        check=False,
    )
    assert (done.returncode, done.stderr) == (0, ""), done.stdout
    return done.stdout


class TestPrograms:
    @pytest.mark.parametrize("block", every("python"))
    def test_program_runs_alone_and_prints_what_the_page_shows(
        self,
        block: Block,
        request: pytest.FixtureRequest,
        tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        if block.name in NOT_ALONE:
            compile(block.text, str(block.page), "exec")
            return
        monkeypatch.chdir(tmp_path)
        code = block.text
        if block.needs_server:
            code = code.replace(PLACEHOLDER, request.getfixturevalue("url"))
        if block.name == "back_up.py":
            create_database(tmp_path / "data" / "cluster.db")

        assert varying(run_program(code, block.page)) == varying(shown_output(block))

    def test_first_example_of_readme_is_short_and_leaves_only_its_database(
        self, tmp_path: Path
    ) -> None:
        example = blocks(README, "python")[0].text

        done = subprocess.run(
            [sys.executable, "-W", "error", "-c", example],
            cwd=tmp_path,
            capture_output=True,
            text=True,
            check=False,
        )

        assert len(example.splitlines()) <= 25
        assert (done.returncode, done.stderr) == (0, "")
        assert done.stdout == blocks(README, "python")[0].output
        assert [path.name for path in tmp_path.iterdir()] == ["data"]

    def test_every_block_of_text_is_an_output_or_has_a_reason(self) -> None:
        outputs = {block.output for page in pages() for block in blocks(page)}
        other = [
            block
            for page in pages()
            for block in blocks(page, "text")
            if block.text not in outputs and not any(word in block.text for word in OTHER_TEXTS)
        ]

        assert [str(block) for block in other] == []

    def test_every_language_is_known(self) -> None:
        languages = {block.language for page in pages() for block in blocks(page)}
        directives = {language for language in languages if language.startswith("{")}

        assert languages - directives <= {
            "python",
            "console",
            "bash",
            "text",
            "ini",
            "sql",
            "yaml",
            "json",
        }


class TestCommands:
    @pytest.mark.parametrize("page", with_commands())
    def test_commands_of_a_page_run_in_order_and_print_what_it_shows(
        self,
        page: Path,
        request: pytest.FixtureRequest,
        tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        """In one folder, with the programs of the page; identifiers, times and sizes may differ."""
        monkeypatch.chdir(tmp_path)
        for name in ("alembic", "alembic.ini", "examples"):
            (tmp_path / name).symlink_to(ROOT / name)
        programs = {block.name: block for block in blocks(page, "python") if block.name}
        for name, block in programs.items():
            (tmp_path / name).write_text(block.text, encoding="utf-8")
        if "back_up.py" in programs:
            create_database(tmp_path / "data" / "cluster.db")
        ids: dict[str, str] = {}

        for command, expected in commands_of(page):
            if is_not_run(command):
                continue
            for shown, actual in ids.items():
                command = command.replace(shown, actual)
            if PLACEHOLDER in command and "--sql" not in command:
                url = request.getfixturevalue("url")
                command = command.replace(PLACEHOLDER, url)
            written = run_command(command, programs, page)
            if expected is None:
                continue
            if command == "openclaw-store doctor":  # its findings are those of this machine
                assert findings(written) == findings(expected)
            else:
                assert varying(written) == varying(expected), command
                ids |= zip(re.findall(ID, expected), re.findall(ID, written), strict=True)

    def test_every_entry_of_the_table_is_about_a_command(self) -> None:
        commands = [command for page in pages() for command, _ in commands_of(page)]

        unused = [one for one in NOT_RUN if not any(re.fullmatch(one, it) for it in commands)]
        assert unused == []

    def test_every_command_of_the_command_line_is_shown(self) -> None:
        page = HOW_TO / "command-line.md"
        shown = {command.split()[1] for command, _ in commands_of(page) if " " in command}

        names = {one.name or one.callback.__name__ for one in app.registered_commands}  # type: ignore[union-attr]
        assert names | {"db"} <= shown

    def test_ci_finds_the_command_of_the_tests(self) -> None:
        """`.ci/run` runs the first line of README's `bash` blocks that has `bin/pytest` in it."""
        lines = [line for block in blocks(README, "bash") for line in block.text.splitlines()]

        [tests] = [line for line in lines if "bin/pytest" in line]
        assert tests.startswith("python3 -m venv .venv && ")
        assert tests.endswith(" && .venv/bin/pytest -q")
        assert [line for line in lines if "examples/storage_demo.py" in line]


def run_command(command: str, programs: Mapping[str, Block], page: Path) -> str:
    """Run a command in the current folder; returns its output."""
    program, *arguments = shlex.split(command)
    if program == "openclaw-store":
        return CliRunner().invoke(app, arguments).output
    if program == "python" and arguments[0] in programs:
        assert len(arguments) == 1
        return run_program(programs[arguments[0]].text, page)
    if program == "pytest":
        return run_pytest(*arguments)
    folder = Path(sys.executable).parent
    done = subprocess.run(
        ["bash", "-euo", "pipefail", "-c", command],
        env={**os.environ, "PATH": f"{folder}{os.pathsep}{os.environ['PATH']}"},
        capture_output=True,
        text=True,
        encoding="utf-8",
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def findings(text: str) -> list[str]:
    """The names of the findings of `doctor`."""
    return re.findall(r"^(?:ok|warning|error) +(\w+)", text, re.MULTILINE)


class TestTutorial:
    @pytest.mark.sqlite
    @pytest.mark.parametrize("page", ["tutorial/index.md", "zh/tutorial.md"])
    def test_tasks_of_a_killed_worker_are_completed_by_the_other_one(
        self, page: str, tmp_path: Path
    ) -> None:
        """The commands of step 6, in the order in which the page gives them."""
        for block in blocks(DOCS / page, "python"):
            if block.name in NOT_ALONE:
                quick = block.text.replace('"seconds": 4', '"seconds": 0.6')
                (tmp_path / block.name).write_text(quick, encoding="utf-8")
        lines: list[str] = []
        with contextlib.ExitStack() as stack:
            workers = {}
            for name in ("atlas", "boreas"):
                workers[name] = start_python(stack, tmp_path, "worker.py", name)
                wait_until(
                    partial(is_registered, tmp_path / "cluster.db", name), f"{name} has joined"
                )
            coordinator = start_python(stack, tmp_path, "coordinator.py")
            assert coordinator.stdout is not None
            for line in coordinator.stdout:
                lines.append(line)
                if "running" in line and "atlas" in line and workers["atlas"].poll() is None:
                    workers["atlas"].kill()
                    workers["atlas"].wait()
            assert coordinator.wait(30) == 0
            workers["boreas"].send_signal(signal.SIGINT)
            assert workers["boreas"].wait(30) == 0

        printed = "".join(lines)
        assert len(re.findall(r"completed.*(?:atlas|boreas)", printed)) == 6
        assert re.search(r"^atlas.*silent for more than 3 s", printed, re.MULTILINE)
        assert re.search(r"pending.*node lost", printed)
        [shown] = [one.text for one in blocks(DOCS / page, "text") if "node lost" in one.text]
        assert set(map(kind_of, shown.splitlines())) <= set(map(kind_of, lines))

    @pytest.mark.sqlite
    @pytest.mark.parametrize("page", ["tutorial/index.md", "zh/tutorial.md"])
    async def test_worker_and_recovery_end_all_kinds_of_tasks(
        self, page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, make_task: MakeTask
    ) -> None:
        monkeypatch.chdir(tmp_path)
        work = program(DOCS / page, "# worker.py")["main"]
        recover = program(DOCS / page, "# coordinator.py")["recover_regularly"]
        fields: dict[str, dict[str, Any]] = {
            "good": {"parameters": {"seconds": 0}},
            "bad": {},
            "lost": {"max_losses": 0},
        }
        tasks = [make_task(name=name, max_retries=0, **fields[name]) for name in fields]

        def assign_to_no_node(task: Task) -> None:
            task.status, task.assigned_node = TaskStatus.RUNNING, "nowhere"

        async with StateManager(Database("cluster.db")) as manager:
            await manager.add_tasks(tasks)
            await manager.change_task(tasks[2].task_id, assign_to_no_node)
            loops = [
                asyncio.create_task(work("worker_007")),
                asyncio.create_task(recover(manager)),
            ]
            good, bad, lost = [await manager.wait_for_task(task.task_id, 60) for task in tasks]
            for loop in loops:
                loop.cancel()
            await asyncio.wait(loops)

        assert (good.status, good.result) == (TaskStatus.COMPLETED, "done")
        assert bad.status is TaskStatus.FAILED
        assert bad.error is not None
        assert bad.error.endswith("KeyError: 'seconds'")
        assert (lost.status, lost.error) == (TaskStatus.FAILED, "lost too often")
        assert [loop.cancelled() for loop in loops] == [True, True]


def start_python(stack: contextlib.ExitStack, folder: Path, *arguments: str) -> Popen[str]:
    """Start a program in a folder; it is killed at the end at the latest."""
    process = stack.enter_context(
        Popen(
            [sys.executable, "-u", *arguments],
            cwd=folder,
            env={**os.environ, "PYTHONIOENCODING": "utf-8"},
            stdout=subprocess.PIPE,
            text=True,
            encoding="utf-8",
        )
    )
    stack.callback(process.kill)
    return process


def is_registered(path: Path, node_id: str) -> bool:
    """Whether a node is in a file of SQLite, which may not be there yet."""
    try:
        with contextlib.closing(sqlite3.connect(f"file:{path}?mode=ro", uri=True)) as connection:
            query = "SELECT count(*) FROM nodes WHERE node_id = ?"
            return bool(connection.execute(query, [node_id]).fetchone()[0])
    except sqlite3.OperationalError:
        return False


def kind_of(line: str) -> str:
    """A line without the number of its task, and the name of its node."""
    return re.sub(r"atlas|boreas", "NODE", re.sub(r"\d+", "N", line)).strip()


class TestLinks:
    @pytest.mark.parametrize("page", [README, ROOT / "CHANGELOG.md", ROOT / "CONTRIBUTING.md"])
    def test_relative_links_lead_to_files_and_headings(self, page: Path) -> None:
        """Sphinx checks those of the other pages."""
        text = page.read_text(encoding="utf-8")

        targets = re.findall(r"\]\((?!https?:)([^)#\s]*)(#[^)\s]*)?\)", text)
        broken = [
            file + anchor
            for file, anchor in targets
            if not (target := page.parent / file if file else page).exists()
            or (anchor and anchor[1:] not in anchors(target))
        ]
        assert broken == []

    def test_readme_leads_to_every_kind_of_page(self) -> None:
        text = README.read_text(encoding="utf-8")

        for folder in ("tutorial", "how-to", "reference", "explanation", "zh"):
            assert f"](docs/{folder}/" in text
        for page in ("docs/architecture.md", "CONTRIBUTING.md", "CHANGELOG.md"):
            assert f"]({page})" in text

    def test_readme_is_a_front_door(self) -> None:
        text = README.read_text(encoding="utf-8")

        assert len(text.splitlines()) <= 180
        assert len(text.split()) < 1600

    def test_names_in_backticks_that_look_like_errors_exist(self) -> None:
        known = {*vars(errors), *vars(asyncio), *vars(builtins)}

        for page in pages():
            named = re.findall(r"`(\w+Error)`", page.read_text(encoding="utf-8"))
            assert [name for name in named if name not in known] == [], page

    def test_promises_of_readme_are_those_that_are_explained(self) -> None:
        short = re.findall(
            r"^\| \[(P\d)\]\(\S*#(p\d\S*)\)", README.read_text("utf-8"), re.MULTILINE
        )
        explained = (DOCS / "explanation" / "promises.md").read_text("utf-8")

        assert [name for name, _ in short] == [f"P{number}" for number in range(1, 10)]
        assert re.findall(r"^## (P\d)", explained, re.MULTILINE) == [name for name, _ in short]

    def test_tests_and_campaigns_that_are_named_exist(self) -> None:
        explained = (DOCS / "explanation" / "promises.md").read_text("utf-8")
        methods = (DOCS / "explanation" / "testing-methods.md").read_text("utf-8")
        tables = "".join(re.findall(r"^\| `.*$", explained, re.MULTILINE))
        files = set(re.findall(r"`(test_\w+\.py)`", tables))
        campaigns = {campaign.name for campaign in CAMPAIGNS}

        assert files - {file.name for file in (ROOT / "tests").rglob("test_*.py")} == set()
        assert set(re.findall(r"`([a-z-]+)`", tables)) <= campaigns
        attacks = "".join(re.findall(r"^\| (`[^|]*)\|", methods, re.MULTILINE))
        named = {*re.findall(r"`([a-z-]+)`", attacks), "history", "model"}
        assert named == campaigns


def anchors(page: Path) -> set[str]:
    """The anchors of the headings of a page."""
    headings = re.findall(r"^#+ (.*)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


class TestLogs:
    def test_all_loggers_are_described(self) -> None:
        page = (HOW_TO / "logs.md").read_text("utf-8")
        described = re.findall(r"^\| `openclaw_store\.(\w+)` \|", page, re.MULTILINE)

        named = {
            argument.value
            for module in (ROOT / "openclaw_store").rglob("*.py")
            for node in ast.walk(ast.parse(module.read_text(encoding="utf-8")))
            if isinstance(node, ast.Call) and ast.unparse(node.func) == "logger_of"
            for argument in node.args
            if isinstance(argument, ast.Constant) and isinstance(argument.value, str)
        }
        assert described == sorted(named)


def program(page: Path, word: str) -> dict[str, Any]:
    """The names that the program of a page defines; the program with this word in it."""
    [block] = [block for block in blocks(page, "python") if word in block.text]
    names: dict[str, Any] = {"__name__": "program"}
    exec(compile(block.text, str(page), "exec", dont_inherit=True), names)
    return names


class TestBackup:
    @pytest.mark.sqlite
    async def test_lost_task_is_there_again_after_a_restore(
        self, tmp_path: Path, make_task: MakeTask, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """And no more copies are kept than `keep`."""
        monkeypatch.chdir(tmp_path)
        page = HOW_TO / "backup.md"
        names = program(page, "def back_up")
        back_up: Callable[..., Any] = names["back_up"]
        clock = names["utc_now"] = FakeClock()
        [restore] = [command for command, _ in commands_of(page) if " restore " in command]

        async with Database("data/cluster.db") as db:
            await TaskRepository(db).create(make_task(task_id="precious"))
            for _ in range(4):
                copy = await back_up(db, Path("backups"), keep=2)
                clock.advance(days=1)
            await TaskRepository(db).delete("precious")
        kept = sorted(os.listdir("backups"))
        command = restore.replace("backups/monday.db", str(copy))
        await asyncio.to_thread(run_command, command, {}, page)

        assert kept == ["cluster-20260303T120000.db", "cluster-20260304T120000.db"]
        async with Database("data/cluster.db") as db:
            assert await TaskRepository(db).get("precious")


class TestMove:
    @pytest.mark.postgresql
    async def test_state_moves_to_postgresql_and_back(
        self, tmp_path: Path, server: Databases, make_task: MakeTask
    ) -> None:
        move: Callable[..., Any] = program(HOW_TO / "move.md", "def move")["move"]
        task = make_task(parameters={"a": [1, {"b": None}]})
        async with Database(tmp_path / "cluster.db") as db:
            await TaskRepository(db).create(task)
        url = await server.create_database()

        try:
            there = await move(str(tmp_path / "cluster.db"), url)
            back = await move(url, str(tmp_path / "back.db"))
        finally:
            await server.drop_database(url)

        assert there == back
        assert (there.nodes, there.tasks, there.changes) == (0, 1, 1)
        async with Database(tmp_path / "back.db") as db:
            assert await TaskRepository(db).get(task.task_id) == task


class TestWebService:
    @pytest.fixture
    async def service(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> AsyncIterator[tuple[Any, Any]]:
        """The clients of two users."""
        monkeypatch.chdir(tmp_path)
        monkeypatch.setenv("SERVICE_TOKENS", "anna=first ben=second")
        app = program(HOW_TO / "web-service.md", "FastAPI(")["app"]
        async with (
            app.router.lifespan_context(app), client_of(app) as anna, client_of(app) as ben
        ):  # fmt: skip
            anna.headers["authorization"] = "Bearer first"
            ben.headers["authorization"] = "Bearer second"
            yield anna, ben

    @pytest.mark.sqlite
    async def test_service_keeps_tasks_and_says_why_it_refuses_a_request(
        self, service: tuple[Any, Any]
    ) -> None:
        client, _ = service

        added = await client.post("/tasks", json={**WANTED, "priority": 1})
        task = added.json()
        path = f"/tasks/{task['task_id']}"
        found = await client.get(path)
        change = {"version": task["version"], "parameters": {"gpus": [0, 1.5]}}
        changed = await client.patch(path, json=change)
        outdated = await client.patch(path, json=change)
        unknown = await client.get("/tasks/nobody")
        wrong = await client.post("/tasks", json={**WANTED, "task_type": "odd"})

        assert (added.status_code, found.status_code, changed.status_code) == (201, 200, 200)
        assert found.json() == task
        assert task["submitted_at"].endswith("Z")
        assert (outdated.status_code, unknown.status_code, wrong.status_code) == (409, 404, 422)
        assert "read it again" in outdated.json()["detail"]
        async with Database("./data/cluster.db") as db:
            stored = await TaskRepository(db).get(task["task_id"])
        assert stored == Task.from_dict(changed.json())
        assert (stored.priority, stored.parameters) == (1, {"gpus": [0, 1.5]})

    @pytest.mark.sqlite
    async def test_attacks_change_nothing(self, service: tuple[Any, Any]) -> None:
        anna, ben = service
        task = (await anna.post("/tasks", json=WANTED | {"idempotency_key": "key"})).json()
        path = f"/tasks/{task['task_id']}"
        nobody = {"authorization": "Bearer third"}
        forbidden = {
            "status": "completed", "assigned_node": "n", "attempt": 7, "user_id": "ben",
            "task_id": "t", "retry_count": -1, "max_retries": 10**6, "completed_at": "2026-01-01",
            "result": 1, "submitted_at": "1970-01-01T00:00:00Z", "updated_at": None,
        }  # fmt: skip
        malformed = [
            b"", b"{", b"[]", b"null", b"[" * 100_000, b'{"name": "\\ud800", "task_type": "batch"}',
            b'{"name": 1, "task_type": "batch"}', b'{"name": "a", "task_type": ["batch"]}',
            b'{"name": "a", "task_type": "batch", "parameters": {"a": NaN}}',
            b'{"name": "a", "task_type": "batch", "priority": 0}',
            b'{"name": "a", "task_type": "batch", "priority": true}',
            b'{"name": "a\\u0000", "task_type": "batch"}', b"\xff\xfe",
        ]  # fmt: skip

        answers = [
            await anna.request(method, path, headers=nobody, json=body)
            for method, body in (("GET", None), ("POST", WANTED), ("PATCH", {"version": 1}))
        ]
        answers += [await ben.get(path), await ben.patch(path, json={"version": task["version"]})]
        for name, value in forbidden.items():
            answers.append(await anna.post("/tasks", json={**WANTED, name: value}))
            body = {"version": task["version"], name: value}
            answers.append(await anna.patch(path, json=body))
        kind = {"content-type": "application/json"}
        answers += [await anna.post("/tasks", content=body, headers=kind) for body in malformed]
        other = await ben.post("/tasks", json=WANTED | {"idempotency_key": "key"})

        assert [answer.status_code for answer in answers[:5]] == [401, 405, 401, 404, 404]
        assert {answer.status_code for answer in answers[5:]} <= {400, 422}
        assert other.json()["task_id"] != task["task_id"]
        assert (await anna.get(path)).json() == task
        async with Database("./data/cluster.db") as db:
            assert await TaskRepository(db).count_by_status() == 2

    @pytest.mark.sqlite
    async def test_hostile_numbers_are_refused(self, service: tuple[Any, Any]) -> None:
        """A number out of range in a body that was refused could not be written in the answer."""
        client, _ = service
        task = (await client.post("/tasks", json=WANTED)).json()
        path, kind = f"/tasks/{task['task_id']}", {"content-type": "application/json"}
        numbers = [
            "1e400", "-1e400", "NaN", "Infinity", "-Infinity", "1e308", "1.0", "0.1", "-1", "true",
            "9" * 400, "9" * 5000, str(2**63), str(-(2**63) - 1), '"1"', "null", "[1e400]",
            '{"\\ud800": 1e400}',
        ]  # fmt: skip

        statuses = {}
        for number in numbers:
            bodies = {
                "POST": ["priority", "name", "idempotency_key", "task_type", "x", "\\ud800"],
                "PATCH": ["version", "priority", "name", "parameters", "x"],
            }
            for method, fields in bodies.items():
                for field in fields:
                    given = {name: json.dumps(value) for name, value in WANTED.items()}
                    others = given if method == "POST" else {"version": str(task["version"])}
                    pairs = {**others, field: number}.items()
                    body = ", ".join(f'"{name}": {value}' for name, value in pairs)
                    where = "/tasks" if method == "POST" else path
                    answer = await client.request(
                        method, where, content=f"{{{body}}}", headers=kind
                    )
                    statuses[method, field, number] = answer.status_code
        nested = [
            await client.post(
                "/tasks",
                content=f'{{"task_type": "batch", "name": "a", "parameters": {{"a": {number}}}}}',
                headers=kind,
            )
            for number in numbers
        ]

        assert {code for code in statuses.values() if code >= 500} == set()
        assert statuses["PATCH", "version", "1e400"] == 422
        accepted = {(field, number) for (_, field, number), code in statuses.items() if code < 400}
        assert accepted <= {
            ("name", '"1"'), ("idempotency_key", '"1"'), ("idempotency_key", "null"),
            ("parameters", "null"),
        }  # fmt: skip
        assert {answer.status_code for answer in nested} <= {201, 400, 422}
        assert nested[0].status_code == 422

    def test_request_of_the_page_is_one_that_the_service_takes(self) -> None:
        [block] = [b for b in blocks(HOW_TO / "web-service.md", "bash") if "curl" in b.text]
        words = shlex.split(block.text)

        assert json.loads(words[words.index("-d") + 1]) == WANTED
        assert words[words.index("POST") + 1].endswith("/tasks")


class TestThreats:
    PAGE = ROOT / "docs" / "explanation" / "threats.md"

    def rows(self) -> list[list[str]]:
        """The cells of the rows of all tables."""
        lines = self.PAGE.read_text(encoding="utf-8").splitlines()
        cells = [line.strip("|").split(" | ") for line in lines if line.startswith("| ")]
        return [row for row in cells if row[0].strip() != "attack"]

    def test_each_attack_has_a_defence_and_tests_that_exist(self) -> None:
        assert len(self.rows()) > 20
        for attack, _, tests in self.rows():
            named = re.findall(r"`([\w/.:]*test_[\w/.:]+)`", tests)
            assert named, attack
            for name in named:
                file, *parts = name.split("::") if ".py" in name else ("test_security.py", name)
                text = (ROOT / "tests" / file).read_text(encoding="utf-8")
                for part in parts:
                    assert re.search(rf"(def|class) {part}\b", text), name


WANTED = {"task_type": "batch", "name": "train"}
"""The body of a request for a new task."""


def client_of(app: Any) -> httpx.AsyncClient:
    """A client that reaches an application without a network."""
    return httpx.AsyncClient(transport=httpx.ASGITransport(app=app), base_url="http://store")


class TestWorker:
    PAGE = HOW_TO / "worker.md"

    @pytest.mark.sqlite
    async def test_program_runs_both_handlers_until_a_signal(
        self, tmp_path: Path, make_task: MakeTask, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.chdir(tmp_path)
        jobs = ModuleType("jobs")
        vars(jobs).update(program(self.PAGE, "# jobs.py"))
        monkeypatch.setitem(sys.modules, "jobs", jobs)
        names = program(self.PAGE, "# run_worker.py")
        tasks = [make_task(parameters={"name": "you"}), make_task(parameters={"steps": 2})]
        results = []

        async with StateManager(Database("./data/cluster.db")) as manager:
            for task, handle in zip(tasks, (jobs.handle, jobs.count), strict=True):
                names["handle"] = handle
                await manager.add_task(task)
                working = asyncio.create_task(names["main"]())
                results.append((await manager.wait_for_task(task.task_id, 60)).result)
                signal.raise_signal(signal.SIGTERM)
                await working

        assert results == [{"hello": "you"}, 2]

    @pytest.mark.sqlite
    async def test_submitted_task_is_run_by_the_worker_of_the_page(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
    ) -> None:
        monkeypatch.chdir(tmp_path)
        jobs = ModuleType("jobs")
        vars(jobs).update(program(self.PAGE, "# jobs.py"))
        monkeypatch.setitem(sys.modules, "jobs", jobs)
        async with Database("./data/cluster.db"):  # as `db upgrade` makes it
            working = asyncio.create_task(program(self.PAGE, "# run_worker.py")["main"]())

            await program(self.PAGE, "# submit.py")["main"]()

            signal.raise_signal(signal.SIGTERM)
            await working
        [shown] = [one.text for one in blocks(self.PAGE, "text") if "completed {" in one.text]
        assert capsys.readouterr().out.strip() == shown.strip()

    def test_unit_of_systemd_waits_for_longer_than_the_grace(self) -> None:
        [block] = blocks(self.PAGE, "ini")
        service = unit(block.text)["Service"]
        program, name, *arguments = shlex.split(service["ExecStart"])
        command = typer.main.get_command(app).commands[name]  # type: ignore[attr-defined]

        options = command.make_context(name, arguments).params

        assert Path(program).name == "openclaw-store"
        assert options["handler"] == "jobs:handle"
        assert service["KillSignal"] == "SIGTERM"
        assert float(service["TimeoutStopSec"]) > options["grace"]


class TestCleanUp:
    @pytest.mark.sqlite
    async def test_units_of_systemd_clean_up(
        self, tmp_path: Path, make_task: MakeTask, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        page = HOW_TO / "clean-up.md"
        service, timer = [unit(block.text) for block in blocks(page, "ini")]
        path = tmp_path / "cluster.db"
        clock = FakeClock()  # long ago
        async with Database(path, clock=clock) as db:
            await TaskRepository(db).create(
                make_task(task_id="done", status=TaskStatus.COMPLETED, completed_at=clock())
            )
            await TaskRepository(db).create(make_task(task_id="live"))
        name, _ = service["Service"]["Environment"].split("=")
        program, *arguments = shlex.split(service["Service"]["ExecStart"])
        monkeypatch.setenv(name, str(path))

        done = await asyncio.to_thread(CliRunner().invoke, app, arguments)

        assert Path(program).name == "openclaw-store"
        assert (done.exit_code, done.output) == (0, "1 task removed\n")
        async with Database(path) as db:
            pending = await TaskRepository(db).list_by_status(TaskStatus.PENDING)
            assert [task.task_id for task in pending] == ["live"]
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


class TestSchema:
    @pytest.mark.sqlite
    def test_query_of_the_page_reads_names_and_times(self, tmp_path: Path) -> None:
        [query] = blocks(HOW_TO / "schema.md", "sql")
        clock = FakeClock()

        async def add() -> None:
            async with Database(tmp_path / "cluster.db", clock=clock) as db:
                task = Task.create(TaskType.BATCH, "train", submitted_at=clock())
                await TaskRepository(db).create(task)

        asyncio.run(add())

        with contextlib.closing(sqlite3.connect(tmp_path / "cluster.db")) as connection:
            assert connection.execute(query.text).fetchall() == [("train", "2026-03-01 12:00:00")]


class TestReplay:
    @pytest.mark.sqlite
    def test_log_of_the_page_is_replayed_and_proved(self, tmp_path: Path) -> None:
        page = HOW_TO / "replay.md"
        [command] = [block.text for block in blocks(page, "bash")]
        [proof] = [block.text for block in blocks(page, "text")]

        done = subprocess.run(
            ["bash", "-euo", "pipefail", "-c", command.replace("examples/", f"{ROOT}/examples/")],
            cwd=tmp_path,
            env={
                **os.environ,
                "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}",
                "TMPDIR": str(tmp_path),
            },
            capture_output=True,
            text=True,
            encoding="utf-8",
            check=False,
        )

        assert (done.returncode, done.stderr) == (0, "")
        assert done.stdout.endswith(proof)
