"""`DatabaseBase`: what a `Database` consists of, its opening and its end."""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import AsyncIterator, Callable, Coroutine
from contextlib import asynccontextmanager
from functools import partial
from pathlib import Path
from typing import Any, Self

from sqlalchemy.ext.asyncio import AsyncSession, async_sessionmaker

from openclaw_store.backends import (
    DEFAULT_ANSWER_SECONDS,
    DEFAULT_LOCATION,
    DEFAULT_TIMEOUT_SECONDS,
    PLACE,
    PostgreSQL,
    backend_of,
    shield_until_done,
    was_interrupted,
)
from openclaw_store.database import legacy_import, migrations, sealing
from openclaw_store.database.dialects import statements_for
from openclaw_store.database.group_commit import CLOSED, Apply, Writer
from openclaw_store.database.private_folder import private_folder
from openclaw_store.database.sealed_entities import open_when_loaded
from openclaw_store.database.sessions import LoopSessions, Pools
from openclaw_store.database.sharing import Sharing
from openclaw_store.database.slices import Slices
from openclaw_store.database.statements import Statements
from openclaw_store.database.transactions import current_blocks
from openclaw_store.database.write_queue import FairLock
from openclaw_store.domain import (
    MAX_JSON_BYTES,
    Clock,
    check_limit_seconds,
    check_positive,
    utc_now,
)
from openclaw_store.encryption import KeyRing, keys_of
from openclaw_store.errors import (
    DeadlineError,
    UnavailableError,
    logger_of,
)

logger = logger_of("database")

_forks = 0
"""Number of forks between the import of this module and this process."""


def _note_fork() -> None:
    global _forks
    _forks += 1


if hasattr(os, "register_at_fork"):  # cheaper than `os.getpid` in each call
    os.register_at_fork(after_in_child=_note_fork)


