"""The tools of a program that runs in a process of its own, and reports its actions."""

from __future__ import annotations

import asyncio
import faulthandler
import os
import signal
import time
from collections.abc import Awaitable, Callable, Coroutine
from itertools import count
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

    async def pause(self) -> None:
        """Sleep for a random moment, so that the next step comes at a random point of the work."""
        await asyncio.sleep(self.random.choice((0, 0.0003, 0.001, 0.003)))

    def leave(self) -> None:
        """Report that the program is about to end."""
        self.send("leaving", time.monotonic())


def limit_life() -> None:
    """Kill this process if it hangs, after a traceback of all threads."""
    faulthandler.register(signal.SIGALRM, chain=True)
    signal.alarm(HANGS_SECONDS)


def drop_loop(loop: asyncio.AbstractEventLoop) -> None:
    """Close a loop without ending its tasks, and without a warning about them."""
    for task in asyncio.all_tasks(loop):
        task._log_destroy_pending = False  # type: ignore[attr-defined]
    loop.close()
