"""Pages of the feed: where the counters stand, some changes, and the tasks they are about.

One statement reads all of it, so following others costs little more than the rows do.
"""

from __future__ import annotations

from collections.abc import Container, Iterator, Sequence
from itertools import chain
from typing import Any, NamedTuple

import orjson
from sqlalchemy.ext.asyncio import AsyncSession
from sqlalchemy.orm import Session

from openclaw_store.database import FIELDS
from openclaw_store.domain import ENTITY_NAMES, JSON_FIELDS, Task
from openclaw_store.repositories import counters_of

_TEXTS = 16
"""Into so many texts SQLite puts a page, as none may be longer than a billion bytes."""

STEP = ("revision", "changed_at", "item", "item_id", "from_status", "to_status")
"""What a cache needs of a change, in this order."""

STEP_WIDTH = len(STEP)
"""How many values of a row are the change; those behind it are its task."""

REVISION, CHANGED_AT, OF_ITEM, ITEM_ID, *_ = range(STEP_WIDTH)
"""Where in a row they stand."""

_COLUMNS = [*(f"changes.{name}" for name in STEP), *(f"tasks.{name}" for name in FIELDS[Task])]

# The version of a task is the revision of its last change. So the last change of a task that is
# read brings it, and those before it need not.
_CHANGES = f"""changes LEFT JOIN tasks
    ON changes.item = '{ENTITY_NAMES[Task]}' AND tasks.task_id = changes.item_id
    AND (tasks.version <= changes.revision OR tasks.version > %(until)s)
    WHERE changes.revision > %(since)s AND changes.revision <= %(until)s"""

# JSON as text: for each value of its own type, the driver calls a function of Python's.
_TEXTS_OF_JSON = {f"tasks.{name}": f"tasks.{name}::text" for name in JSON_FIELDS[Task]}

_AS_ROWS = f"""
    SELECT counters.revision, beat, compacted, batch.* FROM counters LEFT JOIN (
        SELECT {", ".join(_TEXTS_OF_JSON.get(one, one) for one in _COLUMNS)}
        FROM {_CHANGES}) AS batch ON true
    WHERE counters.id = 1 ORDER BY batch.revision""" % {"since": "$1", "until": "$2"}

_PART = f"(SELECT json_group_array(json_array({', '.join(_COLUMNS)})) FROM {_CHANGES})"

# For each row, SQLite's driver lets other threads run, and waits for its turn again. So there is
# one row; even without other threads, this takes two thirds of the time.
_AS_JSON = "SELECT revision, beat, compacted, {} FROM counters WHERE id = 1".format(
    ", ".join(
        _PART % {"since": f"?{2 * part + 1}", "until": f"?{2 * part + 2}"} for part in range(_TEXTS)
    )
)


class LogPage(NamedTuple):
    """What the feed says of some revisions."""

    revision: int
    """The newest one there is."""
    beat: int
    """The newest flush of heartbeats."""
    compacted: int
    """Up to here, changes were removed."""
    rows: Sequence[Sequence[Any]]
    """Each a change, in order, and behind it the task it is about, as the driver gave them.

    Of several changes of a task only the last is sure to have it. What is not there is `None`.
    """
    is_whole: bool
    """Whether none of those that were asked for is missing."""


async def read_page(
    session: AsyncSession, since: int, until: int, known: Container[int]
) -> LogPage:
    """The changes behind `since` up to `until`, in order; on SQLite without most of the `known`."""
    if session.get_bind().dialect.name == "sqlite":
        gaps = list(_gaps(since, until, known))
        nothing = [(until, until)] * (_TEXTS - len(gaps))
        found = await _fetch(session, _AS_JSON, *chain(*gaps, *nothing))
        rows = list(chain.from_iterable(map(orjson.loads, found[0][3:]))) if found else []
    else:
        gaps = [(since, until)]
        found = await _fetch(session, _AS_ROWS, since, until)
        rows = [row[3:] for row in found if row[3] is not None]
    revision, beat = counters_of(found)
    asked = sum(max(0, min(end, revision) - start) for start, end in gaps)
    return LogPage(revision, beat, found[0][2], rows, len(rows) == asked)


def _gaps(since: int, until: int, known: Container[int]) -> Iterator[tuple[int, int]]:
    """The parts of a page, each from its first unknown revision to its last, as (behind, up to).

    A part of which all is known is left out: what a process writes itself often stands in a row.
    """
    length = -(-(until - since) // _TEXTS)
    for start in range(since, until, length):
        revisions = range(start + 1, min(start + length, until) + 1)
        unknown = [revision for revision in revisions if revision not in known]
        if unknown:
            yield unknown[0] - 1, unknown[-1]


async def _fetch(session: AsyncSession, sql: str, *parameters: int) -> Sequence[Any]:
    def fetch(session: Session) -> Sequence[Any]:
        result = session.connection().exec_driver_sql(sql, parameters)
        # SQLAlchemy's own rows take longer to make than these to read.
        rows: Sequence[Any] = result.cursor_strategy.fetchall(result, result.cursor)
        return rows

    return await session.run_sync(fetch)
