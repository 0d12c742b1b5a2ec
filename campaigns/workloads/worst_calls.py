"""The calls of a store at their worst legal size: many rows, or JSON of 16 MiB."""

from __future__ import annotations

from collections.abc import AsyncIterable, Awaitable, Callable, Mapping
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any

from openclaw_store import (
    Database,
    NodeFilter,
    NodeInfo,
    NodeStatus,
    StateManager,
    Task,
    TaskFilter,
    TaskType,
    copy,
    diagnose,
    verify,
)


@dataclass
class Crowd:
    """A store with many tasks, and the sizes of the calls on it."""

    store: StateManager
    many: int
    """Rows of a call."""
    text: str
    """A JSON value of the largest size."""
    target: Callable[[], Database]
    """Makes an empty database on the same machine."""
    folder: Path
    large: Task
    """A stored task with the largest parameters."""
    _numbers = count()

    def task(self, **fields: Any) -> Task:
        return Task.create(TaskType.BATCH, "crowd", **{"required_skills": ["crowd"], **fields})

    def node(self) -> NodeInfo:
        return NodeInfo("crowd", "host", available_skills=["crowd"], max_concurrent_tasks=self.many)

    def path(self) -> Path:
        return self.folder / f"backup-{next(self._numbers)}"

    async def claimed(self) -> Task:
        """Claim a new task for a node of its own."""
        node = NodeInfo(f"lone-{next(self._numbers)}", "host", available_skills=["lone"])
        await self.store.register_node(node)
        await self.store.add_task(self.task(required_skills=["lone"]))
        [task] = await self.store.claim_tasks(node.node_id, start=True)
        return task


Work = Callable[[Crowd], Awaitable[object]]


@dataclass(frozen=True)
class WorstCall:
    """A call, and the work before it, which is not measured."""

    call: Callable[[Crowd, Any], Awaitable[object]]
    before: Work | None = None


def _plain(call: Work) -> WorstCall:
    return WorstCall(lambda crowd, _: call(crowd))


async def _all_of(items: AsyncIterable[object], limit: int) -> None:
    """Read up to so many items."""
    async for _ in items:
        limit -= 1
        if limit <= 0:
            return


async def _make_tasks(crowd: Crowd) -> list[Task]:
    # Not of the name by which later calls select tasks: twice as many would take twice the time.
    return [
        Task.create(TaskType.BATCH, "further", required_skills=["crowd"])
        for _ in range(5 * crowd.many)
    ]


async def _free(crowd: Crowd) -> None:
    await crowd.store.register_node(crowd.node())


async def _hold(crowd: Crowd) -> None:
    await crowd.store.register_node(crowd.node())
    await crowd.store.claim_tasks("crowd", crowd.many)


async def _lose(crowd: Crowd) -> None:
    await _hold(crowd)
    await crowd.store.update_node_status("crowd", NodeStatus.OFFLINE)


async def _copy(crowd: Crowd) -> None:
    async with crowd.target() as target:
        await copy(crowd.store.db, target)


async def _complete(crowd: Crowd, task: Task) -> None:
    await crowd.store.complete_task(task, crowd.text)


CROWD = TaskFilter(name_contains="crowd")

WORST_CALLS: Mapping[str, WorstCall] = {
    "add_tasks": WorstCall(lambda it, tasks: it.store.add_tasks(tasks), _make_tasks),
    "add_task": _plain(lambda it: it.store.add_task(it.task(metadata={"text": it.text}))),
    "submit_task": _plain(lambda it: it.store.submit_task(it.task(parameters={"t": it.text}))),
    "update_task": _plain(lambda it: it.store.update_task(it.large)),
    "change_task": _plain(
        lambda it: it.store.change_task(it.large.task_id, lambda one: setattr(one, "name", "new"))
    ),
    "get_task": _plain(lambda it: it.store.get_task(it.large.task_id)),
    "get_tasks": _plain(lambda it: it.store.get_tasks([f"t-{n}" for n in range(it.many)])),
    "get_pending_tasks": _plain(lambda it: it.store.get_pending_tasks(None)),
    "list_waiting": _plain(lambda it: it.store.list_waiting(None)),
    "list_tasks": _plain(lambda it: it.store.list_tasks(TaskFilter(skill="cobol"), limit=1000)),
    "count_tasks": _plain(lambda it: it.store.count_tasks(CROWD)),
    "iter_tasks": _plain(lambda it: _all_of(it.store.iter_tasks(CROWD), it.many)),
    "get_state": _plain(lambda it: it.store.get_state()),
    "get_task_stats": _plain(lambda it: it.store.get_task_stats()),
    "get_stats": _plain(lambda it: it.store.get_stats()),
    "explain_task": _plain(lambda it: it.store.explain_task(it.large.task_id)),
    "claim_tasks": WorstCall(lambda it, _: it.store.claim_tasks("crowd", it.many), _free),
    "register_node": WorstCall(lambda it, _: it.store.register_node(it.node()), _hold),
    "remove_node": WorstCall(lambda it, _: it.store.remove_node("crowd"), _hold),
    "recover": WorstCall(lambda it, _: it.store.recover(), _lose),
    "complete_task": WorstCall(_complete, lambda it: it.claimed()),
    "fail_task": WorstCall(
        lambda it, task: it.store.fail_task(task, it.text[:1_000_000]), lambda it: it.claimed()
    ),
    "add_node": _plain(
        lambda it: it.store.register_node(
            NodeInfo("able", "h", available_skills=[f"skill-{n}" for n in range(it.many)])
        )
    ),
    "claim_tasks by many skills": _plain(lambda it: it.store.claim_tasks("able")),
    "list_nodes": _plain(lambda it: it.store.list_nodes(NodeFilter(skill="skill-1"))),
    "find_nodes_by_skill": _plain(lambda it: it.store.find_nodes_by_skill("skill-1")),
    "change_tasks": _plain(
        lambda it: it.store.change_tasks(CROWD, lambda one: setattr(one, "description", "x"))
    ),
    "cancel_tasks": _plain(lambda it: it.store.cancel_tasks(CROWD)),
    "requeue_tasks": _plain(lambda it: it.store.requeue_tasks(CROWD)),
    "history": _plain(lambda it: it.store.history(it.large.task_id)),
    "watch": _plain(lambda it: _all_of(it.store.watch(since=0), it.many)),
    "refresh_from_database": _plain(lambda it: it.store.refresh_from_database()),
    "sync_to_database": _plain(lambda it: it.store.sync_to_database()),
    "backup": _plain(lambda it: it.store.db.backup(it.path())),
    "copy": _plain(_copy),
    "verify": _plain(lambda it: verify(it.store.db)),
    "diagnose": _plain(lambda it: diagnose(it.store.db)),
    "vacuum": _plain(lambda it: it.store.db.vacuum()),
    "compact_changes": _plain(lambda it: it.store.compact_changes(0)),
    "cleanup_old_tasks": WorstCall(
        lambda it, _: it.store.task_repo.cleanup_old_tasks(0),
        lambda it: it.store.cancel_tasks(CROWD),
    ),
}
"""By name, in the order of a run: later calls use the rows of earlier ones."""
