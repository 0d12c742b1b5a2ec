"""Serialization: convert dataclasses to dicts of plain JSON values, and back."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import MISSING, Field, fields
from datetime import datetime
from enum import Enum
from typing import TYPE_CHECKING, Any

import orjson

from openclaw_store.domain.validation import Check, check_time, read_time
from openclaw_store.errors import InvalidDataError

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

STORE_FIELDS = frozenset({"version", "updated_at"})
"""The fields that only the store sets."""

JsonCheck = Callable[[str, Any], bytes]
"""Takes the name and value of a JSON field; returns its text, or raises InvalidDataError."""


class BriefRepr:
    """A dataclass with a `repr` of the fields that differ from their defaults."""

    def __repr__(self) -> str:
        own: DataclassInstance = self  # type: ignore[assignment]  # a mixin of dataclasses
        given = ((field, getattr(self, field.name)) for field in fields(own))
        shown = (
            f"{field.name}={value!r}" for field, value in given if not _is_default(field, value)
        )
        return f"{type(self).__name__}({', '.join(shown)})"


def _is_default(field: Field[Any], value: object) -> bool:
    default = field.default if field.default_factory is MISSING else field.default_factory()
    return type(value) is type(default) and bool(value == default)


def to_dict(
    entity: DataclassInstance,
    kind: type[DataclassInstance],
    checks: Mapping[str, Check],
    json_checks: Mapping[str, JsonCheck],
) -> dict[str, Any]:
    """Return the fields of `kind` as plain JSON values, which share nothing with `entity`."""
    data = {}
    for field in fields(kind):
        value = _checked(field, getattr(entity, field.name), checks, json_checks)
        if isinstance(value, Enum):
            value = value.value
        elif isinstance(value, datetime):
            value = value.replace(tzinfo=None).isoformat(timespec="microseconds") + "Z"
        data[field.name] = value
    return data


def read_dict(
    data: Mapping[str, Any],
    kind: type[DataclassInstance],
    checks: Mapping[str, Check],
    json_checks: Mapping[str, JsonCheck],
    *,
    strict: bool,
) -> dict[str, Any]:
    """Return the fields of `kind` that `data` contains, which share nothing with it.

    Args:
        strict: Refuse unknown fields, and `STORE_FIELDS`.
    """
    if not isinstance(data, Mapping):
        raise InvalidDataError("data", f"must be a dict, not {type(data).__name__}")
    known = {field.name for field in fields(kind)}
    for name in data if strict else ():
        if name not in known:
            raise InvalidDataError(str(name), f"is not a field of {kind.__name__}: remove it")
        if name in STORE_FIELDS:
            raise InvalidDataError(name, "is set by the store alone: remove it")
    values = {}
    reading = {name: read_time if check is check_time else check for name, check in checks.items()}
    for field in fields(kind):
        if field.name in data:
            values[field.name] = _checked(field, data[field.name], reading, json_checks)
        elif field.default is MISSING and field.default_factory is MISSING:
            raise InvalidDataError(field.name, "is missing")
    return values


def _checked(
    field: Field[Any], value: Any, checks: Mapping[str, Check], json_checks: Mapping[str, JsonCheck]
) -> Any:
    if value is field.default:  # the checks refuse None, the default of optional fields
        return value
    if field.name in json_checks:
        return orjson.loads(json_checks[field.name](field.name, value))
    return checks[field.name](field.name, value)
