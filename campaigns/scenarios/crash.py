"""`kill -9` of workers under load, and of their PostgreSQL server.

Every acknowledged call must be in the database, and every other one as a whole or not at all; see
`audit`. In the long form, the store must be open again within a second, in the median.
"""

from __future__ import annotations

from collections.abc import Iterator

from campaigns.harness.campaign import POSTGRESQL, SQLITE, Campaign, Location, Run
from campaigns.harness.direct_access import wait_until_disconnected
from campaigns.scenarios.workers import (
    Interruption,
    Worker,
    check_opening_times,
    interrupt_repeatedly,
)

KILLS_A_DATABASE = 20
"""Kills before a new database is begun, since the check of a larger one takes longer."""


def perform(run: Run) -> None:
    """Make `run.rounds` kills."""
    seconds: list[float] = []
    for kills in run.parts(KILLS_A_DATABASE):
        with run.location() as location:
            seconds += interrupt_repeatedly(run, location, _interruptions(run, location, kills))
    check_opening_times(run, seconds)


def _interruptions(run: Run, location: Location, kills: int) -> Iterator[Interruption]:
    """Yield kills of the worker on SQLite; on PostgreSQL, of the worker and the server in turn."""
    for number in range(kills):
        if run.kind == SQLITE:
            yield Interruption(Worker.kill)
        elif number % 2:
            yield Interruption(lambda _: run.server.kill(), run.server.start)
        else:
            yield Interruption(Worker.kill, lambda: wait_until_disconnected(location))


CAMPAIGN = Campaign(
    name="crash",
    title="kill -9 of a worker with 64 writers, or of the server",
    promises=("P1", "P2", "P4", "P5"),
    perform=perform,
    rounds=1000,
    quick_rounds=2,
    unit="kills",
    rounds_of={POSTGRESQL: 400},
    bugs={
        "acknowledge-before-commit": "lost: task",
        "revision-outside-transaction": "by the feed",
    },
)
