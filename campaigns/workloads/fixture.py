"""The tasks and nodes that a call works on, each in the state that the call needs."""

from __future__ import annotations

from dataclasses import replace
from datetime import UTC, datetime, timedelta
from functools import cached_property, partial
from pathlib import Path
from typing import Any

from sqlalchemy.ext.asyncio import AsyncSession, create_async_engine
from sqlalchemy.pool import NullPool

from campaigns.harness.campaign import Location
from openclaw_store import (
    Database,
    NodeInfo,
    NodeStatus,
    StateManager,
    Task,
    TaskStatus,
    TaskType,
)
from openclaw_store.domain import admit
from openclaw_store.repositories.commands import Create


class Fixture:
    """The tasks and nodes of one call.

    Args:
        manager: The manager of the call.
        number: A unique number, which ends all identifiers of the fixture.
        location: The database of the manager.
        target: A location with an empty database, or with an interrupted copy.
        folder: An empty folder for files.
    """

    def __init__(
        self,
        manager: StateManager,
        number: int,
        location: Location,
        target: Location,
        folder: Path,
    ) -> None:
        self.manager, self.number = manager, number
        self.location, self.target, self.folder = location, target, folder
        self.revision = manager.version
        """The revision before the fixture was created."""
        self.db = manager.db
        self.task_repo, self.node_repo = manager.task_repo, manager.node_repo
        self.tasks: dict[str, Task] = {}
        """Tasks that exist before the call, by role."""
        self.nodes: dict[str, NodeInfo] = {}
        self._prepare()

    @cached_property
    def other(self) -> StateManager:
        """A second manager on the same database, not opened yet."""
        return StateManager(Database(self.location))

    @cached_property
    def own_session(self) -> AsyncSession:
        """A session of the caller's own engine on the same database."""
        is_file = isinstance(self.location, Path)
        url = f"sqlite+aiosqlite:///{self.location}" if is_file else str(self.location)
        return AsyncSession(create_async_engine(url, poolclass=NullPool))

    def id(self, role: str) -> str:
        """Return the identifier for a role."""
        return f"{role}-{self.number}"

    def task(self, role: str, **fields: Any) -> Task:
        """Return a new task."""
        return Task(self.id(role), TaskType.BATCH, "as it was", **fields)

    def node(self, role: str, **fields: Any) -> NodeInfo:
        """Return a new node."""
        return NodeInfo(self.id(role), "host", **fields)

    def changed(self, role: str) -> Task:
        """Return an existing task with another name."""
        return replace(self.tasks[role], name="changed")

    def changed_node(self, role: str) -> NodeInfo:
        """Return an existing node with another name."""
        return replace(self.nodes[role], hostname="changed")

    def creation(self) -> Create[Task]:
        """Return the operation that adds a task."""
        return Create(
            Task, self.id("new"), admit(Task, self.task("new"), partial(datetime.now, UTC))
        )

    def _prepare(self) -> None:
        now = datetime.now(UTC)
        before, long_ago = now - timedelta(hours=1), now - timedelta(days=40)
        skill, user, busy, lost = map(self.id, ("skill", "user", "busy", "lost"))
        skilled: dict[str, Any] = {"required_skills": [skill], "user_id": user}
        held: dict[str, Any] = {"attempt": 1, "scheduled_at": before}
        running: dict[str, Any] = {**held, "status": TaskStatus.RUNNING, "started_at": before}
        self.nodes = {
            "busy": self.node(
                "busy",
                last_heartbeat=now,
                max_concurrent_tasks=10,
                running_tasks=2,
                available_skills=[skill],
            ),
            "lost": self.node("lost", last_heartbeat=before, running_tasks=1),
            "silent": self.node("silent", last_heartbeat=before),
            "gone": self.node("gone", status=NodeStatus.OFFLINE),
        }
        self.tasks = {
            "waiting": self.task("waiting", **skilled),
            "spare": self.task("spare", **skilled),
            "keyed": self.task("keyed", required_skills=["none"], idempotency_key=self.id("key")),
            "ending": self.task("ending", required_skills=["none"]),
            "held": self.task("held", status=TaskStatus.SCHEDULED, assigned_node=busy, **held),
            "running": self.task("running", assigned_node=busy, **running),
            "late": self.task("late", assigned_node=lost, **running),
            "done": self.task(
                "done", status=TaskStatus.COMPLETED, submitted_at=long_ago, completed_at=long_ago
            ),
        }


CONCURRENT_ROLES = ("ending", "beside", "second", "third", "next")
"""Tasks that other callers write, at the same moment as the call, and next."""

TASK_ROLES = (
    "waiting", "spare", "keyed", "held", "running", "late", "done", "unsaved", "new", "another",
    *CONCURRENT_ROLES,
)  # fmt: skip
"""Tasks of a fixture that exist, or may exist."""

NODE_ROLES = ("busy", "lost", "silent", "gone", "newcomer")
"""Nodes of a fixture."""
