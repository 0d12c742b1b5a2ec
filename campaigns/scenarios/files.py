"""Faults of the file of a database, or of its folder, while it is open, or before.

While it is open: the disk is full, or becomes read-only; another process keeps the database locked;
its file is removed, or replaced. `trial` has the checks.

Before: the WAL of a killed process was truncated, at the end of each frame and within one, or has a
changed byte, so that the store must open with all commits up to there, and no more; the `-shm` file
is garbage, or missing; the file is no database at all, or a damaged or an unreadable one, which
must be refused with a clear error, and left unchanged. The format of the WAL:
https://sqlite.org/fileformat2.html#the_write_ahead_log.
"""

from __future__ import annotations

import asyncio
import errno
import os
import shutil
import sqlite3
import struct
import subprocess
import sys
from bisect import bisect_right
from collections import Counter
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import (
    AbstractContextManager,
    ExitStack,
    closing,
    contextmanager,
    nullcontext,
    suppress,
)
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from campaigns.checks.snapshot import Snapshot, differences, take_snapshot
from campaigns.checks.trial import (
    LOCK_SECONDS,
    abandoning,
    check_files,
    checkpointing,
    outcome_of,
    trial_of,
)
from campaigns.faults import vfs
from campaigns.faults.planted_bugs import planted
from campaigns.harness.campaign import SQLITE, Campaign, Run, silenced
from campaigns.workloads.calls import CALLS
from openclaw_store import Database, StateManager, UnavailableError, verify
from openclaw_store.testing import FakeClock, TaskFactory

CALLS_A_STORE = 5

COMMITS = 12
"""Number of commits in the WAL that is cut."""

_WAL_HEADER, _FRAME_HEADER = 32, 24


_KEEP_LOCKED = """
import sqlite3, sys

connection = sqlite3.connect(sys.argv[1], isolation_level=None, timeout=5)
connection.execute("BEGIN EXCLUSIVE")
print("locked", flush=True)
sys.stdin.read()
"""
"""A program that holds the write lock until the end of its input."""

FileFault = Callable[[Path], AbstractContextManager[object]]
"""Provides a fault of the database at a path."""


class FailingDisk:
    """The system calls that fail, by the active fault."""

    def __init__(self) -> None:
        self._refuse: vfs.Hook | None = None

    def __call__(self, call: vfs.SystemCall) -> int:
        return 0 if self._refuse is None else self._refuse(call)

    @contextmanager
    def _failing(self, refuse: vfs.Hook) -> Iterator[None]:
        self._refuse = refuse
        try:
            yield
        finally:
            self._refuse = None

    @contextmanager
    def full(self, path: Path) -> Iterator[None]:
        """Refuse to let any file of the database grow."""
        sizes = {str(file): file.stat().st_size for file in path.parent.iterdir()}

        def refuse(call: vfs.SystemCall) -> int:
            grows = call.name in vfs.WRITES or call.name == "ftruncate"
            is_over = call.offset + call.size > sizes.get(call.path, 0)
            return errno.ENOSPC if grows and is_over else 0

        with self._failing(refuse):
            yield

    @contextmanager
    def read_only(self, path: Path) -> Iterator[None]:
        """Refuse writes with EROFS, as Linux does after a disk error."""

        def refuse(call: vfs.SystemCall) -> int:
            writes = call.name in vfs.WRITES or call.name in ("ftruncate", "unlink")
            opens = call.name == "open" and call.offset & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
            return errno.EROFS if writes or opens else 0

        with self._failing(refuse):
            yield


@contextmanager
def removed(path: Path) -> Iterator[None]:
    """Move the database away."""
    away = path.with_name("away")
    path.rename(away)
    try:
        yield
    finally:
        away.replace(path)


@contextmanager
def replaced(path: Path) -> Iterator[None]:
    """Replace the database by another one."""
    another = path.with_name("another")
    with closing(sqlite3.connect(another)) as connection:
        connection.execute("CREATE TABLE tasks (task_id TEXT PRIMARY KEY)")
    with removed(path):
        another.rename(path)
        yield


