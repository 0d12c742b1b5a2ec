"""The statements for SQLite and for PostgreSQL."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any, Protocol

import orjson
from sqlalchemy import (
    BigInteger,
    BindParameter,
    Column,
    ColumnElement,
    Select,
    TableValuedAlias,
    UnaryExpression,
    and_,
    any_,
    bindparam,
    cast,
    column,
    delete,
    func,
    insert,
    or_,
    select,
    text,
    true,
    update,
    values,
)
from sqlalchemy.dialects import sqlite
from sqlalchemy.dialects.postgresql import ARRAY, JSONB
from sqlalchemy.ext.asyncio import AsyncSession
from sqlalchemy.orm import Session
from sqlalchemy.sql.operators import custom_op
from sqlalchemy.types import Text

from openclaw_store.backends import PUBLIC, Cursor, schema_of
from openclaw_store.database.change_chain import chain_of_changes
from openclaw_store.database.row_codec import COLUMNS
from openclaw_store.database.statements import USAGE, Statements, key_column
from openclaw_store.database.store_write import (
    POSTGRESQL,
    call_of_store_write,
    element_type,
)
from openclaw_store.database.tables import (
    IS_ASSIGNED,
    ROWS,
    Base,
    CounterRow,
    table_of,
)
from openclaw_store.database.types import Json
from openclaw_store.domain import NodeInfo, NodeStatus, Task

_CHANGES = Base.metadata.tables["changes"]
_PAST = Base.metadata.tables["past_changes"]
_NODES = table_of(NodeInfo)
_TASKS = table_of(Task)


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
                .outerjoin(row, key_column(kind) == given.c.value)
            )
            for kind, row in ROWS.items()
        }
        first: BindParameter[int] = bindparam("first")
        last: BindParameter[int] = bindparam("last")
        between = _CHANGES.c.revision.between(first, last)
        self.delete_changes = self._compile(delete(_CHANGES).where(between))
        self._read_chain = self._compile(select(chain_of_changes().c.revision))
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

    def delete_from(self, column: Column[Any]) -> str:
        return self._compile(delete(column.table).where(column == bindparam("value")))

    def given(self, ids: Sequence[str]) -> str:
        return orjson.dumps(list(ids)).decode()

    def by_ids(self, kind: type[Any], columns: Sequence[Any], ids: Any) -> Select[Any]:
        # SQLite never reverses an outer join: it reads the identifiers first, not the table, even
        # if its statistics are from a time when the table was small.
        given = _each(ids)
        found = given.outerjoin(table_of(kind), key_column(kind) == given.c.value)
        return select(*columns).select_from(found)

    def changes_at(self, columns: Sequence[Any], revisions: Sequence[int]) -> Select[Any]:
        given = _each(orjson.dumps(list(revisions)).decode())
        found = given.outerjoin(_CHANGES, _CHANGES.c.revision == given.c.value)
        return select(*columns).select_from(found)

    def has_element(self, document: Any, wanted: str) -> ColumnElement[bool]:
        elements, is_list = _each(document), func.json_type(document) == "array"
        return and_(is_list, select(elements).where(elements.c.value == wanted).exists())

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

    They match rows by key: an update that waits for a concurrent change by hand still finds its
    row. Some are text, because SQLAlchemy cannot build arrays of the form `$1::text::type[]`.
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
        ends = _given([_CHANGES.c.revision.label("first"), _CHANGES.c.revision.label("last")])
        self.delete_changes = (
            f"DELETE FROM {self._named(_CHANGES)} USING {ends} "
            "WHERE revision BETWEEN given.first AND given.last"
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

    def delete_from(self, column: Column[Any]) -> str:
        table, given = self._named(column.table), _given([column])
        return f"DELETE FROM {table} USING {given} WHERE {column} = given.{column.name}"

    def given(self, ids: Sequence[str]) -> Sequence[str]:
        return list(ids)

    def by_ids(self, kind: type[Any], columns: Sequence[Any], ids: Any) -> Select[Any]:
        return select(*columns).where(_is_among(kind, ids))

    def forget(self, cursor: Cursor, changes: Sequence[Sequence[Any]]) -> None:
        cursor.write(self._forget, changes)

    def changes_at(self, columns: Sequence[Any], revisions: Sequence[int]) -> Select[Any]:
        among = _CHANGES.c.revision == any_(cast(list(revisions), ARRAY(BigInteger)))
        return select(*columns).where(among)

    def has_element(self, document: Any, wanted: str) -> ColumnElement[bool]:
        # Not a search in `json_array_elements_text`: PostgreSQL runs a subquery with a column of
        # the row on one core only.
        is_list = func.json_typeof(document) == "array"
        return and_(is_list, cast(document, JSONB).has_key(wanted))

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


def _is_among(kind: type[Any], ids: Any) -> ColumnElement[bool]:
    """Return the condition of rows with one of these identifiers, for PostgreSQL."""
    return key_column(kind) == any_(cast(ids, ARRAY(Text)))


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
