"""Hypothesis machines on a database, and one of two StateManagers against plain dictionaries."""

from __future__ import annotations

import asyncio
import os
from collections import Counter
from collections.abc import Callable, Coroutine, Mapping
from copy import deepcopy
from dataclasses import dataclass, field, replace
from datetime import datetime, timedelta
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, TypeVar

import hypothesis
import pytest
from conftest import FakeClock, new_location
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    Bundle,
    RuleBasedStateMachine,
    consumes,
    initialize,
    invariant,
    multiple,
    rule,
    run_state_machine_as_test,
)

from openclaw_store import (
    Database,
    DuplicateError,
    InvalidTransitionError,
    NodeInfo,
    NodeNotFoundError,
    NodeRepository,
    NodeStatus,
    StaleVersionError,
    StateManager,
    StoreError,
    Task,
    TaskNotFoundError,
    TaskPriority,
    TaskRepository,
    TaskStatus,
    TaskType,
    UnsavedConflictError,
)
from openclaw_store.state_manager import heartbeat_writer
from support.examples import in_profile

Result = TypeVar("Result")

TASKS = [f"task-{number}" for number in range(4)]
NODES = TASKS[:3]  # what is told of the one must not meet the other
LIVE = {TaskStatus.PENDING, TaskStatus.SCHEDULED, TaskStatus.RUNNING}
WAITING = {TaskStatus.PENDING, TaskStatus.SCHEDULED}
ALIVE = {NodeStatus.ONLINE, NodeStatus.BUSY}
SILENT_SECONDS = 100.0


@dataclass
class Copy:
    """An object that a caller was given once, and may write back whenever it likes."""

    item: Any
    generation: int
    """Of the manager that gave it its version, which means nothing elsewhere while negative."""


@dataclass
class Held:
    """What is only in memory: an entry, and what it may be written over (`None`: nothing)."""

    item: Task
    base: Task | None


@dataclass
class Heartbeat:
    """A heartbeat that waits to be written."""

    at: Any
    usage: dict[str, Any]


@dataclass
class Side:
    """One manager, and what it has seen."""

    manager: StateManager
    generation: int
    tasks: dict[str, Task] = field(default_factory=dict)
    nodes: dict[str, NodeInfo] = field(default_factory=dict)
    counts: Counter[TaskStatus] = field(default_factory=Counter)
    unsaved: dict[str, Held] = field(default_factory=dict)
    settled: dict[str, tuple[int, int]] = field(default_factory=dict)
    """The version in memory of what was unsaved last, and the one it was written with."""
    heartbeats: dict[str, Heartbeat] = field(default_factory=dict)
    version: int = 0
    complete: int = 0
    """The revision up to which memory knows all."""
    lags: bool = False
    """Whether the other one has changed something since the last refresh."""


class DatabaseMachine(RuleBasedStateMachine):
    """Has an empty database, a clock and an event loop."""

    new_location: ClassVar[partial[Any]]
    machines: ClassVar[int]
    """How many there were."""
    steps: ClassVar[int]
    """How many they took together."""

    def __init__(self) -> None:
        super().__init__()
        type(self).machines += 1
        self.runner = asyncio.Runner()
        self.place = type(self).new_location()
        self.location = self.place.__enter__()
        self.clock = FakeClock()

    def run(self, work: Coroutine[Any, Any, Result]) -> Result:
        return self.runner.run(work)

    @invariant()
    def count_step(self) -> None:
        type(self).steps += 1

    def teardown(self) -> None:
        self.runner.close()
        self.place.__exit__(None, None, None)


