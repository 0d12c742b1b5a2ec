"""Records: what the store keeps of a task or node, checked once, never changed, cheap to copy.

Everything that crosses the border is checked here, so that nothing reaches a driver that one
database would take and another refuse. `encode` makes a `Record` of a caller's object;
`Record.copy` makes objects for callers that share nothing with it.

JSON stays text until somebody looks at it. Then lists and dicts of plain values are kept
decoded, because `copy()` of one is faster than decoding it again; nested ones stay text,
because decoding is the fastest deep copy there is.
"""

from __future__ import annotations

import math
import re
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import fields as dataclass_fields
from datetime import UTC, datetime
from enum import Enum
from typing import Any, Generic, NamedTuple, TypeVar, cast

import orjson

from openclaw_store.errors import InvalidDataError
from openclaw_store.models import NodeInfo, NodeStatus, Task, TaskPriority, TaskStatus, TaskType

Item = TypeVar("Item", Task, NodeInfo)

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

_PLAIN = frozenset({str, int, float, bool, type(None)})
_TEXT = frozenset({str})
_HARMLESS = frozenset({str, bool, type(None)})
_NONE = type(None)
_EMPTY: Mapping[type[Any], Any] = {list: [], dict: {}, _NONE: None}  # shared; copies copy them
_NUL_IN_JSON = re.compile(rb"(?<!\\)(?:\\\\)*\\u0000")

_known_names: dict[tuple[str, ...], tuple[str, ...]] = {}

Check = Callable[[str, Any], Any]
"""Takes a field's name and value; returns the value as it is kept, or raises."""


class Plan(NamedTuple):
    """How `Record.values` makes the parameters of a statement."""

    pick: Callable[[Mapping[str, Any]], Sequence[Any]]
    """Takes the values of the fields out of a record's, in the order of the parameters."""
    encoders: Sequence[tuple[int, Callable[[Any], Any]]]
    """Places of values that the driver takes in another form, and what makes it."""
    json: Sequence[tuple[int, str]]
    """Places of JSON fields, which come as text, or `None` for their default."""


