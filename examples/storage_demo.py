"""Tour openclaw_store in eight steps: three nodes share some tasks, and one node is lost.

Run it as `python examples/storage_demo.py`. It deletes its database at the end, unless you keep it
with `--keep cluster.db`. Begin reading at `tour`.
"""

import argparse
import asyncio
from collections.abc import Iterable, Mapping
from datetime import UTC, datetime, timedelta
from pathlib import Path
from tempfile import TemporaryDirectory

from rich import box
from rich.console import Console
from rich.table import Table

from openclaw_store import (
    Database,
    NodeInfo,
    NodeStatus,
    StateManager,
    Task,
    TaskPriority,
    TaskStatus,
    TaskType,
)

NODES = [
    # name, platform, skills, slots for tasks
    ("atlas", "linux", ["python", "data"], 3),
    ("boreas", "linux", ["python", "video"], 1),
    ("ceres", "darwin", ["video"], 2),
]
TASKS = [
    ("nightly report", TaskType.BATCH, ["python", "data"], TaskPriority.NORMAL),
    ("answer a customer", TaskType.INTERACTIVE, ["python"], TaskPriority.CRITICAL),
    ("cut the trailer", TaskType.COMPUTE_INTENSIVE, ["video"], TaskPriority.HIGH),
    ("render the film", TaskType.COMPUTE_INTENSIVE, ["video"], TaskPriority.NORMAL),
    ("import the archive", TaskType.IO_INTENSIVE, ["data"], TaskPriority.LOW),
    ("train a model", TaskType.COMPUTE_INTENSIVE, ["gpu"], TaskPriority.NORMAL),
]


class SettableClock:
    """Clock of the store; the tour advances it by minutes without waiting."""

    def __init__(self) -> None:
        self.now = datetime.now(UTC)

    def __call__(self) -> datetime:
        return self.now


async def tour(location: Path) -> None:
    """Run the eight steps of the tour with a database at `location`."""
    heading("1 Initialise")
    clock = SettableClock()
    database = Database(location, clock=clock)
    async with StateManager(database, auto_sync_interval=30) as store:  # initialize … shutdown
        console.print("The tables exist, and their content is loaded into memory.")

        heading("2 Create nodes")
        await create_nodes(store)
        print_nodes(await store.get_all_nodes())

        heading("3 Create tasks: the most urgent task comes first")
        await create_tasks(store)
        print_tasks(await store.get_pending_tasks())

        heading("4 Query the state: from memory, in constant time")
        state = await store.get_state()
        console.print(f"{state.online_nodes} of {state.total_nodes} nodes are online,")
        console.print(f"{state.running_tasks} of {state.total_tasks} tasks are running,")
        console.print(f"and the state has version {state.version}.")

        heading("5 Simulate scheduling: no node has a GPU")
        await schedule(store, clock)
        print_tasks(await store.get_pending_tasks())

        heading("6 Simulate execution: all tasks at once, for forty seconds")
        scheduled = await store.task_repo.list_by_status(TaskStatus.SCHEDULED)
        async with asyncio.TaskGroup() as group:
            for task in scheduled:
                group.create_task(start(store, task, clock))
        clock.now += timedelta(seconds=40)
        async with asyncio.TaskGroup() as group:
            for task in scheduled:
                if task.assigned_node != "ceres":  # this node has failed
                    group.create_task(finish(store, task, clock))
        print_tasks([await store.get_task(task.task_id) or task for task in scheduled])

        heading("7 Recover from lost nodes: three minutes later, two nodes send a heartbeat")
        clock.now += timedelta(minutes=3)
        await store.update_heartbeat("atlas", cpu_usage=12.5)
        await store.update_heartbeat("boreas", cpu_usage=80.0)
        recovery = await store.recover(timeout_seconds=120)
        for node_id in recovery.offline_nodes:
            console.print(
                f"{node_id} was silent for more than 120 seconds. Another node can now run"
            )
        print_tasks([task for task in await store.get_pending_tasks() if task.losses])
        print_nodes(await store.get_all_nodes())

        heading("8 Database statistics")
        stats = await database.get_stats()
        console.print(f"{stats['task_count']} tasks: {in_words(stats['task_stats'])}")
        console.print(f"{stats['node_count']} nodes: {in_words(stats['node_stats'])}")
        console.print(f"{stats['db_size'] // 1024} KiB, write-ahead log included")


async def create_nodes(store: StateManager) -> None:
    """Add the nodes; the store sets the time of registration."""
    for name, platform, skills, slots in NODES:
        node = NodeInfo(
            node_id=name,
            hostname=f"{name}.example",
            platform=platform,
            arch="x64",
            available_skills=skills,
            max_concurrent_tasks=slots,
        )
        await store.add_node(node)  # every write is committed when it returns


