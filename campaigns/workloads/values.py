"""Hostile values by type, as a program may pass them by mistake or on purpose.

A value for a type is mostly of that type and near its limits, often of a related type (a subclass,
a bool for an int, a number as text), and sometimes of any type at all.
"""

from __future__ import annotations

import math
import sys
import types
from collections import OrderedDict, defaultdict, namedtuple
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import fields, replace
from datetime import UTC, date, datetime, timedelta, timezone, tzinfo
from decimal import Decimal
from enum import Enum, EnumType, IntEnum, StrEnum
from fractions import Fraction
from functools import cache
from pathlib import Path
from random import Random
from typing import Any, Union, get_args, get_origin, get_type_hints
from zoneinfo import ZoneInfo

from openclaw_store import (
    Backoff,
    KeyRing,
    NodeFilter,
    NodeInfo,
    Retention,
    Task,
    TaskFilter,
    TaskPriority,
)
from openclaw_store.archive.reader import Archive
from openclaw_store.archive.restore import Restored

GREATEST, LEAST = 2**63 - 1, -(2**63)

TEXTS = (
    "", " ", "\t\r\n", " both ends ", "\x01\x1b[31m\x7f\x85", "'", '"', "''", "\\", "\\\\", "\\0",
    "\\u0000", "%", "%%", "_", "%s", "%(name)s", "*", "?", "?1", "$1", "$$", ":name", "::text",
    "@n", "{}", "{0}", "{0.__class__}", "${HOME}", "`id`", "--", "/*", ";", "NULL", "null", "true",
    "'); DROP TABLE tasks; --", "' OR '1'='1", "[]", '{"a":1}', "0", "-1", "1e5", "nan", "inf",
    "é", "e\u0301", "ß", "\u0130", "\ufb01", "\u212b", "\u00c5", "数据处理", "\u200b", "\u200d",
    "\u2066\u2069", "\u202eright to left\u202c", "\ufeff", "\ufffd", "\ufffe\uffff", "\ue000\uf8ff",
    "\U000f0000\U0010fffd", "\u2028\u2029", "👩\u200d👩", "\U0010ffff", "z\u0338\u0321\u0322" * 9,
    "../../etc/passwd", "a/../b", "C:\\x", "con", "file:x?mode=memory", "pending", "batch", ".",
    "1.", "2026-03-01T12:00:00Z", "5.task-1", "-62135596800000000.x", "99999999999999999999.x",
)  # fmt: skip
"""Text that any field may accept."""

BAD_TEXTS = ("\0", "a\0b", "\\\0", "\ud800", "half \ud83d", "\udc80", "\udfff\ud800")
"""Text that no database accepts."""

KNOWN = ("task-1", "task-2", "task-3", "node-1", "node-2", "python", "anna")
"""Text with a meaning in the stores."""

ZONES: tuple[tzinfo | None, ...] = (
    None, UTC, timezone(timedelta(hours=5, minutes=45)), timezone(timedelta(seconds=-86_399)),
    timezone(timedelta(seconds=86_399)), timezone(timedelta(microseconds=-1)),
    ZoneInfo("Asia/Tokyo"), ZoneInfo("America/New_York"), ZoneInfo("Africa/Monrovia"),
)  # fmt: skip

MOMENTS = (
    datetime.min, datetime.max, datetime(1, 1, 2), datetime(9999, 12, 31), datetime(1582, 10, 10),
    datetime(1969, 12, 31, 23, 59, 59, 999_999), datetime(1970, 1, 1), datetime(2000, 2, 29),
    datetime(2026, 3, 1, 12), datetime(2026, 3, 1, 12, 0, 0, 1), datetime(2026, 3, 29, 2, 30),
    datetime(2026, 11, 1, 1, 30, fold=1), datetime(2038, 1, 19, 3, 14, 8),
)  # fmt: skip

INTEGERS = (
    0, 1, -1, 2, 3, 5, 127, 255, 2**31 - 1, 2**31, 2**32, 2**53, 2**53 + 1, GREATEST, GREATEST + 1,
    LEAST, LEAST - 1, 2**64 - 1, 2**64, 10**50, -(10**50),
)  # fmt: skip

TOO_LONG = 10**5000
"""An integer that Python refuses to convert to text."""

NUMBERS = (
    0.0, -0.0, 0.5, 1.0, 50.0, 100.0, math.nextafter(100, 101), 0.1 + 0.2, 1e-7, 1e16, 1e300, 1e9,
    5e-324, -5e-324, 2.2250738585072014e-308, sys.float_info.max, -1.0, math.nan, math.inf,
    -math.inf, 2.0**63, 1e10, 1e15,
)  # fmt: skip


class Shouted(str):
    """Text with a `str` that differs from its content."""

    __slots__ = ()

    def __str__(self) -> str:
        return self.upper()


