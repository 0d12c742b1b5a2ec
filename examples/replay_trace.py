"""Replay a cluster's accounting log through a `StateManager`, as fast as it can.

Run it as `python examples/replay_trace.py TRACE`. The trace is a log in the Standard Workload
Format, plain or gzipped, such as the logs from the Parallel Workloads Archive (collected by Dror
Feitelson, given by the sites that recorded them). Each job becomes one task that takes one place
on one node, with the job's own times, user, processors and application.

Simulated time, which is the store's time too, moves on in windows of six hours. Within a window
every job has a coroutine of its own, which goes through the job's steps in their order, so that
many callers write at once; the next window begins when all of this one is committed. The log's
times are real ones, so a job that started there may not be kept waiting here: the nodes get as
many places as the busiest window needs, if each of its jobs kept one throughout.

In the end the database is opened anew, and what is in it is compared with the log.
"""

import argparse
import asyncio
import gzip
import math
import sys
import zlib
from collections import Counter, defaultdict
from collections.abc import Awaitable, Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from enum import IntEnum
from itertools import islice
from pathlib import Path
from tempfile import TemporaryDirectory
from time import perf_counter
from typing import TypeVar

from rich import box
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.progress_bar import ProgressBar
from rich.table import Table

from openclaw_store import (
    Database,
    NodeInfo,
    StateManager,
    StoreError,
    Task,
    TaskStatus,
    TaskType,
)

T = TypeVar("T")

HOUR = timedelta(hours=1)
WINDOW = 6 * HOUR
OUTCOMES = {0: TaskStatus.FAILED, 5: TaskStatus.CANCELLED}
"""What a job's status means; any other one, and the unknown one, is taken for completed."""
PARTIAL = (2, 3, 4)
"""Status of a line on one part of a job, which has a line on the whole of it as well."""


class Step(IntEnum):
    """What happens to a job, in this order."""

    SUBMIT = 1
    START = 2
    FINISH = 3


class ReplayError(Exception):
    """The replay cannot be done; the text says why."""


class TraceError(ReplayError):
    """The log cannot be read; the text names the line."""


@dataclass(frozen=True, slots=True)
class Job:
    """What one line of the log says; the format's -1, unknown, is `None` here."""

    number: int
    status: TaskStatus
    submitted_at: datetime
    started_at: datetime | None
    """`None` if it was cancelled before it ran."""
    completed_at: datetime
    user: str | None
    processors: int | None
    application: int | None
    is_interactive: bool

    @property
    def task_id(self) -> str:
        return f"job-{self.number}"

    @property
    def parameters(self) -> dict[str, int | None]:
        return {"processors": self.processors, "application": self.application}

    @property
    def run_seconds(self) -> float:
        return (self.completed_at - (self.started_at or self.completed_at)).total_seconds()


def read_trace(path: Path) -> Iterator[Job]:
    """The jobs of a log, in its order.

    Raises:
        TraceError: If the file or one of its lines cannot be read.
    """
    epoch = datetime.fromtimestamp(0, UTC)
    line_of_job: dict[int, int] = {}
    number = 0
    opened = gzip.open if path.suffix == ".gz" else open
    try:
        with opened(path, "rt", encoding="utf-8", errors="replace") as lines:
            for number, line in enumerate(lines, start=1):
                if line.startswith(";"):
                    name, _, value = line.strip("; \n").partition(":")
                    if name == "UnixStartTime":
                        epoch = datetime.fromtimestamp(int(value), UTC)
                elif line.strip() and (job := parse_job(line, epoch)):
                    if (first := line_of_job.setdefault(job.number, number)) != number:
                        raise ValueError(f"job {job.number} is on line {first} already")
                    yield job
    except (ValueError, OverflowError) as error:
        raise TraceError(f"{path}: line {number}: {error}") from error
    except (OSError, EOFError, zlib.error) as error:
        raise TraceError(f"{path}: after line {number}: {error}") from error


