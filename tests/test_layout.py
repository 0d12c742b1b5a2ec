"""The cut of the library, read from its source: layers, what they may not do, what is public."""

from __future__ import annotations

import ast
import asyncio
import builtins
import inspect
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import MakeNode, MakeTask

import openclaw_store
from openclaw_store import StateManager, Task, TaskStatus, errors

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "openclaw_store"
README = ROOT / "README.md"

MODULES = sorted(
    file.relative_to(PACKAGE).with_suffix("").as_posix() for file in PACKAGE.rglob("*.py")
)
"""Every module of the library, by its path: `domain/models`."""


def tree(module: str) -> ast.Module:
    return ast.parse((PACKAGE / f"{module}.py").read_text(encoding="utf-8"))


def imports(module: str) -> set[str]:
    """The names that a module imports, in full, wherever it does."""
    names: set[str] = set()
    for node in ast.walk(tree(module)):
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module}: a relative import"
            names.update(f"{node.module}.{alias.name}" for alias in node.names)
    return names


def calls(module: str) -> Iterator[tuple[str, int]]:
    """What a module calls, as it is written there: `datetime.now`; and the number of arguments."""
    for node in ast.walk(tree(module)):
        if isinstance(node, ast.Call):
            yield ast.unparse(node.func), len(node.args) + len(node.keywords)


class TestLayers:
    def test_import_contracts_are_kept(self) -> None:
        """The order of the rooms, and the imports that each forbids, are in `pyproject.toml`."""
        done = subprocess.run(
            [Path(sys.executable).with_name("lint-imports"), "--no-cache"],
            cwd=ROOT,
            capture_output=True,
            text=True,
            check=False,
        )

        assert done.returncode == 0, done.stdout

    @pytest.mark.parametrize("module", ["errors", "domain/clock"])
    def test_lowest_modules_use_nothing_but_python(self, module: str) -> None:
        top = {name.split(".")[0] for name in imports(module)}

        assert top <= sys.stdlib_module_names

    @pytest.mark.parametrize(
        "module",
        [
            *(module for module in MODULES if module.startswith("domain/")),
            "repositories/commands",
            "repositories/heartbeats",
            "repositories/unit_of_work",
            "state_manager/cache",
            "state_manager/indexes",
        ],
    )
    def test_module_does_not_await(self, module: str) -> None:
        waiting = (ast.AsyncFunctionDef, ast.Await, ast.AsyncFor, ast.AsyncWith)

        assert not [node for node in ast.walk(tree(module)) if isinstance(node, waiting)]
        assert "open" not in {name for name, _ in calls(module)}

    def test_tables_make_no_queries(self) -> None:
        verbs = {f"sqlalchemy.{verb}" for verb in ("select", "insert", "update", "delete")}

        assert imports("database/tables").isdisjoint(verbs)

    @pytest.mark.parametrize(
        "module", [m for m in MODULES if m.startswith(("repositories/", "state_manager/"))]
    )
    def test_module_makes_no_sessions_or_engines(self, module: str) -> None:
        makers = {"create_engine", "create_async_engine", "async_sessionmaker", "sessionmaker"}

        assert {name.rsplit(".")[-1] for name in imports(module)}.isdisjoint(makers)

    @pytest.mark.parametrize(
        "module", [m for m in MODULES if m.startswith(("repositories/", "state_manager/"))]
    )
    def test_module_commits_nothing_itself(self, module: str) -> None:
        ends = re.compile(r".*\.(commit|rollback)")

        assert [name for name, _ in calls(module) if ends.fullmatch(name)] == []

    @pytest.mark.parametrize(
        "module", [m for m in MODULES if not m.startswith(("backends/", "database/"))]
    )
    def test_only_the_database_sees_the_errors_of_its_driver(self, module: str) -> None:
        seen = {name for name in imports(module) if name.startswith("sqlalchemy.exc")}
        caught = [
            ast.unparse(node.type)
            for node in ast.walk(tree(module))
            if isinstance(node, ast.ExceptHandler) and node.type is not None
        ]

        assert seen == set()
        assert [name for name in caught if "sqlite3" in name or "SQLAlchemy" in name] == []

    @pytest.mark.parametrize("module", [module for module in MODULES if module != "domain/clock"])
    def test_only_the_clock_asks_the_system_for_the_time(self, module: str) -> None:
        """`time.monotonic` measures how long something took, and is nobody's time of day."""
        asking = re.compile(
            r"(.*\.)?(now|utcnow|today|time_ns|localtime|gmtime|ctime|strftime)|time\.time"
        )

        assert [name for name, _ in calls(module) if asking.fullmatch(name)] == []
        assert "time.time" not in imports(module)  # as in `from time import time`

    @pytest.mark.parametrize("module", MODULES)
    def test_nothing_is_imported_by_star_or_warned_of(self, module: str) -> None:
        assert not [name for name in imports(module) if name.endswith("*")]
        assert "warnings" not in imports(module)


