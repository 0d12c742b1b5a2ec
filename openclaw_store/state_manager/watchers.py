"""Waiters for the next change, of any entity or of one task, and for work."""

from __future__ import annotations

import asyncio
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager

from openclaw_store.state_manager.claim_waiters import ClaimWaiters, Step

WATCH_SECONDS = 1.0
"""Seconds after which a watcher reads the change log without being woken."""


class Watchers:
    """Futures that are done at the next change, on one event loop."""

    def __init__(self) -> None:
        self.count = 0
        """The number of waiters for changes."""
        self.claims = ClaimWaiters()
        """The waiters for work."""
        self._waiters: defaultdict[str | None, set[asyncio.Future[None]]] = defaultdict(set)

    def notice(self, steps: Sequence[Step]) -> None:
        """Wake the waiters after a commit; without any, this need not be called."""
        self.wake(id for _, id, *_ in steps)
        self.claims.notice(steps)

    @contextmanager
    def next_change(self, task_id: str | None = None) -> Iterator[asyncio.Future[None]]:
        """Yield a future that is done at the next change of a task; `None` for any entity."""
        future = asyncio.get_running_loop().create_future()
        waiters = self._waiters[task_id]
        waiters.add(future)
        self.count += 1
        try:
            yield future
        finally:
            self.count -= 1
            waiters.discard(future)
            # After `wake` another set may be there, with later waiters.
            if not waiters and self._waiters.get(task_id) is waiters:
                del self._waiters[task_id]

    def wake(self, ids: Iterable[str | None]) -> None:
        """Wake the waiters for these tasks, and for any change."""
        for id in (*ids, None):
            for future in self._waiters.pop(id, ()):
                if not future.done():
                    future.set_result(None)

    def wake_for_changes(self) -> None:
        """Wake all waiters for changes."""
        self.wake(list(self._waiters))

    def wake_all(self) -> None:
        """Wake all waiters."""
        self.wake_for_changes()
        self.claims.wake_all()
