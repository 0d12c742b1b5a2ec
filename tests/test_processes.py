"""Several processes with a StateManager each on one database: nothing is lost, and all agree."""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import EACH_KIND, Location, execute, new_location
from support.scripts import Ended, run_scripts

PROCESSES = 3
ROUNDS = 60
COUNTERS = 8

KILLED_WRITES = int(os.environ.get("OPENCLAW_STORE_TEST_WRITES", "600"))
"""Of four processes together, one of which is killed; 10,000 take a minute."""

AGREE = """
import asyncio, faulthandler, json, os, random, signal, sys, time
from openclaw_store import *


async def agree(name, manager):
    # What is in memory is what is in the database, whichever way it is asked for.
    await manager.refresh_from_database()
    tasks = {task.task_id: task for status in TaskStatus
             for task in await manager.task_repo.list_by_status(status)}
    nodes = {node.node_id: node for node in await manager.node_repo.get_all_nodes()}
    state = await manager.get_state()
    live = {id: task for id, task in tasks.items()
            if task.status in (TaskStatus.PENDING, TaskStatus.SCHEDULED, TaskStatus.RUNNING)}
    assert dict(state.tasks) == live, "live tasks"
    assert dict(state.nodes) == nodes, "nodes"
    for id, task in tasks.items():
        assert await manager.get_task(id) == task, "a task"
    stats = await manager.get_task_stats()
    assert stats == {"total": len(tasks), **{
        status.value: sum(task.status is status for task in tasks.values())
        for status in TaskStatus}}, "counts"
    assert (await manager.get_pending_tasks(None)
            == await manager.task_repo.list_pending_tasks(None)), "pending"
    assert state.version == manager.version
    return {"version": manager.version}


def wait(pipe):
    os.read(pipe, 1)  # returns for all of them when the last writer is gone
"""

WORK = (
    AGREE
    + """

PROCESSES, ROUNDS, COUNTERS = map(int, sys.argv[2:])


async def work(name, manager):
    random.seed(name)
    log = {"increments": [0] * COUNTERS, "heartbeats": [0] * COUNTERS, "stale": 0,
           "added": [], "removed": [], "unsaved": [], "refused": []}

    async def increment_task(n):
        def more(task):
            task.retry_count += 1
            task.metadata = {**task.metadata, name: task.metadata.get(name, 0) + 1}
        await manager.change_task(f"counter-{n}", more)
        log["increments"][n] += 1

    async def increment_node(n):
        def more(node):
            node.total_tasks_processed += 1
        await manager.change_node(f"node-{n}", more)
        log["heartbeats"][n] += 1

    async def add(number):
        task = Task.create(TaskType.BATCH, "added", task_id=f"{name}-{number}")
        await manager.add_task(task)
        log["added"].append(task.task_id)
        if number % 3 == 0:
            assert await manager.remove_task(task.task_id)
            log["removed"].append(task.task_id)
        elif number % 3 == 1:
            task.status = TaskStatus.COMPLETED
            await manager.update_task(task)

    async def stale(n):
        # A copy that was read before others wrote; its write must be refused or build on the last.
        task = await manager.get_task(f"counter-{n}")
        await asyncio.sleep(random.random() / 500)
        task.retry_count += 1
        try:
            await manager.update_task(task)
            log["increments"][n] += 1
        except StaleVersionError:
            log["stale"] += 1
            await manager.refresh_from_database()

    async def contend(number):
        # All processes want this identifier; one gets it.
        try:
            await manager.add_task(Task.create(TaskType.BATCH, name, task_id=f"wanted-{number}"))
            log["added"].append(f"wanted-{number}")
        except DuplicateError:
            log["refused"].append(f"wanted-{number}")

    async def unsaved(number):
        task = Task.create(TaskType.BATCH, "unsaved", task_id=f"{name}-unsaved-{number}")
        await manager.add_task(task, persist=False)
        log["unsaved"].append(task.task_id)

    async def one(number):
        n = random.randrange(COUNTERS)
        await increment_task(n)
        await increment_node(n)
        await add(number)
        await stale(n)
        await contend(number)
        if number % 10 == 0:
            await unsaved(number)
            await manager.sync_to_database()
        if number % 7 == 0:
            await manager.refresh_from_database()
        await manager.update_heartbeat(f"node-{n}", cpu_usage=number % 100)

    versions = []
    for start in range(0, ROUNDS, 10):
        await asyncio.gather(*[one(number) for number in range(start, start + 10)])
        versions.append(manager.version)
    assert versions == sorted(versions)
    await manager.sync_to_database()
    return log


async def main(name, path, started, finished, done):
    async with StateManager(Database(path), auto_sync_interval=0.05) as manager:
        await asyncio.to_thread(wait, started)
        log = await work(name, manager)
        os.close(done)
        await asyncio.to_thread(wait, finished)  # until the others have finished, too
        log.update(await agree(name, manager))
    print(json.dumps(log), flush=True)


async def prepare(path):
    async with StateManager(Database(path)) as manager:
        for n in range(COUNTERS):
            await manager.add_task(Task.create(TaskType.BATCH, "c", task_id=f"counter-{n}"))
            await manager.add_node(NodeInfo(f"node-{n}", "host"))


asyncio.run(prepare(sys.argv[1]))
started, start = os.pipe()
finished, done = os.pipe()
children = []
for number in range(PROCESSES):
    child = os.fork()
    if child == 0:
        os.close(start)
        faulthandler.dump_traceback_later(240, exit=True)
        asyncio.run(main(f"process{number}", sys.argv[1], started, finished, done))
        os._exit(0)
    children.append(child)
os.close(start)
os.close(done)
assert [os.waitpid(child, 0)[1] for child in children] == [0] * PROCESSES
"""
)


