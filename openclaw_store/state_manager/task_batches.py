"""Batches of new tasks: `add_tasks` checks one while it writes the one before."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterator
from itertools import islice
from operator import itemgetter
from typing import NamedTuple

from openclaw_store.database import Database
from openclaw_store.domain import STAMPED, Raw, Task
from openclaw_store.errors import InvalidDataError, StoreError
from openclaw_store.repositories import PART_SIZE, TaskRepository, admit_entity, row_of
from openclaw_store.state_manager.replica import Replica

ADD_BATCH_SIZE = 1000
"""Maximum number of tasks in one transaction."""

SHARED_BATCH_SIZE = PART_SIZE
"""The maximum while other callers write, since they wait. Small batches cost more for each task."""

CHECK_SLICE_SIZE = 100
"""Number of tasks checked before other coroutines run."""

_STAMPED = STAMPED[Task]
_times = itemgetter(*_STAMPED[:-2])
assert _STAMPED[-2:] == ("updated_at", "version")


class TaskBatch(NamedTuple):
    """Tasks to write in one transaction."""

    outcomes: list[StoreError | None]
    """The refusal of each task; `None` for each valid one."""
    tasks: list[Task]
    """The valid tasks."""
    rows: list[Raw]
    times: list[Raw]
    """The times of the valid tasks, in UTC."""


async def admit_batch(
    repository: TaskRepository, database: Database, tasks: Iterator[Task]
) -> TaskBatch:
    """Check the next tasks; other coroutines run meanwhile."""
    batch = TaskBatch([], [], [], [])
    size = SHARED_BATCH_SIZE if database.has_other_writers() else ADD_BATCH_SIZE
    for task in islice(tasks, size):
        if len(batch.outcomes) % CHECK_SLICE_SIZE == CHECK_SLICE_SIZE - 1:
            await asyncio.sleep(0)
        try:
            record = await admit_entity(repository, task, is_new=True)
        except InvalidDataError as error:
            batch.outcomes.append(error)
        else:
            batch.outcomes.append(None)
            batch.tasks.append(task)
            batch.rows.append(row_of(database.statements, record))
            batch.times.append(_times(record.__dict__))
    return batch


async def after_others(admit: Callable[[], Awaitable[TaskBatch]]) -> TaskBatch:
    """Check the next tasks when the writer has begun with the batch before."""
    # Its caller submits that batch in the meantime.
    await asyncio.sleep(0)
    return await admit()


async def insert_batch(replica: Replica, batch: TaskBatch) -> None:
    """Write a batch, and enter the refusals into its outcomes."""
    if not batch.rows:
        return
    refusals, version, at = await replica.insert_tasks(batch.rows)
    valid = zip(batch.tasks, batch.times, refusals, strict=True)
    for index, outcome in enumerate(batch.outcomes):
        if outcome is None:
            task, times, refusal = next(valid)
            if refusal is None:
                version += 1
                task.__dict__.update(zip(_STAMPED, (*times, at, version), strict=True))
            batch.outcomes[index] = refusal
