"""The folder of an archive: on this machine, or on an object store.

A file appears under its name when it is complete, and is never changed afterwards.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import urlsplit

import pyarrow as pa
from pyarrow import fs

from openclaw_store.backends import written_aside
from openclaw_store.errors import InvalidDataError, UnavailableError


class Entry(NamedTuple):
    """A file of the folder."""

    path: str
    """Relative to the folder, with slashes."""
    size: int
    changed_at: Any = None
    """The time of its last change, if the file system knows it."""


class Folder:
    """The files below a location: a path, or a URL of `pyarrow.fs` or fsspec.

    All methods block the thread, and raise `UnavailableError` if the location cannot be used.
    """

    def __init__(self, location: str | Path) -> None:
        """Raise `InvalidDataError` if the location contains a password or has an unknown scheme."""
        url = urlsplit(str(location))
        if len(url.scheme) < 2 or isinstance(location, Path):  # one letter is a drive of Windows
            self.location = self.root = os.path.abspath(location)
            self.system: Any = fs.LocalFileSystem()
            return
        if "@" in url.netloc or "secret" in url.query.lower():
            raise InvalidDataError(
                "archive",
                "must not contain a password: use the environment of the object store, such as "
                "AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY",
            )
        self.location = str(location).rstrip("/")
        with self.errors(passed=(InvalidDataError,)):
            self.system, root = _file_system(self.location)
        self.root = root.rstrip("/")

    def __repr__(self) -> str:
        return f"<Folder {self.location!r}>"

    def list(self, below: str) -> list[Entry]:
        """Return the complete files below a folder, by path."""
        selector = fs.FileSelector(f"{self.root}/{below}", allow_not_found=True, recursive=True)
        with self.errors():
            found = self.system.get_file_info(selector)
        start = len(self.root) + 1
        return sorted(
            Entry(one.path[start:], one.size, one.mtime_ns)
            for one in found
            if one.is_file and not one.base_name.startswith(".")
        )

    def read(self, path: str) -> bytes:
        """Return the contents of a file."""
        with self.errors(path), self.system.open_input_file(f"{self.root}/{path}") as file:
            contents: bytes = file.read()
            return contents

    def write(self, path: str, contents: Any) -> None:
        """Write a file as a whole; a file of this name is replaced."""
        target = f"{self.root}/{path}"
        if isinstance(self.system, fs.LocalFileSystem):
            with written_aside(Path(target), overwrite=True) as partial:
                partial.write_bytes(contents)
            return
        with self.errors(path), self.system.open_output_stream(target) as file:
            file.write(contents)  # an object store shows it when it is closed

    def remove(self, path: str) -> None:
        """Remove a file, unless it is gone."""
        with self.errors(path):
            try:
                self.system.delete_file(f"{self.root}/{path}")
            except FileNotFoundError:
                return

    @contextmanager
    def errors(
        self,
        path: str = "",
        remedy: str = "check the location and its rights",
        *,
        passed: tuple[type[Exception], ...] = (),
    ) -> Iterator[None]:
        """Raise errors of the file system and of damaged files as `UnavailableError`.

        Args:
            passed: Errors that are raised as they are.
        """
        try:
            yield
        except passed:
            raise
        except (OSError, ValueError, pa.ArrowException) as error:
            where = f"{self.location}/{path}" if path else self.location
            raise UnavailableError(f"{where}: {error}: {remedy}") from error


def _file_system(location: str) -> tuple[Any, str]:
    try:
        return fs.FileSystem.from_uri(location)  # type: ignore[no-any-return]
    except pa.ArrowInvalid as error:
        try:
            return fs.FileSystem.from_uri(f"fsspec+{location}")  # type: ignore[no-any-return]
        except (ImportError, ValueError):
            reason = "has a scheme that neither pyarrow nor an installed fsspec knows"
            raise InvalidDataError("archive", f"{reason}: {error}") from error
