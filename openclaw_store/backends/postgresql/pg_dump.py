"""Backups of PostgreSQL by its own program `pg_dump`."""

from __future__ import annotations

import asyncio
import os
import shutil
import subprocess
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

from openclaw_store.backends.base import qualified
from openclaw_store.backends.cancellation import Stop
from openclaw_store.errors import UnavailableError

TABLES = [
    "alembic_version",
    "archive_runs",
    "archive_voids",
    "changes",
    "counters",
    "decisions",
    "incoming",
    "leases",
    "nodes",
    "outgoing",
    "past_changes",
    "sealing_keys",
    "tasks",
]
"""The tables of an archive. It has nothing of other roles, which the role may not read, and which
would be run when it is restored; `pg_dump` cannot select functions, so the library makes its own
again."""


async def environment_of(connection: Any) -> dict[str, str]:
    """Return the variables with which PostgreSQL's programs connect as the driver has done."""
    queries: list[Any] = []
    with connection.query_logger(queries.append):
        await connection.fetchval("SELECT 1")
        await asyncio.sleep(0)  # the loop calls the logger in its next iteration
    address, parameters = queries[0].conn_addr, queries[0].conn_params
    if isinstance(address, str):  # a socket, `/folder/.s.PGSQL.5432`
        folder, _, name = address.rpartition("/")
        address = folder, name.rpartition(".")[2]
    found = {
        "PGHOST": address[0],
        "PGPORT": address[1],
        "PGUSER": parameters.user,
        "PGPASSWORD": parameters.password,
        "PGDATABASE": parameters.database,
        "PGSSLMODE": parameters.sslmode.name.replace("_", "-"),
        "PGKRBSRVNAME": parameters.krbsrvname,
        "PGGSSLIB": parameters.gsslib,
    }
    return {name: str(value) for name, value in found.items() if value}


def dump(
    environment: Mapping[str, str], location: str, schema: str, path: Path, stop: Stop
) -> None:
    """Write a consistent archive of the tables, for pg_restore, until `stop`.

    Args:
        environment: The variables of libpq; no other ones are used.
        location: For messages.
        schema: The schema of the cluster to write alone; with `public`, all schemas are written.

    Raises:
        UnavailableError: If pg_dump is not installed, or fails, or archives other tables.
    """
    # Nothing secret on the command line, which all users of the machine can read.
    run = partial(_run, environment, location, stop)
    tables = [f"--table={qualified(schema, table)}" for table in TABLES]
    run("pg_dump", "--format=custom", *tables, f"--file={path}")
    listed = run("pg_restore", "--list", str(path)).splitlines()
    contents = [line.split()[3:7] for line in listed]
    data = ["TABLE", "DATA", schema]
    if missing := [name for name in TABLES if [*data, name] not in contents]:
        raise UnavailableError(
            f"{location}: the archive of pg_dump lacks {', '.join(missing)}: check which "
            "pg_dump is first in PATH"
        )


def _run(
    environment: Mapping[str, str], location: str, stop: Stop, name: str, *arguments: str
) -> str:
    program = shutil.which(name)
    if program is None:
        raise UnavailableError(
            f"a backup of PostgreSQL needs {name}: install the package of PostgreSQL's "
            "client programs (on Debian, postgresql-client), and see that it is in PATH"
        )
    inherited = {key: value for key, value in os.environ.items() if not key.startswith("PG")}
    with subprocess.Popen(
        [program, *arguments],
        env={**inherited, **environment},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as done:
        stop.add_done_callback(lambda _: done.terminate())
        output, said = done.communicate()
    if done.returncode:
        raise UnavailableError(f"{location}: {name}: {said.strip()}")
    return output
