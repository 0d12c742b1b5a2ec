"""Typed queries and writes: one class for each table.

A repository made with a `Database` runs each call in a transaction of its own. One made with the
session of a `Database.transaction()` joins it and commits nothing itself; with the session of a
`Database.session()` it reads.
"""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable, Iterable, Sequence
from datetime import datetime
from functools import partial
from typing import Any, ClassVar, Generic, TypeVar

from sqlalchemy import Float, Select, cast, func, select
from sqlalchemy.ext.asyncio import AsyncSession

from openclaw_store.database.database import Database
from openclaw_store.database.group_commit import Apply, Unit
from openclaw_store.database.schema import COLUMNS, KEY, ROWS, NodeRow, TaskRow
from openclaw_store.database.statements import statements_for
from openclaw_store.domain.lifecycle import JOINED, Backoff, check_backoff, claim, free_places
from openclaw_store.domain.models import ALIVE, NodeInfo, NodeStatus, Task, TaskStatus
from openclaw_store.domain.records import STAMPED, Item, Record, encode, write_back
from openclaw_store.domain.validation import (
    MAX_INTEGER,
    check_enum,
    check_key,
    check_limit,
    check_seconds,
    check_some,
    check_text,
)
from openclaw_store.errors import InvalidDataError, NotOwnerError, TaskNotFoundError
from openclaw_store.repositories.commands import (
    CONTENT,
    Advance,
    Advanced,
    Claim,
    Create,
    Register,
    Remove,
    SetNodeStatus,
    Update,
    cancellation_of,
    completion_of,
    failure_of,
    requeue_of,
    start_of,
)
from openclaw_store.repositories.heartbeats import Beat
from openclaw_store.repositories.queries import (
    TaskFilter,
    TaskPage,
    behind,
    check_filter,
    cursor_of,
)
from openclaw_store.repositories.retention import (
    count_old_tasks,
    cutoff_and_kept,
    remove_old_tasks,
    task_status,
)
from openclaw_store.repositories.row_reader import (
    decoder_here,
    read_records,
    read_rows,
    select_pending,
)
from openclaw_store.repositories.unit_of_work import Event, apply, place_of

logger = logging.getLogger("openclaw_store.repositories")

Result = TypeVar("Result")

DEFAULT_BACKOFF = Backoff()

UNDONE = -MAX_INTEGER
"""The version of a copy of what was rolled back; nothing ever has it."""

_SPARE_CANDIDATES = 16
"""Of a claim, in case that others are quicker."""

_DECODED = 100  # so many, if they are decoded and copied at the same stretch

node_status = check_enum(NodeStatus)


def admit(
    kind: type[Item], item: Item, clock: Callable[[], datetime], known: Record[Item] | None = None
) -> Record[Item]:
    """Check a caller's object on its way in; one without a time of its own is stamped now.

    Args:
        known: What is stored of it, which spares checks.

    Raises:
        InvalidDataError: If it is not of this kind, or naming the field that cannot be stored.
    """
    if not isinstance(item, kind):
        name = KEY[kind].removesuffix("_id")
        raise InvalidDataError(name, f"must be a {kind.__name__}, not {type(item).__name__}")
    record = encode(item, known)
    born = "submitted_at" if kind is Task else "registered_at"
    return record if record[born] else record.evolve(**{born: clock()})


