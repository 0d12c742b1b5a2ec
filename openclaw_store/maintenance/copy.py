"""Copies the whole state to another database, of the same kind or of the other one.

While a copy is being made, nobody can take it for a database: its schema goes by a name that no
library knows, so that it cannot be opened, and it has no counters, so that nobody writes who has
opened it before. The name tells besides what is copied, and by whom: a copy that was interrupted
goes on if its source is still the same, and starts anew if not; of two who copy to the same place
the second takes over.
"""

from __future__ import annotations

import hashlib
import secrets
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import orjson
from sqlalchemy import Select, Table, delete, func, insert, select, text
from sqlalchemy.ext.asyncio import AsyncSession

from openclaw_store.database import (
    COLUMNS,
    COPYING_HEAD,
    FIELDS,
    HEAD,
    ChangeRow,
    CounterRow,
    Database,
    NodeRow,
    UtcTime,
    WriteTransaction,
    from_microseconds,
    statements_for,
    table_of,
    to_microseconds,
)
from openclaw_store.domain import Decode, NodeInfo, Raw, Task, encode
from openclaw_store.errors import InvalidDataError, StoreError
from openclaw_store.maintenance.progress import Progress, Report
from openclaw_store.repositories import counters_of, decoder_here, read_rows

COPY_BATCH_SIZE = 1000
"""Rows that are read, written and committed together."""

_BATCH_SECONDS = 60.0
"""How long a batch may take."""

_STALE = "0" * 8
"""Stands for a source that nothing is like, so that the next copy starts anew."""

Image = list[Any]
"""The values of a row in the form that both databases share: times are whole microseconds."""


@dataclass(frozen=True, slots=True)
class Copied:
    """What was copied, and found again in the target."""

    nodes: int
    tasks: int
    changes: int
    checksum: str
    """SHA-256 over all rows, which is the same for the same state in both kinds of database."""


class _Source(NamedTuple):
    """What there is to be copied."""

    counters: Sequence[int]
    rows: Sequence[int]
    """How many there are in each of the tables."""

    @property
    def mark(self) -> str:
        """Differs whenever a task or its history does; heartbeats make no difference."""
        revision, _, compacted = self.counters
        text = repr((revision, compacted, self.rows))
        return hashlib.sha256(text.encode()).hexdigest()[: len(_STALE)]


class _Rows:
    """The rows of one table, read as images and written."""

    def __init__(self, kind: type[Any] | None, table: Table, columns: Sequence[Any]) -> None:
        self.kind = kind
        self.table = table
        self.query: Select[Any] = select(*columns).order_by(*table.primary_key)
        kinds = [table.c[column.name].type for column in columns]
        self._times = [place for place, one in enumerate(kinds) if isinstance(one, UtcTime)]

    async def read(self, session: AsyncSession, *, checked: bool) -> AsyncIterator[Sequence[Image]]:
        """All rows, in the order of their keys.

        Args:
            checked: Whether to refuse those that no task or node can be made of.
        """
        sql = statements_for(session.get_bind().dialect.name)
        async for rows in read_rows(session, self.query, COPY_BATCH_SIZE):
            if checked and self.kind is not None:
                self._check(rows, self.kind, decoder_here(session, self.kind))
            images = [list(row) for row in rows]
            if sql.dialect.name != "sqlite":
                for place in self._times:
                    for image in images:
                        if image[place] is not None:
                            image[place] = to_microseconds(sql.from_moment(image[place]))
            yield images

    def _check(self, rows: Sequence[Raw], kind: type[Any], decode: Decode) -> None:
        width = len(FIELDS[kind])
        for row in rows:
            try:
                encode(decode(row[:width]).copy())
            except InvalidDataError as error:
                raise InvalidDataError(
                    error.field,
                    f"{error.reason} (in the row {row[0]!r} of {self.table}): mend it, and copy "
                    "again; verify finds all such rows",
                ) from error

    def write(
        self, transaction: WriteTransaction, batches: Sequence[Sequence[Image]]
    ) -> Sequence[None]:
        """Insert rows."""
        sql = statements_for(transaction.cursor.dialect)
        for batch in batches:
            images = (
                batch if transaction.cursor.dialect == "sqlite" else list(map(self._native, batch))
            )
            if self.kind is None:
                transaction.cursor.write(sql.insert_change, images)
                continue
            insert, _ = sql.insert[self.kind]
            width = len(FIELDS[self.kind])
            transaction.cursor.write(insert, [image[:width] for image in images])
            if self.kind is NodeInfo:
                heartbeats, _ = sql.update(NodeInfo, frozenset({"version", "beat"}))
                transaction.cursor.write(
                    heartbeats, [(image[0], *image[width - 1 :]) for image in images]
                )
        return [None] * len(batches)

    def _native(self, image: Image) -> Image:
        """The values as PostgreSQL's driver takes them."""
        native = image.copy()
        for place in self._times:
            if native[place] is not None:
                native[place] = from_microseconds(native[place])
        return native


_TABLES = (
    _Rows(NodeInfo, table_of(NodeInfo), (*COLUMNS[NodeInfo], NodeRow.__table__.c.beat)),
    _Rows(Task, table_of(Task), COLUMNS[Task]),
    _Rows(None, ChangeRow.metadata.tables["changes"], list(ChangeRow.__table__.c)),
)

_COUNTERS = select(CounterRow.revision, CounterRow.beat, CounterRow.compacted)
_NAME = text("SELECT version_num FROM alembic_version")
_RENAME = text("UPDATE alembic_version SET version_num = :new WHERE version_num = :old")
_LOCK = text("UPDATE alembic_version SET version_num = version_num")


