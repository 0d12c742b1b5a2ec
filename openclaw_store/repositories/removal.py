"""Bulk removal: archived tasks in few statements, without a command and a row object for each."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from openclaw_store.backends import Cursor
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
    """Called in the transaction, with true for each removed task; an error undoes the removal."""


def remove_tasks(transaction: WriteTransaction, removals: Sequence[Removal]) -> Sequence[Any]:
    """Apply removals; the result of each tells for every task if it was removed.

    On PostgreSQL the lock comes first: the function `store_write` has no such operation.
    """
    transaction.require_lock()
    return [_remove(transaction, removal) for removal in removals]


def _remove(transaction: WriteTransaction, removal: Removal) -> Sequence[bool]:
    unit = unit_of(transaction)
    sql, cursor = unit.sql, unit.cursor
    found = cursor.execute(sql.read_many[Task], (sql.given([id for id, _ in removal.versions]),))
    unit.count_from(*counters_of(found))
    present = {row[2]: row[3:6] for row in found if row[2] is not None}
    removed = [present.get(id, (None,))[0] == version for id, version in removal.versions]
    going = [id for (id, _), is_gone in zip(removal.versions, removed, strict=True) if is_gone]
    last, at = unit.reserve_revisions(len(going)), sql.to_moment(unit.now)
    item, kind = ENTITY_NAMES[Task], ChangeKind.REMOVED
    changes: list[Sequence[Any]] = []
    for revision, id in enumerate(going, last + 1):
        version, status, node = present[id]
        row = (status, None, node, None, version or None)
        changes.append((revision, at, item, id, kind.value, *row))
        unit.emit(Event(Task, id, None, Change(revision, unit.now, item, id, kind, *row)))
    if going:
        ids = [(id,) for id in going]
        cursor.write(sql.delete[Task], ids)
        cursor.write(sql.insert_change, changes)
        if cursor.execute(sql.has_past):
            cursor.write(sql.delete_past, ids)
    revisions = zip(removal.history, removed, strict=True)
    old = _ranges(one for of_task, is_gone in revisions if is_gone for one in of_task)
    if old:
        cursor.write(sql.delete_changes, old)
    removal.accept(cursor, removed)
    return removed


def _ranges(revisions: Iterable[int]) -> list[tuple[int, int]]:
    """Return the first and the last one of each range of consecutive revisions."""
    ranges: list[tuple[int, int]] = []
    for revision in sorted(revisions):
        if ranges and revision <= ranges[-1][1] + 1:
            ranges[-1] = (ranges[-1][0], revision)
        else:
            ranges.append((revision, revision))
    return ranges
