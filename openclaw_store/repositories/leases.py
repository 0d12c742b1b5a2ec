"""The lease of a node: its heartbeat's answer, and the progress that travels with it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from sqlalchemy import Text, select, type_coerce
from sqlalchemy.ext.asyncio import AsyncSession

from openclaw_store.database import NodeRow, TaskRow, WriteTransaction, statements_in
from openclaw_store.domain import Progress, TaskStatus, decode_progress

Owned = tuple[str, int]
"""Identifier and attempt of a task."""


@dataclass(frozen=True)
class Lease:
    """The state of a node in the database, for its own process."""

    node_id: str
    session: str | None
    """The session of the process that has registered the node last."""
    held: Mapping[Owned, bool]
    """The tasks that the node holds, by identifier and attempt; true if the node was asked to
    cancel the task."""


async def read_lease(session: AsyncSession, node_id: str) -> Lease | None:
    """Return the lease of a node; `None` if there is no such node."""
    sql = statements_in(session)
    rows = (await session.execute(sql.lease, {"node": node_id})).all()
    if not rows:
        return None
    held = {(id, attempt): bool(asked) for _, id, attempt, asked in rows if id is not None}
    return Lease(node_id, rows[0][0], held)


def apply_progress(
    transaction: WriteTransaction, given: Sequence[tuple[str, str]]
) -> Sequence[None]:
    """Write the progress of the running tasks of nodes: rows of node and JSON."""
    sql = transaction.sql
    rows = [(id, sql.store_progress(id, text)) for id, text in dict(given).items()]
    transaction.cursor.write(sql.write_progress, rows)
    return [None] * len(given)


async def read_progress(session: AsyncSession, ids: Sequence[str]) -> dict[str, Progress]:
    """Return the progress of the tasks that run and have reported it, by their identifiers."""
    query = (
        select(
            TaskRow.task_id, TaskRow.attempt, NodeRow.node_id, type_coerce(NodeRow.progress, Text)
        )
        .join(NodeRow, NodeRow.node_id == TaskRow.assigned_node)
        .where(TaskRow.task_id.in_(ids), TaskRow.status == TaskStatus.RUNNING)
    )
    found: dict[str, Progress] = {}
    for task_id, attempt, node_id, stored in await session.execute(query):
        text = stored and statements_in(session).load_progress(node_id, stored)
        progress = decode_progress(text, task_id, attempt)
        if progress is not None:
            found[task_id] = progress
    return found
