"""The life of tasks, driven at random by two managers against a plain model of it."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Awaitable, Callable, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, field, replace
from datetime import datetime, timedelta
from itertools import permutations
from pathlib import Path
from typing import Any, Literal, NamedTuple, Protocol

import pytest
from conftest import EACH_KIND, FakeClock
from hypothesis import strategies as st
from hypothesis.stateful import initialize, rule
from sqlalchemy import select
from sqlalchemy.ext.asyncio import AsyncSession
from support.machines import ALIVE, LIVE, DatabaseMachine, assert_shows, run_machine

from openclaw_store import (
    Backoff,
    Change,
    Database,
    DuplicateError,
    InvalidTransitionError,
    NodeInfo,
    NodeNotFoundError,
    NodeStatus,
    NotOwnerError,
    Recovery,
    StaleVersionError,
    StateManager,
    StoreError,
    Task,
    TaskFilter,
    TaskNotFoundError,
    TaskPriority,
    TaskStatus,
    TaskType,
)
from openclaw_store.database.row_codec import COLUMNS
from openclaw_store.database.tables import TaskRow
from openclaw_store.repositories.change_log import read_changes
from openclaw_store.repositories.row_reader import read_records

PENDING, SCHEDULED, RUNNING, COMPLETED, FAILED, CANCELLED, TIMEOUT = TaskStatus
ASSIGNED = {SCHEDULED, RUNNING}
FINISHED = {COMPLETED, FAILED, CANCELLED, TIMEOUT}
LEGAL_BY_VERBS = {
    PENDING: {SCHEDULED, CANCELLED, TIMEOUT},
    SCHEDULED: {RUNNING, COMPLETED, FAILED, CANCELLED, PENDING, TIMEOUT},
    RUNNING: {COMPLETED, FAILED, CANCELLED, TIMEOUT, PENDING},
    **{status: {PENDING} for status in FINISHED},
}
"""Which states may follow on which."""
LEGAL = {**LEGAL_BY_VERBS, **{status: set(TaskStatus) for status in LIVE}}
"""The same where `update_task` writes the state."""

ALL_TASKS, ALL_NODES = select(*COLUMNS[Task]), select(*COLUMNS[NodeInfo])
TASKS = [f"task-{number}" for number in range(4)]
KEYS = {"task-0": "a", "task-1": "a"}
NODES = ["node-0", "node-1"]
SILENT_SECONDS = 100.0
RETRY_SECONDS = 1.0
START = FakeClock()()
BACKOFF = Backoff(first_seconds=RETRY_SECONDS, factor=2, jitter=0)

Told = tuple[str, str, str | None, str | None, str | None, str | None]
"""Of a change: item, identifier, state before and after, node and reason."""


@dataclass
class World:
    """What the database must hold, and the changes that led there since the last step."""

    now: datetime
    tasks: dict[str, Task] = field(default_factory=dict)
    nodes: dict[str, NodeInfo] = field(default_factory=dict)
    status_since: dict[str, datetime] = field(default_factory=dict)
    """Of nodes."""
    copies: list[Task] = field(default_factory=lambda: [Draft(TASKS[0]).task()])
    """Tasks as they were read at some time, newest last."""
    fresh: Sequence[Task] = ()
    """Tasks as they were before the step."""
    claimed: list[Task] = field(default_factory=lambda: [Draft(TASKS[0]).task()])
    """Tasks as nodes were given them, newest last."""
    held: Sequence[Task] = ()
    """Those of them that their nodes still had before the step."""
    changes: list[Told] = field(default_factory=list)
    passed_over: dict[str, datetime] = field(default_factory=dict)
    """When a task was passed over by a claim; void once the task has changed."""

    def copy(self) -> World:
        """One that can go another way."""
        return replace(
            self,
            tasks=self.tasks.copy(),
            nodes=self.nodes.copy(),
            status_since=self.status_since.copy(),
            changes=self.changes.copy(),
            passed_over=self.passed_over.copy(),
        )

    def begin_step(self, now: datetime) -> None:
        self.now = now
        self.changes.clear()
        self.fresh = list(self.tasks.values())
        owners = {owner_of(task) for task in self.fresh if task.status in ASSIGNED}
        self.held = [task for task in self.claimed if owner_of(task) in owners]

    def put(self, task: Task, reason: str | None = None, **values: Any) -> Task:
        """Write a task with new values, under a version that nobody knows yet."""
        before = self.tasks.get(task.task_id)
        after = replace(task, **values, updated_at=self.now, version=-1)
        states = (None if before is None else before.status.value, after.status.value)
        self.changes.append(("task", task.task_id, *states, after.assigned_node, reason))
        self.tasks[task.task_id] = after
        return after

    def put_node(self, node: NodeInfo, reason: str | None = None, **values: Any) -> None:
        before = self.nodes.get(node.node_id)
        after = replace(node, **values, version=-1)
        if before is None or before.status is not after.status:
            self.status_since[node.node_id] = self.now
        states = (None if before is None else before.status.value, after.status.value)
        self.changes.append(("node", node.node_id, *states, None, reason))
        self.nodes[node.node_id] = after

    def node_of(self, task: Task) -> NodeInfo | None:
        """The node on which a task takes up a place."""
        is_assigned = task.status in ASSIGNED and task.assigned_node is not None
        return self.nodes.get(task.assigned_node or "") if is_assigned else None

    def free_place_of(self, task: Task, **totals: Any) -> None:
        node = self.node_of(task)
        if node is not None:
            self.put_node(node, running_tasks=max(0, node.running_tasks - 1), **totals)

    def count(self, task: Task, outcome: str) -> None:
        """The node has tried a task: its place is free, and its totals have grown."""
        node = self.node_of(task)
        if node is None:
            return
        seconds = (self.now - (task.started_at or task.scheduled_at or self.now)).total_seconds()
        total = node.total_tasks_processed
        self.free_place_of(
            task,
            total_tasks_processed=total + 1,
            average_execution_time=(node.average_execution_time * total + seconds) / (total + 1),
            **{outcome: getattr(node, outcome) + 1},
        )

    def try_again(self, task: Task, last: TaskStatus, error: str) -> Task:
        """A try has failed; after the last one the task ends as `last`."""
        if task.cancel_requested_at is not None:
            return cancelled(self, task)
        self.count(task, "failed_tasks")
        if task.retry_count == task.max_retries:
            return self.put(task, error, status=last, completed_at=self.now, error=error)
        wait = timedelta(seconds=RETRY_SECONDS * 2**task.retry_count)
        again = {"retry_count": task.retry_count + 1, "not_before": self.now + wait, "error": error}
        return self.put(task, error, **UNASSIGNED, **again)

    def lose(self, task: Task) -> Task:
        """The node of a task is lost."""
        if task.status is SCHEDULED or task.cancel_requested_at is not None:
            return self.give_back(task, "node lost")
        self.count(task, "failed_tasks")
        losses = task.losses + 1
        if task.max_losses is not None and losses > task.max_losses:
            ended = {"status": FAILED, "completed_at": self.now, "error": "lost too often"}
            return self.put(task, "lost too often", losses=losses, **ended)
        seconds = RETRY_SECONDS * 2 ** (losses - 2)
        again = self.now + timedelta(seconds=seconds) if losses > 1 else None
        values = {**UNASSIGNED, "not_before": again, "error": "node lost"}
        return self.put(task, "node lost", losses=losses, **values)

    def give_back(self, task: Task, reason: str) -> Task:
        """A task returns at no cost."""
        if task.cancel_requested_at is not None:
            return cancelled(self, task)
        self.free_place_of(task)
        return self.put(task, reason, **UNASSIGNED)

    def holder_of(self, key: str | None, but: str) -> Task | None:
        """The live task that has an idempotency key, but for one."""
        others = (one for one in self.tasks.values() if one.task_id != but and one.status in LIVE)
        return next((one for one in others if key is not None and one.idempotency_key == key), None)

    def free_places(self, node: NodeInfo) -> int:
        is_online = node.status is NodeStatus.ONLINE
        return max(0, node.max_concurrent_tasks - node.running_tasks) if is_online else 0

    def claimable(self, node: NodeInfo) -> list[Task]:
        """What a node could do now, best first."""
        ready = [
            task
            for task in self.tasks.values()
            if task.status is PENDING
            and (task.not_before is None or task.not_before <= self.now)
            and not is_expired(task, self.now)
            and set(task.required_skills) <= set(node.available_skills)
        ]
        return sorted(ready, key=lambda task: (task.priority, task.submitted_at, task.task_id))

    def passed_since(self, task: Task) -> datetime | None:
        since, changed = self.passed_over.get(task.task_id), task.updated_at
        return since if since is not None and changed is not None and since > changed else None

    def preferred(self, node: NodeInfo) -> list[Task]:
        """What a node could do now, as it likes it best; all fit into the window."""

        def liking(task: Task) -> tuple[int, bool, int]:
            since = self.passed_since(task)
            waits_too_long = since is not None and self.now - since >= timedelta(seconds=60)
            wanted = {*(task.optional_skills or ())} & {*node.available_skills}
            tags = {*(task.affinity_tags or ())} & {*node.tags}
            return task.priority, not waits_too_long, -len(wanted) - len(tags)

        ready = self.claimable(node)
        prefer = (task.optional_skills or task.affinity_tags for task in self.pending())
        return sorted(ready, key=liking) if any(prefer) else ready

    def pending(self) -> list[Task]:
        return [task for task in self.tasks.values() if task.status is PENDING]

    def pass_over(self, ready: Sequence[Task], taken: Sequence[Task]) -> None:
        """Note the tasks that had to wait for later ones of their priority."""
        ids = [task.task_id for task in taken]
        for number, task in enumerate(ready):
            later = [one for one in ready[number:] if one.priority is task.priority]
            if task.task_id in ids or not any(one.task_id in ids for one in later):
                continue
            if self.passed_since(task) is None:
                self.passed_over[task.task_id] = self.now

    def is_silent(self, node: NodeInfo) -> bool:
        return last_sign(node) < self.now - timedelta(seconds=SILENT_SECONDS)


UNASSIGNED: dict[str, Any] = {
    "status": PENDING,
    "assigned_node": None,
    "scheduled_at": None,
    "started_at": None,
    "completed_at": None,
}

TOTALS = (
    "registered_at",
    "total_tasks_processed",
    "successful_tasks",
    "failed_tasks",
    "average_execution_time",
)
"""What stays of a node that comes back."""


class Verb(Protocol):
    """Something that a manager is asked to do."""

    async def call(self, manager: StateManager, world: World) -> Any:
        """Do it; `world` tells which copies there are."""

    def expect(self, world: World, got: Any) -> Any:
        """Do it to the model; returns what it must result in, or the error.

        Args:
            got: What it has resulted in, where there is a choice.
        """


class Draft(NamedTuple):
    """A task that is yet to be added."""

    task_id: str
    priority: TaskPriority = TaskPriority.NORMAL
    skills: Sequence[str] = ()
    key: str | None = None
    timeout: int | None = None
    max_retries: int = 1
    max_losses: int | None = 1
    expires_in: int | None = None
    likes: Sequence[str] = ()
    tags: Sequence[str] = ()

    def task(self, now: datetime | None = None) -> Task:
        return Task(
            self.task_id,
            TaskType.BATCH,
            "a task",
            required_skills=list(self.skills),
            optional_skills=[*self.likes],
            affinity_tags=[*self.tags] or None,
            priority=self.priority,
            idempotency_key=self.key,
            timeout=self.timeout,
            max_retries=self.max_retries,
            max_losses=self.max_losses,
            submitted_at=now,
            expires_at=None
            if self.expires_in is None
            else START + timedelta(seconds=self.expires_in),
        )

    def added_to(self, world: World) -> type[StoreError] | None:
        if self.task_id in world.tasks or world.holder_of(self.key, but=self.task_id):
            return DuplicateError
        world.put(self.task(world.now))
        return None


@dataclass(frozen=True)
class Add:
    drafts: Sequence[Draft]

    async def call(self, manager: StateManager, world: World) -> Any:
        outcomes = await manager.add_tasks([draft.task() for draft in self.drafts])
        return [None if outcome is None else type(outcome) for outcome in outcomes]

    def expect(self, world: World, got: Any) -> Any:
        return [draft.added_to(world) for draft in self.drafts]


@dataclass(frozen=True)
class Submit:
    draft: Draft

    async def call(self, manager: StateManager, world: World) -> Any:
        return await manager.submit_task(self.draft.task())

    def expect(self, world: World, got: Any) -> Any:
        id, key = self.draft.task_id, self.draft.key
        there = world.tasks.get(id) or world.holder_of(key, but=id)
        if there is not None:
            return there if key is not None and there.idempotency_key == key else DuplicateError
        self.draft.added_to(world)
        return world.tasks[id]


@dataclass(frozen=True)
class Claim:
    node_id: str
    limit: int
    is_direct: bool
    """Whether the repository is asked, past the cache."""
    start: bool = False
    sees_all: bool = False
    """Whether it is certain to find the best."""

    async def call(self, manager: StateManager, world: World) -> Any:
        claim = manager.task_repo.claim if self.is_direct else manager.claim_tasks
        return await claim(self.node_id, self.limit, start=self.start)

    def expect(self, world: World, got: Any) -> Any:
        node = world.nodes.get(self.node_id)
        if node is None:  # whoever has nothing to hand out need not notice
            return [] if got == [] and not self.sees_all else NodeNotFoundError
        ready = world.preferred(node)
        best = ready[: min(self.limit, world.free_places(node))]
        if not self.sees_all and isinstance(got, list) and len(got) <= len(best):
            chosen = [task.task_id for task in got]  # not the best, perhaps, but legal?
            best = [task for id in chosen for task in ready if task.task_id == id]
        if not best:
            return []
        world.pass_over(world.claimable(node), best)
        world.put_node(node, running_tasks=node.running_tasks + len(best))
        values = {**UNASSIGNED, "status": SCHEDULED, "assigned_node": self.node_id}
        claimed = [
            world.put(task, **{**values, "attempt": task.attempt + 1, "scheduled_at": world.now})
            for task in best
        ]
        if not self.start:
            return claimed
        return [world.put(task, status=RUNNING, started_at=world.now) for task in claimed]


@dataclass(frozen=True)
class ByOwner:
    """What a node tells about a task that it holds, or has held."""

    how: Literal["start", "complete", "fail", "release", "acknowledge"]
    back: int
    """Which of those that were claimed it is about: 0 for the newest."""
    is_late: bool
    """Whether these are all, and not only those that are still held."""
    is_direct: bool

    def given(self, world: World) -> Task:
        claimed = world.claimed if self.is_late else world.held or world.claimed
        return claimed[-1 - self.back % len(claimed)]

    async def call(self, manager: StateManager, world: World) -> Any:
        task, repository = self.given(world), manager.task_repo
        match self.how:
            case "start":
                return await (repository.start if self.is_direct else manager.start_task)(task)
            case "complete":
                complete = repository.complete if self.is_direct else manager.complete_task
                return await complete(task, {"by": task.attempt})
            case "fail":
                return await (repository.fail if self.is_direct else manager.fail_task)(task, "no")
            case "release":
                release = repository.release if self.is_direct else manager.release_task
                return await release(task, "deployment")
            case "acknowledge":
                if self.is_direct:
                    return await repository.acknowledge_cancel(task)
                return await manager.acknowledge_cancel(task)

    def expect(self, world: World, got: Any) -> Any:
        given = self.given(world)
        task = world.tasks.get(given.task_id)
        if task is None:
            return TaskNotFoundError
        is_owner = owner_of(task) == owner_of(given)
        done = DONE[self.how]
        # A released task has no owner any more.
        is_repeated = is_owner or (self.how == "release" and task.attempt == given.attempt)
        if is_repeated and task.status is done:
            return task  # it was told before
        if not is_owner or task.status not in ASSIGNED:
            return NotOwnerError
        match self.how:
            case "start":
                return world.put(task, status=RUNNING, started_at=world.now)
            case "complete":
                world.count(task, "successful_tasks")
                result = {"by": task.attempt}
                return world.put(
                    task, status=COMPLETED, completed_at=world.now, result=result, error=None
                )
            case "fail":
                return world.try_again(task, FAILED, "no")
            case "release":
                return world.give_back(task, "released: deployment")
            case "acknowledge":
                is_asked = task.cancel_requested_at is not None
                return cancelled(world, task) if is_asked else InvalidTransitionError


DONE = {
    "start": RUNNING,
    "complete": COMPLETED,
    "fail": FAILED,
    "release": PENDING,
    "acknowledge": CANCELLED,
}
"""The status in which repeating a report changes nothing."""


def cancelled(world: World, task: Task) -> Task:
    world.free_place_of(task)
    return world.put(task, "enough", status=CANCELLED, completed_at=world.now, error="enough")


@dataclass(frozen=True)
class Cancel:
    task_id: str
    is_direct: bool = False
    grace: int | None = None
    """Seconds that the owner of a running task has; only a manager is asked with them."""

    async def call(self, manager: StateManager, world: World) -> Any:
        if self.is_direct and self.grace is None:
            return await manager.task_repo.cancel(self.task_id, "enough")
        return await manager.cancel_task(self.task_id, "enough", self.grace)

    def expect(self, world: World, got: Any) -> Any:
        task = world.tasks.get(self.task_id)
        if task is None or task.status is CANCELLED:
            return task is not None
        if task.status in FINISHED:
            return InvalidTransitionError
        if self.grace is None or task.status is not RUNNING:
            cancelled(world, task)
        elif task.cancel_requested_at is None:
            until = world.now + timedelta(seconds=self.grace)
            asked = {"cancel_requested_at": world.now, "cancel_deadline_at": until}
            world.put(task, "enough", error="enough", **asked)
        return True


@dataclass(frozen=True)
class CancelAll:
    node_id: str | None
    """Of a node, or else those that are pending."""

    async def call(self, manager: StateManager, world: World) -> Any:
        by_node, pending = TaskFilter(node=self.node_id), TaskFilter(status=PENDING)
        return set(await manager.cancel_tasks(by_node if self.node_id else pending, "enough"))

    def expect(self, world: World, got: Any) -> Any:
        chosen = [
            task
            for task in world.tasks.values()
            if task.status in LIVE
            and (task.assigned_node == self.node_id if self.node_id else task.status is PENDING)
        ]
        for task in chosen:
            cancelled(world, task)
        return {task.task_id for task in chosen}


@dataclass(frozen=True)
class Requeue:
    task_id: str
    is_direct: bool = False

    async def call(self, manager: StateManager, world: World) -> Any:
        requeue = manager.task_repo.requeue if self.is_direct else manager.requeue_task
        return await requeue(self.task_id)

    def expect(self, world: World, got: Any) -> Any:
        task = world.tasks.get(self.task_id)
        if task is None or task.status is PENDING:
            return task is not None
        if world.holder_of(task.idempotency_key, but=task.task_id):
            return DuplicateError
        world.free_place_of(task)
        anew = {"retry_count": 0, "losses": 0, "not_before": None, "result": None, "error": None}
        anew |= {"cancel_requested_at": None, "cancel_deadline_at": None}
        world.put(task, "requeued", **UNASSIGNED, **anew)
        return True


@dataclass(frozen=True)
class Note:
    """A change by somebody who looks at nothing else."""

    task_id: str

    async def call(self, manager: StateManager, world: World) -> Any:
        def count(task: Task) -> None:
            task.metadata["notes"] = task.metadata.get("notes", 0) + 1

        return await manager.change_task(self.task_id, count)

    def expect(self, world: World, got: Any) -> Any:
        task = world.tasks.get(self.task_id)
        notes = 0 if task is None else task.metadata.get("notes", 0)
        return None if task is None else world.put(task, metadata={"notes": notes + 1})


@dataclass(frozen=True)
class SetStatus:
    """By hand: a copy is written back with another state."""

    back: int
    is_outdated: bool
    status: TaskStatus

    def given(self, world: World) -> Task:
        copies = world.copies if self.is_outdated else world.fresh or world.copies
        return copies[-1 - self.back % len(copies)]

    async def call(self, manager: StateManager, world: World) -> Any:
        return await manager.update_task(replace(deepcopy(self.given(world)), status=self.status))

    def expect(self, world: World, got: Any) -> Any:
        given = self.given(world)
        task = world.tasks.get(given.task_id)
        if task is None:
            return TaskNotFoundError
        if task.version != given.version:
            return StaleVersionError
        if task.status in FINISHED and task.status is not self.status:
            return InvalidTransitionError
        values: dict[str, Any] = {}
        if task.status is not self.status and self.status is not PENDING:
            moments = {SCHEDULED: "scheduled_at", RUNNING: "started_at"}
            name = moments.get(self.status, "completed_at")
            values[name] = getattr(task, name) or world.now
        world.put(task, status=self.status, **values)
        return True


@dataclass(frozen=True)
class RemoveTask:
    task_id: str

    async def call(self, manager: StateManager, world: World) -> Any:
        return await manager.remove_task(self.task_id)

    def expect(self, world: World, got: Any) -> Any:
        task = world.tasks.get(self.task_id)
        if task is not None:
            world.free_place_of(task)
            del world.tasks[self.task_id]
            told = (task.status.value, None, task.assigned_node, None)
            world.changes.append(("task", self.task_id, *told))
        return task is not None


@dataclass(frozen=True)
class Register:
    node_id: str
    places: int
    skills: Sequence[str]
    is_direct: bool = False
    tags: Sequence[str] = ()

    async def call(self, manager: StateManager, world: World) -> Any:
        node = self.node()
        if self.is_direct:
            return await manager.node_repo.register(node, BACKOFF)
        return await manager.register_node(node)

    def node(self) -> NodeInfo:
        skills = list(self.skills)
        return NodeInfo(
            self.node_id,
            "host",
            max_concurrent_tasks=self.places,
            available_skills=skills,
            tags=[*self.tags],
        )

    def expect(self, world: World, got: Any) -> Any:
        for task in list(world.tasks.values()):
            if task.status in ASSIGNED and task.assigned_node == self.node_id:
                world.lose(task)
        known = world.nodes.get(self.node_id)
        stays: dict[str, Any] = {"registered_at": world.now}
        if known is not None:
            names = [*TOTALS]
            if known.status is NodeStatus.MAINTENANCE:
                names += ["status", "status_reason"]
            stays = {name: getattr(known, name) for name in names}
        world.put_node(
            self.node(), "registered", running_tasks=0, last_heartbeat=world.now, **stays
        )
        return True


@dataclass(frozen=True)
class SetNodeStatus:
    node_id: str
    status: NodeStatus

    async def call(self, manager: StateManager, world: World) -> Any:
        return await manager.update_node_status(self.node_id, self.status)

    def expect(self, world: World, got: Any) -> Any:
        node = world.nodes.get(self.node_id)
        if node is not None:
            sign: dict[str, Any] = {"last_heartbeat": world.now} if self.status in ALIVE else {}
            world.put_node(node, status=self.status, status_reason=None, **sign)
        return node is not None


@dataclass(frozen=True)
class Drain:
    node_id: str

    async def call(self, manager: StateManager, world: World) -> Any:
        return await manager.drain_node(self.node_id, "new disk")

    def expect(self, world: World, got: Any) -> Any:
        node = world.nodes.get(self.node_id)
        if node is not None:
            values = {"status": NodeStatus.MAINTENANCE, "status_reason": "new disk"}
            world.put_node(node, "new disk", **values)
        return node is not None


@dataclass(frozen=True)
class Resume:
    node_id: str

    async def call(self, manager: StateManager, world: World) -> Any:
        return await manager.resume_node(self.node_id)

    def expect(self, world: World, got: Any) -> Any:
        node = world.nodes.get(self.node_id)
        if node is not None and node.status is NodeStatus.MAINTENANCE:
            world.put_node(node, "resumed", status=NodeStatus.ONLINE, status_reason=None)
        return node is not None


@dataclass(frozen=True)
class RemoveNode:
    node_id: str

    async def call(self, manager: StateManager, world: World) -> Any:
        return await manager.remove_node(self.node_id)

    def expect(self, world: World, got: Any) -> Any:
        node = world.nodes.pop(self.node_id, None)
        if node is not None:
            world.changes.append(("node", self.node_id, node.status.value, None, None, None))
        return node is not None


@dataclass(frozen=True)
class Heartbeat:
    node_id: str

    async def call(self, manager: StateManager, world: World) -> Any:
        return await manager.update_heartbeat(self.node_id)

    def expect(self, world: World, got: Any) -> Any:
        return self.node_id in world.nodes or got  # who does not know yet that it is gone says yes


@dataclass(frozen=True)
class Sync:
    async def call(self, manager: StateManager, world: World) -> Any:
        return await manager.sync_to_database()

    def expect(self, world: World, got: Any) -> Any:
        return True


@dataclass(frozen=True)
class CheckStale:
    async def call(self, manager: StateManager, world: World) -> Any:
        return set(await manager.check_stale_nodes(SILENT_SECONDS))

    def expect(self, world: World, got: Any) -> Any:
        silent = [
            node for node in world.nodes.values() if node.status in ALIVE and world.is_silent(node)
        ]
        for node in silent:
            reason = f"silent for more than {SILENT_SECONDS:g} s"
            world.put_node(node, reason, status=NodeStatus.OFFLINE, status_reason=reason)
        return {node.node_id for node in silent}


@dataclass(frozen=True)
class Recover:
    unstarted: int | None = None

    async def call(self, manager: StateManager, world: World) -> Any:
        recovery = await manager.recover(SILENT_SECONDS, self.unstarted)
        return {name: set(ids) for name, ids in vars(recovery).items()}

    def expect(self, world: World, got: Any) -> Any:
        recovery = Recovery([*CheckStale().expect(world, got)], [], [], [])
        lists = {
            PENDING: recovery.requeued_tasks,
            FAILED: recovery.failed_tasks,
            TIMEOUT: recovery.timed_out_tasks,
            CANCELLED: recovery.cancelled_tasks,
        }
        for task in list(world.tasks.values()):
            if task.status not in LIVE:
                continue
            node = world.nodes.get(task.assigned_node or "")
            is_gone = node is None or node.status in (NodeStatus.OFFLINE, NodeStatus.ERROR)
            is_assigned = task.status in ASSIGNED and task.assigned_node
            if is_assigned and (is_gone or (node is not None and world.is_silent(node))):
                after = world.lose(task)
            elif task.status in (PENDING, SCHEDULED) and is_expired(task, world.now):
                world.free_place_of(task)
                why = "expired before it was started"
                ended = {"status": TIMEOUT, "completed_at": world.now, "error": why}
                after = world.put(task, why, **ended)
            elif self.is_unstarted(task, world.now):
                after = world.give_back(task, "claimed, but not started")
            elif task.status is RUNNING and is_cancel_overdue(task, world.now):
                after = cancelled(world, task)
            elif task.status is RUNNING and is_overdue(task, world.now):
                after = world.try_again(task, TIMEOUT, "ran for longer than its timeout")
            else:
                continue
            lists[after.status].append(after.task_id)
        return {name: set(ids) for name, ids in vars(recovery).items()}

    def is_unstarted(self, task: Task, now: datetime) -> bool:
        if self.unstarted is None or task.status is not SCHEDULED or task.scheduled_at is None:
            return False
        began = min(task.scheduled_at, task.updated_at or task.scheduled_at)
        return now > began + timedelta(seconds=self.unstarted)


def is_expired(task: Task, now: datetime) -> bool:
    return task.expires_at is not None and task.expires_at <= now


def is_cancel_overdue(task: Task, now: datetime) -> bool:
    return task.cancel_deadline_at is not None and task.cancel_deadline_at <= now


def owner_of(task: Task) -> tuple[str, str | None, int]:
    return task.task_id, task.assigned_node, task.attempt


def last_sign(node: NodeInfo) -> datetime:
    assert node.last_heartbeat is not None  # all have registered
    return node.last_heartbeat


def is_overdue(task: Task, now: datetime) -> bool:
    if task.timeout is None or task.started_at is None:
        return False
    return now > task.started_at + timedelta(seconds=task.timeout)


task_ids = st.sampled_from(TASKS)
node_ids = st.sampled_from(NODES)
skills = st.sampled_from([(), ("gpu",)])
tags = st.sampled_from([(), (), ("rack", "gpu"), ("rack",)])
backs = st.integers(0, 4)
is_direct = st.booleans()
is_late = st.integers(0, 2).map(lambda it: it == 2)
drafts = st.builds(
    Draft,
    task_ids,
    st.sampled_from([TaskPriority.NORMAL, TaskPriority.HIGH]),
    skills,
    st.sampled_from([None, "a", "b"]),
    st.sampled_from([None, 50]),
    st.integers(0, 2),
    st.sampled_from([None, 0, 1, 2]),
    st.sampled_from([None, None, 100, 200]),
    st.sampled_from([(), (), ("gpu",), ("gpu", "gpu"), ("ssd",)]),
    tags,
)
adding = st.builds(Add, st.lists(drafts, min_size=1, max_size=3)) | st.builds(Submit, drafts)
claiming = st.builds(Claim, node_ids, st.integers(1, 3), is_direct, st.booleans())
telling = st.builds(
    ByOwner,
    st.sampled_from(["start", "complete", "fail", "release", "acknowledge"]),
    backs,
    is_late,
    is_direct,
)
requeueing = st.builds(Requeue, task_ids, is_direct)
stopping = (
    st.builds(Cancel, task_ids, is_direct, st.sampled_from([None, 0, 10, 50]))
    | st.builds(CancelAll, st.sampled_from([*NODES, None]))
    | st.builds(RemoveTask, task_ids)
)
editing = st.builds(Note, task_ids) | st.builds(
    SetStatus, backs, is_late, st.sampled_from(TaskStatus)
)
joining = st.builds(Register, node_ids, st.integers(1, 3), skills, is_direct, tags)
setting = st.builds(SetNodeStatus, node_ids, st.sampled_from(NodeStatus)) | st.builds(
    lambda verb, node_id: verb(node_id), st.sampled_from([RemoveNode, Drain, Resume]), node_ids
)
tending = st.sampled_from([CheckStale(), Recover(), Recover(10)])
anything = st.one_of(
    adding,
    claiming,
    claiming,
    telling,
    telling,
    stopping,
    requeueing,
    editing,
    joining,
    setting,
    tending,
)

OF_SEVERAL_WRITES = (Submit, CancelAll, CheckStale, Recover)
"""The verbs between whose writes others may write."""


@dataclass
class Side:
    """One manager, and what the machine must know of it."""

    manager: StateManager
    lags: bool = False
    """Whether somebody else has changed something since its last refreshment."""
    heartbeats: dict[str, datetime] = field(default_factory=dict)
    """Heartbeats that wait to be written."""
    version: int = 0


class Rows(NamedTuple):
    """What the database holds, and the changes since the last step."""

    changes: Sequence[Change]
    tasks: dict[str, Task]
    nodes: dict[str, NodeInfo]


Picture = tuple[list[Any], dict[str, Task], dict[str, NodeInfo], list[Told], set[Told]]


def picture(
    outcomes: Sequence[Any],
    tasks: Mapping[str, Task],
    nodes: Mapping[str, NodeInfo],
    changes: Sequence[Told],
) -> Picture:
    """What is to be compared: neither versions, nor in which order a verb writes its rows.

    The store logs the counters of a node with another change of it, where a batch makes both.
    """
    of_nodes = {one for one in changes if one[0] == "node"}
    changed = {one[1] for one in of_nodes if one[2] != one[3] or one[5] is not None}
    return (
        list(map(bare, outcomes)),
        {id: bare(task) for id, task in tasks.items()},
        {id: bare(node) for id, node in nodes.items()},
        sorted((one for one in changes if one[0] == "task"), key=repr),
        {
            one
            for one in of_nodes
            if one[1] not in changed or one[2] != one[3] or one[5] is not None
        },
    )


def bare(result: Any) -> Any:
    """Without what only the store knows, and digits that depend on the order of sums."""
    match result:
        case Task():
            return replace(result, version=0)
        case NodeInfo():
            mean = round(result.average_execution_time, 6)
            return replace(result, version=0, average_execution_time=mean)
        case list():
            return list(map(bare, result))
        case _:
            return result


def told(change: Change) -> Told:
    states = (change.from_status, change.to_status)
    return (change.item, change.item_id, *states, change.node, change.reason)


async def outcome_of(work: Awaitable[Any]) -> Any:
    """What a call results in, or the class of its error."""
    try:
        return await work
    except StoreError as error:
        return type(error)


async def read_passed_over(session: AsyncSession) -> dict[str, datetime]:
    """When each task was passed over, where the model cannot know the order of the claims."""
    column = TaskRow.passed_over_at
    rows = await session.execute(select(TaskRow.task_id, column))
    return {id: at for id, at in rows if at is not None}


class Machine(DatabaseMachine):
    """What becomes of tasks and nodes, whoever does what, and however outdated it is.

    Each step is compared with the model, and with rules that need no model.
    """

    sides = st.sampled_from([0, 1])

    def __init__(self) -> None:
        super().__init__()
        self.world = World(self.clock())
        self.side: list[Side] = []
        self.revision = 0
        self.known: dict[tuple[str, str], tuple[str, int]] = {}
        """State and revision of each item, by the feed."""
        self.born: dict[str, int] = {}
        """The revision that added each task."""
        self.attempts: Counter[tuple[str, int]] = Counter()
        """The newest attempt of each task."""
        self.handed_out: set[tuple[str, int, int]] = set()
        """Each attempt of a task that was given to a node."""
        self.by_hand: set[str] = set()
        """Nodes with tasks whose state was written by hand, so that their counters may be wrong."""

    def open(self) -> Side:
        database = Database(self.location, clock=self.clock)
        manager = StateManager(database, auto_sync_interval=None, backoff=BACKOFF)
        self.run(manager.initialize())
        return Side(manager)

    @initialize()
    def begin(self) -> None:
        self.side = [self.open(), self.open()]
        for id in NODES:
            self.do((0, Register(id, 2, ["gpu"])))
        new = [Draft(id, key=KEYS.get(id), timeout=50) for id in TASKS[1:]]
        self.do((0, Add([*new[:-1], new[-1]._replace(likes=("gpu",))])))
        self.refresh(1)

    def teardown(self) -> None:
        for side in self.side:
            self.run(side.manager.shutdown())
        super().teardown()

    # What may happen.

    @rule(at=sides, verb=adding)
    def add(self, at: int, verb: Verb) -> None:
        self.do((at, verb))

    @rule(at=sides, verb=claiming)
    def claim(self, at: int, verb: Claim) -> None:
        sees_all = verb.is_direct or not self.side[at].lags
        self.do((at, replace(verb, sees_all=sees_all)))

    @rule(at=sides, verb=telling)
    def tell(self, at: int, verb: Verb) -> None:
        self.do((at, verb))

    @rule(at=sides, claim=claiming, tell=telling)
    def work(self, at: int, claim: Claim, tell: Verb) -> None:
        self.claim(at, claim)
        self.tell(at, tell)

    @rule(at=sides, verb=requeueing)
    def requeue(self, at: int, verb: Verb) -> None:
        self.do((at, verb))

    @rule(at=sides, claim=claiming, take=st.sampled_from([Cancel, Requeue, RemoveTask]))
    def take_back(self, at: int, claim: Claim, take: Callable[[str], Verb]) -> None:
        """What one manager hands out, the other one takes away."""
        self.claim(1 - at, claim)
        for task in self.world.tasks.values():
            if task.status in ASSIGNED:
                self.do((at, take(task.task_id)))
                break

    @rule(at=sides, verb=editing)
    def edit(self, at: int, verb: Verb) -> None:
        self.do((at, verb))

    @rule(at=sides, verb=stopping)
    def stop(self, at: int, verb: Verb) -> None:
        self.do((at, verb))

    @rule(at=sides, verb=joining | setting)
    def set_node(self, at: int, verb: Verb) -> None:
        self.do((at, verb))

    @rule(at=sides, verb=tending)
    def tend(self, at: int, verb: Verb) -> None:
        self.do((at, verb), flushes=True)

    @rule(one=sides, verb=anything, other=sides, another_verb=anything, is_refreshed=st.booleans())
    def two_at_once(
        self, one: int, verb: Verb, other: int, another_verb: Verb, is_refreshed: bool
    ) -> None:
        for at in (one, other):
            if self.side[at].heartbeats:
                self.sync(at)
            if is_refreshed:
                self.refresh(at)
        self.do((one, verb), (other, another_verb))

    @rule(at=sides, id=node_ids, is_flushed=st.booleans())
    def heartbeat(self, at: int, id: str, is_flushed: bool) -> None:
        self.side[at].heartbeats[id] = self.clock()
        [is_known] = self.do((at, Heartbeat(id)))
        if not is_known:
            del self.side[at].heartbeats[id]
        if is_flushed:
            self.sync(at)
            assert id not in self.world.nodes or self.known["node", id][0] != NodeStatus.OFFLINE

    @rule(at=sides, id=node_ids, seconds=st.sampled_from([0, 1]))
    def overtake_a_heartbeat(self, at: int, id: str, seconds: int) -> None:
        """The node is set OFFLINE while its heartbeat waits, which is batch only at that moment."""
        self.heartbeat(at, id, is_flushed=False)
        self.clock.advance(seconds=seconds)
        self.do((1 - at, SetNodeStatus(id, NodeStatus.OFFLINE)))
        self.sync(at)

    @rule(at=sides, id=node_ids, is_started=st.booleans(), seconds=st.sampled_from([100, 101]))
    def miss_a_node(self, at: int, id: str, is_started: bool, seconds: int) -> None:
        """It works for one manager, and the other finds out that it does not any more."""
        self.heartbeat(1 - at, id, is_flushed=True)
        self.claim(1 - at, Claim(id, 1, is_direct=False))
        if is_started:
            self.tell(1 - at, ByOwner("start", 0, is_late=False, is_direct=False))
        self.clock.advance(seconds=seconds)
        self.tend(at, Recover())

    @rule(at=sides)
    def have_work_for_all(self, at: int) -> None:
        for id in NODES:
            if id not in self.world.nodes or self.world.nodes[id].status is not NodeStatus.ONLINE:
                self.do((at, Register(id, 2, ["gpu"])))
        new = [Draft(id, key=KEYS.get(id)) for id in TASKS if id not in self.world.tasks]
        self.do((at, Add(new)))
        for task in self.world.tasks.values():
            if task.status in FINISHED:
                self.do((at, Requeue(task.task_id)))

    @rule(at=sides)
    def take_copies(self, at: int) -> None:
        state = self.run(self.side[at].manager.get_state())
        self.world.copies += state.tasks.values()

    @rule(seconds=st.sampled_from([1, 10, 50, 51, 100, 101]), are_alive=st.booleans())
    def time_passes(self, seconds: int, are_alive: bool) -> None:
        """And the nodes send heartbeats, or are silent."""
        self.clock.advance(seconds=seconds)
        for id in NODES if are_alive else []:
            self.heartbeat(0, id, is_flushed=id == NODES[-1])

    @rule(at=sides)
    def refresh(self, at: int) -> None:
        side = self.side[at]
        self.run(side.manager.refresh_from_database())
        side.lags = False
        self.check_all(side)

    @rule(at=sides)
    def reopen(self, at: int) -> None:
        self.sync(at)
        self.run(self.side[at].manager.shutdown())
        self.side[at] = self.open()
        self.check_all(self.side[at])

    def sync(self, at: int) -> None:
        self.do((at, Sync()), flushes=True)

    # What must hold then.

    def do(self, *calls: tuple[int, Verb], flushes: bool = False) -> list[Any]:
        """Have managers do something, all at once; returns what it results in.

        Args:
            flushes: Whether the heartbeats that wait are written first.
        """
        world, sides = self.world, [self.side[at] for at, _ in calls]
        world.begin_step(self.clock())
        is_vague = len(calls) > 1 and any(
            isinstance(verb, OF_SEVERAL_WRITES) or (isinstance(verb, Claim) and self.side[at].lags)
            for at, verb in calls
        )
        is_by_hand = any(isinstance(verb, SetStatus) for _, verb in calls)
        got, rows = self.run(self.perform(calls))
        if len(calls) == 1:
            self.land(sides[0], rows, flushes=flushes)
        if is_vague:
            world.passed_over = self.run(sides[0].manager.db.read(read_passed_over))
        else:
            self.compare_with_model(calls, got, rows)
        self.check_feed(rows.changes, is_by_hand=is_by_hand)
        self.note(calls, got)
        self.check_rows(rows)
        world.tasks, world.nodes = rows.tasks, rows.nodes
        for side in self.side:
            side.lags = side.lags or (bool(rows.changes) and sides != [side])
            assert side.manager.version >= side.version
            side.version = side.manager.version
        if len(calls) == 1:
            self.run(self.check_own_writes(sides[0], rows.changes))
        return got

    async def perform(self, calls: Sequence[tuple[int, Verb]]) -> tuple[list[Any], Rows]:
        work = [verb.call(self.side[at].manager, self.world) for at, verb in calls]
        got = await asyncio.gather(*map(outcome_of, work))
        async with self.side[0].manager.db.session() as session:
            changes, _ = await read_changes(session, self.revision)
            tasks = [one.copy() for one in await read_records(session, Task, ALL_TASKS)]
            nodes = [one.copy() for one in await read_records(session, NodeInfo, ALL_NODES)]
        return got, Rows(
            changes,
            {task.task_id: task for task in tasks},
            {node.node_id: node for node in nodes},
        )

    def land(self, side: Side, rows: Rows, *, flushes: bool) -> None:
        """See which heartbeats were written before what came behind them."""
        world = self.world
        for id, at in list(side.heartbeats.items()):
            node, row = world.nodes.get(id), rows.nodes.get(id)
            if flushes:
                del side.heartbeats[id]
            if node is None or at < last_sign(node):
                continue
            if flushes or (row is not None and row.last_heartbeat == at):
                node = world.nodes[id] = replace(node, last_heartbeat=at)
            if any((one.item_id, one.reason) == (id, "heartbeat") for one in rows.changes):
                assert node.status is NodeStatus.OFFLINE
                assert at >= world.status_since[id]
                online = {"status": NodeStatus.ONLINE, "status_reason": None}
                world.put_node(node, "heartbeat", **online, last_heartbeat=at)

    def compare_with_model(
        self, calls: Sequence[tuple[int, Verb]], got: Sequence[Any], rows: Rows
    ) -> None:
        """That all is as if the calls had come one after the other, in one order or another."""
        seen = picture(got, rows.tasks, rows.nodes, [told(change) for change in rows.changes])
        expected = []
        for order in permutations(range(len(calls))):
            world, outcomes = self.world.copy(), list(got)
            for place in order:
                outcomes[place] = calls[place][1].expect(world, got[place])
            expected.append(picture(outcomes, world.tasks, world.nodes, world.changes))
            if seen == expected[-1]:
                self.world.passed_over = world.passed_over
                return
        assert seen == expected[0]

    def check_feed(self, changes: Sequence[Change], *, is_by_hand: bool) -> None:
        """That revisions are consecutive, and each change goes on from where the last one ended."""
        for change in changes:
            self.revision += 1
            assert change.revision == self.revision
            key, before, after = change[2:4], change.from_status, change.to_status
            assert (before, change.previous) == self.known.pop(key, (None, None))
            if after is not None:
                self.known[key] = (after, change.revision)
            if change.item == "node":
                if before != after:
                    self.world.status_since[change.item_id] = change.changed_at
            elif before is None:
                assert after == PENDING
                self.born[change.item_id] = change.revision
            elif after not in (before, None):
                before, after = TaskStatus(before), TaskStatus(after)
                assert after in (LEGAL if is_by_hand else LEGAL_BY_VERBS)[before]

    def check_rows(self, rows: Rows) -> None:
        """That rows are what the feed says, places are counted, and attempts only grow."""
        items: dict[tuple[str, str], Task | NodeInfo] = {
            ("task", id): task for id, task in rows.tasks.items()
        }
        items |= {("node", id): node for id, node in rows.nodes.items()}
        assert {key: (item.status, item.version) for key, item in items.items()} == self.known
        held = Counter(
            task.assigned_node for task in rows.tasks.values() if task.status in ASSIGNED
        )
        for id, node in rows.nodes.items():
            if id not in self.by_hand:
                assert held[id] == node.running_tasks <= node.max_concurrent_tasks
        for id, task in rows.tasks.items():
            life = (id, self.born[id])
            assert task.attempt >= self.attempts[life]
            self.attempts[life] = task.attempt

    def note(self, calls: Sequence[tuple[int, Verb]], got: Sequence[Any]) -> None:
        """Take note of what was written by hand, and of what was handed out, once each."""
        joined = {verb.node_id for _, verb in calls if isinstance(verb, Register)}
        written = [verb for _, verb in calls if isinstance(verb, SetStatus)]
        self.by_hand -= joined
        self.by_hand |= {verb.given(self.world).assigned_node or "" for verb in written}
        for (_, verb), result in zip(calls, got, strict=True):
            if isinstance(verb, Claim) and isinstance(result, list):
                for task in result:
                    attempt = (task.task_id, self.born[task.task_id], task.attempt)
                    assert attempt not in self.handed_out
                    self.handed_out.add(attempt)
                self.world.claimed += result

    async def check_own_writes(self, side: Side, changes: Sequence[Change]) -> None:
        """That a manager sees its own writes at once."""
        world, state = self.world, await side.manager.get_state()
        for change in changes:
            id = change.item_id
            if change.item == "node":
                assert state.nodes.get(id) == self.shown_nodes(side).get(id)
            else:
                task = world.tasks.get(id)
                live = task if task is not None and task.status in LIVE else None
                assert state.tasks.get(id) == live

    def check_all(self, side: Side) -> None:
        """That a manager which has just refreshed shows what the database holds."""
        tasks = self.world.tasks
        self.run(assert_shows(side.manager, tasks, self.shown_nodes(side)))
        assert side.manager.version == self.revision
        counts = Counter(task.status for task in tasks.values())
        assert self.run(side.manager.get_task_stats()) == {
            "total": len(tasks),
            **{status.value: counts[status] for status in TaskStatus},
        }

    def shown_nodes(self, side: Side) -> dict[str, NodeInfo]:
        """The nodes with the heartbeats that a manager shows already."""
        shown = dict(self.world.nodes)
        for id, at in side.heartbeats.items():
            if id in shown:
                shown[id] = replace(shown[id], last_heartbeat=max(at, last_sign(shown[id])))
        return shown


@pytest.mark.parametrize("kind", EACH_KIND)
def test_tasks_live_as_the_model_does(
    kind: str, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    run_machine(Machine, kind, request, tmp_path, 10, steps=80)
