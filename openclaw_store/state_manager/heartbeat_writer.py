"""The heartbeat writer: writes the heartbeats that wait in the cache, many at a time.

A heartbeat is written within a second. A command for its node takes it along, since the command
must not be decided before it: see `send`.
"""

from __future__ import annotations

import asyncio
from collections.abc import Coroutine, Sequence
from contextvars import Context
from typing import TYPE_CHECKING, Any

from openclaw_store.domain import NodeInfo
from openclaw_store.errors import ConflictError, NotFoundError, logger_of
from openclaw_store.repositories import (
    AfterHeartbeat,
    Command,
    Create,
    Heartbeat,
    apply,
    apply_heartbeats,
)

if TYPE_CHECKING:
    from openclaw_store.state_manager.replica import Replica

logger = logger_of("mirror")

HEARTBEAT_SECONDS = 0.5
"""Delay of a flush of heartbeats, in which more of them join it."""

HEARTBEAT_BATCH_SIZE = 128
"""Heartbeats submitted together."""


class HeartbeatWriter:
    """Writes the waiting heartbeats of a replica."""

    def __init__(self, replica: Replica) -> None:
        self._replica = replica
        self._timer: asyncio.TimerHandle | None = None
        self._flush: asyncio.Task[None] | None = None
        self._flushing = asyncio.Lock()  # one caller flushes at a time

    async def finish(self) -> None:
        """Wait for a flush that is under way."""
        if self._flush is not None:
            await asyncio.wait([self._flush])

    def stop(self) -> None:
        """Start no further flush."""
        if self._timer is not None:
            self._timer.cancel()

    def send(self, command: Command) -> Coroutine[Any, Any, Any]:
        """Commit a command, behind the waiting heartbeat of its node."""
        if not isinstance(command, Create):
            ids = [id for kind, id in command.related_keys if kind is NodeInfo]
            node_id = command.id if command.kind is NodeInfo else next(iter(ids), None)
            if node_id in self._replica.cache.heartbeats.waiting:
                return self._send_after_heartbeat(command, node_id)
        return self._replica.database.write(apply, command)

    async def _send_after_heartbeat(self, command: Command, node_id: str) -> Any:
        # The heartbeat is taken inside the coroutine: one that never runs must not keep it.
        heartbeats = self._replica.cache.heartbeats.take([node_id])
        if not heartbeats:
            return await self._replica.database.write(apply, command)
        known: Sequence[bool] | None = None
        try:
            after = AfterHeartbeat(heartbeats[0], command)
            outcome = await self._replica.database.write(apply, after)
            known = [True]
            return outcome
        except (ConflictError, NotFoundError):
            known = [True]  # the command was refused, but the heartbeat was written
            raise
        finally:
            self._acknowledge(heartbeats, known)

    async def flush(self, node_ids: Sequence[str] | None = None) -> None:
        """Write the waiting heartbeats, after a flush that is under way.

        Args:
            node_ids: Only those of these nodes; `None` for all.
        """
        async with self._flushing:
            ids = list(self._replica.cache.heartbeats.waiting) if node_ids is None else node_ids
            for start in range(0, len(ids), HEARTBEAT_BATCH_SIZE):
                await self.write(ids[start : start + HEARTBEAT_BATCH_SIZE])

    async def write(self, node_ids: Sequence[str]) -> None:
        """Write the waiting heartbeats of a few nodes."""
        heartbeats = self._replica.cache.heartbeats.take(node_ids)
        if not heartbeats:
            return
        known: Sequence[bool] | None = None
        try:
            known = await self._replica.database.write(apply_heartbeats, heartbeats)
        finally:
            self._acknowledge(heartbeats, known)

    def _acknowledge(self, heartbeats: Sequence[Heartbeat], known: Sequence[bool] | None) -> None:
        if self._replica.cache.acknowledge_heartbeats(heartbeats, known):
            self.flush_later()

    def flush_later(self) -> None:
        """Flush after `HEARTBEAT_SECONDS`."""
        if self._timer is None:
            loop = asyncio.get_running_loop()
            # An empty context: that of the caller may have a transaction, which forbids writing.
            self._timer = loop.call_later(HEARTBEAT_SECONDS, self._flush_now, context=Context())

    def _flush_now(self) -> None:
        async def flush() -> None:
            try:
                await self.flush()
            except Exception:  # no caller awaits this task; the heartbeats wait for the next flush
                logger.exception("heartbeats could not be written; they are tried again")

        self._timer = None
        self._flush = asyncio.get_running_loop().create_task(flush())
