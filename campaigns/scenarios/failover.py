"""The primary of two PostgreSQL servers fails under load, and its synchronous standby takes over.

Callers add tasks and cancel each second one, through a URL that names both servers. Each repeats a
call until it is acknowledged. Meanwhile the primary fails in one of four ways: all of its processes
are killed; they are stopped, so that the host accepts connections and says nothing; the network to
it is cut; or it is shut down as planned. The standby is promoted at once, so a gap without
acknowledgements is the time that the store needs to find out and to connect.

After each failover, all acknowledged tasks are on the new primary, with consecutive revisions; a
cache equals them, and a second process has followed. Then the former primary becomes the standby.
"""

from __future__ import annotations

import asyncio
import time
from collections import defaultdict
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager, suppress
from functools import partial
from itertools import count, pairwise

from sqlalchemy import make_url

from campaigns.faults.planted_bugs import planted
from campaigns.faults.proxy import Proxy, port_of, with_parts
from campaigns.harness.campaign import POSTGRESQL, Campaign, Run, silenced, within
from campaigns.harness.direct_access import driver, driver_url
from devtools.postgres import Server, running_server
from openclaw_store import Database, StateManager, Task, TaskStatus, TaskType
from openclaw_store.errors import (
    BackendError,
    DuplicateError,
    InvalidTransitionError,
    OutcomeUnknownError,
)
from openclaw_store.testing import create_database

LONGEST_GAP_SECONDS = {"kill": 5.0, "hang": 12.0, "cut": 12.0, "switch": 5.0}
"""The ways to fail, each with the longest time that may pass without an acknowledgement."""

CALLERS = 8

CALLS_AFTER = 20
"""Acknowledged calls of each caller after the fault."""

PAUSE_SECONDS = 0.02
"""Time before a call is repeated."""

PATIENCE_SECONDS = 60.0


class Pair:
    """A primary and its synchronous standby."""

    def __init__(self, primary: Server, standby: Server, database: str) -> None:
        self.primary, self.standby, self._database = primary, standby, database

    def url_of(self, server: Server) -> str:
        return with_parts(server.url, database=self._database)

    def url_through(self, port: int) -> str:
        """Return the URL of both, with another port for the primary."""
        hosts = [f"127.0.0.1:{port}", f"127.0.0.1:{port_of(self.standby.url)}"]
        url = make_url(self.url_of(self.primary))._replace(host=None, port=None)
        url = url.update_query_dict({"host": hosts, "target_session_attrs": "read-write"})
        return url.render_as_string(hide_password=False)

    async def join(self) -> None:
        """Make the standby a copy of the primary, and let commits wait for it."""
        await asyncio.to_thread(self.standby.stop)
        await asyncio.to_thread(self.standby.follow, self.primary)
        connection = await driver().connect(driver_url(self.primary.url))
        await connection.execute("ALTER SYSTEM SET synchronous_standby_names = '*'")
        await connection.execute("SELECT pg_reload_conf()")
        for _ in range(1000):
            if await connection.fetchval("SELECT sync_state FROM pg_stat_replication") == "sync":
                break
            await asyncio.sleep(0.01)
        await connection.close()

    async def fail(self, way: str, proxy: Proxy) -> None:
        """Let the primary fail, and promote the standby."""
        if way == "cut":
            proxy.swallow()
        else:
            stop = {"kill": self.primary.kill, "hang": self.primary.hang}
            await asyncio.to_thread(stop.get(way, self.primary.stop))
        connection = await driver().connect(driver_url(self.standby.url))
        await connection.fetchval("SELECT pg_promote()")
        await connection.close()

    async def swap(self, way: str) -> None:
        """Make the former primary the standby."""
        if way == "cut":
            await asyncio.to_thread(self.primary.kill)
        self.primary, self.standby = self.standby, self.primary
        await self.join()


class Callers:
    """Callers on one `StateManager`, and what they know."""

    def __init__(self, run: Run, name: str, manager: StateManager) -> None:
        self.run, self.name, self.manager = run, name, manager
        self.stored: dict[str, TaskStatus] = {}
        """The state of each task, as it was acknowledged."""
        self.answered_at: list[float] = []
        self.failed_at: float | None = None
        """The time at which the fault was over."""

    async def work(self, caller: int) -> None:
        """Add and cancel tasks until long enough after the fault."""
        left = CALLS_AFTER
        for number in count():
            task = Task.create(TaskType.BATCH, "t", task_id=f"{self.name}-{caller}-{number}")
            await self.until_done(partial(self.manager.add_task, task), DuplicateError)
            self.stored[task.task_id] = TaskStatus.PENDING
            if number % 2:
                cancel = partial(self.manager.cancel_task, task.task_id)
                await self.until_done(cancel, InvalidTransitionError)
                self.stored[task.task_id] = TaskStatus.CANCELLED
            left -= self.failed_at is not None
            if not left:
                break

    async def until_done(
        self, call: Callable[[], Awaitable[object]], refused_if_done: type[Exception]
    ) -> None:
        """Repeat a call until it is acknowledged, or refused because it was done."""
        counts, is_in_doubt = self.run.counts, False
        while True:
            try:
                await call()
            except OutcomeUnknownError:
                counts.unknown += 1
                is_in_doubt = True
            except BackendError:
                counts.refused += 1
            except refused_if_done as error:
                self.run.check(is_in_doubt, f"it had failed, and was done: {error!r}")
                counts.unknown_committed += 1
                break
            else:
                counts.acknowledged += 1
                break
            await asyncio.sleep(PAUSE_SECONDS)
        self.answered_at.append(time.monotonic())


