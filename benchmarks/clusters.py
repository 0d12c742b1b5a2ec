"""Many clusters: the cost of a cluster's name, and of many idle clusters in one process."""

from __future__ import annotations

import asyncio
import resource
from collections.abc import Sequence
from contextlib import AsyncExitStack
from functools import partial
from pathlib import Path
from time import perf_counter, process_time

from benchmarks.measure import (
    Bench,
    Benchmark,
    Figure,
    Line,
    Sample,
    at_most,
    drive,
    no_collections,
    percentile,
)
from benchmarks.processes import processes
from benchmarks.work import connected, make_tasks
from openclaw_store import Clusters, Database, Server, StateManager

IDLE_CLUSTERS = 200
"""Clusters that a process opens."""

SETTLE_SECONDS = 35
"""Time after which writers have given their connections back, and all have synchronised once."""

_OTHERS = """
    SELECT count(*) FROM pg_stat_activity
    WHERE datname = current_database() AND pid <> pg_backend_pid()"""


async def cost_of_a_name(bench: Bench) -> Sequence[Figure]:
    """Measure inserts in a cluster, and in the tables of `public`."""
    count, alone = bench.scaled(12_800, 256), bench.scaled(1000, 50)

    async def insert(cluster: str | None) -> Sample:
        async with (
            bench.server_database() as url,
            StateManager(Database(url, cluster=cluster), None) as store,
        ):
            tasks = make_tasks(count + alone)
            with no_collections():
                many = await drive(64, tasks[:count], store.add_task)
                seconds = []
                for task in tasks[count:]:
                    began = perf_counter()
                    await store.add_task(task)
                    seconds.append(perf_counter() - began)
            return {"per_s": many["per_s"], "p50_us": percentile(seconds, 0.5) * 1e6}

    found = await bench.interleave(
        {"cluster": partial(insert, "berlin"), "public": partial(insert, None)}
    )
    cluster, public = found["cluster"], found["public"]
    return [
        Figure(
            public["per_s"] / cluster["per_s"],
            f"{cluster['per_s']:,.0f}/s",
            f"{public['per_s']:,.0f}/s",
        ),
        Figure(
            cluster["p50_us"] / public["p50_us"],
            f"{cluster['p50_us']:.0f} µs",
            f"{public['p50_us']:.0f} µs",
        ),
    ]


async def idle_clusters(bench: Bench) -> Sequence[Figure]:
    """Measure a process that has opened many clusters, has written to each, and waits."""
    count = bench.scaled(IDLE_CLUSTERS, 4)
    settle, seconds = bench.scaled(SETTLE_SECONDS), bench.scaled(60)
    names = [f"cluster_{number}" for number in range(count)]

    async def wait() -> Sample:
        async with bench.server_database() as url, processes(1) as run:
            for name in names:
                await Clusters(url).create(name)
            sample: Sample = await run(_open_and_wait, url, names, settle, seconds)
            return sample

    # Creating them takes minutes, and nothing here depends on a moment.
    sample = (await bench.interleave({"server": wait}, rounds=1))["server"]
    shown = f"{count} clusters"
    return [
        Figure(sample["connections"], f"{sample['connections']:.0f}", shown),
        Figure(sample["cpu_percent"], f"{sample['cpu_percent']:.2f} %", shown),
        Figure(sample["megabytes"], f"{sample['megabytes']:.0f} MB", shown),
    ]


async def _open_and_wait(url: str, names: Sequence[str], settle: float, seconds: float) -> Sample:
    async with AsyncExitStack() as stack:
        server = await stack.enter_async_context(Server(url))
        tasks = make_tasks(len(names))
        for name, task in zip(names, tasks, strict=True):
            state = await stack.enter_async_context(StateManager(server.cluster(name)))
            await state.add_task(task)
        await asyncio.sleep(settle)
        began, cpu = perf_counter(), process_time()
        await asyncio.sleep(seconds)
        share = (process_time() - cpu) / (perf_counter() - began)
        async with connected(url) as connection:
            connections = await connection.fetchval(_OTHERS)
        return {
            "connections": connections,
            "cpu_percent": share * 100,
            "megabytes": _resident_bytes() / 1e6,
        }


def _resident_bytes() -> int:
    """Return the memory that this process has in use; on other systems than Linux, the most."""
    status = Path("/proc/self/statm")
    if status.exists():
        return int(status.read_text().split()[1]) * resource.getpagesize()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


BENCHMARKS = (
    Benchmark(
        "cluster-names",
        cost_of_a_name,
        (
            Line(
                "PostgreSQL: insert with 64 clients, in public / in a cluster",
                "×",
                at_most(1.02, 1.0),
            ),
            Line("… lone insert, p50, in a cluster / in public", "×", at_most(1.02, 1.0)),
        ),
        needs_server=True,
    ),
    Benchmark(
        "idle-clusters",
        idle_clusters,
        (
            Line(
                f"PostgreSQL: {IDLE_CLUSTERS} idle clusters in one process: connections",
                "",
                at_most(10, 5),
            ),
            Line("… share of a core", "%", at_most(2, 1)),
            Line("… memory of the process", "MB", at_most(300, 150)),
        ),
        needs_server=True,
    ),
)
