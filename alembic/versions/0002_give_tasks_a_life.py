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
    op.add_column(
        "tasks", sa.Column("attempt", sa.BigInteger(), server_default="0", nullable=False)
    )
    op.add_column("tasks", sa.Column("not_before", Moment))
    op.add_column("tasks", sa.Column("idempotency_key", Key))
    op.create_index(
        "ix_tasks_idempotency_key",
        "tasks",
        ["idempotency_key"],
        sqlite_where=sa.text(HAS_LIVE_KEY),
        postgresql_where=sa.text(HAS_LIVE_KEY),
    )
    op.add_column(
        "counters", sa.Column("compacted", sa.BigInteger(), server_default="0", nullable=False)
    )
    # Earlier compactions left no record except the first remaining revision.
    op.execute(
        "UPDATE counters SET compacted = coalesce((SELECT min(revision) FROM changes), 1) - 1"
    )


def downgrade() -> None:
    """Drop the columns and their content."""
    op.drop_index("ix_tasks_idempotency_key", "tasks")
    # Raw SQL drops a column in place; a batch operation of Alembic copies the table on SQLite.
    for column in ("idempotency_key", "not_before", "attempt"):
        op.execute(f"ALTER TABLE tasks DROP COLUMN {column}")
    op.execute("ALTER TABLE counters DROP COLUMN compacted")
