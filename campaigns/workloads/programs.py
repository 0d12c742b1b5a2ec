"""Programs that end without closing the store, fork while they use it, or use several event loops.

Each runs in a process of its own, and does not return if it ends the process. It sends:

- `trying` and `acknowledged`, with a task that it adds;
- `tried`, with the attempt, its outcome, the expected outcome, and the seconds it took;
- `child ended`, with the exit status of a forked process;
- `leaving`, with the time, just before it ends.
"""

from __future__ import annotations

import asyncio
import faulthandler
import multiprocessing
import os
import signal
import sys
import threading
import time
from collections.abc import Awaitable, Callable, Coroutine
from functools import partial
from itertools import count, product
from random import Random
from typing import Any

from campaigns.faults.children import Send
from openclaw_store import (
    Database,
    NodeInfo,
    StateManager,
    StoreError,
    Task,
    TaskRepository,
    TaskType,
)

HANGS_SECONDS = 60
"""Seconds after which an expected event counts as hanging."""


class Program:
    """The tools of a program, which report its actions.

    Args:
        send: Sends a message to the parent.
        location: A migrated, empty database.
        random: The source of random choices.
    """

    def __init__(self, send: Send, location: str, random: Random) -> None:
        self.send, self.location, self.random = send, location, random
        self.numbers = count(1)
        self.in_progress: list[asyncio.Future[Any]] = []
        """Work in progress that the program does not wait for."""

    def task(self) -> Task:
        """Return a new task."""
        return Task(f"task-{os.getpid()}-{next(self.numbers)}", TaskType.BATCH, "t")

    async def add(self, add: Callable[[Task], Awaitable[object]]) -> None:
        """Add a task, and report the acknowledgement."""
        task = self.task()
        self.send("trying", task.task_id)
        await add(task)
        self.send("acknowledged", task.task_id)

    async def add_pair(self, database: Database, wait: Callable[[], Awaitable[object]]) -> None:
        """Add two tasks in one transaction; both must exist afterwards, or neither."""
        async with database.transaction() as tx:
            for half in ("left", "right"):
                await TaskRepository(tx).create(Task(half, TaskType.BATCH, "t"))
            await wait()
        self.send("acknowledged", "left")

    def begin(self, work: Coroutine[Any, Any, Any]) -> None:
        """Start work in the background, which may fail."""
        task = asyncio.ensure_future(work)
        task.add_done_callback(lambda task: task.cancelled() or task.exception())
        self.in_progress.append(task)

    async def open(self) -> StateManager:
        """Return a manager in use: it has a pool, a writer and a polling thread."""
        manager = StateManager(Database(self.location), auto_sync_interval=0.05)
        await manager.initialize()
        await manager.register_node(NodeInfo("node", "host"))
        await self.add(manager.add_task)
        await asyncio.gather(*[manager.task_repo.count_by_status() for _ in range(3)])
        return manager

    async def refused(self, what: str, work: Callable[[], Awaitable[object]]) -> None:
        """Try a call that must be refused."""
        await self._try(what, work, "refused")

    async def works(self, what: str, work: Callable[[], Awaitable[object]]) -> None:
        """Try a call that must work."""
        await self._try(what, work, "works")

    async def answered(self, what: str, work: Callable[[], Awaitable[object]]) -> None:
        """Try a call that must work, or be refused."""
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
        self.send("tried", what, came, wanted or came, time.monotonic() - began)

    def leave(self) -> None:
        """Report that the program is about to end."""
        self.send("leaving", time.monotonic())


async def nothing(program: Program, manager: StateManager) -> None:
    """Leave no work in progress."""


async def writes(program: Program, manager: StateManager) -> None:
    """Leave many writes in progress, some of which may be acknowledged."""
    for _ in range(50):
        program.begin(program.add(manager.add_task))
    await _a_moment(program)


async def reads(program: Program, manager: StateManager) -> None:
    """Leave many reads in progress."""
    for _ in range(20):
        program.begin(manager.get_stats())
    await _a_moment(program)


async def watcher(program: Program, manager: StateManager) -> None:
    """Leave a watcher and a waiter for a task running."""

    async def watch() -> None:
        async for change in manager.watch():
            assert change.revision

    program.begin(watch())
    await program.add(manager.add_task)
    program.begin(manager.wait_for_task(f"task-{os.getpid()}-1"))
    await _a_moment(program)


