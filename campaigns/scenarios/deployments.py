"""Eight workers, or three in the short form, are killed, stopped, terminated and drained at random.

A round is a task. Tasks are added while the workers run; some expire, exceed their timeout, or fail
at the first attempt, and some are cancelled, with and without a grace. These conditions must hold:

- Each task has one outcome, which its fields allow, and a completed one has the result of its last
  attempt. No task is FAILED: no fault costs a retry.
- A task is claimed by one worker at a time, and each attempt begins once. A handler whose task runs
  elsewhere has ended within a heartbeat, or when its stopped process continued.
- A process never runs more handlers than it has slots. One that is terminated ends with status 0.
- Afterwards the slots of the nodes equal the held tasks, and the library finds no problem.
"""

from __future__ import annotations

import asyncio
import os
import signal
import time
from collections.abc import Awaitable, Callable
from contextlib import suppress
from datetime import timedelta
from functools import partial
from random import Random
from typing import Any

from campaigns.checks.audit import verify_database
from campaigns.faults.children import Child
from campaigns.harness.campaign import Campaign, HangError, Location, Run
from campaigns.harness.direct_access import fetch
from campaigns.workloads.worker_processes import LEASE_SECONDS, SLOTS, Records, supervise
from openclaw_store import (
    ConflictError,
    Database,
    StateManager,
    StoreError,
    Task,
    TaskStatus,
    TaskType,
    utc_now,
)
from openclaw_store.domain.lifecycle import EXPIRED, OVERDUE
from openclaw_store.worker.lease import HEARTBEATS_PER_LEASE
from openclaw_store.worker.worker import CHECK_SECONDS

WORKERS, WORKERS_OF_A_SHORT_RUN = 8, 3

OPEN_TASKS = 300
"""Tasks that are unfinished at a time."""

BETWEEN_FAULTS = 1, 30
"""Fewest and most tasks that end between two faults, however slow the machine is."""

PAUSE_SECONDS = 0.0, 0.2
"""Shortest and longest pause after them."""

LONGEST_OVERLAP = LEASE_SECONDS / HEARTBEATS_PER_LEASE + CHECK_SECONDS + 1.0
"""Seconds that a handler may run beside its successor: a heartbeat, a look, and a busy machine."""

PATIENCE_SECONDS = 300.0
"""Seconds without the end of any task after which the workers count as hanging."""

_TASKS = "SELECT task_id, status, attempt, result, error, losses, retry_count FROM tasks"
_STEPS = """
    SELECT item_id, from_status, to_status FROM changes WHERE item = 'task' ORDER BY revision"""
_HELD = "SELECT count(*) FROM tasks WHERE status IN ('scheduled', 'running')"
_SLOTS = "SELECT coalesce(sum(running_tasks), 0) FROM nodes"
_FINISHED = ("completed", "failed", "cancelled", "timeout")


def perform(run: Run) -> None:
    """Run as many tasks as there are rounds, and check the database and the records."""
    with run.location() as location:
        records, story = Records(), _Story(run)
        seed, errors = run.random.getrandbits(32), run.folder / "errors"
        number = WORKERS_OF_A_SHORT_RUN if run.is_quick else WORKERS
        with Child(supervise, location, number, seed, errors=errors, bug=run.bug) as child:
            asyncio.run(story.tell(child, location, records))
            run.check(child.wait() == 0, f"the supervisor failed: {child.complaint}")
        _judge(run, location, records, story, child.complaint)
        verify_database(run, location)


