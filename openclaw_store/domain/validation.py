"""Validation: checks of all values from callers, with errors that name the field.

No value reaches a driver that one database would accept and the other refuse.
"""

from __future__ import annotations

import math
import re
import sys
import traceback
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping
from contextlib import suppress
from datetime import UTC, datetime, timedelta
from enum import Enum
from typing import Any, TypeVar

import orjson

from openclaw_store.errors import InvalidDataError, safe_repr

MAX_ID_LENGTH = 255
"""Characters of the identifier of a task, node or user."""
MAX_TEXT_LENGTH = 1 << 20
"""Characters of any other text."""
MAX_JSON_BYTES = 16 << 20
"""Bytes of a JSON value, encoded."""
MAX_JSON_DEPTH = 200
"""Nested lists and dicts of JSON."""
MAX_INTEGER = (1 << 63) - 1
MIN_INTEGER = -(1 << 63)

_ALWAYS_JSON = frozenset({str, bool, type(None)})
_NUL_IN_JSON = re.compile(rb"(?<!\\)(?:\\\\)*\\u0000")

_TRACEPARENT = re.compile("[0-9a-f]{2}-[0-9a-f]{32}-[0-9a-f]{16}-[0-9a-f]{2}")

PLAIN_TYPES = frozenset({str, int, float, bool, type(None)})
"""The immutable types of JSON."""
EMPTY: Mapping[type[Any], Any] = {list: [], dict: {}, type(None): None}
"""The empty value of each type, which all records share; every copy replaces it."""

_ELEMENTS = 10_000
"""Elements of JSON that are checked in one step."""

Result = TypeVar("Result")

Steps = Generator[None, None, Result]
"""A computation in steps of a few milliseconds, between which other coroutines may run."""

Check = Callable[[str, Any], Any]
"""Takes the name and value of a field; returns the value to store, or `InvalidDataError`."""


def check_fields(
    fields: dict[str, Any],
    stored: Mapping[str, Any],
    checks: Iterable[tuple[str, Any, Check]],
    json_checks: Iterable[tuple[str, type[Any], Check]],
    encoded: Mapping[str, bytes],
) -> None:
    """Replace the values of a caller in `fields` by the values to store.

    Args:
        fields: Values by name.
        stored: Checked values of the same entity; JSON that is equal is taken from here.
        checks: Name, default and check of each field that is not JSON.
        json_checks: Name, type of the default and check of each JSON field.
        encoded: JSON fields that were checked before.

    Raises:
        InvalidDataError: With the first field that is missing or cannot be stored.
    """
    try:
        for name, default, check in checks:
            value = fields[name]
            if value is not default and value is not stored[name]:
                fields[name] = check(name, value)
        for name, empty, check in json_checks:
            value, before = fields[name], stored[name]
            if name in encoded:
                fields[name] = encoded[name]
            elif not value and type(value) is empty:
                fields[name] = EMPTY[empty]
            else:
                fields[name] = before if _is_same_json(value, before) else check(name, value)
    except KeyError as error:
        raise InvalidDataError(str(error.args[0]), "is missing") from None


def _is_same_json(value: Any, stored: Any) -> bool:
    """Return true if two values are the same JSON, including the types of their elements."""
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
    """Return an identifier: text that is neither empty nor too long."""
    text = check_text(name, value, MAX_ID_LENGTH)
    if not text:
        raise InvalidDataError(name, "must not be empty")
    return text


def check_key(name: str, value: Any) -> str:
    """Return a key to search: an identifier, or the empty text, under which there is no row."""
    return check_text(name, value, MAX_ID_LENGTH)


def check_text(name: str, value: Any, longest: int = MAX_TEXT_LENGTH) -> str:
    """Return text that both databases can store."""
    if not isinstance(value, str):
        raise InvalidDataError(name, f"must be text, not {safe_repr(value)}")
    # A subclass may override the methods that are called below.
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


def describe_exception(error: BaseException) -> str:
    """Return the type and text of an exception, as text that both databases can store."""
    text = "".join(traceback.format_exception_only(error)).strip().replace("\0", "\\0")
    return text[:MAX_TEXT_LENGTH].encode(errors="replace").decode()


def check_count(name: str, value: Any) -> int:
    """Return a whole number from 0 to 2^63 - 1."""
    # `bool` is a subclass of `int`; the first comparison is a fast path for plain integers.
    if type(value) is not int and (isinstance(value, bool) or not isinstance(value, int)):
        raise InvalidDataError(name, f"must be a whole number, not {safe_repr(value)}")
    if not 0 <= value <= MAX_INTEGER:
        raise InvalidDataError(name, f"must be between 0 and 2^63 - 1, not {safe_repr(value)}")
    return int(value)


