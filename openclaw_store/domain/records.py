"""Records: immutable snapshots of tasks and nodes, checked once and cheap to copy.

`encode` checks an object of a caller and makes a `Record` of it; `Record.copy` makes objects that
share nothing with the record.

JSON stays text until it is read. Then lists and dicts of plain values are kept decoded, as a
`copy()` is faster than decoding; nested and large ones stay text: decoding is the fastest deep
copy, and can be done in steps.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import fields as dataclass_fields
from datetime import datetime
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, Final, Generic, NamedTuple, TypeVar

import orjson

from openclaw_store.domain.large_json import PIECE_BYTES, decode_in_steps
from openclaw_store.domain.models import FIELD_CHECKS, JSON_CHECKS, NodeInfo, Task
from openclaw_store.domain.serialization import STORE_FIELDS
from openclaw_store.domain.validation import (
    EMPTY,
    PLAIN_TYPES,
    Steps,
    check_fields,
    encode_in_steps,
    is_long,
    short_only,
)
from openclaw_store.errors import InvalidDataError

Entity = TypeVar("Entity", Task, NodeInfo)

Raw = tuple[Any, ...]
"""A row from the driver, its values in the order of the fields."""

SMALL_BYTES = 1 << 11
"""Bytes of JSON that are decoded in about the time that the rest of a record takes."""

_NONE = type(None)

_new, _loads = object.__new__, orjson.loads  # globals: each copy needs them

_shared_names: dict[tuple[str, ...], tuple[str, ...]] = {}
"""One tuple for each combination of names, shared by all records."""


ConvertRow = Callable[[object, list[Any]], None]
"""Converts the values of a row in place; takes its identifier."""


class RowCodec(NamedTuple):
    """The conversion of a record to the parameters of a statement."""

    pick: Callable[[Mapping[str, Any]], Sequence[Any]]
    """Selects the values of fields, in the order of the parameters."""
    json: Sequence[tuple[int, str]]
    """Position and name of each JSON field, which is text, or `None` for its default."""
    convert: ConvertRow | None
    """Converts the values that the driver takes in another form."""
    protect: ConvertRow | None
    """Converts values to their stored form, after all."""


class Record(Generic[Entity]):
    """An immutable snapshot of a task or node.

    Threads share records without a lock: only the form of JSON fields changes, in `_decode`.
    """

    __slots__ = ("__dict__", "_fields", "_flat", "_nested", "is_small", "kind", "row")

    if TYPE_CHECKING:  # a field of `kind`; JSON fields are read by `decoded`

        def __getattr__(self, name: str) -> Any: ...
        def __setattr__(self, name: str, value: Any) -> None: ...

    def __init__(self, kind: type[Entity], fields: dict[str, Any]) -> None:
        """Take ownership of `fields`: values by name; JSON is `bytes`, or the default."""
        self.kind: type[Entity] = kind
        # One dict under two names: a slot is read faster than `__dict__`.
        self.__dict__ = self._fields = fields
        self._flat: Sequence[str] | None = None
        """JSON fields that `copy` copies; `None` until one is read."""
        self._nested: Sequence[str] = ()
        """JSON fields that `copy` decodes."""
        self.is_small = False
        """True once the record was read, if its JSON is short."""
        self.row: Raw | None = None
        """The row as the driver would return it, for a record that was inserted or that is one of
        a large commit; `None` for any other."""

    def __repr__(self) -> str:
        return f"Record({self.copy()!r})"

    @property
    def id(self) -> str:
        """Identifier of the task or node."""
        id: str = self._fields[KEY[self.kind]]
        return id

    def copy(self) -> Entity:
        """Return an equal object for the caller to own."""
        flat = self._flat
        if flat is None:
            flat = self._decode()
        entity: Entity = _new(self.kind)
        fields = entity.__dict__ = self._fields.copy()
        for name in flat:
            fields[name] = fields[name].copy()
        for name in self._nested:
            fields[name] = self._load(name)
        return entity

    def copy_in_steps(self) -> Steps[Entity]:
        """Return the same as `copy`, in steps."""
        if self._flat is None:
            self._decode()
            yield
        large = [name for name in self._nested if len(self._fields[name]) > PIECE_BYTES]
        entity = self.replace(**dict.fromkeys(large)).copy()
        for name in large:
            try:
                entity.__dict__[name] = yield from decode_in_steps(self._fields[name])
            except orjson.JSONDecodeError as error:
                raise self._unreadable(name, error) from error
        return entity

    @property
    def size(self) -> int:
        """Bytes of JSON to decode for a copy; at least `SMALL_BYTES`."""
        if self.is_small:
            return SMALL_BYTES
        values = map(self._fields.get, JSON_FIELDS[self.kind])
        sizes = (len(value) for value in values if isinstance(value, (bytes, str, list, dict)))
        return max(SMALL_BYTES, sum(sizes))

    def decoded(self, name: str) -> Any:
        """Return the value of a JSON field; the caller must not change it."""
        if self._flat is None:
            self._decode()
        value = self._fields[name]
        return self._load(name) if type(value) is bytes else value

    def encoded(self, name: str) -> bytes | None:
        """Return the text of a JSON field; `None` for its default."""
        value = self._fields[name]
        if value is None or type(value) is bytes:
            return value
        if not value and type(value) is JSON_FIELDS[self.kind][name]:
            return None
        return orjson.dumps(value)

    def values(self, codec: RowCodec) -> list[Any]:
        """Return the values of the fields of `codec` in the form that the driver takes."""
        row = list(codec.pick(self._fields))
        for position, name in codec.json:
            text = row[position]
            if text is not None and type(text) is not bytes:
                text = self.encoded(name)
            row[position] = None if text is None else text.decode()
        if codec.convert is not None:
            codec.convert(self._fields[KEY[self.kind]], row)
        if codec.protect is not None:
            codec.protect(self._fields[KEY[self.kind]], row)
        return row

    def evolve(self, **values: Any) -> Record[Entity]:
        """Return a record with other values of the given fields, none of them JSON."""
        evolved: Record[Entity] = _new(Record)
        evolved.kind = self.kind
        # Decoded lists and dicts are never changed, so both records share them. These names must be
        # read before the fields: another thread may decode fields in between, and names without
        # their decoded fields would let `copy` share a list with the caller.
        evolved._flat = self._flat
        evolved._nested = self._nested
        evolved.is_small = self.is_small
        evolved.row = None
        evolved.__dict__ = evolved._fields = fields = self._fields.copy()
        fields.update(values)
        return evolved

    def replace(self, **values: Any) -> Record[Entity]:
        """Return a record with other values; JSON is `bytes`, or the default."""
        return Record(self.kind, {**self._fields, **values})

    def merge(self, other: Record[Entity], names: Iterable[str]) -> Record[Entity]:
        """Return this record with the named fields of `other`."""
        fields = self._fields.copy()
        fields.update([(name, other._fields[name]) for name in names])
        return Record(self.kind, fields)

    def differences(self, other: Record[Entity]) -> tuple[str, ...]:
        """Return the names of the fields that differ, without the fields that the store sets."""
        mine, theirs = self._fields, other._fields
        plain, json = _PLAIN_FIELDS[self.kind], JSON_FIELDS[self.kind]
        names = [one for one in plain if mine[one] is not theirs[one] and mine[one] != theirs[one]]
        # Compared as text: `==` does not distinguish 1, True and 1.0.
        names += [
            name
            for name in json
            if mine[name] is not theirs[name] and self.encoded(name) != other.encoded(name)
        ]
        return tuple(names)

    def _decode(self) -> Sequence[str]:
        """Keep lists and dicts of plain values decoded, and return their names.

        Threads may do this at the same time: the present form of a field decides, not its name.
        """
        flat, nested = [], []
        is_small = self.size <= SMALL_BYTES
        for name in JSON_FIELDS[self.kind]:
            value = self._fields[name]
            if type(value) is bytes:
                if len(value) > PIECE_BYTES:
                    nested.append(name)
                    continue
                value = self._load(name)
                if isinstance(value, (list, dict)):
                    elements: Iterable[Any] = value if isinstance(value, list) else value.values()
                    if not PLAIN_TYPES.issuperset(map(type, elements)):
                        nested.append(name)
                        continue
                self._fields[name] = value
            if isinstance(value, (list, dict)):
                flat.append(name)
        self._nested = _shared(nested)
        self._flat = _shared(flat)
        self.is_small = is_small
        return self._flat

    def _load(self, name: str) -> Any:
        try:
            return _loads(self._fields[name])
        except orjson.JSONDecodeError as error:
            raise self._unreadable(name, error) from error

    def _unreadable(self, name: str, error: orjson.JSONDecodeError) -> InvalidDataError:
        return InvalidDataError(name, f"of {self.id!r} is not readable JSON: {error}")


Decode = Callable[[Raw], Record[Any]]
"""Makes a record of a row."""


def encode_long_values(entity: Any) -> Steps[Mapping[str, bytes]]:
    """Return the JSON of the fields with many elements, checked and encoded in steps.

    Raises:
        InvalidDataError: With the first field that cannot be stored.
    """
    encoded = {}
    for name in JSON_FIELDS.get(type(entity), ()):
        value = entity.__dict__.get(name)
        if value and is_long(value):
            yield
            encoded[name] = yield from encode_in_steps(JSON_CHECKS[name], name, value)
    return encoded


def encode(
    entity: Entity,
    known: Record[Entity] | None = None,
    encoded: Mapping[str, bytes] = MappingProxyType({}),
    *,
    in_one_step: bool = False,
) -> Record[Entity]:
    """Check an object of a caller, and return a record of it.

    Args:
        known: The stored record; equal values need no check and are taken from it.
        encoded: JSON of `encode_long_values`.
        in_one_step: Raise `LongValueError` for JSON that takes more than one step.

    Raises:
        InvalidDataError: With the first field that cannot be stored, and the reason.
    """
    kind = type(entity)
    if kind not in _CHECKS:
        raise InvalidDataError("task or node", f"must be a Task or NodeInfo, not {kind.__name__}")
    checks, json_checks = (_SHORT_CHECKS if in_one_step else _CHECKS)[kind]
    fields = entity.__dict__.copy()  # shares the key table of the class
    if len(fields) != len(checks) + len(json_checks):  # a caller has added attributes
        names = [field.name for field in dataclass_fields(entity)]
        fields = {name: fields[name] for name in names if name in fields}
    stored = _NOTHING_STORED[kind] if known is None else known.__dict__
    check_fields(fields, stored, checks, json_checks, encoded)
    return Record(kind, fields)


def admit(
    kind: type[Entity],
    entity: Entity,
    clock: Callable[[], datetime],
    known: Record[Entity] | None = None,
    encoded: Mapping[str, bytes] | None = None,
) -> Record[Entity]:
    """Return the record of a caller's object, as `encode`; set the time of a new one to now.

    Args:
        encoded: JSON of `encode_long_values`; without it, `LongValueError` asks for it.

    Raises:
        InvalidDataError: If it is not of this kind, or with the field that cannot be stored.
    """
    if not isinstance(entity, kind):
        name = KEY[kind].removesuffix("_id")
        raise InvalidDataError(name, f"must be a {kind.__name__}, not {type(entity).__name__}")
    record = encode(entity, known, encoded or {}, in_one_step=encoded is None)
    # Not a check of the field: older stores may hold such a task, which must stay readable.
    if kind is Task and record.timeout == 0 and (known is None or known.timeout != 0):
        raise InvalidDataError("timeout", "must be at least 1 second, or None for no limit")
    created_at = "submitted_at" if kind is Task else "registered_at"
    return record if getattr(record, created_at) else record.evolve(**{created_at: clock()})


def _shared(names: Iterable[str]) -> Sequence[str]:
    found = tuple(names)
    return _shared_names.setdefault(found, found)


def decode(kind: type[Entity], conversions: Sequence[ConvertRow], row: Raw) -> Record[Entity]:
    """Return the record of a row: columns in the order of the fields, JSON as text.

    Args:
        conversions: Convert the driver's values, in this order.
    """
    values = list(row)
    for convert in conversions:
        convert(row[0], values)
    fields = kind(*values).__dict__
    for name, empty in JSON_FIELDS[kind].items():
        text = fields[name]
        try:
            fields[name] = EMPTY[empty] if text is None else text.encode()
        except AttributeError as error:  # SQLite accepts a blob in any column
            raise InvalidDataError(name, f"of {row[0]!r} is not text") from error
    return Record(kind, fields)


def check_record(record: Record[Any]) -> None:
    """Check the values of a record that comes from a file, and that its JSON can be read.

    Raises:
        InvalidDataError: With the first field that cannot be stored.
    """
    checks, _ = _CHECKS[record.kind]
    check_fields(record.__dict__.copy(), _NOTHING_STORED[record.kind], checks, (), {})
    for name in JSON_FIELDS[record.kind]:
        if type(record.__dict__[name]) is bytes:
            record._load(name)


def write_back(record: Record[Entity], entity: Entity, names: Iterable[str] | None = None) -> None:
    """Copy fields, none of them JSON, to the caller's object; `None` for version and times."""
    fields, target = record.__dict__, entity.__dict__
    for name in STAMPED[record.kind] if names is None else names:
        target[name] = fields[name]


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
"""The JSON fields, with the type of their default."""

