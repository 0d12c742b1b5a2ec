"""The picture of the cluster in memory: what was committed, and what is only here so far.

It learns of commits in two ways that may cross: from the writer of this process, as they happen,
and from the feed, in order and with those of other processes. Content is guarded by `version`, so
an entry never goes back; every change is counted once, whichever way it came first.

Nothing here awaits, reads the clock or knows SQL. Records never change, so they are handed out
as they are, and copied by whoever talks to callers.
"""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from operator import itemgetter
from typing import Any

from openclaw_store.domain import (
    ASSIGNED,
    ENTITY_KINDS,
    ENTITY_NAMES,
    FINISHED,
    WAITING,
    Change,
    ClusterState,
    EntityKey,
    NodeInfo,
    NodeStatus,
    Record,
    Task,
    TaskStatus,
    key_of,
)
from openclaw_store.errors import InvalidDataError
from openclaw_store.repositories import Event, Heartbeat, HeartbeatWritten
from openclaw_store.state_manager.change_feed import ChangeBatch, InitialState, Page
from openclaw_store.state_manager.indexes import PendingKey, SortedKeys
from openclaw_store.state_manager.pages import REVISION, STEP_WIDTH
from openclaw_store.state_manager.ready_queue import Ready, ReadyTasks
from openclaw_store.state_manager.snapshot import Records

_TASK = ENTITY_NAMES[Task]


@dataclass(slots=True)
class Unsaved:
    """An entry that is only in memory."""

    record: Record[Any]
    base: Record[Any] | None
    """What it was made from; `None` when it is new. It may be written only over that."""
    committed: Record[Any] | None
    """What the database holds, as far as is known."""


