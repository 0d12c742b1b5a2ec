"""Each fault that was planted is named, none ends a command in a traceback, and safe ones heal."""

from __future__ import annotations

import asyncio
import re
import shutil
import sqlite3
from collections.abc import Coroutine, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
from conftest import (
    EACH_KIND,
    Location,
    Maker,
    engine_of,
)
from support.faults import POSTGRESQL, ROW_FAULTS, SCHEMA_FAULTS, SQLITE, Fault

from openclaw_store import Database, StateManager, StoreError, verify
from openclaw_store.database import FUNCTION
from openclaw_store.domain import NodeStatus, TaskStatus
from openclaw_store.maintenance import doctor
from openclaw_store.maintenance.doctor import Level, diagnose
from openclaw_store.maintenance.verify import verify_schema
from openclaw_store.testing import FakeClock, NodeFactory, TaskFactory

AT = {SQLITE: "7258118400000000", POSTGRESQL: "'2200-01-01T00:00Z'"}
EARLY = {SQLITE: "1", POSTGRESQL: "'1970-01-01T00:00Z'"}
UNCHECKED = (
    "ALTER TABLE tasks DROP CONSTRAINT ck_tasks_status, DROP CONSTRAINT ck_tasks_priority,"
    " DROP CONSTRAINT ck_tasks_task_type",
    "ALTER TABLE nodes DROP CONSTRAINT ck_nodes_status",
)


async def fill(location: Location) -> None:
    """Task `a` is completed, `b` running, `c` scheduled, `d` and `e` pending, `f` failed."""
    clock = FakeClock()
    task, node = TaskFactory(clock), NodeFactory(clock)
    async with StateManager(Database(location, clock=clock), None) as manager:
        await manager.register_node(node(node_id="n"))
        await manager.add_node(node(node_id="idle", status=NodeStatus.OFFLINE))
        await manager.add_task(task(task_id="f", status=TaskStatus.FAILED, completed_at=clock()))
        await manager.add_tasks([task(task_id=id) for id in "abcde"])
        a, b, _ = await manager.claim_tasks("n", limit=3)
        clock.advance(seconds=1)
        a, _ = await manager.start_task(a), await manager.start_task(b)
        clock.advance(seconds=1)
        await manager.complete_task(a, {"rows": 1})
        await manager.update_heartbeat("n", cpu_usage=1.0)
        await manager.sync_to_database()


def in_thread(work: Coroutine[Any, Any, None]) -> None:
    """Run a coroutine beside the event loop of a test."""
    with ThreadPoolExecutor(1) as thread:
        thread.submit(asyncio.run, work).result()


@pytest.fixture(scope="session")
def filled_sqlite(migrated_sqlite: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("filled") / "cluster.db"
    shutil.copy(migrated_sqlite, path)
    in_thread(fill(path))
    return path


@pytest.fixture(scope="session")
def filled_postgresql(migrated_postgresql: str, maker: Maker) -> str:
    url = maker.make(migrated_postgresql)
    in_thread(fill(url))
    return url


@pytest.fixture
def store(kind: str, request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Location]:
    """A copy of the filled database; a connection that is left to it is an error."""
    template = request.getfixturevalue(f"filled_{kind}")
    if kind == SQLITE:
        yield Path(shutil.copy(template, tmp_path / "cluster.db"))
        return
    maker: Maker = request.getfixturevalue("maker")
    url = maker.make(template)
    yield url
    maker.drop(url)


async def plant(location: Location, fault: Fault) -> None:
    """Damage a database, past all checks."""
    kind = SQLITE if isinstance(location, Path) else POSTGRESQL
    sql = fault.sql
    if "{" in sql:
        infinity = "9e999" if kind == SQLITE else "Infinity"
        sql = sql.format(
            at=AT[kind],
            early=EARLY[kind],
            odd="",
            cascade="" if kind == SQLITE else " CASCADE",
            function=FUNCTION,
            infinity=infinity,
            long="x" * ((1 << 20) + 1),
        )
        if kind == SQLITE:
            sql = sql.replace("'9e999'", "9e999")
    statements = [one.replace("#SEMI#", ";") for one in sql.split(";")]
    if isinstance(location, Path):
        with closing(sqlite3.connect(location, isolation_level=None)) as connection:
            connection.execute("PRAGMA ignore_check_constraints = ON")
            for statement in statements:
                connection.execute(statement)
        return
    if "{odd}" in fault.sql:
        statements[:0] = UNCHECKED
    async with engine_of(location).begin() as connection:
        for statement in statements:
            await connection.exec_driver_sql(statement)


@pytest.fixture(autouse=True)
def plain_disk(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Have an ordinary disk mounted, wherever the tests run."""
    monkeypatch.setattr(doctor, "MOUNTS", tmp_path / "none")


async def said_and_healed(location: Location) -> tuple[str, bool]:
    """What `verify` and `doctor` say, and whether a repair leaves no problem."""
    said: list[str] = []
    database = Database(location)
    try:
        findings = await diagnose(database)
        is_ill = any(one.level is not Level.OK for one in findings)
        said += [f"{one.text} → {one.advice}" for one in findings if one.level is not Level.OK]
        found = await verify_schema(database, repair=True)
        is_whole = bool(found)
        assert is_ill or is_whole
        said += [f"{one.text} → {one.advice}" for one in found.problems]
        if found.is_complete:
            await database.initialize(migrate=False)
            found = await verify(database, repair=True)
            said += [f"{one.text} → {one.advice}" for one in found.problems]
            is_whole = bool(found) and bool(await verify(database))
    except StoreError as error:
        said.append(str(error))
        is_whole = False
    finally:
        await database.close()
    return "\n".join(said), is_whole


def of_kind(faults: dict[str, Fault]) -> list[object]:
    return [
        pytest.param(kind, name, marks=getattr(pytest.mark, kind), id=f"{kind}-{name}")
        for kind in (SQLITE, POSTGRESQL)
        for name, fault in faults.items()
        if fault.kind in (None, kind)
    ]


@pytest.mark.parametrize(("kind", "name"), of_kind({**SCHEMA_FAULTS, **ROW_FAULTS}))
async def test_fault_is_named_and_healed_if_that_is_safe(
    kind: str, name: str, store: Location
) -> None:
    fault = {**SCHEMA_FAULTS, **ROW_FAULTS}[name]
    await plant(store, fault)

    said, is_healed = await said_and_healed(store)

    assert said
    assert re.search(fault.said, said), said
    assert is_healed is fault.heals, said


@pytest.mark.parametrize("kind", EACH_KIND)
async def test_store_without_a_fault_is_sound(kind: str, store: Location) -> None:
    assert await said_and_healed(store) == ("", True)
