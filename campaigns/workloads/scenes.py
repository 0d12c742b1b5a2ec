"""A catalogue with a call of each public coroutine, each on rows of its own."""

from __future__ import annotations

import inspect
from collections.abc import Awaitable, Callable, Coroutine
from contextlib import AsyncExitStack, aclosing
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from functools import cached_property, partial
from pathlib import Path
from typing import Any

from sqlalchemy import Connection, func, select, text
from sqlalchemy.ext.asyncio import AsyncSession

import openclaw_store
from campaigns.harness.campaign import Location
from openclaw_store import (
    Database,
    NodeInfo,
    NodeRepository,
    NodeStatus,
    SchemaMismatchError,
    StateManager,
    Task,
    TaskFilter,
    TaskRepository,
    TaskStatus,
    TaskType,
    copy,
    diagnose,
    verify,
)
from openclaw_store.database.tables import TaskRow
from openclaw_store.repositories.base import admit
from openclaw_store.repositories.commands import Create
from openclaw_store.repositories.unit_of_work import apply


class Scene:
    """The tasks and nodes of one call.

    Args:
        manager: The manager of the call.
        number: A unique number, which ends all identifiers of the fixture.
        location: The database of the manager.
        target: A location with an empty database, or with an interrupted copy.
        folder: An empty folder for files.
    """

    def __init__(
        self,
        manager: StateManager,
        number: int,
        location: Location,
        target: Location,
        folder: Path,
    ) -> None:
        self.manager, self.number = manager, number
        self.location, self.target, self.folder = location, target, folder
        self.revision = manager.version
        """The revision before the fixture was created."""
        self.db = manager.db
        self.task_repo, self.node_repo = manager.task_repo, manager.node_repo
        self.tasks: dict[str, Task] = {}
        """Tasks that exist before the call, by role."""
        self.nodes: dict[str, NodeInfo] = {}
        self._prepare()

    @cached_property
    def other(self) -> StateManager:
        """A second manager on the same database, not opened yet."""
        return StateManager(Database(self.location))

    def id(self, role: str) -> str:
        """Return the identifier for a role."""
        return f"{role}-{self.number}"

    def task(self, role: str, **fields: Any) -> Task:
        """Return a new task."""
        return Task(self.id(role), TaskType.BATCH, "as it was", **fields)

    def node(self, role: str, **fields: Any) -> NodeInfo:
        """Return a new node."""
        return NodeInfo(self.id(role), "host", **fields)

    def changed(self, role: str) -> Task:
        """Return an existing task with another name."""
        return replace(self.tasks[role], name="changed")

    def changed_node(self, role: str) -> NodeInfo:
        """Return an existing node with another name."""
        return replace(self.nodes[role], hostname="changed")

    def creation(self) -> Create[Task]:
        """Return the operation that adds a task."""
        return Create(
            Task, self.id("new"), admit(Task, self.task("new"), partial(datetime.now, UTC))
        )

    def _prepare(self) -> None:
        now = datetime.now(UTC)
        before, long_ago = now - timedelta(hours=1), now - timedelta(days=40)
        skill, user, busy, lost = map(self.id, ("skill", "user", "busy", "lost"))
        skilled: dict[str, Any] = {"required_skills": [skill], "user_id": user}
        held: dict[str, Any] = {"attempt": 1, "scheduled_at": before}
        running: dict[str, Any] = {**held, "status": TaskStatus.RUNNING, "started_at": before}
        self.nodes = {
            "busy": self.node(
                "busy",
                last_heartbeat=now,
                max_concurrent_tasks=10,
                running_tasks=2,
                available_skills=[skill],
            ),
            "lost": self.node("lost", last_heartbeat=before, running_tasks=1),
            "silent": self.node("silent", last_heartbeat=before),
            "gone": self.node("gone", status=NodeStatus.OFFLINE),
        }
        self.tasks = {
            "waiting": self.task("waiting", **skilled),
            "spare": self.task("spare", **skilled),
            "keyed": self.task("keyed", required_skills=["none"], idempotency_key=self.id("key")),
            "ending": self.task("ending", required_skills=["none"]),
            "held": self.task("held", status=TaskStatus.SCHEDULED, assigned_node=busy, **held),
            "running": self.task("running", assigned_node=busy, **running),
            "late": self.task("late", assigned_node=lost, **running),
            "done": self.task(
                "done", status=TaskStatus.COMPLETED, submitted_at=long_ago, completed_at=long_ago
            ),
        }


