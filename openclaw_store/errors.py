"""The errors of the store: one class for each different reaction of a caller.

StoreError
├── InvalidDataError (ValueError)     a value cannot be stored; SealedValueError
├── NotFoundError (LookupError)       TaskNotFoundError, NodeNotFoundError
├── ConflictError                     DuplicateError, StaleVersionError, UnsavedConflictError,
│                                     InvalidTransitionError, NotOwnerError, NodeInUseError
├── CompactedError                    the wanted part of the feed was removed
├── KeyRingError                      the keys of the process do not suffice
└── BackendError                      UnavailableError, DeadlineError, SchemaMismatchError,
                                      OutcomeUnknownError
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

_LONGEST_SHOWN = 200


def safe_repr(value: object) -> str:
    """Return the `repr` of a value for a message: shortened, and never failing."""
    try:
        text = repr(value)
    except Exception:  # an integer of too many digits, or a class with a faulty `__repr__`
        return f"a value of type {type(value).__name__}"
    return text if len(text) <= _LONGEST_SHOWN else f"{text[:_LONGEST_SHOWN]}…"


def printable(text: str, keep: str = "") -> str:
    """Escape the characters that could command a terminal, or hide and reorder text.

    Args:
        keep: Characters that are not escaped, such as a newline.
    """
    if text.isprintable():
        return text
    return "".join(
        letter
        if letter.isprintable() or letter in keep
        else letter.encode("unicode_escape").decode()
        for letter in text
    )


def shown(text: str, longest: int = 1000) -> str:
    """Escape and cut a text with names and values of a database, which may be hostile."""
    return printable(text if len(text) <= longest else f"{text[:longest]}…")


def logger_of(room: str) -> logging.Logger:
    """Return a logger of the library; its lines and tracebacks are printable."""
    logger = logging.getLogger(f"openclaw_store.{room}")
    logger.addFilter(_make_printable)
    return logger


def _make_printable(record: logging.LogRecord) -> bool:
    message = record.getMessage()
    if not message.isprintable():
        record.msg, record.args = printable(message), ()
    if record.exc_info and not record.exc_text:
        text = logging.Formatter().formatException(record.exc_info)
        # Indented: a line of an error's text must not pass for another record.
        record.exc_text = printable(text, "\n").replace("\n", "\n  ")
    if record.stack_info:
        record.stack_info = printable(record.stack_info, "\n").replace("\n", "\n  ")
    return True


class StoreError(Exception):
    """The base of all errors of this library."""

    def __str__(self) -> str:
        return printable(super().__str__(), "\n")

    def __reduce__(self) -> tuple[Any, ...]:
        # The default calls the class with `args`, which our constructors do not take: without
        # this, the parent of a worker process could not unpickle the worker's errors.
        return _restore, (type(self), self.args, self.__dict__)


def _restore(kind: type[StoreError], args: tuple[object, ...], state: dict[str, Any]) -> StoreError:
    error = kind.__new__(kind, *args)
    error.args = args
    error.__dict__.update(state)
    return error


class InvalidDataError(StoreError, ValueError):
    """A value cannot be stored, or a stored value cannot be read; nothing was written.

    Attributes:
        field: The name of the field or argument.
        reason: The rule that the value breaks.
    """

    def __init__(self, field: str, reason: str) -> None:
        super().__init__(f"{field}: {reason}")
        self.field = field
        self.reason = reason


class SealedValueError(InvalidDataError):
    """A sealed value cannot be opened; other rows stay readable.

    Attributes:
        field: The name of the column.
        reason: The problem, and the next step.
        table: The name of the table.
        row_id: The identifier of the row.
    """

    def __init__(self, table: str, column: str, row_id: object, problem: str) -> None:
        super().__init__(column, f"of {safe_repr(row_id)} in {table} {problem}")
        self.table = table
        self.row_id = row_id


class KeyRingError(StoreError):
    """The key ring of the process is missing, malformed, or lacks a key; nothing was changed.

    Attributes:
        key_id: The number of the key that is concerned; `None` if there is no single one.
    """

    def __init__(self, problem: str, key_id: int | None = None) -> None:
        super().__init__(problem)
        self.key_id = key_id


class NotFoundError(StoreError, LookupError):
    """The store has no row with this identifier."""


class TaskNotFoundError(NotFoundError):
    """The store has no task with this identifier.

    Attributes:
        task_id: The identifier.
    """

    def __init__(self, task_id: str) -> None:
        super().__init__(f"no task with id {task_id!r}")
        self.task_id = task_id


class NodeNotFoundError(NotFoundError):
    """The store has no node with this identifier.

    Attributes:
        node_id: The identifier.
    """

    def __init__(self, node_id: str) -> None:
        super().__init__(f"no node with id {node_id!r}: register it first, or correct the id")
        self.node_id = node_id


class ConflictError(StoreError):
    """The write contradicts the content of the store; nothing was written."""


class DuplicateError(ConflictError):
    """A task or node with this identifier exists, or an unfinished task with this idempotency key.

    Attributes:
        kind: `task` or `node`.
        id: The identifier of the existing task or node.
        idempotency_key: The key of both tasks; `None` if they have the same identifier.
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
    """The written copy is older than the content of the store; the newer content stays.

    Attributes:
        kind: `task` or `node`.
        id: The identifier.
        version: The version of the written copy.
        current: The version in the store.
    """

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
    """A finished task cannot change to the wanted state; only `requeue_task` restarts it.

    Attributes:
        task_id: The identifier.
        before: The state of the task.
        after: The wanted state.
    """

    def __init__(self, task_id: str, before: str, after: str) -> None:
        super().__init__(
            f"task {task_id!r} is {before}, and cannot become {after}: only requeue_task makes a "
            "finished task pending again"
        )
        self.task_id = task_id
        self.before = before
        self.after = after


