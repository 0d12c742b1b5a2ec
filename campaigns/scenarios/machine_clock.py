"""Jumps of the clock of the machine, by libfaketime, under processes that are unaware of it."""

from __future__ import annotations

import asyncio
import sqlite3
import time
from collections.abc import Callable
from contextlib import closing, suppress
from datetime import timedelta
from pathlib import Path
from typing import Any

from campaigns.faults.children import Child, Send
from campaigns.harness.campaign import SQLITE, Campaign, HangError, Run
from campaigns.scenarios.clock import OUT_OF_ORDER
from openclaw_store import (
    Database,
    NodeInfo,
    StateManager,
    Task,
    TaskType,
)
from openclaw_store.errors import NotOwnerError

PATIENCE_SECONDS = 1.0
"""Seconds for which a node may be silent, where the clock of the machine jumps."""

JUMPS = [timedelta(hours=-1), timedelta(days=3), timedelta(days=-3), timedelta(hours=1)]

FAKETIME = next(
    (
        path
        for folder in ("/usr/lib", "/usr/local/lib", "/opt/homebrew/lib")
        for path in sorted(Path(folder).glob("**/faketime/libfaketimeMT.so.1"))
    ),
    None,
)
"""The library that sets another time for a program (https://github.com/wolfcw/libfaketime)."""


def perform(run: Run) -> None:
    """Make the clock of the processes jump; each time, one of them is killed and replaced."""
    with run.location() as location:
        offset = run.folder / "offset"
        offset.write_text("+0")
        environment = {
            "LD_PRELOAD": str(FAKETIME),
            "FAKETIME_TIMESTAMP_FILE": str(offset),
            "FAKETIME_CACHE_DURATION": "1",  # seconds
            "FAKETIME_DONT_FAKE_MONOTONIC": "1",
            "NO_FAKE_STAT": "1",
        }

        def start(function: Callable[..., Any], *arguments: str) -> Child:
            errors = run.folder / "errors"
            return Child(function, location, *arguments, errors=errors, environment=environment)

        with (
            start(recover_nodes, "lives"),
            closing(sqlite3.connect(f"file:{location}?mode=ro", uri=True)) as past,
        ):
            machine = Machine(run, offset, past)
            for number in run.each_round():
                with start(run_node, "dies") as mortal:
                    machine.wait("there", "lives", "dies")
                    machine.jump(JUMPS[number % len(JUMPS)])
                    machine.wait("known to live", "lives", "dies")
                    mortal.kill()
                machine.wait("marked lost", "dies", are_lost=True)
            machine.check_tasks()


async def run_node(send: Send, path: str, name: str) -> None:
    """Run a node that sends heartbeats, and works on its own tasks."""
    async with StateManager(Database(path), 1) as manager:
        node = NodeInfo(name, name, available_skills=[name], max_concurrent_tasks=4)
        await manager.register_node(node)
        while True:
            await manager.add_task(Task.create(TaskType.BATCH, "t", required_skills=[name]))
            await manager.update_heartbeat(name)
            for task in await manager.claim_tasks(name, limit=4):
                with suppress(NotOwnerError):  # after a jump, the task was requeued
                    await manager.start_task(task)
                    await manager.complete_task(task)
            await asyncio.sleep(0.2)


async def recover_nodes(send: Send, path: str, name: str) -> None:
    """Run the coordinator that finds lost nodes, and a node as well."""
    working = asyncio.create_task(run_node(send, path, name))
    async with StateManager(Database(path), 1) as manager:
        while not working.done():
            await manager.recover(timeout_seconds=PATIENCE_SECONDS)
            await asyncio.sleep(0.2)
    await working


class Machine:
    """The view of a process with a steady clock."""

    SLOW_SECONDS = 120.0
    """Seconds after which an expected event counts as missing."""

    def __init__(self, run: Run, offset: Path, past: sqlite3.Connection) -> None:
        self._run, self._offset, self._past = run, offset, past
        self._ahead = timedelta()
        self._slowest: dict[str, float] = {}

    def jump(self, by: timedelta) -> None:
        """Set the clock of the other processes."""
        self._ahead += by
        aside = self._offset.with_suffix(".aside")
        aside.write_text(f"{self._ahead.total_seconds():+.0f}")
        aside.replace(self._offset)  # a reader finds the old file or the new one
        self._run.counts.acknowledged += 1

    def wait(self, what: str, *names: str, are_lost: bool = False) -> None:
        """Wait until nodes are marked lost, or alive by heartbeats of their present time.

        Raises:
            HangError: If it takes too long.
        """
        began = time.monotonic()
        while not all((self._is_lost if are_lost else self._is_known)(name) for name in names):
            if time.monotonic() - began > self.SLOW_SECONDS:
                raise HangError(f"not within {self.SLOW_SECONDS:g} s: {names} are {what}")
            time.sleep(0.02)
        took = self._slowest[what] = max(self._slowest.get(what, 0), time.monotonic() - began)
        self._run.notes[f"slowest {what}"] = f"{took:.1f} s"

    def check_tasks(self) -> None:
        """Check that the times of tasks are in order."""
        wrong = self._past.execute(OUT_OF_ORDER).fetchall()
        self._run.check(not wrong, f"the times of {wrong[:3]} are not in order")

    def _is_lost(self, name: str) -> bool:
        return self._node(name)[0] == "offline"

    def _is_known(self, name: str) -> bool:
        status, at = self._node(name)
        present = time.time() + self._ahead.total_seconds()
        return status == "online" and abs(at / 1e6 - present) < 10 * PATIENCE_SECONDS

    def _node(self, name: str) -> tuple[str, int]:
        query = "SELECT status, coalesce(last_heartbeat, 0) FROM nodes WHERE node_id = ?"
        found: tuple[str, int] | None = self._past.execute(query, (name,)).fetchone()
        return found or ("unknown", 0)


CAMPAIGN = Campaign(
    name="machine-clock",
    title="the clock of the machine jumps under processes that are unaware of it",
    promises=("P1", "P4"),
    perform=perform,
    rounds=60,
    quick_rounds=1,
    unit="jumps",
    kinds=(SQLITE,),
    unavailable_reason=lambda: None if FAKETIME else "no libfaketime: apt-get install faketime",
)
