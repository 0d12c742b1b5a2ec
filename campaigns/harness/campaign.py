"""What a campaign is, and one run of it: where its databases are, what it counts, what it found.

A campaign does something to the store that a machine, a network or a program could do to it, again
and again, and checks the promises of README each time. Whatever it draws comes from its seed.
"""

from __future__ import annotations

import asyncio
import logging
import shutil
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Mapping
from contextlib import asynccontextmanager, contextmanager, suppress
from dataclasses import asdict, dataclass, field
from itertools import count
from pathlib import Path
from random import Random
from typing import TypeVar

from sqlalchemy.exc import DBAPIError

from devtools.postgres import Server, programs_in_path
from openclaw_store import StateManager
from openclaw_store.testing import create_database

T = TypeVar("T")

SQLITE, POSTGRESQL = ENTITY_KINDS = ("sqlite", "postgresql")

Location = str | Path
"""Where a database is: the path of a file, or the URL of one on a server."""

SHOWN = 20
"""So many findings of a run are kept as text; all of them are counted."""

JUDGED_SHARE = 1 / 20
"""Of the rounds of the long form; with fewer, a run is a short one."""


class HangError(Exception):
    """Something does not go on, so nothing that needs it can be tried any more."""


async def within(work: Awaitable[T], what: str, seconds: float = 60) -> T:
    """What comes of `work`. What hangs is left as it is: to cancel it could hang, too.

    Raises:
        HangError: If nothing comes of it in time.
    """
    future = asyncio.ensure_future(work)
    await asyncio.wait([future], timeout=seconds)
    if not future.done():
        raise HangError(f"not within {seconds:g} s: {what}")
    return future.result()


@contextmanager
def unheard(*names: str) -> Iterator[None]:
    """Have loggers say nothing: there is trouble all the time."""
    loggers = [logging.getLogger(name) for name in names]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.CRITICAL + 1)
    try:
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


@dataclass(frozen=True, kw_only=True)
class Campaign:
    """One kind of trouble, and the promises that must survive it."""

    name: str
    title: str
    """What is done to the store, in a line."""
    promises: tuple[str, ...]
    """Those of README that it checks, as `P1`."""
    perform: Callable[[Run], None]
    """Does `run.rounds` rounds of it."""
    rounds: int
    """Of the long form, whose figures are published."""
    quick_rounds: int
    """Of the form that the test suite runs: about two seconds, and no root needed; 0 for none."""
    unit: str
    """What a round is, in the plural."""
    kinds: tuple[str, ...] = ENTITY_KINDS
    rounds_of: dict[str, int] = field(default_factory=dict)
    """Of the long form, for the kinds of database where it is another number."""
    bugs: Mapping[str, str] = field(default_factory=dict)
    """Names of bugs in `planted` that it must find, each within `quick_rounds`, and words that are
    in what it finds then."""
    slow_bugs: Mapping[str, str] = field(default_factory=dict)
    """The same of bugs that it finds within `rounds`, which no test waits for."""
    why_not: Callable[[], str | None] = lambda: None
    """Why it can not run on this machine, and what would help; `None` if it can."""

    def rounds_on(self, kind: str) -> int:
        """How many rounds the long form has."""
        return self.rounds_of.get(kind, self.rounds)

    def is_quick(self, kind: str, rounds: int) -> bool:
        """Whether so few rounds are a short form, which cannot judge what the long form does."""
        return rounds < self.rounds_on(kind) * JUDGED_SHARE

    def has_found_bug(self, run: Run) -> bool:
        """Whether a run has found the bug that it had, and not only something else."""
        words = {**self.bugs, **self.slow_bugs}[run.bug or ""]
        return any(words in finding for finding in run.findings)

    def run(self, run: Run) -> None:
        """Do the rounds of a run. What hangs is found to be wrong, and ends it."""
        try:
            with programs_in_path():
                self.perform(run)
        except* HangError as hangs:
            for hang in hangs.exceptions:
                run.wrong(f"the rest was not tried: {hang}")


@dataclass
class Counts:
    """What came of the calls of a run, each of which is counted once, by its answer."""

    acknowledged: int = 0
    """Calls that returned."""
    refused: int = 0
    """Calls that raised an error, but for `OutcomeUnknownError`."""
    lost: int = 0
    """Acknowledged, and not in the database afterwards."""
    unknown: int = 0
    """Calls without an answer: `OutcomeUnknownError`, or they were cancelled, or their process was
    killed."""
    unknown_committed: int = 0
    """Of these, those that had taken effect."""
    wrong: int = 0
    """Whatever else a promise forbids."""

    @property
    def operations(self) -> int:
        """All calls."""
        return self.acknowledged + self.refused + self.unknown


