"""Tests of the worker: no failure of one task costs another one, and a stop costs nothing."""

from __future__ import annotations

import asyncio
import functools
import math
import signal
import threading
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

import pytest
from conftest import PATIENCE, Location, MakeNode, MakeTask, feed

from openclaw_store import (
    Database,
    InvalidDataError,
    Lease,
    NodeInfo,
    NodeInUseError,
    NodeStatus,
    Run,
    StateManager,
    Task,
    TaskStatus,
    UnavailableError,
    Worker,
)
from openclaw_store.domain.lifecycle import OVERDUE
from openclaw_store.worker import lease as lease_module
from openclaw_store.worker import worker as worker_module

pytestmark = pytest.mark.asyncio


@pytest.fixture
async def store(database: Database) -> AsyncIterator[StateManager]:
    """A manager that follows other processes, as that of a program that submits tasks."""
    async with StateManager(database) as manager:
        yield manager


@asynccontextmanager
async def at_work(worker: Worker) -> AsyncIterator[Worker]:
    """Let a worker run during the block, and stop it."""
    running = asyncio.create_task(worker.run())
    try:
        yield worker
    finally:
        worker.stop()
        async with asyncio.timeout(PATIENCE):
            await running


class Monotonic:
    """A clock in place of the module `time`."""

    seconds = 0.0

    def monotonic(self) -> float:
        return self.seconds


async def until(condition: Callable[[], bool]) -> None:
    async with asyncio.timeout(PATIENCE):
        while not condition():  # noqa: ASYNC110 - the condition has no event
            await asyncio.sleep(0.005)


async def do(task: Task, run: Run) -> Any:
    """Do what the name of the task says."""
    match task.name:
        case "raise":
            raise ValueError("boom")
        case "exit":
            raise SystemExit(3)
        case "no JSON":
            return object()
        case "long":
            await asyncio.Event().wait()
    return {"attempt": task.attempt}


@pytest.fixture
def make_worker(location: Location, make_node: MakeNode) -> Callable[..., Worker]:
    def make(handle: Any = do, slots: int = 2, **options: Any) -> Worker:
        node = make_node(node_id="atlas", max_concurrent_tasks=slots)
        return Worker(Database(location), node, handle, **options)

    return make


MakeWorker = Callable[..., Worker]


async def test_each_task_ends_by_itself(
    store: StateManager, make_task: MakeTask, make_worker: MakeWorker
) -> None:
    """Planted: the exception of a handler, or a result that is no JSON, ends the worker."""
    names = ["raise", "no JSON", "good", "raise", "exit", "no JSON", "good"]
    tasks = [make_task(name=name, max_retries=0) for name in names]
    async with at_work(make_worker()):
        for task in tasks:
            await store.add_task(task)
        ended = [await store.wait_for_task(task.task_id, PATIENCE) for task in tasks]

    for task in ended:
        match task.name:
            case "good":
                assert (task.status, task.result) == (TaskStatus.COMPLETED, {"attempt": 1})
            case "raise":
                assert task.status is TaskStatus.FAILED
                assert task.error is not None
                assert task.error.endswith("ValueError: boom")
                assert "test_worker.py" in task.error
                assert "openclaw_store/worker" not in task.error
            case "exit":
                assert task.status is TaskStatus.FAILED
                assert task.error is not None
                assert "the handler has called sys.exit(3)" in task.error
            case "no JSON":
                assert task.status is TaskStatus.FAILED
                assert task.error is not None
                assert "not JSON" in task.error


async def test_timeout_ends_the_handler(
    store: StateManager, make_task: MakeTask, make_worker: MakeWorker
) -> None:
    task = make_task(name="long", timeout=1, max_retries=0)
    async with at_work(make_worker()):
        await store.add_task(task)
        ended = await store.wait_for_task(task.task_id, PATIENCE)

    assert (ended.status, ended.error) == (TaskStatus.TIMEOUT, OVERDUE)


