"""Attacks by files, links, names and other users; each succeeded before it was defended against."""

# ruff: noqa: ASYNC240 - a test may block its loop

from __future__ import annotations

import asyncio
import json
import logging
import os
import shutil
import sqlite3
from collections.abc import Iterator
from contextlib import closing
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
from conftest import Location, MakeNode, MakeTask
from sqlalchemy import text
from sqlalchemy.ext.asyncio import AsyncSession
from support.scripts import run_scripts
from typer.testing import CliRunner

from campaigns.workloads import hostile_files
from campaigns.workloads.legacy_files import make_original
from openclaw_store import (
    Database,
    InvalidDataError,
    SchemaMismatchError,
    StateManager,
    StoreError,
    TaskRepository,
    UnavailableError,
)
from openclaw_store.backends import atomic_files
from openclaw_store.backends.factory import backend_of
from openclaw_store.backends.sqlite import connections
from openclaw_store.cli.main import app
from openclaw_store.database import migrations
from openclaw_store.errors import logger_of
from openclaw_store.maintenance.copy import copy
from openclaw_store.maintenance.doctor import Level, diagnose
from openclaw_store.maintenance.restore import restore
from openclaw_store.maintenance.verify import verify


def modes(folder: Path) -> dict[str, int]:
    """The permissions of all files and folders below a folder, by name."""
    return {
        str(path.relative_to(folder)): path.stat().st_mode & 0o777 for path in folder.rglob("*")
    }


@pytest.fixture(params=[0o000, 0o022, 0o777])
def umask(request: pytest.FixtureRequest) -> Iterator[int]:
    before = os.umask(request.param)
    yield request.param
    os.umask(before)


SPY = """
import os, pathlib, sys
if os.geteuid() == 0:  # to whom permissions mean nothing
    os.setgroups([])
    os.setgid(65534)
    os.setuid(65534)
for name in sys.argv[1:]:
    try:
        print("read", len(pathlib.Path(name).read_bytes()))
    except PermissionError:
        print("refused")
"""


@pytest.mark.sqlite
@pytest.mark.usefixtures("umask")
class TestPermissions:
    async def test_every_file_and_folder_is_private_under_any_umask(self, tmp_path: Path) -> None:
        """A database of 0600 had backups, copies and restored files of 0644, in folders of 0777."""
        place = tmp_path / "place"
        seen: dict[str, int] = {}
        async with Database(place / "a" / "b" / "cluster.db") as database:
            async with StateManager(Database(database.db_path), None):
                seen |= modes(place)  # beside them, the files of the WAL
            await database.backup(place / "backups" / "copy.db")
            async with Database(place / "another" / "target.db") as target:
                await copy(database, target)
        restore(
            backend_of(place / "restored" / "cluster.db"),
            place / "backups" / "copy.db",
            lambda *_: seen.update(modes(place)),
        )
        with closing(make_original(place / "legacy.db")):
            pass
        os.chmod(place / "legacy.db", 0o600)
        async with Database(place / "legacy.db"):
            pass
        seen |= modes(place)

        assert {"a/b/cluster.db-wal", "a/b/cluster.db-shm"} <= seen.keys()
        assert any(name.endswith(".partial") for name in seen)
        assert any(".original-" in name for name in seen)
        folders = {"a", "a/b", "backups", "another", "restored"}
        expected = {name: 0o700 if name in folders else 0o600 for name in seen}
        assert {name: oct(mode) for name, mode in seen.items()} == {
            name: oct(mode) for name, mode in expected.items()
        }
        assert place.stat().st_mode & 0o777 == 0o700

    async def test_restored_file_is_not_wider_than_the_one_it_replaces(
        self, location: Path, migrated_sqlite: Path, tmp_path: Path
    ) -> None:
        """It became 0644."""
        shutil.copy(migrated_sqlite, location)
        backup = tmp_path / "public.db"
        shutil.copy(migrated_sqlite, backup)
        backup.chmod(0o666)

        restore(backend_of(location), backup)

        assert location.stat().st_mode & 0o777 == 0o600


