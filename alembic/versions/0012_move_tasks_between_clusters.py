"""Create the tables of tasks that move between clusters, and of decisions on transactions."""

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects import postgresql

revision = "0012"
down_revision = "0011"
branch_labels = None
depends_on = None

# Copied from the models: later changes of a model must not change this migration.
Moment = sa.BigInteger().with_variant(postgresql.TIMESTAMP(timezone=True), "postgresql")


def upgrade() -> None:
    schema = op.get_context().version_table_schema
    op.create_table(
        "outgoing",
        sa.Column("batch", sa.String(32), nullable=False),
        sa.Column("target", sa.BigInteger(), nullable=False),
        sa.Column("tasks", sa.Text(), nullable=False),
        sa.Column("number", sa.Integer(), nullable=False),
        sa.Column("left_at", Moment, nullable=False),
        sa.PrimaryKeyConstraint("batch", name=op.f("pk_outgoing")),
        schema=schema,
    )
    op.create_table(
        "incoming",
        sa.Column("batch", sa.String(32), nullable=False),
        sa.Column("source", sa.BigInteger(), nullable=False),
        sa.Column("refused", sa.Text(), nullable=False),
        sa.Column("arrived_at", Moment, nullable=False),
        sa.PrimaryKeyConstraint("batch", name=op.f("pk_incoming")),
        schema=schema,
    )
    op.create_table(
        "decisions",
        sa.Column("decision", sa.String(32), nullable=False),
        sa.Column("participants", sa.Text(), nullable=False),
        sa.Column("decided_at", Moment, nullable=False),
        sa.PrimaryKeyConstraint("decision", name=op.f("pk_decisions")),
        schema=schema,
    )


def downgrade() -> None:
    """Drop the tables; tasks in transit would be lost, so complete transfers before."""
    schema = op.get_context().version_table_schema
    for table in ("decisions", "incoming", "outgoing"):
        op.drop_table(table, schema=schema)
