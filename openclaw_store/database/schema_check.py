"""The check that a SQLite file holds the tables of its revision, and nothing that acts on them.

A file from elsewhere is more than rows: a trigger runs when the library writes, a view in place of
a table when it reads, and an expression in a column or index whenever SQLite checks the file. All
of these are refused before the library reads or writes any row. Ordinary tables of other programs
are ignored.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from functools import cache, lru_cache
from typing import Any, NamedTuple

from sqlalchemy import Connection
from sqlalchemy.dialects.sqlite.base import SQLiteDialect
from sqlalchemy.schema import CreateIndex, CreateTable

from openclaw_store.database.tables import UNCOMPARED_INDEXES, Base
from openclaw_store.errors import SchemaMismatchError, safe_repr

VERSION_TABLE = "alembic_version"
"""The table in which Alembic keeps the revision."""

SHOWN = "shown"
"""The key in `Connection.info` of another path to name in messages."""

_BEGINNINGS = {
    "table": ("CREATE TABLE ",),
    "index": ("CREATE INDEX ", "CREATE UNIQUE INDEX "),
    "trigger": ("CREATE TRIGGER ",),
    "view": ("CREATE VIEW ",),
}
_DROPPED = ("index", "trigger")
_LITERAL = re.compile(r"('(?:[^']|'')*')")
_LITERALS = re.compile(r"( IN)\(('\w+'(?:,'\w+')*)\)", re.ASCII)
# SQLite's own white space: to SQLite, any other is a letter of a name.
_SPACE = re.compile(r"[ \t\n\f\r]+")

_LONGEST = 20_000
"""Characters of a definition that is compared; those of the store have a tenth of them."""

Definition = tuple[str, ...]
"""The normalised parts of a definition: of a table, its columns and constraints."""

Schema = Mapping[str, Definition]
"""The definitions of tables and indexes by name."""


class Object(NamedTuple):
    """A row of `sqlite_master`."""

    type: str
    name: str
    table: str
    root: int
    sql: str | None

    def __str__(self) -> str:
        return f"{self.type} {safe_repr(self.name)}"


def read_objects(connection: Connection) -> list[Object]:
    """Return the tables, indexes, views and triggers of the file.

    Raises:
        SchemaMismatchError: If a definition is not of the type that its row states: SQLite would
            follow the definition.
    """
    query = "SELECT type, name, tbl_name, rootpage, sql FROM sqlite_master"
    found = [Object(*row) for row in connection.exec_driver_sql(query)]
    for one in found:
        is_automatic = one.type == "index" and one.sql is None
        is_plain = all(map(isinstance, one, (str, str, str, int, str | None)))
        if not is_plain or not (
            is_automatic or str(one.sql).startswith(_BEGINNINGS.get(one.type, ()))
        ):
            raise refusal(connection, f"{safe_repr(one.name)} is no ordinary table or index")
    return found


def refusal(connection: Connection, problem: str) -> SchemaMismatchError:
    """Return the error that refuses the file of a connection."""
    return SchemaMismatchError(
        f"{shown_location(connection)} is refused, because "
        f"{problem}: restore a backup, or change that with another program if the file is yours"
    )


def shown_location(connection: Connection) -> Any:
    """Return the location of a connection, for messages."""
    location = connection.get_execution_options().get("location")
    return connection.info.get(SHOWN) or location or connection.engine.url.database


def has_version(connection: Connection) -> bool:
    """Return true if the file has Alembic's table; refuse any other object of that name."""
    for one in read_objects(connection):
        if one.name.lower() == VERSION_TABLE:
            if one.sql is None or normalised(one.sql) != _VERSION:
                raise refusal(connection, f"the {one} is not Alembic's")
            return True
    return False


