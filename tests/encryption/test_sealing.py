"""Databases with keys: what is sealed, what is refused, and rotation."""

from __future__ import annotations

import asyncio
import logging
import os
import subprocess
import sys
from collections.abc import AsyncIterator, Callable
from contextlib import closing
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from conftest import Location, MakeNode, MakeTask, execute
from sqlalchemy import select

from campaigns.workloads.legacy_files import make_original
from openclaw_store import (
    Database,
    InvalidDataError,
    KeyRing,
    KeyRingError,
    Progress,
    Sealed,
    SealedValueError,
    StateManager,
    TaskFilter,
    TaskRepository,
    TaskStatus,
    copy,
    verify,
)
from openclaw_store.archive import open_archive
from openclaw_store.archive.restore import restore_tasks
from openclaw_store.archive.retain import retain
from openclaw_store.database import ChangeRow, NodeRow, SealingKeyRow, TaskRow
from openclaw_store.database.rekeying import key_uses
from openclaw_store.domain import Retention
from openclaw_store.encryption import Key, KeyState, key_file
from openclaw_store.maintenance.doctor import Level, diagnose
from openclaw_store.maintenance.failures import find_failures
from openclaw_store.repositories import read_history
from openclaw_store.testing import FakeClock

KEYS = [Key(id, bytes([id] * 32)) for id in (1, 2, 3)]
RING = KeyRing(KEYS[:1], 1)
SECRET = "my-secret"
DAY = timedelta(days=1)

Open = Callable[..., Any]


def retired(key: Key) -> Key:
    return replace(key, state=KeyState.RETIRED)


@pytest.fixture
async def sealed(location: Location, clock: FakeClock) -> AsyncIterator[StateManager]:
    """A StateManager on a new database with keys."""
    async with StateManager(Database(location, clock=clock, keys=RING), None) as manager:
        yield manager


def table(location: Location, name: str) -> list[tuple[Any, ...]]:
    return sorted(execute(location, f"SELECT * FROM {name}"), key=repr)


def rewrite(location: Location, name: str, change: str) -> None:
    execute(location, f"UPDATE {name} SET {change}")


async def fill(state: StateManager, make_task: MakeTask, make_node: MakeNode) -> None:
    """Put the secret into each sealed field."""
    node = make_node(node_id="n1", ip_address=f"{SECRET}-1", tailscale_ip=f"{SECRET}-2")
    await state.add_node(node)
    secrets = {"description": f"{SECRET} 你好", "parameters": {"a": [SECRET]}}
    await state.add_task(make_task(task_id="t1", metadata={SECRET: SECRET}, **secrets))
    await state.add_tasks([make_task(task_id="bulk", **secrets)])
    bulk, task = sorted(await state.claim_tasks("n1", 2), key=lambda one: one.task_id)
    for one in (task, bulk):
        await state.start_task(one)
    at = datetime(2026, 3, 1, tzinfo=UTC)
    await state.renew_lease("n1", {"t1": Progress(1, 0.5, SECRET, at)})
    await state.complete_task(task, {"answer": SECRET})
    await state.fail_task(bulk, f"{SECRET} broke it", retry=False)
    await state.add_task(make_task(task_id="t3"))
    await state.cancel_task("t3", f"{SECRET} is the reason")


