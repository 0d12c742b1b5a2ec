"""The files of an archive at one time, without replaced ones, and its void copies."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from openclaw_store.archive.files import ArchiveFile
from openclaw_store.archive.folder import Entry, Folder
from openclaw_store.archive.layout import TASKS, VOIDS, Layout
from openclaw_store.archive.selection import Selection


class Catalogue:
    """Lists the files of an archive, and keeps the footers that it has read.

    Args:
        cluster: Only the files of this cluster; `None` for all clusters.
    """

    def __init__(self, folder: Folder, cluster: str | None) -> None:
        self.folder = folder
        self._cluster = cluster
        self._files: dict[Entry, ArchiveFile] = {}
        self._voids: tuple[Sequence[str], Any] = ((), None)

    def snapshot(self) -> Snapshot:
        """Return the files as they are now; blocks the thread."""
        # The void copies first: a compaction removes them after it has written the tasks.
        return Snapshot(self._void_copies(), self.files(TASKS))

    def files(self, layout: Layout) -> list[ArchiveFile]:
        """Return the files of a layout that no other one replaces; blocks the thread."""
        entries = [one for one in self.folder.list(layout.folder) if one.path.endswith(".parquet")]
        files = [self._files.get(one) or ArchiveFile(self.folder, one) for one in entries]
        kept = {one: file for one, file in self._files.items() if file.layout is not layout}
        self._files = kept | dict(zip(entries, files, strict=True))
        files = [file for file in files if self._cluster in (None, file.cluster)]
        replaced = frozenset[str]().union(*(file.replaced for file in files))
        return [file for file in files if file.path not in replaced]

    def _void_copies(self) -> Any:
        files = self.files(VOIDS)
        paths = [file.path for file in files]
        if paths != self._voids[0]:
            keys = [key for file in files for key in _keys(file, file.read()).chunks]
            self._voids = paths, pa.chunked_array(keys, pa.string())
        return self._voids[1]


class Snapshot:
    """The files with tasks, and the copies in them that are void."""

    def __init__(self, voids: Any, tasks: Sequence[ArchiveFile]) -> None:
        self._voids = voids
        self.tasks = tasks

    @property
    def has_voids(self) -> bool:
        return bool(self._voids)

    def read(
        self,
        file: ArchiveFile,
        selection: Selection,
        *,
        groups: Sequence[int] | None = None,
        columns: Sequence[str] | None = None,
    ) -> Any:
        """Return the rows of a file that match, and that are not void; blocks the thread.

        Args:
            columns: `None` for all. Void copies and the selection may bring others.
        """
        if columns is not None:
            of_copies = ("task_id", "version") if self._voids else ()
            columns = [*{*columns, *selection.columns, *of_copies}]
        table = selection.exactly(file.read(groups, columns, selection.expression))
        return self.kept(file, table)

    def kept(self, file: ArchiveFile, table: Any) -> Any:
        """Return the rows of a file that are not void."""
        if not self._voids or not len(table):
            return table
        return table.filter(pc.invert(pc.is_in(_keys(file, table), value_set=self._voids)))


def _keys(file: ArchiveFile, table: Any) -> Any:
    """Return a text for each row of a file that identifies the copy."""
    versions = table["version"].cast(pa.string())
    return pc.binary_join_element_wise(versions, file.partition, table["task_id"], "/")
