"""Tell two workers of one node apart by their session, and keep the progress of running tasks."""

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects import postgresql

revision = "0006"
down_revision = "0005"
branch_labels = None
depends_on = None

# Copied from the models: later changes of a model must not change this migration.
Json = sa.Text().with_variant(postgresql.JSON(), "postgresql")


def upgrade() -> None:
    schema = op.get_context().version_table_schema
    for column in (sa.Column("session", sa.Text()), sa.Column("progress", Json)):
        op.add_column("nodes", column, schema=schema)


def downgrade() -> None:
    """Drop the columns and their content."""
    schema = op.get_context().version_table_schema
    prefix = f"{schema}." if schema else ""
    # Raw SQL drops a column in place; a batch operation of Alembic copies the table on SQLite.
    for name in ("progress", "session"):
        op.execute(f"ALTER TABLE {prefix}nodes DROP COLUMN {name}")
