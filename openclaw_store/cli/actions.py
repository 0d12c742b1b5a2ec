"""The commands that act on tasks and nodes, by identifier or by filter."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Sequence
from contextlib import asynccontextmanager
from dataclasses import replace
from datetime import datetime
from functools import partial
from typing import TYPE_CHECKING, Annotated, Any

import typer

from openclaw_store.cli import render
from openclaw_store.cli.commands import app
from openclaw_store.cli.context import Call, command
from openclaw_store.cli.options import DryRun, Ids, Reason, Yes, either, selecting, time_option
from openclaw_store.domain import (
    ASSIGNED,
    LIVE,
    NodeStatus,
    TaskFilter,
    TaskPriority,
    TaskStatus,
    TaskType,
)
from openclaw_store.errors import (
    BackendError,
    InvalidDataError,
    NodeNotFoundError,
    StoreError,
    TaskNotFoundError,
)

if TYPE_CHECKING:
    from openclaw_store.domain import Task
    from openclaw_store.state_manager import StateManager

Act = Callable[[str], Awaitable[object]]
"""Changes the task or node with an identifier."""

Select = Callable[[], Awaitable[Sequence[str]]]
"""Returns the identifiers of the tasks or nodes to change."""

_AT_ONCE = 200
"""Changes that are made at the same time."""

BY_OPERATOR = "by an operator"
"""The reason in the change log, unless one is given."""


@asynccontextmanager
async def _manager(call: Call) -> AsyncIterator[StateManager]:
    from openclaw_store.state_manager import StateManager

    async with call.opened() as database, StateManager(database, None, cache=False) as manager:
        yield manager


async def _selected(
    manager: StateManager, ids: Sequence[str] | None, filter: TaskFilter, default: Iterable[Any]
) -> list[str]:
    """Return the given identifiers, or the identifiers of the tasks that match a filter."""
    if ids:
        if filter != TaskFilter():
            raise InvalidDataError("id", "give identifiers, or options that select tasks, not both")
        return list(dict.fromkeys(ids))
    if filter == TaskFilter():
        raise InvalidDataError("id", "give identifiers, or options that select tasks; see --help")
    if filter.status is None:
        filter = replace(filter, status=tuple(default))
    return [task.task_id async for task in manager.iter_tasks(filter)]


async def _act(
    call: Call, select: Select, act: Act, what: str, done: str, *, dry_run: bool, yes: bool
) -> None:
    """Change tasks or nodes, each by itself, and show the outcome.

    Args:
        what: `task` or `node`.
        done: The change, as a participle.
    """
    ids, lost = await select(), list[BackendError]()
    refused: dict[str, str] = {}
    if not dry_run:
        if len(ids) > 1 and not yes:
            question = f"{render.number(len(ids), f'{what} would be', done)}. Continue?"
            typer.confirm(question, abort=True, err=True)
            shown = set(ids)  # the answer is about these, of which some may match no longer
            ids = [id for id in await select() if id in shown]

        async def change(id: str) -> None:
            try:
                await act(id)
            except StoreError as error:
                refused[id] = render.one_line(error)
                if isinstance(error, BackendError):
                    lost.append(error)

        for start in range(0, len(ids), _AT_ONCE):
            await asyncio.gather(*map(change, ids[start : start + _AT_ONCE]))
            if lost:
                ids = ids[: start + _AT_ONCE]
                break
    changed = [id for id in ids if id not in refused]
    verb = f"would be {done}" if dry_run else done
    call.show(
        {"action": done, "dry_run": dry_run, f"{what}s": changed, "refused": refused},
        *([render.id_list(changed)] if dry_run and changed else []),
        f"{render.number(len(changed), what)} {verb}",
        *(f"{id}: {reason}" for id, reason in refused.items()),
    )
    if lost:
        raise lost[0]
    if refused:
        raise typer.Exit(1)


@command(app)
@selecting
async def requeue(
    call: Call,
    ids: Ids = None,
    dry_run: DryRun = False,
    yes: Yes = False,
    *,
    filter: TaskFilter,
) -> None:
    """Run finished tasks again: failed and timed out ones, unless --status selects others.

    openclaw-store requeue 0193a2b4-77aa
    openclaw-store requeue --finished-since 1h --error "no paper" --dry-run
    """
    async with _manager(call) as manager:
        unsuccessful = (TaskStatus.FAILED, TaskStatus.TIMEOUT)
        select = partial(_selected, manager, ids, filter, unsuccessful)

        async def act(id: str) -> None:
            if not await manager.requeue_task(id):
                raise TaskNotFoundError(id)

        await _act(call, select, act, "task", "requeued", dry_run=dry_run, yes=yes)


@command(app)
@selecting
async def cancel(
    call: Call,
    ids: Ids = None,
    reason: Reason = None,
    grace: Annotated[
        float | None, typer.Option(help="Seconds for the owner of a running task to stop it.")
    ] = None,
    dry_run: DryRun = False,
    yes: Yes = False,
    *,
    filter: TaskFilter,
) -> None:
    """Cancel tasks that have not finished.

    openclaw-store cancel 0193a2b4-77aa --reason "wrong input"
    openclaw-store cancel --user anna --status pending
    """
    async with _manager(call) as manager:
        select = partial(_selected, manager, ids, filter, LIVE)

        async def act(id: str) -> None:
            if not await manager.cancel_task(id, reason or BY_OPERATOR, grace):
                raise TaskNotFoundError(id)

        await _act(call, select, act, "task", "cancelled", dry_run=dry_run, yes=yes)


@command(app)
@selecting
async def release(
    call: Call,
    ids: Ids = None,
    stuck: Annotated[
        bool, typer.Option("--stuck", help="Held by lost nodes, or claimed and not started.")
    ] = False,
    reason: Reason = None,
    dry_run: DryRun = False,
    yes: Yes = False,
    *,
    filter: TaskFilter,
) -> None:
    """Take tasks back from their nodes: they are pending again, at no cost, and free their slots.

    Make sure that the node does not run them any more.

    openclaw-store release --stuck --dry-run
    openclaw-store release --node atlas --yes
    """
    async with _manager(call) as manager:
        if stuck and (ids or filter != TaskFilter()):
            raise InvalidDataError("stuck", "stands alone: give no identifiers or filters")
        held: dict[str, Task] = {}

        async def select() -> Sequence[str]:
            if stuck:
                found = await _held_tasks(manager)
            else:
                found = await _selected(manager, ids, filter, ASSIGNED)
            for task in await manager.task_repo.get_tasks(found):
                if task is not None:  # the first attempt counts: a later one is not held
                    held.setdefault(task.task_id, task)
            return found

        async def act(id: str) -> None:
            if id not in held:
                raise TaskNotFoundError(id)
            await manager.release_task(held[id], reason or BY_OPERATOR)

        await _act(call, select, act, "task", "released", dry_run=dry_run, yes=yes)


async def _held_tasks(manager: StateManager) -> list[str]:
    """Return the tasks that lost nodes hold, or that their nodes do not start."""
    from openclaw_store.maintenance.read_around import on_connection
    from openclaw_store.maintenance.stuck import find_held

    now = manager.db.clock()
    return await manager.db.read(on_connection(lambda one: find_held(one, now)))


async def _nodes(manager: StateManager, ids: Sequence[str] | None, every: Any) -> list[str]:
    if ids:
        return list(dict.fromkeys(ids))
    if every is None:
        raise InvalidDataError("id", "give the identifiers of nodes, or a filter; see --help")
    return [node.node_id for node in await manager.node_repo.list_nodes(every)]


NodeIds = Annotated[list[str] | None, typer.Argument(metavar="ID", help="Nodes.")]
WithSkill = Annotated[str | None, typer.Option("--skill", help="Nodes with this skill.")]
WithTag = Annotated[str | None, typer.Option("--tag", help="Nodes with this tag.")]


@command(app)
async def drain(
    call: Call,
    ids: NodeIds = None,
    skill: WithSkill = None,
    tag: WithTag = None,
    reason: Annotated[str | None, typer.Option(help="Reason, as the nodes show it.")] = None,
    dry_run: DryRun = False,
    yes: Yes = False,
) -> None:
    """Let nodes claim no more tasks; running ones go on.

    openclaw-store drain atlas --reason "new disk"
    openclaw-store drain --tag rack-7 --yes
    """
    from openclaw_store.domain import NodeFilter

    every = NodeFilter(skill=skill, tag=tag) if skill or tag else None
    async with _manager(call) as manager:

        async def act(id: str) -> None:
            if not await manager.drain_node(id, reason or BY_OPERATOR):
                raise NodeNotFoundError(id)

        select = partial(_nodes, manager, ids, every)
        await _act(call, select, act, "node", "drained", dry_run=dry_run, yes=yes)


@command(app)
async def resume(
    call: Call,
    ids: NodeIds = None,
    skill: WithSkill = None,
    tag: WithTag = None,
    dry_run: DryRun = False,
    yes: Yes = False,
) -> None:
    """Let drained nodes claim tasks again.

    openclaw-store resume atlas
    """
    from openclaw_store.domain import NodeFilter

    drained = NodeStatus.MAINTENANCE
    every = NodeFilter(status=drained, skill=skill, tag=tag) if skill or tag else None
    async with _manager(call) as manager:

        async def act(id: str) -> None:
            if not await manager.resume_node(id):
                raise NodeNotFoundError(id)

        select = partial(_nodes, manager, ids, every)
        await _act(call, select, act, "node", "resumed", dry_run=dry_run, yes=yes)


@command(app)
async def submit(
    call: Call,
    name: Annotated[str, typer.Argument(metavar="NAME", help="The name of the task.")],
    type: Annotated[
        TaskType, typer.Option(metavar="TYPE", help=f"{either(TaskType)}.")
    ] = TaskType.BATCH,
    id: Annotated[str | None, typer.Option(help="Identifier; a new one by default.")] = None,
    skill: Annotated[
        list[str] | None, typer.Option(help="A required skill; may be repeated.")
    ] = None,
    priority: Annotated[str, typer.Option(help="critical, high, normal or low.")] = "normal",
    parameters: Annotated[
        str, typer.Option(metavar="JSON", help="A JSON object; - reads it from the input.")
    ] = "{}",
    timeout: Annotated[int | None, typer.Option(min=1, help="Seconds that it may run.")] = None,
    max_retries: Annotated[int, typer.Option(min=0, help="Maximum number of retries.")] = 3,
    user: Annotated[str | None, typer.Option(help="The user that submits it.")] = None,
    key: Annotated[
        str | None, typer.Option(help="Idempotency key: refused while another task has it.")
    ] = None,
    not_before: Annotated[datetime | None, time_option("Earliest start.")] = None,
    expires_at: Annotated[datetime | None, time_option("Latest start.")] = None,
    dry_run: DryRun = False,
) -> None:
    """Submit a task, and write its identifier.

    openclaw-store submit "monthly report" --skill python --priority high
    openclaw-store submit import --parameters '{"path": "/data/1.csv"}' --key import-1
    """
    import orjson

    from openclaw_store.domain import Task

    names = [one.name.lower() for one in TaskPriority]
    if priority.lower() not in names:
        raise InvalidDataError("priority", f"must be {', '.join(names)}, not {priority!r}")
    try:
        content = orjson.loads(sys.stdin.read() if parameters == "-" else parameters)
    except orjson.JSONDecodeError as error:
        raise InvalidDataError("parameters", f"must be a JSON object: {error}") from None
    task = Task.create(
        type,
        name,
        required_skills=skill or (),
        task_id=id,
        priority=TaskPriority[priority.upper()],
        parameters=content,
        timeout=timeout,
        max_retries=max_retries,
        user_id=user,
        idempotency_key=key,
        not_before=not_before,
        expires_at=expires_at,
    )
    task.to_dict()  # refuses what the store would refuse
    if not dry_run:
        async with _manager(call) as manager:
            await manager.add_task(task)
    call.show({"task": task, "dry_run": dry_run}, task.task_id)
