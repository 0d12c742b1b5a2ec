"""Changes: each write as one value, decided in order, numbered, and recorded in the feed.

`apply` is handed a run of operations inside one write transaction. It reads the rows they touch
once, lets every operation decide in turn (the rows cannot move: nobody else can write meanwhile, or
this will not be written), and then writes each touched row once. Every change gets a **revision**:
consecutive, without gaps, in the order of commits. A heartbeat is no change: it has no revision.

The `version` of a row is the revision of its last change. So it grows, and no version ever comes
back, not even when a row is removed and created again.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from datetime import datetime
from typing import Any, ClassVar, NamedTuple, Protocol, Self

from openclaw_store.backends import array
from openclaw_store.database import FIELDS, ROWS, WriteTransaction, statements_for
from openclaw_store.domain import (
    ASSIGNED,
    ENTITY_NAMES,
    FINISHED,
    KEY,
    STORE_FIELDS,
    Change,
    ChangeKind,
    EntityKey,
    NodeInfo,
    Raw,
    Record,
    RowCodec,
    Task,
)
from openclaw_store.errors import (
    DuplicateError,
    NodeNotFoundError,
    NotFoundError,
    SchemaMismatchError,
    TaskNotFoundError,
)

_VERSION = {kind: names.index("version") for kind, names in FIELDS.items()}
"""The place of the version in a row."""


Forgotten = tuple[int | None, str, str]
"""The revision, item and identifier of a change that goes with all before it."""


class Event(NamedTuple):
    """What listeners are told of one change that was committed."""

    kind: type[Any]
    id: str
    record: Record[Any] | None
    """What the store holds now; `None` when it was removed."""
    change: Change


def missing(kind: type[Any], id: str) -> NotFoundError:
    """The error that says that there is no such row."""
    return TaskNotFoundError(id) if kind is Task else NodeNotFoundError(id)


class Command(Protocol):
    """A write of one row, and perhaps of others that go with it."""

    @property
    def kind(self) -> type[Any]: ...

    @property
    def id(self) -> str: ...

    @property
    def others(self) -> Iterable[EntityKey]:
        """Other rows that it will probably need; they are read together with those of others."""

    @property
    def is_new(self) -> bool:
        """Whether there should be no such row yet."""

    @property
    def hints(self) -> Iterable[Record[Any]]:
        """Tasks as they were last known, which may spare reading them."""

    @property
    def key(self) -> str | None:
        """The idempotency key that its task is to have."""

    def decide(self, row: Row) -> Any:
        """Change `row`, or return a `StoreError` and change nothing; returns the result."""


class SingleRowCommand:
    """A command on one existing row; it needs no other row."""

    __slots__ = ()
    is_new: ClassVar[bool] = False

    @property
    def others(self) -> Iterable[EntityKey]:
        return ()

    @property
    def hints(self) -> Iterable[Record[Any]]:
        return ()

    @property
    def key(self) -> str | None:
        return None


class Row:
    """A row as the operations of a transaction have left it so far."""

    stored = False
    """Whether the database had the row before."""
    removed = False
    """Whether it was removed since, though perhaps created again."""
    version: int | None = None
    """`None` when the row does not exist (any more)."""
    status: str | None = None
    node: str | None = None
    record: Record[Any] | None = None
    """The content, where it is known: always for nodes, for tasks once they were written."""
    names: frozenset[str] = frozenset()
    """The columns to be written, where the row is not new."""

    def __init__(self, unit: UnitOfWork, kind: type[Any], id: str) -> None:
        self._unit = unit
        self.kind = kind
        self.id = id
        self.now = unit.transaction.now

    def found(self, record: Record[Any]) -> Self:
        """Take over what the database holds."""
        self.stored, self.record = True, record
        self.version, self.status = record.version, record.status.value
        if self.kind is Task:
            self.node = record.assigned_node
        return self

    def other(self, kind: type[Any], id: str) -> Row:
        """Another row, whether its operation has named it before or not."""
        row = self._unit.rows[kind].get(id)
        if row is None:
            row = self._unit.row(kind, id)
            _load(self._unit, kind, {id: row})
        return row

    def held(self) -> list[Row]:
        """Of a node: the tasks that take up places on it, by identifier."""
        unit = self._unit
        tasks = unit.rows[Task]
        for raw in unit.cursor.read(unit.sql.read_assigned, (self.id,)):
            if raw[0] not in tasks:
                unit.row(Task, raw[0]).found(unit.sql.decode[Task](raw))
        held = [row for row in tasks.values() if row.node == self.id and row.status in ASSIGNED]
        return sorted(held, key=lambda row: row.id)  # the same on both databases

    def content(self, known: Record[Any] | None = None) -> Record[Any] | None:
        """What the row holds; `None` if it does not exist.

        Args:
            known: What it held at some time, which may spare looking.
        """
        if self.version is None or self.record is not None:
            return self.record
        if known is not None and known.version == self.version:
            return known
        unit = self._unit
        for raw in unit.cursor.read(unit.sql.read_task, (self.id,)):
            self.record = unit.sql.decode[Task](raw)
        return self.record

    def has_live_key(self, key: str) -> bool:
        """Whether it still has an idempotency key that it had before this run."""
        if self.status is None or self.status in FINISHED:
            return False
        return self.record is None or bool(self.record.idempotency_key == key)

    def key_taken(self, record: Record[Any]) -> DuplicateError | None:
        """Why a live task may not have the idempotency key that `record` has."""
        key = record.idempotency_key
        if key is None or record.status in FINISHED:
            return None
        self._unit.look_up([key])
        holder = self._unit.holders[key]
        return (
            None if holder in (None, self.id) else DuplicateError(ENTITY_NAMES[Task], holder, key)
        )

    @property
    def flush(self) -> int:
        """What `beat` is of a row that has a heartbeat written now."""
        return self._unit.beat

    def status_since(self) -> datetime | None:
        """When its status was changed last, as far as the feed knows."""
        unit, newest = self._unit, self.version
        for change in unit.changes_of(self):  # which the feed is yet to be told
            if change.from_status != change.to_status:
                return self.now
            newest = change.previous
        place = (newest, ENTITY_NAMES[self.kind], self.id)
        found = unit.cursor.read(unit.sql.status_since, place)
        return unit.sql.from_moment(found[0][0]) if found else None

    def write(
        self, record: Record[Any], names: Iterable[str], reason: str | None = None
    ) -> Record[Any]:
        """Give the row new content, under a new version; returns it as it is stored.

        Args:
            record: The operation's own, or made here: it is stamped as it is.
            names: Its fields that differ from those of the row.
            reason: Why, for the feed.
        """
        before, previous = self.status, self.version
        self.status = record.status._value_  # `value` costs a call
        if previous is None:
            kind = ChangeKind.CREATED
        elif before == self.status:
            kind = ChangeKind.UPDATED
        else:
            kind = ChangeKind.STATUS
        if self.kind is Task:
            self.node = record.assigned_node
            record.updated_at = self.now
            if self._unit.holders:
                self._unit.hold(self.id, record)
        change = self._unit.add(self, kind, before, reason)
        record.version = change.revision
        record.row = None  # of an attempt that was not committed
        if previous is not None:
            self.names = self.names.union(names, STORE_FIELDS)
        self.version, self.record = change.revision, record
        self._unit.tell(Event(self.kind, self.id, record, change))
        return record

    def touch(self, record: Record[Any], names: Iterable[str], event: object) -> None:
        """Write down what a heartbeat said, and tell `event`: no new version, no revision."""
        self.record = record
        self.names = self.names.union(names, ("beat",))
        self._unit.beaten = True
        self._unit.tell(event)

    def remove(self, *, with_history: bool) -> None:
        """End the row's life."""
        before, self.status = self.status, None
        if self.kind is Task:
            self._unit.let_go(self.id)
        change = self._unit.add(self, ChangeKind.REMOVED, before, None)
        if with_history:
            self._unit.forgotten.append((change.previous, change.item, self.id))
        self.version = self.record = None
        self.removed = True
        self.names = frozenset()
        self._unit.tell(Event(self.kind, self.id, None, change))


