"""Every public coroutine, cancelled at every step of the event loop.

A call is made again and again, each time on new tasks and nodes, and is cancelled at a different
step each time (see `faults/cancellation.py`): by `Task.cancel`, by three of them in a row, by an
`asyncio.timeout` around it, and by the failure of a sibling in its `TaskGroup`. Concurrent callers
write at the same moment, mostly in the same batch. These conditions must hold:

- The call ends with its cancellation, and has changed nothing or all that it changes without a
  cancellation, in the database as in memory (a call that works in batches may be done in part, and
  a repetition does the rest). This is so when it ends: no part of it happens later.
- The concurrent callers succeed.
- The next write works at once, here and on the connection of a second client.
- No connection is in use and no task of the call is left; at the end of a pass no thread, no file
  and no connection to the server is left.
- There is no log record above INFO, no warning, and no error passed to an event loop.

The expected changes of a call are recorded from a call without a cancellation. The database is read
without the library. The public coroutines are found by inspection, so that a coroutine without a
call in `scenes.py` is reported.
"""

from __future__ import annotations

import asyncio
import gc
import threading
import time
from collections import Counter
from collections.abc import Coroutine, Sequence
from functools import partial
from itertools import count, product
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from campaigns.faults.cancellation import CANCEL_MODES, CallEnd, CancelMode, Steps
from campaigns.faults.planted_bugs import planted
from campaigns.harness.campaign import POSTGRESQL, Campaign, HangError, Location, Run, within
from campaigns.harness.captured_output import CapturedOutput
from campaigns.harness.direct_access import LAST_REVISION, SecondClient, connect_client
from campaigns.workloads.coroutine_calls import CALLS, Call, hold_unsaved, public_coroutines
from campaigns.workloads.fixture import CONCURRENT_ROLES, NODE_ROLES, TASK_ROLES, Fixture
from openclaw_store import Database, StateManager, StoreError, verify

STEPS_A_ROUND = 3
"""Number of steps of a call that a round cancels, spread over all; each round takes new ones."""

_within = partial(within, seconds=20)
"""Waits longer than the timeout for a lock, so that a lock left behind counts as a hang."""

LEAK_SECONDS = 3.0
"""Seconds after which an object still in use counts as leaked."""

Rows = dict[tuple[str, str], dict[str, Any]]
"""Rows of a fixture, by table and role; rows of the feed, by role and position."""

_UNWRITTEN = ("unsaved",)
"""Roles of tasks that are only in memory before the call, and written after it in any case."""

_HEARTBEAT_COLUMNS = ("cpu_usage", "last_heartbeat")
"""Columns that heartbeats write at any time."""

_IGNORED_COLUMNS = ("version", "beat", "average_execution_time")
"""Columns with different values in each call."""