class Record(Generic[Item]):
    """An unchanging image of a task or node."""

    __slots__ = ("_flat", "_nested", "fields", "kind")

    def __init__(self, kind: type[Item], fields: dict[str, Any]) -> None:
        """Take over `fields`, which belongs to the record now.

        Args:
            kind: What is recorded.
            fields: Its values by name; JSON is `bytes`, which no JSON value is, or the default.
        """
        self.kind: type[Item] = kind
        self.fields = fields
        """Values by name, to be read only; those of JSON fields come from `decoded`."""
        self._flat: Sequence[str] | None = None
        """JSON fields to be copied for each copy; `None` while nobody has looked at any."""
        self._nested: Sequence[str] = ()
        """JSON fields to be decoded for each copy."""

    def __repr__(self) -> str:
        return f"Record({self.copy()!r})"

    def __getitem__(self, name: str) -> Any:
        """The value of a field that is not JSON."""
        return self.fields[name]

    @property
    def version(self) -> int:
        return cast(int, self.fields["version"])

    def copy(self) -> Item:
        """An object of the caller's own, equal to what was recorded."""
        flat = self._decode() if self._flat is None else self._flat
        fields = self.fields.copy()
        for name in flat:
            fields[name] = fields[name].copy()
        for name in self._nested:
            fields[name] = orjson.loads(fields[name])
        item: Item = object.__new__(self.kind)
        item.__dict__ = fields
        return item

    def decoded(self, name: str) -> Any:
        """The value of a JSON field; not to be changed by the caller."""
        if self._flat is None:
            self._decode()
        value = self.fields[name]
        return orjson.loads(value) if type(value) is bytes else value

    def encoded(self, name: str) -> bytes | None:
        """The text of a JSON field; `None` for its default."""
        value = self.fields[name]
        if value is None or type(value) is bytes:
            return value
        if not value and type(value) is JSON_FIELDS[self.kind][name]:
            return None
        return orjson.dumps(value)

    def values(self, plan: Plan) -> list[Any]:
        """The values of the fields of `plan`, as the driver takes them."""
        row = list(plan.pick(self.fields))
        for place, encoder in plan.encoders:
            value = row[place]
            if value is not None:
                row[place] = encoder(value)
        for place, name in plan.json:
            text = row[place]
            if text is not None and type(text) is not bytes:
                text = self.encoded(name)
            row[place] = None if text is None else text.decode()
        return row

    def evolve(self, **values: Any) -> Record[Item]:
        """A record that differs in the given fields, none of them JSON."""
        evolved: Record[Item] = object.__new__(Record)
        evolved.kind = self.kind
        evolved.fields = fields = self.fields.copy()
        fields.update(values)
        # Nobody edits the lists and dicts of a record, so they are shared.
        evolved._flat = self._flat
        evolved._nested = self._nested
        return evolved

    def merge(self, other: Record[Item], names: Iterable[str]) -> Record[Item]:
        """A record that has the named fields from `other` and the rest from this one."""
        fields = self.fields.copy()
        fields.update([(name, other.fields[name]) for name in names])
        return Record(self.kind, fields)

    def differences(self, other: Record[Item]) -> tuple[str, ...]:
        """Names of the fields whose values are not the same, those set by the store aside."""
        mine, theirs = self.fields, other.fields
        names = [
            name
            for name in _PLAIN_FIELDS[self.kind]
            if mine[name] is not theirs[name] and mine[name] != theirs[name]
        ]
        # Equal is not the same for JSON: 1 and True, 1 and 1.0.
        names += [
            name
            for name in JSON_FIELDS[self.kind]
            if mine[name] is not theirs[name] and self.encoded(name) != other.encoded(name)
        ]
        return tuple(names)

    def _decode(self) -> Sequence[str]:
        """Keep lists and dicts of plain values decoded; returns their names.

        Other threads may do the same at any time: each field is decided by what is found in it.
        """
        flat, nested = [], []
        for name in JSON_FIELDS[self.kind]:
            value = self.fields[name]
            if type(value) is bytes:
                value = _load(self, name, value)
                if isinstance(value, (list, dict)):
                    items: Iterable[Any] = value if isinstance(value, list) else value.values()
                    if not _PLAIN.issuperset(map(type, items)):
                        nested.append(name)
                        continue
                self.fields[name] = value
            if isinstance(value, (list, dict)):
                flat.append(name)
        self._nested = _shared(nested)
        self._flat = _shared(flat)
        return self._flat


Raw = tuple[Any, ...]
"""A row as the driver gave it, its values in the order of the fields."""

Decode = Callable[[Raw], Record[Any]]
"""Makes a record of a row."""


def encode(item: Item) -> Record[Item]:
    """Check a caller's object and keep a copy of it.

    Raises:
        InvalidDataError: Naming the first field that cannot be stored, and why.
    """
    kind = type(item)
    if kind not in _CHECKS:
        raise InvalidDataError("task or node", f"must be a Task or NodeInfo, not {kind.__name__}")
    checks, json_checks = _CHECKS[kind]
    fields = item.__dict__.copy()  # shares its table of keys with those of all others
    if len(fields) != len(checks) + len(json_checks):
        fields = _declared(item)
    try:
        for name, default, check in checks:
            value = fields[name]
            if value is not default:
                fields[name] = check(name, value)
        for name, empty, check_json in json_checks:
            value = fields[name]
            if not value and type(value) is empty:
                fields[name] = _EMPTY[empty]
            else:
                fields[name] = check_json(name, value)
    except KeyError as error:
        raise InvalidDataError(str(error.args[0]), "is missing") from None
    return Record(kind, fields)


def _shared(names: Iterable[str]) -> Sequence[str]:
    """The one tuple of these names that all records share."""
    found = tuple(names)
    return _known_names.setdefault(found, found)


