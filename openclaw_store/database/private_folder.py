"""The folder of a private database, which is removed with its owner."""

from __future__ import annotations

import os
import shutil
import tempfile
import weakref
from collections.abc import Callable
from pathlib import Path


def private_folder(owner: object) -> tuple[Path, Callable[[], object]]:
    """Make a folder, and return it with the function that removes it.

    It is also removed when `owner` is collected or the program ends, but never by a forked child.
    """
    folder = tempfile.mkdtemp(prefix="openclaw_store-")
    return Path(folder), weakref.finalize(owner, _remove, folder, os.getpid())


def _remove(folder: str, pid: int) -> None:
    if os.getpid() == pid:  # otherwise a forked child would delete the parent's database
        shutil.rmtree(folder, ignore_errors=True)