class Outcome:
    """What the processes say they did, and the database they leave."""

    def __init__(self, location: Location, ended: Ended) -> None:
        self.location = location
        self.ended = ended
        self.logs: list[dict[str, Any]] = [json.loads(line) for line in ended.out]

    def all(self, name: str) -> list[Any]:
        return [entry for log in self.logs for entry in log[name]]

    def totals(self, name: str) -> list[int]:
        return [sum(log[name][n] for log in self.logs) for n in range(COUNTERS)]


@pytest.fixture(scope="module", params=EACH_KIND)
def outcome(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Outcome]:
    folder = tmp_path_factory.mktemp("processes")
    with new_location(request, request.param, folder, migrated=True) as location:
        (ended,) = run_scripts((WORK, [location, PROCESSES, ROUNDS, COUNTERS]))
        assert (ended.code, ended.err) == (0, "")
        yield Outcome(location, ended)


class TestProcesses:
    def test_no_process_fails_and_every_cache_equals_the_database(self, outcome: Outcome) -> None:
        versions = {log["version"] for log in outcome.logs}

        assert len(outcome.logs) == PROCESSES
        assert versions == set(execute(outcome.location, "SELECT max(revision) FROM changes")[0])

    def test_no_increment_is_lost(self, outcome: Outcome) -> None:
        tasks = execute(
            outcome.location, "SELECT retry_count FROM tasks WHERE name = 'c' ORDER BY task_id"
        )
        nodes = execute(
            outcome.location, "SELECT total_tasks_processed FROM nodes ORDER BY node_id"
        )

        assert [count for (count,) in tasks] == outcome.totals("increments")
        assert [count for (count,) in nodes] == outcome.totals("heartbeats")
        assert sum(outcome.totals("heartbeats")) == PROCESSES * ROUNDS

    def test_outdated_copies_were_really_written(self, outcome: Outcome) -> None:
        assert all(log["stale"] > 0 for log in outcome.logs)

    def test_what_was_added_and_not_removed_is_there(self, outcome: Outcome) -> None:
        stored = {
            id for (id,) in execute(outcome.location, "SELECT task_id FROM tasks WHERE name != 'c'")
        }
        added, unsaved = set(outcome.all("added")), set(outcome.all("unsaved"))

        assert stored == (added | unsaved) - set(outcome.all("removed"))

    def test_of_those_who_want_one_identifier_one_gets_it(self, outcome: Outcome) -> None:
        got = Counter(id for id in outcome.all("added") if id.startswith("wanted-"))
        refused = Counter(outcome.all("refused"))

        assert got == {f"wanted-{number}": 1 for number in range(ROUNDS)}
        assert set(refused.values()) == {PROCESSES - 1}

    def test_revisions_are_without_a_gap(self, outcome: Outcome) -> None:
        revisions = [
            revision
            for (revision,) in execute(
                outcome.location, "SELECT revision FROM changes ORDER BY revision"
            )
        ]

        assert revisions == list(range(1, len(revisions) + 1))
        assert len(revisions) > 10 * ROUNDS
        ((newest,),) = execute(outcome.location, "SELECT max(version) FROM tasks")
        assert newest <= len(revisions)


