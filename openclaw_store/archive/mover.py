"""Move old rows to files, then delete them, in small batches.

Each row is in the files, read back and compared, before it is deleted; it is deleted only if it
still has the version in the files. See `runs` for the steps.
"""

from __future__ import annotations

import asyncio
from collections.abc import Iterator, Sequence
from functools import cache, partial
from time import perf_counter
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
from sqlalchemy import bindparam, literal_column, select, update

from openclaw_store.archive import runs
from openclaw_store.archive.collect import (
    DAY_MICROSECONDS,
    RUN_ROWS,
    Collected,
    DayTable,
    TaskCollector,
    day_of,
)
from openclaw_store.archive.files import ArchiveFile
from openclaw_store.archive.folder import Entry, Folder
from openclaw_store.archive.layout import CHANGES, HISTORIES, LAYOUTS, TASKS, Layout
from openclaw_store.archive.manifest import (
    cluster_of,
    manifests,
    read_file,
    write_file,
    write_manifest,
)
from openclaw_store.archive.retain import Report, Retained, rest
from openclaw_store.archive.runs import ArchiveRun, WrittenFile, logger
from openclaw_store.backends import Cursor
from openclaw_store.database import (
    ArchiveRunRow,
    ArchiveVoidRow,
    ChangeRow,
    Database,
    Statements,
    WriteTransaction,
    statements_for,
)
from openclaw_store.domain import Raw, Retention
from openclaw_store.errors import ConflictError
from openclaw_store.repositories import (
    COMPACTION_BATCH_SIZE,
    Compact,
    Policy,
    Removal,
    apply_together,
    compact,
    old_revisions,
    read_counters,
    read_rows,
    redate_tasks,
    remove_tasks,
)

_TRANSACTION_SECONDS = 0.02
"""Seconds that a transaction should take, so that other writers wait no longer."""

_SMALLEST_BATCH, _FIRST_BATCH, _LARGEST_BATCH = 100, 500, 2000


class _Pace:
    """Rests between steps, and makes transactions so small that each is short."""

    def __init__(self, load: float) -> None:
        self._load = load
        self.batch = _FIRST_BATCH
        self._since = perf_counter()

    async def rest(self) -> None:
        await rest(perf_counter() - self._since, self._load)
        self._since = perf_counter()

    def adapt(self, seconds: float) -> None:
        wanted = int(self.batch * _TRANSACTION_SECONDS / max(seconds, 1e-4))
        self.batch = max(_SMALLEST_BATCH, min(wanted, 2 * self.batch, _LARGEST_BATCH))


async def move(database: Database, retention: Retention, report: Report | None = None) -> Retained:
    """Move the rows of a policy to its archive; the caller has the lease."""
    mover = Mover(database, retention, report)
    await mover.heal()
    await mover.move_tasks()
    await mover.move_changes()
    return mover.done


