"""Cancellation of a call at a step of the event loop.

An iteration of a loop runs all ready callbacks and then, if there are none, sleeps until a thread,
a socket or a timer wakes it. Work on other threads continues while the loop sleeps. These are the
steps: the moment before each iteration, and two more if the iteration sleeps: a moment later, if it
still sleeps, and after the wake-up, before any callback runs. The number of steps of a call varies
a little between runs, because its threads are faster or slower.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from random import Random
from selectors import DefaultSelector, SelectorKey
from typing import Any

NAP_SECONDS = 0.001
"""Longest sleep of a loop, in seconds, before the step that comes during the sleep."""

Make = Callable[[], Coroutine[Any, Any, Any]]
"""Creates the coroutine of the call."""


class Steps(DefaultSelector):
    """A selector for an event loop that counts its steps and runs a callback at some of them."""

    def __init__(self, random: Random) -> None:
        super().__init__()
        self._random = random
        self.passed = 0
        """Number of steps since the last `set`."""
        self._at: tuple[int, ...] = ()
        self._act: Callable[[], object] = lambda: None

    def set(self, *at: int, act: Callable[[], object] = lambda: None) -> None:
        """Restart the count, and run `act` at these steps."""
        self.passed, self._at, self._act = 0, at, act

    def select(self, timeout: float | None = None) -> list[tuple[SelectorKey, int]]:
        """Sleep as the loop requests, unless a step comes first."""
        # The callback has scheduled work, so the loop must not sleep.
        if self._step():
            timeout = 0
        if timeout is not None and timeout <= 0:
            return super().select(timeout)
        if self.passed + 1 in self._at:
            # A short sleep, so that the step comes while other threads work for the call.
            nap = self._random.uniform(0, NAP_SECONDS)
            events = super().select(nap if timeout is None else min(nap, timeout))
            self._step()
            return events
        # The step during the sleep counts, though nothing is due at it.
        self.passed += 1
        events = super().select(timeout)
        self._step()
        return events

    def _step(self) -> bool:
        """Run the callback if it is due at the next step; return true if it ran."""
        self.passed += 1
        if self.passed in self._at:
            self._act()
            return True
        return False


@dataclass
class CallEnd:
    """The end of a call."""

    steps: int
    """Number of its steps."""
    is_cancelled: bool = False
    error: BaseException | None = None
    """The error that it raised otherwise."""
    complaint: str | None = None
    """The reason that its end is wrong."""


class _SiblingError(Exception):
    """Fails a group of tasks."""


async def cancelled_once(make: Make, steps: Steps, at: int) -> CallEnd:
    """Cancel the task of the call."""
    return await _cancelled(make, steps, at)


async def cancelled_again(make: Make, steps: Steps, at: int) -> CallEnd:
    """Cancel the task of the call, and twice more while it ends."""
    return await _cancelled(make, steps, at, at + 1, at + 2)


async def _cancelled(make: Make, steps: Steps, *at: int) -> CallEnd:
    task = asyncio.ensure_future(make())
    asked = False

    def cancel() -> None:
        nonlocal asked
        # A task that has already ended refuses its cancellation.
        asked = task.cancel() or asked

    steps.set(*at, act=cancel)
    ended = await _end_of(task, steps)
    if asked and not ended.is_cancelled:
        ended.complaint = f"its cancellation was lost: {ended.error!r}"
    return ended


async def timed_out(make: Make, steps: Steps, at: int) -> CallEnd:
    """Let an `asyncio.timeout` around the call expire."""
    inner = CallEnd(0)

    async def limited() -> None:
        async with asyncio.timeout(None) as limit:

            def expire() -> None:
                limit.reschedule(asyncio.get_running_loop().time())

            steps.set(at, act=expire)
            with _recording(inner, steps):
                await make()
        await asyncio.sleep(0)

    task = asyncio.ensure_future(limited())
    outer = await _end_of(task, steps)
    inner.error = None if inner.is_cancelled else outer.error
    if inner.is_cancelled and not isinstance(outer.error, TimeoutError):
        inner.complaint = f"its timeout expired, and it ended with {outer.error!r}"
    return inner


async def group_failed(make: Make, steps: Steps, at: int) -> CallEnd:
    """Let a sibling in the `TaskGroup` of the call fail."""
    failing: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    def fail() -> None:
        if not failing.done():
            failing.set_exception(_SiblingError())

    inner = CallEnd(0)

    async def call() -> None:
        try:
            with _recording(inner, steps):
                await make()
        finally:
            if not failing.done():
                failing.set_result(None)

    async def group() -> None:
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(call())
            tasks.create_task(wait_for(failing))

    steps.set(at, act=fail)
    outer = await _end_of(asyncio.ensure_future(group()), steps)
    error = outer.error
    is_siblings = isinstance(error, BaseExceptionGroup) and [
        type(one) for one in error.exceptions
    ] == [_SiblingError]
    if inner.is_cancelled and not is_siblings:
        inner.complaint = f"its group failed with {error!r}"
    inner.error = None if is_siblings else error
    return inner


@contextmanager
def _recording(inner: CallEnd, steps: Steps) -> Iterator[None]:
    """Record the steps and the cancellation of a call inside another task, and stop counting."""
    try:
        yield
    except asyncio.CancelledError:
        inner.is_cancelled = True
        raise
    finally:
        inner.steps = steps.passed
        steps.set()


async def wait_for(future: asyncio.Future[None]) -> None:
    """Wait for the failure of the sibling."""
    await future


async def _end_of(task: asyncio.Future[Any], steps: Steps) -> CallEnd:
    await asyncio.wait([task])
    ended = CallEnd(steps.passed)
    steps.set()
    if task.cancelled():
        ended.is_cancelled = True
    else:
        ended.error = task.exception()
    return ended


CancelMode = Callable[[Make, Steps, int], Coroutine[Any, Any, CallEnd]]

CANCEL_MODES: tuple[CancelMode, ...] = (cancelled_once, cancelled_again, timed_out, group_failed)
"""All ways to cancel a call."""
