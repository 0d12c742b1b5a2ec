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

import orjson
import pyarrow as pa

from openclaw_store.archive import runs
from openclaw_store.archive.files import ArchiveFile
from openclaw_store.archive.folder import Folder
from openclaw_store.archive.layout import CHANGES, CLUSTER_ID, REPLACES, TASKS, VOIDS
from openclaw_store.archive.lease import leased
from openclaw_store.archive.manifest import cluster_of, manifests, read_file, write_file
from openclaw_store.archive.mover import Mover
from openclaw_store.archive.runs import WrittenFile
from openclaw_store.archive.selection import Selection
from openclaw_store.archive.snapshot import Catalogue
from openclaw_store.database import Database
from openclaw_store.domain import TaskFilter
from openclaw_store.errors import UnavailableError

MERGED_ROWS = 250_000
"""Rows of a merged file at most; larger files are left as they are."""


@dataclass(slots=True)
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
        UnavailableError: If another process does so for longer, or the archive cannot be used, or
            a file is damaged.
    """
    folder = Folder(location)
    async with leased(database, patience=patience):
        mover = Mover(database)
        await mover.heal()
        merge = await asyncio.to_thread(_Merge, folder, cluster_of(database))
        if merge.parts:
            run = await runs.begin(database, "compact", folder.location)
            files = [
                await asyncio.to_thread(merge.write, part, f"{run.run}-{number}")
                for number, part in enumerate(merge.parts)
            ]
            await mover.verified(run, files)
            await mover.finish(run)
    return merge.done


class _Merge:
    """The files to merge; its methods block the thread."""

    def __init__(self, folder: Folder, cluster: str) -> None:
        self._folder, self._cluster = folder, cluster
        catalogue = Catalogue(folder, cluster)
        self._snapshot = catalogue.snapshot()
        self._listed = {
            file.path: file
            for _, manifest in manifests(folder)
            if manifest is not None
            for file in manifest.files
        }
        self._void_files = [file.path for file in catalogue.files(VOIDS)]
        files = [*self._snapshot.tasks, *catalogue.files(CHANGES)]
        self.parts = [part for part in _parts(files) if self._is_worthwhile(part)]
        """The files of each merged file."""
        self.done = Compacted()

    def _is_worthwhile(self, part: Sequence[ArchiveFile]) -> bool:
        if len(part) > 1 or part[0].layout is not TASKS:
            return len(part) > 1
        everything = Selection(TaskFilter.everything())
        kept = self._snapshot.read(part[0], everything, columns=["version"])
        return len(kept) < part[0].rows

    def write(self, part: Sequence[ArchiveFile], name: str) -> WrittenFile:
        """Write the merged file of a part."""
        first, layout = part[0], part[0].layout
        tables = [layout.table([])]  # with the columns of this version
        for file in part:
            self._require_sound(file)
            table = file.read()
            kept = self._snapshot.kept(file, table) if layout is TASKS else table
            self.done.voids += len(table) - len(kept)
            tables.append(kept)
        table = pa.concat_tables(tables).sort_by(layout.order)
        replaced = [file.path for file in part]
        if part is self.parts[0]:  # of the lists of void copies, too: no file has them any more
            replaced += self._void_files
        path = layout.path(self._cluster, first.day, name)
        metadata = {REPLACES: orjson.dumps(replaced)}
        if first.cluster_id is not None:
            metadata[CLUSTER_ID] = str(first.cluster_id).encode()
        written = write_file(self._folder, layout, path, table, metadata)
        self.done.files_before += len(part)
        self.done.files_after += 1
        self.done.bytes_before += sum(file.size for file in part)
        self.done.bytes_after += written.bytes
        return written

    def _require_sound(self, file: ArchiveFile) -> None:
        """Check the SHA-256 of a file, so that no damaged value is written again."""
        if file.path not in self._listed:
            raise UnavailableError(
                f"{self._folder.location}/{file.path} is in no manifest, or its manifest was "
                "changed: run `openclaw-store archive verify`"
            )
        read_file(self._folder, self._listed[file.path], [file.layout.key])


def _parts(files: Sequence[ArchiveFile]) -> Iterator[list[ArchiveFile]]:
    """Yield the files of each folder and number of a cluster, in parts that make one file."""
    by_folder: dict[tuple[str, int | None], list[ArchiveFile]] = defaultdict(list)
    for file in files:
        by_folder[file.path.rpartition("/")[0], file.cluster_id].append(file)
    for of_day in by_folder.values():
        part: list[ArchiveFile] = []
        for file in of_day:
            if part and sum(one.rows for one in part) + file.rows > MERGED_ROWS:
                yield part
                part = []
            part.append(file)
        yield part
