"""Atomic files: a copy of a database is complete and on the disk, or does not exist."""

from __future__ import annotations

import os
import secrets
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from openclaw_store.errors import InvalidDataError, UnavailableError


@contextmanager
def written_aside(target: Path, *, overwrite: bool, besides: Sequence[str] = ()) -> Iterator[Path]:
    """Yield the path of a temporary file, which becomes `target` at the end of the block.

    Args:
        target: The final path; its folder is made.
        overwrite: Replace an existing file.
        besides: Suffixes of files beside `target` that belong to it.

    Raises:
        InvalidDataError: If `target` exists and `overwrite` is off.
        UnavailableError: If the file cannot be written.
    """
    if not overwrite:
        _refuse_existing(target)
    partial = target.with_name(f".{target.name}.{secrets.token_hex(4)}.partial")
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        partial.touch(exist_ok=False)
        yield partial
        # Contents first, then the name, then the folder: after a power cut in between, the target
        # is still the old file.
        with partial.open("rb+") as file:
            os.fsync(file.fileno())
        for ending in besides:  # the old file's would be applied to the new one
            target.with_name(target.name + ending).unlink(missing_ok=True)
        if not overwrite:  # another process may have made it during the block
            _refuse_existing(target)
        partial.replace(target)
        try:
            _sync_folder(target.parent)
        except OSError as error:
            if overwrite:
                raise UnavailableError(
                    f"{target} was replaced, which may not outlast a power cut, as its folder "
                    f"cannot be synced: {error.strerror or error}"
                ) from error
            target.unlink()
            raise
    except OSError as error:
        reason = error.strerror or error
        raise UnavailableError(f"{target}: {reason}: check the path and the disk") from error
    finally:
        for ending in ("", *besides):
            with suppress(OSError):  # it may not exist
                partial.with_name(partial.name + ending).unlink()


def _refuse_existing(target: Path) -> None:
    if os.path.exists(target):
        raise InvalidDataError(
            "path", f"{target} exists: choose another, or pass overwrite=True (--overwrite)"
        )


def unused_name(path: Path, ending: str) -> Path:
    """Return an unused path beside `path`: its name with the ending, and a number if necessary."""
    target, number = path.with_name(path.name + ending), 1
    while os.path.lexists(target):
        number += 1
        target = path.with_name(f"{path.name}{ending}-{number}")
    return target


def _sync_folder(folder: Path) -> None:
    if sys.platform == "win32":
        return  # Windows cannot open a folder
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
