"""A catalogue with a call of each public coroutine, each on rows of its own."""

from __future__ import annotations

import inspect
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine
from contextlib import AsyncExitStack, aclosing, suppress
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any

from sqlalchemy import Connection, delete, func, select, update
from sqlalchemy.ext.asyncio import AsyncSession

import openclaw_store
from campaigns.workloads.fixture import Fixture
from openclaw_store import (
    Clusters,
    Database,
    DuplicateError,
    InvalidDataError,
    KeyRing,
    NodeFilter,
    NodeInfo,
    NodeRepository,
    NodeStatus,
    Progress,
    Retention,
    SchemaMismatchError,
    Server,
    Task,
    TaskFilter,
    TaskRepository,
    TaskStatus,
    Worker,
    copy,
    diagnose,
    open_archive,
    resolve,
    transaction,
    transfer,
    verify,
)
from openclaw_store.backends import shield_until_done
from openclaw_store.database.tables import (
    ArchiveRunRow,
    ArchiveVoidRow,
    ChangeRow,
    CounterRow,
    NodeRow,
    PastChangeRow,
    TaskRow,
)
from openclaw_store.encryption import key_file
from openclaw_store.repositories.batches import apply

Work = Callable[[Fixture], Awaitable[object]]


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
        if thing is openclaw_store.KeyProvider:
            continue  # a protocol, implemented by callers
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


async def _ask_to_cancel(fixture: Fixture) -> None:
    await fixture.manager.cancel_task(fixture.id("running"), "not needed", grace_seconds=3600)


async def _work(fixture: Fixture) -> None:
    """Run a worker that is stopped at once."""
    worker = Worker(fixture.manager, fixture.node("busy"), lambda task, run: None, grace_seconds=0)
    worker.stop()
    await worker.run()


async def hold_unsaved(fixture: Fixture) -> None:
    """Create a task that is only in memory."""
    fixture.tasks["unsaved"] = fixture.task("unsaved", user_id=fixture.id("user"))
    await fixture.manager.add_task(fixture.tasks["unsaved"], persist=False)


async def _open_and_close(fixture: Fixture) -> None:
    """Open and close the manager; it must be usable, however an earlier opening ended."""
    await fixture.other.initialize()
    await fixture.other.add_task(fixture.task("elsewhere"))
    await fixture.other.remove_task(fixture.id("elsewhere"))
    await fixture.other.shutdown()


async def _open_and_close_database(fixture: Fixture) -> None:
    await fixture.other.db.initialize()
    await fixture.other.task_repo.count_by_status()
    await fixture.other.db.close()


async def _enter(fixture: Fixture) -> None:
    async with fixture.other:
        await fixture.other.get_state()


async def _enter_database(fixture: Fixture) -> None:
    async with fixture.other.db:
        await fixture.other.task_repo.count_by_status()


async def _session(fixture: Fixture) -> None:
    async with fixture.db.session() as session:
        await _count(session)
        await TaskRepository(session).get(fixture.id("waiting"))


async def _read_in(fixture: Fixture) -> None:
    async with fixture.db.session() as session:
        await fixture.db.read_in(session, _count)


async def _transaction(fixture: Fixture) -> None:
    async with fixture.db.transaction() as tx:
        await TaskRepository(tx).create(fixture.task("new"))
        await TaskRepository(tx).update(fixture.changed("waiting"))
        await TaskRepository(tx).complete(fixture.tasks["running"])
        await _count(tx)
        await NodeRepository(tx).update_status(fixture.id("gone"), NodeStatus.MAINTENANCE)


async def _joined(fixture: Fixture) -> None:
    """Write in the transaction of a session of the caller's own engine."""
    session, has_written = fixture.own_session, False
    try:
        async with fixture.db.joined(session) as tx:
            await TaskRepository(tx).create(fixture.task("new"))
        has_written = True
    finally:  # the end of the caller's transaction is not the store's
        await shield_until_done(session.commit() if has_written else session.rollback())


