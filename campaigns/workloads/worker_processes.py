"""Processes with workers, which a supervisor forks again and again, and the records of handlers."""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import pairwise
from random import Random
from threading import Lock
from typing import Any

from campaigns.faults.children import Send
from openclaw_store import (
    Backoff,
    Database,
    NodeInfo,
    Run,
    StateManager,
    Task,
    TaskRepository,
    Worker,
)

SLOTS = 4
"""Tasks that a worker runs at a time."""

LEASE_SECONDS = 3.0
"""Lease of a worker."""

STEP_SECONDS = 0.005
"""Pause after each step of a handler."""

BACKOFF = Backoff(first_seconds=0.01, longest_seconds=0.1)
"""Delay of a task that failed or was lost: with the usual one, the last tasks take minutes."""

GRACES = (0.0, 0.05, 1.0)
"""Seconds that a stopped worker gives its handlers."""


def supervise(send: Send, location: str, workers: int, seed: int) -> None:
    """Fork a process for each worker, and another one after its end, until SIGTERM."""
    asyncio.run(_warm_up())
    running: dict[int, int] = {}
    is_ending = False

    def end(*_: object) -> None:
        nonlocal is_ending
        is_ending = True
        for pid in running:
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGTERM)
                os.kill(pid, signal.SIGCONT)

    signal.signal(signal.SIGTERM, end)
    random = Random(seed)
    while running or not is_ending:
        for number in set(range(workers)) - {*running.values()}:
            if is_ending:
                break
            seed = random.getrandbits(32)
            signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGTERM])  # until it is in `running`
            pid = os.fork()
            if pid == 0:
                signal.signal(signal.SIGTERM, signal.SIG_DFL)
                signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGTERM])
                asyncio.run(_work(send, location, number, Random(seed)))
                sys.exit(0)
            running[pid] = number
            send("forked", number, pid)
            signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGTERM])
        with suppress(ChildProcessError):
            pid, status = os.wait()
            del running[pid]
            send("ended", pid, os.waitstatus_to_exitcode(status), time.monotonic())


async def _warm_up() -> None:
    async with Database(":memory:") as database:
        await TaskRepository(database).count_by_status()


async def _work(send: Send, location: str, number: int, random: Random) -> None:
    logging.getLogger("openclaw_store").setLevel(logging.ERROR)
    pid = os.getpid()

    async def handle(task: Task, run: Run) -> int:
        key = [task.task_id, task.attempt]
        send("began", pid, *key, time.monotonic())
        try:
            wanted: dict[str, Any] = task.parameters
            for step in range(wanted["steps"]):
                run.progress(step / wanted["steps"], "working")
                await asyncio.sleep(STEP_SECONDS)
            if wanted["fails"] and task.attempt == 1:
                raise ValueError("the first attempt fails")
            return task.attempt
        finally:
            send("left", pid, *key, time.monotonic())

    node = NodeInfo(f"node-{number}", "host", max_concurrent_tasks=SLOTS)
    async with StateManager(Database(location), cache=False, backoff=BACKOFF) as state:
        await Worker(
            state,
            node,
            handle,
            lease_seconds=LEASE_SECONDS,
            grace_seconds=random.choice(GRACES),
            recover_every=0.5,
        ).run()


@dataclass
class Span:
    """The time in which a handler ran, by the monotonic clock of the machine."""

    task_id: str
    attempt: int
    pid: int
    began: float
    ended: float | None = None


@dataclass
class Records:
    """What the processes have sent; `note` is called on a thread."""

    spans: dict[tuple[str, int, int], Span] = field(default_factory=dict)
    """By task, attempt and process."""
    pids: dict[int, int] = field(default_factory=dict)
    """The living process of each worker."""
    ends: list[tuple[int, int]] = field(default_factory=list)
    """Process and exit status of each end."""
    pauses: list[tuple[int, float, float]] = field(default_factory=list)
    """Process, begin and end of each time for which a process was stopped."""
    repeated: list[str] = field(default_factory=list)
    """Attempts that began twice."""
    _lock: Lock = field(default_factory=Lock)

    def note(self, message: Sequence[Any]) -> None:
        what, *values = message
        with self._lock:
            match what:
                case "forked":
                    number, pid = values
                    self.pids[number] = pid
                case "began":
                    pid, id, attempt, at = values
                    if any(key[:2] == (id, attempt) for key in self._of(id, attempt)):
                        self.repeated.append(f"attempt {attempt} of {id}")
                    self.spans[id, attempt, pid] = Span(id, attempt, pid, at)
                case "left":
                    pid, id, attempt, at = values
                    self.spans[id, attempt, pid].ended = at
                case "ended":
                    pid, code, at = values
                    self.ends.append((pid, code))
                    self.pids = {number: one for number, one in self.pids.items() if one != pid}
                    for span in self.spans.values():
                        if span.pid == pid and span.ended is None:
                            span.ended = at

    def _of(self, id: str, attempt: int) -> list[tuple[str, int, int]]:
        keys = [(id, attempt, pid) for pid in {*self.pids.values()}]
        return [key for key in keys if key in self.spans]

    def living(self) -> dict[int, int]:
        """Return the living process of each worker."""
        with self._lock:
            return dict(self.pids)

    def longest_overlap(self) -> tuple[float, str]:
        """Return the longest time for which a handler ran beside its successor, and its task.

        A handler of a process that was stopped counts from the moment at which it continued.
        """
        longest, of = 0.0, ""
        by_task: dict[str, list[Span]] = {}
        for span in self.spans.values():
            by_task.setdefault(span.task_id, []).append(span)
        for spans in by_task.values():
            spans.sort(key=lambda one: one.attempt)
            for before, after in pairwise(spans):
                since = after.began
                for pid, _, until in self.pauses:
                    if pid == before.pid and before.began <= until:
                        since = max(since, until)
                overlap = (before.ended or since) - since
                if overlap > longest:
                    longest, of = overlap, f"attempt {before.attempt} of {before.task_id}"
        return longest, of

    def most_at_once(self) -> int:
        """Return the largest number of handlers that one process ran at a time."""
        steps: dict[int, list[tuple[float, int]]] = {}
        for span in self.spans.values():
            if span.ended is not None:
                steps.setdefault(span.pid, []).extend([(span.began, 1), (span.ended, -1)])
        most = 0
        for changes in steps.values():
            running = 0
            for _, step in sorted(changes):
                running += step
                most = max(most, running)
        return most
