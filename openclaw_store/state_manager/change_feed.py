"""Read what a cache needs: the initial state, and batches of later changes.

Each read is one snapshot, in one session.
"""

from __future__ import annotations

import sqlite3
from bisect import bisect_right
from collections.abc import (
    AsyncIterator,
    Callable,
    Collection,
    Iterable,
    Iterator,
    Mapping,
    Sequence,
)
from dataclasses import dataclass, field
from datetime import datetime
from functools import cache, reduce
from itertools import chain
from operator import add, itemgetter, methodcaller
from typing import Any

import orjson
import sqlalchemy as sa
from sqlalchemy.dialects.postgresql import ARRAY
from sqlalchemy.ext.asyncio import AsyncSession
from sqlalchemy.orm import Session
from sqlalchemy.util import greenlet_spawn

from openclaw_store.backends import fetch_raw_rows, unreadable_value
from openclaw_store.database import (
    COLUMNS,
    FIELDS,
    USAGE,
    ChangeRow,
    CounterRow,
    NodeRow,
    SealableText,
    Statements,
    TaskRow,
    statements_in,
    statements_of,
    table_of,
)
from openclaw_store.domain import (
    ENTITY_KINDS,
    ENTITY_NAMES,
    JSON_FIELDS,
    KEY,
    WAITING,
    Decode,
    EntityKey,
    NodeInfo,
    Raw,
    Record,
    Task,
    TaskStatus,
)
from openclaw_store.errors import InvalidDataError
from openclaw_store.repositories import (
    CHANGE_BATCH_SIZE,
    FETCH_SIZE,
    PAGE_BYTES,
    Heartbeat,
    TolerantReader,
    counters_of,
    read_counters,
    read_rows,
    select_pending,
)
from openclaw_store.state_manager.task_index import IndexEntry

STEP = (
    *("revision", "changed_at", "item", "item_id", "from_status", "to_status"),
    *("kind", "node", "reason", "previous"),
)
"""The columns of a change, in this order: a cache needs the first six, watchers need all."""

STEP_WIDTH = len(STEP)
"""The number of these columns in a row; the columns of the task follow."""

REVISION, CHANGED_AT, ENTITY_NAME, ENTITY_ID, _FROM, TO_STATUS, KIND, *_ = range(STEP_WIDTH)
"""The positions of these columns."""

REASON_CHARACTERS = 1000
"""Longest reason that a batch has in full; a longer one is cut after one character more."""

_INDEXED = ("version", "status", "assigned_node", "priority", "submitted_at")
_indexed = itemgetter(*map(FIELDS[Task].index, _INDEXED))
_STATUS_OF = {status.value: status for status in TaskStatus}

_TASK, _NODE_NAME = ENTITY_NAMES[Task], ENTITY_NAMES[NodeInfo]
_NO_TASK: Sequence[Any] = (None,) * len(FIELDS[Task])

_HEARTBEAT = [
    table_of(NodeInfo).c[name] for name in ("node_id", "version", "last_heartbeat", *USAGE)
]


@dataclass(frozen=True, slots=True)
class InitialState:
    """The counters, and the decoders of rows."""

    revision: int
    heartbeat_sequence: int
    """The newest heartbeat sequence."""
    updated_at: datetime | None
    """The time of the newest change."""
    task_counts: Mapping[str, int]
    """Tasks by status, finished ones included."""
    decode: Mapping[type[Any], Decode]
    """Decoders of rows, by kind."""
    read_entry: Callable[[Raw], IndexEntry]
    """Makes the index entry of a row of a task."""
    encode: Callable[[Record[Task]], Raw]
    """Makes the row of a task, as the driver would return it."""


@dataclass(frozen=True, slots=True)
class ChangeBatch:
    """Changes after a revision, with the entities that they changed."""

    revision: int
    """The batch has the changes up to this revision."""
    read_at: int
    """The revision of the snapshot that the content is from; if it is larger, batches follow."""
    heartbeat_sequence: int
    """The heartbeat sequence of the snapshot."""
    changes: Sequence[Sequence[Any]]
    """Changes in order: each a `STEP`, then the columns of its task as the driver gives them.

    The last change of a task has its content; earlier ones may have `None` instead, as have the
    changes of removed tasks and of nodes.
    """
    changed_at: datetime | None
    """The time of the last change, if there are any."""
    is_complete: bool
    """True if clean-up has removed no change of this batch and the ones before it."""
    nodes: Mapping[str, Record[NodeInfo]]
    """The nodes that changed, without removed ones."""
    heartbeats: Sequence[tuple[int, Heartbeat]]
    """Later heartbeats, each with the version of its node."""
    task_counts: Mapping[str, int] | None
    """Tasks by status, if the changes are not complete."""
    is_compacted: bool = False
    """True if compaction has removed changes of this batch, which is useless then."""
    unreadable: Mapping[EntityKey, InvalidDataError] = field(default_factory=dict)
    """The tasks and nodes that changed, but cannot be read."""


