"""List the keys by which values of the cluster are sealed."""

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects import postgresql

revision = "0011"
down_revision = "0010"
branch_labels = None
depends_on = None

# Copied from the models: later changes of a model must not change this migration.
Moment = sa.BigInteger().with_variant(postgresql.TIMESTAMP(timezone=True), "postgresql")


def upgrade() -> None:
    schema = op.get_context().version_table_schema
    op.create_table(
        "sealing_keys",
        sa.Column("id", sa.Integer(), autoincrement=False, nullable=False),
        sa.Column("cluster_id", sa.BigInteger(), nullable=False),
        sa.Column("proof", sa.Text(), nullable=False),
        sa.Column("is_complete", sa.Integer(), server_default="0", nullable=False),
        sa.Column("added_at", Moment, nullable=False),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_sealing_keys")),
        schema=schema,
    )


def downgrade() -> None:
    """Drop the list: values that are sealed still stay unreadable, so turn sealing off before."""
    op.drop_table("sealing_keys", schema=op.get_context().version_table_schema)
