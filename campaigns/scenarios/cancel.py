"""Every public coroutine, cancelled at every step of the event loop.

A call is made again and again, each time on tasks and nodes of its own, and each time cancelled at
another of its steps (`steps.py` says what these are): by `Task.cancel`, by that three times in a
row, by an `asyncio.timeout` around it, and by another task of its `TaskGroup` that fails. Others
write at the same moment, mostly in the same batch. Then it must be so:

- The call has ended with its cancellation, and has changed nothing or all that it does when it is
  not cancelled, in the database as in memory (a call that works in batches: some of it, and again
  it does the rest). That is so when it ends: nothing of it happens later.
- The others have done what they wanted.
- The next write works at once, here and on a connection of somebody else's.
- No connection is in use, no task of the call is left; at the end of a pass no thread, no file and
  no connection to the server.
- Nothing was logged above INFO, no warning given, and no event loop told of an error.

What a call changes is not written down here: it is taken from what it does uncancelled. The
database is read past the library. Which coroutines there are is found by looking, so that one that
has no call in `scenes.py` is found to be missing.
"""

from __future__ import annotations

import asyncio
import gc
import logging
import sys
import threading
import time
import warnings
from collections import Counter
from collections.abc import Coroutine, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from itertools import count, product
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

from campaigns.faults.planted import planted
from campaigns.faults.steps import MANNERS, Ended, Manner, Steps
from campaigns.harness.beside import Neighbour, neighbour_at
from campaigns.harness.campaign import POSTGRESQL, Campaign, HangError, Location, Run, within
from campaigns.workloads.scenes import (
    CALLS,
    NEIGHBOURS,
    NODE_ROLES,
    TASK_ROLES,
    Call,
    Scene,
    hold_unsaved,
    public_coroutines,
)
from openclaw_store import Database, StateManager, StoreError, verify

STEPS_A_ROUND = 3
"""At so many of its steps a call is cancelled in a round, spread over all; then at others."""

_within = partial(within, seconds=20)
"""What waits for a lock that was left behind gives up later than that, and counts as hanging."""

LEAK_SECONDS = 3.0
"""After which what is still in use counts as leaked."""

Rows = dict[tuple[str, str], dict[str, Any]]
"""What there is of a scene, by table and role; of the feed, by role and place."""

_UNWRITTEN = ("unsaved",)
"""Roles of what is only in memory before the call, and is written after it in any case."""

_BEATEN = ("cpu_usage", "last_heartbeat")
"""Columns that heartbeats write, at any time."""

_LEFT_OUT = ("version", "beat", "average_execution_time")
"""Columns that are never the same."""


