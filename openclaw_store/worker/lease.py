"""The lease of a worker on its node: taken at the start, renewed by heartbeats, and lost.

A worker whose process was killed leaves its lease behind. The next worker of the node waits for a
heartbeat: without one, it takes the node over; otherwise two workers have the same node, and the
second one is refused. The session in the row tells the first one if it was replaced nevertheless.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Mapping
from dataclasses import replace

from openclaw_store.domain import NodeInfo, NodeStatus, Progress, new_id
from openclaw_store.errors import NodeInUseError, logger_of
from openclaw_store.repositories import Lease
from openclaw_store.state_manager import StateManager

logger = logger_of("worker")

HEARTBEATS_PER_LEASE = 12
"""Heartbeats in the time of a lease, so that a few lost ones do not end it."""

MISSED_HEARTBEATS = 2
"""Heartbeats that a crashed worker has missed when its node is taken over."""

LOOK_SECONDS = 0.5
"""Longest pause between two looks for the heartbeat of another worker."""


class NodeLease:
    """The lease of one worker; the caller makes all calls on one event loop.

    Args:
        node: The node to register; it is copied.
        seconds: Seconds without a heartbeat after which the lease is lost.
    """

    def __init__(self, node: NodeInfo, seconds: float) -> None:
        self.node = replace(node, status=NodeStatus.ONLINE, lease_seconds=seconds, session=new_id())
        self.seconds = seconds
        self.registered = 0
        """The revision of the last registration, which has released all earlier tasks."""
        self.holds = asyncio.Event()
        """Set while the node is registered, and the lease is not lost."""
        self._until = 0.0  # by `time.monotonic`
        self._beat_at = 0.0
        self._reported: Mapping[str, Progress] = {}

    @property
    def left(self) -> float:
        """Seconds until the lease ends."""
        return self._until - time.monotonic()

    @property
    def pause(self) -> float:
        """Seconds until the next heartbeat."""
        return self._beat_at - time.monotonic()

    async def take(self, manager: StateManager) -> None:
        """Register the node; first wait if a worker that may have crashed has a lease of it.

        Raises:
            NodeInUseError: If another worker of this node sends heartbeats.
        """
        try:
            await self.register(manager)
            return
        except NodeInUseError as error:
            if not await self._has_crashed(manager, error.session):
                raise
            crashed = error.session
        logger.warning("node %r is taken over from a crashed worker", self.node.node_id)
        await self.register(manager, crashed)

    async def register(self, manager: StateManager, replaced: str | None = None) -> None:
        """Register the node, which releases its tasks.

        Raises:
            NodeInUseError: If another session than `replaced` has a lease of it.
        """
        began = time.monotonic()
        await manager.register_node(self.node, replaced=replaced)
        self._renewed(began)
        self.registered = self.node.version
        self.holds.set()

    async def renew(self, manager: StateManager, progress: Mapping[str, Progress]) -> Lease | None:
        """Send a heartbeat with the progress of the running tasks; return its answer."""
        began = time.monotonic()
        changed = progress if progress != self._reported else None
        lease = await manager.renew_lease(self.node.node_id, changed)
        if lease is not None:
            self._reported = progress
            self._renewed(began)
        return lease

    def end(self, node: NodeInfo) -> None:
        """Set the stored node OFFLINE, and free for another worker, if it is still this one's."""
        if node.session == self.node.session:
            node.session = None
            if node.status is not NodeStatus.MAINTENANCE:
                node.status, node.status_reason = NodeStatus.OFFLINE, None

    def lose(self) -> None:
        """Note that the node must be registered again."""
        self.holds.clear()
        self._reported = {}

    def _renewed(self, at: float) -> None:
        # Counted from before the call: the lease ends here before it ends in the database.
        self._until = at + self.seconds
        self._beat_at = at + self.seconds / HEARTBEATS_PER_LEASE

    async def _has_crashed(self, manager: StateManager, session: str | None) -> bool:
        """Wait for a heartbeat of the worker with this session; return true if none comes."""
        found = await manager.node_repo.get(self.node.node_id)
        if found is None or found.lease_seconds is None:
            return True
        patience = found.lease_seconds / HEARTBEATS_PER_LEASE * MISSED_HEARTBEATS + LOOK_SECONDS
        logger.warning(
            "another worker has a lease of node %r: waiting up to %.3g s for its heartbeat",
            self.node.node_id,
            patience,
        )
        last, until = found.last_heartbeat, time.monotonic() + patience
        while time.monotonic() < until:
            await asyncio.sleep(min(LOOK_SECONDS, patience / 4))
            found = await manager.node_repo.get(self.node.node_id)
            if found is None or found.session != session or found.status is NodeStatus.OFFLINE:
                return True  # it has ended
            if found.last_heartbeat != last:
                return False
        return True
