"""Group commit: operations that callers submit at the same time share one transaction.

A commit costs a disk flush, whatever its size. So one thread applies *everything* in the queue in
one transaction, then everything that was queued meanwhile: the busier the store, the larger the
batch. There is no timer, and a lone caller does not wait. (See "group commit" in Gray & Reuter,
*Transaction Processing*, 1993.)

Guarantees:

- **Each operation is decided by itself.** A refused one (stale, duplicate, not found) gets its own
  error; the rest of its batch commits.
- **Order.** Operations are applied in the order in which they were queued; on PostgreSQL, the
  claims of a batch come last.
- **A write that returns is committed.** Callers wake after the commit, on their own event loop,
  and after the listeners (the caches) of that loop.
- **Cancelling** a caller withdraws a queued operation; if it is in a batch already, the caller
  waits for the outcome and then raises `CancelledError`.

An operation is any object, submitted with the function that applies a run of such operations.
"""

from __future__ import annotations

import asyncio
import copy
import threading
from collections import defaultdict, deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from itertools import groupby
from operator import itemgetter
from queue import Empty, SimpleQueue
from time import monotonic, perf_counter
from typing import Any

from sqlalchemy.exc import SQLAlchemyError

from openclaw_store.backends import Backend, LockRequiredError, WriteSession, shield_until_done
from openclaw_store.database.metrics import WriteMetrics
from openclaw_store.database.statements import Statements
from openclaw_store.database.telemetry import Telemetry, note_commit
from openclaw_store.database.write_queue import FairLock
from openclaw_store.database.write_transaction import WriteTransaction
from openclaw_store.domain import Clock
from openclaw_store.errors import BackendError, DeadlineError, UnavailableError, logger_of

logger = logger_of("writer")

Apply = Callable[[WriteTransaction, Sequence[Any]], Sequence[Any]]
"""Applies operations in order, and returns a result or an exception for each.

After a rollback it is called again, and must be deterministic.
"""

Listener = Callable[[Sequence[Any]], None]
"""Called on its event loop with the events of each transaction, in the order of commits."""

MAX_BATCH = 8192
"""Largest number of operations in a transaction; the rest stays queued."""

CLOSED = "the database is closed: open a new Database"

_Entry = tuple[asyncio.Future[Any], Apply, Any, float]
"""The future of a caller, its operation with the function that applies it, and its deadline."""

_ATTEMPTS = 8
"""An attempt to lock takes at least an eighth of the timeout: callers may wait longer by that."""

_Answer = tuple[asyncio.Future[Any], Any]
"""The future of a caller, and its result or exception."""


