"""The command that lists tasks, and the commands that sum them up."""

from __future__ import annotations

import asyncio
import csv
import sys
from collections.abc import Sequence
from dataclasses import asdict, replace
from datetime import datetime, timedelta
from functools import partial
from typing import TYPE_CHECKING, Annotated, Any

import typer

from openclaw_store.cli import render
from openclaw_store.cli.commands import app
from openclaw_store.cli.context import Call, command
from openclaw_store.cli.options import ago, selecting, since_option, time_option
from openclaw_store.domain import TaskFilter, TaskStatus
from openclaw_store.errors import InvalidDataError, printable

if TYPE_CHECKING:
    from openclaw_store.domain import Task
    from openclaw_store.maintenance.statistics import Quantiles, Statistics

COLUMNS = ("task_id", "status", "priority", "submitted_at", "assigned_node", "name", "error")
"""The default columns of a list of tasks; the error column appears only if a task has one."""

HEADERS = {
    "task_id": "task",
    "submitted_at": "submitted (UTC)",
    "assigned_node": "node",
    "user_id": "user",
    "task_type": "type",
}


@command(app)
@selecting
async def tasks(
    call: Call,
    submitted_from: Annotated[datetime | None, time_option("Submitted since.")] = None,
    submitted_until: Annotated[datetime | None, time_option("Submitted before.")] = None,
    completed_from: Annotated[datetime | None, time_option("Finished since.")] = None,
    completed_until: Annotated[datetime | None, time_option("Finished before.")] = None,
    limit: Annotated[int, typer.Option(min=1, max=10_000, help="Maximum number.")] = 20,
    after: Annotated[
        str | None, typer.Option(metavar="CURSOR", help="Continue a list from this cursor.")
    ] = None,
    sort: Annotated[
        str | None,
        typer.Option(metavar="FIELD", help="Sort the page by a field; -FIELD for descending."),
    ] = None,
    columns: Annotated[
        str | None, typer.Option(metavar="FIELDS", help="Fields of tasks, separated by commas.")
    ] = None,
    as_csv: Annotated[bool, typer.Option("--csv", help="Write CSV.")] = False,
    *,
    filter: TaskFilter,
) -> None:
    """List tasks, newest submitted first, one page at a time.

    A time is 2026-11-25, 2026-11-25T09:30 or 2026-11-25T09:30+01:00; without a zone, it is local.

    openclaw-store tasks --status failed --finished-since 1h --columns task_id,error
    openclaw-store tasks --since 1d --limit 10000 --csv > today.csv
    """
    from openclaw_store.repositories import TaskRepository

    names = list(COLUMNS) if columns is None else _fields("columns", columns)
    given: dict[str, Any] = {
        "submitted_from": submitted_from,
        "submitted_until": submitted_until,
        "completed_from": completed_from,
        "completed_until": completed_until,
    }
    filter = replace(filter, **{name: at for name, at in given.items() if at is not None})
    async with call.opened() as database:
        page = await TaskRepository(database).list_tasks(filter, after=after, limit=limit)
    found = _sorted(list(page), sort)
    if as_csv:
        writer = csv.writer(sys.stdout, lineterminator="\n")
        writer.writerow(names)
        writer.writerows([_cell(task, name) for name in names] for task in found)
        return
    if columns is None and not any(task.error for task in found):
        names.remove("error")
    headers = [HEADERS.get(name, name.replace("_", " ")) for name in names]
    call.show(
        {"tasks": found, "after": page.after},
        lambda: render.table(headers, ([_cell(task, name) for name in names] for task in found)),
        *([f"the next page: --after {page.after}"] if page.after else ()),
    )


def _fields(option: str, text: str) -> list[str]:
    from openclaw_store.domain import Task

    known = Task.__dataclass_fields__
    names = [name.strip() for name in text.split(",") if name.strip()]
    for name in names:
        if name not in known:
            raise InvalidDataError(option, f"{name!r} is no field of a task: {', '.join(known)}")
    return names


def _sorted(found: list[Task], sort: str | None) -> list[Task]:
    """Return tasks in the order of a field; tasks without it come last."""
    if sort is None:
        return found
    names = _fields("sort", sort.removeprefix("-")) or ["task_id"]
    if len(names) > 1:
        raise InvalidDataError("sort", f"must be one field, as {names[0]}")
    name = names[0]
    present = [task for task in found if getattr(task, name) is not None]
    key = (lambda task: str(getattr(task, name))) if name in _TEXTS else _value_of(name)
    present.sort(key=key, reverse=sort.startswith("-"))
    return present + [task for task in found if getattr(task, name) is None]


_TEXTS = frozenset(
    {"required_skills", "optional_skills", "parameters", "result", "affinity_tags", "metadata"}
)


def _value_of(name: str) -> Any:
    return lambda task: getattr(task, name)


def _cell(task: Task, name: str) -> str:
    """Return a field as a short text in one line."""
    value = getattr(task, name)
    if value is None:
        return ""
    if name == "error":
        lines = str(value).strip().splitlines()
        return printable(lines[-1][:200]) if lines else ""
    if name == "priority":
        return str(value.name.lower())
    if isinstance(value, datetime):
        return render.when(value)
    return printable(render.as_json(value, compact=True) if name in _TEXTS else str(value))


Period = Annotated[datetime, since_option("Length of the period, or its beginning.")]
_HOUR: Any = "1h"


