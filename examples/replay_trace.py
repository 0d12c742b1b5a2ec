"""Replay a cluster's accounting log through a `StateManager` at full speed.

Run it as `python examples/replay_trace.py TRACE`. The trace is a log in the Standard Workload
Format, plain or gzipped, such as the logs from the Parallel Workloads Archive (collected by Dror
Feitelson, given by the sites that recorded them). Each job becomes one task that takes one slot
on one node, with the job's own times, user, processors and application.

Simulated time, which is also the store's time, advances in windows of six hours. The events of a
window happen at its end, in three steps: jobs are submitted, nodes claim and start the due jobs,
and jobs end. Each step handles all its jobs concurrently, so that many callers write together. A
job that started in the log must not wait for a slot here: the nodes get enough slots for the
busiest window, counting one slot for each job that runs at any time in it.

The store therefore measures times in windows. A finished task then receives the times of the log.

At the end the replay reopens the database and compares its content with the log.
"""

import argparse
import asyncio
import gzip
import math
import sys
import zlib
from collections import Counter, defaultdict
from collections.abc import Awaitable, Coroutine, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from itertools import islice
from pathlib import Path
from tempfile import TemporaryDirectory
from time import perf_counter
from typing import Any, TypeVar

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

WINDOW = timedelta(hours=6)
OUTCOMES = {0: TaskStatus.FAILED, 5: TaskStatus.CANCELLED}
"""Task status for each job status; every other job status counts as completed."""
PARTIAL = (2, 3, 4)
"""Job statuses of lines about a part of a job; another line describes the whole job."""


class ReplayError(Exception):
    """The replay is impossible; the text gives the reason."""


class TraceError(ReplayError):
    """The log cannot be read; the text names the line."""


@dataclass(frozen=True, slots=True)
class Job:
    """One line of the log; an unknown value, -1 in the format, is `None` here."""

    number: int
    status: TaskStatus
    submitted_at: datetime
    started_at: datetime | None
    """`None` for a job that was cancelled before it started."""
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
    def is_counted(self) -> bool:
        """True if the counters of its node include the job; they omit cancelled jobs."""
        return self.status is not TaskStatus.CANCELLED

    @property
    def run_seconds(self) -> float:
        return (self.completed_at - (self.started_at or self.completed_at)).total_seconds()


def read_trace(path: Path) -> Iterator[Job]:
    """Yield the jobs of a log in the order of its lines.

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
    """Return the job of one line, or `None` for a line about a part of a job.

    An unknown wait time or run time counts as 0.
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
    """Clock of the store; the replay advances it from window to window."""

    def __init__(self, now: datetime) -> None:
        self.now = now

    def __call__(self) -> datetime:
        return self.now


