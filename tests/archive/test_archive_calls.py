"""The archive by a `StateManager`, on an object store, and without its packages."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from conftest import Location, MakeTask, until

import openclaw_store.archive
from openclaw_store import (
    Database,
    InvalidDataError,
    KeyRing,
    Retention,
    StateManager,
    TaskFilter,
    TaskStatus,
    UnavailableError,
    open_archive,
)
from openclaw_store.archive.check import verify_archive
from openclaw_store.archive.compaction import compact_archive
from openclaw_store.encryption import key_file
from openclaw_store.errors import SealedValueError
from openclaw_store.testing import FakeClock

DAY = timedelta(days=1)

SECRET = "the quick brown fox"


async def test_live_and_archived_tasks_are_found_together(
    manager: StateManager, make_task: MakeTask, clock: FakeClock, tmp_path: Path
) -> None:
    names = []
    for number in range(9):
        status = TaskStatus.COMPLETED if number % 2 else TaskStatus.PENDING
        task = make_task(task_id=f"t{number}", status=status, user_id="ann")
        await manager.add_task(task)
        names.append(task.task_id)
        clock.advance(seconds=1)
    done = await manager.apply_retention(Retention(completed=timedelta(0), archive=tmp_path))

    assert done.tasks == 4
    async with open_archive(tmp_path, clock=clock) as archive:
        found = [task.task_id async for task in manager.iter_tasks(archive=archive)]
        assert found == names[::-1]
        of_ann = manager.iter_tasks(TaskFilter(user="ann"), archive=archive)
        assert [task.task_id async for task in of_ann] == names[::-1]
        for name in names:
            one = await manager.find_task(name, archive)
            assert one is not None
            assert one.task_id == name
        assert await manager.find_task("nothing", archive) is None
        assert await manager.get_task("t1") is None
    restored = await manager.restore_tasks(TaskFilter.everything(), tmp_path)
    assert sorted(restored.restored) == ["t1", "t3", "t5", "t7"]
    assert await manager.get_task("t1") is not None
    with pytest.raises(InvalidDataError, match="archive: is missing"):
        await manager.find_task("t1")
    with pytest.raises(InvalidDataError, match="retention: must be a Retention"):
        await manager.apply_retention()


@pytest.mark.sqlite
async def test_pages_of_many_live_and_archived_tasks_are_merged(
    manager: StateManager, make_task: MakeTask, clock: FakeClock, tmp_path: Path
) -> None:
    """Each place has more than a page: first the live ones, then the archived, then both."""
    tasks = []
    for number in range(900):
        is_old = number < 300 or (number >= 600 and number % 2)
        status = TaskStatus.COMPLETED if is_old else TaskStatus.PENDING
        tasks.append(make_task(task_id=f"t{number:03d}", status=status, submitted_at=clock()))
        clock.advance(seconds=number % 3 == 0)
    await manager.add_tasks(tasks)
    await manager.apply_retention(Retention(completed=timedelta(0), archive=tmp_path, load=1))

    async with open_archive(tmp_path) as archive:
        found = [task.task_id async for task in manager.iter_tasks(archive=archive)]

    assert found == [task.task_id for task in reversed(tasks)]


async def test_manager_applies_its_policy(
    location: Location, make_task: MakeTask, clock: FakeClock, tmp_path: Path
) -> None:
    policy = Retention(completed=DAY, archive=tmp_path / "archive", load=1, interval_seconds=0.01)
    async with StateManager(Database(location, clock=clock), None, retention=policy) as state:
        await state.add_task(make_task(task_id="old", status=TaskStatus.COMPLETED))
        clock.advance(days=2)
        await until(lambda: [*(tmp_path / "archive").rglob("*.json")])
        found = await state.find_task("old")
        assert found is not None


async def test_policy_without_an_archive_deletes(
    manager: StateManager, make_task: MakeTask, clock: FakeClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It needs none of the packages of the extra."""
    monkeypatch.setattr(openclaw_store.archive, "find_spec", lambda name: None)
    for status in (TaskStatus.COMPLETED, TaskStatus.FAILED):
        await manager.add_task(make_task(task_id=status.value, status=status))
    clock.advance(days=2)

    done = await manager.apply_retention(Retention(completed=DAY, history=DAY))

    assert (done.tasks, done.changes) == (1, 1)
    assert await manager.get_task("completed") is None
    assert await manager.get_task("failed") is not None
    with pytest.raises(UnavailableError, match="pip install"):
        await manager.apply_retention(Retention(completed=DAY, archive="./archive"))


