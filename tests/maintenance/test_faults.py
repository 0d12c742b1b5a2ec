"""Each fault that was planted is named, none ends a command in a traceback, and safe ones heal."""

from __future__ import annotations

import asyncio
import re
import shutil
import sqlite3
from collections.abc import Callable, Coroutine, Iterator, Sequence
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
    new_location,
)
from support.faults import JOINT_FAULTS, POSTGRESQL, ROW_FAULTS, SQLITE, STORE_FAULTS, Fault

from openclaw_store import Database, StateManager, StoreError, verify
from openclaw_store.database import FUNCTION
from openclaw_store.domain import NodeStatus, TaskStatus
from openclaw_store.maintenance import doctor
from openclaw_store.maintenance.doctor import Level, diagnose
from openclaw_store.maintenance.verify import Problem, verify_schema
from openclaw_store.testing import FakeClock, NodeFactory, TaskFactory

AT = {SQLITE: "7258118400000000", POSTGRESQL: "'2200-01-01T00:00Z'"}
EARLY = {SQLITE: "1", POSTGRESQL: "'1970-01-01T00:00Z'"}
UNCHECKED = (
    "ALTER TABLE tasks DROP CONSTRAINT ck_tasks_status, DROP CONSTRAINT ck_tasks_priority,"
    " DROP CONSTRAINT ck_tasks_task_type",
    "ALTER TABLE nodes DROP CONSTRAINT ck_nodes_status",
)


async def fill(location: Location, copies: int = 1) -> None:
    """Task `a` is completed, `b` running, `c` scheduled, `d` and `e` pending, `f` failed.

    They are of the nodes `n` and `idle`. There are several copies of all of them: `a0`, `a1`, …
    """
    clock = FakeClock()
    task, node = TaskFactory(clock), NodeFactory(clock)
    numbers = range(copies) if copies > 1 else [""]
    async with StateManager(Database(location, clock=clock), None) as manager:

        async def each(act: Callable[[Any], Coroutine[Any, Any, Any]]) -> list[Any]:
            return await asyncio.gather(*(act(number) for number in numbers))

        await each(
            lambda n: manager.register_node(node(node_id=f"n{n}", available_skills=[f"s{n}"]))
        )
        await each(lambda n: manager.add_node(node(node_id=f"idle{n}", status=NodeStatus.OFFLINE)))
        failed = {"status": TaskStatus.FAILED, "completed_at": clock()}
        await each(lambda n: manager.add_task(task(task_id=f"f{n}", **failed)))
        await manager.add_tasks(
            task(task_id=f"{id}{n}", required_skills=[f"s{n}"]) for n in numbers for id in "abcde"
        )
        claimed = await each(lambda n: manager.claim_tasks(f"n{n}", limit=3))
        clock.advance(seconds=1)
        started = await asyncio.gather(
            *(manager.start_task(one) for a, b, _ in claimed for one in (a, b))
        )
        clock.advance(seconds=1)
        await asyncio.gather(*(manager.complete_task(a, {"rows": 1}) for a in started[::2]))
        await each(lambda n: manager.update_heartbeat(f"n{n}", cpu_usage=1.0))
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


@pytest.fixture
def location_of_kind(
    kind: str, request: pytest.FixtureRequest, tmp_path: Path
) -> Iterator[Location]:
    """A migrated, empty database."""
    with new_location(request, kind, tmp_path, migrated=True) as location:
        yield location


async def plant(location: Location, faults: Sequence[Fault]) -> None:
    """Damage a database, past all checks."""
    kind = SQLITE if isinstance(location, Path) else POSTGRESQL
    if isinstance(location, Path):
        with closing(sqlite3.connect(location, isolation_level=None)) as connection:
            connection.execute("PRAGMA ignore_check_constraints = ON")
            for fault in faults:
                for statement in statements_of(fault, kind):
                    connection.execute(statement)
        return
    async with engine_of(location).begin() as connection:
        if any("{odd}" in fault.sql for fault in faults):
            for statement in UNCHECKED:
                await connection.exec_driver_sql(statement)
        for fault in faults:
            for statement in statements_of(fault, kind):
                await connection.exec_driver_sql(statement)


def statements_of(fault: Fault, kind: str) -> list[str]:
    sql = fault.sql
    if "{" in sql:
        sql = sql.format(
            at=AT[kind],
            early=EARLY[kind],
            odd="",
            cascade="" if kind == SQLITE else " CASCADE",
            function=FUNCTION,
            infinity="9e999" if kind == SQLITE else "Infinity",
            long="x" * ((1 << 20) + 1),
        )
        if kind == SQLITE:
            sql = sql.replace("'9e999'", "9e999")
    return [one.replace("#SEMI#", ";") for one in sql.split(";")]


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


