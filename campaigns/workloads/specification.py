"""The sequential specification of a task: the states and answers that each call allows."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any, Final, NamedTuple

NOT_FOUND: Final = "TaskNotFoundError"
DUPLICATE: Final = "DuplicateError"
STALE: Final = "StaleVersionError"
NOT_OWNER: Final = "NotOwnerError"
FINISHED_OTHERWISE: Final = "InvalidTransitionError"

TOO_LATE: Final = "DeadlineError"
"""An answer that any call may get on a busy machine; the call has changed nothing."""

READS: Final = ("read", "find")
"""Reads of the database; the cache contains their results afterwards."""

ASSIGNED: Final = ("scheduled", "running")


class ObservedTask(NamedTuple):
    """A version of a task, as observed by a caller."""

    version: int | None
    """`None` for a version that no caller has observed since an unanswered write."""
    token: str
    """Its content: each write sets a new token."""
    status: str
    node: str | None
    attempt: int

    @property
    def owner(self) -> tuple[str | None, int]:
        return self.node, self.attempt


class TaskCall(NamedTuple):
    """A call that concerns one task."""

    name: str
    arguments: tuple[Any, ...]
    answer: ObservedTask | str | bool | None
    """The answer: the task, `None` if there is none, the name of an error, `True` for success, or
    `UNKNOWN`.
    """


UNKNOWN: Final = False
"""The answer of a call that did not return."""

Outcome = ObservedTask | str | None
"""The task after a call, or the error that refused it."""


def step(task: ObservedTask | None, call: TaskCall) -> Iterable[ObservedTask | None]:
    """Return the possible states of the task after a call with this answer; empty if impossible."""
    if call.answer == TOO_LATE:
        yield task
        return
    for outcome in VERBS[call.name](task, *call.arguments):
        if isinstance(outcome, str):
            if call.answer == outcome:
                yield task
        elif call.answer is True or call.answer is UNKNOWN:
            yield outcome
        elif isinstance(call.answer, ObservedTask):
            if outcome is not None and is_same(outcome, call.answer):
                yield call.answer
        elif call.answer is None and outcome is None:
            yield None


def changes_nothing(call: TaskCall) -> bool:
    """Return true if a call with this answer leaves any task unchanged."""
    return call.name in READS or isinstance(call.answer, str)


def is_same(task: ObservedTask, other: ObservedTask) -> bool:
    """Return true if both may be the same version of a task."""
    return task[1:] == other[1:] and (task.version is None or task.version == other.version)


def _read(task: ObservedTask | None) -> Iterable[Outcome]:
    return [task]


def _add(task: ObservedTask | None, token: str) -> Iterable[Outcome]:
    return [ObservedTask(None, token, "pending", None, 0) if task is None else DUPLICATE]


def _update(task: ObservedTask | None, version: int, token: str) -> Iterable[Outcome]:
    if task is None:
        return [NOT_FOUND]
    written = task._replace(version=None, token=token)
    if task.version is None:
        return [written, STALE]
    return [written if task.version == version else STALE]


def _change(
    task: ObservedTask | None, token: str, before: ObservedTask | None = None
) -> Iterable[Outcome]:
    if task is None:
        return [NOT_FOUND]
    if before is not None and not is_same(task, before):
        return []
    return [task._replace(version=None, token=token)]


def _remove(task: ObservedTask | None) -> Iterable[Outcome]:
    return [NOT_FOUND if task is None else None]


def _claim(task: ObservedTask | None, node: str) -> Iterable[Outcome]:
    if task is None or task.status != "pending":
        return []
    return [task._replace(version=None, status="scheduled", node=node, attempt=task.attempt + 1)]


def _start(task: ObservedTask | None, node: str, attempt: int) -> Iterable[Outcome]:
    return _by_owner(task, (node, attempt), status="running")


def _complete(task: ObservedTask | None, node: str, attempt: int) -> Iterable[Outcome]:
    return _by_owner(task, (node, attempt), status="completed")


def _fail(task: ObservedTask | None, node: str, attempt: int) -> Iterable[Outcome]:
    return _by_owner(task, (node, attempt), status="pending", node=None)


def _by_owner(
    task: ObservedTask | None, owner: tuple[str, int], status: str, **values: Any
) -> Iterable[Outcome]:
    if task is None:
        return [NOT_FOUND]
    if task.owner != owner:
        return [NOT_OWNER]
    if task.status == status:  # a repetition changes nothing
        return [task]
    return [
        task._replace(version=None, status=status, **values) if _is_assigned(task) else NOT_OWNER
    ]


def _cancel(task: ObservedTask | None) -> Iterable[Outcome]:
    if task is None:
        return [NOT_FOUND]
    if task.status == "completed":
        return [FINISHED_OTHERWISE]
    return [task if task.status == "cancelled" else task._replace(version=None, status="cancelled")]


def _requeue(task: ObservedTask | None) -> Iterable[Outcome]:
    if task is None:
        return [NOT_FOUND]
    return [task if task.status == "pending" else _back(task)]


def _register(task: ObservedTask | None, node: str) -> Iterable[Outcome]:
    """Register the node again as a new process: its tasks are pending again."""
    is_lost = task is not None and _is_assigned(task) and task.node == node
    return [_back(task) if task is not None and is_lost else task]


def _back(task: ObservedTask) -> ObservedTask:
    return task._replace(version=None, status="pending", node=None)


def _is_assigned(task: ObservedTask) -> bool:
    return task.status in ASSIGNED


VERBS: Final[Mapping[str, Callable[..., Iterable[Outcome]]]] = {
    "read": _read,
    "find": _read,
    "add": _add,
    "update": _update,
    "change": _change,
    "remove": _remove,
    "claim": _claim,
    "start": _start,
    "complete": _complete,
    "fail": _fail,
    "cancel": _cancel,
    "requeue": _requeue,
    "register": _register,
}
"""The outcomes of each call of a task, with its arguments; retries are unlimited."""
