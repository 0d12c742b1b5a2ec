"""PostgreSQL connections: they are opened to the end, and closed in time."""

from __future__ import annotations

import asyncio
import importlib
import select
import time
from functools import cache
from typing import Any

from openclaw_store.backends.cancellation import cancel_once_more, shield_until_done
from openclaw_store.backends.internals import descriptor_of
from openclaw_store.errors import logger_of

logger = logger_of("postgresql")

_ABANDONED_SECONDS = 1.0  # to finish connecting for a cancelled caller
_CLOSE_SECONDS = 0.5  # for the terminate message; a connection that is cut off needs none
_HEAD_START_SECONDS = 0.25  # for the last host that answered, before the others are tried

_CLOSING_STEPS = 10
"""Iterations of the event loop to read the server's last words and the end of the connection."""


def may_be_lost(connection: Any) -> bool:
    """Return true if an idle connection is closed or suspect, or has unread input."""
    if connection.is_closed() or connection.made_at < connection.connector.silent_at:
        return True
    descriptor = descriptor_of(connection)
    if not hasattr(select, "poll"):
        return bool(select.select([descriptor], [], [], 0)[0])
    poll = select.poll()
    poll.register(descriptor, select.POLLIN)
    return bool(poll.poll(0))


async def is_lost(connection: Any) -> bool:
    """Return true if an idle connection should not be used; read what the server has sent."""
    for _ in range(_CLOSING_STEPS):
        if not may_be_lost(connection):
            return False
        if connection.is_closed():
            break
        await asyncio.sleep(0)
    return True


class Connector:
    """Connects to a server; of several hosts, first to the last one that answered."""

    def __init__(self) -> None:
        self._answered: object = None
        self.silent_at = 0.0
        """The last time a server did not answer: older connections may be to the same server."""

    def note_silence(self) -> None:
        self.silent_at = time.monotonic()

    async def connect(self, *arguments: Any, **options: Any) -> Any:
        """Connect to the end, even if the caller is cancelled.

        The driver, interrupted while it connects, may leave a connection open. It is interrupted
        all the same if a server does not answer in time, since the caller has to end.
        """
        made_at = time.monotonic()
        try:
            connection = await shield_until_done(
                self._connect_to_any(*arguments, **options),
                discard=lambda made: made.terminate(),
                seconds=_ABANDONED_SECONDS,
            )
            connection.connector, connection.made_at = self, made_at
            return connection
        except asyncio.CancelledError:
            await asyncio.sleep(0)  # the loop closes the socket in its next iteration
            raise

    async def _connect_to_any(self, *arguments: Any, **options: Any) -> Any:
        """Connect to the first suitable host that answers; all are tried at the same time.

        The last host that answered has a head start, so that the others get no connection that is
        not used. (RFC 8305 calls this "happy eyeballs".)
        """
        driver = importlib.import_module("asyncpg")
        hosts = options.get("host")
        if not isinstance(hosts, list) or options.get("target_session_attrs") == "prefer-standby":
            return await driver.connect(*arguments, **options)

        async def connect(server: Any) -> tuple[Any, Any]:
            given = {**options, "host": server[0], "port": server[1]}
            return await driver.connect(*arguments, **given), server

        servers = zip(hosts, options["port"], strict=True)
        first, *others = sorted(servers, key=lambda server: server != self._answered)
        attempts = [asyncio.ensure_future(connect(first))]
        chosen = reason = None
        try:
            await asyncio.wait(attempts, timeout=_HEAD_START_SECONDS)
            if not attempts[0].done() or attempts[0].exception() is not None:
                attempts += [asyncio.ensure_future(connect(server)) for server in others]
            for attempt in asyncio.as_completed(attempts):
                try:
                    chosen, self._answered = await attempt
                    return chosen
                except (
                    OSError, driver.CannotConnectNowError, driver.TargetServerAttributeNotMatched
                ) as error:  # fmt: skip
                    reason = error
        finally:
            for unused in attempts:
                unused.cancel()
            for made in await asyncio.gather(*attempts, return_exceptions=True):
                if not isinstance(made, BaseException) and made[0] is not chosen:
                    made[0].terminate()
        assert reason is not None
        raise reason


@cache
def connection_class() -> type[Any]:
    """Return the driver's connection class, with its origin, and a limit for closing it."""
    base: type[Any] = importlib.import_module("asyncpg").Connection

    async def close(self: Any, *, timeout: float | None = None) -> None:
        try:
            try:
                await base.close(self, timeout=_CLOSE_SECONDS)
            finally:
                await asyncio.sleep(0)  # the loop closes the socket in its next iteration
        except asyncio.CancelledError:  # the driver has closed the connection
            cancel_once_more()
        except TimeoutError:  # likewise
            logger.debug("a connection was closed before the server answered the terminate message")

    return type("Connection", (base,), {"__slots__": ("connector", "made_at"), "close": close})
