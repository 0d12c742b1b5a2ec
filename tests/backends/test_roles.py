"""Other roles of the server: what they may do to the store, and what the store needs of its own."""

from __future__ import annotations

import asyncio
import re
from collections.abc import AsyncIterator, Iterable, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from uuid import uuid4

import pytest
from conftest import FakeClock, MakeNode, MakeTask, engine_of, execute, until
from sqlalchemy import make_url

from openclaw_store import (
    Database,
    StateManager,
    TaskFilter,
    TaskRepository,
    TaskStatus,
    UnavailableError,
)
from openclaw_store.backends import PostgreSQL
from openclaw_store.backends.factory import backend_of
from openclaw_store.backends.postgresql import listening
from openclaw_store.backends.postgresql.protocol import CHANNEL, FIRST_LISTENER, OTHER_LISTENERS
from openclaw_store.database import migrations
from openclaw_store.maintenance.copy import copy
from openclaw_store.maintenance.doctor import Level, diagnose
from openclaw_store.maintenance.verify import verify

pytestmark = pytest.mark.postgresql


LISTENERS = FIRST_LISTENER, OTHER_LISTENERS


@pytest.fixture
def role(location: str) -> Iterator[str]:
    """A role that may log in, and has no privilege of its own."""
    name = f"role_{uuid4().hex}"
    execute(location, f"CREATE ROLE {name} LOGIN")
    yield name
    execute(location, f"DROP OWNED BY {name}")
    execute(location, f"DROP ROLE {name}")


def as_role(location: str, role: str) -> str:
    """Return the URL with which a role connects."""
    return make_url(location).set(username=role).render_as_string(hide_password=False)


@asynccontextmanager
async def locks_of(url: str, numbers: Iterable[int]) -> AsyncIterator[None]:
    """Hold advisory locks on a connection of a role."""
    async with engine_of(url).connect() as connection:
        for number in numbers:
            await connection.exec_driver_sql(f"SELECT pg_advisory_lock({number})")
        yield
        await connection.exec_driver_sql("SELECT pg_advisory_unlock_all()")


def plant(location: str, role: str) -> None:
    """Let a role make operators and functions that unqualified SQL finds before the server's."""
    execute(location, "CREATE SCHEMA loot")
    execute(location, "CREATE TABLE loot.evidence (name text)")
    execute(location, "GRANT USAGE ON SCHEMA loot TO PUBLIC")
    execute(location, "GRANT INSERT ON loot.evidence TO PUBLIC")
    execute(location, f"GRANT CREATE ON SCHEMA public TO {role}")
    mine = as_role(location, role)
    body = "BEGIN INSERT INTO loot.evidence VALUES ('{}'); RETURN {}; END"
    for number, operator in enumerate(("=", "<>", "<", ">", "<=", ">=")):
        for left, right in (("varchar", "text"), ("varchar", "varchar"), ("text", "varchar")):
            name = f"public.planted_{number}"
            planted = body.format(f"{left} {operator} {right}", f"a::text {operator} b::text")
            execute(
                mine,
                f"CREATE FUNCTION {name}(a {left}, b {right}) RETURNS boolean LANGUAGE plpgsql "
                f"SET search_path = pg_catalog AS $${planted}$$",
            )
            execute(
                mine,
                f"CREATE OPERATOR public.{operator} "
                f"(FUNCTION = {name}, LEFTARG = {left}, RIGHTARG = {right})",
            )
    planted = body.format("hashtextextended", "pg_catalog.hashtextextended(a, b::bigint)")
    execute(
        mine,
        "CREATE FUNCTION public.hashtextextended(a text, b integer) RETURNS bigint "
        f"LANGUAGE plpgsql IMMUTABLE AS $${planted}$$",
    )


async def use(
    database: Database, clock: FakeClock, make_task: MakeTask, make_node: MakeNode
) -> None:
    """Make each kind of call once."""
    async with StateManager(database, None) as manager:
        await manager.register_node(make_node(node_id="n", available_skills=["gpu"]))
        await manager.update_heartbeat("n", cpu_usage=5)
        await manager.submit_task(make_task(task_id="s", idempotency_key="key", priority=0))
        await manager.add_tasks([make_task(task_id=f"t{number}") for number in range(3)])
        await manager.add_task(make_task(task_id="unsaved"), persist=False)
        await manager.sync_to_database()
        claimed = await manager.claim_tasks("n", 2)
        for task in claimed:
            await manager.start_task(task)
        await manager.complete_task(claimed[0], {"a": 1})
        await manager.fail_task(claimed[1], "no")
        await manager.cancel_task("unsaved")
        clock.advance(seconds=3600)
        await manager.recover()
        await manager.list_tasks(TaskFilter(status=TaskStatus.PENDING, skill="gpu", user="u"))
        await manager.history("s")
        await manager.node_repo.get_available_nodes()
        await manager.task_repo.list_pending_tasks()
        async with database.transaction() as tx:
            await TaskRepository(tx).delete("t2")
        await manager.refresh_from_database()
        clock.advance(days=40)
        await manager.check_stale_nodes()
        assert await manager.task_repo.cleanup_old_tasks(days=30)
        await manager.compact_changes(days=0)
        assert not (await verify(database)).problems
        await diagnose(database)
        await manager.get_stats()


