"""Group commit: its rules one by one, on a fake database, then on a real one."""

from __future__ import annotations

import asyncio
import gc
import logging
import sqlite3
import threading
import time
import weakref
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Iterator, Sequence
from contextlib import asynccontextmanager
from datetime import UTC, datetime, timedelta
from functools import partial
from itertools import count
from types import SimpleNamespace
from typing import Any, cast

import pytest
from conftest import (
    PATIENCE,
    InThread,
    Location,
    MakeNode,
    MakeTask,
    refuse_tasks,
    start,
    until,
)

from openclaw_store import (
    Database,
    DeadlineError,
    DuplicateError,
    InvalidDataError,
    NodeRepository,
    NodeStatus,
    StaleVersionError,
    StoreError,
    TaskRepository,
    UnavailableError,
)
from openclaw_store.backends import Backend, qualified
from openclaw_store.backends.base import CounterStatements, LockRequiredError
from openclaw_store.backends.error_mapping import SQLiteErrorMapping
from openclaw_store.database import group_commit, metrics
from openclaw_store.database.dialects import statements_of
from openclaw_store.database.group_commit import Writer
from openclaw_store.database.write_queue import FairLock
from openclaw_store.database.write_transaction import WriteTransaction

NOON = datetime(2026, 3, 1, 12, tzinfo=UTC)
ends_the_thread = pytest.mark.filterwarnings(
    "ignore::pytest.PytestUnhandledThreadExceptionWarning"  # it is what the test is about
)


class Shelf:
    """A fake database: it keeps the operations that were committed, transaction by transaction.

    An operation is a word, and its result the word in capitals. `hold` keeps the
    writer in its batch until `release` is set; `again` has the first transaction done again;
    `refuse…` is refused by itself; `explode…` raises; `exit` ends the thread.
    """

    dialect = "sqlite"

    def __init__(self) -> None:
        self.batches: list[list[str]] = []
        self.turns = 0
        self.opened = 0
        self.entered = threading.Event()
        """A `hold` is in its batch."""
        self.release = threading.Event()
        self.published = threading.Semaphore(0)
        """Counts the transactions whose callers were told."""
        self.cursor: Any = None
        self.error_mapping = SQLiteErrorMapping("a shelf")
        self.is_committed = False
        self.begin_error: Callable[[float], Exception | None] = lambda until: None
        self.is_lost = False
        self.commit_error: Exception | None = None
        self.stopping: Callable[[], object] = lambda: None
        self.stopped = 0

    def writer(self, *, clock: Callable[[], datetime] = lambda: NOON) -> Writer:
        return Writer(cast(Backend, self), Turns(self), clock, PATIENCE, statements_of("sqlite"))

    def write_session(self, until: float, counters: CounterStatements) -> Shelf:
        return self

    def begin(self, until: float) -> bool:
        if (error := self.begin_error(until)) is not None:
            raise error
        if self.is_lost:
            return False
        self.opened += 1
        self.words: list[str] = []
        return True

    def commit(self) -> None:
        if self.commit_error is not None:
            raise self.commit_error
        self.batches.append(self.words)
        self.is_committed = True

    def close(self) -> None:
        self.stopped += 1
        self.stopping()

    def apply(self, unit: WriteTransaction, operations: Sequence[str]) -> list[Any]:
        return [self._decide(unit, operation) for operation in operations]

    def apply_too(self, unit: WriteTransaction, operations: Sequence[str]) -> list[Any]:
        """Another function, so that its operations are another run of the batch."""
        return self.apply(unit, operations)

    def apply_and_exit(self, unit: WriteTransaction, operations: Sequence[str]) -> list[Any]:
        """End the thread when the operations have been applied."""
        self.apply(unit, operations)
        raise SystemExit

    def _decide(self, unit: WriteTransaction, operation: str) -> Any:
        if operation == "hold":
            self.entered.set()
            assert self.release.wait(PATIENCE)
        if operation == "again" and self.opened == 1:
            raise LockRequiredError
        if operation == "exit":
            raise SystemExit
        if operation.startswith("explode"):
            raise ValueError(operation)
        if operation.startswith("refuse"):
            return DuplicateError("word", operation)
        unit.committed.append(operation)
        self.words.append(operation)
        return operation.upper()


class Turns(FairLock):
    """The turns of a writer to write, which its shelf counts."""

    def __init__(self, shelf: Shelf) -> None:
        super().__init__(PATIENCE)
        self._shelf = shelf

    def acquire(self, name: str, until: float | None = None) -> None:
        super().acquire(name, until)
        self._shelf.turns += 1

    def release(self) -> None:
        super().release()
        if self._shelf.is_committed:
            self._shelf.is_committed = False
            self._shelf.published.release()


@pytest.fixture
def shelf() -> Iterator[Shelf]:
    shelf = Shelf()
    yield shelf
    shelf.release.set()  # a failed test must not keep the thread


@pytest.fixture
async def writer(shelf: Shelf) -> AsyncIterator[Writer]:
    """A writer of `shelf`, which ends with the test."""
    writer = shelf.writer()
    yield writer
    shelf.release.set()
    await writer.close()


class LateQueue(deque[Any]):
    """A queue that, while something is put into it, lets something else happen first."""

    def __init__(self, happens: Callable[[], object]) -> None:
        self._happens = happens

    def append(self, entry: Any) -> None:
        self._happens()
        super().append(entry)


async def entered(shelf: Shelf) -> None:
    """Wait until the writer is in the batch of a `hold`."""
    assert await asyncio.to_thread(shelf.entered.wait, PATIENCE)


async def hold(shelf: Shelf, writer: Writer) -> asyncio.Task[Any]:
    """Keep the writer in a batch until `release` is set; return the caller of that batch."""
    held = start(writer.submit(shelf.apply, "hold"))
    await entered(shelf)
    return held


async def finished(tasks: Sequence[asyncio.Task[Any]]) -> list[Any]:
    """Results and errors of all tasks; fails if one of them hangs."""
    _, hanging = await asyncio.wait(tasks, timeout=PATIENCE)
    assert not hanging
    return [outcome(task) for task in tasks]


def outcome(task: asyncio.Task[Any]) -> Any:
    """What a task returned or raised."""
    if task.cancelled():
        return asyncio.CancelledError()
    if task.exception() is not None:
        return task.exception()
    assert not isinstance(task.result(), BaseException)  # an error is to be raised
    return task.result()


async def turns(number: int = 5) -> None:
    """Let everything that is ready run."""
    for _ in range(number):
        await asyncio.sleep(0)


@asynccontextmanager
async def standing_still(
    *comers: Callable[[], Coroutine[Any, Any, None]], cancelled: int = 0
) -> AsyncIterator[tuple[threading.Event, InThread]]:
    """Another event loop, which stands still from when `comers` wait until the event is set.

    Then so many of the last of them are cancelled; it ends with what came of each.
    """
    waits, go_on = threading.Event(), threading.Event()

    async def block() -> list[Any]:
        slow = [start(waiter()) for waiter in comers]
        await turns()
        waits.set()
        go_on.wait(PATIENCE)
        for one in slow[len(slow) - cancelled :]:
            one.cancel()
        return await finished(slow)

    other = InThread(block)
    await until(waits.is_set)
    try:
        yield go_on, other
    finally:
        go_on.set()


