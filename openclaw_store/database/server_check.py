"""The check that tables and functions on a PostgreSQL server are the store's, and act on nothing.

A role that may create objects in the schema can make our tables before we do, and a table runs more
than our SQL: triggers, policies, rules, defaults, constraints and indexes call functions as the
role that writes. So the tables must be ordinary ones of trusted owners, without any of that, before
the library reads or writes a row of them.

A trusted owner is the role of the connection, the owner of the database or of the schema, each role
that may act for one of these two, as superusers do, and each role that they granted to the role of
the connection.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from hashlib import sha256
from typing import Any, NamedTuple

from sqlalchemy import CheckConstraint, Connection, PrimaryKeyConstraint, text

from openclaw_store.backends import qualified
from openclaw_store.database.schema_check import VERSION_TABLE, shown_location
from openclaw_store.database.store_write import (
    BODIES,
    CITUS_SETTINGS,
    FUNCTION,
    SETTINGS,
    signature,
)
from openclaw_store.database.tables import Base
from openclaw_store.errors import SchemaMismatchError, safe_repr

_TRUST = """
WITH RECURSIVE place AS (
    SELECT one.oid, nspowner, datdba FROM pg_namespace AS one, pg_database
    WHERE nspname = :schema AND datname = current_database()
), granted (oid) AS (  -- Before version 16, a role may grant itself: who granted it matters.
    SELECT oid FROM pg_roles WHERE rolname = current_user
    UNION
    SELECT roleid FROM pg_auth_members JOIN granted ON member = granted.oid, place
    WHERE pg_has_role(grantor, datdba, 'MEMBER') OR pg_has_role(grantor, nspowner, 'MEMBER')
), trusted (oid) AS (
    SELECT one.oid FROM pg_roles AS one, place WHERE one.oid IN (SELECT oid FROM granted)
    OR pg_has_role(one.oid, datdba, 'MEMBER') OR pg_has_role(one.oid, nspowner, 'MEMBER')
)
"""

_TABLES = text(f"""{_TRUST}, part AS (
    SELECT pg_class.oid, relname AS item, relkind, relowner, relrowsecurity
    FROM pg_class JOIN place ON relnamespace = place.oid
    WHERE relname = ANY (CAST(:names AS text[]))
), piece (class, oid, item) AS (
    SELECT 'pg_class'::regclass, oid, item FROM part
    UNION ALL SELECT 'pg_class'::regclass, indexrelid, item FROM pg_index, part
        WHERE indrelid = part.oid
    UNION ALL SELECT 'pg_constraint'::regclass, pg_constraint.oid, item FROM pg_constraint, part
        WHERE conrelid = part.oid
    UNION ALL SELECT 'pg_attrdef'::regclass, pg_attrdef.oid, item FROM pg_attrdef, part
        WHERE adrelid = part.oid
)
SELECT item, kind, name, detail FROM (
    SELECT item, 'table' AS kind, relkind::text AS name, NULL AS detail FROM part
    UNION ALL SELECT item, 'owner', pg_get_userbyid(relowner), NULL FROM part
        WHERE relowner NOT IN (SELECT oid FROM trusted)
    UNION ALL SELECT item, 'row security', NULL, NULL FROM part WHERE relrowsecurity
    UNION ALL SELECT item, 'policy', polname, NULL FROM pg_policy, part WHERE polrelid = part.oid
    UNION ALL SELECT item, 'trigger', tgname, NULL FROM pg_trigger, part
        WHERE tgrelid = part.oid AND NOT tgisinternal
    UNION ALL SELECT item, 'rule', rulename, NULL FROM pg_rewrite, part WHERE ev_class = part.oid
    UNION ALL SELECT item, 'parent', inhparent::regclass::text, NULL FROM pg_inherits, part
        WHERE inhrelid = part.oid
    UNION ALL SELECT item, 'child', inhrelid::regclass::text, NULL FROM pg_inherits, part
        WHERE inhparent = part.oid
    UNION ALL SELECT item, 'reference', conname, conrelid::regclass::text
        FROM part, pg_constraint JOIN pg_class ON pg_class.oid = conrelid
        WHERE confrelid = part.oid AND pg_class.relowner NOT IN (SELECT oid FROM trusted)
    UNION ALL SELECT item, 'constraint', conname,
            CASE contype WHEN 'p' THEN '' ELSE pg_get_constraintdef(pg_constraint.oid) END
        FROM pg_constraint, part WHERE conrelid = part.oid AND contype <> 'n'
    UNION ALL SELECT item, 'default', attname, pg_get_expr(adbin, adrelid)
        FROM part JOIN pg_attrdef ON adrelid = part.oid
        JOIN pg_attribute ON attrelid = adrelid AND attnum = adnum
    UNION ALL SELECT DISTINCT item, 'use', pg_describe_object(refclassid, refobjid, 0), NULL
        FROM piece JOIN pg_depend ON classid = class AND objid = piece.oid
        WHERE refclassid NOT IN ('pg_class'::regclass, 'pg_namespace'::regclass,
            'pg_constraint'::regclass, 'pg_attrdef'::regclass, 'pg_extension'::regclass)
        AND NOT EXISTS (  -- an owner may index a column with the operators of an extension
            SELECT FROM pg_depend AS member WHERE member.classid = pg_depend.refclassid
            AND member.objid = pg_depend.refobjid AND member.deptype = 'e')
) AS found
ORDER BY kind <> 'table', kind <> 'owner', item, kind, name""")

_FUNCTION = text(f"""{_TRUST}
SELECT pg_get_userbyid(proowner) AS owner, proowner IN (SELECT oid FROM trusted) AS is_trusted,
    prosrc, proconfig, prosecdef, lanname
