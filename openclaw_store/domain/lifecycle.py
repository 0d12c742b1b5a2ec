"""The life cycle of a task, as pure functions: legal transitions and their effects.

    pending ──claim──▶ scheduled ──start──▶ running ──▶ completed, failed, cancelled, timeout
       ▲                   │                   │                       │
       ├───── release ─────┴─── retry, loss ───┘       requeue         │
       └───────────────────────────────────────────────────────────────┘

A live task may change to any status. A finished task may only become pending again, by `requeue`.
A task that returns without having started has lost nothing: neither a retry, nor its place.
The caller passes the time and the records.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from datetime import datetime, timedelta
from operator import add
from typing import Any, Final, NamedTuple

from openclaw_store.domain.backoff import Wait
from openclaw_store.domain.conditions import (
    AssignedNode,
    is_assigned,
    is_beyond_backoff,
    is_cancel_overdue,
    is_expired,
    is_lost,
    is_overdue,
    is_unstarted,
    may_claim,
)
from openclaw_store.domain.models import (
    ASSIGNED,
    FINISHED,
    WAITING,
    NodeInfo,
    NodeStatus,
    Task,
    TaskStatus,
)
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

Decision = Callable[[Record[Task], datetime], Outcome]
"""Decides on a transition of a task at a time."""

NODE_LOST: Final = "node lost"
"""Reason for releasing a task of a lost node."""

LOST_TOO_OFTEN: Final = "lost too often"
"""Error of a task that is FAILED after its last loss."""

NEVER_STARTED: Final = "claimed, but not started"
"""Reason for releasing a task that a living node does not start."""

EXPIRED: Final = "expired before it was started"
"""Error of a task that was not started in time."""

CANCEL_REQUESTED: Final = "cancel requested"
"""Reason in the feed for asking the owner of a task to cancel it."""

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

_CANCEL_TIMES: Final = ("cancel_requested_at", "cancel_deadline_at")

_TOTALS: Final = (
    "registered_at",
    "total_tasks_processed",
    "successful_tasks",
    "failed_tasks",
    "average_execution_time",
)
"""Fields that a node keeps when it registers again."""

SET_BY_REGISTRATION: Final = (
    *("status", "status_reason", "running_tasks", "last_heartbeat", "version"),
    *_TOTALS,
)
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


def owner_of(task: Record[Task]) -> Owner:
    """Return the node and the attempt of a task's last claim."""
    return task.assigned_node, task.attempt


def claim(task: Record[Task], node: Record[NodeInfo], now: datetime) -> Step | None:
    """Assign a task to a node; `None` if the node may not claim it now.

    PostgreSQL's function `store_write` repeats this rule.
    """
    if not may_claim(node, task, now):
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
    return _not_owned(task, owner) or Step(started(task, now))


def started(task: Record[Task], now: datetime) -> Values:
    """Return the values of a task that starts."""
    return {"status": TaskStatus.RUNNING, "started_at": _in_order(task, now)}


def complete(task: Record[Task], now: datetime, *, owner: Owner, result: bytes | None) -> Outcome:
    """Complete a task with a result in JSON; idempotent for its owner."""
    if task.status is TaskStatus.COMPLETED and owner == owner_of(task):
        return None
    return _not_owned(task, owner) or Step(
        _ended(task, TaskStatus.COMPLETED, now, result=result, error=None),
        _ended_attempt(task, now, successful=1),
    )


def fail(
    task: Record[Task],
    now: datetime,
    *,
    owner: Owner,
    error: str,
    wait: Wait | None,
    status: TaskStatus = TaskStatus.FAILED,
) -> Outcome:
    """Retry a task after `wait`, or end it after its last retry; idempotent.

    Args:
        wait: `None` for no retry.
        status: The status at the end.
    """
    if task.status is status and owner == owner_of(task):
        return None
    return _not_owned(task, owner) or _failed(task, now, status, error, wait)


def cancel(
    task: Record[Task],
    now: datetime,
    *,
    reason: str | None,
    grace: timedelta | None = None,
) -> Outcome:
    """Cancel a task, or ask the owner of a running task to do so; idempotent.

    Args:
        reason: Becomes the error of the task.
        grace: Time that the owner of a running task has; `None` cancels at once.
    """
    if task.status is TaskStatus.CANCELLED:
        return None
    if refusal := illegal_transition(task.task_id, task.status, TaskStatus.CANCELLED):
        return refusal
    values = {} if reason is None else {"error": reason}
    if grace is None or task.status is not TaskStatus.RUNNING:
        return _cancelled(task, now, reason, **values)
    if task.cancel_requested_at is not None:
        return None
    times = {"cancel_requested_at": now, "cancel_deadline_at": now + grace}
    return Step({**times, **values}, reason=CANCEL_REQUESTED if reason is None else reason)


