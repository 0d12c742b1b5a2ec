"""Processes that end without closing the store, fork while they use it, or have several loops.

A round is the life of a process. It opens the store, has something under way (writes, a watcher,
heartbeats, a transaction, ...) and ends in one of the ways in which programs end, closing nothing;
or it forks, and the child goes on with what it has inherited; or it uses the store from another
event loop. Then it must be so:

- It ends, and within a second. What may not be used is refused with an error of the library's,
  within a second, too; what may be used works. A process that hangs is killed, which is seen.
- What was acknowledged is in the database, what was one transaction is there as a whole or not at
  all, nothing is damaged, no revision is missing, and the database opens again.
- Nothing is on the error output but the traceback of the program's own error.

The processes are forks of one that has imported the library: that takes longer than all the rest.
"""

from __future__ import annotations

import asyncio
import faulthandler
import gc
import importlib
import multiprocessing
import os
import signal
import sqlite3
import sys
import threading
import time
import warnings
from collections.abc import Awaitable, Callable, Coroutine, Iterator, Sequence
from contextlib import ExitStack, closing
from functools import partial
from itertools import count, islice, product
from pathlib import Path
from random import Random
from tempfile import TemporaryDirectory
from typing import Any

import openclaw_store
from campaigns.campaign import POSTGRESQL, Campaign, Location, Run
from campaigns.children import Child, Tell
from openclaw_store import (
    Database,
    NodeInfo,
    StateManager,
    StoreError,
    Task,
    TaskRepository,
    TaskType,
    verify,
)

LIMIT_SECONDS = 1.0
"""How long an error, or the end of a process, may take; see `limit`."""

HANGS_SECONDS = 60
"""After which something that should have happened counts as hanging."""

AT_ONCE = 2
"""So many processes live at the same time."""

BATCH = 24
"""So many databases there are at the same time."""


class Life:
    """What a process has, and how it says what happens.

    Args:
        tell: Says something to whoever watches.
        location: Of a migrated, empty database.
        luck: For what is drawn.
    """

    def __init__(self, tell: Tell, location: str, luck: Random) -> None:
        self.tell, self.location, self.luck = tell, location, luck
        self.numbers = count(1)
        self.going_on: list[asyncio.Future[Any]] = []
        """What is under way, and nobody waits for."""

    def task(self) -> Task:
        """A new task."""
        return Task(f"task-{os.getpid()}-{next(self.numbers)}", TaskType.BATCH, "t")

    async def add(self, add: Callable[[Task], Awaitable[object]]) -> None:
        """Add a task, and tell when that is acknowledged."""
        task = self.task()
        self.tell("trying", task.task_id)
        await add(task)
        self.tell("acknowledged", task.task_id)

    async def add_pair(self, database: Database, wait: Callable[[], Awaitable[object]]) -> None:
        """Add two tasks, which must both be there or neither."""
        async with database.transaction() as tx:
            for half in ("left", "right"):
                await TaskRepository(tx).create(Task(half, TaskType.BATCH, "t"))
            await wait()
        self.tell("acknowledged", "left")

    def begin(self, work: Coroutine[Any, Any, Any]) -> None:
        """Have something under way, which may fail."""
        task = asyncio.ensure_future(work)
        task.add_done_callback(lambda task: task.cancelled() or task.exception())
        self.going_on.append(task)

    async def open(self) -> StateManager:
        """A manager that is used already: it has a pool, a writer and a thread that polls."""
        manager = StateManager(Database(self.location), auto_sync_interval=0.05)
        await manager.initialize()
        await manager.register_node(NodeInfo("node", "host"))
        await self.add(manager.add_task)
        await asyncio.gather(*[manager.task_repo.count_by_status() for _ in range(3)])
        return manager

    async def refused(self, what: str, work: Callable[[], Awaitable[object]]) -> None:
        """Try what must be refused."""
        await self._try(what, work, "refused")

    async def works(self, what: str, work: Callable[[], Awaitable[object]]) -> None:
        """Try what must work."""
        await self._try(what, work, "works")

    async def answered(self, what: str, work: Callable[[], Awaitable[object]]) -> None:
        """Try what must work, or be refused."""
        await self._try(what, work, "")

    async def _try(self, what: str, work: Callable[[], Awaitable[object]], wanted: str) -> None:
        began = time.monotonic()
        try:
            async with asyncio.timeout(HANGS_SECONDS / 2):
                await work()
            came = "works"
        except StoreError:
            came = "refused"
        except TimeoutError:
            came = "hangs"
        except Exception as error:
            came = repr(error)
        self.tell("tried", what, came, wanted or came, time.monotonic() - began)

    def leave(self) -> None:
        """Tell that it is about to end."""
        self.tell("leaving", time.monotonic())


