"""The entities of queries of callers: their sealed values are opened as they are loaded."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from typing import Any

from sqlalchemy import event
from sqlalchemy.orm import QueryContext
from sqlalchemy.orm.attributes import set_committed_value

from openclaw_store.database.row_codec import places_of
from openclaw_store.database.tables import ChangeRow, NodeRow, OutgoingRow, PastChangeRow, TaskRow
from openclaw_store.encryption import Sealed


@cache  # once in a process; without keys, never
def open_when_loaded() -> None:
    """Open the sealed values of each entity that a session of a database with keys loads.

    The query raises `SealedValueError` if one of them cannot be opened.
    """
    for row in (TaskRow, NodeRow, ChangeRow, PastChangeRow, OutgoingRow):
        _listen(row)


def _listen(row: Any) -> None:
    mapper, table = row.__mapper__, row.__table__
    names = [
        mapper.get_property_by_column(table.c[place.column]).key
        for _, place in places_of(table, list(table.c.keys()))
    ]
    owner = [name for name in ("item", "item_id") if name in table.c] or [
        column.name for column in table.primary_key
    ]

    def load(entity: Any, context: QueryContext, _: Sequence[str] | None = None) -> None:
        database = context.session.info.get("database")
        values = entity.__dict__
        if database is None or not all(name in values for name in owner):
            return
        for name in names:
            if isinstance(values.get(name), Sealed):
                value = database.unseal(values[name], ":".join(values[one] for one in owner))
                set_committed_value(entity, name, value)

    event.listen(row, "load", load)
    event.listen(row, "refresh", load)
