"""PgQueuer, a job queue on PostgreSQL, where `pgqueuer` 1.6 or later can be imported.

A worker calls the queries that PgQueuer's own `QueueManager` uses, each with its commit: `dequeue`
of one job, and `log_jobs`, which moves the job to a log. A job has no result and no separate start.
"""

from __future__ import annotations

import importlib
from datetime import timedelta
from importlib.util import find_spec
from typing import Any
from uuid import uuid4

from benchmarks.measure import Skipped
from benchmarks.work import connected

MISSING = Skipped("not installed: pip install 'pgqueuer[asyncpg]'")

_JOB = "clean"
_PAYLOAD = b'{"source": "s3://datasets/clickstream/part-00001.parquet", "chunk_size": 4096}'
_HEARTBEAT_TIMEOUT = timedelta(seconds=30)  # the default of `QueueManager.run`


def is_installed() -> bool:
    """Return true if PgQueuer can be imported."""
    return find_spec("pgqueuer") is not None


class Worker:
    """One worker on its own connection; the name of a node serves only other contenders."""

    def __init__(self, connection: Any) -> None:
        driver = importlib.import_module("pgqueuer.db").AsyncpgDriver(connection)
        limit = importlib.import_module("pgqueuer.ports.repository").EntrypointExecutionParameter
        self.queries = importlib.import_module("pgqueuer.queries").Queries(driver)
        self._entrypoints = {_JOB: limit(concurrency_limit=0)}
        self._manager = uuid4()

    async def claim(self) -> Any:
        """Return the next job; `None` if none is left."""
        jobs = await self.queries.dequeue(
            1, self._entrypoints, self._manager, None, _HEARTBEAT_TIMEOUT
        )
        return jobs[0] if jobs else None

    async def live(self) -> bool:
        """Claim and complete a job; return false if none is left."""
        if (job := await self.claim()) is None:
            return False
        await self.queries.log_jobs([(job, "successful", None)])
        return True


async def fill(url: str, count: int) -> None:
    """Create PgQueuer's tables with that many jobs, and update their statistics."""
    async with connected(url) as connection:
        queries = Worker(connection).queries
        await queries.install()
        priorities = [number % 4 for number in range(count)]
        await queries.enqueue([_JOB] * count, [_PAYLOAD] * count, priorities)
        await connection.execute("VACUUM ANALYZE pgqueuer")


async def require_claimed(url: str, count: int) -> None:
    """Fail unless that many jobs are claimed."""
    await _require(url, "SELECT count(*) FROM pgqueuer WHERE status = 'picked'", count)


async def require_completed(url: str, count: int) -> None:
    """Fail unless that many jobs are completed, each once."""
    completed = "SELECT count(DISTINCT job_id) FROM pgqueuer_log WHERE status = 'successful'"
    await _require(url, completed, count)


async def _require(url: str, query: str, count: int) -> None:
    async with connected(url) as connection:
        found = await connection.fetchval(query)
    if found != count:
        raise RuntimeError(f"{found} jobs instead of {count}: {query}")
