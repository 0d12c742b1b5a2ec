"""Faults for `verify` and `doctor`: what damages a store, what is said of it, and what is repaired.

`{at}` of a statement is a time in the year 2200, `{early}` one in 1970; `{odd}` makes a column take
any text on PostgreSQL, which SQLite does by itself.
"""

from __future__ import annotations

from typing import Any, NamedTuple

SQLITE, POSTGRESQL = "sqlite", "postgresql"


class Fault(NamedTuple):
    """One way to damage a store."""

    sql: str
    """Statements, separated by semicolons."""
    said: str
    """A regular expression for what is said of it."""
    heals: bool = False
    """Whether `verify --repair` repairs it."""
    kind: str | None = None
    """The only kind of database on which it is possible."""


TASK = "UPDATE tasks SET {} WHERE task_id = '{}'"
LAST = "WHERE revision = (SELECT version FROM tasks WHERE task_id = 'a')"
CHANGE = f"UPDATE changes SET {{}} {LAST}"


def _task(values: str, said: str, id: str = "a", **more: object) -> Fault:
    return Fault(TASK.format(values, id), f"'{id}'.*{said}", **more)  # type: ignore[arg-type]


def _node(values: str, said: str, **more: object) -> Fault:
    sql = f"UPDATE nodes SET {values} WHERE node_id = 'n'"
    return Fault(sql, f"'n'.*{said}", **more)  # type: ignore[arg-type]


def _change(values: str, said: str, **more: object) -> Fault:
    return Fault(CHANGE.format(values), said, **more)  # type: ignore[arg-type]