async def heartbeats(program: Program, manager: StateManager) -> None:
    """Leave heartbeats to be written, and an entry that is only in memory."""
    await manager.update_heartbeat("node", cpu_usage=1)
    await manager.add_task(program.task(), persist=False)
    await _a_moment(program)


async def transaction(program: Program, manager: StateManager) -> None:
    """Leave a transaction half done."""
    program.begin(program.add_pair(manager.db, asyncio.Event().wait))
    await _a_moment(program)
    program.begin(program.add(manager.add_task))  # waits for the write lock
    await _a_moment(program)


async def ending_transaction(program: Program, manager: StateManager) -> None:
    """Leave a transaction at its end, just committed or not yet."""
    program.begin(program.add_pair(manager.db, partial(asyncio.sleep, 0)))
    await _a_moment(program)


async def looking_after(program: Program, manager: StateManager) -> None:
    """Leave a backup and a vacuum in progress."""
    if manager.db.dialect == "sqlite":  # PostgreSQL needs `pg_dump`
        program.begin(manager.db.backup(f"{program.location}.backup"))
    program.begin(manager.db.vacuum())
    await _a_moment(program)


async def opening(program: Program, manager: StateManager) -> None:
    """Leave another manager opening."""
    program.begin(StateManager(Database(program.location)).initialize())
    await _a_moment(program)


async def closing_down(program: Program, manager: StateManager) -> None:
    """Leave the manager closing, behind writes."""
    for _ in range(20):
        program.begin(program.add(manager.add_task))
    await asyncio.sleep(0)
    program.begin(manager.shutdown())
    await _a_moment(program)


async def _a_moment(program: Program) -> None:
    await asyncio.sleep(program.random.choice((0, 0.0003, 0.001, 0.003)))


UNDER_WAY = (
    nothing, writes, reads, watcher, heartbeats, transaction, ending_transaction, looking_after,
    opening, closing_down,
)  # fmt: skip
"""Work that is in progress when a program ends."""


class CrashError(Exception):
    """The program's own error."""


Begin = Callable[[Program, StateManager], Awaitable[None]]


async def _begun(program: Program, begin: Begin) -> None:
    await begin(program, await program.open())
    program.leave()


def returns(program: Program, begin: Begin) -> None:
    """Return from the main coroutine."""
    asyncio.run(_begun(program, begin))


def raises(program: Program, begin: Begin) -> None:
    """Raise an error of the program's own."""

    async def main() -> None:
        await _begun(program, begin)
        raise CrashError

    asyncio.run(main())


def is_interrupted(program: Program, begin: Begin) -> None:
    """Receive Ctrl-C."""

    async def main() -> None:
        await _begun(program, begin)
        os.kill(os.getpid(), signal.SIGINT)
        await asyncio.Event().wait()

    asyncio.run(main())


def is_terminated(program: Program, begin: Begin) -> None:
    """Receive a signal that ends the process."""

    async def main() -> None:
        await _begun(program, begin)
        os.kill(os.getpid(), signal.SIGTERM)
        await asyncio.Event().wait()

    asyncio.run(main())


def exits(program: Program, begin: Begin) -> None:
    """Call `sys.exit` in the main coroutine."""

    async def main() -> None:
        await _begun(program, begin)
        sys.exit(3)

    asyncio.run(main())


def exits_in_a_task(program: Program, begin: Begin) -> None:
    """Call `sys.exit` in another task."""

    async def leave() -> None:
        sys.exit(3)

    async def main() -> None:
        await _begun(program, begin)
        program.begin(leave())
        await asyncio.Event().wait()

    asyncio.run(main())


def exits_at_once(program: Program, begin: Begin) -> None:
    """Call `os._exit`, which cleans up nothing."""

    async def main() -> None:
        await _begun(program, begin)
        os._exit(3)

    asyncio.run(main())


def closes_its_loop(program: Program, begin: Begin) -> None:
    """Close the event loop without ending its tasks."""
    loop = asyncio.new_event_loop()
    loop.run_until_complete(_begun(program, begin))
    _drop(loop)


def leaves_a_thread(program: Program, begin: Begin) -> None:
    """Run the store in a daemon thread, and end the main thread."""
    begun = threading.Event()

    async def main() -> None:
        await _begun(program, begin)
        begun.set()
        await asyncio.Event().wait()

    threading.Thread(target=lambda: asyncio.run(main()), daemon=True).start()
    begun.wait()


