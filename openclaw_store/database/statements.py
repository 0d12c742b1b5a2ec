"""SQL statements of the write path, compiled once from the declarative models for each database.

The write path calls the drivers directly: compiling and executing through SQLAlchemy takes longer
than most of these statements. A statement for many rows is sent once: SQLite takes `VALUES` with a
parameter for each value, PostgreSQL an array for each column, as text.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from copy import copy
from datetime import datetime
from functools import cache
from typing import Any, Self

from sqlalchemy import (
    BindParameter,
    Column,
    ColumnElement,
    Compiled,
    Dialect,
    FromClause,
    Select,
    Table,
    TextClause,
    bindparam,
    delete,
    literal_column,
    select,
    text,
    true,
    update,
)
from sqlalchemy.sql import ClauseElement

from openclaw_store.backends import CounterStatements, Cursor, qualified
from openclaw_store.database.change_chain import status_changes
from openclaw_store.database.claim_statements import claim_statements
from openclaw_store.database.row_codec import COLUMNS, FIELDS, codec_of, decoder_of
from openclaw_store.database.store_write import CALL_FIELDS
from openclaw_store.database.tables import (
    IS_ASSIGNED,
    IS_LIVE,
    ROWS,
    Base,
    CounterRow,
    NodeRow,
    TaskRow,
    table_of,
)
from openclaw_store.database.types import UtcTime
from openclaw_store.domain import KEY, Decode, NodeInfo, Raw, Record, RowCodec, Task
from openclaw_store.encryption import Protection, Sealed, SealedColumn

USAGE = ("cpu_usage", "memory_usage", "disk_usage", "running_tasks")
"""The fields that a heartbeat may report."""

REASON = SealedColumn("changes", "reason", is_json=False)
"""The sealed column of the feed; its row is the item and its identifier, as `task:train-7`."""

_PROGRESS = SealedColumn("nodes", "progress", is_json=True)

_CHANGES = Base.metadata.tables["changes"]
_PAST = Base.metadata.tables["past_changes"]
_NODES = table_of(NodeInfo)
_TASKS = table_of(Task)

_ONLY_COUNTERS = text("counters.id = 1")  # as text: no parameter
_COUNTERS = (CounterRow.revision, CounterRow.heartbeats)


class Statements(ABC):
    """The statements for one database. Rows are tuples of values that its driver takes."""

    def __init__(self, dialect: Dialect, schema: str | None) -> None:
        self.dialect = dialect
        self.schema = schema
        read_counters = select(*_COUNTERS).where(_ONLY_COUNTERS)
        self.read_counters = self._compile(read_counters)
        write_counters = update(CounterRow).where(_ONLY_COUNTERS)
        lock: Select[Any] = (
            select(literal_column("1")).select_from(CounterRow).where(_ONLY_COUNTERS)
        )
        self.counters = CounterStatements(
            read=self.read_counters, lock=self._compile(lock.with_for_update()), schema=schema
        )
        """The statements that a backend needs itself."""
        self.write_beat = self._compile(write_counters.values(beat=bindparam("newest")))
        """Record the last heartbeat sequence number, as its node may just have been removed."""
        self.read_one = {
            kind: self._compile(
                self._with_counters(kind).outerjoin_from(
                    CounterRow, row, key_column(kind) == bindparam("id")
                )
            )
            for kind, row in ROWS.items()
        }
        """The counters, then the columns of a row that decisions need; NULLs for a missing row."""
        self._insert_rows = {
            kind: self._insert([table_of(kind).c[name] for name in names])
            for kind, names in FIELDS.items()
        }
        self.forget_until = self._compile(
            delete(_CHANGES)
            .where(_CHANGES.c.revision <= bindparam("until"))
            .returning(_CHANGES.c.revision)
        )
        """Delete all changes up to a revision, and return their revisions."""
        self.write_compacted = self._compile(write_counters.values(compacted=bindparam("until")))
        """Record the revision up to which changes were deleted."""
        # The next five take many rows at once.
        self.insert_change = self._insert(list(_CHANGES.c))
        """Insert a change into the log."""
        self.delete = {kind: self.delete_from(key_column(kind)) for kind in ROWS}
        """Delete a task or node by its identifier."""
        self.delete_change = self.delete_from(_CHANGES.c.revision)
        """Delete a change by its revision."""
        self.insert_past = self._insert(list(_PAST.c))
        """Insert a past change of a task."""
        self.delete_past = self.delete_from(_PAST.c.item_id)
        """Delete the past changes of a task by its identifier."""
        self.has_past = self._compile(select(literal_column("1")).where(select(_PAST).exists()))
        """A row if there are past changes."""
        moment = UtcTime()
        self.to_moment: Callable[[datetime], Any] = moment.bind_processor(dialect) or _identity
        """Convert a time to the driver's value."""
        self.from_moment: Callable[[Any], datetime] = (
            moment.result_processor(dialect, None) or _identity
        )
        """Convert the driver's value to a time."""
        tasks = select(*COLUMNS[Task])
        self.read_task = self._compile(tasks.where(TaskRow.task_id == bindparam("id")))
        """All columns of a task."""
        self.claims = claim_statements(dialect.name, schema)
        """The queries of a claim."""
        assigned = tasks.where(self._is_assigned, self._assigned == bindparam("node"))
        # Not `limit`: SQLAlchemy adds an OFFSET to it for SQLite, as a parameter.
        self.read_assigned = f"{self._compile(assigned)} LIMIT {self._parameter(2)}"
        """All columns of the tasks that a node has claimed and not finished; takes a limit."""
        node: BindParameter[str] = bindparam("node")
        held = (
            select(TaskRow.task_id, TaskRow.attempt, TaskRow.cancel_requested_at)
            .where(self._is_assigned, self._assigned == node)
            .subquery()
        )
        self.lease = (
            select(NodeRow.session, held)
            .outerjoin_from(NodeRow, held, true())
            .where(NodeRow.node_id == node)
        )
        """The session of a node, and the tasks that it has claimed and not finished."""
        self.write_progress = self._update(_NODES.c.node_id, [_NODES.c.progress])
        """Write the progress of running tasks: rows of node and JSON."""
        self.read_live_keys = self._compile(
            select(TaskRow.idempotency_key, TaskRow.task_id).where(IS_LIVE, self._has_given_key())
        )
        """Idempotency key and identifier of each live task that has one of the `given` keys."""
        self.status_since = self._compile(status_changes()) + " LIMIT 1"
        """The time of the last change of status; takes the newest change, its item and its id."""
        self.clear = codec_of(Task, FIELDS[Task], dialect, None)
        """Makes a row of a task in clear; the writer seals its values."""
        self.without_keys = self
        """The same statements without keys."""
        self._protect(Protection())

    def protected_by(self, protection: Protection) -> Self:
        """Return the same statements, with codecs that seal and open values."""
        protected = copy(self)
        protected._protect(protection)
        return protected

    def _protect(self, protection: Protection) -> None:
        dialect = self.dialect
        self.protection = protection
        """The conversion of values to their stored form and back."""
        self.insert = {
            kind: (self._insert_rows[kind], codec_of(kind, names, dialect, protection))
            for kind, names in FIELDS.items()
        }
        """The statement for many rows, and the codec that makes a row of a record."""
        self.decode: Mapping[type[Any], Decode] = {
            kind: decoder_of(kind, dialect, protection) for kind in ROWS
        }
        """Make a record of a row of all columns."""
        self.store_progress = protection.storing(_PROGRESS)
        self.load_progress = protection.loading(_PROGRESS)
        """Seal and open the progress of a node; they take its identifier."""
        self._store_reason = protection.storing(REASON)
        self._load_reason = protection.loading(REASON)
        self.update: Callable[[type[Any], frozenset[str]], tuple[str, RowCodec]]
        self.update = cache(self._update_of)  # type: ignore[assignment]  # a type is hashable
        """Return the statement that updates the named columns of many rows, and their codec.

        A row is the key, then these columns. `beat` is the last of them, and not in the codec.
        """
        self.call_columns = cache(self._call_columns_of)
        """Return the positions of the named columns in `CALL_FIELDS`, and their codec."""

    def insert_into(self, table: Table) -> str:
        """Return the statement that inserts many rows with all columns of a table."""
        return self._insert(list(table.c))

    def encode(self, task: Record[Task]) -> Raw:
        """Return the row of a task, as the driver would return it."""
        _, codec = self.insert[Task]
        return tuple(task.values(codec))

    def stored_reason(self, item: str, id: str, reason: str) -> str:
        """Return the stored form of the reason of a change of an item."""
        return self._store_reason(f"{item}:{id}", reason)

    def read_reason(self, item: str, id: str, stored: str | None) -> str | None:
        """Return the reason of a change from its stored form.

        Raises:
            SealedValueError: If it cannot be opened.
        """
        return self._load_reason(f"{item}:{id}", stored) if stored else stored

    def open_text(self, value: Any, id: str) -> Any:
        """Return the text of a selected value of the row with this identifier.

        Raises:
            SealedValueError: If it is sealed, and cannot be opened.
        """
        return value.open_with(self.protection, id) if isinstance(value, Sealed) else value

    def _update_of(self, kind: type[Any], names: frozenset[str]) -> tuple[str, RowCodec]:
        table = table_of(kind)
        columns = [one for one in table.c if one.name in names]
        fields = [one.name for one in columns if one.name != "beat"]
        codec = codec_of(kind, fields, self.dialect, self.protection)
        return self._update(table.c[KEY[kind]], columns), codec

    def _call_columns_of(self, names: frozenset[str]) -> tuple[Sequence[int], RowCodec]:
        fields = [name for name in CALL_FIELDS if name in names]
        codec = codec_of(Task, fields, self.dialect, self.protection)
        return list(map(CALL_FIELDS.index, fields)), codec

    read_many: dict[type[Any], str]
    """As `read_one`, for `given` identifiers."""
    read_tasks: str
    """All columns of the tasks with `given` identifiers; on PostgreSQL."""
    delete_changes: str
    """Delete the changes from one revision to another, both included; takes many such pairs."""
    call: str
    """Call `store_write`: its base revision, former versions, tasks and nodes; on PostgreSQL."""
    beat: str
    """Write heartbeats: rows of usage, time, sequence number, id, the time again, the present."""
    _is_assigned: ColumnElement[bool] | TextClause = IS_ASSIGNED
    """The condition of tasks that are claimed or running."""
    _assigned: ColumnElement[Any] = _TASKS.c.assigned_node
    """The node of a task, in a search that must not read all tasks that the node ever had."""

    @abstractmethod
    def _parameter(self, number: int) -> str:
        """Return the placeholder of a parameter, numbered from 1."""

    @abstractmethod
    def _has_given_key(self) -> ColumnElement[bool]:
        """Return the condition of tasks with one of the `given` idempotency keys."""

    @abstractmethod
    def delete_from(self, column: Column[Any]) -> str:
        """Return the statement that deletes the rows with a value; it takes many values."""

    @abstractmethod
    def given(self, ids: Sequence[str]) -> Any:
        """Return identifiers as one parameter of `by_ids`."""

    @abstractmethod
    def by_ids(self, kind: type[Any], columns: Sequence[Any], ids: Any) -> Select[Any]:
        """Return the query of rows by their `given` identifiers; a missing row may have NULLs."""

    @abstractmethod
    def changes_at(self, columns: Sequence[Any], revisions: Sequence[int]) -> Select[Any]:
        """Return the query of changes by their revisions; a missing one may have NULLs."""

    @abstractmethod
    def has_element(self, document: Any, wanted: str) -> ColumnElement[bool]:
        """Return the condition that a JSON list contains a text."""

    @abstractmethod
    def forget(self, cursor: Cursor, changes: Sequence[Sequence[Any]]) -> None:
        """Delete changes, and all earlier ones of the same tasks and nodes.

        Args:
            changes: For each, its revision, item and identifier.
        """

    @abstractmethod
    def _insert(self, columns: Sequence[Column[Any]]) -> str: ...

    @abstractmethod
    def _update(self, key: Column[Any], columns: Sequence[Column[Any]]) -> str: ...

    def _compile(self, statement: ClauseElement, columns: Sequence[str] | None = None) -> str:
        """Return the SQL; its parameters are in the order of `columns`, or of the statement."""
        return str(self.compile(statement, columns))

    def compile(self, statement: ClauseElement, columns: Sequence[str] | None = None) -> Compiled:
        """Return the compiled statement, which names the schema of each table."""
        options: dict[str, Any] = {}
        if self.schema:
            translation = {None: self.schema}
            options = {"schema_translate_map": translation, "render_schema_translate": True}
        return statement.compile(dialect=self.dialect, column_keys=columns, **options)

    def _named(self, table: FromClause) -> str:
        """Return the name of a table with its schema."""
        return qualified(self.schema, str(table))

    def _with_counters(self, kind: type[Any]) -> Select[Any]:
        # Decisions need few columns of a task; nodes are few, and some writes need all of them.
        names = ("task_id", "version", "status", "assigned_node")
        columns = COLUMNS[kind] if kind is NodeInfo else map(table_of(kind).c.get, names)
        return select(*_COUNTERS, *columns).where(_ONLY_COUNTERS)


def key_column(kind: type[Any]) -> Column[Any]:
    """Return the column of the identifier of an entity."""
    key: Column[Any] = table_of(kind).c[KEY[kind]]
    return key


def _identity(value: Any) -> Any:
    return value
