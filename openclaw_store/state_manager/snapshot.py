"""Records by identifier, with snapshots that take constant time."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from threading import get_ident
from typing import Any, Generic

from openclaw_store.domain import Decode, Entity, Raw, Record

_BUCKETS = 1024  # a power of two


_MASK = _BUCKETS - 1


class Records(Generic[Entity]):
    """Records by identifier, of which `snapshot` keeps the present state in constant time.

    Beside one dict with all of them there are buckets (small dicts) that have them again. A
    snapshot shares the buckets with the original, which copies a bucket the first time it writes
    to it afterwards: copy-on-write, as file systems do it.

    Rows stay tuples until somebody asks for them. Most are never asked for, and the garbage
    collector leaves tuples of text and numbers alone.

    Args:
        decode: Makes a record of a row that is asked for.
    """

    __slots__ = ("_buckets", "_decode", "_is_shared", "_shared", "entries")

    def __init__(self, decode: Decode) -> None:
        self.entries: dict[str, Record[Entity] | Raw] = {}
        """To be read only; a row that nobody has asked for is still a tuple."""
        self._buckets: list[dict[str, Record[Entity] | Raw]] = [{} for _ in range(_BUCKETS)]
        self._decode = decode
        self._is_shared = bytearray(_BUCKETS)
        """For each bucket, whether the last snapshot has it too."""
        self._shared = 0
        """Of how many that is so; mostly of none."""

    def __len__(self) -> int:
        return len(self.entries)

    def __iter__(self) -> Iterator[str]:
        return iter(self.entries)

    def get(self, id: str) -> Record[Entity] | None:
        found = self.entries.get(id)
        if isinstance(found, tuple):
            found = self._decode(found)
            self.entries[id] = self._buckets[hash(id) & _MASK][id] = found
        return found

    def values(self) -> Iterator[Record[Entity]]:
        return (record for id in self if (record := self.get(id)) is not None)

    def load(self, rows: Iterable[Raw]) -> None:
        """Put rows in by their first value."""
        for row in rows:
            self.put(row[0], row)

    def put(self, id: str, record: Record[Entity] | Raw) -> None:
        if self._shared:
            self._own_bucket_of(id)
        self.entries[id] = self._buckets[hash(id) & _MASK][id] = record

    def drop(self, id: str) -> None:
        """Remove an entry, which must be there."""
        self._own_bucket_of(id)
        del self.entries[id], self._buckets[hash(id) & _MASK][id]

    def snapshot(self) -> RecordMapping[Entity]:
        """The entries as they are now, for good."""
        self._is_shared = bytearray(b"\1") * _BUCKETS
        self._shared = _BUCKETS
        return RecordMapping(self._buckets.copy(), self.entries, self._decode)

    def _own_bucket_of(self, id: str) -> None:
        index = hash(id) & _MASK
        if self._is_shared[index]:
            self._buckets[index] = self._buckets[index].copy()
            self._is_shared[index] = False
            self._shared -= 1


class RecordMapping(Mapping[str, Entity]):
    """A read-only mapping of records, of which callers get copies.

    It equals the dict of the copies. Pickling and deep copying (so `dataclasses.asdict` too) turn
    it into that dict.
    """

    __slots__ = ("_buckets", "_decode", "_entries", "_size", "_thread")

    def __init__(
        self,
        buckets: list[dict[str, Record[Entity] | Raw]],
        entries: dict[str, Record[Entity] | Raw],
        decode: Decode,
    ) -> None:
        self._buckets: list[dict[str, Record[Entity] | Raw]] = buckets
        # Of the original, as they go on; for what is decoded here, on the thread that changes them.
        self._entries: dict[str, Record[Entity] | Raw] = entries
        self._thread = get_ident()
        self._size = len(entries)
        self._decode = decode

    def __repr__(self) -> str:
        return f"<{self._size} entries by identifier>"

    def __getitem__(self, id: str) -> Entity:
        bucket = self._buckets[hash(id) & _MASK]
        found = bucket[id]
        if isinstance(found, tuple):
            record = bucket[id] = self._decode(found)
            if self._thread == get_ident() and self._entries.get(id) is found:
                self._entries[id] = record  # else it would be held twice
            found = record
        item: Entity = found.copy()
        return item

    def __contains__(self, id: object) -> bool:
        return id in self._buckets[hash(id) & _MASK]

    def __iter__(self) -> Iterator[str]:
        return (id for bucket in self._buckets for id in bucket)

    def __len__(self) -> int:
        return self._size

    def __deepcopy__(self, memo: dict[int, Any]) -> dict[str, Entity]:
        return dict(self)

    def __reduce__(self) -> tuple[Any, ...]:
        return dict, (dict(self),)
