"""Work that completes, or cleans up, although its caller is cancelled."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from typing import Any, TypeVar

from openclaw_store.backends.internals import untrack_task

Result = TypeVar("Result")


async def shield_until_done(
    work: Awaitable[Result],
    *,
    discard: Callable[[Result], object] | None = None,
    seconds: float | None = None,
) -> Result:
    """Complete `work`; a cancellation of the caller takes effect afterwards.

    Args:
        work: An operation that must not stop half-way.
        discard: Receives the result if the caller was cancelled.
        seconds: Time for `work` after a cancellation, before it is cancelled too.
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
    if not ended_badly(future) and discard is not None:
        discard(future.result())
    raise cancelled


async def cancel_once(work: Awaitable[Result]) -> Result:
    """Run `work`, cancel it with its caller, but not a second time while it cleans up."""
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
    """Start `work` in a task that `asyncio.run` does not cancel at its end."""
    if isinstance(work, asyncio.Future):
        return work  # its owner has started it
    future = asyncio.ensure_future(work)
    if isinstance(future, asyncio.Task):
        untrack_task(future)
    return future


def cancel_once_more() -> None:
    """Raise the cancellation that the running task has just caught again at its next await.

    Use it where a connection is closed: SQLAlchemy reports a `CancelledError` there as an error.
    """
    task = asyncio.current_task()
    assert task is not None
    task.uncancel()  # cancellations are counted, and this is the same one
    task.cancel()


def was_interrupted(future: asyncio.Future[Any]) -> bool:
    """Return `True` if the work stopped half-way: cancelled, by Ctrl-C, or with its event loop."""
    if not future.done():
        return future.get_loop().is_closed()
    return future.cancelled() or not isinstance(future.exception(), Exception | None)


def ended_badly(future: asyncio.Future[Any]) -> bool:
    """Return `True` if there is no result; asyncio then no longer reports the error as unused."""
    return future.cancelled() or future.exception() is not None
