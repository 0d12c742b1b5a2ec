"""Manifests: the files of each run with their SHA-256, written as the last step of a run."""

from __future__ import annotations

import hashlib
from collections.abc import Container, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any
from urllib.parse import quote

import orjson
import pyarrow as pa
import pyarrow.parquet as pq

from openclaw_store.archive.folder import Folder
from openclaw_store.archive.layout import VOIDS, Layout
from openclaw_store.archive.runs import ArchiveRun, WrittenFile
from openclaw_store.database import HEAD, Database
from openclaw_store.errors import UnavailableError

FORMAT = 1
"""The version of the layout of the folder."""

FOLDER = "manifests"


def cluster_of(database: Database) -> str:
    """Return the name of the cluster of a database."""
    return database.cluster or "default"


def write_file(
    folder: Folder,
    layout: Layout,
    path: str,
    table: Any,
    metadata: Mapping[bytes, bytes] | None = None,
) -> WrittenFile:
    """Write a file, read it back and compare it; blocks the thread.

    Raises:
        UnavailableError: If it cannot be written, or differs.
    """
    contents = layout.encode(table, metadata)
    folder.write(path, contents)
    stored = folder.read(path)
    if stored != contents or not pq.ParquetFile(pa.BufferReader(stored)).read().equals(table):
        raise UnavailableError(
            f"{folder.location}/{path} differs from the rows that were written to it: check the "
            "disk, and try again; the rows are still in the database"
        )
    return WrittenFile(path, len(table), len(stored), digest(stored))


def read_file(folder: Folder, file: WrittenFile, columns: Sequence[str] | None = None) -> Any:
    """Return the table of a file, after a check of its SHA-256; blocks the thread.

    Raises:
        UnavailableError: If it was changed.
    """
    contents = folder.read(file.path)
    if digest(contents) != file.sha256:
        raise UnavailableError(
            f"{folder.location}/{file.path} was changed after it was written: restore it from a "
            "backup; the rows that are not deleted yet stay in the database"
        )
    return pq.ParquetFile(pa.BufferReader(contents)).read(columns=columns)


def digest(contents: bytes) -> str:
    """Return the SHA-256 of the contents of a file."""
    return hashlib.sha256(contents).hexdigest()


@dataclass(frozen=True, slots=True)
class Manifest:
    """The files of a run."""

    run: str
    kind: str
    cluster: str
    files: Sequence[WrittenFile]

    @property
    def path(self) -> str:
        """The path of the manifest in the folder."""
        return f"{FOLDER}/cluster={quote(self.cluster, safe='')}/{self.run}.json"

    def write(self, folder: Folder) -> None:
        """Write it, or remove it if it has no files; blocks the thread."""
        if not self.files:
            folder.remove(self.path)
            return
        rows: dict[str, int] = {}
        for file in self.files:
            kind = file.path.partition("/")[0]
            rows[kind] = rows.get(kind, 0) + file.rows
        document = {
            "format": FORMAT,
            "run": self.run,
            "kind": self.kind,
            "cluster": self.cluster,
            "schema": HEAD,
            "rows": rows,
            "files": self.files,
        }
        folder.write(self.path, _with_digest(document))

    def drop(self, folder: Folder, gone: Container[str]) -> None:
        """Remove the files that are gone from it; blocks the thread."""
        left = [file for file in self.files if file.path not in gone]
        if len(left) < len(self.files):
            Manifest(self.run, self.kind, self.cluster, left).write(folder)


def write_manifest(
    folder: Folder, cluster: str, run: ArchiveRun, voids: Sequence[tuple[str, int]]
) -> None:
    """Write the manifest of a run, and the file of its void copies; blocks the thread.

    A repetition writes the same.
    """
    files = [*run.files]
    if voids:
        path = VOIDS.path(cluster, "", run.run)
        files.append(write_file(folder, VOIDS, path, VOIDS.table(voids)))
    Manifest(run.run, run.kind, cluster, files).write(folder)


def manifests(folder: Folder) -> Iterator[tuple[str, Manifest | None]]:
    """Yield the path of each manifest, and the manifest if it was not changed after it was written.

    Raises:
        UnavailableError: If one cannot be read.
    """
    for entry in folder.list(FOLDER):
        contents = folder.read(entry.path)
        try:
            document = orjson.loads(contents)
            del document["sha256"]
            files = [WrittenFile(**one) for one in document["files"]]
            found = Manifest(document["run"], document["kind"], document["cluster"], files)
            is_sound = contents == _with_digest(document) and found.path == entry.path
        except (ValueError, TypeError, KeyError, AttributeError):
            is_sound = False
        yield entry.path, found if is_sound else None


def _with_digest(document: Mapping[str, Any]) -> bytes:
    sealed = {**document, "sha256": digest(orjson.dumps(document))}
    return orjson.dumps(sealed, option=orjson.OPT_INDENT_2)
