"""Tables of values for a test that can share one database."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Sequence
from functools import wraps
from typing import Any

import pytest

Test = Callable[..., Any]


def for_each(name: str | Sequence[str], values: Iterable[Any]) -> Callable[[Test], Test]:
    """Run a coroutine test for each value in turn, with the same fixtures.

    Each value is a subtest: it is reported by itself, and a failure ends none of the others. Use
    `pytest.mark.parametrize` where the test needs a database of its own for each value.

    Args:
        name: The argument that receives the value; or several, and then each value is a tuple.
    """
    names = [name] if isinstance(name, str) else [*name]
    rows = [
        dict(zip(names, [one] if isinstance(name, str) else one, strict=True)) for one in values
    ]

    def decorate(test: Test) -> Test:
        assert inspect.iscoroutinefunction(test)

        @wraps(test)
        async def run(*own: Any, subtests: pytest.Subtests, **fixtures: Any) -> None:
            for number, row in enumerate(rows):
                with subtests.test(f"{'-'.join(names)} {number}"):
                    await test(*own, **fixtures, **row)

        taken = inspect.signature(test).parameters
        fixtures = [parameter for key, parameter in taken.items() if key not in names]
        subtests = inspect.Parameter("subtests", inspect.Parameter.POSITIONAL_OR_KEYWORD)
        run.__signature__ = inspect.Signature([*fixtures, subtests])  # type: ignore[attr-defined]
        return run

    return decorate