async def _connect_own_session(fixture: Fixture) -> None:
    await fixture.own_session.connection()


async def _over_clusters(fixture: Fixture) -> None:
    async with transaction(fixture.db) as (tx,):
        await TaskRepository(tx).create(fixture.task("new"))


async def _transfer(fixture: Fixture) -> None:
    async with Database(fixture.folder / "target.db") as target:
        await transfer(fixture.db, target, TaskFilter(user=fixture.id("user")), dry_run=True)


async def _write_in(fixture: Fixture) -> None:
    async with fixture.db.transaction() as tx:
        await fixture.db.write_in(tx, apply, fixture.creation())


_PROGRESS = Progress(1, 0.5, "half", datetime(2026, 3, 1, tzinfo=UTC))


async def _report_progress(fixture: Fixture) -> None:
    await fixture.manager.renew_lease(fixture.id("busy"), {fixture.id("running"): _PROGRESS})


async def _watch_progress(fixture: Fixture) -> None:
    found: Any = fixture.manager.watch_progress(fixture.id("running"))
    async with aclosing(found):
        await anext(found, None)  # other calls may end the task


async def _watch(fixture: Fixture) -> None:
    changes: Any = fixture.manager.watch(since=fixture.revision)
    async with aclosing(changes):
        async for change in changes:
            if change.item_id == fixture.id("ending") and change.to_status == "cancelled":
                break


async def _find_task(fixture: Fixture) -> Task | None:
    async with open_archive(fixture.folder / "archive") as archive:
        return await fixture.manager.find_task(fixture.id("done"), archive)


async def _count_archived(fixture: Fixture) -> int:
    async with open_archive(fixture.folder / "archive") as archive:
        return await archive.count_tasks()


async def _collect(tasks: AsyncIterator[Task]) -> list[Task]:
    return [task async for task in tasks]


async def _empty_target(fixture: Fixture) -> None:
    """Empty the target of a copy, unless it holds an interrupted copy."""
    async with AsyncExitStack() as stack:
        try:
            target = await stack.enter_async_context(Database(fixture.target))
        except SchemaMismatchError:
            return
        tx = await stack.enter_async_context(target.transaction())
        for row in (TaskRow, NodeRow, ChangeRow, PastChangeRow, ArchiveRunRow, ArchiveVoidRow):
            await tx.execute(delete(row))
        await tx.execute(update(CounterRow).values(beat=0, compacted=0))


async def _copy(fixture: Fixture) -> None:
    target = Database(fixture.target)
    try:
        await copy(fixture.db, target)
    finally:
        await target.close()


def _clusters(fixture: Fixture) -> Clusters:
    """Return the clusters of the manager's server, or of a folder beside its file."""
    is_file = fixture.db.dialect == "sqlite"
    return Clusters(fixture.folder / "{cluster}.db" if is_file else fixture.location)


def _server(fixture: Fixture) -> Server:
    """Return the server of the manager, or a folder beside its file."""
    is_file = fixture.db.dialect == "sqlite"
    return Server(fixture.folder / "{cluster}.db" if is_file else fixture.location)


async def _use_server(fixture: Fixture) -> None:
    async with _server(fixture) as server, server.cluster("berlin") as database:
        await database.get_stats()


async def _with_clusters(fixture: Fixture) -> None:
    """Have one cluster to rename or drop, and none that a former call has made."""
    clusters = _clusters(fixture)
    for name in await clusters.names():
        await clusters.drop(name, force=True)
    await clusters.create("berlin")


async def _move(fixture: Fixture) -> None:
    with suppress(InvalidDataError):  # without Citus there is nothing to move
        await _clusters(fixture).move("berlin", "nowhere:1")


async def _rekey(fixture: Fixture) -> None:
    path, file = fixture.folder / fixture.id("sealed.db"), fixture.folder / fixture.id("keys.json")
    if not file.exists():
        key_file.create(file)
    async with Database(path, keys=KeyRing.load(file)) as database:
        with suppress(DuplicateError):  # an interrupted call has added it
            await TaskRepository(database).create(fixture.task("sealed"))
        key_file.add(file)
    async with Database(path, keys=KeyRing.load(file)) as database:
        assert await database.rekey()


