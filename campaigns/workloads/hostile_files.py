"""SQLite files that were made to harm their reader: schemas, rows and pages.

Each attack tries to write `EXECUTED` somewhere, to change what is written, or never to end.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Mapping, Sequence
from contextlib import closing
from pathlib import Path
from random import Random

EXECUTED = "executed"
"""Text that is in a file only if the library has run a statement from its schema."""

_ENDLESS = "WITH RECURSIVE r (x) AS (SELECT 1 UNION ALL SELECT x + 1 FROM r)"
_SLOW = "instr(zeroblob(500000000), zeroblob(250000000) || 'x')"
"""An expression that takes days, and that nothing can interrupt."""

_WRITE = f"UPDATE tasks SET description = '{EXECUTED}'"


def _edit(name: str, old: str, new: str) -> Sequence[str]:
    """Change a definition, as only a hostile program does."""
    old, new = old.replace("'", "''"), new.replace("'", "''")
    return (
        "PRAGMA writable_schema = ON",
        f"UPDATE sqlite_master SET sql = replace(sql, '{old}', '{new}') WHERE name = '{name}'",
        "PRAGMA writable_schema = RESET",
    )


def _renamed(name: str, statement: str) -> Sequence[str]:
    return (f"ALTER TABLE {name} RENAME TO x_{name}", statement)


SCHEMAS: Mapping[str, Sequence[str]] = {
    "trigger": [f"CREATE TRIGGER x AFTER INSERT ON tasks BEGIN {_WRITE}; END"],
    "trigger of nodes": [f"CREATE TRIGGER x AFTER UPDATE ON nodes BEGIN {_WRITE}; END"],
    "trigger of another table": [
        "CREATE TABLE x_other (a REFERENCES tasks ON DELETE CASCADE)",
        f"CREATE TRIGGER x AFTER DELETE ON x_other BEGIN {_WRITE}; END",
    ],
    "trigger that quotes the name": [
        'CREATE TRIGGER x AFTER INSERT ON "TASKS" BEGIN SELECT raise(IGNORE); END'
    ],
    "trigger in the guise of a table": [
        f"CREATE TRIGGER x AFTER INSERT ON tasks BEGIN {_WRITE}; END",
        "PRAGMA writable_schema = ON",
        "UPDATE sqlite_master SET type = 'table', tbl_name = 'x' WHERE name = 'x'",
        "PRAGMA writable_schema = RESET",
    ],
    "view in place of nodes": _renamed("nodes", "CREATE VIEW nodes AS SELECT * FROM x_nodes"),
    "endless view in place of changes": _renamed(
        "changes",
        f"CREATE VIEW changes AS {_ENDLESS} SELECT x AS revision, 0 AS changed_at, 'task' AS item,"
        " 'a' AS item_id, 'created' AS kind, NULL AS from_status, 'pending' AS to_status,"
        " NULL AS node, NULL AS reason, NULL AS previous FROM r",
    ),
    "endless view in place of the version": _renamed(
        "alembic_version",
        f"CREATE VIEW alembic_version AS {_ENDLESS} SELECT max(x) AS version_num FROM r",
    ),
    "view of tasks": ["CREATE VIEW x AS SELECT * FROM tasks"],
    "generated column": [f"ALTER TABLE tasks ADD COLUMN x AS ({_SLOW})"],
    "generated column of another table": [f"CREATE TABLE x (a, b AS ({_SLOW}) STORED)"],
    "generated version": [
        "DROP TABLE alembic_version",
        "CREATE TABLE alembic_version (x)",
        "INSERT INTO alembic_version VALUES (1)",
        f"ALTER TABLE alembic_version ADD COLUMN version_num AS ({_SLOW})",
    ],
    "index with an expression": ["CREATE INDEX x ON tasks (length(name))"],
    "index with a condition": ["CREATE INDEX x ON tasks (name) WHERE length(name) > 1"],
    "index of another table": [f"CREATE TABLE x (a); CREATE INDEX y ON x (a) WHERE {_SLOW}"],
    "further index": ["CREATE UNIQUE INDEX x ON tasks (name)"],
    "missing index": ["DROP INDEX ix_tasks_status"],
    "other index": [
        "DROP INDEX ix_nodes_beat",
        "CREATE INDEX ix_nodes_beat ON nodes (beat) WHERE node_id LIKE '%a%a%a'",
    ],
    "further column": ["ALTER TABLE tasks ADD COLUMN x TEXT"],
    "letter case of a column": _edit("tasks", "task_id VARCHAR", "tasK_id VARCHAR"),
    "Kelvin sign in a column": _edit("tasks", "task_id VARCHAR", "tas\u212a_id VARCHAR"),
    "type": _edit("nodes", "beat BIGINT", "beat TEXT"),
    "collation": _edit("tasks", "name TEXT NOT NULL", "name TEXT NOT NULL COLLATE NOCASE"),
    "default": _edit("tasks", "DEFAULT 'pending'", "DEFAULT 'running'"),
    "constraint": _edit("tasks", "priority BETWEEN 0 AND 3", f"{_SLOW}"),
    "quotes in a literal": _edit("tasks", "'pending'", "'\"pending\"'"),
    "endless comment": _edit("nodes", "CREATE TABLE", f"CREATE TABLE /*{'x' * 1_000_000}*/"),
    "reference to a column that is no key": ["CREATE TABLE x (a REFERENCES tasks (name))"],
    "conflict": _edit("counters", "PRIMARY KEY (id)", "PRIMARY KEY (id) ON CONFLICT REPLACE"),
    "no key": _edit("changes", "PRIMARY KEY (revision)", "CHECK (revision)"),
    "strict": _edit("counters", "CHECK (id = 1)\n)", "CHECK (id = 1)\n) STRICT"),
    "comment": _edit("counters", "CHECK (id = 1)", "CHECK (id = 1 /* or 1 */)"),
    "virtual table": ["CREATE VIRTUAL TABLE x USING fts5 (a)"],
    "shared pages": [
        "PRAGMA writable_schema = ON",
        "UPDATE sqlite_master SET rootpage = (SELECT rootpage FROM sqlite_master"
        " WHERE name = 'nodes') WHERE name = 'changes'",
        "PRAGMA writable_schema = RESET",
    ],
    "pages of the schema": [
        "PRAGMA writable_schema = ON",
        "UPDATE sqlite_master SET rootpage = 1 WHERE name = 'counters'",
        "PRAGMA writable_schema = RESET",
    ],
    "table of rejected rows": [
        "CREATE TABLE legacy_rejected (item, item_id, reason, \"row\", x AS (length(item)))"
    ],
    "number as revision": ["UPDATE alembic_version SET version_num = x'ff00'"],
    "endless revision": ["UPDATE alembic_version SET version_num = printf('%.*c', 5000000, '0')"],
    "unknown revision": ["UPDATE alembic_version SET version_num = '0000'"],
}  # fmt: skip
"""Statements that make the schema of a store hostile; each result must be refused."""

ORDINARY: Sequence[str] = (
    "CREATE TABLE x_notes (task_id TEXT REFERENCES tasks (task_id), text TEXT CHECK (text <> ''))",
    "CREATE INDEX x_by_task ON x_notes (task_id)",
    "CREATE TABLE x_log (at INTEGER PRIMARY KEY AUTOINCREMENT)",
    "CREATE TRIGGER x_logged AFTER INSERT ON x_notes BEGIN INSERT INTO x_log VALUES (NULL); END",
    "CREATE VIEW x_texts AS SELECT text FROM x_notes",
    "ANALYZE",
)
"""Statements of another program that leave the store alone; the result is accepted."""

VALUES: Mapping[str, Sequence[str]] = {
    "deep JSON": [f"UPDATE tasks SET parameters = '{'[' * 100_000}'"],
    "no JSON": ["UPDATE tasks SET metadata = x'00ff'"],
    "no text": ["UPDATE tasks SET name = CAST(x'ff80' AS TEXT)"],
    "no text as a key": ["UPDATE nodes SET node_id = CAST(x'ff' AS TEXT)"],
    "no text in the feed": ["UPDATE changes SET reason = CAST(x'c0af' AS TEXT)"],
    "terminal codes": ["UPDATE tasks SET name = char(27) || ']0;x' || char(7)"],
    "long name": ["UPDATE tasks SET error = printf('%.*c', 3000000, 'x')"],
    "largest revision": ["UPDATE changes SET revision = 9223372036854775807 WHERE revision = 1"],
    "text as a time": ["UPDATE tasks SET submitted_at = 'monday'"],
    "no counters": ["DELETE FROM counters"],
}  # fmt: skip
"""Statements that make the rows of a store hostile; a file may be accepted with them."""

LEGACY: Mapping[str, Sequence[str]] = {
    "view of tasks": ["CREATE VIEW x AS SELECT * FROM tasks"],
    "trigger of another table": [
        "CREATE TABLE x_other (a)",
        "CREATE TRIGGER x AFTER INSERT ON x_other BEGIN DELETE FROM tasks; END",
    ],
    "trigger of rejected rows": [
        'CREATE TABLE legacy_rejected (item, item_id, reason, "row")',
        f"CREATE TRIGGER x AFTER INSERT ON legacy_rejected BEGIN {_WRITE}; END",
    ],
    "generated column": [f"ALTER TABLE tasks ADD COLUMN x AS ({_SLOW})"],
    "changes": ["CREATE TABLE changes (a)"],
    "virtual table": ["CREATE VIRTUAL TABLE x USING fts5 (a)"],
}
"""The same for a legacy database."""


def change(path: Path, statements: Sequence[str]) -> None:
    """Run statements on a file, and leave it without a WAL."""
    with closing(sqlite3.connect(path, isolation_level=None)) as connection:
        connection.execute("PRAGMA journal_mode=DELETE")
        for statement in statements:
            connection.executescript(statement)


def make_bomb(path: Path, table: str, levels: int = 12, children: int = 100) -> None:
    """Make a small tree of pages in which a search never ends.

    All children of a page are the same page, so that the rows of `table` are read
    `children ** levels` times.
    """
    with closing(sqlite3.connect(path)) as connection:
        query = "SELECT rootpage FROM sqlite_master WHERE name = ?"
        [[root]] = connection.execute(query, (table,))
        [[size]] = connection.execute("PRAGMA page_size")
    content = path.read_bytes()
    count = len(content) // size
    old_root = content[(root - 1) * size : root * size]

    def interior(child: int) -> bytes:
        cells = [child.to_bytes(4) + bytes([key]) for key in range(1, children + 1)]
        start = size - 5 * children
        places = b"".join((start + 5 * number).to_bytes(2) for number in range(children))
        header: bytes = (
            b"\x05\0\0" + children.to_bytes(2) + start.to_bytes(2) + b"\0" + child.to_bytes(4)
        )
        return (header + places).ljust(start, b"\0") + b"".join(cells)

    pages = [interior(count + level) for level in range(2, levels + 1)] + [old_root]
    first = interior(count + 1)
    new = content[: (root - 1) * size] + first + content[root * size :] + b"".join(pages)
    new = new[:28] + (len(new) // size).to_bytes(4) + new[32:]
    path.write_bytes(new)


def damage(content: bytes, random: Random) -> bytes:
    """Return a file with some flipped bits, overwritten bytes or a lost end."""
    size, new = int.from_bytes(content[16:18]), bytearray(content)
    for _ in range(random.choice((1, 2, 8))):
        page = random.randrange(len(new) // size or 1) * size
        # Most of the harm is in the headers and the pointers at the start of a page.
        start = min(
            len(new) - 1,
            page + random.choice((random.randrange(0, 120), random.randrange(0, size))),
        )
        length = random.choice((1, 2, 4, 64))
        match random.randrange(4):
            case 0:
                new[start] ^= 1 << random.randrange(8)
            case 1:
                new[start : start + length] = random.randbytes(length)
            case 2:
                new[start : start + length] = random.choice((b"\0", b"\xff")) * length
            case 3 if random.random() < 0.3:
                del new[random.randrange(100, len(new)) :]
    return bytes(new)
