"""The private attributes of other libraries exist and do what `internals` relies on."""

from __future__ import annotations

import ast
import asyncio
import re
import sqlite3
import sys
import threading
from functools import partial
from pathlib import Path
from queue import SimpleQueue

import aiosqlite
import pytest
from sqlalchemy import create_engine, text
from sqlalchemy.ext.asyncio import create_async_engine

import openclaw_store
from openclaw_store.backends import internals
from openclaw_store.backends.internals import (
    fetch_raw_rows,
    make_daemon,
    never_free,
    rollback_without_waiting,
    untrack_task,
)

NUMBERS = (
    "WITH RECURSIVE numbers (n) AS (SELECT 1 UNION ALL SELECT n + 1 FROM numbers WHERE n < 7)"
    " SELECT n, n + 1 FROM numbers"
)


async def test_untracked_task_is_in_no_list_of_tasks() -> None:
    task = asyncio.ensure_future(asyncio.sleep(0, "done"))
    assert task in asyncio.all_tasks()

    untrack_task(task)

    assert task not in asyncio.all_tasks()
    assert await task == "done"
    assert "_unregister_task" in asyncio.tasks.__all__  # documented for authors of event loops


def test_object_that_is_never_freed_has_one_more_reference() -> None:
    thing = object()
    before = sys.getrefcount(thing)

    never_free(thing)

    assert sys.getrefcount(thing) == before + 1


async def test_thread_of_a_connection_becomes_a_daemon(tmp_path: Path) -> None:
    connection = aiosqlite.connect(tmp_path / "file.db")
    assert type(connection._thread) is threading.Thread

    make_daemon(connection)

    assert connection._thread.daemon
    async with connection:
        assert connection._thread.is_alive()


async def test_rollback_is_queued_before_the_next_call(tmp_path: Path) -> None:
    connect = partial(sqlite3.connect, tmp_path / "file.db", isolation_level=None)
    async with aiosqlite.Connection(connect, 64) as connection:
        assert type(connection._tx) is SimpleQueue
        assert type(connection._conn) is sqlite3.Connection
        await connection.execute("BEGIN")
        await connection.execute("CREATE TABLE t (n)")

        rollback_without_waiting(connection)

        assert await connection.execute_fetchall("SELECT name FROM sqlite_master") == []
        assert not connection.in_transaction


@pytest.mark.parametrize("size", [1, 3, 250])
async def test_streamed_rows_are_the_tuples_of_the_driver(tmp_path: Path, size: int) -> None:
    """A cursor that is read without its strategy misses the first row."""
    engine = create_async_engine(f"sqlite+aiosqlite:///{tmp_path / 'file.db'}")
    found: list[object] = []
    async with engine.connect() as connection:

        def read(connection: object) -> None:
            result = connection.execute(  # type: ignore[attr-defined]
                text(NUMBERS), execution_options={"stream_results": True}
            )
            while rows := fetch_raw_rows(result, size):
                assert len(rows) <= size
                found.extend(rows)

        await connection.run_sync(read)
    await engine.dispose()

    assert found == [(n, n + 1) for n in range(1, 8)]
    assert {type(row) for row in found} == {tuple}


def test_rows_that_are_fetched_at_once_are_the_tuples_of_the_driver() -> None:
    engine = create_engine("sqlite://")
    with engine.connect() as connection:
        result = connection.execute(text(NUMBERS))

        rows = fetch_raw_rows(result)

        assert rows == [(n, n + 1) for n in range(1, 8)]
        assert {type(row) for row in rows} == {tuple}
        assert result.closed
    engine.dispose()


def test_no_other_module_uses_a_private_attribute_of_a_library() -> None:
    """An attribute with an underscore belongs to `self` or to a class of this library."""
    package = Path(openclaw_store.__file__).parent
    private = re.compile(r"_[a-z]\w*")
    sources = {path: ast.parse(path.read_text("utf-8")) for path in package.rglob("*.py")}
    nodes = [(path, node) for path, tree in sources.items() for node in ast.walk(tree)]
    own = {
        name
        for _, node in nodes
        for name in [
            getattr(node, "name", None),
            getattr(node, "attr", None)
            if isinstance(getattr(node, "ctx", None), ast.Store)
            else None,
            getattr(node, "id", None),
        ]
        if name is not None
    }

    used = {
        node.attr
        for path, node in nodes
        if isinstance(node, ast.Attribute)
        and path != Path(internals.__file__)
        and private.fullmatch(node.attr)
    }

    assert used - own - DOCUMENTED == set()


DOCUMENTED = {"_asdict", "_make", "_replace", "_fields"}
"""Public parts of named tuples and enumerations, in spite of the underscore."""