_POSTGRESQL_SCHEMA: dict[str, tuple[Any, ...]] = {
    "no key of tasks": ("ALTER TABLE tasks DROP CONSTRAINT pk_tasks", "lacks.*pk_tasks", True),
    "no key of nodes": ("ALTER TABLE nodes DROP CONSTRAINT pk_nodes", "lacks.*pk_nodes", True),
    "no key of changes": ("ALTER TABLE changes DROP CONSTRAINT pk_changes", "pk_changes", True),
    "no key of counters": ("ALTER TABLE counters DROP CONSTRAINT pk_counters", "pk_coun", True),
    "no check of counters": (
        "ALTER TABLE counters DROP CONSTRAINT ck_counters_one_row", "one_row", True,
    ),
    "no check": ("ALTER TABLE tasks DROP CONSTRAINT ck_tasks_status", "ck_tasks_status", True),
    "other check": (
        "ALTER TABLE tasks DROP CONSTRAINT ck_tasks_priority;"
        "ALTER TABLE tasks ADD CONSTRAINT ck_tasks_priority CHECK (priority >= 0)",
        "ck_tasks_priority", True,
    ),
    "check of new rows only": (
        "ALTER TABLE nodes DROP CONSTRAINT ck_nodes_status;"
        "ALTER TABLE nodes ADD CONSTRAINT ck_nodes_status CHECK (status IN ('online', 'offline',"
        " 'busy', 'maintenance', 'error')) NOT VALID", "ck_nodes_status", True,
    ),
    "further check": ("ALTER TABLE tasks ADD CONSTRAINT c CHECK (name <> 'x')", "'c'.*DROP"),
    "foreign key": (
        "UPDATE tasks SET assigned_node = NULL WHERE assigned_node NOT IN ('n');"
        "ALTER TABLE tasks ADD CONSTRAINT f FOREIGN KEY (assigned_node) REFERENCES nodes",
        "'f'.*DROP CONSTRAINT",
    ),
    "unlogged tasks": ("ALTER TABLE tasks SET UNLOGGED", "tasks is UNLOGGED.*SET LOGGED", True),
    "unlogged changes": ("ALTER TABLE changes SET UNLOGGED", "changes is UNLOGGED", True),
    "unlogged nodes": ("ALTER TABLE nodes SET UNLOGGED", "nodes is UNLOGGED", True),
    "row security": (
        "ALTER TABLE tasks ENABLE ROW LEVEL SECURITY", "row security.*DISABLE ROW LEVEL SECURITY",
    ),
    "forced row security": (
        "ALTER TABLE tasks FORCE ROW LEVEL SECURITY", "forced row security.*NO FORCE",
    ),
    "policy": ("CREATE POLICY p ON tasks USING (true)", "policy 'p'.*DROP POLICY"),
    "rule": ("CREATE RULE r AS ON DELETE TO tasks DO INSTEAD NOTHING", "rule 'r'.*DROP RULE"),
    "trigger before": (
        "CREATE FUNCTION no() RETURNS trigger LANGUAGE plpgsql AS 'BEGIN RETURN NULL#SEMI# END';"
        "CREATE TRIGGER stray BEFORE INSERT ON tasks FOR EACH ROW EXECUTE FUNCTION no()",
        "trigger 'stray'.*DROP TRIGGER",
    ),
    "trigger after": (
        "CREATE FUNCTION later() RETURNS trigger LANGUAGE plpgsql AS 'BEGIN RETURN NULL#SEMI# END';"
        "CREATE TRIGGER late AFTER INSERT ON changes FOR EACH ROW EXECUTE FUNCTION later()",
        "trigger 'late'.*DROP TRIGGER",
    ),
    "child": ("CREATE TABLE child () INHERITS (tasks)", "child.*NO INHERIT"),
    "parent": (
        "CREATE TABLE parent (name text NOT NULL); ALTER TABLE tasks INHERIT parent",
        "parent.*NO INHERIT",
    ),
    "other type": (
        "ALTER TABLE tasks ALTER retry_count TYPE text", "retry_count.*type text instead of bigint",
    ),
    "longer type": (
        "ALTER TABLE tasks ALTER user_id TYPE varchar(300)", r"user_id.*varying\(300\)",
    ),
    "other collation": (
        'ALTER TABLE tasks ALTER task_id TYPE varchar(255) COLLATE "default"', "task_id.*COLLATE",
    ),
    "jsonb": ("ALTER TABLE tasks ALTER metadata TYPE jsonb USING metadata::jsonb", "type jsonb"),
    "column that accepts NULL": (
        "ALTER TABLE tasks ALTER name DROP NOT NULL", "name.*accepts NULL", True,
    ),
    "column that refuses NULL": (
        "UPDATE nodes SET tags = '[]'; ALTER TABLE nodes ALTER tags SET NOT NULL",
        "tags.*refuses NULL", True,
    ),
    "other default": ("ALTER TABLE tasks ALTER retry_count SET DEFAULT 7", "default '?7", True),
    "no default": ("ALTER TABLE tasks ALTER version DROP DEFAULT", "version.*default None", True),
    "computed default": ("ALTER TABLE tasks ALTER name SET DEFAULT lower('A')", "name.*lower"),
    "invalid index": (
        "UPDATE pg_index SET indisvalid = false WHERE indexrelid = 'ix_nodes_beat'::regclass",
        "ix_nodes_beat.*invalid.*REINDEX", True,
    ),
    "unique index": ("CREATE UNIQUE INDEX u ON tasks (name)", "unique index.*'u'.*DROP INDEX"),
    "renamed function": (
        "ALTER FUNCTION {function} RENAME TO mine", "lacks the function.*db upgrade",
    ),
    "function of the name": (
        "CREATE FUNCTION {function}() RETURNS text LANGUAGE sql AS 'SELECT NULL::text'",
        "another function",
    ),
}  # fmt: skip

_TABLE_SQL = (
    "PRAGMA writable_schema = ON; UPDATE sqlite_master SET sql = replace(sql, {}) WHERE name = '{}'"
)

