"""Containers for the cache: a dict that can be photographed, keys that stay sorted, a queue."""

from __future__ import annotations

from bisect import bisect_left, bisect_right, insort
from collections.abc import Iterable, Iterator, Mapping, Sequence
from datetime import datetime
from functools import lru_cache
from itertools import takewhile
from threading import get_ident
from typing import Any, Generic, TypeVar

import orjson

from openclaw_store.domain.lifecycle import are_among
from openclaw_store.domain.records import Decode, Item, Raw, Record

Key = TypeVar("Key", bound=tuple[Any, ...])

PendingKey = tuple[int, datetime, str]
"""Priority, time of submission and identifier of a task: the order in which tasks are run."""

Ready = tuple[PendingKey, bytes | None, datetime | None]
"""A task that may be claimed: its key, the JSON of the skills it requires, and `not_before`."""

_MOST_SETS = 1000
"""Of skills, kept though no node has them any more, or no task requires them."""

_BUCKETS = 1024  # a power of two
_MASK = _BUCKETS - 1


class Records(Generic[Item]):
    """Records by identifier, of which `photograph` keeps the present state in constant time.

    Beside one dict with all of them there are buckets (small dicts) that have them again. A
    photograph shares the buckets with the original, which copies a bucket the first time it writes
    to it afterwards: copy-on-write, as file systems do it.

    Rows stay tuples until somebody asks for them. Most are never asked for, and the garbage
    collector leaves tuples of text and numbers alone.

    Args:
        decode: Makes a record of a row that is asked for.
    """

    __slots__ = ("_buckets", "_decode", "_is_shared", "_shared", "entries")

    def __init__(self, decode: Decode) -> None:
        self.entries: dict[str, Record[Item] | Raw] = {}
        """To be read only; a row that nobody has asked for is still a tuple."""
        self._buckets: list[dict[str, Record[Item] | Raw]] = [{} for _ in range(_BUCKETS)]
        self._decode = decode
        self._is_shared = bytearray(_BUCKETS)
        """For each bucket, whether the last photograph has it too."""
        self._shared = 0
        """Of how many that is so; mostly of none."""

    def __len__(self) -> int:
        return len(self.entries)

    def __iter__(self) -> Iterator[str]:
        return iter(self.entries)

    def get(self, id: str) -> Record[Item] | None:
        found = self.entries.get(id)
        if isinstance(found, tuple):
            found = self._decode(found)
            self.entries[id] = self._buckets[hash(id) & _MASK][id] = found
        return found

    def values(self) -> Iterator[Record[Item]]:
        return (record for id in self if (record := self.get(id)) is not None)

    def load(self, rows: Iterable[Raw]) -> None:
        """Put rows in by their first value."""
        for row in rows:
            self.put(row[0], row)

    def put(self, id: str, record: Record[Item] | Raw) -> None:
        if self._shared:
            self._own_bucket_of(id)
        self.entries[id] = self._buckets[hash(id) & _MASK][id] = record

    def drop(self, id: str) -> None:
        """Remove an entry, which must be there."""
        self._own_bucket_of(id)
        del self.entries[id], self._buckets[hash(id) & _MASK][id]

    def photograph(self) -> RecordMapping[Item]:
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


class RecordMapping(Mapping[str, Item]):
    """A read-only mapping of records, of which callers get copies.

    It equals the dict of the copies. Pickling and deep copying (so `dataclasses.asdict` too) turn
    it into that dict.
    """

    __slots__ = ("_buckets", "_decode", "_entries", "_size", "_thread")

    def __init__(
        self,
        buckets: list[dict[str, Record[Item] | Raw]],
        entries: dict[str, Record[Item] | Raw],
        decode: Decode,
    ) -> None:
        self._buckets: list[dict[str, Record[Item] | Raw]] = buckets
        # Of the original, as they go on; for what is decoded here, on the thread that changes them.
        self._entries: dict[str, Record[Item] | Raw] = entries
        self._thread = get_ident()
        self._size = len(entries)
        self._decode = decode

    def __repr__(self) -> str:
        return f"<{self._size} entries by identifier>"

    def __getitem__(self, id: str) -> Item:
        bucket = self._buckets[hash(id) & _MASK]
        found = bucket[id]
        if isinstance(found, tuple):
            record = bucket[id] = self._decode(found)
            if self._thread == get_ident() and self._entries.get(id) is found:
                self._entries[id] = record  # else it would be held twice
            found = record
        item: Item = found.copy()
        return item

    def __contains__(self, id: object) -> bool:
        return id in self._buckets[hash(id) & _MASK]

    def __iter__(self) -> Iterator[str]:
        return (id for bucket in self._buckets for id in bucket)

    def __len__(self) -> int:
        return self._size

    def __deepcopy__(self, memo: dict[int, Any]) -> dict[str, Item]:
        return dict(self)

    def __reduce__(self) -> tuple[Any, ...]:
        return dict, (dict(self),)


