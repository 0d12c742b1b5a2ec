"""The border: what is refused, what comes back as it went in, and what a moment means."""

from __future__ import annotations

import asyncio
import math
import os
import time
from collections.abc import Awaitable, Callable, Iterator
from contextlib import suppress
from dataclasses import replace
from datetime import UTC, date, datetime, timedelta, timezone, tzinfo
from decimal import Decimal
from enum import Enum, StrEnum
from itertools import product
from typing import Any

import pytest
from conftest import FakeClock, Location, MakeNode, MakeTask, OpenManager, execute
from hypothesis import given
from hypothesis import strategies as st
from sqlalchemy.dialects import sqlite
from support.for_each import for_each

from openclaw_store import (
    Database,
    InvalidDataError,
    NodeInfo,
    NodeStatus,
    StateManager,
    Task,
    TaskPriority,
    TaskStatus,
    TaskType,
    verify,
)
from openclaw_store.database.row_codec import FIELDS, codec_of, decoder_of
from openclaw_store.database.types import to_microseconds
from openclaw_store.domain.models import FINISHED
from openclaw_store.domain.records import JSON_FIELDS, Record, decode, encode
from openclaw_store.domain.validation import (
    MAX_ID_LENGTH,
    MAX_JSON_BYTES,
    MAX_JSON_DEPTH,
    MAX_TEXT_LENGTH,
    encode_json,
)
from openclaw_store.encryption import Protection

MAX = 2**63 - 1
SQLITE = sqlite.dialect()
EAST, WEST = timezone(timedelta(hours=14)), timezone(timedelta(hours=-12))


WINTER_HOURS = {"Asia/Shanghai": 8, "America/Los_Angeles": -8, "UTC": 0}


class Colour(Enum):
    RED = "red"


class Like(Enum):
    """What is equal to text, and is none."""

    RED = "red"

    def __eq__(self, other: object) -> bool:
        return bool(self.value == other)

    __hash__ = Enum.__hash__


class Quarrelsome(StrEnum):
    """Text that cannot be compared with all other text."""

    RED = "red"

    def __eq__(self, other: object) -> bool:
        return bool(self.value == other.value)  # type: ignore[attr-defined]  # that is the point

    __hash__ = Enum.__hash__


class Unprintable:
    def __repr__(self) -> str:
        raise RuntimeError("no")


def nested(depth: int, leaf: Any = None) -> Any:
    value = leaf
    for _ in range(depth):
        value = [value]
    return value


def cycle() -> Any:
    value: list[Any] = []
    value.append(value)
    return value


def cyclic_dict() -> dict[str, Any]:
    value: dict[str, Any] = {}
    value["self"] = value
    return value


