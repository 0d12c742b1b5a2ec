"""The declarative models of the tables; Alembic compares the schema with them.

`TaskRow` and `NodeRow` have a column for each field of `Task` and `NodeInfo`, in the same order.
"""

from __future__ import annotations

from collections.abc import Iterable
from datetime import datetime
from enum import Enum
from functools import partial
from secrets import randbits
from typing import Any, Final

from sqlalchemy import (
    BigInteger,
    CheckConstraint,
    Float,
    Index,
    Integer,
    MetaData,
    String,
    Table,
    Text,
    TextClause,
    func,
    select,
    text,
)  # fmt: skip
from sqlalchemy.orm import DeclarativeBase, Mapped, column_property, mapped_column

from openclaw_store.database.types import (
    EnumValue,
    Json,
    SealableJson,
    SealableKey,
    SealableText,
    UtcTime,
    _Key,
    _UtcNow,
)
from openclaw_store.domain import (
    ASSIGNED,
    FINISHED,
    WAITING,
    NodeInfo,
    NodeStatus,
    Task,
    TaskPriority,
    TaskStatus,
    TaskType,
)


def _one_of(column: str, kind: type[Enum]) -> CheckConstraint:
    values = ", ".join(repr(member.value) for member in kind)
    return CheckConstraint(f"{column} IN ({values})", name=column)


def _index(name: str, *columns: str, where: TextClause | None = None) -> Index:
    return Index(name, *columns, sqlite_where=where, postgresql_where=where)


def _in(states: Iterable[TaskStatus]) -> TextClause:
    return text(f"status IN ({', '.join(repr(str(state)) for state in sorted(states))})")


# SQLite uses a partial index only for queries that repeat its condition literally.
IS_PENDING = _in(WAITING)
"""The condition of pending and scheduled tasks."""

IS_FINISHED = _in(FINISHED)
"""The condition of tasks that are completed, failed or cancelled."""

HAS_FAILED = _in({TaskStatus.FAILED, TaskStatus.TIMEOUT})
"""The condition of tasks that are failed or timed out."""

IS_LIVE = _in(WAITING | ASSIGNED)
"""The condition of tasks that are not finished."""

IS_ASSIGNED = _in(ASSIGNED)
"""The condition of tasks that count against the capacity of their node."""

_PENDING = f"status = '{TaskStatus.PENDING.value}'"
IS_READY = text(f"{_PENDING} AND not_before IS NULL")
"""The condition of pending tasks that were never delayed."""

IS_DELAYED = text(f"{_PENDING} AND not_before IS NOT NULL")
"""The condition of pending tasks that are delayed, or were."""

IS_PREFERRING = text(
    f"{_PENDING} AND (CAST(optional_skills AS TEXT) <> '[]' OR CAST(affinity_tags AS TEXT) <> '[]')"
)
"""The condition of pending tasks that prefer some nodes."""

IS_EXPIRING = text(f"{IS_PENDING} AND expires_at IS NOT NULL")
"""The condition of tasks that have not started and expire."""

_HAS_NODE, _HAS_USER = text("assigned_node IS NOT NULL"), text("user_id IS NOT NULL")
_HAS_COMPLETION = text(f"{IS_FINISHED} OR completed_at IS NOT NULL")
_HAS_LIVE_KEY = text(f"idempotency_key IS NOT NULL AND {IS_LIVE}")


UNCOMPARED_INDEXES = {
    "ix_tasks_ready": "CREATE INDEX ix_tasks_ready ON tasks"
    f" (required_skills, priority, submitted_at, task_id) WHERE {IS_READY}"
}
"""Indexes that are not part of the models, with SQLite's definition: each database has its own
columns, and Alembic cannot compare expressions on SQLite."""


