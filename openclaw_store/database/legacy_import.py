"""Adoption: how a file of the original hand-made schema becomes a database of this library.

The original kept `tasks` and `nodes`, with a column for each field and no `alembic_version`, and
`created_at` and `updated_at` besides. Its tables are set aside, the migrations make those of the
library, and each row is read as the original would have read it, checked like everything that is
written here, and given its first change in the feed. All of it is one transaction.

- NULL is the default of a field. A row that cannot be read goes to `legacy_rejected` as JSON, with
  the reason. What is in columns that somebody added goes to `legacy_extra` as JSON.
- A time without a zone is in the zone that the caller names, else in that of this machine; the
  earlier of two moments where the clocks were turned back. `created_at` and `updated_at` are in UTC
  where they have a space, as SQLite writes them. The original never read these two, so one that
  cannot be read does no harm.
"""

from __future__ import annotations

import json
import logging
import math
import re
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime, tzinfo
from pathlib import Path
from typing import Any, NamedTuple
from zoneinfo import ZoneInfo, ZoneInfoNotFoundError

from sqlalchemy import Connection, inspect

from openclaw_store.backends import Cursor
from openclaw_store.database.statements import statements_for
from openclaw_store.database.tables import table_of
from openclaw_store.domain import KEY, NodeInfo, Record, Task, check_time, encode
from openclaw_store.errors import InvalidDataError, safe_repr

logger = logging.getLogger("openclaw_store.adoption")

_BATCH = 1000
_ASIDE = "legacy_"
"""How the names of the tables begin that the library did not make."""

_ISO = re.compile(r"\d{4}-\d\d-\d\d([T ].+)?", re.ASCII)
_ITS_OWN = re.compile(r"idx_(tasks|nodes)_\w+|update_(tasks|nodes)_timestamp")
"""The indexes and triggers of the original."""

_MAKE_TABLES = (
    """CREATE TABLE IF NOT EXISTS legacy_rejected (
        id INTEGER PRIMARY KEY,
        item TEXT NOT NULL,
        item_id TEXT,
        reason TEXT NOT NULL,
        "row" TEXT NOT NULL
    )""",
    """CREATE TABLE IF NOT EXISTS legacy_extra (
        id INTEGER PRIMARY KEY,
        item TEXT NOT NULL,
        item_id TEXT NOT NULL,
        "row" TEXT NOT NULL
    )""",
)
_INSERT_REJECTED = 'INSERT INTO legacy_rejected (item, item_id, reason, "row") VALUES (?, ?, ?, ?)'
_INSERT_EXTRA = 'INSERT INTO legacy_extra (item, item_id, "row") VALUES (?, ?, ?)'


class Rejected(NamedTuple):
    """A row that could not be read."""

    item: str
    """`task` or `node`."""
    item_id: str | None
    """`None` where that could not be read either."""
    reason: str


class LegacyImport(NamedTuple):
    """What became of the original's rows."""

    nodes: int
    tasks: int
    rejected: Sequence[Rejected]
    copy: Path
    """The file as it was."""


def zone_of(name: str | None) -> tzinfo | None:
    """The zone of that name; `None` for the local one.

    Raises:
        InvalidDataError: If there is none.
    """
    if name is None:
        return None
    try:
        return ZoneInfo(name)
    except (ZoneInfoNotFoundError, ValueError, TypeError, OSError):  # a folder is an OSError
        raise InvalidDataError(
            "legacy_timezone",
            f"{safe_repr(name)} is no time zone: give one such as Asia/Shanghai or UTC",
        ) from None


def is_legacy(connection: Connection) -> bool:
    """Whether the database is one of the original: with its tables, and not adopted yet."""
    if connection.dialect.name != "sqlite":
        return False
    inspector = inspect(connection)
    tables = set(inspector.get_table_names())
    if "alembic_version" in tables or not tables.issuperset(_NEEDED):
        return False
    return all(
        needed <= {column["name"].lower() for column in inspector.get_columns(name)}
        for name, needed in _NEEDED.items()
    )


def is_aside(name: str | None) -> bool:
    """Whether a table holds what was left over, which no migration knows of."""
    return name in ("legacy_rejected", "legacy_extra")


def set_aside(connection: Connection) -> None:
    """Make room for the tables, indexes and names of the library."""
    found = connection.exec_driver_sql(
        "SELECT type, name FROM sqlite_master WHERE type IN ('index', 'trigger')"
        " AND sql IS NOT NULL AND lower(tbl_name) IN ('tasks', 'nodes')"
    )
    for kind, name in found.fetchall():
        if not _ITS_OWN.fullmatch(name):
            logger.warning("the %s %s is not part of the schema, and is dropped", kind, name)
        quoted = name.replace('"', '""')
        connection.exec_driver_sql(f'DROP {kind} "{quoted}"')
    # Else SQLite would have the views and foreign keys of others refer to the new name.
    connection.exec_driver_sql("PRAGMA legacy_alter_table=ON")
    for name in _NEEDED:
        connection.exec_driver_sql(f"ALTER TABLE {name} RENAME TO {_ASIDE}{name}")
    connection.exec_driver_sql("PRAGMA legacy_alter_table=OFF")