def run_machine(
    machine: type[DatabaseMachine],
    kind: str,
    request: pytest.FixtureRequest,
    folder: Path,
    examples: int,
    steps: int = 40,
) -> None:
    """Let a machine run on a database of a kind.

    The campaign `model` sets two variables of the environment, and learns from the properties of
    the test how many machines there were, and how many steps they took.

    Args:
        examples: The number of them with Hypothesis' profile `full`, unless the variable
            `OPENCLAW_STORE_TEST_EXAMPLES` asks for another one. They are the same for the same
            `OPENCLAW_STORE_TEST_SEED`.
        steps: Of each example.
    """
    machine.new_location = partial(new_location, request, kind, folder, migrated=True)
    machine.machines = machine.steps = 0
    examples = int(os.environ.get("OPENCLAW_STORE_TEST_EXAMPLES", in_profile(examples)))
    seed = os.environ.get("OPENCLAW_STORE_TEST_SEED")
    limits = settings(
        stateful_step_count=steps,
        deadline=None,
        database=None,
        suppress_health_check=list(HealthCheck),
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            heartbeat_writer, "HEARTBEAT_SECONDS", 3600
        )  # flushed only where the rules say so
        try:
            for done in range(0, examples, 10):  # of a longer run, most are variations of others
                if seed is not None:
                    hypothesis.seed(f"{seed} {done}")(machine)
                few = settings(limits, max_examples=min(10, examples - done))
                run_state_machine_as_test(machine, settings=few)
        finally:
            request.node.user_properties += [
                ("machines", machine.machines),
                ("steps", machine.steps),
            ]