class _Story:
    """The tasks and faults of a run."""

    def __init__(self, run: Run) -> None:
        self._run, self._random = run, run.random
        self.asked: set[str] = set()
        """Tasks that were to be cancelled."""
        self.tasks: dict[str, Task] = {}
        """The acknowledged tasks."""
        self.faults: dict[str, int] = {}
        self._finished = 0

    async def tell(self, child: Child, location: Location, records: Records) -> None:
        """Add the tasks, interrupt the workers, and end them after the last task."""

        def listen() -> None:
            for message in child.messages():
                records.note(message)

        async with StateManager(Database(location)) as state:
            listening = asyncio.create_task(asyncio.to_thread(listen))
            troubles = [
                asyncio.create_task(self._interrupt(state, records)),
                asyncio.create_task(self._cancel(state)),
            ]
            try:
                await self._submit(state, listening)
            finally:
                for one in troubles:
                    one.cancel()
                await asyncio.gather(*troubles, return_exceptions=True)
                _continue(records)
                child.signal(signal.SIGTERM)
                await listening
            for one in troubles:
                if not one.cancelled():
                    one.result()

    async def _submit(self, state: StateManager, listening: asyncio.Task[None]) -> None:
        rest, done, last = self._run.rounds, 0, time.monotonic()
        while done < self._run.rounds:
            stats = await state.get_task_stats()
            finished = sum(stats[name] for name in _FINISHED)
            self._finished = finished
            if finished > done:
                self._run.done(finished - done)
                done, last = finished, time.monotonic()
            if listening.done() or time.monotonic() - last > PATIENCE_SECONDS:
                raise HangError(f"{done} of {self._run.rounds} tasks are finished: {stats}")
            open_tasks = self._run.rounds - rest - finished
            tasks = [self._task() for _ in range(min(rest, OPEN_TASKS - open_tasks))]
            if tasks:
                outcomes = await state.add_tasks(tasks)
                self.tasks.update(
                    (task.task_id, task)
                    for task, error in zip(tasks, outcomes, strict=True)
                    if error is None
                )
                rest -= len(tasks)
            await asyncio.sleep(0.05)

    def _task(self) -> Task:
        random = self._random
        kind = random.random()
        return Task.create(
            TaskType.BATCH,
            "work",
            parameters={
                "steps": 250 if kind < 0.01 else random.choice([1, 2, 10]),
                "fails": 0.5 < kind < 0.52,
            },
            timeout=1 if kind < 0.003 else None,
            max_retries=1 if kind < 0.003 else 3,
            max_losses=None,
            expires_at=utc_now() + timedelta(seconds=random.uniform(0, 2)) if kind > 0.97 else None,
        )

    async def _cancel(self, state: StateManager) -> None:
        """Cancel two in a hundred tasks, some before they begin and some while they run."""
        seen = 0
        while True:
            await asyncio.sleep(0.02)
            new, seen = [*self.tasks][seen:], len(self.tasks)
            for id in new:
                if self._random.random() < 0.02:
                    await asyncio.sleep(self._random.uniform(0, 0.05))
                    self.asked.add(id)
                    with suppress(ConflictError):  # it is finished
                        await state.cancel_task(
                            id, "not wanted", self._random.choice([None, 0.2, 5])
                        )

    async def _interrupt(self, state: StateManager, records: Records) -> None:
        faults: dict[str, Callable[[int, int], Awaitable[None]]] = {
            "kills": _kill,
            "stops": partial(_stop, self._random, records),
            "terminations": _terminate,
            "drains": partial(_drain, self._random, state),
        }
        working: set[asyncio.Future[None]] = set()
        try:
            while True:
                until = self._finished + self._random.randint(*BETWEEN_FAULTS)
                while self._finished < until:  # noqa: ASYNC110 - the workers give no event
                    await asyncio.sleep(0.02)
                await asyncio.sleep(self._random.uniform(*PAUSE_SECONDS))
                living = records.living()
                if not living:
                    continue
                number = self._random.choice([*living])
                name = self._random.choice([*faults])
                self.faults[name] = self.faults.get(name, 0) + 1
                fault = asyncio.ensure_future(faults[name](number, living[number]))
                working.add(fault)
                for one in [one for one in working if one.done()]:
                    working.discard(one)
                    one.result()
        finally:
            await asyncio.gather(*working)
            for number in range(WORKERS):
                await state.resume_node(f"node-{number}")


async def _kill(_: int, pid: int) -> None:
    with suppress(ProcessLookupError):
        os.kill(pid, signal.SIGKILL)


async def _terminate(_: int, pid: int) -> None:
    with suppress(ProcessLookupError):
        os.kill(pid, signal.SIGTERM)


async def _stop(random: Random, records: Records, _: int, pid: int) -> None:
    with suppress(ProcessLookupError):
        began = time.monotonic()
        os.kill(pid, signal.SIGSTOP)
        try:
            await asyncio.sleep(random.choice([0.1, LEASE_SECONDS, 2 * LEASE_SECONDS]))
        finally:
            records.pauses.append((pid, began, time.monotonic()))
            os.kill(pid, signal.SIGCONT)