class DatabaseBase:
    """The parts of a `Database`, from its opening to its end."""

    def __init__(
        self,
        db_path: str | Path = DEFAULT_LOCATION,
        *,
        clock: Clock = utc_now,
        timeout: float = DEFAULT_TIMEOUT_SECONDS,
        answer_timeout: float = DEFAULT_ANSWER_SECONDS,
        transaction_timeout: float = 5.0,
        pool_size: int = 5,
        max_json_bytes: int = MAX_JSON_BYTES,
        legacy_timezone: str | None = None,
        cluster: str | None = None,
        keys: KeyRing | None = None,
    ) -> None:
        self.keys = keys_of(keys)
        self.max_json_bytes = check_positive("max_json_bytes", max_json_bytes, MAX_JSON_BYTES)
        self._legacy_timezone = legacy_import.zone_of(legacy_timezone)
        self.clock = clock
        self.timeout = timeout = check_limit_seconds("timeout", timeout)
        self.transaction_timeout = check_limit_seconds("transaction_timeout", transaction_timeout)
        self._pool_size = check_positive("pool_size", pool_size)
        self._remove_folder: Callable[[], object] = lambda: None
        location = db_path
        if db_path == ":memory:":
            folder, self._remove_folder = private_folder(self)
            location = folder / ("memory.db" if cluster is None else PLACE)
        answer_timeout = check_limit_seconds("answer_timeout", answer_timeout)
        self._backend = backend_of(location, timeout, answer_timeout, cluster)
        self._backend.make_folder()
        self.dialect, self.cluster = self._backend.dialect, cluster
        """`sqlite` or `postgresql`, and the name of the cluster."""
        self.schema = self._backend.schema
        """The schema of the tables, to be named in SQL text; `None` on SQLite."""
        is_given = self.dialect == "sqlite" and cluster is None
        self.db_path = str(db_path) if is_given else self._backend.location
        """The given location, without a password."""
        self._forks = _forks
        self._state = "new"
        self._write_lock = FairLock(timeout)
        self.statements: Statements = statements_for(self._backend)
        """The SQL of the library, and the codecs of rows, which seal and open values with keys."""
        self._writer = Writer(self._backend, self._write_lock, clock, timeout, self.statements)
        self._home: asyncio.AbstractEventLoop | None = None
        # Event loops in other threads change it: iterate over copies.
        self._loop_sessions: dict[asyncio.AbstractEventLoop, LoopSessions] = {}
        self._sharing: Sharing | None = None
        self._background: set[asyncio.Task[Any]] = set()  # `close` waits for these reads
        self._closing: asyncio.Future[None] | None = None

    def __repr__(self) -> str:
        return f"<Database {self.db_path!r}, {self._state}>"

    def share(self, sharing: Sharing) -> None:
        """Use the connections of a `Server`, which closes them; to be called before opening."""
        assert isinstance(self._backend, PostgreSQL)
        self._sharing = sharing
        self._backend.share(sharing.backend)
        self._writer.idle_seconds = sharing.idle_seconds

    async def initialize(self, migrate: bool = True, *, is_copy_target: bool = False) -> None:
        """Open the database; may be called twice.

        Args:
            migrate: Make or upgrade the schema; `False` refuses one that is not up to date.
            is_copy_target: Accept the target of an interrupted `copy`; for `copy` alone.

        Raises:
            SchemaMismatchError: If the schema is newer, or older and `migrate` is off.
            KeyRingError: If values are sealed by a key that is missing.
            UnavailableError: If the file cannot be used; with the remedy.
        """
        self._check_process()
        # Of several callers, the first one opens it, and the other ones find it ready.
        async with self._exclusive("a migration"):
            if self._state != "new":
                self._check_ready()  # raises if it is closed
                return
            if self.keys is not None:
                await self.keys.unlock()
            await shield_until_done(asyncio.to_thread(self._open, migrate, is_copy_target))
            if self._state == "new":  # otherwise it was closed meanwhile
                self._home = asyncio.get_running_loop()
                if self._sharing is not None and self._sharing.home is None:
                    self._sharing.home = self._home
                self._state = "ready"

    def _open(self, migrate: bool, is_copy_target: bool) -> None:
        accept = partial(migrations.accept, self._backend, is_copy_target=is_copy_target)
        self._backend.prepare(accept)
        check = sealing.require_no_keys if self.keys is None else sealing.accept
        if not (is_copy_target and migrations.is_half_copied(self._backend)):
            if migrate:
                zone, keys = self._legacy_timezone, self.keys
                migrations.upgrade(self._backend, zone, self.clock, keys, check)
            else:
                migrations.require(self._backend, check)
        if self.keys is not None:
            self.statements = sealing.open_statements(self._backend, self.keys, self.clock)
            self._writer.statements = self.statements
            open_when_loaded()

    async def close(self) -> None:
        """Commit the queue and close all connections; call it again after an interruption."""
        if self._forks != _forks:
            return  # the connections belong to the parent process
        if self._closing is None or was_interrupted(self._closing):
            self.refuse_inside()
            self._closing = asyncio.ensure_future(self._close())
        # Before the first `await`: no later call gets in between while the queue is committed.
        self._state = "closed"
        if self._closing.get_loop() is asyncio.get_running_loop():
            await shield_until_done(self._closing)

    async def _close(self) -> None:
        loop = asyncio.get_running_loop()
        # In this order: the reads end, the queue is committed, the last transaction ends. Only then
        # are the connections closed.
        await asyncio.gather(
            *[task for task in self._background if task.get_loop() is loop], return_exceptions=True
        )
        await self._writer.close()
        try:
            async with self._exclusive("closing"):
                pass  # the last transaction has ended, as later ones are refused
        except DeadlineError as error:
            logger.warning("closing in spite of a transaction: %s", error)
        for sessions in list(self._loop_sessions.values()):
            await sessions.close()
        self._loop_sessions.clear()
        self._backend.dispose()
        self._remove_folder()

    async def __aenter__(self) -> Self:
        await self.initialize()
        return self

    async def __aexit__(self, *error: object) -> None:
        await self.close()

    @property
    def session_factory(self) -> async_sessionmaker[AsyncSession]:
        """The factory of the sessions of `session()` on the running event loop; read-only."""
        return self._sessions_here().sessions

    @property
    def slices(self) -> Slices:
        """The long computations of the running event loop."""
        return self._sessions_here().slices

    @property
    def writer(self) -> Writer:
        """The writer of this object, with its figures and its telemetry."""
        return self._writer

    @property
    def checked_out_connections(self) -> int:
        """Connections in use by sessions, on all event loops; of the whole `Server` of many."""
        return sum(len(one.pools.checked_out) for one in list(self._loop_sessions.values()))

    @asynccontextmanager
    async def _exclusive(self, holder: str) -> AsyncIterator[float]:
        """Hold the write lock; yield the deadline for all further locks."""
        until = time.monotonic() + self.timeout
        await self._write_lock.acquire_async(holder, until)
        try:
            yield until
        finally:
            self._write_lock.release()

    def _sessions_here(self) -> LoopSessions:
        self._check_ready()
        loop = asyncio.get_running_loop()
        if loop not in self._loop_sessions:
            for other in list(self._loop_sessions):
                if other.is_closed() and other is not self._home:  # `close` closes its pool
                    self._loop_sessions.pop(other, None)
            self._loop_sessions[loop] = self._new_sessions(loop)
        return self._loop_sessions[loop]

    def _new_sessions(self, loop: asyncio.AbstractEventLoop) -> LoopSessions:
        info = {"database": self}
        if self._sharing is not None and isinstance(self._backend, PostgreSQL):
            return LoopSessions(self._sharing.pools(), info, self._backend.options)
        # A pool cannot serve two loops, so only the first one keeps its connections.
        pool_size = self._pool_size if loop is self._home else None
        return LoopSessions(Pools(loop, self._backend, self.timeout, pool_size), info)

    def _check_process(self) -> None:
        if self._forks != _forks:
            advice = {"sqlite": "start the child by spawn"}
            remedy = advice.get(self.dialect, "open a new Database in the child")
            raise UnavailableError(f"{self.db_path} was opened before fork: {remedy}")

    def _check_ready(self) -> None:
        if self._state == "ready" and self._forks == _forks:
            return
        self._check_process()
        if self._state == "new":
            raise UnavailableError(
                f"{self.db_path} is not open yet: use `async with`, or call initialize() first"
            )
        raise UnavailableError(f"{self.db_path}: {CLOSED}")

    def write(self, apply: Apply, operation: Any) -> Coroutine[Any, Any, Any]:
        """Submit an operation to the writer; the coroutine returns its result after the commit.

        Raises:
            DeadlineError: Inside a `transaction()`, for which it would wait forever.
        """
        self._check_ready()
        self.refuse_inside()
        return self._writer.submit(apply, operation)

    def has_other_writers(self) -> bool:
        """Return true if several writes of this process are queued or in a batch."""
        return self._writer.operations_under_way() > 1

    def refuse_inside(self) -> None:
        """Raise `DeadlineError` inside a `transaction()`, for which a write would wait forever."""
        for database, transaction in current_blocks.get():
            if database is self and not transaction.finished:
                raise DeadlineError(
                    "this call would wait for the transaction it is in: use the session of the "
                    "transaction, as in TaskRepository(tx)"
                )
