"""The reference and docs/architecture.md: complete, and in agreement with the code."""

from __future__ import annotations

import ast
import importlib
import inspect
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import MISSING, Field, fields
from enum import Enum
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import typer

import openclaw_store
import pytest_openclaw_store
from openclaw_store import (
    Backoff,
    Change,
    Database,
    NodeInfo,
    NodeStatus,
    Retention,
    StateManager,
    StoreError,
    Task,
    TaskStatus,
    errors,
)
from openclaw_store.backends.postgresql.location import OPTIONS
from openclaw_store.cli.main import app
from openclaw_store.domain.models import ALIVE, ASSIGNED, FIELD_CHECKS, JSON_CHECKS, LIVE
from openclaw_store.domain.serialization import STORE_FIELDS
from openclaw_store.domain.validation import (
    MAX_ID_LENGTH,
    MAX_INTEGER,
    MAX_JSON_BYTES,
    MAX_JSON_DEPTH,
    MAX_TEXT_LENGTH,
    check_count,
    check_id,
    check_key,
    check_percentage,
    check_text,
    encode_json,
    encode_object,
)

PACKAGE = Path(openclaw_store.__file__).parent
ROOT = PACKAGE.parent
DOCS = ROOT / "docs"
PAGES: Mapping[type[Any], str] = {Task: "task", NodeInfo: "node"}

Table = list[list[str]]


@cache
def page(name: str) -> str:
    return (DOCS / f"{name}.md").read_text(encoding="utf-8")


def section(name: str, heading: str) -> str:
    """The text below a heading, up to the next heading of any depth."""
    _, found, rest = f"\n{page(name)}".partition(f"\n{heading}\n")
    assert found, f"{name}.md has no heading {heading!r}"
    return re.split(r"\n#+ ", rest, maxsplit=1)[0]


def tables(text: str) -> list[Table]:
    """The tables of a text, without their heads."""
    found: list[Table] = []
    below = False
    for line in text.splitlines():
        if not line.startswith("|"):
            below = False
        elif re.fullmatch(r"[|:-]+", line):
            found.append([])
            below = True
        elif below:
            cells = re.split(r"(?<!\\)\|", line)[1:-1]
            found[-1].append([cell.strip().replace("\\|", "|") for cell in cells])
    return found


def code(cell: str) -> list[str]:
    """The parts of a cell that are set as code."""
    return re.findall(r"`([^`]+)`", cell)


def default_of(field: Field[Any]) -> str:
    if field.default is not MISSING:
        value = field.default
        return str(
            repr(value) if not isinstance(value, Enum) else f"{type(value).__name__}.{value.name}"
        )
    return "required" if field.default_factory is MISSING else repr(field.default_factory())


