"""Common parts of the two repositories: sessions, validation, and copies for callers."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Iterable
from functools import partial
from typing import Any, ClassVar, Generic, TypeVar

from sqlalchemy import Select, select
from sqlalchemy.ext.asyncio import AsyncSession

from openclaw_store.database import COLUMNS, ROWS, Apply, Database, WriteTransaction
from openclaw_store.domain import (
    JSON_FIELDS,
    KEY,
    MAX_INTEGER,
    MAX_JSON_BYTES,
    STAMPED,
    Entity,
    LongValueError,
    Record,
    admit,
    check_key,
    encode_long_values,
    write_back,
)
from openclaw_store.errors import InvalidDataError, NotOwnerError, logger_of
from openclaw_store.repositories.batches import apply
from openclaw_store.repositories.commands import CONTENT, Create, Remove, Update
from openclaw_store.repositories.row_reader import decoder_here, read_records, read_rows
from openclaw_store.repositories.unit_of_work import Event

logger = logger_of("repositories")

Result = TypeVar("Result")

UNDONE = -MAX_INTEGER
"""The version of a copy of a row that was rolled back; no row ever has it."""

_DECODE_BATCH_SIZE = 100
"""Rows decoded and copied before other coroutines run."""


class Repository(Generic[Entity]):
    """Read and write the rows of one kind.

    A repository made with a `Database` runs each call in a transaction of its own. One made with
    the session of a `Database.transaction()` joins it and never commits; with the session of a
    `Database.session()` it only reads.
    """

    kind: ClassVar[type[Any]]

    def __init__(self, database: Database | AsyncSession) -> None:
        self._session = database if isinstance(database, AsyncSession) else None
        origin = database.info.get("database") if isinstance(database, AsyncSession) else database
        if not isinstance(origin, Database):
            given = type(database).__name__
            raise InvalidDataError(
                "database", f"must be a Database, or a session of one, not {given}"
            )
        self._database = origin

    def __repr__(self) -> str:
        return f"<{type(self).__name__} of {self._database!r}>"

    async def get(self, id: str) -> Entity | None:
        """Return the task or node with this identifier, or `None`."""
        found = await self._list(self._by_id(id), 1)
        return found[0] if found else None

    async def get_record(self, id: str) -> Record[Entity] | None:
        """Return the record with this identifier, or `None`."""
        query = self._by_id(id)

        async def run(session: AsyncSession) -> Record[Entity] | None:
            found = await read_records(session, self.kind, query)
            return found[0] if found else None

        return await self._read(run, is_one_statement=True)

    def _by_id(self, id: str) -> Select[Any]:
        key = KEY[self.kind]
        return self._select(ROWS[self.kind].__table__.c[key] == check_key(key, id))

    async def _create(self, entity: Entity) -> bool:
        record = await admit_entity(self, entity, is_new=True)
        command = Create(self.kind, record.id, record)
        self._write_back(await self._write(command), entity)
        return True

    async def _update(self, entity: Entity) -> bool:
        record = await admit_entity(self, entity)
        command = Update(self.kind, record.id, record, CONTENT[self.kind], record.version)
        self._write_back(await self._write(command), entity)
        return True

    async def _delete(self, id: str) -> bool:
        removed: bool = await self._write(Remove(self.kind, check_key(KEY[self.kind], id)))
        return removed

    def _select(self, *conditions: Any) -> Select[Any]:
        return select(*COLUMNS[self.kind]).where(*conditions)

    async def _list(self, query: Select[Any], limit: int | None = None) -> list[Entity]:
        async def run(session: AsyncSession) -> list[Entity]:
            decode = decoder_here(session, self.kind)
            entities: list[Entity] = []
            is_short = limit is not None and limit <= _DECODE_BATCH_SIZE
            size = None if is_short else _DECODE_BATCH_SIZE
            async for rows in read_rows(session, query.limit(limit), size):
                entities += await self._copies(map(decode, rows))
            return entities

        return await self._read(run)

    @property
    def _transaction(self) -> WriteTransaction | None:
        """The caller's write transaction; `None` if there is none."""
        return None if self._session is None else self._session.info.get("transaction")

    def _write_back(
        self, record: Record[Entity], entity: Entity, names: Iterable[str] | None = None
    ) -> None:
        names = tuple(STAMPED[self.kind] if names is None else names)
        if self._transaction is not None:
            before = {name: entity.__dict__[name] for name in names}
            self._transaction.undo.append(partial(entity.__dict__.update, before))
        write_back(record, entity, names)

    async def _copies(self, records: Iterable[Record[Entity]]) -> list[Entity]:
        """Return copies for the caller."""
        entities = await self._database.slices.copies(records)
        transaction = self._transaction
        if transaction is not None and transaction.committed:
            # After a rollback another change may get the same version. A copy that was read
            # before must not pass for it, so its version is made invalid then.
            changed = {
                (one.kind, one.id) for one in transaction.committed if isinstance(one, Event)
            }
            for entity in entities:
                if (self.kind, getattr(entity, KEY[self.kind])) in changed:
                    transaction.undo.append(partial(setattr, entity, "version", UNDONE))
        return entities

    async def _read(
        self, work: Callable[[AsyncSession], Awaitable[Result]], *, is_one_statement: bool = False
    ) -> Result:
        if self._session is not None:
            return await self._database.read_in(self._session, work)
        return await self._database.read(work, is_one_statement=is_one_statement)

    async def _write(self, command: Any, apply: Apply = apply) -> Any:
        try:
            if self._session is not None:
                return await self._database.write_in(self._session, apply, command)
            return await self._database.write(apply, command)
        except NotOwnerError as error:
            logger.warning("refused: %s", error)
            raise


def too_long(name: str, limit: int) -> InvalidDataError:
    """Return the error for a value longer than the limit of a database."""
    return InvalidDataError(
        name, f"is larger than {limit} bytes of JSON: store less, or raise `max_json_bytes`"
    )


async def admit_entity(
    repository: Repository[Entity],
    entity: Entity,
    known: Record[Entity] | None = None,
    *,
    is_new: bool = False,
) -> Record[Entity]:
    """Return the checked record of a caller's object.

    Args:
        known: The stored record, if it is known.
        is_new: There is no stored record.

    Raises:
        InvalidDataError: With the first field that cannot be stored.
    """
    kind, database = repository.kind, repository._database
    clock = database.clock
    record: Record[Entity]
    try:
        record = admit(kind, entity, clock, known)
    except LongValueError:
        encoded = await database.slices.run(encode_long_values(entity))
        record = admit(kind, entity, clock, known, encoded)
    limit = database.max_json_bytes
    if limit < MAX_JSON_BYTES:
        texts = {name: record.encoded(name) or b"" for name in JSON_FIELDS[kind]}
        names = [name for name, text in texts.items() if len(text) > limit]
        if names and known is None and not is_new:
            known = await repository.get_record(record.id)
        for name in names:  # a value that was stored under a higher limit may stay
            if known is None or known.encoded(name) != texts[name]:
                raise too_long(name, limit)
    return record