class Base(DeclarativeBase):
    """The base of all models; it names every constraint, so that migrations can refer to it."""

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
    """A row of `tasks`: the fields of `Task`, and `UNVERSIONED`."""

    __tablename__ = "tasks"
    __table_args__ = (
        _one_of("task_type", TaskType),
        _one_of("status", TaskStatus),
        CheckConstraint("priority BETWEEN 0 AND 3", name="priority"),
        # The list of pending tasks is read in this order; finished tasks are not in the index.
        _index("ix_tasks_pending", "priority", "submitted_at", "task_id", where=IS_PENDING),
        _index("ix_tasks_status", "status", "submitted_at"),
        _index("ix_tasks_assigned_node", "assigned_node", "submitted_at", where=_HAS_NODE),
        _index("ix_tasks_user_id", "user_id", "submitted_at", where=_HAS_USER),
        _index("ix_tasks_completed_at", "completed_at", "task_id", where=_HAS_COMPLETION),
        _index("ix_tasks_failed", "completed_at", "task_id", where=HAS_FAILED),
        # Beside it, migrations 0003 and 0010 make `ix_tasks_ready`; see `UNCOMPARED_INDEXES`.
        _index("ix_tasks_delayed", "not_before", where=IS_DELAYED),
        _index("ix_tasks_expiring", "expires_at", where=IS_EXPIRING),
        # Tells whether there is such a task. No other index begins with the column, and so none can
        # be mistaken for it.
        _index("ix_tasks_preferring", "max_retries", where=IS_PREFERRING),
        # Not unique: the writer refuses duplicates, and one batch may end a task and add the next.
        _index("ix_tasks_idempotency_key", "idempotency_key", where=_HAS_LIVE_KEY),
    )

    task_id: Mapped[str] = mapped_column(_Key, primary_key=True)
    task_type: Mapped[TaskType] = mapped_column(EnumValue(TaskType))
    name: Mapped[str] = mapped_column(SealableText("tasks", "name"))
    description: Mapped[str] = mapped_column(
        SealableText("tasks", "description"), server_default=""
    )
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
    parameters: Mapped[Any] = mapped_column(SealableJson("tasks", "parameters"), nullable=True)
    timeout: Mapped[int | None] = mapped_column(BigInteger)
    retry_count: Mapped[int] = mapped_column(BigInteger, server_default="0")
    max_retries: Mapped[int] = mapped_column(BigInteger, server_default="3")
    result: Mapped[Any] = mapped_column(SealableJson("tasks", "result"), nullable=True)
    error: Mapped[str | None] = mapped_column(SealableText("tasks", "error"))
    user_id: Mapped[str | None] = mapped_column(SealableKey("tasks", "user_id"))
    idempotency_key: Mapped[str | None] = mapped_column(_Key)
    affinity_tags: Mapped[Any] = mapped_column(Json, nullable=True)
    # `metadata` is reserved on a declarative class; the column has the real name.
    metadata_: Mapped[Any] = mapped_column(
        "metadata", SealableJson("tasks", "metadata"), nullable=True
    )
    losses: Mapped[int] = mapped_column(BigInteger, server_default="0")
    max_losses: Mapped[int | None] = mapped_column(BigInteger, server_default="10")
    expires_at: Mapped[datetime | None] = mapped_column(UtcTime)
    cancel_requested_at: Mapped[datetime | None] = mapped_column(UtcTime)
    cancel_deadline_at: Mapped[datetime | None] = mapped_column(UtcTime)
    traceparent: Mapped[str | None] = mapped_column(String(55))
    updated_at: Mapped[datetime] = mapped_column(UtcTime, server_default=_UtcNow())
    version: Mapped[int] = mapped_column(BigInteger, server_default="0")
    passed_over_at: Mapped[datetime | None] = mapped_column(UtcTime)
    """Time of the first claim that took a later task for its preferences. It counts only while it
    is after `updated_at`: a change of the task makes it void."""