async def create_tasks(store: StateManager) -> None:
    """Add pending tasks with new identifiers."""
    for name, task_type, skills, priority in TASKS:
        task = Task.create(task_type, name, required_skills=skills, priority=priority)
        await store.add_task(task)


async def schedule(store: StateManager, clock: SettableClock) -> None:
    """Assign each pending task to the least loaded node with the skills, if there is one."""

    def take_slot(node: NodeInfo) -> None:
        node.running_tasks += 1

    for task in await store.get_pending_tasks():
        for node in await store.get_available_nodes():
            if set(task.required_skills) <= set(node.available_skills):
                task.status = TaskStatus.SCHEDULED
                task.assigned_node = node.node_id
                task.scheduled_at = clock()
                await store.update_task(task)
                await store.change_node(node.node_id, take_slot)
                break


async def start(store: StateManager, task: Task, clock: SettableClock) -> None:
    """Set a scheduled task to running."""
    task.status = TaskStatus.RUNNING
    task.started_at = clock()
    await store.update_task(task)  # sets the new version, so that `task` can be updated again


async def finish(store: StateManager, task: Task, clock: SettableClock) -> None:
    """Complete a task, except the import of a damaged archive, which fails."""
    succeeded = task.name != "import the archive"
    if succeeded:
        task.status, task.result = TaskStatus.COMPLETED, "ok"  # any JSON value
    else:
        task.status, task.error = TaskStatus.FAILED, "bad checksum"
    task.completed_at = clock()
    await store.update_task(task)

    def free_slot(node: NodeInfo) -> None:
        node.running_tasks -= 1
        node.total_tasks_processed += 1
        node.successful_tasks += succeeded
        node.failed_tasks += not succeeded

    # Several tasks of a node end at once. `update_node` would refuse all but the first, because
    # their copies of the node are outdated; `change_node` repeats the change on a newer copy.
    if task.assigned_node is not None:
        await store.change_node(task.assigned_node, free_slot)


console = Console(highlight=False)
COLOURS = {
    "scheduled": "cyan",
    "running": "blue",
    "completed": "green",
    "failed": "red",
    "online": "green",
    "offline": "red",
}


def heading(text: str) -> None:
    """Print the title of a step."""
    console.print(f"\n[bold magenta]{text}[/]")


def coloured(status: TaskStatus | NodeStatus) -> str:
    """Return a status with markup for its colour."""
    return f"[{COLOURS.get(status, 'yellow')}]{status}[/]"


def in_words(counts: Mapping[str, int]) -> str:
    """List the counts that are not zero, each with its status."""
    return ", ".join(f"{count} {name}" for name, count in counts.items() if count)


def new_table(*columns: str) -> Table:
    """Return a table without a frame."""
    return Table(*columns, box=box.SIMPLE_HEAD, show_edge=False, pad_edge=False)


def print_nodes(nodes: Iterable[NodeInfo]) -> None:
    """Print nodes and their counters, sorted by name."""
    table = new_table("node", "status", "skills", "slots", "done", "failed")
    for node in sorted(nodes, key=lambda node: node.node_id):
        table.add_row(
            node.node_id,
            coloured(node.status),
            ", ".join(node.available_skills),
            f"{node.running_tasks} of {node.max_concurrent_tasks} in use",
            str(node.successful_tasks),
            str(node.failed_tasks),
        )
    console.print(table)


def print_tasks(tasks: Iterable[Task]) -> None:
    """Print tasks in the order given."""
    table = new_table("task", "priority", "needs", "status", "node", "outcome")
    for task in tasks:
        table.add_row(
            task.name,
            task.priority.name.lower(),
            ", ".join(task.required_skills),
            coloured(task.status),
            task.assigned_node,
            task.error or task.result,
        )
    console.print(table)


def main() -> None:
    """Parse the command line and run the tour."""
    parser = argparse.ArgumentParser(description="Tour openclaw_store in eight steps.")
    parser.add_argument("--keep", type=Path, metavar="PATH", help="keep the database at this path")
    path: Path | None = parser.parse_args().keep
    if path is None:
        with TemporaryDirectory(prefix="openclaw-store-") as folder:
            asyncio.run(tour(Path(folder, "cluster.db")))
    elif path.exists():
        parser.error(f"{path} exists already; the tour needs a new database")
    else:
        asyncio.run(tour(path))
        console.print(f"\nThe database is kept: {path}", markup=False, soft_wrap=True)


if __name__ == "__main__":
    main()