class Mover:
    """Moves the rows of one policy; the caller has the lease."""

    def __init__(
        self, database: Database, retention: Retention | None, report: Report | None
    ) -> None:
        self._database = database
        self._retention = retention
        self._report: Report = report or (lambda *_: None)
        self._pace = _Pace(retention.load if retention else 1.0)
        self._cluster = cluster_of(database)
        self.done = Retained()
        now = database.clock()
        self.policy = Policy(now, retention.cutoffs(now) if retention else {})

    async def heal(self) -> None:
        """Continue the verified runs of earlier processes, and undo the other ones."""
        for run in await runs.undone(self._database):
            await self._remove_files(run)
        for run in await runs.unfinished(self._database):
            if run.state == "writing":
                logger.info("the run %s of the archive is undone, as it was interrupted", run.run)
                await runs.advance(self._database, run, "undone")
                await self._remove_files(run)
            else:
                logger.info("the run %s of the archive is continued", run.run)
                await self.finish(run)

    async def move_tasks(self) -> None:
        """Move the tasks that are old."""
        if self._retention is None or not self.policy.cutoffs:
            return
        skipped: set[str] = set()
        folder = Folder(self._retention.archive or "")
        while True:
            found = Collected()
            async for found in TaskCollector(self._database, self.policy, skipped).pages():
                self._report("reading tasks", found.rows, RUN_ROWS)
                await self._pace.rest()
                if found.is_full:
                    break
            if not found.rows:
                break
            await self._run("tasks", folder, [*found.tables_of(TASKS), *found.tables_of(HISTORIES)])
        await redate_tasks(self._database.read, self._write, self.policy)
        self.done.skipped = sorted(skipped)

    async def _write(self, commands: Sequence[Any]) -> Sequence[Any]:
        results: Sequence[Any] = await self._timed(apply_together, commands)
        return results

    async def move_changes(self) -> None:
        """Move the changes of the feed that are old."""
        if self._retention is None or self._retention.history is None:
            return
        folder = Folder(self._retention.archive or "")
        while tables := await self._collect_changes():
            await self._run("changes", folder, tables)

    async def _collect_changes(self) -> list[DayTable]:
        assert self._retention is not None
        assert self._retention.history is not None
        found, since = Collected(), 0
        newest, _, _ = await self._database.read(read_counters)
        now = self.policy.now
        async for end in old_revisions(self._database, now, now - self._retention.history):
            until = min(end, newest - 1)  # the newest change stays in the feed
            query = select(*ChangeRow.__table__.c).order_by(ChangeRow.revision)
            query = query.where(ChangeRow.revision > since, ChangeRow.revision <= until)
            table = CHANGES.table(await self._database.read(partial(_read_rows, query=query)))
            days = pc.divide(table["changed_at"].cast(pa.int64()), DAY_MICROSECONDS)
            for day in pc.unique(days).to_pylist():
                found.add(CHANGES, day_of(day), table.filter(pc.equal(days, day)))
            found.rows += len(table)
            self._report("reading changes", found.rows, RUN_ROWS)
            since = until
            await self._pace.rest()
            if found.is_full:
                break
        return found.tables_of(CHANGES)

    async def _run(
        self, kind: str, folder: Folder, tables: Sequence[tuple[Layout, str, Any]]
    ) -> None:
        run = await runs.begin(self._database, kind, folder.location)
        files: list[WrittenFile] = []
        for number, (layout, day, table) in enumerate(tables):
            path = layout.path(self._cluster, day, run.run)
            files.append(await asyncio.to_thread(write_file, folder, layout, path, table))
            self._report("writing files", number + 1, len(tables))
            await self._pace.rest()
        self.done.bytes += sum(file.bytes for file in files)
        try:
            await runs.advance(self._database, run, "verified", files)
        except ConflictError:  # undone by a process that took over
            await self._remove_files(run)
            raise
        await self.finish(run)

    async def finish(self, run: ArchiveRun) -> None:
        """Continue a run whose files are verified, up to its manifest."""
        folder = Folder(run.location)
        steps = {"tasks": self._delete_tasks, "changes": self._delete_changes}
        if run.kind in steps:
            await steps[run.kind](folder, run)
        if run.kind == "compact":
            await asyncio.to_thread(_remove_replaced, folder, run)
        voids = await runs.voids_of(self._database, run)
        await asyncio.to_thread(write_manifest, folder, self._cluster, run, voids)
        run.state = "deleting" if run.position else run.state
        await runs.advance(self._database, run, "done")
        self.done.voids += len(voids)

    async def _delete_tasks(self, folder: Folder, run: ArchiveRun) -> None:
        total, start = sum(file.rows for file in _of(TASKS, run)), 0
        for file in _of(TASKS, run):
            if start + file.rows > run.position:
                tasks = await asyncio.to_thread(read_file, folder, file)
                ids, versions = (tasks.column(name).to_pylist() for name in ("task_id", "version"))
                history = await self._history(folder, run, file)
                for begin, end in self._batches(run.position - start, file.rows):
                    pairs = [*zip(ids[begin:end], versions[begin:end], strict=True)]
                    old = [history.get(id, ()) for id in ids[begin:end]]
                    accept = partial(_accept, run=run, until=start + end, pairs=pairs)
                    removed = await self._timed(remove_tasks, Removal(pairs, old, accept))
                    run.position = start + end
                    gone = [
                        len(of) for of, is_removed in zip(old, removed, strict=True) if is_removed
                    ]
                    self.done.tasks += len(gone)
                    self.done.changes += sum(gone)
                    self._report("deleting tasks", run.position, total)
            start += file.rows

    async def _history(
        self, folder: Folder, run: ArchiveRun, tasks: WrittenFile
    ) -> dict[str, Sequence[int]]:
        """Return the revisions of the changes of each task in a file."""
        path = tasks.path.replace(TASKS.folder, HISTORIES.folder, 1)
        for file in run.files:
            if file.path == path:
                table = await asyncio.to_thread(read_file, folder, file)
                revisions = table["revision"].to_pylist()
                runs_of_ids = pc.run_end_encode(table["item_id"].combine_chunks())
                ends = runs_of_ids.run_ends.to_pylist()
                bounds = zip([0, *ends], ends, strict=False)
                ids = runs_of_ids.values.to_pylist()
                return {id: revisions[a:b] for id, (a, b) in zip(ids, bounds, strict=True)}
        return {}

    async def _delete_changes(self, folder: Folder, run: ArchiveRun) -> None:
        revisions: list[int] = []
        for file in _of(CHANGES, run):
            table = await asyncio.to_thread(read_file, folder, file)
            revisions += table.column("revision").to_pylist()
        revisions = sorted(one for one in revisions if one > run.position)
        for start in range(0, len(revisions), COMPACTION_BATCH_SIZE):
            until = revisions[start : start + COMPACTION_BATCH_SIZE][-1]
            self.done.changes += await self._timed(_compact, (run, until))
            run.position = until
            self._report("deleting changes", start + COMPACTION_BATCH_SIZE, len(revisions))

    def _batches(self, begin: int, end: int) -> Iterator[tuple[int, int]]:
        begin = max(begin, 0)
        while begin < end:
            size = min(self._pace.batch, end - begin)
            yield begin, begin + size
            begin += size

    async def _timed(self, apply: Any, operation: Any) -> Any:
        began = perf_counter()
        result = await self._database.write(apply, operation)
        self._pace.adapt(perf_counter() - began)
        await self._pace.rest()
        return result

    async def _remove_files(self, run: ArchiveRun) -> None:
        folder = Folder(run.location)
        await asyncio.to_thread(remove_files, folder, run.run)


