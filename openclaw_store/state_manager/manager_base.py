"""Life of a StateManager, and the parts that its calls share."""

from __future__ import annotations

import asyncio
import inspect
import logging
import math
import os
from collections.abc import Awaitable, Callable, Sequence
from contextvars import Context
from threading import get_ident
from types import TracebackType
from typing import Self, TypeVar
from weakref import WeakSet

from openclaw_store.backends import was_interrupted
from openclaw_store.database import Database
from openclaw_store.domain import (
    DEFAULT_BACKOFF,
    KEY,
    Backoff,
    Entity,
    Record,
    admit,
    check_count,
)
from openclaw_store.errors import (
    InvalidDataError,
    UnavailableError,
    UnsavedConflictError,
    safe_repr,
)
from openclaw_store.repositories import (
    NodeRepository,
    Repository,
    TaskRepository,
)
from openclaw_store.state_manager.replica import Replica
from openclaw_store.state_manager.scheduler import Scheduler

logger = logging.getLogger("openclaw_store.state_manager")

T = TypeVar("T")

COPIES = 100  # copied at a stretch, before other coroutines run


_managers: WeakSet[ManagerBase] = WeakSet()


def _disown_managers() -> None:
    """In a forked child, the managers are the parent's."""
    for manager in _managers:
        manager._thread, manager._is_inherited = None, True


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_disown_managers)


class ManagerBase:
    """Open and close a StateManager; check that it may be used."""

    def __init__(
        self,
        database: Database,
        auto_sync_interval: float | None = 30,
        *,
        finished_cache_size: int = 10_000,
        wake_ups: bool = True,
        backoff: Backoff = DEFAULT_BACKOFF,
    ) -> None:
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
        self._wake_ups = wake_ups
        self._replica = Replica(database, check_count("finished_cache_size", finished_cache_size))
        self._scheduler = Scheduler(
            database, self._replica, self.task_repo, self.node_repo, backoff
        )
        self._loop: asyncio.AbstractEventLoop | None = None  # the one it belongs to
        self._is_running: Callable[[], bool] = bool  # whether that one is: there is none yet
        self._thread: int | None = None  # in which its event loop runs, while it may be used
        self._life = asyncio.Lock()  # one begins or ends it at a time
        self._sync_loop: asyncio.Task[None] | None = None
        self._ending: asyncio.Future[None] | None = None
        self._is_inherited = False
        _managers.add(self)

    def __repr__(self) -> str:
        state = f"version {self.version}" if self.is_initialized else "not initialized"
        return f"<StateManager of {self.db!r}, {state}>"

    async def initialize(self) -> bool:
        """Open the database, load the state and start the synchronisation; `True`.

        Raises:
            SchemaMismatchError: If the database is newer than the library.
            UnavailableError: If it cannot be opened.
        """
        async with self._life:
            if self._ending is not None:
                raise UnavailableError("the StateManager was shut down: make a new one")
            if self._thread is None:
                self._loop = asyncio.get_running_loop()
                self._is_running = self._loop.is_running
                await self.db.initialize()
                await self._replica.start()
                self._thread = get_ident()
                if self._interval is not None:
                    self._sync_loop = self._loop.create_task(
                        self._sync_every(self._interval), context=Context()
                    )
                    if self._wake_ups:
                        Context().run(self._replica.follow)
        return True

    async def shutdown(self) -> None:
        """Synchronise for the last time and close the database; may be called twice.

        If it was interrupted, by Ctrl-C say, the next call goes on with what is left.

        Raises:
            UnavailableError: If it is called on another event loop, as long as its own is there.
            StoreError: If something could not be written; everything is closed all the same.
        """
        if self._is_inherited:
            return  # it is the parent's
        if self._ending is None or was_interrupted(self._ending):
            _refuse_elsewhere(self._loop)
            if self._loop is not None and self._loop.is_closed():
                self._life = asyncio.Lock()  # who has it there never lets go
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
                return  # it never was initialized
            if self._loop.is_closed():
                await self._replica.abandon()
                return
            if self._sync_loop is not None:
                self._sync_loop.cancel()
                await asyncio.wait([self._sync_loop])
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

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        await self.shutdown()

    @property
    def is_initialized(self) -> bool:
        """Whether it can be used: initialised, and not shut down."""
        return self._thread is not None

    @property
    def version(self) -> int:
        """Revision of the newest change in memory; survives a restart."""
        return self._replica.cache.applied.version

    async def _sync_every(self, seconds: float) -> None:
        while True:
            await asyncio.sleep(seconds)
            for work in (self._replica.sync, self._replica.refresh):
                try:
                    await work()
                except UnsavedConflictError:
                    continue  # each of them is in the log
                except Exception:  # the loop must outlive whatever a round meets
                    logger.exception("a synchronisation failed; the next is in %g s", seconds)

    async def _change(
        self, repository: Repository[Entity], id: str, fn: Callable[[Entity], object]
    ) -> Entity | None:
        self._check_usable()
        if not callable(fn):
            raise InvalidDataError("fn", f"must be a function, not {type(fn).__name__}")

        def change(known: Record[Entity]) -> Record[Entity]:
            copy = known.copy()
            result = fn(copy)
            if inspect.isawaitable(result):
                if inspect.iscoroutine(result):
                    result.close()
                raise InvalidDataError("fn", "must be a plain function, not a coroutine function")
            return admit(repository.kind, copy, self.db.clock, known)

        changed = await self._replica.change((repository.kind, id), change)
        return None if changed is None else changed.copy()

    def _update(self, record: Record[Entity], persist: bool) -> Awaitable[Record[Entity]]:
        if persist:
            return self._replica.update(record)
        return self._replica.write_behind.update(record)

    def _encode_known(self, kind: type[Entity], item: Entity) -> Record[Entity]:
        """Check what is given back beside what is in memory of it."""
        id = getattr(item, KEY[kind], None)
        known = self._replica.cache.find((kind, id)) if type(id) is str else None
        return admit(kind, item, self.db.clock, known)

    def _check_usable(self) -> None:
        # Asking for the running loop asks the system for the process, which costs as much as all
        # the rest of a look-up; this asks the same: of one thread, one loop runs at a time.
        if self._thread != get_ident() or not self._is_running():
            if self._is_inherited:
                raise UnavailableError(
                    "the StateManager was made before fork: make a new one in the child"
                )
            if self._thread is not None:
                raise UnavailableError("a StateManager belongs to one event loop: make another")
            if self._ending is not None:
                raise UnavailableError("the StateManager was shut down: make a new one")
            raise UnavailableError("the StateManager is not initialized: call initialize() first")


def _refuse_elsewhere(loop: asyncio.AbstractEventLoop | None) -> None:
    """Refuse what can only be done on an event loop that is there, but is not the running one."""
    if loop is not None and loop is not asyncio.get_running_loop() and not loop.is_closed():
        raise UnavailableError("a StateManager belongs to one event loop: shut it down there")


async def copies(items: Sequence[T], copy: Callable[[T], Entity]) -> list[Entity]:
    """Copies for the caller; of a long list in slices, between which others run."""
    copies: list[Entity] = []
    for start in range(0, len(items), COPIES):
        if start:
            await asyncio.sleep(0)
        copies.extend(map(copy, items[start : start + COPIES]))
    return copies
