"""How the writer speaks to PostgreSQL: a batch is one call, or a transaction with the lock."""

from __future__ import annotations

import asyncio
import importlib
import re
import threading
from collections.abc import Callable, Sequence
from contextlib import suppress
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from conftest import (
    PATIENCE,
    WAITING,
    FakeClock,
    Location,
    MakeNode,
    MakeTask,
    engine_of,
    execute,
    locked,
    start,
    until,
)
from sqlalchemy import text
from sqlalchemy.exc import DBAPIError

from devtools.postgres import Server, wait_until
from openclaw_store import (
    Database,
    NodeInfo,
    NodeRepository,
    NodeStatus,
    StateManager,
    Task,
    TaskRepository,
    TaskStatus,
)
from openclaw_store.backends.postgresql.connections import Connector
from openclaw_store.backends.postgresql.write_session import (
    WRITER_SETTINGS,
    CallCursor,
    Cursor,
    WriteSession,
)
from openclaw_store.database.write_transaction import WriteTransaction
from openclaw_store.domain import lifecycle
from openclaw_store.domain.lifecycle import Outcome
from openclaw_store.domain.records import Record
from openclaw_store.errors import (
    DuplicateError,
    InvalidDataError,
    OutcomeUnknownError,
    SchemaMismatchError,
    StaleVersionError,
    TaskNotFoundError,
    UnavailableError,
)
from openclaw_store.repositories.batches import apply
from openclaw_store.repositories.commands import Advance, Remove, SetNodeStatus, Update
from openclaw_store.repositories.heartbeats import Heartbeat, apply_heartbeats
from openclaw_store.repositories.unit_of_work import Command
from openclaw_store.testing import create_database

pytestmark = pytest.mark.postgresql


class Hesitating(Advance):
    """The cancellation of a task, which waits between reading and writing."""

    def __init__(self, task: Task) -> None:
        super().__init__(task.task_id, self.cancel)
        self.decided = threading.Event()
        self.release = threading.Event()
        self.times = 0

    def cancel(self, task: Record[Task], now: datetime) -> Outcome:
        self.times += 1
        if self.times == 1:
            self.decided.set()
            assert self.release.wait(PATIENCE)
        return lifecycle.cancel(task, now, reason=None)


def feed(location: Location) -> list[tuple[Any, ...]]:
    return execute(location, "SELECT revision, item_id, kind, previous FROM changes ORDER BY 1")


def counters(location: Location) -> tuple[Any, ...]:
    return execute(
        location, "SELECT max(revision), (SELECT coalesce(max(beat), 0) FROM nodes) FROM changes"
    )[0]


async def test_close_waits_for_a_vacuum(database: Database, location: Location) -> None:
    """Planted: nothing knows of it, and its connection stays."""
    async with engine_of(location).begin() as session:
        await session.execute(text("LOCK TABLE tasks IN SHARE UPDATE EXCLUSIVE MODE"))
        vacuum = start(database.vacuum())
        await until(lambda: execute(location, f"SELECT 1 {WAITING}"))
        closing = start(database.close())
        await asyncio.sleep(0.05)
        assert not closing.done()
    await closing
    assert vacuum.done()


async def test_tasks_that_are_added_are_numbered_behind_what_others_have_written(
    manager: StateManager, other: Database, location: Location, make_task: MakeTask, sent: list[str]
) -> None:
    """They are not written again.

    Planted: the rows, the feed, or the callers keep the numbers that were assumed; or the next ones
    are assumed to begin where these would have ended.
    """
    await manager.add_task(make_task())
    for count in (1, 3, 2):
        await TaskRepository(other).create(make_task())
        await TaskRepository(other).create(make_task())
        sent.clear()
        added = [make_task() for _ in range(count)]
        await asyncio.gather(*map(manager.add_task, added))

        assert len(sent) == 1
        first, _ = counters(location)
        assert [task.version for task in added] == list(range(first - count + 1, first + 1))
        for task in added:
            assert await manager.get_task(task.task_id) == task
    await manager.refresh_from_database()
    sent.clear()
    for task in added:
        task.error = "changed"
        await manager.update_task(task)

    assert len(sent) == len(added)
    assert [revision for revision, *_ in feed(location)] == list(range(1, manager.version + 1))
    stored = {task.task_id: task for task in await manager.task_repo.list_pending_tasks(None)}
    assert (await manager.get_state()).tasks == stored