KILL = (
    AGREE
    + """
NAMES = [f"process{number}" for number in range(4)]
COUNTERS, SHARE, FOLDER = int(sys.argv[2]), int(sys.argv[3]) // len(NAMES), sys.argv[4]


def lines(name):
    try:
        with open(os.path.join(FOLDER, name)) as file:
            return file.read().splitlines()
    except FileNotFoundError:
        return []


def notebook(name):
    # What was written to it survives the process.
    file = os.open(os.path.join(FOLDER, name), os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    return lambda *words: os.write(file, (" ".join(map(str, words)) + "\\n").encode())


async def work(name, manager):
    note = notebook(f"{name}.log")
    written = sum(line.startswith("done ") for line in lines(f"{name}.log"))
    ids = f"{name}-{os.getpid()}"

    def more(task):
        task.retry_count += 1
        task.metadata = {**task.metadata, name: task.metadata.get(name, 0) + 1}

    async def increment(number):
        n = random.randrange(COUNTERS)
        note("trying", n)
        await manager.change_task(f"counter-{n}", more)
        note("done", "increment", n)

    async def stale(number):
        n = random.randrange(COUNTERS)
        task = await manager.get_task(f"counter-{n}")
        await asyncio.sleep(random.random() / 500)
        more(task)
        note("trying", n)
        try:
            await manager.update_task(task)
            note("done", "increment", n)
        except StaleVersionError:
            note("refused", n)
            await manager.refresh_from_database()

    async def add(number):
        task = Task.create(TaskType.BATCH, "added", task_id=f"{ids}-{number}")
        note("adding", task.task_id)
        await manager.add_task(task)
        note("done", "add", task.task_id)
        if number % 2:
            task.status = TaskStatus.COMPLETED
            await manager.update_task(task)
            note("done", "complete", task.task_id)
        else:
            note("removing", task.task_id)
            assert await manager.remove_task(task.task_id)
            note("done", "remove", task.task_id)

    numbers = iter(range(1 << 30))

    async def one():
        while (number := next(numbers)) + written < SHARE:
            await random.choice([increment, increment, stale, add])(number)

    await asyncio.gather(*[one() for _ in range(8)])


async def watch(name, manager):
    note = notebook(f"{name}.seen")
    since = int((lines(f"{name}.seen") or ["0"])[-1])
    async for change in manager.watch(since):
        note(change.revision)


async def main(name, path, finished, done):
    random.seed(name)
    async with StateManager(Database(path), auto_sync_interval=60) as manager:
        watcher = asyncio.create_task(watch(name, manager))
        await work(name, manager)
        os.close(done)
        await asyncio.to_thread(wait, finished)
        print(json.dumps(await agree(name, manager)) + "\\n", end="", flush=True)
        while lines(f"{name}.seen")[-1] != str(manager.version):
            await asyncio.sleep(0.005)
            assert not watcher.done()
    await watcher


async def prepare(path):
    async with StateManager(Database(path)) as manager:
        for n in range(COUNTERS):
            await manager.add_task(Task.create(TaskType.BATCH, "c", task_id=f"counter-{n}"))


signal.alarm(600)
asyncio.run(prepare(sys.argv[1]))
finished, done = os.pipe()


def start(name):
    child = os.fork()
    if child == 0:
        faulthandler.dump_traceback_later(540, exit=True)
        asyncio.run(main(name, sys.argv[1], finished, done))
        os._exit(0)
    return child


first, *others = [start(name) for name in NAMES]
while len(lines(f"{NAMES[0]}.log")) < SHARE / 2 or not lines(f"{NAMES[0]}.seen"):
    time.sleep(0.002)
os.kill(first, signal.SIGKILL)
assert os.waitpid(first, 0)[1] == signal.SIGKILL
print(json.dumps({"noted": len(lines(f"{NAMES[0]}.seen"))}) + "\\n", end="", flush=True)
children = [start(NAMES[0]), *others]
os.close(done)
assert [os.waitpid(child, 0)[1] for child in children] == [0] * len(NAMES)
"""
)


