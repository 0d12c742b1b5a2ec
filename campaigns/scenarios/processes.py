"""Processes that end without closing the store, fork while they use it, or use several event loops.

A round is the life of a process. It opens the store, leaves work in progress (writes, a watcher,
heartbeats, a transaction, ...) and ends in one of the ways in which programs end, closing nothing;
or it forks, and the child continues with the inherited objects; or it uses the store from another
event loop. These conditions must hold:

- It ends, and within a second. Forbidden uses are refused with an error of the library, within a
  second, too; allowed ones work. A process that hangs is killed and reported.
- Acknowledged changes are in the database, a transaction is there as a whole or not at all, nothing
  is damaged, no revision is missing, and the database opens again.
- The error output has only the traceback of the program's own error.

`programs` has the programs. The processes are forks of one that has imported the library, since the
import takes longer than all the rest.
"""

from __future__ import annotations

import asyncio
import gc
import os
import signal
import time
import warnings
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from functools import partial
from itertools import islice
from pathlib import Path
from random import Random
from tempfile import TemporaryDirectory
from typing import Any

import openclaw_store
from campaigns.faults.children import Child, Send
from campaigns.harness.campaign import POSTGRESQL, Campaign, Location, Run
from campaigns.harness.direct_access import LAST_REVISION, fetch, find_damage
from campaigns.workloads.forks import OTHER_PROGRAMS
from campaigns.workloads.program import Program, limit_life
from campaigns.workloads.programs import PROGRAMS
from openclaw_store import Database, StateManager, Task, TaskRepository, TaskType, verify

LIMIT_SECONDS = 1.0
"""Time limit, in seconds, for an error, or for the end of a process."""

AT_ONCE = 2
"""Number of processes at a time."""

BATCH = 24
"""Number of databases at a time."""

LIBRARY = str(Path(openclaw_store.__file__).parent)
"""Path of the library, which must not appear in the traceback of a program's own error."""

CODES = {
    "raises": 1,
    "is_interrupted": -signal.SIGINT,
    "is_terminated": -signal.SIGTERM,
    "exits": 3,
    "exits_in_a_task": 3,
    "exits_at_once": 3,
}
"""Exit statuses of the processes that do not end with 0."""

ERRORS = {"raises": "CrashError", "is_interrupted": "KeyboardInterrupt"}
"""Errors with a traceback."""


def supervise(send: Send, folder: str, programs: Sequence[tuple[str, str, int]]) -> None:
    """Fork a process for each program, a few at a time, and report how they end.

    Args:
        folder: The folder for error output, in a file per program.
        programs: Their names, the locations of their databases, and their seeds.
    """
    warnings.filterwarnings("ignore", "This process .* is multi-threaded", DeprecationWarning)
    asyncio.run(_warm_up())
    gc.freeze()  # else each fork collects all imported objects at its end: 0.4 s
    running: dict[int, int] = {}
    for number, (name, location, seed) in enumerate(programs):
        errors = os.open(f"{folder}/{number}", os.O_CREAT | os.O_WRONLY)
        child = os.fork()
        if child == 0:
            for output in (1, 2):
                os.dup2(errors, output)
            limit_life()
            PROGRAMS[name](Program(partial(send, number), location, Random(seed)))
            return  # the interpreter of the fork ends
        os.close(errors)
        running[child] = number
        if len(running) == AT_ONCE:
            _reap(send, running)
    while running:
        _reap(send, running)


def _reap(send: Send, running: dict[int, int]) -> None:
    child, status = os.wait()
    send(running.pop(child), "ended", os.waitstatus_to_exitcode(status), time.monotonic())


async def _warm_up() -> None:
    """Import all of the library: Alembic loads more modules at its first use."""
    async with Database(":memory:") as database:
        await TaskRepository(database).count_by_status()


class _ProcessRecord:
    """The records of a process from start to end."""

    def __init__(self, name: str, location: Location) -> None:
        self.name, self.location = name, location
        self.trying: set[str] = set()
        self.acknowledged: set[str] = set()
        self.tried: list[tuple[str, str, str, float]] = []
        self.children: list[int] = []
        """Exit statuses of its children."""
        self.left_at: float | None = None
        self.ended_at = 0.0
        self.code: int | None = None

    def note(self, what: str, *values: Any) -> None:
        """Record a message."""
        if what in ("trying", "acknowledged"):
            getattr(self, what).add(*values)
        elif what == "tried":
            self.tried.append(values)
        elif what == "child ended":
            self.children += values
        elif what == "leaving":
            [self.left_at] = values
        else:
            self.code, self.ended_at = values


def perform(run: Run) -> None:
    """Run as many processes as there are rounds, through all programs in turn."""
    slowest = dict.fromkeys(("error", "end", "opening again"), 0.0)
    names = _names(run.random)
    for number in run.parts(BATCH):
        _run_processes(run, [*islice(names, number)], slowest)
    run.notes.update({f"slowest {what}": f"{took:.2f} s" for what, took in slowest.items()})