async def test_nothing_to_add_is_not_written(
    manager: StateManager, make_task: MakeTask, sent: list[str]
) -> None:
    await manager.add_task(make_task())
    sent.clear()

    [outcome] = await manager.add_tasks([make_task(task_id="\0")])

    assert isinstance(outcome, InvalidDataError)
    assert sent == []


async def test_writers_at_the_same_time_lose_nothing(
    database: Database, other: Database, location: Location, make_node: MakeNode
) -> None:
    await NodeRepository(database).create(make_node(node_id="shared"))

    async def count(database: Database) -> None:
        nodes = NodeRepository(database)
        for _ in range(40):
            while True:
                node = await nodes.get("shared")
                assert node is not None
                node.total_tasks_processed += 1
                try:
                    await nodes.update(node)
                except StaleVersionError:
                    continue
                break

    await asyncio.gather(count(database), count(other), count(other))

    node = await NodeRepository(database).get("shared")
    assert node is not None
    assert node.total_tasks_processed == 120
    assert [revision for revision, *_ in feed(location)] == list(range(1, 122))
    assert counters(location) == (121, 0)


@pytest.mark.parametrize("rival", ["change", "transaction", "removal"])
async def test_what_others_write_between_reading_and_writing_is_seen(
    database: Database,
    other: Database,
    location: Location,
    make_task: MakeTask,
    sent: list[str],
    rival: str,
) -> None:
    """Planted: the call checks no versions; or a conflict is a failure."""
    task = make_task()
    await TaskRepository(database).create(task)
    before = (await database.get_stats())["writer"]
    hesitating = Hesitating(task)

    writing = asyncio.ensure_future(database.write(apply, hesitating))
    await asyncio.to_thread(hesitating.decided.wait, PATIENCE)
    task.status = TaskStatus.RUNNING
    if rival == "change":
        await TaskRepository(other).update(task)
    elif rival == "transaction":
        async with other.transaction() as transaction:
            await TaskRepository(transaction).update(task)
    else:
        await TaskRepository(other).delete(task.task_id)
    hesitating.release.set()
    if rival == "removal":
        with pytest.raises(TaskNotFoundError):
            await writing
    else:
        await writing
    assert hesitating.times == (1 if rival == "removal" else 2)

    log = "SELECT revision, from_status, to_status, previous FROM changes ORDER BY 1"
    assert execute(location, log) == [
        (1, None, "pending", None),
        *(
            [(2, "pending", None, 1)]
            if rival == "removal"
            else [(2, "pending", "running", 1), (3, "running", "cancelled", 2)]
        ),
    ]
    after = (await database.get_stats())["writer"]
    assert after["batches"] == before["batches"] + 1
    assert after["operations"] == before["operations"] + 1
    assert after["failed_batches"] == 0
    sent.clear()
    await TaskRepository(database).create(make_task())
    assert len(sent) == 1


