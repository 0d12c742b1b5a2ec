"""The problems that `verify` finds, and the repairs of some."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from openclaw_store.errors import shown
from openclaw_store.maintenance.repair import Repair

INVARIANTS: Mapping[str, str] = {
    "file": "The database is undamaged, and so are its indexes and functions.",
    "schema": "Tables, columns, types, keys and indexes are those of the version, without more.",
    "counters": "The counters are those of the newest heartbeat and of the feed.",
    "values": "The store accepts each value: known enumerations, types, ranges.",
    "json": "JSON can be read, and has the right type.",
    "times": "A task has the time of its status; past events are in the past, and in order.",
    "limits": "Retries are within their limit, and the ends of a node's tasks within their total.",
    "running_tasks": "A node's `running_tasks` is the number of tasks assigned to it.",
    "idempotency_keys": "At most one live task has a given idempotency key.",
    "version": "The version of a task or node is its last change in the feed, which agrees.",
    "feed": "Revisions are consecutive, and each change follows the one before it.",
    "changes": "Each task or node that the feed has not removed exists.",
    "nodes": "The node of an assigned task exists (it need not: a remark, not a problem).",
}
"""The invariants by name."""

MOST = 10_000
"""Problems listed at most; further problems are only counted."""

Key = tuple[str, str]
"""`task` or `node`, and an identifier, as in the feed."""


@dataclass(frozen=True, slots=True)
class Problem:
    """One violation of an invariant."""

    invariant: str
    """One of `INVARIANTS`."""
    item: str | None
    """`task` or `node`, if it is about one."""
    item_id: str | None
    text: str
    """The problem as a sentence."""
    is_safe: bool = False
    """Whether `verify(repair=True)` can repair it without losing anything."""
    is_repaired: bool = False
    advice: str | None = None
    """The action to take, if `verify` cannot do it."""


@dataclass
class Verification:
    """The result of `verify`; true if no problem is left."""

    problems: list[Problem]
    checked: dict[str, int]
    """Number of rows checked, by invariant."""
    remarks: list[Problem] = field(default_factory=list)
    """Unusual, but legal observations."""
    omitted: int = 0
    """Problems not listed, because there are too many."""
    is_complete: bool = True
    """`False` if the rows were not checked, because the schema or the file forbids it."""

    def __bool__(self) -> bool:
        return not self.omitted and all(problem.is_repaired for problem in self.problems)


class Findings:
    """Collects the problems of one check, and their repairs."""

    def __init__(self) -> None:
        self.result = Verification([], dict.fromkeys(INVARIANTS, 0))
        self.repairs: dict[int, Repair] = {}
        """Repairs by the position of their problem."""

    def add(
        self,
        invariant: str,
        text: str,
        key: Key | None = None,
        repair: Repair | None = None,
        *,
        advice: str | None = None,
    ) -> None:
        """Add a problem; a repair makes it safe."""
        problems = self.result.problems
        if len(problems) == MOST:
            self.result.omitted += 1
            return
        if repair is not None:
            self.repairs[len(problems)] = repair
        item, id = key or (None, None)
        is_safe = repair is not None
        problems.append(Problem(invariant, item, id, shown(text), is_safe, advice=advice))

    def remark(self, invariant: str, text: str, key: Key) -> None:
        """Add an unusual, but legal observation."""
        if len(self.result.remarks) < MOST:
            self.result.remarks.append(Problem(invariant, *key, shown(text)))

    def count(self, number: int, *invariants: str) -> None:
        """Count rows that were checked."""
        for name in invariants:
            self.result.checked[name] += number


def label(key: Key) -> str:
    """Return the name of a task or node for a message."""
    return f"{key[0].capitalize()} {key[1]!r}"
