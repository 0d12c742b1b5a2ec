"""Compaction: merge the small files of each day into one, without void copies.

A merged file names the files that it replaces: from the moment it is there, readers leave those
out. They are removed after it was read back and compared.
"""

from __future__ import annotations

import asyncio
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import orjson
import pyarrow as pa
import pyarrow.compute as pc

from openclaw_store.archive import runs
from openclaw_store.archive.files import ArchiveFile
from openclaw_store.archive.layout import CHANGES, HISTORIES, REPLACES, TASKS, VOIDS, Layout
from openclaw_store.archive.manifest import cluster_of, write_file
from openclaw_store.archive.mover import Mover
from openclaw_store.archive.reader import Archive, Snapshot
from openclaw_store.archive.runs import WrittenFile
from openclaw_store.database import Database

MERGED_ROWS = 250_000
"""Rows of a merged file at most; larger files are left as they are."""


@dataclass(frozen=True, slots=True)
class Compacted:
    """The number and the bytes of the files that were merged, before and after."""

    files_before: int = 0
    files_after: int = 0
    bytes_before: int = 0
    bytes_after: int = 0
    voids: int = 0
    """Void copies that were dropped."""


async def compact_archive(
    database: Database, location: str | Path, *, patience: float = 30.0
) -> Compacted:
    """Merge the files of the cluster of a database in an archive.

    It can be interrupted at any time: the next call continues.

    Args:
        patience: Seconds to wait for another process that moves rows to or from an archive.

    Raises:
        UnavailableError: If another process does so for longer, or the archive cannot be used.
    """
    cluster = cluster_of(database)
    archive = Archive(location, cluster, clock=database.clock)
    async with runs.leased(database, patience=patience):
        mover = Mover(database, None, None)
        await mover.heal()
        merge = await asyncio.to_thread(_Merge, archive, cluster)
        if not merge.parts:
            return Compacted()
        run = await runs.begin(database, "compact", archive.folder.location)
        files: list[WrittenFile] = []
        for number in range(len(merge.parts)):
            files += await asyncio.to_thread(merge.write, number, f"{run.run}-{number}")
        await runs.advance(database, run, "verified", files)
        await mover.finish(run)
    return merge.result(files)


class _Merge:
    """The files to merge; its methods block the thread."""

    def __init__(self, archive: Archive, cluster: str) -> None:
        self._archive, self._cluster = archive, cluster
        self._snapshot = archive.snapshot()
        self._voids = archive.files(VOIDS)
        self._siblings = {file.path: file for file in archive.files(HISTORIES)}
        self.parts = [
            *self._parts(TASKS, self._snapshot.tasks),
            *self._parts(CHANGES, archive.files(CHANGES)),
        ]
        """The layout and the files of each merged file."""
        self._sources: list[ArchiveFile] = []
        self._dropped = 0

    def _parts(
        self, layout: Layout, files: Sequence[ArchiveFile]
    ) -> Iterator[tuple[Layout, list[ArchiveFile]]]:
        by_folder: dict[str, list[ArchiveFile]] = defaultdict(list)
        for file in files:
            by_folder[file.path.rpartition("/")[0]].append(file)
        for of_day in by_folder.values():
            part: list[ArchiveFile] = []
            rows = 0
            for file in of_day:
                if part and rows + file.rows > MERGED_ROWS:
                    yield from self._worthwhile(layout, part)
                    part, rows = [], 0
                part.append(file)
                rows += file.rows
            yield from self._worthwhile(layout, part)

    def _worthwhile(
        self, layout: Layout, part: list[ArchiveFile]
    ) -> Iterator[tuple[Layout, list[ArchiveFile]]]:
        if len(part) > 1 or (layout is TASKS and not pc.all(self._kept(part[0])).as_py()):
            yield layout, part

    def _kept(self, file: ArchiveFile) -> Any:
        """Return for each row of a file of tasks whether it is not void."""
        snapshot: Snapshot = self._snapshot
        pairs = (file.read(columns=["task_id", "version"])[name].to_pylist()
                 for name in ("task_id", "version"))  # fmt: skip
        return pa.array(
            [not snapshot.is_void(file, *pair) for pair in zip(*pairs, strict=True)], pa.bool_()
        )

    def write(self, number: int, name: str) -> list[WrittenFile]:
        """Write the merged file of a part, and that of its histories."""
        layout, part = self.parts[number]
        # The first one also replaces the lists of void copies: no file has them any more.
        extra = [file.path for file in self._voids] if number == 0 else []
        if layout is CHANGES:
            return [self._merged(CHANGES, part, [file.read() for file in part], name, extra)]
        tasks, histories, siblings = [], [], []
        for file in part:
            table, kept = file.read(), self._kept(file)
            tasks.append(table.filter(kept))
            self._dropped += len(table) - len(tasks[-1])
            path = file.path.replace(TASKS.folder, HISTORIES.folder, 1)
            if path in self._siblings:
                siblings.append(self._siblings[path])
                changes = siblings[-1].read()
                ids = tasks[-1]["task_id"].combine_chunks()
                histories.append(changes.filter(pc.is_in(changes["item_id"], ids)))
        # The histories first: a reader of the tasks finds them by the name of their file.
        return [
            self._merged(HISTORIES, siblings, histories, name, [], day_of=part[0]),
            self._merged(TASKS, part, tasks, name, extra),
        ]

    def _merged(
        self,
        layout: Layout,
        sources: Sequence[ArchiveFile],
        tables: Sequence[Any],
        name: str,
        extra: Sequence[str],
        day_of: ArchiveFile | None = None,
    ) -> WrittenFile:
        self._sources += sources
        tables = [*tables, layout.table([])]  # with the columns of this version
        table = pa.concat_tables(tables, promote_options="default")
        table = table.select(layout.schema.names).sort_by(
            [(one, "ascending") for one in layout.order]
        )
        day = (day_of or sources[0]).path.split("/")[-2].partition("=")[2]
        replaced = orjson.dumps([*(file.path for file in sources), *extra])
        path = layout.path(self._cluster, day, name)
        return write_file(self._archive.folder, layout, path, table, {REPLACES: replaced})

    def result(self, files: Sequence[WrittenFile]) -> Compacted:
        return Compacted(
            len(self._sources),
            len(files),
            sum(file.size for file in self._sources),
            sum(file.bytes for file in files),
            self._dropped,
        )