async def test_operators_of_another_role_are_not_run(
    location: str,
    another_location: str,
    role: str,
    clock: FakeClock,
    make_task: MakeTask,
    make_node: MakeNode,
) -> None:
    plant(location, role)
    database = Database(location, clock=clock)

    await database.initialize()
    await use(database, clock, make_task, make_node)
    async with Database(location, clock=clock) as source, Database(another_location) as target:
        await asyncio.to_thread(migrations.downgrade, backend_of(another_location), "base")
        await asyncio.to_thread(migrations.upgrade, backend_of(another_location))
        await copy(source, target)
        await source.vacuum()
        found = {one.name: one for one in await diagnose(source)}
    await asyncio.to_thread(migrations.check, backend_of(location))
    await asyncio.to_thread(migrations.downgrade, backend_of(location), "base")

    assert execute(location, "SELECT DISTINCT name FROM loot.evidence") == []
    assert found["schema_privileges"].level is Level.WARNING
    assert role in found["schema_privileges"].text
    assert found["search_path"].level is Level.OK


def documented_grants() -> list[str]:
    """Return the statements of the how-to page."""
    page = Path(__file__).parents[2] / "docs" / "how-to" / "postgresql.md"
    [block] = re.findall(r"```sql\n(.*?GRANT.*?)```", page.read_text(encoding="utf-8"), re.DOTALL)
    return [" ".join(one.split()) for one in block.split(";") if one.strip()]


@pytest.mark.usefixtures("pg_dump")
async def test_documented_grants_suffice_for_everything_but_the_schema(
    location: str,
    role: str,
    clock: FakeClock,
    make_task: MakeTask,
    make_node: MakeNode,
    tmp_path: Path,
) -> None:
    async with Database(location):
        pass
    execute(location, "REVOKE ALL ON SCHEMA public FROM PUBLIC")
    execute(location, "REVOKE ALL ON ALL FUNCTIONS IN SCHEMA public FROM PUBLIC")
    for statement in documented_grants():
        execute(location, re.sub(r"\bscheduler\b", role, statement))
    mine = as_role(location, role)

    await use(Database(mine, clock=clock), clock, make_task, make_node)
    async with Database(mine, clock=clock) as database, Database(tmp_path / "copy.db") as target:
        await database.backup(tmp_path / "copy.dump")
        await copy(database, target)
        with pytest.raises(UnavailableError, match="this role does not own"):
            await database.vacuum()

    assert (tmp_path / "copy.dump").read_bytes()[:5] == b"PGDMP"


async def test_locks_of_another_role_do_not_block_a_migration(location: str, role: str) -> None:
    """It holds each advisory lock that the library has ever used."""
    async with locks_of(as_role(location, role), (0x6F70656E636C6177, *LISTENERS)):
        await Database(location, timeout=1).initialize()
        await asyncio.to_thread(migrations.check, backend_of(location, 1))


async def test_locks_of_another_role_do_not_silence_a_commit(
    database: Database,
    other: Database,
    location: str,
    role: str,
    make_task: MakeTask,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(listening, "JOIN_SECONDS", 0.05)
    told: list[tuple[int, int]] = []
    async with locks_of(as_role(location, role), LISTENERS):
        follower = database.follow(lambda *counters: told.append(counters))
        try:
            await until(lambda: told)
            await TaskRepository(other).create(make_task())
            await until(lambda: (1, 0) in told)
        finally:
            await follower.stop()


PAYLOADS = "9" * 5000, f"{'9' * 5000} 0", "1 " * 100, "\u0661 \u0662", "-1 -1", "a b", ""


async def test_notifications_of_another_role_are_no_more_than_hints(
    database: Database,
    other: Database,
    location: str,
    role: str,
    make_task: MakeTask,
    caplog: pytest.LogCaptureFixture,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """They neither fail, nor have the listener read the counters each time."""
    monkeypatch.setattr(listening, "BUSY_SECONDS", 3600.0)
    notify = "DO $$BEGIN FOR i IN 1..500 LOOP PERFORM pg_notify('{}', 'x' || i); END LOOP; END$$"
    told: list[tuple[int, int]] = []
    follower = database.follow(lambda *counters: told.append(counters))
    try:
        await until(lambda: told)
        for payload in PAYLOADS:
            execute(as_role(location, role), f"NOTIFY {CHANNEL}, '{payload}'")
        execute(as_role(location, role), notify.format(CHANNEL))
        await TaskRepository(other).create(make_task())
        await until(lambda: told[1:])
    finally:
        await follower.stop()

    assert told == [(0, 0), (1, 0)]
    assert not caplog.records


async def test_wake_ups_come_back_when_another_role_has_freed_its_lock(
    database: Database, location: str, role: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(listening, "JOIN_SECONDS", 0.05)
    monkeypatch.setattr(listening, "ALIVE_SECONDS", 0.05)
    told: list[tuple[int, int]] = []
    async with locks_of(as_role(location, role), LISTENERS):
        follower = database.follow(lambda *counters: told.append(counters))
        await until(lambda: told)
    try:
        assert isinstance(database._backend, PostgreSQL)
        registry = database._backend.registry
        await until(lambda: registry.listener)
    finally:
        await follower.stop()
