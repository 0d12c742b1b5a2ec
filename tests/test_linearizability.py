"""The search for an order that explains what concurrent callers were answered."""

from __future__ import annotations

import random
import time
from collections.abc import Iterable, Sequence
from dataclasses import replace
from itertools import chain, combinations, permutations
from typing import NamedTuple

import pytest
from hypothesis import given
from hypothesis import strategies as st

from campaigns.checks.linearizability import Operation, find_violation


class Access(NamedTuple):
    """A call of a register: reads or writes a value, or writes it where another was."""

    kind: str
    value: int
    expected: int = 0
    succeeded: bool = True


History = Sequence[Operation[Access]]


def step(value: int, access: Access) -> Iterable[int]:
    if access.kind == "read":
        return [value] if value == access.value else []
    if access.kind == "write":
        return [access.value]
    if access.succeeded != (value == access.expected):
        return []
    return [access.value if access.succeeded else value]


def changes_nothing(access: Access) -> bool:
    return access.kind == "read" or (access.kind == "swap" and not access.succeeded)


def call(invoked: int, returned: int | None, *access: str | int | bool) -> Operation[Access]:
    return Operation(invoked, returned, Access(*access))  # type: ignore[arg-type]  # of a test


def is_explained_by_some_order(history: History) -> bool:
    """The definition itself: try each order of each choice of the unknown operations."""
    known = [one for one in history if one.returned is not None]
    unknown = [one for one in history if one.returned is None]
    choices = chain.from_iterable(
        combinations(unknown, number) for number in range(len(unknown) + 1)
    )
    return any(explains(order) for some in choices for order in permutations([*known, *some]))


def explains(order: Iterable[Operation[Access]]) -> bool:
    value, latest = 0, 0
    for operation in order:
        if operation.returned is not None and operation.returned < latest:
            return False  # it returned before one was invoked that comes before it
        latest = max(latest, operation.invoked)
        values = list(step(value, operation.call))
        if not values:
            return False
        [value] = values
    return True


VALUES = st.integers(0, 2)
ACCESSES = st.builds(
    Access, st.sampled_from(["read", "write", "swap"]), VALUES, VALUES, st.booleans()
)


@st.composite
def operations(draw: st.DrawFn) -> Operation[Access]:
    invoked = draw(st.integers(0, 9))
    returned = draw(st.none() | st.integers(invoked, 12))
    return Operation(invoked, returned, draw(ACCESSES))


@given(st.lists(operations(), max_size=6))
def test_same_answer_as_trying_every_order(history: History) -> None:
    violation = find_violation(history, 0, step, changes_nothing)

    assert (violation is None) == is_explained_by_some_order(history)


@given(st.lists(operations(), max_size=6))
def test_violation_is_the_first_return_that_nothing_explains(history: History) -> None:
    violation = find_violation(history, 0, step, changes_nothing)

    if violation is not None:
        assert violation.returned is not None
        until = violation.returned
        # Those that are under way still when it returns may yet be answered in any way.
        before = [
            Operation(one.invoked, one.returned, one.call)
            for one in history
            if one.returned is not None and one.returned < until
        ]
        before += [
            Operation(one.invoked, None, one.call)
            for one in history
            if one.invoked < until and (one.returned is None or one.returned >= until)
        ]
        assert is_explained_by_some_order(before)


@pytest.mark.parametrize(
    ("history", "is_legal"),
    [
        ([call(1, 2, "write", 1), call(3, 4, "read", 1)], True),
        ([call(1, 2, "write", 1), call(3, 4, "read", 0)], False),
        ([call(1, 4, "write", 1), call(2, 3, "read", 0)], True),
        ([call(1, 4, "write", 1), call(2, 3, "read", 1)], True),
        ([call(1, 9, "write", 1), call(2, 3, "read", 1), call(4, 5, "read", 0)], False),
        ([call(1, None, "write", 1), call(2, 3, "read", 0), call(4, 5, "read", 1)], True),
        ([call(1, None, "write", 1), call(2, 3, "read", 1), call(4, 5, "read", 0)], False),
        ([call(2, None, "write", 1), call(0, 1, "read", 1)], False),
        ([call(1, 2, "swap", 1, 0), call(1, 2, "swap", 2, 0)], False),
        ([call(1, 2, "swap", 1, 0), call(1, 2, "swap", 2, 0, False)], True),
    ],
)
def test_what_may_be_answered(history: History, is_legal: bool) -> None:
    assert (find_violation(history, 0, step, changes_nothing) is None) == is_legal


@pytest.mark.parametrize(
    "under_way",
    [
        pytest.param([call(1, 50, "read", 0)] * 40, id="reads"),
        pytest.param([call(1, 50, "swap", 2, 9, False)] * 40, id="refusals"),
        pytest.param([call(1, None, "swap", 2, 1)] * 40, id="never answered"),
        pytest.param([call(1, None, "swap", 0, 0)] * 40, id="never answered, without effect"),
    ],
)
def test_search_is_short_though_much_is_under_way(under_way: History) -> None:
    steps = 0

    def counted(value: int, access: Access) -> Iterable[int]:
        nonlocal steps
        steps += 1
        assert steps < 5_000, "it tries all the subsets of what is under way"
        return step(value, access)

    history = [replace(one) for one in under_way]  # each is a call of its own
    history += [call(1, 40 + value, "write", value) for value in (0, 1, 2)]
    history += [call(moment, moment, "read", moment % 2 + 1) for moment in range(60, 64)]
    history += [call(50, 60 + value, "write", value % 2 + 1) for value in range(5)]
    assert find_violation(history, 0, counted, changes_nothing) is None

    wrong = call(100, 101, "read", 9)
    assert find_violation([*history, wrong], 0, counted, changes_nothing) is wrong


def test_long_history_takes_no_longer_than_its_length() -> None:
    """20,000 calls, up to eight at a time: an order is found, and one wrong answer is, too."""
    chance = random.Random(0)
    history: list[Operation[Access]] = []
    value = 0
    for moment in range(20_000):
        access = Access("read", value)
        if chance.random() < 0.3:
            access = Access("write", chance.randrange(1000))
            value = access.value
        invoked = 10 * moment - chance.randrange(40)  # and at its moment it takes effect
        history.append(Operation(invoked, 10 * moment + chance.randrange(40), access))

    began = time.process_time()
    assert find_violation(history, 0, step, changes_nothing) is None
    wrong = Operation(10 * 15_000, 10 * 15_000 + 1, Access("read", -1))
    assert find_violation([*history, wrong], 0, step, changes_nothing) is not None
    assert time.process_time() - began < 20
