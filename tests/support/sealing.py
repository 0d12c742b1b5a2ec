"""Databases with keys: their secrets, and a look at the stored values."""

from __future__ import annotations

from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from conftest import Location, MakeNode, MakeTask, execute

from openclaw_store import (
    KeyRing,
    Progress,
    StateManager,
)
from openclaw_store.encryption import Key, KeyState

KEYS = [Key(id, bytes([id] * 32)) for id in (1, 2, 3)]
RING = KeyRing(KEYS[:1], 1)
SECRET = "my-secret"


def retired(key: Key) -> Key:
    return replace(key, state=KeyState.RETIRED)


def table(location: Location, name: str) -> list[tuple[Any, ...]]:
    return sorted(execute(location, f"SELECT * FROM {name}"), key=repr)


def rewrite(location: Location, name: str, change: str) -> None:
    execute(location, f"UPDATE {name} SET {change}")


async def fill(state: StateManager, make_task: MakeTask, make_node: MakeNode) -> None:
    """Put the secret into each sealed field."""
    node = make_node(node_id="n1", ip_address=f"{SECRET}-1", tailscale_ip=f"{SECRET}-2")
    await state.add_node(node)
    secrets = {"description": f"{SECRET} 你好", "parameters": {"a": [SECRET]}}
    await state.add_task(make_task(task_id="t1", metadata={SECRET: SECRET}, **secrets))
    await state.add_tasks([make_task(task_id="bulk", **secrets)])
    bulk, task = sorted(await state.claim_tasks("n1", 2), key=lambda one: one.task_id)
    for one in (task, bulk):
        await state.start_task(one)
    at = datetime(2026, 3, 1, tzinfo=UTC)
    await state.renew_lease("n1", {"t1": Progress(1, 0.5, SECRET, at)})
    await state.complete_task(task, {"answer": SECRET})
    await state.fail_task(bulk, f"{SECRET} broke it", retry=False)
    await state.add_task(make_task(task_id="t3"))
    await state.cancel_task("t3", f"{SECRET} is the reason")


def files_in(folder: Path) -> list[Path]:
    return [path for path in folder.rglob("*") if path.is_file()]


async def fill_more(state: StateManager, make_task: MakeTask) -> None:
    await state.add_tasks(
        [make_task(task_id=f"more{n}", parameters={"a": SECRET * 50}) for n in range(50)]
    )