class Liar(str):
    """Text that claims to be short and to contain no character."""

    __slots__ = ()

    def __len__(self) -> int:
        return 1

    def __contains__(self, text: object) -> bool:
        return False

    def isascii(self) -> bool:
        return True


class Count(int):
    """An integer with a `repr` that differs from its value."""

    def __repr__(self) -> str:
        return "many"


class Figure(float):
    """A number of another type."""


class Moment(datetime):
    """A point in time of another type, as some libraries have."""


class Colour(StrEnum):
    """Text of another enumeration."""

    RED = "red"
    PENDING = "pending"


class Level(IntEnum):
    """Numbers of another enumeration."""

    LOW = 1
    HIGH = 2**40


class Other(Enum):
    """Another enumeration, neither of text nor of numbers."""

    THING = "thing"


Pair = namedtuple("Pair", "first second")  # noqa: PYI024 - some programs pass them


STRANGERS: tuple[Any, ...] = (
    None, True, False, b"bytes", b"\xff\0", bytearray(b"x"), memoryview(b"x"), 1j, Decimal(1),
    Decimal("NaN"), Fraction(1, 3), date(2026, 3, 1), timedelta(1), {1}, frozenset("a"), ...,
    object, object(), NotImplemented, Other.THING, Level.HIGH, Colour.RED, Pair(1, 2), (),
    range(3), ((),), types.MappingProxyType({}), Path("x"), ValueError("x"), sys, iter(()),
)  # fmt: skip
"""Values that hardly any field accepts, all immutable."""

NO_MEMBERS = (
    Colour.PENDING,
    Level.LOW,
    True,
    False,
    1.0,
    0.5,
    "",
    (),
    None,
    GREATEST + 1,
    b"batch",
)
"""Values that are no member of an enumeration of the store, or only look like one."""

OBJECTS: tuple[Any, ...] = (
    {"é": 1, "e\u0301": 2, "E\u0301": 3}, {"ß": 1, "ss": 2, "SS": 3}, {"1": 1, "01": 2, "1.0": 3},
    {"a": 1, "a ": 2, "a\n": 3}, {"b": 1, "a": 2, "": 3}, {1: 1}, {None: 1}, {True: 1}, {b"k": 1},
    {"__proto__": {}, "$ref": "#"}, {"x" * 100_000: 1}, dict.fromkeys(map(str, range(500, 0, -1))),
    OrderedDict(b=1, a=2), defaultdict(list, a=[1]), {Shouted("key"): 1}, {Colour.RED: 1}, (), None,
    {"\0": 1}, {"": {"": {"": [{}]}}}, {"\ud800": 1}, {"a": "\udfff"}, "{}", (("a", 1),),
)  # fmt: skip
"""JSON objects with odd keys, and values that are no JSON object."""


def hints_of(thing: object) -> dict[str, Any]:
    """Return the annotations of the fields of a class, or of the parameters of a function."""
    return _hints_of(thing)


@cache  # it is slow
def _hints_of(thing: object) -> dict[str, Any]:
    return get_type_hints(thing, localns={"Archive": Archive, "Restored": Restored})


_USUAL: Mapping[Any, Any] = {
    int: 3,
    float: 60.0,
    bool: True,
    datetime: datetime(2026, 3, 1, 12, tzinfo=UTC),
    Any: {"a": [1, None]},
    list[str]: ["python"],
    Iterable[str]: ["python"],
    dict[str, Any]: {"a": 1},
    Mapping[str, Any]: {"a": 1},
    TaskFilter: TaskFilter(priority=list(TaskPriority)),
    NodeFilter: NodeFilter(),
    timedelta: timedelta(minutes=1),
    BaseException: ValueError("no paper"),
    Path: "new.db",
    types.NoneType: None,
}


