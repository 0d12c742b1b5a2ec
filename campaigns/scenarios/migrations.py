"""Migrations of a full database, killed at random moments, and run by several processes at once.

A database with the first schema, one with today's, and (SQLite) one with the legacy hand-made
schema are filled by SQL with tasks, nodes and a feed. One is upgraded, downgraded, upgraded,
downgraded to nothing, and upgraded again. Then, in each round, a process upgrades, downgrades or
imports a copy, and is killed at a random moment; the copy must be at the one revision or at the
other, never between. Then the migration runs to its end, from time to time by two processes at
once. With fewer than 50 rounds, the databases are smaller: 400 tasks times the square of the
rounds.

The expected content comes from databases that were created at their revision directly, and filled
with the same rows. Tables, indexes, constraints and all rows are compared, without the library;
SQLite's `integrity_check` and PostgreSQL's `amcheck` check that the indexes contain every row.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import NamedTuple

from campaigns.checks.audit import verify_database
from campaigns.checks.contents import Contents, Reader
from campaigns.faults.children import Child, Send
from campaigns.harness.campaign import SQLITE, Campaign, Location, Run
from campaigns.harness.direct_access import wait_until_disconnected
from campaigns.workloads.filling import NOW, fill, fill_original
from openclaw_store import Database, StoreError
from openclaw_store.backends.factory import backend_of
from openclaw_store.database import migrations
from openclaw_store.errors import UnavailableError
from openclaw_store.testing import FakeClock

MOST_TASKS = 1_000_000

FIRST, HEAD, NOTHING = "0001", migrations.HEAD, "base"

BY_TWO_EVERY = 3
"""Every so many rounds, two processes finish the migration at once. The number has no factor in
common with the number of turns, so that each kind of migration is among them.
"""

Read = Callable[[Location], Contents]

_PATIENCE_SECONDS = 3600.0
"""Seconds for which a migration waits for another one, with as many rows."""


class Work(NamedTuple):
    """A migration to be killed."""

    name: str
    do: Callable[[str], None]
    """Runs it on the database at a location."""
    child: Callable[[Send, str], None]
    """Runs it in a child process."""
    source: Location
    """The database to copy and migrate."""
    before: Contents
    after: Contents
    seconds: float
    """Seconds that it takes in a child process, undisturbed."""


def perform(run: Run) -> None:
    """Go through all revisions once, then kill a migration in each round."""
    tasks = min(MOST_TASKS, 400 * run.rounds**2)
    with ExitStack() as stack:
        read = Reader().read

        def filled(revision: str, **options: bool) -> Location:
            location = stack.enter_context(run.location(migrated=False))
            fill(location, revision, tasks, **options)
            return location

        def migrated(
            name: str,
            do: Callable[[str], None],
            child: Callable[[Send, str], None],
            source: Location,
            after: Contents,
        ) -> Work:
            done = stack.enter_context(run.location(copy_of=source))
            with _child(child, done, run.folder / "errors") as process:
                _, (_, seconds) = process.messages()
            run.counts.acknowledged += 1
            _compare(run, f"after {name}", read(done), after)
            return Work(name, do, child, source, read(source), after, seconds)

        first, lived = filled(FIRST), filled(HEAD, lived=True)
        of_first, of_head = read(first), read(filled(HEAD))
        works = [
            migrated("upgrade", upgrade, upgrade_child, first, of_head),
            migrated("downgrade", downgrade, downgrade_child, lived, of_first),
        ]
        turns = [*works, *works]  # these are fast; an import takes a minute for a million rows
        if run.kind == SQLITE:
            original = stack.enter_context(run.location(migrated=False))
            fill_original(Path(original), tasks)
            imported = read(filled(HEAD, imported=True))
            works.append(migrated("legacy import", upgrade, upgrade_child, original, imported))
            turns.append(works[-1])
        run.notes["tasks"] = f"{tasks:,}"
        for work in works:
            run.notes[work.name] = f"{work.seconds:.2f} s"
        _up_down_up(run, read, first, of_first, of_head)
        for number in run.each_round():
            by_two = number % BY_TWO_EVERY == BY_TWO_EVERY - 1
            _kill(run, read, turns[number % len(turns)], by_two=by_two)


def upgrade(location: str) -> None:
    """Upgrade a database to today's schema."""
    database = Database(
        location, clock=FakeClock(NOW), timeout=_PATIENCE_SECONDS, legacy_timezone="UTC"
    )

    async def run() -> None:
        async with database:
            pass

    asyncio.run(run())


