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
def written_aside(
    target: Path,
    *,
    overwrite: bool,
    besides: Sequence[str] = (),
    remedy: str = "choose another, or pass overwrite=True (--overwrite)",
) -> Iterator[Path]:
    """Yield the path of a temporary file, which becomes `target` at the end of the block.

    Only the user of this process can read the file, under any umask.

    Args:
        target: The final path; its folder is made. A symbolic link stands for its target.
        overwrite: Replace an existing file. Without it, not even a file is replaced that another
            process makes during the block.
        besides: Suffixes of files beside `target` that belong to it.
        remedy: What to do if a file exists, for the error.

    Raises:
        InvalidDataError: If `target` exists and `overwrite` is off.
        UnavailableError: If the file cannot be written.
    """
    target = Path(os.path.realpath(target))
    beside = [target.with_name(target.name + ending) for ending in besides]
    if not overwrite:
        _refuse_existing(remedy, target)
    partial = target.with_name(f".{target.name}.{secrets.token_hex(4)}.partial")
    try:
        make_folder(target.parent)
        _make_file(partial)
        yield partial
        # Contents first, then the name, then the folder: after a power cut in between, the target
        # is still the old file.
        with partial.open("rb+") as file:
            os.fsync(file.fileno())
        if overwrite:
            for old in beside:  # they would be applied to the new file
                old.unlink(missing_ok=True)
            partial.replace(target)
        else:
            _refuse_existing(remedy, target, *beside)
            try:
                rename_to_unused(partial, target)
            except FileExistsError:
                _refuse_existing(remedy, target)
                raise
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


def make_folder(folder: Path) -> None:
    """Make a folder, and the missing ones above it, for the user of this process alone."""
    if os.path.isdir(folder):
        return
    make_folder(folder.parent)
    try:
        folder.mkdir(0o700)
    except FileExistsError:  # another process made it, or it is no folder
        if not os.path.isdir(folder):
            raise
    else:
        folder.chmod(0o700)  # the umask may have taken rights from the owner


def _make_file(path: Path) -> None:
    os.close(os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600))
    path.chmod(0o600)


def rename_to_unused(source: Path, target: Path) -> None:
    """Rename a file, or raise `FileExistsError` if a file has the new name already.

    A check before a plain rename could be too early.
    """
    try:
        os.link(source, target)
    except (FileExistsError, FileNotFoundError):
        raise
    except OSError:  # the file system has no hard links
        _make_file(target)
        try:
            source.replace(target)
        except OSError:
            target.unlink()
            raise
    else:
        source.unlink()


def _refuse_existing(remedy: str, *paths: Path) -> None:
    for path in paths:
        if os.path.lexists(path):
            raise InvalidDataError("path", f"{path} exists: {remedy}")


def unused_name(path: Path, ending: str, besides: Sequence[str] = ()) -> Path:
    """Return an unused path beside `path`: its name with the ending, and a number if necessary."""
    target, number = path.with_name(path.name + ending), 1
    while any(os.path.lexists(f"{target}{suffix}") for suffix in ("", *besides)):
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