class Values:
    """Draws values; the same state of `random` gives the same values."""

    def __init__(self, random: Random, tasks: Sequence[Task], nodes: Sequence[NodeInfo]) -> None:
        """Draw from `random`.

        Args:
            tasks, nodes: Copies that the caller has got from the store, also outdated ones.
        """
        self.random = random
        self._tasks, self._nodes = tasks, nodes
        self.is_large = False
        """True if a drawn value was large."""
        self._by_type: Mapping[Any, Callable[[], Any]] = {
            str: self.text,
            int: self.integer,
            float: self.number,
            bool: self.truth,
            datetime: self.moment,
            Any: self.json,
            list[str]: self.texts,
            Iterable[str]: self.texts,
            dict[str, Any]: self.json_object,
            Mapping[str, Any]: self.json_object,
            Task: self.task,
            NodeInfo: self.node,
            Iterable[Task]: self.tasks,
            Callable[[Task], object]: lambda: self.change(Task),
            Callable[[NodeInfo], object]: lambda: self.change(NodeInfo),
            TaskFilter: lambda: TaskFilter(**self.some(TaskFilter)),
            NodeFilter: lambda: NodeFilter(**self.some(NodeFilter)),
            timedelta: self.duration,
            BaseException: lambda: ValueError(self.text()),
            Backoff: lambda: Backoff(jitter=0),
            Retention: lambda: Retention(completed=timedelta(days=self.random.randrange(9))),
            KeyRing: lambda: None,
            Archive: lambda: None,  # a text or number instead, now and then
            Path: self.path,
            types.NoneType: lambda: None,
        }

    def of(self, hint: Any) -> Any:
        """Draw a value for an annotation.

        Raises:
            LookupError: If no rule covers the annotation.
        """
        if get_origin(hint) in (Union, types.UnionType):
            hint = self.random.choice(get_args(hint))
        if isinstance(hint, type) and issubclass(hint, Enum):
            draw: Callable[[], Any] = lambda: self.member(hint)  # noqa: E731
        elif hint in self._by_type:
            draw = self._by_type[hint]
        elif get_origin(hint) is Iterable:  # of an enumeration
            draw = lambda: [self.of(*get_args(hint)) for _ in range(self.random.randrange(4))]  # noqa: E731
        else:
            raise LookupError(f"how are values of {hint} drawn?")
        return self.anything() if self.random.random() < 0.08 else draw()

    def usual(self, name: str, hint: Any) -> Any:
        """Return a normal value for a parameter of that name and annotation."""
        if get_origin(hint) in (Union, types.UnionType):
            hint = self.random.choice(get_args(hint))
        if hint is str:
            numbers = {"task_id": "task-{}", "node_id": "node-{}"}.get(name)
            return numbers.format(self.random.randrange(1, 4)) if numbers else "python"
        if hint in (Task, NodeInfo):
            copies: Sequence[Any] = self._tasks if hint is Task else self._nodes
            return self.random.choice(copies)
        if hint in _USUAL:
            return _USUAL[hint]
        return self.random.choice(list(hint)) if isinstance(hint, EnumType) else self.of(hint)

    def some(self, kind: type[Any]) -> dict[str, Any]:
        """Draw values for one to three fields of a dataclass."""
        hints = hints_of(kind)
        names = [field.name for field in fields(kind)]
        chosen = self.random.sample(names, self.random.choice((1, 1, 1, 2, 3)))
        return {name: self.of(hints[name]) for name in chosen}

    def anything(self) -> Any:
        """Draw a value of any type."""
        draws = (
            self.text,
            self.integer,
            self.number,
            self.moment,
            self.json,
            self.texts,
            self.task,
        )
        chosen = self.random.randrange(12)
        return draws[chosen]() if chosen < len(draws) else self.random.choice(STRANGERS)

    def text(self) -> Any:
        random = self.random
        chosen = random.random()
        if chosen < 0.05:
            return random.choice(KNOWN)
        if chosen < 0.4:
            return random.choice(TEXTS)
        if chosen < 0.5:
            return "".join(random.choices(TEXTS, k=random.randrange(2, 6)))
        if chosen < 0.75:
            return random.choice(BAD_TEXTS) + random.choice(TEXTS)
        if chosen < 0.83:
            return "".join(chr(random.randrange(0x110000)) for _ in range(random.randrange(1, 40)))
        if chosen < 0.93:
            length = random.choice((63, 64, 65, 254, 255, 256, 257, 1000))
            return random.choice("xé🚀\u0301") * length
        if chosen < 0.931:
            self.is_large = True
            return random.choice("xé") * random.choice((2**20, 2**20 + 1, 10_000_000))
        if chosen < 0.94:
            return random.choice((*Colour, Other.THING))
        kind = random.choice((Shouted, Liar))
        return kind(random.choice((*TEXTS, *BAD_TEXTS, "x" * 300)))

    def integer(self) -> Any:
        random = self.random
        chosen = random.random()
        if chosen < 0.4:
            return random.randrange(6)
        if chosen < 0.7:
            return random.choice((*INTEGERS, TOO_LONG, -TOO_LONG))
        if chosen < 0.8:
            return random.getrandbits(random.randrange(1, 70)) * random.choice((1, -1))
        if chosen < 0.85:
            return random.choice((*Level, float(random.randrange(5))))
        kind: Callable[[Any], Any] = random.choice((Count, str, bool, Decimal))
        return kind(random.choice(INTEGERS))

    def number(self) -> Any:
        random = self.random
        chosen = random.random()
        if chosen < 0.3:
            return random.uniform(0, 100)
        if chosen < 0.7:
            return random.choice(NUMBERS)
        if chosen < 0.8:
            return self.integer()
        kind: Callable[[Any], Any] = random.choice((Figure, str, Decimal, bool, complex))
        return kind(random.choice(NUMBERS))

    def truth(self) -> Any:
        return self.random.choice((True, False, True, False, 0, 1, "no", None, ()))

    def moment(self) -> Any:
        random = self.random
        moment = random.choice(MOMENTS)
        if random.random() < 0.4:
            moment = datetime(1970, 1, 1) + timedelta(microseconds=random.randrange(2**52))
        moment = moment.replace(tzinfo=random.choice(ZONES))
        chosen = random.random()
        if chosen < 0.8:
            return moment
        if chosen < 0.9:
            return Moment.combine(moment.date(), moment.timetz())
        return random.choice((moment.date(), moment.isoformat(), moment.timetz(), 0, 1.5))

    def duration(self) -> Any:
        random = self.random
        if random.random() < 0.6:
            return timedelta(seconds=random.randrange(1_000_000))
        return random.choice((timedelta(0), timedelta(-1), timedelta.max, timedelta.min, 60, "1 h"))

    def member(self, kind: type[Enum]) -> Any:
        random = self.random
        member = random.choice(list(kind))
        chosen = random.random()
        if chosen < 0.6:
            return member
        if chosen < 0.75:
            return member.value
        text = str(member.value)
        return random.choice((*NO_MEMBERS, text.upper(), f"{text}\0", Shouted(text), Liar(text)))

    def texts(self) -> Any:
        texts = [self.text() for _ in range(self.random.randrange(4))]
        chosen = self.random.random()
        if chosen < 0.8:
            return texts
        if chosen < 0.9:
            return [*texts, self.anything()]
        return self.random.choice((tuple(texts), iter(texts), "python", None))

    def json(self) -> Any:
        random = self.random
        if random.random() < 0.05:
            return self._nested(random.choice((100, 198, 199, 200, 201, 202, 1000, 5000)))
        return self._json(random.choice((0, 1, 2, 4)))

    def json_object(self) -> Any:
        random = self.random
        chosen = random.random()
        if chosen < 0.75:
            names = [self._key() for _ in range(random.randrange(5))]
            return {name: self._json(random.randrange(3)) for name in names}
        if chosen < 0.78:
            return {"a": [self._nested(random.choice((198, 199, 200)))]}
        return random.choice(OBJECTS)

    def _json(self, depth: int) -> Any:
        random = self.random
        chosen = random.randrange(10)
        if depth and chosen < 3:
            return [self._json(depth - 1) for _ in range(random.randrange(5))]
        if depth and chosen < 6:
            return {self._key(): self._json(depth - 1) for _ in range(random.randrange(5))}
        if chosen < 7:
            return random.choice((None, True, False, 0, 0.0, -0.0, "", [], {}))
        if random.random() < 0.05:
            return random.choice((*STRANGERS, (1, (2,))))
        return random.choice((self.text, self.integer, self.number))()

    def _key(self) -> Any:
        return self.random.choice("abcdeé") if self.random.random() < 0.7 else self.text()

    def _nested(self, depth: int) -> Any:
        value: Any = []
        for _ in range(depth - 1):
            value = [value] if self.random.random() < 0.9 else {"a": value}
        return value

    def path(self) -> Any:
        random = self.random
        part = random.choice(
            (*TEXTS, *BAD_TEXTS, "x" * 300, "new.db", "a/b/c", ".", "..", "~", "a\nb")
        )
        text = part if random.random() < 0.6 else f"{part}{random.choice(TEXTS)}"
        return Path(text) if random.random() < 0.3 else text

    def task(self) -> Any:
        if self._tasks and self.random.random() < 0.6:
            task = self.random.choice(self._tasks)
            return replace(task, **self.some(Task))
        values = {
            "task_id": f"new-{self.random.randrange(1000)}",
            "task_type": "batch",
            "name": "x",
        }
        return Task(**{**values, **self.some(Task)})

    def node(self) -> Any:
        if self._nodes and self.random.random() < 0.6:
            node = self.random.choice(self._nodes)
            return replace(node, **self.some(NodeInfo))
        values = {"node_id": f"new-{self.random.randrange(1000)}", "hostname": "x"}
        return NodeInfo(**{**values, **self.some(NodeInfo)})

    def tasks(self) -> Any:
        tasks = [self.task() for _ in range(self.random.randrange(5))]
        return self.random.choice((tasks, tasks, tasks, tuple(tasks), iter(tasks), [*tasks, None]))

    def change(self, kind: type[Any]) -> Any:
        """Draw a function that changes a task or node."""
        values = self.some(kind)

        def change(item: Any) -> None:
            vars(item).update(values)

        async def slowly(item: Any) -> None:
            vars(item).update(values)

        return self.random.choice((change, change, change, change, slowly, lambda item: 5, None, 5))
