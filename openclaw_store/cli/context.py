"""What all commands of the command line have: a database, JSON on demand, errors in one line."""

from __future__ import annotations

import asyncio
import inspect
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any

import typer

from openclaw_store.cli import render
from openclaw_store.errors import StoreError, UnavailableError

if TYPE_CHECKING:
    from rich.console import RenderableType

    from openclaw_store.backends import Backend
    from openclaw_store.database import Database

    Part = Callable[[], RenderableType] | str

Location = Annotated[
    str | None,
    typer.Option(
        "--database",
        "-d",
        metavar="PATH|URL",
        help="The database  [default: $OPENCLAW_STORE_URL, or ./data/cluster.db]",
        show_default=False,
    ),
]
AsJson = Annotated[bool, typer.Option("--json", help="Write JSON.")]


@dataclass(frozen=True)
class Call:
    """What every command is told."""

    location: str | None
    as_json: bool

    @property
    def backend(self) -> Backend:
        """The database that is meant; nothing is opened."""
        from openclaw_store.database import migrations

        return migrations.named_by(self.location)

    def existing(self) -> Backend:
        """The database that is meant, which is not made.

        Raises:
            UnavailableError: If there is no such file.
        """
        backend = self.backend
        if not backend.exists():
            raise UnavailableError(
                f"{backend.location}: there is no such file: give another --database, or make one "
                'with "openclaw-store db upgrade"'
            )
        return backend

    @asynccontextmanager
    async def opened(self) -> AsyncIterator[Database]:
        """The database, which must be there and have the schema of this version."""
        from openclaw_store.database import Database, migrations

        backend = self.existing()
        # First of all, as opening a database turns its WAL on, and it may be somebody else's.
        await asyncio.to_thread(migrations.require, backend)
        database = Database(migrations.location_of(self.location))
        try:
            await database.initialize(migrate=False)
            yield database
        finally:
            await database.close()

    def show(self, document: Any, *parts: Part) -> None:
        """Write a document as JSON, or what people read instead: text, and what makes tables."""
        if self.as_json:
            typer.echo(render.as_json(document))
        else:
            render.show(*(part if isinstance(part, str) else part() for part in parts))


def command(
    group: typer.Typer, name: str | None = None
) -> Callable[[Callable[..., Awaitable[None]]], Callable[..., Awaitable[None]]]:
    """Make a coroutine function a command, which has the options that all of them have.

    It is given a `Call`, and what its own parameters say.
    """

    def register(work: Callable[..., Awaitable[None]]) -> Callable[..., Awaitable[None]]:
        def run(context: typer.Context, **given: Any) -> None:
            everywhere: Call = context.obj
            location, as_json = given.pop("database"), given.pop("json")
            call = Call(location or everywhere.location, as_json or everywhere.as_json)

            async def work_to_the_end() -> None:
                await work(call, **given)

            try:
                asyncio.run(work_to_the_end())
            except StoreError as error:
                typer.echo(f"openclaw-store: {render.one_line(error)}", err=True)
                raise typer.Exit(1) from None

        signature = inspect.signature(work, eval_str=True)
        named = inspect.Parameter.KEYWORD_ONLY
        run.__signature__ = signature.replace(  # type: ignore[attr-defined]  # it is read by typer
            parameters=[
                inspect.Parameter("context", named, annotation=typer.Context),
                *(one.replace(kind=named) for one in [*signature.parameters.values()][1:]),
                inspect.Parameter("database", named, annotation=Location, default=None),
                inspect.Parameter("json", named, annotation=AsJson, default=False),
            ]
        )
        run.__name__, run.__doc__ = work.__name__, work.__doc__
        group.command(name)(run)
        return work

    return register
