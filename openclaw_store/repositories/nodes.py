"""`NodeRepository`: queries and writes of the table `nodes`."""

from __future__ import annotations

from typing import Any

from sqlalchemy import Float, cast, func, select

from openclaw_store.database import NodeRow, statements_for
from openclaw_store.domain import (
    ALIVE,
    DEFAULT_BACKOFF,
    JOINED,
    Backoff,
    NodeInfo,
    NodeStatus,
    admit,
    check_backoff,
    check_enum,
    check_key,
    check_seconds,
    check_text,
)
from openclaw_store.repositories.base import Repository
from openclaw_store.repositories.commands import (
    Register,
    SetNodeStatus,
)
from openclaw_store.repositories.heartbeats import Heartbeat

node_status = check_enum(NodeStatus)


class NodeRepository(Repository[NodeInfo]):
    """The nodes in the database; every call reads or writes it."""

    kind = NodeInfo

    async def create(self, node: NodeInfo) -> bool:
        """Add a node; `node` receives its version and its times in UTC.

        Raises:
            DuplicateError: If there is a node with this identifier.
            InvalidDataError: If a field cannot be stored.
        """
        return await self._create(node)

    async def update(self, node: NodeInfo) -> bool:
        """Write a changed node back; `node` receives the new version and can be changed again.

        Usage figures are written as they are given; `last_heartbeat` never goes back, unless it was
        in the future.

        Raises:
            NodeNotFoundError: If it was deleted meanwhile.
            StaleVersionError: If it was changed meanwhile; read it again first.
            InvalidDataError: If a field cannot be stored.
        """
        return await self._update(node)

    async def delete(self, node_id: str) -> bool:
        """Remove a node; `False` if there is none. Its history stays."""
        return await self._delete(node_id)

    async def list_by_status(self, status: NodeStatus) -> list[NodeInfo]:
        """Nodes with this status, newest registered first."""
        return await self._newest(NodeRow.status == node_status("status", status))

    async def list_online_nodes(self) -> list[NodeInfo]:
        """Nodes that are ONLINE, newest registered first."""
        return await self.list_by_status(NodeStatus.ONLINE)

    async def get_all_nodes(self) -> list[NodeInfo]:
        """All nodes, newest registered first."""
        return await self._newest()

    async def register(self, node: NodeInfo, backoff: Backoff = DEFAULT_BACKOFF) -> bool:
        """Add a node, or have it come back as a new process; `node` receives what is stored.

        What the former process held is given back at once: it is tried again later, or has FAILED
        after its last retry. The node's totals go on.

        Args:
            node: As it is now; its `version` does not matter.
            backoff: How long these tasks wait for their next try.

        Raises:
            InvalidDataError: If a field cannot be stored.
        """
        record = admit(NodeInfo, node, self._database.clock)
        stored = await self._write(Register(record.node_id, record, check_backoff(backoff).draw()))
        self._write_back(stored, node, JOINED)
        return True

    async def update_heartbeat(self, node_id: str) -> bool:
        """Note a sign of life now; brings an OFFLINE node back ONLINE. `False` if unknown."""
        beat = Heartbeat(check_key("node_id", node_id), self._database.clock(), {})
        known: bool = await self._write(beat)
        return known

    async def update_status(self, node_id: str, status: NodeStatus) -> bool:
        """Change a node's status; ONLINE and BUSY count as a sign of life. `False` if unknown."""
        known: bool = await self._write(
            SetNodeStatus(check_key("node_id", node_id), node_status("status", status))
        )
        return known

    async def find_stale_nodes(self, timeout_seconds: float = 120) -> list[NodeInfo]:
        """Nodes that are ONLINE or BUSY, but were silent for longer than `timeout_seconds`.

        A node that never sent a heartbeat counts from its registration. A sign of life that is as
        far in the future counts for nothing: a clock was turned back. Newest registered first.
        """
        now, patience = self._database.clock(), check_seconds("timeout_seconds", timeout_seconds)
        last_sign = func.coalesce(NodeRow.last_heartbeat, NodeRow.registered_at)
        is_near = last_sign.between(now - patience, now + patience)
        return await self._newest(NodeRow.status.in_(ALIVE), ~is_near)

    async def find_by_skill(self, skill: str) -> list[NodeInfo]:
        """ONLINE nodes that have exactly this skill, newest registered first."""
        skills = statements_for(self._database.dialect).elements(NodeRow.available_skills)
        has_skill = select(skills).where(skills == check_text("skill", skill)).exists()
        return await self._newest(NodeRow.status == NodeStatus.ONLINE, has_skill)

    async def get_available_nodes(self) -> list[NodeInfo]:
        """ONLINE nodes with a free place, least loaded first.

        Load is the share of `max_concurrent_tasks` in use, then `running_tasks`; equals go by
        identifier.
        """
        load = cast(NodeRow.running_tasks, Float) / NodeRow.max_concurrent_tasks
        query = self._select(
            NodeRow.status == NodeStatus.ONLINE,
            NodeRow.running_tasks < NodeRow.max_concurrent_tasks,
        ).order_by(load, NodeRow.running_tasks, NodeRow.node_id)
        return await self._list(query)

    async def _newest(self, *conditions: Any) -> list[NodeInfo]:
        order = (NodeRow.registered_at.desc(), NodeRow.node_id)
        return await self._list(self._select(*conditions).order_by(*order))
