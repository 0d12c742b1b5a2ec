"""Batches on PostgreSQL: one call of the server writes them, or nothing of them."""

from __future__ import annotations

import asyncio
import random
from collections import defaultdict
from collections.abc import Awaitable, Callable
from contextlib import AsyncExitStack
from itertools import product
from typing import Any

import pytest
from conftest import (
    PATIENCE,
    FakeClock,
    Location,
    MakeNode,
    MakeTask,
    OpenManager,
    engine_of,
    execute,
    feed,
)
from support.for_each import for_each

from openclaw_store import (
    Change,
    Database,
    NodeRepository,
    NodeStatus,
    StateManager,
    Task,
    TaskPriority,
    TaskRepository,
    TaskStatus,
    TaskType,
)
from openclaw_store.backends.postgresql.write_session import WRITER_SETTINGS
from openclaw_store.errors import (
    ConflictError,
    DuplicateError,
    NodeNotFoundError,
    NotOwnerError,
    StaleVersionError,
    TaskNotFoundError,
    UnavailableError,
)

pytestmark = pytest.mark.postgresql


def kinds(sent: list[str]) -> list[str]:
    """The first words of statements, and `call` for the call of the function."""
    return ["call" if "store_write" in sql else sql.split()[0] for sql in sent]


def assert_in_order(location: Location) -> None:
    """Revisions have no gap, and each change refers to the one before of the same row."""
    last: dict[tuple[str, str], int | None] = defaultdict(lambda: None)
    log = "SELECT revision, item, item_id, kind, previous FROM changes ORDER BY 1"
    for expected, (revision, item, id, kind, previous) in enumerate(execute(location, log), 1):
        assert revision == expected
        assert previous == (None if kind == "created" else last[item, id]), (revision, id, kind)
        last[item, id] = None if kind == "removed" else revision
    versions = {("task", id): version for id, version in execute(location, TASK_VERSIONS)}
    versions |= {("node", id): version for id, version in execute(location, NODE_VERSIONS)}
    assert versions == {key: version for key, version in last.items() if version is not None}


TASK_VERSIONS = "SELECT task_id, version FROM tasks"
NODE_VERSIONS = "SELECT node_id, version FROM nodes"


async def test_batch_is_one_statement(
    manager: StateManager,
    location: Location,
    make_task: MakeTask,
    make_node: MakeNode,
    sent: list[str],
) -> None:
    await manager.register_node(make_node(node_id="n"))
    for _ in range(2):
        await manager.add_task(make_task())
    [running] = await manager.claim_tasks("n")
    changed, added = make_task(), make_task()
    await manager.add_task(changed)
    changed.error = "changed"
    before = (await manager.db.get_stats())["writer"]["batches"]
    sent.clear()

    _, _, [claimed], completed = await asyncio.gather(
        manager.add_task(added),
        manager.update_task(changed),
        manager.claim_tasks("n"),
        manager.complete_task(running, {"of": "it"}),
    )

    assert kinds(sent) == ["call"]
    assert (await manager.db.get_stats())["writer"]["batches"] == before + 1
    assert completed.status is TaskStatus.COMPLETED
    assert claimed.assigned_node == "n"
    for task in (added, changed, claimed, completed):
        assert await manager.task_repo.get(task.task_id) == task
    node = await manager.node_repo.get("n")
    assert node is not None
    assert (node.running_tasks, node.total_tasks_processed) == (1, 1)
    assert node.version == 11
    assert_in_order(location)


async def test_each_command_alone_is_one_statement(
    manager: StateManager, make_task: MakeTask, make_node: MakeNode, sent: list[str]
) -> None:
    await manager.register_node(make_node(node_id="n"))
    sent.clear()

    task = make_task(idempotency_key="key")
    await manager.add_task(task)
    task.description = "noted"
    await manager.update_task(task)
    [task] = await manager.claim_tasks("n")
    task = await manager.start_task(task)
    task = await manager.fail_task(task, "no")
    await manager.cancel_task(task.task_id)
    await manager.requeue_task(task.task_id)

    assert kinds(sent) == ["call"] * 7


async def test_task_that_is_not_known_is_read_first(
    database: Database, make_task: MakeTask, sent: list[str]
) -> None:
    tasks, added = TaskRepository(database), [make_task() for _ in range(3)]
    await asyncio.gather(*map(tasks.create, added))
    sent.clear()

    await asyncio.gather(*(tasks.cancel(task.task_id) for task in added))

    assert kinds(sent) == ["SELECT", "call"]