class Writer:
    """Apply submitted operations on one thread; all that have queued share a transaction.

    Args:
        backend: The engine; its write session belongs to the thread.
        write_lock: The lock that admits one writer of this process at a time.
        clock: Returns the time that a transaction stamps.
        timeout: Seconds that an operation waits for the fair lock and for locks of other processes.
        statements: The statements of the database.
    """

    def __init__(
        self,
        backend: Backend,
        write_lock: FairLock,
        clock: Clock,
        timeout: float,
        statements: Statements,
    ) -> None:
        self._backend = backend
        self._write_lock = write_lock
        self._clock = clock
        self._timeout = timeout
        self.statements = statements
        """Replaced when the database is opened with keys."""
        self._session: WriteSession | None = None  # opened, used and closed on the thread
        self._metrics = WriteMetrics(clock)
        self.telemetry: tuple[Telemetry, ...] = ()
        self.idle_seconds: float | None = None
        """Time without a write after which the connection is closed; `None` for never."""
        # Protects the left end of the queue, and changes of `_withdrawn`, `_taken`, `_gone`,
        # `_listeners`, `_ended` and `_closed`. It is held for moments, never during I/O.
        self._lock = threading.Lock()
        self._queue: deque[_Entry] = deque()
        self._withdrawn = 0  # cancelled entries in the queue, about
        self._taken: dict[asyncio.Future[Any], _Entry] = {}  # in a batch, not answered yet
        self._gone: dict[asyncio.Future[Any], asyncio.Future[None]] = {}  # cancelled among them
        self._tokens: SimpleQueue[None] = SimpleQueue()  # each makes the thread take one batch
        # Loops that will call `_kick`; each adds and removes only itself, so no lock is needed.
        self._kicking: set[asyncio.AbstractEventLoop] = set()
        self._listeners: list[tuple[asyncio.AbstractEventLoop, Listener]] = []
        self._ended: Future[None] | None = None  # done at the end of the thread; `None` without one
        self._closed = False

    async def submit(self, apply: Apply, operation: Any) -> Any:
        """Apply an operation; return its result after the commit.

        Raises:
            StoreError: The refusal of the operation, or the failure of the batch.
            UnavailableError: If the writer is closed.
        """
        if self._closed:  # read without the lock: `_kick` refuses what is queued after `close`
            raise UnavailableError(CLOSED)
        loop = asyncio.get_running_loop()
        future = loop.create_future()
        entry = (future, apply, operation, monotonic() + self._timeout)
        self._queue.append(entry)  # atomic, so the costly lock is not needed
        if loop not in self._kicking:
            # The callback runs after all callers that this iteration of the loop wakes, so that
            # they share a batch; a lone caller is not delayed.
            self._kicking.add(loop)
            loop.call_soon(self._kick, loop)
        try:
            return await future
        except asyncio.CancelledError:
            await self._withdraw(future)
            raise

    def operations_under_way(self) -> int:
        """Return the number of operations that are queued or in a batch."""
        return len(self._queue) + len(self._taken)

    def figures(self) -> dict[str, Any]:
        """Return the metrics for `Database.get_stats`."""
        return {"queued_operations": len(self._queue), **self._metrics.figures()}

    def listen(self, loop: asyncio.AbstractEventLoop, listener: Listener) -> Callable[[], None]:
        """Call `listener` on `loop` with all later events; return the function that ends it."""
        subscription = (loop, listener)
        with self._lock:
            self._listeners = [*self._listeners, subscription]

        def unlisten() -> None:
            with self._lock:
                self._listeners = [one for one in self._listeners if one is not subscription]

        return unlisten

    def publish(
        self,
        committed: Sequence[Any],
        entries: Sequence[_Entry] = (),
        outcomes: Sequence[Any] = (),
    ) -> None:
        """Call the listeners of each loop, then wake its callers, with one callback for each loop.

        Must be called before the next transaction begins: events are in the order of commits.
        """
        listeners: defaultdict[asyncio.AbstractEventLoop, list[Listener]] = defaultdict(list)
        answers: defaultdict[asyncio.AbstractEventLoop, list[_Answer]] = defaultdict(list)
        if committed:
            for loop, listener in self._listeners:
                listeners[loop].append(listener)
        for (future, *_), outcome in zip(entries, outcomes, strict=True):
            answers[future.get_loop()].append((future, outcome))
        for loop in {**listeners, **answers}:
            try:
                loop.call_soon_threadsafe(_deliver, listeners[loop], committed, answers[loop])
            except RuntimeError:  # the loop was closed, and its callers with it
                logger.debug("an event loop closed before its writes were acknowledged")
        # Only now: `_withdraw` takes a missing entry for one whose callback is scheduled.
        with self._lock:
            for future, *_ in entries:
                self._taken.pop(future, None)
            gone = [self._gone.pop(future) for future, *_ in entries if future in self._gone]
        for done in gone:
            _wake(done)

    async def close(self) -> None:
        """Commit the queue, refuse later operations, and end the thread."""
        with self._lock:
            self._closed = True
            if self._ended is None and self._queue:
                self._start(Future())
            ended = self._ended
        if ended is not None:
            self._tokens.put(None)  # wakes a thread that waits; it ends when the queue is empty
            done = asyncio.get_running_loop().create_future()
            ended.add_done_callback(lambda _: _wake(done))
            await done

    def _kick(self, loop: asyncio.AbstractEventLoop) -> None:
        """Make the thread take a batch; refuse the queue if there can be no thread."""
        self._kicking.discard(loop)
        try:
            with self._lock:
                if self._ended is None:
                    if self._closed:  # on another loop, after these operations were queued
                        raise UnavailableError(CLOSED)
                    self._start(Future())
        except UnavailableError as error:
            with self._lock:
                refused = self._pop(len(self._queue))
            self.publish((), refused, [_own(error) for _ in refused])
        if self._tokens.empty():  # otherwise the thread will take a batch anyway
            self._tokens.put(None)

    def _pop(self, count: int) -> list[_Entry]:
        return [self._queue.popleft() for _ in range(count)]

    def _start(self, ended: Future[None]) -> None:
        thread = threading.Thread(
            target=self._run, args=(ended,), name="openclaw-store-writer", daemon=True
        )
        try:
            thread.start()
        except RuntimeError as error:  # the system limits the number of threads
            raise UnavailableError(f"the writer's thread cannot be started: {error}") from error
        self._ended = ended

    async def _withdraw(self, future: asyncio.Future[Any]) -> None:
        """Withdraw the operation of a cancelled caller, or wait for the end of its batch."""
        future.cancel()  # no effect if the answer came first
        done = asyncio.get_running_loop().create_future()
        with self._lock:
            if future in self._taken:
                self._gone[future] = done
            else:  # withdrawn; or committed, and the callback for the listeners is scheduled
                self._withdrawn += 1
                if 2 * self._withdrawn >= len(self._queue):
                    # A slow disk may block the thread for long, so cancelled entries must not
                    # pile up. Popped from the left: `submit` appends on the right without the lock.
                    entries = self._pop(len(self._queue))
                    live = [entry for entry in reversed(entries) if not entry[0].cancelled()]
                    self._queue.extendleft(live)
                    self._withdrawn = 0
                done.get_loop().call_soon(done.set_result, None)
        await shield_until_done(done)  # even if cancelled again: the outcome is on its way

    def _take(self) -> tuple[list[_Entry], bool]:
        """Return a batch without cancelled entries, and `True` if more entries are queued."""
        queued = len(self._queue)
        taken = self._pop(min(queued, MAX_BATCH))
        self._withdrawn = 0
        batch = [entry for entry in taken if not entry[0].cancelled()]
        self._taken.update((entry[0], entry) for entry in batch)
        return batch, len(taken) < queued

    def _write(self) -> bool:
        """Wait for a batch and commit it; return `False` when the thread must end."""
        try:
            self._tokens.get(timeout=None if self._session is None else self.idle_seconds)
        except Empty:
            self._close_session()  # the next batch makes another one
            return True
        with self._lock:
            batch, is_left = self._take()
            closed = self._closed
        if batch:
            self._commit(batch)
        elif closed and not is_left:
            return False
        if closed or is_left:
            self._tokens.put(None)  # for the rest, or for entries queued during the commit
        return True

    def _run(self, ended: Future[None]) -> None:
        try:
            while self._write():
                pass
        # Even `SystemExit`: the callers of the batch would wait forever.
        except BaseException as error:
            lost = UnavailableError(f"the writer's thread was ended by {error!r}: try again")
            try:
                self._metrics.note_failure(error)
            finally:
                entries = list(self._taken.values())
                self.publish((), entries, [_own(lost) for _ in entries])
            raise
        finally:
            self._close_session()  # before the next block, which may start another thread
            # The end and the last look at the queue are one step: an entry that comes later finds
            # no thread, and `_kick` starts one.
            with self._lock:
                orphaned = bool(self._queue)
                self._ended = None
                if orphaned:
                    self._start(ended)
                    self._tokens.put(None)
            if not orphaned:
                ended.set_result(None)

    def _commit(self, entries: Sequence[_Entry]) -> None:
        """Commit the entries in one transaction; in halves if one of them makes it fail."""
        while entries:
            entries = self._attempt(entries)

    def _attempt(self, entries: Sequence[_Entry]) -> Sequence[_Entry]:
        """Commit the entries or answer their callers; return the entries that may wait longer."""
        began = perf_counter()
        until = max(entries[0][-1], monotonic() + self._timeout / _ATTEMPTS)
        waiting: Sequence[_Entry] = ()
        try:
            self._write_lock.acquire("the writer", until)
            try:
                # `_apply` publishes under the lock: events are in the order of commits.
                while not self._apply(entries, until, began):
                    pass
            finally:
                self._write_lock.release()
        except Exception as error:
            # An error of the backend concerns all entries; any other is probably of one of them.
            if not isinstance(error, BackendError) and len(entries) > 1:
                middle = len(entries) // 2
                self._commit(entries[:middle])
                self._commit(entries[middle:])
                return ()
            if self._is_lock_error(error):
                now = monotonic()
                waiting = [entry for entry in entries if entry[-1] > now]
                entries = [entry for entry in entries if entry[-1] <= now]
            if entries and isinstance(error, BackendError):
                self._metrics.note_failure(error)
            self.publish((), entries, [_own(error) for _ in entries])
        return waiting

    def _is_lock_error(self, error: Exception) -> bool:
        """Return true if a lock was not free in time, so that nothing was written."""
        cause = error.__cause__
        return isinstance(error, DeadlineError) or (
            cause is not None and self._backend.error_mapping.is_busy(cause)
        )

    def _apply(self, entries: Sequence[_Entry], until: float, began: float) -> bool:
        """Commit the entries in one transaction; return `False` if they must be applied again."""
        outcomes: list[Any] = []
        is_committing = False
        try:
            session = self._begin(until)
            transaction = WriteTransaction(session.cursor, self._clock(), self.statements)
            # Neighbours with the same function are applied together, so the order stays.
            for apply, run in groupby(entries, key=itemgetter(1)):
                outcomes.extend(apply(transaction, [operation for _, _, operation, _ in run]))
            transaction.finish()
            # From here on, an error may leave it unknown if the commit took effect.
            is_committing = True
            session.commit()
        except LockRequiredError:
            # Nothing was written, and the session will begin its next transaction with the lock.
            transaction.release()
            return False
        except BaseException as error:
            self._close_session()  # a new connection has a known state
            mapping = self._backend.error_mapping
            driver_errors: tuple[type[Exception], ...] = (SQLAlchemyError, *mapping.raised())
            if isinstance(error, driver_errors):
                mapped = mapping.map_error(error, committing=is_committing)
                if mapped is not error:
                    raise mapped from error
            raise
        seconds = perf_counter() - began
        self._metrics.note_commit(len(entries), seconds)
        # Nothing between the commit and this call may fail: callers would learn that nothing was
        # written.
        self.publish(transaction.committed, entries, outcomes)
        if self.telemetry:
            note_commit(self.telemetry, len(entries), seconds, transaction.committed, outcomes)
        return True

    def _begin(self, until: float) -> WriteSession:
        """Begin a transaction, on a new connection if there is none or it is lost."""
        is_new = False
        while True:
            if self._session is None:
                self._session = self._backend.write_session(until, self.statements.counters)
                self._metrics.note_connection()
                is_new = True
            if self._session.begin(until):
                return self._session
            self._close_session()
            # One is tried in any case: the turn to write may have come at the deadline.
            if is_new and monotonic() >= until:
                raise UnavailableError("the server closes each new connection: try again later")

    def _close_session(self) -> None:
        session, self._session = self._session, None
        if session is not None:
            session.close()


def _own(error: Exception) -> Exception:
    """Return a copy of an error for each caller, as raising an error changes it."""
    if not isinstance(error, BackendError):
        return error
    own = copy.copy(error)
    own.__cause__ = error.__cause__
    return own


def _wake(future: asyncio.Future[None]) -> None:
    def wake() -> None:
        if not future.done():
            future.set_result(None)

    try:
        future.get_loop().call_soon_threadsafe(wake)
    except RuntimeError:
        logger.debug("an event loop closed while a caller waited to write")


def _deliver(
    listeners: Sequence[Listener], committed: Sequence[Any], answers: Sequence[_Answer]
) -> None:
    # The listeners first: a caller that wakes finds its write in the cache.
    for listener in listeners:
        try:
            listener(committed)
        except Exception as error:  # callers must get their answers anyway
            asyncio.get_running_loop().call_exception_handler(
                {"message": "a listener of committed changes failed", "exception": error}
            )
    for future, outcome in answers:
        if future.done():
            if isinstance(outcome, BaseException):
                logger.debug("a cancelled write had failed", exc_info=outcome)
        elif isinstance(outcome, BaseException):
            future.set_exception(outcome)
        else:
            future.set_result(outcome)
