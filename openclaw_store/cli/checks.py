"""The commands that check a database in any state: `verify` and `doctor`."""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated

import typer

from openclaw_store.cli import render
from openclaw_store.cli.commands import app
from openclaw_store.cli.context import Call, command

if TYPE_CHECKING:
    from openclaw_store.database import Database


@asynccontextmanager
async def _closed(call: Call) -> AsyncIterator[Database]:
    """Give a database that is never opened, as that refuses other schemas."""
    from openclaw_store.database import Database, migrations

    call.existing()
    database = Database(migrations.location_of(call.location), cluster=call.cluster)
    try:
        yield database
    finally:
        await database.close()


@command(app)
async def verify(
    call: Call,
    repair: Annotated[bool, typer.Option("--repair", help="Repair without data loss.")] = False,
) -> None:
    """Check the schema and the invariants of the state, while the database is in use.

    The exit status is 1 if a problem is left.
    """
    from openclaw_store.maintenance.verify import verify, verify_schema

    async with _closed(call) as database:
        found = await verify_schema(database, repair=repair)
    if found.is_complete:
        repaired = [problem for problem in found.problems if problem.is_repaired]
        async with call.opened() as database:
            with render.progress("reading") as report:
                found = await verify(database, repair=repair, report=report)
        found.problems[:0] = repaired
    call.show(
        {"is_sound": bool(found), **asdict(found)},
        *([lambda: render.problems(found.problems)] if found.problems else []),
        *(f"(remark) {remark.text}" for remark in found.remarks),
        render.verdict(found, was_repaired=repair),
    )
    if not found:
        raise typer.Exit(1)


@command(app)
async def doctor(call: Call) -> None:
    """Check the environment of the database.

    The database may be in any state, and is not changed. The exit status is 1 after an error.
    """
    from openclaw_store.maintenance.doctor import Level, diagnose

    async with _closed(call) as database:
        findings = await diagnose(database)
    is_well = all(finding.level is not Level.ERROR for finding in findings)
    call.show({"is_well": is_well, "findings": findings}, lambda: render.findings(findings))
    if not is_well:
        raise typer.Exit(1)
