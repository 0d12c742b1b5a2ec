"""The tables, as SQLAlchemy declarative models, and how records become their rows and back.

Alembic checks itself against them, and every statement is built from them.

`TaskRow` and `NodeRow` have a column for each field of `Task` and `NodeInfo`, in the same order.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from datetime import UTC, datetime, timedelta
from enum import Enum
from functools import lru_cache
from operator import itemgetter
from typing import Any, Final

import orjson
from sqlalchemy import (
    BigInteger,
    CheckConstraint,
    DateTime,
    Dialect,
    Float,
    Index,
    Integer,
    MetaData,
    String,
    Table,
    Text,
    TextClause,
    text,
    type_coerce,
)
from sqlalchemy.ext.compiler import compiles
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column
from sqlalchemy.sql.compiler import SQLCompiler
from sqlalchemy.sql.functions import GenericFunction
from sqlalchemy.types import TypeDecorator, TypeEngine, UserDefinedType

from openclaw_store.domain.models import (
    FINISHED,
    HELD,
    WAITING,
    NodeInfo,
    NodeStatus,
    Task,
    TaskPriority,
    TaskStatus,
    TaskType,
)
from openclaw_store.domain.records import JSON_FIELDS, Decode, Plan, Raw, Record, decode
from openclaw_store.domain.validation import MAX_ID_LENGTH, encode_json
from openclaw_store.errors import InvalidDataError

_EPOCH: Final = datetime(1970, 1, 1, tzinfo=UTC)
_MICROSECOND: Final = timedelta(microseconds=1)


def to_microseconds(moment: datetime) -> int:
    """Microseconds since 1970, exactly."""
    delta = moment - _EPOCH
    return (delta.days * 86_400 + delta.seconds) * 1_000_000 + delta.microseconds


def from_microseconds(value: int) -> datetime:
    """The moment that is `value` microseconds after 1970, exactly."""
    return _EPOCH + value * _MICROSECOND  # to make a `timedelta` takes half as long again


def _in_utc(moment: datetime) -> datetime:
    """A moment as PostgreSQL takes and gives it: the first and the last of all without a zone."""
    if moment.tzinfo is UTC:
        return moment
    return moment.replace(tzinfo=UTC) if moment.tzinfo is None else moment.astimezone(UTC)


def _optional(process: Callable[[Any], Any]) -> Callable[[Any], Any]:
    return lambda value: None if value is None else process(value)


class UtcTime(TypeDecorator[datetime]):
    """A moment: an integer of microseconds since 1970 on SQLite, `timestamptz` elsewhere."""

    impl = DateTime(timezone=True)
    cache_ok = True

    def load_dialect_impl(self, dialect: Dialect) -> TypeEngine[Any]:
        kind = BigInteger() if dialect.name == "sqlite" else DateTime(timezone=True)
        return dialect.type_descriptor(kind)

    # The processors themselves are given, not `process_bind_param` and `process_result_value`:
    # this halves the time to read a row.
    def bind_processor(self, dialect: Dialect) -> Callable[[Any], Any] | None:
        return _optional(to_microseconds) if dialect.name == "sqlite" else None

    def result_processor(self, dialect: Dialect, coltype: object) -> Callable[[Any], Any] | None:
        return _optional(from_microseconds if dialect.name == "sqlite" else _in_utc)


class EnumValue(TypeDecorator[Any]):
    """A member of an enumeration, stored as its value: text people can read, or an integer."""

    impl = String
    cache_ok = True

    def __init__(self, kind: type[Enum]) -> None:
        self.kind = kind
        super().__init__()

    def load_dialect_impl(self, dialect: Dialect) -> TypeEngine[Any]:
        if issubclass(self.kind, int):
            return dialect.type_descriptor(Integer())
        return dialect.type_descriptor(String(max(len(member.value) for member in self.kind)))

    def bind_processor(self, dialect: Dialect) -> Callable[[Any], Any] | None:
        return _Translation({member: member.value for member in self.kind}, self.kind).__getitem__

    def result_processor(self, dialect: Dialect, coltype: object) -> Callable[[Any], Any] | None:
        return _Translation({member.value: member for member in self.kind}, self.kind).__getitem__


class _Translation(dict[Any, Any]):
    """Translates values; `None` stays itself, and an unknown one is an error."""

    def __init__(self, pairs: Mapping[Any, Any], kind: type[Enum]) -> None:
        super().__init__(pairs)
        self[None] = None
        self._kind = kind

    def __missing__(self, value: Any) -> Any:
        raise InvalidDataError(self._kind.__name__, f"{value!r} is not one of its values")


class _JsonText(UserDefinedType[str]):
    """PostgreSQL's `json`, which keeps the text as it is; `jsonb` would change numbers."""

    cache_ok = True

    def get_col_spec(self, **options: Any) -> str:
        return "JSON"


