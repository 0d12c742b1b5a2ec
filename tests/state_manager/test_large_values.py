"""Large JSON: other coroutines run while it is checked, decoded and copied, and it has a limit."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Awaitable, Callable
from contextlib import suppress
from typing import Any

import orjson
import pytest
from conftest import Location, MakeNode, MakeTask

from openclaw_store import (
    Database,
    InvalidDataError,
    NodeRepository,
    StateManager,
    Task,
    TaskFilter,
    TaskRepository,
)
from openclaw_store.backends.postgresql import write_session
from openclaw_store.backends.postgresql.protocol import array
from openclaw_store.database import slices
from openclaw_store.database.slices import Slices
from openclaw_store.domain import Steps, large_json, records, validation

PIECE, SLICE, ELEMENTS = 512, 2048, 200

LARGE = {"a": [[number] for number in range(2000)]}

Call = Callable[[StateManager, Task], Awaitable[object]]


@pytest.fixture
def short_slices(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let `LARGE` take as many slices as a value of megabytes."""
    for module in (large_json, records):
        monkeypatch.setattr(module, "PIECE_BYTES", PIECE)
    monkeypatch.setattr(large_json, "_SMALLEST_PIECE", PIECE // 4)
    monkeypatch.setattr(slices, "_SLICE_BYTES", SLICE)
    monkeypatch.setattr(records, "SMALL_BYTES", PIECE // 4)
    monkeypatch.setattr(validation, "_ELEMENTS", ELEMENTS)


async def turns_of_others(work: Awaitable[object], each: Callable[[], object]) -> int:
    """Call `each` in every turn of the loop until `work` is done; return the number of turns."""
    turns = 0

    async def count() -> None:
        nonlocal turns
        while True:
            each()
            turns += 1
            await asyncio.sleep(0)

    counter = asyncio.create_task(count())
    await asyncio.sleep(0)
    with suppress(NotImplementedError):
        await work
    counter.cancel()
    return turns


@pytest.mark.parametrize(
    "call",
    [
        lambda manager, _: manager.get_task("0"),
        lambda manager, _: manager.get_pending_tasks(50),
        lambda manager, _: manager.claim_tasks("node", limit=5),
        lambda manager, _: manager.change_task("0", lambda one: setattr(one, "name", "new")),
        lambda manager, _: manager.task_repo.get("0"),
        lambda manager, _: manager.task_repo.list_pending_tasks(50),
        lambda manager, _: manager.get_all_nodes(),
        lambda manager, _: manager.list_nodes(),
        lambda manager, _: manager.list_waiting(50),
        lambda manager, _: manager.get_tasks(["0", "unknown", "1", "2"]),
        lambda manager, _: manager.task_repo.get_tasks(["0", "unknown", "1", "2"]),
        lambda manager, _: manager.list_tasks(),
        lambda manager, _: manager.change_tasks(
            TaskFilter.everything(), lambda one: setattr(one, "name", "new")
        ),
    ],
)  # fmt: skip
async def test_no_turn_of_the_loop_decodes_more_than_a_slice(
    short_slices: None, manager: StateManager, make_task: MakeTask, make_node: MakeNode,
    monkeypatch: pytest.MonkeyPatch, call: Call,
) -> None:  # fmt: skip
    """5 million empty lists once stopped the loop for seconds, at each `get_task`."""
    tags = [f"a tag of 20 bytes {number}" for number in range(1000)]
    await manager.add_node(make_node(node_id="node", tags=tags))
    for id in ("0", "1", "2"):
        task = make_task(task_id=id, parameters=LARGE)
        await manager.add_task(task)
    most_of_a_slice = {"a": ["x" * (SLICE - PIECE)]}
    await manager.add_tasks([make_task(parameters=most_of_a_slice) for _ in range(5)])
    decoded, most = 0, 0

    def loads(text: bytes) -> Any:
        nonlocal decoded
        decoded += len(text)
        return orjson.loads(text)

    def begin_turn() -> None:
        nonlocal decoded, most
        most, decoded = max(most, decoded), 0

    class Decoder:
        JSONDecodeError = orjson.JSONDecodeError

    Decoder.loads = staticmethod(loads)  # type: ignore[attr-defined]
    monkeypatch.setattr(large_json, "orjson", Decoder)
    monkeypatch.setattr(records, "_loads", loads)

    await turns_of_others(call(manager, task), begin_turn)
    begin_turn()

    assert 0 < most <= 2 * SLICE


@pytest.mark.sqlite
@pytest.mark.parametrize(
    "call",
    [
        lambda manager, task: manager.add_task(task),
        lambda manager, task: manager.add_tasks([task]),
        lambda manager, task: manager.submit_task(task),
        lambda manager, task: manager.update_task(task),
        lambda manager, task: manager.complete_task(task, LARGE),
        lambda manager, task: manager.task_repo.create(task),
        lambda manager, task: manager.task_repo.update(task),
        lambda manager, task: manager.task_repo.complete(task, LARGE),
    ],
)
async def test_no_turn_of_the_loop_checks_more_than_some_elements(
    short_slices: None, manager: StateManager, make_task: MakeTask,
    monkeypatch: pytest.MonkeyPatch, call: Call,
) -> None:  # fmt: skip
    task = make_task(parameters=LARGE)

    def write(*_: object) -> None:
        raise NotImplementedError  # the turns until here are those of the checks

    monkeypatch.setattr(manager.db, "write", write)

    assert await turns_of_others(call(manager, task), lambda: None) >= 4000 // ELEMENTS


async def test_long_computations_of_a_loop_take_turns() -> None:
    """Their pauses would add up otherwise."""
    order: list[str] = []

    def steps(name: str) -> Steps[str]:
        for _ in range(3):
            order.append(name)
            yield
        return name

    shared = Slices()

    assert [*await asyncio.gather(shared.run(steps("a")), shared.run(steps("b")))] == ["a", "b"]
    assert "".join(order) == "abaabb"


class TestLimit:
    """`Database(max_json_bytes=…)`."""

    async def test_longer_value_is_refused(
        self, database: Database, location: Location, make_task: MakeTask, make_node: MakeNode
    ) -> None:
        async with Database(location, max_json_bytes=100) as limited:
            tasks, nodes = TaskRepository(limited), NodeRepository(limited)
            await nodes.create(make_node(node_id="node", tags=["x" * 96]))
            await tasks.create(make_task(task_id="task"))
            [claimed] = await tasks.claim("node")
            with pytest.raises(InvalidDataError, match=r"larger than 100 bytes.*max_json_bytes"):
                await tasks.create(make_task(parameters={"a": "x" * 93}))
            with pytest.raises(InvalidDataError, match="tags: is larger than 100 bytes"):
                await nodes.update(make_node(node_id="node", tags=["x" * 97]))
            with pytest.raises(InvalidDataError, match="result: is larger than 100 bytes"):
                await tasks.complete(claimed, "x" * 99)
            async with StateManager(limited, None) as manager:
                assert isinstance(
                    (await manager.add_tasks([make_task(metadata={"a": "x" * 93})]))[0],
                    InvalidDataError,
                )
                await manager.complete_task(claimed, "x" * 98)

    @pytest.mark.parametrize("by_manager", [True, False])
    async def test_longer_value_stays_when_the_limit_is_lowered(
        self, database: Database, location: Location, make_task: MakeTask, *, by_manager: bool
    ) -> None:
        parameters = {"a": "x" * 200}
        await TaskRepository(database).create(make_task(task_id="task", parameters=parameters))

        async with Database(location, max_json_bytes=100) as limited:
            calls: Any = TaskRepository(limited)
            if by_manager:
                calls = manager = StateManager(limited, None)
                await manager.initialize()
            get = calls.get_task if by_manager else calls.get
            update = calls.update_task if by_manager else calls.update
            task = await get("task")
            assert task.parameters == parameters
            task.name = "renamed"
            await update(task)
            task.parameters["a"] += "x"
            with pytest.raises(InvalidDataError, match="parameters: is larger than 100 bytes"):
                await update(task)
            assert (await get("task")).name == "renamed"
            if by_manager:
                await manager.shutdown()

    @pytest.mark.parametrize("limit", [0, (16 << 20) + 1, 1.5, "1"])
    def test_limit_out_of_range_is_refused(self, limit: Any) -> None:
        with pytest.raises(InvalidDataError, match="max_json_bytes: must be"):
            Database(":memory:", max_json_bytes=limit)


@pytest.mark.postgresql
async def test_large_rows_of_a_transaction_are_converted_on_a_thread(
    database: Database, make_task: MakeTask, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A copy of 15 MiB of JSON stopped the loop for 0.1 s."""
    threads = set[int]()

    def convert(values: Any) -> Any:
        if "xxx" in str(values):
            threads.add(threading.get_ident())
        return array(values)

    monkeypatch.setattr(write_session, "array", convert)
    for length, is_elsewhere in ((1000, False), (write_session._LARGE, True)):
        task = make_task(parameters={"text": "x" * length})
        async with database.transaction() as tx:
            threads.clear()
            await TaskRepository(tx).create(task)
        [thread] = threads
        assert (thread != threading.get_ident()) == is_elsewhere
        assert await TaskRepository(database).get(task.task_id) == task