# What is under way when a process ends.


async def nothing(life: Life, manager: StateManager) -> None:
    """Nothing at all."""


async def writes(life: Life, manager: StateManager) -> None:
    """Many writes, of which some may be acknowledged yet."""
    for _ in range(50):
        life.begin(life.add(manager.add_task))
    await _a_moment(life)


async def reads(life: Life, manager: StateManager) -> None:
    """Many reads."""
    for _ in range(20):
        life.begin(manager.get_stats())
    await _a_moment(life)


async def watcher(life: Life, manager: StateManager) -> None:
    """Somebody watches, and somebody waits for a task."""

    async def watch() -> None:
        async for change in manager.watch():
            assert change.revision

    life.begin(watch())
    await life.add(manager.add_task)
    life.begin(manager.wait_for_task(f"task-{os.getpid()}-1"))
    await _a_moment(life)


async def heartbeats(life: Life, manager: StateManager) -> None:
    """Heartbeats wait to be written, and so does an entry that is only in memory."""
    await manager.update_heartbeat("node", cpu_usage=1)
    await manager.add_task(life.task(), persist=False)
    await _a_moment(life)


async def transaction(life: Life, manager: StateManager) -> None:
    """Half of a transaction is done."""
    life.begin(life.add_pair(manager.db, asyncio.Event().wait))
    await _a_moment(life)
    life.begin(life.add(manager.add_task))  # waits for its turn
    await _a_moment(life)


async def ending_transaction(life: Life, manager: StateManager) -> None:
    """A transaction is just done, or not yet."""
    life.begin(life.add_pair(manager.db, partial(asyncio.sleep, 0)))
    await _a_moment(life)


async def looking_after(life: Life, manager: StateManager) -> None:
    """A backup and a vacuum are under way."""
    if manager.db.dialect == "sqlite":  # else it needs a program
        life.begin(manager.db.backup(f"{life.location}.backup"))
    life.begin(manager.db.vacuum())
    await _a_moment(life)


async def opening(life: Life, manager: StateManager) -> None:
    """Another manager is being opened."""
    life.begin(StateManager(Database(life.location)).initialize())
    await _a_moment(life)


async def closing_down(life: Life, manager: StateManager) -> None:
    """It is being closed, behind writes."""
    for _ in range(20):
        life.begin(life.add(manager.add_task))
    await asyncio.sleep(0)
    life.begin(manager.shutdown())
    await _a_moment(life)


async def _a_moment(life: Life) -> None:
    await asyncio.sleep(life.luck.choice((0, 0.0003, 0.001, 0.003)))


UNDER_WAY = (
    nothing, writes, reads, watcher, heartbeats, transaction, ending_transaction, looking_after,
    opening, closing_down,
)  # fmt: skip


# How a process ends.


class CrashError(Exception):
    """The program's own."""


Begin = Callable[[Life, StateManager], Awaitable[None]]


async def _begun(life: Life, begin: Begin) -> None:
    await begin(life, await life.open())
    life.leave()