class UnitOfWork:
    """The revisions of one transaction, and what it adds to the feed.

    The counters are read before anything else, or with it, and tell at the end whether anybody
    has written since: each transaction that writes moves them.
    """

    def __init__(self, transaction: WriteTransaction) -> None:
        self.transaction = transaction
        self.cursor = transaction.cursor
        self.sql = statements_for(transaction.cursor.dialect)
        self.rows: dict[type[Any], dict[str, Row]] = {}
        """Those of the run of operations that is being decided."""
        self.holders: dict[str, str | None] = {}
        """The live task that has each idempotency key that was looked up; `None` for none."""
        self._keys: dict[str, str] = {}  # and the key of each of these tasks
        self._counters: tuple[int, int] | None = None  # as they were read
        self._revision = 0
        self.beat = 0
        """The number of this transaction's flush of heartbeats, if it has one."""
        self.beaten = False
        """Whether it has one."""
        self._changes: list[Change] = []
        self.forgotten: list[Forgotten] = []
        """The newest change, item and identifier of those whose history is to be removed."""
        self._trusted: dict[str, int] = {}  # the versions of tasks that were not read
        self._presumed_new: list[Row] = []  # those that were not read, either
        self._only_adds = False  # rows that are presumed new: only their numbers may be wrong
        self.tell: Callable[[object], None] = transaction.committed.append
        """Tells the listeners, once it is committed."""
        transaction.unit_of_work = self
        transaction.before_commit.append(self._write)

    def count_from(self, revision: int, beat: int) -> None:
        """Take note of the counters, when they are first read."""
        if self._counters is None:
            self._counters = revision, beat
            self._revision, self.beat = revision, beat + 1

    def trust(self, operations: Sequence[Command]) -> bool:
        """Take the rows for what they are known as, without reading them; `False` if some are not.

        If what is known is outdated, nothing will be written. A task is what it was at that
        version: no version ever comes back. The nodes are as the writer left them, if nobody has
        written since. And what is to be added is not there.
        """
        # Only in the first run of a transaction: later runs do not know what it has written.
        known = self.cursor.expected() if self._counters is None else None
        if known is None:
            return False
        counters, nodes = known
        tasks = {
            record.task_id: record
            for operation in operations
            for record in operation.hints
            if record.version > 0  # else it is in memory only
        }
        new = {(operation.kind, operation.id) for operation in operations if operation.is_new}
        for kind, records in ((Task, tasks), (NodeInfo, nodes)):
            if any(id not in records and (kind, id) not in new for id in self.rows[kind]):
                return False
        self._only_adds = all(operation.is_new for operation in operations)
        for kind, records in ((Task, tasks), (NodeInfo, nodes)):
            for id, row in self.rows[kind].items():
                if id in records:
                    row.found(records[id])
                    self._only_adds = False  # nobody would find out whether it is still there
                else:
                    self._presumed_new.append(row)
        self.count_from(*counters)
        self._trusted = {id: record.version for id, record in tasks.items()}
        self.cursor.speculate()
        return True

    def make_sure(self) -> None:
        """Begin anew if a row was taken for new and is not added: nobody would find out."""
        if any(row.version is None for row in self._presumed_new):
            self.cursor.abort()

    def end_run(self) -> None:
        """Forget the rows. They refer to the unit: such cycles only the collector frees."""
        self.rows, self._presumed_new = {}, []

    def row(self, kind: type[Any], id: str) -> Row:
        """The row of this run with this identifier; a new one is yet to be read."""
        rows = self.rows[kind]
        row = rows.get(id)
        if row is None:
            row = rows[id] = Row(self, kind, id)
        return row

    def look_up(self, keys: Iterable[str]) -> None:
        """Find the live tasks that have these idempotency keys."""
        missing = {key: None for key in keys if key not in self.holders}
        if missing:
            self._only_adds = False
            self.holders.update(missing)
            given = self.sql.given(list(missing))
            for key, id in self.cursor.read(self.sql.read_live_keys, (given,)):
                row = self.rows[Task].get(id)
                if row is None or row.has_live_key(key):
                    self.holders[key], self._keys[id] = id, key

    def hold(self, id: str, record: Record[Task]) -> None:
        """Take note of the idempotency key that a task has now."""
        self.let_go(id)
        key = record.idempotency_key
        if key in self.holders and record.status not in FINISHED:
            self.holders[key], self._keys[id] = id, key

    def let_go(self, id: str) -> None:
        """Take note that a task has no idempotency key any more, or is not live."""
        key = self._keys.pop(id, None)
        if key is not None:
            self.holders[key] = None

    def add(self, row: Row, kind: ChangeKind, before: str | None, reason: str | None) -> Change:
        """Number a change."""
        self._revision += 1
        change = Change(
            self._revision,
            self.transaction.now,
            ENTITY_NAMES[row.kind],
            row.id,
            kind,
            before,
            row.status,
            row.node,
            reason,
            row.version or None,  # a row that was inserted by hand has no change to name
        )
        self._changes.append(change)
        return change

    def changes_of(self, row: Row) -> Iterable[Change]:
        """Those of a row that this transaction has made, newest first."""
        place = (ENTITY_NAMES[row.kind], row.id)
        return (one for one in reversed(self._changes) if (one.item, one.item_id) == place)

    def _write(self) -> None:
        if self._counters is None:
            return
        changes, forgotten = self._changes, self.forgotten
        if forgotten:
            changes, forgotten = self._without_forgotten()
        if changes:
            at = self.sql.to_moment(self.transaction.now)
            self.cursor.write(
                self.sql.insert_change,
                [
                    (one.revision, at, one.item, one.item_id, one.kind._value_, *one[5:])
                    for one in changes
                ],
            )
        if forgotten:
            self.cursor.write(self.sql.forget, forgotten)
        if self._only_adds:
            self.cursor.assign_revisions(len(self._changes), self._revision, self._rebase)
        elif self._changes or self.beaten:
            beat = self.beat if self.beaten else self.beat - 1
            counters = (self._revision, beat, *self._counters)
            if self._trusted:
                tasks = array(list(self._trusted)), array(list(self._trusted.values()))
                self.cursor.compare_and_set(self.sql.write_counters_if, (*counters, *tasks))
            else:
                self.cursor.compare_and_set(self.sql.write_counters, counters)

    def _rebase(self, by: int) -> None:
        """Number all that was added behind what others have committed meanwhile."""
        committed = self.transaction.committed
        for place, event in enumerate(committed):
            event.record.version += by
            row = list(event.record.row)
            row[_VERSION[event.kind]] += by
            event.record.row = tuple(row)
            change = event.change._replace(revision=event.change.revision + by)
            committed[place] = event._replace(change=change)

    def _without_forgotten(self) -> tuple[list[Change], list[Forgotten]]:
        """What the feed is to be told, and where what it is to forget begins.

        What this transaction itself would have to remove again it does not write.
        """
        changes = {one.revision: one for one in self._changes}
        forgotten = []
        for newest, item, id in self.forgotten:
            while newest is not None and newest in changes:
                newest = changes.pop(newest).previous
            forgotten.append((newest, item, id))
        return list(changes.values()), forgotten


