"""The cipher: AES-256-GCM, with the place of a value as associated data.

The associated data is the identifier of the cluster, the table, the column and the identifier of
the row: a value that was moved elsewhere does not open. The nonce is random.

The text is padded to make the base64 a multiple of four characters, all bits of which count: so no
other text opens to the same value.
"""

from __future__ import annotations

import hashlib
import hmac
from binascii import Error as Base64Error
from binascii import a2b_base64, b2a_base64
from collections.abc import Callable, Collection, Mapping, Sequence
from os import urandom
from typing import Any

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from openclaw_store.domain import ConvertRow
from openclaw_store.encryption.envelope import (
    HEADER_LENGTH,
    PREFIX,
    Convert,
    Hash,
    Protection,
    SealedColumn,
    SealedColumns,
)
from openclaw_store.encryption.fields import FIXED_REASONS
from openclaw_store.encryption.key_ring import KeyRing
from openclaw_store.errors import SealedValueError

_NONCE_BYTES = 12
_TAG_BYTES = 16
_HASH_BYTES = 18  # a multiple of three: 24 characters of base64, before the others
_PADDING = (b"\0\0\3", b"\0\2", b"\1")  # its last byte is its length
_PROOF = SealedColumn("sealing_keys", "proof", is_json=False)
_PROVEN = "openclaw-store"


def _number(id: int) -> str:
    return f"{id:06d}"