NEIGHBOURS = ("ending", "neighbour", "second", "third", "next")
"""Tasks that other callers write, at the same moment as the call, and next."""

TASK_ROLES = (
    "waiting", "spare", "keyed", "held", "running", "late", "done", "unsaved", "new", "another",
    *NEIGHBOURS,
)  # fmt: skip
"""Tasks of a fixture that exist, or may exist."""

NODE_ROLES = ("busy", "lost", "silent", "gone", "newcomer")
"""Nodes of a fixture."""

Work = Callable[[Scene], Awaitable[object]]


@dataclass(frozen=True)
class Call:
    """A call, and its properties."""

    make: Work
    before: Work | None = None
    """Work before the call, never cancelled."""
    after: Work | None = None
    """Work after the call, cancelled or not."""
    in_parts: bool = False
    """True if it uses several transactions, and can be repeated for the rest."""
    keeps_feed: bool = True
    """True if the feed contains its changes."""
    lingers: bool = False
    """True if its changes may be only in memory at first, and be written later."""
    is_slow: bool = False
    """True if it is so slow that a short run leaves it out."""
    is_open: bool = False
    """True if `Fixture.other` is open, so that concurrent callers use it, too."""


def public_coroutines() -> set[str]:
    """Find all public coroutines, context managers and iterators of the library by inspection."""
    found: set[str] = set()
    for name in openclaw_store.__all__:
        thing = getattr(openclaw_store, name)
        if inspect.isclass(thing):
            for attribute, member in inspect.getmembers(thing, inspect.isfunction):
                is_public = not attribute.startswith("_") or attribute in _ENTRANCES
                is_alias = member.__name__ != attribute
                if is_public and not is_alias and _is_awaited(member):
                    found.add(f"{name}.{attribute}")
        elif inspect.isfunction(thing) and _is_awaited(thing):
            found.add(name)
    return found


_ENTRANCES = ("__aenter__", "__aexit__", "__aiter__", "__anext__", "__await__")


def _is_awaited(function: Callable[..., Any]) -> bool:
    if inspect.iscoroutinefunction(function):
        return True
    gives = str(inspect.signature(function).return_annotation)
    return gives.startswith(("Async", "Await", "Coroutine"))


def _count(session: AsyncSession) -> Coroutine[Any, Any, int | None]:
    return session.scalar(select(func.count()).select_from(TaskRow))


def _count_at_once(connection: Connection) -> int | None:
    return connection.scalar(select(func.count()).select_from(TaskRow))


def _rename(item: Task | NodeInfo) -> None:
    if isinstance(item, Task):
        item.name = "changed"
    else:
        item.hostname = "changed"


async def hold_unsaved(scene: Scene) -> None:
    """Create a task that is only in memory."""
    scene.tasks["unsaved"] = scene.task("unsaved", user_id=scene.id("user"))
    await scene.manager.add_task(scene.tasks["unsaved"], persist=False)


async def _open_and_close(scene: Scene) -> None:
    """Open and close the manager; it must be usable, however an earlier opening ended."""
    await scene.other.initialize()
    await scene.other.add_task(scene.task("elsewhere"))
    await scene.other.remove_task(scene.id("elsewhere"))
    await scene.other.shutdown()


async def _open_and_close_database(scene: Scene) -> None:
    await scene.other.db.initialize()
    await scene.other.task_repo.count_by_status()
    await scene.other.db.close()


async def _enter(scene: Scene) -> None:
    async with scene.other:
        await scene.other.get_state()


async def _enter_database(scene: Scene) -> None:
    async with scene.other.db:
        await scene.other.task_repo.count_by_status()


async def _session(scene: Scene) -> None:
    async with scene.db.session() as session:
        await _count(session)
        await TaskRepository(session).get(scene.id("waiting"))


async def _read_in(scene: Scene) -> None:
    async with scene.db.session() as session:
        await scene.db.read_in(session, _count)


async def _transaction(scene: Scene) -> None:
    async with scene.db.transaction() as tx:
        await TaskRepository(tx).create(scene.task("new"))
        await TaskRepository(tx).update(scene.changed("waiting"))
        await TaskRepository(tx).complete(scene.tasks["running"])
        await _count(tx)
        await NodeRepository(tx).update_status(scene.id("gone"), NodeStatus.MAINTENANCE)


