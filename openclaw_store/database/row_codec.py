"""Encode records into parameters of statements, and decode rows into records."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from operator import itemgetter
from typing import Any, Final

from sqlalchemy import (
    Dialect,
    Text,
    type_coerce,
)

from openclaw_store.database.tables import ROWS, table_of
from openclaw_store.database.types import EnumValue, UtcTime
from openclaw_store.domain import JSON_FIELDS, Decode, Raw, Record, RowCodec, decode
from openclaw_store.errors import InvalidDataError

FIELDS: Final = {
    kind: tuple(column.name for column in row.__table__.columns if column.name != "beat")
    for kind, row in ROWS.items()
}
"""The columns that are fields of the domain class, in its order."""


COLUMNS: Final = {
    kind: tuple(
        type_coerce(row.__table__.c[name], Text).label(name)
        if name in JSON_FIELDS[kind]
        else row.__table__.c[name]
        for name in FIELDS[kind]
    )
    for kind, row in ROWS.items()
}
"""What to select to `decode` a row into a record."""


def codec_of(kind: type[Any], names: Sequence[str], dialect: Dialect) -> RowCodec:
    """How a record's values become the parameters for the named columns."""
    columns = table_of(kind).c
    bind_processors = []
    for place, name in enumerate(names):
        if isinstance(columns[name].type, UtcTime | EnumValue):
            encoder = columns[name].type.bind_processor(dialect)
            if encoder is not None:
                bind_processors.append((place, encoder))
    json = [(place, name) for place, name in enumerate(names) if name in JSON_FIELDS[kind]]
    return RowCodec(_picker(names), bind_processors, json)


def _picker(names: Sequence[str]) -> Callable[[Mapping[str, Any]], Sequence[Any]]:
    if len(names) == 1:
        return lambda fields: (fields[names[0]],)  # `itemgetter` would give the bare value
    return itemgetter(*names)


@lru_cache(maxsize=32)  # making one takes longer than reading a row
def decoder_of(kind: type[Any], dialect: Dialect) -> Decode:
    """What makes a record of a row of `COLUMNS`, as the driver gives it."""
    columns = table_of(kind).c
    decoders = []
    for place, name in enumerate(FIELDS[kind]):
        if isinstance(columns[name].type, UtcTime | EnumValue):
            decoder = columns[name].type.result_processor(dialect, None)
            if decoder is not None:
                decoders.append((place, decoder))

    def decode_row(raw: Raw) -> Record[Any]:
        values = list(raw)
        try:
            for place, decoder in decoders:
                if values[place] is not None:
                    values[place] = decoder(values[place])
        except (TypeError, OverflowError) as error:  # written by hand: SQLite takes text anywhere
            raise InvalidDataError(FIELDS[kind][place], f"of {raw[0]!r} cannot be read") from error
        return decode(kind, values)

    return decode_row
