"""The import of a legacy database, a file of the first, hand-made schema.

That schema had `tasks` and `nodes`, with a column for each field, `created_at` and `updated_at`,
and no `alembic_version`. In one transaction its tables are renamed, the migrations make the tables
of the library, and each row is read as the first program read it, validated like every write, and
given its first change in the feed.

- NULL is the default of a field. An unreadable row goes to `legacy_rejected` as JSON, with the
  reason. The values of additional columns go to `legacy_extra` as JSON.
- A time without a zone is in the caller's zone, by default that of this machine; it is the earlier
  one of two where the clocks were turned back. `created_at` and `updated_at` are in UTC if they
  have a space, as SQLite writes them. The first program never read these two, so an unreadable one
  is ignored.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime, tzinfo
from pathlib import Path
from typing import Any, NamedTuple
from zoneinfo import ZoneInfo, ZoneInfoNotFoundError

from sqlalchemy import Connection, inspect

from openclaw_store.backends import Cursor, fetch_raw_rows
from openclaw_store.database.schema_check import normalised
from openclaw_store.database.statements import Statements
from openclaw_store.database.tables import table_of
from openclaw_store.domain import ENTITY_NAMES, KEY, NodeInfo, Record, Task, check_time, encode
from openclaw_store.encryption import SealedColumn
from openclaw_store.errors import InvalidDataError, logger_of, safe_repr

logger = logger_of("adoption")

_BATCH = 1000
_PREFIX = "legacy_"
"""Prefix of the renamed tables."""

_ISO = re.compile(r"\d{4}-\d\d-\d\d([T ].+)?", re.ASCII)
_OWN_NAMES = re.compile(r"idx_(tasks|nodes)_\w+|update_(tasks|nodes)_timestamp")
"""The indexes and triggers of the legacy schema."""

LEFTOVERS = {
    "legacy_rejected": """CREATE TABLE legacy_rejected (
        id INTEGER PRIMARY KEY,
        item TEXT NOT NULL,
        item_id TEXT,
        reason TEXT NOT NULL,
        "row" TEXT NOT NULL
    )""",
    "legacy_extra": """CREATE TABLE legacy_extra (
        id INTEGER PRIMARY KEY,
        item TEXT NOT NULL,
        item_id TEXT NOT NULL,
        "row" TEXT NOT NULL
    )""",
}
"""The tables of rejected rows and of additional values, which no migration knows."""

_REJECTED_ROW = SealedColumn("legacy_rejected", "row", is_json=False)
_REJECTED_REASON = SealedColumn("legacy_rejected", "reason", is_json=False)
_EXTRA_ROW = SealedColumn("legacy_extra", "row", is_json=False)
"""Sealed columns; the row of a value is its item and identifier: `task:train-7`."""

_INSERT_REJECTED = 'INSERT INTO legacy_rejected (item, item_id, reason, "row") VALUES (?, ?, ?, ?)'
_INSERT_EXTRA = 'INSERT INTO legacy_extra (item, item_id, "row") VALUES (?, ?, ?)'


class Rejected(NamedTuple):
    """An unreadable row."""

    item: str
    """`task` or `node`."""
    item_id: str | None
    """`None` if it is unreadable, too."""
    reason: str


class LegacyImport(NamedTuple):
    """The result of an import: the rows that were imported and rejected."""

    nodes: int
    tasks: int
    rejected: Sequence[Rejected]
    copy: Path
    """The copy of the legacy file."""


def zone_of(name: str | None) -> tzinfo | None:
    """Return the time zone of a name; `None` is the local one.

    Raises:
        InvalidDataError: If there is no such zone.
    """
    if name is None:
        return None
    try:
        return ZoneInfo(name)
    except (ZoneInfoNotFoundError, ValueError, TypeError, OSError):  # a folder is an OSError
        raise InvalidDataError(
            "legacy_timezone",
            f"{safe_repr(name)} is not the name of a time zone: give one such as Asia/Shanghai or "
            "UTC",
        ) from None


def is_legacy(connection: Connection) -> bool:
    """Return true if the database has the tables of the legacy schema, and none of Alembic."""
    if connection.dialect.name != "sqlite":
        return False
    inspector = inspect(connection)
    tables = set(inspector.get_table_names())
    if tables & {"alembic_version", "counters"} or not tables.issuperset(_NEEDED):
        return False
    return all(
        needed <= {column["name"].lower() for column in inspector.get_columns(name)}
        for name, needed in _NEEDED.items()
    )


def rename_tables(connection: Connection) -> None:
    """Rename the legacy tables, and drop their indexes and triggers."""
    found = connection.exec_driver_sql(
        "SELECT type, name FROM sqlite_master WHERE type IN ('index', 'trigger')"
        " AND sql IS NOT NULL AND lower(tbl_name) IN ('tasks', 'nodes')"
    )
    for kind, name in found.fetchall():
        if not _OWN_NAMES.fullmatch(name):
            shown = safe_repr(name)
            logger.warning("the %s %s is not part of the schema, and is dropped", kind, shown)
        quoted = name.replace('"', '""')
        connection.exec_driver_sql(f'DROP {kind} "{quoted}"')
    # Otherwise SQLite renames the tables in the foreign keys of other tables, too.
    connection.exec_driver_sql("PRAGMA legacy_alter_table=ON")
    for name in _NEEDED:
        connection.exec_driver_sql(f"ALTER TABLE {name} RENAME TO {_PREFIX}{name}")
    connection.exec_driver_sql("PRAGMA legacy_alter_table=OFF")


def find_damage(connection: Connection) -> str | None:
    """Return the first flaw in the pages of a legacy file: reading them may never end."""
    # Not `integrity_check`, which also evaluates the expressions of indexes.
    flaw = connection.exec_driver_sql("PRAGMA quick_check(1)").scalar()
    return None if flaw == "ok" else str(flaw)


def import_rows(
    connection: Connection,
    cursor: Cursor,
    sql: Statements,
    zone: tzinfo | None,
    now: datetime,
    copy: Path,
) -> LegacyImport:
    """Move the rows of the renamed tables to the tables of the library, nodes first.

    With keys, the pages of the renamed tables are overwritten with zeros.

    Times without a zone are in `zone`, `None` for the local one. The changes have the time `now`.
    """
    for statement in LEFTOVERS.values():
        connection.exec_driver_sql(statement.replace("TABLE", "TABLE IF NOT EXISTS", 1))
    driver: Any = connection.connection.driver_connection
    if sql.protection.has_keys:
        connection.exec_driver_sql("PRAGMA secure_delete=ON")
    factory, driver.text_factory = driver.text_factory, _decode_text
    try:
        rows = _Importer(connection, cursor, sql, zone, now)
        nodes, tasks = rows.move_all(NodeInfo), rows.move_all(Task)
    finally:
        driver.text_factory = factory
    return LegacyImport(nodes, tasks, rows.rejected, copy)


def report(result: LegacyImport, location: str, *, is_sealed: bool) -> None:
    """Log the result of an import; if values are sealed, without reasons, which quote them."""
    for row in result.rejected:
        logger.warning(
            "the %s %s was not adopted, but put into legacy_rejected: %s",
            *(
                row.item,
                safe_repr(row.item_id),
                "its values are sealed" if is_sealed else row.reason,
            ),
        )
    logger.info(
        "%s: adopted %d nodes and %d tasks of the original database, which is kept in %s",
        location, result.nodes, result.tasks, result.copy,
    )  # fmt: skip


@dataclass
class _Importer:
    """Moves rows to the tables of the library, and assigns their revisions."""

    _connection: Connection
    _cursor: Cursor
    _sql: Statements
    _zone: tzinfo | None
    _now: datetime
    _revision: int = 0
    rejected: list[Rejected] = field(default_factory=list)

    def move_all(self, kind: type[Any]) -> int:
        """Move all readable rows of a kind, and return their number."""
        table, before = f"{_PREFIX}{table_of(kind).name}", self._revision
        found = self._connection.exec_driver_sql(f"SELECT * FROM {table}")
        names = [name.lower() for name in found.keys()]  # noqa: SIM118 - no mapping
        seen: set[str] = set()
        while rows := fetch_raw_rows(found, _BATCH):  # SQLAlchemy would log them
            self._move(kind, [dict(zip(names, row, strict=True)) for row in rows], seen)
        self._connection.exec_driver_sql(f"DROP TABLE {table}")
        return self._revision - before

    def _move(self, kind: type[Any], rows: Sequence[dict[str, Any]], seen: set[str]) -> None:
        sql, item, known = self._sql, ENTITY_NAMES[kind], _READERS[kind].keys() | _DROPPED
        row_of_rejected, reason_of_rejected, row_of_extra = map(
            sql.protection.storing, (_REJECTED_ROW, _REJECTED_REASON, _EXTRA_ROW)
        )
        insert, codec = sql.insert[kind]
        at = sql.to_moment(self._now)
        written, changes, extra, rejected, reports = [], [], [], [], []
        for row in rows:
            try:
                record = self._read(kind, row)
                id: str | None = record.id
                if record.id in seen:
                    raise InvalidDataError(KEY[kind], "is that of a row before it")
            except InvalidDataError as error:
                key = row.get(KEY[kind])
                id = key if isinstance(key, str) else None
                reports.append(Rejected(item, id, str(error)))
                owner, reason = f"{item}:{id}", str(error)
                rejected.append(
                    (
                        item,
                        id,
                        reason_of_rejected(owner, reason),
                        row_of_rejected(owner, _json(row)),
                    )
                )
                continue
            seen.add(record.id)
            self._revision += 1
            record.version = self._revision
            written.append(record.values(codec))
            status, node = record.status.value, vars(record).get("assigned_node")
            changes.append(
                (self._revision, at, item, id, "created", None, status, node, "adopted", None)
            )
            added = {
                name: one for name, one in row.items() if name not in known and one is not None
            }
            if added:
                extra.append((item, id, row_of_extra(f"{item}:{id}", _json(added))))
        self._cursor.write(insert, written)
        self._cursor.write(sql.insert_change, changes)
        self._cursor.write(_INSERT_EXTRA, extra)
        self._cursor.write(_INSERT_REJECTED, rejected)
        self.rejected += reports

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
        """Return a time that the legacy program or a trigger wrote; `None` if unreadable."""
        value = row.get(name)
        is_utc = isinstance(value, str) and value[10:11] == " "
        zone = UTC if is_utc else self._zone
        try:
            moment = None if value is None else _moment(name, value, zone)
            return None if moment is None else check_time(name, moment)
        except InvalidDataError:
            return None


def _decode_text(raw: bytes) -> str | bytes:
    """Decode UTF-8; other bytes stay bytes, so that the validation of the field refuses them."""
    try:
        return raw.decode()
    except UnicodeDecodeError:
        return raw


def _json(row: Mapping[str, Any]) -> str:
    return json.dumps({name: _plain(value) for name, value in row.items()}, ensure_ascii=False)


def _plain(value: Any) -> Any:
    """Return a value of a row as JSON can represent it."""
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
    return value  # the validation refuses it


def _moment(name: str, value: Any, zone: tzinfo | None) -> datetime | None:
    if value == "":
        return None
    try:
        if not isinstance(value, str) or not _ISO.fullmatch(value):
            raise ValueError
        moment = datetime.fromisoformat(value)
    except ValueError:
        raise InvalidDataError(
            name, f"must be a time such as 2026-03-01T12:30:00, not {safe_repr(value)}"
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
"""Converts a value of a legacy column; takes the field's name, the value and the zone of times."""

