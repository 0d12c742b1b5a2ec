"""Draw the rooms of the library and the imports between them, as an SVG picture.

    python -m devtools.imports [--commit REV] [--out FILE.svg]

A room is a folder or a module directly below `openclaw_store/`. The rooms stand on a staircase, the
highest layer first. The line of an import leaves the importing room on the right, turns once, and
ends at the top of the imported room; the number at the turn counts the imports. An import against
the order of the layers is red; one that climbs leaves its room on the left.

The order is the contract of import-linter in `pyproject.toml`. A commit without a contract is drawn
by levels: a room stands one level above the highest room that it imports.
"""

from __future__ import annotations

import argparse
import importlib
import io
import subprocess
import sys
import tarfile
import tomllib
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from tempfile import TemporaryDirectory
from textwrap import wrap
from xml.sax.saxutils import escape

import grimp

ROOT = Path(__file__).parent.parent
PACKAGE = "openclaw_store"

Import = tuple[str, str]
"""The names of the importing room and of the imported room."""

_STYLE = """
text { font: 12px system-ui, "Segoe UI", "DejaVu Sans", sans-serif; fill: #1f2933 }
.title { font-size: 17px; font-weight: bold }
.name { font-weight: bold }
.small { font-size: 11px; fill: #52606d }
.page { fill: #ffffff }
.layer { fill: #f1f5f9 }
.room { fill: #dbeafe; stroke: #1d4ed8 }
.line { fill: none; stroke: #94a3b8 }
.backwards { fill: none; stroke: #dc2626; stroke-width: 1.5 }
.count { fill: #ffffff; stroke: #94a3b8 }
.count-backwards { fill: #fee2e2; stroke: #dc2626 }
.one { fill: #475569; stroke: none }
.number { font-size: 10px; text-anchor: middle }
.end { text-anchor: end }
"""


@dataclass(frozen=True)
class Room:
    """A folder or a module directly below the package."""

    name: str
    modules: tuple[str, ...]
    """Paths of its modules within the room, sorted; empty for a room that is one module."""
    lines: int
    """Lines of source text."""

    @property
    def size(self) -> str:
        lines = f"{self.lines:,} lines"
        return f"{len(self.modules)} modules, {lines}" if self.modules else lines


@dataclass(frozen=True)
class Plan:
    """The contents of a picture."""

    layers: Sequence[Sequence[str]]
    """Names of rooms, the highest layer first."""
    rooms: Mapping[str, Room]
    imports: Mapping[Import, int]
    """Numbers of imports of a module in one room by a module in another room."""

    @property
    def backwards(self) -> set[Import]:
        """The imports that do not lead to a lower layer."""
        depth = {name: place for place, names in enumerate(self.layers) for name in names}
        return {(upper, lower) for upper, lower in self.imports if depth[upper] >= depth[lower]}

    @property
    def title(self) -> str:
        return f"Imports between the {self._noun} of {PACKAGE}"

    @property
    def summary(self) -> str:
        """The figures of the picture, as one sentence."""
        against = sum(self.imports[pair] for pair in self.backwards)
        return (
            f"{len(self.rooms)} {self._noun} on {len(self.layers)} layers, "
            f"{sum(self.imports.values())} imports between them, {against} against the order."
        )

    @property
    def _noun(self) -> str:
        return "rooms" if any(room.modules for room in self.rooms.values()) else "modules"


def read(folder: Path) -> Plan:
    """Return the plan of the library in a folder, as a checkout has it.

    Raises:
        ValueError: If the contract of the folder does not name a room.
    """
    with _importable_from(folder):
        graph = grimp.build_graph(PACKAGE, cache_dir=None)
    home = folder / PACKAGE
    rooms = {}
    for child in graph.find_children(PACKAGE):
        name = child.removeprefix(f"{PACKAGE}.")
        files = sorted((home / name).rglob("*.py")) or [home / f"{name}.py"]
        modules = [file.relative_to(home / name) for file in files if (home / name).is_dir()]
        rooms[name] = Room(
            name,
            tuple(file.with_suffix("").as_posix() for file in modules if file.stem != "__init__"),
            sum(len(file.read_text(encoding="utf-8").splitlines()) for file in files),
        )
    imports: Counter[Import] = Counter()
    for importer in graph.modules - {PACKAGE}:
        for imported in graph.find_modules_directly_imported_by(importer) - {PACKAGE}:
            pair = _room_of(importer), _room_of(imported)
            imports[pair] += pair[0] != pair[1]
    counted = {pair: imports[pair] for pair in sorted(imports) if imports[pair]}
    layers = _contract(folder / "pyproject.toml") or levels(rooms, counted)
    missing = rooms.keys() - {name for names in layers for name in names}
    if missing:
        raise ValueError(f"no layer of the contract in pyproject.toml names {sorted(missing)}")
    present = ([name for name in names if name in rooms] for names in layers)
    return Plan([names for names in present if names], rooms, counted)


