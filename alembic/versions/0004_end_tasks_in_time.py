"""Count losses, let tasks expire and be cancelled in time, and give nodes a lease.

The function that writes a batch in one call is replaced: it writes the new columns, claims no
expired task, and starts the tasks that it claims if that is wanted.
"""

from collections.abc import Mapping

import sqlalchemy as sa
from alembic import context, op
from sqlalchemy.dialects import postgresql

revision = "0004"
down_revision = "0003"
branch_labels = None
depends_on = None

# Copied from the models: later changes of a model must not change this migration.
Moment = sa.BigInteger().with_variant(postgresql.TIMESTAMP(timezone=True), "postgresql")

COLUMNS = {
    "task_type": "text",
    "name": "text",
    "description": "text",
    "required_skills": "json",
    "optional_skills": "json",
    "status": "text",
    "priority": "integer",
    "assigned_node": "text",
    "attempt": "bigint",
    "submitted_at": "timestamptz",
    "scheduled_at": "timestamptz",
    "started_at": "timestamptz",
    "completed_at": "timestamptz",
    "not_before": "timestamptz",
    "parameters": "json",
    "timeout": "bigint",
    "retry_count": "bigint",
    "max_retries": "bigint",
    "result": "json",
    "error": "text",
    "user_id": "text",
    "idempotency_key": "text",
    "affinity_tags": "json",
    "metadata": "json",
    "losses": "bigint",
    "max_losses": "bigint",
    "expires_at": "timestamptz",
    "cancel_requested_at": "timestamptz",
    "cancel_deadline_at": "timestamptz",
}
"""The columns of a task that a call may write, in the order of its arguments and of `written`."""

IS_READY = "status = 'pending' AND not_before IS NULL"
IS_DELAYED = "status = 'pending' AND not_before IS NOT NULL"
IS_LIVE = "status IN ('pending', 'running', 'scheduled')"
IS_VALID = "(expires_at IS NULL OR expires_at > now_)"
# A hash, since a long list does not fit into an index of PostgreSQL.
GROUP = "coalesce(hashtextextended(required_skills::text, 0), 0)"
"""Tasks that require the same skills are one group, in which a claim takes the first ones."""

ORDER = "priority, submitted_at, task_id"
"""The order of claims."""

CLAIMED_AT = "greatest(now_, submitted_at, scheduled_at, started_at) AS claimed_at"
"""The time of a claim, not before the earlier times of the task."""


# Any other JSON was written by hand, and `jsonb` refuses some: these escapes, and huge numbers.
TEXT = r'"(?:[^"\\]|\\["\\/bfnrt]|\\u(?!0000|[dD][89a-fA-F])[0-9a-fA-F]{4})*"'
TEXTS = rf"^\s*\[\s*(?:{TEXT}(?:\s*,\s*{TEXT})*)?\s*\]\s*$"


def skills_of(column: str) -> str:
    """Return a JSON column as `jsonb`; NULL unless it is a list of text."""
    return f"""CASE WHEN {column} IS NULL THEN '[]'::jsonb
            WHEN {column}::text ~ '{TEXTS}' THEN {column}::jsonb END"""


