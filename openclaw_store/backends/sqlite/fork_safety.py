"""Files and connections that a forked child inherits from its parent and must leave alone.

SQLite does not survive a fork: it keeps the locks of a process in memory, where a child finds locks
that only its parent holds.
"""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path
from weakref import WeakKeyDictionary

from openclaw_store.backends.internals import never_free

_open_connections: WeakKeyDictionary[object, str | Path] = WeakKeyDictionary()
"""The connections that this process has opened, and their files."""

_inherited_files: set[tuple[int, int]] = set()
"""The files that were open in the parent at the fork."""


def note_opened(connection: object, path: str | Path) -> None:
    """Record a connection of this process until it is closed or collected."""
    _open_connections[connection] = path


def note_closed(connection: object) -> None:
    """Remove a connection from the record."""
    _open_connections.pop(connection, None)


def is_inherited(path: str | Path) -> bool:
    """Return true if the file was open when this process was forked."""
    with suppress(OSError):
        return bool(_inherited_files) and identity(path) in _inherited_files
    return False


def identity(path: str | Path) -> tuple[int, int]:
    """Return the device and inode of an existing file, which are the same under all its names."""
    found = os.stat(path)
    return found.st_dev, found.st_ino


def _inherit() -> None:
    # Runs in the child before any other code, so no connection of the child is in the record.
    for connection, path in list(_open_connections.items()):
        with suppress(OSError):
            _inherited_files.add(identity(path))
        never_free(connection)  # freeing it would close it
    _open_connections.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_inherit)