class Cipher(Protection):
    """Seals and opens the values of one cluster.

    Args:
        ring: An unlocked key ring; its primary key seals, all of its keys open.
        cluster: The number of the cluster.
        accepts_clear: Return values that are not sealed as they are, until all values are sealed.
        seals: The optional fields that it seals.
        opens: The optional fields that are sealed no more, but of which values may be sealed.
    """

    has_keys = True

    def __init__(
        self,
        ring: KeyRing,
        cluster: int,
        *,
        accepts_clear: bool,
        seals: Collection[str] = (),
        opens: Collection[str] = (),
    ) -> None:
        self.cluster: int = cluster
        self.accepts_clear = accepts_clear
        self.ring = ring
        self.seals, self.opens = frozenset(seals), frozenset(opens)
        self._openers: Mapping[str, AESGCM] = {
            _number(id): AESGCM(secret) for id, secret in ring.secrets().items()
        }
        self.header = None if ring.primary is None else f"{PREFIX}{_number(ring.primary)}$"
        """The beginning of all values that this cipher seals; `None` if it seals none."""

    def __repr__(self) -> str:
        return f"<Cipher of {self.ring!r}>"

    @property
    def unsearchable(self) -> Sequence[str]:  # type: ignore[override]  # it is only read
        names = ["error_contains", "metadata"]
        return [*names, "name_contains"] if "name" in self.seals | self.opens else names

    def reading(self, cluster: int | None = None) -> Cipher:
        cluster = self.cluster if cluster is None else cluster
        return Cipher(self.ring, cluster, accepts_clear=True, seals=self.seals, opens=self.opens)

    def new_hash(self) -> Hash:
        newest = self.ring.primary or max(self.ring.secrets())
        key = hmac.digest(self.ring.secrets()[newest], b"openclaw-store copy", "sha256")
        return hmac.new(key, digestmod=hashlib.sha256)

    def forms_of(self, place: SealedColumn, value: str) -> tuple[Sequence[str], Sequence[str]]:
        is_sealed = place.column in self.seals
        equal = [] if is_sealed and not self.accepts_clear else [place.escape(value)]
        if not is_sealed and place.column not in self.opens:
            return equal, []
        text = value.encode("utf-8", "surrogatepass")
        hashes = ((number, self._hasher(place, number)(text)) for number in self._openers)
        return equal, [
            f"{PREFIX}{number}${b2a_base64(hashed, newline=False).decode()}"
            for number, hashed in hashes
        ]

    def storing(self, place: SealedColumn) -> Convert:
        seal = self._sealer(place)
        if seal is None:
            return lambda _, value: place.escape(value)
        if place.column == "reason":
            return lambda row, value: value if value in FIXED_REASONS else seal(row, value)
        return seal

    def loading(self, place: SealedColumn) -> Convert:
        start, opener, prefix = int(place.is_json), self._openers.get, self._prefix(place)
        quote = '"' * start
        hashed = _HASH_BYTES if place.is_searched else 0
        nonced = hashed + _NONCE_BYTES

        def load(id: object, value: str) -> str:
            if type(value) is not str or not value.startswith(PREFIX, start):
                return self._clear(place, id, value)
            end = start + HEADER_LENGTH
            header = value[start:end]
            cipher = opener(header[len(PREFIX) : -1])
            is_whole = value.startswith(quote) and value.endswith(quote)
            if cipher is None or header[-1] != "$" or not is_whole:
                return self._not_opened(place, id, value)
            try:
                sealed = a2b_base64(value[end : len(value) - start], strict_mode=True)
                context = f"{prefix}{id}".encode("utf-8", "surrogatepass") + sealed[:hashed]
                text = cipher.decrypt(sealed[hashed:nonced], sealed[nonced:], context)
            except (Base64Error, ValueError, InvalidTag):
                raise _damaged(place, id) from None
            return text[: -text[-1]].decode("utf-8", "surrogatepass")

        return load

    def storing_row(self, places: SealedColumns) -> ConvertRow:
        return _of_row([(position, self.storing(place)) for position, place in places])

    def loading_row(self, places: SealedColumns) -> ConvertRow:
        return _of_row([(position, self.loading(place)) for position, place in places])

    def is_current(self, place: SealedColumn, value: Any) -> bool:
        """Return true if a rotation leaves a stored value as it is."""
        if not value or (place.column == "reason" and value in FIXED_REASONS):
            return True
        start = int(place.is_json)
        if self.header is not None and self._is_sealed(place):
            return type(value) is str and value.startswith(self.header, start)
        return type(value) is not str or not value.startswith(PREFIX, start)

    def prove(self) -> str:
        """Return a sealed text by which `proves` recognises the primary key."""
        return self.storing(_PROOF)(self.ring.primary, _PROVEN)

    def proves(self, id: int, proof: str) -> bool:
        """Return true if the key of this number has made the proof."""
        try:
            return self.loading(_PROOF)(id, proof) == _PROVEN
        except SealedValueError:
            return False

    def _is_sealed(self, place: SealedColumn) -> bool:
        """Return true if the values of a column are to be sealed."""
        return not place.is_optional or place.column in self.seals

    def _prefix(self, place: SealedColumn) -> str:
        return f"{self.cluster}\0{place.table}\0{place.column}\0"

    def _hasher(self, place: SealedColumn, number: str) -> Callable[[bytes], bytes]:
        """Return the function that makes the hash of a text by which the database finds it."""
        purpose = f"openclaw-store {place.table} {place.column}".encode()
        key = hmac.digest(self.ring.secrets()[int(number)], purpose, "sha256")
        return lambda text: hmac.digest(key, text, "sha256")[:_HASH_BYTES]

    def _sealer(self, place: SealedColumn) -> Convert | None:
        if self.header is None or not self._is_sealed(place):
            return None
        prefix, quote = self._prefix(place), '"' if place.is_json else ""
        head, number = f"{quote}{self.header}", self.header[len(PREFIX) : -1]
        encrypt: Callable[[bytes, bytes, bytes], bytes] = self._openers[number].encrypt
        hash_of = self._hasher(place, number) if place.is_searched else lambda _: b""

        def seal(id: object, value: str) -> str:
            text = value.encode("utf-8", "surrogatepass")
            hashed = hash_of(text)
            text += _PADDING[(_NONCE_BYTES + len(text) + _TAG_BYTES) % 3]
            nonce = urandom(_NONCE_BYTES)
            context = f"{prefix}{id}".encode("utf-8", "surrogatepass") + hashed
            sealed = hashed + nonce + encrypt(nonce, text, context)
            return f"{head}{b2a_base64(sealed, newline=False).decode()}{quote}"

        return seal

    def _clear(self, place: SealedColumn, id: object, value: str) -> str:
        """Return a value that is not sealed."""
        if self._accepts_clear(place) or (place.column == "reason" and value in FIXED_REASONS):
            return value
        raise SealedValueError(
            *(place.table, place.column, id),
            "is not sealed, but all values of this database are: it was damaged, or written by "
            "hand; if you trust it, `openclaw-store keys rotate --accept-clear` seals it",
        )

    def _accepts_clear(self, place: SealedColumn) -> bool:
        return self.accepts_clear or not self._is_sealed(place)

    def _not_opened(self, place: SealedColumn, id: object, value: str) -> str:
        """Return an escaped value, or raise the error for a value that no key opens."""
        start = int(place.is_json)
        number = value[start + len(PREFIX) : start + HEADER_LENGTH - 1]
        if number == "-" * len(number) and self._accepts_clear(place):
            return place.unescape(id, value)
        if number.isdecimal() and number not in self._openers:
            raise SealedValueError(
                *(place.table, place.column, id),
                f"is sealed by key {int(number)}, which the key ring lacks: add that key",
            )
        raise _damaged(place, id)


def _damaged(place: SealedColumn, id: object) -> SealedValueError:
    return SealedValueError(
        *(place.table, place.column, id),
        "was damaged, or belongs to another row, column or cluster: restore it from a backup",
    )


def _of_row(conversions: list[tuple[int, Convert]]) -> ConvertRow:
    def convert(id: object, row: list[Any]) -> None:
        for position, one in conversions:
            value = row[position]
            if value:
                row[position] = one(id, value)

    return convert
