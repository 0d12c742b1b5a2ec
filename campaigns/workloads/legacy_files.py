"""Files with the legacy hand-made schema, which the library imports."""

from __future__ import annotations

import sqlite3
from collections.abc import Mapping
from pathlib import Path

COLUMNS = {
    "tasks": """task_id TEXT PRIMARY KEY, task_type TEXT NOT NULL, name TEXT NOT NULL,
        description TEXT, required_skills TEXT NOT NULL, optional_skills TEXT, status TEXT NOT NULL,
        priority INTEGER NOT NULL, assigned_node TEXT, submitted_at TEXT, scheduled_at TEXT,
        started_at TEXT, completed_at TEXT, parameters TEXT, timeout INTEGER,
        retry_count INTEGER DEFAULT 0, max_retries INTEGER DEFAULT 3, user_id TEXT,
        affinity_tags TEXT, result TEXT, error TEXT, metadata TEXT,
        created_at TEXT DEFAULT CURRENT_TIMESTAMP, updated_at TEXT DEFAULT CURRENT_TIMESTAMP""",
    "nodes": """node_id TEXT PRIMARY KEY, hostname TEXT NOT NULL, platform TEXT NOT NULL,
        arch TEXT NOT NULL, status TEXT NOT NULL, cpu_usage REAL DEFAULT 0.0,
        memory_usage REAL DEFAULT 0.0, disk_usage REAL DEFAULT 0.0, available_skills TEXT NOT NULL,
        max_concurrent_tasks INTEGER DEFAULT 5, running_tasks INTEGER DEFAULT 0,
        ip_address TEXT DEFAULT '', tailscale_ip TEXT DEFAULT '', port INTEGER DEFAULT 18789,
        total_tasks_processed INTEGER DEFAULT 0, successful_tasks INTEGER DEFAULT 0,
        failed_tasks INTEGER DEFAULT 0, average_execution_time REAL DEFAULT 0.0,
        registered_at TEXT, last_heartbeat TEXT, tags TEXT,
        created_at TEXT DEFAULT CURRENT_TIMESTAMP, updated_at TEXT DEFAULT CURRENT_TIMESTAMP""",
}
INDEXES = {
    "tasks": ("status", "assigned_node", "priority", "task_type", "user_id", "submitted_at"),
    "nodes": ("status", "last_heartbeat", "platform"),
}
KEYS = {"tasks": "task_id", "nodes": "node_id"}


def make_original(path: Path, columns: Mapping[str, str] = COLUMNS) -> sqlite3.Connection:
    """Create a file with the legacy tables, indexes and triggers, and return a connection to it."""
    connection = sqlite3.connect(path)
    connection.execute("PRAGMA journal_mode=WAL")
    for table, definition in columns.items():
        connection.execute(f"CREATE TABLE {table} ({definition})")
        for column in INDEXES[table]:
            name = column.removesuffix("_id").removeprefix("task_")
            connection.execute(f"CREATE INDEX idx_{table}_{name} ON {table}({column})")
        key = KEYS[table]
        connection.execute(
            f"CREATE TRIGGER update_{table}_timestamp AFTER UPDATE ON {table} FOR EACH ROW BEGIN"
            f" UPDATE {table} SET updated_at = CURRENT_TIMESTAMP WHERE {key} = OLD.{key}; END"
        )
    connection.commit()
    return connection
