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
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, closing, contextmanager
from datetime import timedelta
from pathlib import Path

from pyarrow import parquet

from campaigns.faults.children import Child, Send
from campaigns.faults.planted_bugs import planted
from campaigns.harness.campaign import POSTGRESQL, Campaign, Location, Run
from campaigns.harness.direct_access import connect, wait_until_disconnected
from campaigns.workloads.legacy_files import make_original
from openclaw_store import (
    Database,
    KeyRing,
    NodeInfo,
    NodeRepository,
    Progress,
    Retention,
    SealedValueError,
    StateManager,
    Task,
    TaskRepository,
    TaskType,
    copy,
    open_archive,
)
from openclaw_store.archive.retain import retain
from openclaw_store.database.rekeying import key_uses
from openclaw_store.encryption import SealedColumn, key_file

SECRETS = 200
"""Tasks with a secret in each sealed field, in the long form; a tenth of them else."""

FLIPPED = 1000
"""Sealed values of which every bit is flipped, in the long form; one in a hundred of them else."""

_LONGEST_SECONDS = 1.0
"""Latest moment of the first kill after the beginning of a rotation."""


def secret(number: int) -> str:
    """Return the text that is planted into a task."""
    return f"planted-{number:04d}-{number * 7919:08x}"


def secrets_of(run: Run) -> int:
    """Return the number of tasks with a secret."""
    return SECRETS // 10 if run.is_quick else SECRETS


def perform(run: Run) -> None:
    """Kill a rotation in each round, then search for the secrets."""
    file = run.folder / "keys.json"
    key_file.create(file)
    with run.location(migrated=False) as location, planted(run.bug):
        with _logging_to(run.folder / "log.txt"):
            asyncio.run(_fill(run, location, file))
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
            if not number:  # the files of a killed process, before a recovery
                asyncio.run(_search_files(run, location))
            asyncio.run(_check(run, location, file))
            key_file.retire(file, newest - 1)
            asyncio.run(_finish(run, location, file, newest))
        run.notes["rotations interrupted"] = str(interrupted)
        asyncio.run(_search(run, location, file))


def _kill_rotation(run: Run, location: Location, file: Path, number: int, seconds: float) -> bool:
    """Kill a rotation so many seconds after its beginning; return true if it ended before."""
    errors, logs = run.folder / "errors", str(run.folder / "child.log") if not number else None
    with Child(rotate, location, file, number, logs, errors=errors, bug=run.bug) as child:
        for (message,) in child.messages():
            if message == "began":
                time.sleep(seconds)
                child.kill()
            elif message == "ended":
                return True
        run.counts.unknown += 1
    return False


async def rotate(send: Send, location: str, file: str, number: int, logs: str | None) -> None:
    """Rotate the keys of a database, and add tasks meanwhile."""
    if logs is not None:
        logging.basicConfig(filename=logs, level=logging.DEBUG)
        logging.getLogger("sqlalchemy").setLevel(logging.DEBUG)  # else only warnings
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


async def _fill(run: Run, location: Location, file: Path) -> None:
    keys = KeyRing.load(file, seal={"name", "user_id"})
    async with StateManager(Database(location, keys=keys), None) as state:
        for number in range(secrets_of(run)):
            text = secret(number)
            node = NodeInfo(f"n{number}", hostname="host", ip_address=text, tailscale_ip=text)
            await state.add_node(node)
            task = Task.create(
                TaskType.BATCH, text, task_id=f"t{number}", description=text, user_id=text,
                parameters={text: [text]}, metadata={"of": text},
            )  # fmt: skip
            await state.add_task(task)
            [task] = await state.claim_tasks(node.node_id, 1, start=True)
            progress = Progress(task.attempt, 0.5, text, state.db.clock())
            await state.renew_lease(node.node_id, {task.task_id: progress})
            if number % 2:
                await state.release_task(task, text)
                await state.cancel_task(task.task_id, text)
            else:
                await state.complete_task(task, {"found": text})
            await state.drain_node(node.node_id, text)


def _contents(task: Task) -> tuple[object, ...]:
    return (
        task.name,
        task.user_id,
        task.description,
        task.parameters,
        task.metadata,
        task.result,
        task.error,
    )


async def _check(run: Run, location: Location, file: Path) -> None:
    """Check that every task is there and readable, in the middle of a rotation."""
    async with Database(location, keys=KeyRing.load(file)) as database:
        tasks = await TaskRepository(database).get_tasks(
            [f"t{one}" for one in range(secrets_of(run))]
        )
        nodes = await NodeRepository(database).get_all_nodes()
        found_by_user = await TaskRepository(database).list_by_user(secret(0))
    run.check([task.task_id for task in found_by_user] == ["t0"], f"user 0 has {found_by_user}")
    for number, task in enumerate(tasks):
        run.counts.acknowledged += 1
        if task is None:
            run.lost(f"task t{number}")
            continue
        text = secret(number)
        is_cancelled = bool(number % 2)
        expected = (
            *(text, text, text, {text: [text]}, {"of": text}),
            *((None, text) if is_cancelled else ({"found": text}, None)),
        )
        run.check(_contents(task) == expected, f"task t{number} has {_contents(task)}")
    found = {node.node_id: (node.ip_address, node.status_reason) for node in nodes}
    expected_nodes = {f"n{number}": (secret(number),) * 2 for number in range(secrets_of(run))}
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
    places = [
        SealedColumn("tasks", "description", is_json=False),
        SealedColumn("tasks", "result", is_json=True),
        SealedColumn("tasks", "user_id", is_json=False),
    ]
    flips = 0
    async with Database(location, keys=KeyRing.load(file)) as database:
        protection = database.statements.protection
        for number in range(count):
            place, id = places[number % len(places)], f"t{number}"
            load, text = protection.loading(place), secret(number)[: 1 + number % 21]
            stored = protection.storing(place)(id, f'"{text}"' if place.is_json else text)
            for at in range(len(stored)):
                for bit in range(8):
                    flipped = f"{stored[:at]}{chr(ord(stored[at]) ^ 1 << bit)}{stored[at + 1 :]}"
                    flips += 1
                    try:
                        load(id, flipped)
                    except SealedValueError as error:
                        names = error.row_id, error.field
                        run.check(names == (id, place.column), f"the error of {id} names {names}")
                    else:
                        run.wrong(f"a flipped value of {id} opens: {flipped!r}")
    run.notes["bits flipped"] = f"{flips:,}"