def adopt(
    connection: Connection, cursor: Cursor, zone: tzinfo | None, now: datetime, copy: Path
) -> LegacyImport:
    """Move the rows that were set aside to the tables of the library, nodes first.

    Args:
        connection: The transaction.
        cursor: Writes in it.
        zone: That of times which name none; `None` for the local one.
        now: When they were added, for the feed.
        copy: Where the file as it was is kept.
    """
    for statement in _MAKE_TABLES:
        connection.exec_driver_sql(statement)
    driver: Any = connection.connection.driver_connection
    usual, driver.text_factory = driver.text_factory, _decoded
    try:
        reading = _Adoption(connection, cursor, zone, now)
        nodes, tasks = reading.move(NodeInfo), reading.move(Task)
    finally:
        driver.text_factory = usual
    cursor.execute("UPDATE counters SET revision = ? WHERE id = 1", (nodes + tasks,))
    return LegacyImport(nodes, tasks, reading.rejected, copy)


def report(adopted: LegacyImport, location: str) -> None:
    """Tell the log what became of the rows."""
    for row in adopted.rejected:
        logger.warning(
            "the %s %r was not adopted, but put into legacy_rejected: %s",
            row.item, row.item_id, row.reason,
        )  # fmt: skip
    logger.info(
        "%s: adopted %d nodes and %d tasks of the original database, which is kept in %s",
        location, adopted.nodes, adopted.tasks, adopted.copy,
    )  # fmt: skip


class _Adoption:
    """Moves rows, and numbers them."""

    def __init__(
        self, connection: Connection, cursor: Cursor, zone: tzinfo | None, now: datetime
    ) -> None:
        self._connection = connection
        self._cursor = cursor
        self._zone = zone
        self._now = now
        self._revision = 0
        self.rejected: list[Rejected] = []

    def move(self, kind: type[Any]) -> int:
        """Move all rows of a kind that can be read; returns how many."""
        table, before = f"{_ASIDE}{table_of(kind).name}", self._revision
        found = self._connection.exec_driver_sql(f"SELECT * FROM {table}")  # noqa: S608 - of our own names
        names = [name.lower() for name in found.keys()]  # noqa: SIM118 - no mapping
        seen: set[str] = set()
        for rows in found.partitions(_BATCH):
            self._move(kind, [dict(zip(names, row, strict=True)) for row in rows], seen)
        self._connection.exec_driver_sql(f"DROP TABLE {table}")
        return self._revision - before

    def _move(self, kind: type[Any], rows: Sequence[dict[str, Any]], seen: set[str]) -> None:
        sql, item, known = statements_for("sqlite"), _ITEM[kind], _READERS[kind].keys() | _DROPPED
        insert, plan = sql.insert[kind]
        at = sql.to_moment(self._now)
        written, changes, extra, rejected, kept = [], [], [], [], []
        for row in rows:
            try:
                record = self._read(kind, row)
                id: str | None = record.id
                if record.id in seen:
                    raise InvalidDataError(KEY[kind], "is that of a row before it")
            except InvalidDataError as error:
                key = row.get(KEY[kind])
                id = key if isinstance(key, str) else None
                rejected.append(Rejected(item, id, str(error)))
                kept.append((*rejected[-1], _json(row)))
                continue
            seen.add(record.id)
            self._revision += 1
            record.version = self._revision
            written.append(record.values(plan))
            status, node = record.status.value, vars(record).get("assigned_node")
            changes.append(
                (self._revision, at, item, id, "created", None, status, node, "adopted", None)
            )
            added = {
                name: value
                for name, value in row.items()
                if name not in known and value is not None
            }
            if added:
                extra.append((item, id, _json(added)))
        self._cursor.write(insert, written)
        self._cursor.write(sql.insert_change, changes)
        self._cursor.write(_INSERT_EXTRA, extra)
        self._cursor.write(_INSERT_REJECTED, kept)
        self.rejected += rejected

    def _read(self, kind: type[Any], row: Mapping[str, Any]) -> Record[Any]:
        values: dict[str, Any] = {}
        for name, read in _READERS[kind].items():
            value = row.get(name)
            if value is not None:
                value = read(name, value, self._zone)
            if value is not None or name in _NEEDED_VALUES:
                values[name] = value
        if kind is Task:
            values["updated_at"] = self._stamp(row, "updated_at") or self._now
        began = "submitted_at" if kind is Task else "registered_at"
        if began not in values:
            values[began] = self._stamp(row, "created_at") or self._now
        return encode(kind(**values))

    def _stamp(self, row: Mapping[str, Any], name: str) -> datetime | None:
        """What the original or its triggers wrote, and nobody has read."""
        value = row.get(name)
        if isinstance(value, str) and value[10:11] == " ":
            zone: tzinfo | None = UTC
        else:
            zone = self._zone
        try:
            moment = None if value is None else _moment(name, value, zone)
            return None if moment is None else check_time(name, moment)
        except InvalidDataError:
            return None


