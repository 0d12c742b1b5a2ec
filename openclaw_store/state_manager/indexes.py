"""Keys in ascending order, which stay sorted while keys are added and removed."""

from __future__ import annotations

from bisect import bisect_left, bisect_right, insort
from collections.abc import Iterator, Sequence
from datetime import datetime
from typing import Any, Generic, TypeVar

Key = TypeVar("Key", bound=tuple[Any, ...])


PendingKey = tuple[int, datetime, str]
"""Priority, time of submission and identifier of a task: the order in which tasks are run."""


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
