"""Copies, archives, legacy files and backups of databases with keys."""

from __future__ import annotations

import logging
from collections.abc import AsyncIterator
from contextlib import closing
from datetime import timedelta
from functools import partial
from pathlib import Path

import pytest
from conftest import Location, MakeNode, MakeTask, execute
from support.sealing import KEYS, RING, SECRET, files_in, fill, fill_more, retired, rewrite, table

from campaigns.workloads.legacy_files import make_original
from openclaw_store import (
    Database,
    KeyRing,
    SealedValueError,
    StateManager,
    TaskFilter,
    TaskRepository,
    copy,
    verify,
)
from openclaw_store.archive import open_archive
from openclaw_store.archive.restore import restore_tasks
from openclaw_store.archive.retain import retain
from openclaw_store.database.rekeying import key_uses
from openclaw_store.domain import Retention
from openclaw_store.repositories import read_history
from openclaw_store.testing import FakeClock

DAY = timedelta(days=1)


@pytest.fixture
async def sealed(location: Location, clock: FakeClock) -> AsyncIterator[StateManager]:
    """A StateManager on a new database with keys."""
    async with StateManager(Database(location, clock=clock, keys=RING), None) as manager:
        yield manager


@pytest.mark.usefixtures("migrated")
class TestCopies:
    async def test_copy_seals_again_for_its_target(
        self,
        sealed: StateManager,
        another_location: Location,
        clock: FakeClock,
        make_task: MakeTask,
        make_node: MakeNode,
    ) -> None:
        await fill(sealed, make_task, make_node)
        ring = KeyRing(KEYS[1:2], 2)
        target = Database(another_location, clock=clock, keys=ring)
        try:
            done = await copy(sealed.db, target)
        finally:
            await target.close()

        assert SECRET not in repr([table(another_location, one) for one in ("tasks", "changes")])
        async with StateManager(Database(another_location, keys=ring), None) as state:
            task = await state.get_task("t1")
            assert task is not None
            assert task.result == {"answer": SECRET}
            assert {use.key for use in await key_uses(state.db)} == {2}
            assert await verify(state.db)
        assert done.tasks == 3

    async def test_value_of_the_source_does_not_open_in_the_copy(
        self,
        sealed: StateManager,
        location: Location,
        another_location: Location,
        make_task: MakeTask,
    ) -> None:
        await sealed.add_task(make_task(task_id="t1", description=SECRET))
        target = Database(another_location, keys=RING)
        try:
            await copy(sealed.db, target)
        finally:
            await target.close()
        [(stored,)] = execute(location, "SELECT description FROM tasks")
        rewrite(another_location, "tasks", f"description = '{stored}'")

        async with Database(another_location, keys=RING) as database:
            with pytest.raises(SealedValueError, match="cluster"):
                await TaskRepository(database).get("t1")


