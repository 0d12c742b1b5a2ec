"""The schema's history: its files, the command line, many at once, and what goes wrong."""

# ruff: noqa: ASYNC240 - a test may block its loop

from __future__ import annotations

import asyncio
import gc
import logging
import re
import shlex
import shutil
import signal
import sqlite3
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple
from unittest.mock import patch

import pytest
from alembic.config import Config
from alembic.migration import MigrationContext
from alembic.operations import Operations
from alembic.script import ScriptDirectory
from conftest import (
    EACH_KIND,
    Location,
    MakeNode,
    MakeTask,
    engine_of,
    execute,
    locked,
    make_schema,
    new_location,
    shown,
)
from sqlalchemy import Connection
from support.in_cluster import starts_interpreter
from support.scripts import Ended, run_scripts

from campaigns.checks.contents import SCHEMA_OF_POSTGRESQL
from openclaw_store import (
    Database,
    SchemaMismatchError,
    StateManager,
    TaskRepository,
    UnavailableError,
)
from openclaw_store.backends import qualified
from openclaw_store.backends.factory import backend_of
from openclaw_store.database import CALL_FIELDS, migrations
from openclaw_store.database.tables import UNCOMPARED_INDEXES, Base
from openclaw_store.database.write_transaction import WriteTransaction

ROOT = Path(__file__).parents[2]
FILES = sorted((ROOT / "alembic" / "versions").glob("*.py"))

COMMAND = """
import os, runpy, sys
os.chdir(sys.argv[1])
os.environ.pop("OPENCLAW_STORE_URL", None)
if sys.argv[2]:
    os.environ["OPENCLAW_STORE_URL"] = sys.argv[2]
sys.argv[:] = ["alembic", *sys.argv[3:]]
runpy.run_module("alembic", run_name="__main__")
"""


def alembic(*arguments: object, folder: Path = ROOT, url: object = "") -> Ended:
    """Run `python -m alembic` in a folder, with a value for the environment variable."""
    (ended,) = run_scripts(alembic_script(*arguments, folder=folder, url=url))
    return ended


def alembic_script(
    *arguments: object, folder: Path = ROOT, url: object = ""
) -> tuple[str, list[object]]:
    return COMMAND, [folder, url, *arguments]


def schema_of(location: Location) -> dict[str, str]:
    """What makes the tables, by name, without white space, and the order of values and columns."""

    def in_order(values: re.Match[str]) -> str:
        return f"IN({','.join(sorted(values[1].split(',')))})"

    def columns_in_order(table: re.Match[str]) -> str:
        return f"{table[1]}({','.join(sorted(table[2].split(',')))})"

    if isinstance(location, Path):
        found = execute(location, "SELECT name, sql FROM sqlite_master WHERE sql IS NOT NULL")
    else:
        found = execute(location, SCHEMA_OF_POSTGRESQL)
    schema = {
        name: re.sub(r"(?:IN\(|ARRAY\[)([^])]*)[])]", in_order, re.sub(r"[\s\"]+", "", sql))
        for name, sql in found
        if not name.startswith("alembic_version")
    }
    return {
        name: re.sub(r"^(CREATETABLE\w+)\((.*)\)$", columns_in_order, sql)
        for name, sql in schema.items()
    }


def tables_of(location: Location) -> set[str]:
    of_file = "SELECT name FROM sqlite_master WHERE type = 'table'"
    of_server = "SELECT tablename FROM pg_tables WHERE schemaname = current_schema()"
    found = execute(location, of_file if isinstance(location, Path) else of_server)
    return {name for (name,) in found}


def set_version(location: Location, version: str) -> None:
    execute(location, f"UPDATE alembic_version SET version_num = '{version}'")


