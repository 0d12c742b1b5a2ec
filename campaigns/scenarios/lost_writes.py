"""Power cuts without root: any part of the data that SQLite wrote and never synced may be lost.

SQLite's writes and syncs are recorded in process (see `vfs`), in one order with the messages of the
clients. A cut is a position in that record. Data synced before it is in the files afterwards; of
the data written since, random sectors are kept. (The creation or removal of a file counts as
synced.) Each record gets many cuts. (The method, to rebuild crash states from a record of system
calls, is that of Pillai et al., "All File Systems Are Not Created Equal", OSDI 2014.)

The checks are those of `power`; also, a store must open the files and find them sound.
"""

from __future__ import annotations

import asyncio
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import suppress
from itertools import count, pairwise
from pathlib import Path
from random import Random
from tempfile import TemporaryDirectory
from typing import Any, NamedTuple

from campaigns.checks.audit import Log, verify_database
from campaigns.checks.trial import checkpointing
from campaigns.faults.planted_bugs import planted
from campaigns.faults.vfs import SYNC, WRITES, SystemCall, hooked, unavailable_reason
from campaigns.harness.campaign import SQLITE, Campaign, Run
from campaigns.workloads.load import make_nodes, open_store, write

CALLS_A_RECORD = 400
CUTS_A_RECORD = 50

SECTOR = 512
"""Bytes that a disk writes atomically."""

PAGES_A_CHECKPOINT = 100
"""A tenth of the default, so that each record contains some checkpoints."""


class Write(NamedTuple):
    """Bytes written to a file."""

    path: Path
    offset: int
    data: bytes


class Truncation(NamedTuple):
    """A new length of a file."""

    path: Path
    length: int


class Sync(NamedTuple):
    """The sync of all data written to a file."""

    path: Path


Event = Write | Truncation | Sync | list[Any]
"""A change of a file, or a message of a client."""


class _File:
    """The content of a file that is on the disk, and the changes that may be."""

    def __init__(self, synced: bytes) -> None:
        self._synced = bytearray(synced)
        self._since: list[Write | Truncation] = []

    def note(self, event: Write | Truncation | Sync) -> None:
        # A sync covers this file only; changes of other files stay unsynced.
        if isinstance(event, Sync):
            for change in self._since:
                _apply(change, self._synced)
            self._since.clear()
        else:
            self._since.append(event)

    def after_cut(self, random: Random, share: float) -> bytes:
        """Return the content after a cut; about this share of the unsynced data is kept."""
        left = bytearray(self._synced)
        for change in self._since:
            # Any subset may be on the disk: it reorders writes between two syncs.
            for part in _sectors(change):
                if random.random() < share:
                    _apply(part, left)
        return bytes(left)


class RecordedDisk:
    """The files in a folder, with their synced and unsynced data."""

    def __init__(self, folder: Path) -> None:
        self._files = defaultdict(lambda: _File(b""))
        for path in folder.iterdir():
            self._files[path.name] = _File(path.read_bytes())

    def note(self, event: Write | Truncation | Sync) -> None:
        """Record a change of a file."""
        self._files[event.path.name].note(event)

    def leave(self, folder: Path, random: Random) -> None:
        """Write the files to a folder as they are after a power cut now."""
        # The extremes are likely in practice: none or all of the unsynced data.
        share = random.choice((0, random.random(), 1))
        for name, file in self._files.items():
            (folder / name).write_bytes(file.after_cut(random, share))


def _apply(change: Write | Truncation, content: bytearray) -> None:
    length = change.offset if isinstance(change, Write) else change.length
    content.extend(bytes(max(0, length - len(content))))
    if isinstance(change, Write):
        content[length : length + len(change.data)] = change.data
    else:
        del content[length:]


def _sectors(change: Write | Truncation) -> Iterator[Write | Truncation]:
    """Split a change into the parts that are on the disk or not, independently."""
    if isinstance(change, Truncation):
        yield change
        return
    end = change.offset + len(change.data)
    starts = [change.offset, *range((change.offset // SECTOR + 1) * SECTOR, end, SECTOR)]
    for start, stop in pairwise([*starts, end]):
        yield Write(change.path, start, change.data[start - change.offset : stop - change.offset])


def perform(run: Run) -> None:
    """Cut the power `run.rounds` times."""
    for cuts in run.parts(CUTS_A_RECORD):
        with run.location() as location:
            assert isinstance(location, Path)
            asyncio.run(make_nodes(location))
            disk = RecordedDisk(location.parent)
            with planted(run.bug):
                events = asyncio.run(_record(location, run.random.getrandbits(32)))
            _cut(run, disk, events, location.name, cuts)


async def _record(location: Path, seed: int) -> Sequence[Event]:
    """Let clients write for a while, and return the recorded events."""
    events: list[Event] = []
    calls = count(1)

    def hook(call: SystemCall) -> int:
        path = Path(call.path)
        if path.name.endswith("-shm"):  # never synced, and rebuilt on opening
            pass
        elif call.name == SYNC:
            events.append(Sync(path))
        elif call.name == "ftruncate":
            events.append(Truncation(path, call.offset))
        elif call.name in WRITES:
            events.append(Write(path, call.offset, call.data))
        return 0

    def send(*message: Any) -> None:
        events.append([*message])
        if message[0] == "returned" and next(calls) == CALLS_A_RECORD:
            writing.cancel()

    with hooked(hook, location.parent), checkpointing(PAGES_A_CHECKPOINT):
        async with open_store(str(location)) as store:
            writing = asyncio.create_task(write(store, send, 0, seed))
            with suppress(asyncio.CancelledError):
                await writing
            end = len(events)  # later events are not from clients
    return events[:end]


def _cut(run: Run, disk: RecordedDisk, events: Sequence[Event], name: str, cuts: int) -> None:
    """Cut the power at random positions of a record, and check the files each time."""
    log = Log(run.counts)
    done = 0
    places = run.random.choices(range(len(events)), k=cuts - 1)
    for place in [*sorted(places), len(events)]:
        for event in events[done:place]:
            if isinstance(event, list):
                log.note(event)
            else:
                disk.note(event)
        done = place
        with TemporaryDirectory(dir=run.folder) as folder:
            disk.leave(Path(folder), run.random)
            # The last cut counts the unanswered calls.
            there = log if done == len(events) else log.copy()
            there.check(run, Path(folder, name))
            verify_database(run, Path(folder, name))
        run.done()


CAMPAIGN = Campaign(
    name="lost-writes",
    title="the power is cut at any moment: any part of the unsynced data is lost",
    promises=("P1", "P2", "P5"),
    perform=perform,
    rounds=2000,
    quick_rounds=20,
    unit="cuts",
    kinds=(SQLITE,),
    bugs={"synchronous-off": "lost: task"},
    unavailable_reason=unavailable_reason,
)