async def copy(source: Database, target: Database, *, report: Report | None = None) -> Copied:
    """Copy all nodes and tasks, and the feed of their changes, to an empty database.

    What is copied is one picture of the source, which may be read and written meanwhile. The copy
    can be used when this returns, and not before. If it is interrupted, do the same again: it goes
    on where it stopped, or starts anew if the source was changed since.

    Args:
        source: Is opened if it is not, but never migrated.
        target: A database that has nothing of its own. Is opened if it is not: one that was half
            copied can be opened in no other way. The caller closes both.
        report: Is told how far it is.

    Raises:
        InvalidDataError: If the target is not empty, or is the source; or a row of the source
            cannot be read.
        SchemaMismatchError: If the source has an older schema.
        StoreError: If somebody else has begun to copy to the target, or has changed it.
    """
    if source.db_path == target.db_path and source.db_path != ":memory:":
        raise InvalidDataError("target", f"{target.db_path} is the source itself: give another")
    await source.initialize(migrate=False)
    await target.initialize(is_copy_target=True)
    async with source.session() as session:
        there = await _survey(session)
        name = f"{COPYING_HEAD}{there.mark}-{secrets.token_hex(4)}"
        behind = await _begin(target, name)
        checksum = hashlib.sha256()
        for rows, last, total in zip(_TABLES, behind, there.rows, strict=True):
            progress = Progress(report, f"copying {rows.table}", total)
            async for images in rows.read(session, checked=True):
                _add(checksum, images)
                new = images if last is None else [one for one in images if one[0] > last]
                if new:
                    await _store(target, name, rows, new)
                progress.add(len(images))
        _add(checksum, [list(there.counters)])
    found = await _check(target, there, report)
    if found != checksum.digest():
        async with target.transaction(timeout=_BATCH_SECONDS) as tx:
            await _rename(tx, name, f"{COPYING_HEAD}{_STALE}-{secrets.token_hex(4)}")
        raise StoreError(
            f"{target.db_path} is not what was copied: somebody has changed it, or the source by "
            "hand, meanwhile: copy again"
        )
    async with target.transaction(timeout=_BATCH_SECONDS) as tx:
        await _rename(tx, name, HEAD)
        revision, beat, compacted = there.counters
        values = {"id": 1, "revision": revision, "beat": beat, "compacted": compacted}
        await tx.execute(insert(CounterRow).values(values))
    nodes, tasks, changes = there.rows
    return Copied(nodes, tasks, changes, checksum.hexdigest())


async def _survey(session: AsyncSession) -> _Source:
    found = (await session.execute(_COUNTERS)).all()
    revision, beat = counters_of(found)
    counts = [
        await session.scalar(select(func.count()).select_from(rows.table)) or 0 for rows in _TABLES
    ]
    return _Source((revision, beat, found[0].compacted), counts)


async def _begin(target: Database, name: str) -> Sequence[Any]:
    """Take the target for oneself; returns the last keys of the tables that it has already."""
    async with target.transaction(timeout=_BATCH_SECONDS) as tx:
        await tx.execute(_LOCK)  # on PostgreSQL, others may be doing the same
        before = await tx.scalar(_NAME) or ""
        if not before.startswith(COPYING_HEAD):
            await _require_empty(target, tx)
            await tx.execute(delete(CounterRow))
        is_same = before.split("-")[:3] == name.split("-")[:3]
        nodes, *others = _TABLES
        for rows in [nodes] if is_same else _TABLES:  # heartbeats may have come meanwhile
            is_file = target.dialect == "sqlite"
            await tx.execute(delete(rows.table) if is_file else text(f"TRUNCATE {rows.table}"))
        await _rename(tx, before, name)
        return [
            None,
            *[await tx.scalar(select(func.max(*rows.table.primary_key))) for rows in others],
        ]


async def _require_empty(target: Database, tx: AsyncSession) -> None:
    counters = (await tx.execute(_COUNTERS)).one_or_none()
    revision = None if counters is None else counters.revision
    found = [
        str(rows.table) for rows in _TABLES if await tx.scalar(select(select(rows.table).exists()))
    ]
    if found or revision != 0:
        what = f"has rows in {', '.join(found)}" if found else "had a state of its own"
        raise InvalidDataError("target", f"{target.db_path} {what}: give a database that is new")


async def _rename(tx: AsyncSession, before: str, name: str) -> None:
    result: Any = await tx.execute(_RENAME, {"old": before, "new": name})
    if result.rowcount != 1:
        raise StoreError("somebody else has begun to copy to the same database: leave it to them")


async def _store(target: Database, name: str, rows: _Rows, images: Sequence[Image]) -> None:
    async with target.transaction(timeout=_BATCH_SECONDS) as tx:
        await _rename(tx, name, name)
        await target.write_in(tx, rows.write, images)


async def _check(target: Database, there: _Source, report: Report | None) -> bytes:
    """The checksum of what the target holds now, with the counters it is to have."""
    checksum = hashlib.sha256()
    async with target.session() as session:
        for rows, total in zip(_TABLES, there.rows, strict=True):
            progress = Progress(report, f"checking {rows.table}", total)
            async for images in rows.read(session, checked=False):
                _add(checksum, images)
                progress.add(len(images))
    _add(checksum, [list(there.counters)])
    return checksum.digest()


def _add(checksum: Any, images: Sequence[Image]) -> None:
    checksum.update(b"\n".join([*map(orjson.dumps, images), b""]))
