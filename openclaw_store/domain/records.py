"""Records: what the store keeps of a task or node, checked once, never changed, cheap to copy.

`encode` checks a caller's object and makes a `Record` of it; `Record.copy` makes objects for
callers that share nothing with it.

JSON stays text until somebody looks at it. Then lists and dicts of plain values are kept
decoded, because `copy()` of one is faster than decoding it again; nested ones stay text,
because decoding is the fastest deep copy there is.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import fields as dataclass_fields
from datetime import datetime
from typing import TYPE_CHECKING, Any, Final, Generic, NamedTuple, TypeVar

import orjson

from openclaw_store.domain.models import (
    FIELD_CHECKS,
    JSON_CHECKS,
    NodeInfo,
    Task,
)
from openclaw_store.domain.validation import EMPTY, PLAIN_TYPES, check_fields
from openclaw_store.errors import InvalidDataError

Entity = TypeVar("Entity", Task, NodeInfo)


_NONE = type(None)

_new, _loads = object.__new__, orjson.loads  # found without a detour, for each copy


_known_names: dict[tuple[str, ...], tuple[str, ...]] = {}


class RowCodec(NamedTuple):
    """How `Record.values` makes the parameters of a statement."""

    pick: Callable[[Mapping[str, Any]], Sequence[Any]]
    """Takes the values of the fields out of a record's, in the order of the parameters."""
    bind_processors: Sequence[tuple[int, Callable[[Any], Any]]]
    """Places of values that the driver takes in another form, and what makes it."""
    json: Sequence[tuple[int, str]]
    """Places of JSON fields, which come as text, or `None` for their default."""


class Record(Generic[Entity]):
    """An unchanging image of a task or node."""

    __slots__ = ("__dict__", "_flat", "_nested", "kind", "row")

    if TYPE_CHECKING:  # a field of `kind`; JSON fields are read by `decoded`

        def __getattr__(self, name: str) -> Any: ...
        def __setattr__(self, name: str, value: Any) -> None: ...

    def __init__(self, kind: type[Entity], fields: dict[str, Any]) -> None:
        """Take over `fields`, which belongs to the record now.

        Args:
            kind: What is recorded.
            fields: Its values by name; JSON is `bytes`, which no JSON value is, or the default.
        """
        self.kind: type[Entity] = kind
        self.__dict__ = fields
        self._flat: Sequence[str] | None = None
        """JSON fields to be copied for each copy; `None` while nobody has looked at any."""
        self._nested: Sequence[str] = ()
        """JSON fields to be decoded for each copy."""
        self.row: Raw | None = None
        """The row that it was inserted as, which the driver would give; `None` for all others."""

    def __repr__(self) -> str:
        return f"Record({self.copy()!r})"

    @property
    def id(self) -> str:
        """Identifier of the task or node."""
        id: str = self.__dict__[KEY[self.kind]]
        return id

    def copy(self) -> Entity:
        """An object of the caller's own, equal to what was recorded."""
        flat = self._flat
        if flat is None:
            flat = self._decode()
        item: Entity = _new(self.kind)
        fields = item.__dict__ = self.__dict__.copy()
        for name in flat:
            fields[name] = fields[name].copy()
        for name in self._nested:
            fields[name] = _loads(fields[name])
        return item

    def decoded(self, name: str) -> Any:
        """The value of a JSON field; not to be changed by the caller."""
        if self._flat is None:
            self._decode()
        value = self.__dict__[name]
        return orjson.loads(value) if type(value) is bytes else value

    def encoded(self, name: str) -> bytes | None:
        """The text of a JSON field; `None` for its default."""
        value = self.__dict__[name]
        if value is None or type(value) is bytes:
            return value
        if not value and type(value) is JSON_FIELDS[self.kind][name]:
            return None
        return orjson.dumps(value)

    def values(self, plan: RowCodec) -> list[Any]:
        """The values of the fields of `plan`, as the driver takes them."""
        row = list(plan.pick(self.__dict__))
        for place, encoder in plan.bind_processors:
            value = row[place]
            if value is not None:
                row[place] = encoder(value)
        for place, name in plan.json:
            text = row[place]
            if text is not None and type(text) is not bytes:
                text = self.encoded(name)
            row[place] = None if text is None else text.decode()
        return row

    def evolve(self, **values: Any) -> Record[Entity]:
        """A record that differs in the given fields, none of them JSON."""
        evolved: Record[Entity] = _new(Record)
        evolved.kind = self.kind
        # Nobody edits the lists and dicts of a record, so they are shared. Before the fields: what
        # another thread decodes in between must not be taken for decoded here.
        evolved._flat = self._flat
        evolved._nested = self._nested
        evolved.row = None
        evolved.__dict__ = fields = self.__dict__.copy()
        fields.update(values)
        return evolved

    def replace(self, **values: Any) -> Record[Entity]:
        """A record that differs in the given fields; JSON is `bytes`, or the default."""
        return Record(self.kind, {**self.__dict__, **values})

    def merge(self, other: Record[Entity], names: Iterable[str]) -> Record[Entity]:
        """A record that has the named fields from `other` and the rest from this one."""
        fields = self.__dict__.copy()
        fields.update([(name, other.__dict__[name]) for name in names])
        return Record(self.kind, fields)

    def differences(self, other: Record[Entity]) -> tuple[str, ...]:
        """Names of the fields whose values are not the same, those set by the store aside."""
        mine, theirs = self.__dict__, other.__dict__
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
            value = self.__dict__[name]
            if type(value) is bytes:
                value = _load(self, name, value)
                if isinstance(value, (list, dict)):
                    items: Iterable[Any] = value if isinstance(value, list) else value.values()
                    if not PLAIN_TYPES.issuperset(map(type, items)):
                        nested.append(name)
                        continue
                self.__dict__[name] = value
            if isinstance(value, (list, dict)):
                flat.append(name)
        self._nested = _shared(nested)
        self._flat = _shared(flat)
        return self._flat


