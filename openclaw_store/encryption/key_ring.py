"""Key rings: the keys of a process, from a file that only its owner can read."""

from __future__ import annotations

import base64
import os
import sys
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, replace
from enum import StrEnum
from pathlib import Path
from pkgutil import resolve_name
from typing import Any, Final, Protocol

import orjson

from openclaw_store.encryption.fields import OPTIONAL_FIELDS
from openclaw_store.errors import InvalidDataError, KeyRingError, safe_repr

KEYS_VARIABLE: Final = "OPENCLAW_STORE_KEYS"
"""The environment variable with the path of the key file."""

PROVIDER_VARIABLE: Final = "OPENCLAW_STORE_KEY_PROVIDER"
"""The environment variable with the provider of its wrapped keys, as `module:object`."""

KEY_BYTES: Final = 32
LARGEST_ID: Final = 999_999


class KeyState(StrEnum):
    """The use of a key."""

    ACTIVE = "active"
    """It opens values, and seals them if it is the primary key."""
    RETIRED = "retired"
    """It opens values only."""


class KeyProvider(Protocol):
    """Unwraps data keys, as a key management service does."""

    async def unwrap(self, id: int, wrapped: bytes) -> bytes:
        """Return the 32 bytes of a data key."""


@dataclass(frozen=True, slots=True)
class Key:
    """One key."""

    id: int
    """From 1 to 999999."""
    secret: bytes | None = field(repr=False)
    """32 bytes; `None` until it is unwrapped."""
    state: KeyState = KeyState.ACTIVE
    wrapped: bytes | None = field(default=None, repr=False)
    """The key as a `KeyProvider` takes it; `None` for a plain key."""


class KeyRing:
    """The keys of a process: the primary one seals, all of them open.

    Args:
        keys: All keys.
        primary: The number of the key that seals; `None` to seal nothing, and to open only.
        provider: Unwraps the keys that are wrapped, once, when a database is opened.
        seal: More fields to seal: `name`, `user_id`. The database keeps this choice for all of its
            processes; `None` leaves it as it is.

    Raises:
        KeyRingError: If two keys have one number, or the primary key is missing or retired.
        InvalidDataError: If `seal` has another field.
    """

    def __init__(
        self,
        keys: Sequence[Key],
        primary: int | None,
        provider: KeyProvider | None = None,
        *,
        seal: Collection[str] | None = None,
    ) -> None:
        self.keys: Mapping[int, Key] = {key.id: key for key in keys}
        self.primary = primary
        self.seal = None if seal is None else frozenset(seal)
        if self.seal is not None and (isinstance(seal, str) or self.seal - OPTIONAL_FIELDS):
            raise InvalidDataError(
                "seal", f"must be a set of {', '.join(sorted(OPTIONAL_FIELDS))}, not {seal!r}"
            )
        self._provider = provider
        check_keys(keys, primary)
        for key in keys:
            if key.secret is None and provider is None:
                raise KeyRingError(
                    f"key {key.id} is wrapped: give a KeyProvider, or set {PROVIDER_VARIABLE}",
                    key.id,
                )

    def __repr__(self) -> str:
        return f"<KeyRing of keys {sorted(self.keys)}, primary {self.primary}>"

    def __reduce__(self) -> Any:
        raise TypeError("a KeyRing is not pickled: load the file of keys in the other process")

    @classmethod
    def load(
        cls,
        path: str | Path,
        provider: KeyProvider | None = None,
        *,
        seal: Collection[str] | None = None,
    ) -> KeyRing:
        """Read a file of keys, which only its owner may read and write (mode 0600).

        Args:
            provider: Unwraps the keys that are wrapped; `None` for the one that
                `OPENCLAW_STORE_KEY_PROVIDER` names, as `module:object`.
            seal: As of `KeyRing`.

        Raises:
            KeyRingError: If the file is missing, malformed, or open to other users; or the provider
                cannot be imported.
        """
        return cls(*read_file(Path(path)), provider or _named_provider(), seal=seal)

    def sealing(self, fields: Collection[str]) -> KeyRing:
        """Return a key ring that seals these optional fields, unless its own were given."""
        return KeyRing(
            [*self.keys.values()],
            self.primary,
            self._provider,
            seal=fields if self.seal is None else self.seal,
        )

    def secrets(self) -> Mapping[int, bytes]:
        """Return the bytes of all keys, by number; they must be unwrapped."""
        return {key.id: key.secret for key in self.keys.values() if key.secret is not None}

    async def unlock(self) -> None:
        """Unwrap the keys that are wrapped.

        Raises:
            KeyRingError: If the provider returns no key of 32 bytes; an error of the provider is
                its cause.
        """
        for key in list(self.keys.values()):
            if key.secret is not None or self._provider is None or key.wrapped is None:
                continue
            try:
                secret = await self._provider.unwrap(key.id, key.wrapped)
            except Exception as error:
                reason = f"the provider did not unwrap key {key.id}: {type(error).__name__}"
                raise KeyRingError(reason, key.id) from error
            unwrapped = replace(key, secret=secret)
            _check_key(unwrapped)
            self.keys = {**self.keys, key.id: unwrapped}