class TestFields:
    @pytest.mark.parametrize("kind", PAGES)
    def test_every_field_has_a_row(self, kind: type[Any]) -> None:
        rows = tables(page(f"reference/{PAGES[kind]}"))[0]

        found = [
            (name.strip("`"), type.strip("`"), default.strip("`"))
            for name, type, default, *_ in rows
        ]
        assert found == [(one.name, one.type, default_of(one)) for one in fields(kind)]

    @pytest.mark.parametrize("kind", PAGES)
    def test_fields_that_only_the_store_sets_are_named(self, kind: type[Any]) -> None:
        rows = tables(page(f"reference/{PAGES[kind]}"))[0]

        only_store = {name.strip("`") for name, _, _, setter, _ in rows if setter == "store"}

        assert only_store == STORE_FIELDS & {one.name for one in fields(kind)}

    @pytest.mark.parametrize("kind", PAGES)
    def test_limits_are_those_of_the_checks(self, kind: type[Any]) -> None:
        assert MAX_JSON_BYTES == 16 << 20
        assert MAX_INTEGER == 2**63 - 1
        limits: dict[Any, str] = {
            check_id: f"1 to {MAX_ID_LENGTH} characters",
            check_key: f"up to {MAX_ID_LENGTH} characters",
            check_text: f"up to {MAX_TEXT_LENGTH:,} characters",
            check_count: "rom 0 to 2^63 − 1",
            check_percentage: "Percent, 0 to 100",
        }
        for name, _, _, _, text in tables(page(f"reference/{PAGES[kind]}"))[0]:
            field = name.strip("`")
            if field in JSON_CHECKS:
                assert "Up to 16 MiB as JSON" in text, field
                is_deep = JSON_CHECKS[field] in (encode_json, encode_object)
                assert (f"{MAX_JSON_DEPTH} levels deep" in text) == is_deep, field
            elif (limit := limits.get(FIELD_CHECKS[kind][field])) is not None:
                # A task with a timeout of 0, which older versions stored, must stay readable.
                limit = "From 1 to 2^63 − 1" if field == "timeout" else limit
                assert limit in text, field

    def test_states_of_tasks_are_complete(self) -> None:
        rows = tables(section("reference/task", "## States"))[0]

        assert [code(state) for state, *_ in rows] == [[status.name] for status in TaskStatus]
        assert {s.strip("`") for s, _, live, _ in rows if live == "yes"} == {s.name for s in LIVE}
        assert {s.strip("`") for s, _, _, held in rows if held == "yes"} == {
            s.name for s in ASSIGNED
        }

    def test_states_of_nodes_are_complete(self) -> None:
        rows = tables(section("reference/node", "## States"))[0]

        assert {state.strip("`") for state, *_ in rows} == {status.name for status in NodeStatus}
        assert {s.strip("`") for s, _, claims, _ in rows if claims == "yes"} == {"ONLINE"}
        assert {s.strip("`") for s, _, _, lost in rows if lost == "yes"} == {s.name for s in ALIVE}


class TestOptions:
    @pytest.mark.parametrize("kind", [Database, StateManager, Backoff, Retention])
    def test_every_option_has_a_row(self, kind: type[Any]) -> None:
        rows = tables(section("reference/options", f"## `{kind.__name__}`"))[0]
        expected = []
        for name, option in inspect.signature(kind).parameters.items():
            default = getattr(option.default, "__name__", repr(option.default))
            if option.default is inspect.Parameter.empty:
                default = "required"
            elif isinstance(option.default, Backoff):
                assert option.default == Backoff()
                default = "Backoff()"
            expected.append((name, default))

        assert [(name.strip("`"), default.strip("`")) for name, default, *_ in rows] == expected

    def test_every_variable_has_a_row(self) -> None:
        used: set[str] = set()
        for folder in ("openclaw_store", "alembic", "benchmarks", "campaigns", "devtools", "tests"):
            for file in (ROOT / folder).rglob("*.py"):
                text = file.read_text(encoding="utf-8")
                used.update(re.findall(r"(?<![\w])OPENCLAW_STORE_[A-Z]+(?:_[A-Z]+)*", text))

        rows = tables(section("reference/options", "## Environment variables"))[0]

        assert {name.strip("`") for name, *_ in rows} == used | {"CI"}

    def test_options_of_a_location_have_a_row(self) -> None:
        rows = tables(section("reference/options", "## Locations"))[1]

        named = {name for cell, *_ in rows for name in code(cell)}

        assert named - {"ssl", "direct_tls=true"} == OPTIONS


def commands(group: Any, *names: str) -> Iterator[tuple[str, Any]]:
    """The commands of a Typer group and of the groups in it, by their full names."""
    for name, command in group.commands.items():
        if hasattr(command, "commands"):
            yield from commands(command, *names, name)
        else:
            yield " ".join((*names, name)), command


