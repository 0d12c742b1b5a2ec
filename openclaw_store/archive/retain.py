"""Apply a policy once, or count its rows: one predicate selects the rows for both."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from time import perf_counter
from typing import Any

from sqlalchemy import func, select

from openclaw_store.archive import module
from openclaw_store.archive.lease import leased
from openclaw_store.database import ChangeRow, Database
from openclaw_store.domain import Retention
from openclaw_store.repositories import (
    Policy,
    apply_together,
    compact_feed,
    count_old_tasks,
    old_revisions,
    remove_old_tasks,
)

Report = Callable[[str, int, int], object]
"""Receives the name of a step, the work done, and the total work; 0 if the total is unknown."""

_SAMPLE_ROWS = 2000
"""Tasks from which the bytes and the time of all of them are estimated."""


@dataclass
class Retained:
    """Rows that left the database, or would leave it."""

    tasks: int = 0
    changes: int = 0
    """Changes of the feed, and of the histories of tasks."""
    bytes: int = 0
    """Bytes of the files."""
    voids: int = 0
    """Tasks that were changed meanwhile, and stay; their copies are void."""
    skipped: list[str] = field(default_factory=list)
    """Identifiers of tasks that stay, as they have values that no file can hold."""
    seconds: float = 0.0


async def retain(
    database: Database,
    retention: Retention,
    *,
    patience: float = 0.0,
    report: Report | None = None,
) -> Retained:
    """Apply a policy once, after the runs that an earlier process has left unfinished.

    It can be interrupted at any time: the next call continues.

    Args:
        patience: Seconds to wait for another process that moves rows to or from an archive.
        report: Receives the progress.

    Raises:
        UnavailableError: If another process does so for longer, the archive cannot be used, or
            pyarrow is not installed.
    """
    began = perf_counter()
    mover = None if retention.archive is None else module("mover")
    async with leased(database, patience=patience):
        work = mover.move(database, retention, report) if mover else _delete(database, retention)
        done: Retained = await work
    done.seconds = perf_counter() - began
    return done


async def _delete(database: Database, retention: Retention) -> Retained:
    """Delete the old tasks and changes without an archive."""
    policy, done = _policy_of(database, retention), Retained()

    async def write(commands: Sequence[Any]) -> Sequence[Any]:
        began = perf_counter()
        results: Sequence[Any] = await database.write(apply_together, commands)
        await rest(perf_counter() - began, retention.load)
        return results

    if policy.cutoffs:
        done.tasks = await remove_old_tasks(database.read, write, policy)
    if retention.history is not None:
        done.changes = await compact_feed(database, retention.history.total_seconds() / 86_400)
    return done


def _policy_of(database: Database, retention: Retention) -> Policy:
    now = database.clock()
    return Policy(now, retention.cutoffs(now))


async def rest(worked: float, load: float) -> None:
    """Rest so long that the work takes this share of the time."""
    await asyncio.sleep(worked * (1 - load) / load)


async def plan(database: Database, retention: Retention) -> Retained:
    """Return what `retain` would move, and about how many bytes and seconds that takes.

    Nothing is written. Without an archive, the changes are those of the feed alone.
    """
    policy, expected = _policy_of(database, retention), Retained()
    if policy.cutoffs:
        expected.tasks = await database.read(partial(count_old_tasks, policy=policy))
    if expected.tasks and retention.archive is not None:
        began = perf_counter()
        rows, changes, size = await module("collect").sample(database, policy, _SAMPLE_ROWS)
        share = expected.tasks / max(rows, 1)
        expected.changes, expected.bytes = round(changes * share), round(size * share)
        # Deleting takes about as long as reading and encoding.
        expected.seconds = 2 * (perf_counter() - began) * share / retention.load
    if retention.history is not None:
        cutoff = policy.now - retention.history
        ends = [end async for end in old_revisions(database, policy.now, cutoff)]
        query = select(func.count()).where(ChangeRow.revision <= max(ends, default=0))
        expected.changes += await database.read(partial(_scalar, query=query))
    return expected


async def _scalar(session: Any, query: Any) -> int:
    return int(await session.scalar(query) or 0)
