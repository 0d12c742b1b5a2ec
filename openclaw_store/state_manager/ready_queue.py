"""The queue of tasks that may be claimed, grouped by the skills they require."""

from __future__ import annotations

from collections.abc import Iterable
from datetime import datetime
from functools import lru_cache
from itertools import takewhile

import orjson

from openclaw_store.domain import are_among
from openclaw_store.state_manager.indexes import PendingKey, SortedKeys

Ready = tuple[PendingKey, bytes | None, datetime | None]
"""A task that may be claimed: its key, the JSON of the skills it requires, and `not_before`."""


_MOST_SETS = 1000
"""Of skills, kept though no node has them any more, or no task requires them."""


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
