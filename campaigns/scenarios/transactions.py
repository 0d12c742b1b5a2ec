"""Processes that write to several clusters are killed: no transaction is half, no task is twice.

A child makes transactions of one kind until it is killed at a random moment: over clusters of one
server, in two phases over two servers and a file, or transfers; or it resolves transactions that it
has left in doubt itself. Then `resolve` and the next transfer must end everything: each transaction
is in all of its clusters or in none, and each task of a transfer is in exactly one.
"""

from __future__ import annotations

import asyncio
import itertools
import signal
from collections import Counter
from collections.abc import AsyncIterator, Iterator, Mapping
from contextlib import AsyncExitStack, ExitStack, asynccontextmanager, contextmanager, suppress
from typing import Any
from unittest.mock import patch

from sqlalchemy import select, text

from campaigns.faults.children import Child
from campaigns.harness.campaign import POSTGRESQL, SQLITE, Campaign, Run
from campaigns.harness.direct_access import wait_until_disconnected
from openclaw_store import (
    Database,
    NodeInfo,
    NodeRepository,
    Task,
    TaskFilter,
    TaskRepository,
    TaskType,
    resolve,
    transaction,
    transfer,
    verify,
)
from openclaw_store.clusters import transfers
from openclaw_store.clusters.two_phase import TwoPhaseCommit
from openclaw_store.database import DecisionRow, IncomingRow, OutgoingRow

KILLS_A_DATABASE = 25
"""Kills before new databases are begun, since the check of larger ones takes longer."""

TASKS_A_ROUND = 20

_LONGEST_SECONDS = 1.0
"""Seconds after it has opened its databases at which a process is killed at the latest."""

Places = Mapping[str, tuple[str, str | None]]
"""The location and the cluster of each database, by a name."""

KINDS = {
    POSTGRESQL: ("two phases", "one server", "transfer", "resolver"),
    SQLITE: ("transfer",),
}
"""What the children do, in turn."""

_KINDS_WITH_BUGS = {
    "one-after-the-other": "one server",
    "resolve-without-asking": "resolver",
    "arrival-is-not-noted": "transfer",
}


class _LeftError(BaseException):
    """A transaction is left in doubt."""


@asynccontextmanager
async def _opened(places: Places) -> AsyncIterator[dict[str, Database]]:
    async with AsyncExitStack() as stack:
        yield {
            name: await stack.enter_async_context(Database(place, cluster=cluster))
            for name, (place, cluster) in places.items()
        }


async def work(send: Any, places: Places, kind: str, seed: int) -> None:
    """Write until killed; send the identifiers of what is committed."""
    async with _opened(places) as databases:
        send(None)
        works = {"resolver": _leave_and_resolve, "transfer": _transfer}
        await works.get(kind, _write)(send, databases, kind, seed)


async def _write(send: Any, databases: dict[str, Database], kind: str, seed: int) -> None:
    for number in itertools.count():
        chosen = _participants(databases, kind, number)
        await _add(f"{seed}-{number}", chosen, kind)
        send(f"{seed}-{number}", len(chosen))


def _participants(databases: dict[str, Database], kind: str, number: int) -> list[Database]:
    names: tuple[str, ...] = ("berlin", "tokyo")
    if kind != "one server":
        names = (("berlin", "paris"), ("berlin", "file"), ("berlin", "paris", "file"))[number % 3]
    return [databases[name] for name in names]


async def _add(id: str, databases: list[Database], kind: str) -> None:
    """Add one task to each database, all in one transaction."""
    is_two_phase = kind != "one server"
    async with transaction(*databases, two_phase=is_two_phase) as sessions:
        for tx in sessions:
            task = Task.create(TaskType.BATCH, f"{len(databases)}", task_id=id)
            await TaskRepository(tx).create(task)


async def _leave_and_resolve(
    send: Any, databases: dict[str, Database], kind: str, seed: int
) -> None:
    async def leave(*_: object) -> None:
        raise _LeftError

    async def stay(*_: object) -> None:
        return None

    for number in itertools.count():
        moment = "_commit" if number % 2 else "_decide"
        chosen = _participants(databases, kind, number)
        with (
            patch.object(TwoPhaseCommit, moment, leave),
            patch.object(TwoPhaseCommit, "_roll_back", stay),
            suppress(_LeftError),
        ):
            await _add(f"{seed}-{number}", chosen, kind)
        if number % 2:
            send(f"{seed}-{number}", len(chosen))
        await resolve(*databases.values(), older_than=0)


