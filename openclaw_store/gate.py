"""The gate: the writer, transactions, migrations and the vacuum take turns.

SQLite lets one of them write at a time, but it has no queue: those who wait would try again and
again, and one of them would starve.
"""

from __future__ import annotations

import asyncio
import threading
import time
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future
from contextlib import contextmanager

from openclaw_store.errors import DeadlineError


class Gate:
    """Lets one writer of this process in at a time, first come first served.

    Threads and coroutines of any event loop queue together.
    """

    _SLICE_SECONDS = 0.1  # how often those who wait look whether it is hopeless
    _CLAIM_SECONDS = 2.0  # how long a waiter may take to notice that it is its turn

    def __init__(self, timeout: float) -> None:
        self._timeout = timeout
        self._mutex = threading.Lock()
        self._waiting: deque[tuple[Future[None], str]] = deque()
        self._holder: str | None = None
        self._held_since = 0.0
        self._held_until: float | None = None

    @contextmanager
    def held(self, holder: str) -> Iterator[None]:
        """Hold the gate on this thread.

        Args:
            holder: Who holds it, for the errors of those who wait.

        Raises:
            DeadlineError: If whoever holds it does not let go.
        """
        ticket = self._queue(holder)
        if ticket is not None:
            asked_at = time.monotonic()
            try:
                while True:
                    try:
                        ticket.result(self._SLICE_SECONDS)
                        break
                    except TimeoutError:
                        self._check_hope(asked_at)
            except BaseException:
                self._abandon(ticket)
                raise
            with self._mutex:
                self._held_until = None
        try:
            yield
        finally:
            self.leave()

    async def enter(self, holder: str) -> None:
        """Hold the gate from a coroutine, until it calls `leave`; as `held` otherwise."""
        ticket = self._queue(holder)
        if ticket is None:
            return
        asked_at = time.monotonic()
        granted = asyncio.wrap_future(ticket)
        try:
            while not granted.done():
                await asyncio.wait([granted], timeout=self._SLICE_SECONDS)
                if not granted.done():
                    self._check_hope(asked_at)
        except BaseException:
            self._abandon(ticket)
            raise
        with self._mutex:
            self._held_until = None

    def limit(self, seconds: float) -> None:
        """Whoever holds the gate has it for so long from now; then those who wait give up."""
        with self._mutex:
            self._held_until = time.monotonic() + seconds

    def leave(self) -> None:
        """Let the next one in."""
        with self._mutex:
            self._holder = None
            if self._waiting:
                ticket, holder = self._waiting.popleft()
                self._let_in(holder)
                # Its event loop may be blocked, and never come to take its turn.
                self._held_until = self._held_since + self._CLAIM_SECONDS
                ticket.set_result(None)

    def _queue(self, holder: str) -> Future[None] | None:
        with self._mutex:
            if self._holder is None:
                self._let_in(holder)
                return None
            ticket: Future[None] = Future()
            self._waiting.append((ticket, holder))
            return ticket

    def _let_in(self, holder: str) -> None:
        self._holder = holder
        self._held_since = time.monotonic()
        self._held_until = None

    def _abandon(self, ticket: Future[None]) -> None:
        with self._mutex:
            for place in self._waiting:
                if place[0] is ticket:
                    self._waiting.remove(place)
                    return
        self.leave()  # it was our turn just now

    def _check_hope(self, asked_at: float) -> None:
        with self._mutex:
            now = time.monotonic()
            if now < asked_at + self._timeout and not (
                self._held_until is not None and now > self._held_until + self._SLICE_SECONDS
            ):
                return
            raise DeadlineError(
                f"waited {now - asked_at:.1f} s to write, while {self._holder} has had the "
                f"database for {now - self._held_since:.1f} s: keep transactions short"
            )
