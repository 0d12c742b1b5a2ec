"""Jumps of the clock, forward and back, during heartbeats and tasks.

One process keeps nodes alive and runs tasks on them, another one requeues the tasks of lost nodes;
both use a clock that jumps by seconds, an hour, days or months. Each round one of the nodes dies.
Some rounds go through the hours in which New York changes its clocks, with times that have no zone.

The true state is recorded by a time that does not jump, and compared with the rows in SQLite: after
its next heartbeat, no living node is marked lost, and the heartbeat is stored; a dead node is
marked lost, and its tasks are requeued, within twice the time it is allowed; a task that waits for
a retry waits at most twice as long as configured; the times of each task are in order.
"""

from __future__ import annotations

import asyncio
import os
import sqlite3
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from campaigns.faults.planted_bugs import planted
from campaigns.harness.campaign import SQLITE, Campaign, Run, within
from openclaw_store import (
    Backoff,
    Database,
    NodeInfo,
    StateManager,
    Task,
    TaskType,
    verify,
)
from openclaw_store.errors import NotOwnerError

JUMPS = [
    sign * jump
    for jump in (
        timedelta(hours=1),
        timedelta(days=3),
        *(timedelta(seconds=one) for one in (0.3, 20, 70)),
    )
    for sign in (-1, 1)
]
"""The jumps, one after another."""

NEW_YORK = "America/New_York"

CHANGES = (
    datetime(2026, 3, 8, 7, tzinfo=UTC),  # 02:00 becomes 03:00
    datetime(2026, 11, 1, 6, tzinfo=UTC),  # 02:00 becomes 01:00
)
"""The times at which New York changes its clocks."""

TICK = timedelta(seconds=10)
"""Interval in which each node sends one heartbeat, and lost nodes are searched."""

TICKS = 20
"""Ticks of a round."""

PATIENCE_SECONDS = 40
"""Seconds for which a node may be silent."""

TIMEOUT_SECONDS = 60
"""Time limit of a task, in seconds, if it has one."""

BACKOFF = Backoff(first_seconds=15, longest_seconds=60)

NODES = 3

OUT_OF_ORDER = """
    SELECT task_id, submitted_at, scheduled_at, started_at, completed_at FROM tasks
    WHERE scheduled_at < submitted_at OR started_at < scheduled_at
    OR completed_at < coalesce(started_at, scheduled_at, submitted_at)"""
"""The tasks with times that are not in order."""


class JumpingClock:
    """A clock that can be set, with the true elapsed time beside it."""

    def __init__(self) -> None:
        self.true = timedelta()
        self.now = datetime(2026, 6, 1, tzinfo=UTC)
        self.jumped_at = timedelta(-1)
        """True time of the last jump."""

    def __call__(self) -> datetime:
        return self.now

    def tick(self) -> None:
        self.true += TICK
        self.now += TICK

    def set(self, now: datetime) -> None:
        self.now, self.jumped_at = now, self.true

    def local(self) -> datetime:
        """Return the result of `datetime.now()`: without a zone."""
        return datetime.fromtimestamp(self.now.timestamp())


@dataclass
class AssignedTask:
    """A task that is assigned to a node, and its true state."""

    task: Task
    since: timedelta
    hangs: bool


@dataclass
class TrueState:
    """The true state of the cluster."""

    alive: dict[str, list[AssignedTask]] = field(default_factory=dict)
    """Tasks of each living node."""
    died: dict[str, timedelta] = field(default_factory=dict)
    """Time of death of each node that is not marked lost yet."""
    failed: dict[str, timedelta] = field(default_factory=dict)
    """Time at which each task began to wait for its retry."""
    completed: set[str] = field(default_factory=set)
    tasks: int = 0
    nodes: int = 0
    cpu: float = 0.0


def perform(run: Run) -> None:
    """Make the clock jump once a round."""
    with run.location() as location, planted(run.bug):
        asyncio.run(jump(run, Path(location)))


