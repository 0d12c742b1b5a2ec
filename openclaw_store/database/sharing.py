"""What the databases of one server share in a process: pools of connections, and a listener."""

from __future__ import annotations

import asyncio
import os

from openclaw_store.backends import Follower, Listening, Notifier, PostgreSQL
from openclaw_store.database.sessions import Pools, close_on
from openclaw_store.errors import UnavailableError


class Sharing:
    """The shared connections to a server; each event loop has its own.

    Args:
        backend: Makes the connections.
        timeout: Seconds to wait for one.
        pool_size: Connections kept for `session()` blocks, on the first event loop.
        idle_seconds: Time without a write after which a writer closes its connection.
    """

    def __init__(
        self, backend: PostgreSQL, timeout: float, pool_size: int, idle_seconds: float
    ) -> None:
        self.backend = backend
        self.idle_seconds = idle_seconds
        self._timeout = timeout
        self._pool_size = pool_size
        self._process = os.getpid()
        self.home: asyncio.AbstractEventLoop | None = None
        """The event loop that keeps connections: that of the first database."""
        # Event loops in other threads change these two: iterate over copies.
        self._pools: dict[asyncio.AbstractEventLoop, Pools] = {}
        self._listeners: dict[asyncio.AbstractEventLoop, Listening] = {}
        self._is_closed = False

    def pools(self) -> Pools:
        """Return the pools of the running event loop.

        Raises:
            UnavailableError: If the server was closed, or this process is a child of `fork`.
        """
        self._check()
        loop = asyncio.get_running_loop()
        if loop not in self._pools:
            for other in [
                one for one in list(self._pools) if one.is_closed() and one is not self.home
            ]:
                self._pools.pop(other, None)
            size = self._pool_size if loop is self.home else None
            self._pools[loop] = Pools(loop, self.backend, self._timeout, size)
        return self._pools[loop]

    def follow(self, follower: Follower) -> Notifier:
        """Listen to one more cluster, on the connection of the running event loop."""
        self._check()
        loop = asyncio.get_running_loop()
        if loop not in self._listeners:
            for other in [one for one in list(self._listeners) if one.is_closed()]:
                self._listeners.pop(other, None)
            self._listeners[loop] = Listening(self.backend, is_shared=True)
        listening = self._listeners[loop]
        listening.follow(follower)
        return _Following(listening, follower)

    async def close(self) -> None:
        """Close all connections; databases that are still open raise errors then."""
        if self._process != os.getpid():
            return  # the connections belong to the parent process
        self._is_closed = True
        for loop, listening in list(self._listeners.items()):
            if not loop.is_closed():
                await close_on(loop, listening.stop())
        for pools in list(self._pools.values()):
            await pools.close()
        self._listeners.clear()
        self._pools.clear()

    def _check(self) -> None:
        if self._process != os.getpid():
            raise UnavailableError("the Server was made before fork: make another in the child")
        if self._is_closed:
            raise UnavailableError("the Server is closed: make another")


class _Following:
    """One cluster of a shared listener."""

    def __init__(self, listening: Listening, follower: Follower) -> None:
        self._listening = listening
        self._follower = follower

    async def stop(self) -> None:
        self._listening.unfollow(self._follower)