STAMPED: Mapping[type[Any], Sequence[str]] = {
    Task: (
        "submitted_at",
        "scheduled_at",
        "started_at",
        "completed_at",
        "not_before",
        "updated_at",
        "version",
    ),
    NodeInfo: ("registered_at", "last_heartbeat", "version"),
}
"""The fields that `write_back` copies after a write."""


# A field with its default needs no check, so that most fields of a task cost almost nothing.
_CHECKS = {
    kind: (
        tuple(
            (field.name, field.default, checks[field.name])
            for field in dataclass_fields(kind)
            if field.name in checks
        ),
        tuple((name, empty, JSON_CHECKS[name]) for name, empty in JSON_FIELDS[kind].items()),
    )
    for kind, checks in FIELD_CHECKS.items()
}

_SHORT_CHECKS = {
    kind: (checks, tuple((name, empty, short_only(check)) for name, empty, check in json_checks))
    for kind, (checks, json_checks) in _CHECKS.items()
}
"""The same, for JSON that takes one step."""

_NOTHING_STORED: Mapping[type[Any], Mapping[str, object]] = {
    kind: dict.fromkeys((name for checks in both for name, *_ in checks), object())
    for kind, both in _CHECKS.items()
}
"""A value for each field that equals no value, for entities that are not stored."""

_PLAIN_FIELDS: Mapping[type[Any], Sequence[str]] = {
    kind: tuple(name for name in checks if name not in STORE_FIELDS)
    for kind, checks in FIELD_CHECKS.items()
}

KEY: Final[dict[type[Any], str]] = {Task: "task_id", NodeInfo: "node_id"}
"""The identifying field of each domain class."""