def test_library_does_not_import_pyarrow_by_itself() -> None:
    program = "import sys, openclaw_store as o; [getattr(o, n) for n in o.__all__]; "
    program += "sys.exit('pyarrow' in sys.modules)"

    assert subprocess.run([sys.executable, "-c", program], check=False).returncode == 0


@pytest.fixture
def bucket(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """A folder in a bucket of a server that is compatible with S3."""
    import boto3  # here, as these take seconds of every process that collects tests
    from moto.server import ThreadedMotoServer

    server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    server.start()
    host, port = server.get_host_and_port()
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.setenv(name, "testing")
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    endpoint = f"http://{host}:{port}"
    client = boto3.client("s3", endpoint_url=endpoint, region_name="us-east-1")
    client.create_bucket(Bucket="bucket")
    client.close()
    yield f"s3://bucket/folder?endpoint_override={endpoint}&region=us-east-1"
    server.stop()


@pytest.mark.sqlite
async def test_archive_in_a_bucket(
    manager: StateManager, make_task: MakeTask, clock: FakeClock, bucket: str
) -> None:
    for number in range(4):
        user = f"u{number % 2}"
        task = make_task(task_id=f"t{number}", status=TaskStatus.COMPLETED, user_id=user)
        await manager.add_task(task)
        clock.advance(seconds=1)
        if number % 2:
            policy = Retention(completed=timedelta(0), archive=bucket, load=1)
            await manager.apply_retention(policy)

    async with open_archive(bucket) as archive:
        assert await archive.count_tasks() == 4
        found = await archive.get("t2")
        assert found is not None
        assert found.user_id == "u0"
    assert (await manager.restore_tasks(TaskFilter(user="u0"), bucket)).restored
    done = await compact_archive(manager.db, bucket)
    assert done.voids == 2
    assert await verify_archive(bucket)
    async with open_archive(bucket) as archive:
        assert {task.task_id async for task in archive.iter_tasks()} == {"t1", "t3"}


async def test_sealed_values_stay_sealed_in_the_files(
    location: Location, make_task: MakeTask, clock: FakeClock, tmp_path: Path
) -> None:
    folder, file = tmp_path / "archive", tmp_path / "keys.json"
    key_file.create(file)
    keys = KeyRing.load(file)
    async with StateManager(Database(location, clock=clock, keys=keys), None) as state:
        task = make_task(task_id="t1", description=SECRET, parameters={SECRET: SECRET})
        await state.add_task(task)
        task.status, task.error = TaskStatus.FAILED, SECRET
        await state.update_task(task)
        before = await state.get_task("t1")
        history = await state.history("t1")
        clock.advance(days=2)

        await state.apply_retention(Retention(failed=DAY, history=DAY, archive=folder, load=1))

        assert await state.get_task("t1") is None
        files = [path for path in folder.rglob("*") if path.is_file()]
        assert [path for path in files if SECRET.encode() in unpacked(path)] == []
        assert len(files) >= 2
        async with open_archive(folder) as archive:
            with pytest.raises(SealedValueError, match="has no keys"):
                await archive.get("t1")
        async with open_archive(folder, database=state.db) as archive:
            assert await archive.get("t1") == before
            assert (await archive.history("t1"))[: len(history)] == history
            with pytest.raises(InvalidDataError, match="error_contains: is a search in sealed"):
                await archive.list_tasks(TaskFilter(error_contains=SECRET))
        if isinstance(location, Path):  # the same on PostgreSQL, and a process takes seconds
            assert SECRET in await asyncio.to_thread(shown_by_command, location, file, folder)
        await state.restore_tasks(TaskFilter.everything(), folder)
        found = await state.get_task("t1")
        assert found is not None
        assert (found.description, found.parameters, found.error) == (
            SECRET, {SECRET: SECRET}, SECRET,
        )  # fmt: skip


def shown_by_command(location: Path, keys: Path, folder: Path) -> str:
    """Return the output of the command that shows the task of an archive."""
    query = [sys.executable, "-m", "openclaw_store", "archive", "query", str(folder), "--id", "t1"]
    variables = {"OPENCLAW_STORE_KEYS": str(keys), "OPENCLAW_STORE_URL": str(location)}
    environment = {**os.environ, **variables}
    done = subprocess.run(query, env=environment, capture_output=True, text=True, check=True)
    return done.stdout


def unpacked(path: Path) -> bytes:
    """Return the raw bytes of a file, and those of its columns, which are compressed there."""
    contents = path.read_bytes()
    if path.suffix == ".parquet":
        contents += repr(pq.ParquetFile(path).read().to_pylist()).encode()
    return contents