class TestHistory:
    def test_files_are_named_by_number_and_change(self) -> None:
        names = [file.name for file in FILES]

        assert [name[:4] for name in names] == [f"{n:04}" for n in range(1, len(names) + 1)]
        assert all(re.fullmatch(r"\d{4}(_[a-z0-9]+)+\.py", name) for name in names)

    def test_history_is_one_line_that_ends_where_the_library_is(self) -> None:
        script = ScriptDirectory.from_config(Config(ROOT / "alembic.ini"))

        line = list(script.walk_revisions())[::-1]

        assert script.get_heads() == [migrations.HEAD]
        assert [revision.revision for revision in line] == [file.name[:4] for file in FILES]
        assert [revision.down_revision for revision in line] == [
            None,
            *(revision.revision for revision in line[:-1]),
        ]
        assert all(revision.doc for revision in line)

    def test_store_write_takes_each_column_of_a_task(self) -> None:
        """A migration that adds a column of `tasks` defines the function again."""
        scripts = ScriptDirectory.from_config(Config(ROOT / "alembic.ini"))
        modules = [one.module for one in scripts.walk_revisions()]
        newest = next(one for one in modules if hasattr(one, "function"))

        arguments = re.findall(r"\bgiven_(\w+) [a-z ]+\[\]", newest.function("public", scripts))

        assert tuple(arguments) == CALL_FIELDS

    def test_folder_of_the_scripts_does_not_hide_the_library_of_that_name(self) -> None:
        assert not (ROOT / "alembic" / "__init__.py").exists()

    async def test_migrated_schema_is_that_of_the_models(
        self, location: Location, another_location: Location
    ) -> None:
        async with Database(location):
            pass
        make_schema(another_location)
        async with engine_of(another_location).begin() as connection:
            await connection.run_sync(Base.metadata.create_all)

        migrated = schema_of(location)
        beside = UNCOMPARED_INDEXES.keys() | (
            {"store_write_5"} if isinstance(location, str) else set()
        )
        assert migrated.keys() >= beside
        for name in beside:
            del migrated[name]
        assert migrated == schema_of(another_location)
        assert len(migrated) > len(Base.metadata.tables)


NOTHING_NEW = "No new upgrade operations detected."
STORY = [
    ("upgrade head", []),
    ("current", [f"{migrations.HEAD} (head)"]),
    ("check", [NOTHING_NEW]),
    ("upgrade head", []),
    ("downgrade base", []),
    ("current", []),
    ("upgrade head", []),
    ("check", [NOTHING_NEW]),
]
"""The commands of an operator's day, and what they say."""


class Commands(NamedTuple):
    """What many commands said, run by one interpreter because that takes long to start."""

    location: Location
    story: list[Ended]
    """Those of `STORY`."""
    untouched: Location
    sql: Ended
    """`upgrade --sql` of an empty database."""
    check: Ended
    """`check` of it."""


@pytest.fixture(scope="module", params=EACH_KIND)
def commands(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Commands]:
    folders = [tmp_path_factory.mktemp("a b%20c") for _ in range(2)]
    with (
        new_location(request, request.param, folders[0]) as location,
        new_location(request, request.param, folders[1]) as untouched,
    ):
        story = [alembic_script("-x", f"url={location}", *command.split()) for command, _ in STORY]
        others = [
            alembic_script("-x", f"url={untouched}", *command.split())
            for command in ("upgrade head --sql", "check")
        ]
        *told, sql, check = run_scripts(*story, *others)
        yield Commands(location, told, untouched, sql, check)


class Choices(NamedTuple):
    """What commands did that chose a database in different ways."""

    folder: Path
    ended: dict[str, Ended]


@pytest.fixture(scope="module")
def choices(tmp_path_factory: pytest.TempPathFactory) -> Choices:
    folder = tmp_path_factory.mktemp("choices")
    shutil.copy(ROOT / "alembic.ini", folder)
    shutil.copytree(ROOT / "alembic", folder / "alembic")
    up = ["upgrade", "head"]
    scripts = {
        "environment": alembic_script(*up, url=f"sqlite:///{folder}/environment.db"),
        "argument": alembic_script("-x", f"url={folder}/x.db", *up, url=f"{folder}/environ.db"),
        "default": alembic_script(*up, folder=folder),
        "postgresql": alembic_script("-x", "url=postgresql://scott:tiger@localhost:1/cluster", *up),
        "memory": alembic_script("-x", "url=sqlite:///:memory:", *up),
    }
    return Choices(folder, dict(zip(scripts, run_scripts(*scripts.values()), strict=True)))