class Machine(DatabaseMachine):
    """What two managers must do, said with dictionaries.

    `tasks` and `nodes` are the database. A `Side` is what a manager knows of it: its own writes at
    once, those of the other one after a refresh.
    """

    copies = Bundle("copies")
    sides = st.sampled_from([0, 1])
    task_ids = st.sampled_from(TASKS)
    node_ids = st.sampled_from(NODES)
    contents = st.fixed_dictionaries(
        {
            "status": st.sampled_from(TaskStatus),
            "priority": st.sampled_from(TaskPriority),
            "retry_count": st.integers(0, 3),
            "parameters": st.sampled_from([{}, {"a": 1}, {"a": {"b": [1, 2]}}]),
            "result": st.sampled_from([None, 0, "", False, [], {"x": [None]}]),
        }
    )
    node_contents = st.fixed_dictionaries(
        {
            "status": st.sampled_from(NodeStatus),
            "running_tasks": st.integers(0, 3),
            "max_concurrent_tasks": st.integers(0, 3),
            "available_skills": st.sampled_from([[], ["java"], ["javascript"]]),
        }
    )

    def __init__(self) -> None:
        super().__init__()
        self.revision = 0
        self.tasks: dict[str, Task] = {}
        self.nodes: dict[str, NodeInfo] = {}
        self.status_since: dict[str, datetime] = {}
        self.generations = 0
        self.side: list[Side] = []

    def refused(self, work: Coroutine[Any, Any, Any], error: type[StoreError]) -> Any:
        with pytest.raises(error) as caught:
            self.run(work)
        assert type(caught.value) is error
        return caught.value

    def open(self) -> Side:
        manager = StateManager(Database(self.location, clock=self.clock), auto_sync_interval=None)
        self.run(manager.initialize())
        self.generations += 1
        side = Side(manager, self.generations)
        self.catch_up(side)
        return side

    @initialize()
    def begin(self) -> None:
        self.side = [self.open(), self.open()]

    def teardown(self) -> None:
        for side in self.side:
            self.end(side)
        super().teardown()

    # The dictionaries.

    def number(self, side: Side) -> int:
        self.revision += 1
        side.version = self.revision
        if not side.lags:
            side.complete = self.revision
        for other in self.side:
            other.lags = other.lags or other is not side
        return self.revision

    def catch_up(self, side: Side) -> None:
        """The manager takes over all there is."""
        side.tasks = dict(self.tasks)
        side.nodes = {
            id: with_beat(node, side.heartbeats.get(id)) for id, node in self.nodes.items()
        }
        side.lags = False
        side.complete = self.revision
        side.counts = Counter(task.status for task in self.tasks.values())
        side.version = max(side.version, self.revision)

    def store_task(self, side: Side, task: Task) -> Task:
        before = self.tasks.get(task.task_id)
        if before is not None:
            side.counts[before.status] -= 1
        side.counts[task.status] += 1
        stored = replace(deepcopy(task), version=self.number(side), updated_at=self.clock())
        self.tasks[task.task_id] = side.tasks[task.task_id] = stored
        return stored

    def store_node(self, side: Side, node: NodeInfo) -> NodeInfo:
        stored = replace(deepcopy(node), version=self.number(side))
        before = self.nodes.get(node.node_id)
        if before is None or before.status is not node.status:
            self.status_since[node.node_id] = self.clock()
        self.nodes[node.node_id] = side.nodes[node.node_id] = stored
        return stored

    def find(self, side: Side, id: str) -> Task | None:
        """A task as the manager finds it: in memory, else in the database."""
        if id in side.unsaved:
            return side.unsaved[id].item
        if id not in side.tasks and id in self.tasks:
            if self.tasks[id].version > side.complete:
                self.catch_up(side)  # else memory could go back
            elif self.tasks[id].status not in LIVE:
                side.tasks[id] = self.tasks[id]  # finished ones are remembered
        return side.tasks.get(id) or self.tasks.get(id)

    def flush_entry(self, side: Side, id: str) -> type[StoreError] | None:
        """Write what is only in memory; what is wrong if it lost."""
        held = side.unsaved.pop(id, None)
        if held is None:
            return None
        stored = self.tasks.get(id)
        wrong: type[StoreError] | None = None
        if held.base is None:
            wrong = None if stored is None else DuplicateError
        elif stored is None:
            wrong = TaskNotFoundError
        elif stored.version != held.base.version:
            wrong = StaleVersionError
        if wrong is not None:
            if stored is None or content_of(stored) != content_of(held.item):
                return wrong
            # The other one wrote the very same: nobody can tell, and nothing is lost.
            side.tasks[id] = stored
            side.settled[id] = (held.item.version, stored.version)
            return None
        stored = self.store_task(side, held.item)
        side.settled[id] = (held.item.version, stored.version)
        return None

    def version_of(self, side: Side, copy: Copy) -> int | None:
        """The version that a manager takes a copy's for; `None` for none that there could be."""
        version: int = copy.item.version
        if version >= 0:
            return version
        if copy.generation != side.generation:
            return None
        local, settled = side.settled.get(copy.item.task_id, (0, 0))
        return settled if version == local else version

    def beat_first(self, side: Side, id: str) -> None:
        """A heartbeat that waits is written before anything else happens to its node."""
        beat = side.heartbeats.get(id)
        node = self.nodes.get(id)
        if beat is None or node is None:
            return
        if node.last_heartbeat is None or beat.at >= node.last_heartbeat:
            node = replace(node, last_heartbeat=beat.at, **beat.usage)
            self.nodes[id] = node  # what the other one changed in it, the manager reads later
            if node.status is NodeStatus.OFFLINE and beat.at >= self.status_since[id]:
                self.store_node(side, replace(node, status=NodeStatus.ONLINE, status_reason=None))

    def flush(self, side: Side) -> None:
        for id in list(side.heartbeats):
            self.beat_first(side, id)
        side.heartbeats.clear()

    # Tasks.

    @rule(target=copies, at=sides, id=task_ids, content=contents, persist=st.booleans())
    def add_task(self, at: int, id: str, content: dict[str, Any], persist: bool) -> Any:
        side = self.side[at]
        task = Task(id, TaskType.BATCH, "a task", submitted_at=self.clock(), **deepcopy(content))
        call = side.manager.add_task(task, persist=persist)
        if persist and id not in side.unsaved:
            is_known = id in self.tasks
        else:
            is_known = self.find(side, id) is not None
        if is_known:
            self.refused(call, DuplicateError)
            assert task.version == 0
            return multiple()
        assert self.run(call) is True
        if persist:
            assert task == self.store_task(side, task)
        else:
            assert task.version < 0
            side.unsaved[id] = Held(deepcopy(task), None)
        return Copy(task, side.generation)

    @rule(target=copies, at=sides, id=task_ids)
    def take_a_copy(self, at: int, id: str) -> Any:
        side = self.side[at]
        task = self.run(side.manager.get_task(id))
        assert task == self.find(side, id)
        return multiple() if task is None else Copy(task, side.generation)

    @rule(at=sides, copy=copies, content=contents, persist=st.booleans())
    def update_task(self, at: int, copy: Copy, content: dict[str, Any], persist: bool) -> None:
        """Of whatever age the copy is, and whichever manager it came from."""
        side, task = self.side[at], copy.item
        for name, value in deepcopy(content).items():
            setattr(task, name, value)
        id, before = task.task_id, deepcopy(task)
        call = side.manager.update_task(task, persist=persist)
        version = self.version_of(side, copy)
        wrong: type[StoreError] | None = None
        if persist and id in side.unsaved:
            if side.unsaved[id].item.version != version:
                wrong = StaleVersionError
            else:
                wrong = self.flush_entry(side, id)
                version = self.version_of(side, copy)
        if wrong is None:
            known = self.tasks.get(id) if persist else self.find(side, id)
            if known is None:
                wrong = TaskNotFoundError
            elif known.version != version:
                wrong = StaleVersionError
            elif known.status not in {*LIVE, task.status}:
                wrong = InvalidTransitionError
        if wrong is not None:
            self.refused(call, wrong)
            assert task == before
            return
        assert self.run(call) is True
        if persist:
            assert task == self.store_task(side, task)
        else:
            assert known is not None
            assert task.version < 0
            held = side.unsaved.get(id)
            side.tasks.setdefault(id, known) if held is None else None
            side.unsaved[id] = Held(deepcopy(task), known if held is None else held.base)
        copy.generation = side.generation

    @rule(at=sides, id=task_ids)
    def change_task(self, at: int, id: str) -> None:
        side = self.side[at]

        def once_more(task: Task) -> None:
            task.retry_count += 1

        call = side.manager.change_task(id, once_more)
        wrong = self.flush_entry(side, id)
        if wrong is not None:
            self.refused(call, wrong)
            return
        known = self.find(side, id)
        stored = self.run(call)
        if known is None or id not in self.tasks:
            assert stored is None
            return
        if known.version != self.tasks[id].version:
            self.catch_up(side)  # the other one was faster
        task = self.tasks[id]
        assert stored == self.store_task(side, replace(task, retry_count=task.retry_count + 1))

    @rule(at=sides, id=task_ids)
    def remove_task(self, at: int, id: str) -> None:
        side = self.side[at]
        was_unsaved, removed = side.unsaved.pop(id, None), self.tasks.pop(id, None)
        if removed is not None:
            side.counts[removed.status] -= 1
            side.tasks.pop(id, None)
            self.number(side)

        known = self.run(side.manager.remove_task(id))

        assert known is (removed is not None or was_unsaved is not None)

    @rule(copy=consumes(copies))
    def forget_a_copy(self, copy: Copy) -> None:
        """So that the younger ones are used more often."""

    # Nodes.

    @rule(at=sides, id=node_ids, content=node_contents)
    def add_node(self, at: int, id: str, content: dict[str, Any]) -> None:
        side = self.side[at]
        node = NodeInfo(id, "host", registered_at=self.clock(), **deepcopy(content))
        call = side.manager.add_node(node)
        if id in self.nodes:
            self.refused(call, DuplicateError)
            return
        assert self.run(call) is True
        assert node == self.store_node(side, node)
        # A heartbeat may wait for the node that the other one has removed.
        side.nodes[id] = with_beat(side.nodes[id], side.heartbeats.get(id))

    @rule(at=sides, id=node_ids, content=node_contents, refreshed=st.booleans())
    def update_node(self, at: int, id: str, content: dict[str, Any], refreshed: bool) -> None:
        """With the copy that the manager has, which may be outdated by the other one."""
        side = self.side[at]
        if refreshed:
            self.refresh(at)
        node = self.run(side.manager.get_node(id))
        if node is None:
            assert id not in self.nodes
            return
        if id not in side.nodes and self.nodes[id].version > side.complete:
            self.catch_up(side)  # else memory could go back
        in_memory = side.nodes.get(id)
        for name, value in deepcopy(content).items():
            setattr(node, name, value)
        names = [
            name
            for name, value in vars(node).items()
            if in_memory is None or getattr(in_memory, name) != value
        ]
        version = node.version
        self.beat_first(side, id)
        side.heartbeats.pop(id, None)
        call = side.manager.update_node(node)
        stored = self.nodes.get(id)
        if stored is None:
            self.refused(call, NodeNotFoundError)
        elif stored.version != version:
            self.refused(call, StaleVersionError)
        else:
            assert self.run(call) is True
            changes = {name: getattr(node, name) for name in names}
            changes["last_heartbeat"] = stored.last_heartbeat
            self.store_node(side, replace(stored, **changes))
            assert node.version == self.revision

    @rule(at=sides, id=node_ids, status=st.sampled_from(NodeStatus))
    def update_node_status(self, at: int, id: str, status: NodeStatus) -> None:
        side = self.side[at]
        self.beat_first(side, id)
        side.heartbeats.pop(id, None)

        known = self.run(side.manager.update_node_status(id, status))

        assert known is (id in self.nodes)
        if known:
            node = replace(self.nodes[id], status=status, status_reason=None)
            if status in ALIVE:
                last = node.last_heartbeat
                node.last_heartbeat = self.clock() if last is None else max(last, self.clock())
            self.store_node(side, node)

    @rule(
        at=sides,
        id=node_ids,
        usage=st.fixed_dictionaries(
            {},
            optional={
                "cpu_usage": st.sampled_from([0.0, 50.0]),
                "running_tasks": st.integers(0, 3),
            },
        ),
    )
    def heartbeat(self, at: int, id: str, usage: dict[str, Any]) -> None:
        side = self.side[at]
        if id not in side.nodes:
            self.catch_up(side)

        known = self.run(side.manager.update_heartbeat(id, **usage))

        if id not in side.nodes:
            assert known is False
            return
        assert known is True
        node, waiting = side.nodes[id], side.heartbeats.get(id)
        beat = Heartbeat(self.clock(), {**({} if waiting is None else waiting.usage), **usage})
        side.heartbeats[id] = beat
        side.nodes[id] = with_beat(node, beat)
        if node.status is NodeStatus.OFFLINE:
            self.beat_first(side, id)
            del side.heartbeats[id]

    @rule(at=sides, id=node_ids)
    def remove_node(self, at: int, id: str) -> None:
        side = self.side[at]
        self.beat_first(side, id)
        side.heartbeats.pop(id, None)

        known = self.run(side.manager.remove_node(id))

        assert known is (id in self.nodes)
        if known:
            del self.nodes[id]
            side.nodes.pop(id, None)
            self.number(side)

    @rule(at=sides)
    def check_stale_nodes(self, at: int) -> None:
        side = self.side[at]
        self.flush(side)
        cutoff = self.clock() - timedelta(seconds=SILENT_SECONDS)
        silent = {
            id
            for id, node in self.nodes.items()
            if node.status in ALIVE and (node.last_heartbeat or node.registered_at) < cutoff  # type: ignore[operator]  # every node was registered
        }

        found = self.run(side.manager.check_stale_nodes(SILENT_SECONDS))

        assert set(found) == silent
        for id in found:  # in the order in which they were set OFFLINE
            reason = f"silent for more than {SILENT_SECONDS:g} s"
            node = replace(self.nodes[id], status=NodeStatus.OFFLINE, status_reason=reason)
            self.store_node(side, node)

    # Time, and the other one.

    @rule(seconds=st.sampled_from([1, 60, 120]))
    def time_passes(self, seconds: int) -> None:
        self.clock.advance(seconds=seconds)

    @rule(at=sides)
    def refresh(self, at: int) -> None:
        side = self.side[at]
        self.run(side.manager.refresh_from_database())
        self.catch_up(side)
        self.run(self.compare_database(side.manager))

    @rule(at=sides)
    def sync(self, at: int) -> None:
        side = self.side[at]
        self.sync_by(side, side.manager.sync_to_database)

    def sync_by(self, side: Side, call: Callable[[], Coroutine[Any, Any, Any]]) -> None:
        wrong = [
            error for id in list(side.unsaved) if (error := self.flush_entry(side, id)) is not None
        ]
        self.flush(side)
        if wrong:
            error = self.refused(call(), UnsavedConflictError)
            assert [type(conflict) for conflict in error.conflicts] == wrong
        else:
            self.run(call())

    def end(self, side: Side) -> None:
        self.sync_by(side, side.manager.shutdown)

    @rule(at=sides)
    def reopen(self, at: int) -> None:
        self.end(self.side[at])
        self.side[at] = self.open()

    # What holds after each step.

    @invariant()
    def managers_answer_as_the_dictionaries_do(self) -> None:
        for side in self.side:
            self.run(self.compare(side))

    async def compare(self, side: Side) -> None:
        manager = side.manager
        shown = {**side.tasks, **{id: held.item for id, held in side.unsaved.items()}}
        await assert_shows(manager, shown, side.nodes)
        state = await manager.get_state()
        assert state.version == manager.version == side.version
        stats = await manager.get_task_stats()
        assert (state.total_tasks, state.running_tasks) == (stats["total"], stats["running"])
        if side.lags:  # what it counts from may be outdated, but never absurd
            assert min(stats.values()) >= 0
        else:
            assert stats == {
                "total": side.counts.total(),
                **{status.value: side.counts[status] for status in TaskStatus},
            }

    async def compare_database(self, manager: StateManager) -> None:
        async with manager.db.session() as session:
            for id in TASKS:
                assert await TaskRepository(session).get(id) == self.tasks.get(id)
            nodes = {node.node_id: node for node in await NodeRepository(session).get_all_nodes()}
        assert nodes == self.nodes