def _names(random: Random) -> Iterator[str]:
    """Yield the names of all programs, again and again."""
    while True:
        pairs = [name for name in PROGRAMS if ", " in name]
        random.shuffle(pairs)
        yield from (program.__name__ for program in OTHER_PROGRAMS)
        yield from pairs


def _run_processes(run: Run, names: Sequence[str], slowest: dict[str, float]) -> None:
    """Run processes, and judge them."""
    with ExitStack() as places:
        folder = Path(places.enter_context(TemporaryDirectory(dir=run.folder)))
        records = [_ProcessRecord(name, places.enter_context(run.location())) for name in names]
        programs = [(one.name, str(one.location), run.random.randrange(2**32)) for one in records]
        errors = folder / "errors"
        # An own interpreter, as the fork of a server of forks does not end as an interpreter does.
        own: dict[str, str] = {}
        with Child(
            supervise, folder, programs, errors=errors, bug=run.bug, environment=own
        ) as child:
            for number, what, *values in child.messages():
                records[number].note(what, *values)
            run.check(child.wait() == 0, f"the supervisor ended: {child.complaint}")
        for number, record in enumerate(records):
            _judge(run, record, (folder / str(number)).read_text(errors="replace"), slowest)
            run.done()


def _judge(run: Run, record: _ProcessRecord, errors: str, slowest: dict[str, float]) -> None:
    """Judge a process by its records."""
    name, counts = record.name, run.counts
    ending = name.partition(",")[0]
    code = CODES.get(ending, 0)
    run.check(record.code == code, f"{name}: ended with {record.code} instead of {code}: {errors}")
    if record.left_at is not None:
        took = record.ended_at - record.left_at
        slowest["end"] = max(slowest["end"], took)
        is_soon = run.is_quick or took < LIMIT_SECONDS
        run.check(is_soon, f"{name}: its end took {took:.1f} s")
    else:
        run.wrong(f"{name}: was never ready to end")
    if ending in ERRORS:
        last = errors.rstrip().rpartition("\n")[2]
        is_own = errors.startswith("Traceback") and ERRORS[ending] in last
        run.check(is_own and LIBRARY not in errors, f"{name}: {errors}")
    elif ending not in ("closes_its_loop", "loses_its_loop"):  # Python itself warns there
        run.check(not errors, f"{name}: {errors}")
    for code in record.children:
        run.check(code == 0, f"{name}: its child ended with {code}")
    for what, came, wanted, took in record.tried:
        counts.refused += came == "refused"  # successful calls are counted by their tasks
        run.check(came == wanted and came in ("works", "refused"), f"{name}: {what}: {came}")
        if came == "refused":
            slowest["error"] = max(slowest["error"], took)
            is_soon = run.is_quick or took < LIMIT_SECONDS
            run.check(is_soon, f"{name}: {what}: was refused after {took:.1f} s")

    stored = _stored(run, record)
    counts.acknowledged += len(record.acknowledged)
    for id in record.acknowledged - stored:
        run.lost(f"{name}: {id}")
    unknown = record.trying - record.acknowledged
    counts.unknown += len(unknown)
    counts.unknown_committed += len(unknown & stored)
    run.check(len(stored & {"left", "right"}) != 1, f"{name}: a transaction is stored in part")
    began = time.monotonic()
    problems = asyncio.run(_verified(record.location))
    took = time.monotonic() - began
    slowest["opening again"] = max(slowest["opening again"], took)
    run.check(not problems, f"{name}: {problems}")


def _stored(run: Run, record: _ProcessRecord) -> set[str]:
    """Return the stored tasks; check the feed and the integrity, too."""
    tasks, counters = "SELECT task_id FROM tasks", LAST_REVISION
    feed = "SELECT count(*), max(revision) FROM changes"
    ids, [(revision,)], [(changes, newest)] = fetch(record.location, tasks, counters, feed)
    found = find_damage(record.location)
    run.check(not found, f"{record.name}: {found}")
    in_order = revision == changes == (newest or 0)
    run.check(in_order, f"{record.name}: revision {revision}, {changes} changes up to {newest}")
    return {id for (id,) in ids}


async def _verified(location: Location) -> list[str]:
    """Return the findings of the library in a database, which must open again."""
    async with StateManager(Database(location)) as manager:
        await manager.add_task(Task("after", TaskType.BATCH, "t"))
        return [problem.text for problem in (await verify(manager.db)).problems]


CAMPAIGN = Campaign(
    name="processes",
    title="processes end without closing the store, fork while they use it, or use several loops",
    promises=("P1", "P2", "P7"),
    perform=perform,
    rounds=1_000,
    quick_rounds=12,
    unit="processes",
    rounds_of={POSTGRESQL: 500},
)
