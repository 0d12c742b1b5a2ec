"""The cut of the library, read from its source: layers, what they may not do, what is public."""

from __future__ import annotations

import ast
import inspect
import re
import subprocess
import sys
from collections.abc import Callable, Iterable
from functools import cache
from pathlib import Path

import pytest

import openclaw_store
from openclaw_store import errors

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "openclaw_store"
README = ROOT / "README.md"

MODULES = sorted(
    file.relative_to(PACKAGE).with_suffix("").as_posix() for file in PACKAGE.rglob("*.py")
)
"""Every module of the library, by its path: `domain/models`."""


STATEFUL = [one for one in MODULES if one.startswith(("repositories/", "state_manager/"))]
"""The modules that work in sessions which others make and end."""


@cache
def source(module: str) -> str:
    return (PACKAGE / f"{module}.py").read_text(encoding="utf-8")


@cache
def tree(module: str) -> ast.Module:
    return ast.parse(source(module))


@cache
def nodes(module: str) -> list[ast.AST]:
    return [*ast.walk(tree(module))]


@cache
def imports(module: str) -> set[str]:
    """The names that a module imports, in full, wherever it does."""
    names: set[str] = set()
    for node in nodes(module):
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module}: a relative import"
            names.update(f"{node.module}.{alias.name}" for alias in node.names)
    return names


@cache
def calls(module: str) -> list[tuple[str, int]]:
    """What a module calls, as it is written there: `datetime.now`; and the number of arguments."""
    return [
        (ast.unparse(node.func), len(node.args) + len(node.keywords))
        for node in nodes(module)
        if isinstance(node, ast.Call)
    ]


def offenders(modules: Iterable[str], find: Callable[[str], Iterable[str]]) -> dict[str, list[str]]:
    """What is found in each module that should have nothing of it."""
    found = {module: [*find(module)] for module in modules}
    return {module: names for module, names in found.items() if names}


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

    def test_no_module_is_too_long_to_read(self) -> None:
        lengths = {one: len(source(one).splitlines()) for one in MODULES}

        assert {one: length for one, length in lengths.items() if length > 500} == {}

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
            "state_manager/sorted_keys",
            "state_manager/task_index",
            "state_manager/node_index",
            "state_manager/applied_changes",
        ],
    )
    def test_module_does_not_await(self, module: str) -> None:
        waiting = (ast.AsyncFunctionDef, ast.Await, ast.AsyncFor, ast.AsyncWith)

        assert not [node for node in ast.walk(tree(module)) if isinstance(node, waiting)]
        assert "open" not in {name for name, _ in calls(module)}

    def test_tables_write_nothing(self) -> None:
        verbs = {f"sqlalchemy.{verb}" for verb in ("insert", "update", "delete")}

        assert imports("database/tables").isdisjoint(verbs)

    def test_modules_make_no_sessions_or_engines(self) -> None:
        makers = {"create_engine", "create_async_engine", "async_sessionmaker", "sessionmaker"}

        def find(module: str) -> set[str]:
            return makers & {name.rsplit(".")[-1] for name in imports(module)}

        assert len(STATEFUL) > 30
        assert offenders(STATEFUL, find) == {}

    def test_modules_commit_nothing_themselves(self) -> None:
        ends = re.compile(r".*\.(commit|rollback)")

        def find(module: str) -> list[str]:
            return [name for name, _ in calls(module) if ends.fullmatch(name)]

        assert offenders(STATEFUL, find) == {}

    def test_only_the_database_sees_the_errors_of_its_driver(self) -> None:
        others = [one for one in MODULES if not one.startswith(("backends/", "database/"))]

        def find(module: str) -> list[str]:
            caught = [
                ast.unparse(node.type)
                for node in nodes(module)
                if isinstance(node, ast.ExceptHandler) and node.type is not None
            ]
            return [
                *(name for name in imports(module) if name.startswith("sqlalchemy.exc")),
                *(name for name in caught if "sqlite3" in name or "SQLAlchemy" in name),
            ]

        assert len(others) > 100
        assert offenders(others, find) == {}

    def test_only_the_clock_asks_the_system_for_the_time(self) -> None:
        """`time.monotonic` measures how long something took, and is nobody's time of day."""
        asking = re.compile(
            r"(.*\.)?(now|utcnow|today|time_ns|localtime|gmtime|ctime|strftime)|time\.time"
        )

        def find(module: str) -> list[str]:
            called = [name for name, _ in calls(module) if asking.fullmatch(name)]
            return [*called, *(imports(module) & {"time.time"})]  # as in `from time import time`

        assert {*offenders(MODULES, find)} == {"domain/clock"}

    def test_nothing_is_imported_by_star_or_warned_of(self) -> None:
        def find(module: str) -> list[str]:
            return [name for name in imports(module) if name.endswith("*") or name == "warnings"]

        assert offenders(MODULES, find) == {}


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

    def test_modules_and_what_is_public_in_them_have_docstrings(self) -> None:
        def find(module: str) -> list[str]:
            source = tree(module)
            public = [
                node
                for node in source.body
                if isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef)
                and not node.name.startswith("_")
            ]
            bare = [node.name for node in public if not ast.get_docstring(node)]
            return bare if ast.get_docstring(source) else ["the module", *bare]

        assert offenders(MODULES, find) == {}

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
            text = source(module)
            raised = re.findall(r"^ +(\w+(?:, \w+)*): ", text, re.MULTILINE)
            named = {name for names in raised for name in names.split(", ") if "Error" in name}

            assert {name for name in named if not hasattr(errors, name)} == set()
