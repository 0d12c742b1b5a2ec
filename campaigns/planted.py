"""Bugs to be found: each breaks a promise of the store, and a campaign must see it.

They are planted from outside: nothing in the library knows of them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from unittest import mock

from openclaw_store.database import Database
from openclaw_store.writer import Unit


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
