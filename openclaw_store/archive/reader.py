"""`Archive`: the reading half of `TaskRepository`, over the files of an archive."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Iterable, Iterator
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, TypeVar

import pyarrow as pa
import pyarrow.compute as pc

from openclaw_store.archive.files import ArchiveFile
from openclaw_store.archive.folder import Folder
from openclaw_store.archive.layout import CHANGES, HISTORY, TASKS, histories_of, rows_of
from openclaw_store.archive.selection import Selection
from openclaw_store.archive.snapshot import Catalogue, Snapshot
from openclaw_store.database import Database, Statements, from_microseconds, statements_of
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
from openclaw_store.encryption import Protection
from openclaw_store.errors import UnavailableError
from openclaw_store.repositories import check_ids, each_of_pages
from openclaw_store.repositories.pages import cursor_of, position_of
from openclaw_store.repositories.queries import refuse_sealed

Result = TypeVar("Result")

Position = tuple[int, str]
"""Time of submission and identifier of a task, by which lists are sorted."""

_PAGE_SIZE = 250
_ATTEMPTS = 5
"""Reads after which files that vanish all the time are an error."""

_PAGE_GROUPS = 16
"""Row groups that a page searches at once, at most."""

_check_status = check_enum(TaskStatus)


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
        self._protection = Protection() if database is None else database.statements.protection
        self._folder = Folder(location)
        self._catalogue = Catalogue(self._folder, cluster)
        self._clock = clock

    def __repr__(self) -> str:
        return f"<Archive {self._folder.location!r}>"

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

    def _selection(self, filter: TaskFilter | None) -> Selection:
        checked = check_filter(TaskFilter, filter, self._clock())
        refuse_sealed(checked, self._protection)
        return Selection(checked, protection=self._protection)

    async def _list(self, filter: TaskFilter, limit: int | None) -> list[Task]:
        most, found = check_limit(limit), list[Task]()
        async for task in self.iter_tasks(filter):
            if len(found) == most:
                break
            found.append(task)
        return found

    async def _read(self, work: Callable[[Snapshot], Result]) -> Result:
        """Run `work` on a thread, with the files as they are now."""

        def read() -> Result:
            for _ in range(_ATTEMPTS):
                try:
                    return work(self._catalogue.snapshot())
                except FileNotFoundError as error:  # replaced by a compaction, or undone
                    gone = error
            raise UnavailableError(f"{self._folder.location}: {gone}: try again") from gone

        return await asyncio.to_thread(read)

    def _find(self, snapshot: Snapshot, id: str) -> list[Record[Task]]:
        """Return the copies of a task that are not void, newest first."""
        tables = (
            (file, snapshot.kept(file, file.find(id, TASKS.names))) for file in snapshot.tasks
        )
        found = [record for file, table in tables for record in self._records(file, table)]
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
        selection = selection.and_also(*_between(after, until))
        groups = sorted(
            ((newest, oldest, number, group)
            for number, file in enumerate(snapshot.tasks)
            for group, (oldest, newest) in enumerate(file.submissions)
            if (after is None or oldest <= after[0]) and (until is None or newest >= until[0])),
            reverse=True,
        )  # fmt: skip
        best = _PLACES.empty_table()
        width = 1
        while groups and (len(best) < size or groups[0][0] >= best["submitted_at"][-1].value):
            chosen: dict[int, list[int]] = {}
            for _, _, number, group in groups[:width]:
                chosen.setdefault(number, []).append(group)
            groups, width = groups[width:], min(2 * width, _PAGE_GROUPS)
            parts = [best]
            for number, of_file in chosen.items():
                read = partial(snapshot.read, snapshot.tasks[number], selection, groups=of_file)
                # Identifiers take longest to read, and most groups have no match of a rare filter.
                if not len(read(columns=["submitted_at"])):
                    continue
                found = read(columns=["submitted_at", "task_id", "version"])
                numbers = pa.array([number] * len(found), pa.int64())
                parts.append(found.append_column("file", numbers).select(_PLACES.names))
            best = pa.concat_tables(parts).sort_by(_NEWEST_FIRST).slice(0, size)
        return self._fetch(snapshot, best)

    def _fetch(self, snapshot: Snapshot, places: Any) -> list[Record[Task]]:
        """Return the tasks at some places, in their order."""
        records: dict[tuple[str, int], Record[Task]] = {}
        for number in pc.unique(places["file"]).to_pylist():
            here = places.filter(pc.field("file") == number)
            versions = here["version"]
            bounds = pc.min_max(versions)
            is_wanted = (  # the bounds choose the row groups
                (pc.field("version") >= bounds["min"])
                & (pc.field("version") <= bounds["max"])
                & pc.field("version").isin(versions.combine_chunks())
                & pc.field("task_id").isin(here["task_id"].combine_chunks())
            )
            file = snapshot.tasks[number]
            for record in self._records(file, file.read(None, TASKS.names, is_wanted)):
                records[record.task_id, record.version] = record
        ids = zip(places["task_id"].to_pylist(), places["version"].to_pylist(), strict=True)
        return [records[one] for one in ids]

    def _records(self, file: ArchiveFile, table: Any) -> list[Record[Task]]:
        decode = opening(self._protection, file.cluster_id).decode[Task]
        return [decode(image) for image in TASKS.images_of(table)]

    def _count(self, selection: Selection, snapshot: Snapshot) -> int:
        if selection.expression is None and not snapshot.has_voids:
            return sum(file.rows for file in snapshot.tasks)
        return sum(
            len(snapshot.read(file, selection, columns=["version"])) for file in snapshot.tasks
        )

    def _history(self, snapshot: Snapshot, id: str) -> list[Change]:
        changes = {}
        rows = [
            (file, *change)
            for file in snapshot.tasks
            for history in histories_of(file.find(id, ["history"]))
            for change in history
        ]
        for file in self._catalogue.files(CHANGES):
            table = file.find(id, CHANGES.names)
            found = rows_of(table.filter(pc.field("item") == "task").select(HISTORY))
            rows += [(file, *change) for change in found]
        for file, revision, at, kind, was, now, node, reason, previous in rows:
            reason = opening(self._protection, file.cluster_id).read_reason("task", id, reason)
            changes[revision] = Change(
                revision, from_microseconds(at), "task", id, ChangeKind(kind), was, now, node,
                reason, previous,
            )  # fmt: skip
        return [changes[key] for key in sorted(changes)]


@lru_cache(4)
def opening(protection: Protection, cluster_id: int | None) -> Statements:
    """Return the statements that open the values of a file: of its cluster, or in clear."""
    # The rows of SQLite have the form of an image.
    return statements_of("sqlite").protected_by(protection.reading(cluster_id))


_TIME = TASKS.schema.field("submitted_at").type

_PLACES = pa.schema(
    [*(TASKS.schema.field(one) for one in ("submitted_at", "task_id", "version")),
    pa.field("file", pa.int64())]
)  # fmt: skip
"""The place of a task in a list, and the number of its file."""

_NEWEST_FIRST = [("submitted_at", "descending"), ("task_id", "descending")]


def _between(after: Position | None, until: Position | None) -> Iterator[Any]:
    """Yield the conditions of the tasks behind a position, and up to another one."""
    at, id = pc.field("submitted_at"), pc.field("task_id")
    if after is not None:
        moment = pa.scalar(after[0], _TIME)
        yield (at <= moment) & ((at < moment) | (id < after[1]))
    if until is not None:
        moment = pa.scalar(until[0], _TIME)
        yield (at >= moment) & ((at > moment) | (id >= until[1]))
