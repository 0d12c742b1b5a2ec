"""Work that comes to its end, even when the caller who waits for it is cancelled."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any, TypeVar

from openclaw_store.backends.library_internals import untrack_task

Result = TypeVar("Result")


async def shield_until_done(
    work: Awaitable[Result],
    *,
    unwanted: Callable[[Result], object] | None = None,
    seconds: float | None = None,
) -> Result:
    """Do `work` to its end; a cancellation that comes meanwhile goes on afterwards.

    Args:
        work: What must not be left half-done.
        unwanted: Is given the result that the cancelled caller does not take any more.
        seconds: How long it may go on then, before it is cancelled after all.
    """
    future = _begun(work)
    cancelled: asyncio.CancelledError | None = None
    while not future.done():
        try:
            await asyncio.wait([future], timeout=None if cancelled is None else seconds)
        except asyncio.CancelledError as error:
            cancelled = error
        else:
            if not future.done():
                future.cancel()
    if cancelled is None:
        return future.result()
    if not ended_badly(future) and unwanted is not None:
        unwanted(future.result())
    raise cancelled


async def cancel_once(work: Awaitable[Result]) -> Result:
    """Do `work`, which is cancelled with its caller, but not again while it cleans up behind it."""
    future = _begun(work)
    cancelled: asyncio.CancelledError | None = None
    while not future.done():
        try:
            await asyncio.wait([future])
        except asyncio.CancelledError as error:
            if cancelled is None:
                future.cancel()
            cancelled = error
    if cancelled is None:
        return future.result()
    ended_badly(future)
    raise cancelled


def _begun(work: Awaitable[Result]) -> asyncio.Future[Result]:
    """Begin `work` in a task that only we cancel: at its end, `asyncio.run` cancels all others."""
    if isinstance(work, asyncio.Future):
        return work  # it was begun by others
    future = asyncio.ensure_future(work)
    if isinstance(future, asyncio.Task):
        untrack_task(future)
    return future


def cancel_once_more() -> None:
    """Have the cancellation that the running task has just caught come again where it next waits.

    So nothing comes out of what closes a connection: SQLAlchemy would report it as an error.
    """
    task = asyncio.current_task()
    assert task is not None
    task.uncancel()  # they are counted, and it is still the same one
    task.cancel()


def was_interrupted(future: asyncio.Future[Any]) -> bool:
    """Whether its work stopped half-way: by a cancellation, by Ctrl-C, or with its event loop."""
    if not future.done():
        return future.get_loop().is_closed()
    return future.cancelled() or not isinstance(future.exception(), Exception | None)


def ended_badly(future: asyncio.Future[Any]) -> bool:
    """Whether it has no result; an error that nobody waits for any more is not reported then."""
    return future.cancelled() or future.exception() is not None