def require(
    connection: Connection,
    expected: Schema,
    optional: Schema,
    replaced: frozenset[str] = frozenset(),
) -> None:
    """Refuse a file without exactly the expected tables and indexes, or with dangerous objects.

    Args:
        expected: The definitions of the revision.
        optional: Definitions of further tables that the file may have.
        replaced: Tables that the import of a legacy database replaces: they may have any ordinary
            columns, and it drops their indexes and triggers.

    Raises:
        SchemaMismatchError: With the first object that differs.
    """
    objects = read_objects(connection)
    known = {**optional, **expected, VERSION_TABLE: _VERSION}
    names = {*Base.metadata.tables, *known} - replaced
    mention = re.compile(rf"\b({'|'.join({*names, *replaced})})\b", re.IGNORECASE)

    def problems() -> Iterator[str]:
        for name in sorted(expected.keys() - {one.name for one in objects}):
            yield f"it lacks {name}, {_shown(expected[name])}"
        roots = [one.root for one in objects if one.root]
        if len(set(roots)) < len(roots) or 1 in roots:  # 1 is the root of `sqlite_master` itself
            yield "two of its tables or indexes share pages"
        for one in objects:
            if one.sql is None or (one.table.lower() in replaced and one.type in _DROPPED):
                continue
            if one.name in known:
                found, wanted = normalised(one.sql), known[one.name]
                if found != wanted:
                    added, lacking = set(found) - set(wanted), set(wanted) - set(found)
                    yield f"the {one} has {_shown(added)} instead of {_shown(lacking)}"
            elif one.name.lower() in names:
                yield f"the {one} has the name of a part of the store"
            elif one.type == "table":
                yield from _dangers(one, connection)
            elif mention.search(f"{one.table} {one.sql}"):
                yield f"the {one} names a table of the store"

    for problem in problems():
        raise refusal(connection, problem)


def _dangers(table: Object, connection: Connection) -> Iterator[str]:
    """Yield what keeps a table of another program from being ignored.

    Checks would evaluate its expressions. A reference to a column of the store that is no key makes
    every removal fail.
    """
    quoted = table.name.replace("'", "''")
    references = 'SELECT "table", "to" FROM pragma_foreign_key_list(\'{}\')'
    for name, column in connection.exec_driver_sql(references.format(quoted)):
        ours = Base.metadata.tables.get(name.lower())
        if ours is not None and column is not None and column.lower() not in ours.primary_key:
            yield f"the {table} refers to {safe_repr(column)} of {name}, which is no key"
    columns = "SELECT name FROM pragma_table_xinfo('{}') WHERE hidden"
    for (name,) in connection.exec_driver_sql(columns.format(quoted)):
        yield f"the {table} has a generated column, {safe_repr(name)}"
    indexes = (
        "SELECT one.name FROM pragma_index_list('{}') AS one WHERE partial"
        " OR EXISTS (SELECT 1 FROM pragma_index_xinfo(one.name) WHERE cid = -2)"
    )
    for (name,) in connection.exec_driver_sql(indexes.format(quoted)):
        yield f"the {table} has an index with an expression, {safe_repr(name)}"


@cache
def head() -> Schema:
    """Return the definitions of the models."""
    dialect = SQLiteDialect()
    made = dict(UNCOMPARED_INDEXES)
    for table in Base.metadata.sorted_tables:
        made[table.name] = str(CreateTable(table).compile(dialect=dialect))
        for index in table.indexes:
            made[str(index.name)] = str(CreateIndex(index).compile(dialect=dialect))
    return {name: normalised(sql) for name, sql in made.items()}


def definitions(connection: Connection) -> Schema:
    """Return the definitions of a database that is trusted."""
    return {one.name: normalised(one.sql) for one in read_objects(connection) if one.sql}


@lru_cache(maxsize=256)
def normalised(sql: str) -> Definition:
    """Return a definition without superfluous space and quotes, and its columns in one order.

    Migrations add columns at the end, and models list them by their meaning.
    """
    if len(sql) > _LONGEST:
        return (f"{len(sql)} characters",)
    parts = _LITERAL.split(sql)  # every second one is a literal, which stays as it is
    for number in range(0, len(parts), 2):
        part = re.sub(r'"([a-z_]+)"', r"\1", _SPACE.sub(" ", parts[number]))
        parts[number] = re.sub(r" ?([(),]) ?", r"\1", part)
    text = "".join(parts).strip(" ")
    text = _LITERALS.sub(lambda found: f"{found[1]}({','.join(_in_order(found[2]))})", text)
    start, _, rest = text.partition("(")
    if not start.startswith("CREATE TABLE "):
        return (text,)
    body, _, end = rest.rpartition(")")
    return (start, *_in_order(body), end)


def _in_order(body: str) -> list[str]:
    """Sort the parts between the commas outside of parentheses and literals."""
    parts, depth, quote = [""], 0, ""
    for letter in body:
        if quote:
            quote = "" if letter == quote else quote
        elif letter in "'\"`":
            quote = letter
        elif letter in "()":
            depth += 1 if letter == "(" else -1
        if letter == "," and not depth and not quote:
            parts.append("")
        else:
            parts[-1] += letter
    return sorted(parts)


def _shown(parts: Iterable[str]) -> str:
    return safe_repr(", ".join(parts))


_VERSION = normalised(
    f"CREATE TABLE {VERSION_TABLE} (version_num VARCHAR(32) NOT NULL,"
    f" CONSTRAINT {VERSION_TABLE}_pkc PRIMARY KEY (version_num))"
)
