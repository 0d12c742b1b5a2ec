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

from openclaw_store.database.difference import Difference
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
"""Longest definition that is compared, in characters; the store's own have a tenth of it."""

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

    Arguments are those of `compare`.

    Raises:
        SchemaMismatchError: With the first object that differs.
    """
    for difference in compare(connection, expected, optional, replaced):
        raise refusal(connection, difference.text)


def compare(
    connection: Connection,
    expected: Schema,
    optional: Schema,
    replaced: frozenset[str] = frozenset(),
) -> Iterator[Difference]:
    """Yield the objects that differ from the expected tables and indexes, or are dangerous.

    The remedies are those for the schema of the models.

    Args:
        expected: The definitions of the revision.
        optional: Definitions of further tables that the file may have.
        replaced: Tables that the import of a legacy database replaces: they may have any ordinary
            columns, and it drops their indexes and triggers.

    Raises:
        SchemaMismatchError: If the catalogue is no list of ordinary objects.
    """
    objects = read_objects(connection)
    known = {**optional, **expected, VERSION_TABLE: _VERSION}
    names = {*Base.metadata.tables, *known} - replaced
    mention = re.compile(rf"\b({'|'.join({*names, *replaced})})\b", re.IGNORECASE)
    present = {one.name for one in objects}
    for name in sorted(expected.keys() - present):
        table = next((table for table, made in _indexes().items() if name in made), None)
        text = f"it lacks {name}, {_shown(expected[name])}"
        if table is None:
            yield Difference(text)
        elif table in present:
            yield Difference(text, [_sql()[name]], is_safe=True)
    roots = [one.root for one in objects if one.root]
    if len(set(roots)) < len(roots) or 1 in roots:  # 1 is the root of `sqlite_master` itself
        yield Difference("two of its tables or indexes share pages")
    for one in objects:
        if one.sql is None or (one.table.lower() in replaced and one.type in _DROPPED):
            continue
        drop = [f"DROP {one.type.upper()} {_quoted(one.name)}"]
        if one.name in known:
            found, wanted = normalised(one.sql), known[one.name]
            if found != wanted:
                added, lacking = set(found) - set(wanted), set(wanted) - set(found)
                text = f"the {one} has {_shown(added)} instead of {_shown(lacking)}"
                yield _changed(connection, one, text)
        elif one.name.lower() in names:
            yield Difference(f"the {one} has the name of a part of the store", drop)
        elif one.type == "table":
            yield from _dangers(one, connection)
        elif mention.search(f"{one.table} {one.sql}"):
            yield Difference(f"the {one} names a table of the store", drop)


def _changed(connection: Connection, one: Object, text: str) -> Difference:
    """Return the difference of an object that has another definition."""
    sql = _sql()
    if one.type == "index" and one.name in sql:
        remedy = [f"DROP INDEX {one.name}", sql[one.name]]
        return Difference(text, remedy, is_safe=True)
    if one.type != "table" or one.name not in Base.metadata.tables:
        return Difference(text)
    columns = f"SELECT name FROM pragma_table_xinfo('{one.name}')"
    there = [name for (name,) in connection.exec_driver_sql(columns)]
    ours = Base.metadata.tables[one.name].columns
    lost = [
        name for name, column in ours.items()
        if name not in there and not column.nullable and column.server_default is None
    ]  # fmt: skip
    if lost:  # nothing can give their values back
        return Difference(text)
    kept = ", ".join(name for name in ours.keys() if name in there)  # noqa: SIM118
    new = f"new_{one.name}"
    remedy = [
        sql[one.name].replace(f"CREATE TABLE {one.name} ", f"CREATE TABLE {new} ", 1),
        f"INSERT INTO {new} ({kept}) SELECT {kept} FROM {one.name}",
        f"DROP TABLE {one.name}",
        f"ALTER TABLE {new} RENAME TO {one.name}",
        *_indexes()[one.name].values(),
    ]
    return Difference(text, remedy, is_safe=set(there) <= set(ours.keys()))


def _dangers(table: Object, connection: Connection) -> Iterator[Difference]:
    """Yield the reasons for which a table of another program cannot be ignored.

    Checks would evaluate its expressions. A reference to a column of the store that is no key makes
    every removal fail.
    """
    quoted, drop = table.name.replace("'", "''"), [f"DROP TABLE {_quoted(table.name)}"]
    references = 'SELECT "table", "to" FROM pragma_foreign_key_list(\'{}\')'
    for name, column in connection.exec_driver_sql(references.format(quoted)):
        ours = Base.metadata.tables.get(name.lower())
        if ours is not None and column is not None and column.lower() not in ours.primary_key:
            text = f"the {table} refers to {safe_repr(column)} of {name}, which is no key"
            yield Difference(text, drop)
    columns = "SELECT name FROM pragma_table_xinfo('{}') WHERE hidden"
    for (name,) in connection.exec_driver_sql(columns.format(quoted)):
        yield Difference(f"the {table} has a generated column, {safe_repr(name)}", drop)
    indexes = (
        "SELECT one.name FROM pragma_index_list('{}') AS one WHERE partial"
        " OR EXISTS (SELECT 1 FROM pragma_index_xinfo(one.name) WHERE cid = -2)"
    )
    for (name,) in connection.exec_driver_sql(indexes.format(quoted)):
        text = f"the {table} has an index with an expression, {safe_repr(name)}"
        yield Difference(text, [f"DROP INDEX {_quoted(name)}"])


@cache
def head() -> Schema:
    """Return the definitions of the models."""
    return {name: normalised(sql) for name, sql in _sql().items()}


@cache
def _sql() -> Mapping[str, str]:
    """Return the statements that make the tables and indexes of the models."""
    dialect = SQLiteDialect()
    tables = {
        table.name: str(CreateTable(table).compile(dialect=dialect)).strip()
        for table in Base.metadata.sorted_tables
    }
    return tables | {name: sql for indexes in _indexes().values() for name, sql in indexes.items()}


@cache
def _indexes() -> Mapping[str, Mapping[str, str]]:
    """Return the statements that make the indexes of each table."""
    dialect, made = SQLiteDialect(), dict[str, dict[str, str]]()
    for table in Base.metadata.sorted_tables:
        made[table.name] = {
            str(index.name): str(CreateIndex(index).compile(dialect=dialect))
            for index in sorted(table.indexes, key=lambda index: str(index.name))
        }
    made["tasks"].update(UNCOMPARED_INDEXES)
    return made


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


def _quoted(name: str) -> str:
    escaped = name.replace('"', '""')
    return f'"{escaped}"'


def _shown(parts: Iterable[str]) -> str:
    return safe_repr(", ".join(parts))


CREATE_VERSION = (
    "CREATE TABLE IF NOT EXISTS {} (version_num VARCHAR(32) NOT NULL,"
    f" CONSTRAINT {VERSION_TABLE}_pkc PRIMARY KEY (version_num))"
)
"""The statement that makes Alembic's table, with a place for its name."""

_VERSION = normalised(CREATE_VERSION.replace("IF NOT EXISTS ", "").format(VERSION_TABLE))