def returns(life: Life, begin: Begin) -> None:
    """The main coroutine returns."""
    asyncio.run(_begun(life, begin))


def raises(life: Life, begin: Begin) -> None:
    """The main coroutine raises an error of its own."""

    async def main() -> None:
        await _begun(life, begin)
        raise CrashError

    asyncio.run(main())


def is_interrupted(life: Life, begin: Begin) -> None:
    """Somebody presses Ctrl-C."""

    async def main() -> None:
        await _begun(life, begin)
        os.kill(os.getpid(), signal.SIGINT)
        await asyncio.Event().wait()

    asyncio.run(main())


def is_terminated(life: Life, begin: Begin) -> None:
    """Somebody ends it by a signal."""

    async def main() -> None:
        await _begun(life, begin)
        os.kill(os.getpid(), signal.SIGTERM)
        await asyncio.Event().wait()

    asyncio.run(main())


def exits(life: Life, begin: Begin) -> None:
    """The main coroutine calls `sys.exit`."""

    async def main() -> None:
        await _begun(life, begin)
        sys.exit(3)

    asyncio.run(main())


def exits_in_a_task(life: Life, begin: Begin) -> None:
    """Another task calls `sys.exit`."""

    async def leave() -> None:
        sys.exit(3)

    async def main() -> None:
        await _begun(life, begin)
        life.begin(leave())
        await asyncio.Event().wait()

    asyncio.run(main())


def exits_at_once(life: Life, begin: Begin) -> None:
    """It calls `os._exit`, which cleans up nothing."""

    async def main() -> None:
        await _begun(life, begin)
        os._exit(3)

    asyncio.run(main())


def closes_its_loop(life: Life, begin: Begin) -> None:
    """It closes its event loop without ending what runs there."""
    loop = asyncio.new_event_loop()
    loop.run_until_complete(_begun(life, begin))
    _drop(loop)


def leaves_a_thread(life: Life, begin: Begin) -> None:
    """All that was in a daemon thread, and the main one ends."""
    begun = threading.Event()

    async def main() -> None:
        await _begun(life, begin)
        begun.set()
        await asyncio.Event().wait()

    threading.Thread(target=lambda: asyncio.run(main()), daemon=True).start()
    begun.wait()


ENDINGS = (
    returns, raises, is_interrupted, is_terminated, exits, exits_in_a_task, exits_at_once,
    closes_its_loop, leaves_a_thread,
)  # fmt: skip


# What else a process may do.


async def _inherited(life: Life, manager: StateManager) -> None:
    """Use what was opened before the fork, and then something of one's own."""
    database, tasks = manager.db, manager.task_repo

    async def read() -> None:
        async with database.session():
            pass

    async def write() -> None:
        async with database.transaction():
            pass

    for what, work in {
        "session": read,
        "transaction": write,
        "initialize": database.initialize,
        "get_stats": database.get_stats,
        "vacuum": database.vacuum,
        "get": lambda: tasks.get("t"),
        "create": lambda: tasks.create(life.task()),
        "add_task": lambda: manager.add_task(life.task()),
        "get_state": manager.get_state,
        "update_heartbeat": lambda: manager.update_heartbeat("node"),
    }.items():
        await life.refused(f"{what}, inherited", work)
    await life.answered("shutdown, inherited", manager.shutdown)
    await life.works("close, inherited", database.close)

    async def own() -> None:
        async with StateManager(Database(life.location)) as manager:
            await life.add(manager.add_task)

    if manager.db.dialect == "sqlite" and manager.db.db_path == life.location:
        await life.refused("a database of its own", own)
    else:
        await life.works("a database of its own", own)


def _fork(life: Life, manager: StateManager) -> None:
    """Fork, have the child try what it has inherited, and wait for it."""
    child = os.fork()
    if child == 0:
        _limit_life()
        status = 1
        try:
            asyncio.run(_inherited(life, manager))
            status = 0
        finally:
            os._exit(status)
    life.tell("child ended", os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))


