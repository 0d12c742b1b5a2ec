"""Repairs of what `verify` finds wrong: through the ordinary write path, so that the feed tells.

Each repair looks again, inside the write transaction, and does nothing that is not needed (any
more). What a repair writes is a change like any other: caches follow it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from sqlalchemy import func, select, text, update
from sqlalchemy.ext.asyncio import AsyncSession

from openclaw_store.database import (
    IS_ASSIGNED,
    ROWS,
    ChangeRow,
    CounterRow,
    Database,
    TaskRow,
    history_of,
)
from openclaw_store.domain import ENTITY_NAMES, NodeInfo, Record, Task, arrived
from openclaw_store.errors import InvalidDataError
from openclaw_store.maintenance.progress import Progress
from openclaw_store.repositories import NodeRepository, Row, SingleRowCommand, TaskRepository, apply

REASON = "repaired"
"""What the feed tells of a repair."""

REPAIRS_A_BATCH = 50
"""Repairs of one transaction."""


@dataclass(slots=True)
class Rewrite(SingleRowCommand):
    """Write values into a row that was read in the same transaction."""

    kind: type[Any]
    id: str
    values: Mapping[str, Any]
    """None of them JSON."""
    after: tuple[int, str | None] | None = None
    """Revision (0 for none) and status of the change that this one follows, where the row lies."""

    def decide(self, row: Row) -> bool:
        record = row.content()
        assert record is not None  # it was read
        if self.after is not None:
            row.version, row.status = self.after
        row.write(record.evolve(**self.values), self.values, REASON)
        return True


@dataclass(slots=True)
class Farewell(SingleRowCommand):
    """Tell the feed that a row is gone, which nobody has told it."""

    kind: type[Any]
    id: str
    after: tuple[int, str | None]
    """Revision and status of its last change."""

    def decide(self, row: Row) -> bool:
        if row.stored:
            return False
        row.version, row.status = self.after
        row.remove(with_history=False)
        return True


class Repair(Protocol):
    """What can be done about a problem."""

    async def do(self, database: Database, tx: AsyncSession) -> bool:
        """Do it, in a transaction; returns whether the problem is solved."""


@dataclass(frozen=True, slots=True)
class Recount:
    """Count the tasks that a node holds."""

    node_id: str

    async def do(self, database: Database, tx: AsyncSession) -> bool:
        """Write the number, if it is another one."""
        record = await NodeRepository(tx).get_record(self.node_id)
        query = select(func.count()).where(TaskRow.assigned_node == self.node_id, IS_ASSIGNED)
        held = await tx.scalar(query) or 0
        if record is not None and record.running_tasks != held:
            operation = Rewrite(NodeInfo, self.node_id, {"running_tasks": held})
            await database.write_in(tx, apply, operation)
        return True


@dataclass(frozen=True, slots=True)
class Stamp:
    """Tell when a task came into the state it is in, by the feed; else, when it was written."""

    task_id: str

    async def do(self, database: Database, tx: AsyncSession) -> bool:
        """Write the time, if there is none."""
        record = await TaskRepository(tx).get_record(self.task_id)
        if record is None:
            return True
        since = record.updated_at
        for change in await tx.execute(
            history_of(record.version, ENTITY_NAMES[Task], self.task_id)
        ):
            if change.from_status != change.to_status:
                since = change.changed_at
                break
        values = arrived(record, since)
        if values:
            await database.write_in(tx, apply, Rewrite(Task, self.task_id, values))
        return True


@dataclass(frozen=True, slots=True)
class Announce:
    """Write a row anew as it is, since it was changed past the feed."""

    kind: type[Any]
    id: str
    version: int
    """That it had."""
    last: int | None
    """Revision of its last change, if the feed has it."""

    async def do(self, database: Database, tx: AsyncSession) -> bool:
        """Have a change follow the last one, unless somebody else has written the row."""
        repository = TaskRepository(tx) if self.kind is Task else NodeRepository(tx)
        record: Record[Any] | None = await repository.get_record(self.id)
        if record is None or record.version != self.version:
            return False
        after: tuple[int, str | None] = (0, record.status.value)
        if self.last is not None:
            query = select(ChangeRow.to_status).where(ChangeRow.revision == self.last)
            after = self.last, await tx.scalar(query)
        await database.write_in(tx, apply, Rewrite(self.kind, self.id, {}, after))
        return True


@dataclass(frozen=True, slots=True)
class Bury:
    """Tell the feed that a task or node is gone, which it still has for alive."""

    kind: type[Any]
    id: str
    last: int
    """Revision of its last change."""

    async def do(self, database: Database, tx: AsyncSession) -> bool:
        """Have its removal follow the last change, unless it is there again."""
        query = select(ChangeRow.to_status).where(ChangeRow.revision == self.last)
        operation = Farewell(self.kind, self.id, (self.last, await tx.scalar(query)))
        is_buried: bool = await database.write_in(tx, apply, operation)
        return is_buried


@dataclass(frozen=True, slots=True)
class Raise:
    """Bring the counters to what was counted with them already."""

    async def do(self, database: Database, tx: AsyncSession) -> bool:
        """Raise them, but never lower them."""
        heartbeats = await tx.scalar(select(func.max(ROWS[NodeInfo].__table__.c.beat))) or 0
        newest = await tx.scalar(select(func.max(ChangeRow.revision))) or 0
        counters = (await tx.execute(select(CounterRow.revision, CounterRow.beat))).one()
        values = {
            "revision": max(newest, counters.revision),
            "beat": max(heartbeats, counters.beat),
        }
        await tx.execute(update(CounterRow).where(text("id = 1")).values(values))
        return True


# The feed must be right before others read it, and go on from it.
ORDER: Sequence[type[Repair]] = (Raise, Announce, Bury, Recount, Stamp)


async def mend(
    database: Database, repairs: Mapping[int, Repair], progress: Progress
) -> dict[int, bool]:
    """Do repairs, some of them in each transaction, so that others write in between.

    Returns:
        Whether each of the problems is solved.
    """
    solved: dict[int, bool] = {}
    for kind in ORDER:
        places = [place for place, repair in repairs.items() if type(repair) is kind]
        for start in range(0, len(places), REPAIRS_A_BATCH):
            batch = places[start : start + REPAIRS_A_BATCH]
            async with database.transaction() as tx:
                for place in batch:
                    try:
                        solved[place] = await repairs[place].do(database, tx)
                    except InvalidDataError:  # the row became unreadable meanwhile
                        solved[place] = False
            progress.add(len(batch))
    return solved