async def assert_shows(
    manager: StateManager, tasks: Mapping[str, Task], nodes: Mapping[str, NodeInfo]
) -> None:
    """That a manager answers as these dictionaries do."""
    state = await manager.get_state()
    live = {id: task for id, task in tasks.items() if task.status in LIVE}
    assert dict(state.tasks) == live
    assert await manager.get_pending_tasks(None) == sorted(
        (task for task in live.values() if task.status in WAITING),
        key=lambda task: (task.priority, task.submitted_at, task.task_id),
    )
    for id, task in tasks.items():  # the others are looked for by `take_a_copy`
        assert await manager.get_task(id) == task

    online = {id: node for id, node in nodes.items() if node.status is NodeStatus.ONLINE}
    free = {
        id: node for id, node in online.items() if node.running_tasks < node.max_concurrent_tasks
    }
    assert dict(state.nodes) == nodes
    assert (state.total_nodes, state.online_nodes) == (len(nodes), len(online))
    assert ids(await manager.get_all_nodes()) == newest(nodes)
    assert ids(await manager.get_online_nodes()) == newest(online)
    assert ids(await manager.find_nodes_by_skill("java")) == newest(
        {id: node for id, node in online.items() if "java" in node.available_skills}
    )
    assert ids(await manager.get_available_nodes()) == sorted(
        free,
        key=lambda node_id: (
            free[node_id].running_tasks / free[node_id].max_concurrent_tasks,
            free[node_id].running_tasks,
            node_id,
        ),
    )
    assert await manager.get_node_stats() == {
        "total": len(nodes),
        "online": len(online),
        "offline": sum(node.status is NodeStatus.OFFLINE for node in nodes.values()),
        "busy": sum(node.status is NodeStatus.BUSY for node in nodes.values())
        + len(online)
        - len(free),
    }


def content_of(task: Task) -> str:
    """A task without what the store sets; as text, in which 0 is not False."""
    return repr(replace(task, version=0, updated_at=None))


def with_beat(node: NodeInfo, beat: Heartbeat | None) -> NodeInfo:
    """A node as the database has it, with the heartbeat that waits to be written."""
    if beat is None or (node.last_heartbeat is not None and node.last_heartbeat > beat.at):
        return node
    return replace(node, last_heartbeat=beat.at, **beat.usage)


def ids(nodes: list[NodeInfo]) -> list[str]:
    return [node.node_id for node in nodes]


def newest(nodes: Mapping[str, NodeInfo]) -> list[str]:
    """Identifiers of nodes, newest registered first."""
    ordered = sorted(nodes)
    return sorted(ordered, key=lambda node_id: nodes[node_id].registered_at, reverse=True)  # type: ignore[arg-type, return-value]  # every node was registered
