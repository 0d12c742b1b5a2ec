"""`Archive`: the reading half of `TaskRepository`, over the files of an archive."""

from __future__ import annotations

import asyncio
import heapq
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import groupby
from pathlib import Path
from typing import Any, TypeVar

import pyarrow as pa
import pyarrow.compute as pc

from openclaw_store.archive.files import ArchiveFile
from openclaw_store.archive.folder import Entry, Folder
from openclaw_store.archive.layout import CHANGES, HISTORIES, TASKS, VOIDS, Image, Layout
from openclaw_store.archive.selection import Selection
from openclaw_store.database import Database, from_microseconds, statements_of
from openclaw_store.domain import (
    Change,
    ChangeKind,
    Clock,
    Record,
    Task,
    TaskFilter,
    TaskPage,
    TaskStatus,
    check_enum,
    check_filter,
    check_key,
    check_limit,
    check_positive,
    utc_now,
)
from openclaw_store.errors import UnavailableError
from openclaw_store.repositories import check_ids, each_of_pages
from openclaw_store.repositories.pages import cursor_of, position_of
from openclaw_store.repositories.queries import refuse_sealed

Result = TypeVar("Result")

Position = tuple[int, str]
"""Time of submission and identifier of a task, by which lists are sorted."""

Selected = tuple[list[Image], list[Image]]
"""Tasks, and their changes."""

_PAGE_SIZE = 250
_ATTEMPTS = 5
"""Reads after which files that vanish all the time are an error."""

_check_status = check_enum(TaskStatus)


@dataclass(frozen=True, slots=True)
class Snapshot:
    """The files of an archive at one time, without replaced ones, and its void copies."""

    tasks: Sequence[ArchiveFile]
    voids: dict[str, Counter[tuple[str, int]]]
    """Identifier and version of each void copy, by cluster."""

    def is_void(self, file: ArchiveFile, id: str, version: int) -> bool:
        return (id, version) in self.voids.get(file.cluster, ())