class TestContents:
    async def test_values_are_sealed_in_the_database_and_clear_for_all_processes(
        self,
        sealed: StateManager,
        location: Location,
        clock: FakeClock,
        make_task: MakeTask,
        make_node: MakeNode,
    ) -> None:
        other = StateManager(Database(location, clock=clock, keys=RING), None)
        async with other:
            await fill(sealed, make_task, make_node)
            await other.refresh_from_database()
            rows = [table(location, name) for name in ("tasks", "nodes", "changes")]

            assert SECRET not in repr(rows)
            for state in (sealed, other):
                found = {
                    task.task_id: task for task in await state.get_tasks(["t1", "bulk"]) if task
                }
                assert found["t1"].parameters == {"a": [SECRET]}
                assert found["t1"].metadata == {SECRET: SECRET}
                assert found["t1"].result == {"answer": SECRET}
                assert found["t1"].description == f"{SECRET} 你好"
                assert found["bulk"].error == f"{SECRET} broke it"
                node = await state.get_node("n1")
                assert node is not None
                assert (node.ip_address, node.tailscale_ip) == (f"{SECRET}-1", f"{SECRET}-2")
            history = await other.db.read(lambda session: read_history(session, "t3"))
            assert history[-1].reason == f"{SECRET} is the reason"
        assert await verify(sealed.db)

    async def test_later_process_and_process_without_cache_read_clear_values(
        self,
        sealed: StateManager,
        location: Location,
        clock: FakeClock,
        make_task: MakeTask,
        make_node: MakeNode,
    ) -> None:
        await fill(sealed, make_task, make_node)
        for cache in (True, False):
            database = Database(location, clock=clock, keys=RING)
            async with StateManager(database, None, cache=cache) as later:
                task = await later.get_task("t1")
                assert task is not None
                assert task.result == {"answer": SECRET}
                page = await later.list_tasks(TaskFilter(status=TaskStatus.FAILED))
                assert [one.error for one in page] == [f"{SECRET} broke it"]

    async def test_progress_is_sealed(
        self,
        sealed: StateManager,
        location: Location,
        make_task: MakeTask,
        make_node: MakeNode,
    ) -> None:
        await sealed.add_node(make_node(node_id="n1"))
        await sealed.add_task(make_task(task_id="t1"))
        [task] = await sealed.claim_tasks("n1", 1, start=True)
        at = datetime(2026, 3, 1, tzinfo=UTC)
        await sealed.renew_lease("n1", {"t1": Progress(task.attempt, 0.5, SECRET, at)})

        assert SECRET not in repr(table(location, "nodes"))
        found = await sealed.get_progress("t1")
        assert found is not None
        assert found.note == SECRET

    async def test_updates_seal_again_and_transactions_read_their_own_writes(
        self, sealed: StateManager, location: Location, make_task: MakeTask
    ) -> None:
        await sealed.add_task(make_task(task_id="t1"))
        async with sealed.db.transaction() as tx:
            task = await TaskRepository(tx).get("t1")
            assert task is not None
            task.parameters = {"b": SECRET}
            await TaskRepository(tx).update(task)
            again = await TaskRepository(tx).get("t1")
            assert again is not None
            assert again.parameters == {"b": SECRET}

        assert SECRET not in repr(table(location, "tasks"))

    async def test_failures_are_grouped_by_the_clear_error(
        self,
        sealed: StateManager,
        clock: FakeClock,
        make_task: MakeTask,
        make_node: MakeNode,
    ) -> None:
        await fill(sealed, make_task, make_node)
        sql = sealed.db.statements
        async with sealed.db.session() as session:
            found = await session.run_sync(
                lambda sync: find_failures(sync.connection(), sql, datetime(2000, 1, 1, tzinfo=UTC))
            )

        assert [one.text for one in found.groups] == ["my-secret broke it"]

    @pytest.mark.parametrize("has_keys", [False, True])
    async def test_texts_that_look_sealed_come_back_as_they_were(
        self, location: Location, make_task: MakeTask, make_node: MakeNode, has_keys: bool
    ) -> None:
        """Planted: a text with the prefix is not escaped."""
        odd = "$sealed$000001$YWJj"
        keys = RING if has_keys else None
        async with StateManager(Database(location, keys=keys), None) as state:
            await state.add_node(make_node(node_id="n1", ip_address=odd))
            task = make_task(task_id="t1", description=odd, parameters={odd: odd}, result=odd)
            await state.add_task(task)
            await state.cancel_task("t1", odd)
        async with StateManager(Database(location, keys=keys), None) as state:
            found, node = await state.get_task("t1"), await state.get_node("n1")
            history = await state.db.read(lambda session: read_history(session, "t1"))
            async with state.db.session() as session:
                row = (await session.execute(select(TaskRow))).scalar_one()

        assert found is not None
        assert node is not None
        assert (found.description, found.result, found.error) == (odd, odd, odd)
        assert (row.description, row.result) == (odd, odd)
        assert found.parameters == {odd: odd}
        assert (node.ip_address, history[-1].reason) == (odd, odd)

    async def test_searches_in_sealed_fields_are_refused_by_name(
        self, sealed: StateManager, make_task: MakeTask
    ) -> None:
        for name, filter in (
            ("error_contains", TaskFilter(error_contains="x")),
            ("metadata", TaskFilter(metadata={"a": 1})),
        ):
            for call in (sealed.list_tasks, sealed.count_tasks):
                with pytest.raises(InvalidDataError, match="sealed values") as error:
                    await call(filter)
                assert error.value.field == name

    async def test_own_queries_get_sealed_values_and_entities_in_clear(
        self, sealed: StateManager, make_task: MakeTask, make_node: MakeNode
    ) -> None:
        await fill(sealed, make_task, make_node)
        async with sealed.db.session() as session:
            value = await session.scalar(select(TaskRow.parameters).where(TaskRow.task_id == "t1"))
            task = (await session.scalars(select(TaskRow).where(TaskRow.task_id == "t1"))).one()
            node = (await session.scalars(select(NodeRow))).one()
            change = (
                await session.scalars(
                    select(ChangeRow).where(
                        ChangeRow.item_id == "t3", ChangeRow.reason.is_not(None)
                    )
                )
            ).one()

        assert isinstance(value, Sealed)
        assert value.key_id == "000001"
        assert SECRET not in repr(value)
        assert sealed.db.unseal(value, "t1") == {"a": [SECRET]}
        with pytest.raises(SealedValueError):
            sealed.db.unseal(value, "t2")
        assert (task.parameters, task.metadata_) == ({"a": [SECRET]}, {SECRET: SECRET})
        assert node.ip_address == f"{SECRET}-1"
        assert change.reason == f"{SECRET} is the reason"


