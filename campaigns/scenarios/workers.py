"""Processes with the clients of `load`, whose store is taken from under them again and again."""

from __future__ import annotations

import asyncio
import os
import signal
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from importlib import import_module
from itertools import count
from pathlib import Path
from random import Random
from statistics import median
from threading import Timer
from typing import Any, NamedTuple

from campaigns.checks.audit import Log, verify_it
from campaigns.faults.children import Child, Tell
from campaigns.harness.campaign import Location, Run
from campaigns.workloads.load import make_nodes, open_store, write
from devtools.postgres import wait_until

MOST_BATCHES = 6
"""A worker writes for so many times as long, at most, as its first call takes."""

REOPENING_SECONDS = 1.0
"""Within that time the store is mostly open again, on a machine that has nothing else to do."""

PATIENCE_SECONDS = 60.0
"""Within that time all clients have stopped."""


class Blow(NamedTuple):
    """Something that happens to a worker, or to what it needs."""

    strike: Callable[[Worker], None]
    """Deals it."""
    mend: Callable[[], None] = lambda: None
    """Makes it possible to open the store again, when the worker is dead."""


def strike_again_and_again(run: Run, location: Location, blows: Iterable[Blow]) -> list[float]:
    """Have workers write to an empty database, deal each a blow, and check what is left.

    Returns:
        The seconds that each of them took to open it.
    """
    asyncio.run(make_nodes(location))
    log, seed, errors = Log(run.counts), run.random.getrandbits(32), run.folder / "errors"
    seconds: list[float] = []
    with Child(breed, location, seed, errors=errors, bug=run.bug) as breeder:
        said = breeder.told()
        worker = Worker(run, said)
        try:
            seconds.append(worker.open())
            for blow in blows:
                worker.write(log, blow)
                blow.mend()
                worker = Worker(run, said)
                seconds.append(worker.open())
                log.check(run, location)
                run.done()
        except NotOpenError:
            run.wrong(f"the store cannot be opened: {breeder.complaint}")
            return seconds
        finally:
            worker.end()
    verify_it(run, location)
    return seconds


def judge_openings(run: Run, seconds: Sequence[float]) -> None:
    """Note how long the store took to open, and check that it was mostly fast."""
    if not seconds:  # it could never be opened, which was found before
        return
    usual = median(seconds)
    run.notes["median reopening"] = f"{usual:.2f} s"
    run.notes["slowest reopening"] = f"{max(seconds):.2f} s"
    is_fast = run.is_quick or usual < REOPENING_SECONDS
    run.check(is_fast, f"opening took {usual:.2f} s in the median")


class NotOpenError(Exception):
    """A worker has died of opening the store."""


class Worker:
    """A process that opens the store when it is told to, and then writes when it is told to.

    Args:
        said: What it says, and those after it.
    """

    def __init__(self, run: Run, said: Iterator[Any]) -> None:
        self._run, self._said = run, said
        [self._pid] = next(said)

    def kill(self) -> None:
        """Kill it, if it lives; there will be another one."""
        with suppress(ProcessLookupError):
            os.kill(self._pid, signal.SIGKILL)

    def stop(self) -> None:
        """Have it stand still: it says nothing from then on."""
        with suppress(ProcessLookupError, FileNotFoundError):
            os.kill(self._pid, signal.SIGSTOP)
            state = Path(f"/proc/{self._pid}/stat")
            wait_until(
                lambda: state.read_text().rpartition(")")[2].split()[0] in "TZ",
                "a worker stands still",
            )

    def end(self) -> None:
        """End it, and wait until it is gone; it was the last one."""
        with suppress(ProcessLookupError):
            os.kill(self._pid, signal.SIGTERM)
        for _ in self._said:
            pass

    def open(self) -> float:
        """Have it open the store; returns the seconds that this took.

        Raises:
            NotOpenError: If it cannot.
        """
        os.kill(self._pid, signal.SIGUSR1)
        [seconds] = next(self._said)
        if seconds == "dead":
            raise NotOpenError
        return float(seconds)

    def write(self, log: Log, blow: Blow) -> None:
        """Have its clients write, until they are dealt a blow and the worker is dead."""
        batches = self._run.random.uniform(0, MOST_BATCHES)
        striking: Timer | None = None
        patience = Timer(PATIENCE_SECONDS, self.kill)
        patience.start()
        began = time.monotonic()
        os.kill(self._pid, signal.SIGUSR1)
        try:
            for said in self._said:
                if said == ["dead"]:
                    break
                if said == ["stopped"]:
                    self.kill()
                log.note(said)
                if said[0] == "returned" and striking is None:
                    striking = Timer(batches * (time.monotonic() - began), blow.strike, [self])
                    striking.start()
            self._run.check(patience.is_alive(), "calls have no answer within a minute")
        finally:
            patience.cancel()
            if striking is not None:
                striking.join()
        self._run.check(striking is not None, "not a single call has returned")


def breed(tell: Tell, location: str, seed: int) -> None:
    """Have a worker, and when it is dead another one, which has nothing left to import."""
    import_module("asyncpg" if "://" in location else "aiosqlite")
    random = Random(seed)
    for generation in count():
        seed = random.getrandbits(32)
        worker = os.fork()
        if not worker:
            asyncio.run(work(tell, location, generation, seed))
            return
        _, status = os.waitpid(worker, 0)
        tell("dead")
        if os.waitstatus_to_exitcode(status) != -signal.SIGKILL:  # it failed, or was the last one
            return


async def work(tell: Tell, location: str, generation: int, seed: int) -> None:
    """Be a worker; when all clients have stopped, wait to be killed."""
    signalled = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGUSR1, signalled.set)
    tell(os.getpid())
    await signalled.wait()
    signalled.clear()
    began = time.monotonic()
    store = open_store(location)
    await store.initialize()
    tell(time.monotonic() - began)
    await signalled.wait()
    await write(store, tell, generation, seed)
    tell("stopped")
    await asyncio.Event().wait()
