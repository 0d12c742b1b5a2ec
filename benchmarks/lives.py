"""Lives of a task, from its claim to its result, by workers in one process and in four.

Each life has three steps, and each step is committed: claim, start, and completion with a result.
The tasks are added before the clock starts, and all processes take them from one queue, in which
some are left at the end. The references have neither nodes, nor numbered changes, nor a history.
Oban, another queue on PostgreSQL, runs on Erlang only and cannot take part.
"""

from __future__ import annotations

import asyncio
import gc
import inspect
from collections.abc import Awaitable, Callable, Mapping, Sequence
from contextlib import AsyncExitStack, closing
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from time import perf_counter, process_time
from typing import Any

import orjson

from benchmarks import cpu, job_queue
from benchmarks.claims import CLAIM, CLAIM_ON_SERVER, make_node
from benchmarks.measure import Bench, Figure, Sample, Skipped
from benchmarks.processes import (
    CLIENTS,
    COORDINATORS,
    Kind,
    Work,
    database_of,
    processes,
    start_together,
    take_item,
)
from benchmarks.work import (
    connect,
    connected,
    fill,
    fill_server,
    require_completed,
    require_durable_server,
    rows,
)
from benchmarks.writes import faster
from openclaw_store import Database, StateManager
from openclaw_store.database.types import to_microseconds

RESULT = {"rows": 4096, "output": "s3://results/clickstream/part-00001.parquet"}

Life = Callable[[], Awaitable[bool]]
"""Claims, starts and completes a task; returns false if the claim found none."""

LIMIT_SECONDS = 300
"""Maximum duration of the work of a process."""

_PAUSE_SECONDS = 0.001  # after a claim that found nothing

_HAS_OPTION = "cache" in inspect.signature(StateManager).parameters
_WITHOUT_CACHE = {"cache": False} if _HAS_OPTION else {}
_NO_OPTION = Skipped("StateManager has no option `cache`: the lines above keep a cache")
_OTHER_MACHINE = Skipped("the server is not among the processes of this machine")

_ENCODED_RESULT = orjson.dumps(RESULT).decode()
_START = "UPDATE tasks SET started_at = {} WHERE task_id = {}"
_COMPLETE = (
    "UPDATE tasks SET status = 'completed', completed_at = {}, result = {} WHERE task_id = {}"
)


@dataclass(frozen=True, slots=True)
class Share:
    """The share of one process in the work; CPU times in seconds."""

    lives: int
    began: float
    ended: float
    client_cpu: float
    server_cpu_before: float
    server_cpu_after: float


@dataclass(frozen=True, slots=True)
class _Contender:
    work: Work
    source: str
    """The database with the tasks, to be copied."""
    require: Callable[[str, int], Awaitable[None]] = require_completed
    """Checks that a database has that many completed tasks."""


async def lives(bench: Bench, *, kind: Kind) -> Sequence[Figure | Skipped]:
    """Measure lives of a task on one database, and the CPU time of each."""
    count, spare = bench.scaled(6400, 64), 2 * COORDINATORS * CLIENTS
    postmaster = None
    async with database_of(bench, kind) as tasks, database_of(bench, kind) as jobs:
        contenders = {"openclaw_store": _Contender(partial(_work_ours, _WITHOUT_CACHE), tasks)}
        if _HAS_OPTION:
            contenders["openclaw_store, cache"] = _Contender(partial(_work_ours, {}), tasks)
        if kind == "sqlite":
            fill(Path(tasks), rows(count + spare))
            reference = "sqlite3"
            contenders[reference] = _Contender(_work_sqlite3, tasks)
        else:
            await fill_server(tasks, rows(count + spare))
            postmaster = await cpu.find_postmaster(tasks)
            reference = "asyncpg"
            contenders[reference] = _Contender(_work_asyncpg, tasks)
            if job_queue.is_installed():
                await job_queue.fill(jobs, count + spare)
                contenders["PgQueuer"] = _Contender(_work_jobs, jobs, job_queue.require_completed)

        async def live(contender: _Contender, number: int) -> Sample:
            async with (
                database_of(bench, kind, contender.source) as location,
                processes(number, count) as run,
            ):
                nodes = [f"node-{index}" for index in range(number)]
                shares = await asyncio.gather(
                    *(run(contender.work, location, node, postmaster) for node in nodes)
                )
                await contender.require(location, count + number * CLIENTS)
            return _sample(shares)

        medians = await bench.interleave(
            {
                f"{name}, processes: {number}": partial(live, contender, number)
                for name, contender in contenders.items()
                for number in (1, COORDINATORS)
            }
        )

    def sample(name: str, number: int) -> Sample:
        return medians[f"{name}, processes: {number}"]

    def against(name: str, other: str, missing: Skipped) -> list[Figure | Skipped]:
        if not {name, other} <= contenders.keys():
            return [missing] * 2
        return [faster(sample(name, n), sample(other, n)) for n in (COORDINATORS, 1)]

    ours, bare = sample("openclaw_store", COORDINATORS), sample(reference, COORDINATORS)
    is_elsewhere = kind == "postgresql" and postmaster is None
    figures = [
        *against("openclaw_store", reference, _NO_OPTION),
        faster(ours, sample("openclaw_store", 1)),
        _OTHER_MACHINE if is_elsewhere else _cpu_of(ours, bare),
        *against("openclaw_store, cache", reference, _NO_OPTION),
    ]
    if kind == "postgresql":
        figures += against("openclaw_store", "PgQueuer", job_queue.MISSING)
    return figures


