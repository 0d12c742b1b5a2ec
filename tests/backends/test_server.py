"""What a server may do to the library: be killed, say nothing, be old, be strict, be several."""

from __future__ import annotations

import asyncio
import os
import socket
import subprocess
import sys
import traceback
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
from contextlib import asynccontextmanager, contextmanager, suppress
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path
from typing import Any
from uuid import uuid4

import pytest
from conftest import (
    PATIENCE,
    FakeClock,
    MakeNode,
    MakeTask,
    end_while_closing,
    engine_of,
    execute,
    until,
)
from sqlalchemy import make_url, text
from sqlalchemy.ext.asyncio import AsyncConnection

from campaigns.faults.proxy import Proxy, port_of, with_parts
from devtools.postgres import (
    Server,
    free_port,
    wait_until,
)
from openclaw_store import (
    Change,
    Database,
    NodeRepository,
    StateManager,
    Task,
    TaskRepository,
    TaskStatus,
    TaskType,
)
from openclaw_store.backends.postgresql import backend as postgresql
from openclaw_store.backends.postgresql import connections
from openclaw_store.backends.postgresql import listening as wakeups
from openclaw_store.backends.postgresql.connections import Connector, is_lost, may_be_lost
from openclaw_store.errors import (
    BackendError,
    DeadlineError,
    DuplicateError,
    InvalidDataError,
    OutcomeUnknownError,
    StoreError,
    UnavailableError,
)

pytestmark = pytest.mark.postgresql

LEEWAY = 1.5
"""Seconds of slack on a busy machine, besides the limits; to wait for twice one of them is more."""

REVISIONS = "SELECT revision FROM changes ORDER BY revision"

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def template(own_server: Server) -> str:
    """A migrated, empty database to copy."""

    async def migrate() -> str:
        url = await own_server.create_database()
        async with Database(url):
            return url

    return asyncio.run(migrate())


@contextmanager
def new_database(server: Server, template: str | None = None) -> Iterator[str]:
    """A database's URL; a connection that is left to it is an error."""
    url = asyncio.run(server.create_database(template))
    try:
        yield url
    finally:
        asyncio.run(server.drop_database(url))


@pytest.fixture
def url(own_server: Server, template: str) -> Iterator[str]:
    """A migrated, empty database."""
    with new_database(own_server, template) as url:
        yield url


@pytest.fixture
def empty_url(own_server: Server) -> Iterator[str]:
    """A database without any table."""
    with new_database(own_server) as url:
        yield url


@contextmanager
def within(seconds: float) -> Iterator[None]:
    """Fails what takes longer."""
    loop = asyncio.get_running_loop()
    began = loop.time()
    yield
    took = loop.time() - began
    assert took < seconds, f"it took {took:.2f} s"


@asynccontextmanager
async def silent_server() -> AsyncIterator[Silence]:
    """A server that takes connections and never answers."""
    silence = Silence()
    listening = await asyncio.start_server(silence.take, "127.0.0.1", 0)
    silence.port = listening.sockets[0].getsockname()[1]
    try:
        yield silence
        await until(lambda: silence.open == 0)  # a connection that is left to it is an error
    finally:
        listening.close()