_SQLITE_SCHEMA: dict[str, tuple[Any, ...]] = {
    "trigger that deletes": (
        "CREATE TRIGGER stray AFTER UPDATE ON tasks BEGIN DELETE FROM tasks#SEMI# END",
        "trigger 'stray'.*DROP TRIGGER",
    ),
    "trigger on changes": (
        "CREATE TRIGGER stray BEFORE INSERT ON changes BEGIN SELECT 1#SEMI# END",
        "trigger 'stray'.*DROP TRIGGER",
    ),
    "view of tasks": ("CREATE VIEW mine AS SELECT * FROM tasks", "view 'mine'.*DROP VIEW"),
    "further index": ("CREATE INDEX mine ON tasks (name)", "index 'mine'.*DROP INDEX"),
    "table without types": (
        "CREATE TABLE x AS SELECT * FROM tasks; DROP TABLE tasks; ALTER TABLE x RENAME TO tasks",
        "table 'tasks'", True,
    ),
    "no key": (
        "CREATE TABLE x AS SELECT * FROM nodes; DROP TABLE nodes; ALTER TABLE x RENAME TO nodes",
        "pk_nodes PRIMARY KEY", True,
    ),
    "no check": (
        _TABLE_SQL.format("'CHECK (priority BETWEEN 0 AND 3)', 'CHECK (1)'", "tasks"),
        "table 'tasks'", True,
    ),
    "other type": (
        _TABLE_SQL.format("'retry_count BIGINT', 'retry_count TEXT'", "tasks"),
        "retry_count", True,
    ),
    "other default": (
        _TABLE_SQL.format("'retry_count BIGINT DEFAULT ''0''', 'retry_count BIGINT DEFAULT 1'",
        "tasks"), "retry_count", True,
    ),
    "column that accepts NULL": (
        _TABLE_SQL.format("'name TEXT NOT NULL', 'name TEXT'", "tasks"), "name TEXT", True,
    ),
    "generated column elsewhere": (
        "CREATE TABLE t (a, b AS (a + 1))", "generated column.*DROP TABLE",
    ),
    "index with an expression elsewhere": (
        "CREATE TABLE t (a); CREATE INDEX i ON t (a + 1)", "index with an expression.*DROP INDEX",
    ),
}  # fmt: skip

_SCHEMA = {
    "no index": Fault("DROP INDEX ix_tasks_status", "lacks.*ix_tasks_status", True),
    "no index of claims": Fault("DROP INDEX ix_tasks_ready", "lacks.*ix_tasks_ready", True),
    "no index of nodes": Fault("DROP INDEX ix_nodes_beat", "lacks.*ix_nodes_beat", True),
    "index of other columns": Fault(
        "DROP INDEX ix_tasks_status; CREATE INDEX ix_tasks_status ON tasks (status)",
        "ix_tasks_status", True,
    ),
    "index of all rows": Fault(
        "DROP INDEX ix_tasks_pending;"
        "CREATE INDEX ix_tasks_pending ON tasks (priority, submitted_at, task_id)",
        "ix_tasks_pending", True,
    ),
    "no tasks": Fault("DROP TABLE tasks{cascade}", "lacks.*tasks.*backup"),
    "no nodes": Fault("DROP TABLE nodes{cascade}", "lacks.*nodes.*backup"),
    "no changes": Fault("DROP TABLE changes{cascade}", "lacks.*changes.*backup"),
    "no table of counters": Fault("DROP TABLE counters{cascade}", "lacks.*counters.*backup"),
    "no table of leases": Fault("DROP TABLE leases{cascade}", "lacks.*leases"),
    "table under another name": Fault("ALTER TABLE nodes RENAME TO old", "lacks.*nodes"),
    "view in place of a table": Fault(
        "ALTER TABLE nodes RENAME TO old; CREATE VIEW nodes AS SELECT * FROM old", "nodes",
    ),
    "no column with a default": Fault("ALTER TABLE nodes DROP COLUMN hostname", "hostname", True),
    "no column": Fault("ALTER TABLE tasks DROP COLUMN name", "name.*backup"),
    "renamed column": Fault("ALTER TABLE nodes RENAME COLUMN arch TO other", "arch"),
    "further column": Fault("ALTER TABLE tasks ADD COLUMN colour TEXT", "colour"),
    "no table of the version": Fault(
        "DROP TABLE alembic_version", "alembic_version is missing.*INSERT", True,
    ),
    "no version": Fault("DELETE FROM alembic_version", "alembic_version is empty.*INSERT", True),
    "later version": Fault("UPDATE alembic_version SET version_num = '9999'", "9999"),
    "unknown version": Fault("UPDATE alembic_version SET version_num = '00x'", "00x"),
    **{
        f"{name} (postgresql)": Fault(found[0], found[1], len(found) == 3, POSTGRESQL)
        for name, found in _POSTGRESQL_SCHEMA.items()
    },
    **{
        f"{name} (sqlite)": Fault(found[0], found[1], len(found) == 3, SQLITE)
        for name, found in _SQLITE_SCHEMA.items()
    },
}  # fmt: skip