@contextmanager
def locked(path: Path) -> Iterator[None]:
    """Let another process hold the write lock."""
    command = [sys.executable, "-c", _KEEP_LOCKED, str(path)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        if process.stdout.readline() != b"locked\n":
            raise RuntimeError("the database could not be locked")
        yield


@contextmanager
def unwritable(path: Path) -> Iterator[None]:
    """Make the file and its folder read-only.

    Modes have no effect for root; there, an attribute of some file systems is set.
    """
    places = (path, path.parent)
    if os.geteuid():
        modes = [place.stat().st_mode for place in places]
        for place, mode in zip(places, modes, strict=True):
            place.chmod(mode & ~0o222)
        try:
            yield
        finally:
            for place, mode in zip(places, modes, strict=True):
                place.chmod(mode)
    else:
        subprocess.run(["chattr", "+i", *places], check=True, capture_output=True)
        try:
            yield
        finally:
            subprocess.run(["chattr", "-i", *places], check=True)


@contextmanager
def no_space(path: Path) -> Iterator[None]:
    """Fill all free space of a small disk with a file."""
    ballast = path.with_name("ballast")
    with suppress(OSError), ballast.open("wb", buffering=0) as file:
        while True:
            file.write(bytes(512))
    try:
        yield
    finally:
        ballast.unlink()


@contextmanager
def small_disk(folder: Path) -> Iterator[Path]:
    """Mount a disk of 1 MB, which needs root."""
    folder.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "none", folder], check=True)
    try:
        yield folder
    finally:
        subprocess.run(["umount", folder], check=True)


def perform(run: Run) -> None:
    """In each round, make one call during a fault, or open damaged files once."""
    with (
        silenced("openclaw_store"),
        planted(run.bug),
        vfs.hooked(disk := FailingDisk(), run.folder),
    ):
        _Files(run, disk).perform()


@dataclass(frozen=True)
class Killed:
    """The files of a killed process, with all commits in the WAL."""

    database: bytes
    wal: bytes
    snapshots: Sequence[Snapshot]
    """Snapshots before the first commit, and after each."""
    ends: Sequence[int]
    """The end of each commit in the WAL."""

    def at(self, end: int) -> Snapshot:
        """Return the snapshot for a WAL that is valid up to some byte."""
        return self.snapshots[bisect_right(self.ends, end)]


def killed(path: Path) -> Killed:
    """Create a database with some commits in its WAL, and copy its files."""
    wal = path.with_name(f"{path.name}-wal")

    async def write() -> Killed:
        async with StateManager(Database(path, clock=FakeClock()), None) as state:
            make_task, snapshots = TaskFactory(FakeClock()), [take_snapshot(path)]
            for number in range(COMMITS):
                await state.add_task(make_task(parameters={"text": "x" * 500 * number}))
                snapshots.append(take_snapshot(path))
            return killed_now(snapshots)

    def killed_now(snapshots: Sequence[Snapshot]) -> Killed:
        left = wal.read_bytes()
        return Killed(path.read_bytes(), left, snapshots, [*commits_of(left)])

    return asyncio.run(write())


def frame_size(wal: bytes) -> int:
    """Return the size of a WAL frame in bytes: a header, and a page."""
    page_size: int = struct.unpack_from(">I", wal, 8)[0]
    return _FRAME_HEADER + page_size


def commits_of(wal: bytes) -> Iterator[int]:
    """Yield the ends of the commits in a WAL; the last frame of each holds the database size."""
    size = frame_size(wal)
    for start in range(_WAL_HEADER, len(wal), size):
        if struct.unpack_from(">I", wal, start + 4)[0]:
            yield start + size