class SortedKeys(Generic[Key]):
    """Unique keys in ascending order.

    A list of sorted lists of bounded length: adding and removing moves at most 1,024 keys, and one
    entry for each list, at C speed (the idea of Grant Jenks's sortedcontainers, here without its
    indexing, and with a shorter way for the key that is the last, which most new ones are).
    """

    __slots__ = ("_chunks", "_lasts")

    _LONGEST = 1024

    def __init__(self) -> None:
        self._chunks: list[list[Key]] = []
        self._lasts: list[Key] = []

    def __bool__(self) -> bool:
        return bool(self._chunks)

    def __iter__(self) -> Iterator[Key]:
        return (key for chunk in self._chunks for key in chunk)

    def downwards(self) -> Iterator[Key]:
        """All keys, the largest first."""
        return (key for chunk in reversed(self._chunks) for key in reversed(chunk))

    def smallest(self) -> Key:
        """The smallest key; there must be one."""
        return self._chunks[0][0]

    def first(self, limit: int | None) -> list[Key]:
        """The `limit` smallest keys; `None` for all."""
        found: list[Key] = []
        for chunk in self._chunks:
            found += chunk
            if limit is not None and len(found) >= limit:
                return found[:limit]
        return found

    def count_before(self, key: Key) -> int:
        """How many keys are smaller."""
        place = bisect_left(self._lasts, key)
        before = sum(map(len, self._chunks[:place]))
        return before + bisect_left(self._chunks[place], key) if self._chunks[place:] else before

    def add(self, key: Key) -> None:
        """Add a key that is not there."""
        if not self._lasts or key > self._lasts[-1]:  # by far the most frequent case
            self._append([key])
            return
        place = bisect_left(self._lasts, key)
        insort(self._chunks[place], key)
        self._divide(place)

    def extend(self, keys: Sequence[Key]) -> None:
        """Add keys that are not there, in ascending order."""
        start = 0
        while start < len(keys):
            place = bisect_left(self._lasts, keys[start])
            if place == len(self._lasts):
                self._append(keys[start:])
                return
            end = bisect_right(keys, self._lasts[place], start)  # a key too many must not hang it
            chunk, at = self._chunks[place], 0
            for key in keys[start:end]:
                at = bisect_left(chunk, key, at)
                chunk.insert(at, key)
            self._divide(place)
            start = end

    def _append(self, keys: Sequence[Key]) -> None:
        """Add keys that follow all others."""
        if not self._chunks:
            self._chunks.append([])
            self._lasts.append(keys[-1])
        self._chunks[-1] += keys
        self._lasts[-1] = keys[-1]
        self._divide(len(self._chunks) - 1)

    def _divide(self, place: int) -> None:
        """Make several of a list that has become too long."""
        chunk = self._chunks[place]
        if len(chunk) > self._LONGEST:
            parts = -(-len(chunk) // self._LONGEST)
            length = -(-len(chunk) // parts)
            chunks = [chunk[start : start + length] for start in range(0, len(chunk), length)]
            self._chunks[place : place + 1] = chunks
            self._lasts[place : place + 1] = [one[-1] for one in chunks]

    def remove(self, key: Key) -> None:
        """Remove a key that is there."""
        place = bisect_left(self._lasts, key)
        chunk = self._chunks[place]
        del chunk[bisect_left(chunk, key)]
        if not chunk:
            del self._chunks[place], self._lasts[place]
        else:
            self._lasts[place] = chunk[-1]


class ReadyTasks:
    """Pending tasks by what it takes to run them, best first: what a node may claim is found fast.

    Tasks that require the same skills are one group; a node has the groups whose skills it has. So
    neither how many tasks there are nor how many of them a node cannot run costs anything. Tasks
    that are not due yet stand aside, and join their group when they are.

    Skills are the JSON of a list: that is what rows have, and two orders of a set do no harm.
    """

    __slots__ = ("_delayed", "_delays", "_due", "_groups", "_matches", "_most_groups", "_taken")

    def __init__(self) -> None:
        self._groups: dict[bytes | None, SortedKeys[PendingKey]] = {}  # by required skills
        self._most_groups = _MOST_SETS
        self._matches: dict[bytes | None, list[bytes | None]] = {}  # groups, by a node's skills
        self._delayed: SortedKeys[tuple[datetime, PendingKey, bytes | None]] = SortedKeys()
        self._delays: dict[str, tuple[datetime, PendingKey, bytes | None]] = {}
        self._due: dict[str, datetime] = {}  # since when, of those that stood aside
        self._taken: dict[str, tuple[PendingKey, bytes | None]] = {}

    def add(self, key: PendingKey, skills: bytes | None, not_before: datetime | None) -> None:
        """Add a task that is not there, with the skills that it requires."""
        if not_before is not None:
            delay = self._delays[key[2]] = (not_before, key, skills)
            self._delayed.add(delay)
            return
        self._group(skills).add(key)

    def extend(self, tasks: Iterable[Ready]) -> None:
        """Add tasks that are not there, in ascending order of their keys."""
        groups: dict[bytes | None, list[PendingKey]] = {}
        for key, skills, not_before in tasks:
            if not_before is None:
                groups.setdefault(_respelled(skills), []).append(key)
            else:
                self.add(key, skills, not_before)
        for skills, keys in groups.items():
            self._group(skills).extend(keys)

    def remove(self, key: PendingKey, skills: bytes | None) -> None:
        """Remove a task that is there."""
        self._due.pop(key[2], None)
        if self._taken.pop(key[2], None) is not None:
            return
        delay = self._delays.pop(key[2], None)
        if delay is not None:
            self._delayed.remove(delay)
            return
        self._groups[_respelled(skills)].remove(key)

    def take(self, count: int, skills: bytes | None, now: datetime) -> list[str]:
        """Set aside the best tasks that a node with these skills may claim; returns which."""
        self._release(now)
        matching = [(one, self._groups[one]) for one in self._matching(skills)]
        taken: list[str] = []
        while len(taken) < count:
            firsts = [(group.smallest(), one) for one, group in matching if group]
            if not firsts:
                break
            key, required = min(firsts)  # no two keys are the same
            self._groups[required].remove(key)
            self._taken[key[2]] = key, required
            taken.append(key[2])
        return taken

    def put_back(self, task_ids: Iterable[str]) -> None:
        """End what `take` began, of those that have not changed meanwhile."""
        for id in task_ids:
            if id in self._taken:
                key, skills = self._taken.pop(id)
                self._group(skills).add(key)

    def due_after(self, moment: datetime) -> list[str]:
        """The tasks that are not due before that, be it since a clock was turned back."""
        delayed = takewhile(lambda one: one[0] > moment, self._delayed.downwards())
        return [
            *(key[2] for _, key, _ in delayed),
            *(id for id, not_before in self._due.items() if not_before > moment),
        ]

    def ahead_of(self, key: PendingKey, nodes: Iterable[bytes | None], now: datetime) -> int:
        """How many tasks are better than one, and can be run by one of these nodes, by skills."""
        self._release(now)
        groups = {one for skills in nodes for one in self._matching(skills)}
        return sum(self._groups[one].count_before(key) for one in groups)

    def _group(self, skills: bytes | None) -> SortedKeys[PendingKey]:
        skills = _respelled(skills)
        group = self._groups.get(skills)
        if group is None:
            if len(self._groups) >= self._most_groups:
                self._groups = {one: group for one, group in self._groups.items() if group}
                self._most_groups = max(_MOST_SETS, 2 * len(self._groups))
                self._matches.clear()
            group = self._groups[skills] = SortedKeys()
            for has, matches in self._matches.items():
                if are_among(skills, has):
                    matches.append(skills)
        return group

    def _matching(self, skills: bytes | None) -> list[bytes | None]:
        matches = self._matches.get(skills)
        if matches is None:
            if len(self._matches) >= _MOST_SETS:
                self._matches.clear()
            matches = self._matches[skills] = [
                one for one in self._groups if are_among(one, skills)
            ]
        return matches

    def _release(self, now: datetime) -> None:
        """Put those into their groups that are due by now."""
        while self._delayed and self._delayed.smallest()[0] <= now:
            not_before, key, skills = self._delayed.smallest()
            self.remove(key, skills)
            self.add(key, skills, None)
            self._due[key[2]] = not_before


@lru_cache(maxsize=4096)
def _respelled(skills: bytes | None) -> bytes | None:
    """JSON as the store spells it: so a record does, too, once somebody has looked at it."""
    try:
        value = None if skills is None else orjson.loads(skills)
    except orjson.JSONDecodeError:  # somebody wrote it by hand
        return skills
    return None if value is None or value == [] else orjson.dumps(value)