class Repository(Generic[Item]):
    """What both repositories do alike."""

    kind: ClassVar[type[Any]]

    def __init__(self, database: Database | AsyncSession) -> None:
        self._session = database if isinstance(database, AsyncSession) else None
        origin = database.info.get("database") if isinstance(database, AsyncSession) else database
        if not isinstance(origin, Database):
            raise InvalidDataError("database", "must be a Database, or a session of one")
        self._database = origin

    def __repr__(self) -> str:
        return f"<{type(self).__name__} of {self._database!r}>"

    async def get(self, id: str) -> Item | None:
        """The task or node with this identifier; `None` if there is none."""
        record = await self.get_record(id)
        return None if record is None else self._hand_out([record])[0]

    async def get_record(self, id: str) -> Record[Item] | None:
        """The record with this identifier; `None` if there is none."""
        key = KEY[self.kind]
        query = self._select(ROWS[self.kind].__table__.c[key] == check_key(key, id))

        async def run(session: AsyncSession) -> Record[Item] | None:
            found = await read_records(session, self.kind, query)
            return found[0] if found else None

        return await self._read(run)

    async def _create(self, item: Item) -> bool:
        record = admit(self.kind, item, self._database.clock)
        operation = Create(self.kind, record[KEY[self.kind]], record)
        self._write_back(await self._write(operation), item)
        return True

    async def _update(self, item: Item) -> bool:
        record = admit(self.kind, item, self._database.clock)
        names = CONTENT[self.kind]
        operation = Update(self.kind, record[KEY[self.kind]], record, names, record.version)
        self._write_back(await self._write(operation), item)
        return True

    async def _delete(self, id: str) -> bool:
        removed: bool = await self._write(Remove(self.kind, check_key(KEY[self.kind], id)))
        return removed

    def _select(self, *conditions: Any) -> Select[Any]:
        return select(*COLUMNS[self.kind]).where(*conditions)

    async def _list(self, query: Select[Any], limit: int | None = None) -> list[Item]:
        async def run(session: AsyncSession) -> list[Item]:
            decode = decoder_here(session, self.kind)
            items: list[Item] = []
            size = None if limit is not None and limit <= _DECODED else _DECODED
            async for rows in read_rows(session, query.limit(limit), size):
                items += self._hand_out(list(map(decode, rows)))
            return items

        return await self._read(run)

    @property
    def _unit(self) -> Unit | None:
        """The write transaction that is joined."""
        return None if self._session is None else self._session.info.get("unit")

    def _write_back(
        self, record: Record[Item], item: Item, names: Iterable[str] | None = None
    ) -> None:
        names = tuple(STAMPED[self.kind] if names is None else names)
        if self._unit is not None:
            before = {name: item.__dict__[name] for name in names}
            self._unit.undo.append(partial(item.__dict__.update, before))
        write_back(record, item, names)

    def _hand_out(self, records: Sequence[Record[Item]]) -> list[Item]:
        """Copies for the caller.

        After a rollback, another change may get the version of one that was undone: a copy that
        was read in between must not pass for that one, so it is made outdated for good.
        """
        items = [record.copy() for record in records]
        unit = self._unit
        if unit is not None and unit.committed:
            changed = {(one.kind, one.id) for one in unit.committed if isinstance(one, Event)}
            for record, item in zip(records, items, strict=True):
                if place_of(record) in changed:
                    unit.undo.append(partial(setattr, item, "version", UNDONE))
        return items

    async def _read(self, work: Callable[[AsyncSession], Awaitable[Result]]) -> Result:
        if self._session is not None:
            return await self._database.read_in(self._session, work)
        return await self._database.read(work)

    async def _write(self, operation: Any, apply: Apply = apply) -> Any:
        try:
            if self._session is not None:
                return await self._database.write_in(self._session, apply, operation)
            return await self._database.write(apply, operation)
        except NotOwnerError as error:
            logger.warning("refused: %s", error)
            raise


