"""Column types: times, enumerations and JSON text, equal on both databases."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime, timedelta
from enum import Enum
from typing import Any, Final

import orjson
from sqlalchemy import BigInteger, Column, DateTime, Dialect, Integer, String, Text
from sqlalchemy.ext.compiler import compiles
from sqlalchemy.sql.compiler import SQLCompiler
from sqlalchemy.sql.functions import GenericFunction
from sqlalchemy.types import TypeDecorator, TypeEngine, UserDefinedType

from openclaw_store.domain import MAX_ID_LENGTH, ConvertRow, encode_json
from openclaw_store.encryption import Sealed, SealedColumn
from openclaw_store.errors import InvalidDataError, safe_repr

_EPOCH: Final = datetime(1970, 1, 1, tzinfo=UTC)
_MICROSECOND: Final = timedelta(microseconds=1)


def to_microseconds(moment: datetime) -> int:
    """Return the exact number of microseconds since 1970."""
    delta = moment - _EPOCH
    return (delta.days * 86_400 + delta.seconds) * 1_000_000 + delta.microseconds


def from_microseconds(value: int) -> datetime:
    """Return the exact time `value` microseconds after 1970."""
    try:
        # `timedelta(microseconds=value)` takes 1.5 times as long.
        return _EPOCH + value * _MICROSECOND
    except (TypeError, OverflowError) as error:  # SQLite stores text in any column
        raise InvalidDataError("time", f"{safe_repr(value)} is not one") from error


def _in_utc(moment: datetime) -> datetime:
    """Return a time in UTC; asyncpg returns `-infinity` and `infinity` without a zone."""
    if moment.tzinfo is UTC:
        return moment
    return moment.replace(tzinfo=UTC) if moment.tzinfo is None else moment.astimezone(UTC)


def _optional(process: Callable[[Any], Any]) -> Callable[[Any], Any]:
    return lambda value: None if value is None else process(value)


class _Converted(TypeDecorator[Any]):
    """A type that converts each value; NULL is `None`."""

    def encoder(self, dialect: Dialect) -> Callable[[Any], Any] | None:
        """Return the function that makes the driver's value; `None` if it takes the value."""

    @abstractmethod
    def decoder(self, dialect: Dialect) -> Callable[[Any], Any]:
        """Return the function that makes the value of the driver's."""

    # These methods, not `process_bind_param` and `process_result_value`, which add a call for each
    # value: this halves the time to read a row.
    def bind_processor(self, dialect: Dialect) -> Callable[[Any], Any] | None:
        encode = self.encoder(dialect)
        return None if encode is None else _optional(encode)

    def result_processor(self, dialect: Dialect, coltype: object) -> Callable[[Any], Any] | None:
        return _optional(self.decoder(dialect))


class UtcTime(_Converted):
    """A time: an integer of microseconds since 1970 on SQLite, `timestamptz` on PostgreSQL."""

    impl = DateTime(timezone=True)
    cache_ok = True

    def load_dialect_impl(self, dialect: Dialect) -> TypeEngine[Any]:
        kind = BigInteger() if dialect.name == "sqlite" else DateTime(timezone=True)
        return dialect.type_descriptor(kind)

    def encoder(self, dialect: Dialect) -> Callable[[Any], Any] | None:
        return to_microseconds if dialect.name == "sqlite" else None

    def decoder(self, dialect: Dialect) -> Callable[[Any], Any]:
        return from_microseconds if dialect.name == "sqlite" else _in_utc


class EnumValue(_Converted):
    """A member of an enumeration, stored as its value: text or an integer."""

    impl = String
    cache_ok = True

    def __init__(self, kind: type[Enum]) -> None:
        self.kind = kind
        super().__init__()

    def load_dialect_impl(self, dialect: Dialect) -> TypeEngine[Any]:
        if issubclass(self.kind, int):
            return dialect.type_descriptor(Integer())
        return dialect.type_descriptor(String(max(len(member.value) for member in self.kind)))

    def encoder(self, dialect: Dialect) -> Callable[[Any], Any]:
        return _Translation({member: member.value for member in self.kind}, self.kind).__getitem__

    def decoder(self, dialect: Dialect) -> Callable[[Any], Any]:
        return _Translation({member.value: member for member in self.kind}, self.kind).__getitem__


