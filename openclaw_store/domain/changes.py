"""Changes: the numbered entries of the change log."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import datetime
from enum import StrEnum
from typing import Any, NamedTuple

from openclaw_store.domain.models import NodeInfo, Task
from openclaw_store.domain.records import Record

ENTITY_NAMES: Mapping[type[Any], str] = {Task: "task", NodeInfo: "node"}
"""What the feed calls each domain class."""


ENTITY_KINDS: Mapping[str, type[Any]] = {item: kind for kind, item in ENTITY_NAMES.items()}
"""The domain class of what the feed calls an item."""


EntityKey = tuple[type[Any], str]
"""The domain class and the identifier of a row."""


def key_of(record: Record[Any]) -> EntityKey:
    """Where a record belongs."""
    return record.kind, record.id


class ChangeKind(StrEnum):
    """What happened to a task or node."""

    CREATED = "created"
    STATUS = "status"
    """Its status changed, and perhaps more."""
    UPDATED = "updated"
    """It changed, but not its status."""
    REMOVED = "removed"


class Change(NamedTuple):
    """One entry of the feed."""

    revision: int
    changed_at: datetime
    """When its process began to write it; of those that write at once, not always in order."""
    item: str
    """`task` or `node`."""
    item_id: str
    kind: ChangeKind
    from_status: str | None
    """`None` when it was created."""
    to_status: str | None
    """`None` when it was removed."""
    node: str | None
    """The node a task was assigned to after the change; `None` for nodes."""
    reason: str | None
    previous: int | None = None
    """The revision of the change before this one of the same task or node, if there was one."""
