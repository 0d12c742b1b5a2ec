"""The network between the store and a PostgreSQL server fails, at every kind of moment.

Callers add, change, claim, start and complete tasks through a proxy. Each repeats a call until it
is acknowledged, and then makes the next one. Meanwhile the network fails: connections are reset or
refused, requests and replies are lost, messages arrive in part, late, or a few bytes at a time. A
fault comes at any time, or in place of one request, or of its reply, including those of a commit.

The answers are compared with the rows on the server, read without the proxy and the library: after
each error (any except `OutcomeUnknownError` must have changed nothing), and after each fault: each
task exists once, with one change for each step of its life. Every answer must come in time and be
typed. When the network is back, the next calls work, the cache equals the database, foreign changes
arrive, and a watcher has missed none.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import ExitStack, asynccontextmanager, contextmanager, suppress
from random import Random
from traceback import extract_tb
from typing import Any, TypeVar
from unittest.mock import patch

from campaigns.faults.planted_bugs import planted
from campaigns.faults.proxy import FAULTS, MOMENTS, Fault, Proxy
from campaigns.harness.campaign import POSTGRESQL, Campaign, HangError, Run, silenced
from campaigns.harness.direct_access import LAST_REVISION, driver, driver_url
from campaigns.harness.loop_delay import LoopDelay, watch_loop_delay
from openclaw_store import (
    Database,
    NodeInfo,
    StateManager,
    Task,
    TaskFilter,
    TaskRepository,
    TaskStatus,
    TaskType,
)
from openclaw_store.backends.postgresql import backend as postgresql
from openclaw_store.backends.postgresql import connections
from openclaw_store.backends.postgresql import listening as wakeups
from openclaw_store.errors import (
    BackendError,
    ConflictError,
    DuplicateError,
    OutcomeUnknownError,
    StaleVersionError,
    StoreError,
)

T = TypeVar("T")

LANES = 4
"""Networks that fail side by side, each with its own database; most of the time all wait."""

CALLERS = 3
"""Callers on each network."""

LIMIT_SECONDS = 0.8
"""`Database(timeout=…, answer_timeout=…)`."""

CLOSE_SECONDS = 0.2
"""Limit for closing a connection, here."""

DEADLINE_SECONDS = 2 * (LIMIT_SECONDS + CLOSE_SECONDS)
"""Maximum wait for the write lock, and for the answer."""

LEEWAY_SECONDS = 0.5

PATIENCE_SECONDS = 60.0
"""Seconds after which an expected event counts as hanging."""

HISTORY = [
    (None, "pending"),
    ("pending", "pending"),
    ("pending", "scheduled"),
    ("scheduled", "running"),
    ("running", "completed"),
]
"""The changes of each task."""


def perform(run: Run) -> None:
    """Let the network fail `run.rounds` times."""
    lanes = min(LANES, run.rounds)
    with ExitStack() as stack:
        stack.enter_context(shortened_limits())
        stack.enter_context(silenced("openclaw_store", "sqlalchemy"))
        stack.enter_context(planted(run.bug))
        urls = [str(stack.enter_context(run.location())) for _ in range(lanes)]
        asyncio.run(fail_side_by_side(run, urls))


@contextmanager
def shortened_limits() -> Iterator[None]:
    """Shorten the store's own time limits."""
    with (
        patch.object(postgresql, "_CONNECT_SECONDS", LIMIT_SECONDS),
        patch.object(connections, "_CLOSE_SECONDS", CLOSE_SECONDS),
        patch.object(wakeups, "RETRY_SECONDS", (0.01, 0.1)),
        patch.object(wakeups, "ALIVE_SECONDS", 0.1),
    ):
        yield


async def fail_side_by_side(run: Run, urls: list[str]) -> None:
    """Distribute the faults over the lanes."""
    delay = LoopDelay()
    watching = asyncio.create_task(watch_loop_delay(delay.note))
    numbers = iter(range(run.rounds))

    async def fail_again_and_again(name: int, url: str) -> None:
        lane = Lane(run, delay, Random(f"{run.seed} {name}"), url)
        async with Proxy(url) as lane.proxy:
            await lane.fail(numbers)

    try:
        async with asyncio.TaskGroup() as group:
            for name, url in enumerate(urls):
                group.create_task(fail_again_and_again(name, url))
    finally:
        watching.cancel()
    run.notes["slowest answer"] = f"{delay.slowest_answer:.2f} s"