def forks(life: Life) -> None:
    """It forks on the thread of its event loop, which stands still meanwhile."""

    async def main() -> None:
        manager = await life.open()
        for begin in (writes, heartbeats, watcher):
            await begin(life, manager)
        _fork(life, manager)
        await life.works("add_task after a fork", lambda: life.add(manager.add_task))
        await life.works("shutdown after a fork", manager.shutdown)
        life.leave()

    asyncio.run(main())


def forks_in_a_thread(life: Life) -> None:
    """It forks on another thread, while its loop and its writer go on."""

    async def main() -> None:
        manager = await life.open()
        await writes(life, manager)
        forking = asyncio.to_thread(_fork, life, manager)
        await asyncio.gather(forking, *[life.add(manager.add_task) for _ in range(20)])
        await life.works("shutdown after a fork", manager.shutdown)
        life.leave()

    asyncio.run(main())


def forks_in_a_transaction(life: Life) -> None:
    """It forks while it holds the lock of writers."""

    async def main() -> None:
        manager = await life.open()

        async def fork() -> None:
            pid = os.fork()
            if pid == 0:
                os._exit(0)
            os.waitpid(pid, 0)  # noqa: ASYNC222  # the loop is to stand still

        await life.works("a fork in a transaction", lambda: life.add_pair(manager.db, fork))
        await life.works("shutdown after a fork", manager.shutdown)
        life.leave()

    asyncio.run(main())


def has_workers(life: Life) -> None:
    """It has processes of `multiprocessing`, which are forks, too, and end on their own."""

    async def main() -> None:
        manager = await life.open()
        await writes(life, manager)
        worker = multiprocessing.get_context("fork").Process(target=_work, args=(life, manager))
        worker.start()
        await asyncio.to_thread(worker.join, HANGS_SECONDS)
        life.tell("child ended", -signal.SIGALRM if worker.exitcode is None else worker.exitcode)
        await life.works("add_task beside a worker", lambda: life.add(manager.add_task))
        await life.works("shutdown beside a worker", manager.shutdown)
        life.leave()

    asyncio.run(main())


def _work(life: Life, manager: StateManager) -> None:
    _limit_life()
    asyncio.run(_inherited(life, manager))


def keeps_a_memory(life: Life) -> None:
    """It forks with a private database, which is still there when the child has ended."""

    async def main() -> None:
        manager = StateManager(Database(":memory:"))
        await manager.initialize()
        worker = multiprocessing.get_context("fork").Process(target=_work, args=(life, manager))
        worker.start()
        await asyncio.to_thread(worker.join, HANGS_SECONDS)
        life.tell("child ended", worker.exitcode)
        await life.works("add_task", lambda: manager.add_task(life.task()))
        await life.works("shutdown", manager.shutdown)
        life.leave()

    asyncio.run(main())


def runs_loop_after_loop(life: Life) -> None:
    """It uses one database from loops that follow each other, and a manager from the wrong one."""
    database = Database(life.location)
    managers: list[StateManager] = []

    async def one() -> None:
        await life.works("initialize", database.initialize)
        await life.works("create", lambda: life.add(TaskRepository(database).create))
        await life.works("read", TaskRepository(database).count_by_status)
        for manager in managers:
            add = partial(manager.add_task, life.task())
            await life.refused("add_task of an earlier loop", add)
            await life.refused("get_state of an earlier loop", manager.get_state)
        managers.append(await life.open())
        await writes(life, managers[-1])

    async def last() -> None:
        for manager in managers:
            await life.answered("shutdown of an earlier loop", manager.shutdown)
        await life.works("close", database.close)
        life.leave()

    for _ in range(3):
        asyncio.run(one())
    asyncio.run(last())


