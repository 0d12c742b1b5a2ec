"""One attempt at a task: the call of its handler, and how it ends."""

from __future__ import annotations

import asyncio
import inspect
import threading
import traceback
from collections.abc import Callable, Iterator
from concurrent.futures import Executor
from contextlib import contextmanager
from contextvars import copy_context
from enum import StrEnum
from functools import partial
from pathlib import Path
from typing import Any

from openclaw_store.domain import Progress, Task, describe_exception, progress_of, utc_now
from openclaw_store.errors import InvalidDataError

MAX_TRACEBACK_LENGTH = 4000
"""Characters of the end of a traceback, and of the text of an exception, that are stored."""

Handler = Callable[[Task, "Run"], Any]
"""Runs a task: a coroutine function, or a plain function, which runs in a thread.

Its result, any JSON value, is the result of the task. An exception is a failed attempt.
"""


class Interruption(StrEnum):
    """The reason for which a worker ends the work on a task."""

    CANCELLED = "cancelled"
    """The task is to be cancelled."""
    LOST = "lost"
    """The node does not own the task any more."""
    STOPPED = "stopped"
    """The worker ends."""
    TIMED_OUT = "timed out"
    """The task runs for longer than its `timeout`."""


class Run:
    """An attempt at a task, for its handler.

    Args:
        task: The claimed task.
    """

    def __init__(self, task: Task) -> None:
        self.task = task
        self.latest: Progress | None = None
        """The newest progress; `None` before the first call of `progress`."""
        # Set on the event loop, read on the thread of a plain function.
        self._is_interrupted = threading.Event()

    def __repr__(self) -> str:
        return f"<Run of task {self.task.task_id!r}, attempt {self.task.attempt}>"

    @property
    def cancelled(self) -> bool:
        """True if the handler should end: its result is not wanted any more.

        A coroutine is cancelled besides. A function in a thread cannot be: it should look here
        from time to time, as it keeps its slot until it returns. May be read on any thread.
        """
        return self._is_interrupted.is_set()

    def progress(self, fraction: float | None = None, note: str | None = None) -> None:
        """Tell how far the work is; may be called often, and on any thread.

        The next heartbeat carries the newest progress; see `StateManager.get_progress`.

        Args:
            fraction: The part that is done, 0 to 1.
            note: A short text, such as `epoch 3`; 500 characters of it are kept.

        Raises:
            InvalidDataError: If the fraction is not a number from 0 to 1, or the note is not text.
        """
        self.latest = progress_of(self.task.attempt, fraction, note, utc_now())


class Attempt(Run):
    """An attempt at a task, for its worker."""

    def __init__(self, task: Task) -> None:
        super().__init__(task)
        self.owned = task.task_id, task.attempt
        """The key of the attempt in a `Lease`."""
        self.interruption: Interruption | None = None
        """The reason for which the handler should end; `None` while it should run."""
        self._work: asyncio.Future[Any] | None = None
        self._is_in_thread = False

    def interrupt(self, reason: Interruption) -> None:
        """Ask the handler to end; only the first reason counts."""
        if self.interruption is None:
            self.interruption = reason
            self._is_interrupted.set()
            if self._work is not None and not self._is_in_thread:
                self._work.cancel()

    async def call(self, handler: Handler, executor: Executor) -> Any:
        """Call the handler and return its result, or raise its exception.

        After the `timeout` of the task it is interrupted. The call ends when the handler does.
        """
        loop = asyncio.get_running_loop()
        if is_coroutine_function(handler):
            self._work = loop.create_task(_await(handler, self.task, self))
        else:
            self._is_in_thread = True
            call = partial(copy_context().run, _call, handler, self.task, self)
            self._work = loop.run_in_executor(executor, call)
        if self.interruption is not None and not self._is_in_thread:  # before it began
            self._work.cancel()
        limit, timer = self.task.timeout, None
        if limit is not None:
            timer = loop.call_later(limit, self.interrupt, Interruption.TIMED_OUT)
        try:
            # The cancellation of the caller cancels a coroutine, and waits for its end.
            result = await self._work
        finally:
            if timer is not None:
                timer.cancel()
        caller = asyncio.current_task()
        if caller is not None and caller.cancelling():  # the handler has ignored it
            raise asyncio.CancelledError
        return result


def check_handler(handler: Handler) -> None:
    """Refuse a handler that cannot be called with a task and its run.

    Raises:
        InvalidDataError: If it is no function, or takes other arguments.
    """
    if not callable(handler):
        raise InvalidDataError("handle", f"must be a function, not {type(handler).__name__}")
    try:
        arguments = inspect.signature(handler)
    except ValueError:  # a function written in C, which does not tell
        return
    try:
        arguments.bind("task", "run")
    except TypeError:
        wanted = "must take two arguments, the task and its run, as handle(task, run)"
        raise InvalidDataError("handle", f"{wanted}; it takes {arguments}") from None


def is_coroutine_function(handler: Handler) -> bool:
    """Return true if a call of the handler returns a coroutine."""
    own = type(handler).__call__  # of an object with a method of that name
    return inspect.iscoroutinefunction(handler) or inspect.iscoroutinefunction(own)


async def _await(handler: Handler, task: Task, run: Run) -> Any:
    with _no_exit():
        return await handler(task, run)


def _call(handler: Handler, task: Task, run: Run) -> Any:
    with _no_exit():
        return handler(task, run)


@contextmanager
def _no_exit() -> Iterator[None]:
    """Turn `SystemExit`, which would end the worker with all other tasks, into an error."""
    try:
        yield
    except SystemExit as error:
        raise RuntimeError(f"the handler has called sys.exit({error.code!r})") from error


def describe(error: BaseException) -> str:
    """Return the traceback of an exception, its end if it is long, and its type and text."""
    frames = [
        frame
        for frame in traceback.extract_tb(error.__traceback__)
        if frame.filename not in _OWN_FILES
    ]
    lines = "".join(traceback.format_list(frames))[-MAX_TRACEBACK_LENGTH:]
    return lines.replace("\0", "\\0") + describe_exception(error)[:MAX_TRACEBACK_LENGTH]


_OWN_FILES = frozenset(str(Path(__file__).with_name(name)) for name in ("run.py", "worker.py"))
"""Files of the worker itself: their frames are left out of a traceback."""
