"""The life cycle of a task, as pure functions: legal transitions and their effects.

    pending ──claim──▶ scheduled ──start──▶ running ──▶ completed, failed, cancelled, timeout
       ▲                   │                   │                       │
       └─── retry, lost ───┴───────────────────┘       requeue         │
       └───────────────────────────────────────────────────────────────┘

A live task may change to any status. A finished task may only become pending again, by `requeue`.
The caller passes the time and the records.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from datetime import datetime, timedelta
from functools import lru_cache
from operator import add
from typing import Any, Final, NamedTuple

import orjson

from openclaw_store.domain.backoff import Wait
from openclaw_store.domain.models import ASSIGNED, FINISHED, NodeInfo, NodeStatus, Task, TaskStatus
from openclaw_store.domain.records import Record
from openclaw_store.errors import ConflictError, InvalidTransitionError, NotOwnerError

Values = Mapping[str, Any]
"""New values of fields, by name."""

Owner = tuple[str | None, int]
"""The node of an assigned task, and the attempt for which it has the lease."""


class NodeDelta(NamedTuple):
    """An addition to the counters of a node, the effect of one or several transitions."""

    running: int = 0
    """Tasks that arrive; negative for tasks that leave."""
    successful: int = 0
    failed: int = 0
    """Attempts that ended."""
    seconds: float = 0.0
    """The total duration of these attempts."""

    def plus(self, other: NodeDelta) -> NodeDelta:
        """Return the effect of both."""
        return NodeDelta(*map(add, self, other))


class Step(NamedTuple):
    """The effect of a transition on a task and its node."""

    task: Values
    node: NodeDelta | None = None
    reason: str | None = None
    """The reason in the feed."""


Outcome = Step | ConflictError | None
"""A step, the error that forbids it, or `None` if the task is already in the wanted state."""

AssignedNode = Record[NodeInfo] | None
"""The node of an assigned task; `None` if the task is not assigned, or the node does not exist."""

Decision = Callable[[Record[Task], datetime], Outcome]
"""Decides on a transition of a task at a time."""

NODE_LOST: Final = "node lost"
"""Reason for releasing a task of a lost node."""

OVERDUE: Final = "ran for longer than its timeout"
"""Reason for ending an overdue attempt."""

TURNED_BACK: Final = "the clock was turned back"
"""Reason for correcting a time that lies too far in the future."""

_MOMENTS: Final = {
    TaskStatus.SCHEDULED: "scheduled_at",
    TaskStatus.RUNNING: "started_at",
    **dict.fromkeys(FINISHED, "completed_at"),
}
"""The field for the time of a status."""

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
"""Fields that a node keeps when it registers again."""

SET_BY_REGISTRATION: Final = ("running_tasks", "last_heartbeat", "version", *_TOTALS)
"""Fields that the store sets when a node registers."""


def illegal_transition(
    task_id: str, before: TaskStatus, after: TaskStatus
) -> InvalidTransitionError | None:
    """Return the error for an illegal transition, or `None`."""
    if before is after or before not in FINISHED:
        return None
    return InvalidTransitionError(task_id, before.value, after.value)


def missing_time(task: Record[Any], now: datetime) -> Values:
    """Return `now` as the time of a task's status, if the task has none."""
    name = _MOMENTS.get(task.status)
    return {name: _in_order(task, now)} if name is not None and getattr(task, name) is None else {}


def set_with_status(
    before: TaskStatus, task: Record[Any], now: datetime
) -> Values | InvalidTransitionError:
    """Return the values to set with the status of an updated task, or the refusal of the status.

    Args:
        before: The status before the update.
    """
    if before is task.status:
        return {}
    return illegal_transition(task.task_id, before, task.status) or missing_time(task, now)


def updated_node(known: Record[Any], node: Record[Any], now: datetime) -> Record[Any]:
    """Return a node that replaces `known`; its last heartbeat goes back only from the future."""
    before, after = known.last_heartbeat, node.last_heartbeat
    if before is None or (after is not None and after >= before):
        return node
    # A heartbeat from the future ends at `now`: the clock of another machine may be ahead.
    return node.evolve(last_heartbeat=min(before, now))


def is_due(task: Record[Task], now: datetime) -> bool:
    """Return whether a pending task may be claimed at this time."""
    not_before: datetime | None = task.not_before
    return not_before is None or not_before <= now


def has_skills(node: Record[NodeInfo], task: Record[Task]) -> bool:
    """Return whether a node has all skills that a task requires."""
    required = task.required_skills
    if type(required) is not bytes:  # decoded already, or empty
        required = task.encoded("required_skills")
    return are_among(required, node.encoded("available_skills"))


