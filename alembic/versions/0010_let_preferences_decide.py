"""Let preferences of tasks decide between nodes, and find tasks for a node by their first skill.

On PostgreSQL, the function that writes a batch in one call is replaced. It reads only the groups of
tasks whose first skill a node has. While there are tasks with preferences, it chooses by the rule
of `domain.preferences`.
"""

from typing import Any

import sqlalchemy as sa
from alembic import context, op
from sqlalchemy.dialects import postgresql

revision = "0010"
down_revision = "0009"
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
    "traceparent": "text",
}
"""The columns of a task that a call may write, in the order of its arguments and of `written`."""

IS_READY = "status = 'pending' AND not_before IS NULL"
IS_DELAYED = "status = 'pending' AND not_before IS NOT NULL"
IS_LIVE = "status IN ('pending', 'running', 'scheduled')"
IS_PENDING = "status IN ('pending', 'scheduled')"
IS_DUE = "status = 'pending' AND (not_before IS NULL OR not_before <= now_)"
IS_VALID = "(expires_at IS NULL OR expires_at > now_)"
IS_PREFERRING = (
    "status = 'pending' AND (CAST(optional_skills AS TEXT) <> '[]' "
    "OR CAST(affinity_tags AS TEXT) <> '[]')"
)


def bucket_of(skills: str) -> str:
    """Return the hash of the first skill of a list in JSON; that of no text for any odd list."""
    return f"""hashtextextended(CASE WHEN strpos({skills}, chr(92)) > 0 THEN ''
        ELSE coalesce(split_part({skills}, '"', 2), '') END, 0)"""


def group_of(skills: str) -> str:
    """Return the hash of a list in JSON: a long list does not fit into an index of PostgreSQL.

    Tasks that require the same skills are one group, in which a claim takes the first ones.
    """
    return f"coalesce(hashtextextended({skills}, 0), 0)"


SKILLS = "required_skills::text"
GROUP = f"{bucket_of(SKILLS)}, {group_of(SKILLS)}"
"""The first columns of the index of ready tasks; a node reads the buckets of its skills."""

WINDOW = 64
"""Tasks among which a claim chooses by their preferences."""

PATIENCE = "interval '60 seconds'"
"""A task that was passed over for so long goes first."""

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


def is_allowed(column: str) -> str:
    """Return the condition that a node has all skills of a JSON column; false for odd JSON."""
    return f"""CASE WHEN {column} IS NULL THEN true
            WHEN {column}::text ~ '{TEXTS}' THEN jsonb_exists_all(present_skills,
                ARRAY(SELECT jsonb_array_elements_text({column}::jsonb))) ELSE false END"""


def common(column: str, present: str) -> str:
    """Return the number of different texts of a JSON column among the keys of an object."""
    return f"""(SELECT count(DISTINCT one) FROM jsonb_array_elements_text({skills_of(column)})
            AS one WHERE jsonb_exists({present}, one))"""


def keys_of(column: str) -> str:
    """Return a JSON list of text as the keys of an object, which are searched faster.

    Odd JSON is NULL. OFFSET keeps the conversion from being repeated.
    """
    return f"""(SELECT CASE WHEN list IS NOT NULL THEN (
                SELECT coalesce(jsonb_object_agg(one, true), '{{}}')
                FROM jsonb_array_elements_text(list) AS one
            ) END FROM (SELECT {skills_of(column)} AS list OFFSET 0) AS given)"""


def function(schema: str, scripts: Any) -> str:
    """Return the definition of the function, which names the schema of each table and type."""
    sql = _function(schema)
    if schema == "public":
        return sql
    own_names: str = scripts.get_revision("0009").module.with_own_names(sql)
    return own_names