class Cache:
    """Live tasks, all nodes, and the finished tasks that were used last.

    Args:
        start: What the database held at one revision; its rows are loaded page by page.
        finished_limit: How many finished tasks are kept.
    """

    def __init__(self, start: InitialState, finished_limit: int) -> None:
        self._finished_limit = finished_limit
        self._decode = start.decode
        self.tasks: Records[Task] = Records(start.decode[Task])
        self.nodes: Records[NodeInfo] = Records(start.decode[NodeInfo])
        self.unsaved: dict[EntityKey, Unsaved] = {}
        self.version = start.revision
        """The newest revision applied."""
        self.contiguous = start.revision
        """Up to this revision every change was applied."""
        self.beat = start.beat
        """The newest flush of heartbeats applied."""
        self.updated_at = start.updated_at
        self.task_counts = _of_each_status(start.task_counts)
        self.is_counted = True
        """Whether `task_counts` are right; clean-up can remove changes before they are seen."""
        self.out_of_order: dict[int, tuple[Change, str | None]] = {}
        """Applied, though some before them were not; with the status they were counted from."""
        self._finished: OrderedDict[str, Record[Task]] = OrderedDict()
        self._pending: SortedKeys[PendingKey] = SortedKeys()
        self.ready = ReadyTasks()
        """What may be claimed."""
        self._held: dict[str | None, set[str]] = {}  # scheduled and running tasks, by node
        self._free: dict[str, tuple[float, int, str]] = {}  # nodes with a place, and their load
        self._skilled: dict[str, set[str]] = {}  # identifiers of nodes by skill
        self._node_counts: Counter[NodeStatus] = Counter()
        self._newest: list[str] | None = None  # identifiers of nodes in order, while it holds
        # The last version an entry had while it was unsaved, and the one that it was written under.
        self._aliases: dict[EntityKey, tuple[int, int]] = {}
        self._waiting: dict[str, Heartbeat] = {}  # heartbeats not handed to the writer yet
        self._flying: dict[str, list[Heartbeat]] = {}  # and those that it has not written yet
        # And what they said that is written since the last `catch_up`, by field, with the flush.
        self._landed: dict[str, dict[str, tuple[int, Any]]] = {}

    def load(self, page: Page) -> None:
        """Take over rows of the start."""
        if page.kind is Task:
            self.tasks.load(page.rows)
            self._pending.extend(page.keys)
            self.ready.extend(page.ready)
            for node_id, task_id in page.held:
                self._held.setdefault(node_id, set()).add(task_id)
        else:
            for row in page.rows:
                self._show((page.kind, row[0]), None, self._decode[page.kind](row))

    def keep_unsaved(self, other: Cache) -> None:
        """Take over what is only in memory, from the cache that this one replaces."""
        for place, entry in other.unsaved.items():
            entry.committed = self._visible(place)
            self._show_unsaved(place, entry)
        self._aliases.update(other._aliases)  # one that is outdated leads to a stale version
        self._waiting, self._flying = other._waiting, other._flying
        for id in {*self._waiting, *self._flying}:
            record = self.nodes.get(id)
            if record is not None:
                self._touch(id, record, self._with_heartbeats(record))

    def apply(self, events: Iterable[Event | HeartbeatWritten]) -> None:
        """Take over what this process has committed.

        Raises:
            InvalidDataError: If it met a row that cannot be read; it took over the rest.
        """
        unreadable: InvalidDataError | None = None
        arrived: list[Ready] = []
        for event in events:
            if isinstance(event, HeartbeatWritten):
                self._land(event)
                continue
            kind, id, record, change = event
            if not self._count(change):
                continue
            if record is not None and record.row is not None and kind is Task and self._is_new(id):
                ready = _claimable(record)
                if ready is not None:
                    self.tasks.put(id, record.row)
                    arrived.append(ready)
                    continue
            self._index(arrived)  # a transaction may have added a task, and changed it, too
            try:
                self._commit((kind, id), record, change.revision)
            except InvalidDataError as error:
                unreadable = error
        self._index(arrived)
        if unreadable is not None:
            raise unreadable

    def catch_up(self, batch: ChangeBatch) -> None:
        """Take over what the feed says, from this and other processes.

        Raises:
            InvalidDataError: If it met a row that cannot be read; it took over the rest.
        """
        later = [
            change for change, _ in self.out_of_order.values() if change.revision > batch.read_at
        ]
        must_wait = self.contiguous > batch.read_at  # what was committed since cannot be told apart
        tasks, nodes = self._count_batch(batch)
        for change in later:  # what is here is newer
            (tasks if change.item == _TASK else nodes).pop(change.item_id, None)
        unreadable = self._take_over_tasks(tasks, batch)
        for id in nodes:
            node = self._with_landed(batch.nodes.get(id), batch.beat)
            self._commit((NodeInfo, id), node, batch.read_at)
        for beaten in batch.beaten:
            place = key_of(beaten)
            if self._visible(place) is not None:
                self._commit(place, self._with_landed(beaten, batch.beat), 0)
        self.beat = max(self.beat, batch.beat)
        self._landed = {
            id: newer
            for id, landed in self._landed.items()
            if (newer := {name: it for name, it in landed.items() if it[0] > self.beat})
        }
        if batch.changes and batch.changes[-1][REVISION] > self.version:
            self.updated_at = batch.changed_at
        if batch.revision > self.contiguous:
            self.contiguous = batch.revision
            self.version = max(self.version, self.contiguous)
            for revision in [
                revision for revision in self.out_of_order if revision <= self.contiguous
            ]:
                self._catch_up_with(revision)
            self._close_gap()
        if batch.task_counts is not None and not must_wait:
            self.task_counts = _of_each_status(batch.task_counts)
            for change in later:
                self._count_status(change.from_status, change)
                if change.revision in self.out_of_order:
                    self.out_of_order[change.revision] = (change, change.from_status)
            self.is_counted = True
        if unreadable is not None:
            raise unreadable

    def remember(self, record: Record[Task]) -> None:
        """Keep a finished task that was read from the database."""
        if record.status in FINISHED and (Task, record.task_id) not in self.unsaved:
            self._finish(record.task_id, record)

    def stage(self, record: Record[Any], base: Record[Any] | None) -> None:
        """Show an entry before it is committed."""
        place = key_of(record)
        entry = self.unsaved.get(place)
        committed = (self._visible(place) or base) if entry is None else entry.committed
        self._show_unsaved(place, Unsaved(record, base, committed))

    def discard(self, place: EntityKey) -> bool:
        """Forget what is only in memory of an entry; `False` if there is nothing."""
        entry = self.unsaved.get(place)
        if entry is not None:
            self.unstage(place, entry, None)
        return entry is not None

    def unstage(self, place: EntityKey, entry: Unsaved, stored: Record[Any] | None) -> None:
        """`entry` was written as `stored`, or lost (`None`): show what the database holds."""
        present = self.unsaved.get(place)
        if present is None:
            return
        if present is not entry:  # it was changed again meanwhile, and builds on what was written
            if stored is not None and present.base is entry.base:
                present.base = stored
            return
        self._hide(place)
        del self.unsaved[place]
        if stored is not None and (
            entry.committed is None or entry.committed.version < stored.version
        ):
            entry.committed = stored
        if entry.committed is not None:
            self._show(place, None, self._with_heartbeats(entry.committed))
            if stored is not None and entry.committed.version == stored.version:
                self._aliases[place] = (entry.record.version, stored.version)

    def flushed_version(self, place: EntityKey, version: int) -> int:
        """The version that a copy of an entry has, which got `version` while it was unsaved."""
        local, settled = self._aliases.get(place, (0, 0))
        return settled if version < 0 and version == local else version

    def show_heartbeat(self, beat: Heartbeat) -> None:
        """Show a heartbeat, and keep it until it is written."""
        waiting = self._waiting.get(beat.id)
        self._waiting[beat.id] = beat if waiting is None else beat.after(waiting)
        record = self.nodes.get(beat.id)
        if record is not None:
            touched = beat.over(record)
            self._touch(beat.id, record, touched)
            if self.unsaved and (NodeInfo, beat.id) in self.unsaved:
                self.unsaved[NodeInfo, beat.id].record = touched

    def waiting_heartbeats(self) -> list[str]:
        """Identifiers of the nodes with heartbeats that are not on their way to the writer."""
        return list(self._waiting)

    def take_heartbeats(self, node_ids: Iterable[str]) -> list[Heartbeat]:
        """Those of these nodes that wait; they are on their way to the writer now."""
        taken = [self._waiting.pop(id) for id in node_ids if id in self._waiting]
        for beat in taken:
            self._flying.setdefault(beat.id, []).append(beat)
        return taken

    def acknowledge_heartbeats(
        self, heartbeats: Sequence[Heartbeat], known: Sequence[bool] | None
    ) -> bool:
        """The writer is done with heartbeats of `known` nodes, or has failed (`None`).

        Returns:
            Whether some of them wait again. (Of what was written it was told in between.)
        """
        again = False
        for place, beat in enumerate(heartbeats):
            is_written = beat.id not in self._flying or not self._is_own(beat)
            # A node that is not written yet keeps its heartbeat until it is.
            if is_written or (known and (known[place] or (NodeInfo, beat.id) not in self.unsaved)):
                continue
            newer = self._waiting.get(beat.id)
            self._waiting[beat.id] = beat if newer is None else newer.after(beat)
            again = True
        return again

    def task(self, task_id: str) -> Record[Task] | None:
        """A live task, or a finished one that is in memory."""
        record = self.tasks.get(task_id)
        if record is None and task_id in self._finished:
            self._finished.move_to_end(task_id)
            record = self._finished[task_id]
        if record is None and (Task, task_id) in self.unsaved:
            record = self.unsaved[Task, task_id].record
        return record

    def find(self, place: EntityKey) -> Record[Any] | None:
        """An entry of either kind."""
        return self.task(place[1]) if place[0] is Task else self.nodes.get(place[1])

    def pending(self, limit: int | None) -> list[Record[Task]]:
        """By priority, time of submission and identifier."""
        found = [self.tasks.get(id) for _, _, id in self.pending_keys(limit)]
        return [record for record in found if record is not None]

    def pending_keys(self, limit: int | None) -> list[PendingKey]:
        """Priority, time of submission and identifier of each, much faster."""
        return self._pending.first(limit)

    def held(self) -> Mapping[str | None, Iterable[str]]:
        """Identifiers of the tasks that are scheduled or running, by node; not to be changed."""
        return self._held

    def ahead_of(self, task: Record[Task], nodes: Iterable[Record[NodeInfo]], now: datetime) -> int:
        """How many tasks these nodes may claim before one that is pending."""
        key = _pending_key(task)
        if key is None:
            return 0
        skills = {node.encoded("available_skills") for node in nodes}
        return self.ready.ahead_of(key, skills, now)

    def all_nodes(self) -> list[Record[NodeInfo]]:
        """Newest registered first."""
        if self._newest is None:
            ordered = sorted(self.nodes.values(), key=lambda record: str(record.node_id))
            ordered.sort(key=_registered_at, reverse=True)
            self._newest = [record.node_id for record in ordered]
        return self._nodes(self._newest)

    def online_nodes(self) -> list[Record[NodeInfo]]:
        """ONLINE nodes, newest registered first."""
        return [record for record in self.all_nodes() if record.status is NodeStatus.ONLINE]

    def available_nodes(self) -> list[Record[NodeInfo]]:
        """ONLINE nodes with a free place, least loaded first."""
        return self._nodes(id for _, _, id in sorted(self._free.values()))

    def nodes_by_skill(self, skill: str) -> list[Record[NodeInfo]]:
        """ONLINE nodes with exactly this skill, newest registered first."""
        found = self._nodes(sorted(self._skilled.get(skill, ())))
        found.sort(key=_registered_at, reverse=True)
        return found

    def task_stats(self) -> dict[str, int]:
        """Tasks in the database, by status."""
        # An own change of a task that another process has changed, too, is counted from what is
        # known here; until that process's change is seen, this can be one too few.
        return {status: max(0, count) for status, count in self.task_counts.items()}

    def node_stats(self) -> dict[str, int]:
        """`total`, `online`, `offline`, `busy`."""
        counts = self._node_counts
        uncounted = sum(
            id in self._free and not self._counted((kind, id)) for kind, id in self.unsaved
        )
        full = counts[NodeStatus.ONLINE] - (len(self._free) - uncounted)
        return {
            "total": counts.total(),
            "online": counts[NodeStatus.ONLINE],
            "offline": counts[NodeStatus.OFFLINE],
            "busy": counts[NodeStatus.BUSY] + full,
        }

    def sizes(self) -> dict[str, int]:
        """How much is in memory, and how much of it alone."""
        return {
            "cached_tasks": len(self.tasks) + len(self._finished),
            "unsaved_entries": len(self.unsaved),
            "unsaved_heartbeats": len({*self._waiting, *self._flying}),
        }

    def state(self) -> ClusterState:
        """The present picture, in constant time."""
        counts = self.task_stats()
        return ClusterState(
            version=self.version,
            updated_at=self.updated_at,
            nodes=self.nodes.snapshot(),
            tasks=self.tasks.snapshot(),
            total_nodes=self._node_counts.total(),
            online_nodes=self._node_counts[NodeStatus.ONLINE],
            total_tasks=sum(counts.values()),
            running_tasks=counts[TaskStatus.RUNNING],
        )

    def _count(self, change: Change) -> bool:
        """Count a change; `False` if it was counted before."""
        revision = change.revision
        if revision == self.contiguous + 1:
            self._count_status(change.from_status, change)
            self.contiguous = revision
        elif revision <= self.contiguous or revision in self.out_of_order:
            return False
        else:  # what came before is not known yet: count from what is
            before = self._status_here(change)
            self._count_status(before, change)
            self.out_of_order[revision] = (change, before)
        if revision > self.version:
            self.version = revision
            self.updated_at = change.changed_at
        if self.out_of_order:
            self._close_gap()
        return True

    def _count_batch(self, batch: ChangeBatch) -> tuple[dict[str, Sequence[Any]], dict[str, None]]:
        """Count what the feed says; returns the last change of each task, and the nodes."""
        tasks: dict[str, Sequence[Any]] = {}
        nodes: dict[str, None] = {}
        counts = self.task_counts
        # The beginning of a row that somebody inserted by hand was never counted.
        is_counted = self.is_counted and batch.is_whole
        for change in batch.changes:
            revision, _, item, id, before, after = change[:STEP_WIDTH]
            if revision <= self.contiguous or revision in self.out_of_order:
                if item == _TASK and id in tasks:  # only the last change of a task has its content
                    tasks[id] = change
            elif item == _TASK:
                tasks[id] = change
                if before is not None:
                    counts[before] -= 1
                    is_counted = is_counted and counts[before] >= 0
                if after is not None:
                    counts[after] += 1
            else:
                nodes[id] = None
        self.is_counted = is_counted
        return tasks, nodes

    def _take_over_tasks(
        self, tasks: Mapping[str, Sequence[Any]], batch: ChangeBatch
    ) -> InvalidDataError | None:
        """Take over what their last changes brought; returns what cannot be read of them."""
        unreadable: InvalidDataError | None = None
        arrived: list[Ready] = []
        for id, change in tasks.items():
            row = tuple(change[STEP_WIDTH:])
            is_there = row[0] is not None
            ready = batch.ready(row) if is_there and self._is_new(id) else None
            if ready is not None:  # by far the most frequent case, and nobody may ever ask for it
                self.tasks.put(id, row)
                arrived.append(ready)
                continue
            try:
                record = self._decode[Task](row) if is_there else None
                self._commit((Task, id), record, batch.read_at)
            except InvalidDataError as error:
                unreadable = error
        self._index(arrived)
        return unreadable

    def _index(self, arrived: list[Ready]) -> None:
        """Let new tasks be found that may be claimed; empties the list."""
        arrived.sort(key=itemgetter(0))
        self._pending.extend([key for key, _, _ in arrived])
        self.ready.extend(arrived)
        arrived.clear()

    def _is_new(self, id: str) -> bool:
        """Whether nothing is known of a task."""
        if id in self.tasks.entries or id in self._finished:
            return False
        place = (Task, id)
        return place not in self.unsaved and place not in self._aliases

    def _status_here(self, change: Change) -> str | None:
        """The status that the counts have an item in."""
        place = (ENTITY_KINDS[change.item], change.item_id)
        entry = self.unsaved.get(place)
        known = self._visible(place) if entry is None else entry.committed
        if known is not None:
            return str(known.status.value)
        # Finished tasks are counted, though few of them are in memory.
        return change.from_status if change.from_status in FINISHED else None

    def _count_status(self, before: str | None, change: Change) -> None:
        if change.item == _TASK:
            counts, after = self.task_counts, change.to_status
            if before is not None:
                counts[before] -= 1
                if counts[before] < 0:  # a row that somebody inserted by hand
                    self.is_counted = False
            if after is not None:
                counts[after] += 1

    def _catch_up_with(self, revision: int) -> None:
        """All before `revision` is counted now: count it from where that has left it."""
        change, before = self.out_of_order.pop(revision)
        if change.item == _TASK and before != change.from_status:
            if before is not None:
                self.task_counts[before] += 1
            if change.from_status is not None:
                self.task_counts[change.from_status] -= 1

    def _close_gap(self) -> None:
        while self.contiguous + 1 in self.out_of_order:
            self.contiguous += 1
            self._catch_up_with(self.contiguous)

    def _commit(self, place: EntityKey, record: Record[Any] | None, revision: int) -> None:
        """Take over an entry that the database held at `revision`, unless a newer one is here."""
        entry = self.unsaved.get(place) if self.unsaved else None
        known = self._visible(place) if entry is None else entry.committed
        if record is not None:
            revision = record.version
            if record.kind is NodeInfo:
                record = self._with_heartbeats(record)
        if known is not None and known.version > revision:
            return
        if place in self._aliases and (record is None or record.version != self._aliases[place][1]):
            del self._aliases[place]
        if entry is None:
            self._show(place, known, record)
            return
        self._hide(place)
        entry.committed = record
        self._show(place, None, entry.record)

    def _with_heartbeats(self, record: Record[Any]) -> Record[Any]:
        """What was committed, with the heartbeats that are not."""
        if record.kind is NodeInfo:
            id = record.node_id
            heartbeats = self._flying.get(id, [])
            if id in self._waiting:
                heartbeats = [*heartbeats, self._waiting[id]]
            for beat in heartbeats:
                if beat.is_news_to(record):
                    record = beat.over(record)
        return record

    def _with_landed(self, record: Record[Any] | None, flush: int) -> Record[Any] | None:
        """What was read, with the heartbeats that this process has written behind `flush`."""
        if record is not None and record.kind is NodeInfo:
            landed = self._landed.get(record.node_id, {})
            newer = {name: value for name, (at, value) in landed.items() if at > flush}
            return record.evolve(**newer) if newer else record
        return record

    def _land(self, beaten: HeartbeatWritten) -> None:
        """Take over a heartbeat that was written."""
        beat, flush = beaten
        is_shown = self._is_own(beat)
        entry = self.unsaved.get((NodeInfo, beat.id)) if self.unsaved else None
        known = self.nodes.get(beat.id) if entry is None else entry.committed
        if known is None or flush <= self.beat:  # it was removed meanwhile, or read with the rest
            return
        landed = self._landed.setdefault(beat.id, {})
        landed["last_heartbeat"] = (flush, beat.at)
        for name, value in beat.usage.items():
            landed[name] = (flush, value)
        if entry is not None:
            entry.committed = beat.over(known)
        elif not is_shown:
            self._touch(beat.id, known, self._with_heartbeats(beat.over(known)))

    def _is_own(self, beat: Heartbeat) -> bool:
        """Whether a heartbeat was on its way to the writer, on which it is no more."""
        flying = self._flying.pop(beat.id, ())
        if len(flying) == 1 and flying[0] is beat:  # as nearly always
            return True
        others = [other for other in flying if other is not beat]
        if others:
            self._flying[beat.id] = others
        return len(others) < len(flying)

    def _touch(self, id: str, old: Record[NodeInfo], new: Record[NodeInfo]) -> None:
        """Replace what is safe_repr of a node by what it is after a heartbeat."""
        self.nodes.put(id, new)
        if new.running_tasks != old.running_tasks:  # no index knows the rest
            self._index_free(id, new)

    def _show_unsaved(self, place: EntityKey, entry: Unsaved) -> None:
        self._hide(place)
        self.unsaved[place] = entry
        self._show(place, None, entry.record)

    def _visible(self, place: EntityKey) -> Record[Any] | None:
        kind, id = place
        if kind is NodeInfo:
            return self.nodes.get(id)
        return self.tasks.get(id) or self._finished.get(id)

    def _hide(self, place: EntityKey) -> None:
        visible = self._visible(place)
        if visible is not None:
            self._show(place, visible, None)

    def _show(self, place: EntityKey, old: Record[Any] | None, new: Record[Any] | None) -> None:
        """Replace what is safe_repr of an entry, in all indexes."""
        if place[0] is Task:
            self._show_task(place[1], old, new)
        else:
            self._show_node(place[1], old, new)

    def _show_task(self, id: str, old: Record[Task] | None, new: Record[Task] | None) -> None:
        before = None if old is None else _pending_key(old)
        after = None if new is None else _pending_key(new)
        if before != after:
            if before is not None:
                self._pending.remove(before)
            if after is not None:
                self._pending.add(after)
        self._show_claimable(id, old, new)
        if new is not None and new.status not in FINISHED:
            self.tasks.put(id, new.row or new)  # a tuple costs the garbage collector nothing
            if old is not None:
                self._finished.pop(id, None)
            return
        if old is not None and old.status not in FINISHED:
            self.tasks.drop(id)
        if new is None or (Task, id) in self.unsaved:
            self._finished.pop(id, None)
        else:
            self._finish(id, new)

    def _show_claimable(self, id: str, old: Record[Task] | None, new: Record[Task] | None) -> None:
        before = None if old is None else _claimable(old)
        after = None if new is None else _claimable(new)
        if before != after:
            if before is not None:
                self.ready.remove(*before[:2])
            if after is not None:
                self.ready.add(*after)
        if old is not None and old.status in ASSIGNED:
            held = self._held[old.assigned_node]
            held.remove(id)
            if not held:
                del self._held[old.assigned_node]
        if new is not None and new.status in ASSIGNED:
            self._held.setdefault(new.assigned_node, set()).add(id)

    def _finish(self, id: str, record: Record[Task]) -> None:
        self._finished[id] = record
        self._finished.move_to_end(id)
        while len(self._finished) > self._finished_limit:
            evicted, _ = self._finished.popitem(last=False)
            self._aliases.pop((Task, evicted), None)

    def _show_node(
        self, id: str, old: Record[NodeInfo] | None, new: Record[NodeInfo] | None
    ) -> None:
        counted = self._counted((NodeInfo, id))
        if old is not None:
            self._node_counts[old.status] -= counted
        if old is None or new is None or not _have_same_skills(old, new):
            self._index_skills(id, old, new)
        if new is not None:
            self._node_counts[new.status] += counted
            self.nodes.put(id, new)
            self._index_free(id, new)
        elif old is not None:
            self.nodes.drop(id)
            self._free.pop(id, None)
        if old is None or new is None or old.registered_at != new.registered_at:
            self._newest = None

    def _index_skills(
        self, id: str, old: Record[NodeInfo] | None, new: Record[NodeInfo] | None
    ) -> None:
        before, after = _skills(old), _skills(new)
        for skill in before - after:
            self._skilled[skill].discard(id)
            if not self._skilled[skill]:
                del self._skilled[skill]
        for skill in after - before:
            self._skilled.setdefault(skill, set()).add(id)

    def _index_free(self, id: str, record: Record[NodeInfo]) -> None:
        running, places = record.running_tasks, record.max_concurrent_tasks
        if record.status is NodeStatus.ONLINE and running < places:
            self._free[id] = (running / places, running, id)
        else:
            self._free.pop(id, None)

    def _counted(self, place: EntityKey) -> bool:
        """Whether an entry is in the database, so that it counts in the totals."""
        entry = self.unsaved.get(place)
        return entry is None or entry.committed is not None

    def _nodes(self, ids: Iterable[str]) -> list[Record[NodeInfo]]:
        found = map(self.nodes.get, ids)
        return [record for record in found if record is not None]


