"""Backups of PostgreSQL by its own program `pg_dump`."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

from sqlalchemy import URL

from openclaw_store.backends.cancellation import Stop
from openclaw_store.errors import UnavailableError

_LIBPQ = {
    "host": "PGHOST",
    "port": "PGPORT",
    "user": "PGUSER",
    "password": "PGPASSWORD",
    "database": "PGDATABASE",
    "ssl": "PGSSLMODE",
    "passfile": "PGPASSFILE",
    "service": "PGSERVICE",
    "servicefile": "PGSERVICEFILE",
    "krbsrvname": "PGKRBSRVNAME",
    "target_session_attrs": "PGTARGETSESSIONATTRS",
}
"""The driver's options, and the environment variables of PostgreSQL's programs for them."""


def dump(url: URL, path: Path, stop: Stop) -> None:
    """Write a consistent archive of the database, for pg_restore, until `stop`.

    Raises:
        UnavailableError: If pg_dump is not installed, or fails.
    """
    program = shutil.which("pg_dump")
    if program is None:
        raise UnavailableError(
            "a backup of PostgreSQL needs pg_dump: install the package of PostgreSQL's "
            "client programs (on Debian, postgresql-client), and see that it is in PATH"
        )
    command = [program, "--format=custom", f"--file={path}"]
    # Nothing secret on the command line, which all users of the machine can read.
    environment = {**os.environ, **_environment(url)}
    with subprocess.Popen(command, env=environment, stderr=subprocess.PIPE, text=True) as done:
        stop.add_done_callback(lambda _: done.terminate())
        _, said = done.communicate()
    if done.returncode:
        location = url.render_as_string(hide_password=True)
        raise UnavailableError(f"{location}: pg_dump: {said.strip()}")


def _environment(url: URL) -> dict[str, str]:
    """Return the environment in which PostgreSQL's programs connect as the driver does."""
    _, arguments = url.get_dialect()().create_connect_args(url)
    environment = {"PGSSLNEGOTIATION": "direct"} if arguments.get("direct_tls") else {}
    for name, value in arguments.items():
        if name in _LIBPQ:
            values = value if isinstance(value, list) else [value]
            environment[_LIBPQ[name]] = ",".join(map(str, values))
    return environment
