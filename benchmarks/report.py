"""The report of a run: a table, a JSON file, a plot."""

from __future__ import annotations

import importlib
import os
import platform
import sqlite3
import tempfile
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from benchmarks.measure import Benchmark, Figure, Line, Samples, Skipped

PLOTTED = "insert-64"
"""The benchmark in the plot."""

_DURABILITY = "WAL, synchronous=FULL: every commit is flushed to the disk"
_SERVER_DURABILITY = "fsync=on, synchronous_commit=on"
_STYLES = {"reached": "green", "must": "yellow", "missed": "bold red"}
_BARS = {
    "executemany": "executemany, a commit for 64 rows,\nno checks, no history: the limit",
    "openclaw_store": "openclaw_store",
    "sqlite3": "sqlite3, a commit for each row",
    "huey": "huey, SQLite storage",
    "aiosqlite": "aiosqlite, a commit for each row",
    "SQLAlchemy ORM": "SQLAlchemy async ORM,\na commit for each row",
}


@dataclass(frozen=True, slots=True)
class Machine:
    """The machine and date of a measurement."""

    date: str
    cores: int
    load: float | None
    """Processes that wanted a core in the minute before; `None` if the system does not tell."""
    system: str
    python: str
    sqlite: str
    flush_ms: float
    """Median time to flush 4 KB to the disk."""
    postgresql: str | None = None
    """The server's version, if there is a server."""

    @classmethod
    def here(cls, folder: Path, postgresql: str | None = None) -> Machine:
        """Describe this machine, and the disk of `folder`."""
        load = None
        with suppress(AttributeError, OSError):  # not on every system
            load = round(os.getloadavg()[0], 1)
        return cls(
            date=f"{datetime.now(UTC):%Y-%m-%d}",
            cores=os.cpu_count() or 1,
            load=load,
            system=f"{platform.system()} {platform.machine()}",
            python=f"{platform.python_implementation()} {platform.python_version()}",
            sqlite=sqlite3.sqlite_version,
            flush_ms=round(_flush_ms(folder), 3),
            postgresql=postgresql,
        )

    def __str__(self) -> str:
        server = "" if self.postgresql is None else f"PostgreSQL {self.postgresql}, "
        return (
            f"{self.date}, {self.cores} cores, {self.system}, {self.python}, "
            f"SQLite {self.sqlite}, {server}a flush takes {self.flush_ms:.2f} ms"
        )

    @property
    def durability(self) -> str:
        """The settings that make commits durable."""
        if self.postgresql is None:
            return _DURABILITY
        return f"{_DURABILITY}; PostgreSQL likewise: {_SERVER_DURABILITY}"


@dataclass(frozen=True, slots=True)
class Result:
    """The result of a benchmark."""

    benchmark: Benchmark
    figures: Sequence[Figure | Skipped]
    samples: Samples


