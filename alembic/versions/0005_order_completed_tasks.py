"""Index tasks by their time of completion and identifier, in place of finished tasks by time alone.

Clean-up reads the index in pages, each of which continues behind the last task of the one before.
"""

from alembic import op

revision = "0005"
down_revision = "0004"
branch_labels = None
depends_on = None

# Copied from the models: later changes of a model must not change this migration.
IS_FINISHED = "status IN ('cancelled', 'completed', 'failed', 'timeout')"
HAS_COMPLETION = f"{IS_FINISHED} OR completed_at IS NOT NULL"


def upgrade() -> None:
    schema = op.get_context().version_table_schema
    prefix = f"{schema}." if schema else ""
    op.execute(
        f"CREATE INDEX ix_tasks_completed_at ON {prefix}tasks (completed_at, task_id) "
        f"WHERE {HAS_COMPLETION}"
    )
    op.execute(f"DROP INDEX {prefix}ix_tasks_finished")


def downgrade() -> None:
    """Index finished tasks by time alone again."""
    schema = op.get_context().version_table_schema
    prefix = f"{schema}." if schema else ""
    op.execute(
        f"CREATE INDEX ix_tasks_finished ON {prefix}tasks (completed_at) WHERE {IS_FINISHED}"
    )
    op.execute(f"DROP INDEX {prefix}ix_tasks_completed_at")