async def read_initial_state(session: AsyncSession) -> InitialState:
    """Return the initial state in the snapshot of `session`."""
    revision, sequence, _ = await read_counters(session)
    newest = sa.select(ChangeRow.changed_at).order_by(ChangeRow.revision.desc()).limit(1)
    updated_at, counts = await session.scalar(newest), await session.run_sync(_task_counts)
    dialect = session.get_bind().dialect.name
    sql = statements_in(session)
    read_entry = entry_reader(dialect)
    return InitialState(revision, sequence, updated_at, counts, sql.decode, read_entry, sql.encode)


async def read_live(
    session: AsyncSession, reader: TolerantReader | None = None
) -> AsyncIterator[tuple[type[Any], Sequence[Raw]]]:
    """Yield the kind and a batch of rows, for all nodes and all live tasks.

    Pending and scheduled tasks are in the order of their keys.

    Args:
        reader: Reads around rows that the driver refuses; `None` is faster.
    """
    running = sa.select(*COLUMNS[Task]).where(TaskRow.status == TaskStatus.RUNNING)
    live: Sequence[tuple[type[Any], sa.Select[Any]]] = (
        (NodeInfo, sa.select(*COLUMNS[NodeInfo])),
        (Task, running.order_by(TaskRow.submitted_at)),  # otherwise SQLite may scan all tasks
        (Task, select_pending()),
    )
    for kind, query in live:
        if reader is None:
            async for rows in read_rows(session, query):
                yield kind, rows
        else:
            keys = await session.scalars(query.with_only_columns(table_of(kind).c[KEY[kind]]))
            ids = keys.all()
            for start in range(0, len(ids), FETCH_SIZE):
                some = ids[start : start + FETCH_SIZE]
                yield kind, await greenlet_spawn(reader.by_ids, kind, COLUMNS[kind], some)


def read_change_batch(
    session: Session,
    *,
    since: int,
    heartbeat_sequence: int,
    is_complete: bool,
    known: Collection[int] = (),
) -> ChangeBatch:
    """Return a batch of the changes after `since`, and the nodes with newer heartbeats.

    The batch has at most `CHANGE_BATCH_SIZE` changes; it ends earlier at `PAGE_BYTES`.

    Args:
        is_complete: True if the batches before this one were complete.
        known: Revisions of changes to leave out.
    """
    until = since + CHANGE_BATCH_SIZE
    wanted: Sequence[int] = range(since + 1, until + 1)
    skipped: list[int] = []
    if known:
        skipped = [revision for revision in wanted if revision in known]
        wanted = [revision for revision in wanted if revision not in known]
    reader = TolerantReader(session)
    found, read = _read_changes(session, reader.sql, since, until, skipped)
    revision, newest_sequence = counters_of(found)
    contents = _Contents(session, reader, read)
    changes = contents.complete(read)
    until = min(until, revision) if len(changes) == len(read) else changes[-1][REVISION]
    is_complete = is_complete and len(changes) == bisect_right(wanted, until)
    # Heartbeats are not in the change log: they only raise the sequence of their node.
    heartbeats: Sequence[tuple[int, Heartbeat]] = []
    if newest_sequence > heartbeat_sequence:
        heartbeats = contents.heartbeats(heartbeat_sequence)
    return ChangeBatch(
        revision=until,
        read_at=revision,
        heartbeat_sequence=newest_sequence,
        changes=changes,
        changed_at=reader.sql.from_moment(changes[-1][CHANGED_AT]) if changes else None,
        is_complete=is_complete,
        nodes=contents.nodes,
        heartbeats=heartbeats,
        task_counts=None if is_complete or until < revision else _task_counts(session),
        is_compacted=since < found[0][2],
        unreadable=reader.unreadable,
    )


def _read_changes(
    session: Session, sql: Statements, since: int, until: int, skipped: Sequence[int]
) -> tuple[Sequence[Any], Sequence[Sequence[Any]]]:
    """Return the rows with the counters, and the changes, without the content of large tasks."""
    is_sqlite = sql.dialect.name == "sqlite"
    values = {
        "since": since,
        "until": until,
        "skipped": orjson.dumps(skipped).decode() if is_sqlite else skipped,
        "small": PAGE_BYTES // (until - since),
    }
    page, names = _statement(sql.without_keys, is_skipping=bool(skipped))
    try:
        found = _fetch(session, page, *(values[name] for name in names))
    except Exception as error:
        if unreadable_value(error) is None:
            raise
        # No task is small enough now, so each is read alone.
        values["small"] = -1
        found = _fetch(session, page, *(values[name] for name in names))
    if is_sqlite:
        return found, orjson.loads(found[0][3])
    return found, [row[3:] for row in found if row[3] is not None]