class NotOwnerError(ConflictError):
    """The node no longer owns this attempt of the task; its work on the task must stop.

    Attributes:
        task_id: The identifier of the task.
        node_id: The node of the caller; `None` for a copy that no node has claimed.
        attempt: The attempt of the caller.
        status: The state of the task.
        current_node: The node to which the task is assigned; `None` for no node.
        current_attempt: The newest attempt.
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
        owner = "on no node" if current_node is None else f"on node {current_node!r}"
        super().__init__(
            f"task {task_id!r} ({status}) was given without a node: claim it first, and pass the "
            "task that claim_tasks returns"
            if node_id is None
            else f"node {node_id!r} does not hold attempt {attempt} of task {task_id!r} any more: "
            f"it is {status}, at attempt {current_attempt}, {owner}"
        )
        self.task_id = task_id
        self.node_id = node_id
        self.attempt = attempt
        self.status = status
        self.current_node = current_node
        self.current_attempt = current_attempt


class NodeInUseError(ConflictError):
    """Another worker has a lease of the node; each worker needs a node of its own.

    Attributes:
        node_id: The identifier of the node.
        session: The session of the other worker; `None` if a call of `register_node` without a
            session has replaced this one.
    """

    def __init__(self, node_id: str, session: str | None) -> None:
        super().__init__(
            f"node {node_id!r} is in use by another worker (session {session!r}): give each worker "
            "a node_id of its own, or stop the other one first"
        )
        self.node_id = node_id
        self.session = session


class UnsavedConflictError(ConflictError):
    """Entries of memory alone (`persist=False`) were older than the database and were dropped.

    Attributes:
        conflicts: One error for each dropped entry.
    """

    def __init__(self, conflicts: Sequence[StoreError]) -> None:
        super().__init__(
            f"{len(conflicts)} unsaved entries lost to newer data in the database and were "
            f"dropped: {'; '.join(str(conflict) for conflict in conflicts)}"
        )
        self.conflicts = tuple(conflicts)


class CompactedError(StoreError):
    """The feed of changes begins after the wanted revision; read the state, continue from there.

    Attributes:
        since: The wanted revision.
        oldest: The oldest revision in the feed.
    """

    def __init__(self, since: int, oldest: int) -> None:
        super().__init__(
            f"the changes after revision {since} are gone up to {oldest - 1}: read the state "
            "again, and continue from its version"
        )
        self.since = since
        self.oldest = oldest


class BackendError(StoreError):
    """The database failed, or is not usable."""


class UnavailableError(BackendError):
    """The database cannot be used now; the message names it and the next step."""


class DeadlineError(BackendError):
    """A call took longer than its limit, or would wait for itself; it has written nothing."""


class SchemaMismatchError(BackendError):
    """The schema of the database is not the schema of this version of the library."""


class OutcomeUnknownError(BackendError):
    """The commit was interrupted; the write may or may not have taken effect.

    A repetition of the call with the same identifiers is safe.
    """