@pytest.mark.usefixtures("migrated")
class TestArchive:
    async def test_archived_tasks_stay_sealed_and_can_be_restored(
        self,
        sealed: StateManager,
        clock: FakeClock,
        tmp_path: Path,
        make_task: MakeTask,
        make_node: MakeNode,
    ) -> None:
        await fill(sealed, make_task, make_node)
        clock.advance(seconds=90 * 86_400)
        policy = Retention(
            completed=30 * DAY, failed=30 * DAY, cancelled=30 * DAY,
            archive=tmp_path / "archive", load=1.0,
        )  # fmt: skip
        await retain(sealed.db, policy)

        assert await sealed.get_task("t1") is None
        files = files_in(tmp_path / "archive")
        assert len(files) >= 2
        assert [one.name for one in files if SECRET.encode() in one.read_bytes()] == []
        async with open_archive(tmp_path / "archive", database=sealed.db) as archive:
            archived = await archive.get("t1")
            assert archived is not None
            assert archived.result == {"answer": SECRET}
        await restore_tasks(sealed.db, tmp_path / "archive", TaskFilter.everything())
        task = await TaskRepository(sealed.db).get("t1")
        assert task is not None
        assert task.result == {"answer": SECRET}

    async def test_restore_into_another_cluster_seals_again(
        self,
        sealed: StateManager,
        another_location: Location,
        clock: FakeClock,
        tmp_path: Path,
        make_task: MakeTask,
    ) -> None:
        """Some tasks were archived in clear, others are sealed by a key that is retired since."""
        folder = tmp_path / "archive"
        policy = Retention(cancelled=timedelta(0), archive=folder, load=1.0)
        ring = KeyRing([retired(KEYS[0]), KEYS[1]], 2)
        async with StateManager(Database(another_location, clock=clock), None) as state:
            for one, id in ((state, "clear"), (sealed, "sealed")):
                await one.add_task(make_task(task_id=id, description=SECRET))
                await one.cancel_task(id, f"{SECRET} reason")
            clock.advance(seconds=10)
            for one in (state, sealed):
                await retain(one.db, policy)

        async with StateManager(Database(another_location, clock=clock, keys=ring), None) as state:
            done = await restore_tasks(state.db, folder, TaskFilter.everything())
            tasks = await state.get_tasks(["clear", "sealed"])
            histories = [
                await state.db.read(partial(read_history, id=id)) for id in ("clear", "sealed")
            ]
            uses = await key_uses(state.db)

        assert (sorted(done.restored), done.skipped) == (["clear", "sealed"], {})
        assert [task and task.description for task in tasks] == [SECRET] * 2
        assert [[one.reason for one in history if one.reason and SECRET in one.reason]
                for history in histories] == [[f"{SECRET} reason"]] * 2  # fmt: skip
        assert {use.key for use in uses} == {2}


@pytest.mark.sqlite
class TestFiles:
    async def test_import_of_a_legacy_database_seals_it(
        self, location: Path, clock: FakeClock, caplog: pytest.LogCaptureFixture
    ) -> None:
        with closing(make_original(location)) as original:
            original.execute(
                "INSERT INTO tasks (task_id, task_type, name, required_skills, status, priority,"
                f" description) VALUES ('t1', 'batch', 'x', '[]', 'pending', 2, '{SECRET}')"
            )
            original.execute(
                "INSERT INTO tasks (task_id, task_type, name, required_skills, status, priority,"
                f" parameters) VALUES ('t2', '{SECRET}', 'x', '[]', 'pending', 2, '{SECRET}')"
            )
            original.commit()
        with caplog.at_level(logging.DEBUG), caplog.at_level(logging.DEBUG, "sqlalchemy"):
            async with StateManager(Database(location, clock=clock, keys=RING), None) as state:
                task = await state.get_task("t1")
                await state.db.vacuum()
                assert await verify(state.db)
                rewrite(location, "legacy_rejected", "reason = replace(reason, '$00000', '$1')")
                [problem] = (await verify(state.db)).problems

        assert "of 'task:t2' in legacy_rejected" in problem.text
        assert task is not None
        assert task.description == SECRET
        found = [path for path in location.parent.iterdir() if SECRET.encode() in path.read_bytes()]
        assert [".original-" in path.name for path in found] == [True]
        assert SECRET not in caplog.text
        assert "FROM legacy_rejected" in caplog.text

    async def test_no_file_and_no_log_has_a_secret(
        self,
        location: Path,
        tmp_path: Path,
        make_task: MakeTask,
        make_node: MakeNode,
        caplog: pytest.LogCaptureFixture,
    ) -> None:
        """A database that was in clear first, then sealed, rotated, backed up and copied."""
        async with StateManager(Database(location), None) as state:
            await fill(state, make_task, make_node)
        ring = KeyRing(KEYS[:2], 2)
        with caplog.at_level(logging.DEBUG), caplog.at_level(logging.DEBUG, "sqlalchemy"):
            async with StateManager(Database(location, keys=RING), None) as state:
                await state.db.rekey()
                await state.db.vacuum()
                await state.db.backup(tmp_path / "backup.db")
                await fill_more(state, make_task)
            async with Database(location, keys=ring) as database:
                await database.rekey()
                await database.backup(tmp_path / "second.db")
                target = Database(tmp_path / "copy.db", keys=ring)
                await copy(database, target)
                await target.close()
                files = files_in(tmp_path)
                found = [path.name for path in files if SECRET.encode() in path.read_bytes()]

        assert len(files) >= 4
        assert found == []
        assert SECRET not in caplog.text