def _declared(item: Task | NodeInfo) -> dict[str, Any]:
    """The fields of `item` without the attributes that somebody hung on it."""
    return {field.name: item.__dict__[field.name] for field in dataclass_fields(item)
            if field.name in item.__dict__}  # fmt: skip


def decode(kind: type[Item], row: Sequence[Any]) -> Record[Item]:
    """The record of a row whose columns stand in the order of the fields, JSON as text."""
    fields = kind(*row).__dict__
    for name, empty in JSON_FIELDS[kind].items():
        text = fields[name]
        fields[name] = _EMPTY[empty] if text is None else text.encode()
    return Record(kind, fields)


def write_back(record: Record[Item], item: Item) -> None:
    """Give the caller's object the version and the times it has in the store."""
    fields, target = record.fields, item.__dict__
    for name in STAMPED[record.kind]:
        target[name] = fields[name]


def check_id(name: str, value: Any) -> str:
    """An identifier: text that is not empty and not too long."""
    text = _text(name, value, MAX_ID_LENGTH)
    if not text:
        raise InvalidDataError(name, "must not be empty")
    return text


def check_text(name: str, value: Any) -> str:
    """Text as a row may hold it."""
    return _text(name, value)


def check_key(name: str, value: Any) -> str:
    """What may be looked up: as an identifier, but there is simply nothing under the empty one."""
    return _text(name, value, MAX_ID_LENGTH)


def check_count(name: str, value: Any) -> int:
    """A whole number from 0 to 2^63 - 1."""
    if type(value) is not int and (isinstance(value, bool) or not isinstance(value, int)):
        raise InvalidDataError(name, f"must be a whole number, not {_shown(value)}")
    if not 0 <= value <= MAX_INTEGER:
        raise InvalidDataError(name, f"must be between 0 and 2^63 - 1, not {_shown(value)}")
    return int(value)


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


def check_time(name: str, value: Any) -> datetime:
    """A moment, aware and in UTC; a naive one is read as local time."""
    if not isinstance(value, datetime):
        raise InvalidDataError(name, f"must be a datetime, not {_shown(value)}")
    if value.tzinfo is UTC:
        return value
    try:
        return value.astimezone(UTC)
    except (OverflowError, ValueError, OSError) as error:
        raise InvalidDataError(name, f"{value} is outside the range of UTC") from error


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


def encode_json(name: str, value: Any) -> bytes:
    """Compact text of a JSON value.

    Raises:
        InvalidDataError: For what JSON or one of the databases cannot hold.
    """
    _check_json(name, value, 0)
    return _encode_checked(name, value)


def _encode_checked(name: str, value: Any) -> bytes:
    try:
        text = orjson.dumps(value)
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
        if not _TEXT.issuperset(map(type, value)):
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


def _load(record: Record[Any], name: str, text: bytes) -> Any:
    try:
        return orjson.loads(text)
    except orjson.JSONDecodeError as error:
        key = record["task_id" if record.kind is Task else "node_id"]
        raise InvalidDataError(name, f"of {key!r} is not readable JSON: {error}") from error


def _shown(value: object) -> str:
    try:
        text = repr(value)
    except Exception:  # too deep, too many digits, or a fault of its own
        return f"{type(value).__name__} that cannot be shown"
    return text if len(text) <= 60 else f"{text[:57]}..."


def _text(name: str, value: Any, longest: int = MAX_TEXT_LENGTH) -> str:
    if not isinstance(value, str):
        raise InvalidDataError(name, f"must be text, not {_shown(value)}")
    if len(value) > longest:
        raise InvalidDataError(name, f"is longer than {longest} characters")
    if "\0" in value:
        raise InvalidDataError(name, "must not contain the character NUL")
    if not value.isascii():
        try:
            value.encode()
        except UnicodeEncodeError:
            raise InvalidDataError(name, "must not contain a lone surrogate") from None
    return value if type(value) is str else str.__str__(value)


