"""The unit of work: apply commands, assign revisions, and write the changes to the log.

`apply` takes a run of commands inside one write transaction. It reads the rows that they touch
once, lets each command decide in order, and then writes each touched row once. Every change gets a
**revision**: consecutive, without gaps, in the order of commits. A heartbeat has no revision.

The `version` of a row is the revision of its last change. It grows, and no version is used twice,
even when a row is removed and created again.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple, Protocol, Self

from openclaw_store.database import FIELDS, ROWS, WriteTransaction
from openclaw_store.domain import (
    ENTITY_NAMES,
    FINISHED,
    KEY,
    STORE_FIELDS,
    Change,
    ChangeKind,
    EntityKey,
    NodeDelta,
    NodeInfo,
    Raw,
    Record,
    RowCodec,
    Task,
    lifecycle,
)
from openclaw_store.errors import (
    DuplicateError,
    NodeNotFoundError,
    NotFoundError,
    SchemaMismatchError,
    StoreError,
    TaskNotFoundError,
)
from openclaw_store.repositories.claim_choice import ClaimChoice

ChainEnd = tuple[int | None, str, str]
"""Revision, item and identifier of a change that is removed with all earlier ones of its row."""


class Event(NamedTuple):
    """A committed change, for the listeners."""

    kind: type[Any]
    id: str
    record: Record[Any] | None
    """The new content; `None` after a removal."""
    change: Change


def missing(kind: type[Any], id: str) -> NotFoundError:
    """Return the error for a missing row."""
    return TaskNotFoundError(id) if kind is Task else NodeNotFoundError(id)


class Command(Protocol):
    """A write of one row, and of related rows; by default of one existing row alone."""

    __slots__ = ()
    is_new: ClassVar[bool] = False
    """`True` if the row should not exist yet."""

    if TYPE_CHECKING:  # a dataclass would take an inherited property for the default of its field

        @property
        def kind(self) -> type[Any]: ...
        @property
        def id(self) -> str: ...

    @property
    def related_keys(self) -> Iterable[EntityKey]:
        """Keys of other rows that it probably needs, to be read with the rows of all commands."""
        return ()

    @property
    def is_one_call(self) -> bool:
        """Return true if it depends on one task alone, and at most adds to counters of a node.

        Such commands need no lock on PostgreSQL; see `one_call`.
        """
        return False

    @property
    def known(self) -> Record[Any] | None:
        """The content that it changes, at any version, which may save the read."""
        return None

    @property
    def version(self) -> int | None:
        """The only version of the row to change, as the caller knows it; `None` for any."""
        return None

    @property
    def key(self) -> str | None:
        """The new idempotency key, to be read with the keys of all commands."""
        return None

    def decide(self, row: Row) -> Any:
        """Change `row` and return the result, or change nothing and return a `StoreError`."""


class Row:
    """A row in its state after the commands that were applied so far."""

    stored = False
    """`True` if the database had the row before."""
    removed = False
    """`True` if it was removed since, though perhaps created again."""
    version: int | None = None
    """`None` if the row does not exist."""
    status: str | None = None
    node: str | None = None
    record: Record[Any] | None = None
    """The content, if loaded: always for nodes, for tasks after a write."""
    names: frozenset[str] = frozenset()
    """The columns to write, unless the row is new."""
    counted: frozenset[str] = frozenset()
    """Counters of a node that were added to, without a change in the log yet."""

    def __init__(self, unit: UnitOfWork, kind: type[Any], id: str) -> None:
        self.unit = unit
        self.kind = kind
        self.id = id
        self.now = unit.now

    def load(self, record: Record[Any]) -> Self:
        """Set the stored content."""
        self.stored, self.record = True, record
        self.version, self.status = record.version, record.status.value
        if self.kind is Task:
            self.node = record.assigned_node
        return self

    def other(self, kind: type[Any], id: str) -> Row:
        """Return another row; read it if the command did not announce it."""
        row = self.unit.rows[kind].get(id)
        if row is None:
            row = self.unit.row(kind, id)
            self.unit.load(kind, {id: row})
        return row

    def content(self, known: Record[Any] | None = None) -> Record[Any] | None:
        """Return the content; `None` if the row does not exist.

        Args:
            known: The content at any version; saves the read if that version is the current one.
        """
        if self.version is None or self.record is not None:
            return self.record
        if known is not None and known.version == self.version:
            return known
        self.record = self.unit.read_task(self.id)
        return self.record

    def key_conflict(self, record: Record[Any]) -> DuplicateError | None:
        """Return an error if another live task has the idempotency key of `record`."""
        key = record.idempotency_key
        if key is None or record.status in FINISHED:
            return None
        self.unit.read_key_owners([key])
        owner = self.unit.key_owners[key]
        return None if owner in (None, self.id) else DuplicateError(ENTITY_NAMES[Task], owner, key)

    def write(
        self, record: Record[Any], names: Iterable[str], reason: str | None = None
    ) -> Record[Any]:
        """Give the row new content under a new version, and return that content.

        Args:
            record: Owned by the command; the version and the time are set in place.
            names: The fields that differ from the row.
            reason: The reason for the change log.
        """
        before, previous = self.status, self.version
        self.status = str(record.status)
        kind = ChangeKind.UPDATED if before == self.status else ChangeKind.STATUS
        if previous is None:
            kind = ChangeKind.CREATED
        if self.kind is Task:
            self.node = record.assigned_node
            record.updated_at = self.now
            if self.unit.key_owners:
                is_live = record.status not in FINISHED
                self.unit.set_key(self.id, record.idempotency_key if is_live else None)
        # Before the version is set: the former one is the `previous` of the change.
        change = self.unit.add(self, kind, before, reason)
        record.version = change.revision
        record.row = None  # of an attempt that was not committed
        if previous is not None:
            self.names = self.names.union(names, self.counted, STORE_FIELDS)
        self.version, self.record, self.counted = change.revision, record, frozenset()
        self.unit.emit(Event(self.kind, self.id, record, change))
        return record

    def remove(self, *, with_history: bool) -> None:
        """Remove the row, and with `with_history` its earlier changes."""
        before, self.status = self.status, None
        if self.kind is Task:
            self.unit.set_key(self.id, None)
        change = self.unit.add(self, ChangeKind.REMOVED, before, None)
        if with_history:
            self.unit.removed_history.append((change.previous, change.item, self.id))
        self.version = self.record = None
        self.removed = True
        self.names = self.counted = frozenset()
        self.unit.emit(Event(self.kind, self.id, None, change))


class UnitOfWork:
    """The changes of one write transaction, and their revisions.

    The transaction holds the write lock, so the counters, which are read with the first rows, stay
    true until the commit. `OneCall` is the kind without the lock, for PostgreSQL.
    """

    def __init__(self, transaction: WriteTransaction) -> None:
        self.transaction = transaction
        self.now = transaction.now
        self.cursor = transaction.cursor
        self.sql = transaction.sql
        self.at = self.sql.to_moment(self.now)
        """`now` as the driver takes it."""
        self.rows: dict[type[Any], dict[str, Row]] = {}
        """The rows of the current run of commands."""
        self._choice: ClaimChoice | None = None  # of the claims of this run, once there is one
        self._size = 0  # commands of this run
        self.key_owners: dict[str, str | None] = {}
        """The live task of each idempotency key that was read; `None` if there is none."""
        self._keys_of_live_tasks: dict[str, str] = {}  # the reverse of `key_owners`
        self._revision: int | None = None  # the last one; `None` until the counters are read
        self.heartbeat_sequence = 0
        """The heartbeat sequence number of this transaction."""
        self.has_removed_nodes = False
        """`True` if it removes nodes: one of them may have the last heartbeat."""
        self.changes: list[Change] = []
        self.removed_history: list[ChainEnd] = []
        """The newest change of each removed row, if its history is removed too."""
        self.emit: Callable[[object], None] = transaction.committed.append
        """Publishes an event to the listeners after the commit."""

    def count_from(self, revision: int, sequence: int) -> None:
        """Set the counters, unless an earlier run has read them."""
        if self._revision is None:
            self._revision, self.heartbeat_sequence = revision, sequence + 1

    def run(self, commands: Sequence[Command]) -> Sequence[Any]:
        """Apply the commands in order, write their rows, and return their results."""
        rows = self.rows = {kind: {} for kind in ROWS}
        self._size = len(commands)
        targets: list[Row] = []
        keys: list[str] = []
        for command in commands:
            targets.append(self.row(command.kind, command.id))
            for kind, id in command.related_keys:
                self.row(kind, id)
            if command.key is not None:
                keys.append(command.key)
        for kind, touched in rows.items():
            if touched:
                self.load(kind, touched)
        # One query for all announced keys; `key_conflict` reads any other.
        self.read_key_owners(keys)
        outcomes = [command.decide(row) for command, row in zip(commands, targets, strict=True)]
        # After all tasks, so that a node changes once; sorted, so that both databases assign the
        # same revisions.
        for _, node in sorted(rows[NodeInfo].items()):
            if node.counted and node.record is not None:
                node.write(node.record, ())
        for kind, touched in rows.items():
            _store(self, kind, touched.values())
        self.release()
        return outcomes

    def release(self) -> None:
        """Drop what refers back to the unit: only the garbage collector frees such cycles."""
        self.rows, self._choice = {}, None

    def load(self, kind: type[Any], rows: Mapping[str, Row]) -> None:
        """Read rows: nodes with their content, of tasks the columns that all decisions need."""
        sql = self.sql
        if len(rows) == 1:
            found = self.cursor.execute(sql.read_one[kind], [*rows])
        else:
            found = self.cursor.execute(sql.read_many[kind], (sql.given([*rows]),))
        self.count_from(*counters_of(found))
        if kind is NodeInfo:
            for values in found:
                if values[2] is not None:
                    rows[values[2]].load(sql.decode[kind](values[2:]))
        else:
            for _, _, id, version, status, node in found:
                if id is not None:
                    row = rows[id]
                    row.stored, row.version, row.status, row.node = True, version, status, node

    def count(self, task: Row, node_id: str, delta: NodeDelta) -> None:
        """Add to the counters of a node, if it exists; a run logs this as one change at its end."""
        node = task.other(NodeInfo, node_id)
        if node.record is not None:
            values = lifecycle.counted(node.record, delta)
            node.record = node.record.evolve(**values)
            node.counted = node.counted.union(values)

    def claim(self, row: Row, limit: int, *, start: bool) -> list[Record[Task]] | StoreError:
        """Assign up to `limit` tasks to a node, and return them, best first.

        Args:
            start: Also start them.
        """
        if row.record is None:
            return missing(NodeInfo, row.id)
        if self._choice is None:
            self._choice = ClaimChoice(self, self._size)
        claimed: list[Record[Task]] = []
        for task_row, present, step in self._choice.choose(row.record, limit):
            record = task_row.write(present.evolve(**step.task), step.task)
            if start:
                started = lifecycle.started(record, self.now)
                record = task_row.write(record.evolve(**started), started)
            claimed.append(record)
        if claimed:
            self.count(row, row.id, NodeDelta(running=len(claimed)))
        return claimed

    def read_task(self, id: str) -> Record[Task] | None:
        """Read the content of a task."""
        for raw in self.cursor.execute(self.sql.read_task, (id,)):
            return self.sql.decode[Task](raw)
        return None

    def row(self, kind: type[Any], id: str) -> Row:
        """Return the row with this key; a new one is not loaded yet."""
        rows = self.rows[kind]
        row = rows.get(id)
        if row is None:
            row = rows[id] = Row(self, kind, id)
        return row

    def row_of(self, task: Record[Task]) -> Row:
        """Return the row of a task that was read; commands of this run may have changed it."""
        id = task.task_id
        return self.rows[Task].get(id) or self.row(Task, id).load(task)

    def read_key_owners(self, keys: Iterable[str]) -> None:
        """Read the live tasks with these idempotency keys, unless that was done."""
        unread = {key: None for key in keys if key not in self.key_owners}
        if not unread:
            return
        self.key_owners.update(unread)
        given = self.sql.given(list(unread))
        for key, id in self.cursor.execute(self.sql.read_live_keys, (given,)):
            row = self.rows[Task].get(id)
            if row is not None:  # it may have lost the key in this transaction
                if row.status is None or row.status in FINISHED:
                    continue
                if row.record is not None and row.record.idempotency_key != key:
                    continue
            self.key_owners[key], self._keys_of_live_tasks[id] = id, key

    def set_key(self, id: str, key: str | None) -> None:
        """Record the idempotency key that a live task has now; `None` if it has none."""
        former = self._keys_of_live_tasks.pop(id, None)
        if former is not None:
            self.key_owners[former] = None
        if key is not None and key in self.key_owners:
            self.key_owners[key], self._keys_of_live_tasks[id] = id, key

    def add(self, row: Row, kind: ChangeKind, before: str | None, reason: str | None) -> Change:
        """Assign the next revision to a change of `row`."""
        assert self._revision is not None  # the rows were read
        self._revision += 1
        change = Change(
            self._revision,
            self.now,
            ENTITY_NAMES[row.kind],
            row.id,
            kind,
            before,
            row.status,
            row.node,
            reason,
            row.version or None,  # 0: a row that was inserted by hand has no change
        )
        self.changes.append(change)
        return change

    def reserve_revisions(self, count: int) -> int:
        """Assign revisions to changes that the caller logs; return the last one before them."""
        assert self._revision is not None  # the rows were read
        self._revision += count
        return self._revision - count

    def finish(self) -> None:
        """Write the change log and the counters; called once, before the commit."""
        new = {one.revision: one for one in self.changes} if self.removed_history else {}
        removed_history: list[ChainEnd] = []
        for newest, item, id in self.removed_history:
            while newest is not None and newest in new:  # of this transaction: not logged at all
                newest = new.pop(newest).previous
            removed_history.append((newest, item, id))
        changes = list(new.values()) if removed_history else self.changes
        if changes:
            stored = self.sql.stored_reason
            rows = [
                (
                    *(one.revision, self.at, one.item, one.item_id, str(one.kind), *one[5:8]),
                    one.reason and stored(one.item, one.item_id, one.reason),
                    one.previous,
                )
                for one in changes
            ]
            self.cursor.write(self.sql.insert_change, rows)
        if removed_history:
            self.sql.forget(self.cursor, removed_history)
            self.cursor.write(self.sql.delete_past, [(id,) for _, _, id in removed_history])
        if self.has_removed_nodes:
            self.cursor.execute(self.sql.write_beat, (self.heartbeat_sequence,))


def counters_of(rows: Sequence[Any]) -> tuple[int, int]:
    """Return the revision and the heartbeat sequence number, with which each of the rows begins.

    Raises:
        SchemaMismatchError: If there are no rows.
    """
    require_counters(rows)
    revision, sequence, *_ = rows[0]
    return revision, sequence


def require_counters(rows: Sequence[Any]) -> None:
    """Require rows: without counters, a query has none, and no revision can be assigned.

    Raises:
        SchemaMismatchError: If there are no rows.
    """
    if not rows:
        raise SchemaMismatchError("the row of `counters` is gone: restore a backup")


def _store(unit: UnitOfWork, kind: type[Any], rows: Iterable[Row]) -> None:
    """Write each changed row once."""
    sql, cursor = unit.sql, unit.cursor
    deletes: list[tuple[str]] = []
    inserts: list[Raw] = []
    updates: dict[frozenset[str], tuple[str, RowCodec, list[list[Any]]]] = {}
    insert, codec = sql.insert[kind]
    for row in rows:
        if row.version is None or row.record is None:
            if row.stored and row.removed:
                deletes.append((row.id,))
        elif not row.stored:
            row.record.row = tuple(row.record.values(codec))
            inserts.append(row.record.row)
        else:
            # Consecutive statements may run in any order, so a row that was removed and created
            # again is overwritten: its insert could run before its delete.
            names = row.names.union(FIELDS[kind]) - {KEY[kind]} if row.removed else row.names
            if not names:
                continue
            if names not in updates:
                updates[names] = (*sql.update(kind, names), [])
            _, update_codec, parameters = updates[names]
            values = [row.id, *row.record.values(update_codec)]
            if "beat" in names:  # the last column
                values.append(unit.heartbeat_sequence)
            parameters.append(values)
    if deletes:
        cursor.write(sql.delete[kind], deletes)
        unit.has_removed_nodes |= kind is NodeInfo
    if inserts:
        cursor.write(insert, inserts)
    for statement, _, parameters in updates.values():
        cursor.write(statement, parameters)