class Replay:
    """Drive a `StateManager` through a log, and time every call."""

    def __init__(self, store: StateManager, clock: SimulatedClock, jobs: Sequence[Job]) -> None:
        self.store = store
        self.clock = clock
        self.jobs = jobs
        self.latencies: defaultdict[str, list[float]] = defaultdict(list)
        self.peak_in_flight = 0
        self._in_flight = 0
        self._node_ids: list[str] = []
        self._claimed: dict[str, Task] = {}
        """Assigned tasks as `claim_tasks` returned them: node and attempt identify the owner."""

    async def run(self, progress: Progress) -> None:
        bar = progress.add_task("", total=len(self.jobs))
        for window in windows(self.jobs):
            self.clock.now = window.ends_at
            for node_id in self._node_ids:
                await self._heartbeat(node_id)
            await together(map(self._submit, window.submitted))
            slots = await self._free_slots()
            await together(self._claim_and_start(node_id) for node_id in slots[: window.started])
            await together(map(self._finish, window.finished))
            progress.update(
                bar,
                advance=len(window.finished),
                description=f"{self.clock.now:%Y-%m-%d %H:%M}",
            )

    async def register_nodes(self, count: int) -> int:
        """Add the nodes, and return the number of slots of each node."""
        slots = math.ceil(busiest_window(self.jobs) / count)
        self._node_ids = [f"node-{number:03}" for number in range(1, count + 1)]
        nodes = [NodeInfo(id, hostname=id, max_concurrent_tasks=slots) for id in self._node_ids]
        await together(
            self._timed("register_node", self.store.register_node(node)) for node in nodes
        )
        return slots

    async def _free_slots(self) -> list[str]:
        """Return one node identifier for each free slot, the least loaded nodes first."""
        nodes = await self._timed("get_available_nodes", self.store.get_available_nodes())
        slots = (
            (number, node.node_id)
            for node in nodes
            for number in range(node.running_tasks, node.max_concurrent_tasks)
        )
        return [node_id for _, node_id in sorted(slots)]

    async def _submit(self, job: Job) -> None:
        task = Task(
            task_id=job.task_id,
            task_type=TaskType.INTERACTIVE if job.is_interactive else TaskType.BATCH,
            name=f"job {job.number}",
            user_id=job.user,
            parameters=job.parameters,
            submitted_at=job.submitted_at,
            # A job that was cancelled before it started is never due before its end.
            not_before=job.started_at or job.completed_at + WINDOW,
            max_retries=0,  # a job that failed in the log is not retried
        )
        await self._timed("add_task", self.store.add_task(task))

    async def _claim_and_start(self, node_id: str) -> None:
        [task] = await self._timed("claim_tasks", self.store.claim_tasks(node_id))
        self._claimed[task.task_id] = task
        await self._timed("start_task", self.store.start_task(task))
        await self._heartbeat(node_id)

    async def _finish(self, job: Job) -> None:
        def copy_times(task: Task) -> None:
            task.scheduled_at = task.started_at = job.started_at
            task.completed_at = job.completed_at

        task = self._claimed.pop(job.task_id, None)
        if task is None or not job.is_counted:
            await self._timed("cancel_task", self.store.cancel_task(job.task_id))
        elif job.status is TaskStatus.FAILED:
            await self._timed("fail_task", self.store.fail_task(task, "failed in the log"))
        else:
            await self._timed("complete_task", self.store.complete_task(task))
        await self._timed("change_task: times", self.store.change_task(job.task_id, copy_times))
        if task is not None and task.assigned_node is not None:
            await self._heartbeat(task.assigned_node)

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


async def together(calls: Iterable[Coroutine[Any, Any, object]]) -> None:
    """Run all calls concurrently, and wait until every call has ended."""
    async with asyncio.TaskGroup() as callers:
        for call in calls:
            callers.create_task(call)


@dataclass
class Window:
    """Events between the end of the previous window and `ends_at`."""

    ends_at: datetime
    submitted: list[Job] = field(default_factory=list)
    started: int = 0
    finished: list[Job] = field(default_factory=list)


