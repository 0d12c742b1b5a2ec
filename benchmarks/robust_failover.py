"""The time without writes while a standby takes over, measured by the campaign `failover`.

A benchmark of this module belongs to the group `robust`: add it to `BENCHMARKS`.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

from benchmarks.measure import Bench, Benchmark, Figure, Line, Sample, Skipped, at_most
from campaigns.harness.campaign import POSTGRESQL, Run
from campaigns.scenarios.failover import fail_over, running_pair

_WAYS = ("kill", "hang")


async def failover(bench: Bench) -> Sequence[Figure | Skipped]:
    """Measure the longest time without an acknowledged write, for each way to fail."""
    if bench.scaled(100) < 100:
        return [Skipped("a silent host takes ten seconds: measured without --quick")] * len(_WAYS)

    async def fail() -> Sample:
        gaps: dict[str, float] = {}
        with TemporaryDirectory() as folder:
            run = Run(POSTGRESQL, len(_WAYS), Path(folder), seed=0)
            async with running_pair() as pair:
                for way in _WAYS:
                    gaps[way] = await fail_over(run, pair, way, way)
                    await pair.swap(way)
        if run.findings:
            raise RuntimeError("\n".join(run.findings))
        return gaps

    gaps = (await bench.interleave({"failover": fail}))["failover"]
    return [Figure(gap, f"{gap:.2f} s", "") for gap in gaps.values()]


BENCHMARKS = (
    Benchmark(
        "pg-failover",
        failover,
        (
            Line(
                "PostgreSQL with a synchronous standby: time without writes at a failover, "
                "processes killed",
                "s",
                at_most(5, 2),
            ),
            Line("… host silent", "s", at_most(12, 6)),
        ),
        needs_server=True,
    ),
)
"""The benchmarks of this module, which are in the group `robust`."""