class TestCommandLine:
    def test_commands_work_in_a_checkout(self, tmp_path: Path) -> None:
        """In an interpreter of their own: `alembic/` lies on its path, beside the library."""
        done = subprocess.run(
            [
                *(sys.executable, "-W", "error", "-m", "alembic"),
                *("-x", f"url={tmp_path}/new.db", "upgrade", "head"),
            ],
            cwd=ROOT,
            capture_output=True,
            text=True,
            check=False,
        )

        assert done.returncode == 0
        assert "Running upgrade  -> 0001" in done.stderr
        assert execute(tmp_path / "new.db", "SELECT version_num FROM alembic_version") == [
            (migrations.HEAD,)
        ]

    @pytest.mark.parametrize("step", range(len(STORY)), ids=lambda step: STORY[step][0])
    def test_command_says_what_it_should_and_warns_of_nothing(
        self, commands: Commands, step: int
    ) -> None:
        ended = commands.story[step]

        assert (ended.code, ended.out) == (0, STORY[step][1])
        assert [line for line in ended.err.splitlines() if not line.startswith("INFO")] == []

    def test_check_of_an_older_database_fails(self, commands: Commands) -> None:
        assert commands.check.code != 0
        assert "Target database is not up to date" in commands.check.err

    async def test_library_takes_what_the_command_line_made(self, commands: Commands) -> None:
        database = Database(commands.location)

        await database.initialize(migrate=False)

        assert await TaskRepository(database).count_by_status() == 0
        await database.close()

    @pytest.mark.parametrize(
        ("command", "made"),
        [
            ("environment", "environment.db"),
            ("argument", "x.db"),
            ("default", "data/cluster.db"),
        ],
    )
    def test_database_is_that_of_the_argument_or_the_environment_or_the_default(
        self, choices: Choices, command: str, made: str
    ) -> None:
        assert choices.ended[command].code == 0
        assert migrations.is_current(backend_of(choices.folder / made))
        assert not (choices.folder / "environ.db").exists()

    async def test_printed_sql_makes_the_same_schema(self, commands: Commands) -> None:
        by_hand = commands.untouched
        assert commands.sql.code == 0
        assert tables_of(by_hand) == set()

        script = "\n".join(commands.sql.out)
        async with engine_of(by_hand).connect() as connection:
            driver: Any = (await connection.get_raw_connection()).driver_connection
            await (driver.executescript if isinstance(by_hand, Path) else driver.execute)(script)

        database = Database(by_hand)
        await database.initialize(migrate=False)
        await database.close()
        assert schema_of(by_hand) == schema_of(commands.location)
        assert isinstance(by_hand, Path) or "store_write_5" in schema_of(by_hand)

    @pytest.mark.parametrize(
        ("command", "message"),
        [("postgresql", "check the server, then try again"), ("memory", "names no file")],
    )
    def test_database_that_cannot_be_is_named_without_its_password(
        self, choices: Choices, command: str, message: str
    ) -> None:
        ended = choices.ended[command]

        assert ended.code != 0
        assert message in ended.err
        assert "Traceback" not in ended.err
        assert "tiger" not in ended.err