class TestCommandLine:
    @pytest.fixture
    def root(self) -> Any:
        return typer.main.get_command(app)

    def test_every_command_has_a_section(self, root: Any) -> None:
        named = re.findall(r"^### `openclaw-store (.+)`$", page("reference/cli"), re.MULTILINE)

        assert sorted(named) == sorted(name for name, _ in commands(root))

    def test_help_lists_the_commands_in_the_order_of_the_page(self, root: Any) -> None:
        named = re.findall(r"^### `openclaw-store (\w+)`$", page("reference/cli"), re.MULTILINE)

        assert [name for name in root.list_commands(None) if name in named] == named

    def test_every_option_of_a_command_has_a_row(self, root: Any) -> None:
        for name, command in commands(root):
            text = section("reference/cli", f"### `openclaw-store {name}`")
            documented = {}
            for cell, *rest in (row for table in tables(text) for row in table):
                names = frozenset(part.split()[0] for part in code(cell))
                documented[names] = rest[0] if len(rest) == 2 else "required"
            expected = {}
            for one in command.params:
                if one.name in ("database", "cluster", "json"):
                    continue
                is_argument = one.param_type_name == "argument"
                spelled = [one.metavar or one.name.upper()] if is_argument else one.opts
                expected[frozenset((*spelled, *one.secondary_opts))] = one

            assert documented.keys() == expected.keys(), name
            for names, one in expected.items():
                given = documented[names].strip("`")
                assert (given == "required") == one.required, (name, names)
                if isinstance(one.default, int | str) and not isinstance(one.default, bool):
                    assert given == str(one.default), (name, names)

    def test_every_common_option_has_a_row(self, root: Any) -> None:
        text = page("reference/cli").partition("## Exit status")[0]
        named = {
            part.split()[0] for table in tables(text) for row in table for part in code(row[0])
        }

        options = {option for one in root.params for option in (*one.opts, *one.secondary_opts)}

        assert named == options | {"--help", "-h"}


ERRORS = [
    kind
    for kind in vars(errors).values()
    if isinstance(kind, type) and issubclass(kind, StoreError)
]


class TestErrors:
    def test_every_error_has_a_section(self) -> None:
        headings = re.findall(r"^## (.+)$", page("reference/errors"), re.MULTILINE)

        assert sorted(headings) == sorted(kind.__name__ for kind in ERRORS)

    @pytest.mark.parametrize("kind", ERRORS)
    def test_section_answers_the_three_questions(self, kind: type[StoreError]) -> None:
        text = section("reference/errors", f"## {kind.__name__}")

        answers = re.findall(r"^\*\*(\w+)\.\*\* \S", text, re.MULTILINE)

        assert answers == ["When", "Written", "Next"]

    def test_tree_is_that_of_the_classes(self) -> None:
        lines = page("reference/errors").split("```")[1].strip().splitlines()[1:]
        drawn, path = [], [""]
        for line in lines:
            found = re.search(r"\w+", line)
            assert found is not None
            depth = found.start() // 4
            path[depth:] = [found.group()]
            drawn.append((found.group(), path[depth - 1] if depth else ""))

        assert sorted(drawn) == sorted(
            (kind.__name__, "" if kind is StoreError else kind.__mro__[1].__name__)
            for kind in ERRORS
        )

    def test_names_of_errors_exist(self) -> None:
        named = set(re.findall(r"\b[A-Z]\w+Error\b", page("reference/errors")))

        assert named - {kind.__name__ for kind in ERRORS} == {"ValueError", "LookupError"}


class TestMetrics:
    def keys(self, heading: str) -> list[str]:
        rows = tables(section("reference/metrics", f"## `{heading}.get_stats()`"))[0]
        return [name.strip("`") for name, *_ in rows]

    async def test_every_key_has_a_row(self, manager: StateManager) -> None:
        def flat(stats: Mapping[str, Any]) -> list[str]:
            return [*stats, *(f"writer.{name}" for name in stats["writer"])]

        of_database = flat(await manager.db.get_stats())
        of_manager = flat(await manager.get_stats())

        documented = self.keys("Database")
        assert sorted(documented) == sorted(of_database)
        assert sorted(documented + self.keys("StateManager")) == sorted(of_manager)


