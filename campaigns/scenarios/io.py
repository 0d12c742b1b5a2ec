"""Every I/O call of SQLite fails in turn, during every public call of the store.

A sweep is a public call in one state of the store. A call without a fault counts its system calls;
each is a fault point. There it fails, once, or with all later ones that fit the error until the
fault ends. `trial` has the checks. SQLite tests itself in the same way, see "I/O Error Testing" in
https://sqlite.org/testing.html.

There is one exception. A page for which the disk has no room may already be in the WAL, byte for
byte, from an earlier transaction; only a file system that needs room to overwrite can refuse that.
Then the transaction is complete, while SQLite takes it for unfinished, and it exists after a kill.
"""

from __future__ import annotations

import asyncio
import errno
import gc
import os
import shutil
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from itertools import count
from pathlib import Path
from typing import Any
from unittest import mock

from campaigns.checks.snapshot import Snapshot, is_migrated, take_snapshot, task_ids
from campaigns.checks.trial import abandoning, check_files, checkpointing, outcome_of, trial_of
from campaigns.faults import vfs
from campaigns.faults.planted_bugs import planted
from campaigns.harness.campaign import SQLITE, Campaign, Run, silenced
from campaigns.harness.direct_access import UnreadableError, find_damage
from campaigns.scenarios.lifecycle_calls import LIFECYCLE_CALLS, NAME, LifecycleCall, original
from campaigns.workloads.calls import CALLS, PublicCall
from openclaw_store import OutcomeUnknownError

_READS = frozenset({"read", "pread", "pread64"})

FITTING = {
    errno.EIO: _READS | vfs.WRITES | {"ftruncate", "fstat", "unlink", "mmap", "replace", vfs.SYNC},
    errno.ENOSPC: vfs.WRITES | {"ftruncate", "replace", vfs.SYNC},
    errno.EMFILE: frozenset({"open", vfs.OPEN_FOLDER}),
}
"""System calls that fail with an error."""

CHECKPOINTS = (4, 1000)
"""Pages in the WAL after which a commit checkpoints it. SQLite's default is 1,000, which few
commits reach; with 4 nearly each does.
"""

SWEEPS_A_STORE = 8

FEWEST_A_SWEEP, MOST_A_SWEEP = 3, 10
"""Number of points of a sweep that are tried before the next sweep, if there are more. All later
points run on the store that the earlier ones have left.
"""


@dataclass(frozen=True)
class Point:
    """One system call of a sweep that fits an error."""

    error: int
    number: int
    """Number, from 1."""
    is_sticky: bool

    def __str__(self) -> str:
        return f"{'sticky ' * self.is_sticky}{errno.errorcode[self.error]} at {self.number}"


class Fault:
    """Lets system calls fail while it is armed, and counts them."""

    def __init__(self) -> None:
        self.seen: Counter[str] = Counter()
        """Calls since it was armed, by name."""
        self.failed = 0
        """Number of failed calls."""
        self.was_there = False
        """True if the disk was full for a page that the WAL already contains."""
        self._below: str | None = None
        self._point = Point(0, 0, is_sticky=False)
        self._fitting = 0

    @contextmanager
    def armed(self, folder: Path, point: Point | None = None) -> Iterator[None]:
        """Let a call on a file in a folder fail; without a point, only count."""
        self.seen.clear()
        self.failed = self._fitting = 0
        self.was_there = False
        self._point = point or Point(0, 0, is_sticky=False)
        self._below = f"{folder}{os.sep}"
        try:
            yield
        finally:
            self._below = None

    def points(self) -> list[Point]:
        """Return the points at which a call like the last one can fail."""
        return [
            Point(error, number + 1, is_sticky)
            for error, names in FITTING.items()
            for number in range(sum(self.seen[name] for name in names))
            for is_sticky in (False, True)
        ]

    def __call__(self, call: vfs.SystemCall) -> int:
        if self._below is None or not call.path.startswith(self._below):
            return 0
        # This runs inside SQLite: it must neither call SQLite nor raise.
        self.seen[call.name] += 1
        point = self._point
        if call.name not in FITTING.get(point.error, ()):
            return 0
        self._fitting += 1
        if self._fitting < point.number or (self._fitting > point.number and not point.is_sticky):
            return 0
        self.failed += 1
        if point.error == errno.ENOSPC:
            self.was_there = self.was_there or _is_there(call)
        return point.error


def _is_there(call: vfs.SystemCall) -> bool:
    if not call.name.startswith("pwrite") or not call.path.endswith("-wal"):
        return False  # SQLite locks the database itself, and closing it would unlock it
    with open(call.path, "rb") as file:
        file.seek(call.offset)
        return file.read(call.size) == call.data


