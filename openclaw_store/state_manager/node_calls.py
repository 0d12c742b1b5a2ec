"""Calls of a `StateManager` for nodes."""

from __future__ import annotations

from collections.abc import Callable

from openclaw_store.domain import (
    SET_BY_REGISTRATION,
    NodeInfo,
    NodeStatus,
    check_count,
    check_key,
    check_percentage,
    check_text,
    write_back,
)
from openclaw_store.repositories import Create, Resume, SetNodeStatus, admit_entity, node_status
from openclaw_store.state_manager.manager_base import ManagerBase


class NodeCalls(ManagerBase):
    """Read, write and supervise nodes."""

    async def get_node(self, node_id: str) -> NodeInfo | None:
        """Return a node; `None` if there is none."""
        self._check_usable()
        record = await self._replica.find((NodeInfo, check_key("node_id", node_id)))
        return None if record is None else (await self._replica.slices.copies([record]))[0]

    async def get_all_nodes(self) -> list[NodeInfo]:
        """Return all nodes, newest registered first."""
        self._check_usable()
        nodes = (await self._replica.view(with_tasks=False)).node_index
        return await self._replica.slices.copies(nodes.all_nodes())

    async def get_online_nodes(self) -> list[NodeInfo]:
        """Return the ONLINE nodes, newest registered first."""
        self._check_usable()
        nodes = (await self._replica.view(with_tasks=False)).node_index
        return await self._replica.slices.copies(nodes.online_nodes())

    async def get_available_nodes(self) -> list[NodeInfo]:
        """Return the ONLINE nodes with a free slot, least loaded first."""
        self._check_usable()
        nodes = (await self._replica.view(with_tasks=False)).node_index
        return await self._replica.slices.copies(nodes.available_nodes())

    async def find_nodes_by_skill(self, skill: str) -> list[NodeInfo]:
        """Return the ONLINE nodes with exactly this skill, newest registered first."""
        self._check_usable()
        skill = check_text("skill", skill)
        nodes = (await self._replica.view(with_tasks=False)).node_index
        return await self._replica.slices.copies(nodes.nodes_by_skill(skill))

    async def add_node(self, node: NodeInfo, persist: bool = True) -> bool:
        """Add a node; `node` receives its version and its times in UTC.

        Args:
            persist: `False` keeps the node in memory until the next synchronisation.

        Raises:
            DuplicateError: If a node with this identifier exists.
            InvalidDataError: If a field cannot be stored.
        """
        self._check_usable()
        record = await admit_entity(self.node_repo, node, is_new=True)
        create = Create(NodeInfo, record.node_id, record)
        added = self._replica.submit(create) if persist else self._replica.write_behind.add(record)
        write_back(await added, node)
        return True

    async def register_node(self, node: NodeInfo, *, replaced: str | None = None) -> bool:
        """Add a node, or replace its former process; `node` receives the stored values.

        Call this when the process of a node starts. Tasks assigned to the former process are
        released at once, however fresh its heartbeats are, as by `recover`. The totals of the node
        stay, and so does MAINTENANCE, which only `resume_node` and `update_node_status` end. If
        there are more than 200 tasks, each 200 are released in one transaction, and the node is
        registered in the last one: after an error, call this again.

        Args:
            node: The node; its `version` is ignored. With a `session`, it does not replace a
                process with another session and a lease (`lease_seconds`) that holds.
            replaced: The session that it replaces nevertheless, as its process has crashed.

        Raises:
            InvalidDataError: If a field cannot be stored.
            NodeInUseError: If `node` has a session, and another one has a lease.
        """
        self._check_usable()
        record = await admit_entity(self.node_repo, node)
        if replaced is not None:
            replaced = check_text("replaced", replaced)
        write_back(await self._scheduler.register(record, replaced), node, SET_BY_REGISTRATION)
        return True

    async def update_node(self, node: NodeInfo, persist: bool = True) -> bool:
        """Write a changed node back; `node` receives the new version and can be changed again.

        Usage figures are written as given; `last_heartbeat` never goes back, unless it was in the
        future.

        Args:
            persist: `False` keeps the change in memory until the next synchronisation.

        Raises:
            NodeNotFoundError: If the node was removed.
            StaleVersionError: If the node was changed since it was read. Read it again, or use
                `change_node`.
            InvalidDataError: If a field cannot be stored.
        """
        return await self._update(self.node_repo, node, persist)

    async def change_node(self, node_id: str, fn: Callable[[NodeInfo], object]) -> NodeInfo | None:
        """Read a node, change it and write it back, without losing a concurrent change.

        Args:
            fn: Changes the copy that it receives. It is called again, with a new copy, if the
                node was changed meanwhile.

        Returns:
            The stored node; `None` if there is none.

        Raises:
            InvalidDataError: If a field cannot be stored.
            ConflictError: If the node was an unsaved entry and the database had newer data.
        """
        return await self._change(self.node_repo, check_key("node_id", node_id), fn)

    async def remove_node(self, node_id: str) -> bool:
        """Remove a node; `False` if there is none. Its tasks are not changed."""
        self._check_usable()
        return await self._replica.remove((NodeInfo, check_key("node_id", node_id)))

    delete_node = remove_node

    async def update_node_status(self, node_id: str, status: NodeStatus) -> bool:
        """Set the status of a node; ONLINE and BUSY count as a heartbeat.

        Returns:
            `False` if there is no such node.
        """
        self._check_usable()
        command = SetNodeStatus(check_key("node_id", node_id), node_status("status", status))
        known: bool = await self._replica.submit(command)
        return known

    async def drain_node(self, node_id: str, reason: str | None = None, wait: bool = False) -> bool:
        """Set a node to MAINTENANCE: it claims no more tasks until `resume_node`.

        Args:
            reason: The `status_reason` of the node; the change log contains it, too.
            wait: Return when the node has no more tasks.

        Returns:
            `False` if there is no such node.
        """
        self._check_usable()
        node_id = check_key("node_id", node_id)
        text = None if reason is None else check_text("reason", reason)
        known: bool = await self._replica.submit(
            SetNodeStatus(node_id, NodeStatus.MAINTENANCE, reason=text)
        )
        while wait:
            self._check_usable()
            with self._replica.watchers.next_change() as woken:
                node = await self.get_node(node_id)
                if node is None or not node.running_tasks:
                    break
                await woken
        return known

    async def resume_node(self, node_id: str) -> bool:
        """End the MAINTENANCE of a node; return `False` if there is no such node.

        A node with another status is not changed.
        """
        self._check_usable()
        known: bool = await self._replica.submit(Resume(check_key("node_id", node_id)))
        return known

    async def update_heartbeat(
        self,
        node_id: str,
        cpu_usage: float | None = None,
        memory_usage: float | None = None,
        running_tasks: int | None = None,
        disk_usage: float | None = None,
    ) -> bool:
        """Record a heartbeat of a node, with the usage it reports; `False` if there is none.

        The heartbeat is in the cache at once, and in the database within a second. It brings an
        OFFLINE node back ONLINE; that change is committed when this returns.

        Args:
            cpu_usage, memory_usage, disk_usage: Percent, 0 to 100; `None` keeps the known figure.
            running_tasks: Number of assigned tasks; `None` keeps the known figure.

        Raises:
            InvalidDataError: If a figure is out of range.
        """
        self._check_usable()
        given = {"cpu_usage": cpu_usage, "memory_usage": memory_usage, "disk_usage": disk_usage}
        usage: dict[str, float | int] = {
            name: check_percentage(name, value)
            for name, value in given.items()
            if value is not None
        }
        if running_tasks is not None:
            usage["running_tasks"] = check_count("running_tasks", running_tasks)
        return await self._replica.show_heartbeat(check_key("node_id", node_id), usage)

    async def check_stale_nodes(self, timeout_seconds: float = 120) -> list[str]:
        """Set ONLINE and BUSY nodes OFFLINE that have been silent for too long.

        A heartbeat that arrives during the call keeps its node ONLINE.

        Args:
            timeout_seconds: Seconds without a heartbeat. A node that never sent one counts from
                its registration. A heartbeat further in the future than this is ignored, because
                a clock was turned back.

        Returns:
            The identifiers of the nodes set OFFLINE.
        """
        self._check_usable()
        return await self._scheduler.set_silent_offline(timeout_seconds)