def _of_each_status(counts: Mapping[str, int]) -> dict[str, int]:
    # No Counter: it takes three times as long to add one.
    return {status.value: counts.get(status.value, 0) for status in TaskStatus}


def _pending_key(record: Record[Task]) -> PendingKey | None:
    if record.status in WAITING:
        # Not the member itself: the garbage collector would go through the tuple for ever.
        return int(record.priority), record.submitted_at, record.task_id
    return None


def _claimable(record: Record[Task]) -> Ready | None:
    """How `ReadyTasks` knows a task; `None` if it may not be claimed."""
    if record.status is not TaskStatus.PENDING:
        return None
    key = _pending_key(record)
    assert key is not None
    skills = record.required_skills
    if type(skills) is not bytes:  # it is decoded, or empty
        skills = record.encoded("required_skills")
    return key, skills, record.not_before


def _skills(record: Record[NodeInfo] | None) -> frozenset[str]:
    """Under which skills a node is found: only while it is ONLINE."""
    if record is None or record.status is not NodeStatus.ONLINE:
        return frozenset()
    return frozenset(record.decoded("available_skills"))


def _have_same_skills(one: Record[NodeInfo], other: Record[NodeInfo]) -> bool:
    """Whether two nodes are found under the same ones; found out without decoding them."""
    name = "available_skills"
    return one.status is other.status and one.encoded(name) == other.encoded(name)


def _registered_at(record: Record[NodeInfo]) -> datetime:
    moment: datetime = record.registered_at
    return moment