@dataclass
class Sweep:
    """A public call, in a state of the store."""

    call: PublicCall | LifecycleCall
    pages: int = 0
    """One of `CHECKPOINTS`."""
    is_cold: bool = False
    """True if the store opens its connections for it."""
    points: list[Point] | None = None
    """`None` until the system calls were counted."""
    left: list[Point] = field(default_factory=list)
    """Points not tried yet."""
    is_finished: bool = False
    """True if each point was tried."""

    def __str__(self) -> str:
        if isinstance(self.call, LifecycleCall):
            return self.call.name
        return f"{self.call.name}, {'cold' if self.is_cold else 'warm'}, {self.pages} pages"


def perform(run: Run) -> None:
    """Try fault points, some of each sweep in turn, until the rounds are used up."""
    with (
        silenced("openclaw_store"),
        planted(run.bug),
        vfs.hooked(fault := Fault(), run.folder),
        _python_hooked(fault),
    ):
        _Faults(run, fault).perform()


class _Faults:
    def __init__(self, run: Run, fault: Fault) -> None:
        self.run, self.fault = run, fault
        self._done = self._injected = self._excused = 0
        self._templates: dict[str, tuple[Path, Snapshot]] = {}
        """The files before a lifecycle call, and the snapshot after it."""
        self._numbers = count()

    def perform(self) -> None:
        batches = self._batches()
        sweeps = [sweep for batch in batches for sweep in batch]
        share = min(max(FEWEST_A_SWEEP, self.run.rounds // len(sweeps)), MOST_A_SWEEP)
        try:
            while self._done < self.run.rounds:
                for batch in batches:
                    self._try(batch, share)
                if not any(sweep.left for sweep in sweeps):
                    for sweep in sweeps:  # try all of them again
                        self._refill(sweep)
        finally:
            self._note_figures(sweeps)

    def _note_figures(self, sweeps: Sequence[Sweep]) -> None:
        begun = [sweep for sweep in sweeps if sweep.points is not None]
        finished = sum(sweep.is_finished for sweep in begun)
        points = sum(len(sweep.points or ()) for sweep in begun)
        self.run.notes["sweeps"] = f"{len(begun)} of {len(sweeps)}, {finished} of them to the end"
        self.run.notes["fault points known"] = f"{points:,}"
        self.run.notes["faults injected"] = f"{self._injected:,}"
        self.run.notes["on the disk before it was full"] = f"{self._excused:,}"

    def _batches(self) -> list[list[Sweep]]:
        """Return all sweeps in random order; those of a batch share a store."""
        batches = [[Sweep(lifecycle)] for lifecycle in LIFECYCLE_CALLS]
        for pages in CHECKPOINTS:
            sweeps = [Sweep(call, pages, is_cold) for call in CALLS for is_cold in (False, True)]
            self.run.random.shuffle(sweeps)
            batches += [
                sweeps[start : start + SWEEPS_A_STORE]
                for start in range(0, len(sweeps), SWEEPS_A_STORE)
            ]
        self.run.random.shuffle(batches)
        return batches

    def _refill(self, sweep: Sweep) -> None:
        sweep.left = [*(sweep.points or ())]
        self.run.random.shuffle(sweep.left)

    def _take(self, sweep: Sweep, share: int) -> list[Point]:
        """Take some of the remaining points of a sweep; those of the last call if it is new."""
        if sweep.points is None:
            sweep.points = self.fault.points()
            self._refill(sweep)
        share = min(share, self.run.rounds - self._done)
        taken, sweep.left = sweep.left[:share], sweep.left[share:]
        self._done += len(taken)
        sweep.is_finished |= not sweep.left
        return taken

    def _excuse(self) -> bool:
        """Return true, and count it, if a refused change may be on the disk unknown to SQLite."""
        self._excused += self.fault.was_there
        return self.fault.was_there

    def _count(self) -> None:
        self._injected += self.fault.failed
        self.run.done()

    def _try(self, batch: list[Sweep], share: int) -> None:
        is_over = all(sweep.points is not None and not sweep.left for sweep in batch)
        if is_over or self._done >= self.run.rounds:
            return
        if isinstance(batch[0].call, LifecycleCall):
            self._run_lifecycle(batch[0], batch[0].call, share)
            return
        before = self._done
        with self.run.location() as path, checkpointing(batch[0].pages), abandoning(self.run):
            assert isinstance(path, Path)
            asyncio.run(self._call(batch, path, share))
        gc.collect()  # it is off while hooks are active
        self._done = max(self._done, before + 1)  # so that the loop ends in any case

    async def _call(self, batch: list[Sweep], path: Path, share: int) -> None:
        async with trial_of(self.run, path) as trial:
            for sweep in batch:
                assert isinstance(sweep.call, PublicCall)
                armed = partial(self.fault.armed, path.parent)
                effect = await trial.effect(sweep.call, armed, cold=sweep.is_cold)
                for point in self._take(sweep, share):
                    await trial.make(
                        sweep.call,
                        partial(armed, point),
                        effect,
                        f"{sweep}: {point}",
                        cold=sweep.is_cold,
                        may_litter=point.is_sticky,
                        excuse=self._excuse,
                    )
                    self._count()

    def _run_lifecycle(self, sweep: Sweep, lifecycle: LifecycleCall, share: int) -> None:
        if sweep.points is None:
            template = self.run.folder / f"template-{len(self._templates)}"
            template.mkdir()
            lifecycle.make(template)
            with self._copy_of(template) as folder:
                asyncio.run(lifecycle.perform(folder, self.fault.armed(folder)))
                self._templates[lifecycle.name] = template, take_snapshot(folder / NAME)
        template, whole = self._templates[lifecycle.name]
        for point in self._take(sweep, share):
            with self._copy_of(template) as folder, abandoning(self.run):
                asyncio.run(self._try_lifecycle(lifecycle, folder, point, whole))
            self._count()

    async def _try_lifecycle(
        self, lifecycle: LifecycleCall, folder: Path, point: Point, whole: Snapshot
    ) -> None:
        """Make a lifecycle call with a fault, and once more without it after a refusal."""
        run, what, path = self.run, f"{lifecycle.name}: {point}", folder / NAME
        before, after = task_ids(path), {*whole.rows["tasks"]}
        fault = self.fault.armed(folder, point)
        refusal = await self._refusal(lifecycle, folder, fault, what)
        if refusal is not None:
            with self._copy_of(folder) as copy:  # opening the original would recover it
                found = task_ids(copy / NAME)
                run.check(found in (before, after), f"{what}: left {found} of {before}")
                run.check(not find_damage(copy / NAME), f"{what}: left a damaged file")
                left = [name for name in os.listdir(copy) if ".original" in name]
                may_be = is_migrated(copy / NAME) or refusal is OutcomeUnknownError
                may_be = may_be or point.is_sticky  # its removal may have failed, too
                run.check(may_be or not left, f"{what}: left {left}, and imported nothing")
            what = f"{what}, once more"
            again = await self._refusal(lifecycle, folder, nullcontext(), what)
            run.check(again is None, f"{what}: raised {again}")
        if lifecycle.make is original:
            copies = [folder / name for name in os.listdir(folder) if ".original-" in name]
            run.check(
                any(_is_whole(file, before) for file in copies),
                f"{what}: no copy of the original was kept",
            )
        check_files(run, path, whole, what)

    async def _refusal(
        self,
        lifecycle: LifecycleCall,
        folder: Path,
        fault: AbstractContextManager[object],
        what: str,
    ) -> type | None:
        """Return the error type that a lifecycle call raises; `None` if it returns."""
        outcome = await outcome_of(self.run, partial(lifecycle.perform, folder, fault), what)
        # Not the error itself: it refers to cursors, which keep the file open.
        return type(outcome) if isinstance(outcome, Exception) else None

    @contextmanager
    def _copy_of(self, folder: Path) -> Iterator[Path]:
        """Copy a folder; the copy is removed afterwards."""
        copy = self.run.folder / f"lifecycle-{next(self._numbers)}"
        shutil.copytree(folder, copy)
        try:
            yield copy
        finally:
            shutil.rmtree(copy)


def _is_whole(file: Path, ids: set[str]) -> bool:
    """Return true if the file contains these tasks; part of a copy may be no database."""
    try:
        return not find_damage(file) and task_ids(file) == ids
    except UnreadableError:
        return False


@contextmanager
def _python_hooked(fault: Fault) -> Iterator[None]:
    """Pass the system calls of the store itself to the fault, as for a backup."""

    def hooked(name: str, proceed: Callable[..., Any]) -> Callable[..., Any]:
        def call(file: Any, *arguments: Any, **options: Any) -> Any:
            path = f"/proc/self/fd/{file}" if isinstance(file, int) else os.fspath(file)
            error = fault(vfs.SystemCall(name, os.path.realpath(path)))
            if error:
                raise OSError(error, os.strerror(error), path)
            return proceed(file, *arguments, **options)

        return call

    names = {"open": "open", "fsync": vfs.SYNC, "unlink": "unlink", "replace": "replace"}
    with ExitStack() as stack:
        for function, name in names.items():
            stack.enter_context(
                mock.patch.object(os, function, hooked(name, getattr(os, function)))
            )
        yield


CAMPAIGN = Campaign(
    name="io",
    title="every system call of SQLite fails in turn, once or for long, during every public call",
    promises=("P1", "P2"),
    perform=perform,
    rounds=34_000,
    quick_rounds=40,
    unit="fault points",
    kinds=(SQLITE,),
    bugs={"cache-before-commit": "in memory"},
    unavailable_reason=vfs.unavailable_reason,
)
