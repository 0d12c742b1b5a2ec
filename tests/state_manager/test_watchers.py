"""What programs wait for: changes that others make, in order, and the end of tasks."""

from __future__ import annotations

import asyncio
import logging
import os
from collections.abc import AsyncIterator, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from datetime import timedelta
from importlib import import_module
from pathlib import Path
from threading import Event
from time import sleep
from typing import Any

import pytest
from conftest import (
    PATIENCE,
    FakeClock,
    Location,
    MakeNode,
    MakeTask,
    OpenManager,
    engine_of,
    execute,
    feed,
    until,
)
from support.in_cluster import CLUSTER

from openclaw_store import (
    Change,
    ChangeKind,
    CompactedError,
    Database,
    DeadlineError,
    InvalidDataError,
    StateManager,
    Task,
    TaskNotFoundError,
    TaskRepository,
    TaskStatus,
    UnavailableError,
    UnsavedConflictError,
)
from openclaw_store.backends import PUBLIC
from openclaw_store.backends import notifications as wakeups
from openclaw_store.backends.notifications import (
    BUSY_SECONDS,
    LONGEST_SECONDS,
    SHORTEST_SECONDS,
    UNREADABLE_SECONDS,
)
from openclaw_store.backends.postgresql import listening as server_listening
from openclaw_store.backends.postgresql.backend import PostgreSQL
from openclaw_store.backends.postgresql.protocol import ListenerNames, listener_names
from openclaw_store.backends.postgresql.write_session import ConnectionRegistry
from openclaw_store.backends.sqlite.file_watch import FileWatch
from openclaw_store.database.write_transaction import WriteTransaction
from openclaw_store.repositories.retention import Compact, compact
from openclaw_store.state_manager.change_feed import REASON_CHARACTERS
from openclaw_store.state_manager.replica import Replica


async def first(count: int, changes: AsyncIterator[Change]) -> list[Change]:
    """So many changes of a watcher."""
    found: list[Change] = []
    async with asyncio.timeout(PATIENCE):
        async for change in changes:
            found.append(change)
            if len(found) == count:
                return found
    return found


def company_of(database: Database) -> ConnectionRegistry:
    """What the connections of a process to PostgreSQL know of each other."""
    assert isinstance(database._backend, PostgreSQL)
    return database._backend.registry


def names_in(location: Location) -> ListenerNames:
    """The channel and the locks of the listeners."""
    [[number]] = execute(location, "SELECT cluster_id FROM counters")
    return listener_names(CLUSTER or PUBLIC, number)


def locks_of_others(location: Location) -> list[str]:
    """Modes in which the lock of all listeners but the first is had, or waited for."""
    rows = execute(
        location,
        "SELECT mode FROM pg_locks WHERE locktype = 'advisory' AND database ="
        " (SELECT oid FROM pg_database WHERE datname = current_database())"
        f" AND classid::bigint << 32 | objid::bigint = {names_in(location).others}",
    )
    return [mode for (mode,) in rows]


@asynccontextmanager
async def listening(location: Location) -> AsyncIterator[list[str]]:
    """What is told to those who listen, whoever they are."""
    told: list[str] = []
    async with engine_of(location).connect() as connection:
        driver: Any = (await connection.get_raw_connection()).driver_connection
        await driver.add_listener(names_in(location).channel, lambda *heard: told.append(heard[-1]))
        yield told


def complete(task: Task) -> None:
    task.status = TaskStatus.COMPLETED