class NodeRow(Base):
    """A row of `nodes`: the fields of `NodeInfo`, and `UNVERSIONED`."""

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
    ip_address: Mapped[str] = mapped_column(SealableText("nodes", "ip_address"), server_default="")
    tailscale_ip: Mapped[str] = mapped_column(
        SealableText("nodes", "tailscale_ip"), server_default=""
    )
    port: Mapped[int] = mapped_column(BigInteger, server_default="18789")
    total_tasks_processed: Mapped[int] = mapped_column(BigInteger, server_default="0")
    successful_tasks: Mapped[int] = mapped_column(BigInteger, server_default="0")
    failed_tasks: Mapped[int] = mapped_column(BigInteger, server_default="0")
    average_execution_time: Mapped[float] = mapped_column(Float, server_default="0")
    registered_at: Mapped[datetime] = mapped_column(UtcTime, server_default=_UtcNow())
    last_heartbeat: Mapped[datetime | None] = mapped_column(UtcTime)
    tags: Mapped[Any] = mapped_column(Json, nullable=True)
    lease_seconds: Mapped[float | None] = mapped_column(Float)
    status_reason: Mapped[str | None] = mapped_column(SealableText("nodes", "status_reason"))
    session: Mapped[str | None] = mapped_column(Text)
    version: Mapped[int] = mapped_column(BigInteger, server_default="0")
    progress: Mapped[Any] = mapped_column(SealableJson("nodes", "progress"), nullable=True)
    """Progress of the running tasks, by identifier; see `repositories.progress`."""
    beat: Mapped[int] = mapped_column(BigInteger, server_default="0")
    """Sequence number of the last heartbeat flush that wrote the row."""


