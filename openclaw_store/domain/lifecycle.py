"""The life of a task, as pure functions: which changes are legal, and what each of them entails.

    pending ──claim──▶ scheduled ──start──▶ running ──▶ completed, failed, cancelled, timeout
       ▲                   │                   │                       │
       └─── retry, lost ───┴───────────────────┘       requeue         │
       └───────────────────────────────────────────────────────────────┘

A live task may change to any state. A finished one may only be put back to pending, by `requeue`.

Nothing here reads the clock, or knows where records come from.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from datetime import datetime, timedelta
from functools import lru_cache
from types import MappingProxyType
from typing import Any, Final, NamedTuple

import orjson

from openclaw_store.domain.backoff import Wait
from openclaw_store.domain.models import ASSIGNED, FINISHED, NodeInfo, NodeStatus, Task, TaskStatus
from openclaw_store.domain.records import Record
from openclaw_store.errors import (
    ConflictError,
    InvalidTransitionError,
    NotOwnerError,
)

Values = Mapping[str, Any]
"""New values of fields, by name."""


Owner = tuple[str | None, int]
"""A node and an attempt."""


class Step(NamedTuple):
    """What becomes of a task and of its node."""

    task: Values
    node: Values = MappingProxyType({})
    reason: str | None = None
    """Why, for the feed."""


Outcome = Step | ConflictError | None
"""A step; why it may not be taken; or `None`, when there is nothing to be done."""


Decision = Callable[[Record[Task], Record[NodeInfo] | None, datetime], Outcome]
"""Decides on a task; is given its node, if it is assigned to one that is known, and the moment."""


NODE_LOST: Final = "node lost"
"""The reason why a task was taken from a node that is not alive."""


OVERDUE: Final = "ran for longer than its timeout"
"""The reason why a task was taken from a node that is."""


TURNED_BACK: Final = "the clock was turned back"
"""The reason why a task is tried again sooner, or cleaned up earlier."""


_MOMENTS: Final = {
    TaskStatus.SCHEDULED: "scheduled_at",
    TaskStatus.RUNNING: "started_at",
    **dict.fromkeys(FINISHED, "completed_at"),
}
"""The field that tells when a task came into a state."""


_UNASSIGNED: Final[Values] = {
    "status": TaskStatus.PENDING,
    "assigned_node": None,
    "scheduled_at": None,
    "started_at": None,
    "completed_at": None,
}


_TOTALS: Final = (
    "registered_at",
    "total_tasks_processed",
    "successful_tasks",
    "failed_tasks",
    "average_execution_time",
)
"""What stays of a node that comes back."""


JOINED: Final = ("running_tasks", "last_heartbeat", "version", *_TOTALS)
"""What the store sets of a node that joins."""


def refused(task_id: str, before: TaskStatus, after: TaskStatus) -> InvalidTransitionError | None:
    """Why a task may not change from one state to another; `None` if it may."""
    if before is after or before not in FINISHED:
        return None
    return InvalidTransitionError(task_id, before.value, after.value)


def arrived(task: Record[Any], now: datetime) -> Values:
    """When a task came into the state it is in, if it does not tell."""
    name = _MOMENTS.get(task.status)
    return {name: _next(task, now)} if name is not None and getattr(task, name) is None else {}


def is_due(task: Record[Task], now: datetime) -> bool:
    """Whether a pending task may be claimed already."""
    not_before: datetime | None = task.not_before
    return not_before is None or not_before <= now


def has_skills(node: Record[NodeInfo], task: Record[Task]) -> bool:
    """Whether a node has all the skills that a task requires."""
    required = task.required_skills
    if type(required) is not bytes:  # decoded, or empty
        required = task.encoded("required_skills")
    return are_among(required, node.encoded("available_skills"))


@lru_cache(maxsize=4096)
def are_among(required: bytes | None, available: bytes | None) -> bool:
    """Whether all skills of one JSON list are in another; never, if one is no list of texts."""
    try:
        wanted, present = (orjson.loads(text or b"[]") for text in (required, available))
    except orjson.JSONDecodeError:  # somebody wrote it by hand
        return False
    both = (wanted, present)
    are_lists = all(
        isinstance(one, list) and all(isinstance(it, str) for it in one) for one in both
    )
    return are_lists and set(wanted) <= set(present)


def free_places(node: Record[NodeInfo]) -> int:
    """How many more tasks a node may claim."""
    if node.status is not NodeStatus.ONLINE:
        return 0
    free: int = node.max_concurrent_tasks - node.running_tasks
    return max(0, free)


def owner_of(task: Record[Task]) -> Owner:
    """For which node a task was claimed last, and at which attempt."""
    return task.assigned_node, task.attempt


def is_assigned(task: Record[Task]) -> bool:
    """Whether a task takes up a place on a node."""
    return task.assigned_node is not None and task.status in ASSIGNED


def is_lost(node: Record[NodeInfo] | None, now: datetime, patience: timedelta) -> bool:
    """Whether nothing more is to be expected from a node."""
    if node is None or node.status in (NodeStatus.OFFLINE, NodeStatus.ERROR):
        return True
    return is_silent(node, now, patience)


def is_silent(node: Record[NodeInfo], now: datetime, patience: timedelta) -> bool:
    """Whether a node has given no sign of life for longer than that; to register is one.

    One as far in the future is none: the clock was turned back since, and nobody knows when it was.
    """
    last_sign: datetime = node.last_heartbeat or node.registered_at
    return abs(now - last_sign) > patience


def is_overdue(task: Record[Task], now: datetime) -> bool:
    """Whether a running task has been running for longer than it may, whichever way clocks went."""
    if task.status is not TaskStatus.RUNNING or None in (task.timeout, task.started_at):
        return False
    limit: int = task.timeout
    started: datetime = task.started_at
    # Earlier only if `_next` has put its start off: the moment at which that was written.
    began = min(started, task.updated_at or started)
    return abs((now - began).total_seconds()) > limit


def is_put_off(task: Record[Task], now: datetime, longest: timedelta) -> bool:
    """Whether a clock that was turned back makes a task wait for its next try longer than ever."""
    if task.status is not TaskStatus.PENDING or is_due(task, now) or not task.retry_count:
        return False
    failed: datetime | None = task.updated_at
    return failed is not None and failed - now > longest


def claim(task: Record[Task], node: Record[NodeInfo], now: datetime) -> Step | None:
    """A node takes a pending task; `None` if it may not run it now."""
    if task.status is not TaskStatus.PENDING or not is_due(task, now):
        return None
    if not free_places(node) or not has_skills(node, task):
        return None
    return Step(
        {
            **_UNASSIGNED,
            "status": TaskStatus.SCHEDULED,
            "assigned_node": node.node_id,
            "attempt": task.attempt + 1,
            "scheduled_at": _next(task, now),
        },
        {"running_tasks": node.running_tasks + 1},
    )


def start(
    task: Record[Task], node: Record[NodeInfo] | None, now: datetime, *, owner: Owner
) -> Outcome:
    """The owner has begun to run the task; to say so twice changes nothing."""
    if task.status is TaskStatus.RUNNING and owner == owner_of(task):
        return None
    values = {"status": TaskStatus.RUNNING, "started_at": _next(task, now)}
    return _not_owned(task, owner) or Step(values)


def complete(
    task: Record[Task],
    node: Record[NodeInfo] | None,
    now: datetime,
    *,
    owner: Owner,
    result: bytes | None,
) -> Outcome:
    """The owner has completed the task; to say so twice changes nothing.

    Args:
        result: The text of a JSON value.
    """
    if task.status is TaskStatus.COMPLETED and owner == owner_of(task):
        return None
    return _not_owned(task, owner) or Step(
        _ended(task, TaskStatus.COMPLETED, now, result=result, error=None),
        _processed(node, task, now, "successful_tasks"),
    )


def fail(
    task: Record[Task],
    node: Record[NodeInfo] | None,
    now: datetime,
    *,
    owner: Owner,
    error: str,
    wait: Wait,
) -> Outcome:
    """The owner has failed: the task is tried again later, or has FAILED for good."""
    if task.status is TaskStatus.FAILED and owner == owner_of(task):
        return None
    return _not_owned(task, owner) or Step(
        _tried(task, TaskStatus.FAILED, error, now, wait),
        _processed(node, task, now, "failed_tasks"),
        error,
    )


def cancel(
    task: Record[Task],
    node: Record[NodeInfo] | None,
    now: datetime,
    *,
    reason: str | None,
    version: int | None = None,
) -> Outcome:
    """Somebody has no use for the task any more; to say so twice changes nothing.

    Args:
        reason: Why, if it is known.
        version: The only one that is meant; `None` for any.
    """
    if task.status is TaskStatus.CANCELLED or version not in (None, task.version):
        return None
    values = {} if reason is None else {"error": reason}
    return refused(task.task_id, task.status, TaskStatus.CANCELLED) or Step(
        _ended(task, TaskStatus.CANCELLED, now, **values), _freed(node, task), reason
    )


def requeue(task: Record[Task], node: Record[NodeInfo] | None, now: datetime) -> Outcome:
    """A task is to be run as if it never had been; one that is pending already stays as it is.

    Its attempts go on counting, so that nobody who held it before passes for its owner.
    """
    if task.status is TaskStatus.PENDING:
        return None
    values = {"retry_count": 0, "not_before": None, "result": None, "error": None}
    return Step({**_UNASSIGNED, **values}, _freed(node, task), "requeued")


def release(
    task: Record[Task], node: Record[NodeInfo] | None, now: datetime, *, wait: Wait
) -> Outcome:
    """What a node has held is lost: it is tried again later, or has FAILED for good."""
    if not is_assigned(task):
        return None
    return Step(
        _tried(task, TaskStatus.FAILED, NODE_LOST, now, wait),
        _processed(node, task, now, "failed_tasks"),
        NODE_LOST,
    )


def recover(
    task: Record[Task],
    node: Record[NodeInfo] | None,
    now: datetime,
    *,
    patience: timedelta,
    longest_wait: timedelta,
    wait: Wait,
) -> Outcome:
    """Take a task from a node that is not alive, or on which it runs for too long.

    One whose next try was put off by a clock that was turned back is due again.
    """
    if is_assigned(task) and is_lost(node, now, patience):
        return release(task, node, now, wait=wait)
    if is_put_off(task, now, longest_wait):
        return Step({"not_before": None}, reason=TURNED_BACK)
    if not is_overdue(task, now):
        return None
    return Step(
        _tried(task, TaskStatus.TIMEOUT, OVERDUE, now, wait),
        _processed(node, task, now, "failed_tasks"),
        OVERDUE,
    )


def joined(known: Record[NodeInfo] | None, now: datetime) -> Values:
    """A node joins, or comes back as a new process, which holds nothing; its totals go on.

    Args:
        known: The node as it was before; `None` if it is new.
    """
    values: dict[str, Any] = {"running_tasks": 0, "last_heartbeat": now}
    if known is not None:
        values |= {name: getattr(known, name) for name in _TOTALS}
    return values


def vacated(node: Record[NodeInfo]) -> Values:
    """The node has a place more."""
    return {"running_tasks": max(0, node.running_tasks - 1)}


def _freed(node: Record[NodeInfo] | None, task: Record[Task]) -> Values:
    """The node has a place more, if the task had taken one up."""
    return {} if node is None or not is_assigned(task) else vacated(node)


def _not_owned(task: Record[Task], owner: Owner) -> NotOwnerError | None:
    if task.status in ASSIGNED and owner == owner_of(task):
        return None
    return NotOwnerError(task.task_id, *owner, task.status.value, *owner_of(task))


def _next(task: Record[Any], now: datetime) -> datetime:
    """Now, but not before what has become of a task already, by a clock that was turned back.

    So it may be in the future, and does not tell how long ago that was: `updated_at` does.
    """
    before = (task.submitted_at, task.scheduled_at, task.started_at)
    return max((moment for moment in before if moment is not None and moment > now), default=now)


def _ended(task: Record[Task], status: TaskStatus, now: datetime, **values: Any) -> Values:
    return {"status": status, "completed_at": _next(task, now), **values}


def _tried(task: Record[Task], status: TaskStatus, error: str, now: datetime, wait: Wait) -> Values:
    """Put a task back to pending; after its last retry it ends as `status`."""
    retry: int = task.retry_count + 1
    if retry > task.max_retries:
        return _ended(task, status, now, error=error)
    seconds = wait(retry)
    return {
        **_UNASSIGNED,
        "retry_count": retry,
        "not_before": now + timedelta(seconds=seconds) if seconds else None,
        "error": error,
    }


def _processed(
    node: Record[NodeInfo] | None, task: Record[Task], now: datetime, outcome: str
) -> Values:
    """The node has tried a task, which counts in its totals: from its start, else its claim."""
    if node is None or not is_assigned(task):
        return {}
    total: int = node.total_tasks_processed + 1
    began: datetime = task.started_at or task.scheduled_at or now
    mean: float = node.average_execution_time
    seconds = max(0.0, (now - began).total_seconds())
    return {
        **_freed(node, task),
        "total_tasks_processed": total,
        outcome: getattr(node, outcome) + 1,
        "average_execution_time": mean + (seconds - mean) / total,
    }
