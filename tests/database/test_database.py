"""`Database`: sessions, transactions, event loops, files that are no good, copies, and the end."""

# ruff: noqa: ASYNC110, ASYNC240, PT012 - a test may block its loop, and needs a block to fail in

from __future__ import annotations

import asyncio
import errno
import gc
import math
import os
import re
import shutil
import signal
import sqlite3
import stat
import subprocess
import sys
import tempfile
import threading
import time
import types
import warnings
from collections.abc import AsyncIterator, Callable, Coroutine, Generator, Iterator
from contextlib import ExitStack, asynccontextmanager, closing
from contextvars import Context
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest
from conftest import (
    EACH_KIND,
    PATIENCE,
    FakeClock,
    InThread,
    Location,
    MakeNode,
    MakeTask,
    end_while_closing,
    execute,
    locked,
    new_location,
    shown,
    start,
    until,
)
from sqlalchemy import event, func, select, text, update
from sqlalchemy.ext.asyncio import AsyncSession
from sqlalchemy.sql.compiler import SQLCompiler
from support import maker
from support.for_each import for_each
from support.in_cluster import starts_interpreter
from support.scripts import Ended, run_scripts

from campaigns.faults import vfs
from devtools.postgres import wait_until
from openclaw_store import (
    BackendError,
    Database,
    DeadlineError,
    DuplicateError,
    InvalidDataError,
    NodeRepository,
    NodeStatus,
    OutcomeUnknownError,
    SchemaMismatchError,
    StateManager,
    StoreError,
    TaskRepository,
    TaskStatus,
    UnavailableError,
)
from openclaw_store.backends.error_mapping import SQLiteErrorMapping
from openclaw_store.backends.sqlite import backend as sqlite
from openclaw_store.backends.sqlite import connections as sqlite_connections
from openclaw_store.database import sessions
from openclaw_store.database.tables import ChangeRow, TaskRow
from openclaw_store.database.write_queue import FairLock

DEEP: list[Any] = []
"""Too deep to be shown."""
for _ in range(sys.getrecursionlimit()):
    DEEP = [DEEP]


async def count_tasks(session: AsyncSession) -> int:
    return await session.scalar(select(func.count()).select_from(TaskRow)) or 0


def assert_sound(location: Location) -> None:
    """No damage is found, and the revisions have no gap."""
    if isinstance(location, Path):
        assert execute(location, "PRAGMA integrity_check") == [("ok",)]
    ((revision,),) = execute(location, "SELECT coalesce(max(revision), 0) FROM changes")
    changes = execute(location, "SELECT count(*), coalesce(max(revision), 0) FROM changes")
    assert changes == [(revision, revision)]


def full_for_folders(file: int, sync: Callable[[int], None] = os.fsync) -> None:
    """Sync a file; what a folder says of it has no room on the disk."""
    if stat.S_ISDIR(os.fstat(file).st_mode):
        raise OSError(28, "No space left on device")
    sync(file)


def assert_closed(location: Location) -> None:
    """Nobody is connected, and a file is complete in itself."""
    if isinstance(location, Path):
        assert [path.name for path in location.parent.iterdir()] == ["cluster.db"]
    else:
        others = (
            "SELECT pid FROM pg_stat_activity"
            " WHERE datname = current_database() AND pid <> pg_backend_pid()"
            f" AND application_name <> '{maker.APPLICATION}'"
        )
        # A process of the server ends a moment after its connection.
        wait_until(lambda: execute(location, others) == [], "nobody is connected")


@pytest.mark.usefixtures("migrated")
class TestSession:
    async def test_session_reads_one_picture_while_others_write(
        self, database: Database, make_task: MakeTask
    ) -> None:
        async with database.session() as session:
            before = await count_tasks(session)
            await TaskRepository(database).create(make_task())
            during = await count_tasks(session)
        async with database.session() as session:
            after = await count_tasks(session)

        assert (before, during, after) == (0, 0, 1)

    async def test_session_cannot_write(self, database: Database, make_task: MakeTask) -> None:
        await TaskRepository(database).create(make_task())

        with pytest.raises(StoreError, match="only reads"):
            async with database.session() as session:
                await session.execute(update(TaskRow).values(name="changed"))
        with pytest.raises(StoreError, match="only reads"):
            async with database.session() as session:
                await TaskRepository(session).create(make_task())
        with pytest.raises(StoreError, match="only reads"):
            async with database.session() as session:
                await TaskRepository(session).delete("task-0001")

        stored = await TaskRepository(database).list_pending_tasks()
        assert [task.name for task in stored] == ["task number 1"]

    async def test_session_factory_makes_sessions_of_the_same_kind(
        self, database: Database, make_task: MakeTask
    ) -> None:
        await TaskRepository(database).create(make_task())

        async with database.session_factory() as session:
            assert await count_tasks(session) == 1
            assert len(await TaskRepository(session).list_pending_tasks()) == 1

    async def test_error_in_a_session_gives_its_connection_back(self, database: Database) -> None:
        with pytest.raises(ZeroDivisionError):
            async with database.session() as session:
                await count_tasks(session)
                raise ZeroDivisionError

        assert database.checked_out_connections == 0

    async def test_error_of_the_callers_own_sql_stays_what_it_is(self, database: Database) -> None:
        with pytest.raises(Exception, match=r'no such table: nowhere|"nowhere" does not exist'):
            async with database.session() as session:
                await session.execute(text("SELECT * FROM nowhere"))

    async def test_too_many_sessions_are_refused_and_the_library_reads_all_the_same(
        self, location: Location, make_task: MakeTask
    ) -> None:
        """There were ten more than `pool_size`, and then the library could not read either."""
        async with StateManager(Database(location, timeout=0.05, pool_size=2), 3600) as manager:
            async with manager.db.session() as one, manager.db.session() as other:
                for session in (one, other):
                    await count_tasks(session)
                with pytest.raises(UnavailableError, match="in use by sessions: close some"):
                    async with manager.db.session():
                        pass

                await manager.recover()
                await manager.submit_task(make_task(idempotency_key="k"))
                await manager.refresh_from_database()
                assert await manager.task_repo.count_by_status() == 1
            async with manager.db.session() as session:
                assert await count_tasks(session) == 1


async def test_statement_is_compiled_once_for_all_databases(
    database: Database, another_location: Location, monkeypatch: pytest.MonkeyPatch
) -> None:
    """For each database alone, SQLAlchemy would compile it anew."""
    statement = select(func.count(TaskRow.name)).where(TaskRow.name > "x")
    compiled: list[object] = []
    make = SQLCompiler.__init__

    def noted(self: SQLCompiler, *arguments: Any, **options: Any) -> None:
        compiled.append(arguments[1])
        make(self, *arguments, **options)

    async def read(database: Database) -> int:
        async with database.session() as session, database.transaction() as tx:
            assert [await session.scalar(statement), await tx.scalar(statement)] == [0, 0]
        return len([one for one in compiled if one is statement])

    monkeypatch.setattr(SQLCompiler, "__init__", noted)
    async with Database(another_location) as other:
        assert [await read(other), await read(database), await read(other)] == [1, 1, 1]


