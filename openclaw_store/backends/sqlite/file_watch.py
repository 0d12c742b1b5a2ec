"""Wait until a file is written to, without reading it again and again.

Linux reports writes by inotify(7), for which Python has no function. Elsewhere, and where the
process has used up its share of inotify, `start` returns `False`. The file is not opened: closing
it would release the locks of SQLite, which belong to the process.
"""

from __future__ import annotations

import ctypes
import os
import select
import sys
from pathlib import Path

IN_MODIFY = 0x2
"""The event of a write, from the system's `sys/inotify.h`."""

_EVENT_BYTES = 4096
"""Bytes of events that are read at a time."""


class FileWatch:
    """A wait for writes to one file, which another thread can end."""

    def __init__(self) -> None:
        self._stopped, self._stop = os.pipe()
        self._poll: select.poll | None = None  # Windows has none
        self._inotify: int | None = None

    def start(self, path: Path) -> bool:
        """Watch a file, and no other one; return `False` if the system does not support it."""
        self.cease()
        if sys.platform != "linux":
            return False
        system = ctypes.CDLL(None)
        inotify = system.inotify_init1(os.O_CLOEXEC | os.O_NONBLOCK)
        if inotify < 0:
            return False
        if system.inotify_add_watch(inotify, os.fsencode(path), IN_MODIFY) < 0:
            os.close(inotify)
            return False
        self._inotify, self._poll = inotify, select.poll()
        for file in (self._stopped, inotify):
            self._poll.register(file, select.POLLIN)
        return True

    def cease(self) -> None:
        """Watch no file any more."""
        if self._inotify is not None:
            os.close(self._inotify)
            self._inotify = self._poll = None

    def wait(self, seconds: float) -> bool:
        """Return `True` at a write since the last call, `False` after a time or at the stop.

        Without a watched file it returns at once.
        """
        is_written = False
        for file, _ in self._poll.poll(seconds * 1000) if self._poll else ():
            if file == self._inotify:
                os.read(file, _EVENT_BYTES)
                is_written = True
        return is_written

    def stop(self) -> None:
        """End the current wait and all later ones; called on any thread."""
        os.write(self._stop, b"\0")

    def close(self) -> None:
        """Close the files, after the last wait."""
        self.cease()
        os.close(self._stopped)
        os.close(self._stop)
