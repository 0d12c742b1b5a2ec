"""Repair: fix the problems that `verify` finds, through the ordinary write path.

Each repair checks its problem again inside the write transaction, and writes nothing if it is
gone. A repair is a change like any other, so the caches of running processes follow it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from sqlalchemy import func, select
from sqlalchemy.ext.asyncio import AsyncSession

from openclaw_store.database import (
    IS_ASSIGNED,
    ChangeRow,
    Database,
    TaskRow,
    history_of,
)
from openclaw_store.domain import ENTITY_NAMES, NodeInfo, Record, Task, missing_time
from openclaw_store.errors import InvalidDataError
from openclaw_store.maintenance.progress import Progress
from openclaw_store.repositories import Command, NodeRepository, Row, TaskRepository, apply

REASON = "repaired"
"""Reason of a repair in the feed."""

REPAIR_BATCH_SIZE = 50
"""Repairs in one transaction; other writers get their turn between two of them."""

ChangeEnd = tuple[int, str | None]
"""Revision of a change, 0 for none, and the status it leads to."""


@dataclass(slots=True)
class Rewrite(Command):
    """Write values into a row that was read in the same transaction."""

    kind: type[Any]
    id: str
    values: Mapping[str, Any]
    """New values of fields; none of them JSON."""
    after: ChangeEnd | None = None
    """The change that this one follows, if the row is wrong about it."""

    def decide(self, row: Row) -> bool:
        record = row.content()
        assert record is not None  # it was read
        if self.after is not None:
            row.version, row.status = self.after
        row.write(record.evolve(**self.values), self.values, REASON)
        return True


@dataclass(slots=True)
class LogRemoval(Command):
    """Add the missing removal of a row to the feed, unless the row exists."""

    kind: type[Any]
    id: str
    after: ChangeEnd
    """The last change of the row."""

    def decide(self, row: Row) -> bool:
        if row.stored:
            return False
        row.version, row.status = self.after
        row.remove(with_history=False)
        return True


class Repair(Protocol):
    """The repair of one problem."""

    async def run(self, database: Database, tx: AsyncSession) -> bool:
        """Repair in a transaction; return whether the problem is solved."""


@dataclass(frozen=True, slots=True)
class LogUpdate:
    """Log a change for a row that was changed past the feed, unless its version is a newer one."""

    kind: type[Any]
    id: str
    version: int
    """Version of the row when it was verified."""
    last: int | None
    """Revision of its last change, if the feed has it."""

    async def run(self, database: Database, tx: AsyncSession) -> bool:
        repository = TaskRepository(tx) if self.kind is Task else NodeRepository(tx)
        record: Record[Any] | None = await repository.get_record(self.id)
        # A newer version has its own change in the feed: nothing is left to repair.
        if record is None or record.version != self.version:
            return False
        after = (0, record.status.value) if self.last is None else await _change_end(tx, self.last)
        await database.write_in(tx, apply, Rewrite(self.kind, self.id, {}, after))
        return True


@dataclass(frozen=True, slots=True)
class RemoveFromFeed:
    """Log the removal of a task or node that exists only in the feed."""

    kind: type[Any]
    id: str
    last: int
    """Revision of its last change."""

    async def run(self, database: Database, tx: AsyncSession) -> bool:
        command = LogRemoval(self.kind, self.id, await _change_end(tx, self.last))
        is_removed: bool = await database.write_in(tx, apply, command)
        return is_removed


@dataclass(frozen=True, slots=True)
class CountTasks:
    """Set a node's `running_tasks` to the number of tasks assigned to it."""

    node_id: str

    async def run(self, database: Database, tx: AsyncSession) -> bool:
        # The write lock is held since the transaction began: no claim can change the count.
        record = await NodeRepository(tx).get_record(self.node_id)
        query = select(func.count()).where(TaskRow.assigned_node == self.node_id, IS_ASSIGNED)
        assigned = await tx.scalar(query) or 0
        if record is not None and record.running_tasks != assigned:
            command = Rewrite(NodeInfo, self.node_id, {"running_tasks": assigned})
            await database.write_in(tx, apply, command)
        return True


@dataclass(frozen=True, slots=True)
class SetStatusTime:
    """Set the time of a task's status: from the feed, or the time of its last write."""

    task_id: str

    async def run(self, database: Database, tx: AsyncSession) -> bool:
        record = await TaskRepository(tx).get_record(self.task_id)
        if record is None:
            return True
        history = history_of(record.version, ENTITY_NAMES[Task], self.task_id)
        since = next(
            (
                change.changed_at
                for change in await tx.execute(history)
                if change.from_status != change.to_status
            ),
            record.updated_at,
        )
        values = missing_time(record, since)
        if values:
            await database.write_in(tx, apply, Rewrite(Task, self.task_id, values))
        return True


# The feed comes first: the other repairs append to it.
ORDER: Sequence[type[Repair]] = (LogUpdate, RemoveFromFeed, CountTasks, SetStatusTime)


async def repair_problems(
    database: Database, repairs: Mapping[int, Repair], progress: Progress
) -> dict[int, bool]:
    """Run repairs in batches, and return whether each solved its problem, by its position."""
    solved: dict[int, bool] = {}
    for kind in ORDER:
        positions = [position for position, one in repairs.items() if type(one) is kind]
        for start in range(0, len(positions), REPAIR_BATCH_SIZE):
            batch = positions[start : start + REPAIR_BATCH_SIZE]
            async with database.transaction() as tx:
                for position in batch:
                    try:
                        solved[position] = await repairs[position].run(database, tx)
                    except InvalidDataError:  # the row became unreadable since it was verified
                        solved[position] = False
            progress.add(len(batch))
    return solved


async def _change_end(tx: AsyncSession, revision: int) -> ChangeEnd:
    query = select(ChangeRow.to_status).where(ChangeRow.revision == revision)
    return revision, await tx.scalar(query)