def _named_provider() -> KeyProvider | None:
    """Import the provider that the environment names; a class is called without arguments."""
    name = os.environ.get(PROVIDER_VARIABLE)
    if not name:
        return None
    if "" not in sys.path:  # a program that was installed does not search the working folder
        sys.path.append("")
    try:
        found: Any = resolve_name(name)
        provider: KeyProvider = found() if isinstance(found, type) else found
    except Exception as error:
        reason = f"{PROVIDER_VARIABLE}={name} cannot be imported: {type(error).__name__}: {error}"
        raise KeyRingError(reason) from error
    if not callable(getattr(provider, "unwrap", None)):
        raise KeyRingError(f"{PROVIDER_VARIABLE}={name} has no method `unwrap`")
    return provider


def keys_of(keys: KeyRing | None, seal: Collection[str] | None = None) -> KeyRing | None:
    """Return the given key ring, or the one that the environment names, if any.

    Args:
        seal: As of `KeyRing`, for that of the environment.
    """
    path = os.environ.get(KEYS_VARIABLE)
    if keys is None and path:
        return KeyRing.load(path, seal=seal)
    if keys is not None and not isinstance(keys, KeyRing):
        raise KeyRingError("`keys` must be a KeyRing, as KeyRing.load(path) returns")
    return keys


def check_keys(keys: Sequence[Key], primary: int | None) -> None:
    """Refuse keys that make no key ring.

    Raises:
        KeyRingError: With the key that is wrong.
    """
    for key in keys:
        _check_key(key)
    states = {key.id: key.state for key in keys}
    if not keys or len(states) < len(keys):
        raise KeyRingError("the key ring is empty, or two of its keys have one number")
    if primary is not None and states.get(primary) is not KeyState.ACTIVE:
        reason = "is to seal, but is missing or retired: name an active key"
        raise KeyRingError(f"key {primary} {reason}", primary)


def _check_key(key: Key) -> None:
    if type(key.id) is not int or not 1 <= key.id <= LARGEST_ID:
        raise KeyRingError(f"the number of a key must be from 1 to {LARGEST_ID}")
    is_wrapped = key.secret is None and key.wrapped is not None
    if not is_wrapped and (not isinstance(key.secret, bytes) or len(key.secret) != KEY_BYTES):
        raise KeyRingError(f"key {key.id} must have {KEY_BYTES} bytes", key.id)


def read_file(path: Path) -> tuple[Sequence[Key], int | None]:
    """Return the keys of a file, and the number of the primary one.

    Raises:
        KeyRingError: If the file is missing, malformed, or open to other users.
    """
    try:
        with path.open("rb") as file:
            if os.name != "nt" and os.fstat(file.fileno()).st_mode & 0o077:
                raise KeyRingError(f"{path} is open to other users: run `chmod 600` on it")
            content = file.read()
    except OSError as error:
        reason = f"{path} cannot be read ({error.strerror}): make it with `openclaw-store keys new`"
        raise KeyRingError(reason) from error
    try:
        document = orjson.loads(content)
        keys = [_key_of(one) for one in document["keys"]]
        primary = document["primary"]
    except (AttributeError, KeyError, TypeError, ValueError):
        # Without the cause: an error of JSON quotes the file.
        raise KeyRingError(f"{path} is no file of keys: see `openclaw-store keys new`") from None
    if primary is not None and type(primary) is not int:
        raise KeyRingError(f"the primary key of {path} is no number: {safe_repr(primary)}")
    return keys, primary


def _key_of(entry: Mapping[str, Any]) -> Key:
    secret, wrapped = entry.get("key"), entry.get("wrapped")
    return Key(
        entry["id"],
        None if secret is None else base64.b64decode(secret, validate=True),
        KeyState(entry["state"]),
        None if wrapped is None else base64.b64decode(wrapped, validate=True),
    )


def entry_of(key: Key) -> dict[str, Any]:
    """Return a key as the file has it."""
    content = ("wrapped", key.wrapped) if key.wrapped is not None else ("key", key.secret)
    return {
        "id": key.id,
        content[0]: base64.b64encode(content[1] or b"").decode(),
        "state": key.state.value,
    }
