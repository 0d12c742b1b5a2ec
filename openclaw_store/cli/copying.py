"""The command that copies a database: `openclaw-store copy`."""

from __future__ import annotations

from dataclasses import asdict
from typing import Annotated

import typer

from openclaw_store.cli import render
from openclaw_store.cli.commands import app
from openclaw_store.cli.context import Call, command


@command(app)
async def copy(
    call: Call,
    source: Annotated[str, typer.Argument(metavar="FROM", help="A file or a URL.")],
    target: Annotated[str, typer.Argument(metavar="TO", help="A file or a URL, new or empty.")],
    to_cluster: Annotated[
        str | None, typer.Option(metavar="NAME", help="The cluster of the copy.")
    ] = None,
) -> None:
    """Copy the whole state to another database, of either kind.

    Start an interrupted copy again to continue it. --cluster names the cluster that is copied.
    """
    from openclaw_store.database import Database
    from openclaw_store.maintenance.copy import copy

    # No `async with` for the target: it would open, and so migrate, a half of a copy.
    async with Call(source, as_json=False, cluster=call.cluster).opened() as origin:
        destination = Database(target, cluster=to_cluster)
        try:
            with render.progress("copying") as report:
                copied = await copy(origin, destination, report=report)
        finally:
            await destination.close()
    call.show(
        {"source": origin.db_path, "target": destination.db_path, **asdict(copied)},
        f"{render.number(copied.tasks, 'task')}, {render.number(copied.nodes, 'node')} and "
        f"{render.number(copied.changes, 'change')} copied to {destination.db_path}",
        f"checksum {copied.checksum}",
    )
