"""All benchmarks by name, with the goals of their figures."""

from __future__ import annotations

from functools import partial

from benchmarks import (
    archive,
    claims,
    clusters,
    encryption,
    life,
    lives,
    loop,
    operator,
    processes,
    reads,
    robust,
    robust_bulk,
    robust_calls,
    robust_failover,
    robust_feed,
    robust_held,
    server_writes,
    transactions,
    writes,
)
from benchmarks.measure import Benchmark, Line, at_least, at_most


def _of_processes(kind: processes.Kind) -> tuple[Benchmark, ...]:
    """Return the benchmarks of several processes on one database of a kind."""
    is_server = kind == "postgresql"
    prefix, title = ("pg-", "PostgreSQL") if is_server else ("", "SQLite")
    bare = "asyncpg: FOR UPDATE SKIP LOCKED" if is_server else "sqlite3: BEGIN IMMEDIATE"
    return (
        Benchmark(
            f"{prefix}lives",
            partial(lives.lives, kind=kind),
            (
                Line(
                    f"{title}: claim, start and complete a task, four processes, 16 workers each "
                    f"/ {bare}, a commit for each step",
                    "×",
                    at_least(1.6, 3) if is_server else at_least(1.3, 2),
                ),
                Line("… one process", "×", at_least(2, 3.5) if is_server else None),
                Line("… four processes / one", "×", at_least(0.7, 1) if is_server else None),
                Line(
                    "… CPU of clients and server for each task, four processes",
                    "×",
                    at_most(1, 0.5) if is_server else None,
                ),
                Line("… four processes with caches"),
                Line("… one process with a cache"),
                *(
                    (
                        Line("… four processes / PgQueuer", "×", at_least(3, 4)),
                        Line("… one process / PgQueuer"),
                    )
                    if is_server
                    else ()
                ),
            ),
            needs_server=is_server,
        ),
        Benchmark(
            f"{prefix}coordinators",
            partial(processes.coordinators, kind=kind),
            (
                Line(
                    f"{title}: insert, four processes with caches, 16 clients each / one process",
                    "×",
                    at_least(0.8 if is_server else 1, 1.2),
                ),
                Line("… p99 of a write, four processes", "ms", at_most(40, 15)),
            ),
            needs_server=is_server,
        ),
        Benchmark(
            f"{prefix}freshness",
            partial(processes.freshness, kind=kind),
            (
                Line(
                    f"{title}: from the insert of a task until another process sees it, p50",
                    "ms",
                    at_most(5, 2),
                ),
                Line("… p99", "ms", at_most(100, 20)),
            ),
            needs_server=is_server,
        ),
    )


def _of_life(kind: processes.Kind) -> tuple[Benchmark, ...]:
    """Return the benchmarks of the whole life of a task on a kind of database."""
    is_server = kind == "postgresql"
    prefix, title = ("pg-", "PostgreSQL") if is_server else ("", "SQLite")
    bare = "asyncpg: FOR UPDATE SKIP LOCKED" if is_server else "sqlite3: BEGIN IMMEDIATE"
    peers = (
        (
            Line("… 1 worker / PgQueuer's queries", "×", at_least(1.2, 2)),
            Line("… 1 worker / Procrastinate's worker", "×", at_least(1.2, 2)),
        )
        if is_server
        else (Line("… 64 workers / huey's consumer, 64 threads", "×", at_least(4, 6)),)
    )
    return (
        Benchmark(
            f"{prefix}worker-life",
            partial(life.life, kind=kind),
            (
                Line(
                    f"{title}: the life of a task by Worker, 1 worker / {bare}, "
                    "a commit for each step",
                    "×",
                    at_least(0.8, 1) if is_server else at_least(0.5, 0.8),
                ),
                Line("… 16 workers", "×", at_least(2, 3)),
                Line("… 64 workers", "×", at_least(2.5, 4) if is_server else at_least(3, 4)),
                *peers,
            ),
            needs_server=is_server,
        ),
        Benchmark(
            f"{prefix}idle-worker",
            partial(life.idle, kind=kind),
            (
                Line(
                    f"{title}: from the commit of a task to the call of its handler, "
                    "idle worker, p50",
                    "ms",
                    at_most(3, 1),
                ),
                Line("… worker in another process", "ms", at_most(8, 4)),
                Line("… share of a core, idle worker", "%", at_most(1, 0.3)),
            ),
            needs_server=is_server,
        ),
    )


_OF_LIFE = (*_of_life("sqlite"), *_of_life("postgresql"))

_OF_ROBUST = (
    *robust.BENCHMARKS,
    *robust_bulk.BENCHMARKS,
    *robust_calls.BENCHMARKS,
    *robust_held.BENCHMARKS,
    *robust_feed.BENCHMARKS,
    *robust_failover.BENCHMARKS,
)

_OF_PROCESSES = (*_of_processes("sqlite"), *_of_processes("postgresql"))

