"""The fair lock, which the writer, transactions, migrations and the vacuum take in turn.

SQLite admits one writer at a time but has no queue: waiters would retry, and one could starve.
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections import deque
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import dataclass, field

from openclaw_store.errors import DeadlineError


@dataclass(slots=True, eq=False)
class _Waiter:
    """A waiter or holder of the lock."""

    name: str
    home: object
    """The event loop or thread that must run for it to take the lock."""
    until: float
    queued_at: float = field(default_factory=time.monotonic)
    granted: Future[None] | None = None  # done when the lock is given to it
    is_queued: bool = False
    is_inside: bool = False


class FairLock:
    """A lock for one writer of this process at a time, first come first served.

    Threads and coroutines of any event loop share one queue. If the next waiter belongs to a
    blocked event loop, all waiters of that loop lose their places, and queue again when it runs.
    """

    _SLICE_SECONDS = 0.1  # the interval at which waiters check for timeouts and absent holders
    _ENTRY_SECONDS = 2.0  # the longest time for a waiter to notice that it was given the lock

    def __init__(self, timeout: float) -> None:
        self._timeout = timeout
        self._mutex = threading.Lock()
        self._waiting: deque[_Waiter] = deque()
        # Given the lock, though it may not run yet. Only `_mutex` protects it and all below.
        self._holder: _Waiter | None = None
        self._held_since = 0.0

    def acquire(self, name: str, until: float | None = None) -> None:
        """Take the lock on this thread, until `release`.

        Args:
            name: The holder, for the errors of other waiters.
            until: Deadline of the caller, by `time.monotonic`; `None` for the timeout from now.

        Raises:
            DeadlineError: If the holder does not release it in time.
        """
        waiter = self._waiter(name, threading.get_ident(), until)
        try:
            # It enters again after each slice, to notice its deadline and a holder that is absent.
            while (granted := self._enter(waiter)) is not None:
                with suppress(TimeoutError):
                    granted.result(self._SLICE_SECONDS)
        except BaseException:
            self._give_up(waiter)
            raise

    async def acquire_async(self, name: str, until: float | None = None) -> None:
        """Take the lock in a coroutine, until `release`; otherwise as `acquire`."""
        waiter = self._waiter(name, asyncio.get_running_loop(), until)
        done: asyncio.Future[None] | None = None
        try:
            while (granted := self._enter(waiter)) is not None:
                if done is None or done.done():  # initially, or after it lost its place
                    done = asyncio.wrap_future(granted)
                await asyncio.wait([done], timeout=self._SLICE_SECONDS)
        except BaseException:
            self._give_up(waiter)
            raise

    def release(self) -> None:
        """Give the lock to the next waiter."""
        with self._mutex:
            self._next()

    def _waiter(self, name: str, home: object, until: float | None) -> _Waiter:
        return _Waiter(name, home, time.monotonic() + self._timeout if until is None else until)

    def _enter(self, waiter: _Waiter) -> Future[None] | None:
        """Take the lock and return `None`; if it is not free, return the future to wait for."""
        with self._mutex:
            now = time.monotonic()
            holder = self._holder
            # A waiter of the same home proves that the home runs, so the holder will notice soon.
            is_late = now > self._held_since + min(self._ENTRY_SECONDS, self._timeout / 4)
            if is_late and holder and not holder.is_inside and holder.home != waiter.home:
                self._pass_over(holder)
            if self._holder is None:
                self._give_to(waiter)
            if self._holder is waiter:
                waiter.is_inside = True
                return None
            assert self._holder is not None  # otherwise `waiter` would hold it
            if now >= waiter.until:
                raise DeadlineError(
                    f"waited {now - waiter.queued_at:.1f} s to write, while {self._holder.name} "
                    f"has had the database for {now - self._held_since:.1f} s: "
                    "keep transactions short"
                )
            if waiter.granted is None or waiter.granted.done():
                waiter.granted = Future()
            if not waiter.is_queued:
                waiter.is_queued = True
                self._waiting.append(waiter)
            return waiter.granted

    # The next three methods are called while `_mutex` is held.

    def _next(self) -> None:
        self._holder = None
        if self._waiting:
            waiter = self._waiting.popleft()
            self._give_to(waiter)
            if waiter.granted is not None:
                waiter.granted.set_result(None)

    def _give_to(self, waiter: _Waiter) -> None:
        self._holder, waiter.is_queued = waiter, False
        self._held_since = time.monotonic()

    def _pass_over(self, holder: _Waiter) -> None:
        """Remove all waiters of the home of `holder`; they queue again when they run."""
        for waiter in self._waiting:
            waiter.is_queued = waiter.home != holder.home
        self._waiting = deque(waiter for waiter in self._waiting if waiter.is_queued)
        self._next()

    def _give_up(self, waiter: _Waiter) -> None:
        # Without this, a cancelled waiter would keep a lock that was given to it meanwhile.
        with self._mutex:
            if self._holder is waiter:
                self._next()
            elif waiter.is_queued:
                self._waiting.remove(waiter)
