"""Several processes on the same few tasks, some of them killed: all answers must fit one history.

Four processes of four callers each read, write, claim, run, add and remove a few tasks, which are
replaced over time; in the long form, a fifth one only reads its memory. From time to time a process
is killed and replaced. Each records its calls, their answers and times, by the one monotonic clock
of the machine. `evidence` lists the checks, and `linearizability` has the search.
"""

from __future__ import annotations

import signal
import time
from contextlib import ExitStack
from queue import SimpleQueue
from threading import Thread
from typing import Any

from campaigns.checks.audit import verify_database
from campaigns.checks.evidence import Evidence, Process, RecordedCall
from campaigns.faults.children import Child
from campaigns.harness.campaign import Campaign, HangError, Location, Run
from campaigns.workloads.caller import READER, work

PROCESSES, PROCESSES_OF_A_SHORT_RUN = 4, 2

CALLS_A_ROUND = 100

ROUNDS_BETWEEN_KILLS = (5, 15)


def perform(run: Run) -> None:
    """Let processes work, kill some, then check all their records together."""
    with run.location() as location:
        processes = _Processes(run, location).run()
        Evidence(run, location, processes).check()
        verify_database(run, location)
    run.notes["kills"] = f"{sum(process.is_killed for process in processes):,}"


class _Processes:
    """The running and the killed processes, and all their messages."""

    def __init__(self, run: Run, location: Location) -> None:
        self._run, self._location = run, location
        self._errors = run.folder / "errors"
        self._processes: list[Process] = []
        self._children: list[Child] = []
        self._messages: SimpleQueue[tuple[int, list[Any] | HangError | None]] = SimpleQueue()
        self._wanted = run.rounds * CALLS_A_ROUND
        self._answered = 0
        # A short run kills one process.
        self._next_kill = self._wanted // 3 if run.is_quick else self._draw()
        self._ending: set[int] = set()

    def run(self) -> list[Process]:
        """Let them work, and return all of them."""
        with ExitStack() as stack:
            number = PROCESSES_OF_A_SHORT_RUN if self._run.is_quick else PROCESSES
            nodes = [f"node-{place}" for place in range(number)]
            if not self._run.is_quick:
                nodes.append(READER)
            for node in nodes:
                self._begin(stack, node, 0)
            working = len(nodes)
            while working:
                number, message = self._messages.get()
                if isinstance(message, HangError):
                    raise message
                if message is not None:
                    self._take(number, message)
                elif self._is_replaced(number):
                    process = self._processes[number]
                    self._begin(stack, process.node, self._watched_by(process.node))
                else:
                    working -= 1
        complaint = self._children[-1].complaint  # all of them share one file
        self._run.check(
            not complaint, f"the processes have written to their error output: {complaint}"
        )
        return self._processes

    def _begin(self, stack: ExitStack, node: str, since: int) -> None:
        number = len(self._processes)
        arguments = (self._location, node, number, self._run.seed, since)
        child = Child(work, *arguments, errors=self._errors, bug=self._run.bug)
        self._children.append(stack.enter_context(child))
        self._processes.append(Process(node))

        def listen() -> None:
            try:
                for message in child.messages():
                    self._messages.put((number, message))
            except HangError as hang:
                self._messages.put((number, hang))
            else:
                self._messages.put((number, None))

        Thread(target=listen, daemon=True).start()

    def _take(self, number: int, message: list[Any]) -> None:
        """Record a message of a process; kill it, or end it, when it is due."""
        process, child = self._processes[number], self._children[number]
        match message:
            case ["calls", call, moment, name, task_id, arguments]:
                process.calls[call] = RecordedCall(number, name, task_id, arguments, moment)
            case ["answered", call, moment, answer]:
                process.calls[call].returned, process.calls[call].answer = moment, answer
                self._answered += 1
                if self._answered <= self._wanted and self._answered % CALLS_A_ROUND == 0:
                    self._run.done()
            case ["delayed", due, now]:
                process.delays.append((due, now))
            case ["watched", changes]:
                process.watched += changes
        # Its last messages were sent before the kill, and count.
        if process.is_killed:
            return
        if self._answered >= self._wanted:
            if number not in self._ending:
                self._ending.add(number)
                child.signal(signal.SIGTERM)
        elif self._answered >= self._next_kill:
            process.is_killed = True
            child.kill()
            self._next_kill += self._wanted if self._run.is_quick else self._draw()

    def _draw(self) -> int:
        """Return the number of calls until the next kill."""
        return CALLS_A_ROUND * self._run.random.randint(*ROUNDS_BETWEEN_KILLS)

    def _is_replaced(self, number: int) -> bool:
        """Return true if another process replaces an ended one."""
        process = self._processes[number]
        # An upper bound: its output has ended, so all its calls are before this time.
        process.ended = time.monotonic_ns()
        status = self._children[number].wait()
        expected = -signal.SIGKILL if process.is_killed else 0
        self._run.check(status == expected, f"a process has ended with {status}")
        return process.is_killed and self._answered < self._wanted

    def _watched_by(self, node: str) -> int:
        """Return the last revision that the watchers of a node have sent."""
        of_node = [process for process in self._processes if process.node == node]
        watched = [change for process in of_node for change in process.watched]
        return int(watched[-1][0]) if watched else 0


CAMPAIGN = Campaign(
    name="history",
    title="processes on the same tasks are killed: all answers must fit one history",
    promises=("P1", "P3", "P4", "P5", "P6"),
    perform=perform,
    rounds=1000,
    quick_rounds=5,
    unit="× 100 calls",
    bugs={
        "no-version-in-where": "name='update'",
        "claimed-twice": "though it was scheduled",
        "watch-ahead": "the watcher of",
    },
    slow_bugs={"late-wake-ups": "reads from memory are"},
)
