"""The commands between clusters: `openclaw-store transfer` and `openclaw-store resolve`."""

from __future__ import annotations

from contextlib import AsyncExitStack
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated

import typer

from openclaw_store.cli import render
from openclaw_store.cli.commands import app
from openclaw_store.cli.context import Call, command
from openclaw_store.cli.options import selecting
from openclaw_store.domain import TaskFilter
from openclaw_store.errors import InvalidDataError

if TYPE_CHECKING:
    from openclaw_store.database import Database


@command(app)
@selecting
async def transfer(
    call: Call,
    source: Annotated[str, typer.Argument(metavar="SOURCE", help="A file or a URL.")],
    target: Annotated[str, typer.Argument(metavar="TARGET", help="A file or a URL.")],
    to_cluster: Annotated[
        str | None, typer.Option(metavar="NAME", help="The cluster of the target.")
    ] = None,
    every: Annotated[bool, typer.Option("--all", help="All pending and finished tasks.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only count the tasks.")] = False,
    *,
    filter: TaskFilter,
) -> None:
    """Move pending and finished tasks to another cluster, with their history, exactly once.

    Start an interrupted transfer again to complete it. --cluster names the cluster of the source.

    openclaw-store transfer ./data/cluster.db postgresql://db.example/store --user anna
    """
    from openclaw_store.clusters import transfer

    if every is (filter != TaskFilter()):
        raise InvalidDataError("filter", "give options that select tasks, or --all; see --help")
    places = (Call(source, as_json=False, cluster=call.cluster), Call(target, False, to_cluster))
    chosen = TaskFilter.everything() if every else filter
    async with places[0].opened() as origin, places[1].opened() as destination:
        with render.progress("transferring") as report:
            done = await transfer(origin, destination, chosen, dry_run=dry_run, report=report)
    refused = {**done.returned, **done.in_transit}
    moved = (
        f"{render.number(done.selected, 'task')} would be moved"
        if dry_run
        else f"{render.number(done.moved, 'task')} moved to {destination.db_path}"
    )
    call.show(
        {"dry_run": dry_run, **asdict(done)},
        moved,
        *([f"{done.stayed} are claimed or running, and stay"] if done.stayed else []),
        *(f"{id} stays: {reason}" for id, reason in done.returned.items()),
        *(f"{id} is in transit: {reason}" for id, reason in done.in_transit.items()),
    )
    if refused:
        raise typer.Exit(1)


@command(app)
async def resolve(
    call: Call,
    locations: Annotated[
        list[str], typer.Argument(metavar="LOCATION", help="Files or URLs of all databases.")
    ],
) -> None:
    """End transactions over several servers that dead processes have left prepared.

    Each location stands for all of its clusters.

    openclaw-store resolve postgresql://one.example/store postgresql://two.example/store
    """
    from openclaw_store.clusters import resolve

    async with AsyncExitStack() as stack:
        databases: list[Database] = []
        for location in locations:
            for name in await _clusters_at(location):
                opened = Call(location, as_json=False, cluster=name).opened()
                databases.append(await stack.enter_async_context(opened))
        done = await resolve(*databases)
    call.show(
        asdict(done),
        f"{done.committed} committed, {done.rolled_back} rolled back, {len(done.left)} left",
        *(f"{name}: {reason}" for name, reason in done.left.items()),
    )
    if not done:
        raise typer.Exit(1)


async def _clusters_at(location: str) -> list[str | None]:
    from openclaw_store.backends import PLACE, PostgreSQL, backend_of
    from openclaw_store.clusters import Clusters

    if PLACE in location or isinstance(backend_of(location), PostgreSQL):
        return [one.name for one in await Clusters(location).list()]
    return [None]