@cache
def entry_reader(dialect: str) -> Callable[[Raw], IndexEntry]:
    """Return the function that makes the index entry of a row of a task, without decoding it."""
    sql = statements_of(dialect)
    moment, decode = sql.from_moment, sql.decode[Task]

    def read(row: Raw) -> IndexEntry:
        version, status, node, priority, submitted_at = _indexed(row)
        try:
            status = _STATUS_OF[status]
            key = None
            if status in WAITING:
                key = (int(priority), moment(submitted_at), row[0])
        except (KeyError, OverflowError, TypeError, ValueError):
            decode(row)  # raises an error that names the field
            raise
        return IndexEntry(row[0], version, status, node, key)

    return read


def _task_counts(session: Session) -> dict[str, int]:
    counts = sa.select(TaskRow.status, sa.func.count()).group_by(TaskRow.status)
    return {status.value: count for status, count in session.execute(counts)}


class _Contents:
    """The content of the tasks and nodes of a page; large ones are read one by one.

    A large one is read at its first change: so the page may end after any change, and all its
    content is known.
    """

    def __init__(
        self, session: Session, reader: TolerantReader, rows: Sequence[Sequence[Any]]
    ) -> None:
        self._session = session
        self._reader = reader
        self._sql = reader.sql
        self.nodes: dict[str, Record[NodeInfo]] = {}
        last = {(row[ENTITY_NAME], row[ENTITY_ID]): row[STEP_WIDTH] for row in rows}
        nodes = [id for name, id in last if name == _NODE_NAME]
        self._add_nodes(self._read_small_nodes(nodes))
        # The last change of a task may be a removal, after which this process has added it again.
        self._absent = {
            Task: [id for (name, id), found in last.items() if name == _TASK and found is None],
            NodeInfo: [id for id in nodes if id not in self.nodes],
        }

    def complete(self, rows: Sequence[Sequence[Any]]) -> Sequence[Sequence[Any]]:
        """Add the large tasks and nodes, and end the rows when their size exceeds `PAGE_BYTES`."""
        large = {key for kind in self._absent for key in self._existing(kind)}
        if not large:
            return rows
        tasks = {row[ENTITY_ID]: row[STEP_WIDTH:] for row in rows if row[STEP_WIDTH] is not None}
        whole: list[Sequence[Any]] = []
        size = 0
        for row in rows:
            name, id = row[ENTITY_NAME], row[ENTITY_ID]
            if (name, id) in large:
                large.remove((name, id))
                kind = ENTITY_KINDS[name]
                found = self._reader.by_ids(kind, COLUMNS[kind], [id])
                size += sum(len(value) for value in chain(*found) if isinstance(value, str))
                if kind is NodeInfo:
                    self._add_nodes(found)
                else:
                    tasks.update((id, task) for task in found)
            task = tasks.get(id, _NO_TASK) if name == _TASK else _NO_TASK
            whole.append((*row[:STEP_WIDTH], *task))
            if size > PAGE_BYTES:
                break
        return whole

    def heartbeats(self, after: int) -> list[tuple[int, Heartbeat]]:
        """Return the heartbeats after a sequence number, as `ChangeBatch` has them."""
        is_later = NodeRow.beat > after
        rows = self._reader.all(sa.select(*_HEARTBEAT).where(is_later))
        if rows is None:
            ids = self._session.scalars(sa.select(NodeRow.node_id).where(is_later))
            rows = self._reader.by_ids(NodeInfo, _HEARTBEAT, list(ids))
        found = []
        for id, version, at, *values in rows:
            with self._reader.noting(NodeInfo, id):
                usage = dict(zip(USAGE, values, strict=True))
                found.append((version, Heartbeat(id, self._sql.from_moment(at), usage)))
        return found

    def _add_nodes(self, rows: Iterable[Raw]) -> None:
        for row in rows:
            with self._reader.noting(NodeInfo, row[0]):
                self.nodes[row[0]] = self._sql.decode[NodeInfo](row)

    def _read_small_nodes(self, ids: Sequence[str]) -> Sequence[Raw]:
        if not ids:
            return ()
        query = self._sql.by_ids(NodeInfo, COLUMNS[NodeInfo], self._sql.given(ids))
        is_small = _is_small(NodeInfo, is_sqlite=self._sql.dialect.name == "sqlite")
        small = PAGE_BYTES // CHANGE_BATCH_SIZE
        return self._reader.all(query.where(is_small).params(small=small)) or ()

    def _existing(self, kind: type[Any]) -> Iterator[tuple[str, str]]:
        """Yield the absent tasks or nodes that exist: the other ones were removed later."""
        if absent := self._absent[kind]:
            key = table_of(kind).c[KEY[kind]]
            query = self._sql.by_ids(kind, [key], self._sql.given(absent))
            for id in self._session.scalars(query):
                if id is not None:
                    yield ENTITY_NAMES[kind], id


