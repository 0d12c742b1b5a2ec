"""Ways for a program to end without closing the store, with work in progress."""

from __future__ import annotations

import asyncio
import os
import signal
import sys
import threading
from collections.abc import Awaitable, Callable
from functools import partial

from campaigns.workloads.program import Program, drop_loop
from openclaw_store import (
    Database,
    StateManager,
)


async def nothing(program: Program, manager: StateManager) -> None:
    """Leave no work in progress."""


async def writes(program: Program, manager: StateManager) -> None:
    """Leave many writes in progress, some of which may be acknowledged."""
    for _ in range(50):
        program.begin(program.add(manager.add_task))
    await program.pause()


async def reads(program: Program, manager: StateManager) -> None:
    """Leave many reads in progress."""
    for _ in range(20):
        program.begin(manager.get_stats())
    await program.pause()


async def watcher(program: Program, manager: StateManager) -> None:
    """Leave a watcher and a waiter for a task running."""

    async def watch() -> None:
        async for change in manager.watch():
            assert change.revision

    program.begin(watch())
    await program.add(manager.add_task)
    program.begin(manager.wait_for_task(f"task-{os.getpid()}-1"))
    await program.pause()


async def heartbeats(program: Program, manager: StateManager) -> None:
    """Leave heartbeats to be written, and an entry that is only in memory."""
    await manager.update_heartbeat("node", cpu_usage=1)
    await manager.add_task(program.task(), persist=False)
    await program.pause()


async def transaction(program: Program, manager: StateManager) -> None:
    """Leave a transaction half done."""
    program.begin(program.add_pair(manager.db, asyncio.Event().wait))
    await program.pause()
    program.begin(program.add(manager.add_task))  # waits for the write lock
    await program.pause()


async def ending_transaction(program: Program, manager: StateManager) -> None:
    """Leave a transaction at its end, just committed or not yet."""
    program.begin(program.add_pair(manager.db, partial(asyncio.sleep, 0)))
    await program.pause()


async def looking_after(program: Program, manager: StateManager) -> None:
    """Leave a backup and a vacuum in progress."""
    if manager.db.dialect == "sqlite":  # PostgreSQL needs `pg_dump`
        program.begin(manager.db.backup(f"{program.location}.backup"))
    program.begin(manager.db.vacuum())
    await program.pause()


async def opening(program: Program, manager: StateManager) -> None:
    """Leave another manager opening."""
    program.begin(StateManager(Database(program.location)).initialize())
    await program.pause()


async def closing_down(program: Program, manager: StateManager) -> None:
    """Leave the manager closing, behind writes."""
    for _ in range(20):
        program.begin(program.add(manager.add_task))
    await asyncio.sleep(0)
    program.begin(manager.shutdown())
    await program.pause()


WORK_IN_PROGRESS = (
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
    drop_loop(loop)


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