class Lane:
    """A network, and its callers."""

    def __init__(self, run: Run, delay: LoopDelay, random: Random, url: str) -> None:
        self.run, self.delay, self.random, self.url = run, delay, random, url
        self.proxy: Proxy
        self.manager: StateManager
        self.other: StateManager
        self.past: Any
        """A pool of connections without the proxy and the library."""
        self.jobs = 0
        self.is_ending = False
        self.done: list[str] = []
        """Tasks completed since the last fault."""
        self.seen: list[int] = []
        """Revisions seen by a watcher, which continues after an interruption."""
        self.checked = 0
        """The revision up to which the feed was checked."""

    async def fail(self, numbers: Iterator[int]) -> None:
        """Let the network fail, as long as there are numbers left."""
        self.past = await driver().create_pool(driver_url(self.url), min_size=1, max_size=2)
        database = Database(self.proxy.url, timeout=LIMIT_SECONDS, answer_timeout=LIMIT_SECONDS)
        self.manager = StateManager(database, 3600)
        self.other = StateManager(Database(self.url), None)
        async with self.past, self.other:
            await self.require_success(self.manager.initialize, "to open it")
            watching = asyncio.create_task(self.watch())
            callers = [Caller(self, f"node-{number}") for number in range(CALLERS)]
            for caller in callers:
                await caller.register()
            for number in numbers:
                if not await self.one_fault(callers, number):
                    break  # the tasks that are left over would confuse all further checks
                self.run.done()
            async with time_limit("to shut down"):
                await self.manager.shutdown()
                await watching

    async def watch(self) -> None:
        """Watch every change."""
        while self.manager.is_initialized:
            try:
                async for change in self.manager.watch(since=self.seen[-1] if self.seen else 0):
                    self.seen.append(change.revision)
            except BackendError:
                await asyncio.sleep(0.01)

    async def one_fault(self, callers: list[Caller], number: int) -> bool:
        """Let the network fail while the callers work, restore it, and check the result.

        Return false if the work of the callers or the check did not end.
        """
        fault = self.draw(callers, number)
        self.done, self.is_ending = [], False
        # The callers start first, so that the fault hits calls in progress.
        working = [asyncio.create_task(caller.work()) for caller in callers]
        await asyncio.sleep(self.random.uniform(0, 0.05))
        self.proxy.fail(fault)
        with suppress(TimeoutError):
            await asyncio.wait_for(self.proxy.fault_begun.wait(), 2)
        if not self.proxy.fault_begun.is_set():  # no request with these bytes came
            self.proxy.begin_fault()
        adding = asyncio.create_task(self.other.add_task(make_task(f"other-{number}", "nobody")))
        await asyncio.sleep(self.random.choice([0.1, 0.2, 0.4, 0.8]))
        self.proxy.forward()
        self.is_ending = True
        try:
            async with asyncio.timeout(PATIENCE_SECONDS):
                await asyncio.gather(adding, *working)
                await self.check(f"{fault.kind} at {fault.moment} of {fault.trigger!r}", number)
        except TimeoutError as error:
            each = zip(callers, working, strict=True)
            hanging = [caller.doing for caller, one in each if not one.done()]
            waiting = [
                frame.line
                for frame in extract_tb(error.__cause__.__traceback__ if error.__cause__ else None)
                if frame.filename == __file__
            ]
            self.run.wrong(f"something hangs after {fault}: {hanging}, {waiting}")
        except StoreError as error:
            self.run.wrong(f"something does not work beside {fault}: {error!r}")
        else:
            return True
        finally:
            for one in working:
                one.cancel()
        return False

    def draw(self, callers: list[Caller], number: int) -> Fault:
        """Draw a fault: each kind at each moment in turn, at any request; commits come first."""
        kind = FAULTS[number % len(FAULTS)]
        moment = MOMENTS[number // len(FAULTS) % len(MOMENTS)]
        writes = [b"COMMIT", b"changed"]  # transactions with the write lock, and calls
        triggers = [b"", *writes, *(caller.node_id.encode() for caller in callers)]
        if number < len(FAULTS):
            return Fault(kind, moment, writes[number % len(writes)])
        return Fault(kind, moment, b"" if moment == "now" else self.random.choice(triggers))

    async def check(self, what: str, number: int) -> None:
        """Check all promises, with the network back."""
        run, manager = self.run, self.manager
        # Without a repetition: the fault is over, as all callers have checked.
        for name, call in (
            ("a write", lambda: manager.add_task(make_task(f"after-{number}", "nobody"))),
            ("a read", lambda: manager.task_repo.get(f"after-{number}")),
            ("a transaction", lambda: self.change_nothing()),
        ):
            await self.require_success(call, f"after {what}, {name}")
        await self.other.add_task(make_task(f"heard-{number}", "nobody"))
        newest = await self.past.fetchval(LAST_REVISION)
        if not await becomes_true(lambda: manager.version == newest):
            run.wrong(f"after {what}, foreign changes do not arrive")
        if not await becomes_true(lambda: bool(self.seen) and self.seen[-1] == newest):
            run.wrong(f"after {what}, the watcher has stopped at {self.seen[-1:]} of {newest}")
        run.check(
            self.seen[self.checked :] == list(range(self.checked + 1, newest + 1)),
            f"after {what}, the watcher has missed some or seen them twice",
        )
        await self.check_feed(what, newest)
        await self.require_success(manager.refresh_from_database, f"after {what}, a refreshment")
        await self.check_cache(what)
        if not await becomes_true(lambda: manager.db.checked_out_connections == 0):
            run.wrong(f"after {what}, connections are still in use")

    async def require_success(self, call: Callable[[], Awaitable[object]], name: str) -> None:
        """Check that a call works at once; repeat it only if the machine is too slow."""
        async with time_limit(name):
            while True:
                swallowed = self.proxy.swallowed
                try:
                    await call()
                except DuplicateError:
                    break  # an earlier attempt had worked
                except BackendError as error:
                    if self.proxy.swallowed > swallowed:
                        self.run.wrong(f"{name} does not work: {error!r}")
                    continue
                break

    async def change_nothing(self) -> None:
        async with self.manager.db.transaction() as tx:
            await TaskRepository(tx).get("nothing")

    async def check_feed(self, what: str, newest: int) -> None:
        """Check that each step of each task happened once."""
        changes = await self.past.fetch(
            "SELECT revision, item_id, from_status, to_status FROM changes"
            " WHERE revision > $1 ORDER BY revision",
            self.checked,
        )
        self.run.check(
            [change[0] for change in changes] == list(range(self.checked + 1, newest + 1)),
            f"after {what}, the feed has a gap",
        )
        self.checked = newest
        histories: dict[str, list[tuple[str | None, str | None]]] = {}
        for _, id, *statuses in changes:
            histories.setdefault(id, []).append((statuses[0], statuses[1]))
        for id in self.done:
            history = histories.get(id)
            if history is None:
                self.run.lost(f"{id}, after {what}")
            else:
                self.run.check(
                    history == HISTORY, f"after {what}, the changes of {id} are {history}"
                )

    async def check_cache(self, what: str) -> None:
        """Check that all acknowledged changes are stored, and that the cache equals them."""
        rows = await self.past.fetch(
            "SELECT task_id, status, version, result::text, assigned_node, attempt FROM tasks"
            " WHERE task_id = ANY($1)",
            self.done,
        )
        stored = {row["task_id"]: row for row in rows}
        for id in self.done:
            cached, row = await self.manager.get_task(id), stored.get(id)
            if row is None:
                self.run.lost(f"{id}, after {what}")
                continue
            if row["status"] != "completed" or json.loads(row["result"]) != id:
                self.run.lost(f"the completion of {id}, after {what}")
            assert cached is not None
            same = (cached.status, cached.version, cached.assigned_node, cached.attempt)
            self.run.check(
                same == (row["status"], row["version"], row["assigned_node"], row["attempt"]),
                f"after {what}, {id} is {same} in memory, but {tuple(row)} in the database",
            )
        for row in await self.past.fetch(
            "SELECT node_id, version, running_tasks, successful_tasks FROM nodes"
        ):
            node = await self.manager.get_node(row["node_id"])
            assert node is not None
            known = (node.node_id, node.version, node.running_tasks, node.successful_tasks)
            self.run.check(
                known == tuple(row) and node.running_tasks == 0,
                f"after {what}, a node is {known} in memory, and {tuple(row)} in the database",
            )


class Caller:
    """Takes tasks through their lives, one after another, during all faults."""

    def __init__(self, lane: Lane, node_id: str) -> None:
        self.lane, self.node_id, self.run = lane, node_id, lane.run
        self.doing = ""
        """The current call, to be named if it hangs."""

    async def register(self) -> None:
        """Register the node that alone can run its tasks."""
        node = NodeInfo(self.node_id, self.node_id, available_skills=[self.node_id])
        await self.lane.require_success(
            lambda: self.lane.manager.register_node(node), "to register"
        )

    async def work(self) -> None:
        """Work until the fault is over."""
        while True:
            await self.run_one_task()
            if self.lane.is_ending:
                break

    async def run_one_task(self) -> None:
        """Add, change, claim, start and complete a task."""
        lane, manager = self.lane, self.lane.manager
        lane.jobs += 1
        id = f"task-{lane.jobs}-of-{self.node_id}"
        task = make_task(id, self.node_id)
        add = manager.add_task if lane.random.random() < 0.8 else self.add_in_transaction
        await self.until_done(id, "pending", lambda: add(task), DuplicateError)
        await self.until_done(id, None, lambda: manager.task_repo.get(id))
        # The stored version; the answer with it may be lost.
        task.version = await lane.past.fetchval("SELECT version FROM tasks WHERE task_id = $1", id)
        task.metadata = {"changed": True}
        await self.until_done(id, "pending", lambda: manager.update_task(task), StaleVersionError)
        claimed = await self.claim(id)
        await self.until_done(id, "running", lambda: manager.start_task(claimed))
        await self.until_done(id, "completed", lambda: manager.complete_task(claimed, result=id))
        lane.done.append(id)

    async def add_in_transaction(self, task: Task) -> None:
        async with self.lane.manager.db.transaction() as tx:
            if await TaskRepository(tx).get(task.task_id) is None:
                await TaskRepository(tx).create(task)
            else:
                raise DuplicateError("task", task.task_id)

    async def claim(self, id: str) -> Task:
        """Claim the only task for this node."""
        manager = self.lane.manager
        mine = TaskFilter(node=self.node_id, status=TaskStatus.SCHEDULED)
        while True:
            tasks = await self.until_done(
                id, "scheduled", lambda: manager.claim_tasks(self.node_id)
            )
            if not tasks:  # it may own the task already, before the cache knows it
                page = await self.until_done(id, None, lambda: manager.list_tasks(mine))
                tasks = page.tasks if page else []
            for task in tasks:
                self.run.check(task.task_id == id, f"{self.node_id} was given {task.task_id}")
                return task
            await asyncio.sleep(0.01)

    async def until_done(
        self,
        id: str,
        status: str | None,
        call: Callable[[], Awaitable[T]],
        refused_if_done: type[ConflictError] | None = None,
    ) -> T | None:
        """Repeat a call until it returns, or is refused because it is done; return its answer.

        Args:
            id: The task of the call.
            status: The status of the task when it is done; `None` if the call only reads.
            refused_if_done: The error of a repeated call.
        """
        counts, is_in_doubt = self.run.counts, False
        self.doing = f"{id} to be {status}"
        # Once, before all attempts: a repetition must not change the row a second time.
        before = await self.row(id)
        while True:
            began = time.monotonic()
            error: Exception | None = None
            answer: T | None = None
            try:
                answer = await call()
            except Exception as raised:
                error = raised
            self.check_duration(began, error)
            if error is None:
                counts.acknowledged += 1
                if status is not None and answer != []:
                    after = await self.row(id)
                    if after is None or after["status"] != status or after == before:
                        self.run.lost(f"the change of {id} to {status}: it is {after}")
                return answer
            after = await self.row(id)
            if isinstance(error, OutcomeUnknownError) and status is not None:
                counts.unknown += 1
                counts.unknown_committed += after != before
                is_in_doubt = True
            elif isinstance(error, BackendError):
                counts.refused += 1
                self.run.check(
                    after == before or is_in_doubt, f"{error!r}, but {id} is {after} now"
                )
            else:
                counts.refused += 1
                if refused_if_done is not None and isinstance(error, refused_if_done):
                    self.run.check(
                        is_in_doubt,
                        f"refused as already done, though no attempt is in doubt: {error!r}",
                    )
                else:
                    self.run.wrong(f"an untyped error: {error!r}")
                return None
            await asyncio.sleep(0.01)

    def check_duration(self, began: float, error: Exception | None) -> None:
        took = time.monotonic() - began - self.lane.delay.since(began)
        self.lane.delay.slowest_answer = max(self.lane.delay.slowest_answer, took)
        if took > DEADLINE_SECONDS + LEEWAY_SECONDS:
            self.run.wrong(f"an answer took {took:.2f} s: {error!r}")

    async def row(self, id: str) -> Any:
        """Return the row of a task on the server."""
        return await self.lane.past.fetchrow(
            "SELECT status, version FROM tasks WHERE task_id = $1", id
        )


def make_task(id: str, skill: str) -> Task:
    """Return a task for the node of that name."""
    return Task.create(TaskType.BATCH, "t", task_id=id, required_skills=[skill])


@asynccontextmanager
async def time_limit(what: str) -> AsyncIterator[None]:
    """Check that the block does not hang.

    Raises:
        HangError: If it does.
    """
    try:
        async with asyncio.timeout(PATIENCE_SECONDS):
            yield
    except TimeoutError:
        raise HangError(f"{what} has taken {PATIENCE_SECONDS:g} s") from None


async def becomes_true(condition: Callable[[], bool]) -> bool:
    """Wait some seconds for a condition; return true if it holds."""
    with suppress(TimeoutError):
        async with asyncio.timeout(PATIENCE_SECONDS / 4):
            while not condition():  # noqa: ASYNC110  # there is no event to wait for
                await asyncio.sleep(0.002)
            return True
    return False


CAMPAIGN = Campaign(
    name="network",
    title="connections to the server are reset, cut, stalled or slowed, also during a commit",
    promises=("P1", "P2", "P3", "P4", "P5", "P6", "P7"),
    perform=perform,
    rounds=1000,
    quick_rounds=7,
    unit="faults",
    kinds=(POSTGRESQL,),
    bugs={"lost-reply-is-no-doubt": ", but task-"},
)
