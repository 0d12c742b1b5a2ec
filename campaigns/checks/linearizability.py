"""Whether what concurrent callers were answered can have come from one call after another.

An object is linearizable if each call seems to take effect at one moment between its invocation and
its return (Herlihy & Wing, "Linearizability: A Correctness Condition for Concurrent Objects", ACM
TOPLAS 12(3), 1990). The search for such moments is that of Wing & Gong ("Testing and Verifying
Concurrent Objects", Journal of Parallel and Distributed Computing 17, 1993) as improved by Lowe
("Testing for Linearizability", Concurrency and Computation: Practice and Experience 29(4), 2017):
no call is put in order before one that it is concurrent with must be, as it returns; and what calls
and state have led nowhere once is not tried again. Besides, a call that changes nothing is put in
order as soon as it fits, as nothing is lost by that; of those that were asked the same and never
returned, one is as good as another; and that one of them changed nothing need not be tried.

Objects that do not depend on each other are best looked at one by one, which is as good (Herlihy &
Wing prove it) and much faster.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

Call = TypeVar("Call", bound=Hashable)
State = TypeVar("State", bound=Hashable)


@dataclass(frozen=True, slots=True, eq=False)
class Operation(Generic[Call]):
    """A call that somebody made, and when, by a clock that all callers share."""

    invoked: int
    returned: int | None
    """`None` if nobody knows what came of it: it took effect at any moment since, or never."""
    call: Call
    """What was asked, and answered."""


def find_violation(
    operations: Iterable[Operation[Call]],
    initial: State,
    step: Callable[[State, Call], Iterable[State]],
    changes_nothing: Callable[[Call], bool],
) -> Operation[Call] | None:
    """Look for an order of the operations that explains all answers; `None` if there is one.

    Args:
        initial: What the object held before.
        step: The states that the object may be in after a call that was answered so; none if a
            call in that state can not have been.
        changes_nothing: Whether a call that was answered so leaves any state as it is. (Where a
            state is not fully known, such a call may tell more of it. To know less never rules
            out a later call, so it may be put in order before that.)

    Returns:
        Else the first operation, by the time of its return, that no order up to then explains.
    """
    returns = _returns(operations)
    start = (0, initial, frozenset[Operation[Call]]())
    reached, tried = [start], {start}
    furthest = 0
    while reached:
        place, state, ahead = reached.pop()
        if place == len(returns):
            return None
        furthest = max(furthest, place)
        operation, under_way = returns[place]
        if operation in ahead:
            following = [(place + 1, state, ahead - {operation})]
        else:
            candidates = _distinct(other for other in under_way if other not in ahead)
            outcomes = [(other, [*step(state, other.call)]) for other in candidates]
            at_once = [
                other
                for other, after in outcomes
                if after == [state] and changes_nothing(other.call)
            ]
            if at_once:
                following = [(place, state, ahead.union(at_once))]
            else:
                following = [
                    (place, one, ahead | {other})
                    for other, after in outcomes
                    for one in after
                    if other.returned is not None or one != state
                ]
        for one in following:
            if one not in tried:
                tried.add(one)
                reached.append(one)
    return returns[furthest][0]


def _distinct(operations: Iterable[Operation[Call]]) -> Iterable[Operation[Call]]:
    """Those that returned, and of those that did not the first one of each call."""
    distinct: dict[Hashable, Operation[Call]] = {}
    for one in operations:
        distinct.setdefault(one.call if one.returned is None else one, one)
    return distinct.values()


def _returns(
    operations: Iterable[Operation[Call]],
) -> Sequence[tuple[Operation[Call], Sequence[Operation[Call]]]]:
    """The operations in the order of their returns, with those under way then, itself the last."""
    events = [(one.invoked, False, one) for one in operations]
    events += [(one.returned, True, one) for _, _, one in events if one.returned is not None]
    returns = []
    under_way: dict[Operation[Call], None] = {}
    for _, is_return, operation in sorted(events, key=lambda event: event[:2]):
        if is_return:
            del under_way[operation]
            returns.append((operation, [*under_way, operation]))
        else:
            under_way[operation] = None
    return returns
