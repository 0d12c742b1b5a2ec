"""A public call during some trouble, and all that must hold afterwards.

The caller has its answer in time, and an error is a `StoreError`; a refused call has changed
nothing, and one that returned is in the database, whole, even if the process were killed now;
memory shows what is in the database; when the trouble is over, the same call works. At the end the
file is sound, a reopened store has all of it, and nothing was left open.
"""

from __future__ import annotations

import asyncio
import gc
import os
import shutil
import sqlite3
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator, Sequence
from contextlib import (
    AbstractContextManager,
    asynccontextmanager,
    closing,
    contextmanager,
    suppress,
)
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from unittest import mock

from campaigns.checks.picture import Picture, differences, picture, picture_of
from campaigns.harness.beside import damage
from campaigns.harness.campaign import HangError, Run
from campaigns.workloads.calls import PublicCall, Store
from openclaw_store import (
    ConflictError,
    Database,
    InvalidDataError,
    NotFoundError,
    OutcomeUnknownError,
    StateManager,
    StoreError,
    UnavailableError,
    verify,
)
from openclaw_store.backends.sqlite import connections as sqlite_connections
from openclaw_store.database.write_transaction import WriteTransaction
from openclaw_store.testing import FakeClock

DEADLINE_SECONDS = 10.0
"""How long a call may take, whatever happens."""

LOCK_SECONDS = 0.5
"""How long the store waits for a lock."""

FINISHED_IN_MEMORY = 2
"""So few that reading a finished task mostly needs the database."""

Trouble = Callable[[], AbstractContextManager[object]]
"""What goes on during a call."""


@dataclass(frozen=True)
class Effect:
    """What a call does to the database when nothing is in its way."""

    changes_rows: bool
    revisions: int


async def outcome_of(run: Run, call: Callable[[], Awaitable[Any]], what: str) -> Any:
    """What a call returns, or the error it raises; counted.

    Raises:
        HangError: If it does neither in time.
    """
    task = asyncio.ensure_future(call())
    await asyncio.wait([task], timeout=DEADLINE_SECONDS)
    counts = run.counts
    if not task.done():
        counts.unknown += 1
        raise HangError(f"{what}: no answer within {DEADLINE_SECONDS:g} s")
    error = task.exception()
    if error is None:
        counts.acknowledged += 1
        return task.result()
    if isinstance(error, OutcomeUnknownError):
        counts.unknown += 1
    else:
        counts.refused += 1
    run.check(isinstance(error, StoreError), f"{what}: raised {error!r}")
    return error


