"""The domain classes, identifiers and errors: what holds without any database."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import fields, replace
from datetime import UTC, datetime
from enum import Enum
from typing import Any

import pytest
from conftest import MakeNode, MakeTask

import openclaw_store
from openclaw_store import (
    BackendError,
    ConflictError,
    DeadlineError,
    DuplicateError,
    InvalidDataError,
    NodeInfo,
    NodeNotFoundError,
    NodeStatus,
    NotFoundError,
    OutcomeUnknownError,
    SchemaMismatchError,
    StaleVersionError,
    StoreError,
    Task,
    TaskFilter,
    TaskNotFoundError,
    TaskPriority,
    TaskStatus,
    TaskType,
    UnavailableError,
    UnsavedConflictError,
    new_id,
    utc_now,
)
from openclaw_store.database.tables import NodeRow, TaskRow
from openclaw_store.domain import clock as clock_module
from openclaw_store.domain.models import ALIVE, FINISHED
from openclaw_store.domain.records import JSON_FIELDS
from openclaw_store.domain.validation import check_enum

ERRORS = [
    InvalidDataError("name", "must be text"),
    TaskNotFoundError("t"),
    NodeNotFoundError("n"),
    DuplicateError("task", "t"),
    StaleVersionError("node", "n", 1, 2),
    UnsavedConflictError([DuplicateError("task", "t"), TaskNotFoundError("u")]),
    UnavailableError("the disk is full"),
    DeadlineError("too slow"),
    SchemaMismatchError("too new"),
    OutcomeUnknownError("who knows"),
]


@pytest.mark.parametrize(
    ("kind", "values"),
    [
        (TaskType, ["interactive", "batch", "compute_intensive", "io_intensive", "daemon"]),
        (
            TaskStatus,
            ["pending", "scheduled", "running", "completed", "failed", "cancelled", "timeout"],
        ),
        (TaskPriority, [0, 1, 2, 3]),
        (NodeStatus, ["online", "offline", "busy", "maintenance", "error"]),
    ],
)
def test_enums_have_the_values_that_are_stored(kind: type[Enum], values: list[Any]) -> None:
    assert [member.value for member in kind] == values


def test_priorities_are_named_and_ordered_by_urgency() -> None:
    assert TaskPriority.CRITICAL < TaskPriority.HIGH < TaskPriority.NORMAL < TaskPriority.LOW


def test_states_that_end_a_task_and_states_in_which_a_node_lives() -> None:
    assert set(TaskStatus) - FINISHED == {
        TaskStatus.PENDING,
        TaskStatus.SCHEDULED,
        TaskStatus.RUNNING,
    }
    assert set(ALIVE) == {NodeStatus.ONLINE, NodeStatus.BUSY}


@pytest.mark.parametrize(("kind", "row"), [(Task, TaskRow), (NodeInfo, NodeRow)])
def test_fields_and_columns_are_the_same_in_the_same_order(kind: Any, row: Any) -> None:
    of_the_store_alone = {"beat", "progress", "passed_over_at"}

    columns = [column.name for column in row.__table__.columns]

    assert [field.name for field in fields(kind)] == [
        name for name in columns if name not in of_the_store_alone
    ]


class TestTaskCreate:
    def test_makes_a_pending_task_of_the_present(self) -> None:
        before = utc_now()

        task = Task.create(TaskType.BATCH, "data_processing")

        assert task.status is TaskStatus.PENDING
        assert task.priority is TaskPriority.NORMAL
        assert task.submitted_at is not None
        assert before <= task.submitted_at <= utc_now()
        assert task.version == 0

    def test_takes_the_fields_of_the_specification(self) -> None:
        task = Task.create(
            task_type=TaskType.BATCH,
            name="data_processing",
            description="处理大数据集",
            required_skills=["python", "data_processing"],
            priority=TaskPriority.HIGH,
            user_id="user_001",
        )

        assert task.description == "处理大数据集"
        assert task.required_skills == ["python", "data_processing"]
        assert task.priority is TaskPriority.HIGH
        assert task.user_id == "user_001"

    def test_takes_every_other_field_that_a_new_task_may_have(self) -> None:
        given: dict[str, Any] = {
            "task_id": "mine",
            "optional_skills": ["gpu"],
            "parameters": {"input": "a.csv"},
            "timeout": 60,
            "max_retries": 0,
            "affinity_tags": [],
            "metadata": {"ticket": 7},
            "submitted_at": datetime(2026, 1, 1, tzinfo=UTC),
        }

        task = Task.create(TaskType.DAEMON, "watch", **given)

        assert {name: getattr(task, name) for name in given} == given

    def test_takes_every_field(self) -> None:
        """Existing callers pass `status` or `result`."""
        odd: dict[str, Any] = {field.name: f"a {field.name}" for field in fields(Task)}
        for name, empty in JSON_FIELDS[Task].items():
            odd[name] = {"a": 1} if empty is dict else ["a"]

        assert Task.create(**odd) == Task(**odd)
        with pytest.raises(TypeError, match="stauts"):
            Task.create(TaskType.BATCH, "x", stauts=TaskStatus.RUNNING)

    def test_shares_no_list_or_dict_with_its_caller(self) -> None:
        skills, parameters = ["python"], {"input": "a.csv"}

        task = Task.create(TaskType.BATCH, "x", required_skills=skills, parameters=parameters)
        skills.append("gpu")
        parameters.clear()

        assert task.required_skills == ["python"]
        assert task.parameters == {"input": "a.csv"}

    @pytest.mark.parametrize("name", ["required_skills", "optional_skills", "affinity_tags"])
    def test_refuses_one_text_for_a_list_of_them(self, name: str) -> None:
        """It would become a list of letters."""
        with pytest.raises(InvalidDataError, match=f"{name}: must be a list of text"):
            Task.create(TaskType.BATCH, "t", **{name: "python"})  # type: ignore[arg-type]  # on purpose

    @pytest.mark.parametrize(
        ("name", "value"),
        [
            ("required_skills", 5),
            ("required_skills", None),
            ("optional_skills", 5),
            ("affinity_tags", ...),
            ("parameters", 5),
            ("parameters", ["ab"]),
            ("metadata", ()),
        ],
    )
    def test_refuses_what_is_no_list_or_dict(self, name: str, value: Any) -> None:
        """Found by the campaign `hostile`: it was a `TypeError`, or became something else."""
        with pytest.raises(InvalidDataError, match=f"{name}: must be a "):
            Task.create(TaskType.BATCH, "t", **{name: value})


class TestIdentifiers:
    def test_sort_by_creation(self) -> None:
        ids = [new_id() for _ in range(5_000)]

        assert ids == sorted(ids)
        assert {len(id) for id in ids} == {20}

    def test_of_several_threads_do_not_collide(self) -> None:
        with ThreadPoolExecutor(4) as pool:
            batches = list(pool.map(lambda _: [new_id() for _ in range(2_000)], range(4)))

        assert len({id for batch in batches for id in batch}) == 8_000

    def test_go_on_when_the_system_clock_goes_back(self, monkeypatch: pytest.MonkeyPatch) -> None:
        first = new_id()
        monkeypatch.setattr(clock_module, "utc_now", lambda: datetime(2001, 1, 1, tzinfo=UTC))

        second = new_id()

        assert second > first

    def test_of_a_later_moment_sort_behind(self, monkeypatch: pytest.MonkeyPatch) -> None:
        first = new_id()
        monkeypatch.setattr(clock_module, "utc_now", lambda: datetime(2199, 1, 1, tzinfo=UTC))
        monkeypatch.setattr(clock_module, "_last", 0)  # given back at the end, for other tests

        assert new_id() > first

    def test_are_those_of_created_tasks(self) -> None:
        tasks = [Task.create(TaskType.BATCH, "x") for _ in range(100)]

        ids = [task.task_id for task in tasks]

        assert ids == sorted(set(ids))


@pytest.mark.parametrize(
    "duplicate",
    [copy.copy, copy.deepcopy, replace, lambda item: pickle.loads(pickle.dumps(item))],
    ids=["copy", "deepcopy", "replace", "pickle"],
)
def test_tasks_and_nodes_can_be_duplicated(
    duplicate: Callable[[Any], Any], make_task: MakeTask, make_node: MakeNode
) -> None:
    task, node = make_task(parameters={"a": [1]}), make_node(available_skills=["python"])

    assert duplicate(task) == task
    assert duplicate(node) == node


def test_repr_shows_what_differs_from_the_defaults() -> None:
    task = Task("train-7", TaskType.BATCH, "train", required_skills=["gpu"], timeout=60)
    node = NodeInfo("atlas", "host-1", running_tasks=False)  # equals 0, the default, and is wrong

    assert repr(task) == (
        "Task(task_id='train-7', task_type=<TaskType.BATCH: 'batch'>, name='train', "
        "required_skills=['gpu'], timeout=60)"
    )
    assert repr(node) == "NodeInfo(node_id='atlas', hostname='host-1', running_tasks=False)"
    assert repr(TaskFilter(user="anna")) == "TaskFilter(user='anna')"
    assert repr(TaskFilter()) == "TaskFilter()"


def test_number_of_an_enumeration_is_named_in_the_refusal() -> None:
    with pytest.raises(InvalidDataError, match=r"one of 0 \(CRITICAL\), 1 \(HIGH\), .* not 'high'"):
        check_enum(TaskPriority)("priority", "high")


@pytest.mark.parametrize("error", ERRORS, ids=lambda error: type(error).__name__)
def test_errors_survive_pickling(error: StoreError) -> None:
    error.add_note("seen by the worker")

    restored = pickle.loads(pickle.dumps(error))

    assert type(restored) is type(error)
    assert str(restored) == str(error)
    assert repr(restored.__dict__) == repr(error.__dict__)


def test_errors_tell_what_a_program_needs_to_know() -> None:
    invalid, missing, duplicate, stale = ERRORS[0], ERRORS[1], ERRORS[3], ERRORS[4]

    assert isinstance(invalid, InvalidDataError)
    assert (invalid.field, invalid.reason) == ("name", "must be text")
    assert isinstance(missing, TaskNotFoundError)
    assert missing.task_id == "t"
    assert isinstance(duplicate, DuplicateError)
    assert (duplicate.kind, duplicate.id) == ("task", "t")
    assert isinstance(stale, StaleVersionError)
    assert (stale.version, stale.current) == (1, 2)


@pytest.mark.parametrize(
    ("kind", "bases"),
    [
        (InvalidDataError, (StoreError, ValueError)),
        (TaskNotFoundError, (NotFoundError, StoreError, LookupError)),
        (NodeNotFoundError, (NotFoundError, StoreError, LookupError)),
        (DuplicateError, (ConflictError, StoreError)),
        (StaleVersionError, (ConflictError, StoreError)),
        (UnsavedConflictError, (ConflictError, StoreError)),
        (UnavailableError, (BackendError, StoreError)),
        (DeadlineError, (BackendError, StoreError)),
        (SchemaMismatchError, (BackendError, StoreError)),
        (OutcomeUnknownError, (BackendError, StoreError)),
    ],
)
def test_errors_can_be_caught_by_their_family(
    kind: type[StoreError], bases: tuple[type[Exception], ...]
) -> None:
    assert all(issubclass(kind, base) for base in bases)


def test_public_names_are_sorted_and_exist() -> None:
    names = openclaw_store.__all__

    assert names == sorted(set(names))
    assert all(hasattr(openclaw_store, name) for name in names)
