"""The command that runs a worker: `openclaw-store work module:handle`."""

from __future__ import annotations

import gc
import logging
import socket
import sys
from importlib import import_module
from typing import TYPE_CHECKING, Annotated, Any

import typer

from openclaw_store.cli.commands import app
from openclaw_store.cli.context import Call, command
from openclaw_store.errors import InvalidDataError, logger_of, printable

if TYPE_CHECKING:
    from openclaw_store.worker import Handler


@command(app)
async def work(
    call: Call,
    handler: Annotated[str, typer.Argument(metavar="MODULE:NAME", help="The function to run.")],
    node: Annotated[
        str | None, typer.Option(help="Identifier of the node.", show_default="the host name")
    ] = None,
    slots: Annotated[int, typer.Option(min=1, help="Tasks that run at a time.")] = 1,
    skill: Annotated[
        list[str] | None, typer.Option(help="A skill of the node; may be repeated.")
    ] = None,
    lease: Annotated[
        float, typer.Option(help="Seconds without a heartbeat until it counts as lost.")
    ] = 60,
    grace: Annotated[float, typer.Option(help="Seconds for running tasks after a signal.")] = 30,
    recover_every: Annotated[
        float | None, typer.Option(help="Seconds between two recoveries of lost tasks.")
    ] = None,
) -> None:
    """Run tasks until SIGTERM or Ctrl-C; running tasks then get their grace.

    The function takes the task and its run, and returns the result. It may be a coroutine function;
    a plain function runs in a thread.
    """
    from openclaw_store.domain import NodeInfo
    from openclaw_store.worker import Worker

    host = socket.gethostname()
    info = NodeInfo(node or host, host, available_skills=skill or [], max_concurrent_tasks=slots)
    handle = _import(handler)
    logger = logger_of("worker")
    logger.addHandler(logging.StreamHandler())
    logger.setLevel(logging.INFO)
    async with call.opened() as database:
        worker = Worker(
            database,
            info,
            handle,
            lease_seconds=lease,
            grace_seconds=grace,
            recover_every=recover_every,
        )
        typer.echo(
            printable(f"node {info.node_id} works on {database.db_path}: Ctrl-C stops it"), err=True
        )
        gc.freeze()  # later passes of the garbage collector take less time
        await worker.run()
    typer.echo(printable(f"node {info.node_id} has stopped"), err=True)


def _import(name: str) -> Handler:
    """Return the function `module:name`, also from the present folder.

    Raises:
        InvalidDataError: If there is none, or it takes other arguments than a handler.
    """
    from openclaw_store.worker.run import check_handler

    module, _, attribute = name.partition(":")
    if not module or not attribute:
        raise InvalidDataError("handle", f"must be module:name, as jobs:handle, not {name!r}")
    sys.path.insert(0, "")
    try:
        found: Any = import_module(module)
        for part in attribute.split("."):
            found = getattr(found, part)
    except Exception as error:  # the module may raise anything
        reason = f"{type(error).__name__}: {error}"
        advice = "run this in the folder of the module, or install its package"
        raise InvalidDataError(
            "handle", f"{name!r} cannot be imported ({reason}): {advice}"
        ) from error
    check_handler(found)
    handle: Handler = found
    return handle
