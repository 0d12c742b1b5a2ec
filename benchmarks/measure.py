"""What a benchmark is made of: contenders that take turns, and figures with goals."""

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
"""What one contender did in one round, by quantity, as in `{"rows_per_s": 1700.0}`."""

Contender = Callable[[], Awaitable[Sample]]
"""Does the work once."""

Samples = dict[str, dict[str, list[float]]]
"""By contender and quantity, one value for each round."""


@dataclass(frozen=True, slots=True)
class Goal:
    """What a figure should reach."""

    sign: Literal["≥", "≤"]
    must: float
    aim: float | None = None

    def verdict(self, value: float) -> str:
        """`reached` (the aim, or what must be where there is no other), `must`, or `missed`."""
        best = self.must if self.aim is None else self.aim
        if self._holds(value, best):
            return "reached"
        return "must" if self._holds(value, self.must) else "missed"

    def _holds(self, value: float, bound: float) -> bool:
        return value >= bound if self.sign == "≥" else value <= bound


def at_least(must: float, aim: float | None = None) -> Goal:
    """A goal for what should be large."""
    return Goal("≥", must, aim)


def at_most(must: float, aim: float | None = None) -> Goal:
    """A goal for what should be small."""
    return Goal("≤", must, aim)


@dataclass(frozen=True, slots=True)
class Line:
    """A line of the table, before anything is measured."""

    text: str
    unit: str = "×"
    goal: Goal | None = None
    """`None` for what is only told."""


@dataclass(frozen=True, slots=True)
class Figure:
    """What stands in a line of the table."""

    value: float
    ours: str
    against: str


@dataclass(frozen=True, slots=True)
class Skipped:
    """Why there is no figure."""

    reason: str


@dataclass(frozen=True, slots=True)
class Benchmark:
    """A measurement that fills some lines of the table."""

    name: str
    measure: Callable[[Bench], Coroutine[Any, Any, Sequence[Figure | Skipped]]]
    """Gives a figure for each of `lines`, in their order."""
    lines: tuple[Line, ...]
    needs_server: bool = False
    """Whether it runs on PostgreSQL."""


class Bench:
    """What a benchmark is given: how much to do, how often, and where.

    Args:
        folder: Where databases are made; all on one file system.
        empty: A migrated database without rows.
        server: Makes databases on PostgreSQL; `None` where there is no server.
        empty_url: One of these, migrated and without rows.
        rounds: How often each contender has its turn.
        divisor: By how much the work is reduced, for a first impression.
        report: Is told what is done now, and which share of the benchmark is done.
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
        """How much to do of what is `full` in a whole run."""
        return max(full // self._divisor, least)

    @contextmanager
    def database(self, source: Path | None = None) -> Iterator[Path]:
        """A copy of the database `source`, or an empty one; it is gone afterwards."""
        path = self._folder / f"{next(self._numbers)}.db"
        copyfile(source or self._empty, path)
        try:
            yield path
        finally:
            for suffix in ("", "-wal", "-shm"):
                path.with_name(path.name + suffix).unlink(missing_ok=True)

    @asynccontextmanager
    async def server_database(self, source: str | None = None) -> AsyncIterator[str]:
        """The same on the server, where databases go by their URL.

        Raises:
            DBAPIError: If somebody is still connected to it.
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
        """Let each contender have its turn in each round, in rotated order; returns medians."""
        names = list(contenders)
        rounds = rounds or self.rounds
        done = 0
        for number in range(rounds):
            first = number % len(names)
            for name in names[first:] + names[:first]:
                self._report(f"{name}, round {number + 1} of {rounds}", done / rounds / len(names))
                gc.collect()  # nobody clears up behind another
                of_name = self.samples.setdefault(name, {})
                for quantity, value in (await contenders[name]()).items():
                    of_name.setdefault(quantity, []).append(value)
                done += 1
        return {
            name: {quantity: median(values) for quantity, values in self.samples[name].items()}
            for name in names
        }


def percentile(values: Sequence[float], share: float) -> float:
    """The value that `share` of all values do not exceed."""
    return sorted(values)[max(0, math.ceil(len(values) * share) - 1)]


async def drive(clients: int, items: Sequence[T], call: Callable[[T], Awaitable[object]]) -> Sample:
    """Let `clients` coroutines share the items out, each making one call after the other.

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
    """Make one call after the other, without an event loop; the first does not count."""
    call(items[0])
    began = perf_counter()
    for item in items[1:]:
        call(item)
    return {"per_s": (len(items) - 1) / (perf_counter() - began)}


@contextmanager
def no_collections() -> Iterator[None]:
    """Keep the garbage collector out, where it is chance what its passes fall into."""
    gc.disable()
    try:
        yield
    finally:
        gc.enable()
