"""A TCP proxy between clients and a PostgreSQL server, which can fail like a network."""

from __future__ import annotations

import asyncio
import socket
import struct
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Self

from sqlalchemy import make_url

FAULTS = ("reset", "refuse", "swallow", "swallow replies", "half", "hold", "drip")
"""The kinds of fault:

- `reset`: all connections are reset; new ones can be made at once.
- `refuse`: they are reset, and so is every new one until the network is back.
- `swallow`: nothing passes in either direction, and no side is notified.
- `swallow replies`: requests still reach the server, replies are lost.
- `half`: half of the next message passes, then both sides see the end of the connection.
- `hold`: all held replies arrive when the network is back.
- `drip`: replies arrive a few bytes at a time.
"""

MOMENTS = ("reply", "request", "now")
"""The moment of a fault: in place of the reply to a request, or of the request; or at once."""

_DROP, _DRIP_SECONDS = 16, 0.002

_NO_FAREWELL = struct.pack("ii", 1, 0)


@dataclass(frozen=True)
class Fault:
    """A kind of fault, and its moment."""

    kind: str
    """One of `FAULTS`."""
    moment: str = "now"
    """One of `MOMENTS`."""
    trigger: bytes = b""
    """Bytes of the request that triggers it."""


class Proxy:
    """A proxy between clients and a server, with faults on demand.

    A connection that has lost data stays broken: no side even sees the other one close.
    """

    def __init__(self, url: str) -> None:
        self._server_port = port_of(url)
        self._listening: asyncio.Server | None = None
        self._serving: set[asyncio.Task[Any]] = set()
        self._links: set[_Link] = set()
        self._url = url
        self.taken = 0
        """Number of connections accepted so far."""
        self.swallowed = 0
        """Number of requests so far that were lost, or had to lose their replies."""
        self.awaited: Fault | None = None
        """The fault that waits for its moment."""
        self.fault_begun = asyncio.Event()
        """Set when the last fault has begun."""
        self.swallows_requests = False
        self.swallows_replies = False
        self.refuses = False
        self.drips = False
        self.passes = asyncio.Event()
        """Cleared while replies are held."""
        self.passes.set()

    @property
    def url(self) -> str:
        """The URL of the database through this proxy."""
        assert self._listening is not None
        return with_parts(self._url, port=self._listening.sockets[0].getsockname()[1])

    def fail(self, fault: Fault) -> None:
        """Begin a fault at its moment; it lasts until `forward`."""
        self.awaited = fault
        self.fault_begun.clear()
        if fault.moment == "now":
            self.begin_fault()

    def swallow(self, requests: bool = True, replies: bool = True) -> None:
        self.swallows_requests, self.swallows_replies = requests, replies

    def swallow_after(self, trigger: bytes) -> None:
        """Pass on the request with these bytes, and lose all data afterwards."""
        self.fail(Fault("swallow", "reply", trigger))

    def swallow_from(self, trigger: bytes) -> None:
        """Pass on all data before the request with these bytes."""
        self.fail(Fault("swallow", "request", trigger))

    def forward(self) -> None:
        """Pass on all data again, except on connections that have lost some."""
        self.awaited = None
        self.refuses = self.drips = False
        self.passes.set()
        self.swallow(False, False)
        # Lost data stays lost: only connections without a gap pass data again.
        for link in self._links:
            link.halves_next = False

    def begin_fault(self, by: _Link | None = None) -> None:
        """Begin the fault, triggered by a request on a connection or by the clock."""
        fault, self.awaited = self.awaited, None
        assert fault is not None
        self.fault_begun.set()
        self.swallows_requests = fault.kind == "swallow"
        self.swallows_replies = fault.kind in ("swallow", "swallow replies")
        self.refuses = fault.kind == "refuse"
        self.drips = fault.kind == "drip"
        if fault.kind == "hold":
            self.passes.clear()
        for link in list(self._links):
            link.halves_next = fault.kind == "half"
            if fault.kind in ("reset", "refuse"):
                # The request is already at the server: the reset must come in place of its reply.
                if link is by and fault.moment == "reply":
                    link.resets_next = True
                else:
                    link.reset()

    async def __aenter__(self) -> Self:
        self._listening = await asyncio.start_server(self._serve, "127.0.0.1", 0)
        return self

    async def __aexit__(self, *_: object) -> None:
        assert self._listening is not None
        self._listening.close()
        await self.end_connections()

    async def end_connections(self) -> None:
        """Close both sides of all connections, also after lost data."""
        for task in self._serving:
            task.cancel()
        await asyncio.gather(*self._serving, return_exceptions=True)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.taken += 1
        task = asyncio.current_task()
        assert task is not None
        self._serving.add(task)
        task.add_done_callback(self._serving.discard)
        link = _Link(self, reader, writer)
        self._links.add(link)
        with suppress(OSError, asyncio.CancelledError):
            if self.refuses:
                link.reset()
            else:
                await link.serve(self._server_port)
        self._links.discard(link)
        await link.close()


