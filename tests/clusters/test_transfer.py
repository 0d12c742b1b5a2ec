"""`transfer`: tasks move to another cluster of any kind, exactly once."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Iterator
from contextlib import AsyncExitStack, ExitStack, asynccontextmanager
from pathlib import Path
from typing import Any
from unittest.mock import ANY

import pytest
from conftest import Location, MakeNode, MakeTask, assert_in_step, execute, new_location
from typer.testing import CliRunner

from openclaw_store import (
    Database,
    InvalidDataError,
    KeyRing,
    StateManager,
    TaskFilter,
    TaskRepository,
    TaskStatus,
    transfer,
    verify,
)
from openclaw_store.cli.main import app
from openclaw_store.database.tables import IncomingRow, OutgoingRow
from openclaw_store.domain import LIVE
from openclaw_store.encryption import Key

ALL = TaskFilter.everything()

PAIRS = [
    pytest.param(pair, marks=[getattr(pytest.mark, kind) for kind in sorted({*pair})])
    for pair in [
        ("sqlite", "sqlite"),
        ("sqlite", "postgresql"),
        ("postgresql", "sqlite"),
        ("postgresql", "postgresql"),
    ]
]

Pair = tuple[StateManager, StateManager]


@pytest.fixture
def kinds() -> tuple[str, str]:
    """The kinds of the source and of the target."""
    return ("sqlite", "sqlite")


@pytest.fixture
def places(
    kinds: tuple[str, str], request: pytest.FixtureRequest, tmp_path: Path
) -> Iterator[list[Location]]:
    """Where the two clusters are."""
    with ExitStack() as stack:
        made = []
        for number, kind in enumerate(kinds, 1):
            folder = tmp_path / str(number)
            folder.mkdir()
            place = stack.enter_context(new_location(request, kind, folder, migrated=True))
            execute(place, f"UPDATE counters SET cluster_id = {number}")  # copies of one database
            made.append(place)
        yield made


@pytest.fixture
async def pair(places: list[Location]) -> AsyncIterator[Pair]:
    """The source and the target, with their caches."""
    async with (
        StateManager(Database(places[0]), None) as source,
        StateManager(Database(places[1]), None) as target,
    ):
        yield source, target
        await assert_sound(source, target)


async def assert_sound(*managers: StateManager) -> None:
    """Each database passes its checks, nothing is in transit, and memory is what is stored."""
    for one in managers:
        assert await verify(one.db)
        async with one.db.session() as session:
            for row in (OutgoingRow, IncomingRow):
                assert (await session.scalars(row.__table__.select())).all() == []
        await one.refresh_from_database()
        live = [task async for task in one.task_repo.iter_tasks() if task.status in LIVE]
        state = await one.get_state()
        assert state.tasks == {task.task_id: task for task in live}


async def ids(manager: StateManager) -> set[str]:
    return {task.task_id async for task in manager.task_repo.iter_tasks()}


@pytest.mark.parametrize("kinds", PAIRS)
async def test_tasks_move_with_their_content_and_history(
    pair: Pair, make_task: MakeTask, make_node: MakeNode
) -> None:
    source, target = pair
    await source.register_node(make_node(node_id="atlas"))
    odd = make_task(parameters={"größe": [1, 2.5, None]}, metadata={"a": {}}, idempotency_key="k")
    await source.add_task(odd)
    [odd] = await source.claim_tasks("atlas", start=True)
    await source.release_task(odd, "the disk is full")
    done, running = make_task(), make_task()
    await source.add_task(done)
    [odd] = await source.claim_tasks("atlas")
    await source.release_task(odd, "released")
    await source.cancel_task(done.task_id, "no money")
    await source.cancel_task(odd.task_id)
    await source.requeue_task(odd.task_id)
    await source.add_task(running)
    await source.change_task(running.task_id, lambda task: setattr(task, "priority", 0))
    [running] = await source.claim_tasks("atlas")
    before = {id: await source.history(id) for id in (odd.task_id, done.task_id)}
    contents = {id: await source.get_task(id) for id in before}
    steps: list[tuple[Any, ...]] = []

    found = await transfer(source.db, target.db, ALL, report=lambda *step: steps.append(step))

    assert (found.selected, found.moved, found.stayed, bool(found)) == (2, 2, 1, True)
    assert steps[-1] == ("moving tasks", 2, 2)
    assert await ids(source) == {running.task_id}
    assert await ids(target) == set(before)
    for id, was in contents.items():
        now = await target.get_task(id)
        assert was is not None
        assert now is not None
        was.version, was.updated_at = now.version, now.updated_at
        assert now == was
        history = await target.history(id)
        assert [one.revision for one in history[:-1]] == [*range(-len(before[id]), 0)]
        assert [one[1:9] for one in history[:-1]] == [one[1:9] for one in before[id]]
        assert history[-1].kind == "created"
    assert [one.to_status for one in await source.history(odd.task_id)] == [None]
    assert target.version == 2  # the arrivals alone are in the feed
    await assert_in_step(target)


async def test_history_of_several_moves_stays_in_order(pair: Pair, make_task: MakeTask) -> None:
    source, target = pair
    await source.add_task(task := make_task())

    await transfer(source.db, target.db, ALL)
    await target.cancel_task(task.task_id)
    await transfer(target.db, source.db, ALL)
    await source.requeue_task(task.task_id)

    history = await source.history(task.task_id)
    assert [one.to_status for one in history] == [
        "pending", "pending", "cancelled", "cancelled", "pending"
    ]  # fmt: skip
    revisions = [one.revision for one in history]
    assert revisions == sorted(set(revisions))
    assert [one.previous for one in history[:3]] == [None, -3, -2]


@pytest.mark.parametrize("kinds", PAIRS[1:2])
async def test_refused_tasks_return(pair: Pair, make_task: MakeTask) -> None:
    source, target = pair
    same, keyed, other = make_task(), make_task(idempotency_key="key"), make_task()
    for task in (same, keyed, other):
        await source.add_task(task)
    await target.add_task(make_task(task_id=same.task_id))
    await target.add_task(make_task(idempotency_key="key"))

    found = await transfer(source.db, target.db, ALL)

    assert not found
    assert found.moved == 1
    assert set(found.returned) == {same.task_id, keyed.task_id}
    assert "exists already" in found.returned[same.task_id]
    assert await ids(source) == {same.task_id, keyed.task_id}
    history = await source.history(same.task_id)
    assert [one.kind for one in history] == ["created", "created"]
    assert [one.task_id for one in await source.get_pending_tasks()] == [
        same.task_id,
        keyed.task_id,
    ]


async def test_task_that_both_refuse_waits_for_the_next_call(
    pair: Pair, make_task: MakeTask, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, target = pair
    await source.add_task(task := make_task(name="first"))
    await target.add_task(make_task(task_id=task.task_id))
    write_in = Database.write_in

    async def meanwhile(*arguments: Any) -> Any:
        result = await write_in(*arguments)
        await source.add_task(make_task(task_id=task.task_id, name="second"))
        return result

    with monkeypatch.context() as patched:
        patched.setattr(Database, "write_in", meanwhile)
        found = await transfer(source.db, target.db, TaskFilter(name_contains="first"))
    assert set(found.in_transit) == {task.task_id}
    assert found.returned == {}

    await target.remove_task(task.task_id)
    again = await transfer(source.db, target.db, TaskFilter(name_contains="first"))

    assert (again.selected, again.moved) == (0, 1)
    moved, second = await target.get_task(task.task_id), await source.get_task(task.task_id)
    assert moved is not None
    assert second is not None
    assert (moved.name, second.name) == ("first", "second")


class InterruptedTransferError(Exception):
    """The process ends here."""


@pytest.mark.parametrize("kinds", PAIRS[1:3])
@pytest.mark.parametrize("step", ["departed", "arrived", "settled"])
async def test_interrupted_transfer_is_completed(
    pair: Pair, make_task: MakeTask, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    source, target = pair
    for number in range(5):
        await source.add_task(make_task(task_id=f"task-{number}"))
    await target.add_task(make_task(task_id="task-3"))
    every = {f"task-{number}" for number in range(5)}
    write, open_transaction = Database.write, Database.transaction

    async def interrupted(self: Database, apply: Any, operation: Any) -> Any:
        names = {"settle": "arrived", "forget": "settled"}
        if names.get(apply.__name__) == step:
            raise InterruptedTransferError
        return await write(self, apply, operation)

    def refused(self: Database, **options: Any) -> Any:
        if step == "departed":
            raise InterruptedTransferError
        return open_transaction(self, **options)

    with monkeypatch.context() as patched:
        patched.setattr(Database, "write", interrupted)
        patched.setattr(Database, "transaction", refused)
        with pytest.raises(InterruptedTransferError):
            await transfer(source.db, target.db, ALL)
    held = (await ids(source), await ids(target))
    assert held[0] & held[1] <= {"task-3"}

    found = await transfer(source.db, target.db, ALL)

    assert (await ids(source), await ids(target)) == ({"task-3"}, every)
    assert set(found.returned) == {"task-3"}
    await assert_in_step(target)


async def test_slow_process_does_not_deliver_again(
    pair: Pair, make_task: MakeTask, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another process completes its batch, and the target removes the task, before it goes on."""
    source, target = pair
    await source.add_task(task := make_task())
    await source.add_task(make_task())
    open_transaction = Database.transaction
    is_first = True

    @asynccontextmanager
    async def slow(self: Database, **options: Any) -> AsyncIterator[Any]:
        nonlocal is_first
        if is_first:
            is_first = False
            await transfer(source.db, target.db, ALL)
            await target.remove_task(task.task_id)
        async with open_transaction(self, **options) as tx:
            yield tx

    monkeypatch.setattr(Database, "transaction", slow)
    await transfer(source.db, target.db, ALL)

    assert await ids(source) == set()
    assert task.task_id not in await ids(target)
    assert len(await ids(target)) == 1


