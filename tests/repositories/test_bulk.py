"""Bulk insertion: what it costs SQLite's driver and the garbage collector."""

from __future__ import annotations

import asyncio
import gc
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from conftest import MakeNode, MakeTask

from openclaw_store import Database, StateManager, Task, TaskFilter
from openclaw_store.backends.sqlite.writing import Cursor
from openclaw_store.database import FIELDS
from openclaw_store.domain import Record

PARAMETERS = 32_766
"""The most that a SQLite built with its defaults takes in one statement."""


@pytest.fixture
def statements(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, Sequence[Any]]]:
    """The statements on SQLite, with their parameters."""
    sent: list[tuple[str, Sequence[Any]]] = []
    execute = Cursor.execute

    def noted(self: Cursor, sql: str, parameters: Sequence[Any] = ()) -> Sequence[Any]:
        sent.append((sql, parameters))
        return execute(self, sql, parameters)

    monkeypatch.setattr(Cursor, "execute", noted)
    return sent


def full_task(make_task: MakeTask, number: int) -> Task:
    """A task with a value in every column."""
    task = make_task(
        task_id=f"task-{number}",
        required_skills=["python"],
        optional_skills=["gpu"],
        parameters={"number": number},
        timeout=60,
        error="none yet",
        result=number,
        user_id="anna",
        idempotency_key=f"key-{number}",
        affinity_tags=["rack-1"],
        metadata={"number": number},
        assigned_node="n",
        traceparent="00-0af7651916cd43dd8448eb211c80319c-b7ad6b7169203331-01",
    )
    at = task.submitted_at
    task.scheduled_at = task.started_at = task.completed_at = task.not_before = at
    task.expires_at = task.cancel_requested_at = task.cancel_deadline_at = at
    return task


async def test_column_without_values_is_no_parameter(
    tmp_path: Path, make_task: MakeTask, statements: list[tuple[str, Sequence[Any]]]
) -> None:
    tasks = [
        make_task(task_id=f"task-{number}", user_id=None if number else "anna")
        for number in range(64)
    ]

    async with StateManager(Database(tmp_path / "cluster.db")) as manager:
        await manager.add_tasks(tasks)
        stored = await manager.task_repo.get_tasks(task.task_id for task in tasks)

    assert stored == tasks
    [[parameters]] = [[given] for sql, given in statements if "INTO tasks" in sql]
    assert len(parameters) % 64 == 0
    empty = [name for name in FIELDS[Task] if all(getattr(one, name) is None for one in tasks)]
    assert len(parameters) // 64 <= len(FIELDS[Task]) - len(empty)
    assert "error" in empty
    assert "user_id" not in empty


async def test_statement_has_no_more_parameters_than_any_sqlite_takes(
    tmp_path: Path, make_task: MakeTask, statements: list[tuple[str, Sequence[Any]]]
) -> None:
    tasks = [full_task(make_task, number) for number in range(1000)]

    async with StateManager(Database(tmp_path / "cluster.db")) as manager:
        assert not any(await manager.add_tasks(tasks))
        assert await manager.task_repo.get_tasks([tasks[999].task_id]) == [tasks[999]]

    counts = [len(given) for sql, given in statements if "INTO tasks" in sql]
    assert sum(counts) == 1000 * len(FIELDS[Task])
    assert max(counts) <= PARAMETERS


