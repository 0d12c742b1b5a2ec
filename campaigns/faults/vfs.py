"""Hooks for the system calls of SQLite in this process, to record them or to let them fail.

SQLite lets a program replace its system calls one by one (`xSetSystemCall` of a VFS), as its own
tests do. `fsync` is not among them; its caller, `xSync` of an open file, is replaced instead. See
https://sqlite.org/c3ref/vfs.html.
"""

from __future__ import annotations

import _sqlite3
import ctypes
import gc
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from ctypes import POINTER, c_char_p, c_int, c_int64, c_size_t, c_ssize_t, c_uint, c_void_p
from dataclasses import dataclass
from pathlib import Path
from typing import Any

SYNC, OPEN_FOLDER = "sync", "openDirectory"
"""The sync of a file, and the opening of its folder, which SQLite does only to sync it."""

WRITES = frozenset({"write", "pwrite", "pwrite64"})
"""The write calls; a system has one or two of them."""


@dataclass(frozen=True, slots=True)
class SystemCall:
    """A system call that SQLite is about to make."""

    name: str
    """The name in the system, such as `pwrite64`; or `SYNC`, or `OPEN_FOLDER`."""
    path: str
    """The path of the file; for `OPEN_FOLDER`, of the file created or removed in the folder."""
    offset: int = 0
    """The offset of a read or write; the new length of `ftruncate`; the flags of `open`."""
    size: int = 0
    """Number of bytes to read, write or map."""
    address: int = 0
    """Memory address of the buffer."""

    @property
    def data(self) -> bytes:
        """The bytes that a write call will write; valid only before the call."""
        return ctypes.string_at(self.address, self.size)


Hook = Callable[[SystemCall], int]
"""Called before each system call. Returns 0 to let it pass, or the `errno` of its failure.

It runs on the thread of the call, which may hold locks of SQLite: it must not use SQLite, and must
not raise.
"""

_SIGNATURES: dict[str, tuple[Any, ...]] = {
    # The result, then the arguments. Calls that this SQLite lacks are skipped.
    "open": (c_int, c_char_p, c_int, c_int),
    "close": (c_int, c_int),
    "stat": (c_int, c_char_p, c_void_p),
    "fstat": (c_int, c_int, c_void_p),
    "ftruncate": (c_int, c_int, c_int64),
    "read": (c_ssize_t, c_int, c_void_p, c_size_t),
    "pread": (c_ssize_t, c_int, c_void_p, c_size_t, c_int64),
    "pread64": (c_ssize_t, c_int, c_void_p, c_size_t, c_int64),
    "write": (c_ssize_t, c_int, c_void_p, c_size_t),
    "pwrite": (c_ssize_t, c_int, c_void_p, c_size_t, c_int64),
    "pwrite64": (c_ssize_t, c_int, c_void_p, c_size_t, c_int64),
    "fchmod": (c_int, c_int, c_uint),
    "unlink": (c_int, c_char_p),
    OPEN_FOLDER: (c_int, c_char_p, c_void_p),
    "mmap": (c_ssize_t, c_void_p, c_size_t, c_int, c_int, c_int, c_int64),
}

_CANNOT_OPEN = 14
_SYNC_FAILED = 1034
"""Error codes of SQLite: SQLITE_CANTOPEN, SQLITE_IOERR_FSYNC."""

_FUNCTION = ctypes.CFUNCTYPE
_Set = _FUNCTION(c_int, c_void_p, c_char_p, c_void_p)
_Get = _FUNCTION(c_void_p, c_void_p, c_char_p)
_Open = _FUNCTION(c_int, c_void_p, c_void_p, c_void_p, c_int, c_void_p)
_Sync = _FUNCTION(c_int, c_void_p, c_int)


class _VFS(ctypes.Structure):
    """The structure `sqlite3_vfs`, version 3."""

    _fields_ = (
        *[(name, c_int) for name in ("iVersion", "szOsFile", "mxPathname")],
        *[(name, c_void_p) for name in ("pNext", "zName", "pAppData")],
        *[(name, c_void_p) for name in ("xOpen", "xDelete", "xAccess", "xFullPathname")],
        *[(name, c_void_p) for name in ("xDlOpen", "xDlError", "xDlSym", "xDlClose")],
        *[(name, c_void_p) for name in ("xRandomness", "xSleep", "xCurrentTime")],
        *[(name, c_void_p) for name in ("xGetLastError", "xCurrentTimeInt64")],
        *[(name, c_void_p) for name in ("xSetSystemCall", "xGetSystemCall", "xNextSystemCall")],
    )


class _Methods(ctypes.Structure):
    """The structure `sqlite3_io_methods`, version 3."""

    _fields_ = (
        ("iVersion", c_int),
        *[(name, c_void_p) for name in ("xClose", "xRead", "xWrite", "xTruncate", "xSync")],
        *[(name, c_void_p) for name in ("xFileSize", "xLock", "xUnlock", "xCheckReservedLock")],
        *[(name, c_void_p) for name in ("xFileControl", "xSectorSize")],
        *[(name, c_void_p) for name in ("xDeviceCharacteristics", "xShmMap", "xShmLock")],
        *[(name, c_void_p) for name in ("xShmBarrier", "xShmUnmap", "xFetch", "xUnfetch")],
    )