class TestDamage:
    async def test_damaged_and_swapped_values_stop_only_their_row(
        self,
        sealed: StateManager,
        location: Location,
        clock: FakeClock,
        make_task: MakeTask,
    ) -> None:
        for id in ("good", "bad", "moved"):
            await sealed.add_task(make_task(task_id=id, description=f"{SECRET} of {id}"))
        source = "SELECT description FROM (SELECT * FROM tasks) AS one WHERE task_id = 'good'"
        rewrite(
            location,
            "tasks",
            "description = replace(description, '$00000', '$00010') WHERE task_id = 'bad'",
        )
        rewrite(location, "tasks", f"description = ({source}) WHERE task_id = 'moved'")

        for cache in (True, False):
            database = Database(location, clock=clock, keys=RING)
            async with StateManager(database, None, cache=cache) as later:
                found = await later.get_task("good")
                assert found is not None
                assert found.description == f"{SECRET} of good"
                for id in ("bad", "moved"):
                    with pytest.raises(InvalidDataError, match="description") as error:
                        await later.get_task(id)
                    assert id in str(error.value)
                    assert SECRET not in str(error.value)
        problems = (await verify(sealed.db)).problems
        assert {problem.item_id for problem in problems} == {"bad", "moved"}

    async def test_value_in_clear_is_refused_and_rotation_reports_it(
        self, sealed: StateManager, location: Location, make_task: MakeTask
    ) -> None:
        await sealed.add_task(make_task(task_id="t1", description=SECRET))
        rewrite(location, "tasks", "description = 'planted'")
        repository = TaskRepository(sealed.db)

        with pytest.raises(SealedValueError, match="accept-clear"):
            await repository.get("t1")
        assert not await sealed.db.rekey()
        assert await sealed.db.rekey(accept_clear=True)
        found = await repository.get("t1")
        assert found is not None
        assert found.description == "planted"


