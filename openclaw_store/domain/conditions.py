"""Conditions on tasks and nodes, on which transitions depend.

The caller passes the present time. A clock may be turned back: a heartbeat, a claim or a start that
lies too far in the future counts as old.
"""

from __future__ import annotations

from datetime import datetime, timedelta
from functools import lru_cache

import orjson

from openclaw_store.domain.models import ASSIGNED, NodeInfo, NodeStatus, Task, TaskStatus
from openclaw_store.domain.records import Record

AssignedNode = Record[NodeInfo] | None
"""The node of an assigned task; `None` if the task is not assigned, or the node does not exist."""


def is_due(task: Record[Task], now: datetime) -> bool:
    """Return true if a pending task may be claimed at this time."""
    not_before: datetime | None = task.not_before
    return not_before is None or not_before <= now


def is_expired(task: Record[Task], now: datetime) -> bool:
    """Return true if a task that has not started may no longer be handed out."""
    expires_at: datetime | None = task.expires_at
    return expires_at is not None and expires_at <= now


def is_ready(task: Record[Task], now: datetime) -> bool:
    """Return true if a task waits for a node at this time."""
    return task.status is TaskStatus.PENDING and is_due(task, now) and not is_expired(task, now)


def may_claim(node: Record[NodeInfo], task: Record[Task], now: datetime) -> bool:
    """Return true if a node may claim a task at this time; `store_write` repeats this rule."""
    return is_ready(task, now) and free_slots(node) > 0 and has_skills(node, task)


def has_skills(node: Record[NodeInfo], task: Record[Task]) -> bool:
    """Return true if a node has all skills that a task requires."""
    required, available = task.required_skills, node.available_skills
    if type(required) is not bytes:  # decoded already, or empty
        required = task.encoded("required_skills")
    if type(available) is not bytes:
        available = node.encoded("available_skills")
    return are_among(required, available)


def are_among(required: bytes | str | None, available: bytes | str | None) -> bool:
    """Return true if one JSON list contains all texts of another; false for any other JSON."""
    wanted, present = skill_set(required), skill_set(available)
    return wanted is not None and present is not None and wanted <= present


@lru_cache(maxsize=4096)
def skill_set(text: bytes | str | None) -> frozenset[str] | None:
    """Return the texts of a JSON list; `None` for any other JSON, which was written by hand."""
    try:
        skills = orjson.loads(text or b"[]")
    except orjson.JSONDecodeError:
        return None
    if not isinstance(skills, list) or not all(isinstance(one, str) for one in skills):
        return None
    return frozenset(skills)


def free_slots(node: Record[NodeInfo]) -> int:
    """Return the number of tasks that a node may still claim."""
    if node.status is not NodeStatus.ONLINE:
        return 0
    free: int = node.max_concurrent_tasks - node.running_tasks
    return max(0, free)


def is_assigned(task: Record[Task]) -> bool:
    """Return true if a task occupies a slot of a node."""
    return task.assigned_node is not None and task.status in ASSIGNED


def is_lost(node: AssignedNode, now: datetime, patience: timedelta) -> bool:
    """Return true if the tasks of a node must be released."""
    if node is None or node.status in (NodeStatus.OFFLINE, NodeStatus.ERROR):
        return True
    return is_silent(node, now, patience)


def is_silent(node: NodeInfo | Record[NodeInfo], now: datetime, patience: timedelta) -> bool:
    """Return true if the last heartbeat (or the registration) of a node is too old.

    Args:
        patience: Maximum age for a node without a lease of its own.
    """
    if node.lease_seconds is not None:
        patience = timedelta(seconds=node.lease_seconds)
    last_sign = node.last_heartbeat or node.registered_at
    assert last_sign is not None  # a stored node has been registered
    # A heartbeat far in the future counts as old: the clock was turned back since, by an unknown
    # time. Without `abs`, the node would pass for alive until the clock has caught up.
    return abs(now - last_sign) > patience


def is_in_use(node: Record[NodeInfo], session: str | None, now: datetime) -> bool:
    """Return true if a worker with another session has a lease of the node."""
    if node.session in (None, session) or node.lease_seconds is None:
        return False
    return not is_lost(node, now, timedelta(seconds=node.lease_seconds))


def is_overdue(task: Record[Task], now: datetime) -> bool:
    """Return true if a running task has exceeded its timeout."""
    if task.status is not TaskStatus.RUNNING or None in (task.timeout, task.started_at):
        return False
    limit: int = task.timeout
    started: datetime = task.started_at
    # `lifecycle._in_order` may have moved the start into the future; `updated_at` is real.
    began = min(started, task.updated_at or started)
    # As in `is_silent`, the clock may have been turned back since.
    return abs((now - began).total_seconds()) > limit


def is_unstarted(task: Record[Task], now: datetime, limit: timedelta | None) -> bool:
    """Return true if a node has kept a claimed task for too long without starting it."""
    if limit is None or task.status is not TaskStatus.SCHEDULED or task.scheduled_at is None:
        return False
    claimed: datetime = task.scheduled_at
    # `updated_at` is the real time, as in `is_overdue`.
    return abs(now - min(claimed, task.updated_at or claimed)) > limit


def is_cancel_overdue(task: Record[Task], now: datetime) -> bool:
    """Return true if the owner of a task should have cancelled it by now."""
    deadline: datetime | None = task.cancel_deadline_at
    return task.status is TaskStatus.RUNNING and deadline is not None and deadline <= now


def is_beyond_backoff(task: Record[Task], now: datetime, longest: timedelta) -> bool:
    """Return true if the retry of a task is due later than any backoff allows.

    This happens when the clock was turned back after the task had failed.
    """
    if (
        task.status is not TaskStatus.PENDING
        or is_due(task, now)
        or not task.retry_count + task.losses
    ):
        return False
    failed: datetime | None = task.updated_at
    return failed is not None and failed - now > longest
