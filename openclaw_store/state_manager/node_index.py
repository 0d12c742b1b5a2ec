"""Index of the nodes in memory: by skill, by free slots, and in the order of registration."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from datetime import datetime

from openclaw_store.domain import NodeInfo, NodeStatus, Record
from openclaw_store.state_manager.snapshot import Records


class NodeIndex:
    """Find nodes in memory without a search through all of them."""

    def __init__(self, nodes: Records[NodeInfo]) -> None:
        self._nodes = nodes
        self._load: dict[str, tuple[float, int, str]] = {}  # of ONLINE nodes with a free slot
        self._by_skill: dict[str, set[str]] = {}
        self._counts: Counter[NodeStatus] = Counter()
        self._encoded: dict[str, bytes | None] = {}  # skills of ONLINE nodes, in JSON
        self._newest: list[str] | None = None  # newest registered first; `None` when outdated

    def replace(
        self,
        id: str,
        old: Record[NodeInfo] | None,
        new: Record[NodeInfo] | None,
        *,
        is_stored: bool,
    ) -> None:
        """Replace a node in the index; the totals count stored nodes only.

        Raises:
            InvalidDataError: If its skills cannot be read; the index is unchanged.
        """
        encoded: bytes | None = None
        if new is not None and new.status is NodeStatus.ONLINE:
            encoded = new.available_skills
            if type(encoded) is not bytes:  # decoded, or empty
                encoded = new.encoded("available_skills")
        # Equal JSON means equal skills, so most changes decode nothing.
        if encoded != self._encoded.get(id):
            self._index_skills(id, _skills(old), _skills(new))
            self._encoded[id] = encoded
        if old is not None:
            self._counts[old.status] -= is_stored
        if new is not None:
            self._counts[new.status] += is_stored
            self.index_load(id, new)
        else:
            self._load.pop(id, None)
            self._encoded.pop(id, None)
        if old is None or new is None or old.registered_at != new.registered_at:
            self._newest = None

    def index_load(self, id: str, node: Record[NodeInfo]) -> None:
        """Index the free slots of a node."""
        running, slots = node.running_tasks, node.max_concurrent_tasks
        if node.status is NodeStatus.ONLINE and running < slots:
            self._load[id] = (running / slots, running, id)
        else:
            self._load.pop(id, None)

    def all_nodes(self) -> list[Record[NodeInfo]]:
        """Return all nodes, newest registered first."""
        if self._newest is None:
            ordered = sorted(self._nodes.values(), key=lambda node: str(node.node_id))
            ordered.sort(key=_registered_at, reverse=True)
            self._newest = [node.node_id for node in ordered]
        return self._records(self._newest)

    def online_nodes(self) -> list[Record[NodeInfo]]:
        """Return the ONLINE nodes, newest registered first."""
        return [node for node in self.all_nodes() if node.status is NodeStatus.ONLINE]

    def available_nodes(self) -> list[Record[NodeInfo]]:
        """Return the ONLINE nodes with a free slot, least loaded first."""
        return self._records(id for _, _, id in sorted(self._load.values()))

    def nodes_by_skill(self, skill: str) -> list[Record[NodeInfo]]:
        """Return the ONLINE nodes with exactly this skill, newest registered first."""
        found = self._records(sorted(self._by_skill.get(skill, ())))
        found.sort(key=_registered_at, reverse=True)
        return found

    def count(self, status: NodeStatus | None = None) -> int:
        """Return the number of nodes in the database, of one status or of all."""
        return self._counts.total() if status is None else self._counts[status]

    def stats(self, unstored: Iterable[str]) -> dict[str, int]:
        """Return the numbers of nodes in the database: `total`, `online`, `offline`, `busy`.

        Args:
            unstored: Identifiers of nodes that are only in memory.
        """
        counts = self._counts
        available = len(self._load) - sum(id in self._load for id in unstored)
        return {
            "total": counts.total(),
            "online": counts[NodeStatus.ONLINE],
            "offline": counts[NodeStatus.OFFLINE],
            "busy": counts[NodeStatus.BUSY] + counts[NodeStatus.ONLINE] - available,
        }

    def _index_skills(self, id: str, before: frozenset[str], after: frozenset[str]) -> None:
        for skill in before - after:
            self._by_skill[skill].discard(id)
            if not self._by_skill[skill]:
                del self._by_skill[skill]
        for skill in after - before:
            self._by_skill.setdefault(skill, set()).add(id)

    def _records(self, ids: Iterable[str]) -> list[Record[NodeInfo]]:
        return [node for node in map(self._nodes.get, ids) if node is not None]


def _skills(node: Record[NodeInfo] | None) -> frozenset[str]:
    """Return the indexed skills of a node: none unless it is ONLINE."""
    if node is None or node.status is not NodeStatus.ONLINE:
        return frozenset()
    skills = node.decoded("available_skills")
    if not isinstance(skills, list):  # written by hand
        return frozenset()
    return frozenset(skill for skill in skills if isinstance(skill, str))


def _registered_at(node: Record[NodeInfo]) -> datetime:
    moment: datetime = node.registered_at
    return moment