class Notes:
    """What the processes noted before and after each write, and the database they leave."""

    def __init__(self, location: Location, folder: Path, ended: Ended) -> None:
        self.location = location
        killed, *agreed = map(json.loads, ended.out)
        self.seen_before_the_kill: int = killed["noted"]
        self.versions: list[int] = [one["version"] for one in agreed]
        self.lines = {
            path.stem: [line.split() for line in path.read_text().splitlines()]
            for path in folder.glob("*.log")
        }
        self.seen = {
            path.stem: [int(line) for line in path.read_text().splitlines()]
            for path in folder.glob("*.seen")
        }

    def counted(self, name: str, *words: str) -> Counter[str]:
        """The last word of the lines of a process that begin with these words."""
        return Counter(line[-1] for line in self.lines[name] if line[: len(words)] == list(words))

    def all(self, *words: str) -> set[str]:
        return {id for name in self.lines for id in self.counted(name, *words)}


@pytest.fixture(scope="module", params=EACH_KIND)
def notes(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Notes]:
    folder = tmp_path_factory.mktemp("killed")
    (folder / "notes").mkdir()
    with new_location(request, request.param, folder, migrated=True) as location:
        arguments = [location, COUNTERS, KILLED_WRITES, folder / "notes"]
        (ended,) = run_scripts((KILL, arguments))
        assert (ended.code, ended.err) == (0, "")
        yield Notes(location, folder / "notes", ended)


class TestKilledProcess:
    """One of four processes is killed in the middle of its writes, and started again."""

    def test_no_update_is_lost(self, notes: Notes) -> None:
        rows = execute(
            notes.location,
            "SELECT substr(task_id, 9), retry_count, CAST(metadata AS text) FROM tasks"
            " WHERE name = 'c'",
        )

        assert len(rows) == COUNTERS
        for n, count, metadata in rows:
            counts = json.loads(metadata)
            assert sum(counts.values()) == count
            for name in notes.lines:
                least = notes.counted(name, "done", "increment")[n]
                most = notes.counted(name, "trying")[n] - notes.counted(name, "refused")[n]
                assert least <= counts.get(name, 0) <= most
                assert least == most or name == "process0"  # the others were not killed

    def test_what_was_acknowledged_is_there(self, notes: Notes) -> None:
        stored = {id for (id,) in execute(notes.location, "SELECT task_id FROM tasks")}
        stored = {id for id in stored if not id.startswith("counter-")}

        assert notes.all("done", "add") - notes.all("removing") <= stored
        assert stored <= notes.all("adding") - notes.all("done", "remove")

    def test_outdated_copies_were_really_written(self, notes: Notes) -> None:
        assert notes.all("refused")

    def test_every_cache_equals_the_database(self, notes: Notes) -> None:
        (newest,) = execute(notes.location, "SELECT coalesce(max(revision), 0) FROM changes")[0]

        assert notes.versions == [newest] * 4

    def test_every_watcher_sees_every_revision_once_and_in_order(self, notes: Notes) -> None:
        revisions = [
            revision
            for (revision,) in execute(
                notes.location, "SELECT revision FROM changes ORDER BY revision"
            )
        ]

        assert revisions == list(range(1, len(revisions) + 1))
        assert set(notes.seen) == {f"process{number}" for number in range(4)}
        assert all(seen == revisions for seen in notes.seen.values())
        assert 0 < notes.seen_before_the_kill < len(revisions)
