"""What a process knows of a server, which its databases there share."""

from __future__ import annotations

from dataclasses import dataclass, field

from openclaw_store.backends.postgresql.connections import Connector

MINIMUM_VERSION = 13
"""The oldest supported server; the PostgreSQL project no longer maintains older ones."""


@dataclass
class ServerState:
    """The state of one server."""

    is_citus: bool | None
    """True if Citus distributes the schemas; `None` until a connection has told it."""
    version: int = MINIMUM_VERSION
    """At least this one."""
    synchronous_commit: str | None = None
    """The setting of all connections; `None` while it is unknown, and the server's own stays."""
    connector: Connector = field(default_factory=Connector)
