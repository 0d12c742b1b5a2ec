"""Two StateManagers on one database, driven at random against plain dictionaries."""

from __future__ import annotations

from pathlib import Path

import pytest
from conftest import EACH_KIND, MakeTask, OpenManager
from support.machines import Machine, run_machine

from openclaw_store import StaleVersionError, StateManager, TaskStatus


@pytest.mark.parametrize("kind", EACH_KIND)
def test_two_managers_on_one_database_behave_as_dictionaries(
    kind: str, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    # What is driven is mostly above the kinds.
    run_machine(Machine, kind, request, tmp_path, 30 if kind == "sqlite" else 10)


async def test_copy_of_what_another_manager_keeps_in_memory_is_stale(
    manager: StateManager, open_manager: OpenManager, make_task: MakeTask
) -> None:
    """Found by the machine: both gave their first unsaved entry the version -1."""
    other = await open_manager()
    mine, theirs = make_task(task_id="t", name="mine"), make_task(task_id="t", name="theirs")
    await manager.add_task(mine, persist=False)
    await other.add_task(theirs, persist=False)

    for persist in (True, False):
        with pytest.raises(StaleVersionError):
            await manager.update_task(theirs, persist=persist)

    assert await manager.get_task("t") == mine
    await other.remove_task("t")


async def test_counts_of_a_manager_that_lags_behind_are_never_negative(
    manager: StateManager, open_manager: OpenManager, make_task: MakeTask
) -> None:
    other = await open_manager()
    await manager.add_task(make_task(task_id="t"))
    await other.change_task("t", lambda task: setattr(task, "status", TaskStatus.RUNNING))

    await manager.remove_task("t")  # which it believes to be pending

    stats = await manager.get_task_stats()
    assert min(stats.values()) >= 0
    assert (await manager.get_state()).running_tasks >= 0
