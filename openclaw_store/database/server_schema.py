"""The comparison of the tables on a PostgreSQL server with the models.

The server describes each part of a table as text. The models' own SQL becomes the same text without
the casts, parentheses and spaces that the server adds; these depend on the way a table was made.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

from sqlalchemy import CheckConstraint, Column, Connection, text
from sqlalchemy.dialects import postgresql
from sqlalchemy.schema import CreateColumn, CreateIndex, Table

from openclaw_store.backends import qualified
from openclaw_store.database.claim_statements import SKILL_GROUPS
from openclaw_store.database.difference import Difference
from openclaw_store.database.tables import IS_READY, Base
from openclaw_store.errors import safe_repr

Key = tuple[str, str, str]
"""A kind of part, its table, and its name."""

_PARTS = text("""
    WITH part AS (
        SELECT pg_class.oid, relname AS item, relkind, relpersistence, relrowsecurity,
            relforcerowsecurity
        FROM pg_class JOIN pg_namespace ON pg_namespace.oid = relnamespace
        WHERE nspname = :schema AND relname = ANY (CAST(:names AS text[]))
    )
    SELECT 'table' AS kind, item, '' AS name, relkind::text AS definition FROM part
    UNION ALL SELECT 'persistence', item, '', relpersistence::text FROM part WHERE relkind = 'r'
    UNION ALL SELECT 'row security', item, '', '' FROM part WHERE relrowsecurity
    UNION ALL SELECT 'forced row security', item, '', '' FROM part WHERE relforcerowsecurity
    UNION ALL SELECT 'column', item, attname, format_type(atttypid, atttypmod)
            || CASE WHEN attcollation <> typcollation THEN ' COLLATE "' || collname || '"'
            ELSE '' END
        FROM part JOIN pg_attribute ON attrelid = part.oid JOIN pg_type ON pg_type.oid = atttypid
        LEFT JOIN pg_collation ON pg_collation.oid = attcollation
        WHERE attnum > 0 AND NOT attisdropped
    UNION ALL SELECT 'required column', item, attname, 'NOT NULL'
        FROM part JOIN pg_attribute ON attrelid = part.oid
        WHERE attnum > 0 AND NOT attisdropped AND attnotnull
    UNION ALL SELECT 'default', item, attname, pg_get_expr(adbin, adrelid)
        FROM part JOIN pg_attrdef ON adrelid = part.oid
        JOIN pg_attribute ON attrelid = adrelid AND attnum = adnum
    UNION ALL SELECT 'constraint', item, conname, pg_get_constraintdef(pg_constraint.oid)
        FROM part JOIN pg_constraint ON conrelid = part.oid WHERE contype NOT IN ('n', 't')
    UNION ALL SELECT CASE WHEN indisvalid AND indisready THEN 'index' ELSE 'invalid index' END,
            item, relname, pg_get_indexdef(indexrelid)
        FROM part JOIN pg_index ON indrelid = part.oid JOIN pg_class ON pg_class.oid = indexrelid
        WHERE NOT (indisvalid AND indisready)
        OR NOT EXISTS (SELECT FROM pg_constraint WHERE conindid = indexrelid)
    UNION ALL SELECT 'trigger', item, tgname, pg_get_triggerdef(pg_trigger.oid)
        FROM part JOIN pg_trigger ON tgrelid = part.oid WHERE NOT tgisinternal
    UNION ALL SELECT 'rule', item, rulename, '' FROM part JOIN pg_rewrite ON ev_class = part.oid
        WHERE rulename <> '_RETURN'
    UNION ALL SELECT 'policy', item, polname, '' FROM part JOIN pg_policy ON polrelid = part.oid
    UNION ALL SELECT 'parent', item, inhparent::regclass::text, ''
        FROM part JOIN pg_inherits ON inhrelid = part.oid
    UNION ALL SELECT 'child', item, inhrelid::regclass::text, ''
        FROM part JOIN pg_inherits ON inhparent = part.oid
    ORDER BY 1, 2, 3""")

_DIALECT = postgresql.dialect()  # type: ignore[no-untyped-call]  # it has no types

_TYPES = {
    "VARCHAR": "character varying",
    "TIMESTAMP WITH TIME ZONE": "timestamp with time zone",
    "FLOAT": "double precision",
}
"""The server's names of types that SQLAlchemy writes differently."""

_ADDED = (
    "::character varying",
    "::text[]",
    "::text",
    "::bigint",
    "USING btree",
    "ARRAY",
    "CAST",
    " AS TEXT",
)
_PUNCTUATION = str.maketrans("", "", "()[] \n")


_READY = (
    f"CREATE INDEX ix_tasks_ready ON {{}} ({', '.join(map(str, SKILL_GROUPS['postgresql']))}, "
    f"priority, submitted_at, task_id) WHERE {IS_READY}"
)
"""The index that is not part of the models, with a place for the name of the table."""


