"""Claims: the assignment of pending tasks to nodes, beside other libraries, and for long queues."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import AsyncExitStack, asynccontextmanager, closing
from datetime import UTC, datetime
from functools import partial
from itertools import count as counter
from pathlib import Path
from time import perf_counter
from typing import Any

from benchmarks import job_queue
from benchmarks.measure import Bench, Contender, Figure, Sample, Skipped, drive
from benchmarks.processes import Span, processes, start_together
from benchmarks.server_writes import INSERT_CHANGE, LOCK, NEWEST
from benchmarks.work import (
    connect,
    connected,
    fill,
    fill_server,
    require_claimed,
    require_durable_server,
    require_server_claimed,
    rows,
)
from benchmarks.writes import faster
from openclaw_store import Database, NodeInfo, StateManager

CLAIMERS = 16
"""Number of concurrent claimers; each has its own node, process or connection."""

SKILLS = ["python", "ffmpeg", "pandas", "playwright", "torch", "latex", "java"]

_CLAIM = """
UPDATE tasks SET status = 'running', assigned_node = {node}, attempt = attempt + 1 WHERE task_id = (
    SELECT task_id FROM tasks {hint} WHERE status IN ('pending', 'scheduled')
    ORDER BY priority, submitted_at, task_id LIMIT 1 {lock}
) RETURNING task_id, name, parameters"""

# The partial index has this order, and contains no running task. Without statistics of the
# tables, SQLite would sort all pending tasks instead.
CLAIM = _CLAIM.format(node="?", hint="INDEXED BY ix_tasks_pending", lock="")
"""The claim of SQLite."""

CLAIM_ON_SERVER = _CLAIM.format(node="$1", hint="", lock="FOR UPDATE SKIP LOCKED")
"""The claim of PostgreSQL, whose concurrent sessions do not wait for each other."""

_JOIN = """
INSERT INTO nodes (node_id, hostname, platform, arch, status) VALUES ($1, '', '', '', 'online')"""

Claim = Callable[[], Awaitable[object]]
"""Claims a task."""

Prepare = Callable[[Any, str], Awaitable[Claim]]
"""Prepares the claims of a node on a connection."""

Require = Callable[[str, int], Awaitable[None]]
"""Checks the number of claims in a database."""


async def claims(bench: Bench) -> Sequence[Figure]:
    """Measure claims of one task each, against as many processes that use SQLite directly."""
    many, few = bench.scaled(6400, 4 * CLAIMERS), bench.scaled(1600, 4 * CLAIMERS)
    with bench.database() as source:
        fill(source, rows(many))
        medians = await bench.interleave(
            {
                "openclaw_store": partial(_claim_ours, bench, source, many),
                "sqlite3": partial(_claim_by_processes, bench, source, few),
            }
        )
    return [faster(medians["openclaw_store"], medians["sqlite3"])]


async def server_claims(bench: Bench) -> Sequence[Figure | Skipped]:
    """Measure claims of a long queue on PostgreSQL, against connections that skip locked rows."""
    pending = bench.scaled(100_000, 8 * CLAIMERS)
    many, few = bench.scaled(6400, 4 * CLAIMERS), bench.scaled(1600, 4 * CLAIMERS)

    def skip_locked(source: str, count: int, prepare: Prepare, require: Require) -> Contender:
        return partial(_claim_by_connections, bench, source, count, prepare, require)

    async with bench.server_database() as source, bench.server_database() as jobs:
        await fill_server(source, rows(pending))
        contenders: dict[str, Contender] = {
            "openclaw_store": partial(_claim_ours_on_server, bench, source, many),
            "asyncpg": skip_locked(source, many, _prepared, require_server_claimed),
            "asyncpg, with feed": skip_locked(
                source, few, _prepared_with_feed, require_server_claimed
            ),
        }
        if job_queue.is_installed():
            await job_queue.fill(jobs, pending)
            contenders["PgQueuer"] = skip_locked(
                jobs, many, _prepared_job, job_queue.require_claimed
            )
        medians = await bench.interleave(contenders)
    ours = medians["openclaw_store"]
    return [
        faster(ours, medians[name]) if name in medians else job_queue.MISSING
        for name in ("PgQueuer", "asyncpg", "asyncpg, with feed")
    ]


async def queues(bench: Bench) -> Sequence[Figure]:
    """Measure the duration of one claim, for different queues ahead of it and behind."""
    small, large = bench.scaled(10_000, 100), bench.scaled(1_000_000, 1000)
    claims = bench.scaled(200, 10)

    async def claim(ahead: int, pending: int) -> Sample:
        with bench.database() as path:
            fill(path, rows(pending))
            with closing(connect(path)) as connection:
                connection.execute(
                    "UPDATE tasks SET required_skills = '[\"cobol\"]', priority = 0 "
                    "WHERE task_id IN (SELECT task_id FROM tasks LIMIT ?)",
                    (ahead,),
                )
            async with _store(str(path)) as store:
                node = _node(0)
                await store.register_node(node)
                return await drive(1, range(claims + 1), lambda _: store.claim_tasks(node.node_id))

    medians = await bench.interleave(
        {
            "none ahead": partial(claim, 0, 2 * small),
            "many ahead": partial(claim, small, 2 * small),
            "few": partial(claim, 0, small),
        }
    )
    few = medians["few"]
    medians = {**medians, **await bench.interleave({"many": partial(claim, 0, large)}, 1)}
    return [
        _slower(medians["many ahead"], medians["none ahead"]),
        _slower(medians["many"], few),
    ]


def make_node(id: str) -> NodeInfo:
    """Return a node with the skills of all tasks and enough slots."""
    return NodeInfo(id, "host", available_skills=SKILLS, max_concurrent_tasks=10_000_000)


def _slower(ours: Sample, against: Sample) -> Figure:
    value = ours["p50_ms"] / against["p50_ms"]
    return Figure(value, f"{ours['p50_ms']:.2f} ms", f"{against['p50_ms']:.2f} ms")


async def _claim_ours(bench: Bench, source: Path, count: int) -> Sample:
    """Claim by `StateManager.claim_tasks`, in coroutines of one process."""
    with bench.database(source) as path:
        sample = await _claim_all(str(path), count)
        require_claimed(path, count)
    return sample


async def _claim_ours_on_server(bench: Bench, source: str, count: int) -> Sample:
    async with bench.server_database(source) as url:
        sample = await _claim_all(url, count)
        await require_server_claimed(url, count)
    return sample


async def _claim_all(location: str, count: int) -> Sample:
    nodes = [_node(number) for number in range(CLAIMERS)]
    turn = counter()

    async def claim(_: int) -> None:
        [task] = await store.claim_tasks(nodes[next(turn) % CLAIMERS].node_id)
        assert task.attempt == 1

    async with _store(location) as store:
        for node in nodes:
            await store.register_node(node)
        return await drive(CLAIMERS, range(count), claim)


async def _claim_by_processes(bench: Bench, source: Path, count: int) -> Sample:
    """Claim by `BEGIN IMMEDIATE`, `UPDATE … RETURNING`, `COMMIT`, in separate processes."""
    with bench.database(source) as path:
        async with processes(CLAIMERS) as run:
            work = _claim_by_process, str(path), count // CLAIMERS
            shares = await asyncio.gather(*[run(*work) for _ in range(CLAIMERS)])
        require_claimed(path, count // CLAIMERS * CLAIMERS)
    began, ended = zip(*(span for share in shares for span in share), strict=True)
    return {"per_s": count / (max(ended) - min(began))}


async def _claim_by_process(path: str, count: int) -> list[Span]:
    spans: list[Span] = []
    with closing(connect(Path(path))) as connection:
        connection.execute("PRAGMA busy_timeout = 60000")
        await asyncio.to_thread(start_together)
        for _ in range(count):
            began = perf_counter()
            connection.execute("BEGIN IMMEDIATE")
            connection.execute(CLAIM, ("node-0001",)).fetchall()
            connection.execute("COMMIT")
            spans.append((began, perf_counter()))
    return spans


async def _claim_by_connections(
    bench: Bench, source: str, count: int, prepare: Prepare, require: Require
) -> Sample:
    """Claim in coroutines of one process, each with its own connection and node."""
    async with bench.server_database(source) as url:
        async with AsyncExitStack() as stack:
            free = []
            for number in range(CLAIMERS):
                connection = await stack.enter_async_context(connected(url))
                await require_durable_server(connection)
                free.append(await prepare(connection, f"claimer-{number:02}"))

            async def claim(_: int) -> None:
                claim_one = free.pop()
                await claim_one()
                free.append(claim_one)

            sample = await drive(CLAIMERS, range(count), claim)
        await require(url, count)
    return sample


async def _prepared_job(connection: Any, _: str) -> Claim:
    """Prepare PgQueuer's claim of one job."""
    return job_queue.Worker(connection).claim


