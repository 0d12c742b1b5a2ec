"""The check of tasks and nodes: the database picks suspicious rows, the domain judges them."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from typing import Any

from sqlalchemy import (
    ColumnElement,
    Text,
    and_,
    case,
    false,
    func,
    literal_column,
    not_,
    or_,
    select,
    true,
    type_coerce,
)
from sqlalchemy.ext.asyncio import AsyncSession
from sqlalchemy.orm import aliased

from openclaw_store.backends import shield_until_done, unreadable_value
from openclaw_store.database import COLUMNS, FIELDS, ROWS, ChangeRow, Json, statements_in, table_of
from openclaw_store.domain import (
    ENTITY_NAMES,
    FINISHED,
    JSON_FIELDS,
    KEY,
    NodeInfo,
    Raw,
    Record,
    Task,
    encode,
    is_progress,
    missing_time,
)
from openclaw_store.errors import InvalidDataError, safe_repr
from openclaw_store.maintenance.domains import (
    DISORDER,
    FUTURE,
    PLANNED,
    is_endless,
    suspicious_rows,
)
from openclaw_store.maintenance.findings import MOST, Findings, Key, label
from openclaw_store.maintenance.progress import Progress, Report
from openclaw_store.maintenance.repair import CountTasks, SetStatusTime
from openclaw_store.maintenance.revisions import BATCH, Revisions
from openclaw_store.maintenance.text_checks import undecodable
from openclaw_store.repositories import decoder_here, read_rows

PAGE = 250
"""Suspicious rows that are read together."""


class References:
    """The references of rows to the feed: the changes they name, and changes they should name."""

    def __init__(self, newest: int, compacted: int) -> None:
        self.newest = newest
        """The newest revision."""
        self.compacted = compacted
        """The feed was compacted up to this revision."""
        self.named = Revisions()
        """Changes named by a row, or by the change after them."""
        self.unmatched: dict[Key, int] = {}
        """Versions of rows that are no change of theirs."""
        self.past: dict[Key, tuple[int, str]] = {}
        """Versions of rows that differ from the change of their version, and the difference."""
        self.unreadable: set[Key] = set()
        """Rows that no repair can read."""
        self.omitted = 0

    def check_later(self, changes: dict[Any, int], key: Any, revision: int) -> None:
        """Note a change; the memory is bounded, even if every change is wrong."""
        if len(changes) == MOST:
            self.omitted += 1
        else:
            changes.setdefault(key, revision)


class RowCheck:
    """The check of the rows of one table."""

    def __init__(
        self,
        session: AsyncSession,
        kind: type[Any],
        findings: Findings,
        references: References,
        assigned: dict[str, int],
        now: datetime,
    ) -> None:
        self._session = session
        self._kind = kind
        self._findings = findings
        self._references = references
        self._assigned = assigned
        self._now = now
        self._dialect = session.get_bind().dialect.name
        self._statements = statements_in(session)
        self._columns = table_of(kind).columns
        self._last = aliased(ChangeRow)
        # SQLite has rows without a usable key; any value of it may be one that was written by hand.
        key = self._columns[KEY[kind]]
        self._place: Any = literal_column(f"{ROWS[kind].__tablename__}.rowid")
        if self._dialect != "sqlite":
            self._place = key

    async def run(self, report: Report | None, count: int) -> None:
        """Check all rows."""
        kind, columns = self._kind, self._columns
        progress = Progress(report, f"{ENTITY_NAMES[kind]}s", count)
        query = select(columns.version, case((self._is_suspicious(), self._place)))
        async for rows in read_rows(self._session, self._joined(query), BATCH):
            self._references.named.update(
                version for version, place in rows if place is None and version
            )
            places = [place for _, place in rows if place is not None]
            for start in range(0, len(places), PAGE):
                await self._judge_all(places[start : start + PAGE])
            progress.add(len(rows))
        if self._dialect == "sqlite":
            texts = [
                one for one in columns if one.type.python_type is str or isinstance(one.type, Json)
            ]
            for place in await undecodable(self._session, self._place, texts):
                await self._judge_all([place])
        names = ("times", "limits") if kind is Task else ("running_tasks", "limits")
        self._findings.count(progress.done, "values", "json", "version", *names)

    def _is_suspicious(self) -> ColumnElement[bool]:
        # Nodes are few, and each has its number of tasks to compare; the database cannot see the
        # damage of a sealed value.
        if self._kind is NodeInfo or self._statements is not self._statements.without_keys:
            return true()
        columns, last, references = self._columns, self._last, self._references
        agrees = and_(
            columns.version <= references.newest,
            last.item == ENTITY_NAMES[self._kind],
            last.item_id == columns[KEY[self._kind]],
            last.to_status == columns.status,
            last.node.is_not_distinct_from(columns.assigned_node),
        )
        is_compacted = and_(columns.version <= references.compacted, last.item.is_(None))
        is_known = or_(columns.version == 0, is_compacted, agrees)
        return or_(
            suspicious_rows(self._kind, self._dialect, self._now),
            not_(func.coalesce(is_known, false())),
        )

    def _joined(self, query: Any) -> Any:
        last = self._last
        return query.outerjoin_from(ROWS[self._kind], last, last.revision == self._columns.version)

    async def _judge_all(self, places: Sequence[Any]) -> None:
        """Read suspicious rows, and judge each; one that cannot be read is found by halves."""
        if not places:
            return
        last = self._last
        query = select(*COLUMNS[self._kind], last.item, last.item_id, last.to_status, last.node)
        if self._kind is NodeInfo:
            columns = self._columns
            query = query.add_columns(columns.beat, type_coerce(columns.progress, Text))
        try:
            found = [
                row
                async for rows in read_rows(
                    self._session, self._joined(query).where(self._place.in_(places)), None
                )
                for row in rows
            ]
        except Exception as error:
            cause = unreadable_value(error)
            if cause is None:
                raise
            if len(places) == 1:
                await self._name_unreadable(places[0], cause)
                return
            middle = len(places) // 2
            await self._judge_all(places[:middle])
            await self._judge_all(places[middle:])
            return
        # On a thread: large rows would stop the event loop.
        decode = decoder_here(self._session, self._kind)
        await shield_until_done(asyncio.to_thread(self._judge_each, found, decode))

    async def _name_unreadable(self, place: Any, cause: BaseException) -> None:
        """Add the problem of a row that the driver cannot read."""
        version = await self._session.scalar(
            select(self._columns.version).where(self._place == place)
        )
        if type(version) is int:  # else its change would be named as one without a row
            self._references.named.update([version])
        key: Key | None = None
        name = f"Row {place} of {ROWS[self._kind].__tablename__}"
        try:
            query = select(self._columns[KEY[self._kind]]).where(self._place == place)
            id = await self._session.scalar(query)
        except Exception as error:
            if unreadable_value(error) is None:
                raise
        else:
            if isinstance(id, str):
                key = ENTITY_NAMES[self._kind], id
                name = label(key)
                self._references.unreadable.add(key)
        self._findings.add("values", f"{name} has a value that cannot be read: {cause}.", key)

    def _judge_each(self, rows: Sequence[Raw], decode: Callable[[Raw], Any]) -> None:
        for row in rows:
            self._judge(row, decode)

    def _judge(self, row: Raw, decode: Callable[[Raw], Any]) -> None:
        names = FIELDS[self._kind]
        raw, change = row[: len(names)], row[len(names) : len(names) + 4]
        if not isinstance(raw[0], str):
            self._findings.add("values", f"The {names[0]} {safe_repr(raw[0])} is not text.")
            return
        key = ENTITY_NAMES[self._kind], raw[0]
        values = dict(zip(names, raw, strict=True))
        if not self._check_values(key, raw, decode):
            self._references.unreadable.add(key)
        if type(values["version"]) is int:  # else `_check_values` has reported it
            self._check_version(key, values, change)
        if self._kind is NodeInfo:
            running, count = values["running_tasks"], self._assigned.pop(raw[0], 0)
            if running != count:
                text = f"{label(key)} has running_tasks={safe_repr(running)}, but {count} tasks."
                is_readable = key not in self._references.unreadable
                repair = CountTasks(raw[0]) if is_readable else None
                self._findings.add("running_tasks", text, key, repair)
            self._check_unversioned(key, *row[-2:])

    def _check_values(self, key: Key, raw: Raw, decode: Callable[[Raw], Any]) -> bool:
        """Check the fields of a row; return whether it can be read."""
        add, kind = self._findings.add, self._kind
        try:
            record = decode(raw)
            encode(record.copy())
        except InvalidDataError as error:
            name = "json" if error.field in JSON_FIELDS[kind] else "values"
            add(name, f"{label(key)} has a value that cannot be read: {error}.", key)
            return False
        for name in FIELDS[kind]:
            moment = getattr(record, name)
            if not isinstance(moment, datetime):
                continue
            if is_endless(moment):
                add("values", f"{label(key)} has an endless {name}.", key)
            elif name not in PLANNED and moment > self._now + FUTURE:
                add("times", f"{label(key)} has the {name} {moment:%Y-%m-%d}, in the future.", key)
        if kind is Task:
            self._check_task(key, record)
        elif record.successful_tasks + record.failed_tasks > record.total_tasks_processed:
            text = (
                f"{label(key)} has ended {record.successful_tasks} tasks well and "
                f"{record.failed_tasks} badly, but {record.total_tasks_processed} in total."
            )
            add("limits", text, key)
        return True

    def _check_task(self, key: Key, task: Record[Any]) -> None:
        add, status = self._findings.add, task.status.value
        for name in missing_time(task, task.updated_at):
            text = f"{label(key)} is {status}, and has no {name}."
            add("times", text, key, SetStatusTime(key[1]))
        start, end = task.started_at, task.completed_at
        if end is not None and task.status not in FINISHED:
            text = f"{label(key)} is {status}, and has a completed_at."
            self._findings.remark("times", text, key)
        elif start is not None and end is not None and end < start - DISORDER:
            text = (
                f"{label(key)} was completed {(start - end).total_seconds():g} s before its start."
            )
            add("times", text, key)
        for count, limit in (("retry_count", "max_retries"), ("losses", "max_losses")):
            number, most = getattr(task, count), getattr(task, limit)
            if most is not None and number > most:
                add("limits", f"{label(key)} has {count}={number}, but {limit}={most}.", key)

    def _check_unversioned(self, key: Key, beat: Any, progress: Any) -> None:
        if type(beat) is not int or beat < 0:
            self._findings.add("values", f"{label(key)} has the beat {safe_repr(beat)}.", key)
        if progress is None:
            return
        try:
            text = self._statements.load_progress(key[1], progress)
        except InvalidDataError as error:
            self._findings.add("json", f"{label(key)}: {error}.", key)
            return
        if not is_progress(text):
            problem = f"{label(key)} has progress that cannot be read: {safe_repr(text)}."
            self._findings.add("json", problem, key)

    def _check_version(self, key: Key, values: Mapping[str, Any], change: Raw) -> None:
        version, references = values["version"], self._references
        if version == 0:  # inserted by hand, without a change
            return
        if not 0 < version <= references.newest:
            text = f"{label(key)} has version {version}, but the newest is {references.newest}."
            self._findings.add("version", text, key)
            references.check_later(references.unmatched, key, version)
            return
        item, id, status, node = change
        if (item, id) != key or not isinstance(status, str):
            # A compacted change is legally missing; one of another entity never is.
            if version > references.compacted or item is not None:
                references.check_later(references.unmatched, key, version)
            return
        references.named.update([version])
        is_task = self._kind is Task
        if values["status"] != status or (is_task and values["assigned_node"] != node):
            now = _state(values["status"], values.get("assigned_node"))
            text = (
                f"{label(key)} is {now}, but {_state(status, node)} in its last change, {version}: "
                "it was changed past the feed."
            )
            references.past[key] = version, text


def _state(status: str, node: str | None) -> str:
    return status if node is None else f"{status} on {node!r}"
