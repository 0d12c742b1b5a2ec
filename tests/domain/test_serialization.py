"""Tasks and nodes as dicts: exact both ways, tolerant of what is unknown, strict otherwise."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from dataclasses import fields, replace
from datetime import UTC, datetime, timedelta, timezone
from functools import partial
from typing import Any, get_type_hints

import orjson
import pytest
from hypothesis import given
from hypothesis import strategies as st
from test_records import BAD_NODES, BAD_TASKS, ODD_NODES, ODD_TASKS, exactly

from openclaw_store import (
    Database,
    InvalidDataError,
    NodeInfo,
    NodeRepository,
    NodeStatus,
    Task,
    TaskPriority,
    TaskRepository,
    TaskStatus,
    TaskType,
)
from openclaw_store.domain import validation as c
from openclaw_store.domain.models import FIELD_CHECKS, JSON_CHECKS
from openclaw_store.domain.serialization import STORE_FIELDS

Entity = Task | NodeInfo

MAX = 2**63 - 1
NOON = datetime(2026, 3, 1, 12, tzinfo=UTC)

TEXT = st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]), max_size=20)
TEXTS = st.lists(TEXT, max_size=3)
VALUES: st.SearchStrategy[Any] = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-MAX - 1, MAX)
    | st.floats(allow_nan=False, allow_infinity=False)
    | TEXT,
    lambda values: st.lists(values, max_size=3) | st.dictionaries(TEXT, values, max_size=3),
    max_leaves=10,
)
STRATEGIES: dict[object, st.SearchStrategy[Any]] = {
    c.check_id: TEXT.filter(bool),
    c.check_key: TEXT,
    c.check_text: TEXT,
    c.check_count: st.integers(0, MAX),
    c.check_optional_count: st.none() | st.integers(0, MAX),
    c.check_limit_seconds: st.floats(0, 1e9, exclude_min=True),
    c.check_version: st.integers(-MAX, MAX),
    c.check_number: st.floats(0, allow_infinity=False),
    c.check_percentage: st.floats(0, 100),
    c.check_time: st.datetimes(timezones=st.just(UTC)).map(lambda time: time.replace(fold=0)),
    c.check_traceparent: st.from_regex(
        "[0-9a-f]{2}-[0-9a-f]{32}-[0-9a-f]{16}-[0-9a-f]{2}", fullmatch=True
    ),
    c.encode_texts: TEXTS,
    c.encode_object: st.dictionaries(TEXT, VALUES, max_size=3),
    c.encode_json: VALUES,
}
"""What each check lets through."""


TASK, NODE = Task("t", TaskType.BATCH, "n"), NodeInfo("n", "h")


def each(item: Entity, values: list[tuple[str, Any]]) -> Iterator[tuple[Entity, str, Any]]:
    """The fields to try out on an item, and what to put there."""
    return ((item, name, value) for name, value in values)


def strategy_of(kind: type[Any], name: str, default: object) -> st.SearchStrategy[Any]:
    check = JSON_CHECKS[name] if name in JSON_CHECKS else FIELD_CHECKS[kind][name]
    strategy = STRATEGIES.get(check)
    if strategy is None:  # only an enumeration has a check of its own
        strategy = st.sampled_from(get_type_hints(kind)[name])
    return st.none() | strategy if default is None else strategy


def items(kind: type[Any]) -> st.SearchStrategy[Any]:
    """Items with something in every field."""
    return st.builds(
        kind,
        **{field.name: strategy_of(kind, field.name, field.default) for field in fields(kind)},
    )


ENCODINGS: list[Callable[[Any], Any]] = [
    lambda data: data,
    lambda data: orjson.loads(orjson.dumps(data)),
    lambda data: json.loads(json.dumps(data)),
]


class TestStrict:
    @pytest.mark.parametrize("item", [TASK, NODE])
    def test_refuses_unknown_fields_and_the_ones_of_the_store_by_name(self, item: Entity) -> None:
        kind = type(item)
        data = {name: value for name, value in item.to_dict().items() if name not in STORE_FIELDS}
        wrong: list[tuple[Any, Any]] = [
            *[(field.name, 1) for field in fields(kind) if field.name in STORE_FIELDS],
            ("stauts", "x"),
            ("", 1),
            (7, 1),
        ]

        assert kind.from_dict(data, strict=True) == item
        for name, value in wrong:
            with pytest.raises(InvalidDataError) as caught:
                kind.from_dict({**data, name: value}, strict=True)
            assert caught.value.field == str(name)
            if name not in STORE_FIELDS:
                assert kind.from_dict({**data, name: value}) == item


class TestRoundTrip:
    @given(items(Task) | items(NodeInfo))
    def test_every_field_comes_back_exactly_also_through_json(self, item: Entity) -> None:
        data = item.to_dict()

        assert list(data) == [field.name for field in fields(item)]
        for encode in ENCODINGS:
            back = type(item).from_dict(encode(data))
            assert type(back) is type(item)
            assert exactly(back) == exactly(item)

    def test_odd_values_come_back(self) -> None:
        for item, name, value in [*each(TASK, ODD_TASKS), *each(NODE, ODD_NODES)]:
            item = replace(item, **{name: value})

            back = type(item).from_dict(orjson.loads(orjson.dumps(item.to_dict())))

            assert back == item, name

    def test_enums_are_values_and_times_utc_text_that_sorts(self) -> None:
        east = timezone(timedelta(hours=8))
        task = Task(
            "t",
            TaskType.IO_INTENSIVE,
            "n",
            status=TaskStatus.RUNNING,
            priority=TaskPriority.HIGH,
            submitted_at=NOON,
            scheduled_at=datetime(2026, 3, 1, 20, 0, 0, 7, tzinfo=east),
            optional_skills=["gpu"],
            parameters={"a": (1, 2)},
        )

        data = task.to_dict()

        assert (type(data["task_type"]), data["task_type"]) == (str, "io_intensive")
        assert (type(data["status"]), data["status"]) == (str, "running")
        assert (type(data["priority"]), data["priority"]) == (int, 1)
        assert data["submitted_at"] == "2026-03-01T12:00:00.000000Z"
        assert data["scheduled_at"] == "2026-03-01T12:00:00.000007Z"
        assert data["started_at"] is None
        assert data["parameters"] == {"a": [1, 2]}
        assert NodeInfo("n", "h", status=NodeStatus.BUSY).to_dict()["status"] == "busy"

    def test_nothing_is_shared(self) -> None:
        task = Task("t", TaskType.BATCH, "n", parameters={"a": [1]}, required_skills=["x"])

        data = task.to_dict()
        back = Task.from_dict(data)
        data["parameters"]["a"].append(2)
        data["required_skills"].append("y")

        for one in task, back:
            assert (one.parameters, one.required_skills) == ({"a": [1]}, ["x"])

    async def test_what_the_store_gives_can_go_around_the_world_and_be_written_back(
        self, database: Database, clock: Callable[[], datetime]
    ) -> None:
        tasks, nodes = TaskRepository(database), NodeRepository(database)
        task = Task("t", TaskType.BATCH, "n", parameters={"a": [1, {"b": None}]}, result=0.0)
        node = NodeInfo("n", "h", tags=["x"], last_heartbeat=clock())
        await tasks.create(task)
        await nodes.create(node)

        sent, heard = task.to_dict(), node.to_dict()
        task, node = Task.from_dict(sent), NodeInfo.from_dict(heard)
        task.name, node.hostname = "renamed", "moved"
        await tasks.update(task)  # the version went around, too
        await nodes.update(node)

        assert await tasks.get("t") == task
        assert await nodes.get("n") == node
        assert (task.version, node.version) == (3, 4)


class TestFromDict:
    def test_missing_fields_are_defaults_and_unknown_keys_are_ignored(self) -> None:
        data = {"task_id": "t", "task_type": "batch", "name": "n", "colour": "red", "": {1: 2}}

        task = Task.from_dict(data)
        node = NodeInfo.from_dict({"node_id": "n", "hostname": "h", "__class__": None})

        assert task == Task("t", TaskType.BATCH, "n")
        assert node == NodeInfo("n", "h")
        assert not hasattr(task, "colour")
        assert Task.from_dict(data).parameters is not task.parameters

    @pytest.mark.parametrize(
        ("kind", "name"),
        [(Task, "task_id"), (Task, "task_type"), (Task, "name"), (NodeInfo, "hostname")],
    )
    def test_what_has_no_default_must_be_there(self, kind: type[Entity], name: str) -> None:
        data = {"task_id": "t", "task_type": "batch", "name": "n", "node_id": "n", "hostname": "h"}
        del data[name]

        with pytest.raises(InvalidDataError, match=f"^{name}: is missing$"):
            kind.from_dict(data)

    def test_what_is_no_dict_is_refused(self) -> None:
        others: list[Any] = [None, [], "{}", 7, [("task_id", "t")], Task]
        for data in others:
            for kind in Task, NodeInfo:
                with pytest.raises(InvalidDataError, match="must be a dict"):
                    kind.from_dict(data)

    def test_what_the_store_refuses_is_refused_by_field_both_ways(self) -> None:
        for item, name, value in [*each(TASK, BAD_TASKS), *each(NODE, BAD_NODES)]:
            ways: list[Callable[[], object]] = [replace(item, **{name: value}).to_dict]
            if value != "2026-01-01":  # here it is a time
                ways.append(partial(type(item).from_dict, {**item.to_dict(), name: value}))
            for way in ways:
                with pytest.raises(InvalidDataError) as caught:
                    way()
                assert caught.value.field == name

    def test_time_is_iso_8601_and_local_without_a_zone(self, in_shanghai: None) -> None:
        values: list[tuple[Any, datetime]] = [
            ("2026-03-01T12:00:00Z", NOON),
            ("2026-03-01T12:00:00.000001Z", NOON + timedelta(microseconds=1)),
            ("2026-03-01T12:00:00+00:00", NOON),
            ("2026-03-01 20:00:00+08:00", NOON),
            ("2026-03-01T20:00", NOON),  # local
            ("2026-03-01T20:00:00.000", NOON),
            ("2026-03-02", datetime(2026, 3, 1, 16, tzinfo=UTC)),
            (datetime(2026, 3, 1, 20), NOON),
            (NOON, NOON),
        ]
        for value, moment in values:
            not_before = Task.from_dict({**TASK.to_dict(), "not_before": value}).not_before

            assert not_before is not None
            assert (not_before, not_before.tzinfo) == (moment, UTC)

        task = replace(TASK, submitted_at=datetime(2026, 3, 1, 20))
        assert task.to_dict()["submitted_at"] == "2026-03-01T12:00:00.000000Z"

    def test_what_is_no_time_is_refused_by_field(self) -> None:
        no_time: list[Any] = [
            *("", "now", "12:00", "2026-02-30", "2026-03-01T25:00", "0001-01-01T00:00+14:00"),
            *("\ud800", "1772366400", 1772366400, True, [2026, 3, 1], NOON.date()),
        ]
        for value in no_time:
            with pytest.raises(InvalidDataError) as caught:
                Task.from_dict({**TASK.to_dict(), "not_before": value})

            assert caught.value.field == "not_before"


@pytest.fixture
def in_shanghai(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Local time is eight hours ahead of UTC."""
    monkeypatch.setenv("TZ", "Asia/Shanghai")
    time.tzset()
    yield
    monkeypatch.undo()
    time.tzset()