@pytest.mark.sqlite
async def test_another_user_cannot_read_a_backup() -> None:
    before = os.umask(0o022)
    try:
        with TemporaryDirectory() as name:  # the folders of pytest are closed to other users
            folder = Path(name)
            folder.chmod(0o755)
            (folder / "public").write_text("hello")
            async with Database(folder / "cluster.db") as database, database.session():
                await database.backup(folder / "copy.db")
                paths = sorted(folder.iterdir())
                (spy,) = await asyncio.to_thread(run_scripts, (SPY, paths))
    finally:
        os.umask(before)

    names = ["cluster.db", "cluster.db-shm", "cluster.db-wal", "copy.db", "public"]
    assert [path.name for path in paths] == names
    outcome = "refused" if os.geteuid() == 0 else "read"  # otherwise, the spy is the owner
    assert [line.split()[0] for line in spy.out] == [*[outcome] * 4, "read"]


@pytest.mark.postgresql
@pytest.mark.usefixtures("pg_dump")
async def test_archive_of_postgresql_is_private(database: Database, tmp_path: Path) -> None:
    before = os.umask(0)
    try:
        await database.backup(tmp_path / "archives" / "copy.dump")
    finally:
        os.umask(before)

    assert modes(tmp_path) == {"archives": 0o700, "archives/copy.dump": 0o600}


@pytest.mark.sqlite
async def test_doctor_warns_of_a_database_that_others_can_read(
    location: Path, migrated_sqlite: Path
) -> None:
    shutil.copy(migrated_sqlite, location)
    for mode, level in ((0o600, Level.OK), (0o640, Level.WARNING), (0o602, Level.WARNING)):
        location.chmod(mode)
        [found] = [one for one in await diagnose(Database(location)) if one.name == "permissions"]
        assert found.level is level
    assert "cluster.db" in found.text
    assert found.advice is not None
    assert "chmod go=" in found.advice


