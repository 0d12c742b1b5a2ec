"""One file of an archive: its footer, which tells where to search, and its rows."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import cached_property
from typing import Any
from urllib.parse import unquote

import orjson
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import xxhash

from openclaw_store.archive.folder import Entry, Folder
from openclaw_store.archive.layout import LAYOUTS, REPLACES
from openclaw_store.errors import UnavailableError

# The salts of a split block Bloom filter, from the specification of Parquet.
_SALTS = (
    0x47B6137B, 0x44974D91, 0x8824AD5B, 0xA2B7289D, 0x705495C7, 0x2DF1424B, 0x9EFC4947, 0x5C6BFB31,
)  # fmt: skip

_BLOCK_BYTES = 32


class ArchiveFile:
    """A complete file; its footer is read once, when it is needed."""

    def __init__(self, folder: Folder, entry: Entry) -> None:
        self._folder = folder
        self.path, self.size = entry.path, entry.size
        parts = self.path.split("/")
        self.layout = LAYOUTS[parts[0]]
        self.cluster = unquote(parts[1].removeprefix("cluster="))
        self.run = parts[-1].removesuffix(".parquet")
        self._bounds: dict[str, Sequence[tuple[Any, Any]]] = {}

    @cached_property
    def footer(self) -> Any:
        with self._opened() as file:
            return pq.read_metadata(file)

    @property
    def rows(self) -> int:
        return int(self.footer.num_rows)

    @property
    def groups(self) -> range:
        return range(self.footer.num_row_groups)

    @cached_property
    def replaced(self) -> frozenset[str]:
        """Paths of the files that this one replaces."""
        return frozenset(orjson.loads((self.footer.metadata or {}).get(REPLACES, b"[]")))

    def bounds(self, name: str) -> Sequence[tuple[Any, Any]]:
        """Return the smallest and largest value of a column in each row group.

        They are `None` if the group has no value, and times are microseconds.
        """
        if name not in self._bounds:
            index = self.footer.schema.to_arrow_schema().get_field_index(name)
            is_time = name.endswith("_at")
            found = []
            for group in self.groups:
                known = self.footer.row_group(group).column(index).statistics
                if known is None or not known.has_min_max:
                    found.append((None, None))
                elif is_time:
                    found.append((known.min_raw, known.max_raw))
                else:
                    found.append((known.min, known.max))
            self._bounds[name] = found
        return self._bounds[name]

    def read(self, groups: Sequence[int] | None = None, columns: Any = None) -> Any:
        """Return the rows of some row groups, or of all, as a table of Arrow."""
        with self._opened() as source:
            file = pq.ParquetFile(source, metadata=self.footer)
            known = set(file.schema_arrow.names)
            names = [one for one in columns or self.layout.names if one in known]
            if not self.groups:  # of an empty file
                return file.schema_arrow.empty_table().select(names)
            return file.read_row_groups(self.groups if groups is None else groups, columns=names)

    def find(self, key: str) -> Iterator[Any]:
        """Yield tables with the rows that have this key."""
        for group, (least, most) in enumerate(self.bounds(self.layout.key)):
            if (least is None or least <= key <= most) and self._may_have(group, key):
                keys = self.read([group], [self.layout.key]).column(0)
                found = pc.indices_nonzero(pc.equal(keys, key))
                if len(found):
                    yield self.read([group]).take(found)

    @cached_property
    def _filters(self) -> Sequence[bytes | None]:
        """The Bloom filter of each row group, without its header; `None` if it has none."""
        index = self.footer.schema.to_arrow_schema().get_field_index(self.layout.key)
        filters: list[bytes | None] = []
        with self._opened() as file:
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

    def _opened(self) -> Any:
        try:
            return self._folder.open(self.path)
        except FileNotFoundError:
            raise
        except (OSError, pa.ArrowException) as error:
            raise UnavailableError(f"{self._folder.location}/{self.path}: {error}") from error