class TestBatches:
    async def test_lone_caller_gets_its_result_after_one_commit(
        self, shelf: Shelf, writer: Writer
    ) -> None:
        result = await writer.submit(shelf.apply, "alone")

        assert result == "ALONE"
        assert shelf.batches == [["alone"]]

    async def test_lone_caller_waits_for_no_timer(self, shelf: Shelf, writer: Writer) -> None:
        """Planted: the loop or the thread waits a moment to collect a batch; or it polls."""
        seconds: list[float] = []

        for number in range(100):
            began = time.perf_counter()
            await writer.submit(shelf.apply, f"word{number}")
            seconds.append(time.perf_counter() - began)
            await asyncio.sleep(0.001)  # until the thread is idle again

        # The machine may be busy, but a timer would delay almost all of them.
        assert sorted(seconds)[10] < 0.001

    async def test_callers_of_one_turn_of_the_loop_share_one_batch(
        self, shelf: Shelf, writer: Writer
    ) -> None:
        """Planted: `submit` wakes the thread at once instead of behind this turn's callers."""
        loop = asyncio.get_running_loop()
        tasks: list[asyncio.Task[Any]] = []
        first, second = (writer.submit(shelf.apply, word) for word in ("first", "second"))
        await writer.submit(shelf.apply, "the thread is there")
        assert await asyncio.to_thread(shelf.published.acquire, timeout=PATIENCE)

        tasks.append(start(first))
        # The turn takes so long that a thread that was told already would come first.
        loop.call_soon(lambda: shelf.published.acquire(timeout=0.05))
        tasks.append(start(second))
        await finished(tasks)

        assert shelf.batches == [["the thread is there"], ["first", "second"]]

    async def test_callers_woken_together_share_the_next_batch_too(
        self, shelf: Shelf, writer: Writer
    ) -> None:
        """Planted: each caller's outcome takes a hop of its own to the loop."""

        async def write_thrice(name: str) -> None:
            for number in range(3):
                await writer.submit(shelf.apply, f"{name}{number}")

        await asyncio.gather(*[write_thrice(name) for name in "abcdefgh"])

        assert shelf.batches == [[f"{name}{number}" for name in "abcdefgh"] for number in range(3)]

    async def test_all_that_queue_during_a_commit_are_the_next_batch(
        self, shelf: Shelf, writer: Writer
    ) -> None:
        """Planted: a batch takes one operation, or at most a few."""
        held = await hold(shelf, writer)

        words = [f"word{number}" for number in range(500)]
        tasks = [start(writer.submit(shelf.apply, word)) for word in words]
        await turns()
        shelf.release.set()
        await finished([held, *tasks])

        assert shelf.batches == [["hold"], words]

    async def test_closing_answers_those_of_the_last_batch(self, shelf: Shelf) -> None:
        """Planted: their answers are kept for a batch that never comes."""
        writer = shelf.writer()
        last = start(writer.submit(shelf.apply, "hold"))
        await entered(shelf)
        closing = start(writer.close())
        await turns()
        shelf.release.set()

        assert await finished([last, closing]) == ["HOLD", None]

    async def test_batch_that_is_done_again_keeps_its_turn(self, shelf: Shelf) -> None:
        """It queued behind those who had come meanwhile."""
        writer = shelf.writer()

        assert await writer.submit(shelf.apply, "again") == "AGAIN"

        await writer.close()
        assert (shelf.opened, shelf.turns) == (2, 1)

    async def test_operations_keep_their_order_whatever_applies_them(
        self, shelf: Shelf, writer: Writer
    ) -> None:
        """Planted: runs are grouped by function over the whole batch, or applied in reverse."""
        held = await hold(shelf, writer)

        tasks = [
            start(writer.submit(apply, word))
            for apply, word in [
                (shelf.apply, "row=1"),
                (shelf.apply_too, "row=2"),
                (shelf.apply, "row=3"),
                (shelf.apply_too, "row=4"),
            ]
        ]
        await turns()
        shelf.release.set()
        results = await finished([held, *tasks])

        assert results == ["HOLD", "ROW=1", "ROW=2", "ROW=3", "ROW=4"]
        assert shelf.batches[1] == ["row=1", "row=2", "row=3", "row=4"]


