"""The delay of an event loop: waiting time of its callers that the store does not cause."""

from __future__ import annotations

import asyncio
import time
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
