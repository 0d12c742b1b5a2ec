"""Calls of a StateManager about nodes."""

from __future__ import annotations

from collections.abc import Callable

from openclaw_store.domain import (
    SET_BY_REGISTRATION,
    NodeInfo,
    NodeStatus,
    Record,
    admit,
    check_count,
    check_key,
    check_percentage,
    check_text,
    write_back,
)
from openclaw_store.repositories import (
    Create,
    SetNodeStatus,
    node_status,
)
from openclaw_store.state_manager.manager_base import ManagerBase, copies


class NodeCalls(ManagerBase):
    """Read, write and watch over nodes."""

    async def get_node(self, node_id: str) -> NodeInfo | None:
        """A node; `None` if there is none."""
        self._check_usable()
        record = await self._replica.find((NodeInfo, check_key("node_id", node_id)))
        return None if record is None else record.copy()

    async def get_all_nodes(self) -> list[NodeInfo]:
        """All nodes, newest registered first."""
        self._check_usable()
        return await copies(self._replica.cache.node_index.all_nodes(), Record.copy)

    async def get_online_nodes(self) -> list[NodeInfo]:
        """Nodes that are ONLINE, newest registered first."""
        self._check_usable()
        return await copies(self._replica.cache.node_index.online_nodes(), Record.copy)

    async def get_available_nodes(self) -> list[NodeInfo]:
        """ONLINE nodes with a free place, least loaded first."""
        self._check_usable()
        return await copies(self._replica.cache.node_index.available_nodes(), Record.copy)

    async def find_nodes_by_skill(self, skill: str) -> list[NodeInfo]:
        """ONLINE nodes that have exactly this skill, newest registered first."""
        self._check_usable()
        return await copies(
            self._replica.cache.node_index.nodes_by_skill(check_text("skill", skill)), Record.copy
        )

    async def add_node(self, node: NodeInfo, persist: bool = True) -> bool:
        """Add a node; `node` receives its version and its times in UTC.

        Args:
            persist: `False` keeps it in memory until the next synchronisation.

        Raises:
            DuplicateError: If there is a node with this identifier.
            InvalidDataError: If a field cannot be stored.
        """
        self._check_usable()
        record = admit(NodeInfo, node, self.db.clock)
        if persist:
            record = await self._replica.submit(Create(NodeInfo, node.node_id, record))
        else:
            record = await self._replica.write_behind.add(record)
        write_back(record, node)
        return True

    async def register_node(self, node: NodeInfo) -> bool:
        """Add a node, or have it come back as a new process; `node` receives what is stored.

        What its former process held is given back at once, however fresh its heartbeats are: it is
        tried again later, or FAILED after its last retry. The node's totals go on.

        Args:
            node: As it is now; its `version` does not matter.

        Raises:
            InvalidDataError: If a field cannot be stored.
        """
        self._check_usable()
        record = admit(NodeInfo, node, self.db.clock)
        write_back(await self._scheduler.register(record), node, SET_BY_REGISTRATION)
        return True

    async def update_node(self, node: NodeInfo, persist: bool = True) -> bool:
        """Write a changed node back; `node` receives the new version and can be changed again.

        Usage figures are written as they are given; `last_heartbeat` never goes back, unless it was
        in the future.

        Args:
            persist: `False` keeps it in memory until the next synchronisation.

        Raises:
            NodeNotFoundError: If it was removed meanwhile.
            StaleVersionError: If it was changed meanwhile; read it again, or use `change_node`.
            InvalidDataError: If a field cannot be stored.
        """
        self._check_usable()
        record = self._encode_known(NodeInfo, node)
        write_back(await self._update(record, persist), node)
        return True

    async def change_node(self, node_id: str, fn: Callable[[NodeInfo], object]) -> NodeInfo | None:
        """Read a node, change it and write it, without losing what others write meanwhile.

        Args:
            fn: Is given a copy and changes it; called again if the node was changed meanwhile.

        Returns:
            The node as it is stored; `None` if there is none.

        Raises:
            InvalidDataError: If a field cannot be stored.
            ConflictError: If it was only in memory, and lost to newer data.
        """
        return await self._change(self.node_repo, check_key("node_id", node_id), fn)

    async def remove_node(self, node_id: str) -> bool:
        """Remove a node; `False` if there is none. Its tasks stay as they are."""
        self._check_usable()
        return await self._replica.remove((NodeInfo, check_key("node_id", node_id)))

    delete_node = remove_node

    async def update_node_status(self, node_id: str, status: NodeStatus) -> bool:
        """Change a node's status; ONLINE and BUSY count as a sign of life. `False` if unknown."""
        self._check_usable()
        command = SetNodeStatus(check_key("node_id", node_id), node_status("status", status))
        known: bool = await self._replica.submit(command)
        return known

    async def update_heartbeat(
        self,
        node_id: str,
        cpu_usage: float | None = None,
        memory_usage: float | None = None,
        running_tasks: int | None = None,
        disk_usage: float | None = None,
    ) -> bool:
        """Note a sign of life now, and what the node reports; `False` if there is no such node.

        Seen in memory at once, on the disk within a second. Brings an OFFLINE node back ONLINE,
        which is committed when this returns.

        Args:
            cpu_usage, memory_usage, disk_usage: Percent, 0 to 100; `None` leaves it alone.
            running_tasks: `None` leaves it alone.

        Raises:
            InvalidDataError: If a figure is out of range.
        """
        self._check_usable()
        usage: dict[str, float | int] = {}
        if cpu_usage is not None:
            usage["cpu_usage"] = check_percentage("cpu_usage", cpu_usage)
        if memory_usage is not None:
            usage["memory_usage"] = check_percentage("memory_usage", memory_usage)
        if disk_usage is not None:
            usage["disk_usage"] = check_percentage("disk_usage", disk_usage)
        if running_tasks is not None:
            usage["running_tasks"] = check_count("running_tasks", running_tasks)
        return await self._replica.beat(check_key("node_id", node_id), usage)

    async def check_stale_nodes(self, timeout_seconds: float = 120) -> list[str]:
        """Set the live nodes OFFLINE that were silent for longer; a heartbeat meanwhile wins.

        Args:
            timeout_seconds: How long a node may be silent; one that never sent a heartbeat
                counts from its registration. A sign of life that is as far in the future counts
                for nothing: a clock was turned back.

        Returns:
            Identifiers of the nodes it set OFFLINE.
        """
        self._check_usable()
        return await self._scheduler.set_silent_offline(timeout_seconds)
