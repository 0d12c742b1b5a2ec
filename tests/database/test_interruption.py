"""A cancelled caller, or Ctrl-C, ends the statement that runs for it, on both databases."""

from __future__ import annotations

import asyncio
import sqlite3
import threading
from collections.abc import Coroutine
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import pytest
from conftest import PATIENCE, Location, execute, locked, start, until
from sqlalchemy import TextClause, text
from sqlalchemy.ext.asyncio import AsyncSession

from openclaw_store import Database, TaskRepository, verify
from openclaw_store.backends.sqlite.connections import WriteConnection, limited
from openclaw_store.database import database as database_module

_NEVER_ENDS = (
    "WITH RECURSIVE numbers (n) AS (SELECT 1 UNION ALL SELECT n % 7 + {} FROM numbers) "
    "SELECT count(*) FROM numbers"
)
_RUNNING = (
    "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database() "
    "AND state = 'active' AND pid <> pg_backend_pid() AND query ~ '{}'"
)

_WORKER = "openclaw-store-work"


class Running:
    """Notes that SQLite runs a statement, and ends it if nothing else does."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.has_begun = self.is_over = False
        connect = WriteConnection.__init__

        def noted(connection: WriteConnection, *arguments: Any, **options: Any) -> None:
            connect(connection, *arguments, **options)
            connection.create_function("note", 0, self._note)

        monkeypatch.setattr(WriteConnection, "__init__", noted)

    def _note(self) -> int:
        self.has_begun = True
        return 1 // (not self.is_over)


async def cancelled(work: Coroutine[Any, Any, Any], location: Location, running: Running) -> None:
    """Cancel `work` when its statement runs; return when it does not run any more."""
    caller = start(work)
    is_file = isinstance(location, Path)

    def count() -> int:
        return execute(location, _RUNNING.format("RECURSIVE"))[0][0]  # type: ignore[no-any-return]  # count(*)

    await until(lambda: running.has_begun if is_file else count() == 1)

    caller.cancel()
    try:
        await asyncio.wait([caller], timeout=PATIENCE)
        assert caller.cancelled()
        await until(lambda: _WORKER not in {one.name for one in threading.enumerate()})
        if not is_file:
            await until(lambda: count() == 0)
    except BaseException:
        running.is_over = True
        raise


@pytest.fixture
def running(monkeypatch: pytest.MonkeyPatch) -> Running:
    return Running(monkeypatch)


@pytest.fixture
async def opened(running: Running, location: Location) -> Any:
    async with Database(location) as database:
        yield database


def statement(location: Location) -> TextClause:
    return text(_NEVER_ENDS.format("note()" if isinstance(location, Path) else "1"))


@pytest.mark.usefixtures("migrated")
@pytest.mark.parametrize("within", ["nothing", "a limit", "a former limit"])
async def test_statement_of_a_session_ends_with_its_caller(
    opened: Database, location: Location, running: Running, within: str
) -> None:
    """Ctrl-C in `verify` had to wait for the end of the check."""

    async def read() -> None:
        async with opened.session() as session, AsyncExitStack() as limit:
            if within != "nothing":
                await limit.enter_async_context(limited(session))
            if within == "a former limit":
                await limit.aclose()
            await session.execute(statement(location))

    await cancelled(read(), location, running)

    assert await TaskRepository(opened).count_by_status() == 0
    assert opened.checked_out_connections == 0


@pytest.mark.usefixtures("migrated")
async def test_statement_of_a_read_ends_soon_after_its_caller(
    opened: Database, location: Location, running: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(database_module, "STOPPING_SECONDS", 0.01)

    async def read(session: AsyncSession) -> None:
        await session.execute(statement(location))

    await cancelled(opened.read(read), location, running)

    closing = start(opened.close())  # it waits for reads
    await asyncio.wait([closing], timeout=PATIENCE)
    is_closed, running.is_over = closing.done(), True
    assert is_closed


@pytest.mark.usefixtures("migrated")
async def test_statement_of_an_inspection_ends_with_its_caller(
    opened: Database, location: Location, running: Running
) -> None:
    """Ctrl-C in `doctor`, and in the check of the schema, had to wait for a lock."""
    work = opened.inspect(lambda connection: connection.execute(statement(location)))

    await cancelled(work, location, running)


@pytest.mark.usefixtures("migrated")
@pytest.mark.postgresql
async def test_verification_that_waits_for_a_lock_ends_with_its_caller(
    opened: Database, location: Location
) -> None:
    waiting = "SELECT count(*) FROM pg_locks WHERE NOT granted"
    async with locked(location, "LOCK TABLE tasks"):
        caller = start(verify(opened))
        await until(lambda: execute(location, waiting) == [(1,)])

        caller.cancel()
        await asyncio.wait([caller], timeout=PATIENCE)

        assert caller.cancelled()
        await until(lambda: execute(location, waiting) == [(0,)])


@pytest.mark.usefixtures("migrated")
@pytest.mark.sqlite
async def test_vacuum_ends_with_its_caller(
    opened: Database, location: Location, running: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The caller had to wait for its end."""

    def run_forever(connection: WriteConnection, sql: str) -> sqlite3.Cursor:
        is_vacuum = sql == "VACUUM"
        return connection.cursor().execute(str(statement(location)) if is_vacuum else sql)

    monkeypatch.setattr(WriteConnection, "execute", run_forever)

    await cancelled(opened.vacuum(), location, running)

    monkeypatch.undo()
    await opened.vacuum()


@pytest.mark.usefixtures("migrated")
async def test_vacuum_that_waits_for_a_lock_ends_with_its_caller(
    opened: Database, location: Location
) -> None:
    is_file = isinstance(location, Path)
    async with locked(location, None if is_file else "LOCK TABLE tasks"):
        caller = start(opened.vacuum())
        if is_file:
            await asyncio.sleep(0)
        else:
            await until(lambda: execute(location, _RUNNING.format("VACUUM")) == [(1,)])

        caller.cancel()
        await asyncio.wait([caller], timeout=PATIENCE)

        assert caller.cancelled()
        if not is_file:
            await until(lambda: execute(location, _RUNNING.format("VACUUM")) == [(0,)])
    await opened.vacuum()