def function(
    schema: str, own_name: str = "store_write_2", columns: Mapping[str, str] = COLUMNS
) -> str:
    """Return the definition of the function, which names the schema of each table and type.

    Migration 0008 defines it again, under another name and with one more column.
    """
    names = ", ".join(columns)
    arguments = ", ".join(f"given_{name} {kind}[]" for name, kind in columns.items())
    arrays = ", ".join(f"given_{name}" for name in columns)
    given = ", ".join(f"given.{name}" for name in columns)
    updates = ", ".join(
        f"{name} = CASE WHEN given.written & {1 << position} = 0 THEN tasks.{name} "
        f"ELSE given.{name} END"
        for position, name in enumerate(columns)
    )
    rows = f"""unnest(ids, expected, offsets, written, {arrays})
            AS given (task_id, expected, place, written, {names})"""
    is_allowed = f"{skills_of('one.required_skills')} <@ skills[claim]"
    return f"""
CREATE FUNCTION {schema}.{own_name}(
    now_ timestamptz, ids text[], expected bigint[], offsets integer[], written integer[],
    {arguments},
    checked_ids text[], checked_versions bigint[], key_owners text[], keys text[],
    change_ids text[], change_kinds text[], change_from text[], change_to text[],
    change_nodes text[], change_reasons text[], change_previous bigint[],
    node_ids text[], node_running integer[], node_successful integer[], node_failed integer[],
    node_seconds double precision[],
    claim_nodes text[], claim_places integer[], claim_starts boolean[],
    lock_wait text, listener bigint
)
RETURNS TABLE (base bigint, was bigint, task {schema}.tasks, node {schema}.nodes)
LANGUAGE plpgsql
SET search_path = pg_catalog, pg_temp
SET plan_cache_mode = force_generic_plan
SET jit = off
SET enable_seqscan = off
SET enable_hashjoin = off
SET enable_mergejoin = off
SET enable_material = off
SET enable_bitmapscan = off
AS $$
#variable_conflict use_column
DECLARE
    first bigint;  -- the newest revision before this call
    heartbeats bigint;
    last bigint;
    count_ bigint;
    present {schema}.nodes;
    places bigint;
    steps bigint;  -- changes of each claimed task
    skills jsonb[] := '{{}}';  -- of the nodes that claim
    groups jsonb[];  -- of pending tasks: the key and the text of their skills
    requirements jsonb[];
    matching jsonb[] := '{{}}';  -- the groups for each claim
    delayed jsonb[] := '{{}}';  -- the identifiers of due retries for each claim
BEGIN
    IF current_setting('transaction_isolation') <> 'read committed' THEN
        RAISE 'store_write needs READ COMMITTED' USING ERRCODE = 'invalid_transaction_state';
    END IF;

    -- Searches whose time depends on the number of tasks come before the lock.
    IF claim_nodes IS NOT NULL THEN
        WITH RECURSIVE heads AS (
            (SELECT {GROUP} AS key, tasks.required_skills, {ORDER} FROM {schema}.tasks
             WHERE {IS_READY}
             ORDER BY {GROUP}, {ORDER} LIMIT 1)
            UNION ALL
            SELECT next.* FROM heads, LATERAL (
                SELECT {GROUP} AS key, tasks.required_skills, {ORDER} FROM {schema}.tasks
                WHERE {IS_READY} AND {GROUP} > heads.key ORDER BY {GROUP}, {ORDER} LIMIT 1
            ) AS next
        )
        SELECT array_agg(jsonb_build_array(one.key, one.required_skills::text) ORDER BY {ORDER}),
            array_agg({skills_of("one.required_skills")} ORDER BY {ORDER})
        INTO groups, requirements FROM heads AS one;
        FOR claim IN 1 .. array_length(claim_nodes, 1) LOOP
            skills[claim] := (
                SELECT {skills_of("available_skills")} FROM {schema}.nodes
                WHERE node_id = claim_nodes[claim]
            );
            matching[claim] := (SELECT coalesce(jsonb_agg(one.key), '[]') FROM (
                SELECT given.key FROM unnest(groups, requirements) WITH ORDINALITY
                    AS given (key, requirement, place)
                WHERE given.requirement <@ skills[claim] ORDER BY given.place LIMIT (
                    SELECT 32 + greatest(0, least(claim_places[claim], max_concurrent_tasks))
                    FROM {schema}.nodes WHERE node_id = claim_nodes[claim]
                )
            ) AS one);
            delayed[claim] := (SELECT coalesce(jsonb_agg(due.task_id), '[]') FROM (
                SELECT one.task_id FROM (
                    SELECT {ORDER}, required_skills, not_before, expires_at FROM {schema}.tasks
                    WHERE {IS_DELAYED} ORDER BY not_before LIMIT 1000
                ) AS one WHERE not_before <= now_ AND {is_allowed} AND {IS_VALID}
                ORDER BY {ORDER} LIMIT claim_places[claim] + 16
            ) AS due);
        END LOOP;
    END IF;

    PERFORM set_config('lock_timeout', lock_wait, true);
    SELECT beat, compacted INTO heartbeats, first FROM {schema}.counters WHERE id = 1 FOR UPDATE;
    IF NOT FOUND THEN
        RETURN;
    END IF;
    first := coalesce(
        (SELECT revision FROM {schema}.changes ORDER BY revision DESC LIMIT 1), first);
    last := first;

    -- Nothing is written unless the batch was decided on the present rows.
    IF EXISTS (
        SELECT FROM unnest(ids || checked_ids, expected || checked_versions)
            AS given (task_id, version)
        LEFT JOIN {schema}.tasks ON tasks.task_id = given.task_id
        WHERE coalesce(tasks.version, -1) <> given.version
    ) OR EXISTS (
        SELECT FROM unnest(key_owners, keys) AS given (task_id, key)
        JOIN {schema}.tasks ON tasks.idempotency_key = given.key AND tasks.task_id <> given.task_id
        WHERE tasks.idempotency_key IS NOT NULL AND tasks.{IS_LIVE}
    ) OR EXISTS (
        SELECT FROM unnest(claim_nodes) AS given (node_id)
        LEFT JOIN {schema}.nodes ON nodes.node_id = given.node_id WHERE nodes.node_id IS NULL
    ) THEN
        RETURN NEXT;
        RETURN;
    END IF;
    base := first;

    IF -1 = ANY (expected) THEN
        INSERT INTO {schema}.tasks (task_id, {names}, updated_at, version)
        SELECT given.task_id, {given}, now_, first + given.place
        FROM {rows} WHERE given.expected = -1;
    END IF;
    IF 0 <= ANY (expected) THEN
        UPDATE {schema}.tasks SET {updates}, updated_at = now_, version = first + given.place
        FROM {rows} WHERE tasks.task_id = given.task_id AND given.expected >= 0;
    END IF;
    IF change_ids IS NOT NULL THEN
        INSERT INTO {schema}.changes (revision, changed_at, item, item_id, kind, from_status,
            to_status, node, reason, previous)
        SELECT first + given.place, now_, 'task', given.id, given.kind, given.was, given.now,
            given.node, given.reason,
            CASE WHEN given.previous < 0 THEN first - given.previous ELSE given.previous END
        FROM unnest(change_ids, change_kinds, change_from, change_to, change_nodes,
            change_reasons, change_previous) WITH ORDINALITY
            AS given (id, kind, was, now, node, reason, previous, place);
        last := last + array_length(change_ids, 1);
    END IF;

    FOR claim IN 1 .. coalesce(array_length(claim_nodes, 1), 0) LOOP
        SELECT * INTO present FROM {schema}.nodes WHERE node_id = claim_nodes[claim];
        places := present.running_tasks + coalesce((
            SELECT sum(one.running) FROM unnest(node_ids, node_running) AS one (id, running)
            WHERE one.id = claim_nodes[claim]), 0);
        places := CASE WHEN present.status = 'online'
            THEN least(claim_places[claim], present.max_concurrent_tasks - greatest(0, places))
            ELSE 0 END;
        CONTINUE WHEN places <= 0;
        steps := CASE WHEN claim_starts[claim] THEN 2 ELSE 1 END;
        RETURN QUERY WITH best AS MATERIALIZED (
            SELECT one.*, row_number() OVER (ORDER BY {ORDER}) AS place FROM (
                SELECT * FROM (
                    SELECT ready.* FROM jsonb_array_elements(matching[claim]) AS key, LATERAL (
                        SELECT {ORDER}, version, {CLAIMED_AT} FROM {schema}.tasks
                        WHERE {IS_READY} AND {GROUP} = (key->>0)::bigint
                        AND required_skills::text IS NOT DISTINCT FROM key->>1 AND {IS_VALID}
                        ORDER BY {ORDER} LIMIT places FOR UPDATE SKIP LOCKED
                    ) AS ready
                    UNION ALL
                    SELECT due.* FROM (
                        SELECT {ORDER}, version, {CLAIMED_AT} FROM {schema}.tasks AS one
                        JOIN jsonb_array_elements_text(delayed[claim]) AS id ON id = task_id
                        WHERE {IS_DELAYED} AND not_before <= now_ AND {is_allowed} AND {IS_VALID}
                        ORDER BY {ORDER} LIMIT places FOR UPDATE OF one SKIP LOCKED
                    ) AS due
                ) AS found ORDER BY {ORDER} LIMIT places
            ) AS one
        ), claimed AS (
            UPDATE {schema}.tasks SET assigned_node = claim_nodes[claim],
                attempt = tasks.attempt + 1,
                status = CASE WHEN claim_starts[claim] THEN 'running' ELSE 'scheduled' END,
                scheduled_at = best.claimed_at, completed_at = NULL,
                started_at = CASE WHEN claim_starts[claim] THEN best.claimed_at END,
                updated_at = now_, version = last + best.place * steps
            FROM best WHERE tasks.task_id = best.task_id
            RETURNING best.version AS was, tasks AS row_
        ), logged AS (
            INSERT INTO {schema}.changes (revision, changed_at, item, item_id, kind, from_status,
                to_status, node, previous)
            SELECT (row_).version - steps + 1, now_, 'task', (row_).task_id, 'status', 'pending',
                'scheduled', (row_).assigned_node, nullif(was, 0) FROM claimed
            UNION ALL
            SELECT (row_).version, now_, 'task', (row_).task_id, 'status', 'scheduled',
                'running', (row_).assigned_node, (row_).version - 1 FROM claimed WHERE steps = 2
        )
        SELECT first, claimed.was, claimed.row_, NULL::{schema}.nodes FROM claimed;
        GET DIAGNOSTICS count_ = ROW_COUNT;
        IF count_ > 0 THEN
            last := last + count_ * steps;
            node_ids := node_ids || claim_nodes[claim];
            node_running := node_running || count_::integer;
            node_successful := node_successful || 0;
            node_failed := node_failed || 0;
            node_seconds := node_seconds || 0::double precision;
        END IF;
    END LOOP;

    IF node_ids IS NOT NULL THEN
        RETURN QUERY WITH given AS (
            SELECT one.node_id, sum(one.running) AS running, sum(one.successful) AS successful,
                sum(one.failed) AS failed, sum(one.seconds) AS seconds
            FROM unnest(node_ids, node_running, node_successful, node_failed, node_seconds)
                AS one (node_id, running, successful, failed, seconds)
            GROUP BY one.node_id
        ), numbered AS (
            SELECT given.*, nodes.version AS was,
                row_number() OVER (ORDER BY nodes.node_id) AS place
            FROM given JOIN {schema}.nodes ON nodes.node_id = given.node_id
        ), counted AS (
            UPDATE {schema}.nodes SET version = last + numbered.place,
                running_tasks = greatest(0, nodes.running_tasks + numbered.running),
                total_tasks_processed
                    = nodes.total_tasks_processed + numbered.successful + numbered.failed,
                successful_tasks = nodes.successful_tasks + numbered.successful,
                failed_tasks = nodes.failed_tasks + numbered.failed,
                average_execution_time = CASE
                    WHEN numbered.successful + numbered.failed = 0
                    THEN nodes.average_execution_time
                    ELSE nodes.average_execution_time + (numbered.seconds
                        - (numbered.successful + numbered.failed) * nodes.average_execution_time)
                        / (nodes.total_tasks_processed + numbered.successful + numbered.failed)
                    END
            FROM numbered WHERE nodes.node_id = numbered.node_id
            RETURNING numbered.was, nodes AS row_
        ), logged AS (
            INSERT INTO {schema}.changes (revision, changed_at, item, item_id, kind, from_status,
                to_status, previous)
            SELECT (row_).version, now_, 'node', (row_).node_id, 'updated', (row_).status,
                (row_).status, nullif(was, 0) FROM counted
        )
        SELECT first, counted.was, NULL::{schema}.tasks, counted.row_ FROM counted;
        GET DIAGNOSTICS count_ = ROW_COUNT;
        last := last + count_;
    END IF;

    IF last > first THEN
        -- The process that listens alone is not notified of its own commits. The order matters: a
        -- listener that joins after the first test waits for its lock, and sees the commit; one
        -- that joined before and became the first has found the writer's own listener gone, and so
        -- does the second test.
        IF listener IS NULL OR NOT pg_try_advisory_xact_lock(8030029660390449410)
            OR pg_try_advisory_xact_lock_shared(listener)
        THEN
            PERFORM pg_notify('openclaw_store', last || ' ' || heartbeats);
        END IF;
    END IF;
    was := NULL;
    task := NULL;
    node := NULL;
    RETURN NEXT;
END $$"""


