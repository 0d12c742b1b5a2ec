"""Copy: transfer the whole state to another database, of the same kind or of the other one.

An unfinished copy cannot be used: its schema has a revision that no library knows, so it cannot be
opened, and it has no counters, so writers that opened it earlier fail. The name of that revision
contains a fingerprint of the source and a random token of the process that copies. An interrupted
copy continues if the fingerprint is the same, and starts again if not; the token lets a second
process take over from the first.

Sealed values are opened with the keys of the source, and sealed again with the ones of the target.
"""

from __future__ import annotations

import asyncio
import hashlib
import secrets
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import orjson
from sqlalchemy import (
    Column,
    MetaData,
    Select,
    String,
    Table,
    delete,
    func,
    insert,
    select,
    text,
    update,
)
from sqlalchemy.ext.asyncio import AsyncSession

from openclaw_store.backends import qualified, shield_until_done
from openclaw_store.database import (
    COLUMNS,
    COPYING_HEAD,
    FIELDS,
    HEAD,
    Base,
    CounterRow,
    Database,
    NodeRow,
    SealingKeyRow,
    Statements,
    UtcTime,
    WriteTransaction,
    from_microseconds,
    places_of,
    statements_in,
    table_of,
    to_microseconds,
)
from openclaw_store.domain import ConvertRow, Decode, NodeInfo, Raw, Task, encode
from openclaw_store.encryption import Hash
from openclaw_store.errors import InvalidDataError, StoreError
from openclaw_store.maintenance.progress import Progress, Report
from openclaw_store.repositories import read_counters, read_rows

COPY_BATCH_SIZE = 1000
"""Rows read, written and committed together."""

_BATCH_SECONDS = 60.0
"""Time limit of a batch."""

_STALE = "0" * 8
"""A fingerprint that no source has, so the next copy starts again."""

Image = list[Any]
"""The values of a row in a form common to both databases: times are whole microseconds, and no
value is sealed."""


@dataclass(frozen=True, slots=True)
class Copied:
    """Rows copied, and verified in the target."""

    nodes: int
    tasks: int
    changes: int
    checksum: str
    """SHA-256 over all rows; equal states have equal checksums in both kinds of database.

    With keys it is keyed by the primary one: else it would confirm guesses of sealed values."""


class _Source(NamedTuple):
    """The extent of a source."""

    counters: Sequence[int]
    rows: Sequence[int]
    """Number of rows by table."""

    @property
    def fingerprint(self) -> str:
        """A text that changes with each change of a task or the feed, heartbeats aside."""
        revision, _, compacted = self.counters
        text = repr((revision, compacted, self.rows))
        return hashlib.sha256(text.encode()).hexdigest()[: len(_STALE)]


class _Rows:
    """Reads the rows of one table as images, and writes them."""

    def __init__(self, kind: type[Any] | None, table: Table, columns: Sequence[Any]) -> None:
        self.kind = kind
        self.table = table
        self.query: Select[Any] = select(*columns).order_by(*table.primary_key)
        self._times = [
            position
            for position, column in enumerate(columns)
            if isinstance(table.c[column.name].type, UtcTime)
        ]
        names = [column.name for column in columns]
        self._places = places_of(table, names)
        self._owner = [names.index(one) for one in ("item", "item_id") if one in names] or [0]

    async def read(
        self, session: AsyncSession, checksum: Hash, *, checked: bool
    ) -> AsyncIterator[Sequence[Image]]:
        """Read all rows in the order of their primary keys, and add them to the checksum.

        Args:
            checked: Refuse invalid rows.
        """
        sql = statements_in(session)
        async for rows in read_rows(session, self.query, COPY_BATCH_SIZE):
            # On a thread: large rows would stop the event loop.
            yield await shield_until_done(
                asyncio.to_thread(self._images_of, rows, sql, checksum, checked)
            )

    def _images_of(
        self, rows: Sequence[Raw], sql: Statements, checksum: Hash, checked: bool
    ) -> Sequence[Image]:
        if checked and self.kind is not None:
            self._check(rows, self.kind, sql.decode[self.kind])
        images = [list(row) for row in rows]
        self._convert(sql.protection.loading_row(self._places), images)
        if sql.dialect.name != "sqlite":
            for position in self._times:
                for image in images:
                    if image[position] is not None:
                        image[position] = to_microseconds(sql.from_moment(image[position]))
        _add(checksum, images)
        return images

    def _convert(self, convert: ConvertRow, images: Sequence[Image]) -> None:
        if self._places:
            for image in images:
                convert(":".join([image[position] for position in self._owner]), image)

    def _check(self, rows: Sequence[Raw], kind: type[Any], decode: Decode) -> None:
        width = len(FIELDS[kind])
        for row in rows:
            try:
                encode(decode(row[:width]).copy())
            except InvalidDataError as error:
                raise InvalidDataError(
                    error.field,
                    f"{error.reason} (in the row {row[0]!r} of {self.table}): repair it, and copy "
                    "again; verify finds all such rows",
                ) from error

    def write(
        self, transaction: WriteTransaction, batches: Sequence[Sequence[Image]]
    ) -> Sequence[None]:
        """Insert batches of rows."""
        cursor = transaction.cursor
        sql = transaction.sql
        store = sql.protection.storing_row(self._places)
        for batch in batches:
            batch = [image.copy() for image in batch]  # it is written again after a failed attempt
            self._convert(store, batch)
            images = batch if cursor.dialect == "sqlite" else [*map(self._with_datetimes, batch)]
            if self.kind is None:
                cursor.write(sql.insert_into(self.table), images)
                continue
            insert, _ = sql.insert[self.kind]
            width = len(FIELDS[self.kind])
            cursor.write(insert, [image[:width] for image in images])
            if self.kind is NodeInfo:
                heartbeats, _ = sql.update(NodeInfo, frozenset({"version", "beat"}))
                cursor.write(heartbeats, [(image[0], *image[width - 1 :]) for image in images])
        return [None] * len(batches)

    def _with_datetimes(self, image: Image) -> Image:
        values = image.copy()
        for position in self._times:
            if values[position] is not None:
                values[position] = from_microseconds(values[position])
        return values


