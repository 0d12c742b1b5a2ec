"""Every error the store raises; each class stands for one thing a caller would do differently.

StoreError
├── InvalidDataError (ValueError)     refused before anything reached the database
├── NotFoundError (LookupError)       TaskNotFoundError, NodeNotFoundError
├── ConflictError                     DuplicateError, StaleVersionError, UnsavedConflictError,
│                                     InvalidTransitionError, NotOwnerError
├── CompactedError                    the feed no longer reaches back that far
└── BackendError                      UnavailableError, DeadlineError, SchemaMismatchError,
                                      OutcomeUnknownError
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

_LONGEST_SHOWN = 200


def safe_repr(value: object) -> str:
    """A refused value in a message: its `repr` if it has one, and not all of it if it is long."""
    try:
        text = repr(value)
    except Exception:  # a number of too many digits, a list within itself, a caller's own class
        return f"a value of type {type(value).__name__}"
    return text if len(text) <= _LONGEST_SHOWN else f"{text[:_LONGEST_SHOWN]}…"


class StoreError(Exception):
    """Base of all errors of this library."""

    def __reduce__(self) -> tuple[Any, ...]:
        # The default calls the class with `args`, which our constructors do not take:
        # without this, an error raised in a worker process could not be read by its parent.
        return _restore, (type(self), self.args, self.__dict__)


def _restore(kind: type[StoreError], args: tuple[object, ...], state: dict[str, Any]) -> StoreError:
    error = kind.__new__(kind, *args)
    error.args = args
    error.__dict__.update(state)
    return error


class InvalidDataError(StoreError, ValueError):
    """A value cannot be stored, or read back; nothing was written."""

    def __init__(self, field: str, reason: str) -> None:
        super().__init__(f"{field}: {reason}")
        self.field = field
        self.reason = reason


class NotFoundError(StoreError, LookupError):
    """There is no such row."""


class TaskNotFoundError(NotFoundError):
    """No task has this identifier."""

    def __init__(self, task_id: str) -> None:
        super().__init__(f"no task with id {task_id!r}")
        self.task_id = task_id


class NodeNotFoundError(NotFoundError):
    """No node has this identifier."""

    def __init__(self, node_id: str) -> None:
        super().__init__(f"no node with id {node_id!r}")
        self.node_id = node_id


class ConflictError(StoreError):
    """What the store holds contradicts the write; the store was left as it is."""


class DuplicateError(ConflictError):
    """A task or node with this identifier exists already, or a live task with this key.

    Attributes:
        kind: `task` or `node`.
        id: The identifier of the one that exists.
        idempotency_key: The key that both have; `None` if it is the identifier.
    """

    def __init__(self, kind: str, id: str, idempotency_key: str | None = None) -> None:
        super().__init__(
            f"a {kind} with id {id!r} exists already: update it, or choose another id"
            if idempotency_key is None
            else f"the live task {id!r} has the idempotency key {idempotency_key!r} already: wait "
            "for it, or use submit_task, which returns it"
        )
        self.kind = kind
        self.id = id
        self.idempotency_key = idempotency_key


class StaleVersionError(ConflictError):
    """The copy being written is older than what the store holds."""

    def __init__(self, kind: str, id: str, version: int, current: int) -> None:
        super().__init__(
            f"{kind} {id!r} was changed meanwhile (your copy has version {version}, the store "
            f"{current}): read it again, or use change_{kind}"
        )
        self.kind = kind
        self.id = id
        self.version = version
        self.current = current


class InvalidTransitionError(ConflictError):
    """A task is done, and may not change to the state that was asked for."""

    def __init__(self, task_id: str, before: str, after: str) -> None:
        super().__init__(
            f"task {task_id!r} is {before}, and cannot become {after}: only requeue_task gives a "
            "finished task another life"
        )
        self.task_id = task_id
        self.before = before
        self.after = after


class NotOwnerError(ConflictError):
    """The caller's node does not hold this attempt of the task any more: give up on it.

    Attributes:
        task_id: The task.
        node_id: The node that the caller speaks for.
        attempt: The attempt that the caller speaks of.
        status: The state the task is in.
        current_node: The node it is assigned to; `None` for none.
        current_attempt: The attempt that is the newest.
    """

    def __init__(
        self,
        task_id: str,
        node_id: str | None,
        attempt: int,
        status: str,
        current_node: str | None,
        current_attempt: int,
    ) -> None:
        whose = "on no node" if current_node is None else f"on node {current_node!r}"
        super().__init__(
            f"node {node_id!r} does not hold attempt {attempt} of task {task_id!r} any more: it is "
            f"{status}, at attempt {current_attempt}, {whose}"
        )
        self.task_id = task_id
        self.node_id = node_id
        self.attempt = attempt
        self.status = status
        self.current_node = current_node
        self.current_attempt = current_attempt


class UnsavedConflictError(ConflictError):
    """Entries kept in memory with `persist=False` lost to newer data and were dropped."""

    def __init__(self, conflicts: Sequence[StoreError]) -> None:
        super().__init__(
            f"{len(conflicts)} unsaved entries lost to newer data in the database and were "
            f"dropped: {'; '.join(str(conflict) for conflict in conflicts)}"
        )
        self.conflicts = tuple(conflicts)


class CompactedError(StoreError):
    """The feed of changes no longer reaches back that far: read the state, and go on from there.

    Attributes:
        since: The revision that was asked for.
        oldest: The oldest revision that the feed still has.
    """

    def __init__(self, since: int, oldest: int) -> None:
        super().__init__(
            f"the changes after revision {since} are gone up to {oldest - 1}: read the state "
            "anew, and go on from its version"
        )
        self.since = since
        self.oldest = oldest


class BackendError(StoreError):
    """The database could not do its part."""


class UnavailableError(BackendError):
    """The database cannot be used now; the message says which and what to do."""


class DeadlineError(BackendError):
    """Something took, or would take, longer than it may; nothing of it was written."""


class SchemaMismatchError(BackendError):
    """The database has another schema than this version of the library needs."""


class OutcomeUnknownError(BackendError):
    """The commit failed half-way, so whether it took effect is not known.

    Repeating the call with the same identifiers is safe.
    """