@pytest.mark.sqlite
class TestLinks:
    @pytest.fixture
    def link(self, location: Path, migrated_sqlite: Path) -> Path:
        """A link, in a folder of its own, to a database."""
        shutil.copy(migrated_sqlite, location)
        link = location.parent / "links" / "link.db"
        link.parent.mkdir()
        link.symlink_to(location)
        return link

    async def test_restore_through_a_link_replaces_its_target(
        self, location: Path, link: Path, make_task: MakeTask, tmp_path: Path
    ) -> None:
        """The link was replaced, which left two databases."""
        async with Database(link) as database:
            await database.backup(tmp_path / "empty.db")
            await TaskRepository(database).create(make_task())

        kept = restore(backend_of(link), tmp_path / "empty.db")

        assert link.is_symlink()
        assert os.listdir(link.parent) == ["link.db"]
        assert kept == location.with_name("cluster.db.before-restore")
        for path in (link, location):
            async with Database(path) as database:
                assert await TaskRepository(database).count_by_status() == 0

    async def test_backup_through_a_link_replaces_its_target(
        self, location: Path, link: Path, tmp_path: Path
    ) -> None:
        async with Database(tmp_path / "other.db") as database:
            with pytest.raises(InvalidDataError, match="exists"):
                await database.backup(link)
            before = location.stat().st_ino
            await database.backup(link, overwrite=True)

            assert link.is_symlink()
            assert location.stat().st_ino != before
            dangling = tmp_path / "dangling.db"
            dangling.symlink_to(tmp_path / "new.db")
            await database.backup(dangling)

        assert dangling.is_symlink()
        assert (tmp_path / "new.db").stat().st_size > 0

    @pytest.mark.parametrize("has_hard_links", [True, False])
    async def test_name_that_appears_meanwhile_is_not_overwritten(
        self,
        location: Path,
        tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
        has_hard_links: bool,
    ) -> None:
        """It was checked, and then replaced."""
        target, link = tmp_path / "copy.db", os.link

        def appear(source: Path, name: Path) -> None:
            if name == target:
                target.write_text("theirs")
            if not has_hard_links:
                raise PermissionError(1, "Operation not permitted")
            link(source, name)

        async with Database(location) as database:
            monkeypatch.setattr(os, "link", appear)
            with pytest.raises(InvalidDataError, match="exists"):
                await database.backup(target)

        assert target.read_text() == "theirs"
        assert [name for name in os.listdir(tmp_path) if "partial" in name] == []

    def test_database_that_appears_during_a_restore_is_not_overwritten(
        self, location: Path, migrated_sqlite: Path
    ) -> None:
        def appear(step: str, *_: object) -> None:
            if step == "replacing the database":
                location.write_text("theirs")

        with pytest.raises(StoreError):
            restore(backend_of(location), migrated_sqlite, appear)

        assert location.read_text() == "theirs"

    def test_restore_over_a_new_file_names_no_option_that_it_lacks(
        self, location: Path, migrated_sqlite: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        link = os.link

        def appear(source: Path, name: Path) -> None:
            if name == location:
                location.write_text("theirs")
            link(source, name)

        monkeypatch.setattr(os, "link", appear)
        with pytest.raises(InvalidDataError, match="exists: move it away") as caught:
            restore(backend_of(location), migrated_sqlite)

        assert "overwrite" not in str(caught.value)
        assert location.read_text() == "theirs"

    def test_journal_is_not_moved_onto_another(self, tmp_path: Path) -> None:
        (tmp_path / "a").write_text("mine")
        (tmp_path / "b").write_text("theirs")

        with pytest.raises(FileExistsError):
            atomic_files.rename_to_unused(tmp_path / "a", tmp_path / "b")

        assert (tmp_path / "b").read_text() == "theirs"


@pytest.fixture
def store(location: Path, migrated_sqlite: Path) -> Path:
    """A file with a task, a node and changes, and without a WAL."""
    shutil.copy(migrated_sqlite, location)
    hostile_files.change(
        location,
        [
            "INSERT INTO tasks (task_id, task_type, name) VALUES ('a', 'batch', 'a')",
            "INSERT INTO nodes (node_id) VALUES ('n')",
            "INSERT INTO changes (revision, changed_at, item, item_id, kind, to_status)"
            " VALUES (1, 0, 'task', 'a', 'created', 'pending')",
        ],
    )
    return location


@pytest.mark.sqlite
async def test_backup_never_gets_the_name_of_a_journal(tmp_path: Path) -> None:
    """SQLite deletes a file of that name, or takes it for its own."""
    async with Database(tmp_path / "x.db") as database, Database(tmp_path / "y.db") as another:
        for suffix in ("-wal", "-shm", "-journal"):
            for one in (database, another):
                with pytest.raises(InvalidDataError, match="path"):
                    await one.backup(tmp_path / f"x.db{suffix}")
        await database.backup(tmp_path / "z.db-wal")


@pytest.mark.sqlite
class TestHostileFiles:
    @pytest.mark.parametrize("attack", hostile_files.SCHEMAS)
    async def test_hostile_schema_is_refused_before_any_of_it_runs(
        self, store: Path, tmp_path: Path, attack: str
    ) -> None:
        """Most passed restore, check and doctor; a trigger rewrote tasks, and a view hung."""
        hostile_files.change(store, hostile_files.SCHEMAS[attack])
        before = store.read_bytes()
        target = tmp_path / "target.db"

        with pytest.raises((SchemaMismatchError, UnavailableError)):
            await Database(store).initialize()
        with pytest.raises((SchemaMismatchError, UnavailableError)):
            restore(backend_of(target), store)
        with pytest.raises((SchemaMismatchError, UnavailableError)):
            migrations.check(backend_of(store))
        findings = await diagnose(Database(store))

        assert Level.ERROR in {one.level for one in findings}
        assert store.read_bytes() == before
        assert not target.exists()

    async def test_message_names_the_object_and_the_file(self, store: Path) -> None:
        hostile_files.change(store, hostile_files.SCHEMAS["trigger"])

        with pytest.raises(SchemaMismatchError, match=r"cluster\.db is refused.*the trigger 'x'"):
            await Database(store).initialize()

    async def test_ordinary_tables_of_other_programs_are_ignored(
        self, store: Path, tmp_path: Path, make_task: MakeTask
    ) -> None:
        hostile_files.change(store, hostile_files.ORDINARY)

        async with Database(store) as database:
            await TaskRepository(database).create(make_task(task_id="new"))
        migrations.check(backend_of(store))
        restore(backend_of(tmp_path / "target.db"), store)

    async def test_file_that_becomes_hostile_while_it_is_open_is_found(self, store: Path) -> None:
        async with Database(store) as database:
            with closing(sqlite3.connect(store)) as another:
                another.execute(hostile_files.SCHEMAS["view of tasks"][0])
            found = await verify(database)

        assert not found.is_complete  # no row was read
        assert ["the view 'x'" in problem.text for problem in found.problems] == [True]

    @pytest.mark.parametrize("revision", ["0001", "0002"])
    async def test_older_schema_is_compared_with_its_own_revision(
        self, store: Path, revision: str
    ) -> None:
        migrations.downgrade(backend_of(store), revision)
        hostile_files.change(store, [])
        sound = store.read_bytes()
        hostile_files.change(store, hostile_files.SCHEMAS["generated column"])
        hostile = store.read_bytes()

        with pytest.raises(SchemaMismatchError, match="the table 'tasks' has"):
            await Database(store).initialize()

        assert store.read_bytes() == hostile
        store.write_bytes(sound)
        async with Database(store) as database:
            assert await TaskRepository(database).get("a") is not None

    @pytest.mark.parametrize("attack", hostile_files.LEGACY)
    async def test_hostile_legacy_file_is_not_adopted(self, location: Path, attack: str) -> None:
        make_original(location).close()
        hostile_files.change(location, hostile_files.LEGACY[attack])
        before = location.read_bytes()

        with pytest.raises(SchemaMismatchError):
            await Database(location).initialize()

        assert location.read_bytes() == before
        assert os.listdir(location.parent) == [location.name]

    async def test_legacy_file_with_endless_pages_is_not_adopted(self, location: Path) -> None:
        with closing(make_original(location)) as original, original:
            original.execute(
                "INSERT INTO nodes (node_id, hostname, platform, arch, status, available_skills)"
                " VALUES ('n', 'h', '', '', 'online', '[]')"
            )
        hostile_files.change(location, [])
        hostile_files.make_bomb(location, "nodes")

        with pytest.raises(UnavailableError, match="is damaged"):
            await Database(location).initialize()

    @pytest.mark.parametrize("table", ["tasks", "nodes", "changes"])
    async def test_pages_without_end_are_found(
        self, store: Path, tmp_path: Path, table: str
    ) -> None:
        """A file of 100 kB kept `verify` busy for years."""
        hostile_files.make_bomb(store, table)

        with pytest.raises(UnavailableError, match="is damaged"):
            restore(backend_of(tmp_path / "target.db"), store)
        async with Database(store) as database:
            found = await verify(database)

        assert [one.invariant for one in found.problems] == ["file"]

    async def test_search_without_end_is_stopped(
        self, store: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Of what no check can foresee, the time is limited."""
        monkeypatch.setattr(connections, "CHECK_SECONDS", 0.05)
        hostile_files.make_bomb(store, "nodes")

        findings = await diagnose(Database(store))

        assert findings[-1].level is Level.ERROR
        assert "reading takes far longer" in findings[-1].text

    async def test_every_connection_distrusts_the_file(self, database: Database) -> None:
        pragmas = ("trusted_schema", "cell_size_check")

        async def of_session(session: AsyncSession) -> list[object]:
            return [await session.scalar(text(f"PRAGMA {name}")) for name in pragmas]

        async with database.session() as session:
            assert await of_session(session) == [0, 1]
        async with database.transaction() as tx:
            assert await of_session(tx) == [0, 1]
        by_writer = await database.write(
            lambda unit, _: [[unit.cursor.execute(f"PRAGMA {name}")[0][0] for name in pragmas]],
            None,
        )
        assert by_writer == [0, 1]


CODES = "\x1b]0;mine\x07\x1b[2J\x9b31m\u202e\x7f"
"""Codes that rename, clear and colour a terminal, and turn text around."""


def is_safe(text: str) -> bool:
    return all(letter.isprintable() or letter == "\n" for letter in text)


class TestTerminal:
    @pytest.mark.sqlite
    async def test_identifiers_and_names_reach_no_terminal_raw(
        self, location: Location, manager: StateManager, make_node: MakeNode, make_task: MakeTask
    ) -> None:
        """JSON had the codes of 8 bits, and lines of text had all."""
        await manager.register_node(make_node(node_id=f"n{CODES}", hostname=CODES))
        await manager.add_task(make_task(task_id=f"t{CODES}\nforged", name=f"[red]{CODES}"))
        await manager.remove_task(f"t{CODES}\nforged")
        await manager.add_task(make_task(task_id="waiting", required_skills=[CODES]))

        for command in (
            ["status"], ["nodes"], ["tasks"], ["show", f"n{CODES}"], ["show", "waiting"],
            ["show", f"t{CODES}\nforged"], ["show", CODES], ["watch", "--since", "0", "-n", "3"],
            ["verify"], ["doctor"],
        ):  # fmt: skip
            for options in ([], ["--json"]):
                done = await asyncio.to_thread(
                    CliRunner().invoke,
                    app,
                    [*command, *options],
                    env={"OPENCLAW_STORE_URL": str(location)},
                )
                assert is_safe(done.stdout), command
                assert is_safe(done.stderr), command
                assert "\nforged" not in done.stdout + done.stderr, command
                if options and not done.stderr and command[0] != "watch":
                    json.loads(done.stdout)

    @pytest.mark.sqlite
    async def test_names_of_files_reach_no_terminal_raw(self, tmp_path: Path) -> None:
        path = tmp_path / f"{CODES}.db"
        for command, status in (
            (["db", "upgrade"], 0), (["db", "current"], 0), (["status"], 0), (["doctor"], 0),
            (["backup", f"{path}2"], 0), (["restore", f"{path}2"], 0), (["restore", f"{path}3"], 1),
            (["db", "downgrade", "base"], 1),
        ):  # fmt: skip
            done = await asyncio.to_thread(
                CliRunner().invoke, app, command, env={"OPENCLAW_STORE_URL": str(path)}
            )
            assert done.exit_code == status, done.stderr
            assert is_safe(done.stdout), command
            assert is_safe(done.stderr), command

    async def test_errors_and_logs_are_printable(self, caplog: pytest.LogCaptureFixture) -> None:
        formatter = logging.Formatter()
        try:
            raise ValueError(CODES)
        except ValueError:
            logger_of("adoption").exception("row %s of %r", CODES, "\n")
        logger_of("adoption").warning("100 %%, %s", "plain")

        assert is_safe("\n".join(formatter.format(record) for record in caplog.records))
        assert caplog.messages[1] == "100 %, plain"
        assert is_safe(str(UnavailableError(f"{CODES}.db is damaged")))

    def test_every_logger_of_the_library_is_made_printable(self) -> None:
        library = Path(migrations.__file__).parents[1]
        makers = [
            path.name for path in library.rglob("*.py") if "getLogger" in path.read_text("utf-8")
        ]

        assert makers == ["errors.py"]

    @pytest.mark.sqlite
    async def test_values_of_a_legacy_file_are_cut_in_the_log(
        self, location: Path, caplog: pytest.LogCaptureFixture
    ) -> None:
        with closing(make_original(location)) as original, original:
            original.execute(f'CREATE INDEX "{"x" * 50_000}" ON tasks (name)')
            original.execute(
                "INSERT INTO tasks (task_id, task_type, name, required_skills, status, priority,"
                f" submitted_at) VALUES ('{CODES * 9999}', 'batch', 'a', '[]', 'pending', 2,"
                f" '{'9' * 50_000}')"
            )

        async with Database(location):
            pass

        assert len(caplog.messages) >= 2
        assert max(map(len, caplog.messages)) < 1000