async def test_listeners_get_the_changes_as_they_are_logged(
    manager: StateManager, other: Database, make_task: MakeTask, make_node: MakeNode
) -> None:
    """Planted: the changes before in the same batch keep the revisions that were assumed."""
    await manager.register_node(make_node(node_id="n"))
    tasks = [make_task() for _ in range(3)]
    for task in tasks:
        await manager.add_task(task)
    claimed = await manager.claim_tasks("n", 2)
    told: list[Change] = []
    unlisten = manager.db.listen(lambda events: told.extend(event.change for event in events))
    for _ in range(4):
        await TaskRepository(other).create(make_task())

    await asyncio.gather(
        *(manager.start_task(task) for task in claimed),
        *(manager.complete_task(task) for task in claimed),
        manager.cancel_task(tasks[2].task_id),
        manager.requeue_task(tasks[2].task_id),
        manager.claim_tasks("n", 1),
    )
    unlisten()

    logged = [change for change in await feed(manager) if change.revision > 11]
    assert [change.revision for change in told] == list(range(12, 20))
    assert told == logged


async def test_refusal_is_no_call(database: Database, make_task: MakeTask, sent: list[str]) -> None:
    task = make_task()
    await TaskRepository(database).create(task)
    task.version = 7
    sent.clear()

    with pytest.raises(StaleVersionError):
        await TaskRepository(database).update(task)
    assert await TaskRepository(database).cancel("missing") is False

    assert kinds(sent) == ["SELECT"] * 2


async def test_version_may_be_newer_than_the_last_call(
    database: Database, other: Database, location: Location, make_task: MakeTask
) -> None:
    """A process may know a change of another one before it writes itself.

    Planted: revisions are assigned from the last call of this process alone.
    """
    async with StateManager(other, None) as reader:
        tasks = [make_task() for _ in range(5)]
        for task in tasks:
            await TaskRepository(database).create(task)
        await reader.refresh_from_database()

        assert await reader.cancel_task(tasks[4].task_id)
        await asyncio.gather(
            reader.cancel_task(tasks[1].task_id), reader.cancel_task(tasks[3].task_id)
        )
        for task in tasks[:3]:
            task.error = "changed"
            if task.task_id == tasks[1].task_id:
                continue
            await TaskRepository(database).update(task)
        await reader.refresh_from_database()
        await reader.cancel_task(tasks[0].task_id)

        state = await reader.get_state()
        assert set(state.tasks) == {tasks[2].task_id}
    assert_in_order(location)


Act = Callable[["Case"], Awaitable[Any]]


class Case:
    """A task that the manager knows, and a claimed one; then a rival of it writes."""

    def __init__(self, manager: StateManager, rival: Database, task: Task, claimed: Task) -> None:
        self.manager = manager
        self.tasks, self.nodes = TaskRepository(rival), NodeRepository(rival)
        self.task, self.claimed = task, claimed

    async def rewrite(self) -> None:
        task = await self.tasks.get(self.task.task_id)
        assert task is not None
        task.error = "of the rival"
        await self.tasks.update(task)

    async def update(self) -> bool:
        self.task.error = "of the manager"
        return await self.manager.update_task(self.task)

    async def complete(self) -> Task:
        return await self.manager.complete_task(self.claimed)

    async def steal(self) -> Task:
        """Requeue and claim again: the node is the same, the attempt another."""
        await self.tasks.requeue(self.claimed.task_id)
        [task] = await self.tasks.claim("n", 1)
        return task


def a_task(id: str, key: str | None = None) -> Task:
    return Task(id, TaskType.BATCH, "a task", idempotency_key=key)


CONFLICTS: dict[str, tuple[Act, Act, type[Exception] | None]] = {
    "changed, so stale": (Case.rewrite, Case.update, StaleVersionError),
    "changed, but cancelled all the same": (
        Case.rewrite,
        lambda case: case.manager.cancel_task(case.task.task_id),
        None,
    ),
    "removed, so missing": (
        lambda case: case.tasks.delete(case.task.task_id), Case.update, TaskNotFoundError,
    ),
    "finished, so lost": (
        lambda case: case.tasks.complete(case.claimed), Case.complete, None,
    ),
    "cancelled, so not owned": (
        lambda case: case.tasks.cancel(case.claimed.task_id), Case.complete, NotOwnerError,
    ),
    "claimed again, so not owned": (Case.steal, Case.complete, NotOwnerError),
    "identifier taken": (
        lambda case: case.tasks.create(a_task("new")),
        lambda case: case.manager.add_task(a_task("new")),
        DuplicateError,
    ),
    "key taken": (
        lambda case: case.tasks.create(a_task("rival", "key")),
        lambda case: case.manager.add_task(a_task("new", "key")),
        DuplicateError,
    ),
    "node removed, so none claims": (
        lambda case: case.nodes.delete("n"),
        lambda case: case.manager.claim_tasks("n"),
        NodeNotFoundError,
    ),
}  # fmt: skip


