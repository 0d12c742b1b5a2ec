"""The diagnosis of a server with Citus."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from sqlalchemy import Connection, text

from openclaw_store.backends import PUBLIC, citus, schema_of
from openclaw_store.maintenance.diagnosis import Finding, judge


def check_citus(connection: Connection, settings: Mapping[str, str]) -> Iterator[Finding]:
    """Yield the place of the cluster, and whether it can move; nothing without Citus."""
    schema = schema_of(connection)
    if schema is None or not connection.scalar(text(f"SELECT {citus.INSTALLED}")):
        return
    node = citus.node_of(connection, schema)
    yield judge(
        "citus_node",
        node is not None or schema == PUBLIC,
        f"Citus keeps the tables on {node or 'the coordinator, as all of public'}.",
        "create another cluster and copy this one to it: it is older than the extension",
        otherwise="The tables are on the coordinator, and Citus cannot move them.",
    )
    yield judge(
        "citus_moves",
        settings["wal_level"] == "logical",
        f"The coordinator has wal_level = {settings['wal_level']}.",
        "set wal_level = logical on all nodes: otherwise writes wait while a cluster moves",
    )
