"""The SQL that units send, made once from the mapping, for each database.

Units speak to the drivers themselves: SQLAlchemy's way to a driver takes longer than most of these
statements. One for many rows is sent once for all of them, where the driver can do that: SQLite
takes `VALUES` with a place for each value, PostgreSQL an array for each column, as text.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from datetime import datetime
from functools import cache, partial
from typing import Any

import orjson
from sqlalchemy import (
    CTE,
    Column,
    ColumnElement,
    Dialect,
    Select,
    TableValuedAlias,
    TextClause,
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
    table,
    text,
    true,
    update,
)
from sqlalchemy.dialects import sqlite
from sqlalchemy.dialects.postgresql import ARRAY, asyncpg
from sqlalchemy.sql import ClauseElement
from sqlalchemy.sql.operators import custom_op
from sqlalchemy.types import Text

from openclaw_store.backends import PLACEHOLDER, shifted
from openclaw_store.database.row_codec import COLUMNS, FIELDS, codec_of, decoder_of
from openclaw_store.database.tables import (
    IS_ASSIGNED,
    IS_FINISHED,
    IS_LIVE,
    ROWS,
    Base,
    CounterRow,
    TaskRow,
    table_of,
)
from openclaw_store.database.types import Json, UtcTime
from openclaw_store.domain import KEY, Decode, NodeInfo, NodeStatus, RowCodec, Task, TaskStatus

USAGE = ("cpu_usage", "memory_usage", "disk_usage", "running_tasks")
"""What a heartbeat may report."""


_POSTGRESQL: Dialect = asyncpg.dialect()  # type: ignore[no-untyped-call]  # it has no types


_CHANGES = Base.metadata.tables["changes"]


_NODES = table_of(NodeInfo)


_TASKS = table_of(Task)


class Statements(ABC):
    """The statements for one database. Rows are tuples of what the driver takes."""

    def __init__(self, dialect: Dialect) -> None:
        self.dialect = dialect
        counters = select(CounterRow.revision, CounterRow.beat).where(text("id = 1"))
        self.read_counters = self._compile(counters)
        self.write_counters = self._compile(
            update(CounterRow)
            .where(
                text("id = 1"),
                CounterRow.revision == bindparam("read_revision"),
                CounterRow.beat == bindparam("read_beat"),
            )
            .values(revision=bindparam("new_revision"), beat=bindparam("new_beat"))
        )
        """New counters and those that were read, which must be there still.

        `write_counters_if`, besides: identifiers of tasks, and the versions they must have.
        """
        self._read_one = {
            kind: self._compile(
                self._with_counters(kind).outerjoin_from(
                    CounterRow, row, _key(kind) == bindparam("id")
                )
            )
            for kind, row in ROWS.items()
        }
        self.insert = {
            kind: (
                self._insert([table_of(kind).c[name] for name in names]),
                codec_of(kind, names, dialect),
            )
            for kind, names in FIELDS.items()
        }
        """For many rows, and what makes each of them of a record."""
        self.forget_until = self._compile(
            delete(_CHANGES)
            .where(_CHANGES.c.revision <= bindparam("until"))
            .returning(_CHANGES.c.revision)
        )
        """Removes all changes up to a revision, and tells which."""
        self.write_compacted = self._compile(
            update(CounterRow).where(text("id = 1")).values(compacted=bindparam("until"))
        )
        """Tells everybody of it."""
        self.insert_change = self._insert(list(_CHANGES.c))
        """For many rows."""
        moment = UtcTime()
        self.to_moment: Callable[[datetime], Any] = moment.bind_processor(dialect) or _as_it_is
        """A moment as the driver takes it."""
        self.from_moment: Callable[[Any], datetime] = (
            moment.result_processor(dialect, None) or _as_it_is
        )
        """A moment as the driver gives it."""
        self.decode: Mapping[type[Any], Decode] = {
            Task: decoder_of(Task, dialect),
            NodeInfo: decoder_of(NodeInfo, dialect),
        }
        """Makes a record of a row of all columns."""
        self.read_task = self._compile(
            select(*COLUMNS[Task]).where(TaskRow.task_id == bindparam("id"))
        )
        """All columns of a task."""
        self.read_assigned = self._compile(
            select(*COLUMNS[Task]).where(self._is_assigned, self._assigned == bindparam("node"))
        )
        """All columns of the tasks that take up places on a node."""
        self.read_live_keys = self._compile(
            select(TaskRow.idempotency_key, TaskRow.task_id).where(IS_LIVE, self._has_given_key())
        )
        """The idempotency keys among those `given` that live tasks have, and which."""
        self.status_since = self._compile(_status_since()) + " LIMIT 1"  # else it is a parameter
        """When the status changed last; for the newest change, its item and its identifier."""
        self._updates: dict[tuple[type[Any], frozenset[str]], tuple[str, RowCodec]] = {}

    def update(self, kind: type[Any], names: frozenset[str]) -> tuple[str, RowCodec]:
        """For many rows of the key and the named columns, and what makes the latter of a record.

        It writes these columns and no others. `beat` is the last of them, and not in the plan.
        """
        if (kind, names) not in self._updates:
            table = table_of(kind)
            columns = [one for one in table.c if one.name in names]
            fields = [one.name for one in columns if one.name != "beat"]
            statement = self._update(table.c[KEY[kind]], columns)
            self._updates[kind, names] = statement, codec_of(kind, fields, self.dialect)
        return self._updates[kind, names]

    def finished(self, keep: Iterable[TaskStatus]) -> Sequence[str]:
        """Four searches of one index, but for tasks whose status is to be kept.

        For a cutoff and a limit: those that finished before it, and those without `completed_at`
        that were changed before it. For the present moment, another one and a limit: those whose
        `completed_at` is yet to come that were changed before, and that were changed after it.
        """
        query = select(TaskRow.task_id).where(IS_FINISHED)
        for status in keep:
            query = query.where(text(f"status <> '{status.value}'"))
        now, moment = (bindparam(name, type_=UtcTime()) for name in ("now", "moment"))
        return [
            f"{self._compile(query.where(*conditions))} LIMIT {self._parameter(number)}"
            for number, *conditions in (
                (2, TaskRow.completed_at < moment),
                (2, TaskRow.completed_at.is_(None), TaskRow.updated_at < moment),
                (3, TaskRow.completed_at > now, TaskRow.updated_at < moment),
                (3, TaskRow.completed_at > now, TaskRow.updated_at > moment),
            )
        ]

    def read(self, kind: type[Any], ids: Sequence[str]) -> tuple[str, Sequence[Any]]:
        """The counters and what decisions need of rows, in each row; one of NULLs is none."""
        if len(ids) == 1:
            return self._read_one[kind], ids
        return self._read_many[kind], (self.given(ids),)

    write_counters_if: str
    _read_many: dict[type[Any], str]
    delete: dict[type[Any], str]
    """For many rows of an identifier."""
    forget: str
    """Removes a change and all before it; for many rows as `status_since` takes."""
    beat: str
    """For many rows of usage, moment, flush, identifier, the moment again, and the present one."""
    _is_assigned: ColumnElement[bool] | TextClause = IS_ASSIGNED
    """Whether a task takes up a place on a node."""
    _assigned: ColumnElement[Any] = _TASKS.c.assigned_node
    """The node of a task, in a search that shall not go through all tasks it ever had."""

    @abstractmethod
    def _parameter(self, number: int) -> str:
        """What stands for a parameter, by its place from 1."""

    @abstractmethod
    def _has_given_key(self) -> ColumnElement[bool]:
        """Whether a task has one of the idempotency keys that are `given`."""

    @abstractmethod
    def given(self, ids: Sequence[str]) -> Any:
        """Identifiers as a parameter of `by_ids`."""

    @abstractmethod
    def by_ids(self, kind: type[Any], columns: Sequence[Any], ids: Any) -> Select[Any]:
        """What finds rows by their `given` identifiers; a row of NULLs is none."""

    @abstractmethod
    def elements(self, texts: Any) -> Any:
        """The elements of a JSON list of text, as a column to select."""

    @abstractmethod
    def _insert(self, columns: Sequence[Column[Any]]) -> str: ...

    @abstractmethod
    def _update(self, key: Column[Any], columns: Sequence[Column[Any]]) -> str: ...

    def _compile(self, statement: ClauseElement, columns: Sequence[str] | None = None) -> str:
        """The text of a statement whose parameters stand in the order of `columns`, else in its."""
        names = None if columns is None else list(columns)
        return str(statement.compile(dialect=self.dialect, column_keys=names))

    def _with_counters(self, kind: type[Any]) -> Select[Any]:
        # Of a task the decisions need little; nodes are few, and some writes need all of them.
        names = ("task_id", "version", "status", "assigned_node")
        columns = COLUMNS[kind] if kind is NodeInfo else map(table_of(kind).c.get, names)
        counters = select(CounterRow.revision, CounterRow.beat, *columns)
        return counters.where(text("counters.id = 1"))


class SQLiteStatements(Statements):
    """Those for SQLite."""

    # What a failed statement has written is rolled back with all of its transaction. Without
    # this, SQLite would besides keep a copy of each page that a statement for many rows changes,
    # to be able to undo that alone: a fifth of the time of an insert.
    _OR_FAIL = "OR FAIL"
    # Behind a sign it cannot be looked up in an index, so the one on the status is used: even
    # where nearly all tasks had one and the same when they were counted.
    _is_assigned = func.unlikely(IS_ASSIGNED)
    _assigned = UnaryExpression(_TASKS.c.assigned_node, operator=custom_op("+"))

    def __init__(self) -> None:
        super().__init__(sqlite.dialect())
        given = _each(bindparam("ids"))
        self._read_many = {
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
        chain = _chain()
        self.forget = self._compile(
            delete(_CHANGES).where(_CHANGES.c.revision.in_(select(chain.c.revision)))
        )
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
        # SQLite never turns an outer join round: it goes through the identifiers, not through the
        # table, even if its statistics are of a time when that was small.
        given = _each(ids)
        found = given.outerjoin(table_of(kind), _key(kind) == given.c.value)
        return select(*columns).select_from(found)

    def elements(self, texts: Any) -> Any:
        return _each(texts).c.value

    def _parameter(self, number: int) -> str:
        return "?"

    def _has_given_key(self) -> ColumnElement[bool]:
        return _TASKS.c.idempotency_key.in_(select(_each(bindparam("keys")).c.value))

    def _insert(self, columns: Sequence[Column[Any]]) -> str:
        statement = insert(columns[0].table).prefix_with(self._OR_FAIL)
        return self._compile(statement, [one.name for one in columns])

    def _update(self, key: Column[Any], columns: Sequence[Column[Any]]) -> str:
        names = [key.name, *(one.name for one in columns)]
        given = table("given", *map(column, names))
        # `IN` besides: with old statistics SQLite would go through the whole table.
        statement = update(key.table).where(
            key == given.c[key.name], key.in_(select(given.c[key.name]))
        )
        statement = statement.values({one.name: given.c[one.name] for one in columns})
        values = f"({', '.join(names)}) AS (VALUES ({', '.join('?' * len(names))}))"
        return f"WITH given {values} {self._compile(statement.prefix_with(self._OR_FAIL))}"


class PostgreSQLStatements(Statements):
    """Those for PostgreSQL.

    A row that is changed by hand at the same time is waited for, and found by its key again.
    """

    def __init__(self) -> None:
        super().__init__(_POSTGRESQL)
        self._read_many = {
            kind: self._compile(
                self._with_counters(kind).outerjoin_from(
                    CounterRow, row, _is_among(kind, bindparam("ids"))
                )
            )
            for kind, row in ROWS.items()
        }
        versions = _given([_TASKS.c.task_id, _TASKS.c.version])
        self.write_counters_if = f"""{self.write_counters}
            AND NOT EXISTS (
                SELECT FROM {PLACEHOLDER.sub(partial(shifted, by=4), versions)} LEFT JOIN tasks
                ON tasks.task_id = given.task_id WHERE tasks.version IS DISTINCT FROM given.version
            )"""
        self.delete = {
            kind: f"DELETE FROM {table_of(kind)} USING {_given([_key(kind)])} "
            f"WHERE {_key(kind)} = given.{KEY[kind]}"
            for kind in ROWS
        }
        newest = _given([_CHANGES.c[name] for name in ("revision", "item", "item_id")])
        matches = "revision = given.revision AND one.item = given.item"
        self.forget = f"""
            WITH RECURSIVE chain AS (
                SELECT one.* FROM {newest} JOIN changes AS one
                ON one.{matches} AND one.item_id = given.item_id
                UNION ALL
                SELECT older.* FROM chain JOIN changes AS older
                ON older.revision = chain.previous AND older.revision < chain.revision
                AND older.item = chain.item AND older.item_id = chain.item_id
            )
            DELETE FROM changes WHERE revision IN (SELECT revision FROM chain)"""
        columns = [_NODES.c[name] for name in (*USAGE, "last_heartbeat", "beat", "node_id")]
        usage = ", ".join(f"{name} = coalesce(given.{name}, nodes.{name})" for name in USAGE)
        self.beat = f"""
            UPDATE nodes SET {usage}, last_heartbeat = given.last_heartbeat, beat = given.beat
            FROM {_given([*columns, *map(_NODES.c.last_heartbeat.label, ("at", "present"))])}
            WHERE nodes.node_id = given.node_id AND nodes.status <> '{NodeStatus.OFFLINE.value}'
            AND (nodes.last_heartbeat IS NULL OR nodes.last_heartbeat <= given.at
                OR nodes.last_heartbeat > given.present)"""

    def given(self, ids: Sequence[str]) -> Sequence[str]:
        return list(ids)

    def by_ids(self, kind: type[Any], columns: Sequence[Any], ids: Any) -> Select[Any]:
        return select(*columns).where(_is_among(kind, ids))

    def elements(self, texts: Any) -> Any:
        return func.json_array_elements_text(texts).table_valued("value").c.value

    def _parameter(self, number: int) -> str:
        return f"${number}"

    def _has_given_key(self) -> ColumnElement[bool]:
        return _TASKS.c.idempotency_key == any_(cast(bindparam("keys"), ARRAY(Text)))

    def _insert(self, columns: Sequence[Column[Any]]) -> str:
        names = ", ".join(one.name for one in columns)
        values = ", ".join(map(_value, columns))
        return f"INSERT INTO {columns[0].table} ({names}) SELECT {values} FROM {_given(columns)}"

    def _update(self, key: Column[Any], columns: Sequence[Column[Any]]) -> str:
        changes = ", ".join(f"{one.name} = {_value(one)}" for one in columns)
        given = _given([key, *columns])
        return f"UPDATE {key.table} SET {changes} FROM {given} WHERE {key} = given.{key.name}"


def _each(texts: Any) -> TableValuedAlias:
    """The elements of a JSON list, for SQLite."""
    return func.json_each(texts).table_valued("value").alias("given")


def _given(columns: Sequence[Any]) -> str:
    """A table of what is given, an array for each column."""
    arrays = ", ".join(
        f"${place}::text::{_element(one.type)}[]" for place, one in enumerate(columns, start=1)
    )
    return f"unnest({arrays}) AS given ({', '.join(one.name for one in columns)})"


def _element(kind: Any) -> str:
    """What an array for a column of this type holds: text of any length, the JSON not yet read."""
    name: str = kind.compile(_POSTGRESQL)
    return "text" if name.startswith("VARCHAR") or name == "JSON" else name


def _value(column: Column[Any]) -> str:
    cast = "::json" if isinstance(column.type, Json) else ""
    return f"given.{column.name}{cast}"


def _key(kind: type[Any]) -> Column[Any]:
    key: Column[Any] = table_of(kind).c[KEY[kind]]
    return key


def _is_among(kind: type[Any], ids: Any) -> ColumnElement[bool]:
    """Whether a row has one of these identifiers, for PostgreSQL."""
    return _key(kind) == any_(cast(ids, ARRAY(Text)))


def _as_it_is(value: Any) -> Any:
    return value


def history_of(newest: int, item: str, id: str) -> Select[Any]:
    """The changes of one task or node up to the newest, which is given; newest first."""
    chain = _chain()
    query = select(chain).order_by(chain.c.revision.desc())
    return query.params(newest=newest, item_=item, id=id)


def _status_since() -> Select[Any]:
    chain = _chain()
    changed = chain.c.from_status.is_distinct_from(chain.c.to_status)
    return select(chain.c.changed_at).where(changed)


def _chain() -> CTE:
    """A chain of changes, from the newest, which is given, to the first."""
    newest = _CHANGES.alias()
    chain = (
        select(newest)
        .where(
            newest.c.revision == bindparam("newest"),
            newest.c.item == bindparam("item_"),
            newest.c.item_id == bindparam("id"),
        )
        .cte("chain", recursive=True)
    )
    older = _CHANGES.alias()
    # A version that somebody wrote by hand may point anywhere, even forward: it must not go round.
    is_next = and_(
        older.c.revision == chain.c.previous,
        older.c.revision < chain.c.revision,
        older.c.item == chain.c.item,
        older.c.item_id == chain.c.item_id,
    )
    return chain.union_all(select(older).join(chain, is_next))


@cache
def statements_for(dialect: str) -> Statements:
    """The statements for `sqlite` or `postgresql`."""
    return SQLiteStatements() if dialect == "sqlite" else PostgreSQLStatements()
