"""The search for text that is not UTF-8, which SQLite stores, and its driver refuses."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from typing import Any

from sqlalchemy import ColumnElement, Text, func, select, type_coerce
from sqlalchemy.ext.asyncio import AsyncSession

from openclaw_store.backends import unreadable_value
from openclaw_store.repositories import read_rows

_PAGE = 250
"""Rows that are read together; the rows of a page that fails are read one by one."""


async def undecodable(
    session: AsyncSession,
    place: Any,
    columns: Sequence[ColumnElement[Any]],
    condition: ColumnElement[bool] | None = None,
) -> AsyncIterator[int]:
    """Yield the places of rows with such text.

    Args:
        place: The column of their numbers.
        condition: Rows to read; `None` for all.
    """
    content: ColumnElement[Any] = func.coalesce(type_coerce(columns[0], Text), "")
    for one in columns[1:]:
        content = content.concat(func.coalesce(type_coerce(one, Text), ""))
    # The page as a whole is a subquery, so that the same rows can be named without their text.
    rows = select(place.label("place"), content.label("content")).select_from(columns[0].table)
    rows = rows.order_by(place) if condition is None else rows.order_by(place).where(condition)
    after, size = None, _PAGE
    while True:
        page = (rows if after is None else rows.where(place > after)).limit(size)
        try:
            found = [row async for batch in read_rows(session, page, None) for row in batch]
        except Exception as error:
            if unreadable_value(error) is None:
                raise
            if size > 1:
                size = 1
                continue
            after = await session.scalar(select(page.subquery().c.place))
            assert after is not None  # its text was refused
            yield after
            size = _PAGE
            continue
        if not found:
            return
        after = found[-1][0]
