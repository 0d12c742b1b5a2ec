"""The cache: committed entities, unsaved entries and pending heartbeats, in memory.

Changes arrive in two ways that may cross: from the commits of this process, as they happen, and
from the change log, in order. Content is compared by `version`, so an entity never goes back; each
change is counted once, by the way on which it arrives first.

This module never awaits, and does not know the clock or SQL. Records are immutable, so the cache
returns them without copies; the public calls copy them.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from openclaw_store.domain import (
    ENTITY_KINDS,
    FINISHED,
    LIVE,
    SMALL_BYTES,
    Change,
    ClusterState,
    EntityKey,
    NodeInfo,
    NodeStatus,
    Raw,
    Record,
    Task,
    TaskStatus,
    key_of,
)
from openclaw_store.errors import InvalidDataError
from openclaw_store.repositories import Event, Heartbeat, HeartbeatWritten, TasksAdded
from openclaw_store.state_manager.applied_changes import AppliedChanges
from openclaw_store.state_manager.change_feed import STEP_WIDTH, ChangeBatch, InitialState
from openclaw_store.state_manager.node_index import NodeIndex
from openclaw_store.state_manager.pending_heartbeats import PendingHeartbeats
from openclaw_store.state_manager.snapshot import Records
from openclaw_store.state_manager.task_index import Indexed, TaskIndex

Committed = Event | HeartbeatWritten | TasksAdded
"""A part of a commit of this process."""

_MANY = 64
"""Changes of a commit after which tasks are kept as rows, as if they had been loaded."""


@dataclass(slots=True)
class Unsaved:
    """An entry that is only in memory."""

    record: Record[Any]
    base: Record[Any] | None
    """The stored record that it replaces when it is written; `None` for a new entity."""
    committed: Record[Any] | None
    """The newest known record of the database."""


class Cache:
    """Live tasks, all nodes, and up to `finished_limit` of the last used finished tasks."""

    def __init__(self, start: InitialState, finished_limit: int) -> None:
        self._finished_limit = finished_limit
        self._decode = start.decode
        self._encode = start.encode
        self._read_entry = start.read_entry
        self.tasks: Records[Task] = Records(start.decode[Task])
        self.nodes: Records[NodeInfo] = Records(start.decode[NodeInfo])
        self.unsaved: dict[EntityKey, Unsaved] = {}
        self.applied = AppliedChanges(start)
        """Revisions applied, and the counts of tasks."""
        self.heartbeat_sequence = start.heartbeat_sequence
        """The newest heartbeat sequence applied."""
        self._finished: OrderedDict[str, Record[Task] | Raw] = OrderedDict()
        self.task_index = TaskIndex()
        self.node_index = NodeIndex(self.nodes)
        # The last version of an entry while it was unsaved, and the version it was stored with.
        self._aliases: dict[EntityKey, tuple[int, int]] = {}
        self.heartbeats = PendingHeartbeats()

    def load(self, kind: type[Any], rows: Sequence[Raw]) -> list[InvalidDataError]:
        """Add rows of the initial state; return the errors of unreadable rows."""
        unreadable: list[InvalidDataError] = []
        arrived: list[Indexed] = []
        for row in rows:
            try:
                if kind is Task:
                    arrived.append(self._read_entry(row))
                    self.tasks.put(row[0], row)
                else:
                    self._show_node(row[0], None, self._decode[kind](row))
            except InvalidDataError as error:
                unreadable.append(error)
        self.task_index.extend(arrived)
        return unreadable

    def keep_unsaved(self, other: Cache) -> None:
        """Keep the unsaved entries and heartbeats of the cache that this one replaces."""
        for key, entry in other.unsaved.items():
            entry.committed = self._visible(key)
            self._show_unsaved(key, entry)
        self._aliases.update(other._aliases)  # an outdated one yields `StaleVersionError`
        self.heartbeats.keep(other.heartbeats)
        for id in self.heartbeats.node_ids():
            record = self.nodes.get(id)
            if record is not None:
                self._replace_node(id, record, self.heartbeats.over(record))

    def apply(self, events: Sequence[Committed]) -> None:
        """Apply a commit of this process.

        The tasks of a commit with many changes are kept as rows: most of them are not read soon,
        and each full pass of the garbage collector takes microseconds for a record, nothing for a
        row.

        Raises:
            InvalidDataError: If a row cannot be read; the rest was applied.
        """
        unreadable: InvalidDataError | None = None
        arrived: list[Record[Task]] = []
        for event in events:
            if isinstance(event, HeartbeatWritten):
                self._apply_written(event)
                continue
            if isinstance(event, TasksAdded):
                if arrived:
                    self.task_index.extend(arrived)
                    arrived = []
                self._apply_added(event)
                continue
            kind, id, record, change = event
            # Counted before: `catch_up` has read this change, and its content or newer content.
            if not self.applied.count(change, self._counted_status):
                continue
            if (
                record is not None
                and record.row is not None  # inserted by this commit
                and kind is Task
                and record.status is TaskStatus.PENDING
                and self._is_new(id)
            ):
                self.tasks.put(id, record.row)
                arrived.append(record)
                continue
            if arrived:  # the event may change one of these tasks
                self.task_index.extend(arrived)
                arrived = []
            is_one_of_many = kind is Task and len(events) >= _MANY
            # The loop waits for the encoding, and with keys for the sealing.
            if record is not None and is_one_of_many and record.size <= SMALL_BYTES:
                record.row = record.row or self._encode(record)
            try:
                self._apply_stored((kind, id), record, change.revision)
            except InvalidDataError as error:
                unreadable = error
        if arrived:
            self.task_index.extend(arrived)
        if unreadable is not None:
            raise unreadable

    def _apply_added(self, event: TasksAdded) -> None:
        entries = list(map(self._read_entry, event.rows))
        are_new = all(
            entry.status is TaskStatus.PENDING and self._is_new(entry.task_id) for entry in entries
        )
        if are_new and self.applied.count_added(event):
            for row in event.rows:
                self.tasks.put(row[0], row)
            self.task_index.extend(entries)
        else:
            self.apply(list(event.events()))

    def catch_up(self, batch: ChangeBatch) -> None:
        """Apply a batch of the change log.

        Raises:
            InvalidDataError: If a row cannot be read; the rest was applied.
        """
        tasks, nodes = self.applied.count_batch(batch)
        unreadable: InvalidDataError | None = None
        for (kind, id), error in batch.unreadable.items():
            (tasks if kind is Task else nodes).pop(id, None)
            unreadable = error
        unreadable = self._apply_tasks(tasks, batch) or unreadable
        for id in nodes:
            node = batch.nodes.get(id)
            if node is not None:
                node = self.heartbeats.written_over(node, batch.heartbeat_sequence)
            try:
                self._apply_stored((NodeInfo, id), node, batch.read_at)
            except InvalidDataError as error:
                unreadable = error
        for version, heartbeat in batch.heartbeats:
            key = (NodeInfo, heartbeat.id)
            known = self.unsaved[key].committed if key in self.unsaved else self._visible(key)
            if known is not None and known.version == version:
                node = heartbeat.over(known)
                node = self.heartbeats.written_over(node, batch.heartbeat_sequence)
                self._apply_stored(key, node, version)
        self.heartbeat_sequence = max(self.heartbeat_sequence, batch.heartbeat_sequence)
        self.heartbeats.forget_written(self.heartbeat_sequence)
        self.applied.finish_batch(batch)
        if unreadable is not None:
            raise unreadable

    def remember(self, record: Record[Task]) -> None:
        """Cache a finished task that was read from the database."""
        if record.status in FINISHED and (Task, record.task_id) not in self.unsaved:
            self._finish(record.task_id, record)

    def stage(self, record: Record[Any], base: Record[Any] | None) -> None:
        """Show an unsaved entry, made from the stored record `base`."""
        key = key_of(record)
        entry = self.unsaved.get(key)
        committed = (self._visible(key) or base) if entry is None else entry.committed
        self._show_unsaved(key, Unsaved(record, base, committed))

    def discard(self, key: EntityKey) -> bool:
        """Drop an unsaved entry; `False` if there is none."""
        entry = self.unsaved.get(key)
        if entry is not None:
            self.unstage(key, entry, None)
        return entry is not None

    def unstage(self, key: EntityKey, entry: Unsaved, stored: Record[Any] | None) -> None:
        """Show the stored record after a flush: `stored`, or `None` if the entry was dropped."""
        present = self.unsaved.get(key)
        if present is None:
            return
        if present is not entry:  # changed again during the flush: it now replaces `stored`
            if stored is not None and present.base is entry.base:
                present.base = stored
            return
        self._hide(key)
        del self.unsaved[key]
        committed = entry.committed
        if stored is not None and (committed is None or committed.version < stored.version):
            entry.committed = stored
        if entry.committed is not None:
            self._show(key, None, self._with_heartbeats(entry.committed))
            # A caller may write again with the copy that it got while the entry was unsaved.
            if stored is not None and entry.committed.version == stored.version:
                self._aliases[key] = (entry.record.version, stored.version)

    def flushed_version(self, key: EntityKey, version: int) -> int:
        """Return the stored version of a copy made while its entity was unsaved."""
        unsaved, stored = self._aliases.get(key, (0, 0))
        return stored if version < 0 and version == unsaved else version

    def show_heartbeat(self, heartbeat: Heartbeat) -> None:
        """Show a heartbeat, which waits until it is taken."""
        id = heartbeat.id
        self.heartbeats.add(heartbeat)
        record = self.nodes.get(id)
        if record is not None:
            shown = heartbeat.over(record)
            self._replace_node(id, record, shown)
            if (NodeInfo, id) in self.unsaved:
                self.unsaved[NodeInfo, id].record = shown

    def acknowledge_heartbeats(
        self, heartbeats: Sequence[Heartbeat], known: Sequence[bool] | None
    ) -> bool:
        """Record the outcome of heartbeats, as `PendingHeartbeats.acknowledge` does."""
        return self.heartbeats.acknowledge(
            heartbeats, known, is_unsaved=lambda node_id: (NodeInfo, node_id) in self.unsaved
        )

    def task(self, task_id: str) -> Record[Task] | None:
        """Return a live or unsaved task, or a finished task in memory."""
        return self.find((Task, task_id))

    def find(self, key: EntityKey) -> Record[Any] | None:
        """Return a node, or a task as `task` does."""
        record = self._visible(key)
        if key[0] is Task:
            if key[1] in self._finished:
                self._finished.move_to_end(key[1])
            elif record is None and key in self.unsaved:  # finished
                record = self.unsaved[key].record
        return record

    def task_stats(self) -> dict[str, int]:
        """Return the number of tasks in the database, by status."""
        # A count can be one too low after a change of a task that another process changed before,
        # until that earlier change is read.
        return {status: max(0, count) for status, count in self.applied.task_counts.items()}

    def node_stats(self) -> dict[str, int]:
        """Return the number of nodes in the database: `total`, `online`, `offline` and `busy`."""
        unstored = [key for key in self.unsaved if not self._is_stored(key)]
        return self.node_index.stats(id for kind, id in unstored if kind is NodeInfo)

    def sizes(self) -> dict[str, int]:
        """Return the numbers of cached and of unsaved entries."""
        return {
            "cached_tasks": len(self.tasks) + len(self._finished),
            "unsaved_entries": len(self.unsaved),
            "unsaved_heartbeats": len(self.heartbeats.node_ids()),
        }

    def state(self) -> ClusterState:
        """Return a snapshot, in constant time."""
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

    def _apply_tasks(
        self, tasks: Mapping[str, Sequence[Any]], batch: ChangeBatch
    ) -> InvalidDataError | None:
        """Apply the last change of each task; return the error of an unreadable row."""
        unreadable: InvalidDataError | None = None
        arrived: list[Indexed] = []
        is_plain = not self.unsaved and not self._aliases
        for id, change in tasks.items():
            row = None if change[STEP_WIDTH] is None else tuple(change[STEP_WIDTH:])
            try:
                if not is_plain and ((Task, id) in self.unsaved or (Task, id) in self._aliases):
                    record = None if row is None else self._decode[Task](row)
                    self._apply_stored((Task, id), record, batch.read_at)
                    continue
                new = None if row is None else self._read_entry(row)
            except InvalidDataError as error:
                unreadable = error
                continue
            known: Any = self.tasks.entries.get(id) or self._finished.get(id)
            if known is None and row is not None and new is not None and new.status in LIVE:
                self.tasks.put(id, row)  # the most frequent case
                arrived.append(new)
                continue
            old: Indexed | None = self._read_entry(known) if type(known) is tuple else known
            if old is None or old.version <= (batch.read_at if new is None else new.version):
                self._show_task(id, old, new, row)
        self.task_index.extend(arrived)
        return unreadable

    def _is_new(self, id: str) -> bool:
        """Return true if the cache has no trace of a task."""
        if id in self.tasks.entries or id in self._finished:
            return False
        key = (Task, id)
        return key not in self.unsaved and key not in self._aliases

    def _counted_status(self, change: Change) -> str | None:
        """Return the status under which an entity is counted."""
        key = (ENTITY_KINDS[change.item], change.item_id)
        entry = self.unsaved.get(key)
        known = self._visible(key) if entry is None else entry.committed
        if known is not None:
            return str(known.status.value)
        # Most finished tasks are counted, but not in memory.
        return change.from_status if change.from_status in FINISHED else None

    def _apply_stored(self, key: EntityKey, record: Record[Any] | None, revision: int) -> None:
        """Apply the stored record as of `revision`, unless the cache has a newer one."""
        entry = self.unsaved.get(key) if self.unsaved else None
        known: Any = self._visible_entry(key) if entry is None else entry.committed
        if record is not None:
            revision = record.version
            record = self._with_heartbeats(record)
        # An entry never goes back: the other of the two ways has brought newer content.
        if known is not None and known.version > revision:
            return
        if key in self._aliases and (record is None or record.version != self._aliases[key][1]):
            del self._aliases[key]
        if entry is None:
            self._show(key, known, record)
            return
        # Hidden and shown again: `_is_stored`, and so the totals, depend on `committed`.
        self._hide(key)
        entry.committed = record
        self._show(key, None, entry.record)

    def _with_heartbeats(self, record: Record[Any]) -> Record[Any]:
        """Return a stored record; a node with the heartbeats that are not written yet."""
        return self.heartbeats.over(record) if record.kind is NodeInfo else record

    def _apply_written(self, event: HeartbeatWritten) -> None:
        heartbeat, sequence = event
        is_shown = self.heartbeats.end_flight(heartbeat)
        entry = self.unsaved.get((NodeInfo, heartbeat.id)) if self.unsaved else None
        known = self.nodes.get(heartbeat.id) if entry is None else entry.committed
        if known is None or sequence <= self.heartbeat_sequence:  # removed, or already read
            return
        self.heartbeats.note_written(event)
        if entry is not None:
            entry.committed = heartbeat.over(known)
        elif not is_shown:
            shown = self.heartbeats.over(heartbeat.over(known))
            self._replace_node(heartbeat.id, known, shown)

    def _replace_node(self, id: str, old: Record[NodeInfo], new: Record[NodeInfo]) -> None:
        """Replace a node that differs only in the values of a heartbeat."""
        self.nodes.put(id, new)
        if new.running_tasks != old.running_tasks:  # the only indexed value of a heartbeat
            self.node_index.index_load(id, new)

    def _show_unsaved(self, key: EntityKey, entry: Unsaved) -> None:
        self._hide(key)
        self.unsaved[key] = entry
        self._show(key, None, entry.record)

    def _visible(self, key: EntityKey) -> Record[Any] | None:
        kind, id = key
        records: Records[Any] = self.nodes if kind is NodeInfo else self.tasks
        found: Any = records.entries.get(id)
        if type(found) is tuple:  # never read
            found = records.get(id)
        elif found is None and kind is Task:
            found = self._finished.get(id)
            if type(found) is tuple:
                found = self._finished[id] = self._decode[Task](found)
        return found  # type: ignore[no-any-return]

    def _visible_entry(self, key: EntityKey) -> Indexed | Record[NodeInfo] | None:
        """Return the visible record; for a task that was never read, only its index entry."""
        row: Any = self.tasks.entries.get(key[1]) if key[0] is Task else None
        return self._read_entry(row) if type(row) is tuple else self._visible(key)

    def _hide(self, key: EntityKey) -> None:
        visible = self._visible(key)
        if visible is not None:
            self._show(key, visible, None)

    def _show(self, key: EntityKey, old: Any, new: Record[Any] | None) -> None:
        """Replace a visible record, and update the indexes."""
        if key[0] is Task:
            # The garbage collector does not track a tuple.
            self._show_task(key[1], old, new, new and (new.row or new))
        else:
            self._show_node(key[1], old, new)

    def _show_task(
        self, id: str, old: Indexed | None, new: Indexed | None, entry: Record[Task] | Raw | None
    ) -> None:
        """Replace a visible task by an entry; `new` has the indexed fields of the entry."""
        self.task_index.replace(id, old, new)
        if entry is not None and new is not None and new.status not in FINISHED:
            self.tasks.put(id, entry)
            if old is not None:
                self._finished.pop(id, None)
            return
        if old is not None and old.status not in FINISHED:
            self.tasks.drop(id)
        if entry is None or (Task, id) in self.unsaved:
            self._finished.pop(id, None)
        else:
            self._finish(id, entry)

    def _finish(self, id: str, entry: Record[Task] | Raw) -> None:
        self._finished[id] = entry
        self._finished.move_to_end(id)
        while len(self._finished) > self._finished_limit:
            evicted, _ = self._finished.popitem(last=False)
            self._aliases.pop((Task, evicted), None)

    def _show_node(self, id: str, old: Record[Any] | None, new: Record[Any] | None) -> None:
        # The index first: it refuses a node that cannot be read, and memory keeps the old one.
        self.node_index.replace(id, old, new, is_stored=self._is_stored((NodeInfo, id)))
        if new is not None:
            self.nodes.put(id, new)
        elif old is not None:
            self.nodes.drop(id)

    def _is_stored(self, key: EntityKey) -> bool:
        """Return true if an entity is in the database, and so counts in the totals."""
        entry = self.unsaved.get(key)
        return entry is None or entry.committed is not None