class TestWatch:
    async def test_gives_what_was_committed_after_a_revision_in_order(
        self, manager: StateManager, make_task: MakeTask, make_node: MakeNode
    ) -> None:
        await manager.add_task(make_task(task_id="before"))
        await manager.add_task(make_task(task_id="t"))
        await manager.add_node(make_node(node_id="n"))
        await manager.change_task("t", complete)
        await manager.remove_task("t")

        seen = await first(4, manager.watch(since=1))

        assert [(one.revision, one.item_id, one.kind) for one in seen] == [
            (2, "t", ChangeKind.CREATED),
            (3, "n", ChangeKind.CREATED),
            (4, "t", ChangeKind.STATUS),
            (5, "t", ChangeKind.REMOVED),
        ]

    async def test_watcher_that_keeps_up_reads_nothing(
        self, manager: StateManager, location: Location, make_task: MakeTask,
        make_node: MakeNode, monkeypatch: pytest.MonkeyPatch,
    ) -> None:  # fmt: skip
        """Neither the changes of its own process, nor those of other ones."""
        monkeypatch.setattr("openclaw_store.state_manager.manager.WATCH_SECONDS", PATIENCE)
        reads: list[int] = []
        original = Replica.changes

        async def changes(replica: Replica, since: int) -> Any:
            reads.append(since)
            return await original(replica, since)

        async with StateManager(Database(location, clock=manager.db.clock), None) as watching:
            seen: list[Change] = []

            async def see() -> None:
                async for change in watching.watch():
                    seen.append(change)  # noqa: PERF401  # others look at it meanwhile

            watcher = asyncio.create_task(see())
            await watching.add_task(make_task(task_id="t"))
            await until(lambda: len(seen) == 1)
            monkeypatch.setattr(Replica, "changes", changes)
            await manager.register_node(make_node(node_id="n"))
            await manager.refresh_from_database()
            [task] = await manager.claim_tasks("n")
            await manager.fail_task(task, "no paper", retry=False)
            await watching.refresh_from_database()
            await until(lambda: len(seen) == manager.version)
            await manager.add_task(make_task(task_id="u"))
            await watching.add_task(make_task(task_id="v"))  # before `u` is known
            await watching.refresh_from_database()
            await until(lambda: len(seen) == watching.version)
            assert reads == [6]  # what was committed before its own change

            long = "x" * (REASON_CHARACTERS + 1)
            await manager.cancel_task("u", long[1:])
            await manager.cancel_task("v", long)
            await watching.refresh_from_database()
            await until(lambda: len(seen) == manager.version)
            assert reads == [6, manager.version - 1]  # the last one alone is not in memory
            await watching.add_task(make_task(task_id="w"))
            await watching.cancel_task("w", long)  # nor is a long reason of its own
            await until(lambda: len(seen) == watching.version)
            assert reads == [6, manager.version - 1, watching.version - 1]
            watcher.cancel()
            await asyncio.wait([watcher])

            assert seen == await feed(watching)
        assert [change.reason for change in seen[-4:]] == [long[1:], long, None, long]

    async def test_since_none_begins_with_the_next_change(
        self, manager: StateManager, make_task: MakeTask
    ) -> None:
        await manager.add_task(make_task(task_id="before"))
        watcher = asyncio.create_task(first(1, manager.watch()))
        await asyncio.sleep(0)

        await manager.add_task(make_task(task_id="after"))

        assert [one.item_id for one in await watcher] == ["after"]

    async def test_waiting_watcher_is_woken_by_own_commits(
        self, manager: StateManager, make_task: MakeTask, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr("openclaw_store.state_manager.manager.WATCH_SECONDS", 3600)
        watcher = asyncio.create_task(first(20, manager.watch()))

        for _ in range(20):
            await manager.add_task(make_task())

        assert [one.revision for one in await watcher] == list(range(1, 21))

    async def test_changes_of_other_processes_are_seen_without_wake_ups_too(
        self,
        manager: StateManager,
        open_manager: OpenManager,
        make_task: MakeTask,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        monkeypatch.setattr("openclaw_store.state_manager.manager.WATCH_SECONDS", 0.01)
        other = await open_manager()
        watcher = asyncio.create_task(first(1, manager.watch()))

        await other.add_task(make_task(task_id="theirs"))

        assert [one.item_id for one in await watcher] == ["theirs"]
        assert (await manager.get_state()).tasks.keys() == {"theirs"}  # the cache has it by then

    async def test_more_than_a_page_is_seen_whole(
        self, manager: StateManager, make_task: MakeTask
    ) -> None:
        await asyncio.gather(*[manager.add_task(make_task()) for _ in range(450)])

        seen = await first(450, manager.watch(since=0))

        assert [one.revision for one in seen] == list(range(1, 451))

    async def test_slow_watcher_misses_nothing(
        self, manager: StateManager, make_task: MakeTask
    ) -> None:
        changes = manager.watch(since=0)
        for number in range(1, 6):
            for _ in range(100):
                await manager.add_task(make_task())
            assert (await anext(changes)).revision == number

    async def test_ends_when_the_manager_is_shut_down(
        self, database: Database, make_task: MakeTask
    ) -> None:
        manager = StateManager(database, None)
        await manager.initialize()
        watcher = asyncio.create_task(first(2, manager.watch()))
        await manager.add_task(make_task())
        await asyncio.sleep(0)

        await manager.shutdown()

        assert len(await asyncio.wait_for(watcher, PATIENCE)) < 2

    async def test_ends_whatever_it_is_doing_when_the_manager_is_shut_down(
        self, location: Location, database: Database, make_task: MakeTask
    ) -> None:
        for _ in range(10):
            manager = StateManager(Database(location), None)
            await manager.initialize()
            await manager.add_task(make_task(task_id=f"t{manager.version}"))
            watchers = [asyncio.create_task(first(1000, manager.watch(0))) for _ in range(5)]
            await asyncio.sleep(0.001)

            await manager.shutdown()

            await asyncio.wait_for(asyncio.gather(*watchers), PATIENCE)

    @pytest.mark.parametrize("since", [-1, 1.5, True, "1"])
    async def test_what_is_no_revision_is_refused_at_once(
        self, manager: StateManager, since: Any
    ) -> None:
        with pytest.raises(InvalidDataError, match="since"):
            manager.watch(since=since)

    async def test_revision_of_the_future_is_refused(self, manager: StateManager) -> None:
        with pytest.raises(InvalidDataError, match="since: must be at most 0"):
            await first(1, manager.watch(since=1))


class TestHistory:
    async def test_tells_the_life_of_a_task(
        self, manager: StateManager, make_task: MakeTask, clock: FakeClock
    ) -> None:
        await manager.add_task(make_task(task_id="t"))
        await manager.add_task(make_task(task_id="other"))
        moment = clock.advance(seconds=60)
        await manager.change_task("t", complete)

        created, completed = await manager.history("t")

        assert (created.kind, created.to_status) == (ChangeKind.CREATED, "pending")
        assert (completed.revision, completed.changed_at) == (3, moment)
        assert (completed.from_status, completed.to_status) == ("pending", "completed")

    async def test_of_a_task_that_was_removed_is_there(
        self, manager: StateManager, make_task: MakeTask
    ) -> None:
        await manager.add_task(make_task(task_id="t"))
        await manager.add_task(make_task(task_id="other"))
        await manager.remove_task("t")

        kinds = [change.kind for change in await manager.history("t")]

        assert kinds == [ChangeKind.CREATED, ChangeKind.REMOVED]

    async def test_of_an_unknown_task_is_empty(self, manager: StateManager) -> None:
        assert await manager.history("nobody") == []


class TestWaitForTask:
    async def test_gives_the_task_when_it_is_finished(
        self, manager: StateManager, make_task: MakeTask
    ) -> None:
        await manager.add_task(make_task(task_id="t"))
        waiter = asyncio.create_task(manager.wait_for_task("t", timeout=PATIENCE))
        await manager.change_task("t", lambda task: setattr(task, "name", "changed"))
        await asyncio.sleep(0)
        assert not waiter.done()

        await manager.change_task("t", complete)

        assert await waiter == await manager.get_task("t")

    async def test_finished_task_is_given_at_once(
        self, manager: StateManager, make_task: MakeTask
    ) -> None:
        await manager.add_task(make_task(task_id="t", status=TaskStatus.FAILED))

        assert (await manager.wait_for_task("t", timeout=0)).status is TaskStatus.FAILED

    async def test_end_that_another_process_commits_is_seen_after_a_refresh(
        self, manager: StateManager, open_manager: OpenManager, make_task: MakeTask
    ) -> None:
        other = await open_manager()
        await manager.add_task(make_task(task_id="t"))
        waiter = asyncio.create_task(manager.wait_for_task("t", timeout=PATIENCE))
        await other.refresh_from_database()
        await other.change_task("t", complete)

        await manager.refresh_from_database()

        assert (await waiter).status is TaskStatus.COMPLETED

    async def test_task_that_takes_too_long_is_a_deadline_error(
        self, manager: StateManager, make_task: MakeTask
    ) -> None:
        await manager.add_task(make_task(task_id="t"))

        with pytest.raises(DeadlineError, match=r"task 't' is not finished after 0\.01 s"):
            await manager.wait_for_task("t", timeout=0.01)

        assert manager._replica.watchers._waiters == {}

    async def test_task_that_is_removed_is_not_found(
        self, manager: StateManager, make_task: MakeTask
    ) -> None:
        await manager.add_task(make_task(task_id="t"))
        waiter = asyncio.create_task(manager.wait_for_task("t", timeout=PATIENCE))
        await asyncio.sleep(0)

        await manager.remove_task("t")

        with pytest.raises(TaskNotFoundError):
            await waiter

    async def test_waiter_learns_that_an_unsaved_entry_is_gone(
        self, manager: StateManager, open_manager: OpenManager, make_task: MakeTask
    ) -> None:
        other = await open_manager()
        task = make_task(task_id="t")
        await manager.add_task(task)
        await manager.update_task(task, persist=False)
        waiter = asyncio.create_task(manager.wait_for_task("t", timeout=PATIENCE))
        await manager.add_task(make_task(task_id="u"), persist=False)
        another = asyncio.create_task(manager.wait_for_task("u", timeout=PATIENCE))
        await asyncio.sleep(0)
        await other.refresh_from_database()
        await other.change_task("t", complete)
        await manager.refresh_from_database()

        await manager.remove_task("u")
        with pytest.raises(UnsavedConflictError):
            await manager.sync_to_database()

        assert (await waiter).status is TaskStatus.COMPLETED
        with pytest.raises(TaskNotFoundError):
            await another

    async def test_waiter_is_told_of_the_shutdown(
        self, database: Database, make_task: MakeTask
    ) -> None:
        manager = StateManager(database, None)
        await manager.initialize()
        await manager.add_task(make_task(task_id="t"))
        waiter = asyncio.create_task(manager.wait_for_task("t"))
        await asyncio.sleep(0)

        await manager.shutdown()

        with pytest.raises(UnavailableError, match="shut down"):
            await asyncio.wait_for(waiter, PATIENCE)


class TestCompaction:
    async def test_removes_what_is_older_and_never_the_newest(
        self, manager: StateManager, make_task: MakeTask, clock: FakeClock
    ) -> None:
        for _ in range(3):
            await manager.add_task(make_task())
        clock.advance(days=31)
        await manager.add_task(make_task())

        assert await manager.compact_changes(days=30) == 3
        assert await manager.compact_changes(days=0) == 0

        assert [one.revision for one in await first(1, manager.watch(since=3))] == [4]
        assert await manager.task_repo.count_by_status() == 4

    async def test_works_in_batches(
        self, manager: StateManager, make_task: MakeTask, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr("openclaw_store.repositories.retention.COMPACTION_BATCH_SIZE", 4)
        await asyncio.gather(*[manager.add_task(make_task()) for _ in range(11)])
        manager.db.clock = FakeClock(manager.db.clock().replace(year=2030))

        assert await manager.compact_changes(days=1) == 10

    @pytest.mark.parametrize("page", [1, 2, 1000])
    async def test_change_by_a_clock_that_was_ahead_is_as_old_as_those_around_it(
        self,
        manager: StateManager,
        make_task: MakeTask,
        clock: FakeClock,
        monkeypatch: pytest.MonkeyPatch,
        page: int,
    ) -> None:
        """Planted: the first change that is not old ends it."""
        batches: list[int] = []

        def noted(unit: WriteTransaction, operations: Sequence[Compact]) -> Sequence[int]:
            batches.extend(removed := compact(unit, operations))
            return removed

        monkeypatch.setattr("openclaw_store.repositories.retention.COMPACTION_BATCH_SIZE", page)
        monkeypatch.setattr("openclaw_store.repositories.retention.compact", noted)
        today = clock()
        for days in (0, 365, 365, 0, 365, 40, 0):
            clock.now = today + timedelta(days=days)
            await manager.add_task(make_task())
        clock.now = today + timedelta(days=41)

        assert await manager.compact_changes(days=30) == 4
        assert max(batches) <= page

        assert [one.revision for one in await first(3, manager.watch(since=4))] == [5, 6, 7]

    async def test_watcher_that_is_behind_it_is_told_how_far_the_feed_reaches(
        self, manager: StateManager, make_task: MakeTask, clock: FakeClock
    ) -> None:
        for _ in range(5):
            await manager.add_task(make_task())
        clock.advance(days=1)
        await manager.compact_changes(days=0)

        with pytest.raises(CompactedError, match="after revision 2 are gone up to 4") as caught:
            await first(1, manager.watch(since=2))

        assert (caught.value.since, caught.value.oldest) == (2, 5)

    async def test_clean_up_of_the_oldest_is_none(
        self, manager: StateManager, make_task: MakeTask, clock: FakeClock
    ) -> None:
        """Planted: the feed begins with the oldest change that it has."""
        await manager.add_task(make_task(status=TaskStatus.COMPLETED, completed_at=clock()))
        await manager.add_task(make_task())
        clock.advance(days=31)

        assert await manager.task_repo.cleanup_old_tasks(days=30) == 1

        assert [one.revision for one in await first(2, manager.watch(since=0))] == [2, 3]

    async def test_cache_that_is_behind_it_loads_anew(
        self,
        manager: StateManager,
        open_manager: OpenManager,
        make_task: MakeTask,
        clock: FakeClock,
    ) -> None:
        await manager.add_task(make_task(task_id="removed"))
        other = await open_manager()
        await other.remove_task("removed")
        await other.add_task(make_task(task_id="added"))
        await other.add_task(make_task(task_id="newest"))
        clock.advance(days=1)
        await other.compact_changes(days=0)

        await manager.refresh_from_database()

        assert (await manager.get_state()).tasks.keys() == {"added", "newest"}
        assert (await manager.get_task_stats())["total"] == 2
        assert manager.version == 4


class TestWakeUps:
    """The bound: what others have committed is in memory within 100 ms."""

    @asynccontextmanager
    async def following(self, location: Location) -> AsyncIterator[StateManager]:
        """A manager that synchronises once an hour."""
        async with StateManager(Database(location), auto_sync_interval=3600) as manager:
            yield manager

    async def test_what_others_commit_is_in_memory_at_once(
        self, manager: StateManager, location: Location, make_task: MakeTask, make_node: MakeNode
    ) -> None:
        async with self.following(location) as follower:
            await manager.add_task(make_task(task_id="t"))
            await until(lambda: follower.version == 1)
            assert await follower.get_task("t") == await manager.get_task("t")

            await manager.change_task("t", complete)
            assert (await follower.wait_for_task("t", PATIENCE)).version == 2

            await manager.add_node(make_node(node_id="n"))
            await until(lambda: follower.version == 3)
            await manager.update_heartbeat("n", cpu_usage=50)
            await manager.sync_to_database()
            cache = follower._replica.cache
            await until(lambda: (node := cache.nodes.get("n")) and node.cpu_usage == 50)

            async with manager.db.transaction() as tx:
                await TaskRepository(tx).delete("t")
            await until(lambda: follower.version == 4)

    async def test_those_who_want_none_have_none(
        self, manager: StateManager, location: Location, make_task: MakeTask
    ) -> None:
        async with StateManager(Database(location), 3600, wake_ups=False) as deaf:
            await manager.add_task(make_task())
            await asyncio.sleep(0.1)

            assert deaf.version == 0
            await deaf.refresh_from_database()
            assert deaf.version == 1

    async def test_failed_refresh_is_logged_and_the_next_one_works(
        self,
        manager: StateManager,
        location: Location,
        make_task: MakeTask,
        monkeypatch: pytest.MonkeyPatch,
        caplog: pytest.LogCaptureFixture,
    ) -> None:
        async with self.following(location) as follower:
            await until(lambda: follower._replica._notifier is not None)

            async def fail() -> None:
                raise RuntimeError("not now")

            with monkeypatch.context() as patch:
                patch.setattr(follower._replica, "refresh", fail)
                with caplog.at_level(logging.ERROR):
                    await manager.add_task(make_task())
                    await until(lambda: "could not be read" in caplog.text)
            await manager.add_task(make_task())

            await until(lambda: follower.version == 2)

    @pytest.mark.postgresql
    async def test_commits_without_notifications_are_found_by_polling(
        self, database: Database, location: Location, make_task: MakeTask, sent: list[str]
    ) -> None:
        """As of a server without NOTIFY and advisory locks."""
        async with (
            listening(location) as told,
            self.following(location) as follower,
            StateManager(Database(location), 3600, wake_ups=False) as silent,
        ):
            for version in (1, 2, 3):
                await silent.add_task(make_task())
                await until(lambda version=version: follower.version == version)  # type: ignore[misc]
            async with silent.db.transaction() as tx:
                await TaskRepository(tx).create(make_task())
            await until(lambda: follower.version == 4)
            execute(location, f"NOTIFY {names_in(location).channel}, 'end'")
            await until(lambda: told)

        assert told == ["end"]
        assert len(sent) >= 3
        words = ("notify", "advisory", "store_write")
        assert not [sql for sql in sent if any(word in sql.lower() for word in words)]

    @pytest.mark.postgresql
    async def test_connection_that_is_lost_is_made_anew(
        self,
        manager: StateManager,
        location: Location,
        make_task: MakeTask,
        caplog: pytest.LogCaptureFixture,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        monkeypatch.setattr(server_listening, "RETRY_SECONDS", (0.01, 0.01))
        listening = (
            "SELECT DISTINCT pid FROM pg_locks JOIN pg_stat_activity USING (pid)"
            " WHERE locktype = 'advisory' AND datname = current_database()"
        )
        async with self.following(location) as follower:
            await manager.add_task(make_task())
            await until(lambda: follower.version == 1)
            async with engine_of(location).begin() as connection:
                pids = list(await connection.exec_driver_sql(listening))
                for (pid,) in pids:
                    await connection.exec_driver_sql(f"SELECT pg_terminate_backend({pid})")
            assert pids

            await manager.add_task(make_task())

            await until(lambda: follower.version == 2)

    @pytest.mark.postgresql
    async def test_whoever_listens_alone_is_told_nothing_until_there_are_others(
        self, manager: StateManager, location: Location, make_task: MakeTask
    ) -> None:
        """To be told of each of its own commits would make each take a fifth longer."""
        registry = company_of(manager.db)
        async with listening(location) as told, self.following(location) as alone:
            await until(lambda: company_of(alone.db).listener)
            for _ in range(3):
                await alone.add_task(make_task())
            assert registry.listener is None
            await manager.add_task(make_task())  # nobody listens there
            await until(lambda: told == ["4 0"])

            async with self.following(location):
                await until(lambda: len(locks_of_others(location)) == 1)
                await alone.add_task(make_task())
                await until(lambda: told == ["4 0", "5 0"])
            await until(lambda: not locks_of_others(location))
            await alone.add_task(make_task())
            execute(location, f"NOTIFY {names_in(location).channel}, 'end'")
            await until(lambda: told == ["4 0", "5 0", "end"])
        assert company_of(alone.db).listener is None

    @pytest.mark.postgresql
    async def test_next_one_is_the_first_when_that_has_gone(
        self,
        database: Database,
        location: Location,
        make_task: MakeTask,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        monkeypatch.setattr(server_listening, "ALIVE_SECONDS", 0.01)
        async with AsyncExitStack() as stack:
            told = await stack.enter_async_context(listening(location))
            one = await stack.enter_async_context(self.following(location))
            await until(lambda: company_of(one.db).listener)
            two, three = [
                await stack.enter_async_context(self.following(location)) for _ in range(2)
            ]
            await until(lambda: len(locks_of_others(location)) == 2)
            await one.shutdown()

            await until(lambda: company_of(two.db).listener or company_of(three.db).listener)
            await two.add_task(make_task())
            await until(lambda: three.version == 1)
            await three.add_task(make_task())
            await until(lambda: told == ["1 0", "2 0"])

            assert None in (company_of(two.db).listener, company_of(three.db).listener)

    @pytest.mark.postgresql
    async def test_whose_listener_has_gone_unnoticed_tells_all(
        self, database: Database, location: Location, make_task: MakeTask
    ) -> None:
        """The server knows sooner than the client, and another one may be the first by now."""
        tasks = TaskRepository(database)
        company_of(database).listener = 4711
        async with listening(location) as told, engine_of(location).connect() as connection:
            await connection.exec_driver_sql("SELECT pg_advisory_lock(4711)")
            await tasks.create(make_task())
            await connection.exec_driver_sql("SELECT pg_advisory_unlock(4711)")
            await tasks.create(make_task())

            await until(lambda: told == ["2 0"])

    @pytest.mark.postgresql
    async def test_who_begins_to_listen_waits_for_a_commit_that_has_found_nobody(
        self, database: Database, location: Location
    ) -> None:
        told: list[tuple[int, int]] = []
        others = names_in(location).others
        async with engine_of(location).begin() as connection:
            await connection.exec_driver_sql("UPDATE counters SET beat = beat + 1")
            await connection.exec_driver_sql(f"SELECT pg_advisory_xact_lock({others})")
            follower = database.follow(lambda *counters: told.append(counters))
            await until(lambda: "ShareLock" in locks_of_others(location))
            assert not told
        try:
            await until(lambda: told)
        finally:
            await follower.stop()

        assert told[0] == (0, 1)

    @pytest.mark.postgresql
    @pytest.mark.parametrize("is_answered", [True, False])
    async def test_statement_under_way_is_answered_before_listening_ends(
        self,
        database: Database,
        location: Location,
        monkeypatch: pytest.MonkeyPatch,
        is_answered: bool,
    ) -> None:
        """A program that ended while the driver interrupted it had an error in its log."""
        connect_utils = import_module("asyncpg.connect_utils")  # which SQLite does without
        interrupt, interrupted = connect_utils._cancel, list[object]()

        async def note(**options: Any) -> None:
            interrupted.append(options)
            await interrupt(**options)

        monkeypatch.setattr(connect_utils, "_cancel", note)
        monkeypatch.setattr(server_listening, "STOP_SECONDS", PATIENCE if is_answered else 0.1)
        others = names_in(location).others
        async with engine_of(location).begin() as connection:
            await connection.exec_driver_sql(f"SELECT pg_advisory_xact_lock({others})")
            follower = database.follow(lambda *_: None)
            await until(lambda: "ShareLock" in locks_of_others(location))
            stopping = asyncio.ensure_future(follower.stop())
            if not is_answered:  # while the statement waits
                await stopping
        await stopping

        assert bool(interrupted) is not is_answered

    @pytest.mark.sqlite
    async def test_file_that_is_not_there_is_looked_for_less_and_less_often(
        self, manager: StateManager, location: Path, make_task: MakeTask,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:  # fmt: skip
        """Looking for it 200 times a second took 6 % of a core."""
        pauses: list[float | None] = []

        class Impatient(Event):
            def wait(self, timeout: float | None = None) -> bool:
                pauses.append(timeout)
                return super().wait(0.001)

        monkeypatch.setattr(wakeups, "Event", Impatient)
        away, told = location.with_name("away"), Event()
        os.rename(location, away)
        polling = manager.db.follow(lambda *_: told.set())
        await until(lambda: UNREADABLE_SECONDS in pauses)
        os.rename(away, location)
        await until(told.is_set)
        found = len(pauses)
        told.clear()
        await manager.add_task(make_task())
        await until(told.is_set)
        await polling.stop()

        missing = pauses[: pauses.index(UNREADABLE_SECONDS)]
        assert missing == [LONGEST_SECONDS * 2**number for number in range(len(missing))]
        assert pauses[found:] == []

    async def test_who_has_yet_to_read_says_so_when_told(self, location: Location) -> None:
        async with StateManager(Database(location)) as manager:
            follower = manager._replica
            assert follower._notice_commit(0, 0) is True
            follower._outdated.set()
            assert follower._notice_commit(1, 0) is False
            await until(lambda: follower._notice_commit(0, 0))

    @pytest.mark.sqlite
    @pytest.mark.parametrize("is_busy", [True, False])
    async def test_who_is_busy_is_told_less_often(
        self, manager: StateManager, make_task: MakeTask, monkeypatch: pytest.MonkeyPatch,
        is_busy: bool,
    ) -> None:  # fmt: skip
        pauses: list[float] = []

        def note(seconds: float) -> None:
            pauses.append(seconds)
            sleep(seconds)

        monkeypatch.setattr(wakeups, "sleep", note)
        told: list[int] = []

        def tell(revision: int, _: int) -> bool:
            told.append(revision)
            return not is_busy

        polling = manager.db.follow(tell)
        for _ in range(2):
            await manager.add_task(make_task())
            await until(lambda: manager.version in told)
        await polling.stop()

        assert (BUSY_SECONDS in pauses) is is_busy
        assert (SHORTEST_SECONDS in pauses) is not is_busy

    @pytest.mark.sqlite
    @pytest.mark.parametrize("is_reporting", [True, False])
    async def test_file_is_polled_rarely_only_where_its_writes_are_reported(
        self, manager: StateManager, make_task: MakeTask, monkeypatch: pytest.MonkeyPatch,
        is_reporting: bool,
    ) -> None:  # fmt: skip
        waits: list[bool] = []
        original = FileWatch.wait

        def wait(self: FileWatch, seconds: float) -> bool:
            is_written = original(self, min(seconds, 0.001)) and is_reporting
            waits.append(is_written)
            return is_written

        monkeypatch.setattr(FileWatch, "wait", wait)
        told: list[int] = []
        polling = manager.db.follow(lambda revision, _: told.append(revision))
        await until(lambda: waits)
        await manager.add_task(make_task())
        await until(lambda: told[-1:] == [1])
        if is_reporting:
            assert True in waits
            await until(lambda: waits[-1] is False)  # idle again
        waits.clear()
        await asyncio.sleep(0.1)
        await manager.add_task(make_task())
        await until(lambda: told[-1:] == [2])
        await polling.stop()

        assert bool(waits) is is_reporting

    @pytest.mark.sqlite
    async def test_file_that_cannot_be_read_for_a_while_is_looked_at_again(
        self, manager: StateManager, location: Location, make_task: MakeTask
    ) -> None:
        async with self.following(location) as follower:
            execute(location, "ALTER TABLE counters RENAME TO mislaid")
            await asyncio.sleep(0.05)
            execute(location, "ALTER TABLE mislaid RENAME TO counters")

            await manager.add_task(make_task())

            await until(lambda: follower.version == 1)