async def _search(run: Run, location: Location, file: Path) -> None:
    """Make each kind of copy, and search every file for the secrets."""
    log, keys = run.folder / "later.txt", KeyRing.load(file)
    copies = {"copy": run.folder / "copy.db", "legacy": run.folder / "legacy" / "legacy.db"}
    with _logging_to(log):
        _make_legacy(run, copies["legacy"])
        for name, path in copies.items():
            async with _closing(Database(path, keys=keys)) as target:
                if name == "legacy":
                    await target.initialize()
                    await target.vacuum()
                    continue
                async with Database(location, keys=keys) as database:
                    await database.vacuum()
                    await database.backup(run.folder / "backup")
                    await copy(database, target)
                    policy = Retention(
                        completed=timedelta(0), cancelled=timedelta(0),
                        history=timedelta(0), archive=run.folder / "archive", load=1.0,
                    )  # fmt: skip
                    await retain(database, policy)
                    await _check_archive(run, database, run.folder / "archive")
        for one in copies["legacy"].parent.glob("*.original-*"):
            one.unlink()  # the copy of the user's own file, which the documentation names
        async with Database(location, keys=keys):  # the files of an open database
            await _search_files(run, location, has_copies=True)
    run.check(log.stat().st_size > 10_000, "the log is empty")


async def _search_files(run: Run, location: Location, *, has_copies: bool = False) -> None:
    folders = [run.folder, *([location.parent] if isinstance(location, Path) else [])]
    folders += await _data_folder(location)
    files = {one for folder in folders for one in folder.rglob("*") if one.is_file()}
    # What is compressed is searched as text.
    texts = {f"{one}": _parquet(one) for one in files if one.suffix == ".parquet"}
    if has_copies and not isinstance(location, Path):
        texts["pg_dump"] = await _restored(run.folder / "backup")
    secrets = [secret(number).encode() for number in range(secrets_of(run))]
    for name in sorted({*map(str, files), *texts}):
        content = texts[name] if name in texts else _contents_of(name)
        hits = sum(text in content for text in secrets)
        run.check(not hits, f"{name.rpartition('/')[2]} has {hits} secrets")
    is_archived = len([one for one in texts if one.endswith(".parquet")]) > 1
    run.check(is_archived or not has_copies, "there is no archive")
    run.notes["files searched"] = f"{len(files):,}"


def _contents_of(path: str) -> bytes:
    try:
        return Path(path).read_bytes()
    except FileNotFoundError:  # a server removes some of its files
        return b""


@contextmanager
def _logging_to(path: Path) -> Iterator[None]:
    """Write the messages of all loggers to a file."""
    handler, root = logging.FileHandler(path), logging.getLogger()
    levels = [(one, one.level) for one in (root, logging.getLogger("sqlalchemy"))]
    root.addHandler(handler)
    for logger, _ in levels:  # SQLAlchemy's has a level of its own
        logger.setLevel(logging.DEBUG)
    try:
        yield
    finally:
        root.removeHandler(handler)
        for logger, level in levels:
            logger.setLevel(level)
        handler.close()


@asynccontextmanager
async def _closing(database: Database) -> AsyncIterator[Database]:
    try:
        yield database
    finally:
        await database.close()


def _make_legacy(run: Run, path: Path) -> None:
    """Make a file of the first implementation with the secrets, one of its rows unreadable."""
    path.parent.mkdir()
    with closing(make_original(path)) as original:
        for number in range(secrets_of(run)):
            text = secret(number)
            original.execute(
                "INSERT INTO tasks (task_id, task_type, name, required_skills, status, priority,"
                " description, parameters) VALUES (?, ?, 'x', '[]', 'pending', 2, ?, ?)",
                (
                    f"t{number}",
                    "batch" if number else text,
                    text,
                    f'["{text}"]' if number else text,
                ),
            )
        original.commit()


async def _check_archive(run: Run, database: Database, folder: Path) -> None:
    async with open_archive(folder, database=database) as archive:
        task = await archive.get("t0")
    found = None if task is None else task.result
    run.check(found == {"found": secret(0)}, f"the archive has {found} of t0")


def _parquet(path: Path) -> bytes:
    """Return the values of a Parquet file, which are compressed in it."""
    return repr(parquet.read_table(path).to_pylist()).encode()


async def _restored(dump: Path) -> bytes:
    """Return the SQL of an archive of pg_dump, which is compressed."""
    restoring = await asyncio.create_subprocess_exec(
        "pg_restore", "--file=-", dump, stdout=asyncio.subprocess.PIPE
    )
    sql, _ = await restoring.communicate()
    return sql


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
    bugs={"error-in-clear": "secrets"},
)