@lru_cache(maxsize=4096)
def are_among(required: bytes | None, available: bytes | None) -> bool:
    """Return whether one JSON list contains all texts of another; false for any other JSON."""
    try:
        lists = [orjson.loads(text or b"[]") for text in (required, available)]
    except orjson.JSONDecodeError:  # written by hand
        return False
    if not all(isinstance(one, list) and all(isinstance(it, str) for it in one) for one in lists):
        return False
    return set(lists[0]) <= set(lists[1])


def free_slots(node: Record[NodeInfo]) -> int:
    """Return the number of tasks that a node may still claim."""
    if node.status is not NodeStatus.ONLINE:
        return 0
    free: int = node.max_concurrent_tasks - node.running_tasks
    return max(0, free)


def owner_of(task: Record[Task]) -> Owner:
    """Return the node and the attempt of a task's last claim."""
    return task.assigned_node, task.attempt


def is_assigned(task: Record[Task]) -> bool:
    """Return whether a task occupies a slot of a node."""
    return task.assigned_node is not None and task.status in ASSIGNED


def is_lost(node: AssignedNode, now: datetime, patience: timedelta) -> bool:
    """Return whether the tasks of a node must be released."""
    if node is None or node.status in (NodeStatus.OFFLINE, NodeStatus.ERROR):
        return True
    return is_silent(node, now, patience)


def is_silent(node: Record[NodeInfo], now: datetime, patience: timedelta) -> bool:
    """Return whether the last heartbeat (or the registration) of a node is too old."""
    last_sign: datetime = node.last_heartbeat or node.registered_at
    # A heartbeat far in the future counts as old: the clock was turned back since, by an unknown
    # time. Without `abs`, the node would pass for alive until the clock has caught up.
    return abs(now - last_sign) > patience


def is_overdue(task: Record[Task], now: datetime) -> bool:
    """Return whether a running task has exceeded its timeout."""
    if task.status is not TaskStatus.RUNNING or None in (task.timeout, task.started_at):
        return False
    limit: int = task.timeout
    started: datetime = task.started_at
    # `_in_order` may have moved the start into the future; `updated_at` is the real time then.
    began = min(started, task.updated_at or started)
    # As in `is_silent`, the clock may have been turned back since.
    return abs((now - began).total_seconds()) > limit


def is_delayed(task: Record[Task], now: datetime, longest: timedelta) -> bool:
    """Return whether the retry of a task is due later than any backoff allows.

    This happens when the clock was turned back after the task had failed.
    """
    if task.status is not TaskStatus.PENDING or is_due(task, now) or not task.retry_count:
        return False
    failed: datetime | None = task.updated_at
    return failed is not None and failed - now > longest


def claim(task: Record[Task], node: Record[NodeInfo], now: datetime) -> Step | None:
    """Assign a pending task to a node; `None` if the node may not run it now.

    PostgreSQL's function `store_write` repeats this rule.
    """
    if task.status is not TaskStatus.PENDING or not is_due(task, now):
        return None
    if not free_slots(node) or not has_skills(node, task):
        return None
    return Step(
        {
            **_UNASSIGNED,
            "status": TaskStatus.SCHEDULED,
            "assigned_node": node.node_id,
            "attempt": task.attempt + 1,
            "scheduled_at": _in_order(task, now),
        },
        NodeDelta(running=1),
    )


def start(task: Record[Task], now: datetime, *, owner: Owner) -> Outcome:
    """Start a task; idempotent for its owner."""
    if task.status is TaskStatus.RUNNING and owner == owner_of(task):
        return None
    # The lease is checked last, so a repeated call succeeds after its answer was lost.
    values = {"status": TaskStatus.RUNNING, "started_at": _in_order(task, now)}
    return _not_owned(task, owner) or Step(values)


def complete(task: Record[Task], now: datetime, *, owner: Owner, result: bytes | None) -> Outcome:
    """Complete a task with a result in JSON; idempotent for its owner."""
    if task.status is TaskStatus.COMPLETED and owner == owner_of(task):
        return None
    return _not_owned(task, owner) or Step(
        _ended(task, TaskStatus.COMPLETED, now, result=result, error=None),
        _ended_attempt(task, now, successful=1),
    )


def fail(task: Record[Task], now: datetime, *, owner: Owner, error: str, wait: Wait) -> Outcome:
    """Retry a task after `wait`, or end it as FAILED after its last retry; idempotent."""
    if task.status is TaskStatus.FAILED and owner == owner_of(task):
        return None
    return _not_owned(task, owner) or _failed(task, now, TaskStatus.FAILED, error, wait)


def cancel(
    task: Record[Task],
    now: datetime,
    *,
    reason: str | None,
    version: int | None = None,
) -> Outcome:
    """Cancel a task; idempotent.

    Args:
        reason: Becomes the error of the task.
        version: Cancel only this version; `None` for any.
    """
    if task.status is TaskStatus.CANCELLED or version not in (None, task.version):
        return None
    values = {} if reason is None else {"error": reason}
    return illegal_transition(task.task_id, task.status, TaskStatus.CANCELLED) or Step(
        _ended(task, TaskStatus.CANCELLED, now, **values), _released(task), reason
    )