@contextmanager
def _importable_from(folder: Path) -> Iterator[None]:
    """Find the package in `folder` during the block, also where another copy is imported."""
    imported = sys.modules.pop(PACKAGE, None)
    sys.path.insert(0, str(folder))
    importlib.invalidate_caches()
    try:
        yield
    finally:
        sys.path.remove(str(folder))
        if imported is not None:
            sys.modules[PACKAGE] = imported


def _room_of(module: str) -> str:
    return module.split(".")[1]


def _contract(file: Path) -> list[list[str]]:
    """Return the layers of the package by the contract of import-linter; empty without one."""
    options = tomllib.loads(file.read_text(encoding="utf-8")).get("tool", {})
    for contract in options.get("importlinter", {}).get("contracts", ()):
        if contract["type"] == "layers" and contract.get("containers") == [PACKAGE]:
            return [
                [name.strip(" ()") for name in layer.replace(":", "|").split("|")]
                for layer in contract["layers"]
            ]
    return []


def levels(rooms: Iterable[str], imports: Iterable[Import]) -> list[list[str]]:
    """Return the rooms by levels, the highest first; an import that closes a circle counts nothing.

    Args:
        rooms: Names of rooms.
        imports: Imports between these rooms.
    """
    below: dict[str, list[str]] = {name: [] for name in sorted(rooms)}
    for upper, lower in sorted(imports):
        below[upper].append(lower)
    heights: dict[str, int] = {}
    visiting: set[str] = set()

    def height(name: str) -> int:
        if name not in heights:
            visiting.add(name)
            heights[name] = max(
                (height(lower) + 1 for lower in below[name] if lower not in visiting), default=0
            )
            visiting.remove(name)
        return heights[name]

    for name in below:
        height(name)
    highest = max(heights.values(), default=-1)
    return [[name for name in below if heights[name] == at] for at in range(highest, -1, -1)]


@dataclass(frozen=True)
class Box:
    """The position of a room in the picture, in pixels."""

    x: float
    y: float
    width: float
    height: float

    @property
    def middle(self) -> float:
        return self.y + self.height / 2


@dataclass(frozen=True)
class Scale:
    """Sizes of the parts of a picture, in pixels."""

    width: float
    """Width of a room."""
    step: float
    """Distance of two neighbours on the staircase, to the right."""
    gap: float
    """Distance of two neighbours on the staircase, downwards."""
    radius: float
    """Radius of the circle around a number."""
    letters: int
    """Letters in a line of module names; 0 leaves the names out."""


SMALL = Scale(width=168, step=22, gap=5, radius=7.5, letters=0)
"""For many rooms: each room is one line of text, and a single import is a dot."""

LARGE = Scale(width=330, step=40, gap=16, radius=10, letters=50)
"""For few rooms: each room lists its modules."""

MANY_ROOMS = 24
"""From this number on, a picture is drawn on the small scale."""

_MARGIN = 16.0
_HEAD = 78.0
_LEGEND = "A line leaves a box on its right, turns once, and ends at the box that is imported."


def draw(plan: Plan, title: str) -> str:
    """Return the picture of a plan, as the text of an SVG file."""
    scale = SMALL if len(plan.rooms) >= MANY_ROOMS else LARGE
    boxes, bands, (width, height) = _place(plan, scale)
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width:g} {height:g}" '
        f'width="{width:g}" height="{height:g}" role="img">',
        f"<title>{escape(title)}: {plan.summary}</title>",
        f"<style>{_STYLE}</style>",
        '<defs><marker id="end" viewBox="0 0 6 6" refX="5" refY="3" markerWidth="6" '
        'markerHeight="6" orient="auto"><path d="M0 0L6 3L0 6z" fill="#64748b"/></marker></defs>',
        f'<rect class="page" width="{width:g}" height="{height:g}" rx="8"/>',
        f'<text class="title" x="{_MARGIN:g}" y="28">{escape(title)}</text>',
        f'<text class="small" x="{_MARGIN:g}" y="48">{plan.summary}</text>',
        f'<text class="small" x="{_MARGIN:g}" y="65">{_LEGEND}</text>',
        *bands,
        *_lines(plan, boxes, scale),
        *(part for name, box in boxes.items() for part in _room(plan.rooms[name], box, scale)),
        "</svg>",
    ]
    return "\n".join(parts) + "\n"


