"""The fields that are sealed; the reference has the reason of each field that is not."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Final

from openclaw_store.domain import lifecycle

SEALED_FIELDS: Final[Mapping[str, Sequence[str]]] = {
    "tasks": ("description", "parameters", "result", "error", "metadata"),
    "nodes": ("ip_address", "tailscale_ip", "status_reason", "progress"),
    "changes": ("reason",),
    "outgoing": ("tasks",),
    "legacy_rejected": ("reason", "row"),
    "legacy_extra": ("row",),
}
"""The sealed columns of each table."""

OPTIONAL_FIELDS: Final = frozenset({"name", "user_id"})
"""The columns of `tasks` that are sealed only if `KeyRing(seal=…)` names them."""

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