class TestApi:
    def test_every_public_name_is_documented(self) -> None:
        directives = r"^\.\. (?:auto\w+|py:\w+):: openclaw_store\.([\w.]+)"
        named = re.findall(directives, page("reference/api"), re.MULTILINE)

        assert sorted(name for name in named if "." not in name) == sorted(openclaw_store.__all__)

    def test_every_fixture_has_a_row(self) -> None:
        rows = tables(section("reference/api", "## Fixtures of pytest"))[0]

        fixtures = {name for name in vars(pytest_openclaw_store) if name.startswith("openclaw_")}
        assert {name.strip("`") for name, *_ in rows} == fixtures

    def test_every_field_of_a_change_has_a_row(self) -> None:
        rows = tables(section("reference/api", "## Values"))[0]

        found = [(name.strip("`"), type.strip("`")) for name, type, _ in rows]
        assert found == [
            (name, one.__forward_arg__) for name, one in Change.__annotations__.items()
        ]


def defined(body: Iterable[ast.stmt]) -> dict[str, list[ast.stmt]]:
    """The names that statements define, with the bodies of classes."""
    names: dict[str, list[ast.stmt]] = {}
    for statement in body:
        if isinstance(statement, ast.ClassDef):
            names[statement.name] = statement.body
        elif isinstance(statement, ast.FunctionDef | ast.AsyncFunctionDef):
            names[statement.name] = []
        elif isinstance(statement, ast.AnnAssign | ast.Assign):
            targets = statement.targets if isinstance(statement, ast.Assign) else [statement.target]
            names.update({ast.unparse(target): [] for target in targets})
    return names


class TestArchitecture:
    PLACES = re.findall(r"`(\w[\w/]*\.py)(?:::([\w.]+))?`", page("architecture"))

    def test_places_are_found(self) -> None:
        assert len(self.PLACES) > 40

    @pytest.mark.parametrize(("path", "name"), sorted({*PLACES}))
    def test_place_exists(self, path: str, name: str) -> None:
        home = ROOT if path == "pytest_openclaw_store.py" else PACKAGE
        body = ast.parse((home / path).read_text(encoding="utf-8")).body

        for part in name.split(".") if name else ():
            names = defined(body)
            assert part in names, f"{path} does not define {name}"
            body = names[part]

    def test_every_room_has_a_section(self) -> None:
        headings = re.findall(r"^### (.+)$", page("architecture"), re.MULTILINE)
        rooms = {
            f"{entry.name}/" if entry.is_dir() else entry.name
            for entry in PACKAGE.iterdir()
            if entry.suffix == ".py" or (entry / "__init__.py").exists()
        }

        assert {name for heading in headings for name in code(heading)} == rooms - {"__init__.py"}

    def test_links_lead_to_pages(self) -> None:
        for link in re.findall(r"\]\(([\w/.-]+)\)", page("architecture")):
            assert (DOCS / link).exists(), link


class TestContributing:
    TEXT = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")

    def test_every_target_of_make_is_named(self) -> None:
        makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
        [targets] = re.findall(r"^\.PHONY: (.+)$", makefile, re.MULTILINE)

        named = set(re.findall(r"\bmake (\w+)", self.TEXT))

        assert set(targets.split()) - {"clean"} <= named

    def test_files_exist(self) -> None:
        named = re.findall(
            r"`((?:openclaw_store|alembic|devtools|docs|tests|examples)/[\w/.-]+)`", self.TEXT
        )
        new = "_add_the_note.py"  # of the example

        missing = [name for name in named if not (ROOT / name).exists()]
        assert [name for name in missing if not name.endswith(new)] == []
        assert len(named) > 8

    def test_campaigns_and_benchmarks_exist(self) -> None:
        campaigns = re.findall(r"-m campaigns ([\w-]+)", self.TEXT)
        benchmarks = " ".join(re.findall(r"--only ((?:[a-z][\w-]* ?)+)", self.TEXT)).split()

        assert set(campaigns) <= self.names("campaigns")
        assert {"insert-64", "get-task"} <= set(benchmarks) <= self.names("benchmarks")

    def names(self, program: str) -> set[str]:
        """The names that a program lists: in a constant with the name of the program."""
        catalogue = vars(importlib.import_module(f"{program}.__main__"))[program.upper()]
        return {entry.name for entry in catalogue}