def apply(transaction: WriteTransaction, operations: Sequence[Command]) -> Sequence[Any]:
    """Decide the operations in order and write what they changed."""
    if not operations:
        return []
    unit = transaction.unit_of_work or UnitOfWork(transaction)
    rows = unit.rows = {kind: {} for kind in ROWS}
    targets: list[Row] = []
    keys: list[str] = []
    for operation in operations:
        targets.append(unit.row(operation.kind, operation.id))
        for kind, id in operation.others:
            unit.row(kind, id)
        if operation.key is not None:
            keys.append(operation.key)
    cursor = transaction.cursor
    if not (cursor.is_speculative and unit.trust(operations)):
        for kind, touched in rows.items():
            if touched:
                _load(unit, kind, touched)
    unit.look_up(keys)
    outcomes = [operation.decide(row) for operation, row in zip(operations, targets, strict=True)]
    unit.make_sure()
    for kind, touched in rows.items():
        _store(unit, kind, touched.values())
    if cursor.is_speculative:
        cursor.expect({id: row.record for id, row in rows[NodeInfo].items()})
    unit.end_run()
    return outcomes


def counters_of(rows: Sequence[Any]) -> tuple[int, int]:
    """Revision and flush, with which each of these rows begins.

    Raises:
        SchemaMismatchError: If there are none, as nothing can be numbered then.
    """
    if not rows:
        raise SchemaMismatchError("the row of `counters` is gone: restore a backup")
    revision, beat, *_ = rows[0]
    return revision, beat


