"""Waiters for the next change, of any entity or of one task."""

from __future__ import annotations

import asyncio
from collections import defaultdict
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

WATCH_SECONDS = 1.0
"""Seconds after which a watcher reads the change log without being woken."""


class Watchers:
    """Futures that are done at the next change, on one event loop."""

    def __init__(self) -> None:
        self._of_any: set[asyncio.Future[None]] = set()
        self._of_tasks: defaultdict[str, set[asyncio.Future[None]]] = defaultdict(set)

    @contextmanager
    def next_change(self) -> Iterator[asyncio.Future[None]]:
        """Yield a future that is done at the next change of any entity."""
        future = asyncio.get_running_loop().create_future()
        self._of_any.add(future)
        try:
            yield future
        finally:
            self._of_any.discard(future)

    @contextmanager
    def next_change_of(self, task_id: str) -> Iterator[asyncio.Future[None]]:
        """Yield a future that is done at the next change of a task."""
        future = asyncio.get_running_loop().create_future()
        waiting = self._of_tasks[task_id]
        waiting.add(future)
        try:
            yield future
        finally:
            waiting.discard(future)
            # After `wake` another set may be there, with later waiters.
            if not waiting and self._of_tasks.get(task_id) is waiting:
                del self._of_tasks[task_id]

    def wake(self, ids: Iterable[str]) -> None:
        """Wake the waiters for these tasks, and for any change."""
        if self._of_tasks:
            for id in ids:
                _finish(self._of_tasks.pop(id, ()))
        _finish(self._of_any)

    def wake_all(self) -> None:
        """Wake all waiters."""
        self.wake(list(self._of_tasks))


def _finish(futures: Iterable[asyncio.Future[None]]) -> None:
    for future in futures:
        if not future.done():
            future.set_result(None)
