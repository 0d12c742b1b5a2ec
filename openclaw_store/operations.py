"""The operations: what each write asks of a row, and when it is refused."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any, ClassVar, Generic

from openclaw_store.changes import ITEM, Row, apply, counters_of, missing
from openclaw_store.errors import DuplicateError, StaleVersionError, StoreError
from openclaw_store.models import ALIVE, NodeInfo, NodeStatus, Task, TaskStatus
from openclaw_store.records import Item, Record
from openclaw_store.schema import FIELDS, KEY
from openclaw_store.statements import statements_for
from openclaw_store.writer import Unit

CONTENT: Mapping[type[Any], Sequence[str]] = {
    kind: tuple(name for name in names if name != KEY[kind]) for kind, names in FIELDS.items()
}
"""The fields that an `Update` of a whole row writes: all but the identifier."""


# Not frozen, though nobody changes them: that takes twice as long to make.
@dataclass(slots=True)
class Create(Generic[Item]):
    """Add a row; results in its record, or `DuplicateError`.

    The record is the operation's own: it is stamped when it is written.
    """

    kind: type[Item]
    id: str
    record: Record[Item]
    is_new: ClassVar = True

    def decide(self, row: Row) -> Record[Item] | StoreError:
        if row.version is not None:
            return DuplicateError(ITEM[self.kind], self.id)
        return row.write(self.record, FIELDS[self.kind])


@dataclass(slots=True)
class Update(Generic[Item]):
    """Write the named fields of a row that has still this version.

    Results in the new record, or `StaleVersionError`, or `NotFoundError`. The record is the
    operation's own: it is stamped when it is written.
    """

    kind: type[Item]
    id: str
    record: Record[Item]
    names: Sequence[str]
    version: int

    def decide(self, row: Row) -> Record[Item] | StoreError:
        if row.version is None:
            return missing(self.kind, self.id)
        if row.version != self.version:
            return StaleVersionError(ITEM[self.kind], self.id, self.version, row.version)
        record: Record[Any] = self.record
        if row.record is not None:
            record = row.record.merge(record, self.names)
            if self.kind is NodeInfo:
                newest = newer_heartbeat(row.record, self.record)
                record = record.evolve(last_heartbeat=newest)
        return row.write(record, self.names)


def newer_heartbeat(known: Record[Any], given: Record[Any]) -> datetime | None:
    """The last heartbeat of a node that is updated: it never goes back."""
    moments = [record["last_heartbeat"] for record in (known, given)]
    return max((moment for moment in moments if moment is not None), default=None)


@dataclass(frozen=True, slots=True)
class Remove:
    """Remove a row, and with `with_history` its older changes; results in whether it existed."""

    kind: type[Any]
    id: str
    with_history: bool = False

    def decide(self, row: Row) -> bool:
        if row.version is None:
            return False
        row.remove(with_history=self.with_history)
        return True


@dataclass(frozen=True, slots=True)
class SetNodeStatus:
    """Change a node's status; ONLINE and BUSY count as a sign of life.

    With `silent_since` only a live node that was silent since then is changed. Results in
    whether it was.
    """

    id: str
    status: NodeStatus
    silent_since: datetime | None = None
    reason: str | None = None
    kind: ClassVar[type[Any]] = NodeInfo

    def decide(self, row: Row) -> bool:
        record = row.record
        if record is None:
            return False
        if self.silent_since is not None:
            last_sign = record["last_heartbeat"] or record["registered_at"]
            if record["status"] not in ALIVE or last_sign >= self.silent_since:
                return False
        values: dict[str, Any] = {"status": self.status}
        if self.status in ALIVE:
            values["last_heartbeat"] = max(row.now, record["last_heartbeat"] or row.now)
        row.write(record.evolve(**values), values, self.reason)
        return True


@dataclass(frozen=True, slots=True)
class RemoveFinished:
    """Remove up to `limit` tasks that finished before `cutoff`, with their history.

    Results in how many there were.
    """

    cutoff: datetime
    keep: tuple[TaskStatus, ...]
    limit: int


def remove_finished(unit: Unit, operations: Sequence[RemoveFinished]) -> Sequence[int]:
    """Apply `RemoveFinished` operations."""
    return [
        len(apply(unit, [Remove(Task, id, with_history=True) for id in _finished(unit, operation)]))
        for operation in operations
    ]


def _finished(unit: Unit, operation: RemoveFinished) -> Sequence[str]:
    sql = statements_for(unit.cursor.dialect)
    ids: list[str] = []
    for search in sql.finished(operation.keep):
        limits = (sql.to_moment(operation.cutoff), operation.limit - len(ids))
        ids.extend(id for (id,) in unit.cursor.execute(search, limits))
    return ids


@dataclass(frozen=True, slots=True)
class Compact:
    """Remove the changes up to a revision from the feed, but never the newest one of all.

    Results in how many there were.
    """

    until: int


def compact(unit: Unit, operations: Sequence[Compact]) -> Sequence[int]:
    """Apply `Compact` operations."""
    sql = statements_for(unit.cursor.dialect)
    newest, _ = counters_of(unit.cursor.execute(sql.read_counters))
    return [
        len(unit.cursor.execute(sql.forget_until, (min(operation.until, newest - 1),)))
        for operation in operations
    ]