def compare(connection: Connection, schema: str) -> Iterator[Difference]:
    """Yield the differences between the tables and the models; the table of the revision aside."""
    wanted = {"schema": schema, "names": list(Base.metadata.tables)}
    rows = connection.execute(_PARTS, wanted)
    found: dict[Key, str] = {(kind, table, name): it for kind, table, name, it in rows}
    for name, table in Base.metadata.tables.items():
        here = qualified(schema, name)
        kind = found.pop(("table", name, ""), None)
        parts = {key: it for key, it in found.items() if key[1] == name}
        if kind != "r":
            text = f"{here} is no ordinary table" if kind else f"it lacks the table {here}"
            yield Difference(text)
            continue
        expected = _parts_of(table, schema)
        yield from _missing(table, here, expected, parts)
        yield from _additional(here, expected, parts)


def _parts_of(table: Table, schema: str) -> dict[Key, str]:
    """Return the parts of a table, with definitions in the server's own words."""
    parts: dict[Key, str] = {("persistence", table.name, ""): "p"}
    for column in table.columns:
        parts["column", table.name, column.name] = _type_of(column)
        if not column.nullable:
            parts["required column", table.name, column.name] = "NOT NULL"
        if column.server_default is not None:
            parts["default", table.name, column.name] = _default_of(column)
    for constraint in table.constraints:
        name = str(constraint.name)
        if isinstance(constraint, CheckConstraint):
            parts["constraint", table.name, name] = f"CHECK ({constraint.sqltext})"
    key = ", ".join(column.name for column in table.primary_key)
    parts["constraint", table.name, str(table.primary_key.name)] = f"PRIMARY KEY ({key})"
    for index in table.indexes:
        sql = str(CreateIndex(index).compile(dialect=_DIALECT))
        parts["index", table.name, str(index.name)] = sql.replace(
            f" ON {table.name}", f" ON {qualified(schema, table.name)}"
        )
    if table.name == "tasks":
        sql = _READY.format(qualified(schema, table.name))
        parts["index", table.name, "ix_tasks_ready"] = sql
    return parts


def _type_of(column: Column[Any]) -> str:
    name: str = column.type.compile(_DIALECT)
    for ours, theirs in _TYPES.items():
        name = name.replace(ours, theirs)
    kind, _, collation = name.partition(" COLLATE ")
    return f"{kind.lower()} COLLATE {collation}" if collation else kind.lower()


def _default_of(column: Column[Any]) -> str:
    sql = str(CreateColumn(column).compile(dialect=_DIALECT))
    return sql.partition(" DEFAULT ")[2].removesuffix(" NOT NULL")


def _missing(
    table: Table, here: str, expected: Mapping[Key, str], found: Mapping[Key, str]
) -> Iterator[Difference]:
    """Yield the parts that the table lacks, or has with another definition."""
    for key, definition in expected.items():
        kind, _, name = key
        there = found.get(key)
        if there is not None and _same(kind, there, definition):
            continue
        if kind in ("required column", "default") and ("column", table.name, name) not in found:
            continue  # the column is missing, with all that belongs to it
        if kind == "index" and ("invalid index", table.name, name) in found:
            continue
        yield _DIFFERENCES[kind](table, here, name, there, definition)


def _persistence(table: Table, here: str, name: str, there: Any, wanted: str) -> Difference:
    return Difference(
        f"{here} is UNLOGGED: its rows are lost when the server stops",
        [f"ALTER TABLE {here} SET LOGGED"], is_safe=True, is_blocking=False,
    )  # fmt: skip


def _column(table: Table, here: str, name: str, there: str | None, wanted: str) -> Difference:
    if there is None:
        column = table.columns[name]
        definition = str(CreateColumn(column).compile(dialect=_DIALECT))
        can_be_added = column.nullable or column.server_default is not None
        remedy = [f"ALTER TABLE {here} ADD COLUMN {definition}"] if can_be_added else []
        return Difference(f"{here} lacks the column {name}", remedy, is_safe=can_be_added)
    return Difference(
        f"the column {name} of {here} has the type {there} instead of {wanted}",
        [f"ALTER TABLE {here} ALTER COLUMN {name} TYPE {wanted} USING {name}::{wanted}"],
    )


def _required(table: Table, here: str, name: str, there: Any, wanted: str) -> Difference:
    return Difference(
        f"the column {name} of {here} accepts NULL",
        [f"ALTER TABLE {here} ALTER COLUMN {name} SET NOT NULL"], is_safe=True, is_blocking=False,
    )  # fmt: skip


def _default(table: Table, here: str, name: str, there: str | None, wanted: str) -> Difference:
    return Difference(
        f"the column {name} of {here} has the default {there} instead of {wanted}",
        [f"ALTER TABLE {here} ALTER COLUMN {name} SET DEFAULT {wanted}"],
        is_safe=True, is_blocking=there is not None,
    )  # fmt: skip


