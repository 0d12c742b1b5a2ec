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
_NOTHING: dict[str, str] = {}
_EMPTY: Mapping[type[Any], Any] = {list: [], dict: {}}  # what all records have, and copies copy
_NUL_IN_JSON = re.compile(r"(?<!\\)(?:\\\\)*\\u0000")

_flat_fields: dict[tuple[str, ...], tuple[str, ...]] = {}

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

    __slots__ = ("_flat", "_is_decoded", "_texts", "fields", "kind")

    def __init__(
        self, kind: type[Item], fields: dict[str, Any], texts: dict[str, str], flat: list[str]
    ) -> None:
        """Take over `fields` and `texts`, which belong to the record now.

        Args:
            kind: What is recorded.
            fields: Its values by name; JSON fields given as text are `None`.
            texts: Text of JSON fields that nobody has looked at.
            flat: JSON fields with a list or dict of plain values, to be copied for each copy.
        """
        self.kind: type[Item] = kind
        self.fields = fields
        """Values by name, to be read only; those of JSON fields come from `decoded`."""
        self._texts = texts
        """JSON fields that were not decoded yet, or are decoded for each copy."""
        self._is_decoded = not texts
        self._flat = _shared(flat)

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
        if not self._is_decoded:
            self._decode()
        fields = self.fields.copy()
        for name in self._flat:
            fields[name] = fields[name].copy()
        if self._texts:
            for name, text in self._texts.items():
                fields[name] = orjson.loads(text)
        item: Item = object.__new__(self.kind)
        item.__dict__ = fields
        return item

    def decoded(self, name: str) -> Any:
        """The value of a JSON field; not to be changed by the caller."""
        if not self._is_decoded:
            self._decode()
        text = self._texts.get(name)
        return self.fields[name] if text is None else orjson.loads(text)

    def encoded(self, name: str) -> str | None:
        """The text of a JSON field; `None` for its default."""
        text = self._texts.get(name)
        if text is not None:
            return text
        value = self.fields[name]
        if value is None or (not value and type(value) is JSON_FIELDS[self.kind][name]):
            return None
        return _dump(value)

    def values(self, plan: Plan) -> list[Any]:
        """The values of the fields of `plan`, as the driver takes them."""
        row = list(plan.pick(self.fields))
        for place, encoder in plan.encoders:
            value = row[place]
            if value is not None:
                row[place] = encoder(value)
        text_of = self._texts.get
        for place, name in plan.json:
            row[place] = text_of(name) if row[place] is None else self.encoded(name)
        return row

    def evolve(self, **values: Any) -> Record[Item]:
        """A record that differs in the given fields, none of them JSON."""
        evolved: Record[Item] = object.__new__(Record)
        evolved.kind = self.kind
        evolved.fields = fields = self.fields.copy()
        fields.update(values)
        # Nobody edits the lists and dicts of a record, so they are shared.
        evolved._texts = self._texts
        evolved._is_decoded = self._is_decoded
        evolved._flat = self._flat
        return evolved

    def merge(self, other: Record[Item], names: Iterable[str]) -> Record[Item]:
        """A record that has the named fields from `other` and the rest from this one."""
        chosen = frozenset(names)
        json_fields = JSON_FIELDS[self.kind]
        row = []
        for name in self.fields:
            source = other if name in chosen else self
            row.append(source.encoded(name) if name in json_fields else source.fields[name])
        return decode(self.kind, row)

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
            name for name in JSON_FIELDS[self.kind] if self.encoded(name) != other.encoded(name)
        ]
        return tuple(names)

    def _decode(self) -> None:
        flat, nested = list(self._flat), {}
        for name, text in self._texts.items():
            value = _load(self, name, text)
            if isinstance(value, (list, dict)):
                items: Iterable[Any] = value if isinstance(value, list) else value.values()
                if not _PLAIN.issuperset(map(type, items)):
                    nested[name] = text
                    continue
                flat.append(name)
            self.fields[name] = value
        # Another thread may do the same; until the last assignment it finds what was there before.
        self._flat = _shared(dict.fromkeys(flat))
        self._texts = nested or _NOTHING
        self._is_decoded = True


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
    texts: dict[str, str] = {}
    flat: list[str] = []
    try:
        for name, default, check in checks:
            value = fields[name]
            if value is not default:
                fields[name] = check(name, value)
        for name, empty, check in json_checks:
            value = fields[name]
            if value is None and empty is None:
                continue
            if not value and type(value) is empty:
                fields[name] = _EMPTY[empty]
                flat.append(name)
            else:
                texts[name] = check(name, value)
                fields[name] = None
    except KeyError as error:
        raise InvalidDataError(str(error.args[0]), "is missing") from None
    return Record(kind, fields, texts, flat)


