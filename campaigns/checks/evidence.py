"""Checks of the recorded calls of several processes, against each other and the database.

- Calls that use the database are linearizable, task by task (`specification` has the allowed
  answers).
- Reads from memory never go back, show the process's own writes at once, and foreign writes in
  time: in the long form, 100 ms after their return, minus the delay of the reader's event loop.
- Revisions are consecutive. Each acknowledged write has a revision of its own. If a write returned
  before another was called, it has the smaller revision.
- Each change has a call that caused it.
- Every watcher received the whole feed, each change once and in order, also across the deaths of
  its process.
- No task had two owners.

An unanswered call of a killed process may have taken effect, or not. The database is read without
the library.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from operator import attrgetter
from typing import Any, Final, NamedTuple

from campaigns.checks.linearizability import Operation, find_violation
from campaigns.harness.campaign import Location, Run
from campaigns.harness.direct_access import fetch
from campaigns.harness.latencies import p99
from campaigns.workloads.caller import TASKS_A_CLAIM
from campaigns.workloads.specification import (
    ASSIGNED,
    READS,
    UNKNOWN,
    ObservedTask,
    TaskCall,
    changes_nothing,
    step,
)

FRESH_SECONDS = 0.1
"""Maximum age of a read from memory, in seconds, in the 99th percentile, as promised. The delay of
the reader's event loop is subtracted: a busy machine adds to it without limit.
"""

STALE_SECONDS = 10.0
"""Maximum age of any read from memory, in seconds."""

_TELL_REVISION: Final = ("add", "update", "change", "claim", "start", "complete", "fail")
"""Calls that return the revision of their own change."""

_MAY_CHANGE_NOTHING: Final = ("start", "complete")
"""Calls among them that return an unchanged task if it already has the state."""

_CAUSE: Final = {
    "created": "add",
    "updated": "update",
    "removed": "remove",
    "scheduled": "claim",
    "running": "start",
    "completed": "complete",
    "cancelled": "cancel",
    "requeued": "requeue",
    "failed": "fail",
    "node lost": "register",
}
"""The call that causes a change of this kind, status or reason."""


@dataclass(slots=True, eq=False)
class RecordedCall:
    """A call, as recorded by its process."""

    process: int
    name: str
    task_id: str | None
    arguments: Sequence[Any]
    invoked: int
    returned: int | None = None
    answer: Any = UNKNOWN


@dataclass
class Process:
    """A process from start to end, and its records."""

    node: str
    calls: dict[int, RecordedCall] = field(default_factory=dict)
    watched: list[list[Any]] = field(default_factory=list)
    delays: list[tuple[int, int]] = field(default_factory=list)
    """The begin and end of each delay of its event loop."""
    is_killed: bool = False
    ended: int = 0
    """A time at which it had ended."""

    @property
    def opened(self) -> int:
        """The time at which it had opened the store."""
        return next((one.invoked for one in self.calls.values()), 0)

    def delay(self, since: int, until: int) -> int:
        """Return the delay of its event loop within a period."""
        return sum(max(0, min(now, until) - max(due, since)) for due, now in self.delays)


class Change(NamedTuple):
    """A row of the feed."""

    revision: int
    item: str
    id: str
    kind: str
    before: str | None
    after: str | None
    node: str | None
    reason: str | None

    @property
    def cause(self) -> str:
        """The call that leads to such a change."""
        if self.kind != "status":
            return _CAUSE[self.kind]
        return _CAUSE.get(str(self.reason if self.after == "pending" else self.after), "nobody")


_FEED: Final = (
    "SELECT revision, item, item_id, kind, from_status, to_status, node, reason"
    " FROM changes ORDER BY revision"
)
_TASKS: Final = (
    "SELECT task_id, version, status, assigned_node, attempt, CAST(metadata AS text) FROM tasks"
)


class Evidence:
    """The records of all processes, and the final content of the database."""

    def __init__(self, run: Run, location: Location, processes: Sequence[Process]) -> None:
        self._run = run
        self._processes = processes
        calls = [one for process in processes for one in process.calls.values()]
        run.counts.unknown = sum(one.answer is UNKNOWN for one in calls)
        run.counts.refused = sum(isinstance(one.answer, str) for one in calls)
        run.counts.acknowledged = len(calls) - run.counts.unknown - run.counts.refused
        feed, tasks = fetch(location, _FEED, _TASKS)
        self._feed = [Change(*row) for row in feed]
        self._changes: dict[str, list[Change]] = defaultdict(list)
        """The changes of each task."""
        for change in self._feed:
            if change.item == "task":
                self._changes[change.id].append(change)
        self._end = {
            id: ObservedTask(version, metadata.split('"')[3], status, node, attempt)
            for id, version, status, node, attempt, metadata in tasks
        }
        self._calls: dict[str, list[RecordedCall]] = defaultdict(list)
        """The calls about each task."""
        self._general: list[RecordedCall] = []
        """The calls that may be about any task."""
        for one in (about for call in calls for about in _each_about_a_task(call)):
            if one.task_id is None:
                self._general.append(one)
            else:
                self._calls[one.task_id].append(one)
        self._writes: dict[int, list[RecordedCall]] = defaultdict(list)
        """The acknowledged writes, by revision."""
        causes = {change.revision: (change.id, change.cause) for change in self._feed}
        for call in (one for calls in self._calls.values() for one in calls):
            if call.name in _TELL_REVISION and isinstance(call.answer, ObservedTask):
                revision = call.answer.version or 0
                # The start of a running task returns its newest version, by any caller.
                is_own = causes.get(revision) == (call.task_id, call.name)
                if is_own or call.name not in _MAY_CHANGE_NOTHING:
                    self._writes[revision].append(call)

    def check(self) -> None:
        """Report every contradiction to the promises."""
        self._check_revisions()
        self._check_order()
        self._check_causes()
        self._check_watchers()
        self._check_owners()
        self._check_memory()
        self._check_answers()

    def _check_revisions(self) -> None:
        revisions = [change.revision for change in self._feed]
        consecutive = list(range(1, len(revisions) + 1))
        self._run.check(revisions == consecutive, "the feed is not consecutive")
        changes = {change.revision: change for change in self._feed}
        for revision, writes in self._writes.items():
            change = changes.get(revision)
            for write in writes:
                sent = (write.task_id, write.answer.status, write.answer.node, _cause(write))
                if change is None or sent != (change.id, change.after, change.node, change.cause):
                    self._run.lost(f"{write}, which the feed has as {change}")
            if any(write.name not in _MAY_CHANGE_NOTHING for write in writes[1:]):
                self._run.wrong(f"several writes have the same revision: {writes}")

    def _check_order(self) -> None:
        writes = [one for writes in self._writes.values() for one in writes]
        returned = sorted(writes, key=attrgetter("returned"), reverse=True)
        newest = 0
        for write in sorted(writes, key=attrgetter("invoked")):
            while returned and (returned[-1].returned or 0) < write.invoked:
                newest = max(newest, returned.pop().answer.version)
            # The start of a running task may return the revision of its first start.
            if write.answer.version <= newest and write.name not in _MAY_CHANGE_NOTHING:
                self._run.wrong(f"revision {newest} had been acknowledged before {write}")

    def _check_causes(self) -> None:
        """Report changes without a call; count unanswered calls that took effect."""
        answered: Counter[tuple[str, str | None]] = Counter()
        unknown: Counter[tuple[str, str | None]] = Counter()
        changed: Counter[tuple[str, str | None]] = Counter()
        for call in self._all():
            if call.name == "claim" and call.answer is UNKNOWN:
                unknown["claim", call.arguments[0]] += TASKS_A_CLAIM
            elif call.answer is UNKNOWN:
                unknown[_cause(call), call.task_id] += 1
            elif call.answer is True:
                answered[call.name, call.task_id] += 1
        for changes in self._changes.values():
            for change in changes:
                if change.revision not in self._writes and change.cause != "register":
                    subject = change.node if change.cause == "claim" else change.id
                    changed[change.cause, subject] += 1
        for place, number in (changed - answered).items():
            self._run.counts.unknown_committed += number
            self._run.check(number <= unknown[place], f"{number} changes without a call: {place}")
        for place, number in answered.items():
            if place[0] == "remove" and changed[place] < number:
                self._run.lost(f"the feed has {changed[place]} of {number} removals of {place[1]}")

    def _check_watchers(self) -> None:
        feed = [list(change[:-1]) for change in self._feed]
        for node in {process.node for process in self._processes}:
            of_node = [process for process in self._processes if process.node == node]
            watched = [one for process in of_node for one in process.watched]
            self._run.check(bool(watched), f"the watcher of {node} received nothing")
            if watched != feed[: len(watched)]:
                pairs = zip(watched, [*feed, "no more"], strict=False)
                sent, change = next(pair for pair in pairs if pair[0] != pair[1])
                self._run.wrong(f"the watcher of {node} received {sent}; the feed has {change}")

    def _check_owners(self) -> None:
        for changes in self._changes.values():
            before, owner = None, None
            for change in changes:
                if change.before != before:
                    self._run.wrong(f"{change}, though it was {before}")
                is_given = change.cause == "claim" or change.node != owner
                if owner is not None and change.after in ASSIGNED and is_given:
                    self._run.wrong(f"{change}, though {owner} had it")
                before = change.after
                owner = change.node if change.after in ASSIGNED else None

    def _check_memory(self) -> None:
        ages, own_ages = [0.0], [0.0]
        """Ages in seconds, with and without the delays of event loops."""
        for id, calls in self._calls.items():
            spans = _spans(self._changes[id])
            for number in {call.process for call in calls}:
                process = self._processes[number]
                own = [call for call in calls if call.process == number]
                for seen, floor, span in _memory_reads(own, spans):
                    if span is None:
                        self._run.wrong(f"no version of the task matches {seen}")
                    elif span.end is not None and span.end <= floor.revision:
                        self._run.wrong(f"{seen}, after {floor.call} in the same process")
                    elif seen.answer is not None:
                        since = seen.invoked
                        if span.end in self._writes:
                            [missed, *_] = self._writes[span.end]
                            since = max(missed.returned or 0, process.opened)
                        age = max(0, seen.invoked - since)
                        ages.append(age / 1e9)
                        own_ages.append((age and age - process.delay(since, seen.invoked)) / 1e9)
        oldest, usual, own_age = max(ages), p99(ages), p99(own_ages)
        self._run.notes["age of reads from memory: p99"] = (
            f"{usual * 1e3:.0f} ms, {own_age * 1e3:.0f} ms without the delay of event loops,"
            f" at most {oldest * 1e3:.0f} ms"
        )
        self._run.check(oldest < STALE_SECONDS, f"a read from memory was {oldest:.0f} s old")
        is_fresh = self._run.is_quick or own_age < FRESH_SECONDS
        self._run.check(is_fresh, f"reads from memory are {own_age * 1e3:.0f} ms old")

    def _check_answers(self) -> None:
        end = 1 + max(max(one.invoked, one.returned or 0) for one in self._all())
        for id in {*self._calls, *self._end}:
            calls = [one for one in self._calls[id] if one.name != "read_memory"]
            first = min((one.invoked for one in calls), default=0)
            # A killed process can only have claimed tasks added before its death. And a
            # node that never had a task has none to release.
            calls += [
                one
                for one in self._general
                if one.name == "claim" and first < self._processes[one.process].ended
            ]
            nodes = {one.arguments[0] for one in calls if one.name == "claim"}
            calls += [
                one for one in self._general if one.name == "register" and one.arguments[0] in nodes
            ]
            calls.append(RecordedCall(-1, "read", id, [], end, end, self._end.get(id)))
            operations = [
                Operation(
                    one.invoked,
                    one.returned,
                    TaskCall(one.name, tuple(one.arguments), one.answer),
                )
                for one in calls
                if one.name not in READS or one.answer is not UNKNOWN
            ]
            violation = find_violation(operations, None, step, changes_nothing)
            if violation is not None:
                before = [one for one in operations if _precedes(one, violation)]
                before.sort(key=attrgetter("invoked"))
                shown = "; ".join(_shown(one.call) for one in before[-8:])
                self._run.wrong(
                    f"of {id}, no order explains {_shown(violation.call)} after {shown}"
                )

    def _all(self) -> Iterator[RecordedCall]:
        yield from self._general
        for calls in self._calls.values():
            yield from calls


class _Floor(NamedTuple):
    """The revision that the cache has reached, and the call that proves it."""

    revision: int
    call: RecordedCall | None


class _Span(NamedTuple):
    """The revisions between which a task had one version, or did not exist."""

    begin: int
    """The revision that began it."""
    end: int | None
    """The revision that ended it."""
    is_there: bool


def _spans(changes: Sequence[Change]) -> list[_Span]:
    ends = [*(change.revision for change in changes), None]
    spans = [_Span(0, ends[0], is_there=False)]
    for change, end in zip(changes, ends[1:], strict=True):
        spans.append(_Span(change.revision, end, is_there=change.kind != "removed"))
    return spans


def _memory_reads(
    calls: Iterable[RecordedCall], spans: Sequence[_Span]
) -> Iterator[tuple[RecordedCall, _Floor, _Span | None]]:
    """Yield each read of a task from memory by a process, with the span of the observed version.

    Each comes with the minimum revision of the cache at the time of the read, known from earlier
    reads and writes of the process.
    """
    answered = [call for call in calls if call.returned is not None]
    moments = [(call.invoked, 0, call) for call in answered]
    moments += [(call.returned or 0, 1, call) for call in answered]
    floor, floors = _Floor(0, None), dict[RecordedCall, _Floor]()
    for _, is_return, call in sorted(moments, key=lambda moment: moment[:2]):
        if not is_return:
            floors[call] = floor
            continue
        revision = 0
        if call.name == "read_memory":
            span = _span_of(call.answer, floors[call].revision, spans)
            yield call, floors[call], span
            revision = span.begin if span is not None else 0
        elif call.name in ("find", *_TELL_REVISION) and isinstance(call.answer, ObservedTask):
            revision = call.answer.version or 0
        elif call.name == "remove" and call.answer is True:
            removals = (one.begin for one in spans[1:] if not one.is_there)
            revision = next((one for one in removals if one > floors[call].revision), 0)
        if revision > floor.revision:
            floor = _Floor(revision, call)


def _span_of(task: ObservedTask | None, since: int, spans: Sequence[_Span]) -> _Span | None:
    """Return the first span of a version that ends after `since`; else the last one before."""
    fit = [
        span
        for span in spans
        if (span.begin == task.version if task is not None else not span.is_there)
    ]
    return next(
        (one for one in fit if one.end is None or one.end > since), fit[-1] if fit else None
    )


def _each_about_a_task(call: RecordedCall) -> Iterator[RecordedCall]:
    """Yield the call once for each task in its answer."""
    answer = call.answer
    if call.name == "claim" and answer is not UNKNOWN:
        for id, task in answer if isinstance(answer, list) else ():  # else a deadline passed
            yield replace(call, task_id=id, answer=ObservedTask(*task))
    elif call.name == "change" and isinstance(answer, list):
        before, after = (ObservedTask(*task) for task in answer)
        yield replace(call, arguments=[*call.arguments, before], answer=after)
    else:
        yield replace(call, answer=ObservedTask(*answer) if isinstance(answer, list) else answer)


def _cause(call: RecordedCall) -> str:
    return "update" if call.name == "change" else call.name


def _precedes(one: Operation[TaskCall], other: Operation[TaskCall]) -> bool:
    return one is not other and other.returned is not None and one.invoked <= other.returned


def _shown(call: TaskCall) -> str:
    arguments = ", ".join(map(str, call.arguments))
    return f"{call.name}({arguments}) → {'?' if call.answer is UNKNOWN else call.answer}"