class TestUpgrade:
    async def test_up_down_up_makes_the_same_schema_again(
        self, location: Location, make_task: MakeTask
    ) -> None:
        async with Database(location) as database:
            await TaskRepository(database).create(make_task())
        first = schema_of(location)

        ended = await asyncio.to_thread(alembic, "-x", f"url={location}", "downgrade", "base")
        between = schema_of(location)
        async with StateManager(Database(location)) as manager:
            await manager.add_task(task := make_task())

        assert ended.code == 0
        assert between == {}
        assert schema_of(location) == first
        assert task.version == 1

    async def test_feed_that_was_compacted_before_it_could_tell_begins_with_its_oldest_change(
        self, location: Location, make_task: MakeTask
    ) -> None:
        async with Database(location) as database:
            for _ in range(3):
                await TaskRepository(database).create(make_task())
        execute(location, "DELETE FROM changes WHERE revision < 3")

        for command in (("downgrade", "0001"), ("upgrade", "head")):
            await asyncio.to_thread(alembic, "-x", f"url={location}", *command)

        assert execute(location, "SELECT compacted FROM counters") == [(2,)]

    @pytest.mark.parametrize("feed", ["whole", "compacted", "empty"])
    async def test_revisions_go_on_where_they_were(
        self, location: Location, make_task: MakeTask, make_node: MakeNode, feed: str
    ) -> None:
        """Planted: the last revision is not counted again, or is lost with the changes."""
        rows = [f"SELECT * FROM {table} ORDER BY 1" for table in ("tasks", "nodes", "changes")]
        async with StateManager(Database(location)) as manager:
            await manager.register_node(make_node(node_id="n"))
            for _ in range(4):
                await manager.add_task(make_task())
            for task in await manager.claim_tasks("n", 2):
                await manager.complete_task(task)
            await manager.update_heartbeat("n")
        if feed != "whole":
            kept = 9 if feed == "compacted" else 99
            execute(location, f"DELETE FROM changes WHERE revision < {kept}")
            execute(location, f"UPDATE counters SET compacted = {min(kept, 13) - 1}")
        [[last, beat]] = execute(location, "SELECT max(version), max(beat) FROM nodes")
        before: list[Any] | None = None

        steps = [("downgrade", "0003"), ("downgrade", "0002"), ("upgrade", "0003")]
        for direction, version in [*steps, ("downgrade", "0002")]:
            command = ("-x", f"url={location}", direction, version)
            assert (await asyncio.to_thread(alembic, *command)).code == 0
            found = [execute(location, query) for query in rows]
            assert found == before or before is None
            before = found
        counted = execute(location, "SELECT revision, beat, compacted FROM counters")
        compacted = {"whole": 0, "compacted": 8, "empty": 12}[feed]
        assert counted == [(last, beat, compacted)]

        async with Database(location) as database:
            await TaskRepository(database).create(task := make_task())
        assert task.version == last + 1

    async def test_process_of_the_former_schema_is_refused_and_writes_nothing(
        self, database: Database, location: Location, make_task: MakeTask
    ) -> None:
        """It numbers its changes from the column that the migration removes."""

        def write(unit: WriteTransaction, operations: Sequence[str]) -> Sequence[Any]:
            for id in operations:
                for table, change in (
                    ("tasks", f"error = 'half' WHERE task_id = '{id}'"),
                    ("counters", "revision = revision + 1 WHERE id = 1"),
                ):
                    name = qualified(unit.cursor.schema, table)
                    unit.cursor.execute(f"UPDATE {name} SET {change}")
            return operations

        tasks, task = TaskRepository(database), make_task()
        await tasks.create(task)

        with pytest.raises(SchemaMismatchError, match="revision"):
            await database.write(write, task.task_id)

        assert await tasks.get(task.task_id) == task
        assert await tasks.update(task)

    async def test_second_initialize_keeps_the_rows(
        self, location: Location, make_task: MakeTask
    ) -> None:
        for expected in (1, 2, 3):
            async with Database(location) as database:
                await TaskRepository(database).create(make_task())
                assert await TaskRepository(database).count_by_status() == expected

    def test_six_processes_initialise_one_new_database_at_once(self, location: Location) -> None:
        script = """
import asyncio, os, sys
from openclaw_store import *

async def main(number):
    async with StateManager(Database(sys.argv[1])) as manager:
        await manager.add_task(Task.create(TaskType.BATCH, f"of process {number}"))

start, go = os.pipe()
children = []
for number in range(6):
    child = os.fork()
    if child == 0:
        os.close(go)
        os.read(start, 1)  # returns for all of them when the last writer is gone
        asyncio.run(main(number))
        os._exit(0)
    children.append(child)
os.close(go)
for child in children:
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""

        (ended,) = run_scripts((script, [location]))

        assert (ended.code, ended.err) == (0, "")
        assert ended.out == ["0"] * 6
        assert execute(location, "SELECT count(*) FROM tasks") == [(6,)]
        assert execute(location, "SELECT coalesce(max(revision), 0) FROM changes") == [(6,)]
        assert execute(location, "SELECT count(*) FROM alembic_version") == [(1,)]

    async def test_six_databases_of_one_process_initialise_one_new_database_at_once(
        self, location: Location
    ) -> None:
        databases = [Database(location) for _ in range(6)]

        await asyncio.gather(*[database.initialize() for database in databases])

        await asyncio.gather(*[database.close() for database in databases])
        assert await asyncio.to_thread(migrations.is_current, backend_of(location))

    async def test_migration_does_not_touch_the_logging_of_the_program(
        self, location: Location
    ) -> None:
        root = logging.getLogger()
        before = root.level, list(root.handlers), logging.getLogger("openclaw_store").disabled

        async with Database(location):
            pass

        after = root.level, list(root.handlers), logging.getLogger("openclaw_store").disabled
        assert after == before

    @starts_interpreter
    async def test_database_that_is_up_to_date_does_not_pay_for_alembic(
        self, location: Location
    ) -> None:
        async with Database(location):
            pass
        script = (
            "import asyncio, sys; from openclaw_store import Database\n"
            "async def main():\n"
            "    async with Database(sys.argv[1]): print('alembic' in sys.modules)\n"
            "asyncio.run(main())"
        )

        done = await asyncio.to_thread(
            subprocess.run,
            [sys.executable, "-W", "error", "-c", script, str(location)],
            capture_output=True,
            text=True,
            check=False,
        )

        assert (done.stdout, done.stderr) == ("False\n", "")


def test_tables_of_an_older_revision_are_read_without_a_connection_left_open() -> None:
    """Python 3.13 warns when it frees an open connection, and so some later test failed."""
    read: Any = migrations._definitions
    freed: list[object] = []

    class Watched(sqlite3.Connection):
        def __del__(self) -> None:
            with suppress(sqlite3.ProgrammingError):  # it is closed
                freed.append(self.total_changes)

    connect = partial(sqlite3.connect, factory=Watched)
    with patch.object(sqlite3.dbapi2, "connect", connect):
        assert "tasks" in str(read.__wrapped__("0001"))
    gc.collect()

    assert freed == []


class TestMismatch:
    @pytest.fixture
    async def newer(self, location: Location) -> Location:
        async with Database(location):
            pass
        set_version(location, "9999")
        return location

    @pytest.mark.parametrize("migrate", [True, False])
    async def test_newer_database_is_refused_with_the_command_to_run(
        self, newer: Location, migrate: bool
    ) -> None:
        before = schema_of(newer)
        database = Database(newer)

        with pytest.raises(
            SchemaMismatchError,
            match=f"{re.escape(shown(newer))} has schema 9999.* knows {migrations.HEAD}: "
            "install the newer version of the library",
        ):
            await database.initialize(migrate=migrate)

        assert schema_of(newer) == before
        set_version(newer, migrations.HEAD)
        await database.initialize(migrate=migrate)
        await database.close()

    async def test_newer_database_is_refused_by_the_manager(self, newer: Location) -> None:
        manager = StateManager(Database(newer))

        with pytest.raises(SchemaMismatchError, match="9999"):
            await manager.initialize()

        assert not manager.is_initialized
        await manager.shutdown()

    def test_newer_database_is_refused_by_the_command_line(self, newer: Location) -> None:
        commands = ["upgrade head", "current", "check", "downgrade base"]

        several = run_scripts(
            *[alembic_script("-x", f"url={newer}", *command.split()) for command in commands]
        )

        for ended in several:
            assert ended.code != 0
            assert "install the newer version of the library" in ended.err
            assert "Traceback" not in ended.err
        assert execute(newer, "SELECT version_num FROM alembic_version") == [("9999",)]

    async def test_empty_database_is_refused_with_the_command_to_run_if_not_to_be_migrated(
        self, location: Location
    ) -> None:
        database = Database(location)

        with pytest.raises(SchemaMismatchError) as caught:
            await database.initialize(migrate=False)
        found = re.search('"alembic (.*?)"', str(caught.value))
        assert found is not None
        ended = await asyncio.to_thread(alembic, *shlex.split(found[1]))

        assert ended.code == 0
        await database.initialize(migrate=False)
        assert await TaskRepository(database).count_by_status() == 0
        await database.close()

    async def test_database_of_an_unknown_past_is_refused(self, location: Location) -> None:
        async with Database(location):
            pass
        set_version(location, "0000")

        with pytest.raises(SchemaMismatchError, match="0000"):
            await Database(location).initialize()

    @pytest.mark.parametrize("migrate", [True, False])
    async def test_tables_of_the_same_names_that_others_made_are_refused_and_left_alone(
        self, location: Location, migrate: bool
    ) -> None:
        make_schema(location)
        execute(location, "CREATE TABLE tasks (task_id TEXT PRIMARY KEY, status TEXT)")
        execute(location, "CREATE TABLE nodes (node_id TEXT PRIMARY KEY, status TEXT)")
        execute(location, "INSERT INTO tasks VALUES ('old', 'pending')")

        with pytest.raises(SchemaMismatchError, match=r"tables that this library did not make"):
            await Database(location).initialize(migrate=migrate)

        assert tables_of(location) == {"tasks", "nodes"}
        assert execute(location, "SELECT * FROM tasks") == [("old", "pending")]

    async def test_tables_of_others_are_left_alone(self, location: Location) -> None:
        make_schema(location)
        execute(location, "CREATE TABLE notes (text TEXT)")
        execute(location, "INSERT INTO notes VALUES ('precious')")

        async with Database(location) as database:
            assert await TaskRepository(database).count_by_status() == 0

        assert execute(location, "SELECT * FROM notes") == [("precious",)]


@pytest.fixture
def next_migration(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A history with one more migration, whose text a test writes to the file it is given."""
    scripts = tmp_path / "scripts"
    shutil.copytree(ROOT / "alembic", scripts)
    monkeypatch.setattr(migrations, "SCRIPTS", scripts)
    monkeypatch.setattr(migrations, "HEAD", "9000")
    return scripts / "versions" / "9000_try_something.py"