class _Results:
    """The results of the calls so far."""

    def __init__(self) -> None:
        self.steps: dict[str, int] = {}
        """Number of steps of each call without a cancellation."""
        self.effects: dict[str, tuple[Rows, Rows]] = {}
        """The rows before and after each call."""
        self.rounds: Counter[tuple[str, CancelMode]] = Counter()
        self.cancelled: set[tuple[str, CancelMode, int]] = set()
        self.numbers = count(1)
        """Numbers of fixtures."""
        self.slowest = 0.0
        """Seconds of the slowest write after a cancelled call."""

    def stride(self, name: str) -> int:
        """Return the number of rounds that cancel a call at each of its steps."""
        return -(-self.steps.get(name, 1) // STEPS_A_ROUND)

    def sweeps(self, pair: tuple[str, CancelMode]) -> int:
        """Return how often all steps of a call were tried."""
        return self.rounds[pair] // self.stride(pair[0])


class _Pass:
    """The calls, one after another, on one database."""

    def __init__(self, run: Run, results: _Results, output: CapturedOutput, steps: Steps) -> None:
        self.run, self.results, self.output, self.steps = run, results, output, steps
        self.last: Fixture | None = None
        self.location: Location
        self.target: Location
        self.manager: StateManager
        self.outside: SecondClient

    async def run_plan(
        self, location: Location, target: Location, plan: Sequence[tuple[str, CancelMode]]
    ) -> None:
        """Perform a round with each call of the plan."""
        asyncio.get_running_loop().set_exception_handler(self.output.record_loop_error)
        self.location, self.target = location, target
        self.outside = await connect_client(location)
        try:
            async with self.run.opened(StateManager(Database(location), None)) as self.manager:
                for name, mode in plan:
                    await self.round(name, mode)
                    self.run.done()
                    if self.is_found():
                        return
                found = await verify(self.manager.db)
                self.run.check(bool(found), f"verify finds {found.problems[:3]}")
            await self.check_connections()
        except HangError as hang:
            self.run.wrong(f"the rest of the pass was not tried: {hang}")
        finally:
            await self.outside.close()

    def is_found(self) -> bool:
        """True if a planted bug is to be found, and there is a finding."""
        return bool(self.run.bug and self.run.findings)

    async def round(self, name: str, mode: CancelMode) -> None:
        """Cancel a call at some of its steps; several rounds cover all of them."""
        call, results = CALLS[name], self.results
        if name not in results.effects:
            await within(self.record_effect(name, call), f"{name}, not cancelled")
        steps, stride = results.steps[name], results.stride(name)
        first = 1 + (results.rounds[name, mode] + self.run.seed) % stride
        results.rounds[name, mode] += 1
        for at in range(first, steps + 1, stride):
            where = f"{name}, {mode.__name__} at step {at}"
            if await self.cancel(name, call, mode, at, where):
                results.cancelled.add((name, mode, at))
            if self.is_found():
                return

    async def record_effect(self, name: str, call: Call) -> None:
        """Record the effect and the number of steps of a call without a cancellation."""
        fixture = await self.prepare(call)
        if call.before is hold_unsaved:
            await self.manager.sync_to_database()
        before = await self.rows(fixture, call)
        if call.before is hold_unsaved:
            fixture = await self.prepare(call)
        ended, writes = await self.attempt(call, fixture, CANCEL_MODES[0], 0)
        await asyncio.gather(*writes)
        if ended.error is not None:
            raise ended.error
        await self.clean_up(call, fixture)
        self.results.steps[name] = ended.steps
        self.results.effects[name] = before, await self.rows(fixture, call)

    async def attempt(
        self, call: Call, fixture: Fixture, mode: CancelMode, at: int
    ) -> tuple[CallEnd, Sequence[asyncio.Future[Any]]]:
        """Make a call, cancel it at a step, and return its end and the concurrent writes."""
        loop = asyncio.get_running_loop()
        writes: list[asyncio.Future[Any]] = []

        def begin(write: Coroutine[Any, Any, Any]) -> None:
            writes.append(asyncio.ensure_future(write))

        def make() -> Coroutine[Any, Any, Any]:
            if call.is_open:
                begin(fixture.other.task_repo.create(fixture.task("third")))
            # Writes before and after the call in the queue, so that it shares a batch with them.
            begin(self.manager.add_task(fixture.task("beside")))
            loop.call_soon(begin, self.manager.cancel_task(fixture.id("ending")))
            loop.call_soon(begin, self.manager.task_repo.create(fixture.task("second")))
            return _made(call, fixture)

        return await mode(make, self.steps, at), writes

    async def cancel(self, name: str, call: Call, mode: CancelMode, at: int, where: str) -> bool:
        """Cancel a call beside concurrent writes, and check all; true if it was cancelled."""
        fixture = await self.prepare(call)
        tasks = asyncio.all_tasks()
        ended, writes = await _within(self.attempt(call, fixture, mode, at), where)
        rows, memory = await self.rows(fixture, call), await self.memory(fixture)
        self.check_end(ended, where)
        await self.check_concurrent_calls(call, fixture, writes, where)
        await self.check_next_writes(fixture, where)
        await _within(self.clean_up(call, fixture), f"{where}: its clean-up")
        await self.check_leaks(tasks, where)
        # A second look at the rows: no part of the call may happen after its end.
        later = await self.rows(fixture, call)
        if not call.lingers:
            changed = _differences(rows, later) + _differences(memory, await self.memory(fixture))
            self.run.check(not changed, f"{where}: had ended, and then changed {changed}")
        await self.check_outcome(name, fixture, ended, later, where)
        await self.check_memory(where)
        self.output.report_to(self.run, where)
        return bool(ended.is_cancelled)

    async def prepare(self, call: Call) -> Fixture:
        """Create a fixture, and remove the last one."""
        manager, last = self.manager, self.last
        folder = self.run.folder
        fixture = Fixture(manager, next(self.results.numbers), self.location, self.target, folder)
        changes: list[Coroutine[Any, Any, Any]] = [
            *map(manager.add_node, fixture.nodes.values()),
            *map(manager.add_task, fixture.tasks.values()),
        ]
        if last is not None:
            changes += [manager.remove_task(last.id(role)) for role in TASK_ROLES]
            changes += [manager.remove_node(last.id(role)) for role in NODE_ROLES]
        await _within(asyncio.gather(*changes), "a write between two calls")
        await manager.update_heartbeat(fixture.id("busy"), cpu_usage=42)
        if call.before is not None:
            await _within(call.before(fixture), "the preparation of a call")
        self.last = fixture
        return fixture

    async def clean_up(self, call: Call, fixture: Fixture) -> None:
        """Clean up after a call, and write the changes that are only in memory."""
        if call.after is not None:
            await call.after(fixture)
            await self.manager.refresh_from_database()
        await self.manager.sync_to_database()

    async def rows(self, fixture: Fixture, call: Call) -> Rows:
        """Return the rows of a fixture and their history, without rows of concurrent callers."""
        ids = {
            fixture.id(role): role
            for role in (*TASK_ROLES, *NODE_ROLES)
            if role not in CONCURRENT_ROLES
        }
        listed = ", ".join(f"'{id}'" for id in ids)
        rows: Rows = {}
        for table, key in (("tasks", "task_id"), ("nodes", "node_id")):
            for row in await self.outside.fetch(f"SELECT * FROM {table} WHERE {key} IN ({listed})"):
                rows[table, ids[row[key]]] = _plain(fixture, row)
        if call.keeps_feed:
            for row in await self.outside.fetch(
                "SELECT item_id, kind, from_status, to_status, node, reason FROM changes "
                f"WHERE revision > {fixture.revision} ORDER BY revision"
            ):
                if row["item_id"] in ids:
                    history = rows.setdefault(("changes", ids[row["item_id"]]), {})
                    history[f"change {len(history)}"] = tuple(_plain(fixture, row).values())
        return rows

    async def memory(self, fixture: Fixture) -> Rows:
        """Return a fixture's content of memory, without that of concurrent callers."""
        state = await self.manager.get_state()
        found: Rows = {}
        for kind, items, roles in (
            ("tasks", state.tasks, TASK_ROLES),
            ("nodes", state.nodes, NODE_ROLES),
        ):
            for role in roles:
                item: Any = items.get(fixture.id(role))
                if item is not None and role not in CONCURRENT_ROLES:
                    found[kind, role] = {"version": item.version, "status": item.status}
        return found

    def check_end(self, ended: CallEnd, where: str) -> None:
        """Check that the call ended with its cancellation, or because it was done."""
        counts = self.run.counts
        if ended.is_cancelled:
            counts.unknown += 1
        elif ended.error is None:
            counts.acknowledged += 1
        else:
            counts.refused += 1
            self.run.wrong(f"{where}: raised {ended.error!r}")
        if ended.complaint is not None:
            self.run.wrong(f"{where}: {ended.complaint}")

    async def check_concurrent_calls(
        self, call: Call, fixture: Fixture, writes: Sequence[asyncio.Future[Any]], where: str
    ) -> None:
        """Check that the concurrent callers have succeeded."""
        counts = self.run.counts
        for write in writes:
            try:
                await _within(write, f"{where}: a concurrent call")
                counts.acknowledged += 1
            except (StoreError, asyncio.CancelledError) as error:
                counts.refused += 1
                self.run.wrong(f"{where}: a concurrent call got {error!r}")
        if len(writes) < 3 + call.is_open:
            return  # the call never began, and neither did the concurrent ones
        wanted = {fixture.id(role) for role in ("beside", "second", "ending")}
        wanted |= {fixture.id("third")} if call.is_open else set()
        listed = ", ".join(f"'{id}'" for id in wanted)
        there = "status = 'cancelled' OR task_id NOT LIKE 'ending-%'"
        found = await self.outside.fetch(
            f"SELECT task_id FROM tasks WHERE task_id IN ({listed}) AND ({there})"
        )
        for id in wanted.difference(row["task_id"] for row in found):
            self.run.lost(f"{where}: {id} of a concurrent call")

    async def check_next_writes(self, fixture: Fixture, where: str) -> None:
        """Check that the next writes succeed at once."""
        began = time.monotonic()
        add = self.manager.add_task(fixture.task("next"))
        await _within(add, f"{where}: the next write")
        self.results.slowest = max(self.results.slowest, time.monotonic() - began)
        try:
            await self.outside.lock()
        except Exception as error:
            self.run.wrong(f"{where}: a second client cannot write: {error!r}")

    async def check_leaks(self, before: set[asyncio.Task[Any]], where: str) -> None:
        """Check that all resources are released."""
        database, deadline = self.manager.db, time.monotonic() + LEAK_SECONDS
        own = {*before, asyncio.current_task()}
        while (in_use := database.checked_out_connections) or asyncio.all_tasks() - own:
            if time.monotonic() > deadline:
                left = asyncio.all_tasks() - own
                raise HangError(f"{where}: {in_use} connections and {left} are left")
            await asyncio.sleep(0.0005)

    async def check_outcome(
        self, name: str, fixture: Fixture, ended: CallEnd, rows: Rows, where: str
    ) -> None:
        """Check that the call has changed nothing, or all that it should."""
        call, (without, whole) = CALLS[name], self.results.effects[name]
        if not ended.is_cancelled:
            missing = _differences(whole, rows)
            self.run.check(not missing, f"{where}: returned, and has not done {missing}")
        elif not _differences(whole, rows):
            self.run.counts.unknown_committed += whole != without
        elif _differences(without, rows):
            halves = [
                (*place, column, value)
                for place, columns in rows.items()
                for column, value in columns.items()
                if value
                not in (without.get(place, {}).get(column), whole.get(place, {}).get(column))
            ]
            if not call.in_parts or halves:
                found = halves or _differences(whole, rows)
                self.run.wrong(f"{where}: was done in part: {found}")
                return
            await _within(call.make(fixture), f"{where}: again")
            missing = _differences(whole, await self.rows(fixture, call))
            self.run.check(not missing, f"{where}: again, it has not done {missing}")

    async def check_memory(self, where: str) -> None:
        """Check that memory equals the database."""
        manager, fetch = self.manager, self.outside.fetch
        state, stats = await manager.get_state(), await manager.get_task_stats()
        [counters] = await fetch(LAST_REVISION)
        here: dict[str, object] = {"revision": manager.version}
        there: dict[str, object] = dict(counters)
        statuses: Counter[str] = Counter()
        for row in await fetch("SELECT * FROM tasks"):
            here[row["task_id"]] = _seen(await manager.get_task(row["task_id"]), row)
            there[row["task_id"]] = _seen(SimpleNamespace(**row), row)
            statuses[row["status"]] += 1
        for row in await fetch("SELECT * FROM nodes"):
            here[row["node_id"]] = _seen(await manager.get_node(row["node_id"]), row)
            there[row["node_id"]] = _seen(SimpleNamespace(**row), row)
        here |= {id: "unknown" for id in {*state.tasks, *state.nodes} if id not in here}
        here["stats"] = {name: stats[name] for name in stats if stats[name] and name != "total"}
        there["stats"] = dict(statuses)
        wrong = [(here.get(key), there.get(key)) for key in here if here[key] != there.get(key)]
        self.run.check(not wrong, f"{where}: memory and the database differ: {wrong}")

    async def check_connections(self) -> None:
        """Check that no connection to the server is left."""
        if self.run.kind == POSTGRESQL:
            deadline = time.monotonic() + LEAK_SECONDS
            others = "datname = current_database() AND pid <> pg_backend_pid()"
            while left := await self.outside.fetch(
                f"SELECT * FROM pg_stat_activity WHERE {others}"
            ):
                if time.monotonic() > deadline:
                    self.run.wrong(f"connections are left: {left}")
                    break
                await asyncio.sleep(0.01)


_COMPARED = (
    "version", "status", "name", "assigned_node", "attempt", "retry_count", "error", "priority",
    "hostname", "running_tasks", "completed_tasks", "cpu_usage", "memory_usage",
)  # fmt: skip
"""Columns that have the same values in memory."""


def _seen(item: Any, row: dict[str, Any]) -> dict[str, Any] | None:
    """Return the compared columns of a row, with the values of its object."""
    return item and {name: getattr(item, name) for name in _COMPARED if name in row}


async def _made(call: Call, fixture: Fixture) -> Any:
    if call.is_open:
        await asyncio.sleep(0)  # concurrent calls go first: after a close they would be refused
    return await call.make(fixture)


def _plain(fixture: Fixture, row: dict[str, Any]) -> dict[str, Any]:
    """Return a row without the differences between fixtures: of times, only their presence."""
    plain = {name: value for name, value in row.items() if name not in _IGNORED_COLUMNS}
    for name, value in plain.items():
        if isinstance(value, str):
            plain[name] = value.replace(f"-{fixture.number}", "")
        elif name.endswith("_at") or name in ("last_heartbeat", "not_before"):
            plain[name] = value is not None
    return plain


def _differences(one: Rows, other: Rows) -> list[str]:
    """Return the differences, without tasks that are written in any case."""
    return [
        f"{table} {role}: {mine.get(name)!r} → {yours.get(name)!r} ({name})"
        for table, role in sorted({*one, *other})
        if role not in _UNWRITTEN
        for mine, yours in [(one.get((table, role), {}), other.get((table, role), {}))]
        for name in sorted({*mine, *yours})
        if mine.get(name) != yours.get(name) and name not in _HEARTBEAT_COLUMNS
    ]


def perform(run: Run) -> None:
    """Make passes over the calls until all rounds are done."""
    known = {name.partition(",")[0] for name in CALLS}
    for name in sorted(public_coroutines() ^ known):
        run.wrong(f"there is no call of {name}" if name not in known else f"there is no {name}")
    results, output = _Results(), CapturedOutput()
    with output.recording(), planted(run.bug):
        done = 0
        for number in count():
            pairs = [
                (name, CANCEL_MODES[(number + place) % len(CANCEL_MODES)])
                for place, name in enumerate(sorted(CALLS))
            ]
            fewest = min(map(results.sweeps, product(CALLS, CANCEL_MODES)))
            plan = [pair for pair in pairs if results.sweeps(pair) == fewest]
            plan *= len(pairs) // max(
                1, len(plan)
            )  # a plan of few long calls gives each several rounds
            run.random.shuffle(plan)
            if run.kind == POSTGRESQL:
                plan.reverse()  # so that short runs on both databases make different calls
            plan.sort(key=lambda pair: CALLS[pair[0]].is_slow)
            if plan := plan[: run.rounds - done]:
                _make_pass(run, results, output, plan)
                done += len(plan)
            steps = len(CANCEL_MODES) * sum(results.steps.values())
            run.notes["cancelled"] = f"at {len(results.cancelled):,} of about {steps:,} steps"
            swept = sum(results.sweeps(pair) > 0 for pair in product(CALLS, CANCEL_MODES))
            run.notes["tried at all steps"] = (
                f"{swept} of {len(CALLS) * len(CANCEL_MODES)} calls and ways"
            )
            run.notes["slowest next write"] = f"{results.slowest:.3f} s"
            if done == run.rounds or (run.bug and run.findings):
                break


def _make_pass(
    run: Run, results: _Results, output: CapturedOutput, plan: Sequence[tuple[str, CancelMode]]
) -> None:
    threads = set(threading.enumerate())
    with run.location() as location, run.location() as target:
        steps = Steps(run.random)
        with asyncio.Runner(loop_factory=lambda: asyncio.SelectorEventLoop(steps)) as runner:
            runner.run(_Pass(run, results, output, steps).run_plan(location, target, plan))
        deadline = time.monotonic() + LEAK_SECONDS
        while left := set(threading.enumerate()) - threads:
            if time.monotonic() > deadline:
                run.wrong(f"threads are left: {left}")
                break
            time.sleep(0.001)
        gc.collect()
        output.report_to(run, "a pass")
        if isinstance(location, Path):
            files = {file.name for file in location.parent.iterdir()}
            run.check(files == {"cluster.db"}, f"files are left: {files}")


CAMPAIGN = Campaign(
    name="cancel",
    title="every public coroutine is cancelled at every step of the event loop",
    promises=("P2", "P7"),
    perform=perform,
    rounds=10_000,
    quick_rounds=24,
    unit="calls, each at three steps",
    bugs={"abandoned-batch": "had ended, and then changed"},
)
