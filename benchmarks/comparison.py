"""The library's own figures at two commits: `python -m benchmarks --against REVISION`.

Each commit runs its own `benchmarks` package in its own checkout, one process per sample, in turns.
Figures of other libraries are left out: their code is the same on both sides.
"""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any

from rich import box
from rich.table import Table

from benchmarks.measure import Samples

ROOT = Path(__file__).parent.parent
TOLERANCE = 1.05
"""A figure above this ratio counts as worse."""

_REFERENCES = (
    "sqlite3", "executemany", "aiosqlite", "SQLAlchemy", "huey", "asyncpg", "PgQueuer", "dict",
    "tuples",
)  # fmt: skip
"""Prefixes of contender names that are not the library."""

Measure = Callable[[Path, str], Samples]
"""Runs one round of a benchmark in a checkout."""


@dataclass(frozen=True, slots=True)
class Comparison:
    """A quantity of the library at both commits, one value per round."""

    benchmark: str
    contender: str
    quantity: str
    before: list[float] = field(default_factory=list)
    now: list[float] = field(default_factory=list)

    @property
    def ratio(self) -> float:
        """Ratio of the medians, above 1 if the figure is worse now."""
        return self._ratio(median(self.before), median(self.now))

    @property
    def ratios(self) -> list[float]:
        """Ratios of all rounds; their range shows the noise."""
        return list(map(self._ratio, self.before, self.now))

    def _ratio(self, before: float, now: float) -> float:
        if self.quantity == "per_s":
            before, now = now, before
        if not before:
            return math.inf if now else 1.0
        return now / before

    def as_json(self) -> dict[str, Any]:
        """Return the samples, and the ratio of their medians."""
        names = ("benchmark", "contender", "quantity", "before", "now", "ratio")
        return {name: getattr(self, name) for name in names}


@contextmanager
def checked_out(revision: str) -> Iterator[Path]:
    """Check a commit out into a temporary folder.

    Raises:
        CalledProcessError: If there is no such commit.
    """
    with TemporaryDirectory(prefix="openclaw-store-") as folder:
        checkout = Path(folder, "checkout").resolve()
        _git("worktree", "add", "--quiet", "--detach", str(checkout), revision)
        try:
            yield checkout
        finally:
            _git("worktree", "remove", "--force", str(checkout))


def compare(
    before: Path, now: Path, names: Sequence[str], rounds: int, measure: Measure
) -> list[Comparison]:
    """Measure both checkouts in turns; the first one alternates."""
    found: dict[tuple[str, str, str], Comparison] = {}
    for name in names:
        for number in range(rounds):
            # Neighbouring samples meet the same state of a shared machine; its drift hits both.
            sides = [(before, "before"), (now, "now")]
            for checkout, side in sides if number % 2 == 0 else sides[::-1]:
                for contender, quantity, value in _own(measure(checkout, name)):
                    key = name, contender, quantity
                    getattr(found.setdefault(key, Comparison(*key)), side).append(value)
    return [one for one in found.values() if one.before and one.now]


def require_own_library(checkout: Path) -> None:
    """Check that a process in a checkout imports the library from there.

    Raises:
        RuntimeError: If it imports another one, such as an installed one.
    """
    found = Path(_python(checkout, "-c", "import openclaw_store as o; print(o.__file__)").strip())
    if not found.is_relative_to(checkout.resolve()):
        raise RuntimeError(f"{checkout} would be measured with the library in {found.parent}")


def measure_in(checkout: Path, name: str, *arguments: str) -> Samples:
    """Run one round of a benchmark in a process of its own.

    Raises:
        CalledProcessError: If it fails.
    """
    with TemporaryDirectory(prefix="openclaw-store-") as folder:
        file = Path(folder, "figures.json")
        options = ("--only", name, "--rounds", "1", "--json", str(file), *arguments)
        _python(checkout, "-m", "benchmarks", *options)
        samples: Samples = json.loads(file.read_text("utf-8"))["benchmarks"][name]["samples"]
        return samples


def as_table(comparisons: Sequence[Comparison], revision: str) -> Table:
    """Show the medians, their ratio, and the range of the ratios of all rounds."""
    table = Table(box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False)
    table.add_column("figure")
    for name in (revision, "now", "ratio", "range", ""):
        table.add_column(name, justify="right", no_wrap=True)
    for one in comparisons:
        is_worse = one.ratio > TOLERANCE
        table.add_row(
            f"{one.benchmark}: {one.contender}, {one.quantity}",
            *(f"{median(values):,.4g}" for values in (one.before, one.now)),
            f"{one.ratio:.3f}",
            f"{min(one.ratios):.2f}–{max(one.ratios):.2f}",
            "[bold red]worse[/]" if is_worse else "",
        )
    return table


def _own(samples: Mapping[str, Mapping[str, Sequence[float]]]) -> Iterator[tuple[str, str, float]]:
    for contender, quantities in samples.items():
        if not contender.startswith(_REFERENCES):
            for quantity, values in quantities.items():
                yield contender, quantity, median(values)


def _python(checkout: Path, *arguments: str) -> str:
    return subprocess.run(  # noqa: S603 - this Python, in another checkout
        [sys.executable, *arguments],
        cwd=checkout,
        env={**os.environ, "PYTHONPATH": str(checkout)},  # before an installed library
        capture_output=True,
        text=True,
        check=True,
    ).stdout


def _git(*arguments: str) -> None:
    command = ("git", *arguments)
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True)  # noqa: S603
