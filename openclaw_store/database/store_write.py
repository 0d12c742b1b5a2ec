"""The call of PostgreSQL's function `store_write`, which migration 0014 defines.

Its arguments are arrays, one for each column of the rows of a batch, as text.
"""

from __future__ import annotations

from typing import Any

from sqlalchemy import Dialect
from sqlalchemy.dialects.postgresql import asyncpg

from openclaw_store.database.row_codec import FIELDS
from openclaw_store.database.tables import table_of
from openclaw_store.database.types import Json
from openclaw_store.domain import NodeInfo, Task

POSTGRESQL: Dialect = asyncpg.dialect()  # type: ignore[no-untyped-call]  # it has no types

FUNCTION = "store_write_5"

BODIES = {
    "426b994ba74dd64d8c681d15ca94b625c0fa292d7c3700c62c00b78291aa5311",
    "25b5f5074ee2d2a60753e65779bf950fef8f64f12b3ca5e631d1fa042b745f6a",
}
"""The SHA-256 of its bodies in `public` and in a cluster, without the schema of the tables."""

SETTINGS = [
    "search_path=pg_catalog, pg_temp", "plan_cache_mode=force_generic_plan", "jit=off",
    *(f"enable_{kind}=off" for kind in ("seqscan", "hashjoin", "mergejoin", "material")),
    *(f"enable_{kind}=off" for kind in ("bitmapscan", "sort", "incremental_sort")),
]  # fmt: skip
"""Its settings, in the order in which the server stores them."""

CITUS_SETTINGS = [one.replace("force_generic_plan", "force_custom_plan") for one in SETTINGS]
"""Its settings where Citus distributes the tables, in the same order."""

# Each of them is an argument: a migration that adds a column of `tasks` must define the function
# again, with the columns in this order. The mask of written columns counts by it, too.
CALL_FIELDS = tuple(
    name for name in FIELDS[Task] if name not in ("task_id", "updated_at", "version")
)
"""The columns of a task that PostgreSQL's function `store_write` writes, in its order."""


def element_type(kind: Any) -> str:
    """Return the type of an array's elements: `text` for any length of text, and for JSON."""
    name: str = kind.compile(POSTGRESQL)
    return "text" if name.startswith(("VARCHAR", "TEXT")) or name == "JSON" else name


def _arrays() -> list[str]:
    """Return the types of the arguments between the first one and the last two."""
    # The order is fixed by the definition of the function; `OneCall.finish` sends values in it.
    arrays = ["text[]", "bigint[]", "integer[]", "integer[]"]  # rows: id, version, offset, mask
    kinds = [table_of(Task).c[name].type for name in CALL_FIELDS]
    arrays += [f"{'json' if isinstance(one, Json) else element_type(one)}[]" for one in kinds]
    arrays += ["text[]", "bigint[]", "text[]", "text[]"]  # checked versions, and owners of keys
    arrays += [*["text[]"] * 6, "bigint[]"]  # changes
    arrays += ["text[]", *["integer[]"] * 3, "float8[]"]  # additions to nodes
    arrays += ["text[]", "integer[]", "boolean[]"]  # claims
    return arrays


def signature(schema: str) -> str:
    """Return the name of the function with the types of its arguments."""
    return f"{schema}.{FUNCTION}({', '.join(['timestamptz', *_arrays(), 'text', 'bigint'])})"


def call_of_store_write(schema: str) -> str:
    """Return the statement; its rows are the base revision, former versions, tasks and nodes."""
    arrays = _arrays()
    given = ", ".join(f"${number}::text::{kind}" for number, kind in enumerate(arrays, 2))
    last = len(arrays) + 2
    found = [f"(one.task).{name}" for name in FIELDS[Task]]
    found += [f"(one.node).{name}" for name in FIELDS[NodeInfo]]
    return (
        f"SELECT base, was, {', '.join(found)} FROM {schema}.{FUNCTION}("
        f"$1::timestamptz, {given}, ${last}::text, ${last + 1}::bigint) AS one"
    )
