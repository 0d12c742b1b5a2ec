"""Pages of the list of tasks that match a filter: their cursors and their queries.

A list reads an index in its order until a page is full. If hardly any task matches, that would read
nearly all tasks, one after another, at twice the time of reading the table in its own order.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from sqlalchemy import Select, and_, or_, select
from sqlalchemy.ext.asyncio import AsyncSession

from openclaw_store.database import (
    COLUMNS,
    Statements,
    TaskRow,
    from_microseconds,
    statements_in,
    to_microseconds,
)
from openclaw_store.domain import (
    FINISHED,
    Record,
    Task,
    TaskFilter,
    TaskStatus,
    check_key,
    check_text,
)
from openclaw_store.errors import InvalidDataError
from openclaw_store.repositories.queries import (
    Condition,
    completion_conditions,
    indexed_conditions,
    other_conditions,
    selects_finished,
)

NEWEST_FIRST = TaskRow.submitted_at.desc(), TaskRow.task_id.desc()
"""The order of lists; the identifier decides between tasks submitted at the same time."""

_FIRST_TASKS = 20_000
"""Tasks of a status that a list reads in its order before it searches all tasks for matches."""

_SHORT_RANGE = 10_000
"""Largest number of tasks that are read by their time of completion, and sorted."""

_BY_COMPLETION = "ix_tasks_completed_at"


def cursor_of(task: Record[Task]) -> str:
    """Return the cursor that continues a list after a task."""
    return f"{to_microseconds(task.submitted_at)}.{task.task_id}"


def after_cursor(cursor: str) -> Condition:
    """Return the condition for the tasks after a cursor, in the order of a list.

    Raises:
        InvalidDataError: If the text is no cursor.
    """
    microseconds, id = position_of(cursor)
    at, row = from_microseconds(microseconds), TaskRow
    # The second condition implies the first, but only the first can use the index.
    return and_(row.submitted_at <= at, or_(row.submitted_at < at, row.task_id < id))


def position_of(cursor: str) -> tuple[int, str]:
    """Return the time of submission in microseconds, and the identifier, of a cursor's task.

    Raises:
        InvalidDataError: If the text is no cursor.
    """
    moment, dot, id = check_text("after", cursor).partition(".")
    try:
        at = to_microseconds(from_microseconds(int(moment)))
    except (ValueError, OverflowError):
        at = None
    if at is None or not dot:
        raise InvalidDataError("after", "must be the `after` of the page before, or None")
    return at, check_key("after", id)


@dataclass(frozen=True, slots=True)
class Page:
    """A page of the tasks that match a checked filter, newest submitted first."""

    filter: TaskFilter
    after: Condition | None
    """The condition of the tasks behind the page before."""
    size: int

    async def queries(self, session: AsyncSession) -> Sequence[Select[Any]]:
        """Return queries; their results, merged and cut to `size`, are the page."""
        filter, states = self.filter, self._states()
        has_states = () if filter.status is None else (TaskRow.status.in_(states),)
        sql = statements_in(session)
        matches = [*other_conditions(filter, sql)]
        if filter.node is not None or filter.user is not None:
            return [self._walk(sql, *has_states, *matches)]
        if await self._is_short(session):
            found = self._search(sql, *has_states, *matches, hint=f"INDEXED BY {_BY_COMPLETION}")
            return [await self._by_ids(session, found)]
        if matches and await self._is_rare(session, states, matches):
            found = self._search(sql, *has_states, *matches, hint="NOT INDEXED")
            return [await self._by_ids(session, found)]
        return [self._walk(sql, TaskRow.status == status, *matches) for status in states]

    def _states(self) -> Sequence[TaskStatus]:
        given = self.filter.status
        states = given if isinstance(given, tuple) else tuple(TaskStatus)
        only_finished = selects_finished(self.filter)
        return [status for status in states if status in FINISHED or not only_finished]

    def _walk(self, sql: Statements, *wanted: Condition) -> Select[Any]:
        """Return a query that reads tasks in the order of the list until the page is full."""
        return self._ordered(sql, select(*COLUMNS[Task]).where(*wanted)).limit(self.size)

    def _search(self, sql: Statements, *wanted: Condition, hint: str) -> Select[Any]:
        """Return a query of identifiers that reads all tasks, or all of an index, and sorts."""
        query = select(TaskRow.task_id).where(*wanted).with_hint(TaskRow, hint, "sqlite")
        return self._ordered(sql, query).limit(self.size)

    def _ordered(self, sql: Statements, query: Select[Any]) -> Select[Any]:
        """Return the query in the order of the list, with the conditions that an index answers."""
        return query.where(*self._position(sql)).order_by(*NEWEST_FIRST)

    def _position(self, sql: Statements) -> Iterator[Condition]:
        if self.after is not None:
            yield self.after
        yield from indexed_conditions(self.filter, sql)

    async def _by_ids(self, session: AsyncSession, found: Select[Any]) -> Select[Any]:
        sql = statements_in(session)
        ids = (await session.scalars(found)).all()
        return sql.by_ids(Task, COLUMNS[Task], sql.given(ids))

    async def _is_short(self, session: AsyncSession) -> bool:
        """Return true if few tasks were completed in the time of the filter."""
        completed = [*completion_conditions(self.filter)]
        if not completed:
            return False
        query = select(TaskRow.task_id).where(*completed).order_by(TaskRow.completed_at)
        query = query.with_hint(TaskRow, f"INDEXED BY {_BY_COMPLETION}", "sqlite")
        return await session.scalar(query.offset(_SHORT_RANGE).limit(1)) is None

    async def _is_rare(
        self, session: AsyncSession, states: Sequence[TaskStatus], matches: Sequence[Condition]
    ) -> bool:
        """Return true if no task matches among the first ones of a status that many tasks have."""
        at, sql = TaskRow.submitted_at, statements_in(session)
        for status in states:
            wanted = TaskRow.status == status, *self._position(sql)
            query = select(at).where(*wanted).order_by(at.desc()).offset(_FIRST_TASKS).limit(1)
            last = await session.scalar(query)  # in the index alone
            if last is not None:
                first = select(TaskRow.task_id).where(*wanted, at >= last, *matches).limit(1)
                if await session.scalar(first) is None:
                    return True
        return False
