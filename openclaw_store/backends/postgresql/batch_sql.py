"""One PostgreSQL statement for a whole batch, combined from the statements of its operations."""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import partial
from typing import Any

import orjson

CHANNEL = "openclaw_store"
"""The channel of NOTIFY on which a commit notifies the listeners."""

FIRST_LISTENER, OTHER_LISTENERS = 0x6F70656E636C6101, 0x6F70656E636C6102
"""Advisory locks: the first listener holds the former, all further listeners share the latter."""


def array(values: Sequence[Any]) -> str | None:
    """Return the values of one column as the text of an array; `None` if all are NULL.

    Text, because the driver checks each value of a list for being a list itself.
    """
    if values[0] is None and values.count(None) == len(values):
        return None
    # JSON differs only in its brackets, unless it escapes more than backslashes and quotes.
    text = orjson.dumps(values, default=str).decode()
    if "\\" in text:
        escapes = text.replace(r"\\", "")
        if escapes.count("\\") != escapes.count(r"\""):
            text = f"[{','.join(map(_quoted, values))}]"
    return f"{{{text[1:-1]}}}"


def _quoted(value: Any) -> str:
    """Return any value as an element of an array."""
    if value is None:
        return "NULL"
    text = str(value).replace("\\", r"\\").replace('"', r"\"")
    return f'"{text}"'


_PLACEHOLDER = re.compile(r"\$(\d+)")
_ARRAYS = re.compile(r"unnest\(([^)]*)\)")
_ARRAY = re.compile(r"::text::([^[]+)\[\]")

NUMBER = "UPDATE counters SET revision = revision + $1 WHERE id = 1"
"""A guard that always succeeds: it takes a number of revisions after those of other writers.

Its second parameter is for `combined`: the last revision if no other writer takes any. The
difference from the actual last one is added to all versions and revisions that are written.
"""

# Not `previous`: a new row has none.
_NUMBERS = re.compile(r"given\.(?:version|revision)\b")


def combined(guard: str, writes: Sequence[str], *, is_single: bool) -> str:
    """Return a statement that runs all `writes` if `guard` writes its row, and returns a row then.

    The row ends with the counters, of which the commit notifies the listeners. The last parameter
    prevents that if there is no other listener: the advisory lock of the writer's own one. Each
    statement sees the tables as they were before. For single rows it takes values in place of
    arrays, which are faster on both sides.
    """
    gives = "concat_ws(' ', revision, beat) AS counters, revision, beat"
    if guard == NUMBER:
        gives += ", revision - $2 AS moved"
        writes = [_NUMBERS.sub(r"\g<0> + moved", write) for write in writes]
    guard = f"{guard} RETURNING {gives}"
    parts = [f"guard AS ({guard})"]
    count = len(_PLACEHOLDER.findall(guard))
    for number, write in enumerate(writes):
        shift = partial(_shifted, by=count)
        count += len(_PLACEHOLDER.findall(write))
        given = r"guard, (SELECT \1)" if is_single else r"guard, unnest(\1)"
        write = _ARRAYS.sub(given, _PLACEHOLDER.sub(shift, write))
        if is_single:
            write = _ARRAY.sub(r"::\1", write)
        parts.append(f"write_{number} AS ({write})")
    notify, lock = f"pg_notify('{CHANNEL}', counters)::text", f"${count + 1}::bigint"
    # The order matters. A listener that joins after the first test waits for its lock, and sees the
    # commit; one that joined before and became the first has found our own listener gone, and so
    # does the second test.
    notified = f"""CASE WHEN {lock} IS NULL THEN {notify}
        WHEN NOT pg_try_advisory_xact_lock({OTHER_LISTENERS}) THEN {notify}
        WHEN pg_try_advisory_xact_lock_shared({lock}) THEN {notify} ELSE '' END"""
    return f"WITH {', '.join(parts)} SELECT {notified}, revision, beat FROM guard"


def _shifted(placeholder: re.Match[str], by: int) -> str:
    return f"${int(placeholder[1]) + by}"