class Archive:
    """The tasks in an archive, read from its files.

    It has the reading methods of `TaskRepository`, with the same results. Each call reads the
    folder as it is then: a run of another process that ended before is visible.

    Args:
        location: The folder, or the URL of one.
        cluster: Only the tasks of this cluster; `None` for all clusters.
        clock: Returns the time from which a `timedelta` in a filter counts.
        database: An open database, with the keys of which sealed values are opened.
    """

    def __init__(
        self,
        location: str | Path,
        cluster: str | None = None,
        *,
        clock: Clock = utc_now,
        database: Database | None = None,
    ) -> None:
        self._sql = statements_of("sqlite")  # its rows have the form of an image
        if database is not None:
            self._sql = self._sql.protected_by(database.statements.protection)
        self.folder = Folder(location)
        self._cluster = cluster
        self._clock = clock
        self._files: dict[Entry, ArchiveFile] = {}
        self._voids: tuple[Sequence[ArchiveFile], dict[str, Counter[tuple[str, int]]]] = ((), {})

    def __repr__(self) -> str:
        return f"<Archive {self.folder.location!r}>"

    async def get(self, task_id: str) -> Task | None:
        """Return the newest archived copy of a task, or `None`."""
        found = await self._read(partial(self._find, id=check_key("task_id", task_id)))
        return found[0].copy() if found else None

    async def get_tasks(self, ids: Iterable[str]) -> list[Task | None]:
        """Return the tasks with these identifiers, in their order; `None` for an unknown one."""
        return [await self.get(id) for id in check_ids(ids)]

    async def list_tasks(
        self, filter: TaskFilter | None = None, *, after: str | None = None, limit: int = 100
    ) -> TaskPage:
        """Return a page of the tasks that match a filter, newest submitted first.

        Raises:
            InvalidDataError: If a condition of the filter, or the cursor, is invalid.
        """
        records, after = await self.list_records(filter, after=after, limit=limit)
        return TaskPage([record.copy() for record in records], after)

    async def list_records(
        self,
        filter: TaskFilter | None,
        *,
        after: str | None = None,
        until: str | None = None,
        limit: int = 100,
    ) -> tuple[list[Record[Task]], str | None]:
        """Return a page as `list_tasks`, as records, and the cursor of the next one.

        Args:
            until: The cursor of the last task that the page may have.
        """
        check_positive("limit", limit)
        selection = self._selection(filter)
        begin, end = (None if one is None else position_of(one) for one in (after, until))
        found = await self._read(partial(self._page, selection, begin, end, limit + 1))
        return found[:limit], cursor_of(found[limit - 1]) if len(found) > limit else None

    async def iter_tasks(self, filter: TaskFilter | None = None) -> AsyncIterator[Task]:
        """Yield the tasks that match a filter as `list_tasks`, one page in memory at a time."""
        checked = check_filter(TaskFilter, filter, self._clock())
        async for task in each_of_pages(partial(self.list_tasks, checked, limit=_PAGE_SIZE)):
            yield task

    async def count_tasks(self, filter: TaskFilter | None = None) -> int:
        """Count the tasks that match a filter."""
        selection = self._selection(filter)
        return await self._read(partial(self._count, selection))

    async def list_by_status(self, status: TaskStatus, limit: int | None = None) -> list[Task]:
        """Return the tasks with this status, newest submitted first."""
        return await self._list(TaskFilter(status=_check_status("status", status)), limit)

    async def list_by_node(self, node_id: str) -> list[Task]:
        """Return the tasks of this node, newest submitted first."""
        return await self._list(TaskFilter(node=check_key("node_id", node_id)), None)

    async def list_by_user(self, user_id: str, limit: int | None = 100) -> list[Task]:
        """Return the tasks of this user, newest submitted first."""
        return await self._list(TaskFilter(user=check_key("user_id", user_id)), limit)

    async def count_by_status(self, status: TaskStatus | None = None) -> int:
        """Count the tasks with this status; `None` counts all."""
        if status is None:
            return await self.count_tasks()
        return await self.count_tasks(TaskFilter(status=_check_status("status", status)))

    async def history(self, task_id: str) -> list[Change]:
        """Return the archived changes of a task, oldest first."""
        return await self._read(partial(self._history, id=check_key("task_id", task_id)))

    async def selected(self, filter: TaskFilter) -> AsyncIterator[Selected]:
        """Yield the tasks that match a checked filter, one row group at a time, by file."""
        selection = Selection(filter)
        snapshot = await asyncio.to_thread(self.snapshot)
        for file in snapshot.tasks:
            changes = None
            for group in file.groups:
                if not selection.may_match(file, group):
                    continue
                if changes is None:
                    changes = await asyncio.to_thread(self.changes_of, file)
                work = partial(self._selected, selection, snapshot, file, group, changes)
                yield await asyncio.to_thread(work)

    def changes_of(self, file: ArchiveFile) -> Any:
        """Return the changes of the tasks in a file, as a table; blocks the thread."""
        path = file.path.replace(TASKS.folder, HISTORIES.folder, 1)
        for one in self.files(HISTORIES):
            if one.path == path:
                return one.read()
        return HISTORIES.table([])

    def _selected(
        self,
        selection: Selection,
        snapshot: Snapshot,
        file: ArchiveFile,
        group: int,
        changes: Any,
    ) -> Selected:
        table = file.read([group])
        table = table.filter(selection.mask(table))
        pairs = zip(table["task_id"].to_pylist(), table["version"].to_pylist(), strict=True)
        kept = pa.array([not snapshot.is_void(file, *pair) for pair in pairs], pa.bool_())
        table = table.filter(kept)
        is_of_task = pc.is_in(changes["item_id"], table["task_id"].combine_chunks())
        return TASKS.images_of(table), HISTORIES.images_of(changes.filter(is_of_task))

    def _selection(self, filter: TaskFilter | None) -> Selection:
        checked = check_filter(TaskFilter, filter, self._clock())
        refuse_sealed(checked, self._sql)
        return Selection(checked)

    async def _list(self, filter: TaskFilter, limit: int | None) -> list[Task]:
        most = check_limit(limit)
        return [task async for task in _first(self.iter_tasks(filter), most)]

    async def _read(self, work: Callable[[Snapshot], Result]) -> Result:
        """Run `work` on a thread, with the files as they are now."""

        def read() -> Result:
            for _ in range(_ATTEMPTS):
                try:
                    return work(self.snapshot())
                except FileNotFoundError as error:  # replaced by a compaction, or undone
                    gone = error
            raise UnavailableError(f"{self.folder.location}: {gone}: try again") from gone

        return await asyncio.to_thread(read)

    def snapshot(self) -> Snapshot:
        """Return the files as they are now; blocks the thread."""
        voids = self.files(VOIDS)
        if [one.path for one in voids] != [one.path for one in self._voids[0]]:
            found: dict[str, Counter[tuple[str, int]]] = {}
            for file in voids:
                columns = (file.read()[name].to_pylist() for name in VOIDS.names)
                found.setdefault(file.cluster, Counter()).update(zip(*columns, strict=True))
            self._voids = voids, found
        return Snapshot(self.files(TASKS), self._voids[1])

    def files(self, layout: Layout) -> list[ArchiveFile]:
        """Return the files of a layout that no other one replaces; blocks the thread."""
        entries = self.folder.list(layout.folder)
        files = [self._files.get(one) or ArchiveFile(self.folder, one) for one in entries]
        known = {one: file for one, file in self._files.items() if file.layout is not layout}
        self._files = {**known, **dict(zip(entries, files, strict=True))}
        replaced = frozenset[str]().union(*(file.replaced for file in files))
        return [
            file
            for file in files
            if file.path not in replaced and self._cluster in (None, file.cluster)
        ]

    def _find(self, snapshot: Snapshot, id: str) -> list[Record[Task]]:
        """Return the copies of a task that are not void, newest first."""
        found = [
            record
            for file in snapshot.tasks
            for table in file.find(id)
            for record in self._records(table)
            if not snapshot.is_void(file, id, record.version)
        ]
        return sorted(found, key=lambda record: record.version, reverse=True)

    def _page(
        self,
        selection: Selection,
        after: Position | None,
        until: Position | None,
        size: int,
        snapshot: Snapshot,
    ) -> list[Record[Task]]:
        """Return the first tasks behind a position, from the row groups with the newest ones."""
        columns = {"submitted_at", "task_id", "version", *selection.columns}
        groups = sorted(
            ((newest or 0, number, group)
            for number, file in enumerate(snapshot.tasks)
            for group, (_, newest) in enumerate(file.bounds("submitted_at"))),
            reverse=True,
        )  # fmt: skip
        best: list[tuple[Position, int, int, int, int]] = []  # a heap
        for newest, number, group in groups:
            if len(best) == size and newest < best[0][0][0]:
                break
            file = snapshot.tasks[number]
            oldest = file.bounds("submitted_at")[group][0] or 0
            if (after and oldest > after[0]) or (until and newest < until[0]):
                continue
            if not selection.may_match(file, group):
                continue
            table = file.read([group], columns)
            rows = pc.indices_nonzero(selection.mask(table))
            for row, at, id, version in _positions(table, rows):
                place = (at, id)
                if (after and place >= after) or (until and place < until):
                    continue
                if snapshot.is_void(file, id, version):
                    continue
                one = (place, version, number, group, row)
                if len(best) < size:
                    heapq.heappush(best, one)
                elif one > best[0]:
                    heapq.heapreplace(best, one)
        return self._fetch(snapshot, sorted(best, reverse=True))

    def _fetch(self, snapshot: Snapshot, found: Sequence[Any]) -> list[Record[Task]]:
        records: dict[Any, Record[Task]] = {}
        by_group = sorted(found, key=lambda one: one[2:])
        for (number, group), of_group in groupby(by_group, key=lambda one: one[2:4]):
            places = [*of_group]
            table = snapshot.tasks[number].read([group])
            rows = table.take(pa.array([one[-1] for one in places], pa.int64()))
            records.update(zip(places, self._records(rows), strict=True))
        return [records[one] for one in found]

    def _records(self, table: Any) -> list[Record[Task]]:
        decode = self._sql.decode[Task]
        return [decode(tuple(image)) for image in TASKS.images_of(table)]

    def _count(self, selection: Selection, snapshot: Snapshot) -> int:
        total = 0
        columns = {"task_id", "version", *selection.columns}
        for file in snapshot.tasks:
            voids = snapshot.voids.get(file.cluster)
            if selection.is_everything and not voids:
                total += file.rows
                continue
            groups = [group for group in file.groups if selection.may_match(file, group)]
            for group in groups:
                table = file.read([group], columns)
                mask = selection.mask(table)
                total += pc.sum(mask).as_py() or 0
                if voids:
                    versions = pa.array([version for _, version in voids], pa.int64())
                    rows = pc.indices_nonzero(pc.and_(mask, pc.is_in(table["version"], versions)))
                    pairs = (table.take(rows)[name].to_pylist() for name in ("task_id", "version"))
                    total -= sum(pair in voids for pair in zip(*pairs, strict=True))
        return total

    def _history(self, snapshot: Snapshot, id: str) -> list[Change]:
        rows = [
            row
            for layout in (HISTORIES, CHANGES)
            for file in self.files(layout)
            for table in file.find(id)
            for row in layout.images_of(table)
        ]
        read = self._sql.read_reason
        changes = {
            revision: Change(
                revision, from_microseconds(at), item, id, ChangeKind(kind), was, now, node,
                read(item, id, reason), previous,
            )
            for revision, at, item, id, kind, was, now, node, reason, previous in rows
            if item == "task"
        }  # fmt: skip
        return [changes[key] for key in sorted(changes)]


def _positions(table: Any, rows: Any) -> Iterator[tuple[int, int, str, int]]:
    chosen = table.select(["submitted_at", "task_id", "version"]).take(rows)
    columns = [chosen["submitted_at"].cast(pa.int64()), chosen["task_id"], chosen["version"]]
    return zip(rows.to_pylist(), *(one.to_pylist() for one in columns), strict=True)


async def _first(tasks: AsyncIterator[Task], limit: int | None) -> AsyncIterator[Task]:
    number = 0
    async for task in tasks:
        if number == limit:
            return
        number += 1
        yield task
