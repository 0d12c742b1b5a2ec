"""Verify: check that a database keeps the invariants of the store, like an fsck.

All rows are read in batches in one consistent snapshot. The memory in use is one bit per revision,
the nodes, and the problems. The feed is read backwards: the newest change of an entity is
referenced by the entity's row, and each older change by its successor.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime
from types import NoneType
from typing import Any

from sqlalchemy import func, select, text
from sqlalchemy.ext.asyncio import AsyncSession
from sqlalchemy.orm import aliased

from openclaw_store.backends import SQLiteErrorMapping, schema_of
from openclaw_store.backends.sqlite.connections import limited
from openclaw_store.database import (
    COLUMNS,
    FIELDS,
    FUNCTION,
    HEAD,
    IS_ASSIGNED,
    IS_LIVE,
    ROWS,
    ChangeRow,
    CounterRow,
    Database,
    NodeRow,
    TaskRow,
    overloads,
    require_unchanged,
)
from openclaw_store.domain import (
    ENTITY_KINDS,
    ENTITY_NAMES,
    FINISHED,
    JSON_FIELDS,
    KEY,
    MAX_INTEGER,
    ChangeKind,
    NodeInfo,
    Raw,
    Task,
    encode,
    missing_time,
)
from openclaw_store.errors import InvalidDataError, UnavailableError, safe_repr, shown
from openclaw_store.maintenance.progress import Progress, Report
from openclaw_store.maintenance.repair import (
    CountTasks,
    LogUpdate,
    RemoveFromFeed,
    Repair,
    SetStatusTime,
    repair_problems,
)
from openclaw_store.maintenance.revisions import Revisions
from openclaw_store.repositories import decoder_here, read_rows

INVARIANTS: Mapping[str, str] = {
    "file": "The database is undamaged, and so are its indexes and functions.",
    "counters": "The counters are those of the newest heartbeat and of the feed.",
    "values": "The store accepts each value: known enumerations, types, ranges.",
    "json": "JSON can be read, and has the right type.",
    "times": "A task has the time of its status.",
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

_PAGES_DAMAGED = ("*** in database", "Tree ", "Page ")
"""How SQLite begins a line about pages, not about rows or indexes."""

_INVALID_INDEXES = text("""
    SELECT index.relname FROM pg_index JOIN pg_class AS index ON index.oid = indexrelid
    JOIN pg_class AS tables ON tables.oid = indrelid
    JOIN pg_namespace ON pg_namespace.oid = tables.relnamespace
    WHERE NOT (indisvalid AND indisready) AND tables.relname IN
    ('tasks', 'nodes', 'changes', 'counters') AND nspname = :schema""")

_CHANGE_TYPES: Sequence[Any] = (
    int, (int, datetime), str, str, str, *[(str, NoneType)] * 4, (int, NoneType)
)  # fmt: skip
"""The types of the columns of the feed; SQLite stores any type in any column but the first."""

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

    def __bool__(self) -> bool:
        return not self.omitted and all(problem.is_repaired for problem in self.problems)


async def verify(
    database: Database, *, repair: bool = False, report: Report | None = None
) -> Verification:
    """Check all invariants of the store, while it is in use.

    A repair is an ordinary change, which the caches of running processes follow.

    Args:
        repair: Repair the problems that can be repaired without losing anything. Not for nodes
            that report their own `running_tasks`: the number of assigned tasks overwrites it.
        report: Receives the progress.

    Raises:
        UnavailableError: If the database cannot be read.
    """
    repaired: list[Problem] = []
    while True:
        scan = _Scan(report)
        await scan.run(database)
        found = scan.found
        if not repair or not scan.repairs:
            break
        progress = Progress(report, "repairing", len(scan.repairs))
        solved = await repair_problems(database, scan.repairs, progress)
        for position, is_solved in solved.items():
            found.problems[position] = replace(found.problems[position], is_repaired=is_solved)
        if not found.omitted or not any(solved.values()):
            break
        repaired += [problem for problem in found.problems if problem.is_repaired]
    # A later scan no longer finds the problems that an earlier one has repaired.
    found.problems[:0] = repaired
    return found


class _Scan:
    """One check of all invariants."""

    def __init__(self, report: Report | None) -> None:
        self._report = report
        self.found = Verification([], dict.fromkeys(INVARIANTS, 0))
        self.repairs: dict[int, Repair] = {}
        """Repairs by the position of their problem."""
        self._revision = self._compacted = 0
        self._counts: Sequence[int] = ()
        self._referenced = Revisions()
        """Changes referenced by a row, or by the change after them."""
        self._unmatched: dict[Key, int] = {}
        """Versions of rows that are no change of theirs."""
        self._unreferenced: dict[Key, int] = {}
        """Changes that nothing references: the last one of each entity."""

    async def run(self, database: Database) -> None:
        try:
            async with database.session() as session, limited(session):
                await database.read_in(session, self._check_all)
        except (UnavailableError, InvalidDataError) as error:
            if error.__cause__ is None or not SQLiteErrorMapping.is_damage(error.__cause__):
                raise
            self._add("file", f"Not all of it can be read: {error}.")

    async def _check_all(self, session: AsyncSession) -> None:
        if not await self._check_file(session) or not await self._check_counters(session):
            return
        node = TaskRow.assigned_node
        query = select(node, func.count()).where(IS_ASSIGNED).group_by(node)
        rows = await session.execute(query)
        assigned = {id: count for id, count in rows if id and isinstance(id, str)}
        await self._check_rows(session, NodeInfo, assigned)
        await self._check_rows(session, Task, assigned)
        self._remark_unknown_nodes(assigned)
        await self._check_idempotency_keys(session)
        # The feed comes after the rows, whose references it looks up.
        await self._check_feed(session)
        await self._check_unreferenced(session)

    def _add(
        self, invariant: str, text: str, key: Key | None = None, repair: Repair | None = None
    ) -> None:
        problems = self.found.problems
        if len(problems) == MOST:
            self.found.omitted += 1
            return
        if repair is not None:
            self.repairs[len(problems)] = repair
        item, id = key or (None, None)
        problems.append(Problem(invariant, item, id, shown(text), repair is not None))

    def _remark(self, invariant: str, text: str, key: Key) -> None:
        if len(self.found.remarks) < MOST:
            self.found.remarks.append(Problem(invariant, *key, shown(text)))

    def _check_later(self, changes: dict[Key, int], key: Key, revision: int) -> None:
        if len(changes) == MOST:  # bounds the memory, even if every change is wrong
            self.found.omitted += 1
        else:
            changes.setdefault(key, revision)

    async def _check_file(self, session: AsyncSession) -> bool:
        """Return `False` if rows cannot be read: in damaged pages, a search may never end."""
        progress = Progress(self._report, "file", 1)
        connection = await session.connection()
        # The schema may have changed since it was opened.
        is_complete = await connection.run_sync(require_unchanged, HEAD)
        if session.get_bind().dialect.name == "sqlite":
            first = await session.scalar(text("PRAGMA integrity_check(1)"))
            if first and first.startswith(_PAGES_DAMAGED):
                self._add("file", f"SQLite reports: {first}; the rows were not checked.")
                return False
            for (line,) in await session.execute(text("PRAGMA integrity_check")):
                if line != "ok":
                    self._add("file", f"SQLite reports: {line}.")
            for table, row, parent, _ in await session.execute(text("PRAGMA foreign_key_check")):
                self._add("file", f"Row {row} of {table} refers to no row of {parent}.")
        else:
            schema = schema_of(session.get_bind())
            for (index,) in await session.execute(_INVALID_INDEXES, {"schema": schema}):
                self._add("file", f"The index {index} is invalid: REINDEX INDEX {index}.")
            if not is_complete:
                self._add("file", f"The function {FUNCTION} was dropped.")
            for other in await connection.run_sync(overloads):
                self._add("file", f"There is another function {shown(other)}.")
        self.found.checked["file"] = 1
        progress.add(1)
        return True

    async def _check_counters(self, session: AsyncSession) -> bool:
        query = select(CounterRow.revision, CounterRow.heartbeats, CounterRow.compacted)
        counters = (await session.execute(query)).all()
        self.found.checked["counters"] = len(counters)
        if len(counters) != 1:
            self._add("counters", "The row of counters is missing: restore a backup.")
            return False
        if {*map(type, counters[0])} != {int}:  # SQLite sorts text behind all numbers
            problem = f"Of the newest numbers {tuple(counters[0])}, not all are integers."
            self._add("counters", problem)
            return False
        self._revision, heartbeats, self._compacted = counters[0]
        # Writers could not count on from the largest numbers, which only damage explains.
        if heartbeats >= MAX_INTEGER // 2:
            self._add("counters", f"The last heartbeat has the number {heartbeats}.")
        if self._compacted >= max(self._revision, 1):
            problem = f"The feed was compacted up to {self._compacted}, but ends before that."
            self._add("counters", problem)
        self._counts = [
            await session.scalar(select(func.count()).select_from(row)) or 0
            for row in (NodeRow, TaskRow, ChangeRow)
        ]
        return True

    async def _check_rows(
        self, session: AsyncSession, kind: type[Any], assigned: dict[str, int]
    ) -> None:
        entity, last = ROWS[kind], aliased(ChangeRow)
        query = select(
            *COLUMNS[kind], last.item, last.item_id, last.to_status, last.node
        ).outerjoin_from(entity, last, last.revision == entity.__table__.c.version)
        names = FIELDS[kind]
        decode = decoder_here(session, kind)
        progress = Progress(self._report, f"{ENTITY_NAMES[kind]}s", self._counts[kind is Task])
        async for rows in read_rows(session, query):
            for row in rows:
                raw, change = row[: len(names)], row[len(names) :]
                if not isinstance(raw[0], str):
                    self._add("values", f"The {names[0]} {raw[0]!r} is not text.")
                    continue
                key = ENTITY_NAMES[kind], raw[0]
                values = dict(zip(names, raw, strict=True))
                self._check_values(kind, key, raw, decode)
                if type(values["version"]) is int:  # else `_check_values` has reported it
                    self._check_version(kind, key, values, change)
                if kind is NodeInfo:
                    running, count = values["running_tasks"], assigned.pop(raw[0], 0)
                    if running != count:
                        problem = f"{_label(key)} has running_tasks={running}, but {count} tasks."
                        self._add("running_tasks", problem, key, CountTasks(raw[0]))
            progress.add(len(rows))
        for name in ("values", "json", "version", "times" if kind is Task else "running_tasks"):
            self.found.checked[name] += progress.done

    def _check_values(
        self, kind: type[Any], key: Key, raw: Raw, decode: Callable[[Raw], Any]
    ) -> None:
        try:
            record = decode(raw)
            encode(record.copy())
        except InvalidDataError as error:
            name = "json" if error.field in JSON_FIELDS[kind] else "values"
            self._add(name, f"{_label(key)} has a value that cannot be read: {error}.", key)
            return
        if kind is not Task:
            return
        status = record.status.value
        for name in missing_time(record, record.updated_at):
            problem = f"{_label(key)} is {status}, and has no {name}."
            self._add("times", problem, key, SetStatusTime(raw[0]))
        if record.completed_at is not None and record.status not in FINISHED:
            self._remark("times", f"{_label(key)} is {status}, and has a completed_at.", key)

    def _check_version(
        self, kind: type[Any], key: Key, values: Mapping[str, Any], change: Raw
    ) -> None:
        version = values["version"]
        if version == 0:  # inserted by hand, without a change
            return
        if not 0 < version <= self._revision:
            problem = f"{_label(key)} has version {version}, but the newest is {self._revision}."
            self._add("version", problem, key)
            self._check_later(self._unmatched, key, version)
            return
        item, id, status, node = change
        if (item, id) != key or not isinstance(status, str):
            # A compacted change is legally missing; one of another entity never is.
            if version > self._compacted or item is not None:
                self._check_later(self._unmatched, key, version)
            return
        self._referenced.add(version)
        if values["status"] != status or (kind is Task and values["assigned_node"] != node):
            problem = (
                f"{_label(key)} is {_state(values['status'], values.get('assigned_node'))}, but "
                f"{_state(status, node)} in its last change, {version}: it was changed past the "
                "feed."
            )
            self._add("version", problem, key, LogUpdate(kind, key[1], version, version))

    def _remark_unknown_nodes(self, assigned: Mapping[str, int]) -> None:
        """Remark on the nodes left in `assigned`: they have no row."""
        self.found.checked["nodes"] = self._counts[0] + len(assigned)
        for id, count in sorted(assigned.items()):
            problem = (
                f"There is no node {id!r}, but {count} tasks are scheduled or running on it: "
                "recover releases them."
            )
            self._remark("nodes", problem, (ENTITY_NAMES[NodeInfo], id))

    async def _check_idempotency_keys(self, session: AsyncSession) -> None:
        column = TaskRow.idempotency_key
        query = (
            select(column, func.count(), func.min(TaskRow.task_id))
            .where(column.is_not(None), IS_LIVE)
            .group_by(column)
            .having(func.count() > 1)
        )
        for idempotency_key, count, first in await session.execute(query):
            problem = f"{count} live tasks, as {first!r}, have the key {idempotency_key!r}."
            key = (ENTITY_NAMES[Task], first) if isinstance(first, str) else None
            self._add("idempotency_keys", problem, key)
        self.found.checked["idempotency_keys"] = self._counts[1]

    async def _check_feed(self, session: AsyncSession) -> None:
        before, columns = aliased(ChangeRow), ChangeRow.__table__.c
        query = (
            select(*columns, before.item, before.item_id, before.to_status)
            .outerjoin_from(ChangeRow, before, before.revision == ChangeRow.previous)
            .order_by(ChangeRow.revision.desc())
        )
        progress = Progress(self._report, "changes", self._counts[2])
        successor = self._revision + 1
        removed = 0  # up to this revision, clean-up has removed the histories of tasks
        async for rows in read_rows(session, query):
            for row in rows:
                revision, _, item, id, kind, was, status, _, _, previous = row[: len(columns)]
                key = item, id
                # Newest first: `successor` is the change after this one in the whole feed.
                self._check_gap(revision, successor, removed)
                if revision <= self._compacted < successor:
                    self._add("feed", f"Change {revision} was compacted, but is still there.")
                successor = revision
                if not all(map(isinstance, row, _CHANGE_TYPES)):
                    problem = f"Change {revision} has a value of a wrong type: {safe_repr(row)}."
                    self._add("feed", problem)
                    continue
                self._check_change(revision, key, kind, was, status)
                if previous is None:
                    continue
                previous_key, previous_status = row[-3:-1], row[-1]
                if previous_key == (None, None):  # there is no such change
                    # A removal with its history leaves no older change of the entity.
                    if kind == ChangeKind.REMOVED:
                        removed = max(removed, previous)
                    elif previous > self._compacted:
                        problem = f"Change {revision} follows {previous}, which is missing."
                        self._add("feed", problem, key)
                elif previous_key != key or previous_status != was or previous >= revision:
                    problem = (
                        f"Change {revision} of {_label(key)} follows {previous}, which has "
                        "another task or node, or does not lead to it."
                    )
                    self._add("feed", problem, key)
                else:
                    self._referenced.add(previous)
            progress.add(len(rows))
        self._check_gap(self._compacted, successor, removed)
        self.found.checked["feed"] = self.found.checked["changes"] = progress.done

    def _check_gap(self, revision: int, successor: int, removed: int) -> None:
        """Check that all changes between two neighbours were compacted or cleaned up."""
        first = max(revision, removed, self._compacted) + 1
        if first < successor:
            missing = (
                f"Change {first} is"
                if first + 1 == successor
                else f"Changes {first} to {successor - 1} are"
            )
            self._add("feed", f"{missing} missing, and no clean-up has removed them.")

    def _check_change(
        self, revision: int, key: Key, kind: str, was: str | None, status: str | None
    ) -> None:
        if was is None:
            expected = ChangeKind.CREATED
        elif status is None:
            expected = ChangeKind.REMOVED
        else:
            expected = ChangeKind.UPDATED if was == status else ChangeKind.STATUS
        if key[0] not in ENTITY_KINDS or kind != expected:
            problem = (
                f"Change {revision} of {_label(key)} has the kind {kind!r}, and leads from {was} "
                f"to {status}."
            )
            self._add("feed", problem, key)
        if status is not None and revision not in self._referenced:
            self._check_later(self._unreferenced, key, revision)

    async def _check_unreferenced(self, session: AsyncSession) -> None:
        """Check last changes without a row, and rows without their last change."""
        for key, revision in self._unreferenced.items():
            kind = ENTITY_KINDS.get(key[0])
            if kind is None:
                continue
            columns = ROWS[kind].__table__.c
            query = select(columns.version).where(columns[KEY[kind]] == key[1])
            row = (await session.execute(query)).first()
            version = 0 if row is None else row.version
            if row is None:
                problem = f"{_label(key)} is gone, but its last change, {revision}, is no removal."
                self._add("changes", problem, key, RemoveFromFeed(kind, key[1], revision))
            elif type(version) is not int:
                pass  # `_check_values` has reported it
            elif version < revision or key in self._unmatched:
                if 0 <= version <= self._revision:  # else `_check_version` has reported it
                    problem = (
                        f"{_label(key)} has version {version}, but last changed in {revision}."
                    )
                    self._add("version", problem, key, LogUpdate(kind, key[1], version, revision))
            else:
                problem = f"No change follows change {revision} of {_label(key)}, an older one."
                self._add("feed", problem, key)
            self._unmatched.pop(key, None)
        for key, version in self._unmatched.items():
            if 0 <= version <= self._revision:
                problem = f"{_label(key)} has version {version}, which is no change of it."
                repair = LogUpdate(ENTITY_KINDS[key[0]], key[1], version, None)
                self._add("version", problem, key, repair)


def _label(key: Key) -> str:
    return f"{key[0].capitalize()} {key[1]!r}"


def _state(status: str, node: str | None) -> str:
    return status if node is None else f"{status} on {node!r}"
