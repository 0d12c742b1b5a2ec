"""The search for text that is not UTF-8, which SQLite stores, and its driver refuses."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from sqlalchemy import ColumnElement, Text, func, select, type_coerce
from sqlalchemy.ext.asyncio import AsyncSession

from openclaw_store.backends.sqlite.connections import reading_text
from openclaw_store.maintenance.findings import MOST
from openclaw_store.maintenance.revisions import BATCH
from openclaw_store.repositories import read_rows


async def undecodable(
    session: AsyncSession,
    place: Any,
    columns: Sequence[ColumnElement[Any]],
    condition: ColumnElement[bool] | None = None,
) -> Sequence[int]:
    """Return the places of rows with such text, as many as are named.

    Args:
        place: The column of their numbers.
        condition: Rows to read; `None` for all.
    """
    content: ColumnElement[Any] = func.coalesce(type_coerce(columns[0], Text), "")
    for one in columns[1:]:
        content = content.concat(func.coalesce(type_coerce(one, Text), ""))
    rows = select(place, content).select_from(columns[0].table)
    if condition is not None:
        rows = rows.where(condition)
    found: list[int] = []
    async with reading_text(session, bytes):
        async for batch in read_rows(session, rows, BATCH):
            found += [place for place, text in batch if not (text.isascii() or _is_utf8(text))]
            if len(found) > MOST:
                break
    return found


def _is_utf8(text: bytes) -> bool:
    try:
        text.decode()
    except UnicodeDecodeError:
        return False
    return True
