"""A linearizability checker: could the answers of concurrent callers come from a serial order?

An object is linearizable if each call seems to take effect at one moment between its invocation and
its return (Herlihy & Wing, "Linearizability: A Correctness Condition for Concurrent Objects", ACM
TOPLAS 12(3), 1990). The search for such moments is that of Wing & Gong ("Testing and Verifying
Concurrent Objects", Journal of Parallel and Distributed Computing 17, 1993) as improved by Lowe
("Testing for Linearizability", Concurrency and Computation: Practice and Experience 29(4), 2017): a
call is placed only when it must be, at the return of a call that it overlaps; and a set of placed
calls and a state that have failed once are not tried again. Three rules are added. A call that
changes nothing is placed as soon as it fits, since that loses no solution. Unreturned calls with
equal arguments are interchangeable. An unreturned call that changes nothing is never placed.

Check independent objects one by one: the result is the same (Herlihy & Wing prove it), and the
search is much faster.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

Call = TypeVar("Call", bound=Hashable)
State = TypeVar("State", bound=Hashable)


@dataclass(frozen=True, slots=True, eq=False)
class Operation(Generic[Call]):
    """A call with its times, by a clock that all callers share."""

    invoked: int
    returned: int | None
    """`None` for a call without an answer: it took effect at any later moment, or never."""
    call: Call
    """The arguments and the answer."""


def find_violation(
    operations: Iterable[Operation[Call]],
    initial: State,
    step: Callable[[State, Call], Iterable[State]],
    changes_nothing: Callable[[Call], bool],
) -> Operation[Call] | None:
    """Search for an order of the operations that explains all answers; `None` if there is one.

    Args:
        initial: The state before the first call.
        step: Returns the possible states after a call with its answer; empty if the answer is
            impossible in that state.
        changes_nothing: Returns true if a call with its answer leaves any state unchanged. (If a
            state is partly unknown, such a call may determine more of it. Less knowledge never
            rules out a later call, so the call may still be placed before that.)

    Returns:
        The first operation, by the time of its return, that no order up to then explains.
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
            # It was placed before, so its return adds no constraint.
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
                # No later order can need them elsewhere: they fit here and change nothing.
                following = [(place, state, ahead.union(at_once))]
            else:
                following = [
                    (place, one, ahead | {other})
                    for other, after in outcomes
                    for one in after
                    if other.returned is not None or one != state
                ]
        for one in following:
            # Orders with the same state and the same placed calls have the same continuations.
            if one not in tried:
                tried.add(one)
                reached.append(one)
    return returns[furthest][0]


def _distinct(operations: Iterable[Operation[Call]]) -> Iterable[Operation[Call]]:
    """Yield the returned operations, and the first one of each set of equal unreturned calls."""
    distinct: dict[Hashable, Operation[Call]] = {}
    for one in operations:
        distinct.setdefault(one.call if one.returned is None else one, one)
    return distinct.values()


def _returns(
    operations: Iterable[Operation[Call]],
) -> Sequence[tuple[Operation[Call], Sequence[Operation[Call]]]]:
    """Return the operations by time of return, each with the operations under way, itself last."""
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
