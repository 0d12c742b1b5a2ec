"""Hostile SQLite files: opened, adopted, restored and verified.

Each round changes a sound file, a store or a legacy database, as a hostile program or a bad disk
would: other schemas, triggers, views, generated columns, odd values, flipped bits, lost pages, and
pages in which a search never ends.

- The outcome is success, or a `StoreError`.
- It takes at most 10 seconds.
- A file with a hostile schema is refused, and a refused file is not changed: nothing in it has run.
"""

from __future__ import annotations

import asyncio
import shutil
import sqlite3
import time
from collections.abc import Awaitable, Callable
from contextlib import suppress
from pathlib import Path

from campaigns.harness.campaign import SQLITE, Campaign, Run, silenced, within
from campaigns.workloads import hostile_files
from campaigns.workloads.legacy_files import make_original
from openclaw_store import Database, StateManager, StoreError, Task, TaskRepository, TaskType
from openclaw_store.backends.factory import backend_of
from openclaw_store.database import migrations
from openclaw_store.maintenance.doctor import diagnose
from openclaw_store.maintenance.restore import restore
from openclaw_store.maintenance.verify import verify
from openclaw_store.testing import NodeFactory, TaskFactory, create_database

SECONDS = 10.0
"""Longest time of one outcome."""


def perform(run: Run) -> None:
    """Change and use one file in each round."""
    files = _Files(run)
    with silenced("openclaw_store"):
        for _ in run.each_round():
            asyncio.run(files.use_one())


class _Files:
    """The sound files, and what is done to their copies."""

    def __init__(self, run: Run) -> None:
        self.run = run
        self.store = run.folder / "store.db"
        self.legacy = run.folder / "legacy.db"
        create_database(self.store)
        asyncio.run(_fill(self.store))
        make_original(self.legacy).close()
        hostile_files.change(
            self.legacy,
            [
                "INSERT INTO tasks (task_id, task_type, name, required_skills, status, priority)"
                " VALUES ('a', 'batch', 'a', '[]', 'pending', 2)",
                "INSERT INTO nodes (node_id, hostname, platform, arch, status, available_skills)"
                " VALUES ('n', 'h', '', '', 'online', '[]')",
            ],
        )
        hostile_files.change(self.store, [])
        self.slowest = 0.0

    async def use_one(self) -> None:
        run, random = self.run, self.run.random
        folder = run.folder / "round"
        folder.mkdir()
        path = folder / "cluster.db"
        is_legacy = random.random() < 0.2
        shutil.copy(self.legacy if is_legacy else self.store, path)
        what, must_refuse = self._make_hostile(path, is_legacy=is_legacy)
        uses: dict[str, Callable[[Path], Awaitable[object]]] = {"open": _open}
        if not is_legacy:
            uses |= {
                "restore": _restore, "verify": _verify, "check": _check, "diagnose": _diagnose,
            }  # fmt: skip
        name, use = random.choice([*uses.items()])
        content = _content(path, strictly=must_refuse)
        begin = time.monotonic()
        outcome: Exception | None = None
        try:
            await within(use(path), f"{name} {what}", SECONDS)
            run.counts.acknowledged += 1
        except StoreError as error:
            outcome = error
            run.counts.refused += 1
        except Exception as error:  # a finding of its own
            outcome = error
            run.wrong(f"{name} {what}: {error!r}")
        seconds = time.monotonic() - begin
        self.slowest = max(self.slowest, seconds)
        run.notes["slowest outcome"] = f"{self.slowest:.2f} s"
        run.check(seconds < SECONDS or run.is_quick, f"{name} {what} took {seconds:.1f} s")
        is_found = outcome is not None or name in ("diagnose", "verify")
        run.check(is_found or not must_refuse, f"{name} {what} was accepted")
        if must_refuse or isinstance(outcome, StoreError):
            run.check(
                _content(path, strictly=must_refuse) == content,
                f"{name} {what} has changed the file, but: {outcome!r}",
            )
            run.check(not _target(path).exists(), f"{name} {what} has made a database")
        shutil.rmtree(folder)

    def _make_hostile(self, path: Path, *, is_legacy: bool) -> tuple[str, bool]:
        """Change a file; return the change in words, and whether the file must be refused."""
        random = self.run.random
        schemas = hostile_files.LEGACY if is_legacy else hostile_files.SCHEMAS
        kind = random.choice(("schema", "page", "page", "page", "bomb", "values"))
        if kind == "schema":
            name = random.choice([*schemas])
            hostile_files.change(path, schemas[name])
            return f"{'legacy ' * is_legacy}{name}", True
        if kind == "bomb":
            tables = ("tasks", "nodes") if is_legacy else ("tasks", "nodes", "changes")
            table, children = random.choice(tables), random.randrange(3, 120)
            hostile_files.make_bomb(path, table, random.randrange(2, 18), children)
            return f"{'legacy ' * is_legacy}bomb of {children} {table}", False
        if kind == "values" and not is_legacy:
            name = random.choice([*hostile_files.VALUES])
            with suppress(sqlite3.IntegrityError):
                hostile_files.change(path, hostile_files.VALUES[name])
            return name, False
        path.write_bytes(hostile_files.damage(path.read_bytes(), random))
        return f"{'legacy ' * is_legacy}damaged pages", False


async def _fill(path: Path) -> None:
    async with StateManager(Database(path), None) as state:
        make_task, make_node = TaskFactory(), NodeFactory()
        await state.register_node(make_node())
        await state.add_tasks([make_task(parameters={"x": "y" * 200}) for _ in range(60)])
        await state.claim_tasks("node-0001", limit=2)


async def _open(path: Path) -> None:
    async with Database(path) as database:
        with suppress(StoreError):  # the file is accepted
            await TaskRepository(database).create(Task.create(TaskType.BATCH, "another"))


def _content(path: Path, *, strictly: bool) -> bytes:
    """Return a file; without the journal mode, if damage may show only after that was set."""
    content = path.read_bytes()
    if strictly:
        return content
    return content[:18] + content[20:24] + content[28:92] + content[100:]


def _target(path: Path) -> Path:
    return path.with_name("target.db")


async def _restore(path: Path) -> None:
    await asyncio.to_thread(restore, backend_of(_target(path)), path)


async def _verify(path: Path) -> None:
    async with Database(path) as database:
        with suppress(StoreError):  # the file is accepted
            await verify(database)


async def _check(path: Path) -> None:
    await asyncio.to_thread(migrations.check, backend_of(path))


async def _diagnose(path: Path) -> None:
    await diagnose(Database(path))


CAMPAIGN = Campaign(
    name="hostile-files",
    title="hostile schemas, values and pages of SQLite files: open, adopt, restore, verify",
    promises=("P2", "P8"),
    perform=perform,
    rounds=20_000,
    quick_rounds=50,
    unit="files",
    kinds=(SQLITE,),
)
