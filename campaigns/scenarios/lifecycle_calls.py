"""A catalogue of the calls that begin or end the use of a database, with the files they find."""

from __future__ import annotations

import asyncio
import shutil
import sqlite3
from collections.abc import Callable, Coroutine, Sequence
from contextlib import AbstractContextManager, closing, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from campaigns.checks.trial import LOCK_SECONDS
from campaigns.workloads.legacy_files import COLUMNS, make_original
from openclaw_store import Database, DuplicateError, StateManager
from openclaw_store.backends.factory import backend_of
from openclaw_store.database import migrations
from openclaw_store.maintenance.restore import restore
from openclaw_store.testing import FakeClock, NodeFactory, TaskFactory

NAME = "cluster.db"
BACKUP = "backup.db"
"""Name of the backup in the folder of a call."""

FaultContext = AbstractContextManager[object]


@dataclass(frozen=True)
class LifecycleCall:
    """A call that needs a database of its own."""

    name: str
    make: Callable[[Path], object]
    """Creates the files in a folder."""
    perform: Callable[[Path, FaultContext], Coroutine[Any, Any, object]]
    """Makes the call on the files in a folder, with the fault. It can be repeated."""


def _database(folder: Path) -> Database:
    return Database(folder / NAME, clock=FakeClock(), timeout=LOCK_SECONDS, legacy_timezone="UTC")


def nothing(folder: Path) -> None:
    """Leave the folder empty."""


def filled(folder: Path) -> None:
    """Create a database with some tasks and a node."""

    async def fill() -> None:
        async with StateManager(_database(folder), None) as state:
            make_task = TaskFactory(FakeClock())
            await state.add_node(NodeFactory(FakeClock())())
            for _ in range(3):
                await state.add_task(make_task(required_skills=["python"]))
            await state.claim_tasks("node-0001")

    asyncio.run(fill())


def killed(folder: Path) -> None:
    """Create the same files as a killed process leaves: all content is in the WAL."""
    filled(folder)
    path = folder / NAME
    with closing(sqlite3.connect(path)) as connection:
        connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")
        connection.execute("UPDATE tasks SET name = 'in the WAL' WHERE task_id = 'task-0003'")
        connection.commit()
        for ending in ("", "-wal"):
            shutil.copyfile(f"{path}{ending}", f"{path}{ending}.kept")
    for ending in ("", "-wal"):
        Path(f"{path}{ending}.kept").rename(f"{path}{ending}")


def older(folder: Path) -> None:
    """Create a database with the schema of an earlier version."""
    filled(folder)
    migrations.downgrade(backend_of(folder / NAME, LOCK_SECONDS), "0001")


def original(folder: Path) -> None:
    """Create a database with the legacy hand-made schema."""
    # The legacy file takes the machine's time; the time of the store stands in March 2026.
    columns = {
        table: definition.replace("CURRENT_TIMESTAMP", "'2026-01-01 12:00:00'")
        for table, definition in COLUMNS.items()
    }
    with closing(make_original(folder / NAME, columns)) as connection:
        connection.executemany(
            "INSERT INTO tasks (task_id, task_type, name, required_skills, status, priority)"
            " VALUES (?, 'batch', 'a name', '[]', ?, 2)",
            [(f"task-{number}", status) for number, status in enumerate(("pending", "completed"))],
        )
        connection.execute(
            "INSERT INTO nodes (node_id, hostname, platform, arch, status, available_skills)"
            " VALUES ('node', 'a host', 'linux', 'x64', 'online', '[\"python\"]')"
        )
        connection.commit()


def backed_up(folder: Path) -> None:
    """Create a database that has changed since its backup."""

    async def change() -> None:
        async with StateManager(_database(folder), None) as state:
            await state.db.backup(folder / BACKUP)
            await state.remove_task("task-0002")

    filled(folder)
    asyncio.run(change())


async def _open_and_close(folder: Path, fault: FaultContext) -> None:
    with fault:
        async with StateManager(_database(folder), None):
            pass


async def _shut_down(folder: Path, fault: FaultContext) -> None:
    state = StateManager(_database(folder), None)
    await state.initialize()
    with suppress(DuplicateError):  # an earlier call has written it
        await state.add_task(TaskFactory(FakeClock())(task_id="unsaved"), persist=False)
    with fault:
        await state.shutdown()


async def _restore(folder: Path, fault: FaultContext) -> None:
    with fault:
        backend = backend_of(folder / NAME, LOCK_SECONDS)
        await asyncio.to_thread(restore, backend, folder / BACKUP)


LIFECYCLE_CALLS: Sequence[LifecycleCall] = (
    LifecycleCall("initialize, where nothing is", nothing, _open_and_close),
    LifecycleCall("initialize", filled, _open_and_close),
    LifecycleCall("initialize, after a kill", killed, _open_and_close),
    LifecycleCall("upgrade", older, _open_and_close),
    LifecycleCall("legacy import", original, _open_and_close),
    LifecycleCall("shutdown", filled, _shut_down),
    LifecycleCall("restore", backed_up, _restore),
)