async def _transfer(send: Any, databases: dict[str, Database], kind: str, seed: int) -> None:
    """Add tasks here and there, let nodes claim some, and transfer the rest to and fro."""
    transfers.BATCH_TASKS = 7
    pair = [databases[name] for name in ("berlin", "paris")]
    for number in itertools.count():
        source, target = pair[number % 2], pair[1 - number % 2]
        tasks, node = (
            TaskRepository(source),
            NodeInfo(f"node-{number}", "host", max_concurrent_tasks=3),
        )
        for place in range(TASKS_A_ROUND):
            id = f"{seed}-{number}-{place}"
            await tasks.create(Task.create(TaskType.BATCH, "kill", task_id=id))
            send(id, 1)
            if place % 2:
                await tasks.cancel(id)
        await NodeRepository(source).register(node)
        for task in await tasks.claim(node.node_id, 3):
            await tasks.complete(task)
        await transfer(source, target, TaskFilter.everything())


def perform(run: Run) -> None:
    """Make `run.rounds` kills."""
    chosen = [_KINDS_WITH_BUGS[run.bug]] if run.bug else KINDS[run.kind]
    kinds = itertools.cycle(chosen)
    for kills in run.parts(KILLS_A_DATABASE):
        with _places(run) as places:
            known: dict[str, Counter[str]] = {kind: Counter() for kind in chosen}
            for number in range(kills):
                kind = next(kinds)
                known[kind] += _kill(run, places, kind, run.completed * 1000 + number)
                asyncio.run(_check(run, places, known))
                run.done()


@contextmanager
def _places(run: Run) -> Iterator[Places]:
    """Provide the databases; each has a number of its own, unlike copies of one file."""
    with ExitStack() as stack:
        one, two = (stack.enter_context(run.location(migrated=False)) for _ in range(2))
        folder = run.folder / f"files-{run.completed}"
        if run.kind == SQLITE:
            yield {"berlin": (str(one), None), "paris": (str(two), None)}
        else:
            yield {
                "berlin": (str(one), "berlin"),
                "tokyo": (str(one), "tokyo"),
                "paris": (str(two), "paris"),
                "file": (str(folder / "file.db"), None),
            }


def _kill(run: Run, places: Places, kind: str, seed: int) -> Counter[str]:
    """Let a process work, and kill it; return what it has acknowledged, with its numbers."""
    known: Counter[str] = Counter()
    delay = run.random.random() * _LONGEST_SECONDS
    with Child(work, places, kind, seed, errors=run.folder / "errors", bug=run.bug) as child:
        messages = child.messages()
        next(messages)  # the databases are open
        asyncio.run(asyncio.sleep(delay))
        child.kill()
        for id, number in messages:
            known[id] = number
        if child.wait() != -signal.SIGKILL:
            run.wrong(f"a process has ended by itself: {child.complaint}")
    if run.kind == POSTGRESQL:
        for place in {place for place, _ in places.values() if "://" in place}:
            wait_until_disconnected(place)
    run.counts.acknowledged += len(known)
    return known


async def _check(run: Run, places: Places, known: dict[str, Counter[str]]) -> None:
    async with _opened(places) as databases:
        if run.kind == POSTGRESQL:
            found = await resolve(*databases.values(), older_than=0)
            run.check(bool(found), f"in doubt: {found.left}")
        pair = databases["berlin"], databases["paris"]
        only_resume = TaskFilter(name_contains="no task has this name")
        for source, target in (pair, pair[::-1]):
            await transfer(source, target, only_resume)
        where: dict[str, list[Task]] = {}
        for database in databases.values():
            async for task in TaskRepository(database).iter_tasks():
                where.setdefault(task.task_id, []).append(task)
        for kind, ids in known.items():
            for id in sorted(ids.keys() - where.keys()):
                run.lost(f"{id} of {kind} is nowhere")
        for id, tasks in sorted(where.items()):
            wanted = 1 if tasks[0].name == "kill" else int(tasks[0].name)
            problem = "twice" if len(tasks) > wanted else "half"
            run.check(
                len(tasks) == wanted, f"{id} is {problem}: in {len(tasks)} of {wanted} clusters"
            )
        for name, database in databases.items():
            run.check(not await _rest(database), f"rows of transactions are left in {name}")
            for remark in (await verify(database)).problems:
                run.wrong(f"{name}: {remark.text}")


async def _rest(database: Database) -> int:
    """Return the number of rows and prepared transactions that are left."""
    async with database.session() as session:
        left = 0
        for row in (OutgoingRow, IncomingRow, DecisionRow):
            left += len((await session.execute(select(*row.__table__.primary_key))).all())
        if database.dialect == "postgresql":
            count = "SELECT count(*) FROM pg_prepared_xacts WHERE database = current_database()"
            left += await session.scalar(text(count)) or 0
        return left


CAMPAIGN = Campaign(
    name="transactions",
    title="processes that write to several clusters are killed",
    promises=("P1", "P2"),
    perform=perform,
    rounds=300,
    quick_rounds=2,
    unit="kills",
    kinds=(POSTGRESQL, SQLITE),
    rounds_of={SQLITE: 100},
    bugs={
        "one-after-the-other": "is half",
        "resolve-without-asking": "is half",
        "arrival-is-not-noted": "is twice",
    },
)