def parse_job(line: str, epoch: datetime) -> Job | None:
    """The job of one line, or `None` if the line is about a part of a job.

    A wait or run time that is not known counts as 0.
    """
    texts = line.split()
    if len(texts) != 18:
        raise ValueError(f"{len(texts)} fields instead of 18")
    fields = [float(text) for text in texts]  # some logs have fractions
    number, code, user, application = (int(fields[i]) for i in (0, 10, 11, 13))
    if code in PARTIAL:
        return None
    status = OUTCOMES.get(code, TaskStatus.COMPLETED)
    submit, wait, run = fields[1], max(fields[2], 0), max(fields[3], 0)
    if submit < 0:
        raise ValueError(f"job {number} has no submit time")
    start = epoch + timedelta(seconds=submit + wait)
    processors = int(fields[4] if fields[4] > 0 else fields[7])
    return Job(
        number=number,
        status=status,
        submitted_at=epoch + timedelta(seconds=submit),
        started_at=None if status is TaskStatus.CANCELLED and run == 0 else start,
        completed_at=start + timedelta(seconds=run),
        user=f"user-{user}" if user >= 0 else None,
        processors=processors if processors > 0 else None,
        application=application if application >= 0 else None,
        is_interactive=fields[14] == 0,  # by the format's convention for queues
    )


class SimulatedClock:
    """The store's clock: it moves on from hour to hour as the replay does."""

    def __init__(self, now: datetime) -> None:
        self.now = now

    def __call__(self) -> datetime:
        return self.now


