"""The work: realistic tasks, the same as rows, and databases full of them."""

from __future__ import annotations

import importlib
import sqlite3
from collections.abc import AsyncIterator, Iterable, Iterator, Sequence
from contextlib import asynccontextmanager, closing
from dataclasses import fields
from datetime import UTC, datetime, timedelta
from enum import Enum
from pathlib import Path
from typing import Any

import orjson
from sqlalchemy import insert, make_url
from sqlalchemy.dialects import sqlite

from openclaw_store import Database, Task, TaskPriority, TaskStatus, TaskType
from openclaw_store.database.tables import TaskRow
from openclaw_store.database.types import UtcTime, from_microseconds, to_microseconds

Row = tuple[Any, ...]
"""A task in the form of the driver."""

FIELDS = tuple(field.name for field in fields(Task))
INSERT = str(insert(TaskRow).compile(dialect=sqlite.dialect(), column_keys=list(FIELDS)))

# Without changes, this is the last revision.
_COUNT = "UPDATE counters SET compacted = (SELECT max(version) FROM tasks)"
_MOMENTS = [isinstance(TaskRow.__table__.c[name].type, UtcTime) for name in FIELDS]
START = datetime(2024, 1, 1, tzinfo=UTC)
_SKILLS = ("python", "ffmpeg", "pandas", "playwright", "torch", "latex", "java")
_FLAT = {
    "source": "s3://datasets/clickstream/part-{number:05}.parquet",
    "chunk_size": 4096,
    "threshold": 0.85,
    "dry_run": False,
}
_NESTED = {
    "sources": [{"path": "part-{number:05}.parquet", "rows": 4096}, {"path": "x", "rows": 17}],
    "options": {"threshold": 0.85, "columns": ["user", "page", "seconds"]},
}


def make_task(number: int, *, nested: bool = False) -> Task:
    """Return a task with two skills, 100 bytes of parameters, a user, a priority and a timeout."""
    parameters = orjson.dumps(_NESTED if nested else _FLAT).decode()
    return Task.create(
        TaskType.BATCH,
        f"clean clickstream part {number}",
        "Drop bots, join sessions, write one table for each day",
        [_SKILLS[number % 7], _SKILLS[(number + 3) % 7]],
        priority=TaskPriority(number % 4),
        parameters=orjson.loads(parameters.replace("{number:05}", f"{number:05}")),
        timeout=3600,
        user_id=f"user-{number % 50}",
        submitted_at=START + timedelta(milliseconds=number),
    )


def make_tasks(count: int) -> list[Task]:
    """Return new tasks with unique identifiers."""
    return [make_task(number) for number in range(count)]


def row_of(task: Task) -> Row:
    """Return the row that the store would write for a task."""
    values = {name: _plain(getattr(task, name)) for name in FIELDS}
    return tuple({**values, "updated_at": values["submitted_at"], "version": 1}.values())


def rows(count: int, *, pending: int = 1, of: int = 1, nested: bool = False) -> Iterator[Row]:
    """Yield rows of many tasks, quickly: `pending` in every `of` of them wait, the rest is done."""
    pattern = [list(row_of(make_task(number, nested=nested))) for number in range(100)]
    id, status, submitted, completed, node, version = map(
        FIELDS.index,
        ("task_id", "status", "submitted_at", "completed_at", "assigned_node", "version"),
    )
    for number in range(count):
        row = pattern[number * 7 % 100]
        row[id] = f"task-{number:09}"
        row[submitted] = to_microseconds(START) + number * 1000
        row[version] = number + 1
        if number % of < pending:
            row[status], row[completed], row[node] = TaskStatus.PENDING.value, None, None
        else:
            row[status], row[completed] = TaskStatus.COMPLETED.value, row[submitted]
            row[node] = f"node-{number % 100:04}"
        yield tuple(row)


def for_server(row: Row) -> Row:
    """Convert a row to the form of PostgreSQL's driver."""
    return tuple(
        from_microseconds(value) if is_moment and value is not None else value
        for value, is_moment in zip(row, _MOMENTS, strict=True)
    )


def connect(path: Path) -> sqlite3.Connection:
    """Open a connection in autocommit mode that is as durable as the store's own."""
    connection = sqlite3.connect(path, isolation_level=None)
    connection.execute("PRAGMA synchronous=FULL")
    require_durable(connection)
    return connection


def require_durable(connection: sqlite3.Connection) -> None:
    """Fail if a commit does not wait for the disk, which would be no fair comparison."""
    settings = [
        connection.execute(f"PRAGMA {name}").fetchone()[0]
        for name in ("journal_mode", "synchronous")
    ]
    if settings != ["wal", 2]:
        raise RuntimeError(f"not WAL with synchronous=FULL, but {settings}")


