"""Give each cluster a random number, and clusters with a name a channel and locks of their own.

The number never changes, even if the cluster is renamed. The tables of `public` keep the channel
and the locks that they have had.
"""

from typing import Any

import sqlalchemy as sa
from alembic import context, op

revision = "0009"
down_revision = "0008"
branch_labels = None
depends_on = None

NUMBERS = {
    "sqlite": "random() & 4611686018427387903",
    "postgresql": "('x' || substr(replace(gen_random_uuid()::text, '-', ''), 1, 16))"
    "::bit(64)::bigint & 4611686018427387903",
}
"""62 random bits. SQLite's numbers are random for each connection, PostgreSQL's for each call."""

OWN_NAMES = {
    "SELECT beat, compacted INTO heartbeats, first": (
        "SELECT beat, compacted, cluster_id INTO heartbeats, first, own"
    ),
    "    heartbeats bigint;\n": "    heartbeats bigint;\n    own bigint;  -- cluster_id\n",
    "pg_try_advisory_xact_lock(8030029660390449410)": (
        "pg_try_advisory_xact_lock(8030029660390449410 # own)"
    ),
    "pg_notify('openclaw_store', ": "pg_notify('openclaw_store_' || to_hex(own), ",
}
"""The parts of `store_write` that name the channel and a lock, and those of a cluster's own.

`protocol.listener_names` is the same for the listeners. A later migration that replaces the
function must keep these parts.
"""


def function(schema: str, scripts: Any) -> str:
    """Return the definition of the function, made of those of earlier migrations."""
    before = scripts.get_revision("0008").module
    sql: str = before.function(schema, scripts.get_revision("0004").module)
    return sql if schema == "public" else with_own_names(sql)


def with_own_names(sql: str) -> str:
    """Return the definition of a function with the names of its own cluster."""
    for shared, own in OWN_NAMES.items():
        if sql.count(shared) != 1:
            raise ValueError(f"the function does not have one {shared!r}")
        sql = sql.replace(shared, own)
    return sql


def _replace(definition: str) -> None:
    """Replace the function by one with the same arguments, and no other one of its name."""
    op.execute(context.script.get_revision("0004").module.drop(definition))
    op.execute(definition)


def upgrade() -> None:
    dialect, schema = op.get_context().dialect.name, op.get_context().version_table_schema
    prefix = f"{schema}." if schema else ""
    number = sa.Column("cluster_id", sa.BigInteger(), server_default="0", nullable=False)
    op.add_column("counters", number, schema=schema)
    if dialect == "postgresql":  # Citus refuses an UPDATE that calls a volatile function
        op.execute(
            f"DO $$DECLARE random_number bigint := {NUMBERS[dialect]}; "
            f"BEGIN UPDATE {prefix}counters SET cluster_id = random_number; END$$"
        )
    else:
        op.execute(f"UPDATE {prefix}counters SET cluster_id = {NUMBERS[dialect]}")
    if dialect == "postgresql" and schema != "public":
        _replace(function(schema, context.script))


def downgrade() -> None:
    """Drop the column and its content."""
    dialect, schema = op.get_context().dialect.name, op.get_context().version_table_schema
    prefix = f"{schema}." if schema else ""
    if dialect == "postgresql" and schema != "public":
        before, first = (context.script.get_revision(one).module for one in ("0008", "0004"))
        _replace(before.function(schema, first))
    op.execute(f"ALTER TABLE {prefix}counters DROP COLUMN cluster_id")
