"""A public call during a fault, and the checks that must hold afterwards.

The caller gets an answer in time, and every error is a `StoreError`. A refused call has changed
nothing, and an acknowledged one is complete in the database, even if the process were killed now.
The cache equals the database. After the fault, the same call works. At the end the file is sound, a
reopened store has all content, and no file stays open.
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

from campaigns.checks.snapshot import Snapshot, differences, snapshot_of, take_snapshot
from campaigns.harness.campaign import HangError, Run
from campaigns.harness.direct_access import find_damage
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
"""Maximum seconds of a call during any fault."""

LOCK_SECONDS = 0.5
"""Seconds for which the store waits for a lock."""

FINISHED_IN_MEMORY = 2
"""So few that a read of a finished task mostly needs the database."""

FaultContext = Callable[[], AbstractContextManager[object]]
"""Provides a fault that lasts for a call."""


@dataclass(frozen=True)
class Effect:
    """The effect of a call on the database without a fault."""

    changes_rows: bool
    revisions: int


async def outcome_of(run: Run, call: Callable[[], Awaitable[Any]], what: str) -> Any:
    """Return the result of a call, or its error, and count it.

    Raises:
        HangError: If there is neither in time.
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
    """A store, and calls that are tried on it one after another."""

    def __init__(
        self, run: Run, path: Path, store: Store, checker: sqlite3.Connection, file: int
    ) -> None:
        self.run, self.path, self.store = run, path, store
        self._checker = checker
        self._file = file
        self.tried = "nothing"
        """The last call, and its fault."""

    def take_snapshot(self) -> Snapshot:
        """Take a snapshot of the database."""
        return snapshot_of(self._checker)

    async def effect(self, call: PublicCall, fault: FaultContext, *, cold: bool = False) -> Effect:
        """Return the effect of a call, made in a context that is no fault."""
        made = await call.prepare(self.store)
        if cold:
            await self._close_connections()
        before = self.take_snapshot()
        with fault():
            await made()
        after = self.take_snapshot()
        self._remove_copies()
        await self.store.state.sync_to_database()
        return Effect(after != before, after.revision - before.revision)

    async def make(
        self,
        call: PublicCall,
        fault: FaultContext,
        effect: Effect,
        what: str,
        *,
        cold: bool = False,
        may_litter: bool = False,
        is_elsewhere: bool = False,
        excuse: Callable[[], bool] = lambda: False,
    ) -> None:
        """Make a call during a fault, and once more afterwards.

        Args:
            effect: Its effect without a fault.
            what: Its name in findings.
            cold: True if the store must open its connections for it.
            may_litter: True if a partial backup may stay, since its removal may have failed, too.
            is_elsewhere: True if writes during the fault go to a file that no reader finds.
            excuse: Returns true if a refused call may take effect after a kill of the process.
        """
        self.tried = what
        made = await call.prepare(self.store)
        if cold:
            await self._close_connections()
        before = self.take_snapshot()
        with fault():
            outcome = await outcome_of(self.run, made, what)
        after = self.take_snapshot()
        self._check_outcome(call, effect, outcome, before, after, what, excuse)
        if is_elsewhere and effect.changes_rows and not isinstance(outcome, Exception):
            self.run.lost(f"{what}: returned, and wrote to a file that no reader finds")
        # After an unknown outcome, the cache may lag until the next refresh.
        if not isinstance(outcome, OutcomeUnknownError) and not call.is_kept:
            self.report(what, await differences(self.store.state, after))
        self._check_copies(call, after, outcome, what, may_litter=may_litter)
        if isinstance(outcome, Exception):
            again = await outcome_of(self.run, made, f"{what}, once more")
            is_done = after != before and isinstance(again, ConflictError | NotFoundError)
            # The last step failed, and its rollback, too.
            is_done |= may_litter and isinstance(again, InvalidDataError) and self._has_copy(after)
            is_fine = is_done or not isinstance(again, Exception)
            self.run.check(is_fine, f"{what}, once more: raised {again!r}")
            self._check_copies(call, self.take_snapshot(), again, what, may_litter=may_litter)
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
        before: Snapshot,
        after: Snapshot,
        what: str,
        excuse: Callable[[], bool],
    ) -> None:
        """Check that the answer of a call matches its effect, now and after a kill."""
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
            # Frames without a commit record are ignored after a kill, so all or nothing is left.
            is_whole = left.revision - before.revision == effect.revisions > 0
            if isinstance(outcome, Exception) and is_whole and excuse():
                return
            run.lost(f"{what}: a kill would leave revision {left.revision} of {after.revision}")

    async def _check_in_the_end(
        self, call: PublicCall, effect: Effect, before: Snapshot, what: str
    ) -> None:
        """Check that a repeated call has taken effect once, and that the cache shows it."""
        await self.store.state.refresh_from_database()
        await self.store.state.sync_to_database()
        final = self.take_snapshot()
        revisions = final.revision - before.revision
        if not call.in_batches:
            is_whole = revisions == effect.revisions
            self.run.check(is_whole, f"{what}: {revisions} of {effect.revisions} in the end")
        gaps = {*range(before.revision + 1, final.revision + 1)} - {*final.rows["changes"]}
        self.run.check(not gaps, f"{what}: changes {gaps} are not in the feed")
        self.report(what, [*final.flaws(), *await differences(self.store.state, final)])

    def _left_by_a_kill(self) -> Snapshot:
        """Take a snapshot of the files after a kill: without the content of the `-shm` file."""
        with TemporaryDirectory(dir=self.run.folder) as folder:
            copy = Path(folder, self.path.name)
            # Read by a descriptor that stays open: closing one would release the locks of SQLite
            # that this process has on the file.
            size = os.fstat(self._file).st_size
            copy.write_bytes(os.pread(self._file, size, 0))
            with suppress(FileNotFoundError):
                shutil.copyfile(f"{self.path}-wal", f"{copy}-wal")
            return take_snapshot(copy)

    def report(self, what: str, found: list[str]) -> None:
        """Count findings as violations."""
        for flaw in found:
            self.run.wrong(f"{what}: {flaw}")

    async def _close_connections(self) -> None:
        """Close the connections, so that the next call opens new ones."""
        database = self.store.db
        await database.session_factory.kw["bind"].dispose()
        with suppress(UnavailableError):
            await database.write(_fail, None)  # after an error, the writer closes its connection

    def _check_copies(
        self, call: PublicCall, there: Snapshot, outcome: Any, what: str, *, may_litter: bool
    ) -> None:
        """Check the file that a call has created beside the database, or was to create."""
        is_refused = isinstance(outcome, Exception)
        copies = self._copies()
        if call.makes_copy and not is_refused:
            self.run.check(len(copies) == 1, f"{what}: returned, and there is no copy")
        for file in copies:
            if not is_refused or call.name == "backup":  # `copy` continues a partial copy
                self.run.check(_is_copy(file, there), f"{what}: the copy is not what was copied")
        litter = [file.name for file in self.store.folder.glob(".*")]
        self.run.check(may_litter or not litter, f"{what}: left {litter}")

    def _copies(self) -> list[Path]:
        return [file for file in self.store.folder.iterdir() if file.suffix == ".db"]

    def _has_copy(self, there: Snapshot) -> bool:
        copies = self._copies()
        return bool(copies) and all(_is_copy(file, there) for file in copies)

    def _remove_copies(self) -> None:
        for file in self.store.folder.iterdir():
            file.unlink()


