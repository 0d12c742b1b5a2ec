"""`kill -9` of rotations of keys, and a search for secrets in every file.

A process seals all values again by a new key, while it also adds tasks; it is killed at any moment.
Each task must stay readable with its content, and the next rotation must continue. At the end, no
secret may be in any file: of the database, of a backup, of a copy, of the server or of the logs.
Every bit of sealed values is flipped, too: each must be an error that names its row.
"""

from __future__ import annotations

import asyncio
import logging
import time
from pathlib import Path

from campaigns.faults.children import Child, Send
from campaigns.harness.campaign import POSTGRESQL, Campaign, Location, Run
from campaigns.harness.direct_access import connect, wait_until_disconnected
from openclaw_store import (
    Database,
    KeyRing,
    NodeInfo,
    NodeRepository,
    SealedValueError,
    StateManager,
    Task,
    TaskRepository,
    TaskType,
    copy,
)
from openclaw_store.database.rekeying import key_uses
from openclaw_store.encryption import SealedColumn, key_file

SECRETS = 200
"""Tasks with a secret in each sealed field."""

FLIPPED = 1000
"""Sealed values of which every bit is flipped, in the long form; one in a hundred of them else."""

_LONGEST_SECONDS = 1.0
"""Latest moment of the first kill after the beginning of a rotation."""


def secret(number: int) -> str:
    """Return the text that is planted into a task."""
    return f"planted-{number:04d}-{number * 7919:08x}"