@pytest.mark.parametrize(("rival", "act", "error"), CONFLICTS.values(), ids=CONFLICTS)
async def test_conflict_is_decided_again_with_the_lock(
    manager: StateManager,
    other: Database,
    location: Location,
    make_task: MakeTask,
    make_node: MakeNode,
    sent: list[str],
    rival: Act,
    act: Act,
    error: type[Exception] | None,
) -> None:
    """Its batch takes effect once, and nothing of it by the call that found the conflict.

    Planted: the function checks no versions, no keys, or new rows only; it writes first.
    """
    await manager.register_node(make_node(node_id="n"))
    await manager.add_task(make_task(priority=TaskPriority.CRITICAL))
    [claimed] = await manager.claim_tasks("n")
    task, bystander = make_task(), make_task()
    await manager.add_task(task)
    case = Case(manager, other, task, claimed)
    await rival(case)
    [[before]] = execute(location, "SELECT max(revision) FROM changes")
    stats = (await manager.db.get_stats())["writer"]
    sent.clear()

    added, outcome = await asyncio.gather(
        manager.add_task(bystander), act(case), return_exceptions=True
    )

    assert added is True
    assert type(outcome) is error if error else not isinstance(outcome, BaseException)
    assert kinds(sent)[:2] == ["call", "BEGIN"]
    assert await manager.task_repo.get(bystander.task_id) == bystander
    assert bystander.version == before + 1
    assert_in_order(location)
    after = (await manager.db.get_stats())["writer"]
    assert after["batches"] == stats["batches"] + 1
    assert after["operations"] == stats["operations"] + 2
    assert after["failed_batches"] == 0


async def test_node_that_was_removed_keeps_no_task_from_ending(
    manager: StateManager,
    other: Database,
    location: Location,
    make_task: MakeTask,
    make_node: MakeNode,
    sent: list[str],
) -> None:
    await manager.register_node(make_node(node_id="n"))
    await manager.add_task(make_task())
    [claimed] = await manager.claim_tasks("n")
    await NodeRepository(other).delete("n")
    sent.clear()

    completed = await manager.complete_task(claimed)

    assert completed.status is TaskStatus.COMPLETED
    assert kinds(sent) == ["call"]
    assert_in_order(location)


async def test_task_that_ends_in_its_first_batch_may_not_have_a_taken_key(
    database: Database, other: Database, location: Location, make_task: MakeTask
) -> None:
    """Planted: only keys of tasks that are live after the batch are checked."""
    await TaskRepository(other).create(make_task(idempotency_key="key"))
    tasks, task = TaskRepository(database), make_task(idempotency_key="key")

    refused, cancelled = await asyncio.gather(
        tasks.create(task), tasks.cancel(task.task_id), return_exceptions=True
    )

    assert isinstance(refused, DuplicateError)
    assert cancelled is False
    assert_in_order(location)


async def test_key_that_is_freed_in_a_batch_may_be_taken_in_it(
    manager: StateManager, location: Location, make_task: MakeTask
) -> None:
    owner, heir = make_task(idempotency_key="key"), make_task(idempotency_key="key")
    await manager.add_task(owner)

    freed, taken = await asyncio.gather(manager.cancel_task(owner.task_id), manager.add_task(heir))

    assert freed is taken is True
    assert_in_order(location)


async def test_node_with_tasks_in_many_groups_takes_the_best_of_all(
    manager: StateManager, make_task: MakeTask, make_node: MakeNode
) -> None:
    """Planted: a claim searches a fixed number of groups of tasks that require the same skills."""
    skills = [f"skill-{number}" for number in range(80)]
    await manager.register_node(
        make_node(node_id="n", available_skills=skills, max_concurrent_tasks=70)
    )
    tasks = [make_task(required_skills=[skill]) for skill in skills]
    await asyncio.gather(*map(manager.add_task, tasks))

    claimed = await manager.claim_tasks("n", 100)

    assert [task.task_id for task in claimed] == [task.task_id for task in tasks[:70]]


@pytest.mark.parametrize("running", [2**31, 2**63 - 1])
async def test_node_that_reports_an_absurd_number_of_tasks_claims_none(
    manager: StateManager, make_task: MakeTask, make_node: MakeNode, running: int
) -> None:
    await manager.register_node(make_node(node_id="n"))
    await manager.add_task(make_task())
    await manager.update_heartbeat("n", running_tasks=running)
    await manager.sync_to_database()

    added, claimed = await asyncio.gather(
        manager.add_task(make_task()), manager.claim_tasks("n"), return_exceptions=True
    )

    assert (added, claimed) == (True, [])


