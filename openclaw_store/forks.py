"""What a forked child has inherited from its parent, and must leave alone.

SQLite does not stand a fork: it keeps the locks of a process in memory, where a child finds those
that only its parent has.
"""

from __future__ import annotations

import ctypes
import os
from contextlib import suppress
from pathlib import Path
from weakref import WeakKeyDictionary

_opened: WeakKeyDictionary[object, str | Path] = WeakKeyDictionary()
"""The connections that this process has opened, and the files they lead to."""

_inherited: set[tuple[int, int]] = set()
"""The files that were open in the process that this one was forked from."""


def opened(connection: object, path: str | Path) -> None:
    """Note that this process has a connection to a file, until it is closed or gone."""
    _opened[connection] = path


def closed(connection: object) -> None:
    """Note that it has not any more."""
    _opened.pop(connection, None)


def is_inherited(path: str | Path) -> bool:
    """Whether a file was open when this process was forked."""
    with suppress(OSError):
        return bool(_inherited) and identity(path) in _inherited
    return False


def identity(path: str | Path) -> tuple[int, int]:
    """Which file it is, by device and number, whatever it is called; there must be one."""
    found = os.stat(path)
    return found.st_dev, found.st_ino


def _inherit() -> None:
    for connection, path in list(_opened.items()):
        with suppress(OSError):
            _inherited.add(identity(path))
        # Referred to for ever, so that nothing closes it: not even the end of the interpreter.
        ctypes.pythonapi.Py_IncRef(ctypes.py_object(connection))
    _opened.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_inherit)
