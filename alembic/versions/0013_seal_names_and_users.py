"""Make room for sealed user ids, and list the optional fields that are sealed.

Texts that begin with the prefix of sealed values are escaped, as later writes do it.
"""

import sqlalchemy as sa
from alembic import op

revision = "0013"
down_revision = "0012"
branch_labels = None
depends_on = None

PREFIX, ESCAPE = "$sealed$", "$sealed$------$"
QUOTED, QUOTED_ESCAPE = f'"{PREFIX}', f'"{ESCAPE}'

NEW = {"tasks": ("name", "user_id"), "nodes": ("status_reason",)}
"""Columns that may be sealed from now on."""

OLD = {
    "tasks": ("description", "error"),
    "nodes": ("ip_address", "tailscale_ip"),
    "changes": ("reason",),
    "past_changes": ("reason",),
}
"""Columns that may be sealed since revision 0011, which has not escaped the texts before it."""


def begins(text: str, beginning: str) -> str:
    """Return the condition that a text begins with another one."""
    return f"substr({text}, 1, {len(beginning)}) = '{beginning}'"


def upgrade() -> None:
    dialect, schema = op.get_context().dialect.name, op.get_context().version_table_schema
    prefix = f"{schema}." if schema else ""
    if dialect == "postgresql":  # neither the table nor its index is written again
        op.execute(f'ALTER TABLE {prefix}tasks ALTER COLUMN user_id TYPE text COLLATE "C"')
    fields = sa.Column("sealed_fields", sa.Text(), server_default="", nullable=False)
    op.add_column("sealing_keys", fields, schema=schema)
    for table, columns in NEW.items():
        for column in columns:
            op.execute(
                f"UPDATE {prefix}{table} SET {column} = '{ESCAPE}' || {column} "
                f"WHERE {begins(column, PREFIX)}"
            )
    is_clear = f"NOT EXISTS (SELECT 1 FROM {prefix}sealing_keys)"
    for table, columns in OLD.items():
        for column in columns:
            op.execute(
                f"UPDATE {prefix}{table} SET {column} = '{ESCAPE}' || {column} "
                f"WHERE {begins(column, PREFIX)} AND NOT {begins(column, ESCAPE)} AND {is_clear}"
            )
    kind = "json" if dialect == "postgresql" else "text"
    result = "CAST(result AS text)"
    op.execute(
        f"UPDATE {prefix}tasks SET result = "
        f"CAST('{QUOTED_ESCAPE}' || substr({result}, 2) AS {kind}) "
        f"WHERE {begins(result, QUOTED)} AND NOT {begins(result, QUOTED_ESCAPE)} "
        f"AND {is_clear}"
    )


def downgrade() -> None:
    """Forget which optional fields are sealed: store them in clear before."""
    dialect, schema = op.get_context().dialect.name, op.get_context().version_table_schema
    prefix = f"{schema}." if schema else ""
    for table, columns in NEW.items():
        for column in columns:
            op.execute(
                f"UPDATE {prefix}{table} SET {column} = substr({column}, {len(ESCAPE) + 1}) "
                f"WHERE {begins(column, ESCAPE)}"
            )
    if dialect == "postgresql":
        op.execute(f'ALTER TABLE {prefix}tasks ALTER COLUMN user_id TYPE varchar(255) COLLATE "C"')
    op.execute(f"ALTER TABLE {prefix}sealing_keys DROP COLUMN sealed_fields")
