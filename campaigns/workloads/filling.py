"""Databases full of tasks, nodes and their first changes, written by a few SQL statements.

The same rows can be written to the schema of each revision, on both kinds of database, and to the
legacy hand-made schema, so that the results of migrations can be compared.
"""

from __future__ import annotations

import asyncio
import sqlite3
from argparse import Namespace
from collections.abc import Mapping
from contextlib import closing
from io import StringIO
from pathlib import Path

from alembic import command
from alembic.config import Config

from campaigns.harness.campaign import POSTGRESQL, SQLITE, Location
from campaigns.harness.direct_access import connect
from campaigns.workloads.legacy_files import make_original
from openclaw_store.database import migrations
from openclaw_store.database.types import to_microseconds
from openclaw_store.testing import FakeClock

TASKS_A_NODE = 1000

NOW = FakeClock().now
"""The time at which legacy rows are imported."""

_COUNTLESS = "0003"
"""The schema from which the last revision is that of the newest change."""

_BEGIN = 1_767_225_600_000_000
"""The submission of the first task, in microseconds since 1970."""


def fill_original(path: Path, tasks: int) -> None:
    """Create a file with the legacy schema and so many tasks."""
    with closing(make_original(path)) as connection:
        connection.executescript(";".join(_Rows("original").statements(tasks)))


def fill(
    location: Location, revision: str, tasks: int, *, lived: bool = False, imported: bool = False
) -> None:
    """Create a database at a revision, with so many tasks; not on a running event loop.

    Args:
        lived: True if the fields of revision 0002 hold the values that the library writes.
        imported: True if the rows are those of `fill_original` after the import.
    """
    _make(location, revision)
    kind = SQLITE if isinstance(location, Path) else POSTGRESQL
    statements = _Rows(kind, lived=lived, imported=imported).statements(tasks)
    if revision < _COUNTLESS:
        statements.append("UPDATE counters SET revision = (SELECT max(revision) FROM changes)")
    script = ";".join(statements)
    if isinstance(location, Path):
        with closing(sqlite3.connect(location)) as connection:
            connection.executescript(f"PRAGMA synchronous=OFF; BEGIN; {script}; COMMIT")
    else:
        asyncio.run(_execute(location, script))


def _make(location: Location, revision: str) -> None:
    config = Config(stdout=StringIO(), cmd_opts=Namespace(x=[f"url={location}"]))
    config.set_main_option("script_location", str(migrations.SCRIPTS))
    command.upgrade(config, revision)


async def _execute(url: str, script: str) -> None:
    connection = await connect(url)
    try:
        await connection.execute(script)
    finally:
        await connection.close()


