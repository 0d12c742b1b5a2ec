"""The steps of an event loop, and a call that is cancelled at one of them.

A turn of a loop runs what is due and then, if nothing is due, sleeps until a thread, a socket or a
timer wakes it. What a call does on other threads goes on while its loop sleeps. So these are the
steps: the moment before each turn, and of a turn that sleeps two more: a moment later, if it sleeps
still, and when it was woken and has not yet run what it was woken for. How many there are of a call
differs a little from one time to the next, as its threads are faster or slower.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from dataclasses import dataclass
from random import Random
from selectors import DefaultSelector, SelectorKey
from typing import Any

NAP_SECONDS = 0.001
"""How long a loop sleeps at most before the step that comes while it sleeps."""

Make = Callable[[], Coroutine[Any, Any, Any]]
"""Makes the call."""


class Steps(DefaultSelector):
    """What a loop sleeps in: counts its steps, and does something at one of them."""

    def __init__(self, luck: Random) -> None:
        super().__init__()
        self._luck = luck
        self.passed = 0
        """The steps since it was last set."""
        self._at: tuple[int, ...] = ()
        self._act: Callable[[], object] = lambda: None

    def set(self, *at: int, act: Callable[[], object] = lambda: None) -> None:
        """Begin to count, and do `act` at these steps."""
        self.passed, self._at, self._act = 0, at, act

    def select(self, timeout: float | None = None) -> list[tuple[SelectorKey, int]]:
        """Sleep as the loop asks for, if nothing is done before."""
        if self._step():
            timeout = 0
        if timeout is not None and timeout <= 0:
            return super().select(timeout)
        if self.passed + 1 in self._at:
            nap = self._luck.uniform(0, NAP_SECONDS)
            events = super().select(nap if timeout is None else min(nap, timeout))
            self._step()
            return events
        self.passed += 1
        events = super().select(timeout)
        self._step()
        return events

    def _step(self) -> bool:
        """Do what is to be done at the next step; whether there was anything."""
        self.passed += 1
        if self.passed in self._at:
            self._act()
            return True
        return False


@dataclass
class Ended:
    """How a call ended."""

    steps: int
    """How many it had."""
    is_cancelled: bool = False
    error: BaseException | None = None
    """What it raised otherwise."""
    complaint: str | None = None
    """What is wrong about how its cancellation ended."""


class _SiblingError(Exception):
    """Fails a group of tasks."""


async def cancelled_once(make: Make, steps: Steps, at: int) -> Ended:
    """Its task is cancelled."""
    return await _cancelled(make, steps, at)


async def cancelled_again(make: Make, steps: Steps, at: int) -> Ended:
    """Its task is cancelled, and twice more while it ends."""
    return await _cancelled(make, steps, at, at + 1, at + 2)


async def _cancelled(make: Make, steps: Steps, *at: int) -> Ended:
    task = asyncio.ensure_future(make())
    asked = False

    def cancel() -> None:
        nonlocal asked
        asked = task.cancel() or asked

    steps.set(*at, act=cancel)
    ended = await _end_of(task, steps)
    if asked and not ended.is_cancelled:
        ended.complaint = f"its cancellation got lost: {ended.error!r}"
    return ended


async def timed_out(make: Make, steps: Steps, at: int) -> Ended:
    """The time of an `asyncio.timeout` around it is over."""
    inner = Ended(0)

    async def limited() -> None:
        async with asyncio.timeout(None) as limit:

            def expire() -> None:
                limit.reschedule(asyncio.get_running_loop().time())

            steps.set(at, act=expire)
            try:
                await make()
            except asyncio.CancelledError:
                inner.is_cancelled = True
                raise
            finally:
                inner.steps = steps.passed
                steps.set()
        await asyncio.sleep(0)

    task = asyncio.ensure_future(limited())
    outer = await _end_of(task, steps)
    inner.error = None if inner.is_cancelled else outer.error
    if inner.is_cancelled and not isinstance(outer.error, TimeoutError):
        inner.complaint = f"its time was over, and it ended with {outer.error!r}"
    return inner


async def group_failed(make: Make, steps: Steps, at: int) -> Ended:
    """Another task of its `TaskGroup` fails."""
    failing: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    def fail() -> None:
        if not failing.done():
            failing.set_exception(_SiblingError())

    inner = Ended(0)

    async def call() -> None:
        try:
            await make()
        except asyncio.CancelledError:
            inner.is_cancelled = True
            raise
        finally:
            inner.steps = steps.passed
            steps.set()
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
        inner.complaint = f"its group failed, and ended with {error!r}"
    inner.error = None if is_siblings else error
    return inner


async def wait_for(future: asyncio.Future[None]) -> None:
    """What the sibling does."""
    await future


async def _end_of(task: asyncio.Future[Any], steps: Steps) -> Ended:
    await asyncio.wait([task])
    ended = Ended(steps.passed)
    steps.set()
    if task.cancelled():
        ended.is_cancelled = True
    else:
        ended.error = task.exception()
    return ended


Manner = Callable[[Make, Steps, int], Coroutine[Any, Any, Ended]]

MANNERS: tuple[Manner, ...] = (cancelled_once, cancelled_again, timed_out, group_failed)
"""The ways in which a call is cancelled."""