def _constraint(table: Table, here: str, name: str, there: str | None, wanted: str) -> Difference:
    add = f"ALTER TABLE {here} ADD CONSTRAINT {name} {wanted}"
    if there is None:
        text = f"{here} lacks the constraint {name}"
        return Difference(text, [add], is_safe=True, is_blocking=False)
    drop = f"ALTER TABLE {here} DROP CONSTRAINT {name}"
    text = f"the constraint {name} of {here} is {safe_repr(there)}"
    return Difference(text, [drop, add], is_safe=True, is_blocking=False)


def _index(table: Table, here: str, name: str, there: str | None, wanted: str) -> Difference:
    if there is None:
        return Difference(
            f"it lacks the index {name}, without which queries read whole tables",
            [wanted], is_safe=True, is_blocking=False,
        )  # fmt: skip
    drop = f"DROP INDEX {here.rpartition('.')[0]}.{name}"
    text = f"the index {name} is {safe_repr(there)}"
    return Difference(text, [drop, wanted], is_safe=True, is_blocking=False)


_DIFFERENCES: Mapping[str, Callable[[Table, str, str, str | None, str], Difference]] = {
    "persistence": _persistence, "column": _column, "required column": _required,
    "default": _default, "constraint": _constraint, "index": _index,
}  # fmt: skip


def _additional(
    here: str, expected: Mapping[Key, str], found: Mapping[Key, str]
) -> Iterator[Difference]:
    """Yield the parts of the table that the models do not have."""
    for key, definition in found.items():
        kind, _, name = key
        if key in expected:
            continue
        quoted = '"{}"'.format(name.replace('"', '""'))
        alter, shown, schema = f"ALTER TABLE {here}", safe_repr(name), here.rpartition(".")[0]
        match kind:
            case "row security":
                remedy = f"{alter} DISABLE ROW LEVEL SECURITY"
                yield Difference(f"{here} has row security: it hides rows", [remedy])
            case "forced row security":
                remedy = f"{alter} NO FORCE ROW LEVEL SECURITY"
                yield Difference(f"{here} has forced row security", [remedy])
            case "column":
                text = f"{here} has a further column, {shown}"
                yield Difference(text, [f"{alter} DROP COLUMN {quoted}"], is_blocking=False)
            case "required column":
                if ("column", key[1], name) in expected:
                    remedy = f"{alter} ALTER COLUMN {quoted} DROP NOT NULL"
                    text = f"the column {name} of {here} refuses NULL"
                    yield Difference(text, [remedy], is_safe=True, is_blocking=False)
            case "default":
                remedy = f"{alter} ALTER COLUMN {quoted} DROP DEFAULT"
                text = f"the column {shown} of {here} has the default {safe_repr(definition)}"
                yield Difference(text, [remedy])
            case "constraint":
                text = f"{here} has a further constraint, {shown}: {safe_repr(definition)}"
                yield Difference(text, [f"{alter} DROP CONSTRAINT {quoted}"])
            case "invalid index":
                remedy = f"REINDEX INDEX {schema}.{quoted}"
                text = f"the index {shown} is invalid"
                yield Difference(text, [remedy], is_safe=True, is_blocking=False)
            case "index":
                # Other indexes for reading are an operator's own.
                if "UNIQUE" in definition.partition(" ON ")[0]:
                    text = f"{here} has a further unique index, {shown}"
                    remedy = f"DROP INDEX {schema}.{quoted}"
                    yield Difference(text, [remedy], is_blocking=False)
            case "trigger" | "rule" | "policy":
                text = f"{here} has the {kind} {shown}, which is not the store's"
                yield Difference(text, [f"DROP {kind.upper()} {quoted} ON {here}"])
            case "parent":
                text = f"{here} inherits from {name}"
                yield Difference(text, [f"{alter} NO INHERIT {name}"])
            case "child":
                text = f"the table {name} inherits from {here}"
                yield Difference(text, [f"ALTER TABLE {name} NO INHERIT {here}"])


def _same(kind: str, there: str, wanted: str) -> bool:
    if kind == "default":
        return there.partition("::")[0].strip("'") == wanted.partition("::")[0].strip("'")
    return there == wanted or _canonical(there) == _canonical(wanted)


def _canonical(sql: str) -> tuple[str, list[str]]:
    """Return a definition without superfluous punctuation, and its literals in one order."""
    parts = sql.split("'")  # every second one is a literal
    rest = "'".join(parts[::2])
    for added in _ADDED:
        rest = rest.replace(added, "")
    before, between, after = rest.partition(" BETWEEN ")
    if between:  # the server writes two comparisons
        column = before.split("(")[-1].strip()
        rest = f"{before} >= {after.replace(' AND ', f' AND {column} <= ', 1)}"
    rest = rest.replace(" IN ", " = ANY ").translate(_PUNCTUATION)
    return rest.lower(), sorted(parts[1::2])