class ChangeRow(Base):
    """A row of `changes`, the feed: one change of a task or node. Heartbeats are no changes.

    The history of a task or node is a chain: its `version` is the revision of its last change, and
    each change refers to the `previous` one. An index would cost more than the whole row.
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
    reason: Mapped[str | None] = mapped_column(SealableText("changes", "reason"))
    previous: Mapped[int | None] = mapped_column(BigInteger)
    """Revision of the change before this one of the same task or node; NULL for its first."""


class PastChangeRow(Base):
    """A row of `past_changes`: a change of a restored task from the time before it was archived.

    It is part of the history of the task, but not of the feed: no watcher reads it.
    """

    __tablename__ = "past_changes"

    item_id: Mapped[str] = mapped_column(_Key, primary_key=True)
    revision: Mapped[int] = mapped_column(BigInteger, primary_key=True, autoincrement=False)
    changed_at: Mapped[datetime] = mapped_column(UtcTime)
    item: Mapped[str] = mapped_column(String(4))
    kind: Mapped[str] = mapped_column(String(7))
    from_status: Mapped[str | None] = mapped_column(String(11))
    to_status: Mapped[str | None] = mapped_column(String(11))
    node: Mapped[str | None] = mapped_column(_Key)
    reason: Mapped[str | None] = mapped_column(SealableText("changes", "reason"))
    previous: Mapped[int | None] = mapped_column(BigInteger)


class ArchiveRunRow(Base):
    """A row of `archive_runs`: the intent to move rows to or from an archive, and its state."""

    __tablename__ = "archive_runs"

    run: Mapped[str] = mapped_column(String(40), primary_key=True)
    """Sorts by time; the names of its files begin with it."""
    kind: Mapped[str] = mapped_column(String(8))
    location: Mapped[str] = mapped_column(Text)
    state: Mapped[str] = mapped_column(String(8))
    files: Mapped[str | None] = mapped_column(Text)
    """The written files as JSON, once they are verified."""
    position: Mapped[int] = mapped_column(BigInteger, server_default="0")
    """Number of rows of the files that were handled, in their order."""
    changed_at: Mapped[datetime] = mapped_column(UtcTime)


class ArchiveVoidRow(Base):
    """A row of `archive_voids`: an archived copy that no longer counts.

    It waits here until a file of the archive lists it.
    """

    __tablename__ = "archive_voids"

    task_id: Mapped[str] = mapped_column(_Key, primary_key=True)
    version: Mapped[int] = mapped_column(BigInteger, primary_key=True, autoincrement=False)
    run: Mapped[str] = mapped_column(String(40))


class LeaseRow(Base):
    """A row of `leases`: the right of one process to do a kind of work until a time."""

    __tablename__ = "leases"

    name: Mapped[str] = mapped_column(String(32), primary_key=True)
    holder: Mapped[str] = mapped_column(String(64))
    expires_at: Mapped[datetime] = mapped_column(UtcTime)


class SealingKeyRow(Base):
    """A row of `sealing_keys`: a key by which values of the database may be sealed."""

    __tablename__ = "sealing_keys"

    id: Mapped[int] = mapped_column(Integer, primary_key=True, autoincrement=False)
    """The number of the key; the key itself is never stored."""
    cluster_id: Mapped[int] = mapped_column(BigInteger)
    """The number of the cluster, to which the sealed values are bound."""
    proof: Mapped[str] = mapped_column(Text)
    """A known text that the key has sealed, by which another key of this number is noticed."""
    is_complete: Mapped[int] = mapped_column(Integer, server_default="0")
    """1 if no value in clear was left when the key was added, or at the end of a rotation."""
    sealed_fields: Mapped[str] = mapped_column(Text, server_default="")
    """The optional fields that are sealed; see `sealing`."""
    added_at: Mapped[datetime] = mapped_column(UtcTime)


class OutgoingRow(Base):
    """A row of `outgoing`: tasks that have left for another cluster, until they have arrived."""

    __tablename__ = "outgoing"

    batch: Mapped[str] = mapped_column(String(32), primary_key=True)
    target: Mapped[int] = mapped_column(BigInteger)
    """The number of the other cluster."""
    tasks: Mapped[str] = mapped_column(SealableText("outgoing", "tasks"))
    """The tasks and their changes as JSON."""
    number: Mapped[int] = mapped_column(Integer)
    """Number of the tasks."""
    left_at: Mapped[datetime] = mapped_column(UtcTime)


class IncomingRow(Base):
    """A row of `incoming`: tasks that have arrived, until the other cluster knows."""

    __tablename__ = "incoming"

    batch: Mapped[str] = mapped_column(String(32), primary_key=True)
    source: Mapped[int] = mapped_column(BigInteger)
    """The number of the other cluster."""
    refused: Mapped[str] = mapped_column(Text)
    """JSON: the reason for each task that has to return."""
    arrived_at: Mapped[datetime] = mapped_column(UtcTime)


class DecisionRow(Base):
    """A row of `decisions`: a transaction over several databases that has committed.

    It is removed when all of them have committed.
    """

    __tablename__ = "decisions"

    decision: Mapped[str] = mapped_column(String(32), primary_key=True)
    participants: Mapped[str] = mapped_column(Text)
    """JSON: the numbers of the other clusters."""
    decided_at: Mapped[datetime] = mapped_column(UtcTime)


class CounterRow(Base):
    """The one row of `counters`; its lock on PostgreSQL is the write lock.

    Commits do not update the row: PostgreSQL would read all its former versions while any session
    holds an old snapshot.
    """

    __tablename__ = "counters"
    __table_args__ = (CheckConstraint("id = 1", name="one_row"),)

    id: Mapped[int] = mapped_column(Integer, primary_key=True, autoincrement=False)
    beat: Mapped[int] = mapped_column(BigInteger, server_default="0")
    """The last heartbeat sequence number when a node was last removed."""
    compacted: Mapped[int] = mapped_column(BigInteger, server_default="0")
    """The revision up to which changes were removed from the feed."""
    cluster_id: Mapped[int] = mapped_column(
        BigInteger, server_default="0", default=partial(randbits, 62)
    )
    """A random number, which identifies the cluster whatever its name is, and never changes."""
    revision: Mapped[int] = column_property(
        func.coalesce(
            select(func.max(ChangeRow.revision)).correlate(None).scalar_subquery(), compacted
        )
    )
    """The last revision: that of the newest change."""
    heartbeats: Mapped[int] = column_property(
        func.coalesce(
            select(func.max(NodeRow.beat))
            .where(NodeRow.beat > beat)
            .correlate_except(NodeRow)
            .scalar_subquery(),
            beat,
        )
    )
    """The last heartbeat sequence number: that of the newest heartbeat."""


UNVERSIONED: Final = frozenset({"beat", "progress", "passed_over_at"})
"""Columns that are no fields: heartbeats write them, without a new version."""

ROWS: Final[dict[type[Any], type[Base]]] = {Task: TaskRow, NodeInfo: NodeRow}
"""The declarative model of each domain class."""


def table_of(kind: type[Any]) -> Table:
    """Return the table of a domain class."""
    return Base.metadata.tables[ROWS[kind].__tablename__]
