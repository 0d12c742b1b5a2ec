"""The changes of one task or node: a chain in which each change names the previous one."""

from __future__ import annotations

from typing import Any

from sqlalchemy import (
    CTE,
    ColumnElement,
    FromClause,
    Select,
    Text,
    and_,
    bindparam,
    select,
    type_coerce,
)

from openclaw_store.database.tables import Base

_CHANGES = Base.metadata.tables["changes"]


def history_of(newest: int, item: str, id: str) -> Select[Any]:
    """Return the query of the changes of one task or node up to the `newest`, newest first."""
    revisions = select(chain_of_changes().c.revision)
    # Reasons as they are stored: the type would return sealed ones as objects for callers.
    reason = type_coerce(_CHANGES.c.reason, Text).label("reason")
    columns = [reason if one.name == "reason" else one for one in _CHANGES.c]
    query = select(*columns).where(_CHANGES.c.revision.in_(revisions))
    query = query.order_by(_CHANGES.c.revision.desc())
    return query.params(newest=newest, item_=item, id=id)


def status_changes() -> Select[Any]:
    """Return the query of the times at which its status changed, newest first."""
    chain = chain_of_changes()
    changed = chain.c.from_status.is_distinct_from(chain.c.to_status)
    return select(chain.c.changed_at).where(changed)


def chain_of_changes() -> CTE:
    """Return the changes of one task or node, from the `newest` to the first."""
    newest = _CHANGES.alias()
    chain = (
        select(newest)
        .where(
            newest.c.revision == bindparam("newest"),
            newest.c.item == bindparam("item_"),
            newest.c.item_id == bindparam("id"),
        )
        .cte("chain", recursive=True)
    )
    older = _CHANGES.alias()
    return chain.union_all(select(older).join(chain, _is_next(chain, older)))


def _is_next(chain: CTE, older: FromClause) -> ColumnElement[bool]:
    # `older.revision < chain.revision` ends the recursion: a `previous` that was written by hand
    # may refer to any revision, even a later one.
    return and_(
        older.c.revision == chain.c.previous,
        older.c.revision < chain.c.revision,
        older.c.item == chain.c.item,
        older.c.item_id == chain.c.item_id,
    )
