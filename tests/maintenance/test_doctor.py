"""`diagnose`: what is wrong with the environment is named, and it only reads."""

from __future__ import annotations

import asyncio
import re
import shutil
import sqlite3
from contextlib import closing
from datetime import timedelta
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from conftest import FakeClock, Location, MakeNode, MakeTask, engine_of, execute
from sqlalchemy import text
from support.scripts import run_scripts

from openclaw_store import Database, Finding, Level, StateManager, TaskRepository, diagnose, utc_now
from openclaw_store.backends.postgresql import backend as postgresql
from openclaw_store.database.migrations import HEAD
from openclaw_store.maintenance import doctor

MOUNTS = """\
22 1 254:1 / / rw,relatime shared:1 - ext4 /dev/vda1 rw
30 22 0:26 / /data rw,nosuid shared:2 - xfs /dev/vdb rw
31 30 0:27 / /data/our\\040files rw shared:3 - nfs4 nas:/x rw
32 30 0:28 / /data/over rw - ext4 /dev/vdc rw
33 30 0:29 / /data/over rw - tmpfs none rw
34 30 0:30 / /data/ssh rw - fuse.sshfs me@there: rw
"""


TAKE_THE_LOCK = """
import sqlite3, sys

sqlite3.connect(sys.argv[1], isolation_level=None, timeout=0).execute("BEGIN IMMEDIATE")
"""


