"""Transfer tasks from one cluster to another, wherever it is, exactly once."""

from __future__ import annotations

import asyncio
import secrets
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

from sqlalchemy import select
from sqlalchemy.ext.asyncio import AsyncSession

from openclaw_store.backends import ended_badly
from openclaw_store.clusters.transit import (
    Arrival,
    Settlement,
    Traveller,
    arrive,
    departure,
    forget,
    settle,
    travellers_of,
)
from openclaw_store.database import Database, IncomingRow, OutgoingRow, cluster_id_of
from openclaw_store.domain import FINISHED, Record, Task, TaskFilter, TaskStatus, check_selection
from openclaw_store.encryption import Sealed
from openclaw_store.errors import InvalidDataError
from openclaw_store.repositories import TaskRepository, remove_tasks

BATCH_TASKS = 1000
"""Tasks that move together. Their transaction takes some hundredths of a second."""

BATCH_BYTES = 8 << 20
"""Bytes of JSON after which a batch is not extended."""

_MOVABLE = (TaskStatus.PENDING, *sorted(FINISHED))

_TRANSACTION_SECONDS = 60.0

Report = Callable[[str, int, int], object]
"""Takes the step, and the numbers of tasks that are done and in all."""


@dataclass
class Transferred:
    """The result of a transfer; true if no task was refused."""

    selected: int = 0
    """Number of pending and finished tasks that matched the filter."""
    moved: int = 0
    """Number of tasks that have arrived, also from an earlier call that left them in transit."""
    stayed: int = 0
    """Number of tasks that matched, but are claimed or running: they stay in the source."""
    returned: dict[str, str] = field(default_factory=dict)
    """The reason for each task that the target has refused, and that is in the source again."""
    in_transit: dict[str, str] = field(default_factory=dict)
    """The reason for each task that both have refused; the next call tries again."""

    def __bool__(self) -> bool:
        return not (self.returned or self.in_transit)


async def transfer(
    source: Database,
    target: Database,
    filter: TaskFilter,
    *,
    dry_run: bool = False,
    report: Report | None = None,
) -> Transferred:
    """Move the pending and finished tasks that match a filter to another cluster, exactly once.

    The clusters may be of any kind and anywhere, and both may be in use. A task can be claimed in
    one of them at most. Its history moves with it; its arrival is one new change of the target.
    After an interruption, call it again with the same clusters: it first completes what has left.

    Args:
        source: An open database.
        target: An open database.
        filter: At least one condition; `TaskFilter.everything()` selects all tasks.
        dry_run: Only count the tasks.
        report: Receives the progress.

    Raises:
        InvalidDataError: If a condition of the filter is invalid, or both are the same cluster.
        BackendError: If a cluster failed; what has left stays in transit until the next call.
    """
    checked = check_selection(filter, source.clock())
    numbers = [await cluster_id_of(one) for one in (source, target)]
    if numbers[0] == numbers[1]:
        raise InvalidDataError(
            "target",
            f"{target.db_path} has the number of the source's cluster: it is the source, or a copy "
            "of its file: give another",
        )
    passage = _Passage(source, target, *numbers)
    tasks, done = TaskRepository(source), passage.done
    wanted = checked.status if isinstance(checked.status, tuple) else tuple(TaskStatus)
    states = [status for status in _MOVABLE if status in wanted]
    others = tuple(status for status in wanted if status not in _MOVABLE)
    done.selected = await tasks.count_tasks(replace(checked, status=tuple(states)))
    if not dry_run:
        await passage.resume()
        seen = 0
        async with aclosing(passage):
            for status in states:
                async for part in _parts(tasks, replace(checked, status=(status,))):
                    await passage.move(part)
                    seen += len(part)
                    if report is not None:
                        report("moving tasks", seen, max(seen, done.selected))
            await passage.end()
    done.stayed = await tasks.count_tasks(replace(checked, status=others)) if others else 0
    return done


