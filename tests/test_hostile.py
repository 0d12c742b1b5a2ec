"""Hostile values: each has the same outcome on both databases, and it stands in a table here."""

from __future__ import annotations

import asyncio
import math
import sys
from collections.abc import Awaitable, Callable, Iterator
from datetime import UTC, date, datetime, timedelta, timezone
from decimal import Decimal
from enum import Enum
from typing import Any, NamedTuple

import pytest
from conftest import MakeNode, MakeTask
from support.for_each import for_each

from openclaw_store import (
    Database,
    InvalidDataError,
    NodeRepository,
    NodeStatus,
    StateManager,
    TaskPriority,
    TaskRepository,
    TaskStatus,
    TaskType,
)

ITSELF = "itself"
GREATEST, LEAST, FLOAT_MAX = 2**63 - 1, -(2**63), sys.float_info.max


class Case(NamedTuple):
    """A value of a field, and what becomes of it."""

    field: str
    value: Any
    expected: str
    """`itself`, `stored as …`, or why it is refused."""

    def __str__(self) -> str:
        text = repr(self.value) if self.field != "result" else ""  # some cannot be shown
        return f"{self.field} {text if len(text) < 60 else f'{text[:40]}… of {len(text)}'}"


def nested(depth: int) -> Any:
    value: Any = []
    for _ in range(depth - 1):
        value = [value]
    return value


def wrapped(field: str, text: str) -> Any:
    """A value of a field with the text in it."""
    if field in ("required_skills", "available_skills", "tags"):
        return [text, text]
    return {text: [text]} if field == "parameters" else text


TEXTS = [
    " ", "\t\r\n", " both ends ", "\x01\x1b[31m\x7f\x85", "'", '"', "''", "\\", "\\\\", "\\0",
    "\\u0000", "%", "%s", "%(name)s", "_", "*", "?", "?1", "$1", "$$", ":name", "::text", "@name",
    "{}", "{0}", "${HOME}", "--", "/*", ";", "'); DROP TABLE tasks; --", "' OR '1'='1", "NULL",
    "null", "true", "[]", '{"a":1}', "0", "1e5", "é", "e\u0301", "ß", "\u0130", "\ufb01", "\u212b",
    "数据处理", "\u202eright to left\u202c", "\u200b", "\u200d", "\ufeff", "\ufffd", "\ufffe\uffff",
    "\u2028\u2029", "👩\u200d👩\u200d👧", "🚀" * 63, "\U0010ffff", "z\u0338\u0321\u0322\u031b" * 9,
]  # fmt: skip
"""Text that every field takes."""

BAD_TEXTS = [
    ("\0", "must not contain the character NUL"),
    ("a\0b", "must not contain the character NUL"),
    ("\\\0", "must not contain the character NUL"),
    ("\ud800", "must not contain a lone surrogate"),
    ("half \ud83d", "must not contain a lone surrogate"),
    ("\udc80", "must not contain a lone surrogate"),
]
"""Text that no field takes, and why; in JSON it is the JSON that is refused."""

NOT_JSON = "is not JSON: str is not valid UTF-8: surrogates not allowed"


def texts(identifier: str, fields: list[str], keys: list[str], json: list[str]) -> Iterator[Case]:
    """Each text in fields for text, in those that may be looked up, and inside JSON."""
    for field in (identifier, *fields, *keys, *json):
        for text in TEXTS:
            yield Case(field, wrapped(field, text), ITSELF)
        for text, reason in BAD_TEXTS:
            is_json = field in json and "surrogate" in reason
            yield Case(field, wrapped(field, text), NOT_JSON if is_json else reason)
        empty = "must not be empty" if field == identifier else ITSELF
        yield Case(field, wrapped(field, ""), empty)
    for field in fields:
        yield Case(field, "é" * 2**20, ITSELF)  # characters are counted, not bytes
        yield Case(field, "x" * (2**20 + 1), "is longer than 1048576 characters")
    for field in (identifier, *keys):
        for letter in "x", "é", "🚀":
            yield Case(field, letter * 255, ITSELF)
            yield Case(field, letter * 256, "is longer than 255 characters")
    for field in json:
        yield Case(field, wrapped(field, "x" * (2**20 + 1)), ITSELF)
    for field in (identifier, *fields, *keys):
        yield Case(field, b"bytes", "must be text, not b'bytes'")
        yield Case(field, 7, "must be text, not 7")


