"""Transactions over clusters, tasks with the caller's own rows, and transfers."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AsyncExitStack
from dataclasses import replace
from functools import partial
from time import perf_counter

from sqlalchemy import Column, MetaData, Table, Text, insert
from sqlalchemy.ext.asyncio import AsyncSession, async_sessionmaker, create_async_engine

from benchmarks.measure import (
    Bench,
    Benchmark,
    Figure,
    Line,
    Sample,
    at_least,
    at_most,
    no_collections,
    percentile,
)
from benchmarks.processes import Kind, database_of
from benchmarks.work import make_tasks
from openclaw_store import Database, Task, TaskFilter, TaskRepository, transaction, transfer
from openclaw_store.domain.records import encode
from openclaw_store.repositories import insert_tasks, row_of

_ORDERS = Table("orders", MetaData(), Column("number", Text, primary_key=True))


async def over_clusters(bench: Bench) -> Sequence[Figure]:
    """Measure a transaction with one new task in each of two clusters, and one with one task.

    They alternate.
    """
    count = bench.scaled(400, 20)

    async def write() -> Sample:
        async with bench.server_database() as url, AsyncExitStack() as stack:
            pair = [
                await stack.enter_async_context(Database(url, cluster=name))
                for name in ("berlin", "tokyo")
            ]
            seconds: dict[str, list[float]] = {"two": [], "one": []}
            with no_collections():
                for task in make_tasks(count):
                    for name, databases in (("two", pair), ("one", pair[:1])):
                        task.task_id = f"{task.task_id[:60]}{name}"
                        began = perf_counter()
                        async with transaction(*databases) as sessions:
                            for tx in sessions:
                                await TaskRepository(tx).create(replace(task, version=0))
                        seconds[name].append(perf_counter() - began)
            return {name: percentile(values, 0.5) * 1e3 for name, values in seconds.items()}

    found = (await bench.interleave({"transactions": write}))["transactions"]
    two, one = found["two"], found["one"]
    return [Figure(two / one, f"{two:.2f} ms", f"{one:.2f} ms")]


async def joined(bench: Bench, *, kind: Kind) -> Sequence[Figure]:
    """Measure a caller's transaction that adds a row, with and without a task, alternately."""
    count = bench.scaled(400, 20)

    async def write() -> Sample:
        async with database_of(bench, kind) as location, Database(location) as store:
            url = f"sqlite+aiosqlite:///{location}" if kind == "sqlite" else location
            engine = create_async_engine(url)
            sessions = async_sessionmaker(engine)
            seconds: dict[str, list[float]] = {"with": [], "without": []}
            try:
                async with engine.begin() as connection:
                    await connection.run_sync(_ORDERS.metadata.create_all)
                with no_collections():
                    for number, task in enumerate(make_tasks(count)):
                        for name, added in (("with", task), ("without", None)):
                            began = perf_counter()
                            await _order(store, sessions, f"{number} {name}", added)
                            seconds[name].append(perf_counter() - began)
            finally:
                await engine.dispose()
            return {name: percentile(values, 0.5) * 1e3 for name, values in seconds.items()}

    found = (await bench.interleave({"orders": write}))["orders"]
    both, alone = found["with"], found["without"]
    return [Figure(both / alone, f"{both:.2f} ms", f"{alone:.2f} ms")]


async def _order(
    store: Database, sessions: async_sessionmaker[AsyncSession], number: str, task: Task | None
) -> None:
    async with sessions() as session:
        await session.execute(insert(_ORDERS).values(number=number))
        if task is not None:
            async with store.joined(session) as tx:
                await TaskRepository(tx).create(task)
        await session.commit()


async def transfers(bench: Bench, *, kind: Kind) -> Sequence[Figure]:
    """Measure the transfer of all pending tasks to another cluster of the same kind."""
    count = bench.scaled(20_000, 1000)

    async def move() -> Sample:
        async with database_of(bench, kind) as place, AsyncExitStack() as stack:
            location = f"{place}-{{cluster}}.db" if kind == "sqlite" else place
            source, target = [
                await stack.enter_async_context(Database(location, cluster=name))
                for name in ("berlin", "tokyo")
            ]
            records = [row_of(source.statements, encode(task)) for task in make_tasks(count)]
            for start in range(0, count, 1000):
                await source.write(insert_tasks, records[start : start + 1000])
            began = perf_counter()
            done = await transfer(source, target, TaskFilter.everything())
            seconds = perf_counter() - began
            assert done.moved == count
            return {"per_s": count / seconds}

    found = await bench.interleave({"transfer": move})
    rate = found["transfer"]["per_s"]
    return [Figure(rate, f"{rate:,.0f}/s", "")]


_KINDS: Sequence[tuple[str, str, Kind]] = (
    ("", "SQLite", "sqlite"),
    ("pg-", "PostgreSQL", "postgresql"),
)

BENCHMARKS = (
    Benchmark(
        "pg-over-clusters",
        over_clusters,
        (
            Line(
                "PostgreSQL: `transaction(a, b)`, a task in each / one cluster, p50",
                "×",
                at_most(1.6, 1.3),
            ),
        ),
        needs_server=True,
    ),
    *(
        Benchmark(
            f"{prefix}joined",
            partial(joined, kind=kind),
            (
                Line(
                    f"{title}: the caller's transaction with a task / without, p50",
                    "×",
                    at_most(2, 1.5),
                ),
            ),
            needs_server=kind == "postgresql",
        )
        for prefix, title, kind in _KINDS
    ),
    *(
        Benchmark(
            f"{prefix}transfer",
            partial(transfers, kind=kind),
            (Line(f"{title}: tasks transferred to another cluster", "/s", at_least(5000, 10_000)),),
            needs_server=kind == "postgresql",
        )
        for prefix, title, kind in _KINDS
    ),
)
