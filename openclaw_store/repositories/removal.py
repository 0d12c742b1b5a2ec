"""Bulk removal: archived tasks in few statements, without a command and a row object for each."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from openclaw_store.backends import BatchCursor, Cursor
from openclaw_store.database import WriteTransaction
from openclaw_store.domain import ENTITY_NAMES, Change, ChangeKind, Task
from openclaw_store.repositories.batches import unit_of
from openclaw_store.repositories.unit_of_work import Event, counters_of


@dataclass(frozen=True, slots=True)
class Removal:
    """Tasks to remove with their history, each only if it still has its version."""

    versions: Sequence[tuple[str, int]]
    """Identifier and version of each task."""
    history: Sequence[Sequence[int]]
    """The revisions of the changes of each task."""
    accept: Callable[[Cursor, Sequence[bool]], None]
    """Called in the transaction with what is removed; an error undoes it."""


def remove_tasks(transaction: WriteTransaction, removals: Sequence[Removal]) -> Sequence[Any]:
    """Apply removals; the result of each tells for every task if it was removed.

    On PostgreSQL the lock comes first: the function `store_write` has no such operation.
    """
    if isinstance(transaction.cursor, BatchCursor):
        transaction.cursor.require_lock()
    return [_remove(transaction, removal) for removal in removals]


def _remove(transaction: WriteTransaction, removal: Removal) -> Sequence[bool]:
    unit = unit_of(transaction)
    sql, cursor = unit.sql, unit.cursor
    found = cursor.execute(sql.read_many[Task], (sql.given([id for id, _ in removal.versions]),))
    unit.count_from(*counters_of(found))
    present = {row[2]: row[3:6] for row in found if row[2] is not None}
    removed = [present.get(id, (None,))[0] == version for id, version in removal.versions]
    outcomes = zip(removal.versions, removed, strict=True)
    going = [id for (id, _), is_removed in outcomes if is_removed]
    old = [
        (revision,)
        for revisions, is_removed in zip(removal.history, removed, strict=True)
        if is_removed
        for revision in revisions
    ]
    last, at = unit.reserve_revisions(len(going)), sql.to_moment(unit.now)
    item, kind = ENTITY_NAMES[Task], ChangeKind.REMOVED
    changes: list[Sequence[Any]] = []
    for revision, id in enumerate(going, last + 1):
        version, status, node = present[id]
        row = (item, id, str(kind), status, None, node, None, version or None)
        changes.append((revision, at, *row))
        unit.emit(Event(Task, id, None, Change(revision, unit.now, item, id, kind, *row[3:])))
    if going:
        ids = [(id,) for id in going]
        cursor.write(sql.delete[Task], ids)
        cursor.write(sql.insert_change, changes)
        cursor.write(sql.delete_past, ids)
    if old:
        cursor.write(sql.delete_change, old)
    removal.accept(cursor, removed)
    return removed