ENDINGS = (
    returns, raises, is_interrupted, is_terminated, exits, exits_in_a_task, exits_at_once,
    closes_its_loop, leaves_a_thread,
)  # fmt: skip
"""Ways for a program to end."""


async def _inherited(program: Program, manager: StateManager) -> None:
    """Use objects that were opened before the fork, and then a new database."""
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
        "create": lambda: tasks.create(program.task()),
        "add_task": lambda: manager.add_task(program.task()),
        "get_state": manager.get_state,
        "update_heartbeat": lambda: manager.update_heartbeat("node"),
    }.items():
        await program.refused(f"{what}, inherited", work)
    await program.answered("shutdown, inherited", manager.shutdown)
    await program.works("close, inherited", database.close)

    async def own() -> None:
        async with StateManager(Database(program.location)) as manager:
            await program.add(manager.add_task)

    if manager.db.dialect == "sqlite" and manager.db.db_path == program.location:
        await program.refused("a database of its own", own)
    elif manager.db.dialect == "sqlite":  # a thread may have been inside SQLite at the fork
        await program.answered("a database of its own", own)
    else:
        await program.works("a database of its own", own)


def _fork(program: Program, manager: StateManager) -> None:
    """Fork, let the child use the inherited objects, and wait for it."""
    child = os.fork()
    if child == 0:
        limit_life()
        status = 1
        try:
            asyncio.run(_inherited(program, manager))
            status = 0
        finally:
            os._exit(status)
    program.send("child ended", os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))


def forks(program: Program) -> None:
    """Fork on the thread of the event loop, which stops meanwhile."""

    async def main() -> None:
        manager = await program.open()
        for begin in (writes, heartbeats, watcher):
            await begin(program, manager)
        _fork(program, manager)
        await program.works("add_task after a fork", lambda: program.add(manager.add_task))
        await program.works("shutdown after a fork", manager.shutdown)
        program.leave()

    asyncio.run(main())


def forks_in_a_thread(program: Program) -> None:
    """Fork on another thread, while the loop and the writer continue."""

    async def main() -> None:
        manager = await program.open()
        await writes(program, manager)
        forking = asyncio.to_thread(_fork, program, manager)
        await asyncio.gather(forking, *[program.add(manager.add_task) for _ in range(20)])
        await program.works("shutdown after a fork", manager.shutdown)
        program.leave()

    asyncio.run(main())


def forks_in_a_transaction(program: Program) -> None:
    """Fork while holding the write lock."""

    async def main() -> None:
        manager = await program.open()

        async def fork() -> None:
            pid = os.fork()
            if pid == 0:
                os._exit(0)
            os.waitpid(pid, 0)  # noqa: ASYNC222  # the loop is to stand still

        await program.works("a fork in a transaction", lambda: program.add_pair(manager.db, fork))
        await program.works("shutdown after a fork", manager.shutdown)
        program.leave()

    asyncio.run(main())


def has_workers(program: Program) -> None:
    """Use processes of `multiprocessing`, which are also forks, and end by themselves."""

    async def main() -> None:
        manager = await program.open()
        await writes(program, manager)
        worker = multiprocessing.get_context("fork").Process(target=_work, args=(program, manager))
        worker.start()
        await asyncio.to_thread(worker.join, HANGS_SECONDS)
        program.send("child ended", -signal.SIGALRM if worker.exitcode is None else worker.exitcode)
        await program.works("add_task beside a worker", lambda: program.add(manager.add_task))
        await program.works("shutdown beside a worker", manager.shutdown)
        program.leave()

    asyncio.run(main())


def _work(program: Program, manager: StateManager) -> None:
    limit_life()
    asyncio.run(_inherited(program, manager))


def keeps_a_memory(program: Program) -> None:
    """Fork with a database in memory, which still exists after the end of the child."""

    async def main() -> None:
        manager = StateManager(Database(":memory:"))
        await manager.initialize()
        worker = multiprocessing.get_context("fork").Process(target=_work, args=(program, manager))
        worker.start()
        await asyncio.to_thread(worker.join, HANGS_SECONDS)
        program.send("child ended", worker.exitcode)
        await program.works("add_task", lambda: manager.add_task(program.task()))
        await program.works("shutdown", manager.shutdown)
        program.leave()

    asyncio.run(main())


