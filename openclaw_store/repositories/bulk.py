"""Bulk insertion: new tasks in few statements, without a command and a row object for each."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

from openclaw_store.backends import BatchCursor
from openclaw_store.database import ROWS, WriteTransaction, from_microseconds
from openclaw_store.domain import ENTITY_NAMES, FINISHED, Change, ChangeKind, Raw, Record, Task
from openclaw_store.errors import DuplicateError
from openclaw_store.repositories.batches import unit_of
from openclaw_store.repositories.unit_of_work import Event, UnitOfWork, counters_of

Refusals = Sequence[DuplicateError | None]
"""The error of each refused task, and `None` for each added one."""

_ITEM, _CREATED = ENTITY_NAMES[Task], str(ChangeKind.CREATED)


class TasksAdded(NamedTuple):
    """Committed new tasks with consecutive versions, for the listeners."""

    records: Sequence[Record[Task]]

    def events(self) -> Iterator[Event]:
        """Yield the change of each task."""
        for one in self.records:
            id, at, node = one.task_id, one.updated_at, one.assigned_node
            created = Change(
                one.version, at, _ITEM, id, ChangeKind.CREATED, None, one.status.value, node, None
            )
            yield Event(Task, id, one, created)


def changes_of(events: Iterable[object]) -> Iterator[Change]:
    """Yield the changes of a commit."""
    for event in events:
        if isinstance(event, TasksAdded):
            yield from (one.change for one in event.events())
        elif isinstance(event, Event):
            yield event.change


def insert_tasks(
    transaction: WriteTransaction, batches: Sequence[Sequence[Record[Task]]]
) -> Sequence[Refusals]:
    """Add batches of tasks; set the versions and times in their records.

    On PostgreSQL the lock comes first: the function `store_write` would take longer.
    """
    if isinstance(transaction.cursor, BatchCursor):
        transaction.cursor.require_lock()
    unit = unit_of(transaction)
    return [_insert(unit, records) for records in batches]


def _insert(unit: UnitOfWork, records: Sequence[Record[Task]]) -> Refusals:
    sql = unit.sql
    unit.rows = {kind: {} for kind in ROWS}
    given = sql.given([record.task_id for record in records])
    found = unit.cursor.execute(sql.read_many[Task], (given,))
    unit.count_from(*counters_of(found))
    present = {row[2] for row in found}
    unit.read_key_owners(filter(None, [record.idempotency_key for record in records]))
    refusals = [_refusal(unit, present, record) for record in records]
    added = [one for one, refusal in zip(records, refusals, strict=True) if refusal is None]
    before, at = unit.reserve_revisions(len(added)), sql.to_moment(unit.now)
    insert, codec = sql.insert[Task]
    rows: list[Raw] = []
    changes: list[Raw] = []
    for revision, record in enumerate(added, before + 1):
        record.updated_at, record.version = unit.now, revision
        record.row = row = tuple(record.values(codec))
        rows.append(row)
        status, node = record.status.value, record.assigned_node
        changes.append(
            (revision, at, _ITEM, record.task_id, _CREATED, None, status, node, None, None)
        )
    if added:
        unit.cursor.write(insert, rows)
        unit.cursor.write(sql.insert_change, changes)
        unit.emit(TasksAdded(added))
    return refusals


def insert_past(
    transaction: WriteTransaction, ids: Sequence[str], changes: Iterable[Sequence[Any]]
) -> None:
    """Insert the past changes of tasks that were added.

    Args:
        changes: Rows of `past_changes`, with times in microseconds and reasons in clear.
    """
    cursor, sql = transaction.cursor, transaction.sql
    if ids and cursor.execute(
        sql.has_past
    ):  # a removed task of the same identifier may have left some
        cursor.write(sql.delete_past, [(id,) for id in ids])
    moment = int if cursor.dialect == "sqlite" else from_microseconds
    rows = [
        (id, revision, moment(at), *step, why and sql.stored_reason(_ITEM, id, why), previous)
        for id, revision, at, *step, why, previous in changes
    ]
    if rows:
        cursor.write(sql.insert_past, rows)


def _refusal(unit: UnitOfWork, present: set[str], record: Record[Task]) -> DuplicateError | None:
    """Return the refusal of a task; otherwise note that it is present."""
    id, key = record.task_id, record.idempotency_key
    if id in present:
        return DuplicateError(_ITEM, id)
    if key is not None and record.status not in FINISHED:
        owner = unit.key_owners[key]
        if owner is not None:
            return DuplicateError(_ITEM, owner, key)
        unit.set_key(id, record)
    present.add(id)
    return None