def of_kind(faults: dict[str, Fault], kind: str) -> dict[str, Fault]:
    return {name: fault for name, fault in faults.items() if fault.kind in (None, kind)}


@pytest.mark.parametrize(
    ("kind", "name"),
    [
        pytest.param(kind, name, marks=getattr(pytest.mark, kind), id=f"{kind}-{name}")
        for kind in (SQLITE, POSTGRESQL)
        for name in of_kind(STORE_FAULTS, kind)
        if kind == SQLITE or name not in JOINT_FAULTS
    ],
)
async def test_fault_is_named_and_healed_if_that_is_safe(
    kind: str, name: str, store: Location
) -> None:
    fault = STORE_FAULTS[name]
    await plant(store, [fault])

    said, is_healed = await said_and_healed(store)

    assert said
    assert re.search(fault.said, said), said
    assert is_healed is fault.heals, said


@pytest.mark.postgresql
@pytest.mark.parametrize("kind", [POSTGRESQL])
async def test_each_of_many_differences_is_named_and_healed_if_that_is_safe(
    kind: str, store: Location
) -> None:
    faults = of_kind(JOINT_FAULTS, kind)
    await plant(store, [*faults.values()])
    database = Database(store)

    advised = [f"{one.text} → {one.advice}" for one in await diagnose(database)]
    found = await verify_schema(database, repair=True)
    left = await verify_schema(database)

    said = [f"{one.text} → {one.advice}" for one in found.problems]
    wrong: dict[str, object] = {}
    for name, fault in faults.items():
        matching = [
            one
            for one, text in zip(found.problems, said, strict=True)
            if re.search(fault.said, text)
        ]
        if not matching or fault.heals is not all(one.is_repaired for one in matching):
            wrong[name] = matching
    assert wrong == {}, said
    assert len(said) >= len(faults)
    assert {one.text for one in left.problems} == {
        one.text for one in found.problems if not one.is_repaired
    }
    assert any("differs" in text or "lacks" in text for text in advised)
    await database.close()


@pytest.mark.parametrize("kind", EACH_KIND)
async def test_each_of_many_damaged_rows_is_named_and_healed_if_that_is_safe(
    kind: str, location_of_kind: Location
) -> None:
    faults = of_kind(ROW_FAULTS, kind)
    location = location_of_kind
    await fill(location, len(faults))
    before = await read_changes_of(location)
    planted = [of_copy(fault, number) for number, fault in enumerate(faults.values())]
    await plant(location, planted)

    async with Database(location) as database:
        found = await verify(database, repair=True)
        left = await verify(database)

    wrong: dict[str, object] = {}
    for number, (name, fault) in enumerate(zip(faults, planted, strict=True)):
        mine = {id for id in before if id[1:] == str(number) or id == f"idle{number}"}
        revisions = {revision for id in mine for revision in before[id]}
        said = [one.text for one in found.problems if is_about(one, mine, revisions)]
        rest = [one.text for one in left.problems if is_about(one, mine, revisions)]
        if not any(re.search(fault.said, text) for text in said) or bool(rest) is fault.heals:
            wrong[name] = said, rest
    assert wrong == {}


def of_copy(fault: Fault, number: int) -> Fault:
    """The fault in one of the copies that `fill` makes."""
    ids = re.compile(r"'(a|b|c|d|e|f|n|idle|key)'")
    sql, said = (ids.sub(rf"'\g<1>{number}'", text) for text in (fault.sql, fault.said))
    return fault._replace(sql=sql, said=said)


async def read_changes_of(location: Location) -> dict[str, set[int]]:
    """The revisions of each task and node."""
    found: dict[str, set[int]] = {}
    async with engine_of(location).connect() as connection:
        rows: Any = await connection.exec_driver_sql("SELECT item_id, revision FROM changes")
        for id, revision in rows:
            found.setdefault(id, set()).add(revision)
    return found


def is_about(problem: Problem, ids: set[str], revisions: set[int]) -> bool:
    if problem.item_id is not None:
        return problem.item_id in ids
    words = set(re.findall(r"\w+", problem.text))
    return bool(words & (ids | {str(revision) for revision in revisions}))


@pytest.mark.parametrize("kind", EACH_KIND)
async def test_store_without_a_fault_is_sound(kind: str, store: Location) -> None:
    assert await said_and_healed(store) == ("", True)