class Run:
    """One run of a campaign on one kind of database."""

    def __init__(
        self,
        kind: str,
        rounds: int,
        folder: Path,
        *,
        seed: int,
        server: Server | None = None,
        bug: str | None = None,
        is_quick: bool = False,
        report: Callable[[int], None] = lambda done: None,
    ) -> None:
        """Prepare a run.

        Args:
            folder: An empty one, for files.
            server: Where databases are made if `kind` is PostgreSQL. It may be killed.
            bug: Name of one in `planted`, to be found.
            is_quick: Whether it is a short form, as it runs beside other tests: then it is not
                judged how long things take, nor what only shows in many rounds.
            report: Is told how many rounds are done.
        """
        self.kind, self.rounds, self.folder, self.seed, self.bug = kind, rounds, folder, seed, bug
        self.is_quick = is_quick
        self.random = Random(seed)
        self.counts = Counts()
        self.findings: list[str] = []
        """The first that was lost or wrong, in words."""
        self.notes: dict[str, str] = {}
        """Further figures, as `{"slowest reopening": "0.31 s"}`."""
        self._server = server
        self._report = report
        self._done = 0
        self._numbers = count()
        self._template: Location | None = None

    @property
    def server(self) -> Server:
        """The PostgreSQL server, which may be killed and started again."""
        assert self._server is not None
        return self._server

    @property
    def is_clean(self) -> bool:
        """Whether nothing was lost and nothing wrong."""
        return not (self.counts.lost or self.counts.wrong)

    def each_round(self) -> Iterator[int]:
        """The numbers of the rounds; those that are done are reported."""
        for number in range(self.rounds):
            yield number
            self.done()

    @property
    def completed(self) -> int:
        """How many rounds are done."""
        return self._done

    def parts(self, size: int) -> Iterator[int]:
        """The rounds in parts, where some have a database in common: how many each part has."""
        for begun in range(0, self.rounds, size):
            yield min(size, self.rounds - begun)

    def done(self, rounds: int = 1) -> None:
        """Report rounds as done, where they are not one after another."""
        self._done += rounds
        self._report(self._done)

    def lost(self, finding: str) -> None:
        """Count something that was acknowledged, and is not there."""
        self.counts.lost += 1
        self._find(f"lost: {finding}")

    def wrong(self, finding: str) -> None:
        """Count something that a promise forbids."""
        self.counts.wrong += 1
        self._find(finding)

    def check(self, holds: bool, finding: str) -> None:
        """Count `finding` as wrong unless something holds."""
        if not holds:
            self.wrong(finding)

    def figures(self) -> dict[str, int | str]:
        """All that was counted, by name."""
        return {"operations": self.counts.operations, **asdict(self.counts), **self.notes}

    @contextmanager
    def location(
        self, *, migrated: bool = True, copy_of: Location | None = None
    ) -> Iterator[Location]:
        """A place for a database, gone afterwards. Not to be entered on a running event loop.

        Args:
            migrated: Whether there is an empty database with all tables; else there is nothing.
            copy_of: A database that nobody is connected to, of which there is a copy.
        """
        if migrated and copy_of is None:
            if self._template is None:
                self._template = self._make()
                create_database(self._template)
            copy_of = self._template
        location = self._make(copy_of)
        try:
            yield location
        finally:
            self._remove(location)

    @asynccontextmanager
    async def opened(self, manager: StateManager) -> AsyncIterator[StateManager]:
        """Open a store, and shut it down afterwards; it is wrong if that hangs.

        Raises:
            HangError: If opening hangs.
        """
        try:
            await within(manager.initialize(), "to open the store")
            yield manager
        finally:
            try:
                await within(manager.shutdown(), "to shut down")
            except HangError as hang:  # not instead of what has hung before
                self.wrong(str(hang))

    def _find(self, finding: str) -> None:
        if len(self.findings) < SHOWN:
            self.findings.append(finding)

    def _make(self, template: Location | None = None) -> Location:
        if self.kind == SQLITE:
            path = self.folder / f"database-{next(self._numbers)}" / "cluster.db"
            path.parent.mkdir()
            if template is not None:
                shutil.copyfile(template, path)
            return path
        assert not isinstance(template, Path)
        return asyncio.run(self.server.create_database(template))

    def _remove(self, location: Location) -> None:
        if isinstance(location, Path):
            shutil.rmtree(location.parent)
        else:
            with suppress(DBAPIError):  # somebody killed may still count as connected
                asyncio.run(self.server.drop_database(location))
