"""The layout of the files: their columns, as in the tables, and their encoding as Parquet.

Values stay as they are in the rows: times are timestamps in UTC, JSON and enumerations are text.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import MISSING, fields
from enum import Enum
from typing import Any
from urllib.parse import quote

import pyarrow as pa
import pyarrow.parquet as pq
from sqlalchemy import BigInteger, Integer, Table

from openclaw_store.database import (
    FIELDS,
    Base,
    UtcTime,
    from_microseconds,
    table_of,
)
from openclaw_store.database.types import EnumValue
from openclaw_store.domain import Task

ROW_GROUP = 4096
"""Rows that are read together. Smaller groups would enlarge the footers of the files."""

REPLACES = b"openclaw.replaces"
"""Key of the footer's metadata: a JSON list of the files that this one replaces."""

Image = list[Any]
"""The values of a row in a form common to both databases: times are whole microseconds."""

MISFITS = (pa.ArrowException, OverflowError, TypeError, ValueError)
"""The errors for a value of another type than its column, as of a row written by hand."""

_TIME = pa.timestamp("us", "UTC")

_UNIQUE = frozenset({"task_id", "item_id", "idempotency_key", "parameters", "result", "error"})
"""Columns whose values hardly repeat: a dictionary of them would only cost space."""


class Layout:
    """The columns of one kind of file.

    Args:
        folder: The folder of the files.
        table: The table with these columns.
        names: The columns, in their order.
        key: The column to find rows by.
        order: The columns by which the rows are sorted.
        day: The name of the partition by day; `None` for no such partition.
    """

    def __init__(
        self,
        folder: str,
        table: Table,
        names: Sequence[str],
        *,
        key: str,
        order: Sequence[str],
        day: str | None = None,
    ) -> None:
        self.folder, self.names, self.key, self.day = folder, tuple(names), key, day
        self.order = order
        self.schema = pa.schema([(name, _arrow_type(table.c[name].type)) for name in names])
        self.times = [index for index, kind in enumerate(self.schema.types) if kind == _TIME]
        packed = [
            field.name
            for field in self.schema
            if field.type == _TIME or field.name in ("version", "revision", "previous")
        ]
        self._encoding: Mapping[str, Any] = {
            "use_dictionary": [one for one in names if one not in packed and one not in _UNIQUE],
            "column_encoding": {
                **dict.fromkeys(packed, "DELTA_BINARY_PACKED"),
                **dict.fromkeys({key} - set(packed), "DELTA_BYTE_ARRAY"),
            },
            "bloom_filter_options": {key: {"ndv": ROW_GROUP, "fpp": 0.01}},
        }

    def path(self, cluster: str, day: str, name: str) -> str:
        """Return the path of a file in its partitions."""
        parts = [
            self.folder,
            f"cluster={quote(cluster, safe='')}",
            self.day and f"{self.day}={day}",
            name,
        ]
        return "/".join(filter(None, parts)) + ".parquet"

    def rows(self, images: Sequence[Image], dialect: str) -> list[Image]:
        """Return images as rows of a driver."""
        rows = [image.copy() for image in images]
        if dialect != "sqlite":
            for position in self.times:
                for row in rows:
                    if row[position] is not None:
                        row[position] = from_microseconds(row[position])
        return rows

    def table(self, rows: Sequence[Sequence[Any]]) -> Any:
        """Return rows of a driver as a table of Arrow; one of `MISFITS` refuses a row.

        Arrow takes times as microseconds and as objects.
        """
        columns = zip(*rows, strict=True) if rows else [()] * len(self.names)
        arrays = [
            pa.array(values, kind) for values, kind in zip(columns, self.schema.types, strict=True)
        ]
        return pa.Table.from_arrays(arrays, schema=self.schema)

    def images_of(self, table: Any) -> list[Image]:
        """Return the rows of a table; columns that an older file lacks have their defaults."""
        columns = []
        for field in self.schema:
            if field.name not in table.column_names:
                columns.append([_DEFAULTS.get(field.name)] * len(table))
                continue
            column = table.column(field.name)
            columns.append((column.cast(pa.int64()) if field.type == _TIME else column).to_pylist())
        return [list(image) for image in zip(*columns, strict=True)]

    def encode(self, table: Any, metadata: Mapping[bytes, bytes] | None = None) -> Any:
        """Return the bytes of a file."""
        sink = pa.BufferOutputStream()
        with pq.ParquetWriter(
            sink, table.schema, compression="zstd", compression_level=3, **self._encoding
        ) as writer:
            writer.write_table(table, ROW_GROUP)
            writer.add_key_value_metadata(metadata or {})
        return sink.getvalue()


def _arrow_type(kind: Any) -> Any:
    if isinstance(kind, UtcTime):
        return _TIME
    if isinstance(kind, EnumValue):
        return pa.int64() if issubclass(kind.kind, int) else pa.string()
    return pa.int64() if isinstance(kind, BigInteger | Integer) else pa.string()


def _default(field: Any) -> Any:
    value = None if field.default is MISSING else field.default
    return value.value if isinstance(value, Enum) else value


_DEFAULTS = {field.name: _default(field) for field in fields(Task)}

_CHANGES = Base.metadata.tables["changes"]
_CHANGE_NAMES = _CHANGES.c.keys()

TASKS = Layout(
    "tasks",
    table_of(Task),
    FIELDS[Task],
    key="task_id",
    order=("completed_at", "task_id"),
    day="finished",
)
"""Archived tasks, by the day of their end."""

HISTORIES = Layout(
    "histories",
    _CHANGES,
    _CHANGE_NAMES,
    key="item_id",
    order=("item_id", "revision"),
    day="finished",
)
"""The changes of archived tasks, in files with the same names as their tasks."""

CHANGES = Layout("changes", _CHANGES, _CHANGE_NAMES, key="item_id", order=("revision",), day="day")
"""Changes that compaction removed from the feed, by their day."""

VOIDS = Layout(
    "voids",
    Base.metadata.tables["archive_voids"],
    ("task_id", "version"),
    key="task_id",
    order=("task_id", "version"),
)
"""Archived copies that no longer count: the task was changed meanwhile, or restored."""

LAYOUTS = {layout.folder: layout for layout in (TASKS, HISTORIES, CHANGES, VOIDS)}
