"""What the store takes: checks of values on their way in, each with an error that names the field.

Everything that crosses the border is checked here, so that nothing reaches a driver that one
database would take and another refuse.
"""

from __future__ import annotations

import math
import re
import sys
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from datetime import UTC, datetime, timedelta
from enum import Enum
from typing import Any

import orjson

from openclaw_store.errors import InvalidDataError

MAX_ID_LENGTH = 255
"""Characters of an identifier (of a task, node or user)."""
MAX_TEXT_LENGTH = 1 << 20
"""Characters of any other text."""
MAX_JSON_BYTES = 16 << 20
"""Bytes of a JSON value, encoded."""
MAX_JSON_DEPTH = 200
"""How deep JSON may be nested."""
MAX_INTEGER = (1 << 63) - 1
MIN_INTEGER = -(1 << 63)

_HARMLESS = frozenset({str, bool, type(None)})
_NUL_IN_JSON = re.compile(rb"(?<!\\)(?:\\\\)*\\u0000")

PLAIN_TYPES = frozenset({str, int, float, bool, type(None)})
"""Types of JSON values that are immutable."""
EMPTY: Mapping[type[Any], Any] = {list: [], dict: {}, type(None): None}
"""The one empty value of each type that all records share; every copy replaces it."""

Check = Callable[[str, Any], Any]
"""Takes the name and value of a field; returns the value to keep, or raises `InvalidDataError`."""


def check_fields(
    fields: dict[str, Any],
    stored: Mapping[str, Any],
    checks: Iterable[tuple[str, Any, Check]],
    json_checks: Iterable[tuple[str, type[Any], Check]],
) -> None:
    """Replace the values of `fields` by the values to keep.

    Args:
        fields: Values by name, as a caller gave them.
        stored: Values of the same entity that were checked before; equal ones are kept as they are.
        checks: Name, default and check of each field that is not JSON.
        json_checks: Name, type of the default and check of each JSON field.

    Raises:
        InvalidDataError: Naming the first field that is missing or cannot be stored.
    """
    try:
        for name, default, check in checks:
            value = fields[name]
            if value is not default and value is not stored[name]:
                fields[name] = check(name, value)
        for name, empty, check in json_checks:
            value, before = fields[name], stored[name]
            if not value and type(value) is empty:
                fields[name] = EMPTY[empty]
            else:
                fields[name] = before if _is_same_json(value, before) else check(name, value)
    except KeyError as error:
        raise InvalidDataError(str(error.args[0]), "is missing") from None


def _is_same_json(value: Any, stored: Any) -> bool:
    """Return whether two values are the same JSON, including the types of their elements."""
    kind = type(value)
    if kind is not type(stored) or kind not in (list, dict):  # `bytes` is JSON not decoded yet
        return False
    elements = value.values() if kind is dict else value
    if not PLAIN_TYPES.issuperset(map(type, elements)):  # a caller's class may have its own `==`
        return False
    try:
        # Both comparisons are needed: NaN and null have one text, 1 and 1.0 are equal.
        return orjson.dumps(value) == orjson.dumps(stored) and bool(value == stored)
    except (TypeError, ValueError):  # not JSON
        return False


def check_id(name: str, value: Any) -> str:
    """An identifier: text that is not empty and not too long."""
    text = check_text(name, value, MAX_ID_LENGTH)
    if not text:
        raise InvalidDataError(name, "must not be empty")
    return text


def check_key(name: str, value: Any) -> str:
    """What may be looked up: as an identifier, but there is simply nothing under the empty one."""
    return check_text(name, value, MAX_ID_LENGTH)


def check_text(name: str, value: Any, longest: int = MAX_TEXT_LENGTH) -> str:
    """Text as a row may hold it."""
    if not isinstance(value, str):
        raise InvalidDataError(name, f"must be text, not {_shown(value)}")
    # What a text of another type says of itself need not be so.
    text: str = value if type(value) is str else str.__str__(value)
    if len(text) > longest:
        raise InvalidDataError(name, f"is longer than {longest} characters")
    if "\0" in text:
        raise InvalidDataError(name, "must not contain the character NUL")
    if not text.isascii():
        try:
            text.encode()
        except UnicodeEncodeError:
            raise InvalidDataError(name, "must not contain a lone surrogate") from None
    return text


def check_count(name: str, value: Any) -> int:
    """A whole number from 0 to 2^63 - 1."""
    if type(value) is not int and (isinstance(value, bool) or not isinstance(value, int)):
        raise InvalidDataError(name, f"must be a whole number, not {_shown(value)}")
    if not 0 <= value <= MAX_INTEGER:
        raise InvalidDataError(name, f"must be between 0 and 2^63 - 1, not {_shown(value)}")
    return int(value)


def check_some(name: str, value: Any) -> int:
    """A whole number from 1."""
    if check_count(name, value) < 1:
        raise InvalidDataError(name, "must be at least 1")
    return int(value)


def check_limit(limit: int | None) -> int | None:
    """A limit of a list: at least 1, or `None` for all."""
    if limit is not None and check_count("limit", limit) < 1:
        raise InvalidDataError("limit", "must be at least 1; None means all")
    return limit


def check_version(name: str, value: Any) -> int:
    """A version as the store gave it."""
    if type(value) is not int or abs(value) > MAX_INTEGER:
        raise InvalidDataError(name, f"must be the whole number it came with, not {_shown(value)}")
    return value


