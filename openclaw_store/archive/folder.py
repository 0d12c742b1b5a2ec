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
    changed_at: Any
    """The time of its last change, if the file system knows it."""


class Folder:
    """The files below a location: a path, or a URL of `pyarrow.fs` or fsspec.

    All methods block the thread, and raise `UnavailableError` if the location cannot be used.
    """

    def __init__(self, location: str | Path) -> None:
        """Raise `InvalidDataError` if the location contains a password or has an unknown scheme."""
        url = urlsplit(str(location))
        self._local: Path | None = None
        if len(url.scheme) < 2 or isinstance(location, Path):  # one letter is a drive of Windows
            self._local = Path(os.path.abspath(location))
            self.location = str(self._local)
            self._system, self._root = fs.LocalFileSystem(), self.location
            return
        if "@" in url.netloc or "secret" in url.query.lower():
            raise InvalidDataError(
                "archive",
                "must not contain a password: use the environment of the object store, such as "
                "AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY",
            )
        self.location = str(location).rstrip("/")
        with self._errors():
            self._system, self._root = _file_system(self.location, url.scheme)

    def __repr__(self) -> str:
        return f"<Folder {self.location!r}>"

    def list(self, below: str) -> list[Entry]:
        """Return the complete files below a folder, by path."""
        selector = fs.FileSelector(f"{self._root}/{below}", allow_not_found=True, recursive=True)
        with self._errors():
            found = self._system.get_file_info(selector)
        entries = [
            Entry(one.path[len(self._root) + 1 :], one.size, one.mtime_ns)
            for one in found
            if one.is_file and not one.base_name.startswith(".")
        ]
        return sorted(entries)

    def open(self, path: str) -> Any:
        """Open a file to read it; `FileNotFoundError` tells that it is gone."""
        return self._system.open_input_file(f"{self._root}/{path}")

    def read(self, path: str) -> bytes:
        """Return the contents of a file."""
        with self._errors(path), self.open(path) as file:
            contents: bytes = file.read()
            return contents

    def write(self, path: str, contents: Any) -> None:
        """Write a file as a whole; a file of this name is replaced."""
        if self._local is not None:
            with written_aside(self._local / path, overwrite=True) as partial:
                partial.write_bytes(contents)
            return
        with self._errors(path), self._system.open_output_stream(f"{self._root}/{path}") as file:
            file.write(contents)  # an object store shows it when it is closed

    def remove(self, path: str) -> None:
        """Remove a file, unless it is gone."""
        with self._errors(path):
            try:
                self._system.delete_file(f"{self._root}/{path}")
            except FileNotFoundError:
                return

    @contextmanager
    def _errors(self, path: str = "") -> Iterator[None]:
        try:
            yield
        except (OSError, pa.ArrowException) as error:
            where = f"{self.location}/{path}" if path else self.location
            raise UnavailableError(
                f"{where}: {error}: check the location and its rights"
            ) from error


def _file_system(location: str, scheme: str) -> tuple[Any, str]:
    try:
        return fs.FileSystem.from_uri(location)  # type: ignore[no-any-return]
    except pa.ArrowInvalid as error:
        try:
            import fsspec
        except ImportError:
            fsspec = None
        if fsspec is None or scheme not in fsspec.available_protocols():
            reason = (
                f"has the scheme {scheme!r}, which neither pyarrow nor an installed fsspec knows"
            )
            raise InvalidDataError("archive", f"{reason}: {error}") from error
        system, root = fsspec.core.url_to_fs(location)
        return fs.PyFileSystem(fs.FSSpecHandler(system)), root