_WHOLE = {
    "no counters": Fault("DELETE FROM counters", "row of counters is missing", True),
    "negative counter": Fault("UPDATE counters SET compacted = -5", "negative"),
    "compacted too far": Fault("UPDATE counters SET compacted = 999", "compacted up to 999"),
    "compacted, but there": Fault(
        "UPDATE counters SET compacted = (SELECT max(revision) FROM changes) - 1", "still there",
    ),
    "beat at the end": Fault(f"UPDATE nodes SET beat = {2**62 + 1} WHERE node_id = 'n'", "largest"),
    "revision far ahead": _change("revision = 900", "missing"),
    "newest change": Fault(
        "DELETE FROM changes WHERE revision = (SELECT max(revision) FROM changes)", "the newest is",
    ),
    "empty item": _change("item_id = ''", "''"),
    "empty identifier": Fault("UPDATE tasks SET task_id = '' WHERE task_id = 'a'", "''"),
    "bytes as an identifier": Fault(
        "UPDATE tasks SET task_id = x'6161' WHERE task_id = 'd'", "is not text", kind=SQLITE,
    ),
    "text as a counter": Fault("UPDATE counters SET beat = 'x'", "not all are int", kind=SQLITE),
    "text as a beat": Fault(
        "UPDATE nodes SET beat = 'x' WHERE node_id = 'n'", "not all are int", kind=SQLITE,
    ),
}  # fmt: skip

_VALUES = {
    "type of a task": _task("task_type = 'odd'{odd}", "odd"),
    "status of a task": _task("status = 'odd'{odd}", "odd"),
    "priority": _task("priority = 9{odd}", "9"),
    "status of a node": _node("status = 'odd'{odd}", "odd"),
    "empty key": _task("idempotency_key = ''", "idempotency_key"),
    "negative retries": _task("retry_count = -1", "retry_count"),
    "negative limit": _task("max_retries = -1", "max_retries"),
    "negative timeout": _task("timeout = -1", "timeout"),
    "negative attempt": _task("attempt = -1", "attempt"),
    "negative losses": _task("losses = -1", "losses"),
    "negative limit of losses": _task("max_losses = -1", "max_losses"),
    "percentage": _node("cpu_usage = 101", "cpu_usage"),
    "negative percentage": _node("memory_usage = -1", "memory_usage"),
    "infinite disk": _node("disk_usage = '{infinity}'", "disk_usage"),
    "no number": _node("cpu_usage = 'NaN'", "cpu_usage"),
    "empty lease": _node("lease_seconds = 0", "lease_seconds"),
    "negative lease": _node("lease_seconds = -5", "lease_seconds"),
    "endless lease": _node("lease_seconds = 2000000000", "lease_seconds"),
    "negative port": _node("port = -1", "port"),
    "negative total": _node("total_tasks_processed = -1", "total_tasks_processed"),
    "negative slots": _node("max_concurrent_tasks = -1", "max_concurrent_tasks"),
    "negative mean": _node("average_execution_time = -1", "average_execution_time"),
    "long text": _task("name = '{long}'", "name"),
    "negative beat": Fault("UPDATE nodes SET beat = -1 WHERE node_id = 'n'", "beat -1"),
    "more retries than the limit": _task("retry_count = 9", "retry_count=9.*max_retries=3"),
    "more losses than the limit": _task("losses = 99", "losses=99.*max_losses=10"),
    "more successes than tasks": _node("successful_tasks = 99", "99 tasks well.*in total"),
    "more failures than tasks": _node("failed_tasks = 99", "99 badly.*in total"),
    "counter of a node": _node("running_tasks = 5", "running_tasks=5, but 2", heals=True),
    "counter of an idle node": Fault(
        "UPDATE nodes SET running_tasks = 1 WHERE node_id = 'idle'", "'idle'.*but 0", True,
    ),
    "same key twice": Fault(
        "UPDATE tasks SET idempotency_key = 'key' WHERE task_id IN ('d', 'e', 'a')", "have the key",
    ),
    "text as a number": _task("timeout = 'soon'", "timeout", kind=SQLITE),
    "bytes as a name": _task("name = x'00ff'", "name", kind=SQLITE),
    "NUL in a name": _task("name = 'a' || char(0) || 'b'", "NUL", kind=SQLITE),
    "no text": _task("name = CAST(x'ff' AS TEXT)", "Could not decode", kind=SQLITE),
    "no text in JSON": _task("result = CAST(x'22ff22' AS TEXT)", "", kind=SQLITE),
    "text as a version": _task("version = 'x'", "version", kind=SQLITE),
    "fraction as a version": _task("version = 1.5", "version", kind=SQLITE),
    "bytes as a node": _task("assigned_node = x'ff'", "assigned_node", "b", kind=SQLITE),
}  # fmt: skip

