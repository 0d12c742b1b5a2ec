"""Run a coordinator and three workers in separate processes, and kill one worker during its work.

Run it as `python examples/scheduler_demo.py`, or with the URL of an empty PostgreSQL database as in
`python examples/scheduler_demo.py postgresql://me@localhost/cluster`. The workers claim tasks;
some tasks fail at the first attempt. The coordinator detects the silent worker and requeues its
tasks, so that every task is completed. Begin reading at `work` and `coordinate`.
"""

import argparse
import asyncio
import sys
from asyncio.subprocess import Process
from collections.abc import Mapping
from pathlib import Path
from tempfile import TemporaryDirectory

from openclaw_store import (
    Backoff,
    Database,
    NodeInfo,
    Run,
    StateManager,
    StoreError,
    Task,
    TaskStatus,
    TaskType,
    Worker,
)

WORKERS = ("atlas", "boreas", "ceres")
TASKS = 30
LONG_TASK = 15
"""The task whose worker is killed."""
SILENT_SECONDS = 3.0
"""The lease of a worker: without a heartbeat for so long, its node is lost."""
BACKOFF = Backoff(first_seconds=0.2)
"""Delays of retries; the first is 0.2 seconds."""


async def work(location: str, name: str) -> None:
    """Run up to two tasks at once, until SIGTERM."""

    async def handle(task: Task, run: Run) -> str:
        """Run a task: its result, or its exception, is the outcome."""
        await asyncio.sleep(task.parameters["seconds"])  # the work itself
        if task.parameters["is_difficult"] and task.attempt == 1:
            raise RuntimeError("not at the first attempt")
        return f"done by {name}"

    async with StateManager(Database(location), backoff=BACKOFF) as store:
        node = NodeInfo(name, hostname=name, max_concurrent_tasks=2)
        await Worker(store, node, handle, lease_seconds=SILENT_SECONDS).run()


async def coordinate(location: str) -> None:
    """Submit the tasks, start the workers, wait for the tasks, and print the outcome."""
    async with StateManager(Database(location), backoff=BACKOFF) as store:
        await store.add_tasks(map(make_task, range(1, TASKS + 1)))
        workers = {
            name: await asyncio.create_subprocess_exec(
                sys.executable, __file__, location, "--worker", name
            )
            for name in WORKERS
        }
        async with asyncio.timeout(60), asyncio.TaskGroup() as group:
            killer = group.create_task(kill(store, workers))
            for name, worker in workers.items():
                group.create_task(wait_for(name, worker))
            await recover(store)
            killer.cancel()
            for worker in workers.values():
                if worker.returncode is None:
                    worker.terminate()  # SIGTERM: the worker leaves in good order
        await print_outcome(store)


def make_task(number: int) -> Task:
    """Return a task; every tenth task fails at its first attempt."""
    return Task.create(
        TaskType.BATCH,
        f"task {number}",
        task_id=f"task-{number}",
        parameters={
            "seconds": 2 if number == LONG_TASK else 0.4,
            "is_difficult": number % 10 == 0,
        },
    )


async def kill(store: StateManager, workers: Mapping[str, Process]) -> None:
    """Kill the worker that starts the long task."""
    async for change in store.watch(since=0):
        if (change.item_id, change.to_status) == (f"task-{LONG_TASK}", TaskStatus.RUNNING):
            workers[str(change.node)].kill()
            print(f"{change.node} runs {change.item_id}, and is killed")
            return


async def recover(store: StateManager) -> None:
    """Requeue the tasks of lost workers, until every task is finished."""
    while (await store.get_state()).tasks:
        recovery = await store.recover(timeout_seconds=SILENT_SECONDS)
        for node_id in recovery.offline_nodes:
            print(f"{node_id} was silent for more than {SILENT_SECONDS:g} seconds")
        for task_id in recovery.requeued_tasks:
            print(f"{task_id} is pending again")
        await asyncio.sleep(0.5)


async def wait_for(name: str, worker: Process) -> None:
    """Wait until a worker ends, by itself or by a signal."""
    try:
        status = await worker.wait()
    except asyncio.CancelledError:
        worker.kill()  # the coordinator was interrupted
        raise
    if status > 0:
        raise SystemExit(f"{name} ended with status {status}")


async def print_outcome(store: StateManager) -> None:
    """Print the counters of each worker and the history of a requeued task."""
    stats = await store.get_task_stats()
    print(f"\n{stats['completed']} of {stats['total']} tasks are completed\n")
    print("worker   tried  completed  failed or lost")
    for node in sorted(await store.get_all_nodes(), key=lambda node: node.node_id):
        counts = (node.total_tasks_processed, node.successful_tasks, node.failed_tasks)
        print("{:8} {:5} {:10} {:15}".format(node.node_id, *counts))
    for task in await store.list_tasks(limit=TASKS):
        changes = await store.history(task.task_id)
        if any(change.reason == "node lost" for change in changes):
            print(f"\nthe life of {task.task_id}")
            for change in changes:
                where = f" on {change.node}" if change.node else ""
                why = f" ({change.reason.splitlines()[-1]})" if change.reason else ""
                print(f"{change.revision:5} {change.to_status}{where}{why}")
            return


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Run a coordinator and three workers.")
    parser.add_argument("location", nargs="?", help="a file or a URL; default: a temporary file")
    parser.add_argument("--worker", metavar="NAME", help=argparse.SUPPRESS)
    options = parser.parse_args()
    try:
        if options.worker:
            asyncio.run(work(options.location, options.worker))
        elif options.location:
            asyncio.run(coordinate(options.location))
        else:
            with TemporaryDirectory() as folder:
                asyncio.run(coordinate(str(Path(folder, "cluster.db"))))
    except* StoreError as group:
        raise SystemExit(str(group.exceptions[0])) from group
