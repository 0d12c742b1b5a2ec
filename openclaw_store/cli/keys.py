"""The commands for the keys of encryption: `openclaw-store keys new`, `rotate` and others."""

from __future__ import annotations

import base64
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer

from openclaw_store.cli import render
from openclaw_store.cli.commands import app
from openclaw_store.cli.context import Call, Group, command
from openclaw_store.encryption import KEYS_VARIABLE, keys_of
from openclaw_store.errors import InvalidDataError, KeyRingError

keys = typer.Typer(
    cls=Group, help="Make, change and rotate the keys of encryption.", no_args_is_help=True
)
app.add_typer(keys, name="keys")

File = Annotated[Path, typer.Argument(metavar="FILE", help="The file of keys.")]
Wrapped = Annotated[
    str | None,
    typer.Option(
        metavar="BASE64",
        help="The key as a key management service has wrapped it  [default: draw a plain key]",
        show_default=False,
    ),
]
Number = Annotated[int, typer.Argument(metavar="KEY", min=1, help="The number of the key.")]


@command(keys)
async def new(call: Call, file: File, wrapped: Wrapped = None) -> None:
    """Make a file with one new key, which only its owner can read."""
    from openclaw_store.encryption import key_file

    key_file.create(file, _bytes(wrapped))
    _show(call, file, "key 1 was made, and seals")


@command(keys)
async def add(
    call: Call,
    file: File,
    wrapped: Wrapped = None,
    standby: Annotated[
        bool, typer.Option("--standby", help="Let it open, but not seal yet.")
    ] = False,
) -> None:
    """Add a new key to a file; it seals from now on."""
    from openclaw_store.encryption import key_file

    id = key_file.add(file, _bytes(wrapped), is_standby=standby)
    _show(call, file, f"key {id} was added, and {'only opens' if standby else 'seals'}")


@command(keys)
async def use(
    call: Call,
    file: File,
    key: Annotated[str, typer.Argument(metavar="KEY", help="The number of the key, or none.")],
) -> None:
    """Let a key seal from now on, or none."""
    from openclaw_store.encryption import key_file

    if key != "none" and not (key.isascii() and key.isdecimal()):
        raise InvalidDataError("KEY", "must be the number of a key, or none")
    key_file.use(file, None if key == "none" else int(key))
    _show(call, file, "no key seals" if key == "none" else f"key {key} seals")


@command(keys)
async def retire(call: Call, file: File, key: Number) -> None:
    """Let a key only open values from now on."""
    from openclaw_store.encryption import key_file

    key_file.retire(file, key)
    _show(call, file, f"key {key} only opens")


@command(keys)
async def remove(
    call: Call,
    file: File,
    key: Number,
    yes: Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")] = False,
) -> None:
    """Remove a retired key; what it has sealed cannot be read again, backups included.

    It is refused while the database needs the key.
    """
    from openclaw_store.encryption import key_file

    async with call.opened_whole() as database:
        if key in await _listed(database):
            raise KeyRingError(
                f"{database.db_path} needs key {key} still: run `openclaw-store keys rotate`", key
            )
    if not yes:
        typer.confirm(f"Can all backups under key {key} be lost?", abort=True, err=True)
    key_file.remove(file, key)
    _show(call, file, f"key {key} was removed")


def _bytes(wrapped: str | None) -> bytes | None:
    try:
        return None if wrapped is None else base64.b64decode(wrapped, validate=True)
    except ValueError:
        raise InvalidDataError("--wrapped", "must be base64") from None


def _show(call: Call, file: Path, done: str) -> None:
    call.show({"file": str(file), "done": done}, f"{file}: {done}")


async def _listed(database: Any) -> set[int]:
    from sqlalchemy import select

    from openclaw_store.database import SealingKeyRow

    async with database.session() as session:
        return set(await session.scalars(select(SealingKeyRow.id)))


@command(keys)
async def status(call: Call) -> None:
    """Show the keys, and the number of values that each has sealed, by column."""
    from openclaw_store.database.rekeying import key_uses

    async with call.opened_whole() as database:
        ring, uses, listed = database.keys, await key_uses(database), await _listed(database)
        seals = database.statements.protection.seals
    known = [] if ring is None else sorted(ring.keys.values(), key=lambda one: one.id)
    document = {
        "primary": None if ring is None else ring.primary,
        "sealed_fields": sorted(seals),
        "keys": [{"id": one.id, "state": one.state, "listed": one.id in listed} for one in known],
        "values": [use._asdict() for use in uses],
    }
    lines = [
        f"key {one.id}: {'primary' if ring and ring.primary == one.id else one.state.value}"
        f"{'' if one.id in listed else ', not needed by the database'}"
        for one in known
    ] or [f"no keys: set {KEYS_VARIABLE}"]
    rows = [
        (use.table, use.column, "clear" if use.key is None else f"key {use.key}", use.values)
        for use in uses
    ]
    table = ("table", "column", "sealed by", "values")
    call.show(document, *lines, *([lambda: render.table(table, rows)] if rows else []))


@command(keys)
async def rotate(
    call: Call,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Only count the rows.")] = False,
    accept_clear: Annotated[
        bool,
        typer.Option("--accept-clear", help="Seal values in clear that are not expected."),
    ] = False,
    seal: Annotated[
        list[str] | None,
        typer.Option(metavar="FIELD", help="Also seal name, user_id, or none of them from now on."),
    ] = None,
    vacuum: Annotated[
        bool, typer.Option("--vacuum", help="Then remove old values from the file (SQLite).")
    ] = False,
) -> None:
    """Seal all values by the primary key, while the database is in use; may be started again.

    Without a primary key, all values are stored in clear. The exit status is 1 if a value cannot be
    opened.
    """
    fields = None if not seal else set(seal) - {"none"}
    async with call.opened_whole(keys_of(None, fields)) as database:
        with render.progress("sealing") as report:
            done = await database.rekey(accept_clear=accept_clear, dry_run=dry_run, report=report)
        if vacuum and not dry_run:
            with render.progress("rewriting"):
                await database.vacuum()
    verb = "would be sealed again" if dry_run else "sealed again"
    call.show(
        {"is_done": bool(done), "dry_run": dry_run, **asdict(done)},
        *done.problems[:20],
        f"{render.number(done.changed, 'row')} of {done.checked} {verb}",
    )
    if not done:
        raise typer.Exit(1)
