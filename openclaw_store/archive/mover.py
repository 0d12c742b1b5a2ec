"""Move old rows to files, then delete them, in small batches.

Each row is in the files, read back and compared, before it is deleted; it is deleted only if it
still has the version in the files. See `runs` for the steps.
"""

from __future__ import annotations

import asyncio
from collections import defaultdict
from collections.abc import AsyncIterator, Sequence
from functools import partial
from itertools import accumulate
from time import perf_counter
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from openclaw_store.archive import runs
from openclaw_store.archive.collect import (
    PAGE_ROWS,
    Page,
    by_day,
    collected,
    old_changes,
    old_tasks,
)
from openclaw_store.archive.files import ArchiveFile
from openclaw_store.archive.folder import Entry, Folder
from openclaw_store.archive.layout import (
    CHANGES,
    CLUSTER_ID,
    LAYOUTS,
    TASKS,
    Layout,
    lengths_of,
)
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
from openclaw_store.database import Apply, Database, WriteTransaction
from openclaw_store.domain import Retention
from openclaw_store.errors import ConflictError
from openclaw_store.repositories import (
    COMPACTION_BATCH_SIZE,
    Compact,
    Policy,
    Removal,
    apply_together,
    compact,
    redate_tasks,
    remove_tasks,
)

_TRANSACTION_SECONDS = 0.001
"""Seconds of work in a transaction, before its commit, at a load of almost zero."""

_LONGEST_SECONDS = 0.02
"""Seconds of work in a transaction if the load leaves no time to other writers."""

_SMALLEST_BATCH, _FIRST_BATCH, _LARGEST_BATCH = 25, 100, 2000

_COLUMNS = ["task_id", "version", "history.list.element.revision"]
"""The columns of a file that tell what to delete."""

GRACE_SECONDS = 1.0
"""Seconds for which replaced files stay, as a reader may just list the folder."""


async def move(database: Database, retention: Retention, report: Report | None = None) -> Retained:
    """Move the rows of a policy to its archive; the caller has the lease."""
    mover = Mover(database, retention.load, report)
    await mover.heal()
    await mover.move(retention, Folder(retention.archive or ""))
    return mover.done


