"""The parts of a benchmark: contenders that take turns, and figures with goals."""

from __future__ import annotations

import asyncio
import gc
import math
from collections.abc import (
    AsyncIterator,
    Awaitable,
    Callable,
    Coroutine,
    Iterator,
    Mapping,
    Sequence,
)
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from shutil import copyfile
from statistics import median
from time import perf_counter
from typing import Any, Literal, TypeVar

from devtools.postgres import Databases

T = TypeVar("T")

Sample = Mapping[str, float]
"""The result of a contender in one round, by quantity, such as `{"rows_per_s": 1700.0}`."""

Contender = Callable[[], Awaitable[Sample]]
"""Does the work once."""

Samples = dict[str, dict[str, list[float]]]
"""Values by contender and quantity, one for each round."""


@dataclass(frozen=True, slots=True)
class Goal:
    """The goal of a figure."""

    sign: Literal["≥", "≤"]
    must: float
    aim: float | None = None

    def verdict(self, value: float) -> str:
        """Return `reached` (the aim, or the minimum if there is no aim), `must`, or `missed`."""
        best = self.must if self.aim is None else self.aim
        if self._holds(value, best):
            return "reached"
        return "must" if self._holds(value, self.must) else "missed"

    def _holds(self, value: float, bound: float) -> bool:
        return value >= bound if self.sign == "≥" else value <= bound


def at_least(must: float, aim: float | None = None) -> Goal:
    """Return a goal for a value that should be large."""
    return Goal("≥", must, aim)


def at_most(must: float, aim: float | None = None) -> Goal:
    """Return a goal for a value that should be small."""
    return Goal("≤", must, aim)


@dataclass(frozen=True, slots=True)
class Line:
    """A line of the table, before the measurement."""

    text: str
    unit: str = "×"
    goal: Goal | None = None
    """`None` for a value without a goal."""


@dataclass(frozen=True, slots=True)
class Figure:
    """The content of a line of the table."""

    value: float
    ours: str
    against: str


@dataclass(frozen=True, slots=True)
class Skipped:
    """The reason for a missing figure."""

    reason: str


@dataclass(frozen=True, slots=True)
class Benchmark:
    """A measurement that fills some lines of the table."""

    name: str
    measure: Callable[[Bench], Coroutine[Any, Any, Sequence[Figure | Skipped]]]
    """Returns a figure for each of `lines`, in their order."""
    lines: tuple[Line, ...]
    needs_server: bool = False
    """True if it runs on PostgreSQL."""


class Bench:
    """The environment of a benchmark: amount of work, rounds, and databases.

    Args:
        folder: The folder for databases, so that all are on one file system.
        empty: A migrated database without rows.
        server: Creates databases on PostgreSQL; `None` without a server.
        empty_url: A migrated database on the server, without rows.
        rounds: Number of turns of each contender.
        divisor: Divisor of the work, for a quick impression.
        report: Called with the current step, and the finished share of the benchmark.
    """

    def __init__(
        self,
        folder: Path,
        empty: Path,
        *,
        server: Databases | None = None,
        empty_url: str | None = None,
        rounds: int,
        divisor: int,
        report: Callable[[str, float], None],
    ) -> None:
        self.rounds = rounds
        self.samples: Samples = {}
        self._folder = folder
        self._empty = empty
        self._server = server
        self._empty_url = empty_url
        self._divisor = divisor
        self._report = report
        self._numbers = count(1)

    def scaled(self, full: int, least: int = 1) -> int:
        """Scale the amount of work of a full run."""
        return max(full // self._divisor, least)

    @contextmanager
    def database(self, source: Path | None = None) -> Iterator[Path]:
        """Provide a copy of the database `source`, or an empty one, removed afterwards."""
        path = self._folder / f"{next(self._numbers)}.db"
        copyfile(source or self._empty, path)
        try:
            yield path
        finally:
            for suffix in ("", "-wal", "-shm"):
                path.with_name(path.name + suffix).unlink(missing_ok=True)

    @asynccontextmanager
    async def server_database(self, source: str | None = None) -> AsyncIterator[str]:
        """Provide a copy on the server, where databases have URLs.

        Raises:
            DBAPIError: If a client is still connected to it.
        """
        assert self._server is not None
        url = await self._server.create_database(source or self._empty_url)
        try:
            yield url
        finally:
            await self._server.drop_database(url)

    async def interleave(
        self, contenders: Mapping[str, Contender], rounds: int | None = None
    ) -> Mapping[str, Sample]:
        """Run each contender once per round, in rotated order, and return the medians."""
        names = list(contenders)
        rounds = rounds or self.rounds
        done = 0
        for number in range(rounds):
            first = number % len(names)
            # Rotated, so that no contender always runs after the same one, or first.
            for name in names[first:] + names[:first]:
                self._report(f"{name}, round {number + 1} of {rounds}", done / rounds / len(names))
                gc.collect()  # each contender collects only its own garbage
                of_name = self.samples.setdefault(name, {})
                for quantity, value in (await contenders[name]()).items():
                    of_name.setdefault(quantity, []).append(value)
                done += 1
        return {
            name: {quantity: median(values) for quantity, values in self.samples[name].items()}
            for name in names
        }


def percentile(values: Sequence[float], share: float) -> float:
    """Return the smallest value that at least `share` of all values do not exceed."""
    return sorted(values)[max(0, math.ceil(len(values) * share) - 1)]


async def drive(clients: int, items: Sequence[T], call: Callable[[T], Awaitable[object]]) -> Sample:
    """Distribute the items over `clients` coroutines, each making one call after another.

    The first call of each does not count: it opens connections and compiles statements.
    """
    latencies: list[float] = []

    async def client(share: Sequence[T]) -> None:
        for item in share:
            began = perf_counter()
            await call(item)
            latencies.append(perf_counter() - began)

    await asyncio.gather(*map(call, items[:clients]))
    counted = items[clients:]
    began = perf_counter()
    async with asyncio.TaskGroup() as group:
        for number in range(clients):
            group.create_task(client(counted[number::clients]))
    seconds = perf_counter() - began
    return {
        "per_s": len(counted) / seconds,
        "p50_ms": percentile(latencies, 0.5) * 1e3,
        "p99_ms": percentile(latencies, 0.99) * 1e3,
    }


def drive_alone(items: Sequence[T], call: Callable[[T], object]) -> Sample:
    """Make one call after another, without an event loop; the first does not count."""
    call(items[0])
    began = perf_counter()
    for item in items[1:]:
        call(item)
    return {"per_s": (len(items) - 1) / (perf_counter() - began)}


@contextmanager
def loaded_and_frozen() -> Iterator[None]:
    """Call `gc.freeze()`, as the documentation recommends after `initialize()`."""
    gc.collect()
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


@contextmanager
def no_collections() -> Iterator[None]:
    """Disable the garbage collector; its passes would hit calls at random."""
    gc.disable()
    try:
        yield
    finally:
        gc.enable()
