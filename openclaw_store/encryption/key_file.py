"""Changes of a key file: make it, add a key, choose the primary one, retire and remove keys.

A change replaces the file atomically.
"""

from __future__ import annotations

import secrets
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import orjson

from openclaw_store.backends import written_aside
from openclaw_store.encryption.key_ring import (
    KEY_BYTES,
    Key,
    KeyState,
    check_keys,
    entry_of,
    read_file,
)
from openclaw_store.errors import KeyRingError


def create(path: Path, wrapped: bytes | None = None) -> None:
    """Make a file with one new key, number 1.

    Args:
        wrapped: A data key as a `KeyProvider` takes it; `None` to draw a plain key.

    Raises:
        InvalidDataError: If the file exists.
        UnavailableError: If it cannot be written.
    """
    _write(path, [_new_key(1, wrapped)], 1, overwrite=False)


def add(path: Path, wrapped: bytes | None = None, *, is_standby: bool = False) -> int:
    """Add a new key, which becomes the primary one; return its number.

    Args:
        wrapped: As of `create`.
        is_standby: Leave the primary key as it is: other machines must get the file first.
    """
    keys, primary = read_file(path)
    id = max(key.id for key in keys) + 1
    _write(path, [*keys, _new_key(id, wrapped)], primary if is_standby else id)
    return id


def use(path: Path, id: int | None) -> None:
    """Make a key the primary one; `None` seals nothing from now on."""
    keys, _ = read_file(path)
    _write(path, keys, id)


def retire(path: Path, id: int) -> None:
    """Let a key, not the primary one, only open values from now on."""
    keys, primary = read_file(path)
    _require(path, keys, id)
    if id == primary:
        raise KeyRingError(f"key {id} is the primary one: add another key first", id)
    changed = [replace(key, state=KeyState.RETIRED) if key.id == id else key for key in keys]
    _write(path, changed, primary)


def remove(path: Path, id: int) -> None:
    """Remove a retired key: what it has sealed can never be read again."""
    keys, primary = read_file(path)
    if _require(path, keys, id).state is not KeyState.RETIRED:
        raise KeyRingError(f"key {id} is active: retire it first", id)
    _write(path, [key for key in keys if key.id != id], primary)


def _new_key(id: int, wrapped: bytes | None) -> Key:
    secret = secrets.token_bytes(KEY_BYTES) if wrapped is None else None
    return Key(id, secret, wrapped=wrapped)


def _require(path: Path, keys: Sequence[Key], id: int) -> Key:
    for key in keys:
        if key.id == id:
            return key
    raise KeyRingError(f"{path} has no key {id}", id)


def _write(path: Path, keys: Sequence[Key], primary: int | None, *, overwrite: bool = True) -> None:
    check_keys(keys, primary)
    document = {"primary": primary, "keys": list(map(entry_of, keys))}
    with written_aside(path, overwrite=overwrite) as partial:
        partial.write_bytes(orjson.dumps(document, option=orjson.OPT_INDENT_2) + b"\n")
