"""Run two coordinators on one database, in separate processes that do not communicate.

Run it as `python examples/two_coordinators.py`, or with the URL of an empty PostgreSQL database
as in `python examples/two_coordinators.py postgresql://me@localhost/cluster`. Both add tasks and
complete pending tasks, while the first process watches. At the end all three processes have the
same state, and the watcher has received each change once and in order.
"""

import argparse
import asyncio
import sys
from collections import Counter
from pathlib import Path
from tempfile import TemporaryDirectory

from openclaw_store import (
    Change,
    ChangeKind,
    Database,
    StaleVersionError,
    StateManager,
    StoreError,
    Task,
    TaskStatus,
    TaskType,
)

TASKS = 50
"""Number of tasks that each coordinator adds."""


async def coordinate(location: str, name: str) -> None:
    """Add tasks, and complete pending tasks until none is left."""
    async with StateManager(Database(location)) as store:
        for number in range(TASKS):
            await store.add_task(Task.create(TaskType.BATCH, f"{name} {number}"))
        while pending := await store.get_pending_tasks(limit=1):
            [task] = pending
            task.status, task.result = TaskStatus.COMPLETED, {"by": name}
            try:
                await store.update_task(task)
            except StaleVersionError:  # the other coordinator completed the task first
                await store.refresh_from_database()


async def watch(store: StateManager) -> list[Change]:
    """Return all changes up to the completion of the last task."""
    seen: list[Change] = []
    async for change in store.watch():
        seen.append(change)
        if sum(one.to_status == "completed" for one in seen) == 2 * TASKS:
            break
    return seen


async def main(location: str) -> None:
    """Run two coordinators, watch their changes, and print the outcome."""
    async with StateManager(Database(location)) as store:
        watcher = asyncio.create_task(watch(store))
        coordinators = [
            await asyncio.create_subprocess_exec(
                sys.executable, __file__, location, "--coordinator", name
            )
            for name in ("left", "right")
        ]
        if any([await coordinator.wait() for coordinator in coordinators]):
            watcher.cancel()
            raise SystemExit("a coordinator has failed")
        changes = await watcher

        tasks = await store.task_repo.list_by_status(TaskStatus.COMPLETED)
        done_by = Counter(task.result["by"] for task in tasks)
        kinds = Counter(change.kind for change in changes)
        first, last = changes[0].revision, changes[-1].revision
        print(f"{kinds[ChangeKind.CREATED]} tasks, finished by {dict(sorted(done_by.items()))}")
        print(f"{len(changes)} changes were seen, with the revisions {first} to {last}")
        for change in await store.history(tasks[0].task_id):
            print(f"  {change.revision:4} {change.kind} -> {change.to_status}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Run two coordinators on one database.")
    parser.add_argument("location", nargs="?", help="a file or a URL; default: a temporary file")
    parser.add_argument("--coordinator", help=argparse.SUPPRESS)
    options = parser.parse_args()
    try:
        if options.coordinator:
            asyncio.run(coordinate(options.location, options.coordinator))
        elif options.location:
            asyncio.run(main(options.location))
        else:
            with TemporaryDirectory() as folder:
                asyncio.run(main(str(Path(folder, "cluster.db"))))
    except StoreError as error:
        raise SystemExit(str(error)) from error
