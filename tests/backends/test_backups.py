"""Backups of PostgreSQL archive the open database, whatever the environment names."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest
from conftest import MakeTask
from sqlalchemy import make_url

from openclaw_store import Database, TaskRepository, UnavailableError

pytestmark = [pytest.mark.postgresql, pytest.mark.usefixtures("pg_dump")]


def contents(archive: Path) -> str:
    """Return the rows of `tasks` in an archive."""
    command = ["pg_restore", "--data-only", "--table=tasks", "--file=-", str(archive)]
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
