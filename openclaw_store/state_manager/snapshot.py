"""Records by identifier, with snapshots in constant time."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from threading import get_ident
from typing import Any, Generic

from openclaw_store.domain import Decode, Entity, Raw, Record

_BUCKETS = 1024  # a power of two
_MASK = _BUCKETS - 1


class Records(Generic[Entity]):
    """Records by identifier, with copy-on-write snapshots.

    The entries are in one dict, and again in buckets (small dicts). A snapshot shares the buckets;
    a shared bucket is copied before the first write to it.

    Rows are decoded when they are read. Most never are, and the garbage collector does not track
    tuples of text and numbers.
    """

    __slots__ = ("_buckets", "_decode", "_is_shared", "_shared", "entries")

    def __init__(self, decode: Decode) -> None:
        self.entries: dict[str, Record[Entity] | Raw] = {}
        """Not to be changed; a row that was never read is still a tuple."""
        # One empty bucket in all places, as if a snapshot shared it: making each takes 0.4 ms.
        self._buckets: list[dict[str, Record[Entity] | Raw]] = [{}] * _BUCKETS
        self._decode = decode
        self._is_shared = bytearray(b"\1") * _BUCKETS
        """For each bucket, 1 if the last snapshot shares it."""
        self._shared = _BUCKETS
        """The number of shared buckets; mostly zero."""

    def __len__(self) -> int:
        return len(self.entries)

    def __iter__(self) -> Iterator[str]:
        return iter(self.entries)

    def get(self, id: str) -> Record[Entity] | None:
        found = self.entries.get(id)
        return None if found is None else self.read(id, found)

    def peek(self, id: str) -> Record[Entity] | None:
        """Return the record for a single look: a row stays a row."""
        found = self.entries.get(id)
        return self._decode(found) if isinstance(found, tuple) else found

    def read(self, id: str, entry: Record[Entity] | Raw) -> Record[Entity]:
        """Return the record of an entry, which may have been replaced meanwhile."""
        if not isinstance(entry, tuple):
            return entry
        record: Record[Entity] = self._decode(entry)
        if self.entries.get(id) is entry:
            # In shared buckets, too: the content is the same, so snapshots may have the record.
            self.entries[id] = self._buckets[hash(id) & _MASK][id] = record
        return record

    def values(self) -> Iterator[Record[Entity]]:
        return (record for id in self if (record := self.get(id)) is not None)

    def put(self, id: str, record: Record[Entity] | Raw) -> None:
        # Before the write, or a snapshot would change.
        if self._shared:
            self._unshare_bucket(id)
        self.entries[id] = self._buckets[hash(id) & _MASK][id] = record

    def drop(self, id: str) -> None:
        """Remove an entry, which must be there."""
        self._unshare_bucket(id)
        del self.entries[id], self._buckets[hash(id) & _MASK][id]

    def snapshot(self) -> RecordMapping[Entity]:
        """Return a mapping that later changes do not affect."""
        self._is_shared = bytearray(b"\1") * _BUCKETS
        self._shared = _BUCKETS
        return RecordMapping(self._buckets.copy(), self.entries, self._decode)

    def _unshare_bucket(self, id: str) -> None:
        index = hash(id) & _MASK
        if self._is_shared[index]:
            self._buckets[index] = self._buckets[index].copy()
            self._is_shared[index] = False
            self._shared -= 1


class RecordMapping(Mapping[str, Entity]):
    """A read-only mapping that returns copies of records.

    It equals the dict of the copies. Pickling, `copy.deepcopy` and `dataclasses.asdict` turn it
    into that dict.
    """

    __slots__ = ("_buckets", "_decode", "_entries", "_size", "_thread")

    def __init__(
        self,
        buckets: list[dict[str, Record[Entity] | Raw]],
        entries: dict[str, Record[Entity] | Raw],
        decode: Decode,
    ) -> None:
        self._buckets: list[dict[str, Record[Entity] | Raw]] = buckets
        # The current entries of the original, which only its thread may change: a row decoded here
        # is decoded there as well.
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
                self._entries[id] = record  # otherwise both the row and the record stay in memory
            found = record
        entity: Entity = found.copy()
        return entity

    def record(self, id: str) -> Record[Entity]:
        """Return the record of an entry; one that has to be decoded is not kept."""
        found = self._buckets[hash(id) & _MASK][id]
        return self._decode(found) if isinstance(found, tuple) else found

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