BAD_TASKS: list[tuple[str, Any]] = [
    # identifiers
    ("task_id", ""),
    ("task_id", None),
    ("task_id", 7),
    ("task_id", b"bytes"),
    ("task_id", "a\0b"),
    ("task_id", "\ud800"),
    ("task_id", "x" * (MAX_ID_LENGTH + 1)),
    ("assigned_node", "a\0b"),
    ("assigned_node", 7),
    ("assigned_node", "x" * (MAX_ID_LENGTH + 1)),
    ("user_id", "\udfff"),
    ("user_id", True),
    ("user_id", "x" * (MAX_ID_LENGTH + 1)),
    # text
    ("name", None),
    ("name", 0),
    ("name", "\0"),
    ("name", "half a \ud83d"),
    ("name", "x" * (MAX_TEXT_LENGTH + 1)),
    ("description", ["text"]),
    ("description", "a\0"),
    ("error", ValueError("not its text")),
    ("error", "\udc80"),
    ("error", "x" * (MAX_TEXT_LENGTH + 1)),
    # enumerations
    ("task_type", "unknown"),
    ("task_type", "BATCH"),
    ("task_type", None),
    ("task_type", TaskStatus.PENDING),
    ("status", "done"),
    ("status", NodeStatus.BUSY),
    ("status", []),
    ("priority", 4),
    ("priority", -1),
    ("priority", "1"),
    ("priority", True),
    ("priority", None),
    # counts
    ("timeout", -1),
    ("timeout", 2**63),
    ("timeout", 1.0),
    ("timeout", "60"),
    ("timeout", True),
    ("retry_count", -1),
    ("retry_count", None),
    ("retry_count", 10**5000),
    ("max_retries", 2**64),
    ("max_retries", math.nan),
    ("version", "1"),
    ("version", None),
    ("version", 2**63),
    # times
    ("submitted_at", "2026-01-01"),
    ("submitted_at", 0),
    ("scheduled_at", date(2026, 1, 1)),
    ("started_at", datetime.min.replace(tzinfo=EAST)),
    ("completed_at", datetime.max.replace(tzinfo=WEST)),
    ("completed_at", math.inf),
    # lists of text
    ("required_skills", None),
    ("required_skills", "python"),
    ("required_skills", {"python"}),
    ("required_skills", {"python": 1}),
    ("required_skills", [None]),
    ("required_skills", ["python", 3]),
    ("required_skills", ["a\0b"]),
    ("required_skills", ["\ud800"]),
    ("optional_skills", "gpu"),
    ("optional_skills", 0),
    ("optional_skills", [["gpu"]]),
    ("affinity_tags", ("rack", 1)),
    ("affinity_tags", False),
    # JSON
    ("parameters", None),
    ("parameters", []),
    ("parameters", "{}"),
    ("parameters", {1: "x"}),
    ("parameters", {None: "x"}),
    ("parameters", {"a": {2: "x"}}),
    ("parameters", {10**5000: "x"}),
    ("parameters", {"a": math.nan}),
    ("parameters", {"a": {1, 2}}),
    ("parameters", {"a\0": 1}),
    ("parameters", {"\ud800": 1}),
    ("parameters", {"a": "\ud800"}),
    ("parameters", {"a": ["\0"]}),
    ("parameters", {"a": b"bytes"}),
    ("parameters", {"when": datetime(2026, 1, 1, tzinfo=UTC)}),
    ("parameters", {"text": "x" * MAX_JSON_BYTES}),
    ("parameters", cyclic_dict()),
    ("parameters", nested(100_000)),
    ("metadata", {"a": math.inf}),
    ("metadata", {"a": 2**63}),
    ("metadata", {"a": Decimal("1.0")}),
    ("result", math.nan),
    ("result", -math.inf),
    ("result", [0.0, {"a": math.inf}]),
    ("result", 2**63),
    ("result", -(2**63) - 1),
    ("result", 10**5000),
    ("result", "\0"),
    ("result", "\\\0"),
    ("result", "\ud800"),
    ("result", b"bytes"),
    ("result", 1j),
    ("result", {1, 2}),
    ("result", object()),
    ("result", Unprintable()),
    ("result", Colour.RED),
    ("result", nested(MAX_JSON_DEPTH + 1)),
    ("result", nested(100_000)),
    ("result", cycle()),
    ("result", "é" * (MAX_JSON_BYTES // 2)),
]

BAD_NODES: list[tuple[str, Any]] = [
    ("node_id", ""),
    ("node_id", None),
    ("node_id", "a\0b"),
    ("node_id", "x" * (MAX_ID_LENGTH + 1)),
    ("hostname", None),
    ("hostname", 7),
    ("platform", "\0"),
    ("arch", "\ud800"),
    ("ip_address", 0x7F000001),
    ("tailscale_ip", None),
    ("status", "away"),
    ("status", None),
    ("cpu_usage", -0.1),
    ("cpu_usage", 100.1),
    ("cpu_usage", math.nan),
    ("cpu_usage", math.inf),
    ("cpu_usage", "50"),
    ("cpu_usage", True),
    ("cpu_usage", None),
    ("memory_usage", 101),
    ("memory_usage", -math.inf),
    ("memory_usage", Decimal(50)),
    ("disk_usage", 10**5000),
    ("disk_usage", -1),
    ("average_execution_time", -1.0),
    ("average_execution_time", math.nan),
    ("average_execution_time", math.inf),
    ("average_execution_time", Unprintable()),
    ("max_concurrent_tasks", -1),
    ("max_concurrent_tasks", 2.0),
    ("running_tasks", -1),
    ("running_tasks", 2**63),
    ("running_tasks", None),
    ("port", -1),
    ("port", "18789"),
    ("total_tasks_processed", -1),
    ("successful_tasks", -1),
    ("failed_tasks", -1),
    ("registered_at", "now"),
    ("last_heartbeat", datetime.max.replace(tzinfo=WEST)),
    ("last_heartbeat", 0.0),
    ("available_skills", None),
    ("available_skills", "python"),
    ("available_skills", [b"python"]),
    ("tags", {"a": 1}),
    ("tags", ["a", None]),
]

ODD_TASKS: list[tuple[str, Any]] = [
    ("task_id", " "),
    ("task_id", "任务-№1'\"%_\\"),
    ("task_id", "x" * MAX_ID_LENGTH),
    ("assigned_node", ""),
    ("assigned_node", "no such node"),
    ("user_id", "ユーザー"),
    ("name", ""),
    ("name", "🚀 e\u0301 \u202e\uffff\x01\x7f\r\n\t"),
    ("name", "'); DROP TABLE tasks; --"),
    ("description", "x" * MAX_TEXT_LENGTH),
    ("error", ""),
    ("timeout", 1),
    ("timeout", MAX),
    ("retry_count", MAX),
    ("max_retries", 0),
    ("submitted_at", datetime.min.replace(tzinfo=UTC)),
    ("completed_at", datetime.max.replace(tzinfo=UTC)),
    ("started_at", datetime(1970, 1, 1, tzinfo=UTC)),
    ("scheduled_at", datetime(1969, 12, 31, 23, 59, 59, 999_999, tzinfo=UTC)),
    ("required_skills", []),
    (
        "required_skills",
        ["c++", "c#", "", " python ", "python", "python", "[1]", '"', "\\", "技能"],
    ),
    ("optional_skills", None),
    ("optional_skills", []),
    ("affinity_tags", None),
    ("affinity_tags", []),
    ("affinity_tags", ["rack:7"]),
    ("parameters", {}),
    ("parameters", {"": ""}),
    ("parameters", {"b": 1, "a": 2, "嵌套": {"c": [1, 2.5, None, True, {"d": []}]}}),
    ("parameters", {"\\u0000": "\\u0000", "a\\": "\\\\u0000"}),
    ("metadata", {"null": None, "empty": {}, "list": []}),
    ("result", None),
    ("result", 0),
    ("result", 0.0),
    ("result", -0.0),
    ("result", False),
    ("result", True),
    ("result", ""),
    ("result", []),
    ("result", {}),
    ("result", [[], {}, [None]]),
    ("result", {"result": None}),
    ("result", "null"),
    ("result", 1e300),
    ("result", 5e-324),
    ("result", 0.1 + 0.2),
    ("result", MAX),
    ("result", -MAX - 1),
    ("result", [1, 1.0, True]),
    ("result", "\u2028\ufeff💾"),
    ("result", nested(MAX_JSON_DEPTH)),
]

ODD_NODES: list[tuple[str, Any]] = [
    ("node_id", "节点/1"),
    ("hostname", ""),
    ("ip_address", "fe80::1%eth0, or whatever"),
    ("tailscale_ip", "not an address"),
    ("cpu_usage", 0),
    ("cpu_usage", 100),
    ("memory_usage", 99.99999999999999),
    ("disk_usage", 5e-324),
    ("average_execution_time", 1e300),
    ("max_concurrent_tasks", 0),
    ("max_concurrent_tasks", MAX),
    ("running_tasks", 7),  # more than it may
    ("port", 0),
    ("port", 99_999),
    ("total_tasks_processed", MAX),
    ("available_skills", []),
    ("available_skills", ["", "java", "javascript", "%", "数据处理", "x" * 5_000]),
    ("tags", ["a", "a"]),
    ("last_heartbeat", None),
    ("registered_at", datetime(1, 1, 1, tzinfo=UTC)),
]


def exactly(value: Any) -> str:
    """What tells apart what `==` does not: 0, 0.0, -0.0 and False."""
    return repr(value)


async def contents(database: Database) -> list[dict[str, Any]]:
    stats = await database.get_stats()
    return [stats["task_stats"], stats["node_stats"]]


class TestRefused:
    # Nothing of this reaches a database. `test_hostile` tries many values on both.
    @pytest.mark.sqlite
    @for_each(("field", "value"), BAD_TASKS)
    async def test_task_is_refused_and_nothing_is_written(
        self, manager: StateManager, make_task: MakeTask, field: str, value: Any
    ) -> None:
        with pytest.raises(InvalidDataError) as caught:
            await manager.add_task(make_task(**{field: value}))

        assert caught.value.field == field
        assert len(str(caught.value)) < 500
        assert await contents(manager.db) == [{}, {}]
        assert await manager.get_pending_tasks() == []
        assert manager.version == 0

    @pytest.mark.sqlite
    @for_each(("field", "value"), BAD_NODES)
    async def test_node_is_refused_and_nothing_is_written(
        self, manager: StateManager, make_node: MakeNode, field: str, value: Any
    ) -> None:
        with pytest.raises(InvalidDataError) as caught:
            await manager.add_node(make_node(**{field: value}))

        assert caught.value.field == field
        assert len(str(caught.value)) < 500
        assert await contents(manager.db) == [{}, {}]
        assert await manager.get_all_nodes() == []
        assert manager.version == 0

    @pytest.mark.parametrize("persist", [True, False])
    async def test_update_leaves_database_and_cache_as_they_were(
        self, manager: StateManager, make_task: MakeTask, persist: bool
    ) -> None:
        task = make_task(result=[1])
        await manager.add_task(task)
        before = await manager.get_state()

        task.result = [math.nan]
        with pytest.raises(InvalidDataError, match="result"):
            await manager.update_task(task, persist=persist)

        assert await manager.get_state() == before
        assert await manager.task_repo.get(task.task_id) == await manager.get_task(task.task_id)
        assert task.version == before.version

    async def test_change_leaves_database_and_cache_as_they_were(
        self, manager: StateManager, make_node: MakeNode
    ) -> None:
        node = make_node()
        await manager.add_node(node)

        def overload(node: NodeInfo) -> None:
            node.cpu_usage = 101

        with pytest.raises(InvalidDataError, match="cpu_usage"):
            await manager.change_node(node.node_id, overload)

        assert await manager.get_node(node.node_id) == node
        assert await manager.node_repo.get(node.node_id) == node

    async def test_timeout_of_nothing_is_refused_and_a_stored_one_stays_readable(
        self, manager: StateManager, make_task: MakeTask, location: Location
    ) -> None:
        task = make_task()
        await manager.add_task(task)
        nothing = make_task(timeout=0)
        calls: list[Callable[[], Awaitable[object]]] = [
            lambda: manager.add_task(nothing),
            lambda: manager.add_task(nothing, persist=False),
            lambda: manager.submit_task(nothing),
            lambda: manager.task_repo.create(nothing),
            lambda: manager.update_task(replace(task, timeout=0)),
            lambda: manager.change_task(task.task_id, lambda task: setattr(task, "timeout", 0)),
        ]
        for call in calls:
            with pytest.raises(InvalidDataError, match="timeout: must be at least 1 second"):
                await call()
        [outcome] = await manager.add_tasks([nothing])
        assert isinstance(outcome, InvalidDataError)
        assert manager.version == task.version

        execute(location, "UPDATE tasks SET timeout = 0")  # by an older version of the library
        found = await manager.task_repo.get(task.task_id)
        assert found is not None
        assert Task.from_dict(found.to_dict()) == found
        async with StateManager(Database(location), None) as other:
            changed = await other.change_task(
                task.task_id, lambda task: setattr(task, "name", "new")
            )
            assert changed is not None
            assert (changed.name, changed.timeout) == ("new", 0)
            assert await verify(other.db)

    async def test_bad_task_does_not_disturb_those_added_with_it(
        self, manager: StateManager, make_task: MakeTask
    ) -> None:
        tasks = [make_task(), make_task(timeout=-1), make_task()]

        outcomes = await asyncio.gather(
            *[manager.add_task(task) for task in tasks], return_exceptions=True
        )

        assert outcomes[0] is outcomes[2] is True
        assert isinstance(outcomes[1], InvalidDataError)
        assert await manager.task_repo.count_by_status() == 2

    async def test_field_that_was_deleted_is_named(
        self, manager: StateManager, make_task: MakeTask
    ) -> None:
        task = make_task()
        del task.user_id

        with pytest.raises(InvalidDataError, match="user_id"):
            await manager.add_task(task)

    async def test_something_else_in_place_of_a_task(
        self, manager: StateManager, make_task: MakeTask, make_node: MakeNode
    ) -> None:
        wrong: list[Any] = [None, {}, "task-1", make_node(), Task]
        for item in wrong:
            with pytest.raises(InvalidDataError, match="must be a Task"):
                await manager.add_task(item)
            with pytest.raises(InvalidDataError, match="must be a Task"):
                await manager.task_repo.update(item)

        with pytest.raises(InvalidDataError, match="must be a NodeInfo"):
            await manager.add_node(make_task())  # type: ignore[arg-type]  # that is the point

    @for_each("id", [None, 7, b"x", ["x"], "a\0b", "\ud800", "x" * 256])
    async def test_identifier_that_cannot_be_one(self, manager: StateManager, id: Any) -> None:
        calls = [
            manager.get_task,
            manager.remove_task,
            manager.get_node,
            manager.remove_node,
            manager.update_heartbeat,
            manager.task_repo.get,
            manager.task_repo.delete,
            manager.task_repo.list_by_node,
            manager.task_repo.list_by_user,
            manager.node_repo.get,
            manager.node_repo.delete,
            manager.node_repo.update_heartbeat,
        ]

        for call in calls:
            with pytest.raises(InvalidDataError, match=r"^(task|node|user)_id: "):
                await call(id)

    @for_each("limit", [0, -1, True, 1.5, "10", 2**63, math.nan])
    async def test_limit_that_is_none(self, manager: StateManager, limit: Any) -> None:
        for call in (
            manager.get_pending_tasks(limit),
            manager.task_repo.list_pending_tasks(limit),
            manager.task_repo.list_by_user("user", limit),
            manager.task_repo.list_by_status(TaskStatus.PENDING, limit),
        ):
            with pytest.raises(InvalidDataError, match="limit"):
                await call

    @for_each("seconds", [-1, math.nan, math.inf, "120", None, True, 1e12, 10**400])
    async def test_duration_that_is_none(self, manager: StateManager, seconds: Any) -> None:
        for call in (manager.check_stale_nodes, manager.node_repo.find_stale_nodes):
            with pytest.raises(InvalidDataError, match="timeout_seconds"):
                await call(seconds)

    @for_each("days", [-1, math.nan, math.inf, "30", None, 1e6, 1e12])
    async def test_age_that_is_none(self, manager: StateManager, days: Any) -> None:
        with pytest.raises(InvalidDataError, match="days"):
            await manager.task_repo.cleanup_old_tasks(days=days)

    @for_each("status", ["done", 7, ["completed", "done"], [None]])
    async def test_status_that_is_none(self, manager: StateManager, status: Any) -> None:
        with pytest.raises(InvalidDataError, match="keep_status"):
            await manager.task_repo.cleanup_old_tasks(keep_status=status)
        with pytest.raises(InvalidDataError, match="status"):
            await manager.task_repo.list_by_status(status)
        with pytest.raises(InvalidDataError, match="status"):
            await manager.task_repo.count_by_status(status)
        with pytest.raises(InvalidDataError, match="status"):
            await manager.update_node_status("node", status)

    @for_each(
        ("field", "value"),
        [
            ("cpu_usage", 101),
            ("cpu_usage", math.nan),
            ("memory_usage", -1),
            ("memory_usage", "50"),
            ("disk_usage", math.inf),
            ("running_tasks", -1),
            ("running_tasks", 1.5),
        ],
    )
    async def test_heartbeat_with_a_figure_that_cannot_be(
        self, manager: StateManager, make_node: MakeNode, field: str, value: Any
    ) -> None:
        node = make_node()
        await manager.add_node(node)

        with pytest.raises(InvalidDataError, match=field):
            await manager.update_heartbeat(node.node_id, **{field: value})

        assert await manager.get_node(node.node_id) == node

    @for_each("skill", [None, 7, ["python"], "\0", "\ud800"])
    async def test_skill_that_is_none(self, manager: StateManager, skill: Any) -> None:
        for call in (manager.find_nodes_by_skill, manager.node_repo.find_by_skill):
            with pytest.raises(InvalidDataError, match="skill"):
                await call(skill)


class TestAccepted:
    @for_each(("field", "value"), ODD_TASKS)
    async def test_task_comes_back_equal_from_memory_and_database(
        self, manager: StateManager, make_task: MakeTask, field: str, value: Any
    ) -> None:
        task = make_task(**{field: value})
        await manager.add_task(task)

        from_memory = await manager.get_task(task.task_id)
        from_database = await manager.task_repo.get(task.task_id)

        assert from_memory == from_database == task
        assert exactly(getattr(from_memory, field)) == exactly(value)
        assert exactly(getattr(from_database, field)) == exactly(value)

    @for_each(("field", "value"), ODD_NODES)
    async def test_node_comes_back_equal_from_memory_and_database(
        self, manager: StateManager, make_node: MakeNode, field: str, value: Any
    ) -> None:
        node = make_node(**{field: value})
        await manager.add_node(node)

        from_memory = await manager.get_node(node.node_id)
        from_database = await manager.node_repo.get(node.node_id)

        assert from_memory == from_database == node
        assert getattr(from_memory, field) == getattr(from_database, field) == value

    async def test_values_in_place_of_enumerations(
        self, manager: StateManager, make_task: MakeTask
    ) -> None:
        task = make_task(task_type="daemon", status="running", priority=0)

        await manager.add_task(task)

        stored = await manager.get_task(task.task_id)
        assert stored is not None
        assert stored.task_type is TaskType.DAEMON
        assert stored.status is TaskStatus.RUNNING
        assert stored.priority is TaskPriority.CRITICAL

    async def test_tuples_come_back_as_lists(
        self, manager: StateManager, make_task: MakeTask
    ) -> None:
        task = make_task(required_skills=("python",), result=(1, (2,)))

        await manager.add_task(task)

        stored = await manager.get_task(task.task_id)
        assert stored is not None
        assert stored.required_skills == ["python"]
        assert stored.result == [1, [2]]

    async def test_enumerations_of_text_come_back_as_text(
        self, manager: StateManager, make_task: MakeTask
    ) -> None:
        task = make_task(name=TaskStatus.PENDING, result={"status": TaskStatus.FAILED})

        await manager.add_task(task)

        stored = await manager.get_task(task.task_id)
        assert stored is not None
        assert type(stored.name) is str
        assert stored.result == {"status": "failed"}
        assert type(stored.result["status"]) is str

    async def test_percentages_come_back_as_floats(
        self, manager: StateManager, make_node: MakeNode
    ) -> None:
        node = make_node(cpu_usage=7, memory_usage=-0.0)

        await manager.add_node(node)

        for stored in (
            await manager.get_node(node.node_id),
            await manager.node_repo.get(node.node_id),
        ):
            assert stored is not None
            assert exactly(stored.cpu_usage) == "7.0"
            assert exactly(stored.memory_usage) == "0.0"

    async def test_attributes_that_somebody_hung_on_a_task_are_left_behind(
        self, manager: StateManager, make_task: MakeTask
    ) -> None:
        task = make_task()
        task.colour = "red"  # type: ignore[attr-defined]  # that is the point

        await manager.add_task(task)

        assert not hasattr(await manager.get_task(task.task_id), "colour")

    async def test_change_between_values_that_are_equal_is_written(
        self, manager: StateManager, make_task: MakeTask
    ) -> None:
        task = make_task(result={"n": 1}, parameters={"x": True})
        await manager.add_task(task)

        task.result, task.parameters = {"n": True}, {"x": 1.0}
        await manager.update_task(task)

        stored = await manager.task_repo.get(task.task_id)
        assert stored is not None
        assert exactly([stored.result, stored.parameters]) == "[{'n': True}, {'x': 1.0}]"


class TestRecord:
    @given(
        st.recursive(
            st.none()
            | st.booleans()
            | st.integers(-MAX - 1, MAX)
            | st.floats(allow_nan=False, allow_infinity=False)
            | st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"])),
            lambda values: (
                st.lists(values, max_size=3)
                | st.dictionaries(st.sampled_from(["a", "b", "é"]), values, max_size=3)
            ),
            max_leaves=10,
        )
    )
    def test_any_json_is_copied_and_decoded_as_it_was(self, value: Any) -> None:
        task = Task("t", TaskType.BATCH, "n", result=value, metadata={"value": value})
        record = encode(task)
        texts = {name: record.encoded(name) for name in JSON_FIELDS[Task]}
        row = [
            getattr(record, name) if name not in texts else (text := texts[name]) and text.decode()
            for name in FIELDS[Task]
        ]

        copies = [
            record.copy(),
            decode(Task, (), tuple(row)).copy(),
            record.evolve(version=0).copy(),
        ]

        assert [exactly(copy) for copy in copies] == [exactly(task)] * 3

    @pytest.mark.parametrize(
        "value", [[], [1], {}, {"a": 1}, {"a": []}, [[1]], [{"a": {"b": 1}}]], ids=repr
    )
    def test_copies_share_nothing(self, value: Any) -> None:
        record = encode(Task("t", TaskType.BATCH, "n", result=value))
        untouched = exactly(value)

        for _ in range(2):
            result = record.copy().result
            inner = result["a"] if result == {"a": []} else result
            inner.append(2) if isinstance(inner, list) else inner.update(z=2)
            if isinstance(result, list) and isinstance(result[0], list):
                result[0].append(3)

        assert exactly(record.copy().result) == untouched
        assert exactly(record.evolve(name="other").copy().result) == untouched

    def test_does_not_follow_the_object_it_was_made_from(self) -> None:
        task = Task("t", TaskType.BATCH, "n", parameters={"a": [1]}, required_skills=["python"])
        record = encode(task)

        task.name = "other"
        task.parameters["a"].append(2)
        task.required_skills.append("gpu")

        assert record.copy() == Task(
            "t", TaskType.BATCH, "n", parameters={"a": [1]}, required_skills=["python"]
        )

    def test_differences_name_the_fields_that_differ(self) -> None:
        task = Task("t", TaskType.BATCH, "n", parameters={"a": [1]}, result=0)
        before = encode(task)

        task.parameters["a"].append(2)
        task.result = False
        task.error = "oops"
        task.version = 7  # set by the store, so it is no difference

        assert set(before.differences(encode(task))) == {"parameters", "result", "error"}

    @pytest.mark.parametrize(
        ("name", "around"),
        [
            ("error", lambda value: value),
            ("retry_count", lambda value: value),
            ("timeout", lambda value: value),
            ("result", lambda value: value),
            ("result", lambda value: [value]),
            ("result", lambda value: (value,)),
            ("required_skills", lambda value: [value, value]),
            ("parameters", lambda value: {"a": value, "b": 1}),
            ("parameters", lambda value: {"b": 1, "a": value}),
            ("metadata", lambda value: {value if isinstance(value, str | int) else "c": None}),
        ],
    )
    def test_what_is_stored_spares_checks_and_changes_nothing(
        self, name: str, around: Callable[[Any], Any]
    ) -> None:
        """Also beside values that are equal, or have the same JSON, and are not the same."""

        def outcome(task: Task, of: Record[Task], known: Record[Task] | None) -> Any:
            try:
                record = encode(task, known)
            except InvalidDataError as error:
                return str(error)
            return exactly(record.copy()), of.differences(record)

        values = [
            None, True, False, 0, 1, 0.0, -0.0, 1.0, math.nan, MAX + 1, "", "1", "\0", "\ud800",
            Colour.RED, Like.RED, Quarrelsome.RED, "red",
            datetime(2026, 3, 1, tzinfo=UTC), "2026-03-01T00:00:00+00:00",
            TaskStatus.PENDING, "pending", (1,), [1], [], {}, {"a": 1}, b"1", object(),
        ]  # fmt: skip
        compared = 0
        for stored, later in product(values, values):
            with suppress(InvalidDataError):
                known = encode(Task("t", TaskType.BATCH, "n", **{name: around(stored)}))
                known.copy()  # else its JSON is text
                task = Task("t", TaskType.BATCH, "n", **{name: around(later)})
                assert outcome(task, known, known) == outcome(task, known, None)
                compared += 1
        assert compared >= len(values)

    def test_merge_takes_the_named_fields(self) -> None:
        old = encode(Task("t", TaskType.BATCH, "old", result=[1], parameters={"a": 1}))
        new = encode(Task("t", TaskType.DAEMON, "new", result=[2], parameters={"b": [2]}))
        new.copy()  # so that one of them is decoded, and the other is not

        merged = old.merge(new, ["name", "parameters"]).copy()

        assert merged == Task("t", TaskType.BATCH, "new", result=[1], parameters={"b": [2]})

    def test_shows_what_it_holds(self) -> None:
        assert "name='visible'" in repr(encode(Task("t", TaskType.BATCH, "visible")))

    def test_refuses_what_is_neither_task_nor_node(self) -> None:
        with pytest.raises(InvalidDataError, match="must be a Task or NodeInfo, not dict"):
            encode({})  # type: ignore[type-var]  # that is the point

    def test_numbers_of_a_foreign_type_are_refused(self) -> None:
        class Metres(float):
            pass

        with pytest.raises(InvalidDataError, match="result: is not JSON"):
            encode_json("result", {"length": Metres(1.5)})

    @pytest.mark.sqlite  # PostgreSQL lets nothing else into the column
    async def test_damaged_json_in_the_database_is_named(
        self, manager: StateManager, make_task: MakeTask, location: Location
    ) -> None:
        task = make_task(status=TaskStatus.COMPLETED)
        await manager.task_repo.create(task)
        execute(location, "UPDATE tasks SET parameters = '{broken'")

        with pytest.raises(InvalidDataError, match=f"parameters: of '{task.task_id}' is not read"):
            await manager.task_repo.get(task.task_id)

    def test_another_thread_may_decode_while_a_record_evolves(self, make_task: MakeTask) -> None:
        """What was copied as text was taken for decoded."""

        class Slow(dict[str, Any]):
            def copy(self) -> dict[str, Any]:
                before = dict(self)
                record.decoded("parameters")  # by the other thread
                return before

        task = make_task(parameters={"a": 1}, result=[[1]])
        record = encode(task)
        record.__dict__ = record._fields = Slow(vars(record))

        assert record.evolve().copy() == task


class TestRow:
    @pytest.mark.parametrize("status", TaskStatus)
    def test_record_of_a_row_equals_what_was_written(
        self, status: TaskStatus, make_task: MakeTask
    ) -> None:
        moment = datetime(2026, 3, 1, 12, 0, 0, 1, tzinfo=UTC)
        task = make_task(status=status, started_at=moment, parameters={"a": 1}, result=[[1]])
        record, plan = encode(task), codec_of(Task, FIELDS[Task], SQLITE, Protection())
        row = tuple(record.values(plan))

        found = decoder_of(Task, SQLITE, Protection())(row)

        assert found.copy() == task
        assert found.differences(record) == ()
        assert tuple(found.values(plan)) == row

    async def test_memory_has_a_new_task_as_the_database_would_give_it(
        self, manager: StateManager, open_manager: OpenManager, make_task: MakeTask
    ) -> None:
        """Planted: the version stays what it was before others had taken that revision."""
        await manager.add_task(make_task())  # from here on it adds without reading first
        await (await open_manager()).add_task(make_task())
        tasks = [make_task(**{name: value}) for name, value in ODD_TASKS if name != "task_id"]
        tasks = [task for task in tasks if task.status not in FINISHED]

        await asyncio.gather(*map(manager.add_task, tasks))

        loaded = (await open_manager())._replica.cache.tasks.entries
        present = manager._replica.cache.tasks.entries
        for task in tasks:
            assert type(present[task.task_id]) is tuple
            assert exactly(present[task.task_id]) == exactly(loaded[task.task_id])
            assert await manager.get_task(task.task_id) == task


async def everywhere(manager: StateManager, task: Task) -> list[Task]:
    """Return a task that was added as its caller, the memory and the database have it."""
    in_memory = await manager.get_task(task.task_id)
    in_database = await manager.task_repo.get(task.task_id)
    assert in_memory is not None
    assert in_database is not None
    return [task, in_memory, in_database]


class TestTimes:
    @pytest.fixture(params=["Asia/Shanghai", "America/Los_Angeles", "UTC"])
    def zone(self, request: pytest.FixtureRequest) -> Iterator[str]:
        """A local time zone for the length of a test."""
        before = os.environ.get("TZ")
        os.environ["TZ"] = request.param
        time.tzset()
        yield request.param
        if before is None:
            del os.environ["TZ"]
        else:
            os.environ["TZ"] = before
        time.tzset()

    async def test_time_of_another_type_comes_back_as_a_datetime(
        self, manager: StateManager, make_task: MakeTask
    ) -> None:
        """Found by the campaign `hostile`: from memory it came as what it was, unlike later."""

        class Timestamp(datetime):
            """As of pandas, pendulum or freezegun."""

        moment = Timestamp(2026, 1, 15, 12, 30, 0, 123_456, UTC)
        task = make_task(completed_at=moment)

        await manager.add_task(task)

        for stored in await everywhere(manager, task):
            assert type(stored.completed_at) is datetime
            assert stored.completed_at == moment

    async def test_naive_time_is_local_time(
        self, manager: StateManager, make_task: MakeTask, zone: str
    ) -> None:
        naive = datetime(2026, 1, 15, 12, 30, 0, 123_456)
        task = make_task(submitted_at=naive, completed_at=naive)

        await manager.add_task(task)

        expected = (naive - timedelta(hours=WINTER_HOURS[zone])).replace(tzinfo=UTC)
        for stored in await everywhere(manager, task):
            assert stored.submitted_at == stored.completed_at == expected
            assert stored.submitted_at is not None
            assert stored.submitted_at.tzinfo is UTC

    @pytest.mark.usefixtures("zone")
    async def test_now_as_the_specification_writes_it_is_now(
        self, manager: StateManager, make_node: MakeNode
    ) -> None:
        before = datetime.now(UTC)
        node = make_node(registered_at=datetime.now(), last_heartbeat=datetime.now())

        await manager.add_node(node)

        stored = await manager.get_node(node.node_id)
        assert stored is not None
        assert stored.registered_at is not None
        assert before <= stored.registered_at <= datetime.now(UTC)

    @pytest.mark.usefixtures("zone")
    async def test_update_of_what_was_read_does_not_move_times(
        self, manager: StateManager, make_task: MakeTask
    ) -> None:
        task = make_task(submitted_at=datetime(2026, 7, 1, 9))
        await manager.add_task(task)
        submitted_at = task.submitted_at

        for name in ("a", "b", "c"):
            task.name = name
            await manager.update_task(task)

        stored = await manager.task_repo.get(task.task_id)
        assert stored is not None
        assert stored.submitted_at == task.submitted_at == submitted_at

    @pytest.mark.usefixtures("zone")
    async def test_aware_time_is_the_same_moment_anywhere(
        self, manager: StateManager, make_task: MakeTask
    ) -> None:
        task = make_task(started_at=datetime(2026, 3, 1, 1, tzinfo=timezone(timedelta(hours=5.5))))

        await manager.add_task(task)

        stored = await manager.task_repo.get(task.task_id)
        assert stored is not None
        assert stored.started_at == datetime(2026, 2, 28, 19, 30, tzinfo=UTC)
        assert stored.started_at.tzinfo is UTC

    async def test_naive_time_that_leaves_the_range_in_utc_is_refused(
        self, manager: StateManager, make_task: MakeTask, zone: str
    ) -> None:
        extreme = datetime.min if zone == "Asia/Shanghai" else datetime.max
        if zone == "UTC":
            extreme = datetime.max.replace(tzinfo=WEST)

        with pytest.raises(InvalidDataError, match=r"started_at: .* is outside the range of UTC"):
            await manager.add_task(make_task(started_at=extreme))

        assert await contents(manager.db) == [{}, {}]

    async def test_hour_that_happens_twice_keeps_its_fold(
        self, manager: StateManager, make_task: MakeTask, zone: str
    ) -> None:
        first = datetime(2026, 11, 1, 1, 30)  # summer time ends in Los Angeles
        task = make_task(started_at=first, completed_at=first.replace(fold=1))

        await manager.add_task(task)

        assert task.started_at is not None
        assert task.completed_at is not None
        hours = 1 if zone == "America/Los_Angeles" else 0
        assert task.completed_at - task.started_at == timedelta(hours=hours)

    async def test_time_without_offset_counts_as_naive(
        self, manager: StateManager, make_task: MakeTask
    ) -> None:
        class Undecided(tzinfo):
            def utcoffset(self, _: datetime | None) -> None:
                return None

            tzname = dst = utcoffset

        naive = datetime(2026, 1, 1, 12)
        task = make_task(started_at=naive.replace(tzinfo=Undecided()))

        await manager.add_task(task)

        assert task.started_at == naive.astimezone(UTC)

    @pytest.mark.parametrize(
        ("kind", "field"), [("task", "submitted_at"), ("node", "registered_at")]
    )
    async def test_missing_time_of_birth_is_now(
        self,
        manager: StateManager,
        make_task: MakeTask,
        make_node: MakeNode,
        clock: FakeClock,
        kind: str,
        field: str,
    ) -> None:
        item: Any
        if kind == "task":
            item = make_task(submitted_at=None)
            await manager.add_task(item)
        else:
            item = make_node(registered_at=None)
            await manager.add_node(item)

        assert getattr(item, field) == clock()

    @given(st.datetimes(timezones=st.just(UTC)))
    def test_microseconds_are_exact(self, moment: datetime) -> None:
        microseconds = to_microseconds(moment)

        assert datetime(1970, 1, 1, tzinfo=UTC) + timedelta(microseconds=microseconds) == moment
