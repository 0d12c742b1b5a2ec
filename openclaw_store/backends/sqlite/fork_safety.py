"""What a forked child has inherited from its parent, and must leave alone.

SQLite does not stand a fork: it keeps the locks of a process in memory, where a child finds those
that only its parent has. And where another thread was inside SQLite at the fork, with a lock of it,
there is nobody in the child who gives that back.
"""

from __future__ import annotations

import ctypes
import os
import sqlite3
from contextlib import closing, suppress
from pathlib import Path
from threading import Lock, Thread
from weakref import WeakKeyDictionary

_opened: WeakKeyDictionary[object, str | Path] = WeakKeyDictionary()
"""The connections that this process has opened, and the files they lead to."""

_inherited: set[tuple[int, int]] = set()
"""The files that were open in the process that this one was forked from."""

_TRIAL_SECONDS = 0.75
"""How long it may take, so that whoever waits for it has an error within a second."""

_trial: Thread | None = None
"""Tries SQLite in a forked child, until that was seen to work."""

_lock = Lock()


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


def does_sqlite_work() -> bool:
    """Whether SQLite can be used in this process; blocks the thread for a while to say no."""
    global _trial
    trial = _trial
    if trial is None:
        return True
    with _lock:
        if trial.ident is None:
            trial.start()
    trial.join(_TRIAL_SECONDS)
    if trial.is_alive():
        return False
    _trial = None
    return True


def _try_sqlite() -> None:
    """Need each lock that all connections share; wait for ever if one of them is not given back."""
    with suppress(sqlite3.Error):  # an empty file is an empty database
        nothing = sqlite3.connect(f"file:{os.devnull}?mode=ro", uri=True, timeout=0)
        with closing(nothing):
            nothing.execute("SELECT random()")
            nothing.execute("SELECT count(*) FROM sqlite_master")


def identity(path: str | Path) -> tuple[int, int]:
    """Which file it is, by device and number, whatever it is called; there must be one."""
    found = os.stat(path)
    return found.st_dev, found.st_ino


def _inherit() -> None:
    global _trial, _lock
    _trial, _lock = Thread(target=_try_sqlite, daemon=True), Lock()
    for connection, path in list(_opened.items()):
        with suppress(OSError):
            _inherited.add(identity(path))
        # Referred to for ever, so that nothing closes it: not even the end of the interpreter.
        ctypes.pythonapi.Py_IncRef(ctypes.py_object(connection))
    _opened.clear()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_inherit)
