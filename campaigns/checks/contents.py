"""The content of a database, read without the library: its schema, and checksums of all rows."""

from __future__ import annotations

import asyncio
import filecmp
import hashlib
import re
import sqlite3
from collections.abc import Mapping
from contextlib import closing
from pathlib import Path
from typing import NamedTuple

from campaigns.harness.campaign import Location
from campaigns.harness.direct_access import connect, find_damage

SCHEMA_OF_POSTGRESQL = """
SELECT conrelid::regclass || '.' || conname, pg_get_constraintdef(oid)
FROM pg_constraint WHERE connamespace = current_schema()::regnamespace
UNION ALL SELECT indexname, indexdef FROM pg_indexes WHERE schemaname = current_schema()
UNION ALL SELECT proname, pg_get_functiondef(oid)
FROM pg_proc WHERE pronamespace = current_schema()::regnamespace AND NOT EXISTS (
    SELECT FROM pg_depend WHERE objid = pg_proc.oid AND deptype = 'e')
UNION ALL SELECT table_name || '.' || column_name, concat_ws(
    ' ', data_type, character_maximum_length, collation_name, is_nullable, column_default)
FROM information_schema.columns WHERE table_schema = current_schema()
"""
"""Names and definitions of constraints, indexes, functions and columns of the first schema."""

RANDOM_COLUMN = "cluster_id"
"""The column that each migration fills with another value."""

_COLUMNS_OF_POSTGRESQL = f"""
SELECT table_name, string_agg(quote_ident(column_name), ', ' ORDER BY column_name)
FROM information_schema.columns
WHERE table_schema = 'public' AND column_name <> '{RANDOM_COLUMN}' GROUP BY table_name
"""

_ASIDE = ("legacy_rejected", "legacy_extra")
"""Tables that an import leaves beside the library's own."""


class Contents(NamedTuple):
    """The whole content of a database."""

    revision: str | None
    schema: Mapping[str, str]
    """Definitions by name."""
    rows: Mapping[str, str]
    """The number of rows and a checksum, for each table except Alembic's."""
    broken: str | None = None
    """Damage to pages and indexes, if any."""

    def difference(self, other: Contents) -> str | None:
        """Describe the first difference from another content; `None` if they are equal."""
        if self.revision != other.revision:
            return f"revision {other.revision}, not {self.revision}"
        if other.broken is not None:
            return other.broken
        for mine, theirs in ((self.schema, other.schema), (self.rows, other.rows)):
            for name in sorted(mine.keys() | theirs.keys()):
                if mine.get(name) != theirs.get(name):
                    return f"{name}: {theirs.get(name)}, not {mine.get(name)}"
        return None


def read_contents(location: Location) -> Contents:
    """Read the content of a database without concurrent writers; not on a running event loop."""
    if isinstance(location, Path):
        found = _read_file(location)
    else:
        found = asyncio.run(_read_server(location))
    return found._replace(broken="; ".join(find_damage(location)[:3]) or None)


class Reader:
    """Reads contents, and reads a file with the same bytes as an earlier one only once."""

    def __init__(self) -> None:
        self._known: dict[Path, tuple[object, Contents]] = {}

    def read(self, location: Location) -> Contents:
        """Read the content of a database without concurrent writers."""
        if not isinstance(location, Path):
            return read_contents(location)
        with closing(sqlite3.connect(location)) as connection:
            connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")
        for path, (state, contents) in self._known.items():
            is_there = path.exists() and _state(path) == state
            if is_there and filecmp.cmp(path, location, shallow=False):
                return contents
        contents = read_contents(location)
        self._known[location] = (_state(location), contents)
        return contents


def _state(path: Path) -> object:
    """Return a value that changes with each write to a file."""
    found = path.stat()
    return found.st_mtime_ns, found.st_size


def _read_file(path: Path) -> Contents:
    with closing(sqlite3.connect(path)) as connection:
        schema = {
            name: re.sub(r"^(CREATETABLE\w+)\((.*)\)$", _in_order, re.sub(r"\s+", "", sql))
            for name, sql in connection.execute(
                "SELECT name, coalesce(sql, '') FROM sqlite_master WHERE tbl_name NOT IN (?, ?)",
                _ASIDE,
            )
        }
        tables = [name for name, sql in schema.items() if sql.startswith("CREATETABLE")]
        revision, rows = None, {}
        for table in tables:
            if table == "alembic_version":
                found = connection.execute("SELECT version_num FROM alembic_version").fetchone()
                revision = found and found[0]
            else:
                rows[table] = _checksum(connection, table)
    return Contents(revision, schema, rows)


def _in_order(table: re.Match[str]) -> str:
    """Return a definition with its columns in order: a downgrade adds the last one again."""
    return f"{table[1]}({','.join(sorted(table[2].split(',')))})"


def _checksum(connection: sqlite3.Connection, table: str) -> str:
    found = connection.execute(f"PRAGMA table_info({table})")
    names = sorted(row[1] for row in found if row[1] != RANDOM_COLUMN)
    texts = " || ',' || ".join(f'quote("{name}")' for name in names)
    found = connection.execute(f"SELECT {texts} FROM {table} ORDER BY rowid")
    count, checksum = 0, hashlib.blake2b(digest_size=8)
    while rows := found.fetchmany(10_000):
        count += len(rows)
        checksum.update("\n".join(text for (text,) in rows).encode())
        checksum.update(b"\n")
    return f"{count} {checksum.hexdigest()}"


async def _read_server(url: str) -> Contents:
    connection = await connect(url)
    try:
        revision, rows = None, {}
        schema = dict(await connection.fetch(SCHEMA_OF_POSTGRESQL))
        for table, columns in await connection.fetch(_COLUMNS_OF_POSTGRESQL):
            if table == "alembic_version":
                revision = await connection.fetchval("SELECT version_num FROM alembic_version")
            else:
                found = await connection.fetchrow(
                    f"SELECT count(*), sum(hashtextextended(ROW({columns})::text, 0)) FROM {table}"
                )
                rows[table] = "{} {}".format(*found)
        return Contents(revision, schema, rows)
    finally:
        await connection.close()