def check_optional_count(name: str, value: Any) -> int | None:
    """Return a whole number from 0 to 2^63 - 1, or `None`."""
    return None if value is None else check_count(name, value)


def check_positive(name: str, value: Any, greatest: int = MAX_INTEGER) -> int:
    """Return a whole number from 1 to `greatest`."""
    if isinstance(value, int) and not isinstance(value, bool) and value < 1:
        raise InvalidDataError(name, f"must be at least 1, not {safe_repr(value)}")
    if check_count(name, value) > greatest:
        raise InvalidDataError(name, f"must be at most {greatest}, not {value}")
    return int(value)


def check_limit(limit: int | None) -> int | None:
    """Return the limit of a list: at least 1, or `None` for all."""
    return None if limit is None else check_positive("limit", limit)


def check_version(name: str, value: Any) -> int:
    """Return a version; entries that are only in memory have negative ones."""
    if type(value) is not int or abs(value) > MAX_INTEGER:
        raise InvalidDataError(
            name, f"must be the whole number it came with, not {safe_repr(value)}"
        )
    return value


def check_number(name: str, value: Any, greatest: float = sys.float_info.max) -> float:
    """Return a finite number from 0 to `greatest`."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise InvalidDataError(name, f"must be a number, not {safe_repr(value)}")
    if not 0 <= value <= greatest:
        rule = f"between 0 and {greatest:g}" if greatest < sys.float_info.max else "finite, from 0"
        raise InvalidDataError(name, f"must be {rule}, not {safe_repr(value)}")
    return float(value) + 0.0  # converts -0.0, which only PostgreSQL would store, to 0.0


def check_percentage(name: str, value: Any) -> float:
    """Return a number from 0 to 100."""
    return check_number(name, value, 100)


def check_limit_seconds(name: str, value: Any) -> float:
    """Return the seconds of a time limit: more than 0, and up to 10^9 (32 years)."""
    seconds = check_number(name, value, 1e9)
    if not seconds:
        raise InvalidDataError(name, "must be a positive number of seconds, not 0")
    return seconds


def check_seconds(name: str, value: float) -> timedelta:
    """Return a duration; `value` is in seconds, from 0 to 10^9 (32 years)."""
    return timedelta(seconds=check_number(name, value, 1e9))


def check_time(name: str, value: Any) -> datetime:
    """Return a time in UTC; a naive one is local time."""
    if not isinstance(value, datetime):
        raise InvalidDataError(name, f"must be a datetime, not {safe_repr(value)}")
    is_plain = type(value) is datetime
    if is_plain and value.tzinfo is UTC:
        return value
    try:
        moment = value.astimezone(UTC)
        # A plain `datetime` also from a subclass, as the database would return one.
        return moment if is_plain else datetime.combine(moment.date(), moment.time(), UTC)
    except (OverflowError, ValueError, OSError) as error:
        raise InvalidDataError(name, f"{value} is outside the range of UTC") from error


def read_time(name: str, value: Any) -> datetime:
    """Return a time in UTC, from ISO 8601; one without a zone is local time."""
    if isinstance(value, str):
        with suppress(ValueError):  # the error below names the value
            value = datetime.fromisoformat(value)
    if not isinstance(value, datetime):
        wanted = "must be a time in ISO 8601, such as 2026-03-01T12:00:00Z"
        raise InvalidDataError(name, f"{wanted}, not {safe_repr(value)}")
    return check_time(name, value)


def check_traceparent(name: str, value: Any) -> str:
    """Return the header `traceparent` of W3C Trace Context."""
    if not isinstance(value, str) or not _TRACEPARENT.fullmatch(value):
        example = "00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01"
        raise InvalidDataError(name, f"must be like {example}, or None, not {safe_repr(value)}")
    return value


def check_enum(kind: type[Enum]) -> Check:
    """Return the check of a member of `kind`, or of its value."""

    def check(name: str, value: Any) -> Enum:
        if type(value) is kind:
            return value
        try:
            if isinstance(value, bool):  # True is 1, and 1 is a priority
                raise ValueError
            return kind(value)
        except ValueError:
            names = (f"{member.value} ({member.name})" for member in kind)  # of numbers
            known = ", ".join(kind if issubclass(kind, str) else names)
            raise InvalidDataError(
                name, f"must be one of {known}, not {safe_repr(value)}"
            ) from None

    return check


def encode_texts(name: str, value: Any) -> bytes:
    """Return the JSON of a list of text."""
    return _encode_at_once(_check_texts, name, value)


def encode_object(name: str, value: Any) -> bytes:
    """Return the JSON of a dict."""
    return _encode_at_once(_check_object, name, value)


def encode_json(name: str, value: Any) -> bytes:
    """Return the compact text of a JSON value.

    Raises:
        InvalidDataError: If JSON or one of the databases cannot represent it.
    """
    return _encode_at_once(_check_json, name, value)


def encode_in_steps(encode: Check, name: str, value: Any) -> Steps[bytes]:
    """Return the result of one of the functions above, in steps."""
    try:
        yield from _STEPS[encode](name, value)
    except RuntimeError as error:
        raise InvalidDataError(name, "was changed while it was checked") from error
    return _encode_checked(name, value)


class LongValueError(Exception):
    """A JSON value has so many elements that it must be encoded in steps."""


def short_only(encode: Check) -> Check:
    """Return one of the functions above, but for values that take one step.

    It raises `LongValueError` for any other.
    """
    steps = _STEPS[encode]

    def encode_short(name: str, value: Any) -> bytes:
        for _ in steps(name, value):
            raise LongValueError
        return _encode_checked(name, value)

    return encode_short


def is_long(value: Any) -> bool:
    """Return true if a JSON value may take more than one step."""
    remaining = _ELEMENTS - 1
    containers = [value]
    for one in containers:
        if not isinstance(one, (dict, list, tuple)):
            continue
        elements = one.values() if isinstance(one, dict) else one
        remaining -= len(elements)
        if remaining < 0:
            return True
        if not PLAIN_TYPES.issuperset(map(type, elements)):
            containers.extend(elements)
    return False


def _encode_at_once(check: Callable[[str, Any], Steps[None]], name: str, value: Any) -> bytes:
    for _ in check(name, value):
        pass
    return _encode_checked(name, value)


def _encode_checked(name: str, value: Any) -> bytes:
    try:
        text = orjson.dumps(value)
        if len(text) < 4096:  # copied, since it occupies at least a page of memory otherwise
            text = bytes(memoryview(text))
    except (TypeError, ValueError, RecursionError) as error:
        raise InvalidDataError(name, f"is not JSON: {error}") from error
    if b"\\u0000" in text and _NUL_IN_JSON.search(text):
        raise InvalidDataError(name, "must not contain the character NUL")
    if len(text) > MAX_JSON_BYTES:
        raise InvalidDataError(name, f"is larger than {MAX_JSON_BYTES} bytes of JSON")
    return text


def _check_texts(name: str, value: Any) -> Steps[None]:
    if not isinstance(value, (list, tuple)):
        raise InvalidDataError(name, f"must be a list of text, not {safe_repr(value)}")
    for count, element in enumerate(value, 1):
        if not isinstance(element, str):
            raise InvalidDataError(name, f"must be a list of text, but has {safe_repr(element)}")
        if not count % _ELEMENTS:
            yield


def _check_object(name: str, value: Any) -> Steps[None]:
    if not isinstance(value, dict):
        raise InvalidDataError(name, f"must be a dict, not {safe_repr(value)}")
    return _check_json(name, value)


def _check_json(name: str, value: Any) -> Steps[None]:
    """Refuse values that orjson would convert silently: NaN, infinity, types outside JSON."""
    is_container = isinstance(value, (dict, list, tuple))
    containers = [_elements(name, value) if is_container else iter((value,))]
    count = 0
    while containers:
        for element in containers[-1]:
            count += 1
            if not count % _ELEMENTS:
                yield
            if type(element) in _ALWAYS_JSON:
                continue
            if isinstance(element, int):
                if not MIN_INTEGER <= element <= MAX_INTEGER:
                    raise InvalidDataError(name, "has an integer outside 64 bits")
            elif isinstance(element, float):
                if not math.isfinite(element):
                    raise InvalidDataError(name, f"has {element}, which JSON cannot hold")
            elif isinstance(element, (dict, list, tuple)):
                if len(containers) >= MAX_JSON_DEPTH:
                    raise InvalidDataError(name, f"is nested more than {MAX_JSON_DEPTH} deep")
                if element:
                    containers.append(_elements(name, element))
                    break  # its elements first
            elif not isinstance(element, str):
                raise InvalidDataError(name, f"has {safe_repr(element)}, which is not JSON")
        else:
            containers.pop()


def _elements(name: str, container: Any) -> Iterator[Any]:
    if not isinstance(container, dict):
        return iter(container)
    for key in container:
        if not isinstance(key, str):
            raise InvalidDataError(name, f"has the key {safe_repr(key)}, which is not text")
    return iter(container.values())


_STEPS: Mapping[Check, Callable[[str, Any], Steps[None]]] = {
    encode_texts: _check_texts,
    encode_object: _check_object,
    encode_json: _check_json,
}
"""For each check of a JSON field, its first part, in steps."""