async def test_task_is_cancelled_when_its_handler_has_ended(
    store: StateManager,
    make_task: MakeTask,
    make_worker: MakeWorker,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(worker_module, "CHECK_SECONDS", 0.01)
    began, ended = asyncio.Event(), asyncio.Event()

    async def handle(task: Task, run: Run) -> None:
        began.set()
        try:
            await asyncio.Event().wait()
        finally:
            assert run.cancelled
            found = await store.get_task(task.task_id)
            assert found is not None
            assert found.status is TaskStatus.RUNNING  # it keeps its slot
            ended.set()

    task = make_task()
    async with at_work(make_worker(handle)):
        await store.add_task(task)
        await began.wait()
        await store.cancel_task(task.task_id, "enough", grace_seconds=60)
        cancelled = await store.wait_for_task(task.task_id, PATIENCE)

    assert ended.is_set()
    assert (cancelled.status, cancelled.error) == (TaskStatus.CANCELLED, "enough")


async def test_stop_costs_no_task_a_retry_or_a_loss(
    store: StateManager, make_task: MakeTask, make_worker: MakeWorker
) -> None:
    tasks = [make_task(name="long") for _ in range(3)]
    worker = make_worker(grace_seconds=0)
    async with at_work(worker):
        await store.add_tasks(tasks)
        await until(lambda: "2 of 2" in repr(worker))

    await store.refresh_from_database()
    found = [await store.task_repo.get(task.task_id) for task in tasks]
    assert [(one.status, one.retry_count, one.losses) for one in found if one is not None] == [
        (TaskStatus.PENDING, 0, 0)
    ] * 3
    node = await store.node_repo.get("atlas")
    assert node is not None
    assert (node.status, node.running_tasks, node.failed_tasks) == (NodeStatus.OFFLINE, 0, 0)
    reasons = [one.reason for one in await feed(store) if one.to_status == TaskStatus.PENDING]
    assert reasons.count("released: worker stopped") == 2


async def test_task_that_ends_within_the_grace_is_reported(
    store: StateManager, make_task: MakeTask, make_worker: MakeWorker
) -> None:
    began, go = asyncio.Event(), asyncio.Event()

    async def handle(task: Task, run: Run) -> int:
        began.set()
        await go.wait()
        return 1

    task = make_task()
    async with at_work(make_worker(handle)) as worker:
        await store.add_task(task)
        await began.wait()
        worker.stop()
        await asyncio.sleep(0)
        go.set()

    found = await store.task_repo.get(task.task_id)
    assert found is not None
    assert (found.status, found.result) == (TaskStatus.COMPLETED, 1)


async def test_plain_function_runs_in_a_thread_and_sees_that_it_should_end(
    store: StateManager, make_task: MakeTask, make_worker: MakeWorker
) -> None:
    began, threads = threading.Event(), []

    def handle(task: Task, run: Run) -> None:
        threads.append(threading.current_thread())
        began.set()
        while not run.cancelled:
            threading.Event().wait(0.005)
        raise RuntimeError("ended")

    task = make_task()
    async with at_work(make_worker(handle, grace_seconds=0)):
        await store.add_task(task)
        await until(began.is_set)

    assert threads != [threading.main_thread()]
    found = await store.task_repo.get(task.task_id)
    assert found is not None
    assert (found.status, found.losses) == (TaskStatus.PENDING, 0)


async def test_worker_that_cannot_renew_its_lease_drops_its_tasks(
    store: StateManager,
    make_task: MakeTask,
    make_worker: MakeWorker,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Planted: it goes on, while `recover` has given its tasks to others."""
    clock = Monotonic()
    monkeypatch.setattr(lease_module, "time", clock)
    monkeypatch.setattr(worker_module, "RETRY_SECONDS", 0.01)
    monkeypatch.setattr(lease_module, "HEARTBEATS_PER_LEASE", math.inf)
    is_away, interrupted = asyncio.Event(), asyncio.Event()
    renew = StateManager.renew_lease

    async def renew_lease(self: StateManager, *arguments: Any) -> Lease | None:
        if is_away.is_set():
            clock.seconds += 20
            raise UnavailableError("away")
        return await renew(self, *arguments)

    async def handle(task: Task, run: Run) -> int:
        if interrupted.is_set():
            return 2
        is_away.set()
        try:
            await asyncio.Event().wait()
        finally:
            interrupted.set()
            is_away.clear()
        return 1

    monkeypatch.setattr(StateManager, "renew_lease", renew_lease)
    task = make_task()
    async with at_work(make_worker(handle)):
        await store.add_task(task)
        ended = await store.wait_for_task(task.task_id, PATIENCE)

    assert (ended.result, ended.losses, ended.retry_count, ended.attempt) == (2, 1, 0, 2)
    assert [one.reason for one in await feed(store)].count("registered") == 2


async def test_claim_whose_answer_was_lost_is_released(
    store: StateManager,
    make_task: MakeTask,
    make_worker: MakeWorker,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Planted: the task stays with a node that does not know of it."""
    monkeypatch.setattr(worker_module, "CHECK_SECONDS", 0.01)
    monkeypatch.setattr(worker_module, "RETRY_SECONDS", 0.01)
    claim, lost = StateManager.claim_tasks, list[str]()

    async def claim_tasks(self: StateManager, *arguments: Any, **options: Any) -> list[Task]:
        claimed = await claim(self, *arguments, **options)
        if claimed and not lost:
            lost.append(claimed[0].task_id)
            raise UnavailableError("the answer is lost")
        return claimed

    monkeypatch.setattr(StateManager, "claim_tasks", claim_tasks)
    task = make_task(name="good")
    async with at_work(make_worker()):
        await store.add_task(task)
        ended = await store.wait_for_task(task.task_id, PATIENCE)

    assert lost == [task.task_id]
    assert (ended.status, ended.attempt, ended.losses) == (TaskStatus.COMPLETED, 2, 0)


async def test_report_is_repeated_while_the_database_is_away(
    store: StateManager,
    make_task: MakeTask,
    make_worker: MakeWorker,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(worker_module, "RETRY_SECONDS", 0.01)
    complete, failures = StateManager.complete_task, [UnavailableError("away")] * 3

    async def complete_task(self: StateManager, *arguments: Any) -> Task:
        if failures:
            raise failures.pop()
        return await complete(self, *arguments)

    monkeypatch.setattr(StateManager, "complete_task", complete_task)
    task = make_task(name="good")
    async with at_work(make_worker()):
        await store.add_task(task)
        ended = await store.wait_for_task(task.task_id, PATIENCE)

    assert (ended.status, ended.attempt) == (TaskStatus.COMPLETED, 1)


async def test_busy_worker_makes_one_commit_for_a_task(
    database: Database, store: StateManager, make_task: MakeTask, make_node: MakeNode
) -> None:
    """Planted: the report and the next claim are two commits."""
    tasks = [make_task(name="good") for _ in range(50)]
    await store.add_tasks(tasks)
    worker = Worker(store, make_node(node_id="atlas", max_concurrent_tasks=1), do)
    before = (await database.get_stats())["writer"]["batches"]

    async with at_work(worker):
        for task in tasks:
            await store.wait_for_task(task.task_id, PATIENCE)

    commits = (await database.get_stats())["writer"]["batches"] - before
    assert commits < 50 + 10  # and some to register, to end and to send heartbeats


@pytest.mark.parametrize(
    ("options", "field"),
    [
        ({"handle": 1}, "handle"),
        ({"lease_seconds": 0}, "lease_seconds"),
        ({"grace_seconds": -1}, "grace_seconds"),
        ({"recover_every": 0}, "recover_every"),
        ({"slots": 0}, "max_concurrent_tasks"),
    ],
)
async def test_senseless_argument_is_refused_by_name(
    make_worker: MakeWorker, options: dict[str, Any], field: str
) -> None:
    with pytest.raises(InvalidDataError, match=field):
        make_worker(**options)


@pytest.mark.parametrize(
    "handle",
    [lambda task: task, lambda: None, lambda task, run, more: more],
    ids=["one", "none", "three"],
)
async def test_handler_with_other_arguments_is_refused_before_it_fails_tasks(
    make_worker: MakeWorker, handle: Any
) -> None:
    with pytest.raises(InvalidDataError, match="must take two arguments, the task and its run"):
        make_worker(handle)


async def test_handler_may_have_more_arguments_with_defaults(make_worker: MakeWorker) -> None:
    def handle(task: Task, run: Run, more: int = 0, **options: Any) -> None: ...

    for accepted in (handle, print, functools.partial(handle, more=1)):
        make_worker(accepted)


async def test_worker_needs_a_store_and_a_node(location: Location, make_node: MakeNode) -> None:
    with pytest.raises(InvalidDataError, match="a StateManager or a Database, not str"):
        Worker("cluster.db", make_node(), do)  # type: ignore[arg-type]  # the point
    with pytest.raises(InvalidDataError, match="node: must be a NodeInfo, not str"):
        Worker(Database(location), "atlas", do)  # type: ignore[arg-type]  # the point


async def test_second_worker_of_a_node_is_refused(
    store: StateManager, make_task: MakeTask, make_worker: MakeWorker
) -> None:
    """Planted: it takes the tasks of the first one, which takes the node back, for ever."""
    task = make_task(name="long")
    first = make_worker(lease_seconds=6, grace_seconds=0)
    async with at_work(first):
        await store.add_task(task)
        await until(lambda: "1 of 2" in repr(first))

        with pytest.raises(NodeInUseError, match="node_id of its own"):
            async with asyncio.timeout(PATIENCE):
                await make_worker().run()

        assert "1 of 2" in repr(first)
        found = await store.task_repo.get(task.task_id)
        assert found is not None
        assert (found.status, found.losses) == (TaskStatus.RUNNING, 0)


async def test_node_of_a_crashed_worker_is_taken_over(
    store: StateManager, make_task: MakeTask, make_node: MakeNode, make_worker: MakeWorker
) -> None:
    crashed = make_node(node_id="atlas", session="crashed", lease_seconds=0.6)
    await store.register_node(crashed)
    task = make_task(name="good")
    await store.add_task(task)
    await store.claim_tasks("atlas", start=True)

    async with at_work(make_worker()):
        ended = await store.wait_for_task(task.task_id, PATIENCE)

    assert (ended.status, ended.attempt, ended.losses) == (TaskStatus.COMPLETED, 2, 1)


async def test_stop_frees_the_node_for_the_next_worker(
    store: StateManager, make_task: MakeTask, make_worker: MakeWorker
) -> None:
    for _ in range(3):
        task = make_task(name="good")
        async with at_work(make_worker(lease_seconds=10_000)):
            await store.drain_node("atlas")
            await store.add_task(task)
        async with at_work(make_worker(lease_seconds=10_000)):
            await store.resume_node("atlas")
            await store.wait_for_task(task.task_id, PATIENCE)


async def test_replaced_worker_ends_and_leaves_the_tasks_of_the_other(
    store: StateManager,
    make_task: MakeTask,
    make_node: MakeNode,
    make_worker: MakeWorker,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Planted: it registers again, or releases what the other one has claimed."""
    monkeypatch.setattr(worker_module, "CHECK_SECONDS", 0.01)
    began = asyncio.Event()

    async def handle(task: Task, run: Run) -> None:
        began.set()
        await asyncio.Event().wait()

    worker = make_worker(handle)
    running = asyncio.create_task(worker.run())
    await store.add_task(make_task())
    await began.wait()
    await store.drain_node("atlas")  # only one of them shall claim

    await store.register_node(make_node(node_id="atlas"))
    with pytest.raises(NodeInUseError) as caught:
        async with asyncio.timeout(PATIENCE):
            await running
    await store.resume_node("atlas")
    [task] = await store.claim_tasks("atlas", start=True)

    assert (caught.value.node_id, caught.value.session) == ("atlas", None)
    assert (task.attempt, task.losses) == (2, 1)
    node = await store.node_repo.get("atlas")
    assert node is not None
    assert (node.status, node.running_tasks) == (NodeStatus.ONLINE, 1)


async def test_node_of_the_caller_is_not_changed(
    location: Location, store: StateManager, make_node: MakeNode, make_task: MakeTask
) -> None:
    task = make_task(name="good")
    node = make_node(node_id="atlas")
    before = NodeInfo(**vars(node))

    async with at_work(Worker(Database(location), node, do)):
        await store.add_task(task)
        await store.wait_for_task(task.task_id, PATIENCE)

    assert node == before


async def test_progress_travels_with_the_heartbeats(
    store: StateManager, make_task: MakeTask, make_worker: MakeWorker
) -> None:
    go = threading.Event()

    def handle(task: Task, run: Run) -> None:
        run.progress(0.4, "epoch 3")
        assert go.wait(PATIENCE)
        run.progress(2)

    task = make_task(max_retries=0)
    await store.add_task(task)
    async with at_work(make_worker(handle, lease_seconds=1)), asyncio.timeout(PATIENCE):
        async for progress in store.watch_progress(task.task_id):
            assert (progress.attempt, progress.fraction, progress.note) == (1, 0.4, "epoch 3")
            go.set()
        ended = await store.wait_for_task(task.task_id)

    assert ended.status is TaskStatus.FAILED
    assert ended.error is not None
    assert "fraction" in ended.error


async def test_removed_task_is_no_harm(
    store: StateManager,
    make_task: MakeTask,
    make_worker: MakeWorker,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Planted: the error of the report ends the worker."""
    monkeypatch.setattr(worker_module, "CHECK_SECONDS", 0.01)
    removed, kept = make_task(), make_task(name="good")
    interrupted = asyncio.Event()

    async def handle(task: Task, run: Run) -> int:
        if task.task_id == kept.task_id:
            return 1
        try:
            await store.remove_task(task.task_id)  # the worker may see it before this returns
            await asyncio.Event().wait()
        finally:
            interrupted.set()
        return 2

    async with at_work(make_worker(handle, slots=1)):
        await store.add_task(removed)
        await interrupted.wait()
        await store.add_task(kept)
        ended = await store.wait_for_task(kept.task_id, PATIENCE)

    assert ended.result == 1
    assert await store.task_repo.get(removed.task_id) is None


async def test_never_more_handlers_than_slots(
    store: StateManager,
    make_task: MakeTask,
    make_worker: MakeWorker,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Planted: a cancelled, late or removed task frees its slot while its handler goes on."""
    monkeypatch.setattr(worker_module, "CHECK_SECONDS", 0.01)
    running, most, ended = 0, 0, 0
    total, slots = 24, 3

    async def handle(task: Task, run: Run) -> None:
        nonlocal running, most, ended
        running += 1
        most = max(most, running)
        try:
            match task.name:
                case "cancel":
                    await store.cancel_task(task.task_id)
                case "ask":
                    await store.cancel_task(task.task_id, grace_seconds=600)
                case "remove":
                    await store.remove_task(task.task_id)
            if task.name != "quick":
                await asyncio.Event().wait()
        finally:
            await asyncio.sleep(0.05)  # it cleans up
            running -= 1
            ended += 1

    names = ["quick", "cancel", "ask", "remove", "late", "quick"] * (total // 6)
    tasks = [
        make_task(name=name, timeout=1 if name == "late" else None, max_retries=0) for name in names
    ]
    await store.add_tasks(tasks)
    async with at_work(make_worker(handle, slots=slots)):
        await until(lambda: ended == total)

    assert most == slots
    node = await store.node_repo.get("atlas")
    assert node is not None
    assert node.running_tasks == 0


async def test_database_away_for_a_minute_costs_nothing_within_the_lease(
    store: StateManager,
    make_task: MakeTask,
    make_worker: MakeWorker,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Handlers go on, reports are repeated, and the lease is renewed when the database is back."""
    monkeypatch.setattr(worker_module, "RETRY_SECONDS", 0.001)
    clock = Monotonic()
    monkeypatch.setattr(lease_module, "time", clock)
    is_away, go = asyncio.Event(), asyncio.Event()
    refused = 0

    def away(name: str) -> None:
        call = getattr(StateManager, name)

        async def called(self: StateManager, *arguments: Any, **options: Any) -> Any:
            nonlocal refused
            if self is not store and is_away.is_set():
                refused += 1
                clock.seconds += 1
                if clock.seconds >= 60:
                    is_away.clear()
                raise UnavailableError("away")
            return await call(self, *arguments, **options)

        monkeypatch.setattr(StateManager, name, called)

    for name in ("renew_lease", "get_lease", "claim_tasks", "complete_task"):
        away(name)

    async def handle(task: Task, run: Run) -> int:
        await go.wait()
        return 1

    tasks = [make_task() for _ in range(4)]
    worker = make_worker(handle, lease_seconds=90)
    async with at_work(worker):
        await store.add_tasks(tasks)
        await until(lambda: "2 of 2" in repr(worker))
        is_away.set()
        go.set()
        ended = [await store.wait_for_task(task.task_id, PATIENCE) for task in tasks]

    assert refused >= 60
    assert {(one.status, one.attempt, one.losses) for one in ended} == {
        (TaskStatus.COMPLETED, 1, 0)
    }


async def test_cancelled_worker_leaves_no_handler_behind(
    store: StateManager, make_task: MakeTask, make_worker: MakeWorker
) -> None:
    """Planted: the coroutine of a handler goes on. (The fixtures look for it, too.)"""
    began, ended = asyncio.Event(), asyncio.Event()

    async def handle(task: Task, run: Run) -> None:
        began.set()
        try:
            await asyncio.Event().wait()
        finally:
            assert run.cancelled
            ended.set()

    running = asyncio.create_task(make_worker(handle).run())
    await store.add_task(make_task())
    await began.wait()

    running.cancel()
    await asyncio.wait([running])

    assert running.cancelled()
    assert ended.is_set()


async def test_cancelled_worker_does_not_block_the_loop_until_a_thread_ends(
    store: StateManager, make_task: MakeTask, make_worker: MakeWorker
) -> None:
    """Planted: it waits for its threads on the event loop."""
    began, go_on = threading.Event(), threading.Event()

    def handle(task: Task, run: Run) -> None:
        began.set()
        assert go_on.wait(PATIENCE)

    running = asyncio.create_task(make_worker(handle).run())
    await store.add_task(make_task())
    await until(began.is_set)

    running.cancel()
    await asyncio.wait([running], timeout=PATIENCE / 2)

    assert running.cancelled()  # while the function still runs
    assert not go_on.is_set()
    go_on.set()


async def test_signal_stops_all_workers_of_a_process(
    store: StateManager, make_node: MakeNode
) -> None:
    """Planted: the last one to start takes the signal from the others."""
    workers = [Worker(store, make_node(), do) for _ in range(3)]
    running = [asyncio.create_task(worker.run()) for worker in workers]
    for worker in workers:
        await until(worker._lease.holds.is_set)
    workers[2].stop()
    await asyncio.wait([running[2]], timeout=PATIENCE)

    signal.raise_signal(signal.SIGTERM)

    done, _ = await asyncio.wait(running, timeout=PATIENCE / 2)
    assert len(done) == 3
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