BENCHMARKS = (
    Benchmark(
        "insert-64",
        writes.insert_64,
        (
            Line("insert, 64 clients / sqlite3, a commit for each row", "×", at_least(4.5, 8)),
            Line("… / executemany, a commit for 64 rows (the limit)", "%", at_least(35, 60)),
            Line("… p99 / p50", "×", at_most(4, 3)),
            Line("… p99 / p50, with the garbage collector off"),
            Line("… / aiosqlite, a lock around each transaction"),
            Line("… / SQLAlchemy's async ORM, a commit for each task"),
            Line("… / huey's SQLite storage"),
        ),
    ),
    Benchmark(
        "update-64",
        writes.update_64,
        (
            Line(
                "update of whole tasks, two fields changed, 64 clients / sqlite3 writing those two",
                "×",
                at_least(4, 7),
            ),
        ),
    ),
    Benchmark(
        "insert-8",
        partial(writes.insert_few_or_many, clients=8, count=6400),
        (Line("insert, 8 clients / sqlite3, a commit for each row", "×", at_least(1.7, 3)),),
    ),
    Benchmark(
        "insert-512",
        partial(writes.insert_few_or_many, clients=512, count=25_600),
        (Line("insert, 512 clients / sqlite3, a commit for each row", "×", at_least(4.5, 8)),),
    ),
    Benchmark(
        "insert-1",
        writes.insert_alone,
        (Line("lone insert, p50 / aiosqlite: BEGIN, INSERT, COMMIT", "×", at_most(1.2, 0.9)),),
    ),
    Benchmark(
        "get-task",
        reads.get_task,
        (
            Line("get_task, cached / dict in a coroutine", "×", at_most(10, 6)),
            Line("… with nested parameters", "×", at_most(16, 10)),
        ),
    ),
    Benchmark(
        "get-state",
        reads.get_state,
        (
            Line("get_state, 100,000 tasks", "ms", at_most(0.05)),
            Line("… / 1,000 tasks", "×", at_most(2)),
            Line("… what it adds to a write", "µs", at_most(0.5)),
        ),
    ),
    Benchmark(
        "list-pending",
        reads.list_pending,
        (
            Line("50 pending from 1,000,000 rows / 10,000, 1 % pending", "×", at_most(1.5, 1)),
            Line("… 50 % pending", "×", at_most(1.5, 1)),
        ),
    ),
    Benchmark(
        "start-up",
        reads.start_up,
        (Line("start-up, 100,000 live tasks / fetching the tuples", "×", at_most(3.6, 2.5)),),
    ),
    Benchmark(
        "memory",
        reads.memory,
        (
            Line("memory of a live task, as loaded", "KB", at_most(2.2, 1.2)),
            Line("… after it was read once", "KB", at_most(2.2, 1.2)),
        ),
    ),
    Benchmark(
        "heartbeats",
        loop.heartbeats,
        (
            Line("1,000 heartbeats a second: share of a core", "%", at_most(5)),
            Line("… p99 of 64 clients that insert, beside them / alone; gc off", "×", at_most(1.3)),
        ),
    ),
    Benchmark(
        "pauses",
        loop.pauses,
        (
            Line("longest pause of the event loop, 100,000 live tasks", "ms", at_most(20, 5)),
            Line("… longest pass of the garbage collector meanwhile", "ms"),
        ),
    ),
    Benchmark(
        "claims",
        claims.claims,
        (
            Line(
                "claims of one task, 16 claimers / 16 processes: BEGIN IMMEDIATE, UPDATE … "
                "RETURNING",
                "×",
                at_least(15, 35),
            ),
        ),
    ),
    Benchmark(
        "queues",
        claims.queues,
        (
            Line(
                "one claim, p50: 10,000 tasks ahead that the node cannot run / none",
                "×",
                at_most(1.5, 1.1),
            ),
            Line("… 1,000,000 pending tasks / 10,000", "×", at_most(1.5, 1.1)),
        ),
    ),
    Benchmark(
        "pg-claims",
        claims.server_claims,
        (
            Line(
                "PostgreSQL: claims of one task, 100,000 pending, 16 claimers / PgQueuer's dequeue",
                "×",
                at_least(0.8, 1.5),
            ),
            Line("… / 16 connections: FOR UPDATE SKIP LOCKED", "×", at_least(3, 8)),
            Line("… / the same, counting in the node, and writing a numbered feed, too"),
        ),
        needs_server=True,
    ),
    Benchmark(
        "pg-insert-64",
        server_writes.insert_64,
        (
            Line(
                "PostgreSQL: insert, 64 clients / asyncpg, ten connections, a commit for each row",
                "×",
                at_least(1.4, 2),
            ),
            Line("… / the same, writing a numbered feed, too", "×", at_least(5, 7)),
        ),
        needs_server=True,
    ),
    Benchmark(
        "pg-update-64",
        server_writes.update_64,
        (
            Line(
                "PostgreSQL: update of whole tasks, two fields changed, 64 clients / asyncpg "
                "writing those two, ten connections",
                "×",
                at_least(1.6, 2.2),
            ),
        ),
        needs_server=True,
    ),
    Benchmark(
        "pg-insert-1",
        server_writes.insert_alone,
        (
            Line(
                "PostgreSQL: lone insert, p50 / asyncpg, a commit for each row",
                "×",
                at_most(1.8, 1.4),
            ),
        ),
        needs_server=True,
    ),
    *_OF_PROCESSES,
    *_OF_LIFE,
    *_OF_ROBUST,
    *operator.BENCHMARKS,
    *encryption.BENCHMARKS,
    *transactions.BENCHMARKS,
    *archive.BENCHMARKS,
    *clusters.BENCHMARKS,
)
"""All benchmarks, in the order of a run."""

GROUPS = {
    "archive": tuple(benchmark.name for benchmark in archive.BENCHMARKS),
    "clusters": tuple(benchmark.name for benchmark in clusters.BENCHMARKS),
    "encryption": tuple(benchmark.name for benchmark in encryption.BENCHMARKS),
    "life": tuple(benchmark.name for benchmark in _OF_LIFE),
    "processes": (
        "pg-claims",
        "pg-insert-1",
        *(benchmark.name for benchmark in _OF_PROCESSES),
    ),
    "operator": tuple(benchmark.name for benchmark in operator.BENCHMARKS),
    "transactions": tuple(benchmark.name for benchmark in transactions.BENCHMARKS),
    "robust": tuple(benchmark.name for benchmark in _OF_ROBUST),
}
"""Names for several benchmarks."""
