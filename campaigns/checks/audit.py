"""An audit of a database against the recorded calls of the clients of `load`.

The database is read without the library. A task must have the state of its last acknowledged call;
a call without an answer has taken effect as a whole, or not at all. Tasks, nodes and the feed must
agree.
"""

from __future__ import annotations

import asyncio
import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from campaigns.harness.campaign import Counts, Location, Run
from campaigns.harness.direct_access import LAST_REVISION, UnreadableError, fetch, find_damage
from campaigns.workloads.load import State, content
from openclaw_store import Database, StoreError
from openclaw_store.maintenance.verify import verify

Known = tuple[int, State | None]
"""The number of changes of a task, and its state; `None` if it was removed."""

_QUERIES = (
    "SELECT task_id, status, assigned_node, version, attempt, name, description, priority, "
    "parameters, result FROM tasks",
    "SELECT node_id, status, version, running_tasks, successful_tasks, failed_tasks, "
    "total_tasks_processed FROM nodes",
    "SELECT revision, item, item_id, from_status, to_status, node, previous FROM changes "
    "ORDER BY revision",
    LAST_REVISION,
)
_HELD = ("scheduled", "running")


@dataclass(frozen=True)
class _Unanswered:
    after: Mapping[str, Known]
    """Expected states of tasks."""
    changed: int
    """How many of these change."""


class Log:
    """The recorded calls of the clients, and the expected content of the database.

    Args:
        counts: The counts of the calls.
    """

    def __init__(self, counts: Counts) -> None:
        self._counts = counts
        self._known: dict[str, Known] = {}
        self._calls: dict[int, _Unanswered] = {}  # calls without an answer, by client
        self._failures: list[str] = []

    def copy(self) -> Log:
        """Return a copy of the log; the calls in it are not counted again."""
        copy = Log(Counts())
        copy._known, copy._calls = {**self._known}, {**self._calls}
        copy._failures = self._failures  # so that each is reported once
        return copy

    def note(self, message: Sequence[Any]) -> None:
        """Record a message of a client."""
        match message:
            case "calls", client, after, changed:
                known = {id: (self._changes_of(id) + 1, state) for id, state in after.items()}
                self._calls[client] = _Unanswered(known, changed)
            case "returned", client, ids:
                self._counts.acknowledged += 1
                call = self._calls.pop(client)
                self._known.update({id: call.after[id] for id in ids})
                if len(ids) != call.changed:
                    self._failures.append(f"a call changed {ids}, not {call.changed} tasks")
            case "refused", client:
                self._counts.refused += 1
                del self._calls[client]
            case "failed", _, error:
                self._failures.append(f"a call failed: {error}")

    def check(self, run: Run, location: Location) -> None:
        """Compare the database with the log, and continue from its content."""
        for failure in self._failures:
            run.wrong(failure)
        self._failures.clear()
        try:
            there = _Found(location)
            found, findings = there.tasks(), [*there.disagreements()]
        except (UnreadableError, ValueError) as error:
            run.wrong(f"the database cannot be read: {error!r}")
            return
        for finding in findings:
            run.wrong(finding)
        for call in self._calls.values():
            taken = {id: known for id, known in call.after.items() if found.get(id) == known}
            self._known.update(taken)
            self._counts.unknown += 1
            self._counts.unknown_committed += bool(taken)
            if len(taken) not in (0, call.changed):
                run.wrong(f"half of a call took effect: {sorted(taken)} of {call}")
        self._calls.clear()
        for id in self._known.keys() | found.keys():
            if found.get(id) != self._known.get(id):
                is_behind = found.get(id, (0,))[0] < self._changes_of(id)
                report = run.lost if is_behind else run.wrong
                report(f"task {id!r} is {found.get(id)}, and should be {self._known.get(id)}")
        self._known = found

    def _changes_of(self, id: str) -> int:
        return self._known[id][0] if id in self._known else 0