class _Files:
    def __init__(self, run: Run, disk: FailingDisk) -> None:
        self.run = run
        self._faults = {
            # Weights: a call that waits for a lock is slow.
            "disk full": (disk.full, 4),
            "read-only": (disk.read_only, 4),
            "removed": (removed, 2),
            "replaced": (replaced, 2),
            "locked": (locked, 1),
        }
        self._openings = {
            self._cut_wal: 4,
            self._other_byte_in_wal: 4,
            self._garbage_in_shm: 1,
            self._no_database: 2,
            self._damaged: 2,
            self._locked_by_another: 1,
        }
        may_need_root = not run.is_quick and not os.geteuid()
        self._has_small_disk = may_need_root
        if may_need_root or os.geteuid():
            self._openings[self._unwritable] = 1
        if not run.is_quick and os.geteuid():
            run.notes["left out"] = "small disk full, which needs root"
        self._seen: Counter[str] = Counter()

    def perform(self) -> None:
        with self.run.location() as path:
            assert isinstance(path, Path)
            self._killed = killed(path)
        for some in self.run.parts(CALLS_A_STORE):
            if self.run.random.random() < 0.5:
                self._use(some)
            else:
                for _ in range(some):
                    self._open()
        self.run.notes.update({name: str(number) for name, number in sorted(self._seen.items())})

    def _use(self, rounds: int) -> None:
        """Make some calls of one store during faults."""
        random = self.run.random
        with ExitStack() as stack:
            location = stack.enter_context(self.run.location())
            assert isinstance(location, Path)
            names = random.choices(
                [*self._faults], [weight for _, weight in self._faults.values()], k=rounds
            )
            faults = [(name, self._faults[name][0]) for name in names]
            if self._has_small_disk and random.random() < 0.3:
                disk = stack.enter_context(small_disk(location.with_name("disk")))
                location = Path(shutil.copyfile(location, disk / location.name))
                faults = [("small disk full", no_space)] * rounds
            stack.enter_context(checkpointing(4))
            stack.enter_context(abandoning(self.run))
            asyncio.run(self._call(location, faults))

    async def _call(self, path: Path, faults: Sequence[tuple[str, FileFault]]) -> None:
        async with trial_of(self.run, path) as trial:
            for name, fault in faults:
                call, is_cold = self.run.random.choice(CALLS), self.run.random.random() < 0.5
                effect = await trial.effect(call, nullcontext)
                what = f"{call.name}, {'cold, ' * is_cold}{name}"
                await trial.make(
                    call,
                    partial(fault, path),
                    effect,
                    what,
                    cold=is_cold,
                    is_elsewhere=fault in (removed, replaced),
                )
                self._done(name)

    def _open(self) -> None:
        """Open the files of a killed process after a modification."""
        [tamper] = self.run.random.choices([*self._openings], [*self._openings.values()])
        folder = self.run.folder / "tampered"
        folder.mkdir()
        path = folder / "cluster.db"
        path.write_bytes(self._killed.database)
        with abandoning(self.run):
            tamper(path)
        shutil.rmtree(folder)
        self._done(tamper.__name__.strip("_").replace("_", " "))

    def _done(self, name: str) -> None:
        self._seen[name] += 1
        self.run.done()

    def _cut_wal(self, path: Path) -> None:
        wal, size = self._killed.wal, frame_size(self._killed.wal)
        end = self.run.random.randrange(len(wal) + 1)
        if self.run.random.random() < 0.5:
            end = _WAL_HEADER + (end - _WAL_HEADER) // size * size
        path.with_name(f"{path.name}-wal").write_bytes(wal[:end])
        self._check_opens(path, self._killed.at(end), f"WAL cut at {end}")

    def _other_byte_in_wal(self, path: Path) -> None:
        wal, size = bytearray(self._killed.wal), frame_size(self._killed.wal)
        place = self.run.random.randrange(len(wal))
        wal[place] ^= self.run.random.randrange(1, 256)
        path.with_name(f"{path.name}-wal").write_bytes(wal)
        good = _WAL_HEADER + (place - _WAL_HEADER) // size * size
        self._check_opens(path, self._killed.at(good), f"another byte at {place} of the WAL")

    def _garbage_in_shm(self, path: Path) -> None:
        path.with_name(f"{path.name}-wal").write_bytes(self._killed.wal)
        path.with_name(f"{path.name}-shm").write_bytes(self.run.random.randbytes(32_768))
        self._check_opens(path, self._killed.snapshots[-1], "garbage in the -shm")

    def _check_opens(self, path: Path, expected: Snapshot, what: str) -> None:
        """Check that a store opens with the expected content, and can be used."""

        async def use() -> None:
            async with StateManager(Database(path), None) as state:
                found = [*await differences(state, expected), *expected.flaws()]
                self.run.check(not found, f"{what}: {found}")
                self.run.check(bool(await verify(state.db)), f"{what}: verify finds something")
                await state.add_task(TaskFactory(FakeClock())(task_id="another"))
                await state.remove_task("another")

        before = expected.rows["tasks"]
        self.run.check(self._outcome(use, what) is None, f"{what}: it does not open")
        if take_snapshot(path).rows["tasks"] != before:
            self.run.lost(f"{what}: valid commits are missing")
        check_files(self.run, path, take_snapshot(path), what)

    def _no_database(self, path: Path) -> None:
        random = self.run.random
        good = path.read_bytes()
        kinds = {
            "text": b"precious notes\n" * random.randrange(1, 1000),
            "random bytes": random.randbytes(random.randrange(100, 100_000)),
            "another header": random.randbytes(16) + good[16:],
        }
        kind = random.choice([*kinds, "a folder"])
        path.unlink()
        if kind == "a folder":
            path.mkdir()
        else:
            path.write_bytes(kinds[kind])
        before = _files_of(path.parent)
        outcome = self._outcome(partial(_use, path), kind)
        self.run.check(isinstance(outcome, UnavailableError), f"{kind}: {outcome!r}")
        self.run.check(_files_of(path.parent) == before, f"{kind}: it was changed")
        if path.is_dir():
            path.rmdir()
        path.write_bytes(good)
        self.run.check(self._outcome(partial(_opens, path), f"after {kind}") is None, kind)

    def _damaged(self, path: Path) -> None:
        random, good = self.run.random, path.read_bytes()
        kind = random.choice(("cut", "nothing left", "zeros", "garbage"))
        place = random.randrange(100, len(good) - 4096)
        bad = {
            "cut": good[:place],
            "nothing left": b"",
            "zeros": good[:place] + bytes(4096) + good[place + 4096 :],
            "garbage": good[:place] + random.randbytes(4096) + good[place + 4096 :],
        }[kind]
        path.write_bytes(bad)
        outcome = self._outcome(partial(_use, path), f"{kind} at {place}")  # it may also work
        if kind == "nothing left":  # SQLite takes it for a new database
            self.run.check(outcome is None, f"{kind}: {outcome!r}")
        for file in path.parent.iterdir():
            file.unlink()
        path.write_bytes(good)
        self.run.check(self._outcome(partial(_opens, path), f"after {kind}") is None, kind)

    def _locked_by_another(self, path: Path) -> None:
        with locked(path):
            outcome = self._outcome(partial(_use, path), "locked")
            self.run.check(isinstance(outcome, UnavailableError), f"locked: {outcome!r}")
        again = self._outcome(partial(_use, path), "unlocked again")
        self.run.check(again is None, f"unlocked again: {again!r}")

    def _unwritable(self, path: Path) -> None:
        with unwritable(path):
            outcome = self._outcome(partial(_use, path), "unwritable")
            self.run.check(isinstance(outcome, UnavailableError), f"unwritable: {outcome!r}")
            self.run.check(len(os.listdir(path.parent)) == 1, "unwritable: a file was made")
        again = self._outcome(partial(_opens, path), "writable again")
        self.run.check(again is None, f"writable again: {again!r}")

    def _outcome(self, use: Callable[[], Awaitable[object]], what: str) -> Exception | None:
        outcome = asyncio.run(outcome_of(self.run, use, what))
        return outcome.with_traceback(None) if isinstance(outcome, Exception) else None


async def _opens(path: Path) -> None:
    async with StateManager(Database(path, timeout=LOCK_SECONDS), None):
        pass


async def _use(path: Path) -> None:
    """Open a store, read all of it, and write to it."""
    async with StateManager(Database(path, timeout=LOCK_SECONDS), None) as state:
        await verify(state.db)
        await state.list_tasks()
        await state.add_task(TaskFactory()(task_id="another"))
        await state.remove_task("another")


def _files_of(folder: Path) -> dict[str, bytes | None]:
    return {file.name: file.read_bytes() if file.is_file() else None for file in folder.iterdir()}


CAMPAIGN = Campaign(
    name="files",
    title="disk full, read-only, locked, removed, replaced; a cut or garbled WAL; no database",
    promises=("P1", "P2"),
    perform=perform,
    rounds=5_000,
    quick_rounds=20,
    unit="faults",
    kinds=(SQLITE,),
    unavailable_reason=vfs.unavailable_reason,
)
