"""Other libraries for comparison: the same rows, in the same tables, with the same durability.

They receive rows that are ready for the driver, except SQLAlchemy's ORM, which has to make them.
None of them checks the input, numbers changes or keeps a history.
"""

from __future__ import annotations

import asyncio
import importlib
from collections.abc import Sequence
from contextlib import closing
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import aiosqlite
import orjson
from sqlalchemy import event
from sqlalchemy.ext.asyncio import async_sessionmaker, create_async_engine

from benchmarks.measure import Bench, Sample, drive, drive_alone
from benchmarks.work import (
    INSERT,
    Row,
    connect,
    make_tasks,
    require_durable,
    require_tasks,
    row_of,
)
from openclaw_store import Task
from openclaw_store.database.tables import TaskRow

COMMIT_EVERY = 64
"""Rows per transaction of `executemany`."""


async def insert_plain(bench: Bench, count: int) -> Sample:
    """Insert by plain `sqlite3`, one commit for each row, without a coroutine."""
    rows = make_rows(count)
    with bench.database() as path, closing(connect(path)) as connection:
        sample = drive_alone(rows, partial(connection.execute, INSERT))
        require_tasks(path, count)
    return sample


async def insert_many(bench: Bench, count: int) -> Sample:
    """Insert by `executemany`, one commit for `COMMIT_EVERY` rows: the limit of SQLite."""
    rows = make_rows(count)
    batches = [rows[start : start + COMMIT_EVERY] for start in range(0, count, COMMIT_EVERY)]
    with bench.database() as path, closing(connect(path)) as connection:

        def insert(batch: Sequence[Row]) -> None:
            connection.execute("BEGIN IMMEDIATE")
            connection.executemany(INSERT, batch)
            connection.execute("COMMIT")

        sample = drive_alone(batches, insert)
        require_tasks(path, count)
    return {"per_s": sample["per_s"] * COMMIT_EVERY}


async def insert_aiosqlite(bench: Bench, count: int, clients: int) -> Sample:
    """Insert by raw aiosqlite: one connection, and a lock around each transaction."""
    rows = make_rows(count)
    lock = asyncio.Lock()
    with bench.database() as path:
        async with aiosqlite.connect(path, isolation_level=None) as connection:
            await connection.execute("PRAGMA synchronous=FULL")

            async def insert(row: Row) -> None:
                async with lock:
                    await connection.execute("BEGIN IMMEDIATE")
                    await connection.execute(INSERT, row)
                    await connection.execute("COMMIT")

            sample = await drive(clients, rows, insert)
        require_tasks(path, count)
    return sample


async def insert_orm(bench: Bench, count: int, clients: int) -> Sample:
    """Insert by SQLAlchemy's ORM on aiosqlite: a session and a commit for each task."""
    with bench.database() as path:
        # More connections than one would fight for SQLite's only write lock.
        engine = create_async_engine(
            f"sqlite+aiosqlite:///{path}", pool_size=1, max_overflow=0, pool_timeout=300
        )

        @event.listens_for(engine.sync_engine, "connect")
        def connected(connection: Any, _: object) -> None:
            connection.execute("PRAGMA synchronous=FULL").close()

        sessions = async_sessionmaker(engine, expire_on_commit=False)

        async def insert(task: Task) -> None:
            values = {**task.__dict__, "updated_at": task.submitted_at, "version": 1}
            values["metadata_"] = values.pop("metadata")
            async with sessions() as session:
                session.add(TaskRow(**values))
                await session.commit()

        try:
            sample = await drive(clients, make_tasks(count), insert)
        finally:
            await engine.dispose()
        require_tasks(path, count)
    return sample


async def insert_huey(bench: Bench, count: int) -> Sample:
    """Insert by huey's SQLite storage, in a table of its own, flushed at each commit."""
    storage_class = importlib.import_module("huey.storage").SqliteStorage
    messages = [orjson.dumps(asdict(task)) for task in make_tasks(count)]
    with bench.database() as path:
        storage = storage_class("bench", str(path), fsync=True, journal_mode="wal")
        try:
            require_durable(storage.conn)
            sample = drive_alone(messages, storage.enqueue)
            if storage.queue_size() != count:
                raise RuntimeError("huey lost rows")
        finally:
            storage.close()
    return sample


async def update_plain(bench: Bench, source: Path, changes: Sequence[Row]) -> Sample:
    """Update by plain `sqlite3`, one commit for each row, writing the two changed columns."""
    statement = "UPDATE tasks SET status = ?, assigned_node = ? WHERE task_id = ?"
    with bench.database(source) as path, closing(connect(path)) as connection:
        return drive_alone(changes, partial(connection.execute, statement))


def make_rows(count: int) -> list[Row]:
    """Return new tasks as rows."""
    return [row_of(task) for task in make_tasks(count)]
