"""Hostile values in every field and argument, on both kinds of database side by side.

Each input is a call of a public method, or a write of a task or node with odd values in it. It is
made twice from the same seed: for a store in an SQLite file and for one on PostgreSQL, which have
begun alike, so both belong to one run. The methods and fields, and their types, are read from their
signatures; a type without known values is a finding.

- Both stores must give the same outcome: the same result, or the same error with the same message.
- Each error must be a `StoreError`.
- A refused call must have changed nothing: all rows, the feed and the counters are compared,
  without the library.
- An accepted value must come back unchanged, from memory and from the database.

After some hundreds of inputs, both stores must have the same content, a new manager must be able to
read it, and a new pair begins.
"""

from __future__ import annotations

import asyncio
import reprlib
import shutil
from collections.abc import Mapping, Sequence
from contextlib import AsyncExitStack
from datetime import datetime
from pathlib import Path
from random import Random
from typing import Any, get_args

from campaigns.checks.stored_values import as_kept, is_same
from campaigns.harness.campaign import POSTGRESQL, Campaign, Run, silenced
from campaigns.harness.direct_access import connect_client
from campaigns.workloads.hostile_calls import WAITS, Drawing, Input, Method, PairedStore, methods
from campaigns.workloads.values import hints_of
from openclaw_store import (
    NodeInfo,
    StoreError,
    Task,
)
from openclaw_store.testing import create_database

INPUTS_A_PAIR = 250

WRITES = frozenset(
    ("add_task", "update_task", "submit_task", "add_node", "update_node", "create", "update")
)
"""Methods that store their argument unchanged."""

STORE_FIELDS = frozenset({"version", "updated_at"})
"""Fields that the store sets itself."""


def perform(run: Run) -> None:
    """Make so many calls, some hundreds of them to each pair of stores."""
    known, template, done = methods(), run.folder / "template.db", 0
    create_database(template)
    with silenced("openclaw_store"):
        while done < run.rounds:
            folder = run.folder / "pair"
            folder.mkdir()
            path = folder / "cluster.db"
            shutil.copyfile(template, path)
            with run.location() as url:
                inputs = min(INPUTS_A_PAIR, run.rounds - done)
                calls = asyncio.run(_use_pair(run, known, path, url, inputs))
            shutil.rmtree(folder)
            run.done(calls)
            done += calls


async def _use_pair(
    run: Run, known: Sequence[Method], path: Path, url: str | Path, inputs: int
) -> int:
    """Make calls to a new pair of stores, and compare them; return the number of calls."""
    async with AsyncExitStack() as stack:
        stores: list[PairedStore] = []
        for location in (path, url):
            client = await connect_client(location)
            stack.push_async_callback(client.close)
            folder = path.parent / f"of-{len(stores)}"
            stores.append(PairedStore(location, folder, client))
            await stack.enter_async_context(stores[-1].manager)
        for number in range(inputs):
            if number % 50 == 0:
                for store in stores:
                    await store.fill()
                    await store.note_rows()
            if await _call(run, known, stores, number):
                break
        contents = [await store.contents() for store in stores]
        for mine, theirs in zip(*contents, strict=False):
            run.check(mine == theirs, f"they hold {mine[:500]} and {theirs[:500]}")
        run.check(
            len(contents[0]) == len(contents[1]), "the stores differ in the number of objects"
        )
    return number + 1


async def _call(
    run: Run, known: Sequence[Method], stores: Sequence[PairedStore], number: int
) -> bool:
    """Make a call to both stores and compare; true if both should be replaced then."""
    seed = run.random.getrandbits(64)
    calls = [Drawing(store, known, Random(seed), number).draw() for store in stores]
    name = calls[0].name
    what = f"{name} of {_shown(calls[0].arguments)}"
    given = [_fields_of(call) for call in calls]
    for store in stores:
        store.clock.advance(1)
    outcomes = await asyncio.gather(
        *[store.attempt(call) for store, call in zip(stores, calls, strict=True)]
    )
    first, second = outcomes
    is_slow = run.is_quick and WAITS in outcomes  # beside other tests
    is_equal = is_slow or first.text == second.text
    run.check(is_equal, f"{what} differs: {first.text} / {second.text}")
    for store, outcome, fields in zip(stores, outcomes, given, strict=True):
        is_same = await store.note_rows()
        if outcome is WAITS:
            run.counts.unknown += 1
            continue
        if outcome.error is None:
            run.counts.acknowledged += 1
            if fields is not None:
                await _check_kept(run, what, store, fields)
            continue
        run.counts.refused += 1
        run.check(
            is_same, f"{what} has changed rows on {store.database.dialect}, but {outcome.text}"
        )
        if not isinstance(outcome.error, StoreError):
            run.wrong(f"{what} is no StoreError on {store.database.dialect}: {outcome.text}")
    return calls[0].is_large


def _fields_of(call: Input) -> Mapping[str, Any] | None:
    """Return the fields of the task or node that a call is to store, before the call."""
    item = call.arguments.get("task", call.arguments.get("node"))
    method = call.name.split()[0].rpartition(".")[2]
    return (
        {"": type(item), **vars(item)}
        if type(item) in (Task, NodeInfo) and method in WRITES
        else None
    )


async def _check_kept(run: Run, what: str, store: PairedStore, given: Mapping[str, Any]) -> None:
    """Check that an accepted value comes back unchanged, from memory and from the database."""
    kind: type[Any] = given[""]
    manager = store.manager
    if kind is Task:
        id = str.__str__(given["task_id"])
        found: list[Any] = [await manager.get_task(id), await manager.task_repo.get(id)]
    else:
        id = str.__str__(given["node_id"])
        found = [await manager.get_node(id), await manager.node_repo.get(id)]
    hints = hints_of(kind)
    for item in found:
        for name, value in given.items():
            if name in ("", "last_heartbeat", *STORE_FIELDS):
                continue
            if value is None and datetime in get_args(hints[name]):
                continue  # the store fills it in
            kept = getattr(item, name, None)
            try:
                expected = as_kept(hints[name], value)
            except (
                TypeError,
                ValueError,
                AttributeError,
            ) as error:  # the value should have been refused
                expected = error
            if not is_same(kept, expected):
                run.wrong(
                    f"{what} is kept on {store.database.dialect} with {name}={_shown(kept)},"
                    f" not {_shown(expected)}"
                )


_short = reprlib.Repr()
_short.maxlevel = 3
_short.maxdict = 30
_short.maxlist = 8
_short.maxstring = 60
_short.maxother = 300


def _shown(value: Any) -> str:
    """Return a value as text, if its `repr` works."""
    try:
        if type(value) in (Task, NodeInfo):
            value = vars(value)
        if isinstance(value, Mapping):
            return ", ".join(f"{key}={_shown(item)}" for key, item in value.items())
        return _short.repr(value)
    except Exception:  # its own `repr` may raise
        return f"a {type(value).__name__} that cannot be shown"


CAMPAIGN = Campaign(
    name="hostile",
    title="odd values in every field and argument, on SQLite and PostgreSQL side by side",
    promises=("P2", "P7", "P8"),
    perform=perform,
    rounds=50_000,
    quick_rounds=200,
    unit="inputs",
    kinds=(POSTGRESQL,),
)
