"""A wait for writes to a file."""

from __future__ import annotations

import asyncio
import os
import select
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path

import pytest
from conftest import PATIENCE, MakeTask, until

from openclaw_store import Database, TaskRepository
from openclaw_store.backends import notifications
from openclaw_store.backends.sqlite.file_watch import FileWatch

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="only Linux reports writes")


@pytest.fixture
def watch(tmp_path: Path) -> Iterator[FileWatch]:
    (tmp_path / "file").touch()
    with closing(FileWatch()) as watch:
        assert watch.start(tmp_path / "file")
        yield watch


def test_write_to_the_file_alone_is_reported_once(watch: FileWatch, tmp_path: Path) -> None:
    (tmp_path / "another").write_text("text")
    assert not watch.wait(0)
    with (tmp_path / "file").open("r+b", buffering=0) as file:
        for _ in range(1000):
            file.write(b"text")
    assert watch.wait(PATIENCE)
    while watch.wait(0):
        pass
    assert not watch.wait(0)


async def test_wait_is_ended_by_another_thread(watch: FileWatch) -> None:
    waiting = asyncio.create_task(asyncio.to_thread(watch.wait, PATIENCE))
    await asyncio.sleep(0.01)
    watch.stop()
    async with asyncio.timeout(PATIENCE / 2):
        assert await waiting is False
    assert not watch.wait(PATIENCE)


def test_file_that_is_missing_is_not_watched(watch: FileWatch, tmp_path: Path) -> None:
    assert not watch.start(tmp_path / "missing")
    (tmp_path / "file").write_text("text")
    assert not watch.wait(0)


async def test_commit_long_after_its_writes_does_not_end_the_reports(
    tmp_path: Path, make_task: MakeTask, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Planted: after a slow disk, a file is polled as if the system reported nothing."""
    written, waits = threading.Event(), 0

    class Reports(FileWatch):
        def start(self, path: Path) -> bool:
            return True

        def wait(self, seconds: float) -> bool:
            nonlocal waits
            waits += 1
            if written.is_set():
                written.clear()
                return True
            time.sleep(seconds)
            return False

    monkeypatch.setattr(notifications, "FileWatch", Reports)
    async with Database(tmp_path / "cluster.db") as database:
        seen: list[tuple[int, int]] = []
        polling = database.follow(lambda *counters: seen.append(counters))
        await until(lambda: seen and waits)
        written.set()
        await until(lambda: not written.is_set())
        last = waits
        await until(lambda: waits > last)  # it waits again, and the commit is not there yet
        await TaskRepository(database).create(make_task())
        await until(lambda: seen[-1][0] == 1)
        last = waits
        await until(lambda: waits > last + 2)
        await polling.stop()


async def test_interrupted_stop_closes_the_files(tmp_path: Path) -> None:
    """Planted: the second call finds that it is stopped, and the files stay open."""
    async with Database(tmp_path / "cluster.db") as database:
        await database.follow(lambda *_: None).stop()
        before = len(os.listdir("/proc/self/fd"))
        for _ in range(3):
            polling = database.follow(lambda *_: None)
            stopping = asyncio.create_task(polling.stop())
            await asyncio.sleep(0)
            stopping.cancel()
            await asyncio.wait([stopping])
            await polling.stop()
        await until(lambda: len(os.listdir("/proc/self/fd")) <= before)


def test_other_systems_report_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "platform", "win32")
    monkeypatch.delattr(select, "poll")
    (tmp_path / "file").touch()
    with closing(FileWatch()) as watch:
        assert not watch.start(tmp_path / "file")
        assert not watch.wait(PATIENCE)
        watch.stop()