class _Hooks:
    """The replacements of SQLite's calls; never freed, since a thread may be inside one."""

    def __init__(self) -> None:
        library: Any = ctypes.CDLL(getattr(_sqlite3, "__file__", None))  # the SQLite of this Python
        library.sqlite3_vfs_find.restype = POINTER(_VFS)
        self._vfs = library.sqlite3_vfs_find(None)
        self._address = ctypes.cast(self._vfs, c_void_p)
        vfs = self._vfs.contents
        if vfs.iVersion < 3:
            raise OSError("this SQLite does not let its system calls be replaced")
        self._set, get = _Set(vfs.xSetSystemCall), _Get(vfs.xGetSystemCall)
        self._hook: Hook | None = None
        self._below = ""
        self._paths: dict[int, str] = {}  # of descriptors
        self._files: dict[int, str] = {}  # of SQLite's own objects
        self._methods: dict[int, tuple[_Methods, Any]] = {}  # by the address of the originals
        self._replacements = {
            name: self._replacement(name, signature, original)
            for name, signature in _SIGNATURES.items()
            if (original := get(self._address, name.encode()))
        }
        self._original_open = _Open(vfs.xOpen)
        self._open = _Open(self._open_file)

    def begin(self, hook: Hook, below: str) -> None:
        # Descriptors may have other files since the last use of hooks.
        self._paths.clear()
        self._hook, self._below = hook, f"{below}/"
        for name, replacement in self._replacements.items():
            self._set(self._address, name.encode(), ctypes.cast(replacement, c_void_p))
        self._vfs.contents.xOpen = ctypes.cast(self._open, c_void_p)

    def end(self) -> None:
        self._hook = None
        self._vfs.contents.xOpen = ctypes.cast(self._original_open, c_void_p)
        for name in self._replacements:
            self._set(self._address, name.encode(), None)

    def _ask(self, call: SystemCall) -> int:
        hook, below = self._hook, self._below
        if hook is None or not f"{call.path}/".startswith(below):
            return 0
        return hook(call)

    def _path(self, descriptor: int) -> str:
        path = self._paths.get(descriptor)
        if path is None:  # it was open before
            try:
                path = os.readlink(f"/proc/self/fd/{descriptor}")
            except OSError:  # no descriptor, such as a map without a file
                return ""
            self._paths[descriptor] = path
        return path

    def _replacement(self, name: str, signature: tuple[Any, ...], original: int) -> Any:
        kind = _FUNCTION(*signature, use_errno=True)  # SQLite reads the `errno`
        proceed = kind(original)
        place = 4 if name == "mmap" else 0  # of the file

        def replacement(*arguments: Any) -> int:
            file = arguments[place]
            path = os.fsdecode(file) if isinstance(file, bytes) else self._path(file)
            error = self._ask(_call(name, path, arguments))
            if error:
                ctypes.set_errno(error)
                return _CANNOT_OPEN if name == OPEN_FOLDER else -1
            if name == "close":
                self._paths.pop(file, None)  # before another thread gets the same number
            result: int = proceed(*arguments)
            if name == "open" and result >= 0:
                self._paths[result] = path
            return result

        return kind(replacement)

    def _open_file(self, vfs: int, name: int | None, file: int, flags: int, out: int | None) -> int:
        """Open a file as SQLite does, with a hook on its syncs."""
        result: int = self._original_open(vfs, name, file, flags, out)
        methods = ctypes.cast(file, POINTER(c_void_p))
        if methods[0]:
            self._files[file] = os.fsdecode(ctypes.string_at(name)) if name else ""
            methods[0] = ctypes.addressof(self._with_sync(methods[0]))
        return result

    def _with_sync(self, address: int) -> _Methods:
        """Copy the methods at an address, with a hook on their sync."""
        if address not in self._methods:
            methods = _Methods.from_buffer_copy(ctypes.string_at(address, ctypes.sizeof(_Methods)))
            proceed = _Sync(methods.xSync)

            def sync(file: int, flags: int) -> int:
                if self._ask(SystemCall(SYNC, self._files.get(file, ""))):
                    return _SYNC_FAILED
                result: int = proceed(file, flags)
                return result

            function = _Sync(sync)
            methods.xSync = ctypes.cast(function, c_void_p)
            self._methods[address] = methods, function
        return self._methods[address][0]


def _call(name: str, path: str, arguments: tuple[Any, ...]) -> SystemCall:
    if name.startswith(("pread", "pwrite")):
        _, address, size, offset = arguments
        return SystemCall(name, path, offset, size, address)
    if name in ("read", "write"):
        _, address, size = arguments
        return SystemCall(name, path, size=size, address=address)
    if name in ("open", "ftruncate"):
        return SystemCall(name, path, offset=arguments[1])
    if name == "mmap":
        return SystemCall(name, path, arguments[5], arguments[1])
    return SystemCall(name, path)


_hooks: _Hooks | None = None


@contextmanager
def hooked(hook: Hook, below: Path) -> Iterator[None]:
    """Pass the system calls of SQLite to a hook, on all threads of this process.

    Calls on files that were open before are included, except their syncs.

    Args:
        below: The folder of the files to watch.
    """
    global _hooks
    if _hooks is None:
        _hooks = _Hooks()
    # A collection within the hook could close a connection, which would wait for a lock that the
    # call under way holds.
    collects = gc.isenabled()
    gc.disable()
    _hooks.begin(hook, str(below.resolve()))
    try:
        yield
    finally:
        _hooks.end()
        if collects:
            gc.enable()


def unavailable_reason() -> str | None:
    """Return the reason that prevents hooks on this machine; `None` if they work."""
    if not Path("/proc/self/fd").is_dir():
        return "SQLite's system calls are hooked on Linux alone"
    try:
        _Hooks()
    except (AttributeError, OSError) as error:
        return f"the SQLite of this Python can not be hooked ({error}): use Python's own build"
    return None
