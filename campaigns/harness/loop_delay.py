"""The delay of an event loop: waiting time of its callers that the store does not cause."""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Callable

TICK_SECONDS = 0.01


async def watch_loop_delay(note: Callable[[float, float], object]) -> None:
    """Measure the delay of the running event loop until cancelled.

    Args:
        note: Called after each tick with the due time and the actual time, by `time.monotonic`.
    """
    while True:
        due = time.monotonic() + TICK_SECONDS
        await asyncio.sleep(TICK_SECONDS)
        note(due, time.monotonic())


class LoopDelay:
    """The delays of this event loop, which are not the store's."""

    def __init__(self) -> None:
        self.slowest_answer = 0.0
        """Seconds of the slowest answer."""
        self._next = time.monotonic()
        self._delays: deque[tuple[float, float]] = deque(maxlen=1000)

    def note(self, due: float, now: float) -> None:
        """Record the begin and end of a delay."""
        self._delays.append((due, now))
        self._next = now + TICK_SECONDS

    def since(self, moment: float) -> float:
        """Return the total delay since a moment."""
        late = sum(now - due for due, now in self._delays if now >= moment)
        return late + max(0.0, time.monotonic() - self._next)
