"""One statement of PostgreSQL for a whole batch, made of the statements of its parts."""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import partial
from typing import Any

import orjson

CHANNEL = "openclaw_store"
"""On which whoever commits to PostgreSQL notifies those who listen."""


FIRST_LISTENER, OTHER_LISTENERS = 0x6F70656E636C6101, 0x6F70656E636C6102
"""Advisory locks of those who listen: the first one has the former, all others share the latter."""


def array(values: Sequence[Any]) -> str | None:
    """What is given of one column, for at least one row; `None` where there are only NULLs.

    The text of an array: of a list, the driver asks for each value whether it is a list itself.
    """
    if values[0] is None and values.count(None) == len(values):
        return None
    # JSON but for its brackets, as long as it escapes nothing but backslashes and quotes.
    text = orjson.dumps(values, default=str).decode()
    if "\\" in text:
        escapes = text.replace(r"\\", "")
        if escapes.count("\\") != escapes.count(r"\""):
            text = f"[{','.join(map(_quoted, values))}]"
    return f"{{{text[1:-1]}}}"


def _quoted(value: Any) -> str:
    """An element of an array, whatever it is."""
    if value is None:
        return "NULL"
    text = str(value).replace("\\", r"\\").replace('"', r"\"")
    return f'"{text}"'


PLACEHOLDER = re.compile(r"\$(\d+)")


_ARRAYS = re.compile(r"unnest\(([^)]*)\)")


_ARRAY = re.compile(r"::text::([^[]+)\[\]")


NUMBER = "UPDATE counters SET revision = revision + $1 WHERE id = 1"
"""A guard that always holds: it takes so many revisions, behind those that others have taken.

Its second parameter is for `combined`: the last of these revisions if no other takes any. By how
much the last proves to be larger, all versions and revisions that are written are raised.
"""


# `previous` needs nothing: what is new has none.
_NUMBERS = re.compile(r"given\.(?:version|revision)\b")


def combined(guard: str, writes: Sequence[str], *, is_single: bool) -> str:
    """What does several of PostgreSQL's statements if `guard` writes its row, and then gives a row.

    The row ends with the counters: those who listen are told them when it is committed. The last
    parameter spares it that: a lock, which somebody has who need not be told, if there is nobody
    else. Each statement sees the tables as they were before. For single rows it takes values in
    place of arrays, with which both sides are done sooner.
    """
    gives = "concat_ws(' ', revision, beat) AS counters, revision, beat"
    if guard == NUMBER:
        gives += ", revision - $2 AS moved"
        writes = [_NUMBERS.sub(r"\g<0> + moved", write) for write in writes]
    guard = f"{guard} RETURNING {gives}"
    parts = [f"guard AS ({guard})"]
    places = len(PLACEHOLDER.findall(guard))
    for number, write in enumerate(writes):
        shift = partial(shifted, by=places)
        places += len(PLACEHOLDER.findall(write))
        given = r"guard, (SELECT \1)" if is_single else r"guard, unnest(\1)"
        write = _ARRAYS.sub(given, PLACEHOLDER.sub(shift, write))
        if is_single:
            write = _ARRAY.sub(r"::\1", write)
        parts.append(f"write_{number} AS ({write})")
    tell, lock = f"pg_notify('{CHANNEL}', counters)::text", f"${places + 1}::bigint"
    # In this order. Who becomes the first behind the one waits for it, and then sees the commit;
    # who did so before has found the owner of our lock gone, and so is it found here.
    told = f"""CASE WHEN {lock} IS NULL THEN {tell}
        WHEN NOT pg_try_advisory_xact_lock({OTHER_LISTENERS}) THEN {tell}
        WHEN pg_try_advisory_xact_lock_shared({lock}) THEN {tell} ELSE '' END"""
    return f"WITH {', '.join(parts)} SELECT {told}, revision, beat FROM guard"


def shifted(place: re.Match[str], by: int) -> str:
    """Return a placeholder whose number is larger by `by`."""
    return f"${int(place[1]) + by}"