class TaskRepository(Repository[Task]):
    """The tasks in the database; every call reads or writes it.

    Args:
        database: The database, or a session of it.
        backoff: How long a task waits for its next try.
    """

    kind = Task

    def __init__(
        self, database: Database | AsyncSession, backoff: Backoff = DEFAULT_BACKOFF
    ) -> None:
        super().__init__(database)
        self._backoff = check_backoff(backoff)

    async def create(self, task: Task) -> bool:
        """Add a task; `task` receives its version and its times in UTC.

        Raises:
            DuplicateError: If there is a task with this identifier.
            InvalidDataError: If a field cannot be stored.
        """
        return await self._create(task)

    async def update(self, task: Task) -> bool:
        """Write a changed task back; `task` receives the new version and can be changed again.

        Raises:
            TaskNotFoundError: If it was deleted meanwhile.
            StaleVersionError: If it was changed meanwhile; read it again first.
            InvalidDataError: If a field cannot be stored.
        """
        return await self._update(task)

    async def delete(self, task_id: str) -> bool:
        """Remove a task; `False` if there is none. Its history stays, its place is free."""
        return await self._delete(task_id)

    async def claim(self, node_id: str, limit: int = 1) -> list[Task]:
        """Hand pending tasks to an ONLINE node that has the skills and the places for them.

        Returns:
            The tasks, SCHEDULED on it: due ones, by priority, time of submission and identifier.

        Raises:
            NodeNotFoundError: If there is no such node.
        """
        place = check_key("node_id", node_id)
        check_some("limit", limit)

        async def best(session: AsyncSession) -> list[Record[Task]]:
            """The best of what waits, and some to spare in case that others are quicker."""
            query = select(*COLUMNS[NodeInfo]).where(NodeRow.node_id == place)
            nodes = await read_records(session, NodeInfo, query)
            wanted = min(limit - len(claimed), free_places(nodes[0])) if nodes else 0
            found: list[Record[Task]] = []
            if not wanted:
                return found
            decode = decoder_here(session, Task)
            now = self._database.clock() if self._unit is None else self._unit.now
            async for rows in read_rows(session, select_pending()):
                tasks = map(decode, rows)
                found += [task for task in tasks if claim(task, nodes[0], now) is not None]
                if len(found) >= wanted:
                    break
            return found[: wanted + _SPARE_CANDIDATES]

        claimed: list[Record[Task]] = []
        while True:
            candidates = await self._read(best)
            if claimed and not candidates:
                break
            claimed += await self._write(Claim(place, candidates, limit - len(claimed)))
            if len(claimed) == limit or len(candidates) <= _SPARE_CANDIDATES:
                break  # else others were quicker, and there may be more
        return self._hand_out(claimed)

    async def start(self, task: Task) -> Task:
        """Its node begins to run a claimed task; returns the task as it is stored.

        Raises:
            TaskNotFoundError: If it was removed meanwhile.
            NotOwnerError: If its node does not hold this attempt any more.
        """
        return await self._advance(start_of(task))

    async def complete(self, task: Task, result: Any = None) -> Task:
        """Its node has completed a task; returns the task as it is stored.

        Args:
            result: Any JSON value.

        Raises:
            TaskNotFoundError: If it was removed meanwhile.
            NotOwnerError: If its node does not hold this attempt any more.
            InvalidDataError: If the result cannot be stored.
        """
        return await self._advance(completion_of(task, result))

    async def fail(self, task: Task, error: str) -> Task:
        """Its node has failed; the task is PENDING again, or FAILED after its last retry.

        Raises:
            TaskNotFoundError: If it was removed meanwhile.
            NotOwnerError: If its node does not hold this attempt any more.
        """
        return await self._advance(failure_of(task, error, self._backoff.draw()))

    async def cancel(self, task_id: str, reason: str | None = None) -> bool:
        """End a task that nobody needs any more; `False` if there is none.

        Raises:
            InvalidTransitionError: If it is finished otherwise.
        """
        return await is_known(self._write(cancellation_of(task_id, reason)))

    async def requeue(self, task_id: str) -> bool:
        """Have a task run again, as if it never had been; `False` if there is none.

        Raises:
            DuplicateError: If another live task has its idempotency key by now.
        """
        return await is_known(self._write(requeue_of(task_id)))

    async def _advance(self, operation: Advance) -> Task:
        done: Advanced = await self._write(operation)
        return self._hand_out([done.record])[0]

    async def list_tasks(
        self,
        filter: TaskFilter | None = None,
        *,
        after: str | None = None,
        limit: int = 100,
    ) -> TaskPage:
        """A page of the tasks that a filter means, newest submitted first, then by identifier.

        Pages stay stable while tasks change: nothing comes twice, and nothing is left out that was
        there before the first page and still fits.

        Args:
            filter: `None` for all tasks.
            after: `after` of the page before; `None` for the first.
            limit: How many at most.

        Raises:
            InvalidDataError: If a condition of the filter, or the cursor, makes no sense.
        """
        check_some("limit", limit)
        checked = check_filter(filter)
        conditions = list(checked.conditions(self._database.dialect))
        if after is not None:
            conditions.append(behind(after))
        queries = [
            self._select(*conditions, *states)
            .order_by(TaskRow.submitted_at.desc(), TaskRow.task_id.desc())
            .limit(min(limit + 1, MAX_INTEGER))
            for states in self._states_of(checked)
        ]

        async def run(session: AsyncSession) -> list[Record[Task]]:
            decode = decoder_here(session, Task)
            found = [
                decode(row)
                for query in queries
                async for rows in read_rows(session, query)
                for row in rows
            ]
            found.sort(key=lambda task: (task["submitted_at"], task["task_id"]), reverse=True)
            return found[: limit + 1]

        found = await self._read(run)
        tasks = self._hand_out(found[:limit])
        return TaskPage(tasks, cursor_of(tasks[-1]) if len(found) > limit else None)

    def _states_of(self, filter: TaskFilter) -> Sequence[Sequence[Any]]:
        """Conditions on the status, of as many queries as can be answered in order by an index."""
        states = filter.status if isinstance(filter.status, tuple) else tuple(TaskStatus)
        if filter.node is None and filter.user is None:
            return [(TaskRow.status == status,) for status in states]
        return [()] if filter.status is None else [(TaskRow.status.in_(states),)]

    async def list_by_status(self, status: TaskStatus, limit: int | None = None) -> list[Task]:
        """Tasks with this status, newest submitted first."""
        return await self._newest(TaskRow.status == task_status("status", status), limit)

    async def list_by_node(self, node_id: str) -> list[Task]:
        """Tasks assigned to this node, finished ones included, newest submitted first."""
        return await self._newest(TaskRow.assigned_node == check_key("node_id", node_id), None)

    async def list_by_user(self, user_id: str, limit: int | None = 100) -> list[Task]:
        """Tasks of this user, newest submitted first."""
        return await self._newest(TaskRow.user_id == check_key("user_id", user_id), limit)

    async def list_pending_tasks(self, limit: int | None = 50) -> list[Task]:
        """Pending and scheduled tasks by priority, then time of submission, then identifier."""
        return await self._list(select_pending(), check_limit(limit))

    async def count_by_status(self, status: TaskStatus | None = None) -> int:
        """How many tasks have this status; `None` counts all."""
        query = select(func.count()).select_from(TaskRow)
        if status is not None:
            query = query.where(TaskRow.status == task_status("status", status))

        async def run(session: AsyncSession) -> int:
            return int(await session.scalar(query) or 0)

        return await self._read(run)

    async def cleanup_old_tasks(
        self, days: float = 30, keep_status: TaskStatus | Iterable[TaskStatus] | None = None
    ) -> int:
        """Remove tasks that finished more than `days` days ago, and their history.

        A finished task whose `completed_at` is missing, or in the future (as it is not before
        `submitted_at`, which another machine's clock may have told), counts from its last change.
        If that is in the future as well, by more than `days`, it counts from this call.

        Works in batches: others write in between (but not in a caller's transaction), and after an
        error it can simply be called again (a note on the error says how many were removed).

        Args:
            days: Age in days, from 0.
            keep_status: Status, or several, not to be removed.

        Returns:
            How many were removed.
        """
        cutoff, keep = cutoff_and_kept(self._database.clock(), days, keep_status)
        return await remove_old_tasks(self._write, cutoff, keep)

    async def count_old_tasks(
        self, days: float = 30, keep_status: TaskStatus | Iterable[TaskStatus] | None = None
    ) -> int:
        """How many tasks `cleanup_old_tasks` would remove.

        Args:
            days: Age in days, from 0.
            keep_status: Status, or several, not to be removed.
        """
        now = self._database.clock()
        cutoff, keep = cutoff_and_kept(now, days, keep_status)
        return await self._read(partial(count_old_tasks, cutoff=cutoff, keep=keep, now=now))

    async def _newest(self, condition: Any, limit: int | None) -> list[Task]:
        # Nothing orders tasks of one moment: to sort 100,000 of them by identifier for a short list
        # took 175 ms instead of 0.3, and an index with the identifiers is half as large again. So
        # they come as the index has them: last added first.
        query = self._select(condition).order_by(TaskRow.submitted_at.desc())
        return await self._list(query, check_limit(limit))