class Trial:
    """A store, whose calls are tried one after another."""

    def __init__(
        self, run: Run, path: Path, store: Store, checker: sqlite3.Connection, file: int
    ) -> None:
        self.run, self.path, self.store = run, path, store
        self._checker = checker
        self._file = file
        self.tried = "nothing"
        """The last call that was made, and what was in its way."""

    def picture(self) -> Picture:
        """What is in the database now."""
        return picture_of(self._checker)

    async def effect(self, call: PublicCall, trouble: Trouble, *, cold: bool = False) -> Effect:
        """What a call does, made during something that is no trouble."""
        made = await call.prepare(self.store)
        if cold:
            await self._close_connections()
        before = self.picture()
        with trouble():
            await made()
        after = self.picture()
        self._remove_copies()
        await self.store.state.sync_to_database()
        return Effect(after != before, after.revision - before.revision)

    async def make(
        self,
        call: PublicCall,
        trouble: Trouble,
        effect: Effect,
        what: str,
        *,
        cold: bool = False,
        may_litter: bool = False,
        is_elsewhere: bool = False,
        excuse: Callable[[], bool] = lambda: False,
    ) -> None:
        """Make a call during trouble, and once more when it is over.

        Args:
            effect: What it does without.
            what: Names it in findings.
            cold: Whether the store must open its connections for it.
            may_litter: Whether half a backup may be left, as removing it may have failed, too.
            is_elsewhere: Whether nobody would find what is written during the trouble.
            excuse: Whether a refused call may take effect if the process is killed.
        """
        self.tried = what
        made = await call.prepare(self.store)
        if cold:
            await self._close_connections()
        before = self.picture()
        with trouble():
            outcome = await outcome_of(self.run, made, what)
        after = self.picture()
        self._check_outcome(call, effect, outcome, before, after, what, excuse)
        if is_elsewhere and effect.changes_rows and not isinstance(outcome, Exception):
            self.run.lost(f"{what}: returned, and wrote where nobody looks")
        if not isinstance(outcome, OutcomeUnknownError) and not call.is_kept:
            self.report(what, await differences(self.store.state, after))
        self._look_at_copies(call, after, outcome, what, may_litter=may_litter)
        if isinstance(outcome, Exception):
            again = await outcome_of(self.run, made, f"{what}, once more")
            is_done = after != before and isinstance(again, ConflictError | NotFoundError)
            # It is the last step that failed, and what would have taken it back.
            is_done |= may_litter and isinstance(again, InvalidDataError) and self._has_copy(after)
            is_fine = is_done or not isinstance(again, Exception)
            self.run.check(is_fine, f"{what}, once more: raised {again!r}")
            self._look_at_copies(call, self.picture(), again, what, may_litter=may_litter)
        elif call.is_exact and not effect.changes_rows and not call.makes_copy:
            again = await outcome_of(self.run, made, f"{what}, once more")
            self.run.check(again == outcome, f"{what}: answered {outcome!r}, and then {again!r}")
        self._remove_copies()
        await self._check_in_the_end(call, effect, before, what)

    def _check_outcome(
        self,
        call: PublicCall,
        effect: Effect,
        outcome: Any,
        before: Picture,
        after: Picture,
        what: str,
        excuse: Callable[[], bool],
    ) -> None:
        """See that what a call says is what it did, now and if the process were killed."""
        run, revisions = self.run, after.revision - before.revision
        left = self._left_by_a_kill()
        if isinstance(outcome, OutcomeUnknownError):
            run.counts.unknown_committed += left != before
            for there in (after, left):
                is_whole = there == before or there.revision - before.revision == effect.revisions
                run.check(is_whole or call.in_batches, f"{what}: was done in part")
            return
        if not isinstance(outcome, Exception):
            if revisions != effect.revisions or (after != before) != effect.changes_rows:
                run.lost(f"{what}: returned, and made {revisions} of {effect.revisions} changes")
        elif not call.in_batches and not call.is_kept:
            run.check(after == before, f"{what}: raised {outcome!r}, and changed something")
        if left != after and not call.is_kept:
            is_whole = left.revision - before.revision == effect.revisions > 0
            if isinstance(outcome, Exception) and is_whole and excuse():
                return
            run.lost(f"{what}: a kill would leave revision {left.revision} of {after.revision}")

    async def _check_in_the_end(
        self, call: PublicCall, effect: Effect, before: Picture, what: str
    ) -> None:
        """See that a call that was repeated has been done once, and memory shows it."""
        await self.store.state.refresh_from_database()
        await self.store.state.sync_to_database()
        final = self.picture()
        revisions = final.revision - before.revision
        if not call.in_batches:
            is_whole = revisions == effect.revisions
            self.run.check(is_whole, f"{what}: {revisions} of {effect.revisions} in the end")
        gaps = {*range(before.revision + 1, final.revision + 1)} - {*final.rows["changes"]}
        self.run.check(not gaps, f"{what}: changes {gaps} are not in the feed")
        self.report(what, [*final.flaws(), *await differences(self.store.state, final)])

    def _left_by_a_kill(self) -> Picture:
        """What there would be if the process were killed now: without what its `-shm` holds."""
        with TemporaryDirectory(dir=self.run.folder) as folder:
            copy = Path(folder, self.path.name)
            size = os.fstat(self._file).st_size
            copy.write_bytes(os.pread(self._file, size, 0))
            with suppress(FileNotFoundError):
                shutil.copyfile(f"{self.path}-wal", f"{copy}-wal")
            return picture(copy)

    def report(self, what: str, found: list[str]) -> None:
        """Count what was found as wrong."""
        for flaw in found:
            self.run.wrong(f"{what}: {flaw}")

    async def _close_connections(self) -> None:
        """Have the next call open connections of its own."""
        database = self.store.db
        await database.session_factory.kw["bind"].dispose()
        with suppress(UnavailableError):
            await database.write(_fail, None)  # with which the writer gives up its connection

    def _look_at_copies(
        self, call: PublicCall, there: Picture, outcome: Any, what: str, *, may_litter: bool
    ) -> None:
        """Look at the file that a call has made beside the database, or was to make."""
        is_refused = isinstance(outcome, Exception)
        copies = self._copies()
        if call.makes_copy and not is_refused:
            self.run.check(len(copies) == 1, f"{what}: returned, and there is no copy")
        for file in copies:
            if not is_refused or call.name == "backup":  # `copy` goes on with the half it has made
                self.run.check(_is_copy(file, there), f"{what}: the copy is not what was copied")
        litter = [file.name for file in self.store.folder.glob(".*")]
        self.run.check(may_litter or not litter, f"{what}: left {litter}")

    def _copies(self) -> list[Path]:
        return [file for file in self.store.folder.iterdir() if file.suffix == ".db"]

    def _has_copy(self, there: Picture) -> bool:
        copies = self._copies()
        return bool(copies) and all(_is_copy(file, there) for file in copies)

    def _remove_copies(self) -> None:
        for file in self.store.folder.iterdir():
            file.unlink()


