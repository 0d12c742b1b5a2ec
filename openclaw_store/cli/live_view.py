"""The live view: a summary of the cluster, drawn again after changes."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import AsyncIterator, Sequence

from rich.console import Group, RenderableType
from rich.live import Live

from openclaw_store.cli import render
from openclaw_store.database import Database
from openclaw_store.domain import Change, NodeInfo
from openclaw_store.maintenance.summary import summarize
from openclaw_store.repositories import NodeRepository

_SECONDS = 0.25
"""Minimum time between two frames."""

_NODES = 10
"""Maximum number of nodes in a frame."""


async def view(database: Database, batches: AsyncIterator[Sequence[Change]]) -> None:
    """Draw the cluster and its newest changes; an empty batch forces a new frame."""
    newest: deque[Change] = deque(maxlen=100)
    drawn = 0.0
    with Live(console=render.screen(), auto_refresh=False) as live:
        async for batch in batches:
            newest.extend(batch)
            if time.monotonic() - drawn >= _SECONDS or not batch:
                live.update(await _frame(database, newest, live.console.height), refresh=True)
                drawn = time.monotonic()
        live.update(await _frame(database, newest, live.console.height), refresh=True)


def load(node: NodeInfo) -> tuple[float, int]:
    """Return the used share of the slots of a node, and the number of its tasks."""
    return node.running_tasks / max(1, node.max_concurrent_tasks), node.running_tasks


async def _frame(database: Database, newest: Sequence[Change], height: int) -> Group:
    found = await summarize(database)
    nodes = sorted(await NodeRepository(database).get_all_nodes(), key=load, reverse=True)
    parts: list[RenderableType] = [
        render.summary(found),
        "",
        render.nodes(nodes[:_NODES], found.read_at),
    ]
    if len(nodes) > _NODES:
        parts.append(f"and {len(nodes) - _NODES} more nodes")
    # Twelve lines are the summary, the headers and the blank lines.
    room = max(3, height - 12 - min(len(nodes), _NODES))
    parts += ["", render.changes(list(newest)[-room:])]
    return Group(*parts)
