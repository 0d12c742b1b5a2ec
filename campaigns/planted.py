"""Bugs to be found: each breaks a promise of the store, and a campaign must see it.

They are planted from outside: nothing in the library knows of them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from unittest.mock import patch

from openclaw_store import NodeInfo, lifecycle
from openclaw_store.errors import StoreError
from openclaw_store.faults import PostgreSQLFaults
from openclaw_store.heartbeats import Beat
from openclaw_store.records import Record


@contextmanager
def heartbeats_from_the_future() -> Iterator[None]:
    """A heartbeat never gives way to one from before it, though the clock was turned back.

    Breaks: a node that lives is not marked lost for longer than a beat.
    """

    def is_news_to(beat: Beat, record: Record[NodeInfo], now: object = None) -> bool:
        last = record["last_heartbeat"]
        return last is None or beat.at >= last

    with patch.object(Beat, "is_news_to", is_news_to):
        yield


@contextmanager
def times_as_the_clock_says() -> Iterator[None]:
    """What becomes of a task is stamped with the present time, though that was turned back.

    Breaks: no task's times are out of order.
    """
    with patch.object(lifecycle, "_next", lambda _, now: now):
        yield


@contextmanager
def lost_reply_is_no_doubt() -> Iterator[None]:
    """A commit that nobody has answered is taken for one that has not happened.

    Breaks: a call that raises anything but `OutcomeUnknownError` has changed nothing.
    """
    meaning = PostgreSQLFaults._meaning

    def in_no_doubt(
        faults: PostgreSQLFaults, error: Exception, *, own: bool, committing: bool
    ) -> StoreError | None:
        return meaning(faults, error, own=own, committing=False)

    with patch.object(PostgreSQLFaults, "_meaning", in_no_doubt):
        yield


BUGS: dict[str, Callable[[], AbstractContextManager[None]]] = {
    "heartbeats-from-the-future": heartbeats_from_the_future,
    "lost-reply-is-no-doubt": lost_reply_is_no_doubt,
    "times-as-the-clock-says": times_as_the_clock_says,
}
"""By name, what has the bug in the library while it is entered."""


@contextmanager
def planted(name: str | None) -> Iterator[None]:
    """Have a bug in the library of this process; `None` for none.

    Raises:
        KeyError: If there is none of that name.
    """
    if name is None:
        yield
    else:
        with BUGS[name]():
            yield