class TestFailures:
    async def test_refused_operation_leaves_the_rest_of_its_batch_committed(
        self, shelf: Shelf, writer: Writer
    ) -> None:
        """Planted: an outcome that is an error is raised on the thread, or returned."""
        words = ["a", "refuse", "b", "refuse too", "c"]
        outcomes = await finished([start(writer.submit(shelf.apply, word)) for word in words])

        assert [outcomes[0], outcomes[2], outcomes[4]] == ["A", "B", "C"]
        assert [type(outcomes[1]), outcomes[1].id] == [DuplicateError, "refuse"]
        assert [type(outcomes[3]), outcomes[3].id] == [DuplicateError, "refuse too"]
        assert shelf.batches == [["a", "b", "c"]]

    @pytest.mark.parametrize("bad", [{0}, {6}, {3, 4}, {0, 2, 4, 6}, set(range(7))])
    async def test_exception_inside_a_batch_fails_none_but_its_own_operation(
        self, shelf: Shelf, writer: Writer, bad: set[int]
    ) -> None:
        """Planted: the whole batch fails; or its halves swap places; or one is applied twice."""
        words = [f"explode{n}" if n in bad else f"word{n}" for n in range(7)]

        outcomes = await finished([start(writer.submit(shelf.apply, word)) for word in words])

        for word, outcome in zip(words, outcomes, strict=True):
            if word.startswith("explode"):
                assert isinstance(outcome, ValueError)
                assert outcome.args == (word,)
            else:
                assert outcome == word.upper()
        committed = [word for batch in shelf.batches for word in batch]
        assert committed == [word for word in words if not word.startswith("explode")]

    async def test_batch_that_is_tried_by_halves_is_told_once_and_before_what_came_later(
        self, shelf: Shelf, writer: Writer
    ) -> None:
        """Planted: what was rolled back is told, too; or the second half queues again, behind."""
        told: list[str] = []
        writer.listen(asyncio.get_running_loop(), told.extend)
        words = ["a", "hold", "explode", "b"]
        tasks = [start(writer.submit(shelf.apply, word)) for word in words]
        await entered(shelf)
        tasks.append(start(writer.submit(shelf.apply, "later")))
        await turns()

        shelf.release.set()
        await finished(tasks)

        assert told == ["a", "hold", "b", "later"]
        assert [word for batch in shelf.batches for word in batch] == told

    async def test_failed_transaction_fails_all_its_callers_each_with_its_own_error(
        self, shelf: Shelf, writer: Writer
    ) -> None:
        """Planted: all callers get one error, whose traceback grows; or the batch is retried."""
        shelf.commit_error = UnavailableError("the disk is full: free some space")
        shelf.commit_error.__cause__ = cause = OSError("no space")

        tasks = [start(writer.submit(shelf.apply, word)) for word in "abc"]
        errors = await finished(tasks)

        assert [type(error) for error in errors] == [UnavailableError] * 3
        assert {str(error) for error in errors} == {"the disk is full: free some space"}
        assert all(error.__cause__ is cause for error in errors)
        assert len({id(error) for error in errors}) == 3
        assert shelf.opened == 1
        shelf.commit_error = None
        assert await writer.submit(shelf.apply, "again") == "AGAIN"

    async def test_callers_of_a_batch_wait_for_a_lock_until_their_own_time_is_over(
        self, shelf: Shelf, writer: Writer, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """They all failed with the first of them."""
        now, attempts = 0.0, list[float]()
        busy = sqlite3.OperationalError("database is locked")
        busy.sqlite_errorname = "SQLITE_BUSY"
        monkeypatch.setattr(group_commit, "monotonic", lambda: now)

        def lock(until: float) -> Exception | None:
            nonlocal now
            attempts.append(until)
            if len(attempts) > 3:
                return None
            now = until
            return busy

        held = await hold(shelf, writer)
        callers = []
        for now in (0, 1, 20, 25):  # the writer reads it
            callers.append(start(writer.submit(shelf.apply, f"at {now}")))
            await turns()
        now = 26
        shelf.begin_error = lock
        shelf.release.set()
        [_, first, second, *others] = await finished([held, *callers])

        assert [type(first), type(second)] == [UnavailableError] * 2
        assert first is not second
        assert others[-1] == "AT 25"
        # Attempts have a least length, so that callers are not served one by one.
        assert attempts == [30, 30 + PATIENCE / 8, 50, 55]

    async def test_connections_that_are_closed_at_once_are_tried_until_the_deadline(
        self, shelf: Shelf, writer: Writer, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """The writer connected again forever, and its callers waited as long."""
        moments = count()
        monkeypatch.setattr(group_commit, "monotonic", lambda: float(next(moments)))
        shelf.is_lost = True

        [error] = await finished([start(writer.submit(shelf.apply, "a"))])

        assert isinstance(error, UnavailableError)
        assert "closes each new connection" in str(error)
        assert PATIENCE - 5 < shelf.stopped <= PATIENCE  # a second for each connection
        shelf.is_lost = False
        assert await writer.submit(shelf.apply, "again") == "AGAIN"

    async def test_connection_that_is_found_lost_at_the_deadline_is_replaced(
        self, shelf: Shelf, writer: Writer, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """The write was refused, though the server took connections again."""
        now = 0.0
        monkeypatch.setattr(group_commit, "monotonic", lambda: now)
        assert await writer.submit(shelf.apply, "a") == "A"

        def wait(until: float) -> None:
            nonlocal now
            now = until  # the turn to write came late

        shelf.begin_error, shelf.is_lost = wait, True
        shelf.stopping = lambda: setattr(shelf, "is_lost", False)

        assert await writer.submit(shelf.apply, "b") == "B"

    @ends_the_thread
    async def test_end_of_the_thread_is_told_to_all_and_survived(
        self, shelf: Shelf, writer: Writer
    ) -> None:
        """Planted: `BaseException` passes the callers by; or no new thread is ever started."""
        held = await hold(shelf, writer)
        batch = [start(writer.submit(shelf.apply, word)) for word in ("a", "exit", "b")]
        await turns()

        shelf.release.set()
        outcomes = await finished([held, *batch])
        again = await finished([start(writer.submit(shelf.apply, "again"))])

        assert outcomes[0] == "HOLD"
        assert [type(error) for error in outcomes[1:]] == [UnavailableError] * 3
        assert "try again" in str(outcomes[1])
        assert again == ["AGAIN"]
        assert shelf.batches == [["hold"], ["again"]]
        assert shelf.stopped == 1

    @ends_the_thread
    @pytest.mark.parametrize("ending", ["exit", "clock"])
    async def test_end_of_the_thread_is_told_to_those_whose_turn_had_not_come(
        self, shelf: Shelf, ending: str
    ) -> None:
        """Planted: only the part of the batch that is being tried is told."""
        broken = False
        asked = 0

        def clock() -> datetime:
            nonlocal asked
            asked += broken
            if asked % 2:  # for a failure to be noted; not for the transaction that follows
                raise RuntimeError("no time")
            return NOON

        writer = shelf.writer(clock=clock)
        held = await hold(shelf, writer)
        words = ("explode", "exit", "a", "b") if ending == "exit" else ("a", "b")
        batch = [start(writer.submit(shelf.apply, word)) for word in words]
        await turns()
        if ending == "clock":
            shelf.commit_error, broken = UnavailableError("the disk is full"), True

        shelf.release.set()
        outcomes = await finished([held, *batch])

        assert isinstance(outcomes[-1], UnavailableError)
        assert isinstance(outcomes[-2], UnavailableError)
        shelf.commit_error, broken = None, False
        assert await finished([start(writer.submit(shelf.apply, "again"))]) == ["AGAIN"]
        await writer.close()

    @ends_the_thread
    async def test_end_of_the_thread_costs_those_still_queued_nothing(
        self, shelf: Shelf, writer: Writer
    ) -> None:
        """Planted: the thread ends without looking at the queue, and they wait for ever."""
        fatal = start(writer.submit(shelf.apply_and_exit, "hold"))
        await entered(shelf)
        queued = [start(writer.submit(shelf.apply, word)) for word in "ab"]
        await turns()
        shelf.release.set()
        outcomes = await finished([fatal, *queued])

        assert isinstance(outcomes[0], UnavailableError)
        assert outcomes[1:] == ["A", "B"]
        assert shelf.batches == [["a", "b"]]

    @ends_the_thread
    async def test_close_waits_for_the_thread_that_takes_over(self, shelf: Shelf) -> None:
        """Planted: `close` returns when the thread it knew has ended."""
        writer = shelf.writer()

        fatal = start(writer.submit(shelf.apply_and_exit, "hold"))
        await entered(shelf)
        queued = start(writer.submit(shelf.apply, "queued"))
        await turns()
        closing = start(writer.close())
        await turns()
        shelf.release.set()
        await finished([closing])

        assert shelf.batches == [["queued"]]
        assert shelf.stopped == 2
        outcomes = await finished([fatal, queued])
        assert isinstance(outcomes[0], UnavailableError)
        assert outcomes[1] == "QUEUED"

    @ends_the_thread
    async def test_new_thread_starts_only_when_the_old_one_has_cleaned_up(
        self, shelf: Shelf, writer: Writer
    ) -> None:
        """Planted: `stopped` is called after the place was free, and ends what is the new one's."""
        stopping, go_on = threading.Event(), threading.Event()

        def stop() -> None:
            stopping.set()
            assert go_on.wait(PATIENCE)

        shelf.stopping = stop
        fatal = start(writer.submit(shelf.apply, "exit"))
        assert await asyncio.to_thread(stopping.wait, PATIENCE)
        opened = shelf.opened
        early = start(writer.submit(shelf.apply, "early"))
        await turns()
        # A thread that was started now would have opened its transaction meanwhile.
        await asyncio.to_thread(shelf.published.acquire, timeout=0.05)
        opened_meanwhile = shelf.opened - opened
        go_on.set()
        outcomes = await finished([fatal, early])

        assert opened_meanwhile == 0
        assert isinstance(outcomes[0], UnavailableError)
        assert outcomes[1] == "EARLY"


class TestCancellation:
    async def test_operation_of_a_caller_cancelled_in_the_queue_is_withdrawn(
        self, shelf: Shelf, writer: Writer
    ) -> None:
        """Planted: a cancelled caller's operation stays in the queue and is committed."""
        held = await hold(shelf, writer)
        gone = start(writer.submit(shelf.apply, "gone"))
        stays = start(writer.submit(shelf.apply, "stays"))
        await turns()

        gone.cancel()
        await asyncio.wait([gone], timeout=PATIENCE)

        assert gone.cancelled()  # without waiting for the batch before it
        shelf.release.set()
        assert await finished([held, stays]) == ["HOLD", "STAYS"]
        assert shelf.batches == [["hold"], ["stays"]]

    async def test_caller_cancelled_in_a_batch_waits_for_it_and_is_cancelled_then(
        self, shelf: Shelf, writer: Writer
    ) -> None:
        """Planted: `CancelledError` goes on at once, before the commit reached the caches."""
        told: list[str] = []
        writer.listen(asyncio.get_running_loop(), told.extend)
        held = await hold(shelf, writer)

        held.cancel()
        await turns()

        assert not held.done()
        shelf.release.set()
        await asyncio.wait([held], timeout=PATIENCE)
        assert held.cancelled()
        assert told == ["hold"]

    async def test_outcome_that_arrives_before_the_cancelled_caller_wakes_is_not_awaited_again(
        self, shelf: Shelf, writer: Writer
    ) -> None:
        """Planted: `_withdraw` does not look whether the outcome was there, and waits for ever."""
        held = await hold(shelf, writer)

        shelf.release.set()
        assert shelf.published.acquire(timeout=PATIENCE)  # blocks this loop: it lies in the inbox
        held.cancel()
        await asyncio.wait([held], timeout=PATIENCE)

        assert held.cancelled()
        assert shelf.batches == [["hold"]]

    async def test_caller_cancelled_just_before_its_batch_is_done_sees_it_too(
        self, shelf: Shelf, writer: Writer
    ) -> None:
        """Planted: a caller that finds its batch done goes on before the listeners were told."""
        told: list[str] = []
        writer.listen(asyncio.get_running_loop(), told.extend)
        seen: list[str] = []

        async def write() -> None:
            try:
                await writer.submit(shelf.apply, "hold")
            finally:
                seen.extend(told)

        held = start(write())
        await entered(shelf)

        held.cancel()  # who wakes by this is the first to run
        shelf.release.set()
        assert shelf.published.acquire(timeout=PATIENCE)  # blocks this loop
        while writer._taken:
            pass  # the thread has but to forget it
        await finished([held])

        assert seen == ["hold"]

    async def test_caller_cancelled_again_still_waits_for_its_batch(
        self, shelf: Shelf, writer: Writer
    ) -> None:
        """Planted: the second cancellation leaves `_withdraw`."""
        held = await hold(shelf, writer)

        for _ in range(3):
            held.cancel()
            await turns()
            assert not held.done()
        shelf.release.set()
        await asyncio.wait([held], timeout=PATIENCE)

        assert held.cancelled()
        assert shelf.batches == [["hold"]]

    async def test_caller_cancelled_as_its_outcome_arrives_is_cancelled(
        self, shelf: Shelf, writer: Writer
    ) -> None:
        """Planted: a caller that has its result returns it, and the cancellation is lost."""
        loop = asyncio.get_running_loop()
        held = start(writer.submit(shelf.apply, "hold"))
        # Runs when the outcome is set, and before it wakes the caller.
        writer.listen(loop, lambda _: cast(None, loop.call_soon(held.cancel)))
        await entered(shelf)

        shelf.release.set()
        await finished([held])

        assert held.cancelled()
        assert shelf.batches == [["hold"]]

    async def test_operation_of_a_caller_cancelled_in_a_batch_that_is_tried_again_is_applied(
        self, shelf: Shelf, writer: Writer
    ) -> None:
        """Planted: who was cancelled meanwhile is left out when a batch is tried by halves."""
        told: list[str] = []
        writer.listen(asyncio.get_running_loop(), told.extend)
        tasks = [start(writer.submit(shelf.apply, word)) for word in ("a", "hold", "explode")]
        await entered(shelf)

        tasks[0].cancel()
        await turns()
        shelf.release.set()
        await finished(tasks)

        assert tasks[0].cancelled()
        assert told == ["a", "hold"]
        assert not writer._gone  # nor are those kept who were cancelled

    @ends_the_thread
    async def test_caller_cancelled_in_a_batch_is_let_go_when_the_thread_ends(
        self, shelf: Shelf, writer: Writer
    ) -> None:
        """Planted: only a batch that is done lets go those who were cancelled in it."""
        held = start(writer.submit(shelf.apply_and_exit, "hold"))
        await entered(shelf)
        held.cancel()
        await turns()
        shelf.release.set()
        await finished([held])

        assert held.cancelled()
        assert await finished([start(writer.submit(shelf.apply, "again"))]) == ["AGAIN"]

    async def test_failure_of_a_cancelled_caller_is_nobodys_unhandled_error(
        self, shelf: Shelf, caplog: pytest.LogCaptureFixture
    ) -> None:
        """Planted: the error of the second future is never looked at, and asyncio reports it."""
        writer = shelf.writer()
        held = await hold(shelf, writer)
        shelf.commit_error = UnavailableError("the disk is full")

        held.cancel()
        await turns()
        shelf.release.set()
        await asyncio.wait([held], timeout=PATIENCE)
        assert held.cancelled()
        await writer.close()
        shelf.commit_error = None  # its traceback refers to the future, as does that of the task
        del held
        gc.collect()

        assert [record for record in caplog.records if record.levelno > logging.DEBUG] == []

    async def test_cancelled_caller_does_not_take_others_of_its_batch_along(
        self, shelf: Shelf, writer: Writer
    ) -> None:
        """Planted: the batch's outcomes are delivered only up to the first cancelled caller."""
        held = start(writer.submit(shelf.apply, "hold"))
        others = [start(writer.submit(shelf.apply, word)) for word in "abc"]
        await entered(shelf)

        shelf.release.set()
        assert shelf.published.acquire(timeout=PATIENCE)  # the outcomes lie in the inbox
        held.cancel()

        assert (await finished([held, *others]))[1:] == ["A", "B", "C"]
        assert held.cancelled()
        assert shelf.batches == [["hold", "a", "b", "c"]]


class TestLongQueue:
    async def test_batch_is_bounded_and_everybody_gets_in_at_last(
        self, shelf: Shelf, writer: Writer, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Planted: a batch grows with the callers; or nobody looks at what did not fit."""
        monkeypatch.setattr(group_commit, "MAX_BATCH", 4)
        held = await hold(shelf, writer)

        words = [f"word{number}" for number in range(30)]
        tasks = [start(writer.submit(shelf.apply, word)) for word in words]
        await turns()
        shelf.release.set()
        outcomes = await finished([held, *tasks])

        assert outcomes == ["HOLD", *[word.upper() for word in words]]
        assert [len(batch) for batch in shelf.batches] == [1, *[4] * 7, 2]

    async def test_callers_faster_than_the_disk_wait_and_none_is_refused(
        self, shelf: Shelf, writer: Writer
    ) -> None:
        """Planted: a full queue is an error, or drops the oldest, or lets its callers go on."""
        held = await hold(shelf, writer)

        words = [f"word{number}" for number in range(2 * group_commit.MAX_BATCH + 1)]
        tasks = [start(writer.submit(shelf.apply, word)) for word in words]
        await turns()
        answered_meanwhile = [task for task in tasks if task.done()]
        shelf.release.set()
        outcomes = await finished([held, *tasks])

        assert answered_meanwhile == []
        assert outcomes == ["HOLD", *[word.upper() for word in words]]
        assert [word for batch in shelf.batches for word in batch] == ["hold", *words]

    async def test_operations_of_those_who_gave_up_are_forgotten_before_the_disk_is_done(
        self, shelf: Shelf, writer: Writer
    ) -> None:
        """Planted: what was withdrawn stays in the queue until the batch before it is done."""

        class Operation:
            pass

        held = await hold(shelf, writer)
        stays = [start(writer.submit(shelf.apply, f"early{number}")) for number in range(10)]
        kept: weakref.WeakSet[Operation] = weakref.WeakSet()

        for number in range(1000):  # a caller that tries again and again
            operation = Operation()
            kept.add(operation)
            attempt = start(writer.submit(lambda unit, operations: operations, operation))
            await turns(1)
            attempt.cancel()
            await finished([attempt])
            if number % 100 == 0:
                stays.append(start(writer.submit(shelf.apply, f"late{number}")))
        del attempt, operation
        gc.collect()
        kept_meanwhile = len(kept)
        shelf.release.set()
        await finished([held, *stays])

        assert kept_meanwhile <= 20  # as many as wait
        late = [f"late{number}" for number in range(0, 1000, 100)]
        assert shelf.batches[1] == [*[f"early{number}" for number in range(10)], *late]

    async def test_thread_is_not_behind_with_what_wakes_it(
        self, shelf: Shelf, writer: Writer
    ) -> None:
        """Planted: each commit takes one token, however many came meanwhile, and they pile up."""
        left: list[int] = []

        def look(unit: WriteTransaction, operations: Sequence[str]) -> Sequence[str]:
            left.append(writer._tokens.qsize())
            return operations

        held = await hold(shelf, writer)
        tasks = []
        for number in range(10):
            tasks.append(start(writer.submit(look, f"word{number}")))
            await turns()
        shelf.release.set()
        await finished([held, *tasks])

        assert left == [0]

    async def test_first_come_is_first_served(
        self, shelf: Shelf, writer: Writer, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Planted: who does not fit into a batch asks again, and others ask before it."""
        monkeypatch.setattr(group_commit, "MAX_BATCH", 1)
        tasks = [start(writer.submit(shelf.apply, "hold"))]
        await entered(shelf)
        words = [f"early{number}" for number in range(5)]
        tasks += [start(writer.submit(shelf.apply, word)) for word in words]
        await turns()
        late = [f"late{number}" for number in range(5)]

        async def come_later() -> None:
            await tasks[1]
            await finished([start(writer.submit(shelf.apply, word)) for word in late])

        tasks.append(start(come_later()))
        shelf.release.set()
        await finished(tasks)

        assert [word for batch in shelf.batches for word in batch] == ["hold", *words, *late]

    async def test_caller_cancelled_behind_a_full_batch_leaves_no_trace(
        self,
        shelf: Shelf,
        writer: Writer,
        monkeypatch: pytest.MonkeyPatch,
        caplog: pytest.LogCaptureFixture,
    ) -> None:
        """Planted: those who do not fit are committed though they were cancelled."""
        monkeypatch.setattr(group_commit, "MAX_BATCH", 1)
        held = await hold(shelf, writer)
        tasks = [start(writer.submit(shelf.apply, word)) for word in "abc"]
        await turns()

        tasks[1].cancel()
        await asyncio.wait([tasks[1]], timeout=PATIENCE)
        shelf.release.set()
        outcomes = await finished([held, tasks[0], tasks[2]])

        assert outcomes == ["HOLD", "A", "C"]
        assert [word for batch in shelf.batches for word in batch] == ["hold", "a", "c"]
        assert [record for record in caplog.records if record.levelno > logging.DEBUG] == []

    async def test_full_batch_of_which_all_were_cancelled_does_not_strand_those_behind(
        self, shelf: Shelf, writer: Writer, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Planted: the thread that finds nothing to commit waits to be woken again."""
        monkeypatch.setattr(group_commit, "MAX_BATCH", 4)
        held = await hold(shelf, writer)
        gone = [start(writer.submit(shelf.apply, word)) for word in "abcd"]
        stays = start(writer.submit(shelf.apply, "stays"))
        await turns()

        for task in gone:
            task.cancel()
        await finished(gone)
        shelf.release.set()
        outcomes = await finished([held, stays])

        assert outcomes == ["HOLD", "STAYS"]
        assert shelf.batches == [["hold"], ["stays"]]

    @ends_the_thread
    async def test_end_of_the_thread_does_not_strand_those_behind_a_full_batch(
        self, shelf: Shelf, writer: Writer, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Planted: a thread that ends leaves those who did not fit without anybody."""
        monkeypatch.setattr(group_commit, "MAX_BATCH", 1)

        fatal = start(writer.submit(shelf.apply_and_exit, "hold"))
        await entered(shelf)
        tasks = [start(writer.submit(shelf.apply, word)) for word in "abc"]
        await turns()
        shelf.release.set()
        outcomes = await finished([fatal, *tasks])

        assert isinstance(outcomes[0], UnavailableError)
        assert outcomes[1:] == ["A", "B", "C"]

    @ends_the_thread
    async def test_end_of_the_thread_does_not_strand_those_nobody_will_wake_it_for(
        self, shelf: Shelf, writer: Writer, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Planted: the thread that takes over waits to be woken."""
        monkeypatch.setattr(group_commit, "MAX_BATCH", 1)

        words = ("exit", "a", "b")  # the thread is woken once for all of them
        outcomes = await finished([start(writer.submit(shelf.apply, word)) for word in words])

        assert isinstance(outcomes[0], UnavailableError)
        assert outcomes[1:] == ["A", "B"]

    async def test_batch_that_is_done_is_forgotten(self, shelf: Shelf, writer: Writer) -> None:
        """Planted: the thread keeps its last batch until the next one comes."""

        class Operation:
            pass

        operation = Operation()
        is_kept = weakref.ref(operation)

        await writer.submit(lambda unit, operations: operations, operation)
        del operation

        await until(lambda: is_kept() is None)


class TestLoops:
    async def test_caller_on_another_loop_is_answered_on_that_loop(
        self, shelf: Shelf, writer: Writer
    ) -> None:
        """Planted: outcomes are set from the writer's thread, which wakes no loop."""
        held = await hold(shelf, writer)

        async def elsewhere() -> tuple[Any, bool]:
            thread = threading.get_ident()
            result = await writer.submit(shelf.apply, "elsewhere")
            return result, threading.get_ident() == thread

        other = InThread(elsewhere)
        shelf.release.set()
        result = await asyncio.wait_for(other.join(), PATIENCE)

        assert result == ("ELSEWHERE", True)
        assert await held == "HOLD"

    async def test_caller_on_another_loop_is_answered_while_this_one_is_blocked(
        self, shelf: Shelf, writer: Writer
    ) -> None:
        """Planted: all callers are answered by way of the loop that came first."""
        await writer.submit(shelf.apply, "here first")

        other = InThread(lambda: writer.submit(shelf.apply, "elsewhere"))
        result = other.block()

        assert result == "ELSEWHERE"

    async def test_caller_is_answered_while_another_loop_has_yet_to_wake_the_thread(
        self, shelf: Shelf, writer: Writer
    ) -> None:
        """Planted: one mark for all loops tells that the thread is about to be woken."""
        results: list[Any] = []

        def block() -> None:
            results.append(InThread(lambda: writer.submit(shelf.apply, "elsewhere")).block())

        here = start(writer.submit(shelf.apply, "here"))
        asyncio.get_running_loop().call_soon(block)  # before what wakes the thread
        await turns(2)

        assert results == ["ELSEWHERE"]
        assert await finished([here]) == ["HERE"]

    async def test_callers_of_a_loop_that_was_closed_harm_nobody(
        self, shelf: Shelf, writer: Writer
    ) -> None:
        """Planted: answering a closed loop raises on the thread, before the others are told."""
        told: list[str] = []

        def ask_and_close() -> None:
            loop = asyncio.new_event_loop()
            writer.listen(loop, told.extend)
            task = loop.create_task(writer.submit(shelf.apply, "hold"))
            loop.call_soon(loop.call_soon, loop.stop)
            loop.run_forever()
            assert shelf.entered.wait(PATIENCE)
            loop.close()
            # A task dropped half-way, of which nothing shall be said.
            task._log_destroy_pending = False  # type: ignore[attr-defined]  # asyncio's own
            task.get_coro().close()

        await asyncio.to_thread(ask_and_close)
        here = start(writer.submit(shelf.apply, "here"))
        await turns()
        shelf.release.set()

        assert await finished([here]) == ["HERE"]
        assert shelf.batches == [["hold"], ["here"]]
        assert told == []

    async def test_caller_cancelled_on_a_loop_that_was_closed_harms_nobody(
        self, shelf: Shelf, writer: Writer
    ) -> None:
        """Planted: letting go a caller of a closed loop raises, and the others wait for ever."""

        def ask_cancel_and_close() -> None:
            loop = asyncio.new_event_loop()
            task = loop.create_task(writer.submit(shelf.apply, "hold"))
            loop.run_until_complete(asyncio.to_thread(shelf.entered.wait, PATIENCE))
            task.cancel()
            loop.run_until_complete(turns())
            loop.run_until_complete(loop.shutdown_default_executor())
            loop.close()
            # A task dropped half-way, of which nothing shall be said.
            task._log_destroy_pending = False  # type: ignore[attr-defined]  # asyncio's own

        await asyncio.to_thread(ask_cancel_and_close)
        here = start(writer.submit(shelf.apply, "here"))
        await turns()
        shelf.release.set()

        assert await finished([here]) == ["HERE"]
        assert shelf.stopped == 0  # the thread has not ended of it

    async def test_listener_is_told_on_its_own_loop(self, shelf: Shelf, writer: Writer) -> None:
        """Planted: all listeners are told on the loop of the caller."""
        threads: list[int] = []
        listening, enough = threading.Event(), threading.Event()

        def listener(committed: Sequence[Any]) -> None:
            threads.append(threading.get_ident())
            enough.set()

        async def listen() -> int:
            unlisten = writer.listen(asyncio.get_running_loop(), listener)
            listening.set()
            await asyncio.to_thread(enough.wait, PATIENCE)
            unlisten()
            return threading.get_ident()

        other = InThread(listen)
        await asyncio.to_thread(listening.wait, PATIENCE)
        await writer.submit(shelf.apply, "here")

        assert [await other.join()] == threads


class TestListeners:
    async def test_listeners_are_told_in_order_and_before_callers_wake(
        self, shelf: Shelf, writer: Writer
    ) -> None:
        """Planted: callers are answered first, and read a cache that lacks their own write."""
        told: list[str] = []
        writer.listen(asyncio.get_running_loop(), told.extend)
        seen: list[list[str]] = []

        async def write(word: str) -> None:
            await writer.submit(shelf.apply, word)
            seen.append([word, *(other for other in told if other == word)])

        for letters in ("abc", "def", "ghi"):
            await asyncio.gather(*[write(letter) for letter in letters])

        assert told == list("abcdefghi")
        assert seen == [[letter, letter] for letter in "abcdefghi"]

    async def test_refused_operations_are_not_told(self, shelf: Shelf, writer: Writer) -> None:
        """Planted: listeners are told what was submitted."""
        told: list[Sequence[str]] = []
        writer.listen(asyncio.get_running_loop(), told.append)

        await finished([start(writer.submit(shelf.apply, word)) for word in ("a", "refuse", "b")])
        await finished([start(writer.submit(shelf.apply, "refuse"))])
        await finished([start(writer.submit(shelf.apply, "explode"))])

        assert told == [["a", "b"]]

    async def test_listener_that_fails_harms_neither_callers_nor_listeners(
        self, shelf: Shelf, writer: Writer
    ) -> None:
        """Planted: what a listener raises ends the delivery."""
        loop = asyncio.get_running_loop()
        reported: list[Any] = []
        loop.set_exception_handler(lambda _, context: reported.append(context["exception"]))
        told: list[str] = []
        error = RuntimeError("a bug in the listener")

        def broken(committed: Sequence[Any]) -> None:
            raise error

        writer.listen(loop, broken)
        writer.listen(loop, told.extend)
        outcomes = await finished([start(writer.submit(shelf.apply, word)) for word in "ab"])

        assert outcomes == ["A", "B"]
        assert told == ["a", "b"]
        assert reported == [error]

    async def test_listener_that_ended_is_told_no_more(self, shelf: Shelf, writer: Writer) -> None:
        """Planted: `unlisten` does nothing."""
        told: list[str] = []
        unlisten = writer.listen(asyncio.get_running_loop(), told.extend)
        writer.listen(asyncio.get_running_loop(), told.extend)

        await writer.submit(shelf.apply, "a")
        unlisten()
        await writer.submit(shelf.apply, "b")

        assert told == ["a", "a", "b"]


class TestFigures:
    async def test_they_count_batches_and_what_was_in_them(
        self, shelf: Shelf, writer: Writer
    ) -> None:
        """Planted: a batch counts as one operation; or those still queued count as committed."""
        held = await hold(shelf, writer)
        tasks = [start(writer.submit(shelf.apply, word)) for word in ("a", "refuse", "c")]
        await turns()
        before = writer.figures()
        shelf.release.set()
        await finished([held, *tasks])
        after = writer.figures()

        assert (before["queued_operations"], before["batches"], before["operations"]) == (3, 0, 0)
        assert (after["queued_operations"], after["batches"], after["operations"]) == (0, 2, 4)
        assert (after["mean_batch"], after["largest_batch"]) == (2.0, 3)

    async def test_seconds_are_those_until_a_batch_is_committed(
        self, shelf: Shelf, writer: Writer, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Planted: they are measured before the commit; or p50 is the mean, or p99 the maximum."""
        now = 0.0
        monkeypatch.setattr(group_commit, "perf_counter", lambda: now)

        def take_seconds(unit: WriteTransaction, operations: Sequence[float]) -> Sequence[float]:
            def finish() -> None:
                nonlocal now
                now += sum(operations)

            unit.unit_of_work = SimpleNamespace(finish=finish)
            return operations

        for seconds in (5, *[2] * 149, *[3] * 48, 4, 1):
            await writer.submit(take_seconds, seconds)
        figures = writer.figures()

        assert figures["commit_seconds_p50"] == 2
        assert figures["commit_seconds_p99"] == 3
        assert figures["commit_seconds_max"] == 5

    async def test_they_forget_all_but_the_last_batches(
        self, shelf: Shelf, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Planted: the writer keeps a line for every batch there ever was."""
        monkeypatch.setattr(metrics, "RECENT_BATCHES", 2)
        writer = shelf.writer()
        await asyncio.gather(*[writer.submit(shelf.apply, word) for word in "abc"])
        largest = writer.figures()["largest_batch"]
        for word in "de":
            await writer.submit(shelf.apply, word)

        figures = writer.figures()

        assert largest == 3
        assert (figures["mean_batch"], figures["largest_batch"]) == (1.0, 1)
        assert (figures["batches"], figures["operations"]) == (3, 5)
        await writer.close()

    async def test_failure_is_that_of_a_batch_not_of_an_operation(
        self, shelf: Shelf, writer: Writer
    ) -> None:
        """Planted: what one caller did wrong counts as a failure of the database."""
        await finished([start(writer.submit(shelf.apply, word)) for word in ("explode", "refuse")])
        before = writer.figures()
        shelf.commit_error = UnavailableError("the disk is full")
        await finished([start(writer.submit(shelf.apply, word)) for word in "ab"])
        after = writer.figures()

        assert (before["failed_batches"], before["last_failure"]) == (0, None)
        assert after["failed_batches"] == 1
        assert after["last_failure"] == "UnavailableError: the disk is full"
        assert after["last_failure_at"] == NOON
        assert after["operations"] == before["operations"]

    @ends_the_thread
    async def test_end_of_the_thread_is_a_failure(self, shelf: Shelf, writer: Writer) -> None:

        await finished([start(writer.submit(shelf.apply, "exit"))])

        assert writer.figures()["last_failure"] == "SystemExit: "


class TestClose:
    async def test_close_commits_what_has_queued_and_refuses_what_comes_later(
        self, shelf: Shelf
    ) -> None:
        """Planted: the thread ends at once and strands the queue; or it takes new operations."""
        writer = shelf.writer()
        held = await hold(shelf, writer)
        queued = start(writer.submit(shelf.apply, "queued"))
        await turns()

        closing = start(writer.close())
        await turns()
        with pytest.raises(UnavailableError, match="closed"):
            await writer.submit(shelf.apply, "too late")
        shelf.release.set()

        assert await finished([held, queued, closing]) == ["HOLD", "QUEUED", None]
        assert shelf.batches == [["hold"], ["queued"]]
        assert shelf.stopped == 1

    async def test_close_commits_what_fills_several_batches(
        self, shelf: Shelf, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Planted: a closing thread commits one more batch and no more."""
        monkeypatch.setattr(group_commit, "MAX_BATCH", 1)
        writer = shelf.writer()
        held = await hold(shelf, writer)
        tasks = [start(writer.submit(shelf.apply, word)) for word in "abc"]
        await turns()

        closing = start(writer.close())
        await turns()
        shelf.release.set()
        outcomes = await finished([held, *tasks, closing])

        assert outcomes == ["HOLD", "A", "B", "C", None]

    async def test_close_in_the_turn_of_the_first_operation_commits_it(self, shelf: Shelf) -> None:
        """Planted: `close` returns when there is no thread, whatever has queued."""
        writer = shelf.writer()
        first = start(writer.submit(shelf.apply, "first"))
        closing = start(writer.close())

        assert await finished([closing, first]) == [None, "FIRST"]
        assert shelf.batches == [["first"]]
        assert shelf.stopped == 1

    async def test_close_ends_the_thread_though_a_loop_ended_before_it_could_wake_it(
        self, shelf: Shelf
    ) -> None:
        """Planted: the thread that has committed all, while closing, waits to be woken again."""
        writer = shelf.writer()

        def ask_and_stop() -> None:
            loop = asyncio.new_event_loop()
            task = loop.create_task(writer.submit(shelf.apply, "dropped"))
            loop.call_soon(loop.stop)
            loop.run_forever()
            loop.close()
            # A task dropped half-way, of which nothing shall be said.
            task._log_destroy_pending = False  # type: ignore[attr-defined]  # asyncio's own
            task.get_coro().close()

        await asyncio.to_thread(ask_and_stop)

        assert await finished([start(writer.close())]) == [None]
        assert shelf.batches == [["dropped"]]

    async def test_operation_that_queues_behind_the_end_is_refused(self, shelf: Shelf) -> None:
        """Planted: what another loop puts into the queue, while it closes, is never answered."""
        writer = shelf.writer()
        writer._queue = LateQueue(lambda: InThread(writer.close).block())

        [error] = await finished([start(writer.submit(shelf.apply, "late"))])

        assert isinstance(error, UnavailableError)
        assert "closed" in str(error)
        assert shelf.batches == []

    async def test_thread_that_cannot_be_started_is_told_to_all_and_tried_again(
        self, shelf: Shelf, writer: Writer, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Planted: the error ends in the event loop, and the callers wait for ever."""

        def fail(thread: threading.Thread) -> None:
            raise RuntimeError("can't start new thread")

        with monkeypatch.context() as exhausted:
            exhausted.setattr(threading.Thread, "start", fail)
            errors = await finished([start(writer.submit(shelf.apply, word)) for word in "ab"])

        assert [type(error) for error in errors] == [UnavailableError] * 2
        assert "can't start new thread" in str(errors[0])
        assert await writer.submit(shelf.apply, "c") == "C"
        assert shelf.batches == [["c"]]

    async def test_close_twice_and_close_unused_are_harmless(self, shelf: Shelf) -> None:
        """Planted: the second `close` waits for a thread that has ended."""
        unused, used = shelf.writer(), shelf.writer()
        await used.submit(shelf.apply, "a")

        assert await finished([start(unused.close()), start(unused.close())]) == [None, None]
        assert await finished([start(used.close()), start(used.close())]) == [None, None]
        assert await finished([start(used.close())]) == [None]
        assert shelf.stopped == 1

    async def test_cancelled_close_harms_the_thread_no_more_than_any_caller(
        self, shelf: Shelf
    ) -> None:
        """Planted: cancelling `close` cancels what the thread is to report its end to."""
        writer = shelf.writer()
        held = await hold(shelf, writer)
        closing = start(writer.close())
        await turns()

        closing.cancel()
        await turns()
        shelf.release.set()

        assert await finished([held]) == ["HOLD"]
        await finished([start(writer.close())])
        await until(lambda: shelf.stopped == 1)


class TestGate:
    async def test_threads_and_coroutines_are_let_in_in_the_order_in_which_they_came(self) -> None:
        """Planted: the last one that came is let in first; or threads go before coroutines."""
        gate = FairLock(PATIENCE)
        order: list[int] = []
        inside = 0

        def pass_through(number: int) -> None:
            nonlocal inside
            inside += 1
            assert inside == 1
            order.append(number)
            inside -= 1

        def from_thread(number: int) -> None:
            gate.acquire(f"thread {number}")
            pass_through(number)
            gate.release()

        async def from_coroutine(number: int) -> None:
            await gate.acquire_async(f"coroutine {number}")
            pass_through(number)
            gate.release()

        await gate.acquire_async("the first")
        comers: list[Awaitable[None]] = []
        for number in range(8):
            if number % 2:
                comers.append(asyncio.ensure_future(asyncio.to_thread(from_thread, number)))
            else:
                comers.append(start(from_coroutine(number)))
            await until(lambda: len(gate._waiting) == len(comers))
        gate.release()
        await asyncio.gather(*comers)

        assert order == list(range(8))

    async def test_one_that_gave_up_is_passed_over(self) -> None:
        """Planted: a cancelled waiter keeps its place, and is let in though it has gone."""
        gate = FairLock(PATIENCE)
        await gate.acquire_async("the first")
        gone, next_one = start(gate.acquire_async("gone")), start(gate.acquire_async("next"))
        await turns()

        gone.cancel()
        await turns()
        gate.release()
        await finished([gone, next_one])

        assert gone.cancelled()
        assert not next_one.cancelled()
        gate.release()
        await asyncio.wait_for(gate.acquire_async("the last"), PATIENCE)
        gate.release()

    async def test_one_that_is_cancelled_as_its_turn_comes_passes_it_on(self) -> None:
        """Planted: `_abandon` only looks among those who wait, and the gate stays shut."""
        gate = FairLock(PATIENCE)
        await gate.acquire_async("the first")
        gone, next_one = start(gate.acquire_async("gone")), start(gate.acquire_async("next"))
        await turns()

        gate.release()  # lets `gone` in, who does not know yet
        gone.cancel()
        await finished([gone, next_one])

        assert gone.cancelled()
        assert not next_one.cancelled()
        gate.release()

    async def test_those_whose_event_loop_stands_still_are_passed_over(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Those behind them got a `DeadlineError`."""
        monkeypatch.setattr(FairLock, "_ENTRY_SECONDS", 0.05)
        gate = FairLock(PATIENCE)
        order: list[str] = []

        async def from_coroutine(name: str) -> None:
            await gate.acquire_async(name)
            order.append(name)
            gate.release()

        def from_thread(name: str) -> None:
            gate.acquire(name)
            order.append(name)
            gate.release()

        names = ["slow", "slow, too", "slow, and cancelled"]
        slow = [partial(from_coroutine, name) for name in names]
        await gate.acquire_async("the first")
        async with standing_still(*slow, cancelled=1) as (go_on, other):
            behind = [
                start(from_coroutine("behind")),
                start(asyncio.to_thread(from_thread, "behind, on a thread")),
            ]
            await until(lambda: len(gate._waiting) == 5)
            gate.release()
            assert await finished(behind) == [None, None]
            await gate.acquire_async("who comes later")
            go_on.set()
            await until(lambda: len(gate._waiting) == 2)
            order.append("who came later")
            gate.release()
            await other.join()

        assert set(order[:2]) == {"behind", "behind, on a thread"}
        assert order[2:] == ["who came later", "slow", "slow, too"]

    async def test_those_who_wait_for_less_than_that_pass_over_it_in_time(self) -> None:
        """They got a `DeadlineError`."""
        gate = FairLock(1)
        await gate.acquire_async("the first")
        async with standing_still(partial(gate.acquire_async, "slow"), cancelled=1) as (
            go_on,
            other,
        ):
            gate.release()

            await asyncio.wait_for(gate.acquire_async("behind"), PATIENCE)

            go_on.set()
            await other.join()
        gate.release()

    async def test_one_that_was_passed_over_gets_an_error_of_its_own(
        self, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Planted: it waits for ever for a turn that it has had."""
        monkeypatch.setattr(FairLock, "_ENTRY_SECONDS", 0)
        gate, came_at = FairLock(0.2), time.monotonic()
        await gate.acquire_async("the first")
        async with standing_still(partial(gate.acquire_async, "slow")) as (go_on, other):
            gate.release()
            await gate.acquire_async("the second")
            await until(lambda: time.monotonic() > came_at + 0.5)
            go_on.set()

            [error] = await other.join()
        assert isinstance(error, DeadlineError)
        assert "while the second has had the database" in str(error)
        gate.release()
        await asyncio.wait_for(gate.acquire_async("the last"), PATIENCE)
        gate.release()

    async def test_error_of_one_that_waits_in_vain_names_the_holder_and_how_long(self) -> None:
        """Planted: the error says only that time is up."""
        gate = FairLock(0.01)
        await gate.acquire_async("a vacuum")

        with pytest.raises(DeadlineError, match=r"while a vacuum has had the database for \d+\.\d"):
            await gate.acquire_async("a transaction")
        with pytest.raises(DeadlineError, match=r"while a vacuum has had the database for \d+\.\d"):
            gate.acquire("the writer")
        gate.release()
        await gate.acquire_async("who comes next")
        gate.release()


@pytest.fixture
async def ticking(location: Location) -> Any:
    """A database whose clock moves with each look, so that each transaction has its moment."""
    ticks = count()
    clock = lambda: NOON + timedelta(seconds=next(ticks))  # noqa: E731
    async with Database(location, clock=clock) as database:
        yield database


@pytest.mark.usefixtures("migrated")
class TestOnADatabase:
    async def test_tasks_created_together_are_one_transaction(
        self, ticking: Database, make_task: MakeTask
    ) -> None:
        repository = TaskRepository(ticking)
        tasks = [make_task() for _ in range(64)]

        await asyncio.gather(*[repository.create(task) for task in tasks])

        assert len({task.updated_at for task in tasks}) == 1
        assert sorted(task.version for task in tasks) == list(range(1, 65))

    async def test_duplicate_leaves_the_rest_of_its_batch_committed(
        self, ticking: Database, make_task: MakeTask
    ) -> None:
        repository = TaskRepository(ticking)
        tasks = [make_task(task_id=id) for id in ("a", "b", "a", "c")]

        outcomes = await finished([start(repository.create(task)) for task in tasks])

        assert [outcomes[0], outcomes[1], outcomes[3]] == [True, True, True]
        assert isinstance(outcomes[2], DuplicateError)
        assert await repository.count_by_status() == 3
        assert [tasks[0].version, tasks[1].version, tasks[3].version] == [1, 2, 3]

    async def test_two_operations_on_one_row_keep_their_order_in_one_batch(
        self, ticking: Database, make_task: MakeTask
    ) -> None:
        """Planted: of several writes of one row in a batch the first one is what is stored."""
        repository = TaskRepository(ticking)
        task = make_task(task_id="one", name="zero")
        await repository.create(task)
        first, second = await repository.get("one"), await repository.get("one")
        assert first is not None
        assert second is not None
        first.name, second.name = "first", "second"

        outcomes = await finished(
            [
                start(repository.update(first)),
                start(repository.update(second)),
                start(repository.delete("one")),
                start(repository.create(make_task(task_id="one", name="third"))),
                start(repository.create(make_task(task_id="one", name="fourth"))),
            ]
        )

        assert outcomes[0] is outcomes[2] is outcomes[3] is True
        assert isinstance(outcomes[1], StaleVersionError)
        assert isinstance(outcomes[4], DuplicateError)
        stored = await repository.get("one")
        assert stored is not None
        assert (stored.name, stored.version) == ("third", 4)

    async def test_last_of_two_writes_of_one_row_in_a_batch_is_what_is_stored(
        self, ticking: Database, make_task: MakeTask
    ) -> None:
        """Planted: a row is stored as its first write in the batch left it."""
        repository = TaskRepository(ticking)
        await repository.create(make_task(task_id="one", name="zero"))
        first = await repository.get("one")
        assert first is not None
        first.name, first.error = "first", "first"

        await asyncio.gather(repository.update(first), repository.cancel("one", "second"))

        stored = await repository.get("one")
        assert stored is not None
        assert (stored.name, stored.error, stored.version) == ("first", "second", 3)
        assert ticking._writer.figures()["batches"] == 2

    async def test_writes_of_different_fields_of_one_row_in_a_batch_are_all_stored(
        self, ticking: Database, make_node: MakeNode
    ) -> None:
        """Planted: of a row only the fields of the last write in the batch are stored."""
        repository = NodeRepository(ticking)
        await repository.create(make_node(node_id="one"))

        await asyncio.gather(
            repository.update_status("one", NodeStatus.BUSY),  # which is a sign of life
            repository.update_status("one", NodeStatus.OFFLINE),
        )

        stored = await repository.get("one")
        assert stored is not None
        assert stored.status is NodeStatus.OFFLINE
        assert stored.last_heartbeat is not None

    async def test_row_that_is_removed_and_created_again_in_a_batch_is_one_transaction(
        self, ticking: Database, make_task: MakeTask
    ) -> None:
        """Planted: rows are added before others are removed, which fails, and halves hide it."""
        repository = TaskRepository(ticking)
        await repository.create(make_task(task_id="one", name="old"))

        await asyncio.gather(
            repository.delete("one"), repository.create(make_task(task_id="one", name="new"))
        )

        stored = await repository.get("one")
        assert stored is not None
        assert (stored.name, stored.version) == ("new", 3)
        assert ticking._writer.figures()["batches"] == 2

    async def test_different_kinds_of_operations_in_a_batch_share_its_revisions(
        self, ticking: Database, make_task: MakeTask
    ) -> None:
        """Planted: each run of a batch counts the revisions from what is stored."""
        repository = TaskRepository(ticking)
        tasks = [make_task() for _ in range(2)]

        await asyncio.gather(
            repository.create(tasks[0]), repository.cleanup_old_tasks(), repository.create(tasks[1])
        )

        assert [task.version for task in tasks] == [1, 2]
        assert ticking._writer.figures()["batches"] == 1

    async def test_row_that_the_driver_refuses_fails_none_but_its_caller(
        self, ticking: Database, location: Location, make_task: MakeTask
    ) -> None:
        refuse_tasks(location, "bad")
        repository = TaskRepository(ticking)
        names = ["a", "b", "bad", "c", "d"]

        tasks = [make_task(task_id=name, name=name) for name in names]
        outcomes = await finished([start(repository.create(task)) for task in tasks])

        assert isinstance(outcomes[2], InvalidDataError)
        assert [outcome for outcome in outcomes if outcome is True] == [True] * 4
        assert sorted(task.version for task in tasks if task.name != "bad") == [1, 2, 3, 4]
        assert await repository.count_by_status() == 4

    @ends_the_thread
    async def test_writer_goes_on_after_its_thread_has_ended(
        self, ticking: Database, make_task: MakeTask
    ) -> None:
        repository = TaskRepository(ticking)
        await repository.create(make_task(task_id="before"))

        def end(unit: WriteTransaction, operations: Sequence[Any]) -> Sequence[Any]:
            unit.cursor.execute(f"DELETE FROM {qualified(unit.cursor.schema, 'tasks')}")
            raise SystemExit

        with pytest.raises(UnavailableError):
            await asyncio.wait_for(ticking.write(end, None), PATIENCE)
        await asyncio.wait_for(repository.create(make_task(task_id="after")), PATIENCE)

        stored = {task.task_id for task in await repository.list_pending_tasks()}
        assert stored == {"before", "after"}

    async def test_writes_from_two_loops_share_the_writer(
        self, ticking: Database, make_task: MakeTask
    ) -> None:
        repository = TaskRepository(ticking)
        mine, theirs = ([make_task() for _ in range(200)] for _ in range(2))

        async def write(tasks: Sequence[Any]) -> None:
            for at in range(0, len(tasks), 20):
                await asyncio.gather(*[repository.create(task) for task in tasks[at : at + 20]])

        other = InThread(lambda: write(theirs))
        await write(mine)
        await other.join()

        assert sorted(task.version for task in [*mine, *theirs]) == list(range(1, 401))
        assert await repository.count_by_status() == 400

    async def test_transactions_and_the_writer_take_turns(
        self, ticking: Database, make_task: MakeTask
    ) -> None:
        repository = TaskRepository(ticking)
        told: list[int] = []
        unlisten = ticking.listen(
            lambda committed: told.extend(event.change.revision for event in committed)
        )

        async def in_a_transaction(number: int) -> None:
            async with ticking.transaction() as session:
                await TaskRepository(session).create(make_task(task_id=f"t{number}"))

        async def by_the_writer(number: int) -> None:
            await repository.create(make_task(task_id=f"w{number}"))

        await asyncio.gather(
            *[work(number) for number in range(25) for work in (in_a_transaction, by_the_writer)]
        )
        unlisten()

        assert told == list(range(1, 51))

    async def test_listeners_are_told_of_the_writer_and_of_transactions_in_order_of_commits(
        self, ticking: Database, make_task: MakeTask, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Planted: the writer publishes when the next one may write."""
        told: list[str] = []
        unlisten = ticking.listen(lambda committed: told.extend(event.id for event in committed))
        writing, committed = threading.Event(), threading.Event()
        publish = ticking._writer.publish

        def publish_slowly(*arguments: Any) -> None:
            if threading.current_thread() is not threading.main_thread():
                writing.set()
                committed.wait(0.2)
            publish(*arguments)

        monkeypatch.setattr(ticking._writer, "publish", publish_slowly)
        first = start(TaskRepository(ticking).create(make_task(task_id="first")))
        assert await asyncio.to_thread(writing.wait, PATIENCE)
        async with ticking.transaction() as session:
            await TaskRepository(session).create(make_task(task_id="second"))
        committed.set()
        await first
        unlisten()

        assert told == ["first", "second"]

    async def test_callers_get_their_answers_while_the_next_batch_waits_for_its_turn(
        self, database: Database, make_task: MakeTask
    ) -> None:
        """Planted: they wait for a transaction that has begun after their commit."""
        tasks = TaskRepository(database)
        end_before, end_after = asyncio.Event(), asyncio.Event()

        async def hold(end: asyncio.Event) -> None:
            async with database.transaction():
                await end.wait()

        before = start(hold(end_before))
        await until(lambda: database._write_lock._holder)
        first = start(tasks.create(make_task()))
        await until(lambda: len(database._write_lock._waiting) == 1)
        after = start(hold(end_after))
        await until(lambda: len(database._write_lock._waiting) == 2)
        second = start(tasks.create(make_task()))
        await turns()
        end_before.set()

        assert await asyncio.wait_for(asyncio.shield(first), PATIENCE) is True
        assert not after.done()
        assert not second.done()
        end_after.set()
        await finished([before, after, second])

    async def test_error_of_a_writer_that_waits_in_vain_names_the_transaction(
        self, location: Location, database: Database, make_task: MakeTask
    ) -> None:
        async with (
            Database(location, timeout=0.05) as database,
            database.transaction(timeout=3600),
        ):
            waiting = InThread(lambda: TaskRepository(database).create(make_task()))
            with pytest.raises(DeadlineError, match="while a transaction has had the database"):
                await waiting.join()

    async def test_thousand_callers_of_which_many_are_cancelled_lose_nothing(
        self, ticking: Database, make_task: MakeTask
    ) -> None:
        """Whoever was not cancelled is stored; whoever was, is stored wholly or not at all."""
        repository = TaskRepository(ticking)
        tasks = [make_task(task_id=f"{number:04}") for number in range(1000)]
        calls = [start(repository.create(task)) for task in tasks]

        for number in range(0, 1000, 3):
            calls[number].cancel()
            if number % 100 == 0:
                await asyncio.sleep(0)
        outcomes = await finished(calls)

        stored = {task.task_id for task in await repository.list_pending_tasks(limit=None)}
        for number, (task, outcome) in enumerate(zip(tasks, outcomes, strict=True)):
            if number % 3 == 0:
                assert outcome is True or isinstance(outcome, asyncio.CancelledError)
            if outcome is True:
                assert task.task_id in stored
        assert not [outcome for outcome in outcomes if isinstance(outcome, StoreError)]