def _function(schema: str) -> str:
    names = ", ".join(COLUMNS)
    arguments = ", ".join(f"given_{name} {kind}[]" for name, kind in COLUMNS.items())
    arrays = ", ".join(f"given_{name}" for name in COLUMNS)
    given = ", ".join(f"given.{name}" for name in COLUMNS)
    updates = ", ".join(
        f"{name} = CASE WHEN given.written & {1 << position} = 0 THEN tasks.{name} "
        f"ELSE given.{name} END"
        for position, name in enumerate(COLUMNS)
    )
    rows = f"""unnest(ids, expected, offsets, written, {arrays})
            AS given (task_id, expected, place, written, {names})"""
    next_head = f"""SELECT {bucket_of(SKILLS)} AS bucket, {group_of(SKILLS)} AS key,
                            required_skills, {ORDER} FROM {schema}.tasks WHERE {IS_READY}"""

    def candidates(columns: str, limit: str, lock: str = "") -> str:
        return f"""
                    SELECT found.* FROM jsonb_array_elements_text(groups[claim]) AS one, LATERAL (
                        SELECT {columns}, 0::bigint AS list_place FROM {schema}.tasks
                        WHERE {IS_READY} AND {bucket_of(SKILLS)} = {bucket_of("one")}
                        AND {group_of(SKILLS)} = {group_of("one")}
                        AND required_skills::text IS NOT DISTINCT FROM one AND {IS_VALID}
                        ORDER BY {ORDER} LIMIT {limit} {lock}
                    ) AS found
                    UNION ALL
                    SELECT found.* FROM (
                        SELECT {columns}, CASE WHEN is_listed[claim] THEN given.place ELSE 0 END
                        FROM jsonb_array_elements_text(listed[claim]) WITH ORDINALITY
                            AS given (id, place)
                        JOIN {schema}.tasks ON tasks.task_id = given.id
                        WHERE {IS_DUE} AND (is_listed[claim] OR not_before IS NOT NULL)
                        AND {IS_VALID} ORDER BY given.place LIMIT {limit} {lock}
                    ) AS found"""

    claimed = f"{ORDER}, version, {CLAIMED_AT}"
    window = f"{ORDER}, optional_skills, affinity_tags, passed_over_at, updated_at"
    return f"""
CREATE FUNCTION {schema}.store_write_4(
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
SET enable_sort = off
SET enable_incremental_sort = off
AS $$
#variable_conflict use_column
DECLARE
    first bigint;  -- the newest revision before this call
    heartbeats bigint;
    last bigint;
    count_ bigint;
    present {schema}.nodes;
    present_skills jsonb;  -- of the node of a claim, as the keys of an object
    places bigint;
    reach bigint;  -- tasks among which a claim chooses
    claims integer := coalesce(array_length(claim_nodes, 1), 0);
    first_claim integer := 1;  -- of the claims that are served together
    granted integer[] := '{{}}';  -- places of each claim
    preferring boolean := false;
    skills jsonb[] := '{{}}';  -- of the node of each claim
    groups jsonb[] := '{{}}';  -- the skills that tasks require, for each claim
    listed jsonb[] := '{{}}';  -- identifiers of other tasks for each claim
    reaches bigint[] := '{{}}';
    is_listed boolean[] := '{{}}';  -- all tasks of a claim are listed
    chosen jsonb;
    passed text[];  -- tasks that a claim passes over for the first time
BEGIN
    IF current_setting('transaction_isolation') <> 'read committed' THEN
        RAISE 'store_write needs READ COMMITTED' USING ERRCODE = 'invalid_transaction_state';
    END IF;

    -- Searches whose time depends on the number of tasks come before the lock.
    IF claim_nodes IS NOT NULL THEN
        -- No other index has this order, so none is searched for a task that is not in this one.
        preferring := coalesce((
            SELECT true FROM {schema}.tasks WHERE {IS_PREFERRING} ORDER BY max_retries LIMIT 1
        ), false);
        FOR claim IN 1 .. claims LOOP
            SELECT {keys_of("available_skills")},
                greatest(CASE WHEN preferring THEN {WINDOW} ELSE 0 END,
                    least(claim_places[claim], nodes.max_concurrent_tasks))
            INTO present_skills, reach FROM {schema}.nodes WHERE node_id = claim_nodes[claim];
            skills[claim] := present_skills;
            groups[claim] := '[]';
            listed[claim] := '[]';
            is_listed[claim] := false;
            CONTINUE WHEN present_skills IS NULL;
            reaches[claim] := reach;
            IF present_skills = skills[claim - 1] AND reach = reaches[claim - 1] THEN
                groups[claim] := groups[claim - 1];
                listed[claim] := listed[claim - 1];
                is_listed[claim] := is_listed[claim - 1];
                CONTINUE;
            END IF;
            reach := reach * claims;  -- the next claims may choose from the same tasks
            IF (SELECT count(*) > 32 FROM jsonb_object_keys(present_skills)) THEN
                SELECT jsonb_agg(one.task_id ORDER BY {ORDER}) INTO chosen FROM (
                    SELECT {ORDER}, status, required_skills, not_before, expires_at
                    FROM {schema}.tasks WHERE {IS_PENDING}
                    ORDER BY {ORDER} LIMIT greatest(100, reach + 36)
                ) AS one
                WHERE {IS_DUE} AND {IS_VALID} AND {is_allowed("one.required_skills")};
                -- Other claims may take some of them before the lock.
                IF jsonb_array_length(chosen) >= reach + 16 THEN
                    listed[claim] := chosen;
                    is_listed[claim] := true;
                    CONTINUE;
                END IF;
            END IF;
            groups[claim] := (
                WITH RECURSIVE buckets AS (
                    SELECT DISTINCT hashtextextended(one, 0) AS bucket
                    FROM (SELECT jsonb_object_keys(present_skills) UNION ALL SELECT '')
                        AS given (one)
                ), heads AS (
                    SELECT next.* FROM buckets, LATERAL (
                        {next_head} AND {bucket_of(SKILLS)} = buckets.bucket
                        ORDER BY {GROUP}, {ORDER} LIMIT 1
                    ) AS next
                    UNION ALL
                    SELECT next.* FROM heads, LATERAL (
                        {next_head} AND {bucket_of(SKILLS)} = heads.bucket
                        AND {group_of(SKILLS)} > heads.key ORDER BY {GROUP}, {ORDER} LIMIT 1
                    ) AS next
                )
                SELECT coalesce(jsonb_agg(one.required_skills::text), '[]') FROM (
                    SELECT * FROM heads WHERE {is_allowed("heads.required_skills")}
                    ORDER BY {ORDER} LIMIT 32 + reach
                ) AS one
            );
            listed[claim] := (SELECT coalesce(jsonb_agg(due.task_id), '[]') FROM (
                SELECT one.task_id FROM (
                    SELECT {ORDER}, required_skills, not_before, expires_at FROM {schema}.tasks
                    WHERE {IS_DELAYED} ORDER BY not_before LIMIT 1000
                ) AS one
                WHERE not_before <= now_ AND {IS_VALID} AND {is_allowed("one.required_skills")}
                ORDER BY {ORDER} LIMIT reach + 16
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

    FOR claim IN 1 .. claims LOOP
        SELECT * INTO present FROM {schema}.nodes WHERE node_id = claim_nodes[claim];
        places := present.running_tasks + coalesce((
            SELECT sum(one.running) FROM unnest(node_ids, node_running) AS one (id, running)
            WHERE one.id = claim_nodes[claim]), 0);
        granted[claim] := CASE WHEN present.status = 'online' THEN greatest(0,
            least(claim_places[claim], present.max_concurrent_tasks - greatest(0, places)))
            ELSE 0 END;
        node_ids := node_ids || claim_nodes[claim];
        node_running := node_running || granted[claim];
        node_successful := node_successful || 0;
        node_failed := node_failed || 0;
        node_seconds := node_seconds || 0::double precision;
        -- Claims that choose from the same tasks are served together, in their order.
        CONTINUE WHEN claim < claims AND NOT preferring AND groups[claim] = groups[claim + 1]
            AND listed[claim] = listed[claim + 1] AND is_listed[claim] = is_listed[claim + 1];
        places := (SELECT sum(one) FROM unnest(granted[first_claim:claim]) AS one);
        IF preferring THEN
            reach := greatest({WINDOW}, places);
            WITH seen AS (
                SELECT one.*, row_number() OVER (ORDER BY {ORDER}) AS place,
                    CASE WHEN passed_over_at > updated_at THEN passed_over_at END AS passed_at
                FROM ({candidates(window, "reach")}
                ) AS one ORDER BY {ORDER} LIMIT reach
            ), ranked AS (
                SELECT seen.*, row_number() OVER (
                    PARTITION BY priority
                    ORDER BY coalesce(NOT (passed_at > now_ - {PATIENCE}
                        AND passed_at < now_ + {PATIENCE}), false) DESC,
                    {common("optional_skills", "skills[claim]")}
                        + {common("affinity_tags", keys_of("present.tags"))} DESC, place
                ) + min(place) OVER (PARTITION BY priority) - 1 AS rank FROM seen
            ), taken AS (
                SELECT ranked.*, max(place) FILTER (WHERE rank <= places)
                    OVER (PARTITION BY priority) AS last_taken FROM ranked
            )
            SELECT coalesce(jsonb_agg(task_id ORDER BY rank), '[]'), array_agg(task_id)
                FILTER (WHERE rank > places AND place < last_taken AND passed_at IS NULL)
            INTO chosen, passed FROM taken;
            groups[claim] := '[]';
            listed[claim] := chosen;
            is_listed[claim] := true;
        END IF;
        RETURN QUERY WITH best AS MATERIALIZED (
            SELECT one.*, asked.node_id, asked.steps,
                sum(asked.steps) OVER (ORDER BY one.place) AS step
            FROM (
                SELECT found.*, row_number() OVER (ORDER BY list_place, {ORDER}) AS place
                FROM ({candidates(claimed, "places", "FOR UPDATE OF tasks SKIP LOCKED")}
                ) AS found ORDER BY list_place, {ORDER} LIMIT places
            ) AS one JOIN (
                SELECT given.node_id, CASE WHEN given.starts THEN 2 ELSE 1 END AS steps,
                    given.places, sum(given.places) OVER (ORDER BY given.place) AS last_place
                FROM unnest(claim_nodes[first_claim:claim], granted[first_claim:claim],
                    claim_starts[first_claim:claim])
                    WITH ORDINALITY AS given (node_id, places, starts, place)
            ) AS asked ON one.place <= asked.last_place
                AND one.place > asked.last_place - asked.places
        ), claimed AS (
            UPDATE {schema}.tasks SET assigned_node = best.node_id,
                attempt = tasks.attempt + 1,
                status = CASE WHEN best.steps = 2 THEN 'running' ELSE 'scheduled' END,
                scheduled_at = best.claimed_at, completed_at = NULL,
                started_at = CASE WHEN best.steps = 2 THEN best.claimed_at END,
                updated_at = now_, version = last + best.step
            FROM best WHERE tasks.task_id = best.task_id
            RETURNING best.version AS was, best.steps, tasks AS row_
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
        IF passed IS NOT NULL THEN
            UPDATE {schema}.tasks SET passed_over_at = now_ WHERE task_id IN (
                SELECT task_id FROM {schema}.tasks WHERE task_id = ANY (passed)
                FOR UPDATE SKIP LOCKED
            );
        END IF;
        FOR one IN first_claim .. claim LOOP
            places := least(granted[one], count_);
            count_ := count_ - places;
            last := last + places * CASE WHEN claim_starts[one] THEN 2 ELSE 1 END;
            node_running[array_length(node_ids, 1) - claim + one] := places;
        END LOOP;
        first_claim := claim + 1;
    END LOOP;

    IF node_ids IS NOT NULL THEN
        RETURN QUERY WITH given AS (
            SELECT one.node_id, sum(one.running) AS running, sum(one.successful) AS successful,
                sum(one.failed) AS failed, sum(one.seconds) AS seconds
            FROM unnest(node_ids, node_running, node_successful, node_failed, node_seconds)
                AS one (node_id, running, successful, failed, seconds)
            WHERE one.running <> 0 OR one.successful <> 0 OR one.failed <> 0
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


def upgrade() -> None:
    dialect, schema = op.get_context().dialect.name, op.get_context().version_table_schema
    prefix = f"{schema}." if schema else ""
    op.add_column("tasks", sa.Column("passed_over_at", Moment), schema=schema)
    op.execute(
        f"CREATE INDEX ix_tasks_preferring ON {prefix}tasks (max_retries) WHERE {IS_PREFERRING}"
    )
    if dialect == "postgresql":
        scripts = context.script
        drop = scripts.get_revision("0004").module.drop
        op.execute(drop(scripts.get_revision("0009").module.function(schema, scripts)))
        _index_ready_tasks(prefix, GROUP)
        op.execute(function(schema, scripts))


def downgrade() -> None:
    """Forget which tasks were passed over, and index tasks by all their skills again."""
    dialect, schema = op.get_context().dialect.name, op.get_context().version_table_schema
    prefix = f"{schema}." if schema else ""
    op.execute(f"DROP INDEX {prefix}ix_tasks_preferring")
    if dialect == "postgresql":
        scripts = context.script
        op.execute(scripts.get_revision("0004").module.drop(function(schema, scripts)))
        _index_ready_tasks(prefix, group_of(SKILLS))
    op.execute(f"ALTER TABLE {prefix}tasks DROP COLUMN passed_over_at")
    if dialect == "postgresql":
        op.execute(scripts.get_revision("0009").module.function(schema, scripts))


def _index_ready_tasks(prefix: str, group: str) -> None:
    op.execute(f"DROP INDEX {prefix}ix_tasks_ready")
    op.execute(f"CREATE INDEX ix_tasks_ready ON {prefix}tasks ({group}, {ORDER}) WHERE {IS_READY}")
