"""The commands of a retention policy and of its archive: `retain`, and `archive …`."""

from __future__ import annotations

from contextlib import AsyncExitStack
from dataclasses import asdict, replace
from datetime import datetime, timedelta
from typing import Annotated

import typer

from openclaw_store.cli import render
from openclaw_store.cli.commands import app
from openclaw_store.cli.context import Call, command
from openclaw_store.cli.options import selecting, time_option
from openclaw_store.domain import TaskFilter

archive = typer.Typer(
    help="List, query, restore, check or compact an archive.", no_args_is_help=True
)
app.add_typer(archive, name="archive")

Where = Annotated[str, typer.Argument(metavar="ARCHIVE", help="A folder, or s3://bucket/folder.")]
FinishedUntil = Annotated[datetime | None, time_option("Finished before.")]


def _days(help: str) -> float:
    option: float = typer.Option(min=0, help=help, show_default="keep them")
    return option


@command(app)
async def retain(
    call: Call,
    completed: Annotated[float | None, _days("Days after which completed tasks leave.")] = None,
    failed: Annotated[
        float | None, _days("Days after which tasks leave that failed or timed out.")
    ] = None,
    cancelled: Annotated[float | None, _days("Days after which cancelled tasks leave.")] = None,
    history: Annotated[float | None, _days("Days after which changes leave the feed.")] = None,
    archive: Annotated[
        str | None,
        typer.Option(
            metavar="ARCHIVE", help="A folder, or s3://bucket/folder.", show_default="none"
        ),
    ] = None,
    load: Annotated[
        float, typer.Option(min=0.01, max=1, help="Largest share of the time to work.")
    ] = 0.5,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only count.")] = False,
) -> None:
    """Move old finished tasks and old changes to an archive, or delete them without one.

    It may be interrupted: the next call continues.
    """
    from openclaw_store.archive.retain import plan
    from openclaw_store.archive.retain import retain as apply
    from openclaw_store.domain import Retention

    def age(days: float | None) -> timedelta | None:
        return None if days is None else timedelta(days=days)

    policy = Retention(
        completed=age(completed),
        failed=age(failed),
        cancelled=age(cancelled),
        history=age(history),
        archive=archive,
        load=load,
    )
    async with call.opened() as database:
        if dry_run:
            done = await plan(database, policy)
        else:
            with render.progress("reading") as report:
                done = await apply(database, policy, patience=database.timeout, report=report)
    verb = "would leave" if dry_run else "left"
    parts = [
        f"{render.number(done.tasks, 'task')} and {render.number(done.changes, 'change')} {verb}"
    ]
    if archive is not None:
        parts.append(f"{'about ' if dry_run else ''}{render.size(done.bytes)} of files")
    parts.append(("about " if dry_run else "") + render.duration(timedelta(seconds=done.seconds)))
    call.show(
        {**asdict(done), "dry_run": dry_run},
        "; ".join(parts),
        *([f"{render.number(done.voids, 'task')} changed meanwhile, and stayed"][: done.voids]),
        *(f"{id} stays: it has a value that no file can hold" for id in done.skipped),
    )


@command(archive, name="list")
async def list_days(call: Call, where: Where) -> None:
    """List the days of an archive, with the number of tasks that ended then, by cluster."""
    from openclaw_store.archive import module

    found = await module("check").list_archive(where, call.cluster)
    tasks, files, size = (
        sum(getattr(one, name) for one in found) for name in ("tasks", "files", "bytes")
    )
    call.show(
        {"days": found},
        lambda: render.days(found),
        f"{render.number(tasks, 'task')} in {render.number(files, 'file')}, {render.size(size)}",
    )


@command(archive)
@selecting
async def query(
    call: Call,
    where: Where,
    id: Annotated[str | None, typer.Option(help="The task with this identifier.")] = None,
    finished_until: FinishedUntil = None,
    limit: Annotated[int, typer.Option(min=1, max=10_000, help="Maximum number.")] = 20,
    after: Annotated[
        str | None, typer.Option(metavar="CURSOR", help="Continue a list from this cursor.")
    ] = None,
    *,
    filter: TaskFilter,
) -> None:
    """List archived tasks, newest submitted first; with --id, show one and its history."""
    from openclaw_store.archive import open_archive
    from openclaw_store.encryption import keys_of
    from openclaw_store.errors import TaskNotFoundError

    filter = replace(filter, completed_until=finished_until)
    async with AsyncExitStack() as stack:
        # The keys of sealed values belong to a database.
        database = await stack.enter_async_context(call.opened()) if keys_of(None) else None
        opened = await stack.enter_async_context(
            open_archive(where, call.cluster, database=database)
        )
        if id is not None:
            task = await opened.get(id)
            if task is None:
                raise TaskNotFoundError(id)
            changes = await opened.history(id)
            call.show(
                {"task": task, "history": [change._asdict() for change in changes]},
                lambda: render.fields(task),
                "",
                lambda: render.changes(changes, of_one=True),
            )
            return
        page = await opened.list_tasks(filter, after=after, limit=limit)
    call.show(
        {"tasks": page.tasks, "after": page.after},
        lambda: render.tasks(page),
        *([f"the next page: --after {page.after}"] if page.after else ()),
    )


@command(archive)
@selecting
async def restore(
    call: Call,
    where: Where,
    finished_until: FinishedUntil = None,
    everything: Annotated[bool, typer.Option("--all", help="All archived tasks.")] = False,
    *,
    filter: TaskFilter,
) -> None:
    """Bring the archived tasks back that match, with their histories."""
    from openclaw_store.archive import module

    filter = replace(filter, completed_until=finished_until)
    if everything:
        filter = TaskFilter.everything()
    work = module("restore").restore_tasks
    async with call.opened() as database:
        with render.progress("restoring"):
            done = await work(database, where, filter, patience=database.timeout)
    call.show(
        asdict(done),
        f"{render.number(len(done.restored), 'task was', 'restored')}",
        *(f"{id} stays in the archive: {reason}" for id, reason in done.skipped.items()),
    )


@command(archive)
async def verify(call: Call, where: Where) -> None:
    """Compare each file of an archive with its SHA-256; the exit status is 1 after a problem."""
    from openclaw_store.archive import module

    found = await module("check").verify_archive(where)
    call.show(
        {"is_sound": bool(found), **asdict(found)},
        *found.problems,
        *(f"(remark) {remark}" for remark in found.remarks),
        f"{render.number(found.files, 'file')} and {render.size(found.bytes)} were checked; "
        + ("no problem" if found else render.number(len(found.problems), "problem")),
    )
    if not found:
        raise typer.Exit(1)


@command(archive)
async def compact(call: Call, where: Where) -> None:
    """Merge the small files of each day, and drop the copies of restored tasks."""
    from openclaw_store.archive import module

    work = module("compaction").compact_archive
    async with call.opened() as database:
        with render.progress("merging"):
            done = await work(database, where, patience=database.timeout)
    copies = "copy was" if done.voids == 1 else "copies were"
    call.show(
        asdict(done),
        f"{render.number(done.files_before, 'file')} → {done.files_after:,}, "
        f"{render.size(done.bytes_before)} → {render.size(done.bytes_after)}; "
        f"{done.voids:,} void {copies} dropped",
    )
