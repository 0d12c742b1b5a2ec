"""Ctrl-C ends a command that works on a database, and leaves the database whole."""

from __future__ import annotations

import asyncio
import signal
import subprocess
import sys
from contextlib import AsyncExitStack
from pathlib import Path

import pytest
from conftest import Location, MakeTask, locked

from openclaw_store import Database, StateManager, verify

SCRIPTS = {
    "verify": """
from sqlalchemy import text
from openclaw_store.maintenance.verify import _Scan

async def check(scan, session):
    print("begun", flush=True)
    numbers = "SELECT 1 AS n UNION ALL SELECT n FROM numbers"
    await session.execute(text(f"WITH RECURSIVE numbers AS ({numbers}) SELECT max(n) FROM numbers"))

_Scan._check_file = check
""",
    "vacuum": """
from openclaw_store.database import Database

async def vacuum(database, vacuum=Database.vacuum):
    print("begun", flush=True)
    await vacuum(database)

Database.vacuum = vacuum
""",
}
"""Both commands say when they begin; the check never ends, and the vacuum waits for a lock."""

RUN = """
from openclaw_store.__main__ import main
main()
"""


@pytest.mark.parametrize("command", SCRIPTS)
async def test_sigint_ends_the_command(
    database: Database, location: Location, make_task: MakeTask, command: str
) -> None:
    async with StateManager(database, None) as manager:
        await manager.add_tasks(make_task(task_id=f"t{number}") for number in range(20))
    arguments = [sys.executable, "-W", "error", "-c", SCRIPTS[command] + RUN]
    options = ["-d", str(location), command]
    pipe = subprocess.PIPE

    async with AsyncExitStack() as held:
        if command == "vacuum":
            lock = None if isinstance(location, Path) else "LOCK TABLE tasks IN EXCLUSIVE MODE"
            await held.enter_async_context(locked(location, lock))
        process = await asyncio.create_subprocess_exec(
            *arguments, *options, stdout=pipe, stderr=pipe
        )
        try:
            assert process.stdout is not None
            async with asyncio.timeout(60):  # a command that hangs
                assert await process.stdout.readline() == b"begun\n"
                process.send_signal(signal.SIGINT)
                out, messages = await process.communicate()
        finally:
            if process.returncode is None:
                process.kill()
                await process.wait()

    assert process.returncode == 130
    assert (out, b"Traceback" in messages) == (b"", False), messages.decode()
    async with StateManager(Database(location), None) as manager:
        assert await manager.count_tasks() == 20
        assert await verify(manager.db)
