"""The operations: what each write asks of a row, and when it is refused."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from functools import partial
from typing import Any, ClassVar, Generic, NamedTuple

from openclaw_store.database import FIELDS, WriteTransaction
from openclaw_store.domain import (
    ALIVE,
    ASSIGNED,
    ENTITY_NAMES,
    FINISHED,
    KEY,
    Decision,
    Entity,
    EntityKey,
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
    check_text,
    encode_json,
    lifecycle,
)
from openclaw_store.errors import (
    DuplicateError,
    InvalidDataError,
    StaleVersionError,
    StoreError,
)
from openclaw_store.repositories.unit_of_work import Command, Row, SingleRowCommand, apply, missing

CONTENT: Mapping[type[Any], Sequence[str]] = {
    kind: tuple(name for name in names if name != KEY[kind]) for kind, names in FIELDS.items()
}
"""The fields that an `Update` of a whole row writes: all but the identifier."""


# Not frozen, though nobody changes them: that takes twice as long to make.
@dataclass(slots=True)
class Create(SingleRowCommand, Generic[Entity]):
    """Add a row; results in its record, or `DuplicateError`.

    The record is the operation's own: it is stamped when it is written.
    """

    kind: type[Entity]
    id: str
    record: Record[Entity]
    is_new: ClassVar[bool] = True

    @property
    def key(self) -> str | None:
        return self.record.idempotency_key if self.kind is Task else None

    def decide(self, row: Row) -> Record[Entity] | StoreError:
        if row.version is not None:
            return DuplicateError(ENTITY_NAMES[self.kind], self.id)
        if self.key is not None:
            taken = row.key_taken(self.record)
            if taken is not None:
                return taken
        return row.write(self.record, FIELDS[self.kind])


@dataclass(slots=True)
class Update(SingleRowCommand, Generic[Entity]):
    """Write the named fields of a row that has still this version.

    Results in the new record, or `StaleVersionError`, or `NotFoundError`. The record is the
    operation's own: it is stamped when it is written.
    """

    kind: type[Entity]
    id: str
    record: Record[Entity]
    names: Sequence[str]
    version: int
    known: Record[Entity] | None = None
    """What `names` are the differences from, if they are of a known row."""

    @property
    def hints(self) -> Iterable[Record[Any]]:
        return () if self.known is None or self.kind is not Task else (self.known,)

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
        if row.record is not None and row.record is not self.known:
            record = row.record.merge(record, names)
        if self.kind is NodeInfo:
            assert row.record is not None  # always read
            if "last_heartbeat" in names:
                heartbeat = newer_heartbeat(row.record, self.record, row.now)
                record = record.evolve(last_heartbeat=heartbeat)
        elif row.status is not None and row.status != record.status._value_:
            refusal = lifecycle.illegal_transition(self.id, TaskStatus(row.status), record.status)
            if refusal is not None:
                return refusal
            moments: Values = lifecycle.missing_time(record, row.now)
            record = record.evolve(**moments)
            names = (*names, *moments)
        if self.key is not None:
            taken = row.key_taken(record)
            if taken is not None:
                return taken
        return row.write(record, names)


def newer_heartbeat(known: Record[Any], given: Record[Any], now: datetime) -> datetime | None:
    """The last heartbeat of a node that is updated: it never goes back, but from the future."""
    before, after = known.last_heartbeat, given.last_heartbeat
    if before is not None and (after is None or after < before):
        after = min(before, now)  # another machine's clock may only be a little ahead
    newer: datetime | None = after
    return newer


@dataclass(frozen=True, slots=True)
class Remove(SingleRowCommand):
    """Remove a row, and with `with_history` its older changes; results in whether it existed.

    A task gives back the place that it has taken up.
    """

    kind: type[Any]
    id: str
    with_history: bool = False

    def decide(self, row: Row) -> bool:
        if row.version is None:
            return False
        if row.node is not None and row.status in ASSIGNED:
            node = row.other(NodeInfo, row.node)
            if node.record is not None:
                values = lifecycle.without_a_task(node.record)
                node.write(node.record.evolve(**values), values)
        row.remove(with_history=self.with_history)
        return True


@dataclass(frozen=True, slots=True)
class SetNodeStatus(SingleRowCommand):
    """Change a node's status; ONLINE and BUSY count as a sign of life.

    With `patience` only a live node that was silent for longer is changed. Results in whether it
    was.
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
            is_silent = lifecycle.is_silent(record, row.now, self.patience)
            if record.status not in ALIVE or not is_silent:
                return False
        values: dict[str, Any] = {"status": self.status}
        if self.status in ALIVE:
            values["last_heartbeat"] = row.now
        row.write(record.evolve(**values), values, self.reason)
        return True