async def _write_in(scene: Scene) -> None:
    async with scene.db.transaction() as tx:
        await scene.db.write_in(tx, apply, scene.creation())


async def _watch(scene: Scene) -> None:
    changes: Any = scene.manager.watch(since=scene.revision)
    async with aclosing(changes):
        async for change in changes:
            if change.item_id == scene.id("ending") and change.to_status == "cancelled":
                break


async def _empty_target(scene: Scene) -> None:
    """Empty the target of a copy, unless it holds an interrupted copy."""
    async with AsyncExitStack() as stack:
        try:
            target = await stack.enter_async_context(Database(scene.target))
        except SchemaMismatchError:
            return
        tx = await stack.enter_async_context(target.transaction())
        for table in ("tasks", "nodes", "changes"):
            await tx.execute(text(f"DELETE FROM {table}"))
        await tx.execute(text("UPDATE counters SET revision = 0, beat = 0, compacted = 0"))


async def _copy(scene: Scene) -> None:
    target = Database(scene.target)
    try:
        await copy(scene.db, target)
    finally:
        await target.close()


CALLS: dict[str, Call] = {
    "Database.__aenter__": Call(_enter_database, after=lambda scene: scene.other.db.close()),
    "Database.__aexit__": Call(
        lambda scene: scene.other.db.__aexit__(None, None, None),
        lambda scene: scene.other.db.initialize(),
        lambda scene: scene.other.db.close(),
        is_open=True,
    ),
    "Database.backup": Call(
        lambda scene: scene.db.backup(scene.folder / scene.id("backup")), is_slow=True
    ),
    "Database.close": Call(
        lambda scene: scene.other.db.close(),
        lambda scene: scene.other.db.initialize(),
        lambda scene: scene.other.db.close(),
        is_open=True,
    ),
    "Database.get_stats": Call(lambda scene: scene.db.get_stats()),
    "Database.initialize": Call(
        lambda scene: scene.other.db.initialize(), after=_open_and_close_database
    ),
    "Database.inspect": Call(lambda scene: scene.db.inspect(_count_at_once)),
    "Database.read": Call(lambda scene: scene.db.read(_count)),
    "Database.read_in": Call(_read_in),
    "Database.session": Call(_session),
    "Database.transaction": Call(_transaction),
    "Database.vacuum": Call(lambda scene: scene.db.vacuum(), is_slow=True),
    "Database.write": Call(lambda scene: scene.db.write(apply, scene.creation())),
    "Database.write_in": Call(_write_in),
    "NodeRepository.create": Call(lambda scene: scene.node_repo.create(scene.node("newcomer"))),
    "NodeRepository.delete": Call(lambda scene: scene.node_repo.delete(scene.id("gone"))),
    "NodeRepository.find_by_skill": Call(
        lambda scene: scene.node_repo.find_by_skill(scene.id("skill"))
    ),
    "NodeRepository.find_stale_nodes": Call(lambda scene: scene.node_repo.find_stale_nodes()),
    "NodeRepository.get": Call(lambda scene: scene.node_repo.get(scene.id("busy"))),
    "NodeRepository.get_all_nodes": Call(lambda scene: scene.node_repo.get_all_nodes()),
    "NodeRepository.get_available_nodes": Call(lambda scene: scene.node_repo.get_available_nodes()),
    "NodeRepository.get_record": Call(lambda scene: scene.node_repo.get_record(scene.id("busy"))),
    "NodeRepository.list_by_status": Call(
        lambda scene: scene.node_repo.list_by_status(NodeStatus.OFFLINE)
    ),
    "NodeRepository.list_online_nodes": Call(lambda scene: scene.node_repo.list_online_nodes()),
    "NodeRepository.register": Call(lambda scene: scene.node_repo.register(scene.node("lost"))),
    "NodeRepository.update": Call(lambda scene: scene.node_repo.update(scene.changed_node("gone"))),
    "NodeRepository.update_heartbeat": Call(
        lambda scene: scene.node_repo.update_heartbeat(scene.id("gone"))
    ),
    "NodeRepository.update_status": Call(
        lambda scene: scene.node_repo.update_status(scene.id("gone"), NodeStatus.MAINTENANCE)
    ),
    "StateManager.__aenter__": Call(_enter, after=lambda scene: scene.other.shutdown()),
    "StateManager.__aexit__": Call(
        lambda scene: scene.other.__aexit__(None, None, None),
        lambda scene: scene.other.initialize(),
        lambda scene: scene.other.shutdown(),
        is_open=True,
    ),
    "StateManager.add_node": Call(lambda scene: scene.manager.add_node(scene.node("newcomer"))),
    "StateManager.add_task": Call(lambda scene: scene.manager.add_task(scene.task("new"))),
    "StateManager.add_task, of one in memory": Call(
        lambda scene: scene.manager.add_task(scene.task("new"), persist=False), lingers=True
    ),
    "StateManager.add_tasks": Call(
        lambda scene: scene.manager.add_tasks([scene.task("new"), scene.task("another")])
    ),
    "StateManager.cancel_task": Call(lambda scene: scene.manager.cancel_task(scene.id("running"))),
    "StateManager.cancel_tasks": Call(
        lambda scene: scene.manager.cancel_tasks(TaskFilter(user=scene.id("user"))),
        hold_unsaved,
        in_parts=True,
    ),
    "StateManager.change_node": Call(
        lambda scene: scene.manager.change_node(scene.id("busy"), _rename)
    ),
    "StateManager.change_task": Call(
        lambda scene: scene.manager.change_task(scene.id("waiting"), _rename)
    ),
    "StateManager.change_task, of one in memory": Call(
        lambda scene: scene.manager.change_task(scene.id("unsaved"), _rename),
        hold_unsaved,
    ),
    "StateManager.check_stale_nodes": Call(
        lambda scene: scene.manager.check_stale_nodes(), in_parts=True
    ),
    "StateManager.claim_tasks": Call(lambda scene: scene.manager.claim_tasks(scene.id("busy"), 2)),
    "StateManager.compact_changes": Call(
        lambda scene: scene.manager.compact_changes(days=0), in_parts=True, keeps_feed=False
    ),
    "StateManager.complete_task": Call(
        lambda scene: scene.manager.complete_task(scene.tasks["running"], {"rows": 1})
    ),
    "StateManager.explain_task": Call(lambda scene: scene.manager.explain_task(scene.id("done"))),
    "StateManager.fail_task": Call(
        lambda scene: scene.manager.fail_task(scene.tasks["running"], "it broke")
    ),
    "StateManager.find_nodes_by_skill": Call(
        lambda scene: scene.manager.find_nodes_by_skill(scene.id("skill"))
    ),
    "StateManager.get_all_nodes": Call(lambda scene: scene.manager.get_all_nodes()),
    "StateManager.get_available_nodes": Call(lambda scene: scene.manager.get_available_nodes()),
    "StateManager.get_node": Call(lambda scene: scene.manager.get_node(scene.id("nobody"))),
    "StateManager.get_node_stats": Call(lambda scene: scene.manager.get_node_stats()),
    "StateManager.get_online_nodes": Call(lambda scene: scene.manager.get_online_nodes()),
    "StateManager.get_pending_tasks": Call(lambda scene: scene.manager.get_pending_tasks(None)),
    "StateManager.get_state": Call(lambda scene: scene.manager.get_state()),
    "StateManager.get_stats": Call(lambda scene: scene.manager.get_stats()),
    "StateManager.get_task": Call(lambda scene: scene.manager.get_task(scene.id("nothing"))),
    "StateManager.get_task_stats": Call(lambda scene: scene.manager.get_task_stats()),
    "StateManager.history": Call(lambda scene: scene.manager.history(scene.id("waiting"))),
    "StateManager.initialize": Call(lambda scene: scene.other.initialize(), after=_open_and_close),
    "StateManager.list_tasks": Call(
        lambda scene: scene.manager.list_tasks(TaskFilter(user=scene.id("user")))
    ),
    "StateManager.recover": Call(lambda scene: scene.manager.recover(), in_parts=True),
    "StateManager.refresh_from_database": Call(lambda scene: scene.manager.refresh_from_database()),
    "StateManager.register_node": Call(
        lambda scene: scene.manager.register_node(scene.node("busy"))
    ),
    "StateManager.remove_node": Call(lambda scene: scene.manager.remove_node(scene.id("busy"))),
    "StateManager.remove_task": Call(lambda scene: scene.manager.remove_task(scene.id("running"))),
    "StateManager.remove_task, of one in memory": Call(
        lambda scene: scene.manager.remove_task(scene.id("unsaved")),
        hold_unsaved,
    ),
    "StateManager.requeue_task": Call(lambda scene: scene.manager.requeue_task(scene.id("done"))),
    "StateManager.shutdown": Call(
        lambda scene: scene.other.shutdown(),
        lambda scene: scene.other.initialize(),
        lambda scene: scene.other.shutdown(),
        is_open=True,
    ),
    "StateManager.start_task": Call(lambda scene: scene.manager.start_task(scene.tasks["held"])),
    "StateManager.submit_task": Call(lambda scene: scene.manager.submit_task(scene.task("new"))),
    "StateManager.submit_task, of one that is there": Call(
        lambda scene: scene.manager.submit_task(scene.task("new", idempotency_key=scene.id("key")))
    ),
    "StateManager.sync_to_database": Call(
        lambda scene: scene.manager.sync_to_database(), hold_unsaved, lingers=True
    ),
    "StateManager.update_heartbeat": Call(
        lambda scene: scene.manager.update_heartbeat(scene.id("gone"), 7.0), lingers=True
    ),
    "StateManager.update_node": Call(
        lambda scene: scene.manager.update_node(scene.changed_node("busy"))
    ),
    "StateManager.update_node_status": Call(
        lambda scene: scene.manager.update_node_status(scene.id("busy"), NodeStatus.MAINTENANCE)
    ),
    "StateManager.update_task": Call(
        lambda scene: scene.manager.update_task(scene.changed("waiting"))
    ),
    "StateManager.update_task, of one in memory": Call(
        lambda scene: scene.manager.update_task(scene.changed("unsaved")),
        hold_unsaved,
    ),
    "StateManager.wait_for_task": Call(
        lambda scene: scene.manager.wait_for_task(scene.id("ending"))
    ),
    "StateManager.watch": Call(_watch),
    "TaskRepository.cancel": Call(lambda scene: scene.task_repo.cancel(scene.id("running"))),
    "TaskRepository.claim": Call(lambda scene: scene.task_repo.claim(scene.id("busy"), 2)),
    "TaskRepository.cleanup_old_tasks": Call(lambda scene: scene.task_repo.cleanup_old_tasks()),
    "TaskRepository.complete": Call(lambda scene: scene.task_repo.complete(scene.tasks["running"])),
    "TaskRepository.count_by_status": Call(lambda scene: scene.task_repo.count_by_status()),
    "TaskRepository.count_old_tasks": Call(lambda scene: scene.task_repo.count_old_tasks()),
    "TaskRepository.create": Call(lambda scene: scene.task_repo.create(scene.task("new"))),
    "TaskRepository.delete": Call(lambda scene: scene.task_repo.delete(scene.id("running"))),
    "TaskRepository.fail": Call(
        lambda scene: scene.task_repo.fail(scene.tasks["running"], "it broke")
    ),
    "TaskRepository.get": Call(lambda scene: scene.task_repo.get(scene.id("waiting"))),
    "TaskRepository.get_record": Call(
        lambda scene: scene.task_repo.get_record(scene.id("waiting"))
    ),
    "TaskRepository.list_by_node": Call(
        lambda scene: scene.task_repo.list_by_node(scene.id("busy"))
    ),
    "TaskRepository.list_by_status": Call(
        lambda scene: scene.task_repo.list_by_status(TaskStatus.PENDING)
    ),
    "TaskRepository.list_by_user": Call(
        lambda scene: scene.task_repo.list_by_user(scene.id("user"))
    ),
    "TaskRepository.list_pending_tasks": Call(lambda scene: scene.task_repo.list_pending_tasks()),
    "TaskRepository.list_tasks": Call(lambda scene: scene.task_repo.list_tasks()),
    "TaskRepository.requeue": Call(lambda scene: scene.task_repo.requeue(scene.id("done"))),
    "TaskRepository.start": Call(lambda scene: scene.task_repo.start(scene.tasks["held"])),
    "TaskRepository.update": Call(lambda scene: scene.task_repo.update(scene.changed("waiting"))),
    "copy": Call(_copy, _empty_target, is_slow=True),
    "diagnose": Call(lambda scene: diagnose(scene.db)),
    "verify": Call(lambda scene: verify(scene.db)),
}
"""All calls, by the name of the coroutine and, if needed, of the special case."""