async def fail_over(run: Run, pair: Pair, way: str, name: str) -> float:
    """Let the primary fail once, and return the longest time without an acknowledgement."""
    async with Proxy(pair.url_of(pair.primary)) as proxy:
        port = port_of(proxy.url if way == "cut" else pair.primary.url)
        url = pair.url_through(port)
        async with (
            run.opened(StateManager(Database(url))) as manager,
            run.opened(StateManager(Database(url))) as follower,
        ):
            callers = Callers(run, name, manager)
            working = [asyncio.create_task(callers.work(number)) for number in range(CALLERS)]
            await asyncio.sleep(run.random.uniform(0.2, 0.6))
            await pair.fail(way, proxy)
            callers.failed_at = time.monotonic()
            await within(asyncio.gather(*working), f"to write after {way}", PATIENCE_SECONDS)
            await check(run, pair, callers, manager, follower)
    return max(after - before for before, after in pairwise(callers.answered_at))


async def check(
    run: Run, pair: Pair, callers: Callers, manager: StateManager, follower: StateManager
) -> None:
    """Check that all acknowledged calls are on the new primary and in both caches."""
    connection = await driver().connect(driver_url(pair.url_of(pair.standby)))
    rows = await connection.fetch("SELECT task_id, status FROM tasks")
    revisions = await connection.fetch("SELECT revision FROM changes ORDER BY revision")
    await connection.close()
    found = dict(rows)
    for id, status in callers.stored.items():
        if found.get(id) != status.value:
            run.lost(f"{id} is {found.get(id)}, and was acknowledged as {status.value}")
    numbers = [revision for (revision,) in revisions]
    run.check(numbers == list(range(1, len(numbers) + 1)), f"{callers.name}: revisions have gaps")
    for name, one in (("writer", manager), ("follower", follower)):
        await within(refresh(one), f"to refresh the {name}", PATIENCE_SECONDS)
        tasks = (await one.get_state()).tasks
        pending = {id for id, status in found.items() if status == TaskStatus.PENDING.value}
        run.check(tasks.keys() == pending, f"{callers.name}: the cache of the {name} differs")


async def refresh(manager: StateManager) -> None:
    """Read what the new primary has; a connection to the silent one may have to end first."""
    while True:
        with suppress(BackendError):
            await manager.refresh_from_database()
            return
        await asyncio.sleep(PAUSE_SECONDS)


@asynccontextmanager
async def running_pair(like: Server | None = None) -> AsyncIterator[Pair]:
    """Run a primary with an empty store, and its synchronous standby."""
    with (
        silenced("openclaw_store", "sqlalchemy"),
        running_server(like=like) as primary,
        running_server(like=like) as standby,
    ):
        url = await primary.create_database()
        await asyncio.to_thread(create_database, url)
        database = make_url(url).database
        assert database is not None
        pair = Pair(primary, standby, database)
        await pair.join()
        yield pair


def perform(run: Run) -> None:
    """Let the primary fail `run.rounds` times, in each way in turn."""
    gaps: defaultdict[str, list[float]] = defaultdict(list)

    async def fail_again_and_again() -> None:
        async with running_pair(run.server) as pair:
            for number in run.each_round():
                way = list(LONGEST_GAP_SECONDS)[number % len(LONGEST_GAP_SECONDS)]
                gap = await fail_over(run, pair, way, f"{number}")
                limit = LONGEST_GAP_SECONDS[way]
                run.check(gap <= limit, f"{gap:.1f} s without a write after {way}")
                gaps[way].append(gap)
                await pair.swap(way)

    with planted(run.bug):
        asyncio.run(fail_again_and_again())
    for way, found in gaps.items():
        run.notes[f"longest gap at {way}"] = f"{max(found):.2f} s"


CAMPAIGN = Campaign(
    name="failover",
    title="the primary is killed, hangs, is cut off or shut down, and its standby is promoted",
    promises=("P1", "P5"),
    perform=perform,
    rounds=50,
    quick_rounds=0,  # a silent server takes ten seconds
    unit="failovers",
    kinds=(POSTGRESQL,),
)
