"""Heartbeats of this process that a node read from the database may lack.

A heartbeat has no version, so a node's version does not tell which heartbeats its row contains. A
heartbeat waits until it is submitted, is in flight until it is acknowledged, and is written until
`catch_up` has read it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

from openclaw_store.domain import NodeInfo, Record
from openclaw_store.repositories import Heartbeat, HeartbeatWritten


class PendingHeartbeats:
    """The pending heartbeats of all nodes."""

    def __init__(self) -> None:
        self.waiting: dict[str, Heartbeat] = {}
        """Heartbeats not submitted yet, by node."""
        self._in_flight: dict[str, list[Heartbeat]] = {}  # submitted, but not acknowledged
        # By node and field: the value last written, with its heartbeat sequence.
        self._written: dict[str, dict[str, tuple[int, Any]]] = {}

    def keep(self, other: PendingHeartbeats) -> None:
        """Keep the heartbeats of `other` that are not written yet."""
        self.waiting, self._in_flight = other.waiting, other._in_flight

    def node_ids(self) -> set[str]:
        """Return the nodes that have a heartbeat that is not written yet."""
        return {*self.waiting, *self._in_flight}

    def add(self, heartbeat: Heartbeat) -> None:
        """Let a heartbeat wait until it is taken."""
        earlier = self.waiting.get(heartbeat.id)
        self.waiting[heartbeat.id] = heartbeat if earlier is None else heartbeat.after(earlier)

    def take(self, node_ids: Iterable[str]) -> list[Heartbeat]:
        """Return the waiting heartbeats of these nodes; the caller submits them."""
        taken = [self.waiting.pop(id) for id in node_ids if id in self.waiting]
        for heartbeat in taken:
            self._in_flight.setdefault(heartbeat.id, []).append(heartbeat)
        return taken

    def acknowledge(
        self,
        heartbeats: Sequence[Heartbeat],
        known: Sequence[bool] | None,
        is_unsaved: Callable[[str], bool],
    ) -> bool:
        """Record the outcome of submitted heartbeats; return true if some wait again.

        A written one was noted before, by `end_flight`.

        Args:
            known: False for a heartbeat of an unknown node; `None` if the write failed.
            is_unsaved: Whether a node is only in memory: its heartbeat waits until it is stored.
        """
        are_waiting = False
        for index, heartbeat in enumerate(heartbeats):
            id = heartbeat.id
            is_written = not self.end_flight(heartbeat)
            if is_written or (known and (known[index] or not is_unsaved(id))):
                continue
            newer = self.waiting.get(id)
            self.waiting[id] = heartbeat if newer is None else newer.after(heartbeat)
            are_waiting = True
        return are_waiting

    def end_flight(self, heartbeat: Heartbeat) -> bool:
        """Note that a heartbeat is no longer in flight; return false if it was not."""
        in_flight = self._in_flight.pop(heartbeat.id, ())
        remaining = [one for one in in_flight if one is not heartbeat]
        if remaining:
            self._in_flight[heartbeat.id] = remaining
        return len(remaining) < len(in_flight)

    def over(self, node: Record[NodeInfo]) -> Record[NodeInfo]:
        """Return a stored node with the heartbeats that are not written yet."""
        id = node.node_id
        heartbeats = self._in_flight.get(id, [])
        if id in self.waiting:
            heartbeats = [*heartbeats, self.waiting[id]]
        for heartbeat in heartbeats:
            if heartbeat.is_news_to(node):
                node = heartbeat.over(node)
        return node

    def note_written(self, event: HeartbeatWritten) -> None:
        """Note the values of a written heartbeat, which no snapshot has shown yet."""
        heartbeat, sequence = event
        values = {"last_heartbeat": heartbeat.at, **heartbeat.usage}
        written = self._written.setdefault(heartbeat.id, {})
        written.update((name, (sequence, value)) for name, value in values.items())

    def written_over(self, node: Record[NodeInfo], sequence: int) -> Record[NodeInfo]:
        """Return a node of the snapshot at `sequence` with the values written after it."""
        written = self._written.get(node.node_id, {})
        newer = {name: value for name, (at, value) in written.items() if at > sequence}
        return node.evolve(**newer) if newer else node

    def forget_written(self, sequence: int) -> None:
        """Forget the written values up to `sequence`: the cache has read them."""
        self._written = {
            id: newer
            for id, written in self._written.items()
            if (newer := {name: value for name, value in written.items() if value[0] > sequence})
        }
