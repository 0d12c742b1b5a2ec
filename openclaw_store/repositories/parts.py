"""Calls with many rows, divided into transactions of bounded size: other writes run in between."""

from __future__ import annotations

from collections.abc import AsyncIterator, Awaitable, Callable
from typing import Any

from openclaw_store.domain import NodeInfo, Record, Task
from openclaw_store.errors import StoreError
from openclaw_store.repositories.commands import PART_SIZE, Claim, Register

Write = Callable[[Any], Awaitable[Any]]
"""Applies a command, and returns its result after the commit."""


async def claim_in_parts(
    write: Write, node_id: str, limit: int, *, start: bool
) -> AsyncIterator[list[Record[Task]]]:
    """Assign tasks to a node; yield the records of each transaction, best first.

    Raises:
        NodeNotFoundError: If there is no such node.
        BackendError: If a transaction failed. The node keeps the tasks of the ones before, which
            `register_node` releases.
    """
    claimed = 0
    while claimed < limit:
        wanted = min(limit - claimed, PART_SIZE)
        try:
            part: list[Record[Task]] = await write(Claim(node_id, wanted, start))
        except StoreError as error:
            if claimed:
                error.add_note(f"{claimed} tasks were claimed before this error")
            raise
        yield part
        if len(part) < wanted:
            return
        claimed += wanted


async def register_in_parts(write: Write, command: Register) -> Record[NodeInfo]:
    """Register the new process of a node, and return its record.

    After an error, some tasks of the former process may be released already; call it again.
    """
    record: Record[NodeInfo] | None = None
    while record is None:
        record = await write(command)
    return record