def verify_database(run: Run, location: Location) -> None:
    """Open a database with the library, and run the library's own verification."""

    async def problems() -> list[str]:
        async with Database(location) as database:
            return [problem.text for problem in (await verify(database)).problems]

    try:
        for problem in asyncio.run(problems()):
            run.wrong(problem)
    except StoreError as error:
        run.wrong(f"the store cannot be opened: {error}")


class _Found:
    """All content of a database at one moment.

    Raises:
        UnreadableError: If it cannot be read, or the engine's own checks find find_damage.
        ValueError: If it contains a malformed value.
    """

    def __init__(self, location: Location) -> None:
        if problems := find_damage(location):
            raise UnreadableError(problems)
        self._tasks, self._nodes, self._feed, [(self._revision,)] = fetch(location, *_QUERIES)

    def tasks(self) -> dict[str, Known]:
        """Return the state of each task that has ever existed."""
        changes = Counter(id for _, item, id, *_ in self._feed if item == "task")
        known: dict[str, Known] = {id: (number, None) for id, number in changes.items()}
        for id, status, _, _, attempt, _, _, _, parameters, _ in self._tasks:
            known[id] = changes[id], [status, attempt, json.loads(parameters)["number"]]
        return known

    def disagreements(self) -> Iterator[str]:
        """Yield all inconsistencies."""
        yield from self._partial_writes()
        yield from self._gaps()
        yield from self._mismatches()
        yield from self._miscounts()

    def _partial_writes(self) -> Iterator[str]:
        """Yield tasks that were written in part."""
        for id, status, _, _, _, name, description, priority, parameters, result in self._tasks:
            given = json.loads(parameters)
            if [name, description, priority, given] != [*content(given["number"]).values()]:
                yield f"of task {id!r}, only a part was written: {name!r}, {parameters[:40]}"
            if (json.loads(result or "null") == given) != (status == "completed"):
                yield f"task {id!r} is {status}, and has the result {result}"

    def _gaps(self) -> Iterator[str]:
        """Yield missing and surplus revisions."""
        revisions = [change[0] for change in self._feed]
        if revisions != [*range(1, self._revision + 1)]:
            missing = sorted({*range(1, self._revision + 1)} ^ {*revisions})
            yield f"of {self._revision} revisions, these are missing or too many: {missing[:9]}"

    def _mismatches(self) -> Iterator[str]:
        """Yield rows and changes that do not match."""
        last: dict[tuple[str, str], tuple[int | None, str | None, str | None]] = {}
        for revision, item, id, was, status, node, previous in self._feed:
            if last.get((item, id), (None, None))[:2] != (previous, was):
                yield f"change {revision} of {item} {id!r} does not follow the one before"
            last[item, id] = revision, status, node
        there = {place: end for place, end in last.items() if end[1] is not None}
        rows = {("node", id): (version, status, None) for id, status, version, *_ in self._nodes}
        rows |= {("task", id): (version, *at) for id, *at, version in (t[:4] for t in self._tasks)}
        for place in there.keys() | rows.keys():
            if rows.get(place) != there.get(place):
                yield f"{place} is {rows.get(place)}, and by the feed {there.get(place)}"

    def _miscounts(self) -> Iterator[str]:
        """Yield nodes with counters that do not match their tasks."""
        held = Counter(task[2] for task in self._tasks if task[1] in _HELD)
        ended: Counter[tuple[str | None, bool]] = Counter()
        holder: dict[str, str | None] = {}
        for _, item, id, was, status, node, _ in self._feed:
            if item == "task" and was in _HELD and status not in (None, *_HELD):
                ended[holder[id], status == "completed"] += 1
            holder[id] = node
        for id, _, _, *counted in self._nodes:
            completed, failed = ended[id, True], ended[id, False]
            if counted != (tally := [held[id], completed, failed, completed + failed]):
                yield f"node {id!r} counts {counted}, and there are {tally}"