class TestPublic:
    def test_all_is_sorted_and_there(self) -> None:
        names = openclaw_store.__all__

        assert names == sorted(set(names))
        assert [name for name in names if not hasattr(openclaw_store, name)] == []

    def test_all_is_complete(self) -> None:
        own = {name for name in imports("__init__") if name.startswith("openclaw_store.")}

        assert {name.rsplit(".")[-1] for name in own} | {"__version__"} == set(
            openclaw_store.__all__
        )
        assert set(openclaw_store.__all__) <= set(dir(openclaw_store))
        assert not hasattr(openclaw_store, "nonsense")

    def test_what_is_public_is_imported_when_it_is_asked_for(self) -> None:
        """Else the command line could not start in no time."""
        script = """
import sys, openclaw_store
print({"sqlalchemy", "asyncio", "orjson"} & sys.modules.keys())
from openclaw_store import *
from openclaw_store.database.database import Database as its_own
assert Database is its_own
"""

        done = subprocess.run(
            [sys.executable, "-W", "error", "-c", script],
            capture_output=True,
            text=True,
            check=False,
        )

        assert (done.stdout, done.stderr) == ("set()\n", "")

    def test_all_errors_are_public_and_have_one_root(self) -> None:
        own = {
            name: kind
            for name, kind in vars(errors).items()
            if inspect.isclass(kind) and kind.__module__ == errors.__name__
        }

        assert own.keys() <= set(openclaw_store.__all__)
        assert all(issubclass(kind, openclaw_store.StoreError) for kind in own.values())
        assert errors.__doc__ is not None
        assert [name for name in own if name not in errors.__doc__] == []

    def test_types_are_shipped(self) -> None:
        assert (PACKAGE / "py.typed").exists()

    @pytest.mark.parametrize("module", MODULES)
    def test_module_and_what_is_public_in_it_has_a_docstring(self, module: str) -> None:
        source = tree(module)
        public = [
            node
            for node in source.body
            if isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef)
            and not node.name.startswith("_")
        ]

        assert ast.get_docstring(source)
        assert [node.name for node in public if not ast.get_docstring(node)] == []

    @pytest.mark.parametrize(
        "kind",
        [
            openclaw_store.Database,
            openclaw_store.NodeRepository,
            openclaw_store.StateManager,
            openclaw_store.TaskRepository,
        ],
    )
    def test_everything_that_can_be_called_has_a_docstring(self, kind: type) -> None:
        bare = [
            name
            for name, member in inspect.getmembers(kind)
            if not name.startswith("_") and not inspect.getdoc(member)
        ]

        assert bare == []

    def test_errors_of_the_docstrings_exist(self) -> None:
        for module in MODULES:
            text = (PACKAGE / f"{module}.py").read_text(encoding="utf-8")
            raised = re.findall(r"^ +(\w+(?:, \w+)*): ", text, re.MULTILINE)
            named = {name for names in raised for name in names.split(", ") if "Error" in name}

            assert {name for name in named if not hasattr(errors, name)} == set()


def assign_to(node_id: str) -> Callable[[Task], None]:
    """A change that has a task run on a node."""

    def change(task: Task) -> None:
        task.status, task.assigned_node = TaskStatus.RUNNING, node_id

    return change


def blocks(language: str) -> list[str]:
    """The fenced blocks of the README in one language."""
    return re.findall(
        rf"^```{language}\n(.*?)^```$", README.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL
    )


