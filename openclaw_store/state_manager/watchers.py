"""Those who wait for a change, of anything or of one task."""

from __future__ import annotations

import asyncio
from collections import defaultdict
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

WATCH_SECONDS = 1.0
"""How often a watcher looks at the feed though nothing has woken it."""


class Watchers:
    """Wakes, on their event loop, those who wait for a change."""

    def __init__(self) -> None:
        self._of_all: set[asyncio.Future[None]] = set()
        self._of_tasks: defaultdict[str, set[asyncio.Future[None]]] = defaultdict(set)

    @contextmanager
    def next_change(self) -> Iterator[asyncio.Future[None]]:
        """Done at the next change of anything; to be waited for inside."""
        future = asyncio.get_running_loop().create_future()
        self._of_all.add(future)
        try:
            yield future
        finally:
            self._of_all.discard(future)

    @contextmanager
    def next_change_of(self, task_id: str) -> Iterator[asyncio.Future[None]]:
        """Done at the next change of a task; to be waited for inside."""
        future = asyncio.get_running_loop().create_future()
        waiting = self._of_tasks[task_id]
        waiting.add(future)
        try:
            yield future
        finally:
            waiting.discard(future)
            if not waiting and self._of_tasks.get(task_id) is waiting:
                del self._of_tasks[task_id]

    def wake(self, ids: Iterable[str]) -> None:
        """Wake those who wait for a change of these tasks, or of anything."""
        if self._of_tasks:
            for id in ids:
                _finish(self._of_tasks.pop(id, ()))
        _finish(self._of_all)

    def wake_all(self) -> None:
        """Wake everybody, whether anything has changed or not."""
        self.wake(list(self._of_tasks))


def _finish(futures: Iterable[asyncio.Future[None]]) -> None:
    for future in futures:
        if not future.done():
            future.set_result(None)
