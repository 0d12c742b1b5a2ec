"""What observes a database from outside: metrics and traces. Without any, it costs nothing."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol, TypeVar

from openclaw_store.errors import logger_of

logger = logger_of("telemetry")

Handler = TypeVar("Handler", bound=Callable[..., Any])


class Telemetry(Protocol):
    """Observes the commits of a database, and the managers and workers that use it."""

    def note_commit(
        self,
        operations: int,
        seconds: float | None,
        events: Sequence[Any],
        outcomes: Sequence[Any],
    ) -> None:
        """Note a commit; called on the thread of the writer, and for `transaction` on a loop.

        Args:
            operations: Operations in the transaction.
            seconds: Duration of the commit; `None` for a `transaction`.
            events: The committed changes, as listeners get them.
            outcomes: The result or error of each operation.
        """

    def attach(self, manager: Any) -> None:
        """Observe a new `StateManager`."""

    def traced(self, handler: Handler) -> Handler:
        """Return the handler of a worker, observed."""


def note_commit(
    telemetry: Sequence[Telemetry],
    operations: int,
    seconds: float | None,
    events: Sequence[Any],
    outcomes: Sequence[Any],
) -> None:
    """Report a commit to the exporters; their errors do not harm it."""
    for one in telemetry:
        try:
            one.note_commit(operations, seconds, events, outcomes)
        except Exception:  # the callers must get their answers
            logger.exception("a commit could not be measured")