class TestKeys:
    async def test_database_is_opened_only_with_its_keys(
        self, sealed: StateManager, location: Location, make_task: MakeTask
    ) -> None:
        await sealed.add_task(make_task(task_id="t1", description=SECRET))
        wrong = KeyRing([Key(1, bytes(32))], 1)
        for keys, said in (
            (None, "keys 1"),
            (wrong, "not the key 1"),
            (KeyRing(KEYS[1:2], 2), "key 1"),
        ):
            database = Database(location, keys=keys)
            try:
                with pytest.raises(KeyRingError, match=said) as error:
                    await database.initialize()
                assert error.value.key_id == 1
            finally:
                await database.close()

    async def test_process_that_was_open_without_keys_gets_an_error_not_cipher_text(
        self, location: Location, clock: FakeClock, make_task: MakeTask
    ) -> None:
        async with Database(location, clock=clock) as old:
            async with StateManager(Database(location, clock=clock, keys=RING), None) as state:
                await state.add_task(make_task(task_id="t1", description=SECRET))
            with pytest.raises(SealedValueError, match="no keys"):
                await TaskRepository(old).get("t1")

    async def test_keys_of_a_provider_are_unwrapped_once(
        self, location: Location, make_task: MakeTask
    ) -> None:
        asked: list[int] = []

        class Provider:
            async def unwrap(self, id: int, wrapped: bytes) -> bytes:
                asked.append(id)
                return bytes(reversed(wrapped))

        ring = KeyRing([Key(1, None, wrapped=bytes(range(32)))], 1, Provider())
        async with StateManager(Database(location, keys=ring), None) as state:
            await state.add_task(make_task(task_id="t1", description=SECRET))
        plain = KeyRing([Key(1, bytes(reversed(range(32))))], 1)
        async with StateManager(Database(location, keys=plain), None) as state:
            task = await state.get_task("t1")

        assert asked == [1]
        assert task is not None
        assert task.description == SECRET

    async def test_failing_provider_is_named(self, location: Location) -> None:
        class Provider:
            async def unwrap(self, id: int, wrapped: bytes) -> bytes:
                raise OSError("no route to the service")

        ring = KeyRing([Key(1, None, wrapped=b"x")], 1, Provider())
        database = Database(location, keys=ring)
        with pytest.raises(KeyRingError, match="did not unwrap key 1: OSError"):
            await database.initialize()
        await database.close()

    @pytest.mark.sqlite
    async def test_variable_names_the_file(
        self, location: Location, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        key_file.create(tmp_path / "keys.json")
        monkeypatch.setenv("OPENCLAW_STORE_KEYS", str(tmp_path / "keys.json"))

        async with Database(location) as database:
            assert database.keys is not None
            assert [one.level for one in await diagnose(database) if one.name == "encryption"] == [
                Level.OK
            ]

    def test_without_keys_cryptography_is_not_imported(self, tmp_path: Path) -> None:
        script = (
            "import asyncio, sys\n"
            "from openclaw_store import *\n"
            "async def main():\n"
            f"    async with StateManager(Database({str(tmp_path / 'a.db')!r})) as state:\n"
            "        await state.add_task(Task.create(TaskType.BATCH, 'x', task_id='t'))\n"
            "        await state.get_task('t')\n"
            "asyncio.run(main())\n"
            "assert 'cryptography' not in sys.modules\n"
        )
        environment = {k: v for k, v in os.environ.items() if k != "OPENCLAW_STORE_KEYS"}
        subprocess.run([sys.executable, "-c", script], check=True, env=environment)


class TestRotation:
    async def test_keys_are_turned_on_rotated_and_turned_off(
        self, location: Location, clock: FakeClock, make_task: MakeTask, make_node: MakeNode
    ) -> None:
        async with StateManager(Database(location, clock=clock), None) as state:
            await fill(state, make_task, make_node)
            version = (await state.get_state()).version
        before = table(location, "tasks"), table(location, "changes")
        steps = [
            (KeyRing(KEYS[:1], 1), {1}),
            (KeyRing(KEYS[:2], 2), {2}),
            (KeyRing([retired(KEYS[0]), KEYS[1]], 2), {2}),
            (KeyRing(KEYS[1:2], 2), {2}),
            (KeyRing([retired(KEYS[1])], None), {None}),
        ]
        for ring, used in steps:
            async with StateManager(Database(location, clock=clock, keys=ring), None) as state:
                task = await state.get_task("t1")
                assert task is not None
                assert task.parameters == {"a": [SECRET]}

                assert await state.db.rekey(dry_run=True)
                assert await state.db.rekey()
                again = await state.db.rekey()

                assert (again.changed, again.problems) == (0, [])
                assert {use.key for use in await key_uses(state.db)} == used
                assert (SECRET in repr(table(location, "tasks"))) == (used == {None})
                assert (await state.get_state()).version == version
                assert await verify(state.db)
        assert (table(location, "tasks"), table(location, "changes")) == before
        assert table(location, "sealing_keys") == []
        async with StateManager(Database(location, clock=clock), None) as state:
            assert await state.get_task("t1") is not None

    async def test_row_that_is_changed_meanwhile_is_not_overwritten(
        self, sealed: StateManager, location: Location, clock: FakeClock, make_task: MakeTask
    ) -> None:
        """Planted: the guard of the version and the old values is left out."""
        await sealed.add_task(make_task(task_id="t1", description=SECRET))
        ring = KeyRing(KEYS[:2], 2)
        async with Database(location, clock=clock, keys=ring) as database:
            original, is_first = database.write, True

            def write(apply: Any, operation: Any) -> Any:
                nonlocal is_first
                if is_first:
                    is_first = False
                    rewrite(location, "tasks", "version = version + 100")
                return original(apply, operation)

            database.write = write  # type: ignore[method-assign]
            done = await database.rekey()
            found = await TaskRepository(database).get("t1")

        assert done
        assert done.changed == 2  # planned twice, written once
        assert found is not None
        assert found.description == SECRET

    async def test_active_key_stays_on_the_list_until_it_is_retired(
        self, sealed: StateManager, location: Location, make_task: MakeTask
    ) -> None:
        await sealed.add_task(make_task(task_id="t1", description=SECRET))
        for ring, listed in (
            (KeyRing(KEYS[:2], 2), {1, 2}),
            (KeyRing([retired(KEYS[0]), KEYS[1]], 2), {2}),
        ):
            async with Database(location, keys=ring) as database:
                assert await database.rekey()
                async with database.session() as session:
                    assert set(await session.scalars(select(SealingKeyRow.id))) == listed

    async def test_rotation_without_keys_is_refused(self, database: Database) -> None:
        with pytest.raises(KeyRingError, match="no keys"):
            await database.rekey()


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
        with caplog.at_level(logging.DEBUG):
            async with StateManager(Database(location, clock=clock, keys=RING), None) as state:
                task = await state.get_task("t1")
                await state.db.vacuum()

        assert task is not None
        assert task.description == SECRET
        found = [path for path in location.parent.iterdir() if SECRET.encode() in path.read_bytes()]
        assert [".original-" in path.name for path in found] == [True]
        own = [one for one in caplog.records if one.name.startswith("openclaw_store")]
        assert SECRET not in repr([one.getMessage() for one in own])

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
        with caplog.at_level(logging.DEBUG):
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


def files_in(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*") if path.is_file()]


async def fill_more(state: StateManager, make_task: MakeTask) -> None:
    await state.add_tasks(
        [make_task(task_id=f"more{n}", parameters={"a": SECRET * 50}) for n in range(50)]
    )


class TestKeyFile:
    def test_life_of_a_file(self, tmp_path: Path) -> None:
        path = tmp_path / "keys.json"
        key_file.create(path)
        assert path.stat().st_mode & 0o777 == 0o600
        with pytest.raises(InvalidDataError, match="exists"):
            key_file.create(path)
        assert key_file.add(path, is_standby=True) == 2
        assert KeyRing.load(path).primary == 1
        with pytest.raises(KeyRingError, match="primary"):
            key_file.retire(path, 1)
        key_file.use(path, 2)
        with pytest.raises(KeyRingError, match="retire it first"):
            key_file.remove(path, 1)
        key_file.retire(path, 1)
        with pytest.raises(KeyRingError, match="retired"):
            key_file.use(path, 1)
        key_file.remove(path, 1)
        with pytest.raises(KeyRingError, match="no key 1"):
            key_file.retire(path, 1)
        ring = KeyRing.load(path)
        assert (sorted(ring.keys), ring.primary) == ([2], 2)
        key_file.use(path, None)
        assert KeyRing.load(path).primary is None

    @pytest.mark.skipif(os.name == "nt", reason="Windows has no modes")
    def test_file_that_others_can_read_is_refused(self, tmp_path: Path) -> None:
        path = tmp_path / "keys.json"
        key_file.create(path)
        for mode in (0o640, 0o604, 0o660):
            path.chmod(mode)
            with pytest.raises(KeyRingError, match="chmod 600"):
                KeyRing.load(path)

    @pytest.mark.parametrize(
        "content",
        [
            "", "[]", "{}", '{"primary": 1, "keys": []}', '{"primary": "1", "keys": [1]}',
            '{"primary": 1, "keys": [{"id": 1, "key": "c2hvcnQ=", "state": "active"}]}',
            '{"primary": 1, "keys": [{"id": 1, "key": "!!!", "state": "active"}]}',
            '{"primary": 1, "keys": [{"id": 1, "state": "lost"}]}',
        ],
    )  # fmt: skip
    def test_malformed_file_is_refused_without_quoting_it(
        self, tmp_path: Path, content: str
    ) -> None:
        path = tmp_path / "keys.json"
        path.write_text(content)
        path.chmod(0o600)

        with pytest.raises(KeyRingError) as error:
            KeyRing.load(path)
        assert "c2hvcnQ" not in str(error.value)

    def test_missing_file_is_an_error(self, tmp_path: Path) -> None:
        with pytest.raises(KeyRingError, match="keys new"):
            KeyRing.load(tmp_path / "nothing.json")


class TestCommands:
    async def test_status_rotate_and_remove(
        self, location: Location, tmp_path: Path, make_task: MakeTask
    ) -> None:
        file = tmp_path / "the-keys.json"

        def run(*arguments: str, status: int = 0) -> str:
            environment = {
                **os.environ, "OPENCLAW_STORE_KEYS": str(file), "OPENCLAW_STORE_URL": str(location)
            }  # fmt: skip
            done = subprocess.run(
                [sys.executable, "-m", "openclaw_store", "keys", *arguments],
                env=environment, capture_output=True, text=True, check=False,
            )  # fmt: skip
            assert done.returncode == status, done.stderr
            return done.stdout + done.stderr

        async with StateManager(Database(location), None) as state:
            await state.add_task(make_task(task_id="t1", description=SECRET))
        assert "key 1 was made" in await asyncio.to_thread(run, "new", str(file))
        assert "clear" in await asyncio.to_thread(run, "status")
        assert "1 row of 2 sealed" in await asyncio.to_thread(run, "rotate", "--vacuum")
        await asyncio.to_thread(run, "add", str(file))
        await asyncio.to_thread(run, "retire", str(file), "1")
        said = await asyncio.to_thread(run, "remove", "--yes", str(file), "1", status=1)
        assert "needs key 1 still" in said
        await asyncio.to_thread(run, "rotate")
        assert "key 2" in await asyncio.to_thread(run, "status")
        assert "removed" in await asyncio.to_thread(run, "remove", "--yes", str(file), "1")
        assert SECRET not in repr(table(location, "tasks"))