def counts(*fields: str) -> Iterator[Case]:
    for field in fields:
        yield Case(field, 0, ITSELF)
        yield Case(field, GREATEST, ITSELF)
        yield Case(field, -1, "must be between 0 and 2^63 - 1, not -1")
        for number in GREATEST + 1, LEAST, LEAST - 1, 10**50:
            yield Case(field, number, f"must be between 0 and 2^63 - 1, not {number}")
        for value in True, False, 0.0, 1.0, math.nan, "1", [1], Decimal(1):
            yield Case(field, value, f"must be a whole number, not {value!r}")


def floats(field: str, greatest: float) -> Iterator[Case]:
    for number in 0.0, 5e-324, 2.2250738585072014e-308, 0.1 + 0.2, 99.99999999999999, 1e-300:
        yield Case(field, number, ITSELF)
    yield Case(field, -0.0, "stored as 0.0")
    yield Case(field, 7, "stored as 7.0")
    yield Case(
        field, 1e308, ITSELF if greatest >= 1e308 else "must be between 0 and 100, not 1e+308"
    )
    for number in -5e-324, -1, math.nan, math.inf, -math.inf:
        rule = "finite, from 0" if greatest > 1e308 else f"between 0 and {greatest:g}"
        yield Case(field, number, f"must be {rule}, not {number!r}")
    for value in True, "50", None, Decimal(50), 1j:
        yield Case(field, value, f"must be a number, not {value!r}")


def times(field: str) -> Iterator[Case]:
    for moment in (
        datetime.min, datetime(1, 1, 1, 0, 0, 0, 1), datetime(1, 1, 2), datetime(1582, 10, 10),
        datetime(1969, 12, 31, 23, 59, 59, 999_999), datetime(1970, 1, 1), datetime(2000, 2, 29),
        datetime(2026, 3, 1, 12, 0, 0, 1), datetime(2026, 3, 1, 12, 0, 0, 999_999),
        datetime(2038, 1, 19, 3, 14, 8), datetime(9999, 12, 31), datetime.max,
    ):  # fmt: skip
        yield Case(field, moment.replace(tzinfo=UTC), ITSELF)
    for seconds in (20_700, 86_340, -86_340, 1, -1e-6):
        moment = datetime(2026, 3, 1, 0, 30, 0, 7, timezone(timedelta(seconds=seconds)))
        yield Case(field, moment, f"stored as {moment.astimezone(UTC)!r}")
    for moment in datetime(2026, 3, 1, 12), datetime(2026, 11, 1, 1, 30, fold=1):  # local time
        yield Case(field, moment, f"stored as {moment.astimezone(UTC)!r}")
    for moment in (
        datetime.min.replace(tzinfo=timezone(timedelta(seconds=1))),
        datetime.max.replace(tzinfo=timezone(-timedelta(microseconds=1))),
    ):
        yield Case(field, moment, f"{moment} is outside the range of UTC")
    for value in "2026-03-01", 0, 1.5, date(2026, 3, 1):
        yield Case(field, value, f"must be a datetime, not {value!r}")


def members() -> Iterator[Case]:
    yield Case("task_type", "daemon", f"stored as {TaskType.DAEMON!r}")
    yield Case("status", "running", f"stored as {TaskStatus.RUNNING!r}")
    yield Case("priority", 0, f"stored as {TaskPriority.CRITICAL!r}")
    yield Case("priority", 3.0, f"stored as {TaskPriority.LOW!r}")
    strangers: list[tuple[str, type[Enum], list[Any]]] = [
        ("task_type", TaskType, ["", "BATCH", "batch ", "batch\0", None, 0, TaskStatus.PENDING]),
        ("status", TaskStatus, ["Pending", "done", NodeStatus.ONLINE, b"pending", [], None]),
        ("priority", TaskPriority, [4, -1, True, False, "0", None, 0.5, GREATEST + 1, math.nan]),
    ]
    for field, kind, values in strangers:
        known = ", ".join(
            member if isinstance(member, str) else f"{member.value} ({member.name})"
            for member in kind
        )
        for value in values:
            yield Case(field, value, f"must be one of {known}, not {value!r}")