FROM pg_proc JOIN pg_language ON pg_language.oid = prolang
WHERE pg_proc.oid = to_regprocedure(:signature)""")

_OVERLOADS = text("""
SELECT pg_get_function_identity_arguments(oid) FROM pg_proc
WHERE proname = :name AND pronamespace = to_regnamespace(:schema)
AND oid IS DISTINCT FROM to_regprocedure(:signature) ORDER BY 1 LIMIT 10""")

_CONSTANT = re.compile(r"now\(\)|-?\d+|'[^']*'::[a-z ]+")
"""A default of a column, as the server shows it."""

_CALL = re.compile(r"[\w\"]\(")
"""The start of a call in an expression, as the server shows it."""

_NAMES = {
    str(constraint.name)
    for table in Base.metadata.sorted_tables
    for constraint in table.constraints
    if isinstance(constraint, CheckConstraint | PrimaryKeyConstraint)
} | {f"{VERSION_TABLE}_pkc"}

_DROP = "drop it, if you know where it comes from, or give another database"

NAMES: Sequence[str] = [*Base.metadata.tables, VERSION_TABLE]
"""The names of the tables of the store."""


class _Finding(NamedTuple):
    table: str
    kind: str
    name: str | None
    detail: str | None


class Tables:
    """The tables of the store in a schema with their dependent objects, read by one query.

    Args:
        names: Names of tables to look for.
    """

    def __init__(self, connection: Connection, schema: str, names: Sequence[str] = NAMES) -> None:
        self._connection, self._schema = connection, schema
        found = connection.execute(_TABLES, {"schema": schema, "names": names})
        self._findings = [_Finding(*row) for row in found]

    @property
    def names(self) -> set[str]:
        """The names of the tables that exist."""
        return {
            one.table for one in self._findings if one.kind == "table" and one.name in ("r", "p")
        }

    def has_version(self) -> bool:
        """Return true if there is Alembic's table; refuse one that is not safe to read."""
        findings = [one for one in self._findings if one.table == VERSION_TABLE]
        self._refuse(findings)
        return bool(findings)

    def require(self) -> None:
        """Refuse tables that run the code of other roles, or belong to them."""
        self._refuse(self._findings)

    def _refuse(self, findings: Sequence[_Finding]) -> None:
        for one in findings:
            if problem := _problem(one):
                name = qualified(self._schema, one.table)
                raise _refusal(self._connection, *(part.format(name) for part in problem))


