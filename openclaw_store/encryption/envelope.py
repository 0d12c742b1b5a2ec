"""The form of sealed values: text in the database that says which key has sealed it.

A sealed value is `$sealed$000003$…`: a prefix, the number of the key, and base64 of a nonce and the
encrypted text. In a column of JSON it is a string of JSON, so that other tools can read the table.
A column that the database searches has a keyed hash of the text before the nonce.

Any other text that begins with the prefix is escaped, with and without keys: it is stored behind
`$sealed$------$`.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Final, NamedTuple, Protocol

import orjson

from openclaw_store.domain import ConvertRow
from openclaw_store.encryption.fields import OPTIONAL_FIELDS
from openclaw_store.errors import SealedValueError

PREFIX: Final = "$sealed$"
ESCAPE: Final = f"{PREFIX}------$"
_WIDTH = len(PREFIX)
_JSON_PREFIX = f'"{PREFIX}'[:_WIDTH]  # as long as the other one, so that one slice serves both
HEADER_LENGTH: Final = len(ESCAPE)
"""Characters of the prefix, the number of the key, and the separator behind it."""


class SealedColumn(NamedTuple):
    """A column that may hold sealed values."""

    table: str
    column: str
    is_json: bool

    @property
    def is_optional(self) -> bool:
        """True if it is sealed only by a key ring that names it."""
        return self.table == "tasks" and self.column in OPTIONAL_FIELDS

    @property
    def is_searched(self) -> bool:
        """True if the database finds rows by its values."""
        return self == USER_ID

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


USER_ID: Final = SealedColumn("tasks", "user_id", is_json=False)

Convert = Callable[[object, str], str]
"""Converts a value that is not empty; takes the identifier of its row."""

SealedColumns = Sequence[tuple[int, SealedColumn]]
"""Positions in a row, and their columns."""


class Hash(Protocol):
    """A hash that is being computed."""

    def update(self, data: bytes, /) -> None: ...
    def digest(self) -> bytes: ...
    def hexdigest(self) -> str: ...


class Protection:
    """The conversion of values to their stored form and back.

    Without keys, as here, values stay clear, and ones with the prefix are escaped. `Cipher` seals.
    """

    has_keys = False
    """True if it opens sealed values."""
    cluster: int | None = None
    """The number of the cluster to which sealed values are bound; `None` without keys."""
    seals: frozenset[str] = frozenset()
    """The optional fields that it seals."""
    unsearchable: Sequence[str] = ()
    """The conditions of filters that search in sealed values."""

    def reading(self, cluster: int | None = None) -> Protection:
        """Return a protection that opens values of another cluster, and values in clear."""
        return self

    def new_hash(self) -> Hash:
        """Return a SHA-256, which is keyed if there are keys."""
        return hashlib.sha256()

    def forms_of(self, place: SealedColumn, value: str) -> tuple[Sequence[str], Sequence[str]]:
        """Return the stored forms that a value may have, and beginnings of other ones."""
        return [place.escape(value)], []

    def storing(self, place: SealedColumn) -> Convert:
        """Return the function that makes the stored form of a value."""
        return lambda _, value: place.escape(value)

    def loading(self, place: SealedColumn) -> Convert:
        """Return the function that returns a value from its stored form.

        That function raises `SealedValueError`.
        """
        return place.unescape

    def storing_row(self, places: SealedColumns) -> ConvertRow:
        """Return the function that converts the values of a row to their stored forms."""
        return _of_prefixed(places, self.storing)

    def loading_row(self, places: SealedColumns) -> ConvertRow:
        """Return the function that converts the stored values of a row back."""
        return _of_prefixed(places, self.loading)


def _of_prefixed(places: SealedColumns, to: Callable[[SealedColumn], Convert]) -> ConvertRow:
    # Every row passes here, so nearly all values cost one comparison of a slice.
    prefixes = [(position, place.prefix, to(place)) for position, place in places]

    def convert(id: object, row: list[Any]) -> None:
        for position, prefix, one in prefixes:
            value = row[position]
            if value and value[:_WIDTH] == prefix:
                row[position] = one(id, value)

    return convert


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