def _is_copy(file: Path, there: Snapshot) -> bool:
    return not find_damage(file) and take_snapshot(file).rows["tasks"] == there.rows["tasks"]


def _fail(unit: WriteTransaction, operations: Sequence[Any]) -> Sequence[Any]:
    raise UnavailableError("on purpose")


@asynccontextmanager
async def trial_of(run: Run, path: Path) -> AsyncIterator[Trial]:
    """Open a database for trials; check the whole of it at the end."""
    clock = FakeClock()
    folder = path.parent / "copies"
    folder.mkdir()
    database = Database(path, clock=clock, timeout=LOCK_SECONDS)
    state = StateManager(database, None, finished_cache_size=FINISHED_IN_MEMORY)
    # Opening and closing it beside the open store would release this process's locks.
    file = os.open(path, os.O_RDONLY)
    try:
        await state.initialize()
        with closing(sqlite3.connect(path, isolation_level=None)) as checker:
            trial = Trial(run, path, Store(state, clock, folder), checker, file)
            yield trial
            last = trial.take_snapshot()
            trial.report("in the end", await differences(state, last, finished=True))
        closed = await outcome_of(run, state.shutdown, "shutdown")
        run.check(closed is None, f"shutdown: raised {closed!r}")
    except BaseException:
        await asyncio.wait([asyncio.ensure_future(state.shutdown())], timeout=DEADLINE_SECONDS)
        raise
    finally:
        os.close(file)
    check_files(run, path, last, f"in the end, after {trial.tried}")
    async with Database(path) as reopened:
        found = await verify(reopened)
        run.check(bool(found), f"verify found {found.problems}")


def check_files(run: Run, path: Path, last: Snapshot, what: str) -> None:
    """Check that a closed database is sound, and has the expected content."""
    if _open_files(path):
        gc.collect()  # `vfs.hooked` has postponed it
    left = _open_files(path)
    run.check(not left, f"{what}: {left} are still open")
    for flaw in find_damage(path):
        run.wrong(f"{what}: {path.name} is damaged: {flaw}")
    try:
        lost = last.differences(take_snapshot(path))
    except sqlite3.OperationalError as error:  # a table is missing
        run.wrong(f"{what}: {error}")
    else:
        if lost:
            run.lost(f"{what}: the database does not hold what it did: {lost[:5]}")


def _open_files(path: Path) -> list[str]:
    """List the files of a database that this process has open."""
    found = []
    for link in Path("/proc/self/fd").iterdir():
        with suppress(FileNotFoundError):  # the descriptor of the folder, closed by now
            found.append(str(link.readlink()))
    return [target for target in found if target.startswith(str(path))]


@contextmanager
def abandoning(run: Run) -> Iterator[None]:
    """Count an unusable store as a violation, and continue without it."""
    try:
        yield
    except HangError as hang:
        run.wrong(str(hang))
    except Exception as error:
        run.wrong(f"the store cannot be used any more: {error!r}")


@contextmanager
def checkpointing(pages: int) -> Iterator[None]:
    """Let writing connections checkpoint the WAL after so many pages."""
    kind = sqlite_connections.WriteConnection
    pragmas = (*kind.pragmas, f"PRAGMA wal_autocheckpoint={pages}")
    with mock.patch.object(kind, "pragmas", pragmas):
        yield