ODD_SKILLS = [
    "a\\udesign", "\\u0000", "\\\\u0000", 'q"\\', "\x01\x7f", "é😀\u2028", " ", "null", "[]",
    "$1", "%s",
]  # fmt: skip


@for_each("skill", ODD_SKILLS)
async def test_skill_may_be_any_text(
    manager: StateManager, make_task: MakeTask, make_node: MakeNode, skill: str
) -> None:
    """Planted: JSON that looks like an escape of half a character is compared with nothing."""
    has_it, others = (
        make_node(available_skills=["x", skill]),
        make_node(available_skills=["x", skill + "x"]),
    )
    await manager.register_node(has_it)
    await manager.register_node(others)
    task = make_task(required_skills=[skill])
    await manager.add_task(task)

    assert await manager.claim_tasks(others.node_id) == []
    assert [one.task_id for one in await manager.claim_tasks(has_it.node_id)] == [task.task_id]


BY_HAND = [
    r'["\u0000"]', r'["\ud800"]', r'["\udc00\ud800"]', "[1e400000]", "1e400000", "{}", '"x"', "1",
    "[[]]",     '[["x"]]', '["x", 1]', "[null]", "null", "true", '{"x": 1}', "[" * 500 + "]" * 500,
]  # fmt: skip


@for_each(("text", "is_delayed"), [*product(BY_HAND, [False, True])])
async def test_skills_written_by_hand_keep_no_other_task_from_being_claimed(
    manager: StateManager,
    location: Location,
    make_task: MakeTask,
    make_node: MakeNode,
    clock: FakeClock,
    text: str,
    is_delayed: bool,
) -> None:
    """Planted: any JSON is compared with the skills of the node."""
    node, odd_node = [make_node(available_skills=["x"]) for _ in range(2)]
    await manager.register_node(node)
    await manager.register_node(odd_node)
    delay = {"not_before": clock()} if is_delayed else {}
    odd_task, task = [make_task(required_skills=["x"], **delay) for _ in range(2)]
    await manager.add_tasks([odd_task, task])
    for table, column, key, id in (
        ("tasks", "required_skills", "task_id", odd_task.task_id),
        ("nodes", "available_skills", "node_id", odd_node.node_id),
    ):
        execute(location, f"UPDATE {table} SET {column} = '{text}' WHERE {key} = '{id}'")
    clock.advance(seconds=1)

    assert await manager.claim_tasks(odd_node.node_id) == []
    claimed = await manager.claim_tasks(node.node_id, 5)

    assert [one.task_id for one in claimed] == [task.task_id]


async def test_very_long_list_of_skills_does_not_keep_a_task_from_being_claimed(
    manager: StateManager, make_task: MakeTask, make_node: MakeNode
) -> None:
    many = [f"skill-{number}" for number in range(20_000)]
    await manager.register_node(make_node(node_id="n", available_skills=many))
    await manager.add_task(make_task(required_skills=[*many, "other"]))
    task = make_task(required_skills=many[::-1])
    await manager.add_task(task)

    assert [one.task_id for one in await manager.claim_tasks("n", 2)] == [task.task_id]


async def test_task_that_is_locked_by_hand_is_passed_over(
    manager: StateManager, location: Location, make_task: MakeTask, make_node: MakeNode
) -> None:
    """Planted: a claim waits for the row of a task."""
    await manager.register_node(make_node(node_id="n"))
    tasks = [
        make_task(required_skills=["x"] if number % 2 else [], not_before=moment)
        for number, moment in enumerate((None, None, None, None, manager.db.clock()))
    ]
    for task in tasks:
        await manager.add_task(task)
    held = (tasks[0], tasks[4])
    async with engine_of(location).connect() as by_hand:
        ids = ", ".join(f"'{task.task_id}'" for task in held)
        await by_hand.exec_driver_sql(f"SELECT 1 FROM tasks WHERE task_id IN ({ids}) FOR UPDATE")

        claimed = await asyncio.wait_for(manager.claim_tasks("n", 5), PATIENCE)
        assert [task.task_id for task in claimed] == [tasks[2].task_id]
        await by_hand.rollback()

    claimed = await manager.claim_tasks("n", 5)
    assert [task.task_id for task in claimed] == [task.task_id for task in held]


