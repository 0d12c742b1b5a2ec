"""Filters: conditions that select tasks or nodes, and pages of the selected tasks."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from datetime import datetime, timedelta
from enum import Enum
from typing import Any, Self, TypeVar

import orjson

from openclaw_store.domain.conditions import free_slots
from openclaw_store.domain.models import (
    NodeInfo,
    NodeStatus,
    Task,
    TaskPriority,
    TaskStatus,
    TaskType,
)
from openclaw_store.domain.records import Record
from openclaw_store.domain.serialization import BriefRepr
from openclaw_store.domain.validation import (
    Check,
    check_enum,
    check_key,
    check_text,
    check_time,
    encode_json,
)
from openclaw_store.errors import InvalidDataError, safe_repr


@dataclass(frozen=True, kw_only=True, repr=False)
class TaskFilter(BriefRepr):
    """Conditions that a task must all meet; a list without conditions contains all tasks.

    Text is compared exactly, with case and without wildcards. Of two times, `from` and `after` are
    included, `until` and `before` excluded. A `timedelta` is the time that long before the call:
    `finished_before=timedelta(days=30)` selects tasks that finished more than 30 days ago.
    """

    status: TaskStatus | Iterable[TaskStatus] | None = None
    """One status, or several alternatives."""
    task_type: TaskType | Iterable[TaskType] | None = None
    """One type, or several alternatives."""
    priority: TaskPriority | Iterable[TaskPriority] | None = None
    """One priority, or several alternatives."""
    node: str | None = None
    """The `assigned_node`."""
    user: str | None = None
    """The `user_id`."""
    idempotency_key: str | None = None
    skill: str | None = None
    """One of the `required_skills`."""
    name_contains: str | None = None
    error_contains: str | None = None
    """A task without an error does not match."""
    submitted_from: datetime | timedelta | None = None
    submitted_until: datetime | timedelta | None = None
    completed_from: datetime | timedelta | None = None
    completed_until: datetime | timedelta | None = None
    finished_after: datetime | timedelta | None = None
    """As `completed_from`, for finished tasks only."""
    finished_before: datetime | timedelta | None = None
    """As `completed_until`, for finished tasks only."""
    metadata: Mapping[str, Any] | None = None
    """Values at paths of the `metadata`: `{"user.plan": "free"}` selects tasks whose metadata
    contains `{"user": {"plan": "free"}}`.

    A dot separates the keys of nested dicts. A value is text, a number, a boolean or `None`. The
    number 1 equals 1.0, but neither `True` nor the text `"1"`. `None` selects a stored null, not a
    missing key. Keys with a dot, a quotation mark, a backslash or a control character cannot be
    searched.
    """

    @classmethod
    def everything(cls) -> Self:
        """Return the filter of all tasks, for calls that refuse a filter without conditions."""
        return cls(status=tuple(TaskStatus))

    def checked(self, now: datetime) -> TaskFilter:
        """Return a valid filter, with alternatives as tuples and times in UTC.

        A condition that every task meets is left out.

        Raises:
            InvalidDataError: If a condition is invalid; it names the condition.
        """
        return TaskFilter(**_checked(self, now))


@dataclass(frozen=True, kw_only=True, repr=False)
class NodeFilter(BriefRepr):
    """Conditions that a node must all meet; a filter without conditions selects all nodes."""

    status: NodeStatus | Iterable[NodeStatus] | None = None
    """One status, or several alternatives."""
    skill: str | None = None
    """One of the `available_skills`, compared exactly."""
    tag: str | None = None
    """One of the `tags`, compared exactly."""
    has_free_slots: bool | None = None
    """True for an ONLINE node that runs fewer tasks than it may, false for any other node."""
    silent_for: timedelta | None = None
    """More than this time has passed since the last heartbeat, or since the registration of a node
    that never sent one; its lease does not matter. A heartbeat that lies further than this in the
    future counts as silence: a clock was turned back.
    """

    def checked(self, now: datetime) -> NodeFilter:
        """Return a valid filter, with alternatives as a tuple.

        Raises:
            InvalidDataError: If a condition is invalid; it names the condition.
        """
        return NodeFilter(**_checked(self, now))

    def selects(self, node: Record[NodeInfo], now: datetime) -> bool:
        """Return true if a node meets the conditions of a checked filter."""
        return (
            (not isinstance(self.status, tuple) or node.status in self.status)
            and (self.skill is None or _contains(node.decoded("available_skills"), self.skill))
            and (self.tag is None or _contains(node.decoded("tags"), self.tag))
            and self.has_free_slots in (None, free_slots(node) > 0)
            and (
                self.silent_for is None
                or abs(now - (node.last_heartbeat or node.registered_at)) > self.silent_for
            )
        )


Filter = TypeVar("Filter", TaskFilter, NodeFilter)


def check_filter(kind: type[Filter], filter: Filter | None, now: datetime) -> Filter:
    """Return a valid filter of this kind; `None` selects everything.

    Raises:
        InvalidDataError: If a condition is invalid; it names the condition.
    """
    if filter is None:
        return kind()
    if not isinstance(filter, kind):
        raise InvalidDataError("filter", f"must be a {kind.__name__}, not {type(filter).__name__}")
    return filter.checked(now)


def check_selection(filter: TaskFilter, now: datetime) -> TaskFilter:
    """Return a valid filter with a condition, for a call that changes what it selects.

    Raises:
        InvalidDataError: If a condition is invalid, or there is none.
    """
    checked = check_filter(TaskFilter, filter, now)
    if checked == TaskFilter():
        raise InvalidDataError(
            "filter",
            "has no condition, and would select all tasks: give it one, or pass "
            "TaskFilter.everything()",
        )
    return checked


def _checked(filter: TaskFilter | NodeFilter, now: datetime) -> dict[str, Any]:
    given = {name: value for name, value in vars(filter).items() if value is not None}
    for name in _TIMES & given.keys():
        if isinstance(given[name], timedelta):
            given[name] = now - _duration(name, given[name])
    checks = _CHECKS[type(filter)]
    return {name: checks[name](name, value) for name, value in given.items()}


def _contains(values: Any, text: str) -> bool:
    return isinstance(values, list) and text in values


def _alternatives(kind: type[Enum]) -> Check:
    check_member = check_enum(kind)

    def check(name: str, given: Any) -> tuple[Any, ...]:
        is_one = isinstance(given, str) or not isinstance(given, Iterable)
        members = [check_member(name, member) for member in ([given] if is_one else given)]
        return tuple(dict.fromkeys(members))

    return check


def _part(name: str, value: Any) -> str | None:
    return check_text(name, value) or None  # every text contains the empty one


def _flag(name: str, value: Any) -> bool:
    if not isinstance(value, bool):
        raise InvalidDataError(name, f"must be True, False or None, not {safe_repr(value)}")
    return value


def _duration(name: str, value: Any) -> timedelta:
    if not isinstance(value, timedelta):
        raise InvalidDataError(name, f"must be a timedelta, not {safe_repr(value)}")
    if not timedelta(0) <= value <= _LONGEST:
        raise InvalidDataError(name, f"must be from 0 to {_LONGEST.days} days, not {value}")
    return value


def _values_by_path(name: str, value: Any) -> dict[str, Any] | None:
    if not isinstance(value, Mapping):
        raise InvalidDataError(name, f"must be a dict of values by path, not {safe_repr(value)}")
    wanted: dict[str, Any] = {}
    for path, one in value.items():
        if _UNSEARCHABLE.search(check_text(name, path)):
            raise InvalidDataError(name, f"has the path {path!r}, which cannot be searched")
        wanted[path] = orjson.loads(encode_json(name, one))
        if isinstance(wanted[path], list | dict):
            raise InvalidDataError(name, f"cannot be searched for a list or dict, as at {path!r}")
    return wanted or None


_UNSEARCHABLE = re.compile(r'[\x00-\x1f"\\]')
"""Characters that JSON escapes, and paths of SQLite cannot quote."""

_LONGEST = timedelta(days=36_500)
"""A hundred years, so that every clock can go back by it."""

_TIMES = frozenset(
    f"{event}_{end}"
    for event, ends in (
        ("submitted", ("from", "until")),
        ("completed", ("from", "until")),
        ("finished", ("after", "before")),
    )
    for end in ends
)

_CHECKS: Mapping[type[Any], Mapping[str, Check]] = {
    TaskFilter: {
        "status": _alternatives(TaskStatus),
        "task_type": _alternatives(TaskType),
        "priority": _alternatives(TaskPriority),
        **dict.fromkeys(("node", "user", "idempotency_key"), check_key),
        **dict.fromkeys(("skill", "error_contains"), check_text),
        "name_contains": _part,
        **dict.fromkeys(_TIMES, check_time),
        "metadata": _values_by_path,
    },
    NodeFilter: {
        "status": _alternatives(NodeStatus),
        **dict.fromkeys(("skill", "tag"), check_text),
        "has_free_slots": _flag,
        "silent_for": _duration,
    },
}


@dataclass(frozen=True)
class TaskPage:
    """One page of a list of tasks, newest submitted first."""

    tasks: list[Task]
    after: str | None
    """The cursor to pass to the next call; `None` on the last page."""

    def __iter__(self) -> Iterator[Task]:
        return iter(self.tasks)

    def __len__(self) -> int:
        return len(self.tasks)