TODAY = migrations.HEAD

MIGRATION = f'''"""Try something."""

import os
import signal

import sqlalchemy as sa
from alembic import op

revision = "9000"
down_revision = "{TODAY}"


def upgrade() -> None:
    schema = op.get_context().version_table_schema
    op.create_table("half", sa.Column("id", sa.Integer(), primary_key=True), schema=schema)
    tasks = sa.table("tasks", sa.column("name"), schema=schema)
    op.execute(sa.update(tasks).values(name="changed"))
    THEN
'''


class TestFailure:
    async def test_migration_that_fails_leaves_what_it_found(
        self,
        location: Location,
        next_migration: Path,
        monkeypatch: pytest.MonkeyPatch,
        make_task: MakeTask,
    ) -> None:
        with monkeypatch.context() as today:
            today.setattr(migrations, "HEAD", TODAY)
            today.setattr(migrations, "SCRIPTS", ROOT / "alembic")
            async with Database(location) as database:
                await TaskRepository(database).create(make_task(name="old"))
        before = schema_of(location)
        next_migration.write_text(MIGRATION.replace("THEN", "raise ZeroDivisionError"))
        database = Database(location)

        with pytest.raises(ZeroDivisionError):
            await database.initialize()

        assert schema_of(location) == before
        assert execute(location, "SELECT name FROM tasks") == [("old",)]
        assert execute(location, "SELECT version_num FROM alembic_version") == [(TODAY,)]
        next_migration.write_text(MIGRATION.replace("THEN", "pass"))
        await database.initialize()  # the same object, once the migration is mended
        await database.close()
        assert execute(location, "SELECT name FROM tasks") == [("changed",)]
        assert execute(location, "SELECT version_num FROM alembic_version") == [("9000",)]

    async def test_first_migration_that_fails_leaves_an_empty_database(
        self, location: Location, next_migration: Path
    ) -> None:
        next_migration.write_text(MIGRATION.replace("THEN", "raise ZeroDivisionError"))

        with pytest.raises(ZeroDivisionError):
            await Database(location).initialize()

        assert tables_of(location) == set()

    async def test_killed_migration_leaves_what_it_found(
        self, location: Location, next_migration: Path
    ) -> None:
        next_migration.write_text(MIGRATION.replace("THEN", "os.kill(os.getpid(), signal.SIGKILL)"))
        script = """
import asyncio, pathlib, sys
from openclaw_store import Database
from openclaw_store.database import migrations
migrations.SCRIPTS, migrations.HEAD = pathlib.Path(sys.argv[2]), "9000"
asyncio.run(Database(sys.argv[1]).initialize())
"""

        (ended,) = await asyncio.to_thread(
            run_scripts, (script, [location, next_migration.parent.parent])
        )

        assert ended.code == -signal.SIGKILL
        assert tables_of(location) == set()
        next_migration.write_text(MIGRATION.replace("THEN", "pass"))
        async with Database(location):
            pass
        assert execute(location, "SELECT version_num FROM alembic_version") == [("9000",)]

    async def test_migration_on_a_locked_database_gives_up_in_time(
        self, location: Location
    ) -> None:
        async with Database(location):
            pass
        await asyncio.to_thread(migrations.downgrade, backend_of(location), "0002")
        lock = "LOCK TABLE alembic_version IN SHARE UPDATE EXCLUSIVE MODE"
        async with locked(location, "BEGIN IMMEDIATE" if isinstance(location, Path) else lock):
            with pytest.raises(UnavailableError, match="another process keeps it locked"):
                await Database(location, timeout=0.1).initialize()


