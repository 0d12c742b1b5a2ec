"""Check the files of an archive against its manifests, and list what it contains."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path

from openclaw_store.archive.folder import Folder
from openclaw_store.archive.layout import LAYOUTS
from openclaw_store.archive.manifest import digest, manifests
from openclaw_store.archive.selection import Selection
from openclaw_store.archive.snapshot import Catalogue
from openclaw_store.domain import TaskFilter


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
    present = {entry.path for kind in LAYOUTS for entry in folder.list(kind)}
    listed: set[str] = set()
    for path, manifest in manifests(folder):
        found.files += 1
        if manifest is None:
            found.problems.append(f"{path} was changed: restore it from a backup")
            continue
        for file in manifest.files:
            listed.add(file.path)
            if file.path not in present:
                found.problems.append(f"{file.path} is missing: restore it from a backup")
                continue
            contents = folder.read(file.path)
            found.files += 1
            found.bytes += len(contents)
            if digest(contents) != file.sha256:
                found.problems.append(f"{file.path} was changed: restore it from a backup")
    for path in sorted(present - listed):
        found.remarks.append(f"{path} is in no manifest: its run has not ended")
    return found


async def list_archive(location: str | Path, cluster: str | None = None) -> list[ArchivedDay]:
    """Return the days of an archive, oldest first.

    Raises:
        UnavailableError: If the archive cannot be read.
    """
    return await asyncio.to_thread(_list, Catalogue(Folder(location), cluster))


def _list(catalogue: Catalogue) -> list[ArchivedDay]:
    snapshot, everything = catalogue.snapshot(), Selection(TaskFilter.everything())
    days = groupby(
        sorted(snapshot.tasks, key=lambda file: (file.day, file.cluster)),
        key=lambda file: (file.day, file.cluster),
    )
    found = []
    for (day, cluster), of_day in days:
        files = [*of_day]
        tasks = sum(
            len(snapshot.read(one, everything, columns=["version"]))
            if snapshot.has_voids
            else one.rows
            for one in files
        )
        found.append(ArchivedDay(cluster, day, len(files), tasks, sum(one.size for one in files)))
    return found
