"""How many bytes a task takes on the disk, with all indexes."""

# ruff: noqa: ASYNC240 - a test may block its loop

from __future__ import annotations

import asyncio
import random
from pathlib import Path

import pytest
from conftest import FakeClock

from openclaw_store import Database, StateManager, Task, TaskPriority, TaskStatus, TaskType

TASKS = 4000


@pytest.mark.parametrize(
    ("with_history", "most"), [(False, 520 + 80), (True, 880)], ids=["created", "lived"]
)
async def test_task_is_small(
    tmp_path: Path, clock: FakeClock, migrated_sqlite: Path, with_history: bool, most: int
) -> None:
    """Nine of ten tasks are finished; one that was only created has one change (80 bytes)."""
    chance = random.Random(1)
    path = tmp_path / "cluster.db"
    async with StateManager(Database(path, clock=clock)) as manager:

        async def live(number: int) -> None:
            task = realistic_task(number, chance)
            finished = number % 10 != 0
            steps = [TaskStatus.SCHEDULED, TaskStatus.RUNNING, TaskStatus.COMPLETED]
            if with_history:
                await manager.add_task(task)
            for status in steps if finished else ():
                advance(task, status, clock, chance)
                if with_history:
                    await manager.update_task(task)
            if not with_history:
                await manager.add_task(task)

        for start in range(0, TASKS, 500):
            clock.advance(seconds=60)
            await asyncio.gather(*[live(number) for number in range(start, start + 500)])

    assert (path.stat().st_size - migrated_sqlite.stat().st_size) / TASKS <= most


def realistic_task(number: int, chance: random.Random) -> Task:
    return Task.create(
        chance.choice(list(TaskType)),
        f"job_{number:06d}",
        f"process part {number} of the data set",
        chance.sample(["python", "data_processing", "gpu", "java", "docker", "etl"], 2),
        priority=chance.choice(list(TaskPriority)),
        user_id=f"user_{chance.randrange(100):03d}",
        parameters={
            "input": f"s3://bucket/part-{number:06d}.parquet",
            "batch_size": 256,
            "mode": "fast",
            "columns": ["id", "value"],
        },
        timeout=3600,
    )


def advance(task: Task, status: TaskStatus, clock: FakeClock, chance: random.Random) -> None:
    task.status = status
    if status is TaskStatus.SCHEDULED:
        task.assigned_node, task.scheduled_at = f"worker_{chance.randrange(128):03d}", clock()
    elif status is TaskStatus.RUNNING:
        task.started_at = clock()
    else:
        task.completed_at, task.result = clock(), {"rows": chance.randrange(10**6), "ok": True}
