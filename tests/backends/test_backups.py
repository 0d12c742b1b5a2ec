"""Backups of PostgreSQL archive the open database, whatever the environment names."""

from __future__ import annotations

import asyncio
import os
import shutil
import subprocess
from pathlib import Path
from uuid import uuid4

import pytest
from conftest import MakeTask, execute
from sqlalchemy import make_url

from openclaw_store import Database, TaskRepository, UnavailableError
from openclaw_store.backends.factory import backend_of
from openclaw_store.backends.postgresql.pg_dump import TABLES
from openclaw_store.maintenance.restore import restore

pytestmark = [pytest.mark.postgresql, pytest.mark.usefixtures("pg_dump")]


def contents(archive: Path) -> str:
    """Return the rows of `tasks` in an archive."""
    return output_of("pg_restore", "--data-only", "--table=tasks", "--file=-", archive)


def output_of(*command: str | Path) -> str:
    """Run a program that must succeed, and return its output."""
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


async def test_variables_of_libpq_do_not_redirect_a_backup(
    database: Database,
    another_location: str,
    make_task: MakeTask,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    await TaskRepository(database).create(make_task(task_id="ours"))
    async with Database(another_location) as other:
        await TaskRepository(other).create(make_task(task_id="theirs"))
    url = make_url(another_location)
    services = tmp_path / "services"
    services.write_text(
        f"[elsewhere]\nhost={url.host}\nport={url.port}\nuser={url.username}\n"
        f"dbname={url.database}\n"
    )
    monkeypatch.setenv("PGSERVICEFILE", str(services))
    monkeypatch.setenv("PGSERVICE", "elsewhere")
    monkeypatch.setenv("PGDATABASE", str(url.database))
    monkeypatch.setenv("PGOPTIONS", "-c role=nobody")

    await database.backup(tmp_path / "copy.dump")

    assert "ours" in contents(tmp_path / "copy.dump")
    assert "theirs" not in contents(tmp_path / "copy.dump")


async def test_archive_without_the_tables_is_no_backup(
    database: Database, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = tmp_path / "bin"
    folder.mkdir()
    program = folder / "pg_dump"
    program.write_text(f'#!/bin/sh\nexec {shutil.which("pg_dump")} --exclude-table=nodes "$@"\n')
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}:{os.environ['PATH']}")

    with pytest.raises(UnavailableError, match="lacks nodes: check which pg_dump"):
        await database.backup(tmp_path / "copy.dump")

    assert not (tmp_path / "copy.dump").exists()


async def test_archive_has_nothing_of_other_roles(
    database: Database,
    location: str,
    another_location: str,
    make_task: MakeTask,
    tmp_path: Path,
) -> None:
    """`pg_dump` failed on what the role could not read, and archived the rest."""
    role, archive = f"role_{uuid4().hex}", tmp_path / "copy.dump"
    other = make_url(location).set(username=role).render_as_string(hide_password=False)
    execute(location, f"CREATE ROLE {role} LOGIN")
    execute(location, f"GRANT CREATE ON SCHEMA public TO {role}")
    execute(location, f"GRANT CREATE ON DATABASE {make_url(location).database} TO {role}")
    for statement in (
        "CREATE SCHEMA theirs", "CREATE TABLE theirs.tasks (id int)", "CREATE TABLE theirs (a int)",
        "CREATE TYPE theirs.kind AS ENUM ('a')", "SELECT lo_from_bytea(0, 'theirs')",
        "CREATE FUNCTION public.theirs(a theirs.kind) RETURNS text LANGUAGE sql AS 'SELECT 1'",
        "CREATE VIEW their_view AS SELECT 1", "CREATE SEQUENCE their_numbers",
    ):  # fmt: skip
        execute(other, statement)
    owner = f"owner_{uuid4().hex}"
    execute(location, f"CREATE ROLE {owner} LOGIN")
    tables = ", ".join(TABLES)
    execute(location, f"GRANT SELECT, INSERT, UPDATE, DELETE ON {tables} TO {owner}")
    try:
        mine = make_url(location).set(username=owner).render_as_string(hide_password=False)
        async with Database(mine) as ours:
            await TaskRepository(ours).create(make_task(task_id="ours"))
            await ours.backup(archive)
        listed = await asyncio.to_thread(output_of, "pg_restore", "--list", archive)
        new = f"--dbname={str(another_location).replace('+asyncpg', '')}"
        options = "--exit-on-error", "--no-owner", "--no-acl", new
        await asyncio.to_thread(output_of, "pg_restore", *options, archive)

        assert "their" not in listed
        async with Database(another_location) as again:
            assert [task.task_id for task in await TaskRepository(again).list_pending_tasks()] == [
                "ours"
            ]
            await TaskRepository(again).create(make_task())
    finally:
        for name in (role, owner):
            execute(location, f"DROP OWNED BY {name} CASCADE")
            execute(location, f"DROP ROLE {name}")


async def test_archive_of_a_cluster_is_restored_by_the_commands_that_are_told(
    location: str, another_location: str, make_task: MakeTask, tmp_path: Path
) -> None:
    archive = tmp_path / "copy.dump"
    async with Database(location) as neighbour, Database(location, cluster="mine") as mine:
        await TaskRepository(neighbour).create(make_task(task_id="neighbour"))
        await TaskRepository(mine).create(make_task(task_id="mine"))
        await mine.backup(archive)

    for _ in range(2):  # into a new database, and over an existing store
        with pytest.raises(UnavailableError, match="then run: psql") as told:
            restore(backend_of(another_location, cluster="mine"), archive)
        command = str(told.value).partition("then run: ")[2]
        assert await (await asyncio.create_subprocess_shell(command)).wait() == 0
        async with Database(another_location, cluster="mine") as again:
            assert [one.task_id for one in await TaskRepository(again).list_waiting()] == ["mine"]
            await TaskRepository(again).create(make_task())
