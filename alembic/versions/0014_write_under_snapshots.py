"""Keep writes as fast while a session holds a snapshot, on PostgreSQL.

Then the server removes no outdated version of a row. `store_write` looks for the newest version of
a node first, and a claim does not read the index of ready tasks from its beginning again: the
session remembers where the tasks of each group began.
"""

from types import ModuleType
from typing import Any

from alembic import context, op

revision = "0014"
down_revision = "0013"
branch_labels = None
depends_on = None

LONG_SEARCH = 1000
"""Entries of the index of ready tasks; a search that reads more of them is remembered."""

MOST_CHANGES = 500
"""Changes since a search was remembered; after more of them it is made again."""

MOST_STARTS = 64
"""Groups of ready tasks, by skills and priority, that a session remembers."""

MEMORY_SECONDS = 10
"""A search is made again after so long: changes by hand are not in the feed."""

LAST_PRIORITY = 3
"""Priorities of tasks are 0 to 3; each group of tasks is searched for each of them."""


def function(schema: str, scripts: Any) -> str:
    """Return the definition of the function, which names the schema of each table and type."""
    sql = _function(schema, scripts.get_revision("0010").module)
    if schema == "public":
        return sql
    own_names: str = scripts.get_revision("0009").module.with_own_names(sql)
    return own_names


