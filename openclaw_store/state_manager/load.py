"""Load a cache from the database, without the rows that cannot be read."""

from __future__ import annotations

from sqlalchemy.ext.asyncio import AsyncSession

from openclaw_store.backends import unreadable_value
from openclaw_store.domain import Task
from openclaw_store.errors import InvalidDataError, logger_of
from openclaw_store.repositories import TolerantReader
from openclaw_store.state_manager.cache import Cache
from openclaw_store.state_manager.change_feed import read_initial_state, read_live

logger = logger_of("mirror")


async def load_cache(
    session: AsyncSession, finished_limit: int, *, with_tasks: bool = True
) -> Cache:
    """Return a cache of the state in the snapshot of `session`."""
    try:
        return await _load(session, finished_limit, with_tasks, None)
    except Exception as error:
        if unreadable_value(error) is None:
            raise
    return await _load(session, finished_limit, with_tasks, TolerantReader(session.sync_session))


async def _load(
    session: AsyncSession, finished_limit: int, with_tasks: bool, reader: TolerantReader | None
) -> Cache:
    cache = Cache(await read_initial_state(session), finished_limit)
    unreadable: list[InvalidDataError] = []
    async for kind, rows in read_live(session, reader):
        if kind is Task and not with_tasks:
            break
        unreadable += cache.load(kind, rows)
    for error in [*unreadable, *(reader.unreadable.values() if reader else ())]:
        logger.error("a row is left out: %s", error)
    return cache
