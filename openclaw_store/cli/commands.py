"""The commands of `openclaw-store`: inspect a database, check it and maintain it.

Commands that only read neither create nor upgrade a database. Each command imports the parts of
the library that it needs, so `--help` and completion start fast.
"""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from threading import Event
from typing import TYPE_CHECKING, Annotated, Any

import typer

from openclaw_store.cli import render
from openclaw_store.cli.context import AsJson, Call, Cluster, Group, Location, command
from openclaw_store.cli.options import either
from openclaw_store.domain import WAITING, NodeStatus, TaskStatus
from openclaw_store.encryption import keys_of
from openclaw_store.errors import NotFoundError, printable

if TYPE_CHECKING:
    from openclaw_store.cli.context import Part
    from openclaw_store.database import LegacyImport
    from openclaw_store.domain import Change

app = typer.Typer(
    name="openclaw-store",
    cls=Group,
    help="Inspect the state of a cluster, check it and maintain it.",
    epilog="Exit status: 0; 1 after a failure, or if a check found a problem; 2 for wrong usage; "
    "130 after Ctrl-C.",
    no_args_is_help=True,
    rich_markup_mode=None,  # rich doubles the time to start
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
db = typer.Typer(help="Upgrade or inspect the schema of a database.", no_args_is_help=True)
app.add_typer(db, name="db")


def _print_version(wanted: bool) -> None:
    if wanted:
        import openclaw_store

        typer.echo(f"openclaw-store {openclaw_store.__version__}")
        raise typer.Exit


@app.callback()
def _common(
    context: typer.Context,
    database: Location = None,
    cluster: Cluster = None,
    json: AsJson = False,
    version: Annotated[
        bool,
        typer.Option("--version", callback=_print_version, is_eager=True, help="Show the version."),
    ] = False,
) -> None:
    context.obj = Call(database, json, cluster)


@command(app)
async def status(
    call: Call,
    all: Annotated[bool, typer.Option("--all", help="Show all clusters, and their sums.")] = False,
) -> None:
    """Show nodes and tasks by status, the longest wait, and the age of the newest change."""
    if all:
        from openclaw_store.cli.clusters import show_all

        await show_all(call)
        return
    from openclaw_store.maintenance.summary import summarize

    async with call.opened() as database:
        found = await summarize(database)
    call.show(found, lambda: render.summary(found))


@command(app)
async def nodes(
    call: Call,
    status: Annotated[
        NodeStatus | None, typer.Option(metavar="STATUS", help=f"{either(NodeStatus)}.")
    ] = None,
) -> None:
    """List nodes, newest registered first."""
    from openclaw_store.repositories import NodeRepository

    async with call.opened() as database:
        repository = NodeRepository(database)
        found = await (repository.list_by_status(status) if status else repository.get_all_nodes())
        now = database.clock()
    call.show({"nodes": found}, lambda: render.nodes(found, now))


@command(app)
async def show(
    call: Call, id: Annotated[str, typer.Argument(metavar="ID", help="A task or node.")]
) -> None:
    """Show the fields and the history of a task or node, and why a task waits."""
    from openclaw_store.domain import NodeInfo, Task
    from openclaw_store.maintenance.summary import explain_task, read_shown_history
    from openclaw_store.repositories import (
        NodeRepository,
        TaskRepository,
        read_progress,
    )

    async with call.opened() as database:
        task = await TaskRepository(database).get(id)
        node = None if task else await NodeRepository(database).get(id)
        entity = task or node
        changes: Sequence[Change] = []
        for kind in (Task, NodeInfo) if entity is None else (type(entity),):
            changes = changes or await database.read(partial(read_shown_history, id=id, kind=kind))
        why = await explain_task(database, id) if task and task.status in WAITING else None
        known = await database.read(partial(read_progress, ids=[id]))
        progress = known.get(id)
    problem = next((one.text for one in database.left_out if one.id == id), None)
    if entity is None and not changes and problem is None:
        raise NotFoundError(f"no task or node has the id {id!r}")
    document = {
        "task": task,
        "node": node,
        "progress": progress,
        "problem": problem,
        "explanation": why and {**vars(why), "nodes": dict(why.nodes), "text": str(why)},
        "history": [change._asdict() for change in changes],
    }
    parts: list[Part] = [printable(problem or f"{id} was removed")]
    if entity:
        parts = [lambda: render.fields(entity)]
    if why:
        parts += ["", str(why)]
    if progress:
        parts += ["", f"progress: {progress}, reported {render.when(progress.reported_at)}"]
    if changes:
        parts += ["", lambda: render.changes(changes, of_one=True)]
    call.show(document, *parts)


@command(app)
async def watch(
    call: Call,
    since: Annotated[int | None, typer.Option(min=0, help="Begin after this revision.")] = None,
    count: Annotated[
        int | None, typer.Option("--count", "-n", min=1, help="End after this number of changes.")
    ] = None,
) -> None:
    """Follow the changes of the cluster until Ctrl-C.

    A terminal shows a live view of the cluster, other outputs one line for each change.
    """
    from openclaw_store.maintenance import summary

    async with call.opened() as database:
        batches = summary.watch(database, since, count)
        if call.as_json or not sys.stdout.isatty():
            async for batch in batches:
                for change in batch:
                    document = render.as_json(change._asdict(), compact=True)
                    typer.echo(document if call.as_json else printable(str(change)))
        else:
            from openclaw_store.cli import live_view

            await live_view.view(database, batches)


@command(db)
async def upgrade(
    call: Call,
    legacy_timezone: Annotated[
        str | None,
        typer.Option(
            metavar="ZONE",
            help="Time zone of a legacy database  [default: that of this machine]",
            show_default=False,
        ),
    ] = None,
) -> None:
    """Upgrade the schema, or create the database.

    A legacy database is imported, and a copy of it is kept.
    """
    from openclaw_store.database import legacy_import, migrations

    if (keys := keys_of(None)) is not None:
        await keys.unlock()
    # The zone is checked before anything is changed.
    zone, backend, before = legacy_import.zone_of(legacy_timezone), call.backend, None
    if backend.exists():
        before = await asyncio.to_thread(migrations.revision_of, backend)
    with render.progress("upgrading"):
        await asyncio.to_thread(backend.prepare, partial(migrations.accept, backend))
        imported = await asyncio.to_thread(migrations.upgrade, backend, zone, keys=keys)
    _show_step(call, before, migrations.HEAD, imported)


@command(db)
async def downgrade(
    call: Call,
    revision: Annotated[
        str, typer.Argument(metavar="REVISION", help="The older schema; base for none.")
    ],
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")] = False,
) -> None:
    """Downgrade the schema; data that only the newer schema can hold is lost."""
    from openclaw_store.database import migrations

    backend = call.existing()
    before = await asyncio.to_thread(migrations.revision_of, backend)
    if not yes:
        lost = "ALL TASKS AND NODES" if revision == "base" else "Data that only this schema holds"
        question = printable(f"{lost} of {backend.location} will be lost. Continue?")
        typer.confirm(question, abort=True, err=True)
    with render.progress("downgrading"):
        await asyncio.to_thread(migrations.downgrade, backend, revision)
    _show_step(call, before, await asyncio.to_thread(migrations.revision_of, backend))


def _show_step(
    call: Call, before: str | None, after: str | None, imported: LegacyImport | None = None
) -> None:
    location = call.backend.location
    document: dict[str, Any] = {"database": location, "before": before, "after": after}
    lines = [f"{location}: schema {before or 'none'} → {after or 'none'}"]
    if before == after:
        lines = [f"{location}: schema {after}, unchanged"]
    if imported is not None:
        rejected, copy = len(imported.rejected), str(imported.copy)
        document["adopted"] = {**imported._asdict(), "rejected": rejected, "copy": copy}
        lines += [
            f"imported {imported.nodes} nodes and {imported.tasks} tasks; {rejected} rows are in "
            "legacy_rejected",
            f"a copy of the legacy file is in {copy}",
        ]
    call.show(document, *lines)


@command(db)
async def current(call: Call) -> None:
    """Show the schema of a database and the schema that this version needs."""
    from openclaw_store.database import migrations

    backend = call.existing()
    revision = await asyncio.to_thread(migrations.revision_of, backend)
    call.show(
        {"database": backend.location, "revision": revision, "needed": migrations.HEAD},
        f"{backend.location}: schema {revision or 'none'}, {migrations.HEAD} is needed",
    )


@command(db)
async def check(call: Call) -> None:
    """Check that a database has the schema of this version, and unchanged tables."""
    from openclaw_store.database import migrations

    backend = call.existing()
    await asyncio.to_thread(migrations.check, backend)
    call.show(
        {"database": backend.location, "revision": migrations.HEAD},
        f"{backend.location}: schema {migrations.HEAD}, complete",
    )


@command(app)
async def backup(
    call: Call,
    path: Annotated[Path, typer.Argument(metavar="PATH", help="The file to write.")],
    overwrite: Annotated[bool, typer.Option(help="Replace an existing file.")] = False,
) -> None:
    """Write a snapshot of a database to a file, while the database is in use."""
    async with call.opened() as database:
        with render.progress("copying"):
            await database.backup(path, overwrite=overwrite)
    size = path.stat().st_size
    call.show({"path": str(path.absolute()), "size": size}, f"{path}: {render.size(size)} written")


@command(app)
async def restore(
    call: Call, path: Annotated[Path, typer.Argument(metavar="PATH", help="The backup.")]
) -> None:
    """Replace the database with a backup.

    The backup is checked first. The database must not be in use; it is kept under another name.
    For PostgreSQL, the message contains the command to run instead.
    """
    from openclaw_store.maintenance.restore import restore

    backend = call.backend
    with render.progress("copying") as report:
        kept = await _until_stopped(partial(restore, backend, path, report))
    call.show(
        {"database": backend.location, "source": str(path.absolute()), "kept": kept and str(kept)},
        f"{backend.location} was replaced with {path}",
        *([f"the replaced database is in {kept}"] if kept else []),
    )


async def _until_stopped(work: Callable[[Callable[[], bool]], Path | None]) -> Path | None:
    """Run `work` on a thread; its argument reports whether Ctrl-C was pressed."""
    # Cancelling the task would abandon the thread, which may be replacing the database.
    stopped = Event()
    done = asyncio.ensure_future(asyncio.to_thread(work, stopped.is_set))
    try:
        return await asyncio.shield(done)
    except asyncio.CancelledError:
        stopped.set()
        await asyncio.wait([done])
        if done.exception() is None:
            return done.result()  # Ctrl-C came too late
        raise


@command(app)
async def vacuum(call: Call) -> None:
    """Free the disk space of removed tasks."""
    async with call.opened() as database:
        before = (await database.get_stats())["db_size"]
        with render.progress("rewriting"):
            await database.vacuum()
        after = (await database.get_stats())["db_size"]
    call.show(
        {"size_before": before, "size_after": after},
        f"{database.db_path}: {render.size(before)} → {render.size(after)}",
    )


@command(app)
async def cleanup(
    call: Call,
    days: Annotated[float, typer.Option(min=0, help="Minimum age of their end, in days.")],
    keep: Annotated[
        list[TaskStatus] | None,
        typer.Option(metavar="STATUS", help="Keep this status; may be repeated."),
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only count the tasks.")] = False,
) -> None:
    """Remove old finished tasks and their history."""
    from openclaw_store.repositories import TaskRepository

    async with call.opened() as database:
        repository = TaskRepository(database)
        if dry_run:
            count = await repository.count_old_tasks(days, keep)
        else:
            with render.progress("removing"):
                count = await repository.cleanup_old_tasks(days, keep)
    call.show(
        {"tasks": count, "dry_run": dry_run},
        f"{render.number(count, 'task')} {'would be removed' if dry_run else 'removed'}",
    )


@command(app)
async def compact(
    call: Call,
    days: Annotated[float, typer.Option(min=0, help="Minimum age of the changes, in days.")],
) -> None:
    """Remove old changes from the change log; tasks and nodes stay.

    Histories become shorter, and a program that watches from an older revision must start again.
    """
    from openclaw_store.repositories import compact_feed

    async with call.opened() as database:
        with render.progress("removing"):
            count = await compact_feed(database, days)
    call.show({"changes": count}, f"{render.number(count, 'change')} removed")
