"""The protocol of PostgreSQL sessions: parameters of many rows, and names that sessions share."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import orjson

from openclaw_store.backends.base import PUBLIC

CHANNEL = "openclaw_store"
"""The channel of NOTIFY on which a commit notifies the listeners."""

FIRST_LISTENER, OTHER_LISTENERS = 0x6F70656E636C6101, 0x6F70656E636C6102
"""Advisory locks: the first listener holds the former, all further listeners share the latter."""


class ListenerNames(NamedTuple):
    """What the listeners of one cluster share with its writers, and with no other cluster."""

    channel: str
    first: int
    others: int


def listener_names(schema: str | None, cluster_id: int) -> ListenerNames:
    """Return the names of a cluster, as migration 0009 writes them into its `store_write`.

    They have its identifier, not its name, which may change. Clusters that shared a lock would only
    be notified more often than necessary.
    """
    if schema == PUBLIC:
        return ListenerNames(CHANNEL, FIRST_LISTENER, OTHER_LISTENERS)
    return ListenerNames(
        f"{CHANNEL}_{cluster_id:x}", FIRST_LISTENER ^ cluster_id, OTHER_LISTENERS ^ cluster_id
    )


def notify(schema: str | None, *, is_citus: bool = False) -> str:
    """Return SQL that notifies all listeners of a cluster when its transaction commits."""
    if schema == PUBLIC:
        return f"NOTIFY {CHANNEL}"
    if is_citus:  # it would send the query to a worker, and its clients listen elsewhere
        return (
            f"DO $$DECLARE own bigint := (SELECT cluster_id FROM {schema}.counters); "
            f"BEGIN PERFORM pg_notify('{CHANNEL}_' || to_hex(own), ''); END$$"
        )
    return f"SELECT pg_notify('{CHANNEL}_' || to_hex(cluster_id), '') FROM {schema}.counters"


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