@dataclass(frozen=True, slots=True)
class Claim(SingleRowCommand):
    """Hand tasks to a node; results in the records of those that it may have, best first.

    Of the candidates, those are left out that the node may not claim by now.
    """

    id: str
    candidates: Sequence[Record[Task]]
    """Best first, as they were known; there may be more than `limit`."""
    limit: int
    kind: ClassVar[type[Any]] = NodeInfo

    @property
    def others(self) -> Iterable[EntityKey]:
        return [(Task, one.task_id) for one in self.candidates]

    @property
    def hints(self) -> Iterable[Record[Task]]:
        return self.candidates

    def decide(self, row: Row) -> list[Record[Task]] | StoreError:
        node = row.record
        if node is None:
            return missing(NodeInfo, self.id)
        claimed: list[Record[Task]] = []
        for candidate in self.candidates:
            if len(claimed) == self.limit:
                break
            place = row.other(Task, candidate.task_id)
            if place.status != TaskStatus.PENDING:
                continue
            task = place.content(candidate)
            step = None if task is None else lifecycle.claim(task, node, row.now)
            if task is not None and step is not None:
                claimed.append(place.write(task.evolve(**step.task), step.task))
                node = node.evolve(**step.node)
        if claimed:
            row.write(node, ("running_tasks",))
        return claimed


class Advanced(NamedTuple):
    """What has become of a task."""

    record: Record[Task]
    is_changed: bool
    """Whether anything has; else it was so before."""


@dataclass(slots=True)
class Advance(SingleRowCommand):
    """Take a task a step on in its life, and the counters of its node with it.

    Results in `Advanced`, or why not.
    """

    id: str
    decision: Decision
    known: Record[Task] | None = None
    """The task as it was known, which may spare reading it."""
    node_id: str | None = None
    """The node that it is probably assigned to, which is read together with other rows."""
    kind: ClassVar[type[Any]] = Task

    @property
    def others(self) -> Iterable[EntityKey]:
        return () if self.node_id is None else ((NodeInfo, self.node_id),)

    @property
    def hints(self) -> Iterable[Record[Any]]:
        return () if self.known is None else (self.known,)

    def decide(self, row: Row) -> Advanced | StoreError:
        task = row.content(self.known)
        if task is None:
            return missing(Task, self.id)
        return advance(row, task, self.decision)


def start_of(task: Task) -> Advance:
    """Its node begins to run a task."""
    return _by_owner(task, lifecycle.start)


def completion_of(task: Task, result: Any) -> Advance:
    """Its node has completed a task."""
    text = None if result is None else encode_json("result", result)
    return _by_owner(task, partial(lifecycle.complete, result=text))


def failure_of(task: Task, error: str, wait: Wait) -> Advance:
    """Its node has failed to do a task."""
    text = check_text("error", error)
    return _by_owner(task, partial(lifecycle.fail, error=text, wait=wait))


def cancellation_of(task_id: str, reason: str | None, version: int | None = None) -> Advance:
    """Nobody needs a task any more, or one version of it."""
    text = None if reason is None else check_text("reason", reason)
    decision = partial(lifecycle.cancel, reason=text, version=version)
    return Advance(check_key("task_id", task_id), decision)


def requeue_of(task_id: str) -> Advance:
    """A task is to be run again."""
    return Advance(check_key("task_id", task_id), lifecycle.requeue)


def _by_owner(task: Task, decision: Callable[..., Outcome]) -> Advance:
    if not isinstance(task, Task):
        raise InvalidDataError("task", f"must be a Task, not {type(task).__name__}")
    node = task.assigned_node
    if node is not None:
        node = check_key("assigned_node", node)
    owner = (node, check_count("attempt", task.attempt))
    id = check_key("task_id", task.task_id)
    return Advance(id, partial(decision, owner=owner), node_id=node)


def advance(row: Row, task: Record[Task], decision: Decision) -> Advanced | StoreError:
    """Take the task that `row` holds a step on, and the counters of its node with it."""
    node = row.other(NodeInfo, task.assigned_node) if task.assigned_node else None
    step = decision(task, None if node is None else node.record, row.now)
    if step is None:
        return Advanced(task, is_changed=False)
    if not isinstance(step, Step):
        return step
    changed = task.replace(**step.task)
    if task.status in FINISHED:
        taken = row.key_taken(changed)
        if taken is not None:
            return taken
    if step.node and node is not None and node.record is not None:
        node.write(node.record.evolve(**step.node), step.node)
    return Advanced(row.write(changed, step.task, step.reason), is_changed=True)


@dataclass(slots=True)
class Register(SingleRowCommand):
    """Add a node, or have it come back as a new process that holds nothing.

    What the former one held is given back. Results in the node's record.
    """

    id: str
    record: Record[NodeInfo]
    wait: Wait
    kind: ClassVar[type[Any]] = NodeInfo

    def decide(self, row: Row) -> Record[NodeInfo] | StoreError:
        for held in row.held():
            task = held.content()
            assert task is not None  # it has a status
            advance(held, task, partial(lifecycle.release, wait=self.wait))
        record = self.record.evolve(**lifecycle.registered(row.record, row.now))
        return row.write(record, CONTENT[NodeInfo], "registered")


def apply_together(
    transaction: WriteTransaction, groups: Sequence[Sequence[Command]]
) -> Sequence[Sequence[Any]]:
    """Apply groups of operations, each of which was submitted as one."""
    return [apply(transaction, group) for group in groups]