_TIMES = {
    **{
        f"{name} in 2200": _task(f"{name} = {{at}}", f"{name} 2200-.*future")
        for name in (
            "submitted_at", "scheduled_at", "started_at", "completed_at", "updated_at",
            "cancel_requested_at",
        )
    },
    "registration in 2200": _node("registered_at = {at}", "registered_at 2200"),
    "heartbeat in 2200": _node("last_heartbeat = {at}", "last_heartbeat 2200"),
    "change in 2200": _change("changed_at = {at}", "Change .*future"),
    "completed before started": _task("completed_at = {early}", "before its start"),
    "no completion": _task("completed_at = NULL", "no completed_at", heals=True),
    "no start": _task("started_at = NULL", "no started_at", "b", heals=True),
    "no schedule": _task("scheduled_at = NULL", "no scheduled_at", "c", heals=True),
    "infinity": _task("completed_at = 'infinity'", "endless", kind=POSTGRESQL),
    "minus infinity": _task("submitted_at = '-infinity'", "endless", kind=POSTGRESQL),
    "before Christ": _task("submitted_at = '0044-03-15 BC'", "cannot be read", kind=POSTGRESQL),
    "infinite plan": _task("not_before = 'infinity'", "endless", kind=POSTGRESQL),
    "infinite change": _change("changed_at = 'infinity'", "endless", kind=POSTGRESQL),
    "infinite heartbeat": _node("last_heartbeat = 'infinity'", "endless", kind=POSTGRESQL),
    "text as a time": _task("submitted_at = 'monday'", "submitted_at", kind=SQLITE),
    "text as a time of a change": _change("changed_at = 'monday'", "Change", kind=SQLITE),
    "endless time": _task(f"expires_at = {2**62}", "expires_at", kind=SQLITE),
    "endless time of a change": _change(f"changed_at = {2**62}", "Change", kind=SQLITE),
}  # fmt: skip

