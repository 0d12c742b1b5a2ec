"""Models: tasks, nodes and the state of a cluster, as plain dataclasses.

They carry no database state, so they can be copied, compared, pickled and passed to
`dataclasses.replace`. Values are checked when they are written, not when they are assigned. Times
in the store are aware and in UTC; a naive time is read as local time.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from datetime import datetime
from enum import IntEnum, StrEnum
from typing import Any, Self

from openclaw_store.domain.clock import new_id, utc_now
from openclaw_store.domain.serialization import BriefRepr, JsonCheck, read_dict, to_dict
from openclaw_store.domain.validation import (
    Check,
    check_count,
    check_enum,
    check_id,
    check_key,
    check_limit_seconds,
    check_number,
    check_optional_count,
    check_percentage,
    check_text,
    check_time,
    check_traceparent,
    check_version,
    encode_json,
    encode_object,
    encode_texts,
)
from openclaw_store.errors import InvalidDataError, safe_repr


class TaskType(StrEnum):
    """The kind of work of a task."""

    INTERACTIVE = "interactive"
    BATCH = "batch"
    COMPUTE_INTENSIVE = "compute_intensive"
    IO_INTENSIVE = "io_intensive"
    DAEMON = "daemon"


class TaskStatus(StrEnum):
    """The status of a task."""

    PENDING = "pending"
    SCHEDULED = "scheduled"
    RUNNING = "running"
    COMPLETED = "completed"
    FAILED = "failed"
    CANCELLED = "cancelled"
    TIMEOUT = "timeout"


WAITING = frozenset({TaskStatus.PENDING, TaskStatus.SCHEDULED})
"""Statuses of a task that has not started."""

ASSIGNED = frozenset({TaskStatus.SCHEDULED, TaskStatus.RUNNING})
"""Statuses in which a task occupies a slot of its node."""

LIVE = WAITING | ASSIGNED
"""Statuses of an unfinished task."""

FINISHED = frozenset(
    {TaskStatus.COMPLETED, TaskStatus.FAILED, TaskStatus.CANCELLED, TaskStatus.TIMEOUT}
)
"""Statuses of a finished task."""


class TaskPriority(IntEnum):
    """The urgency of a task; smaller numbers come first."""

    CRITICAL = 0
    HIGH = 1
    NORMAL = 2
    LOW = 3


class NodeStatus(StrEnum):
    """The status of a node."""

    ONLINE = "online"
    OFFLINE = "offline"
    BUSY = "busy"
    MAINTENANCE = "maintenance"
    ERROR = "error"


ALIVE = frozenset({NodeStatus.ONLINE, NodeStatus.BUSY})
"""Statuses in which a node must send heartbeats."""


@dataclass(repr=False)
class Task(BriefRepr):
    """A unit of work submitted to the cluster."""

    task_id: str
    task_type: TaskType
    name: str
    description: str = ""
    required_skills: list[str] = field(default_factory=list)
    optional_skills: list[str] | None = None
    status: TaskStatus = TaskStatus.PENDING
    priority: TaskPriority = TaskPriority.NORMAL
    assigned_node: str | None = None
    """Identifier of a node, which need not exist."""
    attempt: int = 0
    """Number of claims. Together with `assigned_node` it identifies the owner of the task."""
    submitted_at: datetime | None = None
    """Set to the present moment if the task is added without it."""
    scheduled_at: datetime | None = None
    started_at: datetime | None = None
    completed_at: datetime | None = None
    not_before: datetime | None = None
    """Earliest time of a claim; `None` for no limit."""
    parameters: dict[str, Any] = field(default_factory=dict)
    timeout: int | None = None
    """Seconds the task may run; `None` for no limit."""
    retry_count: int = 0
    max_retries: int = 3
    result: Any = None
    """Any JSON value."""
    error: str | None = None
    user_id: str | None = None
    idempotency_key: str | None = None
    """At most one live task has a given key."""
    affinity_tags: list[str] | None = None
    metadata: dict[str, Any] = field(default_factory=dict)
    losses: int = 0
    """Number of attempts that ended because their node was lost, or registered again."""
    max_losses: int | None = 10
    """Losses after which the task is FAILED; `None` for no limit."""
    expires_at: datetime | None = None
    """The task is not handed out from this time on; `None` for no limit."""
    cancel_requested_at: datetime | None = None
    """Time at which the owner of the running task was asked to cancel it."""
    cancel_deadline_at: datetime | None = None
    """Time at which `recover` cancels the task if its owner has not done so."""
    traceparent: str | None = None
    """The span of its submitter, as the header of W3C Trace Context."""
    updated_at: datetime | None = None
    """Time of the last write, set by the store."""
    version: int = 0
    """Revision of the last change of the task, set by the store; 0 before the first write, and
    negative while the newest content is only in memory (`persist=False`)."""

    @classmethod
    def create(
        cls,
        task_type: TaskType,
        name: str,
        description: str = "",
        required_skills: Iterable[str] = (),
        *,
        task_id: str | None = None,
        optional_skills: Iterable[str] | None = None,
        priority: TaskPriority = TaskPriority.NORMAL,
        parameters: Mapping[str, Any] | None = None,
        timeout: int | None = None,
        max_retries: int = 3,
        max_losses: int | None = 10,
        user_id: str | None = None,
        idempotency_key: str | None = None,
        not_before: datetime | None = None,
        expires_at: datetime | None = None,
        affinity_tags: Iterable[str] | None = None,
        metadata: Mapping[str, Any] | None = None,
        traceparent: str | None = None,
        submitted_at: datetime | None = None,
        **fields: Any,
    ) -> Task:
        """Return a new task, which is pending unless `status` says otherwise.

        Args:
            required_skills: Skills that a node must have, all of them, to get the task.
            task_id: `None` for a new identifier, which sorts by time.
            optional_skills, affinity_tags: Skills and tags of the nodes that should get it first.
            priority: CRITICAL, HIGH, NORMAL or LOW; the more urgent task is claimed first.
            parameters, metadata: JSON values by name; the store does not read them.
            timeout: Seconds the task may run; `None` for no limit.
            max_retries: Failed attempts after which it is tried again.
            max_losses: Lost attempts after which it is tried again; `None` for no limit.
            idempotency_key: At most one live task has a given key; see `submit_task`.
            not_before: Earliest time of a claim; `None` for no limit.
            expires_at: The task is not handed out from this time on; `None` for no limit.
            submitted_at: `None` for the present moment of the system's clock; pass the time if
                the store has a clock of your own.
            fields: Any other field of `Task`, such as `status` or `result`.

        Raises:
            InvalidDataError: If an argument has the wrong type, such as a text for a list of text.
        """
        return cls(
            task_id=new_id() if task_id is None else task_id,
            task_type=task_type,
            name=name,
            description=description,
            required_skills=_list("required_skills", required_skills),
            optional_skills=_optional_list("optional_skills", optional_skills),
            priority=priority,
            submitted_at=utc_now() if submitted_at is None else submitted_at,
            parameters=_dict("parameters", parameters),
            timeout=timeout,
            max_retries=max_retries,
            max_losses=max_losses,
            user_id=user_id,
            idempotency_key=idempotency_key,
            not_before=not_before,
            expires_at=expires_at,
            affinity_tags=_optional_list("affinity_tags", affinity_tags),
            metadata=_dict("metadata", metadata),
            traceparent=traceparent,
            **fields,
        )

    def to_dict(self) -> dict[str, Any]:
        """Return all fields as plain JSON values, which share nothing with the task.

        Enumerations are their values. Times are ISO 8601 in UTC, with microseconds:
        `2026-03-01T12:00:00.000000Z` sorts as text; a naive time is read as local time.

        Raises:
            InvalidDataError: If the store would refuse a field.
        """
        return to_dict(self, Task, FIELD_CHECKS[Task], JSON_CHECKS)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any], strict: bool = False) -> Self:
        """Return a task made from a dict, as from `to_dict`.

        Args:
            data: Values by field. Missing fields get their defaults, unknown fields are ignored; a
                time without a zone is local.
            strict: `True` refuses unknown fields, and the ones that only the store sets: `version`
                and `updated_at`. Use it for the data of a client.

        Raises:
            InvalidDataError: If the store would refuse a field, or a required field is missing.
        """
        return cls(**read_dict(data, Task, FIELD_CHECKS[Task], JSON_CHECKS, strict=strict))


def _list(name: str, values: Iterable[str]) -> list[str]:
    if isinstance(values, str):
        raise InvalidDataError(name, f"must be a list of text, not the text {safe_repr(values)}")
    if not isinstance(values, Iterable):
        raise InvalidDataError(name, f"must be a list of text, not {type(values).__name__}")
    return list(values)


def _optional_list(name: str, values: Iterable[str] | None) -> list[str] | None:
    return None if values is None else _list(name, values)


def _dict(name: str, values: Mapping[str, Any] | None) -> dict[str, Any]:
    if values is None:
        return {}
    if not isinstance(values, Mapping):
        raise InvalidDataError(name, f"must be a dict, not {type(values).__name__}")
    return dict(values)


@dataclass(repr=False)
class NodeInfo(BriefRepr):
    """A machine that runs tasks."""

    node_id: str
    hostname: str
    platform: str = ""
    arch: str = ""
    status: NodeStatus = NodeStatus.ONLINE
    cpu_usage: float = 0.0
    """Percent, 0 to 100."""
    memory_usage: float = 0.0
    """Percent, 0 to 100."""
    disk_usage: float = 0.0
    """Percent, 0 to 100."""
    available_skills: list[str] = field(default_factory=list)
    max_concurrent_tasks: int = 5
    running_tasks: int = 0
    ip_address: str = ""
    tailscale_ip: str = ""
    port: int = 18789
    total_tasks_processed: int = 0
    successful_tasks: int = 0
    failed_tasks: int = 0
    average_execution_time: float = 0.0
    """Seconds."""
    registered_at: datetime | None = None
    """Set to the present moment if the node is added without it."""
    last_heartbeat: datetime | None = None
    """`None` before the first heartbeat."""
    tags: list[str] = field(default_factory=list)
    lease_seconds: float | None = None
    """Seconds without a heartbeat after which `recover` takes the node for lost; `None` for the
    timeout of the call."""
    status_reason: str | None = None
    """Reason for the present status, as given to `drain_node`."""
    session: str | None = None
    """Identifier of the worker that has registered the node; `None` for another process."""
    version: int = 0
    """Revision of the last change of the node, heartbeats aside; see `Task.version`."""

    def to_dict(self) -> dict[str, Any]:
        """Return all fields as plain JSON values; see `Task.to_dict`."""
        return to_dict(self, NodeInfo, FIELD_CHECKS[NodeInfo], JSON_CHECKS)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any], strict: bool = False) -> Self:
        """Return a node made from a dict; see `Task.from_dict`."""
        return cls(**read_dict(data, NodeInfo, FIELD_CHECKS[NodeInfo], JSON_CHECKS, strict=strict))


@dataclass(frozen=True)
class ClusterState:
    """A snapshot of the cluster.

    `nodes` and `tasks` are read-only mappings by identifier. They copy an entry when it is read,
    so a snapshot of 100,000 tasks costs nothing by itself; pickling and `dataclasses.asdict` make
    them real dicts.
    """

    version: int
    """Revision of the newest change in the snapshot."""
    updated_at: datetime | None
    """Time of that change; `None` before the first one."""
    nodes: Mapping[str, NodeInfo]
    tasks: Mapping[str, Task]
    """The live tasks: pending, scheduled and running."""
    total_nodes: int
    """All nodes in the database, without entries that are only in memory."""
    online_nodes: int
    total_tasks: int
    """All tasks in the database, finished ones included."""
    running_tasks: int


FIELD_CHECKS: Mapping[type[Any], Mapping[str, Check]] = {
    Task: {
        **dict.fromkeys(("task_id", "idempotency_key"), check_id),
        **dict.fromkeys(("assigned_node", "user_id"), check_key),
        **dict.fromkeys(("name", "description", "error"), check_text),
        "task_type": check_enum(TaskType),
        "status": check_enum(TaskStatus),
        "priority": check_enum(TaskPriority),
        **dict.fromkeys(("attempt", "timeout", "retry_count", "max_retries"), check_count),
        "losses": check_count,
        "max_losses": check_optional_count,
        **dict.fromkeys(("submitted_at", "scheduled_at", "started_at"), check_time),
        **dict.fromkeys(("completed_at", "not_before", "updated_at"), check_time),
        **dict.fromkeys(("expires_at", "cancel_requested_at"), check_time),
        "cancel_deadline_at": check_time,
        "traceparent": check_traceparent,
        "version": check_version,
    },
    NodeInfo: {
        "node_id": check_id,
        **dict.fromkeys(("hostname", "platform", "arch"), check_text),
        **dict.fromkeys(("ip_address", "tailscale_ip"), check_text),
        "status": check_enum(NodeStatus),
        **dict.fromkeys(("cpu_usage", "memory_usage", "disk_usage"), check_percentage),
        **dict.fromkeys(("max_concurrent_tasks", "running_tasks", "port"), check_count),
        **dict.fromkeys(("total_tasks_processed", "successful_tasks", "failed_tasks"), check_count),
        "average_execution_time": check_number,
        **dict.fromkeys(("registered_at", "last_heartbeat"), check_time),
        "lease_seconds": check_limit_seconds,
        **dict.fromkeys(("status_reason", "session"), check_text),
        "version": check_version,
    },
}
"""Checks of the fields without JSON."""

JSON_CHECKS: Mapping[str, JsonCheck] = {
    **dict.fromkeys(("required_skills", "optional_skills", "affinity_tags"), encode_texts),
    **dict.fromkeys(("available_skills", "tags"), encode_texts),
    **dict.fromkeys(("parameters", "metadata"), encode_object),
    "result": encode_json,
}
"""Checks of the JSON fields, which return the JSON text."""
