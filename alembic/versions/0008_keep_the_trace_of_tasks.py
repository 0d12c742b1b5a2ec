"""Keep the trace of the submitter with a task, and index failed tasks by time.

The function that writes a batch in one call is defined again, with the new column.
"""

from typing import Any

import sqlalchemy as sa
from alembic import context, op

revision = "0008"
down_revision = "0007"
branch_labels = None
depends_on = None

OWN = "store_write_3"


def function(schema: str, former: Any) -> str:
    """Return the definition of the function; `former` is the module of migration 0004."""
    return former.function(schema, OWN, {**former.COLUMNS, "traceparent": "text"})


def upgrade() -> None:
    dialect, schema = op.get_context().dialect.name, op.get_context().version_table_schema
    prefix = f"{schema}." if schema else ""
    op.add_column("tasks", sa.Column("traceparent", sa.String(55)), schema=schema)
    op.execute(
        f"CREATE INDEX ix_tasks_failed ON {prefix}tasks (completed_at, task_id) "
        "WHERE status IN ('failed', 'timeout')"
    )
    if dialect == "postgresql":
        former = context.script.get_revision("0004").module
        op.execute(former.drop(former.function(schema)))
        op.execute(function(schema, former))


def downgrade() -> None:
    """Drop the column and its content."""
    dialect, schema = op.get_context().dialect.name, op.get_context().version_table_schema
    prefix = f"{schema}." if schema else ""
    if dialect == "postgresql":
        former = context.script.get_revision("0004").module
        op.execute(former.drop(function(schema, former)))
    op.execute(f"DROP INDEX {prefix}ix_tasks_failed")
    # Raw SQL drops a column in place; a batch operation of Alembic copies the table on SQLite.
    op.execute(f"ALTER TABLE {prefix}tasks DROP COLUMN traceparent")
    if dialect == "postgresql":
        op.execute(former.function(schema))
