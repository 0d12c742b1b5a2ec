"""Read and write the table `nodes`."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from sqlalchemy import Float, cast, func, or_

from openclaw_store.database import NodeRow
from openclaw_store.domain import (
    ALIVE,
    DEFAULT_BACKOFF,
    SET_BY_REGISTRATION,
    Backoff,
    NodeFilter,
    NodeInfo,
    NodeStatus,
    check_backoff,
    check_enum,
    check_filter,
    check_key,
    check_seconds,
    check_text,
    conditions,
)
from openclaw_store.repositories.base import Repository, admit_entity
from openclaw_store.repositories.commands import Register, SetNodeStatus
from openclaw_store.repositories.heartbeats import Heartbeat
from openclaw_store.repositories.parts import register_in_parts
from openclaw_store.repositories.queries import node_conditions

node_status = check_enum(NodeStatus)


class NodeRepository(Repository[NodeInfo]):
    """The nodes in the database, without a cache."""

    kind = NodeInfo

    async def create(self, node: NodeInfo) -> bool:
        """Add a node; `node` receives its version and its times in UTC.

        Raises:
            DuplicateError: If its identifier is taken.
            InvalidDataError: If a field cannot be stored.
        """
        return await self._create(node)

    async def update(self, node: NodeInfo) -> bool:
        """Write a changed node back; `node` receives the new version and can be changed again.

        `last_heartbeat` never goes back, unless it was in the future.

        Raises:
            NodeNotFoundError: If it was removed.
            StaleVersionError: If it was changed since it was read.
            InvalidDataError: If a field cannot be stored.
        """
        return await self._update(node)

    async def delete(self, node_id: str) -> bool:
        """Remove a node; its history stays. `False` if there is none."""
        return await self._delete(node_id)

    async def list_by_status(self, status: NodeStatus) -> list[NodeInfo]:
        """Return the nodes with this status, newest registered first."""
        return await self.list_nodes(NodeFilter(status=node_status("status", status)))

    async def list_online_nodes(self) -> list[NodeInfo]:
        """Return the ONLINE nodes, newest registered first."""
        return await self.list_by_status(NodeStatus.ONLINE)

    async def get_all_nodes(self) -> list[NodeInfo]:
        """Return all nodes, newest registered first."""
        return await self.list_nodes()

    async def list_nodes(self, filter: NodeFilter | None = None) -> list[NodeInfo]:
        """Return the nodes that match a filter, newest registered first.

        Args:
            filter: `None` for all nodes.

        Raises:
            InvalidDataError: If a condition of the filter is invalid.
        """
        return await self._newest(*self._conditions(filter))

    async def register(self, node: NodeInfo, backoff: Backoff = DEFAULT_BACKOFF) -> bool:
        """Add a node, or replace its former process; `node` receives the stored values.

        Tasks assigned to the former process are released: they are PENDING again, or FAILED after
        their last retry. The totals of the node stay. Without a transaction of the caller, each 200
        are released in one; after an error, call this again.

        Args:
            node: The node; its `version` is ignored.
            backoff: The delay of these tasks before their next attempt.

        Raises:
            InvalidDataError: If a field cannot be stored.
        """
        record = await admit_entity(self, node)
        command = Register(record.node_id, record, check_backoff(backoff).draw())
        stored = await register_in_parts(self._write, command)
        self._write_back(stored, node, SET_BY_REGISTRATION)
        return True

    async def update_heartbeat(self, node_id: str) -> bool:
        """Record a heartbeat; an OFFLINE node is ONLINE again. `False` if there is none."""
        heartbeat = Heartbeat(check_key("node_id", node_id), self._database.clock(), {})
        known: bool = await self._write(heartbeat)
        return known

    async def update_status(self, node_id: str, status: NodeStatus) -> bool:
        """Set the status; ONLINE and BUSY count as a heartbeat. `False` if there is no node."""
        known: bool = await self._write(
            SetNodeStatus(check_key("node_id", node_id), node_status("status", status))
        )
        return known

    async def find_stale_nodes(self, timeout_seconds: float = 120) -> list[NodeInfo]:
        """Return ONLINE and BUSY nodes without a heartbeat for longer than their lease.

        A node without `lease_seconds` has a lease of `timeout_seconds`. Without any heartbeat, a
        node counts from its registration. A heartbeat as far in the future does not count: a clock
        was turned back. Newest registered first.
        """
        now, patience = self._database.clock(), check_seconds("timeout_seconds", timeout_seconds)
        last_sign = func.coalesce(NodeRow.last_heartbeat, NodeRow.registered_at)
        is_near = last_sign.between(now - patience, now + patience)
        is_candidate = or_(~is_near, NodeRow.lease_seconds.is_not(None))
        nodes = await self._newest(NodeRow.status.in_(ALIVE), is_candidate)
        return [node for node in nodes if conditions.is_silent(node, now, patience)]

    async def find_by_skill(self, skill: str) -> list[NodeInfo]:
        """Return the ONLINE nodes with exactly this skill, newest registered first."""
        skill = check_text("skill", skill)
        return await self.list_nodes(NodeFilter(status=NodeStatus.ONLINE, skill=skill))

    async def get_available_nodes(self) -> list[NodeInfo]:
        """Return the ONLINE nodes with a free slot, least loaded first.

        The load is the used share of `max_concurrent_tasks`, then `running_tasks`, then the
        identifier.
        """
        load = cast(NodeRow.running_tasks, Float) / NodeRow.max_concurrent_tasks
        order = (load, NodeRow.running_tasks, NodeRow.node_id)
        free = self._select(*self._conditions(NodeFilter(has_free_slots=True)))
        return await self._list(free.order_by(*order))

    def _conditions(self, filter: NodeFilter | None) -> Iterator[Any]:
        now = self._database.clock()
        checked = check_filter(NodeFilter, filter, now)
        return node_conditions(checked, now, self._database.dialect)

    async def _newest(self, *conditions: Any) -> list[NodeInfo]:
        order = (NodeRow.registered_at.desc(), NodeRow.node_id)
        return await self._list(self._select(*conditions).order_by(*order))
