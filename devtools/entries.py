"""Count how often one call of the store enters another module of the library.

`python -m devtools.entries` prints the figures of four calls on SQLite, with `--list` also every
function that was entered, and from which file. A call counts if the files of the calling and of the
called function differ, and the called one belongs to the library; a coroutine that is resumed from
another file counts again.
"""

from __future__ import annotations

import argparse
import asyncio
import sys
import threading
from collections import Counter
from collections.abc import Awaitable, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from types import FrameType
from typing import NamedTuple, TypeVar

import openclaw_store
from openclaw_store import Database, NodeInfo, StateManager, Task, TaskType

T = TypeVar("T")

_LIBRARY = f"{Path(openclaw_store.__file__).parent}/"

_PAUSE_SECONDS = 0.05
"""Time in which the writer's thread ends a call whose caller has the answer."""


class Entry(NamedTuple):
    """A call from one file into a module of the library."""

    caller: str
    """Path of the calling file inside the library; `-` for any other file."""
    module: str
    function: str


class Entries:
    """The entries of several calls, in the order in which they were measured."""

    def __init__(self) -> None:
        self.of_calls: dict[str, Counter[Entry]] = {}
        self._seen: list[Entry] | None = None
        """`None` while nothing is measured."""

    def install(self) -> None:
        """Profile this thread, and each thread that starts from now on."""
        threading.setprofile(self._profile)
        sys.setprofile(self._profile)

    def remove(self) -> None:
        """Stop profiling this thread and new ones."""
        sys.setprofile(None)
        threading.setprofile(None)

    async def measure(self, name: str, call: Awaitable[T]) -> T:
        """Await a call and record its entries under a name."""
        seen: list[Entry] = []
        await asyncio.sleep(_PAUSE_SECONDS)
        self._seen = seen
        try:
            result = await call
            await asyncio.sleep(_PAUSE_SECONDS)
            return result
        finally:
            self._seen = None
            self.of_calls[name] = Counter(seen)

    def _profile(self, frame: FrameType, event: str, argument: object) -> None:
        seen, code = self._seen, frame.f_code
        if seen is None or event != "call" or not code.co_filename.startswith(_LIBRARY):
            return
        caller = frame.f_back.f_code.co_filename if frame.f_back is not None else ""
        if caller != code.co_filename:
            seen.append(Entry(_short(caller), _short(code.co_filename), code.co_qualname))


async def count_entries() -> dict[str, Counter[Entry]]:
    """Return the entries of one add, claim, completion and foreign change, by name."""
    entries = Entries()
    entries.install()
    try:
        with TemporaryDirectory(prefix="openclaw-store-") as folder:
            path = Path(folder, "state.db")
            async with (
                StateManager(Database(path), auto_sync_interval=None) as manager,
                StateManager(Database(path), auto_sync_interval=None) as other,
            ):
                await _measure_calls(entries, manager, other)
    finally:
        entries.remove()
    return entries.of_calls


async def _measure_calls(entries: Entries, manager: StateManager, other: StateManager) -> None:
    await manager.add_node(
        NodeInfo("node-1", "host", available_skills=["python"], max_concurrent_tasks=50)
    )
    for number in range(5):
        await manager.add_task(_task(number))
    await other.refresh_from_database()
    for _ in range(3):  # the first calls compile statements and open connections
        [task] = await manager.claim_tasks("node-1")
        await manager.complete_task(task, result=1)
    await entries.measure("add_task", manager.add_task(_task(5)))
    await other.refresh_from_database()
    [task] = await entries.measure("claim_tasks", manager.claim_tasks("node-1"))
    await entries.measure("complete_task", manager.complete_task(task, result=1))
    await other.refresh_from_database()
    await manager.add_task(_task(6))
    await entries.measure("foreign change", other.refresh_from_database())


def _task(number: int) -> Task:
    return Task.create(TaskType.BATCH, f"task {number}", "text", ["python"], parameters={"a": 1})


def _short(file: str) -> str:
    return file.removeprefix(_LIBRARY) if file.startswith(_LIBRARY) else "-"


def main(arguments: Sequence[str] | None = None) -> int:
    """Print the figures."""
    parser = argparse.ArgumentParser(prog="python -m devtools.entries", description=__doc__)
    parser.add_argument("--list", action="store_true", help="print each function entered, too")
    options = parser.parse_args(arguments)
    for name, entries in asyncio.run(count_entries()).items():
        print(f"{name:16}{entries.total():5}")  # noqa: T201
        for entry, number in entries.most_common() if options.list else ():
            caller, module, function = entry
            print(f"{number:8}  {caller} → {module}: {function}")  # noqa: T201
    return 0


if __name__ == "__main__":
    sys.exit(main())