def window_of(moment: datetime, start: datetime) -> int:
    """Return the number of the window that contains `moment`; window 0 ends at `start`."""
    return -((start - moment) // WINDOW)


def windows(jobs: Sequence[Job]) -> Sequence[Window]:
    """Return all windows, from the first submission to the last end of a job."""
    start = jobs[0].submitted_at
    last = window_of(max(job.completed_at for job in jobs), start)
    all_windows = [Window(start + number * WINDOW) for number in range(last + 1)]
    for job in jobs:
        all_windows[window_of(job.submitted_at, start)].submitted.append(job)
        all_windows[window_of(job.completed_at, start)].finished.append(job)
        if job.started_at is not None:
            all_windows[window_of(job.started_at, start)].started += 1
    return all_windows


def busiest_window(jobs: Sequence[Job]) -> int:
    """Return the highest number of jobs in one window, counting jobs that run for a part of it."""
    running = busiest = 0
    for window in windows(jobs):
        running += window.started
        busiest = max(busiest, running)
        running -= sum(job.started_at is not None for job in window.finished)
    return max(busiest, 1)


@dataclass(frozen=True)
class Claim:
    """A statement that must hold in all `total` cases, and the number of cases found."""

    text: str
    holds_for: int
    total: int


def proof(
    jobs: Sequence[Job], tasks: Sequence[Task], nodes: Sequence[NodeInfo]
) -> tuple[Claim, ...]:
    """Compare the content of the database with the log."""
    stored = {task.task_id: task for task in tasks}
    found = [(job, stored[job.task_id]) for job in jobs if job.task_id in stored]
    start = jobs[0].submitted_at
    seconds: defaultdict[str | None, list[float]] = defaultdict(list)
    outcomes: Counter[tuple[str | None, TaskStatus]] = Counter()
    for job, task in found:
        if job.started_at is not None and job.is_counted:
            lasted = window_of(job.completed_at, start) - window_of(job.started_at, start)
            seconds[task.assigned_node].append(lasted * WINDOW.total_seconds())
            outcomes[task.assigned_node, job.status] += 1

    def matches(job: Job, task: Task) -> bool:
        return (
            (task.submitted_at, task.scheduled_at) == (job.submitted_at, job.started_at)
            and (task.started_at, task.completed_at) == (job.started_at, job.completed_at)
            and (task.user_id, task.parameters) == (job.user, job.parameters)
        )

    def has_right_counters(node: NodeInfo) -> bool:
        of_node = seconds[node.node_id]
        return (
            (node.running_tasks, node.total_tasks_processed) == (0, len(of_node))
            and node.successful_tasks == outcomes[node.node_id, TaskStatus.COMPLETED]
            and node.failed_tasks == outcomes[node.node_id, TaskStatus.FAILED]
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
            sum(matches(job, task) for job, task in found),
            len(jobs),
        ),
        Claim(
            "nodes have counters that add up to that",
            sum(map(has_right_counters, nodes)),
            len(nodes),
        ),
        Claim(
            "jobs that completed or failed were counted by a node",
            processed,
            sum(job.is_counted for job in jobs),
        ),
    )


def print_summary(
    console: Console, replay: Replay, seconds: float, nodes: str, bytes_per_task: float
) -> None:
    """Print the speed of the replay and figures of the log."""
    jobs = replay.jobs
    calls = {kind: len(latencies) for kind, latencies in replay.latencies.items()}
    writes = sum(calls.values()) - calls["update_heartbeat"] - calls["get_available_nodes"]
    waiting = sum(map(sum, replay.latencies.values())) / seconds
    days = (replay.clock.now - jobs[0].submitted_at) / timedelta(days=1)
    table = Table.grid(padding=(0, 2))
    for name, value in [
        ("jobs", f"{len(jobs):,} in {days:,.1f} days of simulated time"),
        ("nodes", nodes),
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


def new_table(first: str, *figures: str) -> Table:
    """Return a table without a frame, with right-aligned figures."""
    table = Table(first, box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False)
    for name in figures:
        table.add_column(name, justify="right")
    return table


async def replay_trace(trace: Path, location: str, nodes: int, limit: int | None) -> bool:
    """Replay a log, print the summary, and return true if the database matches the log."""
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
        slots = await replay.register_nodes(nodes)
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

    in_words = f"{nodes} with {slots} slot{'s' if slots > 1 else ''} each"
    print_summary(console, replay, seconds, in_words, size / len(jobs))
    console.print("Opened again, the database says:")
    for claim in claims:
        verdict = "[green]yes[/]" if claim.holds_for == claim.total else "[bold red]NO[/]"
        console.print(f"  {verdict}  {claim.holds_for:,} of {claim.total:,} {claim.text}")
    return all(claim.holds_for == claim.total for claim in claims)


def positive(text: str) -> int:
    """Parse a number of at least 1 from the command line."""
    if (number := int(text)) < 1:
        raise argparse.ArgumentTypeError("must be at least 1")
    return number


def main() -> int:
    """Return 0 if the proof succeeds, 1 if it fails, 2 if the replay was impossible."""
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
