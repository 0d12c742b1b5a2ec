"""Read around rows that cannot be read: their values were written by hand, past all checks.

The rows are searched only after an error; all queries of the same work then leave them out.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from sqlalchemy import (
    Connection,
    Join,
    Select,
    Table,
    case,
    event,
    false,
    literal_column,
    not_,
    or_,
    select,
    true,
)
from sqlalchemy.ext.asyncio import AsyncSession

from openclaw_store.backends import unreadable_value
from openclaw_store.backends.sqlite.connections import reading_text
from openclaw_store.database import COLUMNS, Base, ChangeRow, Database, statements_in, table_of
from openclaw_store.domain import ENTITY_NAMES, KEY, Change, ChangeKind, NodeInfo, Task, encode
from openclaw_store.errors import InvalidDataError, StoreError, logger_of, printable, safe_repr
from openclaw_store.maintenance.domains import Condition, sealed, suspicious_value
from openclaw_store.maintenance.row_checks import PAGE
from openclaw_store.repositories import decoder_here, read_rows

logger = logger_of("maintenance")

Result = TypeVar("Result")
Work = Callable[[AsyncSession], Awaitable[Result]]

MOST_NAMED = 5_000
"""Rows of a table that are named; if there are more, all suspicious rows are left out.

Each is a parameter of the queries, of which both databases take 32,000.
"""

MOST_LOGGED = 20
"""Rows that are named in the log."""

KEPT_SECONDS = 60.0
"""Shortest time for which the rows stay known; it is 20 times the time of the search."""

_NO_LIMIT = datetime(9990, 1, 1, tzinfo=UTC)
"""Times in the future are suspicious, but readable."""


class Unreadable(NamedTuple):
    """A row that was left out."""

    item: str
    """`task`, `node` or `change`."""
    id: str
    """Its identifier, or its revision."""
    text: str
    """The reason as a sentence."""


class ReadAround:
    """Runs work that reads a database; the work runs again without the rows that it cannot read.

    Args:
        read: `Database.read`.
    """

    def __init__(self, read: Callable[..., Awaitable[Any]]) -> None:
        self._read = read
        self._narrowed: Mapping[Table, Condition] = {}
        self._until = 0.0
        self._has_keys = False
        self._is_thorough = False
        self._searching = asyncio.Lock()
        self.left_out: Sequence[Unreadable] = ()
        """The rows that the last work had to leave out."""

    async def __call__(self, work: Work[Result], *, is_one_statement: bool = False) -> Result:
        """Run the work, and return its result."""
        is_known = self._is_known
        result: Result
        try:
            run = partial(self._run, work) if is_known else work
            result = await self._read(run, is_one_statement=is_one_statement)
        except Exception as error:
            if not _is_of_a_value(error):
                raise
        else:
            if not self._is_known:
                self.left_out = ()
            return result
        for is_thorough in (False, True):
            async with self._searching:
                # Unless another caller has searched meanwhile.
                if is_known or not self._is_known or self._is_thorough < is_thorough:
                    await self._read(partial(self._search, is_thorough=is_thorough))
            try:
                result = await self._read(partial(self._run, work))
                break
            except Exception as error:
                if is_thorough or not self._has_keys or not _is_of_a_value(error):
                    raise
        return result

    @property
    def _is_known(self) -> bool:
        return time.monotonic() < self._until

    async def _run(self, work: Work[Result], session: AsyncSession) -> Result:
        """Run the work with narrowed queries; text that is not UTF-8 has `�` in it."""
        narrowed = self._narrowed

        def narrow(_: Connection, statement: Any, many: Any, one: Any, options: Any) -> Any:
            if isinstance(statement, Select):
                for place in statement.get_final_froms():
                    for table in _tables_of(place):
                        if table in narrowed:
                            statement = statement.where(narrowed[table])
            return statement, many, one

        connection = (await session.connection()).sync_connection
        event.listen(connection, "before_execute", narrow, retval=True)
        try:
            async with _replacing(session):
                return await work(session)
        finally:
            event.remove(connection, "before_execute", narrow)

    async def _search(self, session: AsyncSession, *, is_thorough: bool) -> None:
        """Find the rows that cannot be read.

        Args:
            is_thorough: Open all sealed values, too, which needs all rows; the database cannot see
                into them.
        """
        began, statements = time.monotonic(), statements_in(session)
        self._has_keys = statements is not statements.without_keys
        narrowed: dict[Table, Condition] = {}
        found: list[Unreadable] = []
        async with _replacing(session):
            for kind in (Task, NodeInfo):
                found += await self._search_rows(session, kind, narrowed, is_thorough=is_thorough)
            found += await self._search_changes(session, narrowed)
        ended = time.monotonic()
        # Together, after the last `await`: work that runs meanwhile must not see a half of it.
        self._narrowed, self.left_out, self._is_thorough = narrowed, found, is_thorough
        self._until = ended + max(KEPT_SECONDS, 20 * (ended - began))
        for one in found[:MOST_LOGGED]:
            logger.warning("%s: it is left out", printable(one.text))
        if len(found) > MOST_LOGGED:
            text = "%d further rows cannot be read; `openclaw-store verify` names them"
            logger.warning(text, len(found) - MOST_LOGGED)

    async def _search_rows(
        self,
        session: AsyncSession,
        kind: type[Any],
        narrowed: dict[Table, Condition],
        *,
        is_thorough: bool,
    ) -> list[Unreadable]:
        table, dialect = table_of(kind), session.get_bind().dialect.name
        values = [(one, suspicious_value(one, dialect, _NO_LIMIT)) for one in table.columns]
        if self._has_keys:
            values = [(one, case((sealed(one, dialect), false()), else_=it)) for one, it in values]
        is_suspicious = true() if is_thorough else or_(*(it for _, it in values))
        place: Any = table.c[KEY[kind]]
        if dialect == "sqlite":  # a key may be any value
            place = literal_column(f"{table.name}.rowid")
        places = (
            await session.scalars(select(place).select_from(table).where(is_suspicious))
        ).all()
        found: dict[Any, Unreadable] = {}
        for start in range(0, len(places), PAGE):
            page = places[start : start + PAGE]
            found.update(await _unreadable(session, kind, place, page))
            if len(found) > MOST_NAMED:
                break  # a thorough search ends with the error of the next row
        if len(found) > MOST_NAMED and not is_thorough:
            text = "more than %d rows of %s cannot be read: all rows like them are left out"
            logger.warning(text, MOST_NAMED, table.name)
            narrowed[table] = not_(is_suspicious)
        elif found:
            narrowed[table] = place.not_in(list(found))
        return [*found.values()]

    async def _search_changes(
        self, session: AsyncSession, narrowed: dict[Table, Condition]
    ) -> list[Unreadable]:
        table, dialect = (
            Base.metadata.tables[ChangeRow.__tablename__],
            session.get_bind().dialect.name,
        )
        columns = table.columns
        is_bad = or_(
            *(suspicious_value(one, dialect, _NO_LIMIT) for one in columns),
            columns.kind.not_in([one.value for one in ChangeKind]),
        )
        revisions = await session.scalars(
            select(columns.revision).where(is_bad).order_by(columns.revision).limit(MOST_NAMED)
        )
        found = [
            Unreadable("change", str(one), f"change {one} cannot be read") for one in revisions
        ]
        if found:
            narrowed[table] = not_(is_bad)
        return found


def shown(changes: Sequence[Change]) -> Sequence[Change]:
    """Return changes that can be shown; a value of a wrong type is an error."""
    for change in changes:
        str(change)
    return changes


def on_connection(read: Callable[[Connection], Result]) -> Work[Result]:
    """Return work of `Database.read` that calls a function with its connection."""
    return lambda session: session.run_sync(lambda sync: read(sync.connection()))


class TolerantDatabase(Database):
    """A database that is read around unreadable rows, and written like any other."""

    def __init__(self, location: str | Path, *, cluster: str | None = None) -> None:
        super().__init__(location, cluster=cluster)
        self._around = ReadAround(super().read)

    async def read(self, work: Work[Result], *, is_one_statement: bool = False) -> Result:
        """Run `work`, which reads, perhaps a second time."""
        return await self._around(work, is_one_statement=is_one_statement)

    @property
    def left_out(self) -> Sequence[Unreadable]:
        """The rows that were left out."""
        return self._around.left_out


async def _unreadable(
    session: AsyncSession, kind: type[Any], place: Any, places: Sequence[Any]
) -> dict[Any, Unreadable]:
    """Return the rows at some places that cannot be read."""
    item, decode = ENTITY_NAMES[kind], decoder_here(session, kind)
    query = select(place, *COLUMNS[kind]).where(place.in_(places))
    found: dict[Any, Unreadable] = {}
    try:
        rows = [row async for rows in read_rows(session, query, None) for row in rows]
    except Exception as error:
        cause = unreadable_value(error)
        if cause is None:
            raise
        if len(places) == 1:
            text = f"{item} in row {places[0]!r} cannot be read: {cause}"
            return {places[0]: Unreadable(item, str(places[0]), text)}
        middle = len(places) // 2
        found.update(await _unreadable(session, kind, place, places[:middle]))
        found.update(await _unreadable(session, kind, place, places[middle:]))
        return found
    for one, *row in rows:
        try:
            encode(decode(tuple(row)).copy())
        except InvalidDataError as error:
            text = f"{item} {safe_repr(row[0])} cannot be read: {error}"
            found[one] = Unreadable(item, str(row[0]), text)
    return found


def _tables_of(place: Any) -> Iterator[Table]:
    if isinstance(place, Join):
        yield from _tables_of(place.left)
        yield from _tables_of(place.right)
    elif isinstance(place, Table):
        yield place


def _is_of_a_value(error: BaseException) -> bool:
    """Return true if a stored value may be the cause."""
    if isinstance(error, StoreError) and not isinstance(error, InvalidDataError):
        return error.__cause__ is not None and unreadable_value(error.__cause__) is not None
    return getattr(error, "field", "") != "since"  # an argument of a reader


def _replacing(session: AsyncSession) -> Any:
    if session.get_bind().dialect.name != "sqlite":
        return nullcontext()
    return reading_text(session, partial(str, encoding="utf-8", errors="replace"))