def loses_its_loop(life: Life) -> None:
    """It closes a loop while writes of it are under way, and goes on with another one."""
    database = Database(life.location)
    managers: list[StateManager] = []

    async def begin() -> None:
        await database.initialize()
        managers.append(await life.open())
        await writes(life, managers[0])
        for _ in range(30):
            life.begin(life.add(TaskRepository(database).create))
        await _a_moment(life)

    async def go_on() -> None:
        create = partial(life.add, TaskRepository(database).create)
        await life.works("create on another loop", create)
        await life.works("read on another loop", TaskRepository(database).count_by_status)
        await life.refused("add_task of a lost loop", partial(managers[0].add_task, life.task()))
        await life.answered("shutdown of a lost loop", managers[0].shutdown)
        await life.works("close on another loop", database.close)
        life.leave()

    loop = asyncio.new_event_loop()
    loop.run_until_complete(begin())
    _drop(loop)
    asyncio.run(go_on())


def _drop(loop: asyncio.AbstractEventLoop) -> None:
    """Close a loop without ending what runs there; that this was so is no news to anybody."""
    for task in asyncio.all_tasks(loop):
        task._log_destroy_pending = False  # type: ignore[attr-defined]
    loop.close()


def has_two_loops(life: Life) -> None:
    """It uses one database from two loops at the same time, and a manager from the wrong one."""
    database = Database(life.location)
    managers: list[StateManager] = []
    opened, done = threading.Event(), threading.Event()

    async def use() -> None:
        adds = [life.add(TaskRepository(database).create) for _ in range(20)]
        await life.works("20 creates", lambda: asyncio.gather(*adds))
        await life.works("read", TaskRepository(database).count_by_status)

    async def elsewhere() -> None:
        await database.initialize()
        managers.append(await life.open())
        opened.set()
        await use()
        while not done.is_set():
            await life.add(managers[0].add_task)
        await life.works("shutdown on its loop", managers[0].shutdown)

    async def here() -> None:
        await use()
        [manager] = managers
        for what, work in {
            "add_task": lambda: manager.add_task(life.task()),
            "get_task": lambda: manager.get_task("t"),
            "get_state": manager.get_state,
            "refresh": manager.refresh_from_database,
            "update_heartbeat": lambda: manager.update_heartbeat("node"),
            "wait_for_task": lambda: manager.wait_for_task("t"),
            "history": lambda: manager.history("t"),
            "shutdown": manager.shutdown,
        }.items():
            await life.refused(f"{what} on another loop", work)

    thread = threading.Thread(target=lambda: asyncio.run(elsewhere()))
    thread.start()
    opened.wait()
    asyncio.run(here())
    done.set()
    thread.join()

    async def end() -> None:
        await life.works("close", database.close)
        life.leave()

    asyncio.run(end())


OTHERS = (
    forks, forks_in_a_thread, forks_in_a_transaction, has_workers, keeps_a_memory,
    runs_loop_after_loop, loses_its_loop, has_two_loops,
)  # fmt: skip

LIVES: dict[str, Callable[[Life], None]] = {
    **{
        f"{ending.__name__}, {begin.__name__}": partial(ending, begin=begin)
        for ending, begin in product(ENDINGS, UNDER_WAY)
    },
    **{life.__name__: life for life in OTHERS},
}
"""By name; each is called in a process of its own."""

LIBRARY = str(Path(openclaw_store.__file__).parent)
"""In no traceback of a program's own error."""

CODES = {
    "raises": 1,
    "is_interrupted": -signal.SIGINT,
    "is_terminated": -signal.SIGTERM,
    "exits": 3,
    "exits_in_a_task": 3,
    "exits_at_once": 3,
}
"""How processes end that do not end with 0."""

ERRORS = {"raises": "CrashError", "is_interrupted": "KeyboardInterrupt"}
"""Of what there is a traceback."""


