"""`verify`: whether the state is what its own rules say, an fsck of the store.

All is read in pages in one consistent snapshot; what is remembered meanwhile is a bit for each
revision, the nodes, and the problems. The feed is read backwards: then each change but the last
one of a task or node has been named by the one behind it, and the last one by the row.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from sqlalchemy import func, select, text
from sqlalchemy.ext.asyncio import AsyncSession
from sqlalchemy.orm import aliased

from openclaw_store.backends import SQLiteErrorMapping
from openclaw_store.database import (
    COLUMNS,
    FIELDS,
    IS_ASSIGNED,
    IS_LIVE,
    ROWS,
    ChangeRow,
    CounterRow,
    Database,
    NodeRow,
    TaskRow,
)
from openclaw_store.domain import (
    ENTITY_KINDS,
    ENTITY_NAMES,
    FINISHED,
    JSON_FIELDS,
    KEY,
    ChangeKind,
    NodeInfo,
    Raw,
    Task,
    arrived,
    encode,
)
from openclaw_store.errors import InvalidDataError, UnavailableError
from openclaw_store.maintenance.progress import Progress, Report
from openclaw_store.maintenance.repair import Announce, Bury, Raise, Recount, Repair, Stamp, mend
from openclaw_store.repositories import decoder_here, read_rows

INVARIANTS: Mapping[str, str] = {
    "file": "The database itself is sound, and so are its indexes.",
    "counters": "The counters are those of the newest change and the newest flush of heartbeats.",
    "values": "Each value is one that the store takes: known enumerations, types, ranges.",
    "json": "JSON can be read, and is of the right type.",
    "times": "A task tells when it came into the state it is in.",
    "running_tasks": "A node's `running_tasks` is the number of tasks that it holds.",
    "idempotency_keys": "Of the live tasks, one at most has an idempotency key.",
    "version": "The version of a task or node is its last change in the feed, which says the same.",
    "feed": "Revisions are consecutive, and each change follows the one before it.",
    "changes": "What the feed has for alive exists.",
    "nodes": "The node that holds a task is known (it need not be: a remark, not a problem).",
}
"""What is verified, by name."""

MOST = 10_000
"""Problems that are listed; more are only counted."""

_INVALID_INDEXES = text("""
    SELECT index.relname FROM pg_index JOIN pg_class AS index ON index.oid = indexrelid
    JOIN pg_class AS tables ON tables.oid = indrelid
    WHERE NOT (indisvalid AND indisready) AND tables.relname IN
    ('tasks', 'nodes', 'changes', 'counters') AND pg_table_is_visible(tables.oid)""")

_CHANGE_VALUES = {kind.value for kind in ChangeKind}
_REMOVED = ChangeKind.REMOVED.value


@dataclass(frozen=True, slots=True)
class Problem:
    """One thing that is not as it should be."""

    invariant: str
    """One of `INVARIANTS`."""
    item: str | None
    """`task` or `node`, if it is about one."""
    item_id: str | None
    text: str
    """What is wrong, as a sentence."""
    is_safe: bool = False
    """Whether `verify(repair=True)` can put it right, so that nothing is lost."""
    is_repaired: bool = False


@dataclass
class Verification:
    """What `verify` has found; true if no problem is left."""

    problems: list[Problem]
    checked: dict[str, int]
    """How many rows were looked at, by invariant."""
    remarks: list[Problem] = field(default_factory=list)
    """What is unusual, but legal."""
    omitted: int = 0
    """Problems that are not listed, as there are too many."""

    def __bool__(self) -> bool:
        return not self.omitted and all(problem.is_repaired for problem in self.problems)


async def verify(
    database: Database, *, repair: bool = False, report: Report | None = None
) -> Verification:
    """Look whether the state is what its own rules say.

    It reads all there is, while others read and write. A repair is an ordinary change, which the
    caches of running processes follow.

    Args:
        repair: Put right what can be put right without losing anything. Not for nodes that report
            `running_tasks` of their own: the number of the tasks they hold is written over it.
        report: Is told how far it is.

    Raises:
        UnavailableError: If the database cannot be read.
    """
    done: list[Problem] = []
    while True:
        scan = Scan(report)
        await scan.run(database)
        found = scan.found
        if not repair or not scan.repairs:
            break
        progress = Progress(report, "repairing", len(scan.repairs))
        solved = await mend(database, scan.repairs, progress)
        for place, is_solved in solved.items():
            found.problems[place] = replace(found.problems[place], is_repaired=is_solved)
        if not found.omitted or not any(solved.values()):
            break
        done += [problem for problem in found.problems if problem.is_repaired]
    found.problems[:0] = done
    return found


class Scan:
    """One look at everything, in one picture.

    Args:
        report: Is told how far it is.
    """

    def __init__(self, report: Report | None) -> None:
        self._report = report
        self.found = Verification([], dict.fromkeys(INVARIANTS, 0))
        self.repairs: dict[int, Repair] = {}
        """What can be done about problems, by their places in the list."""
        self._revision = 0
        self._beat = 0
        self._compacted = 0
        self._counts: Sequence[int] = ()
        self._named = Revisions()  # by a row, or by the change behind
        self._astray: dict[tuple[str, str], int] = {}  # rows whose version is no change of theirs
        self._ends: dict[tuple[str, str], int] = {}  # last changes that no row names

    async def run(self, database: Database) -> None:
        """Look at everything."""
        try:
            async with database.session() as session:
                await self._look_at_file(session)
                if not await self._look_at_counters(session):
                    return
                held = await self._held(session)
                await self._look_at_rows(session, NodeInfo, held)
                await self._look_at_rows(session, Task, held)
                self._remark_unknown(held)
                await self._look_at_keys(session)
                await self._look_at_feed(session)
                await self._look_at_ends(session)
        except (UnavailableError, InvalidDataError) as error:
            if error.__cause__ is None or not SQLiteErrorMapping.is_damage(error.__cause__):
                raise
            self._add("file", f"not all of it can be read: {error}.")

    def _add(
        self,
        invariant: str,
        sentence: str,
        place: tuple[str, str] | None = None,
        repair: Repair | None = None,
    ) -> None:
        if len(self.found.problems) == MOST:
            self.found.omitted += 1
            return
        item, id = place or (None, None)
        if repair is not None:
            self.repairs[len(self.found.problems)] = repair
        sentence = sentence[0].upper() + sentence[1:]
        self.found.problems.append(Problem(invariant, item, id, sentence, repair is not None))

    def _note(
        self, places: dict[tuple[str, str], int], place: tuple[str, str], revision: int
    ) -> None:
        """Come back later to a place, unless that are too many."""
        if len(places) == MOST:
            self.found.omitted += 1
        else:
            places.setdefault(place, revision)

    async def _look_at_file(self, session: AsyncSession) -> None:
        progress = Progress(self._report, "file", 1)
        if session.get_bind().dialect.name == "sqlite":
            for (line,) in await session.execute(text("PRAGMA integrity_check")):
                if line != "ok":
                    self._add("file", f"SQLite says: {line}.")
            for table, row, parent, _ in await session.execute(text("PRAGMA foreign_key_check")):
                self._add("file", f"Row {row} of {table} refers to none of {parent}.")
        else:
            for (index,) in await session.execute(_INVALID_INDEXES):
                self._add("file", f"The index {index} is invalid: REINDEX INDEX {index}.")
        self.found.checked["file"] = 1
        progress.add(1)

    async def _look_at_counters(self, session: AsyncSession) -> bool:
        query = select(CounterRow.revision, CounterRow.beat, CounterRow.compacted)
        counters = (await session.execute(query)).all()
        self.found.checked["counters"] = len(counters)
        if len(counters) != 1:
            self._add("counters", "The row of counters is gone: restore a backup.")
            return False
        self._revision, self._beat, self._compacted = counters[0]
        newest = await session.scalar(select(func.max(ChangeRow.revision))) or 0
        heartbeats = await session.scalar(select(func.max(NodeRow.beat))) or 0
        if newest > self._revision or heartbeats > self._beat:
            sentence = (
                f"The counters are at revision {self._revision} and flush {self._beat}, but there "
                f"are change {newest} and flush {heartbeats}."
            )
            self._add("counters", sentence, repair=Raise())
            self._revision = max(self._revision, newest)
        if self._compacted >= max(self._revision, 1):
            sentence = f"The feed was compacted up to {self._compacted}, but ends before."
            self._add("counters", sentence)
        self._counts = [
            await session.scalar(select(func.count()).select_from(row)) or 0
            for row in (NodeRow, TaskRow, ChangeRow)
        ]
        return True

    async def _held(self, session: AsyncSession) -> Counter[str]:
        """How many tasks each node holds."""
        node = TaskRow.assigned_node
        found = await session.execute(select(node, func.count()).where(IS_ASSIGNED).group_by(node))
        return Counter({id: count for id, count in found if id is not None})

    async def _look_at_rows(
        self, session: AsyncSession, kind: type[Any], held: Counter[str]
    ) -> None:
        row, change = ROWS[kind], aliased(ChangeRow)
        named = (change.item, change.item_id, change.to_status, change.node)
        query = select(*COLUMNS[kind], *named).outerjoin_from(
            row, change, change.revision == row.__table__.c.version
        )
        width = len(FIELDS[kind])
        decode = decoder_here(session, kind)
        progress = Progress(self._report, f"{ENTITY_NAMES[kind]}s", self._counts[kind is Task])
        version = FIELDS[kind].index("version")
        async for rows in read_rows(session, query):
            for raw in rows:
                self._look_at_values(kind, raw[:width], decode)
                if type(raw[version]) is int:  # else it was named just now
                    self._look_at_version(kind, raw[:width], raw[version], raw[width:])
                if kind is NodeInfo:
                    self._look_at_count(raw[0], raw[FIELDS[kind].index("running_tasks")], held)
            progress.add(len(rows))
        names = ("values", "json", "version", "times" if kind is Task else "running_tasks")
        for name in names:
            self.found.checked[name] += progress.done

    def _look_at_values(self, kind: type[Any], raw: Raw, decode: Callable[[Raw], Any]) -> None:
        place = (ENTITY_NAMES[kind], raw[0])
        try:
            record = decode(raw)
            encode(record.copy())
        except InvalidDataError as error:
            name = "json" if error.field in JSON_FIELDS[kind] else "values"
            self._add(name, f"Of {_said(place)} a value cannot be read: {error}.", place)
            return
        if kind is not Task:
            return
        missing = arrived(record, record.updated_at)
        for name in missing:
            sentence = f"{_said(place)} is {record.status.value}, and has no {name}."
            self._add("times", sentence, place, Stamp(raw[0]))
        if record.completed_at is not None and record.status not in FINISHED:
            sentence = f"{_said(place)} is {record.status.value}, and has a completed_at."
            self._remark("times", sentence, place)

    def _look_at_version(self, kind: type[Any], raw: Raw, version: int, change: Raw) -> None:
        place = (ENTITY_NAMES[kind], raw[0])
        if version == 0:  # inserted by hand
            return
        if version > self._revision or version < 0:
            sentence = (
                f"{_said(place)} has version {version}, but the newest revision is "
                f"{self._revision}."
            )
            self._add("version", sentence, place)
            self._note(self._astray, place, version)
            return
        item, id, status, node = change
        if (item, id) != place or status is None:
            if version > self._compacted or item is not None:
                self._note(self._astray, place, version)
            return
        self._named.add(version)
        values = dict(zip(FIELDS[kind], raw, strict=True))
        if values["status"] != status or (kind is Task and values["assigned_node"] != node):
            sentence = (
                f"{_said(place)} is {_where(values['status'], values.get('assigned_node'))}, but "
                f"its last change, {version}, says {_where(status, node)}: it was changed past "
                "the feed."
            )
            self._add("version", sentence, place, Announce(kind, raw[0], version, version))

    def _look_at_count(self, id: str, running: int, held: Counter[str]) -> None:
        holds = held.pop(id, 0)
        if running != holds:
            place = (ENTITY_NAMES[NodeInfo], id)
            sentence = f"{_said(place)} says running_tasks={running}, but holds {holds}."
            self._add("running_tasks", sentence, place, Recount(id))

    def _remark_unknown(self, held: Counter[str]) -> None:
        """What is left in `held` has no node."""
        self.found.checked["nodes"] = self._counts[0] + len(held)
        for id, count in sorted(held.items()):
            sentence = (
                f"No node {id!r} is known, but {count} tasks are scheduled or running there: "
                "recover gives them back."
            )
            self._remark("nodes", sentence, (ENTITY_NAMES[NodeInfo], id))

    def _remark(self, invariant: str, sentence: str, place: tuple[str, str]) -> None:
        if len(self.found.remarks) < MOST:
            sentence = sentence[0].upper() + sentence[1:]
            self.found.remarks.append(Problem(invariant, *place, sentence))

    async def _look_at_keys(self, session: AsyncSession) -> None:
        key = TaskRow.idempotency_key
        query = select(key, func.count(), func.min(TaskRow.task_id)).where(
            key.is_not(None), IS_LIVE
        )
        for key_, count, first in await session.execute(
            query.group_by(key).having(func.count() > 1)
        ):
            sentence = f"{count} live tasks have the idempotency key {key_!r}, {first!r} is one."
            self._add("idempotency_keys", sentence, (ENTITY_NAMES[Task], first))
        self.found.checked["idempotency_keys"] = self._counts[1]

    async def _look_at_feed(self, session: AsyncSession) -> None:
        before = aliased(ChangeRow)
        named = (before.item, before.item_id, before.to_status)
        query = (
            select(*ChangeRow.__table__.c, *named)
            .outerjoin_from(ChangeRow, before, before.revision == ChangeRow.previous)
            .order_by(ChangeRow.revision.desc())
        )
        width = len(ChangeRow.__table__.c)
        progress = Progress(self._report, "changes", self._counts[2])
        behind = self._revision + 1
        explained = 0  # clean-up has removed the history of tasks up to here
        async for rows in read_rows(session, query):
            for raw in rows:
                revision, _, item, id, kind, was, status, _, _, previous = raw[:width]
                self._look_for_gap(revision, behind, explained)
                if revision <= self._compacted < behind:
                    sentence = f"it has change {revision}, but was compacted to {self._compacted}."
                    self._add("feed", f"The feed is too long: {sentence}")
                behind = revision
                self._look_at_change(revision, (item, id), kind, was, status)
                if previous is None:
                    continue
                place, then = raw[width : width + 2], raw[width + 2]
                if place == (None, None):  # it is not there
                    if kind == _REMOVED:
                        explained = max(explained, previous)
                    elif previous > self._compacted:
                        sentence = f"Change {revision} follows {previous}, which is missing."
                        self._add("feed", sentence, (item, id))
                elif place != (item, id) or then != was or previous >= revision:
                    sentence = (
                        f"Change {revision} of {_said((item, id))} follows {previous}, which is "
                        "another one's, or does not lead to it."
                    )
                    self._add("feed", sentence, (item, id))
                else:
                    self._named.add(previous)
            progress.add(len(rows))
        self._look_for_gap(self._compacted, behind, explained)
        self.found.checked["feed"] = self.found.checked["changes"] = progress.done

    def _look_for_gap(self, revision: int, behind: int, explained: int) -> None:
        """Whether it is known why there is nothing between two changes."""
        first = max(revision, explained, self._compacted) + 1
        if first < behind:
            which = (
                f"Change {first} is"
                if first + 1 == behind
                else f"Changes {first} to {behind - 1} are"
            )
            self._add("feed", f"{which} missing, and no clean-up has removed them.")

    def _look_at_change(
        self, revision: int, place: tuple[str, str], kind: str, was: str | None, status: str | None
    ) -> None:
        if (
            place[0] not in ENTITY_KINDS
            or kind not in _CHANGE_VALUES
            or kind != _kind_of(was, status)
        ):
            sentence = (
                f"Change {revision} of {_said(place)} is called {kind!r}, and leads from {was} "
                f"to {status}."
            )
            self._add("feed", sentence, place)
        if status is not None and revision not in self._named:
            self._note(self._ends, place, revision)

    async def _look_at_ends(self, session: AsyncSession) -> None:
        """Look for the rows of last changes that no row has named, and the other way round."""
        for place, revision in self._ends.items():
            kind = ENTITY_KINDS.get(place[0])
            if kind is None:
                continue
            columns = ROWS[kind].__table__.c
            query = select(columns.version).where(columns[KEY[kind]] == place[1])
            version = await session.scalar(query)
            if version is None:
                sentence = (
                    f"{_said(place)} is gone, but its last change, {revision}, is no removal."
                )
                self._add("changes", sentence, place, Bury(kind, place[1], revision))
            elif version < revision or place in self._astray:
                if 0 <= version <= self._revision:  # else that was said already
                    sentence = (
                        f"{_said(place)} has version {version}, but its last change is {revision}."
                    )
                    repair = Announce(kind, place[1], version, revision)
                    self._add("version", sentence, place, repair)
            else:
                sentence = (
                    f"Change {revision} of {_said(place)} is not its last one, but none follows it."
                )
                self._add("feed", sentence, place)
            self._astray.pop(place, None)
        for place, version in self._astray.items():
            if 0 <= version <= self._revision:
                sentence = f"{_said(place)} has version {version}, which is no change of it."
                repair = Announce(ENTITY_KINDS[place[0]], place[1], version, None)
                self._add("version", sentence, place, repair)


class Revisions:
    """A set of revisions, which takes a bit for each of those that lie close together."""

    _BITS = 1 << 16

    def __init__(self) -> None:
        self._blocks: dict[int, bytearray] = {}

    def add(self, revision: int) -> None:
        """Put a revision into the set."""
        block, bit = divmod(revision, self._BITS)
        if block not in self._blocks:
            self._blocks[block] = bytearray(self._BITS // 8)
        self._blocks[block][bit >> 3] |= 1 << (bit & 7)

    def __contains__(self, revision: int) -> bool:
        block, bit = divmod(revision, self._BITS)
        return block in self._blocks and bool(self._blocks[block][bit >> 3] >> (bit & 7) & 1)


def _kind_of(was: str | None, status: str | None) -> str:
    """What a change is called that leads from one status to another."""
    if was is None:
        return ChangeKind.CREATED.value
    if status is None:
        return _REMOVED
    return (ChangeKind.UPDATED if was == status else ChangeKind.STATUS).value


def _said(place: tuple[str, str]) -> str:
    return f"{place[0]} {place[1]!r}"


def _where(status: str, node: str | None) -> str:
    return status if node is None else f"{status} on {node!r}"
