"""Rotation: seal all values again by the primary key, or open all of them if there is none.

A value is replaced only if its row still has the version and the value that were read. The content
does not change, so there is no new version and no entry in the feed. A rotation that was
interrupted is started again: it skips the values that are sealed by the primary key already.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import AsyncIterator, Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import TYPE_CHECKING, Any, NamedTuple

from sqlalchemy import (
    Column,
    Integer,
    MetaData,
    Select,
    Table,
    Text,
    bindparam,
    case,
    cast,
    func,
    inspect,
    literal,
    select,
    tuple_,
    type_coerce,
    update,
)
from sqlalchemy.ext.asyncio import AsyncSession
from sqlalchemy.orm import Session

from openclaw_store.backends import fetch_raw_rows, unreadable_value
from openclaw_store.database.row_codec import places_of
from openclaw_store.database.sealing import finish_rotation
from openclaw_store.database.statements import Statements
from openclaw_store.database.tables import Base
from openclaw_store.database.types import SealableText
from openclaw_store.database.write_transaction import WriteTransaction
from openclaw_store.encryption import FIXED_REASONS, SEALED_FIELDS, SealedColumn
from openclaw_store.errors import KeyRingError, SealedValueError, safe_repr

if TYPE_CHECKING:
    from openclaw_store.database.database import Database
    from openclaw_store.encryption.cipher import Cipher

REKEY_BATCH_SIZE = 200
"""Rows sealed in one transaction; other writers get their turn between two of them."""

_MOST_PASSES = 10

Report = Callable[[str, int, int], object]
"""Takes the table, and the numbers of rows that are done and in all."""


def _legacy(name: str) -> Table:
    text_columns = [Column(one, Text) for one in ("item", "item_id")]
    sealed: list[Column[Any]] = [
        Column(one, SealableText(name, one)) for one in SEALED_FIELDS[name]
    ]
    return Table(name, MetaData(), Column("id", Integer, primary_key=True), *text_columns, *sealed)


_TABLES: Sequence[Table] = [
    *(
        Base.metadata.tables[name]
        for name in ("nodes", "tasks", "changes", "past_changes", "outgoing")
    ),
    *map(_legacy, ("legacy_rejected", "legacy_extra")),
]


class KeyUse(NamedTuple):
    """The values of one column that one key has sealed."""

    table: str
    column: str
    key: int | None
    """`None` for values in clear."""
    values: int


@dataclass
class Rekeyed:
    """The result of a rotation; true if nothing is left to do."""

    checked: int = 0
    """Number of rows."""
    changed: int = 0
    """Number of rows that were sealed again, or would be."""
    problems: list[str] = field(default_factory=list)
    """The values that could not be opened, each as a sentence."""

    def __bool__(self) -> bool:
        return not self.problems


class _Change(NamedTuple):
    """The new values of a row."""

    key: Sequence[Any]
    guard: Mapping[str, Any]
    """The version, if the row has one."""
    values: Mapping[str, tuple[str, str]]
    """The old and the new text of columns."""


async def find_unreadable(database: Database) -> Sequence[str]:
    """Return a sentence for each sealed value that cannot be opened, except of tasks and nodes."""
    protection: Any = database.statements.protection
    if not protection.has_keys:
        return []
    one = _Pass(database, protection, dry_run=True, report=None, is_check=True)
    await one.run()
    return one.found.problems


async def rekey(
    database: Database,
    *,
    accept_clear: bool = False,
    dry_run: bool = False,
    report: Report | None = None,
) -> Rekeyed:
    """Rotate the keys; see `Database.rekey`."""
    cipher = _cipher_of(database)
    before = cipher.accepts_clear or cipher.ring.primary is None
    lenient = cipher.reading() if accept_clear or before else cipher
    changed = 0
    for _ in range(_MOST_PASSES):
        one = _Pass(database, lenient, dry_run=dry_run, report=report)
        await one.run()
        changed += one.found.changed
        if dry_run or not one.is_unfinished:
            break
    found, one.found.changed = one.found, changed
    if not dry_run and not one.is_unfinished:
        async with database.transaction() as tx:
            await finish_rotation(tx, cipher, one.left, is_complete=not found.problems)
        # Only after the commit: until then, values in clear are allowed.
        if not found.problems:
            cipher.accepts_clear, cipher.opens = cipher.ring.primary is None, frozenset()
    return found


def _cipher_of(database: Database) -> Cipher:
    protection: Any = database.statements.protection
    if not protection.has_keys:
        raise KeyRingError(
            "there are no keys: open the database with Database(keys=…), or set OPENCLAW_STORE_KEYS"
        )
    cipher: Cipher = protection
    return cipher


class _Pass:
    """One look at all rows."""

    def __init__(
        self,
        database: Database,
        cipher: Cipher,
        *,
        dry_run: bool,
        report: Report | None,
        is_check: bool = False,
    ) -> None:
        self._database = database
        self._cipher = cipher
        self._dry_run = dry_run
        self._report = report
        self._is_check = is_check  # open all values; those of tasks and nodes were opened before
        self.found = Rekeyed()
        self.is_unfinished = False
        """True if a row was changed by another writer, so that it must be looked at again."""
        self.left: set[int] = set()
        """The keys of values that could not be opened."""

    async def run(self) -> None:
        for table in await _existing_tables(self._database):
            if self._is_check and table.name in ("tasks", "nodes"):
                continue
            [(rows,)] = await _fetch(self._database, select(func.count()).select_from(table))
            done = 0
            async for changes, count in self._batches(table):
                done += count
                if changes and not self._dry_run:
                    await self._write(table, changes)
                self.found.changed += len(changes)
                if self._report is not None:
                    self._report(table.name, done, max(rows, done))
            self.found.checked += done

    async def _batches(self, table: Table) -> AsyncIterator[tuple[Sequence[_Change], int]]:
        """Yield the changes of rows by primary key, and the number of rows."""
        keys = list(table.primary_key)
        version = [table.c.version] if "version" in table.c else []
        owner = [table.c[name] for name in ("item", "item_id") if name in table.c] or keys
        places = dict(places_of(table, list(table.c.keys()))).values()
        stored = [type_coerce(table.c[one.column], Text).label(one.column) for one in places]
        query = select(*keys, *version, *owner, *stored).order_by(*keys).limit(REKEY_BATCH_SIZE)
        widths = len(keys), len(keys) + len(version), len(keys) + len(version) + len(owner)
        rest = query
        while True:
            rows, read = await self._read(table, rest)
            changes = []
            for row in rows:
                key, id = row[: widths[0]], ":".join(map(str, row[widths[1] : widths[2]]))
                guard = {"version": row[widths[0]]} if version else {}
                values = self._changes(places, id, row[widths[2] :])
                if values:
                    changes.append(_Change(key, guard, values))
            yield changes, len(read)
            if len(read) < REKEY_BATCH_SIZE:
                return
            last = read[-1]
            rest = query.where(tuple_(*keys) > tuple_(*last, types=[one.type for one in keys]))

    async def _read(
        self, table: Table, query: Select[Any]
    ) -> tuple[Sequence[Any], Sequence[Sequence[Any]]]:
        """Return the rows of a query and their primary keys; one that is no text is a problem."""
        keys = [*table.primary_key]

        def read(session: Session) -> tuple[Sequence[Any], Sequence[Sequence[Any]]]:
            try:
                rows = _rows_of(session, query)
                return rows, [row[: len(keys)] for row in rows]
            except Exception as error:
                if unreadable_value(error) is None:
                    raise
            rows, found = [], _rows_of(session, query.with_only_columns(*keys))
            for key in found:
                one = query.where(*(column == part for column, part in zip(keys, key, strict=True)))
                try:
                    rows += _rows_of(session, one)
                except Exception as error:
                    cause = unreadable_value(error)
                    if cause is None:
                        raise
                    self._add_problem(table.name, key, cause)
            return rows, found

        return await self._database.read(lambda session: session.run_sync(read))

    def _add_problem(self, table: str, key: Sequence[Any], cause: object) -> None:
        name = safe_repr(":".join(map(str, key)))
        self.found.problems.append(f"{table}: a value of {name} cannot be read: {cause}")

    def _changes(
        self, places: Collection[SealedColumn], id: str, stored: Sequence[Any]
    ) -> Mapping[str, tuple[str, str]]:
        values: dict[str, tuple[str, str]] = {}
        for place, old in zip(places, stored, strict=True):
            if not old or (self._cipher.is_current(place, old) and not self._is_check):
                continue
            if type(old) is not str:
                self._add_problem(place.table, [id], f"{place.column} is no text")
                continue
            try:
                new = self._cipher.storing(place)(id, self._cipher.loading(place)(id, old))
            except SealedValueError as error:
                self.found.problems.append(str(error))
                self.left |= place.key_number(old)
                continue
            if new != old:
                values[place.column] = (old, new)
        return values

    async def _write(self, table: Table, changes: Sequence[_Change]) -> None:
        # A row that another writer has changed meanwhile is left for the next pass.
        written: int = await self._database.write(_replace, (table, changes))
        self.is_unfinished |= written < len(changes)


def _replace(
    transaction: WriteTransaction, operations: Sequence[tuple[Table, Sequence[_Change]]]
) -> Sequence[int]:
    """Replace values in rows that have not changed since; return the number of rows.

    Not by a session: its libraries write parameters to their logs, and these may be clear.
    """
    transaction.require_lock()
    cursor = transaction.cursor
    before: Sequence[Any] = ()
    if cursor.dialect == "sqlite":  # zeros replace the old values in the pages
        before = cursor.execute("PRAGMA secure_delete")
        cursor.execute("PRAGMA secure_delete=ON")
    try:
        return [
            sum(len(_replace_row(transaction, table, change)) for change in changes)
            for table, changes in operations
        ]
    finally:
        if before:
            cursor.execute(f"PRAGMA secure_delete={before[0][0]}")


def _replace_row(
    transaction: WriteTransaction, table: Table, change: _Change
) -> Sequence[Sequence[Any]]:
    names = [column.name for column in table.primary_key] + list(change.guard)
    given = dict(zip(names, [*change.key, *change.guard.values()], strict=True))
    for name, (old, new) in change.values.items():
        given[f"old_{name}"], given[f"new_{name}"] = old, new
    sql, order = _update_of(transaction.sql.without_keys, table, (*names,), (*change.values,))
    return transaction.cursor.execute(sql, [given[name] for name in order])


@cache
def _update_of(
    sql: Statements, table: Table, names: Sequence[str], columns: Sequence[str]
) -> tuple[str, Sequence[str]]:
    """Return the statement for one row, and the names of its parameters in order."""
    same = [table.c[name] == bindparam(name, type_=table.c[name].type) for name in names]
    same += [cast(table.c[name], Text) == bindparam(f"old_{name}", type_=Text) for name in columns]
    new = {name: cast(bindparam(f"new_{name}", type_=Text), table.c[name].type) for name in columns}
    statement = update(table).where(*same).values(new).returning(*table.primary_key)
    compiled: Any = sql.compile(statement)
    return str(compiled), tuple(compiled.positiontup or ())


async def _fetch(database: Database, query: Select[Any]) -> Sequence[Any]:
    """Return rows as the driver gives them: SQLAlchemy's may be written to its log."""
    return await database.read(lambda session: session.run_sync(lambda sync: _rows_of(sync, query)))


