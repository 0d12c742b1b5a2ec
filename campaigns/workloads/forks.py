"""Programs that fork while they use the store, or use it from several event loops."""

from __future__ import annotations

import asyncio
import multiprocessing
import os
import signal
import threading
from functools import partial

from campaigns.workloads.endings import heartbeats, watcher, writes
from campaigns.workloads.program import HANGS_SECONDS, Program, drop_loop, limit_life
from openclaw_store import (
    Database,
    StateManager,
    TaskRepository,
)


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
    elif manager.db.dialect != "sqlite":  # a thread may have been inside SQLite at the fork
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


def forks_with_database_in_memory(program: Program) -> None:
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
        await program.pause()

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
    drop_loop(loop)
    asyncio.run(go_on())


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
    forks, forks_in_a_thread, forks_in_a_transaction, has_workers, forks_with_database_in_memory,
    runs_loop_after_loop, loses_its_loop, has_two_loops,
)  # fmt: skip
"""Other things that a program may do."""
