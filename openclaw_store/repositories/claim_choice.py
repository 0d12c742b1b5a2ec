"""The choice of a claim: the first tasks that a node may run, or those that prefer it.

`domain.preferences` has the rule. A search for preferences costs more, so an index tells first
whether any pending task has some.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import islice
from typing import TYPE_CHECKING

from openclaw_store.domain import (
    WINDOW,
    NodeInfo,
    Record,
    Step,
    Task,
    by_preference,
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
        self._ready: dict[bytes | None, Iterator[Record[Task]]] = {}  # by skills
        self._has_preferring: bool | None = None  # `None`: not read yet

    def choose(self, node: Record[NodeInfo], wanted: int) -> Iterator[Claimable]:
        """Yield up to so many tasks for a node, best first; the caller claims each at once."""
        if wanted and self._has_preferring is None:
            found = self._unit.cursor.execute(self._unit.sql.claims.prefers, ())
            self._has_preferring = bool(found)
        if wanted and self._has_preferring:
            return self._preferred(node, wanted)
        skills = node.encoded("available_skills")
        if skills not in self._ready:
            self._ready[skills] = self._search(skills, max(wanted, self._size))
        return islice(self._claimable(node, self._ready[skills]), wanted)

    def _preferred(self, node: Record[NodeInfo], wanted: int) -> Iterator[Claimable]:
        unit = self._unit
        reach = max(WINDOW, wanted)
        # A search of its own: the tasks that it passes over remain for the next claim.
        search = self._search(node.encoded("available_skills"), reach)
        window: dict[str, Claimable] = {}
        for one in self._claimable(node, search):
            window.setdefault(one[0].id, one)  # it may come twice
            if len(window) == reach:
                break
        claims, tasks = unit.sql.claims, [task for _, task, _ in window.values()]
        found = unit.cursor.execute(claims.passed_over, (unit.sql.given(list(window)),))
        since = {id: unit.sql.from_moment(at) for id, at in found}
        taken = [one.task_id for one in by_preference(tasks, node, since, unit.now)[:wanted]]
        passed = [id for id in passed_over(tasks, taken) if id not in since]
        if passed:
            values = unit.sql.to_moment(unit.now), unit.sql.given(passed)
            unit.cursor.execute(claims.pass_over, values)
        return map(window.__getitem__, taken)

    def _search(self, skills: bytes | None, count: int) -> Iterator[Record[Task]]:
        return ready_tasks(self._unit.sql, self._unit.cursor.execute, self._unit.now, skills, count)

    def _claimable(
        self, node: Record[NodeInfo], tasks: Iterator[Record[Task]]
    ) -> Iterator[Claimable]:
        """Yield those of the tasks that the node may claim, after the commands of this run."""
        for task in tasks:
            row = self._unit.rows[Task].get(task.task_id)
            if row is None:
                row = self._unit.row(Task, task.task_id).load(task)
            present = row.content()
            step = None if present is None else lifecycle.claim(present, node, self._unit.now)
            if present is not None and step is not None:
                yield row, present, step