def has_version(connection: Connection, schema: str) -> bool:
    """Return true if there is Alembic's table; refuse one that is not safe to read."""
    return Tables(connection, schema, [VERSION_TABLE]).has_version()


def require(connection: Connection, schema: str, tables: Tables | None = None) -> bool:
    """Refuse tables and a function that run the code of other roles, or belong to them.

    Args:
        tables: What was read of the tables in the transaction of the connection.

    Returns:
        True if the function exists.

    Raises:
        SchemaMismatchError: With the first object, and what to do with it.
    """
    (tables or Tables(connection, schema)).require()
    wanted = {"schema": schema, "signature": signature(schema)}
    function = connection.execute(_FUNCTION, wanted).one_or_none()
    if function is not None and (problem := _problem_of_function(function, schema)):
        again = "drop it, then run `openclaw-store db upgrade`, which makes it again"
        name = qualified(schema, FUNCTION)
        raise _refusal(connection, f"the function {name} {problem}", again)
    return function is not None


def overloads(connection: Connection, schema: str) -> list[str]:
    """Return up to ten other functions of the same name, with their arguments.

    They are never called, as ours has exactly the types of the call.
    """
    wanted = {"schema": schema, "name": FUNCTION, "signature": signature(schema)}
    found = connection.scalars(_OVERLOADS, wanted).all()
    return [f"{qualified(schema, FUNCTION)}({arguments})" for arguments in found]


def _problem(one: _Finding) -> tuple[str, str] | None:
    """Return the problem, with a place for the name of the table, and the remedy."""
    name, detail = (safe_repr(part).replace("{", "{{").replace("}", "}}") for part in one[2:])
    match one.kind:
        case "table":
            return None if one.name == "r" else ("{} is no ordinary table", _DROP)
        case "owner":
            return f"the table {{}} belongs to the role {name}", _TRUSTED.format(name)
        case "row security":
            return "{} has row security", "ALTER TABLE {} DISABLE ROW LEVEL SECURITY"
        case "constraint":
            is_ours = one.name in _NAMES and not _CALL.search(one.detail or "")
            return None if is_ours else (f"{{}} has the constraint {name}: {detail}", _DROP)
        case "default":
            is_ours = bool(_CONSTANT.fullmatch(one.detail or ""))
            return None if is_ours else (f"{{}} computes its column {name}: {detail}", _DROP)
        case "reference":
            return f"the table {detail} of another role refers to {{}} ({name})", _DROP
        case "use":
            return f"{{}} uses {name}, which is not the server's", _DROP
        case kind:
            return f"{{}} has the {kind} {name}", _DROP


_TRUSTED = (
    "if that role makes the tables, let it own the schema (ALTER SCHEMA … OWNER TO …); otherwise "
    "drop the table, or give another database"
)


def _problem_of_function(one: Any, schema: str) -> str | None:
    if not one.is_trusted:
        return f"belongs to the role {safe_repr(one.owner)}"
    is_ours = one.proconfig in (SETTINGS, CITUS_SETTINGS)
    if one.prosecdef or one.lanname != "plpgsql" or not is_ours:
        return "has other settings than the store's"
    return None if digest(one.prosrc, schema) in BODIES else "was changed"


def _refusal(connection: Connection, problem: str, remedy: str) -> SchemaMismatchError:
    return SchemaMismatchError(
        f"{shown_location(connection)} is refused, because {problem}: {remedy}"
    )


def digest(body: str, schema: str) -> str:
    """Return the SHA-256 of a function's body without the schema of its tables and its index."""
    for name in (*Base.metadata.tables, "ix_tasks_ready"):
        body = body.replace(qualified(schema, name), name)
    return sha256(body.encode()).hexdigest()