async def _unlock(fixture: Fixture) -> None:
    file = fixture.folder / fixture.id("unlocked.json")
    if not file.exists():
        key_file.create(file)
    await KeyRing.load(file).unlock()


CALLS: dict[str, Call] = {
    "Clusters.create": Call(
        lambda fixture: _clusters(fixture).create("tokyo"), _with_clusters, is_slow=True
    ),
    "Clusters.drop": Call(
        lambda fixture: _clusters(fixture).drop("berlin"), _with_clusters, is_slow=True
    ),
    "Clusters.list": Call(lambda fixture: _clusters(fixture).list()),
    "Clusters.move": Call(_move, _with_clusters, is_slow=True),
    "Clusters.names": Call(lambda fixture: _clusters(fixture).names()),
    "Clusters.rename": Call(
        lambda fixture: _clusters(fixture).rename("berlin", "tokyo"), _with_clusters, is_slow=True
    ),
    "Database.__aenter__": Call(_enter_database, after=lambda fixture: fixture.other.db.close()),
    "Database.__aexit__": Call(
        lambda fixture: fixture.other.db.__aexit__(None, None, None),
        lambda fixture: fixture.other.db.initialize(),
        lambda fixture: fixture.other.db.close(),
        is_open=True,
    ),
    "Database.alter": Call(lambda fixture: fixture.db.alter(_count_at_once), is_slow=True),
    "Database.backup": Call(
        lambda fixture: fixture.db.backup(fixture.folder / fixture.id("backup")), is_slow=True
    ),
    "Database.close": Call(
        lambda fixture: fixture.other.db.close(),
        lambda fixture: fixture.other.db.initialize(),
        lambda fixture: fixture.other.db.close(),
        is_open=True,
    ),
    "Database.get_stats": Call(lambda fixture: fixture.db.get_stats()),
    "Database.initialize": Call(
        lambda fixture: fixture.other.db.initialize(), after=_open_and_close_database
    ),
    "Database.inspect": Call(lambda fixture: fixture.db.inspect(_count_at_once)),
    "Database.joined": Call(
        _joined,
        _connect_own_session,
        lambda fixture: fixture.own_session.close(),
        lingers=True,  # a notification tells the cache after the commit
    ),
    "Database.read": Call(lambda fixture: fixture.db.read(_count)),
    "Database.read_in": Call(_read_in),
    "Database.rekey": Call(_rekey, is_slow=True),
    "Database.session": Call(_session),
    "Database.transaction": Call(_transaction),
    "Database.vacuum": Call(lambda fixture: fixture.db.vacuum(), is_slow=True),
    "Database.write": Call(lambda fixture: fixture.db.write(apply, fixture.creation())),
    "Database.write_in": Call(_write_in),
    "KeyRing.unlock": Call(_unlock),
    "NodeRepository.create": Call(
        lambda fixture: fixture.node_repo.create(fixture.node("newcomer"))
    ),
    "NodeRepository.delete": Call(lambda fixture: fixture.node_repo.delete(fixture.id("gone"))),
    "NodeRepository.find_by_skill": Call(
        lambda fixture: fixture.node_repo.find_by_skill(fixture.id("skill"))
    ),
    "NodeRepository.find_stale_nodes": Call(lambda fixture: fixture.node_repo.find_stale_nodes()),
    "NodeRepository.get": Call(lambda fixture: fixture.node_repo.get(fixture.id("busy"))),
    "NodeRepository.get_all_nodes": Call(lambda fixture: fixture.node_repo.get_all_nodes()),
    "NodeRepository.get_available_nodes": Call(
        lambda fixture: fixture.node_repo.get_available_nodes()
    ),
    "NodeRepository.get_record": Call(
        lambda fixture: fixture.node_repo.get_record(fixture.id("busy"))
    ),
    "NodeRepository.list_by_status": Call(
        lambda fixture: fixture.node_repo.list_by_status(NodeStatus.OFFLINE)
    ),
    "NodeRepository.list_nodes": Call(
        lambda fixture: fixture.node_repo.list_nodes(NodeFilter(has_free_slots=True))
    ),
    "NodeRepository.list_online_nodes": Call(lambda fixture: fixture.node_repo.list_online_nodes()),
    "NodeRepository.register": Call(
        lambda fixture: fixture.node_repo.register(fixture.node("lost"))
    ),
    "NodeRepository.update": Call(
        lambda fixture: fixture.node_repo.update(fixture.changed_node("gone"))
    ),
    "NodeRepository.update_heartbeat": Call(
        lambda fixture: fixture.node_repo.update_heartbeat(fixture.id("gone"))
    ),
    "NodeRepository.update_status": Call(
        lambda fixture: fixture.node_repo.update_status(fixture.id("gone"), NodeStatus.MAINTENANCE)
    ),
    "Server.__aenter__": Call(lambda fixture: _server(fixture).__aenter__()),
    "Server.__aexit__": Call(_use_server, _with_clusters, is_slow=True),
    "Server.close": Call(lambda fixture: _server(fixture).close()),
    "StateManager.__aenter__": Call(_enter, after=lambda fixture: fixture.other.shutdown()),
    "StateManager.__aexit__": Call(
        lambda fixture: fixture.other.__aexit__(None, None, None),
        lambda fixture: fixture.other.initialize(),
        lambda fixture: fixture.other.shutdown(),
        is_open=True,
    ),
    "StateManager.add_node": Call(
        lambda fixture: fixture.manager.add_node(fixture.node("newcomer"))
    ),
    "StateManager.acknowledge_cancel": Call(
        lambda fixture: fixture.manager.acknowledge_cancel(fixture.tasks["running"]), _ask_to_cancel
    ),
    "StateManager.add_task": Call(lambda fixture: fixture.manager.add_task(fixture.task("new"))),
    "StateManager.add_task, of one in memory": Call(
        lambda fixture: fixture.manager.add_task(fixture.task("new"), persist=False), lingers=True
    ),
    "StateManager.add_tasks": Call(
        lambda fixture: fixture.manager.add_tasks([fixture.task("new"), fixture.task("another")])
    ),
    "StateManager.cancel_task": Call(
        lambda fixture: fixture.manager.cancel_task(fixture.id("running"))
    ),
    "StateManager.cancel_tasks": Call(
        lambda fixture: fixture.manager.cancel_tasks(TaskFilter(user=fixture.id("user"))),
        hold_unsaved,
        in_parts=True,
    ),
    "StateManager.change_node": Call(
        lambda fixture: fixture.manager.change_node(fixture.id("busy"), _rename)
    ),
    "StateManager.change_task": Call(
        lambda fixture: fixture.manager.change_task(fixture.id("waiting"), _rename)
    ),
    "StateManager.change_task, of one in memory": Call(
        lambda fixture: fixture.manager.change_task(fixture.id("unsaved"), _rename),
        hold_unsaved,
    ),
    "StateManager.change_tasks": Call(
        lambda fixture: fixture.manager.change_tasks(
            TaskFilter(user=fixture.id("user"), status=TaskStatus.PENDING), _rename
        ),
        hold_unsaved,
        in_parts=True,
    ),
    "StateManager.check_stale_nodes": Call(
        lambda fixture: fixture.manager.check_stale_nodes(), in_parts=True
    ),
    "StateManager.claim_tasks": Call(
        lambda fixture: fixture.manager.claim_tasks(fixture.id("busy"), 2)
    ),
    "StateManager.compact_changes": Call(
        lambda fixture: fixture.manager.compact_changes(days=0), in_parts=True, keeps_feed=False
    ),
    "StateManager.complete_task": Call(
        lambda fixture: fixture.manager.complete_task(fixture.tasks["running"], {"rows": 1})
    ),
    "StateManager.count_tasks": Call(
        lambda fixture: fixture.manager.count_tasks(TaskFilter(user=fixture.id("user")))
    ),
    "StateManager.drain_node": Call(
        lambda fixture: fixture.manager.drain_node(fixture.id("busy"), "new disk")
    ),
    "StateManager.explain_task": Call(
        lambda fixture: fixture.manager.explain_task(fixture.id("done"))
    ),
    "StateManager.fail_task": Call(
        lambda fixture: fixture.manager.fail_task(fixture.tasks["running"], "it broke")
    ),
    "StateManager.apply_retention": Call(
        lambda fixture: fixture.manager.apply_retention(
            Retention(cancelled=timedelta(days=30), archive=fixture.folder / "archive")
        ),
        in_parts=True,
    ),
    "StateManager.find_task": Call(lambda fixture: _find_task(fixture)),
    "StateManager.restore_tasks": Call(
        lambda fixture: fixture.manager.restore_tasks(
            TaskFilter(user=fixture.id("user")), fixture.folder / "archive"
        ),
        in_parts=True,
    ),
    "open_archive": Call(lambda fixture: _count_archived(fixture)),
    "StateManager.find_nodes_by_skill": Call(
        lambda fixture: fixture.manager.find_nodes_by_skill(fixture.id("skill"))
    ),
    "StateManager.get_all_nodes": Call(lambda fixture: fixture.manager.get_all_nodes()),
    "StateManager.get_available_nodes": Call(lambda fixture: fixture.manager.get_available_nodes()),
    "StateManager.get_node": Call(lambda fixture: fixture.manager.get_node(fixture.id("nobody"))),
    "StateManager.get_node_stats": Call(lambda fixture: fixture.manager.get_node_stats()),
    "StateManager.get_online_nodes": Call(lambda fixture: fixture.manager.get_online_nodes()),
    "StateManager.get_pending_tasks": Call(lambda fixture: fixture.manager.get_pending_tasks(None)),
    "StateManager.get_state": Call(lambda fixture: fixture.manager.get_state()),
    "StateManager.get_stats": Call(lambda fixture: fixture.manager.get_stats()),
    "StateManager.get_task": Call(lambda fixture: fixture.manager.get_task(fixture.id("nothing"))),
    "StateManager.get_task_stats": Call(lambda fixture: fixture.manager.get_task_stats()),
    "StateManager.get_tasks": Call(
        lambda fixture: fixture.manager.get_tasks([fixture.id("done"), fixture.id("nothing")])
    ),
    "StateManager.get_lease": Call(lambda fixture: fixture.manager.get_lease(fixture.id("busy"))),
    "StateManager.get_progress": Call(
        lambda fixture: fixture.manager.get_progress(fixture.id("running"))
    ),
    "StateManager.history": Call(lambda fixture: fixture.manager.history(fixture.id("waiting"))),
    "StateManager.initialize": Call(
        lambda fixture: fixture.other.initialize(), after=_open_and_close
    ),
    "StateManager.iter_tasks": Call(
        lambda fixture: _collect(fixture.manager.iter_tasks(TaskFilter(user=fixture.id("user"))))
    ),
    "StateManager.list_nodes": Call(
        lambda fixture: fixture.manager.list_nodes(NodeFilter(skill=fixture.id("skill")))
    ),
    "StateManager.list_tasks": Call(
        lambda fixture: fixture.manager.list_tasks(TaskFilter(user=fixture.id("user")))
    ),
    "StateManager.list_waiting": Call(lambda fixture: fixture.manager.list_waiting()),
    "StateManager.recover": Call(lambda fixture: fixture.manager.recover(), in_parts=True),
    "StateManager.refresh_from_database": Call(
        lambda fixture: fixture.manager.refresh_from_database()
    ),
    "StateManager.register_node": Call(
        lambda fixture: fixture.manager.register_node(fixture.node("busy"))
    ),
    "StateManager.release_task": Call(
        lambda fixture: fixture.manager.release_task(fixture.tasks["running"])
    ),
    "StateManager.remove_node": Call(
        lambda fixture: fixture.manager.remove_node(fixture.id("busy"))
    ),
    "StateManager.remove_task": Call(
        lambda fixture: fixture.manager.remove_task(fixture.id("running"))
    ),
    "StateManager.remove_task, of one in memory": Call(
        lambda fixture: fixture.manager.remove_task(fixture.id("unsaved")),
        hold_unsaved,
    ),
    "StateManager.requeue_task": Call(
        lambda fixture: fixture.manager.requeue_task(fixture.id("done"))
    ),
    "StateManager.requeue_tasks": Call(
        lambda fixture: fixture.manager.requeue_tasks(
            TaskFilter(user=fixture.id("user"), status=TaskStatus.COMPLETED)
        ),
        in_parts=True,
    ),
    "StateManager.remove_tasks": Call(
        lambda fixture: fixture.manager.remove_tasks(TaskFilter(user=fixture.id("user"))),
        hold_unsaved,
        in_parts=True,
    ),
    "StateManager.renew_lease": Call(
        lambda fixture: fixture.manager.renew_lease(
            fixture.id("gone"), {fixture.id("running"): _PROGRESS}
        ),
        in_parts=True,  # the heartbeat, and the progress
        lingers=True,
    ),
    "StateManager.resume_node": Call(
        lambda fixture: fixture.manager.resume_node(fixture.id("busy")),
        lambda fixture: fixture.manager.drain_node(fixture.id("busy")),
    ),
    "StateManager.shutdown": Call(
        lambda fixture: fixture.other.shutdown(),
        lambda fixture: fixture.other.initialize(),
        lambda fixture: fixture.other.shutdown(),
        is_open=True,
    ),
    "StateManager.start_task": Call(
        lambda fixture: fixture.manager.start_task(fixture.tasks["held"])
    ),
    "StateManager.submit_task": Call(
        lambda fixture: fixture.manager.submit_task(fixture.task("new"))
    ),
    "StateManager.submit_task, of one that is there": Call(
        lambda fixture: fixture.manager.submit_task(
            fixture.task("new", idempotency_key=fixture.id("key"))
        )
    ),
    "StateManager.sync_to_database": Call(
        lambda fixture: fixture.manager.sync_to_database(), hold_unsaved, lingers=True
    ),
    "StateManager.update_heartbeat": Call(
        lambda fixture: fixture.manager.update_heartbeat(fixture.id("gone"), 7.0), lingers=True
    ),
    "StateManager.update_node": Call(
        lambda fixture: fixture.manager.update_node(fixture.changed_node("busy"))
    ),
    "StateManager.update_node_status": Call(
        lambda fixture: fixture.manager.update_node_status(
            fixture.id("busy"), NodeStatus.MAINTENANCE
        )
    ),
    "StateManager.update_task": Call(
        lambda fixture: fixture.manager.update_task(fixture.changed("waiting"))
    ),
    "StateManager.update_task, of one in memory": Call(
        lambda fixture: fixture.manager.update_task(fixture.changed("unsaved")),
        hold_unsaved,
    ),
    "StateManager.wait_for_task": Call(
        lambda fixture: fixture.manager.wait_for_task(fixture.id("ending"))
    ),
    "StateManager.watch": Call(_watch),
    "StateManager.watch_progress": Call(_watch_progress, _report_progress),
    "TaskRepository.acknowledge_cancel": Call(
        lambda fixture: fixture.task_repo.acknowledge_cancel(fixture.tasks["running"]),
        _ask_to_cancel,
    ),
    "TaskRepository.cancel": Call(lambda fixture: fixture.task_repo.cancel(fixture.id("running"))),
    "TaskRepository.claim": Call(lambda fixture: fixture.task_repo.claim(fixture.id("busy"), 2)),
    "TaskRepository.cleanup_old_tasks": Call(lambda fixture: fixture.task_repo.cleanup_old_tasks()),
    "TaskRepository.complete": Call(
        lambda fixture: fixture.task_repo.complete(fixture.tasks["running"])
    ),
    "TaskRepository.count_by_status": Call(lambda fixture: fixture.task_repo.count_by_status()),
    "TaskRepository.count_old_tasks": Call(lambda fixture: fixture.task_repo.count_old_tasks()),
    "TaskRepository.count_tasks": Call(
        lambda fixture: fixture.task_repo.count_tasks(TaskFilter(user=fixture.id("user")))
    ),
    "TaskRepository.create": Call(lambda fixture: fixture.task_repo.create(fixture.task("new"))),
    "TaskRepository.delete": Call(lambda fixture: fixture.task_repo.delete(fixture.id("running"))),
    "TaskRepository.fail": Call(
        lambda fixture: fixture.task_repo.fail(fixture.tasks["running"], "it broke")
    ),
    "TaskRepository.get": Call(lambda fixture: fixture.task_repo.get(fixture.id("waiting"))),
    "TaskRepository.get_record": Call(
        lambda fixture: fixture.task_repo.get_record(fixture.id("waiting"))
    ),
    "TaskRepository.get_records": Call(
        lambda fixture: fixture.task_repo.get_records([fixture.id("waiting")])
    ),
    "TaskRepository.get_tasks": Call(
        lambda fixture: fixture.task_repo.get_tasks([fixture.id("waiting")])
    ),
    "TaskRepository.iter_tasks": Call(lambda fixture: _collect(fixture.task_repo.iter_tasks())),
    "TaskRepository.list_by_node": Call(
        lambda fixture: fixture.task_repo.list_by_node(fixture.id("busy"))
    ),
    "TaskRepository.list_by_status": Call(
        lambda fixture: fixture.task_repo.list_by_status(TaskStatus.PENDING)
    ),
    "TaskRepository.list_by_user": Call(
        lambda fixture: fixture.task_repo.list_by_user(fixture.id("user"))
    ),
    "TaskRepository.list_pending_tasks": Call(
        lambda fixture: fixture.task_repo.list_pending_tasks()
    ),
    "TaskRepository.list_records": Call(
        lambda fixture: fixture.task_repo.list_records(None, after=None, limit=5)
    ),
    "TaskRepository.list_tasks": Call(lambda fixture: fixture.task_repo.list_tasks()),
    "TaskRepository.list_waiting": Call(lambda fixture: fixture.task_repo.list_waiting()),
    "TaskRepository.list_expired": Call(lambda fixture: fixture.task_repo.list_expired()),
    "TaskRepository.next_due_at": Call(
        lambda fixture: fixture.task_repo.next_due_at(fixture.db.clock())
    ),
    "TaskRepository.release": Call(
        lambda fixture: fixture.task_repo.release(fixture.tasks["running"])
    ),
    "TaskRepository.requeue": Call(lambda fixture: fixture.task_repo.requeue(fixture.id("done"))),
    "TaskRepository.start": Call(lambda fixture: fixture.task_repo.start(fixture.tasks["held"])),
    "TaskRepository.update": Call(
        lambda fixture: fixture.task_repo.update(fixture.changed("waiting"))
    ),
    # A cancelled worker leaves its node as it is: the next registration releases the tasks.
    "Worker.run": Call(
        _work,
        after=lambda fixture: fixture.manager.register_node(fixture.node("busy"), replaced=None),
        in_parts=True,
        keeps_feed=False,
        lingers=True,
    ),
    "copy": Call(_copy, _empty_target, is_slow=True),
    "diagnose": Call(lambda fixture: diagnose(fixture.db)),
    "resolve": Call(lambda fixture: resolve(fixture.db)),
    "transaction": Call(_over_clusters),
    "transfer": Call(_transfer, is_slow=True),
    "verify": Call(lambda fixture: verify(fixture.db)),
}
"""All calls, by the name of the coroutine and, if needed, of the special case."""
