"""The domain: tasks, nodes and the picture of a cluster, as plain dataclasses.

They carry no database state, so they copy, compare, pickle and `dataclasses.replace` freely.
Times are aware and in UTC inside the store; a naive one is read as local time when it is
written. What a field may hold is checked when it is written, not when it is assigned.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from datetime import datetime
from enum import IntEnum, StrEnum
from typing import Any, Self

from openclaw_store.domain.clock import new_id, utc_now
from openclaw_store.domain.serialization import JsonCheck, read_dict, to_dict
from openclaw_store.domain.validation import (
    Check,
    check_count,
    check_enum,
    check_id,
    check_key,
    check_number,
    check_percentage,
    check_text,
    check_time,
    check_version,
    encode_json,
    encode_object,
    encode_texts,
)
from openclaw_store.errors import InvalidDataError, safe_repr


class TaskType(StrEnum):
    """What kind of work a task is."""

    INTERACTIVE = "interactive"
    BATCH = "batch"
    COMPUTE_INTENSIVE = "compute_intensive"
    IO_INTENSIVE = "io_intensive"
    DAEMON = "daemon"


class TaskStatus(StrEnum):
    """Where a task stands."""

    PENDING = "pending"
    SCHEDULED = "scheduled"
    RUNNING = "running"
    COMPLETED = "completed"
    FAILED = "failed"
    CANCELLED = "cancelled"
    TIMEOUT = "timeout"


WAITING = frozenset({TaskStatus.PENDING, TaskStatus.SCHEDULED})
"""The states of tasks that wait to be run."""

ASSIGNED = frozenset({TaskStatus.SCHEDULED, TaskStatus.RUNNING})
"""The states in which a task takes up a place on its node."""

LIVE = WAITING | ASSIGNED
"""The states of tasks that are not done."""

FINISHED = frozenset(
    {TaskStatus.COMPLETED, TaskStatus.FAILED, TaskStatus.CANCELLED, TaskStatus.TIMEOUT}
)
"""The states in which a task is done."""


class TaskPriority(IntEnum):
    """How urgent a task is; the smaller number goes first."""

    CRITICAL = 0
    HIGH = 1
    NORMAL = 2
    LOW = 3


class NodeStatus(StrEnum):
    """Whether a node takes part in the cluster."""

    ONLINE = "online"
    OFFLINE = "offline"
    BUSY = "busy"
    MAINTENANCE = "maintenance"
    ERROR = "error"


ALIVE = frozenset({NodeStatus.ONLINE, NodeStatus.BUSY})
"""The states in which a node is expected to send heartbeats."""


@dataclass
class Task:
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
    """Identifier of a node; it need not exist."""
    attempt: int = 0
    """How often it was claimed. With `assigned_node` it tells who may finish the task."""
    submitted_at: datetime | None = None
    """Filled in with the present moment when the task is added without it."""
    scheduled_at: datetime | None = None
    started_at: datetime | None = None
    completed_at: datetime | None = None
    not_before: datetime | None = None
    """When it may be claimed; `None` for at once."""
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
    """Of the live tasks, one at most has this key."""
    affinity_tags: list[str] | None = None
    metadata: dict[str, Any] = field(default_factory=dict)
    updated_at: datetime | None = None
    """When the store last wrote the task; set by the store."""
    version: int = 0
    """Grows with every change of this task; set by the store, 0 until then, negative while the
    newest content is only in memory (`persist=False`)."""

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
        user_id: str | None = None,
        idempotency_key: str | None = None,
        not_before: datetime | None = None,
        affinity_tags: Iterable[str] | None = None,
        metadata: Mapping[str, Any] | None = None,
        submitted_at: datetime | None = None,
    ) -> Task:
        """A new pending task with an identifier of its own, submitted now.

        Args:
            task_id: An identifier of the caller's; `None` makes one that sorts by time.
            timeout: Seconds the task may run; `None` for no limit.
            idempotency_key: Of the live tasks, one at most may have this key.
            not_before: When it may be claimed; `None` for at once.
            submitted_at: `None` for the present moment, by the system's clock; with a clock of
                your own, pass its time.

        Raises:
            InvalidDataError: If a list of text is given as one text, which is a list of letters, or
                something is no list, or no mapping, at all.
        """
        return cls(
            task_id=new_id() if task_id is None else task_id,
            task_type=task_type,
            name=name,
            description=description,
            required_skills=_listed("required_skills", required_skills),
            optional_skills=_listed("optional_skills", optional_skills)
            if optional_skills is not None
            else None,
            priority=priority,
            submitted_at=utc_now() if submitted_at is None else submitted_at,
            parameters=_mapped("parameters", parameters),
            timeout=timeout,
            max_retries=max_retries,
            user_id=user_id,
            idempotency_key=idempotency_key,
            not_before=not_before,
            affinity_tags=_listed("affinity_tags", affinity_tags)
            if affinity_tags is not None
            else None,
            metadata=_mapped("metadata", metadata),
        )

    def to_dict(self) -> dict[str, Any]:
        """All fields as plain JSON values of the caller's own: enums by value, times in UTC.

        Times are ISO 8601 with microseconds and a Z, `2026-03-01T12:00:00.000000Z`, which sort as
        text; a naive one is read as local time.

        Raises:
            InvalidDataError: If a field holds what the store would refuse.
        """
        return to_dict(self, Task, FIELD_CHECKS[Task], JSON_CHECKS)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Self:
        """A task of what `to_dict` gave, or somebody else sent.

        Args:
            data: Values by field. A missing one is the field's default, an unknown one ignored; a
                time without a zone is local.

        Raises:
            InvalidDataError: Naming the field that the store would refuse, or that is missing.
        """
        return cls(**read_dict(data, Task, FIELD_CHECKS[Task], JSON_CHECKS))


def _listed(name: str, values: Iterable[str]) -> list[str]:
    if isinstance(values, str):
        raise InvalidDataError(name, f"must be a list of text, not the text {safe_repr(values)}")
    if not isinstance(values, Iterable):
        raise InvalidDataError(name, f"must be a list of text, not {type(values).__name__}")
    return list(values)


def _mapped(name: str, values: Mapping[str, Any] | None) -> dict[str, Any]:
    if values is None:
        return {}
    if not isinstance(values, Mapping):
        raise InvalidDataError(name, f"must be a dict, not {type(values).__name__}")
    return dict(values)


@dataclass
class NodeInfo:
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
    """Filled in with the present moment when the node is added without it."""
    last_heartbeat: datetime | None = None
    """`None` for a node that never sent one."""
    tags: list[str] = field(default_factory=list)
    version: int = 0
    """Grows with every change of this node, heartbeats aside; set by the store, 0 until then,
    negative while the newest content is only in memory (`persist=False`)."""

    def to_dict(self) -> dict[str, Any]:
        """All fields as plain JSON values of the caller's own; see `Task.to_dict`.

        Raises:
            InvalidDataError: If a field holds what the store would refuse.
        """
        return to_dict(self, NodeInfo, FIELD_CHECKS[NodeInfo], JSON_CHECKS)

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Self:
        """A node of what `to_dict` gave, or somebody else sent; see `Task.from_dict`.

        Raises:
            InvalidDataError: Naming the field that the store would refuse, or that is missing.
        """
        return cls(**read_dict(data, NodeInfo, FIELD_CHECKS[NodeInfo], JSON_CHECKS))


@dataclass(frozen=True)
class ClusterState:
    """The cluster at one moment: it does not change when the cluster does.

    `nodes` and `tasks` are read-only mappings by identifier. They make a copy of an entry when
    it is looked at, so a picture of 100,000 tasks costs nothing until it is read; pickling and
    `dataclasses.asdict` turn them into real dicts.
    """

    version: int
    """Revision of the newest change in the picture."""
    updated_at: datetime | None
    """When that change was made; `None` when nothing was ever changed."""
    nodes: Mapping[str, NodeInfo]
    tasks: Mapping[str, Task]
    """The live tasks: pending, scheduled and running."""
    total_nodes: int
    """All nodes in the database; entries that are only in memory do not count."""
    online_nodes: int
    total_tasks: int
    """All tasks in the database, finished ones included."""
    running_tasks: int


FIELD_CHECKS: Mapping[type[Any], Mapping[str, Check]] = {
    Task: {
        "task_id": check_id,
        "task_type": check_enum(TaskType),
        "name": check_text,
        "description": check_text,
        "status": check_enum(TaskStatus),
        "priority": check_enum(TaskPriority),
        "assigned_node": check_key,
        "attempt": check_count,
        "submitted_at": check_time,
        "scheduled_at": check_time,
        "started_at": check_time,
        "completed_at": check_time,
        "not_before": check_time,
        "timeout": check_count,
        "retry_count": check_count,
        "max_retries": check_count,
        "error": check_text,
        "user_id": check_key,
        "idempotency_key": check_id,
        "updated_at": check_time,
        "version": check_version,
    },
    NodeInfo: {
        "node_id": check_id,
        "hostname": check_text,
        "platform": check_text,
        "arch": check_text,
        "status": check_enum(NodeStatus),
        "cpu_usage": check_percentage,
        "memory_usage": check_percentage,
        "disk_usage": check_percentage,
        "max_concurrent_tasks": check_count,
        "running_tasks": check_count,
        "ip_address": check_text,
        "tailscale_ip": check_text,
        "port": check_count,
        "total_tasks_processed": check_count,
        "successful_tasks": check_count,
        "failed_tasks": check_count,
        "average_execution_time": check_number,
        "registered_at": check_time,
        "last_heartbeat": check_time,
        "version": check_version,
    },
}
"""What the fields may hold, those of JSON aside."""

JSON_CHECKS: Mapping[str, JsonCheck] = {
    "required_skills": encode_texts,
    "optional_skills": encode_texts,
    "parameters": encode_object,
    "result": encode_json,
    "affinity_tags": encode_texts,
    "metadata": encode_object,
    "available_skills": encode_texts,
    "tags": encode_texts,
}
"""What fields of JSON may hold; gives the text of it."""