@cache
def _statement(sql: Statements, *, is_skipping: bool) -> tuple[str, Sequence[str]]:
    """Return the statement for a page, and the names of its parameters in order."""
    tasks, changes, counters = table_of(Task), ChangeRow.__table__, CounterRow.__table__
    is_sqlite = sql.dialect.name == "sqlite"
    until: sa.BindParameter[int] = sa.bindparam("until")
    # The version of a task is the revision of its last change. The last change of a task that is
    # read brings the content: the last of all, or any if the last one is not on this page.
    brings_task = sa.or_(tasks.c.version <= changes.c.revision, tasks.c.version > until)
    is_wanted = sa.and_(changes.c.revision > sa.bindparam("since"), changes.c.revision <= until)
    if is_skipping:
        known: sa.BindParameter[Any] = sa.bindparam("skipped")
        skipped: sa.Select[Any] = (
            sa.select(sa.func.json_each(known).table_valued("value").c.value)
            if is_sqlite
            else sa.select(sa.func.unnest(sa.cast(known, ARRAY(sa.BigInteger))))
        )
        brings_task = sa.or_(brings_task, tasks.c.version.in_(skipped))
        is_wanted = sa.and_(is_wanted, changes.c.revision.not_in(skipped))
    rows = changes.outerjoin(
        tasks,
        sa.and_(
            changes.c.item == sa.literal_column(f"'{_TASK}'"),
            tasks.c.task_id == changes.c.item_id,
            brings_task,
            _is_small(Task, is_sqlite=is_sqlite),
        ),
    )
    longest: sa.ColumnElement[int] = sa.literal_column(str(REASON_CHARACTERS + 1))
    text = sa.cast(changes.c.reason, sa.Text)
    reason = sa.func.substr(text, sa.literal_column("1"), longest)
    columns = [
        *(reason.label(name) if name == "reason" else changes.c[name] for name in STEP),
        *(tasks.c[name] for name in FIELDS[Task]),
    ]
    state = [CounterRow.revision, CounterRow.heartbeats, counters.c.compacted]
    if is_sqlite:
        # One row: for each row SQLite's driver releases the interpreter's lock and waits for it
        # again. Even without other threads, one row takes two thirds of the time of many.
        texts = sa.func.json_group_array(sa.func.json_array(*columns))
        batch = sa.select(texts).select_from(rows).where(is_wanted).scalar_subquery()
        query = sa.select(*state, batch)
    else:
        # JSON as text: for values of the type JSON the driver calls a Python function.
        texts_of = [
            sa.cast(one, sa.Text).label(one.name) if one.name in JSON_FIELDS[Task] else one
            for one in columns
        ]
        page = sa.select(*texts_of).select_from(rows).where(is_wanted).subquery()
        query = sa.select(*state, page).select_from(counters.outerjoin(page, sa.true()))
        query = query.order_by(page.c.revision)
    query = query.where(counters.c.id == sa.literal_column("1"))
    compiled: Any = sql.compile(query)
    return str(compiled), tuple(compiled.positiontup or ())


def _is_small(kind: type[Any], *, is_sqlite: bool) -> sa.ColumnElement[bool]:
    """Return the condition for rows so small that a full batch of them fits into a page."""
    columns = [
        one
        for one in table_of(kind).c
        if one.name in JSON_FIELDS[kind] or isinstance(one.type, sa.Text | SealableText)
    ]
    most = sa.bindparam("small", type_=sa.BigInteger)

    def total(length: Callable[[Any], Any]) -> sa.ColumnElement[int]:
        return reduce(
            add, (sa.func.coalesce(length(one), sa.literal_column("0")) for one in columns)
        )

    if is_sqlite:
        # `octet_length` does not read the value; before 3.43, `length` has to.
        is_new = sqlite3.sqlite_version_info >= (3, 43)
        return total(sa.func.octet_length if is_new else sa.func.length) <= most
    # The stored size comes first: to find the other one, the server decompresses the value.
    size = total(lambda one: sa.func.octet_length(sa.cast(one, sa.Text)))
    return sa.case((total(sa.func.pg_column_size) <= most, size <= most), else_=sa.false())


def _fetch(session: Session, sql: str, *parameters: Any) -> Sequence[Any]:
    connection = session.connection()
    if connection.dialect.name == "sqlite":  # one hop to the thread of the driver, instead of four
        fetch = methodcaller("execute_fetchall", sql, parameters)
        rows: Sequence[Any] = connection.connection.run_async(fetch)
        return rows
    return fetch_raw_rows(connection.exec_driver_sql(sql, parameters))