def perform(run: Run) -> None:
    """Kill a rotation in each round, then search for the secrets."""
    file = run.folder / "keys.json"
    key_file.create(file)
    with run.location(migrated=False) as location:
        asyncio.run(_fill(location, file))
        asyncio.run(_flip(run, location, file, FLIPPED // (100 if run.is_quick else 1)))
        interrupted, longest = 0, _LONGEST_SECONDS
        for number in run.each_round():
            newest = key_file.add(file)
            seconds = run.random.uniform(0, longest)
            if _kill_rotation(run, location, file, number, seconds):
                longest *= 0.7
            else:
                longest, interrupted = longest * 1.1, interrupted + 1
            if run.kind == POSTGRESQL:
                wait_until_disconnected(location)
            asyncio.run(_check(run, location, file))
            key_file.retire(file, newest - 1)
            asyncio.run(_finish(run, location, file, newest))
        run.notes["rotations interrupted"] = str(interrupted)
        asyncio.run(_search(run, location, file))


def _kill_rotation(run: Run, location: Location, file: Path, number: int, seconds: float) -> bool:
    """Kill a rotation so many seconds after its beginning; return true if it ended before."""
    errors = run.folder / "errors"
    with Child(rotate, location, file, number, errors=errors) as child:
        for (message,) in child.messages():
            if message == "began":
                time.sleep(seconds)
                child.kill()
            elif message == "ended":
                return True
        run.counts.unknown += 1
    return False


async def rotate(send: Send, location: str, file: str, number: int) -> None:
    """Rotate the keys of a database, and add tasks meanwhile."""
    place: Location = location if "://" in location else Path(location)
    async with Database(place, keys=KeyRing.load(file)) as database:
        send("began")

        async def add() -> None:
            for step in range(20):
                id = f"during-{number}-{step}"
                task = Task.create(TaskType.BATCH, "x", task_id=id, description=secret(0))
                await TaskRepository(database).create(task)

        await asyncio.gather(database.rekey(), add())
        send("ended")


async def _fill(location: Location, file: Path) -> None:
    async with StateManager(Database(location, keys=KeyRing.load(file)), None) as state:
        for number in range(SECRETS):
            text = secret(number)
            node = NodeInfo(f"n{number}", hostname="host", ip_address=text, tailscale_ip=text)
            await state.add_node(node)
            task = Task.create(
                TaskType.BATCH, "x", task_id=f"t{number}", description=text,
                parameters={text: [text]}, metadata={"of": text},
            )  # fmt: skip
            await state.add_task(task)
            [task] = await state.claim_tasks(node.node_id, 1, start=True)
            if number % 2:
                await state.release_task(task, text)
                await state.cancel_task(task.task_id, text)
            else:
                await state.complete_task(task, {"found": text})


def _contents(task: Task) -> tuple[object, ...]:
    return task.description, task.parameters, task.metadata, task.result, task.error


async def _check(run: Run, location: Location, file: Path) -> None:
    """Check that every task is there and readable, in the middle of a rotation."""
    async with Database(location, keys=KeyRing.load(file)) as database:
        tasks = await TaskRepository(database).get_tasks([f"t{one}" for one in range(SECRETS)])
        nodes = await NodeRepository(database).get_all_nodes()
    for number, task in enumerate(tasks):
        run.counts.acknowledged += 1
        if task is None:
            run.lost(f"task t{number}")
            continue
        text = secret(number)
        is_cancelled = bool(number % 2)
        expected = (
            *(text, {text: [text]}, {"of": text}),
            *((None, text) if is_cancelled else ({"found": text}, None)),
        )
        run.check(_contents(task) == expected, f"task t{number} has {_contents(task)}")
    found = {node.node_id: node.ip_address for node in nodes}
    expected_nodes = {f"n{number}": secret(number) for number in range(SECRETS)}
    run.check(found == expected_nodes, f"{len(found)} nodes are not as they were")


async def _finish(run: Run, location: Location, file: Path, newest: int) -> None:
    """Check that the rotation continues, and that no value is left under another key."""
    async with Database(location, keys=KeyRing.load(file)) as database:
        done = await database.rekey()
        run.check(bool(done), f"values that cannot be opened: {done.problems[:3]}")
        keys = {use.key for use in await key_uses(database)}
        run.check(keys == {newest}, f"after a rotation to {newest}, values are sealed by {keys}")


async def _flip(run: Run, location: Location, file: Path, count: int) -> None:
    """Flip each bit of sealed values: each flip must be an error that names the row."""
    place, flips = SealedColumn("tasks", "description", is_json=False), 0
    async with Database(location, keys=KeyRing.load(file)) as database:
        protection = database.statements.protection
        store, load = protection.storing(place), protection.loading(place)
        for number in range(count):
            id = f"t{number}"
            stored = store(id, secret(number)[: 1 + number % 21])
            for at in range(len(stored)):
                for bit in range(8):
                    flipped = f"{stored[:at]}{chr(ord(stored[at]) ^ 1 << bit)}{stored[at + 1 :]}"
                    flips += 1
                    try:
                        load(id, flipped)
                    except SealedValueError as error:
                        names = error.row_id, error.field
                        run.check(names == (id, "description"), f"the error of {id} names {names}")
                    else:
                        run.wrong(f"a flipped value of {id} opens: {flipped!r}")
    run.notes["bits flipped"] = f"{flips:,}"


async def _search(run: Run, location: Location, file: Path) -> None:
    """Search every file for the secrets."""
    log = run.folder / "log.txt"
    handler, root = logging.FileHandler(log), logging.getLogger()
    level = root.level
    root.addHandler(handler)
    root.setLevel(logging.DEBUG)
    try:
        async with Database(location, keys=KeyRing.load(file)) as database:
            await TaskRepository(database).get_tasks([f"t{one}" for one in range(SECRETS)])
            await database.backup(run.folder / "backup")
            target = Database(run.folder / "copy.db", keys=KeyRing.load(file))
            try:
                await copy(database, target)
            finally:
                await target.close()
            folders = [run.folder, *([location.parent] if isinstance(location, Path) else [])]
            folders += await _data_folder(location)
            files = {one for folder in folders for one in folder.rglob("*") if one.is_file()}
            texts = [secret(number).encode() for number in range(SECRETS)]
            for one in sorted(files):
                try:
                    content = one.read_bytes()
                except FileNotFoundError:  # a server removes some of its files
                    continue
                hits = sum(text in content for text in texts)
                run.check(not hits, f"{one.name} has {hits} secrets")
    finally:
        root.removeHandler(handler)
        root.setLevel(level)
        handler.close()
    run.notes["files searched"] = f"{len(files):,}"
    run.check(log.stat().st_size > 10_000, "the log is empty")


async def _data_folder(location: Location) -> list[Path]:
    """Return the folder of a server's data, with its WAL and its log; none for a file."""
    if isinstance(location, Path):
        return []
    connection = await connect(location)
    try:
        return [Path(await connection.fetchval("SHOW data_directory"))]
    finally:
        await connection.close()


CAMPAIGN = Campaign(
    name="keys",
    title="kill -9 of rotations of keys, flipped bits, and a search of all files for secrets",
    promises=("P1", "P2"),
    perform=perform,
    rounds=100,
    quick_rounds=2,
    unit="kills",
)