def check_number(name: str, value: Any, greatest: float = sys.float_info.max) -> float:
    """A finite number from 0 to `greatest`."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise InvalidDataError(name, f"must be a number, not {_shown(value)}")
    if not 0 <= value <= greatest:
        raise InvalidDataError(name, f"must be between 0 and {greatest:g}, not {_shown(value)}")
    return float(value) + 0.0  # makes -0.0, which PostgreSQL would keep, 0.0


def check_percentage(name: str, value: Any) -> float:
    """A number from 0 to 100."""
    return check_number(name, value, 100)


def check_limit_seconds(name: str, value: Any) -> float:
    """Seconds that something may take: more than 0, and up to 10^9 (32 years)."""
    seconds = check_number(name, value, 1e9)
    if not seconds:
        raise InvalidDataError(name, "must be a positive number of seconds, not 0")
    return seconds


def check_seconds(name: str, value: float) -> timedelta:
    """A duration in seconds, from 0 to 10^9 (32 years)."""
    return timedelta(seconds=check_number(name, value, 1e9))


def check_time(name: str, value: Any) -> datetime:
    """A moment, aware and in UTC; a naive one is read as local time."""
    if not isinstance(value, datetime):
        raise InvalidDataError(name, f"must be a datetime, not {_shown(value)}")
    is_plain = type(value) is datetime
    if is_plain and value.tzinfo is UTC:
        return value
    try:
        moment = value.astimezone(UTC)
        # Of a subclass, the database would give back a plain one.
        return moment if is_plain else datetime.combine(moment.date(), moment.time(), UTC)
    except (OverflowError, ValueError, OSError) as error:
        raise InvalidDataError(name, f"{value} is outside the range of UTC") from error


def read_time(name: str, value: Any) -> datetime:
    """A moment in ISO 8601, aware and in UTC; one without a zone is read as local time."""
    if isinstance(value, str):
        with suppress(ValueError):  # it is named below
            value = datetime.fromisoformat(value)
    if not isinstance(value, datetime):
        wanted = "must be a time in ISO 8601, such as 2026-03-01T12:00:00Z"
        raise InvalidDataError(name, f"{wanted}, not {_shown(value)}")
    return check_time(name, value)


def check_enum(kind: type[Enum]) -> Check:
    """A check for members of `kind`, or their values."""

    def check(name: str, value: Any) -> Enum:
        if type(value) is kind:
            return value
        try:
            if isinstance(value, bool):  # True is 1, and 1 is a priority
                raise ValueError
            return kind(value)
        except ValueError:
            known = ", ".join(str(member.value) for member in kind)
            raise InvalidDataError(name, f"must be one of {known}, not {_shown(value)}") from None

    return check


def encode_texts(name: str, value: Any) -> bytes:
    """The JSON of a list of text."""
    if not isinstance(value, (list, tuple)):
        raise InvalidDataError(name, f"must be a list of text, not {_shown(value)}")
    for item in value:
        if not isinstance(item, str):
            raise InvalidDataError(name, f"must be a list of text, but has {_shown(item)}")
    return _encode_checked(name, value)


def encode_object(name: str, value: Any) -> bytes:
    """The JSON of a dict."""
    if not isinstance(value, dict):
        raise InvalidDataError(name, f"must be a dict, not {_shown(value)}")
    return encode_json(name, value)


def encode_json(name: str, value: Any) -> bytes:
    """Compact text of a JSON value.

    Raises:
        InvalidDataError: For what JSON or one of the databases cannot hold.
    """
    _check_json(name, value, 0)
    return _encode_checked(name, value)


def _encode_checked(name: str, value: Any) -> bytes:
    try:
        # A copy of its own size: behind each of orjson's stands a page of memory while it lives.
        text = orjson.dumps(value).decode().encode()
    except (TypeError, ValueError, RecursionError) as error:
        raise InvalidDataError(name, f"is not JSON: {error}") from error
    if b"\\u0000" in text and _NUL_IN_JSON.search(text):
        raise InvalidDataError(name, "must not contain the character NUL")
    if len(text) > MAX_JSON_BYTES:
        raise InvalidDataError(name, f"is larger than {MAX_JSON_BYTES} bytes of JSON")
    return text


def _check_json(name: str, value: Any, depth: int) -> None:
    """Refuse what orjson would change in silence: NaN, infinity, and types that are not JSON."""
    if depth >= MAX_JSON_DEPTH:
        raise InvalidDataError(name, f"is nested more than {MAX_JSON_DEPTH} deep")
    items: Iterable[Any]
    if isinstance(value, dict):
        for key in value:
            if not isinstance(key, str):
                raise InvalidDataError(name, f"has the key {_shown(key)}, which is not text")
        items = value.values()
    elif isinstance(value, (list, tuple)):
        items = value
    else:
        items = (value,)
    for item in items:
        if type(item) in _HARMLESS:
            continue
        if isinstance(item, int):
            if not MIN_INTEGER <= item <= MAX_INTEGER:
                raise InvalidDataError(name, "has an integer outside 64 bits")
        elif isinstance(item, float):
            if not math.isfinite(item):
                raise InvalidDataError(name, f"has {item}, which JSON cannot hold")
        elif isinstance(item, (dict, list, tuple)):
            _check_json(name, item, depth + 1)
        elif not isinstance(item, str):
            raise InvalidDataError(name, f"has {_shown(item)}, which is not JSON")


def _shown(value: object) -> str:
    try:
        text = repr(value)
    except Exception:  # too deep, too many digits, or a fault of its own
        return f"{type(value).__name__} that cannot be safe_repr"
    return text if len(text) <= 60 else f"{text[:57]}..."
