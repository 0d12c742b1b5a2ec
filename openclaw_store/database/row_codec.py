"""Encoding of records as parameters of statements, and decoding of rows as records.

A `Protection` converts the values of sealed columns on both ways: it escapes them, or seals them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from operator import itemgetter, methodcaller
from typing import Any, Final

from sqlalchemy import Dialect, Table, Text
from sqlalchemy.ext.compiler import compiles
from sqlalchemy.sql.functions import FunctionElement

from openclaw_store.database.tables import ROWS, UNVERSIONED, table_of
from openclaw_store.database.types import SealableJson, SealableText, row_converter
from openclaw_store.domain import JSON_FIELDS, Decode, RowCodec, decode
from openclaw_store.encryption import Protection, SealedColumns

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
    table = table_of(kind)
    json = [(index, name) for index, name in enumerate(names) if name in JSON_FIELDS[kind]]
    columns = [table.c[name] for name in names]
    convert = row_converter(columns, methodcaller("encoder", dialect))
    places = places_of(table, names)
    protect = protection.storing_row(places) if places and protection is not None else None
    return RowCodec(_picker(names), json, convert, protect)


def _picker(names: Sequence[str]) -> Callable[[Mapping[str, Any]], Sequence[Any]]:
    if len(names) < 2:  # `itemgetter` of one name returns no tuple
        return lambda fields: [fields[name] for name in names]
    return itemgetter(*names)


def decoder_of(kind: type[Any], dialect: Dialect, protection: Protection) -> Decode:
    """Return the function that makes a record of the driver's values of `COLUMNS`."""
    table = table_of(kind)
    columns = [table.c[name] for name in FIELDS[kind]]
    convert = row_converter(columns, methodcaller("decoder", dialect))
    unprotect = protection.loading_row(places_of(table, FIELDS[kind]))
    return partial(decode, kind, [unprotect] if convert is None else [convert, unprotect])