async def test_slow_process_does_not_take_refused_tasks_back_again(
    pair: Pair, make_task: MakeTask, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another process has settled its batch, and the task has changed since."""
    source, target = pair
    await source.add_task(task := make_task())
    await target.add_task(make_task(task_id=task.task_id))
    write, is_first = Database.write, True

    async def slow(self: Database, apply: Any, operation: Any) -> Any:
        nonlocal is_first
        if apply.__name__ == "settle" and is_first:
            is_first = False
            await transfer(source.db, target.db, TaskFilter(user="nobody"))
            await source.remove_task(task.task_id)
        return await write(self, apply, operation)

    monkeypatch.setattr(Database, "write", slow)
    found = await transfer(source.db, target.db, ALL)

    assert (found.returned, found.in_transit) == ({task.task_id: ANY}, {})
    assert await ids(source) == set()


@pytest.mark.parametrize("kinds", PAIRS[1:2])
async def test_processes_share_the_work(
    pair: Pair, places: list[Location], make_task: MakeTask, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, target = pair
    monkeypatch.setattr("openclaw_store.clusters.transfers.BATCH_TASKS", 7)
    await source.add_tasks(make_task() for _ in range(60))
    async with AsyncExitStack() as stack:
        others = [await stack.enter_async_context(Database(place)) for place in places]
        await asyncio.gather(
            transfer(source.db, target.db, ALL), transfer(others[0], others[1], ALL)
        )
    await transfer(source.db, target.db, ALL)

    assert await ids(source) == set()
    assert len(await ids(target)) == 60
    assert target.version == 60 or await target.refresh_from_database()
    await assert_in_step(target)


@pytest.mark.parametrize("kinds", PAIRS[1:2])
async def test_sealed_values_are_sealed_again(
    places: list[Location],
    make_task: MakeTask,
    make_node: MakeNode,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    rings = [KeyRing([Key(id, bytes([id] * 32))], id) for id in (1, 2)]
    async with AsyncExitStack() as stack:
        source, target = [
            await stack.enter_async_context(StateManager(Database(place, keys=ring), None))
            for place, ring in zip(places, rings, strict=True)
        ]
        await source.register_node(make_node(node_id="atlas"))
        await source.add_task(task := make_task(parameters={"token": "my-secret"}))
        [task] = await source.claim_tasks("atlas")
        await source.release_task(task, "my-secret reason")

        with monkeypatch.context() as patched:
            patched.setattr(Database, "transaction", lambda *_, **__: 1 / 0)
            with pytest.raises(ZeroDivisionError):
                await transfer(source.db, target.db, ALL)
        [(text,)] = execute(places[0], "SELECT tasks FROM outgoing")
        assert "my-secret" not in text
        assert text.startswith("$sealed$000001$")
        await transfer(source.db, target.db, ALL)

        moved = await target.get_task(task.task_id)
        assert moved is not None
        assert moved.parameters == {"token": "my-secret"}
        assert [one.reason for one in await target.history(task.task_id)] == [
            None, None, "released: my-secret reason", None
        ]  # fmt: skip
        [(text,)] = execute(places[1], "SELECT parameters::text FROM tasks")
        assert text.startswith('"$sealed$000002$')
        reasons = execute(places[1], "SELECT reason FROM past_changes WHERE reason IS NOT NULL")
        assert all(reason.startswith("$sealed$000002$") for (reason,) in reasons)
        await assert_sound(source, target)


async def test_dry_run_only_counts(pair: Pair, make_task: MakeTask) -> None:
    source, target = pair
    await source.add_tasks(make_task(user_id=f"user-{number % 2}") for number in range(4))

    found = await transfer(source.db, target.db, TaskFilter(user="user-1"), dry_run=True)

    assert (found.selected, found.moved) == (2, 0)
    assert len(await ids(source)) == 4
    only = TaskFilter(user="user-1", status=TaskStatus.COMPLETED)
    assert (await transfer(source.db, target.db, only)).selected == 0


async def test_senseless_transfers_are_refused(pair: Pair, places: list[Location]) -> None:
    source, _ = pair
    async with Database(places[0]) as same:
        with pytest.raises(InvalidDataError, match="target"):
            await transfer(source.db, same, ALL)
        with pytest.raises(InvalidDataError, match="filter"):
            await transfer(source.db, same, TaskFilter())


def test_command_names_what_it_refuses(places: list[Location], make_task: MakeTask) -> None:
    async def fill() -> None:
        async with Database(places[0]) as source, Database(places[1]) as target:
            for task in (same := make_task(task_id="same"), make_task(task_id="other")):
                await TaskRepository(source).create(task)
            same.version = 0
            await TaskRepository(target).create(same)

    asyncio.run(fill())

    def run(*arguments: str) -> Any:
        return CliRunner().invoke(app, ["transfer", *map(str, places), *arguments])

    assert run().exit_code == 1
    assert run("--all", "--name", "x").exit_code == 1
    assert run("--all", "--dry-run").stdout == "2 tasks would be moved\n"
    done = run("--all")
    assert done.exit_code == 1
    assert done.stdout.startswith("1 task moved to ")
    assert "same stays: a task with id 'same' exists already" in done.stdout
