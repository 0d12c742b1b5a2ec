"""A catalogue of the public calls that read or write an open store, each with its preparation."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from contextlib import aclosing
from dataclasses import dataclass, replace
from datetime import timedelta
from functools import partial
from itertools import count
from operator import attrgetter
from pathlib import Path
from typing import Any

from sqlalchemy import func, select

from openclaw_store import (
    Database,
    NodeFilter,
    NodeInfo,
    NodeRepository,
    NodeStatus,
    Progress,
    Retention,
    StateManager,
    Task,
    TaskFilter,
    TaskRepository,
    TaskStatus,
    copy,
    diagnose,
    open_archive,
    verify,
)
from openclaw_store.archive.retain import Retained
from openclaw_store.database import TaskRow
from openclaw_store.testing import FakeClock, NodeFactory, TaskFactory

Make = Callable[[], Awaitable[Any]]
"""Makes the call; it can be repeated and has the same meaning each time."""


class Store:
    """An open store, with methods that create rows for a call."""

    def __init__(self, state: StateManager, clock: FakeClock, folder: Path) -> None:
        self.state, self.clock, self.folder = state, clock, folder
        self.db, self.tasks, self.nodes = state.db, state.task_repo, state.node_repo
        self.make_task, self.make_node = TaskFactory(clock), NodeFactory(clock)
        self._numbers = count(1)

    async def task(self, **fields: Any) -> Task:
        """Create a task in the database."""
        task = self.make_task(**fields)
        await self.state.add_task(task)
        return task

    async def node(self, **fields: Any) -> NodeInfo:
        """Create a node in the database, with a skill that no other node has."""
        number = next(self._numbers)
        fields = {"available_skills": [f"skill-{number}"], "last_heartbeat": self.clock(), **fields}
        node = self.make_node(**fields)
        await self.state.add_node(node)
        return node

    async def waiting(self, how_many: int = 1) -> NodeInfo:
        """Create a node for which that many tasks wait; no other node can run them."""
        node = await self.node()
        for _ in range(how_many):
            await self.task(required_skills=node.available_skills)
        return node

    async def claimed(self, **fields: Any) -> Task:
        """Create a task that a node has claimed."""
        node = await self.node()
        await self.task(required_skills=node.available_skills, **fields)
        [task] = await self.state.claim_tasks(node.node_id)
        return task

    async def finished(self, **fields: Any) -> Task:
        """Create a completed task."""
        task = await self.claimed(**fields)
        await self.state.start_task(task)
        return await self.state.complete_task(task, {"rows": 42})

    def path(self, name: str) -> Path:
        """Return a path where no file is yet."""
        return self.folder / f"{name}-{next(self._numbers)}.db"


Prepare = Callable[[Store], Awaitable[Make]]


@dataclass(frozen=True)
class PublicCall:
    """A public call, and its properties."""

    name: str
    prepare: Prepare
    """Creates the rows that the call needs, and returns the call."""
    in_batches: bool = False
    """True if it may be done in part when it raises; then it can be repeated."""
    is_exact: bool = True
    """True if it gives the same answer when repeated without a write in between."""
    is_kept: bool = False
    """True if the cache shows a change that could not be written, and a later call writes it."""
    makes_copy: bool = False
    """True if it creates a file with the same content."""


CALLS: list[PublicCall] = []


def public(name: str = "", *, row: str = "", **fields: bool) -> Callable[[Prepare], Prepare]:
    """Register the preparation of a call, named after it by default.

    Args:
        row: The method of a repository with the same arguments, which is registered, too; then the
            preparation must return a `partial`.
    """

    def listed(prepare: Prepare) -> Prepare:
        own = name or prepare.__name__.removeprefix("_")
        CALLS.append(PublicCall(own, prepare, **fields))

        async def prepare_row(store: Store) -> Make:
            made = await prepare(store)
            assert isinstance(made, partial)
            return partial(attrgetter(row)(store.state), *made.args)

        if row:
            CALLS.append(PublicCall(row, prepare_row, **fields))
        return prepare

    return listed


def rename(item: Task | NodeInfo) -> None:
    """Change a field that no rule depends on."""
    if isinstance(item, Task):
        item.name = "renamed"
    else:
        item.hostname = "renamed"


@public(row="task_repo.create")
async def _add_task(store: Store) -> Make:
    task = store.make_task(parameters={"text": "x" * 6000})
    return partial(store.state.add_task, task)


@public(row="task_repo.update")
async def _update_task(store: Store) -> Make:
    task = await store.task()
    rename(task)
    return partial(store.state.update_task, task)


@public()
async def _change_task(store: Store) -> Make:
    task = await store.task()
    return lambda: store.state.change_task(task.task_id, rename)


@public(row="task_repo.delete")
async def _remove_task(store: Store) -> Make:
    task = await store.claimed()
    return partial(store.state.remove_task, task.task_id)


@public()
async def _submit_task(store: Store) -> Make:
    task = store.make_task()
    task.idempotency_key = task.task_id
    return lambda: store.state.submit_task(task)


@public("submit_task, once more")
async def _submit_task_again(store: Store) -> Make:
    task = store.make_task()
    task.idempotency_key = task.task_id
    await store.state.submit_task(task)
    twin = store.make_task(idempotency_key=task.task_id)
    return lambda: store.state.submit_task(twin)


@public()
async def _add_tasks(store: Store) -> Make:
    tasks = [store.make_task() for _ in range(3)]
    return lambda: store.state.add_tasks(tasks)


@public(in_batches=True)
async def _cancel_tasks(store: Store) -> Make:
    user = store.make_task().task_id
    for _ in range(3):
        await store.task(user_id=user)
    return lambda: store.state.cancel_tasks(TaskFilter(user=user), "not needed any more")


@public(in_batches=True)
async def _remove_tasks(store: Store) -> Make:
    user = store.make_task().task_id
    for _ in range(3):
        await store.task(user_id=user)
    return lambda: store.state.remove_tasks(TaskFilter(user=user))


@public(in_batches=True)
async def _requeue_tasks(store: Store) -> Make:
    user = store.make_task().task_id
    for _ in range(3):
        await store.task(user_id=user, status=TaskStatus.FAILED)
    return lambda: store.state.requeue_tasks(TaskFilter(user=user))


@public(in_batches=True)
async def _change_tasks(store: Store) -> Make:
    user = store.make_task().task_id
    for _ in range(3):
        await store.task(user_id=user)
    return lambda: store.state.change_tasks(TaskFilter(user=user), rename)


@public(row="task_repo.get_tasks")
async def _get_tasks(store: Store) -> Make:
    tasks = [await store.finished() for _ in range(3)]
    return partial(store.state.get_tasks, [task.task_id for task in tasks])


@public(row="task_repo.count_tasks")
async def _count_tasks(store: Store) -> Make:
    return partial(store.state.count_tasks, TaskFilter(status=TaskStatus.PENDING))


@public(row="task_repo.claim")
async def _claim_tasks(store: Store) -> Make:
    node = await store.waiting(2)
    return partial(store.state.claim_tasks, node.node_id, 2)


@public(row="task_repo.start")
async def _start_task(store: Store) -> Make:
    task = await store.claimed()
    return partial(store.state.start_task, task)


@public(row="task_repo.complete")
async def _complete_task(store: Store) -> Make:
    task = await store.claimed()
    return partial(store.state.complete_task, task, {"rows": 42})


@public(row="task_repo.fail")
async def _fail_task(store: Store) -> Make:
    task = await store.claimed()
    return partial(store.state.fail_task, task, "it went wrong")


@public(row="task_repo.release")
async def _release_task(store: Store) -> Make:
    task = await store.claimed()
    return partial(store.state.release_task, task, "deployment")


@public(row="task_repo.acknowledge_cancel")
async def _acknowledge_cancel(store: Store) -> Make:
    task = await store.state.start_task(await store.claimed())
    await store.state.cancel_task(task.task_id, "enough", grace_seconds=3600)
    return partial(store.state.acknowledge_cancel, task)


@public(row="task_repo.cancel")
async def _cancel_task(store: Store) -> Make:
    task = await store.claimed()
    return partial(store.state.cancel_task, task.task_id, "not needed any more")


@public(row="task_repo.requeue")
async def _requeue_task(store: Store) -> Make:
    task = await store.finished()
    return partial(store.state.requeue_task, task.task_id)


@public(in_batches=True)
async def _recover(store: Store) -> Make:
    await store.state.recover(10**6)
    task = await store.claimed()
    assert task.assigned_node is not None
    await store.state.update_node_status(task.assigned_node, NodeStatus.OFFLINE)
    return lambda: store.state.recover(10**6)


@public(row="node_repo.create")
async def _add_node(store: Store) -> Make:
    node = store.make_node()
    return partial(store.state.add_node, node)


@public(row="node_repo.register")
async def _register_node(store: Store) -> Make:
    task = await store.claimed()
    node = store.make_node(node_id=task.assigned_node)
    return partial(store.state.register_node, node)


@public(row="node_repo.update")
async def _update_node(store: Store) -> Make:
    node = await store.node()
    rename(node)
    return partial(store.state.update_node, node)


@public()
async def _change_node(store: Store) -> Make:
    node = await store.node()
    return lambda: store.state.change_node(node.node_id, rename)


@public(row="node_repo.delete")
async def _remove_node(store: Store) -> Make:
    node = await store.node()
    return partial(store.state.remove_node, node.node_id)


@public(row="node_repo.update_status")
async def _update_node_status(store: Store) -> Make:
    node = await store.node()
    return partial(store.state.update_node_status, node.node_id, NodeStatus.ERROR)


@public()
async def _drain_node(store: Store) -> Make:
    node = await store.node()
    return lambda: store.state.drain_node(node.node_id, "new disk")


@public()
async def _resume_node(store: Store) -> Make:
    node = await store.node(status=NodeStatus.MAINTENANCE)
    return lambda: store.state.resume_node(node.node_id)


@public("renew_lease, of an OFFLINE node")
async def _renew_lease(store: Store) -> Make:
    node = await store.node(status=NodeStatus.OFFLINE)
    store.clock.advance(1)
    return lambda: store.state.renew_lease(
        node.node_id, {"task": Progress(1, 0.5, "half", store.clock())}
    )


@public()
async def _get_lease(store: Store) -> Make:
    task = await store.claimed()
    return lambda: store.state.get_lease(task.assigned_node or "")


@public()
async def _get_progress(store: Store) -> Make:
    task = await store.claimed()
    return lambda: store.state.get_progress(task.task_id)


@public()
async def _watch_progress(store: Store) -> Make:
    task = await store.state.start_task(await store.claimed())
    progress = {task.task_id: Progress(task.attempt, 0.5, "half", store.clock())}
    await store.state.renew_lease(task.assigned_node or "", progress)

    async def first() -> Any:
        async with aclosing(store.state.watch_progress(task.task_id)) as found:  # type: ignore[type-var]  # it is a generator
            return await anext(found)

    return first


@public("update_heartbeat, of an OFFLINE node", is_kept=True)
async def _update_heartbeat(store: Store) -> Make:
    node = await store.node(status=NodeStatus.OFFLINE)
    store.clock.advance(1)
    return lambda: store.state.update_heartbeat(node.node_id, cpu_usage=50)


@public(in_batches=True)
async def _check_stale_nodes(store: Store) -> Make:
    store.clock.advance(1)
    await store.state.check_stale_nodes(0.5)
    await store.node()
    store.clock.advance(1)
    return lambda: store.state.check_stale_nodes(0.5)


@public(in_batches=True, is_kept=True)
async def _sync_to_database(store: Store) -> Make:
    node = await store.node()
    store.clock.advance(1)
    await store.state.update_heartbeat(node.node_id, cpu_usage=50)
    await store.state.add_task(store.make_task(), persist=False)
    return store.state.sync_to_database


@public(in_batches=True)
async def _compact_changes(store: Store) -> Make:
    await store.task()
    store.clock.advance(1)
    await store.task()
    return lambda: store.state.compact_changes(0.5 / 86_400)


@public("task_repo.cleanup_old_tasks", in_batches=True)
async def _clean_up(store: Store) -> Make:
    store.clock.advance(1)
    await store.tasks.cleanup_old_tasks(0)
    await store.finished()
    store.clock.advance(1)
    return lambda: store.tasks.cleanup_old_tasks(0.5 / 86_400)


@public("transaction")
async def _in_transaction(store: Store) -> Make:
    task, node = store.make_task(), await store.node()
    rename(node)

    async def together() -> None:
        async with store.db.transaction() as tx:
            await TaskRepository(tx).create(task)
            await NodeRepository(tx).update(node)

    return together


@public("node_repo.update_heartbeat")
async def _beat_of_row(store: Store) -> Make:
    node = await store.node()
    store.clock.advance(1)
    return lambda: store.nodes.update_heartbeat(node.node_id)


@public("task_repo.get")
async def _get_task_row(store: Store) -> Make:
    task = await store.task()
    return lambda: store.tasks.get(task.task_id)


@public("get_task, of one that is not in memory")
async def _get_task(store: Store) -> Make:
    tasks = [await store.finished() for _ in range(3)]
    return lambda: store.state.get_task(tasks[0].task_id)


@public("get_node, of one that there is not")
async def _get_node(store: Store) -> Make:
    return lambda: store.state.get_node("nobody")


@public()
async def _list_tasks(store: Store) -> Make:
    return lambda: store.state.list_tasks(TaskFilter(status=TaskStatus.PENDING), limit=5)


@public()
async def _find_task(store: Store) -> Make:
    task = await store.task()

    async def find() -> Task | None:
        async with open_archive(store.folder / "archive") as archive:
            return await store.state.find_task(task.task_id, archive)

    return find


@public(in_batches=True)
async def _apply_retention(store: Store) -> Make:
    policy = Retention(cancelled=timedelta(days=30), archive=store.folder / "archive")

    async def apply() -> Retained:
        return replace(await store.state.apply_retention(policy), seconds=0)  # it varies

    return apply


@public(in_batches=True)
async def _restore_tasks(store: Store) -> Make:
    user = TaskFilter(user="nobody")
    return lambda: store.state.restore_tasks(user, store.folder / "archive")


@public()
async def _explain_task(store: Store) -> Make:
    task = await store.task(required_skills=["missing skill"])
    return lambda: store.state.explain_task(task.task_id)


@public()
async def _history(store: Store) -> Make:
    task = await store.finished()
    return lambda: store.state.history(task.task_id)


@public("history, of a task that was removed")
async def _history_of_removed(store: Store) -> Make:
    task = await store.task()
    await store.state.remove_task(task.task_id)
    return lambda: store.state.history(task.task_id)


@public()
async def _wait_for_task(store: Store) -> Make:
    tasks = [await store.finished() for _ in range(3)]
    return lambda: store.state.wait_for_task(tasks[0].task_id, 5)


@public()
async def _watch(store: Store) -> Make:
    since = store.state.version
    await store.task()

    async def first() -> Any:
        async with aclosing(store.state.watch(since)) as changes:  # type: ignore[type-var]  # it is a generator
            return await anext(changes)

    return first


@public()
async def _refresh_from_database(store: Store) -> Make:
    return store.state.refresh_from_database


@public(is_exact=False)
async def _get_stats(store: Store) -> Make:
    return store.state.get_stats


@public("session")
async def _in_session(store: Store) -> Make:
    async def count_tasks() -> Any:
        async with store.db.session() as session:
            return await session.scalar(select(func.count(TaskRow.name)))

    return count_tasks


@public("verify", is_exact=False)
async def _verified(store: Store) -> Make:
    return lambda: verify(store.db)


@public("diagnose", is_exact=False)
async def _diagnosed(store: Store) -> Make:
    return lambda: diagnose(store.db)


FROM_MEMORY = frozenset(
    {
        "get_state", "get_task_stats", "get_node_stats", "get_pending_tasks", "get_all_nodes",
        "get_online_nodes", "get_available_nodes", "find_nodes_by_skill", "list_nodes",
        "list_waiting",
    }
)  # fmt: skip
"""Calls that need no database."""

READS: Sequence[tuple[str, Callable[[Store], Make]]] = (
    ("task_repo.list_by_status", lambda s: lambda: s.tasks.list_by_status(TaskStatus.PENDING, 5)),
    ("task_repo.list_by_node", lambda s: lambda: s.tasks.list_by_node("node-0001")),
    ("task_repo.list_by_user", lambda s: lambda: s.tasks.list_by_user("nobody")),
    ("task_repo.list_pending_tasks", lambda s: lambda: s.tasks.list_pending_tasks(5)),
    ("task_repo.count_by_status", lambda s: s.tasks.count_by_status),
    ("task_repo.count_old_tasks", lambda s: s.tasks.count_old_tasks),
    ("task_repo.list_tasks", lambda s: lambda: s.tasks.list_tasks(limit=5)),
    ("task_repo.list_waiting", lambda s: lambda: s.tasks.list_waiting(5)),
    ("node_repo.list_nodes", lambda s: lambda: s.nodes.list_nodes(NodeFilter(tag="x"))),
    ("node_repo.get", lambda s: lambda: s.nodes.get("node-0001")),
    ("node_repo.get_all_nodes", lambda s: s.nodes.get_all_nodes),
    ("node_repo.list_online_nodes", lambda s: s.nodes.list_online_nodes),
    ("node_repo.list_by_status", lambda s: lambda: s.nodes.list_by_status(NodeStatus.ERROR)),
    ("node_repo.find_stale_nodes", lambda s: s.nodes.find_stale_nodes),
    ("node_repo.find_by_skill", lambda s: lambda: s.nodes.find_by_skill("skill-1")),
    ("node_repo.get_available_nodes", lambda s: s.nodes.get_available_nodes),
)
"""Methods of the repositories that need no rows."""


def _prepared(call_of: Callable[[Store], Make]) -> Prepare:
    async def prepare(store: Store) -> Make:
        return call_of(store)

    return prepare


CALLS += [PublicCall(name, _prepared(call_of)) for name, call_of in READS]


@public()
async def _vacuum(store: Store) -> Make:
    return store.db.vacuum


@public(makes_copy=True)
async def _backup(store: Store) -> Make:
    path = store.path("backup")
    return lambda: store.db.backup(path)


@public("copy", is_exact=False, makes_copy=True)
async def _copied(store: Store) -> Make:
    path = store.path("copy")

    async def to_another() -> None:
        target = Database(path, timeout=store.db.timeout, clock=store.clock)
        try:
            await copy(store.db, target)
        finally:
            await target.close()

    return to_another
