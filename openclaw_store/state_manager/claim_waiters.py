"""Waiters for work: claims that found no task, woken when a task may have become claimable.

A commit wakes waiters of each node: one for each new pending task, or, if it changes the node, one
for each slot that it may have freed. A waiter that is woken and then does not claim passes the
wake-up on, so none is lost.
"""

from __future__ import annotations

import asyncio
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import islice

from openclaw_store.domain import ASSIGNED, ENTITY_NAMES, ChangeKind, NodeInfo, TaskStatus

_NODE, _PENDING = ENTITY_NAMES[NodeInfo], TaskStatus.PENDING.value

Step = tuple[str, str, str | None, str]
"""Item, identifier, new status and kind of a change."""


class ClaimWaiters:
    """Futures of waiting claims by node, in the order of their arrival, on one event loop."""

    def __init__(self) -> None:
        self.nodes: defaultdict[str, dict[asyncio.Future[None], None]] = defaultdict(dict)
        """The waiters of each node that has some."""

    @contextmanager
    def waiting(self, node_id: str) -> Iterator[asyncio.Future[None]]:
        """Yield a future that is done when the node should claim.

        The caller looks for tasks only *after* it has registered here: a later commit wakes it. If
        it was woken and does not claim, it calls `pass_on`.
        """
        future = asyncio.get_running_loop().create_future()
        waiters = self.nodes[node_id]
        waiters[future] = None
        try:
            yield future
        finally:
            waiters.pop(future, None)
            if not waiters and self.nodes.get(node_id) is waiters:
                del self.nodes[node_id]

    def pass_on(self, node_id: str, future: asyncio.Future[None]) -> None:
        """Wake the next waiter of the node, if `future` was woken; its caller does not claim."""
        if future.done():
            self._wake(node_id, 1)

    def notice(self, steps: Sequence[Step]) -> None:
        """Wake waiters after a commit."""
        states = [status for item, _, status, _ in steps if item != _NODE]
        tasks, freed = states.count(_PENDING), sum(one not in ASSIGNED for one in states)
        changed = [(id, kind) for item, id, _, kind in steps if item == _NODE]
        # A node is updated with the tasks that it gets or loses; else it may claim anything now.
        counts = dict.fromkeys((id for id, _ in changed), freed)
        counts.update(
            (id, len(self.nodes.get(id, ())))
            for id, kind in changed
            if kind != ChangeKind.UPDATED or not states
        )
        for node_id in list(self.nodes):
            self._wake(node_id, counts.get(node_id, tasks))

    def wake_all(self) -> None:
        """Wake all waiters."""
        for node_id, waiters in list(self.nodes.items()):
            self._wake(node_id, len(waiters))

    def _wake(self, node_id: str, count: int) -> None:
        waiters = self.nodes.get(node_id, {})
        for future in list(islice(waiters, count)):
            del waiters[future]
            if not future.done():
                future.set_result(None)
        if not waiters:
            self.nodes.pop(node_id, None)