class _Translation(dict[Any, Any]):
    """Translates values; an unknown one is an error."""

    def __init__(self, pairs: Mapping[Any, Any], kind: type[Enum]) -> None:
        super().__init__(pairs)
        self._kind = kind

    def __missing__(self, value: Any) -> Any:
        raise InvalidDataError(self._kind.__name__, f"{safe_repr(value)} is not one of its values")


def row_converter(
    columns: Sequence[Column[Any]], converter_of: Callable[[Any], Callable[[Any], Any] | None]
) -> ConvertRow | None:
    """Return the function that converts the times and enumerations of a row; `None` without any.

    Args:
        converter_of: Returns the encoder or the decoder of a type.
    """
    processors = [
        (position, process, column.name)
        for position, column in enumerate(columns)
        if isinstance(column.type, _Converted)
        and (process := converter_of(column.type)) is not None
    ]

    def convert(id: object, row: list[Any]) -> None:
        try:
            for position, process, name in processors:  # noqa: B007
                value = row[position]
                if value is not None:
                    row[position] = process(value)
        except InvalidDataError as error:
            raise InvalidDataError(name, f"of {id!r}: {error}") from error

    return convert if processors else None


class _JsonText(UserDefinedType[str]):
    """PostgreSQL's `json`, which preserves the text; `jsonb` would change numbers."""

    cache_ok = True

    def get_col_spec(self, **options: Any) -> str:
        return "JSON"


class Json(TypeDecorator[Any]):
    """Compact JSON text; NULL represents the default of the field."""

    impl = Text
    cache_ok = True

    def load_dialect_impl(self, dialect: Dialect) -> TypeEngine[Any]:
        return dialect.type_descriptor(Text() if dialect.name == "sqlite" else _JsonText())

    def process_bind_param(self, value: Any, dialect: Dialect) -> str | None:
        return None if value is None else encode_json("value", value).decode()

    def process_result_value(self, value: str | None, dialect: Dialect) -> Any:
        return None if value is None else orjson.loads(value)


class SealableText(TypeDecorator[Any]):
    """Text that may be sealed; a query returns a sealed value as `Sealed`.

    Args:
        table: The table in whose name the values are sealed.
        column: The name of the column.
    """

    impl = Text
    cache_ok = True

    def __init__(self, table: str, column: str) -> None:
        self.table, self.column = table, column
        self.place = SealedColumn(table, column, is_json=False)
        super().__init__()

    @property
    def python_type(self) -> type[Any]:
        return str

    def process_bind_param(self, value: Any, dialect: Dialect) -> Any:
        return value.text if isinstance(value, Sealed) else value

    def process_result_value(self, value: Any, dialect: Dialect) -> Any:
        return value and self.place.receive(value)


class SealableKey(SealableText):
    """An identifier of a caller that may be sealed, and is longer then."""

    cache_ok = True

    def load_dialect_impl(self, dialect: Dialect) -> TypeEngine[Any]:
        return String(MAX_ID_LENGTH) if dialect.name == "sqlite" else Text(collation="C")


class SealableJson(Json):
    """JSON that may be sealed; see `SealableText`."""

    cache_ok = True

    def __init__(self, table: str, column: str) -> None:
        self.table, self.column = table, column
        self.place = SealedColumn(table, column, is_json=True)
        super().__init__()

    def process_bind_param(self, value: Any, dialect: Dialect) -> str | None:
        if isinstance(value, Sealed):
            return f'"{value.text}"'
        return super().process_bind_param(value, dialect)

    def process_result_value(self, value: str | None, dialect: Dialect) -> Any:
        found = value and self.place.receive(value)
        return found if isinstance(found, Sealed) else super().process_result_value(found, dialect)


class _UtcNow(GenericFunction[datetime]):
    """The present time as `UtcTime` stores it, for rows that are inserted by hand."""

    type = UtcTime()
    inherit_cache = True


@compiles(_UtcNow, "sqlite")
def _utc_now_sqlite(element: _UtcNow, compiler: SQLCompiler, **options: Any) -> str:
    return "(CAST((julianday('now') - 2440587.5) * 86400000000 AS INTEGER))"


@compiles(_UtcNow, "postgresql")
def _utc_now_postgresql(element: _UtcNow, compiler: SQLCompiler, **options: Any) -> str:
    return "now()"


_Key = String(MAX_ID_LENGTH).with_variant(String(MAX_ID_LENGTH, collation="C"), "postgresql")
"""An identifier, sorted by code points on both databases."""
