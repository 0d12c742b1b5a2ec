"""Snapshots of a database file, read without the library, and their comparison with a store."""

from __future__ import annotations

import sqlite3
from collections import Counter
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from openclaw_store import StateManager
from openclaw_store.domain.models import FINISHED

_QUERIES = {
    "tasks": "SELECT * FROM tasks",
    "nodes": "SELECT * FROM nodes",
    "changes": "SELECT * FROM changes",
    "counters": "SELECT * FROM counters",
    "alembic_version": "SELECT * FROM alembic_version",
}
"""Queries for all tables of the store; the first column is the key."""

_SHOWN = {
    "tasks": (
        "name", "status", "priority", "assigned_node", "attempt", "retry_count", "error",
        "user_id", "idempotency_key", "version",
    ),
    "nodes": (
        "hostname", "status", "running_tasks", "total_tasks_processed", "failed_tasks", "version",
    ),
}  # fmt: skip
"""Columns that an object has with the same values."""

Row = dict[str, Any]


@dataclass(frozen=True)
class Snapshot:
    """All rows of a database at one moment, by table and key."""

    rows: dict[str, dict[Any, Row]]

    @property
    def revision(self) -> int:
        """The revision of the newest change."""
        compacted: int = self.rows["counters"][1]["compacted"]
        return max(self.rows["changes"], default=compacted)

    def differences(self, other: Snapshot) -> list[str]:
        """List the rows that differ from another snapshot."""
        return [
            f"{table} {key}: {row} and {other.rows[table].get(key)}"
            for table in self.rows
            for key in sorted({*self.rows[table], *other.rows[table]})
            if (row := self.rows[table].get(key)) != other.rows[table].get(key)
        ]

    def flaws(self) -> list[str]:
        """List disagreements with the feed."""
        changes = self.rows["changes"]
        found = []
        last = {
            (change["item"], change["item_id"]): revision for revision, change in changes.items()
        }
        for table, item in (("tasks", "task"), ("nodes", "node")):
            for key, row in self.rows[table].items():
                revision = last.get((item, key))
                if row["version"] > self.revision:
                    found.append(f"{item} {key} is at {row['version']}, beyond the feed")
                if revision is not None and revision != row["version"]:
                    found.append(f"{item} {key} is at {row['version']}, its change at {revision}")
        return found


def snapshot_of(connection: sqlite3.Connection) -> Snapshot:
    """Take a snapshot through a connection."""
    rows = {}
    connection.execute("BEGIN")
    try:
        for table, query in _QUERIES.items():
            cursor = connection.execute(query)
            names = [column[0] for column in cursor.description]
            rows[table] = {row[0]: dict(zip(names, row, strict=True)) for row in cursor}
    finally:
        connection.execute("ROLLBACK")
    return Snapshot(rows)


def take_snapshot(path: Path) -> Snapshot:
    """Take a snapshot of a file, which other connections may have open."""
    with closing(sqlite3.connect(path, isolation_level=None)) as connection:
        return snapshot_of(connection)


def task_ids(path: Path) -> set[str]:
    """Return the ids of the tasks in a file of any schema; none without a table or a file."""
    if not path.exists():
        return set()
    with closing(sqlite3.connect(path, isolation_level=None)) as connection:
        if not _has_table(connection, "tasks"):
            return set()
        return {key for (key,) in connection.execute("SELECT task_id FROM tasks")}


def is_migrated(path: Path) -> bool:
    """Return true if a file has a schema of the library."""
    with closing(sqlite3.connect(path, isolation_level=None)) as connection:
        return _has_table(connection, "alembic_version")


def _has_table(connection: sqlite3.Connection, name: str) -> bool:
    found = connection.execute("SELECT 1 FROM sqlite_master WHERE name = ?", [name])
    return found.fetchone() is not None


async def differences(
    state: StateManager, snapshot: Snapshot, *, finished: bool = False
) -> list[str]:
    """List differences between the answers of a store from memory and the database.

    Args:
        finished: True to compare each finished task, too; most of them are read from the database.
    """
    found = []
    for table, get in (("tasks", state.get_task), ("nodes", state.get_node)):
        for key, row in snapshot.rows[table].items():
            if row["status"] in FINISHED and not finished:
                continue
            item = await get(key)
            shown = None if item is None else {name: getattr(item, name) for name in _SHOWN[table]}
            there = {name: row[name] for name in _SHOWN[table]}
            if shown != there:
                found.append(f"{key} is {there} in the database, {shown} in memory")
    tasks, nodes = (snapshot.rows[table].values() for table in ("tasks", "nodes"))
    stats = {name: number for name, number in (await state.get_task_stats()).items() if number}
    in_memory = {
        "revision": state.version,
        "waiting": {task.task_id for task in await state.get_pending_tasks(None)},
        "nodes": {node.node_id for node in await state.get_all_nodes()},
        "online": {node.node_id for node in await state.get_online_nodes()},
        "tasks": stats.pop("total", 0),
        "states": stats,
    }
    in_database = {
        "revision": snapshot.revision,
        "waiting": {row["task_id"] for row in tasks if row["status"] in ("pending", "scheduled")},
        "nodes": {row["node_id"] for row in nodes},
        "online": {row["node_id"] for row in nodes if row["status"] == "online"},
        "tasks": len(tasks),
        "states": dict(Counter(row["status"] for row in tasks)),
    }
    return found + [
        f"{what}: {there} in the database, {in_memory[what]} in memory"
        for what, there in in_database.items()
        if in_memory[what] != there
    ]
