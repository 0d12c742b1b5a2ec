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
from typing import Any, Protocol, Self

import orjson
from sqlalchemy import (
    BigInteger,
    BindParameter,
    Column,
    ColumnElement,
    Compiled,
    Dialect,
    FromClause,
    Select,
    Table,
    TableValuedAlias,
    TextClause,
    UnaryExpression,
    any_,
    bindparam,
    cast,
    column,
    delete,
    func,
    insert,
    literal_column,
    or_,
    select,
    text,
    true,
    update,
    values,
)
from sqlalchemy.dialects import sqlite
from sqlalchemy.dialects.postgresql import ARRAY
from sqlalchemy.ext.asyncio import AsyncSession
from sqlalchemy.orm import Session
from sqlalchemy.sql import ClauseElement
from sqlalchemy.sql.operators import custom_op
from sqlalchemy.types import Text

from openclaw_store.backends import PUBLIC, CounterStatements, Cursor, qualified, schema_of
from openclaw_store.database.change_chain import chain_of_changes, histories, status_changes
from openclaw_store.database.claim_statements import claim_statements
from openclaw_store.database.row_codec import COLUMNS, FIELDS, codec_of, decoder_of
from openclaw_store.database.store_write import (
    CALL_FIELDS,
    POSTGRESQL,
    call_of_store_write,
    element_type,
)
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
from openclaw_store.database.types import Json, UtcTime
from openclaw_store.domain import KEY, Decode, NodeInfo, NodeStatus, RowCodec, Task
from openclaw_store.encryption import Escaping, Protection, SealedColumn

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
            read=self.read_counters, lock=self._compile(lock.with_for_update())
        )
        """The statements that a backend needs itself."""
        self.write_beat = self._compile(write_counters.values(beat=bindparam("newest")))
        """Keep the last heartbeat sequence number, though its node is removed."""
        self.read_one = {
            kind: self._compile(
                self._with_counters(kind).outerjoin_from(
                    CounterRow, row, _key(kind) == bindparam("id")
                )
            )
            for kind, row in ROWS.items()
        }
        """The columns that decisions on a row need, behind the counters; NULLs if it is missing."""
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
        self.insert_change = self._insert(list(_CHANGES.c))
        """The statement for many rows."""
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
        """Idempotency key and identifier of the live tasks that have one of the `given` keys."""
        self.status_since = self._compile(status_changes()) + " LIMIT 1"
        """The time of the last change of status; takes the newest change, its item and its id."""
        self.without_keys = self
        """The same statements without keys."""
        self._protect(Escaping())

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
        self._updates: dict[tuple[type[Any], frozenset[str]], tuple[str, RowCodec]] = {}
        self._call_columns: dict[frozenset[str], tuple[Sequence[int], RowCodec]] = {}

    def insert_into(self, table: Table) -> str:
        """Return the statement that inserts many rows with all columns of a table."""
        return self._insert(list(table.c))

    def stored_reason(self, item: str, id: str, reason: str | None) -> str | None:
        """Return the stored form of the reason of a change of an item."""
        return self._store_reason(f"{item}:{id}", reason) if reason else reason

    def read_reason(self, item: str, id: str, stored: str | None) -> str | None:
        """Return the reason of a change from its stored form.

        Raises:
            SealedValueError: If it cannot be opened.
        """
        return self._load_reason(f"{item}:{id}", stored) if stored else stored

    def update(self, kind: type[Any], names: frozenset[str]) -> tuple[str, RowCodec]:
        """Return the statement that updates the named columns of many rows, and their codec.

        A row is the key, then these columns. `beat` is the last of them, and not in the codec.
        """
        if (kind, names) not in self._updates:
            table = table_of(kind)
            columns = [one for one in table.c if one.name in names]
            fields = [one.name for one in columns if one.name != "beat"]
            statement = self._update(table.c[KEY[kind]], columns)
            codec = codec_of(kind, fields, self.dialect, self.protection)
            self._updates[kind, names] = statement, codec
        return self._updates[kind, names]

    def call_columns(self, names: frozenset[str]) -> tuple[Sequence[int], RowCodec]:
        """Return the positions of the named columns in `CALL_FIELDS`, and their codec."""
        if names not in self._call_columns:
            fields = [name for name in CALL_FIELDS if name in names]
            positions = list(map(CALL_FIELDS.index, fields))
            codec = codec_of(Task, fields, self.dialect, self.protection)
            self._call_columns[names] = positions, codec
        return self._call_columns[names]

    read_many: dict[type[Any], str]
    """As `read_one`, for `given` identifiers."""
    delete: dict[type[Any], str]
    """The statement for many rows of an identifier."""
    delete_change: str
    """The statement for many rows of a revision."""
    delete_past: str
    """The statement for many rows of an identifier: delete the past changes of a task."""
    read_tasks: str
    """All columns of the tasks with `given` identifiers; on PostgreSQL."""
    call: str
    """Call `store_write`: its base revision, former versions, tasks and nodes; on PostgreSQL."""
    beat: str
    """Write heartbeats: rows of usage, time, sequence number, id, the time again, the present."""
    _group: str
    """The first column of the index `ix_tasks_ready`: tasks that require the same skills."""
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
    def given(self, ids: Sequence[str]) -> Any:
        """Return identifiers as one parameter of `by_ids`."""

    @abstractmethod
    def by_ids(self, kind: type[Any], columns: Sequence[Any], ids: Any) -> Select[Any]:
        """Return the query of rows by their `given` identifiers; a missing row may have NULLs."""

    @abstractmethod
    def histories(self, versions: Sequence[int]) -> Select[Any]:
        """Return the query of the changes of many tasks, by the versions of their rows."""

    @abstractmethod
    def elements(self, texts: Any) -> Any:
        """Return the elements of a JSON list of text, as a column to select."""

    @abstractmethod
    def forget(self, cursor: Cursor, changes: Sequence[Sequence[Any]]) -> None:
        """Delete changes and all earlier ones of their items; rows as `status_since` takes."""

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


