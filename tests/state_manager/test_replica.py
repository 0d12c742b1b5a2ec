"""Memory stays in step with the database where commits, heartbeats and unsaved entries cross."""

from __future__ import annotations

import asyncio
from contextlib import suppress
from typing import Any

import pytest
from conftest import FakeClock, Location, MakeNode, MakeTask, OpenManager, execute

from openclaw_store import InvalidDataError, StateManager, TaskStatus
from openclaw_store.state_manager import change_feed


async def test_large_task_added_again_stays_in_memory(
    manager: StateManager,
    make_task: MakeTask,
    open_manager: OpenManager,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Planted: the removal by another process is taken for the last change of the task."""
    monkeypatch.setattr(change_feed, "PAGE_BYTES", 40_000)
    other = await open_manager()
    large = {"text": "x" * 30_000}
    await other.add_task(make_task(task_id="t", metadata=large))
    await manager.refresh_from_database()
    await other.remove_task("t")
    await manager.add_task(make_task(task_id="t", metadata=large))

    await manager.refresh_from_database()

    assert [task.task_id for task in await manager.get_pending_tasks()] == ["t"]
    assert list((await manager.get_state()).tasks) == ["t"]


async def test_heartbeat_of_the_same_turn_wins_over_the_search_for_silent_nodes(
    manager: StateManager,
    make_task: MakeTask,
    make_node: MakeNode,
    clock: FakeClock,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Planted: whether a heartbeat waits is looked at before the command is on its way."""
    await manager.add_node(make_node(node_id="n", last_heartbeat=clock()))
    await manager.add_task(make_task(task_id="t"))
    await manager.claim_tasks("n")
    clock.advance(seconds=300)
    gather = asyncio.gather

    def gather_later(*work: Any, **options: Any) -> Any:
        """Let the heartbeat arrive between the call of `gather` and the first turn of its tasks."""
        with suppress(StopIteration):
            manager.update_heartbeat("n").send(None)
        return gather(*work, **options)

    monkeypatch.setattr(asyncio, "gather", gather_later)
    recovery = await manager.recover(timeout_seconds=120)
    monkeypatch.undo()

    assert not recovery
    task = await manager.get_task("t")
    assert task is not None
    assert task.status is TaskStatus.SCHEDULED


async def test_unsaved_node_is_written_before_a_step_of_its_stored_task(
    manager: StateManager, make_task: MakeTask, make_node: MakeNode, open_manager: OpenManager
) -> None:
    """Planted: the node is looked up in an unsaved task, which then loses to newer data."""
    other = await open_manager()
    await manager.add_node(make_node(node_id="n"))
    await manager.add_task(make_task(task_id="t"))
    [task] = await manager.claim_tasks("n")
    await manager.start_task(task)
    await other.refresh_from_database()
    task = await manager.get_task("t")  # type: ignore[assignment]  # it is there
    task.status, task.assigned_node = TaskStatus.PENDING, None
    await manager.update_task(task, persist=False)
    node = await manager.get_node("n")
    assert node is not None
    node.tags = ["mine"]
    await manager.update_node(node, persist=False)
    await other.change_task("t", lambda task: task.metadata.update(x=1))

    await manager.cancel_task("t")
    await manager.sync_to_database()

    node = await manager.get_node("n")
    assert node is not None
    assert node.tags == ["mine"]


@pytest.mark.sqlite  # PostgreSQL refuses such JSON
async def test_node_that_cannot_be_read_leaves_the_counts_right(
    location: Location,
    manager: StateManager,
    make_task: MakeTask,
    make_node: MakeNode,
    open_manager: OpenManager,
) -> None:
    """Planted: the batch is counted, and again after the error; the node is counted as gone."""
    await manager.add_node(make_node(node_id="n", available_skills=["s"]))
    other = await open_manager()
    await manager.add_task(make_task())
    await manager.change_node("n", lambda node: node.tags.append("x"))
    execute(location, "UPDATE nodes SET available_skills = '[no'")

    for _ in range(3):
        with suppress(InvalidDataError):
            await other.refresh_from_database()

    assert (await other.get_task_stats())["total"] == 1
    assert (await other.get_node_stats())["total"] == 1


BY_HAND = ['[["x"]]', '[{"x": 1}, "s"]', "3", "null", '{"s": 1}']


@pytest.mark.parametrize("text", BY_HAND)
async def test_node_whose_skills_are_no_list_of_text_has_only_its_text(
    location: Location,
    manager: StateManager,
    make_node: MakeNode,
    open_manager: OpenManager,
    text: str,
) -> None:
    await manager.add_node(make_node(node_id="n", available_skills=["s"]))
    execute(location, f"UPDATE nodes SET available_skills = '{text}'")

    other = await open_manager()

    has_text = text.startswith("[{")
    found = await other.find_nodes_by_skill("s")
    assert [node.node_id for node in found] == (["n"] if has_text else [])