def _rows_of(name: str) -> _Rows:
    table = Base.metadata.tables[name]
    return _Rows(None, table, list(table.c))


_TABLES = (
    _Rows(NodeInfo, table_of(NodeInfo), (*COLUMNS[NodeInfo], NodeRow.__table__.c.beat)),
    _Rows(Task, table_of(Task), COLUMNS[Task]),
    *map(
        _rows_of,
        ("changes", "past_changes", "archive_runs", "archive_voids", "outgoing", "incoming"),
    ),
)

_RESUMED = frozenset({"tasks", "changes"})
"""Tables whose changes are all covered by the fingerprint of a source."""

_REVISION = Table("alembic_version", MetaData(), Column("version_num", String(32)))
_NAME = select(_REVISION.c.version_num)
_LOCK = update(_REVISION).values(version_num=_REVISION.c.version_num)


async def copy(source: Database, target: Database, *, report: Report | None = None) -> Copied:
    """Copy all nodes, tasks and changes to an empty database.

    The copy is one snapshot of the source, which may be in use. The target can be used only when
    this returns. After an interruption, call it again: it continues, or starts again if the source
    has changed.

    Args:
        source: Opened if necessary, but never migrated. The caller closes it.
        target: An empty database or a half of a copy, opened if necessary. The caller closes it.
        report: Receives the progress.

    Raises:
        InvalidDataError: If the target is not empty, or is the source; or a row of the source
            cannot be read.
        SchemaMismatchError: If the source has an older schema.
        StoreError: If the target was changed, or another process has begun to copy to it.
    """
    if source.db_path == target.db_path and source.db_path != ":memory:":
        raise InvalidDataError("target", f"{target.db_path} is the source itself: give another")
    await source.initialize(migrate=False)
    seals, keys = source.statements.protection.seals, target.keys
    if seals and keys is not None:
        target.keys = keys.sealing(seals)
    await target.initialize(is_copy_target=True)
    lost = seals - target.statements.protection.seals
    if lost and keys is not None and keys.seal is None:  # it was opened before
        names = ", ".join(sorted(lost))
        raise InvalidDataError("target", f"would have {names} in clear: give KeyRing(seal=…)")
    protections = [one.statements.protection for one in (source, target)]
    new_hash = max(protections, key=lambda one: one.has_keys).new_hash
    async with source.session() as session:
        extent = await _measure(session)
        name = f"{COPYING_HEAD}{extent.fingerprint}-{secrets.token_hex(4)}"
        last_keys = await _begin(target, name)
        checksum = new_hash()
        for rows, last, total in zip(_TABLES, last_keys, extent.rows, strict=True):
            progress = Progress(report if total else None, f"copying {rows.table}", total)
            async for images in rows.read(session, checksum, checked=True):
                new = images if last is None else [one for one in images if one[0] > last]
                if new:
                    await _store(target, name, rows, new)
                progress.add(len(images))
        _add(checksum, [list(extent.counters)])
    found = await _check(target, extent, new_hash(), report)
    if found != checksum.digest():
        async with target.transaction(timeout=_BATCH_SECONDS) as tx:
            await _rename(tx, name, f"{COPYING_HEAD}{_STALE}-{secrets.token_hex(4)}")
        raise StoreError(
            f"{target.db_path} differs from the source: one of them was changed by hand during "
            "the copy: copy again"
        )
    async with target.transaction(timeout=_BATCH_SECONDS) as tx:
        # Only now may the target be opened and written: the check above has read all of it.
        await _rename(tx, name, HEAD)
        _, beat, compacted = extent.counters
        values = {"id": 1, "beat": beat, "compacted": compacted}
        # Its sealed values are bound to this number.
        number = select(SealingKeyRow.cluster_id).limit(1)
        if (cluster_id := await tx.scalar(number)) is not None:
            values["cluster_id"] = cluster_id
        await tx.execute(insert(CounterRow).values(values))
    nodes, tasks, changes, *_ = extent.rows
    return Copied(nodes, tasks, changes, checksum.hexdigest())


