"""Calls for the tasks or nodes that a filter selects, with and without a cache."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Sequence
from dataclasses import replace
from datetime import timedelta
from itertools import pairwise
from typing import Any

import pytest
import sqlalchemy as sa
from conftest import BACKOFF, Cluster, FakeClock, Location, execute, ids
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from sqlalchemy.dialects import postgresql
from support.examples import in_profile
from test_requests import EVERYTHING, MOMENT, VALUES, is_meant, moment

from openclaw_store import (
    Database,
    DuplicateError,
    InvalidDataError,
    InvalidTransitionError,
    NodeFilter,
    NodeInfo,
    NodeStatus,
    StateManager,
    Task,
    TaskFilter,
    TaskPriority,
    TaskStatus,
)
from openclaw_store.database import TaskRow
from openclaw_store.domain.conditions import is_overdue
from openclaw_store.repositories import PART_SIZE
from openclaw_store.repositories.commands import Recover
from openclaw_store.repositories.queries import other_conditions
from openclaw_store.repositories.tasks import ID_BATCH_SIZE
from openclaw_store.state_manager import filter_calls, task_calls
from openclaw_store.state_manager import scheduler as scheduler
from openclaw_store.state_manager.cache import Cache
from openclaw_store.state_manager.scheduler import TASK_SLICE_SIZE
from openclaw_store.testing import NodeFactory, TaskFactory


@pytest.fixture
async def both(cluster: Cluster, location: Location) -> AsyncIterator[Sequence[StateManager]]:
    """A manager with a cache, and one without."""
    database = Database(location, clock=cluster.clock)
    async with StateManager(database, backoff=BACKOFF, cache=False) as direct:
        yield cluster.one, direct


def some(values: Sequence[Any]) -> st.SearchStrategy[Any]:
    """No condition, one value, or alternatives."""
    return st.none() | st.sampled_from(values) | st.lists(st.sampled_from(values), max_size=3)


def one_of(*values: Any) -> st.SearchStrategy[Any]:
    return st.none() | st.sampled_from(values)


TIMES = one_of(moment(0), moment(6), timedelta(days=28, minutes=-6), timedelta(days=28))
MEMBERS = st.dictionaries(st.sampled_from(["a", "a.b", "c"]), st.sampled_from(VALUES), max_size=2)
TASK_FILTERS = st.builds(
    TaskFilter,
    status=some(list(TaskStatus)),
    priority=some(list(TaskPriority)),
    node=one_of("n1", ""),
    user=one_of("u1", "u"),
    idempotency_key=one_of("key 3", "key"),
    skill=one_of("gpu", "GPU"),
    name_contains=one_of("1", "%", ""),
    error_contains=one_of("no", "No", ""),
    **{
        name: TIMES
        for name in TaskFilter.__annotations__
        if name.startswith(("submitted_", "completed_", "finished_"))
    },
    metadata=st.none() | MEMBERS,
)
NODE_FILTERS = st.builds(
    NodeFilter,
    status=some(list(NodeStatus)),
    skill=one_of("gpu", "GPU", ""),
    tag=one_of("rack 1", "%"),
    has_free_slots=one_of(True, False),
    silent_for=one_of(timedelta(0), timedelta(minutes=5), timedelta(days=9)),
)


def tasks_of(clock: FakeClock) -> list[Task]:
    make = TaskFactory(clock)
    return [
        make(
            status=list(TaskStatus)[number % 7],
            priority=list(TaskPriority)[number % 4],
            assigned_node=[None, "n1", "n2"][number % 3],
            user_id=[None, "u1"][number % 2],
            idempotency_key=f"key {number}" if number % 3 else None,
            required_skills=[[], ["gpu"], ["GPU", "gpu"]][number % 3],
            error=[None, "no", "", "No"][number % 4],
            submitted_at=moment(number % 13),
            completed_at=[None, moment(number % 11)][number % 2],
            metadata=[{"a": {"b": VALUES[number % len(VALUES)]}}, {"a": VALUES[number % 5]}, {}][
                number % 3
            ],
        )
        for number in range(66)
    ]


def nodes_of(clock: FakeClock) -> list[NodeInfo]:
    make = NodeFactory(clock)
    return [
        make(
            status=list(NodeStatus)[number % 5],
            available_skills=[[], ["gpu"], ["", "GPU"]][number % 3],
            tags=[[], ["rack 1"]][number % 2],
            max_concurrent_tasks=number % 3,
            running_tasks=number % 2,
            registered_at=clock() - timedelta(minutes=number % 7),
            last_heartbeat=[None, clock(), clock() + timedelta(minutes=number)][number % 3],
        )
        for number in range(30)
    ]


def is_selected(wanted: NodeFilter, node: NodeInfo, clock: FakeClock) -> bool:
    """What a filter of nodes means, said in other words."""
    statuses = [wanted.status] if isinstance(wanted.status, str) else wanted.status
    is_free = node.status is NodeStatus.ONLINE and node.running_tasks < node.max_concurrent_tasks
    last_sign = node.last_heartbeat or node.registered_at
    assert last_sign is not None
    silence = abs((clock() - last_sign).total_seconds())
    return (
        (statuses is None or node.status in statuses)
        and wanted.skill in (None, *node.available_skills)
        and wanted.tag in (None, *node.tags)
        and wanted.has_free_slots in (None, is_free)
        and (wanted.silent_for is None or silence > wanted.silent_for.total_seconds())
    )


@pytest.mark.usefixtures("migrated")
def test_filters_select_in_the_database_what_they_select_in_memory(location: Location) -> None:
    """Planted: `has_free_slots=False` ignored in SQL, a tag ignored in memory."""
    clock = FakeClock()
    with asyncio.Runner() as runner:
        manager = StateManager(Database(location, clock=clock), None)

        @settings(max_examples=in_profile(60), suppress_health_check=[HealthCheck.too_slow])
        @given(wanted=TASK_FILTERS, of_nodes=NODE_FILTERS)
        def agree(wanted: TaskFilter, of_nodes: NodeFilter) -> None:
            expected = {task.task_id for task in tasks if is_meant(wanted, task)}
            found = runner.run(manager.list_tasks(wanted))
            assert {task.task_id for task in found} == expected
            assert runner.run(manager.count_tasks(wanted)) == len(expected)
            selected = [node for node in nodes if is_selected(of_nodes, node, clock)]
            assert runner.run(manager.list_nodes(of_nodes)) == selected
            assert runner.run(manager.node_repo.list_nodes(of_nodes)) == selected

        try:
            runner.run(manager.initialize())
            tasks = tasks_of(clock)
            assert runner.run(manager.add_tasks(tasks)) == [None] * len(tasks)
            for node in nodes_of(clock):
                runner.run(manager.add_node(node))
            nodes = runner.run(manager.node_repo.get_all_nodes())
            agree()
        finally:
            runner.run(manager.shutdown())


@pytest.mark.sqlite  # PostgreSQL stores no broken JSON
async def test_row_with_broken_json_does_not_prevent_a_search(
    cluster: Cluster, location: Location
) -> None:
    broken, sound = [await cluster.add(required_skills=["a"], metadata={"a": 1}) for _ in range(2)]
    for column in ("required_skills", "metadata"):
        update = f"UPDATE tasks SET {column} = '{{}}' WHERE task_id = '{broken.task_id}'"
        execute(location, update.format("{broken"))

    for wanted in (TaskFilter(skill="a"), TaskFilter(metadata={"a": 1})):
        assert ids((await cluster.two.list_tasks(wanted)).tasks) == ids([sound])

    await cluster.one.remove_task(broken.task_id)
    await cluster.two.refresh_from_database()


async def test_skills_that_were_written_by_hand_are_found_by_their_text(
    cluster: Cluster, location: Location
) -> None:
    """PostgreSQL once refused to search in an object."""
    lists = ['["a"]', '[{"x": 1}, "a"]', r'[1, "\u0061"]']
    others = ['{"a": 1}', '[["a"]]', '["b", "A"]', '"a"', "1"]
    tasks = [await cluster.add() for _ in lists + others]
    for task, skills in zip(tasks, lists + others, strict=True):
        update = f"UPDATE tasks SET required_skills = '{skills}' WHERE task_id = '{task.task_id}'"
        execute(location, update)

    wanted = TaskFilter(skill="a")

    found = await cluster.one.task_repo.list_records(wanted, after=None, limit=10)
    assert {one.task_id for one in found[0]} == {task.task_id for task in tasks[: len(lists)]}
    assert await cluster.one.count_tasks(wanted) == len(lists)
    for task in tasks:
        await cluster.one.remove_task(task.task_id)
    await cluster.two.refresh_from_database()


@pytest.mark.postgresql
async def test_search_for_a_skill_can_use_several_cores(database: Database) -> None:
    """A million tasks of which none matches took twice the time on one core."""
    conditions = other_conditions(TaskFilter(skill="a"), database.statements)
    query = sa.select(TaskRow.task_id).where(*conditions)
    dialect = postgresql.dialect()  # type: ignore[no-untyped-call]  # it has no types
    sql = query.compile(dialect=dialect, compile_kwargs={"literal_binds": True})
    async with database.session() as session:
        await session.execute(sa.text("SET LOCAL search_path = public"))
        for name in ("parallel_setup_cost", "parallel_tuple_cost", "min_parallel_table_scan_size"):
            await session.execute(sa.text(f"SET LOCAL {name} = 0"))

        plan = await session.scalars(sa.text(f"EXPLAIN {sql}"))

        assert any("Parallel Seq Scan on tasks" in line for line in plan)


class TestReads:
    async def test_tasks_come_in_the_order_of_their_ids(
        self, cluster: Cluster, both: Sequence[StateManager], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(task_calls, "ID_BATCH_SIZE", 2)
        for id in "abcde":
            await cluster.add(task_id=id, status=TaskStatus.FAILED if id > "b" else "pending")
        cluster.one._replica.cache._finished.clear()  # so they are read

        for reader in (both[0].get_tasks, both[1].get_tasks, cluster.one.task_repo.get_tasks):
            found = await reader(id for id in "eaxcae")
            assert [task and task.task_id for task in found] == ["e", "a", None, "c", "a", "e"]
            assert found[0] == found[5] == await cluster.task("e")
            assert found[0] is not found[5]
            assert found[1] is not found[4]
            assert await reader([]) == []
            wrong: list[Any] = ["abc", None, [7], ["\0"]]
            for given_ids in wrong:
                with pytest.raises(InvalidDataError, match="ids: must"):
                    await reader(given_ids)

    async def test_task_that_was_changed_elsewhere_is_read_in_step(self, cluster: Cluster) -> None:
        """A later read from memory must not show an older state."""
        await cluster.add(task_id="a")
        await cluster.one.cancel_task("a")
        assert await cluster.two.get_task("b") is None

        [task] = await cluster.two.get_tasks(["a"])

        assert task == await cluster.task("a")
        assert task is not None
        assert cluster.two.version == task.version

    async def test_iteration_holds_one_page(
        self, cluster: Cluster, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(filter_calls, "ITER_PAGE_SIZE", 3)
        for number in range(8):
            await cluster.add(submitted_at=moment(number))
        limits: list[int] = []
        list_tasks = cluster.one.list_tasks

        async def listed(*arguments: Any, **options: Any) -> Any:
            limits.append(options["limit"])
            return await list_tasks(*arguments, **options)

        monkeypatch.setattr(cluster.one, "list_tasks", listed)
        lately = TaskFilter(submitted_from=cluster.clock() - moment(1))
        found = []

        async for task in cluster.one.iter_tasks(lately):
            found.append(task)
            assert len(limits) == (len(found) + 2) // 3  # read when it is needed
            cluster.clock.advance(hours=1)  # the beginning counts

        assert len(found) == 7
        assert limits == [3, 3, 3]

    async def test_waiting_tasks_are_the_pending_ones(
        self, cluster: Cluster, both: Sequence[StateManager]
    ) -> None:
        node = await cluster.join()
        for number in range(4):
            await cluster.add(task_id=str(number), priority=TaskPriority.LOW)
        held = [await cluster.claimed(node), await cluster.claimed(node)]
        later = await cluster.add(not_before=cluster.clock() + timedelta(hours=1))

        sources: list[Any] = [*both, cluster.one.task_repo]
        for one in sources:
            assert ids(await one.list_waiting()) == [later.task_id, *"0123"]
            assert ids(await one.list_waiting(2)) == [later.task_id, "0"]
            assert ids(await one.list_waiting(None)) == [later.task_id, *"0123"]
            with pytest.raises(InvalidDataError, match="limit"):
                await one.list_waiting(0)
        assert ids(await cluster.one.get_pending_tasks(2)) == ids(held)

    async def test_nodes_are_listed_by_a_filter(
        self, cluster: Cluster, both: Sequence[StateManager]
    ) -> None:
        full = await cluster.join(max_concurrent_tasks=1, tags=["rack 1"])
        await cluster.claimed(full)
        free = await cluster.join(available_skills=["gpu"], tags=["rack 1"])
        cluster.clock.advance(minutes=5)
        await cluster.one.update_heartbeat(free)
        await cluster.one.sync_to_database()
        wrong: list[Any] = [
            {"status": "gone"}, {"skill": 7}, {"tag": "\0"}, {"has_free_slots": 1},
            {"silent_for": 60}, {"silent_for": timedelta(-1)},
        ]  # fmt: skip

        sources: list[Any] = [*both, cluster.one.node_repo]
        for one in sources:
            for wanted, expected in (
                (None, [full, free]),
                (NodeFilter(tag="rack 1"), [full, free]),
                (NodeFilter(skill="gpu", status=NodeStatus.ONLINE), [free]),
                (NodeFilter(has_free_slots=True), [free]),
                (NodeFilter(has_free_slots=False), [full]),
                (NodeFilter(silent_for=timedelta(minutes=4)), [full]),
                (NodeFilter(status=[]), []),
            ):
                assert [node.node_id for node in await one.list_nodes(wanted)] == expected
            for conditions in wrong:
                with pytest.raises(InvalidDataError) as caught:
                    await one.list_nodes(NodeFilter(**conditions))
                assert caught.value.field in conditions
            with pytest.raises(InvalidDataError, match="filter: must be a NodeFilter"):
                await one.list_nodes(EVERYTHING)


class TestChanges:
    async def test_filter_without_a_condition_is_refused(
        self, cluster: Cluster, both: Sequence[StateManager]
    ) -> None:
        pending = await cluster.add()
        done = await cluster.add(status=TaskStatus.FAILED)
        nothing: list[Any] = [
            None,
            TaskFilter(),
            TaskFilter(user=None, status=None),
            TaskFilter(name_contains=""),
            TaskFilter(metadata={}),
        ]
        for manager in both:
            for filter in nothing:
                for call in (
                    manager.cancel_tasks(filter),
                    manager.requeue_tasks(filter),
                    manager.remove_tasks(filter),
                    manager.change_tasks(filter, lambda task: None),
                ):
                    with pytest.raises(InvalidDataError, match=r"TaskFilter\.everything\(\)"):
                        await call
        assert cluster.one.version == 2

        assert await both[1].change_tasks(EVERYTHING, rename) == ids([done, pending])
        assert await both[0].requeue_tasks(EVERYTHING) == ids([done])
        assert sorted(await both[1].cancel_tasks(EVERYTHING)) == sorted(ids([done, pending]))

    async def test_finished_tasks_that_are_meant_are_requeued(
        self, cluster: Cluster, both: Sequence[StateManager], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr(scheduler, "TASK_PAGE_SIZE", 2)
        failed = [
            await cluster.add(status=TaskStatus.FAILED, error="no GPU", retry_count=3)
            for _ in range(5)
        ]
        others = [
            await cluster.add(status=TaskStatus.FAILED, error="bad data"),
            await cluster.add(status=TaskStatus.RUNNING, error="no GPU"),
            await cluster.add(status=TaskStatus.COMPLETED, error="no GPU", idempotency_key="key"),
        ]
        await cluster.add(idempotency_key="key")

        done = await both[1].requeue_tasks(TaskFilter(error_contains="GPU"))
        await cluster.one.refresh_from_database()

        assert sorted(done) == ids(failed)
        for task in failed:
            found = await cluster.task(task.task_id)
            assert (found.status, found.retry_count, found.error) == ("pending", 0, None)
        assert [await cluster.task(task.task_id) for task in others] == others
        assert await cluster.one.requeue_tasks(TaskFilter(error_contains="GPU")) == []

    async def test_removed_tasks_free_their_slots(
        self, cluster: Cluster, both: Sequence[StateManager], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Planted: a task that was removed meanwhile counts as removed by this call."""
        monkeypatch.setattr(scheduler, "TASK_PAGE_SIZE", 2)
        await cluster.one.register_node(NodeInfo("atlas", "host", max_concurrent_tasks=2))
        mine = [await cluster.add(user_id="anna") for _ in range(5)]
        others = [await cluster.add(user_id="bert") for _ in range(2)]
        await cluster.one.claim_tasks("atlas", 2)
        submit, gone = cluster.one._replica.submit, list[str]()

        async def submit_late(command: Any) -> Any:
            if not gone:
                gone.append(command.id)
                await both[1].remove_task(command.id)
            return await submit(command)

        monkeypatch.setattr(cluster.one._replica, "submit", submit_late)

        done = await cluster.one.remove_tasks(TaskFilter(user="anna"))

        assert sorted(done) == ids([task for task in mine if task.task_id not in gone])
        left = [one.task_id async for one in both[1].iter_tasks()]
        assert sorted(left) == ids(others)
        node = await cluster.one.node_repo.get("atlas")
        assert node is not None
        assert node.running_tasks == 0

    async def test_each_task_is_changed_once(
        self, cluster: Cluster, both: Sequence[StateManager], monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Also one that moves to a later page, and one that was changed meanwhile."""
        monkeypatch.setattr(scheduler, "TASK_PAGE_SIZE", 2)
        for number in range(7):
            await cluster.add(task_id=str(number), submitted_at=moment(number), name="x")

        def earlier(task: Task) -> None:
            if task.task_id != "2":
                task.metadata["changes"] = task.metadata.get("changes", 0) + 1
                task.submitted_at = MOMENT - timedelta(minutes=int(task.task_id))

        done = await both[1].change_tasks(TaskFilter(name_contains="x"), earlier)

        assert done == ["6", "5", "4", "3", "1", "0"]
        assert [
            one.metadata async for one in both[1].iter_tasks(TaskFilter(submitted_until=MOMENT))
        ]
        for id in done:
            assert (await cluster.task(id)).metadata == {"changes": 1}
        await cluster.one.refresh_from_database()

    async def test_task_that_was_changed_meanwhile_is_read_again(
        self, cluster: Cluster, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        kept, renamed, other = [await cluster.add(name="train") for _ in range(3)]
        list_records = cluster.two.task_repo.list_records

        async def list_too_early(*arguments: Any, **options: Any) -> Any:
            page = await list_records(*arguments, **options)
            monkeypatch.undo()
            await cluster.one.update_task(replace(kept, description="new"))
            await cluster.one.update_task(replace(renamed, name="keep"))
            return page

        monkeypatch.setattr(cluster.two.task_repo, "list_records", list_too_early)
        calls: list[tuple[str, str]] = []

        def urgent(task: Task) -> None:
            calls.append((task.task_id, task.description))
            task.priority = TaskPriority.HIGH

        done = await cluster.two.change_tasks(TaskFilter(name_contains="train"), urgent)

        assert done == ids([other, kept])
        assert calls == [(one.task_id, "") for one in (other, renamed, kept)] + [
            (kept.task_id, "new")
        ]
        found = [await cluster.task(one.task_id) for one in (kept, renamed, other)]
        assert [one.priority.name for one in found] == ["HIGH", "NORMAL", "HIGH"]
        assert found[0].description == "new"

    async def test_refusals_of_a_change_are_raised(self, cluster: Cluster) -> None:
        one, two = await cluster.add(), await cluster.add()
        done = await cluster.add(status=TaskStatus.COMPLETED)

        async def coroutine(task: Task) -> None: ...

        wrong: list[tuple[Any, type[Exception], str]] = [
            (lambda task: setattr(task, "task_id", "x"), InvalidDataError, "task_id"),
            (lambda task: setattr(task, "timeout", 0), InvalidDataError, "timeout"),
            (lambda task: setattr(task, "name", 7), InvalidDataError, "name"),
            (lambda task: setattr(task, "status", "running"), InvalidTransitionError, "requeue"),
            (coroutine, InvalidDataError, "plain function"),
            ("rename", InvalidDataError, "fn: must be a function"),
        ]
        for fn, error, text in wrong:
            with pytest.raises(error, match=text):
                await cluster.two.change_tasks(TaskFilter(status=TaskStatus.COMPLETED), fn)
        assert await cluster.task(done.task_id) == done
        with pytest.raises(DuplicateError):
            await cluster.two.change_tasks(
                TaskFilter(status=TaskStatus.PENDING),
                lambda task: setattr(task, "idempotency_key", "same"),
            )
        keys = [(await cluster.task(task.task_id)).idempotency_key for task in (one, two)]
        assert sorted(map(str, keys)) == ["None", "same"]


def rename(task: Task) -> None:
    task.name = "renamed"


async def test_other_coroutines_run_while_many_tasks_are_decoded(
    cluster: Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`get_tasks` of 20,000 identifiers decoded all of them at once."""
    tasks = [cluster.make_task() for _ in range(4 * ID_BATCH_SIZE)]
    await cluster.one.add_tasks(tasks)
    turns, seen = 0, list[int]()

    async def take_turns() -> None:
        nonlocal turns
        while True:
            await asyncio.sleep(0)
            turns += 1

    def look_up(cache: Cache, task_id: str) -> Any:
        seen.append(turns)
        return find(cache, task_id)

    find = Cache.task
    monkeypatch.setattr(Cache, "task", look_up)
    beside = asyncio.create_task(take_turns())
    found = await cluster.one.get_tasks(task.task_id for task in tasks)
    beside.cancel()

    assert found == tasks
    assert seen[0] < seen[len(tasks) - 1]


async def test_recover_leaves_pending_tasks_as_rows(cluster: Cluster) -> None:
    """It decoded all of them, and each full pass of the garbage collector took 0.2 s longer."""
    await cluster.one.add_tasks([cluster.make_task() for _ in range(10)])

    await cluster.one.recover()  # the first call looks at all

    assert {type(one) for one in cluster.one._replica.cache.tasks.entries.values()} == {tuple}


async def most_in_a_turn(work: Awaitable[object], seen: Sequence[object]) -> int:
    """Return how many entries `seen` gets in a turn of the loop, at most, while `work` runs."""
    lengths: list[int] = []

    async def take_turns() -> None:
        while True:
            lengths.append(len(seen))
            await asyncio.sleep(0)

    beside = asyncio.create_task(take_turns())
    await work
    beside.cancel()
    return max(after - before for before, after in pairwise([0, *lengths, len(seen)]))


async def test_other_coroutines_run_while_tasks_are_recovered(
    cluster: Cluster, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`recover` looked at all tasks of a node, and made a command for each, at once."""
    many = 3 * TASK_SLICE_SIZE
    node = await cluster.join(max_concurrent_tasks=many)
    await cluster.one.add_tasks([cluster.make_task() for _ in range(many)])
    assert len(await cluster.one.claim_tasks(node, limit=many, start=True)) == many
    seen: list[object] = []

    def look_at(*given: Any) -> bool:
        seen.append(given)
        return is_overdue(*given)

    def make(*given: Any) -> Recover:
        seen.append(given)
        return Recover(*given)

    monkeypatch.setattr("openclaw_store.domain.conditions.is_overdue", look_at)
    assert await most_in_a_turn(cluster.one.recover(), seen) <= TASK_SLICE_SIZE
    assert len(seen) == many

    await cluster.one.update_node_status(node, NodeStatus.OFFLINE)
    monkeypatch.setattr(scheduler, "Recover", make)
    seen.clear()
    assert await most_in_a_turn(cluster.one.recover(), seen) <= PART_SIZE
    assert len(seen) == many