def nurse(tell: Tell, folder: str, lives: Sequence[tuple[str, str, int]]) -> None:
    """Have processes live, a few at a time, and tell how they end.

    Args:
        folder: Where their error output goes, each to a file with its number.
        lives: Their names, the locations of their databases, and their seeds.
    """
    warnings.filterwarnings("ignore", "This process .* is multi-threaded", DeprecationWarning)
    asyncio.run(_warm_up())
    gc.freeze()  # or each of them looks through all that was imported when it ends: 0.4 s
    running: dict[int, int] = {}
    for number, (name, location, seed) in enumerate(lives):
        errors = os.open(f"{folder}/{number}", os.O_CREAT | os.O_WRONLY)
        child = os.fork()
        if child == 0:
            for output in (1, 2):
                os.dup2(errors, output)
            _limit_life()
            LIVES[name](Life(partial(tell, number), location, Random(seed)))
            return  # the interpreter ends, as it is
        os.close(errors)
        running[child] = number
        if len(running) == AT_ONCE:
            _bury(tell, running)
    while running:
        _bury(tell, running)


def _limit_life() -> None:
    """Have this process killed if it hangs; it says before where it does."""
    faulthandler.register(signal.SIGALRM, chain=True)
    signal.alarm(HANGS_SECONDS)


def _bury(tell: Tell, running: dict[int, int]) -> None:
    child, status = os.wait()
    tell(running.pop(child), "ended", os.waitstatus_to_exitcode(status), time.monotonic())


async def _warm_up() -> None:
    """Have all of the library imported: Alembic reads more modules when it is first used."""
    async with Database(":memory:") as database:
        await TaskRepository(database).count_by_status()


class _Death:
    """How a process lived and ended."""

    def __init__(self, name: str, location: Location) -> None:
        self.name, self.location = name, location
        self.trying: set[str] = set()
        self.acknowledged: set[str] = set()
        self.tried: list[tuple[str, str, str, float]] = []
        self.children: list[int] = []
        """How they ended."""
        self.left_at: float | None = None
        self.ended_at = 0.0
        self.code: int | None = None

    def note(self, what: str, *values: Any) -> None:
        """Take note of what was told."""
        if what in ("trying", "acknowledged"):
            getattr(self, what).add(*values)
        elif what == "tried":
            self.tried.append(values)
        elif what == "child ended":
            self.children += values
        elif what == "leaving":
            [self.left_at] = values
        else:
            self.code, self.ended_at = values


def perform(run: Run) -> None:
    """Have as many processes live as there are rounds, in all ways by turns."""
    slowest = dict.fromkeys(("error", "end", "opening again"), 0.0)
    names = _names(run.random)
    for number in run.parts(BATCH):
        _live(run, [*islice(names, number)], slowest)
    run.notes.update({f"slowest {what}": f"{took:.2f} s" for what, took in slowest.items()})


def _names(random: Random) -> Iterator[str]:
    """All lives, again and again."""
    while True:
        pairs = [name for name in LIVES if ", " in name]
        random.shuffle(pairs)
        yield from (life.__name__ for life in OTHERS)
        yield from pairs


def _live(run: Run, names: Sequence[str], slowest: dict[str, float]) -> None:
    """Have processes live, and judge them."""
    with ExitStack() as places:
        folder = Path(places.enter_context(TemporaryDirectory(dir=run.folder)))
        deaths = [_Death(name, places.enter_context(run.location())) for name in names]
        lives = [(one.name, str(one.location), run.random.randrange(2**32)) for one in deaths]
        errors = folder / "errors"
        with Child(nurse, folder, lives, errors=errors, bug=run.bug) as child:
            for number, what, *values in child.told():
                deaths[number].note(what, *values)
            run.check(child.wait() == 0, f"the nurse ended: {errors.read_text()[-2000:]}")
        for number, death in enumerate(deaths):
            _judge(run, death, (folder / str(number)).read_text(), slowest)
            run.done()