def _texts(name: str, value: Any) -> bytes:
    if not isinstance(value, (list, tuple)):
        raise InvalidDataError(name, f"must be a list of text, not {_shown(value)}")
    if not _TEXT.issuperset(map(type, value)):
        for item in value:
            if not isinstance(item, str):
                raise InvalidDataError(name, f"must be a list of text, but has {_shown(item)}")
    return _encode_checked(name, value)


def _json_object(name: str, value: Any) -> bytes:
    if not isinstance(value, dict):
        raise InvalidDataError(name, f"must be a dict, not {_shown(value)}")
    return encode_json(name, value)


def _version(name: str, value: Any) -> int:
    if type(value) is not int or abs(value) > MAX_INTEGER:
        raise InvalidDataError(name, f"must be the whole number it came with, not {_shown(value)}")
    return value


JSON_FIELDS: Mapping[type[Any], Mapping[str, type[Any]]] = {
    Task: {
        "required_skills": list,
        "optional_skills": _NONE,
        "parameters": dict,
        "result": _NONE,
        "affinity_tags": _NONE,
        "metadata": dict,
    },
    NodeInfo: {"available_skills": list, "tags": list},
}
"""The fields that are stored as JSON, with the type of their default."""

_JSON_CHECKS: Mapping[str, Callable[[str, Any], bytes]] = {
    "required_skills": _texts,
    "optional_skills": _texts,
    "parameters": _json_object,
    "result": encode_json,
    "affinity_tags": _texts,
    "metadata": _json_object,
    "available_skills": _texts,
    "tags": _texts,
}

STORE_FIELDS = frozenset({"version", "updated_at"})
"""The fields that only the store sets."""

STAMPED: Mapping[type[Any], Sequence[str]] = {
    Task: (
        "submitted_at",
        "scheduled_at",
        "started_at",
        "completed_at",
        "updated_at",
        "version",
    ),
    NodeInfo: ("registered_at", "last_heartbeat", "version"),
}
"""The fields that a caller's object gets back when it was written."""

_FIELD_CHECKS: Mapping[type[Any], Mapping[str, Check]] = {
    Task: {
        "task_id": check_id,
        "task_type": check_enum(TaskType),
        "name": _text,
        "description": _text,
        "status": check_enum(TaskStatus),
        "priority": check_enum(TaskPriority),
        "assigned_node": check_key,
        "submitted_at": check_time,
        "scheduled_at": check_time,
        "started_at": check_time,
        "completed_at": check_time,
        "timeout": check_count,
        "retry_count": check_count,
        "max_retries": check_count,
        "error": _text,
        "user_id": check_key,
        "updated_at": check_time,
        "version": _version,
    },
    NodeInfo: {
        "node_id": check_id,
        "hostname": _text,
        "platform": _text,
        "arch": _text,
        "status": check_enum(NodeStatus),
        "cpu_usage": check_percentage,
        "memory_usage": check_percentage,
        "disk_usage": check_percentage,
        "max_concurrent_tasks": check_count,
        "running_tasks": check_count,
        "ip_address": _text,
        "tailscale_ip": _text,
        "port": check_count,
        "total_tasks_processed": check_count,
        "successful_tasks": check_count,
        "failed_tasks": check_count,
        "average_execution_time": check_number,
        "registered_at": check_time,
        "last_heartbeat": check_time,
        "version": _version,
    },
}

# A field that still is its default needs no check; so most of a task costs next to nothing.
_CHECKS = {
    kind: (
        tuple(
            (field.name, field.default, checks[field.name])
            for field in dataclass_fields(kind)
            if field.name in checks
        ),
        tuple((name, empty, _JSON_CHECKS[name]) for name, empty in JSON_FIELDS[kind].items()),
    )
    for kind, checks in _FIELD_CHECKS.items()
}

_PLAIN_FIELDS: Mapping[type[Any], Sequence[str]] = {
    kind: tuple(name for name in checks if name not in STORE_FIELDS)
    for kind, checks in _FIELD_CHECKS.items()
}
