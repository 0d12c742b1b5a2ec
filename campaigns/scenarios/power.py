"""Power cuts: the file system stops under load, and all data that is not on its disk is lost.

The file system is ext4 in a file of its own. After a shutdown without a flush of its log, every
call fails, and data in memory is never written; the next mount recovers it as after a power cut.
(The file-system tests of Linux do the same: see `src/godown.c` of xfstests.)

A sync at that moment may report success though its data is not on the disk: of plain `pwrite` and
`fdatasync` at the end of a file, one in six lost its acknowledged data (Linux 6.18). After a real
power cut, no program gets such an answer. So the worker is stopped first.

The checks are those of `crash`: no acknowledged call is lost, and nothing is corrupt.
"""

from __future__ import annotations

import fcntl
import os
import shutil
import struct
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory

from campaigns.harness.campaign import SQLITE, Campaign, Run
from campaigns.scenarios.workers import (
    Interruption,
    Worker,
    check_opening_times,
    interrupt_repeatedly,
)
from openclaw_store.testing import create_database

CUTS_A_DISK = 20
"""Cuts before a new disk is begun, since the check of a larger database takes longer."""

_SIZE = 64 * 2**20
_SHUTDOWN = 0x8004587D
"""EXT4_IOC_SHUTDOWN, which is `_IOR('X', 125, __u32)`."""
_WITHOUT_LOG = 2
"""EXT4_GOING_FLAGS_NOLOGFLUSH"""
_PROGRAMS = ("mkfs.ext4", "mount", "umount")


class Disk:
    """An ext4 file system in a file, mounted on a folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder / "mounted"
        self.folder.mkdir()
        self._file = folder / "disk"
        with self._file.open("wb") as file:
            file.truncate(_SIZE)
        _run("mkfs.ext4", "-q", "-F", self._file)
        self.mount()

    def mount(self) -> None:
        """Mount it, with the recovery that it needs."""
        _run("mount", "-o", "loop", self._file, self.folder)

    def unmount(self) -> None:
        """Unmount it, and release the file."""
        _run("umount", self.folder)

    def cut(self) -> None:
        """Cut its power."""
        folder = os.open(self.folder, os.O_RDONLY)
        try:
            fcntl.ioctl(folder, _SHUTDOWN, struct.pack("I", _WITHOUT_LOG))
        finally:
            os.close(folder)


@contextmanager
def new_disk(folder: Path) -> Iterator[Disk]:
    """Create and mount a disk; both it and its file are removed afterwards."""
    with TemporaryDirectory(dir=folder) as place:
        disk = Disk(Path(place))
        try:
            yield disk
        finally:
            _run("umount", "--lazy", disk.folder)  # a process may still use it


def perform(run: Run) -> None:
    """Cut the power `run.rounds` times."""
    seconds: list[float] = []
    for cuts in run.parts(CUTS_A_DISK):
        with new_disk(run.folder) as disk:
            location = disk.folder / "cluster.db"
            create_database(location)
            seconds += interrupt_repeatedly(run, location, [_cut_of(disk)] * cuts)
    check_opening_times(run, seconds)


def _cut_of(disk: Disk) -> Interruption:
    def interrupt(worker: Worker) -> None:
        worker.stop()
        disk.cut()
        worker.kill()

    def repair() -> None:
        disk.unmount()
        disk.mount()

    return Interruption(interrupt, repair)


@cache
def unavailable_reason() -> str | None:
    """Return the reason that prevents a mount on this machine, with a remedy; else `None`."""
    if sys.platform != "linux":
        return "only Linux can cut the power of a file system"
    if os.geteuid():
        return "only root may mount a file system: run it with sudo"
    if missing := [program for program in _PROGRAMS if shutil.which(program) is None]:
        return f"there is no {missing[0]}: install e2fsprogs and mount"
    try:
        with TemporaryDirectory() as folder, new_disk(Path(folder)):
            return None
    except subprocess.CalledProcessError as error:
        return (
            f"no file system can be mounted ({error.stderr.strip()}): run it outside of containers"
        )


def _run(*command: str | Path) -> None:
    subprocess.run(command, check=True, capture_output=True, text=True)


CAMPAIGN = Campaign(
    name="power-cut",
    title="the power of a file system is cut while 64 writers write to it",
    promises=("P1", "P2", "P5"),
    perform=perform,
    rounds=200,
    quick_rounds=2,
    unit="cuts",
    kinds=(SQLITE,),
    bugs={"synchronous-off": "lost: task"},
    unavailable_reason=unavailable_reason,
)