class Json(TypeDecorator[Any]):
    """Compact JSON text; NULL is the default of the field."""

    impl = Text
    cache_ok = True

    def load_dialect_impl(self, dialect: Dialect) -> TypeEngine[Any]:
        return dialect.type_descriptor(Text() if dialect.name == "sqlite" else _JsonText())

    def process_bind_param(self, value: Any, dialect: Dialect) -> str | None:
        return None if value is None else encode_json("value", value).decode()

    def process_result_value(self, value: str | None, dialect: Dialect) -> Any:
        return None if value is None else orjson.loads(value)


class _UtcNow(GenericFunction[datetime]):
    """The present moment as `UtcTime` stores it, for rows that people insert by hand."""

    type = UtcTime()
    inherit_cache = True


@compiles(_UtcNow, "sqlite")
def _utc_now_sqlite(element: _UtcNow, compiler: SQLCompiler, **options: Any) -> str:
    return "(CAST((julianday('now') - 2440587.5) * 86400000000 AS INTEGER))"


@compiles(_UtcNow, "postgresql")
def _utc_now_postgresql(element: _UtcNow, compiler: SQLCompiler, **options: Any) -> str:
    return "now()"


_Key = String(MAX_ID_LENGTH).with_variant(String(MAX_ID_LENGTH, collation="C"), "postgresql")
"""An identifier; sorted by its characters' numbers on both databases."""


def _one_of(column: str, kind: type[Enum]) -> CheckConstraint:
    values = ", ".join(repr(member.value) for member in kind)
    return CheckConstraint(f"{column} IN ({values})", name=column)


def _in(states: Iterable[TaskStatus]) -> TextClause:
    return text(f"status IN ({', '.join(repr(str(state)) for state in sorted(states))})")


# SQLite uses a partial index only for queries that repeat its condition to the letter.
IS_PENDING = _in(WAITING)
"""Whether a task waits to be run."""
IS_FINISHED = _in(FINISHED)
"""Whether a task is done."""
IS_LIVE = _in(WAITING | HELD)
"""Whether a task is not done yet."""
IS_HELD = _in(HELD)
"""Whether a task takes up a place on its node."""
_HAS_LIVE_KEY = text(f"idempotency_key IS NOT NULL AND {IS_LIVE}")


class Base(DeclarativeBase):
    """Gives every constraint a name that migrations can refer to."""

    metadata = MetaData(
        naming_convention={
            "ix": "ix_%(table_name)s_%(column_0_name)s",
            "uq": "uq_%(table_name)s_%(column_0_name)s",
            "ck": "ck_%(table_name)s_%(constraint_name)s",
            "fk": "fk_%(table_name)s_%(column_0_name)s_%(referred_table_name)s",
            "pk": "pk_%(table_name)s",
        }
    )