class Mover:
    """Continues runs, and begins the runs of a policy; the caller has the lease."""

    def __init__(self, database: Database, load: float = 1.0, report: Report | None = None) -> None:
        self._database = database
        self._load = load
        self._page_rows = PAGE_ROWS if load == 1 else PAGE_ROWS // 4
        self._seconds = min(_LONGEST_SECONDS, _TRANSACTION_SECONDS / max(1 - load, 1e-9))
        self._report: Report = report or (lambda *_: None)
        self._cluster = cluster_of(database)
        self.batch = _FIRST_BATCH
        """Tasks for the next transaction."""
        self._since = perf_counter()
        self.done = Retained()

    async def heal(self) -> None:
        """Continue the verified runs of earlier processes, and undo the other ones."""
        undone: dict[str, set[str]] = defaultdict(set)
        for run in await runs.unfinished(self._database):
            if run.state == "writing":
                # Before its files are removed: its process, if it still lives, cannot go on.
                logger.info("the run %s of the archive is undone, as it was interrupted", run.run)
                await runs.advance(self._database, run, "undone")
            if run.state == "undone":
                undone[run.location].add(run.run)
            else:
                logger.info("the run %s of the archive is continued", run.run)
                await self.finish(run)
        for location, names in undone.items():
            await asyncio.to_thread(_remove_files, Folder(location), names)

    async def move(self, retention: Retention, folder: Folder) -> None:
        """Move old tasks, then old changes."""
        database, now = self._database, self._database.clock()
        policy, skipped = Policy(now, retention.cutoffs(now)), set[str]()
        if policy.cutoffs:
            pages = old_tasks(database, policy, skipped, self._page_rows)
            await self._move(folder, TASKS, pages)
            await redate_tasks(database.read, partial(self.write, apply_together), policy)
            self.done.skipped = sorted(skipped)
        if retention.history is not None:
            await self._move(folder, CHANGES, old_changes(database, now, now - retention.history))

    async def _move(self, folder: Folder, layout: Layout, pages: AsyncIterator[Page]) -> None:
        """Move rows, one run after the other."""
        deletion: asyncio.Future[None] | None = None
        try:
            async for found in collected(self._resting(pages)):
                run = await self._write_files(folder, layout, found)
                if deletion is not None:
                    await deletion
                deletion = asyncio.ensure_future(self.finish(run))
                # At full load, the next tasks are read meanwhile. Changes are deleted up to a
                # revision, so the files of all earlier ones must be sound.
                if self._load < 1 or layout is CHANGES:
                    await deletion
            if deletion is not None:
                await deletion
        finally:
            if deletion is not None:
                deletion.cancel()
                await asyncio.gather(deletion, return_exceptions=True)

    async def _resting(self, pages: AsyncIterator[Page]) -> AsyncIterator[Page]:
        async for page in pages:
            await self._rest()
            yield page

    async def _write_files(
        self, folder: Folder, layout: Layout, pages: Sequence[Page]
    ) -> ArchiveRun:
        """Write the files of a run, and verify them."""
        run = await runs.begin(self._database, layout.folder, folder.location)
        files: list[WrittenFile] = []
        tables = await asyncio.to_thread(by_day, layout, pages)
        cluster_id = self._database.statements.protection.cluster
        metadata = {} if cluster_id is None else {CLUSTER_ID: str(cluster_id).encode()}
        for number, (day, table) in enumerate(tables, 1):
            path = layout.path(self._cluster, day, run.run)
            write = partial(write_file, folder, layout, path, table, metadata)
            files.append(await asyncio.to_thread(write))
            self._report(f"writing {layout.folder}", number, len(tables))
            await self._rest()
        self.done.bytes += sum(file.bytes for file in files)
        await self.verified(run, files)
        return run

    async def verified(self, run: ArchiveRun, files: Sequence[WrittenFile]) -> None:
        """Note that the files of a run are written and verified."""
        try:
            await runs.advance(self._database, run, "verified", files)
        except ConflictError:  # undone by a process that took over
            await asyncio.to_thread(_remove_files, Folder(run.location), {run.run})
            raise

    async def finish(self, run: ArchiveRun) -> None:
        """Continue a run with verified files, up to its manifest."""
        folder = Folder(run.location)
        if run.kind == "tasks":
            await self._delete_tasks(folder, run)
        elif run.kind == "changes":
            await self._delete_changes(folder, run)
        elif run.kind == "compact":
            await asyncio.sleep(GRACE_SECONDS)
            await asyncio.to_thread(_remove_replaced, folder, run)
        # The manifest before `done`: a run that is done is never continued.
        voids = await runs.voids_of(self._database, run)
        await asyncio.to_thread(write_manifest, folder, self._cluster, run, voids)
        await runs.advance(self._database, run, "done")
        self.done.voids += len(voids)

    async def _delete_tasks(self, folder: Folder, run: ArchiveRun) -> None:
        total, start = sum(file.rows for file in run.files), 0
        for file in run.files:
            end = start + file.rows
            if end > run.position:
                table = await asyncio.to_thread(read_file, folder, file, _COLUMNS)
                while run.position < end:
                    await self._delete_batch(run, table.slice(run.position - start, self.batch))
                    self._report("deleting tasks", run.position, total)
            start = end

    async def _delete_batch(self, run: ArchiveRun, table: Any) -> None:
        versions = [*zip(*(table[one].to_pylist() for one in ("task_id", "version")), strict=True)]
        old, position = _revisions(table), run.position + len(table)

        def accept(cursor: Cursor, removed: Sequence[bool]) -> None:
            outcomes = zip(versions, removed, strict=True)
            runs.progress(cursor, run, position, [one for one, is_gone in outcomes if not is_gone])

        removed = await self.write(remove_tasks, Removal(versions, old, accept))
        # Only after the commit: `runs.progress` compares with the position of the one before.
        run.passed(position)
        gone = [len(of) for of, is_removed in zip(old, removed, strict=True) if is_removed]
        self.done.tasks += len(gone)
        self.done.changes += sum(gone)

    async def _delete_changes(self, folder: Folder, run: ArchiveRun) -> None:
        revisions: list[int] = []
        for file in run.files:
            table = await asyncio.to_thread(read_file, folder, file, ["revision"])
            revisions += table["revision"].to_pylist()
        revisions = sorted(one for one in revisions if one > run.position)
        for start in range(0, len(revisions), COMPACTION_BATCH_SIZE):
            until = revisions[start : start + COMPACTION_BATCH_SIZE][-1]
            self.done.changes += await self.write(_compact, (run, until))
            run.passed(until)
            self._report("deleting changes", start + COMPACTION_BATCH_SIZE, len(revisions))

    async def write(self, apply: Apply, operation: Any) -> Any:
        """Write in a transaction, after which the next one has another size."""
        seconds = 0.0

        # Called on the thread of the writer, which is done with it before the caller continues.
        def timed(transaction: WriteTransaction, operations: Sequence[Any]) -> Sequence[Any]:
            nonlocal seconds
            began = perf_counter()
            results = apply(transaction, operations)
            seconds = perf_counter() - began
            return results

        result = await self._database.write(timed, operation)
        wanted = int(self.batch * self._seconds / max(seconds, 1e-4))
        self.batch = max(_SMALLEST_BATCH, min(wanted, 2 * self.batch, _LARGEST_BATCH))
        await self._rest()
        return result

    async def _rest(self) -> None:
        await rest(perf_counter() - self._since, self._load)
        self._since = perf_counter()


def _revisions(table: Any) -> list[list[int]]:
    """Return the revisions of the changes of each task."""
    lists = table["history"].combine_chunks()
    revisions = pc.struct_field(lists.flatten(), "revision")
    ends = pa.array(accumulate(lengths_of(lists), initial=0), pa.int32())
    found: list[list[int]] = pa.ListArray.from_arrays(ends, revisions).to_pylist()
    return found


def _remove_files(folder: Folder, names: set[str]) -> None:
    """Remove the files of runs that are undone; blocks the thread."""
    for kind in LAYOUTS:
        for entry in folder.list(kind):
            name = entry.path.rpartition("/")[2]
            if any(name.startswith(run) for run in names):
                folder.remove(entry.path)


def _remove_replaced(folder: Folder, run: ArchiveRun) -> None:
    """Remove the files that a compaction has replaced, first from their manifests."""
    replaced: set[str] = set()
    for file in run.files:
        read_file(folder, file, [])  # it may have been damaged, or removed, since it was verified
        replaced |= ArchiveFile(folder, Entry(file.path, file.bytes)).replaced
    for _, manifest in manifests(folder):
        if manifest is not None:
            manifest.drop(folder, replaced)
    for path in sorted(replaced):
        folder.remove(path)


def _compact(
    transaction: WriteTransaction, operations: Sequence[tuple[ArchiveRun, int]]
) -> Sequence[int]:
    counts: list[int] = []
    for run, until in operations:
        counts += compact(transaction, [Compact(until)])
        runs.progress(transaction.cursor, run, until)
    return counts