def _function(schema: str, parts: ModuleType) -> str:
    """Return the definition, made with the parts of SQL of migration 0010."""
    order, skills, is_valid = parts.ORDER, parts.SKILLS, parts.IS_VALID
    bucket_of, group_of, is_allowed = parts.bucket_of, parts.group_of, parts.is_allowed
    columns = parts.COLUMNS
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
    next_head = f"""SELECT {bucket_of(skills)} AS bucket, {group_of(skills)} AS key,
                                required_skills, {order} FROM {schema}.tasks
                                WHERE {parts.IS_READY}"""
    in_order = f"ORDER BY {parts.GROUP}, {order}"
    starts = """AS one (skills text, priority integer, submitted_at timestamptz, task_id text,
                        last_priority integer)"""
    first_start = f"""0 AS priority, '-infinity'::timestamptz AS submitted_at,
                            '' AS task_id, {LAST_PRIORITY} AS last_priority"""
    group = f"{bucket_of('one.skills')}, {group_of('one.skills')}"
    # With `group = …`, the planner would take the index of pending tasks, which is in this order.
    ready = f"""FROM {schema}.tasks WHERE {parts.IS_READY}
                        AND ({parts.GROUP}, {order})
                            >= ({group}, one.priority, one.submitted_at, one.task_id)
                        AND ({parts.GROUP}, priority) <= ({group}, one.last_priority)
                        AND {skills} IS NOT DISTINCT FROM one.skills"""
    start = f"{skills} AS skills, {order}, priority AS last_priority"
    entries_read = f"pg_stat_get_xact_tuples_returned('{schema}.ix_tasks_ready'::regclass)"
    setting = f"""'openclaw_store.ready_' || '{schema}.tasks'::regclass::oid || '_'
                    || (hashtext(present_skills::text) & 7)"""

    def newest(node: str) -> str:
        """Return the end of a query for the newest version of a node.

        Equal keys are in the order of their rows in the index, where new versions come last. With
        `node_id = …`, the planner would ignore `ORDER BY` and read all of them from the oldest on.
        """
        return f"""FROM {schema}.nodes WHERE node_id >= {node} AND node_id <= {node}
            ORDER BY node_id DESC LIMIT 1"""

    def candidates(columns: str, limit: str, lock: str = "") -> str:
        return f"""
                    SELECT found.* FROM jsonb_to_recordset(groups[claim]) {starts}, LATERAL (
                        SELECT {columns}, 0::bigint AS list_place {ready} AND {is_valid}
                        {in_order} LIMIT {limit} {lock}
                    ) AS found
                    UNION ALL
                    SELECT found.* FROM (
                        SELECT {columns}, CASE WHEN is_listed[claim] THEN given.place ELSE 0 END
                        FROM jsonb_array_elements_text(listed[claim]) WITH ORDINALITY
                            AS given (id, place)
                        JOIN {schema}.tasks ON tasks.task_id = given.id
                        WHERE {parts.IS_DUE} AND (is_listed[claim] OR not_before IS NOT NULL)
                        AND {is_valid} ORDER BY given.place LIMIT {limit} {lock}
                    ) AS found"""

    # Citus knows no `ctid`.
    by_id = f"""given JOIN (SELECT node_id AS id, version AS was FROM {schema}.nodes) AS found
                    ON found.id = given.node_id"""
    newest_first = f"""given, LATERAL (
                    SELECT ctid AS id, version AS was {newest("given.node_id")}
                ) AS found"""

    def add_to_nodes(nodes: str, key: str) -> str:
        """Return the statement that adds to the counters of nodes, and logs it."""
        return f"""RETURN QUERY WITH given AS (
                SELECT one.node_id, sum(one.running) AS running, sum(one.successful) AS successful,
                    sum(one.failed) AS failed, sum(one.seconds) AS seconds
                FROM unnest(node_ids, node_running, node_successful, node_failed, node_seconds)
                    AS one (node_id, running, successful, failed, seconds)
                WHERE one.running <> 0 OR one.successful <> 0 OR one.failed <> 0
                GROUP BY one.node_id
            ), numbered AS (
                SELECT given.*, found.*,
                    row_number() OVER (ORDER BY given.node_id) AS place
                FROM {nodes}
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
                        ELSE nodes.average_execution_time + (
                            numbered.seconds - nodes.average_execution_time
                                * (numbered.successful + numbered.failed))
                            / (nodes.total_tasks_processed + numbered.successful + numbered.failed)
                        END
                FROM numbered WHERE nodes.{key} = numbered.id
                RETURNING numbered.was, nodes AS row_
            ), logged AS (
                INSERT INTO {schema}.changes (revision, changed_at, item, item_id, kind,
                    from_status, to_status, previous)
                SELECT (row_).version, now_, 'node', (row_).node_id, 'updated', (row_).status,
                    (row_).status, nullif(was, 0) FROM counted
            )
            SELECT first, counted.was, NULL::{schema}.tasks, counted.row_ FROM counted;"""

    claimed = f"{order}, version, {parts.CLAIMED_AT}"
    window = f"{order}, optional_skills, affinity_tags, passed_over_at, updated_at"
    return f"""
CREATE FUNCTION {schema}.store_write_5(
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
    compacted_ bigint;  -- changes up to this revision may be gone
    heartbeats bigint;
    last bigint;
    count_ bigint;
    present {schema}.nodes;
    presents {schema}.nodes[];  -- the node of each claim
    present_skills jsonb;  -- of the node of a claim, as the keys of an object
    places bigint;
    reach bigint;  -- tasks among which a claim chooses
    claims integer := coalesce(array_length(claim_nodes, 1), 0);
    first_claim integer := 1;  -- of the claims that are served together
    granted integer[] := '{{}}';  -- places of each claim
    preferring boolean := false;
    skills jsonb[] := '{{}}';  -- of the node of each claim
    -- For each claim, where it starts in the index of ready tasks, for each group of equal skills.
    groups jsonb[] := '{{}}';
    -- If the session remembers groups, or will: at this revision, each of them was searched for
    -- each priority by itself, and had no ready task before its start.
    memories jsonb[] := '{{}}';
    memory jsonb;
    unmerged jsonb;  -- groups of the last claim, without the changes since its memory
    entries bigint;  -- of the index, which this transaction has read before a search
    listed jsonb[] := '{{}}';  -- identifiers of other tasks for each claim
    reaches bigint[] := '{{}}';
    is_listed boolean[] := '{{}}';  -- all tasks of a claim are listed
    is_cut boolean[] := '{{}}';  -- a claim has not looked at all tasks
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
            SELECT true FROM {schema}.tasks WHERE {parts.IS_PREFERRING} ORDER BY max_retries LIMIT 1
        ), false);
        SELECT compacted, coalesce(
            (SELECT revision FROM {schema}.changes ORDER BY revision DESC LIMIT 1), compacted)
        INTO compacted_, first FROM {schema}.counters WHERE id = 1;
        FOR claim IN 1 .. claims LOOP
            SELECT {parts.keys_of("available_skills")},
                greatest(CASE WHEN preferring THEN {parts.WINDOW} ELSE 0 END,
                    least(claim_places[claim], nodes.max_concurrent_tasks))
            INTO present_skills, reach {newest("claim_nodes[claim]")};
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
                is_cut[claim] := is_cut[claim - 1];
                memories[claim] := memories[claim - 1];
                CONTINUE;
            END IF;
            reach := reach * claims;  -- the next claims may choose from the same tasks
            IF (SELECT count(*) > 32 FROM jsonb_object_keys(present_skills)) THEN
                SELECT jsonb_agg(one.task_id ORDER BY {order}) INTO chosen FROM (
                    SELECT {order}, status, required_skills, not_before, expires_at
                    FROM {schema}.tasks WHERE {parts.IS_PENDING}
                    ORDER BY {order} LIMIT greatest(100, reach + 36)
                ) AS one
                WHERE {parts.IS_DUE} AND {is_valid} AND {is_allowed("one.required_skills")};
                -- Other claims may take some of them before the lock.
                IF jsonb_array_length(chosen) >= reach + 16 THEN
                    listed[claim] := chosen;
                    is_listed[claim] := true;
                    is_cut[claim] := true;
                    CONTINUE;
                END IF;
            END IF;
            memory := nullif(current_setting({setting}, true), '')::jsonb;
            IF NOT preferring AND memory->'skills' = present_skills
                AND (memory->>'revision')::bigint
                    BETWEEN greatest(compacted_, first - {MOST_CHANGES}) AND first
                AND (memory->>'until')::float - extract(epoch FROM clock_timestamp())
                    BETWEEN 0 AND {MEMORY_SECONDS}
            THEN
                memories[claim] := memory;
                groups[claim] := memory->'groups';
            ELSE
                entries := {entries_read};
                groups[claim] := (
                    WITH RECURSIVE buckets AS (
                        SELECT DISTINCT hashtextextended(one, 0) AS bucket
                        FROM (SELECT jsonb_object_keys(present_skills) UNION ALL SELECT '')
                            AS given (one)
                    ), heads AS (
                        SELECT next.* FROM buckets, LATERAL (
                            {next_head} AND {bucket_of(skills)} = buckets.bucket
                            {in_order} LIMIT 1
                        ) AS next
                        UNION ALL
                        SELECT next.* FROM heads, LATERAL (
                            {next_head} AND {bucket_of(skills)} = heads.bucket
                            AND {group_of(skills)} > heads.key
                            {in_order} LIMIT 1
                        ) AS next
                    )
                    SELECT coalesce(jsonb_agg(to_jsonb(one)), '[]') FROM (
                        SELECT required_skills::text AS skills, {first_start}
                        FROM heads WHERE {is_allowed("heads.required_skills")}
                        ORDER BY heads.priority, heads.submitted_at, heads.task_id
                        LIMIT 32 + reach
                    ) AS one
                );
                IF NOT preferring AND {entries_read} - entries > {LONG_SEARCH}
                    AND jsonb_array_length(groups[claim]) < least(32 + reach, {MOST_STARTS})
                THEN
                    memories[claim] := jsonb_build_object('skills', present_skills,
                        'revision', first,
                        'until', extract(epoch FROM clock_timestamp()) + {MEMORY_SECONDS});
                    groups[claim] := (
                        SELECT coalesce(jsonb_agg(to_jsonb(one) || jsonb_build_object(
                            'priority', each, 'last_priority', each)), '[]')
                        FROM jsonb_to_recordset(groups[claim]) {starts},
                            generate_series(one.priority, one.last_priority) AS each
                    );
                END IF;
            END IF;
            IF memories[claim] IS NOT NULL THEN
                groups[claim] := (
                    SELECT coalesce(jsonb_agg(to_jsonb(next)), '[]')
                    FROM jsonb_to_recordset(groups[claim]) {starts}, LATERAL (
                        SELECT {start} {ready} {in_order} LIMIT 1
                    ) AS next
                );
            END IF;
            listed[claim] := (SELECT coalesce(jsonb_agg(due.task_id), '[]') FROM (
                SELECT one.task_id FROM (
                    SELECT {order} FROM {schema}.tasks
                    WHERE {parts.IS_DELAYED} AND not_before <= now_ AND {is_valid}
                    AND {is_allowed("required_skills")} ORDER BY not_before LIMIT 1000
                ) AS one ORDER BY {order} LIMIT reach + 16
            ) AS due);
            is_cut[claim] := jsonb_array_length(listed[claim]) >= least(reach + 16, 1000)
                OR memories[claim] IS NULL AND jsonb_array_length(groups[claim]) >= 32 + reach;
        END LOOP;
    END IF;

    PERFORM set_config('lock_timeout', lock_wait, true);
    SELECT beat, compacted INTO heartbeats, first FROM {schema}.counters WHERE id = 1 FOR UPDATE;
    IF NOT FOUND THEN
        RETURN;
    END IF;
    compacted_ := first;
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
        WHERE tasks.idempotency_key IS NOT NULL AND tasks.{parts.IS_LIVE}
    ) OR EXISTS (
        SELECT FROM unnest(memories) AS one WHERE (one->>'revision')::bigint < compacted_
    ) THEN
        RETURN NEXT;
        RETURN;
    END IF;
    FOR claim IN 1 .. claims LOOP
        SELECT * INTO present {newest("claim_nodes[claim]")};
        IF NOT FOUND THEN
            RETURN NEXT;
            RETURN;
        END IF;
        presents[claim] := present;
    END LOOP;
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

    -- Tasks that became ready since the search may precede the starts, or be of other groups.
    FOR claim IN 1 .. claims LOOP
        CONTINUE WHEN memories[claim] IS NULL;
        IF memories[claim] = memories[claim - 1] AND groups[claim] = unmerged THEN
            groups[claim] := groups[claim - 1];
            CONTINUE;
        END IF;
        unmerged := groups[claim];
        present_skills := skills[claim];
        groups[claim] := (
            SELECT coalesce(jsonb_agg(to_jsonb(one) ORDER BY {order}), '[]') FROM (
                SELECT DISTINCT ON (skills, priority) * FROM (
                    SELECT * FROM jsonb_to_recordset(unmerged) {starts}
                    UNION ALL
                    SELECT {start} FROM (
                        SELECT status, not_before, required_skills, {order} FROM (
                            SELECT DISTINCT item_id FROM {schema}.changes WHERE item = 'task'
                            AND revision > (memories[claim]->>'revision')::bigint
                        ) AS changed JOIN {schema}.tasks ON task_id = item_id
                        OFFSET 0  -- or the planner would read the whole index of ready tasks
                    ) AS changed
                    WHERE {parts.IS_READY} AND {is_allowed("required_skills")}
                ) AS found ORDER BY skills, {order}
            ) AS one
        );
    END LOOP;

    FOR claim IN 1 .. claims LOOP
        present := presents[claim];
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
            reach := greatest({parts.WINDOW}, places);
            WITH seen AS (
                SELECT one.*, row_number() OVER (ORDER BY {order}) AS place,
                    CASE WHEN passed_over_at > updated_at THEN passed_over_at END AS passed_at
                FROM ({candidates(window, "reach")}
                ) AS one ORDER BY {order} LIMIT reach
            ), ranked AS (
                SELECT seen.*, row_number() OVER (
                    PARTITION BY priority
                    ORDER BY coalesce(NOT (passed_at > now_ - {parts.PATIENCE}
                        AND passed_at < now_ + {parts.PATIENCE}), false) DESC,
                    {parts.common("optional_skills", "skills[claim]")}
                        + {parts.common("affinity_tags", parts.keys_of("present.tags"))} DESC, place
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
                SELECT found.*, row_number() OVER (ORDER BY list_place, {order}) AS place
                FROM ({candidates(claimed, "places", "FOR UPDATE OF tasks SKIP LOCKED")}
                ) AS found ORDER BY list_place, {order} LIMIT places
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
        IF count_ < places AND is_cut[claim] THEN  -- others have taken what was found
            RAISE 'the batch needs the lock first' USING ERRCODE = 'serialization_failure';
        END IF;
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

    memory := NULL;
    FOR claim IN 1 .. claims LOOP
        CONTINUE WHEN memories[claim] IS NULL OR memories[claim] = memory
            OR jsonb_array_length(groups[claim]) > {MOST_STARTS};
        memory := memories[claim];
        present_skills := skills[claim];
        PERFORM set_config({setting}, (memory || jsonb_build_object(
            'groups', groups[claim], 'revision', last))::text, false);
    END LOOP;

    IF node_ids IS NOT NULL THEN
        IF current_setting('plan_cache_mode') = 'force_custom_plan' THEN  -- on Citus
            {add_to_nodes(by_id, "node_id")}
        ELSE
            -- The next statement sees what others wrote before, without the lock on the counters.
            PERFORM FROM unnest(node_ids) AS given (node_id), LATERAL (
                SELECT {newest("given.node_id")} FOR NO KEY UPDATE
            ) AS locked;
            {add_to_nodes(newest_first, "ctid")}
        END IF;
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
    schema, scripts = op.get_context().version_table_schema, context.script
    if op.get_context().dialect.name == "postgresql":
        before = scripts.get_revision("0010").module.function(schema, scripts)
        op.execute(scripts.get_revision("0004").module.drop(before))
        op.execute(function(schema, scripts))


def downgrade() -> None:
    """Bring back the function that reads the index from its beginning."""
    schema, scripts = op.get_context().version_table_schema, context.script
    if op.get_context().dialect.name == "postgresql":
        op.execute(scripts.get_revision("0004").module.drop(function(schema, scripts)))
        op.execute(scripts.get_revision("0010").module.function(schema, scripts))