# Frozen: the fields of the library may change, the legacy schema does not.
_READERS: Mapping[type[Any], Mapping[str, _Reader]] = {
    NodeInfo: {
        **dict.fromkeys(("node_id", "hostname", "platform", "arch", "status"), _text),
        **dict.fromkeys(("cpu_usage", "memory_usage", "disk_usage"), _number),
        "available_skills": _value,
        **dict.fromkeys(("max_concurrent_tasks", "running_tasks"), _whole),
        **dict.fromkeys(("ip_address", "tailscale_ip"), _text),
        **dict.fromkeys(("port", "total_tasks_processed"), _whole),
        **dict.fromkeys(("successful_tasks", "failed_tasks"), _whole),
        "average_execution_time": _number,
        **dict.fromkeys(("registered_at", "last_heartbeat"), _moment),
        "tags": _value,
    },
    Task: {
        **dict.fromkeys(("task_id", "task_type", "name", "description"), _text),
        **dict.fromkeys(("required_skills", "optional_skills"), _value),
        "status": _text,
        "priority": _whole,
        "assigned_node": _text,
        **dict.fromkeys(("submitted_at", "scheduled_at", "started_at", "completed_at"), _moment),
        "parameters": _value,
        **dict.fromkeys(("timeout", "retry_count", "max_retries"), _whole),
        "user_id": _text,
        **dict.fromkeys(("affinity_tags", "result"), _value),
        "error": _text,
        "metadata": _value,
    },
}
_DROPPED = {"created_at", "updated_at"}
"""Legacy columns that are no fields; they replace missing times."""

_NEEDED: Mapping[str, frozenset[str]] = {
    "nodes": frozenset({"node_id", "hostname", "platform", "arch", "status", "available_skills"}),
    "tasks": frozenset({"task_id", "task_type", "name", "required_skills", "status", "priority"}),
}
"""The columns that identify the legacy tables: the legacy program always wrote them."""

REPLACED = frozenset(_NEEDED)
"""The legacy tables, which the import replaces."""

OPTIONAL = {name: normalised(sql) for name, sql in LEFTOVERS.items()}
"""The definitions of `LEFTOVERS`."""

_NEEDED_VALUES = frozenset(
    {"node_id", "hostname", "task_id", "task_type", "name", "status", "priority"}
)
"""Fields without a default."""