class SQLiteStatements(Statements):
    """The statements for SQLite."""

    # Without OR FAIL, SQLite keeps a copy of each page that a statement for many rows changes, to
    # undo that statement alone: a fifth of the time of an insert. It is not needed, because the
    # whole transaction is rolled back when a statement fails.
    _OR_FAIL = "OR FAIL"
    # `unlikely` makes the planner use the index on the status, and the sign keeps it from using the
    # one on the node: nearly all tasks may have had the same status when they were counted.
    _is_assigned = func.unlikely(IS_ASSIGNED)
    _assigned = UnaryExpression(_TASKS.c.assigned_node, operator=custom_op("+"))

    def __init__(self) -> None:
        super().__init__(sqlite.dialect(), None)
        given = _each(bindparam("ids"))
        self.read_many = {
            kind: self._compile(
                self._with_counters(kind)
                .select_from(CounterRow)
                .join(given, true())
                .outerjoin(row, _key(kind) == given.c.value)
            )
            for kind, row in ROWS.items()
        }
        self.delete = {
            kind: self._compile(delete(table_of(kind)).where(_key(kind) == bindparam("key")))
            for kind in ROWS
        }
        self._read_chain = self._compile(select(chain_of_changes().c.revision))
        self.delete_change = self._compile(
            delete(_CHANGES).where(_CHANGES.c.revision == bindparam("old"))
        )
        self.delete_past = self._compile(delete(_PAST).where(_PAST.c.item_id == bindparam("id")))
        self.beat = self._compile(
            update(_NODES)
            .where(
                _NODES.c.node_id == bindparam("id"),
                text(f"status <> '{NodeStatus.OFFLINE.value}'"),
                or_(
                    _NODES.c.last_heartbeat.is_(None),
                    _NODES.c.last_heartbeat <= bindparam("at"),
                    _NODES.c.last_heartbeat > bindparam("now"),
                ),
            )
            .values(
                {
                    **{name: func.coalesce(bindparam(name), _NODES.c[name]) for name in USAGE},
                    "last_heartbeat": bindparam("last"),
                    "beat": bindparam("beat_"),
                }
            )
        )

    def given(self, ids: Sequence[str]) -> str:
        return orjson.dumps(list(ids)).decode()

    def by_ids(self, kind: type[Any], columns: Sequence[Any], ids: Any) -> Select[Any]:
        # SQLite never reverses an outer join: it reads the identifiers first, not the table, even
        # if its statistics are from a time when the table was small.
        given = _each(ids)
        found = given.outerjoin(table_of(kind), _key(kind) == given.c.value)
        return select(*columns).select_from(found)

    def histories(self, versions: Sequence[int]) -> Select[Any]:
        return histories(_each(orjson.dumps(list(versions)).decode()), is_outer=True)

    def elements(self, texts: Any) -> Any:
        return _each(texts).c.value

    def forget(self, cursor: Cursor, changes: Sequence[Sequence[Any]]) -> None:
        # One by one: with old statistics, a search for the whole chain would read all changes.
        old = [row for change in changes for row in cursor.execute(self._read_chain, change)]
        cursor.write(self.delete_change, old)

    def _parameter(self, number: int) -> str:
        return "?"

    def _has_given_key(self) -> ColumnElement[bool]:
        return _TASKS.c.idempotency_key.in_(select(_each(bindparam("keys")).c.value))

    def _insert(self, columns: Sequence[Column[Any]]) -> str:
        statement = insert(columns[0].table).prefix_with(self._OR_FAIL)
        return self._compile(statement, [one.name for one in columns])

    def _update(self, key: Column[Any], columns: Sequence[Column[Any]]) -> str:
        names = [key.name, *(one.name for one in columns)]
        row = values(*map(column, names), name="given").data([tuple(map(bindparam, names))])
        given = row.cte("given")
        # `IN` as well: with old statistics SQLite would read the whole table.
        matches = key == given.c[key.name], key.in_(select(given.c[key.name]))
        statement = update(key.table).where(*matches).prefix_with(self._OR_FAIL)
        return self._compile(statement.values({one.name: given.c[one.name] for one in columns}))