@pytest.fixture
async def names(
    manager: StateManager,
    make_task: MakeTask,
    make_node: MakeNode,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> dict[str, Any]:
    """What the README's examples have defined, after all but the first of them were run."""
    monkeypatch.chdir(tmp_path)
    task, node = make_task(), make_node()
    await manager.add_task(task)
    await manager.add_node(node)
    names = {name: getattr(openclaw_store, name) for name in openclaw_store.__all__}
    names |= {"task_id": task.task_id, "node_id": node.node_id}
    for example in blocks("python")[1:]:
        names["state"] = manager
        code = compile(example, "README.md", "exec", ast.PyCF_ALLOW_TOP_LEVEL_AWAIT)
        awaited = eval(code, names)
        if awaited is not None:
            await awaited
    return names


class TestReadme:
    def test_first_example_runs(self, tmp_path: Path) -> None:
        example = blocks("python")[0]

        done = subprocess.run(
            [sys.executable, "-W", "error", "-c", example],
            cwd=tmp_path,
            capture_output=True,
            text=True,
            check=False,
        )

        assert (done.returncode, done.stderr) == (0, "")
        assert done.stdout
        assert [path.name for path in tmp_path.iterdir()] == ["data"]

    def test_other_examples_use_what_there_is(self) -> None:
        first, *others = blocks("python")
        known = set(openclaw_store.__all__)

        assert len(first.splitlines()) <= 25
        for example in others:
            for node in ast.walk(ast.parse(example)):
                if isinstance(node, ast.ImportFrom) and node.module == "openclaw_store":
                    assert {alias.name for alias in node.names} <= known

    def test_other_examples_run(
        self, names: dict[str, Any], capsys: pytest.CaptureFixture[str]
    ) -> None:
        printed = capsys.readouterr().out.splitlines()

        assert {"work", "recover_again_and_again"} <= names.keys()
        assert len(printed) == 3
        for line in printed:  # the example says so
            assert re.search(rf"  # {re.escape(line)}$", "".join(blocks("python")), re.MULTILINE)

    async def test_worker_and_recovery_of_the_examples_get_tasks_done(
        self, names: dict[str, Any], manager: StateManager, make_task: MakeTask
    ) -> None:
        async def do(task: Task) -> str:
            if task.name == "bad":
                raise ValueError("it is bad")
            return "done"

        names["do"] = do
        tasks = [make_task(name=name, max_retries=0) for name in ("good", "bad", "lost")]
        await manager.add_tasks(tasks)
        await manager.change_task(tasks[2].task_id, assign_to("nowhere"))

        loops = [
            asyncio.create_task(names["work"](manager, "worker_007")),
            asyncio.create_task(names["recover_again_and_again"](manager)),
        ]
        good, bad, lost = [await manager.wait_for_task(task.task_id, 60) for task in tasks]
        for loop in loops:
            loop.cancel()
        await asyncio.wait(loops)

        assert (good.status, good.result) == (TaskStatus.COMPLETED, "done")
        assert (bad.status, bad.error) == (TaskStatus.FAILED, "it is bad")
        assert (lost.status, lost.error) == (TaskStatus.FAILED, "node lost")
        assert [loop.cancelled() for loop in loops] == [True, True]

    def test_names_in_backticks_that_look_like_errors_exist(self) -> None:
        named = re.findall(r"`(\w+Error)`", README.read_text(encoding="utf-8"))

        known = {*vars(errors), *vars(asyncio), *vars(builtins)}
        assert [name for name in named if name not in known] == []

    def test_all_loggers_are_described(self) -> None:
        described = re.findall(
            r"^\| `openclaw_store\.(\w+)` \|", README.read_text("utf-8"), re.MULTILINE
        )

        assert described == sorted(
            argument.value.removeprefix("openclaw_store.")
            for module in MODULES
            for node in ast.walk(tree(module))
            if isinstance(node, ast.Call) and ast.unparse(node.func) == "logging.getLogger"
            for argument in node.args
            if isinstance(argument, ast.Constant) and isinstance(argument.value, str)
        )
