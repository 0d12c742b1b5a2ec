"""Bugs to be found: each breaks a promise of the store, and a campaign must see it.

They are planted from outside: nothing in the library knows of them.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any
from unittest.mock import patch

from sqlalchemy.ext.asyncio import AsyncSession

from openclaw_store import Database
from openclaw_store.writer import Writer


@contextmanager
def abandoned_batch() -> Iterator[None]:
    """A caller who is cancelled while its batch is under way does not wait for it.

    Breaks P2: it is told that nothing is done any more, and something is.
    """

    async def withdraw(self: Writer, future: asyncio.Future[Any]) -> None:
        future.cancel()

    with patch.object(Writer, "_withdraw", withdraw):
        yield


@contextmanager
def leaked_connection() -> Iterator[None]:
    """A caller who is cancelled while it reads takes the connection along.

    Breaks P7: when all connections are gone, nobody can read.
    """
    leaked: list[object] = []  # else it would be closed by the garbage collector

    async def read(self: Database, work: Callable[[AsyncSession], Awaitable[Any]]) -> Any:
        session = self.session_factory()
        leaked.append(session)
        result = await work(session)
        await session.close()
        return result

    with patch.object(Database, "read", read):
        yield


BUGS: dict[str, Callable[[], AbstractContextManager[None]]] = {
    "abandoned-batch": abandoned_batch,
    "leaked-connection": leaked_connection,
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
