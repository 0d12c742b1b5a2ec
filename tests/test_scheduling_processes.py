"""Processes that share tasks, and are killed or stopped: each is finished once, by its owner."""

# ruff: noqa: ASYNC220 - a test may block its loop

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from datetime import timedelta
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from conftest import (
    EACH_KIND,
    FakeClock,
    Location,
    MakeNode,
    MakeTask,
    execute,
    new_location,
)
from support.scripts import Ended, run_scripts
from test_processes import AGREE

from openclaw_store import Database, NodeInfo, NodeStatus, StateManager, Task, TaskStatus
from openclaw_store.domain.backoff import Backoff
from openclaw_store.domain.lifecycle import LOST_TOO_OFTEN, NODE_LOST, OVERDUE

TASKS = int(os.environ.get("OPENCLAW_STORE_TEST_TASKS", "120"))
"""Of four workers that are killed again and again; 20,000 take minutes."""

KILLS = max(4, TASKS // 500)
WORKERS = 4
PLACES = 6

WORK = (
    AGREE
    + """
from collections import Counter
from contextlib import suppress
from sqlalchemy import text

HOW, FOLDER, (TASKS, KILLS, WORKERS, PLACES) = sys.argv[2], sys.argv[3], map(int, sys.argv[4:])
NAMES = [f"worker{number}" for number in range(WORKERS)]
CLAIMERS = 4
SILENT_SECONDS = 3  # heartbeats are stored within a second
ASSIGNED = (
    "SELECT node_id, running_tasks, max_concurrent_tasks, (SELECT count(*) FROM {0}tasks"
    " WHERE assigned_node = node_id AND status IN ('scheduled', 'running')) FROM {0}nodes"
)


class FairLock:
    # Opens for all when it was reached by so many coroutines of each process, and the parent.

    def __init__(self, parties=1):
        self.read, self.write = os.pipe()
        self.missing = parties

    def reach(self):
        self.missing -= 1
        if self.missing == 0:
            os.close(self.write)

    async def go_through(self):
        self.reach()
        await asyncio.to_thread(wait, self.read)


BEGIN, CHOSEN, CLAIMED, END = FairLock(), FairLock(CLAIMERS), FairLock(CLAIMERS), FairLock()


class Worker:
    def __init__(self, name, store):
        self.name, self.store, self.is_done = name, store, False
        # What was written to it survives the process.
        self.file = os.open(f"{FOLDER}/{name}.log", os.O_WRONLY | os.O_APPEND)

    def note(self, *words):
        os.write(self.file, (" ".join(map(str, words)) + "\\n").encode())

    async def work(self):
        while (await self.store.get_state()).tasks:
            tasks = await self.claim(random.randint(1, 3))
            for task in tasks:
                self.note("claimed", task.task_id, task.attempt)
            for task in tasks:
                result = f"{self.name} {task.attempt} {os.getpid()}"
                try:
                    await self.run(task, result)
                    self.note("completed", task.task_id, result)
                except NotOwnerError:
                    self.note("refused", task.task_id, result)
            if not tasks:
                await asyncio.sleep(0.01)

    async def claim(self, limit):
        return await self.store.claim_tasks(self.name, limit)

    async def run(self, task, result):
        await self.store.start_task(task)
        await asyncio.sleep(random.random() / 10)  # the work itself
        await self.store.complete_task(task, result)

    async def send_heartbeats(self):
        while not self.is_done:
            await self.store.update_heartbeat(self.name)
            await asyncio.sleep(0.1)

    async def recover(self):
        assigned = ASSIGNED.format("" if self.store.db.dialect == "sqlite" else "public.")
        while not self.is_done:  # cancelled, it could not tell whom it has found out
            for name in (await self.store.recover(SILENT_SECONDS)).offline_nodes:
                self.note("offline", name)
            async with self.store.db.session() as session:
                for name, running, most, held in await session.execute(text(assigned)):
                    is_right = running == held <= most
                    self.note("counted" if is_right else "miscounted", name, running, held)
            await asyncio.sleep(0.2)


class Naive(Worker):
    # Selects, and then updates. All select before one updates, and all have updated before one
    # goes on, so that what may happen does happen.

    async def claim(self, limit):
        pending = await self.store.task_repo.list_by_status(TaskStatus.PENDING, 3)
        if CHOSEN.missing > 0:
            await CHOSEN.go_through()

        def take(task):
            task.status, task.assigned_node = TaskStatus.SCHEDULED, self.name
            task.attempt += 1

        claimed = []
        for task in pending:
            with suppress(InvalidTransitionError):
                claimed.append(await self.store.change_task(task.task_id, take))
        if CLAIMED.missing > 0:
            await CLAIMED.go_through()
        return claimed

    async def run(self, task, result):
        def complete(task):
            task.status, task.result = TaskStatus.COMPLETED, result

        await self.store.change_task(task.task_id, complete)


async def main(name, path):
    random.seed()
    backoff = Backoff(first_seconds=0)
    async with StateManager(Database(path), 60, backoff=backoff) as store:
        await store.register_node(NodeInfo(name, name, max_concurrent_tasks=PLACES))
        worker = {"guarded": Worker, "naive": Naive}[HOW](name, store)
        await BEGIN.go_through()
        async with asyncio.TaskGroup() as group:
            group.create_task(worker.send_heartbeats())
            group.create_task(worker.recover())
            await asyncio.gather(*[worker.work() for _ in range(CLAIMERS)])
            worker.is_done = True
        await store.sync_to_database()
        worker.note("finished", os.getpid())
        await END.go_through()
        await agree(name, store)


async def prepare(path):
    async with StateManager(Database(path)) as store:
        tasks = [Task.create(TaskType.BATCH, "t", task_id=f"task-{number:05}", max_retries=1000,
                             priority=random.choice(list(TaskPriority)))
                 for number in range(TASKS)]
        assert not any(await store.add_tasks(tasks))


def start(name):
    child = os.fork()
    if child == 0:
        signal.signal(signal.SIGALRM, signal.SIG_DFL)
        signal.alarm(LIMIT)  # its own: that of the parent is not inherited
        asyncio.run(main(name, sys.argv[1]))
        os._exit(0)
    return child


def give_up(why):
    for child in children.values():
        os.kill(child, signal.SIGKILL)
    sys.exit(why)


def look():
    # What the workers have noted meanwhile, and whether one of them has failed.
    global completed
    for name, file in zip(NAMES, files):
        for line in file:
            word, *rest = line.split()
            completed += word == "completed"
            held[name] += {"claimed": 1, "completed": -1, "refused": -1}.get(word, 0)
            if word in ("offline", "finished"):
                noted.add(rest[0])
    for name, child in list(children.items()):
        ended, status = os.waitpid(child, os.WNOHANG)
        if ended:
            del children[name]
        if status:
            give_up(f"{name} has failed")
    time.sleep(0.005)


def are_done():
    return all(str(child) in noted for child in children.values())


LIMIT = 100 + TASKS // 10
children = {}
signal.signal(signal.SIGALRM, lambda *_: give_up(f"not done after {LIMIT} s"))
signal.alarm(LIMIT)
asyncio.run(prepare(sys.argv[1]))
files = [open(f"{FOLDER}/{name}.log", "x+") for name in NAMES]
completed, noted, held = 0, set(), Counter()
children = {name: start(name) for name in NAMES}
for gate in (BEGIN, CHOSEN, CLAIMED):
    gate.missing = 1
    gate.reach()
for number, moment in enumerate(sorted(random.choices(range(TASKS // 10, TASKS * 8 // 10),
                                                      k=KILLS))):
    is_for_others = number % 4 == 3  # to find out, for which it must leave something to do
    while completed < moment or (is_for_others and max(held.values()) < 2 and not are_done()):
        look()
    name = max(held, key=held.get) if is_for_others else random.choice(NAMES)
    child = children.pop(name)
    os.kill(child, signal.SIGKILL)
    assert os.waitpid(child, 0)[1] == signal.SIGKILL
    print("killed", name)
    look()
    held[name] = 0
    if is_for_others:
        noted.discard(name)
        while name not in noted and not are_done():
            look()
    children[name] = start(name)
END.reach()
while children:
    look()
for file in files:
    file.close()
"""
)

ASSIGNED = ("scheduled", "running")

EDGES = {
    (None, "pending"),
    ("pending", "scheduled"),
    ("scheduled", "running"),
    ("running", "completed"),
    ("scheduled", "pending"),
    ("running", "pending"),
}
"""The changes that a task may go through here."""


class Step(NamedTuple):
    """A row of the feed."""

    revision: int
    item: str
    id: str
    before: str | None
    after: str | None
    node: str | None
    reason: str | None
    previous: int | None


class Run:
    """What workers say they did, and the database they leave."""

    def __init__(self, location: Location, folder: Path, tasks: int, ended: Ended) -> None:
        self.failures = [f"ended with {ended.code}"] * (ended.code != 0) + not_refusals(ended.err)
        self.ids = {f"task-{number:05}" for number in range(tasks)}
        out = [line.split() for line in ended.out]
        self.kills = Counter(name for word, name in out if word == "killed")
        self.notes: dict[str, list[list[str]]] = defaultdict(list)
        """By their first word; the second one is who wrote it."""
        for path in sorted(folder.glob("*.log")):
            for line in path.read_text().splitlines():
                word, *rest = line.split()
                self.notes[word].append([path.stem, *rest])
        self.feed = [
            Step(*row)
            for row in execute(
                location,
                "SELECT revision, item, item_id, from_status, to_status, node, reason, previous"
                " FROM changes ORDER BY revision",
            )
        ]
        self.histories: dict[str, list[Step]] = defaultdict(list)
        for step in self.feed:
            if step.item == "task":
                self.histories[step.id].append(step)
        self.tasks = {
            id: (version, status, node, attempt, result and json.loads(result))
            for id, version, status, node, attempt, result in execute(
                location,
                "SELECT task_id, version, status, assigned_node, attempt, CAST(result AS text)"
                " FROM tasks",
            )
        }
        self.nodes = {
            id: (places, counts)
            for id, places, *counts in execute(
                location,
                "SELECT node_id, max_concurrent_tasks,"
                " running_tasks, successful_tasks, failed_tasks, total_tasks_processed FROM nodes",
            )
        }

    def problems(self) -> list[str]:
        """All that contradicts that each task was claimed by one at a time, and finished once."""
        return [
            *self.failures,
            *self._lost(),
            *(problem for history in self.histories.values() for problem in broken(history)),
            *self._overfull(),
            *self._miscounted(),
            *self._unlike_the_notes(),
        ]

    def claims(self, id: str) -> list[str | None]:
        return [step.node for step in self.histories[id] if step.after == "scheduled"]

    def _lost(self) -> Iterator[str]:
        if [step.revision for step in self.feed] != list(range(1, len(self.feed) + 1)):
            yield "revisions are missing"
        if not self.ids == set(self.tasks) == set(self.histories):
            yield "tasks are missing"
        for id, (version, status, node, attempt, _) in self.tasks.items():
            newest = [step.revision for step in self.histories[id]][-1:]
            if ([version], status) != (newest, "completed"):
                yield f"{id} is {status} at the end, at version {version} after {newest}"
            claims = self.claims(id)
            if attempt != len(claims) or [node] != (claims or [None])[-1:]:
                yield f"{id} is at attempt {attempt} on {node}, and was claimed by {claims}"

    def _overfull(self) -> Iterator[str]:
        held: dict[str | None, set[str]] = defaultdict(set)
        owners: dict[str, str | None] = {}
        for step in self.feed:
            if step.item != "task":
                continue
            held[owners.get(step.id)].discard(step.id)
            if step.after in ASSIGNED:
                owners[step.id] = step.node
                held[step.node].add(step.id)
                if step.node is None or len(held[step.node]) > self.nodes[step.node][0]:
                    yield f"{step.node} has {len(held[step.node])} tasks at {step.revision}"

    def _miscounted(self) -> Iterator[str]:
        for name, (_, counts) in self.nodes.items():
            done = lost = 0
            for history in self.histories.values():
                done += sum(step.after == "completed" and step.node == name for step in history)
                lost += sum(
                    (before.node, before.after) == (name, "running") and after.reason == NODE_LOST
                    for before, after in pairwise(history)
                )
            if counts != [0, done, lost, done + lost]:
                yield f"{name} has counted {counts}, with {done} completed and {lost} lost"
        for note in self.notes["miscounted"]:
            yield f"while they worked: {note}"

    def _unlike_the_notes(self) -> Iterator[str]:
        """What the database acknowledged, against what it holds."""
        claimed = Counter((id, attempt) for _, id, attempt in self.notes["claimed"])
        for (id, attempt), times in claimed.items():
            if times > 1:
                yield f"attempt {attempt} of {id} was given away {times} times"
        for name, id, attempt in self.notes["claimed"]:
            if self.claims(id)[int(attempt) - 1 :][:1] != [name]:
                yield f"{name} has noted attempt {attempt} of {id}, the feed has not"
        completed = Counter(id for _, id, *_ in self.notes["completed"])
        for id, times in completed.items():
            if times > 1:
                yield f"{id} was completed {times} times"
        for _, id, *words in self.notes["completed"]:
            if self.tasks[id][4] != " ".join(words):
                yield f"the result of {id} is not that of {words}"
        missing = Counter(
            node for id, (_, _, node, *_) in self.tasks.items() if id not in completed
        )
        for name, times in missing.items():
            if name is None or times > self.kills[name] * self.nodes[name][0]:
                yield f"{times} tasks were completed on {name}, and it does not know"


def broken(history: Sequence[Step]) -> Iterator[str]:
    """What is wrong with the history of a task."""
    status = previous = owner = None
    for step in history:
        if (step.before, step.previous) != (status, previous):
            yield f"{step} does not follow {previous}"
        if step.after == "scheduled" and owner is not None:
            yield f"{step.id} was claimed by {step.node} while {owner} had it"
        elif (step.before, step.after) not in EDGES:
            yield f"{step.id} went from {step.before} to {step.after}"
        elif step.before in ASSIGNED and step.after == "pending":
            if (step.node, step.reason) != (None, NODE_LOST):
                yield f"{step} gives it back"
        elif step.after not in ("pending", "scheduled") and step.node != owner:
            yield f"{step} is not by its owner {owner}"
        status, previous = step.after, step.revision
        owner = step.node if step.after in ASSIGNED else None


def run_workers(how: str, location: Location, folder: Path, tasks: int, kills: int) -> Run:
    """Have workers do tasks; then look at what they did."""
    notes = folder / "notes"
    notes.mkdir()
    arguments = [location, how, notes, tasks, kills, WORKERS, PLACES]
    (ended,) = run_scripts((WORK, arguments))
    return Run(location, notes, tasks, ended)


def not_refusals(log: str) -> list[str]:
    """What else the library has logged: a former owner's call is refused, and that is told."""
    return [line for line in log.splitlines() if not line.startswith("refused: node ")]


@pytest.fixture(scope="module", params=EACH_KIND)
def run(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Run]:
    folder = tmp_path_factory.mktemp("workers")
    with new_location(request, request.param, folder, migrated=True) as location:
        yield run_workers("guarded", location, folder, TASKS, KILLS)


class TestKilledWorkers:
    """Four processes with four claimers each; they are killed, and others come in their place."""

    def test_each_task_is_claimed_by_one_at_a_time_and_finished_once(self, run: Run) -> None:
        problems = run.problems()

        assert not problems, "\n".join(problems[:40])

    def test_workers_were_really_killed_and_what_they_held_was_given_back(self, run: Run) -> None:
        reasons = Counter(step.reason for step in run.feed)

        assert sum(run.kills.values()) == KILLS
        assert WORKERS < reasons["registered"] <= WORKERS + KILLS
        assert reasons[NODE_LOST] > 0
        assert run.notes["offline"]  # somebody had to find out
        assert len(run.notes["counted"]) > WORKERS * WORKERS
        assert {name for name, *_ in run.notes["completed"]} == set(run.nodes)


def test_naive_workers_are_found_out(location: Location, tmp_path: Path) -> None:
    """Who selects first and then updates claims twice and finishes twice; the same check tells."""
    run = run_workers("naive", location, tmp_path, tasks=30, kills=0)

    problems = run.problems()

    assert run.failures == []
    assert len({problem.split()[0] for problem in problems if " was claimed by " in problem}) >= 3
    assert len([problem for problem in problems if " was completed 16 times" in problem]) >= 3


STOPPED = (
    AGREE
    + """
from datetime import datetime


def clock():
    with open(sys.argv[2]) as file:
        return datetime.fromisoformat(file.read())


async def main(path):
    async with StateManager(Database(path, clock=clock), 60) as store:
        tasks = []
        for name in ("atlas", "boreas"):
            await store.register_node(NodeInfo(name, name))
            tasks += await store.claim_tasks(name, 4)
        for task in tasks:
            if task.metadata["is_started"]:
                await store.start_task(task)
        mine = [await store.get_task(task.task_id) for task in tasks]
        node = await store.get_node("atlas")
        await store.update_heartbeat("atlas")  # it would be written later

        os.kill(os.getpid(), signal.SIGSTOP)

        outcomes = []

        async def attempt(write):
            try:
                await write
                outcomes.append("done")
            except StoreError as error:
                outcomes.append(type(error).__name__)

        async def complete_in_transaction(task):
            async with store.db.transaction() as tx:
                await TaskRepository(tx).complete(task, "too late")

        for task in mine:
            await attempt(store.start_task(task))
            await attempt(store.fail_task(task, "too late"))
            await attempt(store.complete_task(task, "too late"))
            await attempt(complete_in_transaction(task))
        print(json.dumps(outcomes))
        outcomes.clear()
        for task in mine:
            task.status, task.result = TaskStatus.COMPLETED, "too late"
            await attempt(store.update_task(task))
        node.running_tasks = 0
        await attempt(store.update_node(node))
        print(json.dumps(outcomes))
        print(json.dumps(await store.claim_tasks("atlas", 4)))
        print(json.dumps([task.task_id for task in mine if task.assigned_node == "boreas"]))
        await store.sync_to_database()
        await agree("stopped", store)


signal.alarm(60)
asyncio.run(main(sys.argv[1]))
"""
)


def set_clock(clock: FakeClock, path: Path, *, seconds: float = 0) -> None:
    """Let time pass for the other process, too."""
    new = path.with_suffix(".new")
    new.write_text(clock.advance(seconds).isoformat())
    new.replace(path)  # it may be reading


async def test_stopped_coordinator_writes_nothing_once_it_goes_on(
    manager: StateManager, location: Location, clock: FakeClock, make_task: MakeTask, tmp_path: Path
) -> None:
    """What it held was recovered meanwhile, and done or not; every write of its own is refused."""
    for number in range(8):
        await manager.add_task(make_task(metadata={"is_started": number % 2 == 0}))
    time = tmp_path / "time"
    set_clock(clock, time)

    async def everything() -> Sequence[Any]:
        tables = ["tasks ORDER BY task_id", "changes ORDER BY revision"]
        return [
            await manager.node_repo.get_all_nodes(),
            *[execute(location, f"SELECT * FROM {table}") for table in tables],
        ]

    with subprocess.Popen(
        [sys.executable, "-W", "error", "-c", STOPPED, str(location), str(time)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        try:
            _, status = await asyncio.to_thread(os.waitpid, process.pid, os.WUNTRACED)
            assert os.WIFSTOPPED(status), process.communicate()
            set_clock(clock, time, seconds=121)
            recovery = await manager.recover(timeout_seconds=120)
            set_clock(clock, time, seconds=2)  # they are due again
            # Another node takes the share of the first one; the second one comes back under its
            # name, and takes of its own.
            for name, limit in (("ceres", 4), ("boreas", 3)):
                await manager.register_node(NodeInfo(name, name))
                done, runs, *_ = await manager.claim_tasks(name, limit)
                await manager.start_task(runs)
                await manager.complete_task(done, "in time")
            before = await everything()

            process.send_signal(signal.SIGCONT)
            out, err = await asyncio.to_thread(process.communicate)
        finally:
            process.kill()

    assert (process.returncode, not_refusals(err)) == (0, [])
    by_owner, by_version, claimed, held_by_boreas = map(json.loads, out.splitlines())
    assert sorted(recovery.offline_nodes) == ["atlas", "boreas"]
    assert len(recovery.requeued_tasks) == 8
    tasks = await manager.list_tasks(limit=10)
    states = Counter(task.status for task in tasks)
    assert states == {"completed": 2, "running": 2, "scheduled": 3, "pending": 1}
    assert {task.task_id for task in tasks if task.assigned_node == "boreas"} < {*held_by_boreas}
    assert by_owner == ["NotOwnerError"] * 4 * 8
    assert by_version == ["StaleVersionError"] * 9
    assert claimed == []
    assert await everything() == before


RECOVER = """
import asyncio, json, os, signal, sys
from datetime import datetime
from openclaw_store import *
from openclaw_store.domain import lifecycle

path, moment, processes, last = sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4])
decide, decided = lifecycle.recover, 0


def decide_or_die(*args, **options):
    global decided
    decided += 1
    if decided == last:
        os.kill(os.getpid(), signal.SIGKILL)
    return decide(*args, **options)


async def main():
    database = Database(path, clock=lambda: datetime.fromisoformat(moment))
    async with StateManager(database, None, backoff=Backoff(jitter=0)) as store:
        os.close(ready)
        os.read(begin, 1)  # returns for all of them when the last one is ready
        recovery = await store.recover(120)
    os.write(1, (json.dumps(vars(recovery)) + "\\n").encode())  # in one piece


lifecycle.recover = decide_or_die
signal.alarm(60)
begin, ready = os.pipe()
children = []
for number in range(processes - 1):
    child = os.fork()
    if child == 0:
        signal.alarm(60)
        asyncio.run(main())
        os._exit(0)
    children.append(child)
asyncio.run(main())
assert [os.waitpid(child, 0)[1] for child in children] == [0] * len(children)
"""

HELD_BY_EACH = 120

LOST = 4 * HELD_BY_EACH + HELD_BY_EACH // 3
"""Tasks that are to be taken away: more than two writes of them."""


class Recovered(NamedTuple):
    """What a recovery has done, and left; whatever depends on their order aside."""

    recovery: dict[str, list[str]]
    tasks: list[Task]
    nodes: list[NodeInfo]
    feed: list[tuple[Any, ...]]


async def lose_nodes(store: StateManager, make_task: MakeTask, make_node: MakeNode) -> None:
    """Nodes of every kind, and tasks on them: with retries left or not, some for too long."""
    now = store.db.clock()
    begun = now - timedelta(minutes=10)
    nodes = [
        make_node(node_id="alive", last_heartbeat=now),
        make_node(node_id="silent", last_heartbeat=begun),
        make_node(node_id="silent and busy", last_heartbeat=begun, status=NodeStatus.BUSY),
        make_node(node_id="in error", last_heartbeat=now, status=NodeStatus.ERROR),
        make_node(node_id="removed"),
        make_node(node_id="idle", registered_at=begun),
    ]
    tasks = [
        make_task(
            task_id=f"{node.node_id} {number}",
            name="held",
            assigned_node=node.node_id,
            attempt=1,
            status=TaskStatus.RUNNING if number % 3 else TaskStatus.SCHEDULED,
            scheduled_at=begun,
            started_at=begun if number % 3 else None,
            timeout=60 if node.node_id == "alive" and number % 3 == 1 else None,
            retry_count=3 * (number % 2),
            losses=10 * (number % 2),
        )
        for node in nodes[:-1]
        for number in range(HELD_BY_EACH)
    ]
    for node in nodes:
        node.hostname = "host"
        node.max_concurrent_tasks = HELD_BY_EACH
        node.running_tasks = sum(task.assigned_node == node.node_id for task in tasks)
        await store.add_node(node)
    await store.remove_node("removed")
    assert not any(await store.add_tasks(tasks))


async def recovered(
    location: Location, clock: FakeClock, recoveries: Iterable[dict[str, list[str]]]
) -> Recovered:
    recovery: dict[str, list[str]] = defaultdict(list)
    for one in recoveries:
        for name, ids in one.items():
            recovery[name] = sorted(recovery[name] + ids)
    async with StateManager(Database(location, clock=clock), None) as store:
        tasks = [
            replace(task, version=0)
            for status in TaskStatus
            for task in await store.task_repo.list_by_status(status, None)
        ]
        nodes = [
            replace(node, version=0, average_execution_time=round(node.average_execution_time, 6))
            for node in await store.node_repo.get_all_nodes()
        ]
    feed = execute(
        location,
        "SELECT item, item_id, kind, from_status, to_status, node, reason FROM changes"
        " ORDER BY item, item_id, revision",
    )
    tasks.sort(key=lambda task: task.task_id)
    nodes.sort(key=lambda node: node.node_id)
    return Recovered(recovery, tasks, nodes, feed)


class TestRecoveries:
    @pytest.fixture
    async def by_one(
        self,
        manager: StateManager,
        another_location: Location,
        clock: FakeClock,
        make_task: MakeTask,
        make_node: MakeNode,
    ) -> Recovered:
        """What one recovery does elsewhere; at `location` the same nodes are still lost."""
        await lose_nodes(manager, make_task, make_node)
        database = Database(another_location, clock=clock)
        async with StateManager(database, None, backoff=Backoff(jitter=0)) as other:
            await lose_nodes(other, make_task, make_node)
            recovery = await other.recover(120)
        return await recovered(another_location, clock, [vars(recovery)])

    async def test_one_takes_all_that_is_lost(self, by_one: Recovered) -> None:
        assert {name: len(ids) for name, ids in by_one.recovery.items()} == {
            "offline_nodes": 3,
            "requeued_tasks": LOST - 3 * HELD_BY_EACH // 2,
            "failed_tasks": 4 * HELD_BY_EACH // 3,
            "timed_out_tasks": HELD_BY_EACH // 6,
            "cancelled_tasks": 0,
        }
        assert Counter(reason for *_, reason in by_one.feed if reason is not None) == {
            "silent for more than 120 s": 3,
            NODE_LOST: 8 * HELD_BY_EACH // 3,
            LOST_TOO_OFTEN: 4 * HELD_BY_EACH // 3,
            OVERDUE: HELD_BY_EACH // 3,
        }

    async def test_five_at_once_do_together_what_one_does(
        self, by_one: Recovered, location: Location, clock: FakeClock
    ) -> None:
        """Each task has one outcome, which one of them tells."""
        arguments = [location, clock().isoformat(), 5, 0]

        (ended,) = await asyncio.to_thread(run_scripts, (RECOVER, arguments))

        assert (ended.code, ended.err, len(ended.out)) == (0, "", 5)
        assert await recovered(location, clock, map(json.loads, ended.out)) == by_one

    async def test_one_that_is_killed_half_way_is_made_up_for(
        self, by_one: Recovered, location: Location, clock: FakeClock
    ) -> None:
        """Two are killed while they decide on their second lot of tasks; the third one is not."""
        left = []
        for last in (300, 250, 0):
            arguments = [location, clock().isoformat(), 1, last]
            (ended,) = await asyncio.to_thread(run_scripts, (RECOVER, arguments))
            assert (ended.code, ended.err) == (-signal.SIGKILL if last else 0, "")
            ((count,),) = execute(
                location,
                "SELECT count(*) FROM tasks WHERE status IN ('scheduled', 'running')"
                " AND (assigned_node != 'alive' OR timeout IS NOT NULL)",
            )
            left.append(count)

        assert LOST > left[0] > left[1] > left[2] == 0
        assert (await recovered(location, clock, []))[1:] == by_one[1:]
