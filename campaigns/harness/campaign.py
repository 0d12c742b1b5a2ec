"""A campaign, and one run of it: its databases, its counts and its findings.

A campaign exposes the store to faults of the machine, of the network or of a program, again and
again, and checks the promises of `docs/explanation/promises.md` each time. All random choices
come from its seed.
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

SQLITE, POSTGRESQL = DATABASE_KINDS = ("sqlite", "postgresql")

Location = str | Path
"""The location of a database: the path of a file, or a URL on a server."""

SHOWN = 20
"""Number of findings of a run that are kept as text; all of them are counted."""

JUDGED_SHARE = 1 / 20
"""Share of the rounds of the long form; a run with fewer is a short run."""


class HangError(Exception):
    """A call or process hangs, so the steps that need it cannot run."""


async def within(work: Awaitable[T], what: str, seconds: float = 60) -> T:
    """Return the result of `work`; on a timeout, leave it running, as a cancellation may hang.

    Raises:
        HangError: If there is no result in time.
    """
    future = asyncio.ensure_future(work)
    await asyncio.wait([future], timeout=seconds)
    if not future.done():
        raise HangError(f"not within {seconds:g} s: {what}")
    return future.result()


@contextmanager
def silenced(*names: str) -> Iterator[None]:
    """Silence loggers during faults that make them log all the time."""
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
    """A kind of fault, and the promises that must survive it."""

    name: str
    title: str
    """The fault, in one line."""
    promises: tuple[str, ...]
    """The checked promises, such as `P1`."""
    perform: Callable[[Run], None]
    """Performs `run.rounds` rounds."""
    rounds: int
    """Rounds of the long form, for published figures."""
    quick_rounds: int
    """Rounds of the short form for the test suite: about two seconds, without root; 0 for none."""
    unit: str
    """The name of a round, in the plural."""
    kinds: tuple[str, ...] = DATABASE_KINDS
    rounds_of: dict[str, int] = field(default_factory=dict)
    """Rounds of the long form on kinds of database with another number."""
    bugs: Mapping[str, str] = field(default_factory=dict)
    """Names of bugs in `planted_bugs` that a run must find within `quick_rounds`, each with words
    from the finding.
    """
    slow_bugs: Mapping[str, str] = field(default_factory=dict)
    """Bugs that a run must find within `rounds`; no test waits for them."""
    unavailable_reason: Callable[[], str | None] = lambda: None
    """Returns the reason that prevents a run on this machine, with a remedy; else `None`."""

    def rounds_on(self, kind: str) -> int:
        """Return the rounds of the long form."""
        return self.rounds_of.get(kind, self.rounds)

    def is_quick(self, kind: str, rounds: int) -> bool:
        """Return true if so few rounds make a short run, which judges no times or rare events."""
        return rounds < self.rounds_on(kind) * JUDGED_SHARE

    def has_found_bug(self, run: Run) -> bool:
        """Return true if a run has found its planted bug, not only another problem."""
        words = {**self.bugs, **self.slow_bugs}[run.bug or ""]
        return any(words in finding for finding in run.findings)

    def run(self, run: Run) -> None:
        """Perform the rounds of a run; a hang is a finding and ends it."""
        try:
            with programs_in_path():
                self.perform(run)
        except* HangError as hangs:
            for hang in hangs.exceptions:
                run.wrong(f"the rest was not tried: {hang}")


@dataclass
class Counts:
    """Outcomes of the calls of a run, each counted once, by its answer."""

    acknowledged: int = 0
    """Calls that returned."""
    refused: int = 0
    """Calls that raised an error other than `OutcomeUnknownError`."""
    lost: int = 0
    """Acknowledged changes that are missing from the database."""
    unknown: int = 0
    """Calls without an answer: `OutcomeUnknownError`, a cancellation, or a killed process."""
    unknown_committed: int = 0
    """Unknown calls that had taken effect."""
    wrong: int = 0
    """All other violations of a promise."""

    @property
    def operations(self) -> int:
        """Number of all calls."""
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
            folder: An empty folder for files.
            server: The server for databases if `kind` is PostgreSQL. It may be killed.
            bug: Name of a planted bug that the run must find.
            is_quick: True for a short form beside other tests; then durations and events that need
                many rounds are not judged.
            report: Called with the number of finished rounds.
        """
        self.kind, self.rounds, self.folder, self.seed, self.bug = kind, rounds, folder, seed, bug
        self.is_quick = is_quick
        self.random = Random(seed)
        self.counts = Counts()
        self.findings: list[str] = []
        """The first losses and violations, in words."""
        self.notes: dict[str, str] = {}
        """Further figures, such as `{"slowest reopening": "0.31 s"}`."""
        self._server = server
        self._report = report
        self._done = 0
        self._numbers = count()
        self._template: Location | None = None

    @property
    def server(self) -> Server:
        """The PostgreSQL server; a campaign may kill it and start it again."""
        assert self._server is not None
        return self._server

    @property
    def is_clean(self) -> bool:
        """True if nothing is lost and no promise is broken."""
        return not (self.counts.lost or self.counts.wrong)

    def each_round(self) -> Iterator[int]:
        """Yield the numbers of the rounds, and report each finished one."""
        for number in range(self.rounds):
            yield number
            self.done()

    @property
    def completed(self) -> int:
        """Number of finished rounds."""
        return self._done

    def parts(self, size: int) -> Iterator[int]:
        """Yield the size of each part, where the rounds of a part share a database."""
        for begun in range(0, self.rounds, size):
            yield min(size, self.rounds - begun)

    def done(self, rounds: int = 1) -> None:
        """Report finished rounds that do not run one after another."""
        self._done += rounds
        self._report(self._done)

    def lost(self, finding: str) -> None:
        """Count an acknowledged change that is missing."""
        self.counts.lost += 1
        self._find(f"lost: {finding}")

    def wrong(self, finding: str) -> None:
        """Count a violation of a promise."""
        self.counts.wrong += 1
        self._find(finding)

    def check(self, holds: bool, finding: str) -> None:
        """Count `finding` as a violation unless the condition holds."""
        if not holds:
            self.wrong(finding)

    def figures(self) -> dict[str, int | str]:
        """Return all counts and notes by name."""
        return {"operations": self.counts.operations, **asdict(self.counts), **self.notes}

    @contextmanager
    def location(
        self, *, migrated: bool = True, copy_of: Location | None = None
    ) -> Iterator[Location]:
        """Provide a location for a database, removed afterwards; not on a running event loop.

        Args:
            migrated: True for an empty database with all tables, else there is none.
            copy_of: A database without connections, to be copied.
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
        """Open a store, and shut it down afterwards; a hanging shutdown is a violation.

        Raises:
            HangError: If opening hangs.
        """
        try:
            await within(manager.initialize(), "to open the store")
            yield manager
        finally:
            try:
                await within(manager.shutdown(), "to shut down")
            except HangError as hang:  # must not replace an earlier hang
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
            with suppress(DBAPIError):  # the server may still list a killed client
                asyncio.run(self.server.drop_database(location))