def drop(definition: str) -> str:
    """Return the statement that drops a function, and no other one of its name."""
    declaration = definition.partition("\nRETURNS ")[0]
    return declaration.replace("CREATE FUNCTION", "DROP FUNCTION IF EXISTS")


def upgrade() -> None:
    dialect, schema = op.get_context().dialect.name, op.get_context().version_table_schema
    prefix = f"{schema}." if schema else ""
    losses = sa.Column("losses", sa.BigInteger(), server_default="0", nullable=False)
    most = sa.Column("max_losses", sa.BigInteger(), server_default="10")
    times = ("expires_at", "cancel_requested_at", "cancel_deadline_at")
    for column in (losses, most, *(sa.Column(name, Moment) for name in times)):
        op.add_column("tasks", column, schema=schema)
    for column in (sa.Column("lease_seconds", sa.Float()), sa.Column("status_reason", sa.Text())):
        op.add_column("nodes", column, schema=schema)
    op.execute(
        f"CREATE INDEX ix_tasks_expiring ON {prefix}tasks (expires_at) "
        "WHERE status IN ('pending', 'scheduled') AND expires_at IS NOT NULL"
    )
    if dialect == "postgresql":
        op.execute(drop(context.script.get_revision("0003").module.function(schema)))
        op.execute(function(schema))


def downgrade() -> None:
    """Drop the columns and their content."""
    dialect, schema = op.get_context().dialect.name, op.get_context().version_table_schema
    prefix = f"{schema}." if schema else ""
    if dialect == "postgresql":
        op.execute(drop(function(schema)))
    op.execute(f"DROP INDEX {prefix}ix_tasks_expiring")
    # Raw SQL drops a column in place; a batch operation of Alembic copies the table on SQLite.
    for name in ("cancel_deadline_at", "cancel_requested_at", "expires_at", "max_losses", "losses"):
        op.execute(f"ALTER TABLE {prefix}tasks DROP COLUMN {name}")
    for name in ("status_reason", "lease_seconds"):
        op.execute(f"ALTER TABLE {prefix}nodes DROP COLUMN {name}")
    if dialect == "postgresql":
        op.execute(context.script.get_revision("0003").module.function(schema))
