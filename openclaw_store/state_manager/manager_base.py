"""Start and shutdown of a `StateManager`, and the parts that its calls share."""

from __future__ import annotations

import asyncio
import inspect
import math
import os
from abc import abstractmethod
from collections.abc import Awaitable, Callable
from contextvars import Context
from threading import get_ident
from typing import Any, Self
from weakref import WeakSet

from openclaw_store.backends import was_interrupted
from openclaw_store.database import Database
from openclaw_store.domain import (
    DEFAULT_BACKOFF,
    KEY,
    Backoff,
    Entity,
    Record,
    Retention,
    check_count,
    write_back,
)
from openclaw_store.errors import (
    InvalidDataError,
    UnavailableError,
    UnsavedConflictError,
    logger_of,
    safe_repr,
)
from openclaw_store.repositories import NodeRepository, Repository, TaskRepository, admit_entity
from openclaw_store.state_manager.direct_access import DirectAccess
from openclaw_store.state_manager.replica import Replica
from openclaw_store.state_manager.scheduler import Scheduler

logger = logger_of("state_manager")

_managers: WeakSet[ManagerBase] = WeakSet()


def _disown_managers() -> None:
    """Mark all managers as inherited, in a forked child: they belong to the parent."""
    for manager in _managers:
        manager._thread, manager._is_inherited = None, True


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_disown_managers)


