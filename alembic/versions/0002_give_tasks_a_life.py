"""Add columns for claims, retries, idempotency keys and the compaction of the change log."""

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects import postgresql

revision = "0002"
down_revision = "0001"
branch_labels = None
depends_on = None

# Copied from the models: later changes of a model must not change this migration.
Moment = sa.BigInteger().with_variant(postgresql.TIMESTAMP(timezone=True), "postgresql")
Key = sa.String(255).with_variant(sa.String(255, collation="C"), "postgresql")
HAS_LIVE_KEY = "idempotency_key IS NOT NULL AND status IN ('pending', 'running', 'scheduled')"


def upgrade() -> None:
    schema = op.get_context().version_table_schema
    prefix = f"{schema}." if schema else ""
    attempt = sa.Column("attempt", sa.BigInteger(), server_default="0", nullable=False)
    for column in (attempt, sa.Column("not_before", Moment), sa.Column("idempotency_key", Key)):
        op.add_column("tasks", column, schema=schema)
    op.create_index(
        "ix_tasks_idempotency_key",
        "tasks",
        ["idempotency_key"],
        schema=schema,
        sqlite_where=sa.text(HAS_LIVE_KEY),
        postgresql_where=sa.text(HAS_LIVE_KEY),
    )
    compacted = sa.Column("compacted", sa.BigInteger(), server_default="0", nullable=False)
    op.add_column("counters", compacted, schema=schema)
    # Earlier compactions left no record except the first remaining revision.
    op.execute(
        f"UPDATE {prefix}counters SET compacted = "
        f"coalesce((SELECT min(revision) FROM {prefix}changes), 1) - 1"
    )


def downgrade() -> None:
    """Drop the columns and their content."""
    schema = op.get_context().version_table_schema
    prefix = f"{schema}." if schema else ""
    op.drop_index("ix_tasks_idempotency_key", "tasks", schema=schema)
    # Raw SQL drops a column in place; a batch operation of Alembic copies the table on SQLite.
    for column in ("idempotency_key", "not_before", "attempt"):
        op.execute(f"ALTER TABLE {prefix}tasks DROP COLUMN {column}")
    op.execute(f"ALTER TABLE {prefix}counters DROP COLUMN compacted")
