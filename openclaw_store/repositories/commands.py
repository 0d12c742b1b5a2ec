"""Commands: the writes of the store, and the conditions under which each is refused."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from typing import Any, ClassVar, Generic, NamedTuple

from openclaw_store.database import FIELDS
from openclaw_store.domain import (
    ALIVE,
    ASSIGNED,
    ENTITY_NAMES,
    FINISHED,
    KEY,
    MAX_INTEGER,
    Decision,
    Entity,
    EntityKey,
    NodeDelta,
    NodeInfo,
    NodeStatus,
    Outcome,
    Record,
    Step,
    Task,
    TaskStatus,
    Values,
    Wait,
    check_count,
    check_key,
    check_seconds,
    check_text,
    conditions,
    describe_exception,
    key_of,
    lifecycle,
)
from openclaw_store.errors import (
    DuplicateError,
    InvalidDataError,
    NodeInUseError,
    StaleVersionError,
    StoreError,
)
from openclaw_store.repositories.unit_of_work import Command, Row, missing

CONTENT: Mapping[type[Any], Sequence[str]] = {
    kind: tuple(name for name in names if name != KEY[kind]) for kind, names in FIELDS.items()
}
"""All fields but the identifier, as an `Update` of a whole row writes them."""

PART_SIZE = 200
"""Tasks that a call with many of them changes in one transaction."""


# Not frozen: a frozen dataclass takes twice as long to construct. Commands are never changed.
@dataclass(slots=True)
class Create(Command, Generic[Entity]):
    """Add a row; the result is its record, or `DuplicateError`.

    The command owns the record: its version is set when it is written.
    """

    kind: type[Entity]
    id: str
    record: Record[Entity]
    key: str | None = None
    """The idempotency key of the record, to be read with the keys of other commands."""
    is_new: ClassVar[bool] = True

    @property
    def is_one_call(self) -> bool:
        return self.kind is Task

    def decide(self, row: Row) -> Record[Entity] | StoreError:
        if row.version is not None:
            return DuplicateError(ENTITY_NAMES[self.kind], self.id)
        if self.kind is Task and self.record.idempotency_key is not None:
            conflict = row.key_conflict(self.record)
            if conflict is not None:
                return conflict
        if self.kind is NodeInfo:  # a node of this name may have been removed with tasks
            held = len(_assigned_to(row, MAX_INTEGER)) or self.record.running_tasks
            return row.write(self.record.evolve(running_tasks=held), FIELDS[NodeInfo])
        return row.write(self.record, FIELDS[self.kind])


@dataclass(slots=True)
class Update(Command, Generic[Entity]):
    """Write the named fields of a row, if it still has this version (compare-and-set).

    The result is the new record, `StaleVersionError` or `NotFoundError`. The command owns the
    record: its version is set when it is written.
    """

    kind: type[Entity]
    id: str
    record: Record[Entity]
    names: Sequence[str]
    version: int
    known: Record[Entity] | None = None
    """The record from which `names` are the differences, if they are."""

    @property
    def is_one_call(self) -> bool:
        return self.kind is Task

    @property
    def key(self) -> str | None:
        return self.record.idempotency_key if "idempotency_key" in self.names else None

    def decide(self, row: Row) -> Record[Entity] | StoreError:
        if row.version is None:
            return missing(self.kind, self.id)
        if row.version != self.version:
            return StaleVersionError(ENTITY_NAMES[self.kind], self.id, self.version, row.version)
        record: Record[Any] = self.record
        names: Sequence[str] = self.names
        # Heartbeats change a node without a new version, so other fields may be newer in the row.
        if row.record is not None and row.record is not self.known:
            record = row.record.merge(record, names)
        if self.kind is NodeInfo:
            assert row.record is not None  # nodes are always read
            if "last_heartbeat" in names:
                record = lifecycle.updated_node(row.record, record, row.now)
        elif row.status is not None and row.status != str(record.status):
            before = TaskStatus(row.status)
            values: Values | StoreError = lifecycle.set_with_status(before, record, row.now)
            if isinstance(values, StoreError):
                return values
            names = tuple(names) + tuple(values)
            record = record.evolve(**values)
        if self.key is not None:
            conflict = row.key_conflict(record)
            if conflict is not None:
                return conflict
        return row.write(record, names)


@dataclass(frozen=True, slots=True)
class Remove(Command):
    """Remove a row, and with `with_history` its older changes; the result is `False` without one.

    An assigned task releases its slot.
    """

    kind: type[Any]
    id: str
    with_history: bool = False
    version: int | None = None
    """The only version to remove; `None` for any."""

    def decide(self, row: Row) -> bool:
        if row.version is None or self.version not in (None, row.version):
            return False
        if row.node is not None and row.status in ASSIGNED:
            row.unit.count(row, row.node, NodeDelta(running=-1))
        row.remove(with_history=self.with_history)
        return True


@dataclass(frozen=True, slots=True)
class SetNodeStatus(Command):
    """Change the status of a node; ONLINE and BUSY count as a heartbeat.

    With `patience`, only a live node is changed whose last heartbeat is older. The result is
    `True` if the node was changed.
    """

    id: str
    status: NodeStatus
    patience: timedelta | None = None
    reason: str | None = None
    kind: ClassVar[type[Any]] = NodeInfo

    def decide(self, row: Row) -> bool:
        record = row.record
        if record is None:
            return False
        if self.patience is not None:
            is_silent = conditions.is_silent(record, row.now, self.patience)
            if record.status not in ALIVE or not is_silent:
                return False
        values: dict[str, Any] = {"status": self.status, "status_reason": self.reason}
        if self.status in ALIVE:
            values["last_heartbeat"] = row.now
        row.write(record.evolve(**values), values, self.reason)
        return True


@dataclass(frozen=True, slots=True)
class Resume(Command):
    """End the MAINTENANCE of a node; the result is `False` if there is no such node."""

    id: str
    kind: ClassVar[type[Any]] = NodeInfo

    def decide(self, row: Row) -> bool:
        if row.record is None:
            return False
        if row.record.status is NodeStatus.MAINTENANCE:
            values = {"status": NodeStatus.ONLINE, "status_reason": None}
            row.write(row.record.evolve(**values), values, "resumed")
        return True


@dataclass(frozen=True, slots=True)
class Claim(Command):
    """Assign the best tasks to a node; the result is their records, best first.

    With `start` they are RUNNING at once.
    """

    id: str
    limit: int
    start: bool = False
    kind: ClassVar[type[Any]] = NodeInfo
    is_one_call: ClassVar[bool] = True

    def decide(self, row: Row) -> list[Record[Task]] | StoreError:
        return row.unit.claim(row, self.limit, start=self.start)


class Advanced(NamedTuple):
    """A task after `Advance`."""

    record: Record[Task]
    is_changed: bool
    """`False` if it had this state before."""


@dataclass(slots=True)
class Advance(Command):
    """Change the status of a task, and the counters of its node; the result is `Advanced`."""

    id: str
    decision: Decision
    known: Record[Task] | None = None
    """The task at any version, which may save the read."""
    related_keys: Sequence[EntityKey] = ()
    """The key of the node to which the task is probably assigned."""
    version: int | None = None
    """The only version to change; `None` for any."""
    kind: ClassVar[type[Any]] = Task
    is_one_call: ClassVar[bool] = True

    def decide(self, row: Row) -> Advanced | StoreError:
        task = row.content(self.known)
        if task is None:
            return missing(Task, self.id)
        if self.version not in (None, task.version):
            return Advanced(task, is_changed=False)
        return advance(row, task, self.decision)


@dataclass(slots=True)
class Recover(Advance):
    """Change the status of a task by a decision that also depends on its node."""

    is_one_call: ClassVar[bool] = False

    def decide(self, row: Row) -> Advanced | StoreError:
        task = row.content(self.known)
        if task is None:
            return missing(Task, self.id)
        node = row.other(NodeInfo, task.assigned_node).record if task.assigned_node else None
        decision: Any = self.decision
        return advance(row, task, partial(decision, node=node))


def start_of(task: Task) -> Advance:
    """Return the command by which the owner starts a task."""
    return _by_owner(task, lifecycle.start)


def completion_of(task: Task, text: bytes | None) -> Advance:
    """Return the command by which the owner completes a task, with a result in JSON."""
    return _by_owner(task, partial(lifecycle.complete, result=text))


def failure_of(
    task: Task,
    error: str | BaseException,
    wait: Wait | None,
    status: TaskStatus = TaskStatus.FAILED,
) -> Advance:
    """Return the command by which the owner reports a failure; without `wait`, the last one.

    Args:
        status: The status after the last retry.
    """
    if isinstance(error, BaseException):
        error = describe_exception(error)
    text = check_text("error", error)
    return _by_owner(task, partial(lifecycle.fail, error=text, wait=wait, status=status))


def release_of(task: Task, reason: str | None) -> Advance:
    """Return the command by which the owner gives a task back."""
    text = None if reason is None else check_text("reason", reason)
    return _by_owner(task, partial(lifecycle.give_back, reason=text))


def cancellation_of(
    task_id: str,
    reason: str | None,
    version: int | None = None,
    grace_seconds: float | None = None,
) -> Advance:
    """Return the command that cancels a task, or only this version of it."""
    text = None if reason is None else check_text("reason", reason)
    grace = None if grace_seconds is None else check_seconds("grace_seconds", grace_seconds)
    decision = partial(lifecycle.cancel, reason=text, grace=grace)
    return Advance(check_key("task_id", task_id), decision, version=version)


def acknowledgement_of(task: Task) -> Advance:
    """Return the command by which the owner cancels a task, as it was asked to."""
    return _by_owner(task, lifecycle.acknowledge_cancel)


def requeue_of(task_id: str, version: int | None = None) -> Advance:
    """Return the command that requeues a finished task, or only this version of it."""
    return Advance(check_key("task_id", task_id), lifecycle.requeue, version=version)


def change_of(known: Record[Entity], changed: Record[Entity]) -> Update[Entity] | None:
    """Return the command that replaces a record by a changed one; `None` if they are equal."""
    names = known.differences(changed)
    if not names:
        return None
    return Update(*key_of(known), changed, names, known.version, known)


def _by_owner(task: Task, decision: Callable[..., Outcome]) -> Advance:
    if not isinstance(task, Task):
        raise InvalidDataError("task", f"must be a Task, not {type(task).__name__}")
    node = task.assigned_node
    if node is not None:
        node = check_key("assigned_node", node)
    owner = (node, check_count("attempt", task.attempt))
    id = check_key("task_id", task.task_id)
    related_keys = () if node is None else ((NodeInfo, node),)
    return Advance(id, partial(decision, owner=owner), related_keys=related_keys)


def advance(row: Row, task: Record[Task], decision: Decision) -> Advanced | StoreError:
    """Apply a decision to the task of `row` and to the counters of its node."""
    step = decision(task, row.now)
    if step is None:
        return Advanced(task, is_changed=False)
    if not isinstance(step, Step):
        return step
    changed = task.replace(**step.task)
    if task.status in FINISHED:  # another task may have taken its idempotency key meanwhile
        conflict = row.key_conflict(changed)
        if conflict is not None:
            return conflict
    if step.node is not None and task.assigned_node is not None:
        row.unit.count(row, task.assigned_node, step.node)
    return Advanced(row.write(changed, step.task, step.reason), is_changed=True)


@dataclass(slots=True)
class Register(Command):
    """Register the new process of a node, and requeue the tasks of the former process.

    The result is the record of the node, or `NodeInUseError`; `None` if the former process had more
    tasks than `PART_SIZE`. Then a part is released, and the command must be applied again.
    """

    id: str
    record: Record[NodeInfo]
    wait: Wait
    replaced: str | None = None
    """The session that a process with a session may replace, though it has a lease."""
    kind: ClassVar[type[Any]] = NodeInfo

    def decide(self, row: Row) -> Record[NodeInfo] | StoreError | None:
        known, session = row.record, self.record.session
        if known is not None and session is not None and known.session != self.replaced:
            is_in_use = conditions.is_in_use(known, session, row.now)
            if is_in_use:
                return NodeInUseError(self.id, known.session)
        assigned = _assigned_to(row, PART_SIZE + 1)
        for task_row in assigned[:PART_SIZE]:
            task = task_row.content()
            assert task is not None  # it has a status
            advance(task_row, task, partial(lifecycle.release, wait=self.wait))
        if len(assigned) > PART_SIZE:
            return None
        record = self.record.evolve(**lifecycle.registered(row.record, row.now))
        return row.write(record, CONTENT[NodeInfo], "registered")


def _assigned_to(node: Row, limit: int) -> list[Row]:
    """Return the tasks that a node has claimed and not finished: all, or at least `limit`.

    They are sorted, so that both databases assign the same revisions.
    """
    unit = node.unit
    # The stored ones that are read may all be tasks that this run has ended.
    limit = min(limit + len(unit.rows[Task]), MAX_INTEGER)
    for raw in unit.cursor.execute(unit.sql.read_assigned, (node.id, limit)):
        unit.row_of(unit.sql.decode[Task](raw))
    tasks = unit.rows[Task].values()
    assigned = [one for one in tasks if one.node == node.id and one.status in ASSIGNED]
    return sorted(assigned, key=lambda one: one.id)
