"""Asking a database past the library."""

from __future__ import annotations

import asyncio
import sqlite3
from contextlib import closing
from importlib import import_module
from pathlib import Path
from typing import Any

from campaigns.campaign import Location


def ask(location: Location, query: str) -> list[tuple[Any, ...]]:
    """The rows of a query. Not to be called on a running event loop."""
    if isinstance(location, Path):
        with closing(sqlite3.connect(location)) as connection:
            return connection.execute(query).fetchall()
    return asyncio.run(_ask_server(location, query))


async def _ask_server(url: str, query: str) -> list[tuple[Any, ...]]:
    connection = await import_module("asyncpg").connect(url.replace("+asyncpg", ""))
    try:
        return [tuple(row) for row in await connection.fetch(query)]
    finally:
        await connection.close()
