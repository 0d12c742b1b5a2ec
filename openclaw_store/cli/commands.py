"""The command line: `openclaw-store`, or `python -m openclaw_store`.

It looks at a database, checks it and looks after it. Commands that only look change nothing: they
neither make a database nor upgrade one.

The library is imported by the commands, when they are run: `--help` and completion need not wait.
"""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Callable
from dataclasses import asdict
from datetime import datetime
from enum import StrEnum
from functools import partial
from pathlib import Path
from threading import Event
from typing import TYPE_CHECKING, Annotated, Any

import typer

from openclaw_store.cli import render
from openclaw_store.cli.context import AsJson, Call, Location, command
from openclaw_store.domain import WAITING, NodeStatus, TaskStatus, TaskType
from openclaw_store.errors import NotFoundError

if TYPE_CHECKING:
    from openclaw_store.cli.context import Part
    from openclaw_store.database import LegacyImport

app = typer.Typer(
    name="openclaw-store",
    help="Look at the state of a cluster, check it and look after it.",
    epilog="Exit status: 0; 1 if something could not be done, or is not as it should be; 2 for "
    "wrong usage; 130 after Ctrl-C.",
    no_args_is_help=True,
    rich_markup_mode=None,  # plain text starts in half the time
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
db = typer.Typer(help="Upgrade the schema of a database, or look at it.", no_args_is_help=True)
app.add_typer(db, name="db")


def _either(kind: type[StrEnum]) -> str:
    *others, last = (member.value for member in kind)
    return f"{', '.join(others)} or {last}"


def _print_version(wanted: bool) -> None:
    if wanted:
        import openclaw_store

        typer.echo(f"openclaw-store {openclaw_store.__version__}")
        raise typer.Exit


@app.callback()
def _common(
    context: typer.Context,
    database: Location = None,
    json: AsJson = False,
    version: Annotated[
        bool,
        typer.Option("--version", callback=_print_version, is_eager=True, help="Show the version."),
    ] = False,
) -> None:
    context.obj = Call(database, json)


@command(app)
async def status(call: Call) -> None:
    """Nodes and tasks by status, what waits longest, how fresh it is."""
    from openclaw_store.maintenance.summary import summarize

    async with call.opened() as database:
        found = await summarize(database)
    call.show(found, lambda: render.summary(found))


@command(app)
async def nodes(
    call: Call,
    status: Annotated[
        NodeStatus | None, typer.Option(metavar="STATUS", help=f"{_either(NodeStatus)}.")
    ] = None,
) -> None:
    """The nodes, newest registered first."""
    from openclaw_store.repositories import NodeRepository

    async with call.opened() as database:
        repository = NodeRepository(database)
        found = await (repository.list_by_status(status) if status else repository.get_all_nodes())
        now = database.clock()
    call.show({"nodes": found}, lambda: render.nodes(found, now))


def _moment(text: str | datetime) -> datetime:
    try:
        return text if isinstance(text, datetime) else datetime.fromisoformat(text)
    except ValueError:
        raise typer.BadParameter(f"{text!r} is no time: write 2026-11-25T09:30+01:00") from None


def _time_option(help: str) -> Any:
    return typer.Option(parser=_moment, metavar="TIME", help=help, show_default=False)


@command(app)
async def tasks(
    call: Call,
    status: Annotated[
        list[TaskStatus] | None,
        typer.Option(metavar="STATUS", help=f"{_either(TaskStatus)}; may be repeated."),
    ] = None,
    type: Annotated[
        list[TaskType] | None,
        typer.Option(metavar="TYPE", help=f"{_either(TaskType)}; may be repeated."),
    ] = None,
    node: Annotated[str | None, typer.Option(help="Assigned to this node.")] = None,
    user: Annotated[str | None, typer.Option(help="Of this user.")] = None,
    skill: Annotated[str | None, typer.Option(help="That require this skill.")] = None,
    name: Annotated[str | None, typer.Option(help="Whose names contain this text.")] = None,
    submitted_from: Annotated[
        datetime | None, _time_option("Submitted at this time or later, as 2026-11-25T09:30.")
    ] = None,
    submitted_until: Annotated[datetime | None, _time_option("Submitted before.")] = None,
    completed_from: Annotated[datetime | None, _time_option("Finished then, or later.")] = None,
    completed_until: Annotated[datetime | None, _time_option("Finished before.")] = None,
    limit: Annotated[int, typer.Option(min=1, max=10_000, help="How many at most.")] = 20,
    after: Annotated[
        str | None, typer.Option(metavar="CURSOR", help="Go on behind the page that gave this.")
    ] = None,
) -> None:
    """Tasks, newest submitted first, a page at a time.

    Times without a zone are local ones.
    """
    from openclaw_store.domain import TaskFilter
    from openclaw_store.repositories import TaskRepository

    filter = TaskFilter(
        status=status or None,
        task_type=type or None,
        node=node,
        user=user,
        skill=skill,
        name_contains=name,
        submitted_from=submitted_from,
        submitted_until=submitted_until,
        completed_from=completed_from,
        completed_until=completed_until,
    )
    async with call.opened() as database:
        page = await TaskRepository(database).list_tasks(filter, after=after, limit=limit)
    call.show(
        {"tasks": page.tasks, "after": page.after},
        lambda: render.tasks(page),
        *([f"the next page: --after {page.after}"] if page.after else []),
    )


@command(app)
async def show(call: Call, id: Annotated[str, typer.Argument(help="Of a task or a node.")]) -> None:
    """A task or a node: its fields, why it waits, and its history."""
    from openclaw_store.domain import NodeInfo, Task
    from openclaw_store.maintenance.summary import explain_task, history
    from openclaw_store.repositories import NodeRepository, TaskRepository

    async with call.opened() as database:
        task = await TaskRepository(database).get(id)
        node = None if task else await NodeRepository(database).get(id)
        changes = await history(database, NodeInfo if node else Task, id)
        if task is None and not changes:
            changes = await history(database, NodeInfo, id)  # of one that was removed
        why = await explain_task(database, id) if task and task.status in WAITING else None
    item = task or node
    if item is None and not changes:
        raise NotFoundError(f"no task or node has the id {id!r}")
    document = {
        "task": task,
        "node": node,
        "explanation": why and {**vars(why), "nodes": dict(why.nodes), "text": str(why)},
        "history": [change._asdict() for change in changes],
    }
    parts: list[Part] = [lambda: render.fields(item)] if item else [f"{id} was removed"]
    if why:
        parts.append(f"\n{why}")
    if changes:
        parts += ["", lambda: render.changes(changes, of_one=True)]
    call.show(document, *parts)


@command(app)
async def watch(
    call: Call,
    since: Annotated[
        int | None, typer.Option(min=0, help="Begin behind this revision, not now.")
    ] = None,
    count: Annotated[
        int | None, typer.Option("--count", "-n", min=1, help="End after so many changes.")
    ] = None,
) -> None:
    """What changes, as it happens.

    On a terminal it is a picture of the cluster, elsewhere a line for each change. Ctrl-C ends it.
    """
    from openclaw_store.maintenance import summary

    async with call.opened() as database:
        batches = summary.watch(database, since, count)
        if call.as_json or not sys.stdout.isatty():
            async for batch in batches:
                for change in batch:
                    document = render.as_json(change._asdict(), compact=True)
                    typer.echo(document if call.as_json else render.line(change))
        else:
            from openclaw_store.cli import live_view

            await live_view.view(database, batches)


@command(app)
async def verify(
    call: Call,
    repair: Annotated[
        bool, typer.Option("--repair", help="Put right what can be without losing anything.")
    ] = False,
) -> None:
    """Look whether the state is what its own rules say.

    It reads everything, while the database is in use. The exit status is 1 if a problem is left.
    """
    from openclaw_store.maintenance.verify import verify

    async with call.opened() as database:
        with render.progress("reading") as report:
            found = await verify(database, repair=repair, report=report)
    call.show(
        {"is_sound": bool(found), **asdict(found)},
        *([lambda: render.problems(found.problems)] if found.problems else []),
        *(f"(remark) {remark.text}" for remark in found.remarks),
        render.verdict(found),
    )
    if not found:
        raise typer.Exit(1)


@command(app)
async def doctor(call: Call) -> None:
    """Look whether the store can keep its promises where it is.

    The database may be in any state, and stays as it is. The exit status is 1 after an error.
    """
    from openclaw_store.database import Database, migrations
    from openclaw_store.maintenance.doctor import Level, diagnose

    call.existing()
    database = Database(migrations.location_of(call.location))
    findings = await diagnose(database)
    await database.close()
    is_well = all(finding.level is not Level.ERROR for finding in findings)
    call.show({"is_well": is_well, "findings": findings}, lambda: render.findings(findings))
    if not is_well:
        raise typer.Exit(1)


@command(db)
async def upgrade(
    call: Call,
    legacy_timezone: Annotated[
        str | None,
        typer.Option(
            metavar="ZONE",
            help="Of the times of an original hand-made database, as Asia/Shanghai  "
            "[default: that of this machine]",
            show_default=False,
        ),
    ] = None,
) -> None:
    """Bring the schema up to date; makes the database if there is none.

    An original hand-made database is adopted, and a copy of it kept.
    """
    from openclaw_store.database import legacy_import, migrations

    zone, backend, before = legacy_import.zone_of(legacy_timezone), call.backend, None
    if backend.exists():
        before = await asyncio.to_thread(migrations.revision_of, backend)
    with render.progress("upgrading"):
        await asyncio.to_thread(backend.prepare)
        adopted = await asyncio.to_thread(migrations.upgrade, backend, zone)
    _show_step(call, before, migrations.HEAD, adopted)


@command(db)
async def downgrade(
    call: Call,
    revision: Annotated[str, typer.Argument(help="The schema to go back to; base for none.")],
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")] = False,
) -> None:
    """Take the schema back to an older one; what only the newer one can hold is lost."""
    from openclaw_store.database import migrations

    backend = call.existing()
    before = await asyncio.to_thread(migrations.revision_of, backend)
    if not yes:
        what = "ALL TASKS AND NODES" if revision == "base" else "What only its schema can hold"
        typer.confirm(f"{what} of {backend.location} will be lost. Go on?", abort=True, err=True)
    with render.progress("downgrading"):
        await asyncio.to_thread(migrations.downgrade, backend, revision)
    _show_step(call, before, await asyncio.to_thread(migrations.revision_of, backend))


def _show_step(
    call: Call, before: str | None, after: str | None, adopted: LegacyImport | None = None
) -> None:
    location = call.backend.location
    document: dict[str, Any] = {"database": location, "before": before, "after": after}
    text = f"{location}: schema {before or 'none'} → {after or 'none'}"
    if before == after:
        text = f"{location}: schema {after}, as it was"
    if adopted is not None:
        rejected, copy = len(adopted.rejected), str(adopted.copy)
        document["adopted"] = {**adopted._asdict(), "rejected": rejected, "copy": copy}
        text += (
            f"\nadopted {adopted.nodes} nodes and {adopted.tasks} tasks; {rejected} rows are in "
            f"legacy_rejected\nthe file as it was: {copy}"
        )
    call.show(document, text)


@command(db)
async def current(call: Call) -> None:
    """Which schema a database has, and which one is needed."""
    from openclaw_store.database import migrations

    backend = call.existing()
    revision = await asyncio.to_thread(migrations.revision_of, backend)
    call.show(
        {"database": backend.location, "revision": revision, "needed": migrations.HEAD},
        f"{backend.location}: schema {revision or 'none'}, {migrations.HEAD} is needed",
    )


@command(db)
async def check(call: Call) -> None:
    """Whether a database has the schema of this version, and nobody has changed its tables."""
    from openclaw_store.database import migrations

    backend = call.existing()
    await asyncio.to_thread(migrations.check, backend)
    call.show(
        {"database": backend.location, "revision": migrations.HEAD},
        f"{backend.location}: schema {migrations.HEAD}, as it should be",
    )


@command(app)
async def backup(
    call: Call,
    path: Annotated[Path, typer.Argument(help="The file to write.")],
    overwrite: Annotated[bool, typer.Option(help="Replace it if it exists.")] = False,
) -> None:
    """Copy a database as it is at one moment, while it is in use."""
    async with call.opened() as database:
        with render.progress("copying"):
            await database.backup(path, overwrite=overwrite)
    count = path.stat().st_size
    call.show(
        {"path": str(path.absolute()), "size": count}, f"{path}: {render.size(count)} written"
    )


@command(app)
async def restore(call: Call, path: Annotated[Path, typer.Argument(help="The backup.")]) -> None:
    """Have a backup take the place of the database.

    The backup is checked first; the database must not be in use, and is kept under another name.
    Of PostgreSQL it says what to run instead.
    """
    from openclaw_store.maintenance.restore import restore

    backend = call.backend
    with render.progress("copying") as report:
        kept = await _until_stopped(partial(restore, backend, path, report))
    call.show(
        {"database": backend.location, "source": str(path.absolute()), "kept": kept and str(kept)},
        f"{backend.location} is the copy in {path} now",
        *([f"what was there before is in {kept}"] if kept else []),
    )


async def _until_stopped(work: Callable[[Callable[[], bool]], Path | None]) -> Path | None:
    """Do `work` on a thread, and have it told when Ctrl-C is pressed."""
    stopped = Event()
    done = asyncio.ensure_future(asyncio.to_thread(work, stopped.is_set))
    try:
        return await asyncio.shield(done)
    except asyncio.CancelledError:
        stopped.set()
        await asyncio.wait([done])
        if done.exception() is None:
            return done.result()  # it was too late
        raise


@command(app)
async def copy(
    call: Call,
    source: Annotated[str, typer.Argument(metavar="FROM", help="A file or a URL.")],
    target: Annotated[
        str, typer.Argument(metavar="TO", help="A file or a URL; there must be nothing in it yet.")
    ],
) -> None:
    """Copy the whole state to another database, of either kind.

    A copy that was interrupted goes on when it is started again.
    """
    from openclaw_store.database import Database
    from openclaw_store.maintenance.copy import copy

    async with Call(source, as_json=False).opened() as origin:
        copied_to = Database(target)
        try:
            with render.progress("copying") as report:
                copied = await copy(origin, copied_to, report=report)
        finally:
            await copied_to.close()
    call.show(
        {"source": origin.db_path, "target": copied_to.db_path, **asdict(copied)},
        f"{render.number(copied.tasks, 'task')}, {render.number(copied.nodes, 'node')} and "
        f"{render.number(copied.changes, 'change')} are in {copied_to.db_path} now",
        f"checksum {copied.checksum}",
    )


@command(app)
async def vacuum(call: Call) -> None:
    """Give the space of removed tasks back."""
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
    days: Annotated[float, typer.Option(min=0, help="How long ago they must have finished.")],
    keep: Annotated[
        list[TaskStatus] | None,
        typer.Option(metavar="STATUS", help="Do not remove those; may be repeated."),
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only count them.")] = False,
) -> None:
    """Remove tasks that finished long ago, and their history."""
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
    days: Annotated[float, typer.Option(min=0, help="How long ago they must have happened.")],
) -> None:
    """Forget changes that happened long ago; tasks and nodes stay as they are.

    A program that watches from an older revision must begin anew; histories reach no further back.
    """
    from openclaw_store.repositories import compact_feed

    async with call.opened() as database:
        with render.progress("removing"):
            count = await compact_feed(database, days)
    call.show({"changes": count}, f"{render.number(count, 'change')} removed")


def main() -> None:
    """Run what the command line asks for, and end the process."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):  # names are in any language, terminals are not
            stream.reconfigure(errors="backslashreplace")
    app(prog_name="openclaw-store")
