"""How late an event loop is: what its callers wait for that is no fault of the store's."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable

TICK_SECONDS = 0.01


async def watch_lateness(note: Callable[[float, float], object]) -> None:
    """Measure it, for ever.

    Args:
        note: Is told after each tick when the loop should have gone on, and when it did, by
            `time.monotonic`.
    """
    while True:
        due = time.monotonic() + TICK_SECONDS
        await asyncio.sleep(TICK_SECONDS)
        note(due, time.monotonic())
