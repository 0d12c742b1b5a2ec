"""The layout of the files: their columns, as in the tables, and their encoding as Parquet.

Values stay as they are in the rows: times are timestamps in UTC, JSON and enumerations are text.
The changes of an archived task are the list `history` in its row.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, fields
from itertools import accumulate, islice
from typing import Any
from urllib.parse import quote

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from sqlalchemy import BigInteger, Integer, Table

from openclaw_store.database import FIELDS, Base, UtcTime, table_of
from openclaw_store.database.types import EnumValue
from openclaw_store.domain import Raw, Task

ROW_GROUP = 4096
"""Rows that are read together. Smaller groups would enlarge the footers of the files."""

REPLACES = b"openclaw.replaces"
"""Key of the footer's metadata: a JSON list of the files that this one replaces."""

CLUSTER_ID = b"openclaw.cluster_id"
"""Key of the footer's metadata: the number of the cluster to which sealed values are bound."""

Image = tuple[Any, ...]
"""The values of a row in a form common to both databases: times are whole microseconds."""

MISFITS = (pa.ArrowException, OverflowError, TypeError, ValueError)
"""The errors for a value of another type than its column, as of a row written by hand."""

_TIME = pa.timestamp("us", "UTC")

_UNIQUE = frozenset({"task_id", "item_id", "idempotency_key", "parameters", "result", "error"})
"""Columns in which values hardly repeat: a dictionary of them would only cost space."""

_CHANGES = Base.metadata.tables["changes"]

CHANGE_NAMES = _CHANGES.c.keys()
HISTORY = tuple(name for name in CHANGE_NAMES if name not in ("item", "item_id"))
"""The columns of a change in the history of a task."""


class Layout:
    """The columns of one kind of file.

    Args:
        folder: The folder of the files.
        table: The table with these columns.
        names: The columns, in their order.
        order: The columns by which the rows are sorted.
        key: The column to find rows by.
        day: The name of the partition by day; `None` for no such partition.
        has_history: Append the column `history`.
    """

    def __init__(
        self,
        folder: str,
        table: Table,
        names: Sequence[str],
        order: Sequence[str],
        *,
        key: str = "task_id",
        day: str | None = None,
        has_history: bool = False,
    ) -> None:
        self.folder, self.names, self.key, self._day = folder, tuple(names), key, day
        self.order = [(name, "ascending") for name in order]
        self.schema = pa.schema(_fields(table, names))
        leaves = {field.name: field for field in self.schema}
        if has_history:
            inner = _fields(_CHANGES, HISTORY)
            changes = pa.list_(pa.field("element", pa.struct(inner)))  # as it is read back
            self.schema = self.schema.append(pa.field("history", changes))
            leaves |= {f"history.list.element.{field.name}": field for field in inner}
        packed = [
            path
            for path, field in leaves.items()
            if field.type == _TIME or field.name in ("version", "revision", "previous")
        ]
        self._encoding: Mapping[str, Any] = {
            "use_dictionary": [
                path
                for path, field in leaves.items()
                if path not in packed and field.name not in _UNIQUE
            ],
            "column_encoding": {
                **dict.fromkeys(packed, "DELTA_BINARY_PACKED"),
                key: "DELTA_BYTE_ARRAY",
            },
            "bloom_filter_options": {key: {"ndv": ROW_GROUP, "fpp": 0.01}},
        }

    def path(self, cluster: str, day: str, name: str) -> str:
        """Return the path of a file in its partitions."""
        by_day = [f"{self._day}={day}"] if self._day else []
        by_cluster = f"cluster={quote(cluster, safe='')}"
        return "/".join([self.folder, by_cluster, *by_day, f"{name}.parquet"])

    def table(self, rows: Sequence[Raw], changes: Sequence[Raw] = ()) -> Any:
        """Return rows of a driver as a table of Arrow; one of `MISFITS` refuses a row.

        Arrow takes times as microseconds and as objects.

        Args:
            changes: The changes of these rows, as rows of `past_changes`.
        """
        arrays = _arrays(rows, self.schema)
        if len(arrays) < len(self.schema):
            arrays.append(_histories(arrays[0], changes, self.schema.field("history").type))
        return pa.Table.from_arrays(arrays, schema=self.schema)

    def images_of(self, table: Any) -> list[Image]:
        """Return the rows of a table, without histories."""
        return rows_of(table.select(self.names))

    def encode(self, table: Any, metadata: Mapping[bytes, bytes] | None = None) -> bytes:
        """Return the bytes of a file."""
        sink = pa.BufferOutputStream()
        with pq.ParquetWriter(
            sink,
            table.schema,
            compression="zstd",
            compression_level=3,
            write_page_checksum=True,
            **self._encoding,
        ) as writer:
            writer.write_table(table, ROW_GROUP)
            writer.add_key_value_metadata(metadata or {})
        contents: bytes = sink.getvalue().to_pybytes()
        return contents