@pytest.mark.sqlite
class TestForeignKeys:
    """Changing a table copies it, and must not delete the rows that refer to the old one."""

    def family(self, connection: Connection, child: str = "1") -> None:
        connection.exec_driver_sql("CREATE TABLE parents (id INTEGER PRIMARY KEY)")
        connection.exec_driver_sql(
            "CREATE TABLE children (id INTEGER PRIMARY KEY,"
            " parent INTEGER REFERENCES parents (id) ON DELETE CASCADE)"
        )
        connection.exec_driver_sql("INSERT INTO parents VALUES (1)")
        connection.exec_driver_sql(f"INSERT INTO children VALUES (1, {child})")

    def test_rebuilt_table_keeps_the_rows_that_refer_to_it(self, location: Path) -> None:
        def rebuild(connection: Connection) -> None:
            operations = Operations(MigrationContext.configure(connection))
            with operations.batch_alter_table("parents", recreate="always"):
                pass

        migrations.migrate(backend_of(location), self.family)
        migrations.migrate(backend_of(location), rebuild)

        assert execute(location, "SELECT * FROM children") == [(1, 1)]

    def test_migration_that_would_orphan_rows_is_undone(self, location: Path) -> None:
        with pytest.raises(SchemaMismatchError, match="would orphan rows"):
            migrations.migrate(backend_of(location), partial(self.family, child="2"))

        assert execute(location, "SELECT name FROM sqlite_master") == []

    async def test_foreign_keys_are_enforced_otherwise(self, location: Path) -> None:
        async with Database(location) as database:
            async with database.session() as session:
                connection = await session.connection()
                reading = (await connection.exec_driver_sql("PRAGMA foreign_keys")).scalar()
            async with database.transaction() as session:
                connection = await session.connection()
                writing = (await connection.exec_driver_sql("PRAGMA foreign_keys")).scalar()
            by_the_writer = await database.write(
                lambda unit, _: [unit.cursor.execute("PRAGMA foreign_keys")[0][0]],
                None,
            )

        assert (reading, writing, by_the_writer) == (1, 1, 1)