def requeue(task: Record[Task], now: datetime) -> Outcome:
    """Make a task pending again, with all its retries; idempotent."""
    if task.status is TaskStatus.PENDING:
        return None
    # `attempt` is not reset: an earlier owner must not pass for the next one.
    values = {"retry_count": 0, "not_before": None, "result": None, "error": None}
    return Step({**_UNASSIGNED, **values}, _released(task), "requeued")


def release(task: Record[Task], now: datetime, *, wait: Wait) -> Outcome:
    """Retry an assigned task of a lost node, or end it as FAILED after its last retry."""
    if not is_assigned(task):
        return None
    return _failed(task, now, TaskStatus.FAILED, NODE_LOST, wait)


def recover(
    task: Record[Task],
    now: datetime,
    *,
    node: AssignedNode,
    patience: timedelta,
    longest_wait: timedelta,
    wait: Wait,
) -> Outcome:
    """Release a task of a lost node, end an overdue attempt, or make a delayed retry due."""
    if is_assigned(task) and is_lost(node, now, patience):
        return release(task, now, wait=wait)
    if is_delayed(task, now, longest_wait):
        return Step({"not_before": None}, reason=TURNED_BACK)
    if not is_overdue(task, now):
        return None
    return _failed(task, now, TaskStatus.TIMEOUT, OVERDUE, wait)


def registered(known: Record[NodeInfo] | None, now: datetime) -> Values:
    """Return the values of a node that registers; its process has no tasks.

    Args:
        known: The node before, which keeps its totals; `None` for a new node.
    """
    values: dict[str, Any] = {"running_tasks": 0, "last_heartbeat": now}
    if known is not None:
        values |= {name: getattr(known, name) for name in _TOTALS}
    return values


def counted(node: Record[NodeInfo], delta: NodeDelta) -> Values:
    """Return the counters of a node after `delta`.

    PostgreSQL's function `store_write` repeats this rule.
    """
    values: dict[str, Any] = {"running_tasks": max(0, node.running_tasks + delta.running)}
    attempts = delta.successful + delta.failed
    if attempts:
        total: int = node.total_tasks_processed + attempts
        mean: float = node.average_execution_time
        values |= {
            "total_tasks_processed": total,
            "successful_tasks": node.successful_tasks + delta.successful,
            "failed_tasks": node.failed_tasks + delta.failed,
            "average_execution_time": mean + (delta.seconds - attempts * mean) / total,
        }
    return values


def _released(task: Record[Task]) -> NodeDelta | None:
    """Return the effect on its node if a task leaves it; `None` if it is not assigned."""
    return NodeDelta(running=-1) if is_assigned(task) else None


def _not_owned(task: Record[Task], owner: Owner) -> NotOwnerError | None:
    # The attempt must match too: a node may have lost the task and claimed it again.
    if task.status in ASSIGNED and owner == owner_of(task):
        return None
    return NotOwnerError(task.task_id, *owner, task.status.value, *owner_of(task))


def _in_order(task: Record[Any], now: datetime) -> datetime:
    """Return `now`, or the latest earlier time of the task if the clock was turned back.

    The times of a task so keep their order, but may lie in the future; `updated_at` does not.
    """
    before = (task.submitted_at, task.scheduled_at, task.started_at)
    return max((moment for moment in before if moment is not None and moment > now), default=now)


def _ended(task: Record[Task], status: TaskStatus, now: datetime, **values: Any) -> Values:
    return {"status": status, "completed_at": _in_order(task, now), **values}


def _failed(
    task: Record[Task],
    now: datetime,
    status: TaskStatus,
    error: str,
    wait: Wait,
) -> Step:
    """Retry a task after a failed attempt, or end it with `status` after its last retry."""
    retry: int = task.retry_count + 1
    if retry > task.max_retries:
        values = _ended(task, status, now, error=error)
    else:
        seconds = wait(retry)
        values = {
            **_UNASSIGNED,
            "retry_count": retry,
            "not_before": now + timedelta(seconds=seconds) if seconds else None,
            "error": error,
        }
    return Step(values, _ended_attempt(task, now, failed=1), error)


def _ended_attempt(
    task: Record[Task], now: datetime, successful: int = 0, failed: int = 0
) -> NodeDelta | None:
    """Return the effect of the end of an attempt, which lasted from its start, or its claim."""
    if not is_assigned(task):
        return None
    began: datetime = task.started_at or task.scheduled_at or now
    return NodeDelta(-1, successful, failed, max(0.0, (now - began).total_seconds()))