@dataclass
class Silence:
    port: int = 0
    taken: int = 0
    open: int = 0

    async def take(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.taken += 1
        self.open += 1
        with suppress(OSError):
            while await reader.read(1 << 16):
                pass
        self.open -= 1
        writer.close()


class TestSilence:
    """A server that is there and does not answer, from the beginning or from some moment on."""

    LIMIT = 0.8

    @pytest.fixture(autouse=True)
    def _hurry(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(postgresql, "_CONNECT_SECONDS", self.LIMIT)
        monkeypatch.setattr(connections, "_CLOSE_SECONDS", 0.2)

    @pytest.fixture
    async def proxy(self, url: str) -> AsyncIterator[Proxy]:
        async with Proxy(url) as proxy:
            yield proxy

    @pytest.fixture
    async def database(self, proxy: Proxy) -> AsyncIterator[Database]:
        async with Database(proxy.url, timeout=self.LIMIT, answer_timeout=self.LIMIT) as database:
            yield database
            proxy.forward()
            await until(lambda: database.checked_out_connections == 0)

    async def test_server_that_never_answers_is_unavailable_in_time(self, url: str) -> None:
        async with silent_server() as silence:
            database = Database(
                with_parts(url, port=silence.port), timeout=self.LIMIT, answer_timeout=self.LIMIT
            )

            with within(self.LIMIT + 2), pytest.raises(UnavailableError, match="does not answer"):
                await database.initialize()

            assert silence.taken > 0

    @pytest.mark.parametrize("requests", [True, False], ids=["both ways", "replies"])
    @pytest.mark.parametrize("call", ["write", "read", "transaction"])
    async def test_call_while_nothing_gets_through_fails_in_time_and_the_next_one_works(
        self, proxy: Proxy, database: Database, make_task: MakeTask, call: str, requests: bool
    ) -> None:
        tasks, task = TaskRepository(database), make_task()
        await tasks.create(make_task(task_id="first"))
        await tasks.create(make_task())  # so the statement is known to the server
        assert await tasks.get("first") is not None

        async def do() -> None:
            if call == "write":
                await tasks.create(task)
            elif call == "read":
                assert await tasks.get("first") is not None
            else:
                async with database.transaction() as tx:
                    await TaskRepository(tx).create(task)

        # A lone write is one request, which commits.
        error = OutcomeUnknownError if call == "write" else UnavailableError
        proxy.swallow(requests=requests)
        with within(self.LIMIT + LEEWAY), pytest.raises(error):
            await do()
        proxy.forward()

        if call == "write" and not requests:
            with pytest.raises(DuplicateError):
                await do()
        else:
            await do()
        assert await tasks.count_by_status() == (2 if call == "read" else 3)

    @pytest.mark.parametrize("call", ["add_task", "add_node"])
    async def test_reply_to_a_commit_that_is_lost_is_an_unknown_outcome(
        self, proxy: Proxy, url: str, make_task: MakeTask, make_node: MakeNode, call: str
    ) -> None:
        async with StateManager(
            Database(proxy.url, timeout=self.LIMIT, answer_timeout=self.LIMIT), None
        ) as manager:
            await manager.add_task(make_task())
            one: Any = (
                make_task(task_id="t", name="of no return")
                if call == "add_task"
                else make_node(node_id="t")
            )
            # A task is written by a call, which commits.
            proxy.swallow_after(b"COMMIT\0" if call == "add_node" else b"of no return")

            with within(self.LIMIT + LEEWAY), pytest.raises(OutcomeUnknownError):
                await getattr(manager, call)(one)
            proxy.forward()

            with pytest.raises(DuplicateError):
                await getattr(manager, call)(one)
            rows = "SELECT task_id AS id FROM tasks UNION ALL SELECT node_id FROM nodes"
            assert execute(url, f"SELECT count(*) FROM ({rows}) AS one WHERE id = 't'") == [(1,)]
            assert [row for (row,) in execute(url, REVISIONS)] == [1, 2]
            await manager.refresh_from_database()
            assert await manager.get_task("t") == await manager.task_repo.get("t")
            assert await manager.get_node("t") == await manager.node_repo.get("t")

    @pytest.mark.parametrize("arrives", [True, False])
    async def test_commit_of_a_transaction_that_nobody_answers_is_an_unknown_outcome(
        self, proxy: Proxy, database: Database, url: str, make_task: MakeTask, arrives: bool
    ) -> None:
        """Planted: the error of closing the session takes the place of the one of the commit."""

        async def add() -> None:
            async with database.transaction() as tx:
                await TaskRepository(tx).create(make_task(task_id="t"))

        (proxy.swallow_after if arrives else proxy.swallow_from)(b"COMMIT;")
        with within(self.LIMIT + LEEWAY), pytest.raises(OutcomeUnknownError):
            await add()
        proxy.forward()
        await proxy.end_connections()

        if arrives:
            with pytest.raises(DuplicateError):
                await add()
        else:
            await add()
        assert execute(url, "SELECT task_id FROM tasks") == [("t",)]

    @pytest.mark.parametrize("way", ["transaction", "session"])
    async def test_read_with_a_session_of_the_callers_that_is_cut_off_is_unavailable(
        self, proxy: Proxy, database: Database, way: str
    ) -> None:
        """Found by the campaign of the network: it was the driver's `TimeoutError`."""

        async def read() -> None:
            async with database.transaction() if way == "transaction" else database.session() as tx:
                await TaskRepository(tx).count_by_status()
                proxy.swallow()
                await TaskRepository(tx).get("t")

        with within(self.LIMIT + LEEWAY), pytest.raises(UnavailableError, match="not answer"):
            await read()

    @pytest.mark.parametrize("moment", ["in the block", "behind it"])
    async def test_transaction_that_is_cut_off_before_its_commit_has_changed_nothing(
        self, proxy: Proxy, database: Database, url: str, make_task: MakeTask, moment: str
    ) -> None:
        """Planted: what the end of the block writes fails with the driver's own error."""

        async def add() -> None:
            async with database.transaction() as tx:
                await TaskRepository(tx).create(make_task())
                proxy.swallow()
                if moment == "in the block":
                    await TaskRepository(tx).create(make_task())

        with within(self.LIMIT + LEEWAY), pytest.raises(UnavailableError, match="not answer"):
            await add()
        proxy.forward()
        await proxy.end_connections()

        assert execute(url, "SELECT * FROM tasks") == []
        await TaskRepository(database).create(make_task())

    async def test_transaction_that_is_cut_off_and_takes_too_long_is_ended_in_time(
        self, proxy: Proxy, url: str, make_task: MakeTask
    ) -> None:
        """Planted: it is rolled back, and so waits for an answer once more."""
        async with Database(proxy.url, timeout=PATIENCE) as database:

            async def add() -> None:
                async with database.transaction(timeout=self.LIMIT) as tx:
                    proxy.swallow()
                    await TaskRepository(tx).create(make_task())

            with within(self.LIMIT + LEEWAY), pytest.raises(DeadlineError):
                await add()

    async def test_database_with_connections_that_are_cut_off_is_closed_in_time(
        self, proxy: Proxy, make_task: MakeTask
    ) -> None:
        """Planted: closing waits as long as a statement, on one connection after another."""
        database = Database(proxy.url, timeout=PATIENCE)
        await database.initialize()
        await TaskRepository(database).create(make_task())
        await asyncio.gather(*[TaskRepository(database).list_pending_tasks() for _ in range(3)])
        proxy.swallow()

        with within(PATIENCE / 2):
            await database.close()

    async def test_cut_connection_of_the_wake_ups_is_made_anew(
        self, proxy: Proxy, url: str, make_task: MakeTask, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(wakeups, "RETRY_SECONDS", (0.01, 0.1))
        monkeypatch.setattr(wakeups, "ALIVE_SECONDS", 0.1)
        async with (
            StateManager(
                Database(proxy.url, timeout=self.LIMIT, answer_timeout=self.LIMIT), 3600
            ) as follower,
            StateManager(Database(url), None) as other,
        ):
            await other.add_task(make_task())
            await until(lambda: follower.version == 1)
            before = proxy.taken
            proxy.swallow()
            await until(lambda: proxy.taken > before)  # it has noticed
            proxy.forward()

            await other.add_task(make_task())

            await until(lambda: follower.version == 2)

    @pytest.mark.parametrize(
        "words", [b"FOR UPDATE", b"application_name"], ids=["takes the lock", "connects"]
    )
    async def test_caller_cancelled_while_its_transaction_begins_holds_up_nobody(
        self, proxy: Proxy, make_task: MakeTask, monkeypatch: pytest.MonkeyPatch, words: bytes
    ) -> None:
        """Others waited until that was hopeless: it was asked to roll back, or still connected."""
        monkeypatch.setattr(connections, "_ABANDONED_SECONDS", 0.2)

        async def take() -> None:
            async with database.transaction():
                raise AssertionError("it has the lock")

        async with Database(proxy.url, timeout=PATIENCE) as database:
            await TaskRepository(database).create(make_task())
            proxy.swallow_from(words)
            caller = asyncio.create_task(take())
            await asyncio.wait_for(proxy.fault_begun.wait(), PATIENCE)
            proxy.forward()

            with within(PATIENCE / 2):
                caller.cancel()
                await asyncio.wait([caller])
                await TaskRepository(database).create(make_task())
            assert caller.cancelled()

    @pytest.mark.parametrize("is_connected", [True, False])
    async def test_batch_that_has_waited_for_its_turn_has_its_answer_in_time(
        self, proxy: Proxy, make_task: MakeTask, monkeypatch: pytest.MonkeyPatch, is_connected: bool
    ) -> None:
        """It had as long again to connect, and for each answer."""
        monkeypatch.setattr(connections, "_ABANDONED_SECONDS", 0.1)
        async with Database(proxy.url, timeout=3, answer_timeout=2) as database:
            if is_connected:
                await TaskRepository(database).create(make_task())
            with within(5.2):
                async with database._exclusive("somebody else"):
                    write = asyncio.ensure_future(TaskRepository(database).create(make_task()))
                    await asyncio.sleep(2.5)
                    proxy.swallow()
                # A call commits.
                error = OutcomeUnknownError if is_connected else UnavailableError
                with pytest.raises(error):
                    await write

    async def test_transaction_begins_in_time_though_its_connection_has_taken_most_of_that(
        self, proxy: Proxy, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Each of the things that begin it had all of the time."""
        connect = Connector.connect

        async def slowly(self: Connector, *arguments: Any, **options: Any) -> Any:
            connection = await connect(self, *arguments, **options)
            await asyncio.sleep(2.5)
            proxy.swallow()
            return connection

        async with Database(proxy.url, timeout=3, answer_timeout=2) as database:
            monkeypatch.setattr(Connector, "connect", slowly)
            with within(5.2), pytest.raises(UnavailableError, match="does not answer"):
                async with database.transaction():
                    raise AssertionError("it has begun")

    async def test_transaction_has_time_to_commit_when_its_block_is_over(
        self, url: str, make_task: MakeTask, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """The server ended it a second after the time for the block."""
        monkeypatch.setattr(postgresql, "_CONNECT_SECONDS", 0.1)

        async def hold(connection: AsyncConnection) -> None:
            async with connection.begin():
                await connection.execute(text("LOCK TABLE changes IN SHARE MODE"))
                held.set()
                await asyncio.sleep(1.6)

        held = asyncio.Event()
        async with Database(url, timeout=PATIENCE) as database, engine_of(url).connect() as other:
            async with database.transaction(timeout=0.2) as tx:
                await TaskRepository(tx).create(make_task())
                holder = asyncio.create_task(hold(other))
                await held.wait()
            await holder

            assert await TaskRepository(database).count_by_status() == 1

    async def test_connections_whose_terminate_message_is_late_are_closed_silently(
        self, proxy: Proxy, url: str, make_task: MakeTask, caplog: pytest.LogCaptureFixture
    ) -> None:
        """SQLAlchemy reported an error of each."""
        async with StateManager(Database(proxy.url, timeout=PATIENCE)) as manager:
            await manager.add_task(make_task())
            await manager.task_repo.get("t")
            proxy.swallow(requests=False)
        proxy.forward()

        assert [record.getMessage() for record in caplog.records if record.levelno > 20] == []

    @pytest.mark.parametrize("is_limit", [False, True], ids=["cancelled", "time over"])
    async def test_caller_who_closes_a_connection_is_cancelled_when_it_is_closed(
        self, proxy: Proxy, database: Database, is_limit: bool
    ) -> None:
        """Else SQLAlchemy reports an error of the connection, as at the end of `asyncio.run`."""
        engine = database.session_factory.kw["bind"]
        pooled = await engine.raw_connection()
        connection = pooled.driver_connection
        proxy.swallow()  # the driver waits for the server's answer

        await end_while_closing(connection, is_limit=is_limit)
        pooled.invalidate()

    @pytest.mark.parametrize("amid_a_statement", [False, True], ids=["between two", "amid one"])
    @pytest.mark.parametrize("way", ["writer", "transaction"])
    async def test_lock_of_a_process_that_nobody_hears_of_any_more_is_given_up(
        self, proxy: Proxy, database: Database, url: str, make_task: MakeTask, make_node: MakeNode,
        way: str, amid_a_statement: bool,
    ) -> None:  # fmt: skip
        """Its machine has lost its power, say; the server is not told, and waits for hours.

        A statement is more than one message; a client that is lost amid them is not idle.
        """
        tasks = TaskRepository(database)
        await tasks.create(make_task())

        async def vanish() -> None:
            if way == "writer":
                if amid_a_statement:
                    proxy.swallow_from(b"needle")
                else:
                    proxy.swallow_after(b"FOR UPDATE")
                # By a statement that has not been prepared yet.
                needles = [make_node(node_id=f"needle-{number}") for number in range(2)]
                await asyncio.gather(*map(NodeRepository(database).create, needles))
            else:
                async with database.transaction(timeout=self.LIMIT) as tx:
                    await TaskRepository(tx).create(make_task())
                    if amid_a_statement:
                        proxy.swallow_from(b"needle")
                        await TaskRepository(tx).get("needle")
                    proxy.swallow()

        with pytest.raises((UnavailableError, DeadlineError)):
            await vanish()
        async with Database(url, timeout=PATIENCE) as other:
            with within(PATIENCE / 2):
                await TaskRepository(other).create(make_task())

            assert await TaskRepository(other).count_by_status() == 2


END_ALL = """
    SELECT pg_terminate_backend(pid, 10000) FROM pg_stat_activity
    WHERE datname = current_database() AND pid <> pg_backend_pid()"""


class TestIdleConnections:
    """The server has closed them: it was restarted, or its limit for idle sessions is over."""

    async def test_calls_after_the_end_of_all_idle_connections_have_no_error(
        self, url: str, make_task: MakeTask, make_node: MakeNode
    ) -> None:
        """A write was an unknown outcome, though nothing had been sent."""
        async with Database(url) as database:
            tasks, nodes = TaskRepository(database), NodeRepository(database)

            async def read(times: int = 1) -> None:
                assert None not in await asyncio.gather(*[tasks.get("t") for _ in range(times)])

            async def read_in(way: Any) -> None:
                async with way() as session:
                    assert await TaskRepository(session).get("t") is not None

            await tasks.create(make_task(task_id="t"))
            await read(times=4)
            calls: list[Callable[[], Coroutine[Any, Any, object]]] = [
                lambda: tasks.create(make_task()),
                lambda: nodes.create(make_node()),
                lambda: read(times=4),
                lambda: read_in(database.session),
                lambda: read_in(database.transaction),
            ]
            for call in calls:
                ended = execute(url, END_ALL)  # this loop stands still meanwhile
                assert ended
                assert set(ended) == {(True,)}
                await call()

    async def test_message_to_an_idle_connection_is_not_its_end(self, url: str) -> None:
        """Planted: the connection is lost as soon as there is anything to read."""
        heard = asyncio.Event()
        async with Database(url) as database, database.session() as session:
            raw: Any = await (await session.connection()).get_raw_connection()
            driver = raw.driver_connection
            await driver.add_listener("news", lambda *_: heard.set())
            execute(url, "NOTIFY news")
            wait_until(lambda: may_be_lost(driver), "the message is here")

            assert not await is_lost(driver)
            await asyncio.wait_for(heard.wait(), PATIENCE)


ADDERS = 64
BEFORE_AFTER = (400, 3)
"""Tasks that are added in all before the server is killed, and by each coroutine afterwards."""


@dataclass
class Crash:
    """What those who added tasks say, and what there was afterwards."""

    acknowledged: set[str] = field(default_factory=set)
    in_doubt: set[str] = field(default_factory=set)
    errors: list[Exception] = field(default_factory=list)
    failed_after_restart: int = 0
    seen: list[int] = field(default_factory=list)
    """Revisions, by a watcher that goes on from the last one when it is interrupted."""
    revisions: list[int] = field(default_factory=list)
    stored: dict[str, Task] = field(default_factory=dict)
    cached: dict[str, Task] = field(default_factory=dict)
    version: int = 0
    heard: bool = False
    """Whether what another process committed after the crash woke the manager."""


async def kill_under_load(server: Server, url: str) -> Crash:
    """Kill the server while tasks are added to it, and start it again."""
    crash = Crash()
    is_back = asyncio.Event()

    async def add(name: int, manager: StateManager) -> None:
        left = BEFORE_AFTER[1]
        for number in count():
            if is_back.is_set():
                left -= 1
            if left < 0:
                break
            began_after = is_back.is_set()
            task = Task.create(TaskType.BATCH, "t", task_id=f"{name}-{number}")
            try:
                await manager.add_task(task)
                crash.acknowledged.add(task.task_id)
            except Exception as error:
                crash.errors.append(error)
                crash.failed_after_restart += began_after
                if isinstance(error, OutcomeUnknownError):
                    crash.in_doubt.add(task.task_id)
                await is_back.wait()

    async def watch(manager: StateManager) -> None:
        while manager.is_initialized:
            try:
                async for change in manager.watch(since=crash.seen[-1] if crash.seen else 0):
                    crash.seen.append(change.revision)
            except BackendError:
                await is_back.wait()

    async with StateManager(Database(url), auto_sync_interval=3600) as manager:
        watching = asyncio.create_task(watch(manager))
        adding = [asyncio.create_task(add(name, manager)) for name in range(ADDERS)]
        await until(lambda: len(crash.acknowledged) >= BEFORE_AFTER[0])
        await asyncio.to_thread(server.kill)
        await until(lambda: len(crash.errors) == ADDERS)
        await asyncio.to_thread(server.start)
        is_back.set()
        await asyncio.gather(*adding)

        async with StateManager(Database(url), None) as other:
            await other.add_task(Task.create(TaskType.BATCH, "t", task_id="of another process"))
            crash.acknowledged.add("of another process")
            with suppress(TimeoutError):
                await until(lambda: manager.version == other.version)
                crash.heard = True
        await manager.refresh_from_database()
        crash.version = manager.version
        await until(lambda: crash.seen and crash.seen[-1] == crash.version)
        crash.cached = dict((await manager.get_state()).tasks)
        crash.stored = {
            one.task_id: one for one in await manager.task_repo.list_pending_tasks(None)
        }
        crash.revisions = [revision for (revision,) in execute(url, REVISIONS)]
    await watching
    return crash


@pytest.fixture(scope="module")
def crash(own_server: Server, template: str) -> Iterator[Crash]:
    with pytest.MonkeyPatch.context() as patch, new_database(own_server, template) as url:
        patch.setattr(wakeups, "RETRY_SECONDS", (0.01, 0.1))
        yield asyncio.run(kill_under_load(own_server, url))


class TestCrash:
    """`kill -9` of the server under load, and its restart."""

    def test_every_acknowledged_task_is_there_and_no_other_but_those_in_doubt(
        self, crash: Crash
    ) -> None:
        assert len(crash.acknowledged) > ADDERS * BEFORE_AFTER[1]
        assert crash.acknowledged <= crash.stored.keys()
        assert crash.stored.keys() <= crash.acknowledged | crash.in_doubt

    def test_callers_get_typed_errors(self, crash: Crash) -> None:
        assert len(crash.errors) == ADDERS
        assert {type(error) for error in crash.errors} <= {UnavailableError, OutcomeUnknownError}

    def test_next_call_works_without_a_new_database(self, crash: Crash) -> None:
        assert crash.failed_after_restart == 0

    def test_revisions_are_without_a_gap(self, crash: Crash) -> None:
        assert crash.revisions == list(range(1, len(crash.stored) + 1))

    def test_cache_equals_the_database(self, crash: Crash) -> None:
        assert crash.cached == crash.stored
        assert crash.version == crash.revisions[-1]

    def test_watcher_sees_every_revision_once_and_in_order(self, crash: Crash) -> None:
        assert crash.seen == crash.revisions

    def test_wake_ups_are_heard_again(self, crash: Crash) -> None:
        assert crash.heard


@pytest.fixture
def role(template: str) -> Iterator[str]:
    """One that may log in; to be asked for before the databases, which are dropped first then."""
    name, anywhere = f"role_{uuid4().hex}", with_parts(template, database="postgres")
    execute(anywhere, f"CREATE ROLE {name} LOGIN")
    yield name
    execute(anywhere, f"DROP ROLE {name}")


def grant(url: str, role: str) -> None:
    tables = "ALL TABLES IN SCHEMA public"
    execute(url, f"GRANT SELECT, INSERT, UPDATE, DELETE ON {tables} TO {role}")


class TestRole:
    async def test_that_may_only_read_and_write_rows_is_enough_on_a_migrated_database(
        self, role: str, url: str, make_task: MakeTask, make_node: MakeNode, clock: FakeClock
    ) -> None:
        grant(url, role)
        database = Database(with_parts(url, username=role), clock=clock)
        async with StateManager(database, 3600) as manager:
            await manager.add_node(make_node(node_id="n"))
            await manager.update_heartbeat("n", cpu_usage=5)
            await manager.add_task(make_task(task_id="t"))
            await manager.change_task("t", complete)
            await manager.add_task(make_task(task_id="unsaved"), persist=False)
            await manager.sync_to_database()
            async with database.transaction() as tx:
                await TaskRepository(tx).delete("unsaved")
            await manager.refresh_from_database()
            clock.advance(days=40)
            assert await manager.check_stale_nodes() == ["n"]
            assert await manager.remove_node("n")

            seen = await first(7, manager.watch(since=0))
            assert [change.revision for change in seen] == list(range(1, 8))
            assert await manager.task_repo.cleanup_old_tasks(days=30) == 1
            assert await manager.compact_changes(days=0) > 0
            assert (await database.get_stats())["task_count"] == 0

    async def test_that_may_not_make_tables_is_told_what_to_do(
        self, role: str, empty_url: str
    ) -> None:
        database = Database(with_parts(empty_url, username=role))

        with pytest.raises(UnavailableError, match="grant it what it needs, or use another role"):
            await database.initialize()

    async def test_that_may_not_read_the_tables_is_told_what_to_do(
        self, role: str, url: str
    ) -> None:
        database = Database(with_parts(url, username=role))

        with pytest.raises(UnavailableError, match="grant it what it needs, or use another role"):
            await database.initialize()

    async def test_that_does_not_own_the_tables_is_told_who_does_when_it_vacuums(
        self, role: str, url: str
    ) -> None:
        """The server does nothing then, and says so in a warning that nobody reads."""
        grant(url, role)
        async with Database(with_parts(url, username=role)) as database:
            with pytest.raises(
                UnavailableError, match=r"own archive_runs, .*changes, .*tasks: vacuum as postgres,"
            ):
                await database.vacuum()

            execute(url, f"ALTER TABLE changes OWNER TO {role}")
            with pytest.raises(
                UnavailableError, match=r"own archive_runs, archive_voids, counters, .*tasks: "
            ):
                await database.vacuum()

    @pytest.mark.parametrize(
        "statement",
        [
            "GRANT MAINTAIN ON ALL TABLES IN SCHEMA public TO {role}",
            "ALTER DATABASE {database} OWNER TO {role}",
            "GRANT postgres TO {role}",
        ],
        ids=["maintainer", "owner of the database", "member of the owner"],
    )
    async def test_that_may_vacuum_does(
        self, role: str, url: str, make_task: MakeTask, statement: str
    ) -> None:
        grant(url, role)
        if "MAINTAIN" in statement and execute(url, "SHOW server_version_num") < [("170000",)]:
            return  # it came with PostgreSQL 17
        execute(url, statement.format(role=role, database=make_url(url).database))
        async with Database(with_parts(url, username=role)) as database:
            await TaskRepository(database).create(make_task())

            await database.vacuum()

        assert execute(url, "SELECT reltuples FROM pg_class WHERE relname = 'tasks'") == [(1,)]


def complete(task: Task) -> None:
    task.status = TaskStatus.COMPLETED


async def first(number: int, changes: AsyncIterator[Change]) -> list[Change]:
    """So many changes of a watcher."""
    found: list[Change] = []
    async with asyncio.timeout(PATIENCE):
        async for change in changes:
            found.append(change)
            if len(found) == number:
                break
    return found


@pytest.mark.parametrize(
    ("given", "used"), [("off", "on"), ("on", "on"), ("local", "local"), ("remote_apply",) * 2]
)
async def test_commit_waits_for_the_disk_whatever_the_server_is_told(
    url: str, given: str, used: str
) -> None:
    """A stricter setting than ours stays; one that is made later does not change anything."""

    def tell(value: str) -> None:
        name = make_url(url).database
        execute(url, f"ALTER DATABASE {name} SET synchronous_commit = {value}")

    shown: list[object] = []
    tell(given)
    async with Database(url) as database:
        tell("off")
        [value] = await database.write(
            lambda unit, _: [unit.cursor.execute("SHOW synchronous_commit")[0]], None
        )
        shown.append(value)
        async with database.transaction() as tx:
            shown.append(await tx.scalar(text("SHOW synchronous_commit")))

    assert shown == [used, used]


async def test_older_server_is_refused_by_name(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(postgresql, "MINIMUM_VERSION", 99)

    with pytest.raises(UnavailableError, match=r"is PostgreSQL \d\d, 99 or newer is needed: upgr"):
        await Database(url).initialize()


class TestBackup:
    @pytest.fixture
    def path(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
        """Where programs are searched first."""
        folder = tmp_path / "bin"
        folder.mkdir()
        monkeypatch.setenv("PATH", f"{folder}{os.pathsep}{os.environ['PATH']}")
        return folder

    @pytest.mark.usefixtures("pg_dump")
    @pytest.mark.parametrize("several", [False, True], ids=["one host", "several hosts"])
    async def test_archive_can_be_restored_into_a_new_database(
        self,
        url: str,
        empty_url: str,
        tmp_path: Path,
        make_task: MakeTask,
        make_node: MakeNode,
        several: bool,
    ) -> None:
        archive = tmp_path / "folder" / "copy.dump"
        given = several_hosts(url) if several else url
        async with StateManager(Database(given), None) as manager:
            tasks = [make_task(metadata={"number": 1e300}) for _ in range(20)]
            await asyncio.gather(*map(manager.add_task, tasks))
            await manager.add_node(make_node(node_id="n", tags=["a"]))
            await manager.db.backup(archive)
            tasks = await manager.get_pending_tasks(None)
            node = await manager.get_node("n")

        restored = empty_url.replace("+asyncpg", "")
        restore = await asyncio.create_subprocess_exec(
            "pg_restore", "--no-owner", f"--dbname={restored}", archive
        )
        assert await restore.wait() == 0

        async with StateManager(Database(empty_url), None) as manager:
            assert await manager.get_pending_tasks(None) == tasks
            assert await manager.get_node("n") == node
            assert manager.version == 21
            await manager.add_task(make_task())
        assert os.listdir(archive.parent) == ["copy.dump"]

    @pytest.mark.usefixtures("pg_dump")
    async def test_file_that_exists_is_overwritten_only_on_demand(
        self, url: str, tmp_path: Path
    ) -> None:
        target = tmp_path / "copy.dump"
        target.write_text("precious")
        async with Database(url) as database:
            with pytest.raises(InvalidDataError, match="overwrite=True"):
                await database.backup(target)
            assert target.read_text() == "precious"

            await database.backup(target, overwrite=True)
            with pytest.raises(UnavailableError, match="File name too long: check the path"):
                await database.backup(tmp_path / ("x" * 250))

        assert target.read_bytes()[:5] == b"PGDMP"

    async def test_without_pg_dump_it_is_told_what_to_install(
        self, url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv("PATH", str(tmp_path))
        async with Database(url) as database:
            with pytest.raises(UnavailableError, match="postgresql-client"):
                await database.backup(tmp_path / "copy.dump")

        assert os.listdir(tmp_path) == []

    async def test_program_ends_with_a_cancelled_caller(
        self, url: str, tmp_path: Path, path: Path
    ) -> None:
        program = path / "pg_dump"
        program.write_text('#!/bin/sh\necho > "$(dirname "$0")/running"\nexec sleep 600\n')
        program.chmod(0o755)
        async with Database(url) as database:
            caller = asyncio.create_task(database.backup(tmp_path / "copy.dump"))
            await until((path / "running").exists)

            caller.cancel()
            await asyncio.wait([caller], timeout=PATIENCE)

        assert caller.cancelled()
        assert os.listdir(tmp_path) == ["bin"]

    async def test_password_is_neither_on_the_command_line_nor_in_the_error(
        self, url: str, tmp_path: Path, path: Path
    ) -> None:
        program = path / "pg_dump"
        program.write_text(
            '#!/bin/sh\necho "$@" "and" "$PGPASSWORD" > "$(dirname "$0")/given"\n'
            'echo "no, $*" >&2\nexit 1\n'
        )
        program.chmod(0o755)
        async with Database(with_parts(url, password=SECRET)) as database:
            with pytest.raises(UnavailableError, match="pg_dump: no, --format=custom") as caught:
                await database.backup(tmp_path / "copy.dump")

        assert SECRET not in "".join(traceback.format_exception(caught.value))
        command, environment = (path / "given").read_text().split(" and ")
        assert SECRET not in command
        assert environment.strip() == SECRET
        assert os.listdir(tmp_path) == ["bin"]


async def test_vacuum_and_figures_work(url: str, make_task: MakeTask) -> None:
    async with Database(url) as database:
        await TaskRepository(database).create(make_task())

        await database.vacuum()
        stats = await database.get_stats()

        assert (stats["task_count"], stats["task_stats"]) == (1, {"pending": 1})
        assert stats["db_size"] > 1_000_000


SECRET = "open-sesame"


def several_hosts(url: str, *ports: int, **query: str) -> str:
    """The URL with the addresses of more servers before its own; of one that is down, if none."""
    parts = make_url(url)
    hosts = [f"127.0.0.1:{port}" for port in (*(ports or (free_port(),)), port_of(url))]
    parts = parts._replace(host=None, port=None)
    parts = parts.update_query_dict({"host": hosts, **query})
    return parts.render_as_string(hide_password=False)


class TestLocation:
    async def test_of_several_servers_the_one_that_is_there_is_used(
        self, url: str, make_task: MakeTask
    ) -> None:
        location = several_hosts(url, target_session_attrs="read-write")
        async with StateManager(Database(location), 3600) as manager:
            await manager.add_task(make_task(task_id="t"))
            async with manager.db.transaction() as tx:
                await TaskRepository(tx).delete("t")

            assert await manager.task_repo.count_by_status() == 0

    async def test_of_several_servers_those_that_do_not_answer_are_passed_by(
        self, url: str, make_task: MakeTask, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """And then not asked again. Planted: one is asked after the other."""
        monkeypatch.setattr(postgresql, "_CONNECT_SECONDS", 3600.0)
        async with silent_server() as silence, asyncio.timeout(PATIENCE):
            location = several_hosts(url, silence.port, silence.port)
            async with Database(location) as database:
                await TaskRepository(database).create(make_task())
                async with database.transaction() as tx:
                    await TaskRepository(tx).create(make_task())

            assert silence.taken == 2

    async def test_of_several_servers_the_others_are_asked_when_the_last_one_is_silent(
        self, url: str, make_task: MakeTask
    ) -> None:
        """Planted: after a transaction has failed, others still wait for the same server."""
        async with Proxy(url) as proxy:
            location = several_hosts(url, port_of(proxy.url))
            async with Database(location, answer_timeout=0.5) as database:
                await TaskRepository(database).create(make_task())

                async def write(*, fault: bool = False) -> None:
                    async with database.transaction() as tx:
                        if fault:
                            proxy.swallow()
                        await TaskRepository(tx).create(make_task())

                assert await TaskRepository(database).count_by_status() == 1
                before = proxy.taken + 1
                with pytest.raises(UnavailableError, match="does not answer"):
                    await write(fault=True)
                # The other server is the same one, where the transaction still holds its lock.
                assert execute(url, f"{END_ALL} AND state = 'idle in transaction'") == [(True,)]
                for _ in range(2):
                    await TaskRepository(database).create(make_task())
                    await write()
                    assert await TaskRepository(database).count_by_status()

            assert proxy.taken == before + 2  # to cancel the statement, and to connect

    @pytest.mark.parametrize("hosts", [1, 2])
    async def test_server_of_which_only_the_wrong_kind_is_there_is_unavailable(
        self, url: str, hosts: int
    ) -> None:
        """A failover is under way: the only server that is left does not take writes yet."""
        location = f"{url}?target_session_attrs=standby"
        if hosts == 2:
            location = several_hosts(url, target_session_attrs="standby")

        with pytest.raises(UnavailableError, match=r"target attribute .*: check the server"):
            await Database(location).initialize()

    async def test_password_is_never_shown(self, url: str, make_task: MakeTask) -> None:
        def with_secret(url: str) -> str:
            return url.replace("postgres@", f"postgres:{SECRET}@")

        shown: list[object] = []
        async with Database(with_secret(url)) as database:
            await TaskRepository(database).create(make_task())
            shown += [repr(database), database.db_path, await database.get_stats()]
        bad = [
            with_secret(with_parts(url, port=free_port())),
            with_secret(with_parts(url, database="nobody")),
            with_secret(with_parts(url, drivername="postgresql+psycopg")),
            with_secret(url.replace(f":{port_of(url)}", ":port")),
            f"{url}?password={SECRET}&service=cluster",
        ]
        for location in bad:
            with pytest.raises(StoreError) as caught:
                await Database(location).initialize()
            shown += traceback.format_exception(caught.value)
        with pytest.raises(UnavailableError) as closed:
            await database.initialize()
        shown.append(closed.value)

        assert SECRET not in str(shown)


RUNNING = """
import time
from devtools.postgres import running_server

with running_server() as server:
    print(server.url, server._folder, server._data, flush=True)
    time.sleep(600)
"""


@pytest.mark.usefixtures("own_server")
def test_server_of_tests_ends_when_they_are_killed() -> None:
    command = [sys.executable, "-c", RUNNING]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as tests:
        assert tests.stdout is not None
        url, *folders = tests.stdout.readline().split()
        there = is_answering(url), [os.path.exists(folder) for folder in folders]
        tests.kill()

    assert there == (True, [True, True])
    wait_until(lambda: not is_answering(url), "the server ended")
    wait_until(lambda: not any(map(os.path.exists, folders)), "its folders are gone")


def is_answering(url: str) -> bool:
    with suppress(OSError), socket.create_connection(("127.0.0.1", port_of(url))):
        return True
    return False