def json() -> Iterator[Case]:
    values: list[Any] = [
        None, True, False, 0, 1, -1, 0.0, -0.0, 1.0, -1.0, GREATEST, LEAST, 1e308, -1e308, 5e-324,
        1e300, 1e16, 0.1 + 0.2, 1e-7, 123456789012345680.0, 2.0**53, 2**53 + 1, FLOAT_MAX,
        [], {}, [[]], [{}], {"a": []}, [None], [0, 0.0, False, "", None], [1, 1.0, True, "1"],
        nested(199), nested(200), [nested(150), nested(199)], list(range(1000)),
    ]  # fmt: skip
    for value in values:
        yield Case("result", value, ITSELF)
    yield Case("result", nested(201), "is nested more than 200 deep")
    yield Case("result", [nested(200)], "is nested more than 200 deep")
    yield Case("result", (1, (2,)), "stored as [1, [2]]")
    for number in GREATEST + 1, LEAST - 1, 2**64 - 1, 10**400:
        yield Case("result", number, "has an integer outside 64 bits")
        yield Case("result", {"a": [number]}, "has an integer outside 64 bits")
    for figure in math.nan, math.inf, -math.inf:
        yield Case("result", figure, f"has {figure}, which JSON cannot hold")
        yield Case("result", [0, {"a": figure}], f"has {figure}, which JSON cannot hold")
    for value in b"bytes", 1j, Decimal("1.0"), date(2026, 3, 1):
        yield Case("result", value, f"has {value!r}, which is not JSON")
    yield Case("result", {1}, "has {1}, which is not JSON")
    for value in (
        {"b": 1, "a": 2, "B": 3, "A": 4, "": 5, " ": 6}, {"a": 1, "a ": 2, "a\n": 3},
        {"é": 1, "e\u0301": 2}, {"ß": 1, "ss": 2, "SS": 3}, {"1": 1, "01": 2, "1.0": 3},
        {"\u2028": 1}, {"__proto__": {}, "constructor": None, "$ref": "#"}, {"a": {"a": {"a": {}}}},
        {"null": None, "true": True}, {"x" * 100_000: 1},
        dict.fromkeys(map(str, range(500, 0, -1))),
    ):  # fmt: skip
        yield Case("parameters", value, ITSELF)
        yield Case("metadata", value, ITSELF)
    for key in 1, None, True, b"k", (1,):
        yield Case("parameters", {key: 1}, f"has the key {key!r}, which is not text")
    for value in None, [], "{}", 0:
        yield Case("parameters", value, f"must be a dict, not {value!r}")
        if value != []:
            yield Case("required_skills", value, f"must be a list of text, not {value!r}")
    for value in (None, 0, ["a"], b"a"):
        yield Case("required_skills", ["a", value], f"must be a list of text, but has {value!r}")
    yield Case("required_skills", ("b", "a"), "stored as ['b', 'a']")
    yield Case("optional_skills", None, ITSELF)
    yield Case("optional_skills", [], ITSELF)


TABLES: dict[str, Callable[[], Iterator[Case]]] = {
    "texts of tasks": lambda: texts(
        "task_id", ["name"], ["user_id"], ["required_skills", "parameters"]
    ),
    "texts of nodes": lambda: texts("node_id", ["hostname"], [], ["tags"]),
    "counts of tasks": lambda: counts("attempt", "retry_count"),
    "counts of nodes": lambda: counts("running_tasks", "port"),
    "percentages of nodes": lambda: floats("cpu_usage", 100),
    "seconds of nodes": lambda: floats("average_execution_time", FLOAT_MAX),
    "times of tasks": lambda: times("completed_at"),
    "times of nodes": lambda: times("last_heartbeat"),
    "members of tasks": members,
    "json of tasks": json,
}


