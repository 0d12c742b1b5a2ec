"""Check the files of an archive against its manifests, and list what it contains."""

from __future__ import annotations

import asyncio
import hashlib
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

from openclaw_store.archive.files import ArchiveFile
from openclaw_store.archive.folder import Folder
from openclaw_store.archive.layout import LAYOUTS
from openclaw_store.archive.manifest import manifests
from openclaw_store.archive.reader import Archive


@dataclass
class ArchiveCheck:
    """The result of `verify_archive`; true if no problem was found."""

    files: int = 0
    bytes: int = 0
    problems: list[str] = field(default_factory=list)
    remarks: list[str] = field(default_factory=list)
    """Files of a run that has not ended: the next run continues or removes them."""

    def __bool__(self) -> bool:
        return not self.problems


@dataclass(frozen=True, slots=True)
class ArchivedDay:
    """The tasks of a cluster that ended on one day."""

    cluster: str
    day: str
    files: int
    tasks: int
    bytes: int


async def verify_archive(location: str | Path) -> ArchiveCheck:
    """Compare each file of an archive with the SHA-256 in its manifest.

    Raises:
        UnavailableError: If the archive cannot be read.
    """
    return await asyncio.to_thread(_verify, Folder(location))


def _verify(folder: Folder) -> ArchiveCheck:
    found = ArchiveCheck()
    present = {entry.path for name in LAYOUTS for entry in folder.list(name)}
    listed: set[str] = set()
    for manifest in manifests(folder):
        found.files += 1
        if not manifest.is_sound:
            found.problems.append(f"{manifest.path} was changed: restore it from a backup")
        for file in manifest.files:
            listed.add(file.path)
            if file.path not in present:
                found.problems.append(f"{file.path} is missing: restore it from a backup")
                continue
            contents = folder.read(file.path)
            found.files += 1
            found.bytes += len(contents)
            if hashlib.sha256(contents).hexdigest() != file.sha256:
                found.problems.append(f"{file.path} was changed: restore it from a backup")
    for path in sorted(present - listed):
        found.remarks.append(f"{path} is in no manifest: its run has not ended")
    return found


async def list_archive(location: str | Path, cluster: str | None = None) -> list[ArchivedDay]:
    """Return the days of an archive, oldest first.

    Raises:
        UnavailableError: If the archive cannot be read.
    """
    return await asyncio.to_thread(_list, Archive(location, cluster))


def _list(archive: Archive) -> list[ArchivedDay]:
    days: dict[tuple[str, str], list[ArchiveFile]] = {}
    snapshot = archive.snapshot()
    voids: Counter[str] = Counter()
    for file in snapshot.tasks:
        day = file.path.split("/")[-2].partition("=")[2]
        days.setdefault((day, file.cluster), []).append(file)
        pairs = snapshot.voids.get(file.cluster)
        if pairs:
            table = file.read(columns=["task_id", "version"])
            rows = zip(table["task_id"].to_pylist(), table["version"].to_pylist(), strict=True)
            voids[file.path] = sum(pair in pairs for pair in rows)
    return [
        ArchivedDay(
            cluster,
            day,
            len(files),
            sum(file.rows - voids[file.path] for file in files),
            sum(file.size for file in files),
        )
        for (day, cluster), files in sorted(days.items())
    ]