def remove_files(folder: Folder, run: str) -> None:
    """Remove the files of a run that is undone; blocks the thread."""
    for name in LAYOUTS:
        for entry in folder.list(name):
            if entry.path.rpartition("/")[2].startswith(run):
                folder.remove(entry.path)


def _remove_replaced(folder: Folder, run: ArchiveRun) -> None:
    """Remove the files that those of a run replace, first from their manifests."""
    files = [ArchiveFile(folder, Entry(file.path, file.bytes, None)) for file in run.files]
    replaced = frozenset[str]().union(*(file.replaced for file in files))
    for manifest in manifests(folder):
        if manifest.is_sound:
            manifest.without(folder, replaced)
    for path in sorted(replaced):
        folder.remove(path)


async def _read_rows(session: Any, query: Any) -> list[Raw]:
    return [row async for rows in read_rows(session, query, None) for row in rows]


def _of(layout: Layout, run: ArchiveRun) -> list[WrittenFile]:
    return [file for file in run.files if file.path.startswith(f"{layout.folder}/")]


@cache
def _statements(sql: Statements) -> tuple[str, str]:
    """Return the SQL that moves the position of a run, and that notes void copies."""
    row = ArchiveRunRow
    verified = row.state.in_([literal_column("'verified'"), literal_column("'deleting'")])
    move = (
        update(row)
        .where(row.run == bindparam("run_"), row.position == bindparam("was"), verified)
        .values(position=bindparam("new"), state=literal_column("'deleting'"))
        .returning(row.run)
    )
    return str(sql.compile(move)), sql.insert_into(ArchiveVoidRow.metadata.tables["archive_voids"])


def _move(cursor: Cursor, run: ArchiveRun, until: int) -> None:
    """Set the position of a run, if it is where this process has left it."""
    sql, _ = _statements(statements_for(cursor))
    if len(cursor.execute(sql, (until, run.run, run.position))) != 1:
        raise runs.lost(run)


def _accept(
    cursor: Cursor,
    removed: Sequence[bool],
    *,
    run: ArchiveRun,
    until: int,
    pairs: Sequence[tuple[str, int]],
) -> None:
    _move(cursor, run, until)
    _, insert_void = _statements(statements_for(cursor))
    voids = [
        (*pair, run.run) for pair, is_removed in zip(pairs, removed, strict=True) if not is_removed
    ]
    if voids:
        cursor.write(insert_void, voids)


def _compact(
    transaction: WriteTransaction, operations: Sequence[tuple[ArchiveRun, int]]
) -> Sequence[int]:
    counts: list[int] = []
    for run, until in operations:
        counts += compact(transaction, [Compact(until)])
        _move(transaction.cursor, run, until)
    return counts
