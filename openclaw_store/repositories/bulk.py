"""Bulk insertion: new tasks in few statements, without a command and a row object for each.

A task stays a plain row from its check to the cache: the garbage collector does not track a tuple
of texts and numbers, so it has less to do.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from datetime import datetime
from operator import itemgetter
from typing import Any, NamedTuple

from openclaw_store.database import FIELDS, ROWS, Statements, WriteTransaction, from_microseconds
from openclaw_store.domain import ENTITY_NAMES, FINISHED, Change, ChangeKind, Raw, Record, Task
from openclaw_store.errors import DuplicateError
from openclaw_store.repositories.batches import unit_of
from openclaw_store.repositories.unit_of_work import Event, UnitOfWork, counters_of

Refusals = Sequence[DuplicateError | None]
"""The error of each refused task, and `None` for each added one."""

_ITEM, _CREATED = ENTITY_NAMES[Task], str(ChangeKind.CREATED)

_of_change = itemgetter(*map(FIELDS[Task].index, ("task_id", "status", "assigned_node")))
_keys = itemgetter(*map(FIELDS[Task].index, ("idempotency_key", "status")))
# `_insert` replaces the last two values of a row.
assert FIELDS[Task][-2:] == ("updated_at", "version")


class TasksAdded(NamedTuple):
    """Committed new tasks with consecutive versions, for the listeners."""

    rows: Sequence[Raw]
    """As the driver would return them."""
    at: datetime
    """Their `updated_at`."""
    sql: Statements

    @property
    def revisions(self) -> tuple[int, int]:
        """The first and the last version."""
        return self.rows[0][-1], self.rows[-1][-1]

    def events(self) -> Iterator[Event]:
        """Yield the change of each task."""
        decode = self.sql.decode[Task]
        for row in self.rows:
            id, status, node = _of_change(row)
            created = Change(
                row[-1], self.at, _ITEM, id, ChangeKind.CREATED, None, status, node, None
            )
            record = decode(row)
            record.row = row
            yield Event(Task, id, record, created)


class Inserted(NamedTuple):
    """The outcome of a batch."""

    refusals: Refusals
    before: int
    """The revision before that of the first added task; each further task has the next one."""
    at: datetime
    """The `updated_at` of the added tasks."""


def row_of(sql: Statements, record: Record[Task]) -> Raw:
    """Return the row of a new task, in clear; its time of update and version are set later."""
    return tuple(record.values(sql.clear))


def changes_of(events: Iterable[object]) -> Iterator[Change]:
    """Yield the changes of a commit."""
    for event in events:
        if isinstance(event, TasksAdded):
            yield from (one.change for one in event.events())
        elif isinstance(event, Event):
            yield event.change


def insert_tasks(
    transaction: WriteTransaction, batches: Sequence[Sequence[Raw]]
) -> Sequence[Inserted]:
    """Add batches of tasks, each as `row_of` returns it.

    On PostgreSQL the lock comes first: the function `store_write` would take longer.
    """
    transaction.require_lock()
    unit = unit_of(transaction)
    return [_insert(unit, rows) for rows in batches]


def _insert(unit: UnitOfWork, given: Sequence[Raw]) -> Inserted:
    sql = unit.sql
    unit.rows = {kind: {} for kind in ROWS}
    ids = sql.given([row[0] for row in given])
    found = unit.cursor.execute(sql.read_many[Task], (ids,))
    unit.count_from(*counters_of(found))
    present = {row[2] for row in found}
    unit.read_key_owners(key for key, _ in map(_keys, given) if key is not None)
    refusals = [_refusal(unit, present, row) for row in given]
    added = [row for row, refusal in zip(given, refusals, strict=True) if refusal is None]
    before, at = unit.reserve_revisions(len(added)), unit.at
    insert, codec = sql.insert[Task]
    rows: list[Raw] = []
    changes: list[Raw] = []
    for revision, row in enumerate(added, before + 1):
        values = [*row[:-2], at, revision]
        id, status, node = _of_change(row)
        if codec.protect is not None:
            codec.protect(id, values)
        rows.append(tuple(values))
        changes.append((revision, at, _ITEM, id, _CREATED, None, status, node, None, None))
    if rows:
        unit.cursor.write(insert, rows)
        unit.cursor.write(sql.insert_change, changes)
        unit.emit(TasksAdded(rows, unit.now, sql))
    return Inserted(refusals, before, unit.now)


def insert_past(
    transaction: WriteTransaction, ids: Sequence[str], changes: Iterable[Sequence[Any]]
) -> None:
    """Insert the past changes of tasks that were added.

    Args:
        changes: Rows of `past_changes`, with times in microseconds and reasons in clear.
    """
    cursor, sql = transaction.cursor, transaction.sql
    # A removed task of the same identifier may have left some.
    if ids and cursor.execute(sql.has_past):
        cursor.write(sql.delete_past, [(id,) for id in ids])
    moment = int if cursor.dialect == "sqlite" else from_microseconds
    rows = [
        (id, revision, moment(at), *step, why and sql.stored_reason(_ITEM, id, why), previous)
        for id, revision, at, *step, why, previous in changes
    ]
    if rows:
        cursor.write(sql.insert_past, rows)


def _refusal(unit: UnitOfWork, present: set[str], row: Raw) -> DuplicateError | None:
    """Return the refusal of a task; otherwise note that it is present."""
    id, (key, status) = row[0], _keys(row)
    if id in present:
        return DuplicateError(_ITEM, id)
    if key is not None and status not in FINISHED:
        owner = unit.key_owners[key]
        if owner is not None:
            return DuplicateError(_ITEM, owner, key)
        unit.set_key(id, key)
    present.add(id)
    return None
