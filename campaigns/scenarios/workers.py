"""Worker processes with the clients of `load`, interrupted again and again."""

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

from campaigns.checks.audit import Log, verify_database
from campaigns.faults.children import Child, Send
from campaigns.harness.campaign import Location, Run
from campaigns.workloads.load import make_nodes, open_store, write
from devtools.postgres import wait_until

MOST_BATCHES = 6
"""Maximum time for which a worker writes, as a multiple of the duration of its first call."""

REOPENING_SECONDS = 1.0
"""Maximum seconds until the store is open again, in the median, on an idle machine."""

PATIENCE_SECONDS = 60.0
"""Seconds within which all clients must stop."""


class Interruption(NamedTuple):
    """An interruption of a worker, or of a resource that it needs."""

    interrupt: Callable[[Worker], None]
    """Interrupts it."""
    repair: Callable[[], None] = lambda: None
    """Makes it possible to open the store again, after the worker has died."""


def interrupt_repeatedly(
    run: Run, location: Location, interruptions: Iterable[Interruption]
) -> list[float]:
    """Let workers write to an empty database, interrupt each, and check the database.

    Returns:
        The seconds that each of them took to open it.
    """
    asyncio.run(make_nodes(location))
    log, seed, errors = Log(run.counts), run.random.getrandbits(32), run.folder / "errors"
    seconds: list[float] = []
    with Child(spawn, location, seed, errors=errors, bug=run.bug) as spawner:
        messages = spawner.messages()
        worker = Worker(run, messages)
        try:
            seconds.append(worker.open())
            for interruption in interruptions:
                worker.write(log, interruption)
                interruption.repair()
                worker = Worker(run, messages)
                seconds.append(worker.open())
                log.check(run, location)
                run.done()
        except NotOpenError:
            run.wrong(f"the store cannot be opened: {spawner.complaint}")
            return seconds
        finally:
            worker.end()
    verify_database(run, location)
    return seconds


def check_opening_times(run: Run, seconds: Sequence[float]) -> None:
    """Record the opening times of the store, and check that they were mostly short."""
    if not seconds:  # it was never open, which is reported already
        return
    usual = median(seconds)
    run.notes["median reopening"] = f"{usual:.2f} s"
    run.notes["slowest reopening"] = f"{max(seconds):.2f} s"
    is_fast = run.is_quick or usual < REOPENING_SECONDS
    run.check(is_fast, f"opening took {usual:.2f} s in the median")


class NotOpenError(Exception):
    """A worker has died while it opened the store."""


class Worker:
    """A process that opens the store on request, and then writes on request.

    Args:
        messages: Its messages, and those of its successors.
    """

    def __init__(self, run: Run, messages: Iterator[Any]) -> None:
        self._run, self._messages = run, messages
        [self._pid] = next(messages)

    def kill(self) -> None:
        """Kill the worker, if it lives; another one follows."""
        with suppress(ProcessLookupError):
            os.kill(self._pid, signal.SIGKILL)

    def stop(self) -> None:
        """Stop the worker: it sends nothing from then on."""
        with suppress(ProcessLookupError, FileNotFoundError):
            os.kill(self._pid, signal.SIGSTOP)
            # The signal is asynchronous: wait until the process is stopped (T) or dead (Z).
            state = Path(f"/proc/{self._pid}/stat")
            wait_until(
                lambda: state.read_text().rpartition(")")[2].split()[0] in "TZ",
                "a worker is stopped",
            )

    def end(self) -> None:
        """End the last worker, and wait until it is gone."""
        with suppress(ProcessLookupError):
            os.kill(self._pid, signal.SIGTERM)
        # The output ends with the spawner, which ends after its last worker.
        for _ in self._messages:
            pass

    def open(self) -> float:
        """Let the worker open the store, and return the seconds that this took.

        Raises:
            NotOpenError: If it cannot.
        """
        os.kill(self._pid, signal.SIGUSR1)
        [seconds] = next(self._messages)
        if seconds == "dead":
            raise NotOpenError
        return float(seconds)

    def write(self, log: Log, interruption: Interruption) -> None:
        """Let the clients write, until the interruption has come and the worker is dead."""
        # In units of the first call, so that the interruption falls into any of the first batches.
        batches = self._run.random.uniform(0, MOST_BATCHES)
        interrupting: Timer | None = None
        patience = Timer(PATIENCE_SECONDS, self.kill)
        patience.start()
        began = time.monotonic()
        os.kill(self._pid, signal.SIGUSR1)
        try:
            for message in self._messages:
                if message == ["dead"]:
                    break
                if message == ["stopped"]:
                    self.kill()
                log.note(message)
                if message[0] == "returned" and interrupting is None:
                    interrupting = Timer(
                        batches * (time.monotonic() - began), interruption.interrupt, [self]
                    )
                    interrupting.start()
            self._run.check(patience.is_alive(), "calls have no answer within a minute")
        finally:
            patience.cancel()
            if interrupting is not None:
                interrupting.join()
        self._run.check(interrupting is not None, "not a single call has returned")


def spawn(send: Send, location: str, seed: int) -> None:
    """Fork a worker, and after its death another one, without an import of its own."""
    import_module("asyncpg" if "://" in location else "aiosqlite")
    random = Random(seed)
    for generation in count():
        seed = random.getrandbits(32)
        worker = os.fork()
        if not worker:
            asyncio.run(work(send, location, generation, seed))
            return
        _, status = os.waitpid(worker, 0)
        send("dead")
        if (
            os.waitstatus_to_exitcode(status) != -signal.SIGKILL
        ):  # it has failed, or was the last one
            return


async def work(send: Send, location: str, generation: int, seed: int) -> None:
    """Run a worker; after all clients have stopped, wait for the kill."""
    signalled = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGUSR1, signalled.set)
    send(os.getpid())
    await signalled.wait()
    signalled.clear()
    began = time.monotonic()
    store = open_store(location)
    await store.initialize()
    send(time.monotonic() - began)
    await signalled.wait()
    await write(store, send, generation, seed)
    send("stopped")
    await asyncio.Event().wait()
