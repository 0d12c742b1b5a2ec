"""The unit of work of PostgreSQL: a batch is decided first, then written by one call of the server.

The decisions are made without a lock, on the tasks as their callers know them, or as they are read
before. The function `store_write` takes the lock, and writes everything if these tasks are still
the same; it also claims tasks, adds to the counters of nodes, and assigns the revisions. Otherwise
it writes nothing, and the batch is decided again in a transaction with the lock.

Commands that depend on other rows need the lock from the beginning; see `Command.is_one_call`.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from enum import StrEnum
from typing import Any

from openclaw_store.backends import BatchCursor, array
from openclaw_store.database import CALL_FIELDS, FIELDS, WriteTransaction
from openclaw_store.domain import (
    ENTITY_NAMES,
    Change,
    ChangeKind,
    NodeDelta,
    NodeInfo,
    Raw,
    Record,
    Task,
    TaskStatus,
)
from openclaw_store.errors import StaleVersionError, StoreError
from openclaw_store.repositories.unit_of_work import (
    Command,
    Event,
    Row,
    UnitOfWork,
    require_counters,
)

_Claims = tuple[str, bool]
"""A node, and true if the claimed tasks start at once."""

_NEW = -1
"""The expected version of a row that must not exist."""

_MAX_PLACES = 1_000_000
"""Most tasks that a node claims at once."""

_CALL_POSITIONS = tuple(map(FIELDS[Task].index, CALL_FIELDS))
_VERSION = FIELDS[Task].index("version")


class OneCall(UnitOfWork):
    """The changes of one batch, written by one call.

    Revisions are assigned as if no other process had written since the last batch; the server
    returns the revision that precedes them, to which they are moved.
    """

    def __init__(self, transaction: WriteTransaction, cursor: BatchCursor) -> None:
        super().__init__(transaction)
        self._batch_cursor = cursor
        self._guess = cursor.newest_revision
        self.count_from(self._guess, 0)
        self.rows = {Task: {}, NodeInfo: {}}
        self._expected: dict[str, int] = {}  # the version of each task at the beginning
        self._read: set[str] = set()  # tasks that were looked up for this batch
        self._deltas: defaultdict[str, NodeDelta] = defaultdict(NodeDelta)  # by node
        self._claims: defaultdict[_Claims, list[tuple[int, list[Record[Task]]]]] = defaultdict(list)
        """Limits and results of claims."""
        self._stale: list[StaleVersionError] = []  # refusals that tell a version

    def run(self, commands: Sequence[Command]) -> Sequence[Any]:
        if not all(command.is_one_call for command in commands):
            self._batch_cursor.require_lock()
        known: dict[str, Record[Task]] = {}
        unknown: dict[str, None] = {}
        tasks = self.rows[Task]
        for command in commands:
            if command.kind is not Task or command.is_new or command.id in tasks:
                continue
            record, id = command.known, command.id
            if record is None or record.version <= 0:  # it is in memory only
                unknown[id] = None
            elif id not in known or known[id].version < record.version:
                known[id] = record
        unread = [id for id in unknown if id not in known]
        for raw in self._batch_cursor.peek(self.sql.read_tasks, (unread,)) if unread else ():
            record = self.sql.decode[Task](tuple(raw))
            known[record.task_id] = record
        self._read.update(unread)
        # No version that a caller knows may be above the guess: a revision of this batch, which is
        # only guessed, could pass for that version.
        versions = [command.version or 0 for command in commands]
        newest = max([*versions, *(record.version for record in known.values())], default=0)
        if newest > self._guess:  # another process has written since the last call
            self._batch_cursor.newest_revision = newest
            if self.changes:
                self._batch_cursor.require_lock()
            self._guess = self._revision = newest
        for id, record in known.items():
            self.row(Task, id).load(record)
            self._expected[id] = record.version
        outcomes = [command.decide(self.row(command.kind, command.id)) for command in commands]
        self._stale += [one for one in outcomes if isinstance(one, StaleVersionError)]
        return outcomes

    def load(self, kind: type[Any], rows: Mapping[str, Row]) -> None:
        self._batch_cursor.require_lock()

    def read_key_owners(self, keys: Iterable[str]) -> None:
        for key in keys:  # the call checks the keys of other tasks
            self.key_owners.setdefault(key, None)

    def count(self, task: Row, node_id: str, delta: NodeDelta) -> None:
        self._deltas[node_id] = self._deltas[node_id].plus(delta)

    def claim(self, row: Row, limit: int, *, start: bool) -> list[Record[Task]] | StoreError:
        if not self._batch_cursor.can_claim:
            self._batch_cursor.require_lock()
        claimed: list[Record[Task]] = []
        self._claims[row.id, start].append((limit, claimed))
        return claimed

    def finish(self) -> None:
        """Prepare the call; the session sends it as its commit."""
        written = [row for row in self.rows[Task].values() if row.names or not row.stored]
        written = [row for row in written if row.record is not None]
        ids = {row.id for row in written}
        # A refusal by a task that was not read for this batch must be checked, too.
        checked = {
            id: self._expected.get(id, _NEW)
            for id in self.rows[Task]
            if id not in ids and id not in self._read
        }
        owners = {
            row.id: row.record.idempotency_key
            for row in written
            if row.record is not None and row.record.idempotency_key in self.key_owners
        }
        places = [
            (id, min(sum(limit for limit, _ in claims), _MAX_PLACES), start)
            for (id, start), claims in self._claims.items()
        ]
        values = list(map(self._values, written))
        stored = self.sql.stored_reason
        changes = [
            (
                *(one.item_id, str(one.kind), *one[5:8]),
                one.reason and stored(one.item, one.item_id, one.reason),
                self._moved(one.previous),
            )
            for one in self.changes
        ]
        if values or checked or self._deltas or places:
            # In the order of the function's arguments: see `database/store_write.py`.
            columns = [
                *_columns(values, 4 + len(CALL_FIELDS)),
                *_columns(list(checked.items()), 2),
                *_columns(list(owners.items()), 2),
                *_columns(changes, 7),
                *_columns([(id, *delta) for id, delta in self._deltas.items()], 5),
                *_columns(places, 3),
            ]
            self._batch_cursor.prepare(self.sql.call, (self.now, *columns), self._finish_call)
        self.release()

    def _moved(self, previous: int | None) -> int | None:
        """Return a revision of this batch as a negative offset; it is not assigned yet."""
        return previous if previous is None or previous <= self._guess else self._guess - previous

    def _values(self, row: Row) -> list[Any]:
        """Return a task as the call takes it: the columns that it writes, as a mask, come first."""
        assert row.record is not None  # it is written
        head = [row.id, self._expected.get(row.id, _NEW), row.record.version - self._guess]
        if not row.stored:
            _, codec = self.sql.insert[Task]
            row.record.row = tuple(row.record.values(codec))
            return [*head, 0, *(row.record.row[position] for position in _CALL_POSITIONS)]
        positions, codec = self.sql.call_columns(row.names)
        values: list[Any] = [None] * len(CALL_FIELDS)
        for position, value in zip(positions, row.record.values(codec), strict=True):
            values[position] = value
        return [*head, sum(1 << position for position in positions), *values]

    def _finish_call(self, found: Sequence[Any]) -> None:
        """Take over the results of the call."""
        require_counters(found)
        # The last row has the revision before this call; NULL if a task or key was not as expected,
        # and nothing was written.
        *rows, (base, *_) = found
        if base is None:
            self._batch_cursor.require_lock()
        if base != self._guess:
            self._move_revisions(base - self._guess)
        width = 2 + len(FIELDS[Task])
        claimed: defaultdict[_Claims, list[Record[Task]]] = defaultdict(list)
        events: list[Event] = []
        for row in rows:
            if row[2] is None:
                events.append(self._node_event(row[1], tuple(row[width:])))
                continue
            task = self.sql.decode[Task](tuple(row[2:width]))
            is_started = task.status is TaskStatus.RUNNING
            claimed[task.assigned_node, is_started].append(task)
            events += self._claim_events(row[1], task)
        for event in sorted(events, key=lambda one: one.change.revision):
            self.emit(event)
        for claim, tasks in claimed.items():
            tasks.sort(key=lambda task: task.version)
            for limit, result in self._claims[claim]:
                result += tasks[:limit]
                del tasks[:limit]
        self._batch_cursor.newest_revision = base + len(self.changes) + len(events)

    def _claim_events(self, was: int, task: Record[Task]) -> Iterator[Event]:
        """Yield the events of a claimed task; `was` is its former version."""
        before = TaskStatus.PENDING
        if task.status is TaskStatus.RUNNING:
            before = TaskStatus.SCHEDULED
            claimed = task.evolve(status=before, started_at=None, version=task.version - 1)
            yield from self._claim_events(was, claimed)
            was = claimed.version
        yield self._event(Task, task, before, was)

    def _node_event(self, was: int, raw: Raw) -> Event:
        node = self.sql.decode[NodeInfo](raw)
        return self._event(NodeInfo, node, node.status, was)

    def _event(self, kind: type[Any], record: Record[Any], before: StrEnum, was: int) -> Event:
        after = record.status
        change = Change(
            record.version,
            self.now,
            ENTITY_NAMES[kind],
            record.id,
            ChangeKind.UPDATED if after is before else ChangeKind.STATUS,
            str(before),
            str(after),
            record.assigned_node if kind is Task else None,
            None,
            was or None,
        )
        return Event(kind, record.id, record, change)

    def _move_revisions(self, by: int) -> None:
        """Raise the revisions of this batch, as other processes have assigned some before."""
        for error in self._stale:
            if error.current > self._guess:
                StaleVersionError.__init__(
                    error, error.kind, error.id, error.version, error.current + by
                )
        committed = self.transaction.committed
        moved: set[int] = set()
        for position, event in enumerate(committed):
            change, record = event.change, event.record
            previous = change.previous
            if previous is not None and previous > self._guess:
                previous += by
            change = change._replace(revision=change.revision + by, previous=previous)
            committed[position] = event._replace(change=change)
            if id(record) not in moved:
                moved.add(id(record))
                record.version += by
                if record.row is not None:
                    row = list(record.row)
                    row[_VERSION] += by
                    record.row = tuple(row)


def _columns(rows: Sequence[Sequence[Any]], count: int) -> Sequence[str | None]:
    """Return the rows as an array of each column."""
    return [array(column) for column in zip(*rows, strict=True)] if rows else [None] * count