@pytest.mark.usefixtures("migrated")
class TestTransaction:
    async def test_transaction_is_committed_at_the_end(
        self, database: Database, make_task: MakeTask, make_node: MakeNode
    ) -> None:
        async with database.transaction() as session:
            await TaskRepository(session).create(make_task(task_id="t"))
            await NodeRepository(session).create(make_node(node_id="n"))
            seen_inside = await TaskRepository(session).get("t")
            seen_outside = await TaskRepository(database).get("t")

        assert seen_inside is not None
        assert seen_outside is None
        assert await TaskRepository(database).get("t") == seen_inside
        assert await NodeRepository(database).get("n") is not None

    async def test_transaction_that_raises_is_rolled_back(
        self, database: Database, make_task: MakeTask
    ) -> None:
        told: list[Any] = []
        unlisten = database.listen(told.extend)

        with pytest.raises(ZeroDivisionError):
            async with database.transaction() as session:
                await TaskRepository(session).create(make_task())
                raise ZeroDivisionError
        unlisten()

        assert await TaskRepository(database).count_by_status() == 0
        assert told == []
        await TaskRepository(database).create(task := make_task())
        assert task.version == 1  # the revisions of the other one were not used up

    async def test_refused_operation_does_not_end_the_transaction(
        self, database: Database, make_task: MakeTask
    ) -> None:
        async with database.transaction() as session:
            repository = TaskRepository(session)
            await repository.create(make_task(task_id="a"))
            with pytest.raises(DuplicateError):
                await repository.create(make_task(task_id="a"))
            await repository.create(make_task(task_id="b"))

        assert await TaskRepository(database).count_by_status() == 2

    async def test_transaction_that_takes_too_long_is_rolled_back(
        self, database: Database, make_task: MakeTask
    ) -> None:
        with pytest.raises(DeadlineError, match=r"took longer than 0\.05 s and was rolled back"):
            async with database.transaction(timeout=0.05) as session:
                await TaskRepository(session).create(make_task())
                await asyncio.Event().wait()

        assert await TaskRepository(database).count_by_status() == 0
        async with database.transaction() as session:
            await TaskRepository(session).create(make_task())
        assert await TaskRepository(database).count_by_status() == 1

    async def test_deadline_of_all_transactions_is_an_option(self, location: Location) -> None:
        async with Database(location, transaction_timeout=0.05) as database:
            with pytest.raises(DeadlineError, match=r"longer than 0\.05 s"):
                async with database.transaction():
                    await asyncio.Event().wait()

    @for_each("timeout", [0, -1, math.nan, math.inf, 1e300, 10**400, "5", True, [], Decimal(5)])
    async def test_senseless_timeout_is_refused(self, database: Database, timeout: Any) -> None:
        """Found by the campaign `hostile`: one kind did not mind NaN, another error from each."""
        with pytest.raises(InvalidDataError, match="timeout: must be"):
            async with database.transaction(timeout=timeout):
                pass

    async def test_timeout_of_the_callers_own_is_no_deadline(self, database: Database) -> None:
        with pytest.raises(TimeoutError) as caught:
            async with database.transaction():
                async with asyncio.timeout(0):
                    await asyncio.Event().wait()

        assert not isinstance(caught.value, StoreError)

    async def test_commit_by_the_caller_is_refused(
        self, database: Database, make_task: MakeTask
    ) -> None:
        async with database.transaction() as session:
            await TaskRepository(session).create(make_task())
            with pytest.raises(StoreError, match="do not commit it"):
                await session.commit()

        assert await TaskRepository(database).count_by_status() == 1

    async def test_rollback_by_the_caller_undoes_everything(
        self, database: Database, make_task: MakeTask
    ) -> None:
        told: list[Any] = []
        unlisten = database.listen(told.extend)

        async with database.transaction() as session:
            repository = TaskRepository(session)
            await repository.create(make_task())
            await session.rollback()
            with pytest.raises(StoreError, match="only reads"):
                await repository.create(make_task())
        unlisten()

        assert await TaskRepository(database).count_by_status() == 0
        assert told == []

    async def test_call_that_the_block_leaves_behind_is_part_of_it_or_refused(
        self, database: Database, location: Location, make_task: MakeTask
    ) -> None:
        """Planted: it writes its row when the transaction has written its changes."""
        written = 0
        for turns in range(8):  # of the event loop, until the block ends
            async with database.transaction() as session:
                calls = [TaskRepository(session).create(make_task()) for _ in range(3)]
                left = [asyncio.ensure_future(call) for call in calls]
                for _ in range(turns):
                    await asyncio.sleep(0)
            outcomes = await asyncio.gather(*left, return_exceptions=True)

            assert {type(outcome) for outcome in outcomes} <= {bool, StoreError}
            written += outcomes.count(True)
        assert await TaskRepository(database).count_by_status() == written
        assert execute(location, "SELECT count(*) FROM changes") == [(written,)]

    async def test_repository_of_a_transaction_that_ended_is_refused(
        self, database: Database, make_task: MakeTask
    ) -> None:
        async with database.transaction() as session:
            repository = TaskRepository(session)

        with pytest.raises(StoreError):
            await repository.create(make_task())
        assert await TaskRepository(database).count_by_status() == 0

    async def test_call_that_would_wait_for_its_own_transaction_is_refused_at_once(
        self, location: Location, make_task: MakeTask
    ) -> None:
        async with Database(location, timeout=3600) as database:
            manager = StateManager(database, auto_sync_interval=None)
            await manager.initialize()

            async def nest() -> None:
                async with database.transaction():
                    pass

            calls: list[Callable[[], Coroutine[Any, Any, Any]]] = [
                nest,
                lambda: TaskRepository(database).create(make_task()),
                lambda: TaskRepository(database).delete("task"),
                lambda: NodeRepository(database).update_heartbeat("n"),
                lambda: manager.add_task(make_task()),
                database.vacuum,
            ]
            async with asyncio.timeout(PATIENCE), database.transaction(timeout=3600) as session:
                for call in calls:
                    with pytest.raises(DeadlineError, match="wait for the transaction it is in"):
                        await call()
                    with pytest.raises(DeadlineError, match="wait for the transaction it is in"):
                        await start(call())  # a task that it waits for is inside, too
                await TaskRepository(session).create(make_task())
                assert await TaskRepository(database).count_by_status() == 0  # reading is fine

            assert await TaskRepository(database).count_by_status() == 1
            await nest()
            await manager.shutdown()

    async def test_revisions_of_a_transaction_are_consecutive(
        self, database: Database, make_task: MakeTask
    ) -> None:
        async def by_transaction(number: int) -> None:
            async with database.transaction() as session:
                for part in range(5):
                    await TaskRepository(session).create(make_task(task_id=f"tx{number} {part}"))

        async def by_writer(number: int) -> None:
            for part in range(5):
                await TaskRepository(database).create(make_task(task_id=f"w{number} {part}"))

        await asyncio.gather(
            *[by(number) for number in range(5) for by in (by_transaction, by_writer)]
        )

        async with database.session() as session:
            rows = (await session.execute(select(ChangeRow.revision, ChangeRow.item_id))).all()
        revision_of = {id: revision for revision, id in rows}
        assert sorted(revision_of.values()) == list(range(1, 51))
        for number in range(5):
            own = [revision_of[f"tx{number} {part}"] for part in range(5)]
            assert own == list(range(own[0], own[0] + 5))

    async def test_two_transactions_do_not_lose_an_increment(
        self, database: Database, make_node: MakeNode
    ) -> None:
        await NodeRepository(database).create(make_node(node_id="n"))

        async def increment() -> None:
            async with database.transaction() as session:
                node = await NodeRepository(session).get("n")
                assert node is not None
                node.running_tasks += 1
                await NodeRepository(session).update(node)

        await asyncio.gather(*[increment() for _ in range(20)])

        node = await NodeRepository(database).get("n")
        assert node is not None
        assert node.running_tasks == 20

    async def test_plain_sql_of_the_caller_is_committed_too(
        self, database: Database, make_task: MakeTask
    ) -> None:
        await TaskRepository(database).create(make_task(task_id="t"))

        async with database.transaction() as session:
            await session.execute(update(TaskRow).values(description="by hand"))

        task = await TaskRepository(database).get("t")
        assert task is not None
        assert task.description == "by hand"

    @pytest.mark.sqlite
    async def test_every_connection_that_writes_flushes_each_commit_to_the_disk(
        self, database: Database
    ) -> None:
        """A killed process cannot show it: only a power cut loses what was not flushed."""
        pragmas = ("journal_mode", "synchronous")
        async with database.transaction() as session:
            connection = await session.connection()
            of_transactions = [
                (await connection.exec_driver_sql(f"PRAGMA {name}")).scalar() for name in pragmas
            ]
        of_the_writer = await database.write(
            lambda unit, _: [[unit.cursor.execute(f"PRAGMA {name}")[0][0] for name in pragmas]],
            None,
        )

        assert of_transactions == of_the_writer == ["wal", 2]

    async def test_transaction_reaches_the_cache_of_a_manager(
        self, manager: StateManager, make_task: MakeTask
    ) -> None:
        async with manager.db.transaction() as session:
            await TaskRepository(session).create(make_task(task_id="t"))

        assert [task.task_id for task in await manager.get_pending_tasks()] == ["t"]
        assert manager.version == 1