async def ways(
    repository: Any, make: Callable[..., Any], name: str, case: Case, read: dict[str, Any]
) -> set[str]:
    """What becomes of a value by all ways into a database and out of it: one and the same.

    Args:
        repository: That of the tasks or of the nodes.
        make: Makes a task or a node.
        name: Begins their identifiers.
        case: What is tried.
        read: Gets what was read in the end.
    """
    id = "task_id" if isinstance(repository, TaskRepository) else "node_id"
    untouched = "description" if id == "task_id" else "arch"

    async def write(call: Callable[[Any], Awaitable[object]], item: Any) -> set[str]:
        try:
            await call(item)
        except InvalidDataError as error:
            return {str(error).removeprefix(f"{case.field}: ")}  # which the message begins with
        first = await repository.get(getattr(item, id))
        second = await repository.get(getattr(item, id))
        setattr(second, untouched, "touched")
        await repository.update(second)
        read[getattr(item, id)] = last = await repository.get(getattr(item, id))
        assert getattr(last, untouched) == "touched"
        stored = {repr(getattr(item, case.field)) for item in (first, second, last)}
        return {ITSELF if text == repr(case.value) else f"stored as {text}" for text in stored}

    outcomes = await write(repository.create, make(**{id: f"{name} new", case.field: case.value}))
    if case.field != id:  # which nobody can change
        old = make(**{id: f"{name} old"})
        await repository.create(old)
        setattr(old, case.field, case.value)
        outcomes |= await write(repository.update, old)
    return outcomes


@pytest.mark.parametrize("table", TABLES)
async def test_outcome_is_that_of_the_table(
    database: Database, make_task: MakeTask, make_node: MakeNode, table: str
) -> None:
    """All at the same time, so that what is refused would also show in what others store."""
    tasks, nodes = TaskRepository(database), NodeRepository(database)
    repository, make = (tasks, make_task) if table.endswith("tasks") else (nodes, make_node)
    cases = {f"{number} {case}": case for number, case in enumerate(TABLES[table]())}
    read: dict[str, Any] = {}

    found = await asyncio.gather(
        *[ways(repository, make, name.split()[0], case, read) for name, case in cases.items()]
    )

    outcomes = dict(zip(cases, found, strict=True))
    assert outcomes == {name: {case.expected} for name, case in cases.items()}
    listed = {node.node_id: repr(node) for node in await nodes.get_all_nodes()}
    for status in TaskStatus:
        listed |= {task.task_id: repr(task) for task in await tasks.list_by_status(status)}
    assert {id: repr(item) for id, item in read.items()}.items() <= listed.items()


class Reticent(str):
    """Text that says it is short and plain, whatever is in it."""

    __slots__ = ()

    def __len__(self) -> int:
        return 1

    def __contains__(self, text: object) -> bool:
        return False

    def isascii(self) -> bool:
        return True


@for_each(("text", "reason"), [*BAD_TEXTS, ("x" * 256, "is longer than 255")])
async def test_text_of_another_type_is_judged_by_what_is_in_it(
    database: Database, make_task: MakeTask, text: str, reason: str
) -> None:
    """Found by the campaign `hostile`: one kind took what the other did not."""
    tasks, said = TaskRepository(database), Reticent(text)

    with pytest.raises(InvalidDataError, match=reason):
        await tasks.create(make_task(user_id=said))
    with pytest.raises(InvalidDataError, match=reason):
        await tasks.list_by_user(said)


async def test_identifiers_are_sorted_by_their_characters(
    database: Database, make_task: MakeTask, make_node: MakeNode
) -> None:
    """And not by the alphabet of some language, which servers do if nobody tells them."""
    ids = ["a b", "aa", "ab", "e\u0301", "10", *"aBC_éZzA-1 2ÿĀ数🚀\uffff"]
    for id in ids:
        await TaskRepository(database).create(make_task(task_id=id))
        await NodeRepository(database).create(make_node(node_id=id))

    tasks = await TaskRepository(database).list_pending_tasks()
    nodes = await NodeRepository(database).get_all_nodes()

    assert [task.task_id for task in tasks] == sorted(ids)
    assert [node.node_id for node in nodes] == sorted(ids)
    async with StateManager(database, None) as manager:
        assert await manager.get_pending_tasks() == tasks
        assert await manager.get_all_nodes() == nodes
