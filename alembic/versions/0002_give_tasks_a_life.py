"""Give tasks what claims, retries and repeated submissions need, and the feed its beginning."""

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects import postgresql

revision = "0002"
down_revision = "0001"
branch_labels = None
depends_on = None

# Frozen here: the models keep changing, history does not.
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
    # Who compacted the feed before has left no other trace.
    op.execute(
        "UPDATE counters SET compacted = coalesce((SELECT min(revision) FROM changes), 1) - 1"
    )


def downgrade() -> None:
    """Drop the columns; what they held is lost."""
    op.drop_index("ix_tasks_idempotency_key", "tasks")
    # In place: Alembic's own way would copy the whole table on SQLite.
    for column in ("idempotency_key", "not_before", "attempt"):
        op.execute(f"ALTER TABLE tasks DROP COLUMN {column}")
    op.execute("ALTER TABLE counters DROP COLUMN compacted")