class _Rows:
    """The statements that write rows. Each value is an expression of the row's number, `n`."""

    def __init__(self, kind: str, *, lived: bool = False, imported: bool = False) -> None:
        """Choose the rows.

        Args:
            kind: `sqlite`, `postgresql`, or `original`.
        """
        self._kind, self._lived, self._imported = kind, lived, imported

    def statements(self, tasks: int) -> list[str]:
        """Return all statements, the nodes first."""
        nodes = tasks // TASKS_A_NODE + 1
        statements = [
            self._insert("nodes", self._nodes(), nodes),
            self._insert("tasks", self._tasks(nodes), tasks),
            _COUNT,
        ]
        if self._kind != "original":
            statements += [
                self._insert("changes", self._changes("node", nodes), nodes),
                self._insert("changes", self._changes("task", nodes), tasks),
            ]
        return statements

    def _insert(self, table: str, columns: Mapping[str, str], rows: int) -> str:
        if self._kind == POSTGRESQL:
            series, numbers = "", f"generate_series(1::bigint, {rows}) AS n"
        else:
            counted = f"VALUES (1) UNION ALL SELECT n + 1 FROM numbers WHERE n < {rows}"
            series, numbers = f"WITH RECURSIVE numbers(n) AS ({counted}) ", "numbers"
        values = ", ".join(columns.values())
        return f"{series}INSERT INTO {table} ({', '.join(columns)}) SELECT {values} FROM {numbers}"

    def _tasks(self, nodes: int) -> dict[str, str]:
        at = f"{_BEGIN} + n * 1000037"
        columns = {
            "task_id": _TASK_ID,
            "task_type": "CASE n % 3 WHEN 0 THEN 'daemon' ELSE 'batch' END",
            "name": "'task number ' || n || ' 数据处理'",
            "description": "CASE n % 4 WHEN 0 THEN 'does \"this\" and ''that''' ELSE '' END",
            "required_skills": self._list("CASE WHEN n % 2 = 0 THEN '[\"python\"]' END"),
            "optional_skills": self._json("CASE WHEN n % 9 = 0 THEN '[]' END"),
            "status": _TASK_STATUS,
            "priority": "n % 4",
            "assigned_node": _TASK_NODE,
            "submitted_at": self._moment(at),
            "scheduled_at": self._moment(f"CASE WHEN n % 50 > 0 THEN {at} + 1000003 END"),
            "started_at": self._moment(f"CASE WHEN n % 50 > 1 THEN {at} + 2000006 END"),
            "completed_at": self._moment(f"CASE WHEN n % 50 > 2 THEN {at} + 900000009 END"),
            "parameters": self._json("CASE WHEN n % 2 = 1 THEN '{\"part\":[' || n || ']}' END"),
            "timeout": "CASE WHEN n % 3 = 0 THEN 3600 END",
            "retry_count": "n % 3",
            "max_retries": "3",
            "user_id": "'user-' || (n % 100)",
            "affinity_tags": self._json("CASE WHEN n % 11 = 0 THEN '[\"ssd\"]' END"),
            "result": self._json("CASE WHEN n % 50 > 5 THEN '{\"rows\":' || n || '}' END"),
            "error": "CASE WHEN n % 50 IN (3, 5) THEN 'it did not work' END",
            "metadata": self._json("CASE WHEN n % 13 = 0 THEN '{\"from\":\"a form\"}' END"),
            "updated_at": self._moment(f"{at} + 900000009"),
        }  # fmt: skip
        if self._kind != "original":
            columns["version"] = f"{nodes} + n"
        if self._lived:
            columns["attempt"] = "n % 4"
            columns["not_before"] = self._moment(f"CASE WHEN n % 3 = 1 THEN {at} END")
            columns["idempotency_key"] = "CASE WHEN n % 5 = 0 THEN 'key-' || n END"
        return columns

    def _nodes(self) -> dict[str, str]:
        at = f"{_BEGIN} + n * 333"
        columns = {
            "node_id": _NODE_ID,
            "hostname": "'host-' || n",
            "platform": "'linux'",
            "arch": "CASE n % 2 WHEN 0 THEN 'x64' ELSE 'arm64' END",
            "status": _NODE_STATUS,
            "cpu_usage": "(n % 1000) / 10.0",
            "available_skills": self._json("'[\"skill-' || (n % 7) || '\",\"python\"]'"),
            "max_concurrent_tasks": "100",
            "ip_address": "'10.0.0.' || (n % 256)",
            "port": "18789",
            "total_tasks_processed": "n",
            "successful_tasks": "n",
            "average_execution_time": "n / 8.0",
            "registered_at": self._moment(at),
            "last_heartbeat": self._moment(f"CASE WHEN n % 10 > 0 THEN {at} + 5000 END"),
            "tags": self._json("CASE WHEN n % 5 = 0 THEN '[\"spot\"]' END"),
        }
        if self._kind != "original":
            columns["version"] = "n"
        return columns

    def _changes(self, item: str, nodes: int) -> dict[str, str]:
        """Return the first change of each task or node, numbered by its version."""
        is_task = item == "task"
        at = f"{_BEGIN} + n * {1000037 if is_task else 333}"
        now = f"{to_microseconds(NOW)}"
        return {
            "revision": f"{nodes} + n" if is_task else "n",
            "changed_at": self._moment(now if self._imported else at),
            "item": f"'{item}'",
            "item_id": _TASK_ID if is_task else _NODE_ID,
            "kind": "'created'",
            "to_status": _TASK_STATUS if is_task else _NODE_STATUS,
            "node": _TASK_NODE if is_task else "NULL",
            "reason": "'adopted'" if self._imported else "NULL",
        }

    def _moment(self, microseconds: str) -> str:
        if self._kind == POSTGRESQL:
            return f"'epoch'::timestamptz + ({microseconds}) * interval '1 microsecond'"
        if self._kind == SQLITE:
            return microseconds
        seconds = f"strftime('%Y-%m-%dT%H:%M:%S', ({microseconds}) / 1000000, 'unixepoch')"
        return f"{seconds} || printf('.%06d', ({microseconds}) % 1000000)"

    def _list(self, text: str) -> str:
        """Return JSON of a list; the legacy schema also stores the empty list."""
        return f"coalesce({text}, '[]')" if self._kind == "original" else self._json(text)

    def _json(self, text: str) -> str:
        return f"({text})::json" if self._kind == POSTGRESQL else text


_TASK_ID = "'task-' || (10000000 + n)"
_TASK_NODE = f"CASE WHEN n % 50 > 0 THEN 'node-' || (100001 + n / {TASKS_A_NODE}) END"
_TASK_STATUS = (
    "CASE n % 50 WHEN 0 THEN 'pending' WHEN 1 THEN 'scheduled' WHEN 2 THEN 'running'"
    " WHEN 3 THEN 'failed' WHEN 4 THEN 'cancelled' WHEN 5 THEN 'timeout' ELSE 'completed' END"
)
_NODE_ID = "'node-' || (100000 + n)"
_NODE_STATUS = "CASE n % 10 WHEN 0 THEN 'offline' ELSE 'online' END"
_COUNT = """UPDATE nodes SET running_tasks = (
    SELECT count(*) FROM tasks
    WHERE assigned_node = node_id AND tasks.status IN ('scheduled', 'running'))"""