def _decoded(raw: bytes) -> str | bytes:
    """Text as it is; what is not UTF-8 stays bytes, which are refused by field."""
    try:
        return raw.decode()
    except UnicodeDecodeError:
        return raw


def _json(row: Mapping[str, Any]) -> str:
    return json.dumps({name: _plain(value) for name, value in row.items()}, ensure_ascii=False)


def _plain(value: Any) -> Any:
    """A value of a row as JSON can hold it."""
    if isinstance(value, bytes):
        return {"hex": value.hex()}
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return value


def _text(name: str, value: Any, zone: tzinfo | None) -> Any:
    return str(value) if isinstance(value, int | float) else value


def _whole(name: str, value: Any, zone: tzinfo | None) -> Any:
    number = _number(name, value, zone)
    return int(number) if isinstance(number, float) and number.is_integer() else number


def _number(name: str, value: Any, zone: tzinfo | None) -> Any:
    if not isinstance(value, str):
        return value
    for kind in (int, float):
        try:
            return kind(value)
        except ValueError:
            continue
    return value  # the check will refuse it


def _moment(name: str, value: Any, zone: tzinfo | None) -> datetime | None:
    if value == "":
        return None
    try:
        if not isinstance(value, str) or not _ISO.fullmatch(value):
            raise ValueError
        moment = datetime.fromisoformat(value)
    except ValueError:
        raise InvalidDataError(
            name, f"must be a time such as 2026-03-01T12:30:00, not {value!r}"
        ) from None
    return moment.replace(tzinfo=zone) if moment.tzinfo is None else moment


def _value(name: str, value: Any, zone: tzinfo | None) -> Any:
    if value == "":
        return None
    try:
        return json.loads(_text(name, value, zone))
    except (ValueError, RecursionError) as error:
        raise InvalidDataError(name, f"is not readable JSON: {error}") from None


_Reader = Callable[[str, Any, tzinfo | None], Any]
"""Takes the name of a field, what the original's column holds, and the zone of its times."""

# Frozen here: the fields of today may change, the original does not.
_READERS: Mapping[type[Any], Mapping[str, _Reader]] = {
    NodeInfo: {
        "node_id": _text,
        "hostname": _text,
        "platform": _text,
        "arch": _text,
        "status": _text,
        "cpu_usage": _number,
        "memory_usage": _number,
        "disk_usage": _number,
        "available_skills": _value,
        "max_concurrent_tasks": _whole,
        "running_tasks": _whole,
        "ip_address": _text,
        "tailscale_ip": _text,
        "port": _whole,
        "total_tasks_processed": _whole,
        "successful_tasks": _whole,
        "failed_tasks": _whole,
        "average_execution_time": _number,
        "registered_at": _moment,
        "last_heartbeat": _moment,
        "tags": _value,
    },
    Task: {
        "task_id": _text,
        "task_type": _text,
        "name": _text,
        "description": _text,
        "required_skills": _value,
        "optional_skills": _value,
        "status": _text,
        "priority": _whole,
        "assigned_node": _text,
        "submitted_at": _moment,
        "scheduled_at": _moment,
        "started_at": _moment,
        "completed_at": _moment,
        "parameters": _value,
        "timeout": _whole,
        "retry_count": _whole,
        "max_retries": _whole,
        "user_id": _text,
        "affinity_tags": _value,
        "result": _value,
        "error": _text,
        "metadata": _value,
    },
}
_DROPPED = {"created_at", "updated_at"}
"""Columns of the original that are no fields, but stand in for others."""

_ITEM: Mapping[type[Any], str] = {NodeInfo: "node", Task: "task"}

_NEEDED: Mapping[str, frozenset[str]] = {
    "nodes": frozenset({"node_id", "hostname", "platform", "arch", "status", "available_skills"}),
    "tasks": frozenset({"task_id", "task_type", "name", "required_skills", "status", "priority"}),
}
"""The columns by which the tables of the original are known: those that it always filled in."""

_NEEDED_VALUES = frozenset(
    {"node_id", "hostname", "task_id", "task_type", "name", "status", "priority"}
)
"""Fields that are nothing by default."""
