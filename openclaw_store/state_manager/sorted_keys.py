"""Keys in ascending order, which are added and removed at any place."""

from __future__ import annotations

from bisect import bisect_left, bisect_right, insort
from collections.abc import Iterator, Sequence
from typing import Any, Generic, TypeVar

Key = TypeVar("Key", bound=tuple[Any, ...])


class SortedKeys(Generic[Key]):
    """Unique keys in ascending order.

    A list of sorted chunks of bounded length: to add or remove a key moves at most 1,024 keys, and
    one entry for each chunk (after Grant Jenks's sortedcontainers, without its indexing, and with
    a fast path for a new largest key, the most frequent case).
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

    def first(self, limit: int | None) -> list[Key]:
        """Return the `limit` smallest keys; `None` for all."""
        found: list[Key] = []
        for chunk in self._chunks:
            found += chunk
            if limit is not None and len(found) >= limit:
                return found[:limit]
        return found

    def add(self, key: Key) -> None:
        """Add a key, which must not be there."""
        if not self._lasts or key > self._lasts[-1]:  # by far the most frequent case
            self._append([key])
            return
        position = bisect_left(self._lasts, key)
        insort(self._chunks[position], key)
        self._divide(position)

    def extend(self, keys: Sequence[Key]) -> None:
        """Add keys, which must not be there, in ascending order."""
        start = 0
        while start < len(keys):
            position = bisect_left(self._lasts, keys[start])
            if position == len(self._lasts):
                self._append(keys[start:])
                return
            # `bisect_right`: an equal key, which is an error, must not cause an endless loop.
            end = bisect_right(keys, self._lasts[position], start)
            chunk, at = self._chunks[position], 0
            for key in keys[start:end]:
                at = bisect_left(chunk, key, at)
                chunk.insert(at, key)
            self._divide(position)
            start = end

    def _append(self, keys: Sequence[Key]) -> None:
        """Add keys after the last one."""
        if not self._chunks:
            self._chunks.append([])
            self._lasts.append(keys[-1])
        self._chunks[-1] += keys
        self._lasts[-1] = keys[-1]
        self._divide(len(self._chunks) - 1)

    def _divide(self, position: int) -> None:
        """Divide a chunk that has become too long."""
        chunk = self._chunks[position]
        if len(chunk) > self._LONGEST:
            parts = -(-len(chunk) // self._LONGEST)
            length = -(-len(chunk) // parts)
            chunks = [chunk[start : start + length] for start in range(0, len(chunk), length)]
            self._chunks[position : position + 1] = chunks
            self._lasts[position : position + 1] = [one[-1] for one in chunks]

    def remove(self, key: Key) -> None:
        """Remove a key, which must be there."""
        position = bisect_left(self._lasts, key)
        chunk = self._chunks[position]
        del chunk[bisect_left(chunk, key)]
        if not chunk:
            del self._chunks[position], self._lasts[position]
        else:
            self._lasts[position] = chunk[-1]