class _Link:
    """A connection of a client, with its connection to the server."""

    def __init__(
        self, proxy: Proxy, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        self._proxy = proxy
        self._reader, self._writer = reader, writer
        self._writers = [writer]
        self.resets_next = False
        """True if a reset replaces the next reply."""
        self.halves_next = False
        """True if the connection ends after half of the next message."""
        self.loses_replies = False
        """True if a reply was lost, so all later ones are, too."""

    async def serve(self, port: int) -> None:
        """Pass on the data of both sides until one of them closes."""
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        self._writers.append(writer)
        await asyncio.gather(
            self._pass_requests(self._reader, writer), self._pass_replies(reader, self._writer)
        )

    def reset(self) -> None:
        """Reset both sides, as a router does that has lost its state."""
        for writer in self._writers:
            if not writer.is_closing():
                writer.get_extra_info("socket").setsockopt(
                    socket.SOL_SOCKET, socket.SO_LINGER, _NO_FAREWELL
                )
                writer.transport.abort()

    async def close(self) -> None:
        """Close both sides."""
        for one in self._writers:
            one.close()
        for one in self._writers:
            with suppress(OSError):
                await one.wait_closed()

    async def _pass_requests(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        proxy, cut = self._proxy, False
        while data := await reader.read(1 << 16):
            # A lost request triggers no fault: the server never sees it.
            awaited = None if cut or proxy.swallows_requests else proxy.awaited
            is_moment = awaited is not None and awaited.trigger in data
            if awaited is not None and is_moment and awaited.moment == "request":
                proxy.begin_fault(self)
            # `cut` stays set after `forward`: a TCP stream cannot continue after a gap.
            cut = cut or proxy.swallows_requests
            if not cut:
                self._send(data, writer)
            proxy.swallowed += cut or self.loses_replies
            if awaited is not None and is_moment and awaited.moment == "reply":
                proxy.begin_fault(self)
        if cut or proxy.swallows_requests:
            # Closing would tell the server that the client has gone.
            await asyncio.Event().wait()
        writer.close()

    async def _pass_replies(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        proxy, cut = self._proxy, False
        while data := await reader.read(1 << 16):
            # The same for replies: each later one would belong to another request.
            cut = cut or proxy.swallows_replies
            self.loses_replies = cut
            if cut:
                continue
            if self.resets_next:
                self.reset()
                break
            await proxy.passes.wait()
            if not proxy.drips:
                self._send(data, writer)
                continue
            for place in range(0, len(data), _DROP):
                self._send(data[place : place + _DROP], writer)
                if proxy.drips:
                    await asyncio.sleep(_DRIP_SECONDS)
        if cut or proxy.swallows_replies:
            # Closing would tell the client that the server has gone.
            await asyncio.Event().wait()
        writer.close()

    def _send(self, data: bytes, writer: asyncio.StreamWriter) -> None:
        if writer.is_closing():
            return
        if self.halves_next:
            writer.write(data[: len(data) // 2])
            for one in self._writers:
                one.close()
        else:
            writer.write(data)


def port_of(url: str) -> int:
    """Return the port in a URL."""
    port = make_url(url).port
    assert port is not None
    return port


def with_parts(url: str, **parts: Any) -> str:
    """Return the URL with another port, user or password."""
    return make_url(url).set(**parts).render_as_string(hide_password=False)