class Replay:
    """Drives a `StateManager` through a log, and times every call."""

    def __init__(self, store: StateManager, clock: SimulatedClock, jobs: Sequence[Job]) -> None:
        self.store = store
        self.clock = clock
        self.jobs = jobs
        self.latencies: defaultdict[str, list[float]] = defaultdict(list)
        self.peak_in_flight = 0
        self._in_flight = 0
        self._node_of: dict[int, str] = {}
        self._free: list[str] = []
        """The nodes that had a free place when the window began."""
        self._promised: Counter[str] = Counter()
        """Places taken on each node, those included that the store is still writing down."""

    async def run(self, progress: Progress) -> None:
        bar = progress.add_task("", total=len(self.jobs))
        for due in by_window(self.jobs, self.clock.now):
            free = await self._timed("get_available_nodes", self.store.get_available_nodes())
            self._free = [node.node_id for node in free]
            async with asyncio.TaskGroup() as callers:
                for job, steps in due:
                    callers.create_task(self._advance(job, steps))
                for _ in range(WINDOW // HOUR):
                    self.clock.now += HOUR
                    for node_id in self._promised:
                        await self._heartbeat(node_id)
            finished = sum(Step.FINISH in steps for _, steps in due)
            progress.update(bar, advance=finished, description=f"{self.clock.now:%Y-%m-%d %H:%M}")

    async def register_nodes(self, count: int) -> int:
        """Add the nodes; the number of places that each of them got."""
        places = math.ceil(busiest_window(self.jobs, self.clock.now) / count)
        async with asyncio.TaskGroup() as callers:
            for number in range(1, count + 1):
                node = NodeInfo(
                    node_id=f"node-{number:03}",
                    hostname=f"node-{number:03}",
                    max_concurrent_tasks=places,
                    registered_at=self.clock.now,
                    last_heartbeat=self.clock.now,
                )
                self._promised[node.node_id] = 0
                callers.create_task(self._timed("add_node", self.store.add_node(node)))
        return places

    async def _advance(self, job: Job, steps: Sequence[Step]) -> None:
        for step in steps:
            match step:
                case Step.SUBMIT:
                    await self._submit(job)
                case Step.START:
                    await self._start(job)
                case Step.FINISH:
                    await self._finish(job)

    async def _submit(self, job: Job) -> None:
        task = Task(
            task_id=job.task_id,
            task_type=TaskType.INTERACTIVE if job.is_interactive else TaskType.BATCH,
            name=f"job {job.number}",
            user_id=job.user,
            parameters=job.parameters,
            submitted_at=job.submitted_at,
        )
        await self._timed("add_task", self.store.add_task(task))

    async def _start(self, job: Job) -> None:
        def schedule(task: Task) -> None:
            task.status = TaskStatus.SCHEDULED
            task.assigned_node = node_id
            task.scheduled_at = job.started_at

        def take_place(node: NodeInfo) -> None:
            node.running_tasks += 1

        def start(task: Task) -> None:
            task.status = TaskStatus.RUNNING
            task.started_at = job.started_at

        node_id = min(self._free, key=self._promised.__getitem__)
        self._promised[node_id] += 1
        self._node_of[job.number] = node_id
        task_id = job.task_id
        await self._timed("change_task: schedule", self.store.change_task(task_id, schedule))
        await self._timed("change_node: take a place", self.store.change_node(node_id, take_place))
        await self._timed("change_task: start", self.store.change_task(task_id, start))
        await self._heartbeat(node_id)

    async def _finish(self, job: Job) -> None:
        def finish(task: Task) -> None:
            task.status = job.status
            task.completed_at = job.completed_at

        def leave_place(node: NodeInfo) -> None:
            node.running_tasks -= 1
            node.total_tasks_processed += 1
            node.successful_tasks += job.status is TaskStatus.COMPLETED
            node.failed_tasks += job.status is TaskStatus.FAILED
            surplus = job.run_seconds - node.average_execution_time
            node.average_execution_time += surplus / node.total_tasks_processed

        await self._timed("change_task: finish", self.store.change_task(job.task_id, finish))
        if node_id := self._node_of.pop(job.number, None):
            await self._timed(
                "change_node: leave a place", self.store.change_node(node_id, leave_place)
            )
            self._promised[node_id] -= 1
            await self._heartbeat(node_id)

    async def _heartbeat(self, node_id: str) -> None:
        await self._timed("update_heartbeat", self.store.update_heartbeat(node_id))

    async def _timed(self, kind: str, call: Awaitable[T]) -> T:
        self._in_flight += 1
        self.peak_in_flight = max(self.peak_in_flight, self._in_flight)
        began = perf_counter()
        try:
            return await call
        finally:
            self.latencies[kind].append(perf_counter() - began)
            self._in_flight -= 1


def by_window(jobs: Sequence[Job], start: datetime) -> Iterator[list[tuple[Job, list[Step]]]]:
    """For each window from `start` to the last event, its jobs and their steps in it."""
    events = [(job.submitted_at, index, Step.SUBMIT) for index, job in enumerate(jobs)]
    events += [(job.started_at, i, Step.START) for i, job in enumerate(jobs) if job.started_at]
    events += [(job.completed_at, index, Step.FINISH) for index, job in enumerate(jobs)]
    events.sort(reverse=True)
    while events:
        start += WINDOW
        due: defaultdict[int, list[Step]] = defaultdict(list)
        while events and events[-1][0] < start:
            _, index, step = events.pop()
            due[index].append(step)
        yield [(jobs[index], steps) for index, steps in due.items()]


def busiest_window(jobs: Sequence[Job], start: datetime) -> int:
    """The most jobs that hold a place in one window, if each of them does so throughout."""
    running = busiest = 0
    for due in by_window([job for job in jobs if job.started_at], start):
        running += sum(Step.START in steps for _, steps in due)
        busiest = max(busiest, running)
        running -= sum(Step.FINISH in steps for _, steps in due)
    return max(busiest, 1)


@dataclass(frozen=True)
class Claim:
    """Something that must hold for all of `total` things, and what was found."""

    text: str
    holds_for: int
    total: int


def proof(
    jobs: Sequence[Job], tasks: Sequence[Task], nodes: Sequence[NodeInfo]
) -> tuple[Claim, ...]:
    """Compares what the database holds with the log."""
    stored = {task.task_id: task for task in tasks}
    found = [(job, stored[job.task_id]) for job in jobs if job.task_id in stored]
    seconds: defaultdict[str | None, list[float]] = defaultdict(list)
    successes: Counter[str | None] = Counter()
    failures: Counter[str | None] = Counter()
    for job, task in found:
        if job.started_at is not None:
            seconds[task.assigned_node].append(job.run_seconds)
            successes[task.assigned_node] += job.status is TaskStatus.COMPLETED
            failures[task.assigned_node] += job.status is TaskStatus.FAILED

    def has_its_facts(job: Job, task: Task) -> bool:
        return (
            (task.submitted_at, task.scheduled_at) == (job.submitted_at, job.started_at)
            and (task.started_at, task.completed_at) == (job.started_at, job.completed_at)
            and (task.user_id, task.parameters) == (job.user, job.parameters)
        )

    def adds_up(node: NodeInfo) -> bool:
        of_node = seconds[node.node_id]
        return (
            (node.running_tasks, node.total_tasks_processed) == (0, len(of_node))
            and node.successful_tasks == successes[node.node_id]
            and node.failed_tasks == failures[node.node_id]
            and math.isclose(
                node.average_execution_time, sum(of_node) / max(len(of_node), 1), abs_tol=1e-6
            )
        )

    processed = sum(node.total_tasks_processed for node in nodes)
    return (
        Claim("jobs of the log are in the database", len(found), len(jobs)),
        Claim("tasks in the database are jobs of the log", len(found), len(tasks)),
        Claim(
            "jobs are finished, with the log's outcome",
            sum(task.status is job.status for job, task in found),
            len(jobs),
        ),
        Claim(
            "jobs have the log's times, user and parameters",
            sum(has_its_facts(job, task) for job, task in found),
            len(jobs),
        ),
        Claim("nodes have counters that add up to that", sum(map(adds_up, nodes)), len(nodes)),
        Claim(
            "jobs that ran were counted by a node",
            processed,
            sum(job.started_at is not None for job in jobs),
        ),
    )


def print_summary(
    console: Console, replay: Replay, seconds: float, places: str, bytes_per_task: float
) -> None:
    """Print how fast the replay was, and what the log has to say."""
    jobs = replay.jobs
    calls = {kind: len(latencies) for kind, latencies in replay.latencies.items()}
    writes = sum(calls.values()) - calls["update_heartbeat"] - calls["get_available_nodes"]
    waiting = sum(map(sum, replay.latencies.values())) / seconds
    days = (replay.clock.now - jobs[0].submitted_at) / timedelta(days=1)
    table = Table.grid(padding=(0, 2))
    for name, value in [
        ("jobs", f"{len(jobs):,} in {days:,.1f} days of simulated time"),
        ("nodes", places),
        ("time taken", f"{seconds:.1f} s"),
        ("calls", f"{sum(calls.values()) / seconds:,.0f} a second, heartbeats included"),
        ("writes", f"{writes / seconds:,.0f} a second, each committed when it returned"),
        ("in flight", f"{waiting:,.0f} calls on average, at most {replay.peak_in_flight:,}"),
        ("on disk", f"{bytes_per_task:,.0f} bytes a task, history and indexes included"),
    ]:
        table.add_row(f"[bold]{name}[/]", value)
    console.print(table, "")

    table = new_table("call", "times", "p50 ms", "p99 ms")
    for kind, latencies in replay.latencies.items():
        latencies.sort()
        p50, p99 = (latencies[int(len(latencies) * share)] * 1000 for share in (0.5, 0.99))
        table.add_row(kind, f"{len(latencies):,}", f"{p50:.2f}", f"{p99:.2f}")
    console.print(table, "")

    table = new_table("busiest users", "jobs", "hours")
    hours: defaultdict[str | None, float] = defaultdict(float)
    for job in jobs:
        hours[job.user] += job.run_seconds / 3600
    for user, count in Counter(job.user for job in jobs).most_common(5):
        table.add_row(user or "unknown", f"{count:,}", f"{hours[user]:,.1f}")
    console.print(table, "")

    table = new_table("week from", "jobs", "")
    first = jobs[0].submitted_at
    weeks = Counter((job.submitted_at - first).days // 7 for job in jobs)
    for week in range(max(weeks) + 1):
        bar = ProgressBar(total=max(weeks.values()), completed=weeks[week], width=40)
        day = first + timedelta(weeks=week)
        table.add_row(f"{day:%Y-%m-%d}", f"{weeks[week]:,}", bar)
    console.print(table, "")


def new_table(first: str, *others: str) -> Table:
    """A table without frame, with its figures on the right."""
    table = Table(first, box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False)
    for name in others:
        table.add_column(name, justify="right")
    return table


async def replay_trace(trace: Path, location: str, nodes: int, limit: int | None) -> bool:
    """Replay, print the summary, and say whether the database holds all of it."""
    jobs = sorted(islice(read_trace(trace), limit), key=lambda job: job.submitted_at)
    if not jobs:
        raise TraceError(f"{trace}: no jobs")
    console = Console(highlight=False)
    clock = SimulatedClock(jobs[0].submitted_at)
    async with StateManager(Database(location, clock=clock)) as store:
        state = await store.get_state()
        if state.total_tasks or state.total_nodes:
            raise ReplayError(f"{store.db.db_path} is not empty: the replay needs a new database")
        empty_size = (await store.db.get_stats())["db_size"]
        replay = Replay(store, clock, jobs)
        began = perf_counter()
        places = await replay.register_nodes(nodes)
        with Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            console=console,
            transient=True,
        ) as progress:
            await replay.run(progress)
        seconds = perf_counter() - began

    async with StateManager(Database(location, clock=clock)) as store:
        tasks = [
            task for status in TaskStatus for task in await store.task_repo.list_by_status(status)
        ]
        claims = proof(jobs, tasks, await store.get_all_nodes())
        size = (await store.db.get_stats())["db_size"] - empty_size

    in_words = f"{nodes} with {places} place{'s' if places > 1 else ''} each"
    print_summary(console, replay, seconds, in_words, size / len(jobs))
    console.print("Opened again, the database says:")
    for claim in claims:
        verdict = "[green]yes[/]" if claim.holds_for == claim.total else "[bold red]NO[/]"
        console.print(f"  {verdict}  {claim.holds_for:,} of {claim.total:,} {claim.text}")
    return all(claim.holds_for == claim.total for claim in claims)


def positive(text: str) -> int:
    """A number of the command line that must be at least 1."""
    if (number := int(text)) < 1:
        raise argparse.ArgumentTypeError("must be at least 1")
    return number


def main() -> int:
    """0 if the proof succeeds, 1 if it fails, 2 if the replay could not be done."""
    parser = argparse.ArgumentParser(description="Replay a cluster's accounting log.")
    parser.add_argument("trace", type=Path, help="Standard Workload Format, plain or .gz")
    parser.add_argument("--database", metavar="LOCATION", help="default: a temporary file")
    parser.add_argument("--nodes", type=positive, default=128, help="default: %(default)s")
    parser.add_argument("--limit", type=positive, metavar="N", help="only the first N jobs")
    options = parser.parse_args()
    if options.database == ":memory:":
        parser.error("a database in memory cannot be opened again for the proof")
    status = 2
    with TemporaryDirectory(prefix="openclaw-store-") as folder:
        location = options.database or str(Path(folder, "replay.db"))
        try:
            proven = asyncio.run(
                replay_trace(options.trace, location, options.nodes, options.limit)
            )
            status = 0 if proven else 1
        except* (ReplayError, StoreError) as group:
            print(f"{parser.prog}: {group.exceptions[0]}", file=sys.stderr)
    return status


if __name__ == "__main__":
    sys.exit(main())