async def jump(run: Run, path: Path) -> None:
    """Run two processes by a clock that jumps; a quarter of the rounds is New York's."""
    clock = JumpingClock()
    uri = f"file:{path}?mode=ro"
    async with (
        run.opened(StateManager(Database(path, clock=clock), None, backoff=BACKOFF)) as worker,
        run.opened(StateManager(Database(path, clock=clock), None, backoff=BACKOFF)) as coordinator,
    ):
        with closing(sqlite3.connect(uri, uri=True)) as past:
            cluster = Cluster(run, clock, worker, coordinator, past)
            for number in run.each_round():
                if number % 4 == 3:
                    with local_zone(NEW_YORK):
                        change = cluster.change_clocks(run.random.choice(CHANGES))
                        await within(change, "a round")
                else:
                    jumping = cluster.jump(JUMPS[(number - number // 4) % len(JUMPS)])
                    await within(jumping, "a round")
        found = await verify(worker.db)
        run.check(bool(found), f"verify says {[problem.text for problem in found.problems][:3]}")


@contextmanager
def local_zone(name: str) -> Iterator[None]:
    """Set the time zone of this process."""
    before = os.environ.get("TZ")
    try:
        os.environ["TZ"] = name
        time.tzset()
        yield
    finally:
        if before is None:
            del os.environ["TZ"]
        else:
            os.environ["TZ"] = before
        time.tzset()


class Cluster:
    """Nodes that run tasks, one process that works for them, and one for recovery."""

    def __init__(
        self,
        run: Run,
        clock: JumpingClock,
        worker: StateManager,
        coordinator: StateManager,
        past: sqlite3.Connection,
    ) -> None:
        self.run, self.clock, self.random = run, clock, run.random
        self.worker, self.coordinator = worker, coordinator
        self.past = past
        self.true_state = TrueState()
        self.is_naive = False
        """True if it uses times without a zone."""

    async def jump(self, by: timedelta) -> None:
        """Let the clock jump in the middle of a round."""
        at = self.random.randrange(2, 8)
        await self.run_round(at, self.clock.now + at * TICK + by, f"a jump of {by}")

    async def change_clocks(self, moment: datetime) -> None:
        """Go through the moment at which the local zone changes its clocks."""
        self.is_naive = True
        await self.run_round(1, moment - (TICKS // 2) * TICK, f"the change of {moment:%B}")
        self.is_naive = False

    async def run_round(self, at: int, now: datetime, what: str) -> None:
        """Perform a round, in which the clock is set to `now` at a tick."""
        while len(self.true_state.alive) < NODES:
            await self.join()
        dies_at = self.random.randrange(TICKS // 2)
        for tick in range(TICKS):
            self.clock.tick()
            if tick == at:
                self.clock.set(now)
            if tick == dies_at:
                node_id = self.random.choice(list(self.true_state.alive))
                del self.true_state.alive[node_id]
                self.true_state.died[node_id] = self.clock.true
            recovers_first = self.random.random() < 0.5
            if recovers_first:
                await self.recover(what, since_heartbeat=TICK)
            await self.send_heartbeats()
            if not recovers_first:
                await self.recover(what, since_heartbeat=timedelta())
            await self.work()
            self.check_nodes(what)
            self.check_waiting(what)
        self.check_tasks(what)

    async def join(self) -> None:
        self.true_state.nodes += 1
        node_id = f"node-{self.true_state.nodes}"
        await self.worker.register_node(NodeInfo(node_id, node_id, max_concurrent_tasks=3))
        self.run.counts.acknowledged += 1
        self.true_state.alive[node_id] = []

    async def send_heartbeats(self) -> None:
        """Send a heartbeat for each living node, and check that it is stored."""
        self.true_state.cpu = self.random.randrange(100)
        for node_id in self.true_state.alive:
            if self.is_naive and self.random.random() < 0.5:  # as in the specification
                node = await self.worker.node_repo.get(node_id)
                assert node is not None
                node.last_heartbeat, node.cpu_usage = self.clock.local(), self.true_state.cpu
                await self.worker.node_repo.update(node)
                await self.worker.refresh_from_database()
            if not await self.worker.update_heartbeat(node_id, cpu_usage=self.true_state.cpu):
                self.run.wrong(f"{node_id} is not known")
            self.run.counts.acknowledged += 1
        await self.worker.sync_to_database()
        self.check_heartbeats()

    async def recover(self, what: str, since_heartbeat: timedelta) -> None:
        """Requeue the tasks of lost nodes."""
        true_state, clock = self.true_state, self.clock
        recovery = await self.coordinator.recover(timeout_seconds=PATIENCE_SECONDS)
        self.run.counts.acknowledged += 1
        if clock.true - clock.jumped_at > since_heartbeat:
            lost = true_state.alive.keys() & set(recovery.offline_nodes)
            self.run.check(not lost, f"{lost} are marked lost though they live, after {what}")
        taken = {*recovery.requeued_tasks, *recovery.failed_tasks, *recovery.timed_out_tasks}
        for assigned in true_state.alive.values():
            for one in [one for one in assigned if one.task.task_id in taken]:
                assigned.remove(one)
                ran, limit = clock.true - one.since, one.task.timeout or 10**9
                is_wrong = one.since > clock.jumped_at and ran < timedelta(seconds=limit)
                self.run.check(
                    not is_wrong, f"{one.task.task_id} was taken from a node that lives after {ran}"
                )
        self.true_state.failed.update(dict.fromkeys(recovery.requeued_tasks, clock.true))
        await self.worker.refresh_from_database()

    async def work(self) -> None:
        """Let nodes start, complete or fail their tasks, and claim new ones."""
        true_state, clock, run = self.true_state, self.clock, self.run
        for _ in range(2):
            true_state.tasks += 1
            task = Task(
                f"task-{true_state.tasks}",
                TaskType.BATCH,
                "t",
                timeout=self.random.choice([None, TIMEOUT_SECONDS]),
                submitted_at=clock.local() if self.is_naive else clock.now,
                not_before=clock.local() if self.is_naive else None,
            )
            await self.worker.add_task(task)
            run.counts.acknowledged += 1
            run.check(task.submitted_at == clock.now, f"{clock.local()} became {task.submitted_at}")
        for node_id, assigned in true_state.alive.items():
            for one in list(assigned):
                await self.advance(one, assigned)
            for task in await self.worker.claim_tasks(node_id, limit=2):
                true_state.failed.pop(task.task_id, None)
                hangs = task.timeout is not None and self.random.random() < 0.4
                assigned.append(AssignedTask(task, clock.true, hangs))
            run.counts.acknowledged += 1

    async def advance(self, one: AssignedTask, assigned: list[AssignedTask]) -> None:
        """Let a task start, complete or fail."""
        run, id = self.run, one.task.task_id
        try:
            if one.task.started_at is None:
                one.task = await self.worker.start_task(one.task)
                one.since = self.clock.true
            elif one.hangs:
                limit = timedelta(seconds=2 * TIMEOUT_SECONDS) + 2 * TICK
                run.check(
                    self.clock.true - one.since <= limit, f"{id} hangs, and is never taken back"
                )
                return
            elif self.random.random() < 0.7:
                assigned.remove(one)
                await self.worker.complete_task(one.task)
                self.true_state.completed.add(id)
            else:
                assigned.remove(one)
                await self.worker.fail_task(one.task, "no")
                self.true_state.failed[id] = self.clock.true
            run.counts.acknowledged += 1
        except NotOwnerError as error:  # `recover` removes the tasks that it takes
            run.counts.refused += 1
            run.wrong(f"{id} was taken away, and `recover` did not report it: {error}")

    def rows(self, query: str, *parameters: object) -> list[tuple[Any, ...]]:
        """Query the file without the library."""
        return self.past.execute(query, parameters).fetchall()

    def check_heartbeats(self) -> None:
        """Check that living nodes are known to live, by their last heartbeats."""
        now = (self.clock.now - datetime(1970, 1, 1, tzinfo=UTC)) // timedelta(microseconds=1)
        nodes = self.rows("SELECT node_id, status, last_heartbeat, cpu_usage FROM nodes")
        for node_id, status, at, cpu in nodes:
            if node_id in self.true_state.alive:
                early = (at - now) / 1e6
                # A heartbeat from the last second before the clock went back may stay for so long.
                self.run.check(
                    status == "online"
                    and 0 <= early <= 1
                    and (early or cpu == self.true_state.cpu),
                    f"{node_id} has just sent a heartbeat, and is {status}, the last one {early} s",
                )

    def check_nodes(self, what: str) -> None:
        """Check that dead nodes are marked lost, and hold no task."""
        # Just before a node is silent for long enough, the clock may go back by twice that time.
        limit = timedelta(seconds=3 * PATIENCE_SECONDS) + TICK
        for node_id, died in list(self.true_state.died.items()):
            if self.clock.true - died > limit:
                del self.true_state.died[node_id]
                [(status,)] = self.rows("SELECT status FROM nodes WHERE node_id = ?", node_id)
                self.run.check(status == "offline", f"{node_id} has died and is {status}: {what}")
                assigned = self.rows(
                    "SELECT task_id FROM tasks WHERE status IN ('scheduled', 'running')"
                    " AND assigned_node = ?",
                    node_id,
                )
                self.run.check(not assigned, f"{node_id} has died and still has {assigned}: {what}")

    def check_waiting(self, what: str) -> None:
        """Check that failed tasks are tried again."""
        limit = timedelta(seconds=2 * BACKOFF.longest_seconds) + 2 * TICK
        now = self.clock.now.timestamp() * 1e6
        late = [id for id, at in self.true_state.failed.items() if self.clock.true - at > limit]
        for id in late:
            del self.true_state.failed[id]
            found = self.rows(
                "SELECT datetime(not_before / 1e6, 'unixepoch') FROM tasks WHERE status = 'pending'"
                " AND task_id = ? AND not_before > ?",
                id,
                now,
            )
            self.run.check(not found, f"{id} waits until {found} after {what}")

    def check_tasks(self, what: str) -> None:
        """Check that the times of all tasks are in order, and that completed tasks are stored."""
        wrong = self.rows(OUT_OF_ORDER)
        self.run.check(not wrong, f"the times of {wrong[:3]} are not in order after {what}")
        stored = {id for (id,) in self.rows("SELECT task_id FROM tasks WHERE status = 'completed'")}
        for id in self.true_state.completed - stored:
            self.run.lost(f"the completion of {id}")
        self.true_state.completed.clear()


CAMPAIGN = Campaign(
    name="clock",
    title="the clock jumps by an hour and by days, and New York changes its clocks",
    promises=("P1", "P4"),
    perform=perform,
    rounds=400,
    quick_rounds=4,
    unit="jumps",
    kinds=(SQLITE,),
    bugs={
        "heartbeats-from-the-future": "has just sent a heartbeat, and is",
        "times-as-the-clock-says": "are not in order",
    },
)
