"""Manifests: the files of each run with their SHA-256, written when all else is done."""

from __future__ import annotations

import hashlib
from collections.abc import Container, Iterator, Sequence
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
    metadata: dict[bytes, bytes] | None = None,
) -> WrittenFile:
    """Write a file, read it back and compare it; blocks the thread.

    Raises:
        UnavailableError: If it cannot be written, or differs.
    """
    contents = layout.encode(table, metadata)
    folder.write(path, contents)
    stored = folder.read(path)
    written = WrittenFile(path, len(table), len(stored), hashlib.sha256(stored).hexdigest())
    is_same = written.sha256 == hashlib.sha256(contents).hexdigest()
    if not is_same or not pq.read_table(pa.BufferReader(stored)).equals(table):
        raise UnavailableError(
            f"{folder.location}/{path} differs from the rows that were written to it: check the "
            "disk, and try again; the rows are still in the database"
        )
    return written


def read_file(folder: Folder, file: WrittenFile) -> Any:
    """Return the table of a file, after a check of its SHA-256; blocks the thread.

    Raises:
        UnavailableError: If it was changed.
    """
    contents = folder.read(file.path)
    if hashlib.sha256(contents).hexdigest() != file.sha256:
        raise UnavailableError(
            f"{folder.location}/{file.path} was changed after it was written: restore it from a "
            "backup; the rows that are not deleted yet stay in the database"
        )
    return pq.read_table(pa.BufferReader(contents))


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
    if files:
        folder.write(path_of(cluster, run.run), _encode(cluster, run.run, run.kind, files))


def path_of(cluster: str, run: str) -> str:
    """Return the path of a manifest."""
    return f"{FOLDER}/cluster={quote(cluster, safe='')}/{run}.json"


def _encode(cluster: str, run: str, kind: str, files: Sequence[WrittenFile]) -> bytes:
    layouts = {file.path.partition("/")[0] for file in files}
    document: dict[str, Any] = {
        "format": FORMAT,
        "run": run,
        "kind": kind,
        "cluster": cluster,
        "schema": HEAD,
        "rows": {
            name: sum(file.rows for file in files if file.path.startswith(f"{name}/"))
            for name in sorted(layouts)
        },
        "files": files,
    }
    document["sha256"] = hashlib.sha256(orjson.dumps(document)).hexdigest()
    return orjson.dumps(document, option=orjson.OPT_INDENT_2)


@dataclass(frozen=True, slots=True)
class Manifest:
    """A manifest as it is stored."""

    path: str
    run: str
    kind: str
    cluster: str
    files: Sequence[WrittenFile]
    is_sound: bool
    """False if it was changed after it was written."""

    def without(self, folder: Folder, gone: Container[str]) -> None:
        """Remove the files that are gone from it, or the manifest if no file is left."""
        left = [file for file in self.files if file.path not in gone]
        if not left:
            folder.remove(self.path)
        elif len(left) < len(self.files):
            folder.write(self.path, _encode(self.cluster, self.run, self.kind, left))


def manifests(folder: Folder) -> Iterator[Manifest]:
    """Yield each manifest; blocks the thread.

    Raises:
        UnavailableError: If one cannot be read.
    """
    for entry in folder.list(FOLDER):
        contents = folder.read(entry.path)
        try:
            document = orjson.loads(contents)
            files = [WrittenFile(**one) for one in document["files"]]
            given = document.pop("sha256")
            found = hashlib.sha256(orjson.dumps(document)).hexdigest()
            document["sha256"] = given
            is_sound = contents == orjson.dumps(document, option=orjson.OPT_INDENT_2)
            names = document["run"], document["kind"], document["cluster"]
        except (ValueError, TypeError, KeyError, AttributeError):
            yield Manifest(entry.path, "", "", "", (), is_sound=False)
        else:
            yield Manifest(entry.path, *names, files, is_sound and given == found)
