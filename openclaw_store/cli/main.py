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

_ORDER = (
    *("status", "nodes", "tasks", "failures", "stuck", "stats", "top", "explain", "show", "watch"),
    *("requeue", "cancel", "release", "drain", "resume", "submit"),
    *("work", "metrics", "web"),
    *("verify", "doctor"),
    *("backup", "restore", "copy", "transfer", "resolve", "vacuum", "cleanup", "compact", "retain"),
)
"""Look, act, work, check, maintain: the order of the commands in the help."""

app.registered_commands.sort(key=lambda one: _ORDER.index(str(one.name)))


def main() -> None:
    """Run the command line, and end the process."""
    # Without this, a name with letters that the terminal cannot show would end the program.
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")
    app(prog_name="openclaw-store")