def acknowledge_cancel(task: Record[Task], now: datetime, *, owner: Owner) -> Outcome:
    """Cancel a task after its owner was asked to, and has ended the work; idempotent."""
    if task.status is TaskStatus.CANCELLED and owner == owner_of(task):
        return None
    if refusal := _not_owned(task, owner):
        return refusal
    if task.cancel_requested_at is None:
        status, cancelled = task.status.value, TaskStatus.CANCELLED.value
        return InvalidTransitionError(task.task_id, status, cancelled)
    return _cancelled(task, now, task.error)


def give_back(task: Record[Task], now: datetime, *, owner: Owner, reason: str | None) -> Outcome:
    """Make a task pending again at no cost, on behalf of its owner; idempotent."""
    if task.status is TaskStatus.PENDING and task.attempt == owner[1]:
        return None
    return _not_owned(task, owner) or _returned(
        task, now, "released" if reason is None else f"released: {reason}"
    )


def requeue(task: Record[Task], now: datetime) -> Outcome:
    """Make a task pending again, with all its retries; idempotent."""
    if task.status is TaskStatus.PENDING:
        return None
    # `attempt` is not reset: an earlier owner must not pass for the next one.
    values = {"retry_count": 0, "losses": 0, "not_before": None, "result": None, "error": None}
    times = {name: None for name in _CANCEL_TIMES if getattr(task, name) is not None}
    return Step({**_UNASSIGNED, **values, **times}, _released(task), "requeued")


def release(task: Record[Task], now: datetime, *, wait: Wait) -> Outcome:
    """Take an assigned task from a lost node.

    A task that has not started is pending at once. A started one counts a loss: it is due at once
    after the first loss, later after `wait`, and FAILED beyond its `max_losses`.
    """
    if not is_assigned(task):
        return None
    if task.status is TaskStatus.SCHEDULED or task.cancel_requested_at is not None:
        return _returned(task, now, NODE_LOST)
    losses: int = task.losses + 1
    if task.max_losses is not None and losses > task.max_losses:
        values = _ended(task, TaskStatus.FAILED, now, losses=losses, error=LOST_TOO_OFTEN)
        return Step(values, _ended_attempt(task, now, failed=1), LOST_TOO_OFTEN)
    delay = wait(losses - 1) if losses > 1 else 0
    values = {**_pending_after(delay, now), "losses": losses, "error": NODE_LOST}
    return Step(values, _ended_attempt(task, now, failed=1), NODE_LOST)


def recover(
    task: Record[Task],
    now: datetime,
    *,
    node: AssignedNode,
    patience: timedelta,
    longest_wait: timedelta,
    unstarted: timedelta | None,
    wait: Wait,
) -> Outcome:
    """Release a task of a lost node, end a late task, or make a delayed retry due.

    Args:
        unstarted: Time after which a living node loses a task that it has not started; `None` for
            no limit.
    """
    if is_assigned(task) and is_lost(node, now, patience):
        return release(task, now, wait=wait)
    if task.status in WAITING and is_expired(task, now):
        return Step(_ended(task, TaskStatus.TIMEOUT, now, error=EXPIRED), _released(task), EXPIRED)
    if is_beyond_backoff(task, now, longest_wait):
        return Step({"not_before": None}, reason=TURNED_BACK)
    if is_unstarted(task, now, unstarted):
        return _returned(task, now, NEVER_STARTED)
    if is_cancel_overdue(task, now):
        return _cancelled(task, now, task.error)
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
        if known.status is NodeStatus.MAINTENANCE:
            values |= {"status": known.status, "status_reason": known.status_reason}
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
    wait: Wait | None,
) -> Step:
    """Retry a task after a failed attempt, or end it with `status` after its last retry."""
    if task.cancel_requested_at is not None:  # its result is not wanted
        return _cancelled(task, now, task.error)
    retry: int = task.retry_count + 1
    if wait is None or retry > task.max_retries:
        values = _ended(task, status, now, error=error)
    else:
        values = {**_pending_after(wait(retry), now), "retry_count": retry, "error": error}
    return Step(values, _ended_attempt(task, now, failed=1), error)


def _pending_after(seconds: float, now: datetime) -> Values:
    """Return the values of a task that is due in some seconds."""
    not_before = now + timedelta(seconds=seconds) if seconds else None
    return {**_UNASSIGNED, "not_before": not_before}


def _returned(task: Record[Task], now: datetime, reason: str) -> Step:
    """Make an assigned task pending at no cost, unless its owner was asked to cancel it."""
    if task.cancel_requested_at is not None:
        return _cancelled(task, now, task.error)
    return Step(_UNASSIGNED, _released(task), reason)


def _cancelled(task: Record[Task], now: datetime, reason: str | None, **values: Any) -> Step:
    return Step(_ended(task, TaskStatus.CANCELLED, now, **values), _released(task), reason)


def _ended_attempt(
    task: Record[Task], now: datetime, successful: int = 0, failed: int = 0
) -> NodeDelta | None:
    """Return the effect of the end of an attempt, which lasted from its start, or its claim."""
    if not is_assigned(task):
        return None
    began: datetime = task.started_at or task.scheduled_at or now
    return NodeDelta(-1, successful, failed, max(0.0, (now - began).total_seconds()))