class TaskRow(Base):
    """A row of `tasks`."""

    __tablename__ = "tasks"
    __table_args__ = (
        _one_of("task_type", TaskType),
        _one_of("status", TaskStatus),
        CheckConstraint("priority BETWEEN 0 AND 3", name="priority"),
        # The pending list is read in this order, and finished tasks cost it nothing.
        Index(
            "ix_tasks_pending",
            "priority",
            "submitted_at",
            "task_id",
            sqlite_where=IS_PENDING,
            postgresql_where=IS_PENDING,
        ),
        Index("ix_tasks_status", "status", "submitted_at"),
        Index(
            "ix_tasks_assigned_node",
            "assigned_node",
            "submitted_at",
            sqlite_where=text("assigned_node IS NOT NULL"),
            postgresql_where=text("assigned_node IS NOT NULL"),
        ),
        Index(
            "ix_tasks_user_id",
            "user_id",
            "submitted_at",
            sqlite_where=text("user_id IS NOT NULL"),
            postgresql_where=text("user_id IS NOT NULL"),
        ),
        Index(
            "ix_tasks_finished",
            "completed_at",
            sqlite_where=IS_FINISHED,
            postgresql_where=IS_FINISHED,
        ),
        # Not unique: the writer decides, and one batch may end a task and begin the next one.
        Index(
            "ix_tasks_idempotency_key",
            "idempotency_key",
            sqlite_where=_HAS_LIVE_KEY,
            postgresql_where=_HAS_LIVE_KEY,
        ),
    )

    task_id: Mapped[str] = mapped_column(_Key, primary_key=True)
    task_type: Mapped[TaskType] = mapped_column(EnumValue(TaskType))
    name: Mapped[str] = mapped_column(Text)
    description: Mapped[str] = mapped_column(Text, server_default="")
    required_skills: Mapped[Any] = mapped_column(Json, nullable=True)
    optional_skills: Mapped[Any] = mapped_column(Json, nullable=True)
    status: Mapped[TaskStatus] = mapped_column(EnumValue(TaskStatus), server_default="pending")
    priority: Mapped[TaskPriority] = mapped_column(EnumValue(TaskPriority), server_default="2")
    assigned_node: Mapped[str | None] = mapped_column(_Key)
    attempt: Mapped[int] = mapped_column(BigInteger, server_default="0")
    submitted_at: Mapped[datetime] = mapped_column(UtcTime, server_default=_UtcNow())
    scheduled_at: Mapped[datetime | None] = mapped_column(UtcTime)
    started_at: Mapped[datetime | None] = mapped_column(UtcTime)
    completed_at: Mapped[datetime | None] = mapped_column(UtcTime)
    not_before: Mapped[datetime | None] = mapped_column(UtcTime)
    parameters: Mapped[Any] = mapped_column(Json, nullable=True)
    timeout: Mapped[int | None] = mapped_column(BigInteger)
    retry_count: Mapped[int] = mapped_column(BigInteger, server_default="0")
    max_retries: Mapped[int] = mapped_column(BigInteger, server_default="3")
    result: Mapped[Any] = mapped_column(Json, nullable=True)
    error: Mapped[str | None] = mapped_column(Text)
    user_id: Mapped[str | None] = mapped_column(_Key)
    idempotency_key: Mapped[str | None] = mapped_column(_Key)
    affinity_tags: Mapped[Any] = mapped_column(Json, nullable=True)
    # `metadata` is taken on a declarative class; the column has its real name.
    metadata_: Mapped[Any] = mapped_column("metadata", Json, nullable=True)
    updated_at: Mapped[datetime] = mapped_column(UtcTime, server_default=_UtcNow())
    version: Mapped[int] = mapped_column(BigInteger, server_default="0")


class NodeRow(Base):
    """A row of `nodes`: the fields of `NodeInfo`, and `beat`."""

    __tablename__ = "nodes"
    __table_args__ = (
        _one_of("status", NodeStatus),
        Index("ix_nodes_status", "status"),
        Index("ix_nodes_beat", "beat"),
    )

    node_id: Mapped[str] = mapped_column(_Key, primary_key=True)
    hostname: Mapped[str] = mapped_column(Text, server_default="")
    platform: Mapped[str] = mapped_column(Text, server_default="")
    arch: Mapped[str] = mapped_column(Text, server_default="")
    status: Mapped[NodeStatus] = mapped_column(EnumValue(NodeStatus), server_default="online")
    cpu_usage: Mapped[float] = mapped_column(Float, server_default="0")
    memory_usage: Mapped[float] = mapped_column(Float, server_default="0")
    disk_usage: Mapped[float] = mapped_column(Float, server_default="0")
    available_skills: Mapped[Any] = mapped_column(Json, nullable=True)
    max_concurrent_tasks: Mapped[int] = mapped_column(BigInteger, server_default="5")
    running_tasks: Mapped[int] = mapped_column(BigInteger, server_default="0")
    ip_address: Mapped[str] = mapped_column(Text, server_default="")
    tailscale_ip: Mapped[str] = mapped_column(Text, server_default="")
    port: Mapped[int] = mapped_column(BigInteger, server_default="18789")
    total_tasks_processed: Mapped[int] = mapped_column(BigInteger, server_default="0")
    successful_tasks: Mapped[int] = mapped_column(BigInteger, server_default="0")
    failed_tasks: Mapped[int] = mapped_column(BigInteger, server_default="0")
    average_execution_time: Mapped[float] = mapped_column(Float, server_default="0")
    registered_at: Mapped[datetime] = mapped_column(UtcTime, server_default=_UtcNow())
    last_heartbeat: Mapped[datetime | None] = mapped_column(UtcTime)
    tags: Mapped[Any] = mapped_column(Json, nullable=True)
    version: Mapped[int] = mapped_column(BigInteger, server_default="0")
    beat: Mapped[int] = mapped_column(BigInteger, server_default="0")
    """Number of the flush of heartbeats that last wrote the row."""