class PostgreSQLStatements(Statements):
    """The statements for PostgreSQL.

    They match rows by key, so an update that waits for a concurrent change by hand finds its row.
    The arrays `$1::text::type[]` are not built by SQLAlchemy.
    """

    def __init__(self, schema: str) -> None:
        super().__init__(POSTGRESQL, schema)
        self.read_many = {
            kind: self._compile(
                self._with_counters(kind).outerjoin_from(
                    CounterRow, row, _is_among(kind, bindparam("ids"))
                )
            )
            for kind, row in ROWS.items()
        }
        among = _is_among(Task, bindparam("ids"))
        self.read_tasks = self._compile(select(*COLUMNS[Task]).where(among))
        self.call = call_of_store_write(schema)
        self.delete = {
            kind: f"DELETE FROM {self._named(table_of(kind))} USING {_given([_key(kind)])} "
            f"WHERE {_key(kind)} = given.{KEY[kind]}"
            for kind in ROWS
        }
        self.delete_change, self.delete_past = (
            f"DELETE FROM {self._named(column.table)} USING {_given([column])} "
            f"WHERE {column} = given.{column.name}"
            for column in (_CHANGES.c.revision, _PAST.c.item_id)
        )
        newest = _given([_CHANGES.c[name] for name in ("revision", "item", "item_id")])
        changes = self._named(_CHANGES)
        matches = "revision = given.revision AND one.item = given.item"
        self._forget = f"""
            WITH RECURSIVE chain AS (
                SELECT one.* FROM {newest} JOIN {changes} AS one
                ON one.{matches} AND one.item_id = given.item_id
                UNION ALL
                SELECT older.* FROM chain JOIN {changes} AS older
                ON older.revision = chain.previous AND older.revision < chain.revision
                AND older.item = chain.item AND older.item_id = chain.item_id
            )
            DELETE FROM {changes} WHERE revision IN (SELECT revision FROM chain)"""
        columns = [_NODES.c[name] for name in (*USAGE, "last_heartbeat", "beat", "node_id")]
        usage = ", ".join(f"{name} = coalesce(given.{name}, nodes.{name})" for name in USAGE)
        self.beat = f"""
            UPDATE {self._named(_NODES)} SET {usage}, last_heartbeat = given.last_heartbeat,
                beat = given.beat
            FROM {_given([*columns, *map(_NODES.c.last_heartbeat.label, ("at", "present"))])}
            WHERE nodes.node_id = given.node_id AND nodes.status <> '{NodeStatus.OFFLINE.value}'
            AND (nodes.last_heartbeat IS NULL OR nodes.last_heartbeat <= given.at
                OR nodes.last_heartbeat > given.present)"""

    def given(self, ids: Sequence[str]) -> Sequence[str]:
        return list(ids)

    def by_ids(self, kind: type[Any], columns: Sequence[Any], ids: Any) -> Select[Any]:
        return select(*columns).where(_is_among(kind, ids))

    def forget(self, cursor: Cursor, changes: Sequence[Sequence[Any]]) -> None:
        cursor.write(self._forget, changes)

    def histories(self, versions: Sequence[int]) -> Select[Any]:
        given = func.unnest(cast(list(versions), ARRAY(BigInteger))).table_valued("value")
        return histories(given.render_derived("given"), is_outer=False)

    def elements(self, texts: Any) -> Any:
        return func.json_array_elements_text(texts).table_valued("value").c.value

    def _parameter(self, number: int) -> str:
        return f"${number}"

    def _has_given_key(self) -> ColumnElement[bool]:
        return _TASKS.c.idempotency_key == any_(cast(bindparam("keys"), ARRAY(Text)))

    def _insert(self, columns: Sequence[Column[Any]]) -> str:
        names = ", ".join(one.name for one in columns)
        given = ", ".join(map(_value, columns))
        table = self._named(columns[0].table)
        return f"INSERT INTO {table} ({names}) SELECT {given} FROM {_given(columns)}"

    def _update(self, key: Column[Any], columns: Sequence[Column[Any]]) -> str:
        changes = ", ".join(f"{one.name} = {_value(one)}" for one in columns)
        given = _given([key, *columns])
        table = self._named(key.table)
        return f"UPDATE {table} SET {changes} FROM {given} WHERE {key} = given.{key.name}"


