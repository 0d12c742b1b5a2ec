"""Heartbeats: signs of life, which come often, and are no changes.

They have no revision and no version. The newest wins; the only thing that one decides is whether
an OFFLINE node is back, and that is an ordinary change. So they have a way of their own into the
database, on which nothing is read and nothing decoded.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any, ClassVar, NamedTuple

from openclaw_store.database import USAGE, WriteTransaction
from openclaw_store.domain import EntityKey, NodeInfo, NodeStatus, Record
from openclaw_store.repositories.unit_of_work import (
    Command,
    Row,
    SingleRowCommand,
    UnitOfWork,
    apply,
    counters_of,
)


# Not frozen, though nobody changes them: that takes twice as long to make.
@dataclass(slots=True)
class Heartbeat(SingleRowCommand):
    """A node's heartbeat, with the usage it reported; the newest wins, but for one in the future.

    As an operation it brings a node back ONLINE that was OFFLINE before, which is an ordinary
    change, and results in whether there is such a node.
    """

    id: str
    at: datetime
    usage: Mapping[str, float | int]
    kind: ClassVar[type[Any]] = NodeInfo

    def is_news_to(self, record: Record[NodeInfo], now: datetime | None = None) -> bool:
        """Whether the node, as it is recorded, has sent none that is newer.

        Args:
            now: One behind this moment is not newer: the clock was turned back since.
        """
        last: datetime | None = record.last_heartbeat
        return last is None or self.at >= last or (now is not None and last > now)

    def after(self, earlier: Heartbeat) -> Heartbeat:
        """This one, with what `earlier` reported and it does not."""
        if self.usage.keys() >= earlier.usage.keys():
            return self
        return Heartbeat(self.id, self.at, {**earlier.usage, **self.usage})

    def over(self, record: Record[NodeInfo]) -> Record[NodeInfo]:
        """The node with what was reported."""
        return record.evolve(last_heartbeat=self.at, **self.usage)

    def decide(self, row: Row) -> bool:
        record = row.record
        if record is None:
            return False
        if self.is_news_to(record, row.now):
            touched = self.over(record)
            row.touch(touched, ("last_heartbeat", *self.usage), HeartbeatWritten(self, row.flush))
            if record.status is NodeStatus.OFFLINE:
                since = row.status_since()  # another process may have set it so meanwhile
                if since is None or self.at >= since or since > row.now:
                    back = touched.evolve(status=NodeStatus.ONLINE)
                    row.write(back, ("status",), "heartbeat")
        return True


class HeartbeatWritten(NamedTuple):
    """What listeners are told of a heartbeat that was written."""

    beat: Heartbeat
    flush: int
    """What `nodes.beat` is since then."""


@dataclass(frozen=True, slots=True)
class AfterHeartbeat:
    """An operation that writes a node, behind a heartbeat that has not been written yet."""

    beat: Heartbeat
    operation: Command
    """Which does not create anything."""
    is_new: ClassVar[bool] = False

    @property
    def kind(self) -> type[Any]:
        return self.operation.kind

    @property
    def id(self) -> str:
        return self.operation.id

    @property
    def others(self) -> Iterable[EntityKey]:
        return (*self.operation.others, (NodeInfo, self.beat.id))

    @property
    def hints(self) -> Iterable[Record[Any]]:
        return self.operation.hints

    @property
    def key(self) -> str | None:
        return self.operation.key

    def decide(self, row: Row) -> Any:
        self.beat.decide(row.other(NodeInfo, self.beat.id))
        return self.operation.decide(row)


def apply_heartbeats(
    transaction: WriteTransaction, groups: Sequence[Sequence[Heartbeat]]
) -> Sequence[Sequence[bool]]:
    """Apply groups of heartbeats, each of which was submitted as one."""
    return [_apply(transaction, group) for group in groups]


def _apply(transaction: WriteTransaction, heartbeats: Sequence[Heartbeat]) -> Sequence[bool]:
    unit = transaction.unit_of_work or UnitOfWork(transaction)
    unit.count_from(*counters_of(transaction.cursor.execute(unit.sql.read_counters)))
    now = unit.sql.to_moment(transaction.now)
    rows = []
    for beat in heartbeats:
        at = unit.sql.to_moment(beat.at)
        rows.append((*map(beat.usage.get, USAGE), at, unit.beat, beat.id, at, now))
    transaction.cursor.expect(
        dict.fromkeys(beat.id for beat in heartbeats)
    )  # they are not as they were
    if transaction.cursor.count(unit.sql.beat, rows) < len(rows):
        # Some are of unknown or OFFLINE nodes, or older than others: each is decided by itself. For
        # those that were written that makes no difference.
        known: Sequence[bool] = apply(transaction, heartbeats)
        return known
    unit.beaten = True
    for beat in heartbeats:
        unit.tell(HeartbeatWritten(beat, unit.beat))
    return [True] * len(heartbeats)
