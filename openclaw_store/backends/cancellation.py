"""Work that completes, or cleans up, although its caller is cancelled."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Awaitable, Callable
from concurrent.futures import Future
from contextlib import suppress
from typing import Any, TypeVar

from openclaw_store.backends.internals import untrack_task

Result = TypeVar("Result")

Stop = Future[None]
"""Done as soon as blocking work is to stop, because its caller was cancelled."""

STOPPING_SECONDS = 1.0
"""Longest wait, in seconds, for a read or for blocking work after its caller was cancelled."""


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


async def on_thread(work: Callable[[Stop], Result]) -> Result:
    """Run blocking work on a thread; a cancellation of the caller stops it.

    The process may end while the work does something that cannot stop.
    """
    outcome: Future[Result] = Future()
    # Else a cancellation would reach it by `wrap_future`, and the thread could not set it any more.
    outcome.set_running_or_notify_cancel()
    stop = Stop()

    def run() -> None:
        try:
            outcome.set_result(work(stop))
        except BaseException as error:
            outcome.set_exception(error)

    threading.Thread(target=run, name="openclaw-store-work", daemon=True).start()
    done = asyncio.wrap_future(outcome)
    try:
        return await asyncio.shield(done)
    except asyncio.CancelledError:
        done.add_done_callback(ended_badly)
        stop.set_result(None)
        await asyncio.wait([done], timeout=STOPPING_SECONDS)
        raise


def cancel_at(stop: Stop) -> None:
    """Cancel the running task when `stop` is done."""
    loop, task = asyncio.get_running_loop(), asyncio.current_task()
    assert task is not None

    def cancel(_: Stop) -> None:
        with suppress(RuntimeError):  # the loop may be closed
            loop.call_soon_threadsafe(task.cancel)

    stop.add_done_callback(cancel)


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
    """Return true if the work stopped half-way: cancelled, by Ctrl-C, or with its event loop."""
    if not future.done():
        return future.get_loop().is_closed()
    return future.cancelled() or not isinstance(future.exception(), Exception | None)


def ended_badly(future: asyncio.Future[Any]) -> bool:
    """Return true if there is no result; asyncio then no longer reports the error as unused."""
    return future.cancelled() or future.exception() is not None
