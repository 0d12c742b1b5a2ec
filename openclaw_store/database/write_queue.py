"""The gate: the writer, transactions, migrations and the vacuum take turns.

SQLite lets one of them write at a time, but it has no queue: those who wait would try again and
again, and one of them would starve.
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import dataclass, field

from openclaw_store.errors import DeadlineError


@dataclass(slots=True, eq=False)
class _Waiter:
    """Somebody who comes to the gate."""

    name: str
    """What the errors of the others call it."""
    home: object
    """The event loop, or the thread, that has to go on for it to come in."""
    came_at: float = field(default_factory=time.monotonic)
    turn: Future[None] | None = None
    """Done when its turn comes, if it has to wait."""
    is_queued: bool = False
    is_inside: bool = False


class FairLock:
    """Lets one writer of this process in at a time, first come first served.

    Threads and coroutines of any event loop queue together. When it is the turn of one whose event
    loop stands still, all of that loop are passed over, and queue again as soon as it goes on.
    """

    _SLICE_SECONDS = 0.1  # how often those who wait look how it stands
    _ENTRY_SECONDS = 2.0  # how long one may take to notice that it is its turn, at most

    def __init__(self, timeout: float) -> None:
        self._timeout = timeout
        self._mutex = threading.Lock()
        self._waiting: deque[_Waiter] = deque()
        self._holder: _Waiter | None = None  # whose turn it is
        self._held_since = 0.0
        self._held_until: float | None = None

    def acquire(self, name: str, waiting: Callable[[], None] = lambda: None) -> None:
        """Take the lock on this thread, until `release`.

        Args:
            name: The holder, for the errors of other waiters.
            waiting: Called each time before the thread waits.

        Raises:
            DeadlineError: If the holder does not release it in time.
        """
        waiter = _Waiter(name, threading.get_ident())
        try:
            while (turn := self._enter(waiter)) is not None:
                waiting()
                with suppress(TimeoutError):
                    turn.result(self._SLICE_SECONDS)
        except BaseException:
            self._give_up(waiter)
            raise

    async def acquire_async(self, name: str) -> None:
        """Take the lock in a coroutine, until `release`; otherwise as `acquire`."""
        waiter = _Waiter(name, asyncio.get_running_loop())
        granted: asyncio.Future[None] | None = None
        try:
            while (turn := self._enter(waiter)) is not None:
                if granted is None or granted.done():  # at first; when it was passed over
                    granted = asyncio.wrap_future(turn)
                await asyncio.wait([granted], timeout=self._SLICE_SECONDS)
        except BaseException:
            self._give_up(waiter)
            raise

    def limit(self, seconds: float) -> None:
        """Whoever holds the gate has it for so long from now; then those who wait give up."""
        with self._mutex:
            self._held_until = time.monotonic() + seconds

    def release(self) -> None:
        """Give the lock to the next waiter."""
        with self._mutex:
            self._next()

    def _enter(self, waiter: _Waiter) -> Future[None] | None:
        """Go in, if it is the turn of `waiter`; else returns what tells it that it is."""
        with self._mutex:
            now = time.monotonic()
            holder = self._holder
            if holder is not None and self._is_absent(holder, now) and holder.home != waiter.home:
                self._pass_over(holder)
            if self._holder is None:
                self._give_turn(waiter)
            if self._holder is waiter:
                waiter.is_inside = True
                return None
            self._check_hope(waiter, now)
            if waiter.turn is None or waiter.turn.done():
                waiter.turn = Future()
            if not waiter.is_queued:
                waiter.is_queued = True
                self._waiting.append(waiter)
            return waiter.turn

    def _next(self) -> None:
        self._holder = None
        if self._waiting:
            waiter = self._waiting.popleft()
            self._give_turn(waiter)
            if waiter.turn is not None:
                waiter.turn.set_result(None)

    def _give_turn(self, waiter: _Waiter) -> None:
        self._holder, waiter.is_queued = waiter, False
        self._held_since, self._held_until = time.monotonic(), None

    def _is_absent(self, holder: _Waiter, now: float) -> bool:
        return not holder.is_inside and now > self._held_since + min(
            self._ENTRY_SECONDS, self._timeout / 4
        )

    def _pass_over(self, holder: _Waiter) -> None:
        others, self._waiting = self._waiting, deque()
        for waiter in others:
            waiter.is_queued = waiter.home != holder.home
            if waiter.is_queued:
                self._waiting.append(waiter)
        self._next()

    def _give_up(self, waiter: _Waiter) -> None:
        with self._mutex:
            if self._holder is waiter:
                self._next()
            elif waiter.is_queued:
                self._waiting.remove(waiter)

    def _check_hope(self, waiter: _Waiter, now: float) -> None:
        until = self._held_until
        if now < waiter.came_at + self._timeout and (
            until is None or now <= until + self._SLICE_SECONDS
        ):
            return
        assert self._holder is not None  # else nobody would wait
        raise DeadlineError(
            f"waited {now - waiter.came_at:.1f} s to write, while {self._holder.name} has had the "
            f"database for {now - self._held_since:.1f} s: keep transactions short"
        )