def _place(plan: Plan, scale: Scale) -> tuple[dict[str, Box], list[str], tuple[float, float]]:
    """Return the position of each room, the bands of the layers, and the size of the picture."""
    boxes: dict[str, Box] = {}
    edges = [_HEAD]
    x, y = _MARGIN, _HEAD
    for names in plan.layers:
        for name in names:
            lines = len(_names(plan.rooms[name], scale))
            box = Box(
                x, y + scale.gap / 2, scale.width, 18 if not scale.letters else 26 + 14 * lines
            )
            boxes[name] = box
            x += scale.step
            y += box.height + scale.gap
        edges.append(y)
    width = x - scale.step + scale.width + _MARGIN
    bands = [
        f'<rect class="layer" y="{top:g}" width="{width:g}" height="{bottom - top:g}"/>'
        for place, (top, bottom) in enumerate(pairwise(edges))
        if place % 2 == 0
    ]
    return boxes, bands, (width, y + _MARGIN)


def _names(room: Room, scale: Scale) -> list[str]:
    """Return the modules of a room as lines of text."""
    return wrap(", ".join(room.modules), scale.letters) if scale.letters else []


def _room(room: Room, box: Box, scale: Scale) -> Iterator[str]:
    left, right = box.x + 8, box.x + box.width - 8
    yield (
        f'<rect class="room" x="{box.x:g}" y="{box.y:g}" width="{box.width:g}" '
        f'height="{box.height:g}" rx="4"/>'
    )
    base = box.y + (17 if scale.letters else 13)
    yield f'<text class="name" x="{left:g}" y="{base:g}">{escape(room.name)}</text>'
    size = room.size if scale.letters else str(room.lines)
    yield f'<text class="small end" x="{right:g}" y="{base:g}">{size}</text>'
    for place, line in enumerate(_names(room, scale), 1):
        yield (f'<text class="small" x="{left:g}" y="{base + 14 * place:g}">{escape(line)}</text>')


def _lines(plan: Plan, boxes: Mapping[str, Box], scale: Scale) -> Iterator[str]:
    """Draw the lines first and the numbers above them; lines of one room share their ways."""
    order = {name: place for place, name in enumerate(boxes)}
    backwards = plan.backwards
    counts = []
    rows: dict[str, float] = {}
    columns: dict[str, float] = {}
    for (upper, lower), count in plan.imports.items():
        start, end = boxes[upper], boxes[lower]
        is_backwards = (upper, lower) in backwards
        if order[upper] < order[lower]:
            x = end.x + end.width - scale.step / 2
            edge, way = start.x + start.width, f"V{end.y:g}"
        else:
            x = end.x + scale.step / 2
            edge, way = start.x, f"V{end.y + end.height:g}"
        if is_backwards:
            yield (
                f'<path class="backwards" d="M{edge:g} {start.middle:g}H{x:g}{way}" '
                'marker-end="url(#end)"/>'
            )
        else:
            rows[upper] = max(rows.get(upper, 0), x)
            columns[lower] = min(columns.get(lower, start.middle), start.middle)
        kind = "count-backwards" if is_backwards else "count"
        place = f'cx="{x:g}" cy="{start.middle:g}"'
        if count == 1 and not scale.letters:
            counts.append(f'<circle class="{kind} one" {place} r="3"/>')
        else:
            counts.append(
                f'<circle class="{kind}" {place} r="{scale.radius:g}"/>'
                f'<text class="number" x="{x:g}" y="{start.middle + 3.5:g}">{count}</text>'
            )
    for name, right in rows.items():
        box = boxes[name]
        yield f'<path class="line" d="M{box.x + box.width:g} {box.middle:g}H{right:g}"/>'
    for name, top in columns.items():
        box = boxes[name]
        x = box.x + box.width - scale.step / 2
        yield f'<path class="line" d="M{x:g} {top:g}V{box.y:g}" marker-end="url(#end)"/>'
    yield from counts


@contextmanager
def _source(commit: str | None) -> Iterator[Path]:
    """Give a folder with the source of a commit; `None` for the files as they are now."""
    if commit is None:
        yield ROOT
        return
    archive = subprocess.run(  # noqa: S603 - git is given a name, not a command
        ["git", "archive", commit, PACKAGE, "pyproject.toml"],  # noqa: S607
        cwd=ROOT,
        capture_output=True,
        check=True,
    ).stdout
    with TemporaryDirectory(prefix="imports-") as folder:
        with tarfile.open(fileobj=io.BytesIO(archive)) as files:
            files.extractall(folder, filter="data")
        yield Path(folder)


def main(arguments: Sequence[str] | None = None) -> None:
    """Write the picture that the command line asks for."""
    parser = argparse.ArgumentParser(prog="python -m devtools.imports", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("--commit", metavar="REV", help="draw this commit, not the working tree")
    parser.add_argument("--out", metavar="FILE.svg", type=Path, help="default: standard output")
    options = parser.parse_args(arguments)
    with _source(options.commit) as folder:
        plan = read(folder)
    of = "" if options.commit is None else f" at {options.commit}"
    picture = draw(plan, plan.title + of)
    if options.out is None:
        sys.stdout.write(picture)
    else:
        options.out.write_text(picture, encoding="utf-8")


if __name__ == "__main__":
    main()