def _load(unit: UnitOfWork, kind: type[Any], rows: Mapping[str, Row]) -> None:
    sql = unit.sql
    found = unit.cursor.read(*sql.read(kind, list(rows)))
    unit.count_from(*counters_of(found))
    if kind is NodeInfo:
        for values in found:
            if values[2] is None:
                continue
            rows[values[2]].found(sql.decode[kind](values[2:]))
    else:
        for _, _, id, version, status, node in found:
            if id is not None:
                row = rows[id]
                row.stored, row.version, row.status, row.node = True, version, status, node


def _store(unit: UnitOfWork, kind: type[Any], rows: Iterable[Row]) -> None:
    """Write what the operations left, each row once."""
    sql, cursor = unit.sql, unit.cursor
    deletes: list[tuple[str]] = []
    inserts: list[Raw] = []
    updates: dict[frozenset[str], tuple[str, RowCodec, list[list[Any]]]] = {}
    insert, plan = sql.insert[kind]
    for row in rows:
        if row.version is None or row.record is None:
            if row.stored and row.removed:
                deletes.append((row.id,))
        elif not row.stored:
            row.record.row = tuple(row.record.values(plan))
            inserts.append(row.record.row)
        else:
            # One that was created again is written over: a statement cannot insert what another,
            # done together with it, deletes.
            names = row.names.union(FIELDS[kind]) - {KEY[kind]} if row.removed else row.names
            if not names:
                continue
            if names not in updates:
                updates[names] = (*sql.update(kind, names), [])
            _, codec, parameters = updates[names]
            values = [row.id, *row.record.values(codec)]
            if "beat" in names:  # the last column
                values.append(unit.beat)
            parameters.append(values)
    if deletes:
        cursor.write(sql.delete[kind], deletes)
    if inserts:
        cursor.write(insert, inserts)
    for statement, _, parameters in updates.values():
        cursor.write(statement, parameters)