class ChangeRow(Base):
    """A row of `changes`, the feed: one for every change of a task or node, heartbeats aside.

    The history of a task or node is a chain: its `version` is the revision of its last change, and
    each change knows the one `previous` to it. An index would cost more than the whole row.
    """

    __tablename__ = "changes"

    revision: Mapped[int] = mapped_column(
        BigInteger().with_variant(Integer(), "sqlite"), primary_key=True, autoincrement=False
    )
    changed_at: Mapped[datetime] = mapped_column(UtcTime)
    item: Mapped[str] = mapped_column(String(4))
    """`task` or `node`."""
    item_id: Mapped[str] = mapped_column(_Key)
    kind: Mapped[str] = mapped_column(String(7))
    from_status: Mapped[str | None] = mapped_column(String(11))
    to_status: Mapped[str | None] = mapped_column(String(11))
    node: Mapped[str | None] = mapped_column(_Key)
    reason: Mapped[str | None] = mapped_column(Text)
    previous: Mapped[int | None] = mapped_column(BigInteger)
    """Revision of the change before this one of the same task or node; NULL for its first."""


class CounterRow(Base):
    """The one row of `counters`: what numbers the changes and the flushes of heartbeats."""

    __tablename__ = "counters"
    __table_args__ = (CheckConstraint("id = 1", name="one_row"),)

    id: Mapped[int] = mapped_column(Integer, primary_key=True)
    revision: Mapped[int] = mapped_column(BigInteger, server_default="0")
    beat: Mapped[int] = mapped_column(BigInteger, server_default="0")
    compacted: Mapped[int] = mapped_column(BigInteger, server_default="0")
    """Up to this revision, changes were removed from the feed."""


ROWS: Final[dict[type[Any], type[Base]]] = {Task: TaskRow, NodeInfo: NodeRow}
"""The declarative model of each domain class."""


KEY: Final[dict[type[Any], str]] = {Task: "task_id", NodeInfo: "node_id"}
"""The field that identifies each domain class."""


def table_of(kind: type[Any]) -> Table:
    """The table that rows of a domain class are in."""
    return Base.metadata.tables[ROWS[kind].__tablename__]


FIELDS: Final = {
    kind: tuple(column.name for column in row.__table__.columns if column.name != "beat")
    for kind, row in ROWS.items()
}
"""The columns that are fields of the domain class, in its order."""

COLUMNS: Final = {
    kind: tuple(
        type_coerce(row.__table__.c[name], Text).label(name)
        if name in JSON_FIELDS[kind]
        else row.__table__.c[name]
        for name in FIELDS[kind]
    )
    for kind, row in ROWS.items()
}
"""What to select to `decode` a row into a record."""


def plan_of(kind: type[Any], names: Sequence[str], dialect: Dialect) -> Plan:
    """How a record's values become the parameters for the named columns."""
    columns = table_of(kind).c
    encoders = []
    for place, name in enumerate(names):
        if isinstance(columns[name].type, UtcTime | EnumValue):
            encoder = columns[name].type.bind_processor(dialect)
            if encoder is not None:
                encoders.append((place, encoder))
    json = [(place, name) for place, name in enumerate(names) if name in JSON_FIELDS[kind]]
    return Plan(_picker(names), encoders, json)


def _picker(names: Sequence[str]) -> Callable[[Mapping[str, Any]], Sequence[Any]]:
    if len(names) == 1:
        return lambda fields: (fields[names[0]],)  # `itemgetter` would give the bare value
    return itemgetter(*names)


@lru_cache(maxsize=32)  # making one takes longer than reading a row
def decoder_of(kind: type[Any], dialect: Dialect) -> Decode:
    """What makes a record of a row of `COLUMNS`, as the driver gives it."""
    columns = table_of(kind).c
    decoders = []
    for place, name in enumerate(FIELDS[kind]):
        if isinstance(columns[name].type, UtcTime | EnumValue):
            decoder = columns[name].type.result_processor(dialect, None)
            if decoder is not None:
                decoders.append((place, decoder))

    def decode_row(raw: Raw) -> Record[Any]:
        values = list(raw)
        try:
            for place, decoder in decoders:
                if values[place] is not None:
                    values[place] = decoder(values[place])
        except (TypeError, OverflowError) as error:  # written by hand: SQLite takes text anywhere
            raise InvalidDataError(FIELDS[kind][place], f"of {raw[0]!r} cannot be read") from error
        return decode(kind, values)

    return decode_row
