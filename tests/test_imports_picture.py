"""The picture of imports: complete, in the order of the contract, red against it."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

import grimp
import pytest

from devtools.imports import PACKAGE, ROOT, Plan, Room, draw, levels, read

SVG = "{http://www.w3.org/2000/svg}"


def plan_of(*layers: list[str], imports: dict[tuple[str, str], int]) -> Plan:
    rooms = {name: Room(name, ("one", "two"), 20) for names in layers for name in names}
    return Plan(layers, rooms, imports)


def texts(picture: str) -> list[str]:
    return [text.text or "" for text in ElementTree.fromstring(picture).iter(f"{SVG}text")]


def red_lines(picture: str) -> list[ElementTree.Element]:
    lines = ElementTree.fromstring(picture).iter(f"{SVG}path")
    return [line for line in lines if line.get("class") == "backwards"]


@pytest.fixture
def copied(tmp_path: Path) -> Path:
    """A folder with a copy of the library, which a test may change."""
    shutil.copytree(
        ROOT / PACKAGE, tmp_path / PACKAGE, ignore=shutil.ignore_patterns("__pycache__")
    )
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    return tmp_path


class TestPlan:
    def test_every_import_between_rooms_is_counted(self) -> None:
        graph = grimp.build_graph(PACKAGE, cache_dir=None)
        expected = [
            (importer, imported)
            for importer in graph.modules - {PACKAGE}
            for imported in graph.find_modules_directly_imported_by(importer) - {PACKAGE}
            if importer.split(".")[1] != imported.split(".")[1]
        ]

        plan = read(ROOT)

        assert sum(plan.imports.values()) == len(expected) > 100

    def test_every_room_is_on_one_layer(self) -> None:
        plan = read(ROOT)

        assert sorted(name for names in plan.layers for name in names) == sorted(plan.rooms)
        assert {"state_manager", "domain", "errors"} <= plan.rooms.keys()

    def test_import_that_climbs_is_backwards(self, copied: Path) -> None:
        before = read(copied).backwards
        with (copied / PACKAGE / "domain" / "clock.py").open("a", encoding="utf-8") as module:
            module.write("\nimport openclaw_store.state_manager.manager\n")

        plan = read(copied)

        assert plan.backwards - before == {("domain", "state_manager")}
        assert len(red_lines(draw(plan, "after"))) == len(before) + 1

    def test_room_that_the_contract_does_not_name_is_an_error(self, copied: Path) -> None:
        (copied / PACKAGE / "attic.py").write_text("")

        with pytest.raises(ValueError, match=r"names \['attic'\]"):
            read(copied)

    def test_tree_without_a_contract_is_drawn_by_levels(self, copied: Path) -> None:
        (copied / "pyproject.toml").write_text("")

        plan = read(copied)

        assert plan.layers[-1] == ["errors"]

    def test_level_is_one_above_the_highest_import(self) -> None:
        imports = [("a", "b"), ("b", "c"), ("a", "c"), ("d", "c")]

        assert levels("abcd", imports) == [["a"], ["b", "d"], ["c"]]

    def test_import_that_closes_a_circle_is_backwards(self) -> None:
        imports = {("a", "b"): 1, ("b", "c"): 1, ("c", "a"): 1}

        plan = plan_of(*levels("abc", imports), imports=imports)

        assert plan.backwards == {("c", "a")}


class TestDraw:
    def test_rooms_and_numbers_are_written(self) -> None:
        plan = plan_of(
            ["top"], ["left", "right"], imports={("top", "left"): 7, ("top", "right"): 9}
        )

        written = texts(draw(plan, "The title"))

        assert {"The title", "top", "left", "right", "7", "9", "one, two"} <= set(written)
        assert red_lines(draw(plan, "The title")) == []

    @pytest.mark.parametrize("pair", [("bottom", "top"), ("left", "right"), ("right", "left")])
    def test_import_against_the_order_is_red(self, pair: tuple[str, str]) -> None:
        plan = plan_of(
            ["top"], ["left", "right"], ["bottom"], imports={("top", "left"): 1, pair: 2}
        )

        assert len(red_lines(draw(plan, "red"))) == 1
        assert "2 against the order" in draw(plan, "red")

    def test_line_ends_at_the_room_that_is_imported(self) -> None:
        plan = plan_of(["top"], ["middle"], ["bottom"], imports={("top", "bottom"): 1})

        root = ElementTree.fromstring(draw(plan, "one line"))

        boxes = [box for box in root.iter(f"{SVG}rect") if box.get("class") == "room"]
        *_, down = (line for line in root.iter(f"{SVG}path") if line.get("class") == "line")
        assert str(down.get("d")).endswith(f"V{boxes[2].get('y')}")


class TestCommandLine:
    def test_commit_is_written_to_a_file(self, tmp_path: Path) -> None:
        picture = tmp_path / "imports.svg"

        subprocess.run(
            [sys.executable, "-m", "devtools.imports", "--commit", "HEAD", "--out", picture],
            cwd=ROOT,
            check=True,
        )

        assert f"Imports between the rooms of {PACKAGE} at HEAD" in texts(picture.read_text())

    @pytest.mark.parametrize("name", ["imports-before", "imports-after"])
    def test_stored_picture_is_small_and_whole(self, name: str) -> None:
        file = ROOT / "docs" / "_static" / f"{name}.svg"

        assert file.stat().st_size < 60_000
        assert any("imports between them" in text for text in texts(file.read_text()))
