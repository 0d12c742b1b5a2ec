"""Tasks in transit from one cluster to another: the steps of a batch, and their rows.

1. The source removes the tasks, and writes them to a row of `outgoing`: `departure`.
2. The target adds them, and notes the batch in `incoming`: `arrive`.
3. The source deletes its row, and takes back what the target has refused: `settle`.
4. The target deletes its row: `forget`.

Each step is one transaction, and finds by these rows if it was done before.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from functools import cache
from operator import itemgetter
from typing import Any, NamedTuple

import orjson
from sqlalchemy import bindparam, delete, select
from sqlalchemy.orm import Session

from openclaw_store.backends import Cursor
from openclaw_store.database import (
    REASON,
    IncomingRow,
    OutgoingRow,
    PastChangeRow,
    Statements,
    WriteTransaction,
    places_of,
    statements_in,
    statements_of,
    to_microseconds,
)
from openclaw_store.domain import ENTITY_NAMES, Raw, Record, Task
from openclaw_store.errors import DuplicateError
from openclaw_store.repositories import Removal, insert_past, insert_tasks, read_histories, row_of

_NEUTRAL = statements_of("sqlite")
"""Makes values that JSON has, equal in all databases: times are numbers, and nothing is sealed."""

_ITEM = ENTITY_NAMES[Task]
_OUTGOING, _INCOMING, _PAST = (
    row.metadata.tables[row.__tablename__] for row in (OutgoingRow, IncomingRow, PastChangeRow)
)
[(_, _SEALED)] = places_of(_OUTGOING, ["tasks"])
_NAMES = _PAST.c.keys()
_REVISION, _AT, _REASON, _PREVIOUS = map(
    _NAMES.index, ("revision", "changed_at", REASON.column, "previous")
)


class Traveller(NamedTuple):
    """A task with its changes, in values that JSON has."""

    task: Sequence[Any]
    """The fields, in their order."""
    changes: Sequence[Sequence[Any]]
    """Oldest first; the columns of `past_changes`."""

    def record(self) -> Record[Task]:
        """Return the task; an insertion takes it over."""
        record: Record[Task] = _NEUTRAL.decode[Task](tuple(self.task))
        return record


def travellers_of(text: str) -> list[Traveller]:
    """Return the tasks of a row of `outgoing`."""
    return [Traveller(*one) for one in orjson.loads(text)]


def departure(
    session: Session, tasks: Sequence[Record[Task]], *, batch: str, target: int, now: datetime
) -> Removal:
    """Return the removal of tasks, with their history, that writes them to `outgoing`."""
    sql = statements_in(session)
    changes, logged = _histories(session, tasks)
    travellers = [
        orjson.dumps((task.values(_NEUTRAL.insert[Task][1]), changes[task.task_id]))
        for task in tasks
    ]

    def accept(cursor: Cursor, removed: Sequence[bool]) -> None:
        gone = [one for one, is_gone in zip(travellers, removed, strict=True) if is_gone]
        if gone:
            _insert_outgoing(cursor, sql, Outgoing(batch, target, gone), now)

    versions = [(task.task_id, task.version) for task in tasks]
    return Removal(versions, [logged[task.task_id] for task in tasks], accept)


def _histories(
    session: Session, tasks: Sequence[Record[Task]]
) -> tuple[Mapping[str, list[list[Any]]], Mapping[str, list[int]]]:
    """Return the changes of each task, oldest first, and their revisions in the feed."""
    sql = statements_in(session)
    changes: dict[str, list[list[Any]]] = {task.task_id: [] for task in tasks}
    logged: dict[str, list[int]] = {task.task_id: [] for task in tasks}
    found, past = read_histories(session, {task.task_id: task.version for task in tasks})
    for row in sorted((*found, *past), key=itemgetter(_REVISION)):
        changes[row[0]].append(_without_seal(sql, row))
    for row in found:
        logged[row[0]].append(row[_REVISION])
    return changes, logged


def _without_seal(sql: Statements, row: Raw) -> list[Any]:
    change = list(row)
    change[_AT] = to_microseconds(sql.from_moment(change[_AT]))
    change[_REASON] = sql.read_reason(_ITEM, change[0], change[_REASON])
    return change


@dataclass(frozen=True, slots=True)
class Outgoing:
    """A row of `outgoing` to write."""

    batch: str
    target: int
    travellers: Sequence[bytes]
    """The JSON of each."""


def _insert_outgoing(cursor: Cursor, sql: Statements, row: Outgoing, now: datetime) -> None:
    text = b"[" + b",".join(row.travellers) + b"]"
    sealed = sql.protection.storing(_SEALED)(row.batch, text.decode())
    values = (row.batch, row.target, sealed, len(row.travellers), sql.to_moment(now))
    cursor.write(sql.insert_into(_OUTGOING), [values])


@dataclass(frozen=True, slots=True)
class Arrival:
    """A batch that arrives."""

    batch: str
    source: int
    travellers: Sequence[Traveller]
    settled: Sequence[str]
    """Earlier batches that the source has settled."""


def arrive(
    transaction: WriteTransaction, arrivals: Sequence[Arrival]
) -> Sequence[Mapping[str, str]]:
    """Add tasks, unless their batch has arrived before; return the reasons of refused ones."""
    return [_arrive(transaction, one) for one in arrivals]


def _arrive(transaction: WriteTransaction, arrival: Arrival) -> Mapping[str, str]:
    cursor, sql = transaction.cursor, transaction.sql
    statements = _statements(sql.without_keys)
    if arrival.settled:
        cursor.write(statements.forget, [(batch,) for batch in arrival.settled])
    # Arrived before: the answer is the same again.
    for (refused,) in cursor.execute(statements.read_incoming, (arrival.batch,)):
        known: Mapping[str, str] = orjson.loads(refused)
        return known
    refusals = _add(transaction, arrival.travellers, is_home=False)
    text = orjson.dumps(refusals).decode()
    row = (arrival.batch, arrival.source, text, sql.to_moment(transaction.now))
    cursor.write(statements.insert_incoming, [row])
    return refusals


@dataclass(frozen=True, slots=True)
class Settlement:
    """A batch that has arrived."""

    batch: str
    returning: Sequence[Traveller]
    """The tasks that the target has refused."""
    target: int
    next_batch: str
    """The batch for tasks that the source refuses too, since new tasks have their identifiers."""


def settle(
    transaction: WriteTransaction, settlements: Sequence[Settlement]
) -> Sequence[Mapping[str, str]]:
    """Delete batches, and take their refused tasks back; return the reasons of the rest.

    A batch that another process has settled is left alone.
    """
    transaction.require_lock()
    return [_settle(transaction, one) for one in settlements]


def _settle(transaction: WriteTransaction, settlement: Settlement) -> Mapping[str, str]:
    cursor, sql = transaction.cursor, transaction.sql
    statements = _statements(sql.without_keys)
    # The deletion decides which of several processes settles the batch.
    if not cursor.execute(statements.delete_outgoing, (settlement.batch,)):
        return {}
    refusals = _add(transaction, settlement.returning, is_home=True)
    left = [orjson.dumps(tuple(one)) for one in settlement.returning if one.task[0] in refusals]
    if left:
        row = Outgoing(settlement.next_batch, settlement.target, left)
        _insert_outgoing(cursor, sql, row, transaction.now)
    return refusals


def forget(transaction: WriteTransaction, notes: Sequence[Sequence[str]]) -> Sequence[None]:
    """Delete the notes of batches that the source has settled."""
    transaction.require_lock()
    sql = _statements(transaction.sql.without_keys).forget
    transaction.cursor.write(sql, [(batch,) for batches in notes for batch in batches])
    return [None] * len(notes)


def _add(
    transaction: WriteTransaction, travellers: Sequence[Traveller], *, is_home: bool
) -> dict[str, str]:
    """Add tasks with their past changes; return the reason of each refused task."""
    if not travellers:
        return {}
    rows = [row_of(transaction.sql, one.record()) for one in travellers]
    [(refusals, _, _)] = insert_tasks(transaction, [rows])
    refused: dict[str, str] = {}
    added: list[str] = []
    past: list[Sequence[Any]] = []
    for one, refusal in zip(travellers, refusals, strict=True):
        id = one.task[0]
        if isinstance(refusal, DuplicateError):
            refused[id] = str(refusal)
            continue
        added.append(id)
        past += one.changes if is_home else _foreign(one)
    insert_past(transaction, added, past)
    return refused


def _foreign(traveller: Traveller) -> list[list[Any]]:
    """Return changes with negative revisions: this cluster assigns the positive ones."""
    first = -len(traveller.changes)
    changes = []
    for revision, one in enumerate(traveller.changes, first):
        change = [*one]
        change[_REVISION] = revision
        change[_PREVIOUS] = revision - 1 if revision > first else None
        changes.append(change)
    return changes


class _Statements(NamedTuple):
    read_incoming: str
    insert_incoming: str
    delete_outgoing: str
    forget: str
    """Delete notes; for many rows of a batch."""


@cache
def _statements(sql: Statements) -> _Statements:
    batch: Any = bindparam("batch_")
    read = select(_INCOMING.c.refused).where(_INCOMING.c.batch == batch)
    remove = delete(_OUTGOING).where(_OUTGOING.c.batch == batch).returning(_OUTGOING.c.batch)
    return _Statements(
        str(sql.compile(read)),
        sql.insert_into(_INCOMING),
        str(sql.compile(remove)),
        sql.delete_from(_INCOMING.c.batch),
    )
