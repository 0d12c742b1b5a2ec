"""Task queues that are run by their own workers, where they can be imported: huey, Procrastinate.

Each is filled with jobs first. Its worker then runs them in this process, and commits as it always
does. `Clock` measures from the call of the first counted handler to that of the last one.
"""

from __future__ import annotations

import importlib
import logging
from collections.abc import Callable
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from threading import Event, Lock
from time import perf_counter
from typing import Any

from sqlalchemy import make_url

from benchmarks.measure import Sample, Skipped
from benchmarks.work import require_durable

NO_HUEY = Skipped("not installed: pip install huey")
NO_PROCRASTINATE = Skipped("not installed: pip install procrastinate 'psycopg[binary]'")

RESULT = {"rows": 4096, "output": "s3://results/clickstream/part-00001.parquet"}

PAYLOAD = {"source": "s3://datasets/clickstream/part-00001.parquet", "chunk_size": 4096}


@dataclass
class Clock:
    """Counts the calls of a handler, on any thread.

    Args:
        first: The calls before the measurement.
        count: The measured calls.
        stop: Called with the last one.
    """

    first: int
    count: int
    stop: Callable[[], object] = lambda: None
    _calls: int = 0
    _began: float = 0.0
    _ended: float = 0.0
    _lock: Lock = field(default_factory=Lock)

    def tick(self) -> None:
        """Count a call."""
        with self._lock:
            self._calls += 1
            if self._calls == self.first:
                self._began = perf_counter()
            if self._calls == self.first + self.count:
                self._ended = perf_counter()
                self.stop()

    def sample(self) -> Sample:
        return {"per_s": self.count / (self._ended - self._began)}


def has_huey() -> bool:
    """Return true if huey can be imported."""
    return find_spec("huey") is not None


def has_procrastinate() -> bool:
    """Return true if Procrastinate and its driver can be imported."""
    return None not in (find_spec("procrastinate"), find_spec("psycopg_pool"))


def live_by_huey(path: Path, workers: int, first: int, count: int) -> Sample:
    """Run jobs by the threads of huey's consumer, on SQLite, flushed at each commit."""
    huey = importlib.import_module("huey").SqliteHuey("bench", filename=str(path), fsync=True)
    require_durable(huey.storage.conn)
    done = Event()
    clock = Clock(first, count, done.set)

    @huey.task()  # type: ignore[untyped-decorator]  # a library without types
    def work(source: str, chunk_size: int) -> Any:
        clock.tick()
        return RESULT

    for _ in range(first + count):
        work(**PAYLOAD)
    logger = logging.getLogger("huey")
    logger.setLevel(logging.WARNING)
    consumer = importlib.import_module("huey.consumer").Consumer(
        huey, workers=workers, periodic=False, check_worker_health=False
    )
    # Not `start`: it would take the signals of this process.
    consumer.scheduler.start()
    for _, thread in consumer.worker_threads:
        thread.start()
    try:
        if not done.wait(300):
            raise RuntimeError("huey has not run its jobs in time")
    finally:
        consumer.stop(graceful=True)
        huey.storage.close()
    return clock.sample()


async def fill_procrastinate(url: str, count: int) -> None:
    """Create Procrastinate's tables with that many jobs."""
    app, task = _procrastinate(url, Clock(0, 0))
    async with app.open_async():
        await app.schema_manager.apply_schema_async()
        for begun in range(0, count, 1000):
            await task.batch_defer_async(*[PAYLOAD] * min(1000, count - begun))


async def live_by_procrastinate(url: str, workers: int, first: int, count: int) -> Sample:
    """Run the jobs of a database by Procrastinate's worker."""
    clock = Clock(first, count)
    app, _ = _procrastinate(url, clock)
    async with app.open_async():
        await app.run_worker_async(
            concurrency=workers,
            wait=False,
            listen_notify=False,
            install_signal_handlers=False,
        )
    return clock.sample()


def _procrastinate(url: str, clock: Clock) -> tuple[Any, Any]:
    library: Any = importlib.import_module("procrastinate")
    logging.getLogger("procrastinate").setLevel(logging.WARNING)
    plain = make_url(url).set(drivername="postgresql").render_as_string(hide_password=False)
    app = library.App(connector=library.PsycopgConnector(conninfo=plain))

    @app.task(name="work")  # type: ignore[untyped-decorator]  # a library that may be missing
    async def work(source: str, chunk_size: int) -> Any:
        clock.tick()
        return RESULT

    return app, work
