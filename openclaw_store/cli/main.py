"""The program `openclaw-store`: all commands, and the run of one."""

from __future__ import annotations

import sys

from openclaw_store.cli import (  # noqa: F401 - they add commands
    actions,
    archive,
    checks,
    clusters,
    copying,
    keys,
    lists,
    metrics,
    transfers,
    web,
    work,
)
from openclaw_store.cli.commands import app

__all__ = ["app", "main"]


def main() -> None:
    """Run the command line, and end the process."""
    # Without this, a name with letters that the terminal cannot show would end the program.
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")
    app(prog_name="openclaw-store")
