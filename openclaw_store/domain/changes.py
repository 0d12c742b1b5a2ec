"""Changes: the entries of the feed, numbered by revision."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import datetime
from enum import StrEnum
from typing import Any, NamedTuple

from openclaw_store.domain.models import NodeInfo, Task
from openclaw_store.domain.records import Record

ENTITY_NAMES: Mapping[type[Any], str] = {Task: "task", NodeInfo: "node"}
"""The name of each domain class in the feed."""

ENTITY_KINDS: Mapping[str, type[Any]] = {name: kind for kind, name in ENTITY_NAMES.items()}
"""The domain class of each name in the feed."""

EntityKey = tuple[type[Any], str]
"""The domain class and the identifier of a task or node."""


def key_of(record: Record[Any]) -> EntityKey:
    """Return the key of a record."""
    return record.kind, record.id


class ChangeKind(StrEnum):
    """The kind of a change of a task or node."""

    CREATED = "created"
    STATUS = "status"
    """The status changed, and perhaps other fields."""
    UPDATED = "updated"
    """Fields other than the status changed."""
    REMOVED = "removed"


class Change(NamedTuple):
    """One entry of the feed.

    `str` of it is one line: `2026-11-25 09:42:57 7 task t1: running → failed on atlas (no paper)`.
    """

    revision: int
    changed_at: datetime
    """Time at which its process began to write it; concurrent writes may be out of order."""
    item: str
    """`task` or `node`."""
    item_id: str
    kind: ChangeKind
    from_status: str | None
    """`None` for a creation."""
    to_status: str | None
    """`None` for a removal."""
    node: str | None
    """The node to which a task was assigned after the change; `None` for a change of a node."""
    reason: str | None
    previous: int | None = None
    """The revision of the preceding change of the same task or node, if any."""

    def __str__(self) -> str:
        moment = self.changed_at.replace(tzinfo=None).isoformat(" ", "seconds")
        return f"{moment} {self.revision} {self.item} {self.item_id}: {self.effect}"

    @property
    def effect(self) -> str:
        """The effect of the change: `running → failed on atlas (no paper)`."""
        steps = " → ".join(filter(None, dict.fromkeys([self.from_status, self.to_status])))
        is_named = self.kind in (ChangeKind.UPDATED, ChangeKind.REMOVED)
        kind = f", {self.kind.value}" if is_named else ""
        node = f" on {self.node}" if self.node else ""
        reason = f" ({self.reason})" if self.reason else ""
        return f"{steps}{kind}{node}{reason}"