_JSON = {
    "parameters": _task("parameters = '[1]'", "parameters"),
    "metadata": _task("metadata = '\"x\"'", "metadata"),
    "tags": _node("tags = '{{\"a\": 1}}'", "tags"),
    "skills of a node": _node("available_skills = '[1]'", "available_skills"),
    "required skills": _task("required_skills = '[[\"a\"]]'", "required_skills"),
    "optional skills": _task("optional_skills = '[\"a\", null]'", "optional_skills"),
    "affinity": _task("affinity_tags = '3'", "affinity_tags"),
    "lone surrogate": _task("result = '\"\\ud800\"'", ""),
    "NUL in JSON": _task("result = '\"\\u0000\"'", "result"),
    "deep JSON": _task(f"result = '{'[' * 300}{']' * 300}'", "result"),
    "progress": _node("progress = '[]'", "progress"),
    "progress without values": _node("progress = '{{\"b\": {{}}}}'", "progress"),
    "cut JSON": _task("result = '{{\"cut'", "result", kind=SQLITE),
    "bytes as JSON": _task("metadata = x'00ff'", "metadata", kind=SQLITE),
}

_FEED = {
    "version of the future": _task("version = 999999", "version 999999"),
    "version of another": Fault(
        "UPDATE tasks SET version = (SELECT version FROM nodes WHERE node_id = 'n')"
        " WHERE task_id = 'a'", "'a'.*version", True,
    ),
    "no version of a row": _task("version = 0", "version 0", heals=True),
    "older version": Fault(
        "UPDATE tasks SET version = (SELECT max(previous) FROM changes WHERE item_id = 'a')"
        " WHERE task_id = 'a'", "'a'.*last changed", True,
    ),
    "status past the feed": _task("status = 'timeout', completed_at = submitted_at",
        "past the feed", "d", heals=True),
    "node past the feed": _task("assigned_node = 'idle'", "past the feed", heals=True),
    "status of a node past the feed": _node("status = 'error'", "past the feed", heals=True),
    "removed task": Fault("DELETE FROM tasks WHERE task_id = 'd'", "'d' is gone", True),
    "removed node": Fault("DELETE FROM nodes WHERE node_id = 'idle'", "'idle' is gone", True),
    "change in between": Fault(
        "DELETE FROM changes WHERE revision = (SELECT max(previous) FROM changes"
        " WHERE item_id = 'a')", "missing",
    ),
    "chain": Fault(
        f"UPDATE changes SET previous = (SELECT version FROM nodes WHERE node_id = 'n') {LAST}",
        "another task or node",
    ),
    "later change before": _change("previous = 999999", "follows 999999"),
    "step": _change("from_status = 'failed'", "does not lead"),
    "kind": _change("kind = 'created'", "kind 'created'"),
    "unknown kind": _change("kind = 'odd'", "kind 'odd'"),
    "unknown item": _change("item = 'odd'", "Odd"),
    "unknown status": _change("to_status = 'odd'", "odd"),
    "item of another": _change("item_id = 'b'", "'b'"),
    "bytes as a status": _change("to_status = x'00'", "wrong type", kind=SQLITE),
    "bytes as an item": _change("item_id = x'ff'", "wrong type", kind=SQLITE),
    "text as a revision": _change("previous = 'b'", "wrong type", kind=SQLITE),
    "no text as a reason": _change("reason = CAST(x'ff' AS TEXT)", "", kind=SQLITE),
}  # fmt: skip

ROW_FAULTS = {**_VALUES, **_TIMES, **_JSON, **_FEED}
"""Faults of single rows, by name: the checks of other rows must not suffer."""

_ALONE = frozenset(
    {"no key of nodes", "foreign key", "parent", "renamed function", "function of the name"}
)

_TOGETHER = frozenset(
    {
        "no index of claims", "index of other columns", "index of all rows",
        "no column with a default", "further column",
    }
)  # fmt: skip

JOINT_FAULTS = {
    name: fault
    for name, fault in _SCHEMA.items()
    if name in _TOGETHER
    or (name.endswith(" (postgresql)") and name.removesuffix(" (postgresql)") not in _ALONE)
}
"""Faults of the schema that do not hide each other on PostgreSQL, by name."""

STORE_FAULTS = {**_SCHEMA, **_WHOLE}
"""Faults of the schema, and of rows that concern the whole store, by name."""