async def _prepared(connection: Any, node: str) -> Claim:
    """Prepare `UPDATE … (SELECT … FOR UPDATE SKIP LOCKED) RETURNING`, committed automatically."""
    statement = await connection.prepare(CLAIM_ON_SERVER)

    async def claim() -> None:
        await statement.fetch(node)

    return claim


async def _prepared_with_feed(connection: Any, node: str) -> Claim:
    """Prepare a claim that takes a lock, counts in the node, and writes both changes."""
    await connection.execute(_JOIN, node)
    lock, newest, claim_task, count_in_node, insert_change = [
        await connection.prepare(sql)
        for sql in (
            LOCK,
            NEWEST,
            CLAIM_ON_SERVER,
            "UPDATE nodes SET running_tasks = running_tasks + 1 WHERE node_id = $1",
            INSERT_CHANGE,
        )
    ]

    async def claim() -> None:
        async with connection.transaction():
            await lock.fetch()
            revision = await newest.fetchval()
            [task] = await claim_task.fetch(node)
            await count_in_node.fetch(node)
            now = datetime.now(UTC)
            changes = (
                ("task", task["task_id"], "status", "pending", "scheduled", node),
                ("node", node, "updated", "online", "online", None),
            )
            for number, change in enumerate(changes, revision + 1):
                await insert_change.fetch(number, now, *change, None, None)

    return claim


def _node(number: int) -> NodeInfo:
    return make_node(f"claimer-{number:02}")


@asynccontextmanager
async def _store(location: str) -> AsyncIterator[StateManager]:
    async with StateManager(Database(location)) as store:
        yield store
