"""The command that serves the page: `openclaw-store web`."""

from __future__ import annotations

import gc
import ipaddress
import os
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated

import typer

from openclaw_store.cli.commands import app
from openclaw_store.cli.context import Call, command
from openclaw_store.errors import InvalidDataError, UnavailableError, printable

_PACKAGES = ("starlette", "jinja2", "uvicorn")
_LOOPBACK_NAMES = ("127.0.0.1", "localhost", "[::1]")


@command(app)
async def web(
    call: Call,
    host: Annotated[str, typer.Option(help="The address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="The port.")] = 18790,
    token_file: Annotated[
        Path | None,
        typer.Option(help="A file with a secret that every caller must know.", show_default=False),
    ] = None,
    allow_actions: Annotated[
        bool, typer.Option("--allow-actions", help="Let callers change tasks and nodes.")
    ] = False,
    prefix: Annotated[
        str | None, typer.Option(help="The path below which a proxy shows the page.")
    ] = None,
) -> None:
    """Serve a page with the state of the cluster until Ctrl-C.

    Other machines can read the page only with --host, and nobody can change anything without
    --allow-actions; both need --token-file.
    """
    if not all(map(find_spec, _PACKAGES)):
        raise UnavailableError('the page needs more packages: pip install "openclaw-store[web]"')
    from openclaw_store.state_manager import StateManager
    from openclaw_store.web import app as page_of
    from openclaw_store.web.server import Server

    token = None if token_file is None else _read_token(token_file)
    is_local = _is_loopback(host)
    if token is None and not is_local:
        raise InvalidDataError("host", "other machines may read the page only with --token-file")
    if token is None and allow_actions:
        raise InvalidDataError("allow-actions", "actions are allowed only with --token-file")
    async with call.opened() as database, StateManager(database, cache=False) as state:
        page = page_of(
            state,
            token=token,
            allow_actions=allow_actions,
            hosts=_LOOPBACK_NAMES if token is None else None,
            clusters=partial(list_clusters, call.location) if call.cluster else None,
        )
        path = (prefix or "").rstrip("/")
        server = Server(page, host, port, path)
        text = f"http://{host}:{port}{path}/ shows {database.db_path}: Ctrl-C stops it"
        typer.echo(printable(text), err=True)
        gc.freeze()  # later passes of the garbage collector take less time
        await server.serve()


async def list_clusters(location: str | None) -> list[dict[str, str]]:
    """Return the rows of the page that lists all clusters of a location."""
    from openclaw_store.clusters import Clusters
    from openclaw_store.database import migrations

    found = await Clusters(migrations.location_of(location)).list()
    return [
        {
            "Cluster": one.name or "(public)",
            "Nodes": f"{sum(one.nodes.values()):,}",
            "Tasks": f"{sum(one.tasks.values()):,}",
            "Schema": one.revision or "",
            "Problem": one.problem or "",
        }
        for one in found
    ]


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _read_token(path: Path) -> str:
    """Return the secret in a file that only its owner can read.

    Raises:
        InvalidDataError: If the file cannot be read, or others can read it.
    """
    try:
        mode, text = path.stat().st_mode, path.read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise InvalidDataError("token-file", f"{path} cannot be read: {error}") from error
    if os.name != "nt" and mode & 0o077:
        raise InvalidDataError("token-file", f"others can read {path}: run chmod 600 on it")
    return text