def _judge(run: Run, death: _Death, errors: str, slowest: dict[str, float]) -> None:
    """Was it a good death?"""
    name, counts = death.name, run.counts
    ending = name.partition(",")[0]
    code = CODES.get(ending, 0)
    run.check(death.code == code, f"{name}: ended with {death.code} instead of {code}: {errors}")
    if death.left_at is not None:
        took = death.ended_at - death.left_at
        slowest["end"] = max(slowest["end"], took)
        is_soon = run.is_quick or took < LIMIT_SECONDS
        run.check(is_soon, f"{name}: its end took {took:.1f} s")
    else:
        run.wrong(f"{name}: was never ready to end")
    if ending in ERRORS:
        last = errors.rstrip().rpartition("\n")[2]
        is_own = errors.startswith("Traceback") and ERRORS[ending] in last
        run.check(is_own and LIBRARY not in errors, f"{name}: {errors}")
    elif ending not in ("closes_its_loop", "loses_its_loop"):  # where Python itself complains
        run.check(not errors, f"{name}: {errors}")
    for code in death.children:
        run.check(code == 0, f"{name}: its child ended with {code}")
    for what, came, wanted, took in death.tried:
        counts.refused += came == "refused"  # what works is counted by the tasks that it adds
        run.check(came == wanted and came in ("works", "refused"), f"{name}: {what}: {came}")
        if came == "refused":
            slowest["error"] = max(slowest["error"], took)
            is_soon = run.is_quick or took < LIMIT_SECONDS
            run.check(is_soon, f"{name}: {what}: was refused after {took:.1f} s")

    stored = _stored(run, death)
    counts.acknowledged += len(death.acknowledged)
    for id in death.acknowledged - stored:
        run.lost(f"{name}: {id}")
    unknown = death.trying - death.acknowledged
    counts.unknown += len(unknown)
    counts.unknown_committed += len(unknown & stored)
    run.check(len(stored & {"left", "right"}) != 1, f"{name}: half of a transaction is there")
    began = time.monotonic()
    problems = asyncio.run(_verified(death.location))
    took = time.monotonic() - began
    slowest["opening again"] = max(slowest["opening again"], took)
    run.check(not problems, f"{name}: {problems}")


def _stored(run: Run, death: _Death) -> set[str]:
    """The tasks that are there; the feed, and a file, are looked at, too."""
    tasks, counters = "SELECT task_id FROM tasks", "SELECT revision FROM counters"
    feed = "SELECT count(*), max(revision) FROM changes"
    if isinstance(death.location, Path):
        with closing(sqlite3.connect(death.location)) as database:
            answers = [database.execute(one).fetchall() for one in (tasks, counters, feed)]
            sound = database.execute("PRAGMA integrity_check").fetchall()
            run.check(sound == [("ok",)], f"{death.name}: {sound}")
    else:
        answers = asyncio.run(_asked(death.location, (tasks, counters, feed)))
    ids, [(revision,)], [(changes, newest)] = answers
    in_order = revision == changes == (newest or 0)
    run.check(in_order, f"{death.name}: revision {revision}, {changes} changes up to {newest}")
    return {id for (id,) in ids}


async def _asked(location: str, statements: Sequence[str]) -> list[list[Any]]:
    driver = importlib.import_module("asyncpg")
    connection = await driver.connect(location.replace("+asyncpg", ""))
    try:
        return [await connection.fetch(statement) for statement in statements]
    finally:
        await connection.close()


async def _verified(location: Location) -> list[str]:
    """What the library itself finds in it, which opens again."""
    async with StateManager(Database(location)) as manager:
        await manager.add_task(Task("after", TaskType.BATCH, "t"))
        return [problem.text for problem in (await verify(manager.db)).problems]


CAMPAIGN = Campaign(
    "processes",
    "processes end without closing the store, fork while they use it, or have several event loops",
    ("P1", "P2", "P7"),
    perform,
    rounds=1_000,
    quick_rounds=12,
    unit="processes",
    rounds_of={POSTGRESQL: 500},
)
