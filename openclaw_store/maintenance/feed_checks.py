"""The check of the feed, backwards: each change is named by a row, or by the change after it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from datetime import datetime
from types import NoneType
from typing import Any

from sqlalchemy import and_, case, or_, select
from sqlalchemy.ext.asyncio import AsyncSession
from sqlalchemy.orm import aliased

from openclaw_store.backends import unreadable_value
from openclaw_store.database import ROWS, Base, ChangeRow, from_microseconds
from openclaw_store.domain import (
    ENTITY_KINDS,
    ENTITY_NAMES,
    KEY,
    ChangeKind,
    NodeInfo,
    NodeStatus,
    Raw,
    Task,
    TaskStatus,
)
from openclaw_store.encryption import Sealed
from openclaw_store.errors import InvalidDataError, safe_repr
from openclaw_store.maintenance.domains import (
    FUTURE,
    Condition,
    ill_typed,
    is_endless,
    suspicious_value,
)
from openclaw_store.maintenance.findings import Findings, Key, label
from openclaw_store.maintenance.progress import Progress, Report
from openclaw_store.maintenance.repair import LogUpdate, RemoveFromFeed
from openclaw_store.maintenance.revisions import BATCH
from openclaw_store.maintenance.row_checks import PAGE, References
from openclaw_store.maintenance.text_checks import undecodable
from openclaw_store.repositories import read_rows

_STATUSES = {
    ENTITY_NAMES[Task]: {str(one) for one in TaskStatus},
    ENTITY_NAMES[NodeInfo]: {str(one) for one in NodeStatus},
}
_NAMES, _ENDS, _GONE, _ILL, _UNLINKED, _ODD = 1, 2, 4, 8, 16, 32
"""The bits of a change: it names the change before it; it removes its row; it removed its history
as well; it does not tell its row or status, so that nothing can be concluded from it; it follows
no change that leads to it; another value is suspicious."""

_LINKS = frozenset({"item", "item_id", "from_status", "to_status", "previous"})
"""The columns that link changes and rows."""

_NAMES_OF_VALUES = frozenset({"item", "kind", "from_status", "to_status"})
"""The columns with few values."""

# SQLite stores any type in any column but the first.
_TYPES: Sequence[Any] = (
    int, (int, datetime), str, str, str,
    *[(str, NoneType)] * 3, (str, NoneType, Sealed), (int, NoneType),
)  # fmt: skip
"""The types of the columns, as the drivers give them."""


class FeedCheck:
    """The check of the changes; the rows were checked before, which name their last changes."""

    def __init__(
        self, session: AsyncSession, findings: Findings, references: References, now: datetime
    ) -> None:
        self._session = session
        self._findings = findings
        self._references = references
        self._now = now
        self._dialect = session.get_bind().dialect.name
        self._unnamed: dict[int, int] = {}
        """Changes that nothing names: the last one of each entity."""

    async def run(self, report: Report | None, count: int) -> None:
        """Check all changes, newest first."""
        references, change, before = self._references, ChangeRow, aliased(ChangeRow)
        follows = and_(
            before.item == change.item,
            before.item_id == change.item_id,
            before.to_status.is_not_distinct_from(change.from_status),
            change.previous < change.revision,
        )
        is_gone = and_(
            change.kind == ChangeKind.REMOVED.value,
            change.previous.is_not(None),
            before.item.is_(None),
        )
        # Each condition once: SQLite does not notice that it evaluates one again.
        link = case(
            (or_(*self._suspicious_values(of_links=True)), _ILL),
            (change.previous.is_(None), 0),
            (follows, _NAMES),
            (is_gone, _GONE),
            (and_(before.item.is_(None), change.previous <= references.compacted), 0),
            else_=_UNLINKED,
        )
        odd_values = or_(*self._suspicious_values(of_links=False), *self._contradictions())
        state = (
            link
            + case((change.to_status.is_(None), _ENDS), else_=0)
            + case((odd_values, _ODD), else_=0)
        )
        query = (
            select(change.revision, change.previous, state)
            .outerjoin_from(change, before, before.revision == change.previous)
            .order_by(change.revision.desc())
        )
        progress = Progress(report, "changes", count)
        successor = references.newest + 1
        removed = 0  # up to this revision, clean-up has removed the histories of tasks
        compacted, names = references.compacted, references.named
        async for rows in read_rows(self._session, query, BATCH):
            odd: list[int] = []
            for revision, previous, state in rows:
                # Newest first: `successor` is the change after this one in the whole feed.
                if revision != successor - 1:
                    self._check_gap(revision, successor, removed)
                if revision <= compacted < successor:
                    text = f"Change {revision} was compacted, but is still there."
                    self._findings.add("feed", text)
                successor = revision
                if state >= _GONE:
                    if state & (_ILL | _UNLINKED | _ODD):
                        odd.append(revision)
                    if state & _GONE:
                        removed = max(removed, previous)
            names.update(previous for _, previous, state in rows if state & _NAMES)
            lasting = (revision for revision, _, state in rows if not state & (_ENDS | _ILL))
            for revision in names.missing(lasting):
                references.check_later(self._unnamed, revision, revision)
            for start in range(0, len(odd), PAGE):
                await self._judge_all(odd[start : start + PAGE])
            progress.add(len(rows))
        self._check_gap(compacted, successor, removed)
        if self._dialect == "sqlite":
            columns = Base.metadata.tables[ChangeRow.__tablename__].columns
            texts = [columns.reason, columns.node]
            has_text = or_(change.reason.is_not(None), change.node.op("GLOB")("*[^ -~]*"))
            for place in await undecodable(self._session, change.revision, texts, has_text):
                await self._judge_all([place])
        self._findings.count(progress.done, "feed", "changes")
        await self._check_unnamed()

    def _suspicious_values(self, *, of_links: bool) -> list[Condition]:
        columns = Base.metadata.tables[ChangeRow.__tablename__].columns
        return [
            ill_typed(one, self._dialect)  # `_contradictions` has the values of the others
            if one.name in _NAMES_OF_VALUES
            else suspicious_value(one, self._dialect, self._now)
            for one in columns
            if (one.name in _LINKS) is of_links
        ]

    def _contradictions(self) -> Iterator[Condition]:
        row = ChangeRow
        yield row.item.not_in(sorted(_STATUSES))
        yield row.kind != case(
            (row.from_status.is_(None), ChangeKind.CREATED.value),
            (row.to_status.is_(None), ChangeKind.REMOVED.value),
            (row.from_status == row.to_status, ChangeKind.UPDATED.value),
            else_=ChangeKind.STATUS.value,
        )
        for item, statuses in _STATUSES.items():
            for column in (row.from_status, row.to_status):
                yield and_(row.item == item, column.not_in(sorted(statuses)))

    async def _judge_all(self, revisions: Sequence[int]) -> None:
        """Read suspicious changes, and judge each; one that cannot be read is found by halves."""
        if not revisions:
            return
        before = aliased(ChangeRow)
        query = (
            select(
                *ChangeRow.__table__.c,
                before.revision,
                before.item,
                before.item_id,
                before.to_status,
            )
            .outerjoin_from(ChangeRow, before, before.revision == ChangeRow.previous)
            .where(ChangeRow.revision.in_(revisions))
            .order_by(ChangeRow.revision.desc())
        )
        try:
            found = [row async for rows in read_rows(self._session, query, None) for row in rows]
        except Exception as error:
            cause = unreadable_value(error)
            if cause is None:
                raise
            if len(revisions) == 1:
                text = f"Change {revisions[0]} has a value that cannot be read: {cause}."
                self._findings.add("feed", text)
                return
            middle = len(revisions) // 2
            await self._judge_all(revisions[:middle])
            await self._judge_all(revisions[middle:])
            return
        for row in found:
            self._judge(row)

    def _judge(self, row: Raw) -> None:
        revision, changed_at, item, id, kind, was, status, _, _, previous = row[: len(_TYPES)]
        if not all(map(isinstance, row, _TYPES)):
            text = f"Change {revision} has a value of a wrong type: {safe_repr(row)}."
            self._findings.add("feed", text)
            return
        key = item, id
        try:
            at = from_microseconds(changed_at) if isinstance(changed_at, int) else changed_at
        except InvalidDataError as error:
            text = f"Change {revision} of {label(key)} has a time that cannot be read: {error}."
            self._findings.add("feed", text, key)
            return
        if is_endless(at):
            self._findings.add("feed", f"Change {revision} has an endless time.", key)
        elif at > self._now + FUTURE:
            text = f"Change {revision} of {label(key)} was made in the future, {at:%Y-%m-%d}."
            self._findings.add("times", text, key)
        known = {None, *_STATUSES.get(item, ())}
        if {was, status} - known or kind != _kind_of(was, status):
            text = (
                f"Change {revision} of {label(key)} has the kind {kind!r}, and leads from {was} to "
                f"{status}."
            )
            self._findings.add("feed", text, key)
        there, *previous_key, previous_status = row[len(_TYPES) :]
        if previous is None or (there is None and kind == ChangeKind.REMOVED):
            return  # a removal with its history leaves no older change
        if there is None:
            if previous > self._references.compacted:
                text = f"Change {revision} follows {previous}, which is missing."
                self._findings.add("feed", text, key)
        elif tuple(previous_key) != key or previous_status != was or previous >= revision:
            text = (
                f"Change {revision} of {label(key)} follows {previous}, which has another task or "
                "node, or does not lead to it."
            )
            self._findings.add("feed", text, key)

    def _check_gap(self, revision: int, successor: int, removed: int) -> None:
        """Check that all changes between two neighbours were compacted or cleaned up."""
        first = max(revision, removed, self._references.compacted) + 1
        if first < successor:
            is_one = first + 1 == successor
            missing = f"Change {first} is" if is_one else f"Changes {first} to {successor - 1} are"
            self._findings.add("feed", f"{missing} missing, and no clean-up has removed them.")

    async def _check_unnamed(self) -> None:
        """Check last changes without a row, and rows without their last change."""
        revisions, newest = list(self._unnamed), self._references.newest
        unmatched = self._references.unmatched
        for start in range(0, len(revisions), PAGE):
            query: Any = (
                select(ChangeRow.revision, ChangeRow.item, ChangeRow.item_id)
                .where(ChangeRow.revision.in_(revisions[start : start + PAGE]))
                .order_by(ChangeRow.revision.desc())
            )
            async for rows in read_rows(self._session, query, None):
                for revision, item, id in rows:
                    if item in ENTITY_KINDS and isinstance(id, str):
                        await self._check_last((item, id), revision)
                        unmatched.pop((item, id), None)
        for key, (version, text) in self._references.past.items():
            self._findings.add("version", text, key, self._log_update(key, version, version))
        for key, version in unmatched.items():
            if 0 <= version <= newest:
                text = f"{label(key)} has version {version}, which is no change of it."
                self._findings.add("version", text, key, self._log_update(key, version, None))

    async def _check_last(self, key: Key, revision: int) -> None:
        """Check the row of an entity of which nothing names a change."""
        add, kind, unmatched = self._findings.add, ENTITY_KINDS[key[0]], self._references.unmatched
        columns = ROWS[kind].__table__.c
        query = select(columns.version).where(columns[KEY[kind]] == key[1])
        row = (await self._session.execute(query)).first()
        version = 0 if row is None else row.version
        if row is None:
            text = f"{label(key)} is gone, but its last change, {revision}, is no removal."
            add("changes", text, key, RemoveFromFeed(kind, key[1], revision))
        elif type(version) is not int:
            pass  # the check of its values has reported it
        elif version < revision or key in unmatched:
            if 0 <= version <= self._references.newest:  # else the check of its row has reported it
                text = f"{label(key)} has version {version}, but last changed in {revision}."
                add("version", text, key, self._log_update(key, version, revision))
            self._references.past.pop(key, None)  # the same repair
        else:
            text = f"No change follows change {revision} of {label(key)}, an older one."
            add("feed", text, key)

    def _log_update(self, key: Key, version: int, last: int | None) -> LogUpdate | None:
        """Return the repair of a version; `None` if it could not read the row."""
        if key in self._references.unreadable:
            return None
        return LogUpdate(ENTITY_KINDS[key[0]], key[1], version, last)


def _kind_of(was: str | None, status: str | None) -> ChangeKind:
    if was is None:
        return ChangeKind.CREATED
    if status is None:
        return ChangeKind.REMOVED
    return ChangeKind.UPDATED if was == status else ChangeKind.STATUS