async def test_callers_get_their_answers_while_the_next_batch_waits_for_the_lock(
    database: Database, location: Location, make_task: MakeTask, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Planted: they get them when the next batch has its answer."""
    tasks = TaskRepository(database)
    await tasks.create(make_task())  # connected by now
    begun, queued, committed, is_locked = (threading.Event() for _ in range(4))
    begin = WriteSession.begin

    def begin_later(self: WriteSession, *arguments: Any) -> bool:
        is_first = not begun.is_set()
        (begun if is_first else committed).set()
        assert (queued if is_first else is_locked).wait(PATIENCE)
        return begin(self, *arguments)

    monkeypatch.setattr(WriteSession, "begin", begin_later)
    first = start(tasks.create(make_task()))
    await until(begun.is_set)
    second = start(tasks.create(make_task()))
    await until(lambda: database._writer.figures()["queued_operations"])
    await until(lambda: not database._writer._tokens.empty())
    queued.set()
    await until(committed.is_set)
    async with engine_of(location).begin() as connection:
        await connection.execute(text("SELECT 1 FROM counters FOR UPDATE"))
        is_locked.set()

        assert await asyncio.wait_for(first, PATIENCE) is True
    assert await second is True


@pytest.mark.usefixtures("migrated")
@pytest.mark.parametrize("has_lock", [False, True])
async def test_batch_that_has_waited_waits_for_the_lock_as_long_as_is_left(
    location: Location, make_task: MakeTask, monkeypatch: pytest.MonkeyPatch, has_lock: bool
) -> None:
    """Planted: the server has it wait as long as ever."""
    asked: list[Any] = []
    execute = Cursor.execute

    def executed(self: Cursor, sql: str, parameters: Sequence[Any] = ()) -> Sequence[Any]:
        if "store_write" in sql:
            asked.append(parameters[-2])
        return execute(self, sql, parameters)

    def ask(unit: WriteTransaction, operations: Sequence[None]) -> Sequence[Any]:
        sql = "SELECT setting FROM pg_settings WHERE name = 'lock_timeout'"
        asked.extend(setting for (setting,) in unit.cursor.execute(sql))
        return operations

    async with Database(location, timeout=4) as database:
        await TaskRepository(database).create(make_task())  # connected by now
        monkeypatch.setattr(Cursor, "execute", executed)
        async with database._exclusive("somebody else"):
            work = (ask, None) if has_lock else None
            tasks = TaskRepository(database)
            writing = start(database.write(*work) if work else tasks.create(make_task()))
            await asyncio.sleep(1.2)
        await writing

    [left] = asked
    assert 1000 < int(left) <= 2900


async def test_batch_whose_connection_took_longer_than_it_may_wait_waits_all_the_same(
    database: Database, location: Location, make_task: MakeTask, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It had a millisecond left for the lock."""
    connect = Connector.connect

    async def slowly(self: Connector, *arguments: Any, **options: Any) -> Any:
        connection = await connect(self, *arguments, **options)
        await asyncio.sleep(1)
        return connection

    async with Database(location, timeout=0.9) as hasty:
        monkeypatch.setattr(Connector, "connect", slowly)
        async with locked(location):
            writing = asyncio.ensure_future(TaskRepository(hasty).create(make_task()))
            await asyncio.sleep(1.3)
        assert await writing


@pytest.mark.usefixtures("migrated")
async def test_transaction_waits_for_the_lock_as_long_as_is_left_and_then_as_ever(
    location: Location, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Planted: it has all of the time for the lock, or the block has what was left of it."""
    connect, sent = Connector.connect, list[str]()

    async def slowly(self: Connector, *arguments: Any, **options: Any) -> Any:
        connection = await connect(self, *arguments, **options)
        connection.add_query_logger(lambda query: sent.append(query.query))
        await asyncio.sleep(0.2)
        return connection

    monkeypatch.setattr(Connector, "connect", slowly)
    async with (
        Database(location, timeout=8, answer_timeout=20) as database,
        database.transaction() as tx,
    ):
        assert (await tx.execute(text("SHOW lock_timeout"))).scalar_one() == "8s"

    (locking,) = (sql for sql in sent if "FROM public.counters" in sql and "FOR UPDATE" in sql)
    left = re.match(r"SET LOCAL lock_timeout = (\d+);", locking)
    assert left is not None
    assert 1000 < int(left[1]) <= 7800


@pytest.mark.parametrize("call", ["add_task", "add_node", "transaction"])
async def test_lock_is_waited_for_though_each_answer_has_its_limit(
    location: Location, database: Database, make_task: MakeTask, make_node: MakeNode,
    caplog: pytest.LogCaptureFixture, call: str,
) -> None:  # fmt: skip
    """A server that waits for a lock is not one that hangs.

    Planted: a lock that is not free in time is an error before the time of the caller is over.
    """
    attempts: list[object] = []
    async with Database(location, answer_timeout=0.2) as patient, locked(location):

        def note(error: BaseException) -> bool:
            attempts.append(error)
            return is_busy(error)

        mapping = patient._backend.error_mapping
        is_busy, mapping.is_busy = mapping.is_busy, note  # type: ignore[method-assign]

        async def write() -> None:
            if call == "add_task":
                await TaskRepository(patient).create(make_task())
            elif call == "add_node":
                await NodeRepository(patient).create(make_node())
            else:
                async with patient.transaction() as tx:
                    await TaskRepository(tx).create(make_task())

        writing = start(write())
        await until(lambda: len(attempts) > 1 or writing.done())
        assert not writing.done()
    await writing


async def created(tasks: TaskRepository, task: Task) -> Record[Task]:
    """What a cache knows of a task that was just created."""
    await tasks.create(task)
    record = await tasks.get_record(task.task_id)
    assert record is not None
    return record


async def test_version_that_is_not_the_newest_is_found_out(
    database: Database, location: Location, make_task: MakeTask
) -> None:
    """Planted: the guard asks for the counters alone."""
    tasks, task = TaskRepository(database), make_task()
    known = await created(tasks, task)
    task.error = "newer"
    await tasks.update(task)

    outdated = Update(Task, task.task_id, known.evolve(error="older"), ("error",), 1, known)
    with pytest.raises(StaleVersionError):
        await database.write(apply, outdated)
    await tasks.delete(task.task_id)
    with pytest.raises(TaskNotFoundError):
        await database.write(apply, outdated)

    assert [revision for revision, *_ in feed(location)] == [1, 2, 3]


async def test_what_a_batch_has_written_is_not_taken_for_what_was_known_before(
    database: Database, location: Location, make_task: MakeTask
) -> None:
    """Planted: each run of a batch does without reading."""
    tasks, task = TaskRepository(database), make_task()
    known = await created(tasks, task)

    first, second = [
        Update(Task, task.task_id, known.evolve(error=text), ("error",), 1, known) for text in "ab"
    ]

    def apply_apart(transaction: WriteTransaction, commands: Sequence[Command]) -> Sequence[Any]:
        return apply(transaction, commands)  # another function, so another run

    written = asyncio.gather(
        database.write(apply, first), database.write(apply_apart, second), return_exceptions=True
    )
    _, stale = await written

    assert isinstance(stale, StaleVersionError)
    assert execute(location, "SELECT error FROM tasks") == [("a",)]


@pytest.mark.parametrize("key", [None, "key"])
async def test_task_that_is_not_added_in_the_end_is_not_taken_for_new(
    database: Database, location: Location, make_task: MakeTask, key: str | None
) -> None:
    """It is removed again, or its key is taken."""
    tasks, task = TaskRepository(database), make_task()
    await tasks.create(make_task(idempotency_key="key"))
    await tasks.create(task)

    created, refused, removed = await asyncio.gather(  # one batch
        tasks.create(make_task()),
        tasks.create(make_task(task_id=task.task_id, idempotency_key=key)),
        tasks.delete(task.task_id),
        return_exceptions=True,
    )

    assert isinstance(refused, DuplicateError)
    assert (refused.id, refused.idempotency_key) == (task.task_id, None)
    assert created is removed is True
    assert [kind for _, _, kind, _ in feed(location)] == ["created"] * 3 + ["removed"]
    assert execute(location, "SELECT count(*) FROM tasks") == [(2,)]


async def test_refusal_by_what_was_known_is_made_sure_of(
    manager: StateManager, other: Database, location: Location, make_task: MakeTask
) -> None:
    """Planted: where nothing is written, what was assumed counts."""
    task = make_task()
    await manager.add_task(task)
    await manager.cancel_task(task.task_id)
    await TaskRepository(other).requeue(task.task_id)

    await manager.cancel_task(task.task_id)

    assert execute(location, "SELECT status FROM tasks") == [("cancelled",)]
    assert [revision for revision, *_ in feed(location)] == [1, 2, 3, 4]


async def test_node_is_not_known_any_more_once_others_have_written(
    manager: StateManager,
    other: Database,
    location: Location,
    make_task: MakeTask,
    make_node: MakeNode,
) -> None:
    """Planted: a claim is decided on what was known of the node."""
    await manager.register_node(make_node(node_id="n"))
    for _ in range(6):
        await manager.add_task(make_task())
    [node] = await NodeRepository(other).list_online_nodes()
    node.status = NodeStatus.MAINTENANCE
    await NodeRepository(other).update(node)

    assert await manager.claim_tasks("n") == []

    assert execute(location, "SELECT status, running_tasks FROM nodes") == [("maintenance", 0)]


async def test_known_node_that_others_have_removed_can_be_added_again(
    manager: StateManager, other: Database, location: Location, make_node: MakeNode
) -> None:
    """Planted: what the cache knows of the node counts."""
    await manager.add_node(make_node(node_id="n"))
    await NodeRepository(other).delete("n")

    assert await NodeRepository(manager.db).create(make_node(node_id="n"))

    assert counters(location) == (3, 0)


async def test_node_is_not_known_any_more_once_others_have_beaten_for_it(
    manager: StateManager,
    other: Database,
    clock: FakeClock,
    make_node: MakeNode,
    make_task: MakeTask,
) -> None:
    """Planted: a node is taken for what was known of it."""
    await manager.add_node(make_node(node_id="n"))
    await manager.add_task(make_task())
    clock.advance(seconds=200)
    async with StateManager(other, None) as its_manager:
        assert await its_manager.update_heartbeat("n")
    await manager.add_task(make_task())

    silent = SetNodeStatus("n", NodeStatus.OFFLINE, timedelta(seconds=120))
    assert await manager.db.write(apply, silent) is False


async def test_node_is_known_no_more_once_it_was_beaten(
    database: Database, location: Location, make_node: MakeNode, clock: FakeClock
) -> None:
    """Planted: heartbeats leave what is known as it was."""
    nodes, node = NodeRepository(database), make_node()
    await nodes.create(node)
    at = clock.advance(seconds=5)
    await database.write(apply_heartbeats, [Heartbeat(node.node_id, at, {"cpu_usage": 5.0})])

    node.last_heartbeat, node.hostname = at - timedelta(seconds=1), "renamed"
    await nodes.update(node)

    assert execute(location, "SELECT last_heartbeat, hostname FROM nodes") == [(at, "renamed")]


async def test_heartbeats_and_changes_share_a_batch(
    database: Database,
    location: Location,
    make_task: MakeTask,
    make_node: MakeNode,
    clock: FakeClock,
) -> None:
    nodes, tasks = NodeRepository(database), TaskRepository(database)
    node, task = make_node(), make_task()
    await asyncio.gather(nodes.create(node), tasks.create(task))
    at = clock.advance(seconds=1)
    task.error = "changed"

    _, known, _, known_too = await asyncio.gather(
        tasks.update(task),
        database.write(apply_heartbeats, [Heartbeat(node.node_id, at, {"cpu_usage": 5.0})]),
        tasks.create(make_task()),
        database.write(apply_heartbeats, [Heartbeat(node.node_id, at, {"disk_usage": 6.0})]),
    )

    found = await nodes.get(node.node_id)
    assert found is not None
    assert (known, known_too) == ([True], [True])
    assert (found.last_heartbeat, found.cpu_usage, found.disk_usage) == (at, 5.0, 6.0)
    assert counters(location) == (4, 1)
    assert [revision for revision, *_ in feed(location)] == [1, 2, 3, 4]
    assert (await database.get_stats())["writer"]["batches"] == 2


class Moment(datetime):
    """As other libraries have them."""


async def test_batch_keeps_whatever_there_is(database: Database, make_task: MakeTask) -> None:
    """Planted: arrays are sent as JSON with other brackets, whatever it escapes."""
    first, last = (moment.replace(tzinfo=UTC) for moment in (datetime.min, datetime.max))
    moments = [first, last, last - timedelta(microseconds=1), Moment(2026, 3, 1, tzinfo=UTC)]
    texts = [*map(chr, range(1, 128)), "", "NULL", "\\n", "a\\", '\\"', "\\\n", "{,}", "é\u2028😀"]
    tasks = [
        make_task(
            name=text,
            error=None if number % 3 else text,
            parameters={"text": text, text: 1e300},
            timeout=None if number % 5 else 2**63 - 1,
            submitted_at=moments[number % len(moments)],
        )
        for number, text in enumerate(texts)
    ]
    repository = TaskRepository(database)

    await asyncio.gather(*map(repository.create, tasks))
    tried = await asyncio.gather(*map(repository.update, tasks))

    assert [await repository.get(task.task_id) for task in tasks] == tasks
    assert tried == [True] * len(tasks)
    assert (await database.get_stats())["writer"]["largest_batch"] == len(tasks)


NEEDING: dict[str, Callable[[WriteTransaction], Any]] = {
    "execute": lambda unit: unit.cursor.execute("SELECT task_id FROM public.tasks"),
    "count": lambda unit: unit.cursor.count(
        "UPDATE public.tasks SET error = 'x' "
        "FROM unnest($1::text::text[]) AS given (id) WHERE task_id = id",
        [("first",), ("second",)],
    ),
}


@pytest.mark.parametrize("call", NEEDING.values(), ids=NEEDING)
async def test_what_needs_the_lock_sees_what_stands_before_it_in_the_batch(
    database: Database, make_task: MakeTask, call: Callable[[WriteTransaction], Any]
) -> None:
    """Planted: it is done without the lock, or the rows of commands before are written after it."""
    tasks = TaskRepository(database)

    def look(unit: WriteTransaction, operations: Sequence[None]) -> Sequence[Any]:
        found = call(unit)
        return [found if isinstance(found, int) else len(found)]

    _, found, _ = await asyncio.gather(
        tasks.create(make_task(task_id="first")),
        database.write(look, None),
        tasks.create(make_task(task_id="second")),
    )

    assert found == 1
    assert (await database.get_stats())["writer"]["batches"] == 1


async def test_what_needs_the_lock_is_begun_again_with_it(database: Database) -> None:
    """Planted: the call of the first attempt is sent, too."""
    cursors: list[Any] = []

    def look(unit: WriteTransaction, operations: Sequence[str]) -> Sequence[Any]:
        cursors.append(unit.cursor)
        return [NEEDING[name](unit) for name in operations]

    for name in NEEDING:
        await database.write(look, name)

    assert [type(cursor) for cursor in cursors] == [CallCursor, Cursor] * 2


@pytest.mark.parametrize("kind", [Task, NodeInfo])
async def test_row_that_is_removed_and_created_in_one_batch_is_the_new_one(
    database: Database,
    location: Location,
    make_task: MakeTask,
    make_node: MakeNode,
    sent: list[str],
    kind: type[Any],
) -> None:
    """Planted: a statement inserts what another, done together with it, deletes."""
    repository: Any = (TaskRepository if kind is Task else NodeRepository)(database)
    old: Any = make_task(task_id="same") if kind is Task else make_node(node_id="same")
    new: Any = (
        make_task(task_id="same", user_id="new", parameters={"new": 1})
        if kind is Task
        else make_node(node_id="same", hostname="new", tags=["new"])
    )
    await repository.create(old)
    writes = [repository.delete("same"), repository.create(new)]

    await asyncio.gather(*writes)

    assert await repository.get("same") == new
    assert not any("DELETE" in statement for statement in sent)
    assert feed(location) == [
        (1, "same", "created", None),
        (2, "same", "removed", 1),
        (3, "same", "created", None),
    ]


async def test_history_that_began_in_the_same_batch_is_removed_with_it(
    database: Database, location: Location, make_task: MakeTask
) -> None:
    """Planted: the changes of the batch itself stay, since no statement sees another's rows."""
    tasks, old, new = TaskRepository(database), make_task(), make_task()
    await tasks.create(old)
    old.error = "changed"

    await asyncio.gather(
        tasks.update(old),
        tasks.create(new),
        database.write(apply, Remove(Task, old.task_id, with_history=True)),
        database.write(apply, Remove(Task, new.task_id, with_history=True)),
    )

    assert feed(location) == [(4, old.task_id, "removed", 2), (5, new.task_id, "removed", 3)]
    assert counters(location) == (5, 0)


async def test_plans_that_are_made_on_empty_tables_search_by_keys(
    database: Database,
    location: Location,
    make_task: MakeTask,
    make_node: MakeNode,
    clock: FakeClock,
    sent: list[str],
) -> None:
    tasks, nodes = TaskRepository(database), NodeRepository(database)
    for count in (1, 2):
        some, few = [make_task() for _ in range(count)], [make_node() for _ in range(count)]
        for task, node in zip(some, few, strict=True):
            await tasks.create(task)
            await nodes.create(node)
        await asyncio.gather(*map(tasks.update, some), *map(nodes.update, few))
        heartbeats = [Heartbeat(node.node_id, clock(), {}) for node in few]
        await database.write(apply_heartbeats, heartbeats)
        await asyncio.gather(
            *(database.write(apply, Remove(Task, one.task_id, with_history=True)) for one in some),
            *(nodes.delete(one.node_id) for one in few),
        )
    statements = {sql for sql in sent if re.match("SELECT|INSERT|UPDATE|DELETE", sql)}
    assert len(statements) > 10

    execute(location, "TRUNCATE tasks, nodes, changes")
    async with engine_of(location).connect() as connection:
        for name, value in WRITER_SETTINGS.items():
            await connection.exec_driver_sql(f"SET {name} = '{value}'")
        raw = (await connection.get_raw_connection()).driver_connection
        assert raw is not None
        for statement in statements:
            places = len(set(re.findall(r"\$\d+", statement)))
            await raw.execute(f"PREPARE explained AS {statement}")
            nulls = f"({', '.join(['NULL'] * places)})" if places else ""
            plan = await raw.fetch(f"EXPLAIN (COSTS OFF) EXECUTE explained {nulls}")
            await raw.execute("DEALLOCATE explained")
            steps = "\n".join(step for (step,) in plan)
            assert "Seq Scan" not in steps, f"{statement}\n{steps}"


async def test_call_searches_by_keys(
    location: Location, clock: FakeClock, make_task: MakeTask, make_node: MakeNode
) -> None:
    """Planted: the function has not the settings of the planner.

    Its statements are planned on empty tables, and used when there are many rows.
    """
    create_database(location)
    async with Database(location, clock=clock) as database:
        tasks, nodes = TaskRepository(database), NodeRepository(database)
        await nodes.create(make_node(node_id="n", max_concurrent_tasks=9))
        for count in (1, 30):
            added = [make_task(idempotency_key=f"{count}-{number}") for number in range(count)]
            await asyncio.gather(*map(tasks.create, added))
            await asyncio.gather(*map(tasks.update, added))
            for task in await tasks.claim("n", 5):
                await tasks.complete(task)
    await until(lambda: execute(location, INSERTED) == [(31,)])
    scans = (
        "SELECT relname, seq_scan FROM pg_stat_user_tables "
        "WHERE relname IN ('tasks', 'nodes', 'changes', 'counters')"
    )
    before = dict(execute(location, scans))
    assert before.keys() == {"tasks", "nodes", "changes", "counters"}

    async with Database(location, clock=clock) as database:
        [task] = await TaskRepository(database).claim("n", 1)
        await TaskRepository(database).complete(task)
        await TaskRepository(database).create(make_task(idempotency_key="key"))

    await until(lambda: execute(location, INSERTED) == [(32,)])
    after = dict(execute(location, scans))
    assert after == before


INSERTED = "SELECT n_tup_ins FROM pg_stat_user_tables WHERE relname = 'tasks'"


LOST: dict[str, tuple[str | None, str, type[Exception]]] = {
    "read before the call": ("LOCK TABLE tasks", "cancel", UnavailableError),
    "call": (None, "update", OutcomeUnknownError),
    "call that has the lock": ("LOCK TABLE changes", "update", OutcomeUnknownError),
    "locked": (None, "delete", UnavailableError),
    "locked write": ("LOCK TABLE changes", "delete", UnavailableError),
}


@pytest.mark.parametrize(("lock", "call", "error"), LOST.values(), ids=LOST)
async def test_outcome_is_unknown_only_where_what_commits_was_under_way(
    own_server: Server,
    make_task: MakeTask,
    lock: str | None,
    call: str,
    error: type[Exception],
) -> None:
    """Planted: a connection that is lost while writing is an ordinary failure."""
    url = await own_server.create_database()

    def is_waiting() -> bool:
        return execute(url, "SELECT 1 FROM pg_locks WHERE NOT granted") != []

    async with Database(url) as database:
        tasks, task = TaskRepository(database), make_task()
        await tasks.create(task)
        with suppress(DBAPIError):  # the lock, too, is lost
            async with locked(url, lock):
                writing = asyncio.ensure_future(
                    tasks.update(task) if call == "update" else getattr(tasks, call)(task.task_id)
                )
                await asyncio.to_thread(wait_until, is_waiting, "the writer waits for the lock")
                own_server.kill()
        own_server.start()

        with pytest.raises(error):
            await writing
        await tasks.create(make_task())

        assert await tasks.count_by_status() == 2
        assert (await database.get_stats())["writer"]["failed_batches"] == 1


@pytest.mark.parametrize("verb", ["update", "delete"])
async def test_row_that_somebody_changes_by_hand_meanwhile_is_written_behind_it(
    database: Database, location: Location, make_task: MakeTask, verb: str
) -> None:
    """Planted: the row is found by its place in the table, which another one then has."""
    tasks, task = TaskRepository(database), make_task()
    await tasks.create(task)
    task.status = TaskStatus.RUNNING
    async with engine_of(location).connect() as by_hand:
        await by_hand.exec_driver_sql("UPDATE tasks SET user_id = 'by hand'")
        write = tasks.update(task) if verb == "update" else tasks.delete(task.task_id)
        writing = asyncio.create_task(write)
        waiting = f"SELECT count(*) {WAITING}"
        while execute(location, waiting) == [(0,)]:  # noqa: ASYNC110  # the server is asked
            await asyncio.sleep(0.01)

        await by_hand.commit()
        await asyncio.wait_for(writing, PATIENCE)

    stored = execute(location, "SELECT status, version FROM tasks")
    assert stored == ([("running", 2)] if verb == "update" else [])


async def test_statement_that_the_server_was_told_to_end_has_not_happened(
    database: Database, location: Location, make_task: MakeTask
) -> None:
    tasks = TaskRepository(database)
    await tasks.create(make_task())
    async with locked(location):
        writing = asyncio.create_task(tasks.create(make_task()))
        cancel = f"SELECT count(pg_cancel_backend(pid)) {WAITING}"
        while execute(location, cancel) == [(0,)]:  # noqa: ASYNC110  # the server is asked
            await asyncio.sleep(0.01)
        with pytest.raises(UnavailableError, match="took too long"):
            await asyncio.wait_for(writing, PATIENCE)

    assert await tasks.count_by_status() == 1


async def test_internal_error_of_the_driver_is_unavailable(
    manager: StateManager, make_task: MakeTask, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its connection is still busy with an interrupted call. Found by the campaign of the network,
    and once raised by `watch` as it was."""
    await manager.add_task(make_task())

    error = importlib.import_module("asyncpg").InternalClientError

    async def fail(self: object, *arguments: object) -> None:
        raise error("another operation (2) is in progress")

    monkeypatch.setattr("asyncpg.prepared_stmt.PreparedStatement.fetch", fail)

    with pytest.raises(UnavailableError, match="another operation"):
        await anext(manager.watch(since=0))
    for block in (manager.db.session, manager.db.transaction):
        with pytest.raises(UnavailableError, match="another operation"):
            async with block() as session:
                await session.execute(text("SELECT 1 FROM tasks"))


async def test_counters_that_are_gone_are_named(
    database: Database, location: Location, make_task: MakeTask
) -> None:
    execute(location, "DELETE FROM counters")

    with pytest.raises(SchemaMismatchError, match="the row of `counters` is gone"):
        await TaskRepository(database).create(make_task())
