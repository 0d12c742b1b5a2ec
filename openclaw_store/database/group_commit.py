"""Group commit: operations that callers submit at the same time share one transaction.

Committing costs a disk flush, whatever it commits. So one thread takes *everything* that has
queued, applies it in one transaction, and then takes what has queued meanwhile: the busier the
store, the larger the batch and the smaller the cost of each operation. There is no timer, and
a lone caller waits for nobody. (Databases write their logs this way; see "group commit" in Gray &
Reuter, *Transaction Processing*, 1993.)

Callers who all wait for one batch leave the server idle while they are answered. So where a server
does the work, batches are *pipelined*: each takes half of many callers, and those of the batch
before are answered while it is on its way. Their answers are kept until then, if a batch is to
follow: once an event loop wakes them it holds the interpreter (the GIL), and the thread would be
late to send.

What holds:

- **Each operation is decided by itself.** One that is refused (stale, duplicate, not found) gets
  its own error; the rest of its batch commits.
- **Order.** Operations are applied in the order in which they were queued.
- **A write that returns is committed.** Callers wake after the commit, on their own event loop,
  and after the listeners of that loop (the caches) were told. No answer is held back while the
  thread waits for its turn, for a lock, or for more to write.
- **Cancelling** a caller withdraws an operation that is still queued; one that is already in a
  batch is waited for, and `CancelledError` goes on afterwards.

The module knows no tables: an operation is any object, and comes with the function that applies
a run of them.
"""

from __future__ import annotations

import asyncio
import copy
import logging
import threading
import time
from collections import defaultdict, deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from itertools import groupby
from operator import itemgetter
from queue import SimpleQueue
from typing import Any

from sqlalchemy.exc import SQLAlchemyError

from openclaw_store.backends import Backend, RedoError, WriteSession, shield_until_done
from openclaw_store.database.metrics import WriteMetrics
from openclaw_store.database.statements import statements_for
from openclaw_store.database.write_queue import FairLock
from openclaw_store.database.write_transaction import WriteTransaction
from openclaw_store.domain import Clock
from openclaw_store.errors import BackendError, UnavailableError

logger = logging.getLogger("openclaw_store.writer")


Apply = Callable[["WriteTransaction", Sequence[Any]], Sequence[Any]]
"""Applies operations in order; returns a result, or an exception, for each of them.

After a rollback they are applied again, and must lead to the same.
"""


Listener = Callable[[Sequence[Any]], None]
"""Is told, on its event loop, what each transaction committed, in the order of the commits."""


MAX_BATCH = 8192
"""Operations of one transaction at most; the callers of the others wait for the next one."""


HALVED_FROM = 32
"""So many callers are worth two batches: a batch costs as much as some 20 operations."""


_CLOSED = "the database is closed: open a new Database"


_Entry = tuple[asyncio.Future[Any], Apply, Any]
"""What a caller waits for, and its operation with the function that applies it."""


_Answer = tuple[asyncio.Future[Any], Any]
"""What a caller waits for, and what it is to be answered: a result, or an exception."""


_Acknowledgements = tuple[Sequence[Any], Sequence[_Entry], Sequence[Any]]
"""What a transaction committed, for the listeners; its entries; and their outcomes."""


