"""Bugs to be found: each breaks a promise of the store, and a campaign must see it.

They are planted from outside: nothing in the library knows of them.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from itertools import count
from unittest import mock

from openclaw_store.changes import Ledger
from openclaw_store.database import Database
from openclaw_store.sqlite import _WriteConnection
from openclaw_store.writer import Unit

STALL_SECONDS = 10
"""So long the disk stalls where a bug leaves the door open: so what happens, happens then."""


@contextmanager
def acknowledge_before_commit() -> Iterator[None]:
    """P1: the writer gives its callers their answers, and commits afterwards."""
    transaction, commits = Database._write_on_thread, count()

    @contextmanager
    def too_soon(self: Database, committed: Callable[[Unit], None]) -> Iterator[Unit]:
        with transaction(self, lambda _: None) as unit:
            yield unit
            committed(unit)
            if next(commits):
                time.sleep(STALL_SECONDS)

    with mock.patch.object(Database, "_write_on_thread", too_soon):
        yield


@contextmanager
def revision_outside_transaction() -> Iterator[None]:
    """P2, P5: rows are committed first, and then in another transaction the feed of changes."""
    write, commits = Ledger._write, count()

    def write_afterwards(self: Ledger) -> None:
        self.cursor.execute("COMMIT")
        if next(commits):
            time.sleep(STALL_SECONDS)
        self.cursor.execute("BEGIN IMMEDIATE" if self.cursor.dialect == "sqlite" else "BEGIN")
        write(self)

    with mock.patch.object(Ledger, "_write", write_afterwards):
        yield


@contextmanager
def synchronous_off() -> Iterator[None]:
    """P1: a commit on SQLite returns before it is on the disk."""
    pragmas = (*_WriteConnection.pragmas, "PRAGMA synchronous=OFF")
    with mock.patch.object(_WriteConnection, "pragmas", pragmas):
        yield


@contextmanager
def cache_before_commit() -> Iterator[None]:
    """P2: the cache takes changes before their commit, and keeps them when it fails."""
    transaction = Database._write_on_thread

    @contextmanager
    def too_soon(self: Database, committed: Callable[[Unit], None]) -> Iterator[Unit]:
        with transaction(self, committed) as unit:
            yield unit
            unit.before_commit.append(lambda: self._writer.publish(unit.committed))

    with mock.patch.object(Database, "_write_on_thread", too_soon):
        yield


BUGS: dict[str, Callable[[], AbstractContextManager[None]]] = {
    "acknowledge-before-commit": acknowledge_before_commit,
    "revision-outside-transaction": revision_outside_transaction,
    "synchronous-off": synchronous_off,
    "cache-before-commit": cache_before_commit,
}
"""By name, what has the bug in the library while it is entered."""


@contextmanager
def planted(name: str | None) -> Iterator[None]:
    """Have a bug in the library of this process; `None` for none.

    Raises:
        KeyError: If there is none of that name.
    """
    if name is None:
        yield
    else:
        with BUGS[name]():
            yield
