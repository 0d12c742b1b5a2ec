"""The tasks that a node may claim, best first, found by indexes.

Tasks that require the same skills are a group, and an index has each group in the order of claims.
A search merges the groups whose skills a node has, and reads a group when its turn comes.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from heapq import heapify, heappop, heappush
from operator import itemgetter
from typing import Any

from openclaw_store.database import FIELDS, Statements
from openclaw_store.domain import Raw, Record, Task, conditions

Execute = Callable[[str, Sequence[Any]], Sequence[Any]]

_MAX_DUE_RETRIES = 1000
"""Most delayed tasks among which a claim chooses: of those that the node may claim, the ones that
were due first."""

_FEW = 32
"""Largest number of groups that are read without regard to the skills of the node."""

_FRONT = 100
"""First tasks of the queue that are looked at before many groups are."""

_ALL = 1 << 30

_FEWEST = 16
"""Fewest tasks of a group that are read first; then four times as many are."""

_place = itemgetter(*map(FIELDS[Task].index, ("priority", "submitted_at", "task_id")))
"""The position of a row in the order of claims."""

_required = itemgetter(FIELDS[Task].index("required_skills"))


def ready_tasks(
    sql: Statements, execute: Execute, at: Any, skills: bytes | None, count: int
) -> Iterator[Record[Task]]:
    """Yield the tasks that a node with these skills may claim; a task may come twice.

    Args:
        execute: Returns the rows of a query.
        at: The present time, as the driver takes it.
        skills: The skills of the node, as JSON.
        count: Number of tasks that are probably wanted.
    """
    available = conditions.skill_set(skills)
    if available is None:
        return
    queries = sql.claims

    def is_able(required: str | None) -> bool:
        return conditions.are_among(required, skills)

    has_few = len(available) <= _FEW
    heads = execute(queries.all_heads, (*queries.ranges(None), _FEW + 1))
    if len(heads) > _FEW:
        if not has_few:
            front = execute(queries.front, (_FRONT, at))
            yield from (sql.decode[Task](row) for row in front if is_able(_required(row)))
        statement = queries.heads if has_few else queries.all_heads
        heads = execute(statement, (*queries.ranges(available if has_few else None), _ALL))
    places = {key: tuple(place) for key, *place in heads}
    groups = [group for group in places if is_able(group)]
    # Many tasks come from several groups: to read them all from each would take most of the time.
    count = min(count, max(_FEWEST, 2 * count // max(1, len(groups))))
    # A group without rows yet is at the place of its first task.
    queue: list[tuple[Any, Raw | None, Iterator[Raw]]] = [
        (places[group], None, _rows_of(queries.group, execute, group, at, count))
        for group in groups
    ]
    # A due retry may come before any other task; there are few at a time.
    due = execute(queries.due_retries, (at, at, _MAX_DUE_RETRIES))
    if len(due) == _MAX_DUE_RETRIES and not all(is_able(_required(row)) for row in due):
        # Tasks that no node may claim would hide all the others for ever.
        found = execute(queries.due_skills, (at, at))
        lists = sql.given([one for (one,) in found if isinstance(one, str) and is_able(one)])
        due = execute(queries.due_with_skills, (at, at, lists, _MAX_DUE_RETRIES))
    queue += [(_place(row), row, iter(())) for row in due]
    heapify(queue)
    while queue:
        _, row, rest = heappop(queue)
        if row is not None:
            yield sql.decode[Task](row)
        following = next(rest, None)
        if following is not None:
            heappush(queue, (_place(following), following, rest))


def _rows_of(query: str, execute: Execute, group: Any, at: Any, count: int) -> Iterator[Raw]:
    """Yield the rows of a group in the order of claims."""
    done = 0
    while True:
        # From the beginning: no claim of this run is written yet, so the first rows are the same.
        rows = execute(query, (group, at, count))
        yield from rows[done:]
        if len(rows) < count:
            return
        done, count = count, 4 * count
