"""Rotation, the file of keys, and the commands."""

from __future__ import annotations

import asyncio
import base64
import json
import os
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from conftest import Location, MakeNode, MakeTask
from sqlalchemy import select
from support.sealing import KEYS, RING, SECRET, fill, retired, rewrite, table
from typer.testing import CliRunner

from openclaw_store import (
    Database,
    InvalidDataError,
    KeyRing,
    KeyRingError,
    StateManager,
    TaskRepository,
    verify,
)
from openclaw_store.cli.main import app
from openclaw_store.database import SealingKeyRow
from openclaw_store.database.rekeying import key_uses
from openclaw_store.encryption import Key, SealedColumn, key_file
from openclaw_store.testing import FakeClock


@pytest.fixture
async def sealed(location: Location, clock: FakeClock) -> AsyncIterator[StateManager]:
    """A StateManager on a new database with keys."""
    async with StateManager(Database(location, clock=clock, keys=RING), None) as manager:
        yield manager


@pytest.mark.usefixtures("migrated")
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
                protection: Any = state.db.statements.protection
                assert protection.accepts_clear == (used == {None})
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

    @pytest.mark.parametrize("has_new_value", [False, True])
    async def test_row_that_is_changed_meanwhile_is_not_overwritten(
        self,
        sealed: StateManager,
        location: Location,
        clock: FakeClock,
        make_task: MakeTask,
        has_new_value: bool,
    ) -> None:
        """Planted: the guard of the version, or that of the old values, is left out."""
        await sealed.add_task(make_task(task_id="t1", description=SECRET))
        place = SealedColumn("tasks", "description", is_json=False)
        newer = sealed.db.statements.protection.storing(place)("t1", "newer")
        change = f"description = '{newer}'" if has_new_value else "version = version + 100"
        ring = KeyRing(KEYS[:2], 2)
        async with Database(location, clock=clock, keys=ring) as database:
            original, is_first = database.write, True

            def write(apply: Any, operation: Any) -> Any:
                nonlocal is_first
                if is_first:
                    is_first = False
                    rewrite(location, "tasks", change)
                return original(apply, operation)

            database.write = write  # type: ignore[method-assign]
            done = await database.rekey()
            found = await TaskRepository(database).get("t1")

        assert done
        assert done.changed == 2  # planned twice, written once
        assert found is not None
        assert found.description == ("newer" if has_new_value else SECRET)

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

    @pytest.mark.sqlite
    async def test_value_that_is_no_text_stops_only_its_row(
        self, sealed: StateManager, location: Location, make_task: MakeTask
    ) -> None:
        """SQLite stores anything. Planted: the whole batch, or the rotation, fails."""
        for id in ("blob", "good", "text"):
            await sealed.add_task(make_task(task_id=id, description=SECRET))
        rewrite(location, "tasks", "description = x'ff' WHERE task_id = 'blob'")
        rewrite(location, "tasks", "description = CAST(x'ff' AS TEXT) WHERE task_id = 'text'")
        async with Database(location, keys=KeyRing(KEYS[:2], 2)) as database:
            done = await database.rekey()
            uses = await key_uses(database)

        assert [problem.partition(":")[0] for problem in done.problems] == ["tasks"] * 2
        assert sorted("blob" in problem for problem in done.problems) == [False, True]
        assert ("tasks", "description", 2, 1) in uses

    async def test_rotation_without_keys_is_refused(self, database: Database) -> None:
        with pytest.raises(KeyRingError, match="no keys"):
            await database.rekey()


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


class Reversing:
    """A key management service, which turns the bytes of a key around."""

    async def unwrap(self, id: int, wrapped: bytes) -> bytes:
        return bytes(reversed(wrapped))


class TestCommands:
    async def test_status_rotate_and_remove(
        self,
        location: Location,
        tmp_path: Path,
        make_task: MakeTask,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        file = str(tmp_path / "the-keys.json")
        monkeypatch.setenv("OPENCLAW_STORE_KEYS", file)
        monkeypatch.setenv("OPENCLAW_STORE_URL", str(location))
        monkeypatch.setenv("OPENCLAW_STORE_KEY_PROVIDER", f"{__name__}:Reversing")

        async def run(*arguments: str, status: int = 0) -> str:
            done = await asyncio.to_thread(CliRunner().invoke, app, ["keys", *arguments])
            assert done.exit_code == status, done.output
            return done.output

        async with StateManager(Database(location, keys=KeyRing(KEYS, None)), None) as state:
            await state.add_task(make_task(task_id="t1", description=SECRET, name=SECRET))
        assert "key 1 was made" in await run("new", file)
        assert "clear" in await run("status")
        assert "1 row of 2 sealed" in await run("rotate", "--vacuum")
        wrapped = base64.b64encode(bytes(range(32))).decode()
        assert "must be base64" in await run("add", file, "--wrapped", "?", status=1)
        await run("add", file, "--wrapped", wrapped)
        await run("retire", file, "1")
        said = await run("remove", "--yes", file, "1", status=1)
        assert "needs key 1 still" in said
        assert "seal" in await run("rotate", "--seal", "priority", status=1)
        assert SECRET in repr(table(location, "tasks"))
        await run("rotate", "--seal", "name", "--seal", "user_id")
        assert SECRET not in repr(table(location, "tasks"))
        shown = json.loads(await run("status", "--json"))
        assert {use["key"] for use in shown["values"]} == {2}
        assert shown["sealed_fields"] == ["name", "user_id"]
        assert "removed" in await run("remove", "--yes", file, "1")
        await run("rotate", "--seal", "none")
        assert SECRET in repr(table(location, "tasks"))
        plain = KeyRing([Key(2, bytes(reversed(range(32))))], 2)
        async with StateManager(Database(location, keys=plain), None) as state:
            task = await state.get_task("t1")
        assert task is not None
        assert task.description == SECRET

    @pytest.mark.parametrize(
        ("provider", "said"),
        [(None, "give a KeyProvider"), ("no_such_module:x", "ModuleNotFoundError"),
         ("json:loads", "no method `unwrap`")],
    )  # fmt: skip
    def test_provider_that_is_missing_is_named(
        self,
        tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
        provider: str | None,
        said: str,
    ) -> None:
        key_file.create(tmp_path / "keys.json", b"wrapped")
        if provider is not None:
            monkeypatch.setenv("OPENCLAW_STORE_KEY_PROVIDER", provider)

        with pytest.raises(KeyRingError, match=said):
            KeyRing.load(tmp_path / "keys.json")