class TestLife:
    async def test_use_before_initialize_is_refused(self, location: Location) -> None:
        database = Database(location)

        for call in uses(database):
            with pytest.raises(UnavailableError, match=r"call initialize\(\) first"):
                await call()
        await database.close()

    async def test_use_after_close_is_refused(self, location: Location) -> None:
        async with Database(location) as database:
            pass

        for call in [*uses(database), database.initialize]:
            with pytest.raises(UnavailableError, match="closed: open a new Database"):
                await call()

    async def test_initialize_and_close_may_be_called_twice(
        self, location: Location, make_task: MakeTask
    ) -> None:
        database = Database(location)
        await database.initialize()
        await TaskRepository(database).create(make_task())
        await database.initialize()

        assert await TaskRepository(database).count_by_status() == 1
        await database.close()
        await database.close()

    async def test_initialize_and_close_may_be_called_at_the_same_time(
        self, location: Location, make_task: MakeTask
    ) -> None:
        database = Database(location)

        await asyncio.gather(*[database.initialize() for _ in range(5)])
        await TaskRepository(database).create(make_task())
        await asyncio.gather(*[database.close() for _ in range(5)])

        assert execute(location, "SELECT count(*) FROM tasks") == [(1,)]

    async def test_every_close_returns_when_everything_is_closed(
        self, location: Location, make_task: MakeTask
    ) -> None:
        """Not only the first one: whoever called it may remove the file next."""
        database = Database(location)
        await database.initialize()
        await TaskRepository(database).create(make_task())

        first, second = start(database.close()), start(database.close())
        await second

        assert_closed(location)
        await first

    async def test_close_that_was_interrupted_is_finished_by_the_next_one(
        self, location: Location, make_task: MakeTask, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """It was cancelled for ever after, and left open what was open."""

        async def interrupt() -> None:
            raise asyncio.CancelledError

        database = Database(location)
        await database.initialize()
        await TaskRepository(database).create(make_task())
        await TaskRepository(database).count_by_status()
        (engines,) = database._loop_sessions.values()

        for part in (database._writer, engines):
            with monkeypatch.context() as patched, pytest.raises(asyncio.CancelledError):
                patched.setattr(part, "close", interrupt)
                await database.close()
        for _ in range(2):
            await database.close()

        assert_closed(location)

    async def test_close_that_ctrl_c_has_ended_is_finished_by_the_next_one(
        self, location: Location
    ) -> None:
        """It was interrupted for ever after."""
        database = Database(location)
        await database.initialize()
        database._state, database._closing = "closed", asyncio.get_running_loop().create_future()
        database._closing.set_exception(KeyboardInterrupt())

        await database.close()

        assert_closed(location)

    async def test_close_during_initialize_is_not_undone_by_it(self, location: Location) -> None:
        database = Database(location)
        opening = start(database.initialize())
        await asyncio.sleep(0)

        await database.close()
        await asyncio.wait([opening], timeout=PATIENCE)

        assert opening.exception() is None or isinstance(opening.exception(), UnavailableError)
        with pytest.raises(UnavailableError, match="closed"):
            await TaskRepository(database).count_by_status()
        await database.close()

    async def test_close_commits_what_has_queued(
        self, location: Location, make_task: MakeTask
    ) -> None:
        database = Database(location)
        await database.initialize()
        writes = [start(TaskRepository(database).create(make_task())) for _ in range(100)]
        await asyncio.sleep(0)

        await database.close()

        assert await asyncio.gather(*writes) == [True] * 100
        assert execute(location, "SELECT count(*) FROM tasks") == [(100,)]

    async def test_close_leaves_no_connection_and_a_file_complete_in_itself(
        self, location: Location, make_task: MakeTask
    ) -> None:
        async with Database(location) as database:
            await TaskRepository(database).create(make_task())
            await TaskRepository(database).count_by_status()

        assert_closed(location)

    async def test_nothing_is_made_but_the_folder_before_initialize(self, tmp_path: Path) -> None:
        Database(tmp_path / "deep" / "down" / "cluster.db")

        assert (tmp_path / "deep" / "down").is_dir()
        assert list((tmp_path / "deep" / "down").iterdir()) == []

    async def test_path_may_be_text_and_is_kept_as_it_was_given(self, tmp_path: Path) -> None:
        path = f"{tmp_path}/a b%20c#d?.db"

        async with Database(path) as database:
            assert database.db_path == path

        assert [entry.name for entry in tmp_path.iterdir()] == ["a b%20c#d?.db"]

    @for_each(
        "options",
        [
            {"timeout": 0},
            {"timeout": float("inf")},
            {"timeout": "30"},
            {"timeout": 10**400},
            {"transaction_timeout": -1},
            {"transaction_timeout": float("nan")},
            {"pool_size": 0},
            {"pool_size": 2.5},
            {"pool_size": -(10**5000)},  # of too many digits to be shown
            {"legacy_timezone": DEEP},
        ],
    )
    async def test_senseless_option_is_refused_by_name(
        self, location: Location, options: dict[str, Any]
    ) -> None:
        with pytest.raises(InvalidDataError) as caught:
            Database(location, **options)

        assert caught.value.field == next(iter(options))

    async def test_repr_tells_the_location_and_the_state(self, location: Location) -> None:
        database = Database(location)
        texts = [repr(database)]
        await database.initialize()
        texts.append(repr(database))
        await database.close()
        texts.append(repr(database))

        assert texts == [
            f"<Database {shown(location)!r}, {state}>" for state in ("new", "ready", "closed")
        ]


def uses(database: Database) -> list[Callable[[], Coroutine[Any, Any, Any]]]:
    """Everything that needs an open database."""

    async def session() -> None:
        async with database.session():
            pass

    async def transaction() -> None:
        async with database.transaction():
            pass

    async def session_factory() -> None:
        database.session_factory()

    return [
        session,
        transaction,
        session_factory,
        database.get_stats,
        database.vacuum,
        lambda: database.backup("copy.db"),
        lambda: TaskRepository(database).get("t"),
        lambda: TaskRepository(database).delete("t"),
    ]


@pytest.mark.usefixtures("migrated")
class TestLoops:
    async def test_another_loop_reads_and_writes_while_this_one_is_blocked(
        self, database: Database, make_task: MakeTask
    ) -> None:
        repository = TaskRepository(database)
        await asyncio.gather(*[repository.create(make_task()) for _ in range(20)])

        async def elsewhere() -> tuple[int, int]:
            await asyncio.gather(*[repository.create(make_task()) for _ in range(20)])
            async with database.transaction() as session:
                await TaskRepository(session).create(make_task())
            counts = await asyncio.gather(*[repository.count_by_status() for _ in range(20)])
            return min(counts), max(counts)

        assert InThread(elsewhere).block() == (41, 41)
        assert InThread(elsewhere).block() == (62, 62)
        assert await repository.count_by_status() == 62

    async def test_both_loops_work_at_the_same_time(
        self, database: Database, make_task: MakeTask
    ) -> None:
        repository = TaskRepository(database)

        async def work() -> None:
            async def one(number: int) -> None:
                await repository.create(task := make_task())
                assert await repository.get(task.task_id) == task
                if number % 5 == 0:
                    async with database.transaction() as session:
                        await TaskRepository(session).create(make_task())

            await asyncio.gather(*[one(number) for number in range(50)])

        other = InThread(work)
        await work()
        await asyncio.to_thread(other.block)

        assert await repository.count_by_status() == 120

    async def test_blocked_loop_whose_turn_it_is_to_write_costs_others_nothing(
        self, database: Database, make_task: MakeTask, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Those behind it got a `DeadlineError`, though it had not even begun."""
        monkeypatch.setattr(FairLock, "_ENTRY_SECONDS", 0.05)
        repository = TaskRepository(database)
        has_begun = threading.Event()

        async def write() -> None:
            async with database.transaction() as session:
                await TaskRepository(session).create(make_task())

        async def elsewhere() -> None:
            async with database.transaction():
                has_begun.set()
                while not database._write_lock._waiting:
                    await asyncio.sleep(0)
            await repository.create(make_task())
            await write()

        other = InThread(elsewhere)
        await asyncio.to_thread(has_begun.wait, PATIENCE)
        waiting = start(write())
        await asyncio.sleep(0)
        other.block()
        await waiting

        assert await repository.count_by_status() == 3

    async def test_writes_wait_for_their_own_time_behind_a_transaction_of_a_blocked_loop(
        self, location: Location, make_task: MakeTask
    ) -> None:
        """They failed as soon as the transaction had taken longer than its limit."""
        async with Database(location, timeout=0.05) as database:
            repository = TaskRepository(database)

            async def transaction() -> None:
                async with database.transaction():
                    pass

            async with database.transaction(timeout=PATIENCE):
                for write in (lambda: repository.create(make_task()), transaction):
                    with pytest.raises(DeadlineError, match="while a transaction has had the data"):
                        InThread(write).block()
                assert InThread(repository.count_by_status).block() == 0

            assert InThread(lambda: repository.create(make_task())).block() is True

        async with Database(location) as database:
            repository = TaskRepository(database)
            async with database.transaction(timeout=0.01):  # this loop cannot end it in time
                waiting = InThread(lambda: repository.create(make_task()))
                wait_until(lambda: bool(database._write_lock._waiting), "it waits")
                over = time.monotonic() + 3 * FairLock._SLICE_SECONDS
                wait_until(lambda: time.monotonic() > over, "the time of the block is over")
            assert await waiting.join() is True

    async def test_one_database_serves_one_loop_after_the_other(
        self, location: Location, make_task: MakeTask
    ) -> None:
        def runs() -> int:
            database = Database(location)
            repository = TaskRepository(database)

            async def write() -> None:
                await database.initialize()
                await repository.create(make_task())
                assert await repository.count_by_status() > 0

            for _ in range(3):
                asyncio.run(write())

            async def end() -> int:
                async with database.transaction() as session:
                    await TaskRepository(session).create(make_task())
                count = await repository.count_by_status()
                await database.close()
                return count

            return asyncio.run(end())

        assert await asyncio.to_thread(runs) == 4
        with warnings.catch_warnings():  # each loop has ended with the connections of its pool open
            warnings.simplefilter("ignore", ResourceWarning)
            gc.collect()

    @pytest.mark.sqlite
    async def test_nobody_is_cancelled_by_a_file_that_takes_long_to_close(
        self, location: Path, make_task: MakeTask, monkeypatch: pytest.MonkeyPatch,
        caplog: pytest.LogCaptureFixture,
    ) -> None:  # fmt: skip
        """The end of the time for closing came out of `close` as a cancellation."""
        monkeypatch.setattr(sessions, "_CLOSE_SECONDS", 0.01)
        database = Database(location)
        await database.initialize()
        await TaskRepository(database).count_by_status()
        close = sqlite_connections.ReadConnection.close

        def close_late(connection: sqlite_connections.ReadConnection) -> None:
            threading.Event().wait(0.1)
            close(connection)

        monkeypatch.setattr(sqlite_connections.ReadConnection, "close", close_late)

        await database.close()

        assert "connections were dropped, not closed" in caplog.text

    async def test_close_on_another_loop_than_initialize(
        self, location: Location, make_task: MakeTask
    ) -> None:
        database = Database(location)
        await database.initialize()
        await TaskRepository(database).create(make_task())
        await TaskRepository(database).count_by_status()

        await asyncio.to_thread(InThread(database.close).block)

        assert_closed(location)


class TestMemory:
    async def test_memory_is_private_and_kept_by_a_second_initialize(
        self, make_task: MakeTask
    ) -> None:
        async with Database(":memory:") as one, Database(":memory:") as other:
            await TaskRepository(one).create(make_task())
            await one.initialize()

            assert one.db_path == ":memory:"
            assert await TaskRepository(one).count_by_status() == 1
            assert await TaskRepository(other).count_by_status() == 0

    async def test_memory_is_gone_when_it_is_closed(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, make_task: MakeTask
    ) -> None:
        monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
        used, unused = Database(":memory:"), Database(":memory:")
        await used.initialize()
        await TaskRepository(used).create(make_task())

        await used.close()
        await unused.close()

        assert list(tmp_path.iterdir()) == []

    async def test_memory_serves_two_loops_and_readers_beside_writers(
        self, make_task: MakeTask
    ) -> None:
        async with Database(":memory:") as database:
            repository = TaskRepository(database)
            async with database.transaction() as session:
                await TaskRepository(session).create(make_task())
                assert InThread(repository.count_by_status).block() == 0

            assert InThread(repository.count_by_status).block() == 1

    async def test_memory_can_be_backed_up(self, tmp_path: Path, make_task: MakeTask) -> None:
        async with Database(":memory:") as database:
            await TaskRepository(database).create(make_task())
            await database.backup(tmp_path / "copy.db")

        assert execute(tmp_path / "copy.db", "SELECT count(*) FROM tasks") == [(1,)]


class TestLocation:
    @pytest.mark.parametrize("prefix", ["sqlite:///", "sqlite+aiosqlite:///"])
    async def test_url_of_sqlite_is_a_location(
        self, tmp_path: Path, prefix: str, make_task: MakeTask
    ) -> None:
        async with Database(f"{prefix}{tmp_path}/of-url.db") as database:
            await TaskRepository(database).create(make_task())
            assert database.db_path == f"{prefix}{tmp_path}/of-url.db"

        assert execute(tmp_path / "of-url.db", "SELECT count(*) FROM tasks") == [(1,)]

    @pytest.mark.parametrize(
        "url",
        [
            "postgresql+psycopg2://scott:tiger@localhost/cluster",
            "postgresql+asyncpg://scott:tiger@localhost:port/cluster",
            "mysql://scott:tiger@localhost/cluster",
            "nonsense://scott:tiger@localhost/cluster",
            "sqlite://",
            "sqlite:///:memory:",
            "://scott:tiger@",
            "",
            "cluster\0.db",
            "cluster\ud800.db",
            Path("cluster\ud800.db"),
            None,
            42,
        ],
    )
    def test_other_locations_are_refused_without_their_password(self, url: Any) -> None:
        with pytest.raises(InvalidDataError) as caught:
            Database(url)

        assert caught.value.field == "db_path"
        assert "tiger" not in str(caught.value)

    @pytest.mark.parametrize(
        ("url", "advice"),
        [
            ("postgresql+psycopg2://u:p@db1/c", "driver of another program: begin it with"),
            ("postgresql+://u:p@db1/c", "driver of another program: begin it with"),
            ("postgresql://u:p@db1:port/c", "a port that is no number"),
            ("mysql://u:p@db1/c", "mysql is not supported: give a path for SQLite, or a URL"),
            ("./{cluster}.db", 'name one, as cluster="berlin"'),
        ],
    )
    def test_refusal_of_a_location_tells_what_to_write(self, url: str, advice: str) -> None:
        with pytest.raises(InvalidDataError, match=advice):
            Database(url)

    def test_default_location_is_in_the_folder_data(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.chdir(tmp_path)

        database = Database()

        assert database.db_path == "./data/cluster.db"
        assert (tmp_path / "data").is_dir()

    async def test_location_does_not_move_with_the_working_folder(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, make_task: MakeTask
    ) -> None:
        (tmp_path / "elsewhere").mkdir()
        monkeypatch.chdir(tmp_path)
        async with Database("cluster.db") as database:
            await TaskRepository(database).create(make_task())
            monkeypatch.chdir(tmp_path / "elsewhere")
            await TaskRepository(database).create(make_task())
            assert await TaskRepository(database).count_by_status() == 2

        assert list((tmp_path / "elsewhere").iterdir()) == []


UNPRIVILEGED = """
import asyncio, os, pathlib, shutil, sys, tempfile
from openclaw_store import Database, StoreError, Task, TaskRepository, TaskType
from openclaw_store.database import migrations


async def write(path):
    async with Database(path, timeout=0.1) as database:
        await TaskRepository(database).create(Task.create(TaskType.BATCH, "t"))


async def back_up(path, target):
    async with Database(path) as database:
        await database.backup(target)


def attempt(work, *arguments):
    child = os.fork()
    if child:
        os.waitpid(child, 0)
        return
    if os.geteuid() == 0:  # to whom permissions mean nothing
        os.setgroups([])
        os.setgid(65534)
        os.setuid(65534)
    try:
        asyncio.run(work(*arguments))
    except StoreError as error:
        print(type(error).__name__, str(error).replace(str(folder), "FOLDER"), sep=": ")
    else:
        print("it works")
    sys.stdout.flush()
    os._exit(0)


locked, mode, target = sys.argv[1:]
asyncio.run(write(":memory:"))  # imports what the child may not be able to read
folder = pathlib.Path(tempfile.mkdtemp())
scripts = pathlib.Path(tempfile.mkdtemp())
shutil.copytree(migrations.SCRIPTS, scripts / "alembic")
scripts.chmod(0o755)
migrations.SCRIPTS = scripts / "alembic"
paths = {"FOLDER": folder, "FILE": folder / "file.db", "BACKUPS": folder / "backups"}
try:
    paths["BACKUPS"].mkdir()
    if target == "file.db" or locked == "BACKUPS":
        asyncio.run(write(paths["FILE"]))
        paths["FILE"].chmod(0o777)
    folder.chmod(0o777)
    for mode in (int(mode, 8), 0o777):
        paths[locked].chmod(mode)
        if locked == "BACKUPS":
            attempt(back_up, paths["FILE"], folder / target)
        else:
            attempt(write, folder / target)
finally:
    shutil.rmtree(folder)
    shutil.rmtree(scripts)
"""

NO_ENTRY = {
    ("FOLDER", "555", "new.db"): "FOLDER/new.db: Permission denied: check the path and the disk",
    ("FOLDER", "000", "new.db"): "FOLDER/new.db: Permission denied: check the path and the disk",
    ("FOLDER", "555", "deeper/new.db"): "cannot make the folder FOLDER/deeper (Permission denied)",
    ("FOLDER", "555", "file.db"): "FOLDER/file.db: it cannot be written: check the permissions",
    ("FILE", "444", "file.db"): "FOLDER/file.db: it cannot be written: check the permissions",
    ("FILE", "000", "file.db"): "FOLDER/file.db: it cannot be written: check the permissions",
    ("BACKUPS", "555", "backups/new.db"): "FOLDER/backups/new.db: Permission denied: check",
    ("BACKUPS", "000", "backups/new.db"): "FOLDER/backups/new.db: Permission denied: check",
}
"""What is locked, its mode and what is written to; the beginning of the error."""


@pytest.fixture(scope="module")
def unprivileged() -> dict[tuple[str, str, str], Ended]:
    """How scripts end that write to what they may not."""
    several = run_scripts(*[(UNPRIVILEGED, case) for case in NO_ENTRY], at_once=3)
    return dict(zip(NO_ENTRY, several, strict=True))


@pytest.mark.sqlite
class TestBadFiles:
    async def test_file_that_is_no_database_is_named_and_left_alone(
        self, location: Path, make_task: MakeTask
    ) -> None:
        location.write_text("precious notes, not a database\n" * 100)
        database = Database(location)

        with pytest.raises(UnavailableError, match=r"cluster\.db: it is not a SQLite database"):
            await database.initialize()

        assert location.read_text().startswith("precious notes")
        location.unlink()
        await database.initialize()  # the same object, once the file is out of the way
        await TaskRepository(database).create(make_task())
        await database.close()

    async def test_page_that_cannot_be_read_sends_nobody_to_an_old_backup_at_once(
        self, manager: StateManager, location: Path, make_task: MakeTask
    ) -> None:
        """Issue #7: the only advice was to restore a backup, though the next try may work."""
        await manager.add_task(make_task())

        def fail(call: vfs.SystemCall) -> int:
            return errno.EIO if call.name.startswith(("read", "pread")) else 0

        with (
            vfs.hooked(fail, location.parent),
            pytest.raises(UnavailableError, match="check the disk"),
        ):
            await manager.db.vacuum()

        await manager.db.vacuum()

    @pytest.mark.parametrize("is_replaced", [False, True])
    async def test_file_that_is_removed_or_replaced_is_neither_written_nor_made_anew(
        self, manager: StateManager, location: Path, make_task: MakeTask, is_replaced: bool
    ) -> None:
        """Issue #7: such writes were acknowledged, and lost when the store was closed."""
        database, away = manager.db, location.with_name("away")
        await manager.add_task(make_task())
        location.rename(away)
        if is_replaced:
            shutil.copyfile(away, location)
        before = sorted(os.listdir(location.parent))

        async def write_in_transaction() -> None:
            async with database.transaction() as tx:
                await TaskRepository(tx).create(make_task())

        async def read() -> None:
            async with database.session() as first, database.session() as second:
                for session in (first, second):  # one of which needs a connection of its own
                    await session.execute(select(TaskRow.task_id))

        for call in (
            lambda: manager.add_task(make_task()),
            write_in_transaction,
            read,
            database.vacuum,
            lambda: database.backup(location.with_name("copy.db")),
        ):
            with pytest.raises(UnavailableError, match="was removed or replaced while it was open"):
                await call()

        assert sorted(os.listdir(location.parent)) == before
        away.replace(location)
        await manager.add_task(make_task())
        assert execute(location, "SELECT count(*) FROM tasks") == [(2,)]

    async def test_folder_in_place_of_the_file_is_named(self, location: Path) -> None:
        location.mkdir()
        database = Database(location)

        with pytest.raises(UnavailableError, match=r"cluster\.db is a folder: give the path of a"):
            await database.initialize()

        location.rmdir()
        await database.initialize()
        await database.close()

    def test_file_in_place_of_the_folder_is_named(self, tmp_path: Path) -> None:
        (tmp_path / "data").write_text("a file")

        with pytest.raises(UnavailableError, match=r"cannot make the folder .*data .*choose ano"):
            Database(tmp_path / "data" / "cluster.db")

    async def test_sqlite_that_is_too_old_is_named(
        self, location: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        database = Database(location)
        with monkeypatch.context() as old:
            old.setattr(sqlite3, "sqlite_version_info", (3, 34, 1))
            old.setattr(sqlite3, "sqlite_version", "3.34.1")
            with pytest.raises(UnavailableError, match=r"SQLite 3\.34\.1, 3\.35\.0 or newer is n"):
                await database.initialize()

        assert not location.exists()
        await database.initialize()
        await database.close()

    @pytest.mark.parametrize("damage", ["overwritten", "truncated"])
    async def test_damaged_file_is_named(
        self, location: Path, make_task: MakeTask, damage: str
    ) -> None:
        async with Database(location) as database:
            tasks = [make_task(parameters={"text": "x" * 500}) for _ in range(500)]
            await asyncio.gather(*[TaskRepository(database).create(task) for task in tasks])
        size = location.stat().st_size
        with location.open("rb+") as file:
            if damage == "truncated":
                file.truncate(size // 2)
            else:
                file.seek(size // 4)
                file.write(b"\xff" * (size // 2))

        async def use() -> None:
            async with Database(location) as database:
                await TaskRepository(database).list_by_status(TaskStatus.PENDING)

        with pytest.raises(
            UnavailableError, match=r"cluster\.db: the file is damaged, or the disk is"
        ):
            await use()

    async def test_damage_does_not_stop_the_writer_for_good(
        self, location: Path, make_task: MakeTask
    ) -> None:
        async with Database(location) as database:
            await TaskRepository(database).create(make_task())
            copy = location.with_name("copy.db")
            await database.backup(copy)

            def fail(*_: Any) -> Any:
                raise SQLiteErrorMapping(str(location)).map_error(damaged())

            with pytest.raises(UnavailableError, match="damaged"):
                await database.write(fail, None)

            assert await TaskRepository(database).create(make_task()) is True

    @pytest.mark.parametrize("case", NO_ENTRY, ids=" ".join)
    def test_missing_permission_is_named_and_forgotten_once_it_is_given(
        self, unprivileged: dict[tuple[str, str, str], Ended], case: tuple[str, str, str]
    ) -> None:
        ended = unprivileged[case]

        assert (ended.code, ended.err) == (0, "")
        first, second = ended.out
        assert first.startswith(f"UnavailableError: {NO_ENTRY[case]}")
        assert second == "it works"

    def test_full_disk_is_named_and_forgotten_once_there_is_space(self, location: Path) -> None:
        script = """
import asyncio, resource, signal, sys
from openclaw_store import *

def allow(size):
    hard = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))

async def main(path):
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    async with Database(path) as database:
        manager = StateManager(database, auto_sync_interval=None)
        await manager.initialize()
        await manager.add_task(Task.create(TaskType.BATCH, "before", task_id="before"))
        allow(300_000)  # bytes a file may have, as if the disk ended there
        big = {"text": "x" * 400_000}
        try:
            await manager.add_task(
                Task.create(TaskType.BATCH, "too big", task_id="big", parameters=big)
            )
        except BackendError as error:
            print(type(error).__name__, error)
        print(await manager.get_task("big"), (await manager.get_task_stats())["total"])
        try:
            async with database.transaction() as session:
                await TaskRepository(session).create(
                    Task.create(TaskType.BATCH, "too big", task_id="big", parameters=big)
                )
        except BackendError as error:
            print(type(error).__name__, error)
        allow(resource.RLIM_INFINITY)
        await manager.add_task(
            Task.create(TaskType.BATCH, "after", task_id="after", parameters=big)
        )
        print(sorted((await manager.get_state()).tasks), manager.version)
        await manager.shutdown()

asyncio.run(main(sys.argv[1]))
"""

        (ended,) = run_scripts((script, [location]))

        assert (ended.code, ended.err) == (0, "")
        lines = ended.out
        for line in (lines[0], lines[2]):
            assert line.startswith(("OutcomeUnknownError", "UnavailableError"))
            assert str(location) in line
            assert "the disk" in line
        assert lines[1] == "None 1"
        assert lines[3] == "['after', 'before'] 2"

    async def test_full_database_is_named_and_forgotten_once_there_is_space(
        self, location: Path, make_task: MakeTask
    ) -> None:
        big = {"text": "x" * 400_000}
        async with Database(location) as database:
            limit = {"pages": 60}

            backend = database._backend
            assert isinstance(backend, sqlite.SQLite)

            @event.listens_for(backend.write_engine, "connect")
            def connect(connection: Any, record: object) -> None:
                connection.execute(f"PRAGMA max_page_count={limit['pages']}")

            with pytest.raises(UnavailableError, match=r"cluster\.db: the disk is full: free some"):
                await TaskRepository(database).create(make_task(parameters=big))
            limit["pages"] = 1_000_000

            assert await TaskRepository(database).create(make_task(parameters=big)) is True

    async def test_error_of_the_disk_during_commit_leaves_the_outcome_unknown(
        self, location: Path
    ) -> None:
        error = sqlite3.OperationalError("disk I/O error")
        error.sqlite_errorname = "SQLITE_IOERR_FSYNC"

        while_committing = SQLiteErrorMapping(str(location)).map_error(error, committing=True)
        before = SQLiteErrorMapping(str(location)).map_error(error)

        assert isinstance(while_committing, OutcomeUnknownError)
        assert isinstance(before, UnavailableError)
        assert str(location) in str(while_committing)
        assert "repeat the call" in str(while_committing)

    @pytest.mark.parametrize(
        ("code", "kind", "advice"),
        [
            ("SQLITE_NOTADB", UnavailableError, "give another path"),
            ("SQLITE_CORRUPT_INDEX", UnavailableError, "restore a backup"),
            ("SQLITE_CANTOPEN_ISDIR", UnavailableError, "writable folder"),
            ("SQLITE_READONLY_DIRECTORY", UnavailableError, "check the permissions"),
            ("SQLITE_PERM", UnavailableError, "check the permissions"),
            ("SQLITE_FULL", UnavailableError, "free some space"),
            ("SQLITE_IOERR_WRITE", UnavailableError, "check the disk"),
            ("SQLITE_BUSY_SNAPSHOT", UnavailableError, "end that process"),
            ("SQLITE_LOCKED_SHAREDCACHE", UnavailableError, "try again"),
            ("SQLITE_CONSTRAINT_CHECK", InvalidDataError, "refused by the database: what it says"),
            ("SQLITE_TOOBIG", InvalidDataError, "refused by the database: what it says"),
            ("SQLITE_ERROR", SchemaMismatchError, "what it says: restore a backup"),
        ],
    )
    def test_error_of_the_driver_is_told_by_its_code(
        self, location: Path, code: str, kind: type[Exception], advice: str
    ) -> None:
        error = sqlite3.OperationalError("what it says")
        error.sqlite_errorname = code

        translated = SQLiteErrorMapping(str(location)).map_error(error)

        assert type(translated) is kind
        assert advice in str(translated)
        assert kind is not UnavailableError or str(location) in str(translated)


def damaged() -> sqlite3.DatabaseError:
    error = sqlite3.DatabaseError("database disk image is malformed")
    error.sqlite_errorname = "SQLITE_CORRUPT"
    return error


HOLDER = """
import sqlite3, sys
connection = sqlite3.connect(sys.argv[1], isolation_level=None)
connection.execute(sys.argv[2])
print("locked", flush=True)
sys.stdin.readline()
connection.execute("ROLLBACK")
connection.close()
"""


@asynccontextmanager
async def locked_file(path: Path, statement: str = "BEGIN IMMEDIATE") -> AsyncIterator[None]:
    """Another process keeps the write lock meanwhile."""
    process = await asyncio.create_subprocess_exec(
        *(sys.executable, "-c", HOLDER, str(path), statement),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    assert process.stdout is not None
    assert await process.stdout.readline() == b"locked\n"
    try:
        yield
    finally:
        await process.communicate(b"let go\n")


class TestLocks:
    @pytest.mark.usefixtures("migrated")
    async def test_batch_that_has_waited_for_its_turn_has_so_much_less_time_for_the_lock(
        self, location: Location, make_task: MakeTask
    ) -> None:
        """Planted: each thing that a batch waits for has all of the time."""
        async with Database(location, timeout=2) as database, locked(location):
            loop = asyncio.get_running_loop()
            async with database._exclusive("somebody else"):
                write = asyncio.ensure_future(TaskRepository(database).create(make_task()))
                began = loop.time()
                await asyncio.sleep(1.5)

            with pytest.raises(UnavailableError, match="another process keeps it locked"):
                await write

            assert loop.time() - began < 3

    @pytest.mark.usefixtures("migrated")
    async def test_lock_of_another_process_is_named_and_forgotten_once_it_is_gone(
        self, location: Location, make_task: MakeTask
    ) -> None:
        async with Database(location, timeout=0.1) as database:
            repository = TaskRepository(database)

            async def transaction() -> bool:
                async with database.transaction() as session:
                    return await TaskRepository(session).create(make_task())

            writes: list[Callable[[], Coroutine[Any, Any, Any]]] = [
                lambda: repository.create(make_task()),
                transaction,
            ]
            if isinstance(location, Path):  # nobody's lock stops that of PostgreSQL
                writes.append(database.vacuum)
            async with locked_file(location) if isinstance(location, Path) else locked(location):
                for write in writes:
                    with pytest.raises(
                        UnavailableError,
                        match=f"{re.escape(shown(location))}: another process keeps",
                    ):
                        await write()
                assert await repository.count_by_status() == 0  # reading waits for nobody

            for write in writes:
                await write()
            assert await repository.count_by_status() == 2

    @pytest.mark.usefixtures("migrated")
    async def test_transaction_that_could_not_begin_is_not_told_that_it_was_slow(
        self, location: Location
    ) -> None:
        """Waiting for the lock may take longer than a transaction may, as it does by default."""
        async with (
            Database(location, timeout=0.3, transaction_timeout=0.1) as database,
            locked(location),
        ):
            with pytest.raises(BackendError, match="another process"):
                async with database.transaction():
                    pass

    async def test_write_waits_for_a_lock_that_is_let_go_in_time(
        self, database: Database, location: Location, make_task: MakeTask
    ) -> None:
        async with locked(location):
            writing = start(TaskRepository(database).create(make_task()))
            reading = start(TaskRepository(database).count_by_status())
            await asyncio.wait([reading], timeout=PATIENCE)
            assert not writing.done()

        assert await writing is True

    @pytest.mark.sqlite
    async def test_new_file_that_another_process_keeps_locked_is_named(
        self, location: Path
    ) -> None:
        with closing(sqlite3.connect(location)) as connection:
            connection.execute("CREATE TABLE t (x)")
        database = Database(location, timeout=0.1)

        async with locked_file(location, "BEGIN EXCLUSIVE"):
            with pytest.raises(
                UnavailableError, match=r"cluster\.db: another process keeps it lock"
            ):
                await database.initialize()

        await database.initialize()
        await database.close()


@pytest.mark.sqlite
class TestBackup:
    async def test_backup_under_load_is_consistent_and_complete(
        self, manager: StateManager, tmp_path: Path, make_task: MakeTask
    ) -> None:
        acknowledged: list[str] = []
        enough = asyncio.Event()

        async def write() -> None:
            while not enough.is_set():
                task = make_task(parameters={"text": "x" * 300})
                await manager.add_task(task)
                acknowledged.append(task.task_id)
                await manager.change_task(task.task_id, finish)

        def finish(task: Any) -> None:
            task.status = TaskStatus.COMPLETED

        writers = [start(write()) for _ in range(8)]
        await until(lambda: acknowledged)
        before: list[set[str]] = []
        for number in range(5):
            before.append(set(acknowledged))
            await manager.db.backup(tmp_path / f"{number}.db")
        enough.set()
        await asyncio.gather(*writers)

        assert len(before[-1]) > 0
        for number, ids in enumerate(before):
            copy = tmp_path / f"{number}.db"
            assert_sound(copy)
            assert ids <= {id for (id,) in execute(copy, "SELECT task_id FROM tasks")}
            ((revision,),) = execute(copy, "SELECT coalesce(max(revision), 0) FROM changes")
            assert execute(copy, "SELECT coalesce(max(version), 0) FROM tasks") == [(revision,)]
        assert not [path for path in tmp_path.iterdir() if "partial" in path.name]

    async def test_backup_can_be_used_in_place_of_the_original(
        self, database: Database, tmp_path: Path, make_task: MakeTask
    ) -> None:
        await TaskRepository(database).create(task := make_task(result={"a": [1, 2]}))

        await database.backup(tmp_path / "new folder" / "copy.db")

        async with Database(tmp_path / "new folder" / "copy.db") as copy:
            assert await TaskRepository(copy).get(task.task_id) == task

    async def test_backup_overwrites_only_when_it_is_told_to(
        self, database: Database, tmp_path: Path, make_task: MakeTask
    ) -> None:
        target = tmp_path / "copy.db"
        target.write_text("precious")
        target.with_name("copy.db-wal").write_text("of what was there")
        await TaskRepository(database).create(make_task())

        with pytest.raises(
            InvalidDataError, match=r"copy\.db exists: choose another, or pass over"
        ):
            await database.backup(target)
        assert target.read_text() == "precious"
        await database.backup(str(target), overwrite=True)

        assert execute(target, "SELECT count(*) FROM tasks") == [(1,)]
        assert not target.with_name("copy.db-wal").exists()

    @pytest.mark.parametrize("name", ["cluster.db", "other.db", "cluster.db-wal"])
    async def test_backup_onto_itself_is_refused(
        self, database: Database, location: Path, make_task: MakeTask, name: str
    ) -> None:
        await TaskRepository(database).create(make_task())
        (location.parent / "other.db").symlink_to(location)

        with pytest.raises(InvalidDataError, match="is the database itself"):
            await database.backup(location.parent / name, overwrite=True)

        assert await TaskRepository(database).count_by_status() == 1
        await database.close()
        assert execute(location, "SELECT count(*) FROM tasks") == [(1,)]

    async def test_backup_that_fails_leaves_nothing_and_takes_nothing(
        self,
        database: Database,
        tmp_path: Path,
        monkeypatch: pytest.MonkeyPatch,
        make_task: MakeTask,
    ) -> None:
        folder = tmp_path / "backups"
        folder.mkdir()
        (folder / "old.db").write_text("precious")
        await TaskRepository(database).create(make_task())

        def full(_: int) -> None:
            raise OSError(28, "No space left on device")

        with monkeypatch.context() as disk:
            disk.setattr(os, "fsync", full)
            for name in ("new.db", "old.db"):
                with pytest.raises(UnavailableError, match=rf"{name}: No space left on device"):
                    await database.backup(folder / name, overwrite=True)

        assert [(path.name, path.read_text()) for path in folder.iterdir()] == [
            ("old.db", "precious")
        ]
        await database.backup(folder / "new.db")

    async def test_backup_whose_name_may_not_last_is_taken_back(
        self, database: Database, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """It was left there, so that the next try was refused."""
        with monkeypatch.context() as disk:
            disk.setattr(os, "fsync", full_for_folders)
            with pytest.raises(UnavailableError, match="No space left on device"):
                await database.backup(tmp_path / "copy.db")

        await database.backup(tmp_path / "copy.db")

    async def test_backup_that_took_the_place_of_another_and_may_not_last_says_so(
        self, database: Database, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """The error was as if nothing had happened."""
        (tmp_path / "copy.db").write_text("older")
        with monkeypatch.context() as disk:
            disk.setattr(os, "fsync", full_for_folders)
            with pytest.raises(UnavailableError, match="was replaced, which may not outlast"):
                await database.backup(tmp_path / "copy.db", overwrite=True)

        assert (tmp_path / "copy.db").read_bytes()[:5] != b"older"

    async def test_backup_does_not_take_a_name_that_somebody_has_taken_meanwhile(
        self, database: Database, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """It took the place of the other one."""
        copy, sync = tmp_path / "copy.db", os.fsync

        def late(file: int) -> None:
            copy.write_text("by another")
            sync(file)

        monkeypatch.setattr(os, "fsync", late)
        with pytest.raises(InvalidDataError, match=r"copy\.db exists"):
            await database.backup(copy)

        assert copy.read_text() == "by another"
        assert list(tmp_path.glob(".copy.db*")) == []

    async def test_backup_to_where_nothing_can_be_is_named(
        self, database: Database, tmp_path: Path
    ) -> None:
        (tmp_path / "file").write_text("a file")
        (tmp_path / "folder").mkdir()

        with pytest.raises(UnavailableError, match="copy"):
            await database.backup(tmp_path / "file" / "copy.db")
        with pytest.raises(UnavailableError, match="folder"):
            await database.backup(tmp_path / "folder", overwrite=True)
        with pytest.raises(UnavailableError, match="File name too long: check the path"):
            await database.backup(tmp_path / ("x" * 250))

        assert sorted(path.name for path in tmp_path.iterdir() if path.is_file()) == sorted(
            ["file", *(path.name for path in tmp_path.glob("cluster.db*"))]
        )

    async def test_cancelled_backup_leaves_nothing_half_done(
        self, database: Database, tmp_path: Path, make_task: MakeTask
    ) -> None:
        await TaskRepository(database).create(make_task())
        before = set(tmp_path.iterdir())
        copying = start(database.backup(tmp_path / "copy.db"))
        await asyncio.sleep(0)

        copying.cancel()
        await asyncio.wait([copying], timeout=PATIENCE)

        assert copying.cancelled()
        if (copy := tmp_path / "copy.db").exists():  # it was complete
            assert execute(copy, "SELECT count(*) FROM tasks") == [(1,)]
        assert set(tmp_path.iterdir()) - {copy} <= before


@pytest.mark.usefixtures("migrated")
class TestVacuumAndStats:
    @pytest.mark.sqlite
    async def test_vacuum_waits_for_a_reader_that_is_just_ending(
        self,
        database: Database,
        location: Path,
        make_task: MakeTask,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        """The WAL once kept its size if a reader had not ended yet."""
        monkeypatch.setattr(sqlite, "_ENDING_READER_SECONDS", PATIENCE)
        await TaskRepository(database).create(make_task(parameters={"text": "x" * 20_000}))
        reader = sqlite3.connect(location, isolation_level=None, check_same_thread=False)
        reader.execute("BEGIN")
        reader.execute("SELECT count(*) FROM tasks").fetchall()
        end = threading.Timer(0.03, reader.rollback)
        end.start()

        await database.vacuum()

        end.join()
        reader.close()
        assert location.with_name(f"{location.name}-wal").stat().st_size == 0

    @pytest.mark.sqlite  # PostgreSQL keeps it for rows to come
    async def test_vacuum_gives_the_space_of_removed_rows_back(
        self, database: Database, make_task: MakeTask
    ) -> None:
        repository = TaskRepository(database)
        tasks = [make_task(parameters={"text": "x" * 2000}) for _ in range(1000)]
        await asyncio.gather(*[repository.create(task) for task in tasks])
        await asyncio.gather(*[repository.delete(task.task_id) for task in tasks[1:]])
        before = (await database.get_stats())["db_size"]

        await database.vacuum()

        after = (await database.get_stats())["db_size"]
        assert before > 2_000_000
        assert after < before / 4
        assert await repository.get(tasks[0].task_id) == tasks[0]

    async def test_writers_wait_for_a_vacuum_on_sqlite_alone(
        self, database: Database, make_task: MakeTask, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        running, ended = threading.Event(), threading.Event()

        def vacuum(stop: Any) -> None:
            running.set()
            assert ended.wait(PATIENCE)

        monkeypatch.setattr(database._backend, "vacuum", vacuum)
        vacuuming = asyncio.create_task(database.vacuum())
        assert await asyncio.to_thread(running.wait, PATIENCE)
        writing = asyncio.create_task(TaskRepository(database).create(make_task()))

        if database.dialect == "postgresql":
            await asyncio.wait_for(writing, PATIENCE)
        assert not vacuuming.done()
        await asyncio.wait([writing], timeout=0.05)
        assert writing.done() is (database.dialect == "postgresql")

        ended.set()
        await asyncio.gather(vacuuming, writing)

    async def test_vacuum_goes_well_with_writers_and_readers(
        self, database: Database, make_task: MakeTask
    ) -> None:
        repository = TaskRepository(database)

        async def work() -> None:
            for _ in range(10):
                await repository.create(make_task())
                await repository.count_by_status()

        await asyncio.gather(*[work() for _ in range(10)], *[database.vacuum() for _ in range(3)])

        assert await repository.count_by_status() == 100

    async def test_stats_count_what_there_is(
        self, database: Database, location: Location, make_task: MakeTask, make_node: MakeNode
    ) -> None:
        tasks, nodes = TaskRepository(database), NodeRepository(database)
        for status in (TaskStatus.PENDING, TaskStatus.PENDING, TaskStatus.FAILED):
            await tasks.create(make_task(status=status))
        await nodes.create(make_node(status=NodeStatus.ERROR))

        stats = await database.get_stats()

        if isinstance(location, Path):
            wal = location.with_name("cluster.db-wal")
            assert wal.stat().st_size > 0
            assert stats["db_size"] == location.stat().st_size + wal.stat().st_size
        assert {name: stats[name] for name in stats if name != "db_size"} == {
            **{name: stats[name] for name in stats if name not in STATS},
            "db_path": shown(location),
            "task_count": 3,
            "node_count": 1,
            "task_stats": {"pending": 2, "failed": 1},
            "node_stats": {"error": 1},
        }

    async def test_stats_of_an_empty_database_are_zeros(
        self, database: Database, location: Location
    ) -> None:
        stats = await database.get_stats()

        assert stats["db_size"] > 0
        assert [stats[name] for name in STATS[1:]] == [shown(location), 0, 0, {}, {}]

    async def test_stats_tell_how_the_writing_goes(
        self, location: Location, clock: FakeClock, make_task: MakeTask
    ) -> None:
        async with Database(location, clock=clock, timeout=0.05) as database:
            before = (await database.get_stats())["writer"]
            await asyncio.gather(*[TaskRepository(database).create(make_task()) for _ in range(3)])
            async with locked(location):
                clock.advance(seconds=5)
                with pytest.raises(UnavailableError) as caught:
                    await TaskRepository(database).create(make_task())
            after = (await database.get_stats())["writer"]

        counts = ("queued_operations", "batches", "operations", "failed_batches", "connections")
        assert before == {**dict.fromkeys(after), **dict.fromkeys(counts, 0)}
        assert (after["batches"], after["operations"], after["failed_batches"]) == (1, 3, 1)
        assert (after["mean_batch"], after["largest_batch"]) == (3, 3)
        assert after["commit_seconds_p50"] == after["commit_seconds_max"] > 0
        assert after["last_failure"] == f"UnavailableError: {caught.value}"
        assert after["last_failure_at"] == clock()


STATS = ("db_size", "db_path", "task_count", "node_count", "task_stats", "node_stats")


ENDING = """
import asyncio, os, sys, warnings
from openclaw_store import *

warnings.simplefilter("ignore", ResourceWarning)  # what was not closed


async def main(location, folder):
    os.chdir(folder)
    database = Database(location)
    manager = StateManager(database, auto_sync_interval=0.01)
    await manager.initialize()
    await manager.add_task(Task.create(TaskType.BATCH, "t", task_id="acknowledged"))
    await TaskRepository(database).count_by_status()
    print("acknowledged", flush=True)
    background = set()
    ENDING

asyncio.run(main(*sys.argv[1:]))
"""

ENDINGS = {
    "returns": "pass",
    "raises": "raise RuntimeError('crash')",
    "exits": "sys.exit(3)",
    "is interrupted": "raise KeyboardInterrupt",
    "returns while closing": """
    background.add(asyncio.ensure_future(manager.shutdown()))
    await asyncio.sleep(0)""",
    "returns in a backup": """
    background.add(asyncio.ensure_future(database.backup('copy.db')))
    await asyncio.sleep(0)""",
    "returns inside a transaction": """
    transaction = database.transaction()
    session = await transaction.__aenter__()
    await TaskRepository(session).create(Task.create(TaskType.BATCH, 'inside'))""",
    "raises inside a transaction": """
    async with database.transaction() as session:
        await TaskRepository(session).create(Task.create(TaskType.BATCH, 'inside'))
        raise RuntimeError('crash')""",
    "returns with writes on their way": """
    for _ in range(100):
        task = Task.create(TaskType.BATCH, 'on its way')
        background.add(asyncio.ensure_future(manager.add_task(task)))
    await asyncio.sleep(0)""",
    "returns with reads on their way": """
    for _ in range(100):
        background.add(asyncio.ensure_future(database.get_stats()))
    await asyncio.sleep(0)""",
}


@pytest.fixture(scope="module", params=EACH_KIND)
def endings(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[dict[str, tuple[Location, Ended]]]:
    """How interpreters end that closed nothing, and the databases that they used."""
    with ExitStack() as places:
        scripts, locations = [], []
        for code in ENDINGS.values():
            folder = tmp_path_factory.mktemp("ending")
            location = places.enter_context(
                new_location(request, request.param, folder, migrated=True)
            )
            scripts.append((ENDING.replace("ENDING", code), [location, folder]))
            locations.append(location)
        ended = run_scripts(*scripts, at_once=3)
        yield dict(zip(ENDINGS, zip(locations, ended, strict=True), strict=True))


class TestEnds:
    """The end of an interpreter, of a process, of a caller."""

    FORK = """
import asyncio, os, signal, sys, warnings
from openclaw_store import *

async def attempts(database, manager):
    tasks = TaskRepository(database)
    async def session():
        async with database.session(): pass
    async def transaction():
        async with database.transaction(): pass
    for attempt in (
        session, transaction, database.initialize, database.get_stats, database.vacuum,
        lambda: database.backup("copy.db"), lambda: tasks.get("t"), lambda: tasks.delete("t"),
        lambda: manager.add_task(Task.create(TaskType.BATCH, "t")),
        lambda: manager.get_task("t"), manager.get_state,
        lambda: StateManager(database).initialize(),
    ):
        try:
            await asyncio.wait_for(attempt(), 1)
        except UnavailableError as error:
            print(error)
        else:
            print("no error")
    await database.close()

async def main(path):
    async with Database(path) as database:
        manager = StateManager(database)
        await manager.initialize()
        await manager.add_task(Task.create(TaskType.BATCH, "t", task_id="t"))
        await asyncio.gather(*[TaskRepository(database).get("t") for _ in range(3)])
        sys.stdout.flush()
        warnings.simplefilter("ignore", DeprecationWarning)  # from Python 3.12 of the fork itself
        child = os.fork()
        if child == 0:
            signal.alarm(30)
            try:
                asyncio.run(attempts(database, manager))
            finally:
                sys.stdout.flush()
                os._exit(0)
        print("child", os.waitpid(child, 0)[1])
        await manager.add_task(Task.create(TaskType.BATCH, "u", task_id="u"))
        print(await TaskRepository(database).count_by_status())
        await manager.shutdown()

asyncio.run(main(sys.argv[1]))
"""

    @pytest.mark.usefixtures("migrated")
    def test_forked_child_gets_an_error_and_the_parent_goes_on(self, location: Location) -> None:
        (ended,) = run_scripts((self.FORK, [location]))

        lines = ended.out
        assert (ended.code, ended.err) == (0, "")
        assert len(lines) == 14
        for line in lines[:8] + lines[11:12]:
            assert "was opened before fork: " in line
        for line in lines[8:11]:
            assert "was made before fork: make a new one in the child" in line
        assert lines[12:] == ["child 0", "2"]

    CHILD_OF_ITS_OWN = """
import asyncio, os, signal, sys, warnings
from openclaw_store import *

async def child(path, wait, tell):
    try:
        async with StateManager(Database(path)) as manager:
            await manager.add_task(Task.create(TaskType.BATCH, "t", task_id="before"))
            tell()
            await asyncio.to_thread(wait)
            await manager.add_task(Task.create(TaskType.BATCH, "t", task_id="after"))
            print("acknowledged")
    except UnavailableError as error:
        print(error)
        tell()

async def main(path):
    manager = StateManager(Database(path))
    await manager.initialize()
    await manager.add_task(Task.create(TaskType.BATCH, "t", task_id="parent"))
    pipes = os.pipe(), os.pipe()
    def wait(pipe): return lambda: os.read(pipes[pipe][0], 1)
    def tell(pipe): return lambda: os.write(pipes[pipe][1], b".")
    warnings.simplefilter("ignore", DeprecationWarning)  # from Python 3.12 of the fork itself
    pid = os.fork()
    if pid == 0:
        signal.alarm(30)
        try:
            asyncio.run(child(path, wait(0), tell(1)))
            asyncio.run(asyncio.wait_for(manager.shutdown(), 5))  # it is the parent's
        finally:
            sys.stdout.flush()
            os._exit(0)
    await asyncio.to_thread(wait(1))
    await manager.shutdown()  # the last one that has the file open, for all it knows
    tell(0)()
    os.waitpid(pid, 0)

asyncio.run(main(sys.argv[1]))
"""

    @pytest.mark.usefixtures("migrated")
    def test_forked_child_with_a_database_of_its_own_loses_nothing(
        self, location: Location
    ) -> None:
        """A file was open in the parent: SQLite took its locks for the child's, and lost writes."""
        (ended,) = run_scripts((self.CHILD_OF_ITS_OWN, [location]))

        stored = {id for (id,) in execute(location, "SELECT task_id FROM tasks")}
        assert (ended.code, ended.err) == (0, "")
        if isinstance(location, Path):
            assert "was open when this process was forked" in ended.out[0]
            assert stored == {"parent"}
        else:
            assert ended.out == ["acknowledged"]
            assert stored == {"parent", "before", "after"}
        assert_sound(location)

    CHILD_THAT_CLOSES = """
import asyncio, gc, os, signal, sqlite3, sys, warnings, weakref
import aiosqlite
from openclaw_store import *
from openclaw_store.backends.sqlite.connections import ReadConnection

async def close_all(used_by_nobody):
    objects = gc.get_objects()
    drivers = [one for one in objects if type(one).__mro__[1] is aiosqlite.Connection]
    connections = [one for one in objects if sqlite3.Connection in type(one).__mro__]
    del objects
    for connection in connections:
        connection.rollback()
        connection.close()
    for driver in drivers:
        await driver.rollback()
        await asyncio.wait_for(driver.close(), 5)
        driver.stop()
    print(len(drivers), len(connections))
    del connection, connections
    kept = weakref.ref(used_by_nobody.pop())
    gc.collect()
    print("kept" if kept() else "closed")

async def write(tasks, name):
    # More than SQLite keeps in memory before it writes to the WAL.
    for number in range(9):
        task = Task.create(TaskType.BATCH, "t", task_id=f"{name}-{number}")
        task.result = "x" * 1_000_000
        await tasks.create(task)

async def main(path):
    async with Database(path) as database:
        tasks = TaskRepository(database)
        await tasks.create(Task.create(TaskType.BATCH, "t"))
        await tasks.count_by_status()
        async with database.transaction() as session:
            await write(TaskRepository(session), "before")
            used_by_nobody = [ReadConnection(path)]
            sys.stdout.flush()
            warnings.simplefilter("ignore", DeprecationWarning)  # from Python 3.12 of fork itself
            child = os.fork()
            if child == 0:
                signal.alarm(30)
                try:
                    asyncio.run(close_all(used_by_nobody))
                finally:
                    sys.stdout.flush()
                    os._exit(0)
            print("child", os.waitpid(child, 0)[1])
            await write(TaskRepository(session), "after")
        print(await tasks.count_by_status())

asyncio.run(main(sys.argv[1]))
"""

    @pytest.mark.usefixtures("migrated")
    @pytest.mark.sqlite
    def test_forked_child_cannot_close_what_its_parent_has_open(self, location: Location) -> None:
        """It rolled back the parent's transaction, and waited for ever for the parent's threads."""
        (ended,) = run_scripts((self.CHILD_THAT_CLOSES, [location]))

        assert (ended.code, ended.err) == (0, "")
        assert ended.out == ["2 4", "kept", "child 0", "19"]
        assert_sound(location)

    CHILD_THAT_ENDS = """
import os, sys, warnings
from openclaw_store.backends.sqlite.connections import WriteConnection

connection = WriteConnection(sys.argv[1], isolation_level=None)
connection.execute("PRAGMA journal_mode=WAL")
connection.execute("CREATE TABLE texts (text)")
connection.execute("BEGIN IMMEDIATE")
insert = "INSERT INTO texts VALUES (hex(zeroblob(500000)))"
for _ in range(9):
    connection.execute(insert)
warnings.simplefilter("ignore", DeprecationWarning)  # as above
child = os.fork()
if child == 0:
    sys.exit(0)
print("child", os.waitpid(child, 0)[1])
for _ in range(9):
    connection.execute(insert)
connection.execute("COMMIT")
connection.close()
"""

    @pytest.mark.sqlite
    def test_forked_child_that_ends_harms_nothing_that_its_parent_has_open(
        self, location: Location
    ) -> None:
        """The end of its interpreter rolled the parent's transaction back."""
        (ended,) = run_scripts((self.CHILD_THAT_ENDS, [location]))

        assert (ended.code, ended.err) == (0, "")
        assert ended.out == ["child 0"]
        assert execute(location, "PRAGMA integrity_check") == [("ok",)]
        assert execute(location, "SELECT count(*) FROM texts") == [(18,)]

    @pytest.mark.parametrize("ending", ENDINGS)
    def test_interpreter_ends_though_nothing_was_closed(
        self, endings: dict[str, tuple[Location, Ended]], ending: str
    ) -> None:
        location, ended = endings[ending]

        assert ended.out == ["acknowledged"]
        assert ended.code == (0 if ending.startswith("returns") else ended.code)
        assert ended.code != -signal.SIGALRM
        assert "openclaw-store-writer" not in ended.err  # no traceback of its thread
        stored = "SELECT count(*) FROM tasks WHERE task_id = 'acknowledged'"
        assert execute(location, stored) == [(1,)]
        assert_sound(location)

    @pytest.mark.usefixtures("migrated")
    @starts_interpreter
    def test_killed_process_loses_nothing_that_was_acknowledged(self, location: Location) -> None:
        script = """
import asyncio, sys
from openclaw_store import *

async def main(path):
    manager = StateManager(Database(path))
    await manager.initialize()

    async def write(name):
        for number in range(1_000_000):
            task = Task.create(TaskType.BATCH, "t", task_id=f"{name}-{number}")
            await manager.add_task(task)
            await manager.change_task(task.task_id, lambda task: setattr(task, "name", "changed"))
            print(task.task_id, task.version, flush=True)

    await asyncio.gather(*[write(name) for name in "abcdefgh"])

asyncio.run(main(sys.argv[1]))
"""
        with subprocess.Popen(
            [sys.executable, "-c", script, str(location)], stdout=subprocess.PIPE, text=True
        ) as process:
            assert process.stdout is not None
            lines = [process.stdout.readline() for _ in range(200)]
            process.send_signal(signal.SIGKILL)
            rest = process.stdout.read().splitlines(keepends=True)
        acknowledged = {line.split()[0] for line in lines + rest if line.endswith("\n")}

        stored = execute(location, "SELECT task_id FROM tasks WHERE name = 'changed'")

        assert len(acknowledged) >= 200
        assert acknowledged <= {id for (id,) in stored}
        assert_sound(location)

    async def test_database_that_was_killed_opens_again(self, location: Location) -> None:
        script = """
import asyncio, os, signal, sys
from openclaw_store import *

async def main(path):
    manager = StateManager(Database(path))
    await manager.initialize()
    await manager.add_task(Task.create(TaskType.BATCH, "t", task_id="t"))
    os.kill(os.getpid(), signal.SIGKILL)

asyncio.run(main(sys.argv[1]))
"""
        (ended,) = await asyncio.to_thread(run_scripts, (script, [location]))
        assert ended.code == -signal.SIGKILL

        async with StateManager(Database(location)) as manager:
            assert await manager.get_task("t") is not None
            assert manager.version == 1


async def cancelled_at(
    work: Coroutine[Any, Any, Any], suspension: int, turns: int, times: int = 1
) -> Any:
    """Run `work`, and cancel the task it is in at its n-th suspension, some turns later.

    It is cancelled so many times, a turn apart.
    """
    return await step_by_step(work, suspension, turns, times)


@types.coroutine
def step_by_step(
    work: Coroutine[Any, Any, Any], suspension: int, turns: int, times: int
) -> Generator[Any, Any, Any]:
    loop, task = asyncio.get_running_loop(), asyncio.current_task()
    assert task is not None

    def cancel(turns: int, times: int) -> None:
        if turns == 0:
            task.cancel()
            times -= 1
        if times and not task.done():
            loop.call_soon(cancel, max(0, turns - 1), times)

    value: Any = None
    error: BaseException | None = None
    while True:
        try:
            waiting_for = work.send(value) if error is None else work.throw(error)
        except StopIteration as end:
            return end.value
        suspension -= 1
        if suspension == 0:
            cancel(turns, times)
        value = error = None
        try:
            value = yield waiting_for
        except BaseException as thrown:
            error = thrown


class TestCancelledCallers:
    """A caller is cancelled at each of its steps: it costs neither a connection nor the gate."""

    async def cancel_everywhere(
        self, make: Callable[[int], Coroutine[Any, Any, Any]], turns: int, times: int = 1
    ) -> int:
        """Run `make(n)` again and again, cancelled a step later each time, till it gets through."""
        kept = []  # with their tracebacks, as callers may
        for suspension in range(1, 500):
            task = start(cancelled_at(make(suspension), suspension, turns, times))
            kept.append(task)
            await asyncio.wait([task], timeout=PATIENCE)
            assert task.done()
            if not task.cancelled():
                task.result()
                if suspension > 1 or turns == 0:
                    return suspension - 1
        raise AssertionError("it never got through")

    async def flush_entry(self, database: Database, make_task: MakeTask) -> None:
        """Everything that goes on in the background has ended, and all doors are open."""
        async with asyncio.timeout(PATIENCE):
            while database.checked_out_connections:
                await asyncio.sleep(0.001)
            assert await TaskRepository(database).create(make_task()) is True
            async with database.transaction() as session:
                await TaskRepository(session).create(make_task())
            assert await TaskRepository(database).count_by_status() > 0

    @pytest.mark.parametrize("turns", [0, 1, 3])
    async def test_add_task(self, manager: StateManager, make_task: MakeTask, turns: int) -> None:
        cancelled = await self.cancel_everywhere(
            lambda n: manager.add_task(make_task(task_id=f"cancelled-{n}")), turns
        )

        await self.flush_entry(manager.db, make_task)
        assert cancelled >= 1
        stored = {task.task_id for task in await manager.task_repo.list_pending_tasks(limit=None)}
        assert set((await manager.get_state()).tasks) == stored
        assert (await manager.get_task_stats())["total"] == len(stored)

    @pytest.mark.parametrize("turns", [0, 1, 3])
    async def test_get_task(self, manager: StateManager, make_task: MakeTask, turns: int) -> None:
        cancelled = await self.cancel_everywhere(lambda n: manager.get_task("unknown"), turns)

        await self.flush_entry(manager.db, make_task)
        assert cancelled >= 1

    @pytest.mark.parametrize("turns", [0, 1, 3])
    async def test_transaction(
        self, manager: StateManager, make_task: MakeTask, turns: int
    ) -> None:
        async def work(number: int) -> None:
            async with manager.db.transaction() as session:
                await TaskRepository(session).create(make_task(task_id=f"cancelled-{number}"))
                await TaskRepository(session).count_by_status()
                await count_tasks(session)  # SQL of the caller's own

        cancelled = await self.cancel_everywhere(work, turns)

        await self.flush_entry(manager.db, make_task)
        assert cancelled >= 5
        stored = {task.task_id for task in await manager.task_repo.list_pending_tasks(limit=None)}
        assert set((await manager.get_state()).tasks) == stored

    @pytest.mark.parametrize("kind", ["transaction", "session"])
    async def test_caller_cancelled_again_while_it_is_cancelled_leaves_nothing_behind(
        self,
        database: Database,
        make_task: MakeTask,
        caplog: pytest.LogCaptureFixture,
        kind: str,
    ) -> None:
        """What closed its connection waited for ever for a thread that had ended, or complained."""

        async def work(number: int) -> None:
            async with getattr(database, kind)() as session:
                await count_tasks(session)
                await TaskRepository(session).get("t")

        cancelled = await self.cancel_everywhere(work, turns=0, times=3)

        await self.flush_entry(database, make_task)
        assert cancelled >= 3
        assert [record.getMessage() for record in caplog.records if record.levelno > 20] == []

    @pytest.mark.parametrize("is_limit", [False, True], ids=["cancelled", "time over"])
    async def test_caller_who_closes_a_file_is_cancelled_when_it_is_closed(
        self, tmp_path: Path, is_limit: bool
    ) -> None:
        """Else SQLAlchemy reports an error of the connection, as at the end of `asyncio.run`."""
        connection = await sqlite_connections.connect_async(str(tmp_path / "cluster.db"))
        go_on = threading.Event()
        connection._tx.put_nowait((None, go_on.wait))

        await end_while_closing(connection, is_limit=is_limit, go_on=go_on)

    @pytest.mark.parametrize("seconds", [PATIENCE, 0.01], ids=["soon", "late"])
    async def test_caller_who_opens_a_file_is_cancelled_when_it_is_closed_again(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, seconds: float
    ) -> None:
        """Else the thread that opens it complains that nobody is there, as after `asyncio.run`."""
        monkeypatch.setattr(sqlite_connections, "_ABANDONED_SECONDS", seconds)
        is_opening, go_on = threading.Event(), threading.Event()

        def open_late(*arguments: Any, **options: Any) -> sqlite3.Connection:
            is_opening.set()
            go_on.wait()
            return connect(*arguments, **options)

        connect: Callable[..., sqlite3.Connection] = sqlite3.connect
        monkeypatch.setattr(sqlite3, "connect", open_late)
        options = sqlite_connections.options_of(sqlite_connections.WriteConnection)
        connection = sqlite_connections.connect_async(str(tmp_path / "cluster.db"), **options)

        async def open_it() -> None:
            await connection

        opening = start(open_it())
        try:
            await until(is_opening.is_set)
            opening.cancel()
            await asyncio.sleep(0)
            assert not opening.done()
            if seconds == PATIENCE:
                go_on.set()
            await asyncio.wait([opening], timeout=PATIENCE / 2)
            assert opening.cancelled()
        finally:
            go_on.set()
        await until(lambda: not connection._thread.is_alive())

    @pytest.mark.parametrize("kind", ["transaction", "failed transaction", "session", "read"])
    async def test_all_tasks_are_cancelled_at_once_and_none_is_left(
        self, database: Database, caplog: pytest.LogCaptureFixture, kind: str
    ) -> None:
        """As `asyncio.run` does it when it ends: what closed a connection was left behind then."""

        async def work() -> None:
            if kind == "read":
                await database.read(count_tasks)
            elif kind == "session":
                async with database.session() as session:
                    await count_tasks(session)
            else:
                async with database.transaction() as session:
                    await count_tasks(session)
                    if kind != "transaction":
                        raise StoreError

        for steps in [*range(40), *range(40, 600, 8)]:
            working = start(work())
            for _ in range(steps):
                await asyncio.sleep(0)
            tasks = asyncio.all_tasks() - {asyncio.current_task()}
            for task in tasks:
                task.cancel()
            await asyncio.gather(working, *tasks, return_exceptions=True)
            assert asyncio.all_tasks() == {asyncio.current_task()}
            assert database.checked_out_connections == 0
        gc.collect()
        assert [record.getMessage() for record in caplog.records if record.levelno > 20] == []

    async def test_read_goes_on_without_its_caller_and_keeps_its_connection(
        self, database: Database
    ) -> None:
        """Planted: the caller's cancellation reaches the driver, and the connection is lost."""
        closed: list[object] = []
        engine = database.session_factory.kw["bind"].sync_engine
        event.listen(engine, "close", lambda connection, _: closed.append(connection))
        reading, go_on, done = asyncio.Event(), asyncio.Event(), asyncio.Event()

        async def read(session: AsyncSession) -> None:
            await count_tasks(session)
            reading.set()
            await go_on.wait()
            await count_tasks(session)
            done.set()

        caller = start(database.read(read))
        await reading.wait()
        caller.cancel()
        await asyncio.wait([caller], timeout=PATIENCE)
        assert caller.cancelled()
        go_on.set()
        await asyncio.wait_for(done.wait(), PATIENCE)
        await TaskRepository(database).count_by_status()

        assert closed == []

    @pytest.mark.parametrize("turns", [0, 1, 3])
    async def test_session(self, database: Database, make_task: MakeTask, turns: int) -> None:
        async def work(number: int) -> None:
            async with database.session() as session:
                await TaskRepository(session).list_pending_tasks(limit=None)

        cancelled = await self.cancel_everywhere(work, turns)

        await self.flush_entry(database, make_task)
        assert cancelled >= 2

    @pytest.mark.parametrize("is_let_in", [False, True], ids=["waiting", "just let in"])
    async def test_transaction_that_waits_at_the_gate(
        self, database: Database, make_task: MakeTask, is_let_in: bool
    ) -> None:
        async def work() -> None:
            async with database.transaction():
                pass

        async with database.transaction():
            # In the context of this transaction they would be refused, and not wait.
            waiting = [asyncio.create_task(work(), context=Context()) for _ in range(3)]
            await asyncio.sleep(0)
            assert not any(task.done() for task in waiting)
            if not is_let_in:
                for task in waiting:
                    task.cancel()
                await asyncio.wait(waiting, timeout=PATIENCE)
        for task in waiting:
            task.cancel()
        await asyncio.wait(waiting, timeout=PATIENCE)

        assert all(task.cancelled() for task in waiting)
        await self.flush_entry(database, make_task)

    async def test_initialize(self, location: Location, make_task: MakeTask) -> None:
        database = Database(location)
        opening = start(database.initialize())
        await asyncio.sleep(0)

        opening.cancel()
        await asyncio.wait([opening], timeout=PATIENCE)
        await database.initialize()

        await self.flush_entry(database, make_task)
        await database.close()

    @pytest.mark.usefixtures("migrated")
    @pytest.mark.parametrize("turns", [0, 1, 3])
    async def test_close(self, location: Location, make_task: MakeTask, turns: int) -> None:
        for suspension in range(1, 6):
            database = Database(location)
            await database.initialize()
            await TaskRepository(database).create(make_task())
            await TaskRepository(database).count_by_status()

            closing = start(cancelled_at(database.close(), suspension, turns))
            await asyncio.wait([closing], timeout=PATIENCE)
            assert closing.done()
            await database.close()

            assert_closed(location)
