"""The stored form of a value: what a store returns for a value that it has accepted."""

from __future__ import annotations

import types
from datetime import UTC, datetime
from enum import Enum
from typing import Any, get_args, get_origin


def is_same(kept: Any, expected: Any) -> bool:
    """Return true if a value is the same in type and value: 1 is not True."""
    if type(kept) is not type(expected):
        return False
    if isinstance(kept, datetime):  # of UTC, `fold` says nothing
        return bool(kept == expected and kept.tzinfo is UTC)
    return repr(kept) == repr(expected)


def as_kept(hint: Any, value: Any) -> Any:
    """Return the stored form of a field's value, as it is read back."""
    if value is None:
        return None
    if get_origin(hint) is types.UnionType:
        hint = get_args(hint)[0]
    if hint is str:
        return str.__str__(value)
    if hint is int:
        return int(value)
    if hint is float:
        return float(value) + 0.0
    if hint is datetime:
        moment = value.astimezone(UTC)
        return datetime.combine(moment.date(), moment.time(), UTC)
    if isinstance(hint, type) and issubclass(hint, Enum):
        return hint(value)
    return _plain(value)


def _plain(value: Any) -> Any:
    """Return the stored form of a JSON value, as it is read back."""
    if isinstance(value, Enum):
        return _plain(value.value)
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if isinstance(value, dict):
        return {str.__str__(key): _plain(item) for key, item in value.items()}
    if isinstance(value, str):
        return str.__str__(value)
    if isinstance(value, int) and not isinstance(value, bool):
        return int(value)
    return value