def _is_copy(file: Path, there: Picture) -> bool:
    return not damage(file) and picture(file).rows["tasks"] == there.rows["tasks"]


def _fail(unit: WriteTransaction, operations: Sequence[Any]) -> Sequence[Any]:
    raise UnavailableError("on purpose")


@asynccontextmanager
async def trial_of(run: Run, path: Path) -> AsyncIterator[Trial]:
    """Open a database to try calls on it; at the end it is closed, and looked at as a whole."""
    clock = FakeClock()
    folder = path.parent / "copies"
    folder.mkdir()
    database = Database(path, clock=clock, timeout=LOCK_SECONDS)
    state = StateManager(database, None, finished_cache_size=FINISHED_IN_MEMORY)
    # Not opened and closed while the store is open, which would cost this process its locks.
    file = os.open(path, os.O_RDONLY)
    try:
        await state.initialize()
        with closing(sqlite3.connect(path, isolation_level=None)) as checker:
            trial = Trial(run, path, Store(state, clock, folder), checker, file)
            yield trial
            last = trial.picture()
            trial.report("in the end", await differences(state, last, finished=True))
        closed = await outcome_of(run, state.shutdown, "shutdown")
        run.check(closed is None, f"shutdown: raised {closed!r}")
    except BaseException:
        await asyncio.wait([asyncio.ensure_future(state.shutdown())], timeout=DEADLINE_SECONDS)
        raise
    finally:
        os.close(file)
    look_at_files(run, path, last, f"in the end, after {trial.tried}")
    async with Database(path) as reopened:
        found = await verify(reopened)
        run.check(bool(found), f"verify found {found.problems}")


def look_at_files(run: Run, path: Path, last: Picture, what: str) -> None:
    """See that a database that nobody has open any more is sound, and holds what it did."""
    if _open_files(path):
        gc.collect()  # `vfs.hooked` has put it off
    left = _open_files(path)
    run.check(not left, f"{what}: {left} are still open")
    for flaw in damage(path):
        run.wrong(f"{what}: {path.name} is damaged: {flaw}")
    try:
        lost = last.differences(picture(path))
    except sqlite3.OperationalError as error:  # it lacks a table
        run.wrong(f"{what}: {error}")
    else:
        if lost:
            run.lost(f"{what}: the database does not hold what it did: {lost[:5]}")


def _open_files(path: Path) -> list[str]:
    """What this process has open of a database."""
    found = []
    for link in Path("/proc/self/fd").iterdir():
        with suppress(FileNotFoundError):  # it was that of the folder itself, closed by now
            found.append(str(link.readlink()))
    return [target for target in found if target.startswith(str(path))]


@contextmanager
def abandoning(run: Run) -> Iterator[None]:
    """Go on without a store that cannot be used any more; that is wrong."""
    try:
        yield
    except HangError as hang:
        run.wrong(str(hang))
    except Exception as error:
        run.wrong(f"the store cannot be used any more: {error!r}")


@contextmanager
def checkpointing(pages: int) -> Iterator[None]:
    """Have connections that write move the WAL to the database after so many pages."""
    kind = sqlite_connections.WriteConnection
    pragmas = (*kind.pragmas, f"PRAGMA wal_autocheckpoint={pages}")
    with mock.patch.object(kind, "pragmas", pragmas):
        yield