def _shared(flat: Iterable[str]) -> tuple[str, ...]:
    """The one tuple of these names that all records share."""
    names = tuple(flat)
    return _flat_fields.setdefault(names, names)


def _declared(item: Task | NodeInfo) -> dict[str, Any]:
    """The fields of `item` without the attributes that somebody hung on it."""
    return {field.name: item.__dict__[field.name] for field in dataclass_fields(item)
            if field.name in item.__dict__}  # fmt: skip


def decode(kind: type[Item], row: Sequence[Any]) -> Record[Item]:
    """The record of a row whose columns stand in the order of the fields, JSON as text."""
    item = kind(*row)
    fields = item.__dict__
    texts: dict[str, str] = {}
    flat: list[str] = []
    for name, empty in JSON_FIELDS[kind].items():
        text = fields[name]
        if text is not None:
            texts[name] = text
            fields[name] = None
        elif empty is not None:
            fields[name] = _EMPTY[empty]
            flat.append(name)
    return Record(kind, fields, texts, flat)


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


def encode_json(name: str, value: Any) -> str:
    """Compact text of a JSON value.

    Raises:
        InvalidDataError: For what JSON or one of the databases cannot hold.
    """
    _check_json(name, value, 0)
    return _encode_checked(name, value)


def _encode_checked(name: str, value: Any) -> str:
    try:
        text = _dump(value)
    except (TypeError, ValueError, RecursionError) as error:
        raise InvalidDataError(name, f"is not JSON: {error}") from error
    if "\\u0000" in text and _NUL_IN_JSON.search(text):
        raise InvalidDataError(name, "must not contain the character NUL")
    if len(text) > MAX_JSON_BYTES // 4 and len(text.encode()) > MAX_JSON_BYTES:
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


def _dump(value: Any) -> str:
    return orjson.dumps(value).decode()


def _load(record: Record[Any], name: str, text: str) -> Any:
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


def _texts(name: str, value: Any) -> str:
    if not isinstance(value, (list, tuple)):
        raise InvalidDataError(name, f"must be a list of text, not {_shown(value)}")
    if not _TEXT.issuperset(map(type, value)):
        for item in value:
            if not isinstance(item, str):
                raise InvalidDataError(name, f"must be a list of text, but has {_shown(item)}")
    return _encode_checked(name, value)


def _json_object(name: str, value: Any) -> str:
    if not isinstance(value, dict):
        raise InvalidDataError(name, f"must be a dict, not {_shown(value)}")
    return encode_json(name, value)


def _version(name: str, value: Any) -> int:
    if type(value) is not int or abs(value) > MAX_INTEGER:
        raise InvalidDataError(name, f"must be the whole number it came with, not {_shown(value)}")
    return value


JSON_FIELDS: Mapping[type[Any], Mapping[str, type[list[Any] | dict[str, Any]] | None]] = {
    Task: {
        "required_skills": list,
        "optional_skills": None,
        "parameters": dict,
        "result": None,
        "affinity_tags": None,
        "metadata": dict,
    },
    NodeInfo: {"available_skills": list, "tags": list},
}
"""The fields that are stored as JSON, with what makes their default (`None` is its own)."""

_JSON_CHECKS: Mapping[str, Callable[[str, Any], str]] = {
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
