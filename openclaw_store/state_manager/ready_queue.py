"""The queue of pending tasks, grouped by the skills they require."""

from __future__ import annotations

from bisect import bisect_left, bisect_right, insort
from collections.abc import Iterable, Iterator, Sequence
from datetime import datetime
from functools import lru_cache
from itertools import takewhile
from typing import Any, Generic, TypeVar

import orjson

from openclaw_store.domain import are_among

PendingKey = tuple[int, datetime, str]
"""Priority, time of submission and identifier of a task: the order of claims."""

Ready = tuple[PendingKey, bytes | None, datetime | None]
"""A pending task: its key, the JSON of its required skills, and `not_before`."""


_MAX_SKILL_SETS = 1000
"""Maximum number of unused skill sets in the index."""


class ReadyTasks:
    """Pending tasks, best first, for nodes with given skills.

    Tasks that require the same skills are one group, and a node may claim from each group whose
    skills it has. So the cost of a claim depends neither on the number of tasks nor on the number
    that the node cannot run. Delayed tasks join their group when they are due.

    Skills are the JSON text of a list, as rows have it; a set in two orders is two groups.
    """

    __slots__ = ("_delayed", "_delays", "_due", "_groups", "_matches", "_max_groups")

    def __init__(self) -> None:
        self._groups: dict[bytes | None, SortedKeys[PendingKey]] = {}  # by required skills
        self._max_groups = _MAX_SKILL_SETS
        self._matches: dict[bytes | None, list[bytes | None]] = {}  # groups, by skills of nodes
        self._delayed: SortedKeys[tuple[datetime, PendingKey, bytes | None]] = SortedKeys()
        self._delays: dict[str, tuple[datetime, PendingKey, bytes | None]] = {}
        self._due: dict[str, datetime] = {}  # `not_before` of tasks that were delayed

    def add(self, key: PendingKey, skills: bytes | None, not_before: datetime | None) -> None:
        """Add a task, which must not be there."""
        if not_before is not None:
            delay = self._delays[key[2]] = (not_before, key, skills)
            self._delayed.add(delay)
            return
        self._group(skills).add(key)

    def extend(self, tasks: Iterable[Ready]) -> None:
        """Add tasks, which must not be there, in ascending order of their keys."""
        groups: dict[bytes | None, list[PendingKey]] = {}
        for key, skills, not_before in tasks:
            if not_before is None:
                groups.setdefault(_normalized(skills), []).append(key)
            else:
                self.add(key, skills, not_before)
        for skills, keys in groups.items():
            self._group(skills).extend(keys)

    def remove(self, key: PendingKey, skills: bytes | None) -> None:
        """Remove a task, which must be there."""
        self._due.pop(key[2], None)
        delay = self._delays.pop(key[2], None)
        if delay is not None:
            self._delayed.remove(delay)
            return
        self._groups[_normalized(skills)].remove(key)

    def due_after(self, moment: datetime) -> list[str]:
        """Return the tasks that are due later, or were before a clock was turned back."""
        delayed = takewhile(lambda delay: delay[0] > moment, self._delayed.descending())
        return [
            *(key[2] for _, key, _ in delayed),
            *(id for id, not_before in self._due.items() if not_before > moment),
        ]

    def ahead_of(self, key: PendingKey, nodes: Iterable[bytes | None], now: datetime) -> int:
        """Count the tasks before a key that nodes with one of these skill sets may claim."""
        self._release_due(now)
        groups = {group for skills in nodes for group in self._matching(skills)}
        return sum(self._groups[group].count_before(key) for group in groups)

    def _group(self, skills: bytes | None) -> SortedKeys[PendingKey]:
        skills = _normalized(skills)
        group = self._groups.get(skills)
        if group is None:
            if len(self._groups) >= self._max_groups:
                self._groups = {one: keys for one, keys in self._groups.items() if keys}
                self._max_groups = max(_MAX_SKILL_SETS, 2 * len(self._groups))
                self._matches.clear()
            group = self._groups[skills] = SortedKeys()
            for available, matches in self._matches.items():
                if are_among(skills, available):
                    matches.append(skills)
        return group

    def _matching(self, skills: bytes | None) -> list[bytes | None]:
        matches = self._matches.get(skills)
        if matches is None:
            if len(self._matches) >= _MAX_SKILL_SETS:
                self._matches.clear()
            matches = self._matches[skills] = [
                one for one in self._groups if are_among(one, skills)
            ]
        return matches

    def _release_due(self, now: datetime) -> None:
        """Move the tasks that are due into their groups."""
        while self._delayed and self._delayed.smallest()[0] <= now:
            not_before, key, skills = self._delayed.smallest()
            self.remove(key, skills)
            self.add(key, skills, None)
            self._due[key[2]] = not_before


@lru_cache(maxsize=4096)
def _normalized(skills: bytes | None) -> bytes | None:
    """Return JSON as the store writes it; a record that was decoded has it in this form."""
    try:
        value = None if skills is None else orjson.loads(skills)
    except orjson.JSONDecodeError:  # written by hand
        return skills
    return None if value is None or value == [] else orjson.dumps(value)


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

    def descending(self) -> Iterator[Key]:
        """Iterate over the keys in descending order."""
        return (key for chunk in reversed(self._chunks) for key in reversed(chunk))

    def smallest(self) -> Key:
        """Return the smallest key; there must be one."""
        return self._chunks[0][0]

    def first(self, limit: int | None) -> list[Key]:
        """Return the `limit` smallest keys; `None` for all."""
        found: list[Key] = []
        for chunk in self._chunks:
            found += chunk
            if limit is not None and len(found) >= limit:
                return found[:limit]
        return found

    def count_before(self, key: Key) -> int:
        """Count the smaller keys."""
        position = bisect_left(self._lasts, key)
        before = sum(map(len, self._chunks[:position]))
        return (
            before + bisect_left(self._chunks[position], key) if self._chunks[position:] else before
        )

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
