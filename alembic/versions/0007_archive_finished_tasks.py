"""Create the tables of the archive: its runs, void copies and past changes, and the leases."""

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects import postgresql

revision = "0007"
down_revision = "0006"
branch_labels = None
depends_on = None

# Copied from the models: later changes of a model must not change this migration.
Moment = sa.BigInteger().with_variant(postgresql.TIMESTAMP(timezone=True), "postgresql")
Key = sa.String(255).with_variant(sa.String(255, collation="C"), "postgresql")


def upgrade() -> None:
    schema = op.get_context().version_table_schema
    op.create_table(
        "past_changes",
        sa.Column("item_id", Key, nullable=False),
        sa.Column("revision", sa.BigInteger(), autoincrement=False, nullable=False),
        sa.Column("changed_at", Moment, nullable=False),
        sa.Column("item", sa.String(4), nullable=False),
        sa.Column("kind", sa.String(7), nullable=False),
        sa.Column("from_status", sa.String(11)),
        sa.Column("to_status", sa.String(11)),
        sa.Column("node", Key),
        sa.Column("reason", sa.Text()),
        sa.Column("previous", sa.BigInteger()),
        sa.PrimaryKeyConstraint("item_id", "revision", name=op.f("pk_past_changes")),
        schema=schema,
    )
    op.create_table(
        "archive_runs",
        sa.Column("run", sa.String(40), nullable=False),
        sa.Column("kind", sa.String(8), nullable=False),
        sa.Column("location", sa.Text(), nullable=False),
        sa.Column("state", sa.String(8), nullable=False),
        sa.Column("files", sa.Text()),
        sa.Column("position", sa.BigInteger(), server_default="0", nullable=False),
        sa.Column("changed_at", Moment, nullable=False),
        sa.PrimaryKeyConstraint("run", name=op.f("pk_archive_runs")),
        schema=schema,
    )
    op.create_table(
        "archive_voids",
        sa.Column("task_id", Key, nullable=False),
        sa.Column("version", sa.BigInteger(), autoincrement=False, nullable=False),
        sa.Column("run", sa.String(40), nullable=False),
        sa.PrimaryKeyConstraint("task_id", "version", name=op.f("pk_archive_voids")),
        schema=schema,
    )
    op.create_table(
        "leases",
        sa.Column("name", sa.String(32), nullable=False),
        sa.Column("holder", sa.String(64), nullable=False),
        sa.Column("expires_at", Moment, nullable=False),
        sa.PrimaryKeyConstraint("name", name=op.f("pk_leases")),
        schema=schema,
    )


def downgrade() -> None:
    """Drop the tables of the archive; past changes of restored tasks are lost."""
    schema = op.get_context().version_table_schema
    for table in ("leases", "archive_voids", "archive_runs", "past_changes"):
        op.drop_table(table, schema=schema)
