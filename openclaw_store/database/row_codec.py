"""Encoding of records as parameters of statements, and decoding of rows as records.

A `Protection` converts the values of sealed columns on both ways: it escapes them, or seals them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from operator import itemgetter
from typing import Any, Final

from sqlalchemy import Dialect, Table, Text
from sqlalchemy.ext.compiler import compiles
from sqlalchemy.sql.functions import FunctionElement

from openclaw_store.database.tables import ROWS, UNVERSIONED, table_of
from openclaw_store.database.types import EnumValue, SealableJson, SealableText, UtcTime
from openclaw_store.domain import JSON_FIELDS, Decode, Raw, Record, RowCodec, decode
from openclaw_store.encryption import Protection, SealedColumns
from openclaw_store.errors import InvalidDataError

FIELDS: Final = {
    kind: tuple(column.name for column in row.__table__.columns if column.name not in UNVERSIONED)
    for kind, row in ROWS.items()
}
"""The columns that are fields of the domain class, in its order."""


class _JsonText(FunctionElement[str]):
    """JSON as text, independent of the JSON codec of the connection, which may be a caller's."""

    type = Text()
    inherit_cache = True


@compiles(_JsonText)
def _stay(element: _JsonText, compiler: Any, **options: Any) -> str:
    text: str = compiler.process(element.clauses, **options)
    return text


@compiles(_JsonText, "postgresql")
def _cast(element: _JsonText, compiler: Any, **options: Any) -> str:
    return f"CAST({compiler.process(element.clauses, **options)} AS TEXT)"


COLUMNS: Final = {
    kind: tuple(
        _JsonText(row.__table__.c[name]).label(name)
        if name in JSON_FIELDS[kind]
        else row.__table__.c[name]
        for name in FIELDS[kind]
    )
    for kind, row in ROWS.items()
}
"""The columns to select for `decoder_of`; JSON stays text."""


def places_of(table: Table, names: Sequence[str]) -> SealedColumns:
    """Return the sealed columns among the named ones of a table, with their positions."""
    kinds = [table.c[name].type for name in names]
    return [
        (position, kind.place)
        for position, kind in enumerate(kinds)
        if isinstance(kind, SealableText | SealableJson)
    ]


def codec_of(
    kind: type[Any], names: Sequence[str], dialect: Dialect, protection: Protection | None
) -> RowCodec:
    """Return the codec that makes parameters for the named columns of a record.

    Args:
        protection: `None` leaves all values in clear.
    """
    columns = table_of(kind).c
    bind_processors = []
    for index, name in enumerate(names):
        if isinstance(columns[name].type, UtcTime | EnumValue):
            encoder = columns[name].type.bind_processor(dialect)
            if encoder is not None:
                bind_processors.append((index, encoder))
    json = [(index, name) for index, name in enumerate(names) if name in JSON_FIELDS[kind]]
    places = places_of(table_of(kind), names)
    protect = protection.storing_row(places) if places and protection is not None else None
    return RowCodec(_picker(names), bind_processors, json, protect)


def _picker(names: Sequence[str]) -> Callable[[Mapping[str, Any]], Sequence[Any]]:
    if len(names) < 2:  # `itemgetter` of one name returns no tuple
        return lambda fields: [fields[name] for name in names]
    return itemgetter(*names)


def decoder_of(kind: type[Any], dialect: Dialect, protection: Protection) -> Decode:
    """Return the function that makes a record of the driver's values of `COLUMNS`."""
    columns = table_of(kind).c
    decoders = []
    for index, name in enumerate(FIELDS[kind]):
        if isinstance(columns[name].type, UtcTime | EnumValue):
            decoder = columns[name].type.result_processor(dialect, None)
            if decoder is not None:
                decoders.append((index, decoder))
    unprotect = protection.loading_row(places_of(table_of(kind), FIELDS[kind]))

    def decode_row(raw: Raw) -> Record[Any]:
        values = list(raw)
        try:
            for index, decoder in decoders:
                if values[index] is not None:
                    values[index] = decoder(values[index])
        except InvalidDataError as error:
            raise InvalidDataError(FIELDS[kind][index], f"of {raw[0]!r}: {error}") from error
        unprotect(raw[0], values)
        return decode(kind, values)

    return decode_row
