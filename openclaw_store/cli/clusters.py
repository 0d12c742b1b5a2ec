"""The commands for many clusters of one location: `openclaw-store clusters …`."""

from __future__ import annotations

from collections import Counter
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated, Any

import typer

from openclaw_store.cli import render
from openclaw_store.cli.commands import app
from openclaw_store.cli.context import Call, command
from openclaw_store.errors import printable

if TYPE_CHECKING:
    from openclaw_store.clusters import ClusterInfo, Clusters

clusters = typer.Typer(help="List, create, rename, move and drop clusters.", no_args_is_help=True)
app.add_typer(clusters, name="clusters")

Name = Annotated[str, typer.Argument(metavar="NAME", help="The name of the cluster.")]


def _clusters(call: Call) -> Clusters:
    from openclaw_store.clusters import Clusters
    from openclaw_store.database import migrations

    return Clusters(migrations.location_of(call.location))


async def show_all(call: Call) -> None:
    """Show all clusters of the location, and their sums."""
    found = await _clusters(call).list()
    total: dict[str, Any] = {
        "clusters": len(found),
        "tasks": dict(sum((Counter(one.tasks) for one in found), Counter())),
        "nodes": dict(sum((Counter(one.nodes) for one in found), Counter())),
        "size": sum(one.size for one in found),
    }
    problems = [f"{one.name}: {one.problem}" for one in found if one.problem]
    document = {"clusters": [asdict(one) for one in found], "total": total}
    columns = len(_HEADERS) - (not any(one.node for one in found))  # without Citus
    rows = [row[:columns] for row in _rows(found, total)]
    call.show(document, lambda: render.table(_HEADERS[:columns], rows), *problems)


_HEADERS = (
    *("cluster", "schema", "nodes", "tasks", "size", "newest change (UTC)", "number"),
    "placed on",
)


def _rows(found: list[ClusterInfo], total: dict[str, Any]) -> list[tuple[object, ...]]:
    rows: list[tuple[object, ...]] = [
        (
            one.name or "(public)",
            one.revision,
            _counted(one.nodes),
            _counted(one.tasks),
            render.size(one.size),
            render.when(one.changed_at),
            None if one.cluster_id is None else f"{one.cluster_id:x}",
            one.node,
        )
        for one in found
    ]
    sums = _counted(total["nodes"]), _counted(total["tasks"]), render.size(total["size"])
    return [*rows, (f"{len(found)} in all", "", *sums, "", "", "")]


def _counted(counts: dict[str, int]) -> str:
    return render.counted({"total": sum(counts.values()), **counts})


@command(clusters, "list")
async def list_clusters(call: Call) -> None:
    """List the clusters with their tasks and nodes by status."""
    await show_all(call)


@command(clusters)
async def create(call: Call, name: Name) -> None:
    """Create a cluster."""
    with render.progress("creating"):
        await _clusters(call).create(name)
    call.show({"created": name}, f"cluster {name} was created")


@command(clusters)
async def rename(
    call: Call, name: Name, new_name: Annotated[str, typer.Argument(metavar="NEW")]
) -> None:
    """Rename a cluster; stop its processes first."""
    await _clusters(call).rename(name, new_name)
    call.show({"renamed": name, "name": new_name}, f"cluster {name} is now {new_name}")


@command(clusters)
async def move(
    call: Call,
    name: Name,
    node: Annotated[str, typer.Argument(metavar="HOST:PORT", help="A node of Citus.")],
) -> None:
    """Move a cluster to another node of Citus; its processes continue."""
    with render.progress("moving"):
        await _clusters(call).move(name, node)
    call.show({"moved": name, "node": node}, f"cluster {name} is now on {node}")


@command(clusters)
async def drop(
    call: Call,
    name: Name,
    force: Annotated[bool, typer.Option("--force", help="Though tasks are not finished.")] = False,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")] = False,
) -> None:
    """Drop a cluster with all of its tasks and nodes."""
    if not yes:
        question = printable(f"ALL TASKS AND NODES of cluster {name} will be lost. Continue?")
        typer.confirm(question, abort=True, err=True)
    await _clusters(call).drop(name, force=force)
    call.show({"dropped": name}, f"cluster {name} was dropped")
