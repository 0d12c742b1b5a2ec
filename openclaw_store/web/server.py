"""Serve the page with uvicorn, and stop it while browsers are connected."""

from __future__ import annotations

import socket

import uvicorn
from starlette.applications import Starlette


class Server(uvicorn.Server):
    """A server that ends the events of all browsers before it waits for their connections.

    Args:
        page: The page, as `app` returns it.
        host: An address of this machine.
        port: 0 for any free port.
        prefix: The path below which a proxy shows the page.
    """

    def __init__(self, page: Starlette, host: str, port: int, prefix: str = "") -> None:
        super().__init__(
            uvicorn.Config(page, host, port, log_level="warning", root_path=prefix.rstrip("/"))
        )
        self._page = page

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Stop serving."""
        await self._page.state.stop()
        await super().shutdown(sockets)
