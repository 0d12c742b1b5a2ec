"""Bugs to be found: each breaks a promise of the store, and a campaign must see it.

They are planted from outside: nothing in the library knows of them.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from itertools import count
from unittest.mock import patch

from openclaw_store.changes import Ledger
from openclaw_store.database import Database
from openclaw_store.sqlite import _WriteConnection
from openclaw_store.writer import Unit

_STALL_SECONDS = 10
"""So long the disk stalls where a bug leaves the door open: so what happens, happens then."""

BUGS: dict[str, Callable[[], AbstractContextManager[None]]] = {}
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


def _bug(name: str) -> Callable[[Callable[[], Iterator[None]]], None]:
    def register(bug: Callable[[], Iterator[None]]) -> None:
        BUGS[name] = contextmanager(bug)

    return register


@_bug("acknowledge-before-commit")
def _acknowledging_before_commit() -> Iterator[None]:
    """P1: the writer gives its callers their answers, and commits afterwards."""
    commits = count()
    transaction = Database._write_on_thread

    @contextmanager
    def answering(self: Database, committed: Callable[[Unit], None]) -> Iterator[Unit]:
        with transaction(self, lambda _: None) as unit:
            yield unit
            committed(unit)
            if next(commits):
                time.sleep(_STALL_SECONDS)

    with patch.object(Database, "_write_on_thread", answering):
        yield


@_bug("revision-outside-transaction")
def _numbering_afterwards() -> Iterator[None]:
    """P2 and P5: the rows are committed, and in another transaction their changes and revisions."""
    commits = count()
    write = Ledger._write

    def commit_and_write(self: Ledger) -> None:
        self.cursor.execute("COMMIT")
        if next(commits):
            time.sleep(_STALL_SECONDS)
        self.cursor.execute("BEGIN IMMEDIATE" if self.cursor.dialect == "sqlite" else "BEGIN")
        write(self)

    with patch.object(Ledger, "_write", commit_and_write):
        yield


@_bug("synchronous-off")
def _leaving_it_to_the_system() -> Iterator[None]:
    """P1: a commit on SQLite returns before it is on the disk."""
    pragmas = (*_WriteConnection.pragmas, "PRAGMA synchronous=OFF")
    with patch.object(_WriteConnection, "pragmas", pragmas):
        yield
