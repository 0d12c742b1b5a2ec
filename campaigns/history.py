"""Processes work on a few tasks at once, some are killed, and their answers must fit one history.

Four processes of four callers each read, write, claim, run, add and remove a few tasks, which are
replaced by others as time goes by. Every now and then one of the processes is killed, and another
one comes in its place. Each says what it asks, what it is answered, and when, by the one monotonic
clock of the machine. `evidence` tells what is checked; the search is that of `linearizability`.
"""

from __future__ import annotations

import asyncio
import signal
import time
from contextlib import ExitStack
from queue import SimpleQueue
from threading import Thread
from typing import Any

from campaigns.caller import work
from campaigns.campaign import Campaign, HangError, Location, Run
from campaigns.children import Child
from campaigns.evidence import Asked, Evidence, Life
from openclaw_store import Database, verify

PROCESSES, PROCESSES_OF_A_SHORT_RUN = 4, 2

CALLS_A_ROUND = 100

ROUNDS_BETWEEN_KILLS = (5, 15)


def perform(run: Run) -> None:
    """Have processes work and be killed, then look whether all they say fits together."""
    with run.location() as location:
        processes = _Processes(run, location)
        lives = processes.run()
        Evidence(run, location, lives).check()
        _verify(run, location)
    run.notes["kills"] = f"{sum(life.is_killed for life in lives):,}"


class _Processes:
    """Those that work, those that were killed, and what all of them tell."""

    def __init__(self, run: Run, location: Location) -> None:
        self._run, self._location = run, location
        self._errors = run.folder / "errors"
        self._lives: list[Life] = []
        self._children: list[Child] = []
        self._messages: SimpleQueue[tuple[int, list[Any] | HangError | None]] = SimpleQueue()
        self._wanted = run.rounds * CALLS_A_ROUND
        self._answered = 0
        # Of a short run, one process is killed.
        self._next_kill = self._wanted // 3 if run.is_quick else self._draw()
        self._ending: set[int] = set()

    def run(self) -> list[Life]:
        """Have them work; returns all that there were."""
        with ExitStack() as stack:
            working = PROCESSES_OF_A_SHORT_RUN if self._run.is_quick else PROCESSES
            for number in range(working):
                self._begin(stack, f"node-{number}", 0)
            while working:
                number, message = self._messages.get()
                if isinstance(message, HangError):
                    raise message
                if message is not None:
                    self._take(number, message)
                elif self._is_replaced(number):
                    life = self._lives[number]
                    self._begin(stack, life.node, self._watched_by(life.node))
                else:
                    working -= 1
        noise = self._errors.read_text()
        self._run.check(not noise, f"the processes have complained: {noise[-2000:]}")
        return self._lives

    def _begin(self, stack: ExitStack, node: str, since: int) -> None:
        number = len(self._lives)
        arguments = (self._location, node, number, self._run.seed, since)
        child = Child(work, *arguments, errors=self._errors, bug=self._run.bug)
        self._children.append(stack.enter_context(child))
        self._lives.append(Life(node))

        def listen() -> None:
            try:
                for message in child.told():
                    self._messages.put((number, message))
            except HangError as hang:
                self._messages.put((number, hang))
            else:
                self._messages.put((number, None))

        Thread(target=listen, daemon=True).start()

    def _take(self, number: int, message: list[Any]) -> None:
        """Take note of what a process tells; kill it, or have it end, if it is time to."""
        life, child = self._lives[number], self._children[number]
        match message:
            case ["asked", call, moment, name, task_id, arguments]:
                life.asked[call] = Asked(number, name, task_id, arguments, moment)
            case ["answered", call, moment, answer]:
                life.asked[call].returned, life.asked[call].answer = moment, answer
                self._answered += 1
                if self._answered <= self._wanted and self._answered % CALLS_A_ROUND == 0:
                    self._run.done()
            case ["watched", changes]:
                life.watched += changes
        if life.is_killed:
            return
        if self._answered >= self._wanted:
            if number not in self._ending:
                self._ending.add(number)
                child.signal(signal.SIGTERM)
        elif self._answered >= self._next_kill:
            life.is_killed = True
            child.kill()
            self._next_kill += self._wanted if self._run.is_quick else self._draw()

    def _draw(self) -> int:
        """Calls until the next kill."""
        return CALLS_A_ROUND * self._run.random.randint(*ROUNDS_BETWEEN_KILLS)

    def _is_replaced(self, number: int) -> bool:
        """Whether another process is to come in the place of one that has ended."""
        life = self._lives[number]
        life.ended = time.monotonic_ns()
        status = self._children[number].wait()
        expected = -signal.SIGKILL if life.is_killed else 0
        self._run.check(status == expected, f"a process has ended with {status}")
        return life.is_killed and self._answered < self._wanted

    def _watched_by(self, node: str) -> int:
        """The last revision that the watchers of a node have told of."""
        watched = [change for life in self._lives if life.node == node for change in life.watched]
        return int(watched[-1][0]) if watched else 0


def _verify(run: Run, location: Location) -> None:
    async def look() -> None:
        async with Database(location) as database:
            for problem in (await verify(database)).problems:
                run.wrong(f"verify: {problem.text}")

    asyncio.run(look())


CAMPAIGN = Campaign(
    name="history",
    title="processes work on the same tasks and are killed: their answers fit one history",
    promises=("P1", "P3", "P4", "P5", "P6"),
    perform=perform,
    rounds=1000,
    quick_rounds=5,
    unit="hundreds of calls",
    bugs={
        "no-version-in-where": "no order explains update",
        "claimed-twice": "no order explains claim",
        "watch-ahead": "the watcher of",
    },
)
