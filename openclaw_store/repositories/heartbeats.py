"""Heartbeats: written without a revision, on a path that reads and decodes no rows.

The newest heartbeat of a node wins. Only an OFFLINE node needs a decision, since its return to
ONLINE is an ordinary change.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any, ClassVar, NamedTuple

from openclaw_store.database import USAGE, WriteTransaction
from openclaw_store.domain import ENTITY_NAMES, EntityKey, NodeInfo, NodeStatus, Record
from openclaw_store.repositories.batches import apply, unit_of
from openclaw_store.repositories.unit_of_work import Command, Row, counters_of


# Not frozen: a frozen dataclass takes twice as long to construct. It is never changed.
@dataclass(slots=True)
class Heartbeat(Command):
    """A heartbeat of a node, with the reported usage.

    As a command it also returns an OFFLINE node to ONLINE; its result is `False` if there is no
    such node.
    """

    id: str
    at: datetime
    usage: Mapping[str, float | int]
    kind: ClassVar[type[Any]] = NodeInfo

    def is_news_to(self, record: Record[NodeInfo], now: datetime | None = None) -> bool:
        """Return true if the last heartbeat of the node is not newer.

        Args:
            now: A last heartbeat after this time does not count: a clock was ahead.
        """
        last: datetime | None = record.last_heartbeat
        return last is None or self.at >= last or (now is not None and last > now)

    def after(self, earlier: Heartbeat) -> Heartbeat:
        """Return this heartbeat with the usage that only `earlier` reports."""
        if self.usage.keys() >= earlier.usage.keys():
            return self
        return Heartbeat(self.id, self.at, {**earlier.usage, **self.usage})

    def over(self, record: Record[NodeInfo]) -> Record[NodeInfo]:
        """Return the node with the reported values."""
        return record.evolve(last_heartbeat=self.at, **self.usage)

    def decide(self, row: Row) -> bool:
        record = row.record
        if record is None:
            return False
        if self.is_news_to(record, row.now):
            row.record = touched = self.over(record)
            row.names = row.names.union(("last_heartbeat", "beat"), self.usage)
            row.unit.emit(HeartbeatWritten(self, row.unit.heartbeat_sequence))
            if record.status is NodeStatus.OFFLINE:
                since = _status_since(row)  # another process may have set it since this heartbeat
                if since is None or self.at >= since or since > row.now:
                    values = {"status": NodeStatus.ONLINE, "status_reason": None}
                    row.write(touched.evolve(**values), values, "heartbeat")
        return True


class HeartbeatWritten(NamedTuple):
    """A heartbeat that was written, for the listeners."""

    heartbeat: Heartbeat
    sequence: int
    """The heartbeat sequence number in `nodes.beat`."""


class AfterHeartbeat:
    """A command that writes a node, applied after a pending heartbeat; it must not create a row."""

    is_new: ClassVar[bool] = False
    is_one_call: ClassVar[bool] = False

    def __init__(self, heartbeat: Heartbeat, command: Command) -> None:
        self.heartbeat = heartbeat
        self.command = command
        self.kind, self.id, self.key = command.kind, command.id, command.key
        self.known, self.version = command.known, command.version
        self.related_keys: Sequence[EntityKey] = (*command.related_keys, (NodeInfo, heartbeat.id))

    def decide(self, row: Row) -> Any:
        self.heartbeat.decide(row.other(NodeInfo, self.heartbeat.id))
        return self.command.decide(row)


def apply_heartbeats(
    transaction: WriteTransaction, groups: Sequence[Sequence[Heartbeat]]
) -> Sequence[Sequence[bool]]:
    """Apply groups of heartbeats; each group was submitted as one operation."""
    return [_apply_group(transaction, group) for group in groups]


def _apply_group(transaction: WriteTransaction, heartbeats: Sequence[Heartbeat]) -> Sequence[bool]:
    unit = unit_of(transaction)
    unit.count_from(*counters_of(transaction.cursor.execute(unit.sql.read_counters)))
    sequence = unit.heartbeat_sequence
    rows = []
    for one in heartbeats:
        at = unit.sql.to_moment(one.at)
        rows.append((*map(one.usage.get, USAGE), at, sequence, one.id, at, unit.at))
    if transaction.cursor.count(unit.sql.beat, rows) < len(rows):
        # Some nodes are missing, OFFLINE, or have a newer heartbeat: decide each by itself. A
        # second write of the same heartbeat changes nothing.
        outcomes: Sequence[bool] = apply(transaction, heartbeats)
        return outcomes
    for one in heartbeats:
        unit.emit(HeartbeatWritten(one, sequence))
    return [True] * len(heartbeats)


def _status_since(row: Row) -> datetime | None:
    """Return the time of the last change of status; `None` if the change log lacks it."""
    unit, newest, item = row.unit, row.version, ENTITY_NAMES[row.kind]
    for change in reversed(unit.changes):  # not in the log yet
        if (change.item, change.item_id) == (item, row.id):
            if change.from_status != change.to_status:
                return row.now
            newest = change.previous
    found = unit.cursor.execute(unit.sql.status_since, (newest, item, row.id))
    return unit.sql.from_moment(found[0][0]) if found else None
