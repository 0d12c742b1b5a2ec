"""The choice of a claim: the first tasks that a node may run, or the tasks that prefer it.

`domain.preferences` has the rule. A search for preferences costs more, so an index tells first
whether any pending task has some.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING

from openclaw_store.domain import (
    WINDOW,
    NodeInfo,
    Record,
    Step,
    Task,
    by_preference,
    conditions,
    lifecycle,
    passed_over,
)
from openclaw_store.repositories.ready_tasks import ready_tasks

if TYPE_CHECKING:
    from openclaw_store.repositories.unit_of_work import Row, UnitOfWork

    Claimable = tuple[Row, Record[Task], Step]
    """The row of a task, its content, and the effect of a claim."""


class ClaimChoice:
    """Choose the tasks of the claims in one run of commands."""

    def __init__(self, unit: UnitOfWork, size: int) -> None:
        """Prepare a run of `size` commands."""
        self._unit = unit
        self._size = size
        # By skills: the search of a claim goes on where the claim before it has stopped.
        self._ready: dict[bytes | None, Iterator[Record[Task]]] = {}
        self._has_preferring: bool | None = None  # `None`: not read yet

    def choose(self, node: Record[NodeInfo], limit: int) -> Iterable[Claimable]:
        """Return at most `limit` tasks to claim for the free slots of a node, best first."""
        wanted = min(limit, conditions.free_slots(node))
        if not wanted:
            return ()
        if self._has_preferring is None:
            found = self._unit.cursor.execute(self._unit.sql.claims.prefers, ())
            self._has_preferring = bool(found)
        skills = node.encoded("available_skills")
        if self._has_preferring:
            return self._preferred(node, skills, wanted)
        if skills not in self._ready:
            self._ready[skills] = self._search(skills, max(wanted, self._size))
        return self._first(node, self._ready[skills], wanted).values()

    def _preferred(
        self, node: Record[NodeInfo], skills: bytes | None, wanted: int
    ) -> Iterable[Claimable]:
        unit, reach = self._unit, max(WINDOW, wanted)
        # A search of its own: the tasks that it passes over remain for the next claim.
        window = self._first(node, self._search(skills, reach), reach)
        claims, tasks = unit.sql.claims, [task for _, task, _ in window.values()]
        found = unit.cursor.execute(claims.passed_over, (unit.sql.given(list(window)),))
        since = {id: unit.sql.from_moment(at) for id, at in found}
        taken = [one.task_id for one in by_preference(tasks, node, since, unit.now)[:wanted]]
        passed = [id for id in passed_over(tasks, taken) if id not in since]
        if passed:
            unit.cursor.execute(claims.pass_over, (unit.at, unit.sql.given(passed)))
        return map(window.__getitem__, taken)

    def _search(self, skills: bytes | None, count: int) -> Iterator[Record[Task]]:
        return ready_tasks(self._unit.sql, self._unit.cursor.execute, self._unit.at, skills, count)

    def _first(
        self, node: Record[NodeInfo], tasks: Iterator[Record[Task]], count: int
    ) -> dict[str, Claimable]:
        """Return the first tasks that the node may claim, after the commands of this run."""
        found: dict[str, Claimable] = {}
        for task in tasks:
            row = self._unit.row_of(task)
            present = row.content()
            step = None if present is None else lifecycle.claim(present, node, self._unit.now)
            if present is not None and step is not None:
                found[row.id] = row, present, step  # it may come twice
                if len(found) == count:
                    break
        return found