async def test_task_is_a_row_from_its_check_to_the_cache(
    manager: StateManager, make_task: MakeTask, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The collector tracks records, not rows of text and numbers: it would make a full pass."""
    original, found = manager.db.write, list[int]()

    def records() -> int:
        return sum(type(one) is Record for one in gc.get_objects())

    async def write(*operation: Any) -> Any:
        found.append(records())
        return await original(*operation)

    monkeypatch.setattr(manager.db, "write", write)
    tasks = [make_task(task_id=f"task-{number}") for number in range(2000)]
    before = records()

    assert not any(await manager.add_tasks(tasks))

    assert len(found) == 2
    assert max(found) - before < 100
    assert records() - before < 100


async def test_statements_with_texts_of_their_own_are_few(
    tmp_path: Path, make_task: MakeTask, statements: list[tuple[str, Sequence[Any]]]
) -> None:
    """Planted: each set of empty columns has one, and a connection keeps 128 of them."""
    optional: list[dict[str, Any]] = [
        {"user_id": "anna"},
        {"timeout": 1},
        {"error": "x"},
        {"max_retries": 1},
    ]
    async with StateManager(Database(tmp_path / "cluster.db")) as manager:
        for number in range(16):
            fields = [one for at, one in enumerate(optional) if number >> at & 1]
            given = {name: value for one in fields for name, value in one.items()}
            await manager.add_tasks([make_task(**given) for _ in range(16)])

    texts = {sql for sql, _ in statements if "INTO tasks" in sql}
    assert len(texts) <= 9


async def test_large_task_of_a_large_commit_is_not_encoded_for_the_cache(
    manager: StateManager, make_task: MakeTask
) -> None:
    """The event loop would wait for that."""
    large = make_task(parameters={"text": "x" * 10_000})
    await manager.add_tasks([large, *[make_task() for _ in range(150)]])

    await manager.cancel_tasks(TaskFilter.everything())

    entry = manager._replica.cache._finished[large.task_id]
    assert type(entry) is Record


@pytest.mark.parametrize("is_claim", [False, True])
async def test_tasks_of_a_large_commit_are_rows_until_they_are_read(
    manager: StateManager, make_task: MakeTask, make_node: MakeNode, *, is_claim: bool
) -> None:
    """A record costs each full pass of the collector some microseconds."""
    tasks = [make_task(task_id=f"task-{number}", parameters={"a": []}) for number in range(300)]
    await manager.add_node(make_node(node_id="n", max_concurrent_tasks=300))
    await manager.add_tasks(tasks)

    changed: Sequence[Task | None]
    if is_claim:
        changed = claimed = await manager.claim_tasks("n", 300)
    else:
        await manager.cancel_tasks(TaskFilter.everything())
        changed = await manager.task_repo.get_tasks(task.task_id for task in tasks)

    cache = manager._replica.cache
    entries = [*cache.tasks.entries.values(), *cache._finished.values()]
    assert len(entries) == 300
    # The commits of the last tasks may have been small.
    assert sum(type(one) is tuple for one in entries) >= 128
    ids = [task.task_id for task in tasks]
    assert await manager.get_tasks(ids) == await manager.task_repo.get_tasks(ids)
    assert {task.task_id: task.version for task in changed if task} == {
        id: record.version for id in ids if (record := cache.task(id))
    }
    if is_claim:
        done = await manager.complete_task(claimed[0])
        assert done == await manager.get_task(done.task_id)


@pytest.mark.parametrize("count", [1000, 1001])
async def test_long_list_leaves_rows_as_they_are(
    manager: StateManager, make_task: MakeTask, count: int
) -> None:
    await manager.add_tasks([make_task(task_id=f"task-{number:04}") for number in range(count)])

    first = await manager.get_pending_tasks(None)
    second = await manager.list_waiting(None)

    assert first == second == await manager.task_repo.list_pending_tasks(None)
    assert len(first) == count
    kept = [one for one in manager._replica.cache.tasks.entries.values() if type(one) is Record]
    assert len(kept) == (count if count == 1000 else 0)


async def test_long_list_is_of_one_moment(manager: StateManager, make_task: MakeTask) -> None:
    tasks = [make_task(task_id=f"task-{number:04}") for number in range(1001)]
    await manager.add_tasks(tasks)

    async def change() -> None:
        await asyncio.sleep(0)  # the list has begun
        for task in (tasks[0], tasks[-1]):
            task.name = "changed"
            await manager.update_task(task, persist=False)
        await manager.add_task(make_task(task_id="task-new"), persist=False)

    listed, _ = await asyncio.gather(manager.get_pending_tasks(None), change())

    assert [task.task_id for task in listed] == [task.task_id for task in tasks]
    assert not [task for task in listed if task.name == "changed"]
    assert (await manager.get_pending_tasks(None))[0].name == "changed"
