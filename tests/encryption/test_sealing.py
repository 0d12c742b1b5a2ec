"""Databases with keys: what is sealed, what is refused, and who can open it."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
from collections.abc import AsyncIterator
from datetime import UTC, datetime
from pathlib import Path

import pytest
from conftest import Location, MakeNode, MakeTask
from sqlalchemy import select
from support.sealing import KEYS, RING, SECRET, fill, rewrite, table

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
    verify,
)
from openclaw_store.backends import backend_of
from openclaw_store.database import ChangeRow, NodeRow, TaskRow, migrations
from openclaw_store.encryption import Key, key_file
from openclaw_store.maintenance.doctor import Level, diagnose
from openclaw_store.maintenance.failures import find_failures
from openclaw_store.repositories import read_changes, read_history
from openclaw_store.testing import FakeClock


@pytest.fixture
async def sealed(location: Location, clock: FakeClock) -> AsyncIterator[StateManager]:
    """A StateManager on a new database with keys."""
    async with StateManager(Database(location, clock=clock, keys=RING), None) as manager:
        yield manager


@pytest.mark.usefixtures("migrated")
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
            await state.drain_node("n1", odd)
            texts = dict.fromkeys(("name", "user_id", "description", "result"), odd)
            await state.add_task(make_task(task_id="t1", parameters={odd: odd}, **texts))
            await state.cancel_task("t1", odd)
        async with StateManager(Database(location, keys=keys), None) as state:
            found, node = await state.get_task("t1"), await state.get_node("n1")
            history = await state.db.read(lambda session: read_history(session, "t1"))
            async with state.db.session() as session:
                row = (await session.execute(select(TaskRow))).scalar_one()
            by_user = await state.list_tasks(TaskFilter(user=odd))

        assert [one.task_id for one in by_user] == ["t1"]
        assert found is not None
        assert node is not None
        assert (found.description, found.result, found.error) == (odd, odd, odd)
        assert (found.name, found.user_id, node.status_reason) == (odd, odd, odd)
        assert (row.name, row.description, row.result) == (odd, odd, odd)
        assert found.parameters == {odd: odd}
        assert (node.ip_address, history[-1].reason) == (odd, odd)

    async def test_texts_of_older_versions_that_look_sealed_come_back_as_they_were(
        self, location: Location, make_task: MakeTask
    ) -> None:
        """Planted: migration 0013 does not escape them."""
        odd = "$sealed$000001$YWJj"
        async with StateManager(Database(location), None) as state:
            await state.add_task(make_task(task_id="t1", result="x"))
            await state.cancel_task("t1", "x")
        await asyncio.to_thread(migrations.downgrade, backend_of(location), "0010")
        rewrite(location, "tasks", f"name = '{odd}', user_id = '{odd}', description = '{odd}', "
                f"error = '{odd}', result = '\"{odd}\"'")  # fmt: skip
        rewrite(location, "changes", f"reason = '{odd}'")

        async with StateManager(Database(location), None) as state:
            task = await state.get_task("t1")
            history = await state.db.read(lambda session: read_history(session, "t1"))

        assert task is not None
        texts = task.name, task.user_id, task.description, task.error, task.result
        assert texts == (odd,) * 5
        assert {one.reason for one in history} == {odd}

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


@pytest.mark.usefixtures("migrated")
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

    async def test_damaged_reason_stops_neither_the_feed_nor_other_histories(
        self, sealed: StateManager, location: Location, make_task: MakeTask
    ) -> None:
        """Planted: a reason that cannot be opened ends the iteration of a watcher."""
        for id in ("t1", "t2"):
            await sealed.add_task(make_task(task_id=id))
            await sealed.cancel_task(id, SECRET)
        rewrite(location, "changes", "reason = replace(reason, '$00000', '$00010') "
                "WHERE item_id = 't1'")  # fmt: skip

        changes, _ = await sealed.db.read(lambda session: read_changes(session, 0))
        assert [one.reason for one in changes] == [None, None, None, SECRET]
        with pytest.raises(SealedValueError, match="of 'task:t1' in changes"):
            await sealed.db.read(lambda session: read_history(session, "t1"))
        history = await sealed.db.read(lambda session: read_history(session, "t2"))
        assert history[-1].reason == SECRET
        [problem] = (await verify(sealed.db)).problems
        assert "of 'task:t1' in changes is sealed by key 101" in problem.text

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


@pytest.mark.usefixtures("migrated")
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
