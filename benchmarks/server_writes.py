"""Writes to PostgreSQL: inserts and versioned updates, by one client and by many, beside asyncpg.

The references keep ten connections without returning them to a pool; their statements are prepared,
and their rows are ready for the driver.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from functools import partial
from typing import Any

from sqlalchemy import insert
from sqlalchemy.dialects.postgresql import asyncpg

from benchmarks.measure import Bench, Figure, Sample, drive
from benchmarks.references import make_rows
from benchmarks.work import (
    FIELDS,
    Row,
    connected,
    fill_server,
    for_server,
    ids,
    make_tasks,
    require_durable_server,
    require_server_tasks,
    rows,
)
from benchmarks.writes import faster, slower
from openclaw_store import Database, StateManager, Task, TaskStatus
from openclaw_store.database.tables import ChangeRow, TaskRow

CONNECTIONS = 10
"""Number of connections of a reference."""

Write = Callable[[Row], Awaitable[object]]
"""Inserts or updates a row."""

_DIALECT = asyncpg.dialect()  # type: ignore[no-untyped-call]  # it has no types
_INSERT = str(insert(TaskRow).compile(dialect=_DIALECT, column_keys=list(FIELDS)))
INSERT_CHANGE = str(insert(ChangeRow).compile(dialect=_DIALECT))
LOCK = "SELECT FROM counters WHERE id = 1 FOR UPDATE"
NEWEST = """
SELECT coalesce((SELECT revision FROM changes ORDER BY revision DESC LIMIT 1), compacted)
FROM counters WHERE id = 1"""
"""The last revision; read after the lock, by a statement of its own, which sees all commits."""

_UPDATE = "UPDATE tasks SET status = $1, assigned_node = $2 WHERE task_id = $3"


async def insert_64(bench: Bench) -> Sequence[Figure]:
    """Measure inserts by 64 clients, against asyncpg without and with the work of the feed."""
    many, some, few = bench.scaled(12_800, 128), bench.scaled(6400, 128), bench.scaled(1920, 128)
    medians = await bench.interleave(
        {
            "openclaw_store": partial(_insert_ours, bench, many, 64),
            "asyncpg": partial(_insert_plain, bench, some, 64),
            "asyncpg, with feed": partial(_insert_with_feed, bench, few, 64),
        }
    )
    ours, *references = medians.values()
    return [faster(ours, reference) for reference in references]


async def insert_alone(bench: Bench) -> Sequence[Figure]:
    """Measure inserts by one client, which waits for each of them."""
    count = bench.scaled(800, 20)
    medians = await bench.interleave(
        {
            "openclaw_store": partial(_insert_ours, bench, count, 1),
            "asyncpg": partial(_insert_plain, bench, count, 1),
        }
    )
    return [slower(medians["openclaw_store"], medians["asyncpg"])]


async def update_64(bench: Bench) -> Sequence[Figure]:
    """Measure updates of whole tasks with two changed fields, by 64 clients."""
    many, some = bench.scaled(12_800, 128), bench.scaled(6400, 128)
    async with bench.server_database() as source:
        await fill_server(source, rows(many))
        medians = await bench.interleave(
            {
                "openclaw_store": partial(_update_ours, bench, source, many),
                "asyncpg": partial(_update_plain, bench, source, some),
            }
        )
    return [faster(medians["openclaw_store"], medians["asyncpg"])]


async def _insert_ours(bench: Bench, count: int, clients: int) -> Sample:
    """Insert by `StateManager.add_task`: checked, numbered, with history, and cached."""
    tasks = make_tasks(count)
    async with bench.server_database() as url:
        async with StateManager(Database(url)) as store:
            sample = await drive(clients, tasks, store.add_task)
        await require_server_tasks(url, count, changes=count)
    return sample


async def _insert_plain(bench: Bench, count: int, clients: int) -> Sample:
    """Insert by raw asyncpg: an autocommitted INSERT for each row; no feed, no checks."""
    tasks = list(map(for_server, make_rows(count)))
    async with bench.server_database() as url:
        async with _taking_turns(url, partial(_prepared, _INSERT)) as insert:
            sample = await drive(clients, tasks, insert)
        await require_server_tasks(url, count)
    return sample


async def _insert_with_feed(bench: Bench, count: int, clients: int) -> Sample:
    """Insert by raw asyncpg with a number and a change: a transaction for each row."""
    tasks = list(map(for_server, make_rows(count)))
    async with bench.server_database() as url:
        async with _taking_turns(url, _prepared_with_feed) as insert:
            sample = await drive(clients, tasks, insert)
        await require_server_tasks(url, count, changes=count)
    return sample


async def _update_ours(bench: Bench, source: str, count: int) -> Sample:
    """Update by `StateManager.update_task`, for tasks that were read before."""

    async def assign(task: Task) -> None:
        task.status, task.assigned_node = TaskStatus.SCHEDULED, "node-0042"
        await store.update_task(task)

    async with bench.server_database(source) as url:
        async with StateManager(Database(url)) as store:
            sample = await drive(64, await store.get_pending_tasks(None), assign)
        await require_server_tasks(url, count, changes=count)
    return sample


async def _update_plain(bench: Bench, source: str, count: int) -> Sample:
    """Update by raw asyncpg, one UPDATE for each row, writing the two changed columns; no feed."""
    changes = [("scheduled", "node-0042", id) for id in ids(count)]
    async with (
        bench.server_database(source) as url,
        _taking_turns(url, partial(_prepared, _UPDATE)) as update,
    ):
        return await drive(64, changes, update)


@asynccontextmanager
async def _taking_turns(
    url: str, prepare: Callable[[Any], Awaitable[Write]]
) -> AsyncIterator[Write]:
    """Provide a write on a free connection, preferably the last one used."""
    # Last in, first out: as few connections as possible are in use, with warm caches.
    free: asyncio.LifoQueue[Write] = asyncio.LifoQueue()

    async def write(row: Row) -> None:
        of_connection = await free.get()
        try:
            await of_connection(row)
        finally:
            free.put_nowait(of_connection)

    async with AsyncExitStack() as stack:
        for _ in range(CONNECTIONS):
            connection = await stack.enter_async_context(connected(url))
            await require_durable_server(connection)
            free.put_nowait(await prepare(connection))
        yield write


async def _prepared(sql: str, connection: Any) -> Write:
    """Prepare one statement per row, in a transaction of its own."""
    statement = await connection.prepare(sql)

    async def write(row: Row) -> None:
        await statement.fetch(*row)

    return write


async def _prepared_with_feed(connection: Any) -> Write:
    """Prepare a transaction per row: lock, read the newest revision, insert task and change."""
    lock, newest, insert_task, insert_change = [
        await connection.prepare(sql)
        for sql in (
            LOCK,
            NEWEST,
            _INSERT,
            INSERT_CHANGE,
        )
    ]
    id, status, moment = map(FIELDS.index, ("task_id", "status", "updated_at"))

    async def write(row: Row) -> None:
        async with connection.transaction():
            await lock.fetch()
            revision = await newest.fetchval() + 1
            change = (revision, row[moment], "task", row[id], "created", None, row[status])
            await insert_task.fetch(*row[:-1], revision)
            await insert_change.fetch(*change, None, None, None)

    return write