Raw = tuple[Any, ...]
"""A row as the driver gave it, its values in the order of the fields."""


Decode = Callable[[Raw], Record[Any]]
"""Makes a record of a row."""


def encode(item: Entity, known: Record[Entity] | None = None) -> Record[Entity]:
    """Check a caller's object and keep a copy of it.

    Args:
        known: What is stored of it. The values of it that `item` still has need no check, and are
            kept as they are.

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
    stored = _NOTHING_STORED[kind] if known is None else known.__dict__
    check_fields(fields, stored, checks, json_checks)
    return Record(kind, fields)


def admit(
    kind: type[Entity],
    item: Entity,
    clock: Callable[[], datetime],
    known: Record[Entity] | None = None,
) -> Record[Entity]:
    """Check a caller's object on its way in; one without a time of its own is stamped now.

    Args:
        known: What is stored of it, which spares checks.

    Raises:
        InvalidDataError: If it is not of this kind, or naming the field that cannot be stored.
    """
    if not isinstance(item, kind):
        name = KEY[kind].removesuffix("_id")
        raise InvalidDataError(name, f"must be a {kind.__name__}, not {type(item).__name__}")
    record = encode(item, known)
    born = "submitted_at" if kind is Task else "registered_at"
    return record if getattr(record, born) else record.evolve(**{born: clock()})


def _shared(names: Iterable[str]) -> Sequence[str]:
    """The one tuple of these names that all records share."""
    found = tuple(names)
    return _known_names.setdefault(found, found)


def _declared(item: Task | NodeInfo) -> dict[str, Any]:
    """The fields of `item` without the attributes that somebody hung on it."""
    given = item.__dict__
    return {
        field.name: given[field.name] for field in dataclass_fields(item) if field.name in given
    }


def decode(kind: type[Entity], row: Sequence[Any]) -> Record[Entity]:
    """The record of a row whose columns stand in the order of the fields, JSON as text."""
    fields = kind(*row).__dict__
    for name, empty in JSON_FIELDS[kind].items():
        text = fields[name]
        try:
            fields[name] = EMPTY[empty] if text is None else text.encode()
        except AttributeError as error:  # written by hand: SQLite takes a blob anywhere
            raise InvalidDataError(name, f"of {row[0]!r} is not text") from error
    return Record(kind, fields)


def write_back(record: Record[Entity], item: Entity, names: Iterable[str] | None = None) -> None:
    """Give the caller's object what the store has set.

    Args:
        names: The fields, none of them JSON; `None` for the version and the times.
    """
    fields, target = record.__dict__, item.__dict__
    for name in STAMPED[record.kind] if names is None else names:
        target[name] = fields[name]


def _load(record: Record[Any], name: str, text: bytes) -> Any:
    try:
        return orjson.loads(text)
    except orjson.JSONDecodeError as error:
        raise InvalidDataError(name, f"of {record.id!r} is not readable JSON: {error}") from error


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


STORE_FIELDS = frozenset({"version", "updated_at"})
"""The fields that only the store sets."""


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
"""The fields that a caller's object gets back when it was written."""


# A field that still is its default needs no check; so most of a task costs next to nothing.
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


_NOTHING_STORED: Mapping[type[Any], Mapping[str, object]] = {
    kind: dict.fromkeys((name for checks in both for name, *_ in checks), object())
    for kind, both in _CHECKS.items()
}
"""In the place of a record's fields: what no object has."""


_PLAIN_FIELDS: Mapping[type[Any], Sequence[str]] = {
    kind: tuple(name for name in checks if name not in STORE_FIELDS)
    for kind, checks in FIELD_CHECKS.items()
}


KEY: Final[dict[type[Any], str]] = {Task: "task_id", NodeInfo: "node_id"}
"""The field that identifies each domain class."""
