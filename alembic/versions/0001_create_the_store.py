"""Create the tables of tasks and nodes, the change log, and the revision counters."""

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects import postgresql

revision = "0001"
down_revision = None
branch_labels = None
depends_on = None

# Copied from the models: later changes of a model must not change this migration.
Moment = sa.BigInteger().with_variant(postgresql.TIMESTAMP(timezone=True), "postgresql")
Json = sa.Text().with_variant(postgresql.JSON(), "postgresql")
Key = sa.String(255).with_variant(sa.String(255, collation="C"), "postgresql")
NOW = "(CAST((julianday('now') - 2440587.5) * 86400000000 AS INTEGER))"

TASK_TYPES = "'interactive', 'batch', 'compute_intensive', 'io_intensive', 'daemon'"
LIVE = "'pending', 'scheduled', 'running'"
FINISHED = "'cancelled', 'completed', 'failed', 'timeout'"
NODE_STATES = "'online', 'offline', 'busy', 'maintenance', 'error'"


def upgrade() -> None:
    schema = op.get_context().version_table_schema
    now = sa.text("now()" if op.get_context().dialect.name == "postgresql" else NOW)
    op.create_table(
        "tasks",
        sa.Column("task_id", Key, nullable=False),
        sa.Column("task_type", sa.String(17), nullable=False),
        sa.Column("name", sa.Text(), nullable=False),
        sa.Column("description", sa.Text(), server_default="", nullable=False),
        sa.Column("required_skills", Json),
        sa.Column("optional_skills", Json),
        sa.Column("status", sa.String(9), server_default="pending", nullable=False),
        sa.Column("priority", sa.Integer(), server_default="2", nullable=False),
        sa.Column("assigned_node", Key),
        sa.Column("submitted_at", Moment, server_default=now, nullable=False),
        sa.Column("scheduled_at", Moment),
        sa.Column("started_at", Moment),
        sa.Column("completed_at", Moment),
        sa.Column("parameters", Json),
        sa.Column("timeout", sa.BigInteger()),
        sa.Column("retry_count", sa.BigInteger(), server_default="0", nullable=False),
        sa.Column("max_retries", sa.BigInteger(), server_default="3", nullable=False),
        sa.Column("result", Json),
        sa.Column("error", sa.Text()),
        sa.Column("user_id", Key),
        sa.Column("affinity_tags", Json),
        sa.Column("metadata", Json),
        sa.Column("updated_at", Moment, server_default=now, nullable=False),
        sa.Column("version", sa.BigInteger(), server_default="0", nullable=False),
        sa.PrimaryKeyConstraint("task_id", name=op.f("pk_tasks")),
        sa.CheckConstraint(f"task_type IN ({TASK_TYPES})", name=op.f("ck_tasks_task_type")),
        sa.CheckConstraint(f"status IN ({LIVE}, {FINISHED})", name=op.f("ck_tasks_status")),
        sa.CheckConstraint("priority BETWEEN 0 AND 3", name=op.f("ck_tasks_priority")),
        schema=schema,
    )
    create_partial_index(
        "ix_tasks_pending",
        ["priority", "submitted_at", "task_id"],
        "status IN ('pending', 'scheduled')",
    )
    op.create_index("ix_tasks_status", "tasks", ["status", "submitted_at"], schema=schema)
    for column in ("assigned_node", "user_id"):
        create_partial_index(
            f"ix_tasks_{column}", [column, "submitted_at"], f"{column} IS NOT NULL"
        )
    create_partial_index("ix_tasks_finished", ["completed_at"], f"status IN ({FINISHED})")

    op.create_table(
        "nodes",
        sa.Column("node_id", Key, nullable=False),
        sa.Column("hostname", sa.Text(), server_default="", nullable=False),
        sa.Column("platform", sa.Text(), server_default="", nullable=False),
        sa.Column("arch", sa.Text(), server_default="", nullable=False),
        sa.Column("status", sa.String(11), server_default="online", nullable=False),
        sa.Column("cpu_usage", sa.Float(), server_default="0", nullable=False),
        sa.Column("memory_usage", sa.Float(), server_default="0", nullable=False),
        sa.Column("disk_usage", sa.Float(), server_default="0", nullable=False),
        sa.Column("available_skills", Json),
        sa.Column("max_concurrent_tasks", sa.BigInteger(), server_default="5", nullable=False),
        sa.Column("running_tasks", sa.BigInteger(), server_default="0", nullable=False),
        sa.Column("ip_address", sa.Text(), server_default="", nullable=False),
        sa.Column("tailscale_ip", sa.Text(), server_default="", nullable=False),
        sa.Column("port", sa.BigInteger(), server_default="18789", nullable=False),
        sa.Column("total_tasks_processed", sa.BigInteger(), server_default="0", nullable=False),
        sa.Column("successful_tasks", sa.BigInteger(), server_default="0", nullable=False),
        sa.Column("failed_tasks", sa.BigInteger(), server_default="0", nullable=False),
        sa.Column("average_execution_time", sa.Float(), server_default="0", nullable=False),
        sa.Column("registered_at", Moment, server_default=now, nullable=False),
        sa.Column("last_heartbeat", Moment),
        sa.Column("tags", Json),
        sa.Column("version", sa.BigInteger(), server_default="0", nullable=False),
        sa.Column("beat", sa.BigInteger(), server_default="0", nullable=False),
        sa.PrimaryKeyConstraint("node_id", name=op.f("pk_nodes")),
        sa.CheckConstraint(f"status IN ({NODE_STATES})", name=op.f("ck_nodes_status")),
        schema=schema,
    )
    op.create_index("ix_nodes_status", "nodes", ["status"], schema=schema)
    op.create_index("ix_nodes_beat", "nodes", ["beat"], schema=schema)

    op.create_table(
        "changes",
        sa.Column(
            "revision",
            sa.BigInteger().with_variant(sa.Integer(), "sqlite"),
            autoincrement=False,
            nullable=False,
        ),
        sa.Column("changed_at", Moment, nullable=False),
        sa.Column("item", sa.String(4), nullable=False),
        sa.Column("item_id", Key, nullable=False),
        sa.Column("kind", sa.String(7), nullable=False),
        sa.Column("from_status", sa.String(11)),
        sa.Column("to_status", sa.String(11)),
        sa.Column("node", Key),
        sa.Column("reason", sa.Text()),
        sa.Column("previous", sa.BigInteger()),
        sa.PrimaryKeyConstraint("revision", name=op.f("pk_changes")),
        schema=schema,
    )

    counters = op.create_table(
        "counters",
        sa.Column("id", sa.Integer(), autoincrement=False, nullable=False),
        sa.Column("revision", sa.BigInteger(), server_default="0", nullable=False),
        sa.Column("beat", sa.BigInteger(), server_default="0", nullable=False),
        sa.PrimaryKeyConstraint("id", name=op.f("pk_counters")),
        sa.CheckConstraint("id = 1", name=op.f("ck_counters_one_row")),
        schema=schema,
    )
    op.bulk_insert(counters, [{"id": 1}])


def create_partial_index(name: str, columns: list[str], condition: str) -> None:
    where, schema = sa.text(condition), op.get_context().version_table_schema
    op.create_index(
        name, "tasks", columns, schema=schema, sqlite_where=where, postgresql_where=where
    )


def downgrade() -> None:
    """Drop all tables and their content."""
    for table in ("counters", "changes", "nodes", "tasks"):
        op.drop_table(table, schema=op.get_context().version_table_schema)