def _sample(shares: Sequence[Share]) -> Sample:
    """Add the shares up; the last process sees the CPU time of the server for all of them."""
    lives = sum(share.lives for share in shares)
    seconds = max(share.ended for share in shares) - min(share.began for share in shares)
    server_cpu = max(share.server_cpu_after for share in shares) - min(
        share.server_cpu_before for share in shares
    )
    return {
        "per_s": lives / seconds,
        "client_cpu_ms": sum(share.client_cpu for share in shares) / lives * 1e3,
        "server_cpu_ms": server_cpu / lives * 1e3,
    }


def _cpu_of(ours: Sample, reference: Sample) -> Figure:
    """Return the ratio of the CPU times of clients and server for each life."""
    used, by_reference = (one["client_cpu_ms"] + one["server_cpu_ms"] for one in (ours, reference))
    return Figure(used / by_reference, f"{used:.2f} ms", f"{by_reference:.2f} ms")


async def _work_ours(
    options: Mapping[str, Any], location: str, node: str, postmaster: int | None
) -> Share:
    """Work by a `StateManager`, as one node with enough slots."""
    async with StateManager(Database(location), **options) as store:
        await store.register_node(make_node(node))

        async def live() -> bool:
            for task in await store.claim_tasks(node):
                await store.start_task(task)
                await store.complete_task(task, RESULT)
                return True
            return False

        return await _live([live] * CLIENTS, postmaster)


async def _work_sqlite3(location: str, node: str, postmaster: int | None) -> Share:
    """Work by plain `sqlite3`, `BEGIN IMMEDIATE` for each step, without a coroutine.

    The workers share one connection: with their own, they would wait for each other's lock.
    """
    with closing(connect(Path(location))) as connection:
        connection.execute("PRAGMA busy_timeout = 60000")
        start, complete = _START.format("?", "?"), _COMPLETE.format("?", "?", "?")

        def commit(statement: str, *values: object) -> list[tuple[Any, ...]]:
            connection.execute("BEGIN IMMEDIATE")
            found = connection.execute(statement, values).fetchall()
            connection.execute("COMMIT")
            return found

        async def live() -> bool:
            for task, *_ in commit(CLAIM, node):
                commit(start, to_microseconds(datetime.now(UTC)), task)
                commit(complete, to_microseconds(datetime.now(UTC)), _ENCODED_RESULT, task)
                return True
            return False

        return await _live([live], postmaster)


async def _work_asyncpg(location: str, node: str, postmaster: int | None) -> Share:
    """Work by raw asyncpg: a connection for each worker, and an autocommitted step."""

    async def prepared(connection: Any) -> Life:
        await require_durable_server(connection)
        claim, start, complete = [
            await connection.prepare(sql)
            for sql in (
                CLAIM_ON_SERVER,
                _START.format("$1", "$2"),
                _COMPLETE.format("$1", "$2", "$3"),
            )
        ]

        async def live() -> bool:
            for task, *_ in await claim.fetch(node):
                await start.fetch(datetime.now(UTC), task)
                await complete.fetch(datetime.now(UTC), _ENCODED_RESULT, task)
                return True
            return False

        return live

    return await _work_by_connections(prepared, location, postmaster)


async def _work_jobs(location: str, node: str, postmaster: int | None) -> Share:
    """Work by PgQueuer: a connection for each worker."""

    async def prepared(connection: Any) -> Life:
        return job_queue.Worker(connection).live

    return await _work_by_connections(prepared, location, postmaster)


async def _work_by_connections(
    prepare: Callable[[Any], Awaitable[Life]], location: str, postmaster: int | None
) -> Share:
    async with AsyncExitStack() as stack:
        workers = [
            await prepare(await stack.enter_async_context(connected(location)))
            for _ in range(CLIENTS)
        ]
        return await _live(workers, postmaster)


async def _live(workers: Sequence[Life], postmaster: int | None) -> Share:
    """Run workers at the same time as the other processes until the shared work is done.

    Each of the `CLIENTS` lives before the start does not count: it compiles statements.
    """
    async with asyncio.timeout(LIMIT_SECONDS):
        await asyncio.gather(*(_insist(workers[n % len(workers)]) for n in range(CLIENTS)))
        gc.collect()
        await asyncio.to_thread(start_together)
        server_cpu, client_cpu, began = cpu.of_server(postmaster), process_time(), perf_counter()
        lives = sum(await asyncio.gather(*map(_repeat, workers)))
        return Share(
            lives=lives,
            began=began,
            ended=perf_counter(),
            client_cpu=process_time() - client_cpu,
            server_cpu_before=server_cpu,
            server_cpu_after=cpu.of_server(postmaster),
        )


async def _repeat(live: Life) -> int:
    """Return the number of lives until no work is left."""
    lives = 0
    while take_item():
        await _insist(live)
        lives += 1
    return lives


async def _insist(live: Life) -> None:
    """Repeat an empty claim: concurrent claims may hold all tasks that it could get."""
    while not await live():  # noqa: ASYNC110 - other processes give no event
        await asyncio.sleep(_PAUSE_SECONDS)