class _Noise:
    """What should not be heard: errors that nobody handles, warnings, and logs above INFO."""

    def __init__(self) -> None:
        self.heard: list[str] = []

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Hear all there is in this process."""
        heard = self.heard

        class Ear(logging.Handler):
            def emit(self, record: logging.LogRecord) -> None:
                heard.append(f"logged: {record.getMessage()}")

        ear, root = Ear(logging.WARNING), logging.getLogger()
        root.addHandler(ear)
        try:
            with (
                patch.object(sys, "unraisablehook", lambda one: heard.append(f"{one.exc_value!r}")),
                patch.object(
                    threading, "excepthook", lambda one: heard.append(f"{one.exc_value!r}")
                ),
                warnings.catch_warnings(),
            ):
                warnings.simplefilter("always")
                warnings.showwarning = lambda message, *_, **__: heard.append(f"warned: {message}")
                yield
        finally:
            root.removeHandler(ear)

    def hear_of_loop(self, _: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
        """Hear what an event loop is told of."""
        self.heard.append(f"the loop was told: {context['message']} {context.get('exception')!r}")

    def blame(self, run: Run, where: str) -> None:
        """Whatever was heard is the fault of what was done last."""
        for heard in self.heard:
            run.wrong(f"{where}: {heard}")
        self.heard.clear()


class _Book:
    """What is known of the calls so far."""

    def __init__(self) -> None:
        self.steps: dict[str, int] = {}
        """How many each has when it is not cancelled."""
        self.effects: dict[str, tuple[Rows, Rows]] = {}
        """The rows without it, and with it."""
        self.rounds: Counter[tuple[str, Manner]] = Counter()
        self.cancelled: set[tuple[str, Manner, int]] = set()
        self.numbers = count(1)
        """Of scenes."""
        self.slowest = 0.0
        """How long a write took that came next, in seconds."""

    def stride(self, name: str) -> int:
        """After so many rounds with a call, it was cancelled at each of its steps."""
        return -(-self.steps.get(name, 1) // STEPS_A_ROUND)

    def sweeps(self, pair: tuple[str, Manner]) -> int:
        """How often it was so."""
        return self.rounds[pair] // self.stride(pair[0])


class _Pass:
    """The calls, one after another, on one database."""

    def __init__(self, run: Run, book: _Book, noise: _Noise, steps: Steps) -> None:
        self.run, self.book, self.noise, self.steps = run, book, noise, steps
        self.last: Scene | None = None
        self.location: Location
        self.target: Location
        self.manager: StateManager
        self.outside: Neighbour

    async def go(
        self, location: Location, target: Location, plan: Sequence[tuple[str, Manner]]
    ) -> None:
        """Do a round with each call of the plan."""
        asyncio.get_running_loop().set_exception_handler(self.noise.hear_of_loop)
        self.location, self.target = location, target
        self.outside = await neighbour_at(location)
        try:
            async with self.run.opened(StateManager(Database(location), None)) as self.manager:
                for name, manner in plan:
                    await self.round(name, manner)
                    self.run.done()
                    if self.is_found():
                        return
                found = await verify(self.manager.db)
                self.run.check(bool(found), f"verify finds {found.problems[:3]}")
            await self.judge_connections()
        except HangError as hang:
            self.run.wrong(f"the rest of the pass was not tried: {hang}")
        finally:
            await self.outside.close()

    def is_found(self) -> bool:
        """Whether a bug was to be found, and something is."""
        return bool(self.run.bug and self.run.findings)

    async def round(self, name: str, manner: Manner) -> None:
        """Cancel a call at some of its steps; in several rounds, at all of them."""
        call, book = CALLS[name], self.book
        if name not in book.effects:
            await within(self.learn(name, call), f"{name}, not cancelled")
        steps, stride = book.steps[name], book.stride(name)
        first = 1 + (book.rounds[name, manner] + self.run.seed) % stride
        book.rounds[name, manner] += 1
        for at in range(first, steps + 1, stride):
            where = f"{name}, {manner.__name__} at step {at}"
            if await self.cancel(name, call, manner, at, where):
                book.cancelled.add((name, manner, at))
            if self.is_found():
                return

    async def learn(self, name: str, call: Call) -> None:
        """See what a call does that is not cancelled, and how many steps it has."""
        scene = await self.prepare(call)
        if call.before is hold_unsaved:
            await self.manager.sync_to_database()
        before = await self.rows(scene, call)
        if call.before is hold_unsaved:
            scene = await self.prepare(call)
        ended, writes = await self.attempt(call, scene, MANNERS[0], 0)
        await asyncio.gather(*writes)
        if ended.error is not None:
            raise ended.error
        await self.finish(call, scene)
        self.book.steps[name] = ended.steps
        self.book.effects[name] = before, await self.rows(scene, call)

    async def attempt(
        self, call: Call, scene: Scene, manner: Manner, at: int
    ) -> tuple[Ended, Sequence[asyncio.Future[Any]]]:
        """Make a call, cancelled at a step, and see how it ends; and what its neighbours write."""
        loop = asyncio.get_running_loop()
        writes: list[asyncio.Future[Any]] = []

        def begin(write: Coroutine[Any, Any, Any]) -> None:
            writes.append(asyncio.ensure_future(write))

        def make() -> Coroutine[Any, Any, Any]:
            if call.is_open:
                begin(scene.other.task_repo.create(scene.task("third")))
            begin(self.manager.add_task(scene.task("neighbour")))
            loop.call_soon(begin, self.manager.cancel_task(scene.id("ending")))
            loop.call_soon(begin, self.manager.task_repo.create(scene.task("second")))
            return _made(call, scene)

        return await manner(make, self.steps, at), writes

    async def cancel(self, name: str, call: Call, manner: Manner, at: int, where: str) -> bool:
        """Cancel a call, beside others, and check all that must be so; whether it was cancelled."""
        scene = await self.prepare(call)
        tasks = asyncio.all_tasks()
        ended, writes = await _within(self.attempt(call, scene, manner, at), where)
        rows, memory = await self.rows(scene, call), await self.memory(scene)
        self.judge_end(ended, where)
        await self.judge_neighbours(call, scene, writes, where)
        await self.judge_doors(scene, where)
        await _within(self.finish(call, scene), f"{where}: what comes after it")
        await self.judge_leaks(tasks, where)
        later = await self.rows(scene, call)
        if not call.lingers:
            changed = _differences(rows, later) + _differences(memory, await self.memory(scene))
            self.run.check(not changed, f"{where}: was over, and then changed {changed}")
        await self.judge_outcome(name, scene, ended, later, where)
        await self.judge_memory(where)
        self.noise.blame(self.run, where)
        return bool(ended.is_cancelled)

    async def prepare(self, call: Call) -> Scene:
        """Make a scene, and remove the last one."""
        manager, last = self.manager, self.last
        folder = self.run.folder
        scene = Scene(manager, next(self.book.numbers), self.location, self.target, folder)
        changes: list[Coroutine[Any, Any, Any]] = [
            *map(manager.add_node, scene.nodes.values()),
            *map(manager.add_task, scene.tasks.values()),
        ]
        if last is not None:
            changes += [manager.remove_task(last.id(role)) for role in TASK_ROLES]
            changes += [manager.remove_node(last.id(role)) for role in NODE_ROLES]
        await _within(asyncio.gather(*changes), "a write between two calls")
        await manager.update_heartbeat(scene.id("busy"), cpu_usage=42)
        if call.before is not None:
            await _within(call.before(scene), "what comes before a call")
        self.last = scene
        return scene

    async def finish(self, call: Call, scene: Scene) -> None:
        """Clean up behind a call, and write what is only in memory."""
        if call.after is not None:
            await call.after(scene)
            await self.manager.refresh_from_database()
        await self.manager.sync_to_database()

    async def rows(self, scene: Scene, call: Call) -> Rows:
        """What the database holds of a scene and its history, but for its neighbours."""
        ids = {
            scene.id(role): role for role in (*TASK_ROLES, *NODE_ROLES) if role not in NEIGHBOURS
        }
        listed = ", ".join(f"'{id}'" for id in ids)
        rows: Rows = {}
        for table, key in (("tasks", "task_id"), ("nodes", "node_id")):
            for row in await self.outside.ask(f"SELECT * FROM {table} WHERE {key} IN ({listed})"):
                rows[table, ids[row[key]]] = _plain(scene, row)
        if call.keeps_feed:
            for row in await self.outside.ask(
                "SELECT item_id, kind, from_status, to_status, node, reason FROM changes "
                f"WHERE revision > {scene.revision} ORDER BY revision"
            ):
                if row["item_id"] in ids:
                    history = rows.setdefault(("changes", ids[row["item_id"]]), {})
                    history[f"change {len(history)}"] = tuple(_plain(scene, row).values())
        return rows

    async def memory(self, scene: Scene) -> Rows:
        """What is in memory of a scene, but for its neighbours."""
        state = await self.manager.get_state()
        found: Rows = {}
        for kind, items, roles in (
            ("tasks", state.tasks, TASK_ROLES),
            ("nodes", state.nodes, NODE_ROLES),
        ):
            for role in roles:
                item: Any = items.get(scene.id(role))
                if item is not None and role not in NEIGHBOURS:
                    found[kind, role] = {"version": item.version, "status": item.status}
        return found

    def judge_end(self, ended: Ended, where: str) -> None:
        """Has it ended with its cancellation, or because it was done?"""
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

    async def judge_neighbours(
        self, call: Call, scene: Scene, writes: Sequence[asyncio.Future[Any]], where: str
    ) -> None:
        """Have the others done what they wanted?"""
        counts = self.run.counts
        for write in writes:
            try:
                await _within(write, f"{where}: a neighbour")
                counts.acknowledged += 1
            except (StoreError, asyncio.CancelledError) as error:
                counts.refused += 1
                self.run.wrong(f"{where}: a neighbour got {error!r}")
        if len(writes) < 3 + call.is_open:
            return  # it was cancelled before it began, and nobody else began, either
        wanted = {scene.id(role) for role in ("neighbour", "second", "ending")}
        wanted |= {scene.id("third")} if call.is_open else set()
        listed = ", ".join(f"'{id}'" for id in wanted)
        there = "status = 'cancelled' OR task_id NOT LIKE 'ending-%'"
        found = await self.outside.ask(
            f"SELECT task_id FROM tasks WHERE task_id IN ({listed}) AND ({there})"
        )
        for id in wanted.difference(row["task_id"] for row in found):
            self.run.lost(f"{where}: {id} of a neighbour")

    async def judge_doors(self, scene: Scene, where: str) -> None:
        """Can others write at once?"""
        began = time.monotonic()
        add = self.manager.add_task(scene.task("next"))
        await _within(add, f"{where}: the next write")
        self.book.slowest = max(self.book.slowest, time.monotonic() - began)
        try:
            await self.outside.lock()
        except Exception as error:
            self.run.wrong(f"{where}: somebody else cannot write: {error!r}")

    async def judge_leaks(self, before: set[asyncio.Task[Any]], where: str) -> None:
        """Is everything given back?"""
        database, deadline = self.manager.db, time.monotonic() + LEAK_SECONDS
        own = {*before, asyncio.current_task()}
        while (in_use := database.checked_out_connections) or asyncio.all_tasks() - own:
            if time.monotonic() > deadline:
                left = asyncio.all_tasks() - own
                raise HangError(f"{where}: {in_use} connections and {left} are left")
            await asyncio.sleep(0.0005)

    async def judge_outcome(
        self, name: str, scene: Scene, ended: Ended, rows: Rows, where: str
    ) -> None:
        """Has it changed nothing, or all that it does?"""
        call, (without, whole) = CALLS[name], self.book.effects[name]
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
                self.run.wrong(f"{where}: was done by halves: {found}")
                return
            await _within(call.make(scene), f"{where}: again")
            missing = _differences(whole, await self.rows(scene, call))
            self.run.check(not missing, f"{where}: again, it has not done {missing}")

    async def judge_memory(self, where: str) -> None:
        """Is memory as the database is?"""
        manager, ask = self.manager, self.outside.ask
        state, stats = await manager.get_state(), await manager.get_task_stats()
        [counters] = await ask("SELECT revision FROM counters")
        here: dict[str, object] = {"revision": manager.version}
        there: dict[str, object] = dict(counters)
        statuses: Counter[str] = Counter()
        for row in await ask("SELECT * FROM tasks"):
            here[row["task_id"]] = _seen(await manager.get_task(row["task_id"]), row)
            there[row["task_id"]] = _seen(SimpleNamespace(**row), row)
            statuses[row["status"]] += 1
        for row in await ask("SELECT * FROM nodes"):
            here[row["node_id"]] = _seen(await manager.get_node(row["node_id"]), row)
            there[row["node_id"]] = _seen(SimpleNamespace(**row), row)
        here |= {id: "unknown" for id in {*state.tasks, *state.nodes} if id not in here}
        here["stats"] = {name: stats[name] for name in stats if stats[name] and name != "total"}
        there["stats"] = dict(statuses)
        wrong = [(here.get(key), there.get(key)) for key in here if here[key] != there.get(key)]
        self.run.check(not wrong, f"{where}: is in memory and in the database: {wrong}")

    async def judge_connections(self) -> None:
        """Is nobody connected to the server any more?"""
        if self.run.kind == POSTGRESQL:
            deadline = time.monotonic() + LEAK_SECONDS
            others = "datname = current_database() AND pid <> pg_backend_pid()"
            while left := await self.outside.ask(f"SELECT * FROM pg_stat_activity WHERE {others}"):
                if time.monotonic() > deadline:
                    self.run.wrong(f"connections are left: {left}")
                    break
                await asyncio.sleep(0.01)


_COMPARED = (
    "version", "status", "name", "assigned_node", "attempt", "retry_count", "error", "priority",
    "hostname", "running_tasks", "completed_tasks", "cpu_usage", "memory_usage",
)  # fmt: skip
"""Columns whose values are the same in memory."""


def _seen(item: Any, row: dict[str, Any]) -> dict[str, Any] | None:
    """What of a row is compared, as it is in an object."""
    return item and {name: getattr(item, name) for name in _COMPARED if name in row}


async def _made(call: Call, scene: Scene) -> Any:
    if call.is_open:
        await asyncio.sleep(0)  # its neighbours come first: what it closes refuses later ones
    return await call.make(scene)


def _plain(scene: Scene, row: dict[str, Any]) -> dict[str, Any]:
    """A row that is the same for each scene: of moments, only whether they are there."""
    plain = {name: value for name, value in row.items() if name not in _LEFT_OUT}
    for name, value in plain.items():
        if isinstance(value, str):
            plain[name] = value.replace(f"-{scene.number}", "")
        elif name.endswith("_at") or name in ("last_heartbeat", "not_before"):
            plain[name] = value is not None
    return plain


def _differences(one: Rows, other: Rows) -> list[str]:
    """Where they differ, but for what is written in any case."""
    return [
        f"{table} {role}: {mine.get(name)!r} → {yours.get(name)!r} ({name})"
        for table, role in sorted({*one, *other})
        if role not in _UNWRITTEN
        for mine, yours in [(one.get((table, role), {}), other.get((table, role), {}))]
        for name in sorted({*mine, *yours})
        if mine.get(name) != yours.get(name) and name not in _BEATEN
    ]


def perform(run: Run) -> None:
    """Make a pass over the calls, and another one, until all rounds are done."""
    known = {name.partition(",")[0] for name in CALLS}
    for name in sorted(public_coroutines() ^ known):
        run.wrong(f"there is no call of {name}" if name not in known else f"there is no {name}")
    book, noise = _Book(), _Noise()
    with noise.listening(), planted(run.bug):
        done = 0
        for number in count():
            pairs = [
                (name, MANNERS[(number + place) % len(MANNERS)])
                for place, name in enumerate(sorted(CALLS))
            ]
            fewest = min(map(book.sweeps, product(CALLS, MANNERS)))
            plan = [pair for pair in pairs if book.sweeps(pair) == fewest]
            plan *= len(pairs) // max(1, len(plan))  # of a few long ones, several rounds each
            run.random.shuffle(plan)
            if run.kind == POSTGRESQL:
                plan.reverse()  # so that short runs on both kinds of database make other calls
            plan.sort(key=lambda pair: CALLS[pair[0]].is_slow)
            if plan := plan[: run.rounds - done]:
                _make_pass(run, book, noise, plan)
                done += len(plan)
            steps = len(MANNERS) * sum(book.steps.values())
            run.notes["cancelled"] = f"at {len(book.cancelled):,} of about {steps:,} steps"
            swept = sum(book.sweeps(pair) > 0 for pair in product(CALLS, MANNERS))
            run.notes["tried at all steps"] = (
                f"{swept} of {len(CALLS) * len(MANNERS)} calls and ways"
            )
            run.notes["slowest next write"] = f"{book.slowest:.3f} s"
            if done == run.rounds or (run.bug and run.findings):
                break


def _make_pass(run: Run, book: _Book, noise: _Noise, plan: Sequence[tuple[str, Manner]]) -> None:
    threads = set(threading.enumerate())
    with run.location() as location, run.location() as target:
        steps = Steps(run.random)
        with asyncio.Runner(loop_factory=lambda: asyncio.SelectorEventLoop(steps)) as runner:
            runner.run(_Pass(run, book, noise, steps).go(location, target, plan))
        deadline = time.monotonic() + LEAK_SECONDS
        while left := set(threading.enumerate()) - threads:
            if time.monotonic() > deadline:
                run.wrong(f"threads are left: {left}")
                break
            time.sleep(0.001)
        gc.collect()
        noise.blame(run, "a pass")
        if isinstance(location, Path):
            files = {file.name for file in location.parent.iterdir()}
            run.check(files == {"cluster.db"}, f"files are left: {files}")


CAMPAIGN = Campaign(
    name="cancel",
    title="every public coroutine is cancelled at every step of the event loop, beside others",
    promises=("P2", "P7"),
    perform=perform,
    rounds=10_000,
    quick_rounds=24,
    unit="calls, each at three steps",
    bugs={"abandoned-batch": "was over, and then changed"},
)
