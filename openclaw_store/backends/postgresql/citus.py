"""Citus: an extension of PostgreSQL that places schemas on nodes, and moves them.

The tables of a distributed schema are on one node, to which each statement goes as a whole. Citus
must see the parameters of a statement when it plans it, so no generic plan may be made.
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

from sqlalchemy import Connection, text
from sqlalchemy.exc import DBAPIError

from openclaw_store.errors import InvalidDataError, UnavailableError

if TYPE_CHECKING:
    from openclaw_store.backends.postgresql.backend import PostgreSQL

INSTALLED = "EXISTS (SELECT FROM pg_extension WHERE extname = 'citus')"
"""The condition that the extension is installed."""

SETTINGS = {"plan_cache_mode": "force_custom_plan"}
"""The settings that each connection needs."""

DISTRIBUTE = "SET LOCAL citus.enable_schema_based_sharding = on"
"""Make the schemas of a transaction distributed ones."""

_NODE = text("""
    SELECT DISTINCT nodename || ':' || nodeport FROM pg_dist_shard
    JOIN pg_dist_placement USING (shardid) JOIN pg_dist_node USING (groupid)
    WHERE logicalrelid = to_regclass(:table) AND noderole = 'primary'""")

_SIZE = text("""
    SELECT coalesce(sum(citus_total_relation_size(oid)), 0)::bigint FROM pg_class
    WHERE oid IN (SELECT logicalrelid FROM pg_dist_partition)
    AND relnamespace = to_regnamespace(:schema)""")

_NODES = text("""
    SELECT nodename, nodeport FROM pg_dist_node
    WHERE noderole = 'primary' AND shouldhaveshards ORDER BY 1, 2""")

_MOVE = text("""
    SELECT citus_schema_move(to_regnamespace(:schema), CAST(:host AS text), CAST(:port AS int))""")


def node_of(connection: Connection, schema: str) -> str | None:
    """Return host and port of the node of a schema; `None` if it is not distributed."""
    node: str | None = connection.scalar(_NODE, {"table": f"{schema}.counters"})
    return node


def size_of(connection: Connection, schema: str) -> int:
    """Return the bytes of a distributed schema on its node."""
    return int(connection.scalar(_SIZE, {"schema": schema}) or 0)


def move(backend: PostgreSQL, node: str) -> None:
    """Move the schema of a cluster to a node, while it is read and written; blocks the thread.

    Args:
        node: Host and port, as in `worker-2:5432`.

    Raises:
        InvalidDataError: If the server has no such node.
        UnavailableError: If Citus refuses; the cluster stays where it is.
    """
    host, _, port = node.rpartition(":")

    async def run() -> None:
        # In no transaction: Citus refuses to move tables that it has locked.
        engine = backend.engine(write=True, is_long=True, isolation_level="AUTOCOMMIT")
        async with engine.connect() as connection:
            if not await connection.scalar(text(f"SELECT {INSTALLED}")):
                raise InvalidDataError("node", f"{backend.location} has no Citus: nothing to move")
            nodes = {f"{one}:{number}" for one, number in await connection.execute(_NODES)}
            if node not in nodes:
                known = ", ".join(sorted(nodes))
                raise InvalidDataError("node", f"{node!r} is none of {known or 'no nodes'}")
            values: dict[str, Any] = {"schema": backend.schema, "host": host, "port": int(port)}
            try:
                await connection.execute(_MOVE, values)
            except DBAPIError as error:
                if backend.error_mapping.code(error) is None:
                    raise
                raise UnavailableError(
                    f"{backend.location} stays where it is, as Citus refuses to move it: "
                    f"{error.orig}"
                ) from error

    with backend.error_mapping.mapped():
        asyncio.run(run())