async def _drain(random: Random, state: StateManager, number: int, _: int) -> None:
    with suppress(StoreError):
        await state.drain_node(f"node-{number}", "by the campaign")
        await asyncio.sleep(random.uniform(0, 1))
        await state.resume_node(f"node-{number}")


def _continue(records: Records) -> None:
    """Let all stopped processes go on."""
    for pid in records.living().values():
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGCONT)


def _judge(run: Run, location: Location, records: Records, story: _Story, complaint: str) -> None:
    tasks, steps, [(held,)], [(slots,)] = fetch(location, _TASKS, _STEPS, _HELD, _SLOTS)
    run.counts.acknowledged = len(story.tasks)
    for id in story.tasks.keys() - {id for id, *_ in tasks}:
        run.lost(f"task {id}")
    begun = {(span.task_id, span.attempt) for span in records.spans.values()}
    for row in tasks:
        _judge_task(run, story, begun, *row)
    _judge_steps(run, steps)
    run.check(held == 0, f"{held} tasks are held after all workers have ended")
    run.check(int(slots) == held, f"{slots} slots are in use, and {held} tasks are held")
    for one in records.repeated:
        run.wrong(f"{one} began twice")
    # A process that was stopped while it opened the store finds that the time for that is over.
    stopped = {pid for pid, *_ in records.pauses} - {span.pid for span in records.spans.values()}
    for pid, code in records.ends:
        is_expected = code in (0, -signal.SIGKILL, -signal.SIGTERM)
        is_late = code == 1 and pid in stopped and "UnavailableError" in complaint
        run.check(is_expected or is_late, f"process {pid} ended with {code}: {complaint}")
    most = records.most_at_once()
    run.check(most <= SLOTS, f"a process ran {most} handlers at a time")
    longest, of = records.longest_overlap()
    run.notes.update({name: str(count) for name, count in sorted(story.faults.items())})
    run.notes["attempts"] = str(len(records.spans))
    run.notes["longest overlap"] = f"{longest:.2f} s"
    is_short = run.is_quick or longest <= LONGEST_OVERLAP
    run.check(is_short, f"{of} ran on for {longest:.2f} s after it was handed out again")


def _judge_task(
    run: Run,
    story: _Story,
    begun: set[tuple[str, int]],
    id: str,
    status: str,
    attempt: int,
    result: str | None,
    error: str | None,
    losses: int,
    retries: int,
) -> None:
    task, end = story.tasks.get(id), TaskStatus(status)
    if task is None:
        return
    wanted: dict[str, Any] = task.parameters
    match end:
        case TaskStatus.COMPLETED:
            run.check(str(result) == str(attempt), f"{id}: result {result} of attempt {attempt}")
            run.check((id, attempt) in begun, f"{id}: completed, but attempt {attempt} never began")
        case TaskStatus.CANCELLED:
            run.check(id in story.asked, f"{id}: cancelled without being asked")
        case TaskStatus.TIMEOUT:
            may_expire = error == EXPIRED and task.expires_at is not None
            may_be_late = error == OVERDUE and task.timeout is not None
            run.check(may_expire or may_be_late, f"{id}: TIMEOUT, {error}")
        case _:
            run.wrong(f"{id}: ended {status}, {error}")
    most = (1 if wanted["fails"] else 0) + (0 if task.timeout is None else task.max_retries + 1)
    run.check(retries <= most, f"{id}: {retries} retries, {losses} losses")


def _judge_steps(run: Run, steps: Any) -> None:
    """Check that each task is claimed only when it is pending, and finishes once."""
    present: dict[str, str | None] = {}
    for id, before, after in steps:
        known = present.get(id)
        run.check(before == known, f"{id}: {before} → {after}, but it was {known}")
        run.check(known not in _FINISHED, f"{id}: {known} → {after}")
        if after == "scheduled":
            run.check(known == "pending", f"{id}: claimed while it was {known}")
        present[id] = after
    for id, status in present.items():
        run.check(status in _FINISHED, f"{id}: {status} in the end")


CAMPAIGN = Campaign(
    name="workers",
    title="eight processes with workers are killed, stopped, terminated and drained",
    promises=("P1", "P2", "P4", "P7"),
    perform=perform,
    rounds=20_000,
    quick_rounds=40,
    unit="tasks",
    slow_bugs={"deaf-handlers": "after it was handed out again"},
)