def histories_of(table: Any) -> list[list[Image]]:
    """Return the changes of each task of a table, with the columns of `HISTORY`."""
    lists = table["history"].combine_chunks()
    changes = iter(rows_of(pa.Table.from_struct_array(lists.flatten())))
    return [[*islice(changes, count)] for count in lengths_of(lists)]


def lengths_of(lists: Any) -> list[int]:
    """Return the number of elements of each list."""
    return pc.fill_null(pc.list_value_length(lists), 0).to_pylist()  # type: ignore[no-any-return]


def _fields(table: Table, names: Sequence[str]) -> list[Any]:
    return [pa.field(name, _arrow_type(table.c[name].type)) for name in names]


def _arrow_type(kind: Any) -> Any:
    if isinstance(kind, UtcTime):
        return _TIME
    if isinstance(kind, EnumValue):
        return pa.int64() if issubclass(kind.kind, int) else pa.string()
    return pa.int64() if isinstance(kind, BigInteger | Integer) else pa.string()


def _arrays(rows: Sequence[Raw], fields: Any) -> list[Any]:
    columns = zip(*rows, strict=True) if rows else ((),) * len(fields)
    return [pa.array(values, field.type) for values, field in zip(columns, fields, strict=False)]


def _histories(ids: Any, changes: Sequence[Raw], kind: Any) -> Any:
    """Return the list of the changes of each task, oldest first."""
    types = {"item_id": ids.type, **{one.name: one.type for one in kind.value_type}}
    columns = zip(*changes, strict=True) if changes else ((),) * len(_PAST)
    found = {
        name: pa.array(values, types[name])
        for name, values in zip(_PAST, columns, strict=True)
        if name in types
    }
    rows = pa.table({**found, "row": pc.index_in(found["item_id"], ids)}).sort_by(_IN_ORDER)
    counts = Counter(rows["row"].to_pylist())
    ends = pa.array(accumulate((counts[row] for row in range(len(ids))), initial=0), pa.int32())
    flat = [rows[name].combine_chunks() for name in HISTORY]
    structs = pa.StructArray.from_arrays(flat, fields=[*kind.value_type])
    return pa.ListArray.from_arrays(ends, structs, type=kind)


_PAST = Base.metadata.tables["past_changes"].c.keys()
_IN_ORDER = [("row", "ascending"), ("revision", "ascending")]


def rows_of(table: Any) -> list[Image]:
    """Return the rows of a table, with times as microseconds."""
    columns = (
        (one.cast(pa.int64()) if one.type == _TIME else one).to_pylist() for one in table.columns
    )
    return [*zip(*columns, strict=True)]


DEFAULTS = {
    field.name: getattr(field.default, "value", field.default)
    for field in fields(Task)
    if field.default not in (MISSING, None)
}
"""The values of columns that older files lack, unless they are NULL."""

TASKS = Layout(
    "tasks",
    table_of(Task),
    FIELDS[Task],
    ("completed_at", "task_id"),
    day="finished",
    has_history=True,
)
"""Archived tasks with their histories, by the day of their end."""

CHANGES = Layout("changes", _CHANGES, CHANGE_NAMES, ("revision",), key="item_id", day="day")
"""Changes that compaction removed from the feed, by their day."""

VOIDS = Layout(
    "voids",
    Base.metadata.tables["archive_voids"],
    ("task_id", "version"),
    ("task_id", "version"),
)
"""Archived copies that no longer count: the task was changed meanwhile, or restored."""

LAYOUTS = {layout.folder: layout for layout in (TASKS, CHANGES, VOIDS)}