def runs_loop_after_loop(program: Program) -> None:
    """Use one database from successive loops, and a manager from the wrong loop."""
    database = Database(program.location)
    managers: list[StateManager] = []

    async def one() -> None:
        await program.works("initialize", database.initialize)
        await program.works("create", lambda: program.add(TaskRepository(database).create))
        await program.works("read", TaskRepository(database).count_by_status)
        for manager in managers:
            add = partial(manager.add_task, program.task())
            await program.refused("add_task of an earlier loop", add)
            await program.refused("get_state of an earlier loop", manager.get_state)
        managers.append(await program.open())
        await writes(program, managers[-1])

    async def last() -> None:
        for manager in managers:
            await program.answered("shutdown of an earlier loop", manager.shutdown)
        await program.works("close", database.close)
        program.leave()

    for _ in range(3):
        asyncio.run(one())
    asyncio.run(last())


def loses_its_loop(program: Program) -> None:
    """Close a loop with writes in progress, and continue on another loop."""
    database = Database(program.location)
    managers: list[StateManager] = []

    async def begin() -> None:
        await database.initialize()
        managers.append(await program.open())
        await writes(program, managers[0])
        for _ in range(30):
            program.begin(program.add(TaskRepository(database).create))
        await _a_moment(program)

    async def go_on() -> None:
        create = partial(program.add, TaskRepository(database).create)
        await program.works("create on another loop", create)
        await program.works("read on another loop", TaskRepository(database).count_by_status)
        await program.refused(
            "add_task of a lost loop", partial(managers[0].add_task, program.task())
        )
        await program.answered("shutdown of a lost loop", managers[0].shutdown)
        await program.works("close on another loop", database.close)
        program.leave()

    loop = asyncio.new_event_loop()
    loop.run_until_complete(begin())
    _drop(loop)
    asyncio.run(go_on())


def _drop(loop: asyncio.AbstractEventLoop) -> None:
    """Close a loop without ending its tasks, and without a warning about them."""
    for task in asyncio.all_tasks(loop):
        task._log_destroy_pending = False  # type: ignore[attr-defined]
    loop.close()


def has_two_loops(program: Program) -> None:
    """Use one database from two loops at the same time, and a manager from the wrong one."""
    database = Database(program.location)
    managers: list[StateManager] = []
    opened, done = threading.Event(), threading.Event()

    async def use() -> None:
        adds = [program.add(TaskRepository(database).create) for _ in range(20)]
        await program.works("20 creates", lambda: asyncio.gather(*adds))
        await program.works("read", TaskRepository(database).count_by_status)

    async def elsewhere() -> None:
        await database.initialize()
        managers.append(await program.open())
        opened.set()
        await use()
        while not done.is_set():
            await program.add(managers[0].add_task)
        await program.works("shutdown on its loop", managers[0].shutdown)

    async def here() -> None:
        await use()
        [manager] = managers
        for what, work in {
            "add_task": lambda: manager.add_task(program.task()),
            "get_task": lambda: manager.get_task("t"),
            "get_state": manager.get_state,
            "refresh": manager.refresh_from_database,
            "update_heartbeat": lambda: manager.update_heartbeat("node"),
            "wait_for_task": lambda: manager.wait_for_task("t"),
            "history": lambda: manager.history("t"),
            "shutdown": manager.shutdown,
        }.items():
            await program.refused(f"{what} on another loop", work)

    thread = threading.Thread(target=lambda: asyncio.run(elsewhere()))
    thread.start()
    opened.wait()
    asyncio.run(here())
    done.set()
    thread.join()

    async def end() -> None:
        await program.works("close", database.close)
        program.leave()

    asyncio.run(end())


OTHER_PROGRAMS = (
    forks, forks_in_a_thread, forks_in_a_transaction, has_workers, keeps_a_memory,
    runs_loop_after_loop, loses_its_loop, has_two_loops,
)  # fmt: skip
"""Other things that a program may do."""

PROGRAMS: dict[str, Callable[[Program], None]] = {
    **{
        f"{ending.__name__}, {begin.__name__}": partial(ending, begin=begin)
        for ending, begin in product(ENDINGS, UNDER_WAY)
    },
    **{program.__name__: program for program in OTHER_PROGRAMS},
}
"""All programs by name; each runs in a process of its own."""


def limit_life() -> None:
    """Kill this process if it hangs, after a traceback of all threads."""
    faulthandler.register(signal.SIGALRM, chain=True)
    signal.alarm(HANGS_SECONDS)
