"""One file of an archive: its footer, which tells where to search, and its rows."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager
from functools import cached_property
from typing import Any
from urllib.parse import unquote

import orjson
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.dataset as ds
import xxhash

from openclaw_store.archive.folder import Entry, Folder
from openclaw_store.archive.layout import CLUSTER_ID, DEFAULTS, LAYOUTS, REPLACES

PARQUET = ds.ParquetFileFormat(
    default_fragment_scan_options=ds.ParquetFragmentScanOptions(page_checksum_verification=True)
)
"""The format; a damaged page is an error."""

_DAMAGED = "if `openclaw-store archive verify` finds it damaged, restore it from a backup"

# The salts of a split block Bloom filter, from the specification of Parquet.
_SALTS = (
    0x47B6137B, 0x44974D91, 0x8824AD5B, 0xA2B7289D, 0x705495C7, 0x2DF1424B, 0x9EFC4947, 0x5C6BFB31,
)  # fmt: skip

_BLOCK_BYTES = 32


class ArchiveFile:
    """A complete file; its footer is read once, when it is needed.

    All methods block the thread. They raise `FileNotFoundError` if the file is gone, and
    `UnavailableError` if it is damaged.
    """

    def __init__(self, folder: Folder, entry: Entry) -> None:
        self._folder = folder
        self.path, self.size = entry.path, entry.size
        kind, cluster, *_ = parts = self.path.split("/")
        self.layout = LAYOUTS[kind]
        self.cluster = unquote(cluster.removeprefix("cluster="))
        self.partition = cluster
        self.day = parts[-2].partition("=")[2]
        self._fragment = PARQUET.make_fragment(f"{folder.root}/{self.path}", folder.system)

    @cached_property
    def footer(self) -> Any:
        with self._errors():
            self._fragment.ensure_complete_metadata()
            return self._fragment.metadata

    @property
    def rows(self) -> int:
        return int(self.footer.num_rows)

    @property
    def groups(self) -> range:
        return range(self.footer.num_row_groups)

    @cached_property
    def replaced(self) -> frozenset[str]:
        """Paths of the files that this one replaces."""
        with self._errors():
            return frozenset(orjson.loads((self.footer.metadata or {}).get(REPLACES, b"[]")))

    @cached_property
    def cluster_id(self) -> int | None:
        """The number of the cluster to which sealed values are bound, if any may be sealed."""
        with self._errors():
            number = (self.footer.metadata or {}).get(CLUSTER_ID)
            return None if number is None else int(number)

    @cached_property
    def submissions(self) -> Sequence[tuple[int, int]]:
        """First and last time of submission in each row group, in microseconds."""
        with self._errors():
            index = self._names.index("submitted_at")
            known = [self.footer.row_group(one).column(index).statistics for one in self.groups]
        return [
            (one.min_raw, one.max_raw) if one and one.has_min_max else (0, 1 << 62) for one in known
        ]

    def read(
        self,
        groups: Sequence[int] | None = None,
        columns: Sequence[str] | None = None,
        filter: Any = None,
    ) -> Any:
        """Return the rows of some row groups, or of all, that meet a condition of Arrow."""
        schema = self.layout.schema
        with self._errors():
            known = set(self._names)
            part = self._fragment if groups is None else self._fragment.subset(row_group_ids=groups)
            table = part.to_table(schema=schema, columns=columns and [*columns], filter=filter)
        for index, name in enumerate(table.column_names):
            if name in DEFAULTS and name not in known:
                values = pa.array([DEFAULTS[name]] * len(table), schema.field(name).type)
                table = table.set_column(index, name, values)
        return table

    def find(self, key: str, columns: Sequence[str]) -> Any:
        """Return the rows with this key."""
        is_wanted = pc.field(self.layout.key) == key
        groups = [
            group
            for group in self.groups
            if self._may_have(group, key) and len(self.read([group], [self.layout.key], is_wanted))
        ]
        if not groups:
            return self.layout.schema.empty_table().select(columns)
        return self.read(groups, columns, is_wanted)

    @cached_property
    def _names(self) -> list[str]:
        names: list[str] = self.footer.schema.to_arrow_schema().names
        return names

    @cached_property
    def _filters(self) -> Sequence[bytes | None]:
        """The Bloom filter of each row group, without its header; `None` if it has none."""
        filters: list[bytes | None] = []
        with self._errors(), self._fragment.open() as file:
            index = self._names.index(self.layout.key)
            for group in self.groups:
                column = self.footer.row_group(group).column(index)
                length = column.bloom_filter_length
                if not length or column.bloom_filter_offset is None:
                    filters.append(None)
                    continue
                size = 1 << (length.bit_length() - 1)  # a power of two, behind a short header
                file.seek(column.bloom_filter_offset + length - size)
                filters.append(file.read(size))
        return filters

    def _may_have(self, group: int, key: str) -> bool:
        bits = self._filters[group]
        if bits is None:
            return True
        hashed = xxhash.xxh64_intdigest(key.encode())
        block = ((hashed >> 32) * (len(bits) // _BLOCK_BYTES)) >> 32
        low = hashed & 0xFFFFFFFF
        for place, salt in enumerate(_SALTS):
            start = block * _BLOCK_BYTES + 4 * place
            word = int.from_bytes(bits[start : start + 4], "little")
            if not word >> (((low * salt) & 0xFFFFFFFF) >> 27) & 1:
                return False
        return True

    def _errors(self) -> AbstractContextManager[None]:
        return self._folder.errors(self.path, _DAMAGED, passed=(FileNotFoundError,))
