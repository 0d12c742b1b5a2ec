"""The context of a command: its database, its form of output, and its errors in one line."""

from __future__ import annotations

import asyncio
import inspect
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
from contextlib import asynccontextmanager, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Annotated, Any, TypeVar

import typer
from typer.core import TyperGroup

from openclaw_store.cli import render
from openclaw_store.errors import StoreError, UnavailableError, printable

if TYPE_CHECKING:
    from rich.console import RenderableType

    from openclaw_store.backends import Backend
    from openclaw_store.database import Database
    from openclaw_store.encryption import KeyRing
    from openclaw_store.maintenance.read_around import TolerantDatabase

    Part = Callable[[], RenderableType] | str

AnyDatabase = TypeVar("AnyDatabase", bound="Database")

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
Cluster = Annotated[
    str | None,
    typer.Option(
        "--cluster", metavar="NAME", help="One of many clusters in it.", show_default=False
    ),
]
AsJson = Annotated[bool, typer.Option("--json", help="Write JSON.")]


@dataclass(frozen=True)
class Call:
    """The options common to all commands."""

    location: str | None
    as_json: bool
    cluster: str | None = None

    @property
    def backend(self) -> Backend:
        """The backend of the database; nothing is opened."""
        from openclaw_store.database import migrations

        return migrations.named_by(self.location, self.cluster)

    def existing(self) -> Backend:
        """Return the backend of a database; its file must exist."""
        backend = self.backend
        if not backend.exists():
            raise UnavailableError(
                f"{backend.location}: there is no such file: give another --database, or make one "
                'with "openclaw-store db upgrade"'
            )
        return backend

    @asynccontextmanager
    async def opened(self) -> AsyncIterator[TolerantDatabase]:
        """Open a database that exists and has the schema of this version.

        Rows that cannot be read are left out, and named in a warning.
        """
        from openclaw_store.maintenance.read_around import TolerantDatabase

        async with self._opening(TolerantDatabase) as database:
            yield database

    @asynccontextmanager
    async def opened_whole(self, keys: KeyRing | None = None) -> AsyncIterator[Database]:
        """Open a database as `opened`, but leave no row out.

        Args:
            keys: `None` for the ones of the environment.
        """
        from openclaw_store.database import Database

        async with self._opening(partial(Database, keys=keys)) as database:
            yield database

    @asynccontextmanager
    async def _opening(self, make: Callable[..., AnyDatabase]) -> AsyncIterator[AnyDatabase]:
        from openclaw_store.database import migrations

        backend = self.existing()
        # Before opening, which turns the WAL on: the file may belong to another program.
        await asyncio.to_thread(migrations.require, backend)
        database = make(migrations.location_of(self.location), cluster=self.cluster)
        try:
            await database.initialize(migrate=False)
            yield database
        finally:
            await database.close()

    def show(self, document: Any, *parts: Part) -> None:
        """Write a document as JSON, or its parts as text; callables make tables."""
        if self.as_json:
            typer.echo(render.as_json(document))
        else:
            render.show(*(part if isinstance(part, str) else part() for part in parts))


class Group(TyperGroup):
    """The commands; a message about wrong usage is printable, and shows no location."""

    def make_context(
        self, info_name: str | None, args: list[str], parent: Any = None, **extra: Any
    ) -> Any:
        given = list(args)
        with _hiding(given):
            context = super().make_context(info_name, args, parent, **extra)
            context.meta[__name__] = given
            return context

    def invoke(self, context: Any) -> Any:
        with _hiding(context.meta[__name__]):
            return super().invoke(context)


@contextmanager
def _hiding(given: list[str]) -> Iterator[None]:
    """Remove the arguments that may have a password from the message of an error."""
    try:
        yield
    except typer.TyperException as error:
        error.message = printable(_without_locations(error.message, given), "\n")
        raise


def _without_locations(message: str, given: list[str]) -> str:
    """Remove the arguments that may have a password from a message that quotes them."""
    from openclaw_store.backends import has_secret

    values = {part for one in given for part in (one, one.partition("=")[2])}
    for value in sorted(filter(has_secret, values), key=len, reverse=True):
        for form in (repr(value), value):
            message = message.replace(form, "…")
    return message


def _warn_of_passwords(*given: Any) -> None:
    from openclaw_store.backends import PLACE, backend_of
    from openclaw_store.database import migrations

    locations = [
        backend_of(one, cluster="a" if PLACE in one else None).location
        for one in given
        if isinstance(one, str)
    ]
    if any(":***@" in location for location in locations):
        advice = f"use {migrations.URL_VARIABLE}, {migrations.FILE_VARIABLE} or ~/.pgpass"
        reason = "all users of this machine can read a password on a command line"
        typer.echo(f"openclaw-store: {reason}: {advice}", err=True)


def command(
    group: typer.Typer,
    name: str | None = None,
) -> Callable[[Callable[..., Coroutine[Any, Any, None]]], Callable[..., None]]:
    """Register a coroutine function as a command with the common options.

    Its first argument is the `Call`; the others are its own options. Without a name, it has that
    of the function.
    """

    def register(work: Callable[..., Coroutine[Any, Any, None]]) -> Callable[..., None]:
        def run(context: typer.Context, **given: Any) -> None:
            common: Call = context.obj  # from the options before the name of the command
            location, as_json = given.pop("database"), given.pop("json")
            cluster = given.pop("cluster") or common.cluster
            call = Call(location or common.location, as_json or common.as_json, cluster)
            try:
                names = (given.get("source"), given.get("target"), *given.get("locations", ()))
                _warn_of_passwords(call.location, *names)
                asyncio.run(work(call, **given))
            except StoreError as error:
                message = _without_locations(render.one_line(error), context.meta[__name__])
                typer.echo(f"openclaw-store: {message}", err=True)
                raise typer.Exit(1) from None
            except (TypeError, ValueError) as error:
                # A value that was written by hand, past the checks of the store.
                reason = printable(f"{type(error).__name__}: {error}")
                advice = "`openclaw-store verify` names the row"
                typer.echo(f"openclaw-store: a value cannot be read ({reason}): {advice}", err=True)
                raise typer.Exit(1) from None

        # Typer reads the options from the signature. `eval_str` resolves the annotations in the
        # module of the command, where their names are defined.
        signature = inspect.signature(work, eval_str=True)
        keyword = inspect.Parameter.KEYWORD_ONLY
        run.__signature__ = signature.replace(  # type: ignore[attr-defined]  # typer reads it
            parameters=[
                inspect.Parameter("context", keyword, annotation=typer.Context),
                *(own.replace(kind=keyword) for own in [*signature.parameters.values()][1:]),
                inspect.Parameter("database", keyword, annotation=Location, default=None),
                inspect.Parameter("cluster", keyword, annotation=Cluster, default=None),
                inspect.Parameter("json", keyword, annotation=AsJson, default=False),
            ]
        )
        # Typer fills paragraphs, but not one that begins with this character: the examples.
        run.__name__ = work.__name__
        run.__doc__ = inspect.cleandoc(work.__doc__ or "").replace(
            "\n\nopenclaw-store ", "\n\n\b\nopenclaw-store "
        )
        return group.command(name or work.__name__)(run)

    return register
