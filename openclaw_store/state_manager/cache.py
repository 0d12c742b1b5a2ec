"""The picture of the cluster in memory: what was committed, and what is only here so far.

It learns of commits in two ways that may cross: from the writer of this process, as they happen,
and from the feed, in order and with those of other processes. Content is guarded by `version`, so
an entry never goes back; every change is counted once, whichever way it came first.

Nothing here awaits, reads the clock or knows SQL. Records never change, so they are handed out
as they are, and copied by whoever talks to callers.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from openclaw_store.domain import (
    ENTITY_KINDS,
    ENTITY_NAMES,
    FINISHED,
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
from openclaw_store.state_manager.applied_changes import AppliedChanges
from openclaw_store.state_manager.change_feed import (
    STEP_WIDTH,
    ChangeBatch,
    InitialRows,
    InitialState,
)
from openclaw_store.state_manager.node_index import NodeIndex
from openclaw_store.state_manager.ready_queue import Ready
from openclaw_store.state_manager.snapshot import Records
from openclaw_store.state_manager.task_index import TaskIndex, ready_of

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
        self.applied = AppliedChanges(start)
        """Revisions applied, and the counts of tasks."""
        self.beat = start.beat
        """The newest heartbeat sequence applied."""
        self._finished: OrderedDict[str, Record[Task]] = OrderedDict()
        self.task_index = TaskIndex()
        self.node_index = NodeIndex(self.nodes)
        # The last version an entry had while it was unsaved, and the one that it was written under.
        self._aliases: dict[EntityKey, tuple[int, int]] = {}
        self.waiting: dict[str, Heartbeat] = {}
        """Heartbeats that are not handed to the writer yet, by node."""
        self._flying: dict[str, list[Heartbeat]] = {}  # and those that it has not written yet
        # And what they said that is written since the last `catch_up`, by field, with the flush.
        self._landed: dict[str, dict[str, tuple[int, Any]]] = {}

    def load(self, page: InitialRows) -> None:
        """Take over a page of the initial state."""
        if page.kind is Task:
            self.tasks.load(page.rows)
            self.task_index.load(page)
        else:
            for row in page.rows:
                self._show((page.kind, row[0]), None, self._decode[page.kind](row))

    def keep_unsaved(self, other: Cache) -> None:
        """Take over what is only in memory, from the cache that this one replaces."""
        for place, entry in other.unsaved.items():
            entry.committed = self._visible(place)
            self._show_unsaved(place, entry)
        self._aliases.update(other._aliases)  # one that is outdated leads to a stale version
        self.waiting, self._flying = other.waiting, other._flying
        for id in {*self.waiting, *self._flying}:
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
                ready = ready_of(record)
                if ready is not None:
                    self.tasks.put(id, record.row)
                    arrived.append(ready)
                    continue
            if arrived:  # a transaction may have added a task, and changed it, too
                self.task_index.add(arrived)
            try:
                self._commit((kind, id), record, change.revision)
            except InvalidDataError as error:
                unreadable = error
        if arrived:
            self.task_index.add(arrived)
        if unreadable is not None:
            raise unreadable

    def catch_up(self, batch: ChangeBatch) -> None:
        """Take over what the feed says, from this and other processes.

        Raises:
            InvalidDataError: If it met a row that cannot be read; it took over the rest.
        """
        applied = self.applied
        later = applied.later_than(batch.read_at)
        # A change committed after the snapshot cannot be told from one that its counts contain.
        recount = applied.contiguous <= batch.read_at
        tasks, nodes = applied.count_batch(batch)
        for change in later:  # what is here is newer
            (tasks if change.item == _TASK else nodes).pop(change.item_id, None)
        unreadable = self._take_over_tasks(tasks, batch)
        for id in nodes:
            node = self._with_landed(batch.nodes.get(id), batch.beat)
            self._commit((NodeInfo, id), node, batch.read_at)
        for node in batch.heartbeats:
            place = key_of(node)
            if self._visible(place) is not None:
                self._commit(place, self._with_landed(node, batch.beat), 0)
        self.beat = max(self.beat, batch.beat)
        self._landed = {
            id: newer
            for id, landed in self._landed.items()
            if (newer := {name: it for name, it in landed.items() if it[0] > self.beat})
        }
        applied.finish_batch(batch, later, recount=recount)
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
        waiting = self.waiting.get(beat.id)
        self.waiting[beat.id] = beat if waiting is None else beat.after(waiting)
        record = self.nodes.get(beat.id)
        if record is not None:
            touched = beat.over(record)
            self._touch(beat.id, record, touched)
            if self.unsaved and (NodeInfo, beat.id) in self.unsaved:
                self.unsaved[NodeInfo, beat.id].record = touched

    def take_heartbeats(self, node_ids: Iterable[str]) -> list[Heartbeat]:
        """Those of these nodes that wait; they are on their way to the writer now."""
        taken = [self.waiting.pop(id) for id in node_ids if id in self.waiting]
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
            newer = self.waiting.get(beat.id)
            self.waiting[beat.id] = beat if newer is None else newer.after(beat)
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
        """Return pending and scheduled tasks by priority, time of submission and identifier."""
        found = [self.tasks.get(id) for _, _, id in self.task_index.pending.first(limit)]
        return [record for record in found if record is not None]

    def task_stats(self) -> dict[str, int]:
        """Tasks in the database, by status."""
        # An own change of a task that another process has changed, too, is counted from what is
        # known here; until that process's change is seen, this can be one too few.
        return {status: max(0, count) for status, count in self.applied.task_counts.items()}

    def node_stats(self) -> dict[str, int]:
        """`total`, `online`, `offline`, `busy`."""
        unstored = [key for key in self.unsaved if not self._is_stored(key)]
        return self.node_index.stats(id for kind, id in unstored if kind is NodeInfo)

    def sizes(self) -> dict[str, int]:
        """How much is in memory, and how much of it alone."""
        return {
            "cached_tasks": len(self.tasks) + len(self._finished),
            "unsaved_entries": len(self.unsaved),
            "unsaved_heartbeats": len({*self.waiting, *self._flying}),
        }

    def state(self) -> ClusterState:
        """The present picture, in constant time."""
        counts = self.task_stats()
        return ClusterState(
            version=self.applied.version,
            updated_at=self.applied.updated_at,
            nodes=self.nodes.snapshot(),
            tasks=self.tasks.snapshot(),
            total_nodes=self.node_index.count(),
            online_nodes=self.node_index.count(NodeStatus.ONLINE),
            total_tasks=sum(counts.values()),
            running_tasks=counts[TaskStatus.RUNNING],
        )

    def _count(self, change: Change) -> bool:
        """Count a change; `False` if it was counted before."""
        if self.applied.is_next(change):
            return True
        if self.applied.is_applied(change.revision):
            return False
        self.applied.count_out_of_order(change, self._status_here(change))
        return True

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
        if arrived:
            self.task_index.add(arrived)
        return unreadable

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
            if id in self.waiting:
                heartbeats = [*heartbeats, self.waiting[id]]
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
            self.node_index.index_load(id, new)

    def _show_unsaved(self, place: EntityKey, entry: Unsaved) -> None:
        self._hide(place)
        self.unsaved[place] = entry
        self._show(place, None, entry.record)

    def _visible(self, place: EntityKey) -> Record[Any] | None:
        kind, id = place
        records: Records[Any] = self.nodes if kind is NodeInfo else self.tasks
        found = records.entries.get(id)
        if type(found) is tuple:  # nobody has asked for it yet
            found = records.get(id)
        if found is None and kind is Task:
            found = self._finished.get(id)
        return found  # type: ignore[return-value]  # a tuple was decoded

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
        self.task_index.replace(id, old, new)
        if new is not None and new.status not in FINISHED:
            self.tasks.put(id, new.row or new)  # the garbage collector does not track a tuple
            if old is not None:
                self._finished.pop(id, None)
            return
        if old is not None and old.status not in FINISHED:
            self.tasks.drop(id)
        if new is None or (Task, id) in self.unsaved:
            self._finished.pop(id, None)
        else:
            self._finish(id, new)

    def _finish(self, id: str, record: Record[Task]) -> None:
        self._finished[id] = record
        self._finished.move_to_end(id)
        while len(self._finished) > self._finished_limit:
            evicted, _ = self._finished.popitem(last=False)
            self._aliases.pop((Task, evicted), None)

    def _show_node(
        self, id: str, old: Record[NodeInfo] | None, new: Record[NodeInfo] | None
    ) -> None:
        if new is not None:
            self.nodes.put(id, new)
        elif old is not None:
            self.nodes.drop(id)
        self.node_index.replace(id, old, new, is_stored=self._is_stored((NodeInfo, id)))

    def _is_stored(self, key: EntityKey) -> bool:
        """Return whether an entity is in the database, so that it counts in the totals."""
        entry = self.unsaved.get(key)
        return entry is None or entry.committed is not None