@dataclass(frozen=True, slots=True)
class Report:
    """The result of a run."""

    machine: Machine
    rounds: int
    divisor: int
    """Divisor of the work that the lines name."""
    results: Sequence[Result]

    def print(self, console: Console) -> None:
        """Print all figures beside their goals."""
        table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False)
        table.add_column("what", max_width=50)
        table.add_column("ours", justify="right", max_width=20)
        table.add_column("against", justify="right", max_width=28)
        for name in ("figure", "must", "aim"):
            table.add_column(name, justify="right", no_wrap=True)
        table.add_column("", no_wrap=True)
        for cells in self._rows():
            *texts, verdict = map(escape, cells)
            style = _STYLES.get(verdict)
            table.add_row(*texts, f"[{style}]{verdict}[/]" if style else verdict)
        load = "" if self.machine.load is None else f"; load before: {self.machine.load}"
        part = "" if self.divisor == 1 else f"; with 1/{self.divisor} of the work the lines name"
        console.print(f"{self.machine}{load}", f"All: {self.machine.durability}.", sep="\n")
        console.print(f"Medians of {self.rounds} interleaved rounds{part}.\n")
        console.print(table)

    def as_markdown(self) -> str:
        """Return the table in Markdown."""
        rows = [("what", "ours", "against", "figure", "must", "aim", ""), ("---", *["--:"] * 6)]
        lines = [f"| {' | '.join(cells)} |" for cells in [*rows, *self._rows()]]
        return "\n".join([f"{self.machine}; medians of {self.rounds} rounds.", "", *lines, ""])

    def _rows(self) -> list[Sequence[str]]:
        return [_cells(*found) for result in self.results for found in _lines(result)]

    def as_json(self) -> dict[str, Any]:
        """Return all figures, and every sample behind them."""
        return {
            "machine": asdict(self.machine),
            "durability": self.machine.durability,
            "rounds": self.rounds,
            "divisor": self.divisor,
            "benchmarks": {
                result.benchmark.name: {
                    "figures": [_as_dict(line, figure) for line, figure in _lines(result)],
                    "samples": result.samples,
                }
                for result in self.results
            },
        }

    def plot(self, path: Path) -> None:
        """Plot the writes per second of all contenders of `PLOTTED`.

        Raises:
            ModuleNotFoundError: If matplotlib is not installed.
        """
        [samples] = [found.samples for found in self.results if found.benchmark.name == PLOTTED]
        rates = {name: median(samples[name]["per_s"]) for name in _BARS if name in samples}
        importlib.import_module("matplotlib").use("agg")
        pyplot = importlib.import_module("matplotlib.pyplot")
        names = sorted(rates, key=rates.__getitem__)
        colours = {"openclaw_store": "#1f6feb", "executemany": "#d0d7de"}
        figure, axes = pyplot.subplots(figsize=(9, 4.2), layout="constrained")
        bars = axes.barh(
            [_BARS[name] for name in names],
            [rates[name] for name in names],
            color=[colours.get(name, "#8c959f") for name in names],
            height=0.62,
        )
        axes.bar_label(
            bars,
            [f"{rates[name]:,.0f}  ({rates[name] / rates['sqlite3']:.1f}×)" for name in names],
            padding=6,
        )
        axes.set_title("Durable inserts a second, 64 clients", loc="left", weight="bold", pad=14)
        axes.set_xlabel(f"{_DURABILITY}; × sqlite3\n{self.machine}", loc="left", fontsize=8)
        axes.margins(x=0.2)
        axes.spines[["top", "right", "bottom"]].set_visible(False)
        axes.tick_params(axis="y", length=0)
        axes.set_xticks([])
        figure.savefig(path, dpi=160)
        pyplot.close(figure)


def _lines(result: Result) -> list[tuple[Line, Figure | Skipped]]:
    return list(zip(result.benchmark.lines, result.figures, strict=True))


def _cells(line: Line, figure: Figure | Skipped) -> list[str]:
    must = aim = mark = ""
    if line.goal is not None:
        must = f"{line.goal.sign} {_number(line.goal.must, line.unit)}"
        if line.goal.aim is not None:
            aim = f"{line.goal.sign} {_number(line.goal.aim, line.unit)}"
    if isinstance(figure, Skipped):
        return [line.text, "", figure.reason, "", must, aim, "skipped"]
    if line.goal is not None:
        mark = line.goal.verdict(figure.value)
    return [
        line.text,
        figure.ours,
        figure.against,
        _number(figure.value, line.unit),
        must,
        aim,
        mark,
    ]


def _number(value: float, unit: str) -> str:
    digits = f"{value:.3g}" if abs(value) < 100 else f"{value:,.0f}"
    return f"{digits}×" if unit == "×" else f"{digits} {unit}"


def _as_dict(line: Line, figure: Figure | Skipped) -> dict[str, Any]:
    found: dict[str, Any] = {"what": line.text, "unit": line.unit}
    if line.goal is not None:
        found["goal"] = asdict(line.goal)
    if isinstance(figure, Skipped):
        return {**found, "skipped": figure.reason}
    verdict = None if line.goal is None else line.goal.verdict(figure.value)
    return {**found, **asdict(figure), "verdict": verdict}


def _flush_ms(folder: Path) -> float:
    seconds = []
    with tempfile.TemporaryFile(dir=folder) as file:
        for _ in range(51):
            file.write(bytes(4096))
            file.flush()
            began = perf_counter()
            os.fsync(file.fileno())
            seconds.append(perf_counter() - began)
    return median(seconds) * 1e3