def _rows_of(session: Session, query: Select[Any]) -> Sequence[Any]:
    rows: Sequence[Any] = fetch_raw_rows(session.connection().execute(query))
    return [tuple(row) for row in rows]


async def _existing_tables(database: Database) -> Sequence[Table]:
    async def read(session: AsyncSession) -> Sequence[Table]:
        connection = await session.connection()
        names = await connection.run_sync(
            lambda one: set(inspect(one).get_table_names(database.schema))
        )
        return [table for table in _TABLES if table.name in names]

    return await database.read(read)


async def key_uses(database: Database) -> Sequence[KeyUse]:
    """Count the values of each sealed column by the key that has sealed them."""
    uses: Counter[tuple[str, str, int | None]] = Counter()
    for table in await _existing_tables(database):
        for _, place in places_of(table, list(table.c.keys())):
            column = cast(table.c[place.column], Text)
            start = func.substr(column, 1, place.header_length)
            is_sealed = func.substr(column, 1, len(place.prefix)) == place.prefix
            header = case((is_sealed, start), else_=literal("", Text))
            query = select(header, func.count()).where(column != literal("", Text))
            if place.column == "reason":
                query = query.where(column.not_in(FIXED_REASONS))
            if place.is_optional and place.column not in database.statements.protection.seals:
                query = query.where(is_sealed)
            rows = await _fetch(database, query.group_by(header))
            for found, count in rows:
                key = next(iter(place.key_number(found)), None)
                uses[table.name, place.column, key] += count
    return [KeyUse(*use, count) for use, count in sorted(uses.items(), key=repr)]