async def _measure(session: AsyncSession) -> _Source:
    counts = [
        await session.scalar(select(func.count()).select_from(rows.table)) or 0 for rows in _TABLES
    ]
    return _Source(await read_counters(session), counts)


async def _begin(target: Database, name: str) -> Sequence[Any]:
    """Mark the target with `name`, and return the last key that each of its tables has already."""
    async with target.transaction(timeout=_BATCH_SECONDS) as tx:
        # On PostgreSQL, two processes may be here at once: the second waits for the row.
        await tx.execute(_LOCK)
        before = await tx.scalar(_NAME) or ""
        if not before.startswith(COPYING_HEAD):
            await _require_empty(target, tx)
            # Without counters, writers that opened the target before fail.
            await tx.execute(delete(CounterRow))
        is_same = before.split("-")[:3] == name.split("-")[:3]
        resumed = [is_same and rows.table.name in _RESUMED for rows in _TABLES]
        # The others are always copied again: the fingerprint does not cover a heartbeat.
        for rows in [rows for rows, is_kept in zip(_TABLES, resumed, strict=True) if not is_kept]:
            is_file = target.dialect == "sqlite"
            truncate = text(f"TRUNCATE {qualified(target.schema, rows.table.name)}")
            await tx.execute(delete(rows.table) if is_file else truncate)
        await _rename(tx, before, name)
        return [
            await tx.scalar(select(func.max(*rows.table.primary_key))) if is_kept else None
            for rows, is_kept in zip(_TABLES, resumed, strict=True)
        ]


async def _require_empty(target: Database, tx: AsyncSession) -> None:
    revision = await tx.scalar(select(CounterRow.revision))
    found = [
        str(rows.table) for rows in _TABLES if await tx.scalar(select(select(rows.table).exists()))
    ]
    if found or revision != 0:
        content = f"has rows in {', '.join(found)}" if found else "has had rows"
        raise InvalidDataError("target", f"{target.db_path} {content}: give a new database")


async def _rename(tx: AsyncSession, before: str, name: str) -> None:
    renaming = update(_REVISION).where(_REVISION.c.version_num == before).values(version_num=name)
    result: Any = await tx.execute(renaming)
    if result.rowcount != 1:
        raise StoreError("another process has begun to copy to this database: wait for it")


async def _store(target: Database, name: str, rows: _Rows, images: Sequence[Image]) -> None:
    async with target.transaction(timeout=_BATCH_SECONDS) as tx:
        # Fails if another process has taken the target over: its rows would mix with these.
        await _rename(tx, name, name)
        await target.write_in(tx, rows.write, images)


async def _check(target: Database, extent: _Source, checksum: Hash, report: Report | None) -> bytes:
    """Return the checksum of the rows in the target and the counters of the source."""
    async with target.session() as session:
        for rows, total in zip(_TABLES, extent.rows, strict=True):
            progress = Progress(report if total else None, f"checking {rows.table}", total)
            async for images in rows.read(session, checksum, checked=False):
                progress.add(len(images))
    _add(checksum, [list(extent.counters)])
    return checksum.digest()


def _add(checksum: Hash, images: Sequence[Image]) -> None:
    checksum.update(b"\n".join([*map(orjson.dumps, images), b""]))