@pytest.mark.parametrize("isolation", ["REPEATABLE READ", "SERIALIZABLE"])
async def test_call_needs_the_rows_of_the_last_commit(
    database: Database,
    location: Location,
    make_task: MakeTask,
    monkeypatch: pytest.MonkeyPatch,
    isolation: str,
) -> None:
    """Planted: it is made under any isolation, and assigns revisions twice."""
    monkeypatch.setitem(WRITER_SETTINGS, "default_transaction_isolation", isolation.lower())

    with pytest.raises(UnavailableError, match="leave default_transaction_isolation at"):
        await TaskRepository(database).create(make_task())

    assert execute(location, "SELECT count(*) FROM tasks") == [(0,)]


async def test_next_revision_does_not_pass_for_the_version_that_a_caller_knows(
    manager: StateManager, open_manager: OpenManager, make_task: MakeTask
) -> None:
    """Planted: the revisions of a batch are guessed from the last one of this process.

    Found by the campaign `history`.
    """
    other = await open_manager()
    await other.add_task(make_task())
    await manager.add_task(make_task())
    await other.add_task(make_task(task_id="t"))  # the revision that `manager` will guess
    outdated = await other.get_task("t")
    assert outdated is not None
    await other.remove_task("t")

    added, updated = await asyncio.gather(
        manager.task_repo.create(make_task(task_id="t")),
        manager.task_repo.update(outdated),
        return_exceptions=True,
    )

    assert added is True
    assert isinstance(updated, StaleVersionError)


WRITERS = 4


async def test_revisions_of_many_writers_have_no_gap(
    database: Database,
    location: Location,
    clock: FakeClock,
    make_task: MakeTask,
    make_node: MakeNode,
) -> None:
    """Planted: revisions begin where this process ended, or are assigned before the lock."""

    async def work(manager: StateManager, number: int) -> None:
        chance, node = random.Random(number), f"node-{number}"
        await manager.register_node(make_node(node_id=node, max_concurrent_tasks=3))
        for _ in range(25):
            tasks = [make_task(max_retries=1) for _ in range(chance.randrange(4))]
            await asyncio.gather(*map(manager.add_task, tasks))
            claimed = await manager.claim_tasks(node, chance.randrange(1, 4))
            await asyncio.gather(*(end(manager, chance, task) for task in claimed))
            if chance.random() < 0.2:
                await manager.update_node_status(node, NodeStatus.ONLINE)
                await manager.update_heartbeat(node)
                await manager.sync_to_database()
            if tasks and chance.random() < 0.3:
                await manager.remove_task(tasks[0].task_id)

    async def end(manager: StateManager, chance: random.Random, task: Task) -> None:
        try:
            task = await manager.start_task(task)
            if chance.random() < 0.7:
                await manager.complete_task(task)
            elif chance.random() < 0.5:
                await manager.fail_task(task, "no")
            else:
                await manager.cancel_task(task.task_id)
        except (ConflictError, TaskNotFoundError):
            pass  # another process has removed it

    async with AsyncExitStack() as stack:
        databases = [Database(location, clock=clock) for _ in range(WRITERS)]
        managers = [await stack.enter_async_context(StateManager(one, 0.02)) for one in databases]
        async with asyncio.TaskGroup() as group:
            for number, manager in enumerate(managers):
                group.create_task(work(manager, number))
        for manager in managers:
            await manager.refresh_from_database()
        states = [await manager.get_state() for manager in managers]

    assert_in_order(location)
    assert len({state.version for state in states}) == 1
    assert all(state.tasks == states[0].tasks for state in states)
    held = dict(execute(location, HELD))
    assert dict(execute(location, "SELECT node_id, running_tasks FROM nodes")) == {
        f"node-{number}": held.get(f"node-{number}", 0) for number in range(WRITERS)
    }


HELD = """SELECT assigned_node, count(*) FROM tasks
    WHERE status IN ('scheduled', 'running') GROUP BY 1"""


async def test_mean_of_attempts_that_end_together(
    manager: StateManager, clock: FakeClock, make_task: MakeTask, make_node: MakeNode
) -> None:
    """Planted: the mean before counts once for all of them."""
    totals = {"total_tasks_processed": 2, "successful_tasks": 2, "average_execution_time": 4.0}
    await manager.add_node(make_node(node_id="n", **totals))
    for _ in range(3):
        await manager.add_task(make_task())
    one, two, three = await manager.claim_tasks("n", 3)
    clock.advance(seconds=10)

    await asyncio.gather(
        manager.complete_task(one), manager.complete_task(two), manager.fail_task(three, "no")
    )

    node = await manager.node_repo.get("n")
    assert node is not None
    assert node.average_execution_time == pytest.approx((2 * 4 + 3 * 10) / 5)
    assert (node.total_tasks_processed, node.successful_tasks, node.failed_tasks) == (5, 4, 1)
