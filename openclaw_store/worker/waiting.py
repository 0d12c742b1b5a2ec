"""Waiting for signals, and for one of several coroutines."""

from __future__ import annotations

import asyncio
import signal
from collections.abc import Callable, Coroutine, Iterator
from contextlib import contextmanager
from typing import Any
from weakref import WeakKeyDictionary

from openclaw_store.errors import logger_of

logger = logger_of("worker")

_SIGNALS = (signal.SIGTERM, signal.SIGINT)

# Each event loop has one handler of a signal, and may run several workers.
_stops: WeakKeyDictionary[asyncio.AbstractEventLoop, list[Callable[[], None]]] = WeakKeyDictionary()


@contextmanager
def stopped_by_signals(stop: Callable[[], None]) -> Iterator[None]:
    """Call `stop` at the first signal; a second one has the effect it had before."""
    loop = asyncio.get_running_loop()
    stops = _stops.setdefault(loop, [])

    def restore() -> None:
        for one in _SIGNALS:
            loop.remove_signal_handler(one)

    def handle() -> None:
        restore()
        for one in [*stops]:
            one()

    try:
        if not stops:
            for one in _SIGNALS:
                loop.add_signal_handler(one, handle)
    except (NotImplementedError, RuntimeError, ValueError) as error:
        # Windows, or not the main thread: the program calls `Worker.stop` itself.
        logger.info("signals do not stop this worker: %s", error)
        yield
        return
    stops.append(stop)
    try:
        yield
    finally:
        stops.remove(stop)
        if not stops:
            restore()


async def first_of(futures: list[asyncio.Future[Any]]) -> None:
    """Wait for the first of several futures; raise its exception."""
    done, _ = await asyncio.wait(futures, return_when=asyncio.FIRST_COMPLETED)
    for one in done:
        one.result()


async def either(work: Coroutine[Any, Any, Any], other: Coroutine[Any, Any, Any]) -> Any:
    """Return the result of the work, or `None` if the other ends first, which cancels it."""
    first, second = asyncio.ensure_future(work), asyncio.ensure_future(other)
    try:
        await asyncio.wait([first, second], return_when=asyncio.FIRST_COMPLETED)
        return first.result() if first.done() else None
    finally:
        for one in (first, second):
            one.cancel()
        await asyncio.wait([first, second])