def require_tasks(path: Path, count: int) -> None:
    """Fail unless that many tasks were written."""
    with closing(sqlite3.connect(path)) as connection:
        [found] = connection.execute("SELECT count(*) FROM tasks").fetchone()
    if found != count:
        raise RuntimeError(f"{found} tasks instead of {count}")


def require_claimed(path: Path, count: int) -> None:
    """Fail unless that many tasks were claimed, each once."""
    with closing(sqlite3.connect(path)) as connection:
        _require_claimed(connection.execute(_CLAIMED).fetchone(), count)


_CLAIMED = (
    "SELECT count(*), max(attempt) FROM tasks WHERE attempt > 0 AND assigned_node IS NOT NULL"
)


def _require_claimed(found: Sequence[int], count: int) -> None:
    if tuple(found) != (count, 1):
        raise RuntimeError(f"{found[0]} tasks were claimed instead of {count}, or some twice")


async def require_completed(location: str, count: int) -> None:
    """Fail unless that many tasks are completed with a result, each at its first attempt."""
    query = "SELECT count(*), count(result), max(attempt) FROM tasks WHERE status = 'completed'"
    if location.startswith("postgresql"):
        async with connected(location) as connection:
            found = tuple(await connection.fetchrow(query))
    else:
        with closing(sqlite3.connect(location)) as database:
            found = database.execute(query).fetchone()
    if found != (count, count, 1):
        raise RuntimeError(f"not {count} completed tasks with results, but {found}")


@asynccontextmanager
async def connected(url: str) -> AsyncIterator[Any]:
    """Open an asyncpg connection to a server."""
    driver = importlib.import_module("asyncpg")  # it may be missing
    plain_url = make_url(url).set(drivername="postgresql")
    connection = await driver.connect(plain_url.render_as_string(hide_password=False))
    try:
        yield connection
    finally:
        await connection.close()


async def require_durable_server(connection: Any) -> None:
    """Fail if a commit on the server does not wait for the disk."""
    for name in ("fsync", "synchronous_commit"):
        value = await connection.fetchval(f"SHOW {name}")
        if value != "on":
            raise RuntimeError(f"the server has {name}={value}: set it to on")


async def require_server_tasks(url: str, count: int, *, changes: int | None = None) -> None:
    """Fail unless that many tasks, and their changes, were written."""
    async with connected(url) as connection:
        found = await connection.fetchval("SELECT count(*) FROM tasks")
        if found != count:
            raise RuntimeError(f"{found} tasks instead of {count}")
        found = await connection.fetchval("SELECT count(*) FROM changes")
        if changes is not None and found != changes:
            raise RuntimeError(f"{found} changes instead of {changes}")


async def require_server_claimed(url: str, count: int) -> None:
    """Fail unless that many tasks were claimed, each once."""
    async with connected(url) as connection:
        _require_claimed(await connection.fetchrow(_CLAIMED), count)


async def make_empty(location: Path | str) -> None:
    """Create a migrated database without rows."""
    async with Database(location):
        pass


def fill(path: Path, tasks: Iterable[Row], nodes: int = 0) -> None:
    """Insert rows without flushes, and create the indexes afterwards: a million takes seconds."""
    with closing(sqlite3.connect(path, isolation_level=None)) as connection:
        for pragma in ("journal_mode=OFF", "synchronous=OFF"):
            connection.execute(f"PRAGMA {pragma}")
        indexes = connection.execute(
            "SELECT name, sql FROM sqlite_master WHERE tbl_name = 'tasks' AND type = 'index'"
            " AND sql IS NOT NULL"
        ).fetchall()
        connection.execute("BEGIN")
        for name, _ in indexes:
            connection.execute(f"DROP INDEX {name}")
        connection.executemany(INSERT, tasks)
        for _, statement in indexes:
            connection.execute(statement)
        connection.executemany(
            "INSERT INTO nodes (node_id, hostname, available_skills, version) VALUES (?, ?, ?, 1)",
            [(f"node-{number:04}", f"host-{number}", '["python"]') for number in range(nodes)],
        )
        connection.execute(_COUNT)
        connection.execute("COMMIT")
        connection.execute("PRAGMA journal_mode=WAL")


async def fill_server(url: str, tasks: Iterable[Row]) -> None:
    """Copy rows into a database on a server, and update its statistics."""
    async with connected(url) as connection:
        await connection.copy_records_to_table(
            "tasks", records=map(for_server, tasks), columns=FIELDS
        )
        await connection.execute(_COUNT)
        await connection.execute("VACUUM ANALYZE tasks")


def ids(count: int) -> Sequence[str]:
    """Return the identifiers of the first rows."""
    return [f"task-{number:09}" for number in range(count)]


def _plain(value: Any) -> Any:
    if isinstance(value, datetime):
        return to_microseconds(value)
    if isinstance(value, Enum):
        return value.value
    if isinstance(value, list | dict):
        return orjson.dumps(value).decode() if value else None
    return value