class NodeRepository(Repository[NodeInfo]):
    """The nodes in the database; every call reads or writes it."""

    kind = NodeInfo

    async def create(self, node: NodeInfo) -> bool:
        """Add a node; `node` receives its version and its times in UTC.

        Raises:
            DuplicateError: If there is a node with this identifier.
            InvalidDataError: If a field cannot be stored.
        """
        return await self._create(node)

    async def update(self, node: NodeInfo) -> bool:
        """Write a changed node back; `node` receives the new version and can be changed again.

        Usage figures are written as they are given; `last_heartbeat` never goes back, unless it was
        in the future.

        Raises:
            NodeNotFoundError: If it was deleted meanwhile.
            StaleVersionError: If it was changed meanwhile; read it again first.
            InvalidDataError: If a field cannot be stored.
        """
        return await self._update(node)

    async def delete(self, node_id: str) -> bool:
        """Remove a node; `False` if there is none. Its history stays."""
        return await self._delete(node_id)

    async def list_by_status(self, status: NodeStatus) -> list[NodeInfo]:
        """Nodes with this status, newest registered first."""
        return await self._newest(NodeRow.status == node_status("status", status))

    async def list_online_nodes(self) -> list[NodeInfo]:
        """Nodes that are ONLINE, newest registered first."""
        return await self.list_by_status(NodeStatus.ONLINE)

    async def get_all_nodes(self) -> list[NodeInfo]:
        """All nodes, newest registered first."""
        return await self._newest()

    async def register(self, node: NodeInfo, backoff: Backoff = DEFAULT_BACKOFF) -> bool:
        """Add a node, or have it come back as a new process; `node` receives what is stored.

        What the former process held is given back at once: it is tried again later, or has FAILED
        after its last retry. The node's totals go on.

        Args:
            node: As it is now; its `version` does not matter.
            backoff: How long these tasks wait for their next try.

        Raises:
            InvalidDataError: If a field cannot be stored.
        """
        record = admit(NodeInfo, node, self._database.clock)
        stored = await self._write(
            Register(record["node_id"], record, check_backoff(backoff).draw())
        )
        self._write_back(stored, node, JOINED)
        return True

    async def update_heartbeat(self, node_id: str) -> bool:
        """Note a sign of life now; brings an OFFLINE node back ONLINE. `False` if unknown."""
        beat = Beat(check_key("node_id", node_id), self._database.clock(), {})
        known: bool = await self._write(beat)
        return known

    async def update_status(self, node_id: str, status: NodeStatus) -> bool:
        """Change a node's status; ONLINE and BUSY count as a sign of life. `False` if unknown."""
        known: bool = await self._write(
            SetNodeStatus(check_key("node_id", node_id), node_status("status", status))
        )
        return known

    async def find_stale_nodes(self, timeout_seconds: float = 120) -> list[NodeInfo]:
        """Nodes that are ONLINE or BUSY, but were silent for longer than `timeout_seconds`.

        A node that never sent a heartbeat counts from its registration. A sign of life that is as
        far in the future counts for nothing: a clock was turned back. Newest registered first.
        """
        now, patience = self._database.clock(), check_seconds("timeout_seconds", timeout_seconds)
        last_sign = func.coalesce(NodeRow.last_heartbeat, NodeRow.registered_at)
        is_near = last_sign.between(now - patience, now + patience)
        return await self._newest(NodeRow.status.in_(ALIVE), ~is_near)

    async def find_by_skill(self, skill: str) -> list[NodeInfo]:
        """ONLINE nodes that have exactly this skill, newest registered first."""
        skills = statements_for(self._database.dialect).elements(NodeRow.available_skills)
        has_skill = select(skills).where(skills == check_text("skill", skill)).exists()
        return await self._newest(NodeRow.status == NodeStatus.ONLINE, has_skill)

    async def get_available_nodes(self) -> list[NodeInfo]:
        """ONLINE nodes with a free place, least loaded first.

        Load is the share of `max_concurrent_tasks` in use, then `running_tasks`; equals go by
        identifier.
        """
        load = cast(NodeRow.running_tasks, Float) / NodeRow.max_concurrent_tasks
        query = self._select(
            NodeRow.status == NodeStatus.ONLINE,
            NodeRow.running_tasks < NodeRow.max_concurrent_tasks,
        ).order_by(load, NodeRow.running_tasks, NodeRow.node_id)
        return await self._list(query)

    async def _newest(self, *conditions: Any) -> list[NodeInfo]:
        order = (NodeRow.registered_at.desc(), NodeRow.node_id)
        return await self._list(self._select(*conditions).order_by(*order))


async def is_known(work: Awaitable[object]) -> bool:
    """Whether `work` has found the task that it is about."""
    try:
        await work
    except TaskNotFoundError:
        return False
    return True
