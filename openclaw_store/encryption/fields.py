"""The fields that are sealed, and the reason of each field that is not."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Final

from openclaw_store.domain import lifecycle

SEALED_FIELDS: Final[Mapping[str, Sequence[str]]] = {
    "tasks": ("description", "parameters", "result", "error", "metadata"),
    "nodes": ("ip_address", "tailscale_ip", "progress"),
    "changes": ("reason",),
    "outgoing": ("tasks",),
    "legacy_rejected": ("reason", "row"),
    "legacy_extra": ("row",),
}
"""The sealed columns of each table."""

_ORDER = "The database finds, orders or counts rows by it."
_COUNTER = "The database adds to it, or compares it, in a statement."
_SCHEDULING = "The database matches tasks with nodes by it."
_IDENTITY = "The database finds rows by it, and it is part of the associated data."

CLEAR_FIELDS: Final[Mapping[str, Mapping[str, str]]] = {
    "tasks": {
        "task_id": _IDENTITY,
        "task_type": "Filters select by it; it has few values.",
        "name": "Filters search in it (`name_contains`).",
        **dict.fromkeys(("required_skills", "optional_skills", "affinity_tags"), _SCHEDULING),
        **dict.fromkeys(("status", "priority", "assigned_node"), _ORDER),
        "attempt": _COUNTER,
        **dict.fromkeys(("submitted_at", "scheduled_at", "started_at", "completed_at"), _ORDER),
        **dict.fromkeys(("not_before", "expires_at"), _ORDER),
        **dict.fromkeys(("cancel_requested_at", "cancel_deadline_at", "updated_at"), _ORDER),
        "timeout": "Overdue tasks are found by it.",
        **dict.fromkeys(("retry_count", "max_retries", "losses", "max_losses"), _COUNTER),
        "user_id": "Filters select by it, with an index.",
        "idempotency_key": "Duplicates are found by it, with an index.",
        "traceparent": "It holds random numbers, which name a trace elsewhere.",
        "passed_over_at": _ORDER,
        "version": "Writes and the feed are ordered by it.",
    },
    "nodes": {
        "node_id": _IDENTITY,
        **dict.fromkeys(("hostname", "platform", "arch"), "They name the machine for operators."),
        "status": _ORDER,
        **dict.fromkeys(("cpu_usage", "memory_usage", "disk_usage"), "Heartbeats write them."),
        **dict.fromkeys(("available_skills", "tags"), _SCHEDULING),
        **dict.fromkeys(("max_concurrent_tasks", "running_tasks"), _COUNTER),
        "port": "A port without its address tells nothing.",
        **dict.fromkeys(("total_tasks_processed", "successful_tasks", "failed_tasks"), _COUNTER),
        "average_execution_time": _COUNTER,
        **dict.fromkeys(("registered_at", "last_heartbeat", "lease_seconds"), _ORDER),
        "status_reason": "Operators read it in the list of nodes.",
        "session": "The lease of a worker is compared with it.",
        **dict.fromkeys(("version", "beat"), "Writes and heartbeats are ordered by it."),
    },
    "changes": {
        "revision": "The feed is ordered by it.",
        "changed_at": _ORDER,
        **dict.fromkeys(("item", "item_id"), _IDENTITY),
        **dict.fromkeys(("kind", "from_status", "to_status", "node"), "The feed counts by it."),
        "previous": "The history of a row follows it.",
    },
    "outgoing": {
        "batch": _IDENTITY,
        "target": "A transfer finds its rows by it.",
        "number": "Operators see how many tasks are in transit.",
        "left_at": _ORDER,
    },
}
"""The reason of each column in clear."""

FIXED_REASONS: Final = frozenset(
    {
        lifecycle.NODE_LOST,
        lifecycle.LOST_TOO_OFTEN,
        lifecycle.NEVER_STARTED,
        lifecycle.EXPIRED,
        lifecycle.CANCEL_REQUESTED,
        lifecycle.OVERDUE,
        lifecycle.TURNED_BACK,
        *("released", "requeued", "resumed", "registered", "heartbeat", "adopted", "repaired"),
    }
)
"""The reasons of the library itself, which stay clear: they tell nothing of a caller."""