class ManagerBase:
    """Open and close a `StateManager`; check that it can be used."""

    def __init__(
        self,
        database: Database,
        auto_sync_interval: float | None = 30,
        *,
        cache: bool = True,
        finished_cache_size: int = 10_000,
        wake_ups: bool = True,
        backoff: Backoff = DEFAULT_BACKOFF,
        retention: Retention | None = None,
    ) -> None:
        if not isinstance(database, Database):
            wanted = 'must be a Database, as Database("./data/cluster.db")'
            raise InvalidDataError("database", f"{wanted}, not {type(database).__name__}")
        if retention is not None and not isinstance(retention, Retention):
            raise InvalidDataError("retention", f"must be a Retention, not {safe_repr(retention)}")
        if auto_sync_interval is not None and (
            isinstance(auto_sync_interval, bool)
            or not isinstance(auto_sync_interval, int | float)
            or not 0 < auto_sync_interval < math.inf
        ):
            raise InvalidDataError(
                "auto_sync_interval",
                f"must be seconds above 0, or None, not {safe_repr(auto_sync_interval)}",
            )
        self.db = database
        self.task_repo = TaskRepository(database, backoff)
        self.node_repo = NodeRepository(database)
        self._backoff = backoff
        self._interval = auto_sync_interval
        self._retention = retention
        self._retention_loop: asyncio.Task[None] | None = None
        self._opened_archive: Any = None
        self._wake_ups = wake_ups
        limit = check_count("finished_cache_size", finished_cache_size)
        access = Replica if cache else DirectAccess
        self._replica = access(database, self.task_repo, self.node_repo, limit)
        self._scheduler = Scheduler(self._replica, backoff)
        self._loop: asyncio.AbstractEventLoop | None = None  # its event loop, once initialized
        self._is_running: Callable[[], bool] = bool  # `is_running` of that loop; false until then
        self._thread: int | None = None  # the thread of its event loop, while it can be used
        self._life = asyncio.Lock()  # locked by `initialize` and by the shutdown
        self._sync_loop: asyncio.Task[None] | None = None
        self._ending: asyncio.Future[None] | None = None
        self._is_inherited = False
        _managers.add(self)
        for one in database.writer.telemetry:
            one.attach(self)

    def __repr__(self) -> str:
        closed = "not initialized" if self._ending is None else "shut down"
        state = f"version {self.version}" if self.is_initialized else closed
        return f"<StateManager of {self.db!r}, {state}>"

    async def initialize(self) -> bool:
        """Open the database, load the state and start the synchronisation; return `True`.

        Raises:
            SchemaMismatchError: If the database is newer than the library.
            UnavailableError: If the database cannot be opened.
        """
        async with self._life:
            if self._ending is not None:
                raise UnavailableError("the StateManager was shut down: make a new one")
            if self._thread is None:
                self._loop = asyncio.get_running_loop()
                self._is_running = self._loop.is_running
                await self.db.initialize()
                if not self._wake_ups:
                    self.db.write_without_notifications()
                await self._replica.start()
                self._replica.slices = self.db.slices
                # Only now: from here on, calls are accepted.
                self._thread = get_ident()
                if self._retention is not None:
                    work = self._retain_every(self._retention)
                    self._retention_loop = self._loop.create_task(work, context=Context())
                if self._interval is not None:
                    # An empty context: that of the caller may have a transaction, which forbids
                    # writing.
                    self._sync_loop = self._loop.create_task(
                        self._sync_every(self._interval), context=Context()
                    )
                    if self._wake_ups:
                        Context().run(self._replica.follow)
        return True

    async def shutdown(self) -> None:
        """Synchronise for the last time and close the database; may be called twice.

        If the call is interrupted, by Ctrl-C for example, the next call completes it.

        Raises:
            UnavailableError: If the manager belongs to another event loop, which is still open.
            StoreError: If an entry could not be written; everything is closed nevertheless.
        """
        if self._is_inherited:
            return  # the parent process shuts it down
        if self._ending is None or was_interrupted(self._ending):
            _refuse_elsewhere(self._loop)
            if self._loop is not None and self._loop.is_closed():
                self._life = asyncio.Lock()  # a holder on the closed loop never releases it
            self._ending = asyncio.ensure_future(self._shutdown())
        elif not self._ending.done():
            _refuse_elsewhere(self._ending.get_loop())
        await asyncio.shield(self._ending)

    async def _shutdown(self) -> None:
        async with self._life:
            try:
                await self._stop()
            except Exception:
                await self.db.close()
                raise
            await self.db.close()

    async def _stop(self) -> None:
        try:
            if self._loop is None:
                return  # never initialized
            if self._loop.is_closed():
                await self._replica.abandon()
                return
            loops = [one for one in (self._sync_loop, self._retention_loop) if one is not None]
            for one in loops:
                one.cancel()
            if loops:
                await asyncio.wait(loops)
            await self._replica.stop()
        finally:
            self._thread = None

    async def __aenter__(self) -> Self:
        try:
            await self.initialize()
        except BaseException:
            await self.shutdown()
            raise
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.shutdown()

    @property
    def is_initialized(self) -> bool:
        """True between `initialize` and `shutdown`."""
        return self._thread is not None

    @property
    def version(self) -> int:
        """Revision of the newest change in memory; survives a restart."""
        return self._replica.version

    @property
    def cached_tasks(self) -> int:
        """Number of tasks in memory."""
        count: int = self._replica.cache.sizes()["cached_tasks"]
        return count

    @abstractmethod
    async def _retain_every(self, retention: Retention) -> None:
        """Apply a policy again and again; `ArchiveCalls` defines it."""

    async def _sync_every(self, seconds: float) -> None:
        while True:
            await asyncio.sleep(seconds)
            for work in (self._replica.sync, self._replica.refresh):
                try:
                    await work()
                except UnsavedConflictError:
                    continue  # the log has each conflict
                except Exception:  # the loop must survive the errors of a round
                    logger.exception("a synchronisation failed; the next is in %g s", seconds)

    async def _change(
        self, repository: Repository[Entity], id: str, fn: Callable[[Entity], object]
    ) -> Entity | None:
        self._check_usable()
        change = self._change_by(repository, fn)
        changed = await self._replica.change((repository.kind, id), change)
        return None if changed is None else (await self._replica.slices.copies([changed]))[0]

    def _change_by(
        self, repository: Repository[Entity], fn: Callable[[Entity], object]
    ) -> Callable[[Record[Entity]], Awaitable[Record[Entity]]]:
        """Return a function that returns the record which `fn` makes of another one."""
        if not callable(fn):
            raise InvalidDataError("fn", f"must be a function, not {type(fn).__name__}")

        async def change(known: Record[Entity]) -> Record[Entity]:
            [copy] = await self._replica.slices.copies([known])
            result = fn(copy)
            if inspect.isawaitable(result):
                if inspect.iscoroutine(result):
                    result.close()
                raise InvalidDataError("fn", "must be a plain function, not a coroutine function")
            changed = await admit_entity(repository, copy, known)
            if changed.id != known.id:
                raise InvalidDataError(
                    KEY[repository.kind], f"must not be changed, from {known.id!r}"
                )
            return changed

        return change

    async def _update(self, repository: Repository[Entity], entity: Entity, persist: bool) -> bool:
        self._check_usable()
        id = getattr(entity, KEY[repository.kind], None)
        known = self._replica.cache.find((repository.kind, id)) if type(id) is str else None
        update = self._replica.update if persist else self._replica.write_behind.update
        write_back(await update(await admit_entity(repository, entity, known)), entity)
        return True

    def _check_usable(self) -> None:
        # `get_running_loop` takes as long as the rest of a read, because it asks the system for the
        # process. Only one loop runs in a thread at a time, so this condition is equivalent.
        if self._thread != get_ident() or not self._is_running():
            if self._is_inherited:
                raise UnavailableError(
                    "the StateManager was made before fork: make a new one in the child"
                )
            if self._thread is not None:
                raise UnavailableError(
                    "a StateManager belongs to one event loop, the one that opened it: make "
                    "another StateManager for this one, or run all in one asyncio.run()"
                )
            if self._ending is not None:
                raise UnavailableError("the StateManager was shut down: make a new one")
            raise UnavailableError(
                "the StateManager is not initialized: use `async with`, or call initialize() first"
            )


def _refuse_elsewhere(loop: asyncio.AbstractEventLoop | None) -> None:
    """Refuse a call that belongs to another event loop, unless that loop was closed."""
    if loop is not None and loop is not asyncio.get_running_loop() and not loop.is_closed():
        raise UnavailableError("a StateManager belongs to one event loop: shut it down there")