async def _parts(tasks: TaskRepository, filter: TaskFilter) -> AsyncIterator[list[Record[Task]]]:
    """Yield the tasks that match, in parts of bounded size."""
    after: str | None = None
    while True:
        page, after = await tasks.list_records(filter, after=after, limit=BATCH_TASKS)
        part: list[Record[Task]] = []
        size = 0
        for task in page:
            part.append(task)
            size += task.size
            if size > BATCH_BYTES:
                yield part
                part, size = [], 0
        if part:
            yield part
        if after is None:
            return


class _Passage:
    """The way of tasks from one cluster to another."""

    def __init__(self, source: Database, target: Database, source_id: int, target_id: int) -> None:
        self._source, self._target = source, target
        self._source_id, self._target_id = source_id, target_id
        self._settled: list[str] = []  # batches that the target may forget
        self._delivery: asyncio.Future[None] | None = None
        self.done = Transferred()

    async def move(self, tasks: Sequence[Record[Task]]) -> None:
        """Move tasks, unless they change meanwhile; their arrival may be later."""
        batch = secrets.token_hex(16)
        now = self._source.clock()
        prepare = partial(departure, tasks=tasks, batch=batch, target=self._target_id, now=now)
        removal = await self._source.read(lambda session: session.run_sync(prepare))
        # The next batch leaves while this one arrives, so that both clusters are at work.
        if any(await self._source.write(remove_tasks, removal)):
            await self._arrived()
            self._delivery = asyncio.ensure_future(self._deliver(batch))

    async def _arrived(self) -> None:
        if self._delivery is not None:
            await self._delivery

    async def resume(self) -> None:
        """Complete the batches that an earlier call has left in transit."""
        # The notes first: a batch that is not on its way afterwards was settled before.
        notes = select(IncomingRow.batch).where(IncomingRow.source == self._source_id)
        arrived = await self._target.read(partial(_scalars, query=notes))
        leaving = (
            select(OutgoingRow.batch)
            .where(OutgoingRow.target == self._target_id)
            .order_by(OutgoingRow.left_at, OutgoingRow.batch)
        )
        batches = await self._source.read(partial(_scalars, query=leaving))
        self._settled += [batch for batch in arrived if batch not in batches]
        for batch in batches:
            await self._deliver(batch)

    async def end(self) -> None:
        """Wait for the last batch, and remove the last notes."""
        await self._arrived()
        if self._settled:
            await self._target.write(forget, self._settled)

    async def aclose(self) -> None:
        """Stop a delivery after an error, or a cancellation; the next call resumes it."""
        if self._delivery is not None:
            self._delivery.cancel()
            await asyncio.wait([self._delivery])
            ended_badly(self._delivery)  # the caller has the first error

    async def _deliver(self, batch: str) -> None:
        async with self._target.transaction(timeout=_TRANSACTION_SECONDS) as tx:
            # Under the lock of the target: while the batch is on its way, its note is not removed,
            # so a missing note means that it has not arrived.
            travellers = await self._outgoing(batch)
            if travellers is None:  # another process has settled it
                return
            arrival = Arrival(batch, self._source_id, travellers, self._settled)
            refused: Mapping[str, str] = await self._target.write_in(tx, arrive, arrival)
        returning = [one for one in travellers if one.task[0] in refused]
        # After the commit of the target: until then, the row of the source is the only copy.
        settlement = Settlement(batch, returning, self._target_id, secrets.token_hex(16))
        left = await self._source.write(settle, settlement)
        self._settled = [batch]
        self.done.moved += len(travellers) - len(returning)
        self.done.in_transit.update(left)
        self.done.returned.update({id: why for id, why in refused.items() if id not in left})

    async def _outgoing(self, batch: str) -> list[Traveller] | None:
        query = select(OutgoingRow.tasks).where(OutgoingRow.batch == batch)
        for found in await self._source.read(partial(_scalars, query=query)):
            text = self._source.unseal(found, batch) if isinstance(found, Sealed) else found
            return travellers_of(text)
        return None


async def _scalars(session: AsyncSession, query: Any) -> list[Any]:
    return [*await session.scalars(query)]