def downgrade(location: str, revision: str = FIRST) -> None:
    """Downgrade a database to an older schema."""
    migrations.downgrade(backend_of(location, _PATIENCE_SECONDS), revision)


def upgrade_child(send: Send, location: str) -> None:
    """Upgrade; send a message at the begin, and the duration at the end."""
    _work(send, location, upgrade)


def downgrade_child(send: Send, location: str) -> None:
    """Downgrade; send a message at the begin, and the duration at the end."""
    _work(send, location, downgrade)


def _work(send: Send, location: str, do: Callable[[str], None]) -> None:
    # After a connection, no module is left to import that takes longer than the work itself.
    with suppress(UnavailableError):  # another process holds the lock, and imports it
        backend_of(location, _PATIENCE_SECONDS).inspect(lambda connection: None)
    upgrade(":memory:")
    send("begins")
    began = time.monotonic()
    do(location)
    send("done", time.monotonic() - began)


def _up_down_up(
    run: Run, read: Read, source: Location, of_first: Contents, of_head: Contents
) -> None:
    """Go through all revisions, to nothing, and up again."""
    with run.location(copy_of=source) as place, run.location() as empty:
        location = str(place)
        upgrade(location)
        _compare(run, "upgraded", read(place), of_head)
        downgrade(location)
        _compare(run, "downgraded", read(place), of_first)
        upgrade(location)
        _compare(run, "upgraded again", read(place), of_head)
        verify_database(run, place)
        downgrade(location, NOTHING)
        left = read(place)
        run.check(left.revision is None and not left.rows, f"downgraded to nothing: {left}")
        upgrade(location)
        _compare(run, "made anew", read(place), read(empty))
    run.counts.acknowledged += 5


def _kill(run: Run, read: Read, work: Work, *, by_two: bool) -> None:
    """Kill a migration at a random moment, check the copy, and finish the migration."""
    delay = run.random.uniform(0, 1.1 * work.seconds)
    what = f"{work.name}, killed after {delay:.3f} s,"
    errors = run.folder / "errors"
    with run.location(copy_of=work.source) as place:
        with _child(work.child, place, errors) as child:
            messages = child.messages()
            run.check(next(messages, None) is not None, f"{what} has not begun: {child.complaint}")
            time.sleep(delay)
            child.kill()
            child.wait()
            is_done = next(messages, None) is not None
        wait_until_disconnected(place)
        _count(run, what, work, read(place), is_done=is_done)
        with ExitStack() as stack:
            if by_two:
                other = stack.enter_context(_child(work.child, place, errors))
            try:
                work.do(str(place))
            except StoreError as error:
                run.wrong(f"{what} can not be done again: {error!r}")
            if by_two and other.wait() != 0:
                run.wrong(f"{work.name} by two at once: {other.complaint}")
        run.counts.acknowledged += 1 + by_two
        _compare(run, f"{what} and done again,", read(place), work.after)
        if work.before.revision is None:  # a legacy file, whose copy is kept
            assert isinstance(place, Path)
            copies = list(place.parent.glob(f"{place.name}.original-*Z*"))
            run.check(bool(copies), f"{what} and there is no copy of the original")
            for copy in copies:
                _compare(run, f"copied before {what}", read(copy), work.before)


def _child(work: Callable[[Send, str], None], place: Location, errors: Path) -> Child:
    return Child(work, place, errors=errors, patience_seconds=_PATIENCE_SECONDS)


def _count(run: Run, what: str, work: Work, found: Contents, *, is_done: bool) -> None:
    """Check that the copy is at one revision or the other, and count the outcome of the kill."""
    not_before, not_after = work.before.difference(found), work.after.difference(found)
    run.check(
        not_before is None or not_after is None, f"{what} is between: {not_before}; {not_after}"
    )
    if is_done:
        run.counts.acknowledged += 1
        if not_after is not None:
            run.lost(f"{what} was done: {not_after}")
    else:
        run.counts.unknown += 1
        run.counts.unknown_committed += not_after is None


def _compare(run: Run, what: str, found: Contents, expected: Contents) -> None:
    difference = expected.difference(found)
    run.check(difference is None, f"{what} it is different: {difference}")


CAMPAIGN = Campaign(
    name="migration",
    title="migrations of a full database are killed at any moment, and run by two at once",
    promises=("P2", "P9"),
    perform=perform,
    rounds=50,
    quick_rounds=2,
    unit="kills",
)
