"""Make the screenshots of the page for README and docs: `python -m devtools.screenshots`."""

from __future__ import annotations

import argparse
import asyncio
import random
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING

from devtools.browser import missing, running_browser
from devtools.postgres import free_port
from openclaw_store import (
    Database,
    NodeInfo,
    StateManager,
    Task,
    TaskPriority,
    TaskStatus,
    TaskType,
)
from openclaw_store.web import app
from openclaw_store.web.server import Server

if TYPE_CHECKING:
    from playwright.sync_api import Browser

TOKEN = "token of the screenshots"  # noqa: S105 - of a store that lives for seconds

_NAMES = ("atlas", "borealis", "cygnus", "draco", "eridanus", "fornax")
_TASKS = ("render page {}", "index shard {}", "resize image {}", "train fold {}", "export {}.pdf")
_ERRORS = (
    "OSError: [Errno 28] No space left on device: '/scratch/{}'",
    "ValueError: page {} has no text layer",
    "ConnectionError: 10.0.3.{}:443 refused the connection",
)

SHOTS = (
    ("overview", "/", "light", "en", 1280, 1020),
    ("overview-zh", "/", "dark", "zh", 1280, 1020),
    ("task", "/task?id=train-fold", "light", "en", 1280, 900),
    ("phone", "/", "dark", "en", 390, 844),
)
"""Name, address, theme, language and size of each picture."""


async def fill(state: StateManager, seed: int = 7) -> None:
    """Give a store the life of an hour."""
    chance = random.Random(seed)
    now = state.db.clock()
    for place, name in enumerate(_NAMES):
        skills = ["cpu", "gpu"] if place % 2 else ["cpu", "ocr"]
        node = NodeInfo(name, f"{name}.lab", "linux", "x86_64", available_skills=skills)
        node.ip_address, node.max_concurrent_tasks, node.tags = (
            f"10.0.3.{place + 11}",
            8,
            ["rack-2"],
        )
        await state.register_node(node)
    tasks = []
    for number in range(1500):
        at = now - timedelta(minutes=62 - 61 * (number / 1500) ** 0.8)
        started = at + timedelta(seconds=chance.expovariate(1 / (4 + 6 * (600 < number < 800))))
        ended = started + timedelta(seconds=chance.expovariate(1 / 25))
        status, error = TaskStatus.COMPLETED, None
        if chance.random() < (0.25 if 600 < number < 760 else 0.02):
            status, error = TaskStatus.FAILED, chance.choice(_ERRORS).format(number)
        name = chance.choice(_TASKS).format(number)
        task = Task.create(TaskType.BATCH, name, required_skills=["cpu"], submitted_at=at)
        task.status, task.error, task.user_id = status, error, chance.choice(["anna", "bo", "chen"])
        task.started_at, task.completed_at = started, min(now, ended)
        task.attempt, task.assigned_node = 1, chance.choice(_NAMES)
        tasks.append(task)
    for number in range(64):
        skills = ["quantum"] if number % 16 == 0 else ["gpu"]
        at = now - timedelta(seconds=chance.random() * 90)
        name = chance.choice(_TASKS).format(2000 + number)
        tasks.append(
            Task.create(
                chance.choice(list(TaskType)),
                name,
                required_skills=skills,
                submitted_at=at,
                priority=chance.choice(list(TaskPriority)),
                user_id=chance.choice(["anna", "bo", "chen"]),
            )
        )
    first = now - timedelta(minutes=2)
    parameters = {"fold": 3, "epochs": 40, "learning_rate": 0.001}
    task = Task.create(
        TaskType.COMPUTE_INTENSIVE,
        "train fold 3",
        required_skills=["gpu"],
        task_id="train-fold",
        submitted_at=first,
        priority=TaskPriority.CRITICAL,
        parameters=parameters,
        user_id="chen",
        timeout=3600,
    )
    await state.add_tasks([*tasks, task])
    [claimed] = await state.claim_tasks("borealis", start=True)
    await state.fail_task(claimed, "CUDA out of memory: tried to allocate 512 MiB")
    await state.requeue_task(claimed.task_id)
    for name, count in (("borealis", 5), ("draco", 7), ("fornax", 3), ("atlas", 2)):
        await state.claim_tasks(name, count, start=True)
    for name in _NAMES:
        busy = chance.random() * 70 + 20
        await state.update_heartbeat(name, busy, busy * 0.8, disk_usage=chance.random() * 90)
    await state.sync_to_database()
    await state.drain_node("cygnus", "new disk on Tuesday")


async def _list_clusters() -> list[dict[str, str]]:
    return [{"Cluster": "berlin", "Nodes": "6", "Tasks": "1,565"}]


@contextmanager
def served(location: str | Path) -> Iterator[str]:
    """Serve the page of a filled store on a thread, and yield its address."""
    port, started, loop = free_port(), threading.Event(), asyncio.new_event_loop()
    server: Server | None = None

    async def run() -> None:
        nonlocal server
        async with StateManager(Database(location), cache=False) as state:
            await fill(state)
            page = app(state, token=TOKEN, allow_actions=True, clusters=_list_clusters)
            server = Server(page, "127.0.0.1", port)
            serving = asyncio.ensure_future(server.serve())
            while not server.started:  # noqa: ASYNC110 - it has no event
                await asyncio.sleep(0.01)
            started.set()
            await serving

    thread = threading.Thread(target=loop.run_until_complete, args=(run(),))
    thread.start()
    try:
        started.wait(60)
        yield f"http://127.0.0.1:{port}"
    finally:
        if server is not None:
            server.should_exit = True
        thread.join()
        loop.close()


def shoot(browser: Browser, address: str, folder: Path) -> None:
    """Write each picture to a folder."""
    for name, path, theme, language, width, height in SHOTS:
        context = browser.new_context(viewport={"width": width, "height": height})
        for cookie, value in (("theme", theme), ("lang", language)):
            context.add_cookies(
                [{"name": f"openclaw_store_{cookie}", "value": value, "url": address}]
            )
        page = context.new_page()
        page.goto(f"{address}{path}")
        page.fill("input[type=password]", TOKEN)
        page.click("main button")
        page.wait_for_selector("#live:not([hidden])")
        page.screenshot(path=folder / f"page-{name}.png")
        context.close()


def main() -> None:
    """Make the pictures."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=Path, default=Path("docs/_static"))
    options = parser.parse_args()
    if reason := missing():
        raise SystemExit(reason)
    with (
        TemporaryDirectory() as folder,
        served(Path(folder, "cluster.db")) as address,
        running_browser() as browser,
    ):
        shoot(browser, address, options.folder)


if __name__ == "__main__":
    main()