def _each(texts: Any) -> TableValuedAlias:
    """Return the elements of a JSON list, for SQLite."""
    return func.json_each(texts).table_valued("value").alias("given")


def _given(columns: Sequence[Any], first: int = 1) -> str:
    """Return a table of parameters from number `first`, an array for each column."""
    arrays = ", ".join(
        f"${number}::text::{element_type(one.type)}[]" for number, one in enumerate(columns, first)
    )
    return f"unnest({arrays}) AS given ({', '.join(one.name for one in columns)})"


def _value(column: Column[Any]) -> str:
    cast = "::json" if isinstance(column.type, Json) else ""
    return f"given.{column.name}{cast}"


def _key(kind: type[Any]) -> Column[Any]:
    key: Column[Any] = table_of(kind).c[KEY[kind]]
    return key


def _is_among(kind: type[Any], ids: Any) -> ColumnElement[bool]:
    """Return the condition of rows with one of these identifiers, for PostgreSQL."""
    return _key(kind) == any_(cast(ids, ARRAY(Text)))


def _identity(value: Any) -> Any:
    return value


class Place(Protocol):
    """An object that knows its database, as `Database`, a backend and a cursor do."""

    @property
    def dialect(self) -> str: ...
    @property
    def schema(self) -> str | None: ...


def statements_for(place: Place) -> Statements:
    """Return the statements for the tables of a database."""
    return _statements(place.dialect, place.schema)


def statements_in(session: Session | AsyncSession) -> Statements:
    """Return the statements for the tables of a session, with the keys of its database."""
    database = session.info.get("database")
    if database is not None:
        statements: Statements = database.statements
        return statements
    bind = session.get_bind()
    return _statements(bind.dialect.name, schema_of(bind))


def statements_of(dialect: str) -> Statements:
    """Return statements for `sqlite` or `postgresql`, to convert values alone: without a table."""
    return _statements(dialect, None if dialect == "sqlite" else PUBLIC)


@cache
def _statements(dialect: str, schema: str | None) -> Statements:
    if dialect == "sqlite":
        return SQLiteStatements()
    assert schema is not None
    return PostgreSQLStatements(schema)