@command(app)
async def failures(call: Call, since: Period = _HOUR) -> None:
    """Group the tasks that failed or timed out by their error, with numbers folded.

    openclaw-store failures --since 1d
    """
    from openclaw_store.maintenance.failures import find_failures
    from openclaw_store.maintenance.read_around import on_connection

    begin = ago(since)
    async with call.opened() as database:
        found = await database.read(
            on_connection(lambda one: find_failures(one, database.statements, begin))
        )
    rows = (
        (one.count, one.status.value, render.when(one.newest_at), one.text or "(no error)",
         ", ".join(one.nodes), ", ".join(one.examples))
        for one in found.groups
    )  # fmt: skip
    headers = ("tasks", "status", "newest (UTC)", "error", "nodes", "examples")
    total = f"{render.number(found.count, 'failure')} since {render.when(begin)} UTC"
    call.show(
        asdict(found),
        *([lambda: render.table(headers, rows)] if found.groups else []),
        total if found.is_complete else f"{total}; older ones were left out",
    )


@command(app)
async def stuck(call: Call) -> None:
    """Sum up the tasks that do not advance, by reason, and name some of each.

    `openclaw-store release --stuck` frees the ones that lost nodes hold.
    """
    from openclaw_store.maintenance.read_around import on_connection
    from openclaw_store.maintenance.stuck import find_stuck

    async with call.opened() as database:
        now = database.clock()
        found = await database.read(on_connection(lambda one: find_stuck(one, now)))
    rows = (
        (f"{one.count}{'' if one.is_complete else '+'}", one.reason.value, one.subject,
         render.age(one.since, now), ", ".join(one.examples))
        for one in found
    )  # fmt: skip
    headers = ("tasks", "reason", "of", "for", "examples")
    call.show(
        {"groups": [asdict(one) for one in found]},
        *([lambda: render.table(headers, rows)] if found else ["no task is stuck"]),
    )


@command(app)
async def stats(call: Call, since: Period = _HOUR) -> None:
    """Show rates and times of a period: submitted, finished and failed tasks, waiting and running.

    openclaw-store stats --since 30min
    """
    from openclaw_store.maintenance.read_around import on_connection
    from openclaw_store.maintenance.statistics import read_statistics

    begin = ago(since)
    async with call.opened() as database:
        until = database.clock()
        if begin >= until:
            raise InvalidDataError("since", "must lie in the past")
        sql = database.statements
        found = await database.read(
            on_connection(lambda one: read_statistics(one, sql, begin, until))
        )
    call.show(asdict(found), *_parts(found))


def _parts(found: Statistics) -> Sequence[Any]:
    minutes = (found.until - found.since) / timedelta(minutes=1)
    totals = {
        name: sum(getattr(one, name) for one in found.intervals)
        for name in ("submitted", "finished", "failed")
    }
    rates = [(name, f"{count:,}", f"{count / minutes:,.1f}") for name, count in totals.items()]
    times = [("waiting", *_seconds(found.waiting)), ("running", *_seconds(found.running))]
    parts: list[Any] = [
        lambda: render.table(("tasks", "number", "a minute"), rates),
        "",
        lambda: render.table(("seconds", "p50", "p95", "p99"), times),
    ]
    for name, counts in found.by.items():
        if counts:
            rows = [(key, f"{count:,}") for key, count in list(counts.items())[:10]]
            parts += ["", partial(render.table, (name, "finished"), rows)]
    if found.is_sampled:
        parts.append("times, and numbers by node, user and type, are estimates from a sample")
    return parts


def _seconds(found: Quantiles | None) -> Sequence[str]:
    if found is None:
        return ("-", "-", "-")
    return tuple(f"{value:,.3f}" for value in (found.p50, found.p95, found.p99))


@command(app)
async def explain(
    call: Call,
    id: Annotated[str | None, typer.Argument(metavar="ID", help="A task.")] = None,
    every: Annotated[bool, typer.Option("--all", help="The first pending tasks.")] = False,
    limit: Annotated[int, typer.Option(min=1, max=1000, help="Tasks with --all.")] = 20,
) -> None:
    """Tell why tasks wait.

    openclaw-store explain 0193a2b4-77aa
    openclaw-store explain --all
    """
    from openclaw_store.maintenance.summary import explain_task
    from openclaw_store.repositories import TaskRepository

    if (id is None) is not every:
        raise InvalidDataError("id", "give the identifier of a task, or --all")
    async with call.opened() as database:
        ids = [id] if id is not None else []
        if every:
            waiting = await TaskRepository(database).list_pending_tasks(limit)
            ids = [task.task_id for task in waiting if task.status is TaskStatus.PENDING]
        found = [(one, await explain_task(database, one)) for one in ids if one]
    document = [
        {"task_id": one, **vars(why), "nodes": dict(why.nodes), "text": str(why)}
        for one, why in found
    ]
    rows = [(one, str(why)) for one, why in found]
    call.show(
        {"tasks": document},
        *(
            [lambda: render.table(("task", "it waits because"), rows)]
            if rows
            else ["no task waits"]
        ),
    )


@command(app)
async def top(
    call: Call,
    once: Annotated[bool, typer.Option("--once", help="Draw once, and end.")] = False,
) -> None:
    """Show the cluster live, busiest nodes first; once, if the output is no terminal."""
    from openclaw_store.cli import live_view
    from openclaw_store.maintenance import summary
    from openclaw_store.repositories import NodeRepository

    async with call.opened() as database:
        if not once and not call.as_json and sys.stdout.isatty():
            await live_view.view(database, summary.watch(database))
            return
        found, nodes = await asyncio.gather(
            summary.summarize(database), NodeRepository(database).get_all_nodes()
        )
    nodes.sort(key=live_view.load, reverse=True)
    call.show(
        {"summary": found, "nodes": nodes},
        lambda: render.summary(found),
        "",
        lambda: render.nodes(nodes, found.read_at),
    )