@pytest.fixture(autouse=True)
def plain_disk(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """What is mounted: an ordinary disk, wherever the tests run."""
    mounts = tmp_path / "mountinfo"
    mounts.write_text(MOUNTS.splitlines()[0] + "\n", encoding="utf-8")
    monkeypatch.setattr(doctor, "MOUNTS", mounts)
    return mounts


@pytest.fixture
def clock() -> FakeClock:
    """The server has the system's time, so the store has, too."""
    return FakeClock(utc_now())


def bad(findings: list[Finding]) -> dict[str, Level]:
    return {one.name: one.level for one in findings if one.level is not Level.OK}


def mount(mounts: Path, *lines: str) -> None:
    """Have this mounted; nothing means a system that does not tell."""
    if lines:
        mounts.write_text("".join([MOUNTS, *lines]), encoding="utf-8")
    else:
        mounts.unlink()


def files(folder: Path) -> list[str]:
    return [path.name for path in folder.iterdir()]


def scribble(path: Path) -> None:
    path.write_bytes(b"no database at all" * 100)


async def look(location: Location) -> dict[str, Level]:
    """What is wrong with a database that nobody has opened."""
    return bad(await diagnose(Database(location)))


async def test_sound_environment_is_found_so_opened_or_not(
    location: Location, manager: StateManager, make_node: MakeNode
) -> None:
    await manager.add_node(make_node())
    await manager.update_heartbeat("node-0001")
    await manager.sync_to_database()

    for database in (manager.db, Database(location)):
        findings = await diagnose(database)

        assert bad(findings) == {}
        assert all(one.text.endswith(".") and one.advice is None for one in findings)
        names = {one.name for one in findings}
        assert names >= {"schema", "heartbeats"}
        if isinstance(location, Path):
            assert names >= {"journal_mode", "free_pages", "wal", "file_system", "disk_space"}
        else:
            assert names >= {"fsync", "server_clock", "long_transactions", "max_connections"}


async def test_heartbeat_of_the_future_is_found(
    location: Location, manager: StateManager, clock: FakeClock, make_node: MakeNode
) -> None:
    ahead = clock() + timedelta(seconds=90)
    await manager.add_node(make_node(node_id="hasty", last_heartbeat=ahead))

    findings = await diagnose(manager.db)

    [found] = [one for one in findings if one.level is not Level.OK]
    assert (found.name, found.level) == ("heartbeats", Level.WARNING)
    assert "'hasty'" in found.text
    assert "90 s" in found.text
    assert found.advice is not None
    assert "NTP" in found.advice


async def test_schema_is_named_as_it_is_and_left_alone(
    location: Location, database: Database
) -> None:
    for revision, said in (
        ("0001", "0001"),
        ("9999", "9999"),
        (f"copying-{HEAD}-1-2", "half of a copy"),
    ):
        execute(location, f"UPDATE alembic_version SET version_num = '{revision}'")
        [found] = [one for one in await diagnose(Database(location)) if one.name == "schema"]
        assert found.level is Level.ERROR
        assert said in found.text
        assert execute(location, "SELECT version_num FROM alembic_version") == [(revision,)]
    execute(location, f"UPDATE alembic_version SET version_num = '{HEAD}'")
    execute(location, "DROP INDEX ix_tasks_status")
    [found] = [one for one in await diagnose(Database(location)) if one.name == "schema"]
    assert found.level is (Level.ERROR if isinstance(location, Path) else Level.WARNING)
    assert "ix_tasks_status" in found.text
    if isinstance(location, str):  # PostgreSQL: the function depends on the tables
        execute(location, "DROP FUNCTION store_write_5")
    for table in ("tasks", "nodes", "changes", "counters", "alembic_version"):
        execute(location, f"DROP TABLE {table}")
    assert await look(location) == {"schema": Level.ERROR}


@pytest.mark.sqlite
class TestFile:
    async def test_missing_file_is_found_and_not_made(self, location: Path) -> None:
        assert await look(location) == {"connection": Level.ERROR}
        assert location.name not in files(location.parent)

    async def test_file_that_is_no_database_is_found(self, location: Path) -> None:
        scribble(location)

        assert await look(location) == {"connection": Level.ERROR}

    async def test_original_schema_is_found(self, location: Path) -> None:
        with closing(sqlite3.connect(location)) as connection:
            connection.execute("CREATE TABLE tasks (task_id TEXT PRIMARY KEY)")
            connection.execute("CREATE TABLE nodes (node_id TEXT PRIMARY KEY)")

        assert await look(location) == {
            "schema": Level.ERROR,
            "journal_mode": Level.WARNING,
            "permissions": Level.WARNING,
        }

    async def test_other_journal_is_found(self, location: Path, migrated_sqlite: Path) -> None:
        shutil.copy(migrated_sqlite, location)
        with closing(sqlite3.connect(location)) as connection:
            connection.execute("PRAGMA journal_mode=DELETE")

        assert await look(location) == {"journal_mode": Level.WARNING}

    async def test_free_pages_are_found(self, manager: StateManager, make_task: MakeTask) -> None:
        tasks = [make_task(parameters={"x": "x" * 1_000_000}) for _ in range(10)]
        await manager.add_tasks(tasks)
        assert bad(await diagnose(manager.db)) == {}
        for task in tasks:
            await manager.remove_task(task.task_id)

        assert bad(await diagnose(manager.db)) == {"free_pages": Level.WARNING}

        await manager.db.vacuum()
        assert bad(await diagnose(manager.db)) == {}

    async def test_locks_of_this_process_stay(
        self, manager: StateManager, location: Path, make_task: MakeTask
    ) -> None:
        """Issue #7: it closed the `-shm` file, which released the lock of who was writing."""
        async with manager.db.transaction(timeout=60) as tx:
            await TaskRepository(tx).create(make_task())

            await diagnose(manager.db)

            [another] = await asyncio.to_thread(run_scripts, (TAKE_THE_LOCK, [location]))
        assert "database is locked" in another.err

    async def test_reader_that_holds_the_wal_back_is_found(
        self, location: Path, manager: StateManager, make_task: MakeTask
    ) -> None:
        with closing(sqlite3.connect(location, isolation_level=None)) as reader:
            reader.execute("BEGIN")
            reader.execute("SELECT count(*) FROM tasks").fetchall()
            for _ in range(18):
                await manager.add_task(make_task(parameters={"x": "x" * 1_000_000}))

            assert bad(await diagnose(manager.db)) == {"wal": Level.WARNING}

            reader.execute("COMMIT")
        execute(location, "PRAGMA wal_checkpoint")
        assert bad(await diagnose(manager.db)) == {}

    @pytest.mark.parametrize(
        ("path", "kind"),
        [
            ("/home/x.db", "ext4"),
            ("/data/x.db", "xfs"),
            ("/data/our files/x.db", "nfs4"),
            ("/data/over/x.db", "tmpfs"),
            ("/data/ssh/x.db", "fuse.sshfs"),
            ("/database/x.db", "ext4"),
        ],
    )
    def test_file_system_is_that_of_the_nearest_mount(
        self, path: str, kind: str, plain_disk: Path
    ) -> None:
        mount(plain_disk, "")

        assert doctor.file_system_of(Path(path)) == kind

    async def test_network_file_system_is_an_error(
        self, location: Path, database: Database, plain_disk: Path
    ) -> None:
        for kind, wanted in (
            ("nfs", {"file_system": Level.ERROR}),
            ("cifs", {"file_system": Level.ERROR}),
            ("fuse.sshfs", {"file_system": Level.ERROR}),
            ("tmpfs", {"file_system": Level.WARNING}),
            ("btrfs", {}),
        ):
            line = f"1 0 0:1 / {location.parent} rw - {kind} there rw\n"
            mount(plain_disk, line)
            assert bad(await diagnose(database)) == wanted, kind
        mount(plain_disk)
        findings = {one.name: one for one in await diagnose(database)}
        assert findings["file_system"].level is Level.OK
        assert "does not tell" in findings["file_system"].text

    async def test_full_disk_is_found(
        self, database: Database, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        class Usage(NamedTuple):
            free: int

        for free, wanted in ((1 << 20, Level.ERROR), (200 << 20, Level.OK)):
            monkeypatch.setattr(shutil, "disk_usage", lambda _, free=free: Usage(free))
            assert bad(await diagnose(database)).get("disk_space", Level.OK) is wanted
        monkeypatch.setattr(doctor, "LOW_DISK_BYTES", 0)
        monkeypatch.setattr(shutil, "disk_usage", lambda _: Usage(1000))
        assert bad(await diagnose(database)) == {"disk_space": Level.WARNING}


@pytest.mark.postgresql
class TestServer:
    async def test_server_that_does_not_answer_is_found(self) -> None:
        assert await look("postgresql://nobody@127.0.0.1:1/none") == {"connection": Level.ERROR}

    async def test_clocks_that_are_apart_are_found(
        self, database: Database, clock: FakeClock
    ) -> None:
        for seconds in (60, -120):
            clock.advance(seconds=seconds)
            assert bad(await diagnose(database)) == {"server_clock": Level.WARNING}

    async def test_long_transaction_is_found(
        self, location: Location, database: Database, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(doctor, "LONG_SECONDS", 0)
        async with engine_of(location).connect() as connection:
            await connection.execute(text("SELECT 1"))

            findings = await diagnose(database)

        assert bad(findings) == {"long_transactions": Level.WARNING}
        [found] = [one for one in findings if one.name == "long_transactions"]
        assert "idle in transaction" in found.text
        assert "long_transactions" not in await look(location)

    async def test_holders_of_the_horizon_are_named(
        self, location: Location, database: Database, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """The catalogs of what this server lacks are replaced by views with rows of their own."""
        monkeypatch.setattr(doctor, "HORIZON_TRANSACTIONS", 2)
        async with engine_of(location).connect() as connection:
            pid = await connection.scalar(text("SELECT pg_backend_pid()"))
            own = await connection.scalar(text("SELECT pg_current_xact_id()::text"))
            for statement in (
                "CREATE SCHEMA other",
                f"CREATE VIEW other.pg_replication_slots AS SELECT 's' slot_name,"
                f" '{own}'::xid xmin",
                f"CREATE VIEW other.pg_stat_replication AS SELECT 'r' application_name,"
                f" '{own}'::xid backend_xmin",
                f"CREATE VIEW other.pg_prepared_xacts AS SELECT 'p' gid, '{own}'::xid transaction,"
                " current_database() database",
            ):
                execute(location, statement)

            findings = await diagnose(database)
            monkeypatch.setattr(postgresql, "SEARCH_PATH", "other, pg_catalog")
            more = await diagnose(database)

        assert bad(findings) == {"horizon": Level.WARNING}
        [found] = [one for one in findings if one.name == "horizon"]
        assert re.search(rf"by process {pid} \(nameless\) for \d+ transactions\.", found.text)
        [found] = [one for one in more if one.name == "horizon"]
        for holder in ("process", "the replica r by", "slot s for", "prepared transaction p for"):
            assert holder in found.text

    async def test_settings_that_break_promises_are_found(self, location: Location) -> None:
        name = str(location).rsplit("/", 1)[1]
        for setting, value in (
            ("synchronous_commit", "off"),
            ("default_transaction_isolation", "serializable"),
            ("idle_in_transaction_session_timeout", "100"),
        ):
            execute(location, f"ALTER DATABASE {name} SET {setting} = '{value}'")

        assert await look(location) == {
            "schema": Level.ERROR,
            "synchronous_commit": Level.WARNING,
            "default_isolation": Level.WARNING,
            "idle_in_transaction_session_timeout": Level.WARNING,
        }

    def test_settings_of_the_whole_server_are_judged(self) -> None:
        sound: dict[str, Any] = {
            "fsync": "on",
            "full_page_writes": "on",
            "synchronous_commit": "on",
            "default_transaction_isolation": "read committed",
            "idle_in_transaction_session_timeout": "0",
            "autovacuum": "on",
        }
        for name, level in (
            ("fsync", Level.ERROR),
            ("full_page_writes", Level.ERROR),
            ("autovacuum", Level.WARNING),
        ):
            findings = list(doctor._check_settings({**sound, name: "off"}))
            assert bad(findings) == {name: level}
