"""The form of sealed values: text in the database that says which key has sealed it.

A sealed value is `$sealed$000003$…`: a prefix, the number of the key, and base64 of a nonce and the
encrypted text. In a column of JSON it is a string of JSON, so that other tools can read the table.

Any other text that begins with the prefix is escaped, with and without keys: it is stored behind
`$sealed$------$`.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Final, NamedTuple, Protocol

import orjson

from openclaw_store.errors import SealedValueError

PREFIX: Final = "$sealed$"
ESCAPE: Final = f"{PREFIX}------$"
_WIDTH = len(PREFIX)
_JSON_PREFIX = f'"{PREFIX}'[:_WIDTH]  # as long as the other one, so that one slice serves both
HEADER_LENGTH: Final = len(ESCAPE)
"""Characters of the prefix, the number of the key, and the separator behind it."""


class SealedColumn(NamedTuple):
    """A sealed column of a table."""

    table: str
    column: str
    is_json: bool

    @property
    def prefix(self) -> str:
        """The first characters of a value that may be sealed or escaped."""
        return _JSON_PREFIX if self.is_json else PREFIX

    @property
    def header_length(self) -> int:
        """Characters of a sealed value up to the separator behind the number of its key."""
        return int(self.is_json) + HEADER_LENGTH

    def key_number(self, value: Any) -> set[int]:
        """Return the number of the key that has sealed a stored value; empty if it is clear."""
        if type(value) is not str or not value.startswith(PREFIX, int(self.is_json)):
            return set()
        number = value[int(self.is_json) + _WIDTH : self.header_length - 1]
        return {int(number)} if number.isascii() and number.isdecimal() else set()

    def unescape(self, id: object, value: str) -> str:
        """Return the text of an escaped value.

        Raises:
            SealedValueError: If it is sealed.
        """
        start = int(self.is_json)
        if value.startswith(ESCAPE, start):
            return f"{value[:start]}{value[start + HEADER_LENGTH :]}"
        if value.startswith(PREFIX, start):
            raise SealedValueError(
                *(self.table, self.column, id),
                "is sealed, and this process has no keys: open the database with the key ring",
            )
        return value

    def receive(self, value: Any) -> Any:
        """Return the text of a stored value; a sealed one as `Sealed`."""
        if type(value) is not str or value[:_WIDTH] != self.prefix:
            return value
        start = int(self.is_json)
        if value.startswith(PREFIX, start) and not value.startswith(ESCAPE, start):
            return Sealed(self, value[start : len(value) - start])
        return self.unescape(None, value)

    def escape(self, value: str) -> str:
        """Return the stored form of a text that begins with the prefix."""
        start = int(self.is_json)
        if value.startswith(PREFIX, start):
            return f"{value[:start]}{ESCAPE}{value[start:]}"
        return value


Convert = Callable[[object, str], str]
"""Converts a value that is not empty; takes the identifier of its row."""

ConvertRow = Callable[[object, list[Any]], None]
"""Converts the values of a row in place; takes its identifier."""

SealedColumns = Sequence[tuple[int, SealedColumn]]
"""Positions in a row, and their columns."""


class Hash(Protocol):
    """A hash that is being computed."""

    def update(self, data: bytes, /) -> None: ...
    def digest(self) -> bytes: ...
    def hexdigest(self) -> str: ...


class Protection(Protocol):
    """The conversion of values to their stored form and back."""

    has_keys: bool
    """True if it opens sealed values."""

    def new_hash(self) -> Hash:
        """Return a SHA-256, which is keyed if there are keys."""

    def storing(self, place: SealedColumn) -> Convert:
        """Return the function that makes the stored form of a value."""

    def loading(self, place: SealedColumn) -> Convert:
        """Return the function that returns a value from its stored form.

        That function raises `SealedValueError`.
        """

    def storing_row(self, places: SealedColumns) -> ConvertRow:
        """Return the function that converts the values of a row to their stored forms."""

    def loading_row(self, places: SealedColumns) -> ConvertRow:
        """Return the function that converts the stored values of a row back."""


class Escaping:
    """The protection without keys: values stay clear, and ones with the prefix are escaped."""

    has_keys = False

    def new_hash(self) -> Hash:
        return hashlib.sha256()

    def storing(self, place: SealedColumn) -> Convert:
        return lambda _, value: place.escape(value)

    def loading(self, place: SealedColumn) -> Convert:
        return place.unescape

    # Every row passes here, so nearly all values cost one comparison of a slice.
    def storing_row(self, places: SealedColumns) -> ConvertRow:
        prefixes = _prefixes(places)

        def convert(id: object, row: list[Any]) -> None:
            for position, prefix, place in prefixes:
                value = row[position]
                if value and value[:_WIDTH] == prefix:
                    row[position] = place.escape(value)

        return convert

    def loading_row(self, places: SealedColumns) -> ConvertRow:
        prefixes = _prefixes(places)

        def convert(id: object, row: list[Any]) -> None:
            for position, prefix, place in prefixes:
                value = row[position]
                if value and value[:_WIDTH] == prefix:
                    row[position] = place.unescape(id, value)

        return convert


def _prefixes(
    places: Iterable[tuple[int, SealedColumn]],
) -> Sequence[tuple[int, str, SealedColumn]]:
    return [(position, place.prefix, place) for position, place in places]


@dataclass(frozen=True, slots=True, repr=False)
class Sealed:
    """A sealed value, as a query of your own returns it."""

    place: SealedColumn
    text: str
    """The stored form, in a column of JSON without its quotation marks."""

    @property
    def key_id(self) -> str:
        """The number of the key, six digits."""
        return self.text[_WIDTH:][: HEADER_LENGTH - _WIDTH - 1]

    def open_with(self, protection: Protection, row_id: str) -> Any:
        """Return the value; see `Database.unseal`."""
        quote = '"' if self.place.is_json else ""
        text = protection.loading(self.place)(row_id, f"{quote}{self.text}{quote}")
        return orjson.loads(text) if self.place.is_json else text

    def __repr__(self) -> str:
        return f"<Sealed {self.place.table}.{self.place.column} by key {self.key_id}>"