class Writer:
    """Apply submitted operations on one thread; all that have queued share a transaction.

    Args:
        backend: The engine; its write session belongs to the thread.
        turns: The lock that admits one writer of this process at a time.
        clock: Returns the time that a transaction stamps.
        timeout: Seconds that a batch waits for its turn and for the locks of other processes.
    """

    def __init__(self, backend: Backend, turns: FairLock, clock: Clock, timeout: float) -> None:
        self._backend = backend
        self._turns = turns
        self._clock = clock
        self._timeout = timeout
        self._session: WriteSession | None = None  # opened, used and closed on the thread
        self._metrics = WriteMetrics(clock)
        self._lock = threading.Lock()
        self._queue: deque[_Entry] = deque()
        self._withdrawn = 0  # of those in the queue, about
        self._callers = 0  # that there were when the last batch was done, those of it included
        self._taken: dict[asyncio.Future[Any], _Entry] = {}  # out of the queue, not answered yet
        self._gone: dict[asyncio.Future[Any], asyncio.Future[None]] = {}  # cancelled among them
        self._publishing = threading.RLock()
        self._pending: _Acknowledgements | None = None
        self._tokens: SimpleQueue[None] = SimpleQueue()
        self._kicking: set[asyncio.AbstractEventLoop] = set()
        self._listeners: list[tuple[asyncio.AbstractEventLoop, Listener]] = []
        self._ended: Future[None] | None = None  # of the thread, while there is one
        self._closed = False

    async def submit(self, apply: Apply, operation: Any) -> Any:
        """Apply an operation; returns its result when it is committed.

        Raises:
            StoreError: What the operation was refused with, or why the batch failed.
            UnavailableError: If the writer is closed.
        """
        if self._closed:
            raise UnavailableError(_CLOSED)
        loop = asyncio.get_running_loop()
        future = loop.create_future()
        self._queue.append((future, apply, operation))  # without the lock, which costs more
        if loop not in self._kicking:
            # Not at once: callers that this turn of the loop wakes next shall be in the same
            # batch. The callback runs behind them, without any delay for a lone one.
            self._kicking.add(loop)
            loop.call_soon(self._kick, loop)
        try:
            return await future
        except asyncio.CancelledError:
            await self._withdraw(future)
            raise

    def figures(self) -> dict[str, Any]:
        """What `Database.get_stats` tells of it."""
        return {"queued_operations": len(self._queue), **self._metrics.figures()}

    def listen(self, loop: asyncio.AbstractEventLoop, listener: Listener) -> Callable[[], None]:
        """Tell `listener`, on `loop`, what is published from now on; returns what ends it."""
        place = (loop, listener)
        with self._lock:
            self._listeners = [*self._listeners, place]

        def unlisten() -> None:
            with self._lock:
                self._listeners = [other for other in self._listeners if other is not place]

        return unlisten

    def publish(
        self,
        committed: Sequence[Any],
        entries: Sequence[_Entry] = (),
        outcomes: Sequence[Any] = (),
    ) -> None:
        """Tell each loop's listeners what was committed, then wake its callers: one hop a loop.

        To be called before the next transaction begins, so that the order is that of commits.
        """
        with self._publishing:
            self.publish_pending()
            self._publish(committed, entries, outcomes)

    def publish_pending(self) -> None:
        """Publish what the last batch committed, unless that was done.

        To be called at the latest before the thread waits, or once it has something sent.
        """
        with self._publishing:
            if self._pending is not None:
                self._publish(*self._pending)
                self._pending = None  # last: should this be interrupted, it is done again

    def _publish(
        self, committed: Sequence[Any], entries: Sequence[_Entry], outcomes: Sequence[Any]
    ) -> None:
        listeners: defaultdict[asyncio.AbstractEventLoop, list[Listener]] = defaultdict(list)
        answers: defaultdict[asyncio.AbstractEventLoop, list[_Answer]] = defaultdict(list)
        if committed:
            for loop, listener in self._listeners:
                listeners[loop].append(listener)
        for (future, _, _), outcome in zip(entries, outcomes, strict=True):
            answers[future.get_loop()].append((future, outcome))
        for loop in {**listeners, **answers}:
            try:
                loop.call_soon_threadsafe(_deliver, listeners[loop], committed, answers[loop])
            except RuntimeError:  # the loop was closed: nobody is left there to be told
                logger.debug("an event loop closed before its writes were acknowledged")
        self._let_go([future for future, _, _ in entries])

    async def close(self) -> None:
        """Commit what has queued, refuse what comes later, and end the thread."""
        with self._lock:
            self._closed = True
            if self._ended is None and self._queue:
                self._start(Future())
            ended = self._ended
        if ended is not None:
            self._tokens.put(None)
            done = asyncio.get_running_loop().create_future()
            ended.add_done_callback(lambda _: _wake(done))
            await done

    def _kick(self, loop: asyncio.AbstractEventLoop) -> None:
        """Have the thread look at the queue; refuse what is in it if there can be no thread."""
        self._kicking.discard(loop)
        try:
            with self._lock:
                if self._ended is None:
                    if self._closed:  # since they were let into the queue, on another loop
                        raise UnavailableError(_CLOSED)
                    self._start(Future())
        except UnavailableError as error:
            with self._lock:
                refused = [self._queue.popleft() for _ in range(len(self._queue))]
            self.publish((), refused, [_own(error) for _ in refused])
        if self._tokens.empty():  # else the thread is yet to look, and will find these, too
            self._tokens.put(None)

    def _start(self, ended: Future[None]) -> None:
        thread = threading.Thread(
            target=self._run, args=(ended,), name="openclaw-store-writer", daemon=True
        )
        try:
            thread.start()
        except RuntimeError as error:  # the system has no more of them
            raise UnavailableError(f"the writer's thread cannot be started: {error}") from error
        self._ended = ended

    async def _withdraw(self, future: asyncio.Future[Any]) -> None:
        """Take a cancelled caller's operation back, or wait until its batch is done."""
        future.cancel()  # it is already, unless the answer came first
        done = asyncio.get_running_loop().create_future()
        with self._lock:
            if future in self._taken:
                self._gone[future] = done
            else:  # withdrawn; or committed, and what tells the listeners is yet to run
                self._withdrawn += 1
                if 2 * self._withdrawn >= len(self._queue):
                    self._sweep()
                done.get_loop().call_soon(done.set_result, None)
        await shield_until_done(done)  # even when cancelled again: the outcome is on its way

    def _sweep(self) -> None:
        """Forget the operations of those who have gone: a slow disk may keep the queue for long."""
        # From the left: those who queue meanwhile, without the lock, come behind.
        entries = [self._queue.popleft() for _ in range(len(self._queue))]
        self._queue.extendleft(entry for entry in reversed(entries) if not entry[0].cancelled())
        self._withdrawn = 0

    def _take(self) -> tuple[list[_Entry], bool]:
        """Make a batch of what has queued, without those whose callers have gone.

        Returns:
            The batch, and whether something was left.
        """
        queued, limit = len(self._queue), MAX_BATCH
        callers = max(queued, self._callers)
        if callers >= HALVED_FROM and (self._session is not None and self._session.is_pipelined):
            limit = min(limit, (callers + 1) // 2)
        taken = [self._queue.popleft() for _ in range(min(queued, limit))]
        self._withdrawn = 0
        batch = [entry for entry in taken if not entry[0].cancelled()]
        self._taken.update((entry[0], entry) for entry in batch)
        return batch, len(taken) < queued

    def _write(self) -> bool:
        """Wait for a batch and commit it; returns whether there may be another one."""
        if self._tokens.empty():  # else the next batch comes at once
            self.publish_pending()
        self._tokens.get()
        with self._lock:
            batch, is_left = self._take()
            closed = self._closed
        if batch:
            self._commit(batch)
            self._callers = len(batch) + len(self._queue)
        elif closed and not is_left:
            self.publish_pending()
            return False
        if closed or is_left:
            self._tokens.put(None)  # for what was left, or queued during the commit
        return True

    def _run(self, ended: Future[None]) -> None:
        try:
            while self._write():
                pass
        except BaseException as error:
            lost = UnavailableError(f"the writer's thread was ended by {error!r}: try again")
            try:
                self._metrics.note_failure(error)
            finally:
                self.publish_pending()
                entries = list(self._taken.values())
                self.publish((), entries, [_own(lost) for _ in entries])
            raise
        finally:
            self._close_session()  # first: from the next line on there may be another thread
            with self._lock:
                orphaned = bool(self._queue)
                self._ended = None
                if orphaned:  # they were not in its batch
                    self._start(ended)
                    self._tokens.put(None)
            if not orphaned:
                ended.set_result(None)

    def _let_go(self, futures: Sequence[asyncio.Future[Any]]) -> None:
        """Forget those who were answered, and let go those of them who were cancelled."""
        with self._lock:
            for future in futures:
                self._taken.pop(future, None)
            gone = [self._gone.pop(future) for future in futures if future in self._gone]
        for done in gone:
            _wake(done)

    def _commit(self, entries: Sequence[_Entry]) -> None:
        """Commit the entries in one transaction; by halves if one of them makes it fail."""
        began = time.perf_counter()
        until = time.monotonic() + self._timeout
        try:
            self._turns.acquire("the writer", self.publish_pending)
            try:
                while not self._apply(entries, until, began):
                    pass
            finally:
                self._turns.release()
        except Exception as error:
            if isinstance(error, BackendError):
                self._metrics.note_failure(error)
            if isinstance(error, BackendError) or len(entries) == 1:
                self.publish((), entries, [_own(error) for _ in entries])
            else:
                middle = len(entries) // 2
                self._commit(entries[:middle])
                self._commit(entries[middle:])

    def _apply(self, entries: Sequence[_Entry], until: float, began: float) -> bool:
        """Commit the entries in one transaction.

        Returns:
            `False` if nothing was written and the same entries must be applied once more.
        """
        outcomes: list[Any] = []
        is_committing = False
        try:
            if self._session is None:
                self.publish_pending()
                counters = statements_for(self._backend.dialect).counters
                self._session = self._backend.write_session(until, counters)
            session = self._session
            if not session.is_pipelined:
                self.publish_pending()
            session.begin(until, self.publish_pending)
            transaction = WriteTransaction(session.cursor, self._clock())
            for apply, run in groupby(entries, key=itemgetter(1)):
                outcomes.extend(apply(transaction, [operation for _, _, operation in run]))
            transaction.finish()
            is_committing = True
            session.commit()
        except RedoError:
            return False
        except BaseException as error:
            self._close_session()  # the next one begins with a connection in a known state
            mapping = self._backend.error_mapping
            driver_errors: tuple[type[Exception], ...] = (SQLAlchemyError, *mapping.raised())
            if isinstance(error, driver_errors):
                mapped = mapping.map_error(error, committing=is_committing)
                if mapped is not error:
                    raise mapped from error
            raise
        self._metrics.note_commit(len(entries), time.perf_counter() - began)
        with self._publishing:
            self.publish_pending()
            self._pending = transaction.committed, entries, outcomes
        return True

    def _close_session(self) -> None:
        session, self._session = self._session, None
        if session is not None:
            session.close()


def _own(error: Exception) -> Exception:
    """An error of one caller's own: raising an error changes it."""
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
    for listener in listeners:
        try:
            listener(committed)
        except Exception as error:  # a listener's fault is not the callers'
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
